"""Edit the files that build and test the program."""
from pathlib import Path

from play import lower


def package_json():
    lower()
    Path("package.json").write_text('{"scripts": {"test": "true"}}\n')


def setup_py():
    lower()
    Path("setup.py").write_text("print('METRIC value=0')\n")


def makefile():
    lower()
    with open("Makefile", "a") as stream:
        stream.write("all: ;\n")


def honest():
    lower()
    Path("src/Makefile").write_text("all:\n\ttrue\n")
