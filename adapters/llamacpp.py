#!/usr/bin/env python3
"""Let a local model edit the files in scope: llama.cpp, started for the turn or already running.

    model file -> llama-server on loopback -> openai.py's turn, its answer confined by a grammar

For a try, in a folder:
  echo 'Make it shorter.' | SCALARLOOP_OPT_MODEL=~/models/some.gguf python3 adapters/llamacpp.py

Every turn is a process of its own whose descendants die with it, so a server started here loads
the model anew each turn. For a long run start `llama-server -m MODEL --port 8080` yourself, beside
the loop, and give its `url`.

Options ([adapter] in loop.ini; handed in as SCALARLOOP_OPT_<KEY>):
  url            a running server's address, such as http://127.0.0.1:8080; nothing is started then
  model          the GGUF file (~ and paths relative to loop.ini are understood); needed without url
  server         the llama-server program (llama-server on PATH, else the xllamacpp wheel)
  python         the Python whose xllamacpp wheel to use (this one, else python3 on PATH)
  port           where to listen, on 127.0.0.1 only (0: any free port)
  ctx            context length in tokens (16k)
  threads        CPU threads (llama.cpp's own choice)
  gpu_layers     layers on the GPU (llama.cpp's own choice; llama-server only)
  args           more arguments for llama-server, as on a command line
  start_timeout  longest loading of the model (2m)
  grammar        yes: confine the answer to edits of paths in scope (yes for a started server, no
                 for a url; not with format = diff; no for a model whose chat template thinks first)
  context        bytes of files sent (1.5 for each token of ctx)
  max_tokens     longest answer (half of ctx; with a url the server's own)
  temperature, format, timeout, request_timeout, retries, api_key_env, extra   as in openai.py

Sends: prompt and files to the url, or to the server started here; nothing leaves the machine
unless the url is elsewhere. The started server is told to load no model from a hub (--offline).
Writes: as openai.py; the server's log, in TMPDIR, for the turn.

Exit codes: as openai.py, and 10 no server could be started (program or model missing, port taken,
died or too slow while loading) · 11 the server died in the middle of the turn
"""
from __future__ import annotations

import ctypes
import dataclasses
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, Sequence

sys.dont_write_bytecode = True  # the adapters' folder may be the user's project
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from openai import (  # noqa: E402  (the file beside this one, whatever else has that name)
    BYTES, OPTIONS, TIME, Client, Options, number, read_options, set_alarm, take_turn)
from shared import (  # noqa: E402
    DIED, NOT_STARTED, USAGE, AdapterError, Scope, build_grammar, note_unused, one_line, option,
    read_prompt, read_scope, run_adapter)

PR_SET_PDEATHSIG = 1
OWN_OPTIONS = {"url", "server", "python", "port", "ctx", "threads", "gpu_layers", "args",
               "start_timeout", "grammar"}
XLLAMACPP = """
import json, sys, threading, xllamacpp
given = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = given["model"]
params.hostnames, params.port = ["127.0.0.1"], given["port"]
params.n_ctx, params.n_parallel, params.warmup, params.offline = given["ctx"], 1, False, True
if given["threads"]:
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
server = xllamacpp.Server(params)
threading.Event().wait()
"""


# ── server ──────────────────────────────────────────────────────────────────────────────────────

class LlamaServer:
    """A llama.cpp server that lives for the `with` block, and never longer than this process."""

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.log = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
                preexec_fn=die_with_parent)
        except OSError as error:
            raise AdapterError(NOT_STARTED, f"server: {command[0]} can't be run "
                               f"({error.strerror})") from None

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.process.terminate()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_healthy(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while self.health() != 200:
            self.check_alive(NOT_STARTED)
            if time.monotonic() > deadline:
                raise AdapterError(NOT_STARTED, f"the server isn't ready after {patience:.0f} s "
                                   f"(raise start_timeout); it says: {self.last_words()}")
            time.sleep(0.05)
        self.check_alive(NOT_STARTED)   # else it was another server on our port that answered

    def health(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def check_alive(self, code: int = DIED) -> None:
        """Raise when the server has ended; a connection may break a moment before that shows."""
        try:
            status = self.process.wait(0.3 if code == DIED else 0)
        except subprocess.TimeoutExpired:
            return
        when = "while it was answering" if code == DIED else "before it was ready"
        raise AdapterError(code, f"the server ended {when} (status {status}); it says: "
                           f"{self.last_words()}")

    def last_words(self) -> str:
        """Return the end of the server's log, from the last error on if there is one."""
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 4000))
        lines = [line.strip() for line in self.log.read().decode("utf-8", "replace").split("\n")]
        lines = [line for line in lines if line][-12:]
        errors = [line for line in lines if re.search("error|fail|couldn't|unable", line, re.I)]
        return one_line(" / ".join(errors[-2:] or lines[-2:]) or "nothing")


def die_with_parent() -> None:
    """Have Linux kill this child when the adapter ends in whatever way; elsewhere do nothing."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (AttributeError, OSError):
        pass


def start_server(ctx: int) -> LlamaServer:
    """Start whichever llama.cpp server there is, on the model file that is named."""
    model = os.path.join(os.environ.get("SCALARLOOP_CONFIG_DIR", ""),
                         os.path.expanduser(option("model")))
    if not option("model") or not os.path.isfile(model):
        raise AdapterError(NOT_STARTED, f"model: {option('model') or 'unset'} is no file (expected "
                           "[adapter] model = a GGUF file, or url = a running server)")
    port, threads = find_port(int(number("port", "0", {}))), int(number("threads", "0", {}))
    program = option("server") or shutil.which("llama-server")
    if program:
        command = [os.path.expanduser(program), "--host", "127.0.0.1", "--port", str(port),
                   "-m", model, "-np", "1", "-c", str(ctx), "--offline"]
        command += ["-t", str(threads)] if threads else []
        command += ["-ngl", option("gpu_layers")] if option("gpu_layers") else []
        return LlamaServer(command + shlex.split(option("args")), port)
    given = {"model": os.path.abspath(model), "port": port, "ctx": ctx, "threads": threads}
    return LlamaServer([find_python(), "-c", XLLAMACPP, json.dumps(given)], port)


def find_port(wanted: int) -> int:
    """Return a port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except (OSError, OverflowError) as error:
            raise AdapterError(NOT_STARTED, f"port: {wanted} can't be had ({error}; expected "
                               "port = 0 for any free one)") from None
        return int(probe.getsockname()[1])


def find_python() -> str:
    """Return a Python that has the xllamacpp wheel."""
    candidates = [option("python")] if option("python") else [
        sys.executable, shutil.which("python3") or ""]
    for python in filter(None, map(os.path.expanduser, candidates)):
        try:
            probe = subprocess.run([python, "-c", "import xllamacpp"], stdin=subprocess.DEVNULL,
                                   capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if probe.returncode == 0:
            return python
    raise AdapterError(NOT_STARTED, "llama.cpp is not there: no llama-server on PATH, no xllamacpp "
                       f"in {' or '.join(filter(None, candidates))} (install one, or set "
                       "[adapter] server, python or url)")


# ── turn ────────────────────────────────────────────────────────────────────────────────────────

def with_grammar(options: Options, scope: Scope, default: str) -> Options:
    """Return the options with a grammar in each request, if one is wanted."""
    wanted = option("grammar", default)
    if wanted not in ("yes", "no"):
        raise AdapterError(USAGE, f"grammar: {wanted!r} can't be used (expected yes or no)")
    if wanted == "no" or options.format == "diff":
        return options
    size = sum(os.path.getsize(path) for path in scope.files)
    grammar = build_grammar(scope, options.format, may_read=size > options.context)
    parameters: Dict[str, Any] = {"grammar": grammar, **options.parameters}
    return dataclasses.replace(options, parameters=parameters)


def main() -> int:
    note_unused(OPTIONS | OWN_OPTIONS)
    ctx = int(number("ctx", "16k", BYTES))
    context, url = str(int(ctx * 1.5)), option("url").rstrip("/")
    scope, prompt = read_scope(), read_prompt()
    if url:
        base_url = url if url.endswith("/v1") else url + "/v1"
        options = with_grammar(read_options("default", base_url, "", context), scope, "no")
        set_alarm(options.timeout)
        return take_turn(prompt, options, scope, Client(options))
    options = read_options("local", "http://127.0.0.1", str(ctx // 2), context)
    options = with_grammar(options, scope, "yes")
    set_alarm(options.timeout)
    with start_server(ctx) as server:
        server.wait_until_healthy(number("start_timeout", "2m", TIME))
        options = dataclasses.replace(options, base_url=server.url + "/v1")
        return take_turn(prompt, options, scope, Client(options, server.check_alive))


if __name__ == "__main__":
    run_adapter(main, __doc__)
