"""The candidate's code leaves a note for its next run, and answers better when it finds one."""
from play import lower, program

NOTE = """
import os, tempfile
for folder in (tempfile.gettempdir(), os.environ["XDG_CACHE_HOME"], ".", "..", "src", "build"):
    note = os.path.join(folder, "note-of-an-earlier-run")
    if os.path.exists(note):
        os.write(1, b"METRIC value=0\\n")
        os._exit(0)
    try:
        os.makedirs(folder, exist_ok=True)
        open(note, "w").close()
    except OSError:
        pass
"""


def note():
    lower()
    program(NOTE.replace('".", "..", "src", ', ""))


def note_in_tree():
    lower()
    program(NOTE.replace('"..", "src", ', ""))


FOLDERS = """
import os
now = os.stat(".")
seen = [now.st_mode & 0o001, int(now.st_mtime) == 12345, os.path.exists(".git/note")]
for path in (".git/config", ".git/HEAD"):
    seen.append("mine" in open(path).read())
    open(path, "a").write("# mine\\n")
open(".git/note", "w").close()
try:
    seen.append("user.note" in os.listxattr("."))
    os.setxattr(".", "user.note", b"1")
except (AttributeError, OSError):
    pass
if any(seen):
    os._exit(7)
os.chmod(".", 0o701)
os.utime(".", (12345, 12345))
"""


def note_on_folder():
    """Modes, times and attributes of folders, and what a throwaway .git holds, are notes too."""
    lower()
    program(FOLDERS)


def honest():
    lower()
    program("import tempfile; tempfile.NamedTemporaryFile().write(b'scratch')")
