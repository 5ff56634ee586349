"""Repositories as they are: every odd set-up, with honest turns that must be kept."""
from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import textwrap
from typing import Dict

import pytest

from conftest import METRIC, Project, Result

KEPT, CREATED, SEALED = "keep metric.better", "violation scope.created", "violation seal.modified"
LOWER = """
import os, pathlib
value = pathlib.Path("src/value.txt")
value.write_text("%d\\n" % (int(value.read_text()) - 1))
"""


def check_metric(project: Project, body: str, path: str = "metric.py") -> None:
    """Make the metric look at its cleanroom before it prints the number."""
    project.write(path, "import hashlib, os, pathlib\n" + textwrap.dedent(body)
                  + textwrap.dedent(METRIC))


def read_blob(project: Project, name: str) -> bytes:
    """Return a file of a commit, byte for byte."""
    return subprocess.run(["git", "cat-file", "blob", name], cwd=project.root, check=True,
                          stdout=subprocess.PIPE).stdout


def assert_kept(project: Project, before: Dict[str, str], turns: int = 1) -> Result:
    """Run to the end: every turn kept, nothing of the user's changed, the record whole."""
    result = project.run()
    assert result.code == 0, result
    assert project.verdicts() == [KEPT] * turns, result
    assert project.fingerprint() == before
    changed = project.git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!loop.ini")
    assert changed == ""
    assert project.git("fsck", "--strict", "--no-dangling") == ""
    verified = project.run("verify")
    assert verified.code == 0, verified
    assert project.leftovers() == []
    return result


def test_loop_ini_in_a_sub_folder(project: Project) -> None:
    """Working directory and globs are loop.ini's folder; the tree is the whole repository."""
    top = project.root
    project.git("rm", "-q", "loop.ini")
    sub = top / "packages" / "app one"
    (sub / "src").mkdir(parents=True)
    shutil.copy(top / "src/value.txt", sub / "src")
    check_metric(project, """
        assert os.getcwd().endswith("/packages/app one"), os.getcwd()
        assert pathlib.Path("../../data/truth.txt").read_text() == "sealed\\n"
    """, "packages/app one/metric.py")
    project.root = sub
    project.save_config()
    project.root = top
    project.commit("sub-folder")
    project.root = sub
    before = project.fingerprint()
    project.turns(LOWER, "open('../../data/truth.txt', 'w').write('x')",
                  "open('../../src/value.txt', 'w').write('1')",
                  "open('../../new', 'w').write('1')", LOWER)
    result = project.run()
    assert project.verdicts() == [KEPT, SEALED, SEALED,
                                  CREATED, KEPT], result
    assert project.fingerprint() == before
    changed = project.git("diff", "--name-only", "main", "scalarloop/t", "--", ":/")
    assert changed == "packages/app one/src/value.txt"
    assert project.run("verify").code == 0


def test_a_sha256_repository(project: Project) -> None:
    shutil.rmtree(project.root / ".git")
    project.git("init", "-q", "--object-format=sha256")
    project.write("src/sub/other.txt", "x\n")
    project.commit("start")
    project.turns(LOWER + "open('src/new', 'w').write('x')", LOWER)
    assert_kept(project, project.fingerprint(), 2)
    assert len(project.git("rev-parse", "scalarloop/t")) == 64


@pytest.mark.parametrize("how", ["--depth=1", "--shared", "--filter=blob:none", "--single-branch"])
def test_clones(project: Project, how: str) -> None:
    """Shallow, borrowing its objects from another repository, partial, plain."""
    project.write("src/value.txt", "101\n")
    project.commit("second")
    project.write("src/value.txt", "100\n")
    project.commit("third")
    origin = project.root.rename(project.tmp / "origin")
    project.git("config", "uploadpack.allowFilter", "true", cwd=origin)
    source = str(origin) if how == "--shared" else f"file://{origin}"
    project.git("clone", "-q", how, source, str(project.root), cwd=project.tmp)
    project.turns(LOWER, LOWER)
    assert_kept(project, project.fingerprint(), 2)


def test_a_linked_worktree(project: Project) -> None:
    main = project.root
    project.git("worktree", "add", "-q", "-b", "feature", str(project.tmp / "linked"))
    project.root = project.tmp / "linked"
    (main / "src/value.txt").write_text("50\n")      # the other work tree's changes are its own
    project.turns(LOWER)
    assert_kept(project, project.fingerprint())
    assert project.git("log", "-1", "--format=%s", "scalarloop/t", cwd=main).startswith("#1 ")
    assert (main / "src/value.txt").read_text() == "50\n"


def test_a_run_of_the_same_name_in_another_work_tree_is_left_alone(project: Project) -> None:
    project.git("worktree", "add", "-q", "-b", "feature", str(project.tmp / "linked"))
    project.turns(LOWER)
    assert project.run().code == 0
    refs = project.git("for-each-ref")
    main, project.root = project.root, project.tmp / "linked"
    for words in ([], ["--new"], ["check"]):
        result = project.run(*words)
        assert result.code == 2, result
        assert str(main / ".scalarloop" / "t") in result.err + result.out, result
        assert "[loop] name" in result.err + result.out and project.git("for-each-ref") == refs


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a repository to somebody else")
def test_a_repository_of_another_user(project: Project) -> None:
    """As root in a container over the user's folder: git's ownership check, and who owns the new.
    """
    for path in [project.root, *project.root.rglob("*")]:
        os.chown(path, 12345, 12345, follow_symlinks=False)
    project.turns(LOWER, LOWER)
    project.save_config()
    os.chown(project.root / "loop.ini", 12345, 12345)
    settings = project.tmp / "safe"
    settings.write_text("[safe]\n\tdirectory = *\n")
    os.environ["GIT_CONFIG_GLOBAL"] = str(settings)
    assert_kept(project, project.fingerprint(), 2)
    new = [path for path in (project.root / ".git").rglob("*")
           if path.name != "index"]     # the test's own git status wrote that
    assert [path for path in new if path.lstat().st_uid != 12345] == []


def test_bytes_that_differ_on_disk_are_measured_as_stored(project: Project) -> None:
    """Line ends, ident, another encoding, a clean filter: the cleanroom holds what git holds."""
    project.write(".gitattributes", """
        *.crlf text eol=crlf
        *.id ident
        *.u16 text working-tree-encoding=UTF-16
    """)
    stored = {"data/a.crlf": b"one\ntwo\n", "data/b.id": b"$Id$\n",
              "data/c.u16": "gr\u00fc\u00df\n".encode(),
              "src/d.crlf": b"in\nscope\n", "data/raw.txt": b"one\r\ntwo\r\n"}
    for path, data in stored.items():
        shown = {"crlf": data.replace(b"\n", b"\r\n"), "u16": data.decode().encode("utf-16")}
        (project.root / path).write_bytes(shown.get(path.rsplit(".", 1)[1], data))
    project.commit("attributes")
    for path in stored:     # what a fresh checkout has on disk
        (project.root / path).unlink()
    project.git("checkout", "-q", "--", ".")
    assert (project.root / "data/a.crlf").read_bytes() == b"one\r\ntwo\r\n"
    sealed = {path: data for path, data in stored.items() if path.startswith("data/")}
    check_metric(project, f"for path, data in {sealed!r}.items():\n"
                          "    assert pathlib.Path(path).read_bytes() == data, path\n")
    project.commit("metric")
    project.turns(LOWER, LOWER + "open('src/d.crlf', 'ab').write(b'more\\r\\n')")
    result = assert_kept(project, project.fingerprint(), 2)
    assert "4 files are stored with other bytes" in result.out
    assert read_blob(project, "scalarloop/t:src/d.crlf") == b"in\nscope\nmore\r\n"


def test_git_lfs_pointers_are_measured_as_their_content(project: Project) -> None:
    content = b"large " * 1000
    oid = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"
    project.write("data/model.bin", pointer)
    project.write("data/looks-like-one.txt", pointer)
    project.commit("pointer")
    project.write(".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n")
    check_metric(project, f"""
        assert hashlib.sha256(pathlib.Path("data/model.bin").read_bytes()).hexdigest() == {oid!r}
        assert pathlib.Path("data/looks-like-one.txt").read_text().startswith("version")
    """)
    project.commit("attributes")
    result = project.run()
    assert result.code == 2 and "git lfs pull" in result.err, result
    held = project.root / ".git/lfs/objects" / oid[:2] / oid[2:4] / oid
    held.parent.mkdir(parents=True)
    held.write_bytes(content)
    project.turns(LOWER, LOWER + "open('data/model.bin', 'a').write('x')", LOWER)
    before = project.fingerprint()
    result = project.run()
    assert project.verdicts() == [KEPT, SEALED, KEPT], result
    assert project.fingerprint() == before
    assert project.run("verify").code == 0
    assert project.git("show", "scalarloop/t:data/model.bin") == pointer.strip()


ODD_NAMES = [b"data/\xff\xfe", b"data/new\nline", b"data/tab\tquote\"back\\slash", b"data/ blank ",
             b"data/-rf", b"data/:(top)x", b"data/*?[a]", "data/gr\u00fc\u00df".encode(),
             b"data/\x1b[2J", b"data/\x7f", b"data/{cwd}", b"src/\xff", b"src/new\nline"]
ODD_LINKS = {"link-to-folder": "data", "link-to-file": "data/truth.txt", "link-loop": "link-loop",
             "link-to-nothing": "gone/away", "link-out": "/usr/bin/env",
             "src/link": "../data/truth.txt"}


def test_odd_trees(project: Project) -> None:
    """Names in bytes, links, modes, sizes, empty folders, a submodule that isn't there."""
    root = os.fsencode(project.root)
    for number, name in enumerate(ODD_NAMES):
        with open(os.path.join(root, name), "wb") as stream:
            stream.write(b"%d" % number)
    for link, target in ODD_LINKS.items():
        os.symlink(target, project.root / link)
    project.write("tools/run", "#!/bin/sh\n", 0o755)
    project.write("src/tool", "#!/bin/sh\n", 0o755)
    project.write("data/empty", "")
    project.write("src/empty", "")
    with open(project.root / "data/big", "wb") as stream:
        for number in range(50):
            stream.write(hashlib.sha256(b"%d" % number).digest() * (1 << 15))
    (project.root / "void/in/void").mkdir(parents=True)
    project.write(".hidden/.deep/.file", "x\n")
    check_metric(project, f"""
        for number, name in enumerate({ODD_NAMES!r}):
            assert name[:4] == b"src/" or open(name, "rb").read() == b"%d" % number, name
        for link, target in {ODD_LINKS!r}.items():
            assert link[:4] == "src/" or os.readlink(link) == target, link
        assert os.path.exists("link-to-folder/truth.txt")
        assert os.stat("tools/run").st_mode & 0o111 and not os.stat("metric.py").st_mode & 0o111
        assert os.path.getsize("data/empty") == 0 and os.path.getsize("data/big") == 50 << 20
        assert not os.path.exists("void") and os.listdir("module") == []
    """)
    project.git("add", "-A")
    project.git("update-index", "--add", "--cacheinfo", "160000," + "1" * 40 + ",module")
    (project.root / "module").mkdir()
    project.git("commit", "-q", "-m", "odd")
    project.turns(LOWER, LOWER + "os.unlink('src/empty'); os.chmod('src/tool', 0o644)",
                  LOWER + "os.unlink('src/link')", LOWER,
                  LOWER + "open(b'src/\\xff', 'a').write('x'); os.unlink('src/new\\nline')")
    result = assert_kept(project, project.fingerprint(), 5)
    changes = project.git("-c", "core.quotePath=false", "diff", "--name-status", "--no-renames",
                          "main", "scalarloop/t").splitlines()
    assert sorted(line.split("\t") for line in changes) == [
        ["D", '"src/new\\nline"'], ["D", "src/empty"], ["D", "src/link"], ["M", "src/tool"],
        ["M", "src/value.txt"], ["M", "src/\udcff"]], result


def test_submodules(project: Project) -> None:
    """One in use must be shared; then its files are there, and sealed."""
    library = project.tmp / "library"
    library.mkdir()
    project.git("init", "-q", cwd=library)
    (library / "lib.txt").write_text("library\n")
    project.git("add", "-A", cwd=library)
    project.git("commit", "-q", "-m", "library", cwd=library)
    project.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(library),
                "vendor/library")
    check_metric(project, 'assert open("vendor/library/lib.txt").read() == "library\\n"')
    project.commit("submodule")
    result = project.run()
    assert result.code == 2 and "vendor/library" in result.err and "share" in result.err, result
    project.config["loop"]["share"] = "vendor/library"
    project.turns(LOWER, LOWER + "open('vendor/library/lib.txt', 'w').write('x')",
                  LOWER + "open('vendor/library/new.txt', 'w').write('x')", LOWER)
    before = project.fingerprint()
    result = project.run()
    assert project.verdicts() == [KEPT, SEALED, CREATED,
                                  KEPT], result
    assert project.fingerprint() == before and project.run("verify").code == 0


LEADS = {
    "pth": "(folder / 'editable.pth').write_text(str(root / 'src') + '\\n')",
    "egg-link": "(folder / 'app.egg-link').write_text('../../src\\n.')",
    "symlink": "os.symlink('../../src', folder / 'app')",
    "absolute symlink": "os.symlink(root / 'src', folder / 'app')",
    "finder": "(folder / '__editable___x_finder.py').write_text('X = {1: %r}' % str(root / 'src'))",
}


@pytest.mark.parametrize("how", LEADS)
def test_a_shared_folder_that_leads_into_the_project_is_refused(project: Project, how: str) -> None:
    """It would have the user's files measured instead of the candidate's."""
    folder = project.root / "venv" / "site-packages"
    folder.mkdir(parents=True)
    exec(LEADS[how], {"folder": folder, "root": project.root, "os": os})
    project.write(".gitignore", "venv/\n")
    project.commit("ignore")
    project.config["loop"]["share"] = "venv"
    result = project.run()
    assert result.code == 2 and "leads into the project" in result.err, result


def test_shared_folders_with_links_of_their_own(project: Project) -> None:
    """What leads to itself or far away is fine: node_modules/.bin, a venv's python."""
    project.write("node_modules/tool/main.js", "main\n", 0o755)
    (project.root / "node_modules/.bin").mkdir()
    os.symlink("../tool/main.js", project.root / "node_modules/.bin/tool")
    os.symlink("/usr/bin/env", project.root / "node_modules/.bin/python")
    (project.root / "node_modules/empty").mkdir()
    project.write(".gitignore", "node_modules\n")
    check_metric(project, """
        assert pathlib.Path("node_modules/.bin/tool").read_text() == "main\\n"
        assert os.stat("node_modules/.bin/tool").st_mode & 0o100
        assert os.path.isdir("node_modules/empty")
        assert os.path.realpath("node_modules/.bin/tool").startswith(os.path.realpath("."))
    """)
    project.commit("share")
    project.config["loop"]["share"] = "node_modules"
    project.turns(LOWER, LOWER)
    assert_kept(project, project.fingerprint(), 2)


HOOKS = """pre-commit post-commit post-checkout post-merge post-index-change reference-transaction
    pre-auto-gc pre-push pre-receive update post-receive post-update post-rewrite"""
SETTINGS = """core.fsmonitor core.alternateRefsCommand core.sshCommand core.pager core.editor
    diff.external gpg.program filter.user.clean filter.user.smudge diff.user.textconv
    diff.user.command uploadpack.packObjectsHook credential.helper"""


def test_nothing_that_the_users_git_names_is_run(project: Project) -> None:
    """Hooks, fsmonitor, filters, alternateRefsCommand, a pager, an external diff: a marker in each.
    """
    marker = project.tmp / "user-code-ran"
    tool = project.tmp / "tool"
    tool.write_text(f"#!/bin/sh\necho \"$0 $@\" >> {marker}\ncat\n")
    tool.chmod(0o755)
    hooks = project.root / ".git/hooks"
    hooks.mkdir(exist_ok=True)
    for name in HOOKS.split():
        shutil.copy(tool, hooks / name)
    project.write(".gitattributes", "src/** filter=user diff=user merge=user\n")
    project.commit("attributes")
    for name in SETTINGS.split():
        project.git("config", name, str(tool))
    for name, value in (("gc.auto", "1"), ("gc.autoDetach", "false"), ("commit.gpgSign", "true")):
        project.git("config", name, value)
    alternate = project.tmp / "alternate"
    project.git("init", "-q", "--bare", str(alternate), cwd=project.tmp)
    (project.root / ".git/objects/info/alternates").write_text(f"{alternate}/objects\n")
    project.turns(LOWER, "open('metric.py', 'w')", LOWER)
    os.utime(project.root / "src/value.txt")    # to compare it, git would run the clean filter
    marker.unlink(missing_ok=True)
    result = project.run()
    assert result.code == 0 and project.verdicts().count(KEPT) == 2, result
    assert project.run("verify").code == 0
    assert project.run("status").code == 0
    assert not marker.exists(), marker.read_text()


@pytest.mark.parametrize("name", ["quo'te\"s %(x)s $HOME {cwd}", "-new\nline \u00fcml\u00e4ut"])
def test_projects_at_odd_paths(project: Project, name: str) -> None:
    project.root = project.root.rename(project.tmp / name)
    project.turns(LOWER)
    assert_kept(project, project.fingerprint())


def test_the_users_own_ignore_rules_and_sparse_checkout_do_not_matter(project: Project) -> None:
    """The base's rules count; those of a person's clone, and what is checked out of it, don't."""
    (project.root / ".git/info").mkdir(exist_ok=True)
    (project.root / ".git/info/exclude").write_text("*.mine\n")
    project.git("config", "core.excludesFile", str(project.tmp / "excludes"))
    (project.tmp / "excludes").write_text("*.theirs\n")
    project.git("update-index", "--skip-worktree", "data/truth.txt")
    (project.root / "data/truth.txt").unlink()
    check_metric(project, 'assert pathlib.Path("data/truth.txt").read_text() == "sealed\\n"')
    project.git("commit", "-qam", "metric")
    project.turns(LOWER + "for name in ('a.mine', 'b.theirs'): open('src/' + name, 'w').close()",
                  LOWER + "open('c.mine', 'w').write('x')", LOWER)
    before = project.fingerprint()
    result = project.run()
    assert project.verdicts() == [KEPT, CREATED, KEPT], result
    assert "a.mine" in project.git("ls-tree", "-r", "--name-only", "scalarloop/t")
    assert project.fingerprint() == before


def test_ignore_rules_of_the_base(project: Project) -> None:
    """Nested rules, negations, rules about folders: as git reads them, on the loop's side."""
    project.write(".gitignore", "*.log\n!keep.log\n/out/\ncache/\n")
    project.write("src/.gitignore", "/local\n*.tmp\n")
    project.write("src/tracked.log", "tracked though ignored\n")
    project.git("add", "-f", "src/tracked.log")
    project.commit("rules")
    made = ("src/a.log", "src/keep.log", "src/local", "src/deep/local", "src/x.tmp", "src/cache/y",
            "src/out/z", "out/o", "any.log", "deep/cache/x")
    project.turns(f"""
{LOWER}
for name in {made!r}:
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    open(name, "w").write("x")
open("src/tracked.log", "a").write("more\\n")
""")
    result = assert_kept(project, project.fingerprint())
    changed = project.git("diff", "--name-only", "main", "scalarloop/t").splitlines()
    assert changed == ["src/deep/local", "src/keep.log", "src/out/z", "src/tracked.log",
                       "src/value.txt"], result
    assert project.iterations()[0]["dropped"] == 7


def test_scope_of_git_files_only_literally(project: Project) -> None:
    """`.gitignore` may be in scope when it is named; its new rules count for nothing in this run.
    """
    project.config["loop"]["scope"] = "src/** .gitignore .gitattributes"
    project.turns(LOWER + "open('.gitignore', 'a').write('*.txt\\n')\nopen('src/other.txt', 'w')",
                  LOWER + "open('.gitattributes', 'w').write('* text=auto eol=crlf\\n')",
                  LOWER + "open('src/.gitignore', 'w').write('*')",
                  LOWER + "open('.gitmodules', 'w').write('')",
                  LOWER + "open('src/windows.txt', 'wb').write(b'a\\r\\n')")
    before = project.fingerprint()
    result = project.run()
    assert project.verdicts() == [KEPT, KEPT, "violation census.git_file",
                                  "violation census.git_file", KEPT], result
    assert project.fingerprint() == before
    names = project.git("ls-tree", "-r", "--name-only", "scalarloop/t").splitlines()
    assert "src/other.txt" in names
    assert read_blob(project, "scalarloop/t:src/windows.txt") == b"a\r\n"
    assert project.run("verify").code == 0
