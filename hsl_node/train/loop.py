"""Train one round: validate the base, some local epochs, keep the best one. Every method's loop.

Shapes at line ends: B pairs in a batch, C outputs.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsl_node.errors import Altered, DataError, Diverged, LocalStateError
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.train import checkpoint
from hsl_node.train.batches import Batch, Indices, epoch_pairs, upload
from hsl_node.train.checkpoint import Best, RoundState, Saved, Validation
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.sources import TRAIN, VALIDATION
from hsl_node.train.hardware import Hardware, derived_seed
from hsl_node.train.method import Site
from hsl_node.train.progress import PROGRESS_EVERY_S, Report, ticker
from hsl_node.train.scoring import place, validate
from hsl_node.train.state_dict import load_weights, to_weights
from hsl_node.weights.checkpoint_file import fault, read_weights, write_weights
from hsl_node.weights.whole import holds

log = logging.getLogger(__name__)

LOWER = 'training diverged: agree on a lower learning_rate, or on precision = "float32"'


@dataclass(frozen=True)
class Learner:
    model: nn.Module
    optimizer: torch.optim.Optimizer


def train_round(
    site: Site,
    *,
    folder: Path,
    round: int,
    base: Path,
    base_sha256: str,
    out: Path,
    report: Report,
) -> RoundState:
    """Train from `base`, write the best epoch's shared weights to `out`; go on where a killed process left off.

    The base's own validation counts as epoch 0 for the patience, but only trained epochs can be the round's checkpoint:
    a hospital always contributes what it learned. At 5 epochs and patience 5 no round is ever cut short: the paper's
    schedule.

    Raises:
        DataError: no training images.
        Diverged: a loss or an output is not a finite number, or a weight is one that no peer would take.
        Altered: `base` is not the file it should be.
        LocalStateError: the disk fails.
    """
    learner, state = _open_round(site, folder, round, base, base_sha256, report)
    while not state.finished:
        epoch = state.epoch + 1
        started = time.monotonic()
        rate = learning_rate(site, (round - 1) * site.plan.epochs_per_round + epoch)
        loss_primary, loss_anchor = train_epoch(site, learner, round, epoch, rate, report)
        found = validate(site, learner.model, ticker(report, f"validating round {round} epoch {epoch}"))
        state = _after_epoch(site, learner, folder, state, found)
        checkpoint.save(folder, Saved(state, learner.model.state_dict(), learner.optimizer.state_dict()))
        report(
            {
                "event": "epoch",
                "round": round,
                "epoch": epoch,
                "loss_primary": loss_primary,
                "loss_anchor": loss_anchor,
                "auc": found.auc,
                "validation_loss": found.loss,
                "learning_rate": rate,
                "seconds": time.monotonic() - started,
            }
        )
    _write_best(folder, state, out)
    return state


def train_epoch(
    site: Site, learner: Learner, round: int, epoch: int, rate: float, report: Report
) -> tuple[float, float]:
    """One pass over the longer of both sets. Gives back the mean primary and anchor loss.

    Everything random in it follows from (plan.seed, peer, round, epoch).
    """
    model, optimizer, hardware = learner.model, learner.optimizer, site.hardware
    seed = derived_seed(site.plan.seed, site.peer, round, epoch)
    torch.manual_seed(seed)
    train = site.indices(TRAIN)
    anchors = len(site.anchor.images) if site.method.embed_anchor and site.anchor else 0
    pairs = epoch_pairs(np.random.default_rng(seed), len(train), anchors, site.plan.batch_size)
    for group in optimizer.param_groups:
        group["lr"] = rate

    model.train()
    total = torch.zeros(2, device=hardware.device)
    images, mark = 0, time.monotonic()
    for number, (p, a) in enumerate(pairs, 1):
        batch = _batch(site, train[p], a)
        primary, anchor = site.method.losses(model, batch)  # (), ()
        optimizer.zero_grad(set_to_none=True)
        (primary + anchor).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += torch.stack([primary.detach(), anchor.detach()]) * len(p)
        images += len(p) + len(a)
        now = time.monotonic()
        if now - mark >= PROGRESS_EVERY_S or number == len(pairs):
            if not bool(torch.isfinite(total).all()):  # the only wait for the device
                where = f"round {round}, epoch {epoch}, batch {number}"
                raise Diverged(f"the loss is not a finite number ({where})", remedy=LOWER)
            now = time.monotonic()
            report(
                {
                    "event": "progress",
                    "round": round,
                    "epoch": epoch,
                    "batch": number,
                    "batches": len(pairs),
                    "images_per_s": images / max(now - mark, 1e-9),
                }
            )
            mark, images = now, 0
    loss_primary, loss_anchor = (total / sum(len(p) for p, _ in pairs)).tolist()
    return loss_primary, loss_anchor


def learning_rate(site: Site, epoch: int) -> float:
    """Cosine annealing over the whole run's epochs (from 1), in closed form: nothing to save, nothing to step.

    Falls from learning_rate towards learning_rate_min within each period and starts anew with the next, like torch's
    CosineAnnealingWarmRestarts. torch's CosineAnnealingLR would instead climb back along the same cosine, a cycle of
    twice the period; "period 10 epochs" is read as a cycle of 10.
    """
    plan = site.plan
    part = ((epoch - 1) % plan.cosine_period_epochs) / plan.cosine_period_epochs
    span = plan.learning_rate - plan.learning_rate_min
    return plan.learning_rate_min + span * (1 + math.cos(math.pi * part)) / 2


def new_learner(site: Site) -> Learner:
    """Model and optimiser on the device; the values come from a weights file or an epoch checkpoint."""
    model = place(site.method.build(site.plan), site.hardware)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=site.plan.learning_rate, weight_decay=site.plan.weight_decay, fused=True
    )
    return Learner(model, optimizer)


# ---------------------------------------------------------------- opening and closing a round


def _open_round(
    site: Site, folder: Path, round: int, base: Path, base_sha256: str, report: Report
) -> tuple[Learner, RoundState]:
    """Three ways in: go on inside this round, carry Adam's moments over from the round before, or begin afresh."""
    if not len(site.indices(TRAIN)):
        raise DataError("there are no training images", remedy="look at the counts of `hsl-node data check`")
    folder.mkdir(parents=True, exist_ok=True)
    learner = new_learner(site)
    saved = checkpoint.load(folder)
    if saved and saved.state.run == site.run and (saved.state.round, saved.state.base_sha256) == (round, base_sha256):
        if _has_its_best(folder, saved.state):
            _warn_if_the_machine_changed(site, saved.state)
            learner.model.load_state_dict(saved.model)
            learner.optimizer.load_state_dict(saved.optimizer)
            report(validated(site, round - 1, saved.state.base))  # the daemon may not have heard it
            return learner, saved.state
        log.warning("its best weights so far are gone or altered: the round begins anew", extra={"round": round})

    require_model(base, base_sha256)
    if saved and saved.state.run == site.run and saved.state.round == round - 1 and saved.state.finished:
        _warn_if_the_machine_changed(site, saved.state)
        learner.model.load_state_dict(saved.model)  # tensors that are never shared go on from here
        if site.plan.optimizer_state == "keep":
            learner.optimizer.load_state_dict(saved.optimizer)
    elif round > 1:
        log.warning("no epoch checkpoint of the round before: Adam starts without its moments", extra={"round": round})
    load_weights(learner.model, read_weights(base), site.method.shared(learner.model))
    worth = worth_of(site, learner.model, round - 1, report)
    state = RoundState(run=site.run, round=round, base_sha256=base_sha256, base=worth, **site.hardware.facts)
    return learner, state


def _after_epoch(site: Site, learner: Learner, folder: Path, state: RoundState, found: Validation) -> RoundState:
    """Count the epoch; where it is the round's best so far, put its shared weights on disk."""
    epoch, best = state.epoch + 1, state.best
    leads = best is None or found.better_than(best.validation)
    stale = 0 if leads and found.better_than(state.base) else state.stale + 1
    if leads:
        weights = to_weights(learner.model, site.method.shared(learner.model))
        bad = next(filter(None, (fault(name, array) for name, array in weights.items())), None)
        if bad is not None:
            raise Diverged(f"{bad.message} (round {state.round}, epoch {epoch}): no peer would take it", remedy=LOWER)
        path = checkpoint.best_path(folder, state.round, epoch)
        digest = write_weights(path, weights, Step.TRAINER_BEST)
        best = Best(epoch, found, digest, path.stat().st_size)
    finished = epoch >= site.plan.epochs_per_round or stale >= site.plan.patience_epochs
    return replace(state, epoch=epoch, stale=stale, best=best, finished=finished)


def _write_best(folder: Path, state: RoundState, out: Path) -> None:
    assert state.best is not None
    if holds(out, state.best.sha256):
        durable.accept(out)
        return
    if not _has_its_best(folder, state):
        raise LocalStateError(
            f"the best weights of round {state.round} are gone or altered on the disk",
            remedy="the next attempt trains the round again; look at the disk",
        )
    best = checkpoint.best_path(folder, state.round, state.best.epoch)
    write_weights(out, read_weights(best), Step.TRAINER_OUTBOX)


def _has_its_best(folder: Path, state: RoundState) -> bool:
    """Are the weights that the epoch checkpoint names what they were?"""
    best = state.best
    return best is None or holds(checkpoint.best_path(folder, state.round, best.epoch), best.sha256)


def require_model(path: Path, sha256: str) -> None:
    """Raises: Altered: this is not the fused model with that sha256 (any more)."""
    if not holds(path, sha256):
        raise Altered(f"{path}, the fused model with sha256 {sha256[:12]}, is gone or altered on this disk")


def _warn_if_the_machine_changed(site: Site, state: RoundState) -> None:
    for what, now in site.hardware.facts.items():
        if (was := getattr(state, what)) != now:
            log.warning(
                "%s changed from %s to %s within the run: the result will differ in its last digits from an "
                "undisturbed run; set train.threads and train.device in node.toml to keep it",
                what,
                was,
                now,
                extra={"round": state.round},
            )


def _batch(site: Site, p: Indices, a: Indices) -> Batch:
    primary = _uploaded(site.dataset, p, site.hardware)
    return Batch(*primary, *_uploaded(site.anchor, a, site.hardware)) if site.anchor and len(a) else Batch(*primary)


def _uploaded(those: Dataset | AnchorSet, where: Indices, hardware: Hardware) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and labels (B,) on the device."""
    return upload(those.images[where], hardware), torch.from_numpy(those.labels[where]).to(hardware.device)


def worth_of(site: Site, model: nn.Module, round: int, report: Report) -> Validation:
    """Validate the fused model of `round`, and report it.

    Raises:
        Diverged: it gives no finite numbers, here as at every other peer.
    """
    try:
        found = validate(site, model, ticker(report, f"validating the weights of round {round}"))
    except Diverged as exc:
        what = f"the fused model of round {round}" if round else "the initial model"
        raise Diverged(f"{what} is spoilt: {exc.message}", remedy=exc.remedy) from exc
    report(validated(site, round, found))
    return found


def validated(site: Site, round: int, found: Validation) -> dict[str, Any]:
    """What a fused model is worth here; `labels`: validation images per class, for the AUC's standard error."""
    labels = np.bincount(site.dataset.labels[site.indices(VALIDATION)], minlength=len(site.plan.classes)).tolist()
    return {"event": "validated", "round": round, "auc": found.auc, "loss": found.loss, "labels": labels}
