"""Result files that lie there before the run, or are rewritten after it was produced."""
from pathlib import Path

from play import linger, lower, program


def seeded():
    """The base ignores out/: what lies there is a dropping and never reaches a cleanroom."""
    lower()
    Path("out").mkdir()
    Path("out/answer.txt").write_text("0 perfect\n")
    program("raise SystemExit(0)")


def leave(act):
    """Let the candidate's code make out/answer.txt itself, and end before anything else does."""
    lower()
    program("import os; os.makedirs('out'); %s; os._exit(0)" % act)


def by_program():
    """Its own answer it may write; that is data, and scored as such."""
    leave("open('out/answer.txt', 'w').write('METRIC value=0')")


def link():
    leave("os.symlink('../data/truth.txt', 'out/answer.txt')")


def fifo():
    leave("os.mkfifo('out/answer.txt')")


def hard_link():
    leave("os.link('data/truth.txt', 'out/answer.txt')")


def module_beside_scorer():
    lower()
    program("""
for name in ('csv', 'json', 'sitecustomize'):
    open(name + '.py', 'w').write("print('METRIC value=0'); raise SystemExit(0)")
""")


def edit_scorer():
    lower()
    program("open('score.py', 'w').write('print(\\'METRIC value=0\\')')")


def daemon():
    """It waits for the scorer's cleanroom and writes a better answer there."""
    lower()
    linger("[open(path, 'w').write('0') for path in glob.glob('../scorer-*/src/value.txt')]")


def honest():
    lower()
    program("answer = 6 * 7")
