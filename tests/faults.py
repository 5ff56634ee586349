"""Run scalarloop so that its n-th system call of a kind goes wrong: `faults.py MODE N LOG ARGS...`.

MODE is
  count    nothing goes wrong; LOG gets a line for each call, to see what there is
  fail     the n-th call fails once: a write is cut in half and the next on that file fails
  full     from the n-th call on nothing can be created or written any more: the disk is full
  kill     the process is killed right after its n-th call; a write is cut in half
  record   the process is killed right after its n-th write to a ledger
  git      the n-th git process dies without doing its work
  late     the n-th git process dies after it did its work
  clock    the clock goes back by a day at the n-th record
LOG tells what went wrong; it stays away when the run ended before its n-th call.
"""
from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scalarloop  # noqa: E402  (found through the line above)

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CALLS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "link", "symlink", "truncate",
         "ftruncate", "pwrite", "chmod", "chown")
MAKING = ("write", "pwrite", "open", "mkdir", "replace", "rename", "link", "symlink", "spawn")


class Countdown:
    """Count the calls of this process and let one of them go wrong."""

    def __init__(self, mode: str, number: int, log: str):
        self.mode, self.left, self.log = mode, number, log
        self.pid, self.count, self.cut = os.getpid(), 0, set()  # type: int, int, Set[int]
        self.write = os.write

    def note(self, what: str) -> None:
        """Append a line to the log, by calls that aren't counted."""
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        line = f"{self.count} {what}".replace("\n", " ") + "\n"
        self.write(descriptor, line.encode("utf-8", "replace"))
        os.close(descriptor)

    def is_due(self, kind: str, what: str) -> bool:
        """Count a call; tell whether it is the one."""
        if os.getpid() != self.pid or (self.mode in ("git", "late")) != (kind == "git"):
            return False
        self.count += 1
        due = self.count == self.left or self.mode == "full" and self.count > self.left
        if due or self.mode == "count":
            self.note(f"{kind} {what}")
        return due and self.mode != "count" and (self.mode != "full" or kind in MAKING)

    def error(self) -> OSError:
        """Return a full or a broken disk, in turns."""
        number = errno.ENOSPC if self.mode == "full" or self.count % 2 else errno.EIO
        return OSError(number, os.strerror(number))

    def wrap(self, kind: str, call: Callable[..., Any], concerns: Callable[..., bool]
             ) -> Callable[..., Any]:
        """Return `call` with the countdown around it."""
        def counted(*args: Any, **options: Any) -> Any:
            what = " ".join(map(str, args[:2]))
            if kind == "fsync":
                what = _path_of(args[0])
            if not concerns(*args, **options) or not self.is_due(kind, what):
                return call(*args, **options)
            if self.mode != "kill":
                raise self.error()
            try:
                return call(*args, **options)
            finally:
                os.kill(self.pid, signal.SIGKILL)
        return counted

    def wrap_write(self, descriptor: int, data: bytes) -> int:
        """Write; at the due call only a half, and nothing more on that file."""
        if self.mode == "record":
            written = self.write(descriptor, data)
            self.count += _path_of(descriptor).endswith("/ledger.jsonl")
            if self.count == self.left:
                self.note("record")
                os.kill(self.pid, signal.SIGKILL)
            return written
        if descriptor in self.cut:
            self.cut.discard(descriptor)
            raise self.error()
        if not self.is_due("write", _path_of(descriptor)):
            return self.write(descriptor, data)
        if self.count > self.left or len(data) < 2 and self.mode != "kill":
            raise self.error()
        count = self.write(descriptor, bytes(data)[:len(data) // 2])
        if self.mode == "kill":
            os.kill(self.pid, signal.SIGKILL)
        if self.mode == "fail":
            self.cut.add(descriptor)
        return count

    def install(self) -> None:
        """Put the countdown around everything that changes the world outside the process."""
        os.write = self.wrap_write  # type: ignore[assignment]
        if self.mode == "record":
            return
        for name in CALLS:
            setattr(os, name, self.wrap(name, getattr(os, name), lambda *a, **k: True))
        os.remove = os.unlink
        plain_open, plain_os_open = io.open, os.open
        counted_open = self.wrap("open", plain_open, _opens_to_write)
        builtins.open = io.open = counted_open  # type: ignore[assignment]
        os.open = self.wrap("open", plain_os_open,  # type: ignore[assignment]
                            lambda path, flags, *a, **k: bool(flags & WRITING)
                            and path not in (self.log, os.devnull))
        subprocess.Popen = self.popen()  # type: ignore[misc, assignment]

    def set_back(self) -> None:
        """Let the clock go back by a day at the n-th record."""
        now = time.time

        def told() -> float:
            if sys._getframe(1).f_code.co_name == "timestamp":
                self.count += 1
                if self.count == self.left:
                    self.note("clock")
            return now() - (86400 if self.count >= self.left else 0)

        time.time = told

    def popen(self) -> Any:
        """Return a Popen that counts."""
        countdown, plain = self, subprocess.Popen

        class Popen(plain):  # type: ignore[type-arg, valid-type, misc]
            def __init__(self, argv: Any, *args: Any, **options: Any):
                word = os.path.basename(str(argv[0]))
                if word == "git" and countdown.is_due("git", " ".join(argv)[-300:]):
                    work = '"$0" "$@"; ' if countdown.mode == "late" else ""
                    argv = ["/bin/sh", "-c", work + "echo out of memory >&2; kill -9 $$", *argv]
                due = countdown.is_due("spawn", " ".join([word, *map(str, argv[-5:])]))
                if due and countdown.mode != "kill":
                    raise countdown.error()
                super().__init__(argv, *args, **options)
                if due:
                    os.kill(countdown.pid, signal.SIGKILL)

        return Popen


def _path_of(descriptor: Any) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return f"descriptor {descriptor}"


def _opens_to_write(path: Any, mode: str = "r", *args: Any, **options: Any) -> bool:
    return not isinstance(path, int) and bool(set(mode) & set("wax+"))


if __name__ == "__main__":
    countdown = Countdown(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    countdown.set_back() if countdown.mode == "clock" else countdown.install()
    sys.exit(scalarloop.main(sys.argv[4:]))
