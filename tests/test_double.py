"""The test double: each step of a script, the random search, and what bad input gives."""
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Set

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOUBLE = ROOT / "adapters" / "double.py"
Done = subprocess.CompletedProcess  # of str


@pytest.fixture(name="work")
def make_work(tmp_path: Path) -> Path:
    """Return a workspace; the folder beside it, `project`, stands for the user's own."""
    (tmp_path / "project").mkdir()
    work = tmp_path / "work"
    (work / "src").mkdir(parents=True)
    (work / "src" / "a.py").write_text("x = 1\ny = 1\n")
    return work


def play(work: Path, prompt: bytes = b"make it smaller\n", **variables: str) -> "Done[str]":
    """Play one turn in an environment built from nothing; variables lack their SCALARLOOP_."""
    env = {"PATH": os.environ["PATH"], "SCALARLOOP_CONFIG_DIR": str(work.parent / "project")}
    env.update({f"SCALARLOOP_{name}": value for name, value in variables.items()})
    done = subprocess.run([sys.executable, str(DOUBLE)], cwd=work, env=env, input=prompt,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30, check=False)
    return Done(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def play_steps(work: Path, steps: str, **variables: str) -> "Done[str]":
    (work.parent / "project" / "turns.ini").write_text("[turn 1]\n" + steps)
    return play(work, OPT_SCRIPT="turns.ini", **variables)


def assert_refused(done: "Done[str]", code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert re.fullmatch(r"double: [^\n]+\n", done.stderr)
    for word in words:
        assert word in done.stderr


def list_tree(work: Path) -> Dict[str, bytes]:
    return {str(path.relative_to(work)): path.read_bytes()
            for path in sorted(work.rglob("*")) if path.is_file()}


# ---- script mode: steps --------------------------------------------------------------------------

def test_write_makes_folders_and_keeps_indentation(work: Path) -> None:
    done = play_steps(work, "write src/new/b.py =\n    |def f():\n    |    # why\n    |\n"
                            "    |    return 1\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (work / "src/new/b.py").read_text() == "def f():\n    # why\n\n    return 1\n"


@pytest.mark.parametrize("value, expected", [
    ("text", "text\n"), ("a % b = {c} => d ; e", "a % b = {c} => d ; e\n"), ("|", "\n"),
    ("\n  one\n  two", "one\ntwo\n"), ('""', ""), ('"a" + "b"', '"a" + "b"\n'),
    (r'" a\u00e9\n\tb"', " a\u00e9\n\tb")])
def test_text_stands_for_itself_or_is_json(work: Path, value: str, expected: str) -> None:
    assert play_steps(work, f"write t.txt = {value}\n").returncode == 0
    assert (work / "t.txt").read_bytes() == expected.encode()


def test_append_and_replace(work: Path) -> None:
    done = play_steps(work, 'append src/a.py = z = 1\nreplace src/a.py =\n  = 1 => = 2\n'
                            '  "y = 2\\n" => ""\n')
    assert done.returncode == 0, done.stderr
    assert (work / "src/a.py").read_text() == "x = 2\nz = 2\n"


def test_steps_run_in_the_order_written(work: Path) -> None:
    done = play_steps(work, "write b = 1\nreplace b = 1 => 2\nprint = done\nwrite c = 2\n")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert (work / "b").read_text() + (work / "c").read_text() == "2\n2\n"


def test_delete_takes_files_folders_and_links(work: Path) -> None:
    (work / "link").symlink_to("src")
    (work / "other").mkdir()
    (work / "other" / "b").write_text("b")
    assert play_steps(work, "delete =\n  link\n  other\n").returncode == 0
    assert list_tree(work) == {"src/a.py": b"x = 1\ny = 1\n"}


def test_chmod_and_symlink(work: Path) -> None:
    done = play_steps(work, "chmod src/a.py = 755\nsymlink src/b.py = /dev/null\n"
                            "symlink src/c.py = a.py\nwrite d = d\nsymlink d = src\n")
    assert done.returncode == 0, done.stderr
    assert (work / "src/a.py").stat().st_mode & 0o777 == 0o755
    links = [os.readlink(work / name) for name in ("src/b.py", "src/c.py", "d")]
    assert links == ["/dev/null", "a.py", "src"]


def test_copy_replaces_a_link_instead_of_writing_through_it(work: Path) -> None:
    shared = work.parent / "project" / "shared" / "src"
    shared.mkdir(parents=True)
    (shared / "a.py").write_text("x = 9\n")
    (shared / "a.py").chmod(0o555)
    outside = work.parent / "outside"
    outside.write_text("mine")
    (work / "src/a.py").unlink()
    (work / "src/a.py").symlink_to(outside)
    assert play_steps(work, "copy = shared\n").returncode == 0
    assert (work / "src/a.py").read_text() == "x = 9\n"
    assert os.access(work / "src/a.py", os.X_OK)
    assert outside.read_text() == "mine"


def test_print_in_any_locale(work: Path) -> None:
    done = play_steps(work, 'print = "\\u00b7 caf\\u00e9 \\ud800"\n')
    assert (done.returncode, done.stdout) == (0, "\u00b7 caf\u00e9 \\ud800")


def test_exit_ends_the_turn(work: Path) -> None:
    done = play_steps(work, "write b = b\nexit = 7\nwrite c = c\n")
    assert (done.returncode, done.stderr) == (7, "")
    assert set(list_tree(work)) == {"b", "src/a.py"}


def test_sleep_holds_the_turn_up(work: Path) -> None:
    assert play_steps(work, "sleep = 0.01\nprint = woke\n").stdout == "woke\n"


@pytest.mark.parametrize("name", ["KILL", "TERM"])
def test_kill_is_a_real_signal(work: Path, name: str) -> None:
    done = play_steps(work, f"write b = b\nkill = {name}\nwrite c = c\n")
    assert done.returncode == -getattr(signal, "SIG" + name)
    assert set(list_tree(work)) == {"b", "src/a.py"}


def test_run_uses_no_shell_and_reports_failure(work: Path) -> None:
    (work.parent / "project" / "tool.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    done = play_steps(work, f"run =\n  '{sys.executable}' {{script}}/tool.py 'a b' $HOME\n"
                            "print = after\n")
    assert (done.returncode, done.stdout) == (0, "['a b', '$HOME']\nafter\n")
    assert "exit code 3" in done.stderr


def test_expect_looks_into_the_prompt(work: Path) -> None:
    assert play_steps(work, "expect =\n  make it\n  smaller\n").returncode == 0
    assert_refused(play_steps(work, "expect = larger\n"), 1, "larger", "not in the prompt")


def test_a_large_prompt_is_read_to_its_end(work: Path) -> None:
    (work.parent / "project" / "turns.ini").write_text("[turn 1]\nexit = 0\n")
    assert play(work, b"\xff" * 1_000_000, OPT_SCRIPT="turns.ini").returncode == 0


# ---- script mode: which turn ---------------------------------------------------------------------

def test_folder_script(work: Path) -> None:
    script = work.parent / "project" / "agent"
    for folder, text in (("1-first", "1"), ("02", "2"), ("02.2-mended", "2.2"), ("shared", "no")):
        (script / folder / "src").mkdir(parents=True)
        (script / folder / "src" / "a.py").write_text(text)
    (script / "02.2-mended" / "turn.ini").write_text("[turn]\nappend src/a.py = more\n")
    (script / "README").write_text("not a turn")
    seen = []
    for iteration, turn in ((1, 1), (2, 1), (2, 2), (1, 2), (3, 1)):
        (work / "src" / "a.py").write_text("old")
        done = play(work, OPT_SCRIPT="agent", ITERATION=str(iteration), TURN=str(turn))
        assert done.returncode == 0, done.stderr
        seen.append((work / "src" / "a.py").read_text())
    assert seen == ["1", "2", "2.2more\n", "old", "old"]
    assert set(list_tree(work)) == {"src/a.py"}


def test_ini_script_numbers_turns(work: Path) -> None:
    (work.parent / "project" / "s.ini").write_text(
        "[turn 1]\nprint = one\n# a comment\n[turn 7.2]\nprint = mended\n")
    for iteration, turn, expected in ((1, 1, "one\n"), (7, 1, ""), (7, 2, "mended\n"), (8, 1, "")):
        done = play(work, OPT_SCRIPT="s.ini", ITERATION=str(iteration), TURN=str(turn))
        assert (done.returncode, done.stdout) == (0, expected)


def test_script_beside_loop_ini_comes_before_the_copy_in_the_workspace(work: Path) -> None:
    (work / "s.ini").write_text("[turn 1]\nprint = workspace\n")
    assert play(work, OPT_SCRIPT="s.ini").stdout == "workspace\n"
    (work.parent / "project" / "s.ini").write_text("[turn 1]\nprint = project\n")
    assert play(work, OPT_SCRIPT="s.ini").stdout == "project\n"


def test_options_of_other_adapters_are_ignored(work: Path) -> None:
    assert play_steps(work, "print = on\n", OPT_MODEL="some-model").stdout == "on\n"


def test_example_script_is_sound_and_ends(work: Path) -> None:
    before = list_tree(work)
    done = play(work, CONFIG_DIR=str(ROOT / "examples" / "bundle"), OPT_SCRIPT="agent",
                ITERATION="1000")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list_tree(work) == before


# ---- script mode: bad input ----------------------------------------------------------------------

@pytest.mark.parametrize("variables, words", [
    ({}, ["[adapter] script", "missing"]),
    ({"OPT_SCRIPT": "nowhere"}, ["[adapter] script", "nowhere"]),
    ({"OPT_MODE": "randm"}, ["[adapter] mode", "randm", "random"]),
    ({"OPT_MODE": "random", "ITERATION": "x"}, ["SCALARLOOP_ITERATION"]),
    ({"OPT_MODE": "random", "FILES": "{"}, ["SCALARLOOP_FILES"]),
    ({"OPT_MODE": "random", "FILES": "7"}, ["SCALARLOOP_FILES"])])
def test_bad_options(work: Path, variables: Dict[str, str], words: List[str]) -> None:
    assert_refused(play(work, **variables), 2, *words)


@pytest.mark.parametrize("text, word", [
    ("[turn 1]\nwrote b = 1\n", "wrote b"), ("[turn 1]\nwrite = 1\n", "write"),
    ("[turn 1]\nprint b = 1\n", "print b"), ("[turn x]\n", "'x'"), ("[turn 0]\n", "'0'"),
    ("[turn 1]\n[turn 01]\n", "'01'"), ("[turn 1]\n[turn 1]\n", "turn 1"), ("[other]\n", "[other]"),
    ("no section\n", "no section"), ("[turn 9]\nwrote b = 1\n", "wrote b"), ("\xff", "s.ini")])
def test_bad_script_is_refused_in_any_turn(work: Path, text: str, word: str) -> None:
    (work.parent / "project" / "s.ini").write_bytes(text.encode("latin-1"))
    assert_refused(play(work, OPT_SCRIPT="s.ini"), 2, "s.ini", word)


@pytest.mark.parametrize("name", ["0-zero", "1st", "1-again", "1.0-none"])
def test_bad_folder_names(work: Path, name: str) -> None:
    for folder in ("01-first", name):
        (work.parent / "project" / "agent" / folder).mkdir(parents=True)
    assert_refused(play(work, OPT_SCRIPT="agent"), 2, name)


@pytest.mark.parametrize("steps", [
    "replace src/a.py = q => r", "replace src/a.py = x", "replace src/gone.py = x => y",
    "delete = gone", "delete = .", "delete = ..", "copy = gone", "chmod gone = 644",
    "chmod src/a.py = rw", "write src = x", "write src/a.py/b = x", "sleep = long", "exit = one",
    "kill = NONE", "run = no-such-program-here", "run = 'open", 'write b = "\\x"'])
def test_step_that_does_not_fit(work: Path, steps: str) -> None:
    before = list_tree(work)
    assert_refused(play_steps(work, steps + "\n"), 1, steps.split()[0])
    assert list_tree(work) == before


# ---- random mode ---------------------------------------------------------------------------------

MARKED = '''\
rate: float = 0.01  # scalarloop: 0.001..0.1 log
layers = 4          # scalarloop: int 1..64
width = 8           # scalarloop: int 1..1024 log
offset = -0.5,      // scalarloop: -1..1
let mode = "adam";  // scalarloop: choice adam|sgd|'lion'
local depth = 3     -- scalarloop: int -3..3
size = 1e-3         ; scalarloop: 1e-5..1e-1 log
{"name": 2.5,       /* scalarloop: 2..3 */
plain = 1  # not marked
'''


def draw(work: Path, text: str = MARKED, name: str = "train.txt", **variables: str) -> str:
    (work / name).write_bytes(text.encode())
    done = play(work, OPT_MODE="random", **variables)
    assert done.returncode == 0, done.stderr
    return (work / name).read_bytes().decode()


def number(line: str) -> float:
    found = re.search(r"[=:] (-?[\d.]+(e-?\d+)?)[ ,]", line)
    assert found, line
    return float(found[1])


def test_random_is_deterministic_and_varies(work: Path) -> None:
    first = draw(work, SEED="3", ITERATION="5")
    assert draw(work, SEED="3", ITERATION="5") == first
    others = {draw(work, SEED=seed, ITERATION=iteration, TURN=turn)
              for seed, iteration, turn in (("4", "5", "1"), ("3", "6", "1"), ("3", "5", "2"))}
    assert len(others | {first}) == 4


def test_random_is_the_same_on_every_python(work: Path) -> None:
    assert draw(work, "a = 1  # scalarloop: 0..1\nb = 1  # scalarloop: int 1..1000000\n",
                SEED="0", ITERATION="1") == (
        "a = 0.85891  # scalarloop: 0..1\nb = 651018  # scalarloop: int 1..1000000\n")


def test_random_stays_in_range_and_touches_values_only(work: Path) -> None:
    seen: Dict[int, Set[str]] = {}
    for iteration in range(1, 13):
        lines = draw(work, ITERATION=str(iteration)).splitlines()
        assert lines[-1] == "plain = 1  # not marked"
        for index, (line, old) in enumerate(zip(lines, MARKED.splitlines())):
            mark = old.index("scalarloop") if "scalarloop" in old else len(old)
            assert line.endswith(old[mark:])
            seen.setdefault(index, set()).add(line)
        rate, layers, width, offset = (number(line) for line in lines[:4])
        assert 0.001 <= rate <= 0.1 and 1 <= layers <= 64 and 1 <= width <= 1024
        assert -1 <= offset <= 1 and lines[3].split("//")[0].rstrip().endswith(",")
        assert re.match(r"""let mode = ("adam"|"sgd"|"'lion'");  //""", lines[4])
        assert -3 <= number(lines[5]) <= 3 and 1e-5 <= number(lines[6]) <= 1e-1
        assert 2 <= number(lines[7]) <= 3
    assert all(len(values) > 1 for index, values in seen.items() if index < 8)


def test_random_reaches_both_ends_of_an_integer_range(work: Path) -> None:
    text = "".join(f"v{n} = 0  # scalarloop: int 1..3 log\n" for n in range(60))
    assert {number(line) for line in draw(work, text).splitlines()} == {1, 2, 3}


def test_random_keeps_line_ends_and_foreign_bytes(work: Path) -> None:
    data = b"a = 1  # scalarloop: 5..5\r\n\xff\x0c\xe2\x80\xa8 = 2"
    (work / "b.txt").write_bytes(data)
    assert play(work, OPT_MODE="random").returncode == 0
    assert (work / "b.txt").read_bytes() == data.replace(b"a = 1", b"a = 5.0")


def test_random_looks_only_where_it_may(work: Path) -> None:
    for name in ("in.py", "out.py", ".hidden.d/x.py"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("a = 1  # scalarloop: 5..5\n")
    (work / "link.py").symlink_to("out.py")
    assert play(work, OPT_MODE="random", FILES='["in.py", "link.py", "gone.py"]').returncode == 0
    assert (work / "in.py").read_text().startswith("a = 5.0 ")
    assert (work / "out.py").read_text().startswith("a = 1 ")
    assert play(work, OPT_MODE="random").returncode == 0
    assert (work / "out.py").read_text().startswith("a = 5.0 ")
    assert (work / ".hidden.d/x.py").read_text().startswith("a = 1 ")


@pytest.mark.parametrize("line, words", [
    ("a = 1  # scalarloop: 1..x", "1..x"), ("a = 1  # scalarloop: 3..1", "3..1"),
    ("a = 1  # scalarloop: 0..1 log", "0..1 log"), ("a = 1  # scalarloop: int 0.5..2", "int 0.5"),
    ("a = 1  # scalarloop: 1..1e999", "1e999"), ("a = 1  # scalarloop: 1.2.3..4", "1.2.3"),
    ("a = 1  # scalarloop:", "''"), ("a = 1  # scalarloop: int 5", "int 5"),
    ("# scalarloop: 1..2", "name = value"), ("print(1)  # scalarloop: 1..2", "name = value")])
def test_a_wrong_mark_changes_nothing(work: Path, line: str, words: str) -> None:
    (work / "a.py").write_text("a = 1  # scalarloop: 5..5\n")
    (work / "b.py").write_text("\n" + line + "\n")
    before = list_tree(work)
    done = play(work, OPT_MODE="random")
    assert_refused(done, 2, "b.py:2", words)
    assert list_tree(work) == before


def test_no_mark_at_all_is_refused(work: Path) -> None:
    assert_refused(play(work, OPT_MODE="random"), 2, "no marked value")


def test_a_file_that_cannot_be_written_is_one_line(work: Path) -> None:
    (work / "a.py").write_text("a = 1  # scalarloop: 5..5\n")
    (work / "a.py").chmod(0o444)
    if os.access(work / "a.py", os.W_OK):
        pytest.skip("this user may write everything")
    assert_refused(play(work, OPT_MODE="random"), 1, "a.py")
