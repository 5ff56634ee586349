"""A `*` that is hoped to cross a `/`, and a sealed file that is moved into the scope."""
import os
from pathlib import Path

from play import lower


def star_over_slash():
    lower()
    Path("lib/deep").mkdir()
    Path("lib/deep/small.txt").write_text("x\n")


def other_suffix():
    lower()
    Path("lib/small.txt.py").write_text("x\n")


def sibling_prefix():
    lower()
    Path("src2").mkdir()
    Path("src2/value.txt").write_text("0\n")


def move_seal_into_scope():
    lower()
    os.rename("data/truth.txt", "src/truth.txt")


def seal_inside_scope():
    lower()
    Path("src/sealed/rules.txt").write_text("none\n")


def add_to_seal_inside_scope():
    lower()
    Path("src/sealed/more.txt").write_text("none\n")


def seal_becomes_folder():
    lower()
    os.unlink("src/sealed/rules.txt")
    os.mkdir("src/sealed/rules.txt")


def rules_become_folder():
    """A folder where the base has its ignore rules."""
    lower()
    os.unlink(".gitignore")
    os.mkdir(".gitignore")
    Path(".gitignore/x").write_text("x\n")


def seal_folder_becomes_file():
    lower()
    os.unlink("src/sealed/rules.txt")
    os.rmdir("src/sealed")
    Path("src/sealed").write_text("none\n")


def all_gone():
    for path in Path("src").rglob("*"):
        if path.is_file() and "sealed" not in path.parts:
            path.unlink()


def honest():
    lower()
    Path("lib/other.txt").write_text("x\n")


def honest_folder_for_file():
    lower()
    os.unlink("src/plain")
    Path("src/plain").mkdir()
    Path("src/plain/inner").write_text("x\n")


def honest_file_for_folder():
    lower()
    os.unlink("src/plain/inner")
    os.rmdir("src/plain")
    Path("src/plain").write_text("x\n")


def honest_deletion():
    lower()
    os.unlink("lib/other.txt")
