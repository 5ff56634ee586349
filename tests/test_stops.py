"""When a run stops and how it goes on; what the keys of loop.ini do while it runs."""
from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest

import scalarloop
from conftest import TOOL, Project, Result

Changes = Dict[str, Dict[str, Any]]


def write(value: object, path: str = "src/value.txt") -> str:
    """Return an agent that writes one file."""
    return f"open({path!r}, 'w').write('{value}\\n')"


def change(project: Project, changes: Changes) -> None:
    """Set keys of loop.ini."""
    for section, keys in changes.items():
        project.config.setdefault(section, {}).update(keys)


def play(project: Project, *args: str) -> Result:
    """Write loop.ini and run the tool in this process."""
    project.save_config()
    return project.call(*args)


def stop(project: Project) -> Dict[str, Any]:
    """Return the last record, which says how the run stopped."""
    record = project.ledger()[-1]
    assert record["type"] == "stop"
    return record


def short(project: Project) -> List[str]:
    """Return the verdicts alone."""
    return [row["verdict"] for row in project.iterations()]


def whole(project: Project) -> None:
    """Hold a run's record to be whole, and its machine to be clean."""
    assert project.call("verify").code == 0
    assert project.leftovers() == []


# ══ stop rules ═══════════════════════════════════════════════════════════════════════════════════

QUIT = "print('SCALAR_LOOP_GIVE_UP all is tuned')"
FAIL = "raise SystemExit(3)"
BY_TURN = "import os; open('src/value.txt', 'w').write('x' * int(os.environ['SCALARLOOP_TURN']))"
STOPS: Dict[str, Tuple[Changes, Sequence[str], int, str, List[str]]] = {
    "iterations": ({}, [write(90), "pass"], 0, "iterations", ["keep", "no_change"]),
    "target": ({"loop": {"target": 85}}, [write(90), write(84), write(70)], 0, "target",
               ["keep", "keep"]),
    "target_met_exactly": ({"loop": {"target": 90}}, [write(90), write(80)], 0, "target",
                           ["keep"]),
    "target_upwards": ({"loop": {"target": 115}, "metric": {"direction": "maximize"}},
                       [write(110), write(90), write(120), write(130)], 0, "target",
                       ["keep", "discard", "keep"]),
    "target_met_before": ({"loop": {"target": 100}}, [write(90)], 0, "target", []),
    "target_by_a_drop": ({"loop": {"target": 50},
                          "guard.floor": {"command": "sh -c 'test $(cat src/value.txt) -gt 60'"}},
                         [write(10), write(92)], 0, "iterations", ["guard_failed", "keep"]),
    "patience": ({"loop": {"patience": 2}}, ["pass", write(90), write(95), QUIT, write(80)], 0,
                 "patience", ["no_change", "keep", "discard", "give_up"]),
    "give_ups": ({"loop": {"give_ups": 2}}, [QUIT, "pass", QUIT, QUIT, write(90)], 0, "give_ups",
                 ["give_up", "no_change", "give_up", "give_up"]),
    "failures": ({"loop": {"failures": 2}}, [FAIL, "pass", FAIL, FAIL, write(90)], 1, "failures",
                 ["agent_failed", "no_change", "agent_failed", "agent_failed"]),
    "max_cost": ({"agent": {"price_per_turn": 0.5, "max_cost": 1}},
                 [write(90), write(80), write(70)], 0, "max_cost", ["keep", "keep"]),
    "max_cost_is_not_passed": ({"agent": {"price_per_turn": 1, "max_cost": 2.5}},
                               [write(90), write(80), write(70)], 0, "max_cost",
                               ["keep", "keep"]),
    "max_cost_counts_rework": ({"agent": {"price_per_turn": 1, "max_cost": 3, "rework": 2}},
                               [BY_TURN, write(80)], 0, "max_cost", ["crash"]),
    "check_in": ({"loop": {"check_in": 2}}, [write(90), "pass", write(70)], 3, "check_in",
                 ["keep", "no_change"]),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_rule(project: Project, name: str) -> None:
    changes, turns, code, reason, verdicts = STOPS[name]
    project.turns(*turns)
    change(project, changes)
    before = project.fingerprint()
    result = play(project)
    assert (result.code, stop(project)["reason"]) == (code, reason), result
    assert short(project) == verdicts, result
    assert not result.err and project.fingerprint() == before
    line = next(line for line in result.out.splitlines() if line.startswith("stopped"))
    assert line.endswith(f"({reason})") and line.split()[1] != f"({reason})"
    whole(project)


def test_the_budget_is_wall_clock(project: Project) -> None:
    project.turns("import time; time.sleep(.7)")
    change(project, {"loop": {"budget": "2s", "iterations": 50}})
    began = time.monotonic()
    result = play(project)
    assert result.code == 0 and stop(project)["reason"] == "budget", result
    assert time.monotonic() - began >= 2 and len(project.iterations()) <= 3
    assert "budget" in play(project).out, "finished: it stays used up"


def test_a_metric_that_looks_constant(project: Project) -> None:
    project.write("metric.py", "print('METRIC value=7')")
    project.commit()
    project.agent("import os; open('src/value.txt', 'w').write(os.environ['SCALARLOOP_ITERATION'])")
    change(project, {"loop": {"iterations": 30, "patience": 30}})
    result = play(project)
    assert result.code == 1 and stop(project)["reason"] == "constant_metric", result
    assert short(project) == ["discard"] * 10
    assert "looks constant" in result.out and "canary" in result.out, result


def test_patience_counts_from_the_last_keep_and_not_a_fault_of_the_machine() -> None:
    state = scalarloop.State()
    common = dict(files=[], detail="", note="", value=None, best=1.0, tree="", elapsed=0.0,
                  commit="c", holdout=None, samples={}, seq=1, prev="", type="iteration",
                  agent_seconds=[], metric_seconds=[])
    verdicts = ["discard", "violation", "void", "crash", "give_up"]
    for n, verdict in enumerate(verdicts, 1):
        state._on_iteration(dict(common, n=n, verdict=verdict, reason="x"))
    assert state.since_keep == 4 and state.voids == 0
    state._on_iteration(dict(common, n=6, verdict="keep", reason="x", value=1.0))
    assert state.since_keep == 0


# ══ check-ins, more, new ═════════════════════════════════════════════════════════════════════════

def subjects(project: Project) -> List[str]:
    """Return the kept commits' subjects, newest first."""
    return project.git("log", "--format=%s", "HEAD..scalarloop/t").splitlines()


def test_check_ins_change_nothing_of_the_result(project: Project) -> None:
    project.turns(write(90), write(95), write(80))
    change(project, {"loop": {"check_in": 1}})
    assert [play(project).code for _ in range(3)] == [3, 3, 0]
    assert project.verdicts() == ["keep metric.better", "discard metric.not_better",
                                  "keep metric.better"]
    assert subjects(project) == ["#3 value 90 -> 80 (-11.1 %)", "#1 value 100 -> 90 (-10.0 %)"]
    assert [row["reason"] for row in project.ledger() if row["type"] == "stop"] == [
        "check_in", "check_in", "iterations"]
    whole(project)


def test_a_check_in_says_how_to_go_on(project: Project) -> None:
    project.turns(write(90), "pass")
    change(project, {"loop": {"check_in": 1}})
    assert "start again to go on" in play(project).out
    change(project, {"loop": {"check_in": 5}})
    assert play(project).code == 0


def test_a_finished_run_says_how_to_go_on(project: Project) -> None:
    project.turns(write(90))
    play(project)
    before = (project.state / "ledger.jsonl").read_bytes()
    refs = project.git("for-each-ref")
    result = play(project)
    assert result.code == 0 and not result.err
    assert "--more" in result.out and "--new" in result.out and "100 -> 90" in result.out, result
    assert (project.state / "ledger.jsonl").read_bytes() == before
    assert project.git("for-each-ref") == refs


def test_more_goes_on_with_a_finished_run(project: Project) -> None:
    project.turns(write(90), write(80), "pass", write(70))
    change(project, {"loop": {"iterations": 1, "patience": 1}})
    assert play(project).code == 0
    result = play(project, "--more", "2")
    assert result.code == 0 and short(project) == ["keep", "keep", "no_change"], result
    assert "--more" in play(project).out and len(project.iterations()) == 3
    assert play(project, "--more", "1").code == 0
    assert short(project) == ["keep", "keep", "no_change", "keep"]
    whole(project)


@pytest.mark.parametrize("changes, key", [
    ({"loop": {"target": 95}}, "target"), ({"loop": {"budget": "1s"}}, "budget"),
    ({"agent": {"price_per_turn": 1, "max_cost": 1}}, "max_cost")])
def test_more_can_not_pass_another_limit_and_says_which(project: Project, changes: Changes,
                                                        key: str) -> None:
    project.turns("import time; time.sleep(1.1); " + write(90), write(80), write(70))
    change(project, changes)
    assert play(project).code == 0 and stop(project)["reason"] == key
    result = play(project)
    assert key in result.out and "--more N goes on" not in result.out, result
    result = play(project, "--more", "2")
    assert result.code == 2 and f"] {key}" in result.err and len(result.err.splitlines()) == 1
    assert len(project.iterations()) == 1
    for section, keys in changes.items():
        keys.pop("price_per_turn", None)
        for name in keys:
            del project.config[section][name]
    assert play(project, "--more", "1").code == 0 and short(project) == ["keep", "keep"]


def test_a_raised_limit_goes_on_without_more(project: Project) -> None:
    project.turns(write(90), write(80))
    project.config["loop"]["iterations"] = 1
    play(project)
    change(project, {"loop": {"iterations": 2, "target": 50, "patience": 9, "budget": "1h",
                              "give_ups": 9, "failures": 9, "check_in": 9}})
    assert play(project).code == 0 and short(project) == ["keep", "keep"]
    resumed = next(row for row in project.ledger() if row["type"] == "resume")
    assert resumed["limits"] == ["[loop] " + name for name in sorted(
        ["iterations", "target", "patience", "budget", "give_ups", "failures", "check_in"])]
    whole(project)


def test_a_lowered_limit_ends_the_run(project: Project) -> None:
    project.turns(write(90), write(80), write(70))
    change(project, {"loop": {"check_in": 1}})
    play(project)
    project.config["loop"]["iterations"] = 1
    assert play(project).code == 0 and short(project) == ["keep"]


OTHER_KEYS: List[Tuple[Changes, List[str]]] = [
    ({"loop": {"scope": "src/*"}}, ["[loop] scope"]),
    ({"loop": {"seal": "data", "max_files": 3}}, ["[loop] max_files", "[loop] seal"]),
    ({"loop": {"goal": "Another."}}, ["[loop] goal"]),
    ({"loop": {"branch": "other"}}, ["[loop] branch"]),
    ({"metric": {"direction": "maximize"}}, ["[metric] direction"]),
    ({"metric": {"command": "python3 -I metric.py"}}, ["[metric] command"]),
    ({"metric": {"min_gain": "1%"}}, ["[metric] min_gain"]),
    ({"agent": {"timeout": "31s"}}, ["[agent] timeout"]),
    ({"adapter": {"model": "x"}}, ["[adapter] SCALARLOOP_OPT_MODEL"]),
    ({"guard.new": {"command": "true"}}, ["[guard.new]"]),
    ({"isolation": {"level": "auto"}}, ["[isolation] level"]),
]


@pytest.fixture
def paused(project: Project) -> Project:
    """Return a project whose run paused after one keep."""
    project.turns(write(90), write(80))
    change(project, {"loop": {"check_in": 1, "iterations": 9}})
    assert play(project).code == 3
    return project


def test_another_key_that_changed_is_refused(paused: Project) -> None:
    before = (paused.state / "ledger.jsonl").read_bytes()
    config = paused.config
    for changes, names in OTHER_KEYS:
        paused.config = copy.deepcopy(config)
        change(paused, {**changes, "loop": {"iterations": 30, **changes.get("loop", {})}})
        result = play(paused)
        assert result.code == 2 and len(result.err.splitlines()) == 1, result
        assert all(name in result.err for name in names) and "--new" in result.err, result
        assert "iterations" not in result.err
        assert (paused.state / "ledger.jsonl").read_bytes() == before


def test_new_keeps_the_old_run_beside_it(project: Project) -> None:
    project.turns(write(90))
    play(project)
    old = {name: project.git("rev-parse", name) for name in
           ("scalarloop/t", "refs/scalarloop/t/ledger")}
    ledger = (project.state / "ledger.jsonl").read_bytes()
    project.turns(write(60))
    assert play(project, "--new").code == 0
    assert project.git("rev-parse", "scalarloop/t.1") == old["scalarloop/t"]
    assert project.git("rev-parse", "refs/scalarloop/t.1/ledger") == old["refs/scalarloop/t/ledger"]
    folder = project.state.with_name("t.1")
    assert (folder / "ledger.jsonl").read_bytes() == ledger and (folder / "store.git").is_dir()
    assert subjects(project) == ["#1 value 100 -> 60 (-40.0 %)"]
    assert project.ledger()[0]["seq"] == 0
    whole(project)
    assert play(project, "--new").code == 0
    assert project.state.with_name("t.2").is_dir() and project.git("rev-parse", "scalarloop/t.2")
    whole(project)


def test_new_that_comes_to_nothing_leaves_the_old_run_where_it_was(project: Project) -> None:
    project.turns(write(90))
    assert play(project).code == 0
    kept = project.git("rev-parse", "scalarloop/t", "refs/scalarloop/t/ledger")
    ledger = project.ledger()
    project.write("metric.py", "raise SystemExit('broken')\n")
    project.commit("a metric that fails")
    result = play(project, "--new")
    assert result.code == 2 and "metric.exit" in result.err, result
    assert project.git("rev-parse", "scalarloop/t", "refs/scalarloop/t/ledger") == kept
    assert sorted(os.listdir(project.state.parent)) == [".gitignore", "t"]
    assert sorted(os.listdir(project.state)) == ["iterations", "ledger.jsonl", "lock", "store.git"]
    assert project.ledger() == ledger and "scalarloop/t.1" not in project.git("branch")
    project.git("revert", "--no-edit", "HEAD")
    project.turns(write(80))
    assert play(project, "--more", "1").code == 0 and short(project) == ["keep", "keep"]
    whole(project)


@pytest.mark.parametrize("left", ["refs", "ref", "branch"])
def test_new_takes_a_number_that_is_free_everywhere(project: Project, left: str) -> None:
    """Somebody who tidies up may leave the branch or the ledger's ref of an old run behind."""
    project.turns(write(90))
    assert play(project).code == play(project, "--new").code == 0
    shutil.rmtree(project.state.with_name("t.1"))
    if left == "ref":
        project.git("branch", "-q", "-D", "scalarloop/t.1")
    if left == "branch":
        project.git("update-ref", "-d", "refs/scalarloop/t.1/ledger")
    assert play(project, "--new").code == 0
    assert project.state.with_name("t.2").is_dir() and project.git("rev-parse", "scalarloop/t.2")
    whole(project)


def test_new_sets_the_refs_of_a_run_aside_whose_folder_is_gone(project: Project) -> None:
    project.turns(write(90))
    assert play(project).code == 0
    kept = project.git("rev-parse", "scalarloop/t")
    shutil.rmtree(project.state.parent)
    refused = play(project)
    assert refused.code == 2 and "--new" in refused.err, refused
    assert play(project, "--new").code == 0 and short(project) == ["keep"]
    assert project.git("rev-parse", "scalarloop/t.1") == kept
    whole(project)


def test_new_where_there_is_no_run_simply_begins(project: Project) -> None:
    project.turns(write(90))
    assert play(project, "--new").code == 0 and short(project) == ["keep"]
    assert not project.state.with_name("t.1").exists()


def test_failures_are_resumed_by_starting_again(project: Project) -> None:
    project.turns(FAIL, FAIL, write(90))
    project.config["loop"]["failures"] = 2
    result = play(project)
    assert result.code == 1 and "start again" in result.out, result
    assert play(project).code == 0
    assert short(project) == ["agent_failed", "agent_failed", "keep"]


def test_the_users_own_work_goes_on_meanwhile(paused: Project) -> None:
    """New commits, dirty files and another branch of the user's don't hinder a resume."""
    project = paused
    project.write("src/value.txt", "5000\n")
    project.commit("on with it")
    project.git("checkout", "-q", "-b", "feature")
    project.write("metric.py", "half done")
    project.git("add", "metric.py")
    before = project.fingerprint()
    assert play(project).code == 3 and short(project) == ["keep", "keep"]
    assert project.fingerprint() == before
    assert project.git("show", "scalarloop/t:src/value.txt") == "80"


# ══ signals ══════════════════════════════════════════════════════════════════════════════════════

def is_running(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE)
    return done.stdout.strip() not in (b"", b"Z") and not done.stdout.startswith(b"Z")


# Waits for ever the first time it comes by, with a child and a daemon that ignore a polite word.
HANG = """
import os, signal, sys, time
if not os.path.exists({mark!r}):
    for daemon in (False, True):
        if os.fork() == 0:
            if daemon:
                os.setsid()
                if os.fork():
                    os._exit(0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open({mark!r} + ".pids", "a").write("%d\\n" % os.getpid())
            time.sleep(60)
            os._exit(0)
    open({mark!r} + ".pids", "a").write("%d\\n" % os.getpid())
    while len(open({mark!r} + ".pids").read().split()) < 3:
        time.sleep(.01)
    open({mark!r}, "w").close()
    time.sleep(60)
"""


def start(project: Project, ready: Path, **options: Any) -> "subprocess.Popen[bytes]":
    """Start a run and wait until it is where the test wants it."""
    project.save_config()
    run = subprocess.Popen([sys.executable, str(TOOL), "loop.ini"], cwd=project.root,
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           **options)
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(.01)
    return run


def finish(run: "subprocess.Popen[bytes]", number: int) -> Tuple[Result, float]:
    """Send a signal; return how the run ended and how long that took."""
    began = time.monotonic()
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    return Result(run.returncode, out.decode(), err.decode()), time.monotonic() - began


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PLACES = ["agent", "metric", "guard"]


@pytest.mark.parametrize("number, where", [
    pytest.param(number, where, id=f"{number.name}-{where}",
                 marks=() if SIGNALS.index(number) == PLACES.index(where) else pytest.mark.slow)
    for number in SIGNALS for where in PLACES])
def test_a_signal_drops_the_iteration_and_the_run_can_go_on(project: Project, number: int,
                                                            where: str) -> None:
    mark = project.tmp / "mark"
    hang = HANG.format(mark=str(mark))
    in_agent = hang if where == "agent" else ""
    (project.tmp / "hang.py").write_text(
        "import pathlib\nif int(pathlib.Path('src/value.txt').read_text()) == 80:\n"
        + "".join("    " + line + "\n" for line in hang.strip().splitlines()))
    project.turns(write(90), in_agent + write(80), write(70))
    judge = f"sh -c 'python3 {project.tmp}/hang.py && exec python3 metric.py'"
    if where == "metric":
        project.config["metric"]["command"] = judge
    elif where == "guard":
        project.config["guard.hang"] = {"command": judge}
    before = project.fingerprint()
    result, seconds = finish(start(project, mark), number)
    pids = [int(word) for word in Path(f"{mark}.pids").read_text().split()]
    assert result.code == 130 and not result.err and seconds < 15, (result, seconds)
    name = signal.Signals(number).name
    assert f"interrupted by {name}" in result.out and "start again" in result.out, result
    assert len(pids) == 3 and not any(map(is_running, pids))
    assert short(project) == ["keep"] and stop(project)["reason"] == "interrupted"
    assert subjects(project) == ["#1 value 100 -> 90 (-10.0 %)"]
    assert project.fingerprint() == before and project.leftovers() == []
    assert project.run("verify", config=False).code == 0
    again = project.run(config=False)
    assert again.code == 0 and short(project) == ["keep", "keep", "keep"], again
    assert subjects(project) == ["#3 value 80 -> 70 (-12.5 %)", "#2 value 90 -> 80 (-11.1 %)",
                                 "#1 value 100 -> 90 (-10.0 %)"]
    assert project.run("verify", config=False).code == 0 and project.leftovers() == []


def test_a_signal_during_the_baseline_leaves_nothing(project: Project) -> None:
    mark = project.tmp / "mark"
    (project.tmp / "hang.py").write_text(HANG.format(mark=str(mark)))
    judge = f"sh -c 'python3 {project.tmp}/hang.py; python3 metric.py'"
    project.config["metric"]["command"] = judge
    result, seconds = finish(start(project, mark), signal.SIGINT)
    assert result.code == 130 and seconds < 15 and "Traceback" not in result.err, result
    assert len(result.err.splitlines()) == 1 and "interrupted by SIGINT" in result.err, result
    assert not (project.root / ".scalarloop").exists() and project.leftovers() == []
    assert "scalarloop" not in project.git("for-each-ref")


def test_an_impatient_user_signals_twice(project: Project) -> None:
    mark = project.tmp / "mark"
    project.turns(write(90), "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                  + HANG.format(mark=str(mark)))
    run = start(project, mark)
    run.send_signal(signal.SIGINT)
    time.sleep(.2)
    result, seconds = finish(run, signal.SIGINT)
    assert result.code == 130 and seconds < 15 and "Traceback" not in result.err, result
    assert short(project) == ["keep"] and project.run("verify", config=False).code == 0


def test_nohup_stays_nohup(project: Project) -> None:
    mark = project.tmp / "mark"
    project.turns(f"open({str(mark)!r}, 'w'); import time; time.sleep(1); " + write(90))
    run = start(project, mark, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    result, _ = finish(run, signal.SIGHUP)
    assert result.code == 0 and short(project) == ["keep"], result


# ══ rework ═══════════════════════════════════════════════════════════════════════════════════════

def by_turn(*sources: str) -> str:
    """Return an agent that plays one source a turn of the same iteration."""
    return ("import os\nturn = int(os.environ['SCALARLOOP_TURN'])\n"
            f"exec({list(sources)!r}[min(turn, {len(sources)}) - 1])\n")


NAMED = "open('src/notes.txt', 'w').write('first turn\\n'); "
REWORKS: Dict[str, Tuple[int, Sequence[str], str, int]] = {
    "crash_mended": (2, [NAMED + write("x"), "assert open('src/notes.txt').read();" + write(90)],
                     "keep metric.better", 2),
    "guard_mended": (2, [NAMED + write(66), write(80)], "keep metric.better", 2),
    "mended_in_the_last_turn": (2, [write("x"), write("y"), write(90)], "keep metric.better", 3),
    "never_mended": (2, [write("x"), write("y"), write("z"), write(90)],
                     "crash metric.malformed", 3),
    "no_rework": (0, [write("x"), write(90)], "crash metric.malformed", 1),
    "no_rework_of_a_guard": (0, [write(66), write(90)], "guard_failed guard.failed", 1),
    "no_rework_of_a_drop": (2, [write(100.5), write(90)], "discard metric.not_better", 1),
    "no_rework_of_a_violation": (2, [write(1, "data/truth.txt"), write(90)],
                                 "violation seal.modified", 1),
    "mended_into_something_worse": (2, [write("x"), write(120)], "discard metric.not_better", 2),
    "mended_by_cheating": (2, [write("x"), write(1, "data/truth.txt")],
                           "violation seal.modified", 2),
    "taken_back": (2, [write("x"), write(100)], "no_change candidate.unchanged", 2),
    "given_up": (2, [write("x"), QUIT], "give_up agent.gave_up", 2),
}


@pytest.mark.parametrize("name", REWORKS)
def test_rework(project: Project, name: str) -> None:
    rework, turns, verdict, count = REWORKS[name]
    project.turns(by_turn(*turns))
    change(project, {"agent": {"rework": rework},
                     "guard.sum": {"command": "sh -c 'echo SIXES; ! grep -q 66 src/value.txt'"}})
    play(project)
    assert project.verdicts() == [verdict]
    row = project.iterations()[0]
    assert row["turns"] == count and len(row["agent_seconds"]) == count
    assert [record["turn"] for record in project.ledger() if record["type"] == "turn"] == list(
        range(1, count + 1))
    prompt = (project.state / "iterations" / "0001" / "prompt.txt").read_text()
    assert prompt.count("# Mend this first") == count - 1
    if count > 1:
        assert ("metric.malformed" in prompt) != ("    | SIXES" in prompt)
    whole(project)


def test_rework_that_changes_nothing_is_not_measured_again(project: Project) -> None:
    count = project.tmp / "count"
    project.config["metric"]["command"] = f"sh -c 'echo x >> {count}; python3 metric.py'"
    project.turns(by_turn(write("x"), "pass", write(90)))
    project.config["agent"]["rework"] = 1
    play(project)
    assert project.verdicts() == ["crash metric.malformed"]
    assert len(count.read_text().split()) == 4, "3 for the baseline, 1 for the crash"


def test_a_tree_that_was_tried_is_dropped_without_a_run(project: Project) -> None:
    project.turns(write(110), write(110), write("x"), write("x"), write(90), write(100))
    play(project)
    assert project.verdicts() == [
        "discard metric.not_better", "discard candidate.repeated", "crash metric.malformed",
        "discard candidate.repeated", "keep metric.better", "discard candidate.repeated"]
    assert [bool(row["metric_seconds"] + row["failed_seconds"]) for row in project.iterations()] \
        == [True, False, True, False, True, False]


# ══ keys of [loop] ═══════════════════════════════════════════════════════════════════════════════

def see(path: Path, what: str) -> str:
    """Return code that appends an expression's value to a file outside the repository."""
    return f"open({str(path)!r}, 'a').write(repr({what}) + '\\n')\n"


def seen(path: Path) -> List[Any]:
    """Return what was appended there."""
    return [eval(line) for line in path.read_text().splitlines()] if path.exists() else []


NOTE = """
import os
os.makedirs("notes", exist_ok=True)
open("notes/memory.md", "a").write("turn %s\\n" % os.environ["SCALARLOOP_ITERATION"])
"""


def test_the_memory_survives_every_verdict_and_is_never_measured(project: Project) -> None:
    book = project.tmp / "book"
    project.write("metric.py", f"""
        import os
        {see(book, "os.path.exists('notes')")}
        print("METRIC value=" + open("src/value.txt").read().strip())
    """)
    project.commit()
    project.turns(NOTE + write(110), NOTE + QUIT, NOTE + write(1, "data/truth.txt"), NOTE + FAIL,
                  NOTE + write(90), NOTE + write("x"), "print(open('notes/memory.md').read())")
    project.config["loop"].update(memory="notes/memory.md", check_in=3)
    while play(project).code == 3:
        pass
    assert project.verdicts() == [
        "discard metric.not_better", "give_up agent.gave_up", "violation seal.modified",
        "agent_failed agent.failed", "keep metric.better", "crash metric.malformed",
        "no_change candidate.unchanged"]
    log = (project.state / "iterations" / "0007" / "agent.log").read_text()
    assert log.split("\n")[:6] == [f"turn {n}" for n in range(1, 7)]
    assert set(seen(book)) == {False}
    assert "notes" not in project.git("ls-tree", "-r", "--name-only", "scalarloop/t")
    assert "notes/memory.md" in (project.state / "iterations" / "0001" / "prompt.txt").read_text()
    whole(project)


def test_a_memory_in_scope_is_still_no_part_of_a_candidate(project: Project) -> None:
    project.turns(write("secret", "src/memory.md") + ";" + write(90),
                  "open('src/memory.md').read()")
    project.config["loop"]["memory"] = "src/memory.md"
    play(project)
    assert project.verdicts() == ["keep metric.better", "no_change candidate.unchanged"]
    assert "memory" not in project.git("ls-tree", "-r", "--name-only", "scalarloop/t")


def test_droppings_are_dropped_and_counted(project: Project) -> None:
    project.turns("""
        import os
        os.makedirs(".claude/a"); os.makedirs("src/deep/.aider.d"); os.makedirs("src/__pycache__")
        for path in (".claude/a/x", ".aider.log", "src/.aider.in", "src/deep/.aider.d/y",
                     "src/__pycache__/z.pyc"):
            open(path, "w").write("junk")
        open("src/value.txt", "w").write("90")
    """, write("junk", "other.log"))
    project.config["loop"]["ignore"] = ".aider* **/.aider* **/.aider*/** .claude/**"
    play(project)
    assert project.verdicts() == ["keep metric.better", "violation scope.created"]
    assert project.iterations()[0]["dropped"] == 5
    assert project.git("diff", "--name-only", "HEAD", "scalarloop/t") == "src/value.txt"


def test_the_program_is_handed_over_verbatim(project: Project) -> None:
    text = "# Orders\n\n  Say \"x\" & $HOME, 100 %(y)s.\n\n\n- é\n"
    (project.root / "program.md").write_text(text)
    project.commit()
    del project.config["loop"]["goal"]
    project.config["loop"]["program"] = "program.md"
    book = project.tmp / "book"
    project.turns("import sys\n" + see(book, "sys.stdin.buffer.read()"))
    play(project)
    assert text.strip().encode() in seen(book)[0]
    shown = play(project, "prompt").out
    assert text.strip() in shown


def test_the_prompt_command_shows_the_exact_next_prompt(project: Project) -> None:
    book = project.tmp / "book"
    read = "import sys\n" + see(book, "sys.stdin.buffer.read()")
    project.turns(read + write(90), read + write(95), read)
    project.config["loop"]["check_in"] = 1
    play(project)
    for _ in range(2):
        shown = play(project, "prompt").out
        play(project)
        assert seen(book)[-1].decode() == shown


@pytest.mark.parametrize("changes, source, verdict", [
    ({"max_files": 2}, "for n in range(3): open('src/%d' % n, 'w')",
     "violation census.too_many_files"),
    ({"max_files": 2}, "for n in range(1): open('src/%d' % n, 'w')\n" + write(90),
     "keep metric.better"),
    ({"max_change": "1k"}, "open('src/big', 'w').write('x' * 1025)", "violation census.oversize"),
    ({"max_change": "1k"}, "open('src/big', 'w').write('x' * 1000)\n" + write(90),
     "keep metric.better"),
    ({"seal": "src/frozen"}, write(1, "src/frozen/new.txt"), "violation seal.created"),
    ({"seal": "src/frozen/**"}, write(90), "keep metric.better"),
    ({"seal": "src/value.txt"}, write(1), "violation seal.modified"),
])
def test_limits_of_a_change(project: Project, changes: Dict[str, Any], source: str, verdict: str
                            ) -> None:
    project.write("src/frozen/old.txt", "x")
    project.commit()
    project.turns(source)
    project.config["loop"].update(changes)
    result = play(project)
    assert project.verdicts() == [verdict], result


def test_a_shared_folder_is_there_for_both_and_sealed(project: Project) -> None:
    project.write("node_modules/lib.txt", "shared")
    project.write(".gitignore", "node_modules/\n__pycache__/\n")
    project.write("metric.py", """
        assert open("node_modules/lib.txt").read() == "shared"
        print("METRIC value=" + open("src/value.txt").read().strip())
    """)
    project.commit()
    project.turns("assert open('node_modules/lib.txt').read() == 'shared';" + write(90),
                  "import os; os.chmod('node_modules', 0o755)\n"
                  "os.chmod('node_modules/lib.txt', 0o644)\n"
                  + write(1, "node_modules/lib.txt"), write(1, "node_modules/new.txt"), write(80))
    project.config["loop"]["share"] = "node_modules"
    play(project)
    assert project.verdicts()[0] == "keep metric.better"
    assert project.verdicts()[1] == "violation seal.modified"
    assert project.verdicts()[3] == "keep metric.better"
    assert (project.root / "node_modules" / "lib.txt").read_text() == "shared"
    assert os.listdir(project.root / "node_modules") == ["lib.txt"]
    whole(project)


# ══ keys of [metric] ═════════════════════════════════════════════════════════════════════════════

def values(project: Project) -> List[Optional[float]]:
    """Return the candidates' numbers."""
    return [row["value"] for row in project.iterations()]


def test_produce_and_outputs(project: Project) -> None:
    change(project, {"metric": {
        "produce": "python3 -c 'import os, shutil; os.makedirs(\"out\"); "
                   "shutil.copy(\"src/value.txt\", \"out/v.txt\"); open(\"other\", \"w\")'",
        "outputs": "out/*.txt",
        "command": "python3 -c 'import os; assert not os.path.exists(\"other\"); "
                   "print(\"METRIC value=\" + open(\"out/v.txt\").read())'"}})
    project.turns(write(90), "import os; os.unlink('src/value.txt')")
    play(project)
    assert project.verdicts() == ["keep metric.better", "crash metric.exit"]
    assert values(project) == [90.0, None]


def test_produce_that_leaves_no_output(project: Project) -> None:
    change(project, {"metric": {
        "produce": "sh -c 'mkdir out; test $(cat src/value.txt) = 1 || cp src/value.txt out/v.txt'",
        "outputs": "out/*.txt", "command": "sh -c 'echo METRIC value=$(cat out/v.txt)'"}})
    project.turns(write(1), write(90))
    play(project)
    assert project.verdicts() == ["crash metric.no_output", "keep metric.better"]


TWO_NUMBERS = """
    value = float(open("src/value.txt").read())
    print("METRIC speed=%s" % (1000 / value))
    print("METRIC bytes = %s" % value)
"""


def test_the_name_chooses_among_several_lines(project: Project) -> None:
    project.write("metric.py", TWO_NUMBERS)
    project.commit()
    project.turns(write(80))
    project.config["metric"]["name"] = "bytes"
    result = play(project)
    assert project.verdicts() == ["keep metric.better"] and values(project) == [80.0], result
    assert subjects(project) == ["#1 bytes 100 -> 80 (-20.0 %)"]


def test_the_other_lines_are_secondary_numbers_of_the_candidate(project: Project) -> None:
    project.write("metric.py", TWO_NUMBERS)
    project.commit()
    project.turns(write(80))
    project.config["metric"]["name"] = "bytes"
    play(project)
    assert project.iterations()[0]["others"] == {"speed": 12.5}


def test_a_pattern_instead_of_metric_lines(project: Project) -> None:
    project.write("metric.py", """
        print("METRIC value=1")
        print("total size: %s bytes" % open("src/value.txt").read().strip())
    """)
    project.commit()
    project.turns(write(80), write("80 bytes\\ntotal size: 1"), write("many"))
    project.config["metric"]["pattern"] = "^total size: (.*?)(?: bytes)?$"
    play(project)
    assert project.verdicts() == ["keep metric.better", "violation metric.ambiguous",
                                  "crash metric.malformed"]
    assert values(project) == [80.0, None, None]


@pytest.mark.parametrize("changes, value, verdict", [
    ({"bounds": "50 *"}, 49, "violation metric.out_of_bounds"),
    ({"min_gain": "5"}, 95, "discard metric.not_better"),
    ({"min_gain": "5"}, 94.9, "keep metric.better"),
    ({"min_gain": "10%"}, 90, "discard metric.not_better"),
    ({"max_gain": "50", "bounds": "40 *"}, 40, "discard noise.implausible"),
    ({"max_gain": "50%", "min_gain": "10 %", "bounds": "60 *"}, 60, "keep metric.better"),
    ({"direction": "maximize"}, 90, "discard metric.not_better"),
    ({"direction": "maximize"}, 101, "keep metric.better"),
    ({"direction": "maximize", "min_gain": "2"}, 101, "discard metric.not_better"),
])
def test_what_is_enough_for_a_keep(project: Project, changes: Dict[str, Any], value: float,
                                   verdict: str) -> None:
    project.turns(write(value))
    project.config["metric"].update(changes)
    result = play(project)
    assert project.verdicts() == [verdict], result


def test_the_metrics_home(project: Project) -> None:
    book = project.tmp / "book"
    look = f"""
        import os
        {see(book, "(os.environ['HOME'], os.listdir(os.environ['HOME']))")}
        print("METRIC value=" + open("src/value.txt").read().strip())
    """
    (project.tmp / "home" / "toolchain").mkdir()
    project.write("metric.py", look)
    project.commit()
    project.turns("pass")
    play(project)
    assert set(map(str, seen(book))) == {str((os.environ["HOME"], ["toolchain"]))}
    book.unlink()
    change(project, {"metric": {"home": "private"}, "loop": {"name": "u"}})
    play(project)
    assert all(home != os.environ["HOME"] and not entries for home, entries in seen(book))
    assert len({home for home, _ in seen(book)}) == 3, "a fresh one for every run"


def test_a_cache_survives_and_nothing_else_does(project: Project) -> None:
    book = project.tmp / "book"
    project.write("metric.py", f"""
        import os
        os.makedirs("target", exist_ok=True); os.makedirs("build", exist_ok=True)
        {see(book, "(sorted(os.listdir('target')), os.listdir('build'))")}
        open("target/%d" % len(os.listdir("target")), "w"); open("build/x", "w")
        print("METRIC value=" + open("src/value.txt").read().strip())
    """)
    project.commit()
    project.turns(write(110))
    project.config["metric"]["cache"] = "target"
    result = play(project)
    assert seen(book) == [([str(n) for n in range(count)], []) for count in range(4)], result
    assert any("cache" in line and line.startswith("notice") for line in result.out.splitlines())


def test_a_metric_that_asks_git(project: Project) -> None:
    book = project.tmp / "book"
    project.write("metric.py", f"""
        import subprocess
        {see(book, "subprocess.getoutput('git status --porcelain; git rev-list --all --count')")}
        print("METRIC value=" + open("src/value.txt").read().strip())
    """)
    project.commit("a second commit")
    project.turns(write(90))
    project.config["metric"]["git"] = "yes"
    play(project)
    assert project.verdicts() == ["keep metric.better"] and set(seen(book)) == {"1"}
    book.unlink()
    change(project, {"metric": {"git": "no"}, "loop": {"name": "u"}})
    play(project)
    assert all("not a git repository" in text for text in seen(book))


def test_setup_runs_once_on_the_base(project: Project) -> None:
    book = project.tmp / "book"
    project.write("setup.py", f"""
        import os
        {see(book, "open('src/value.txt').read()")}
        os.makedirs("build"); open("build/factor", "w").write("2")
    """)
    project.write("metric.py", """
        print("METRIC value=%s" % (float(open("src/value.txt").read())
                                   * int(open("build/factor").read())))
    """)
    project.commit()
    project.turns(write(90), write(80))
    project.config["metric"]["setup"] = "python3 setup.py"
    play(project)
    assert values(project) == [180.0, 160.0] and seen(book) == ["100\n"]
    assert not (project.root / "build").exists()


def test_a_runner_goes_before_every_command(project: Project) -> None:
    book = project.tmp / "book"
    (project.tmp / "runner.py").write_text(
        "import os, sys\n" + see(book, "sys.argv[1:4]")
        + "os.environ['RAN'] = 'yes'\nos.execvp(sys.argv[4], sys.argv[4:])\n")
    project.write("metric.py", """
        import os
        print("METRIC value=" + open("src/value.txt").read().strip() if os.environ["RAN"] else "")
    """)
    project.commit()
    project.turns(write(90))
    change(project, {"metric": {"runner": f"python3 {project.tmp}/runner.py {{cleanroom}} {{cwd}} "
                                          "{tmp}"},
                     "guard.ran": {"command": "sh -c 'test $RAN = yes'"}})
    assert play(project).code == 0
    assert project.verdicts() == ["keep metric.better"]
    assert all(room == cwd.rstrip("/") and tmp != room and str(project.root) not in room
               for room, cwd, tmp in seen(book))


def test_the_holdout_is_measured_and_its_files_hidden(project: Project) -> None:
    book = project.tmp / "book"
    project.write("hidden/labels.txt", "7")
    project.write("metric.py", f"""
        import os
        {see(book, "os.path.exists('hidden/labels.txt')")}
        print("METRIC value=" + open("src/value.txt").read().strip())
    """)
    project.write("hold.py", """
        factor = int(open("hidden/labels.txt").read())
        print("METRIC held=%d" % (float(open("src/value.txt").read()) * factor))
    """)
    project.commit()
    look = "import os, sys\n" + see(book, "os.path.exists('hidden/labels.txt')") \
        + see(book, "b'700' in sys.stdin.buffer.read()")
    project.turns(look + write(90), look + write(95),
                  look + "os.mkdir('hidden');" + write(1, "hidden/labels.txt"))
    project.config["holdout"] = {"command": "python3 hold.py", "files": "hidden/**"}
    result = play(project)
    assert project.verdicts() == ["keep metric.better", "discard metric.not_better",
                                  "violation seal.created"], result
    assert set(seen(book)) == {False}
    assert project.ledger()[1]["holdout"] == 700.0
    assert [row["holdout"] for row in project.iterations()] == [630.0, None, None]
    assert "700 -> 630" in result.out
    assert "hidden/labels.txt" in project.git("ls-tree", "-r", "--name-only", "scalarloop/t")
    whole(project)


# ══ keys of [agent]; environments ════════════════════════════════════════════════════════════════

SECRETS = {"ANTHROPIC_API_KEY": "sk-1", "OPENAI_API_KEY": "sk-2", "OPENAI_BASE_URL": "u",
           "MY_TOKEN": "sk-3", "MY_METRIC": "m", "AWS_SECRET_ACCESS_KEY": "sk-4"}
NEVER = {"PYTHONPATH": "/tmp/x", "LD_LIBRARY_PATH_X": "x", "BASH_ENV": "/tmp/x", "ENV": "/tmp/x",
         "NODE_OPTIONS": "--no-warnings", "GIT_DIR": "/tmp/x", "GIT_CONFIG_COUNT": "0",
         "PYTHONSTARTUP": "/tmp/x", "PERL5LIB": "/tmp/x", "RUBYOPT": "-w",
         "SSH_AUTH_SOCK": "/tmp/x"}
OFTEN = {"https_proxy": "http://proxy:1", "NO_PROXY": "x", "SSL_CERT_FILE": "/tmp/ca",
         "LANG": "C.UTF-8", "LC_TIME": "C", "USER": "user", "TZ": "UTC"}


def test_who_sees_which_variable(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    book, key = project.tmp / "book", project.tmp / "key"
    key.write_text("0123456789abcdef" * 2)
    project.write("metric.py", f"""
        import os
        {see(book, "dict(os.environ)")}
        print("METRIC value=" + open("src/value.txt").read().strip())
    """)
    project.commit()
    for name, value in {**SECRETS, **NEVER, **OFTEN, "SCALARLOOP_LEDGER_KEY": str(key)}.items():
        monkeypatch.setenv(name, value)
    look = "import os\n" + see(project.tmp / "agents", "dict(os.environ)")
    project.turns(look + write(90))
    project.config["metric"]["command"] = f"{sys.executable} metric.py"
    change(project, {"agent": {"env": "MY_TOKEN"}, "metric": {"env": "MY_METRIC"},
                     "adapter": {"max-turns": "7"}, "loop": {"seed": 5}})
    play(project)
    assert project.verdicts() == ["keep metric.better"]
    agent, metric = seen(project.tmp / "agents")[0], seen(book)[-1]
    assert {name for name in {**SECRETS, **NEVER} if name in agent} == {
        "ANTHROPIC_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", "MY_TOKEN"}
    assert {name for name in {**SECRETS, **NEVER} if name in metric} == {"MY_METRIC"}
    assert not any("LEDGER_KEY" in name or str(key) in value
                   for env in (agent, metric) for name, value in env.items())
    assert all(agent[name] == value for name, value in OFTEN.items())
    assert {name for name in OFTEN if name in metric} == {"LANG", "LC_TIME", "USER", "TZ"}
    assert agent["SCALARLOOP_OPT_MAX_TURNS"] == "7" and agent["SCALARLOOP_ITERATION"] == "1"
    assert metric["PYTHONDONTWRITEBYTECODE"] == "1" and metric["PYTHONNOUSERSITE"] == "1"
    assert metric["TMPDIR"] != agent["TMPDIR"] and str(project.root) not in metric["TMPDIR"]
    ours = {name for name in metric if name.startswith("SCALARLOOP")}
    assert ours == {"SCALARLOOP_SEED"}
    text = (project.state / "ledger.jsonl").read_text()
    assert not any(value in text for value in SECRETS.values() if value.startswith("sk-"))


@pytest.mark.parametrize("source, timeout, verdict", [
    (write(90) + "; import time; time.sleep(60)", "1s", "keep metric.better"),
    (write(90) + "; raise SystemExit(9)", "30s", "keep metric.better"),
    (write(90) + "; import os; os.kill(os.getpid(), 9)", "30s", "keep metric.better"),
    ("import time; time.sleep(60)", "1s", "agent_failed agent.timed_out"),
    ("import os; os.kill(os.getpid(), 11)", "30s", "agent_failed agent.failed"),
    (write(90) + "; print('SCALAR_LOOP_GIVE_UP')", "30s", "give_up agent.gave_up"),
    (write(90) + "; print('no SCALAR_LOOP_GIVE_UP')", "30s", "keep metric.better"),
])
def test_an_agent_is_judged_by_its_tree(project: Project, source: str, timeout: str, verdict: str
                                        ) -> None:
    project.turns(source)
    project.config["agent"]["timeout"] = timeout
    play(project)
    assert project.verdicts() == [verdict]
    assert project.leftovers() == []


def test_an_agent_whose_interpreter_is_gone_has_failed(project: Project) -> None:
    path = project.tmp / "agent.sh"
    path.write_text("#!/no/such/shell\n")
    path.chmod(0o755)
    project.config["agent"]["command"] = str(path)
    project.config["loop"].update(failures=2, iterations=5)
    result = play(project)
    assert result.code == 1 and project.verdicts() == ["agent_failed agent.failed"] * 2, result


@pytest.mark.parametrize("source, judge", [
    ("os.unlink(path)", "metric"), ("os.chmod(path, 0o644)", "guard"),
    ("open(path, 'w').write('#!/no/such/shell')", "metric"),
    ("os.unlink(path); os.makedirs(path); open(path + '/x', 'w')", "guard")])
def test_a_candidate_that_takes_its_own_program_away_crashes(project: Project, source: str,
                                                             judge: str) -> None:
    project.write("src/run.sh", "#!/bin/sh\necho METRIC value=$(cat src/value.txt)\n", 0o755)
    project.commit()
    project.turns("import os; path = 'src/run.sh'; " + write(80) + "; " + source, write(90))
    section = "metric" if judge == "metric" else "guard.run"
    change(project, {section: {"command": "./src/run.sh"}})
    result = play(project)
    assert result.code == 0, result
    assert short(project) == ["crash" if judge == "metric" else "guard_failed", "keep"]
    whole(project)


def test_the_agent_and_the_metric_run_where_they_should(project: Project) -> None:
    book = project.tmp / "book"
    project.write("sub/metric.py", f"""
        import os
        {see(book, "os.getcwd()")}
        print("METRIC value=" + open("code/value.txt").read().strip())
    """)
    project.write("sub/code/value.txt", "100")
    project.commit()
    project.turns("import os\n" + see(project.tmp / "agents", "(os.getcwd(), sorted(os.listdir()))")
                  + write(90, "code/value.txt"))
    project.config["loop"]["scope"] = "code/**"
    project.save_config("sub/loop.ini")
    done = project.run("sub/loop.ini", config=False)
    assert done.code == 0, done
    (cwd, entries), = seen(project.tmp / "agents")
    assert entries == ["code", "metric.py"] and cwd.endswith("/sub")
    for place in (cwd, *seen(book)):
        assert not place.startswith(str(project.root)) and place.endswith("/sub")
    assert project.git("show", "scalarloop/t:sub/code/value.txt") == "90"


def test_the_words_of_a_maximized_metric_are_in_the_user_s_direction(project: Project) -> None:
    project.turns(write(90), write(110))
    project.config["metric"]["direction"] = "maximize"
    result = play(project)
    assert "one run 90, reference 100, needed above 100" in result.out, result
    assert project.iterations()[0]["evidence"] == "one run 90, reference 100, needed above 100"
    assert short(project) == ["discard", "keep"]


def test_a_folder_that_became_empty_is_no_fault_of_the_machine(project: Project) -> None:
    project.write("src/sub/only.txt", "x")
    project.commit("a folder with one file")
    project.turns("""
        import os
        os.unlink("src/sub/only.txt")
        """ + write(90), write(80), """
        import os
        os.makedirs("src/sub")
        open("src/sub/new.txt", "w").close()
        """ + write(70))
    assert play(project).code == 0 and short(project) == ["keep", "keep", "keep"]
    whole(project)


def test_status_shows_the_night_and_whether_a_loop_is_at_work(project: Project) -> None:
    project.turns(write(90), write(95), f"""
        import subprocess
        shown = subprocess.run({[project.python, str(TOOL), "status", "loop.ini"]!r}, cwd={str(project.root)!r},
                               stdout=subprocess.PIPE).stdout
        open({str(project.tmp / "shown")!r}, "wb").write(shown)
        """ + write(80))
    project.config["isolation"] = {"level": "portable"}
    assert play(project).code == 0
    shown = (project.tmp / "shown").read_text()
    assert "#1   keep" in shown and "#2   discard" in shown and "a loop is at work (running)" in shown
    after = project.call("status")
    assert after.code == 0 and "#3   keep" in after.out and "stopped" in after.out, after
