"""The chain of key updates: which keys of a peer count, and which update is none."""

from __future__ import annotations

import json

import pytest
from federations import ASH, BIRCH, make_federation, stranger
from key_change import announced

from hsl_node.errors import (
    FederationMismatch,
    PeerDataError,
    UsageError,
)
from hsl_node.federation import keyring
from hsl_node.federation.identity import MANIFEST_NAMESPACE
from hsl_node.federation.keyring import Keyring, KeyringFile, require_mine, sign_update


def test_both_keys_count_in_the_overlap_and_the_new_one_alone_after_it() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    old, new = members.federation.get("birch").key, stranger().public
    taken = ring.updating(document)
    assert (ring.keys(BIRCH), taken.keys(BIRCH), taken.finishing(BIRCH).keys(BIRCH)) == ((old,), (new, old), (new,))
    assert taken.finishing(BIRCH).chain(BIRCH) == (new, old), "what the old key signed can still be checked"
    assert taken.host_keys(members.federation.get("birch")) == (new, old)
    assert taken.keys(ASH) == ring.keys(ASH)


def test_the_federations_hash_is_that_of_the_file_whatever_happens_to_keys() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    assert ring.updating(document).federation.digest == members.federation.digest


def test_a_second_change_follows_the_first_and_is_signed_by_its_key() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    ring = ring.updating(document).finishing(BIRCH)
    forged = sign_update(ring, BIRCH, members.identities[BIRCH], stranger(1).public)
    with pytest.raises(PeerDataError, match="its key here is"):
        ring.updating(forged)
    ring = ring.updating(sign_update(ring, BIRCH, stranger(), stranger(1).public))
    assert ring.keys(BIRCH) == (stranger(1).public, stranger().public)
    again = Keyring.of(members.federation, KeyringFile.model_validate(ring.file.model_dump(mode="json")))
    assert again == ring, "read from its file"


@pytest.mark.parametrize("signer", ["ash", "stranger"])
def test_an_update_that_another_key_signed_is_refused(signer: str) -> None:
    members = make_federation(3)
    ring, _ = announced(members)
    key = members.identities[ASH] if signer == "ash" else stranger()
    content = {"version": 1, "federation": members.federation.digest, "peer": "birch", "number": 1,
               "old": members.federation.get("birch").key, "new": stranger(1).public}  # fmt: skip
    forged = key.sign(content, keyring.UPDATE_NAMESPACE).decode()
    with pytest.raises(PeerDataError, match="signature"):
        ring.updating(forged)


def test_a_document_signed_for_another_purpose_is_no_update() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    line = json.loads(document.partition("\n")[0])
    with pytest.raises(PeerDataError, match="signature"):
        ring.updating(members.identities[BIRCH].sign(line, MANIFEST_NAMESPACE).decode())


def test_an_update_of_another_federation_counts_nowhere_else() -> None:
    other = Keyring.of(make_federation(3, name="another grove").federation)
    members = make_federation(3)
    ring, document = announced(members, other)
    with pytest.raises(FederationMismatch, match="was made for"):
        Keyring.of(members.federation).updating(document)
    moved = Keyring.of(members.federation, ring.updating(document).file)
    assert moved.keys(BIRCH) == (members.federation.get("birch").key,)


def test_the_key_of_somebody_else_cannot_be_announced() -> None:
    members = make_federation(3)
    ring = Keyring.of(members.federation)
    document = sign_update(ring, BIRCH, members.identities[BIRCH], members.federation.get("ash").key)
    with pytest.raises(PeerDataError, match="is or was ash's"):
        ring.updating(document)


def test_one_number_has_one_update() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    second = sign_update(ring, BIRCH, members.identities[BIRCH], stranger(1).public)
    taken = ring.updating(document)
    with pytest.raises(UsageError, match="already"):
        taken.updating(document)
    with pytest.raises(UsageError, match="another one"):
        taken.updating(second)


@pytest.mark.parametrize("document", ["", "{}", "[]\n", '{"version": 1}\nx', "\x00", "x" * 100_000, "[" * 5000])
def test_what_is_no_update_is_said_so(document: str) -> None:
    with pytest.raises(PeerDataError, match="not a key update"):
        Keyring.of(make_federation(3).federation).updating(document)


@pytest.mark.parametrize(
    "tail", ["\u2713", "\u0661", " ", "\n", "\u2028", "\x85", "\x1b[8m", "x", "-----END SSH SIGNATURE-----\n"]
)
@pytest.mark.parametrize("where", ["at the end", "before the end line", "in the line"])
def test_an_update_has_one_spelling_and_nothing_behind_it(tail: str, where: str) -> None:
    """It was kept as it came: one letter that is not ASCII, and `verify --export` wrote nothing any more."""
    members = make_federation(3)
    ring, document = announced(members)
    changed = {
        "at the end": document + tail,
        "before the end line": document.replace("\n-----END", tail + "\n-----END"),
        "in the line": document.replace("}\n", "}" + tail + "\n", 1),
    }[where]
    with pytest.raises(PeerDataError, match=r"not a key update|signature"):
        ring.updating(changed)
    assert ring.updating(document).keys(BIRCH)


def test_a_node_finds_itself_by_its_key() -> None:
    members = make_federation(3)
    require_mine(Keyring.of(members.federation), "birch", members.identities[BIRCH].public)


@pytest.mark.parametrize("name", ["birch", "oak"])
def test_a_node_whose_key_is_not_listed_does_not_join(name: str) -> None:
    with pytest.raises(FederationMismatch, match="does not appear"):
        require_mine(Keyring.of(make_federation(3).federation), name, stranger().public)


@pytest.mark.parametrize("name", ["ash", "oak"])
def test_a_node_listed_under_another_name_does_not_join(name: str) -> None:
    members = make_federation(3)
    with pytest.raises(FederationMismatch, match=rf"'birch'.*'{name}'") as caught:
        require_mine(Keyring.of(members.federation), name, members.identities[BIRCH].public)
    assert "never go on as birch" in caught.value.remedy, (
        "the key may be another hospital's: the name must not follow it"
    )
