"""Scripted model servers on loopback: OpenAI's chat and responses APIs, Anthropic's messages API.

    with ScriptedServer(["first answer", Reply(status=429), "second"]) as server:
        ... server.url ... server.requests

A script is a list of replies, played in order (the last one again and again), or a function
`(turn, request) -> reply`, where `turn` counts the assistant turns that the conversation holds
already. A reply is a text, or a `Reply` that says what else to do to the client. Every request is
kept. Nothing here listens anywhere but on 127.0.0.1.
"""
from __future__ import annotations

import json
import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

# A self-signed certificate for 127.0.0.1 and its key, made for these tests; it guards nothing.
LOOPBACK_PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLZ0Rd7B3Bl6anX4U
cONDZFYx1SrTtpXCLp/oZq6i5+qhRANCAAQCGy3zfrKAZiDRSYMMxJuCTBibM78d
jY4GNUbNXk9kycy6br+/NVZP+b0+FFMNvsJwU6DCbV8fkmic/Ms93REU
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBaDCCAQ2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAkxMjcuMC4w
LjEwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CTEyNy4wLjAuMTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABAIbLfN+soBmINFJ
gwzEm4JMGJszvx2NjgY1Rs1eT2TJzLpuv781Vk/5vT4UUw2+wnBToMJtXx+SaJz8
yz3dERSjTjBMMBoGA1UdEQQTMBGHBH8AAAGCCWxvY2FsaG9zdDAPBgNVHRMBAf8E
BTADAQH/MB0GA1UdDgQWBBR523OVvBhglbdThof2sr4Pgop5JTAKBggqhkjOPQQD
AgNJADBGAiEAnTNAz6IjDz37xqPxhLIOfKUiH5C78FxN8zhHvTP/gLICIQDIfILW
SsJT4O2vhJnuNXgFV9G2M7biNwbaIhKpgU0Zmg==
-----END CERTIFICATE-----
"""


@dataclass
class Tool:
    """One tool call of the model."""

    name: str
    arguments: Dict[str, Any]


@dataclass
class Reply:
    """What the server does with one request."""

    text: str = ""
    tools: Sequence[Tool] = ()
    finish: str = ""                    # finish_reason, instead of the natural one
    status: int = 200                   # 0: hang up without a word
    headers: Dict[str, str] = field(default_factory=dict)
    body: Optional[bytes] = None        # sent as it is
    delay: float = 0.0                  # seconds before anything is sent
    drip: float = 0.0                   # seconds between single bytes of the body
    cut_at: Optional[int] = None        # close the connection after so many bytes of the body


@dataclass
class Request:
    method: str
    path: str
    headers: Dict[str, str]
    body: Any
    raw: bytes


Script = Union[Sequence[Union[str, Reply]], Callable[[int, Request], Union[str, Reply]]]


class ScriptedServer:
    """A server in a thread of the test; `close` ends it, and so does the `with` block."""

    def __init__(self, script: Script, port: int = 0, certificate: str = "") -> None:
        self.script = script
        self.requests: List[Request] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True,
                                                     do_handshake_on_connect=False)
        self.port = self.server.server_address[1]
        self.root = f"http{'s' if certificate else ''}://127.0.0.1:{self.port}"
        self.url = self.root + "/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def posts(self) -> List[Request]:
        return [request for request in self.requests if request.method == "POST"]

    def reply_to(self, turn: int, request: Request) -> Reply:
        with self.lock:
            if callable(self.script):
                reply = self.script(turn, request)
            else:
                played = len([r for r in self.requests if r.method == "POST"]) - 1
                reply = self.script[min(played, len(self.script) - 1)]
        return Reply(reply) if isinstance(reply, str) else reply


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ScriptedServer

    def log_message(self, *_: Any) -> None:
        pass

    def keep_request(self) -> Request:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        request = Request(self.command, self.path, dict(self.headers), body, raw)
        with self.owner.lock:
            self.owner.requests.append(request)
        return request

    def do_HEAD(self) -> None:
        self.keep_request()
        self.send(200, b"")

    def do_GET(self) -> None:
        self.keep_request()
        model = {"id": "scripted", "type": "model", "object": "model", "display_name": "scripted",
                 "created": 1, "created_at": "2025-01-01T00:00:00Z", "owned_by": "tests"}
        self.send(200, json.dumps({"object": "list", "data": [model], "models": [],
                                   "has_more": False}).encode())

    def do_POST(self) -> None:
        request = self.keep_request()
        path = request.path.split("?")[0]
        if path.endswith("/count_tokens"):
            return self.send(200, b'{"input_tokens": 10}')
        dialect = next((dialect for end, dialect in DIALECTS.items() if path.endswith(end)), None)
        if dialect is None:
            return self.send(404, b'{"error": {"message": "no such address"}}')
        reply = self.owner.reply_to(dialect.turns(request.body or {}), request)
        self.owner.closing.wait(reply.delay)
        if reply.body is not None or reply.status != 200:
            body = reply.body
            if body is None:
                body = json.dumps({"type": "error", "error": {
                    "type": "api_error", "message": reply.text or "scripted failure"}}).encode()
            return self.send(reply.status, body, reply)
        streamed = bool((request.body or {}).get("stream"))
        self.send(200, dialect.render(reply, request.body, streamed).encode(), reply,
                  "text/event-stream" if streamed else "application/json")

    def send(self, status: int, body: bytes, reply: Optional[Reply] = None,
             kind: str = "application/json") -> None:
        reply = reply or Reply()
        try:
            if status == 0:
                raise OSError("hang up without a word")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if reply.cut_at is not None:
                body, self.close_connection = body[:reply.cut_at], True
            if not reply.drip:
                self.wfile.write(body)
            for at in range(len(body) if reply.drip else 0):
                self.wfile.write(body[at:at + 1])
                self.wfile.flush()
                if self.owner.closing.wait(reply.drip):
                    return
        except OSError:
            self.close_connection = True    # the client has gone


# ── the three dialects ──────────────────────────────────────────────────────────────────────────

def _events(events: Sequence[Tuple[str, Dict[str, Any]]]) -> str:
    return "".join(f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"
                   for name, data in events)


class Chat:
    """OpenAI's /chat/completions, not streamed (that is all that the adapters ask for)."""

    @staticmethod
    def turns(body: Dict[str, Any]) -> int:
        return sum(message.get("role") == "assistant" for message in body.get("messages", []))

    @staticmethod
    def render(reply: Reply, body: Dict[str, Any], streamed: bool) -> str:
        choice = {"index": 0, "message": {"role": "assistant", "content": reply.text},
                  "finish_reason": reply.finish or "stop"}
        return json.dumps({"id": "chat-1", "object": "chat.completion", "model": body.get("model"),
                           "created": 1, "choices": [choice],
                           "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


class Anthropic:
    """Anthropic's /v1/messages, streamed or not."""

    @staticmethod
    def turns(body: Dict[str, Any]) -> int:
        return sum(message.get("role") == "assistant" for message in body.get("messages", []))

    @staticmethod
    def render(reply: Reply, body: Dict[str, Any], streamed: bool) -> str:
        turn = Anthropic.turns(body)
        blocks: List[Dict[str, Any]] = [{"type": "text", "text": reply.text}] if reply.text else []
        blocks += [{"type": "tool_use", "id": f"toolu_{turn}_{number}", "name": tool.name,
                    "input": tool.arguments} for number, tool in enumerate(reply.tools)]
        stop = reply.finish or ("tool_use" if reply.tools else "end_turn")
        message = {"id": f"msg_{turn}", "type": "message", "role": "assistant",
                   "model": body.get("model"), "content": blocks, "stop_reason": stop,
                   "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
        if not streamed:
            return json.dumps(message)
        events: List[Tuple[str, Dict[str, Any]]] = [
            ("message_start", {"message": {**message, "content": [], "stop_reason": None}})]
        for index, block in enumerate(blocks):
            if block["type"] == "text":
                empty, delta = {"text": ""}, {"type": "text_delta", "text": block["text"]}
            else:
                empty, delta = {"input": {}}, {"type": "input_json_delta",
                                               "partial_json": json.dumps(block["input"])}
            start = {"index": index, "content_block": {**block, **empty}}
            events += [("content_block_start", start),
                       ("content_block_delta", {"index": index, "delta": delta}),
                       ("content_block_stop", {"index": index})]
        events += [("message_delta", {"delta": {"stop_reason": stop, "stop_sequence": None},
                                      "usage": {"output_tokens": 1}}), ("message_stop", {})]
        return _events(events)


class Responses:
    """OpenAI's /v1/responses, streamed or not."""

    @staticmethod
    def turns(body: Dict[str, Any]) -> int:
        """Count runs of the model's own items: a call and its message are one turn."""
        turns, own = 0, False
        items = body.get("input")
        for item in items if isinstance(items, list) else []:
            mine = item.get("role") == "assistant" or str(item.get("type")).endswith("_call")
            turns += mine and not own
            own = mine
        return turns

    @staticmethod
    def render(reply: Reply, body: Dict[str, Any], streamed: bool) -> str:
        turn = Responses.turns(body)
        items: List[Dict[str, Any]] = []
        if reply.text:
            items.append({"type": "message", "id": f"msg_{turn}", "role": "assistant",
                          "status": "completed", "content": [
                              {"type": "output_text", "text": reply.text, "annotations": []}]})
        for number, tool in enumerate(reply.tools):
            items.append({"type": "function_call", "id": f"fc_{turn}_{number}",
                          "call_id": f"call_{turn}_{number}", "name": tool.name,
                          "arguments": json.dumps(tool.arguments), "status": "completed"})
        response = {"id": f"resp_{turn}", "object": "response", "created_at": 1,
                    "status": "completed", "model": body.get("model"), "output": items,
                    "usage": {"input_tokens": 1, "input_tokens_details": {"cached_tokens": 0},
                              "output_tokens": 1, "total_tokens": 2,
                              "output_tokens_details": {"reasoning_tokens": 0}}}
        if not streamed:
            return json.dumps(response)
        started = {**response, "status": "in_progress", "output": [], "usage": None}
        events: List[Tuple[str, Dict[str, Any]]] = [("response.created", {"response": started})]
        for index, item in enumerate(items):
            events += [("response.output_item.added", {"output_index": index, "item": item}),
                       ("response.output_item.done", {"output_index": index, "item": item})]
        events.append(("response.completed", {"response": response}))
        return _events(events)


DIALECTS: Dict[str, Any] = {"/chat/completions": Chat, "/messages": Anthropic,
                            "/responses": Responses}
