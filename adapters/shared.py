#!/usr/bin/env python3
"""What the adapters share; no adapter itself. First of all: a model's answer becomes edits.

    answer -> thoughts off -> blocks (whole file, search/replace, diff, delete) -> drafts -> files

An answer is hostile text: nothing is written before all of it was parsed, every path was checked
against the scope and every searched text was found; then all is written, or nothing. Foreign text
is printed behind "| " only, and what is in SECRETS is never printed at all.
"""
from __future__ import annotations

import fnmatch
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, List, NamedTuple, NoReturn, Optional, Set, Tuple

# exit codes, as each adapter documents those that it has
BUG, USAGE, KEY_REFUSED, REFUSED, UNREACHED, NO_ANSWER, CUT_SHORT, NO_EDIT, OUTSIDE, NOT_STARTED, \
    DIED = range(1, 12)
GIVE_UP = re.compile("SCALAR_LOOP_GIVE_UP(?![A-Za-z0-9_])")
LARGEST_FILE = 1 << 20          # bytes of a file that a model is ever shown
MOST_FILES = 5000               # found by a walk, when SCALARLOOP_FILES doesn't name them
SKIPPED = {"node_modules", "__pycache__", "venv", "target", "build", "dist"}
SECRETS: List[str] = []         # what must never be printed, sent in a prompt or written
PROGRAM = Path(sys.argv[0]).stem

FENCE = re.compile(r"( {0,3})(`{3,}|~{3,})([^`]*)$")
NAMED = re.compile(r"[#*\-`\s]*(?:FILE|File|PATH|Path)\s*:[\s*`]*(\S.*)$")
DELETE = re.compile(r"[*`\s]*DELETE\s*:[\s*`]*(\S.*)$")
SEARCH = re.compile(r"\s*<{5,9} ?SEARCH\b", re.I)
DIVIDE = re.compile(r"\s*={5,9}\s*$")
REPLACE = re.compile(r"\s*>{5,9} ?REPLACE\b", re.I)
HUNK = re.compile(r"@@ *-([0-9]{1,9})(?:,[0-9]+)? +\+[0-9]+(?:,[0-9]+)? *@@|@@")

FORMATS: Dict[str, str] = {}    # how to answer, as told to the model; parsed whatever it was told
FORMATS["whole"] = """For every file that you change or create, its path and its whole new content:

FILE: path/to/file
````
every line of the file as it shall be
````
"""
FORMATS["search"] = """For every change, give the file's path and then what to replace by what:

FILE: path/to/file
<<<<<<< SEARCH
lines copied exactly from the file, enough of them to be found once
=======
the lines to stand in their place
>>>>>>> REPLACE

An empty SEARCH part makes a new file.
"""
FORMATS["diff"] = """Give one unified diff in a fenced block, paths relative to the working folder:

```diff
--- a/path/to/file
+++ b/path/to/file
@@ -1,3 +1,3 @@
 a line that stays
-a line that goes
+a line that comes
```
"""
RULES = """
A line `DELETE: path/to/file` deletes a file. Name only files in scope. Put no other fenced blocks
into the answer. If one edit can't be applied, none is."""


class AdapterError(Exception):
    """End the turn with one line; `code` is the exit code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class EditError(AdapterError):
    """An answer that can't be applied; the model gets one chance to mend it."""


# ── a turn as a process ─────────────────────────────────────────────────────────────────────────

def option(key: str, default: str = "") -> str:
    return os.environ.get("SCALARLOOP_OPT_" + key.upper(), "").strip() or default


def note_unused(known: Set[str]) -> None:
    """Name the options that this adapter doesn't have: a slip, or another adapter's."""
    for name in sorted(os.environ):
        if name.startswith("SCALARLOOP_OPT_") and name[15:].lower() not in known:
            say(f"option {name[15:].lower()}: is not one of this adapter's (ignored)")


def read_prompt() -> str:
    prompt = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    if not prompt:
        raise AdapterError(USAGE, f"the prompt is empty (echo PROMPT | python3 {PROGRAM}.py)")
    return prompt


def run_adapter(turn: Callable[[], int], usage: Optional[str]) -> NoReturn:
    """Run a turn and exit with its code; whatever goes wrong is one line."""
    def stop(*_: Any) -> NoReturn:
        raise SystemExit(143)
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, stop)
    code = BUG
    try:
        if "--help" in sys.argv[1:]:
            print(usage)
        try:
            code = 0 if "--help" in sys.argv[1:] else turn()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except AdapterError as error:
        say(str(error))
        code = error.code
    except SystemExit:
        code = 143
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # a bug of ours: one line, the key blotted out
        say(f"failed: {type(error).__name__}: {one_line(str(error))}")
    sys.stdout.flush()
    os._exit(code)              # an orderly exit would wait for threads that may wait for ever


# ── output ──────────────────────────────────────────────────────────────────────────────────────

def scrub(text: str) -> str:
    """Return the text with every secret blotted out."""
    for secret in SECRETS:
        text = text.replace(secret, "[key]")
    return text


def printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\t" else "?" for letter in text)


def one_line(text: str, most: int = 300) -> str:
    """Return foreign text as one printable line of bounded length."""
    text = printable(" ".join(scrub(text[:100 * most]).split()))
    return text if len(text) <= most else text[:most - 3] + "..."


def say(text: str) -> None:
    print(f"{PROGRAM}: {scrub(text)}", flush=True)


def echo(text: str) -> None:
    """Print foreign text so that no line of it begins with a token or moves the cursor."""
    for line in scrub(text).split("\n"):
        print("| " + printable(line.rstrip("\r")), flush=True)


# ── scope ───────────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Scope:
    """Which paths may be written: the files in scope, and new ones that a glob matches."""

    globs: Tuple[str, ...]
    files: FrozenSet[str]

    def covers(self, path: str) -> bool:
        return path in self.files or any(
            matches(path.split("/"), split_glob(glob)) for glob in self.globs)

    def check(self, path: str) -> None:
        """Refuse a path that leads outside the working directory or the scope."""
        parts = path.split("/")
        if not path.isprintable() or "\\" in path or len(parts) > 64 or len(path) > 1000 \
                or {"", ".", ".."} & set(parts) or path.startswith("~"):
            reason = "is not a plain relative path"
        elif any(part.lower() == ".git" for part in parts):
            reason = "is git's own"
        elif any(os.path.islink("/".join(parts[:end + 1])) for end in range(len(parts))):
            reason = "leads through a symbolic link"
        elif not self.covers(path):
            reason = "is outside the scope"
        elif path not in self.files and os.path.lexists(path):
            reason = "is there but not in scope"
        else:
            return
        raise EditError(OUTSIDE, f"{one_line(path)}: {reason}")


def split_glob(glob: str) -> List[str]:
    """Return a glob's segments; `src/` means everything below src."""
    glob = glob + "**" if glob.endswith("/") else glob
    return [part for part in glob.split("/") if part not in ("", ".")]


def matches(parts: List[str], globs: List[str]) -> bool:
    """Match a path segment by segment, as the loop does: `**` stands for any number of them.

    A segment that begins with .git is matched by its own name only.
    """
    if not globs or not parts:
        return not globs and not parts
    git = parts[0].lower().startswith(".git")
    if globs[0] == "**":
        return not git and (len(globs) == 1 and len(parts) == 1
                            or matches(parts, globs[1:]) or matches(parts[1:], globs))
    same = parts[0] == globs[0] if git else fnmatch.fnmatchcase(parts[0], globs[0])
    return same and matches(parts[1:], globs[1:])


def read_scope() -> Scope:
    """Return the scope that the loop hands over; run alone, every text file found here."""
    try:
        globs = json.loads(os.environ.get("SCALARLOOP_SCOPE") or '["**"]')
        files = json.loads(os.environ.get("SCALARLOOP_FILES") or "null")
        scope = Scope(tuple(globs), frozenset())
        if files is None or os.environ.get("SCALARLOOP_TURN", "1") != "1":
            # alone, or in a turn of rework, which may have to mend a file made in the turn before
            files = (files or []) + [path for path in walk_files() if scope.covers(path)]
        return Scope(scope.globs, frozenset(
            path for path in files if path.isprintable() and os.path.isfile(path)))
    except (ValueError, TypeError, AttributeError):
        raise AdapterError(USAGE, "SCALARLOOP_SCOPE, SCALARLOOP_FILES: can't be used (expected "
                           "JSON lists of globs and of paths)") from None


def walk_files() -> List[str]:
    """Return the files below the working directory, without what is hidden or usually ignored."""
    found: List[str] = []
    for folder, folders, names in os.walk("."):
        folders[:] = sorted(name for name in folders
                            if name not in SKIPPED and not name.startswith("."))
        paths = [os.path.join(folder, name)[2:] for name in sorted(names) if name[0] != "."]
        found += [path for path in paths if not os.path.islink(path) and os.path.isfile(path)]
        if len(found) > MOST_FILES:
            break
    return found[:MOST_FILES]


def read_text(path: str) -> Optional[str]:
    """Return a file's text to show; None when it is too large, no text, or holds a secret."""
    try:
        if os.path.getsize(path) > LARGEST_FILE:
            return None
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text or scrub(text) != text else text.replace("\r\n", "\n")


# ── grammar: the formats as llama.cpp can enforce them ──────────────────────────────────────────

LINE = r'''"\n" | [^`\n] [^\n]* "\n"'''
GRAMMAR = r'''root ::= thought? note{0,12} (giveup | WHAT)
thought ::= "<think>" ([^<] | "<" [^/])* "</think>" "\n"*
note ::= "\n" | [^FDSRP#*`<>~+@\- \t\n] [^\n]* "\n"
giveup ::= "SCALAR_LOOP_GIVE_UP" [^\n]* "\n"
edits ::= (edit | "DELETE: " path "\n")+
reads ::= ("READ: " path "\n")+
whole ::= "FILE: " path "\n````\n" line* "````\n"
line ::= LINE | "`" (LINE | "`" (LINE | "`" (LINE)))
search ::= "FILE: " path "\n" block+
block ::= "<<<<<<< SEARCH\n" part* "=======\n" part* ">>>>>>> REPLACE\n"
part ::= "\n" | [^=>\n] [^\n]* "\n" | [=>] ("\n" | [^=>\n] [^\n]* "\n")
name ::= first next*
first ::= [A-Za-z0-9_-]
next ::= [A-Za-z0-9_.-]
path ::= '''.replace("LINE", LINE)


def build_grammar(scope: Scope, format: str, may_read: bool) -> str:
    """Return as GBNF an answer whose edits name files in scope, or new ones that it covers."""
    paths = [quoted(path) for path in sorted(scope.files)[:500]]
    paths += [glob_rule(glob) for glob in scope.globs if glob not in scope.files]
    text = GRAMMAR.replace("WHAT", "edits | reads" if may_read else "edits")
    return text.replace("(edit |", f"({format} |") + " | ".join(paths) + "\n"


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def glob_rule(glob: str) -> str:
    """Return a glob as grammar, its wildcards narrowed to what plain file names are made of."""
    *folders, last = split_glob(glob)
    rules = ['(name "/")*' if part == "**" else segment_rule(part) + ' "/"' for part in folders]
    return " ".join(rules + ['(name "/")* name' if last == "**" else segment_rule(last)])


def segment_rule(segment: str) -> str:
    """Return one segment of a glob as grammar; a wildcard that begins it stands for no dot."""
    rules: List[str] = []
    for part in filter(None, re.split(r"(\*+|\?|\[!?\]?[^\]]*\])", segment)):
        if part.startswith("*"):
            rules.append("next*" if rules else "name")
        elif part[0] in "?[":
            rules.append("next" if rules else "first")
        else:
            rules.append(quoted(part))
    return " ".join(rules)


# ── parsing: three formats, one meaning ─────────────────────────────────────────────────────────

class Edit(NamedTuple):
    """Replace the lines `old` by `new` near line `at`; old None: the whole file; both: delete."""

    path: str
    old: Optional[List[str]]
    new: Optional[List[str]]
    at: int = -1


def strip_thoughts(answer: str) -> str:
    """Return the answer without the model's thinking, which may be full of drafts."""
    opened = re.match(r"\s*<(think|thinking|thought)>", answer)
    if opened:
        return answer.partition(f"</{opened[1]}>")[2]
    closed = re.search(r"^[ \t]*</think(?:ing)?>[ \t]*$", answer, re.M)
    return answer[closed.end():] if closed else answer


def clean_path(text: str) -> str:
    """Return a path without the list mark, emphasis, quotes and colon that models put around it."""
    text = re.sub(r"^\s*(?:[-*]|\d+[.)])\s+", "", text).strip(" \t*`'\"#:")
    return text[2:] if text.startswith("./") else text


class Parser:
    """Read every edit block of an answer; what is no block is prose, line by line."""

    def __init__(self, answer: str, scope: Scope) -> None:
        self.lines = strip_thoughts(answer.replace("\r\n", "\n")).split("\n")
        self.scope = scope
        self.edits: List[Edit] = []
        self.prose: List[str] = []
        self.path = ""              # the file named last
        self.near = False           # named by the last line that isn't blank
        self.wrapped = False        # inside the fence around search blocks or a diff
        self.index = 0

    def parse(self) -> Parser:
        while self.index < len(self.lines):
            line = self.lines[self.index]
            fence, deleted = FENCE.match(line), DELETE.match(line)
            if SEARCH.match(line):
                self.take_replace()
            elif self.starts_diff(self.index):
                self.take_diff()
            elif fence and self.wrapped and not self.near and not fence[3].strip():
                self.wrapped, self.index = False, self.index + 1
            elif fence:
                self.take_fence(fence[1], fence[2], fence[3].strip())
            elif deleted:
                self.edits.append(Edit(clean_path(deleted[1]), None, None))
                self.index += 1
            else:
                self.take_prose(line)
        return self

    def starts_diff(self, at: int) -> bool:
        return (self.lines[at].startswith("--- ") and at + 1 < len(self.lines)
                and self.lines[at + 1].startswith("+++ "))

    def take_prose(self, line: str) -> None:
        self.index += 1
        self.prose.append(line)
        if line.strip():
            named = NAMED.match(line)
            path = clean_path(named[1] if named else line)
            self.near = bool(named) or self.is_path(path)
            self.path = path if self.near else self.path

    def is_path(self, text: str) -> bool:
        """Say whether a line that isn't marked as one is a path all the same."""
        return text in self.scope.files or (
            len(text) < 200 and bool(re.fullmatch(r"[\w@+./-]*(?:/|\w\.)[\w@+.-]*\w", text))
            and (self.scope.covers(text) or os.path.lexists(text)))

    def take_fence(self, indent: str, ticks: str, info: str) -> None:
        """Take a fenced block: a file's content, a wrapping of other blocks, or an illustration."""
        told = [part for part in re.split(r"[\s:=\"']+", info) if self.is_path(part)]
        path = self.path if self.near else told[0] if told else ""
        first = self.index + 1
        while first < len(self.lines) and not self.lines[first].strip():
            first += 1
        if self.starts_blocks(first) and not path.endswith((".patch", ".diff")):
            self.path, self.wrapped, self.index = path or self.path, True, first
            return
        content, end = self.read_fence(indent, ticks)
        if path:
            self.edits.append(Edit(path, None, content))
        elif not info and self.edits and self.edits[-1].path.endswith((".md", ".mdx", ".rst")):
            raise EditError(NO_EDIT, f"{one_line(self.edits[-1].path)}: it is not clear where its "
                            "block ends (use a longer fence around text that has fences itself)")
        self.prose += [] if path else content
        self.near, self.index = False, end

    def starts_blocks(self, at: int) -> bool:
        """Say whether search blocks or a diff start here, a path before them or not."""
        if at + 1 < len(self.lines) and SEARCH.match(self.lines[at + 1]):
            return bool(NAMED.match(self.lines[at])) or self.is_path(clean_path(self.lines[at]))
        return at < len(self.lines) and (
            bool(SEARCH.match(self.lines[at])) or self.starts_diff(at)
            or self.lines[at].startswith("diff --git "))

    def read_fence(self, indent: str, ticks: str) -> Tuple[List[str], int]:
        """Return a block's lines and its end; a fence with a language inside opens another."""
        depth = 0
        for end in range(self.index + 1, len(self.lines)):
            inner = FENCE.match(self.lines[end])
            if not inner or inner[1] != indent or not inner[2].startswith(ticks):
                continue
            if not inner[3].strip() and not depth:
                block = self.lines[self.index + 1:end]
                return [line[len(indent):] if line.startswith(indent) else line
                        for line in block], end + 1
            depth += 1 if inner[3].strip() else -1
        raise EditError(NO_EDIT, f"line {self.index + 1}: a fenced block is not closed")

    def take_replace(self) -> None:
        start = self.index + 1
        stop = next((at for at in range(start, len(self.lines)) if REPLACE.match(self.lines[at])),
                    start)
        divides = [at for at in range(start, stop) if DIVIDE.match(self.lines[at])]
        if not self.path or len(divides) != 1:
            raise EditError(NO_EDIT, f"line {start}: a search block " + (
                "names no file (put FILE: path before it)" if not self.path else
                "has several ======= lines (give the whole file)" if divides else
                "has no ======= line or no REPLACE line"))
        self.edits.append(Edit(self.path, self.lines[start:divides[0]],
                               self.lines[divides[0] + 1:stop]))
        self.near, self.index = False, stop + 1

    def take_diff(self) -> None:
        before, after = (self.diff_path(self.lines[self.index + more]) for more in (0, 1))
        self.near, self.index = False, self.index + 2
        hunks: List[Edit] = []
        while self.index < len(self.lines) and HUNK.match(self.lines[self.index]):
            hunks.append(self.read_hunk(after))
        if after == "/dev/null":
            self.edits.append(Edit(before, None, None))
        elif not hunks or before not in (after, "/dev/null"):
            raise EditError(NO_EDIT, f"{one_line(after)}: a diff " + (
                "that renames (delete the old file, give the new one whole)" if hunks else
                "without a hunk (@@ -1,3 +1,3 @@)"))
        elif before == "/dev/null":
            lines = [line for hunk in hunks for line in hunk.new or []]
            self.edits.append(Edit(after, None, lines))
        else:
            self.edits += hunks

    def diff_path(self, line: str) -> str:
        path = line[4:].partition("\t")[0].strip()
        return path if path in self.scope.files or path[:2] not in ("a/", "b/") else path[2:]

    def read_hunk(self, path: str) -> Edit:
        """Return a hunk by its lines' marks; the counts, which models get wrong, are not used."""
        match = HUNK.match(self.lines[self.index])
        self.index += 1
        block: List[str] = []
        while (self.index < len(self.lines) and not self.starts_diff(self.index)
               and self.lines[self.index][:1] in ("", " ", "+", "-", "\\")):
            block.append(self.lines[self.index])
            self.index += 1
        while block and not block[-1]:
            block.pop()             # blank lines after the hunk, not of it
        return Edit(path, [line[1:] for line in block if line[:1] in ("", " ", "-")],
                    [line[1:] for line in block if line[:1] in ("", " ", "+")],
                    int(match[1]) - 1 if match and match[1] else -1)


# ── applying: all or nothing ────────────────────────────────────────────────────────────────────

@dataclass
class Draft:
    """A file as it will be: its lines (None: absent), and how the file on disk writes them."""

    lines: Optional[List[str]]
    crlf: bool = False
    bom: bool = False
    final_newline: bool = True

    def render(self) -> Optional[bytes]:
        if self.lines is None:
            return None
        text = "\n".join(self.lines) + ("\n" if self.lines and self.final_newline else "")
        text = text.replace("\n", "\r\n") if self.crlf else text
        text = "\ufeff" + text if self.bom and not text.startswith("\ufeff") else text
        return text.encode("utf-8", "surrogateescape")


def load_draft(path: str) -> Draft:
    """Return a file as it is; bytes that are no UTF-8 survive the way back."""
    if not os.path.lexists(path):
        return Draft(None)
    text = Path(path).read_bytes().decode("utf-8", "surrogateescape")
    crlf = 0 < text.count("\r\n") == text.count("\n")
    bom = text.startswith("\ufeff")
    text = text[bom:].replace("\r\n", "\n") if crlf else text[bom:]
    ended = not text or text.endswith("\n")
    body = text[:-1] if text and ended else text
    return Draft(body.split("\n") if text else [], crlf, bom, ended)


def draft_changes(edits: List[Edit], scope: Scope) -> Dict[str, Optional[bytes]]:
    """Return the new bytes (None: delete) of each file that the edits change; write nothing."""
    drafts: Dict[str, Draft] = {}
    changes: Dict[str, Optional[bytes]] = {}
    try:
        for edit in edits:
            scope.check(edit.path)
            if edit.path not in drafts:
                drafts[edit.path] = load_draft(edit.path)
            drafts[edit.path].lines = edited(drafts[edit.path].lines, edit)
        for path, draft in drafts.items():
            if draft.render() != load_draft(path).render():
                changes[path] = draft.render()
    except (OSError, UnicodeError) as error:
        raise EditError(NO_EDIT, f"{one_line(edit.path)}: can't be edited ({error})") from None
    return changes


def edited(lines: Optional[List[str]], edit: Edit) -> Optional[List[str]]:
    """Return a file's lines after one edit, or say why it doesn't fit."""
    if edit.old is None or edit.new is None:
        if edit.new is None and lines is None:
            raise EditError(NO_EDIT, f"{one_line(edit.path)}: is not there to be deleted")
        return edit.new
    if lines is None and edit.old:
        raise EditError(NO_EDIT, f"{one_line(edit.path)}: is not there (give the whole file)")
    lines = lines or []
    at = find_block(lines, edit)
    if at >= 0:
        return lines[:at] + edit.new + lines[at + len(edit.old):]
    text, old = "\n".join(lines), "\n".join(edit.old)
    if edit.at < 0 and text.count(old) == 1:    # part of a line, as in minified code
        return text.replace(old, "\n".join(edit.new)).split("\n")
    raise EditError(NO_EDIT, f"{one_line(edit.path)}: the text to replace is not in it: "
                    f"{one_line(old, 120)}")


def find_block(lines: List[str], edit: Edit) -> int:
    """Return where the old lines stand, trailing blanks aside if need be; -1 when nowhere."""
    old = edit.old or []
    if not old:
        if lines and edit.at < 0:
            raise EditError(NO_EDIT, f"{one_line(edit.path)}: an empty SEARCH part is for a new "
                            "file only")
        return min(edit.at + 1, len(lines)) if lines else 0
    for tidy in (str, str.rstrip):
        have, want = [tidy(line) for line in lines], [tidy(line) for line in old]
        found = [at for at in range(len(have) - len(want) + 1)
                 if have[at] == want[0] and have[at:at + len(want)] == want]
        if len(found) > 1 and edit.at < 0:
            raise EditError(NO_EDIT, f"{one_line(edit.path)}: the text to replace stands there "
                            f"{len(found)} times (take in more lines): {one_line(want[0], 80)}")
        if found:
            return min(found, key=lambda at: abs(at - edit.at))
    return -1


def write_changes(changes: Dict[str, Optional[bytes]]) -> None:
    """Write every change, or leave everything as it was; no signal but KILL comes in between."""
    blocked = {signal.SIGTERM, signal.SIGINT, signal.SIGALRM}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    before = {path: Path(path).read_bytes() if os.path.lexists(path) else None for path in changes}
    staged: Dict[str, str] = {}
    made: List[str] = []
    try:
        for path, data in changes.items():
            if data is not None:
                make_folders(os.path.dirname(path), made)
                staged[path] = temporary_beside(path)
                stage(staged[path], data, path)
        for path in changes:
            if path in staged:
                os.replace(staged[path], path)
            else:
                os.unlink(path)
    except OSError as error:
        restore(before, staged, made)
        raise AdapterError(NO_EDIT, f"{one_line(path)}: can't be written ({error.strerror}); "
                           "nothing was changed") from None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


def make_folders(folder: str, made: List[str]) -> None:
    """Make a folder and its parents; note those that weren't there."""
    parts = folder.split("/") if folder else []
    for end in range(1, len(parts) + 1):
        if not os.path.isdir("/".join(parts[:end])):
            os.mkdir("/".join(parts[:end]))
            made.append("/".join(parts[:end]))


def temporary_beside(path: str) -> str:
    return os.path.join(os.path.dirname(path), f".scalarloop-{os.getpid()}-{abs(hash(path))}")


def stage(temporary: str, data: bytes, path: str) -> None:
    """Write a new file's bytes, with the mode of the file that it is to replace."""
    with open(temporary, "xb") as file:
        file.write(data)
    if os.path.exists(path):
        os.chmod(temporary, os.stat(path).st_mode & 0o777)


def restore(before: Dict[str, Optional[bytes]], staged: Dict[str, str], made: List[str]) -> None:
    """Put back what a write that failed half-way has changed."""
    for temporary in staged.values():
        if os.path.lexists(temporary):
            os.unlink(temporary)
    for path, data in before.items():
        now = Path(path).read_bytes() if os.path.isfile(path) else None
        if data is None and now is not None:
            os.unlink(path)
        elif data is not None and data != now:
            stage(temporary_beside(path), data, path)
            os.replace(temporary_beside(path), path)
    for folder in reversed(made):
        os.rmdir(folder)


if __name__ == "__main__":
    sys.exit("shared: is no adapter (expected adapter = openai, llamacpp, claude or double)")
