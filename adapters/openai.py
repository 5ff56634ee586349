#!/usr/bin/env python3
"""Let any OpenAI-style server edit the files in scope; standard library only.

    prompt (stdin) + files in scope -> POST {base_url}/chat/completions -> edit blocks -> files

Works with OpenAI, vLLM, Ollama, LM Studio, llama-server and OpenRouter. For a try, in a folder:
  echo 'Make it shorter.' | SCALARLOOP_OPT_MODEL=some-model python3 adapters/openai.py

Options ([adapter] in loop.ini; handed in as SCALARLOOP_OPT_<KEY>):
  model            the model's name (needed)
  base_url         up to and with /v1 (OPENAI_BASE_URL, or else https://api.openai.com/v1)
  api_key_env      the variable that holds the key (OPENAI_API_KEY, unless base_url is given: then
                   no key is sent but by this option); name a variable also in [agent] env
  temperature      sampling temperature, times SCALARLOOP_TEMPERATURE (unset: the server's own)
  max_tokens       longest answer (unset: the server's own)
  format           edits to ask for: whole, search or diff (whole); all three are always understood
  context          bytes of files sent (100k); above it the model gets a list and may ask for files
  timeout          longest turn, hard (9m); keep it below [agent] timeout
  request_timeout  longest silence of the server (5m)
  retries          after 429, 5xx or a broken connection, Retry-After minded (3)
  ca_file          PEM file of the server's authority (SSL_CERT_FILE, REQUESTS_CA_BUNDLE, system)
  extra            JSON object merged into each request, such as {"top_p": 0.9}
Environment: SCALARLOOP_SCOPE and SCALARLOOP_FILES (JSON lists: the globs of what may change, the
files in scope; else every text file below the working directory), SCALARLOOP_SEED (sent as
`seed`), SCALARLOOP_TEMPERATURE (1, raised by an escape), SCALARLOOP_TURN (above 1: files made in
the turn before may be mended), SCALARLOOP_CONFIG_DIR (where `ca_file` is looked up), http_proxy,
https_proxy, no_proxy (a loopback server is never asked through a proxy).

Sends: the prompt and the names and texts of the files in scope, to base_url only: redirects are
not followed. The key goes into the Authorization header and nowhere else; a file that holds it is
not sent, and an echo of it is blotted out.
Writes: files in scope below the working directory, all of an answer's edits or none (shared.py).
Prints: the model's words behind "| ", so that only a true SCALAR_LOOP_GIVE_UP line starts a line.

Exit codes: 0 edits applied, or the model gave up · 1 a bug · 2 bad option or input · 3 key refused
(401, 403) · 4 request refused (404, other 4xx, a redirect) · 5 server not reached, overloaded or
too slow · 6 not an answer (no JSON, no choice, too large) · 7 answer cut short (length, filter) ·
8 no usable edit, also after one repair round · 9 edit outside the scope, likewise · 143 SIGTERM
"""
from __future__ import annotations

import email.utils
import http.client
import json
import os
import re
import signal
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Tuple

sys.dont_write_bytecode = True  # the adapters' folder may be the user's project
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from shared import (  # noqa: E402
    CUT_SHORT, FORMATS, GIVE_UP, KEY_REFUSED, NAMED, NO_ANSWER, NO_EDIT, REFUSED, RULES, SECRETS,
    UNREACHED, USAGE, AdapterError, EditError, Parser, Scope, clean_path, draft_changes, echo,
    note_unused, one_line, option, printable, read_prompt, read_scope, read_text, run_adapter, say,
    scrub, write_changes)

OPENAI_URL = "https://api.openai.com/v1"
LARGEST_ANSWER = 8 << 20        # bytes of one HTTP answer
LONGEST_WAIT = 60.0             # seconds that Retry-After may ask for
MOST_LISTED = 1000              # files named in a list that replaces their contents
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
OPTIONS = {"model", "base_url", "api_key_env", "temperature", "max_tokens", "format", "context",
           "timeout", "request_timeout", "retries", "ca_file", "extra"}
TIME = {"s": 1, "m": 60, "h": 3600}
BYTES = {"k": 1000, "m": 1000000}
WANTED = re.compile(r"[*\-`\s]*READ\s*:(.*\S)")

Messages = List[Dict[str, str]]


# ── options ─────────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Options:
    """Where to ask, for what, and how long; `parameters` are the request's own."""

    base_url: str
    key_env: str
    parameters: Dict[str, Any]
    format: str
    context: int
    timeout: float
    request_timeout: float
    retries: int
    ca_file: str


def read_options(model: str = "", base_url: str = "", max_tokens: str = "",
                 context: str = "100k") -> Options:
    """Return the options of the environment; the arguments stand in for those that are unset."""
    base_url = option("base_url", base_url)
    key_env = option("api_key_env", "" if base_url else "OPENAI_API_KEY")
    base_url = base_url or os.environ.get("OPENAI_BASE_URL", "") or OPENAI_URL
    needed = option("api_key_env") or base_url == OPENAI_URL
    if needed and not os.environ.get(key_env):
        raise AdapterError(USAGE, f"{key_env}: is not set (export it and name it in [agent] env, "
                           "or set [adapter] base_url to a server that needs no key)")
    if option("format", "whole") not in FORMATS:
        raise AdapterError(USAGE, f"format: {option('format')!r} (expected {', '.join(FORMATS)})")
    return Options(
        check_url(base_url), key_env, read_parameters(option("model", model), max_tokens),
        option("format", "whole"), int(number("context", context, BYTES)),
        number("timeout", "9m", TIME), number("request_timeout", "5m", TIME),
        int(number("retries", "3", {})), find_authorities(option("ca_file")))


def read_parameters(model: str, max_tokens: str) -> Dict[str, Any]:
    """Return what every request says besides its messages."""
    if not model:
        raise AdapterError(USAGE, "model: is missing (expected [adapter] model = NAME)")
    found: Dict[str, Any] = {"model": model, "stream": False}
    raised = float(os.environ.get("SCALARLOOP_TEMPERATURE") or 1)
    if option("temperature") or raised != 1:
        found["temperature"] = min(2.0, round(raised * number("temperature", "1", {}), 3))
    if option("max_tokens", max_tokens):
        found["max_tokens"] = int(number("max_tokens", max_tokens, BYTES))
    if os.environ.get("SCALARLOOP_SEED", "").isdigit():
        found["seed"] = int(os.environ["SCALARLOOP_SEED"])
    try:
        extra = json.loads(option("extra", "{}"))
    except (ValueError, RecursionError):
        extra = None
    if not isinstance(extra, dict):
        raise AdapterError(USAGE, 'extra: is no JSON object (expected such as {"top_p": 0.9})')
    return {**found, **extra}


def number(key: str, default: str, units: Dict[str, int]) -> float:
    """Return an option that is a number from 0 up, with a unit or without."""
    text = option(key, default)
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([a-z]?)", text)
    if not match or match[2] and match[2] not in units:
        raise AdapterError(USAGE, f"{key}: {text!r} can't be used (expected a number" + (
            f", or one with {', '.join(units)})" if units else ")"))
    return float(match[1]) * units.get(match[2], 1)


def check_url(url: str) -> str:
    """Return the URL without its last slash; refuse one that can't be asked, or shown, safely."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch("[!-~]+", url) or "@" in url:
        raise AdapterError(USAGE, "base_url: can't be used (expected http[s]://HOST[:PORT]/v1, "
                           "no user or password in it)")
    return url.rstrip("/")


def find_authorities(given: str) -> str:
    """Return the file of certificate authorities to trust; '' for the system's."""
    given = os.path.join(os.environ.get("SCALARLOOP_CONFIG_DIR", ""), os.path.expanduser(given))
    for name, path in (("ca_file", given if option("ca_file") else ""),
                       ("SSL_CERT_FILE", os.environ.get("SSL_CERT_FILE", "")),
                       ("REQUESTS_CA_BUNDLE", os.environ.get("REQUESTS_CA_BUNDLE", ""))):
        if path and not os.path.exists(path):
            raise AdapterError(USAGE, f"{name}: {path} is not there (expected PEM certificates)")
        if path:
            return path
    return ""


def read_key(name: str) -> str:
    """Return the key; from here on it is blotted out of everything that is shown or sent on."""
    key = os.environ.get(name, "").strip() if name else ""
    if len(key) >= 8:           # a shorter one is a dummy that may well be a word of the text
        SECRETS.append(key)
    if not re.fullmatch("[!-~]*", key):
        raise AdapterError(USAGE, f"{name}: is no key (blanks or control characters in it)")
    return key


# ── server ──────────────────────────────────────────────────────────────────────────────────────

class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hand over every answer as it is: no exception for a 4xx, no redirect followed."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


class Client:
    """Ask one server; `check_alive` may say why a broken connection can't mend."""

    def __init__(self, options: Options, check_alive: Callable[[], None] = lambda: None) -> None:
        self.options = options
        self.key = read_key(options.key_env)
        self.url = options.base_url + "/chat/completions"
        self.parameters = dict(options.parameters)
        self.check_alive = check_alive
        self.deadline = time.monotonic() + options.timeout
        self.opener = self.build_opener()

    def build_opener(self) -> urllib.request.OpenerDirector:
        parts = urllib.parse.urlsplit(self.url)
        handlers: List[Any] = [AnyStatus]
        if re.fullmatch(r"localhost|127\.[0-9.]+|::1", parts.hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))
        if parts.scheme == "https":
            import ssl
            try:
                context = ssl.create_default_context(cafile=self.options.ca_file or None)
            except (OSError, ssl.SSLError) as error:
                raise AdapterError(USAGE, f"ca_file: {self.options.ca_file} can't be used "
                                   f"({one_line(str(error))})") from None
            handlers.append(urllib.request.HTTPSHandler(context=context))
        return urllib.request.build_opener(*handlers)

    def ask(self, messages: Messages) -> str:
        """Return the model's answer; a parameter that the server doesn't know is left out."""
        while True:
            status, raw = self.post({**self.parameters, "messages": messages})
            name = self.unknown_parameter(raw) if status in (400, 422) else ""
            if not name:
                return self.read_answer(status, raw)
            say(f"the server doesn't take {name}: asking again without it")
            value = self.parameters.pop(name)
            if name == "max_tokens":
                self.parameters["max_completion_tokens"] = value

    def unknown_parameter(self, raw: bytes) -> str:
        """Return which of our own optional parameters an error complains of, or ''."""
        said = server_says(raw)
        return next((name for name in ("max_tokens", "temperature", "seed")
                     if name in self.parameters and re.search(rf"\b{name}\b", said)), "")

    def post(self, body: Dict[str, Any]) -> Tuple[int, bytes]:
        """Return status and body, after as many tries as are allowed and worth it."""
        data = json.dumps(body).encode()
        for attempt in range(self.options.retries + 1):
            wait = min(2.0 ** attempt, LONGEST_WAIT)
            try:
                status, headers, raw = self.exchange(data)
            except (OSError, http.client.HTTPException) as error:
                problem = self.explain(error)
            else:
                if status not in RETRIED or "insufficient_quota" in server_says(raw):
                    return status, raw
                problem = f"HTTP {status}: {server_says(raw)}"
                wait = retry_after(headers, wait)
            self.check_alive()
            if attempt == self.options.retries or time.monotonic() + wait > self.deadline:
                break
            say(f"{problem}; next try in {wait:.0f} s")
            time.sleep(wait)
        raise AdapterError(UNREACHED, f"{self.url}: no answer (tries: {attempt + 1}; {problem})")

    def exchange(self, data: bytes) -> Tuple[int, Mapping[str, str], bytes]:
        """Send one request; return status, headers and the whole body, or raise what broke it."""
        headers = {"Content-Type": "application/json", "Accept": "application/json",
                   "User-Agent": "scalarloop"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        patience = min(self.options.request_timeout, self.deadline - time.monotonic())
        request = urllib.request.Request(self.url, data, headers)
        with self.opener.open(request, timeout=max(patience, 0.1)) as reply:
            raw = reply.read(LARGEST_ANSWER + 1)
            if len(raw) > LARGEST_ANSWER:
                raise AdapterError(NO_ANSWER, f"{self.url}: the answer is larger than "
                                   f"{LARGEST_ANSWER >> 20} MB")
            if reply.length or raw[:1] == b"{" and not raw.rstrip().endswith(b"}"):
                raise http.client.IncompleteRead(b"")
            if 300 <= reply.status < 400:
                raise AdapterError(REFUSED, f"{self.url}: redirects to "
                                   f"{one_line(reply.headers.get('Location') or 'nowhere')} (not "
                                   "followed: set base_url to where the server is)")
            return reply.status, reply.headers, raw

    def explain(self, error: Exception) -> str:
        """Return a broken connection in words; a certificate that fails isn't worth a retry."""
        reason = getattr(error, "reason", error)
        if "CERTIFICATE_VERIFY_FAILED" in str(reason):
            raise AdapterError(UNREACHED, f"{self.url}: its certificate is not trusted (set "
                               "[adapter] ca_file to a PEM file of its authority)")
        if isinstance(reason, (http.client.IncompleteRead, http.client.RemoteDisconnected)):
            return "the connection was cut"
        if isinstance(reason, TimeoutError) or "timed out" in str(reason):
            return "timed out"
        return one_line(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__)

    def read_answer(self, status: int, raw: bytes) -> str:
        """Return the text of a 200, or raise what the status means."""
        said = server_says(raw)
        if status in (401, 403):
            key = f"the key of {self.options.key_env}" if self.key else "us without a key"
            raise AdapterError(KEY_REFUSED, f"{self.url}: refuses {key} (HTTP {status}; set "
                               "[adapter] api_key_env to the variable of a valid key)")
        if status == 404:
            raise AdapterError(REFUSED, f"{self.url}: no such address, or no model "
                               f"{self.parameters['model']!r} (HTTP 404: {said})")
        if status != 200:
            raise AdapterError(REFUSED, f"{self.url}: refuses the request (HTTP {status}: {said})")
        try:
            reply = json.loads(raw)
        except (ValueError, RecursionError):
            raise AdapterError(NO_ANSWER, f"{self.url}: answers no JSON: "
                               f"{one_line(raw[:400].decode('utf-8', 'replace'), 100)}") from None
        try:
            choice = reply["choices"][0]
            return answer_text(choice.get("finish_reason"), choice["message"])
        except (LookupError, TypeError, AttributeError):
            raise AdapterError(NO_ANSWER, f"{self.url}: no choice in the answer: {said}") from None


def answer_text(finish: Any, message: Dict[str, Any]) -> str:
    """Return a message's text if it is one, and whole."""
    if finish in ("length", "content_filter"):
        raise AdapterError(CUT_SHORT, f"the answer was cut short (finish_reason {finish}; " + (
            "raise max_tokens, or set format = search)" if finish == "length" else
            "the server's filter stopped it)"))
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str) or not content.strip():
        raise AdapterError(NO_ANSWER, "the answer is empty: "
                           f"{one_line(str(message.get('refusal') or 'no content'))}")
    return scrub(content)


def server_says(raw: bytes) -> str:
    """Return a server's own words on an error, as one line."""
    text = raw[:LARGEST_ANSWER].decode("utf-8", "replace")
    try:
        reply = json.loads(text)
        error = reply.get("error", reply)
        text = error if isinstance(error, str) else " ".join(
            str(error[key]) for key in ("message", "detail", "param", "code") if error.get(key))
    except (ValueError, RecursionError, AttributeError, TypeError):
        pass
    return one_line(text or "no reason given")


def retry_after(headers: Mapping[str, str], default: float) -> float:
    """Return the seconds that a server asks to wait (a number or a date), within reason."""
    text = (headers.get("Retry-After") or "").strip()
    try:
        seconds = float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else \
            email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError, IndexError, OverflowError):
        seconds = default
    return min(max(seconds, 0.0), LONGEST_WAIT)


# ── turn ────────────────────────────────────────────────────────────────────────────────────────

def take_turn(prompt: str, options: Options, scope: Scope, client: Client) -> int:
    """Ask, let the model see files if they are many, apply its edits; one repair round."""
    texts = {path: text for path in sorted(scope.files) for text in [read_text(path)]
             if text is not None}
    fits = sum(len(text.encode()) for text in texts.values()) <= options.context
    how = "# How to answer\n\n" + FORMATS[options.format] + RULES
    shown = show_files(texts) if fits else list_files(texts, options.context)
    messages = [{"role": "user", "content": scrub(f"{prompt}\n\n{shown}" + (how if fits else ""))}]
    answer = ask(client, messages)
    wanted = [] if fits else choose_files(answer, texts, options.context)
    if wanted:
        messages.append({"role": "user", "content": scrub(
            show_files({path: texts[path] for path in wanted}) + how)})
        answer = ask(client, messages)
    try:
        return apply(answer, scope)
    except EditError as error:
        say(f"{error}; asking once more")
        messages.append({"role": "user", "content":
                         f"Nothing was applied: {error}.\nGive the whole answer again.\n\n{how}"})
    return apply(ask(client, messages), scope)


def ask(client: Client, messages: Messages) -> str:
    """Ask and add the answer to the conversation."""
    answer = client.ask(messages)
    echo(answer)
    messages.append({"role": "assistant", "content": answer})
    return answer


def show_files(texts: Dict[str, str]) -> str:
    """Return the files as the answer is to give them: path, then content in a fence."""
    blocks = ["# The files in scope\n"]
    for path, text in texts.items():
        fence = "`" * max([3] + [len(run) + 1 for run in re.findall("`{3,}", text)])
        end = "" if text.endswith("\n") or not text else "\n"
        blocks.append(f"FILE: {path}\n{fence}\n{text}{end}{fence}\n")
    return "\n".join(blocks) + "\n"


def list_files(texts: Dict[str, str], most: int) -> str:
    names = [f"- {path} ({len(text.encode())} bytes)" for path, text in texts.items()]
    more = f"\n- and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ("# The files in scope\n\n" + "\n".join(names[:MOST_LISTED]) + more + "\n\nThey are too "
            f"large to be shown at once. Answer with one line `READ: path` for each file that you "
            f"need to see, at most {most} bytes in all, and nothing else. Then you will be asked "
            "for the edits.\n")


def choose_files(answer: str, texts: Dict[str, str], most: int) -> List[str]:
    """Return the files that a model asks for, in its order, as far as they fit."""
    chosen: List[str] = []
    for path in (clean_path(match[1]) for match in map(WANTED.match, answer.split("\n")) if match):
        size = len(texts.get(path, "").encode())
        if path in texts and path not in chosen and size <= most:
            chosen.append(path)
            most -= size
    return chosen


def apply(answer: str, scope: Scope) -> int:
    """Write all of an answer's edits, or pass on that the model gave up."""
    parser = Parser(answer, scope).parse()
    for line in parser.prose:
        if GIVE_UP.match(line):
            print(printable(line)[:1000], flush=True)
            return 0
    if not parser.edits:
        raise EditError(NO_EDIT, "no edit block is in the answer")
    changes = draft_changes(parser.edits, scope)
    signal.setitimer(signal.ITIMER_REAL, 0)     # from here on nothing waits
    write_changes(changes)
    for path, data in changes.items():
        say(f"wrote {path} ({len(data)} bytes)" if data is not None else f"deleted {path}")
    if not changes:
        say("the edits change nothing")
    note = next((line for line in parser.prose if line.strip() and not NAMED.match(line)), "")
    echo(one_line(note, 160))   # the last line is what the next prompt may quote of this turn
    return 0


# ── command line ────────────────────────────────────────────────────────────────────────────────

def set_alarm(seconds: float) -> None:
    """End the turn by an exception when its time is up, whatever it is waiting for."""
    def ring(*_: Any) -> NoReturn:
        raise AdapterError(UNREACHED, f"the turn took longer than {seconds:.0f} s (timeout)")
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 1.0)


def main() -> int:
    note_unused(OPTIONS)
    options = read_options()
    set_alarm(options.timeout)
    return take_turn(read_prompt(), options, read_scope(), Client(options))


if __name__ == "__main__":
    run_adapter(main, __doc__)
