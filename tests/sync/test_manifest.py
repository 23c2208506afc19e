"""Manifest and receipt: one spelling each, every field checked, hostile JSON refused and nothing more."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import hsl_node
from hsl_node.errors import FederationMismatch, PeerDataError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.identity import MANIFEST_NAMESPACE, verify
from hsl_node.federation.names import Kind, Peer
from hsl_node.federation.plan import Plan
from hsl_node.sync.manifest import (
    MANIFEST_MAX_BYTES,
    SAMPLES_MAX,
    Manifest,
    Receipt,
    check,
    claim_of,
    parse_manifest,
    parse_receipt,
    require_same_setup,
)

SHA, BASE, OTHER = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture(scope="module")
def members(federation_of):
    return federation_of(3, plan=Plan(method="fedavg", rounds=5))


@pytest.fixture(scope="module")
def federation(members):
    return members.federation


def content(federation, /, **changes: Any) -> dict[str, Any]:
    """A right manifest of ash, round 2, as a JSON object."""
    return {
        "version": 3,
        "federation": federation.digest,
        "round": 2,
        "peer": "ash",
        "sha256": SHA,
        "bytes": 1000,
        "base": BASE,
        "inputs": {"ash": SHA, "birch": BASE, "cedar": OTHER},
        "samples": 120,
        "score": 0.75,
        "said": {},
        "plateau": False,
        "halted": False,
        "anchor": None,
        "schema": OTHER,
        "instance": "01234567",
        "software": "hsl-node 0.1.0, torch 2.15.0",
        **changes,
    }


def line(value: Any) -> bytes:
    return canonical_json(value) + b"\n"


def refused(data: bytes) -> PeerDataError:
    with pytest.raises(PeerDataError) as refusal:
        parse_manifest(data)
    assert refusal.value.code == "manifest"
    return refusal.value


# ------------------------------------------------------------------ form

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.sampled_from(["ash", "birch", "cedar"])
said_names = st.from_regex(r"[a-z][a-z0-9_]{0,31}", fullmatch=True)
manifests = st.builds(
    Manifest,
    federation=digests,
    round=st.integers(0, 999_999),
    peer=names,
    sha256=digests,
    bytes=st.integers(0, 2**40),
    base=digests,
    inputs=st.dictionaries(names, digests),
    samples=st.integers(1, SAMPLES_MAX),
    score=st.none() | st.floats(-1e9, 1e9),
    said=st.dictionaries(said_names, st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    plateau=st.booleans(),
    halted=st.booleans(),
    anchor=st.none() | digests,
    schema=digests,
    instance=st.text(max_size=80),
    software=st.text(max_size=80),
)


@given(manifests)
def test_every_manifest_is_read_back_the_same(manifest):
    assert parse_manifest(line(manifest.content())) == manifest


def test_a_receipt_is_read_back_the_same():
    receipt = Receipt(
        federation=SHA,
        round=3,
        peer="ash",
        sha256=SHA,
        receiver="birch",
        accepted=False,
        code="size",
        text="file of 3 bytes – “short”",
    )
    assert parse_receipt(line(receipt.content())) == receipt


RECEIPT = {
    "version": 1, "federation": SHA, "round": 3, "peer": "ash", "sha256": SHA, "receiver": "birch", "accepted": True,
    "code": "accepted", "text": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"accepted": False}, {"code": "size"}, {"accepted": False, "code": ""}]
    + [{"accepted": False, "code": code} for code in ("\x1b[2J", "size\n", "a b", "Size", "größe", "../x", "s" * 21)],
)
def test_threat_20_a_receipt_whose_code_is_no_short_word_is_refused(change):
    assert parse_receipt(line(RECEIPT)).accepted
    with pytest.raises(PeerDataError, match="receipt is malformed"):
        parse_receipt(line(RECEIPT | change))


def test_every_code_that_a_receipt_may_carry_is_such_a_word():
    """Those of all errors about what a peer sent, and what `intake.py` answers besides."""
    package = Path(hsl_node.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    codes = set(re.findall(r'\bcode="([^"]*)"', text))
    codes |= set(re.findall(r'self\._answer\(\w+, "([^"]*)"', text)) | {"setup"}  # see Refusal.code
    assert {"accepted", "initial", "equivocation", "sha256", "magnitude", "halted"} <= codes
    for code in codes:
        assert parse_receipt(line(RECEIPT | {"code": code, "accepted": code == "accepted"})).code == code


def test_the_largest_federation_fits_the_size_limit(federation_of, federation):
    inputs = {f"{'p' * 29}{i:03d}": SHA for i in range(64)}
    manifest = Manifest(**content(federation, inputs=inputs, software="s" * 80, instance="i" * 80))
    identity = federation_of(3).identities[Peer("ash")]
    assert len(identity.sign(manifest.content(), MANIFEST_NAMESPACE)) < MANIFEST_MAX_BYTES / 2


@pytest.mark.parametrize(
    "respell",
    [
        lambda good: good.replace(b":", b": ", 1),
        lambda good: good.replace(b",", b", ", 1),
        lambda good: good[:-1],  # the newline is part of what is signed
        lambda good: good + b"\n",
        lambda good: b" " + good,
        lambda good: good.replace(b'"ash"', b'"\\u0061sh"', 1),
        lambda good: good.replace(b"0.75", b"0.750"),
        lambda good: good.replace(b"0.75", b"7.5e-1"),
        lambda good: good.replace(b'"round":2', b'"round":2.0'),
        lambda good: good.replace(b'"score":0.75', b'"score":1'),
        lambda good: good.replace(b'"round":2', b'"round":2,"round":2'),
        lambda good: good.replace(b'"round":2', b'"round":3,"round":2'),
        lambda good: good.decode().encode("utf-16"),
        lambda good: b"\xef\xbb\xbf" + good,
        lambda good: json.dumps(dict(reversed(json.loads(good).items())), separators=(",", ":")).encode() + b"\n",
    ],
)
def test_another_spelling_of_a_right_manifest_is_refused(federation, respell):
    good = line(content(federation))
    parse_manifest(good)
    assert respell(good) != good
    refused(respell(good))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 1),
        ("version", 2),
        ("version", 3.0),
        ("version", True),
        ("version", None),
        ("federation", "A" * 64),
        ("federation", "a" * 63),
        ("federation", "a" * 64 + "\n"),
        ("round", -1),
        ("round", 1_000_000),
        ("round", 10**400),
        ("round", "2"),
        ("round", True),
        ("peer", "../ash"),
        ("peer", "ash\n"),
        ("peer", "A"),
        ("peer", None),
        ("bytes", -1),
        ("inputs", {"../x": SHA}),
        ("inputs", {"ash": "x"}),
        ("inputs", [["ash", SHA]]),
        ("samples", 0),
        ("samples", -5),
        ("samples", SAMPLES_MAX + 1),
        ("samples", 1.5),
        ("score", -1.1e9),
        ("score", 1.1e9),
        ("score", "0.5"),
        ("score", True),
        ("plateau", 1),
        ("plateau", None),
        ("halted", 0),
        ("halted", None),
        ("anchor", ""),
        ("schema", None),
        ("software", "x" * 81),
        ("instance", 7),
        ("unknown", 1),
    ],
)
def test_threat_09_each_field_has_one_type_and_a_range(federation, key, value):
    refused(line(content(federation, **{key: value})))


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_threat_09_a_score_that_is_no_number_is_refused(federation, word):
    refused(line(content(federation)).replace(b"0.75", word.encode()))


@pytest.mark.parametrize("key", sorted(Manifest.model_fields))
def test_every_field_is_needed(federation, key):
    """All but the version, which has one value and is still spelt out."""
    fields = content(federation)
    del fields["schema" if key == "schema_" else key]
    refused(line(fields))


@pytest.mark.parametrize(("version", "shown"), [(1, "1"), (99, "99"), ("\x1b" * 99, "\\x1b"), (None, "None")])
def test_another_version_is_named_with_ours_and_with_what_to_do(federation, version, shown):
    error = refused(line(content(federation, version=version)))
    assert f"manifest of version {shown}" in error.message.replace("'", "") and "this node speaks 3" in error.message
    assert error.message.isprintable() and len(error.message) < 100
    assert "same hsl-node version at all sites" in error.remedy


def test_our_own_manifest_with_a_wrong_value_is_a_bug(federation):
    with pytest.raises(ValidationError):
        Manifest(**content(federation, samples=0))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"null\n",
        b"[]\n",
        b'"x"\n',
        b"{}\n",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
    ],
    ids=lambda data: repr(data[:10]),
)
def test_what_is_no_manifest_at_all_is_refused(data):
    refused(data)


def test_threat_20_hostile_text_is_escaped_and_capped_in_the_message(federation):
    error = refused(line(content(federation, **{"\x1b[31m\n" + "x" * 10_000: 1})))
    assert len(str(error)) < 300
    assert str(error).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([*Manifest.model_fields, "schema"]), json_values)
def test_no_json_value_in_any_field_does_more_than_be_refused(federation, key, value):
    fields = content(federation) | {key: value}
    for parse in (parse_manifest, parse_receipt):
        try:
            parse(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        except PeerDataError as error:
            assert error.code == "manifest"


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(data):
    for parse in (parse_manifest, parse_receipt):
        with pytest.raises(PeerDataError):
            parse(data)


# ------------------------------------------------------------------ the digest that later manifests name


def test_the_digest_of_a_manifest_is_the_sha256_of_the_line_that_is_signed(members, federation):
    """So a person can check it: `head -n1 FILE | sha256sum`."""
    manifest = Manifest(**content(federation))
    document = members.identities[Peer("ash")].sign(manifest.content(), MANIFEST_NAMESPACE)
    assert document.startswith(line(manifest.content()))
    assert manifest.digest == hashlib.sha256(line(content(federation))).hexdigest()


def test_a_manifest_that_is_signed_and_delivered_again_is_the_same_claim(members, federation):
    """Whatever signature stands under it: a node that crashed delivers once more, and has not lied."""
    old, new = (members.identities[Peer(name)] for name in ("ash", "birch"))  # ash replaced its key in between
    manifest = Manifest(**content(federation))
    first, again = (key.sign(manifest.content(), MANIFEST_NAMESPACE) for key in (old, new))
    keys = (new.public, old.public)
    claims = [claim_of(parse_manifest(verify(d, keys, MANIFEST_NAMESPACE))) for d in (first, again)]
    assert first != again and claims[0] == claims[1]
    assert claims[0].manifest == manifest.digest


OTHER_VALUES = {
    "sha256": OTHER, "bytes": 7, "base": OTHER, "inputs": {"ash": OTHER, "birch": BASE, "cedar": OTHER}, "samples": 121,
    "score": 0.5, "said": {"steps": 7.0}, "plateau": True, "halted": True, "anchor": SHA, "schema": SHA,
    "instance": "x", "software": "x", "federation": SHA, "round": 3, "peer": "birch",
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(OTHER_VALUES))
def test_any_other_value_in_any_field_is_another_claim(federation, key):
    """Also one that the round machine does not read: a manifest has one digest for all peers."""
    right, other = (Manifest(**content(federation, **c)) for c in ({}, {key: OTHER_VALUES[key]}))
    assert right.digest != other.digest
    assert claim_of(right) != claim_of(other)


def test_no_field_is_left_out_of_the_digest():
    assert set(OTHER_VALUES) == {"schema" if k == "schema_" else k for k in Manifest.model_fields} - {"version"}


def test_the_claim_says_what_the_manifest_says(federation):
    claim = claim_of(Manifest(**content(federation, round=3, plateau=True)))
    assert (claim.peer, claim.round, claim.sha256, claim.base) == ("ash", 3, SHA, BASE)
    assert (claim.inputs, claim.samples) == ({"ash": SHA, "birch": BASE, "cedar": OTHER}, 120)
    assert (claim.plateau, claim.statement, claim.halted) == (True, False, False)
    stopped = claim_of(Manifest(**statement(federation, 3, halted=True)))
    assert (stopped.plateau, stopped.statement, stopped.halted) == (False, True, True)


# ------------------------------------------------------------------ against sender, federation and round


def statement(federation, round: int, **changes: Any) -> dict[str, Any]:
    inputs = {} if round < 2 else {p: SHA for p in federation.peers}
    return content(federation, round=round, bytes=0, sha256=BASE, base=BASE, inputs=inputs, **changes)


def verdict(federation, fields: dict[str, Any], /, *, sender: str = "ash", current: int = 2, **name: Any) -> str:
    """The code with which `check` refuses, or "accepted". `name` changes the file name only."""
    manifest = Manifest(**fields)
    file_name = Manifest(**{**fields, **name}).file_name()
    try:
        check(manifest, file_name, federation, Peer(sender), current)
    except PeerDataError as error:
        return error.code
    return "accepted"


def test_a_right_manifest_passes(federation):
    assert verdict(federation, content(federation)) == "accepted"


def test_the_name_of_a_receipt_or_data_file_stands_for_the_same_checkpoint(federation):
    manifest = Manifest(**content(federation))
    for kind in Kind:
        check(manifest, manifest.file_name().of(kind), federation, Peer("ash"), 2)


def test_threat_14_a_peer_cannot_deliver_for_another(federation):
    assert verdict(federation, content(federation, peer="birch")) == "owner"
    assert verdict(federation, content(federation), sender="birch") == "owner"
    assert verdict(federation, content(federation), peer="birch") == "owner"


def test_threat_10_a_manifest_of_another_federation_is_refused(federation):
    assert verdict(federation, content(federation, federation=OTHER)) == "federation"
    twin = federation.digest[:8] + OTHER[8:]  # the short hash alone does not count
    assert verdict(federation, content(federation, federation=twin)) == "federation"


@pytest.mark.parametrize("name", [{"federation": OTHER}, {"round": 3}, {"sha256": OTHER}])
def test_threat_14_name_and_manifest_must_agree(federation, name):
    assert verdict(federation, content(federation), **name) == "name"


@pytest.mark.parametrize(
    ("current", "code"), [(0, "round"), (1, "accepted"), (2, "accepted"), (3, "round"), (9, "round")]
)
def test_threat_10_only_this_round_and_the_next_are_accepted(federation, current, code):
    assert verdict(federation, content(federation), current=current) == code


def test_threat_10_nothing_comes_after_the_round_after_the_last(federation):
    assert verdict(federation, statement(federation, 6), current=6) == "accepted"
    assert verdict(federation, statement(federation, 7), current=6) == "round"


def test_round_0_is_a_statement(federation):
    assert verdict(federation, statement(federation, 0), current=0) == "accepted"
    assert verdict(federation, {**statement(federation, 0), "bytes": 10}, current=0) == "manifest"


@pytest.mark.parametrize("round", [1, 2, 6])
def test_a_peer_may_stop_in_any_round_and_say_so(federation, round):
    assert verdict(federation, statement(federation, round, halted=True), current=round) == "accepted"


@pytest.mark.parametrize(
    ("round", "code"), [(1, "halted"), (2, "halted"), (4, "halted"), (5, "accepted"), (6, "accepted")]
)
def test_a_statement_that_does_not_say_halted_says_that_the_run_ended_which_the_plan_must_allow(
    federation, round, code
):
    """Five rounds; three without improvement after a first one are a plateau: the run may end after round 4 or 5."""
    assert verdict(federation, statement(federation, round), current=round) == code


@pytest.mark.parametrize(("plateau_rounds", "earliest"), [(1, 3), (4, 6), (5, 6), (100, 6)])
def test_the_earliest_end_follows_from_the_plan(federation_of, plateau_rounds, earliest):
    plan = Plan(method="fedavg", rounds=5, plateau_rounds=plateau_rounds)
    federation = federation_of(3, plan=plan).federation
    verdicts = [verdict(federation, statement(federation, r), current=r) for r in range(1, 7)]
    assert verdicts == ["halted"] * (earliest - 1) + ["accepted"] * (7 - earliest)


@pytest.mark.parametrize("round", [1, 2, 6])
def test_a_peer_that_halted_has_no_checkpoint_of_that_round(federation, round):
    inputs = {} if round < 2 else content(federation)["inputs"]
    fields = content(federation, round=round, inputs=inputs, halted=True)
    assert verdict(federation, fields, current=round) == "halted"


def test_nobody_halts_before_the_first_round(federation):
    assert verdict(federation, statement(federation, 0, halted=True), current=0) == "halted"


def test_a_statement_names_its_base_and_no_checkpoint(federation):
    assert verdict(federation, statement(federation, 0) | {"sha256": OTHER}, current=0) == "manifest"


@pytest.mark.parametrize("round", [0, 1])
def test_the_first_rounds_have_no_earlier_inputs(federation, round):
    fields = content(federation, round=round) if round else statement(federation, 0)
    assert verdict(federation, {**fields, "inputs": {}}, current=round) == "accepted"
    assert verdict(federation, {**fields, "inputs": {"ash": SHA}}, current=round) == "manifest"


@pytest.mark.parametrize("inputs", [{}, {"ash": SHA}, {p: SHA for p in ("ash", "birch", "cedar", "durmast")}])
def test_later_rounds_name_the_full_set_of_their_last_fusion(federation, inputs):
    assert verdict(federation, content(federation, inputs=inputs)) == "manifest"


# ------------------------------------------------------------------ the same setup everywhere


def test_the_same_anchor_and_architecture_pass(federation):
    manifest = Manifest(**content(federation, anchor=SHA))
    require_same_setup(manifest, anchor=SHA, schema=OTHER, software="here")


@pytest.mark.parametrize(("theirs", "ours"), [(None, SHA), (SHA, None), (SHA, BASE)])
def test_threat_28_another_anchor_set_is_named(federation, theirs, ours):
    with pytest.raises(FederationMismatch, match="ash uses anchor set"):
        require_same_setup(Manifest(**content(federation, anchor=theirs)), anchor=ours, schema=OTHER, software="here")


def test_threat_28_another_architecture_is_named_with_both_versions_and_without_control_characters(federation):
    manifest = Manifest(**content(federation, software="torch 1\x1b[31m"))
    with pytest.raises(FederationMismatch, match="another architecture") as mismatch:
        require_same_setup(manifest, anchor=None, schema=SHA, software="torch 2")
    assert "torch 1\\x1b" in mismatch.value.message
    assert "torch 2" in mismatch.value.message
