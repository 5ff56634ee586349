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


def honest():
    lower()
    program("import tempfile; tempfile.NamedTemporaryFile().write(b'scratch')")
