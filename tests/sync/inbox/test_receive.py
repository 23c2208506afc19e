"""Taking in what a peer delivered: each check with a file that fails just that one, crashes, races, odd files.

ash receives from birch, in a plain folder as any SFTP server would leave it (`foreign`) and in our own.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

import asyncssh
import pytest
from inbox_site import ASH, BIRCH, CEDAR, ROUND, Site

from hsl_node.errors import FederationMismatch, LocalStateError, PeerDataError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.identity import MANIFEST_NAMESPACE, RECEIPT_NAMESPACE, verify
from hsl_node.federation.names import Digest, Kind, Peer
from hsl_node.sync.inbox import receive
from hsl_node.sync.inbox.receive import Arrival, Refusal
from hsl_node.sync.manifest import MANIFEST_MAX_BYTES, Manifest, parse_receipt
from hsl_node.sync.store import plain_files

# ---------------------------------------------------------------- what is accepted


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


def test_what_the_server_hashed_on_arrival_is_not_hashed_again(site: Site) -> None:
    """A digest that is wrong on purpose shows that it was used; a foreign inbox never uses it."""
    data = site.good_data()
    site.deliver(data, site.manifest(data))
    (found,) = site.scan(take_digest=lambda peer, name: Digest("d" * 64))
    assert isinstance(found, Arrival if site.foreign else Refusal)


def test_the_digest_is_asked_for_before_the_file_is_claimed(site: Site) -> None:
    """Once claimed, a second file could arrive under the name, and its digest would vouch for the first."""
    if site.foreign:
        pytest.skip("no digest is used")
    data = site.good_data()
    name = site.deliver(data, site.manifest(data)).of(Kind.DATA)
    seen = []

    def take(peer: Peer, asked: str) -> Digest | None:
        seen.append((asked, (site.inbox / asked).exists()))
        return None

    site.scan(take_digest=take)
    assert seen == [(str(name), True)]


# ---------------------------------------------------------------- each check


def torn(site: Site, data: bytes) -> bytes:
    return data[:-1]


def flipped(site: Site, data: bytes) -> bytes:
    return data[:-9] + b"\x55" + data[-8:]


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
            {"version": 3, "note": "x"},
            "setup",
            "birch runs another hsl-node version than ash: manifest version 3, at ash 2",
        ),
        ({"version": 1, "samples": None, "halted": 7}, "setup", "manifest version 1, at ash 2"),
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
        (BIRCH, {"version": "3"}),
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
    name = site.deliver(data, manifest, rewritten(site, manifest, signer, **{"version": 3, "note": "x", **changes}))
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
    [b"{}\n", b"[]\n", b"null\n", b'{"version":2}\n', b"NaN\n", b"[" * 5000 + b"\n", b'{"a":1,"a":2}\n', b"not json\n",
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
    [lambda t: t.replace(b'"auc":0.5', b'"auc":0.50'),
     lambda t: t.replace(b'"samples":10', b'"samples":10,"samples":10'),
     lambda t: t.replace(b":", b": ", 1), lambda t: t.replace(b'"samples":10', b'"samples":10.0'),
     lambda t: t.replace(b'"samples":10', b'"samples":0'), lambda t: t.replace(b'"samples":10', b'"samples":-1'),
     lambda t: t.replace(b'"samples":10', b'"samples":1000000001'),
     lambda t: t.replace(b'"samples":10', b'"samples":"10"'),
     lambda t: t.replace(b'"samples":10', b'"samples":true'), lambda t: t.replace(b'"auc":0.5', b'"auc":NaN'),
     lambda t: t.replace(b'"auc":0.5', b'"auc":1.5'), lambda t: t.replace(b'"plateau":false', b'"plateau":0'),
     lambda t: t.replace(b'"version":2', b'"version":2,"x":1'), lambda t: t.replace(b'"birch":', b'"Birch":', 1)],
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


# ---------------------------------------------------------------- odd files (threats 1, 2)


def test_threat_03_a_manifest_too_large_is_refused_unread(site: Site) -> None:
    name = site.manifest(site.good_data()).file_name()
    with open(site.inbox / str(name), "wb") as file:
        file.truncate(2**40)  # sparse: reading it whole would take a terabyte
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "size" and refusal.kept is None
    assert (site.inbox / str(name)).exists() is False and MANIFEST_MAX_BYTES < 2**40
    site.honest()


def test_threat_03_sparse_data_is_refused_unread(site: Site) -> None:
    name = site.deliver(b"", site.manifest(site.good_data()))
    os.truncate(site.inbox / str(name.of(Kind.DATA)), 2**40)
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "size"
    assert not list(site.inbox.iterdir()) and not list((site.claimed / BIRCH).iterdir())
    site.honest()


@pytest.mark.parametrize("which", [Kind.MANIFEST, Kind.DATA])
@pytest.mark.parametrize("kind", ["symlink", "dangling", "hardlink", "fifo"])
def test_threat_02_links_and_fifos_are_refused_without_hanging(
    site: Site, kind: str, which: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = site.good_data()
    manifest = site.manifest(data)
    name = site.deliver(data, manifest)
    target = site.inbox / str(name.of(which))
    secret = site.root / "secret"
    secret.write_bytes(target.read_bytes())  # even the right bytes
    before = secret.stat()
    target.unlink()
    match kind:
        case "symlink":
            target.symlink_to(secret)
        case "dangling":
            target.symlink_to(site.root / "nowhere")
        case "hardlink":
            target.hardlink_to(secret)
        case "fifo":
            os.mkfifo(target)
    if kind == "hardlink" and site.foreign:
        assert site.scan() == [], "it may be in the midst of a rename"
        monkeypatch.setattr(plain_files, "RENAME_MAX_S", 0.0)  # a minute later
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "file"
    assert not target.is_symlink() and not target.exists()
    after = secret.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_mode) == (before.st_size, before.st_mtime_ns, before.st_mode)
    site.answer(manifest, accepted=False, code="file", text="")
    for left in site.inbox.iterdir():
        left.unlink()
    site.honest()


def test_threat_02_directories_are_ignored(site: Site) -> None:
    name = site.manifest(site.good_data()).file_name()
    (site.inbox / str(name)).mkdir()
    (site.inbox / "x/y").mkdir(parents=True)
    assert site.scan() == []
    data = site.good_data(5.0)
    site.deliver(data, site.manifest(data))
    assert isinstance(site.scan()[0], Arrival)


def test_threat_02_a_directory_in_the_place_of_the_data_is_refused(site: Site) -> None:
    name = site.deliver(None, site.manifest(site.good_data()))
    (site.inbox / str(name.of(Kind.DATA))).mkdir()
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == "file"
    assert not list((site.claimed / BIRCH).iterdir())


@pytest.mark.parametrize(
    "text",
    ["x", "-rf", "..x", "*", "a b", "\x1b[31mred", "new\nline", "\u202egnp", "hsl1_", "{0}", "%s", "$(id)", ".part",
     "hsl1_00000000_r000003_birch_" + "a" * 64 + ".receipt",
     "hsl1_00000000_r000003_birch_" + "a" * 64 + ".safetensors.part",
     "hsl1_00000000_r000003_cedar_" + "a" * 64 + ".manifest", "HSL1_00000000_r000003_birch_" + "a" * 64 + ".manifest"],
)  # fmt: skip
def test_threat_01_files_of_other_names_are_removed_and_reported_escaped(site: Site, text: str) -> None:
    (site.inbox / text).write_bytes(b"x")
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.code == ("owner" if "cedar" in text else "name")
    assert refusal.name.isprintable() and refusal.error.message.isprintable()
    site.honest()


def test_threat_01_names_that_are_not_text_are_removed_too(site: Site) -> None:
    with open(os.fsencode(site.inbox) + b"/\xff\xfe\x80", "wb"):
        pass
    (refusal,) = site.scan()
    assert isinstance(refusal, Refusal) and refusal.name.isprintable()
    site.honest()


def test_threat_03_a_flood_of_files_is_worked_off_in_bounded_steps(site: Site) -> None:
    count = receive.ENTRIES_MAX + 500
    for i in range(count):
        (site.inbox / f"junk{i}").touch()
    assert len(site.scan()) == receive.JUNK_REPORTED_MAX
    assert len(list(site.inbox.iterdir())) == 500
    site.scan()
    site.honest()


def test_threat_03_evidence_and_receipts_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "REFUSED_MAX", 5)
    monkeypatch.setattr(receive, "RECEIPTS_MAX", 7)
    data = site.good_data()
    for i in range(12):
        manifest = site.manifest(data, sha256=f"{i:064x}")
        site.deliver(data, manifest)
        (refusal,) = site.scan()
        assert isinstance(refusal, Refusal) and refusal.kept is not None and refusal.kept.exists()
        site.answer(manifest, accepted=False, code="sha256", text="")
    assert len(list((site.root / "quarantine/refused/birch").iterdir())) == 5
    receipts = site.homes / BIRCH / "receipts"
    assert len(list(receipts.iterdir())) == 7
    assert (receipts / str(manifest.file_name().of(Kind.RECEIPT))).exists()


def test_threat_02_a_home_that_is_missing_or_a_link_is_our_operators_problem(site: Site) -> None:
    site.inbox.rmdir()
    with pytest.raises(LocalStateError, match="inbox of birch"):
        site.scan()
    site.inbox.symlink_to(site.root)
    with pytest.raises(LocalStateError):
        site.scan()
    assert (site.root / "quarantine").is_dir()


def test_threat_02_a_planted_link_in_receipts_is_replaced_and_not_followed(site: Site) -> None:
    manifest = site.manifest(b"", sha256="b" * 64, halted=True)
    victim = site.root / "victim"
    victim.write_text("canary")
    (site.homes / BIRCH / "receipts" / str(manifest.file_name().of(Kind.RECEIPT))).symlink_to(victim)
    site.answer(manifest)
    assert victim.read_text() == "canary"
    assert not (site.homes / BIRCH / "receipts" / str(manifest.file_name().of(Kind.RECEIPT))).is_symlink()


@pytest.mark.parametrize("which", [Kind.MANIFEST, Kind.DATA])
def test_a_file_in_the_midst_of_opensshs_rename_is_waited_for(site: Site, which: Kind) -> None:
    """Its sftp-server makes the new name, then removes the old one: for a moment the file has two."""
    if not site.foreign:
        pytest.skip("the embedded server renames in one step")
    data = site.good_data()
    name = site.deliver(data, site.manifest(data))
    target, part = site.inbox / str(name.of(which)), site.homes / BIRCH / "parts" / f"{name.of(which)}.part"
    part.hardlink_to(target)
    assert site.scan() == []
    part.unlink()
    (arrival,) = site.scan()
    assert isinstance(arrival, Arrival) and arrival.data is not None and arrival.data.read_bytes() == data


# ---------------------------------------------------------------- races (threat 13)


def test_threat_13_a_sender_that_rewrites_during_ingest_never_changes_what_was_checked(site: Site) -> None:
    """Another server lets a sender keep its file open. What is accepted has the announced digest, then and later."""
    if not site.foreign:
        pytest.skip("the embedded server delivers no file that is open for writing; see test_server_files")
    good = site.good_data()
    manifest = site.manifest(good)
    bad = flipped(site, good)
    writes = 0
    for _ in range(60):
        name = site.deliver(good, manifest)
        stop = threading.Event()
        with open(site.inbox / str(name.of(Kind.DATA)), "r+b", buffering=0) as handle:

            def tamper(handle: Any = handle, stop: threading.Event = stop) -> None:
                nonlocal writes
                for content in itertools.cycle((bad, good, good[:100], good)):
                    if stop.is_set():
                        return
                    writes += os.pwrite(handle.fileno(), content, 0) > 0
                    os.ftruncate(handle.fileno(), len(content))

            thread = threading.Thread(target=tamper)
            thread.start()
            found = site.scan()
            stop.set()
            thread.join()
            os.pwrite(handle.fileno(), b"late" * 100, 0)
        for item in found:
            if isinstance(item, Arrival):
                assert item.data is not None and item.data.read_bytes() == good
                item.data.unlink()
            else:
                assert item.code in ("size", "sha256", "header", "nonfinite")
        for left in site.inbox.iterdir():
            left.unlink()
    assert writes > 60
    site.honest()


def test_threat_13_a_handle_kept_open_cannot_reach_the_accepted_bytes(site: Site) -> None:
    if not site.foreign:
        pytest.skip("the embedded server delivers no file that is open for writing; see test_server_files")
    data = site.good_data()
    name = site.deliver(data, site.manifest(data))
    with open(site.inbox / str(name.of(Kind.DATA)), "r+b") as handle:
        (arrival,) = site.scan()
        handle.write(b"late")
    assert isinstance(arrival, Arrival) and arrival.data is not None and arrival.data.read_bytes() == data


def test_threat_13_a_manifest_exchanged_between_check_and_answer_changes_nothing(site: Site) -> None:
    data = site.good_data()
    manifest = site.manifest(data)
    name = site.deliver(data, manifest)
    (arrival,) = site.scan()
    (site.inbox / str(name)).write_bytes(b"something else")
    assert isinstance(arrival, Arrival) and arrival.document == site.sign(manifest)
    site.answer(arrival.manifest)
    assert not list(site.inbox.iterdir())


# ---------------------------------------------------------------- crashes


def test_threat_22_a_crash_after_the_claim_loses_nothing(site: Site) -> None:
    data = site.good_data()
    site.deliver(data, site.manifest(data))
    first = site.scan()  # the node dies before it does anything with this
    second = site.scan()
    assert first == second and isinstance(second[0], Arrival)
    assert second[0].data is not None and second[0].data.read_bytes() == data


def test_threat_22_a_crash_after_the_move_into_the_store_asks_for_no_second_transfer(site: Site) -> None:
    data = site.good_data()
    manifest = site.manifest(data)
    site.deliver(data, manifest)
    (arrival,) = site.scan()
    stored = site.root / "stored"
    assert isinstance(arrival, Arrival) and arrival.data is not None
    arrival.data.rename(stored)
    (again,) = site.scan(kept=lambda m: stored if m.sha256 == manifest.sha256 else None)
    assert isinstance(again, Arrival) and again.data is None and again.manifest == manifest
    stored.write_bytes(flipped(site, data))  # what the store holds is checked, not trusted
    assert site.scan(kept=lambda m: stored) == []


def test_threat_22_a_copy_torn_by_a_crash_is_made_again(site: Site) -> None:
    data = site.good_data()
    name = site.deliver(data, site.manifest(data))
    (site.claimed / BIRCH).mkdir(parents=True)
    (site.claimed / BIRCH / str(name.of(Kind.DATA))).write_bytes(data[:100])
    (arrival,) = site.scan()
    assert isinstance(arrival, Arrival) and arrival.data is not None and arrival.data.read_bytes() == data


def test_an_inbox_on_another_file_system_is_copied(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    crossed = []
    real = os.rename

    def rename(source: Any, target: Any, **folders: Any) -> None:
        if "claimed" in str(target):
            crossed.append(target)
            raise OSError(18, "Invalid cross-device link")
        real(source, target, **folders)

    monkeypatch.setattr("hsl_node.sync.inbox.receive.os.rename", rename)
    site.honest()
    assert bool(crossed) != site.foreign


def test_threat_23_a_failed_fsync_is_not_an_arrival(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    data = site.good_data()
    site.deliver(data, site.manifest(data))
    monkeypatch.setattr("hsl_node.sync.inbox.receive.os.fsync", broken)
    with pytest.raises(LocalStateError):
        site.scan()


# ---------------------------------------------------------------- leftovers


def test_parts_are_collected_after_a_day_and_data_that_may_be_wanted_stays(site: Site) -> None:
    data, now = site.good_data(), 1e9
    wanted = site.manifest(data).file_name().of(Kind.DATA)
    orphan = site.manifest(data, round=ROUND - 1).file_name().of(Kind.DATA)
    paired = site.deliver(data, site.manifest(data, round=ROUND - 2))
    part = site.manifest(data).file_name().as_part()
    files = {
        site.inbox / str(wanted): False, site.inbox / str(orphan): True, site.inbox / str(paired): False,
        site.inbox / str(paired.of(Kind.DATA)): False, site.homes / BIRCH / "parts" / str(part): True,
        site.homes / BIRCH / "parts/junk": True, site.claimed / BIRCH / str(orphan): True,
    }  # fmt: skip
    (site.claimed / BIRCH).mkdir(parents=True)
    for path in files:
        path.touch()
        os.utime(path, (now - 90_000, now - 90_000))

    def collect(now: float) -> int:
        return receive.collect_parts(BIRCH, homes=site.homes, claimed=site.claimed, current=ROUND, now=now)

    assert collect(now - 10_000) == 0
    assert collect(now) == sum(files.values())
    assert {path: not path.exists() for path in files} == files


@pytest.mark.parametrize("years", [10, -10])
def test_threat_24_a_clock_that_jumps_collects_nothing_and_a_day_later_by_the_new_clock_all_is_as_before(
    site: Site, years: int
) -> None:
    part = site.homes / BIRCH / "parts" / str(site.manifest(site.good_data()).file_name().as_part())
    part.touch()
    now = part.stat().st_mtime + years * 365 * 86_400

    def collect(now: float) -> int:
        return receive.collect_parts(BIRCH, homes=site.homes, claimed=site.claimed, current=ROUND, now=now)

    assert collect(now) == 0
    assert part.stat().st_mtime == pytest.approx(now)
    assert collect(now + 80_000) == 0
    assert collect(now + 90_000) == 1
