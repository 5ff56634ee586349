"""Symlinks to or from the seal, a folder swapped for a symlink, a hard link to a sealed inode."""
import os

from play import lower


def link_into_seal():
    lower()
    os.symlink("../data/truth.txt", "src/truth.txt")


def link_out():
    lower()
    os.symlink("/etc/passwd", "src/passwd")


def value_becomes_link():
    os.unlink("src/value.txt")
    os.symlink("../lib/small.txt", "src/value.txt")


def seal_becomes_link():
    lower()
    os.rename("data", "src/data")
    os.symlink("src/data", "data")


def folder_becomes_link():
    lower()
    os.rename("src/sub", "src/aside")
    os.symlink("aside", "src/sub")


def retarget():
    lower()
    os.unlink("current")
    os.symlink("src", "current")


def hard_link_to_seal():
    lower()
    os.link("data/truth.txt", "src/truth.txt")


def hard_link_over_seal():
    lower()
    os.unlink("data/truth.txt")
    os.link("src/value.txt", "data/truth.txt")


def hard_link_inside():
    lower()
    os.link("src/value.txt", "src/twin.txt")


def honest():
    """A tracked link that stays as it is, touched along the way, and copies instead of links."""
    lower()
    os.utime("current", follow_symlinks=False)
    with open("src/copy.txt", "w") as stream:
        stream.write(open("data/truth.txt").read())
