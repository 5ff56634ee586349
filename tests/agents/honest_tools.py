"""What honest agents do all day: build, test, install, commit, compute in parallel; in the workspace."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

from siege import refuse

SCRATCH = Path(os.environ["TMPDIR"])
PYTEST = "import os\ndef test_value(tmp_path):\n    assert os.listdir(tmp_path) == []\n"
POOL = """
import multiprocessing
if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]
    multiprocessing.Manager().dict()
"""
SERVER = """
import http.server, threading, urllib.request
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
assert opener.open("http://127.0.0.1:%d/README" % server.server_port).read() == b"x\\n"
"""


def run(*argv, folder=".", text=None):
    if not shutil.which(argv[0]):
        refuse(2, "not installed")
    done = subprocess.run(argv, cwd=folder, input=text, universal_newlines=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError("%s: %s" % (argv[:3], done.stdout[-1500:]))
    return done.stdout


def folder(name):
    path = SCRATCH / name
    path.mkdir()
    return path


def node():
    run("node", "-e", "require('fs').mkdirSync('build'); require('fs').writeFileSync('build/node.txt', 'x')")


def npm():
    """Install a package of the disk, without a network."""
    for name in ("dependency", "package"):
        made = folder(name)
        (made / "package.json").write_text('{"name": "%s", "version": "1.0.0"}' % name)
    run("npm", "install", "--offline", "--no-audit", "--no-fund", "../dependency", folder=SCRATCH / "package")
    assert os.path.exists(SCRATCH / "package/node_modules/dependency/package.json")


def pytest():
    try:
        import pytest as found
    except ImportError:
        refuse(2, "not installed")
    (folder("tests") / "test_value.py").write_text(PYTEST)
    run(sys.executable, "-m", found.__name__, "-q", str(SCRATCH / "tests"))


def venv():
    run(sys.executable, "-m", "venv", "--without-pip", str(SCRATCH / "venv"))
    run(str(SCRATCH / "venv/bin/python"), "-c", "import json")


def make():
    made = folder("c")
    (made / "main.c").write_text("int main(void) { return 0; }\n")
    (made / "Makefile").write_text("main: main.c\n\tgcc -o main main.c\n")
    run("make", folder=made)
    run(str(made / "main"))


def sqlite():
    run("sqlite3", str(SCRATCH / "some.db"), "create table t (a); insert into t values (1);")


def git():
    """In the workspace itself: its history is the agent's to play with."""
    run("git", "status", "--short")
    run("git", "add", "-A")
    run("git", "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-qm", "mine")
    run("git", "stash", "list")
    run("git", "gc", "-q")


def multiprocessing():
    (folder("pool") / "pool.py").write_text(POOL)
    run(sys.executable, str(SCRATCH / "pool/pool.py"))


def server():
    run(sys.executable, "-c", SERVER)


def devices():
    run("sh", "-c", "echo x > /dev/null && head -c 9 /dev/urandom > /dev/null && echo x >> /dev/stderr")
