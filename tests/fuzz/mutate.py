"""Documents a little wrong: mutations that know the structure, so that they get past the first check. Pure.

Every function takes a right document and a source of chance: in a test hypothesis', in `make fuzz` libFuzzer's.
"""

from __future__ import annotations

import base64
import json
import random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 1e308, 5e-324, 0.5, float("nan"),
    float("inf"), "", "a", "a" * 64, "A" * 64, "\0", "\x1b[31m", "\ud800", "\u202e", "é" * 40, "../x", [], [[]], [0],
    [0, 0], [8, 4], {}, {"": ""}, {"a": None}, "F32", "BF16", "__metadata__",
)  # fmt: skip
ODD_TOKENS = (
    b"\0", b"\n", b"\r\n", b'"', b"'", b'"""', b"\\", b"\\u0000", b"\\ud800", b"{", b"}", b"[", b"]", b"[[", b",", b":",
    b"=", b".", b"#", b"1e999", b"-0", b"NaN", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"a." * 300, b"\xff", b"\xc3",
    b"\xef\xbb\xbf", b"1979-05-27T07:32:00Z", b"0x1f", b"nan", b"true", b"-----BEGIN SSH SIGNATURE-----\n",
)  # fmt: skip
ODD_TOML = (
    "1", "-1", "0", "1.5", "inf", "nan", "true", '""', '"a"', '"\\u001b[31m"', '"{sender}"', '"../.."', "[]", "[[]]",
    "{}", "1979-05-27", '["a", "b"]', '"ssh-ed25519 AAAA"', "9223372036854775808", '"' + "a" * 300 + '"',
)  # fmt: skip


def bytes_of(data: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, put in, left out, repeated or moved."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(out))
        end = min(len(out), at + rng.choice((1, 1, 2, 8, 64)))
        match rng.randint(0, 4):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randint(0, 7)
            case 1:
                out[at:at] = rng.choice(ODD_TOKENS)
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[at:end]
            case _ if at < len(out):
                out[at] = rng.choice((0, 0x20, 0x7F, 0x80, 0xFF))
    return bytes(out)


def json_line(line: bytes, rng: random.Random) -> bytes:
    """Other values, keys too many or too few, in one signed JSON line that stays canonical most of the time."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return bytes_of(line, rng)
    for _ in range(rng.randint(1, 2)):
        value = _other(value, rng)
    text = json.dumps(value, sort_keys=rng.random() < 0.9, separators=(",", ":")).encode() + b"\n"
    return text if rng.random() < 0.8 else bytes_of(text, rng)


def header(document: bytes, rng: random.Random) -> bytes:
    """A safetensors header with other entries; its length field is right most of the time."""
    try:
        value = json.loads(document[8:])
    except (ValueError, RecursionError):
        return bytes_of(document, rng)
    text = json.dumps(_other(value, rng), separators=(",", ":")).encode()
    text = bytes_of(text, rng) if rng.random() < 0.3 else text
    text += b" " * (-len(text) % 8 if rng.random() < 0.8 else rng.randint(0, 9))
    whole = len(text).to_bytes(8, "little") + text
    return whole if rng.random() < 0.9 else bytes_of(whole, rng)


def toml(document: bytes, rng: random.Random) -> bytes:
    """Lines with other values, twice, moved, renamed or gone."""
    lines = document.decode("utf-8", "replace").split("\n")
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(lines) - 1)
        key, equals, _ = lines[at].partition("=")
        match rng.randint(0, 5):
            case 0 | 1 if equals:
                lines[at] = f"{key}= {rng.choice(ODD_TOML)}"
            case 2:
                lines.insert(rng.randint(0, len(lines)), lines[at])
            case 3 if len(lines) > 1:
                del lines[at]
            case 4:
                lines.insert(
                    at, rng.choice(("[a]", "[[peer]]", "[plan]", "x = 1", "[data]", "peer = 1", "plan.a.b = 1"))
                )
            case _:
                lines[at] = lines[at].replace("e", "ee", 1)
    text = "\n".join(lines).encode()
    return text if rng.random() < 0.7 else bytes_of(text, rng)


def signed(document: bytes, rng: random.Random) -> bytes:
    """Another line, other armour, or other fields inside the signature's own binary format."""
    line, _, armour = document.partition(b"\n")
    lines = armour.split(b"\n")
    try:
        blob = base64.b64decode(b"".join(lines[1:-2]), validate=True)
    except ValueError:
        return bytes_of(document, rng)
    if rng.random() < 0.3:
        return bytes_of(document, rng)
    text = base64.b64encode(_fields(blob, rng) if rng.random() < 0.7 else bytes_of(blob, rng))
    folded = [text[i : i + 70] for i in range(0, len(text), 70)]
    return b"\n".join([line, lines[0], *folded, *lines[-2:]])


def _fields(blob: bytes, rng: random.Random) -> bytes:
    """SSHSIG: magic, version, then strings with their length before them: one of those lengths is another one."""
    starts, at = [], 10
    while at + 4 <= len(blob):
        starts.append(at)
        at += 4 + int.from_bytes(blob[at : at + 4], "big")
    if not starts:
        return bytes_of(blob, rng)
    start = rng.choice(starts)
    length = int.from_bytes(blob[start : start + 4], "big")
    other = rng.choice((0, 1, max(0, length - 1), length + 1, 2**31, 2**32 - 1))
    return blob[:start] + min(other, 2**32 - 1).to_bytes(4, "big") + blob[start + 4 :]


def _other(value: Any, rng: random.Random) -> Any:
    """`value` with one place, anywhere in the tree, changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        out = dict(value)
        key = rng.choice(sorted(out))
        match rng.randint(0, 7):
            case 0:
                del out[key]
            case 1:
                out[str(rng.choice(ODD_VALUES))] = out[key]
            case _:
                out[key] = _other(out[key], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randint(0, len(value) - 1)
        return [*value[:at], _other(value[at], rng), *value[at + rng.randint(0, 1) :]]
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randint(0, len(value) - 1)
        return value[:at] + rng.choice("0fgG-_ \n\u202e") + value[at + 1 :]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 10, 2**40))
    return rng.choice(ODD_VALUES)
