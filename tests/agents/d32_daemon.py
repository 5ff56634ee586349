"""A double-forked daemon in a session of its own that edits the cleanroom when it appears."""
import glob
import os
import time

from play import lower


def daemon(seconds=20):
    if os.fork():
        return os.wait()
    os.setsid()
    if os.fork():
        os._exit(0)
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in glob.glob("../room-*/src/value.txt"):
            with open(path, "w") as stream:
                stream.write("1\n")
        time.sleep(.01)
    os._exit(0)


def edit_later():
    lower()
    daemon()


def hold_output():
    """A grandchild that holds the output open must not keep the turn from ending."""
    lower()
    if not os.fork():
        os.setsid()
        time.sleep(20)
        os._exit(0)


def honest():
    lower()
    os.waitpid(os.spawnlp(os.P_NOWAIT, "true", "true"), 0)
