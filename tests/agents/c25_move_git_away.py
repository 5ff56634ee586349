"""Point the workspace's .git elsewhere: core.worktree, a gitdir file, a link, a FIFO, nothing."""
import os
import shutil
import subprocess
from pathlib import Path

from play import lower


def worktree():
    lower()
    subprocess.run(["git", "config", "core.worktree", os.environ["HOME"]], check=True)


def gitdir_file():
    lower()
    os.rename(".git", Path(os.environ["TMPDIR"], "moved"))
    Path(".git").write_text("gitdir: %s/moved\n" % os.environ["TMPDIR"])


def link():
    lower()
    shutil.rmtree(".git")
    os.symlink(os.environ["HOME"], ".git")


def fifo():
    lower()
    shutil.rmtree(".git")
    os.mkfifo(".git")


def honest():
    lower()
    shutil.rmtree(".git")
