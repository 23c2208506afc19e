"""The backup file: what is in it, what is refused, and that nothing half-made is left."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from typer.testing import CliRunner

from hsl_node import backup, config, enrol, identity, recover_mark
from hsl_node.cli import main
from hsl_node.commands.app import app
from hsl_node.config import AnchorCard, Plan
from hsl_node.errors import (
    AlreadyRunning,
    ConfigError,
    FederationMismatch,
    HslError,
    LocalStateError,
    NotInitialised,
    UsageError,
)
from hsl_node.sync.journal import Journal
from hsl_node.sync.store import Layout, Store

PLAN = Plan(method="fedavg", fusion="mean", rounds=2, epochs_per_round=1, plateau_rounds=100)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory after a whole run, and a backup of it made while the daemon ran: DIR/ash, DIR/ash.tar."""
    folder = tmp_path_factory.mktemp("lived")
    with Cluster(folder, ("ash", "birch"), PLAN) as cluster:
        (cluster.layout("ash").state / "splits.json").write_text('{"version": 1, "splits": {}}')
        cluster.start_all()
        cluster.wait_finished()
        backup.backup(folder / "ash", folder / "ash.tar")
        assert cluster.stop("ash") == 0
    return folder


def test_a_backup_beside_the_running_daemon_holds_what_cannot_be_made_anew(lived: Path, tmp_path: Path) -> None:
    file = lived / "ash.tar"
    assert file.stat().st_mode & 0o777 == 0o600
    with tarfile.open(file) as tar:
        names = tar.getnames()
        assert all(m.isreg() and m.mode == 0o600 for m in tar.getmembers())
    assert names[0] == "backup.json"
    assert {"node.toml", "federation.toml", "splits.json", "journal.sqlite3", "keys/node_ed25519"} < set(names)
    assert "fused/r000002.safetensors" in names, "the last fused model"
    assert not list(lived.glob(".hsl-node-backup-*")), "nothing is left beside it"


def test_what_is_restored_is_what_was_there_and_is_marked(lived: Path, tmp_path: Path) -> None:
    made = backup.restore(tmp_path / "new", lived / "ash.tar")
    assert (made.node, made.has_key) == ("ash", True)
    for name in ("node.toml", "federation.toml", "splits.json", "keys/node_ed25519", "fused/r000002.safetensors"):
        assert (tmp_path / "new" / name).read_bytes() == (lived / "ash" / name).read_bytes()
    assert (tmp_path / "new" / "keys" / "node_ed25519").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    store = Store(Layout(tmp_path / "new"))
    mark = recover_mark.find_mark(store.journal)
    assert mark is not None and "restored from a backup" in mark.why
    assert store.journal.last_signed() == 3
    store.close()
    assert not (tmp_path / "new" / backup.STAGING).exists()


def test_without_the_key_it_holds_none_and_waits_for_it(lived: Path, tmp_path: Path) -> None:
    made = backup.backup(lived / "ash", tmp_path / "open.tar", with_key=False)
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


def repacked(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of a backup in which `change` made each member's content; None leaves it out."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            content = old.extractfile(member)
            assert content is not None
            changed = change(member.name, content.read())
            if changed is not None:
                member.size = len(changed)
                new.addfile(member, io.BytesIO(changed))
    return target


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


def test_a_state_directory_that_holds_a_node_is_not_touched(lived: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (lived / "ash").rglob("*")}
    with pytest.raises(UsageError, match="holds a node already"):
        backup.restore(lived / "ash", lived / "ash.tar")
    assert {p: p.stat().st_mtime_ns for p in (lived / "ash").rglob("*")} == before


def test_a_directory_that_a_daemon_holds_is_refused(lived: Path, tmp_path: Path) -> None:
    store = Store(Layout(tmp_path / "new"))
    (tmp_path / "new" / "journal.sqlite3").unlink()
    with pytest.raises(AlreadyRunning):
        backup.restore(tmp_path / "new", lived / "ash.tar")
    assert not (tmp_path / "new" / "node.toml").exists()
    store.close()


def test_a_restore_that_was_cut_short_can_be_made_again(lived: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "new")
    layout.make()
    (layout.state / backup.STAGING).mkdir()
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
    assert config.load_node(tmp_path / "new").name == "ash"


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
