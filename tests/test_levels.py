"""What the levels of isolation stop: hostile acts through the command line, each level, two users.

A siege is one run of the loop: its turns play several acts each, in the agent's turn and again by
the candidate's code inside the metric, together with a true gain that must be kept; the last turn is
honest. THREATS says what became of each act, and every cell is really run:

    prevented     nothing came of it: it was refused, or undone before it mattered
    detected      it came through, and the loop or `verify` said so and kept nothing of it
    not stopped   it came through and nothing said so (`as root`: only where the loop runs as root)
    refused       the level can't give what loop.ini asks for, so the run does not start

What came through is judged from outside: changed files, what a server heard, how the loop ended.
An ordinary user is uid 65534 when the tests run as root.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import pytest

from conftest import ROOT, TOOL, Project, Result
from test_isolation import NOBODY, REFUSED, as_user, python_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")
LEVELS = ("portable", "landlock", "namespaces")
USERS = ("root", "ordinary")
KEPT = "keep metric.better"
PREVENTED, DETECTED, NOT, AS_ROOT, REFUSES = (
    "prevented", "detected", "not stopped", "not stopped as root", "refused")


class Threat(NamedTuple):
    """An act, what becomes of it at each level, and how that shows.

    `proof`: `answer` (the act's own: nothing shows outside), `file:PATH` (changed), `heard:WORD` (by
    the neighbour), `sees:WORD` (by the metric), `run` (whether the run goes on unharmed). `fact`:
    the witness that answers for it.
    """

    says: str
    act: str
    portable: str
    landlock: str
    namespaces: str
    proof: str
    fact: str = ""
    turns: str = "agent metric"


TURNS: List[List[Threat]] = [
    [Threat("kills the loop", "d33_reach_the_loop.kill", NOT, PREVENTED, PREVENTED, "run", "loop_protected"),
     Threat("stops the loop", "d33_reach_the_loop.stop", NOT, PREVENTED, PREVENTED, "run", "loop_protected"),
     Threat("takes the loop's right to write files", "d33_reach_the_loop.limit",
            NOT, PREVENTED, PREVENTED, "run", "loop_protected"),
     Threat("traces the loop", "d33_reach_the_loop.trace", AS_ROOT, PREVENTED, PREVENTED, "answer", "loop_protected"),
     Threat("writes the loop's memory", "d33_reach_the_loop.memory",
            AS_ROOT, PREVENTED, PREVENTED, "answer", "loop_protected"),
     Threat("reads the loop's environment", "d33_reach_the_loop.environment",
            AS_ROOT, PREVENTED, PREVENTED, "answer", "loop_protected"),
     Threat("slows the loop down (nice)", "d33_reach_the_loop.slow",
            NOT, PREVENTED, PREVENTED, "answer", "loop_protected"),
     Threat("pins the loop to a processor", "d33_reach_the_loop.pin",
            NOT, PREVENTED, PREVENTED, "answer", "loop_protected"),
     Threat("signals the user's other processes", "d33_reach_the_loop.signal_neighbour",
            NOT, PREVENTED, PREVENTED, "answer", "loop_protected"),
     Threat("traces the user's other processes", "d33_reach_the_loop.trace_neighbour",
            NOT, PREVENTED, PREVENTED, "answer", "loop_protected"),
     Threat("has others die first when memory runs out", "d33_reach_the_loop.spare_oneself",
            NOT, PREVENTED, PREVENTED, "answer")],
    [Threat("writes to the user's work tree", "d34_write_outside.work_tree",
            NOT, PREVENTED, PREVENTED, "file:project/README", "files_sealed"),
     Threat("plants programs in the user's .git/config", "d34_write_outside.git_config",
            NOT, PREVENTED, PREVENTED, "file:project/.git/config", "files_sealed"),
     Threat("plants hooks in the user's .git", "d34_write_outside.git_hooks",
            NOT, PREVENTED, PREVENTED, "file:project/.git/hooks", "files_sealed"),
     Threat("edits loop.ini", "d34_write_outside.settings",
            DETECTED, PREVENTED, PREVENTED, "file:project/loop.ini", "files_sealed"),
     Threat("writes to the state folder", "d34_write_outside.state_folder",
            NOT, PREVENTED, PREVENTED, "file:project/.scalarloop/t/planted", "files_sealed"),
     Threat("appends to the ledger", "d34_write_outside.ledger_append",
            DETECTED, PREVENTED, PREVENTED, "run", "files_sealed"),
     Threat("rewrites a line of the ledger", "d34_write_outside.ledger_rewrite",
            DETECTED, PREVENTED, PREVENTED, "run", "files_sealed"),
     Threat("damages the loop's private store", "d34_write_outside.store",
            DETECTED, PREVENTED, PREVENTED, "file:project/.scalarloop/t/store.git/planted", "files_sealed"),
     Threat("edits scalarloop.py", "d34_write_outside.tool",
            NOT, PREVENTED, PREVENTED, "file:tool/scalarloop.py", "files_sealed"),
     Threat("plants dotfiles in HOME", "d34_write_outside.dotfiles",
            NOT, PREVENTED, PREVENTED, "file:home/.bashrc", "files_sealed"),
     Threat("plants git settings in HOME for the metric's git", "d34_write_outside.dotfiles",
            NOT, PREVENTED, PREVENTED, "sees:git settings", "files_sealed"),
     Threat("plants Python code in HOME for the metric's Python", "d34_write_outside.user_site",
            PREVENTED, PREVENTED, PREVENTED, "sees:user site"),
     Threat("plants a program in the workspace for the metric's PATH", "d34_write_outside.path_shim",
            PREVENTED, PREVENTED, PREVENTED, "sees:shim", turns="agent"),
     Threat("plants settings for the loop's own git calls", "d34_write_outside.loops_own_scratch",
            NOT, PREVENTED, PREVENTED, "answer", "files_sealed"),
     Threat("leaves notes for later runs in /tmp", "d34_write_outside.note_in_tmp",
            NOT, PREVENTED, PREVENTED, "file:/tmp", "files_sealed"),
     Threat("leaves notes for later runs in /dev/shm", "d34_write_outside.note_in_memory",
            NOT, NOT, PREVENTED, "file:/dev/shm"),
     Threat("changes modes of the user's files", "d34_write_outside.modes",
            NOT, NOT, PREVENTED, "file:project/data/mode.txt", "modes_sealed"),
     Threat("changes times of the user's files", "d34_write_outside.times",
            NOT, NOT, PREVENTED, "file:project/data/time.txt", "modes_sealed")],
    [Threat("rewrites a cleanroom before it is used", "d34_write_outside.cleanroom",
            PREVENTED, PREVENTED, PREVENTED, "run", "", "agent")],
    [Threat("reads the state folder", "b22_read_secrets.state_folder",
            NOT, PREVENTED, PREVENTED, "answer", "secrets_hidden"),
     Threat("reads the ledger's key", "b22_read_secrets.key", NOT, PREVENTED, PREVENTED, "answer", "secrets_hidden"),
     Threat("reads the holdout's files in HOME", "b22_read_secrets.holdout_at_home",
            NOT, PREVENTED, PREVENTED, "answer", "secrets_hidden"),
     Threat("reads the holdout's files in the user's work tree", "b22_read_secrets.holdout_in_project",
            NOT, PREVENTED, PREVENTED, "answer", "secrets_hidden"),
     Threat("reads the holdout's files from the user's .git", "b22_read_secrets.holdout_in_git",
            NOT, PREVENTED, PREVENTED, "answer", "secrets_hidden"),
     Threat("reads the holdout's files from the workspace's .git", "b22_read_secrets.own_folder_s_git",
            PREVENTED, PREVENTED, PREVENTED, "answer", turns="agent")],
    [Threat("has a server on a unix socket run a command", "d35_call_outside.path_socket",
            NOT, NOT, PREVENTED, "heard:path", "sockets_off"),
     Threat("has a server on an abstract socket run a command", "d35_call_outside.abstract_socket",
            NOT, PREVENTED, PREVENTED, "heard:abstract", "sockets_off"),
     Threat("sends data over TCP where network = deny", "d35_call_outside.tcp",
            REFUSES, PREVENTED, PREVENTED, "heard:metric-tcp", "network_off", "metric"),
     Threat("sends data over UDP where network = deny", "d35_call_outside.udp",
            REFUSES, PREVENTED, PREVENTED, "heard:metric-udp", "network_off", "metric"),
     Threat("writes to the user's terminal", "d35_call_outside.terminal",
            NOT, PREVENTED, PREVENTED, "heard:terminal", "files_sealed")],
    [Threat("leaves a fork bomb running", "h50_exhaust.fork_bomb",
            PREVENTED, PREVENTED, PREVENTED, "run", "daemons_killed"),
     Threat("uses up memory while its turn lasts", "h50_exhaust.memory", NOT, NOT, NOT, "answer"),
     Threat("uses up the disk while its turn lasts", "h50_exhaust.disk", NOT, NOT, NOT, "answer"),
     Threat("floods the log", "h50_exhaust.log", PREVENTED, PREVENTED, PREVENTED, "run", turns="agent"),
     Threat("floods the log line by line", "h50_exhaust.log_lines",
            PREVENTED, PREVENTED, PREVENTED, "run"),
     Threat("holds its output open after its end", "h51_hold_on.hold_output",
            PREVENTED, PREVENTED, PREVENTED, "run", "daemons_killed"),
     Threat("leaves folders that can't be deleted", "h51_hold_on.locked_folders",
            PREVENTED, PREVENTED, PREVENTED, "run")],
    [Threat("leaves a daemon that rewrites cleanrooms", "d32_rewrite_rooms.in_turn",
            PREVENTED, PREVENTED, PREVENTED, "run", "daemons_killed", "agent"),
     Threat("leaves a daemon behind in the metric's run", "d32_rewrite_rooms.in_metric",
            PREVENTED, PREVENTED, PREVENTED, "run", "daemons_killed", "metric")],
]
HANGS = [Threat("hangs and ignores SIGTERM", "h51_hold_on.hang", DETECTED, DETECTED, DETECTED, "run")]
ALL = [threat for turn in [*TURNS, HANGS] for threat in turn]
THREATS: Dict[str, Dict[str, str]] = {
    threat.says: {level: getattr(threat, level) for level in LEVELS} for threat in ALL}

METRIC = """
    import os, pathlib, shutil, subprocess, sys
    os.makedirs("build", exist_ok=True)
    pathlib.Path("build/out").write_text("x")
    git = subprocess.run(["git", "config", "--get", "test.planted"], stdout=subprocess.PIPE)
    for word, seen in (("user site", hasattr(sys, "planted")), ("shim", shutil.which("sl-shim")),
                       ("git settings", git.stdout)):
        if seen:
            print("SEES", word)
    sys.stdout.flush()
    subprocess.run([sys.executable, "src/prog.py"])
    print("METRIC value=%s" % pathlib.Path("src/value.txt").read_text().strip())
"""
HOLDOUT = """
    import os, pathlib
    for path in ("data/labels.txt", os.path.expanduser("~/labels.txt")):
        assert len(pathlib.Path(path).read_text()) == 18
    print("METRIC value=1")
"""
NEIGHBOUR = r'''
import json, os, pty, select, socket, subprocess, sys
yard = sys.argv[1]
heard = os.open(yard + "/run/heard", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
def server(family, kind, address):
    made = socket.socket(family, kind)
    made.bind(address)
    if kind == socket.SOCK_STREAM:
        made.listen(9)
    return made
path = server(socket.AF_UNIX, socket.SOCK_STREAM, yard + "/run/door")
abstract = server(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + yard)
tcp = server(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
udp = server(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
master, slave = pty.openpty()
with open(yard + "/run/new", "w") as file:
    json.dump({"pid": os.getpid(), "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1],
               "terminal": os.ttyname(slave)}, file)
os.rename(yard + "/run/new", yard + "/run/neighbour.json")
while True:
    for source in select.select([path, abstract, tcp, udp, master], [], [])[0]:
        if source is master:
            os.write(heard, os.read(master, 999))
        elif source is udp:
            os.write(heard, udp.recv(999))
        else:
            with source.accept()[0] as client:
                client.settimeout(5)
                word = client.recv(999)
                if source is tcp:
                    os.write(heard, word)
                else:
                    subprocess.run(["sh", "-c", "echo '%s' >> '%s/run/heard'" % (word.decode().strip(), yard)])
                client.send(b"x")
'''
SIEGE = "siege.py"


class Yard(Project):
    """A user's folder, outside the test's own: project, home, the tool, and a neighbour process."""

    def __init__(self, user: str, level: str):
        self.uid = 0 if user == "root" else os.geteuid() or NOBODY
        self.base = Path(tempfile.mkdtemp(prefix="sl-levels-", dir="/tmp"))
        for name in ("project", "home", "tmp", "tool", "run", "run/hooks"):
            (self.base / name).mkdir()
        super().__init__(self.base / "project", self.base)
        self.python = python_of(self.uid)
        self.home, self.heard = self.base / "home", self.base / "run" / "heard"
        path = [os.path.dirname(self.python), "/usr/local/bin", "/usr/bin", "/bin"]
        self.env = {"PATH": os.pathsep.join(path), "HOME": str(self.home), "LC_ALL": "C.UTF-8",
                    "TMPDIR": str(self.base / "tmp"), "TZ": "UTC",
                    "SCALARLOOP_LEDGER_KEY": str(self.base / "key"),
                    "SCALARLOOP_TEST_YARD": str(self.base)}
        self.hwm, self.stopped, self.neighbour = 0, False, None
        shutil.copy(TOOL, self.base / "tool")
        shutil.copytree(ROOT / "tests" / "agents", self.base / "agents",
                        ignore=shutil.ignore_patterns("__pycache__"))
        self.config["isolation"]["level"] = level
        self.config["agent"].update(command=f"{self.python} {self.base}/agents/{SIEGE}",
                                    env="SCALARLOOP_TEST_YARD SCALARLOOP_TEST_FLOOD")
        self.config["metric"].update(command=f"{self.python} metric.py", network="deny",
                                     env="SCALARLOOP_TEST_YARD")
        self.config["loop"]["patience"] = 1000

    def lay_out(self) -> None:
        """Write the project and the home, commit, and give all of it to the user."""
        for path, text in (("src/value.txt", "1000\n"), ("src/prog.py", "pass\n"), ("README", "x\n"),
                           ("metric.py", METRIC), ("holdout.py", HOLDOUT), ("data/mode.txt", "x\n"),
                           ("data/time.txt", "x\n"), ("data/labels.txt", "the hidden answer\n"),
                           (".gitignore", "__pycache__/\nbuild/\nloop.ini\n")):
            self.write(path, text)
        (self.home / "labels.txt").write_text("the hidden answer\n")
        (self.base / "key").write_text("0123456789abcdef0123456789abcdef")
        evil = self.base / "run" / "evil"
        evil.write_text(f"#!/bin/sh\necho \"$0 $@\" >> {self.base}/run/evil-ran\ncat\n")
        evil.chmod(0o755)
        self.give()
        self.git("init", "-q")
        self.commit("start")
        self.save_config()
        self.give()

    def give(self) -> None:
        """Make everything here the user's."""
        for folder, _, names in os.walk(self.base):
            for path in [folder, *(os.path.join(folder, name) for name in names)]:
                os.chown(path, self.uid, -1, follow_symlinks=False)

    def plan(self, *turns: Dict[str, List[str]]) -> None:
        """Say what the agent does in each iteration, and what the candidate's code does."""
        (self.base / "run" / "plan.json").write_text(json.dumps(turns))
        self.config["loop"]["iterations"] = len(turns)

    def git(self, *args: str, check: bool = True, cwd: Optional[Path] = None) -> str:
        """Run the real git as the user, deaf to what an attack planted for it."""
        identity = ["-c", "user.name=user", "-c", "user.email=user@example.com",
                    "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null",
                    "-c", "init.defaultBranch=main"]
        done = subprocess.run(["git", *identity, *args], cwd=cwd or self.root, stdout=subprocess.PIPE,
                              env={"PATH": self.env["PATH"], "HOME": "/nonexistent"},
                              stderr=subprocess.PIPE, **as_user(self.uid))
        if check and done.returncode:
            raise AssertionError(f"git {args}: {done.stderr.decode(errors='replace')}")
        return done.stdout.decode("utf-8", "surrogateescape").strip()

    def run(self, *args: str, env: Optional[Dict[str, str]] = None, timeout: float = 240,
            prefix: Tuple[str, ...] = (), **_: Any) -> Result:
        """Run the loop as the user; note its peak memory, and wake it when an act stopped it."""
        argv = [*prefix, self.python, str(self.base / "tool" / "scalarloop.py"), *args]
        argv.insert(len(prefix) + 2 + sum(not word.startswith("-") for word in args[:1]), "loop.ini")
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            loop = subprocess.Popen(argv, cwd=self.root, env={**self.env, **(env or {})}, stdout=out,
                                    stdin=subprocess.DEVNULL, stderr=err, **as_user(self.uid))
            (self.base / "run" / "loop.pid").write_text(str(loop.pid))
            end = time.monotonic() + timeout
            while loop.poll() is None and time.monotonic() < end:
                self.look_at(loop.pid)
                time.sleep(.02)
            if loop.poll() is None:
                loop.kill()
                loop.wait()
            out.seek(0)
            err.seek(0)
            return Result(loop.returncode, *(file.read().decode("utf-8", "replace") for file in (out, err)))

    def look_at(self, pid: int) -> None:
        """Note the loop's peak memory so far (kB), and that it was stopped."""
        try:
            rows = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        facts = dict(row.split(":", 1) for row in rows if ":" in row)
        self.hwm = max(self.hwm, int(facts.get("VmHWM", "0 kB").split()[0]))
        if facts["State"].split()[0] in "Tt":
            self.stopped = True
            os.kill(pid, signal.SIGCONT)

    def snapshot(self) -> Dict[str, str]:
        """Return what no run may change, nor an agent: content, mode and time of every file."""
        facts = {}
        notes = [Path(folder, f"{self.base.name}-note") for folder in ("/tmp", "/dev/shm")]
        for path in [*self.base.rglob("*"), *(note for note in notes if note.exists())]:
            name = str(path.relative_to(self.base)) if path not in notes else str(path.parent)
            top = name.split("/")
            if top[0] in ("tmp", "run") or not stat.S_ISREG(path.lstat().st_mode) \
                    or name.startswith("project/.git/") and top[2] in ("objects", "refs", "logs") \
                    or name.startswith("project/.scalarloop/") and path.name != "planted":
                continue
            status = path.lstat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            facts[name] = f"{status.st_mode:o} {status.st_mtime_ns} {digest}"
        facts["HEAD"] = self.git("rev-parse", "HEAD") + self.git("symbolic-ref", "-q", "HEAD")
        refs = self.git("for-each-ref", "--format=%(refname) %(objectname)").splitlines()
        facts["refs"] = "\n".join(ref for ref in refs if "scalarloop" not in ref)
        return facts

    def leftovers(self) -> List[str]:
        """Return what a run left in the temporary folder."""
        return sorted(os.listdir(self.base / "tmp"))

    def processes(self) -> List[str]:
        """Return the processes that a run left."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if b"SCALARLOOP_TEST_YARD=" + os.fsencode(self.base) in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().decode("utf-8", "replace"))
            except OSError:
                continue
        return found

    def start_neighbour(self) -> None:
        """Start the user's other process: a server on every kind of socket, with a terminal."""
        self.neighbour = subprocess.Popen([self.python, "-c", NEIGHBOUR, str(self.base)], cwd="/",
                                          env={"PATH": self.env["PATH"]}, **as_user(self.uid))
        end = time.monotonic() + 20
        while not (self.base / "run" / "neighbour.json").exists():
            assert time.monotonic() < end and self.neighbour.poll() is None
            time.sleep(.01)

    def clear(self) -> None:
        """Stop the neighbour and remove every trace."""
        if self.neighbour:
            self.neighbour.kill()
            self.neighbour.wait()
        for folder in ("/tmp", "/dev/shm"):
            note = Path(folder, f"{self.base.name}-note")
            if note.exists():
                note.unlink()
        subprocess.run(["rm", "-rf", str(self.base)])


# ---- sieges

ALONE = {   # at portable these disturb the rest of a run: (exit codes of the run, of what follows)
    "d33_reach_the_loop.kill": (-9, 0), "d33_reach_the_loop.limit": (1, 0),
    "d34_write_outside.settings": (0, 2), "d34_write_outside.ledger_append": (4, 4),
    "d34_write_outside.ledger_rewrite": (0, 4), "d34_write_outside.store": (1, 1)}


class Siege:
    """One run of the loop under attack, and everything that was seen of it."""

    def __init__(self, user: str, level: str, turns: List[List[Threat]], **config: str):
        self.level, self.threats = level, [threat for turn in turns for threat in turn]
        self.yard = yard = Yard(user, level)
        self.config = config
        if level == "portable":
            yard.config["metric"]["network"] = "allow"
        yard.config["agent"].update(config)
        yard.config["holdout"] = {"command": f"{yard.python} holdout.py",
                                  "files": "data/labels.txt ~/labels.txt"}
        self.plan = [{who: list(dict.fromkeys(threat.act for threat in turn if who in threat.turns))
                      for who in ("agent", "metric")} for turn in turns]
        yard.plan(*self.plan, HONEST)
        yard.lay_out()
        yard.start_neighbour()
        self.before = yard.snapshot()
        self.result = yard.run()
        self.look()

    def look(self) -> None:
        """Look at the yard as the run left it."""
        yard = self.yard
        self.left_running, self.left_in_tmp = yard.processes(), yard.leftovers()
        after = yard.snapshot()
        self.changed = {name for name in {*self.before, *after} if self.before.get(name) != after.get(name)}
        self.heard = yard.heard.read_text().split()
        self.code_ran = (yard.base / "run" / "evil-ran").exists()
        self.records = yard.iterations() if (yard.state / "ledger.jsonl").exists() else []
        self.logs = self.read_logs()
        self.answers: Dict[str, Set[str]] = {}
        for line in "\n".join(self.logs.values()).splitlines():
            if line.startswith("ACT "):
                _, turn, act, answer = line.split(" ", 3)
                self.answers.setdefault(act, set()).add(answer)

    def read_logs(self) -> Dict[str, str]:
        """Return the text of every log of the run."""
        folder = self.yard.state / "iterations"
        return {str(path.relative_to(folder)): path.read_text(errors="replace")
                for path in sorted(folder.glob("*/*.log"))}

    def came_through(self, threat: Threat) -> bool:
        """Tell from outside whether an act reached what it was after."""
        kind, _, word = threat.proof.partition(":")
        if kind == "file":
            return any(name == word or name.startswith(word + "/") for name in self.changed)
        if kind == "heard":
            return any(line.endswith(word) for line in self.heard)
        if kind == "sees":
            return any(f"SEES {word}\n" in text for text in self.logs.values())
        if kind == "answer":
            return "ok" in self.answers.get(threat.act, ())
        if threat.act.endswith(".stop"):
            return self.yard.stopped
        return self.result.code != 0


HONEST: Dict[str, List[str]] = {"agent": [], "metric": []}


def besiege(user: str, level: str) -> Siege:
    """Play every act that leaves the rest of a run undisturbed at this level."""
    turns = [[threat for threat in turn if level != "portable" or threat.act not in ALONE]
             for turn in TURNS]
    return Siege(user, level, turns)
