"""Write a toy model that any llama.cpp engine runs and that answers exactly what a test wants.

    write_toy(path, [Answer("FILE: a.txt ..."), Answer("second try", turn=1)])

The file is a real GGUF: a llama of one layer whose attention and feed-forward outputs are zero, so
that the state after a token is the token's own embedding. Embeddings are one-hot, and the output
matrix is a table of which token follows which: the pieces of an answer form a chain that ends in
the end-of-turn token. The chat template looks at the conversation, chooses an answer and ends the
prompt with that answer's own control token, which starts the chain. It shows the engine the head
of each message only, so that a prompt stays small whatever a client sends.

No weights come from anywhere, and none are needed: a real engine, tokenizer, template, sampler,
grammar and HTTP server play a script.
"""
from __future__ import annotations

import array
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Set, Tuple

UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5
ALIGNMENT = 32
PIECE = 9               # characters of an answer in one token, or more where it must be unique
CERTAIN = 80.0          # logit of the one token that follows
SHOWN = 300             # characters of a message that the engine gets to see


@dataclass(frozen=True)
class Answer:
    """A text or tool call, said when the conversation holds `when` and `turn` earlier answers."""

    text: str = ""
    tool: str = ""
    arguments: Any = None
    turn: int = 0
    when: str = ""

    def spoken(self) -> str:
        if not self.tool:
            return self.text
        call = json.dumps({"name": self.tool, "arguments": self.arguments})
        return f"{self.text}\n<tool_call>\n{call}\n</tool_call>".lstrip("\n")


def write_toy(path: Path, answers: Sequence[Answer], context: int = 16384) -> Path:
    """Write the model; the first answer whose conditions hold is given, else the last one."""
    vocabulary, follows = _build_vocabulary(answers)
    tokens = [token for token, _ in vocabulary]
    width = max(64, -(-len(tokens) // 64) * 64)
    end = tokens.index("<|im_end|>")
    facts: List[Tuple[str, int, Any]] = [
        ("general.architecture", STRING, "llama"), ("general.name", STRING, "toy"),
        ("llama.context_length", UINT32, context), ("llama.embedding_length", UINT32, width),
        ("llama.block_count", UINT32, 1), ("llama.feed_forward_length", UINT32, 64),
        ("llama.attention.head_count", UINT32, width // 64),
        ("llama.attention.head_count_kv", UINT32, width // 64),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        ("llama.rope.dimension_count", UINT32, 64), ("llama.vocab_size", UINT32, len(tokens)),
        ("tokenizer.ggml.model", STRING, "gpt2"), ("tokenizer.ggml.pre", STRING, "gpt-2"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, (INT32, [kind for _, kind in vocabulary])),
        ("tokenizer.ggml.merges", ARRAY, (STRING, ["q q"])),
        ("tokenizer.ggml.bos_token_id", UINT32, end), ("tokenizer.ggml.eos_token_id", UINT32, end),
        ("tokenizer.ggml.add_bos_token", BOOL, False),
        ("tokenizer.chat_template", STRING, _template(answers))]
    path.write_bytes(_pack(facts, _tensors(width, len(tokens), follows, end)))
    return path


# ── vocabulary ──────────────────────────────────────────────────────────────────────────────────

def _byte_letters() -> Dict[int, str]:
    """Return the letter by which byte-level BPE vocabularies write each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(plain)))
    return letters


LETTERS = _byte_letters()


def _written(text: str) -> str:
    return "".join(LETTERS[byte] for byte in text.encode())


def _pieces(text: str, taken: Set[str]) -> List[str]:
    """Cut a text into pieces that are in no vocabulary yet: each must stand for its place alone."""
    pieces: List[str] = []
    start = 0
    while start < len(text):
        end = start + PIECE
        while end < len(text) and _written(text[start:end]) in taken:
            end += 1
        piece = text[start:end]
        while _written(piece) in taken and pieces:
            taken.discard(_written(pieces[-1]))
            piece = pieces.pop() + piece
        pieces.append(piece)
        taken.add(_written(piece))
        start = end
    return pieces


def _build_vocabulary(answers: Sequence[Answer]) -> Tuple[List[Tuple[str, int]], Dict[int, int]]:
    """Return the tokens with their kinds (1 text, 3 control), and which one follows which."""
    vocabulary = [(LETTERS[byte], 1) for byte in range(256)]
    vocabulary += [("qq", 1), ("<|im_start|>", 3), ("<|im_end|>", 3)]
    end = len(vocabulary) - 1
    taken = {token for token, _ in vocabulary}
    follows: Dict[int, int] = {}
    for number, answer in enumerate(answers):
        chain = [(f"<|answer_{number}|>", 3)]
        chain += [(_written(piece), 1) for piece in _pieces(answer.spoken(), taken)]
        first = len(vocabulary)
        vocabulary += chain
        for place in range(first, len(vocabulary)):
            follows[place] = place + 1 if place + 1 < len(vocabulary) else end
    return vocabulary, follows


# ── chat template ───────────────────────────────────────────────────────────────────────────────

TEMPLATE = """
{%- set ns = namespace(turns=0, text='', pick='') %}
{%- if tools %}{{- '<|im_start|>system\\n<tools>\\n' }}{%- for tool in tools %}{{- tool.function.name + '\\n' }}{%- endfor %}{{- '</tools>\\nFor each call give <tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- set said = message.content | string if message.content else '' %}
{%- set ns.text = ns.text + said %}
{%- if message.role == 'assistant' %}
{%- set ns.turns = ns.turns + 1 %}
{{- '<|im_start|>assistant\\n' + said[:SHOWN] }}
{%- if message.tool_calls %}{%- for call in message.tool_calls %}{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + said[:SHOWN] + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + said[:SHOWN] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
CHOICES
{{- '<|im_start|>assistant\\n<|answer_' + ns.pick + '|>' }}
{%- endif %}"""


def _template(answers: Sequence[Answer]) -> str:
    """Return the Jinja template, which chooses the answer by the conversation."""
    lines = []
    for number, answer in enumerate(answers):
        word = "if" if number == 0 else "elif"
        holds = f"ns.turns == {answer.turn}"
        if answer.when:
            holds += f" and {json.dumps(answer.when)} in ns.text"
        lines.append(f"{{%- {word} {holds} %}}{{%- set ns.pick = '{number}' %}}")
    lines.append(f"{{%- else %}}{{%- set ns.pick = '{len(answers) - 1}' %}}{{%- endif %}}")
    return TEMPLATE.strip().replace("CHOICES", "\n".join(lines)).replace("SHOWN", str(SHOWN))


# ── weights and container ───────────────────────────────────────────────────────────────────────

def _tensors(width: int, tokens: int, follows: Dict[int, int],
             end: int) -> List[Tuple[str, Tuple[int, ...], bytes]]:
    def zeros(count: int) -> array.array:
        return array.array("f", bytes(4 * count))

    embeddings, output = zeros(width * tokens), zeros(width * tokens)
    for token in range(tokens):
        embeddings[token * width + token] = 1.0
        output[follows.get(token, end) * width + token] = CERTAIN / width ** 0.5
    ones = array.array("f", [1.0] * width)
    named: List[Tuple[str, Tuple[int, ...], array.array]] = [
        ("token_embd.weight", (width, tokens), embeddings), ("output_norm.weight", (width,), ones),
        ("output.weight", (width, tokens), output), ("blk.0.attn_norm.weight", (width,), ones),
        ("blk.0.ffn_norm.weight", (width,), ones),
        ("blk.0.ffn_gate.weight", (width, 64), zeros(width * 64)),
        ("blk.0.ffn_up.weight", (width, 64), zeros(width * 64)),
        ("blk.0.ffn_down.weight", (64, width), zeros(width * 64))]
    named += [(f"blk.0.attn_{part}.weight", (width, width), zeros(width * width))
              for part in ("q", "k", "v", "output")]
    return [(name, shape, data.tobytes()) for name, shape, data in named]


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(
            _value(inner, item) for item in items)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def _pack(facts: Sequence[Tuple[str, int, Any]],
          tensors: Sequence[Tuple[str, Tuple[int, ...], bytes]]) -> bytes:
    """Return the GGUF container (version 3, little-endian, all tensors F32)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    head += b"".join(_string(name) + struct.pack("<I", kind) + _value(kind, value)
                     for name, kind, value in facts)
    body = b""
    for name, shape, data in tensors:
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *shape, 0, len(body))
        body += data + bytes(-len(data) % ALIGNMENT)
    return head + bytes(-len(head) % ALIGNMENT) + body
