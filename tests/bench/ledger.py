"""How long a long ledger takes to resume from, and with how much memory.

`python tests/bench/ledger.py [ITERATIONS]` (100,000 unless told).
Prints the processor seconds of json.loads alone over the same lines beside it, in the same process:
what the chain and the state add to reading.
"""
from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import scalarloop  # noqa: E402  (found through the line above)


def peak_memory() -> int:
    """Return this process's peak in bytes; Linux's getrusage would count its parent's too."""
    try:
        return int(re.search(rb"VmHWM:\s+(\d+)", Path("/proc/self/status").read_bytes())[1]) << 10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(path: str) -> None:
    """Fold the ledger as a resume does, then parse it alone; print both."""
    before = peak_memory()
    started = time.process_time()
    state = scalarloop.State()
    for record in scalarloop.read_ledger(path, None, []):
        state.advance(record)
    folded = time.process_time() - started
    peak = peak_memory()
    started = time.process_time()
    with open(path, "rb") as stream:
        for line in stream:
            json.loads(line)
    parsed = time.process_time() - started
    print(f"iterations {state.iterations}   file {os.path.getsize(path) / 1e6:.0f} MB   resume "
          f"{folded:.2f} s   json alone {parsed:.2f} s   ratio {folded / parsed:.2f}   peak "
          f"{peak / 1e6:.0f} MB, of which {before / 1e6:.0f} MB before it read anything")


def main() -> None:
    """Write the ledger in one process and read it in another, so that the peak is the reader's."""
    if len(sys.argv) == 3 and sys.argv[1] == "--read":
        measure(sys.argv[2])
        return
    from test_ledger import synthetic
    from conftest import chain
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ledger.jsonl")
        with open(path, "wb") as stream:
            stream.writelines(chain(synthetic(iterations)))
        subprocess.run([sys.executable, __file__, "--read", path], check=True)


if __name__ == "__main__":
    main()
