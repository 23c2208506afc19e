"""The backup file: what is in it, what is refused, and that nothing half-made is left."""

from __future__ import annotations

import errno
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from backups import PLAN, members, repacked
from cluster import Cluster
from typer.testing import CliRunner

from hsl_node.admin import archive, backup, enrol, rotate
from hsl_node.cli import main
from hsl_node.commands.app import app
from hsl_node.errors import (
    AlreadyRunning,
    ConfigError,
    FederationMismatch,
    HslError,
    LocalStateError,
    NotInitialised,
    UsageError,
)
from hsl_node.federation import identity, node_toml
from hsl_node.federation.config import AnchorCard
from hsl_node.federation.names import Digest, Round
from hsl_node.host import durable
from hsl_node.host.layout import Layout
from hsl_node.node.heal import mark as recover_mark
from hsl_node.status import last_words
from hsl_node.sync.store import models
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import Store


def test_a_backup_beside_the_running_daemon_holds_what_cannot_be_made_anew(lived: Path, tmp_path: Path) -> None:
    file = lived / "ash.tar"
    assert file.stat().st_mode & 0o777 == 0o600
    with tarfile.open(file) as tar:
        names = tar.getnames()
        assert all(m.isreg() and m.mode == 0o600 for m in tar.getmembers())
    assert names[0] == "backup.json"
    assert {"node.toml", "federation.toml", "splits.json", "journal.sqlite3", "keys/node_ed25519"} < set(names)
    assert "fused/r000002.safetensors" in names, "the last fused model"
    assert [name for name in names if "own_" in name] == ["trainer/own_r000002.safetensors"], "nobody else has it"
    assert not list(lived.glob(".hsl-node-backup-*")), "nothing is left beside it"


def test_what_is_restored_is_what_was_there_and_is_marked(lived: Path, tmp_path: Path) -> None:
    made = backup.restore(tmp_path / "new", lived / "ash.tar")
    assert (made.node, made.has_key) == ("ash", True)
    for name in ("node.toml", "federation.toml", "splits.json", "keys/node_ed25519", "fused/r000002.safetensors",
                 "trainer/own_r000002.safetensors"):  # fmt: skip
        assert (tmp_path / "new" / name).read_bytes() == (lived / "ash" / name).read_bytes()
    assert (tmp_path / "new" / "keys" / "node_ed25519").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    store = Store(Layout(tmp_path / "new"))
    mark = recover_mark.find_mark(store.journal)
    assert mark is not None and "restored from a backup" in mark.why
    assert store.journal.last_signed() == 3
    assert last_words.find_ending(store.journal) is None, (
        "no daemon has run there; that of the backup's journal still did"
    )
    store.close()
    assert not Layout(tmp_path / "new").restoring.exists()


def test_without_the_key_it_holds_none_and_waits_for_it(lived: Path, tmp_path: Path) -> None:
    made, _ = backup.backup(lived / "ash", tmp_path / "open.tar", with_key=False)
    assert not made.has_key
    assert (
        identity.load(Layout(lived / "ash").key).key.export_private_key("openssh")
        not in (tmp_path / "open.tar").read_bytes()
    )
    state = tmp_path / "new"
    (state / "keys").mkdir(parents=True)
    shutil.copy(lived / "ash" / "keys" / "node_ed25519", state / "keys")
    backup.restore(state, tmp_path / "open.tar")
    assert identity.load(Layout(state).key).public == identity.load(Layout(lived / "ash").key).public


def test_another_nodes_key_in_place_is_refused_and_stays(lived: Path, tmp_path: Path) -> None:
    backup.backup(lived / "ash", tmp_path / "open.tar", with_key=False)
    other = identity.generate(Layout(tmp_path / "new").key)
    with pytest.raises(HslError):
        backup.restore(tmp_path / "new", tmp_path / "open.tar")
    assert identity.load(Layout(tmp_path / "new").key).public == other.public
    assert not (tmp_path / "new" / "node.toml").exists()


@pytest.fixture
def changing(tmp_path: Path) -> Path:
    """A state directory between `key rotate` and `key rotate --finish`."""
    with Cluster(tmp_path / "changing", ("ash", "birch"), PLAN) as cluster:
        rotate.begin(cluster.layout("ash").state)
        return cluster.layout("ash").state


def test_a_key_change_goes_on_from_a_backup_that_was_made_in_its_midst(changing: Path, tmp_path: Path) -> None:
    update = rotate.begin(changing).update
    made, _ = backup.backup(changing, tmp_path / "ash.tar")
    assert made.has_key and archive.NEXT in made.files
    backup.restore(tmp_path / "new", tmp_path / "ash.tar")
    assert (tmp_path / "new" / archive.NEXT).read_bytes() == (changing / archive.NEXT).read_bytes()
    assert (tmp_path / "new" / archive.NEXT).stat().st_mode & 0o777 == 0o600
    assert rotate.begin(tmp_path / "new").update == update
    assert not rotate.finish(tmp_path / "new", force=True)
    assert identity.load(Layout(tmp_path / "new").key).public == update.new


def test_a_backup_from_before_these_held_the_new_key_is_restored_and_its_change_not_finished_with_another(
    changing: Path, tmp_path: Path
) -> None:
    backup.backup(changing, tmp_path / "ash.tar")
    older = repacked(tmp_path / "ash.tar", tmp_path / "older.tar", without_next)
    backup.restore(tmp_path / "new", older)
    before = (tmp_path / "new" / archive.KEY).read_bytes()
    for force in (False, True):
        with pytest.raises(LocalStateError, match="is not there"):
            rotate.finish(tmp_path / "new", force=force)
    shutil.copy(changing / archive.NEXT, tmp_path / "new" / archive.NEXT)
    assert (tmp_path / "new" / archive.KEY).read_bytes() == before
    assert not rotate.finish(tmp_path / "new", force=True)


def test_a_change_that_is_finished_in_the_midst_of_a_backup_leaves_the_new_key_in_it(
    changing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = rotate.begin(changing).update
    finished = []

    def opened(path: Path, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115  (backup closes it)
        if path.parent.name == "keys" and not finished:
            finished.append(rotate.finish(changing, force=True))
        return file

    with monkeypatch.context() as patch:
        patch.setattr(backup, "open", opened, raising=False)
        backup.backup(changing, tmp_path / "ash.tar")
    backup.restore(tmp_path / "new", tmp_path / "ash.tar")
    assert finished and not rotate.finish(tmp_path / "new", force=True)
    assert identity.load(Layout(tmp_path / "new").key).public == update.new


def test_without_keys_it_holds_neither_and_waits_for_both(changing: Path, tmp_path: Path) -> None:
    made, _ = backup.backup(changing, tmp_path / "open.tar", with_key=False)
    assert not [name for name in made.files if name.startswith("keys/")]
    shutil.copytree(changing / "keys", tmp_path / "new" / "keys")
    backup.restore(tmp_path / "new", tmp_path / "open.tar")
    for name in (archive.KEY, archive.NEXT):
        assert (tmp_path / "new" / name).read_bytes() == (changing / name).read_bytes()
    (changing / archive.KEY).rename(tmp_path / "credential")  # with systemd, against its page: moved away too early
    said = CliRunner().invoke(app, ["--state", str(changing), "backup", str(tmp_path / "half.tar")]).output
    assert "PRIVATE KEY" in said and "not in it: the private key" in said
    assert archive.read_index(tmp_path / "half.tar").files.keys() >= {archive.NEXT}


def without_next(name: str, content: bytes) -> bytes | None:
    """As an older hsl-node wrote it."""
    if name != "backup.json":
        return None if name == archive.NEXT else content
    index = json.loads(content)
    del index["files"][archive.NEXT]
    return json.dumps(index).encode()


def flipped(name: str, content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1]) if name == "journal.sqlite3" else content


def without_splits(name: str, content: bytes) -> bytes | None:
    return None if name == "splits.json" else content


def renewed(version: int) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        return json.dumps({**json.loads(content), "version": version}).encode() if name == "backup.json" else content

    return change


def with_evil_name(name: str, content: bytes) -> bytes:
    if name != "backup.json":
        return content
    index = json.loads(content)
    index["files"]["../evil"] = index["files"]["node.toml"]
    return json.dumps(index).encode()


BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a bit flipped": (lambda old, new: repacked(old, new, flipped), "sha256"),
    "cut short": (lambda old, new: new.write_bytes(old.read_bytes()[: old.stat().st_size // 2]), "damaged"),
    "a member missing": (
        lambda old, new: repacked(old, new, lambda n, c: None if n == "splits.json" else c),
        "missing",
    ),
    "newer": (lambda old, new: repacked(old, new, renewed(2)), "newer hsl-node"),
    "a path that leads out": (lambda old, new: repacked(old, new, with_evil_name), "no backup holds"),
    "no tar": (lambda old, new: new.write_bytes(b"not a tar" * 1000), "no backup"),
    "empty": (lambda old, new: new.write_bytes(b""), "no backup"),
    "another tar": (lambda old, new: tarfile.open(new, "w").close(), "no backup"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_foreign_damaged_or_newer_file_is_refused_and_nothing_is_left(lived: Path, tmp_path: Path, what: str) -> None:
    make, says = BROKEN[what]
    make(lived / "ash.tar", tmp_path / "broken.tar")
    with pytest.raises(LocalStateError) as refused:
        backup.restore(tmp_path / "new", tmp_path / "broken.tar")
    assert says in refused.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["broken.tar"]


def test_a_backup_of_the_version_before_is_restored(lived: Path, tmp_path: Path) -> None:
    """It was written in another of tar's formats."""
    with tarfile.open(tmp_path / "old.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members(lived / "ash.tar"):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    assert backup.restore(tmp_path / "new", tmp_path / "old.tar").node == "ash"


def test_more_than_the_disk_has_room_for_is_refused_beforehand(
    lived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=1000))
    with pytest.raises(LocalStateError, match=r"has room for 1\.0 kB"):
        backup.restore(tmp_path / "new" / "state", lived / "ash.tar")
    assert asked == [tmp_path] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["splits.json", "notes.txt", "keys/node_ed25519", "fused/x", ".restore", "link"])
def test_a_directory_that_is_not_empty_is_refused_and_what_lies_there_named(
    lived: Path, tmp_path: Path, name: str
) -> None:
    state = tmp_path / "new"
    (state / name).parent.mkdir(parents=True)
    if name == "link":
        (state / name).symlink_to(tmp_path)
    else:
        (state / name).write_text("kept")
    with pytest.raises(UsageError, match="is not empty") as refused:
        backup.restore(state, lived / "ash.tar")
    assert refused.value.exit_code == 2 and f"({name})" in refused.value.message
    assert [p for p in state.rglob("*") if not p.is_dir() or p.is_symlink()] == [state / name]
    (state / name).unlink()
    backup.restore(state, lived / "ash.tar")


def test_of_a_full_directory_only_some_files_are_named(lived: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for number in range(20):
        (tmp_path / "new" / f"{number}\x1b[2J").touch()
    with pytest.raises(UsageError) as refused:
        backup.restore(tmp_path / "new", lived / "ash.tar")
    assert refused.value.message.count("x1b[2J") == backup.FOUND_SHOWN and ", ...)" in refused.value.message
    assert refused.value.message.isprintable()


def test_a_state_directory_that_holds_a_node_is_not_touched(lived: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (lived / "ash").rglob("*")}
    with pytest.raises(UsageError, match="holds a node already"):
        backup.restore(lived / "ash", lived / "ash.tar")
    assert {p: p.stat().st_mtime_ns for p in (lived / "ash").rglob("*")} == before


def test_a_directory_that_a_daemon_holds_is_refused(lived: Path, tmp_path: Path) -> None:
    store = Store(Layout(tmp_path / "new"))
    for path in (tmp_path / "new").glob("journal.sqlite3*"):
        path.unlink()
    with pytest.raises(AlreadyRunning):
        backup.restore(tmp_path / "new", lived / "ash.tar")
    assert not (tmp_path / "new" / "node.toml").exists()
    store.close()


def test_a_restore_that_was_cut_short_can_be_made_again(lived: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "new")
    layout.make()
    layout.restoring.mkdir()
    shutil.copy(lived / "ash" / "federation.toml", layout.state)
    layout.journal.write_bytes(b"half")
    backup.restore(layout.state, lived / "ash.tar")
    assert Journal.read_only(layout.journal).last_signed() == 3


def test_a_backup_never_takes_the_place_of_a_file(lived: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(UsageError, match="exists already"):
        backup.backup(lived / "ash", tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_node_that_never_started_can_be_backed_up_too(tmp_path: Path) -> None:
    enrol.init(tmp_path / "ash", name="ash", address="127.0.0.1:9001", listen=None, data=None)
    backup.backup(tmp_path / "ash", tmp_path / "ash.tar")
    backup.restore(tmp_path / "new", tmp_path / "ash.tar")
    assert node_toml.load_node(tmp_path / "new").name == "ash"


def test_the_commands_say_that_the_file_holds_the_key_and_what_comes_next(lived: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--state", str(lived / "ash"), "backup", "--to", str(tmp_path)])
    assert done.exit_code == 0 and "PRIVATE KEY" in done.output
    (file,) = tmp_path.glob("hsl-node-ash-*.tar")
    done = CliRunner().invoke(app, ["--state", str(lived / "ash"), "backup", str(tmp_path / "b.tar"), "--no-key"])
    assert done.exit_code == 0 and "no private key" in done.output
    done = CliRunner().invoke(app, ["--state", str(tmp_path / "new"), "restore", str(file)])
    assert done.exit_code == 0 and "no other copy" in done.output and "start" in done.output
    done = CliRunner().invoke(app, ["--state", str(tmp_path / "new"), "recover", "--from-peers"])
    assert done.exit_code == 0 and "asks birch" in done.output
    with pytest.raises(SystemExit) as left:
        main(["--state", str(tmp_path / "new"), "recover", "--from-peers", "--without", "cedar"])
    assert left.value.code == 2


def test_recover_names_what_is_missing_and_where_to_get_it(tmp_path: Path) -> None:
    """Key and the two settings files are there; the anchor set, which every other hospital has, is not."""
    anchor = AnchorCard(name="reference", fingerprint="a" * 64, images=10, image_size=32)
    with Cluster(tmp_path, ("ash", "birch"), PLAN, anchor=anchor) as cluster:
        state = cluster.layout("ash").state
        asked = CliRunner().invoke(app, ["--state", str(state), "recover", "--from-peers"])
        assert isinstance(asked.exception, ConfigError)
        assert str(Layout(state).anchor) in asked.exception.message
        assert "other hospital" in asked.exception.remedy and "a" * 64 in asked.exception.remedy
        assert not Layout(state).journal.exists(), "it was marked though it cannot start"
        Layout(state).anchor.write_bytes(b"another file")
        asked = CliRunner().invoke(app, ["--state", str(state), "recover", "--from-peers"])
        assert isinstance(asked.exception, FederationMismatch)
        Layout(state).key.unlink()
        asked = CliRunner().invoke(app, ["--state", str(state), "recover", "--from-peers"])
        assert isinstance(asked.exception, NotInitialised) and "tar -xf BACKUP" in asked.exception.remedy


def test_a_folder_that_is_full_is_named_and_nothing_half_made_is_left_in_it(
    lived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not the disk of the state directory: whoever looks there finds nothing."""

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive, "_add_member", full)
    with pytest.raises(LocalStateError, match="No space left on device") as caught:
        backup.backup(lived / "ash", tmp_path / "b.tar")
    assert str(tmp_path / "b.tar") in caught.value.message and "that folder" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("passes", [1, 2], ids=["for the index", "for the archive"])
def test_a_file_that_cannot_be_read_is_named_and_not_the_folder_of_the_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """Its disk fails, not the one that the backup is written to."""
    told: list[LocalStateError] = []
    monkeypatch.setattr(durable, "on_failure", told.append)

    class Failing(io.FileIO):
        begun = 0

        def seek(self, offset: int, whence: int = 0, /) -> int:
            self.begun += offset == whence == 0
            return super().seek(offset, whence)

        def read(self, size: int | None = -1, /) -> bytes:
            if self.begun == passes:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

        def readinto(self, buffer: Any, /) -> int | None:
            if self.begun == passes:
                raise OSError(errno.EIO, "Input/output error")
            return super().readinto(buffer)

    def opened(path: Path, mode: str) -> Any:
        return Failing(path) if path.name == "node.toml" else open(path, mode)

    enrol.init(tmp_path / "state", name="ash", address="127.0.0.1:9001", listen=None, data=None)
    (tmp_path / "backups").mkdir()
    monkeypatch.setattr(backup, "open", opened, raising=False)
    with pytest.raises(LocalStateError, match=r"node\.toml cannot be read: Input/output error; the backup is not made"):
        backup.backup(tmp_path / "state", tmp_path / "backups" / "b.tar")
    assert told == [] and not list((tmp_path / "backups").iterdir())


def test_a_model_on_a_failing_disk_is_no_backup_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer that runs `backup` must not be told that all is well."""
    state = tmp_path / "state"
    enrol.init(state, name="ash", address="127.0.0.1:9001", listen=None, data=None)
    Journal.create(Layout(state).journal).close()
    model = models.Model("fused", Round(1), Digest("0" * 64), "the last one")
    monkeypatch.setattr(backup, "_models_needed", lambda journal: [model])
    Layout(state).fused(1).parent.mkdir(exist_ok=True)
    Layout(state).fused(1).symlink_to("/proc/self/mem")  # opens, and reads fail with EIO
    with pytest.raises(LocalStateError, match=r"fused/r000001\.safetensors cannot be read: .*the backup is not made"):
        backup.backup(state, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()
