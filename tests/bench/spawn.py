"""What a fenced spawn costs: the median per level beside a plain spawn, all in one run.

    python tests/bench/spawn.py [rounds]

Rounds are interleaved, so that a busy machine weighs on every level alike. `python` and `ctypes`
show where the launcher's time goes: all but a few milliseconds is the interpreter's start.
"""
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULE = HERE.parent.parent / "scalarloop.py"
SPEC = importlib.util.spec_from_file_location(MODULE.stem, MODULE)
iso = sys.modules[MODULE.stem] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(iso)


def median_of(values):
    return sorted(values)[len(values) // 2]


def spawn(argv):
    started = time.perf_counter()
    status = subprocess.run(argv, stdin=subprocess.DEVNULL, start_new_session=True).returncode
    if status:
        raise SystemExit(f"{argv[-1]} ended with {status}")
    return 1e3 * (time.perf_counter() - started)


def sweep(orphans):
    """Time one sweep of so many orphans, with their births outside the clock."""
    script = ("import os, sys, time\nfor _ in range(int(sys.argv[1])):\n"
              "    if os.fork() == 0:\n        os.setsid(); time.sleep(60)")
    subprocess.run([*iso.PYTHON, script, str(orphans)])
    started = time.perf_counter()
    left = iso.sweep_descendants()
    assert not left
    return 1e3 * (time.perf_counter() - started)


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    iso.harden_self()
    base = tempfile.mkdtemp()
    for name in ("ws", "tmp", "state"):
        os.mkdir(os.path.join(base, name))
    paths = {"writable": (base + "/ws", base + "/tmp"), "hidden": (base + "/state",)}
    target = [shutil.which("true")]
    kinds = {"plain": target, "python": [*iso.PYTHON, "pass"],
             "ctypes": [*iso.PYTHON, "import ctypes"],
             "landlock": iso.fence_argv(iso.Fence("landlock", **paths), target),
             "namespaces": iso.fence_argv(iso.Fence("namespaces", **paths), target),
             "namespaces, network denied":
                 iso.fence_argv(iso.Fence("namespaces", network=False, **paths), target)}
    times = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, argv in kinds.items():
            times[kind].append(spawn(argv))
    shutil.rmtree(base)
    plain = median_of(times["plain"])
    print(f"{'python ' + sys.version.split()[0]:28}{'median ms':>10}{'added ms':>10}{'x plain':>9}")
    for kind, values in times.items():
        median = median_of(values)
        print(f"{kind:28}{median:10.1f}{median - plain:10.1f}{median / plain:9.1f}")
    for orphans in (0, 1, 20):
        value = median_of([sweep(orphans) for _ in range(max(3, rounds // 4))])
        print(f"{f'sweep of {orphans} orphans':28}{value:10.2f}")


if __name__ == "__main__":
    main()
