"""Read what only the loop may read: its record, the ledger's key, the holdout's answers."""
import subprocess

from siege import HOME, PROJECT, STATE, YARD, refuse


def state_folder():
    (STATE / "ledger.jsonl").read_bytes()


def key():
    (YARD / "key").read_bytes()


def holdout_at_home():
    (HOME / "labels.txt").read_bytes()


def holdout_in_project():
    (PROJECT / "data/labels.txt").read_bytes()


def holdout_in_git():
    """The same bytes, from the history of the user's repository."""
    show = ["git", "-c", "safe.directory=*", "--git-dir", str(PROJECT / ".git"), "show", "main:data/labels.txt"]
    done = subprocess.run(show, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if b"the hidden answer" not in done.stdout:
        refuse(13, done.stderr.decode())


def own_folder_s_git():
    """Nor may it stand in the history that the workspace brings along."""
    done = subprocess.run(["git", "log", "-p", "--all"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if b"the hidden answer" not in done.stdout:
        refuse(13, done.stderr.decode())
