"""Scratch at the loop's own folders: the workspace's root, its neighbours, locked folders."""
import os
import shutil
from pathlib import Path

from play import lower


def delete_root():
    root = os.getcwd()
    os.chdir("/")
    shutil.rmtree(root)


def link_root():
    """The root becomes a link to a folder whose modes and content must stay as they are."""
    lower()
    root = os.getcwd()
    os.rename(root, os.environ["TMPDIR"] + "/aside")
    os.symlink(os.environ["HOME"] + "/precious", root)


def file_root():
    root = os.getcwd()
    os.rename(root, os.environ["TMPDIR"] + "/aside")
    Path(root).write_text("x")


def lock(base):
    """Make folders that an ordinary user can't simply delete."""
    lower()
    Path(base, "inner").mkdir(parents=True)
    Path(base, "inner", "file").write_text("x")
    os.chmod(Path(base, "inner"), 0)
    os.chmod(base, 0o500)


def locked_folders():
    lock(os.environ["TMPDIR"] + "/locked")


def locked_in_scope():
    lock("src/locked")


def locked_root():
    lower()
    os.chmod(".", 0)


def deep_scratch():
    lower()
    os.chdir(os.environ["TMPDIR"])
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")


def link_scratch():
    """Cleaning up must not follow a link, nor change the modes behind it."""
    lower()
    scratch = Path(os.environ["TMPDIR"])
    scratch.joinpath("x").mkdir()
    os.symlink(os.environ["HOME"] + "/precious", scratch / "x" / "link")
    scratch.joinpath("x").chmod(0o500)


def delete_scratch():
    lower()
    shutil.rmtree(os.environ["TMPDIR"])


def replace_scratch():
    lower()
    shutil.rmtree(os.environ["TMPDIR"])
    os.symlink(os.environ["HOME"] + "/precious", os.environ["TMPDIR"])


def times():
    """Forged time stamps, far in the past and in the future."""
    for path, when in (("metric.py", -10**9), ("data/truth.txt", 2**33), ("src/value.txt", -1)):
        if path == "src/value.txt":
            lower()
        os.utime(path, (when, when))


def same_stamp():
    """An edit of the same size with the old time stamp put back is still an edit."""
    status = os.stat("data/truth.txt")
    with open("data/truth.txt", "r+") as stream:
        stream.write("S")
    os.utime("data/truth.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    lower()


def mapped_write():
    """A write through a shared mapping that was read first."""
    import mmap
    lower()
    with open("data/truth.txt", "r+b") as stream, mmap.mmap(stream.fileno(), 0) as view:
        view[:1] = bytes([view[0] ^ 32])


def swap_inodes():
    lower()
    os.rename("data/truth.txt", "data/other.txt.new")
    os.rename("data/other.txt", "data/truth.txt")
    os.rename("data/other.txt.new", "data/other.txt")


def honest():
    lower()
    Path(os.environ["TMPDIR"], "mine").write_text("x")
