"""FedDyS: the worked numbers, nested sets in real epochs, and evenness of the epoch that is sent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hsl_node.train import checkpoint, loop
from hsl_node.train.data.sources import TRAIN
from hsl_node.train.hardware import prepare
from hsl_node.train.loop import train_round
from hsl_node.train.memory import Memory, memory
from hsl_node.train.method import Site, Start
from hsl_node.train.methods import feddys
from hsl_node.train.methods.feddys import evenness, metric, stays
from hsl_node.train.site import initial_weights
from hsl_node.train.start import StartFiles, new_learner


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


LABELS = np.array([0, 0, 0, 0, 1, 2])
MARGINS = np.array([0.85, 0.10, 0.25, 0.01, 0.70, 0.60])  # the last two are of classes with 1 image, the mean is 2


def of_margins(margins: np.ndarray) -> np.ndarray:
    """(N, 3) probabilities whose two largest differ by these margins."""
    small = np.minimum(0.1, (1 - margins) / 3)
    high = (1 - small + margins) / 2
    return np.stack([high - margins, small, high], axis=1)


def test_the_worked_example():
    rare = (np.bincount(LABELS, minlength=3) < 2)[LABELS]
    q = metric(of_margins(MARGINS), rare)
    assert q == pytest.approx([2.33965, 1.10517, 1.28403, 1.01005, 1.41907, 1.34986], rel=1e-5)
    assert q.mean() == pytest.approx(1.41797, rel=1e-5)
    assert np.flatnonzero(stays(q)).tolist() == [1, 2, 3, 5]


def test_evenness_is_the_entropy_of_the_label_shares_or_as_released_the_classes_present():
    label = np.array([0, 0, 1])
    assert evenness(label, 3) == pytest.approx(0.57938, rel=1e-4)
    assert evenness(label, 3, "classes") == pytest.approx(0.63093, rel=1e-4)
    for form in ("entropy", "classes"):
        assert str(evenness(np.array([1, 1, 1]), 3, form)) == "0.0"
        assert evenness(np.array([2, 0, 1, 1, 0, 2]), 3, form) == pytest.approx(1)
    assert evenness(np.array([0, 1]), 4) == pytest.approx(0.5)  # of the task's classes, not of those seen here


@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(1, math.e)))
def test_somebody_stays_and_where_all_are_alike_all_do(q):
    assert stays(q).any()
    assert stays(np.full_like(q, q[0])).all()
    assert stays(np.where(np.arange(len(q)) == 0, np.nan, q)).all()


class Killed(BaseException):
    """Stands for SIGKILL."""


def trained(
    site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[checkpoint.RoundState, list[np.ndarray]]:
    """A round, and what each of its epochs kept."""
    kept: list[np.ndarray] = []
    whole = loop.train_epoch

    def spied(training: Any, *rest: Any) -> Any:
        found = whole(training, *rest)
        kept.append(memory(training.learner.optimizers, "kept").get().numpy().copy())
        return found

    folder.mkdir(exist_ok=True)
    digest, _ = initial_weights(folder, site.plan, site.method, folder / "fused")
    with monkeypatch.context() as watched:
        watched.setattr(loop, "train_epoch", spied)
        state = train_round(
            site,
            folder=folder / "trainer",
            files=StartFiles(1, folder / "fused", digest),
            out=folder / "out",
            own=folder / "own",
            report=lambda _: None,
        )
    return state, kept


@pytest.mark.parametrize("classes", [2, 3])
def test_each_epoch_keeps_a_part_of_what_the_last_one_kept_and_says_its_evenness(tmp_path, monkeypatch, classes):
    names = ["a", "b", "c"][:classes]
    plan = learning.small_plan(method="feddys", epochs_per_round=4, classes=names)
    site = learning.site(plan, learning.dataset(train=60, classes=classes))
    state, kept = trained(site, tmp_path, monkeypatch)
    sizes = [60, *map(len, kept)]
    assert all(set(b) <= set(a) for a, b in zip([np.arange(60), *kept], kept, strict=False))
    assert sizes == sorted(sizes, reverse=True) and 0 < sizes[-1] < 60
    assert state.best is not None
    label = site.dataset.labels[site.indices(TRAIN)[kept[state.best.epoch - 1]]]
    assert state.best.said == {"evenness": evenness(label, classes)}
    assert [*state.steps] == [max(1, n // 8 if n % 8 == 1 else -(-n // 8)) for n in sizes[1:]]  # of those kept alone


def test_a_class_is_rare_by_all_images_of_the_hospital_not_by_those_kept(monkeypatch):
    """8 and 40 images, of which 2 and 1 are kept: class 0 is still the rare one, whose margins are halved."""
    data = learning.dataset(train=48)
    data.labels[:48] = np.repeat([0, 1], [8, 40])
    learner = new_learner(learning.site(learning.small_plan(method="feddys"), data))
    memory(learner.optimizers, "kept").put(torch.tensor([0, 1, 8]))
    monkeypatch.setattr(feddys, "forward", lambda *_: torch.tensor([0.9, 0.5, 0.75]).logit()[:, None])
    assert feddys.select(learner, Start(2, {}), None, epoch=2).tolist() == [1]  # by those kept: 1 and 8


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_round_that_was_killed_goes_on_with_the_images_that_it_had_kept(tmp_path, monkeypatch, epoch):
    plan = learning.small_plan(method="feddys", epochs_per_round=4)
    site = learning.site(plan, learning.dataset(train=60))
    _, undisturbed = trained(site, tmp_path / "one", monkeypatch)

    def die(training: Any, now: int, *rest: Any) -> Any:
        if now == epoch + 1:
            raise Killed
        return whole(training, now, *rest)

    whole = loop.train_epoch
    with pytest.raises(Killed), monkeypatch.context() as once:
        once.setattr(loop, "train_epoch", die)
        trained(site, tmp_path / "other", once)
    _, rest = trained(site, tmp_path / "other", monkeypatch)
    assert [k.tolist() for k in rest] == [k.tolist() for k in undisturbed[epoch:]]
    for name in ("out", "own"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert learning.same_bytes(tmp_path / "one" / "trainer", tmp_path / "other" / "trainer")


def test_a_memory_goes_through_the_epoch_checkpoint_as_it_is():
    one, other = Memory(), Memory()
    with pytest.raises(KeyError):
        one.get()
    for tensor in (torch.tensor([2**40, 7]), torch.tensor([1e-30, 0.1], dtype=torch.float64), torch.zeros(0)):
        one.put(tensor)
        other.load_state_dict(one.state_dict())
        assert torch.equal(other.get(), tensor) and other.get().dtype == tensor.dtype
