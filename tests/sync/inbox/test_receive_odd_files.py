"""Taking in what a peer delivered: files of odd names, kinds and sizes, and too many of them."""

from __future__ import annotations

import os

import pytest
from inbox_site import BIRCH, Site

from hsl_node.errors import LocalStateError
from hsl_node.federation.names import Kind
from hsl_node.sync.inbox import receive
from hsl_node.sync.inbox.receive import Arrival, Refusal
from hsl_node.sync.manifest import MANIFEST_MAX_BYTES
from hsl_node.sync.store import plain_files


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
