"""MetaFed as a parallel ring: who learns from whom, when, and by how much."""

from __future__ import annotations

from functools import partial
from typing import Any

import learning
import pytest
import torch
from steps import step_of
from torch import Tensor, nn

from hsl_node.train.method import Done, Learner, Start
from hsl_node.train.methods import metafed
from hsl_node.train.methods.metafed import METAFED, Teacher, distilled, says_able, teacher, teacher_of, weight_of
from hsl_node.train.start import new_learner
from hsl_node.train.task import Task
from hsl_node.train.updates import descend

PEERS = ("a", "b", "c")


def learner_of(me: str = "a", rounds: int = 9, **settings: Any) -> Learner:
    return new_learner(learning.site(learning.small_plan(method="metafed", rounds=rounds, metafed=settings), peer=me))


def start_of(full_set: dict[str, dict[str, Tensor]], able: dict[str, float], round: int = 2) -> Start:
    return Start(round, {}, {peer: {"able": able[peer]} for peer in PEERS}, dict.fromkeys(PEERS, 1), full_set)


def filled(learner: Learner, value: float) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in learner.model.state_dict().items()}


def parameters_of(learner: Learner) -> set[float]:
    return {value for p in learner.model.parameters() for value in p.detach().flatten().tolist()}


# ---------------------------------------------------------------- worked numbers: METHODS, MetaFed, point 8


class Number(nn.Module):
    """A model whose feature is its one weight, whatever the image."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[weight]]))
        self.out = nn.Identity()

    def trunk(self, image: Tensor) -> Tensor:
        return self.w


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (((1.0, 4.0), (1.0, None), (4.0, 2.0)), (1.5, 1.0, 3.5)),  # parallel: each sees weights of the round before
        (((1.0, None), (0.9, None), (4.0, 0.91)), (0.9, 0.91, 3.282)),  # in turns, where nobody was before the first
        (((1.0, 4.0), (1.5, None), (4.0, 1.45)), (1.5, 1.45, 3.39)),  # in turns, later
    ],
    ids=["parallel", "first", "later"],
)
def test_one_round_of_three_hospitals_by_hand(
    begin: tuple[tuple[float, float | None], ...], end: tuple[float, ...]
) -> None:
    """Weights 1, 2, 4, targets 0, 1, 3; a and c are able, b takes a's weight. Loss (w - t)^2 / 2, rate 0.1."""
    targets, found = {"a": 0.0, "b": 1.0, "c": 3.0}, {}
    for me, (weight, theirs) in zip(PEERS, begin, strict=True):
        model = Number(weight)
        half_square = partial(lambda t, w, _: ((w - t) ** 2 / 2).sum(), targets[me])
        task = Task("half square", half_square, answer=torch.sigmoid, score=lambda *_: None)
        beside = None if theirs is None else Teacher(Number(theirs), 1.0)  # type: ignore[arg-type]
        step = step_of(model, optimizers={"main": torch.optim.SGD(model.parameters(), lr=0.1)}, beside=beside)
        step.learner.__dict__["task"] = task
        descend(distilled)(step)
        found[me] = model.w.item()
    assert found == pytest.approx(dict(zip(PEERS, end, strict=True)))


@pytest.mark.parametrize(
    ("own", "theirs", "weight"),
    [
        (0.6, 0.7, 0.316228),
        (0.6, 0.9, 1),
        (0.7, 0.6, 0.0316228),
        (0.7, 0.45, 0),
        (0.4, 0.45, 0.177828),
        (0.6, 0.6, 0.1),
    ],
)
def test_the_weight_of_the_last_round(own: float, theirs: float, weight: float):
    assert weight_of(own, theirs, 1.0, 0.5) == pytest.approx(weight, rel=1e-5)
    assert weight_of(own, theirs, 3.0, 0.5) == pytest.approx(3 * weight, rel=1e-5)


# ---------------------------------------------------------------- the ring


def test_the_ring_is_that_of_sorted_names_and_closes():
    start = start_of({peer: {} for peer in ("c", "a", "b")}, dict.fromkeys(PEERS, 0.0))
    assert [teacher_of(start, me, last=False) for me in PEERS] == ["c", "a", "b"]
    assert {teacher_of(start, me, last=True) for me in PEERS} == {"c"}


def test_while_none_is_able_and_none_trains_weights_go_round_and_are_back_after_as_many_rounds():
    learners = {me: learner_of(me) for me in PEERS}
    held = {me: filled(learners[me], value) for me, value in zip(PEERS, (1.0, 2.0, 4.0), strict=True)}
    after = []
    for round in (2, 3, 4):
        start = start_of(held, dict.fromkeys(PEERS, 0.0), round)
        for learner in learners.values():
            METAFED.adopt(learner, start)
        held = {me: {n: t.clone() for n, t in learners[me].model.state_dict().items()} for me in PEERS}
        after.append([*map(parameters_of, learners.values())])
    assert after == [[{4.0}, {1.0}, {2.0}], [{2.0}, {4.0}, {1.0}], [{1.0}, {2.0}, {4.0}]]


def test_who_is_able_keeps_its_weights_and_who_takes_over_keeps_its_counters():
    a, b = learner_of("a"), learner_of("b")
    held = {"a": filled(a, 1.0), "b": filled(a, 2.0), "c": filled(a, 4.0)}
    start = start_of(held, {"a": 1.0, "b": 0.0, "c": 0.0})
    for learner in (a, b):
        METAFED.adopt(learner, start)
    assert parameters_of(a) == {1.0} and parameters_of(b) == {1.0}
    state = b.model.state_dict()
    assert state["trunk.net.bn1.num_batches_tracked"] == 2 and state["trunk.net.bn1.running_mean"].unique() == 1


def test_norms_may_stay_ones_own():
    b = learner_of("b", share_norms=False)
    held = {me: filled(b, value) for me, value in zip(PEERS, (1.0, 2.0, 4.0), strict=True)}
    METAFED.adopt(b, start_of(held, dict.fromkeys(PEERS, 0.0)))
    state = b.model.state_dict()
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert state[f"trunk.net.bn1.{name}"].unique() == 2
    assert state["out.weight"].unique() == 1


def test_in_the_last_round_all_keep_their_weights_and_imitate_the_last_hospital(monkeypatch: pytest.MonkeyPatch):
    b = learner_of("b", rounds=5)
    held = {me: filled(b, value) for me, value in zip(PEERS, (1.0, 2.0, 4.0), strict=True)}
    start = start_of(held, dict.fromkeys(PEERS, 0.0), round=5)
    METAFED.adopt(b, start)
    assert parameters_of(b) == {2.0}
    scores = iter([0.6, 0.7])  # its own, then the ring's last one
    monkeypatch.setattr(metafed, "validate", lambda *_: type("V", (), {"score": next(scores)}))
    found = teacher(b, start)
    assert found is not None and found.weight == pytest.approx(0.316228, rel=1e-5)
    assert next(found.model.parameters()).unique() == 4


def test_the_teacher_is_frozen_and_a_hospital_that_is_not_able_has_none():
    a = learner_of("a")
    held = {me: {n: t.clone() for n, t in a.model.state_dict().items()} for me in PEERS}
    found = teacher(a, start_of(held, {"a": 1.0, "b": 0.0, "c": 0.0}))
    assert found is not None and found.weight == 1.0
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())
    assert found.model is not a.model
    assert teacher(a, start_of(held, dict.fromkeys(PEERS, 0.0))) is None
    assert teacher(a, Start(1, {})) is None


def test_imitating_an_equal_model_has_no_gradient():
    a = learner_of("a")
    model = a.model.eval()
    held = {n: t.clone() for n, t in model.state_dict().items()}
    found = teacher(a, start_of(dict.fromkeys(PEERS, held), dict.fromkeys(PEERS, 1.0)))
    image = torch.randn(4, 3, learning.SIZE, learning.SIZE)
    step = step_of(model, site=a.site, beside=found)
    step = type(step)(**{**step.__dict__, "batch": type(step.batch)(image, torch.arange(4) % 2, step.batch.where)})
    term = distilled(step)["imitation"]
    term.backward()
    assert term == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------- who is able


@pytest.mark.parametrize(
    ("before", "score", "able"),
    [(None, 0.61, 1.0), (None, 0.6, 0.0), (0.0, None, 0.0), (1.0, 0.2, 1.0), (1.0, None, 1.0), (0.0, 0.9, 1.0)],
)
def test_able_once_is_able_for_good(before: float | None, score: float | None, able: float):
    a = learner_of("a")
    start = Start(1, {}) if before is None else start_of({}, dict.fromkeys(PEERS, before))
    assert says_able(a, start, Done(1, (3,), (0.1,), {}, score, 0.5)) == {"able": able}
