"""The gate: each bad set-up is refused in one clear line, with its exit code; nothing changes."""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pytest

from conftest import TOOL, Project, Result

Case = Tuple[str, ...]      # the gate's row, and what its line says
LOWER = 'open("src/value.txt", "w").write("90\\n")'


def everything(root: Path) -> Dict[str, str]:
    """Return every path below a folder with its type, mode and content."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            status = path.lstat()
            content = os.readlink(path) if path.is_symlink() else hashlib.sha256(
                path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path.relative_to(root))] = f"{status.st_mode:o} {content}"
    return found


def clear_lines(result: Result) -> List[str]:
    """Return the lines of a refusal, without the output that is quoted under them."""
    lines = result.err.splitlines()
    assert "Traceback" not in result.err + result.out, result
    assert "Exception ignored" not in result.err, result
    assert all(line.startswith(("scalarloop: ", "    | ")) for line in lines), result
    told = [line[len("scalarloop: "):] for line in lines if line.startswith("scalarloop: ")]
    assert told and all(line.isprintable() and "  " not in line for line in told), result
    return told


def says(lines: Sequence[str], row: str, *words: str) -> bool:
    """Tell whether one line is of this row and says all of that, with a remedy."""
    return any(line.startswith(row + ": ") and all(word in line for word in words)
               and re.search(r"[;(]", line) for line in lines)


def refused(project: Project, *args: str, code: int = 2, config: bool = True,
            env: Optional[Dict[str, str]] = None) -> List[str]:
    """Run the tool, hold it to an unchanged project, and return what it said."""
    if config:
        project.save_config()
    before = everything(project.root)
    result = project.run(*args, config=False, env=env)
    assert result.code == code, result
    assert everything(project.root) == before
    assert project.leftovers() == []
    return clear_lines(result)


def checked(project: Project, env: Optional[Dict[str, str]] = None) -> Tuple[int, Dict[str, str]]:
    """Run `check`, hold it to an unchanged project; return its exit code and its FAILED rows."""
    before = everything(project.root)
    result = project.run("check", config=False, env=env) if env else project.call("check")
    assert "Traceback" not in result.err and not result.err, result
    assert everything(project.root) == before
    assert project.leftovers() == []
    rows = [line for line in result.out.splitlines() if not line.startswith("    | ")]
    failed = {row.split("FAILED")[0].strip(): row.split("FAILED")[1].strip()
              for row in rows if "FAILED" in row}
    count = sum("FAILED" in row for row in rows)
    assert rows[-1] == (f"refused: {count} condition{'s do' if count > 1 else ' does'} not hold"
                        if failed else "the gate is passed"), result
    return result.code, failed


# ══ one refusal each ═════════════════════════════════════════════════════════════════════════════
# A function makes the set-up bad and returns the gate's row and what its line must say.

def no_match(project: Project) -> Case:
    project.config["loop"]["scope"] = "lib/**"
    return "scope", "lib/** matches no tracked regular file", "correct [loop] scope"


def only_untracked_files_match(project: Project) -> Case:
    project.config["loop"]["scope"] = "new/**"
    project.write("new/a.txt", "x")
    return "scope", "new/** matches no tracked regular file", "commit"


def wholly_sealed(project: Project) -> Case:
    project.config["loop"]["seal"] = "src"
    return "scope", "src/** matches no tracked regular file that is not sealed"


def a_folder_without_stars(project: Project) -> Case:
    project.config["loop"]["scope"] = "src"
    return "scope", "src is a folder: write src/**"


def a_folder_in_a_folder(project: Project) -> Case:
    project.write("a/b/c.txt", "x")
    project.commit()
    project.config["loop"]["scope"] = "a/b"
    return "scope", "a/b is a folder: write a/b/**"


def only_a_link_matches(project: Project) -> Case:
    os.symlink("value.txt", project.root / "src" / "link")
    project.commit()
    project.config["loop"]["scope"] = "src/link"
    return "scope", "src/link matches no tracked regular file"


def a_seal_that_names_nothing(project: Project) -> Case:
    project.config["loop"]["seal"] = "data src/valeu.txt"
    return "seal", "src/valeu.txt", "[loop] seal"


def a_seal_outside_that_is_missing(project: Project) -> Case:
    project.config["loop"]["seal"] = str(project.tmp / "gone.bin")
    return "seal", "gone.bin", "[loop] seal"


def detached_head(project: Project) -> Case:
    project.git("checkout", "-q", "--detach")
    return "branch", "HEAD is detached", "check out the branch"


def no_commit(project: Project) -> Case:
    shutil.rmtree(project.root / ".git")
    project.git("init", "-q")
    return "git", "no commit yet", "commit what the loop starts from"


def not_a_repository(project: Project) -> Case:
    shutil.rmtree(project.root / ".git")
    return "git", "is not in a git repository", "git init"


def a_broken_repository(project: Project) -> Case:
    (project.root / ".git" / "HEAD").write_text("nonsense\n")
    return "git", "is not in a git repository"


def a_bare_repository(project: Project) -> Case:
    shutil.rmtree(project.root / ".git")
    project.git("init", "-q", "--bare", ".")
    return "git", "bare repository", "use a clone with a work tree"


def inside_the_git_folder(project: Project) -> Case:
    project.save_config(".git/sub/loop.ini")
    project.root = project.root / ".git" / "sub"
    return "git", "inside a .git folder", "use the work tree"


def a_changed_file(project: Project) -> Case:
    project.write("src/value.txt", "99\n")
    return "tree", "changed or staged", "src/value.txt", "commit or stash"


def a_staged_file(project: Project) -> Case:
    project.write("src/new.txt", "1\n")
    project.git("add", "src/new.txt")
    return "tree", "src/new.txt", "commit or stash"


def a_deleted_file(project: Project) -> Case:
    (project.root / "data" / "truth.txt").unlink()
    return "tree", "data/truth.txt", "commit or stash"


def a_changed_mode(project: Project) -> Case:
    (project.root / "metric.py").chmod(0o755)
    return "tree", "metric.py", "commit or stash"


def two_changed_files(project: Project) -> Case:
    project.write("src/value.txt", "99\n")
    project.write("metric.py", "pass\n")
    return "tree", "2", "changed or staged", "the first is metric.py"


def a_conflict(project: Project) -> Case:
    project.git("checkout", "-q", "-b", "other")
    project.write("src/value.txt", "1\n")
    project.commit()
    project.git("checkout", "-q", "-")
    project.write("src/value.txt", "2\n")
    project.commit()
    project.git("merge", "-q", "other", check=False)
    return "tree", "src/value.txt"


def the_branch_is_checked_out(project: Project) -> Case:
    project.git("checkout", "-q", "-b", "mine")
    project.config["loop"]["branch"] = "mine"
    return "branch", "mine is checked out", "[loop] branch"


def the_branch_is_checked_out_elsewhere(project: Project) -> Case:
    project.git("worktree", "add", "-q", "-b", "scalarloop/t", str(project.tmp / "linked"))
    return "branch", "scalarloop/t is checked out", "linked", "[loop] branch"


def somebody_elses_branch(project: Project) -> Case:
    project.git("branch", "scalarloop/t", project.git("commit-tree", "HEAD^{tree}", "-m", "other"))
    return "branch", "scalarloop/t exists and is not this run's", "[loop] branch"


def the_branch_is_below_another(project: Project) -> Case:
    project.git("branch", "scalarloop")
    return "branch", "scalarloop/t can't be made while scalarloop exists", "[loop] branch"


def the_branch_is_above_another(project: Project) -> Case:
    project.git("branch", "scalarloop/t/old")
    project.git("pack-refs", "--all")
    return "branch", "scalarloop/t can't be made while scalarloop/t/old exists", "[loop] branch"


def a_record_without_its_state(project: Project) -> Case:
    project.git("update-ref", "refs/scalarloop/t/ledger", "HEAD")
    return "record", "refs/scalarloop/t/ledger", "--new"


def metric(text: str, *words: str, **keys: str) -> Callable[[Project], Case]:
    """Return a set-up whose metric is this program."""
    def make(project: Project) -> Case:
        project.write("metric.py", text)
        project.commit()
        project.config["metric"].update(keys)
        return ("metric", *words)
    return make


def the_metric_is_missing(project: Project) -> Case:
    project.config["metric"]["command"] = "no-such-program --fast"
    return "metric", "no-such-program", "correct the command"


def the_metric_is_missing_in_the_tree(project: Project) -> Case:
    project.config["metric"]["command"] = "./bench.sh"
    return "metric", "./bench.sh", "correct the command"


def the_metric_is_not_committed(project: Project) -> Case:
    project.write("bench.sh", "#!/bin/sh\necho METRIC x=1\n", 0o755)
    project.config["metric"]["command"] = "./bench.sh"
    return "metric", "./bench.sh", "not a tracked file", "commit"


def the_metric_is_not_executable(project: Project) -> Case:
    project.write("bench.sh", "#!/bin/sh\necho METRIC x=1\n")
    project.commit()
    project.config["metric"]["command"] = "./bench.sh"
    return "metric", "./bench.sh", "not executable", "chmod"


def the_metric_has_no_interpreter(project: Project) -> Case:
    project.write("bench.sh", "#!/no/such/shell\necho METRIC x=1\n", 0o755)
    project.commit()
    project.config["metric"]["command"] = "./bench.sh"
    return "metric", "exit 126", "metric.exit"


def the_metric_is_a_folder(project: Project) -> Case:
    project.config["metric"]["command"] = "./data"
    return "metric", "./data", "correct the command"


def a_guard_that_fails(project: Project) -> Case:
    project.config["guard.tests"] = {"command": "sh -c 'echo broken; exit 3'"}
    return "guard", "tests: does not hold on the baseline", "exit 3"


def a_guard_that_is_missing(project: Project) -> Case:
    project.config["guard.tests"] = {"command": "no-such-program"}
    return "guard", "tests: no-such-program", "correct the command"


def a_guard_without_a_number(project: Project) -> Case:
    project.config["guard.size"] = {"command": "true", "pattern": "(x)", "tolerance": "1"}
    return "guard", "size: printed no match of pattern"


def a_holdout_that_fails(project: Project) -> Case:
    project.config["holdout"] = {"command": "false"}
    return "holdout", "metric.exit", "exit 1"


def a_setup_that_fails(project: Project) -> Case:
    project.config["metric"]["setup"] = "sh -c 'echo no network; exit 7'"
    return "setup", "exit 7"


def a_setup_that_changes_tracked_files(project: Project) -> Case:
    project.config["metric"]["setup"] = "sh -c 'echo 1 > src/value.txt'"
    return "setup", "src/value.txt", "tracked files alone"


def a_canary_that_changes_nothing(project: Project) -> Case:
    project.config["metric"]["canary"] = "true"
    return "canary", "changes nothing"


def a_canary_that_the_metric_ignores(project: Project) -> Case:
    project.config["metric"]["canary"] = "sh -c 'echo x > data/truth.txt'"
    return "canary", "does not see it", "repair the metric"


def a_canary_that_does_not_apply(project: Project) -> Case:
    project.write("worse.patch", "--- a/no\n+++ b/no\n@@ -1 +1 @@\n-a\n+b\n")
    project.commit()
    project.config["metric"]["canary"] = "worse.patch"
    return "canary", "does not apply"


def the_agent_is_missing(project: Project) -> Case:
    project.config["agent"]["command"] = "no-such-agent -p"
    return "agent", "no-such-agent", "[agent] adapter or command"


def the_agent_is_not_executable(project: Project) -> Case:
    path = project.tmp / "agent.sh"
    path.write_text("#!/bin/sh\n")
    project.config["agent"]["command"] = str(path)
    return "agent", str(path), "not executable", "chmod"


def the_adapter_is_unknown(project: Project) -> Case:
    project.config["agent"] = {"adapter": "duoble"}
    return "agent", "adapters/duoble.py", "double", "[agent] adapter"


def a_shared_folder_is_missing(project: Project) -> Case:
    project.config["loop"]["share"] = "node_modules"
    return "share", "node_modules is not a folder", "npm ci"


def a_shared_folder_is_tracked(project: Project) -> Case:
    project.config["loop"]["share"] = "data"
    return "share", "data holds tracked files"


def a_shared_link_leads_back(project: Project) -> Case:
    (project.root / "lib").mkdir()
    (project.root / "lib" / "own.pth").write_text(str(project.root / "src") + "\n")
    project.config["loop"]["share"] = "lib"
    return "share", "lib/own.pth leads into the project"


def the_program_is_not_tracked(project: Project) -> Case:
    del project.config["loop"]["goal"]
    project.config["loop"]["program"] = "program.md"
    return "program", "program.md is not a tracked file", "commit it"


def the_program_is_in_scope(project: Project) -> Case:
    project.write("src/program.md", "Do it.\n")
    project.commit()
    del project.config["loop"]["goal"]
    project.config["loop"]["program"] = "src/program.md"
    return "program", "src/program.md is in scope", "seal it"


def the_memory_is_tracked(project: Project) -> Case:
    project.config["loop"]["memory"] = "data/truth.txt"
    return "memory", "data/truth.txt is a tracked file"


def a_submodule_in_use(project: Project) -> Case:
    other = Project(project.tmp / "other", project.tmp)
    other.root.mkdir()
    other.git("init", "-q")
    other.write("a.txt", "x")
    other.commit()
    project.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(other.root),
                "sub")
    project.commit()
    return "tree", "the submodule sub is in use", "[loop] share"


def an_isolation_that_is_not_there(project: Project) -> Case:
    project.config["isolation"]["require"] = "network_off"
    return "isolation", "network_off", "[isolation] require"


def a_network_that_can_not_be_denied(project: Project) -> Case:
    project.config["metric"]["network"] = "deny"
    return "isolation", "network", "portable"


def a_temporary_folder_inside_the_project(project: Project) -> Case:
    (project.root / "tmp").mkdir()
    os.environ["TMPDIR"] = str(project.root / "tmp")
    return "tmp", "inside the project", "set TMPDIR elsewhere"


LOOKS = [
    no_match, only_untracked_files_match, wholly_sealed, a_folder_without_stars,
    a_folder_in_a_folder, only_a_link_matches, a_seal_that_names_nothing,
    a_seal_outside_that_is_missing, detached_head, no_commit, not_a_repository,
    a_broken_repository, a_bare_repository, inside_the_git_folder, a_changed_file, a_staged_file,
    a_deleted_file, a_changed_mode, two_changed_files, a_conflict, the_branch_is_checked_out,
    the_branch_is_checked_out_elsewhere, somebody_elses_branch, the_branch_is_below_another,
    the_branch_is_above_another, a_record_without_its_state, the_metric_is_missing,
    the_metric_is_missing_in_the_tree, the_metric_is_not_committed, the_metric_is_not_executable,
    the_metric_is_a_folder, a_guard_that_is_missing, the_agent_is_missing,
    the_agent_is_not_executable, the_adapter_is_unknown, a_shared_folder_is_missing,
    a_shared_folder_is_tracked, a_shared_link_leads_back, the_program_is_not_tracked,
    the_program_is_in_scope, the_memory_is_tracked, a_submodule_in_use,
    an_isolation_that_is_not_there, a_network_that_can_not_be_denied,
    a_temporary_folder_inside_the_project]
RUNS: Dict[str, Callable[[Project], Case]] = {
    "nothing": metric("pass", "metric.missing", "printed no METRIC name=number line"),
    "another_name": metric("print('METRIC a=1')", "metric.missing", "METRIC b=number", name="b"),
    "two_numbers": metric("print('METRIC a=1\\nMETRIC b=2')", "metric.ambiguous",
                          "printed 2 METRIC lines"),
    "no_number": metric("print('METRIC a=many')", "metric.malformed", "many is not a finite"),
    "no_equals": metric("print('METRIC 12')", "metric.malformed", "name=number"),
    "nan": metric("print('METRIC a=nan')", "metric.not_finite", "nan"),
    "inf": metric("print('METRIC a=-inf')", "metric.not_finite", "-inf"),
    "overflow": metric("print('METRIC a=1e999')", "metric.not_finite", "1e999"),
    "out_of_bounds": metric("print('METRIC a=101')", "metric.out_of_bounds", "101", "0", "100",
                            bounds="0 100"),
    "pattern_twice": metric("print('size 1\\nsize 2')", "metric.ambiguous", "2 matches of pattern",
                            pattern="^size (.*)$"),
    "exit_1": metric("print('METRIC a=1'); raise SystemExit(1)", "metric.exit", "exit 1"),
    "killed": metric("import os; os.kill(os.getpid(), 9)", "metric.exit", "SIGKILL"),
    "hangs": metric("import time; time.sleep(60)", "metric.timeout", "timed out after 1.",
                    "raise its timeout",
                    timeout="1s"),
    "writes_source": metric("open('src/value.txt', 'a'); print('METRIC a=1', flush=True)\n"
                            "open('src/value.txt', 'a').write('1')", "seal.touched_during_run",
                            "src/value.txt", "tracked"),
    "writes_sealed": metric("open('data/truth.txt', 'w').write('x'); print('METRIC a=1')",
                            "seal.touched_during_run", "data/truth.txt", "tracked"),
    "no_interpreter": the_metric_has_no_interpreter,
    "guard": a_guard_that_fails, "guard_number": a_guard_without_a_number,
    "holdout": a_holdout_that_fails, "setup": a_setup_that_fails,
    "setup_writes": a_setup_that_changes_tracked_files,
    "canary_nothing": a_canary_that_changes_nothing,
    "canary_ignored": a_canary_that_the_metric_ignores,
    "canary_patch": a_canary_that_does_not_apply,
}


@pytest.mark.parametrize("make", [*LOOKS, *RUNS.values()],
                         ids=[make.__name__ for make in LOOKS] + list(RUNS))
def test_a_bad_set_up_is_refused(project: Project, make: Callable[[Project], Case]) -> None:
    row, *words = make(project)
    lines = refused(project)
    assert says(lines, row, *words), lines
    assert len(lines) == 1, lines
    if row == "canary":
        return      # it takes long, and takes the same way
    code, failed = checked(project)
    assert code == 2 and list(failed) == [row], failed
    assert all(word in failed[row] for word in words), failed


def test_all_that_is_wrong_is_said_at_once(project: Project) -> None:
    project.git("checkout", "-q", "--detach")
    project.write("src/value.txt", "99\n")
    project.config["loop"].update(scope="lib/**", memory="data/truth.txt", share="node_modules")
    project.config["agent"]["command"] = "no-such-agent"
    project.config["metric"]["command"] = "no-such-program"
    lines = refused(project)
    assert sorted(line.split(":")[0] for line in lines) == [
        "agent", "branch", "memory", "metric", "scope", "share", "tree"], lines
    assert checked(project)[0] == 2


def test_metric_output_is_quoted_under_its_line_and_harmless(project: Project) -> None:
    project.write("metric.py", r"""
        import sys
        print("\x1b[2Jcleared\rMETRIC\x07", "x" * 5000)
        print("scalarloop: all is well")
        sys.exit("no module named torch")
    """)
    project.commit()
    result = project.run()
    quoted = [line for line in result.err.splitlines() if line.startswith("    | ")]
    assert len(clear_lines(result)) == 1
    assert any("no module named torch" in line for line in quoted)
    assert all(line.isprintable() and len(line) < 400 for line in quoted)


# ══ the config file, from the command line ═══════════════════════════════════════════════════════

@pytest.mark.parametrize("text, lines", [
    ("goal = x\n", 1), ("[loop]\n", 3), ("[loop]\ngoal = x\nscop = y\n[metrics]\n", 4), ("", 3),
    ("\0" * 100, 1)])
def test_a_bad_config_is_refused(project: Project, text: str, lines: int) -> None:
    (project.root / "loop.ini").write_text(text)
    for args in ([], ["check"], ["verify"], ["status"], ["prompt"]):
        told = refused(project, *args, config=False)
        assert len(told) == lines and all(line.startswith("loop.ini: ") for line in told), told


@pytest.mark.parametrize("branch", ["main", "master", "trunk", "develop", "release/2"])
def test_a_protected_branch_is_refused(project: Project, branch: str) -> None:
    project.config["loop"]["branch"] = branch
    assert says(refused(project), "loop.ini", "[loop] branch", branch, "protected")


@pytest.mark.parametrize("args, words", [
    (["nope.ini"], ["nope.ini: can't be read", "No such file"]),
    (["check", "nope.ini"], ["nope.ini: can't be read"]),
    (["."], ["can't be read", "Is a directory"]),
    ([], ["expected [COMMAND] loop.ini, got nothing", "--help"]),
    (["loop.ini", "other.ini"], ["expected [COMMAND] loop.ini", "loop.ini other.ini", "--help"]),
    (["chek", "loop.ini"], ["chek", "did you mean check?"]),
    (["check"], ["check", "loop.ini"]),
    (["--fast", "loop.ini"], ["--fast: unknown option", "--help"]),
    (["loop.ini", "-v"], ["-v: unknown option", "--help"]),
    (["loop.ini", "--more"], ["--more", "a whole number from 1"]),
    (["loop.ini", "--more", "x"], ["--more: 'x' can't be used", "a whole number from 1"]),
    (["loop.ini", "--more", "0"], ["--more: '0' can't be used"]),
    (["loop.ini", "--more", "-1"], ["--more: '-1' can't be used"]),
    (["loop.ini", "--replay"], ["--replay", "verify"]),
    (["check", "loop.ini", "--more", "3"], ["--more", "run"]),
    (["verify", "loop.ini", "--new"], ["--new", "run"]),
    ([""], ["neither a command nor a file"]),
    (["help"], ["help: neither a command nor a file", "verify", "--help"]),
    (["loop.ini", "--new", "--more", "3"], ["--more", "--new", "[loop] iterations"]),
    (["--\x1b[2J\n", "loop.ini"], ["unknown option"]),
])
def test_a_command_line_that_makes_no_sense(project: Project, args: List[str], words: List[str]
                                            ) -> None:
    before = everything(project.root)
    done = subprocess.run([sys.executable, str(TOOL), *args], cwd=project.root,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    result = Result(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert result.code == 2 and result.out == "", result
    lines = clear_lines(result)
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert everything(project.root) == before


def test_more_on_a_run_that_never_began(project: Project) -> None:
    lines = refused(project, "--more", "3")
    assert says(lines, "--more", "no run", "start") and len(lines) == 1, lines


@pytest.mark.parametrize("args", [["verify"], ["status"]])
def test_looking_at_a_run_that_never_began(project: Project, args: List[str]) -> None:
    lines = refused(project, *args)
    assert len(lines) == 1 and "run" in lines[0], lines


def test_help_and_version(project: Project) -> None:
    for word, start in (("--help", "usage: "), ("-h", "usage: "), ("--version", "scalarloop 0.")):
        result = project.run(word)
        assert result.code == 0 and result.out.startswith(start) and result.err == "", result


# ══ set-ups that are fine ════════════════════════════════════════════════════════════════════════

def passes(project: Project, *notices: str) -> Result:
    """Run one honest turn; the project is as before but for the branch."""
    project.turns(LOWER)
    project.save_config()
    before = project.fingerprint()
    result = project.run(config=False)
    assert result.code == 0 and not result.err, result
    assert project.verdicts() == ["keep metric.better"]
    assert project.fingerprint() == before and project.leftovers() == []
    for words in notices:
        assert any(line.startswith("notice") and words in line
                   for line in result.out.splitlines()), result
    return result


def test_untracked_files_are_a_notice(project: Project) -> None:
    project.write("notes.txt", "mine")
    project.write("more/notes.txt", "mine")
    result = passes(project, "2 untracked paths are not seen by the metric, the first is more/")
    assert "loop.ini" not in result.out


def test_the_config_may_be_uncommitted_modified_or_staged(project: Project) -> None:
    project.git("rm", "-q", "--cached", "loop.ini")
    project.commit("without a config")
    assert "loop.ini" not in passes(project).out
    project.config["loop"]["name"] = "second"
    project.git("add", "-f", "loop.ini")
    assert "loop.ini" not in passes(project).out


def test_a_config_with_windows_line_ends(project: Project) -> None:
    project.turns(LOWER)
    path = project.save_config()
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    result = project.run(config=False)
    assert result.code == 0 and project.verdicts() == ["keep metric.better"], result


def test_a_config_in_a_sub_folder(project: Project) -> None:
    project.write("sub/metric.py", 'print("METRIC v=%s" % open("code/value.txt").read())\n')
    project.write("sub/code/value.txt", "100")
    project.commit()
    project.turns('open("code/value.txt", "w").write("90")')
    project.config["loop"]["scope"] = "code/**"
    project.save_config("sub/loop.ini")
    result = project.run("sub/loop.ini", config=False)
    assert result.code == 0, result
    assert project.git("show", "scalarloop/t:sub/code/value.txt") == "90"
    assert (project.root / "sub" / ".scalarloop" / "t" / "ledger.jsonl").exists()


@pytest.mark.parametrize("name", ["with blanks", "日本", os.fsdecode(b"caf\xe9"), "a\nb", "-x",
                                  "'quote\""])
def test_a_project_in_a_folder_with_an_odd_name(project: Project, name: str) -> None:
    target = project.tmp / name
    project.root.rename(target)
    project.root = target
    project.git("mv", "src", "src.0")
    project.git("mv", "src.0", "src")
    passes(project)


def test_a_glob_that_matches_nothing_is_a_notice(project: Project) -> None:
    project.config["loop"]["scope"] = "src/** lib/**"
    passes(project, "lib/** matches no tracked file")


def test_a_file_that_a_command_names_and_nobody_committed_is_a_notice(project: Project) -> None:
    project.write("extra.txt", "mine")
    project.config["metric"]["command"] = "python3 metric.py extra.txt"
    passes(project, "extra.txt is not a tracked file")


def test_a_shared_folder_is_not_called_unseen(project: Project) -> None:
    project.write("node_modules/a.js", "1")
    project.config["loop"]["share"] = "node_modules"
    assert "node_modules" not in passes(project).out


def test_what_the_user_will_run_after_a_merge_is_a_notice_when_it_is_in_scope(project: Project) -> None:
    shutil.copy(TOOL, project.root / "scalarloop.py")
    project.commit("the vendored tool")
    project.config["loop"]["scope"] = "src/** *.py"
    project.config["loop"]["seal"] = "metric.py"
    project.turns(LOWER)
    project.save_config()
    result = subprocess.run([sys.executable, "scalarloop.py", "check", "loop.ini"], cwd=project.root,
                            stdout=subprocess.PIPE)
    assert b"scalarloop.py is in scope: the agent may change" in result.stdout


def test_the_candidate_that_produce_runs_may_be_in_scope(project: Project) -> None:
    project.write("src/train.py", "open('out.txt', 'w').write(open('src/value.txt').read())\n")
    project.write("score.py", "print('METRIC value=' + open('out.txt').read())\n")
    project.commit("two steps")
    project.config["metric"].update(produce="python3 src/train.py", outputs="out.txt",
                                    command="python3 score.py")
    assert "speaks for itself" not in passes(project).out


def test_check_says_that_a_start_would_not_go_on_under_another_config(project: Project) -> None:
    passes(project)
    result = project.call("check")
    assert result.code == 0 and "finished (iterations); --more N goes on" in result.out, result
    project.config["loop"]["goal"] = "Another one."
    project.save_config()
    code, failed = checked(project)
    assert code == 2 and "[loop] goal changed" in failed["record"] and "--new" in failed["record"]


def test_a_command_that_names_a_file_in_scope_is_a_loud_notice(project: Project) -> None:
    project.write("src/train.py", 'print("METRIC value=%s" % open("src/value.txt").read())')
    project.commit()
    project.config["metric"]["command"] = "python3 src/train.py"
    passes(project, "[metric] runs src/train.py, which the agent may change")


def test_a_split_metric_needs_no_warning(project: Project) -> None:
    project.config["metric"].update(
        produce="sh -c 'cp src/value.txt out.txt'", outputs="out.txt",
        command="sh -c 'echo METRIC value=$(cat out.txt)'")
    assert "one step" not in passes(project).out


def test_check_prints_every_condition_and_leaves_nothing(project: Project) -> None:
    project.config["guard.tests"] = {"command": "true"}
    project.config["holdout"] = {"command": "python3 metric.py"}
    project.config["metric"]["canary"] = "sh -c 'echo 200 > src/value.txt'"
    project.save_config()
    code, failed = checked(project)
    result = project.run("check")
    rows = {line.split()[0] for line in result.out.splitlines()[:-1]}
    assert code == 0 and not failed
    assert rows - {"lock"} == {"config", "git", "tree", "branch", "scope", "seal", "agent", "metric",
                               "guard", "holdout", "canary", "isolation"}, result
    widths = {len(line) - len(line[20:].lstrip()) for line in result.out.splitlines()[:-1]}
    assert widths == {20}, result


def test_check_says_that_no_loop_runs(project: Project) -> None:
    project.config["loop"]["scope"] = "lib/**"
    result = project.run("check")
    assert any(line.startswith("lock        ok") for line in result.out.splitlines()), result


def test_check_beside_a_run_of_ones_own(project: Project) -> None:
    passes(project)
    before = everything(project.root)
    code, failed = checked(project)
    assert (code, failed) == (0, {}) and everything(project.root) == before


# ══ the state folder and its lock ════════════════════════════════════════════════════════════════

def test_a_second_loop_on_the_same_state(project: Project) -> None:
    passes(project)
    with open(project.state / "lock", "r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        lines = refused(project, "--more", "1")
        assert says(lines, "lock", "another loop runs", "[loop] name") and len(lines) == 1
        assert checked(project)[1].keys() == {"lock"}
    assert project.run("--more", "1").code == 0


def test_two_loops_started_at_once(project: Project) -> None:
    project.agent("import time; time.sleep(1)")
    project.save_config()
    command = [sys.executable, str(TOOL), "loop.ini"]
    runs = [subprocess.Popen(command, cwd=project.root, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for _ in range(3)]
    ends = [(run.communicate(timeout=60), run.returncode) for run in runs]
    assert sorted(code for _, code in ends) == [0, 2, 2], ends
    assert all(b"another loop runs" in output[1] for output, code in ends if code)
    assert len(project.iterations()) == 1 and project.run("verify").code == 0


@pytest.mark.parametrize("path", [".scalarloop", ".scalarloop/t"])
def test_a_state_folder_that_is_a_file(project: Project, path: str) -> None:
    (project.root / path).parent.mkdir(exist_ok=True)
    (project.root / path).write_text("mine")
    lines = refused(project)
    assert says(lines, "lock", str(project.state), "not a folder") and len(lines) == 1, lines


def test_a_lock_that_is_a_link(project: Project) -> None:
    project.state.mkdir(parents=True)
    (project.root / ".scalarloop" / ".gitignore").write_text("*\n")
    (project.tmp / "file").write_text("mine")
    os.symlink(project.tmp / "file", project.state / "lock")
    lines = refused(project)
    assert says(lines, "lock", str(project.state)) and len(lines) == 1, lines
    assert (project.tmp / "file").read_text() == "mine"


def test_what_stands_in_the_state_folder_survives_a_refusal(project: Project) -> None:
    project.state.mkdir(parents=True)
    (project.state / "notes.txt").write_text("mine")
    (project.root / ".scalarloop" / ".gitignore").write_text("*\n")
    project.config["loop"]["scope"] = "lib/**"
    project.run()
    assert (project.state / "notes.txt").read_text() == "mine"


def test_new_is_refused_before_anything_is_moved(project: Project) -> None:
    passes(project)
    project.write("src/value.txt", "99\n")
    lines = refused(project, "--new")
    assert says(lines, "tree", "src/value.txt"), lines
    project.git("checkout", "-q", "src/value.txt")
    assert project.run("verify").code == 0


# ══ programs and environment ═════════════════════════════════════════════════════════════════════

def bin_folder(project: Project, *names: str, **scripts: str) -> Dict[str, str]:
    """Return an environment whose PATH is one folder with these programs and scripts."""
    folder = project.tmp / "bin"
    folder.mkdir(exist_ok=True)
    for name in names:
        os.symlink(shutil.which(name) or name, folder / name)
    for name, text in scripts.items():
        (folder / name).write_text(textwrap.dedent(text).lstrip("\n"))
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


def test_git_is_missing(project: Project) -> None:
    project.config["metric"]["command"] = f"{sys.executable} metric.py"
    lines = refused(project, env=bin_folder(project, "sh"))
    assert lines == ["git: not found on PATH; install git 2.25 or later"]
    assert checked(project, env={"PATH": str(project.tmp / "bin")})[1].keys() == {"git"}


@pytest.mark.parametrize("version, fine", [
    ("2.20.1", False), ("1.9", False), ("2.24.4 (Apple Git-128)", False), ("2.25.0", True),
    ("2.39.5.windows.1", True), ("3.0.0-rc1", True), ("nonsense", False)])
def test_gits_version_is_looked_at(project: Project, version: str, fine: bool) -> None:
    env = bin_folder(project, "sh", "python3", "cat", git=f"""\
        #!/bin/sh
        case " $* " in *" version "*|*" --version "*) echo "git version {version}"; exit;; esac
        exec {shutil.which("git")} "$@"
        """)
    if fine:
        assert project.run("check", env=env).code == 0
        return
    lines = refused(project, env=env)
    assert len(lines) == 1 and says(lines, "git", "2.25"), lines
    assert version.split()[0] in lines[0] or version == "nonsense"


def test_a_git_that_only_fails(project: Project) -> None:
    env = bin_folder(project, "sh", git="""\
        #!/bin/sh
        echo xcode-select: no developer tools >&2
        exit 1
        """)
    lines = refused(project, env=env)
    assert len(lines) == 1 and says(lines, "git", "no developer tools"), lines


def test_an_empty_path(project: Project) -> None:
    assert says(refused(project, env={"PATH": ""}), "git", "not found on PATH")


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "can't be read"),
    (lambda path: path.mkdir(), "can't be read"),
    (lambda path: path.write_bytes(b"short"), "shorter than 16 bytes"),
    (lambda path: path.write_bytes(b" " * 40 + b"\n"), "shorter than 16 bytes"),
    (lambda path: path.write_bytes(b""), "shorter than 16 bytes"),
], ids=["missing", "folder", "short", "blank", "empty"])
def test_a_ledger_key_that_is_none(project: Project, make: Callable[[Path], Any], words: str
                                   ) -> None:
    path = project.tmp / "key"
    make(path)
    lines = refused(project, env={"SCALARLOOP_LEDGER_KEY": str(path)})
    assert len(lines) == 1 and says(lines, "ledger", str(path), words), lines


def test_a_ledger_key_that_the_agent_could_read_from_the_project(project: Project) -> None:
    project.write("key", "0123456789abcdef0123456789abcdef")
    project.git("add", "key")
    project.commit()
    lines = refused(project, env={"SCALARLOOP_LEDGER_KEY": str(project.root / "key")})
    assert says(lines, "ledger", "key", "project"), lines


def test_a_good_ledger_key(project: Project) -> None:
    path = project.tmp / "key"
    path.write_bytes(os.urandom(32).hex().encode())
    env = {"SCALARLOOP_LEDGER_KEY": str(path)}
    assert project.run(env=env).code == 0
    assert project.run("verify", env=env).code == 0
    lines = clear_lines(project.run("--more", "1"))
    assert len(lines) == 1 and "SCALARLOOP_LEDGER_KEY" in lines[0], lines


def test_a_temporary_folder_that_is_missing(project: Project) -> None:
    result = project.run(env={"TMPDIR": str(project.tmp / "gone")})
    assert result.code == 0 or says(clear_lines(result), "tmp", "gone", "TMPDIR"), result
    assert not (project.tmp / "gone").exists()


# ══ file systems: read-only and full ═════════════════════════════════════════════════════════════

def in_namespace(project: Project, script: str) -> Dict[str, Result]:
    """Run a shell script in a mount namespace of its own; return each `loop NAME ARGS` in it."""
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if not shutil.which("unshare") or subprocess.run(
            [*unshare, "mount", "-t", "tmpfs", "tmpfs", str(project.tmp)],
            stderr=subprocess.DEVNULL).returncode:
        pytest.skip("NOT TESTED: needs a mount namespace of its own (root, or user namespaces)")
    outputs = project.tmp / "outputs"
    outputs.mkdir()
    head = f"""
        loop() {{
            name=$1; shift
            {shlex.quote(sys.executable)} {shlex.quote(str(TOOL))} "$@" \\
                > $OUT/$name.out 2> $OUT/$name.err < /dev/null && code=0 || code=$?
            echo $code > $OUT/$name.code
        }}
    """
    done = subprocess.run([*unshare, "sh", "-euc", textwrap.dedent(head) + textwrap.dedent(script)],
                          cwd=project.root, env={**os.environ, "OUT": str(outputs)},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert done.returncode == 0, done.stdout.decode()
    return {path.stem: Result(int(path.read_text()), path.with_suffix(".out").read_text(),
                              path.with_suffix(".err").read_text())
            for path in outputs.glob("*.code")}


def test_a_read_only_project(project: Project) -> None:
    project.save_config()
    before = everything(project.root)
    found = in_namespace(project, f"""
        mount -o bind {project.root} {project.root}
        mount -o remount,bind,ro {project.root}
        cd {project.root}
        loop run loop.ini
        loop check check loop.ini
    """)
    lines = clear_lines(found["run"])
    assert found["run"].code == 2 and len(lines) == 1, found
    assert says(lines, "lock", str(project.state), "Read-only file system"), lines
    assert found["check"].code == 2 and "FAILED" in found["check"].out, found
    assert everything(project.root) == before and project.leftovers() == []


def test_a_repository_that_can_not_be_written(project: Project) -> None:
    """The state folder can, .git can't: said at the gate, not after a night."""
    project.save_config()
    found = in_namespace(project, """
        mount -o bind .git .git
        mount -o remount,bind,ro .git
        loop run loop.ini
    """)
    lines = clear_lines(found["run"])
    assert found["run"].code == 2 and says(lines, "git", ".git", "can't be written"), found
    assert not project.state.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="NOT TESTED as root: modes bind ordinary users only")
def test_a_state_folder_without_write_permission(project: Project) -> None:
    project.root.chmod(0o555)
    try:
        lines = refused(project, config=False)
    finally:
        project.root.chmod(0o755)
    assert says(lines, "lock", str(project.state), "Permission denied") and len(lines) == 1


@pytest.mark.parametrize("kilobytes", [
    16, 72, pytest.param(4, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.slow),
    pytest.param(56, marks=pytest.mark.slow), pytest.param(104, marks=pytest.mark.slow), 160])
def test_a_full_disk_under_the_state_folder(project: Project, kilobytes: int) -> None:
    """Stopped in one line wherever it strikes; with room again the same command goes on."""
    project.agent("""
        value = int(open("src/value.txt").read())
        print("x" * 40000)
        open("src/value.txt", "w").write("%d\\n" % (value - 10))
    """)
    project.config["loop"]["iterations"] = 3
    project.write("src/noise.bin", "".join(map(str, range(9000))))
    project.commit()
    project.save_config()
    before = project.fingerprint()
    found = in_namespace(project, f"""
        mkdir .scalarloop
        mount -t tmpfs -o size={kilobytes}k tmpfs .scalarloop
        loop full loop.ini
        mount -o remount,size=50m .scalarloop
        loop again loop.ini
        loop verify verify loop.ini
        cp .scalarloop/t/ledger.jsonl $OUT/
    """)
    out_of_room(found["full"])
    assert found["again"].code == 0 and found["verify"].code == 0, found
    rows = [json.loads(line) for line in
            (project.tmp / "outputs" / "ledger.jsonl").read_text().splitlines()]
    verdicts = [row["verdict"] for row in rows if row["type"] == "iteration"]
    assert verdicts.count("keep") == 3 and set(verdicts) <= {"keep", "void"}, verdicts
    assert project.fingerprint() == before
    assert project.git("show", "scalarloop/t:src/value.txt") == "70"


@pytest.mark.parametrize("kilobytes", [4, 64, 112, 160])
def test_a_full_temporary_folder(project: Project, kilobytes: int) -> None:
    project.turns(LOWER)
    project.write("src/noise.bin", "".join(map(str, range(9000))))
    project.commit()
    project.save_config()
    before = everything(project.root)
    found = in_namespace(project, f"""
        mount -t tmpfs -o size={kilobytes}k tmpfs $TMPDIR
        loop full loop.ini
    """)
    out_of_room(found["full"])
    if not project.state.exists():
        assert everything(project.root) == before


def out_of_room(result: Result) -> None:
    """Hold a run to an end in which one line, wherever it stands, names the full disk."""
    assert result.code in (0, 1, 2) and "Traceback" not in result.out + result.err, result
    if result.code:
        lines = [line for line in result.err.splitlines() + result.out.splitlines()
                 if "No space left on device" in line or "is full" in line]
        assert lines and len(result.err.splitlines()) <= 1, result


@pytest.mark.parametrize("place", [".scalarloop", "$TMPDIR", ".git"])
def test_state_and_temporary_folder_on_two_file_systems(project: Project, place: str) -> None:
    project.turns(LOWER)
    project.save_config()
    found = in_namespace(project, f"""
        mkdir -p .scalarloop {place}
        cp -a {place} $OUT/copy
        mount -t tmpfs tmpfs {place}
        cp -a $OUT/copy/. {place}
        loop run loop.ini
        loop verify verify loop.ini
        git show scalarloop/t:src/value.txt > $OUT/value
    """)
    assert found["run"].code == 0 and found["verify"].code == 0, found
    assert (project.tmp / "outputs" / "value").read_text() == "90\n"


def test_a_repository_on_a_full_disk(project: Project) -> None:
    """A keep that can't be handed back stays in the record, and is handed back when it can be."""
    project.turns(LOWER, "pass")
    project.save_config()
    found = in_namespace(project, """
        cp -a .git $OUT/git
        mount -t tmpfs -o size=1m tmpfs .git
        cp -a $OUT/git/. .git/
        head -c 2m /dev/zero > .git/filler 2> /dev/null || true
        loop full loop.ini
        rm .git/filler
        loop again loop.ini
        loop verify verify loop.ini
        git show scalarloop/t:src/value.txt > $OUT/value
    """)
    assert found["full"].code, found
    out_of_room(found["full"])
    assert found["again"].code == 0 and found["verify"].code == 0, found
    assert (project.tmp / "outputs" / "value").read_text() == "90\n"


# ══ terminal ═════════════════════════════════════════════════════════════════════════════════════

def on_a_tty(project: Project, columns: int = 100, **env: str) -> Tuple[int, str]:
    """Run with standard output on a pseudo-terminal; return the exit code and all that it got."""
    project.save_config()
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", **env}
    environment.pop("COLUMNS", None)
    run = subprocess.Popen([sys.executable, str(TOOL), "loop.ini"], cwd=project.root,
                           stdin=subprocess.DEVNULL, stdout=follower, stderr=subprocess.PIPE,
                           env=environment)
    os.close(follower)
    output, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([leader], [], [], 1)[0]:
            continue
        try:
            data = os.read(leader, 65536)
        except OSError:
            break
        if not data:
            break
        output += data
    os.close(leader)
    errors = run.communicate(timeout=30)[1]
    assert errors == b"", errors
    return run.returncode, output.decode("utf-8").replace("\r\n", "\n")


def test_the_live_line_is_for_a_tty(project: Project) -> None:
    project.turns("import time; time.sleep(.5)", LOWER)
    code, output = on_a_tty(project)
    assert code == 0 and "\r\x1b[K" in output
    live = [part for part in re.split(r"\r\x1b\[K|\n", output) if "agent" in part]
    assert any("#1 agent" in part and "best 100" in part and "left" in part for part in live), live
    assert max(map(len, live)) < 100
    shown = re.sub(r"[^\n]*\r\x1b\[K", "", output)
    assert "\r" not in shown and "\x1b" not in shown
    assert re.search(r"^#2 +keep +90 +-10\.0 % ", shown, re.MULTILINE), shown
    assert shown.endswith("\n")


def test_without_a_tty_there_are_plain_lines(project: Project) -> None:
    project.turns("import time; time.sleep(.5)", LOWER)
    result = project.run()
    assert "\r" not in result.out and "\x1b" not in result.out
    lines = result.out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("#")] == ["no_change", "keep"]
    assert [line.split()[0] for line in lines[-7:]] == [
        "stopped", "value", "turns", "branch", "look", "merge", "ledger"], result


def test_a_dumb_terminal_gets_plain_lines(project: Project) -> None:
    project.turns("import time; time.sleep(.3)")
    code, output = on_a_tty(project, TERM="dumb")
    assert code == 0 and "\r" not in output and "\x1b" not in output


@pytest.mark.parametrize("columns", [20, 1, 0])
def test_a_narrow_terminal(project: Project, columns: int) -> None:
    project.turns("import time; time.sleep(.5)")
    code, output = on_a_tty(project, columns=columns)
    live = [part for part in re.split(r"\r\x1b\[K|\n", output) if part.startswith("#1 ag")]
    assert code == 0 and "no_change" in output
    if columns:
        assert all(len(part) < columns for part in live), live


@pytest.mark.parametrize("target", ["closed pipe", "/dev/full", "closed"])
def test_nobody_listens(project: Project, target: str) -> None:
    """Output that can't be written is no reason to stop, nor for a word about it."""
    project.turns(LOWER, "pass")
    project.save_config()
    command = [sys.executable, str(TOOL), "loop.ini"]
    if target == "closed pipe":
        run = subprocess.Popen(command, cwd=project.root, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
        assert run.stdout and run.stdout.readline()
        run.stdout.close()
        run.stdout = None
        errors = run.communicate(timeout=60)[1]
        code = run.returncode
    else:
        redirect = ">&-" if target == "closed" else f">{target}"
        done = subprocess.run(["sh", "-c", f'exec "$@" {redirect}', "sh", *command],
                              cwd=project.root, stderr=subprocess.PIPE, timeout=60)
        errors, code = done.stderr, done.returncode
    assert (code, errors) == (0, b"")
    assert project.verdicts() == ["keep metric.better", "no_change candidate.unchanged"]
    assert project.git("show", "scalarloop/t:src/value.txt") == "90"


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["check", "loop.ini"],
                                  ["nope.ini"]])
@pytest.mark.parametrize("redirect", [">&-", ">/dev/full", "2>&-", "2>/dev/full", ">&- 2>&-"])
def test_closed_streams_of_short_commands(project: Project, args: List[str], redirect: str) -> None:
    if args[0] == "check" and redirect not in (">&-", ">/dev/full"):
        return
    done = subprocess.run(["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, str(TOOL),
                           *args], cwd=project.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == (2 if args[0] == "nope.ini" else 0), done
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr, done


@pytest.mark.parametrize("env", [
    {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    pytest.param({"LC_ALL": "C"}, marks=pytest.mark.slow),
    pytest.param({"PYTHONIOENCODING": "latin-1"}, marks=pytest.mark.slow),
    pytest.param({"PYTHONIOENCODING": "utf-16"}, marks=pytest.mark.slow),
], ids=lambda env: " ".join(f"{name}={value}" for name, value in env.items()))
def test_odd_file_names_in_any_language(project: Project, env: Dict[str, str]) -> None:
    names = ["naïve.txt", "日本 語.txt", "emoji😀.txt", os.fsdecode(b"latin\xe9.txt")]
    for name in names:
        with open(os.path.join(os.fsencode(project.root / "src"), os.fsencode(name)), "w") as file:
            file.write("1\n")
    project.commit()
    project.turns("""
        import os
        open("src/value.txt", "w").write("90\\n")
        open("src/naïve.txt", "w").write("2\\n")
        open("src/日本 語.txt", "w").write("2\\n")
        os.unlink(b"src/latin\\xe9.txt")
        print("geändert 日本 😀")
    """, 'open("日本.txt", "w").write("outside")')
    result = project.run(env=env)
    assert result.code == 0 and "Traceback" not in result.err, result
    assert project.verdicts() == ["keep metric.better", "violation scope.created"]
    assert project.git("show", "scalarloop/t:src/naïve.txt") == "2"
    assert project.run("verify", env=env).code == 0
    assert project.run("status", env=env).code == 0
    assert project.run("prompt", env=env).code == 0
