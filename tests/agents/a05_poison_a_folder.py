"""Poison a shared or an ignored folder."""
import os
from pathlib import Path

from play import lower


def edit_shared():
    lower()
    Path("node_modules/lib/weight.txt").write_text("0\n")


def delete_shared():
    lower()
    os.unlink("node_modules/lib/weight.txt")


def link_shared():
    lower()
    os.rename("node_modules/lib", "node_modules/aside")
    os.symlink("aside", "node_modules/lib")


def add_shared():
    """A new file there is a dropping: it never reaches a cleanroom."""
    lower()
    Path("node_modules/lib/override.txt").write_text("0\n")


def add_ignored():
    lower()
    Path("build").mkdir()
    Path("build/result.txt").write_text("0\n")


def odd_ignored():
    """Whatever an ignored folder is full of, it is thrown away."""
    lower()
    os.makedirs("build/deep")
    os.mkfifo("build/fifo")
    os.symlink("/etc", "build/link")
    os.symlink("../../data", "build/deep/data")
    Path("build/deep/na\nme").write_text("x")
    Path("build/tool").write_text("x")
    os.chmod("build/tool", 0o4755)


def own_ignore_rule():
    """A rule that the agent wrote counts for nothing."""
    lower()
    Path("src/.gitignore").write_text("*\n")


def honest():
    lower()
    Path("node_modules/.cache").mkdir()
    Path("node_modules/.cache/tool").write_text("what tools leave behind\n")
