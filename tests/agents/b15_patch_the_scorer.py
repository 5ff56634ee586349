"""The candidate's code patches what the metric will use: print, the reader, the clock, equality."""
from play import lower, program


def patched_reader():
    program("import pathlib; old = pathlib.Path.read_text\n"
            "pathlib.Path.read_text = lambda self: str(float(old(self)) - 2)")


def patched_clock():
    program("import time; now = time.monotonic\ntime.monotonic = lambda: now() - 39.9")


def always_equal():
    program("class Right(int):\n"
            "    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
            "answer = Right(0)")


def frames():
    program("import sys; frame = sys._getframe()\n"
            "while frame:\n    frame.f_globals.update(bonus=4); frame = frame.f_back")


def honest():
    lower()
    program("answer = 21 * 2")
