"""Whole loops with true programs: Claude Code, Codex and a real llama.cpp engine; no network.

Each test copies examples/bundle and lets scalarloop run it, under the best isolation there is, with
a true agent in the double's place. Models are scripted servers on loopback, or toy models that the
test writes and a real engine runs. The programs are those of tests/install_real.sh, in the folder
that SCALARLOOP_REAL_DIR names; where one is missing its tests are skipped, loudly.
"""
from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from conftest import ROOT, Project
from fake_servers import Reply, Request, ScriptedServer, Tool
from test_edits import edits, whole
from toy_gguf import Answer, write_toy

pytestmark = pytest.mark.real
REAL = Path(os.environ.get("SCALARLOOP_REAL_DIR") or "/nonexistent")
KEY = "sk-dummy-0123456789"
TOKEN = "SCALAR_LOOP_GIVE_UP"
TIDY_MAIN = """\
import sys

from reader import read_numbers
from luhn import compute_check_digit
from report import format_result
from legacy import compute_check_digit_by_table
from trace import trace

for number in read_numbers(sys.stdin):
    sys.stdout.write(format_result(compute_check_digit(number)))
"""
SLIM_MAIN = """\
import sys

from reader import read_numbers
from luhn import compute_check_digit
from report import format_result

for number in read_numbers(sys.stdin):
    sys.stdout.write(format_result(compute_check_digit(number)))
"""
SLIM_REPORT = "def format_result(digit):\n    return f'{digit}\\n'\n"


def loud_skip(what: str) -> None:
    pytest.skip(f"LOUD: {what} is not there (bash tests/install_real.sh FOLDER, then set "
                "SCALARLOOP_REAL_DIR=FOLDER)")


def node_program(name: str) -> Path:
    path = REAL / "node_modules" / ".bin" / name
    if not path.exists() or subprocess.run([path, "--version"], capture_output=True).returncode:
        loud_skip(name)
    return path


@pytest.fixture
def engine_python() -> str:
    """Return a Python that has the llama.cpp wheel."""
    python = str(REAL / "venv" / "bin" / "python")
    try:
        found = subprocess.run([python, "-c", "import xllamacpp"], capture_output=True).returncode
    except OSError:
        found = 1
    if found:
        loud_skip("llama.cpp (the wheel xllamacpp)")
    return python


@pytest.fixture
def bundle(tmp_path: Path) -> Project:
    """Return examples/bundle as a repository of its own, for three iterations of another agent."""
    root = tmp_path / "bundle"
    shutil.copytree(ROOT / "examples" / "bundle", root,
                    ignore=shutil.ignore_patterns("agent", ".scalarloop", "__pycache__"))
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(root / "loop.ini")
    made = Project(root, tmp_path)
    made.config = {name: {key: " ".join(value.split()) for key, value in parser[name].items()}
                   for name in parser.sections()}
    made.config["loop"]["name"] = "t"
    made.config["loop"]["iterations"] = "3"
    made.config["agent"] = {"timeout": "2m", "rework": "0"}
    made.config["adapter"] = {}
    made.config["isolation"] = {"level": "auto"}
    made.git("init", "-q")
    made.save_config()
    made.commit("start")
    return made


def run_loop(bundle: Project, **env: str) -> List[Dict[str, Any]]:
    """Run the loop to its end; return its iterations. The user's files stay as they are."""
    before = bundle.fingerprint()
    result = bundle.run(env=env, timeout=300)
    assert result.code == 0, f"{result}\n{logs(bundle)}"
    assert bundle.fingerprint() == before
    assert bundle.run("verify", env=env).code == 0
    assert bundle.leftovers() == []
    return bundle.iterations()


def logs(bundle: Project) -> str:
    """Return the heads of all logs of a run, for the message of a failed test."""
    return "\n".join(f"--- {path.parent.name}/{path.name}\n{path.read_text()[:3000]}"
                     for path in sorted(bundle.state.glob("iterations/*/agent*.log")))


def prompt_iteration(prompt: str) -> int:
    """Return which iteration a prompt is for, by the history in it."""
    return 1 + len(re.findall(r"^- #\d+ ", prompt, re.M))


def verdicts(rows: List[Dict[str, Any]]) -> List[str]:
    return [row["verdict"] for row in rows]


# ── claude ──────────────────────────────────────────────────────────────────────────────────────

def claude_script(turn: int, request: Request) -> Any:
    """Play three iterations: a true gain, an edit of the build script, another true gain."""
    texts = [block.get("text", "") for message in request.body["messages"]
             for block in message["content"] if isinstance(block, dict)]
    iteration = prompt_iteration("\n".join(texts))
    path = {1: "src/main.py", 2: "build.py"}.get(iteration, "src/report.py")
    if turn == 0:
        return Reply(tools=[Tool("Read", {"file_path": path})])
    if turn == 1:
        content = {1: TIDY_MAIN, 2: "print('METRIC bytes=1')\n"}.get(iteration, SLIM_REPORT)
        return Reply(tools=[Tool("Write", {"file_path": path, "content": content})])
    return f"METRIC bytes=1\nThis isn't the moment for {TOKEN}."


def test_claude_against_a_scripted_server(bundle: Project) -> None:
    claude = node_program("claude")
    bundle.config["agent"]["adapter"] = "claude"
    bundle.config["adapter"]["program"] = str(claude)
    with ScriptedServer(claude_script) as server:
        rows = run_loop(bundle, ANTHROPIC_BASE_URL=server.root, ANTHROPIC_API_KEY=KEY)
    assert verdicts(rows) == ["keep", "violation", "keep"], logs(bundle)
    assert rows[1]["reason"] == "seal.modified"
    assert rows[2]["value"] < rows[0]["value"]
    assert KEY not in logs(bundle)


def test_the_built_in_claude_works_without_an_adapters_folder(bundle: Project) -> None:
    claude = node_program("claude")
    alone = bundle.tmp / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "scalarloop.py", alone)
    bundle.config["agent"]["adapter"] = "claude"
    with ScriptedServer(claude_script) as server:
        bundle.save_config()
        done = subprocess.run(
            [bundle.python, str(alone / "scalarloop.py"), "loop.ini"], cwd=bundle.root, timeout=300,
            env={**os.environ, "PATH": f"{claude.parent}:{os.environ['PATH']}",
                 "ANTHROPIC_BASE_URL": server.root, "ANTHROPIC_API_KEY": KEY}, capture_output=True)
    assert done.returncode == 0, done
    assert verdicts(bundle.iterations()) == ["keep", "violation", "keep"], logs(bundle)


# ── a real engine ───────────────────────────────────────────────────────────────────────────────

ENGINE = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.hostnames, params.n_ctx, params.n_parallel, params.warmup = ["127.0.0.1"], 16384, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
"""


@pytest.fixture
def engine(tmp_path: Path, engine_python: str) -> Iterator[Any]:
    """Return a function that starts a real llama.cpp server on a toy model, for the test's time."""
    started: List[subprocess.Popen] = []

    def start(answers: List[Answer]) -> str:
        model = write_toy(tmp_path / "toy.gguf", answers)
        with ScriptedServer([""]) as probe:
            port = probe.port
        with open(tmp_path / "engine.log", "wb") as log:
            started.append(subprocess.Popen([engine_python, "-c", ENGINE, str(model), str(port)],
                                            stdout=log, stderr=log))
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return f"http://127.0.0.1:{port}"
            except OSError:
                assert started[-1].poll() is None, (tmp_path / "engine.log").read_text()[-2000:]
                time.sleep(0.05)
        raise AssertionError("the engine isn't up")

    yield start
    for process in started:
        process.kill()
        process.wait()


NO_MORE = f"{TOKEN} as small as it gets"
PLAY = [Answer(NO_MORE, when="- #2 "), Answer("Here:\n" + whole("build.py"), when="- #1 "),
        Answer("Here:\n" + whole("build.py"), when="- #1 ", turn=1),
        Answer(f"Less to import.\n\nFILE: src/main.py\n````\n{SLIM_MAIN}````\n"
               "DELETE: src/legacy.py\nDELETE: src/trace.py\n")]


def test_openai_py_against_a_real_engine(bundle: Project, engine: Any) -> None:
    bundle.config["agent"]["adapter"] = "openai"
    bundle.config["adapter"] = {"base_url": engine(PLAY) + "/v1", "model": "toy"}
    rows = run_loop(bundle)
    assert verdicts(rows) == ["keep", "agent_failed", "give_up"], logs(bundle)
    assert "build.py: is outside the scope" in logs(bundle)
    assert sorted(rows[0]["files"]) == ["src/legacy.py", "src/main.py", "src/trace.py"]


def test_llamacpp_py_starts_a_real_engine(bundle: Project, engine_python: str) -> None:
    """The grammar keeps a toy that wants to write build.py to what is in scope."""
    model = write_toy(bundle.tmp / "toy.gguf", PLAY)
    bundle.config["agent"]["adapter"] = "llamacpp"
    bundle.config["adapter"] = {"model": str(model), "python": engine_python, "threads": "1",
                                "max_tokens": "600", "timeout": "60"}
    rows = run_loop(bundle)
    assert verdicts(rows)[0] == "keep" and verdicts(rows)[2] == "give_up", logs(bundle)
    assert verdicts(rows)[1] != "violation" and "build.py" not in rows[1]["files"]


def test_a_running_engine_is_used_by_its_url(bundle: Project, engine: Any) -> None:
    bundle.config["agent"]["adapter"] = "llamacpp"
    bundle.config["adapter"] = {"url": engine(PLAY), "grammar": "yes", "max_tokens": "600"}
    rows = run_loop(bundle)
    assert verdicts(rows)[0] == "keep" and verdicts(rows)[2] == "give_up", logs(bundle)


def test_the_grammar_is_one_that_the_engine_enforces(engine: Any) -> None:
    """Whatever the model would say, it names files in scope, in every format."""
    url = engine([Answer(whole("src/../../etc/passwd") + "DELETE: build.py\n")])
    scope = edits.Scope(("src/**/*.py", "lib/[ab]?.py"), frozenset(["src/a.py", 'src/q".py']))
    for form in ("whole", "search"):
        for may_read in (False, True):
            body = {"model": "toy", "max_tokens": 60, "temperature": 0.0,
                    "grammar": edits.build_grammar(scope, form, may_read),
                    "messages": [{"role": "user", "content": "Go."}]}
            said = post(url + "/v1/chat/completions", body)["choices"][0]["message"]["content"]
            assert re.match(r"FILE: src/[^./]", said) and "etc/passwd" not in said, said


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_claude_against_a_real_engine(bundle: Project, engine: Any) -> None:
    claude = node_program("claude")
    play = [Answer(NO_MORE, when="- #1 "),
            Answer("I look first.", tool="Read", arguments={"file_path": "src/main.py"}),
            Answer(tool="Write", turn=1,
                   arguments={"file_path": "src/main.py", "content": TIDY_MAIN}),
            Answer("Done.", turn=2)]
    bundle.config["agent"]["adapter"] = "claude"
    bundle.config["adapter"] = {"program": str(claude), "model": "toy"}
    rows = run_loop(bundle, ANTHROPIC_BASE_URL=engine(play), ANTHROPIC_API_KEY=KEY)
    assert verdicts(rows) == ["keep", "give_up", "give_up"], logs(bundle)


# ── codex ───────────────────────────────────────────────────────────────────────────────────────

CODEX = ("exec - --skip-git-repo-check --ephemeral --dangerously-bypass-approvals-and-sandbox"
         " -c analytics.enabled=false")


def codex_script(turn: int, request: Request) -> Any:
    """Play three iterations by the one tool that edits: the shell."""
    iteration = prompt_iteration("\n".join(
        part.get("text", "") for item in request.body["input"] if item.get("role") == "user"
        for part in item["content"]))
    commands = {1: f"cat > src/main.py <<'END'\n{SLIM_MAIN}END\nrm src/legacy.py src/trace.py",
                2: "echo 'print(\"METRIC bytes=1\")' > build.py; git commit -qam sneaky"}
    if turn == 0 and iteration in commands:
        return Reply(tools=[Tool("exec_command", {"cmd": commands[iteration]})])
    return NO_MORE if iteration > 2 else "Done."


def test_codex_as_the_agent_command(bundle: Project) -> None:
    codex = node_program("codex")
    (bundle.tmp / "home" / ".codex").mkdir(exist_ok=True)
    with ScriptedServer(codex_script) as server:
        provider = ('model_providers.local={name="local", wire_api="responses", '
                    f'base_url="{server.url}", env_key="OPENAI_API_KEY"}}')
        bundle.config["agent"].update(
            command=f"{codex} {CODEX} -m scripted -c model_provider=local -c '{provider}'",
            writable="~/.codex")
        rows = run_loop(bundle, OPENAI_API_KEY=KEY)
    assert verdicts(rows) == ["keep", "violation", "give_up"], logs(bundle)
