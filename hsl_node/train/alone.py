"""What this hospital would have without the federation: same method, initial weights and number of epochs, no fusion.

The honest column beside "fused". Both are chosen by the same validation set's score: here the best epoch of the whole
run, there the hospital's model (`sync/candidates.py`).

    trainer/alone.safetensors    all tensors of the best epoch
    trainer/alone.json           what it is: Alone, below
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hsl_node.host.layout import Layout
from hsl_node.train.data.files import replacing
from hsl_node.train.loop import train_round
from hsl_node.train.method import Site
from hsl_node.train.progress import Report
from hsl_node.train.site import initial_weights
from hsl_node.train.start import StartFiles
from hsl_node.weights.whole import holds

WEIGHTS_FILE = "alone.safetensors"
CARD_FILE = "alone.json"


@dataclass(frozen=True)
class Alone:
    federation: str  # digest: whose plan it followed
    epochs: int
    best_epoch: int
    score: float | None  # of the validation set
    sha256: str
    bytes: int


def train_alone(site: Site, state: Path, *, rounds: int, report: Report) -> Alone:
    """Train alone for as many epochs as that many rounds have; goes on where it was. A learning rate that falls over
    the whole run falls over these epochs.

    Events as in a round, with round = 1 and epochs counted through. The caller holds the lock of trainer/alone.
    """
    trainer, folder = Layout(state).trainer, Layout(state).alone
    epochs = sum(site.method.epochs(site.plan, round) for round in range(1, rounds + 1))
    found = find_alone(state)
    if found and (found.federation, found.epochs) == (site.run, epochs):
        return found
    base = folder / "initial.safetensors"
    base_sha256, _ = initial_weights(state, site.plan, site.method, base)
    # One round of all epochs, without an early end. Its epoch checkpoints are of no use to another length.
    plan = site.plan.model_copy(update={"rounds": 1, "epochs_per_round": epochs, "patience_epochs": epochs})
    done = train_round(
        replace(
            site, run=f"{site.run}/alone/{epochs}", plan=plan, method=replace(site.method, epochs=lambda *_: epochs)
        ),
        folder=folder,
        files=StartFiles(1, base, base_sha256),
        out=folder / "shared.safetensors",
        own=trainer / WEIGHTS_FILE,
        report=report,
    )
    assert done.best is not None
    best = done.best
    size = (trainer / WEIGHTS_FILE).stat().st_size
    alone = Alone(site.run, epochs, best.epoch, best.validation.score, best.own_sha256, size)
    with replacing(trainer / CARD_FILE) as file:
        file.write(json.dumps(asdict(alone), indent=2).encode() + b"\n")
    return alone


def find_alone(state: Path) -> Alone | None:
    """The finished run alone, if there is one and its weights are whole."""
    trainer = Layout(state).trainer
    try:
        alone = Alone(**json.loads((trainer / CARD_FILE).read_text(encoding="utf-8")))
        whole = holds(trainer / WEIGHTS_FILE, alone.sha256)
    except (OSError, ValueError, TypeError):
        return None
    return alone if whole else None
