"""The ledger alone: its one form, its chain, what an append guarantees, and that no change goes unseen."""
from __future__ import annotations

import dataclasses
import errno
import hashlib
import hmac
import json
import os
import random
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

import scalarloop
from conftest import Project, chained, lower_by
from scalarloop import Ledger, RecordBroken, Refused, ScalarLoopError, State


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return where a new ledger goes."""
    return str(tmp_path / "ledger.jsonl")


def add(ledger: Ledger, kind: str, **fields: Any) -> None:
    """Append one record."""
    ledger.append((kind, fields))


def write_some(path: str, count: int = 4, secret: Any = None) -> Ledger:
    """Write a ledger of a few records."""
    ledger = Ledger(path, secret)
    for number in range(count):
        add(ledger, "turn", n=number, turn=1, note='q"\\\u00e9\n', base="b" * 40, prompt_sha256="")
    return ledger


def read(path: str, secret: Any = None, strict: bool = True) -> List[Dict[str, Any]]:
    """Read a whole ledger."""
    return list(scalarloop.read_ledger(path, secret, strict=strict))


# ---- form and hash

def test_the_canonical_form_is_sorted_ascii_without_blanks() -> None:
    record = {"z": 1, "a": [1.5, None, True], "m": "\u00e9\u2028\U0001f600\x7f\n", "n": {"y": 0, "x": 1}}
    assert scalarloop.canonical(record) == (
        b'{"a":[1.5,null,true],"m":"\\u00e9\\u2028\\ud83d\\ude00\\u007f\\n","n":{"x":1,"y":0},"z":1}')


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_has_no_form(number: float) -> None:
    with pytest.raises(ValueError):
        scalarloop.canonical({"value": number})


def test_numbers_and_odd_texts_come_back_as_they_went(path: str) -> None:
    values = [0.1, 1e-320, 1.7976931348623157e308, -0.0, 2 ** 63, "\ud800", "\x00", "\u2028"]
    add(Ledger(path, None), "turn", values=values)
    found = read(path)[0]["values"]
    assert found == values and str(found[3]) == "-0.0"


def test_a_hash_is_sha256_of_the_canonical_record_without_it_and_names_the_one_before(path: str
                                                                                    ) -> None:
    write_some(path)
    prev = "0" * 64
    for line in Path(path).read_bytes().splitlines():
        record = json.loads(line)
        found = record.pop("hash")
        body = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        assert found == hashlib.sha256(body).hexdigest()
        assert record["prev"] == prev
        prev = found


def test_under_a_key_the_hash_is_an_hmac_that_nobody_else_can_make(path: str) -> None:
    secret = b"k" * 32
    write_some(path, secret=secret)
    record = json.loads(Path(path).read_bytes().splitlines()[0])
    found = record.pop("hash")
    assert found == hmac.new(secret, scalarloop.canonical(record), hashlib.sha256).hexdigest()
    assert len(read(path, secret)) == 4
    for other in (None, b"x" * 32):
        with pytest.raises(RecordBroken, match="line 1"):
            read(path, other)


def test_the_key_comes_from_the_file_that_the_environment_names(monkeypatch: pytest.MonkeyPatch,
                                                                tmp_path: Path) -> None:
    assert scalarloop.ledger_secret() is None
    key = tmp_path / "key"
    monkeypatch.setenv("SCALARLOOP_LEDGER_KEY", str(key))
    with pytest.raises(Refused, match="can't be read"):
        scalarloop.ledger_secret()
    key.write_bytes(b"short\n")
    with pytest.raises(Refused, match="shorter"):
        scalarloop.ledger_secret()
    key.write_bytes(b"0123456789abcdef0123456789abcdef\n")
    assert scalarloop.ledger_secret() == b"0123456789abcdef0123456789abcdef"


def test_a_hash_field_inside_a_record_is_not_taken_for_its_own(path: str) -> None:
    """`[adapter] hash = ...` puts such a field into the config, before the record's own."""
    ledger = Ledger(path, None)
    add(ledger, "start", config={"adapter": {"hash": "a" * 64, "model": "m"}})
    add(ledger, "turn", n=1)
    assert [record["seq"] for record in read(path)] == [0, 1]
    body = Path(path).read_bytes().replace(b"a" * 64, b"b" * 64)
    Path(path).write_bytes(body)
    with pytest.raises(RecordBroken, match="line 1"):
        read(path)


# ---- append

def test_an_append_is_on_disk_before_it_returns(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, flushed = Ledger(path, None), []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_size), fsync(fd)))
    add(ledger, "turn", n=1)
    assert flushed and flushed[-1] == os.path.getsize(path) > 0


def test_a_new_ledger_is_in_its_folder_before_the_first_record_is_acted_on(
        path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a flush of the folder a power cut may take the whole file away."""
    folders, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (folders.append(os.fstat(fd).st_ino), fsync(fd)))
    add(Ledger(path, None), "start")
    assert os.stat(os.path.dirname(path)).st_ino in folders


def rewrite_in_place(path: str) -> None:
    """Change a byte and put size and modification time back."""
    status = os.stat(path)
    with open(path, "r+b") as stream:
        stream.seek(30)
        stream.write(b"#")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_by_copy(path: str) -> None:
    """Put an equal file in place, with the same times."""
    status, data = os.stat(path), Path(path).read_bytes()
    Path(path + ".new").write_bytes(data)
    os.replace(path + ".new", path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_by_link(path: str) -> None:
    """Put a symlink to the same bytes in place."""
    os.rename(path, path + ".moved")
    os.symlink(path + ".moved", path)


def append_line(path: str) -> None:
    """Append somebody else's record."""
    with open(path, "ab") as stream:
        stream.write(b'{"type":"iteration","verdict":"keep"}\n')


def cut_tail(path: str) -> None:
    """Cut the last line off."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    os.truncate(path, sum(map(len, lines[:-1])))


TOUCHES: List[Callable[[str], None]] = [rewrite_in_place, replace_by_copy, replace_by_link,
                                        append_line, cut_tail, os.unlink]


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
def test_a_ledger_that_somebody_touched_gets_nothing_appended(path: str, touch: Callable[[str], None]
                                                              ) -> None:
    ledger = write_some(path)
    open_file = f"/proc/self/fd/{ledger._file}"
    touch(path)
    held = Path(open_file).read_bytes() if os.path.exists(open_file) else b""
    shown = Path(path).read_bytes() if os.path.exists(path) else b""
    with pytest.raises(RecordBroken) as caught:
        add(ledger, "turn", n=9)
    assert caught.value.exit_code == 4 and "ledger" in str(caught.value)
    assert (Path(path).read_bytes() if os.path.exists(path) else b"") == shown
    if held:
        assert Path(open_file).read_bytes() == held


def test_records_that_belong_together_are_written_together(path: str, monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:
    ledger, write, left = write_some(path), os.write, [200]
    before = Path(path).read_bytes()

    def cut(fd: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(fd, data[:left[0]])
        left[0] -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", cut)
        with pytest.raises(ScalarLoopError):
            ledger.append(("start", {"x": 1}), ("baseline", {"y": "z" * 300}))
    assert Path(path).read_bytes() == before
    again = Ledger(path, None, ledger.records, ledger.head)
    again.append(("start", {"x": 1}), ("baseline", {"y": 2}))
    assert [record["type"] for record in read(path)][-2:] == ["start", "baseline"]


def test_short_writes_are_carried_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, write = Ledger(path, None), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    for number in range(3):
        add(ledger, "turn", n=number)
    assert [record["n"] for record in read(path)] == [0, 1, 2]


@pytest.mark.parametrize("room", [0, 1, 50, 10_000])
def test_a_failed_write_leaves_the_ledger_as_it_was(path: str, room: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = write_some(path)
    before, left, write, fsync = Path(path).read_bytes(), [room], os.write, os.fsync

    def full(fd: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(fd, data[:left[0]])
        left[0] -= count
        return count

    def broken(fd: int) -> None:
        if room == 10_000:      # there was room, but the disk could not take it
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        patch.setattr(os, "fsync", broken)
        with pytest.raises(ScalarLoopError, match="start again") as caught:
            add(ledger, "turn", n=9)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert Path(path).read_bytes() == before
    again = Ledger(path, None, ledger.records, ledger.head)
    add(again, "turn", n=4)
    assert [record["n"] for record in read(path)] == [0, 1, 2, 3, 4]


def test_a_disk_that_can_t_even_cut_back_still_ends_in_one_clear_line(
        path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = write_some(path)

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises((ScalarLoopError, OSError)) as caught:
            add(ledger, "turn", n=4)
    assert not isinstance(caught.value, RecordBroken)
    assert [record["n"] for record in read(path)][:4] == [0, 1, 2, 3]     # whole, or torn at its end


# ---- a torn last line

def test_a_torn_last_line_is_dropped_by_a_resume_and_reported_otherwise(path: str) -> None:
    write_some(path)
    data = Path(path).read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    for cut in range(start + 1, len(data)):
        Path(path).write_bytes(data[:cut])
        with pytest.raises(RecordBroken, match="line 4: is cut off"):
            read(path)
        torn: List[bytes] = []
        assert len(list(scalarloop.read_ledger(path, None, torn))) == 3
        scalarloop.cut_torn_line(path, torn)
        assert Path(path).read_bytes() == data[:start]


# ---- changes

def broken_line(data: bytes, path: str, strict: bool) -> int:
    """Return the number of the line that reading complains about, 0 when it finds nothing."""
    Path(path).write_bytes(data)
    try:
        read(path, strict=strict)
    except RecordBroken as error:
        words = str(error).split()
        assert words[:2] == ["ledger", "line"], error
        return int(words[2].rstrip(":"))
    return 0


@pytest.mark.parametrize("strict", [True, False])
def test_every_single_byte_that_flips_is_found_at_its_line(finished: Project, path: str,
                                                           strict: bool) -> None:
    data = b"".join(finished.lines()[1:6])      # every type but start, which is long
    records = [json.loads(line) for line in data.splitlines()]
    data = chained(records)
    chance = random.Random(6)
    for at in range(len(data)):
        changed = bytes([data[at] ^ chance.randrange(1, 256)])
        line = data.count(b"\n", 0, at) + 1
        assert broken_line(data[:at] + changed + data[at + 1:], path, strict) == line, at


def test_every_byte_of_the_first_record_counts_too(finished: Project, path: str) -> None:
    data = finished.lines()[0]
    chance = random.Random(7)
    for at in chance.sample(range(len(data)), 300):
        for bit in (0, chance.randrange(1, 8)):
            flipped = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]
            assert broken_line(flipped, path, False) == 1


def test_a_byte_put_in_or_taken_out_is_found_at_its_line(finished: Project, path: str) -> None:
    data = b"".join(finished.lines())
    chance = random.Random(8)
    for _ in range(300):
        at = chance.randrange(len(data))
        line = data.count(b"\n", 0, at) + 1
        assert broken_line(data[:at] + data[at + 1:], path, False) == line
        put = bytes([chance.randrange(256)])
        assert broken_line(data[:at] + put + data[at:], path, True) in (
            line, line - 1 if put == b"\n" else line), (at, put)


def rearranged(lines: List[bytes]) -> Iterator[Tuple[str, List[bytes], int]]:
    """Yield every ledger with one line dropped, doubled or swapped, and the line that shows it."""
    last = len(lines) - 1
    for n in range(last):
        yield f"drop {n + 1}", lines[:n] + lines[n + 1:], n + 1
        yield f"double {n + 1}", lines[:n + 1] + lines[n:], n + 2
        yield f"swap {n + 1}", lines[:n] + [lines[n + 1], lines[n]] + lines[n + 2:], n + 1
        yield f"move {n + 1} to the end", lines[:n] + lines[n + 1:] + [lines[n]], n + 1
    yield f"double {last + 1}", lines + lines[-1:], last + 2
    yield "begin in the middle", lines[3:], 1
    yield "reverse", lines[::-1], 1


def test_every_line_dropped_doubled_or_moved_is_found(finished: Project, path: str) -> None:
    lines = finished.lines()
    assert len(lines) >= 10
    for name, changed, line in rearranged(lines):
        for strict in (True, False):
            assert broken_line(b"".join(changed), path, strict) == line, name


def rehashed(body: bytes) -> bytes:
    """Return a line of these bytes with a hash that fits them."""
    at = body.index(b'{"') + 1
    digest = hashlib.sha256(body).hexdigest().encode()
    return body[:at] + b'"hash":"%s",' % digest + body[at:] + b"\n"


def form(**fields: Any) -> bytes:
    """Return a canonical record without its hash."""
    base = {"v": 1, "seq": 0, "type": "turn", "prev": "0" * 64, "n": 1, "time": ""}
    return scalarloop.canonical({**base, **fields})


TRUE = form()
OTHER_FORMS = {
    "blank": TRUE.replace(b'"n":1', b'"n": 1'),
    "trailing blank": TRUE + b" ",
    "carriage return": TRUE + b"\r",
    "order": TRUE.replace(b'"seq":0,', b"").replace(b'{"n"', b'{"seq":0,"n"'),
    "doubled key": TRUE.replace(b'"n":1', b'"n":2,"n":1'),
    "exponent": TRUE.replace(b'"n":1', b'"n":1e0'),
    "long number": TRUE.replace(b'"n":1', b'"n":1.50'),
    "escaped letter": TRUE.replace(b'"turn"', b'"\\u0074urn"'),
    "capital escape": form(note="\u00e9").replace(b"\\u00e9", b"\\u00E9"),
    "raw UTF-8": form(note="\u00e9").replace(b"\\u00e9", "\u00e9".encode()),
    "raw Latin-1": form(note="\u00e9").replace(b"\\u00e9", b"\xe9"),
    "escaped slash": form(note="/").replace(b'"/"', b'"\\/"'),
    "NaN": TRUE.replace(b'"n":1', b'"n":NaN'),
    "Infinity": TRUE.replace(b'"n":1', b'"n":-Infinity'),
    "out of range": TRUE.replace(b'"n":1', b'"n":1e999'),
    "a number of 10,000 digits": TRUE.replace(b'"n":1', b'"n":' + b"1" * 10_000),
    "100,000 brackets": TRUE.replace(b'"n":1', b'"n":' + b"[" * 100_000 + b"]" * 100_000),
    "100,000 opening brackets": TRUE.replace(b'"n":1', b'"n":' + b"[" * 100_000),
    "no prev": TRUE.replace(b'"prev":"' + b"0" * 64, b'"prev":"'),
    "type is a number": TRUE.replace(b'"turn"', b"1"),
    "version is unknown": TRUE.replace(b'"v":1', b'"v":99'),
    "version is a text": TRUE.replace(b'"v":1', b'"v":"1"'),
    "a list": b"[" + TRUE + b"]",
}


def test_the_form_that_the_next_test_bends_is_a_good_one(path: str) -> None:
    assert broken_line(rehashed(TRUE), path, True) == 0


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_another_form_of_the_same_record_is_found_though_its_hash_fits(name: str, path: str) -> None:
    assert broken_line(rehashed(OTHER_FORMS[name]), path, True) == 1
    broken_line(rehashed(OTHER_FORMS[name]), path, False)     # a resume may take it or not, but not crash


# ---- while the loop runs

LEDGER_OF = 'import os, json; path = {ledger!r}; data = open(path, "rb").read(); '
MEANWHILE = {
    "append": 'open(path, "ab").write(data.splitlines(True)[-1])',
    "append nothing but a blank": 'open(path, "ab").write(b" ")',
    "cut": "os.truncate(path, len(data) - 1)",
    "rewrite in place": """
s = os.stat(path); f = open(path, "r+b"); f.write(data[:40] + b"#" + data[41:]); f.close()
os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))""",
    "put an equal copy in place": """
s = os.stat(path); open(path + ".x", "wb").write(data); os.utime(path + ".x", ns=(s.st_atime_ns, s.st_mtime_ns))
os.rename(path + ".x", path)""",
    "delete": "os.unlink(path)",
    "move the folder away": "os.rename(os.path.dirname(path), os.path.dirname(path) + '-moved')",
}


@pytest.mark.parametrize("name", MEANWHILE)
def test_a_ledger_touched_while_the_loop_runs_ends_it_at_once(project: Project, name: str) -> None:
    ledger = project.state / "ledger.jsonl"
    note = project.tmp / "as.left"
    attack = LEDGER_OF.format(ledger=str(ledger)) + "\n" + MEANWHILE[name] + (
        f'\nopen({str(note)!r}, "wb").write(open(path, "rb").read() if os.path.exists(path) else b"")\n')
    project.turns(lower_by(10), attack + lower_by(10).replace("\n        ", "\n"), lower_by(10))
    result = project.run()
    assert result.code == 4, result
    assert len(result.err.splitlines()) == 1 and "ledger" in result.err, result
    assert (ledger.read_bytes() if ledger.exists() else b"") == note.read_bytes()
    assert project.git("show", "scalarloop/t:src/value.txt") == "90"      # what was kept before stays


def test_bytes_changed_under_a_restored_time_are_found(project: Project) -> None:
    project.turns(lower_by(10), f"""
        import os
        ledger = {str(project.state / "ledger.jsonl")!r}
        status = os.stat(ledger)
        with open(ledger, "r+b") as stream:
            data = stream.read()
            stream.seek(data.index(b"metric.better"))
            stream.write(b"metric.bettes")
        os.utime(ledger, ns=(status.st_atime_ns, status.st_mtime_ns))
        """ + lower_by(10))
    result = project.run()
    assert result.code == 4 and "touched by somebody else" in result.err, result


def test_a_branch_moved_while_the_loop_runs_is_left_alone(project: Project) -> None:
    project.turns(lower_by(10), f"""
        import subprocess
        subprocess.run(["git", "update-ref", "refs/heads/scalarloop/t", "HEAD"], check=True,
                       cwd={str(project.root)!r})
        """ + lower_by(10))
    project.git("commit", "-q", "--allow-empty", "-m", "theirs")
    theirs = project.git("rev-parse", "HEAD")
    project.git("reset", "-q", "--hard", "HEAD~1")
    agent = (project.tmp / "turns" / "2.py")
    agent.write_text(agent.read_text().replace('"HEAD"]', f'"{theirs}"]'))
    result = project.run()
    assert result.code == 4 and "scalarloop/t" in result.err, result
    assert project.git("rev-parse", "scalarloop/t") == theirs
    assert project.call("verify").code == 4


def test_an_anchor_moved_while_the_loop_runs_is_left_alone(project: Project) -> None:
    project.turns(lower_by(10), f"""
        import subprocess
        subprocess.run(["git", "update-ref", "refs/scalarloop/t/ledger", "HEAD"], check=True,
                       cwd={str(project.root)!r})
        """ + lower_by(10))
    result = project.run()
    assert result.code == 4 and "refs/scalarloop/t/ledger" in result.err, result
    assert project.git("rev-parse", "refs/scalarloop/t/ledger") == project.git("rev-parse", "HEAD")


@pytest.mark.parametrize("harm", ["shutil.rmtree(store)", "shutil.rmtree(store + '/objects')",
                                  "[os.unlink(p) for p in glob.glob(store + '/objects/pack/*')]",
                                  "[open(p, 'r+b').truncate(40) for p in glob.glob(store + '/objects/pack/*')]",
                                  "open(store + '/HEAD', 'w').close()"])
def test_a_store_damaged_while_the_loop_runs_ends_it_without_a_traceback(project: Project, harm: str
                                                                         ) -> None:
    store = project.state / "store.git"
    project.turns(lower_by(10), f"""
        import glob, os, shutil
        store = {str(store)!r}
        for folder, _, names in os.walk(store):
            for name in names:
                os.chmod(os.path.join(folder, name), 0o600)
        {harm}
        """ + lower_by(10))
    result = project.run()
    assert result.code == 1 and "Traceback" not in result.err, result
    assert "store" in result.out + result.err
    assert project.git("show", "scalarloop/t:src/value.txt") in ("90", "80")
    assert project.call("verify").code == 0
    kept = len(project.git("rev-list", "main..scalarloop/t").split())
    project.turns(lower_by(10))
    again = project.run("--more", "1")      # the store is made anew from what was handed over
    assert again.code == 0 and project.git("show", "scalarloop/t:src/value.txt") == str(90 - 10 * kept)
    assert project.call("verify").code == 0


def test_a_damaged_store_is_left_alone_when_the_last_keep_is_nowhere_else(project: Project) -> None:
    project.turns(lower_by(10))
    assert project.run().code == 0
    for ref in ("refs/heads/scalarloop/t", "refs/scalarloop/t/ledger"):
        project.git("update-ref", "-d", ref)
    project.git("reflog", "expire", "--expire=now", "--all")
    project.git("gc", "--quiet", "--prune=now")
    packs = project.state / "store.git" / "objects" / "pack"
    for pack in packs.glob("*.pack"):
        pack.chmod(0o600)
        pack.write_bytes(pack.read_bytes()[:40])
    before = sorted(path.name for path in packs.iterdir())
    result = project.run("--more", "1")
    assert result.code == 1 and "--new" in result.err and len(result.err.splitlines()) == 1, result
    assert sorted(path.name for path in packs.iterdir()) == before


# ---- size

def synthetic(iterations: int) -> Iterator[Dict[str, Any]]:
    """Yield the records of a long run: one keep in a hundred iterations."""
    config = {name: dataclasses.asdict(schema()) for name, schema in scalarloop.SECTIONS.items()}
    config["adapter"] = {}
    yield {"type": "start", "v": 1, "time": "", "config": config, "base": "b" * 40, "tree": "d" * 40,
           "prefix": "", "lfs": [], "outside": {}, "tool_sha256": "e" * 64,
           **dict.fromkeys(scalarloop.ROOTS, "f" * 64)}
    yield {"type": "baseline", "v": 1, "time": "", "value": 1e6, "samples": [1e6] * 3, "name": "m",
           "metric_seconds": [1.0] * 3, "guards": {}, "holdout": None}
    best = 1e6
    for n in range(1, iterations + 1):
        keep = n % 100 == 0
        value = best - 1 if keep else best + n
        best = min(best, value)
        yield {"type": "turn", "v": 1, "time": "", "n": n, "turn": 1, "base": "b" * 40,
               "prompt_sha256": "p" * 64}
        yield {"type": "iteration", "v": 1, "time": "", "n": n, "elapsed": float(n), "value": value,
               "verdict": "keep" if keep else "discard", "best": best, "base": "b" * 40,
               "reason": "metric.better" if keep else "metric.not_better", "detail": "",
               "commit": "%040x" % n if keep else None, "tree": "%040x" % n, "holdout": None,
               "files": ["src/value.txt"], "dropped": 0, "evidence": "", "turns": 1, "note": "",
               "samples": {"candidate": [value], "incumbent": [], "pairs": []},
               "agent_seconds": [60.0], "metric_seconds": [1.0], "agent_exit": "exit 0",
               "prompt_sha256": "p" * 64, "log_sha256": "l" * 64}


def test_a_long_ledger_is_folded_without_being_held(path: str) -> None:
    """The times and the peak for 100,000 iterations: tests/bench/ledger.py."""
    Path(path).write_bytes(chained(synthetic(3000)))
    state = State()
    tracemalloc.start()
    try:
        for record in scalarloop.read_ledger(path, None, []):
            state.advance(record)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (state.iterations, len(state.keeps), state.best) == (3000, 30, 1e6 - 30)
    assert peak < os.path.getsize(path)       # 0.4 of it: the set of tried trees


def test_a_long_ledger_is_anchored_in_pieces_that_are_written_once(project: Project) -> None:
    """Otherwise every keep of a long run would put the whole ledger into the user's repository."""
    project.turns(lower_by(10))
    assert project.run().code == 0
    home = scalarloop.private_home(str(project.tmp))
    user = scalarloop.open_user_repository(scalarloop.find_git(), home, str(project.root))
    place = str(project.state / "store.git")
    store = scalarloop.Store(dataclasses.replace(user.repo, git_dir=place, work_tree="", cwd=place))
    ledger, chance = project.tmp / "ledger.jsonl", random.Random(1)
    commit, sizes, base = "", [], project.git("rev-parse", "main")
    for more in (100, 3 * scalarloop.PIECE, 1000, scalarloop.PIECE):
        with open(ledger, "ab") as stream:
            stream.write(bytes(chance.randrange(256) for _ in range(more)))
        last = commit
        store.write_anchor(str(ledger), "never handed over\n", user, base, last)
        commit, pack = store.write_anchor(str(ledger), "anchor\n", user, base, last)
        scalarloop.hand_over(user, pack)
        project.git("update-ref", "refs/scalarloop/t/ledger", commit)
        sizes.append(os.path.getsize(pack + ".pack"))
        archive = project.root / "anchor.tar"
        project.git("archive", "-o", str(archive), commit)
        with tarfile.open(archive) as tar:
            held = b"".join(tar.extractfile(name).read() for name in tar.getnames())  # type: ignore
        assert held == ledger.read_bytes()
    assert [size // scalarloop.PIECE for size in sizes] == [0, 3, 0, 1]
    project.git("fsck", "--strict")
