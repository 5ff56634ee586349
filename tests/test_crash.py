"""The power cord: whatever call fails, wherever the process dies, the next start goes on from there.

`pytest -m slow tests/test_crash.py` tries every call of a run; the default run a share of them.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import pytest

import scalarloop
from conftest import ROOT, TOOL, Project, Result, make_project, pin, with_config

FAULTS = ROOT / "tests" / "faults.py"
EXITS = (0, 1, 2, 3, 4, 130)
# Goes by the workspace alone, so that an iteration which was lost or void is made up for: a keep
# at every odd iteration, a drop or a violation at every even one, until the target is reached.
AGENT = """
    import os
    n = int(os.environ["SCALARLOOP_ITERATION"])
    value = int(open("src/value.txt").read())
    if n % 4 == 0:
        open("stray.txt", "w").close()
    open("src/value.txt", "w").write("%d\\n" % (value - 10 if n % 2 else value + 1000 + n))
"""


@dataclass
class Cord:
    """A project whose run may be cut anywhere; every copy of it has its own temporary folder."""

    project: Project
    folder: Path

    def start(self, *words: str, program: Tuple[str, ...] = (str(TOOL),), timeout: float = 120
              ) -> Result:
        """Start the tool, or another program around it."""
        argv = [sys.executable, *program, *with_config(words, "loop.ini")]
        done = subprocess.run(argv, cwd=self.project.root,
                              env=self.environment(), timeout=timeout, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return Result(done.returncode, done.stdout.decode("utf-8", "replace"),
                      done.stderr.decode("utf-8", "replace"))

    def environment(self) -> Dict[str, str]:
        """Return the environment of a start."""
        return {**os.environ, "TMPDIR": str(self.folder / "tmp")}

    def outcome(self) -> "Outcome":
        """Return what came of the run."""
        rows = self.project.iterations()
        log = self.project.git("log", "--reverse", "--format=%T %s", "main..scalarloop/t")
        keeps = [tuple(line.split(" ", 1)) for line in log.splitlines()]
        return Outcome(keeps, [row["value"] for row in rows if row["verdict"] == "keep"],
                       self.project.ledger()[-1]["best"],
                       [f"{row['verdict']} {row['reason']}" for row in rows])


@dataclass(frozen=True)
class Outcome:
    """What a run has to come to, cut or not."""

    keeps: List[Tuple[str, ...]]    # tree and subject of each commit
    values: List[float]
    best: float
    verdicts: List[str]


def make_cord(folder: Path, **loop: Any) -> Cord:
    """Make a project for the agent above."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    project = make_project(folder)
    project.config["loop"].update({"target": 80, "iterations": 100, "patience": 100, **loop})
    project.agent(AGENT)
    project.save_config()
    project.commit("loop.ini")
    return Cord(project, folder)


def copy_cord(cord: Cord, folder: Path) -> Cord:
    """Copy a project, with what its run came to so far."""
    (folder / "tmp").mkdir(parents=True)
    shutil.copytree(cord.project.root, folder / "project", symlinks=True)
    copy = Project(folder / "project", folder)
    copy.config = {name: dict(keys) for name, keys in cord.project.config.items()}
    return Cord(copy, folder)


@pytest.fixture(scope="session")
def unused(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Cord, "Outcome"]:
    """Return a project that never runs, and what an uninterrupted run of it comes to."""
    folder = tmp_path_factory.mktemp("unused")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pin(monkeypatch, folder)
        made = make_cord(folder)
        copy = copy_cord(made, folder / "whole")
        result = copy.start()
        assert result.code == 0, result
        outcome = copy.outcome()
    assert outcome.values == [90, 80]
    return made, outcome


@pytest.fixture
def cord(unused: Tuple[Cord, "Outcome"], tmp_path: Path) -> Cord:
    """Return a project that has not run yet."""
    return copy_cord(unused[0], tmp_path / "cord")


@pytest.fixture
def whole(unused: Tuple[Cord, "Outcome"]) -> "Outcome":
    """Return what an uninterrupted run of it comes to."""
    return unused[1]


def check_end(cord: Cord, whole: Outcome, exact: bool, before: Dict[str, str]) -> None:
    """Check that a run which was cut came to what one that was not comes to.

    `exact`: to the same iterations too; otherwise a void one may have come in between.
    """
    found = cord.outcome()
    assert found.values == whole.values and found.best == whole.best
    assert [tree for tree, _ in found.keeps] == [tree for tree, _ in whole.keeps]
    if exact:
        assert found == whole
    numbers = [row["n"] for row in cord.project.iterations()]
    assert numbers == list(range(1, len(numbers) + 1))
    verified = cord.start("verify")
    assert verified.code == 0 and "warning" not in verified.out, verified
    assert cord.project.fingerprint() == before
    left = [name for name in os.listdir(cord.folder / "tmp")
            if not re.fullmatch("[a-z0-9_]{8}", name)]      # Python's own probe of that folder
    assert left == []
    assert set(os.listdir(cord.project.state)) == {"ledger.jsonl", "store.git", "iterations", "lock"}
    assert set(os.listdir(cord.project.state.parent)) == {".gitignore", "t"}
    assert (cord.project.state.parent / ".gitignore").read_text() == "*\n"


def cut_and_go_on(cord: Cord, whole: Outcome, mode: str, number: int) -> Optional[str]:
    """Let the n-th call go wrong, start again, compare; return what went wrong, None past the end."""
    before, log = cord.project.fingerprint(), cord.folder / "fault.log"
    cut = cord.start(program=(str(FAULTS), mode, str(number), str(log)))
    if not log.exists():
        assert cut.code == 0, cut
        return None
    fault = log.read_text().splitlines()[0]
    told = f"{mode} {fault}\n--- the run that was cut: {cut}"
    try:
        assert "Traceback" not in cut.err + cut.out
        assert cut.code == -9 if mode == "kill" else cut.code in EXITS[:3]
        if cut.code in (1, 2):
            assert cut.err.startswith("scalarloop: ") or " void " in cut.out or "(store)" in cut.out
        again = cord.start()
        told += f"\n--- the next start: {again}"
        assert again.code == 0 and "Traceback" not in again.err
        check_end(cord, whole, mode == "kill", before)
    except AssertionError as error:
        return f"{told}\n--- {error}"
    return ""


def sweep(cord: Cord, whole: Outcome, tmp_path: Path, mode: str, numbers: Iterable[int]) -> int:
    """Cut runs at these calls, two at a time, until one comes through; return how many were cut."""
    problems, tried = [], 0

    def one(number: int) -> Optional[str]:
        copy = copy_cord(cord, tmp_path / f"{mode}-{number}")
        found = cut_and_go_on(copy, whole, mode, number)
        if not found:
            shutil.rmtree(copy.folder)
        return found

    def batches() -> Iterator[List[int]]:
        left = iter(numbers)
        return iter(lambda: list(itertools.islice(left, 2)), [])

    with ThreadPoolExecutor(2) as pool:
        for batch in batches():
            found = list(pool.map(one, batch))
            problems += [text for text in found if text]
            tried += sum(text is not None for text in found)
            if None in found:
                break
    assert not problems, f"{len(problems)} of {tried}:\n" + "\n\n".join(problems)
    return tried


MODES = {"kill": 59, "fail": 61, "git": 31, "late": 29, "full": 101}     # the default run tries every so-manieth call


@pytest.mark.parametrize("mode", MODES)
def test_a_share_of_all_calls_may_go_wrong(cord: Cord, whole: Outcome, tmp_path: Path, mode: str
                                           ) -> None:
    assert sweep(cord, whole, tmp_path, mode, range(5, 10_000, MODES[mode])) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_any_call_may_go_wrong(cord: Cord, whole: Outcome, tmp_path: Path, mode: str) -> None:
    assert sweep(cord, whole, tmp_path, mode, itertools.count(1)) > 30


# ---- order: what a record or a ref names is on disk before it

def calls_of(cord: Cord) -> List[Tuple[str, str]]:
    """Run to the end; return every call that was made, as (kind, path or words)."""
    log = cord.folder / "calls.log"
    result = cord.start(program=(str(FAULTS), "count", "1", str(log)))
    assert result.code == 0, result
    rows = [line.split(" ", 2)[1:] for line in log.read_text().splitlines()]
    return [(row[0], row[1] if len(row) > 1 else "") for row in rows]


def files_of(git_dir: Path, objects: Iterable[str], project: Project) -> Dict[str, List[str]]:
    """Return for each object the files of a repository that hold it."""
    held: Dict[str, List[str]] = {oid: [] for oid in objects}
    for index in (git_dir / "objects" / "pack").glob("*.idx"):
        with open(index, "rb") as stream:
            shown = subprocess.run(["git", "show-index"], stdin=stream, stdout=subprocess.PIPE,
                                   check=True, cwd=project.root).stdout.decode()
        for oid in held:
            if oid in shown:
                held[oid].append(str(index.with_suffix(".pack")))
    for oid, files in held.items():
        loose = git_dir / "objects" / oid[:2] / oid[2:]
        files += [str(loose)] if loose.exists() else []
    return held


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to name what is flushed")
def test_what_a_record_or_a_ref_names_is_on_disk_before_it(cord: Cord) -> None:
    """A pack that git wrote itself into the store is flushed by git, but for its entry in the folder."""
    calls = calls_of(cord)
    project, ledger = cord.project, str(cord.project.state / "ledger.jsonl")
    writes = [at for at, (kind, what) in enumerate(calls) if kind == "write" and what == ledger]
    moves = [at for at, (kind, what) in enumerate(calls) if kind == "spawn" and "update-ref" in what]
    records = project.ledger()
    lines_of_start = len(records) - len(writes) + 1     # start and baseline are one write
    keeps = [(writes[row["seq"] - lines_of_start + 1], row) for row in records
             if row.get("verdict") == "keep"]
    assert len(keeps) == 2
    for place, row in keeps:
        listed = project.git("rev-list", "--objects", row["commit"], f"^{row['base']}")
        objects = [line.split(" ")[0] for line in listed.splitlines()]
        assert len(objects) >= 4        # the commit, two trees, a blob
        published = next(at for at in moves if at > place)
        for git_dir, before in ((project.state / "store.git", place),
                                (project.root / ".git", published)):
            flushed = {what for kind, what in calls[:before] if kind == "fsync"}
            renamed = {words.split(" ")[1]: words.split(" ")[0] for kind, words in calls[:before]
                       if kind in ("replace", "rename") and len(words.split(" ")) > 1}
            for oid, files in files_of(git_dir, objects, project).items():
                assert files, (git_dir, oid)
                packed = git_dir.name == "store.git" and any(file.endswith(".pack") for file in files)
                assert packed or any({file, renamed.get(file)} & flushed for file in files), \
                    f"{oid} of #{row['n']} is not flushed: {files}"
                assert any(str(Path(file).parent) in flushed for file in files), \
                    f"the folder of {oid} of #{row['n']} is not flushed: {files}"


# ---- killed at random

RUN_OF = 40      # iterations of the long run in the default set


def expected(iterations: int) -> Tuple[List[str], List[float]]:
    """Return the verdicts, and the values kept, that AGENT comes to without a target."""
    verdicts, kept, value = [], [], 100.0
    for n in range(1, iterations + 1):
        if n % 2:
            value -= 10
            kept.append(value)
        verdicts.append("keep" if n % 2 else "violation" if n % 4 == 0 else "discard")
    return verdicts, kept


def kill_at_random(cord: Cord, iterations: int, kills: int, seed: int) -> int:
    """Kill a run of so many iterations at random moments, then let it end; return the kills made."""
    chance, made = random.Random(seed), 0
    before = cord.project.fingerprint()
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, str(TOOL), "loop.ini"], cwd=cord.project.root,
                                   env=cord.environment(), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(chance.uniform(.05, 1.5))
        except subprocess.TimeoutExpired:
            process.kill()
            made += 1
        errors = process.communicate()[1]
        assert process.returncode in (0, -9), errors
    result = cord.start(timeout=600)
    assert result.code == 0, result
    verdicts, kept = expected(iterations)
    rows = cord.project.iterations()
    assert [row["verdict"] for row in rows] == verdicts
    assert [row["n"] for row in rows] == list(range(1, iterations + 1))
    assert [row["value"] for row in rows if row["verdict"] == "keep"] == kept
    branch = cord.project.git("rev-list", "--reverse", "main..scalarloop/t").split()
    assert branch == [row["commit"] for row in rows if row["verdict"] == "keep"]
    shown = [float(cord.project.git("show", f"{commit}:src/value.txt")) for commit in branch[-5:]]
    assert shown == kept[-5:]
    assert cord.start("verify").code == 0
    assert cord.project.fingerprint() == before and os.listdir(cord.folder / "tmp") == []
    return made


def endless(tmp_path: Path, iterations: int) -> Cord:
    """Return a project whose run has no target."""
    made = make_cord(tmp_path / "long", iterations=iterations, patience=10_000)
    made.project.config["loop"].pop("target")
    made.project.save_config()
    made.project.commit("no target")
    return made


def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    assert kill_at_random(endless(tmp_path, RUN_OF), RUN_OF, 6, seed=1) >= 3


@pytest.mark.slow
def test_killed_two_hundred_times_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    assert kill_at_random(endless(tmp_path, 900), 900, 215, seed=2) >= 200


# ---- what a dead loop left

def interrupted(cord: Cord, records: int = 3, *words: str) -> Cord:
    """Kill a run right after a write to its ledger: start and baseline, a turn, its verdict, and so on."""
    log = cord.folder / "fault.log"
    cut = cord.start(*words, program=(str(FAULTS), "record", str(records), str(log)))
    assert cut.code == -9, cut
    return cord


def go_on(cord: Cord) -> Result:
    """Start again; the run has to end as it always does."""
    result = cord.start()
    assert result.code == 0, result
    assert cord.outcome().values == [90, 80]
    assert cord.start("verify").code == 0
    return result


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe\0", b"{", b"[" * 4096, b"[]", b"7", b'{"tmp":5}', b'{"tmp":["x"]}', b'{"tmp":"/"}',
    b'{"tmp":"scalarloop-x"}', b'{"tmp":"a\\u0000b/scalarloop-x"}', b'{"tmp":"\\ud800/scalarloop-x"}'])
def test_a_lock_file_of_any_content_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "lock").write_bytes(content)
    lock = scalarloop.StateLock(str(state))
    lock.acquire()
    assert lock.left_behind() == ""
    lock.release(undo=False)
    assert (state / "lock").read_bytes() == b""


def test_a_lock_of_a_pid_that_lives_again_is_no_obstacle(cord: Cord) -> None:
    interrupted(cord, 2)
    lock = cord.project.state / "lock"
    told = json.loads(lock.read_bytes())
    lock.write_text(json.dumps({**told, "pid": os.getpid()}))
    assert os.listdir(cord.folder / "tmp")
    go_on(cord)
    assert os.listdir(cord.folder / "tmp") == []


def test_a_stale_temporary_folder_goes_whatever_is_in_it_and_nothing_else(cord: Cord) -> None:
    interrupted(cord, 2)
    told = json.loads((cord.project.state / "lock").read_bytes())
    stale = Path(told["tmp"])
    assert stale.parent == cord.folder / "tmp" and stale.stat().st_mode & 0o777 == 0o700
    victim, other = cord.folder / "victim", cord.folder / "tmp" / "scalarloop-other"
    for folder in (victim, other):
        folder.mkdir()
        (folder / "file").write_text("stays")
    (stale / "link").symlink_to(victim)
    (stale / "locked").mkdir()
    (stale / "locked" / "file").write_text("")
    (stale / "locked").chmod(0)
    os.mkfifo(stale / "pipe")
    go_on(cord)
    assert not stale.exists()
    assert (victim / "file").read_text() == (other / "file").read_text() == "stays"


@pytest.mark.parametrize("kind", ["link", "not ours"])
def test_a_lock_that_names_another_folder_deletes_nothing(cord: Cord, kind: str) -> None:
    victim = cord.folder / "victim"
    victim.mkdir()
    (victim / "file").write_text("stays")
    named = victim
    if kind == "link":
        named = cord.folder / "scalarloop-link"
        named.symlink_to(victim)
    cord.project.state.mkdir(parents=True)
    (cord.project.state / "lock").write_text(json.dumps({"pid": 1, "tmp": str(named)}))
    go_on(cord)
    assert (victim / "file").read_text() == "stays"


@pytest.mark.parametrize("lines", [0, 1, 1.5])
def test_a_ledger_that_never_got_its_baseline_begins_anew(cord: Cord, lines: float) -> None:
    """Nothing was decided yet: what a start that died in its first write left is written over."""
    interrupted(cord, 2)
    whole = cord.project.lines()
    cord.project.put_ledger(b"".join(whole[:int(lines)]) + whole[int(lines)][:9 if lines % 1 else 0])
    go_on(cord)
    assert [record["type"] for record in cord.project.ledger()].count("resume") == 0


def blob_path(git_dir: Path, data: bytes) -> Path:
    """Return where git keeps these bytes as a loose object."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return git_dir / "objects" / oid[:2] / oid[2:]


@pytest.mark.parametrize("damage", ["empty", "half"])
def test_half_written_objects_of_the_candidate_under_way_are_no_obstacle(cord: Cord, damage: str
                                                                         ) -> None:
    """A power cut leaves such files; git takes an object that is there for one that is whole."""
    interrupted(cord)
    store = cord.project.state / "store.git"
    whole = zlib.compress(b"blob 3\x0080\n")
    for path in (blob_path(store, b"80\n"), store / "objects" / "pack" / "tmp_pack_a1b2c3",
                 store / "objects" / "pack" / "pack-0123.pack.4242.tmp",
                 store / "objects" / "12" / "tmp_obj_a1b2c3"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes({"empty": b"", "half": whole[:len(whole) // 2]}[damage])
    go_on(cord)


def test_locks_that_a_dead_git_left_in_the_store_are_no_obstacle(cord: Cord) -> None:
    interrupted(cord)
    store = cord.project.state / "store.git"
    for name in ("HEAD.lock", "config.lock", "packed-refs.lock", "shallow.lock",
                 "refs/scalarloop/candidate.lock", "refs/scalarloop/base.lock"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"")
    go_on(cord)


@pytest.mark.parametrize("name", ["refs/heads/scalarloop/t.lock", "refs/scalarloop/t/ledger.lock",
                                  "index.lock"])
def test_a_lock_in_the_user_s_repository_is_left_alone_and_named(cord: Cord, name: str) -> None:
    """It may be somebody's who is at work there: the run stops, loses nothing, and goes on later."""
    interrupted(cord)
    lock = cord.project.root / ".git" / name
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_bytes(b"")
    result = cord.start()
    assert result.code in (0, 1) and "Traceback" not in result.err, result
    assert lock.exists() and lock.read_bytes() == b""
    if result.code:
        assert ".lock" in result.out + result.err and len(result.err.splitlines()) <= 1, result
    lock.unlink()
    go_on(cord)


# ---- many starts at once

WAITING = """
    import os, pathlib, time
    pathlib.Path({folder!r}, "working").touch()
    while not os.path.exists({folder!r} + "/go"):
        time.sleep(.05)
    value = int(open("src/value.txt").read())
    open("src/value.txt", "w").write("%d\\n" % (value - 10))
"""


def start_many(cord: Cord, count: int, at_once: int) -> List[Result]:
    """Start so many loops; once all but one are gone, let the winner go on."""
    def one(_: int) -> Result:
        result = cord.start(timeout=900)
        ended.append(result)
        if len(ended) >= count - 1:
            (cord.folder / "go").touch()
        return result
    ended: List[Result] = []
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, range(count)))


def check_one_won(cord: Cord, results: List[Result]) -> None:
    """Check that one loop ran and all others were refused in one line."""
    codes = sorted(result.code for result in results)
    assert codes == [0] + [2] * (len(results) - 1), results
    for result in results:
        if result.code == 2:
            assert result.out == "" and len(result.err.splitlines()) == 1, result
            assert "lock" in result.err
    assert [row["verdict"] for row in cord.project.iterations()] == ["keep", "keep"]
    assert cord.project.ledger()[0]["type"] == "start"
    assert cord.start("verify").code == 0 and os.listdir(cord.folder / "tmp") == []


@pytest.mark.parametrize("count,at_once", [
    (12, 12), pytest.param(1000, 40, marks=pytest.mark.slow)])
def test_of_many_starts_one_wins(cord: Cord, count: int, at_once: int) -> None:
    cord.project.agent(WAITING.format(folder=str(cord.folder)))
    cord.project.config["agent"]["timeout"] = "1h"
    cord.project.save_config()
    check_one_won(cord, start_many(cord, count, at_once))


@pytest.mark.parametrize("count,at_once", [
    (12, 6), pytest.param(300, 20, marks=pytest.mark.slow)])
def test_starts_that_are_refused_at_once_leave_nothing_and_harm_no_other(cord: Cord, count: int,
                                                                         at_once: int) -> None:
    """Each removes what it made while the next already comes in; an empty folder may stay."""
    cord.project.write("data/truth.txt", "changed\n")
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(lambda _: cord.start(), range(count)))
    assert {result.code for result in results} == {2}, results
    assert any("tree: " in result.err for result in results)
    assert all("Traceback" not in result.err for result in results)
    stayed = [path for path in cord.project.state.parent.rglob("*") if path.is_file()]
    assert [path.name for path in stayed] in ([], [".gitignore"]), stayed
    assert os.listdir(cord.folder / "tmp") == []
    cord.project.write("data/truth.txt", "sealed\n")
    go_on(cord)


# ---- a full disk, and one that can't be written

def namespace() -> List[str]:
    """Return a prefix that gives a command mounts of its own; skip where the system has none."""
    for words in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        if shutil.which("unshare") and subprocess.run(
                [*words, "mount", "-t", "tmpfs", "none", "/mnt"], stderr=subprocess.DEVNULL
                ).returncode == 0:
            return words
    pytest.skip("this system gives no mount namespace: a full disk is not tried here")


SMALL_DISK = """
    set -e
    mount -t tmpfs -o size={size}k none "{place}"
    cp -a "{source}/." "{place}/"
    cd "{root}"
    used=$(du -sk "{place}" | cut -f1)
    avail=$(df -k --output=avail "{place}" | tail -n1)
    fill=$((avail - {free}))
    if [ $fill -gt 0 ]; then head -c $((fill * 1024)) /dev/zero > "{place}/filler" || true; fi
    set +e
    "{python}" "{tool}" loop.ini > "{out}/first.out" 2> "{out}/first.err"; echo $? > "{out}/first.code"
    rm -f "{place}/filler"
    "{python}" "{tool}" loop.ini > "{out}/next.out" 2> "{out}/next.err"; echo $? > "{out}/next.code"
    cp -a "{place}/." "{source}/"
"""


def read_result(folder: Path, name: str) -> Result:
    """Return what SMALL_DISK left of a run."""
    return Result(int((folder / f"{name}.code").read_text()),
                  *((folder / f"{name}.{kind}").read_text(errors="replace") for kind in ("out", "err")))


LEVELS = [("project", 0), ("project", 12), ("project", 100), ("tmp", 12)]
MORE_LEVELS = [(what, free) for what in ("project", "tmp") for free in (
    1, 2, 4, 8, 16, 20, 24, 28, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512)]


@pytest.mark.parametrize("what,free", [
    *LEVELS, *(pytest.param(*level, marks=pytest.mark.slow) for level in MORE_LEVELS)])
def test_a_full_disk_loses_nothing(cord: Cord, whole: Outcome, what: str, free: int) -> None:
    """`free` KB are left of it at the start; then there is room again."""
    words, out = namespace(), cord.folder / "out"
    out.mkdir()
    before = cord.project.fingerprint()
    place = cord.project.root if what == "project" else cord.folder / "tmp"
    source = cord.folder / "source"
    shutil.copytree(place, source, symlinks=True)
    script = SMALL_DISK.format(size=6000, place=place, source=source, root=cord.project.root, free=free,
                               python=sys.executable, tool=TOOL, out=out)
    subprocess.run([*words, "sh", "-c", textwrap.dedent(script)], env=cord.environment(), check=True,
                   timeout=120)
    first, again = read_result(out, "first"), read_result(out, "next")
    told = f"{first}\n--- with room again: {again}"
    assert first.code in (0, 1, 2) and "Traceback" not in first.err, told
    if first.code == 1 and "void" not in first.out:
        assert len(first.err.splitlines()) == 1, told
    assert again.code == 0 and "Traceback" not in again.err, told
    shutil.rmtree(place)
    shutil.copytree(source, place, symlinks=True)
    check_end(cord, whole, False, before)


def test_a_state_folder_that_can_t_be_written_is_refused_in_one_line(cord: Cord) -> None:
    interrupted(cord)
    state, ledger = cord.project.state, b"".join(cord.project.lines())
    if os.geteuid():
        os.chmod(state, 0o500)
        words: List[str] = []
    else:
        words = [*namespace(), "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && '
                 'shift && exec "$@"', str(state), "sh"]
    done = subprocess.run([*words, sys.executable, str(TOOL), "loop.ini"], cwd=cord.project.root,
                          env=cord.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.chmod(state, 0o700)
    error = done.stderr.decode()
    assert done.returncode == 2 and len(error.splitlines()) == 1 and "can't be written" in error, error
    assert b"".join(cord.project.lines()) == ledger
    go_on(cord)


# ---- begin anew, go on for more

def test_a_kill_while_the_old_run_is_set_aside_loses_no_run(cord: Cord, tmp_path: Path) -> None:
    """`--new` moves refs and a folder: after a kill at any call the old record is still whole somewhere."""
    assert cord.start().code == 0
    old = b"".join(cord.project.lines())
    log = cord.folder / "calls.log"
    copy_of = itertools.count()

    def copied() -> Cord:
        return copy_cord(cord, tmp_path / f"new-{next(copy_of)}")

    counted = copied()
    assert counted.start("--new", program=(str(FAULTS), "count", "1", str(log))).code in (0, 2)
    kinds = [line.split(" ")[1:] for line in log.read_text().splitlines()]
    renames = [at for at, words in enumerate(kinds, 1)
               if words[0] in ("rename", "replace") and "scalarloop/t" in words[1]
               or words[0] == "mkdir" and words[1].endswith("scalarloop/t.1")
               or words[0] == "spawn" and "update-ref" in words]
    assert len(renames) >= 3, kinds
    for number in renames[::3]:
        cut = copied()
        dead = cut.start("--new", program=(str(FAULTS), "kill", str(number), str(cut.folder / "log")))
        assert dead.code == -9, dead
        again = cut.start("--new")
        assert again.code == 0, (number, kinds[number - 1], again)
        held = [path.read_bytes() for path in cut.project.state.parent.glob("*/ledger.jsonl")]
        assert any(text.startswith(old) for text in held), (number, kinds[number - 1])
        assert cut.outcome().values == [90, 80] and cut.start("verify").code == 0
        assert os.listdir(cut.folder / "tmp") == []


def test_a_run_that_was_to_go_on_for_more_goes_on_for_them_after_a_kill(tmp_path: Path) -> None:
    cord = endless(tmp_path, 2)
    assert cord.start().code == 0
    interrupted(cord, 3, "--more", "2")
    assert [row["n"] for row in cord.project.iterations()] == [1, 2, 3]
    assert cord.start().code == 0
    assert [row["n"] for row in cord.project.iterations()] == [1, 2, 3, 4]


# ---- a tree that could not be written to its end

@pytest.mark.parametrize("call", ["unlink", "open", "symlink", "makedirs"])
@pytest.mark.parametrize("number", range(4))
def test_a_tree_that_could_not_be_switched_is_not_taken_for_the_new_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """The loop voids the iteration and goes on in the same process: the next one must see through it."""
    project = make_project(tmp_path)
    for name in "abc":
        project.write(f"src/{name}.txt", "old")
    (project.root / "src" / "link").symlink_to("a.txt")
    project.commit("old")
    for name in "abc":
        project.write(f"src/{name}.txt", "new")
    project.write("src/deep/er/d.txt", "new")
    (project.root / "src" / "link").unlink()
    (project.root / "src" / "link").symlink_to("b.txt")
    project.commit("new")
    home = scalarloop.private_home(str(tmp_path))
    user = scalarloop.open_user_repository(scalarloop.find_git(), home, str(project.root))
    store = scalarloop.Store(user.repo)
    old, new = (scalarloop.take_manifest(store, project.git("rev-parse", name), frozenset())
                for name in ("HEAD~1", "HEAD"))
    tree = scalarloop.Tree(str(tmp_path / "tree"), store, scalarloop.Layer())
    tree.make_pristine(old)
    plain, calls = getattr(os, call), itertools.count()

    def failing(path: Any, *args: Any, **options: Any) -> Any:
        if os.fsencode(path).startswith(tree.root) and next(calls) == number:
            raise OSError(5, "Input/output error")
        return plain(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            tree.make_pristine(new)
        except OSError:
            pass
    tree.make_pristine(new)
    for name in "abc":
        assert (tmp_path / "tree" / "src" / f"{name}.txt").read_text() == "new"
    assert (tmp_path / "tree" / "src/deep/er/d.txt").exists()
    assert os.readlink(tmp_path / "tree" / "src" / "link") == "b.txt"
    assert tree.inspect() == []
