#!/usr/bin/env python3
"""Play a scripted agent, or a seeded random search: offline, deterministic, standard library only.

The prompt on standard input is read and ignored; the working directory is edited. For a try:
  echo PROMPT | SCALARLOOP_OPT_SCRIPT=agent SCALARLOOP_ITERATION=3 python3 adapters/double.py

Options ([adapter] in loop.ini; handed in as SCALARLOOP_OPT_<KEY>): `mode` is script (the default)
or random; `script` is a path relative to the folder of loop.ini.
Environment: SCALARLOOP_ITERATION and SCALARLOOP_TURN (which turn this is, both from 1; a TURN above
1 is a rework), SCALARLOOP_SEED, SCALARLOOP_CONFIG_DIR (where `script` is looked up first, then the
working directory), SCALARLOOP_FILES (JSON list of the files random mode may edit; else all).

A script is a folder that has a folder per turn: `04-name` for iteration 4, `07.2-name` for turn 2
of iteration 7. Its files are laid over the working directory, then the steps of its `turn.ini`, if
any, are played: one section [turn], in the order written. Or it is one INI file with a section per
turn: [turn 4], [turn 7.2]. A turn that the script doesn't hold changes nothing. Steps:
  write PATH = TEXT · append PATH = TEXT · replace PATH = OLD => NEW · chmod PATH = OCTAL ·
  symlink PATH = TARGET · delete = PATH · copy = FOLDER (of the script, laid over) · print = TEXT ·
  expect = TEXT (in the prompt) · sleep = SECONDS · exit = CODE · kill = SIGNAL (of this process) ·
  run = COMMAND (no shell; {script} is the script's folder; failure is reported, nothing more)
replace, delete, expect and run take one per line. TEXT (OLD and NEW too) stands for itself, or is a
JSON string, or lines that start with `|`, which keeps their indentation. Paths aren't confined: a
script may well play an attacker.

Random mode draws a value for each line `name = value` that ends in a comment (#, //, --, ; or /*)
such as `# scalarloop: 0.001..0.1 log`, `// scalarloop: int 1..64`, `; scalarloop: choice a|b|c`.

Exit codes: 0 turn played · 1 the turn doesn't fit (a file, text or prompt isn't as expected) ·
2 bad options, environment, script or mark · else as the script's `exit` or `kill` says.
"""
import configparser
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NoReturn, Tuple

Steps = List[Tuple[str, str]]  # ("write src/a.py", "text")
ON_PATH = ("write", "append", "replace", "chmod", "symlink")
ALONE = ("delete", "copy", "print", "expect", "sleep", "exit", "kill", "run")
MARK = re.compile(r"(?:#|//|--|;|/\*)\s*scalarloop:\s*(.*?)\s*(?:\*/)?\s*$")
VALUE = re.compile(r"""(.*?[=:]\s*)("[^"]*"|'[^']*'|[^\s,;"']+)(\s*[,;]?\s*)""")
RANGE = re.compile(r"(int +)?(-?\d[\d.e+-]*?)\.\.(-?\d[\d.e+-]*)( +log)?")


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    prompt = "" if sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
    numbers = [os.environ.get(f"SCALARLOOP_{n}", "1") for n in ("ITERATION", "TURN", "SEED")]
    if not all(re.fullmatch("-?[0-9]+", number) for number in numbers):
        fail(f"SCALARLOOP_ITERATION, _TURN, _SEED: {numbers} are not whole numbers")
    mode = where = os.environ.get("SCALARLOOP_OPT_MODE", "script")
    try:
        if mode == "random":
            draw_values(random.Random(":".join(numbers)))
        elif mode == "script":
            script = find_script()
            home = script if script.is_dir() else script.parent
            for key, value in read_script(script).get((int(numbers[0]), int(numbers[1])), []):
                where = f"{key} = {value}"
                play(key, value, home, prompt)
        else:
            fail(f"[adapter] mode: {mode!r} is unknown (expected script or random)")
    except (OSError, ValueError, KeyError) as error:
        fail(f"{where}: {error}", 1)


def fail(message: str, code: int = 2) -> NoReturn:
    print("double:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def find_script() -> Path:
    name = os.environ.get("SCALARLOOP_OPT_SCRIPT", "")
    for folder in (os.environ.get("SCALARLOOP_CONFIG_DIR", "."), "."):
        if name and Path(folder, name).exists():
            return Path(folder, name).resolve()
    fail(f"[adapter] script: {name or 'missing'} (expected a folder or an INI file that is there)")


def read_script(script: Path) -> Dict[Tuple[int, int], Steps]:
    """Return the steps of every turn: a mistake in a late one shows in the first."""
    if script.is_file():
        found = [(title[5:], steps) for title, steps in read_ini(script).items()]
    else:  # a folder whose name starts with a letter holds what turns share
        folders = sorted(path for path in script.glob("[0-9]*") if path.is_dir())
        found = [(path.name, [("copy", path.name)] + read_ini(path / "turn.ini").get("turn", []))
                 for path in folders]
    turns: Dict[Tuple[int, int], Steps] = {}
    for name, steps in found:
        match = re.fullmatch(r"0*([1-9][0-9]*)(?:\.([1-9][0-9]*))?(?:-.*)?", name)
        key = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
        if not match or key in turns:
            fail(f"{script}: turn {name!r}: expected a number (4 or 7.2), each once")
        turns[key] = steps
    return turns


def read_ini(file: Path) -> Dict[str, Steps]:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="",
                                       comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        parser.read_string(file.read_text(encoding="utf-8") if file.exists() else "", file.name)
    except (OSError, UnicodeError, configparser.Error) as error:
        fail(f"{file}: {' '.join(str(error).split())}")
    for title in parser.sections():
        if title.split(" ")[0] != "turn":
            fail(f"{file}: [{title}]: expected [turn] in a folder, [turn N] in an INI script")
        for key in parser[title]:
            if key not in ALONE and not key.startswith(tuple(verb + " " for verb in ON_PATH)):
                fail(f"{file}: [{title}] {key}: no such step (expected {', '.join(ON_PATH)} with a "
                     f"path, or {', '.join(ALONE)} without)")
    return {title: [(key, value.strip("\n")) for key, value in parser[title].items()]
            for title in parser.sections()}


def read_text(value: str, end: str = "\n") -> str:
    if re.fullmatch(r'"([^"\\]|\\.)*"', value):
        return str(json.loads(value))
    lines = value.split("\n")
    if all(line.startswith("|") for line in lines):
        return "".join(line[1:] + "\n" for line in lines)
    return value + end


def play(key: str, value: str, home: Path, prompt: str) -> None:
    verb, _, name = key.partition(" ")
    path = Path(name)
    if verb in ("write", "append"):
        data = read_text(value).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb" if verb == "write" else "ab") as stream:
            stream.write(data)
    elif verb == "symlink":
        clear(path).symlink_to(value)
    elif verb == "chmod":
        path.chmod(int(value, 8))
    elif verb == "copy":
        lay_over(home / value)
    elif verb == "print":
        print(read_text(value), end="", flush=True)
    elif verb == "sleep":
        time.sleep(float(value))
    elif verb == "exit":
        sys.exit(int(value))
    elif verb == "kill":
        os.kill(os.getpid(), signal.Signals["SIG" + value])
    for line in value.splitlines():
        if verb == "delete":
            Path(line).lstat()  # a missing file is an error here
            clear(Path(line))
        elif verb == "expect" and line not in prompt:
            raise ValueError("not in the prompt")
        elif verb == "replace":
            old, new = (read_text(side.strip(), "").encode() for side in line.split(" =>", 1))
            if not old or old not in path.read_bytes():
                raise ValueError(f"{old.decode()!r} is not in the file")
            path.write_bytes(path.read_bytes().replace(old, new))
        elif verb == "run":
            argv = [word.replace("{script}", str(home)) for word in shlex.split(line)]
            code = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
            if code:  # a hostile command that the sandbox denies is for the loop to judge
                print(f"double: run {line}: exit code {code}", file=sys.stderr, flush=True)


def clear(path: Path) -> Path:
    """Make room at a path, so that nothing is ever written through a link that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        if path.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ValueError("refused: it holds the working directory")
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    return path


def lay_over(source: Path) -> None:
    if not source.is_dir():
        raise ValueError("no such folder in the script")
    for folder, _, names in os.walk(source):
        for name in names:
            target = Path(folder, name).relative_to(source)
            if target != Path("turn.ini"):
                shutil.copy(Path(folder, name), clear(target), follow_symlinks=False)


def draw_values(source: random.Random) -> None:
    """Rewrite every marked value; nothing at all where one mark is wrong or none is there."""
    edited: Dict[str, bytes] = {}
    try:
        names = json.loads(os.environ.get("SCALARLOOP_FILES", "null"))
        names = sorted(map(str, names)) if names is not None else sorted(
            os.path.relpath(os.path.join(folder, name)) for folder, _, files in os.walk(".")
            if "/." not in folder for name in files)
    except (ValueError, TypeError):
        fail("SCALARLOOP_FILES: not a JSON list of paths")
    for name in names:
        data = b"" if os.path.islink(name) or not os.path.isfile(name) else Path(name).read_bytes()
        lines = data.decode("utf-8", "surrogateescape").split("\n")
        if b"scalarloop:" in data and any(map(MARK.search, lines)):
            drawn = [draw_line(line, source, f"{name}:{n}") for n, line in enumerate(lines, 1)]
            edited[name] = "\n".join(drawn).encode("utf-8", "surrogateescape")
    if not edited:
        fail("no marked value (expected lines such as: rate = 0.1  # scalarloop: 0..1)")
    for name, data in edited.items():
        Path(name).write_bytes(data)


def draw_line(line: str, source: random.Random, where: str) -> str:
    mark = MARK.search(line)
    if not mark:
        return line
    value = VALUE.fullmatch(line[:mark.start()])
    if not value:
        fail(f"{where}: a mark without `name = value` before it")
    try:
        drawn = draw(mark[1], value[2][0], source.random())
    except (ValueError, OverflowError):
        fail(f"{where}: {mark[1]!r} is no range (expected LOW..HIGH [log], int LOW..HIGH [log] or "
             "choice A|B)")
    print(f"double: {where}: {value[1].strip()} {drawn}")
    return value[1] + drawn + value[3] + line[mark.start():]


def draw(spec: str, first: str, share: float) -> str:
    """Return the value, as text, that lies at a share (0 to 1) of the range; `first` may quote."""
    if spec.startswith("choice "):
        choices = [choice.strip() for choice in spec[7:].split("|")]
        quote = first if first in "\"'" and choices[0][:1] not in ("'", '"') else ""
        return quote + choices[int(share * len(choices))] + quote
    match = RANGE.fullmatch(spec)
    kind = int if match and match[1] else float
    low, high = (kind(match[2]), kind(match[3])) if match else (1, 0)
    if low > high or not math.isfinite(high - low) or (match[4] and low <= 0):
        raise ValueError
    top = high + 1 if match[1] else high
    drawn = low * math.exp(share * math.log(top / low)) if match[4] else low + share * (top - low)
    if match[1]:
        return str(min(max(math.floor(drawn), low), high))
    text = format(drawn, ".6g")
    text = text if low <= float(text) <= high else repr(min(max(drawn, low), high))
    return text if re.search("[.e]", text) else text + ".0"


if __name__ == "__main__":
    main()
