"""Make git run the agent's code: hooks, fsmonitor, filters, gpg, external diff, HOME's config."""
import os
import subprocess
from pathlib import Path

from play import lower, script


def config(*rows):
    lower()
    for name, value in rows:
        subprocess.run(["git", "config", name, str(value)], check=True)


def hooks():
    lower()
    for name in ("pre-commit", "post-checkout", "post-index-change", "reference-transaction",
                 "pre-auto-gc", "post-update", "post-rewrite"):
        script(".git/hooks/" + name)


def fsmonitor():
    tool = script(".git/tool")
    config(("core.fsmonitor", tool), ("core.hooksPath", tool.parent), ("core.sshCommand", tool),
           ("core.alternateRefsCommand", tool), ("core.editor", tool), ("core.pager", tool))


def filters():
    tool = script(".git/tool")
    Path(".git/info").mkdir(exist_ok=True)
    Path(".git/info/attributes").write_text("* filter=evil diff=evil merge=evil\n")
    config(("filter.evil.clean", tool), ("filter.evil.smudge", tool), ("filter.evil.process", tool),
           ("diff.evil.textconv", tool), ("diff.evil.command", tool), ("merge.evil.driver", tool))


def programs():
    tool = script(".git/tool")
    config(("gpg.program", tool), ("commit.gpgSign", "true"), ("diff.external", tool),
           ("credential.helper", tool), ("uploadpack.packObjectsHook", tool))


def worktree_config():
    tool = script(".git/tool")
    config(("extensions.worktreeConfig", "true"))
    Path(".git/config.worktree").write_text("[core]\n\tfsmonitor = %s\n" % tool)


def home_config():
    lower()
    tool = script(Path(os.environ["HOME"], "tool"))
    text = "[core]\n\tfsmonitor = %s\n\thooksPath = %s\n" % (tool, tool.parent)
    Path(os.environ["HOME"], ".gitconfig").write_text(text)
    folder = Path(os.environ["HOME"], ".config", "git")
    folder.mkdir(parents=True)
    (folder / "config").write_text(text)
    (folder / "attributes").write_text("* filter=evil\n")


def attributes():
    """A .gitattributes is nothing that a `**` of the scope could mean."""
    lower()
    Path("src/.gitattributes").write_text("*.txt filter=evil working-tree-encoding=UTF-16\n")


def modules():
    lower()
    Path(".gitmodules").write_text('[submodule "x"]\n\tpath = src\n\turl = ext::sh -c true\n')


def honest():
    config(("user.name", "agent"), ("alias.st", "status"))
