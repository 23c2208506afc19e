"""What is written to the disk, by whom: the old file, the new one, and how to see which of them is there."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from weights import weights

from hsl_node.federation import identity
from hsl_node.federation.names import Peer
from hsl_node.host import files
from hsl_node.host.durable import Step
from hsl_node.train import checkpoint
from hsl_node.train.checkpoint import Best, RoundState, Saved, Validation, Worth
from hsl_node.train.data.ledger import read_ledger, write_ledger
from hsl_node.weights.checkpoint_file import read_weights, schema_of, write_weights
from hsl_node.weights.fuse_files import fuse_files
from hsl_node.weights.whole import sha256_of

Body = Callable[[Path], None]


# ------------------------------------------------------------------ what is written: (before, again, is it whole?)


def fused(folder: Path, value: float = 3.0) -> None:
    paths = {Peer(p): folder / f"{p}.safetensors" for p in ("ash", "birch")}
    if not all(p.exists() for p in paths.values()):
        for path in paths.values():
            write_weights(path, weights(1.0))
    fuse_files("mean", paths, dict.fromkeys(paths, 1), schema_of(weights()), folder / "fused.safetensors")


def saved(folder: Path, epoch: int) -> None:
    """As the training loop does: the best weights, then the epoch checkpoint that names them."""
    nothing = Validation(None, None)
    state = RoundState(
        run="run", round=1, base_sha256="0" * 64, worth=Worth(nothing, None), epoch=epoch,
        best=Best(epoch, nothing, "", 0, "", {}), threads=1, device="cpu", precision="float32",
    )  # fmt: skip
    digest = write_weights(checkpoint.best_path(folder, 1, epoch), weights(float(epoch)), Step.TRAINER_BEST)
    state = replace(state, best=Best(epoch, nothing, digest, 1, digest, {}))
    packed = io.BytesIO()
    checkpoint.pack(Saved(state, {"w": torch.full((5000,), float(epoch))}, {}), packed)
    checkpoint.save(folder, state, packed)


def saved_epoch(folder: Path) -> int:
    """The epoch that a restarted trainer goes on from; its model and best weights are those of that epoch."""
    found = checkpoint.load(folder)
    if found is None:
        return 0
    assert found.state.best is not None
    assert torch.equal(found.model["w"], torch.full((5000,), float(found.state.epoch)))
    assert sha256_of(checkpoint.best_path(folder, 1, found.state.best.epoch)) == found.state.best.sha256
    return found.state.epoch


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# name: (makes the old, makes the new, what is there: "" or 0 nothing, else it was whole)
WRITERS: dict[str, tuple[Body, Body, Callable[[Path], object]]] = {
    "weights": (
        lambda f: (write_weights(f / "x", weights(1.0)), None)[1],
        lambda f: (write_weights(f / "x", weights(2.0)), None)[1],
        lambda f: read_weights(f / "x")["a.weight"].mean() if (f / "x").exists() else 0,
    ),
    "fusion": (
        lambda f: [write_weights(f / f"{p}.safetensors", weights(1.0)) for p in ("ash", "birch")] and None,
        fused,
        lambda f: read_weights(f / "fused.safetensors")["a.weight"].mean() if (f / "fused.safetensors").exists() else 0,
    ),
    "epoch checkpoint": (lambda f: saved(f, 1), lambda f: saved(f, 2), saved_epoch),
    "settings": (
        lambda f: files.write_new(f / "node.toml", "old" * 999),
        lambda f: files.write_new(f / "node.toml", "new" * 999, replace=True),
        lambda f: text_of(f / "node.toml"),
    ),
    "key": (
        lambda f: None,
        lambda f: (identity.generate(f / "key"), None)[1],
        lambda f: bool(identity.load(f / "key")) if (f / "key").exists() else 0,
    ),
    "ledger": (
        lambda f: write_ledger(f / "splits.json", {"page": {"old": 1}}),
        lambda f: write_ledger(f / "splits.json", {"page": {"new": 1}}),
        lambda f: str(read_ledger(f / "splits.json")),
    ),
}
