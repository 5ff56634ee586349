#!/usr/bin/env python3
"""scalarloop: run an untrusted coding agent against one sealed number; keep what is truly better.

    python scalarloop.py loop.ini            run, or go on with what was interrupted
    python scalarloop.py check loop.ini      the gate alone, as a table
    python scalarloop.py verify loop.ini     re-check the record of a run (--replay: measure again)
    python scalarloop.py status loop.ini     where a run stands
    python scalarloop.py prompt loop.ini     the exact next prompt

The pipeline, one direction only:

    user's repo --base commit--> store --incumbent--> workspace --census--> candidate
                                                    (agent edits here)   (in-scope bytes only)
    candidate --checkout--> cleanroom --number--> decide --keep--> branch in the user's repo

The agent is an untrusted oracle. The one thing read from it is a line that begins with
SCALAR_LOOP_GIVE_UP; everything else that it says is logged and ignored. What it did is read from
its workspace by the loop's own walk (the census), never from a git index that it could write.

Trust boundaries
  agent       may change its workspace and a private temporary folder. A change outside the scope,
              or of anything sealed, rejects the whole iteration.
  candidate   only the bytes of regular in-scope files reach the store, and the cleanroom is
              written from the store, hashed after it was written, and inspected after every run.
  metric      runs in the cleanroom with an environment from an allow-list. With `produce` the
              candidate's code never enters the process that prints the number.
  user        the work tree, HEAD, index, config and hooks are never written: only the result
              branch and refs/scalarloop/<name>/ledger are, at a keep and at the stop.
  record      ledger.jsonl is a hash chain, fsync'ed before it is acted on, anchored in every kept
              commit and in a ref of the user's repo.

Files, in .scalarloop/<name>/ beside loop.ini
  ledger.jsonl   the record             store.git    the loop's private repository
  iterations/    prompts, logs, diffs   lock         held while a loop runs
Workspace and cleanrooms live in a private temporary folder and are rebuilt at will.

Exit codes: 0 finished, 1 failed, 2 refused (nothing was changed), 3 paused for a check-in,
4 the integrity of the record is broken, 130 interrupted (start again to resume).

A map of this file, each section using only names above it: errors; verdicts and reasons; config;
text and files; processes; isolation; git; paths and scope; trees on disk; census and seal; metric;
decision; ledger; state; agent; terminal; gate; loop; set-up; run and resume; verify; command line.

Licence: MIT. Copyright (c) the scalarloop authors. Permission is hereby granted, free of charge, to
any person obtaining a copy of this software, to deal in it without restriction, provided that this
notice stays with it. It is provided "as is", without warranty of any kind.
"""
from __future__ import annotations

import contextlib
import difflib
import enum
import errno
import fcntl
import fnmatch
import functools
import hashlib
import hmac
import io
import json
import math
import mmap
import operator
import os
import re
import select
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
from collections import deque
from dataclasses import asdict, dataclass, field, fields, replace
from typing import (Any, Callable, Deque, Dict, FrozenSet, Iterable, Iterator, List, Mapping,
                    NamedTuple, Optional, Pattern, Protocol, Sequence, Set, Tuple, Union)

__version__ = "0.1.0"

GIVE_UP = "SCALAR_LOOP_GIVE_UP"
LEDGER_VERSION = 1
LOG_CAP = 1 << 20           # bytes kept of the head, and of the tail, of every log
CHUNK = 1 << 20
LONGEST_LINE = 1 << 16      # bytes; nothing longer can be a METRIC line
DEEPEST = 200               # folders above a new file
MOST_MATCHES = 100          # matching lines kept of a log
TERM_GRACE = 2.0            # seconds between SIGTERM and SIGKILL
LARGEST, TINIEST = sys.float_info.max, sys.float_info.min
CENSUS_CAP = 250_000        # entries an agent may add before its census is called off


# ══ errors ═══════════════════════════════════════════════════════════════════════════════════════

class ScalarLoopError(Exception):
    """Stop the loop with one clear line; the exit code belongs to the class."""

    exit_code = 1


class Refused(ScalarLoopError):
    """A precondition does not hold; nothing was changed."""

    exit_code = 2


class ConfigError(Refused):
    """loop.ini can't be used; carries every problem that was found, a line each."""

    def __init__(self, problems: Sequence[str]):
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        super().__init__("\n".join([*problems[:20], *more]))


class RecordBroken(ScalarLoopError):
    """Ledger, branch or anchor are not what this loop wrote."""

    exit_code = 4


class StoreDamaged(ScalarLoopError):
    """The private store lost or changed an object; the run can't go on from it."""


class Interrupted(ScalarLoopError):
    """A signal asked the loop to stop; the iteration under way is dropped."""

    exit_code = 130


class CensusError(Exception):
    """A tree can't be taken stock of; `reason` says why. Never leaves the loop section."""

    def __init__(self, reason: "Reason", path: bytes = b""):
        super().__init__(reason.value)
        self.reason, self.path = reason, path


# ══ verdicts and reasons ═════════════════════════════════════════════════════════════════════════

class Verdict(str, enum.Enum):
    """How an iteration ended. Only KEEP moves the incumbent."""

    KEEP = "keep"
    DISCARD = "discard"
    VIOLATION = "violation"
    GUARD_FAILED = "guard_failed"
    CRASH = "crash"
    TIMEOUT = "timeout"
    NO_CHANGE = "no_change"
    GIVE_UP = "give_up"
    AGENT_FAILED = "agent_failed"
    VOID = "void"


class Reason(str, enum.Enum):
    """Why, as one stable code; `VERDICT_OF` says which verdict each belongs to."""

    BETTER = "metric.better"
    UNPROVEN = "metric.better_unproven"
    SIMPLER = "metric.equal_and_simpler"
    NOT_BETTER = "metric.not_better"
    REPEATED = "candidate.repeated"
    UNCHANGED = "candidate.unchanged"
    NOISE_NOT_BETTER = "noise.not_better"
    NOISE_LOST = "noise.duel_lost"
    NOISE_UNDECIDED = "noise.undecided"
    NOISE_FAILED = "noise.failed_in_duel"
    NOISE_UNCONFIRMED = "noise.not_confirmed"
    IMPLAUSIBLE = "noise.implausible"
    GAVE_UP = "agent.gave_up"
    AGENT_EXIT = "agent.failed"
    AGENT_TIMEOUT = "agent.timed_out"
    SCOPE_CREATED = "scope.created"
    SEAL_CREATED = "seal.created"
    SEAL_MODIFIED = "seal.modified"
    SEAL_DELETED = "seal.deleted"
    SEAL_RETYPED = "seal.retyped"
    SEAL_MODE = "seal.mode"
    SEAL_TOUCHED = "seal.touched_during_run"
    SYMLINK = "census.symlink"
    GITLINK = "census.gitlink"
    SPECIAL = "census.special_file"
    HARDLINK = "census.hard_link"
    UNREADABLE = "census.unreadable"
    CONTROL = "census.control_character"
    TWIN = "census.case_twin"
    GIT_FILE = "census.git_file"
    SETID = "census.set_id"
    OVERSIZE = "census.oversize"
    TOO_MANY = "census.too_many_files"
    CENSUS_FAILED = "census.failed"
    METRIC_EXIT = "metric.exit"
    METRIC_MISSING = "metric.missing"
    METRIC_MALFORMED = "metric.malformed"
    METRIC_NOT_FINITE = "metric.not_finite"
    METRIC_NO_OUTPUT = "metric.no_output"
    METRIC_AMBIGUOUS = "metric.ambiguous"
    METRIC_OUT_OF_BOUNDS = "metric.out_of_bounds"
    METRIC_TIMEOUT = "metric.timeout"
    GUARD_EXIT = "guard.failed"
    GUARD_WORSE = "guard.worse"
    GUARD_TIMEOUT = "guard.timeout"
    STORE = "store.damaged"
    MACHINE = "machine.failed"


VERDICT_OF: Dict[Reason, Verdict] = {
    **dict.fromkeys(Reason, Verdict.VIOLATION),     # of every reason without a row of its own
    **dict.fromkeys((Reason.BETTER, Reason.UNPROVEN, Reason.SIMPLER), Verdict.KEEP),
    **dict.fromkeys((Reason.NOT_BETTER, Reason.REPEATED, Reason.NOISE_NOT_BETTER,
                     Reason.NOISE_LOST, Reason.NOISE_UNDECIDED, Reason.NOISE_FAILED,
                     Reason.NOISE_UNCONFIRMED, Reason.IMPLAUSIBLE), Verdict.DISCARD),
    **dict.fromkeys((Reason.GUARD_EXIT, Reason.GUARD_WORSE), Verdict.GUARD_FAILED),
    **dict.fromkeys((Reason.METRIC_EXIT, Reason.METRIC_MISSING, Reason.METRIC_MALFORMED,
                     Reason.METRIC_NOT_FINITE, Reason.METRIC_NO_OUTPUT), Verdict.CRASH),
    **dict.fromkeys((Reason.METRIC_TIMEOUT, Reason.GUARD_TIMEOUT), Verdict.TIMEOUT),
    Reason.UNCHANGED: Verdict.NO_CHANGE,
    Reason.GAVE_UP: Verdict.GIVE_UP,
    **dict.fromkeys((Reason.AGENT_EXIT, Reason.AGENT_TIMEOUT), Verdict.AGENT_FAILED),
    **dict.fromkeys((Reason.STORE, Reason.MACHINE), Verdict.VOID),
}


# ══ config ═══════════════════════════════════════════════════════════════════════════════════════
# The dataclasses are the schema: a field is a key of loop.ini, its metadata says how it is parsed.
# Every parsed value is made of JSON types, so that the whole config stands in the ledger.

class Gain(NamedTuple):
    """A smallest or largest gain: an absolute amount, or a percentage of the reference."""

    amount: float
    percent: bool

    def over(self, reference: float) -> float:
        """Return the gain in units of the metric, against `reference`."""
        return min(self.amount / 100 * abs(reference), LARGEST) if self.percent else self.amount


def matching(pattern: str, expected: str, convert: Callable[[str], Any] = str
             ) -> Callable[[str], Any]:
    """Return a parser of whole texts; its ValueError says what was expected."""
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(expected)
        return convert(text)
    return parse


def is_yes(text: str) -> bool:
    """Return what a word that stands for yes or no means."""
    return text.lower() in ("yes", "true", "on")


parse_text = matching(r"(?s).+", "some text")
parse_name = matching(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.|lock$|$)){0,63}",
                      "letters, digits, '_', '-' and single dots, at most 64 characters")
parse_count = matching(r"(?!0+$)[0-9]{1,9}", "a whole number from 1 to 999999999", int)
parse_whole = matching(r"[0-9]{1,9}", "a whole number from 0 to 999999999", int)
parse_samples = matching(r"(?!0*[0-4]$)[0-9]{1,6}", "a whole number from 5 up", int)
parse_bool = matching(r"(?i)yes|no|true|false|on|off", "yes or no", is_yes)
parse_not_yet = matching(r"(?i)no", "no; this is not yet supported", is_yes)
parse_exclusive = matching(r"(?i)yes", "yes; anything else is not yet supported", is_yes)
parse_workers = matching(r"1", "1; more than one worker is not yet supported", int)


def parse_number(text: str) -> float:
    """Accept a finite decimal number, as a metric may print it."""
    number = strict_number(text.encode("utf-8", "replace"))
    if number is None or not math.isfinite(number):
        raise ValueError("a finite number such as 12 or 0.5")
    return number


def parse_price(text: str) -> float:
    """Accept a finite number from 0 up."""
    number = parse_number(text)
    if number < 0:
        raise ValueError("a number from 0 up")
    return number


def parse_gain(text: str) -> Gain:
    """Accept `0.5` or `1%`, not negative."""
    percent = text.endswith("%")
    try:
        amount = parse_number(text[:-1].rstrip() if percent else text)
    except ValueError:
        amount = -1.0
    if amount < 0:
        raise ValueError("a number from 0 up, or a percentage such as 1%")
    return Gain(amount, percent)


def parse_confidence(text: str) -> Optional[float]:
    """Accept a number between 0 and 1, or `none` (which becomes None)."""
    if text.lower() == "none":
        return None
    number = strict_number(text.encode("utf-8", "replace"))
    if number is None or not 0 < number < 1:
        raise ValueError("a number between 0 and 1 such as 0.8, or none")
    return number


def parse_bounds(text: str) -> Tuple[Optional[float], Optional[float]]:
    """Accept `LOW HIGH`; `*` leaves a side open."""
    parts = text.replace(",", " ").replace("..", " ").split()
    try:
        sides = [None if part == "*" else parse_number(part) for part in parts]
    except ValueError:
        sides = []
    if len(sides) != 2 or (None not in sides and sides[0] >= sides[1]):
        raise ValueError("LOW HIGH with LOW below HIGH, such as 0 100, or 0 * for an open side")
    return (sides[0], sides[1])


def parse_duration(text: str) -> float:
    """Accept `90s`, `10m`, `8h`, `2d` or `500ms`; return seconds."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)", text)
    seconds = float(match[1]) * {"ms": .001, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] \
        if match else 0.0
    if not 0 < seconds <= 366 * 86400:
        raise ValueError("a duration such as 90s, 10m or 8h")
    return seconds


def parse_size(text: str) -> int:
    """Accept `500`, `64k`, `10m` or `2g`; return bytes."""
    match = re.fullmatch(r"([0-9]{1,12})\s*([kmg]?)b?", text.lower())
    if not match or int(match[1]) == 0:
        raise ValueError("a size such as 500, 64k or 10m")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2]]


COMMENT = re.compile(r"(^|\s)#")


def parse_words(text: str) -> Tuple[str, ...]:
    """Split at white space and line ends; quotes keep blanks together."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"words with balanced quotes; {error}".lower()) from None
    if not words or not words[0]:
        raise ValueError("at least one word")
    if COMMENT.search(text) and shlex.split(text, comments=True) != list(words):
        raise ValueError("words alone; a comment stands on a line of its own")
    return words


def parse_list(text: str) -> Tuple[str, ...]:
    """Split at white space like `parse_words`; a comma after a word is a slip."""
    words = parse_words(text)
    for word in words:
        if word.endswith(","):
            raise ValueError(f"words with blanks between them, so without the comma after "
                             f"{word[:-1]!r}")
    return words


def parse_command(text: str) -> Tuple[str, ...]:
    """Split a command as a shell would; no shell runs it."""
    words = parse_words(text)
    for word in words:
        if word in ("|", "||", "&&", ";", "&", ">", ">>", "<", "2>&1"):
            raise ValueError(f"a program and its arguments; no shell runs it, so {word!r} means "
                             "nothing: write sh -c '...' if that is wanted")
    return words


def parse_globs(text: str) -> Tuple[str, ...]:
    """Accept globs relative to loop.ini's folder, one to a word."""
    words = parse_list(text)
    for glob in words:
        if not glob or glob.startswith(("/", "~")) or ".." in glob.split("/"):
            raise ValueError("globs relative to loop.ini's folder, without '..'")
    return words


def parse_relative(text: str) -> str:
    """Accept one relative path below loop.ini's folder."""
    if text.startswith(("/", "~")) or any(part in ("", ".", "..") for part in text.split("/")):
        raise ValueError("a path relative to loop.ini's folder, without '.' or '..'")
    return text


def parse_relatives(text: str) -> Tuple[str, ...]:
    """Accept relative paths, one to a word."""
    return tuple(parse_relative(word.rstrip("/")) for word in parse_list(text))


def parse_variables(text: str) -> Tuple[str, ...]:
    """Accept names of environment variables."""
    words = tuple(text.replace(",", " ").split())
    if not words or not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", word) for word in words):
        raise ValueError("names of environment variables, such as API_KEY")
    return words


def parse_pattern(text: str) -> str:
    """Accept a regular expression with exactly one group."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = re.compile(text.encode("utf-8"), re.MULTILINE).groups
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"a regular expression; {error}") from None
    if groups != 1:
        raise ValueError(f"a regular expression with exactly one group; it has {groups}")
    return text


def parse_branch(text: str) -> str:
    """Accept a branch name that git accepts and that no team calls its own."""
    protected = ("main", "master", "trunk", "develop", "HEAD")
    if text in protected or text.startswith(("release/", "refs/", "-")):
        raise ValueError("a branch of its own; main, master, trunk, develop and release/* are "
                         "protected")
    if re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|^\.|/$|\.$|\.lock(/|$)|^/|^@?$", text):
        raise ValueError("a valid branch name")
    return text


def parse_choice(*choices: str) -> Callable[[str], str]:
    """Return a parser that accepts one of `choices`."""
    return matching("|".join(map(re.escape, choices)), "one of " + ", ".join(choices))


NUMBER = re.compile(rb"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def strict_number(text: bytes) -> Optional[float]:
    """Parse an ASCII decimal number (it may overflow to inf); None for anything else.

    `float` alone would take nan, 1_000, blanks and the digits of other scripts.
    """
    return float(text) if len(text) <= 400 and NUMBER.fullmatch(text) else None


def key(parse: Callable[[str], Any], default: Any = None, limit: bool = False) -> Any:
    """Declare a key of loop.ini; a `limit` may differ when a run is resumed."""
    return field(default=default, metadata={"parse": parse, "limit": limit})


LEVELS = ("portable", "external", "landlock", "namespaces")
FACTS = {    # what the witnesses look for, in words
    "files_sealed": "nothing outside its own folders can be written",
    "modes_sealed": "no modes or times can be changed there",
    "loop_protected": "the loop can't be signalled, limited or traced",
    "secrets_hidden": "state folder, key and holdout can't be read",
    "sockets_off": "services on unix sockets can't be reached",
    "daemons_killed": "what it leaves running is dead when the turn ends",
    "network_off": "the network is off for the metric",
    "usable": "honest work succeeds"}


def parse_requirement(text: str) -> Tuple[str, ...]:
    """Accept one level, or facts that the witnesses must have seen."""
    words = tuple(text.replace(",", " ").split())
    if not words or not all(word in (*FACTS, *LEVELS) for word in words):
        raise ValueError("a level (" + ", ".join(LEVELS) + ") or facts (" + ", ".join(FACTS) + ")")
    return words


@dataclass(frozen=True)
class LoopOptions:
    """The `[loop]` section."""

    name: str = key(parse_name, "")
    goal: str = key(parse_text, "")
    program: str = key(parse_relative, "")
    scope: Tuple[str, ...] = key(parse_globs, ())
    seal: Tuple[str, ...] = key(parse_list, ())
    share: Tuple[str, ...] = key(parse_relatives, ())
    ignore: Tuple[str, ...] = key(parse_globs, ())
    memory: str = key(parse_relative, "")
    branch: str = key(parse_branch, "")
    iterations: int = key(parse_count, 25, limit=True)
    target: Optional[float] = key(parse_number, None, limit=True)
    patience: int = key(parse_count, 15, limit=True)
    budget: Optional[float] = key(parse_duration, None, limit=True)
    give_ups: int = key(parse_count, 3, limit=True)
    failures: int = key(parse_count, 5, limit=True)
    check_in: Optional[int] = key(parse_count, None, limit=True)
    simplify: bool = key(parse_not_yet, False)
    workers: int = key(parse_workers, 1)
    seed: int = key(parse_whole, 0)
    max_change: int = key(parse_size, 1 << 20)
    max_files: int = key(parse_count, 200)


@dataclass(frozen=True)
class AgentOptions:
    """The `[agent]` section."""

    adapter: str = key(parse_name, "claude")
    command: Tuple[str, ...] = key(parse_command, ())
    timeout: float = key(parse_duration, 600.0)
    rework: int = key(parse_whole, 2)
    env: Tuple[str, ...] = key(parse_variables, ())
    writable: Tuple[str, ...] = key(parse_list, ())
    price_per_turn: float = key(parse_price, 0.0, limit=True)
    max_cost: Optional[float] = key(parse_price, None, limit=True)


@dataclass(frozen=True)
class MetricOptions:
    """The `[metric]` section; `[holdout]` takes the same keys that make sense there."""

    command: Tuple[str, ...] = key(parse_command, ())
    produce: Tuple[str, ...] = key(parse_command, ())
    outputs: Tuple[str, ...] = key(parse_globs, ())
    setup: Tuple[str, ...] = key(parse_command, ())
    name: str = key(parse_text, "")
    pattern: str = key(parse_pattern, "")
    direction: str = key(parse_choice("minimize", "maximize"), "minimize")
    timeout: float = key(parse_duration, 600.0)
    bounds: Tuple[Optional[float], Optional[float]] = key(parse_bounds, (None, None))
    min_gain: Gain = key(parse_gain, Gain(0.0, False))
    max_gain: Optional[Gain] = key(parse_gain, None)
    home: str = key(parse_choice("real", "private"), "real")
    cache: Tuple[str, ...] = key(parse_relatives, ())
    git: bool = key(parse_bool, False)
    samples: Optional[int] = key(parse_samples, None)
    confidence: Optional[float] = key(parse_confidence, 0.8)
    env: Tuple[str, ...] = key(parse_variables, ())
    network: str = key(parse_choice("allow", "deny"), "allow")
    exclusive: bool = key(parse_exclusive, True)
    runner: Tuple[str, ...] = key(parse_words, ())
    canary: Tuple[str, ...] = key(parse_command, ())


@dataclass(frozen=True)
class GuardOptions:
    """A `[guard.NAME]` section."""

    command: Tuple[str, ...] = key(parse_command, ())
    pattern: str = key(parse_pattern, "")
    direction: str = key(parse_choice("minimize", "maximize"), "minimize")
    tolerance: Optional[float] = key(parse_price, None)
    timeout: float = key(parse_duration, 600.0)
    name: str = ""


@dataclass(frozen=True)
class HoldoutOptions:
    """The `[holdout]` section; `files` are shown to nobody but the holdout's own command."""

    command: Tuple[str, ...] = key(parse_command, ())
    name: str = key(parse_text, "")
    pattern: str = key(parse_pattern, "")
    direction: str = key(parse_choice("minimize", "maximize"), "")
    timeout: float = key(parse_duration, 600.0)
    bounds: Tuple[Optional[float], Optional[float]] = key(parse_bounds, (None, None))
    files: Tuple[str, ...] = key(parse_list, ())


@dataclass(frozen=True)
class IsolationOptions:
    """The `[isolation]` section."""

    level: str = key(parse_choice("auto", *LEVELS), "auto")
    require: Tuple[str, ...] = key(parse_requirement, ())


@dataclass(frozen=True)
class Config:
    """A whole loop.ini, validated; `folder` holds it and is where every glob starts."""

    path: str
    digest: str
    loop: LoopOptions
    agent: AgentOptions
    adapter: Tuple[Tuple[str, str], ...]
    metric: MetricOptions
    guards: Tuple[GuardOptions, ...]
    holdout: HoldoutOptions
    isolation: IsolationOptions

    @property
    def folder(self) -> str:
        """Return loop.ini's folder, absolute."""
        return os.path.dirname(self.path)

    @property
    def sign(self) -> float:
        """Return what turns a metric value into "lower is better"."""
        return -1.0 if self.metric.direction == "maximize" else 1.0

    @property
    def state_folder(self) -> str:
        """Return the folder that holds this run's ledger and store."""
        return os.path.join(self.folder, ".scalarloop", self.loop.name)

    @property
    def ledger_path(self) -> str:
        """Return the file that holds the run's record."""
        return os.path.join(self.state_folder, "ledger.jsonl")

    def resolved(self) -> Dict[str, Dict[str, Any]]:
        """Return every key with its value in force, as JSON types, for the ledger."""
        sections = {"loop": self.loop, "agent": self.agent, "metric": self.metric,
                    "holdout": self.holdout, "isolation": self.isolation}
        sections.update({f"guard.{guard.name}": guard for guard in self.guards})
        table = {name: asdict(value) for name, value in sections.items()}
        table["adapter"] = dict(self.adapter)
        return json.loads(json.dumps(table))


def anchor_ref(config: Config, ending: str = "") -> str:
    """Return the ref that holds the ledger of a run, or of one set aside under another ending.

    Not refs/scalarloop/<name> itself: git would take `scalarloop/<name>` for that ref, before the
    branch of the same name.
    """
    return f"refs/scalarloop/{config.loop.name}{ending}/ledger"


SECTIONS = {"loop": LoopOptions, "agent": AgentOptions, "metric": MetricOptions,
            "holdout": HoldoutOptions, "isolation": IsolationOptions}
NOT_YET = {"escape": "[escape]", "hooks": "[hooks]"}


def load_config(path: str) -> Config:
    """Read and validate loop.ini; raise ConfigError with every problem at once."""
    path = os.path.abspath(path)
    shown = os.path.basename(path)
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe")
        with open(path, "rb") as stream:
            raw = stream.read(CHUNK + 1)
    except OSError as error:
        raise ConfigError([f"{shown}: can't be read: {error.strerror or error} ({path})"]) from None
    if len(raw) > CHUNK:
        raise ConfigError([f"{shown}: is larger than 1 MB (expected a loop.ini)"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{shown}: is not UTF-8 text (byte {error.start})"]) from None
    if "\0" in text:
        raise ConfigError([f"{shown}: holds a NUL character (expected text)"])
    return build_config(path, hashlib.sha256(raw).hexdigest(), read_sections(text, shown))


def read_sections(text: str, shown: str) -> Dict[str, Dict[str, str]]:
    """Split an INI text into sections and keys; raise ConfigError with every line that is neither.

    Not configparser: it stops at the first fault, drops what follows a section's name, and reads
    otherwise from one Python to the next. A comment fills its line; an indented line goes on with
    the value above it, and so may not look like a key.
    """
    sections: Dict[str, Dict[str, List[str]]] = {}
    problems: List[str] = []
    section, keys = "", None
    value: List[str] = []

    def wrong(line: str, why: str) -> None:
        problems.append(f"{shown}: line {number}: {printable(line, 60)!r} {why}")

    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        bare = line.strip()
        name, equals, rest = (part.strip() for part in bare.partition("="))
        if bare.startswith(("#", ";")):
            continue
        if not bare or (line[0] in " \t" and value):
            if name in known_keys(section):
                wrong(bare, "is indented, so it would belong to the value above (expected a key at "
                      "the start of its line)")
            value.append(bare)
        elif bare.startswith("["):
            section, keys, value = bare[1:-1], {}, []
            if not re.fullmatch(r"\[[^\[\]]+\]", bare):
                wrong(bare, "is no section's name (expected [name] alone)")
            elif section in sections:
                problems.append(f"{shown}: [{printable(section)}]: stands twice, again in line "
                                f"{number} (expected once)")
            else:
                sections[section] = keys
        elif keys is None:
            wrong(bare, "stands before any section (expected [loop] first)")
            keys = {}
        elif not equals or not name or line[0] in " \t":
            wrong(bare, "is neither a section nor a key (expected [name] or key = value)")
        else:
            if name in keys:
                problems.append(f"{shown}: [{printable(section)}] {printable(name)}: stands "
                                f"twice, again in line {number} (expected once)")
            keys[name] = value = [rest]
    if problems:
        raise ConfigError(problems)
    return {name: {key: "\n".join(lines).strip() for key, lines in found.items()}
            for name, found in sections.items()}


def known_keys(section: str) -> Tuple[str, ...]:
    """Return the keys of a section; of [adapter] and of unknown ones nothing is known."""
    schema = GuardOptions if section.startswith("guard.") else SECTIONS.get(section)
    return tuple(f.name for f in fields(schema) if f.metadata) if schema else ()


def build_config(path: str, digest: str, sections: Dict[str, Dict[str, str]]) -> Config:
    """Turn the sections of a file into a Config; raise ConfigError with every problem at once."""
    problems: List[str] = []
    shown = os.path.basename(path)
    values: Dict[str, Any] = {name: schema() for name, schema in SECTIONS.items()}
    guards: List[GuardOptions] = []
    adapter: Dict[str, str] = {}
    for section, keys in sections.items():
        at = f"{shown}: [{printable(section)}]"
        if section in SECTIONS:
            values[section] = parse_section(SECTIONS[section], keys, at, problems)
        elif section.startswith("guard.") and re.fullmatch(r"[A-Za-z0-9_-]{1,40}", section[6:]):
            guard = parse_section(GuardOptions, keys, at, problems)
            guards.append(replace(guard, name=section[6:]))
        elif section == "adapter":
            adapter = parse_adapter(keys, at, problems)
        elif section == "guard" or section.startswith("guard."):
            problems.append(f"{at}: can't be a guard's name (expected [guard.NAME] with letters, "
                            "digits, '_' and '-' in NAME)")
        elif section in NOT_YET:
            problems.append(f"{at}: is not yet supported (leave it out)")
        else:
            problems.append(f"{at}: unknown section" + close_match(
                section, [*SECTIONS, "adapter", "guard.NAME"]))
    stem = os.path.splitext(shown)[0]
    loop = values["loop"]
    if not loop.name:
        try:
            loop = replace(loop, name=parse_name(stem))
        except ValueError as error:
            problems.append(f"{shown}: [loop] name: {stem!r}, the file's stem, is not usable "
                            f"(expected {error})")
    if not loop.branch:
        loop = replace(loop, branch=f"scalarloop/{loop.name}")
    holdout = values["holdout"]
    if not holdout.direction:
        holdout = replace(holdout, direction=values["metric"].direction)
    config = Config(path, digest, loop, values["agent"], tuple(sorted(adapter.items())),
                    values["metric"], tuple(guards), holdout, values["isolation"])
    problems += cross_check(config, sections, shown)
    if problems:
        raise ConfigError(problems)
    return config


def parse_section(schema: Any, keys: Dict[str, str], at: str, problems: List[str]) -> Any:
    """Parse one section by its dataclass; append a line to `problems` for each bad key."""
    known = {f.name: f for f in fields(schema) if f.metadata}
    found: Dict[str, Any] = {}
    for name, text in keys.items():
        if name not in known:
            home = next((other for other in SECTIONS if name in known_keys(other)), "")
            problems.append(f"{at} {printable(name)}: unknown key" + (
                f" (it belongs to [{home}])" if home else close_match(name, list(known))))
            continue
        try:
            if "\0" in text:
                raise ValueError("text without NUL characters")
            found[name] = known[name].metadata["parse"](text.strip())
        except ValueError as error:
            shown = text if len(text) <= 60 else text[:57] + "..."
            problems.append(f"{at} {name}: {shown!r} can't be used (expected {error})")
    return schema(**found)


def parse_adapter(keys: Dict[str, str], at: str, problems: List[str]) -> Dict[str, str]:
    """Return the adapter's free keys as the environment variables that carry them."""
    options: Dict[str, str] = {}
    for name, text in keys.items():
        variable = "SCALARLOOP_OPT_" + name.upper().replace("-", "_")
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable) or "\0" in text:
            problems.append(f"{at} {printable(name)}: can't be an option (expected letters, "
                            f"digits and '_')")
        elif variable in options:
            problems.append(f"{at} {name}: given twice in other letters (expected once)")
        options[variable] = text
    return options


def close_match(word: str, known: Sequence[str]) -> str:
    """Return a hint for a mistyped word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word.lower(), known, 1)
    return f" (did you mean {near[0]}?)" if near else " (expected one of: " + ", ".join(known) + ")"


def cross_check(config: Config, given: Dict[str, Dict[str, str]], shown: str) -> List[str]:
    """Return what is wrong between keys: missing, contradicting, or useless ones."""
    loop, metric = config.loop, config.metric
    named = {section: set(keys) for section, keys in given.items()}
    agent_keys = named.get("agent", set())
    rules = [
        ("scope" in named.get("loop", ()), "[loop] scope: is missing (expected globs of the files "
                                           "that the agent may change)"),
        ("command" in named.get("metric", ()), "[metric] command: is missing (expected the "
                                               "command that prints METRIC name=number)"),
        (not (loop.goal and loop.program), "[loop] program: stands beside goal (expected one)"),
        (loop.goal or loop.program or not {"goal", "program"}.isdisjoint(named.get("loop", ())),
         "[loop] goal: is missing (expected what the agent is to do)"),
        (not {"command", "adapter"} <= agent_keys,
         "[agent] adapter: stands beside command (expected one of them)"),
        (len({"produce", "outputs"} & named.get("metric", set())) != 1,
         "[metric] outputs: goes with produce (expected both or neither)"),
        (not (metric.pattern and metric.name),
         "[metric] name: stands beside pattern (expected one of them)"),
        ("holdout" not in given or "command" in named["holdout"],
         "[holdout] command: is missing (expected a command that prints METRIC name=number)"),
        ("max_cost" not in agent_keys or "price_per_turn" in agent_keys
         and config.agent.price_per_turn > 0,
         "[agent] max_cost: needs a price_per_turn above 0 (expected both)"),
        (metric.max_gain is None or metric.max_gain.percent != metric.min_gain.percent
         or metric.max_gain.amount > metric.min_gain.amount,
         "[metric] max_gain: is not above min_gain, so nothing could be kept (expected more)"),
        (loop.target is None or (metric.bounds[0] is None or loop.target >= metric.bounds[0])
         and (metric.bounds[1] is None or loop.target <= metric.bounds[1]),
         "[loop] target: lies outside [metric] bounds, so it can't be reached (expected one "
         "inside)"),
        (config.isolation.level != "external" or bool(metric.runner),
         "[isolation] level: external needs [metric] runner (expected the prefix that isolates)"),
    ]
    problems = [f"{shown}: {text}" for holds, text in rules if not holds]
    for guard in config.guards:
        at = f"{shown}: [guard.{guard.name}]"
        if "command" not in named[f"guard.{guard.name}"]:
            problems.append(f"{at} command: is missing (expected a command that exits 0)")
        keys = named[f"guard.{guard.name}"]
        if len({"pattern", "tolerance"} & keys) == 1 or guard.tolerance == 0:
            problems.append(f"{at} tolerance: goes with pattern (expected both, tolerance above 0)")
    return problems


def changed_keys(old: Dict[str, Dict[str, Any]], new: Dict[str, Dict[str, Any]]
                 ) -> Tuple[List[str], List[str]]:
    """Return the keys that differ, as (limits, others); limits may change between sessions."""
    limits, others = [], []
    for section in sorted(set(old) | set(new)):
        schema = SECTIONS.get(section)
        free = {f.name for f in fields(schema) if f.metadata.get("limit")} if schema else set()
        before, after = old.get(section, {}), new.get(section, {})
        for name in sorted(set(before) | set(after)):
            if before.get(name) != after.get(name):
                (limits if name in free else others).append(f"[{section}] {name}")
    return limits, others


# ══ text and files ═══════════════════════════════════════════════════════════════════════════════

def open_regular(path: Union[str, bytes]) -> Any:
    """Open a regular file for reading; never follows a link, never blocks.

    Raises OSError, with ELOOP for a link and EINVAL for a folder, a pipe or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return open(descriptor, "rb")


def sync_path(path: str) -> None:
    """Flush a file or folder to disk; one that does not exist is nothing to flush."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: str, data: Any, mode: int = 0o600) -> None:
    """Write bytes, or what an open file holds, whole or not at all.

    Temporary file, fsync, rename, fsync of the folder.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"tmp_{name}.{os.getpid()}")   # git prunes tmp_* of its own
    try:
        with open(temporary, "wb") as stream:
            shutil.copyfileobj(io.BytesIO(data) if isinstance(data, bytes) else data, stream)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise
    sync_path(os.path.dirname(path))


def write_plain(path: str, data: bytes, append: bool = False) -> None:
    """Write a file that no crash need spare: it is for people, or made anew."""
    with open(path, "ab" if append else "wb") as stream:
        stream.write(data)


def counted(number: int, noun: str, verbs: str = "") -> str:
    """Return `1 file` or `3 files`; with the verbs `is are`, `1 file is` or `3 files are`."""
    one, _, many = verbs.partition(" ")
    return (f"{number} {noun} {one}" if number == 1 else f"{number} {noun}s {many}").rstrip()


def format_number(value: Optional[float], missing: str = "-") -> str:
    """Return a number as a person writes it; every digit of a whole number, 6 of others."""
    if value is None:
        return missing
    if float(value).is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.6g}"


def exact_number(value: Optional[float]) -> str:
    """Return a number with all its digits."""
    shown = format_number(value)
    return shown if value is None or float(shown) == value else repr(value)


def format_change(old: Optional[float], new: Optional[float]) -> str:
    """Return the relative change in percent, or the difference where the old value is 0."""
    if old is None or new is None:
        return ""
    if old == 0:
        return f"{new - old:+.4g}"
    percent = (new - old) / abs(old) * 100
    return f"{percent:+.1f} %" if abs(percent) < 1e6 else f"{percent:+.1e} %"


def format_seconds(seconds: float) -> str:
    """Return a duration in at most two units."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


def printable(text: str, most: int = 200) -> str:
    """Return text that is safe on a terminal and in a log line: no control characters, bounded."""
    shown = "".join(c if c.isprintable() else "\\x%02x" % ord(c) if ord(c) < 256
                    else "\\u%04x" % ord(c) for c in text[:most])
    return shown + ("..." if len(text) > most else "")


def shown_path(path: bytes) -> str:
    """Return a path for people and for the ledger: UTF-8, anything odd escaped."""
    return printable(path.decode("utf-8", "backslashreplace"), 500)


# ══ processes ════════════════════════════════════════════════════════════════════════════════════
# The one place that starts a program. It waits for the program's own end, never for the end of a
# pipe, since a grandchild may hold that open; and it ends the whole group on every exit.

class Watch:
    """What to look at while a program runs: a request to stop, and the live line to refresh."""

    def __init__(self, on_tick: Callable[[], None] = lambda: None):
        self.stop_signal = 0
        self.on_tick = on_tick

    def listen(self) -> None:
        """Turn SIGINT, SIGTERM and SIGHUP into a request to stop; a nohup stays one."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._request)

    def _request(self, number: int, _frame: Any) -> None:
        self.stop_signal = number

    def check(self) -> None:
        """Raise Interrupted when a stop was asked for."""
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            raise Interrupted(f"interrupted by {name}; start again")


@dataclass(frozen=True)
class Ended:
    """How a program ended: `status` is its exit code, or minus the signal that ended it."""

    status: int
    seconds: float
    timed_out: bool

    def describe(self) -> str:
        """Return the end in a few words."""
        if self.timed_out:
            return f"timed out after {self.seconds:.1f} s"
        if self.status < 0:
            try:
                return f"ended by {signal.Signals(-self.status).name}"
            except ValueError:
                return f"ended by signal {-self.status}"
        return f"exit {self.status}"


class Capture:
    """Take a stream of any length: keep its head and tail, its digest, and its matching lines.

    `pattern` is a bytes expression compiled with re.MULTILINE; it sees every line of the stream,
    not of the capped log, so that no filler can push a line out of sight. At most 100 matches are
    kept (more than one is already too many), a line counts up to LONGEST_LINE bytes.
    """

    def __init__(self, pattern: Optional[Pattern[bytes]] = None, cap: int = LOG_CAP):
        self.pattern, self.cap = pattern, cap
        self.matches: List[Tuple[bytes, ...]] = []
        self.size = 0
        self._digest = hashlib.sha256()
        self._head = bytearray()
        self._tail: Deque[bytes] = deque()
        self._tail_size = 0
        self._line = b""
        self._skipping = False

    def __call__(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._digest.update(chunk)
        if self.pattern:
            self._find(chunk)
        room = self.cap - len(self._head)
        if room > 0:
            self._head += chunk[:room]
            chunk = chunk[room:]
        if chunk:
            self._tail.append(chunk)
            self._tail_size += len(chunk)
            while self._tail_size - len(self._tail[0]) >= self.cap:
                self._tail_size -= len(self._tail.popleft())

    def _find(self, chunk: bytes) -> None:
        if self._skipping:
            _, newline, chunk = chunk.partition(b"\n")
            if not newline:
                return
            self._skipping = False
        data = self._line + chunk
        cut = data.rfind(b"\n") + 1
        self._match(data[:cut])
        self._line = data[cut:]
        if len(self._line) > LONGEST_LINE:
            self._match(self._line[:LONGEST_LINE] + b"\n")
            self._line, self._skipping = b"", True

    def _match(self, lines: bytes) -> None:
        for match in self.pattern.finditer(lines) if self.pattern else ():
            if len(self.matches) >= MOST_MATCHES:
                return
            self.matches.append((match[0], *match.groups(b"")))

    def finish(self) -> None:
        """Look at a last line that has no newline."""
        if self._line:
            self._match(self._line)
            self._line = b""

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the whole stream."""
        return self._digest.hexdigest()

    def log(self) -> bytes:
        """Return head and tail, with a line between them that says how much is missing."""
        tail = b"".join(self._tail)[-self.cap:]
        missing = self.size - len(self._head) - len(tail)
        gap = b"\n[... %d bytes not kept ...]\n" % missing if missing else b""
        return bytes(self._head) + gap + tail


def run_program(argv: Sequence[str], *, cwd: str, env: Dict[str, str],
                sink: Callable[[bytes], None], errors: Optional[Callable[[bytes], None]] = None,
                stdin: Any = b"", timeout: Optional[float] = None, watch: Optional[Watch] = None,
                sweep: bool = False, keep: Tuple[int, ...] = ()) -> Ended:
    """Run one program to its end and return how it ended; raise OSError if it can't be started.

    Output goes to `sink` chunk by chunk, standard error to `errors` or along with it. At the
    deadline, or when `watch` asks to stop, the group gets SIGTERM, TERM_GRACE seconds, SIGKILL.
    Whatever happens its process group is killed, and with `sweep` every descendant too. The
    descriptors in `keep` stay open in it.
    """
    started = time.monotonic()
    source = stdin if hasattr(stdin, "fileno") else _spooled(stdin)
    try:
        process = subprocess.Popen(
            list(argv), cwd=cwd, env=env, stdin=source, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors is None else subprocess.PIPE,
            start_new_session=True, close_fds=True, pass_fds=keep)
    finally:
        if source is not stdin and hasattr(source, "close"):
            source.close()
    sinks = {process.stdout.fileno(): sink}  # type: ignore[union-attr]
    if process.stderr and errors:
        sinks[process.stderr.fileno()] = errors
    try:
        timed_out = _pump(process, dict(sinks), started + (timeout or math.inf), watch)
    except BaseException:
        sinks = {}      # it may be one of them that failed
        raise
    finally:
        _signal_group(process, signal.SIGKILL)
        status = process.wait()
        if sweep:
            sweep_descendants()
        _drain(sinks)
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
    return Ended(status, time.monotonic() - started, timed_out)


def _spooled(data: bytes) -> Any:
    """Return a file that holds `data`: unlike a pipe it can't block when nobody reads it."""
    if not data:
        return subprocess.DEVNULL
    source = tempfile.TemporaryFile()
    source.write(data)
    source.seek(0)
    return source


def _pump(process: Any, sinks: Dict[int, Callable[[bytes], None]], deadline: float,
          watch: Optional[Watch]) -> bool:
    """Pass output on until the program has ended; return whether its time ran out."""
    ending, timed_out, pause = math.inf, False, .0005
    end = _end_descriptor(process.pid)
    try:
        while True:
            ready = select.select([*sinks, *end], [], [], min(pause, .1))[0]
            pause = .0005 if ready else pause * 2
            for descriptor in ready:
                if descriptor in sinks:
                    data = os.read(descriptor, 1 << 16)
                    sinks[descriptor](data)
                    if not data:
                        del sinks[descriptor]
            if _has_ended(process):
                return timed_out
            now = time.monotonic()
            if watch:
                watch.on_tick()
            if ending == math.inf and (now >= deadline or (watch and watch.stop_signal)):
                timed_out = now >= deadline
                ending = now + TERM_GRACE
                _signal_group(process, signal.SIGTERM)
            if now >= ending:
                return timed_out
    finally:
        for descriptor in end:
            os.close(descriptor)


def _end_descriptor(pid: int) -> List[int]:
    """Return a descriptor that becomes readable when `pid` ends, where the system has such."""
    try:
        return [os.pidfd_open(pid)]  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return []


def _has_ended(process: Any) -> bool:
    """Tell whether the program ended, without reaping it where that can be had.

    An unreaped leader keeps its number from being given to somebody else's group before ours is
    killed.
    """
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal_group(process: Any, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody of the group is left; macOS says EPERM when only a zombie is


def _drain(sinks: Dict[int, Callable[[bytes], None]]) -> None:
    """Read what the dead left in their pipes, and no more: a survivor may hold one open."""
    for descriptor, sink in sinks.items():
        os.set_blocking(descriptor, False)
        for _ in range(64):
            try:
                data = os.read(descriptor, 1 << 16)
            except (BlockingIOError, OSError):
                break
            if not data:
                break
            sink(data)


def search_path() -> str:
    """Return PATH without its empty and relative entries."""
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(entry for entry in entries if os.path.isabs(entry))


def inherited(names: Iterable[str]) -> Dict[str, str]:
    """Return those of our environment variables that match `names` (fnmatch), and a clean PATH."""
    kept = {name: value for name, value in os.environ.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in names)}
    return {**kept, "PATH": search_path()}


def remove_tree(path: str) -> None:
    """Delete a folder whatever an agent left in it: locked folders, names too deep for one path.

    A link in its place is removed, never followed.
    """
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
        return
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):
        quiet = {"cwd": "/", "env": {"PATH": search_path()}, "sink": lambda data: None}
        for argv in (["chmod", "-R", "u+rwX", "--", path], ["rm", "-rf", "--", path]):
            program = shutil.which(argv[0], path=search_path()) or argv[0]
            run_program([program, *argv[1:]], **quiet)  # type: ignore[arg-type]


@contextlib.contextmanager
def private_folder(parent: Optional[str] = None, announce: Callable[[str], None] = str
                   ) -> Iterator[str]:
    """Yield a new 0700 folder, removed at the end whatever was left in it.

    `announce` gets its path before it exists, so that no crash can leave an unknown one.
    """
    root = os.path.realpath(parent or tempfile.gettempdir())
    prefix = "scalarloop-" if parent in (None, "/var/tmp") else "t-"     # short: sockets go there
    while True:
        path = os.path.join(root, prefix + os.urandom(3).hex())
        if os.path.lexists(path):
            continue
        announce(path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
            break
    try:
        yield path
    finally:
        remove_tree(path)


def stamps_tell(folder: str) -> bool:
    """Tell whether a write through a shared mapping shows in a file's stat signature here.

    On tmpfs it does not when the page was read first: sealed bytes could change unseen.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
        probe.write(bytes(8))
        before = os.fstat(probe.fileno())
        time.sleep(.012)
        with mmap.mmap(probe.fileno(), 8) as view:
            view[0:1] = bytes([view[0] + 1])
        after = os.fstat(probe.fileno())
    return (after.st_mtime_ns, after.st_ctime_ns) > (before.st_mtime_ns, before.st_ctime_ns)


def work_folder() -> Optional[str]:
    """Return where workspace and cleanrooms go: a file system whose stat signatures tell."""
    if "TMPDIR" not in os.environ and not stamps_tell(tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            if stamps_tell("/var/tmp"):
                return "/var/tmp"
    return None


# ══ isolation ════════════════════════════════════════════════════════════════════════════════════
# Correctness never rests on this section (store, census and cleanroom hold without it): it turns
# "detected" into "prevented" and keeps the loop's own process out of reach.

FENCE_FAILED = 125    # a layer could not be had: the command was NOT run; one line says which
FENCE_NO_EXEC = 126   # every layer is in force, but the command could not be executed
FENCE_LINE = "scalarloop fence: "   # how that one line begins, on the report descriptor

# Run as `python -I -S -E -c LAUNCHER key=value... -- argv...`: it fences ITSELF and then becomes
# the command. No json, signal or socket module: each costs more at every spawn than the fence.
LAUNCHER = r'''
import ctypes, errno, os, stat, struct, sys
import _signal as signal

libc = ctypes.CDLL(None, use_errno=True)
RDONLY, NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
WRITE_FILE, READ_FILE, TRUNCATE, IOCTL_DEV = 2, 4, 1 << 14, 1 << 15
ON_FILES = WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
CHANGES = 0xfff2                      # every right but execute, read a file, list a folder
MAKE_DEVICES = 1 << 6 | 1 << 11       # never granted
RIGHTS_BY_ABI = {1: 0x1fff, 2: 0x3fff, 3: 0x7fff, 4: 0x7fff}
DEVICES = (b"null", b"zero", b"full", b"random", b"urandom", b"tty")
GPUS = (b"nvidia", b"dri", b"kfd", b"dxg", b"accel")
NAMES = ("arch seccomp prlimit64 setpriority ioprio_set sched_setparam sched_setscheduler "
         "sched_setaffinity sched_setattr add_key request_key keyctl socket io_uring_setup").split()
NUMBERS = {
    "x86_64": (0xC000003E, 317, 302, 141, 251, 142, 144, 203, 314, 248, 249, 250, 41, 425),
    "aarch64": (0xC00000B7, 277, 261, 140, 30, 118, 119, 122, 274, 217, 218, 219, 198, 425)}
ALLOW, EPERM, ENOSYS = 0x7fff0000, 0x50001, 0x50026
DENY = [(6, 0, 0, EPERM)]
policy = {"write": [], "hide": []}
step = "policy"                       # what a failure is blamed on

def call(name, *args):
    """Call a function of libc; its -1 becomes an OSError."""
    args = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args]
    got = getattr(libc, name)(*args)
    if got == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return got

def begin(layer):
    """Name what a failure is blamed on from here on."""
    global step
    step = layer

def mode_of(path):
    """Return a path's mode without following it, 0 where it can't be had."""
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0

def entries_in(folder):
    """List a folder, as nothing where it can't be read."""
    try:
        return list(os.scandir(folder))
    except OSError:
        return []

def paths_in(folder):
    return [entry.path for entry in entries_in(folder)]

def inside(path, folders):
    return any(path == folder or path.startswith(folder.rstrip(b"/") + b"/") for folder in folders)

def raw_disks():
    """List the block devices that this user may open: they hold every hidden file's bytes."""
    return [path for folder in (b"/dev", b"/dev/mapper") for path in paths_in(folder)
            if stat.S_ISBLK(mode_of(path)) and os.access(path, os.R_OK)]

def unix_sockets():
    """List the socket files that the kernel's tables name or that lie in /run and /tmp."""
    with open("/proc/net/unix", "rb") as table:
        found = {line.rstrip(b"\n").split(None, 7)[-1] for line in table}
    with open("/proc/self/mountinfo", "rb") as table:     # a container's docker.sock is a mount
        found.update(line.split(b" ")[4] for line in table)
    folders = [(b"/run", 4), (b"/tmp", 2)]
    for folder, depth in folders:
        for entry in entries_in(folder):
            if entry.is_dir(follow_symlinks=False):
                if depth > 1 and entry.path != b"/run/user":      # covered as a whole
                    folders.append((entry.path, depth - 1))
            elif not entry.is_file(follow_symlinks=False):
                found.add(entry.path)
    return sorted(path for path in found if path.startswith(b"/")
                  and stat.S_ISSOCK(mode_of(path)) and not inside(path, policy["write"]))

def die_with_parent():
    call("prctl", 1, 9, 0, 0, 0)                      # PR_SET_PDEATHSIG, SIGKILL

def drop_capabilities():
    """Drop every capability; NO_NEW_PRIVS keeps an exec by root from getting them back."""
    begin("caps")
    call("prctl", 47, 4, 0, 0, 0)                     # PR_CAP_AMBIENT, CLEAR_ALL
    call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))

def enter_namespaces():
    """Return in process 2 of new namespaces; processes 0 (outside) and 1 wait, and never return."""
    begin("sockets")
    reachable = unix_sockets() + raw_disks()
    flags = NEWNS | NEWIPC | NEWPID | (NEWNET if policy["network"] == [b"deny"] else 0)
    unshare(flags)
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))   # the wait outlives a TERM
    begin("init")
    reader, writer = os.pipe()
    first = os.fork()
    if first:
        os.close(writer)
        retire()
        mirror(first, reader)
    os.close(reader)
    die_with_parent()
    os.write(writer, b"+")            # fails if the parent died before it could take us along
    if flags & NEWNET:
        raise_loopback()
    build_mounts(reachable)
    second = os.fork()
    if second:
        retire()
        reap(second, writer)
    signal.pthread_sigmask(signal.SIG_SETMASK, kept)

def unshare(flags):
    """Enter new namespaces; only root can do without a user namespace, and not every root."""
    begin("unshare")
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and libc.unshare(flags) == 0:
        return
    call("unshare", flags | NEWUSER)
    die_with_parent()
    for name, text in (("setgroups", "deny"), ("uid_map", "%d %d 1" % (uid, uid)),
                       ("gid_map", "%d %d 1" % (gid, gid))):
        with open("/proc/self/" + name, "w") as file:
            file.write(text)

def retire():
    """Make a waiting process as powerless and as unreadable as may be."""
    drop_capabilities()
    call("prctl", 4, 0, 0, 0, 0)                      # PR_SET_DUMPABLE

def reap(target, writer):
    """Be process 1: bury orphans, report the target's status, and take everything along."""
    while True:
        pid, status = os.wait()
        if pid == target:
            os.write(writer, status.to_bytes(4, "little"))
            os._exit(0)

def mirror(first, reader):
    """End as the target ended; never as a success that process 1 didn't report."""
    told = b""
    for piece in iter(lambda: os.read(reader, 16), b""):
        told += piece
    status = os.waitpid(first, 0)[1]
    status = int.from_bytes(told[1:], "little") if len(told) == 5 else status or 125 << 8
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        os._exit(128 + number)
    os._exit(os.WEXITSTATUS(status))

def raise_loopback():
    """Bring up lo, so that a server on localhost works in a network of its own."""
    begin("loopback")
    sock = call("socket", 2, 2, 0)
    call("ioctl", sock, 0x8914, struct.pack("=16sh22x", b"lo", 1))      # SIOCSIFFLAGS, IFF_UP
    os.close(sock)

def mount(source, target, kind=None, flags=0, data=None):
    begin("mount " + os.fsdecode(target))
    call("mount", source, target, kind, flags, data)

def set_flags(path, add, remove=0, recursive=0):
    begin("mount_setattr " + os.fsdecode(path))
    call("syscall", 442, -100, path, recursive, struct.pack("=4Q", add, remove, 0, 0), 32)

def build_mounts(reachable):
    """Read-only everywhere but in the writable paths; what is hidden or reachable is covered."""
    cwd = os.getcwdb()
    mount(None, b"/", None, REC | PRIVATE)
    begin("paths")
    writable = [(os.open(path, os.O_PATH), path) for path in policy["write"]]
    set_flags(b"/", RDONLY, recursive=0x8000)         # AT_RECURSIVE
    mount(b"proc", b"/proc", b"proc", NOSUID | NODEV | NOEXEC | RDONLY)
    blanks = make_blanks()
    make_private()
    for fd, path in writable:
        place(fd, path)
        set_flags(path, 0, RDONLY)
    for path in policy["hide"]:
        cover(path, blanks)
    for path in reachable:
        try:
            cover(path, blanks)
        except FileNotFoundError:                     # gone, or below something covered
            pass
    os.chdir(cwd)                                     # the old one is below the new mounts

def make_blanks():
    """Make one folder and one file that nobody can open, to cover others with."""
    mount(b"tmpfs", b"/dev/shm", b"tmpfs", NOSUID | NODEV | NOEXEC, b"mode=0700")
    os.mkdir("/dev/shm/folder", 0)
    os.close(os.open("/dev/shm/file", os.O_CREAT | os.O_WRONLY, 0))
    blanks = [os.open("/dev/shm/" + name, os.O_PATH) for name in ("folder", "file")]
    set_flags(b"/dev/shm", RDONLY)
    return blanks

def cover(path, blanks):
    blank = blanks[0 if stat.S_ISDIR(mode_of(path)) else 1]
    mount(b"/proc/self/fd/%d" % blank, path, None, BIND)

def make_private():
    """Give the command shared memory, terminals and run-time folders of its own."""
    mount(b"tmpfs", b"/dev/shm", b"tmpfs", NOSUID | NODEV, b"mode=1777")
    if os.path.isdir("/dev/pts"):
        mount(b"devpts", b"/dev/pts", b"devpts", NOSUID | NOEXEC,
              b"newinstance,ptmxmode=0666,mode=0600")
    for path in paths_in(b"/run/user"):
        if os.access(path, os.X_OK):
            mount(b"tmpfs", path, b"tmpfs", NOSUID | NODEV, b"mode=0700")

def place(fd, path):
    """Bind an open path at its place, which a private folder may have taken away."""
    if not os.path.lexists(path):
        os.makedirs(path if stat.S_ISDIR(os.fstat(fd).st_mode) else os.path.dirname(path), 0o700)
        if not os.path.isdir(path):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    mount(b"/proc/self/fd/%d" % fd, path, None, BIND | REC)

def landlock(namespaces):
    """Fence the writes, and where no mount hides them the hidden reads, of this process."""
    begin("landlock")
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1 and namespaces:
        return                                        # the mounts alone fence there
    handled = CHANGES & RIGHTS_BY_ABI.get(abi, 0xffff)
    hidden = [] if namespaces else policy["hide"] + raw_disks()
    handled |= READ_FILE if hidden else 0
    scopes = 3 if abi >= 6 else 0                     # signals, abstract sockets
    ruleset = call("syscall", 444, struct.pack("=3Q", handled, 0, scopes), 24 if abi > 5 else 8, 0)

    def allow(path, rights, follow=os.O_NOFOLLOW):
        fd = os.open(path, os.O_PATH | follow)
        mode = os.fstat(fd).st_mode
        rights &= handled if stat.S_ISDIR(mode) else handled & ON_FILES
        if rights and not stat.S_ISLNK(mode):         # what a link leads to has its own rule
            call("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)

    ours = [b"/dev/shm"] + ([b"/dev/pts", b"/dev/ptmx"] if namespaces else [])
    for path in policy["write"]:
        allow(path, handled & ~MAKE_DEVICES)
    for path in filter(os.path.exists, ours):
        allow(path, handled & ~MAKE_DEVICES, 0)
    for path in paths_in(b"/dev"):
        name = os.path.basename(path)
        if name in DEVICES or name.startswith(GPUS):
            allow(path, ON_FILES)
    for fd in (1, 2):                                 # `echo >/dev/stderr` opens the log anew
        if stat.S_ISREG(os.fstat(fd).st_mode):
            allow(b"/proc/self/fd/%d" % fd, WRITE_FILE | TRUNCATE, 0)
    for path in readable(hidden):
        try:
            allow(path, READ_FILE)
        except OSError:                               # gone since, or its file system is: no read
            pass
    call("syscall", 446, ruleset, 0)

def readable(hidden):
    """List what together is everything but `hidden`: the siblings of each path's ancestors."""
    above = set()
    for path in hidden:
        while path != b"/":
            path = os.path.dirname(path)
            above.add(path)
    return [path for folder in above for path in paths_in(folder)
            if path not in above and path not in hidden]

def seccomp(namespaces):
    """Refuse what neither Landlock nor file modes refuse; `EPERM` is the answer."""
    begin("seccomp")
    if os.uname().machine not in NUMBERS:
        raise OSError(errno.ENOSYS, "no table of system calls for " + os.uname().machine)
    number = dict(zip(NAMES, NUMBERS[os.uname().machine]))
    rules = {name: DENY for name in ("add_key", "request_key", "keyctl")}   # outlive a turn
    if not namespaces:
        rules.update(spare_the_loop())
        if policy["network"] == [b"deny"]:
            rules["socket"] = only(0, [1, 16])        # AF_UNIX, AF_NETLINK
            rules["io_uring_setup"] = DENY            # opens sockets unseen
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, number["arch"]), (6, 0, 0, ENOSYS),
               (0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), (6, 0, 0, ENOSYS)]     # no x32
    for name, body in rules.items():
        program += [(0x15, 0, len(body) + 1, number[name])] + body + [(6, 0, 0, ALLOW)]
    program.append((6, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    filters = struct.pack("@HP", len(program), ctypes.addressof(code))
    call("syscall", number["seccomp"], 1, 4, filters)     # SPEC_ALLOW: no slower than without

def spare_the_loop():
    """Limits, priority and affinity of the loop decide how the next measurement runs."""
    loop = os.getppid()
    tasks = [int(entry.name) for entry in entries_in("/proc/%d/task" % loop)][:100] or [loop]
    rules = {name: never(0, tasks) for name in NAMES if name.startswith("sched_")}
    rules["prlimit64"] = only(0, [0, os.getpid()])
    rules["setpriority"] = only(0, [0]) + only(1, [0])    # PRIO_PROCESS, oneself
    rules["ioprio_set"] = only(0, [1]) + only(1, [0])
    return rules

def only(arg, values):
    tests = [(0x15, len(values) - at, 0, value) for at, value in enumerate(values)]
    return [(0x20, 0, 0, 16 + 8 * arg)] + tests + DENY

def never(arg, values):
    tests = [line for value in values for line in [(0x15, 0, 1, value)] + DENY]
    return [(0x20, 0, 0, 16 + 8 * arg)] + tests

def fail(code, text):
    line = ("scalarloop fence: " + text).encode("utf-8", "replace").replace(b"\n", b" ")
    try:
        os.write(int(policy["report"][0]), line + b"\n")
    finally:
        os._exit(code)

def fence():
    """Apply the policy to this process; return the command and its environment."""
    words = iter(sys.argv[1:])
    for word in iter(lambda: next(words), "--"):
        key, _, value = word.partition("=")
        policy.setdefault(key, []).append(os.fsencode(value))
    with open("/proc/self/environ", "rb") as file:    # as it was before Python added LC_CTYPE
        pairs = [pair.partition(b"=") for pair in file.read().split(b"\0") if b"=" in pair]
    if int(policy["report"][0]) > 2:
        os.set_inheritable(int(policy["report"][0]), False)
    namespaces = policy["level"] == [b"namespaces"]
    begin("death")
    die_with_parent()
    if os.getppid() != int(policy["parent"][0]):
        raise OSError(errno.ESRCH, "the loop is gone")
    call("prctl", 38, 1, 0, 0, 0)                     # PR_SET_NO_NEW_PRIVS
    call("setrlimit", 4, struct.pack("@2L", 1, 1))    # 1: no core file, and no handler either
    try:                                              # out of memory, this goes before the loop
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass
    if namespaces:
        enter_namespaces()
    drop_capabilities()
    landlock(namespaces)
    seccomp(namespaces)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):   # Python ignores them; exec would keep that
        signal.signal(number, signal.SIG_DFL)
    return [os.fsencode(word) for word in words], {name: value for name, _, value in pairs}

try:
    argv, environment = fence()
except BaseException as error:
    fail(125, "%s: %s" % (step, getattr(error, "strerror", None) or repr(error)))
try:
    os.execve(argv[0], argv, environment)
except OSError as error:
    fail(126, "%s: %s" % (os.fsdecode(argv[0]), error.strerror))
'''

Runner = Callable[[List[str]], Tuple[int, bytes]]   # argv to its end and a sweep; status, output


def beneath(path: str, folder: str) -> bool:
    """Say whether `path` is `folder` or lies in it, by name alone."""
    return os.path.commonpath([folder, path]) == folder


@dataclass(frozen=True)
class Fence:
    """What one fenced command may write, read and reach; every path exists and is absolute."""
    level: str = "portable"
    writable: Tuple[str, ...] = ()    # workspace or cleanroom, TMPDIR; /dev/shm goes by itself
    hidden: Tuple[str, ...] = ()      # files and folders that it can't read
    network: bool = True

    def __post_init__(self) -> None:
        """Refuse a fence that its level can't put up, or whose paths undo one another."""
        if self.level not in LEVELS:
            raise ValueError(f"isolation level {self.level!r} (expected one of {LEVELS})")
        for path, hidden in ((path, hidden) for path in self.writable for hidden in self.hidden):
            real, secret = os.path.realpath(path), os.path.realpath(hidden)
            if beneath(real, secret):
                raise ValueError(f"{path} lies inside {hidden}, which is hidden")
            if beneath(secret, real) and self.level == "landlock":
                raise ValueError(f"{hidden} can't be hidden inside {path} at level {self.level}")


def fence_argv(fence: Fence, argv: Sequence[str], report: int = 2) -> List[str]:
    """Return the command that runs `argv` (argv[0] absolute) fenced, as a child of this process.

    Whatever keeps it from running goes to descriptor `report` as one line that begins with
    FENCE_LINE; with a descriptor of its own (`pass_fds`) the command can't forge that line.
    """
    if fence.level in ("portable", "external"):
        return list(argv)
    policy = [f"level={fence.level}", f"parent={os.getpid()}", f"report={report}",
              f"network={'allow' if fence.network else 'deny'}"]
    real = os.path.realpath
    for path in fence.writable:
        for folder in fence.writable:   # a link planted by one turn would name what the next gets
            if beneath(path, folder) and not beneath(real(path), real(folder)):
                raise ValueError(f"{path} is a link to {real(path)}, out of the writable {folder}")
    policy += [f"write={real(path)}" for path in fence.writable]
    hidden = sorted(set(map(real, fence.hidden)))
    policy += [f"hide={path}" for path in hidden
               if not any(beneath(path, other) for other in hidden if other != path)]
    return [*PYTHON, LAUNCHER, *policy, "--", *argv]


PYTHON = (sys.executable, "-I", "-S", "-E", "-c")


def probe_level(run: Runner, work: str = "") -> Tuple[str, Tuple[str, ...]]:
    """Return the best level that can be had here, and a line for each better one: why not."""
    refused: List[str] = []
    for level in ("namespaces", "landlock"):
        if sys.platform != "linux":
            refused.append(f"{level}: only Linux has it")
            continue
        fence = Fence(level, writable=(work,) if work else ())
        status, output = run(fence_argv(fence, [*PYTHON, "pass"]))
        if status == 0:
            return level, tuple(refused)
        line = output.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        why = line.replace(FENCE_LINE, "") or f"status {status}"
        refusing = why.startswith(("unshare:", "mount /:"))   # Ubuntu refuses at the first mount
        refused.append(f"{level}: {why}" + refusing * " (user namespaces are refused here)")
    return "portable", tuple(refused)


def harden_self() -> bool:
    """Make the loop unreadable to its own user, and the parent of its orphans (Linux)."""
    if sys.platform != "linux":
        return False
    import ctypes   # not at the top: `--help` needn't pay for it
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zeros = [ctypes.c_ulong(0)] * 3
    return not (prctl(4, ctypes.c_ulong(0), *zeros)        # PR_SET_DUMPABLE
                or prctl(36, ctypes.c_ulong(1), *zeros))   # PR_SET_CHILD_SUBREAPER


def child_pids(pid: int) -> Set[int]:
    """Return the children of a process, none if it is gone."""
    found: Set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                    found.update(map(int, file.read().split()))
    return found


def sweep_descendants() -> Set[int]:
    """Kill and reap until this process has no descendant (Linux), for 10 seconds at most.

    Needs `harden_self` before the command ran, and that the command itself has been waited for.
    Returns who survived, such as a set-uid child.
    """
    if sys.platform != "linux":
        return set()
    deadline = time.monotonic() + 10.0
    while True:
        doomed = child_pids(os.getpid())
        if not doomed or time.monotonic() > deadline:
            return doomed
        family = list(doomed)
        for pid in family:   # grows while it is walked: parents first, so that fewer are born
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            family.extend(child_pids(pid))
        buried = [pid for pid in doomed if reaped(pid)]
        if not buried:
            time.sleep(0.001)


def reaped(pid: int) -> bool:
    """Take a dead child's status; True if it is a child no more."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


# ---- witnesses: what is really in force, from acts inside the real fence

REFUSALS = frozenset("EACCES EPERM EROFS EBUSY EXDEV ESRCH ENETUNREACH".split())
UNREACHED = "unreached"   # seen from outside, by the loop: nothing came through

# Prints `fact act errno` per act. It does no harm where an act succeeds.
WITNESS = r'''
import ctypes, errno, json, os, resource, signal, socket, stat, sys, time

given = json.loads(sys.argv[1])
bait, work, loop = given["bait"], given["work"], given["loop"]
file, folder, inner = bait + "/file", bait + "/folder", work + "/inner"
space = "/proc/self/ns/pid"
APPEND, CREATE = os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_CREAT | os.O_EXCL

def attempt(fact, name, function, *args):
    try:
        function(*args)
        seen = "ok"
    except AttributeError:
        seen = "ENOSYS"       # not on this system
    except ConnectionRefusedError:
        return                # no proof of a fence: the loop saw whether it came through
    except OSError as error:
        seen = errno.errorcode.get(error.errno, str(error.errno))
    if seen == "ok" and fact == "loop_protected" and os.path.lexists(space) \
            and os.readlink(space) != given["space"]:
        seen = "ESRCH"        # in this PID namespace the loop's number is somebody else's
    print(fact, name, seen, flush=True)

def peek():
    """Read the loop's memory at address 0: EFAULT means that only the address was wrong."""
    here, there = ctypes.create_string_buffer(8), (ctypes.c_size_t * 2)(0, 8)
    ours = (ctypes.c_size_t * 2)(ctypes.addressof(here), 8)
    if ctypes.CDLL(None, use_errno=True).process_vm_readv(loop, ours, 1, there, 1, 0) < 0:
        if ctypes.get_errno() != errno.EFAULT:
            raise OSError(ctypes.get_errno(), "process_vm_readv")

def opened(path, flags):
    os.close(os.open(path, flags, 0o600))

def write(path):
    """Show that a path can be written, and leave no trace."""
    if not os.path.isdir(path):
        return opened(path, APPEND)
    os.mkdir(path + "/.scalarloop-witness")
    os.rmdir(path + "/.scalarloop-witness")

def reach(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as client:
        client.settimeout(2)
        client.connect(tuple(address) if family == socket.AF_INET else address)

def serve():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        reach(socket.AF_INET, server.getsockname())
        server.accept()[0].close()

def raise_child():
    child = os.fork()
    if not child:
        time.sleep(5)
        os._exit(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

def own_proc():
    if os.path.isdir("/proc/self") and os.readlink("/proc/self") != str(os.getpid()):
        raise ProcessLookupError(errno.ESRCH, "/proc is another PID namespace's")

def leave_daemon(path):
    """Leave a twice-forked writer behind, and see its first beat; it ends by itself in 3 s."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os.read(reader, 1)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    beat = os.open(path, CREATE, 0o600)
    for _ in range(600):
        os.write(beat, b".")
        os.write(writer, b".")          # its own copy of `reader` keeps this from failing
        time.sleep(0.005)
    os._exit(0)

opened(inner, CREATE)
for row in [
        ("files_sealed", "append", opened, file, APPEND),
        ("files_sealed", "truncate", os.truncate, file, 0),
        ("files_sealed", "create", opened, bait + "/new", CREATE),
        ("files_sealed", "mkdir", os.mkdir, bait + "/made"),
        ("files_sealed", "rename", os.rename, file, bait + "/moved"),
        ("files_sealed", "move-in", os.rename, inner, bait + "/in"),
        ("files_sealed", "link", os.link, file, work + "/link"),
        ("files_sealed", "symlink", os.symlink, "x", bait + "/sym"),
        ("files_sealed", "unlink", os.unlink, file),
        ("files_sealed", "rmdir", os.rmdir, folder),
        ("files_sealed", "chroot", os.chroot, "/"),     # a capability, harmless
        *(("files_sealed", "real-path", write, path) for path in given["sealed"]),
        ("modes_sealed", "chmod", os.chmod, bait, 0o700),
        ("modes_sealed", "utime", os.utime, bait),
        ("loop_protected", "kill", os.kill, loop, 0),
        ("loop_protected", "prlimit", lambda: resource.prlimit(
            loop, resource.RLIMIT_CORE, resource.prlimit(loop, resource.RLIMIT_CORE))),
        ("loop_protected", "memory", peek),     # the same check as ptrace, which would stop it
        ("loop_protected", "nice", lambda: os.setpriority(0, loop, os.getpriority(0, loop))),
        ("loop_protected", "affinity",
         lambda: os.sched_setaffinity(loop, os.sched_getaffinity(loop))),
        ("secrets_hidden", "read", opened, given["secret"], os.O_RDONLY),
        *(("secrets_hidden", "read-real", opened, path, os.O_RDONLY) for path in sys.argv[2:]),
        *(("secrets_hidden", "disk", opened, entry.path, os.O_RDONLY) for entry
          in os.scandir("/dev") if stat.S_ISBLK(os.lstat(entry.path).st_mode)),
        *((fact, name, reach, *server) for fact, name, *server in given["servers"]),
        *(("usable", "write", write, path) for path in given["writable"]),
        ("usable", "null", opened, "/dev/null", os.O_RDWR),
        ("usable", "children", raise_child),
        ("usable", "proc", own_proc)]:
    attempt(*row)
if os.path.isdir("/dev/shm"):
    attempt("usable", "shm", write, "/dev/shm")
if given["serve"]:
    attempt("usable", "localhost", serve)
if not given["network"]:
    attempt("network_off", "udp", reach, socket.AF_INET, ("192.0.2.1", 9), socket.SOCK_DGRAM)
leave_daemon(work + "/beat")
'''


@dataclass(frozen=True)
class Fact:
    """Whether one protection holds, and every act with what the kernel answered."""
    held: str = "unknown"   # yes, no or unknown; only yes counts
    seen: str = ""


Facts = Dict[str, Fact]     # a row for each of FACTS; without evidence it is `unknown`


def judge_fact(name: str, seen: Sequence[Tuple[str, str]]) -> Fact:
    """Weigh the acts of one fact: an act that came through is `no`, and a doubt is `unknown`."""
    answers = {answer for _, answer in seen}
    text = ", ".join(f"{act} {answer}" for act, answer in dict.fromkeys(seen))
    if name == "usable":
        return Fact("yes" if answers == {"ok"} else "no", text)
    if not answers or "ok" in answers:
        return Fact("no" if answers else "unknown", text)
    return Fact("yes" if answers <= REFUSALS | {UNREACHED} else "unknown", text)


def take_facts(fence: Fence, run: Runner, work: str, bait: str, secret: str,
               sealed: Sequence[str] = ()) -> Facts:
    """Run WITNESS inside `fence` and return what it and the loop saw.

    `work` is a writable folder of the fence, `bait` one that it must seal (not a hidden one),
    `secret` one that it must hide: each gets a passing sub-folder. `sealed` are real paths, tried
    in ways that leave no trace.
    """
    with contextlib.ExitStack() as stack:
        inner, lure, vault = (stack.enter_context(private_folder(path))
                              for path in (work, bait, secret))
        canary, space = os.path.join(vault, "canary"), "/proc/self/ns/pid"
        write_file(os.path.join(lure, "file"), b"bait")
        write_file(canary, b"canary")
        os.mkdir(os.path.join(lure, "folder"))
        servers = open_servers(fence, lure, stack)
        given = {"bait": lure, "work": inner, "secret": canary, "loop": os.getpid(),
                 "space": os.readlink(space) if os.path.lexists(space) else "",
                 "sealed": list(sealed), "writable": fence.writable,
                 "servers": [(*names, server.family, bound) for *names, server, bound in servers],
                 "network": fence.network, "serve": fence.network or fence.level == "namespaces"}
        hidden = filter(os.path.isfile, fence.hidden)   # words: one alone is 128 kB at most
        status, output = run(fence_argv(fence, [*PYTHON, WITNESS, json.dumps(given), *hidden]))
        came = select.select([server for _, _, server, _ in servers], [], [], 0)[0]
        outside = [("files_sealed", "outside", as_left(lure)),
                   ("daemons_killed", "beat", daemon_state(os.path.join(inner, "beat")))]
        outside += [(fact, f"{act}-served", "ok" if server in came else UNREACHED)
                    for fact, act, server, _ in servers]
    text = output.decode("utf-8", "replace")
    seen: List[Any] = [line.split(" ") for line in text.splitlines() if line.count(" ") == 2]
    for fact, act, answer in outside:   # that nothing arrived proves something if all was tried
        seen.append((fact, act, answer if status == 0 or answer == "ok" else "untried"))
    if status != 0:
        seen.append(("usable", f"status-{status}", text.strip()[-300:]))
    return {name: judge_fact(name, [(act, answer) for fact, act, answer in seen if fact == name])
            for name in FACTS}


def open_servers(fence: Fence, lure: str, stack: contextlib.ExitStack) -> List[Any]:
    """Listen where a whole fence lets nobody in; return (fact, act, server, its address)."""
    import socket   # not at the top: `--help` needn't pay for it
    spot, name = os.path.join(lure, "socket"), os.path.basename(lure) + str(os.getpid())
    wanted: List[Any] = []
    if sys.platform == "linux" and len(os.fsencode(spot)) < 108:   # as long as one can be
        wanted += [("sockets_off", "path", socket.AF_UNIX, spot),
                   ("sockets_off", "abstract", socket.AF_UNIX, "\0" + name)]
    if not fence.network:
        wanted.append(("network_off", "localhost", socket.AF_INET, ("127.0.0.1", 0)))
    servers = []
    for fact, act, family, address in wanted:
        server = stack.enter_context(socket.socket(family))
        server.bind(address)
        server.listen(8)
        bound = server.getsockname() if family == socket.AF_INET else address
        servers.append((fact, act, server, bound))
    return servers


def as_left(lure: str) -> str:
    """Look at the bait from outside: `unreached` if it is as it was laid out."""
    try:
        with open(os.path.join(lure, "file"), "rb") as stream:
            same = stream.read() == b"bait"
    except OSError:
        return "ok"
    return UNREACHED if same and set(os.listdir(lure)) <= {"file", "folder", "socket"} else "ok"


def daemon_state(beat: str) -> str:
    """Look whether the daemon that wrote `beat` still writes; no beat at all tells nothing."""
    if not os.path.exists(beat):
        return "never-began"
    size = os.path.getsize(beat)
    time.sleep(0.06)
    return UNREACHED if size and os.path.getsize(beat) == size else "ok"


@dataclass(frozen=True)
class Isolation:
    """What is in force: the level, a fence to derive others from, and what the witnesses saw."""

    level: str
    fence: Fence
    facts: Facts
    notes: Tuple[str, ...]              # why no better level
    state: Tuple[str, ...]              # hidden from everybody: state folder and ledger key
    secrets: Tuple[str, ...]            # these, and the holdout's files

    @property
    def sealed(self) -> bool:
        """Tell whether no program can write to a tree that isn't its own."""
        return self.facts["files_sealed"].held == "yes"

    def summary(self, config: Config) -> str:
        """Return the level and what is not in force, in one line."""
        lacking = [name for name in FACTS if self.facts[name].held != "yes"
                   and (name != "network_off" or config.metric.network == "deny")]
        return self.level + (f"; not in force: {', '.join(lacking)} (see check)" if lacking else "")

    def as_record(self) -> Dict[str, Any]:
        """Return it for the ledger."""
        claimed = {"runner": "claimed"} if self.level == "external" else {}
        return {"level": self.level, "fence": self.fence.level, **claimed,
                "notes": list(self.notes),
                "facts": {name: asdict(fact) for name, fact in self.facts.items()}}


class FenceFailed(ScalarLoopError):
    """A layer of the isolation that the gate had witnessed could not be put up again."""


def run_fenced(fence: Fence, argv: Sequence[str], **options: Any) -> Ended:
    """Run an untrusted program behind a fence; no descendant of it is left afterwards.

    Raises FenceFailed when the fence can't be put up: then the program was not run at all.
    """
    if fence.level in ("portable", "external"):
        try:
            return run_program(argv, sweep=True, **options)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR,
                                   errno.ELOOP, errno.EISDIR):
                raise
            options["sink"](f"can't be executed: {argv[0]} ({error.strerror})\n".encode())
            return Ended(FENCE_NO_EXEC, 0.0, False)
    reader, writer = os.pipe()
    try:
        ended = run_program(fence_argv(fence, argv, writer), sweep=True, keep=(writer,), **options)
    except ValueError as error:
        raise FenceFailed(f"isolation: {printable(str(error))}") from None
    finally:
        os.close(writer)
        os.set_blocking(reader, False)
        try:
            report = os.read(reader, 4096)
        except BlockingIOError:
            report = b""
        os.close(reader)
    if report and ended.status == FENCE_FAILED:
        raise FenceFailed("isolation: " + printable(report.decode("utf-8", "replace").strip()))
    return ended


def choose_isolation(config: Config, tmp: str, state_folder: str, holdout: Sequence[str],
                     watch: Watch) -> Isolation:
    """Take the asked-for level, or the best that can be had, and witness it; refuse less.

    A fact counts as held only if a witness inside the real fence saw it.
    """
    work, bait, scratch = (os.path.join(tmp, name) for name in ("witness", "bait", "scratch"))
    for path in (work, bait, scratch):
        os.makedirs(path, exist_ok=True)

    def run(argv: Sequence[str]) -> Tuple[int, bytes]:
        capture = Capture()
        ended = run_program(argv, cwd=work, env={"PATH": search_path()}, sink=capture, timeout=60.0,
                            watch=watch, sweep=True)
        return ended.status, capture.log()

    required = [word for word in config.isolation.require if word in LEVELS]
    wanted = config.isolation.level
    level, notes = probe_level(run, work) if wanted != "portable" or required else (wanted, ())
    for word in [*required, *([wanted] if wanted not in ("auto", "external") else [])]:
        if LEVELS.index(level) < LEVELS.index(word):
            why = "; ".join(notes) or f"the best here is {level}"
            raise Refused(f"isolation: {word} can't be had on this machine ({why}); set "
                          "[isolation] level or require to what it has")
    level = wanted if wanted not in ("auto", "external") else level
    secret = os.environ.get("SCALARLOOP_LEDGER_KEY", "")
    hidden = [state_folder] + ([os.path.abspath(secret)] if secret else [])
    secrets = [*hidden, *holdout]
    try:
        Fence(level, writable=(work, *map(os.path.expanduser, config.agent.writable)),
              hidden=tuple(secrets))
    except ValueError as error:
        raise Refused(f"agent: [agent] writable: {error}; name a narrower path") from None
    fence = Fence(level, writable=(work, scratch), hidden=tuple(secrets),
                  network=config.metric.network == "allow")
    secret = os.path.join(state_folder, "witness")
    remove_tree(secret)     # of a start that was cut off
    os.mkdir(secret, 0o700)
    try:
        facts = take_facts(fence, run, work, bait, secret, [config.path])
    finally:
        remove_tree(secret)
    missing = [word for word in config.isolation.require if word in FACTS
               and facts[word].held != "yes"]
    if missing:
        seen = "; ".join(f"{word}: {facts[word].seen or 'no witness'}" for word in missing)
        raise Refused(f"isolation: not in force at level {level}: {seen}; relax [isolation] "
                      "require or run where it can be had")
    off, usable = facts["network_off"], facts["usable"]
    if config.metric.network == "deny" and wanted != "external" and off.held != "yes":
        raise Refused(f"isolation: network = deny can't be had at level {level} "
                      f"({off.seen or 'no witness'}); run where it can, or allow it")
    if level not in ("portable", "external") and usable.held != "yes":
        raise Refused(f"isolation: at level {level} honest work fails ({usable.seen}); set "
                      "[isolation] level to a lower one")
    return Isolation("external" if wanted == "external" else level, fence, facts, tuple(notes),
                     tuple(hidden), tuple(secrets))


def isolation_rows(config: Config, isolation: Isolation) -> List[Tuple[str, str]]:
    """Return what is in force in plain words, as (state, text) rows for the gate's table."""
    held, open_ = [], []
    for name, words in FACTS.items():
        fact = isolation.facts[name]
        if name == "network_off" and config.metric.network == "allow":
            continue
        (held if fact.held == "yes" else open_).append((name, words, fact))
    rows = [("notice", "external: the metric's isolation is what [metric] runner gives, as you "
                       "claim; it was not witnessed. The "
                       "agent's:")] if isolation.level == "external" else []
    rows += [("ok", f"{isolation.fence.level}: " + "; ".join(words for _, words, _ in held))]
    rows += [("notice", f"not in force: {name}, that {words} (seen: "
                        f"{printable(fact.seen, 100) or 'no witness'})")
             for name, words, fact in open_]
    return rows + [("notice", f"no better level: {note}") for note in isolation.notes]


# ══ git ══════════════════════════════════════════════════════════════════════════════════════════
# Every call of the loop is made here: absolute program, environment from nothing, a private HOME
# whose .gitconfig only says safe.directory (-c does not do for that), no system or global config,
# no hooks, no fsmonitor, no replace objects. A repository that an agent can write is never opened.

class GitFailed(ScalarLoopError):
    """A git command failed in `git_dir`; carries its first line of complaint."""

    def __init__(self, text: str, git_dir: str):
        super().__init__(text)
        self.git_dir = git_dir


GIT_SETTINGS = ("core.hooksPath=/dev/null", "core.fsmonitor=false", "core.attributesFile=/dev/null",
                "core.excludesFile=/dev/null", "gc.auto=0", "maintenance.auto=false",
                "core.quotePath=true", "protocol.allow=never", "core.untrackedCache=false",
                "pack.threads=1", "pack.window=0")
IDENTITY = {f"GIT_{role}_{part}": value for role in ("AUTHOR", "COMMITTER")
            for part, value in (("NAME", "scalarloop"), ("EMAIL", "scalarloop@localhost"))}


def find_git() -> str:
    """Return the absolute path of git; refuse when there is none, or one that is too old."""
    program = shutil.which("git", path=search_path())
    if not program:
        raise Refused("git: not found on PATH; install git 2.25 or later")
    output = Capture(cap=1000)
    run_program([program, "--version"], cwd="/", env={"PATH": search_path()}, sink=output)
    found = re.search(rb"([0-9]+)\.([0-9]+)", output.log())
    if not found or (int(found[1]), int(found[2])) < (2, 25):
        version = printable(output.log().decode("utf-8", "replace").strip(), 60)
        raise Refused(f"git: {program} is {version or 'silent'}; install git 2.25 or later")
    return program


def is_full(path: str) -> bool:
    """Tell whether the disk under a path has no room: git does not always say so."""
    with contextlib.suppress(OSError):
        room = os.statvfs(path)
        return room.f_bavail * room.f_frsize < 1 << 13
    return False


@dataclass(frozen=True)
class Repository:
    """A git repository that the loop may run git on; commands fail with GitFailed."""

    program: str
    home: str
    git_dir: str = ""
    work_tree: str = ""
    cwd: str = "/"

    def git(self, *args: str, stdin: Any = b"", sink: Optional[Callable[[bytes], None]] = None,
            env: Optional[Dict[str, str]] = None, accept: Tuple[int, ...] = (0,)) -> bytes:
        """Run one git command and return its standard output (empty when `sink` takes it)."""
        output: List[bytes] = []
        errors = Capture(cap=4096)
        where = {"GIT_DIR": self.git_dir} if self.git_dir else {}
        if self.work_tree:
            where["GIT_WORK_TREE"] = self.work_tree
        environment = {
            "PATH": search_path(), "HOME": self.home, "XDG_CONFIG_HOME": self.home, "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0",
            "GIT_NO_REPLACE_OBJECTS": "1", "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1",
            "TZ": "UTC", **IDENTITY, **where, **(env or {})}
        settings = [word for setting in GIT_SETTINGS for word in ("-c", setting)]
        try:
            ended = run_program([self.program, *settings, *args], cwd=self.cwd, env=environment,
                                sink=sink or output.append, errors=errors, stdin=stdin)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise GitFailed(f"git can't run in {self.cwd} ({error.strerror})",
                            self.git_dir) from None
        if ended.status not in accept:
            lines = errors.log().decode("utf-8", "replace").strip().splitlines()
            if any("No space left on device" in line for line in lines) or is_full(self.git_dir):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.git_dir)
            name = next((word for word in args if word != "-c" and "=" not in word), "git")
            raise GitFailed(f"{name} failed ({ended.describe()}): "
                            f"{printable(lines[0]) if lines else 'no message'}", self.git_dir)
        return b"".join(output)

    def line(self, *args: str, **options: Any) -> str:
        """Run one git command and return its one line of output."""
        return os.fsdecode(self.git(*args, **options).rstrip(b"\n"))

    def refs(self, names: Sequence[str], busy: str = "") -> Dict[str, str]:
        """Return the objects that these refs point at; an absent one has no row.

        A symbolic one is "symbolic": following it would move another branch. With `busy`, one that
        is checked out somewhere is that word.
        """
        known = f"%(if)%(worktreepath)%(then){busy}%(else)%(objectname)%(end)" if busy \
            else "%(objectname)"
        rows = self.git("for-each-ref", "--format=%(refname) %(if)%(symref)%(then)symbolic%(else)"
                        f"{known}%(end)", *names).splitlines()
        found = dict(os.fsdecode(row).rsplit(" ", 1) for row in rows)
        return {name: found[name] for name in names if name in found}

    def ref(self, name: str) -> str:
        """Return the object that a ref points at, or "" when there is none."""
        return self.line("rev-parse", "--verify", "--quiet", name, accept=(0, 1))


@dataclass(frozen=True)
class UserRepository:
    """What the loop needs to know of the user's repository; it is read once, at the start."""

    repo: Repository
    top: str            # root of the work tree
    prefix: bytes       # loop.ini's folder below it: b"" or b"sub/folder/"
    head: str           # the checked-out commit
    branch: str         # the checked-out branch, "" when HEAD is detached
    objects: str        # where its objects live
    common_dir: str     # where its refs live

    @property
    def algorithm(self) -> str:
        """Return the object format, sha1 or sha256."""
        return "sha256" if len(self.head) == 64 else "sha1"


def open_user_repository(program: str, home: str, folder: str) -> UserRepository:
    """Find the repository around `folder`; refuse a bare one, none, or one without a commit."""
    found = Repository(program, home, cwd=folder)
    try:
        bare = found.line("rev-parse", "--is-bare-repository")
    except GitFailed as error:
        raise Refused(f"git: {folder} is not in a git repository that can be read ({error}); run "
                      "`git init` and commit first") from None
    if bare == "true":
        raise Refused(f"git: {folder} is in a bare repository; use a clone with a work tree")
    if found.line("rev-parse", "--is-inside-work-tree") != "true":
        raise Refused(f"git: {folder} is inside a .git folder; use the work tree")
    top = found.line("rev-parse", "--show-toplevel")
    prefix = os.fsencode(found.line("rev-parse", "--show-prefix"))
    git_dir = found.line("rev-parse", "--absolute-git-dir")
    objects, common = (os.path.abspath(os.path.join(folder, found.line("rev-parse", *words)))
                       for words in (("--git-path", "objects"), ("--git-common-dir",)))
    repo = Repository(program, home, git_dir, top, top)
    head = repo.ref("HEAD^{commit}")
    if not head:
        raise Refused("git: the repository has no commit yet; commit what the loop starts from")
    branch = repo.line("symbolic-ref", "--quiet", "--short", "HEAD", accept=(0, 1))
    return UserRepository(repo, top, prefix, head, branch, objects, common)


class Listed(NamedTuple):
    """A row of `git ls-tree`: its mode and object."""

    mode: int
    oid: str


class Edit(NamedTuple):
    """The new bytes of an in-scope file; `data` is None when it was deleted."""

    mode: int
    data: Optional[bytes]


def blob_id(data: bytes, algorithm: str) -> str:
    """Return the id that git gives to a file's bytes."""
    return hashlib.new(algorithm, b"blob %d\0" % len(data) + data).hexdigest()


PIECE = 1 << 20     # bytes of the ledger in one file of its anchor


class ObjectStream:
    """Take the output of `git cat-file --batch`, check each object's own hash, and pass it on.

    `begin(n)` returns what takes the bytes of the n-th object, `end(n, digest, size)` is called
    with the SHA-256 of them. Raises StoreDamaged for anything that is missing or not itself.
    """

    def __init__(self, oids: Sequence[str], begin: Callable[[int], Callable[[bytes], None]],
                 end: Callable[[int, bytes, int], None]):
        self.oids, self.begin, self.end = oids, begin, end
        self.count = 0
        self._rest = b""
        self._left = -1     # bytes of the body to come, its newline included; -1: a header is next
        self._size = 0
        self._take: Callable[[bytes], None] = lambda data: None
        self._sha256 = self._own = hashlib.sha256()

    def __call__(self, chunk: bytes) -> None:
        data, at = self._rest + chunk, 0
        while at < len(data):
            if self._left < 0:
                end = data.find(b"\n", at)
                if end < 0:
                    break
                self._begin(data[at:end])
                at = end + 1
            else:
                piece = data[at:at + self._left]
                at += len(piece)
                self._left -= len(piece)
                body = piece[:-1] if self._left == 0 else piece
                self._sha256.update(body)
                self._own.update(body)
                self._take(body)
                if self._left == 0:
                    self._finish()
        self._rest = data[at:]

    def _begin(self, header: bytes) -> None:
        words = header.split()
        if self.count >= len(self.oids) or len(words) != 3 \
                or words[0].decode() != self.oids[self.count]:
            raise StoreDamaged(f"store: object {printable(header.decode('ascii', 'replace'))}")
        self._size = int(words[2])
        self._left = self._size + 1
        self._sha256 = hashlib.sha256()
        self._own = hashlib.new("sha256" if len(words[0]) == 64 else "sha1", b"%s %d\0"
                                % (words[1], self._size))
        self._take = self.begin(self.count)

    def _finish(self) -> None:
        if self._own.hexdigest() != self.oids[self.count]:
            raise StoreDamaged(f"store: object {self.oids[self.count]} holds other bytes")
        self.end(self.count, self._sha256.digest(), self._size)
        self.count += 1
        self._left = -1


@dataclass(frozen=True)
class Store:
    """The loop's private bare repository: a shallow copy of the base, and what was proposed."""

    repo: Repository

    def list_tree(self, commit: str) -> Dict[bytes, Listed]:
        """Return every file of a commit's tree."""
        rows = self.repo.git("ls-tree", "-r", "-z", "--full-tree", commit).split(b"\0")
        table = {}
        for row in rows[:-1]:
            meta, _, path = row.partition(b"\t")
            mode, _, oid = meta.split(b" ")
            table[path] = Listed(int(mode, 8), oid.decode())
        return table

    def check_objects(self, *revisions: str) -> None:
        """Hash every object of these revisions (words of git rev-list), as git does not do for
        trees; raise StoreDamaged for one that is missing or not itself.
        """
        rows = self.repo.git("rev-list", "--objects", *revisions).splitlines()
        self.read_objects([row.split(b" ")[0].decode() for row in rows],
                          lambda index: lambda data: None, lambda index, digest, size: None)

    def list_changes(self, old: str, new: str) -> Dict[bytes, Listed]:
        """Return what differs between two trees, as in the new one; a deleted file has mode 0."""
        words = self.repo.git("diff-tree", "-r", "-z", "--raw", "--no-renames", "--no-abbrev",
                              old, new).split(b"\0")
        return {path: Listed(int(row.split()[1], 8), row.split()[3].decode())
                for row, path in zip(words[0::2], words[1::2])}

    def read_objects(self, oids: Sequence[str], begin: Callable[[int], Callable[[bytes], None]],
                   end: Callable[[int, bytes, int], None]) -> None:
        """Stream objects in order; see ObjectStream."""
        if not oids:
            return
        stream = ObjectStream(oids, begin, end)
        self.repo.git("cat-file", "--batch", stdin="".join(f"{oid}\n" for oid in oids).encode(),
                      sink=stream)
        if stream.count != len(oids):
            raise StoreDamaged(f"store: {len(oids) - stream.count} objects can't be read")

    def write_tree(self, base: str, edits: Dict[bytes, Edit]) -> str:
        """Write `edits` over the tree of commit `base`, bytes as they are; return the tree."""
        lines = [b"from %s\n" % base.encode()]
        for path, edit in sorted(edits.items(), key=lambda item: item[1].data is not None):
            if edit.data is None:       # deletions first: a file may have become a folder
                lines.append(b"D %s\n" % quoted_path(path))
            else:
                lines += inline_file(edit.mode, path, edit.data)
        return self._import("candidate", lines)[1]

    def write_anchor(self, ledger: str, message: str, user: "UserRepository", base: str, last: str
                     ) -> Tuple[str, str]:
        """Write a commit that holds the ledger; return its id, and its pack.

        Its parent is `base`, so that nobody prunes that. In pieces: those that the anchor before
        it, `last`, holds too are taken over from there, so that a keep costs the same in a long
        run as in a short one. The pack has all that the user's repository lacks: it is written in
        a place of its own, where nothing lies that was never handed over.
        """
        folder = os.path.join(self.staging, "pack")
        remove_tree(self.staging)
        os.makedirs(folder)
        held = Store(user.repo).list_tree(last) \
            if last and os.path.getsize(ledger) > PIECE else {}

        def lines() -> Iterator[bytes]:
            yield b"from %s\ndeleteall\n" % base.encode()
            with open(ledger, "rb") as stream:
                for number, piece in enumerate(iter(lambda: stream.read(PIECE), b"")):
                    path = b"ledger.jsonl" + (b".%06d" % number if number else b"")
                    oid = blob_id(piece, user.algorithm)
                    if path in held and held[path].oid == oid:
                        yield b"M %o %s %s\n" % (PLAIN, oid.encode(), quoted_path(path))
                    else:
                        yield from inline_file(PLAIN, path, piece)

        commit, _ = self._import("anchor", lines(), message.encode(), int(time.time()),
                                 "fastimport.unpackLimit=1", user.objects)
        new = [name[:-4] for name in os.listdir(folder) if name.endswith(".idx")]
        if len(new) != 1:
            raise StoreDamaged(f"store: {len(new)} packs were written for one anchor")
        return commit, os.path.join(folder, new[0])

    def read_anchor(self, commit: str, sink: Callable[[bytes], None]) -> None:
        """Pass on the ledger that an anchor's commit holds."""
        rows = sorted(self.list_tree(commit).items())
        self.read_objects([row.oid for _, row in rows], lambda index: sink,
                          lambda index, digest, size: None)

    @property
    def packs(self) -> str:
        """Return the folder of packs."""
        return os.path.join(self.repo.git_dir, "objects", "pack")

    @property
    def staging(self) -> str:
        """Return where an anchor's objects are on their way to the user's repository."""
        return os.path.join(self.repo.git_dir, "anchor")

    def _import(self, ref: str, lines: Iterable[bytes], message: bytes = b"", when: int = 0,
                setting: str = "gc.auto=0", known: str = "") -> Tuple[str, str]:
        """Let fast-import make a commit; return commit and tree.

        With `known`, the objects of another repository, it is written to `staging`, over those.
        """
        env = {"GIT_OBJECT_DIRECTORY": self.staging, "GIT_ALTERNATE_OBJECT_DIRECTORIES":
               os.fsdecode(quoted_path(os.fsencode(known)))} if known else {}
        with tempfile.TemporaryFile(dir=self.repo.git_dir) as script:
            script.write(b"reset refs/scalarloop/%s\n\ncommit refs/scalarloop/%s\nmark :1\n"
                         b"committer scalarloop <scalarloop@localhost> %d +0000\ndata %d\n%s\n"
                         % (ref.encode(), ref.encode(), when, len(message), message))
            script.writelines(lines)
            script.write(b'\nget-mark :1\nls :1 ""\ndone\n')
            script.seek(0)
            answer = self.repo.git("-c", setting, "fast-import", "--quiet", "--force", "--done",
                                   "--cat-blob-fd=1", "--date-format=raw", stdin=script,
                                   env=env).split()
        if len(answer) == 2:        # an empty tree is "missing"
            return answer[0].decode(), self.repo.line("mktree")
        if len(answer) < 4 or answer[2] != b"tree":
            raise StoreDamaged(f"store: fast-import answered {answer!r:.80}")
        return answer[0].decode(), answer[3].decode()

    def tree_without(self, tree: str, paths: Sequence[bytes], index: str) -> str:
        """Return `tree` less some paths; `index` names a scratch file."""
        env = {"GIT_INDEX_FILE": index, "GIT_WORK_TREE": os.path.dirname(index)}
        self.repo.git("read-tree", tree, env=env)
        self.repo.git("update-index", "-z", "--force-remove", "--stdin", env=env,
                      stdin=b"".join(path + b"\0" for path in paths))
        return self.repo.line("write-tree", env=env)

    def commit(self, tree: str, parent: str, message: str, when: int) -> str:
        """Write a commit and return its id; `parent` may be empty."""
        date = {f"GIT_{role}_DATE": f"@{when} +0000" for role in ("AUTHOR", "COMMITTER")}
        parents = ["-p", parent] if parent else []
        return self.repo.line("commit-tree", tree, *parents, stdin=message.encode(), env=date)

    def ignored(self, skeleton: str, paths: Sequence[bytes]) -> Set[bytes]:
        """Return those new paths that the base's own ignore rules cover.

        `skeleton` holds the base's .gitignore files and nothing else, so that a rule which the
        agent wrote counts for nothing.
        """
        if not paths:
            return set()
        inside = replace(self.repo, work_tree=skeleton, cwd=skeleton)
        found = inside.git("check-ignore", "-z", "--stdin", "--no-index", accept=(0, 1),
                           stdin=b"".join(b"./%s\0" % path for path in paths))
        return {path[2:] for path in found.split(b"\0")[:-1]}   # "./" keeps a ":" from being magic

    def diff(self, old: str, new: str, sink: Callable[[bytes], None]) -> None:
        """Pass a patch between two trees on to `sink`."""
        self.repo.git("diff-tree", "-r", "-p", "--no-ext-diff", "--no-textconv", "--no-renames",
                      "--no-color", old, new, sink=sink)


def inline_file(mode: int, path: bytes, data: bytes) -> List[bytes]:
    """Return a file as git's fast-import reads it."""
    return [b"M %o inline %s\ndata %d\n" % (mode, quoted_path(path), len(data)), data, b"\n"]


def quoted_path(path: bytes) -> bytes:
    """Quote a path as git's fast-import reads it."""
    quoted = b"".join(b"\\%03o" % byte if byte in b'"\\' or byte < 32 else bytes([byte])
                      for byte in path)
    return b'"' + quoted + b'"'


def copy_objects(source: Repository, target: Repository, wanted: bytes, *options: str) -> None:
    """Copy objects from one repository to another, by a pack whose every object is checked."""
    with tempfile.TemporaryFile(dir=target.git_dir) as pack:
        source.git("pack-objects", "--quiet", "--stdout", *options, sink=pack.write, stdin=wanted)
        pack.seek(0)
        target.git("index-pack", "--stdin", stdin=pack)


def create_store(path: str, user: UserRepository) -> Store:
    """Make the store: a bare repository with the base commit, its tree, and no history."""
    os.makedirs(path, 0o700)
    repo = replace(user.repo, git_dir=path, work_tree="", cwd=path)
    form = ["--object-format=sha256"] if user.algorithm == "sha256" else []
    repo.git("init", "--quiet", "--bare", "--template=", *form)
    objects = [line.split(b" ")[0] for line in user.repo.git(
        "rev-list", "--objects", "--no-walk", user.head).splitlines()]
    copy_objects(user.repo, repo, b"\n".join(objects) + b"\n")
    if user.repo.line("rev-list", "--parents", "-n1", user.head).split()[1:]:
        write_file(os.path.join(path, "shallow"), user.head.encode() + b"\n")
    repo.git("update-ref", "refs/scalarloop/base", user.head)
    return Store(repo)


def pack_new(store: Store, new: str, known: str) -> str:
    """Pack what commit `new` has and `known` lacks in the store, flushed to disk; return the pack.
    """
    wanted = f"{new}\n^{known}\n"
    name = store.repo.line("pack-objects", "--quiet", "--revs", os.path.join(store.packs, "pack"),
                           stdin=wanted.encode())
    sync_path(store.packs)
    return os.path.join(store.packs, f"pack-{name}")


def hand_over(user: UserRepository, pack: str) -> None:
    """Put a pack (its path, without ending) into the user's repository, before any ref names it.

    No git runs there for it: a fetch would run what the user's config names.
    """
    folder = os.path.join(user.objects, "pack")
    os.makedirs(folder, exist_ok=True)
    for ending in (".pack", ".idx"):        # git looks for the .idx, so that comes last
        target = os.path.join(folder, os.path.basename(pack) + ending)
        if not os.path.exists(target):
            with open(pack + ending, "rb") as source:
                write_file(target, source, 0o444)
            keep_owner(user.objects, [target])


def move_refs(user: UserRepository, moves: Sequence[Tuple[str, str, str]]) -> None:
    """Move (ref, new, old) all or none, each only if it still is at `old` ("": absent).

    Raises RecordBroken when one is elsewhere: it is somebody else's then, and left alone.
    """
    script = "".join(f"option no-deref\nupdate {ref} {new} {old or '0' * len(new)}\n"
                     for ref, new, old in moves)
    try:
        user.repo.git("update-ref", "-m", "scalarloop", "--stdin", stdin=script.encode())
    except GitFailed as error:
        now = user.repo.refs([ref for ref, _, _ in moves])
        if all(now.get(ref, "") == new for ref, new, _ in moves):
            return
        blocked = user.repo.refs([ref.rpartition("/")[0] for ref, _, _ in moves])
        if all(now.get(ref, "") == old for ref, _, old in moves) and not blocked:
            raise       # not moved by anybody: git itself could not, and says why
        raise RecordBroken(f"{' or '.join(row[0] for row in moves)} is no longer where this run "
                           f"left it ({error}); it was left alone. Look at it, then move it back "
                           "or start a new run") from None
    parts = [ref.split("/") for ref, _, _ in moves]
    with contextlib.suppress(OSError):      # the refs have moved: what follows can't undo that
        keep_owner(user.objects, [os.path.join(user.common_dir, log, *words[:n]) for words in parts
                                  for log in ("", "logs") for n in range(2, len(words) + 1)])


def keep_owner(like: str, paths: Iterable[str]) -> None:
    """As root over somebody else's repository, give new files to the owner of `like`."""
    owner = os.stat(like)
    if os.geteuid() == 0 and owner.st_uid != 0:
        for path in paths:
            if os.path.lexists(path) and os.lstat(path).st_uid == 0:
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


# ══ paths and scope ══════════════════════════════════════════════════════════════════════════════

def decoded(path: bytes) -> str:
    """Return a path as text that can be turned back into the same bytes."""
    return path.decode("utf-8", "surrogateescape")


def lies_in(path: bytes, places: Sequence[bytes]) -> bool:
    """Tell whether a path is one of these files or folders, or below one."""
    return any(path == place or path.startswith(place + b"/") for place in places)


def segments_match(parts: Sequence[str], globs: Sequence[str]) -> bool:
    """Match a path to a glob segment by segment: `*` stays within one, `**` spans any number.

    A segment that begins with .git matches only its own name, written out; .git itself never.
    """
    reached = {0}       # how many segments can be matched so far
    for number, glob in enumerate(globs, 1):
        before, reached = reached, set()
        for at in before:
            if glob != "**":
                if at < len(parts) and segment_matches(parts[at], glob):
                    reached.add(at + 1)
                continue
            if number < len(globs):     # at the end `**` stands for one segment or more
                reached.add(at)
            while at < len(parts) and not parts[at].lower().startswith(".git") \
                    and at + 1 not in reached:
                at += 1
                reached.add(at)
    return len(parts) in reached


def segment_matches(part: str, glob: str) -> bool:
    """Match one segment; of those that begin with .git only one that is written out, never .git."""
    if part.lower().startswith(".git"):
        return part == glob and part.lower() != ".git"
    return fnmatch.fnmatchcase(part, glob)


def split_glob(glob: str) -> Tuple[str, ...]:
    """Return a glob's segments; `src/` means everything below src."""
    text = glob + "**" if glob.endswith("/") else glob
    return tuple(part for part in text.split("/") if part not in ("", "."))


@dataclass(frozen=True)
class Scope:
    """What the agent may change: globs below `prefix`; a path that is also sealed is not in it."""

    prefix: bytes
    globs: Tuple[Tuple[str, ...], ...]
    sealed: Tuple[Tuple[str, ...], ...]     # loop.ini and state folders always among them
    dropped: Tuple[Tuple[str, ...], ...]

    def _parts(self, path: bytes) -> Optional[List[str]]:
        inside = path.startswith(self.prefix)
        return decoded(path[len(self.prefix):]).split("/") if inside else None

    def holds(self, path: bytes) -> bool:
        """Tell whether the agent may change this path."""
        parts = self._parts(path)
        return parts is not None and any(segments_match(parts, glob) for glob in self.globs) \
            and not self.seals(path)

    def seals(self, path: bytes) -> bool:
        """Tell whether `seal` names this path or a folder above it."""
        parts = self._parts(path)
        return parts is not None and any(
            segments_match(parts[:n], glob)
            for glob in self.sealed for n in range(1, len(parts) + 1))

    def drops(self, path: bytes) -> bool:
        """Tell whether `ignore` names this path: an agent's own droppings."""
        parts = self._parts(path)
        return parts is not None and any(segments_match(parts, glob) for glob in self.dropped)


def is_outside(word: str) -> bool:
    """Tell whether a `seal` word names a path of the machine rather than of the tree."""
    return word.startswith(("/", "~")) or ".." in word.split("/")


def outside_path(config: Config, word: str) -> str:
    """Return the absolute path that a word of loop.ini stands for."""
    return os.path.abspath(os.path.join(config.folder, os.path.expanduser(word)))


def any_case(name: str) -> str:
    """Return a glob for a name in any letters: some file systems don't tell them apart."""
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else f"[{c}]" if c in "*?[" else c
                   for c in name)


def make_scope(config: Config, prefix: bytes) -> Scope:
    """Build the scope of a config for a loop.ini that sits at `prefix` in its repository."""
    loop = config.loop
    return Scope(prefix, tuple(map(split_glob, loop.scope)),
                 (*(split_glob(word) for word in loop.seal if not is_outside(word)),
                  (any_case(os.path.basename(config.path)),), ("**", any_case(".scalarloop"))),
                 tuple(map(split_glob, loop.ignore)))


# ══ trees on disk ════════════════════════════════════════════════════════════════════════════════
# One mechanism serves workspace and cleanrooms: write a tree from the store, remember the stat
# signature of everything in it, and later walk it and say what is different.

class Entry(NamedTuple):
    """A file that must be in a tree: git mode, git object ("" when it isn't tracked), content."""

    mode: int
    oid: str
    digest: bytes       # SHA-256 of the bytes, or of a symlink's target
    size: int


Manifest = Dict[bytes, Entry]
GITLINK, SYMLINK_MODE, EXECUTABLE, PLAIN = 0o160000, 0o120000, 0o100755, 0o100644
LFS_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\n"
                         rb"(?:[a-z0-9.-]+ [^\n]*\n)*?"
                         rb"oid sha256:([0-9a-f]{64})\nsize ([0-9]+)\n")


def take_manifest(store: Store, commit: str, lfs: FrozenSet[bytes]) -> Manifest:
    """Hash every file of a commit's tree; a git-lfs pointer in `lfs` counts as its content."""
    store.check_objects("--no-walk", "--filter=blob:none", commit)
    listed = sorted(store.list_tree(commit).items())
    files = [(path, row) for path, row in listed if row.mode != GITLINK]
    manifest: Manifest = {path: Entry(row.mode, row.oid, b"", 0) for path, row in listed
                          if row.mode == GITLINK}
    pieces: List[bytes] = []

    def begin(index: int) -> Callable[[bytes], None]:
        pieces.clear()
        return pieces.append if files[index][0] in lfs else lambda data: None

    def end(index: int, digest: bytes, size: int) -> None:
        path, row = files[index]
        pointer = LFS_POINTER.fullmatch(b"".join(pieces)) if pieces else None
        if pointer:
            digest, size = bytes.fromhex(pointer[1].decode()), int(pointer[2])
        manifest[path] = Entry(row.mode, row.oid, digest, size)

    store.read_objects([row.oid for _, row in files], begin, end)
    return manifest


def manifest_root(entries: Iterable[Tuple[bytes, Entry]]) -> str:
    """Return one SHA-256 over paths, modes and content; every field is length-prefixed."""
    digest = hashlib.sha256()
    for path, entry in sorted(entries):
        for part in (path, b"%o" % entry.mode, entry.digest):
            digest.update(b"%d:%s" % (len(part), part))
    return digest.hexdigest()


def hash_file(path: bytes) -> Tuple[bytes, int]:
    """Return the SHA-256 and the size of a regular file; never follows a link, never blocks."""
    with open_regular(path) as stream:
        digest, size = hashlib.sha256(), 0
        for chunk in iter(lambda: stream.read(CHUNK), b""):
            digest.update(chunk)
            size += len(chunk)
        return digest.digest(), size


def stamp_of(status: os.stat_result) -> bytes:
    """Return the stat signature of a file: it changes with any write, even one that is undone."""
    return struct.pack("=QqqqI", status.st_ino, status.st_size, status.st_mtime_ns,
                       status.st_ctime_ns, status.st_mode)


def entry_of(path: bytes, status: os.stat_result) -> Entry:
    """Read a file, a symlink, or the names in a folder, into an (untracked) Entry."""
    if stat.S_ISDIR(status.st_mode):
        names = b"\0".join(sorted(os.listdir(path)))
        return Entry(stat.S_IFDIR, "", hashlib.sha256(names).digest(), len(names))
    if stat.S_ISLNK(status.st_mode):
        target = os.readlink(path)
        return Entry(SYMLINK_MODE, "", hashlib.sha256(target).digest(), len(target))
    digest, size = hash_file(path)
    return Entry(EXECUTABLE if status.st_mode & 0o100 else PLAIN, "", digest, size)


def scan(root: bytes, below: bytes = b"", locked: Optional[List[bytes]] = None
         ) -> Iterator[Tuple[bytes, os.stat_result]]:
    """Walk a tree without following links: (path below root, lstat), a folder before its content.

    Folders that may not be listed are added to `locked`; without it, and for any other fault, it
    raises CensusError.
    """
    pending = [below]
    while pending:
        folder = pending.pop()
        prefix = folder + b"/" if folder else b""
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                rows = [(prefix + entry.name, entry.stat(follow_symlinks=False))
                        for entry in entries]
        except PermissionError:
            if locked is None or not folder:
                raise CensusError(Reason.UNREADABLE, folder) from None
            locked.append(folder)
            continue
        except OSError:
            raise CensusError(Reason.CENSUS_FAILED, folder) from None
        for path, status in rows:
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            yield path, status


@dataclass
class Layer:
    """Untracked files that belong to a pristine tree: shared folders, setup's output, a .git.

    `sources` says where the bytes of each entry are kept, out of any program's reach.
    """

    entries: Manifest = field(default_factory=dict)
    sources: Dict[bytes, bytes] = field(default_factory=dict)
    folders: Set[bytes] = field(default_factory=set)
    loose: Set[bytes] = field(default_factory=set)      # may change during a run; put back after it

    def __or__(self, other: "Layer") -> "Layer":
        """Return both in one; the other one's entries win."""
        return Layer({**self.entries, **other.entries}, {**self.sources, **other.sources},
                     self.folders | other.folders, self.loose | other.loose)


def take_layer(root: bytes, master: bytes, paths: Iterable[Tuple[bytes, os.stat_result]]) -> Layer:
    """Copy files and folders of `root` to `master`, and return them as a layer."""
    layer = Layer()
    for path, status in paths:
        source, copy = os.path.join(root, path), os.path.join(master, path)
        if stat.S_ISDIR(status.st_mode):
            layer.folders.add(path)
            os.makedirs(copy, exist_ok=True)
            continue
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(source), copy)
        elif stat.S_ISREG(status.st_mode):
            shutil.copyfile(source, copy, follow_symlinks=False)
        else:
            continue    # a socket or a FIFO has no bytes to keep
        layer.entries[path] = entry_of(source, status)
        layer.sources[path] = copy
    return layer


class Change(NamedTuple):
    """One difference between a tree on disk and what was written there.

    `kind` is created, modified, touched (same bytes, another stat signature), deleted, retyped,
    mode, set_id, hard_link, or for a folder: folder_created, folder_touched, folder_deleted,
    folder_locked (a new one that may not be listed).
    """

    kind: str
    path: bytes
    status: Optional[os.stat_result]


class Tree:
    """A folder that the loop writes from the store, hands to a program, and inspects after it.

    `found` holds what the last inspection saw; the next `make_pristine` undoes just that. A tree
    that was handed out and not inspected since is `dirty`, one that can't be walked is rebuilt.
    """

    def __init__(self, root: str, store: Store, layer: Layer, kept: Sequence[bytes] = (),
                 lfs_folder: str = ""):
        self.root, self.store, self.layer = os.fsencode(root), store, layer
        self.kept = tuple(kept)     # folders that survive from run to run (`cache`)
        self.lfs_folder = lfs_folder
        self.manifest: Optional[Manifest] = None
        self.expected: Manifest = {}
        self.stamps: Dict[bytes, bytes] = {}
        self.folders: Dict[bytes, bytes] = {}
        self.found: List[Change] = []
        self.dirty = False
        self.blind = not stamps_tell(os.path.dirname(root))     # then every byte is hashed
        self._unsettled: Set[bytes] = set()
        self._latest = 0

    def set_layer(self, layer: Layer) -> None:
        """Give the tree other untracked files; they are written by the next `make_pristine`."""
        if layer == self.layer:
            return
        self.layer = layer
        if self.manifest is not None:
            self.manifest = dict(self.manifest)     # another identity: compared anew

    def make_pristine(self, manifest: Manifest) -> None:
        """Make the tree exactly `manifest` and its layer, changing only what differs."""
        if self.dirty and self.manifest is not None:
            try:
                self.inspect()
            except CensusError:
                self.manifest = None
        self.dirty = True       # until all of it is written: a full disk may come in between
        try:
            if self.manifest is None:
                self._begin_anew()
            self._switch(manifest, self.found)
        except PermissionError:     # its folders were locked: unlock and write all of it again
            self._begin_anew()
            self._switch(manifest, [])
        self.found, self.dirty = [], False

    def _begin_anew(self) -> None:
        """Make the root an empty folder, but for the folders of the layer."""
        remove_tree(os.fsdecode(self.root))
        os.makedirs(self.root, 0o700)
        self.manifest, self.expected, self.stamps, self.folders, self.found = None, {}, {}, {}, []
        self._unsettled.clear()
        for path in self.layer.folders:
            os.makedirs(os.path.join(self.root, path), exist_ok=True)
            self._mark_folders(path)
        self._mark_folders(b"")

    def _switch(self, manifest: Manifest, changes: Sequence[Change]) -> None:
        stale = {change.path for change in changes if not change.kind.startswith("folder")
                 and change.kind not in ("created", "touched")}
        gone: List[bytes] = []
        if manifest is not self.manifest:
            old, wanted = self.expected, {**self.layer.entries, **manifest}
            stale.update(path for path, entry in wanted.items() if old.get(path) != entry)
            gone = [path for path in old if path not in wanted]
            for path in stale:      # a failure half-way must not leave a signature that fits
                self.stamps.pop(path, None)
            self.expected, self.manifest = wanted, manifest
        for change in changes:
            if change.kind in ("created", "folder_created"):
                self._remove(change.path)
        for path in [*gone, *stale]:
            self._remove(path)
        for path in gone:
            self._prune(os.path.dirname(path))
        for change in changes:
            if change.kind == "folder_deleted":
                self._restore_folder(change.path)
        self._write([path for path in stale if path in self.expected])
        for change in changes:
            if change.kind == "touched" and change.path in self.expected \
                    or change.kind == "folder_touched" and change.path in self.folders:
                self._stamp(change.path)
        self._settle()

    def add_files(self, rows: Sequence[Tuple[bytes, bytes]]) -> None:
        """Copy (source, path) into the tree as what a program left there: gone at the next switch.
        """
        for source, path in rows:
            target = os.path.join(self.root, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(source, target, follow_symlinks=False)
            folder = os.path.dirname(path)
            while folder not in self.folders:
                folder = os.path.dirname(folder)
            self._unsettled.add(folder)
        self._settle()

    def _remove(self, path: bytes) -> None:
        full = os.path.join(self.root, path)
        self.stamps.pop(path, None)
        self._mark_folders(os.path.dirname(path), only=True)
        try:
            if stat.S_ISDIR(os.lstat(full).st_mode):
                remove_tree(os.fsdecode(full))
            else:
                os.unlink(full)
        except (FileNotFoundError, NotADirectoryError):
            pass

    def _prune(self, folder: bytes) -> None:
        """Remove folders that became empty: git has none."""
        while folder and folder not in self.layer.folders:
            try:
                os.rmdir(os.path.join(self.root, folder))
            except FileNotFoundError:
                pass
            except OSError:
                return
            self.folders.pop(folder, None)
            self._unsettled.discard(folder)
            folder = os.path.dirname(folder)
            self._mark_folders(folder, only=True)

    def _restore_folder(self, path: bytes) -> None:
        """Forget a folder that is gone, unless it is one that must be there though empty."""
        if path in self.layer.folders:
            os.makedirs(os.path.join(self.root, path), exist_ok=True)
            self._mark_folders(path)
        else:
            self.folders.pop(path, None)
            self._unsettled.discard(path)

    def _write(self, paths: List[bytes]) -> None:
        """Write these files from the store or from their layer; a stream error leaves StoreDamaged.
        """
        tracked = []
        for path in paths:
            entry = self.expected[path]
            os.makedirs(os.path.dirname(os.path.join(self.root, path)), exist_ok=True)
            self._mark_folders(os.path.dirname(path))
            held = os.path.join(self.lfs_folder, entry.digest.hex())
            if entry.mode == GITLINK:
                os.makedirs(os.path.join(self.root, path), exist_ok=True)
                self._mark_folders(path)
            elif self.layer.entries.get(path) is entry:
                self._copy(path, entry, self.layer.sources[path])
            elif self.lfs_folder and os.path.exists(held):
                self._copy(path, entry, os.fsencode(held))
            else:
                tracked.append(path)
        out: List[Any] = []

        def begin(index: int) -> Callable[[bytes], None]:
            entry = self.expected[tracked[index]]
            out[:] = [[]] if entry.mode == SYMLINK_MODE else [self._create(tracked[index], entry)]
            return out[0].append if entry.mode == SYMLINK_MODE else out[0].write

        def end(index: int, digest: bytes, size: int) -> None:
            path = tracked[index]
            entry = self.expected[path]
            if entry.mode == SYMLINK_MODE:
                os.symlink(b"".join(out[0]), os.path.join(self.root, path))
            else:
                out[0].close()
            if digest != entry.digest:
                raise StoreDamaged(f"store: {shown_path(path)} holds other bytes")
            self._stamp(path)

        try:
            self.store.read_objects([self.expected[path].oid for path in tracked], begin, end)
        finally:
            if out and hasattr(out[0], "close"):
                out[0].close()

    def _create(self, path: bytes, entry: Entry) -> Any:
        mode = 0o755 if entry.mode == EXECUTABLE else 0o644
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(os.path.join(self.root, path), flags, mode)
        os.fchmod(descriptor, mode)
        return open(descriptor, "wb", buffering=0 if entry.size > CHUNK else -1)

    def _copy(self, path: bytes, entry: Entry, source: bytes) -> None:
        digest = hashlib.sha256()
        if entry.mode == SYMLINK_MODE:
            target = os.readlink(source)
            digest.update(target)
            os.symlink(target, os.path.join(self.root, path))
        else:
            with open(source, "rb") as held, self._create(path, entry) as stream:
                for chunk in iter(lambda: held.read(CHUNK), b""):
                    digest.update(chunk)
                    stream.write(chunk)
        if digest.digest() != entry.digest:
            raise StoreDamaged(f"store: the loop's own copy of {shown_path(path)} was changed")
        self._stamp(path)

    def _stamp(self, path: bytes) -> None:
        """Remember an entry as it is now; a folder gets its usual mode back."""
        full = os.path.join(self.root, path)
        status = os.lstat(full)
        if stat.S_ISDIR(status.st_mode):
            mode = 0o755 if path else 0o700
            if stat.S_IMODE(status.st_mode) != mode:
                os.chmod(full, mode)
            for name in os.listxattr(full) if hasattr(os, "listxattr") else ():
                if name.startswith("user."):    # a note for the next run
                    os.removexattr(full, name)
            self._mark_folders(path, only=True)
        else:
            self.stamps[path] = stamp_of(status)
            self._latest = max(self._latest, status.st_ctime_ns)

    def _mark_folders(self, folder: bytes, only: bool = False) -> None:
        """Note that a folder (and, unless `only`, those above it) is ours and has changed."""
        if only and folder not in self.folders:
            return
        while folder not in self._unsettled:
            self._unsettled.add(folder)
            self.folders.setdefault(folder, b"")
            if only or not folder:
                return
            folder = os.path.dirname(folder)

    def _settle(self) -> None:
        """Stamp what changed, then wait for the file system's clock to move on.

        Otherwise a write in the same tick could leave the stat signature as it is.
        """
        for folder in self._unsettled:
            status = os.lstat(os.path.join(self.root, folder))
            self.folders[folder] = stamp_of(status)
            self._latest = max(self._latest, status.st_ctime_ns)
        self._unsettled.clear()
        if not self._latest:
            return
        with tempfile.TemporaryFile(dir=os.path.dirname(self.root)) as probe:
            for _ in range(2000):
                os.utime(probe.fileno())
                if os.fstat(probe.fileno()).st_ctime_ns > self._latest:
                    break
                time.sleep(.0005)
        self._latest = 0

    def inspect(self, cap: int = CENSUS_CAP) -> List[Change]:
        """Walk the tree and return every difference; raise CensusError when that can't be done."""
        self.dirty = True
        changes: List[Change] = []
        seen: Set[bytes] = set()
        created = 0
        try:
            root = os.lstat(self.root)
        except OSError:
            raise CensusError(Reason.CENSUS_FAILED) from None
        if not stat.S_ISDIR(root.st_mode):
            raise CensusError(Reason.CENSUS_FAILED)
        if stamp_of(root) != self.folders.get(b""):
            changes.append(Change("folder_touched", b"", root))
        locked: List[bytes] = []
        for path, status in scan(self.root, locked=locked):
            known = self.expected.get(path)
            folder = stat.S_ISDIR(status.st_mode)
            same = known is not None and stamp_of(status) == self.stamps.get(path)
            if same and not self.blind:
                seen.add(path)
            elif known is not None and not (folder and known.mode == GITLINK):
                seen.add(path)
                kind = self._kind(path, status, known)
                if not (same and kind == "touched"):
                    changes.append(Change(kind, path, status))
            elif folder and path in self.folders:
                seen.add(path)
                if stamp_of(status) != self.folders[path]:
                    changes.append(Change("folder_touched", path, status))
            elif not lies_in(path, self.kept):
                created += 1
                changes.append(Change("folder_created" if folder else "created", path, status))
                if created > cap:
                    raise CensusError(Reason.TOO_MANY, path)
        for path in locked:
            if path in self.folders:
                raise CensusError(Reason.UNREADABLE, path)
            changes.append(Change("folder_locked", path, None))
        if len(seen) < len(self.expected) + len(self.folders) - 1:
            changes += [Change("deleted", path, None) for path in self.expected if path not in seen]
            changes += [Change("folder_deleted", path, None) for path in self.folders
                        if path and path not in seen and path not in self.expected]
        self.found, self.dirty = changes, False
        return changes

    def _kind(self, path: bytes, status: os.stat_result, known: Entry) -> str:
        """Say in what way an expected file with another stat signature differs."""
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(known.mode):
            return "retyped"
        if known.mode != SYMLINK_MODE:
            if status.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX):
                return "set_id"
            if status.st_nlink > 1:
                return "hard_link"
            if bool(status.st_mode & 0o100) != (known.mode == EXECUTABLE):
                return "mode"
        if status.st_size != known.size:
            return "modified"       # not hashed: it may be a sparse giant
        try:
            now = entry_of(os.path.join(self.root, path), status)
        except PermissionError:
            raise CensusError(Reason.UNREADABLE, path) from None
        except OSError:
            raise CensusError(Reason.CENSUS_FAILED, path) from None
        return "touched" if now.digest == known.digest else "modified"


class GitLayer:
    """A throwaway repository with one commit, so that tools which ask git for something work."""

    def __init__(self, store: Store, folder: str):
        self.store, self.folder, self.tree = store, folder, ""
        self.repo = replace(store.repo, git_dir=os.path.join(folder, ".git"), cwd=folder)
        self.layer = Layer()

    def update(self, tree: str) -> Layer:
        """Return the layer whose one commit holds `tree`."""
        if tree == self.tree:
            return self.layer
        if not self.tree:
            remove_tree(self.folder)    # of a try that the machine cut short
            os.makedirs(self.folder)
            form = ["--object-format=sha256"] if len(tree) == 64 else []
            self.repo.git("init", "--quiet", "--template=", *form)
            write_file(os.path.join(self.repo.git_dir, "HEAD"), b"ref: refs/heads/workspace\n")
        wanted = f"{tree}\n" + (f"^{self.tree}\n" if self.tree else "")
        copy_objects(self.store.repo, self.repo, wanted.encode(), "--revs")
        commit = Store(self.repo).commit(tree, "", "workspace\n", 0)
        os.makedirs(os.path.join(self.repo.git_dir, "refs", "heads"), exist_ok=True)
        write_file(os.path.join(self.repo.git_dir, "refs", "heads", "workspace"),
                   commit.encode() + b"\n")
        self.repo.git("read-tree", tree)
        root = os.fsencode(self.folder)
        found = dict(scan(root, b".git"))
        folders = {path for path, status in found.items() if stat.S_ISDIR(status.st_mode)}
        sources = {path: os.path.join(root, path) for path in found.keys() - folders}
        entries = {path: entry_of(source, found[path]) for path, source in sources.items()}
        self.layer, self.tree = Layer(entries, sources, {b".git", *folders}, set(entries)), tree
        return self.layer


# ══ census and seal ══════════════════════════════════════════════════════════════════════════════

@dataclass(frozen=True)
class Proposal:
    """What an agent's turn comes to: edits in scope, or the first thing that it must not do."""

    edits: Dict[bytes, Edit]
    dropped: int
    files: Tuple[str, ...]
    violation: Optional[Reason] = None
    where: str = ""


@dataclass(frozen=True)
class CensusRules:
    """What a census needs to know beside the tree: limits, scope, and which files are private."""

    scope: Scope
    max_change: int
    max_files: int
    ignored: Callable[[Sequence[bytes]], Set[bytes]]
    private: Tuple[bytes, ...]      # .git and the memory file: thrown away or kept, never measured
    hidden: FrozenSet[bytes] = frozenset()


KIND_REASONS = {"modified": Reason.SEAL_MODIFIED, "deleted": Reason.SEAL_DELETED,
                "retyped": Reason.SEAL_RETYPED, "mode": Reason.SEAL_MODE,
                "set_id": Reason.SETID, "hard_link": Reason.HARDLINK}


def take_census(tree: Tree, rules: CensusRules) -> Proposal:
    """Read from the workspace itself what the agent did; a census that fails is a violation.

    Files that the base's ignore rules cover, or `ignore` names, are dropped first, inside the
    scope too. Anything else that is not an edit of regular files in scope rejects the whole turn.
    """
    try:
        return _take_census(tree, rules)
    except CensusError as error:
        return Proposal({}, 0, (), error.reason, shown_path(error.path))


def _take_census(tree: Tree, rules: CensusRules) -> Proposal:
    changes = [change for change in tree.inspect() if not lies_in(change.path, rules.private)]
    created = [change.path for change in changes if change.kind == "created"]
    locked = [change.path for change in changes if change.kind == "folder_locked"]
    dropped = rules.ignored(created + [path + b"/" for path in locked])
    dropped |= {path for path in created if path.count(b"/") < DEEPEST and rules.scope.drops(path)}
    for path in locked:
        if path + b"/" not in dropped and not rules.scope.drops(path):
            raise CensusError(Reason.UNREADABLE, path)
    changes = sorted((change for change in changes if change.path not in dropped
                      and not change.kind.startswith("folder") and change.kind != "touched"),
                     key=lambda change: change.path)
    files = tuple(shown_path(change.path) for change in changes[:rules.max_files])
    wrong = [(reason, change.path) for change in changes
             for reason in [_violation(change, tree, rules)] if reason]
    wrong += _case_twins(tree, [change.path for change in changes if change.kind == "created"])
    if wrong:   # what touches the seal is said before what merely litters
        reason, path = min(wrong, key=lambda row: not row[0].value.startswith("seal."))
        return Proposal({}, len(dropped), files, reason, shown_path(path))
    if len(changes) > rules.max_files:
        raise CensusError(Reason.TOO_MANY, changes[rules.max_files].path)
    return Proposal(read_edits(tree, changes, rules.max_change), len(dropped), files)


def _violation(change: Change, tree: Tree, rules: CensusRules) -> Optional[Reason]:
    """Return why a change may not be, or None for an edit of a regular file in scope."""
    path, status = change.path, change.status
    known = tree.expected.get(path)
    if known is not None:
        if change.kind in ("set_id", "hard_link") or path in tree.layer.entries \
                or not rules.scope.holds(path):
            return KIND_REASONS[change.kind]
        if known.mode in (SYMLINK_MODE, GITLINK) and change.kind != "deleted":
            return Reason.SYMLINK if known.mode == SYMLINK_MODE else Reason.GITLINK
        if status is None or stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            return None
        return Reason.SYMLINK if stat.S_ISLNK(status.st_mode) else Reason.SPECIAL
    return _violation_of_new(path, status, rules)  # type: ignore[arg-type]


def _violation_of_new(path: bytes, status: os.stat_result, rules: CensusRules) -> Optional[Reason]:
    name = path.decode("utf-8", "replace")
    parts = [part.lower() for part in name.split("/")]
    # what any git takes for .git: with dots, blanks or a stream after it, by its short name
    plain = [part.split(":")[0].rstrip(" .") for part in re.split(r"[/\\]", name.lower())]
    ladder = [
        (len(parts) > DEEPEST, Reason.OVERSIZE),
        (not name.isprintable() or "\ufffd" in name, Reason.CONTROL),
        (not {".git", "git~1"}.isdisjoint(plain), Reason.GITLINK),
        (stat.S_ISLNK(status.st_mode), Reason.SYMLINK),
        (not stat.S_ISREG(status.st_mode), Reason.SPECIAL),
        (path in rules.hidden or rules.scope.seals(path), Reason.SEAL_CREATED),
        (rules.scope.holds(path), None),
        (any(part.startswith(".git") for part in parts), Reason.GIT_FILE),
        (True, Reason.SCOPE_CREATED),
    ]
    reason = next(reason for applies, reason in ladder if applies)
    if reason is None and status.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX):
        return Reason.SETID
    if reason is None and status.st_nlink > 1:
        return Reason.HARDLINK
    return reason


def _case_twins(tree: Tree, created: Sequence[bytes]) -> List[Tuple[Reason, bytes]]:
    """Return new paths that another file system would take for one that exists.

    Compared in NFC and case-folded, folder by folder: `Src/a` is a twin of the folder `src`.
    """
    def fold(path: bytes) -> str:
        return unicodedata.normalize("NFC", decoded(path)).casefold()

    if not created:
        return []
    names: Dict[str, bytes] = {}
    for path in created:
        while path:
            if names.setdefault(fold(path), path) != path:
                return [(Reason.TWIN, path)]
            path = os.path.dirname(path)
    for known in (tree.expected, tree.folders):
        for path in known:
            if names.get(fold(path), path) != path:
                return [(Reason.TWIN, names[fold(path)])]
    return []


def read_edits(tree: Tree, changes: Sequence[Change], most: int) -> Dict[bytes, Edit]:
    """Read the new bytes of changed files; raise CensusError past `most` bytes in all."""
    edits: Dict[bytes, Edit] = {}
    total = 0
    for change in changes:
        status = change.status
        if status is None or stat.S_ISDIR(status.st_mode):
            edits[change.path] = Edit(0, None)
            continue
        total += status.st_size
        if total > most:
            raise CensusError(Reason.OVERSIZE, change.path)
        try:
            with open_regular(os.path.join(tree.root, change.path)) as stream:
                data = stream.read(most + 1)
        except PermissionError:
            raise CensusError(Reason.UNREADABLE, change.path) from None
        except OSError:
            raise CensusError(Reason.CENSUS_FAILED, change.path) from None
        mode = EXECUTABLE if status.st_mode & 0o100 else PLAIN
        edits[change.path] = Edit(mode, data)
    return edits


def apply_edits(manifest: Manifest, edits: Dict[bytes, Edit], algorithm: str) -> Manifest:
    """Return the manifest of a candidate."""
    result = dict(manifest)
    for path, edit in edits.items():
        if edit.data is None:
            result.pop(path, None)
        else:
            result[path] = Entry(edit.mode, blob_id(edit.data, algorithm),
                                 hashlib.sha256(edit.data).digest(), len(edit.data))
    return result


class OutsideSeal:
    """Files anywhere on the machine that must not change: `seal` paths, programs, interpreters.

    Raises Refused when one can't be read. `check` is cheap: it hashes again only what the stat
    signature says was touched.
    """

    def __init__(self, paths: Iterable[str]):
        self.entries: Manifest = {}
        self.stamps: Dict[bytes, bytes] = {}
        for text in sorted(set(paths)):
            root = os.fsencode(os.path.realpath(os.path.expanduser(text)))
            try:
                status = os.lstat(root)
                rows = [(root, status)]
                if stat.S_ISDIR(status.st_mode):
                    rows += [(os.path.join(root, path), status) for path, status in scan(root)]
                for path, status in rows:
                    self.entries[path] = entry_of(path, status)
                    self.stamps[path] = stamp_of(status)
            except (OSError, CensusError) as error:
                raise Refused(f"seal: {text} can't be hashed ({error}); name files that exist and "
                              "can be read") from None

    @property
    def root(self) -> str:
        """Return one digest over all of them."""
        return manifest_root(self.entries.items())

    def check(self) -> Optional[Tuple[Reason, str]]:
        """Return the first path that was changed, or touched and put back, since the last look."""
        found, blind = None, blind_devices()
        for path, entry in self.entries.items():
            try:
                status = os.lstat(path)
                if stamp_of(status) == self.stamps[path] and status.st_dev not in blind:
                    continue
                same = entry_of(path, status) == entry
            except OSError:
                same = False
            if not same:
                return Reason.SEAL_MODIFIED, shown_path(path)
            if stamp_of(status) != self.stamps[path]:
                self.stamps[path] = stamp_of(status)
                found = found or (Reason.SEAL_TOUCHED, shown_path(path))
        return found


def blind_devices() -> Set[int]:
    """Return the devices whose stat signatures may miss a write (see `stamps_tell`; Linux)."""
    found = set()
    with contextlib.suppress(OSError):
        with open("/proc/self/mountinfo", "rb") as stream:
            for line in stream:
                before, _, after = line.partition(b" - ")
                if after.split(b" ")[0] in (b"tmpfs", b"ramfs", b"shm"):
                    major, minor = map(int, before.split()[2].split(b":"))
                    found.add(os.makedev(major, minor))
    return found


# ══ metric ═══════════════════════════════════════════════════════════════════════════════════════

METRIC_LINE = re.compile(rb"^METRIC[ \t](.*)$", re.MULTILINE)
METRIC_BODY = re.compile(rb"[ \t]*([^\s=]{1,100})[ \t]*=[ \t]*(\S{1,400})[ \t]*\r?")


@dataclass(frozen=True)
class Gauge:
    """What to run for one number (or, without `numeric`, for an exit status of 0)."""

    key: str                            # metric, holdout or guard.NAME
    command: Tuple[str, ...]
    timeout: float
    produce: Tuple[str, ...] = ()
    outputs: Tuple[Tuple[str, ...], ...] = ()
    name: str = ""
    pattern: str = ""
    bounds: Tuple[Optional[float], Optional[float]] = (None, None)
    numeric: bool = True

    @property
    def finder(self) -> Optional[Pattern[bytes]]:
        """Return the expression that finds the number's line."""
        if not self.numeric:
            return None
        return re.compile(self.pattern.encode(), re.MULTILINE) if self.pattern else METRIC_LINE


@dataclass(frozen=True)
class Measurement:
    """One run: a finite number within bounds, or the reason why there is none."""

    value: Optional[float]
    reason: Optional[Reason] = None
    detail: str = ""
    seconds: float = 0.0
    name: str = ""
    others: Tuple[Tuple[str, float], ...] = ()
    tail: str = ""                      # the end of the output, for a rework prompt

    @property
    def integrity(self) -> bool:
        """Tell whether something sealed was touched: that counts before any number."""
        return self.reason is not None and self.reason.value.startswith(("seal.", "census."))


def metric_gauge(config: Config) -> Gauge:
    """Return the gauge of `[metric]`."""
    metric = config.metric
    return Gauge("metric", metric.command, metric.timeout, metric.produce,
                 tuple(map(split_glob, metric.outputs)), metric.name, metric.pattern, metric.bounds)


def holdout_gauge(config: Config) -> Optional[Gauge]:
    """Return the gauge of `[holdout]`, if there is one."""
    holdout = config.holdout
    return Gauge("holdout", holdout.command, holdout.timeout, name=holdout.name,
                 pattern=holdout.pattern, bounds=holdout.bounds) if holdout.command else None


def guard_gauge(guard: GuardOptions) -> Gauge:
    """Return the gauge of a guard."""
    return Gauge(f"guard.{guard.name}", guard.command, guard.timeout, pattern=guard.pattern,
                 numeric=bool(guard.pattern))


def read_number(gauge: Gauge, matches: Sequence[Tuple[bytes, ...]]) -> Measurement:
    """Turn the matching lines of a run into one number; two of them are never a number."""
    if len(matches) >= MOST_MATCHES:     # more were not kept: the one that counts may be among them
        return Measurement(None, Reason.METRIC_AMBIGUOUS, f"printed {MOST_MATCHES} METRIC lines "
                           "or more")
    if gauge.pattern:
        rows = [(b"metric", match[1]) for match in matches]
    else:
        bodies = [METRIC_BODY.fullmatch(match[1]) for match in matches]
        if not all(bodies):
            return Measurement(None, Reason.METRIC_MALFORMED, "a METRIC line is not name=number")
        rows = [(body[1], body[2]) for body in bodies if body]
    wanted = [row for row in rows if not gauge.name or row[0].decode("utf-8", "replace")
              == gauge.name]
    if not wanted:
        return Measurement(None, Reason.METRIC_MISSING, "printed no " + (
            "match of pattern" if gauge.pattern else f"METRIC {gauge.name or 'name'}=number line"))
    if len(wanted) > 1:
        what = "matches of pattern" if gauge.pattern else "METRIC lines"
        return Measurement(None, Reason.METRIC_AMBIGUOUS, f"printed {len(wanted)} {what}, "
                           "expected exactly one")
    label, text = wanted[0]
    shown = printable(text.decode("utf-8", "replace"), 40)
    value = strict_number(text)
    if value is None:
        reason = Reason.METRIC_NOT_FINITE if text.lower().lstrip(b"+-") in (
            b"nan", b"inf", b"infinity") else Reason.METRIC_MALFORMED
        return Measurement(None, reason, f"{shown} is not a finite decimal number")
    if not math.isfinite(value):
        return Measurement(None, Reason.METRIC_NOT_FINITE, f"{shown} is not finite")
    low, high = gauge.bounds
    if (low is not None and value < low) or (high is not None and value > high):
        return Measurement(None, Reason.METRIC_OUT_OF_BOUNDS, f"{shown} is out of bounds "
                           f"{format_number(low, '*')} to {format_number(high, '*')}")
    others = tuple((printable(name.decode("utf-8", "replace"), 60), number)
                   for name, raw in rows if (name, raw) != wanted[0]
                   for number in [strict_number(raw)]
                   if number is not None and math.isfinite(number))
    return Measurement(value, name=printable(label.decode("utf-8", "replace"), 60), others=others)


@dataclass(frozen=True)
class MetricSetting:
    """What every run of a metric, guard or holdout shares."""

    config: Config
    scope: Scope
    top: bytes                          # folder of loop.ini below the tree's root
    env: Dict[str, str]
    fence: Callable[[Sequence[str], str], "Fence"]  # (writable paths, gauge key) -> fence
    outside: OutsideSeal
    watch: Watch
    sealed: bool                        # no program can write to another one's tree
    allowed: Dict[str, Set[bytes]]      # folders that the baseline's own run touches, per command
    base_folders: Set[bytes]
    log: Callable[[str, Capture, str], None]


class Cleanroom:
    """Where a tree is measured: pristine before every command, inspected after it."""

    def __init__(self, setting: MetricSetting, tree: Tree, scorer: Optional[Tree], tmp: str,
                 git_layer: Optional[GitLayer]):
        self.setting, self.tree, self.scorer, self.tmp = setting, tree, scorer, tmp
        self.git_layer, self.base_layer = git_layer, tree.layer
        self.learning = False           # the baseline teaches which folders a run touches

    def measure(self, gauge: Gauge, manifest: Manifest, seed: int) -> Measurement:
        """Run a gauge on a tree; integrity comes before timeouts, exits and numbers."""
        tree, seconds, outputs = self.tree, 0.0, []
        if gauge.produce:
            made, _ = self._run(gauge, f"{gauge.key}.produce", gauge.produce, tree, manifest, seed)
            if made.reason:
                return replace(made, detail=f"produce: {made.detail}")
            seconds, outputs = made.seconds, self._outputs(gauge, tree)
            if not outputs:
                return Measurement(None, Reason.METRIC_NO_OUTPUT, "produce left no file that "
                                   "outputs names", seconds)
            tree = self.scorer or tree
        done, found = self._run(gauge, gauge.key, gauge.command, tree, manifest, seed, outputs)
        seconds += done.seconds
        if done.reason or not gauge.numeric:
            return replace(done, seconds=seconds)
        return replace(read_number(gauge, found), seconds=seconds, tail=done.tail)

    def _run(self, gauge: Gauge, key: str, command: Tuple[str, ...], tree: Tree, manifest: Manifest,
             seed: int, outputs: Sequence[Tuple[bytes, bytes]] = ()
             ) -> Tuple[Measurement, List[Tuple[bytes, ...]]]:
        """Run one command in a pristine tree and inspect it; the value is not read yet."""
        setting = self.setting
        tree.dirty = tree.dirty or not setting.sealed   # no fence: others may have been in here
        tree.make_pristine(manifest)
        if outputs:
            tree.add_files(outputs)
        open_for_runner(setting.config, os.fsdecode(tree.root), 0o755)
        tree.dirty = True
        before = setting.outside.check()
        capture = Capture(gauge.finder)
        cwd = os.path.join(os.fsdecode(tree.root), os.fsdecode(setting.top))
        with private_folder(self.tmp) as scratch:
            open_for_runner(setting.config, scratch, 0o777)
            env = {**setting.env, "SCALARLOOP_SEED": str(seed), "TMPDIR": scratch,
                   "XDG_CACHE_HOME": os.path.join(scratch, "cache")}
            if setting.config.metric.home == "private":
                env["HOME"] = os.path.join(scratch, "home")
                os.mkdir(env["HOME"])
            argv = with_runner(setting.config.metric.runner, resolve_command(command, cwd),
                               {"cleanroom": os.fsdecode(tree.root), "cwd": cwd, "tmp": scratch})
            fence = setting.fence([os.fsdecode(tree.root), scratch], gauge.key)
            ended = run_fenced(fence, argv, cwd=cwd, env=env, sink=capture,
                               timeout=gauge.timeout, watch=setting.watch)
        capture.finish()
        setting.log(key, capture, ended.describe())
        setting.watch.check()
        tampered = before or self._tampered(tree, key) or setting.outside.check()
        tail = capture.log()[-4000:].decode("utf-8", "replace")
        return self._judge_end(gauge, ended, tampered, tail), capture.matches

    def _judge_end(self, gauge: Gauge, ended: Ended, tampered: Optional[Tuple[Reason, str]],
                   tail: str) -> Measurement:
        numeric = gauge.numeric
        if tampered:
            return Measurement(None, tampered[0], tampered[1], ended.seconds)
        if ended.timed_out:
            reason = Reason.METRIC_TIMEOUT if numeric else Reason.GUARD_TIMEOUT
            return Measurement(None, reason, ended.describe(), ended.seconds, tail=tail)
        if ended.status != 0:
            reason = Reason.METRIC_EXIT if numeric else Reason.GUARD_EXIT
            return Measurement(None, reason, ended.describe(), ended.seconds, tail=tail)
        return Measurement(None, None, "", ended.seconds, tail=tail)

    def use_git(self, tree: str) -> None:
        """Give both trees a one-commit .git of what is measured (`git = yes`)."""
        if self.git_layer and tree != self.git_layer.tree:
            layer = self.base_layer | self.git_layer.update(tree)
            for place in (self.tree, self.scorer):
                if place:
                    place.set_layer(layer)

    def _tampered(self, tree: Tree, key: str) -> Optional[Tuple[Reason, str]]:
        """Return what a run did to a tracked or shared file, or to a folder it should not touch.

        A stat signature that differs is enough: bytes that were put back had been away.
        """
        allowed = self.setting.allowed.setdefault(key, set())
        try:
            changes = tree.inspect(cap=10_000_000)
        except CensusError as error:
            return error.reason, shown_path(error.path)
        for change in changes:
            if change.kind in ("folder_touched", "folder_deleted"):
                if self.learning and change.kind == "folder_touched":
                    allowed.add(change.path)
                elif change.path in self.setting.base_folders and change.path not in allowed:
                    return Reason.SEAL_TOUCHED, shown_path(change.path) + "/"
            elif change.kind not in ("created", "folder_created", "folder_locked") \
                    and change.path not in tree.layer.loose:
                return Reason.SEAL_TOUCHED, shown_path(change.path)
        return None

    def _outputs(self, gauge: Gauge, tree: Tree) -> List[Tuple[bytes, bytes]]:
        """Return (absolute source, path) of the regular files that `outputs` names."""
        found = []
        for change in tree.found:
            inside = change.path.startswith(self.setting.scope.prefix)
            parts = decoded(change.path[len(self.setting.scope.prefix):]).split("/")
            if change.kind == "created" and change.status and stat.S_ISREG(change.status.st_mode) \
                    and inside and any(segments_match(parts, glob) for glob in gauge.outputs):
                found.append((os.path.join(tree.root, change.path), change.path))
        return found


def resolve_command(command: Sequence[str], cwd: str) -> List[str]:
    """Return argv with an absolute program; one named by a relative path is looked up in `cwd`."""
    program = os.path.expanduser(command[0])
    if os.sep in program:
        found: Optional[str] = os.path.join(cwd, program)
    else:
        found = shutil.which(program, path=search_path())
    return [found or program, *command[1:]]


def open_for_runner(config: Config, path: str, mode: int) -> None:
    """Let a runner that is another user (sudo -u bench) pass through a folder of ours."""
    if config.metric.runner:
        os.chmod(path, mode)


def with_runner(runner: Sequence[str], argv: List[str], places: Dict[str, str]) -> List[str]:
    """Put the user's own isolating prefix before a command, its placeholders filled."""
    prefix = [functools.reduce(lambda text, item: text.replace("{%s}" % item[0], item[1]),
                               places.items(), word) for word in runner]
    return resolve_command(prefix, places["cwd"]) + argv if prefix else argv


# ══ decision ═════════════════════════════════════════════════════════════════════════════════════
# Pure: numbers in, a judgement out; lower is better. One run screens a candidate and is thrown
# away; fresh pairs then bet on it. The trial's coin orders each pair, so when the candidate is no
# better a stake is as often up as down, whatever the noise: the odds are a supermartingale, reach
# 1/alpha with probability <= alpha (Ville), and a run's alphas add up to risk * (1 + keeps).
# Pairwise betting: Saha and Ramdas, arXiv 2310.14293. Alpha investing: Foster and Stine 2008.

REFERENCE_RUNS = 9  # the incumbent's level is the median of its last runs
DIFFERENCES = 60  # |successive differences| of like runs, from which sigma comes
AGENT_TURNS, METRIC_RUNS = 20, 60  # what a proposal and a run cost is a median over the last ones
REFRESH_EVERY = 8  # candidates judged on one incumbent run
NOISE_RUNS = 5  # incumbent runs when a metric that looked exact turns out noisy
DUEL_PAIRS = 24  # at q = 1; more when proposals are dear
LARGEST_ALPHA, GATE_ALPHA = 1 / 8, 0.05  # of a duel for a keep; of a guard's or the canary's
CONSTANT_TREES = 10  # so many trees with the baseline's own number: the metric looks constant
NEARLY = 1 - 1e-9  # odds that end on what is needed may miss it by rounding

Pair = Tuple[Optional[float], Optional[float]]  # incumbent, candidate; None: a run that failed


@dataclass(frozen=True)
class NoiseRules:
    """Hold what loop.ini says; risk is 1 - confidence, None for the single-run rule."""

    min_gain: Gain = Gain(0.0, False)
    max_gain: Optional[Gain] = None
    risk: Optional[float] = 0.2
    samples: Optional[int] = None  # caps a duel's pairs
    sign: float = 1.0  # -1 where higher is better: for the words of the evidence alone


class NoiseState(NamedTuple):
    """Hold what the rule remembers: the fold of `advance_noise` over the ledger, no more.

    Not a dataclass: a resume replaces it at every record, and this is three times as fast.
    """

    exact: bool = False  # so far like runs gave like numbers
    reference: Tuple[float, ...] = ()  # the incumbent's last runs
    differences: Tuple[float, ...] = ()
    agent_seconds: Tuple[float, ...] = ()
    metric_seconds: Tuple[float, ...] = ()
    keeps: int = 0  # won by duel: an exact keep earns no risk
    spent: float = 0.0  # alpha of all duels begun
    lost: int = 0  # duels begun since the last one won
    since_incumbent: int = 0  # candidates since the incumbent last ran
    alike: Optional[int] = 0  # trees with the baseline's own number; None once a run differed
    open_duel: Optional[str] = None  # a tree whose duel began; at a resume it is lost, and paid


@dataclass(frozen=True)
class Plan:
    """Fix, before the first pair, all that a duel depends on; scale and gain in metric units."""

    alpha: float
    scale: float
    q: float = 1.0
    gain: float = 0.0
    pairs: int = DUEL_PAIRS

    @property
    def need(self) -> float:
        """Return the odds that win."""
        return 1 / self.alpha if self.alpha else math.inf

    @property
    def winnable(self) -> bool:
        """Tell whether winning every pair is enough: a small `samples` can forbid it."""
        return 2.0 ** self.pairs >= self.need * NEARLY


@dataclass(frozen=True)
class Duel:
    """Tell how a duel ended and by which pairs; BETTER means won."""

    outcome: Reason
    odds: float
    pairs: Tuple[Pair, ...]


@dataclass(frozen=True)
class Judgement:
    """Say how a candidate fared, the number to report, the raw runs and the evidence in words."""

    outcome: Reason
    value: Optional[float]
    samples: Dict[str, List[Any]]  # JSON: candidate and incumbent runs, pairs
    evidence: str
    unproven: bool = False  # kept by the single-run rule


class Trial(Protocol):
    """Run what a judgement asks for; the incumbent failing twice raises, nothing else does."""

    def candidate(self) -> Optional[float]:
        """Return a fresh run's number, None if it failed."""

    def incumbent(self) -> float:
        """Return a fresh run's number."""

    def pair(self) -> Tuple[float, Optional[float]]:
        """Run both, a fair coin deciding order and room, under one fresh seed."""

    def guards_hold(self) -> bool:
        """Tell whether a would-be keep may be kept at all; asked once."""

    def announce(self, event: Dict[str, Any]) -> None:
        """Append the event (to a `duel`: the tree) to the ledger before it is acted on."""

    def out_of_time(self) -> bool:
        """Tell whether the budget has no room for another pair."""


def turned(numbers: Any, sign: float) -> Any:
    """Return nested samples, or a state's reference, negated when sign is -1 (and no -0.0)."""
    if isinstance(numbers, dict):
        return {key: turned(value, sign) for key, value in numbers.items()}
    if isinstance(numbers, (list, tuple)):
        return type(numbers)(turned(value, sign) for value in numbers)
    return None if numbers is None else sign * numbers + 0.0


def median(runs: Sequence[float]) -> float:
    """Return the middle of one or more finite numbers, without overflow."""
    ordered = sorted(runs)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    middle = (low + high) / 2
    return middle if math.isfinite(middle) else low / 2 + high / 2


def sigma(differences: Sequence[float]) -> float:
    """Estimate one run's spread from |successive differences|: blind to drift, finite, never 0."""
    largest = max(differences, default=0.0)
    if not largest:
        return TINIEST
    spread = 1.05 * median(differences)  # |a - b| of normal runs has the median 0.954 sigma
    if not spread:  # most runs agree: quantised noise
        squares = sum((step / largest) ** 2 for step in differences)
        spread = largest * math.sqrt(squares / (2 * len(differences)))
    return min(max(spread, TINIEST), LARGEST)


def effort(state: NoiseState) -> Tuple[float, float]:
    """Return r, a proposal's cost in metric runs (0 to 100), and q = (1 + r)^-0.2."""
    r = 0.0
    if state.agent_seconds and state.metric_seconds:
        seconds = max(median(state.metric_seconds), TINIEST)
        r = min(max(median(state.agent_seconds) / seconds, 0.0), 100.0)
    return r, (1 + r) ** -0.2


def screen_threshold(state: NoiseState, rules: NoiseRules, gain: float) -> float:
    """Return what the first run must be below: lower when proposals are free, higher when dear."""
    level = median(state.reference) - gain
    if state.exact or rules.risk is None:
        return level
    return level - (3 * effort(state)[1] - 2.25) * sigma(state.differences)


def alpha_left(state: NoiseState, risk: float) -> float:
    """Return what the account still holds."""
    return risk * (1 + state.keeps) - state.spent


def next_alpha(state: NoiseState, risk: float) -> float:
    """Return the next duel's price; however many are lost, the prices never exceed the account."""
    return max(0.0, min(LARGEST_ALPHA, alpha_left(state, risk) / (state.lost + 3)))


def plan_duel(state: NoiseState, rules: NoiseRules, gain: float) -> Plan:
    """Fix the next duel from what is known before it."""
    q = effort(state)[1]
    pairs = min(round(DUEL_PAIRS / q ** 2), rules.samples or sys.maxsize)
    alpha = next_alpha(state, rules.risk or 0.0)
    return Plan(alpha, sigma(state.differences), q, gain, pairs)


def fight_duel(plan: Plan, pair: Callable[[], Pair], out_of_time: Callable[[], bool]) -> Duel:
    """Bet that the second of each pair is lower by more than plan.gain, until the odds decide.

    Won wrongly with probability <= alpha when a coin orders each pair: any noise, any stop.
    """
    odds, enough, pairs = 1.0, plan.need * NEARLY, []
    for left in reversed(range(plan.pairs)):
        if out_of_time():
            break
        first, second = pair()
        pairs.append((first, second))
        if first is None or second is None:
            return Duel(Reason.NOISE_FAILED, odds, tuple(pairs))
        limit = plan.need / odds - 1  # a win pays what is needed; more would be wasted
        stake = math.tanh(0.75 * plan.q * (first - second - plan.gain) / plan.scale)
        odds *= 1 + max(-limit, min(limit, stake))
        if odds >= enough:
            return Duel(Reason.BETTER, odds, tuple(pairs))
        if odds < plan.q / 2:
            return Duel(Reason.NOISE_LOST, odds, tuple(pairs))
        if odds * 2.0 ** left < enough:
            break
    return Duel(Reason.NOISE_UNDECIDED, odds, tuple(pairs))


def judge(state: NoiseState, rules: NoiseRules, trial: Trial) -> Judgement:
    """Decide about one candidate: screen, guards, then exact confirmation or duel.

    Leaves the state alone: the caller folds what was announced, then the iteration's record.
    """
    due = not state.exact and rules.risk is not None and state.since_incumbent >= REFRESH_EVERY
    fresh = [trial.incumbent()] if due else []
    samples: Dict[str, List[Any]] = {"candidate": [], "incumbent": fresh, "pairs": []}
    state = _see_incumbent(state, fresh)
    screen = trial.candidate()
    if screen is None:
        return Judgement(Reason.METRIC_MISSING, None, samples, "no number")
    samples["candidate"].append(screen)
    reference = median(state.reference)
    gain = rules.min_gain.over(reference)
    below = screen_threshold(state, rules, gain)
    one, usual, bar = (format_number(turned(value, rules.sign)) for value in
                       (screen, reference, below))
    evidence = (f"one run {one}, reference {usual}, needed "
                f"{'below' if rules.sign > 0 else 'above'} {bar}")
    if _is_implausible(rules, reference, screen):
        return Judgement(Reason.IMPLAUSIBLE, screen, samples, evidence + ", gain beyond max_gain")
    if not screen < below:
        exact = state.exact or rules.risk is None
        outcome = Reason.NOT_BETTER if exact else Reason.NOISE_NOT_BETTER
        return Judgement(outcome, screen, samples, evidence)
    if not trial.guards_hold():
        return Judgement(Reason.GUARD_EXIT, screen, samples, evidence)
    if rules.risk is None:
        return Judgement(Reason.BETTER, screen, samples, evidence, unproven=True)
    if state.exact:
        return _judge_exactly(state, rules, trial, samples, gain)
    return _judge_by_duel(state, rules, trial, samples, gain)


def _is_implausible(rules: NoiseRules, reference: float, value: float) -> bool:
    return rules.max_gain is not None and reference - value > rules.max_gain.over(reference)


def _judge_exactly(
    state: NoiseState, rules: NoiseRules, trial: Trial, samples: Dict[str, List[Any]], gain: float
) -> Judgement:
    """Keep if candidate and incumbent repeat their numbers; else the metric is noisy after all."""
    screen, again = samples["candidate"][0], trial.candidate()
    if again is None:
        return Judgement(Reason.NOISE_UNCONFIRMED, screen, samples, "a number once, then none")
    samples["candidate"].append(again)
    samples["incumbent"].append(trial.incumbent())
    if again == screen and samples["incumbent"][0] == state.reference[-1]:
        return Judgement(Reason.BETTER, screen, samples, "exact: both numbers came twice")
    samples["incumbent"] += [trial.incumbent() for _ in range(NOISE_RUNS)]
    event = {"type": "noise", "samples": samples}  # a record of its own: not in the iteration's
    trial.announce(event)
    samples = {"candidate": [], "incumbent": [], "pairs": []}
    return _judge_by_duel(advance_noise(state, event), rules, trial, samples, gain)


def _judge_by_duel(
    state: NoiseState, rules: NoiseRules, trial: Trial, samples: Dict[str, List[Any]], gain: float
) -> Judgement:
    """Keep the winner of a duel that was announced, and so paid for, before its first pair."""
    plan = plan_duel(state, rules, gain)
    screen = samples["candidate"][0] if samples["candidate"] else None
    if trial.out_of_time() or not plan.winnable:
        evidence = f"no time, or {plan.pairs} pairs too few for odds of {plan.need:.3g}"
        return Judgement(Reason.NOISE_UNDECIDED, screen, samples, evidence)
    event = {"type": "duel", **asdict(plan)}
    trial.announce(event)
    duel = fight_duel(plan, trial.pair, trial.out_of_time)
    samples = {**samples, "pairs": [list(pair) for pair in duel.pairs]}
    left = alpha_left(advance_noise(state, event), rules.risk or 0.0)
    evidence = (f"{len(duel.pairs)} pairs, odds {duel.odds:.3g} of {plan.need:.3g} needed, alpha "
                f"left {left:.2g}")
    rivals = [first for first, _ in duel.pairs if first is not None]
    runs = [second for _, second in duel.pairs if second is not None]
    value, outcome = median(runs) if runs else screen, duel.outcome
    if outcome is Reason.BETTER and _is_implausible(rules, median(rivals), median(runs)):
        outcome, evidence = Reason.IMPLAUSIBLE, evidence + ", gain beyond max_gain"
    return Judgement(outcome, value, samples, evidence)


def advance_noise(state: NoiseState, event: Mapping[str, Any]) -> NoiseState:
    """Fold one ledger record into the state: the only way it changes, live and at a resume."""
    if "agent_seconds" in event or "metric_seconds" in event:
        state = state._replace(
            agent_seconds=(*state.agent_seconds, *event.get("agent_seconds", ()))[-AGENT_TURNS:],
            metric_seconds=(*state.metric_seconds, *event.get("metric_seconds", ()))[-METRIC_RUNS:])
    if event["type"] == "baseline":
        exact = baseline_is_complete(event["samples"]) and len(set(event["samples"])) == 1
        state = state._replace(exact=exact, alike=0 if exact else None)
        return _see_incumbent(state, event["samples"])
    if event["type"] == "noise":
        return _leave_exact(state, event["samples"])
    if event["type"] == "duel":
        return state._replace(spent=state.spent + event["alpha"], lost=state.lost + 1,
                              open_duel=event.get("tree", ""))
    return _see_iteration(state, event) if event["type"] == "iteration" else state


def baseline_is_complete(runs: Sequence[float]) -> bool:
    """Tell whether three runs agree, or five were made."""
    return len(runs) >= (3 if len(set(runs)) == 1 else 5)


def _steps(runs: Sequence[float]) -> List[float]:
    return [min(abs(after - before), LARGEST) for before, after in zip(runs, runs[1:])]


def _see_incumbent(state: NoiseState, runs: Sequence[float]) -> NoiseState:
    if not runs:
        return state
    runs = tuple(map(float, runs))
    steps = _steps((*state.reference[-1:], *runs))
    return state._replace(
        reference=(*state.reference, *runs)[-REFERENCE_RUNS:], since_incumbent=0,
        differences=(*state.differences, *steps)[-DIFFERENCES:])


def _leave_exact(state: NoiseState, samples: Mapping[str, Any]) -> NoiseState:
    """Start anew: no exact zero may dilute sigma, no exact number stand as the reference."""
    runs = samples["incumbent"]
    steps = _steps((state.reference[-1], *runs)) + _steps(samples["candidate"])
    return NoiseState(
        reference=tuple(runs[-NOISE_RUNS:]), differences=tuple(steps), alike=None,
        agent_seconds=state.agent_seconds, metric_seconds=state.metric_seconds)


def _see_iteration(state: NoiseState, event: Mapping[str, Any]) -> NoiseState:
    """Add an iteration's raw runs; a winner's become the reference."""
    samples = event.get("samples") or {}
    singles, pairs = samples.get("candidate", ()), samples.get("pairs", ())
    alike = state.alike
    if singles and alike is not None:
        alike = alike + 1 if set(singles) == {state.reference[-1]} else None
    state = _see_incumbent(state, samples.get("incumbent", ()))
    since = state.since_incumbent + bool(singles)
    state = state._replace(alike=alike, since_incumbent=since, open_duel=None)
    rivals = [second for _, second in pairs if second is not None]
    if pairs:
        half = DIFFERENCES // 2  # neither tree's noise alone decides the next sigma
        steps = _steps((*state.reference[-1:], *(first for first, _ in pairs)))[-half:]
        both = (*state.differences, *steps, *_steps(rivals)[-half:])[-DIFFERENCES:]
        state = _see_incumbent(state, [first for first, _ in pairs])
        state = state._replace(differences=both)
    if event["verdict"] != "keep":
        return state
    state = state._replace(reference=tuple(map(float, rivals or singles))[-REFERENCE_RUNS:])
    return state._replace(keeps=state.keeps + 1, lost=0) if pairs else state


def looks_constant(state: NoiseState) -> bool:
    """Tell whether enough trees ran and none ever gave another number than the baseline."""
    return state.alike is not None and state.alike >= CONSTANT_TREES


def worse_duel(
    pair: Callable[[], Pair], baseline: Sequence[float], tolerance: float,
    out_of_time: Callable[[], bool],
) -> Duel:
    """Bet that the second tree is worse by more than the tolerance; won wrongly with p <= 0.05.

    The baseline's runs of that metric give the scale. A metric guard fails if this is won or the
    candidate fails; a canary (tolerance 0) must win it, else the metric is blind.
    """
    def swapped() -> Pair:
        first, second = pair()
        return second, first

    plan = Plan(GATE_ALPHA, sigma(_steps(baseline)), gain=tolerance)
    duel = fight_duel(plan, swapped, out_of_time)
    return replace(duel, pairs=tuple((first, second) for second, first in duel.pairs))


@dataclass(frozen=True)
class ClosingGain:
    """Report what a run won: the median gain of fresh pairs, and an interval around it."""

    median: float
    low: float
    high: float
    pairs: int


def closing_gain(pairs: Sequence[Tuple[float, float]]) -> ClosingGain:
    """Compare baseline and best by pairs that decided nothing.

    From 5 pairs on, the interval covers the true median in 15 of 16 cases, whatever the noise.
    """
    gains = sorted(max(-LARGEST, min(LARGEST, first - second)) for first, second in pairs)
    cut, outside = 0, 1  # order statistics: `outside` of 2^n signs would leave the median out
    while 32 * (outside + math.comb(len(gains), cut + 1)) <= 2 ** len(gains):
        cut += 1
        outside += math.comb(len(gains), cut)
    return ClosingGain(median(gains), gains[cut], gains[-1 - cut], len(gains))


# ══ ledger ═══════════════════════════════════════════════════════════════════════════════════════

Record = Dict[str, Any]
FIRST_PREV = "0" * 64


def canonical(record: Record) -> bytes:
    """Return the one form of a record: ASCII JSON, sorted keys, no blanks, no NaN."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True,
                      allow_nan=False).encode("ascii")


def record_hash(body: bytes, secret: Optional[bytes]) -> str:
    """Return the SHA-256 of a canonical record without its hash, or its HMAC under a key."""
    if secret is None:
        return hashlib.sha256(body).hexdigest()
    return hmac.new(secret, body, hashlib.sha256).hexdigest()


def ledger_secret() -> Optional[bytes]:
    """Return the key that SCALARLOOP_LEDGER_KEY names a file of; refuse one that can't be read."""
    path = os.environ.get("SCALARLOOP_LEDGER_KEY")
    if not path:
        return None
    try:
        with open(path, "rb") as stream:
            secret = stream.read(1 << 16).strip()
    except OSError as error:
        raise Refused(f"ledger: the key {path} can't be read ({error.strerror})") from None
    if len(secret) < 16:
        raise Refused(f"ledger: the key {path} is shorter than 16 bytes; use a random one of 32")
    return secret


def timestamp() -> str:
    """Return the time in UTC to the millisecond."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + ".%03dZ" % (now % 1 * 1000)


BEFORE_HASH, AFTER_HASH = b'"hash":"', b'",'
DECODE = json.JSONDecoder().raw_decode      # json.loads would look for blanks and a byte order mark


def fitting_hash(body: bytes, secret: Optional[bytes]) -> str:
    """Return the hash in a line that fits the rest of it, or ""; a nested field may look like one.
    """
    at = body.find(BEFORE_HASH)
    while at >= 0:
        start = at + len(BEFORE_HASH)
        end = start + 64 + len(AFTER_HASH)
        expected = record_hash(body[:at] + body[end:], secret)
        if hmac.compare_digest(body[start:end], expected.encode() + AFTER_HASH):
            return expected
        at = body.find(BEFORE_HASH, start)
    return ""


def read_ledger(path: str, secret: Optional[bytes], torn: Optional[List[bytes]] = None,
                strict: bool = False) -> Iterator[Record]:
    """Yield every record; raise RecordBroken at the first that is not what its place demands.

    Its raw bytes are hashed, so that any byte counts. `strict` also compares them with the
    canonical form. An unterminated last line is appended to `torn` when given, else broken.
    """
    prev, seq = FIRST_PREV, 0
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise RecordBroken(f"ledger: {path} is not a regular file")
    with open_regular(path) as stream:
        for number, line in enumerate(stream, 1):
            where = f"ledger line {number}"
            if not line.endswith(b"\n"):
                if torn is None:
                    raise RecordBroken(f"{where}: is cut off in the middle; start the run again to "
                                       "drop it, it was never acted on")
                torn.append(line)
                return
            body = line[:-1]
            digest = fitting_hash(body, secret)
            if not digest:
                why = ", or it is under a key: set SCALARLOOP_LEDGER_KEY" \
                    if b'"keyed":true' in body and not secret else \
                    ", or it is under no key: unset SCALARLOOP_LEDGER_KEY" \
                    if b'"keyed":false' in body and secret else \
                    ", or the key is another one" if secret else ""
                raise RecordBroken(f"{where}: was changed (its hash does not fit its bytes{why})")
            try:
                record, end = DECODE(body.decode("ascii"))
                same = end == len(body) and (not strict or canonical(record) == body)
            except (ValueError, RecursionError):
                raise RecordBroken(f"{where}: is not JSON") from None
            if not isinstance(record, dict) or record.get("hash") != digest or not same:
                raise RecordBroken(f"{where}: is not in canonical form")
            if record.get("prev") != prev or record.get("seq") != seq:
                raise RecordBroken(f"{where}: does not follow the line before it (a record was "
                                   "removed, added or moved)")
            if record.get("v") != LEDGER_VERSION or not isinstance(record.get("type"), str) \
                    or not isinstance(record.get("time"), str):
                raise RecordBroken(f"{where}: is of a version that this program does not know")
            prev, seq = record["hash"], seq + 1
            yield record


class Ledger:
    """The chained log; append is the only way in, and stops at once if somebody else wrote."""

    def __init__(self, path: str, secret: Optional[bytes], records: int = 0,
                 head: str = FIRST_PREV):
        self.path, self.secret, self.records, self.head = path, secret, records, head
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)
        for folder in (os.path.dirname(path), os.path.dirname(os.path.dirname(path))):
            sync_path(folder)
        self._size = os.fstat(self._file).st_size
        self._stamp = self._look()
        self._last = b""

    def _look(self) -> bytes:
        try:
            return stamp_of(os.lstat(self.path))
        except OSError:
            return b""

    def check(self) -> None:
        """Raise RecordBroken unless the file is as the last append left it."""
        now = self._look()
        if not now:
            raise RecordBroken(f"ledger: {self.path} is gone; nothing was appended. What was kept "
                               "is in the repository, with the ledger (refs/scalarloop/*)")
        if now != self._stamp or os.fstat(self._file).st_size != self._size:
            raise RecordBroken(f"ledger: {self.path} was touched by somebody else while the loop "
                               "ran; nothing was appended. Compare it with refs/scalarloop/* of "
                               "the repository")
        if self._last:
            with open(self.path, "rb") as stream:
                stream.seek(self._size - len(self._last))
                if stream.read() != self._last:
                    raise RecordBroken(f"ledger: the last line of {self.path} was changed")

    def append(self, *news: Tuple[str, Record]) -> List[Record]:
        """Write records, all or none, and flush them to disk before anything acts on them."""
        self.check()
        records, line, head = [], b"", self.head
        for kind, content in news:
            record: Record = {**content, "type": kind, "v": LEDGER_VERSION, "time": timestamp(),
                              "seq": self.records + len(records), "prev": head}
            head = record["hash"] = record_hash(canonical(record), self.secret)
            line += canonical(record) + b"\n"
            records.append(record)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise ScalarLoopError(f"ledger: {self.path} can't be written ({error.strerror}); the "
                                  "iteration was not acted on. Make room and start again") from None
        self.records, self.head = self.records + len(records), head
        self._size, self._last = self._size + len(line), line
        self._stamp = self._look()
        return records

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def cut_torn_line(path: str, torn: Sequence[bytes]) -> None:
    """Drop an unterminated last line: it was never acted on."""
    if torn:
        with open(path, "r+b") as stream:
            stream.truncate(os.path.getsize(path) - len(torn[0]))
            os.fsync(stream.fileno())


# ══ state ════════════════════════════════════════════════════════════════════════════════════════
# What the loop knows is a fold over its ledger, live and on resume alike, so that a run which was
# interrupted goes on exactly as one that was not.

NUMERIC, MISSING = (int, float), (type(None),)      # a bool is no number: types count exactly
OBJECT_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
FIELD_KINDS: Dict[str, Tuple[type, ...]] = {
    **dict.fromkeys(("n", "turn", "turns", "more", "dropped"), (int,)),
    **dict.fromkeys(("base", "tip", "branch", "prefix", "name", "seal_root", "outside_root",
                     "share_root", "tool_sha256", "verdict", "reason", "detail", "note", "evidence",
                     "agent_exit"), (str,)),
    **dict.fromkeys(("tree", "commit"), (str, *MISSING)),
    **dict.fromkeys(("value", "best", "baseline", "holdout"), (*NUMERIC, *MISSING)),
    **dict.fromkeys(("elapsed", "alpha", "scale", "q", "gain"), NUMERIC),
    **dict.fromkeys(("files", "lfs", "limits", "agent", "agent_seconds", "metric_seconds",
                     "failed_seconds"), (list,)),
    **dict.fromkeys(("config", "guards", "outside", "isolation", "versions", "closing", "others"),
                    (dict,))}
ELEMENT_KINDS: Dict[str, Tuple[type, ...]] = {
    "files": (str,), "lfs": (str,), "limits": (str,), "agent_seconds": NUMERIC,
    "metric_seconds": NUMERIC, "failed_seconds": NUMERIC}


def check_kinds(record: Record) -> None:
    """Raise TypeError when a field is not of its kind, OverflowError for a number that is none.

    Whoever re-chains a ledger may write any.
    """
    for name, value in record.items():
        if name in FIELD_KINDS and type(value) not in FIELD_KINDS[name]:
            raise TypeError(f"{name} is {value!r:.40}")
    for name, kinds in ELEMENT_KINDS.items():
        for element in record.get(name, ()):
            if type(element) not in kinds:
                raise TypeError(f"{name} holds {element!r:.40}")
            if type(element) is int:
                float(element)
    for name in ("value", "best", "baseline", "holdout", "elapsed"):
        if type(record.get(name)) is int:
            float(record[name])
    for name in ("base", "tip", "tree", "commit"):
        value = record.get(name)
        if value is not None and not OBJECT_ID.fullmatch(value):
            raise ValueError(f"{name} is {value!r:.40}")


def checked_config(table: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Return a recorded config if all that this program reads of it is there and of its kind."""
    for section, schema in [*SECTIONS.items(), *((name, GuardOptions) for name in table
                                                 if name.startswith("guard."))]:
        for option in fields(schema):
            if not fits(table[section][option.name], option.default):
                raise TypeError(f"{section}.{option.name} is {table[section][option.name]!r:.40}")
    if not all(isinstance(keys, dict) for keys in table.values()):
        raise TypeError("config holds a section that is none")
    return table


def fits(value: Any, default: Any) -> bool:
    """Tell whether a value from JSON may stand where loop.ini's default is this one."""
    if default == ():
        return type(value) is list and all(type(word) is str for word in value)
    if isinstance(default, tuple):
        return type(value) is list
    if default is None or type(default) is float:
        return type(value) in (*NUMERIC, *MISSING) or default is None and type(value) is list
    return type(value) is type(default)


NOTEWORTHY = (Reason.IMPLAUSIBLE, Reason.METRIC_NOT_FINITE, Reason.NOISE_UNCONFIRMED)


SHOWN = ("n", "verdict", "reason", "value", "files", "detail", "note")   # to the next turn's agent
shown_fields = operator.itemgetter(*SHOWN)
ROOTS = ("seal_root", "outside_root", "share_root")     # what no session of a run may change


class State:
    """Where a run stands; only `advance` changes it."""

    def __init__(self) -> None:
        self.start: Record = {}
        self.config: Dict[str, Dict[str, Any]] = {}
        self.base = self.tip = self.tree = ""
        self.baseline: Optional[float] = None
        self.best: Optional[float] = None
        self.metric_name = "metric"
        self.holdout: List[Tuple[int, Optional[float]]] = []
        self.iterations = self.turns = 0
        self.counts: Dict[str, int] = {verdict.value: 0 for verdict in Verdict}
        self.refused: Dict[str, int] = {}       # reasons that a person wants to hear of
        self.since_keep = self.give_ups = self.failures = self.voids = 0
        self.keeps: List[Tuple[int, str, float]] = []      # (iteration, commit, value)
        self.anchors: Dict[str, Tuple[int, str]] = {}      # commit -> record before its own
        self.tried: Set[str] = set()
        self.elapsed = 0.0
        self.recent: Deque[Record] = deque(maxlen=10)
        self.noise = NoiseState()
        self.guard_samples: Dict[str, List[float]] = {}
        self.stopped = ""
        self.closing: Record = {}       # fresh pairs of baseline and best, and what they say
        self.due, self.due_before, self.moved_on = -1, -1, False    # records that are handed back
        self.unproven = 0
        self.sessions = self.more_until = 0
        self.check_ins = 0

    def advance(self, record: Record) -> None:
        """Take one record of the ledger in."""
        handler = getattr(self, f"_on_{record['type']}", None)
        if record["type"] == "stop" or record.get("verdict") == Verdict.KEEP:
            self.due, self.due_before, self.moved_on = record["seq"], self.due, False
        elif record["type"] != "resume":
            self.moved_on = True
        try:
            if record["type"] != "turn":        # nothing of it is read
                check_kinds(record)
            if handler:
                handler(record)
            self.noise = advance_noise(self.noise, record)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError,
                OverflowError) as error:
            raise RecordBroken(f"ledger record {record['seq']}: lacks a field or has one of "
                               f"another kind ({printable(repr(error))})") from None

    def _on_start(self, record: Record) -> None:
        self.start = {name: record[name] for name in (*ROOTS, "config", "prefix", "lfs", "outside",
                                                      "tool_sha256")}
        self.config = checked_config(record["config"])
        self.base = self.tip = record["base"]
        self.tree = record["tree"]
        self.tried.add(self.tree)
        self.sessions = 1

    def _on_baseline(self, record: Record) -> None:
        self.baseline = self.best = record["value"]
        self.metric_name = record["name"]
        self.guard_samples = turned(record["guards"], 1.0)
        self.holdout.append((0, record["holdout"]))

    def _on_resume(self, record: Record) -> None:
        config = checked_config(record["config"])
        others = changed_keys(self.start["config"], config)[1]
        others += [name for name in ROOTS if record[name] != self.start[name]]
        if others:
            raise RecordBroken(f"ledger record {record['seq']}: goes on under another set-up "
                               f"({', '.join(others)}), which no resume allows")
        self.config = config
        self.stopped, self.closing = "", {}
        self.sessions += 1
        self.failures = self.voids = 0
        self.more_until = self.config["loop"]["iterations"] if record["more"] else 0
        if record["more"]:
            self.since_keep = self.give_ups = 0

    def _on_turn(self, record: Record) -> None:
        self.turns += 1

    def _on_duel(self, record: Record) -> None:
        self.tried.add(record["tree"])      # a duel found open at a resume is lost

    def _on_iteration(self, record: Record) -> None:
        verdict = record["verdict"]
        if record["n"] != self.iterations + 1:
            raise RecordBroken(f"ledger record {record['seq']}: iteration {record['n']!r} does not "
                               f"follow {self.iterations}")
        self.iterations = record["n"]
        self.elapsed = record["elapsed"]
        self.counts[verdict] += 1
        if verdict == Verdict.VIOLATION or record["reason"] in NOTEWORTHY:
            self.refused[record["reason"]] = self.refused.get(record["reason"], 0) + 1
        self.best = record["best"]
        if record["tree"] and verdict != Verdict.VOID:
            self.tried.add(record["tree"])
        self.give_ups = self.give_ups + 1 if verdict == Verdict.GIVE_UP else 0
        self.failures = self.failures + 1 if verdict == Verdict.AGENT_FAILED else 0
        self.voids = self.voids + 1 if verdict == Verdict.VOID else 0
        if verdict == Verdict.KEEP:
            self.tip, self.tree = record["commit"], record["tree"]
            self.keeps.append((record["n"], record["commit"], record["value"]))
            self.anchors[record["commit"]] = (record["seq"] - 1, record["prev"])
            self.unproven += record["reason"] == Reason.UNPROVEN
            self.holdout.append((record["n"], record["holdout"]))
            self.since_keep = 0
        elif verdict != Verdict.VOID:
            self.since_keep += 1
        self.recent.append(dict(zip(SHOWN, shown_fields(record))))

    def _on_stop(self, record: Record) -> None:
        closing = record["closing"]
        self.stopped, self.closing = record["reason"], {}
        if closing:
            self.closing = {name: closing[name] + 0.0 for name in ("gain", "low", "high")}
            self.closing["pairs"] = [(old + 0.0, new + 0.0) for old, new in closing["pairs"]]
        self.more_until = 0
        self.elapsed = max(self.elapsed, record["elapsed"])
        self.check_ins += record["reason"] == "check_in"


def run_tips(state: State) -> List[str]:
    """Return the base and every kept commit: where a run's branch may be."""
    return [state.base, *(commit for _, commit, _ in state.keeps)]


def too_dear(config: Config, state: State) -> bool:
    """Tell whether one more turn would pass the cost limit."""
    agent = config.agent
    return agent.max_cost is not None and (state.turns + 1) * agent.price_per_turn > agent.max_cost


def stop_reason(config: Config, state: State, elapsed: float) -> str:
    """Return why the run is over, or "" while it is not; the order is the order of the report."""
    loop, best = config.loop, state.best
    due = state.iterations // loop.check_in if loop.check_in else 0
    rules = [
        ("target", loop.target is not None and best is not None
         and config.sign * best <= config.sign * loop.target),
        ("iterations", state.iterations - state.counts["void"] >= loop.iterations),
        ("patience", state.since_keep >= loop.patience),
        ("give_ups", state.give_ups >= loop.give_ups),
        ("failures", state.failures >= loop.failures),
        ("void", state.voids >= 2),
        ("constant_metric", looks_constant(state.noise)),
        ("max_cost", too_dear(config, state)),
        ("budget", loop.budget is not None and elapsed >= loop.budget),
        ("check_in", due > state.check_ins),
    ]
    return next((reason for reason, holds in rules if holds), "")


STOP_TEXT = {
    "target": "the target is reached", "iterations": "all iterations are done",
    "patience": "nothing was kept for too long", "give_ups": "the agent gave up repeatedly",
    "failures": "the agent failed repeatedly", "void": "the machine failed twice in a row",
    "constant_metric": "the metric looks constant: no tree ever gave another number; give it a "
                       "canary, or mend it",
    "max_cost": "the cost limit is reached", "budget": "the time budget is used up",
    "check_in": "paused for a check-in", "interrupted": "interrupted",
    "failed": "the run failed", "store": "the store is damaged",
}
STOP_EXIT = {"failures": 1, "void": 1, "constant_metric": 1, "failed": 1, "store": 1,
             "check_in": 3, "interrupted": 130}
FINAL_STOPS = ("target", "iterations", "patience", "give_ups", "max_cost", "budget",
               "constant_metric")


# ══ agent ════════════════════════════════════════════════════════════════════════════════════════

GIVE_UP_LINE = re.compile(rb"^%s(?![A-Za-z0-9_])[^\n]*" % GIVE_UP.encode(), re.MULTILINE)
AGENT_VARIABLES = ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TERM", "TZ", "ANTHROPIC_*",
                   "OPENAI_*", "*_proxy", "*_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR",
                   "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "CLAUDE_CONFIG_DIR",
                   "CLAUDE_CODE_*", "XDG_CONFIG_HOME")
METRIC_VARIABLES = ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ")
CLAUDE = ("claude", "-p", "--permission-mode", "acceptEdits", "--setting-sources=",
          "--strict-mcp-config", "--no-session-persistence",
          "--tools=Read,Edit,Write,Glob,Grep", "--max-turns", "100")
CLAUDE_ENV = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "CLAUDE_CODE_MAX_RETRIES": "2",
              "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1", "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1"}


def resolve_agent(config: Config) -> List[str]:
    """Return the agent's argv with an absolute program; refuse what can't be run."""
    agent = config.agent
    if agent.command:
        argv = resolve_command(agent.command, config.folder)
    else:
        argv = resolve_adapter(agent.adapter, config.folder)
    if os.path.isfile(argv[0]) and not os.access(argv[0], os.X_OK):
        raise Refused(f"agent: {argv[0]} is not executable; chmod +x it")
    if not os.path.isfile(argv[0]):
        raise Refused(f"agent: {argv[0]} is not a program that can be run; install it, or set "
                      "[agent] adapter or command")
    return argv


def resolve_adapter(name: str, folder: str) -> List[str]:
    """Return the argv of an adapter: beside loop.ini, then beside this file, then the built-in."""
    found: List[str] = []
    for place in (folder, os.path.dirname(os.path.abspath(__file__))):
        with contextlib.suppress(OSError):
            found += [entry[:-3] for entry in os.listdir(os.path.join(place, "adapters"))]
        path = os.path.join(place, "adapters", f"{name}.py")
        if os.path.isfile(path):
            return [sys.executable or "python3", path]
    if name == "claude":
        return resolve_command(CLAUDE, folder)
    near = difflib.get_close_matches(name, found + ["claude"], 1)
    raise Refused(f"agent: there is no adapters/{name}.py beside loop.ini or beside scalarloop.py"
                  + (f" (did you mean {near[0]}?)" if near else "")
                  + "; correct [agent] adapter, copy scalarloop's adapters/ folder, or set "
                  "[agent] command")


def agent_environment(config: Config, n: int, turn: int, seed: int, files: Sequence[str],
                      scratch: str) -> Dict[str, str]:
    """Return what an agent's process may know."""
    env = inherited((*AGENT_VARIABLES, *config.agent.env))
    if config.agent.adapter == "claude" and not config.agent.command:
        env.update(CLAUDE_ENV)
        env["CLAUDE_CODE_TMPDIR"] = scratch
        if resolve_agent(config)[-1].endswith(CLAUDE[-1]) and "CLAUDE_CONFIG_DIR" not in env \
                and not {"ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"}.isdisjoint(env):
            env["CLAUDE_CONFIG_DIR"] = os.path.join(scratch, "config")   # a key: no login
    scope = [*config.loop.scope, *([config.loop.memory] if config.loop.memory else [])]
    listed = json.dumps(list(files))
    env.update({"TMPDIR": scratch, "SCALARLOOP_ITERATION": str(n), "SCALARLOOP_TURN": str(turn),
                "SCALARLOOP_SEED": str(seed), "SCALARLOOP_TEMPERATURE": "1.0",
                "SCALARLOOP_CONFIG_DIR": config.folder,
                "SCALARLOOP_SCOPE": json.dumps(scope), **dict(config.adapter)})
    if len(listed) < 100_000:       # the system refuses longer variables
        env["SCALARLOOP_FILES"] = listed
    return env


def fenced_text(text: str, most: int = 3000) -> str:
    """Quote untrusted text for a prompt: every line marked, control characters escaped, bounded."""
    lines = text[-most:].splitlines()[-40:]
    return "\n".join("    | " + printable(line, 300) for line in lines)


def build_prompt(config: Config, state: State, goal: str, rework: str = "") -> str:
    """Return the prompt of the next turn; it depends on loop.ini and the ledger alone."""
    loop, metric = config.loop, config.metric
    better = "lower" if metric.direction == "minimize" else "higher"
    prefix = state.start.get("prefix", "")
    parts = [
        # an agent may echo its prompt: the token must not stand at the start of a line of it
        f"# Goal\n{goal.strip()}".replace("\n" + GIVE_UP, "\n " + GIVE_UP),
        "# Rules (kept by a program, not by trust)\n"
        f"- You may change, add and delete files that match: {' '.join(loop.scope)}\n"
        "- Everything else is sealed. If anything else is changed, or a file appears outside "
        "these\n"
        "  patterns, the whole turn is thrown away, with its gains.\n"
        "- You work on a throwaway copy. Git history, commits and settings made here go nowhere.\n"
        + (f"- {loop.memory} is yours for notes: it survives every turn and is never measured.\n"
           if loop.memory else "")
        + f"- At most {loop.max_files} files and {loop.max_change} bytes may change in one turn.",
        f"# Measure\nAfter your turn a sealed command measures {state.metric_name} in a clean "
        f"copy; {better} is better.\n"
        f"Baseline {format_number(state.baseline)}, best so far {format_number(state.best)}. "
        f"{describe_needed(config)}\n"
        + "".join(f"Guard {guard.name}: `{printable(shlex.join(guard.command))}` must hold.\n"
                  for guard in config.guards).rstrip(),
    ]
    if state.recent:
        parts.append("# The last turns\n" + "\n".join(
            format_history(row, prefix) for row in state.recent))
    if rework:
        parts.append("# Mend this first\nYour edits are still in place, but:\n" + rework)
    parts.append(
        "# How to end\nMake one well-considered improvement in the files, then stop. What you "
        "print is logged and ignored.\nIf you are sure that nothing can be improved, change "
        f"nothing and print one line that begins with {GIVE_UP}.")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def describe_needed(config: Config) -> str:
    """Say what a keep needs."""
    gain = config.metric.min_gain
    if not gain.amount:
        return "Only a true improvement is kept."
    return (f"An improvement is kept when it is more than {format_number(gain.amount)}"
            f"{' %' if gain.percent else ''}.")


def format_history(row: Record, prefix: str) -> str:
    """Return one past turn as a line or two of a prompt; the agent's words stay quoted."""
    names = [name[len(prefix):] if name.startswith(prefix) else name for name in row["files"]]
    files = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    text = f"- #{row['n']} {row['verdict']} ({row['reason']})"
    if row["value"] is not None:
        text += f", {format_number(row['value'])}"
    text += f"; files: {printable(files)}" if files else ""
    if row["detail"] and row["detail"] not in row["files"]:
        text += f"; {printable(row['detail'], 120)}"
    return text + (f"\n  its last words: \"{printable(row['note'], 160)}\"" if row["note"] else "")


# ══ terminal ═════════════════════════════════════════════════════════════════════════════════════

def standing_value(samples: Mapping[str, Any], best: Optional[float]) -> Optional[float]:
    """Return what a candidate's number is to be held against: its duel's own incumbent runs.

    The best so far may have been measured in another hour, on a busier machine.
    """
    rivals = [first for first, _ in samples.get("pairs", ()) if first is not None]
    return median(rivals) if rivals else best


def format_iteration(record: Record, best_before: Optional[float]) -> str:
    """Return the line of an iteration: number, verdict, metric, change, reason, seconds."""
    value = record["value"]
    seconds = sum(record["agent_seconds"]) + sum(record["metric_seconds"]) \
        + sum(record["failed_seconds"])
    why = record["reason"]
    extra = record["detail"] or record["evidence"]
    if record["verdict"] == Verdict.AGENT_FAILED and record["note"]:
        extra += f", its last words: {record['note']}"
    if extra:
        why += f": {printable(extra, 90)}"
    if record["turns"] > 1:
        why += f" ({record['turns']} turns)"
    change = format_change(standing_value(record["samples"], best_before), value)
    return (f"#{record['n']:<4d}{record['verdict']:<13s}{format_number(value):>12s} "
            f"{change:>10s}  {format_seconds(seconds):>7s}  {why}")


def holdout_gap(config: Config, state: State) -> str:
    """Return a warning when what was gained in sight was not gained on the holdout."""
    first, last = state.holdout[0][1], state.holdout[-1][1]
    sign = -1.0 if config.holdout.direction == "maximize" else 1.0
    if not state.keeps or first is None:
        return ""
    if last is None:
        return ": it fails on the best"
    return ": no gain on the holdout, the visible one may be overfitted" \
        if sign * last >= sign * first else ""


def format_headline(state: State) -> str:
    """Return what the run came to: of a noisy metric, what fresh pairs of both ends say."""
    pairs = state.closing.get("pairs", ())
    first, last = (median(runs) for runs in zip(*pairs)) if pairs else (state.baseline, state.best)
    return (f"{state.metric_name[:10]:<10s} {format_number(first)} -> {format_number(last)} "
            f"({format_change(first, last) or 'no change'})"
            + (f"  [{state.unproven} unproven]" if state.unproven else "")
            + (f"; the medians of {len(pairs)} fresh pairs" if pairs else ""))


def format_summary(config: Config, state: State, head: str, records: int, reason: str,
                   detail: str = "") -> str:
    """Return the closing summary of a run; `detail` says more than the reason's usual words."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in state.counts.items() if count)
    branch = config.loop.branch
    lines = [
        f"{'stopped' if state.stopped else 'status':<10s} "
        f"{detail or STOP_TEXT.get(reason, reason)} ({reason})",
        format_headline(state),
        f"turns      {counts or 'none'}",
    ]
    if state.refused:
        refused = (f"{count} {reason}" for reason, count in sorted(state.refused.items()))
        lines.append("refused    " + ", ".join(refused))
    if not state.noise.exact and state.baseline is not None:
        spread = format_number(sigma(state.noise.differences))
        lines.append(f"noise      one run varies by {spread}")
    if state.closing:
        gain, low, high = (format_number(state.closing[name]) for name in ("gain", "low", "high"))
        lines.append(f"gain       {gain}, in all likelihood from {low} to {high}")
    if state.holdout and state.holdout[0][1] is not None:
        first, last = state.holdout[0][1], state.holdout[-1][1]
        lines.append(f"holdout    {format_number(first)} -> {format_number(last)} "
                     f"({format_change(first, last) or 'no change'})" + holdout_gap(config, state))
    if state.keeps:
        lines += [f"branch     {branch}   ({counted(len(state.keeps), 'commit')} on "
                  f"{state.base[:12]})",
                  f"look       git log --stat {state.base[:12]}..{branch}",
                  f"merge      git merge --no-ff {branch}"]
    else:
        lines.append("branch     none: nothing was kept")
    lines.append(f"ledger     {records - 1} {head}")
    if reason == "failures":
        lines.append("look       " + os.path.join(config.state_folder, "iterations",
                                                  f"{state.iterations:04d}", "agent.log"))
    if reason in STOP_EXIT and reason not in FINAL_STOPS:
        lines.append("next       start again to go on")
    return "\n".join(lines)


class Terminal:
    """Plain lines, and on a tty one live line under them; a closed pipe is no reason to stop."""

    def __init__(self, stream: Any):
        self.stream = stream
        try:
            self.live_lines = stream.isatty() and os.environ.get("TERM") != "dumb"
        except ValueError:
            self.live_lines = False
        self._live = ""
        self._doing, self._since, self._last = "", 0.0, 0.0
        self.suffix: Callable[[], str] = str

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):       # closed or full: go on without, to the very end
            self.live_lines = False
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def say(self, text: str) -> None:
        """Print whole lines."""
        self.clear()
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")

    def clear(self) -> None:
        """Take the live line away."""
        if self._live:
            self._write("\r\x1b[K")
            self._live = ""

    def doing(self, what: str) -> None:
        """Say what runs from now on; shown on the live line only."""
        self._doing, self._since, self._last = what, time.monotonic(), 0.0
        self.tick()

    def tick(self) -> None:
        """Refresh the live line, at most five times a second."""
        now = time.monotonic()
        if not self.live_lines or not self._doing or now - self._last < .2:
            return
        self._last = now
        width = shutil.get_terminal_size().columns - 1
        text = f"{self._doing}  {format_seconds(now - self._since)}  {self.suffix()}"[:width]
        self._live = text
        self._write("\r\x1b[K" + text)


# ══ gate ═════════════════════════════════════════════════════════════════════════════════════════
# The preconditions. Each row of the table is one that holds, holds with a notice, or failed; all
# that can be looked at without running anything are looked at before the first refusal.

class Condition(NamedTuple):
    """One row of the gate: `state` is ok, notice or FAILED; a failed text ends in its remedy."""

    name: str
    state: str
    text: str


class Gate:
    """Collect conditions; `demand` raises Refused with every failed one."""

    def __init__(self) -> None:
        self.rows: List[Condition] = []

    def ok(self, name: str, text: str) -> None:
        """Add a condition that holds."""
        self.rows.append(Condition(name, "ok", text))

    def notice(self, name: str, text: str) -> None:
        """Add something that the user should know and may want."""
        self.rows.append(Condition(name, "notice", text))

    def fail(self, name: str, text: str) -> None:
        """Add a condition that does not hold."""
        self.rows.append(Condition(name, "FAILED", text))

    def has_failed(self, name: str) -> bool:
        """Tell whether a condition of that name failed."""
        return any(row.name == name and row.state == "FAILED" for row in self.rows)

    def demand(self) -> None:
        """Raise Refused if any condition failed."""
        failed = [row for row in self.rows if row.state == "FAILED"]
        if failed:
            raise Refused("\n".join(f"{row.name}: {row.text}" for row in failed))

    def table(self) -> str:
        """Return all rows as a table."""
        return "\n".join(f"{row.name:<12s}{row.state:<8s}{row.text}" for row in self.rows)


def check_work_tree(gate: Gate, config: Config, user: UserRepository) -> None:
    """Look for staged and changed tracked files; untracked ones are only listed."""
    if not user.branch:
        gate.fail("branch", "HEAD is detached; check out the branch to start from, or make one")
    drivers = user.repo.git("config", "--name-only", "-z", "--get-regexp", r"^filter\.",
                            accept=(0, 1)).split(b"\0")[:-1]
    quiet = [word for driver in sorted({name.rpartition(b".")[0] for name in drivers})
             for what in ("clean=", "smudge=", "process=", "required=false")
             for word in ("-c", f"{os.fsdecode(driver)}.{what}")]   # run nothing that it names
    rows = user.repo.git(*quiet, "status", "--porcelain=v1", "-z", "--no-renames",
                         "--untracked-files=normal",
                         "--ignore-submodules=dirty").split(b"\0")[:-1]
    own = os.fsencode(os.path.relpath(os.path.realpath(config.path), os.path.realpath(user.top)))
    changed = [row[3:] for row in rows if row[:2] not in (b"??", b"!!") and row[3:] != own]
    known = {own, *(user.prefix + name.encode() + b"/" for name in config.loop.share)}
    untracked = [row[3:] for row in rows if row[:2] == b"??" and row[3:] not in known
                 and b".scalarloop/" not in row]
    if changed:
        gate.fail("tree", f"{counted(len(changed), 'tracked file', 'is are')} changed or staged, "
                          f"the first is {shown_path(changed[0])}; commit or stash them")
    elif untracked:
        gate.notice("tree", f"clean; {counted(len(untracked), 'untracked path', 'is are')} not "
                    f"seen by the metric, the first is {shown_path(untracked[0])}")
    else:
        gate.ok("tree", f"clean at {user.head[:12]}")


def check_branch(gate: Gate, config: Config, user: UserRepository, tips: Sequence[str]) -> None:
    """Refuse a result branch that is checked out, blocked by another name, or somebody else's."""
    branch = config.loop.branch
    ref = f"refs/heads/{branch}"
    at = user.repo.refs([ref]).get(ref, "")
    rows = user.repo.git("for-each-ref", "--format=%(refname)%00%(worktreepath)%00",
                         "refs/heads").split(b"\0")
    names = {row.lstrip(b"\n").decode("utf-8", "replace"): place
             for row, place in zip(rows[0::2], rows[1::2])}
    blocking = [name for name in names if name.startswith(ref + "/") or ref.startswith(name + "/")]
    if branch == user.branch or names.get(ref):
        where = os.fsdecode(names.get(ref) or b"here")
        gate.fail("branch", f"{branch} is checked out ({printable(where)}); switch to another, or "
                            "set [loop] branch to one of its own")
    elif blocking:
        gate.fail("branch", f"{branch} can't be made while {blocking[0][11:]} exists; rename it or "
                  "set [loop] branch")
    elif at and at not in tips:
        gate.fail("branch", f"{branch} exists and is not this run's (at {at[:12]}); rename it, or "
                  "set [loop] branch or name")
    elif user.branch:
        gate.ok("branch", f"{branch}, from {user.branch}")


def check_scope(gate: Gate, config: Config, user: UserRepository, scope: Scope,
                listed: Dict[bytes, Listed]) -> None:
    """Look at what may change, what may not, and what a command names on the wrong side."""
    inside = [path for path, row in listed.items()
              if row.mode in (PLAIN, EXECUTABLE) and scope.holds(path)]
    if not inside:
        folder = next((glob for glob in config.loop.scope for path in listed
                       if path.startswith(scope.prefix + glob.rstrip("/").encode() + b"/")), "")
        hint = f"; {folder} is a folder: write {folder.rstrip('/')}/**" if folder else ""
        gate.fail("scope", f"{' '.join(config.loop.scope)} matches no tracked regular file that is "
                  f"not sealed{hint}; correct [loop] scope or commit the files")
    else:
        gate.ok("scope", f"{counted(len(inside), 'file')} may change, {len(listed) - len(inside)} "
                         "may not")
    for glob in config.loop.scope if inside else ():
        if not any(replace(scope, globs=(split_glob(glob),)).holds(path) for path in listed):
            gate.notice("scope", f"{glob} matches no tracked file")
    own = os.fsencode(os.path.relpath(os.path.realpath(config.path), os.path.realpath(user.top)))
    differing = [path for path, row in listed.items() if row.mode in (PLAIN, EXECUTABLE)
                 and path != own and differs_on_disk(user, path, row)]
    if differing and not gate.has_failed("tree"):
        gate.notice("tree", f"{counted(len(differing), 'file', 'is are')} stored with other bytes "
                            f"than on disk (line ends, filters), the first is "
                            f"{shown_path(differing[0])}; the metric sees the stored ones")
    check_named_files(gate, config, scope, listed)
    check_links(gate, config, user, scope, listed)


def check_named_files(gate: Gate, config: Config, scope: Scope, listed: Dict[bytes, Listed]
                      ) -> None:
    """Look at the files that commands name: in scope, not tracked, or the loop's own."""
    shared = [scope.prefix + os.fsencode(os.path.normpath(name)) for name in config.loop.share]
    for section, command in commands_of(config).items():
        for word in command:
            path = scope.prefix + os.fsencode(os.path.normpath(word))
            if section == "metric produce":
                continue        # the candidate's own, so it may
            if path in listed and scope.holds(path):
                gate.notice("scope", f"[{section}] runs {word}, which the agent may change: the "
                            "candidate then speaks for itself; put the scoring in a sealed file "
                            "and run the candidate by `produce`")
            elif path not in listed and not word.startswith(("/", "-", "~", "..")) \
                    and os.path.isfile(os.path.join(config.folder, word)) \
                    and not config.metric.setup and not lies_in(path, shared):
                gate.notice(section.split(" ")[0], f"{printable(word)} is not a tracked file, so "
                            "the metric won't see it; commit it if it should")
    for word in [os.path.abspath(__file__), *config.agent.command]:
        path = scope.prefix + os.fsencode(os.path.relpath(os.path.join(config.folder, word),
                                                          config.folder))
        if path in listed and scope.holds(path):
            gate.notice("scope", f"{shown_path(path)} is in scope: the agent may change what you "
                        "will run after a merge; name it in [loop] seal")
    if not config.metric.produce:
        gate.notice("metric", "one step: if the command runs the candidate's code in its own "
                              "process, that code could print the number; `produce` and `outputs` "
                              "split it")


def differs_on_disk(user: UserRepository, path: bytes, row: Listed) -> bool:
    """Tell whether a clean tracked file has other bytes on disk than in git (small files only)."""
    full = os.path.join(os.fsencode(user.top), path)
    try:
        status = os.lstat(full)
        if not stat.S_ISREG(status.st_mode) or status.st_size > 1 << 16:
            return False
        with open(full, "rb") as stream:
            data = stream.read()
    except OSError:
        return False
    return blob_id(data, user.algorithm) != row.oid


def check_links(gate: Gate, config: Config, user: UserRepository, scope: Scope,
                listed: Dict[bytes, Listed]) -> None:
    """Look at submodules, shared folders, the program and the memory file."""
    shared = [scope.prefix + path.encode() for path in config.loop.share]
    for path, row in listed.items():
        full = os.path.join(os.fsencode(user.top), path)
        if row.mode == GITLINK and path not in shared and os.path.isdir(full) and os.listdir(full):
            gate.fail("tree", f"the submodule {shown_path(path)} is in use; add it to [loop] share")
    for path in shared:
        problem = share_problem(user, path, listed)
        if problem:
            gate.fail("share", problem)
    program = scope.prefix + config.loop.program.encode()
    if config.loop.program and program not in listed:
        gate.fail("program", f"{config.loop.program} is not a tracked file; commit it")
    elif config.loop.program and scope.holds(program):
        gate.fail("program", f"{config.loop.program} is in scope, so the agent could rewrite its "
                             "own orders; seal it")
    if config.loop.memory and scope.prefix + config.loop.memory.encode() in listed:
        gate.fail("memory", f"{config.loop.memory} is a tracked file; name one that is not")


def share_problem(user: UserRepository, path: bytes, listed: Dict[bytes, Listed]) -> str:
    """Return why a shared folder can't be one, or ""."""
    root = os.path.join(os.fsencode(user.top), path)
    if not os.path.isdir(root) or os.path.islink(root):
        return (f"{shown_path(path)} is not a folder; create it (npm ci, pip install) or leave "
                "it out")
    if any(known == path and row.mode != GITLINK or known.startswith(path + b"/")
           for known, row in listed.items()):
        return f"{shown_path(path)} holds tracked files; share is for untracked folders"
    top = os.path.realpath(os.fsencode(user.top))
    try:
        for name, status in scan(root):
            full = os.path.join(root, name)
            leads: List[bytes] = []
            if os.path.basename(name).startswith((b"__editable__", b"direct_url.json")) \
                    and status.st_size < 1 << 16:
                with open(full, "rb") as stream:
                    leads = [top] if re.search(re.escape(top) + rb"[/'\"]", stream.read()) else []
            if stat.S_ISLNK(status.st_mode):
                leads = [os.path.realpath(full)]
            elif name.endswith((b".pth", b".egg-link")) and status.st_size < 1 << 16:
                with open(full, "rb") as stream:
                    leads += [os.path.realpath(os.path.join(os.path.dirname(full), line.strip()))
                              for line in stream.read().splitlines() if line.strip()]
            for lead in leads:
                if lies_in(lead, [top]) and not lead.startswith(os.path.realpath(root) + b"/"):
                    return (f"{shown_path(path + b'/' + name)} leads into the project, so the "
                            "user's files would be measured instead of the candidate's; install "
                            "without it")
    except (CensusError, OSError) as error:
        return f"{shown_path(path)} can't be read ({error})"
    return ""


def commands_of(config: Config) -> Dict[str, Tuple[str, ...]]:
    """Return every command that measures or judges, by the section it stands in."""
    metric = config.metric
    table = {"metric": metric.command, "metric produce": metric.produce, "setup": metric.setup,
             "runner": metric.runner, "holdout": config.holdout.command}
    table.update({f"guard {guard.name}": guard.command for guard in config.guards})
    return {section: command for section, command in table.items() if command}


def check_places(gate: Gate, config: Config, user: UserRepository) -> None:
    """Look at the places that a run reads and writes beside the work tree."""
    top = os.path.realpath(user.top) + os.sep
    for path in (user.objects, os.path.join(user.common_dir, "refs")):
        if not os.access(path, os.W_OK):
            gate.fail("git", f"{path} can't be written, so nothing could be handed back; make it "
                      "writable")
    if os.path.realpath(work_folder() or tempfile.gettempdir()).startswith(top):
        gate.fail("tmp", "the temporary folder lies inside the project, whose files would be found "
                  "from there; set TMPDIR elsewhere")
    secret = os.environ.get("SCALARLOOP_LEDGER_KEY", "")
    if secret and os.path.realpath(secret).startswith(top):
        gate.fail("ledger", f"the key {secret} lies inside the project, so every agent gets a "
                            "copy; move it elsewhere")
    for path in config.agent.writable:
        if not os.path.lexists(os.path.expanduser(path)):
            gate.fail("agent", f"{printable(path)} does not exist; create it, or correct [agent] "
                      "writable")


def check_commands(gate: Gate, config: Config, user: UserRepository,
                   listed: Dict[bytes, Listed]) -> None:
    """Refuse a command whose program is missing, not committed, or not executable."""
    shared = tuple(path + "/" for path in config.loop.share)
    for section, command in commands_of(config).items():
        word = os.path.expanduser(command[0])
        path = resolve_command(command, config.folder)[0]
        row = listed.get(os.fsencode(os.path.relpath(os.path.abspath(path), user.top)))
        section, _, name = section.partition(" ")
        shown = (f"{name}: " if name else "") + printable(command[0])
        if os.sep in word and not os.path.isabs(word) and row is None:
            if not word.startswith(shared) and not config.metric.setup:
                gate.fail(section, f"{shown} is not a tracked file, so the metric won't see it; "
                          "commit it, name its folder in [loop] share, or correct the command")
        elif row is not None and row.mode != EXECUTABLE:
            gate.fail(section, f"{shown} is not executable; chmod +x and commit it")
        elif not os.path.isfile(path):
            gate.fail(section, f"{shown} can't be found; install it, or correct the command")
        elif not os.access(path, os.X_OK):
            gate.fail(section, f"{shown} is not executable; chmod +x it")


def sealed_paths(config: Config, user: UserRepository, scope: Scope,
                 listed: Dict[bytes, Listed]) -> List[str]:
    """Return the paths outside the tree that are sealed: `seal` words and every program run."""
    paths = []
    for word in config.loop.seal:
        full = outside_path(config, word)
        one = replace(scope, sealed=(split_glob(word),))
        if not is_outside(word) and any(map(one.seals, listed)):
            continue
        if not os.path.lexists(full):
            raise Refused(f"seal: {printable(word)} matches nothing; correct [loop] seal")
        paths.append(full)
    for command in commands_of(config).values():
        program = resolve_command(command, config.folder)[0]
        inside = os.fsencode(os.path.relpath(os.path.abspath(program), user.top)) in listed
        if not inside and os.path.isfile(program):
            paths.append(program)
    return paths


def lfs_pointers(user: UserRepository, listed: Dict[bytes, Listed], held: str) -> FrozenSet[bytes]:
    """Copy the content of git-lfs pointers to `held`; refuse one whose content is missing.

    A file whose work-tree bytes are the pointer itself is taken for what it looks like.
    """
    attributed = [path for path in listed if path.split(b"/")[-1] == b".gitattributes"]
    if not attributed:
        return frozenset()
    marked = user.repo.git("check-attr", "-z", "--cached", "--stdin", "filter",
                           stdin=b"".join(path + b"\0" for path in listed)).split(b"\0")[:-1]
    found = set()
    for path in [marked[i] for i in range(0, len(marked), 3) if marked[i + 2] == b"lfs"]:
        pointer = LFS_POINTER.fullmatch(user.repo.git("cat-file", "blob", listed[path].oid))
        if not pointer:
            continue
        oid = pointer[1].decode()
        copies = [os.path.join(user.repo.git_dir, "lfs", "objects", oid[:2], oid[2:4], oid),
                  os.path.join(user.top, os.fsdecode(path))]
        source = next((copy for copy in copies if os.path.isfile(copy)
                       and hash_file(os.fsencode(copy))[0].hex() == oid), None)
        if not source:
            raise Refused(f"tree: the git-lfs content of {shown_path(path)} is not here; run git "
                          "lfs pull")
        os.makedirs(held, exist_ok=True)
        shutil.copyfile(source, os.path.join(held, oid))
        found.add(path)
    return frozenset(found)


def is_locked(config: Config) -> bool:
    """Tell whether a loop is at work on a run's state folder."""
    try:
        with open(os.path.join(config.state_folder, "lock"), "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


class StateLock:
    """The one loop that may use a state folder; the system lets go of it when the loop dies."""

    def __init__(self, folder: str):
        self.folder = folder
        self.path = os.path.join(folder, "lock")
        self.created = [path for path in (os.path.dirname(folder), folder)
                        if not os.path.lexists(path)]
        self._file = -1
        self._ignored = False

    def acquire(self) -> None:
        """Take the lock; refuse when another loop holds it or the folder can't be written."""
        try:
            os.makedirs(self.folder, 0o700, exist_ok=True)
            ignore = os.path.join(os.path.dirname(self.folder), ".gitignore")
            if not os.path.lexists(ignore) or not os.path.getsize(ignore):
                write_plain(ignore, b"*\n")
                self._ignored = True
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                                 0o600)
        except OSError as error:
            self._undo()
            known = {errno.ENOTDIR: "is not a folder; move it away",
                     errno.EEXIST: "is not a folder; move it away",
                     errno.ELOOP: "holds a lock that is a link; remove it"}
            raise Refused(f"lock: the state folder {self.folder} " + known.get(
                error.errno or 0, f"can't be written ({error.strerror}); make it "
                                  "writable")) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.fstat(self._file).st_ino == os.stat(self.path).st_ino
        except OSError:
            same = False
        if not same:
            os.close(self._file)
            self._file = -1
            raise Refused(f"lock: another loop runs on {self.folder}; wait for it, or give this "
                          "one another [loop] name")

    def _undo(self) -> None:
        """Remove the folders that acquiring made, if nothing else is in them."""
        parent = os.path.dirname(self.folder)
        with contextlib.suppress(OSError):
            if self.folder in self.created:
                os.rmdir(self.folder)
            if self._ignored and os.listdir(parent) == [".gitignore"]:
                os.unlink(os.path.join(parent, ".gitignore"))
            if parent in self.created:
                os.rmdir(parent)

    def note(self, temporary: str) -> None:
        """Write down the temporary folder, so that the next start can remove it after a crash."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"pid": os.getpid(), "tmp": temporary}).encode(), 0)

    def left_behind(self) -> str:
        """Return the temporary folder of a loop that died, or ""."""
        try:
            path = json.loads(os.pread(self._file, 4096, 0) or b"{}").get("tmp", "")
        except (ValueError, AttributeError, RecursionError):
            return ""
        folder, base = os.path.split(str(path))
        places = [os.path.realpath(place) for place in (tempfile.gettempdir(), "/var/tmp")]
        if not re.fullmatch(r"scalarloop-[0-9a-f]{6}", base) or folder not in places \
                or not os.path.isdir(path):
            return ""
        status = os.lstat(path)
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        return path if ours and stat.S_IMODE(status.st_mode) in (0o700, 0o711) else ""

    def release(self, undo: bool) -> None:
        """Let go; with `undo` also remove what acquiring created, if nothing else is in there."""
        if self._file < 0:
            return
        if undo:
            if self.folder in self.created:
                for name in ("store.git", "lfs", "iterations", "witness", "ledger.jsonl"):
                    remove_tree(os.path.join(self.folder, name))
            with contextlib.suppress(OSError):      # another start may have come in meanwhile
                os.unlink(self.path)
            self._undo()
        else:
            os.ftruncate(self._file, 0)
        os.close(self._file)
        self._file = -1


# ══ loop ═════════════════════════════════════════════════════════════════════════════════════════

class Snapshot(NamedTuple):
    """A tree of the store together with the manifest of its content."""

    tree: str
    manifest: Manifest


@dataclass(frozen=True)
class Known:
    """What is known of a candidate when it is decided about; None: that phase did not run."""

    gave_up: bool = False
    ended: Optional[Ended] = None
    proposal: Optional[Proposal] = None
    unchanged: bool = False
    repeated: bool = False
    failed: Optional[Measurement] = None        # the candidate's run that yielded no number
    judgement: Optional[Judgement] = None


class Decision(NamedTuple):
    """The verdict on an iteration, its reason, and a detail for people."""

    verdict: Verdict
    reason: Reason
    detail: str = ""


def decide(facts: Known) -> Decision:
    """Decide about a candidate: integrity, scope, metric, guards, statistics, in that order.

    Pure. Whatever is not known to be better is not kept: the last line is a reject.
    """
    def end(reason: Reason, detail: str = "") -> Decision:
        return Decision(VERDICT_OF[reason], reason, detail)

    if facts.failed and facts.failed.integrity:
        return end(facts.failed.reason or Reason.SEAL_TOUCHED, facts.failed.detail)
    if facts.gave_up:
        return end(Reason.GAVE_UP)
    if facts.proposal is None:
        return end(Reason.MACHINE, "no census was taken")
    if facts.proposal.violation:
        return end(facts.proposal.violation, facts.proposal.where)
    if facts.unchanged:
        if facts.ended and facts.ended.timed_out:
            return end(Reason.AGENT_TIMEOUT, facts.ended.describe())
        if facts.ended and facts.ended.status:
            return end(Reason.AGENT_EXIT, facts.ended.describe())
        return end(Reason.UNCHANGED)
    if facts.repeated:
        return end(Reason.REPEATED, "this tree was tried before")
    if facts.judgement is None:
        return end(Reason.MACHINE, "nothing was measured")
    if facts.judgement.outcome in (Reason.NOISE_FAILED, Reason.NOISE_UNCONFIRMED):
        return end(facts.judgement.outcome, facts.failed.detail if facts.failed else "")
    if facts.failed and facts.failed.reason:
        return end(facts.failed.reason, facts.failed.detail)
    if facts.judgement.outcome is Reason.BETTER:
        return end(Reason.UNPROVEN if facts.judgement.unproven else Reason.BETTER)
    if VERDICT_OF[facts.judgement.outcome] is Verdict.KEEP:
        return end(Reason.MACHINE, "a keep without proof")
    return end(facts.judgement.outcome)


REWORKABLE = (Verdict.CRASH, Verdict.GUARD_FAILED)


@dataclass
class Work:
    """One iteration under way: what it cost and what it left."""

    n: int
    folder: str
    turns: int = 0
    agent_seconds: List[float] = field(default_factory=list)
    metric_seconds: List[float] = field(default_factory=list)
    failed_seconds: List[float] = field(default_factory=list)
    others: Dict[str, float] = field(default_factory=dict)      # numbers beside the metric's
    known: Optional[Known] = None
    candidate: Optional[Snapshot] = None
    prompt_digest: str = ""
    log_digest: str = ""
    note: str = ""
    holdout: Optional[float] = None
    samples: Dict[str, List[Any]] = field(default_factory=dict)

    def add_samples(self, samples: Dict[str, List[Any]], sign: float) -> None:
        """Take a judgement's raw numbers over; those of a reworked turn stay beside them."""
        before, now = self.samples, turned(samples, sign)
        if before:
            now["incumbent"] = before["incumbent"] + now["incumbent"]
            now["reworked"] = before.get("reworked", []) + before["candidate"]
        self.samples = now


class MetricBroken(ScalarLoopError):
    """The metric fails on a tree that it measured before: the fault isn't the candidate's."""

    def __init__(self, tree: str, found: Measurement):
        code = found.reason.value if found.reason else "no number"
        super().__init__(f"metric: fails on {tree}, which it measured before ({code}: "
                         f"{found.detail}); the metric or what it reads has changed")


class CleanroomTrial:
    """The runs that a judgement asks for, made in the cleanrooms; lower is better inside."""

    def __init__(self, run: "Run", work: Work, candidate: Snapshot):
        self.run, self.work, self.tree = run, work, candidate
        self.gauge, self.sign = metric_gauge(run.config), run.config.sign
        self.failed: Optional[Measurement] = None
        self.pairs = 0

    def candidate(self) -> Optional[float]:
        """Return one fresh run of the candidate, None if it failed."""
        self.run.terminal.doing(f"#{self.work.n} measuring")
        found = self.run.measure(self.gauge, self.tree, self.work.metric_seconds)
        return self._rival(found)

    def _rival(self, found: Measurement) -> Optional[float]:
        if found.value is None:
            self.failed = found
            return None
        return self.sign * found.value + 0.0

    def incumbent(self) -> float:
        """Return one fresh run of the incumbent; raise MetricBroken when it fails twice."""
        for _ in range(2):
            found = self.run.measure(self.gauge, self.run.incumbent, self.work.metric_seconds)
            if found.value is not None:
                return self.sign * found.value + 0.0
        raise MetricBroken("the incumbent", found)

    def pair(self) -> Tuple[float, Optional[float]]:
        """Return a fresh run of both; a pair whose incumbent fails is void and run once more."""
        self.pairs += 1
        self.run.terminal.doing(f"#{self.work.n} comparing with the incumbent, pair {self.pairs}")
        for _ in range(2):
            standing, rival = self.run.measure_pair(self.gauge, self.run.incumbent, self.tree,
                                                    self.work.metric_seconds)
            if standing.value is not None:
                return self.sign * standing.value + 0.0, self._rival(rival)
        raise MetricBroken("the incumbent", standing)

    def guards_hold(self) -> bool:
        """Run every guard on the candidate; remember the first that does not hold."""
        for guard in self.run.config.guards:
            self.run.terminal.doing(f"#{self.work.n} guard {guard.name}")
            gauge = guard_gauge(guard)
            if gauge.numeric:
                failed = self._metric_guard(guard, gauge)
            else:
                found = self.run.measure(gauge, self.tree)
                failed = found if found.reason else None
            if failed:
                self.failed = replace(failed, detail=f"{guard.name}: {failed.detail}".rstrip(": "))
                return False
        return True

    def _metric_guard(self, guard: GuardOptions, gauge: Gauge) -> Optional[Measurement]:
        """Return why a metric-valued guard fails: against the base, so that losses can't add up."""
        sign = -1.0 if guard.direction == "maximize" else 1.0
        duel, found = self.run.fight_worse(gauge, sign, self.run.base, self.tree,
                                           self.run.state.guard_samples[guard.name],
                                           guard.tolerance or 0.0, self.out_of_time)
        if duel.outcome is Reason.NOISE_FAILED:
            return replace(found, reason=found.reason if found.integrity else Reason.GUARD_EXIT)
        if duel.outcome is Reason.BETTER:
            return Measurement(None, Reason.GUARD_WORSE, f"worse by more than "
                               f"{format_number(guard.tolerance)} ({len(duel.pairs)} pairs)")
        return None

    def announce(self, event: Dict[str, Any]) -> None:
        """Write a duel's terms, or the end of exact mode, to the ledger before acting on it."""
        found = {name: value for name, value in event.items() if name not in ("type", "samples")}
        if "samples" in event:
            found["samples"] = turned(event["samples"], self.sign)
        self.run.record(event["type"], tree=self.tree.tree, n=self.work.n, **found)

    def out_of_time(self) -> bool:
        """Tell whether the budget leaves room only for the closing comparison."""
        budget = self.run.config.loop.budget
        return budget is not None and self.run.elapsed() + self.run.closing_reserve() >= budget


def fresh_seed() -> int:
    """Return a seed that nobody could have known before."""
    return int.from_bytes(os.urandom(4), "big") >> 1


@dataclass
class Run:
    """Everything that a running loop holds. The loop itself is `run_loop` and `iterate` below."""

    config: Config
    user: UserRepository
    scope: Scope
    store: Store
    tmp: str
    folder: str                         # the state folder
    watch: Watch
    terminal: Terminal
    isolation: "Isolation"
    lfs: FrozenSet[bytes]
    base: Snapshot
    incumbent: Snapshot
    outside: OutsideSeal
    agent: List[str]
    state: State = field(default_factory=State)
    ledger: Optional[Ledger] = None
    rooms: List[Cleanroom] = field(default_factory=list)
    shared: Layer = field(default_factory=Layer)
    made: Layer = field(default_factory=Layer)
    hidden: FrozenSet[bytes] = frozenset()
    metric_log: str = ""
    anchor: str = ""                    # the ledger's commit in the user's repository
    elapsed_before: float = 0.0
    started: float = field(default_factory=time.monotonic)
    workspace: Any = None
    git_layer: Any = None
    work: Optional[Work] = None
    packs: List[str] = field(default_factory=list)      # of the last keep, not yet handed over
    handed: Optional[str] = None        # where this session left the branch
    offered: Optional[Tuple[Manifest, List[str]]] = None    # files in scope of that workspace
    seen: Dict[str, Snapshot] = field(default_factory=dict)     # trees without the holdout's files

    def elapsed(self) -> float:
        """Return the seconds that the run took so far, over all sessions."""
        return self.elapsed_before + time.monotonic() - self.started

    def fence_of(self, writable: Sequence[str], key: str) -> Fence:
        """Return what a program may write, read and reach; only the holdout sees its files."""
        hidden = self.isolation.secrets if key != "holdout" else self.isolation.state
        network = key in ("agent", "setup") or self.config.metric.network == "allow"
        if self.isolation.level == "external" and key not in ("agent", "canary"):
            return Fence("portable")        # the user's runner isolates it
        try:
            return replace(self.isolation.fence, writable=tuple(writable), hidden=tuple(hidden),
                           network=network)
        except ValueError as error:
            raise FenceFailed(f"isolation: {printable(str(error))}") from None

    def census_rules(self) -> CensusRules:
        """Return what the census of the workspace goes by."""
        loop = self.config.loop
        memory = (self.scope.prefix + loop.memory.encode(),) if loop.memory else ()
        skeleton = os.path.join(self.tmp, "ignore")
        return CensusRules(self.scope, loop.max_change, loop.max_files,
                           functools.partial(self.store.ignored, skeleton),
                           (b".git", *memory), self.hidden)

    def closing_reserve(self) -> float:
        """Return the seconds that the closing comparison will need."""
        if self.state.noise.exact or not self.state.keeps or not self.state.noise.metric_seconds:
            return 0.0
        return 10 * median(self.state.noise.metric_seconds)

    def record(self, kind: str, **fields: Any) -> Record:
        """Append to the ledger, then take the record into the state: the one way it changes."""
        return self.record_all((kind, fields))[0]

    def record_all(self, *news: Tuple[str, Record]) -> List[Record]:
        """Append records that only make sense together."""
        if self.ledger is None:
            raise ScalarLoopError("ledger: not open")
        records = self.ledger.append(*news)
        for record in records:
            self.state.advance(record)
        return records

    def log_metric(self, key: str, capture: Capture, end: str) -> None:
        """Append a run's output to the iteration's metric.log, which stays below 3 MB."""
        if not self.metric_log:
            return
        size = os.path.getsize(self.metric_log) if os.path.exists(self.metric_log) else 0
        log = capture.log()
        most = 2 * LOG_CAP + 1000 if not size else 20_000
        if size < 5 * LOG_CAP // 2:
            with open(self.metric_log, "ab") as stream:
                stream.write(b"=== %s: %s\n%s\n" % (key.encode(), end.encode(), log[-most:]))

    def visible(self, snapshot: Snapshot, key: str) -> Snapshot:
        """Return what a program may see of a tree: the holdout's files only in the holdout."""
        if not self.hidden or key == "holdout":
            return snapshot
        if snapshot.tree not in self.seen:
            shown = {path: entry for path, entry in snapshot.manifest.items()
                     if path not in self.hidden}
            tree = self.store.tree_without(snapshot.tree, sorted(self.hidden),
                                           os.path.join(self.tmp, "index"))
            while len(self.seen) > 2:
                self.seen.pop(next(iter(self.seen)))
            self.seen[snapshot.tree] = Snapshot(tree, shown)
        return self.seen[snapshot.tree]

    def measure(self, gauge: Gauge, snapshot: Snapshot, seconds: Optional[List[float]] = None,
                room: int = 0, seed: Optional[int] = None) -> Measurement:
        """Measure a tree in one of the two cleanrooms; the second is made when first asked for."""
        while len(self.rooms) <= room:
            self.rooms.append(make_cleanroom(self, len(self.rooms)))
        place = self.rooms[room]
        shown = self.visible(snapshot, gauge.key)
        place.use_git(self.visible(snapshot, "metric").tree)    # a holdout's would stay in there
        found = place.measure(gauge, shown.manifest, fresh_seed() if seed is None else seed)
        if seconds is not None and found.value is not None:
            seconds.append(round(found.seconds, 4))
        elif seconds is not None and self.work:     # a timeout is no run's usual cost
            self.work.failed_seconds.append(round(found.seconds, 4))
        if self.work and found.others and self.work.candidate is snapshot and gauge.key == "metric":
            self.work.others = dict(found.others)
        return found

    def measure_pair(self, gauge: Gauge, first: Snapshot, second: Snapshot,
                     seconds: Optional[List[float]] = None) -> Tuple[Measurement, Measurement]:
        """Measure two trees under one fresh seed, coins deciding order and room."""
        coins, seed = os.urandom(1)[0], fresh_seed()
        runs = [(first, coins & 1), (second, 1 - (coins & 1))]
        found = [self.measure(gauge, snapshot, seconds, room, seed)
                 for snapshot, room in (reversed(runs) if coins & 2 else runs)]
        return (found[1], found[0]) if coins & 2 else (found[0], found[1])

    def fight_worse(self, gauge: Gauge, sign: float, base: Snapshot, rival: Snapshot,
                    samples: Sequence[float], tolerance: float, out_of_time: Callable[[], bool]
                    ) -> Tuple[Duel, Measurement]:
        """Ask whether a tree is worse than the base; return the duel and the rival's last run."""
        last: List[Measurement] = []

        def pair() -> Tuple[float, Optional[float]]:
            standing, other = self.measure_pair(gauge, base, rival)
            if standing.value is None:
                raise MetricBroken("the baseline", standing)
            last[:] = [other]
            return sign * standing.value, None if other.value is None else sign * other.value

        duel = worse_duel(pair, [sign * value for value in samples], tolerance, out_of_time)
        return duel, last[0] if last else Measurement(None)


def make_tree(run: Run, name: str, layer: Layer, kept: Sequence[bytes] = ()) -> Tree:
    """Return a tree in the temporary folder, not yet written."""
    return Tree(os.path.join(run.tmp, name), run.store, layer, kept,
                os.path.join(run.folder, "lfs"))


def make_cleanroom(run: Run, number: int) -> Cleanroom:
    """Make a cleanroom; with `produce` it has a second tree for the scorer."""
    config = run.config
    kept = [run.scope.prefix + path.encode() for path in config.metric.cache]
    layer = run.shared | run.made
    tree = make_tree(run, f"room-{number}", layer, kept)
    scorer = make_tree(run, f"scorer-{number}", layer) if config.metric.produce else None
    first = run.rooms[0].setting if run.rooms else None
    setting = first or MetricSetting(
        config, run.scope, run.scope.prefix, metric_environment(config), run.fence_of, run.outside,
        run.watch, run.isolation.sealed, {},
        {os.path.dirname(path) for path in run.base.manifest}, run.log_metric)
    git_layer = GitLayer(run.store, os.path.join(run.tmp, f"git-{number}")) \
        if config.metric.git else None
    return Cleanroom(setting, tree, scorer, run.tmp, git_layer)


def metric_environment(config: Config) -> Dict[str, str]:
    """Return the metric's environment: an allow-list, nothing of the agent's secrets."""
    return {**inherited((*METRIC_VARIABLES, *config.metric.env)), "TERM": "dumb",
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}


def run_loop(run: Run) -> str:
    """Propose, take the census, measure, decide, record, keep or drop; until a rule says stop."""
    run.terminal.suffix = lambda: (f"best {format_number(run.state.best)}, "
                                   f"{run.config.loop.iterations - run.state.iterations} left")
    while True:
        run.watch.check()
        reason = stop_reason(run.config, run.state, run.elapsed())
        if reason:
            return reason
        try:
            iterate(run)
        except (FenceFailed, OSError) as error:     # the machine's fault: no data, one more try
            run.watch.check()
            if run.work is None or run.work.n != run.state.iterations + 1:
                raise       # its verdict is recorded: the fault came after it
            void(run, Reason.MACHINE, str(error))


def void(run: Run, reason: Reason, detail: str) -> None:
    """Record an iteration that is not data: the machine's fault or our own."""
    work = run.work or Work(run.state.iterations + 1, "")
    if work.n != run.state.iterations + 1:
        return
    settle(run, work, Known(), Decision(VERDICT_OF[reason], reason, detail))


def iterate(run: Run) -> None:
    """Run one iteration: a turn, up to `rework` more to mend a crash or a guard, one verdict."""
    work = begin_iteration(run)
    rework = ""
    for turn in range(1, run.config.agent.rework + 2):
        ended, gave_up = propose(run, work, turn, rework)
        facts = consider(run, work, ended, gave_up)
        mended, work.known = facts is not work.known, facts
        decision = decide(facts)
        if decision.verdict not in REWORKABLE or not mended or too_dear(run.config, run.state):
            break
        rework = format_rework(decision, facts)
    settle(run, work, facts, decision)


def begin_iteration(run: Run) -> Work:
    """Make the workspace pristine and the iteration's folder."""
    n = run.state.iterations + 1
    folder = os.path.join(run.folder, "iterations", f"{n:04d}")
    run.work = Work(n, folder)      # before anything can fail: a void names the one under way
    remove_tree(folder)
    os.makedirs(folder, 0o700)
    run.metric_log = os.path.join(folder, "metric.log")
    run.terminal.doing(f"#{n} preparing")
    prepare_workspace(run)
    return run.work


def prepare_workspace(run: Run) -> None:
    """Bring the workspace to the incumbent, with a throwaway .git and the agent's memory."""
    tree: Tree = run.workspace
    shown = run.visible(run.incumbent, "workspace")
    layer = run.shared | run.git_layer.update(shown.tree)
    memory = os.path.join(run.folder, "memory")
    if run.config.loop.memory and os.path.exists(memory):
        path = run.scope.prefix + run.config.loop.memory.encode()
        source = os.fsencode(memory)
        layer.entries[path] = entry_of(source, os.lstat(source))
        layer.sources[path] = source
    tree.set_layer(layer)
    tree.dirty = tree.dirty or not run.isolation.sealed
    tree.make_pristine(shown.manifest)


def propose(run: Run, work: Work, turn: int, rework: str) -> Tuple[Ended, bool]:
    """Let the agent work in the workspace; return how it ended and whether it gave up."""
    config, state = run.config, run.state
    prompt = build_prompt(config, state, read_goal(run), rework)
    write_plain(os.path.join(work.folder, "prompt.txt"), prompt.encode("utf-8"), append=turn > 1)
    digest = hashlib.sha256(prompt.encode("utf-8")).hexdigest()
    work.prompt_digest = work.prompt_digest or digest
    work.turns = turn
    run.record("turn", n=work.n, turn=turn, base=state.tip, prompt_sha256=digest)
    run.terminal.doing(f"#{work.n} agent" + (f", rework {turn - 1}" if turn > 1 else ""))
    capture = Capture(GIVE_UP_LINE)
    root = os.fsdecode(run.workspace.root)
    cwd = os.path.join(root, os.fsdecode(run.scope.prefix))
    files = files_in_scope(run)
    seed = int.from_bytes(hashlib.sha256(b"%d %d %d" % (config.loop.seed, work.n, turn))
                          .digest()[:4], "big") >> 1
    with private_folder(run.tmp) as scratch:
        env = agent_environment(config, work.n, turn, seed, files, scratch)
        fence = run.fence_of([root, scratch, *map(os.path.expanduser, config.agent.writable)],
                             "agent")
        run.workspace.dirty = True
        ended = run_fenced(fence, run.agent, cwd=cwd, env=env, sink=capture, watch=run.watch,
                           stdin=prompt.encode("utf-8"), timeout=config.agent.timeout)
    capture.finish()
    name = "agent.log" if turn == 1 else f"agent.{turn}.log"
    write_plain(os.path.join(work.folder, name), capture.log())
    work.agent_seconds.append(round(ended.seconds, 4))
    work.log_digest = capture.digest
    work.note = last_words(capture.log())
    run.watch.check()
    return ended, bool(capture.matches)


def files_in_scope(run: Run) -> List[str]:
    """Return the files of the workspace that the agent may change, relative to loop.ini's folder.
    """
    tree: Tree = run.workspace
    if run.offered is None or run.offered[0] is not tree.expected:
        private = run.census_rules().private
        run.offered = tree.expected, [
            decoded(path[len(run.scope.prefix):]) for path, entry in tree.expected.items()
            if entry.mode in (PLAIN, EXECUTABLE) and (run.scope.holds(path) or path in private)]
    return run.offered[1]


def last_words(log: bytes) -> str:
    """Return the last line of an agent's log, for the next prompt to quote; never acted on."""
    lines = [line.strip() for line in log[-4000:].decode("utf-8", "replace").splitlines()]
    return printable(next((line for line in reversed(lines) if line), ""), 160)


def read_goal(run: Run) -> str:
    """Return the goal, or the sealed program file of the base, word for word."""
    if not run.config.loop.program:
        return run.config.loop.goal
    entry = run.base.manifest[run.scope.prefix + run.config.loop.program.encode()]
    return run.store.repo.git("cat-file", "blob", entry.oid).decode("utf-8", "replace")


def write_skeleton(run: Run) -> None:
    """Lay out the base's .gitignore files alone, for its ignore rules."""
    root = os.path.join(run.tmp, "ignore")
    remove_tree(root)
    os.makedirs(root)
    for path, entry in run.base.manifest.items():
        if path.split(b"/")[-1] == b".gitignore" and entry.mode in (PLAIN, EXECUTABLE):
            full = os.path.join(os.fsencode(root), path)
            os.makedirs(os.path.dirname(full), exist_ok=True)
            with open(full, "wb") as stream:
                stream.write(run.store.repo.git("cat-file", "blob", entry.oid))


def consider(run: Run, work: Work, ended: Ended, gave_up: bool) -> Known:
    """Find out what is to be known of a turn's result, as far as it matters."""
    save_memory(run)
    if gave_up:
        return Known(gave_up=True, ended=ended)
    if not run.isolation.sealed:
        write_skeleton(run)     # no fence: the agent may have been in there
    proposal = take_census(run.workspace, run.census_rules())
    facts = Known(ended=ended, proposal=proposal)
    if proposal.violation:
        return facts
    candidate = make_candidate(run, proposal.edits, run.incumbent, run.state.tip)
    if candidate.tree == run.incumbent.tree:
        return replace(facts, unchanged=True)
    if work.known and work.candidate and work.candidate.tree == candidate.tree:
        return work.known           # a rework that mended nothing: what was found stands
    work.candidate = candidate
    run.store.diff(run.incumbent.tree, candidate.tree, bounded_file(work.folder, "diff.patch"))
    if candidate.tree in run.state.tried:
        return replace(facts, repeated=True)
    trial = CleanroomTrial(run, work, candidate)
    noise = run.state.noise._replace(
        reference=turned(run.state.noise.reference, run.config.sign))
    judgement = judge(noise, noise_rules(run.config), trial)
    work.add_samples(judgement.samples, run.config.sign)
    facts = replace(facts, judgement=judgement, failed=trial.failed)
    gauge = holdout_gauge(run.config)
    if gauge and decide(facts).verdict is Verdict.KEEP:
        run.terminal.doing(f"#{work.n} holdout")
        found = run.measure(gauge, candidate)
        work.holdout = found.value
        if found.integrity:
            facts = replace(facts, failed=found)
    return facts


def noise_rules(config: Config) -> NoiseRules:
    """Return what loop.ini says about noise."""
    metric = config.metric
    risk = None if metric.confidence is None else round(1 - metric.confidence, 12)
    return NoiseRules(metric.min_gain, metric.max_gain, risk, metric.samples, config.sign)


def make_candidate(run: Run, edits: Dict[bytes, Edit], over: Snapshot, commit: str) -> Snapshot:
    """Write edits over a tree that stands in the store as `commit`; return the candidate."""
    if not edits:
        return over
    return Snapshot(run.store.write_tree(commit, edits),
                    apply_edits(over.manifest, edits, run.user.algorithm))


def bounded_file(folder: str, name: str) -> Callable[[bytes], None]:
    """Return a sink that writes at most LOG_CAP bytes to a file."""
    path = os.path.join(folder, name)
    left = [LOG_CAP]
    write_plain(path, b"")

    def sink(chunk: bytes) -> None:
        if left[0] > 0:
            write_plain(path, chunk[:left[0]], append=True)
            left[0] -= len(chunk)

    return sink


def save_memory(run: Run) -> None:
    """Carry the agent's memory file over to its next turns, whatever the verdict."""
    if not run.config.loop.memory:
        return
    path = os.path.join(run.workspace.root, run.scope.prefix, run.config.loop.memory.encode())
    try:
        with open_regular(path) as stream:
            write_file(os.path.join(run.folder, "memory"), stream.read(1 << 18))
    except OSError:
        pass    # it has none, or made it something that is not a file: the old one stands


def format_rework(decision: Decision, facts: Known) -> str:
    """Say in a prompt what went wrong; the program's output is quoted, not trusted."""
    text = f"the verdict was {decision.verdict.value} ({decision.reason.value})"
    text += f", {printable(decision.detail, 200)}" if decision.detail else ""
    tail = facts.failed.tail if facts.failed else ""
    return text + (f". The end of the output:\n{fenced_text(tail)}" if tail else ".")


def settle(run: Run, work: Work, facts: Known, decision: Decision) -> None:
    """Record the verdict, then act on it: the branch moves only after the ledger says so."""
    state, judgement = run.state, facts.judgement
    keep = decision.verdict is Verdict.KEEP and work.candidate is not None and judgement is not None
    value = None if judgement is None or judgement.value is None or facts.failed \
        else judgement.value * run.config.sign + 0.0
    best = value if keep else state.best
    commit = commit_keep(run, work, value) if keep else None
    before, base = state.best, state.tip
    record = run.record(
        "iteration", n=work.n, verdict=decision.verdict.value, reason=decision.reason.value,
        detail=printable(decision.detail, 300), value=value, best=best, commit=commit, base=base,
        tree=work.candidate.tree if work.candidate else None,
        files=list(facts.proposal.files) if facts.proposal else [],
        dropped=facts.proposal.dropped if facts.proposal else 0,
        samples=work.samples,
        evidence=judgement.evidence if judgement else "", holdout=work.holdout,
        turns=work.turns, agent_seconds=work.agent_seconds, metric_seconds=work.metric_seconds,
        failed_seconds=work.failed_seconds, others=work.others,
        agent_exit=facts.ended.describe() if facts.ended else "", note=work.note,
        prompt_sha256=work.prompt_digest, log_sha256=work.log_digest,
        elapsed=round(run.elapsed(), 3))
    run.terminal.say(format_iteration(record, before))
    if keep and work.candidate:
        run.incumbent = work.candidate
        publish(run)


def commit_keep(run: Run, work: Work, value: Optional[float]) -> str:
    """Write the kept commit; its trailer names the ledger's head, so that no tail can be cut."""
    state, candidate = run.state, work.candidate
    if candidate is None or run.ledger is None:
        raise ScalarLoopError("keep: there is no candidate")
    before, after = run.incumbent.manifest, candidate.manifest
    measured = {path: Listed(entry.mode, entry.oid) for path, entry in after.items()
                if before.get(path) != entry}
    measured.update((path, Listed(0, "0" * len(candidate.tree))) for path in before.keys()
                    - after.keys())
    if run.store.list_changes(run.incumbent.tree, candidate.tree) != measured:
        raise StoreDamaged("store: the candidate's tree is not what was measured")
    name, before_it = state.metric_name, standing_value(work.samples, state.best)
    message = (
        f"#{work.n} {name} {format_number(before_it)} -> {format_number(value)} "
        f"({format_change(before_it, value)})\n\n"
        f"Scalar-Loop-Iteration: {work.n}\nScalar-Loop-Metric: {name}={exact_number(value)}\n"
        f"Scalar-Loop-Base: {state.base}\n"
        f"Scalar-Loop-Ledger: {run.ledger.records - 1} {run.ledger.head}\n")
    commit = run.store.commit(candidate.tree, state.tip, message, int(time.time()))
    run.packs.append(pack_new(run.store, commit, state.tip))    # on disk before the ledger names it
    return commit


def publish(run: Run) -> None:
    """Hand the kept commits and the ledger back to the user's repository; safe to repeat.

    The branch is accepted where it is absent, at the base, or at one of this run's tips; elsewhere
    it is somebody else's: RecordBroken, and it stays where it is.
    """
    if run.ledger is None:
        return
    run.ledger.check()
    try:
        hand_back(run, run.ledger)
    except GitFailed as error:
        if error.git_dir != run.user.repo.git_dir:
            raise       # the store's own
        raise ScalarLoopError(f"git: what was kept can't be handed to {run.user.top} ({error}); it "
                              "is safe in the store: mend that and start again") from None


def hand_back(run: Run, ledger: Ledger) -> None:
    """Do it: nothing that is somebody else's is moved, nothing is named before it is there."""
    state, branch = run.state, f"refs/heads/{run.config.loop.branch}"
    ledger_ref = anchor_ref(run.config)
    found = run.user.repo.refs([branch, ledger_ref], busy="checked-out")
    at = found.get(branch, "")
    if found.get(ledger_ref, "") != run.anchor:
        raise RecordBroken(f"{ledger_ref} is no longer where this run left it; it was left alone")
    tips = run_tips(state)
    if at == "checked-out" and run.handed == state.tip:
        at = state.tip      # nothing of it is to be moved
    if at == "checked-out":
        raise RecordBroken(f"branch {run.config.loop.branch} is checked out, so it was left alone; "
                           "switch to another branch and start again")
    if at and at not in tips:
        raise RecordBroken(f"branch {run.config.loop.branch} is no longer where this run left it "
                           f"(at {at[:12]}); it was left alone. Move it back to {tips[-1][:12]}, "
                           "or start a new run with --new")
    anchor, pack = run.store.write_anchor(
        ledger.path, f"seq {ledger.records - 1} hash {ledger.head}\n", run.user, state.base,
        run.anchor)
    moves = [(ledger_ref, anchor, run.anchor)]
    if state.keeps and at != state.tip:
        moves.append((branch, state.tip, at))
        if at != run.handed:        # not what this session left: it may lack more than a keep
            run.packs = [pack_new(run.store, state.tip, state.base)]
    for path in [*run.packs, pack]:
        hand_over(run.user, path)
    remove_tree(run.store.staging)
    move_refs(run.user, moves)
    run.anchor, run.packs, run.handed = anchor, [], state.tip if state.keeps else ""


# ══ set-up ═══════════════════════════════════════════════════════════════════════════════════════

@dataclass(frozen=True)
class Options:
    """What the command line adds to loop.ini."""

    more: int = 0
    new: bool = False
    replay: bool = False


def look_around(gate: Gate, config: Config, user: UserRepository, tips: Sequence[str],
                commit: str, fresh: bool) -> Tuple[Scope, List[str], Dict[bytes, Listed]]:
    """Check everything that can be looked at without running the metric."""
    scope = make_scope(config, user.prefix)
    listed = Store(user.repo).list_tree(commit)
    if fresh:
        check_work_tree(gate, config, user)
        check_scope(gate, config, user, scope, listed)
    check_commands(gate, config, user, listed)
    check_places(gate, config, user)
    check_branch(gate, config, user, tips)
    argv: List[str] = []
    try:
        argv = resolve_agent(config)
        gate.ok("agent", printable(shlex.join(argv), 120))
    except Refused as error:
        gate.fail("agent", str(error).partition(": ")[2])
    return scope, argv, listed


class Snapshots(NamedTuple):
    """The trees that a run begins with; `lfs` are the pointers whose content counts."""

    lfs: FrozenSet[bytes]
    base: Snapshot
    incumbent: Snapshot


def take_snapshots(store: Store, user: UserRepository, folder: str, base: str, tip: str
                   ) -> Snapshots:
    """Read and hash the base and the incumbent; raises StoreDamaged when an object isn't itself."""
    lfs = lfs_pointers(user, store.list_tree(base), os.path.join(folder, "lfs"))
    first, *last = (Snapshot(store.repo.line("rev-parse", f"{commit}^{{tree}}"),
                             take_manifest(store, commit, lfs))
                    for commit in dict.fromkeys((base, tip)))
    return Snapshots(lfs, first, last[0] if last else first)


def open_run(gate: Gate, config: Config, user: UserRepository, store: Store, folder: str, tmp: str,
             watch: Watch, terminal: Terminal, scope: Scope, argv: List[str], trees: Snapshots
             ) -> Run:
    """Take the seals, witness the isolation, and make the trees' layers."""
    manifest = trees.base.manifest
    listed = {path: Listed(entry.mode, entry.oid) for path, entry in manifest.items()}
    outside = OutsideSeal(sealed_paths(config, user, scope, listed))
    hidden = hidden_paths(config, scope, manifest)
    isolation = choose_isolation(config, tmp, folder, secret_paths(config, user, hidden), watch)
    run = Run(config, user, scope, store, tmp, folder, watch, terminal, isolation, trees.lfs,
              trees.base, trees.incumbent, outside, argv, hidden=hidden)
    sealed = sum(not scope.holds(path) for path in manifest)
    gate.ok("seal", f"{counted(sealed, 'tracked file')}, {len(outside.entries)} outside the tree")
    gate.rows += [Condition("isolation", *row) for row in isolation_rows(config, run.isolation)]
    run.shared = share_layer(run)
    run.workspace = make_tree(run, "workspace", Layer())
    run.git_layer = GitLayer(store, os.path.join(tmp, "git"))
    write_skeleton(run)
    return run


def hidden_paths(config: Config, scope: Scope, manifest: Manifest) -> FrozenSet[bytes]:
    """Return the tracked paths that only the holdout may read: `files` names them or their folder.

    Refuses a word that names nothing: a slip would leave the holdout open.
    """
    found: Set[bytes] = set()
    for word in config.holdout.files:
        only = replace(scope, sealed=(split_glob(word),))
        named = [] if is_outside(word) else [path for path in manifest if only.seals(path)]
        if not named and not os.path.lexists(outside_path(config, word)):
            raise Refused(f"holdout: {printable(word)} names nothing; correct [holdout] files")
        found.update(named)
    return frozenset(found)


def secret_paths(config: Config, user: UserRepository, hidden: FrozenSet[bytes]) -> List[str]:
    """Return where the holdout's files can be read on this machine, the user's objects included."""
    found = [outside_path(config, word) for word in config.holdout.files]
    if hidden:
        found += [os.path.join(user.top, os.fsdecode(path)) for path in sorted(hidden)]
        found.append(user.objects)
        with contextlib.suppress(OSError):
            with open(os.path.join(user.objects, "info", "alternates"), "rb") as stream:
                found += [os.path.join(user.objects, os.fsdecode(line))
                          for line in stream.read().splitlines() if line]
    return [path for path in dict.fromkeys(found) if os.path.exists(path)]


def share_layer(run: Run) -> Layer:
    """Copy the shared folders of the user's work tree; they are sealed with everything else."""
    layer = Layer()
    for name in run.config.loop.share:
        root = os.fsencode(run.user.top)
        below = run.scope.prefix + name.encode()
        rows = [(below, os.lstat(os.path.join(root, below))), *scan(root, below)]
        layer |= take_layer(root, os.fsencode(os.path.join(run.tmp, "share")), rows)
    return layer


def run_setup(run: Run) -> None:
    """Run `setup` once, on the base; what it leaves belongs to the pristine tree from then on."""
    setup = run.config.metric.setup
    if not setup:
        return
    room = make_cleanroom(run, 0)
    run.terminal.doing("setup")
    gauge = Gauge("setup", setup, max(run.config.metric.timeout, 3600.0), numeric=False)
    room.learning = True
    found = room.measure(gauge, run.base.manifest, 0)
    if found.reason:
        raise Refused(f"setup: {found.reason.value}: {found.detail}; it must exit 0 and leave "
                      f"tracked files alone. The end of its output:\n{fenced_text(found.tail)}")
    rows = [(change.path, change.status) for change in room.tree.found
            if change.kind in ("created", "folder_created") and change.status]
    run.made = take_layer(room.tree.root, os.fsencode(os.path.join(run.tmp, "setup")), rows)
    run.made.loose = set(run.made.entries)
    remove_tree(os.fsdecode(room.tree.root))


@dataclass(frozen=True)
class Baseline:
    """What the base measures: all samples, guards' samples, the holdout, and the runs' seconds."""

    samples: List[float]
    name: str
    seconds: List[float]
    guards: Dict[str, List[float]]
    holdout: Optional[float]

    @property
    def value(self) -> float:
        """Return the number that stands for the baseline."""
        return median(self.samples)


def take_baseline(run: Run, gate: Gate) -> Optional[Baseline]:
    """Measure the base 3 times, 5 if the runs differ; then its guards, holdout and canary."""
    run_setup(run)
    room = make_cleanroom(run, 0)
    run.rooms = [room]
    room.learning = True
    seconds: List[float] = []
    gauge = metric_gauge(run.config)
    samples, name = sample(run, gauge, gate, "metric", seconds)
    if not samples:
        return None
    exact = len(set(samples)) == 1
    spread = f", the same in {len(samples)} runs" if exact else \
        f" in the middle of {len(samples)} runs, from {format_number(min(samples))} to " \
        f"{format_number(max(samples))}"
    gate.ok("metric", f"{name} = {format_number(median(samples))}{spread}; "
            f"{format_seconds(median(seconds))} each")
    guards: Dict[str, List[float]] = {}
    for guard in run.config.guards:
        run.terminal.doing(f"baseline: guard {guard.name}")
        if guard.pattern:
            guards[guard.name], _ = sample(run, guard_gauge(guard), gate, f"guard {guard.name}", [])
        else:
            found = run.measure(guard_gauge(guard), run.base)
            if found.reason:
                gate.fail("guard", f"{guard.name}: does not hold on the baseline: "
                          + describe_failure(found))
                continue
        gate.ok("guard", f"{guard.name} holds on the baseline")
    metric = run.config.metric
    if metric.cache:
        gate.notice("metric", "cache: what one candidate leaves in " + " ".join(metric.cache)
                    + " is there when the next one is measured")
    if metric.samples and metric.samples < 12 and not exact:
        gate.notice("metric", f"samples = {metric.samples} lets few duels be won: from 12 up is "
                              f"better")
    if median(samples) == 0 and any(gain and gain.percent for gain in (metric.min_gain,
                                                                       metric.max_gain)):
        gate.notice("metric", "the baseline is 0, so a gain in percent means nothing: write an "
                    "absolute one")
    holdout = holdout_baseline(run, gate)
    room.learning = False
    if run.config.metric.canary:
        check_canary(run, gate, samples)
    return Baseline(samples, name, seconds, guards, holdout)


def sample(run: Run, gauge: Gauge, gate: Gate, label: str, seconds: List[float]
           ) -> Tuple[List[float], str]:
    """Measure the base until its noise is known; a failure goes to the gate, nothing back."""
    samples: List[float] = []
    name = ""
    while not baseline_is_complete(samples):
        run.terminal.doing(f"baseline: {label}, run {len(samples) + 1}")
        found = run.measure(gauge, run.base, seconds)
        if found.value is None:
            section, _, name = label.partition(" ")
            gate.fail(section, (f"{name}: " if name else "") + describe_failure(found))
            return [], ""
        samples.append(found.value)
        name = found.name
    return samples, name


def describe_failure(found: Measurement) -> str:
    """Say why a run on the baseline yields nothing, with its remedy and the end of its output."""
    code = found.reason.value if found.reason else "no number"
    remedies = {
        Reason.SEAL_TOUCHED: f"writes to {found.detail}, which is tracked or sealed ({code}); let "
                             "it write to TMPDIR or to untracked paths",
        **dict.fromkeys((Reason.METRIC_TIMEOUT, Reason.GUARD_TIMEOUT), f"{found.detail} ({code}); "
                        "raise its timeout, or run it by hand in a fresh clone"),
        Reason.METRIC_OUT_OF_BOUNDS: f"{found.detail} ({code}); correct the metric or its bounds"}
    text = remedies.get(found.reason or Reason.MACHINE, f"{found.detail} ({code}); run it by hand "
                                                        "in a fresh clone and mend it")
    return text + (f"\n{fenced_text(found.tail, 1000)}" if found.tail.strip() else "")


def holdout_baseline(run: Run, gate: Gate) -> Optional[float]:
    """Measure the holdout on the base."""
    gauge = holdout_gauge(run.config)
    if not gauge:
        return None
    run.terminal.doing("baseline: holdout")
    found = run.measure(gauge, run.base)
    if found.value is None:
        gate.fail("holdout", describe_failure(found))
        return None
    gate.ok("holdout", f"{found.name} = {format_number(found.value)}, shown to no agent")
    return found.value


def check_canary(run: Run, gate: Gate, samples: Sequence[float]) -> None:
    """Refuse a metric that does not see a change which must make it worse."""
    config = run.config
    scratch = make_tree(run, "canary", run.shared | run.made)
    scratch.make_pristine(run.base.manifest)
    cwd = os.path.join(os.fsdecode(scratch.root), os.fsdecode(run.scope.prefix))
    word = os.path.join(config.folder, config.metric.canary[0])
    patch = len(config.metric.canary) == 1 and word.endswith((".patch", ".diff"))
    if patch and os.path.isfile(word):
        try:
            replace(run.store.repo, git_dir="", cwd=cwd).git("apply", word)
        except GitFailed as error:
            gate.fail("canary", f"the patch does not apply ({error}); make it anew")
            return
    else:
        argv = resolve_command(config.metric.canary, cwd)
        capture = Capture()
        ended = run_fenced(run.fence_of([os.fsdecode(scratch.root), run.tmp], "canary"), argv,
                           cwd=cwd, env=metric_environment(config), sink=capture, watch=run.watch,
                           timeout=config.metric.timeout)
        if ended.status:
            missing = "" if os.access(argv[0], os.X_OK) else \
                f"{config.metric.canary[0]} is neither a patch beside loop.ini nor a program: "
            gate.fail("canary", f"{missing}its command failed ({ended.describe()}); mend it")
            return
    changes = [change for change in scratch.inspect() if not change.kind.startswith("folder")
               and change.path not in scratch.layer.entries]
    if not changes:
        gate.fail("canary", "it changes nothing in the tree; choose one that makes the number "
                            "worse")
        return
    candidate = make_candidate(run, read_edits(scratch, changes, 1 << 30), run.base, run.user.head)
    duel_canary(run, gate, candidate, samples)
    remove_tree(os.fsdecode(scratch.root))


def duel_canary(run: Run, gate: Gate, canary: Snapshot, samples: Sequence[float]) -> None:
    """Let the base and the canary fight: it must lose."""
    run.terminal.doing("canary")
    gauge = metric_gauge(run.config)
    if len(set(samples)) == 1 and run.measure(gauge, canary).value == samples[0]:
        gate.fail("canary", "the metric does not see it: the very same number; it would not see a "
                  "gain either: repair the metric")
        return
    duel, _ = run.fight_worse(gauge, run.config.sign, run.base, canary, samples, 0.0, lambda: False)
    if duel.outcome is Reason.BETTER:
        gate.ok("canary", f"the metric sees it ({len(duel.pairs)} pairs)")
    elif duel.outcome is Reason.NOISE_FAILED:
        gate.fail("canary", "the metric crashes on it; choose one that makes the number worse")
    else:
        gate.fail("canary", f"the metric does not see it ({len(duel.pairs)} pairs, odds "
                  f"{duel.odds:.2g}); it would not see a gain either: repair the metric")


# ══ run and resume ═══════════════════════════════════════════════════════════════════════════════

def how_to_restore(config: Config) -> str:
    """Return the command that gets the ledger back from its anchor, from wherever it is run."""
    new = shlex.quote(config.ledger_path + ".new")
    return (f'mkdir -p {shlex.quote(config.state_folder)} && git -c core.autocrlf=false -C "$(git '
            f'-C {shlex.quote(config.folder)} rev-parse --show-toplevel)" archive '
            f"{anchor_ref(config)} | tar -xOf - > {new} && mv {new} "
            f"{shlex.quote(config.ledger_path)}")


class Anchor(NamedTuple):
    """What the ledger's ref in the user's repository names: a commit, and a record by seq and hash.

    ("", -1, "") where there is no such ref.
    """

    commit: str
    seq: int
    hash: str


def read_anchor(user: UserRepository, config: Config) -> Anchor:
    """Return the ledger's anchor; raise RecordBroken when its ref holds anything else."""
    ref = anchor_ref(config)
    try:
        commit = user.repo.ref(ref)
        text = user.repo.git("cat-file", "commit", commit).decode("utf-8", "replace") \
            if commit else ""
    except GitFailed as error:
        raise RecordBroken(f"{ref} can't be read ({error})") from None
    if not commit:
        return Anchor("", -1, "")
    found = re.search(r"^seq ([0-9]{1,15}) hash ([0-9a-f]{64})$", text, re.MULTILINE)
    if not found:
        raise RecordBroken(f"{ref} is not an anchor that this program wrote")
    return Anchor(commit, int(found[1]), found[2])


def fold_ledger(config: Config, state: State, torn: Optional[List[bytes]] = None,
                anchor: Anchor = Anchor("", -1, ""),
                look: Optional[Callable[[Record], None]] = None) -> Record:
    """Take a run's whole ledger into `state`, each record shown to `look`; return the last one.

    Reads it once, a line at a time. Raises RecordBroken when it is not whole, has no baseline, is
    shorter than its anchor or not the one that it names. With `look` it is read strictly.
    """
    ref, last = anchor_ref(config), {"seq": -1}
    for last in read_ledger(config.ledger_path, ledger_secret(), torn, strict=look is not None):
        if look:
            look(last)
        state.advance(last)
        if last["seq"] == anchor.seq and last["hash"] != anchor.hash:
            raise RecordBroken(f"ledger: record {anchor.seq} is not the one that {ref} names: an "
                               "older or other ledger was put in its place")
    if last["seq"] < anchor.seq:
        raise RecordBroken(f"ledger: its tail was cut: {ref} names record {anchor.seq}, which is "
                           "not there")
    if state.baseline is None:
        raise RecordBroken(f"ledger: {config.ledger_path} holds no start and baseline")
    return last


def run_command(config: Config, options: Options, terminal: Terminal, watch: Watch) -> int:
    """Run a loop from its start, or go on with it; return the exit code."""
    lock = StateLock(config.state_folder)
    lock.acquire()
    begun = has_begun(config)
    try:
        if options.more and not begun:
            raise Refused("--more: there is no run of this loop.ini yet; start it without --more")
        stale = lock.left_behind()
        if stale:
            remove_tree(stale)
        with private_folder(work_folder(), lock.note) as tmp:
            open_for_runner(config, tmp, 0o711)
            user = open_user_repository(find_git(), private_home(tmp), config.folder)
            if begun and not options.new:
                run = resume(config, options, user, tmp, terminal, watch)
            else:
                aside = begin_anew(config, user) if options.new else ""
                try:
                    run = start(config, user, tmp, terminal, watch)
                except BaseException:
                    if aside and not has_begun(config):
                        move_run(config, user, aside, "")       # nothing came of the new one
                    raise
                if aside:
                    terminal.say(f"old run      kept beside: {config.state_folder}{aside}, "
                                 f"{anchor_ref(config, aside)}")
            begun = True
            return carry_on(run) if run else 0
    finally:
        lock.release(undo=not begun)


def has_begun(config: Config) -> bool:
    """Tell whether a run's ledger holds more than a start that was cut off in its first write."""
    try:
        if not stat.S_ISREG(os.lstat(config.ledger_path).st_mode):
            return True         # something is there: whoever reads it says what
        with open_regular(config.ledger_path) as stream:
            first, second = stream.readline(), stream.readline()
    except FileNotFoundError:
        return False
    return second.endswith(b"\n") or first.endswith(b"\n") and b'"type":"start"' not in first


def found_elsewhere(config: Config, user: UserRepository) -> str:
    """Return the ledger of a run of this name in another work tree of the repository, or ""."""
    rows = user.repo.git("worktree", "list", "--porcelain").splitlines()
    ledger = os.path.relpath(config.ledger_path, config.folder)
    paths = [os.path.join(os.fsdecode(row[9:] + b"/" + user.prefix), ledger) for row in rows
             if row.startswith(b"worktree ")]
    own = os.path.realpath(config.ledger_path)
    return next((path for path in paths if os.path.exists(path)
                 and os.path.realpath(path) != own), "")


def begin_anew(config: Config, user: UserRepository) -> str:
    """Set the old run aside for `--new`, if nothing that can be looked at forbids a new one.

    Returns what is added to its names.
    """
    gate = Gate()
    state = State()
    branch = f"refs/heads/{config.loop.branch}"
    at = user.repo.refs([branch]).get(branch, "")
    if not has_begun(config):
        if not user.repo.ref(anchor_ref(config)):
            return ""       # there is none
        place = found_elsewhere(config, user)
        if place:
            raise Refused(f"record: {place} is that run's; give this one another [loop] name")
    with contextlib.suppress(RecordBroken, FileNotFoundError):  # it is set aside as it is
        fold_ledger(config, state, [])
    ours = at and at != "symbolic" \
        and b"\nScalar-Loop-Ledger: " in user.repo.git("cat-file", "commit", at)
    look_around(gate, config, user, [user.head, state.base, *(row[1] for row in state.keeps),
                                     *([at] if ours else [])], user.head, fresh=True)
    gate.demand()
    aside = next(f".{n}" for n in range(1, 10_000)
                 if not os.path.lexists(f"{config.state_folder}.{n}")
                 and not user.repo.refs([f"{branch}.{n}", anchor_ref(config, f".{n}")]))
    move_run(config, user, "", aside)
    return aside


def carry_on(run: Run) -> int:
    """Run the loop to its stop, close the record, and say what came of it."""
    if run.ledger is None:
        return 1
    detail = ""
    try:
        reason = run_loop(run)
    except Interrupted as error:
        reason, detail = "interrupted", str(error).partition(";")[0]
    except (StoreDamaged, GitFailed) as error:
        void(run, Reason.STORE, str(error))
        reason, detail = "store", str(error)
    except MetricBroken as error:
        reason, detail = "failed", str(error)
    try:
        closing = measure_closing(run) if reason in FINAL_STOPS else {}
    except (Interrupted, MetricBroken) as error:
        run.terminal.say(f"no closing comparison: {error}")
        closing = {}
    run.record("stop", reason=reason, elapsed=round(run.elapsed(), 3), closing=closing,
               best=run.state.best, baseline=run.state.baseline, tip=run.state.tip)
    if reason != "store":
        publish(run)
    run.terminal.say(format_summary(run.config, run.state, run.ledger.head, run.ledger.records,
                                    reason, detail))
    run.ledger.close()
    return STOP_EXIT.get(reason, 0)


def measure_closing(run: Run) -> Dict[str, Any]:
    """Measure baseline against best anew, in pairs that decide nothing: what was really won."""
    if run.state.noise.exact or not run.state.keeps:
        return {}
    pairs = []
    for number in range(7):
        run.terminal.doing(f"closing comparison, pair {number + 1} of 7")
        first, last = run.measure_pair(metric_gauge(run.config), run.base, run.incumbent)
        if first.value is not None and last.value is not None:
            pairs.append((first.value, last.value))
    if len(pairs) < 5:
        return {}
    gain = closing_gain([(run.config.sign * old, run.config.sign * new) for old, new in pairs])
    return {"pairs": pairs, "gain": gain.median, "low": gain.low, "high": gain.high}


def start(config: Config, user: UserRepository, tmp: str, terminal: Terminal, watch: Watch) -> Run:
    """Pass the gate, open the ledger with `start` and `baseline`, and return the run."""
    secret = ledger_secret()
    gate = Gate()
    run, baseline = pass_gate(gate, config, user, config.state_folder, tmp, terminal, watch)
    gate.demand()
    if run is None or baseline is None:
        raise Refused("gate: nothing could be measured")
    for row in gate.rows:
        if row.state == "notice" and row.name != "isolation":
            terminal.say(f"notice       {row.name}: {row.text}")
    terminal.say(f"isolation    {run.isolation.summary(config)}")
    run.ledger = Ledger(config.ledger_path, secret)
    started = {"config": config.resolved(), "config_sha256": config.digest, "base": user.head,
               "tree": run.base.tree, "branch": user.branch, "keyed": secret is not None,
               "prefix": shown_path(run.scope.prefix),
               "lfs": sorted(shown_path(path) for path in run.lfs), **environment_record(run)}
    run.record_all(("start", started), ("baseline", {
        "samples": baseline.samples, "value": baseline.value, "name": baseline.name,
        "metric_seconds": baseline.seconds, "guards": baseline.guards,
        "holdout": baseline.holdout}))
    terminal.say(f"baseline     {baseline.name} = {format_number(baseline.value)}   "
                 f"{len(baseline.samples)} runs, {'exact' if run.state.noise.exact else 'noisy'}")
    return run


def check_record(gate: Gate, config: Config, user: UserRepository) -> List[str]:
    """Look at what an earlier run of this name left; return where its branch may be."""
    tips: List[str] = []
    ref = anchor_ref(config)
    if has_begun(config):
        state = read_state(config)[0]
        tips = run_tips(state)
        here = f"a run of {counted(state.iterations, 'iteration')} is here"
        others = changed_keys(state.config, config.resolved())[1]
        if others:
            gate.fail("record", f"{here}, and {', '.join(others)} changed since it began; change "
                      "it back, or begin anew with --new")
        elif state.stopped in FINAL_STOPS:
            gate.notice("record", f"{here}, finished ({state.stopped}); "
                        + how_to_go_on(state.stopped))
        else:
            gate.notice("record", f"{here}: a start goes on with it, --new begins anew")
    elif user.repo.ref(ref):
        place = found_elsewhere(config, user)
        gate.fail("record", f"{ref} is that of {place}; give this run another [loop] name" if place
                  else f"{ref} holds the ledger of an earlier run whose state folder is gone; "
                  "--new sets its branch and ref aside")
    if user.repo.refs([os.path.dirname(ref)]):
        gate.fail("record", f"{os.path.dirname(ref)} is a ref, so the ledger's can't be made "
                  "beside it; remove it, or give this run another [loop] name")
    return tips


def pass_gate(gate: Gate, config: Config, user: UserRepository, folder: str, tmp: str,
              terminal: Terminal, watch: Watch) -> Tuple[Optional[Run], Optional[Baseline]]:
    """Check every condition of a new run in `folder`; the metric runs only if the rest holds."""
    gate.ok("config", f"{os.path.basename(config.path)} ({config.loop.name})")
    gate.ok("git", f"{user.top} ({user.algorithm})")
    tips = [user.head, *check_record(gate, config, user)]
    scope, argv, _ = look_around(gate, config, user, tips, user.head, fresh=True)
    if any(row.state == "FAILED" for row in gate.rows):
        return None, None
    try:
        terminal.doing("preparing")
        for name in ("ledger.jsonl", "store.git"):      # of a start that was cut off
            remove_tree(os.path.join(folder, name))
        store = create_store(os.path.join(folder, "store.git"), user)
        trees = take_snapshots(store, user, folder, user.head, user.head)
        run = open_run(gate, config, user, store, folder, tmp, watch, terminal, scope, argv, trees)
        return run, take_baseline(run, gate)
    except Refused as error:
        name, _, text = str(error).partition(": ")
        gate.fail(name, text)
        return None, None


def environment_record(run: Run) -> Dict[str, Any]:
    """Return what a session ran with: seals, versions, isolation."""
    sealed = ((path, entry) for path, entry in run.base.manifest.items()
              if not run.scope.holds(path))
    with open(os.path.abspath(__file__), "rb") as stream:
        own = hashlib.sha256(stream.read()).hexdigest()
    return {"seal_root": manifest_root(sealed), "outside_root": run.outside.root,
            "outside": {shown_path(path): entry.digest.hex()
                        for path, entry in sorted(run.outside.entries.items())[:1000]},
            "share_root": manifest_root(run.shared.entries.items()), "tool_sha256": own,
            "versions": {"scalarloop": __version__, "python": sys.version.split()[0],
                         "git": run.store.repo.line("--version"), "platform": sys.platform},
            "isolation": run.isolation.as_record(), "agent": run.agent}


def resume(config: Config, options: Options, user: UserRepository, tmp: str, terminal: Terminal,
           watch: Watch) -> Optional[Run]:
    """Go on with a run from its ledger; return None when it is finished."""
    state, torn = State(), []
    anchor = read_anchor(user, config)
    try:
        last = fold_ledger(config, state, torn, anchor)
    except RecordBroken as error:
        raise RecordBroken(f"{error}; look at it with verify, get the anchored one back ("
                           f"{how_to_restore(config)}), or begin anew with --new") from None
    cut_torn_line(config.ledger_path, torn)
    limits, others = changed_keys(state.config, config.resolved())
    if others:
        raise Refused(f"config: {', '.join(others)} changed since the run began; change it back, "
                      "or begin anew with --new")
    done = state.iterations - state.counts["void"]
    until = done + options.more if options.more else state.more_until
    if until:       # also of a session that was killed before it got there
        config = replace(config, loop=replace(config.loop, iterations=until))
    if state.stopped in FINAL_STOPS and not options.more and anchor.seq == last["seq"] \
            and stop_reason(config, state, state.elapsed):
        terminal.say(format_summary(config, state, last["hash"], last["seq"] + 1, state.stopped))
        terminal.say(f"this run is finished ({state.stopped}); " + how_to_go_on(state.stopped))
        return None
    reason = stop_reason(config, state, state.elapsed) if options.more else ""
    if reason in ("target", "budget", "max_cost", "constant_metric"):   # --more resets the others
        raise Refused(f"--more: the run would stop at once ({reason}); {how_to_go_on(reason)}")
    run = reopen(config, user, state, tmp, terminal, watch)
    run.state, run.anchor = state, anchor.commit
    run.elapsed_before = state.elapsed
    run_setup(run)
    learn_folders(run)
    run.ledger = Ledger(config.ledger_path, ledger_secret(), last["seq"] + 1, last["hash"])
    run.record("resume", config=config.resolved(), limits=limits,
               more=max(until - done, 0), **environment_record(run))
    terminal.say(f"resuming     after #{state.iterations}, best {format_number(state.best)} "
                 f"(baseline {format_number(state.baseline)}); isolation {run.isolation.level}")
    if user.head not in run_tips(state):
        terminal.say(f"notice       tree: {user.branch or 'HEAD'} is at {user.head[:12]}, this run "
                     f"goes on from {state.tip[:12]}: what else has changed is not part of it")
    publish(run)
    return run


def reopen(config: Config, user: UserRepository, state: State, tmp: str, terminal: Terminal,
           watch: Watch) -> Run:
    """Open a run's store again, behind the gate; what is sealed must be what it was."""
    gate = Gate()
    tips = run_tips(state)
    branch = f"refs/heads/{config.loop.branch}"
    if user.repo.refs([branch]).get(branch, state.base) not in tips:
        raise RecordBroken(f"branch {config.loop.branch} is no longer where this run left it; it "
                           f"was left alone. Move it back to {state.tip[:12]}, or start a new run "
                           "with --new")
    scope, argv, _ = look_around(gate, config, user, tips, state.base, fresh=False)
    gate.demand()
    store = Store(replace(user.repo, git_dir=os.path.join(config.state_folder, "store.git"),
                          work_tree="", cwd=config.state_folder))
    user = replace(user, head=state.base)
    try:
        clear_store(store)
        trees = take_snapshots(store, user, config.state_folder, state.base, state.tip)
    except (GitFailed, StoreDamaged, FileNotFoundError) as error:
        trees = mend_store(store, user, state, str(error))
    run = open_run(gate, config, user, store, config.state_folder, tmp, watch, terminal, scope,
                   argv, trees)
    gate.demand()
    now = environment_record(run)
    for name in ROOTS:
        if now[name] != state.start[name]:
            raise Refused(f"seal: {name} is not what it was when the run began (an interpreter, "
                          "shared folder or sealed file changed); put it back, or begin anew with "
                          "--new")
    return run


def make_store(path: str, user: UserRepository, tip: str) -> Store:
    """Make a store from the user's repository, with all that was kept from `user.head` to a tip."""
    store = create_store(path, user)
    copy_objects(user.repo, store.repo, f"{tip}\n^{user.head}\n".encode(), "--revs")
    return store


def mend_store(store: Store, user: UserRepository, state: State, damage: str) -> Snapshots:
    """Make a damaged store anew from the user's repository, if all that was kept is there."""
    try:
        if not user.repo.ref(f"{state.tip}^{{commit}}"):
            raise StoreDamaged("the last keep is not in the user's repository")
        fresh = store.repo.git_dir + ".new"
        remove_tree(fresh)
        make_store(fresh, user, state.tip)
        remove_tree(store.repo.git_dir)
        os.rename(fresh, store.repo.git_dir)
        folder = os.path.dirname(store.repo.git_dir)
        return take_snapshots(store, user, folder, state.base, state.tip)
    except (GitFailed, StoreDamaged) as error:
        raise StoreDamaged(f"store: {store.repo.git_dir} is damaged ({damage}) and can't be made "
                           f"anew ({error}); begin anew with --new") from None


def clear_store(store: Store) -> None:
    """Drop what a git that died may have left half-written; what counts stands in flushed packs."""
    root = store.repo.git_dir
    for name in os.listdir(os.path.join(root, "objects")):
        if re.fullmatch(r"[0-9a-f]{2}|tmp_.*", name):
            remove_tree(os.path.join(root, "objects", name))
    for name in ("candidate", "anchor"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(root, "refs", "scalarloop", name))
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(".lock") or name.startswith("tmp_"):
                os.unlink(os.path.join(folder, name))


def how_to_go_on(reason: str) -> str:
    """Say what goes on with a finished run."""
    limits = {"target": "[loop] target", "budget": "[loop] budget", "max_cost": "[agent] max_cost",
              "constant_metric": "the metric"}
    first = f"change {limits[reason]} to go on with it" if reason in limits \
        else "--more N goes on with it"
    return f"{first}, --new begins anew"


def learn_folders(run: Run) -> None:
    """See again which folders the commands touch, on the base; the numbers are not used."""
    room = make_cleanroom(run, 0)
    run.rooms = [room]
    room.learning = True
    gauges = [metric_gauge(run.config), *map(guard_gauge, run.config.guards)]
    holdout = holdout_gauge(run.config)
    for gauge in gauges + ([holdout] if holdout else []):
        run.terminal.doing(f"looking at {gauge.key} again")
        run.measure(gauge, run.base)
    room.learning = False


def move_run(config: Config, user: UserRepository, old: str, new: str) -> None:
    """Rename a run's state folder, branch and anchor, from one ending of their names to another."""
    folder, branch = config.state_folder, config.loop.branch
    moves: List[Tuple[str, str, str]] = []
    for source, target in ((f"refs/heads/{branch}{old}", f"refs/heads/{branch}{new}"),
                           (anchor_ref(config, old), anchor_ref(config, new))):
        at = user.repo.ref(source)
        if at:
            moves += [(target, at, ""), (source, "0" * len(at), at)]
    if moves:
        move_refs(user, moves)
    os.makedirs(folder + new, 0o700, exist_ok=True)
    for entry in set(os.listdir(folder + new)) - {"lock"}:      # of a start that came to nothing
        remove_tree(os.path.join(folder + new, entry))
    entries = sorted(os.listdir(folder + old), key=lambda name: name == "ledger.jsonl")
    for entry in entries:       # the ledger last: a kill half-way leaves a run, not a stump
        if entry != "lock":
            os.rename(os.path.join(folder + old, entry), os.path.join(folder + new, entry))
    if old:
        os.rmdir(folder + old)


# ══ verify ═══════════════════════════════════════════════════════════════════════════════════════

@dataclass
class Findings:
    """What a verification found: errors break the record, warnings are for a person to weigh."""

    errors: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    checked: List[str] = field(default_factory=list)
    pending: bool = False       # the last record is on its way to the user's repository
    failed: int = 0             # numbers that a replay did not see again

    def tell(self, terminal: Terminal) -> None:
        """Print all of them, a line each."""
        for label, texts in (("ok", self.checked), ("warning", self.warnings),
                             ("BROKEN", self.errors)):
            for text in texts:
                terminal.say(f"{label:<9s}{text}")


def verify_command(config: Config, options: Options, terminal: Terminal, watch: Watch) -> int:
    """Re-check a run from its ledger and the repository alone; return the exit code."""
    if not os.path.exists(config.ledger_path):
        raise Refused(f"verify: there is no ledger at {config.ledger_path}; run the loop first, or "
                      f"get the one that was anchored ({how_to_restore(config)})")
    with private_folder(work_folder()) as tmp:
        user = open_user_repository(find_git(), private_home(tmp), config.folder)
        for _ in range(3):
            state, findings = verify_once(config, user)
            if not findings.errors or not is_locked(config):
                break
            time.sleep(.5)      # a loop is at work: one thing was read before its next step
        findings.tell(terminal)
        if state and options.replay and not findings.errors:
            replayed = replay(config, user, state, tmp, terminal, watch)
            replayed.tell(terminal)
            findings.failed = replayed.failed
    if findings.errors:
        terminal.say("the record is broken")
        return RecordBroken.exit_code
    terminal.say("verified: the record is whole" + (
        f", but {counted(findings.failed, 'number', 'was were')} not seen again here"
        if findings.failed else ""))
    return 0


def verify_once(config: Config, user: UserRepository) -> Tuple[Optional[State], Findings]:
    """Check ledger and repository; the state is None when the ledger is broken."""
    findings = Findings()
    state = verify_ledger(config, user, findings)
    try:
        if state:
            verify_repository(config, user, state, findings)
    except (GitFailed, StoreDamaged) as error:
        findings.errors.append(str(error))
    return state, findings


def verify_ledger(config: Config, user: UserRepository, findings: Findings) -> Optional[State]:
    """Check chain, order, arithmetic and anchor; return the state, or None past the first break."""
    state, last = State(), [""]

    def look(record: Record) -> None:
        if record["time"] < last[0]:
            findings.warnings.append(f"record {record['seq']}: the clock went backwards")
        last[0] = record["time"]

    try:
        anchor = read_anchor(user, config)
        fold_ledger(config, state, None, anchor, look)
        check_copy(config, user, anchor)
        check_pending(config, state, anchor.seq, findings)
    except RecordBroken as error:
        findings.errors.append(str(error))
        return None
    findings.checked.append(
        f"chain of {counted(state.iterations, 'iteration')}, {counted(len(state.keeps), 'keep')}, "
        f"{counted(state.sessions, 'session')}")
    others = [name for name in changed_keys(state.config, config.resolved())[1]
              if name not in ("[loop] name", "[loop] branch")]      # a run that was set aside
    if others:
        findings.errors.append(f"loop.ini is not the run's: {', '.join(others)} changed since")
    with open(os.path.abspath(__file__), "rb") as stream:
        if hashlib.sha256(stream.read()).hexdigest() != state.start["tool_sha256"]:
            findings.warnings.append("this scalarloop.py is not the one that began the run")
    return state


def check_copy(config: Config, user: UserRepository, anchor: Anchor) -> None:
    """Compare the ledger with the copy that its anchor holds: the first bytes of it."""
    if not anchor.commit:
        return
    with open_regular(config.ledger_path) as stream:
        def compare(data: bytes) -> None:
            if stream.read(len(data)) != data:
                raise RecordBroken(f"the copy of the ledger in {anchor_ref(config)} is another one")

        try:
            Store(user.repo).read_anchor(anchor.commit, compare)
        except (GitFailed, StoreDamaged) as error:
            raise RecordBroken(f"{anchor_ref(config)}: {error}") from None


def check_pending(config: Config, state: State, anchored: int, findings: Findings) -> None:
    """Compare the anchor with the last keep or stop: both are handed back as soon as recorded.

    Only the very last one may be on its way still, after a crash.
    """
    ref = anchor_ref(config)
    if anchored >= state.due:
        return
    findings.pending = anchored >= state.due_before and not state.moved_on
    if findings.pending:
        findings.warnings.append(f"record {state.due} is not handed back yet; start the run again")
    elif anchored < 0:
        raise RecordBroken(f"{ref} is not here, so a cut tail could not be seen (git "
                           "fetch origin 'refs/scalarloop/*:refs/scalarloop/*')")
    else:
        raise RecordBroken(f"{ref} names record {anchored}, older than the last that "
                           f"was handed back ({state.due})")


def verify_repository(config: Config, user: UserRepository, state: State, findings: Findings
                      ) -> None:
    """Check branch, kept commits, their anchors, scope and seal against the ledger."""
    recorded = replace(config, loop=replace(
        config.loop, scope=tuple(state.config["loop"]["scope"]),
        seal=tuple(state.config["loop"]["seal"]), ignore=tuple(state.config["loop"]["ignore"])))
    scope = make_scope(recorded, user.prefix)
    branch = config.loop.branch
    ref = f"refs/heads/{branch}"
    at = user.repo.refs([ref]).get(ref, "")
    if os.path.exists(os.path.join(user.common_dir, "shallow")):
        findings.warnings.append("this clone is shallow, so commits may be missing: git fetch "
                                 "--unshallow")
    tips = ["", state.base, *(row[1] for row in state.keeps)]
    right = tips if findings.pending else [state.tip] if state.keeps else tips
    if at not in right:
        hint = "" if at else f" (git fetch origin {branch}:{branch})"
        findings.errors.append(f"branch {branch} is at {at[:12] or 'nothing'}, the ledger says "
                               f"{state.tip[:12] if state.keeps else 'nothing was kept'}{hint}")
        return
    if findings.pending and state.keeps and at == state.tip \
            and state.due == state.anchors[state.tip][0] + 1:       # a keep, no later stop
        findings.errors.append(f"the branch has #{state.keeps[-1][0]}, the ledger's ref does not: "
                               "they move together, so the ledger's tail was cut")
        return
    keeps = [row for row in state.keeps if tips.index(row[1]) <= max(tips.index(at), 1)] \
        if findings.pending else state.keeps    # the last one's objects may not be here yet
    if not user.repo.ref(f"{state.base}^{{commit}}"):
        findings.errors.append(f"base commit {state.base[:12]} is not in this repository")
        return
    store, parent = Store(user.repo), state.base
    for n, commit, value in keeps:
        problem = commit_problem(store, scope, state, parent, commit, n, value)
        if problem:
            findings.errors.append(f"commit {commit[:12]} of #{n}: {problem}")
            return
        parent = commit
    store.check_objects(parent, f"^{state.base}")
    findings.checked.append(f"branch {branch}: every commit in scope, anchored, in order")
    verify_seals(user, state, scope, keeps[-1][1] if keeps else state.base, findings)


def commit_problem(store: Store, scope: Scope, state: State, parent: str, commit: str, n: int,
                   value: float) -> str:
    """Return what is wrong with one kept commit, or ""."""
    try:
        text = store.repo.git("cat-file", "commit", commit).decode("utf-8", "replace")
        changes = store.list_changes(parent, commit)
    except GitFailed as error:
        return str(error)
    parents = re.findall(r"^parent ([0-9a-f]+)$", text.partition("\n\n")[0], re.MULTILINE)
    if parents != [parent]:
        return "its parent is not the keep before it"
    seq, prev = state.anchors[commit]
    if f"\nScalar-Loop-Ledger: {seq} {prev}\n" not in text:
        return f"its trailer does not name record {seq} of this ledger"
    if f"\nScalar-Loop-Iteration: {n}\n" not in text \
            or f"\nScalar-Loop-Metric: {state.metric_name}={exact_number(value)}\n" not in text:
        return "its trailers do not say what the ledger says"
    for path, row in changes.items():
        if not scope.holds(path) or row.mode not in (0, PLAIN, EXECUTABLE):
            return f"{shown_path(path)} is outside the scope"
    return ""


def verify_seals(user: UserRepository, state: State, scope: Scope, tip: str, findings: Findings
                 ) -> None:
    """Recompute the seal's root from git, and look at sealed files outside the tree."""
    store = Store(user.repo)
    marked = set(state.start["lfs"])
    for commit, label in ((state.base, "base"), (tip, "tip")):
        listed = store.list_tree(commit)
        lfs = frozenset(path for path in listed if shown_path(path) in marked)
        try:
            manifest = take_manifest(store, commit, lfs)
        except (StoreDamaged, GitFailed) as error:
            findings.errors.append(f"{label} {commit[:12]}: {error}")
            return
        root = manifest_root((path, entry) for path, entry in manifest.items()
                             if not scope.holds(path))
        if root != state.start["seal_root"]:
            findings.errors.append(f"{label} {commit[:12]}: sealed files are not those of the "
                                   f"start")
            return
    findings.checked.append("seal: the sealed files of base and tip are those of the start")
    for path, digest in state.start["outside"].items():
        try:
            status = os.lstat(path)
            same = entry_of(os.fsencode(path), status).digest.hex() == digest
        except OSError:
            same = False
        if not same:
            findings.warnings.append(f"sealed outside the tree: {path} is not here as it was")


def replay(config: Config, user: UserRepository, state: State, tmp: str, terminal: Terminal,
           watch: Watch) -> Findings:
    """Measure the base and every keep again, from git alone, in fresh cleanrooms."""
    findings = Findings()
    folder = os.path.join(tmp, "state")
    os.mkdir(folder, 0o700)
    store = make_store(os.path.join(folder, "store.git"), replace(user, head=state.base), state.tip)
    argv = resolve_command(config.metric.command, config.folder)
    run = open_run(Gate(), config, user, store, folder, tmp, watch, terminal,
                   make_scope(config, user.prefix), argv,
                   take_snapshots(store, user, folder, state.base, state.tip))
    run.state = state
    run_setup(run)
    learn_folders(run)
    gauge = metric_gauge(config)
    spread = 0.0 if state.noise.exact else 4 * sigma(state.noise.differences)
    for n, commit, value in [(0, state.base, state.baseline or 0.0), *state.keeps]:
        snapshot = Snapshot(store.repo.line("rev-parse", f"{commit}^{{tree}}"),
                            take_manifest(store, commit, run.lfs))
        runs = 1 if state.noise.exact else 5
        found = [run.measure(gauge, snapshot) for _ in range(runs)]
        values = [one.value for one in found if one.value is not None]
        label = "replay baseline:" if n == 0 else f"replay #{n}:"
        if len(values) == len(found) and abs(median(values) - value) <= spread:
            findings.checked.append(f"{label} {format_number(median(values))}, "
                                    + ("exactly" if state.noise.exact else "within the noise"))
            continue
        findings.failed += 1
        findings.warnings.append(
            f"{label} fails here ({found[0].detail})" if len(values) < len(found) else
            f"{label} {format_number(median(values))}, recorded {format_number(value)}")
    return findings


# ══ command line ═════════════════════════════════════════════════════════════════════════════════

USAGE = """usage: python scalarloop.py [COMMAND] loop.ini [options]

  (none)     run the loop, or go on with one that was interrupted
  check      pass the gate alone, and print it as a table
  verify     re-check ledger, branch and seals     --replay: measure every keep again
  status     say where the run stands
  prompt     print the exact next prompt

options: --more N  go on for N more iterations    --new  begin anew, the old run is kept beside it
         --help    this text                      --version

exit: 0 finished, 1 failed, 2 refused, 3 paused for a check-in, 4 record broken, 130 interrupted"""


def private_home(tmp: str) -> str:
    """Make the HOME of every git call: it only says that any owner's repository may be read."""
    home = os.path.join(tmp, "home")
    os.makedirs(home, exist_ok=True)
    with open(os.path.join(home, ".gitconfig"), "wb") as stream:
        stream.write(b"[safe]\n\tdirectory = *\n")
    return home


def check_lock(gate: Gate, config: Config) -> None:
    """Say whether a loop could take the state folder's lock now, without making anything."""
    path = os.path.join(config.state_folder, "lock")
    place = config.state_folder
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        gate.fail("lock", f"{place} is not a folder; move it away")
    elif not os.access(place, os.W_OK):
        gate.fail("lock", f"{place} can't be written; make it writable")
    elif os.path.islink(path):
        gate.fail("lock", f"{path} is a link; remove it")
    elif is_locked(config):
        gate.fail("lock", "another loop runs on this state folder; wait for it")
    else:
        gate.ok("lock", f"no loop runs on {config.state_folder}")


def check_command(config: Config, options: Options, terminal: Terminal, watch: Watch) -> int:
    """Pass the gate of a new run in a temporary folder; nothing is left behind."""
    gate = Gate()
    with private_folder(work_folder()) as tmp:
        open_for_runner(config, tmp, 0o711)
        try:
            check_lock(gate, config)
            user = open_user_repository(find_git(), private_home(tmp), config.folder)
            folder = os.path.join(tmp, "state")
            os.mkdir(folder, 0o700)
            pass_gate(gate, config, user, folder, tmp, terminal, watch)
        except Refused as error:
            name, _, text = str(error).partition(": ")
            gate.fail(name, text)
    terminal.say(gate.table())
    failed = sum(row.state == "FAILED" for row in gate.rows)
    terminal.say(f"refused: {counted(failed, 'condition', 'does do')} not hold" if failed
                 else "the gate is passed")
    return Refused.exit_code if failed else 0


def read_state(config: Config, look: Optional[Callable[[State, Record], None]] = None
               ) -> Tuple[State, Record]:
    """Return the state of a run and its last record; refuse when there is none.

    `look` gets every record, with the state before it.
    """
    if not has_begun(config):
        raise Refused(f"status: there is no run yet at {config.state_folder}; start one")
    state = State()
    seen = functools.partial(look, state) if look else None
    return state, fold_ledger(config, state, [], look=seen)


def status_command(config: Config, options: Options, terminal: Terminal, watch: Watch) -> int:
    """Say where a run stands: its keeps, its last iterations, its totals."""
    lines: Dict[str, Deque[Tuple[int, str]]] = {"keep": deque(maxlen=100), "": deque(maxlen=10)}

    def look(state: State, record: Record) -> None:
        if record["type"] == "iteration":
            with contextlib.suppress(KeyError, TypeError, ValueError, IndexError, AttributeError,
                                     OverflowError):       # `advance` complains
                row = (record["n"], format_iteration(record, state.best))
                lines[""].append(row)
                if record["verdict"] == Verdict.KEEP:
                    lines["keep"].append(row)

    state, last = read_state(config, look)
    for _, line in sorted({*lines["keep"], *lines[""]}):
        terminal.say(line)
    under_way = ("running", "a loop is at work") if is_locked(config) \
        else ("cut off", "start again to go on")
    terminal.say(format_summary(config, state, last["hash"], last["seq"] + 1,
                                *((state.stopped,) if state.stopped else under_way)))
    return 0


def prompt_command(config: Config, options: Options, terminal: Terminal, watch: Watch) -> int:
    """Print the exact next prompt: of the run, or of a new one before its first turn."""
    state = read_state(config)[0] if has_begun(config) else State()
    goal = config.loop.goal
    if config.loop.program:
        try:
            with open(os.path.join(config.folder, config.loop.program), "rb") as stream:
                goal = stream.read().decode("utf-8", "replace")
        except OSError as error:
            raise Refused(f"program: {config.loop.program} can't be read ({error.strerror}); "
                          "create and commit it") from None
    if state.baseline is None:
        complain(terminal, "the baseline is not measured yet: the first prompt will hold it", 0)
    terminal.say(build_prompt(config, state, goal).rstrip("\n"))
    return 0


COMMANDS: Dict[str, Callable[[Config, Options, Terminal, Watch], int]] = {
    "run": run_command, "check": check_command, "verify": verify_command,
    "status": status_command, "prompt": prompt_command}


def parse_arguments(arguments: Sequence[str]) -> Tuple[str, str, Options]:
    """Return (command, path of loop.ini, options); raise Refused with what is wrong."""
    words, flags = [], {"more": 0, "new": False, "replay": False}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("--new", "--replay"):
            flags[word[2:]] = True
        elif word == "--more":
            count = rest.pop(0) if rest else ""
            try:
                flags["more"] = parse_count(count)
            except ValueError as error:
                raise Refused(f"--more: {count!r} can't be used (expected {error})") from None
        elif word.startswith("-"):
            raise Refused(f"{printable(word)}: unknown option; see --help")
        else:
            words.append(word)
    command = words.pop(0) if len(words) > 1 and words[0] in COMMANDS else "run"
    if len(words) == 2 and not os.path.exists(words[0]):
        raise Refused(f"{printable(words[0])}: unknown "
                      "command" + close_match(words[0], [*COMMANDS]))
    if len(words) != 1:
        got = printable(" ".join(arguments)) or "nothing"
        raise Refused(f"expected [COMMAND] loop.ini, got {got} (commands: "
                      f"{', '.join(COMMANDS)}; see --help)")
    for flag, value, wanted in (("--more", flags["more"], "run"), ("--new", flags["new"], "run"),
                                ("--replay", flags["replay"], "verify")):
        if value and command != wanted:
            where = "a run" if wanted == "run" else wanted
            raise Refused(f"{flag}: goes with {where}, not with {command}; leave it out")
    if flags["more"] and flags["new"]:
        raise Refused("--more: goes on with the run that is there, so not with --new; set [loop] "
                      "iterations")
    if words[0] in COMMANDS and not os.path.exists(words[0]):
        raise Refused(f"{words[0]}: of which loop.ini? (python scalarloop.py {words[0]} loop.ini)")
    if not os.path.exists(words[0]) and not words[0].endswith((".ini", ".cfg")):
        raise Refused(f"{printable(words[0]) or repr('')}: neither a command nor a file (commands: "
                      f"{', '.join(COMMANDS)}; see --help)")
    return command, words[0], Options(**flags)  # type: ignore[arg-type]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit code. The one place that handles errors."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.umask(0o022)     # trees are the same whoever starts the loop; what is private says so itself
    sys.stdout = sys.stdout or open(os.devnull, "w")    # a caller may have closed them
    sys.stderr = sys.stderr or open(os.devnull, "w")
    terminal = Terminal(sys.stdout)
    version = f"scalarloop {__version__}"
    for word, text in (("--help", USAGE), ("-h", USAGE), ("--version", version)):
        if word in arguments:
            terminal.say(text)
            return 0
    watch = Watch(terminal.tick)
    try:
        command, path, options = parse_arguments(arguments)
        config = load_config(path)
        watch.listen()
        harden_self()
        return COMMANDS[command](config, options, terminal, watch)
    except ScalarLoopError as error:
        return complain(terminal, str(error), error.exit_code)
    except KeyboardInterrupt:
        return complain(terminal, "interrupted", Interrupted.exit_code)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        tmp = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")      # there may be none
        return complain(terminal, f"the machine failed: {error.strerror or error}{where} "
                        f"(temporary files go to {tmp}); what was recorded is safe, make room or "
                        "mend it and start again", 1)


def complain(terminal: Terminal, text: str, code: int) -> int:
    """Print an error, a line each, to standard error; return its exit code."""
    terminal.clear()
    try:
        for line in text.splitlines():
            indent = "" if line.startswith(" ") else "scalarloop: "
            print(indent + line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
    return code


if __name__ == "__main__":
    if sys.platform == "win32":
        print("scalarloop: Windows is not supported; run it inside WSL", file=sys.stderr)
        sys.exit(Refused.exit_code)
    sys.exit(main())
