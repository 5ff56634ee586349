"""Result files that lie there before the run, or are rewritten after it was produced."""
from pathlib import Path

from play import lower, program


def seeded():
    """The base ignores out/: what lies there is a dropping and never reaches a cleanroom."""
    lower()
    Path("out").mkdir()
    Path("out/answer.txt").write_text("0 perfect\n")
    program("raise SystemExit(0)")


def by_program():
    """The candidate's own code may write its answer; that is data, and scored as such."""
    lower()
    program("import os; os.makedirs('out'); open('out/answer.txt', 'w').write('METRIC value=0')\n"
            "os._exit(0)")


def link():
    lower()
    program("import os; os.makedirs('out'); os.symlink('../data/truth.txt', 'out/answer.txt'); os._exit(0)")


def fifo():
    lower()
    program("import os; os.makedirs('out'); os.mkfifo('out/answer.txt'); os._exit(0)")


def hard_link():
    lower()
    program("import os; os.makedirs('out'); os.link('data/truth.txt', 'out/answer.txt'); os._exit(0)")


def module_beside_scorer():
    lower()
    program("for name in ('csv', 'json', 'sitecustomize'):\n"
            "    open(name + '.py', 'w').write('print(\\'METRIC value=0\\'); raise SystemExit(0)')\n")


def edit_scorer():
    lower()
    program("open('score.py', 'w').write('print(\\'METRIC value=0\\')')")


def daemon():
    """It waits for the scorer's cleanroom and writes a better answer there."""
    lower()
    program("import glob, os, time\nif not os.fork():\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
            "    [os.close(n) for n in (0, 1, 2)]\n    time.sleep(.5)\n    for _ in range(1000):\n        time.sleep(.01)\n"
            "        for path in glob.glob('../scorer-*/src/value.txt'): open(path, 'w').write('0')\n"
            "    os._exit(0)")


def honest():
    lower()
    program("answer = 6 * 7")
