"""`verify`: every tampering with a finished run is found and named; honest differences only warn."""
from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

from conftest import TOOL, Project, chained, lower_by

ANCHOR = "refs/scalarloop/t/ledger"
BRANCH = "scalarloop/t"


def records_of(project: Project) -> List[Dict[str, Any]]:
    """Return the ledger's records, to change and chain anew."""
    return project.ledger()


def of_type(records: List[Dict[str, Any]], kind: str) -> Dict[str, Any]:
    """Return the first record of a type."""
    return next(record for record in records if record["type"] == kind)


def keeps_of(records: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return the keeps."""
    return [record for record in records if record.get("verdict") == "keep"]


def test_a_finished_run_is_whole(finished: Project) -> None:
    result = finished.call("verify")
    assert result.code == 0 and "warning" not in result.out and "BROKEN" not in result.out, result
    assert "2 keeps" in result.out and "verified" in result.out


# ---- the tamper table: what is done, and what verify must say

Tamper = Callable[[Project], None]
TABLE: List[Tuple[str, str, Tamper]] = []


def tamper(says: str) -> Callable[[Tamper], Tamper]:
    """Put a tampering into the table; `says` is looked for in what verify finds broken."""
    def add(act: Tamper) -> Tamper:
        TABLE.append((act.__name__, says, act))
        return act
    return add


@tamper("line 5")
def change_a_byte(project: Project) -> None:
    data = b"".join(project.lines())
    at = data.index(b'"prompt_sha256"', sum(map(len, project.lines()[:4])))
    project.put_ledger(data[:at + 1] + b"P" + data[at + 2:])


@tamper("line 4")
def drop_a_line(project: Project) -> None:
    project.put_ledger(b"".join(project.lines()[:3] + project.lines()[4:]))


@tamper("line 5")
def double_a_line(project: Project) -> None:
    lines = project.lines()
    project.put_ledger(b"".join(lines[:4] + lines[3:]))


@tamper("line 3")
def swap_two_lines(project: Project) -> None:
    lines = project.lines()
    project.put_ledger(b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]))


@tamper("cut off")
def tear_the_last_line(project: Project) -> None:
    project.put_ledger(b"".join(project.lines())[:-9])


@tamper("ledger")
def empty_the_ledger(project: Project) -> None:
    project.put_ledger(b"")


@tamper(ANCHOR)
def put_an_older_copy_back(project: Project) -> None:
    older = project.git("log", "-g", "--format=%H", ANCHOR, check=False).splitlines()
    first = older[-1] if older else project.git("rev-parse", f"{BRANCH}~1")
    data = project.git("show", f"{first}:ledger.jsonl", check=False) if older else ""
    project.put_ledger(data.encode() + b"\n" if data else b"".join(project.lines()[:4]))


@tamper(ANCHOR)
def chain_anew_with_a_better_number(project: Project) -> None:
    records = records_of(project)
    keep = keeps_of(records)[-1]
    keep.update(value=1.0, best=1.0)
    of_type(records, "stop")["best"] = 1.0
    project.put_ledger(chained(records))


@tamper("trailer")
def chain_anew_and_move_the_anchor_too(project: Project) -> None:
    records = records_of(project)
    of_type(records, "baseline")["samples"] = [200.0] * 3
    project.put_ledger(chained(records))
    move_anchor(project)


@tamper("trailer")
def chain_anew_with_another_value_in_one_keep(project: Project) -> None:
    records = records_of(project)
    keeps_of(records)[-1]["value"] = 79.0
    project.put_ledger(chained(records))
    move_anchor(project)


@tamper("n")
def count_an_iteration_twice(project: Project) -> None:
    records = records_of(project)
    place = records.index(keeps_of(records)[0])
    records.insert(place + 1, {**records[place], "verdict": "discard", "commit": None})
    project.put_ledger(chained(records))
    move_anchor(project)


@tamper("sealed files|trailer")
def rewrite_the_manifest(project: Project) -> None:
    records = records_of(project)
    of_type(records, "start")["seal_root"] = "0" * 64
    project.put_ledger(chained(records))
    move_anchor(project)


@tamper("sealed files|trailer|parent")
def rewrite_the_manifest_and_what_it_seals(project: Project) -> None:
    """Make another base whose sealed file is another one, and a ledger and branch upon it."""
    records = records_of(project)
    old = of_type(records, "start")["base"]
    tree = project.git("rev-parse", f"{plant(project, old, 'data/truth.txt', 'mine')}^{{tree}}")
    base = project.git("commit-tree", tree, "-m", "start")
    of_type(records, "start").update(base=base, tree=tree)
    for record in records:
        if record.get("base") == old:
            record["base"] = base
    project.put_ledger(chained(records))
    move_anchor(project)


@tamper("branch|" + BRANCH)
def amend_a_kept_commit(project: Project) -> None:
    message = project.git("log", "-1", "--format=%B", BRANCH)
    new = project.git("commit-tree", f"{BRANCH}^{{tree}}", "-p", f"{BRANCH}~1", "-m", message + "!")
    project.git("update-ref", f"refs/heads/{BRANCH}", new)


@tamper(BRANCH)
def move_the_branch_back(project: Project) -> None:
    project.git("update-ref", f"refs/heads/{BRANCH}", f"{BRANCH}~1")


@tamper(BRANCH)
def move_the_branch_on(project: Project) -> None:
    new = plant(project, BRANCH, "src/value.txt", "1\n")
    project.git("update-ref", f"refs/heads/{BRANCH}", new)


@tamper(BRANCH)
def delete_the_branch(project: Project) -> None:
    project.git("update-ref", "-d", f"refs/heads/{BRANCH}")


@tamper("outside the scope|trailer")
def smuggle_a_commit_in_and_forge_the_ledger(project: Project) -> None:
    smuggle(project, "metric.py", "print('METRIC value=0')\n")


@tamper("sealed|outside the scope")
def smuggle_a_sealed_change_into_a_new_session(project: Project) -> None:
    """Records are added after the anchor, as anybody can to a chain without a key."""
    smuggle(project, "data/truth.txt", "mine\n", after=True)


@tamper(ANCHOR)
def delete_the_anchor(project: Project) -> None:
    project.git("update-ref", "-d", ANCHOR)


@tamper(ANCHOR)
def move_the_anchor_to_something_else(project: Project) -> None:
    project.git("update-ref", ANCHOR, "HEAD")


@tamper(ANCHOR)
def move_the_anchor_to_a_blob(project: Project) -> None:
    project.git("update-ref", ANCHOR, project.git("rev-parse", "HEAD:metric.py"))


@tamper(ANCHOR)
def put_garbage_into_the_anchor(project: Project) -> None:
    (project.root / ".git" / ANCHOR).write_bytes(b"garbage\n")


@tamper(ANCHOR)
def let_the_anchor_name_a_record_to_come(project: Project) -> None:
    anchor(project, f"seq 999 hash {'a' * 64}\n")


@tamper("")
def delete_the_objects_of_the_keeps(project: Project) -> None:
    commit = project.git("rev-parse", f"{BRANCH}~1")
    remove_object(project, commit)


@tamper("")
def delete_a_blob_of_the_base(project: Project) -> None:
    remove_object(project, project.git("rev-parse", f"{BRANCH}:data/truth.txt"))


@tamper("")
def fill_a_sealed_object_with_other_bytes(project: Project) -> None:
    oid = project.git("rev-parse", f"{BRANCH}:data/truth.txt")
    other = project.git("rev-parse", f"{BRANCH}:metric.py")
    loosen(project)
    objects = project.root / ".git" / "objects"
    target = objects / oid[:2] / oid[2:]
    target.chmod(0o644)
    shutil.copyfile(objects / other[:2] / other[2:], target)


@tamper("")
def graft_other_objects_over_the_sealed_ones(project: Project) -> None:
    """A ref of refs/replace must not change what verify sees: the graft itself is no break."""
    mine = project.git("rev-parse", f"{plant(project, BRANCH, 'data/truth.txt', 'x')}:data/truth.txt")
    project.git("replace", project.git("rev-parse", f"{BRANCH}:data/truth.txt"), mine)
    smuggle(project, "data/truth.txt", "x", after=True)


def plant(project: Project, parent: str, path: str, text: str, message: str = "planted") -> str:
    """Return a commit on `parent` with one file changed; nothing points at it."""
    blob = project.write("../planted", text)
    oid = project.git("hash-object", "-w", "--no-filters", str(blob))
    index = {**os.environ, "GIT_INDEX_FILE": str(project.tmp / "planted.index")}
    for words in (["read-tree", parent], ["update-index", "--add", "--cacheinfo", f"100644,{oid},{path}"]):
        subprocess.run(["git", *words], cwd=project.root, env=index, check=True)
    tree = subprocess.run(["git", "write-tree"], cwd=project.root, env=index, check=True,
                                     stdout=subprocess.PIPE).stdout.decode().strip()
    return project.git("commit-tree", tree, "-p", parent, "-m", message)


def smuggle(project: Project, path: str, text: str, after: bool = False) -> None:
    """Put a commit onto the branch and forge the ledger's records for it, chain and trailers included."""
    records = records_of(project)
    keep, stop = dict(keeps_of(records)[-1]), of_type(records, "stop")
    place = len(records) if after else records.index(stop)
    if after:
        records.append({**of_type(records, "start"), "type": "resume", "more": 1, "limits": []})
        place += 1
    forged = [json.loads(line) for line in chained(records[:place]).splitlines()]
    n = max(row["n"] for row in records if row["type"] == "iteration") + 1
    message = (f"#{n} value 80 -> 70 (-12.5 %)\n\nScalar-Loop-Iteration: {n}\n"
               f"Scalar-Loop-Metric: value=70\nScalar-Loop-Base: {keep['base']}\n"
               f"Scalar-Loop-Ledger: {place - 1} {forged[-1]['hash']}\n")
    commit = plant(project, BRANCH, path, text, message)
    keep.update(n=n, base=keep["commit"], commit=commit, value=70.0, best=70.0, files=[path],
                tree=project.git("rev-parse", f"{commit}^{{tree}}"), turns=0)
    tail = [keep, {**stop, "best": 70.0, "tip": commit}]
    project.put_ledger(chained(records[:place] + tail))
    project.git("update-ref", f"refs/heads/{BRANCH}", commit)
    move_anchor(project)


def anchor(project: Project, message: str) -> None:
    """Point the anchor at a commit of this message that holds the ledger."""
    blob = project.git("hash-object", "-w", "--no-filters", str(project.state / "ledger.jsonl"))
    tree = project.git("mktree", stdin=f"100644 blob {blob}\tledger.jsonl\n")
    project.git("update-ref", ANCHOR, project.git("commit-tree", tree, "-m", message))


def move_anchor(project: Project) -> None:
    """Let the anchor name the ledger's last record, as somebody may who can write the repository."""
    last = project.ledger()[-1]
    anchor(project, f"seq {last['seq']} hash {last['hash']}\n")


@tamper("another set-up.*direction.*seal_root")
def go_on_under_another_config(project: Project) -> None:
    records = records_of(project)
    start = records[0]
    config = {**start["config"], "metric": {**start["config"]["metric"], "direction": "maximize"}}
    records.append({**start, "type": "resume", "more": 2, "limits": [], "config": config,
                    "seal_root": "1" * 64})
    project.put_ledger(chained(records))


@tamper("they move together")
def cut_the_tail_and_put_the_anchor_back(project: Project) -> None:
    records, lines = records_of(project), project.lines()
    first, last = keeps_of(records)
    place = records.index(first) + 1
    project.put_ledger(b"".join(lines[:place]))
    move_anchor(project)
    project.put_ledger(b"".join(lines[:records.index(last) + 1]))


@tamper("copy of the ledger")
def put_another_file_into_the_anchor(project: Project) -> None:
    last = project.ledger()[-1]
    data = project.root / "garbage"
    data.write_text("garbage\n")
    blob = project.git("hash-object", "-w", str(data))
    tree = project.git("mktree", stdin=f"100644 blob {blob}\tledger.jsonl\n")
    commit = project.git("commit-tree", tree, "-m", f"seq {last['seq']} hash {last['hash']}")
    project.git("update-ref", ANCHOR, commit)
    data.unlink()


@tamper("holds other bytes|hash mismatch")
def rewrite_a_tree_of_the_tip_in_place(project: Project) -> None:
    """Git hashes blobs' ids when they are written, and takes a tree for what it finds."""
    rewrite_tree(project, project.git("rev-parse", f"{BRANCH}:src"))


@tamper("holds other bytes|hash mismatch")
def rewrite_a_tree_between_base_and_tip_in_place(project: Project) -> None:
    rewrite_tree(project, project.git("rev-parse", f"{BRANCH}~1:src"))


@tamper("hash mismatch|its parent")
def rewrite_the_tip_s_commit_in_place(project: Project) -> None:
    loosen(project)
    other = project.git("commit-tree", f"{BRANCH}^{{tree}}", "-m", "x")
    swap_objects(project, project.git("rev-parse", BRANCH), other)


@tamper("not a regular file")
def make_the_ledger_a_link(project: Project) -> None:
    path = project.state / "ledger.jsonl"
    path.rename(project.state / "elsewhere")
    path.symlink_to("elsewhere")


@tamper("not a regular file")
def make_the_ledger_a_pipe(project: Project) -> None:
    (project.state / "ledger.jsonl").unlink()
    os.mkfifo(project.state / "ledger.jsonl")


def rewrite_tree(project: Project, tree: str) -> None:
    """Let this tree hold another value, under the same name."""
    loosen(project)
    (project.root / "forged").write_text("6666\n")
    blob = project.git("hash-object", "-w", str(project.root / "forged"))
    (project.root / "forged").unlink()
    rows = project.git("ls-tree", tree).splitlines()
    other = project.git("mktree", stdin="".join(
        (f"100644 blob {blob}\tvalue.txt" if row.endswith("value.txt") else row) + "\n" for row in rows))
    swap_objects(project, tree, other)


def swap_objects(project: Project, name: str, content: str) -> None:
    """Put the bytes of one loose object under the name of another."""
    objects = project.root / ".git" / "objects"
    target = objects / name[:2] / name[2:]
    target.chmod(0o600)
    target.write_bytes((objects / content[:2] / content[2:]).read_bytes())


def loosen(project: Project) -> None:
    """Unpack every pack of the repository."""
    packs = project.root / ".git" / "objects" / "pack"
    for pack in sorted(packs.glob("*.pack")):
        aside = project.tmp / pack.name
        shutil.move(str(pack), aside)
        with open(aside, "rb") as stream:
            subprocess.run(["git", "unpack-objects", "-q"], cwd=project.root, stdin=stream,
                                      check=True)
        for rest in packs.glob(pack.stem + ".*"):
            rest.unlink()


def remove_object(project: Project, oid: str) -> None:
    """Take one object away."""
    loosen(project)
    (project.root / ".git" / "objects" / oid[:2] / oid[2:]).unlink()


@pytest.mark.parametrize("name,says,act", TABLE, ids=[row[0] for row in TABLE])
def test_a_tampering_is_found_and_named(finished: Project, name: str, says: str, act: Tamper) -> None:
    act(finished)
    result = finished.call("verify")
    assert result.code == 4, result
    broken = "\n".join(line for line in (result.out + result.err).splitlines()
                       if line.startswith(("BROKEN", "scalarloop: ")))
    assert broken and re.search(says, broken), result
    assert "Traceback" not in result.out + result.err


@pytest.mark.parametrize("field", ["base", "tree", "commit"])
def test_a_forged_object_name_is_not_taken_for_an_option(finished: Project, tmp_path: Path, field: str
                                                         ) -> None:
    written = tmp_path / "written"
    for value in (f"--output={written}", "-h", "HEAD", "main", BRANCH, "a" * 39, "A" * 40):
        records = records_of(finished)
        for record in records:
            if field in record and record[field]:
                record[field] = value
        finished.put_ledger(chained(records))
        move_anchor(finished)
        for command in ("verify", "status"):
            result = finished.call(command)
            assert result.code == 4, (value, result)
    assert not written.exists()


@pytest.mark.parametrize("act", [
    change_a_byte, drop_a_line, double_a_line, swap_two_lines, tear_the_last_line,
    put_an_older_copy_back, chain_anew_with_a_better_number, move_the_anchor_to_something_else,
    move_the_anchor_to_a_blob, let_the_anchor_name_a_record_to_come,
    amend_a_kept_commit], ids=lambda act: act.__name__)
def test_a_start_does_not_go_on_from_a_record_that_is_broken(finished: Project, act: Tamper) -> None:
    """It looks at chain, anchor and branch; the rest is for `verify`."""
    act(finished)
    before = b"".join(finished.lines())
    result = finished.call("--more", "1")
    assert result.code == 4 or act is amend_a_kept_commit and result.code == 2, result
    assert "Traceback" not in result.err
    assert before.startswith(b"".join(finished.lines()))
    if act is not tear_the_last_line:
        assert b"".join(finished.lines()) == before


def test_a_start_does_not_go_on_past_an_anchor_that_is_no_ref(finished: Project) -> None:
    put_garbage_into_the_anchor(finished)
    tip = finished.git("rev-parse", BRANCH)
    result = finished.call("--more", "1")
    assert result.code in (1, 4) and ANCHOR in result.err and len(result.err.splitlines()) == 1, result
    assert finished.git("rev-parse", BRANCH) == tip


@pytest.mark.parametrize("act", [change_a_byte, swap_two_lines, chain_anew_with_a_better_number,
                                 move_the_branch_back, delete_the_anchor, tear_the_last_line],
                         ids=lambda act: act.__name__)
def test_a_broken_record_can_be_set_aside(finished: Project, act: Tamper) -> None:
    """`--new` keeps it, branch included; only a branch that can't be told for this run's is in the way."""
    act(finished)
    broken, tip = b"".join(finished.lines()), finished.git("rev-parse", BRANCH)
    result = finished.run("--new")
    if result.code == 2:
        assert "branch" in result.err and "rename it" in result.err, result
        finished.git("branch", "-m", BRANCH, "aside")
        result = finished.run("--new")
    assert result.code == 0, result
    aside = finished.state.with_name("t.1")
    assert (aside / "ledger.jsonl").read_bytes() == broken
    assert tip in finished.git("for-each-ref", "--format=%(objectname)", "refs/heads")
    assert finished.call("verify").code == 0


def test_a_start_refuses_an_empty_ledger_beside_an_anchor(finished: Project) -> None:
    finished.put_ledger(b"")
    result = finished.call()
    assert result.code in (2, 4) and "earlier run" in result.err, result
    assert (finished.state / "store.git").is_dir() and (finished.state / "iterations").is_dir()


def test_a_tail_cut_at_any_line_is_found_once_the_stop_is_anchored(finished: Project) -> None:
    lines = finished.lines()
    for kept in range(len(lines)):
        finished.put_ledger(b"".join(lines[:kept]))
        result = finished.call("verify")
        assert result.code == 4 and "BROKEN" in result.out + result.err, (kept, result)
    finished.put_ledger(b"".join(lines))
    assert finished.call("verify").code == 0


def test_a_tail_cut_below_the_last_keep_is_found_even_without_the_anchor(finished: Project) -> None:
    lines, records = finished.lines(), records_of(finished)
    finished.git("update-ref", "-d", ANCHOR)
    for kept in range(records.index(keeps_of(records)[-1]) + 1):
        finished.put_ledger(b"".join(lines[:kept]))
        assert finished.call("verify").code == 4, kept


def test_a_record_that_is_ahead_of_its_hand_back_is_not_called_broken(finished: Project) -> None:
    """Killed between the record of a keep and its publication: the next start publishes it."""
    records, lines = records_of(finished), finished.lines()
    first, last = keeps_of(records)
    finished.put_ledger(b"".join(lines[:records.index(last) + 1]))
    finished.git("update-ref", f"refs/heads/{BRANCH}", first["commit"])
    place = records.index(first)
    anchor(finished, f"seq {place} hash {first['hash']}\n")
    result = finished.call("verify")
    assert result.code == 0 and "warning" in result.out, result
    finished.git("update-ref", f"refs/heads/{BRANCH}", plant(finished, "HEAD", "x", "somebody else's"))
    assert finished.call("verify").code == 4


def test_a_pending_record_does_not_hide_what_is_wrong_before_it(finished: Project) -> None:
    records = records_of(finished)
    first, last = keeps_of(records)
    remove_object(finished, finished.git("rev-parse", f"{first['commit']}:src/value.txt"))
    remove_object(finished, first["commit"])
    forged = {**last, "n": 5, "commit": "a" * 40, "tree": "b" * 40, "base": last["commit"]}
    stop = records.pop()
    resumed = {**records[0], "type": "resume", "more": 1, "limits": []}
    finished.put_ledger(chained([*records, stop, resumed, forged]))
    result = finished.call("verify")
    assert result.code == 4 and first["commit"][:12] in result.out, result


# ---- what only warns

def test_a_limit_may_change_and_any_other_key_is_not_the_run_s(finished: Project) -> None:
    finished.config["loop"]["iterations"] = 99
    finished.save_config()
    result = finished.call("verify")
    assert result.code == 0 and "warning" not in result.out, result
    finished.config["loop"]["goal"] = "Another one."
    finished.save_config()
    result = finished.call("verify")
    assert result.code == 4, result
    assert re.search(r"BROKEN .*loop\.ini .*\[loop\] goal", result.out), result


def test_a_scope_widened_in_loop_ini_does_not_widen_what_was_allowed(finished: Project) -> None:
    smuggle(finished, "metric.py", "print('METRIC value=0')\n", after=True)
    finished.config["loop"]["scope"] = "src/** metric.py"
    finished.save_config()
    assert finished.call("verify").code == 4


def test_another_tool_is_a_warning(finished: Project, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_bytes(TOOL.read_bytes() + b"# one more comment\n")
    done = subprocess.run([finished.python, str(other), "verify", "loop.ini"],
                                     cwd=finished.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0 and b"warning  this scalarloop.py is not" in done.stdout


def test_a_clock_that_went_backwards_is_a_warning(project: Project, tmp_path: Path) -> None:
    project.turns(lower_by(10), lower_by(10))
    project.save_config()
    log = str(tmp_path / "clock.log")
    faults = str(Path(__file__).with_name("faults.py"))
    done = subprocess.run([project.python, faults, "clock", "4", log, "loop.ini"],
                                     cwd=project.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done
    assert os.path.exists(log)
    result = project.call("verify")
    assert result.code == 0 and re.search(r"warning .*record 3: the clock went backwards", result.out)


def test_a_sealed_file_outside_the_tree_that_changed_is_a_warning(project: Project, tmp_path: Path
                                                                 ) -> None:
    data = tmp_path / "outside.txt"
    data.write_text("sealed")
    project.config["loop"]["seal"] = str(data)
    project.turns(lower_by(10))
    assert project.run().code == 0
    assert "warning" not in project.call("verify").out
    data.write_text("other")
    result = project.call("verify")
    assert result.code == 0 and f"{data} is not here as it was" in result.out


def test_without_a_run_verify_is_refused_in_one_line(project: Project) -> None:
    result = project.call("verify")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "no ledger" in result.err


def test_verify_writes_nothing(finished: Project) -> None:
    def everything() -> Dict[str, Tuple[int, int]]:
        return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size)
                for path in finished.root.rglob("*") if not stat.S_ISDIR(path.lstat().st_mode)}
    before = everything()
    assert finished.call("verify").code == 0
    assert finished.call("verify", "--replay").code == 0
    assert everything() == before and finished.leftovers() == []


def test_a_replay_whose_holdout_has_files_writes_nothing_either(project: Project) -> None:
    project.write("holdout/truth.txt", "100\n")
    project.commit("the holdout's")
    project.config["holdout"] = {"command": "python3 metric.py", "files": "holdout"}
    project.config["metric"]["git"] = "yes"
    project.turns(lower_by(10))
    assert project.run().code == 0
    objects = project.root / ".git" / "objects"
    before = sorted(objects.rglob("*"))
    result = project.call("verify", "--replay")
    assert result.code == 0 and result.out.count("exactly") == 2, result
    assert sorted(objects.rglob("*")) == before


def test_a_replay_of_a_run_without_keeps(project: Project) -> None:
    project.turns(lower_by(-10))
    assert project.run().code == 0
    result = project.call("verify", "--replay")
    assert result.code == 0 and result.out.count("exactly") == 1, result


# ---- a stranger

def test_a_stranger_can_check_the_run_from_a_clone_alone(finished: Project, tmp_path: Path) -> None:
    """The branch and refs/scalarloop/* are all that has to be pushed: they carry the ledger."""
    hub = tmp_path / "hub.git"
    finished.git("init", "-q", "--bare", str(hub))
    finished.git("push", "-q", str(hub), "HEAD:refs/heads/main", BRANCH,
                 "refs/scalarloop/*:refs/scalarloop/*")
    finished.git("clone", "-q", "--branch", "main", str(hub), str(tmp_path / "clone"), cwd=tmp_path)
    stranger = Project(tmp_path / "clone", tmp_path)
    stranger.config = finished.config
    stranger.git("fetch", "-q", "origin", f"{BRANCH}:{BRANCH}", "refs/scalarloop/*:refs/scalarloop/*")
    stranger.state.mkdir(parents=True)
    stranger.put_ledger(stranger.git("show", f"{ANCHOR}:ledger.jsonl").encode() + b"\n")
    assert stranger.lines() == finished.lines()
    result = stranger.call("verify")
    assert result.code == 0 and "BROKEN" not in result.out, result
    replayed = stranger.call("verify", "--replay")
    assert replayed.code == 0 and replayed.out.count("exactly") == 3, replayed
    change_a_byte(stranger)
    assert stranger.call("verify").code == 4


# ---- replay

def test_replay_measures_the_baseline_and_every_keep_again(finished: Project) -> None:
    result = finished.call("verify", "--replay")
    assert result.code == 0 and "warning" not in result.out, result
    said = re.findall(r"ok +replay (\S+): (\S+), exactly", result.out)
    assert said == [("baseline", "100"), ("#1", "90"), ("#3", "80")]


def test_replay_says_which_numbers_do_not_come_again(project: Project, tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    offset.write_text("0")
    project.write("metric.py", f"""
        value = int(open("src/value.txt").read())
        other = int(open({str(offset)!r}).read())
        print("METRIC value=%d" % (value if value > 95 else value + other))
    """)
    project.commit("a metric that depends on something outside")
    project.turns(lower_by(10), lower_by(10))
    assert project.run().code == 0
    offset.write_text("1")
    result = project.call("verify", "--replay")
    assert result.code == 0, result
    assert re.search(r"ok +replay baseline: 100, exactly", result.out)
    assert re.search(r"warning +replay #1: 91, recorded 90", result.out)
    assert re.search(r"warning +replay #2: 81, recorded 80", result.out)
    offset.unlink()
    result = project.call("verify", "--replay")
    assert result.code == 0 and "replay #2: fails here" in result.out, result


NOISY = """
    import pathlib, random
    value = int(pathlib.Path("src/value.txt").read_text())
    print("METRIC value=%.6f" % (value + random.gauss(0, 1)))
"""


def test_replay_of_a_noisy_metric_goes_by_the_noise(project: Project) -> None:
    project.write("metric.py", NOISY)
    project.commit("a noisy metric")
    project.turns(lower_by(40), lower_by(-10))
    assert project.run().code == 0
    assert [row["verdict"] for row in project.iterations()] == ["keep", "discard"]
    result = project.call("verify", "--replay")
    assert result.code == 0, result
    assert result.out.count("within the noise") == 2, result
    assert "exactly" not in result.out


def test_replay_notices_a_noisy_metric_that_is_another_one_now(project: Project, tmp_path: Path
                                                              ) -> None:
    shift = tmp_path / "shift"
    shift.write_text("0")
    project.write("metric.py", NOISY.replace("random.gauss(0, 1)",
                                             f"random.gauss(0, 1) + int(open({str(shift)!r}).read())"))
    project.commit("a noisy metric")
    project.turns(lower_by(40))
    assert project.run().code == 0
    shift.write_text("50")
    result = project.call("verify", "--replay")
    assert result.code == 0 and result.out.count("recorded") == 2, result


def test_replay_does_not_run_on_a_broken_record(finished: Project, tmp_path: Path) -> None:
    change_a_byte(finished)
    result = finished.call("verify", "--replay")
    assert result.code == 4 and "replay" not in result.out


def test_a_cut_tail_of_a_run_with_one_keep_is_found_though_its_anchor_is_gone(project: Project) -> None:
    project.turns(lower_by(10), lower_by(-5), lower_by(-7))
    assert project.run().code == 0
    records, lines = records_of(project), project.lines()
    project.put_ledger(b"".join(lines[:records.index(keeps_of(records)[0]) + 1]))
    project.git("update-ref", "-d", ANCHOR)
    result = project.call("verify")
    assert result.code == 4 and "tail was cut" in result.out, result


@pytest.mark.parametrize("section, name, value", [
    ("loop", "scope", 5), ("loop", "scope", [5]), ("loop", "seal", None), ("loop", "ignore", [None]),
    ("loop", "iterations", "x"), ("loop", "branch", 7), ("metric", "direction", []), ("more", "", 5),
    ("guard.x", "command", ["true"]), ("loop", "budget", {})])
@pytest.mark.parametrize("kind", ["start", "resume"])
def test_a_config_of_another_kind_in_a_record_is_a_broken_record(
        finished: Project, kind: str, section: str, name: str, value: Any) -> None:
    records = records_of(finished)
    config = json.loads(json.dumps(records[0]["config"]))
    if name:
        config.setdefault(section, {})[name] = value
    else:
        config[section] = value
    if kind == "start":
        records[0]["config"] = config
    else:
        records.append({**records[0], "type": "resume", "more": 2, "limits": [], "config": config})
    finished.put_ledger(chained(records))
    for words in (["verify"], ["status"], ["check"], []):
        result = finished.call(*words)
        assert result.code == 4 and "Traceback" not in result.err, (words, result)


@pytest.mark.parametrize("act", [make_the_ledger_a_link, make_the_ledger_a_pipe])
def test_no_command_follows_or_waits_for_what_stands_for_a_ledger(finished: Project, act: Tamper) -> None:
    act(finished)
    for words in (["status"], ["prompt"], ["check"], [], ["--more", "1"]):
        result = finished.call(*words)
        assert result.code == 4 and "not a regular file" in result.err + result.out, (words, result)


@pytest.mark.parametrize("change", [
    {"closing": {"gain": 10 ** 400, "low": 1, "high": 1, "pairs": []}}, {"best": 10 ** 400},
    {"closing": {"gain": 1, "low": 1, "high": 1, "pairs": [5]}}, {"elapsed": 10 ** 400}])
def test_a_number_that_is_none_in_a_record_is_a_broken_record(finished: Project, change: Any) -> None:
    records = records_of(finished)
    records[-1].update(change)
    finished.put_ledger(chained(records))
    for words in (["verify"], ["status"], ["check"], []):
        result = finished.call(*words)
        assert result.code == 4 and "Traceback" not in result.err, (words, result)


@pytest.mark.parametrize("change", [{"samples": [1]}, {"samples": {"candidate": [10 ** 400]}}, {"value": 10 ** 400}, {"agent_seconds": [10 ** 400]}])
def test_an_iteration_that_cannot_be_shown_is_a_broken_record(finished: Project, change: Any) -> None:
    records = records_of(finished)
    keeps_of(records)[0].update(change)
    finished.put_ledger(chained(records))
    for words in (["status"], ["verify"]):
        result = finished.call(*words)
        assert result.code == 4 and "Traceback" not in result.err, (words, result)


# ---- what is no tampering

def test_a_stop_and_a_resume_that_are_not_handed_back_yet_are_no_cut_tail(finished: Project) -> None:
    """The disk is full when the stop is to be handed back, and again when the next start is."""
    records = records_of(finished)
    last, stop = keeps_of(records)[-1], records[-1]
    resumed = {**records[0], "type": "resume", "more": 1, "limits": []}
    place = records.index(last)
    finished.put_ledger(b"".join(finished.lines()[:place + 1]))
    move_anchor(finished)
    finished.put_ledger(chained([*records[:place + 1], stop]))
    assert finished.call("verify").code == 0
    finished.put_ledger(chained([*records[:place + 1], stop, resumed]))
    result = finished.call("verify")
    assert result.code == 0 and "not handed back yet" in result.out, result


def test_a_run_without_keeps_outlives_its_amended_and_pruned_base(project: Project) -> None:
    project.turns(lower_by(-10), lower_by(-20))
    assert project.run().code == 0
    project.git("commit", "-q", "--amend", "-m", "another")
    project.git("reflog", "expire", "--expire=now", "--all")
    project.git("gc", "--quiet", "--prune=now")
    assert project.call("verify").code == 0
    project.turns(lower_by(10))
    result = project.run("--more", "2")
    assert result.code == 0 and "not part of it" in result.out, result
    assert project.call("verify").code == 0 and project.git("fsck", "--strict", "--no-dangling") == ""


def test_a_run_that_was_set_aside_can_be_verified(finished: Project) -> None:
    assert finished.call("--new").code == 0
    assert finished.call("verify").code == 0
    finished.config["loop"]["name"] = "t.1"
    finished.save_config()
    result = finished.call("verify", "--replay")
    assert result.code == 0 and "scalarloop/t.1" in result.out, result


def test_a_clone_without_the_branch_is_told_how_to_get_it(finished: Project) -> None:
    finished.git("update-ref", "-d", f"refs/heads/{BRANCH}")
    result = finished.call("verify")
    assert result.code == 4 and f"git fetch origin {BRANCH}:{BRANCH}" in result.out, result


def test_the_command_that_is_named_gets_the_ledger_back(finished: Project) -> None:
    whole = finished.lines()
    finished.put_ledger(b"".join(whole[:-1]))
    result = finished.call()
    assert result.code == 4, result
    command = re.search(r"back \((mkdir .*? && mv .*?)\), or", result.err)[1]
    finished.git("config", "core.autocrlf", "true")
    (finished.root / "src" / "deep").mkdir()
    subprocess.run(["sh", "-c", command.replace("/t/ledger ", "/nowhere ")], cwd=finished.tmp,
                   stderr=subprocess.DEVNULL)
    assert finished.lines() == whole[:-1]       # nothing is lost where there is no anchor
    for place in (finished.root / "src" / "deep", finished.tmp):
        finished.put_ledger(b"".join(whole[:-1]))
        subprocess.run(["sh", "-c", command], cwd=place, check=True)
        assert finished.lines() == whole
    shutil.rmtree(finished.state)
    subprocess.run(["sh", "-c", command], cwd=finished.tmp, check=True)
    assert finished.lines() == whole and finished.call("verify").code == 0


# ---- with a key

@pytest.fixture
def keyed(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Return a finished run whose ledger is under a key, which is in force."""
    (tmp_path / "key").write_bytes(b"0123456789abcdef0123456789abcdef")
    (tmp_path / "wrong").write_bytes(b"another key, also long enough")
    monkeypatch.setenv("SCALARLOOP_LEDGER_KEY", str(tmp_path / "key"))
    project.turns(lower_by(10))
    assert project.run().code == 0
    return project


def test_under_a_key_nobody_else_can_make_the_chain_anew(keyed: Project, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    assert keyed.call("verify").code == 0
    whole, records = b"".join(keyed.lines()), records_of(keyed)
    for secret in (None, b"a key of the forger's own"):
        keyed.put_ledger(chained(records, secret))
        move_anchor(keyed)
        result = keyed.call("verify")
        assert result.code == 4 and "line 1" in result.out, result
    for row in records:
        row.update({"keyed": False} if row["type"] == "start" else {})
    keyed.put_ledger(chained(records))
    assert keyed.call("verify").code == 4
    keyed.put_ledger(whole)


@pytest.mark.parametrize("command", ["verify", "status", ""])
def test_a_wrong_or_missing_key_is_told_from_a_tampering(keyed: Project, tmp_path: Path, command: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    words = [command] if command else []
    monkeypatch.setenv("SCALARLOOP_LEDGER_KEY", str(tmp_path / "wrong"))
    result = keyed.call(*words)
    assert result.code == 4 and "key" in result.out + result.err, result
    monkeypatch.delenv("SCALARLOOP_LEDGER_KEY")
    result = keyed.call(*words)
    assert result.code in (2, 4) and "SCALARLOOP_LEDGER_KEY" in result.out + result.err, result
    monkeypatch.setenv("SCALARLOOP_LEDGER_KEY", str(tmp_path / "nowhere"))
    result = keyed.call(*words)
    assert result.code == 2 and len(result.err.splitlines()) == 1, result


def test_the_key_is_nowhere_in_the_record(keyed: Project) -> None:
    for path in keyed.state.rglob("*"):
        if path.is_file():
            assert b"0123456789abcdef0123456789abcdef" not in path.read_bytes(), path


# ---- fuzz

def mutated(chance: random.Random, data: bytes, records: List[Dict[str, Any]]) -> bytes:
    """Return a broken or forged ledger: bytes at random, or records changed and chained anew."""
    if chance.random() < .4:
        return mutate_bytes(chance, data)
    records = json.loads(json.dumps(records))
    for _ in range(chance.choice((1, 1, 2, 5))):
        mutate_record(chance, chance.choice(records))
    if chance.random() < .2:
        del records[chance.randrange(len(records))]
    if chance.random() < .2:
        records.insert(chance.randrange(len(records) + 1), dict(chance.choice(records or [{}])))
    return chained(records)


def mutate_bytes(chance: random.Random, data: bytes) -> bytes:
    """Flip, cut, double or overwrite some bytes."""
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(data) or 1)
        length = chance.choice((1, 1, 2, 10, 500))
        piece = data[at:at + length]
        data = chance.choice((
            data[:at] + chance.randbytes(length) + data[at + length:],
            data[:at] + data[at + length:], data[:at] + piece + data[at:], data[:at],
            data[:at] + b"\n" + data[at:], data[:at] + b"\0" * length + data[at:],
            data[:at] + b'{"a":' * length + data[at:]))
    return data


ODD = (None, True, False, 0, -1, 1, 10 ** 30, 0.5, -1e308, 1e-320, "", "x", "\ud800", "\0", "../..",
       "refs/heads/main", "-x", "a" * 5000, [], [None], [[]], {}, {"a": None}, "0" * 40, "0" * 64,
       ["x", 1], [1e308, -1e308], "keep", "iteration", "stop", "start")


def mutate_record(chance: random.Random, record: Dict[str, Any]) -> None:
    """Give one field, at any depth, a value that it never has, or take it away."""
    place: Any = record
    while True:
        name = chance.choice(sorted(place)) if isinstance(place, dict) else chance.randrange(len(place))
        inner = place[name]
        if not isinstance(inner, (dict, list)) or not inner or chance.random() < .3:
            break
        place = inner
    if chance.random() < .2 and isinstance(place, dict):
        del place[name]
    else:
        place[name] = copy.deepcopy(chance.choice(ODD))


def fuzz(project: Project, seed: int, count: int, command: Callable[[random.Random], List[str]]) -> None:
    """Try so many ledgers; whatever they are, the tool ends with a documented code and plain lines."""
    chance = random.Random(seed)
    data, records = b"".join(project.lines()), records_of(project)
    tip, ref = project.git("rev-parse", BRANCH), project.git("rev-parse", ANCHOR)
    for number in range(count):
        ledger = mutated(chance, data, records)
        project.put_ledger(ledger)
        anchored = chance.random() < .5
        project.git("update-ref", *((ANCHOR, ref) if anchored else ("-d", ANCHOR)))
        words = command(chance)
        try:
            result = project.call(*words)
        except BaseException as error:
            (project.tmp / "ledger.bad").write_bytes(ledger)
            raise AssertionError(f"ledger {number} of seed {seed}, {words}, anchored {anchored}: "
                                 f"{error!r}") from error
        assert result.code in (0, 1, 2, 4), (number, seed, words, result)
        assert len(result.err) < 20_000 and "Traceback" not in result.err, (number, seed, result)
        if words == ["verify"]:
            assert (result.code == 4) == ("BROKEN" in result.out), (number, seed, result)
            if ledger != data and anchored and ledger[:len(data)] != data:
                assert result.code == 4, (number, seed, result)
        assert project.git("rev-parse", BRANCH) == tip
    project.put_ledger(data)


def quiet(chance: random.Random) -> List[str]:
    """Return a command that only reads."""
    return chance.choice((["verify"], ["verify"], ["verify"], ["status"], ["prompt"]))


def test_no_ledger_makes_a_reader_fall_over(finished: Project) -> None:
    fuzz(finished, 4, 200, quiet)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_ledger_of_ten_thousand_makes_a_reader_fall_over(finished: Project, seed: int) -> None:
    fuzz(finished, 1000 + seed, 500, quiet)


def fuzz_start(once: Project, folder: Path, seed: int, count: int) -> None:
    """Start from so many ledgers: the run goes on or stops with a documented code and plain lines."""
    def one(number: int) -> str:
        chance = random.Random(seed * 100_000 + number)
        root = folder / str(number)
        (root / "tmp").mkdir(parents=True)
        shutil.copytree(once.root, root / "project", symlinks=True)
        copy = Project(root / "project", root)
        copy.config = once.config
        before, tip = copy.fingerprint(), copy.git("rev-parse", BRANCH)
        copy.put_ledger(mutated(chance, b"".join(once.lines()), once.ledger()))
        if chance.random() < .7:        # with its anchor most of these would end at once
            copy.git("update-ref", "-d", ANCHOR)
        result = copy.run(*chance.choice(([], ["--more", "1"])), config=False,
                          env={"TMPDIR": str(root / "tmp")})
        if result.code not in (0, 1, 2, 4) or "Traceback" in result.err + result.out \
                or copy.fingerprint() != before or os.listdir(root / "tmp") \
                or result.code and not result.err and "void" not in result.out:
            return f"ledger {number} of seed {seed} in {root}: {result}"
        if result.code == 4 and copy.git("rev-parse", BRANCH) != tip:
            return f"ledger {number} of seed {seed} in {root}: the branch was moved"
        shutil.rmtree(root)
        return ""

    with ThreadPoolExecutor(2) as pool:
        problems = [text for text in pool.map(one, range(count)) if text]
    assert not problems, f"{len(problems)} of {count}:\n" + "\n".join(problems)


def test_no_ledger_makes_a_start_fall_over(finished_once: Project, tmp_path: Path) -> None:
    fuzz_start(finished_once, tmp_path, 1, 24)


@pytest.mark.slow
def test_no_ledger_of_a_thousand_makes_a_start_fall_over(finished_once: Project, tmp_path: Path) -> None:
    fuzz_start(finished_once, tmp_path, 2, 1000)
