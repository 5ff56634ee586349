"""Measure the loop's own time per iteration beside the naive loop, in one run, as a ratio.

    python tests/bench/overhead.py [FILES ...]      (default: 100 1000 10000)

The naive loop per iteration: git add -A; commit; diff --name-only HEAD~1; SHA-256 of every tracked
file; and, for a drop, reset --hard HEAD~1. Both change the same one file; agent and metric are
shell one-liners whose own seconds are taken out of either side. The machine's noise hits both:
look at the ratio, not at the milliseconds. Isolation is `portable`, since its cost is a matter of
tests/bench/spawn.py.
"""
from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List

TOOL = Path(__file__).resolve().parents[2] / "scalarloop.py"
ROUNDS = 10
CONFIG = """[loop]
name = t
goal = lower
scope = src/**
iterations = {rounds}
patience = 1000
[agent]
command = sh -c 'echo $((1000 {sign} SCALARLOOP_ITERATION)) > src/v.txt'
[metric]
command = sh -c 'echo METRIC v=$(cat src/v.txt)'
[isolation]
level = portable
"""


def git(root: str, *args: str) -> None:
    """Run git quietly."""
    subprocess.run(["git", "-c", "user.name=b", "-c", "user.email=b@b", *args], cwd=root,
                   check=True, stdout=subprocess.DEVNULL)


def make_project(root: str, files: int, sign: str) -> None:
    """Make a repository with so many files of 400 bytes."""
    os.makedirs(f"{root}/src")
    for number in range(files):
        folder = f"{root}/lib/{number // 100}"
        os.makedirs(folder, exist_ok=True)
        Path(folder, f"{number}.txt").write_text(f"{number}\n" * 60)
    Path(root, "src/v.txt").write_text("1000\n")
    Path(root, "loop.ini").write_text(CONFIG.format(rounds=ROUNDS, sign=sign))
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "start")


def naive(root: str, keep: bool) -> float:
    """Return the naive loop's seconds per iteration, agent and metric left out."""
    total = 0.0
    for number in range(ROUNDS):
        Path(root, "src/v.txt").write_text(f"naive {number}\n")
        started = time.perf_counter()
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", str(number))
        git(root, "diff", "--name-only", "HEAD~1")
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True,
                                stdout=subprocess.PIPE).stdout.split(b"\0")[:-1]
        for path in listed:
            hashlib.sha256(Path(root, os.fsdecode(path)).read_bytes()).hexdigest()
        if not keep:
            git(root, "reset", "-q", "--hard", "HEAD~1")
        total += time.perf_counter() - started
    return total / ROUNDS


def ours(root: str) -> float:
    """Return the loop's own seconds per iteration, agent and metric left out."""
    subprocess.run([sys.executable, str(TOOL), "loop.ini"], cwd=root, check=True,
                   stdout=subprocess.DEVNULL)
    text = Path(root, ".scalarloop/t/ledger.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if row["type"] == "iteration"]
    costs: List[float] = []
    for before, row in zip(rows, rows[1:]):
        work = sum(row["agent_seconds"]) + sum(row["metric_seconds"])
        costs.append(row["elapsed"] - before["elapsed"] - work)
    return sum(costs) / len(costs)


def main() -> None:
    """Print the table."""
    sizes = [int(word) for word in sys.argv[1:]] or [100, 1000, 10_000]
    print(f"{'files':>8s}{'':>10s}{'naive ms':>10s}{'ours ms':>10s}{'ratio':>8s}")
    for files in sizes:
        for keep in (True, False):
            with tempfile.TemporaryDirectory() as tmp:
                for name in ("a", "b"):
                    make_project(f"{tmp}/{name}", files, "-" if keep else "+")
                mine = ours(f"{tmp}/a")
                theirs = naive(f"{tmp}/b", keep)
                label = "keeps" if keep else "drops"
                print(f"{files:8d}{label:>10s}{theirs * 1e3:10.1f}{mine * 1e3:10.1f}"
                      f"{mine / theirs:8.2f}", flush=True)


if __name__ == "__main__":
    main()
