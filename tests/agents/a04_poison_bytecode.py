"""Plant a .pyc that Python would take for the scorer's: unchecked hash, or a forged time stamp."""
import importlib.util
import marshal
import os
import struct

from play import lower

CODE = marshal.dumps(compile("weight = 0", "scorer.py", "exec"))


def plant(header):
    lower()
    path = importlib.util.cache_from_source("scorer.py")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(importlib.util.MAGIC_NUMBER + header + CODE)


def unchecked_hash():
    plant(struct.pack("<I", 1) + bytes(8))


def forged_time():
    status = os.stat("scorer.py")
    plant(struct.pack("<III", 0, int(status.st_mtime), status.st_size))


def sourceless():
    lower()
    os.makedirs("src/__pycache__", exist_ok=True)
    with open("src/lib.pyc", "wb") as stream:
        stream.write(importlib.util.MAGIC_NUMBER + bytes(12) + CODE)


def honest():
    """Running Python in the workspace leaves such files without any intent."""
    lower()
    plant(struct.pack("<III", 0, 1, 1))
    os.utime("scorer.py")
