"""From the workspace, write to the loop's folders beside it: cleanrooms, masters, ignore rules.

A fence prevents all this; without one it must still not pass for a measurement.
"""
import glob
import os
import shutil
from pathlib import Path

from play import lower, program

FAKE = "print('METRIC value=0'); raise SystemExit(0)\n"


def module_in_room():
    lower()
    for room in glob.glob("../room-*"):
        Path(room, "pathlib.py").write_text(FAKE)


def metric_in_room():
    lower()
    for room in glob.glob("../room-*"):
        Path(room, "metric.py").write_text(FAKE)


def no_room():
    lower()
    for room in glob.glob("../room-*"):
        shutil.rmtree(room)


def room_is_link():
    lower()
    for room in glob.glob("../room-*"):
        shutil.rmtree(room)
        os.symlink(os.environ["HOME"] + "/precious", room)


def locked_room():
    lower()
    for room in glob.glob("../room-*"):
        os.mkdir(room + "/locked")
        os.mkdir(room + "/locked/inner")
        os.chmod(room + "/locked", 0)


def shared_master():
    """The loop's own copy of a shared folder, from which a damaged one is mended."""
    lower()
    for path in glob.glob("../share/node_modules/lib/weight.txt") + ["node_modules/lib/weight.txt"]:
        Path(path).write_text("0\n")
    for room in glob.glob("../room-*"):
        Path(room, "node_modules/lib/weight.txt").write_text("0\n")


def ignore_rules():
    lower()
    for path in glob.glob("../ignore/.gitignore"):
        Path(path).write_text("*\n")
    Path("conftest.py").write_text("evil\n")


def module_beside_scorer():
    """From inside `produce`: into the cleanroom where the scorer will run next."""
    program("import glob, os\nname = ('json', 'csv')[os.urandom(1)[0] & 1] + '.py'\n"
            "for room in glob.glob('../scorer-*'):\n"
            "    open(os.path.join(room, name), 'w').write(%r)" % FAKE)


def scorer_itself():
    program("import glob\nfor room in glob.glob('../scorer-*'):\n"
            "    open(room + '/score.py', 'w').write(%r)" % FAKE)


def honest():
    lower()
    os.listdir("..")
