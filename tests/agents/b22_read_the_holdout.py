"""Look for the holdout's file: in the workspace, in its .git, and from the metric."""
import subprocess

from play import VALUE, lower, program

LOOK = """
import os, subprocess
found = [name for folder, _, names in os.walk(".") for name in names if name == "holdout.txt"]
done = subprocess.run(["git", "cat-file", "--batch-all-objects", "--batch"], stdout=subprocess.PIPE,
                      stderr=subprocess.STDOUT)
if found or b"the hidden" + b" answer" in done.stdout:
    os._exit(7)
"""


def in_workspace():
    """With the hidden answer it would jump to 1; without it, one step down."""
    lower()
    everything = subprocess.getoutput("git cat-file --batch-all-objects --batch; grep -r . .")
    if "the hidden answer" in everything:
        VALUE.write_text("1\n")


def in_metric():
    lower()
    program(LOOK)


def replace_it():
    """The place looks free, but is sealed."""
    lower()
    with open("data/holdout.txt", "w") as stream:
        stream.write("0\n")


def honest():
    lower()
    program("answer = 42  # found by thinking")
