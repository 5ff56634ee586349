"""The adapters as the loop runs them: a prompt on stdin, a workspace, a server that misbehaves.

Servers are scripted and on loopback, programs are small fakes, keys are dummies. The same question
after each fault: one clear line, the documented exit code, and not one byte of the workspace moved.
What the true programs do is in test_real_agents.py.
"""
from __future__ import annotations

import email.utils
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, NamedTuple, Optional

import pytest
from fake_servers import LOOPBACK_PEM, Reply, ScriptedServer
from test_edits import ADAPTERS, edits, tree, whole

KEY = "sk-dummy-0123456789"
TOKEN = "SCALAR_LOOP_GIVE_UP"
FILES = {"src/app.js": "const a = 1;\n", "src/util.js": "let x = 1;\n", "metric.py": "sealed\n"}
GOOD = whole("src/app.js", "const a = 2;\n")
CLEAN = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}


class Result(NamedTuple):
    code: int
    out: str
    seconds: float


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "work"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "scratch").mkdir()
    return root


def environment(folder: Path, **more: Optional[str]) -> Dict[str, str]:
    """Return what the loop hands to an adapter; lower-case names are its options."""
    found = {**CLEAN, "HOME": str(folder.parent / "home"), "TMPDIR": str(folder.parent / "scratch"),
             "SCALARLOOP_SCOPE": '["src/**/*.js"]', "SCALARLOOP_ITERATION": "3",
             "SCALARLOOP_FILES": '["src/app.js", "src/util.js"]'}
    for name, value in more.items():
        plain = name.isupper() or name.endswith("_proxy")
        found[name if plain else f"SCALARLOOP_OPT_{name.upper()}"] = value
    return {name: value for name, value in found.items() if value is not None}


def start(adapter: str, folder: Path, prompt: str = "Make it smaller.",
          **more: Optional[str]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, str(ADAPTERS / f"{adapter}.py")], cwd=folder, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(folder, **more))
    process.stdin.write(prompt.encode())
    process.stdin.close()
    process.stdin = None
    return process


def run(adapter: str, folder: Path, prompt: str = "Make it smaller.",
        **more: Optional[str]) -> Result:
    """Run an adapter to its end; whatever it does, it prints no traceback."""
    begun = time.monotonic()
    process = start(adapter, folder, prompt, **more)
    try:
        out = process.communicate(timeout=60)[0].decode()
    finally:
        process.kill()
    assert "Traceback" not in out, out
    return Result(process.returncode, out, time.monotonic() - begun)


def ask(folder: Path, server: ScriptedServer, **more: Optional[str]) -> Result:
    return run("openai", folder, **{"base_url": server.url, "model": "some-model",
                                    "api_key_env": "OPENAI_API_KEY", "OPENAI_API_KEY": KEY, **more})


def last_line(result: Result) -> str:
    return result.out.rstrip("\n").rpartition("\n")[2]


def contents(request) -> str:
    return "\n".join(message["content"] for message in request.body["messages"])


# ── openai.py: a turn ───────────────────────────────────────────────────────────────────────────

def test_it_sends_prompt_and_files_and_applies_the_answer(folder):
    with ScriptedServer([GOOD]) as server:
        result = ask(folder, server, temperature="0.5", max_tokens="2k", extra='{"top_p": 0.9}',
                     SCALARLOOP_SEED="40")
    assert result.code == 0 and (folder / "src/app.js").read_text() == "const a = 2;\n"
    request, = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    sent = {name: value for name, value in request.body.items() if name != "messages"}
    assert sent == {"model": "some-model", "stream": False, "temperature": 0.5, "top_p": 0.9,
                    "max_tokens": 2000, "seed": 40}
    text = contents(request)
    assert text.startswith("Make it smaller.")
    assert "FILE: src/app.js\n```\nconst a = 1;\n```" in text
    assert "sealed" not in text and KEY not in text and "DELETE:" in text


def test_an_escape_raises_the_temperature(folder):
    with ScriptedServer([GOOD]) as server:
        ask(folder, server, temperature="0.2", SCALARLOOP_TEMPERATURE="1.5")
        ask(folder, server, SCALARLOOP_TEMPERATURE="1.5")
        ask(folder, server, SCALARLOOP_TEMPERATURE="1.0")
    assert [post.body.get("temperature") for post in server.posts] == [0.3, 1.5, None]


@pytest.mark.parametrize("form,mark", [("whole", "````"), ("search", "<<<<<<< SEARCH"),
                                       ("diff", "```diff")])
def test_it_asks_for_the_format_that_is_wanted(folder, form, mark):
    with ScriptedServer([GOOD]) as server:
        assert ask(folder, server, format=form).code == 0
    assert mark in contents(server.posts[0])


def test_a_turn_of_rework_may_mend_a_file_of_the_turn_before(folder):
    (folder / "src/new.js").write_text("crash(\n")
    with ScriptedServer([whole("src/new.js")]) as server:
        assert ask(folder, server).code == 9
        assert ask(folder, server, SCALARLOOP_TURN="2").code == 0
    assert "crash(" in contents(server.posts[-1])
    assert (folder / "src/new.js").read_text() == "x\n"


def test_alone_it_takes_the_folder_as_it_is(folder):
    with ScriptedServer([whole("metric.py")]) as server:
        assert ask(folder, server, SCALARLOOP_SCOPE=None, SCALARLOOP_FILES=None).code == 0
    assert (folder / "metric.py").read_text() == "x\n"


def test_without_base_url_it_uses_the_usual_variables(folder):
    with ScriptedServer([GOOD]) as server:
        assert ask(folder, server, base_url=None, api_key_env=None,
                   OPENAI_BASE_URL=server.url).code == 0
        assert ask(folder, server, api_key_env=None).code == 0
    assert [bool(post.headers.get("Authorization")) for post in server.posts] == [True, False]


def test_many_files_are_listed_first_and_shown_on_request(folder):
    (folder / "src/big.js").write_text("// big\n" * 500)
    names = json.dumps(["src/app.js", "src/big.js", "src/util.js"])
    wish = "- READ: `src/util.js`\nREAD: src/big.js\nREAD: metric.py\nREAD: src/app.js"
    with ScriptedServer([wish, GOOD]) as server:
        assert ask(folder, server, context="60", SCALARLOOP_FILES=names).code == 0
    listing, shown = [post.body["messages"][-1]["content"] for post in server.posts]
    assert "src/big.js (3500 bytes)" in listing and "let x" not in listing
    assert "let x" in shown and "const a" in shown and "// big" not in shown
    assert "sealed" not in shown


def test_a_model_that_edits_at_once_is_taken_at_its_word(folder):
    with ScriptedServer([GOOD]) as server:
        assert ask(folder, server, context="5").code == 0
    assert len(server.posts) == 1


def test_one_repair_round_then_success(folder):
    with ScriptedServer(["I would change src/app.js.", GOOD]) as server:
        result = ask(folder, server)
    assert result.code == 0 and (folder / "src/app.js").read_text() == "const a = 2;\n"
    assert "Nothing was applied: no edit block" in server.posts[1].body["messages"][-1]["content"]
    assert [message["role"] for message in server.posts[1].body["messages"]] == [
        "user", "assistant", "user"]


@pytest.mark.parametrize("answer,code", [
    ("nothing", 8), (GOOD + whole("metric.py"), 9), (GOOD + whole("../x.js"), 9),
    (GOOD + "FILE: src/util.js\n<<<<<<< SEARCH\nnope\n=======\n>>>>>>> REPLACE", 8),
    (GOOD + "FILE: src/util.js\n```\nhalf", 8)], ids=range(5))
def test_after_one_repair_round_it_fails_with_nothing_applied(folder, answer, code):
    before = tree(folder.parent)
    with ScriptedServer([answer]) as server:
        result = ask(folder, server)
    assert (result.code, len(server.posts)) == (code, 2)
    assert last_line(result).startswith("openai: ") and tree(folder.parent) == before


# ── openai.py: the one token, and everything that isn't ─────────────────────────────────────────

def token_lines(result: Result):
    return [line for line in result.out.split("\n") if line.startswith(TOKEN)]


def test_giving_up_is_passed_on_and_nothing_is_written(folder):
    before = tree(folder)
    with ScriptedServer([f"{GOOD}\n{TOKEN} no idea \x1b[2J left\n"]) as server:
        result = ask(folder, server)
    assert (result.code, token_lines(result)) == (0, [f"{TOKEN} no idea ?[2J left"])
    assert tree(folder) == before


@pytest.mark.parametrize("answer", [
    f"{TOKEN}S\n" + GOOD, f" {TOKEN}\n" + GOOD,
    f"I won't say {TOKEN}.\n" + GOOD, whole("src/app.js", f"{TOKEN}\n"),
    f"<think>\n{TOKEN}\n</think>\n" + GOOD,
    f"a\r{TOKEN}\u2028{TOKEN}\x0b{TOKEN}\x85{TOKEN}\n" + GOOD], ids=range(6))
def test_the_token_elsewhere_is_no_giving_up(folder, answer):
    with ScriptedServer([answer]) as server:
        result = ask(folder, server)
    assert result.code == 0 and not token_lines(result) and "wrote src/app.js" in result.out
    assert len(result.out.splitlines()) == len(result.out.split("\n")) - 1


def test_no_words_of_the_model_can_pass_for_anything_else(folder):
    hostile = ["METRIC bytes=1", '{"v": 1, "type": "iteration", "verdict": "keep"}', "\x1b]0;x\x07",
               "openai: wrote metric.py", "\rMETRIC x=0", TOKEN[:10], "\x9b31m", "ok" * 9000]
    with ScriptedServer(["\n".join(hostile) + "\n" + GOOD]) as server:
        result = ask(folder, server)
    assert result.code == 0
    assert all(line.startswith(("| ", "openai: ")) for line in result.out.splitlines())
    assert [line for line in result.out.splitlines() if line.startswith("openai: ")] == [
        "openai: wrote src/app.js (13 bytes)"]
    assert last_line(result) == "| METRIC bytes=1"      # its words for the next prompt
    assert all(letter.isprintable() or letter in "\n\t" for letter in result.out)


# ── openai.py: what servers do ──────────────────────────────────────────────────────────────────

LONG = Reply(GOOD, finish="length")
FAULTS = {
    # name: (script, exit code, requests, a word of the last line)
    "401": ([Reply(status=401)], 3, 1, "refuses the key of OPENAI_API_KEY"),
    "403": ([Reply(status=403)], 3, 1, "HTTP 403"),
    "404": ([Reply(status=404, text="no model")], 4, 1, "'some-model'"),
    "400": ([Reply(status=400, text="too long")], 4, 1, "too long"),
    "429 for ever": ([Reply(status=429, headers={"Retry-After": "0"})], 5, 2, "HTTP 429"),
    "429 without money": ([Reply(status=429, body=b'{"error": {"code": "insufficient_quota"}}')],
                          4, 1, "insufficient_quota"),
    "529 for ever": ([Reply(status=529, headers={"Retry-After": "0"})], 5, 2, "HTTP 529"),
    "hangs up": ([Reply(status=0)], 5, 2, "cut"),
    "cut in the body": ([Reply(GOOD, cut_at=40)], 5, 2, "cut"),
    "cut without a length": ([Reply(body=b'{"choices": [{"mess')], 5, 2, "cut"),
    "no JSON": ([Reply(body=b"<html>Sign in</html>")], 6, 1, "<html>Sign in"),
    "no choices": ([Reply(body=b'{"choices": []}')], 6, 1, "no choice"),
    "a list": ([Reply(body=b"[1]")], 6, 1, "no choice"),
    "a number": ([Reply(body=b"7")], 6, 1, "no choice"),
    "deep nesting": ([Reply(body=b"[" * 100000)], 6, 1, "no JSON"),
    "error in a 200": ([Reply(body=b'{"error": {"message": "no credits"}}')], 6, 1, "no credits"),
    "null content": ([Reply(body=b'{"choices": [{"message": {"content": null}}]}')], 6, 1, "empty"),
    "refusal": ([Reply(body=b'{"choices": [{"message": {"refusal": "I can\'t"}}]}')], 6, 1,
                "I can't"),
    "content of another kind": ([Reply(body=b'{"choices": [{"message": {"content": 7}}]}')], 6, 1,
                                "empty"),
    "blank": ([" \n "], 6, 1, "empty"),
    "too long": ([LONG], 7, 1, "length"),
    "filtered": ([Reply(GOOD, finish="content_filter")], 7, 1, "filter"),
    "huge": ([Reply("x" * (9 << 20))], 6, 1, "larger than 8 MB"),
    "huge error": ([Reply(status=400, body=b"y" * (1 << 20))], 4, 1, "yyyyy..."),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_clear_line_and_an_exit_code(folder, name):
    script, code, requests, word = FAULTS[name]
    script = [Reply(reply) if isinstance(reply, str) else reply for reply in script]
    before = tree(folder)
    with ScriptedServer(script) as server:
        for reply in script:
            reply.headers.setdefault("Retry-After", "0")
        result = ask(folder, server, retries="1")
    assert result.code == code, result.out
    assert len(server.posts) == requests
    assert word in last_line(result) and len(last_line(result)) < 600
    assert tree(folder) == before


def test_content_in_parts_is_put_together(folder):
    parts = [{"type": "text", "text": part} for part in (GOOD[:9], GOOD[9:])]
    body = json.dumps({"choices": [{"message": {"content": parts}}]}).encode()
    with ScriptedServer([Reply(body=body)]) as server:
        assert ask(folder, server).code == 0
    assert (folder / "src/app.js").read_text() == "const a = 2;\n"


def test_it_tries_again_after_what_passes(folder):
    soon = email.utils.formatdate(time.time() + 2, usegmt=True)
    with ScriptedServer([Reply(status=503, headers={"Retry-After": "0.2"}),
                         Reply(status=429, headers={"Retry-After": soon}), GOOD]) as server:
        result = ask(folder, server)
    assert result.code == 0 and len(server.posts) == 3 and result.seconds > 0.6
    assert result.out.count("next try in") == 2


@pytest.mark.parametrize("header", ["999999", "Fri, 31 Dec 2999 23:59:59 GMT"])
def test_it_does_not_wait_beyond_its_time(folder, header):
    with ScriptedServer([Reply(status=429, headers={"Retry-After": header})]) as server:
        result = ask(folder, server, timeout="5")
    assert (result.code, len(server.posts)) == (5, 1) and result.seconds < 4


@pytest.mark.parametrize("reply", [Reply(GOOD, delay=30), Reply(GOOD, drip=0.1)])
def test_the_deadline_is_hard(folder, reply):
    before = tree(folder)
    with ScriptedServer([reply]) as server:
        result = ask(folder, server, timeout="1")
    assert result.code == 5 and result.seconds < 5 and "longer than 1 s" in last_line(result)
    assert tree(folder) == before


def test_a_silent_server_is_given_up_per_request(folder):
    with ScriptedServer([Reply(GOOD, delay=30), GOOD]) as server:
        assert ask(folder, server, request_timeout="0.5").code == 0


def test_nobody_there(folder):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        result = run("openai", folder, base_url=url, model="m", retries="0")
    assert result.code == 5 and "onnection refused" in last_line(result)


def test_it_never_takes_the_key_to_another_host(folder):
    before = tree(folder)
    with ScriptedServer([GOOD]) as other:
        for status in (301, 302, 303, 307, 308):
            moved = Reply(status=status, headers={"Location": other.url + "/chat/completions"})
            with ScriptedServer([moved]) as server:
                result = ask(folder, server)
            assert result.code == 4 and "redirects to" in last_line(result)
    assert other.requests == [] and tree(folder) == before


def test_parameters_that_a_server_does_not_know_are_left_out(folder):
    def picky(turn, request):
        for name in ("max_tokens", "temperature", "seed"):
            if name in request.body:
                return Reply(status=400, body=json.dumps({"error": {
                    "message": f"Unsupported parameter: '{name}'", "param": name}}).encode())
        return GOOD if request.body.get("max_completion_tokens") == 900 else "no"

    with ScriptedServer(picky) as server:
        result = ask(folder, server, max_tokens="900", temperature="1", SCALARLOOP_SEED="1")
    assert result.code == 0 and len(server.posts) == 4


# ── openai.py: key, options, network ────────────────────────────────────────────────────────────

@pytest.mark.parametrize("script", [
    [Reply(status=400, text=f"bad key {KEY}, yes {KEY}")], [Reply(status=401, text=KEY)],
    [Reply(status=500, text=f"Bearer {KEY}")],
    [f"Your key is {KEY}.\n" + whole("src/app.js", KEY + "\n")],
    [Reply(body=f"<p>{KEY}</p>".encode())],
    [Reply(body='{{"error": {{"message": "\\u0073k{}"}}}}'.format(KEY[2:]).encode())],
    [Reply(status=302, headers={"Location": f"http://x/?key={KEY}"})],
    [f"FILE: src/{KEY}.js\n<<<<<<< SEARCH\n{KEY}\n=======\n>>>>>>> REPLACE"]])
def test_the_key_is_never_shown_nor_written_even_when_the_server_echoes_it(folder, script):
    with ScriptedServer(script) as server:
        result = ask(folder, server, retries="0")
    assert KEY not in result.out and server.posts
    assert all(KEY.encode() not in data for data in tree(folder.parent).values())
    assert all(KEY not in contents(post) for post in server.posts)


def test_a_file_or_prompt_that_holds_the_key_does_not_carry_it_out(folder):
    (folder / "src/util.js").write_text(f"let key = '{KEY}';\n")
    with ScriptedServer([GOOD]) as server:
        result = run("openai", folder, f"Use {KEY}!", base_url=server.url, model="m",
                     api_key_env="OPENAI_API_KEY", OPENAI_API_KEY=KEY)
    assert result.code == 0 and KEY not in contents(server.posts[0])
    assert KEY in (folder / "src/util.js").read_text()


def test_an_odd_key_is_refused_without_being_shown(folder):
    for key in (f"{KEY}\nX-Evil: 1", f"{KEY} x", f"{KEY}é"):
        with ScriptedServer([GOOD]) as server:
            result = ask(folder, server, OPENAI_API_KEY=key)
        assert result.code == 2 and KEY not in result.out and server.requests == []


@pytest.mark.parametrize("name,value", [
    ("base_url", "ftp://127.0.0.1/v1"), ("base_url", "http://u:p@127.0.0.1/v1"),
    ("base_url", "http://127.0.0.1:99999/v1"), ("base_url", "http://a b/v1"), ("model", None),
    ("temperature", "hot"), ("temperature", "-1"), ("format", "json"), ("extra", "{"),
    ("extra", "[1]"), ("context", "1q"), ("timeout", "soon"), ("retries", "1e9"),
    ("ca_file", "/no/such/file"), ("OPENAI_API_KEY", None)])
def test_a_bad_option_is_named_before_anything_is_sent(folder, name, value):
    with ScriptedServer([GOOD]) as server:
        result = ask(folder, server, **{name: value})
    assert (result.code, server.requests) == (2, [])
    assert last_line(result).startswith(f"openai: {name}: ")


def test_options_of_other_adapters_and_slips_are_named(folder):
    with ScriptedServer([GOOD]) as server:
        result = ask(folder, server, temprature="1")
    assert result.code == 0 and "option temprature: is not one of" in result.out


def test_an_empty_prompt_is_refused(folder):
    with ScriptedServer([GOOD]) as server:
        assert run("openai", folder, " \n", base_url=server.url, model="m").code == 2


def test_a_proxy_is_used_but_never_for_loopback(folder):
    with ScriptedServer([GOOD]) as proxy, ScriptedServer([GOOD]) as server:
        assert ask(folder, server, http_proxy=proxy.root).code == 0
        assert proxy.requests == [] and len(server.posts) == 1
        far = "http://model.invalid/v1"
        assert ask(folder, server, base_url=far, http_proxy=proxy.root).code == 0
    assert proxy.posts[0].path == "http://model.invalid/v1/chat/completions"


def test_certificates(folder):
    pem = folder.parent / "loopback.pem"
    pem.write_text(LOOPBACK_PEM)
    with ScriptedServer([GOOD], certificate=str(pem)) as server:
        result = ask(folder, server)
        assert result.code == 5 and "ca_file" in last_line(result) and server.requests == []
        assert ask(folder, server, ca_file=str(pem)).code == 0
        beside = {"ca_file": pem.name, "SCALARLOOP_CONFIG_DIR": str(pem.parent)}
        assert ask(folder, server, **beside).code == 0
        assert ask(folder, server, SSL_CERT_FILE=str(pem)).code == 0
        assert ask(folder, server, REQUESTS_CA_BUNDLE=str(pem)).code == 0
        assert ask(folder, server, ca_file=str(folder / "src/app.js")).code == 2


def test_sigterm_ends_it_with_nothing_written(folder):
    before = tree(folder)
    with ScriptedServer([Reply(GOOD, delay=30)]) as server:
        process = start("openai", folder, base_url=server.url, model="m")
        wait_for(lambda: server.posts)
        process.terminate()
        process.communicate(timeout=10)
    assert process.returncode == 143 and tree(folder) == before


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("adapter", ["openai", "llamacpp", "claude"])
def test_help_is_the_docstring(folder, adapter):
    copy = shutil.copytree(ADAPTERS, folder.parent / "adapters",
                           ignore=shutil.ignore_patterns("__pycache__"))
    shown = subprocess.run([sys.executable, str(copy / f"{adapter}.py"), "--help"],
                           env=environment(folder), capture_output=True, text=True)
    assert shown.returncode == 0 and "Exit codes: " in shown.stdout
    assert not (copy / "__pycache__").exists()      # that folder may be the user's project


def test_a_package_that_is_named_openai_is_not_in_the_way(folder):
    (folder.parent / "site").mkdir()
    for name in ("openai", "shared"):
        (folder.parent / "site" / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    with ScriptedServer([GOOD]) as server:
        for safe_path in (None, "1"):
            result = run("llamacpp", folder, url=server.root, PYTHONSAFEPATH=safe_path,
                         PYTHONPATH=str(folder.parent / "site"))
            assert result.code == 0, result.out


# ── llamacpp.py ─────────────────────────────────────────────────────────────────────────────────

FAKE_LLAMA = '''#!{python}
import json, os, signal, sys, time
sys.path.insert(0, {tests!r})
from fake_servers import Reply, ScriptedServer
open({record!r}, "w").write(json.dumps([os.getpid(), sys.argv[1:]]))
mode = os.environ.get("OPENAI_MODE", "")
print("llama: loading the model", flush=True)
if mode == "broken":
    print("error: the model is broken", file=sys.stderr)
    sys.exit(3)
if mode == "slow":
    time.sleep(60)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def script(turn, request):
    open({record!r} + ".request", "w").write(json.dumps(request.body))
    if mode == "dies":
        print("ggml: out of memory, that is an error", flush=True)
        os._exit(9)
    return Reply({good!r}, delay=60 if mode == "hangs" else 0)
ScriptedServer(script, port=int(sys.argv[sys.argv.index("--port") + 1]))
time.sleep(60)
'''


@pytest.fixture
def llama(folder):
    """A fake llama-server on a PATH of its own, a model file, and what they record."""
    record = folder.parent / "llama.json"
    program = folder.parent / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(FAKE_LLAMA.format(python=sys.executable, tests=str(Path(__file__).parent),
                                         record=str(record), good=GOOD))
    program.chmod(0o755)
    (folder.parent / "some.gguf").write_bytes(b"GGUF")
    return {"model": str(folder.parent / "some.gguf"), "PATH": f"{program.parent}:/usr/bin:/bin"}


def recorded(folder: Path):
    return json.loads((folder.parent / "llama.json").read_text())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_it_starts_a_server_for_the_turn_and_stops_it(folder, llama):
    result = run("llamacpp", folder, ctx="4k", threads="2", gpu_layers="9", args="--mlock --prio 2",
                 **llama)
    assert result.code == 0 and (folder / "src/app.js").read_text() == "const a = 2;\n"
    pid, argv = recorded(folder)
    assert argv == ["--host", "127.0.0.1", "--port", argv[3], "-m", llama["model"], "-np", "1",
                    "-c", "4000", "--offline", "-t", "2", "-ngl", "9", "--mlock", "--prio", "2"]
    body = json.loads((folder.parent / "llama.json.request").read_text())
    assert '"src/app.js"' in body["grammar"] and body["max_tokens"] == 2000
    assert not is_alive(pid)


def test_the_model_is_found_beside_loop_ini(folder, llama):
    llama["model"] = "some.gguf"
    assert run("llamacpp", folder, SCALARLOOP_CONFIG_DIR=str(folder.parent), **llama).code == 0
    assert run("llamacpp", folder, **llama).code == 10


@pytest.mark.parametrize("more,code,word", [
    ({"OPENAI_MODE": "broken"}, 10, "the model is broken"),
    ({"OPENAI_MODE": "dies"}, 11, "out of memory"),
    ({"OPENAI_MODE": "slow", "start_timeout": "1"}, 10, "start_timeout"),
    ({"model": "/no/such.gguf"}, 10, "no file"), ({"model": None}, 10, "unset"),
    ({"port": "70000"}, 10, "port: 70000"), ({"port": "x"}, 2, "port"),
    ({"server": "/no/such/program"}, 10, "can't be run"), ({"grammar": "maybe"}, 2, "grammar"),
    ({"OPENAI_MODE": "hangs", "timeout": "1.5"}, 5, "longer than"),
    ({"PATH": "/nonexistent", "python": "/no/python"}, 10, "no llama-server on PATH")])
def test_what_goes_wrong_with_the_server_is_said(folder, llama, more, code, word):
    before = tree(folder)
    result = run("llamacpp", folder, **{**llama, **more})
    assert result.code == code and word in last_line(result), result.out
    assert tree(folder) == before
    if (folder.parent / "llama.json").exists():
        assert not is_alive(recorded(folder)[0])


def test_a_port_that_is_taken_is_said(folder, llama):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("llamacpp", folder, port=str(taken.getsockname()[1]), **llama)
    assert result.code == 10 and "port: " in last_line(result)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_does_not_outlive_the_adapter(folder, llama, number):
    if number == signal.SIGKILL and not sys.platform.startswith("linux"):
        pytest.skip("only Linux ends a child with its parent")
    process = start("llamacpp", folder, OPENAI_MODE="hangs", **llama)
    wait_for(lambda: (folder.parent / "llama.json.request").exists())
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    wait_for(lambda: not is_alive(recorded(folder)[0]))


def test_a_server_that_ignores_sigterm_is_killed(folder, llama):
    assert run("llamacpp", folder, OPENAI_MODE="stubborn", **llama).code == 0
    assert not is_alive(recorded(folder)[0])


def test_a_running_server_is_used_as_it_is(folder):
    with ScriptedServer([GOOD]) as server:
        assert run("llamacpp", folder, url=server.root + "/").code == 0
        assert run("llamacpp", folder, url=server.url, grammar="yes", OPENAI_API_KEY=KEY).code == 0
    assert [post.path for post in server.posts] == ["/v1/chat/completions"] * 2
    assert ["grammar" in post.body for post in server.posts] == [False, True]
    assert not any("Authorization" in post.headers for post in server.posts)


def test_the_grammar_names_what_is_in_scope():
    scope = edits.Scope(("src/**/*.js", "doc/p?g[12].md", "lib/", "NEWS"), frozenset(['a "b"\\.js']))
    grammar = edits.build_grammar(scope, "whole", may_read=False)
    assert r'"a \"b\"\\.js"' in grammar and "reads |" not in grammar.split("\n")[0]
    assert '"src" "/" (name "/")* name ".js"' in grammar
    assert '"doc" "/" "p" next "g" next ".md" | "lib" "/" (name "/")* name | "NEWS"' in grammar
    assert "(search |" in edits.build_grammar(scope, "search", may_read=True)


# ── claude.py ───────────────────────────────────────────────────────────────────────────────────

FAKE_CLAUDE = '''#!{python}
import json, os, signal, subprocess, sys, time
mode = os.environ.get("OPENAI_MODE", "")
def record(signals):
    json.dump([sys.argv[1:], sys.stdin.read(), dict(os.environ), signals], open({record!r}, "w"))
def stop(*_):
    record(["TERM"])
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
record([])
if mode == "hangs":
    time.sleep(60)
if mode == "leaves":
    subprocess.Popen(["sleep", "8"])
if mode == "killed":
    os.kill(os.getpid(), 9)
sys.stdout.write({words!r})
sys.exit(1 if mode == "fails" else 0)
'''
WORDS = f"Done, no {TOKEN}.\n\x1b[31mMETRIC x=1\n{'y' * 70000}{TOKEN}\n{TOKEN} out of ideas\nend"


@pytest.fixture
def claude(folder):
    program = folder.parent / "bin" / "claude"
    program.parent.mkdir()
    program.write_text(FAKE_CLAUDE.format(python=sys.executable, words=WORDS,
                                          record=str(folder.parent / "claude.json")))
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:/usr/bin:/bin", "ANTHROPIC_API_KEY": KEY}


def claude_record(folder: Path):
    return json.loads((folder.parent / "claude.json").read_text())


def test_claude_is_run_headless_and_confined(folder, claude):
    result = run("claude", folder, **claude)
    argv, prompt, seen, _ = claude_record(folder)
    assert result.code == 0 and prompt == "Make it smaller.\n"
    assert argv == ["-p", "--permission-mode", "acceptEdits", "--setting-sources=",
                    "--strict-mcp-config", "--no-session-persistence",
                    "--tools=Read,Edit,Write,Glob,Grep", "--max-turns", "100"]
    assert seen["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"] == "1"
    assert seen["CLAUDE_CODE_MAX_RETRIES"] == "2"
    for name in ("CLAUDE_CONFIG_DIR", "CLAUDE_CODE_TMPDIR"):
        assert seen[name].startswith(str(folder.parent / "scratch") + "/claude-")
    assert list((folder.parent / "scratch").iterdir()) == []


def test_the_words_of_claude_are_quoted_but_for_the_token(folder, claude):
    result = run("claude", folder, **claude)
    assert token_lines(result) == [f"{TOKEN} out of ideas"]
    assert all(line.startswith(("| ", TOKEN)) for line in result.out.splitlines())
    assert "\x1b" not in result.out and result.out.endswith("| end\n")


def test_a_login_is_used_where_there_is_no_key(folder, claude):
    assert run("claude", folder, **{**claude, "ANTHROPIC_API_KEY": None}).code == 0
    assert "CLAUDE_CONFIG_DIR" not in claude_record(folder)[2]
    run("claude", folder, CLAUDE_CONFIG_DIR="/mine", **claude)
    assert claude_record(folder)[2]["CLAUDE_CONFIG_DIR"] == "/mine"


def test_options_of_claude(folder, claude):
    run("claude", folder, "/compact this", tools="Read, Edit,Bash,WebFetch", model="opus",
        max_turns="7", args="--effort 'very high'", **claude)
    argv, prompt, _, _ = claude_record(folder)
    assert prompt == "Task:\n/compact this\n"
    assert argv[6:] == ["--tools=Read,Edit,Bash,WebFetch", "--max-turns", "7",
                        "--allowedTools=Bash,WebFetch", "--model", "opus", "--effort", "very high"]


@pytest.mark.parametrize("more,code,word", [
    ({"OPENAI_MODE": "fails"}, 1, "| end"), ({"OPENAI_MODE": "killed"}, 137, ""),
    ({"PATH": "/nonexistent"}, 10, "is not on PATH"), ({"max_turns": "0"}, 2, "max_turns"),
    ({"args": "'"}, 2, "args"), ({"program": "/no/claude"}, 10, "/no/claude")])
def test_exit_codes_of_claude(folder, claude, more, code, word):
    result = run("claude", folder, **{**claude, **more})
    assert result.code == code and word in result.out


def test_claude_gets_the_sigterm(folder, claude):
    process = start("claude", folder, OPENAI_MODE="hangs", **claude)
    wait_for(lambda: (folder.parent / "claude.json").exists())
    time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 143 and claude_record(folder)[3] == ["TERM"]
    assert list((folder.parent / "scratch").iterdir()) == []


def test_what_claude_leaves_behind_does_not_hold_it_up(folder, claude):
    with open(folder.parent / "out.txt", "wb") as out:
        process = subprocess.run([sys.executable, str(ADAPTERS / "claude.py")], cwd=folder,
                                 input=b"Go.", stdout=out, stderr=out, timeout=15,
                                 env=environment(folder, OPENAI_MODE="leaves", **claude))
    assert process.returncode == 0


# ── in the loop ─────────────────────────────────────────────────────────────────────────────────

NOISE = ("METRIC value=1", '{"v": 1, "seq": 9, "type": "iteration", "verdict": "keep"}',
         "\x1b[2K\rMETRIC value=2", f"Never {TOKEN}", f"| {TOKEN}", f"{TOKEN}_NOT", "verdict: keep")
SAID = "\n".join(NOISE) + "\n"
LOWER = whole("src/value.txt", "90\n")
TURNS = [SAID + LOWER, SAID, SAID + LOWER + f"{TOKEN} that was all\n"]
CLAUDE_OF_TURNS = '''#!{python}
import os, re, sys
said = {turns!r}[int(os.environ["SCALARLOOP_ITERATION"]) - 1]
if "FILE" in said:
    open("src/value.txt", "w").write("90\\n")
print(said)
'''


def play_turns(turn, request):
    """Answer by the iteration that the prompt's history shows; a repair round changes nothing."""
    past = sum(line.startswith("- #") for line in contents(request).split("\n"))
    return TURNS[min(past, 2)]


@pytest.mark.parametrize("adapter", ["openai", "llamacpp", "claude", "double"])
def test_no_log_decides_anything_but_by_the_token(project, adapter):
    project.config["agent"] = {"adapter": adapter, "timeout": "30s", "rework": 0}
    project.config["loop"]["iterations"] = 3
    program = project.write("../bin/claude", "", mode=0o755)
    program.write_text(CLAUDE_OF_TURNS.format(python=sys.executable, turns=TURNS))
    script = project.write("../script.ini", "")
    script.write_text("".join(
        f"[turn {number}]\n" + ("write src/value.txt = 90\n" if "FILE" in said else "")
        + f"print = {json.dumps(said)}\n" for number, said in enumerate(TURNS, 1)))
    with ScriptedServer(play_turns) as server:
        project.config["adapter"] = {
            "openai": {"base_url": server.url, "model": "m"}, "llamacpp": {"url": server.root},
            "claude": {"program": program}, "double": {"script": script}}[adapter]
        assert project.run().code == 0
    second = "no_change" if adapter in ("claude", "double") else "agent_failed"
    assert [row["verdict"] for row in project.iterations()] == ["keep", second, "give_up"]
    assert project.git("show", "scalarloop/t:src/value.txt") == "90"
    assert project.run("verify").code == 0
