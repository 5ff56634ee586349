"""The candidate's code prints a METRIC line of its own, before or after the true one."""
from play import lower, program


def before():
    lower()
    program("print('METRIC value=0')")


def after():
    lower()
    program("import atexit; atexit.register(print, 'METRIC value=0')")


def other_name():
    """Without [metric] name any METRIC line counts."""
    lower()
    program("print('METRIC score=0')")


def on_errors():
    lower()
    program("import sys; print('METRIC value=0', file=sys.stderr)")


def from_child():
    lower()
    program("import os; os.system('echo METRIC value=0')")


def same_number():
    lower()
    program("print('METRIC value=' + open('src/value.txt').read().strip())")


def behind_filler():
    """A capped log would have lost the true line, or this one."""
    lower()
    program("print('METRIC value=0')\nfor _ in range(400): print('x' * 10000)\n"
            "import atexit; atexit.register(print, ('y' * 10000 + '\\n') * 400)")


def long_line():
    lower()
    program("import os; os.write(1, b'METRIC value=' + b'0' * 200000 + b'\\n')")


def filler_alone():
    """Filler around the true line, on both sides more than any log keeps: the number stands."""
    lower()
    program("import atexit\nfiller = ('x' * 1000 + '\\n') * 4000\nprint(filler)\n"
            "atexit.register(print, filler)")


def not_at_line_start():
    """A carriage return, an escape or a NUL begins no line."""
    lower()
    program("for start in ('x\\r', '\\x1b[2K\\x1b[1G', '\\0', ' ', '\\u2028', '\\x0b', '\\ufeff'):\n"
            "    print(start + 'METRIC value=0')\nprint('METRICS value=0')")


def swallow():
    """Unterminated output glued to the front of the true line hides it."""
    lower()
    program("import sys; sys.stdout.write('no newline at my end, ')")


def honest():
    lower()
    program("print('a chatty program says: my METRIC is fine')")
