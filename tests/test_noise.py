"""Noisy and broken metrics through the command line: what is kept, what it cost, what is said."""
from __future__ import annotations

import statistics

import pytest
from conftest import Project

NOISY = """
    import pathlib, random
    print("METRIC loss=%r" % ({base} + random.gauss(0, 0.02)))
"""
EDIT = """
    import os
    n = int(os.environ["SCALARLOOP_ITERATION"])
    open("src/value.txt", "w").write({value})
"""


def noisy(project: Project, base: str = "1.0") -> None:
    """Give the project a metric with normal noise of 0.02."""
    project.write("metric.py", NOISY.format(base=base))
    project.commit()


def test_nothing_is_kept_of_a_hundred_candidates_without_a_gain(project: Project) -> None:
    noisy(project)
    project.agent(EDIT.format(value='"%d" % n'))
    project.config["loop"].update(iterations=100, patience=1000)
    result = project.run(timeout=300)
    assert result.code == 0, result
    rows = project.iterations()
    best, naive = project.ledger()[1]["value"], 0
    for row in rows:    # what the published loop would have kept of the same first runs
        if row["value"] is not None and row["value"] < best:
            best, naive = row["value"], naive + 1
    assert len(rows) == 100
    assert sum(row["verdict"] == "keep" for row in rows) <= 1   # one run in five may keep one
    assert naive >= 1
    assert "noise" in result.out


def test_a_true_gain_is_kept_with_its_evidence_and_measured_anew_at_the_end(
        project: Project) -> None:
    noisy(project, 'float(pathlib.Path("src/value.txt").read_text()) / 100')
    project.agent(EDIT.format(value='"%d" % (100 - 20 * n)'))
    project.config["loop"].update(iterations=3)
    result = project.run()
    assert result.code == 0, result
    keeps = [row for row in project.iterations() if row["verdict"] == "keep"]
    assert len(keeps) == 3
    for row in keeps:
        duel = next(record for record in project.ledger()
                    if record["type"] == "duel" and record["n"] == row["n"])
        assert duel["seq"] < row["seq"] and duel["tree"] == row["tree"]
        assert row["samples"]["pairs"] and "odds" in row["evidence"] and "alpha" in row["evidence"]
    stop = project.ledger()[-1]
    assert len(stop["closing"]["pairs"]) >= 5
    assert stop["closing"]["gain"] == pytest.approx(0.6, abs=0.1)
    first, last = (statistics.median(runs) for runs in zip(*stop["closing"]["pairs"]))
    assert f"loss       {first:.6g} -> {last:.6g} " in result.out, result
    assert "fresh pairs" in result.out and f"gain       {stop['closing']['gain']:.6g}, " in result.out
    subject = project.git("log", "-1", "--format=%s", "scalarloop/t")
    rivals = [first for first, _ in keeps[-1]["samples"]["pairs"]]
    assert f" {statistics.median(rivals):.6g} -> {keeps[-1]['value']:.6g} (" in subject


def test_an_exact_metric_costs_one_run_a_drop_and_three_a_keep(project: Project) -> None:
    project.turns('open("src/value.txt", "w").write("90\\n")',
                  'open("src/value.txt", "w").write("95\\n")')
    assert project.run().code == 0
    keep, drop = project.iterations()
    assert len(keep["samples"]["candidate"]) + len(keep["samples"]["incumbent"]) == 3
    assert len(keep["metric_seconds"]) == 3
    assert drop["samples"] == {"candidate": [95.0], "incumbent": [], "pairs": []}
    assert len(drop["metric_seconds"]) == 1


def test_a_resumed_noisy_run_has_the_state_of_an_uninterrupted_one(project: Project) -> None:
    import scalarloop
    noisy(project)
    project.agent(EDIT.format(value='"%d" % n'))
    project.config["loop"].update(iterations=4, patience=1000)
    assert project.run().code == 0
    assert project.run("--more", "4").code == 0
    whole = scalarloop.State()
    for record in project.ledger():
        whole.advance(record)
    assert whole.iterations == 8 and not whole.noise.exact
    assert whole.noise.spent == sum(record["alpha"] for record in project.ledger()
                                    if record["type"] == "duel")


@pytest.mark.parametrize("metric, edit, keys, word", [
    ("print('METRIC loss=1.0')", '"%d" % n', {}, "constant_metric"),
    ("print(open('src/value.txt').read())", '"METRIC loss=%d" % (0 if n < 9 else 1)',
     {"max_gain": "50%"}, "noise.implausible"),
    ("print(open('src/value.txt').read())", '"METRIC loss=-1e%d" % (307 + n)',
     {"bounds": "0 *"}, "metric.out_of_bounds"),
    ("print(open('src/value.txt').read())", '"METRIC loss=-inf" + " " * n', {},
     "metric.not_finite"),
], ids=["constant value", "hard-coded value", "driven down without end", "minus infinity"])
def test_a_broken_metric_ends_with_the_right_word(
        project: Project, metric: str, edit: str, keys: dict, word: str) -> None:
    project.write("metric.py", metric)
    project.write("src/value.txt", "METRIC loss=1.0\n")
    project.commit()
    project.agent(EDIT.format(value=edit))
    project.config["loop"].update(iterations=12, patience=1000)
    project.config["metric"].update(keys)
    result = project.run()
    assert word in result.out.partition("stopped")[2], result
    assert not any(row["verdict"] == "keep" for row in project.iterations())


def test_late_noise_ends_exact_mode(project: Project) -> None:
    project.write("metric.py", """
        import pathlib, random
        value = float(pathlib.Path("src/value.txt").read_text())
        print("METRIC value=%r" % (value + (random.gauss(0, 1) if value < 100 else 0)))
    """)
    project.commit()
    project.turns('open("src/value.txt", "w").write("50\\n")')
    assert project.run().code == 0
    assert [record["type"] for record in project.ledger()].count("noise") == 1
    row, = project.iterations()
    assert row["verdict"] == "keep" and row["samples"]["pairs"]


def test_one_run_keeps_are_marked_unproven(project: Project) -> None:
    noisy(project, 'float(pathlib.Path("src/value.txt").read_text())')
    project.config["metric"]["confidence"] = "none"
    project.turns('open("src/value.txt", "w").write("90\\n")')
    result = project.run()
    assert project.verdicts() == ["keep metric.better_unproven"]
    assert "1 unproven" in result.out
    assert len(project.iterations()[0]["metric_seconds"]) == 1
    assert len(project.ledger()[-1]["closing"]["pairs"]) >= 5


@pytest.mark.parametrize("patch, passes", [("250", True), ("100 ", False)],
                         ids=["seen", "not seen"])
def test_a_canary_must_make_the_metric_worse(project: Project, patch: str, passes: bool) -> None:
    noisy(project, 'float(pathlib.Path("src/value.txt").read_text()) / 100')
    project.write("canary.patch", f"""
        --- a/src/value.txt
        +++ b/src/value.txt
        @@ -1 +1 @@
        -100
        +{patch}
    """)
    project.commit()
    project.config["metric"]["canary"] = "canary.patch"
    result = project.run("check")
    assert result.code == (0 if passes else 2), result
    assert ("the metric sees it" in result.out) == passes


def test_a_metric_guard_is_no_coin_toss(project: Project) -> None:
    noisy(project, 'float(pathlib.Path("src/value.txt").read_text()) / 100')
    project.write("speed.py", """
        import pathlib, random
        slow = "slow" in pathlib.Path("src/other.txt").read_text()
        print("seconds", (2.0 if slow else 1.0) + random.gauss(0, 0.01))
    """)
    project.write("src/other.txt", "quick\n")
    project.commit()
    project.config["guard.speed"] = {"command": "python3 speed.py", "tolerance": "0.2",
                                     "pattern": r"seconds (\S+)"}
    project.turns("""
        open("src/value.txt", "w").write("50\\n"); open("src/other.txt", "w").write("slow\\n")
    """, 'open("src/value.txt", "w").write("50\\n")')
    assert project.run().code == 0
    assert project.verdicts() == ["guard_failed guard.worse", "keep metric.better"]


def test_the_holdout_gap_is_reported(project: Project) -> None:
    project.config["holdout"] = {"command": "sh -c 'echo METRIC hidden=7'"}
    project.turns('open("src/value.txt", "w").write("90\\n")')
    result = project.run()
    assert project.iterations()[0]["holdout"] == 7
    assert "holdout    7 -> 7 (+0.0 %)" in result.out
    assert "no gain on the holdout" in result.out
