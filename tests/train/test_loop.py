"""One round of training: pairing, schedule, choice of the epoch, early end, Adam's moments, going on after a kill."""

from __future__ import annotations

import errno
import io
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import torch

from hsl_node.errors import Altered, ConfigError, DataError, Diverged, LocalStateError
from hsl_node.train import checkpoint, loop
from hsl_node.train.batches import epoch_pairs, normalise, upload
from hsl_node.train.checkpoint import RoundState, Validation
from hsl_node.train.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from hsl_node.train.hardware import derived_seed, prepare
from hsl_node.train.loop import train_round
from hsl_node.train.method import Site
from hsl_node.train.optimizers import learning_rate
from hsl_node.train.site import initial_weights
from hsl_node.train.start import StartFiles
from hsl_node.train.updates import descend
from hsl_node.weights.checkpoint_file import MAGNITUDE_MAX, check_file, read_weights, schema_of, write_weights
from hsl_node.weights.whole import sha256_of


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


def base_of(site: Site, folder: Path) -> tuple[Path, str]:
    path = folder / "fused" / "r000000.safetensors"
    digest, _ = initial_weights(folder, site.plan, site.method, path)
    return path, digest


def run(site: Site, folder: Path, events: list[dict[str, Any]] | None = None, **changes: Any) -> RoundState:
    base, digest = base_of(site, folder)
    start = {"round": 1, "base": base, "base_sha256": digest}
    settings: dict[str, Any] = {
        "folder": folder / "trainer",
        "files": StartFiles(**{name: changes.pop(name, value) for name, value in start.items()}),
        "out": folder / "out.safetensors",
        "own": folder / "own.safetensors",
        "report": (events if events is not None else []).append,
    }
    return train_round(site, **{**settings, **changes})


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(("primary", "anchor"), [(5, 20), (20, 5), (7, 7), (1, 3), (1, 1), (9, 0)])
@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_an_epoch_is_one_pass_over_the_longer_set_and_cycles_the_shorter(
    primary: int, anchor: int, batch_size: int
) -> None:
    pairs = epoch_pairs(np.random.default_rng(0), primary, anchor, batch_size)
    sizes = [len(p) for p, _ in pairs]
    assert min(sizes) >= 2  # BatchNorm cannot work with one image
    assert max(sizes) <= batch_size + 1 and sum(sizes) == max(primary, anchor, 2)
    for count, taken in ((primary, [p for p, _ in pairs]), (anchor, [a for _, a in pairs])):
        times = np.bincount(np.concatenate(taken), minlength=count) if count else np.zeros(1)
        assert times.max() - times.min() <= 1  # cycled fairly
    if anchor:
        assert [len(a) for _, a in pairs] == sizes


def test_the_two_sets_are_shuffled_independently() -> None:
    pairs = epoch_pairs(np.random.default_rng(0), 64, 64, 64)
    assert not np.array_equal(*pairs[0])
    again = epoch_pairs(np.random.default_rng(0), 64, 64, 64)
    assert np.array_equal(pairs[0][0], again[0][0])


def test_grey_pixels_become_three_normalised_channels() -> None:
    pixels = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    found = normalise(pixels)
    assert found.shape == (1, 3, 2, 2)
    for c in range(3):
        by_hand = (torch.tensor([[0.0, 1.0], [0.2, 0.4]]) - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
        torch.testing.assert_close(found[0, c], by_hand)


def test_colour_keeps_its_channels_and_uploads_channels_last_where_asked() -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[..., 1] = 255
    hardware = replace(learning.CPU, memory_format=torch.channels_last)
    found = upload(images, hardware)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found[0, 1, 0, 0].item() == pytest.approx((1 - IMAGENET_MEAN[1]) / IMAGENET_STD[1])
    assert found[0, 2, 0, 0].item() == pytest.approx(-IMAGENET_MEAN[2] / IMAGENET_STD[2])


# ---------------------------------------------------------------- schedule


def test_the_learning_rate_falls_along_a_cosine_and_starts_anew_each_period() -> None:
    site = learning.site(
        learning.small_plan(schedule="restarts", cosine_period_epochs=4, learning_rate=1e-3, learning_rate_min=1e-4)
    )
    rates = [learning_rate(site.plan, e) for e in range(1, 10)]
    assert rates[0] == rates[4] == rates[8] == 1e-3
    assert rates[2] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[1] == pytest.approx(1e-4 + 9e-4 * (1 + 0.5**0.5) / 2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    torch_schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4, eta_min=1e-4)
    for rate in rates:
        assert rate == pytest.approx(torch_schedule.get_last_lr()[0])
        optimizer.step()
        torch_schedule.step()


def test_the_schedule_counts_epochs_over_the_whole_run(tmp_path: Path) -> None:
    site = learning.site(learning.small_plan(cosine_period_epochs=4))
    events: list[dict[str, Any]] = []
    run(site, tmp_path, events)
    run(site, tmp_path, events, round=2)
    rates = [e["learning_rate"] for e in events if e["event"] == "epoch"]
    assert rates == [learning_rate(site.plan, e) for e in (1, 2, 3, 4)]


# ---------------------------------------------------------------- which epoch counts


def scripted(monkeypatch: pytest.MonkeyPatch, verdicts: list[Validation]) -> None:
    """Let validation say, in order: the base, epoch 1, epoch 2, ..."""
    told = iter(verdicts)
    monkeypatch.setattr(loop, "validate", lambda *_: next(told))


def aucs(*values: float | None) -> list[Validation]:
    return [Validation(v, 0.5) for v in values]


@pytest.mark.parametrize(
    ("verdicts", "best", "epochs"),
    [
        (aucs(0.9, 0.6, 0.8, 0.7), 2, 3),  # the base was better than all: still a trained epoch is sent
        (aucs(0.5, 0.7, 0.7, 0.6), 1, 3),  # a tie keeps the earlier
        (aucs(0.5, 0.6, 0.7, 0.8), 3, 3),
        ([Validation(None, x) for x in (0.9, 0.7, 0.4, 0.5)], 2, 3),  # AUC undefined: lowest loss
        ([Validation(None, None)] * 4, 3, 3),  # no validation images: the last epoch
    ],
)
def test_the_best_trained_epoch_is_the_rounds_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdicts: list[Validation], best: int, epochs: int
) -> None:
    site = learning.site(learning.small_plan(epochs_per_round=3, recalibrate=False), learning.dataset(train=8))
    scripted(monkeypatch, verdicts)
    done = run(site, tmp_path)
    assert done.best is not None
    assert (done.best.epoch, done.epoch) == (best, epochs)
    assert done.best.validation == verdicts[best]
    assert sha256_of(tmp_path / "out.safetensors") == done.best.sha256
    counter = read_weights(tmp_path / "out.safetensors")["encoder.trunk.net.bn1.num_batches_tracked"]
    assert counter == best * 3  # 24 anchor images, batches of 8: the weights are those of that very epoch


@pytest.mark.parametrize(
    ("patience", "verdicts", "epochs"),
    [
        (2, aucs(0.9, 0.6, 0.7, 0.8, 0.85, 0.95), 5),  # all but the last below the base, and each better than before
        (2, aucs(0.9, 0.6, 0.5, 0.55, 0.99), 3),
        (2, aucs(0.5, 0.6, 0.6, 0.6, 0.9), 3),  # equal is not better
        (2, aucs(0.5, 0.4, 0.6, 0.5, 0.7, 0.1), 5),
        (5, aucs(0.9, 0.1, 0.1, 0.1, 0.1, 0.1), 5),  # the published 5 and 5: never cut short
    ],
)
def test_a_round_ends_early_when_patience_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int, verdicts: list[Validation], epochs: int
) -> None:
    plan = learning.small_plan(epochs_per_round=5, patience_epochs=patience, recalibrate=False)
    scripted(monkeypatch, verdicts)
    assert run(learning.site(plan, learning.dataset(train=8)), tmp_path).epoch == epochs


# ---------------------------------------------------------------- the round


def test_a_round_reports_validation_progress_and_epochs_in_order(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    done = run(learning.site(), tmp_path, events)
    told = [e["event"] for e in events if e["event"] in ("validated", "epoch")]
    assert told == ["validated", "epoch", "epoch"]
    assert next(e for e in events if e["event"] == "validated")["round"] == 0
    progress = [e for e in events if e["event"] == "progress"]
    assert progress[-1]["batch"] == progress[-1]["batches"] == 5 and progress[-1]["images_per_s"] > 0
    assert all(e["score"] is not None and e["validation_loss"] > 0 for e in events if e["event"] == "epoch")
    assert done.finished and done.epoch == 2


@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "fedavg"}, {"hsl": {"encoder": "separate", "anchor_weight": 1}}, {"classes": ("a", "b", "c")}],
)
def test_training_learns_what_can_be_learned(tmp_path: Path, settings: dict[str, Any]) -> None:
    plan = learning.small_plan(epochs_per_round=6, patience_epochs=6, **settings)
    events: list[dict[str, Any]] = []
    done = run(learning.site(plan), tmp_path, events)
    losses = [e["terms"]["primary"] for e in events if e["event"] == "epoch"]
    assert losses[-1] < 0.75 * losses[0]
    assert done.best is not None and done.best.validation.score is not None and done.best.validation.score > 0.8
    anchor_losses = [e["terms"].get("anchor") for e in events if e["event"] == "epoch"]
    assert (anchor_losses[-1] < anchor_losses[0]) if plan.method == "hsl" else set(anchor_losses) == {None}


def test_bfloat16_training_learns_too(tmp_path: Path) -> None:
    site = learning.site(learning.small_plan(epochs_per_round=4))
    events: list[dict[str, Any]] = []
    run(replace(site, hardware=replace(site.hardware, precision="bfloat16")), tmp_path, events)
    losses = [e["terms"]["primary"] for e in events if e["event"] == "epoch"]
    assert losses[-1] < losses[0]


def test_two_peers_with_the_same_images_see_them_in_different_order(tmp_path: Path) -> None:
    digests = []
    for peer in ("mercy", "charity", "mercy"):
        folder = tmp_path / str(len(digests))
        digests.append(run(learning.site(peer=peer), folder).best)
    assert digests[0] == digests[2] != digests[1]
    assert derived_seed(1, "mercy", 1, 2) != derived_seed(1, "mercy", 2, 1)


def test_a_loss_that_is_not_a_number_names_the_epoch_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = learning.site()
    spoilt = replace(
        site.method,
        passes=(descend(lambda s: {"primary": s.model(s.batch.image, s.batch.anchor)[0].sum() * float("nan")}),),
    )
    with pytest.raises(ConfigError, match="round 1, epoch 1") as caught:
        run(replace(site, method=spoilt), tmp_path)
    assert "learning_rate" in caught.value.remedy


def test_threat_08_a_spoilt_fused_model_is_named_as_the_cause(tmp_path: Path) -> None:
    """Every value passes the intake; together they overflow."""
    weights = read_weights(base_of(learning.site(), tmp_path)[0])
    huge = {n: np.full_like(w, MAGNITUDE_MAX) if w.dtype.kind == "f" else w for n, w in weights.items()}
    digest = write_weights(tmp_path / "base", huge)
    check_file(tmp_path / "base", schema_of(huge), sha256=digest)
    with pytest.raises(Diverged, match="the fused model of round 1 is spoilt"):
        run(learning.site(), tmp_path, round=2, base=tmp_path / "base", base_sha256=digest)


def test_threat_08_weights_that_no_peer_would_take_are_not_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsl_node.weights.checkpoint_file.MAGNITUDE_MAX", 1e-3)
    with pytest.raises(Diverged, match=r"round 1, epoch 1.*no peer would take it"):
        run(learning.site(), tmp_path)


def test_a_hospital_without_training_images_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training images"):
        run(learning.site(data=learning.dataset(train=0)), tmp_path)


def test_a_base_with_other_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Altered, match="is gone or altered on this disk"):
        run(learning.site(), tmp_path, base_sha256="0" * 64)


# ---------------------------------------------------------------- killed and resumed


def kill_at(events: list[dict[str, Any]], kind: str, epoch: int) -> Any:
    def report(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == kind and event.get("epoch") == epoch:
            raise Killed

    return report


@pytest.mark.parametrize(
    ("kind", "epoch"), [("progress", 1), ("progress", 2), ("epoch", 1), ("epoch", 2), ("epoch", 3)]
)
def test_threat_22_a_round_killed_anywhere_ends_with_the_same_bytes(tmp_path: Path, kind: str, epoch: int) -> None:
    site = learning.site(learning.small_plan(epochs_per_round=3))
    undisturbed = run(site, tmp_path / "a")
    with pytest.raises(Killed):
        run(site, tmp_path / "b", report=kill_at([], kind, epoch))
    events: list[dict[str, Any]] = []
    assert run(site, tmp_path / "b", events) == undisturbed
    assert (tmp_path / "a/out.safetensors").read_bytes() == (tmp_path / "b/out.safetensors").read_bytes()
    assert learning.same_bytes(tmp_path / "a/trainer", tmp_path / "b/trainer")
    trained_again = [e["epoch"] for e in events if e["event"] == "epoch"]
    first = epoch + 1 if kind == "epoch" else epoch  # a saved epoch is not trained twice
    assert trained_again == list(range(first, 4))
    assert any(e["event"] == "validated" for e in events)


def test_killed_between_the_best_file_and_the_epoch_checkpoint_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = learning.site(learning.small_plan(epochs_per_round=2))
    undisturbed = run(site, tmp_path / "a")
    saves = 0
    really = checkpoint.save

    def dies_in_the_second(folder: Path, state: RoundState, packed: io.BytesIO) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            raise Killed
        really(folder, state, packed)

    monkeypatch.setattr(checkpoint, "save", dies_in_the_second)
    with pytest.raises(Killed):
        run(site, tmp_path / "b")
    monkeypatch.undo()
    assert run(site, tmp_path / "b") == undisturbed
    assert learning.same_bytes(tmp_path / "a/trainer", tmp_path / "b/trainer")
    best = [p.name for p in (tmp_path / "b/trainer").glob("best_*")]
    assert best == [p.name for p in (tmp_path / "a/trainer").glob("best_*")] and len(best) == 1


def test_a_finished_round_answers_at_once_and_restores_a_lost_result(tmp_path: Path) -> None:
    site = learning.site()
    first = run(site, tmp_path)
    (tmp_path / "out.safetensors").unlink()
    events: list[dict[str, Any]] = []
    assert run(site, tmp_path, events) == first
    assert [e["event"] for e in events] == ["validated"]
    assert first.best is not None and sha256_of(tmp_path / "out.safetensors") == first.best.sha256


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("altered", [True, False])
def test_threat_23_a_round_whose_best_weights_are_gone_or_altered_is_trained_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, altered: bool, epochs: int
) -> None:
    """Finished, or in its midst. Before, it failed at each start, or sent other bytes to outbox/ first."""
    site = learning.site()
    undisturbed = run(site, tmp_path / "a")
    with pytest.raises(Killed):
        run(site, tmp_path / "b", report=kill_at([], "epoch", epochs))
    (best,) = (tmp_path / "b/trainer").glob("best_*")
    content = bytearray(best.read_bytes())
    content[-1] ^= 1
    best.write_bytes(content) if altered else best.unlink()
    with caplog.at_level(logging.WARNING):
        assert run(site, tmp_path / "b") == undisturbed
    assert "begins anew" in caplog.text
    assert (tmp_path / "a/out.safetensors").read_bytes() == (tmp_path / "b/out.safetensors").read_bytes()


def test_threat_23_weights_that_are_altered_after_the_last_look_never_reach_the_outbox(tmp_path: Path) -> None:
    state = run(learning.site(), tmp_path)
    assert state.best is not None
    out = tmp_path / "out.safetensors"
    out.unlink()
    path = checkpoint.best_path(tmp_path / "trainer", 1, state.best.epoch)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(LocalStateError, match="gone or altered"):
        loop._write_best(frozenset(), tmp_path / "trainer", state, out, tmp_path / "own.safetensors")
    assert not out.exists()


def test_an_epoch_checkpoint_of_another_federation_is_not_resumed(tmp_path: Path) -> None:
    site = learning.site()
    run(site, tmp_path)
    events: list[dict[str, Any]] = []
    run(replace(site, run="f" * 64), tmp_path, events)
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1, 2]


@pytest.mark.parametrize("setting", ["keep", "reset"])
def test_adams_moments_survive_a_fusion_only_where_the_plan_keeps_them(tmp_path: Path, setting: str) -> None:
    site = learning.site(learning.small_plan(optimizer_state=setting, epochs_per_round=1))
    run(site, tmp_path)
    run(site, tmp_path, round=2)
    saved = checkpoint.load(tmp_path / "trainer")
    assert saved is not None
    steps = {int(s["step"]) for s in saved.optimizers["main"]["state"].values()}
    assert steps == {10 if setting == "keep" else 5}  # 5 batches an epoch


def test_a_changed_thread_count_within_a_run_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = learning.site()
    with pytest.raises(Killed):
        run(site, tmp_path, report=kill_at([], "epoch", 1))
    with caplog.at_level(logging.WARNING):
        run(replace(site, hardware=replace(site.hardware, threads=site.hardware.threads + 1)), tmp_path)
    assert "threads changed from" in caplog.text and "train.threads" in caplog.text


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "one bit": lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :],
    "one bit of its sha256": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
    "cut short": lambda b: b[:1000],
    "empty": lambda b: b"",
    "something else": lambda b: b"x" * len(b),
    "without its sha256": lambda b: b[: -checkpoint.SEAL_BYTES],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_threat_23_a_round_whose_epoch_checkpoint_is_damaged_begins_anew_and_ends_with_the_same_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Before, one bit was trained on, and most else stopped the node at every attempt until a person came."""
    site = learning.site()
    undisturbed = run(site, tmp_path / "a")
    with pytest.raises(Killed):
        run(site, tmp_path / "b", report=kill_at([], "epoch", 1))
    path = tmp_path / "b/trainer" / checkpoint.EPOCH_FILE
    path.write_bytes(DAMAGED[kind](path.read_bytes()))
    events: list[dict[str, Any]] = []
    with caplog.at_level(logging.WARNING):
        assert run(site, tmp_path / "b", events) == undisturbed
    assert "trainer/epoch.pt is damaged: the round begins anew" in caplog.text
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1, 2]
    assert (tmp_path / "a/out.safetensors").read_bytes() == (tmp_path / "b/out.safetensors").read_bytes()
    assert learning.same_bytes(tmp_path / "a/trainer", tmp_path / "b/trainer")


def test_after_a_damaged_epoch_checkpoint_of_the_round_before_adam_starts_without_its_moments(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = learning.site()
    run(site, tmp_path)
    path = tmp_path / "trainer" / checkpoint.EPOCH_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        assert run(site, tmp_path, round=2).finished
    assert "epoch.pt is damaged" in caplog.text and "the optimizer starts without its state" in caplog.text


def test_threat_23_no_bit_altered_anywhere_in_an_epoch_checkpoint_is_taken_or_stops_the_node(tmp_path: Path) -> None:
    run(learning.site(), tmp_path)
    path = tmp_path / "trainer" / checkpoint.EPOCH_FILE
    sealed = path.read_bytes()
    rng = np.random.default_rng(1)
    places = [*rng.integers(0, len(sealed), 100), *range(len(sealed) - 300, len(sealed))]

    def found(place: int) -> checkpoint.Saved | None:
        content = bytearray(sealed)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        return checkpoint.load(path.parent)

    assert not [place for place in places if found(int(place))]


def test_an_epoch_checkpoint_that_is_what_was_written_and_cannot_be_read_here_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory left, or another version wrote it: nothing is wrong with the file."""
    site = learning.site()
    run(site, tmp_path)
    monkeypatch.setattr(checkpoint, "VERSION", 3)
    with pytest.raises(LocalStateError, match="cannot be read: 'version 2'") as caught:
        run(site, tmp_path, round=2)
    assert "move" in caught.value.remedy


def test_threat_23_a_disk_that_gives_an_error_for_the_epoch_checkpoint_is_no_damage_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = learning.site()
    run(site, tmp_path)

    def failing(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(LocalStateError, match="Input/output error"):
        run(site, tmp_path, round=2)
