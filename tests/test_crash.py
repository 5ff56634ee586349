"""The power cord: whatever call fails, and wherever the process dies, the next start goes on as if nothing was.

`pytest -m slow tests/test_crash.py` tries every call of a run; the default run a share of them.
"""
from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import pytest

from conftest import ROOT, TOOL, Project, Result, make_project

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
    open("src/value.txt", "w").write("%d\\n" % (value - 10 if n % 2 else value + n))
"""


@dataclass
class Cord:
    """A project whose run may be cut anywhere; every copy of it has its own temporary folder."""

    project: Project
    folder: Path

    def start(self, *words: str, program: Tuple[str, ...] = (str(TOOL),), timeout: float = 120
              ) -> Result:
        """Start the tool, or another program around it."""
        done = subprocess.run([sys.executable, *program, *words, "loop.ini"], cwd=self.project.root,
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
    """Copy a project that has not run yet."""
    (folder / "tmp").mkdir(parents=True)
    shutil.copytree(cord.project.root, folder / "project", symlinks=True)
    return Cord(Project(folder / "project", folder), folder)


@pytest.fixture
def cord(tmp_path: Path) -> Cord:
    """Return a project that has not run yet."""
    return make_cord(tmp_path / "cord")


@pytest.fixture
def whole(cord: Cord, tmp_path: Path) -> Outcome:
    """Return what an uninterrupted run of it comes to."""
    copy = copy_cord(cord, tmp_path / "whole")
    result = copy.start()
    assert result.code == 0, result
    outcome = copy.outcome()
    assert outcome.values == [90, 80]
    return outcome


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
    assert os.listdir(cord.folder / "tmp") == []
    assert set(os.listdir(cord.project.state)) == {"ledger.jsonl", "store.git", "iterations", "lock"}
    assert sorted(os.listdir(cord.project.state.parent)) == [".gitignore", "t"]


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
            assert cut.err.startswith("scalarloop: ") or "void" in cut.out
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


MODES = {"kill": 41, "fail": 43, "git": 17, "full": 83}     # the default run tries every so-manieth call


@pytest.mark.parametrize("mode", MODES)
def test_a_share_of_all_calls_may_go_wrong(cord: Cord, whole: Outcome, tmp_path: Path, mode: str
                                           ) -> None:
    assert sweep(cord, whole, tmp_path, mode, range(5, 10_000, MODES[mode])) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_any_call_may_go_wrong(cord: Cord, whole: Outcome, tmp_path: Path, mode: str) -> None:
    assert sweep(cord, whole, tmp_path, mode, itertools.count(1)) > 100
