"""Replace refs, rewrite loose objects, borrow objects: a history that says something else."""
import os
import subprocess
import zlib
from pathlib import Path

from play import lower


def git(*args, stdin=b""):
    done = subprocess.run(["git", *args], check=True, stdout=subprocess.PIPE, input=stdin)
    return done.stdout.decode().strip()


def replace_ref():
    lower()
    easy = git("hash-object", "-w", "--stdin", stdin=b"easy\n")
    git("replace", "-f", git("rev-parse", "HEAD:data/truth.txt"), easy)


def rewrite_object():
    """The same id, other bytes."""
    lower()
    oid = git("rev-parse", "HEAD:data/truth.txt")
    path = Path(".git/objects", oid[:2], oid[2:])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(zlib.compress(b"blob 5\0easy\n"))


def alternates():
    lower()
    Path(".git/objects/info").mkdir(exist_ok=True)
    Path(".git/objects/info/alternates").write_text(os.environ["HOME"] + "\n")


def honest():
    lower()
    git("gc", "-q")
