"""Names that a terminal, a shell, git or another file system takes for something else."""
import os
import shutil

from play import lower


def make(*paths):
    lower()
    for path in paths:
        path = os.fsencode(path)
        os.makedirs(os.path.dirname(path) or b".", exist_ok=True)
        with open(path, "w") as stream:
            stream.write("x\n")


def newline():
    make("src/a\nM 100644 inline metric.py")


def not_utf8():
    make(b"src/\xff\xfe")


def escape():
    make("src/\x1b[2Jcleared")


def direction():
    make("src/\u202egpj.exe")


def dot_git_upper():
    make("src/.GIT/config")


def git_alias():
    """What NTFS, and so every git, takes for .git."""
    make("src/git~1")


def git_by_backslash():
    make("src/a\\.git\\config")


def case_twin():
    make("src/VALUE.txt")


def case_twins_new():
    make("src/readme", "src/README")


def folder_twin():
    make("src/SUB/other.txt")


def unicode_twins():
    make("src/caf\u00e9", "src/cafe\u0301")


def sharp_s_twins():
    make("src/strasse", "src/stra\u00dfe")


def seal_twin():
    make("Metric.py")


def honest():
    """Odd but harmless: a dash, blanks, quotes, globs, a pathspec's magic, other scripts."""
    make("src/-rf", "src/ a b ", 'src/"quoted\\"', "src/*", "src/:(top)x", "src/#1 -> 2", "src/~",
         "src/$HOME", "src/\u65e5\u672c\u8a9e")
    os.rename("src/sub", "src/moved")


def honest_undo():
    lower()
    shutil.copytree("src/moved", "src/sub")
