"""Use up processes, memory, disk and log; all of it bounded here."""
import os
import signal
import sys
import time
from pathlib import Path

MEGABYTE = b"x" * (1 << 20)


def fork_bomb():
    """84 processes in sessions of their own that ignore SIGTERM, gone by themselves after 10 s."""
    end = time.monotonic() + 10

    def bomb(depth):
        for _ in range(4 if depth else 0):
            if not os.fork():
                os.setsid()
                bomb(depth - 1)
                os._exit(0)
        while time.monotonic() < end:
            time.sleep(.1)

    if not os.fork():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        bomb(3)
        os._exit(0)
    time.sleep(.2)


def memory():
    held = bytearray(100 << 20)
    held[::4096] = b"x" * (len(held) // 4096)


def too_much_memory():
    """For a group of processes that may have a third of it: the kernel must kill somebody."""
    print("asking", flush=True)
    held = [bytearray(MEGABYTE) for _ in range(600)]
    print("got it", len(held))


def disk():
    """Left in the temporary folder."""
    with open(Path(os.environ["TMPDIR"], "flood"), "wb") as stream:
        for _ in range(30):
            stream.write(MEGABYTE)


def log():
    for _ in range(int(os.environ.get("SCALARLOOP_TEST_FLOOD", "300"))):
        os.write(1, MEGABYTE)
    os.write(1, b"\n")


def log_lines():
    line = b"metric value=1\n" * 1000
    for _ in range(1000):
        sys.stdout.buffer.write(line)
    sys.stdout.flush()
