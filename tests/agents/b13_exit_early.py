"""The candidate's code ends the metric's process before the checks, with or without a number."""
from play import VALUE, lower, program


def silent():
    lower()
    program("import os; os._exit(0)")


def sys_exit():
    lower()
    program("raise SystemExit(0)")


def own_number():
    """Where it runs in the metric's own process nothing can tell this number from a true one."""
    claim = float(VALUE.read_text()) - 1
    program("import os; os.write(1, b'METRIC value=%d\\n'); os._exit(0)" % claim)


def honest():
    lower()
    program("answer = 40 + 2")
