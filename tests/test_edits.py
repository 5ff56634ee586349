"""What becomes of a model's answer: the edits that are meant, or nothing at all (adapters/shared).

Answers are hostile text. Each test here ends with the same questions: does the folder hold exactly
what was asked for, and is everything around it as it was?
"""
from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

ADAPTERS = Path(__file__).resolve().parent.parent / "adapters"


def load_edits():
    spec = importlib.util.spec_from_file_location("scalarloop_shared", ADAPTERS / "shared.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


edits = load_edits()

APP = "const a = 1;\nconst b = 2;\nfunction add() {\n  return a + b;\n}\n"
FILES = {"src/app.js": APP, "src/util.js": "let x = 1;\n", "README.md": "# Title\n",
         "tests/metric.py": "sealed\n"}
SCOPE = ("src/**/*.js", "README.md", "src/*.diff")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A workspace with a sealed file in it and a canary beside it; the working directory."""
    (tmp_path / "outside.txt").write_text("canary")
    root = tmp_path / "work"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("[core]\n")
    monkeypatch.chdir(root)
    return root


def tree(root: Path) -> Dict[str, bytes]:
    """Return everything below a folder: bytes of files, targets of links."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            found[str(path.relative_to(root))] = (os.readlink(path).encode() if path.is_symlink()
                                                  else path.read_bytes())
    return found


def scope_of(*globs: str) -> edits.Scope:
    globs = globs or SCOPE
    scope = edits.Scope(globs, frozenset())
    return edits.Scope(globs, frozenset(p for p in edits.walk_files() if scope.covers(p)))


def apply(answer: str, *globs: str) -> Dict[str, bytes]:
    """Apply an answer as an adapter does; return what it changed."""
    scope = scope_of(*globs)
    changes = edits.draft_changes(edits.Parser(answer, scope).parse().edits, scope)
    edits.write_changes(changes)
    return changes


def whole(path: str, text: str = "x\n") -> str:
    return f"FILE: {path}\n```\n{text}```\n"


def search(old: str, new: str, path: str = "src/app.js") -> str:
    return f"FILE: {path}\n<<<<<<< SEARCH\n{old}=======\n{new}>>>>>>> REPLACE\n"


def diff(hunk: str, path: str = "src/app.js") -> str:
    return f"--- a/{path}\n+++ b/{path}\n{hunk}"


# ── what is understood ──────────────────────────────────────────────────────────────────────────

NEW = "const z = 26;\n"
WHOLE = "src/app.js"
UNDERSTOOD: List[Tuple[str, str, str, str]] = [
    # name, answer, file, its text afterwards
    ("plain", f"FILE: src/app.js\n```js\n{NEW}```\n", WHOLE, NEW),
    ("the asked form", f"Shorter.\n\nFILE: src/app.js\n````\n{NEW}````\n", WHOLE, NEW),
    ("heading", f"### `src/app.js`\n\n```javascript\n{NEW}```", WHOLE, NEW),
    ("bold with colon", f"**src/app.js**:\n```\n{NEW}```", WHOLE, NEW),
    ("bold mark", f"**FILE:** `src/app.js`\n```\n{NEW}```", WHOLE, NEW),
    ("numbered", f"1. `src/app.js`:\n   ```\n   {NEW}   ```", WHOLE, NEW),
    ("in the fence line", f"```js src/app.js\n{NEW}```", WHOLE, NEW),
    ("title in the fence line", f"```js title=\"src/app.js\"\n{NEW}```", WHOLE, NEW),
    ("dot slash", f"FILE: ./src/app.js\n```\n{NEW}```", WHOLE, NEW),
    ("tildes", f"FILE: src/app.js\n~~~\n```\n{NEW}~~~", WHOLE, "```\n" + NEW),
    ("CRLF answer", f"FILE: src/app.js\r\n```\r\n{NEW[:-1]}\r\n```\r\n", WHOLE, NEW),
    ("longer fence", "FILE: README.md\n````\n```\ncode\n```\n````", "README.md",
     "```\ncode\n```\n"),
    ("nested with language", "FILE: README.md\n```md\nHow:\n```sh\nls\n```\nend\n```\n",
     "README.md", "How:\n```sh\nls\n```\nend\n"),
    ("indented fence inside", "FILE: src/app.js\n```\n/**\n * ```\n */\n    ```\nx\n```\n", WHOLE,
     "/**\n * ```\n */\n    ```\nx\n"),
    ("backticks inside", "FILE: src/app.js\n```\nlet s = `a ${'```'}`;\n```\n", WHOLE,
     "let s = `a ${'```'}`;\n"),
    ("unicode", "FILE: src/app.js\n```\n// žluťoučký 🐎\u2028 x\x0c\n```", WHOLE,
     "// žluťoučký 🐎\u2028 x\x0c\n"),
    ("new file", f"FILE: src/deep/er/new.js\n```\n{NEW}```", "src/deep/er/new.js", NEW),
    ("emptied", "FILE: src/app.js\n```\n```\n", WHOLE, ""),
    ("one blank line", "FILE: src/app.js\n```\n\n```\n", WHOLE, "\n"),
    ("the last of two", whole("src/app.js") + "No:\n" + whole("src/app.js", NEW), WHOLE, NEW),
    ("illustration first", f"I'd use this:\n```js\nfoo()\n```\nFILE: src/app.js\n```\n{NEW}```",
     WHOLE, NEW),
    ("thoughts", "<think>\n" + whole("src/util.js") + "</think>\n" + whole("src/app.js", NEW),
     WHOLE, NEW),
    ("thoughts opened by the template",
     whole("src/util.js") + "</think>\n\n" + whole("src/app.js", NEW), WHOLE, NEW),
    ("think tag in a file", "FILE: src/app.js\n```\nlet t = '</think>';\n```", WHOLE,
     "let t = '</think>';\n"),
    ("search", search("const a = 1;\n", "let a = 7;\n"), WHOLE,
     APP.replace("const a = 1", "let a = 7")),
    ("search in a fence", search("const a = 1;\n", "").replace("FILE: ", "").replace(
        "<<<", "```js\n<<<", 1) + "```\n", WHOLE, APP[13:]),
    ("path in the fence", "```\n" + search("const a = 1;\n", "")[6:] + "```\n", WHOLE, APP[13:]),
    ("two searches in one fence", "FILE: src/app.js\n```\n" + "\n".join(
        search(f"const {line}\n", f"let {line}\n")[17:] for line in ("a = 1;", "b = 2;")) + "```\n",
     WHOLE, APP.replace("const", "let")),
    ("trailing blanks differ", search("const a = 1;  \nconst b = 2;\t\n", "c\n"), WHOLE,
     APP.replace("const a = 1;\nconst b = 2;", "c")),
    ("part of a line", search("a + b\n", "b + a\n"), WHOLE, APP.replace("a + b", "b + a")),
    ("search makes a file", search("", "x\n", "src/n.js"), "src/n.js", "x\n"),
    ("diff", "```diff\n" + diff("@@ -1,3 +1,3 @@\n-const a = 1;\n+let a;\n const b = 2;\n"
                                " function add() {\n```\n"), WHOLE,
     APP.replace("const a = 1;", "let a;")),
    ("diff by git, miscounted", "diff --git a/src/app.js b/src/app.js\nindex 1..2\n" + diff(
        "@@ -40,9 +40,99 @@ function\n   return a + b;\n-}\n+};\n\n"), WHOLE, APP[:-2] + "};\n"),
    ("diff without prefixes", "--- src/app.js\n+++ src/app.js\n@@ @@\n-const a = 1;\n+A\n", WHOLE,
     APP.replace("const a = 1;", "A")),
    ("diff inserts", diff("@@ -2,0 +3,1 @@\n+// here\n"), WHOLE,
     APP.replace("= 2;\n", "= 2;\n// here\n")),
    ("diff makes a file", diff("@@ -0,0 +1,2 @@\n+one\n+two\n", "src/n.js").replace(
        "a/src/n.js", "/dev/null"), "src/n.js", "one\ntwo\n"),
    ("diff hunk nearest to its line", diff("@@ -3 +3 @@\n-x\n+y\n", "src/twice.js"),
     "src/twice.js", "x\n1\ny\n"),
    ("a patch file is content", whole("src/fix.diff", diff("@@ -1 +1 @@\n-a\n+b\n", "x")),
     "src/fix.diff", diff("@@ -1 +1 @@\n-a\n+b\n", "x")),
]


@pytest.mark.parametrize("answer,path,text", [
    pytest.param(*case[1:], id=case[0]) for case in UNDERSTOOD])
def test_an_edit_is_understood(folder, answer, path, text):
    (folder / "src/twice.js").write_text("x\n1\nx\n")
    before = tree(folder)
    apply(answer)
    assert tree(folder) == {**before, path: text.encode()}


@pytest.mark.parametrize("answer", [
    "DELETE: src/util.js", "**DELETE:** `src/util.js`\n",
    "--- a/src/util.js\n+++ /dev/null\n@@ -1 +0,0 @@\n-let x = 1;\n"])
def test_a_deletion_is_understood(folder, answer):
    before = tree(folder)
    apply(answer)
    before.pop("src/util.js")
    assert tree(folder) == before


def test_several_formats_in_one_answer_are_applied_in_order(folder):
    apply(whole("src/util.js", "one\ntwo\n") + search("two\n", "2\n", "src/util.js")
          + diff("@@ -1 +1 @@\n-const a = 1;\n+A\n"))
    assert (folder / "src/util.js").read_text() == "one\n2\n"
    assert (folder / "src/app.js").read_text().startswith("A\nconst b")


@pytest.mark.parametrize("stored,shown,edited", [
    (b"a\r\nb\r\n", "a\nb\n", b"a\r\nB\r\n"),
    (b"a\nb", "a\nb", b"a\nB"),
    (b"\xef\xbb\xbfa\nb\n", "\ufeffa\nb\n", b"\xef\xbb\xbfa\nB\n"),
    (b"a\xff\nb\n", None, b"a\xff\nB\n")])
def test_line_ends_final_newline_and_other_bytes_survive(folder, stored, shown, edited):
    path = folder / "src/app.js"
    for answer in (search("b\n", "B\n"), diff("@@ -1,2 +1,2 @@\n-b\n+B\n"),
                   whole("src/app.js", "a\nB\n")):
        path.write_bytes(stored)
        assert edits.read_text("src/app.js") == shown
        apply(answer)
        if shown or not answer.endswith("```\n"):
            assert path.read_bytes() == edited


def test_the_executable_bit_survives_and_equal_content_is_no_change(folder):
    (folder / "src/app.js").chmod(0o755)
    assert apply(whole("src/app.js", APP)) == {}
    apply(whole("src/app.js"))
    assert (folder / "src/app.js").stat().st_mode & 0o777 == 0o755


def test_prose_is_kept_apart_from_what_files_say(folder):
    token = "SCALAR_LOOP_GIVE_UP"
    answer = f"Well, {token}\n" + whole("src/app.js", f"{token} no\n") + f"{token} yes"
    prose = edits.Parser(answer, scope_of()).parse().prose
    assert [line for line in prose if line.startswith(token)] == [f"{token} yes"]


# ── what is refused ─────────────────────────────────────────────────────────────────────────────

OUTSIDE = {
    "absolute": "/etc/passwd", "parent": "../outside.txt", "parent inside": "src/../../outside.txt",
    "home": "~/.profile", "git": ".git/config", "git hook": "src/.git/hooks/x.js",
    "git in capitals": "src/.GIT/x.js", "gitignore": "src/.gitignore", "sealed": "tests/metric.py",
    "new file outside": "tests/new.py", "link": "src/link.js", "through a link": "src/folder/x.js",
    "backslashes": "src\\app.js", "control character": "src/a\x07.js",
    "empty segment": "src//app.js", "not in scope though matched": "src/untracked.js",
    "name of a folder": "src/sub.js", "very deep": "src/" + "a/" * 200 + "x.js",
    "newline mark": "src/a\u2028.js"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_outside_is_refused_and_takes_the_good_edit_with_it(folder, name):
    (folder / "src/link.js").symlink_to(folder.parent / "outside.txt")
    (folder / "src/folder").symlink_to(folder.parent)
    (folder / "src/sub.js").mkdir()
    (folder / "src/untracked.js").write_text("x")
    before, around = tree(folder), tree(folder.parent)
    scope = edits.Scope(SCOPE, frozenset(["src/app.js", "src/util.js", "README.md"]))
    answer = whole("src/app.js") + whole(OUTSIDE[name])
    with pytest.raises(edits.EditError) as refusal:
        edits.draft_changes(edits.Parser(answer, scope).parse().edits, scope)
    assert refusal.value.code == edits.OUTSIDE and "\n" not in str(refusal.value)
    assert tree(folder) == before and tree(folder.parent) == around


UNFIT = {
    "not closed": whole("src/util.js")[:-4],
    "search not found": search("nope\n", "y\n"),
    "search found twice": search("twin\n", "y\n"),
    "search of nothing": search("", "y\n"),
    "search without end": search("more\n", "y\n")[:-16],
    "search with two middles": search("more\n", "b\n=======\nc\n"),
    "search in no file": search("more\n", "y\n")[17:],
    "search in a missing file": search("a\n", "b\n", "src/no.js"),
    "diff not found": diff("@@ -1 +1 @@\n-nope\n+y\n"),
    "diff without hunks": diff(""),
    "diff that renames": diff("@@ -2 +2 @@\n-more\n+y\n").replace("b/src/app", "b/src/new"),
    "deletes what is not there": "DELETE: src/no.js",
    "lone surrogate": whole("src/util.js", "\ud800\n"),
    "unclear end": whole("README.md", "# A\n```\nls\n```\n# B\n")}


@pytest.mark.parametrize("name", UNFIT)
def test_an_edit_that_does_not_fit_leaves_everything_as_it_was(folder, name):
    (folder / "src/app.js").write_text("twin\nmore\ntwin\n")
    before = tree(folder)
    first = "" if "in no file" in name else whole("src/new.js")
    with pytest.raises(edits.EditError) as refusal:
        apply(first + UNFIT[name])
    assert refusal.value.code == edits.NO_EDIT and "\n" not in str(refusal.value)
    assert tree(folder) == before


def test_a_write_that_fails_at_any_step_undoes_all_before_it(folder, monkeypatch):
    """Fail the n-th change of the disk, n = 1, 2, ..., until a run gets through."""
    answer = (whole("src/app.js") + whole("src/new/deep.js") + "DELETE: src/util.js\n"
              + whole("README.md"))
    before, steps, real = tree(folder), 0, {name: getattr(os, name) for name in
                                            ("replace", "unlink", "mkdir", "chmod")}
    for fail_at in range(1, 100):
        steps = 0

        def count(name):
            def step(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps == fail_at:
                    raise OSError(28, "No space left on device")
                return real[name](*args, **kwargs)
            return step

        for name in real:
            monkeypatch.setattr(os, name, count(name))
        try:
            apply(answer)
        except edits.AdapterError as error:
            assert "nothing was changed" in str(error)
            assert tree(folder) == before and not (folder / "src/new").exists()
        else:
            break
        finally:
            for name in real:
                monkeypatch.setattr(os, name, real[name])
    assert fail_at > 6
    assert set(tree(folder)) == (set(before) | {"src/new/deep.js"}) - {"src/util.js"}


# ── fuzz ────────────────────────────────────────────────────────────────────────────────────────

FRAGMENTS = [
    "FILE: src/app.js", "FILE: ../outside.txt", "FILE: /tmp/x", "src/util.js", "**README.md**",
    "FILE:", "FILE: .git/config", "FILE: tests/metric.py", "FILE: src/link.js",
    "FILE: src/folder/y.js", "FILE: src/n/e/w.js", "DELETE: src/app.js", "DELETE: ../outside.txt",
    "DELETE: .git/config", "READ: src/app.js", "```", "```js", "````", "`````", "~~~", "~~~~",
    "   ```", "    ```", "```js src/app.js", "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE",
    "const a = 1;", "let x = 1;", "  return a + b;", "--- a/src/app.js", "+++ b/src/app.js",
    "--- /dev/null", "+++ /dev/null", "+++ b/../outside.txt", "+++ b/src/n2.js",
    "@@ -1,2 +1,2 @@", "@@ @@", "@@", "-const a = 1;", "+x", " const b = 2;",
    "\\ No newline at end of file", "", "", "<think>", "</think>", "\ud800", "\x00", "\x1b[2J",
    "\u2028", "a\rb", "žluť", "SCALAR_LOOP_GIVE_UP", "rename from a", "diff --git a/x b/x"]


def test_no_answer_whatever_does_harm(folder):
    """Thousands of answers made of what parsers trip over: applied in scope, or refused."""
    (folder / "src/link.js").symlink_to(folder.parent / "outside.txt")
    (folder / "src/folder").symlink_to(folder.parent)
    fixed = {path: data for path, data in tree(folder.parent).items()
             if not path.startswith(("work/src/", "work/README.md"))}
    links = {"src/link.js", "src/folder"}
    valid = [case[1] for case in UNDERSTOOD]
    chance, applied = random.Random(20), 0
    for _ in range(3000):
        if chance.random() < 0.5:
            lines = [chance.choice(FRAGMENTS) for _ in range(chance.randrange(1, 14))]
        else:
            lines = chance.choice(valid).split("\n")
            for _ in range(chance.randrange(1, 4)):
                lines.insert(chance.randrange(len(lines) + 1), chance.choice(FRAGMENTS))
                lines.pop(chance.randrange(len(lines))) if chance.random() < 0.5 else None
        try:
            applied += bool(apply(chance.choice(["\n", "\n", "\r\n"]).join(lines)))
        except edits.EditError:
            pass
        if chance.random() < 0.1:
            for name, text in FILES.items():
                (folder / name).write_text(text)
    after = tree(folder.parent)
    assert {path: after.get(path) for path in fixed} == fixed
    strangers = {path[5:] for path in after if path.startswith("work/")} - set(FILES) - links
    assert all(path.startswith("src/") and path.endswith((".js", ".diff")) or path == ".git/config"
               for path in strangers), strangers
    assert (folder / "src/link.js").is_symlink() and applied > 200


def test_parsing_takes_time_in_proportion(folder):
    """Lines made to send a regular expression astray cost no more than others (bounded: 400 kB)."""
    for line in ("```" + " " * 400_000 + "`", "FILE:" + " *`" * 130_000, " " * 400_000 + "DELETE",
                 "<" * 400_000, "a/" * 200_000 + ".", "#*-` " * 80_000 + "FIL"):
        edits.Parser(line + "\n" + line, scope_of()).parse()


# ── scope ───────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("path,glob,inside", [
    ("src/a.js", "src/*.js", True), ("src/b/a.js", "src/*.js", False),
    ("a.js", "**/*.js", True), ("x/y/a.js", "**/*.js", True), ("src/a.js", "src/**", True),
    ("src/x/a.js", "src/**/a.js", True), ("src/A.js", "src/a.js", False),
    ("src/a.js", "src/[ab].js", True), ("asrc/a.js", "src/**", False),
    ("src/x/a.js", "src/", True), ("src", "src/**", False), ("src/a.js", "./src//*.js", True),
    ("src/.gitignore", "src/**", False), (".gitignore", ".gitignore", True),
    (".git/config", ".git/config", True), ("a/b/c/d", "**/c/**", True)])
def test_globs_match_segment_by_segment(path, glob, inside):
    assert edits.Scope((glob,), frozenset()).covers(path) is inside


def test_alone_it_finds_the_text_files_that_a_person_would_mean(folder):
    for name in ("node_modules/m.js", ".hidden/h.js", "__pycache__/c.js", "bin.dat"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\1")
    assert sorted(edits.read_scope().files) == ["README.md", "bin.dat", "src/app.js", "src/util.js",
                                               "tests/metric.py"]
    assert edits.read_text("bin.dat") is None


@pytest.mark.parametrize("variable,value", [
    ("SCALARLOOP_SCOPE", "{"), ("SCALARLOOP_FILES", "[1]"), ("SCALARLOOP_SCOPE", "[[]]")])
def test_a_broken_scope_is_said(folder, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(edits.AdapterError, match="SCALARLOOP_SCOPE"):
        edits.read_scope()
