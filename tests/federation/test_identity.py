"""The node's key, and signatures that stock OpenSSH understands, both ways."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import asyncssh
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsl_node.errors import LocalStateError, NotInitialised, PeerDataError
from hsl_node.federation import identity
from hsl_node.federation.identity import MANIFEST_NAMESPACE, RECEIPT_NAMESPACE, verify
from hsl_node.federation.names import Peer
from hsl_node.federation.strings import fingerprint, read_aloud

STATEMENT = {"peer": "ash", "round": 3, "text": "zwölf"}

needs_ssh_keygen = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="OpenSSH's ssh-keygen is not installed"
)


@pytest.fixture(scope="module")
def ash(federation_of):
    return federation_of(2).identities[Peer("ash")]


@pytest.fixture(scope="module")
def birch(federation_of):
    return federation_of(2).identities[Peer("birch")]


def require_refused(document: bytes, public: str, namespace: str = MANIFEST_NAMESPACE) -> None:
    with pytest.raises(PeerDataError) as refusal:
        verify(document, public, namespace)
    assert refusal.value.code == "signature"


# ------------------------------------------------------------------ the key file


def test_a_new_key_is_private_to_its_owner_and_read_back_the_same(tmp_path):
    made = identity.generate(tmp_path / "keys" / "node_ed25519")
    assert (tmp_path / "keys" / "node_ed25519").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    read = identity.load(tmp_path / "keys" / "node_ed25519")
    assert read.public == made.public
    assert read.public.startswith("ssh-ed25519 AAAA")
    assert read.fingerprint == fingerprint(made.public)


def test_an_existing_key_is_never_overwritten(tmp_path):
    """The other hospitals have pinned it."""
    identity.generate(tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(LocalStateError):
        identity.generate(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before
    assert os.listdir(tmp_path) == ["key"]


def test_a_crash_while_the_key_is_made_leaves_no_half_a_key(tmp_path, monkeypatch):
    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            identity.generate(tmp_path / "key")
    assert not (tmp_path / "key").exists()
    identity.generate(tmp_path / "key")
    assert identity.load(tmp_path / "key").public


def test_a_missing_key_says_what_to_run(tmp_path):
    with pytest.raises(NotInitialised) as missing:
        identity.load(tmp_path / "key")
    assert "hsl-node init" in missing.value.remedy


def test_a_key_missing_where_a_node_was_initialised_comes_from_a_backup_and_is_never_made_anew(tmp_path):
    (tmp_path / "node.toml").touch()
    with pytest.raises(NotInitialised) as missing:
        identity.load(tmp_path / "keys" / "node_ed25519")
    remedy = missing.value.remedy
    assert f"tar -xf BACKUP -C {tmp_path} keys/node_ed25519" in remedy and "systemd" in remedy
    assert "hsl-node init" not in remedy


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_may_read_is_not_used(tmp_path, mode):
    identity.generate(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(LocalStateError) as refusal:
        identity.load(tmp_path / "key")
    assert "chmod 600" in refusal.value.remedy


def test_a_key_handed_over_by_systemd_may_be_read_by_its_group_but_not_by_the_world(tmp_path, monkeypatch):
    """LoadCredential= shows files as 0440; the group bits are an access list's mask."""
    made = identity.generate(tmp_path / "node.key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "node.key").chmod(0o440)
    assert identity.load(tmp_path / "node.key").public == made.public
    (tmp_path / "node.key").chmod(0o444)
    with pytest.raises(LocalStateError):
        identity.load(tmp_path / "node.key")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\0",
        b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
        asyncssh.generate_private_key("ecdsa-sha2-nistp256").export_private_key(),
        asyncssh.generate_private_key("ssh-ed25519").export_private_key(passphrase="secret"),
        asyncssh.generate_private_key("ssh-ed25519").export_public_key(),
    ],
    ids=["empty", "binary", "torn", "ecdsa", "passphrase", "public"],
)
def test_what_is_no_plain_ed25519_key_is_named_with_its_file(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(LocalStateError, match="key"):
        identity.load(tmp_path / "key")


# ------------------------------------------------------------------ signing


def test_a_signed_document_gives_back_its_line(ash):
    document = ash.sign(STATEMENT, MANIFEST_NAMESPACE)
    assert verify(document, ash.public, MANIFEST_NAMESPACE) == b'{"peer":"ash","round":3,"text":"zw\\u00f6lf"}\n'


def test_signing_the_same_twice_gives_the_same_bytes(ash):
    assert ash.sign(STATEMENT, MANIFEST_NAMESPACE) == ash.sign(STATEMENT, MANIFEST_NAMESPACE)


def test_threat_14_another_peers_key_does_not_verify(ash, birch):
    require_refused(birch.sign(STATEMENT, MANIFEST_NAMESPACE), ash.public)


def test_threat_14_a_receipt_is_no_manifest(ash):
    """The same bytes under another purpose: a signature can't be carried over."""
    require_refused(ash.sign(STATEMENT, RECEIPT_NAMESPACE), ash.public)


def test_threat_14_a_signature_does_not_fit_another_line(ash):
    document = ash.sign(STATEMENT, MANIFEST_NAMESPACE)
    require_refused(document.replace(b'"round":3', b'"round":4'), ash.public)
    require_refused(document.replace(b'{"peer"', b'{ "peer"'), ash.public)
    require_refused(b"\n" + document, ash.public)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\n",
        b"{}\n",
        b"{}",
        b"{}\n-----BEGIN SSH SIGNATURE-----\n-----END SSH SIGNATURE-----\n",
        b"{}\n-----BEGIN SSH SIGNATURE-----\nU1NIU0lH\n-----END SSH SIGNATURE-----\n",
        b"{}\n-----BEGIN SSH SIGNATURE-----\n!!!!\n-----END SSH SIGNATURE-----\n",
        b"{}\n\xff\xfe\0",
    ],
)
def test_what_is_no_signature_is_refused(ash, document):
    require_refused(document, ash.public)


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(ash, data):
    require_refused(data, ash.public)
    require_refused(b"{}\n" + data, ash.public)


@given(st.data())
@settings(max_examples=200)
def test_threat_14_no_changed_byte_passes_as_another_statement(ash, data):
    document = bytearray(ash.sign(STATEMENT, MANIFEST_NAMESPACE))
    at = data.draw(st.integers(0, len(document) - 1))
    document[at] ^= data.draw(st.integers(1, 255))
    require_refused(bytes(document), ash.public)


# ------------------------------------------------------------------ one signature, one spelling


def rewritten(document: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The same document with what `change` made of its signature without the armour."""
    line, signature = document.split(b"\n", 1)
    raw = base64.b64decode(b"".join(signature.split(b"\n")[1:-2]))
    return line + b"\n" + wrapped(change(raw), 70)


def wrapped(raw: bytes, width: int) -> bytes:
    text = base64.b64encode(raw)
    lines = [text[i : i + width] for i in range(0, len(text), width)]
    return b"\n".join([b"-----BEGIN SSH SIGNATURE-----", *lines, b"-----END SSH SIGNATURE-----", b""])


def rearmoured(width: int) -> Callable[[bytes], bytes]:
    def change(document: bytes) -> bytes:
        line, signature = document.split(b"\n", 1)
        return line + b"\n" + wrapped(base64.b64decode(b"".join(signature.split(b"\n")[1:-2])), width)

    return change


def unarmoured(document: bytes) -> bytes:
    line, signature = document.split(b"\n", 1)
    return line + b"\n" + base64.b64decode(b"".join(signature.split(b"\n")[1:-2]))


def string(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def with_something_reserved(document: bytes) -> bytes:
    """The field between namespace and hash says nothing, and what is signed does not hold it."""
    before, after = string(MANIFEST_NAMESPACE.encode()) + string(b""), string(b"sha512")
    space = string(MANIFEST_NAMESPACE.encode()) + string(b"anything")
    return rewritten(document, lambda raw: raw.replace(before + after, space + after))


def in_a_certificate(document: bytes) -> bytes:
    """Anybody can certify anybody's public key."""
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    raw = base64.b64decode(b"".join(document.split(b"\n")[2:-2]))
    length = int.from_bytes(raw[10:14], "big")
    key = asyncssh.import_public_key(b"ssh-ed25519 " + base64.b64encode(raw[14 : 14 + length]))
    certificate = stranger.generate_user_certificate(key, "signer", principals=["signer"])
    return rewritten(document, lambda raw: raw[:10] + string(certificate.public_data) + raw[14 + length :])


OTHER_SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "without armour": unarmoured,
    "lines of 64": rearmoured(64),
    "one line": rearmoured(1000),
    "carriage returns": lambda d: d.split(b"\n", 1)[0] + b"\n" + d.split(b"\n", 1)[1].replace(b"\n", b"\r\n"),
    "a byte more": lambda d: d + b"x",
    "an empty line more": lambda d: d + b"\n",
    "without the last line end": lambda d: d[:-1],
    "a comment behind": lambda d: d + b"\xe2\x9c\x93 received, thanks\n",
    "a space at a line's end": lambda d: d.replace(b"SIGNATURE-----\n", b"SIGNATURE----- \n", 1),
    "something in the reserved field": with_something_reserved,
    "the key in a certificate": in_a_certificate,
}


@pytest.mark.parametrize("change", OTHER_SPELLINGS.values(), ids=OTHER_SPELLINGS.keys())
def test_threat_11_a_copy_in_another_spelling_is_no_second_document(ash, change):
    """It would make a liar of who signed one thing only: what is compared is the sha256 of documents."""
    document = ash.sign(STATEMENT, MANIFEST_NAMESPACE)
    copy = change(document)
    assert copy != document
    require_refused(copy, ash.public)


def test_the_one_spelling_is_that_of_asyncssh(ash):
    document = ash.sign(STATEMENT, MANIFEST_NAMESPACE)
    line, signature = document.split(b"\n", 1)
    assert signature == asyncssh.create_sshsig(ash.key, line + b"\n", namespace=MANIFEST_NAMESPACE)
    assert rewritten(document, lambda raw: raw) == document


def test_during_a_change_of_keys_both_spellings_count(ash, birch):
    for key in (ash, birch):
        assert verify(key.sign(STATEMENT, MANIFEST_NAMESPACE), (ash.public, birch.public), MANIFEST_NAMESPACE)


# ------------------------------------------------------------------ with stock OpenSSH


@needs_ssh_keygen
def test_stock_ssh_keygen_verifies_our_documents(tmp_path, ash):
    document = ash.sign(STATEMENT, MANIFEST_NAMESPACE)
    assert keygen_verify(tmp_path, document, ash.public, MANIFEST_NAMESPACE).returncode == 0
    assert keygen_verify(tmp_path, document, ash.public, RECEIPT_NAMESPACE).returncode != 0
    forged = document.replace(b'"round":3', b'"round":4')
    assert keygen_verify(tmp_path, forged, ash.public, MANIFEST_NAMESPACE).returncode != 0


def keygen_verify(folder: Path, document: bytes, public: str, namespace: str) -> subprocess.CompletedProcess[bytes]:
    """As the docstring of identity.py tells an auditor to do it."""
    line, _, signature = document.partition(b"\n")
    (folder / "allowed_signers").write_text(f"ash {public}\n")
    (folder / "signature").write_bytes(signature)
    command = ["ssh-keygen", "-Y", "verify", "-f", "allowed_signers", "-I", "ash", "-n", namespace, "-s", "signature"]
    return subprocess.run(command, cwd=folder, input=line + b"\n", capture_output=True, timeout=60)


@needs_ssh_keygen
def test_a_key_and_signature_of_stock_ssh_keygen_are_understood(tmp_path):
    """A site may make its node key with OpenSSH. Both write the same bytes: there is one spelling."""
    run = {"cwd": tmp_path, "check": True, "capture_output": True, "timeout": 60}
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "it@mercy", "-f", "key"], **run)
    loaded = identity.load(tmp_path / "key")
    assert (tmp_path / "key.pub").read_text().startswith(loaded.public)
    sign = ["ssh-keygen", "-q", "-Y", "sign", "-f", "key", "-n", MANIFEST_NAMESPACE]
    document = b'{"a":1}\n' + subprocess.run(sign, input=b'{"a":1}\n', **run).stdout
    assert document == loaded.sign({"a": 1}, MANIFEST_NAMESPACE)
    assert verify(document, loaded.public, MANIFEST_NAMESPACE) == b'{"a":1}\n'


@needs_ssh_keygen
def test_fingerprints_are_those_of_ssh_keygen(tmp_path, ash):
    (tmp_path / "key.pub").write_text(ash.public + "\n")
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(tmp_path / "key.pub")], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert shown.split()[1] == ash.fingerprint


def test_the_words_for_the_telephone_are_five_groups_of_four(ash, birch):
    assert [len(group) for group in read_aloud(ash.public).split(" ")] == [4] * 5
    assert read_aloud(ash.public) != read_aloud(birch.public)
