"""Fixtures shared by all tests: a pinned environment and real projects in temporary folders."""
from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "scalarloop.py"
sys.path.insert(0, str(ROOT))

import scalarloop  # noqa: E402  (found through the line above)

CONFIG: Dict[str, Dict[str, Any]] = {
    "loop": {"goal": "Make value.txt smaller.", "scope": "src/**", "name": "t", "iterations": 1},
    "agent": {"timeout": "30s", "rework": 0},
    "metric": {"command": "python3 metric.py", "timeout": "30s"},
    "isolation": {"level": "portable"},
}
METRIC = """
    import pathlib
    print("METRIC value=%s" % pathlib.Path("src/value.txt").read_text().strip())
"""


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pin the environment of every test."""
    pin(monkeypatch, tmp_path)


def pin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the user's own home, git configuration, language and time zone unusable."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)      # what an earlier test's call remembered
    # python3 is this very interpreter, not a version manager's slow script around one
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "SCALARLOOP_LEDGER_KEY",
                 "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.delenv(name, raising=False)


class Project:
    """A user's repository with a loop.ini: `src/value.txt` holds the number that is measured."""

    def __init__(self, root: Path, tmp: Path):
        self.root, self.tmp = root, tmp
        self.config: Dict[str, Dict[str, Any]] = {k: dict(v) for k, v in CONFIG.items()}
        self.python = sys.executable

    def git(self, *args: str, check: bool = True, cwd: Optional[Path] = None, stdin: str = "") -> str:
        """Run the real git in the user's repository."""
        env = {**os.environ, "GIT_AUTHOR_DATE": "@1700000000 +0000",
               "GIT_COMMITTER_DATE": "@1700000000 +0000"}
        identity = ["-c", "user.name=user", "-c", "user.email=user@example.com",
                    "-c", "commit.gpgsign=false", "-c", "init.defaultBranch=main"]
        done = subprocess.run(["git", *identity, *args], cwd=cwd or self.root, env=env,
                              input=stdin.encode(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
        if check and done.returncode:
            raise AssertionError(f"git {args}: {done.stderr.decode(errors='replace')}")
        return done.stdout.decode("utf-8", "surrogateescape").strip()

    def write(self, path: str, text: str = "", mode: Optional[int] = None) -> Path:
        """Write a file of the project, dedented."""
        full = self.root / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        if mode is not None:
            full.chmod(mode)
        return full

    def agent(self, source: str, name: str = "agent.py") -> Path:
        """Make a Python program, outside the repository, the agent."""
        path = self.tmp / name
        path.write_text(textwrap.dedent(source).lstrip("\n"), encoding="utf-8")
        self.config["agent"]["command"] = f"{self.python} {path}"
        return path

    def turns(self, *sources: str) -> None:
        """Make each source the agent of one turn: the n-th plays iteration n, the last goes on."""
        folder = self.tmp / "turns"
        folder.mkdir(exist_ok=True)
        for number, source in enumerate(sources, 1):
            (folder / f"{number}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        self.agent(f"""
            import os, runpy
            n = min(int(os.environ["SCALARLOOP_ITERATION"]), {len(sources)})
            runpy.run_path({str(folder)!r} + "/%d.py" % n, run_name="__main__")
        """)
        self.config["loop"].setdefault("patience", 1000)
        self.config["loop"]["iterations"] = len(sources)

    def save_config(self, path: str = "loop.ini") -> Path:
        """Write loop.ini from `config`."""
        lines: List[str] = []
        for section, keys in self.config.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {value}" for key, value in keys.items()]
        full = self.root / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return full

    def commit(self, message: str = "change") -> str:
        """Commit everything; return the commit."""
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def run(self, *args: str, config: bool = True, env: Optional[Dict[str, str]] = None,
            timeout: float = 120, python: Optional[str] = None) -> "Result":
        """Run `scalarloop.py ARGS loop.ini` as a user would."""
        if config:
            self.save_config()
        words = with_config(args, "loop.ini")
        done = subprocess.run([python or self.python, str(TOOL), *words], cwd=self.root,
                              env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout)
        return Result(done.returncode, done.stdout.decode("utf-8", "replace"),
                      done.stderr.decode("utf-8", "replace"))

    def call(self, *args: str) -> "Result":
        """Run `scalarloop.main` in this process: for hundreds of quick calls."""
        out, err = io.StringIO(), io.StringIO()
        listened = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = [signal.getsignal(number) for number in listened]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = scalarloop.main(with_config(args, str(self.root / "loop.ini")))
        finally:
            for number, handler in zip(listened, handlers):
                signal.signal(number, handler)
        return Result(code, out.getvalue(), err.getvalue())

    @property
    def state(self) -> Path:
        """Return the state folder."""
        return self.root / ".scalarloop" / self.config["loop"]["name"]

    def ledger(self) -> List[Dict[str, Any]]:
        """Return the ledger's records."""
        text = (self.state / "ledger.jsonl").read_text(encoding="ascii")
        return [json.loads(line) for line in text.splitlines()]

    def lines(self) -> List[bytes]:
        """Return the ledger's lines, each with its end."""
        return (self.state / "ledger.jsonl").read_bytes().splitlines(keepends=True)

    def put_ledger(self, data: bytes) -> None:
        """Put another ledger in place."""
        (self.state / "ledger.jsonl").write_bytes(data)

    def iterations(self) -> List[Dict[str, Any]]:
        """Return the ledger's iteration records."""
        return [record for record in self.ledger() if record["type"] == "iteration"]

    def verdicts(self) -> List[str]:
        """Return `verdict reason` of every iteration."""
        return [f"{row['verdict']} {row['reason']}" for row in self.iterations()]

    def fingerprint(self) -> Dict[str, str]:
        """Return what a run must never change: work tree, index, HEAD, config, hooks, other refs."""
        facts = {"HEAD": self.git("rev-parse", "HEAD"),
                 "branch": self.git("symbolic-ref", "-q", "HEAD", check=False)}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if name.split("/")[0] in (".scalarloop", "loop.ini") or name.startswith(".git/") and \
                    name.split("/")[1] not in ("config", "hooks", "index", "info", "HEAD"):
                continue
            if path.is_symlink():
                facts[name] = "link " + os.readlink(path)
            elif path.is_file():
                facts[name] = f"{path.stat().st_mode:o} " + hashlib.sha256(
                    path.read_bytes()).hexdigest()
        refs = self.git("for-each-ref", "--format=%(refname) %(objectname)")
        facts["refs"] = "\n".join(line for line in refs.splitlines() if "scalarloop" not in line)
        return facts

    def leftovers(self) -> List[str]:
        """Return what a run left in the temporary folder."""
        return sorted(os.listdir(os.environ["TMPDIR"]))


def with_config(words: Sequence[str], path: str) -> List[str]:
    """Put loop.ini before the options, unless the words name a file of their own."""
    if any(word.endswith(".ini") for word in words):
        return list(words)
    at = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    return [*words[:at], path, *words[at:]]


class Result:
    """How a run of the tool ended."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Return a committed project whose metric prints the number in src/value.txt (100)."""
    return make_project(tmp_path)


def make_project(tmp_path: Path) -> Project:
    """Make that project in a folder."""
    root = tmp_path / "project"
    root.mkdir()
    made = Project(root, tmp_path)
    made.git("init", "-q")
    made.write("metric.py", METRIC)
    made.write("src/value.txt", "100\n")
    made.write("data/truth.txt", "sealed\n")
    made.write(".gitignore", "__pycache__/\n*.pyc\n")
    made.agent("pass")
    made.save_config()
    made.commit("start")
    return made


def lower_by(step: int) -> str:
    """Return a turn that lowers the number by `step` (a negative one raises it)."""
    return f"""
        value = int(open("src/value.txt").read())
        open("src/value.txt", "w").write("%d\\n" % (value - {step}))
    """


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return the one finished run that `finished` copies: keep, discard, keep, violation, stop."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pin(monkeypatch, folder)
        made = make_project(folder)
        made.turns(lower_by(10), lower_by(-5), lower_by(10), 'open("stray.txt", "w").close()')
        made.save_config()
        made.commit("loop.ini")
        result = made.run()
    assert result.code == 0, result
    assert [row["verdict"] for row in made.iterations()] == ["keep", "discard", "keep", "violation"]
    return made


@pytest.fixture
def finished(finished_once: Project, tmp_path: Path) -> Project:
    """Return a copy of a finished run, to tamper with."""
    shutil.copytree(finished_once.root, tmp_path / "project", symlinks=True)
    copy = Project(tmp_path / "project", tmp_path)
    copy.config = {name: dict(keys) for name, keys in finished_once.config.items()}
    return copy


def chained(records: Iterable[Dict[str, Any]], secret: Optional[bytes] = None) -> bytes:
    """Return a ledger of these records with sequence, chain and hashes made anew, as a forger would."""
    return b"".join(chain(records, secret))


def chain(records: Iterable[Dict[str, Any]], secret: Optional[bytes] = None) -> Iterator[bytes]:
    """Yield the lines of such a ledger."""
    prev = scalarloop.FIRST_PREV
    for seq, record in enumerate(records):
        body = {name: value for name, value in record.items() if name != "hash"}
        body.update(seq=seq, prev=prev)
        prev = scalarloop.record_hash(scalarloop.canonical(body), secret)
        yield scalarloop.canonical({**body, "hash": prev}) + b"\n"
