"""Find the modules that a program is made of. Sealed: the agent can't change this file."""
import re
from pathlib import Path
from typing import Dict

IMPORT = re.compile(rb"from (\w+) import [\w, ]+")


def collect(folder: Path, name: str) -> Dict[str, bytes]:
    """Return the sources of module `name` and of all that it imports, in the order to join them.

    An import of a module of the folder is a line `from NAME import ...`: it gives way to the
    module's own source. Nothing of the program is imported or executed here.
    """
    modules: Dict[str, bytes] = {}
    kept = []
    for line in (folder / f"{name}.py").read_bytes().splitlines(keepends=True):
        found = IMPORT.fullmatch(line.rstrip())
        if found and (folder / f"{found[1].decode()}.py").exists():
            modules.update(collect(folder, found[1].decode()))
        else:
            kept.append(line)
    modules[name] = b"".join(kept)
    return modules
