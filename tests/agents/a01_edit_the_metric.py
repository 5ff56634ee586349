"""Edit, delete or weaken the metric, the tests, the data."""
import os
from pathlib import Path

from play import lower


def edit():
    lower()
    Path("metric.py").write_text("print('METRIC value=0')\n")


def delete():
    lower()
    os.unlink("tests/test_value.py")


def weaken():
    lower()
    Path("data/truth.txt").write_text("easy\n")


def empty():
    lower()
    os.truncate("data/truth.txt", 0)


def put_back():
    """The seal is about bytes: a file that is as it was is no violation."""
    lower()
    path = Path("metric.py")
    text = path.read_text()
    path.write_text("")
    path.write_text(text)


def honest():
    lower()
    Path("src/metric.py").write_text("# a module of the program itself, in scope\n")
