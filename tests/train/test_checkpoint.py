"""The epoch checkpoint is written beside the next epoch, one at a time, and is there when the round ends."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import learning
import pytest

from hsl_node.errors import Diverged, LocalStateError
from hsl_node.train import checkpoint
from hsl_node.train.checkpoint import RoundState
from hsl_node.train.loop import train_round
from hsl_node.train.progress import Report
from hsl_node.train.site import initial_weights
from hsl_node.train.start import StartFiles


def run(folder: Path, report: Report = lambda event: None) -> RoundState:
    site = learning.site(learning.small_plan(epochs_per_round=3))
    digest, _ = initial_weights(folder, site.plan, site.method, folder / "base.safetensors")
    start = StartFiles(round=1, base=folder / "base.safetensors", base_sha256=digest)
    return train_round(
        site,
        folder=folder / "trainer",
        files=start,
        out=folder / "out.safetensors",
        own=folder / "own.safetensors",
        report=report,
    )


def test_the_next_epoch_trains_while_the_checkpoint_is_written_and_its_best_file_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk: each checkpoint is done when the epoch after it has been trained. No state is ever skipped."""
    trained = {epoch: threading.Event() for epoch in (1, 2, 3)}
    saved, best_of_the_next, really = list[int](), list[bool](), checkpoint.save

    def heard(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["batch"] == event["batches"]:
            trained[event["epoch"]].set()

    def slowly(folder: Path, state: RoundState, packed: io.BytesIO) -> None:
        if state.epoch < 3:
            assert trained[state.epoch + 1].wait(30)
        best_of_the_next.append(checkpoint.best_path(folder, 1, state.epoch + 1).exists())
        really(folder, state, packed)
        found = checkpoint.load(folder)
        assert found is not None and found.state == state
        saved.append(state.epoch)

    monkeypatch.setattr(checkpoint, "save", slowly)
    slow = run(tmp_path / "slow", heard)
    monkeypatch.undo()
    assert saved == [1, 2, 3] and best_of_the_next == [False] * 3
    assert slow == run(tmp_path / "fast")
    assert learning.same_bytes(tmp_path / "slow/trainer", tmp_path / "fast/trainer")


def test_an_epoch_checkpoint_that_cannot_be_written_ends_the_round(tmp_path: Path) -> None:
    (tmp_path / "trainer/epoch.pt.tmp").mkdir(parents=True)  # no file can be written there
    with pytest.raises(LocalStateError, match="could not be written"):
        run(tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_disk_error_is_told_before_what_ended_the_epoch_meanwhile(tmp_path: Path) -> None:
    """After it nothing on that disk may be believed; a loss that diverged does so again at the next attempt."""

    def diverges(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["epoch"] == 2:
            raise Diverged("the loss is not a finite number")

    (tmp_path / "trainer/epoch.pt.tmp").mkdir(parents=True)
    with pytest.raises(LocalStateError, match="could not be written") as caught:
        run(tmp_path, diverges)
    assert isinstance(caught.value.__context__, Diverged)
