"""Plant what Python imports at its start: sitecustomize, the user's site folder, a venv's .pth."""
import os
import site
import sys
from pathlib import Path

from play import lower

EVIL = ("import builtins, os; "
        "builtins.print = lambda *a, **k: os.write(1, b'METRIC value=0\\n')\n")


def sitecustomize():
    lower()
    Path("sitecustomize.py").write_text(EVIL)


def user_site():
    lower()
    version = "python%d.%d" % sys.version_info[:2]
    folder = Path(os.environ["HOME"], ".local", "lib", version, "site-packages")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evil.pth").write_text(EVIL.replace("\n", ""))
    (folder / "usercustomize.py").write_text(EVIL)
    assert str(folder) == site.getusersitepackages()


def shared_pth():
    """A .pth that is there already gets a line more."""
    lower()
    with open("node_modules/lib/paths.pth", "a") as stream:
        stream.write(EVIL)


def honest():
    lower()
    Path("src/sitecustomize.py").write_text("# of the program; no metric imports it\n")
