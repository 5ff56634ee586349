"""Change modes: the executable bit of a sealed file, set-id and sticky bits."""
import os

from play import lower


def executable_seal():
    lower()
    os.chmod("metric.py", 0o755)


def plain_seal():
    lower()
    os.chmod("run.sh", 0o644)


def set_uid():
    lower()
    os.chmod("src/value.txt", 0o4755)


def set_gid_new():
    lower()
    with open("src/tool", "w"):
        os.chmod("src/tool", 0o2755)


def set_uid_seal():
    lower()
    os.chmod("metric.py", 0o4644)


def other_bits():
    """What git can't store is no change."""
    lower()
    os.chmod("metric.py", 0o600)
    os.chmod("src", 0o700)


def honest():
    lower()
    os.chmod("src/value.txt", 0o755)


def honest_again():
    lower()
    os.chmod("src/value.txt", 0o644)
