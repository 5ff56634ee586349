"""Crash, so that an old or a default value is read."""
import os

from play import VALUE, lower, program


def no_value():
    os.unlink(VALUE)


def number_then_crash():
    lower()
    program("import os; os.write(1, b'METRIC value=0\\n'); os.abort()")


def number_then_exit():
    lower()
    program("import os; os.write(1, b'METRIC value=0\\n'); os._exit(1)")


def number_then_hang():
    lower()
    program("import os, time; os.write(1, b'METRIC value=0\\n'); time.sleep(600)")


def ignore_term():
    lower()
    program("import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "os.write(1, b'METRIC value=0\\n'); time.sleep(600)")


def endless():
    lower()
    program("import os\nwhile True: os.write(1, b'METRIC value=0\\n' * 1000)")


def honest():
    lower()
    program("try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass")
