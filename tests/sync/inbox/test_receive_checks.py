"""Taking in what a peer delivered: each check, with a file that fails just that one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import asyncssh
import pytest
from inbox_site import ASH, BIRCH, CEDAR, ROUND, Site, flipped

from hsl_node.errors import FederationMismatch, PeerDataError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.identity import MANIFEST_NAMESPACE, RECEIPT_NAMESPACE, verify
from hsl_node.federation.names import Kind, Peer
from hsl_node.sync.inbox import receive
from hsl_node.sync.inbox.receive import Arrival, Refusal
from hsl_node.sync.manifest import Manifest, parse_receipt


def test_a_complete_delivery_arrives_once_and_is_answered(site: Site) -> None:
    data = site.good_data()
    manifest = site.manifest(data)
    name = site.deliver(data, manifest)
    (arrival,) = site.scan()
    assert isinstance(arrival, Arrival) and arrival.data is not None
    assert arrival.sender == BIRCH and arrival.manifest == manifest
    assert verify(arrival.document, site.members.federation.get(BIRCH).key, MANIFEST_NAMESPACE)
    assert arrival.data.parent == site.claimed / BIRCH
    arrival.data.rename(site.root / "stored")
    site.answer(manifest)
    receipt_name = str(name.of(Kind.RECEIPT))
    document = (site.homes / BIRCH / "receipts" / receipt_name).read_bytes()
    receipt = parse_receipt(verify(document, site.members.federation.get(ASH).key, RECEIPT_NAMESPACE))
    assert (receipt.accepted, receipt.peer, receipt.receiver, receipt.sha256) == (True, "birch", "ash", manifest.sha256)
    assert os.listdir(site.homes / BIRCH / "receipts") == [receipt_name]
    assert site.scan() == [] and not list(site.inbox.iterdir())


def test_a_statement_needs_no_data(site: Site) -> None:
    manifest = site.manifest(b"", sha256="b" * 64, halted=True)
    assert manifest.statement
    site.deliver(None, manifest)
    (arrival,) = site.scan()
    assert isinstance(arrival, Arrival) and arrival.data is None


def test_a_manifest_without_its_data_waits_and_so_does_data_without_manifest(site: Site) -> None:
    data = site.good_data()
    manifest = site.manifest(data)
    name = site.deliver(None, manifest)
    assert site.scan() == site.scan() == []
    (site.inbox / str(name.of(Kind.DATA))).write_bytes(data)
    (site.inbox / str(name)).unlink()
    assert site.scan() == []
    assert len(list(site.inbox.iterdir())) == 1
    (site.inbox / str(name)).write_bytes(site.sign(manifest))
    assert isinstance(site.scan()[0], Arrival)


def test_the_next_round_is_accepted_and_the_one_after_stays_until_it_is(site: Site) -> None:
    data = site.good_data()
    early = site.deliver(data, site.manifest(data, round=ROUND + 2))
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "round" and refusal.manifest is not None
    assert (site.inbox / str(early)).exists() and (site.inbox / str(early.of(Kind.DATA))).exists()
    (arrival,) = site.scan(current=ROUND + 1)
    assert isinstance(arrival, Arrival)


# ---------------------------------------------------------------- each check


def torn(site: Site, data: bytes) -> bytes:
    return data[:-1]


def poisoned(value: float) -> Callable[[Site, bytes], bytes]:
    def make(site: Site, data: bytes) -> bytes:
        return site.good_data(value)

    return make


def renamed_tensor(site: Site, data: bytes) -> bytes:
    return data.replace(b"a.weight", b"a.weighs")


def metadata(site: Site, data: bytes) -> bytes:
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    changed = header.replace(b'"b.count"', b'"__metadata__"')[: len(header)].ljust(len(header))
    return data[:8] + changed + data[8 + len(header) :]


def huge_header(site: Site, data: bytes) -> bytes:
    return (2**40).to_bytes(8, "little") + data[8:]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param(torn, "size", id="one byte short"),
        pytest.param(lambda s, d: d + b"\0", "size", id="one byte more"),
        pytest.param(lambda s, d: b"", "size", id="empty"),
        pytest.param(poisoned(float("nan")), "nonfinite", id="NaN"),
        pytest.param(poisoned(float("inf")), "nonfinite", id="Inf"),
        pytest.param(renamed_tensor, "header", id="another tensor name"),
        pytest.param(metadata, "header", id="metadata"),
        pytest.param(huge_header, "header", id="header of a terabyte"),
        pytest.param(lambda s, d: bytes(len(d)), "header", id="zeros"),
        pytest.param(lambda s, d: d[::-1], "header", id="backwards"),
    ],
)
@pytest.mark.parametrize("announced", [True, False], ids=["announced so", "announced otherwise"])
def test_threat_06_data_that_fails_a_check_is_refused_and_deleted(
    site: Site, change: Callable[[Site, bytes], bytes], code: str, announced: bool
) -> None:
    """Announced truthfully, and announced as the good file: no bad bytes get through either way."""
    good = site.good_data()
    bad = change(site, good)
    manifest = site.manifest(good, sha256=hashlib.sha256(bad).hexdigest()) if announced else site.manifest(good)
    site.deliver(bad, manifest)
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.manifest == manifest
    assert refusal.code == code if announced else refusal.code in (code, "sha256")
    assert refusal.kept is not None and refusal.kept.read_bytes() == site.sign(manifest)
    assert not list(site.inbox.iterdir()) and not list((site.claimed / BIRCH).iterdir())
    site.answer(manifest, accepted=False, code=refusal.code, text=refusal.error.message)
    site.honest()


def test_threat_13_other_bytes_than_announced_are_refused(site: Site) -> None:
    good = site.good_data()
    site.deliver(flipped(site, good), site.manifest(good))
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "sha256"
    site.honest()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"peer": "cedar"}, "owner"),
        ({"federation": "a" * 64}, "federation"),
        ({"round": 1, "inputs": {}}, "round"),
        ({"round": ROUND - 1}, "round"),
        ({"round": ROUND + 3}, "round"),
        ({"round": 999_999}, "round"),
        ({"sha256": "a" * 64}, "name"),
        ({"inputs": {}}, "manifest"),
        ({"inputs": {"ash": "c" * 64}}, "manifest"),
        ({"inputs": {"ash": "c" * 64, "birch": "c" * 64, "cedar": "c" * 64, "elm": "c" * 64}}, "manifest"),
        ({"halted": True}, "halted"),
        ({"bytes": 1}, "size"),
        ({"bytes": 2**60}, "size"),
        ({"schema": "e" * 64}, "setup"),
        ({"anchor": "e" * 64}, "setup"),
    ],
    ids=str,
)
def test_threat_14_a_signed_manifest_that_fails_a_check_is_refused(
    site: Site, changes: dict[str, Any], code: str
) -> None:
    """The file has the name it should have; only the signed content differs."""
    data = site.good_data()
    honest_name, manifest = site.manifest(data).file_name(), site.manifest(data, **changes)
    if code == "round":
        honest_name = manifest.file_name()
    (site.inbox / str(honest_name.of(Kind.DATA))).write_bytes(data)
    (site.inbox / str(honest_name)).write_bytes(site.sign(manifest))
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == code
    assert isinstance(refusal.error, FederationMismatch if code == "setup" else PeerDataError)
    if code == "round" and manifest.round < ROUND:
        assert [r.document for r in site.scan()] == [refusal.document], "it may be proof: it stays until it is answered"
        site.answer(manifest, accepted=False, code=code)
    assert refusal.kept is not None and not list(site.inbox.iterdir())
    site.honest()


def rewritten(site: Site, manifest: Manifest, signer: Peer = BIRCH, **changes: Any) -> bytes:
    """A document that our own code would not make, with a true signature."""
    line = canonical_json({**manifest.content(), **changes}) + b"\n"
    return line + asyncssh.create_sshsig(site.members.identities[signer].key, line, namespace=MANIFEST_NAMESPACE)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (
            {"version": 4, "note": "x"},
            "setup",
            "birch runs another hsl-node version than ash: manifest version 4, at ash 3",
        ),
        ({"version": 1, "samples": None, "halted": 7}, "setup", "manifest version 1, at ash 3"),
        ({"note": "x"}, "manifest", "malformed"),
        ({"samples": "many"}, "manifest", "malformed"),
    ],
    ids=str,
)
def test_a_signed_manifest_that_cannot_be_read_can_be_answered_and_leaves_nothing(
    site: Site, changes: dict[str, Any], code: str, words: str
) -> None:
    """Of another version, say: its sender must learn that, and its checkpoint must not stay for ever."""
    data = site.good_data()
    manifest = site.manifest(data)
    name = site.deliver(data, manifest, rewritten(site, manifest, **changes))
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == code and words in refusal.error.message
    assert refusal.manifest is None and refusal.about is not None and refusal.kept is not None
    assert not list(site.inbox.iterdir()) and not list((site.claimed / BIRCH).iterdir())
    receive.answer(
        BIRCH, refusal.about, homes=site.homes, me=ASH, identity=site.members.identities[ASH],
        accepted=False, code=code, text=refusal.error.message,
    )  # fmt: skip
    document = (site.homes / BIRCH / "receipts" / str(name.of(Kind.RECEIPT))).read_bytes()
    receipt = parse_receipt(verify(document, site.members.federation.get(ASH).key, RECEIPT_NAMESPACE))
    says = (receipt.federation, receipt.round, receipt.peer, receipt.sha256, receipt.receiver)
    assert says == (site.members.federation.digest, ROUND, BIRCH, manifest.sha256, ASH), "what its sender looks for"
    site.honest()


@pytest.mark.parametrize(
    ("signer", "changes"),
    [
        (CEDAR, {}),
        (BIRCH, {"peer": "cedar"}),
        (BIRCH, {"federation": "a" * 64}),
        (BIRCH, {"round": ROUND + 1}),
        (BIRCH, {"sha256": "a" * 64}),
        (BIRCH, {"sha256": None}),
        (BIRCH, {"version": "4"}),
        (BIRCH, {"version": 2**70}),
    ],
    ids=str,
)
def test_threat_14_a_manifest_of_another_version_counts_as_its_senders_only_with_signature_and_name(
    site: Site, signer: Peer, changes: dict[str, Any]
) -> None:
    """Nothing of it is answered, and no checkpoint is deleted for it: a good manifest may follow."""
    data = site.good_data()
    manifest = site.manifest(data)
    name = site.deliver(data, manifest, rewritten(site, manifest, signer, **{"version": 4, "note": "x", **changes}))
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.about is None
    assert refusal.code == ("signature" if signer == CEDAR else "manifest")
    assert os.listdir(site.inbox) == [str(name.of(Kind.DATA))]
    site.deliver(None, manifest)
    assert isinstance(site.scan()[0], Arrival)


@pytest.mark.parametrize("round", [ROUND, ROUND + 1])
@pytest.mark.parametrize("data", ["never comes", "is right", "fails a check"])
@pytest.mark.parametrize(
    "changes", [{"samples": 11}, {"sha256": "a" * 64}, {"schema": "e" * 64}, {"inputs": {}}], ids=str
)
def test_threat_11_a_second_manifest_of_an_open_round_is_found_whatever_becomes_of_its_data(
    site: Site, round: int, data: str, changes: dict[str, Any]
) -> None:
    """It stays, crash or no crash, until it is answered; its data does not."""
    good = site.good_data()
    first = site.manifest(good, round=round)
    second = site.manifest(good, round=round, **changes)
    name = site.deliver({"never comes": None, "is right": good, "fails a check": good[:-1]}[data], second)
    for _ in range(2):
        (refusal,) = site.scan(signed={round: first.digest})
        assert isinstance(refusal, Refusal) and refusal.code == "equivocation"
        assert (refusal.manifest, refusal.document) == (second, site.sign(second))
        assert os.listdir(site.inbox) == [str(name)] and not list((site.claimed / BIRCH).iterdir())
    site.answer(second, accepted=False, code=refusal.code)
    site.honest()


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"peer": "cedar"}, "owner"), ({"federation": "a" * 64}, "federation"), ({"sha256": "a" * 64}, "name"),
     ({"round": ROUND + 1}, "name"), ({}, "")],
    ids=str,
)  # fmt: skip
def test_threat_11_what_is_about_something_else_or_says_the_same_contradicts_nothing(
    site: Site, changes: dict[str, Any], code: str
) -> None:
    data = site.good_data()
    first = site.manifest(data)
    site.deliver(data, first, site.sign(site.manifest(data, **changes)))
    (found,) = site.scan(signed={ROUND: first.digest})
    assert found.code == code if isinstance(found, Refusal) else (found.manifest, code) == (first, "")


def test_threat_10_a_manifest_of_another_federation_by_name_and_content_is_refused(site: Site) -> None:
    data = site.good_data()
    site.deliver(data, site.manifest(data, federation="a" * 64))
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "federation"
    site.honest()


def without_signature(site: Site, manifest: Manifest) -> bytes:
    return canonical_json(manifest.content()) + b"\n"


def by_cedar(site: Site, manifest: Manifest) -> bytes:
    return site.sign(manifest, CEDAR)


def as_receipt(site: Site, manifest: Manifest) -> bytes:
    return site.sign(manifest, namespace=RECEIPT_NAMESPACE)


def more_samples(site: Site, manifest: Manifest) -> bytes:
    return site.sign(manifest).replace(b'"samples":10', b'"samples":99')


def another_signature(site: Site, manifest: Manifest) -> bytes:
    other = site.sign(manifest.model_copy(update={"samples": 11}))
    return site.sign(manifest).split(b"\n", 1)[0] + b"\n" + other.split(b"\n", 1)[1]


@pytest.mark.parametrize(
    "forge",
    [without_signature, by_cedar, as_receipt, more_samples, another_signature, lambda s, m: s.sign(m)[:-20],
     lambda s, m: b"\n" + s.sign(m), lambda s, m: s.sign(m)[:200], lambda s, m: b"", lambda s, m: b"\0" * 4096,
     lambda s, m: os.urandom(4096), lambda s, m: b"{" * 30_000, lambda s, m: b"\n" * 30_000],
)  # fmt: skip
def test_threat_14_nothing_unsigned_is_believed_and_good_data_is_kept(
    site: Site, forge: Callable[[Site, Manifest], bytes]
) -> None:
    data = site.good_data()
    manifest = site.manifest(data)
    name = site.deliver(data, manifest, forge(site, manifest))
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "signature" and refusal.manifest is None
    assert [p.name for p in site.inbox.iterdir()] == [str(name.of(Kind.DATA))]
    (site.inbox / str(name)).write_bytes(site.sign(manifest))
    assert isinstance(site.scan()[0], Arrival)


@pytest.mark.parametrize(
    "line",
    [b"{}\n", b"[]\n", b"null\n", b'{"version":3}\n', b"NaN\n", b"[" * 5000 + b"\n", b'{"a":1,"a":2}\n', b"not json\n",
     b"\xff\xfe\n", b"1e999\n"],
)  # fmt: skip
def test_threat_14_a_signed_document_that_is_no_manifest_is_refused(site: Site, line: bytes) -> None:
    key = site.members.identities[BIRCH].key
    document = line + asyncssh.create_sshsig(key, line, namespace=MANIFEST_NAMESPACE)
    site.deliver(None, site.manifest(site.good_data()), document)
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "manifest"
    site.honest()


@pytest.mark.parametrize(
    "spell",
    [lambda t: t.replace(b'"score":0.5', b'"score":0.50'),
     lambda t: t.replace(b'"samples":10', b'"samples":10,"samples":10'),
     lambda t: t.replace(b":", b": ", 1), lambda t: t.replace(b'"samples":10', b'"samples":10.0'),
     lambda t: t.replace(b'"samples":10', b'"samples":0'), lambda t: t.replace(b'"samples":10', b'"samples":-1'),
     lambda t: t.replace(b'"samples":10', b'"samples":1000000001'),
     lambda t: t.replace(b'"samples":10', b'"samples":"10"'),
     lambda t: t.replace(b'"samples":10', b'"samples":true'), lambda t: t.replace(b'"score":0.5', b'"score":NaN'),
     lambda t: t.replace(b'"score":0.5', b'"score":2e9'), lambda t: t.replace(b'"plateau":false', b'"plateau":0'),
     lambda t: t.replace(b'"version":3', b'"version":3,"x":1'), lambda t: t.replace(b'"birch":', b'"Birch":', 1)],
    ids=range(14),
)  # fmt: skip
def test_threat_09_a_signed_manifest_has_one_spelling_and_capped_numbers(
    site: Site, spell: Callable[[bytes], bytes]
) -> None:
    data = site.good_data()
    manifest = site.manifest(data)
    line = canonical_json(manifest.content()) + b"\n"
    changed = spell(line)
    assert changed != line
    key = site.members.identities[BIRCH].key
    site.deliver(data, manifest, changed + asyncssh.create_sshsig(key, changed, namespace=MANIFEST_NAMESPACE))
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "manifest"
