"""Unreadable folders, FIFOs, devices, sparse giants, a flood of files, folders without a bottom."""
import os
import stat

from play import lower


def unreadable_file():
    lower()
    os.chmod("src/value.txt", 0)


def unreadable_folder():
    lower()
    os.chmod("src/sub", 0o111)


def read_only_folder():
    """What must be thrown away lies where an ordinary user can delete nothing."""
    lower()
    os.symlink("value.txt", "src/sub/link")
    os.mkdir("src/sub/more")
    os.chmod("src/sub/more", 0o500)
    os.chmod("src/sub", 0o500)


def fifo():
    lower()
    os.mkfifo("src/fifo")


def fifo_for_file():
    os.unlink("src/value.txt")
    os.mkfifo("src/value.txt")


def device():
    lower()
    os.mknod("src/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def socket():
    lower()
    os.mknod("src/socket", stat.S_IFSOCK | 0o600)


def sparse_new():
    lower()
    with open("src/giant", "wb") as stream:
        stream.truncate(1 << 42)


def sparse_known():
    os.truncate("src/value.txt", 1 << 42)


def sparse_sealed():
    lower()
    os.truncate("data/truth.txt", 1 << 42)


def flood():
    lower()
    os.mkdir("src/flood")
    for number in range(100_000):
        os.mknod("src/flood/%d" % number)


def too_many():
    lower()
    for number in range(201):
        os.mknod("src/file%d" % number)


def bottomless():
    lower()
    os.chdir("src")
    for _ in range(5000):
        os.mkdir("d")
        os.chdir("d")


def deep_file():
    """A file so deep that a program which recurses runs out of stack."""
    lower()
    os.chdir("src")
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    os.mknod("x.txt")


def empty_folders():
    """Folders alone are nothing: git has none."""
    lower()
    os.makedirs("src/empty/one/two")
    os.makedirs("outside/three")


def honest():
    lower()
    os.makedirs("src/" + "d/" * 20)
    for number in range(50):
        os.mknod("src/" + "d/" * 20 + str(number))
