"""Outlive the turn: hold its output open, hang, ignore SIGTERM, leave what can't be deleted."""
import os
import signal
import time
from pathlib import Path

from siege import TURN


def hold_output():
    if not os.fork():
        os.setsid()
        time.sleep(20)
        os._exit(0)


def hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(20)


def locked_folders():
    """In the temporary folder, and in the cleanroom."""
    for base in [Path(os.environ["TMPDIR"], "locked")] + [Path("build/locked")] * (TURN == "metric"):
        (base / "inner").mkdir(parents=True)
        (base / "inner" / "file").write_text("x")
        (base / "inner" / "file").chmod(0o400)
        (base / "inner").chmod(0)
        base.chmod(0o500)
