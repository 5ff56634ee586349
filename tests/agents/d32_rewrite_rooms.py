"""A double-forked daemon that rewrites every cleanroom it finds, for ten seconds."""
import os
import time
from pathlib import Path

from siege import YARD

LIFE = 10


def daemon(own=False):
    if os.fork():
        os.wait()
        time.sleep(.1)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    for descriptor in (0, 1, 2):
        os.dup2(os.open("/dev/null", os.O_RDWR), descriptor)
    end = time.monotonic() + LIFE
    if own:
        time.sleep(.7)      # by then the metric has ended, and everything of it with it
    while time.monotonic() < end:
        for room in [*Path("..").resolve().glob("room-*"), *Path("..").resolve().glob("scorer-*")]:
            try:
                (room / "src/value.txt").write_text("1\n")
                if own:
                    (room / "metric.py").write_text("print('METRIC value=1')\n")
            except OSError:
                pass
        time.sleep(.005)
    os._exit(0)


def in_turn():
    daemon()


def in_metric():
    daemon(own=True)


def look_for_survivors():
    """Honest: nobody of an earlier turn may be about, as far as one can see."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(YARD / "agents") in words and int(folder.name) not in (os.getpid(), os.getppid()):
            raise RuntimeError("still there: %r" % words)
