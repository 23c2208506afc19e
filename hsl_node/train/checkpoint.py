"""The epoch checkpoint: what a trainer killed at any moment goes on from.

    trainer/epoch.pt                          model, optimizers, position (RoundState); replaced after each epoch; the
                                              last 64 bytes are the sha256 of those before them, in hex
    trainer/best_r000003_e0002.safetensors    ALL tensors of the round's best epoch so far; written when they change

The best file is on disk before the epoch checkpoint that names it, so every state found after a kill is a true one.
Randomness is not in it: it is derived from (seed, peer, round, epoch) before each epoch. It is put together in memory,
which holds model and moments once more while a round lasts (285 MB for the published form), and is hashed and written
from there while the next epoch trains already: a kill meanwhile costs that epoch, which gives the same bytes again.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from hsl_node.errors import LocalStateError
from hsl_node.host.durable import Step, replacing

log = logging.getLogger(__name__)

EPOCH_FILE = "epoch.pt"
VERSION = 2
SEAL_BYTES = 64


@dataclass(frozen=True)
class Validation:
    """The validation set's verdict on one model. Score None: undefined (one class only); loss None: no images."""

    score: float | None  # the task's, more is better
    loss: float | None

    def better_than(self, other: Validation) -> bool:
        """Higher score; equal or undefined: lower loss; that undefined too (no images at all): the later epoch.

        Small hospitals validate on a few patients, where many epochs reach the same AUC and the first of them has
        hardly been trained.
        """
        if self.score is not None and other.score is not None and self.score != other.score:
            return self.score > other.score
        if self.loss is not None and other.loss is not None:
            return self.loss < other.loss
        return True


@dataclass(frozen=True)
class Worth:
    """What a fused model is worth here."""

    fused: Validation  # as this site took it up: what training goes on from
    recalibrated: Validation | None  # with its own BatchNorm statistics; None: the plan or the model has none


@dataclass(frozen=True)
class Best:
    epoch: int  # 1.. within the round
    validation: Validation
    sha256: str  # of the tensors that travel, as a file
    bytes: int  # ... and its size
    own_sha256: str  # of all tensors
    said: Mapping[str, float]  # the numbers that the method says beside it


@dataclass(frozen=True, kw_only=True)
class RoundState:
    """Where a round of training stands."""

    run: str  # digest of the federation
    round: int
    base_sha256: str  # the weights that the round started from
    worth: Worth  # ... and what they were worth here, before the first epoch
    epoch: int = 0  # finished epochs
    steps: tuple[int, ...] = ()  # optimiser steps of each finished epoch
    rates: tuple[float, ...] = ()  # learning rate of each
    stale: int = 0  # finished epochs in a row that were no better than the best of this round's before them
    best: Best | None = None  # of the finished epochs, never the base
    finished: bool = False
    threads: int  # these three, Hardware.facts, decide the bytes of the result
    device: str
    precision: str


_STATE = TypeAdapter(RoundState)


@dataclass(frozen=True)
class Saved:
    state: RoundState
    model: dict[str, Any]
    optimizers: dict[str, Any]  # by their names in the learner


class Saving:
    """Writes the epoch checkpoints of a round beside its training, one at a time. An error of the disk is raised at the
    next `wait` or `put`, and at the end before whatever ended the round."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._packed = folder, io.BytesIO()
        self._beside = ThreadPoolExecutor(1, "epoch checkpoint")
        self._last: Future[None] | None = None

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, *error: object) -> None:
        with self._beside:
            self.wait()

    def wait(self) -> None:
        """Until the last one is on the disk."""
        if self._last:
            self._last.result()

    def put(self, saved: Saved) -> None:
        self.wait()
        pack(saved, self._packed)
        self._last = self._beside.submit(save, self._folder, saved.state, self._packed)


def pack(saved: Saved, memory: io.BytesIO) -> None:
    """Put it into `memory`, in the place of the last one: taking new memory for it costs more than this."""
    memory.seek(0)
    content = asdict(saved.state)
    torch.save({"version": VERSION, "state": content, "model": saved.model, "optimizers": saved.optimizers}, memory)


def save(folder: Path, state: RoundState, packed: io.BytesIO) -> None:
    """Replace the epoch checkpoint atomically and durably, then drop best files that it doesn't name.

    Raises: LocalStateError
    """
    try:
        with (
            packed.getbuffer() as whole,
            whole[: packed.tell()] as archive,
            replacing(folder / EPOCH_FILE, Step.TRAINER_EPOCH) as file,
        ):
            file.write(archive)
            file.write(_seal(archive))
        for path in folder.glob("best_*"):
            if state.best is None or path != best_path(folder, state.round, state.best.epoch):
                path.unlink(missing_ok=True)
    except OSError as exc:
        raise LocalStateError(
            f"the epoch checkpoint in {folder} could not be written: {exc}", remedy="make room or check the disk"
        ) from exc


def load(folder: Path) -> Saved | None:
    """The last epoch checkpoint; None where there is none yet, or it is damaged: the round then begins anew.

    A damaged one, or one without its sha256, stays until the first epoch replaces it.

    Raises:
        LocalStateError: the disk gives an error; or the file is what was written, and can't be read here.
    """
    path = folder / EPOCH_FILE
    try:
        found = memoryview(path.read_bytes())
        archive, seal = found[:-SEAL_BYTES], found[-SEAL_BYTES:]
        if seal != _seal(archive):
            log.warning("%s/%s is damaged: the round begins anew", folder.name, path.name)
            return None
        content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
        if content["version"] != VERSION:
            raise KeyError(f"version {content['version']}")
        return Saved(_STATE.validate_python(content["state"]), content["model"], content["optimizers"])
    except FileNotFoundError:
        return None
    except Exception as exc:  # no memory left, say, or another version wrote it: nothing is wrong with the file
        raise LocalStateError(
            f"epoch checkpoint {path} cannot be read: {exc}",
            remedy=f"move {path} away: the round then starts again from the last fused weights",
        ) from exc


def best_path(folder: Path, round: int, epoch: int) -> Path:
    return folder / f"best_r{round:06d}_e{epoch:04d}.safetensors"


def _seal(archive: memoryview) -> bytes:
    return hashlib.sha256(archive).hexdigest().encode("ascii")
