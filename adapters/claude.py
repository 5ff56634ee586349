#!/usr/bin/env python3
"""Let Claude Code edit the workspace: one headless `claude -p`, confined to what a turn needs.

    prompt (stdin) -> claude -p (its own tools edit the files) -> its last words, behind "| "

To install: npm install -g @anthropic-ai/claude-code, then either log in once by running `claude`,
or export ANTHROPIC_API_KEY. For a try, in a folder that may be changed:
  echo 'Make it shorter.' | python3 adapters/claude.py

Options ([adapter] in loop.ini; handed in as SCALARLOOP_OPT_<KEY>):
  model      a model's name or alias (claude's own choice)
  max_turns  most model calls in a turn (100)
  tools      tools it may use (Read,Edit,Write,Glob,Grep, which can't delete a file or run a test).
             Others are let run without asking: add Bash where the isolation confines the agent
  program    the program to run (claude, on PATH)
  args       more arguments for it, as on a command line
Environment: ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN (then claude gets an empty CLAUDE_CONFIG_DIR
of its own for the turn; without them the login in ~/.claude is used), ANTHROPIC_BASE_URL,
ANTHROPIC_MODEL, CLAUDE_CONFIG_DIR (kept when set), and what FIXED_ENVIRONMENT below says.

The project's and the user's Claude settings, hooks, MCP servers and CLAUDE.md aren't loaded, since
the first would run with no question asked; `@path` in the prompt attaches nothing.
Sends: the prompt, and what its tools read, to Anthropic (or to ANTHROPIC_BASE_URL).
Writes: files below the working directory, TMPDIR, and ~/.claude and ~/.claude.json when the login
is used ([agent] writable = ~/.claude ~/.claude.json lets it refresh the login; with a key nothing).

Exit codes: 0 claude is done, or gave up · 1 it failed or ran out of max_turns (its words say which)
· 2 bad option or input · 10 claude can't be run · 143 SIGTERM (passed on to claude) · 128 + N it
was killed by signal N · any other is claude's own
"""
from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from typing import IO, Dict, List

sys.dont_write_bytecode = True  # the adapters' folder may be the user's project
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from shared import (  # noqa: E402
    GIVE_UP, NOT_STARTED, SECRETS, USAGE, AdapterError, echo, note_unused, option, printable,
    read_prompt, run_adapter)

GRACE = 5.0                     # seconds from SIGTERM to SIGKILL
LONGEST_LINE = 1 << 16
TOOLS = "Read,Edit,Write,Glob,Grep"
FIXED_FLAGS = ("-p", "--permission-mode", "acceptEdits", "--setting-sources=",
               "--strict-mcp-config", "--no-session-persistence")
FIXED_ENVIRONMENT = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",    # no updates, telemetry, error reports
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",             # one turn's notes don't steer the next
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",             # an @path in the log reads no file
    "CLAUDE_CODE_MAX_RETRIES": "2",                     # else a refused key takes minutes
}


def build_command() -> List[str]:
    """Return claude's command line."""
    program = shutil.which(os.path.expanduser(option("program", "claude")))
    if not program:
        raise AdapterError(NOT_STARTED, f"{option('program', 'claude')}: is not on PATH (npm "
                           "install -g @anthropic-ai/claude-code, or set [adapter] program)")
    turns, tools = option("max_turns", "100"), option("tools", TOOLS).replace(" ", "")
    if not re.fullmatch("[1-9][0-9]{0,5}", turns):
        raise AdapterError(USAGE, f"max_turns: {turns!r} can't be used (expected a number from 1)")
    command = [program, *FIXED_FLAGS, f"--tools={tools}", "--max-turns", turns]
    more = [tool for tool in tools.split(",") if tool not in TOOLS.split(",")]
    command += [f"--allowedTools={','.join(more)}"] if more else []
    command += ["--model", option("model")] if option("model") else []
    try:
        return command + shlex.split(option("args"))
    except ValueError as error:
        raise AdapterError(USAGE, f"args: {option('args')!r} can't be used ({error})") from None


def build_environment(scratch: str) -> Dict[str, str]:
    """Return claude's environment: a folder of its own for its settings when a key is in use."""
    environment = {**os.environ, **FIXED_ENVIRONMENT, "CLAUDE_CODE_TMPDIR": scratch}
    keys = [environment.get(name, "") for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")]
    SECRETS.extend(key for key in keys if len(key) >= 8)
    if any(keys):
        environment.setdefault("CLAUDE_CONFIG_DIR", os.path.join(scratch, "config"))
    return environment


def spooled_prompt() -> IO[bytes]:
    """Return the prompt as a file; one that starts with a slash would be taken for a command."""
    prompt = read_prompt()
    file = tempfile.TemporaryFile()
    file.write((("Task:\n" if prompt.startswith("/") else "") + prompt + "\n").encode())
    file.seek(0)
    return file


def relay(output: IO[bytes]) -> None:
    """Print claude's words so that none but a give-up line starts a line."""
    fresh = True
    for raw in iter(lambda: output.readline(LONGEST_LINE), b""):
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if fresh and GIVE_UP.match(line):
            print(printable(line)[:1000], flush=True)
        else:
            echo(line)
        fresh = raw.endswith(b"\n")


def run_claude(command: List[str], environment: Dict[str, str], prompt: IO[bytes]) -> int:
    """Run claude to its end, or end it when we are ended; return its exit code."""
    try:
        process = subprocess.Popen(command, env=environment, stdin=prompt, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
    except OSError as error:
        raise AdapterError(NOT_STARTED, f"{command[0]}: can't be run ({error.strerror})") from None
    reader = threading.Thread(target=relay, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        code = process.wait()
        reader.join(2)          # not for ever: a process it left behind may hold the pipe open
        return code if code >= 0 else 128 - code
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> int:
    note_unused({"model", "max_turns", "tools", "program", "args"})
    scratch = tempfile.mkdtemp(prefix="claude-")
    try:
        return run_claude(build_command(), build_environment(scratch), spooled_prompt())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    run_adapter(main, __doc__)
