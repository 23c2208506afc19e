"""Where a method makes a fused model of everybody's checkpoints, a backup has those of the models that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from backups import PLAN, members

from hsl_node.admin import backup, enrol
from hsl_node.federation.config import federation_text
from hsl_node.federation.names import Peer, Round
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.whole import sha256_of

ASH, BIRCH = Peer("ash"), Peer("birch")
SET = {"outbox/r000002.safetensors", "inbox/r000002/birch.safetensors"}


@pytest.fixture
def state(tmp_path: Path, federation_of) -> Path:
    """ash has fused rounds 2 and 3 with birch; that of round 2 is its best model, and round 4 begins."""
    state = tmp_path / "state"
    enrol.init(state, name="ash", address="127.0.0.1:9001", listen=None, data=None)
    layout = Layout(state)
    with Journal.create(layout.journal) as journal, journal.transaction():
        for round, score in ((1, 0.6), (2, 0.9), (3, 0.7)):
            layout.fused(round).write_text(f"fused {round}")
            journal.record_fused(Round(round), sha256_of(layout.fused(round)))
            journal.record_validation(Round(round), score, 0.5)
            for peer in (ASH, BIRCH):
                path = layout.checkpoint(round, peer, ASH)
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"{peer} {round}")
                journal.record_manifest(
                    Round(round), peer, sha256_of(path), b"", {"bytes": 9, "samples": 3, "said": {}, "score": score}
                )
        journal.save_state({"me": "ash", "phase": "train", "round": 4})
    return state


def with_method(state: Path, federation_of, method: str) -> Path:
    federation = federation_of(2, plan=PLAN.model_copy(update={"method": method})).federation
    (state / "federation.toml").write_text(federation_text(federation))
    return state


def test_it_has_them_and_a_restore_puts_them_back(state: Path, federation_of, tmp_path: Path) -> None:
    _, left_out = backup.backup(with_method(state, federation_of, "metafed"), tmp_path / "b.tar", with_key=False)
    names = {name for name, _ in members(tmp_path / "b.tar")}
    kept = {name for name in names if name.startswith(("inbox", "outbox"))}
    last = {"outbox/r000003.safetensors", "inbox/r000003/birch.safetensors"}
    assert kept == SET | last and not [text for text in left_out if "box/" in text]
    backup.restore(tmp_path / "new", tmp_path / "b.tar")
    for name in kept:
        assert (tmp_path / "new" / name).read_bytes() == (state / name).read_bytes()
    assert (tmp_path / "new" / "inbox" / "r000002").stat().st_mode & 0o777 == 0o700


def test_one_that_is_altered_is_left_out_and_named(state: Path, federation_of, tmp_path: Path) -> None:
    (state / "inbox/r000002/birch.safetensors").write_text("Birch 2")
    _, left_out = backup.backup(with_method(state, federation_of, "metafed"), tmp_path / "b.tar", with_key=False)
    assert any(text.startswith("inbox/r000002/birch.safetensors, of which the method makes") for text in left_out)
    assert "inbox/r000002/birch.safetensors" not in {name for name, _ in members(tmp_path / "b.tar")}


def test_of_a_method_that_reads_none_of_them_a_backup_has_none(state: Path, federation_of, tmp_path: Path) -> None:
    backup.backup(with_method(state, federation_of, "fedavg"), tmp_path / "b.tar", with_key=False)
    assert not [name for name, _ in members(tmp_path / "b.tar") if name.startswith(("inbox", "outbox"))]
