"""Check that the built bundle still does its work: the guard. Exit 0 if it does, 1 if not.

The bundle is a program that an agent wrote, so it runs in a process of its own, in an empty folder,
and only its output counts. Of the 600 numbers it is given, the answers to the last 590 stand
nowhere: only their digest is here, so there is nothing to copy.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List

import build

EXAMPLES = {"7992739871": "3", "411111111111111": "1", "37828224631000": "5", "0": "0", "1": "8",
            "18": "2", "9": "1", "5": "9", "0000000000": "0", "123456789012345678901234567890": "9"}
DIGEST = "c67af321b1f86087216134ce5b4c0e0b03a40a74e07ee52251d2194d88d011d4"


def list_numbers() -> List[str]:
    """Return 590 numbers of 1 to 40 digits, the same ones every time."""
    numbers = []
    for index in range(590):
        digest = hashlib.sha256(b"%d" % index).hexdigest()
        numbers.append(str(int(digest, 16))[5:][:1 + index % 40])
    return numbers


def run_bundle(lines: List[str]) -> List[str]:
    """Return what the bundle prints for some input lines."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = shutil.copy(build.build(), folder)
        os.chdir(folder)  # a bundle could find this process's folder, and in it the sources
        done = subprocess.run([sys.executable, "-I", bundle], input="\n".join(lines) + "\n",
                              stdout=subprocess.PIPE, cwd=folder, timeout=5, check=True,
                              encoding="ascii")
    return done.stdout.splitlines()


def main() -> int:
    lines = [*EXAMPLES, *list_numbers()]
    try:
        printed = run_bundle(lines)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"the bundle doesn't run: {error}")
        return 1
    if len(printed) != len(lines):
        print(f"{len(printed)} lines printed for {len(lines)} numbers")
        return 1
    for number, expected in EXAMPLES.items():
        got = printed[lines.index(number)]
        if got != expected:
            print(f"the check digit of {number} is {expected}, not {got!r}")
            return 1
    answers = "\n".join(printed[len(EXAMPLES):])
    if hashlib.sha256(answers.encode()).hexdigest() != DIGEST:
        print(f"the examples are right, but some of the other {len(list_numbers())} answers aren't")
        return 1
    print(f"{len(lines)} check digits are right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
