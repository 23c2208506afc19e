"""docs/protocol.md says what the code does: its examples, refusal codes, namespaces, versions and limits."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from protocol_examples import PAGE, examples, identity, render, shown

import hsl_node
from hsl_node.federation import identity as signing
from hsl_node.federation import keyring
from hsl_node.sync import life, manifest, offer
from hsl_node.sync.inbox.limits import Limits

PACKAGE = Path(hsl_node.__file__).parent
TEXT = PAGE.read_text()


def raised(tree: ast.AST) -> Iterator[str]:
    """The code of every PeerDataError, and of every receipt that `intake` writes by itself."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        values = [k.value for k in node.keywords if k.arg == "code"]
        if name in ("_answer", "answer"):
            values += node.args[1:2]
        if name in ("PeerDataError", "_answer", "answer") or any(k.arg == "code" for k in node.keywords):
            yield from (v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))


def codes() -> set[str]:
    found = {code for path in PACKAGE.rglob("*.py") for code in raised(ast.parse(path.read_text()))}
    return {code for code in found if re.fullmatch(r"[a-z0-9]{1,20}", code)} | {"setup"}  # receive.Refusal.code


def test_every_refusal_code_has_its_row_and_every_row_its_code() -> None:
    table = TEXT.partition("## Refusal codes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z0-9]+)` \| ([a-z, ]+) \|", table, re.M)
    assert {code for code, _ in rows} == codes()
    assert {word for _, where in rows for word in where.split(", ")} == {"receipt", "request", "here"}
    assert len(rows) == len(codes()), "a code has two rows"


def test_the_examples_are_what_the_code_makes() -> None:
    assert shown(TEXT) == examples().keys()
    assert render(TEXT) == TEXT, "out of date: make docs"


def test_an_example_joined_again_is_the_signed_document() -> None:
    """Else the page would show something that nobody signed."""
    block = re.search(r"<!-- example: manifest -->\n```\n(.*?)```\n", TEXT, re.S)
    assert block
    line, begin, signature = block[1].partition("-----BEGIN")
    document = (line.replace("\n", "") + "\n" + begin + signature).encode("ascii")
    said = signing.verify(document, identity("ash").public, signing.MANIFEST_NAMESPACE)
    claim = manifest.parse_manifest(said)
    assert claim.digest == examples()["manifest digest"]


def test_the_documents_have_the_namespaces_versions_and_sizes_of_the_code() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| `(hsl-[a-z-]+@v1)` \| (\d) \| (\d+) \|$", TEXT, re.M)

    def version(model: type) -> str:
        return str(model.model_fields["version"].default)  # type: ignore[attr-defined]

    assert {name: tuple(rest) for name, *rest in rows} == {
        "manifest": (signing.MANIFEST_NAMESPACE, version(manifest.Manifest), str(manifest.MANIFEST_MAX_BYTES)),
        "receipt": (signing.RECEIPT_NAMESPACE, version(manifest.Receipt), str(manifest.RECEIPT_MAX_BYTES)),
        "offer": (signing.OFFER_NAMESPACE, version(offer.Offer), str(offer.OFFER_MAX_BYTES)),
        "sign of life": (signing.LIFE_NAMESPACE, version(life.Life), str(life.LIFE_MAX_BYTES)),
        "key update": (keyring.UPDATE_NAMESPACE, version(keyring.KeyUpdate), str(keyring.UPDATE_MAX_BYTES)),
    }


def test_every_field_of_a_manifest_is_explained() -> None:
    table = TEXT.partition("## The manifest")[2].partition("The **digest")[0]
    named = {name for cell in re.findall(r"^\| (`[^|]+) \|", table, re.M) for name in re.findall(r"`(\w+)`", cell)}
    assert named == {field.alias or name for name, field in manifest.Manifest.model_fields.items()}


def test_the_limits_are_those_of_the_inbox() -> None:
    table = TEXT.partition("## Limits that a sender must keep")[2]
    limits = Limits()
    for said in (
        f"{limits.login_timeout_s:.0f} s, {limits.login_attempts} tries",
        f"| {limits.connections_per_peer}, {limits.sessions_per_peer};",
        f"| {limits.handles_per_connection} |",
        f"| {limits.quota.files}, of {limits.quota.bytes // 2**30} GiB together",
        f"| {limits.idle_s} s without",
        f"| {limits.progress_bytes // 1024} KiB in {limits.progress_s} s",
        f"{limits.read_back_bytes_per_minute // 2**20} MiB a minute",
        f"| {limits.offers_per_minute} a minute; {limits.offer_files_per_hour} checkpoints an hour |",
        f"| {limits.packets_per_minute} a minute;",
        f"{limits.requests_per_minute:,} |",
    ):
        assert said in table, said
