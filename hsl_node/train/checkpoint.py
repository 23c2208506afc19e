"""The epoch checkpoint: what a trainer killed at any moment goes on from.

    trainer/epoch.pt                          model, optimiser, position (RoundState); replaced after each epoch; the
                                              last 64 bytes are the sha256 of those before them, in hex
    trainer/best_r000003_e0002.safetensors    the round's best shared weights so far; written when they change

The best file is on disk before the epoch checkpoint that names it, so every state found after a kill is a true one.
Randomness is not in it: it is derived from (seed, peer, round, epoch) before each epoch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from hsl_node.errors import LocalStateError
from hsl_node.host.durable import Step, replacing

log = logging.getLogger(__name__)

EPOCH_FILE = "epoch.pt"
VERSION = 1
SEAL_BYTES = 64
ARCHIVE_END, ARCHIVE_END_BYTES = b"PK\5\6", 22  # so begins the last record of what torch writes; it has no comment
CHUNK_BYTES = 4 * 1024 * 1024
_BEST = re.compile(r"best_r\d{6}_e\d{4}\.safetensors(\.tmp)?")


@dataclass(frozen=True)
class Validation:
    """The validation set's verdict on one model. AUC None: one class only; loss None: no images."""

    auc: float | None
    loss: float | None

    def better_than(self, other: Validation) -> bool:
        """Higher AUC; AUC equal or undefined: lower loss; that undefined too (no images at all): the later epoch.

        Small hospitals validate on a few patients, where many epochs reach the same AUC and the first of them has
        hardly been trained.
        """
        if self.auc is not None and other.auc is not None and self.auc != other.auc:
            return self.auc > other.auc
        if self.loss is not None and other.loss is not None:
            return self.loss < other.loss
        return True


@dataclass(frozen=True)
class Best:
    epoch: int  # 1.. within the round
    validation: Validation
    sha256: str  # of the shared weights
    bytes: int


@dataclass(frozen=True)
class RoundState:
    """Where a round of training stands."""

    run: str  # digest of the federation
    round: int
    base_sha256: str  # the weights that the round started from
    base: Validation  # ... and what they were worth here, before the first epoch
    epoch: int  # finished epochs
    stale: int  # finished epochs in a row that were no better than the best before them, the base included
    best: Best | None  # of the finished epochs, never the base
    finished: bool
    threads: int  # these three decide the bytes of the result
    device: str
    precision: str


@dataclass(frozen=True)
class Saved:
    state: RoundState
    model: dict[str, Any]
    optimizer: dict[str, Any]


def save(folder: Path, saved: Saved) -> None:
    """Replace the epoch checkpoint atomically and durably, then drop best files that it doesn't name."""
    content = {"version": VERSION, "state": asdict(saved.state), "model": saved.model, "optimizer": saved.optimizer}
    try:
        with replacing(folder / EPOCH_FILE, Step.TRAINER_EPOCH) as file:
            try:
                sealed = _Sealed(file)
                torch.save(content, cast(BinaryIO, sealed))
                file.write(sealed.seal())
            except RuntimeError as exc:  # torch closes its archive and hides behind that why it could not be written
                raise exc.__context__ if isinstance(exc.__context__, OSError | LocalStateError) else exc from None
        keep = best_path(folder, saved.state).name
        for path in folder.iterdir():
            if _BEST.fullmatch(path.name) and path.name != keep:
                path.unlink(missing_ok=True)
    except OSError as exc:
        raise LocalStateError(
            f"the epoch checkpoint in {folder} could not be written: {exc}", remedy="make room or check the disk"
        ) from exc


def load(folder: Path) -> Saved | None:
    """The last epoch checkpoint; None where there is none yet, or it is damaged: the round then begins anew.

    A damaged one stays until the first epoch replaces it. One without a sha256, of an earlier version, is taken.

    Raises:
        LocalStateError: the disk gives an error; or the file is what was written, and can't be read here.
    """
    path = folder / EPOCH_FILE
    if not path.exists():
        return None
    intact: bool | None = True
    try:
        with open(path, "rb") as file:
            intact = _intact(file)
        if intact is False:
            log.warning("%s/%s is damaged: the round begins anew", folder.name, path.name)
            return None
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["version"] != VERSION:
            raise KeyError(f"version {content['version']}")
        return Saved(_state(content["state"]), content["model"], content["optimizer"])
    except Exception as exc:  # a damaged archive raises whatever its bytes happen to mean
        if not isinstance(exc, OSError) and intact is None:
            log.warning("%s/%s cannot be read (%s): the round begins anew", folder.name, path.name, type(exc).__name__)
            return None
        raise LocalStateError(
            f"epoch checkpoint {path} cannot be read: {exc}",
            remedy=f"move {path} away: the round then starts again from the last fused weights",
        ) from exc


class _Sealed:
    """Writes through to a file, and knows the sha256 of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def seal(self) -> bytes:
        return self._sha256.hexdigest().encode("ascii")


def _intact(file: BinaryIO) -> bool | None:
    """Is it what `save` wrote? None: it ends where the archive does, as before there was a sha256 behind it."""
    left = file.seek(0, os.SEEK_END) - SEAL_BYTES
    file.seek(max(left, 0))
    seal, found = file.read(), hashlib.sha256()
    if seal[-ARCHIVE_END_BYTES:].startswith(ARCHIVE_END):
        return None
    file.seek(0)
    while left > 0 and (chunk := file.read(min(left, CHUNK_BYTES))):
        found.update(chunk)
        left -= len(chunk)
    return seal == found.hexdigest().encode("ascii")


def best_path(folder: Path, state: RoundState) -> Path:
    epoch = state.best.epoch if state.best else 0
    return folder / f"best_r{state.round:06d}_e{epoch:04d}.safetensors"


def _state(raw: dict[str, Any]) -> RoundState:
    best = raw["best"]
    if best is not None:
        best = Best(**{**best, "validation": Validation(**best["validation"])})
    return RoundState(**{**raw, "base": Validation(**raw["base"]), "best": best})
