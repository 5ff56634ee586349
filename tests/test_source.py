"""README and source stay true: the bounds that the code keeps, and what the page says of it.

Nothing here is about behaviour; other tests hold that. These fail when a name, a default or a number
changes in one place and not in the other.
"""
from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Set

import pytest

import scalarloop
from conftest import ROOT, Project, lower_by, pin

README = (ROOT / "README.md").read_text(encoding="utf-8")
CORE = ROOT / "scalarloop.py"
ADAPTERS = sorted((ROOT / "adapters").glob("*.py"))
SOURCES = [CORE, *ADAPTERS]
TOP_LEVEL = {"README.md", "adapters", "examples", "scalarloop.py", "setup.cfg", "tests"}
LONGEST_LINE, LONGEST_FUNCTION = 100, 60

# What scalarloop.py and the adapters may import on 3.9, which has no sys.stdlib_module_names.
STANDARD_3_9 = """
    __future__ argparse ast base64 binascii collections configparser contextlib copy ctypes dataclasses
    datetime difflib email enum errno fcntl fnmatch functools glob hashlib heapq hmac html http
    importlib inspect io itertools json locale logging math mmap operator os pathlib platform pprint
    queue random re resource secrets select selectors shlex shutil signal socket ssl stat statistics
    string struct subprocess sys sysconfig tempfile termios textwrap threading time tomllib traceback
    types typing unicodedata urllib uuid warnings weakref xml zipfile zlib
""".split()


# ── the source ──────────────────────────────────────────────────────────────────────────────────

def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), path.name)


def functions_of(tree: ast.AST) -> Iterator[Any]:
    return (node for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def dotted(node: ast.AST) -> str:
    """Return `os.path.join` for such an expression, "" for any other."""
    parts: List[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def of_each(paths: List[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


@of_each(SOURCES)
def test_the_standard_library_is_all_that_is_imported(path: Path) -> None:
    known = set(getattr(sys, "stdlib_module_names", STANDARD_3_9))
    beside = {other.stem for other in ADAPTERS} if path in ADAPTERS else set()
    for node in ast.walk(tree_of(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] in known | beside, f"{path.name}:{node.lineno}: {name}"


def test_programs_are_started_in_one_place() -> None:
    starters = ("os.system", "os.popen", "os.startfile", "os.fork", "os.forkpty", "pty.spawn")
    calls = [dotted(node.func) for node in ast.walk(tree_of(CORE)) if isinstance(node, ast.Call)]
    assert [call for call in calls if call.startswith("subprocess.")] == ["subprocess.Popen"]
    assert not [call for call in calls
                if call in starters or call.startswith(("os.exec", "os.spawn", "os.posix_spawn"))]
    constants = {"subprocess.DEVNULL", "subprocess.PIPE", "subprocess.STDOUT", "subprocess.Popen"}
    used = {dotted(node) for node in ast.walk(tree_of(CORE)) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("subprocess.")} <= constants


def test_git_is_spelled_once() -> None:
    tree = tree_of(CORE)
    looked_up = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call)
                 and dotted(node.func) == "shutil.which" and is_git(node.args[0])]
    leading = [node.lineno for node in ast.walk(tree)
               if isinstance(node, (ast.List, ast.Tuple)) and node.elts and is_git(node.elts[0])]
    assert len(looked_up) == 1 and leading == []


def is_git(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == "git"


@of_each(SOURCES)
def test_lines_and_functions_are_of_bounded_length(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    wide = [f"{path.name}:{number}: {len(line)} columns"
            for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]
    long = [f"{path.name}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
            for node in functions_of(tree_of(path))
            if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION]
    blank = [f"{path.name}:{number}: ends in a blank" for number, line in enumerate(lines, 1)
             if line != line.rstrip()]
    assert wide + long + blank == []


@of_each(SOURCES)
def test_what_the_source_does_without(path: Path) -> None:
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Assert):
            found.append(f"{path.name}:{node.lineno}: an assert is no check")
        if isinstance(node, ast.keyword) and node.arg == "shell":
            found.append(f"{path.name}:{node.value.lineno}: shell=")
        if isinstance(node, ast.Call) and dotted(node.func) in ("eval", "exec", "os.chdir"):
            found.append(f"{path.name}:{node.lineno}: {dotted(node.func)}")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{path.name}:{node.lineno}: a bare except")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.search("TO" + "DO|FIX" + "ME|XX" + "X", line):
            found.append(f"{path.name}:{number}: unfinished")
    assert found == []


def test_every_public_name_of_the_core_has_a_docstring_and_annotations() -> None:
    def look(body: List[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            name = prefix + node.name
            if not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{node.lineno}: {name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from look(node.body, name + ".")
            else:
                yield from (f"{node.lineno}: {name}: {arg} has no annotation"
                            for arg in unannotated(node))

    assert list(look(tree_of(CORE).body, "")) == []
    assert all(ast.get_docstring(tree_of(path)) for path in SOURCES)


def unannotated(node: ast.FunctionDef) -> List[str]:
    spec = node.args
    given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs,
             *(arg for arg in (spec.vararg, spec.kwarg) if arg)]
    missing = [arg.arg for arg in given if not arg.annotation and arg.arg not in ("self", "cls")]
    returns = node.returns is not None or node.name == "__init__"
    return missing + ([] if returns else ["what it returns"])


def project_files() -> List[str]:
    """Return what is tracked, or would be; skip where this is no repository."""
    done = subprocess.run(["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached",
                           "--others", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git repository: the list of files can't be had")
    names = [name.decode() for name in done.stdout.split(b"\0")[:-1]]
    return [name for name in names if (ROOT / name).is_file()]


def test_the_top_level_is_what_was_agreed() -> None:
    found = {name.split("/")[0] for name in project_files()}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL


def test_files_speak_of_the_project_alone() -> None:
    """No path of some machine, no host of a package registry."""
    places = re.compile("/" + "(?:root|work|users|Users)/|" + "npmjs" + r"\.|pypi" + r"\.org|"
                        "python" + "hosted|/home/[a-z]")
    allowed = {"tests/agents", "tests/test_source.py"}      # agents look for such places
    found = [f"{name}:{number}: {line.strip()[:80]}" for name in project_files()
             if not name.startswith(tuple(allowed))
             for number, line in enumerate(
                 (ROOT / name).read_text(encoding="utf-8", errors="replace").splitlines(), 1)
             if places.search(line)]
    assert found == []


# ── README: its tables ──────────────────────────────────────────────────────────────────────────

def section(title: str, level: int = 2) -> str:
    """Return the text under a heading, up to the next one of that level or above."""
    head = re.escape("#" * level + " " + title)
    match = re.search(rf"^{head}$\n(.*?)(?=^#{{1,{level}}} |\Z)", README, re.M | re.S)
    assert match, f"README has no heading {title!r}"
    return match[1]


def rows_of(text: str, first: str) -> List[List[str]]:
    """Return the cells of the table whose first heading is `first`."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert rows and len({len(row) for row in rows}) == 1, f"table {first!r} is uneven"
    return rows


def spans(text: str) -> List[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


SCHEMAS = {"[loop]": scalarloop.LoopOptions, "[agent]": scalarloop.AgentOptions,
           "[metric]": scalarloop.MetricOptions, "[guard.NAME]": scalarloop.GuardOptions,
           "[holdout]": scalarloop.HoldoutOptions, "[isolation]": scalarloop.IsolationOptions}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_is_there_with_its_default(name: str) -> None:
    """A default is written as loop.ini would say it: its own parser reads it."""
    fields = {field.name: field for field in dataclasses.fields(SCHEMAS[name]) if field.metadata}
    told = {}
    for cell, default, meaning in rows_of(section(f"`{name}`", 3), "key"):
        key = spans(cell)[0]
        told[key] = default
        assert key in fields, f"{name} {key}: no such key"
        field = fields[key]
        parse = field.metadata["parse"]
        if default == "-":
            assert field.default in (None, "", ()), f"{name} {key}: has the default {field.default}"
        else:
            assert parse(spans(default)[0]) == field.default, f"{name} {key}: {default}"
        assert ("†" in cell) == field.metadata["limit"], f"{name} {key}: † is wrong"
        assert ("not yet supported" in meaning) == is_not_yet(parse), f"{name} {key}"
    assert sorted(told) == sorted(fields)


def is_not_yet(parse: Callable[[str], Any]) -> bool:
    """Tell whether a key takes nothing but its default so far."""
    try:
        parse("0")
    except ValueError as error:
        return "not yet supported" in str(error)
    return False


def test_every_section_is_there() -> None:
    titles = re.findall(r"^### `(\[.*\])`$", section("loop.ini"), re.M)
    assert sorted(titles) == sorted([*SCHEMAS, "[adapter]"])
    assert {title.strip("[]") for title in SCHEMAS} == {*scalarloop.SECTIONS, "guard.NAME"}
    line = next(line for line in section("loop.ini").splitlines() if "refused by name" in line)
    assert {span.strip("[]") for span in spans(line)} == set(scalarloop.NOT_YET)


def test_every_verdict_and_reason_is_there() -> None:
    rows = rows_of(section("Verdicts and reasons"), "verdict")
    told = [(spans(reason)[0], spans(verdict)[0]) for verdict, reason, _ in rows]
    assert sorted(told) == sorted((reason.value, verdict.value)
                                  for reason, verdict in scalarloop.VERDICT_OF.items())
    assert {verdict for _, verdict in told} == {verdict.value for verdict in scalarloop.Verdict}


def test_no_reason_is_named_that_there_is_not() -> None:
    reasons = {reason.value for reason in scalarloop.Reason}
    families = {reason.split(".")[0] for reason in reasons}
    named = {span for span in spans(without_fences(README))
             if re.fullmatch(r"[a-z]+\.[a-z_]+", span) and span.split(".")[0] in families}
    assert named - {"agent.log", "metric.log", "store.git"} == reasons


def exit_codes() -> Set[int]:
    classes = [value for value in vars(scalarloop).values() if isinstance(value, type)
               and issubclass(value, scalarloop.ScalarLoopError)]
    return {0, *(one.exit_code for one in classes), *scalarloop.STOP_EXIT.values()}


def test_exit_codes_and_stops() -> None:
    text = section("Commands")
    assert [int(row[0]) for row in rows_of(text, "exit")] == sorted(exit_codes())
    told = {spans(stop)[0]: int(code) for stop, code, _ in rows_of(text, "stop")}
    assert told == {stop: scalarloop.STOP_EXIT.get(stop, 0) for stop in scalarloop.STOP_TEXT}
    failed = next(row[1] for row in rows_of(text, "exit") if row[0] == "1")
    assert set(spans(failed)) == {stop for stop, code in told.items() if code == 1}
    for place in (scalarloop.USAGE, scalarloop.__doc__ or ""):
        line = re.search(r"exit(?: codes)?: (.*?)(?:\n\n|\Z)", place, re.I | re.S)
        assert line and [int(code) for code in re.findall(r"(?<![\w.])\d+", line[1])] \
            == sorted(exit_codes())


def test_commands_and_options() -> None:
    text = section("Commands")
    told = [spans(row[0])[0] for row in rows_of(text, "command")[1:]]
    assert sorted(told) == sorted(set(scalarloop.COMMANDS) - {"run"})
    options = {spans(row[0])[0] for row in rows_of(text, "option")}
    assert options == set(re.findall(r"--[a-z]+", scalarloop.USAGE))
    assert {*told} == set(re.findall(r"^  ([a-z]+) ", scalarloop.USAGE, re.M))
    for word in re.findall(r"python3? scalarloop\.py ([^\s`]+)", README):
        assert word in scalarloop.COMMANDS or word.endswith(".ini"), f"no command {word}"
    bench = (ROOT / "tests" / "bench" / "noise.py").read_text(encoding="utf-8")
    for span in spans(without_fences(README)):
        if span.startswith("--"):
            assert span in options or span in bench, f"no option {span}"


def test_levels_and_facts() -> None:
    text = section("Isolation")
    assert [spans(row[0])[0] for row in rows_of(text, "level")] == list(scalarloop.LEVELS)
    facts = rows_of(text, "fact")
    assert [spans(row[0])[0] for row in facts] == list(scalarloop.FACTS)


@pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")
def test_the_facts_of_each_level_are_those_that_are_tested() -> None:
    tested = importlib.import_module("test_isolation")
    held = {"portable": {"daemons_killed", "usable"},
            **{level: set(facts) | {"network_off"} for level, facts in tested.HELD.items()}}
    for fact, _, *cells in rows_of(section("Isolation"), "fact"):
        for level, cell in zip(("portable", "landlock", "namespaces"), cells):
            assert (cell == "yes") == (spans(fact)[0] in held[level]), (fact, level)


def test_environment_variables() -> None:
    told = {spans(row[0])[0] for row in rows_of(section("loop.ini"), "variable")}
    named = set(re.findall(r"SCALARLOOP_[A-Z_]+", CORE.read_text(encoding="utf-8")))
    assert told == named - {"SCALARLOOP_OPT_"}
    for path in ADAPTERS:
        for name in re.findall(r"SCALARLOOP_[A-Z_]+", path.read_text(encoding="utf-8")):
            assert name in told or name.startswith("SCALARLOOP_OPT_") or name == "SCALARLOOP_", name
    text = re.sub(r"\s+", " ", section("loop.ini"))
    for name in {*scalarloop.AGENT_VARIABLES, *scalarloop.METRIC_VARIABLES} - {
            "*_proxy", "*_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
            "NODE_EXTRA_CA_CERTS"}:     # "proxy and certificate variables"
        assert name in text, name


def test_every_adapter_is_in_the_table() -> None:
    rows = {spans(row[0])[0]: row for row in rows_of(section("Which agent"), "adapter")
            if spans(row[0])}
    programs = {path.stem for path in ADAPTERS if "def main" in path.read_text(encoding="utf-8")}
    assert set(rows) == programs
    for name, row in rows.items():
        text = (ROOT / "adapters" / f"{name}.py").read_text(encoding="utf-8")
        for option in re.findall(r"(?:\[adapter\] |, `|or `)([a-z_]+) = ", row[2]):
            assert option in {*text.split('"'), *re.findall(r"[a-z_]+", text)}, (name, option)


def test_ledger_records_and_their_fields(project: Project) -> None:
    """A metric that looks exact at the base and isn't elsewhere makes records of every type."""
    project.write("metric.py", """
        import os, pathlib
        value = float(pathlib.Path("src/value.txt").read_text())
        noise = int(os.environ["SCALARLOOP_SEED"]) % 1000 / 1000 if value < 100 else 0
        print("METRIC value=%r" % (value + noise))
    """)
    project.turns(lower_by(50))
    project.commit()
    assert project.run().code == 0
    again = project.run("--more", "1")
    assert again.code == 0, again
    common = set(spans(next(line for line in section("The record").splitlines()
                            if line.startswith("`SCALARLOOP_LEDGER_KEY` names."))))
    common -= {"SCALARLOOP_LEDGER_KEY"}
    assert common == {"v", "seq", "time", "type", "prev", "hash"}
    told = {spans(name)[0]: set(spans(names))
            for name, names in rows_of(section("The record"), "type")}
    found: Dict[str, Set[str]] = {}
    for record in project.ledger():
        found.setdefault(record["type"], set()).update(set(record) - common)
    assert found == told


def test_the_state_folder_holds_what_is_said(finished: Project) -> None:
    text = section("The record")
    names = {path.name for path in finished.state.iterdir()}
    names |= {path.name for path in (finished.state / "iterations" / "0001").iterdir()}
    assert {f"{name}/" if name == "iterations" else name for name in names} - {
        span if not span.startswith("iterations/") else "iterations/" for span in spans(text)
    } == set()


# ── README: what it promises ────────────────────────────────────────────────────────────────────

def names_of_tests(path: Path) -> Set[str]:
    return {node.name for node in functions_of(tree_of(path)) if node.name.startswith("test_")}


def test_promises_name_tests_that_exist() -> None:
    named = set()
    for _, tests in rows_of(section("What it promises"), "promise"):
        assert spans(tests)
        for span in spans(tests):
            file, _, name = span.partition("::")
            assert name in names_of_tests(ROOT / "tests" / file), span
            named.add(name)
    assert named


def test_every_file_that_is_named_exists() -> None:
    for span in spans(without_fences(README)):
        for word in re.findall(r"(?:tests|adapters|examples|\.ci)/[\w./-]*", span):
            if "NAME" not in word:
                assert (ROOT / word).exists(), word


class Fate(NamedTuple):
    """How the acts of one hostile agent end: reasons, and whether some are kept."""

    reasons: Set[str]
    harmless: bool
    unstopped: bool


def test_the_threat_model_agrees_with_the_attacks() -> None:
    """Each row is an agent's file; its reasons are exactly those of the table of attacks."""
    attacks = importlib.import_module("test_attacks")
    fates: Dict[str, Fate] = {}
    for param in attacks.TABLE:
        row = param.values[0]
        file, act = row.act.split(".")
        number = file.split("_")[0]
        fate = fates.get(number, Fate(set(), False, False))
        kept = row.expected == attacks.KEPT and not act.startswith("honest")
        fates[number] = Fate(
            fate.reasons | ({row.expected.split(" ")[1]} if row.expected != attacks.KEPT else set()),
            fate.harmless or kept and row.night != "trusting",
            fate.unstopped or kept and row.night == "trusting")
    told = {}
    reasons = {reason.value for reason in scalarloop.Reason}
    for number, _, end in rows_of(section("Threat model"), "#"):
        told[number] = Fate({span for span in spans(end) if span in reasons}, "no effect" in end,
                            "**not stopped**" in end)
    assert {number: told.get(number) for number in fates} == fates
    assert sorted(told) == sorted(fates)


@pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")
def test_the_threats_by_level_are_those_that_were_run() -> None:
    levels = importlib.import_module("test_levels")
    rows = rows_of(section("Threat model"), "it")
    assert [row[0] for row in rows] == list(levels.THREATS)
    for says, *cells in rows:
        assert dict(zip(levels.LEVELS, cells)) == levels.THREATS[says], says


# ── README: its session and examples ────────────────────────────────────────────────────────────

class Clone(NamedTuple):
    """A fresh clone in which the session of README was run."""

    root: Path
    output: Dict[str, List[str]]


def copy_project(target: Path) -> None:
    for name in project_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def run_shell(script: str, cwd: Path) -> str:
    """Run a block of README as a reader would, in a shell, with this Python as python3."""
    lines = f'set -eu\npython3() {{ "{sys.executable}" "$@"; }}\n{script}'
    done = subprocess.run(["sh", "-c", lines], cwd=cwd, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=300)
    output = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, output
    return output


def blocks(language: str) -> List[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """Run README's commands in a fresh clone, and keep what they print."""
    folder = tmp_path_factory.mktemp("session")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pin(monkeypatch, folder)
        project = Project(folder / "scalarloop", folder)
        project.root.mkdir()
        copy_project(project.root)
        project.git("init", "-q")
        project.commit("start")
        commands = re.findall(r"^\$ (.*)$", blocks("console")[0], re.M)
        yield Clone(project.root, {command: run_shell(command, project.root).splitlines()
                                   for command in commands})


def normalised(line: str) -> str:
    """Take out of a line what differs from run to run and from machine to machine."""
    line = re.sub(r"\s+(\d+\.\d+s|\d+m\d+s)(?=  )", " <seconds>", line)
    line = re.sub(r"[0-9a-f]{64}", "<hash>", line)
    line = re.sub(r"(?<= on )[0-9a-f]{12}", "<commit>", line)
    return re.sub(r"^isolation .*", "isolation <level>", line)


def test_the_session_is_what_the_program_prints(clone: Clone) -> None:
    parts = re.split(r"^\$ (.*)\n", blocks("console")[0], flags=re.M)[1:]
    for command, shown in zip(parts[0::2], parts[1::2]):
        printed = [normalised(line) for line in clone.output[command]]
        runs = [[normalised(line) for line in run.strip("\n").splitlines()]
                for run in re.split(r"^\[\.\.\.\]$", shown, flags=re.M)]
        at = 0
        for number, run in enumerate(runs):
            starts = [n for n in range(at, len(printed) - len(run) + 1)
                      if printed[n:n + len(run)] == run]
            assert starts, (command, run, clone.output[command])
            assert number or starts[0] == 0, "the session begins before its first line"
            at = starts[0] + len(run)
        assert not runs[-1] or at == len(printed), "the session ends after its last line"


def test_somebody_else_can_check_the_session_again(clone: Clone, tmp_path: Path) -> None:
    """The three blocks of README, in a clone of the user's repository that lies elsewhere."""
    push, check = blocks("sh")
    other = Project(tmp_path / "other", tmp_path)
    other.git("init", "-q", "--bare", str(tmp_path / "server"), cwd=tmp_path)
    mine = Project(clone.root, tmp_path)
    mine.git("remote", "add", "origin", str(tmp_path / "server"))
    mine.git("push", "-q", "origin", "HEAD:refs/heads/main")
    run_shell(push, clone.root)
    other.git("clone", "-q", "--branch", "main", str(tmp_path / "server"), str(other.root),
              cwd=tmp_path)
    printed = run_shell(check, other.root)
    assert "verified: the record is whole" in printed and "warning" not in printed
    assert len(re.findall(r"replay .*, exactly", printed)) == 7, printed
    snippet = next(block for block in blocks("python"))
    done = subprocess.run([sys.executable, "-c", snippet], cwd=other.root, stdout=subprocess.PIPE)
    assert done.returncode == 0
    head = clone.output[next(iter(clone.output))][-1].split()
    assert done.stdout.decode() == f"{int(head[1]) + 1} records, head {head[2]}\n"


def test_examples_of_loop_ini_are_good_ones(tmp_path: Path) -> None:
    examples = blocks("ini")
    assert len(examples) == 2
    for number, text in enumerate(examples):
        path = tmp_path / f"example{number}.ini"
        path.write_text(text, encoding="utf-8")
        scalarloop.load_config(str(path))


def test_the_first_screen_holds_what_a_reader_comes_for() -> None:
    head = "\n".join(README.splitlines()[:35])
    for words in ("$ python3 scalarloop.py examples/bundle/loop.ini", "baseline  ", "keep  ",
                  "violation  ", "guard_failed  ", "turns  ", "python3 scalarloop.py verify loop.ini",
                  "python3 -m pytest -q tests"):
        assert words in head, words


def test_the_example_is_cut_from_the_same_cloth() -> None:
    """The bundle's own loop.ini names no key that README doesn't explain."""
    config = scalarloop.load_config(str(ROOT / "examples" / "bundle" / "loop.ini"))
    assert json.dumps(config.resolved())
