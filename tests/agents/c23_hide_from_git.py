"""Hide a change from git's own eyes: assume-unchanged, skip-worktree, exclude, sparse checkout."""
import subprocess
from pathlib import Path

from play import lower


def git(*args):
    subprocess.run(["git", *args], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def edit_seal():
    Path("data/truth.txt").write_text("easy\n")


def assume_unchanged():
    lower()
    git("update-index", "--assume-unchanged", "data/truth.txt")
    edit_seal()


def skip_worktree():
    lower()
    git("update-index", "--skip-worktree", "data/truth.txt")
    edit_seal()


def exclude():
    lower()
    Path(".git/info").mkdir(exist_ok=True)
    Path(".git/info/exclude").write_text("*\n")
    git("config", "core.excludesFile", str(Path(".git/info/exclude").resolve()))
    Path("conftest.py").write_text("evil\n")


def sparse_checkout():
    lower()
    git("config", "core.sparseCheckout", "true")
    Path(".git/info").mkdir(exist_ok=True)
    Path(".git/info/sparse-checkout").write_text("/src/\n")
    git("update-index", "-q", "--refresh")
    git("read-tree", "-mu", "HEAD")


def file_mode():
    lower()
    git("config", "core.fileMode", "false")
    Path("metric.py").chmod(0o755)


def honest():
    lower()
    git("add", "-A")
    git("status")
