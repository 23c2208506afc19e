"""What a string of an agreed file may be: names, addresses, keys, fingerprints. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hsl_node.errors import escaped
from hsl_node.federation.names import parse_peer

NAME_MAX = 120  # characters: one line of a terminal or a table


def _host_port(lowest_port: int, example: str) -> AfterValidator:
    def checked(text: str) -> str:
        host, port = split_address(text)
        if not host or not lowest_port <= port <= 65535:
            raise ValueError(f"'{escaped(text, 60)}' is not host:port, e.g. {example}{_why(text)}")
        return text

    return AfterValidator(checked)


def _why(text: str) -> str:
    """What is wrong with an address, where one character tells."""
    host, colon, port = text.rpartition(":")
    in_brackets = host[:1] == "[" and host[-1:] == "]"
    wrong = re.sub("[0-9a-fA-F:.]" if in_brackets else "[A-Za-z0-9.:-]", "", host[1:-1] if in_brackets else host)
    if colon and wrong:
        may = (
            "a zone is one machine's own" if wrong[0] == "%" else "letters without accents, digits, '.' and '-' may be"
        )
        return f"; {escaped(wrong[0])!r} is in no host name or address that others can use: {may}"
    if ":" in host and not in_brackets:
        return "; an address of IPv6 stands in brackets, [2001:db8::1]:8922"
    return "" if colon and re.fullmatch("[0-9]+", port, re.ASCII) else "; the port, a number, comes last, after a colon"


def _ed25519(text: str) -> str:
    parts = text.split()
    try:
        blob = base64.b64decode(parts[1], validate=True)
    except (IndexError, binascii.Error, ValueError) as exc:
        raise ValueError('not a public key of the form "ssh-ed25519 AAAA..."') from exc
    if parts[0] != "ssh-ed25519" or len(blob) != 51 or blob[:19] != b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[:19]:
        raise ValueError("only ssh-ed25519 keys are used here")
    if base64.b64encode(blob).decode() != parts[1]:  # keys are compared as text: one key, one spelling
        raise ValueError("the key is not written as ssh-keygen writes it: copy it again")
    return f"{parts[0]} {parts[1]}"  # a comment is not part of the key


def printable(text: str) -> str:
    """What somebody else wrote is shown as one piece of one line, whoever shows it.

    Raises:
        ValueError: it holds a control character, a line end, or an invisible or reordering one.
    """
    if wrong := [c for c in text if not c.isprintable()]:
        raise ValueError(f"'{escaped(text, 60)}' holds a character that cannot be printed, U+{ord(wrong[0]):04X}")
    return text


def plain_name(text: str) -> str:
    """One to NAME_MAX printable characters in words with one space between them: padding could pass for a second line.

    Raises:
        ValueError
    """
    if not 1 <= len(text) <= NAME_MAX:
        raise ValueError(f"'{escaped(text, 60)}' is {len(text)} characters long; a name has 1 to {NAME_MAX}")
    if printable(text) != text.strip() or "  " in text:
        raise ValueError(f"'{escaped(text, 60)}' begins or ends with a space, or has two in a row")
    return text


Text = Annotated[str, AfterValidator(printable)]  # every free string of a file that others write
Name = Annotated[str, AfterValidator(plain_name)]
PeerName = Annotated[str, AfterValidator(parse_peer)]
Address = Annotated[str, _host_port(1, "mercy.example.org:8922")]
Listen = Annotated[str, _host_port(0, "[::]:8922, of IPv6 and IPv4 (port 0: any free one)")]
PublicKey = Annotated[str, AfterValidator(_ed25519)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def fingerprint(public_key: str) -> str:
    blob = base64.b64decode(public_key.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def read_aloud(public_key: str) -> str:
    """The first 80 bits of the key's hash in groups of four, for the telephone."""
    digits = hashlib.sha256(base64.b64decode(public_key.split()[1])).hexdigest()[:20]
    return " ".join(digits[i : i + 4] for i in range(0, 20, 4))


FINGERPRINT_FORMS = 'as SHA256:... or as the five groups of four in quotes, "0123 4567 89ab cdef 0123"'


def is_fingerprint_of(said: str, public_key: str) -> bool:
    """Is this what a person was told of that key? Either form counts, whole; spaces don't.

    80 bits are enough: who wants another key taken has to find one with the same, about 2^80 tries. Two keys alike
    (2^40) are of no use: the key that is read aloud is its hospital's own.
    """
    typed = "".join(said.split())
    return typed == fingerprint(public_key) or typed.lower() == read_aloud(public_key).replace(" ", "")


def not_the_fingerprint(said: str | None, of_what: str) -> str:
    """What is wrong with it: nothing was said, it is none, or another key's."""
    if not said:
        return f"no fingerprint was given for {of_what}"
    if not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}|[0-9a-fA-F]{20}", "".join(said.split()), re.ASCII):
        return f"{said!r} is no whole fingerprint, neither {FINGERPRINT_FORMS.replace(' or as', ' nor as')}"
    return f"{said!r} is not the fingerprint of {of_what}"


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`; ('', 0) where it is neither."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})", text)
    return (found[1] or found[2], int(found[3])) if found else ("", 0)
