"""Shadow a module of the standard library, or of the scorer, beside the metric."""
from pathlib import Path

from play import lower


def stdlib():
    lower()
    Path("pathlib.py").write_text("class Path:\n    __init__ = print\n"
                                  "    read_text = lambda self: '0'\n")


def package():
    lower()
    Path("scorer").mkdir()
    Path("scorer/__init__.py").write_text("weight = 0\n")


def honest():
    lower()
    Path("src/pathlib.py").write_text("# shadows nothing that the metric imports\n")
