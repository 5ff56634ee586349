"""Play several acts a turn and say how each ended: for the levels of isolation.

The plan, a file in the user's folder, lists for each turn the agent's acts and the metric's; those of
the metric become the candidate's code, which the metric runs. An act that comes through returns; one
that is refused raises OSError, and its errno is the answer. Each turn makes a true gain as well.
"""
import errno
import importlib
import json
import os
import sys
from pathlib import Path

sys.dont_write_bytecode = True      # the folder of these files is to stay as it is

from play import lower  # noqa: E402

YARD = Path(os.environ["SCALARLOOP_TEST_YARD"])     # the user's folder: project, home, tool, run
PROJECT, HOME = YARD / "project", YARD / "home"
STATE = PROJECT / ".scalarloop" / "t"
TURN = "metric" if os.path.basename(sys.argv[0]) == "prog.py" else "agent"


def loop():
    """Return the loop's process id, as the user sees it; never somebody else's."""
    pid = int((YARD / "run" / "loop.pid").read_text())
    try:
        ours = str(YARD).encode() in Path("/proc/%d/cmdline" % pid).read_bytes()
    except OSError:
        ours = True         # out of sight: the kernel's answer to the act will tell
    if not ours:
        raise ProcessLookupError(errno.ESRCH, "a namespace gave that number to another process")
    return pid


def neighbour():
    """Return what another process of the user has on offer: its pid, sockets, ports, terminal."""
    return json.loads((YARD / "run" / "neighbour.json").read_text())


def rooms():
    """Return the cleanrooms that can be seen, without the one that we are in."""
    return [room for room in sorted(Path("..").resolve().glob("room-*")) if room != Path.cwd()]


def refuse(code, text=""):
    raise OSError(code, text or os.strerror(code))


def perform(acts):
    for act in acts:
        name, function = act.split(".")
        try:
            getattr(importlib.import_module(name), function)()
            answer = "ok"
        except OSError as error:
            answer = errno.errorcode.get(error.errno, str(error))
        except Exception as error:
            answer = "broken:%r" % error
        print("ACT", TURN, act, answer, flush=True)


PROGRAM = """import sys
sys.path.insert(0, %r)
import siege
siege.perform(%r)
"""


if __name__ == "__main__":
    sys.modules["siege"] = sys.modules["__main__"]
    plan = json.loads((YARD / "run" / "plan.json").read_text())
    turn = plan[int(os.environ["SCALARLOOP_ITERATION"]) - 1]
    lower()
    Path("src/prog.py").write_text(PROGRAM % (sys.path[0], turn["metric"]) if turn["metric"] else "pass\n")
    perform(turn["agent"])
