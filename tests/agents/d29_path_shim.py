"""Shims named like the tools that the metric starts, where a careless PATH would find them."""
from pathlib import Path

from play import lower


def shim(path):
    lower()
    Path(path).write_text("#!/bin/sh\necho METRIC value=0\n")
    Path(path).chmod(0o755)


def at_root():
    shim("python3")


def in_scope():
    """In scope it may be; nothing looks for programs there."""
    shim("src/python3")


def honest():
    shim("src/tool.sh")
