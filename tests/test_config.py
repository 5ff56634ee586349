"""loop.ini: every key with its default, every kind of bad value as one clear line, nothing else."""
from __future__ import annotations

import os
import random
import re
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest

import scalarloop
from scalarloop import Config, ConfigError, Gain, load_config

MINIMAL = """\
[loop]
goal = Make it smaller.
scope = src/**
[metric]
command = python3 metric.py
"""
WORDS = ("one", "two")
OPEN = (None, None)

# section, key, text, what it is parsed to, default
KEYS: List[Tuple[str, str, str, Any, Any]] = [
    ("loop", "name", "night-1.a", "night-1.a", "loop"),
    ("loop", "goal", "Less = more; 100 %(x)s", "Less = more; 100 %(x)s", "Make it smaller."),
    ("loop", "program", "docs/program.md", "docs/program.md", ""),
    ("loop", "scope", "src/**/*.js 'a b/*'", ("src/**/*.js", "a b/*"), ("src/**",)),
    ("loop", "seal", "data/** /usr/bin/env ~/x ../y", ("data/**", "/usr/bin/env", "~/x", "../y"),
     ()),
    ("loop", "share", "node_modules/ .venv", ("node_modules", ".venv"), ()),
    ("loop", "ignore", ".aider* .claude/**", (".aider*", ".claude/**"), ()),
    ("loop", "memory", "notes/memory.md", "notes/memory.md", ""),
    ("loop", "branch", "team/fast", "team/fast", "scalarloop/loop"),
    ("loop", "iterations", "7", 7, 25),
    ("loop", "target", "+1.5e3", 1500.0, None),
    ("loop", "patience", "4", 4, 15),
    ("loop", "budget", "8h", 28800.0, None),
    ("loop", "give_ups", "1", 1, 3),
    ("loop", "failures", "2", 2, 5),
    ("loop", "check_in", "10", 10, None),
    ("loop", "simplify", "no", False, False),
    ("loop", "workers", "1", 1, 1),
    ("loop", "seed", "42", 42, 0),
    ("loop", "max_change", "64k", 65536, 1 << 20),
    ("loop", "max_files", "3", 3, 200),
    ("agent", "adapter", "double", "double", "claude"),
    ("agent", "command", "sh -c 'cat; echo \"a  b\"'", ("sh", "-c", 'cat; echo "a  b"'), ()),
    ("agent", "timeout", "90s", 90.0, 600.0),
    ("agent", "rework", "0", 0, 2),
    ("agent", "env", "API_KEY, _x2", ("API_KEY", "_x2"), ()),
    ("agent", "writable", "~/.cache/x '/tmp/a b'", ("~/.cache/x", "/tmp/a b"), ()),
    ("agent", "price_per_turn", "0.25", 0.25, 0.0),
    ("agent", "max_cost", "12", 12.0, None),
    ("metric", "command", "python3 score.py --all", ("python3", "score.py", "--all"),
     ("python3", "metric.py")),
    ("metric", "produce", "python3 src/make.py", ("python3", "src/make.py"), ()),
    ("metric", "outputs", "out/*.json", ("out/*.json",), ()),
    ("metric", "setup", "npm ci", ("npm", "ci"), ()),
    ("metric", "name", "bytes", "bytes", ""),
    ("metric", "pattern", r"^size: (\d+)$", r"^size: (\d+)$", ""),
    ("metric", "direction", "maximize", "maximize", "minimize"),
    ("metric", "timeout", "1.5m", 90.0, 600.0),
    ("metric", "bounds", "0 *", (0.0, None), OPEN),
    ("metric", "min_gain", "1 %", Gain(1.0, True), Gain(0.0, False)),
    ("metric", "max_gain", "50", Gain(50.0, False), None),
    ("metric", "home", "private", "private", "real"),
    ("metric", "cache", "target build/x", ("target", "build/x"), ()),
    ("metric", "git", "on", True, False),
    ("metric", "samples", "9", 9, None),
    ("metric", "confidence", "none", None, 0.8),
    ("metric", "env", "CUDA_HOME", ("CUDA_HOME",), ()),
    ("metric", "network", "deny", "deny", "allow"),
    ("metric", "exclusive", "yes", True, True),
    ("metric", "runner", "srun -w {cleanroom}", ("srun", "-w", "{cleanroom}"), ()),
    ("metric", "canary", "worse.patch", ("worse.patch",), ()),
    ("holdout", "command", "python3 hold.py", ("python3", "hold.py"), ("h",)),
    ("holdout", "name", "score", "score", ""),
    ("holdout", "pattern", "(.)", "(.)", ""),
    ("holdout", "direction", "maximize", "maximize", "minimize"),
    ("holdout", "timeout", "5s", 5.0, 600.0),
    ("holdout", "bounds", "-1, 1", (-1.0, 1.0), OPEN),
    ("holdout", "files", "data/hidden/**", ("data/hidden/**",), ()),
    ("isolation", "level", "portable", "portable", "auto"),
    ("isolation", "require", "files_sealed, loop_protected", ("files_sealed", "loop_protected"),
     ()),
    ("guard", "command", "python3 test.py", ("python3", "test.py"), ("g",)),
    ("guard", "pattern", "(.)", "(.)", ""),
    ("guard", "direction", "maximize", "maximize", "minimize"),
    ("guard", "tolerance", "0.5", 0.5, None),
    ("guard", "timeout", "5s", 5.0, 600.0),
]
# What else a key needs in order to be allowed, and what it can't stand beside.
ALSO = {
    ("loop", "program"): {"loop": {"goal": None}},
    ("agent", "command"): {"agent": {"adapter": None}},
    ("agent", "max_cost"): {"agent": {"price_per_turn": "1"}},
    ("metric", "produce"): {"metric": {"outputs": "x"}},
    ("metric", "outputs"): {"metric": {"produce": "x"}},
    ("guard", "pattern"): {"guard": {"tolerance": "1"}},
    ("guard", "tolerance"): {"guard": {"pattern": "(x)"}},
}
NUMBER = "a finite number"
COUNT = "a whole number from 1"
DURATION = "a duration such as 90s, 10m or 8h"
LEAVING = ("/etc/*", "~/x", "../x", "a/../b")

# section, key, bad texts, what the line says that it expected
BAD: List[Tuple[str, str, Tuple[str, ...], str]] = [
    ("loop", "name", ("", "a/b", "a b", ".hidden", "a..b", "a.lock", "a.", "-x", "x" * 65, "é"),
     "letters, digits"),
    ("loop", "goal", ("",), "some text"),
    ("loop", "program", ("", "/etc/passwd", "~/x", "../x", "a//b", "./a", "a/"),
     "a path relative to loop.ini's folder"),
    ("loop", "scope", ("",), "at least one word"),
    ("loop", "scope", LEAVING, "globs relative to loop.ini's folder"),
    ("loop", "scope", ("'src/**", "src/\\"), "balanced quotes"),
    *((section, key, ("one, two", "one,"), "without the comma after 'one'") for section, key in (
        ("loop", "scope"), ("loop", "seal"), ("loop", "share"), ("loop", "ignore"), ("agent", "writable"),
        ("metric", "outputs"), ("metric", "cache"), ("holdout", "files"))),
    ("loop", "seal", ("", "''"), "at least one word"),
    ("loop", "share", ("/", "../x", "a/./b"), "a path relative"),
    ("loop", "ignore", LEAVING, "globs relative"),
    ("loop", "memory", LEAVING, "a path relative"),
    ("loop", "branch", ("main", "master", "trunk", "develop", "release/1", "HEAD", "refs/heads/x",
                        "-x"), "protected"),
    ("loop", "branch", ("", "a b", "a..b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b", "/a", "a/",
                        "a//b", ".a", "a/.b", "a.", "a.lock", "a.lock/b", "a@{b", "@", "a\tb"),
     "a valid branch name"),
    ("loop", "iterations", ("", "0", "-1", "1.5", "1e3", "1_000", "٣", "２５", "ten", "9" * 10,
                            "0x10", "5 # five"), COUNT),
    ("loop", "patience", ("0", "no"), COUNT),
    ("loop", "give_ups", ("0",), COUNT),
    ("loop", "failures", ("0",), COUNT),
    ("loop", "check_in", ("0",), COUNT),
    ("loop", "max_files", ("0",), COUNT),
    ("loop", "target", ("", "nan", "inf", "-inf", "1e999", "1_000", "٣", "0x10", "1,5", "50%"),
     NUMBER),
    ("loop", "budget", ("", "8", "8hours", "8 h 3 m", "-8h", "0s", "1e3s", "8H", "٣s", "99999d",
                        "h", "nan s"), DURATION),
    ("loop", "simplify", ("", "maybe", "1", "y"), "no"),
    ("loop", "workers", ("0", "2", "auto"), "not yet supported"),
    ("loop", "seed", ("-1", "x", "1.0"), "a whole number from 0"),
    ("loop", "max_change", ("", "0", "-1", "1.5m", "10 mega", "0k"), "a size such as"),
    ("agent", "adapter", ("", "../x", "a/b"), "letters, digits"),
    ("agent", "command", ("", "''"), "at least one word"),
    ("agent", "command", ("a | b", "a && b", "a > x", "a ; b", "a 2>&1", "a < x", "a &"),
     "write sh -c '...'"),
    ("agent", "timeout", ("10", "soon"), DURATION),
    ("agent", "rework", ("-1", "two"), "a whole number from 0"),
    ("agent", "env", ("", "A=1", "$A", "1A", "A-B", "*"), "names of environment variables"),
    ("agent", "writable", ("",), "at least one word"),
    ("agent", "price_per_turn", ("-1", "1 EUR", "nan"), "number"),
    ("agent", "max_cost", ("-1",), "number"),
    ("metric", "command", ("", "'"), "word"),
    ("metric", "outputs", LEAVING, "globs relative"),
    ("metric", "setup", ("a && b",), "no shell runs it"),
    ("metric", "name", ("",), "some text"),
    ("metric", "pattern", ("size", "(a)(b)", "(?:a)"), "exactly one group"),
    ("metric", "pattern", ("", "(", "(?P<x", "*", "(a{99999999999999999999})", "(?u)(x)"),
     "a regular expression"),
    ("metric", "direction", ("", "down", "Minimize", "min"), "one of minimize, maximize"),
    ("metric", "timeout", ("0s",), DURATION),
    ("metric", "bounds", ("", "1", "1 2 3", "2 1", "1 1", "nan 1", "a b", "0 inf"),
     "LOW HIGH with LOW below HIGH"),
    ("metric", "min_gain", ("", "-1", "%", "1 percent", "-1%", "nan", "1%%", "inf%"),
     "a number from 0 up, or a percentage"),
    ("metric", "max_gain", ("-1",), "a number from 0 up"),
    ("metric", "home", ("", "fake"), "one of real, private"),
    ("metric", "cache", ("/x", ".."), "a path relative"),
    ("metric", "git", ("maybe",), "yes or no"),
    ("metric", "samples", ("0", "4", "-5", "many", "5.0"), "a whole number from 5"),
    ("metric", "confidence", ("", "0", "1", "2", "-1", "80%", "nan", "high"),
     "a number between 0 and 1"),
    ("metric", "network", ("off", ""), "one of allow, deny"),
    ("metric", "exclusive", ("2", "no", ""), "yes; anything else is not yet supported"),
    ("metric", "runner", ("",), "at least one word"),
    ("metric", "canary", ("",), "at least one word"),
    ("holdout", "direction", ("up",), "one of minimize, maximize"),
    ("holdout", "bounds", ("1",), "LOW HIGH"),
    ("holdout", "files", ("",), "at least one word"),
    ("isolation", "level", ("", "best", "Auto"), "one of auto, portable"),
    ("isolation", "require", ("", "everything", "files_sealed x"), "facts ("),
    ("guard", "tolerance", ("-1", "nan", "1%"), "number"),
    ("guard", "pattern", ("x",), "exactly one group"),
    ("guard", "timeout", ("1",), DURATION),
]


def write(folder: Path, text: Any, name: str = "loop.ini") -> str:
    """Write a loop.ini and return its path."""
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    (folder / name).write_bytes(data)
    return str(folder / name)


def load(folder: Path, text: Any, name: str = "loop.ini") -> Config:
    """Return the Config of a text."""
    return load_config(write(folder, text, name))


def problems(folder: Path, text: Any, name: str = "loop.ini") -> List[str]:
    """Return the lines in which a text is refused; each is one printable line about the file."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, name)
    lines = str(caught.value).split("\n")
    assert all(line.startswith((f"{name}: ", "... and ")) and line.isprintable() for line in lines), lines
    assert caught.value.exit_code == 2
    return lines


def the_problem(folder: Path, text: Any) -> str:
    """Return the one line in which a text is refused."""
    lines = problems(folder, text)
    assert len(lines) == 1, lines
    return lines[0]


def with_keys(*changes: Tuple[str, str, Optional[str]]) -> str:
    """Return a small loop.ini with keys set, or taken away where the text is None."""
    sections: Dict[str, Dict[str, str]] = {
        "loop": {"goal": "Make it smaller.", "scope": "src/**"},
        "metric": {"command": "python3 metric.py"}}
    for section, key, text in changes:
        name = "guard.tests" if section == "guard" else section
        keys = sections.setdefault(name, {"command": section[0]} if section in ("guard", "holdout")
                                   else {})
        keys.pop(key, None)
        if text is not None:
            keys[key] = text
    return "".join(f"[{name}]\n" + "".join(f"{key} = {text}\n" for key, text in keys.items())
                   for name, keys in sections.items())


def value_of(config: Config, section: str, key: str) -> Any:
    """Return a parsed key."""
    return getattr(config.guards[0] if section == "guard" else getattr(config, section), key)


def needed(section: str, key: str) -> List[Tuple[str, str, Optional[str]]]:
    """Return the changes that a key needs beside it."""
    return [(name, other, text) for name, keys in ALSO.get((section, key), {}).items()
            for other, text in keys.items()]


# ══ the reference ════════════════════════════════════════════════════════════════════════════════

def test_the_table_holds_every_key_of_the_schema() -> None:
    schemas = {**scalarloop.SECTIONS, "guard": scalarloop.GuardOptions}
    known = {(section, field.name) for section, schema in schemas.items()
             for field in scalarloop.fields(schema) if field.metadata}
    assert known == {row[:2] for row in KEYS}


def test_only_limits_may_change_between_sessions() -> None:
    limits = {(section, field.name) for section, schema in scalarloop.SECTIONS.items()
              for field in scalarloop.fields(schema) if field.metadata.get("limit")}
    assert limits == {("loop", key) for key in ("iterations", "target", "patience", "budget",
                                                "give_ups", "failures", "check_in")} | {
        ("agent", "price_per_turn"), ("agent", "max_cost")}


@pytest.mark.parametrize("section, key, text, parsed, default", KEYS,
                         ids=[f"{row[0]}.{row[1]}" for row in KEYS])
def test_a_key_is_parsed_and_has_its_default(tmp_path: Path, section: str, key: str, text: str,
                                             parsed: Any, default: Any) -> None:
    beside = needed(section, key)
    config = load(tmp_path, with_keys(*beside, (section, key, text)))
    assert value_of(config, section, key) == parsed
    plain = load(tmp_path, with_keys(*[(section, "command", section[0])
                                       for _ in beside or [0] if section in ("guard", "holdout")]))
    assert value_of(plain, section, key) == default


@pytest.mark.parametrize("section, key, texts, expected", BAD,
                         ids=[f"{row[0]}.{row[1]}" for row in BAD])
def test_a_bad_value_gives_one_line(tmp_path: Path, section: str, key: str, texts: Tuple[str, ...],
                                    expected: str) -> None:
    at = "guard.tests" if section == "guard" else section
    for text in texts:
        extra = [("agent", "price_per_turn", "1")] if key == "max_cost" else []
        beside = [row for row in needed(section, key) if row[1] != key]
        line = the_problem(tmp_path, with_keys(*extra, *beside, (section, key, text)))
        assert line.startswith(f"loop.ini: [{at}] {key}: "), line
        shown = text if len(text) <= 60 else text[:57] + "..."
        assert f" {shown!r} can't be used (expected " in line and line.endswith(")"), line
        assert expected in line, line


def test_a_long_bad_value_is_shown_shortened(tmp_path: Path) -> None:
    assert len(the_problem(tmp_path, with_keys(("loop", "iterations", "x" * 5000)))) < 200


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    lines = problems(tmp_path, """\
[loop]
goal =
iterations = none
scop = src/**
[agent]
adapter = claude
command = x
[metric]
direction = up
[guard.a]
pattern = (x)
[guard b]
command = x
[lop]
x = 1
""")
    starts = ["[loop] goal: ", "[loop] iterations: ", "[loop] scop: ", "[loop] scope: ",
              "[agent] adapter: ", "[metric] direction: ", "[metric] command: ",
              "[guard.a] command: ", "[guard.a] tolerance: ", "[guard b]: ", "[lop]: "]
    assert sorted(line[len("loop.ini: "):] for line in lines) == sorted(
        line[len("loop.ini: "):] for line in lines for start in starts
        if line.startswith("loop.ini: " + start))
    assert len(lines) == len(starts), lines


# ══ unknown and missing ══════════════════════════════════════════════════════════════════════════

@pytest.mark.parametrize("section, key, match", [
    ("loop", "scop", "scope"), ("loop", "iteration", "iterations"), ("loop", "Goal", "goal"),
    ("loop", "GOAL", "goal"), ("loop", "give-ups", "give_ups"), ("loop", "max_file", "max_files"),
    ("agent", "time_out", "timeout"), ("metric", "Direction", "direction"),
    ("metric", "output", "outputs"), ("holdout", "file", "files"), ("isolation", "levels", "level"),
    ("guard", "tolerence", "tolerance")])
def test_an_unknown_key_names_the_nearest(tmp_path: Path, section: str, key: str, match: str
                                          ) -> None:
    line = the_problem(tmp_path, with_keys((section, key, "1")))
    at = "guard.tests" if section == "guard" else section
    assert line == f"loop.ini: [{at}] {key}: unknown key (did you mean {match}?)"


def test_an_unknown_key_that_is_like_no_other_gets_the_list(tmp_path: Path) -> None:
    line = the_problem(tmp_path, with_keys(("isolation", "qqq", "1")))
    assert line == "loop.ini: [isolation] qqq: unknown key (expected one of: level, require)"


def test_a_key_of_another_section_is_sent_there(tmp_path: Path) -> None:
    line, = problems(tmp_path, "[loop]\ngoal = g\nscope = s\nmax_cost = 5\n[metric]\ncommand = m\n")
    assert line == "loop.ini: [loop] max_cost: unknown key (it belongs to [agent])"


def test_of_hundreds_of_problems_twenty_are_told(tmp_path: Path) -> None:
    lines = problems(tmp_path, "".join(f"word {n}\n" for n in range(500)))
    assert len(lines) == 21 and re.fullmatch(r"\.\.\. and 4\d\d more", lines[-1]), lines



@pytest.mark.parametrize("section, match", [
    ("Loop", "loop"), ("METRIC", "metric"), ("agents", "agent"), ("hold_out", "holdout"),
    (" loop ", "loop"), ("adaptor", "adapter")])
def test_an_unknown_section_names_the_nearest(tmp_path: Path, section: str, match: str) -> None:
    line = the_problem(tmp_path, MINIMAL + f"[{section}]\nx = 1\n")
    assert line == f"loop.ini: [{section}]: unknown section (did you mean {match}?)"


@pytest.mark.parametrize("section", ["DEFAULT", "default", "zzz"])
def test_default_is_a_section_like_any_unknown_one(tmp_path: Path, section: str) -> None:
    line = the_problem(tmp_path, f"[{section}]\niterations = 3\n" + MINIMAL)
    assert line.startswith(f"loop.ini: [{section}]: unknown section (expected one of: loop, ")


@pytest.mark.parametrize("section", ["guard", "guard.", "guard.a b", "guard.ä", "guard.a.b",
                                     "guard." + "x" * 41])
def test_a_guard_without_a_usable_name(tmp_path: Path, section: str) -> None:
    line = the_problem(tmp_path, MINIMAL + f"[{section}]\ncommand = x\n")
    assert line.startswith(f"loop.ini: [{section}]: ") and "guard.NAME" in line
    assert "letters" in line, line


@pytest.mark.parametrize("section", ["escape", "hooks"])
def test_a_section_of_a_later_version_is_not_ignored(tmp_path: Path, section: str) -> None:
    if section not in scalarloop.NOT_YET:
        pytest.skip(f"[{section}] is supported")
    line = the_problem(tmp_path, MINIMAL + f"[{section}]\nafter = 5\n")
    assert line == f"loop.ini: [{section}]: is not yet supported (leave it out)"


@pytest.mark.parametrize("text, missing", [
    ("", ["[loop] goal", "[loop] scope", "[metric] command"]),
    ("[loop]\n[metric]\n", ["[loop] goal", "[loop] scope", "[metric] command"]),
    ("[loop]\ngoal = x\nscope = y\n", ["[metric] command"]),
    ("[loop]\nscope = y\n[metric]\ncommand = z\n", ["[loop] goal"]),
    ("[loop]\ngoal = x\n[metric]\ncommand = z\n", ["[loop] scope"]),
    (MINIMAL + "[guard.a]\n[holdout]\n", ["[guard.a] command", "[holdout] command"])])
def test_what_is_missing_is_named(tmp_path: Path, text: str, missing: List[str]) -> None:
    lines = problems(tmp_path, text)
    assert sorted(line.split(": is missing (expected ")[0] for line in lines) == sorted(
        f"loop.ini: {name}" for name in missing)


def test_a_bad_value_is_not_also_called_missing(tmp_path: Path) -> None:
    the_problem(tmp_path, "[loop]\ngoal = x\nscope =\n[metric]\ncommand = z\n")
    the_problem(tmp_path, "[loop]\ngoal =\nscope = y\n[metric]\ncommand = z\n")
    the_problem(tmp_path, "[loop]\ngoal = x\nscope = y\n[metric]\ncommand =\n")


def test_the_smallest_file_is_enough(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "night-3.ini")
    assert (config.loop.name, config.loop.branch) == ("night-3", "scalarloop/night-3")
    assert config.folder == str(tmp_path)
    assert config.state_folder == str(tmp_path / ".scalarloop" / "night-3")


@pytest.mark.parametrize("name", ["my loop.ini", ".ini", "a..b.ini", "ü.ini"])
def test_a_file_name_that_is_no_run_name(tmp_path: Path, name: str) -> None:
    lines = problems(tmp_path, MINIMAL, name)
    assert len(lines) == 1 and "[loop] name: " in lines[0] and "the file's stem" in lines[0]
    assert load(tmp_path, MINIMAL.replace("[loop]", "[loop]\nname = x"), name).loop.name == "x"


# ══ contradictions ═══════════════════════════════════════════════════════════════════════════════

@pytest.mark.parametrize("changes, at, says", [
    ([("loop", "program", "p.md")], "[loop] program", "goal"),
    ([("agent", "adapter", "claude"), ("agent", "command", "x")], "[agent] adapter", "command"),
    ([("metric", "produce", "x")], "[metric] outputs", "produce"),
    ([("metric", "outputs", "x")], "[metric] outputs", "produce"),
    ([("metric", "pattern", "(x)"), ("metric", "name", "n")], "[metric] name", "pattern"),
    ([("guard", "pattern", "(x)")], "[guard.tests] tolerance", "pattern"),
    ([("guard", "tolerance", "1")], "[guard.tests] tolerance", "pattern"),
    ([("guard", "pattern", "(x)"), ("guard", "tolerance", "0")], "[guard.tests] tolerance",
     "above 0"),
    ([("agent", "max_cost", "1")], "[agent] max_cost", "price_per_turn"),
    ([("isolation", "level", "external")], "[isolation] level", "runner"),
    ([("metric", "min_gain", "5"), ("metric", "max_gain", "4")], "[metric] max_gain", "min_gain"),
    ([("metric", "min_gain", "5%"), ("metric", "max_gain", "5%")], "[metric] max_gain", "min_gain"),
    ([("loop", "target", "-1"), ("metric", "bounds", "0 *")], "[loop] target", "bounds"),
])
def test_keys_that_contradict_each_other(tmp_path: Path, changes: List[Tuple[str, str, str]],
                                         at: str, says: str) -> None:
    line = the_problem(tmp_path, with_keys(*changes))
    assert line.startswith(f"loop.ini: {at}: ") and says in line and "(expected " in line, line


# ══ the file ═════════════════════════════════════════════════════════════════════════════════════

def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + MINIMAL.encode()).loop.goal == "Make it smaller."


def test_windows_line_ends_are_no_problem(tmp_path: Path) -> None:
    text = MINIMAL + "iterations = 3\n"
    text = text.replace("[metric]\ncommand", "[metric]\r\ncommand").replace(
        "iterations = 3\n", "direction = maximize\n").replace("\r\n", "\n").replace("\n", "\r\n")
    config = load(tmp_path, text)
    assert config.metric.direction == "maximize" and config.loop.scope == ("src/**",)
    assert config.loop.goal == "Make it smaller."


def test_windows_line_ends_do_not_stay_in_a_goal_of_several_lines(tmp_path: Path) -> None:
    text = "[loop]\r\ngoal = one\r\n  two\r\nscope = a\r\n  b\r\n[metric]\r\ncommand = x\r\n"
    config = load(tmp_path, text)
    assert config.loop.goal == "one\ntwo" and config.loop.scope == ("a", "b")


@pytest.mark.parametrize("data, says", [
    (b"[loop]\ngoal = \xff\xfe\n", "is not UTF-8 text (byte 14)"),
    (MINIMAL.encode("utf-16"), "is not UTF-8 text"),
    (b"x" * (2 << 20), "is larger than 1 MB"),
    (b"\xff" * (2 << 20), "is larger than 1 MB"),
    (b"[\0]\niterations = 3\n" + MINIMAL.encode(), "NUL"),
    (MINIMAL.encode() + b"\0" * 100, "NUL"),
])
def test_a_file_that_is_no_text(tmp_path: Path, data: bytes, says: str) -> None:
    assert says in the_problem(tmp_path, data)


@pytest.mark.parametrize("text, says", [
    ("goal = x\n" + MINIMAL, "line 1"),
    ("\n\nhello\n" + MINIMAL, "line 3"),
    (MINIMAL + "what is this\n", "line 6"),
    (MINIMAL + "= 3\n", "line 6"),
    ("[loop\ngoal = x\n", "line 1"),
    ("[]\n" + MINIMAL, "line 1"),
    ("  goal = x\n" + MINIMAL, "line 1"),
])
def test_a_line_that_is_neither_section_nor_key(tmp_path: Path, text: str, says: str) -> None:
    line = the_problem(tmp_path, text)
    assert says in line and "(expected " in line and len(line) < 160, line


def test_several_lines_that_can_not_be_read_are_all_named(tmp_path: Path) -> None:
    lines = problems(tmp_path, MINIMAL + "first\n[agent]\nsecond\n")
    assert [" line 6: " in lines[0], " line 8: " in lines[1]] == [True, True], lines


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.ini", tmp_path):
        with pytest.raises(ConfigError) as caught:
            load_config(str(path))
        assert "can't be read" in str(caught.value) and str(path) in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "loop.ini")
    holder = os.open(tmp_path / "loop.ini", os.O_RDWR)      # so that a wrong open can't hang
    os.write(holder, b"x" * 10)
    os.set_blocking(holder, False)
    pid = os.fork() if hasattr(os, "fork") else 0
    if pid == 0:
        import signal
        signal.alarm(5)
        try:
            load_config(str(tmp_path / "loop.ini"))
        except ConfigError:
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    os.close(holder)
    assert status == 0


@pytest.mark.parametrize("text, line", [
    ("[loop]\ngoal = a\ngoal = b\nscope = x\n[metric]\ncommand = x\n",
     "loop.ini: [loop] goal: stands twice, again in line 3 (expected once)"),
    (MINIMAL + "[loop]\niterations = 3\n",
     "loop.ini: [loop]: stands twice, again in line 6 (expected once)"),
    (MINIMAL + "[guard.a]\ncommand = x\n[guard.a]\ncommand = y\n",
     "loop.ini: [guard.a]: stands twice, again in line 8 (expected once)"),
])
def test_duplicates(tmp_path: Path, text: str, line: str) -> None:
    assert the_problem(tmp_path, text) == line


def test_an_adapter_option_twice_in_other_letters(tmp_path: Path) -> None:
    line = the_problem(tmp_path, MINIMAL + "[adapter]\nmodel = a\nMODEL = b\n")
    assert line.startswith("loop.ini: [adapter] MODEL: ") and "(expected " in line


# ══ values ═══════════════════════════════════════════════════════════════════════════════════════

def test_interpolation_is_off(tmp_path: Path) -> None:
    goal = "100 % of %(name)s, ${loop:name} and %%"
    config = load(tmp_path, with_keys(("loop", "goal", goal)) + "[adapter]\nform = %Y-%m\n")
    assert config.loop.goal == goal
    assert dict(config.adapter) == {"SCALARLOOP_OPT_FORM": "%Y-%m"}


def test_a_value_over_several_lines(tmp_path: Path) -> None:
    config = load(tmp_path, """\
[loop]
goal = First line.
    Second line: with = and # in it.

    After an empty one.
# a comment
scope =
    src/**
    # another comment
    lib/*.py
[metric]
command = python3 -c
    'print(1)'
""")
    assert config.loop.goal == (
        "First line.\nSecond line: with = and # in it.\n\nAfter an empty one.")
    assert config.loop.scope == ("src/**", "lib/*.py")
    assert config.metric.command == ("python3", "-c", "print(1)")


@pytest.mark.parametrize("section, key, text", [
    ("loop", "scope", "src/** # all of it"), ("metric", "command", "python3 metric.py # fast"),
    ("metric", "command", "python3 metric.py ; fast"), ("loop", "share", "data #x"),
    ("loop", "seal", "data # x"), ("agent", "command", "agent  #x")])
def test_a_comment_after_a_value_is_not_taken_for_words(tmp_path: Path, section: str, key: str,
                                                        text: str) -> None:
    line = the_problem(tmp_path, with_keys((section, key, text)))
    assert line.startswith(f"loop.ini: [{section}] {key}: "), line


@pytest.mark.parametrize("text, words", [
    ("grep -c '#define' src/a.c", ("grep", "-c", "#define", "src/a.c")),
    ('"my prog" "a \\"b\\"" c\\ d', ("my prog", 'a "b"', "c d")),
    ("sh -c 'a | b > c # d'", ("sh", "-c", "a | b > c # d")),
    ("x a#b C#", ("x", "a#b", "C#")),
    ("x $HOME *.py", ("x", "$HOME", "*.py")),
    ("x 'a|b' --x=1&2", ("x", "a|b", "--x=1&2"))])
def test_a_command_is_split_as_a_shell_would(tmp_path: Path, text: str, words: Tuple[str, ...]
                                             ) -> None:
    assert load(tmp_path, with_keys(("metric", "command", text))).metric.command == words


def test_an_empty_argument_of_a_command_is_an_argument(tmp_path: Path) -> None:
    config = load(tmp_path, with_keys(("metric", "command", "prog --label '' x")))
    assert config.metric.command == ("prog", "--label", "", "x")


def test_words_after_a_section_name_are_not_lost(tmp_path: Path) -> None:
    line = the_problem(tmp_path, MINIMAL.replace("[loop]", "[loop] iterations = 3"))
    assert "line 1" in line


def test_an_indented_key_is_not_swallowed_by_the_value_above(tmp_path: Path) -> None:
    line = the_problem(tmp_path, MINIMAL.replace("scope", "  budget = 8h\nscope"))
    assert "line 3" in line and "budget" in line, line


def test_prose_in_a_goal_may_hold_equal_signs(tmp_path: Path) -> None:
    goal = "x = 3 is better than\n  y = 4, and\n  so on"
    assert load(tmp_path, with_keys(("loop", "goal", goal))).loop.goal.startswith("x = 3")


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\x0bb", "a\u2028b", "a\x85b", "a\x0cb",
                                  "\u202eab"])
def test_odd_characters_in_names_are_escaped(tmp_path: Path, name: str) -> None:
    problems(tmp_path, MINIMAL + f"{name} = 1\n")
    problems(tmp_path, MINIMAL + f"[{name}]\nx = 1\n")
    problems(tmp_path, MINIMAL + f"[adapter]\n{name}! = 1\n")


@pytest.mark.parametrize("text", ["[[a](x)", "(a||b)", "[a&&b](x)"])
def test_a_pattern_that_python_warns_about_warns_nobody(tmp_path: Path, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, with_keys(("metric", "pattern", text)))


def test_a_deeply_nested_pattern(tmp_path: Path) -> None:
    the_problem(tmp_path, with_keys(("metric", "pattern", "(?:" * 5000 + "(x)" + ")" * 5000)))


def test_the_adapter_section_takes_free_keys(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + "[adapter]\nmodel = opus = 4\nmax-turns = 60\nempty =\n")
    assert dict(config.adapter) == {"SCALARLOOP_OPT_MODEL": "opus = 4",
                                    "SCALARLOOP_OPT_MAX_TURNS": "60", "SCALARLOOP_OPT_EMPTY": ""}
    line = the_problem(tmp_path, MINIMAL + "[adapter]\na b = 1\n")
    assert line == "loop.ini: [adapter] a b: can't be an option (expected letters, digits and '_')"


def test_the_whole_config_is_json_and_equal_to_itself(tmp_path: Path) -> None:
    config = load(tmp_path, EVERYTHING)
    resolved = config.resolved()
    assert scalarloop.changed_keys(resolved, resolved) == ([], [])
    scalarloop.canonical(resolved)
    other = load(tmp_path, EVERYTHING.replace("iterations = 7", "iterations = 8")
                 .replace("seed = 42", "seed = 43")).resolved()
    assert scalarloop.changed_keys(resolved, other) == (["[loop] iterations"], ["[loop] seed"])


# ══ fuzz ═════════════════════════════════════════════════════════════════════════════════════════

def everything() -> str:
    """Return a loop.ini that has nearly every key."""
    leave = {("loop", "program"), ("agent", "adapter"), ("metric", "name")}
    return with_keys(*[row[:3] for row in KEYS if row[:2] not in leave]) + "[adapter]\nmodel = x\n"


EVERYTHING = everything()
ODD = ["\0", "\r", "\n", "\x0b", "\x1b[2J", "\u2028", "\ufeff", "=", "[", "]", "#", ";", "%", "'",
       '"', "\\", " ", "\t", ":", "é", "\U0001f600", "..", "/", "~", "*", "{99999999999}", "(", ")",
       "(?", "%(x)s", "1e999", "nan", "-", "9" * 30, "[loop]", "\n[", "\n ", "\n=", "[DEFAULT]\n"]


def mutate(dice: random.Random, text: str) -> bytes:
    """Return a loop.ini with a few random faults."""
    lines = text.split("\n")
    for _ in range(dice.randint(1, 5)):
        at = dice.randrange(len(lines))
        line = lines[at]
        kind = dice.randrange(9)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(dice.randrange(len(lines) + 1), line)
        elif kind == 2:
            lines[at] = lines[at - 1]
        elif kind == 3:
            lines[at] = " " * dice.randint(1, 4) + line
        elif kind == 4:
            lines[at] = line.split("=")[0] + "= " + dice.choice(ODD)
        elif kind == 5:
            lines[at] = line.swapcase()
        elif kind == 6:
            other = dice.choice(lines)
            lines[at] = line.split("=")[0] + "=" + other.partition("=")[2]
        else:
            cut = dice.randint(0, len(line))
            lines[at] = line[:cut] + dice.choice(ODD) + line[cut + dice.randint(0, 3):]
        lines = lines or [""]
    data = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    if data and dice.random() < .1:
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


def fuzz(folder: Path, seed: int, count: int) -> None:
    """Hold every mutated text to it: a Config that can stand in the ledger, or clear lines."""
    dice = random.Random(seed)
    outcomes = {"config": 0, "refused": 0}
    for number in range(count):
        data = mutate(dice, EVERYTHING if number % 3 else MINIMAL)
        (folder / "loop.ini").write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                config = load_config(str(folder / "loop.ini"))
        except ConfigError as error:
            outcomes["refused"] += 1
            lines = str(error).split("\n")
            assert len(lines) <= 21 and all(line.isprintable() and re.match(
                r"loop\.ini: .|\.\.\. and \d+ more$", line) for line in lines), (data, lines)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, text {number}: {error!r} from {data!r}") from error
        else:
            outcomes["config"] += 1
            scalarloop.canonical(config.resolved())
    assert min(outcomes.values()) > count // 50, outcomes


def test_a_mutated_file_is_a_config_or_a_config_error(tmp_path: Path) -> None:
    fuzz(tmp_path, 1, 1500)


@pytest.mark.slow
def test_many_mutated_files(tmp_path: Path) -> None:
    fuzz(tmp_path, 2, 10_000)
