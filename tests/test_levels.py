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

import ctypes
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import pytest

from conftest import ROOT, TOOL, Project, Result
from test_isolation import NOBODY, REFUSED, as_user, python_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")
LEVELS = ("portable", "landlock", "namespaces")
OLD_KERNEL = ctypes.CDLL(None).syscall(444, None, 0, 1) < 6     # no scope for signals and sockets
USERS = ("root", "ordinary")
KEPT = "keep metric.better"


class Threat(NamedTuple):
    """An act, what becomes of it at each level, how that shows, and the witness that answers for it.
    """

    act: str
    portable: str
    landlock: str
    namespaces: str
    proof: str
    says: str
    fact: str
    turns: str


OUTCOMES = {"P": "prevented", "D": "detected", "N": "not stopped", "R": "not stopped as root",
            "X": "refused"}


def read_table(text: str) -> List[List[Threat]]:
    """Return the turns of a table: `turn`, `of FILE FACT TURNS`, or `ACT OUTCOMES PROOF SAYS`.

    Outcomes stand for the three levels in order. Proof: `answer` (the act's own: nothing shows
    outside), `file:PATH` (changed), `heard:WORD` (by the neighbour), `sees:WORD` (by the metric),
    `run` (whether the run goes on unharmed).
    """
    turns: List[List[Threat]] = []
    for line in text.strip().splitlines():
        words = line.split(None, 3)
        if words == ["turn"]:
            turns.append([])
        elif words[0] == "of":
            file, fact, who = words[1:]
        else:
            levels = [OUTCOMES[letter] for letter in words[1]]
            turns[-1].append(Threat(f"{file}.{words[0]}", *levels, *words[2:], fact.strip("-"), who))
    return turns


TURNS = read_table("""
    turn
    of d33_reach_the_loop loop_protected both
    kill                NPP run         kills the loop
    stop                NPP run         stops the loop
    limit               NPP run         takes the loop's right to write files
    trace               RPP answer      traces the loop
    memory              RPP answer      writes the loop's memory
    environment         RPP answer      reads the loop's environment
    slow                NPP answer      slows the loop down (nice)
    pin                 NPP answer      pins the loop to a processor
    signal_neighbour    NPP answer      signals the user's other processes
    trace_neighbour     NPP answer      traces the user's other processes
    of d33_reach_the_loop - both
    spare_oneself       NPP answer      has the loop die first when memory runs out
    turn
    of d34_write_outside files_sealed both
    work_tree           NPP file:project/README         writes to the user's work tree
    git_config          NPP file:project/.git/config    plants programs in the user's .git/config
    git_hooks           NPP file:project/.git/hooks     plants hooks in the user's .git
    settings            DPP file:project/loop.ini       edits loop.ini
    state_folder        NPP file:project/.scalarloop/t/planted  writes to the state folder
    ledger_append       DPP run                         appends to the ledger
    ledger_rewrite      DPP run                         rewrites a line of the ledger
    store               DPP answer                      damages the private store
    tool                NPP file:tool/scalarloop.py     edits scalarloop.py
    dotfiles            NPP file:home/.bashrc           plants dotfiles in HOME
    dotfiles            NPP sees:git-settings           plants settings in HOME for the metric's git
    loops_own_scratch   NPP answer                      plants settings for the loop's own git calls
    note_in_tmp         NPP file:/tmp                   leaves notes for later runs in /tmp
    of d34_write_outside modes_sealed both
    modes               NNP file:project/data/mode.txt  changes modes of the user's files
    times               NNP file:project/data/time.txt  changes times of the user's files
    of d34_write_outside - both
    note_in_memory      NNP file:/dev/shm               leaves notes for later runs in /dev/shm
    user_site           PPP sees:user-site              plants code in HOME for the metric's Python
    of d34_write_outside - agent
    path_shim           PPP sees:shim                   plants a program for the metric's PATH
    cleanroom           PPP run                         rewrites a cleanroom before it is used
    turn
    of b22_read_secrets secrets_hidden both
    state_folder        NPP answer      reads the state folder
    key                 NPP answer      reads the ledger's key
    holdout_at_home     NPP answer      reads the holdout's files in HOME
    holdout_in_project  NPP answer      reads the holdout's files in the user's work tree
    holdout_in_git      NPP answer      reads the holdout's files from the user's .git
    of b22_read_secrets - agent
    own_folder_s_git    PPP answer      reads the holdout's files from the workspace's .git
    turn
    of d35_call_outside sockets_off both
    path_socket         NNP heard:path      has a server on a unix socket run a command
    abstract_socket     NPP heard:abstract  has a server on an abstract socket run a command
    of d35_call_outside network_off metric
    tcp                 XPP heard:metric-tcp  sends data over TCP where network = deny
    udp                 XPP heard:metric-udp  sends data over UDP where network = deny
    of d35_call_outside files_sealed both
    terminal            NPP heard:terminal  writes to the user's terminal
    turn
    of h50_exhaust daemons_killed both
    fork_bomb           PPP run         leaves a fork bomb running
    of h50_exhaust - both
    memory              NNN answer      uses up memory while its turn lasts
    disk                NNN answer      uses up the disk while its turn lasts
    log_lines           PPP run         floods the log line by line
    of h50_exhaust - agent
    log                 PPP run         floods the log with one line
    of h51_hold_on daemons_killed both
    hold_output         PPP run         holds its output open after its end
    turn
    of h51_hold_on - both
    locked_folders      PPP run         leaves folders that can't be deleted
    turn
    of d32_rewrite_rooms daemons_killed agent
    in_turn             PPP run         leaves a daemon that rewrites cleanrooms
    of d32_rewrite_rooms daemons_killed metric
    in_metric           PPP run         leaves a daemon behind in the metric's run
""")
HANGS = read_table("""
    turn
    of h51_hold_on - agent
    hang                PPP run         hangs and ignores SIGTERM
    turn
    of h51_hold_on - metric
    hang                PPP run         hangs and ignores SIGTERM in the metric's run
""")
ENVIRONMENT = read_table("""
    turn
    of environment - both
    python              PPP sees:PYTHONPATH     has PYTHONPATH set where the loop starts
    preload             PPP sees:LD_PRELOAD     has LD_PRELOAD set where the loop starts
    bash                PPP sees:BASH_ENV       has BASH_ENV set where the loop starts
    node                PPP sees:NODE_OPTIONS   has NODE_OPTIONS set where the loop starts
    git                 PPP sees:GIT_CONFIG     has GIT_* set where the loop starts
    path                PPP sees:PATH           has a relative PATH where the loop starts
""")
THREATS: Dict[str, Dict[str, str]] = {
    threat.says: {level: getattr(threat, level) for level in LEVELS}
    for turn in [*TURNS, *HANGS, *ENVIRONMENT] for threat in turn}

METRIC = """
    import os, pathlib, shutil, subprocess, sys
    os.makedirs("build", exist_ok=True)
    pathlib.Path("build/out").write_text("x")
    git = subprocess.run(["git", "config", "--get", "test.planted"], stdout=subprocess.PIPE)
    for word, seen in (("user-site", hasattr(sys, "planted")), ("shim", shutil.which("sl-shim")),
                       ("git-settings", git.stdout)):
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
        self.config["metric"].update(command=f"{self.python} metric.py", env="SCALARLOOP_TEST_YARD")
        self.config["loop"]["patience"] = 1000

    def lay_out(self) -> None:
        """Write the project and the home, commit, and give all of it to the user."""
        for path, text in (("src/value.txt", "1000\n"), ("src/prog.py", "pass\n"), ("README", "x\n"),
                           ("metric.py", METRIC), ("holdout.py", HOLDOUT), ("data/mode.txt", "x\n"),
                           ("data/time.txt", "x\n"), ("data/labels.txt", "the hidden answer\n"),
                           (".gitignore", "__pycache__/\nbuild/\nloop.ini\n"),
                           *self.config.pop("source", {}).items()):
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
        loop = subprocess.Popen(argv, cwd=self.root, env={**self.env, **(env or {})},
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                **as_user(self.uid))
        (self.base / "run" / "loop.pid").write_text(str(loop.pid))
        end = time.monotonic() + timeout
        while loop.poll() is None and time.monotonic() < end:
            self.look_at(loop.pid)
            time.sleep(.02)
        if loop.poll() is None:
            loop.kill()
        out, err = loop.communicate()       # what it prints fits into a pipe
        return Result(loop.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))

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

Plan = Dict[str, List[str]]
HONEST: Plan = {"agent": ["d32_rewrite_rooms.look_for_survivors"], "metric": []}
ALONE = {   # at portable these break the run: how it, the next start and `verify` end
    "d33_reach_the_loop.kill": (-9, 0, 0), "d33_reach_the_loop.limit": (1, 0, 0),
    "d34_write_outside.settings": (0, 2, 4), "d34_write_outside.ledger_append": (4, 4, 4),
    "d34_write_outside.ledger_rewrite": (4, 4, 4), "d34_write_outside.store": (1, 0, 0)}
BY_BOTH = [("d33_reach_the_loop.kill", "portable"), ("d33_reach_the_loop.limit", "portable")]
CHANGED = {     # what the acts that are not stopped may change, and nothing else
    "portable": ("project/README", "project/.git/config", "project/.git/hooks", "project/data/mode.txt",
                 "project/data/time.txt", "project/.scalarloop/t/planted", "tool/scalarloop.py", "/tmp",
                 "home/.bashrc", "home/.gitconfig", "home/.local", "home/.npm", "/dev/shm"),
    "landlock": ("project/data/mode.txt", "project/data/time.txt", "/dev/shm"), "namespaces": ()}


def plan_of(turn: List[Threat]) -> Plan:
    """Return who plays which act, each once."""
    return {who: list(dict.fromkeys(threat.act for threat in turn if threat.turns in (who, "both")))
            for who in ("agent", "metric")}


class Siege:
    """A run of the loop under attack, or several, and everything that was seen of it."""

    checked: Result

    def __init__(self, user: str, level: str, turns: List[List[Threat]],
                 changes: Optional[Dict[str, Dict[str, Any]]] = None, **run: Any):
        self.level, self.turns = level, [turn for turn in turns if turn]
        self.yard = yard = Yard(user, level)
        YARDS.append(yard)
        yard.config["metric"]["network"] = "allow" if level == "portable" else "deny"
        yard.config["holdout"] = {"command": f"{yard.python} holdout.py",
                                  "files": "data/labels.txt ~/labels.txt"}
        for section, keys in (changes or {}).items():
            yard.config.setdefault(section, {}).update(keys)
        yard.plan(*map(plan_of, self.turns), HONEST)
        yard.lay_out()
        yard.start_neighbour()
        self.before = yard.snapshot()
        self.results = [yard.run(**run)]
        self.look()

    def again(self, *args: str, plans: Sequence[Plan], **run: Any) -> None:
        """Start once more, with another plan."""
        self.yard.plan(*plans)
        self.results.append(self.yard.run(*args, **run))
        self.look()

    def look(self) -> None:
        """Look at the yard as the run left it."""
        yard = self.yard
        self.left_running, self.left_in_tmp = yard.processes(), yard.leftovers()
        after = yard.snapshot()
        self.changed = {name for name in {*self.before, *after} if self.before.get(name) != after.get(name)}
        self.heard = yard.heard.read_text().split()
        self.code_ran = (yard.base / "run" / "evil-ran").exists()
        self.ledger = yard.ledger() if (yard.state / "ledger.jsonl").exists() else []
        self.records = [record for record in self.ledger if record["type"] == "iteration"]
        folder = yard.state / "iterations"
        self.logs = {str(path.relative_to(folder)): path.read_text(errors="replace")
                     for path in sorted(folder.glob("*/*.log"))}
        self.answers: Dict[str, Set[str]] = {}
        for line in "\n".join(self.logs.values()).splitlines():
            if line.startswith("ACT "):
                self.answers.setdefault(line.split(" ")[2], set()).add(line.split(" ", 3)[3])

    def fact(self, name: str) -> str:
        """Return whether the gate's witness saw a protection hold."""
        return self.ledger[0]["isolation"]["facts"][name]["held"]

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
        at = next(n for n, turn in enumerate(self.turns) if threat.act in [row.act for row in turn]
                  and threat.turns in ("both", turn[0].turns) or threat in turn)
        record = self.records[at] if at < len(self.records) else None
        late = threat.act.endswith(".hang") and threat.turns == "metric"
        expected = "timeout metric.timeout" if late else KEPT
        return self.codes() != [0] or not record \
            or f"{record['verdict']} {record['reason']}" != expected

    def codes(self) -> List[int]:
        """Return how each start ended."""
        return [result.code for result in self.results]

    def outcome(self, threat: Threat) -> str:
        """Return what became of an act."""
        if self.codes() == [2]:
            return "refused"
        if not self.came_through(threat):
            return "prevented"
        said = {2, 4} & set(self.codes()) or any(row["verdict"] == "void" for row in self.records)
        return "detected" if said else "not stopped"


def besiege(user: str, level: str) -> Siege:
    """Play every act that leaves the rest of a run undisturbed at this level."""
    return Siege(user, level, [[threat for threat in turn if stage_of(threat, level) == "siege"]
                               for turn in TURNS])


def act_alone(user: str, level: str, act: str) -> Siege:
    """Play one act that breaks the run, by the agent and (where it can) by the metric; start again."""
    threat = next(threat for turn in TURNS for threat in turn if threat.act == act)
    siege = Siege(user, level, [[threat._replace(turns="agent")]])
    if (act, level) in BY_BOTH:
        siege.again(plans=[{"agent": [], "metric": [act]}, HONEST])
    siege.again(plans=[HONEST, HONEST])
    siege.results.append(siege.yard.run("verify"))
    return siege


def deny(user: str, level: str) -> Siege:
    """Ask for a metric without network, whether the level has that or not."""
    return Siege(user, level, [], {"metric": {"network": "deny"}})


def hang(user: str, level: str) -> Siege:
    """Outlast the time limits, with SIGTERM ignored."""
    return Siege(user, level, HANGS, {"agent": {"timeout": "2s"}, "metric": {"timeout": "2s"}})


YARDS: List[Yard] = []
SHOWS: Dict[Tuple[str, str, str], "Future[Siege]"] = {}
POOL = ThreadPoolExecutor(max(2, os.cpu_count() or 2))


def stage_of(threat: Threat, level: str) -> str:
    """Return the run that plays an act at a level."""
    if any(threat in turn for turn in HANGS):
        return "hang"
    if any(threat in turn for turn in ENVIRONMENT):
        return "environment"
    if level == "portable" and threat.act in ALONE:
        return threat.act
    return "deny" if getattr(threat, level) == "refused" else "siege"


def begin(stage: str, user: str, level: str) -> None:
    """Have a run played by a thread of its own, unless it is already."""
    if (stage, user, level) not in SHOWS:
        job = {"siege": besiege, "deny": deny, "hang": hang, "environment": poison, "honest": work}
        SHOWS[stage, user, level] = POOL.submit(job[stage], user, level) if stage in job \
            else POOL.submit(act_alone, user, level, stage)


def watch(stage: str, user: str, level: str) -> Siege:
    """Return a run as it ended; skip loudly what can't be had here."""
    if user == "root" and os.geteuid() != 0:
        pytest.skip("NOT ROOT: runs of root UNTESTED")
    begin(stage, user, level)
    siege = SHOWS[stage, user, level].result()
    if siege.codes() == [2] and "can't be had on this machine" in siege.results[0].err:
        pytest.skip(f"NO {level} HERE: UNTESTED ({siege.results[0].err.strip()})")
    return siege


@pytest.fixture(scope="module", autouse=True)
def all_at_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Begin every run that the selected tests need, and remove their yards at the end."""
    for item in request.session.items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if item.fspath == request.fspath and {"level", "user"} <= set(given) \
                and (given["user"] != "root" or os.geteuid() == 0):
            stage = stage_of(given["threat"], given["level"]) if "threat" in given else given.get("stage")
            if stage:
                begin(stage, given["user"], given["level"])
    yield
    POOL.shutdown()
    for yard in YARDS:
        yard.clear()


every_level = pytest.mark.parametrize("level", LEVELS)
both_users = pytest.mark.parametrize("user", USERS)


@both_users
@every_level
@pytest.mark.parametrize("threat", [pytest.param(threat, id=threat.says.replace(" ", "_"))
                                    for turn in [*TURNS, *HANGS, *ENVIRONMENT] for threat in turn])
def test_threat(threat: Threat, level: str, user: str) -> None:
    siege = watch(stage_of(threat, level), user, level)
    expected = getattr(threat, level)
    if expected.endswith("as root"):
        expected = "not stopped" if user == "root" else "prevented"
    seen = siege.answers.get(threat.act, set())
    if level == "landlock" and OLD_KERNEL and expected == "prevented" and threat.fact \
            and siege.fact(threat.fact) != "yes":
        pytest.skip(f"AN OLD KERNEL: {threat.fact} is not in force, and the gate says so")
    assert siege.outcome(threat) == expected, (seen, siege.codes(), siege.results)
    assert not any(answer.startswith("broken") for answer in seen), seen
    if expected == "prevented" and threat.proof == "answer":
        assert seen and seen <= REFUSED | {"ENOENT"}, seen
    if threat.act in ALONE and level == "portable":
        codes, (first, after, verified) = siege.codes(), ALONE[threat.act]
        starts = 2 if (threat.act, level) in BY_BOTH else 1
        assert codes == [first] * starts + [after, verified], siege.results


@both_users
@every_level
@pytest.mark.parametrize("stage", ["siege", "hang", "environment", "honest"])
def test_the_run_goes_on_and_nothing_is_left(stage: str, level: str, user: str) -> None:
    siege = watch(stage, user, level)
    yard, kept = siege.yard, [row for row in siege.records if row["commit"]]
    assert set(siege.codes()) == {0}, siege.results
    assert len(siege.records) == len(siege.turns) + len(siege.results)
    assert siege.records[-1]["verdict"] == "keep" and siege.records[-1]["value"] == 1000 - len(kept)
    for row in kept:
        assert row["value"] == int(yard.git("show", f"{row['commit']}:src/value.txt"))
    branch = yard.git("log", "--reverse", "--format=%H", "main..scalarloop/t").split()
    assert branch == [row["commit"] for row in kept]
    assert yard.git("diff", "--name-only", "main", "scalarloop/t", "--", ":!src") == ""
    strange = {name for name in siege.changed if not name.startswith(CHANGED[level] or ("\0",))}
    assert strange == set()
    assert siege.left_in_tmp == [] and siege.left_running == []
    assert siege.answers["d32_rewrite_rooms.look_for_survivors"] == {"ok"}
    assert not siege.code_ran
    assert yard.hwm < 64 << 10, "kB of memory at the loop's peak"
    assert all(len(text) < 3 << 20 for text in siege.logs.values())
    verified = yard.run("verify")
    assert verified.code == 0, verified


# ---- the environment of whoever starts the loop

NAMES = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TERM", "TMPDIR", "XDG_CACHE_HOME",
         "PYTHONDONTWRITEBYTECODE", "PYTHONNOUSERSITE", "SCALARLOOP_SEED", "SCALARLOOP_TEST_YARD", "PWD",
         "LC_ALL", "LC_CTYPE", "_", "SHLVL", "OLDPWD"}
SHOWING_METRIC = """
    import json, os, pathlib, subprocess, sys
    print("NAMES", json.dumps(sorted(os.environ)), flush=True)
    for argv in (["bash", "-c", ":"], ["node", "-e", "0"], ["git", "config", "--get", "test.planted"],
                 ["git", "rev-parse", "--absolute-git-dir"], [sys.executable, "src/prog.py"]):
        try:
            done = subprocess.run(argv, stdout=subprocess.PIPE)
        except FileNotFoundError:
            continue
        text = done.stdout.decode().strip()
        if "planted" in argv[-1] and text or "git-dir" in argv[-1] and not text.startswith(os.getcwd()):
            print("SEES GIT_CONFIG")
        print(text, flush=True)
    if not all(map(os.path.isabs, os.environ["PATH"].split(":"))):
        print("SEES PATH")
    print("METRIC value=%s" % pathlib.Path("src/value.txt").read_text().strip())
"""
PRELOAD = """
#include <stdio.h>
#include <string.h>
#include <unistd.h>
__attribute__((constructor)) static void seen(void) {
    char folder[4096];
    if (getcwd(folder, sizeof folder) && strstr(folder, "/room-")) { puts("SEES LD_PRELOAD"); fflush(stdout); }
}
"""


def poison(user: str, level: str) -> Siege:
    """Start the loop in an environment that makes every Python, shell, node and git run something.

    What it makes them run speaks only inside a cleanroom: the loop's own Python runs it too.
    """
    folder = Path(tempfile.mkdtemp(prefix="sl-poison-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "sitecustomize.py").write_text("import os\n'/room-' in os.getcwd() and print('SEES PYTHONPATH')\n")
    (folder / "bash").write_text("case $PWD in */room-*) echo SEES BASH_ENV;; esac\n")
    (folder / "node.js").write_text("if (process.cwd().includes('/room-')) console.log('SEES NODE_OPTIONS')\n")
    (folder / "preload.c").write_text(PRELOAD)
    env = {"PYTHONPATH": str(folder), "BASH_ENV": str(folder / "bash"), "ENV": str(folder / "bash"),
           "NODE_OPTIONS": f"--require {folder}/node.js", "GIT_CONFIG_COUNT": "1", "GIT_DIR": str(folder),
           "GIT_CONFIG_KEY_0": "test.planted", "GIT_CONFIG_VALUE_0": "yes", "GIT_WORK_TREE": str(folder),
           "GIT_INDEX_FILE": str(folder / "index"), "GIT_EXTERNAL_DIFF": "false"}
    if shutil.which("gcc"):
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "preload.so", folder / "preload.c"], check=True)
        env["LD_PRELOAD"] = str(folder / "preload.so")
    try:
        yard_path = os.pathsep.join([".", "src", "", "/usr/local/bin", "/usr/bin", "/bin"])
        env["PATH"] = yard_path
        siege = Siege(user, level, [], {"metric": {"git": "yes"}, "source": {"metric.py": SHOWING_METRIC}},
                      env=env)
        siege.again("--more", "1", plans=[HONEST, HONEST], env=env)
        siege.checked = siege.yard.run("check", env=env)
        return siege
    finally:
        shutil.rmtree(folder)


@both_users
@every_level
@pytest.mark.parametrize("stage", ["environment"])
def test_the_metric_s_environment_is_an_allow_list(stage: str, level: str, user: str) -> None:
    siege = watch(stage, user, level)
    shown = [json.loads(line[6:]) for text in siege.logs.values() for line in text.splitlines()
             if line.startswith("NAMES ")]
    assert shown and all(set(names) <= NAMES for names in shown), shown


# ---- honest twins

HONEST_METRIC = """
    import http.server, os, pathlib, py_compile, subprocess, sys, threading, urllib.request
    subprocess.run(["make", "-s"], check=True)
    subprocess.run([sys.executable, "src/prog.py"], check=True)
    os.makedirs("dist", exist_ok=True)
    pathlib.Path("dist/bundle.txt").write_text(pathlib.Path("src/value.txt").read_text())
    assert "__pycache__" in py_compile.compile("holdout.py", doraise=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open("http://127.0.0.1:%d/dist/bundle.txt" % server.server_port, timeout=20).read()
    print("METRIC value=%s" % subprocess.run(["./value", text], stdout=subprocess.PIPE).stdout.decode())
"""
MAKEFILE = """
value: value.c
\tgcc -o value value.c
"""
C = """
    #include <stdio.h>
    int main(int count, char **words) { (void) count; fputs(words[1], stdout); return 0; }
"""
TOOLS = "node npm pytest venv make sqlite git multiprocessing server devices".split()


def network_of(user: str, level: str) -> str:
    """Deny the network to one metric with a server: in namespaces it has a localhost of its own."""
    return "deny" if (user, level) == ("ordinary", "namespaces") else "allow"


def work(user: str, level: str) -> Siege:
    """Let honest agents use their tools, and a metric build, serve and leave files in its tree."""
    tools = [Threat(f"honest_tools.{name}", *[""] * 6, "agent") for name in TOOLS]
    tools.append(Threat("d35_call_outside.tcp", *[""] * 6, "both"))
    return Siege(user, level, [tools], {
        "metric": {"network": network_of(user, level)},
        "source": {"metric.py": HONEST_METRIC, "Makefile": MAKEFILE, "value.c": C,
                   ".gitignore": "__pycache__/\nbuild/\ndist/\nvalue\nloop.ini\n"}})


@both_users
@every_level
@pytest.mark.parametrize("stage", ["honest"])
def test_honest_tools_work(stage: str, level: str, user: str) -> None:
    siege = watch(stage, user, level)
    if network_of(user, level) == "deny":
        siege.answers["d35_call_outside.tcp"].discard("ECONNREFUSED")
    broken = {act: seen for act, seen in siege.answers.items() if seen != {"ok"}}
    absent = [act for act, seen in broken.items() if seen == {"ENOENT"}]
    for act in absent:
        broken.pop(act)
        warnings.warn(f"{act} IS NOT INSTALLED for {user}: untested", stacklevel=1)
    assert not broken
    assert "agent-tcp" in siege.heard, "an agent needs the network"
    assert ("metric-tcp" in siege.heard) is (network_of(user, level) == "allow")


# ---- what is said of it

SAID = {    # in `check`: what is in force in words, then what is not
    "portable": (["what it leaves running is dead when the turn ends"],
                 ["files_sealed, that nothing outside its own folders can be written (seen: append ok",
                  "modes_sealed, that no modes or times can be changed there (seen: chmod ok",
                  "loop_protected, that the loop can't be signalled, limited or traced (seen: kill ok",
                  "secrets_hidden, that state folder, key and holdout can't be read (seen: read ok",
                  "sockets_off, that services on unix sockets can't be reached (seen: path ok"]),
    "landlock": (["nothing outside its own folders can be written", "the network is off for the metric",
                  "the loop can't be signalled, limited or traced", "honest work succeeds",
                  "state folder, key and holdout can't be read",
                  "what it leaves running is dead when the turn ends"],
                 ["modes_sealed, that no modes or times can be changed there (seen: chmod ok",
                  "sockets_off, that services on unix sockets can't be reached (seen: path ok"]),
    "namespaces": (["nothing outside its own folders can be written", "no modes or times can be changed there",
                    "the loop can't be signalled, limited or traced", "honest work succeeds",
                    "state folder, key and holdout can't be read", "the network is off for the metric",
                    "services on unix sockets can't be reached",
                    "what it leaves running is dead when the turn ends"], [])}
ERRNOS = {"portable": "append ok", "landlock": "append EACCES", "namespaces": "append EROFS"}


@both_users
@every_level
@pytest.mark.parametrize("stage", ["environment"])
def test_check_names_the_level_and_its_facts(stage: str, level: str, user: str) -> None:
    checked = watch(stage, user, level).checked
    if level == "landlock" and OLD_KERNEL:
        pytest.skip("AN OLD KERNEL: less is in force")
    lines = [line for line in checked.out.splitlines() if "isolation" in line]
    assert checked.code == 0 and f" {level}: " in lines[0], checked
    held, open_ = SAID[level]
    assert all(words in lines[0] for words in held), lines
    notices = "\n".join(line for line in lines[1:] if "not in force" in line)
    assert all("not in force: " + words in notices for words in open_), lines
    assert len(notices.splitlines()) == len(open_)


@both_users
@every_level
@pytest.mark.parametrize("stage", ["environment"])
def test_facts_and_errnos_are_recorded_at_every_start(stage: str, level: str, user: str) -> None:
    siege = watch(stage, user, level)
    records = [record["isolation"] for record in siege.ledger if record["type"] in ("start", "resume")]
    assert len(records) == 2
    for record in records:
        assert record["level"] == level
        assert record["facts"]["files_sealed"]["seen"].startswith(ERRNOS[level])
        assert all(fact["seen"] for name, fact in record["facts"].items() if name != "network_off"
                   or level != "portable"), record["facts"]
    assert [{name: fact["held"] for name, fact in record["facts"].items()} for record in records] \
        == [{name: fact["held"] for name, fact in records[0]["facts"].items()}] * 2
    assert siege.results[1].out.count(f"isolation {level}") == 1


# ---- machines that refuse

REFUSE = r"""
import ctypes, os, struct, sys
numbers = {"x86_64": {"unshare": 272, "landlock": 444}, "aarch64": {"unshare": 97, "landlock": 444}}
libc = ctypes.CDLL(None, use_errno=True)
code = [(0x20, 0, 0, 0)]
for name, answer in (("unshare", 1), ("landlock", 38)):
    if name in sys.argv[1].split(","):
        code += [(0x15, 0, 1, numbers[os.uname().machine][name]), (6, 0, 0, 0x50000 | answer)]
code += [(6, 0, 0, 0x7fff0000)]
text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
program = struct.pack("@HP", len(code), ctypes.addressof(text))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0, ctypes.get_errno()
os.execv(sys.argv[2], sys.argv[2:])
"""
NO_MORE = "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -sys_admin " \
          "--inh-caps -sys_admin \"$@\""
LIMIT = ("unshare", "-Ur", "sh", "-c", NO_MORE, "sh")


def refusing(yard: Yard, *names: str) -> Tuple[str, ...]:
    """Return a prefix after which the kernel refuses these, as a container's filter does."""
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("no table of system calls for this machine")
    return (yard.python, "-c", REFUSE, ",".join(names))


@pytest.fixture
def yard(request: pytest.FixtureRequest, user: str) -> Iterator[Yard]:
    """Return a yard whose agent is honest, not yet laid out."""
    if user == "root" and os.geteuid() != 0:
        pytest.skip("NOT ROOT: runs of root UNTESTED")
    made = Yard(user, "auto")
    made.plan(HONEST)
    yield made
    made.clear()


@both_users
def test_a_machine_without_user_namespaces(yard: Yard, user: str) -> None:
    """Inside a user namespace whose limit is 0, without the right to do otherwise: really refused."""
    if not shutil.which("setpriv") or subprocess.run([*LIMIT, "true"], **as_user(yard.uid)).returncode:
        pytest.skip("NO unshare or setpriv HERE: the refusal of namespaces UNTESTED")
    yard.config["isolation"]["require"] = "namespaces"
    yard.lay_out()
    result = yard.run(prefix=LIMIT)
    assert result.code == 2 and "namespaces can't be had on this machine" in result.err, result
    assert "user namespaces are refused here" in result.err
    assert not (yard.root / ".scalarloop").exists()
    yard.config["isolation"].pop("require")
    yard.save_config()
    result = yard.run(prefix=LIMIT)
    assert result.code == 0, result
    started = yard.ledger()[0]["isolation"]
    assert started["level"] == "landlock" and "user namespaces are refused here" in started["notes"][0]
    assert yard.verdicts() == [KEPT]


@both_users
def test_a_container_that_filters_system_calls(yard: Yard, user: str) -> None:
    """Without unshare landlock is left; without that too, portable: each is said, none is claimed."""
    yard.lay_out()
    for names, level in ((("unshare",), "landlock"), (("unshare", "landlock"), "portable")):
        result = yard.run("check", prefix=refusing(yard, *names))
        assert result.code == 0 and f"{level}: " in result.out, result
        assert "no better level: namespaces: unshare: Operation not permitted" in result.out
        assert ("no better level: landlock: landlock: Function not implemented" in result.out) \
            is (level == "portable")
    for word, names in (("namespaces", ("unshare",)), ("landlock", ("unshare", "landlock")),
                        ("files_sealed", ("unshare", "landlock"))):
        yard.config["isolation"]["require"] = word
        yard.save_config()
        result = yard.run(prefix=refusing(yard, *names))
        assert result.code == 2 and word in result.err, result
        assert not (yard.root / ".scalarloop").exists()


@both_users
def test_required_facts_that_portable_lacks(yard: Yard, user: str) -> None:
    lacking = ("files_sealed", "loop_protected", "secrets_hidden", "sockets_off", "modes_sealed")
    yard.config["isolation"].update(level="portable", require="daemons_killed " + " ".join(lacking))
    yard.lay_out()
    result = yard.run()
    assert result.code == 2 and all(f"{fact}: " in result.err for fact in lacking), result
    assert "append ok" in result.err and "daemons_killed" not in result.err
    assert not (yard.root / ".scalarloop").exists() and yard.leftovers() == []


# ---- the user's own isolation

@both_users
def test_external_is_the_user_s_claim(yard: Yard, user: str) -> None:
    """A runner gets its placeholders filled, and nobody says more than that it was asked for."""
    runner = yard.base / "run" / "runner"
    runner.write_text(f"#!/bin/sh\necho \"$1 $2 $3\" >> {yard.base}/run/ran\nshift 3\nexec \"$@\"\n")
    runner.chmod(0o755)
    yard.config["metric"]["runner"] = f"{runner} {{cleanroom}} {{cwd}} {{tmp}}"
    yard.config["guard.one"] = {"command": f"{yard.python} -c pass"}
    yard.config["isolation"]["level"] = "external"
    yard.lay_out()
    checked, result = yard.run("check"), yard.run()
    assert result.code == 0 and yard.verdicts() == [KEPT], result
    ran = [line.split() for line in (yard.base / "run" / "ran").read_text().splitlines()]
    assert len(ran) > 8 and all(room == cwd.rstrip("/") and "/room-" in room and scratch.startswith(os.path.dirname(room))
                                for room, cwd, scratch in ran), ran
    assert yard.ledger()[0]["isolation"]["level"] == "external"
    lines = [line for line in checked.out.splitlines() if "isolation" in line]
    assert checked.code == 0 and "not witnessed" in lines[0], lines
    assert "dead when the turn ends" not in lines[0].split("agent")[0], "of the runner nothing is known"


def test_external_needs_a_runner(project: Project) -> None:
    project.config["isolation"]["level"] = "external"
    result = project.run("check")
    assert result.code == 2 and "external needs [metric] runner" in result.err


@pytest.mark.parametrize("user", ["root"])
def test_a_runner_that_is_another_user(yard: Yard, user: str) -> None:
    """As with `sudo -u bench`: the candidate's code has no right to anything of the loop's user."""
    if not shutil.which("setpriv"):
        pytest.skip("NO setpriv HERE: a runner that is another user UNTESTED")
    yard.python = python_of(NOBODY)
    yard.config["metric"].update(runner=f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --",
                                 command=f"{yard.python} metric.py")
    yard.config["isolation"]["level"] = "external"
    yard.config["source"] = {"metric.py": METRIC.replace('"build"', 'os.environ["TMPDIR"] + "/build"')
                             .replace('"build/out"', 'os.environ["TMPDIR"] + "/build/out"')}
    acts = ["d33_reach_the_loop.kill", "d34_write_outside.work_tree", "d34_write_outside.dotfiles",
            "d34_write_outside.ledger_append", "b22_read_secrets.key", "b22_read_secrets.state_folder"]
    yard.plan({"agent": [], "metric": acts}, HONEST)
    yard.lay_out()
    (yard.base / "key").chmod(0o600)
    yard.base.chmod(0o711)
    before = yard.snapshot()
    result = yard.run()
    assert result.code == 0 and yard.verdicts() == [KEPT, KEPT], result
    text = (yard.state / "iterations" / "0001" / "metric.log").read_text()
    assert all(f"ACT metric {act} E" in text for act in acts) and " ok\n" not in text, text
    assert yard.snapshot() == before and yard.leftovers() == [] and yard.processes() == []


# ---- more of the same

@pytest.mark.slow
@both_users
@every_level
def test_five_gigabytes_of_output(level: str, user: str) -> None:
    if user == "root" and os.geteuid() != 0:
        pytest.skip("NOT ROOT: runs of root UNTESTED")
    flood = next(threat for turn in TURNS for threat in turn if threat.act == "h50_exhaust.log")
    siege = Siege(user, level, [[flood]], {"agent": {"timeout": "5m"}}, env={"SCALARLOOP_TEST_FLOOD": "5000"})
    assert siege.codes() == [0] and [row["verdict"] for row in siege.records] == ["keep", "keep"]
    assert siege.yard.hwm < 64 << 10 and all(len(text) < 3 << 20 for text in siege.logs.values())
    assert siege.answers["h50_exhaust.log"] == {"ok"}
    siege.yard.clear()


@pytest.mark.slow
@both_users
@pytest.mark.parametrize("level", ["landlock", "namespaces"])
def test_out_of_memory_the_agent_goes_first(yard: Yard, level: str, user: str) -> None:
    """In a control group that holds the loop and a third of what the agent asks for."""
    groups = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    parent = next((group for group in groups if (group / "cgroup.procs").exists()), None)
    group = (parent or groups[0]) / f"scalarloop-test-{os.getpid()}-{level}-{user}"
    limits = ("memory.limit_in_bytes", "memory.max")
    try:
        group.mkdir()
        next(group / name for name in limits if (group / name).exists()).write_text(str(200 << 20))
        os.chown(group / "cgroup.procs", yard.uid, -1)
    except (OSError, StopIteration):
        pytest.skip("NO control group for memory HERE: what the kernel kills first UNTESTED")
    try:
        yard.config["isolation"]["level"] = level
        yard.plan({"agent": ["h50_exhaust.too_much_memory"], "metric": []}, HONEST)
        yard.lay_out()
        enter = ("sh", "-c", f"echo $$ > {group}/cgroup.procs && exec \"$@\"", "sh")
        result = yard.run(prefix=enter)
        assert result.code == 0 and yard.verdicts() == [KEPT, KEPT], result
        log = (yard.state / "iterations" / "0001" / "agent.log").read_text()
        assert "asking" in log and "got it" not in log
    finally:
        group.rmdir()
