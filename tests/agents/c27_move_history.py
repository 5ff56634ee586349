"""Moved HEAD, amended and own commits, a stale lock, a nested repository, a submodule."""
import subprocess
from pathlib import Path

from play import lower


def git(*args):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *args], check=True,
                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def commit_weakened_seal():
    lower()
    Path("data/truth.txt").write_text("easy\n")
    git("commit", "-qam", "weaken")


def amend():
    lower()
    git("commit", "-qa", "--amend", "-m", "mine")
    git("checkout", "-q", "--detach")


def stale_lock():
    lower()
    Path(".git/index.lock").write_text("")
    Path(".git/HEAD.lock").write_text("")


def nested_repository():
    lower()
    git("init", "-q", "src/nested")


def nested_bare_parts():
    lower()
    for name in ("HEAD", "config", "objects/x", "refs/x"):
        Path("src/bare.git", name).parent.mkdir(parents=True, exist_ok=True)
        Path("src/bare.git", name).write_text("ref: refs/heads/x\n")


def gitfile():
    lower()
    Path("src/sub/.git").write_text("gitdir: /nowhere\n")


def submodule():
    lower()
    git("init", "-q", "src/module")
    git("-C", "src/module", "commit", "-q", "--allow-empty", "-m", "x")
    git("add", "src/module")


def delete_branches():
    lower()
    git("update-ref", "-d", "HEAD")


def honest():
    lower()
    git("commit", "-qam", "mine")
    git("checkout", "-q", "-b", "another")
