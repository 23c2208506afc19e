"""Train one round: validate the base, some local epochs, keep the best one. Every method's loop.

Shapes at line ends: B pairs in a batch, C outputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsl_node.errors import DataError, Diverged, LocalStateError
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.train import checkpoint
from hsl_node.train.augment import Changes, draw
from hsl_node.train.batches import Batch, Indices, epoch_pairs
from hsl_node.train.checkpoint import Best, RoundState, Saved, Validation, Worth
from hsl_node.train.data.sources import TRAIN, VALIDATION
from hsl_node.train.devices import once, rank
from hsl_node.train.hardware import derived_seed, moved
from hsl_node.train.method import Done, Learner, Site
from hsl_node.train.optimizers import learning_rate, take_up
from hsl_node.train.progress import PROGRESS_EVERY_S, Report, ticker
from hsl_node.train.recalibrate import recalibrated
from hsl_node.train.scoring import validate
from hsl_node.train.start import StartFiles, Training, begin
from hsl_node.train.state_dict import all_tensors, to_weights
from hsl_node.weights.checkpoint_file import digest_of, fault, read_weights, write_weights
from hsl_node.weights.whole import holds

log = logging.getLogger(__name__)

LOWER = 'training diverged: agree on a lower learning_rate, or on precision = "float32"'


@dataclass(frozen=True)
class Epoch:
    """What came of one: optimiser steps, and the mean of every loss term over the images that it was taken of."""

    steps: int
    terms: Mapping[str, float]


def train_round(site: Site, *, folder: Path, files: StartFiles, out: Path, own: Path, report: Report) -> RoundState:
    """Train from what `files` says; go on where a killed process left off. The best epoch's travelling tensors go to
    `out`, all of its tensors to `own`. An epoch is reported when its checkpoint is on its way to the disk: after a kill
    it may be reported once more.

    Only trained epochs can be the round's checkpoint, and only they count for the patience: a hospital always
    contributes what it learned. Were the fused model counted as epoch 0, a round longer than the patience would end
    while its epochs still rise towards what fusing gave. At 5 epochs and patience 5, the paper's schedule, no round is
    ever cut short.

    Raises:
        DataError: no training images.
        Diverged: a loss or an output is not a finite number, or a weight is one that no peer would take.
        Altered: the base is not the file it should be.
        LocalStateError: the disk fails.
    """
    training, state = _open_round(site, folder, files, report)
    learner, round = training.learner, files.round
    usual, epochs_of = site.plan.epochs_per_round, site.method.epochs
    epochs, before = epochs_of(site.plan, round), sum(epochs_of(site.plan, earlier) for earlier in range(1, round))
    with checkpoint.Saving(folder) as saving:
        while not state.finished:
            epoch = state.epoch + 1
            started = time.monotonic()
            place = (round - 1) * usual + 1 + (epoch - 1) * usual / epochs
            rate = learning_rate(site.plan, before + epoch, place)
            trained = train_epoch(training, epoch, rate, report)
            if rank() == 0:
                found = validate(site, learner.model, ticker(report, f"validating round {round} epoch {epoch}"))
                saving.wait()  # before there is a best file that the one on its way would drop
                state = _after_epoch(training, folder, state, trained, rate, found, epochs)
                optimizers = {name: optimizer.state_dict() for name, optimizer in learner.optimizers.items()}
                saving.put(Saved(state, learner.model.state_dict(), optimizers))
                report(
                    {
                        "event": "epoch",
                        "round": round,
                        "epoch": epoch,
                        "terms": dict(trained.terms),
                        "score": found.score,
                        "validation_loss": found.loss,
                        "learning_rate": rate,
                        "seconds": time.monotonic() - started,
                    }
                )
            state = once(partial(replace, state))
    once(lambda: _write_best(site.method.travels(learner.model), folder, state, out, own))
    return state


def train_epoch(training: Training, epoch: int, rate: float, report: Report) -> Epoch:
    """All passes of the method over this site's images, and where the plan says so over the longer anchor set.

    Everything random in it follows from (plan.seed, peer, round, epoch).
    """
    learner, site, plan = training.learner, training.learner.site, training.learner.plan
    seed = derived_seed(plan.seed, site.peer, training.start.round, epoch)
    torch.manual_seed(derived_seed(seed, "rank", rank()) if rank() else seed)  # dropout, of other images
    rng = np.random.default_rng(seed)
    for group in learner.optimizers["main"].param_groups:
        group["lr"] = rate
    chosen = np.arange(len(site.indices(TRAIN)))
    if site.method.samples is not None:
        chosen = once(partial(site.method.samples, learner, training.start, training.beside, epoch))
    anchors = len(site.anchor.images) if site.method.network.reference and site.anchor else 0
    how: dict[str, Any] = {"own": plan.epoch == "own", "anchor_every": int(site.settings.get("anchor_every", 1))}
    if plan.class_balance == "sampler":
        how["balanced"] = site.dataset.labels[site.indices(TRAIN)][chosen]
    orders = [epoch_pairs(rng, len(chosen), anchors, plan.batch_size, **how) for _ in site.method.passes]
    changing = np.random.default_rng(derived_seed(seed, "augment"))
    progress = _Progress(training.start.round, epoch, sum(map(len, orders)), report)

    learner.model.train()
    seen: dict[str, float] = {}
    steps = 0
    for update, pairs in zip(site.method.passes, orders, strict=True):
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        images = sum(len(p) for p, _ in pairs)
        for p, a in pairs:
            batch = _batch(training, chosen[p], a, draw(plan.augment, changing, len(p)))
            step = training.step(batch, seen, len(p) / images, epoch)
            terms = update(step) or {}
            steps += bool(terms)
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() * len(p)
                counts[name] = counts.get(name, 0) + len(p)
            if rank() == 0:
                progress.batch(len(p) + len(a), totals)
        seen = seen | {name: total.item() / counts[name] for name, total in totals.items()}
    return Epoch(steps, seen)


# ---------------------------------------------------------------- opening and closing a round


def _open_round(site: Site, folder: Path, files: StartFiles, report: Report) -> tuple[Training, RoundState]:
    """Go on inside this round, or begin it, with the optimizers' state of the round before where the plan keeps it."""
    if not len(site.indices(TRAIN)):
        raise DataError("there are no training images", remedy="look at the counts of `hsl-node data check`")
    folder.mkdir(parents=True, exist_ok=True)
    round = files.round
    training = begin(site, files)
    learner = training.learner
    saved = checkpoint.load(folder)
    ours = saved is not None and saved.state.run == site.run
    if saved and ours and (saved.state.round, saved.state.base_sha256) == (round, files.base_sha256):
        if _has_its_best(folder, saved.state):
            _warn_if_the_machine_changed(site, saved.state)
            learner.model.load_state_dict(saved.model)
            _restore(learner, saved)
            report(validated(site, round - 1, saved.state.worth))  # the daemon may not have heard it
            return training, saved.state
        log.warning("its best weights so far are gone or altered: the round begins anew", extra={"round": round})

    if saved and ours and saved.state.round == round - 1 and saved.state.finished:
        _warn_if_the_machine_changed(site, saved.state)
        if site.plan.optimizer_state == "keep" and not site.method.forgets:
            _restore(learner, saved)
    elif round > 1:
        log.warning(
            "no epoch checkpoint of the round before: the optimizer starts without its state", extra={"round": round}
        )
    worth = once(lambda: worth_of(site, learner.model, round - 1, report))
    state = RoundState(run=site.run, round=round, base_sha256=files.base_sha256, worth=worth, **site.hardware.facts)
    return training, state


def _restore(learner: Learner, saved: Saved) -> None:
    for name, optimizer in learner.optimizers.items():
        take_up(optimizer, saved.optimizers[name])


def _after_epoch(
    training: Training,
    folder: Path,
    state: RoundState,
    trained: Epoch,
    rate: float,
    found: Validation,
    epochs: int,
) -> RoundState:
    """Count the epoch; where it is the round's best so far, put its tensors on disk."""
    epoch, best, learner = state.epoch + 1, state.best, training.learner
    steps, rates = (*state.steps, trained.steps), (*state.rates, rate)
    leads = best is None or found.better_than(best.validation)
    stale = 0 if leads else state.stale + 1
    if leads:
        method = learner.site.method
        own = to_weights(learner.model, all_tensors(learner.model))
        travels = {name: own[name] for name in sorted(method.travels(learner.model))}
        bad = next(filter(None, (fault(name, array) for name, array in travels.items())), None)
        if bad is not None:
            raise Diverged(f"{bad.message} (round {state.round}, epoch {epoch}): no peer would take it", remedy=LOWER)
        own_sha256 = write_weights(checkpoint.best_path(folder, state.round, epoch), own, Step.TRAINER_BEST)
        sha256, size = digest_of(travels)
        done = Done(epoch, steps, rates, trained.terms, found.score, found.loss)
        said = method.says(learner, training.start, done)
        best = Best(epoch, found, sha256, size, own_sha256, dict(said))
    finished = epoch >= epochs or stale >= learner.plan.patience_epochs
    return replace(state, epoch=epoch, steps=steps, rates=rates, stale=stale, best=best, finished=finished)


def _write_best(travels: frozenset[str], folder: Path, state: RoundState, out: Path, own: Path) -> None:
    assert state.best is not None
    if holds(out, state.best.sha256) and holds(own, state.best.own_sha256):
        durable.accept(out)
        durable.accept(own)
        return
    if not _has_its_best(folder, state):
        raise LocalStateError(
            f"the best weights of round {state.round} are gone or altered on the disk",
            remedy="the next attempt trains the round again; look at the disk",
        )
    best = read_weights(checkpoint.best_path(folder, state.round, state.best.epoch))
    write_weights(own, best, Step.TRAINER_OWN)
    write_weights(out, {name: best[name] for name in sorted(travels)}, Step.TRAINER_OUTBOX)


def _has_its_best(folder: Path, state: RoundState) -> bool:
    """Are the weights that the epoch checkpoint names what they were?"""
    best = state.best
    return best is None or holds(checkpoint.best_path(folder, state.round, best.epoch), best.own_sha256)


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


def _batch(training: Training, where: Indices, a: Indices, changes: Changes | None) -> Batch:
    """`where`: positions in the training set; `a`: in the anchor set, whose images stay as they are."""
    site, device = training.learner.site, training.learner.device
    at = site.indices(TRAIN)[where]
    found = training.images(at, changes), moved(site.dataset.labels[at], device), where
    if site.anchor is None or training.anchors is None or not len(a):
        return Batch(*found)
    return Batch(*found, training.anchors(a), moved(site.anchor.labels[a], device))


def worth_of(site: Site, model: nn.Module, round: int, report: Report) -> Worth:
    """Validate the fused model of `round` as it is here, and as it would be used, and report both.

    Raises:
        Diverged: it gives no finite numbers, here as at every other peer.
    """
    tick = ticker(report, f"validating the weights of round {round}")
    try:
        fused, other = validate(site, model, tick), None
        if site.plan.recalibrate and (measured := recalibrated(model, site, tick)) is not model:
            other = validate(site, measured, tick)
    except Diverged as exc:
        what = f"the fused model of round {round}" if round else "the initial model"
        raise Diverged(f"{what} is spoilt: {exc.message}", remedy=exc.remedy) from exc
    worth = Worth(fused, other)
    report(validated(site, round, worth))
    return worth


def validated(site: Site, round: int, worth: Worth) -> dict[str, Any]:
    """What a fused model is worth here; `labels`: validation images per class, for the score's standard error."""
    labels = np.bincount(site.dataset.labels[site.indices(VALIDATION)], minlength=len(site.plan.classes)).tolist()
    return {
        "event": "validated",
        "round": round,
        **asdict(worth.fused),
        "recalibrated": asdict(worth.recalibrated) if worth.recalibrated else None,
        "labels": labels,
    }


class _Progress:
    """Says how far an epoch is, about once a second, and looks then, when it must wait for the device anyway, whether
    the loss is still a number."""

    def __init__(self, round: int, epoch: int, batches: int, report: Report) -> None:
        self.round, self.epoch, self.batches, self.report = round, epoch, batches, report
        self.number, self.images, self.mark = 0, 0, time.monotonic()

    def batch(self, images: int, totals: Mapping[str, Tensor]) -> None:
        """Raises: Diverged"""
        self.number += 1
        self.images += images
        if time.monotonic() - self.mark < PROGRESS_EVERY_S and self.number < self.batches:
            return
        if totals and not bool(torch.isfinite(torch.stack([*totals.values()])).all()):
            where = f"round {self.round}, epoch {self.epoch}, batch {self.number}"
            raise Diverged(f"the loss is not a finite number ({where})", remedy=LOWER)
        now = time.monotonic()
        self.report(
            {
                "event": "progress",
                "round": self.round,
                "epoch": self.epoch,
                "batch": self.number,
                "batches": self.batches,
                "images_per_s": self.images / max(now - self.mark, 1e-9),
            }
        )
        self.mark, self.images = now, 0
