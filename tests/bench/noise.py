"""Compare keep rules on noisy metrics: tests/bench/noise.py [--quick] [--repeats N] [--worlds PART]

The metric's unit is sigma of one run, lower is better; the unit of time is one metric run. A
proposal costs r, a run 1, and every rule works until the world's time is up, so a rule that
measures more sees fewer candidates:

    r      0     10      100
    time   500   2,000   12,000     (naive: 499, 182 and 119 candidates)

In the mixtures a candidate is truly better by .5, 1 or 2 sigma with probability 10 %, worse by
|N(0, 2)| with 65 %, and exactly as good with 25 %. `harsh` has no worse ones: 90 % are exactly as
good, and luck can do no more to a rule. In the null worlds nothing is ever better and the length
is counted in candidates, not in time: 1,000, for other noises 200.

Noises: normal; heavy (Student's t with 2 degrees of freedom: no variance); drift (normal plus an
autoregressive level of spread 1 and a memory of 100 steps, a step a run or proposal);
heteroscedastic (each tree's sigma is 0.5 to 2, log-uniform); late (exact for the first 50
proposals, then normal); constant.

Rules: `this rule` is scalarloop's own judge() and fold, a coin ordering each pair. `naive` keeps
what beats the best number; `re-run` asks for that twice; `MAD` keeps a new best that is 2 MAD of
all numbers away from the baseline; `t-test` compares 5 runs with the reference's 5 stored runs at
5 %; `SPRT` runs pairs against the incumbent, 0 against one sigma, both errors 5 %, sigma known, as
fishtest does with chess engines.

Columns, means over sessions +- standard error: fakes, keeps that are not truly better; share, the
fakes' part of a session's keeps (0 without a keep); of all, the fakes' part of all sessions' keeps;
gain, true gain of the last best over the baseline; bias, what the rule reports more than that
(this rule: the median of 5 closing pairs, paid from the time); candidates and runs.
"""
from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import statistics as stats
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import scalarloop as core  # noqa: E402

TIME = {0: 500, 10: 2_000, 100: 12_000}
CLOSING_PAIRS = 5
LATE = 50  # proposals before late noise begins


@dataclass(frozen=True)
class World:
    """Describe what is proposed and how it is measured; sizes in sigma."""

    name: str
    better: float = 0.0  # share of proposals that are better by `gain`
    gain: float = 0.0
    worse: float = 0.0  # share that is worse
    noise: str = "normal"
    candidates: Optional[int] = None  # null worlds: length in candidates, not in time


MIXTURE = {"better": 0.1, "worse": 0.65}
WORLDS = (
    World("null", candidates=1_000),
    World("constant", noise="constant", candidates=1_000),
    *(World(f"null {kind}", noise=kind, candidates=200)
      for kind in ("heavy", "drift", "heteroscedastic", "late")),
    *(World(f"mixture {gain}", gain=gain, **MIXTURE) for gain in (0.5, 1, 2)),
    World("harsh 1", better=0.1, gain=1),
    *(World(f"mixture 1 {kind}", gain=1, noise=kind, **MIXTURE)
      for kind in ("heavy", "drift", "heteroscedastic", "late")),
)


class Tree(NamedTuple):
    """Hold what a tree truly is: its level and the scale of its noise."""

    level: float
    scale: float


class Session:
    """Play one world against one rule: hand out candidates, measure trees, keep the books."""

    def __init__(self, world: World, r: int, seed: str) -> None:
        self.world, self.r, self.random = world, r, random.Random(seed)
        self.best, self.candidate = Tree(0.0, 1.0), Tree(0.0, 1.0)
        self.clock = self.drift = 0.0
        self.proposals = self.runs = self.keeps = self.fakes = 0
        self.limit = math.inf if world.candidates else float(TIME[r])

    def propose(self) -> Iterator[int]:
        """Yield the number of each candidate until time or candidates run out."""
        while not self.out_of_time() and self.proposals < (self.world.candidates or sys.maxsize):
            self.proposals += 1
            self.clock += self.r
            self._wander()
            scale = 1.0
            if self.world.noise == "heteroscedastic":
                scale = 2.0 ** self.random.uniform(-1, 1)
            self.candidate = Tree(self.best.level - self._effect(), scale)
            yield self.proposals

    def _effect(self) -> float:
        luck = self.random.random()
        if luck < self.world.better:
            return self.world.gain
        return -abs(self.random.gauss(0, 2)) if luck < self.world.better + self.world.worse else 0.0

    def _wander(self) -> None:
        self.drift = 0.99 * self.drift + math.sqrt(1 - 0.99 ** 2) * self.random.gauss(0, 1)

    def out_of_time(self) -> bool:
        """Tell whether the world's time is up."""
        return self.clock >= self.limit

    def measure(self, tree: Tree) -> float:
        """Return one run's number, and pay for it."""
        self.clock += 1
        self.runs += 1
        kind = self.world.noise
        if kind == "constant" or kind == "late" and self.proposals <= LATE:
            return 0.0 if kind == "constant" else tree.level
        noise = self.random.gauss(0, 1)
        if kind == "heavy":
            noise /= math.sqrt(self.random.expovariate(1))
        if kind == "drift":
            self._wander()
            noise += self.drift
        return tree.level + tree.scale * noise

    def keep(self) -> None:
        """Make the candidate the incumbent."""
        self.keeps += 1
        self.fakes += self.candidate.level >= self.best.level
        self.best = self.candidate


class ScalarloopTrial:
    """Let judge() run things in a session; the events it announces are folded into the state."""

    def __init__(self, session: Session, state: Any) -> None:
        self.session, self.state = session, state

    def candidate(self) -> float:
        return self.session.measure(self.session.candidate)

    def incumbent(self) -> float:
        return self.session.measure(self.session.best)

    def pair(self) -> Tuple[float, float]:
        if self.session.random.random() < 0.5:
            return self.incumbent(), self.candidate()
        candidate = self.candidate()
        return self.incumbent(), candidate

    def guards_hold(self) -> bool:
        return True

    def announce(self, event: Dict[str, Any]) -> None:
        self.state = core.advance_noise(self.state, event)

    def out_of_time(self) -> bool:
        return self.session.out_of_time()


def play_scalarloop(session: Session) -> float:
    """Run the project's own rule; return the gain that it reports."""
    rules, baseline = core.NoiseRules(), session.best
    if not session.world.candidates:
        session.limit -= 2 * CLOSING_PAIRS
    samples = [session.measure(baseline) for _ in range(3)]
    while not core.baseline_is_complete(samples):
        samples.append(session.measure(baseline))
    state = core.advance_noise(core.NoiseState(), {
        "type": "baseline", "samples": samples, "metric_seconds": [1.0] * len(samples)})
    for _ in session.propose():
        state = core.advance_noise(state, {"type": "turn", "agent_seconds": [float(session.r)]})
        before, trial = session.runs, ScalarloopTrial(session, state)
        judgement = core.judge(state, rules, trial)
        won = judgement.outcome is core.Reason.BETTER
        if won:
            session.keep()
        state = core.advance_noise(trial.state, {
            "type": "iteration", "verdict": "keep" if won else "discard",
            "samples": judgement.samples, "metric_seconds": [1.0] * (session.runs - before)})
    if not session.keeps:
        return 0.0
    trees = (baseline, session.best)
    pairs = [tuple(map(session.measure, trees)) for _ in range(CLOSING_PAIRS)]
    return core.closing_gain(pairs).median


def play_naive(session: Session) -> float:
    """Keep what beats the best number seen."""
    first = best = session.measure(session.best)
    for _ in session.propose():
        value = session.measure(session.candidate)
        if value < best:
            best = value
            session.keep()
    return first - best


def play_rerun(session: Session) -> float:
    """Keep what beats the best number twice."""
    first = best = session.measure(session.best)
    for _ in session.propose():
        value = session.measure(session.candidate)
        if value < best and session.measure(session.candidate) < best:
            best = value
            session.keep()
    return first - best


def play_mad(session: Session) -> float:
    """Keep a new best that is 2 MAD of all numbers away from the baseline."""
    first = best = session.measure(session.best)
    seen = [first]
    for _ in session.propose():
        value = session.measure(session.candidate)
        seen.append(value)
        if value < best:
            middle = stats.median(seen)
            spread = stats.median(abs(each - middle) for each in seen)
            if first - value >= 2 * spread:
                best = value
                session.keep()
    return first - best


def play_t_test(session: Session) -> float:
    """Keep what beats the reference's five stored runs in Student's test at 5 %."""
    first = reference = [session.measure(session.best) for _ in range(5)]
    for _ in session.propose():
        runs = [session.measure(session.candidate) for _ in range(5)]
        error = math.sqrt((stats.pvariance(reference) + stats.pvariance(runs)) / 4)
        if stats.fmean(reference) - stats.fmean(runs) > 1.860 * error:
            reference = runs
            session.keep()
    return stats.fmean(first) - stats.fmean(reference)


def play_sprt(session: Session) -> float:
    """Keep what wins a sequential test of pairs: 0 against one sigma, both errors 5 %."""
    reported, bound = 0.0, math.log(0.95 / 0.05)
    for _ in session.propose():
        ratio, gains = 0.0, []
        while abs(ratio) < bound and not session.out_of_time():
            gains.append(session.measure(session.best) - session.measure(session.candidate))
            ratio += (gains[-1] - 0.5) / 2  # differences have the variance 2
        if ratio >= bound:
            reported += stats.fmean(gains)
            session.keep()
    return reported


RULES: Dict[str, Callable[[Session], float]] = {
    "naive": play_naive, "naive + re-run": play_rerun, "MAD gate": play_mad,
    "t-test n=5": play_t_test, "SPRT": play_sprt, "this rule": play_scalarloop,
}


class Result(NamedTuple):
    """Hold one session's outcome; gain and bias in sigma."""

    keeps: int
    fakes: int
    gain: float
    bias: float
    candidates: int
    runs: int


def play(job: Tuple[World, int, str, int]) -> List[Result]:
    """Play all repeats of one world, r and rule; every rule gets the same seeds."""
    world, r, rule, repeats = job
    results = []
    for repeat in range(repeats):
        session = Session(world, r, f"{world.name} {r} {repeat}")
        reported = RULES[rule](session)
        gain = -session.best.level
        results.append(Result(session.keeps, session.fakes, gain, reported - gain,
                              session.proposals, session.runs))
    return results


def format_cell(numbers: List[float], places: int = 2) -> str:
    """Return the mean and its standard error, 14 wide."""
    error = stats.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return f"{f'{stats.fmean(numbers):.{places}f} +-{error:.{places}f}':>14}"


HEADER = (f"{'world':<26}{'r':>4}  {'rule':<15}{'fakes':>14}{'share %':>14}{'of all':>8}"
          f"{'gain':>15}{'bias':>15}{'cand.':>7}{'runs':>7}")


def format_row(world: World, r: int, rule: str, results: List[Result]) -> str:
    """Return one line of the table."""
    keeps, fakes = sum(x.keeps for x in results), sum(x.fakes for x in results)
    cells = "".join((
        format_cell([x.fakes for x in results]),
        format_cell([100 * x.fakes / max(1, x.keeps) for x in results], places=1),
        f"{100 * fakes / keeps:>8.1f}" if keeps else f"{'-':>8}",
        " " + format_cell([x.gain for x in results]),
        " " + format_cell([x.bias for x in results])))
    candidates = stats.fmean(x.candidates for x in results)
    runs = stats.fmean(x.runs for x in results)
    return f"{world.name:<26}{r:>4}  {rule:<15}{cells}{candidates:>7.0f}{runs:>7.0f}"


def main() -> int:
    """Print the table, a world at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="20 repeats")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worlds", default="", help="only worlds whose name contains this")
    options = parser.parse_args()
    repeats = 20 if options.quick else options.repeats
    os.nice(10)  # somebody else may be measuring
    worlds = [world for world in WORLDS if options.worlds in world.name]
    jobs = [(world, r, rule, repeats) for world in worlds for r in TIME for rule in RULES]
    began = time.monotonic()
    print(f"{repeats} repeats\n{HEADER}", flush=True)
    with multiprocessing.Pool(options.processes) as pool:
        for (world, r, rule, _), results in zip(jobs, pool.imap(play, jobs)):
            print(format_row(world, r, rule, results), flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
