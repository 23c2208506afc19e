"""FedPPKT: its losses by hand and by their limits, and that the teacher stays while student and generator travel."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import learning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rounds import Trained, first_round, first_start, train
from torch import nn

from hsl_node.errors import ConfigError
from hsl_node.train.methods.fedppkt import FEDPPKT
from hsl_node.train.networks.fedppkt import (
    LATENT,
    TeacherAndStudent,
    classes_of,
    disagreement,
    distilled,
    first_order,
    norm_distance,
    refine,
    synthesise,
)
from hsl_node.train.networks.initial import initialise
from hsl_node.train.start import begin
from hsl_node.weights.checkpoint_file import read_weights

SMALL = {"teacher_epochs": 3, "images": 8, "pool": 12, "distillations": 1, "refinements": 3}


def plan(**changes: object) -> learning.Plan:
    return learning.small_plan(method="fedppkt", fedppkt=SMALL, **changes)


def model_of(**changes: object) -> TeacherAndStudent:
    model = TeacherAndStudent(plan(**changes))
    initialise(model, 1)
    return model


# ---------------------------------------------------------------- by hand


def test_the_generator_moves_by_the_sum_of_its_copys_gradients() -> None:
    """Worked: loss w^2 / 2 from 1.0, two steps of 0.1: 0.81, and 1 - 0.05 (1 + 0.9) = 0.905 for the generator itself
    (0.955 by the last gradient alone)."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0]))

    module, seen = One(), list[float]()

    def loss(fast: nn.Module) -> torch.Tensor:
        seen.append(fast.w.item())  # type: ignore[union-attr, operator]
        return fast.w.square().sum() / 2  # type: ignore[union-attr, operator]

    (total,) = first_order(module, [], loss, lambda own: torch.optim.SGD(own, lr=0.1), 2)
    assert seen == pytest.approx([1.0, 0.9]) and seen[-1] * 0.9 == pytest.approx(0.81)
    assert module.w.item() == 1.0  # the copy moved, not the module
    assert module.w.item() - 0.05 * total.item() == pytest.approx(0.905)


TEACHER = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
STUDENT = torch.tensor([[0.5, 0.0], [1.0, 0.0]], dtype=torch.float64)  # the second chooses another class


def test_the_worked_numbers() -> None:
    label = F.cross_entropy(TEACHER, torch.tensor([0, 1])).item()
    apart = disagreement(TEACHER, STUDENT).item()
    assert (label, apart) == (pytest.approx(0.220095, abs=1e-6), pytest.approx(-0.0841723, abs=1e-7))
    terms, settings = {"norms": 1.5, "label": label, "disagreement": apart}, plan().settings
    assert sum(settings[name] * term for name, term in terms.items()) == pytest.approx(14.9954, abs=1e-4)
    assert distilled(TEACHER, STUDENT, 20).item() == pytest.approx(0.390364, abs=1e-6)  # 0.000975911 without T^2


def test_softened_answers_differ_by_half_the_squared_centred_distance() -> None:
    apart = TEACHER - STUDENT
    centred = (apart - apart.mean(1, keepdim=True)).square().sum(1).mean() / 2 / 2
    assert centred.item() == pytest.approx(0.390625)
    assert distilled(TEACHER, STUDENT, 1e4).item() == pytest.approx(0.390625, abs=1e-6)
    assert distilled(TEACHER, TEACHER, 20).item() == pytest.approx(0, abs=1e-12)


def test_disagreement_counts_only_where_both_choose_the_same() -> None:
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # agrees, does not
    kl = F.kl_div(F.log_softmax(apart[:1], 1), F.softmax(teacher[:1], 1), reduction="sum").item()
    assert disagreement(teacher, apart).item() == pytest.approx(-kl / 2)
    assert disagreement(teacher[1:], apart[1:]).item() == 0
    assert disagreement(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_a_batch_with_a_layers_own_moments_is_at_no_distance_and_hooks_go() -> None:
    layer = nn.BatchNorm2d(2).eval()
    x = torch.randn(6, 2, 3, 3)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    layer.running_mean, layer.running_var = mean, variance
    with norm_distance(layer) as none:
        layer(x)
    layer.running_mean, layer.running_var = mean + torch.tensor([0.6, 0.8]), variance + torch.tensor([0.3, 0.4])
    with norm_distance(layer) as some:
        layer(x)
    assert none[0].item() == pytest.approx(0, abs=1e-6)
    assert some[0].item() == pytest.approx(1.5)  # 1 of the means and 0.5 of the variances, as in the worked numbers
    layer(x)
    assert len(some) == 1 and not layer._forward_pre_hooks


def test_one_logit_stands_for_two_classes() -> None:
    logits = torch.tensor([[1.5], [-0.2]])
    torch.testing.assert_close(F.softmax(classes_of(logits), 1)[:, 1], torch.sigmoid(logits[:, 0]))
    assert classes_of(torch.zeros(2, 3)).shape == (2, 3)


# ---------------------------------------------------------------- parts


def test_synthesis_moves_only_the_generator_and_lowers_its_loss() -> None:
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    meta = torch.optim.Adam(model.generator.parameters(), lr=0.01)
    torch.manual_seed(0)
    losses = [synthesise(model, meta, model_settings()).item() for _ in range(8)]
    assert np.mean(losses[-3:]) < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"generator.{n}" for n, _ in model.generator.named_parameters()} | {"pool", "pooled"}
    assert all(p.grad is None for p in (*model.teacher.parameters(), *model.student.parameters()))


def test_refinement_moves_the_generator_alone_to_images_that_everybodys_students_are_sure_of() -> None:
    """Its loss, and whose it is: another hospital's student moves the generator to another place."""
    model, other = model_of(), model_of()
    torch.nn.init.normal_(other.student.out.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refined(steps: int, *students: nn.Module) -> tuple[float, torch.Tensor]:
        model.load_state_dict(before)
        torch.manual_seed(0)
        last = refine(model, [s.eval() for s in students], {**model_settings(), "refinements": steps}).item()
        return last, model.generator.begin.weight.detach().clone()

    losses = [refined(steps, model.student, other.student)[0] for steps in (1, 20)]
    assert losses[1] < losses[0]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n]) and ".running_" not in n}
    assert {n for n in changed if not n.endswith("tracked")} == {
        f"generator.{n}" for n, _ in model.generator.named_parameters()
    }
    assert all(p.grad is None for p in (*model.student.parameters(), *other.student.parameters()))
    assert not torch.equal(refined(2, model.student)[1], refined(2, model.student, other.student)[1])

    model.load_state_dict(before)
    torch.manual_seed(0)  # by hand: 10 of the fused student's norms, 1.1 of the mean over hospitals
    label, latents = torch.randint(2, (8,)), torch.randn(8, LATENT)
    images = model.generator.train()(latents)
    with norm_distance(model.student.eval()) as apart:
        model.student(images)
    sure = [F.cross_entropy(classes_of(one(images)), label).item() for one in (model.student, other.student)]
    assert losses[0] == pytest.approx(10 * sum(d.item() for d in apart) + 1.1 * np.mean(sure), rel=1e-5)


def test_a_peers_student_that_overflows_is_left_out_of_the_refinement() -> None:
    """Weights of 1e9 are within a checkpoint's bounds. All generators became NaN, whatever rule fused them."""
    model, rogue = model_of(), model_of().student.eval()
    with torch.no_grad():
        for parameter in rogue.parameters():
            parameter.fill_(1e9)
    before, found = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []
    for students in ([model.student], [model.student, rogue]):
        model.load_state_dict(before)
        torch.manual_seed(0)
        found.append((refine(model, students, model_settings()), model.generator.begin.weight.detach().clone()))
    torch.testing.assert_close(found[1], found[0])


def model_settings() -> dict[str, object]:
    return dict(plan().settings)


def test_the_pool_keeps_the_newest_images() -> None:
    model = model_of()
    for value in (1.0, 2.0):
        model.keep(torch.full((8, 3, learning.SIZE, learning.SIZE), value))
    assert model.pool[:, 0, 0, 0].tolist() == [2.0] * 4 + [1.0] * 4 + [2.0] * 4 and int(model.pooled) == 16
    assert model.drawn(5).shape == (5, 3, learning.SIZE, learning.SIZE)


@pytest.mark.parametrize("size", [16, 30, 32])
def test_the_generator_makes_images_of_the_plans_size(size: int) -> None:
    model = model_of(image_size=size)
    images = model.generator(torch.randn(2, LATENT))
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() < 2.7  # black and white, normalised


def test_a_plan_with_large_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="for 64 px at most; the plan has 224"):
        TeacherAndStudent(plan(image_size=224))


def test_teacher_and_pool_never_travel() -> None:
    travels = FEDPPKT.travels(model_of())
    assert {name.partition(".")[0] for name in travels} == {"student", "generator"}


# ---------------------------------------------------------------- rounds


def site() -> learning.Site:
    return learning.site(plan())


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Trained, list[dict[str, object]]]:
    folder, events = tmp_path_factory.mktemp("fedppkt"), list[dict[str, object]]()
    first = first_round(site(), folder, events.append)
    return first, train(site(), folder, first.next, events.append), events


def test_the_first_round_teaches_the_teacher_and_later_ones_the_student(
    two_rounds: tuple[Trained, Trained, list[dict[str, object]]],
) -> None:
    first, second, events = two_rounds
    terms = [set(event["terms"]) for event in events if event["event"] == "epoch"]  # type: ignore[call-overload]
    assert terms == [{"teacher"}] * 3 + [{"synthesis", "distilled"}] * 2
    initial = {n: t.numpy() for n, t in model_of().state_dict().items()}
    one, two = read_weights(first.own), read_weights(second.own)
    for name in one:
        part = name.partition(".")[0]
        if part in ("student", "generator"):
            assert np.array_equal(one[name], initial[name]), name
        if part == "teacher":
            assert np.array_equal(one[name], two[name]), name  # it learns no more
    assert not np.array_equal(one["teacher.out.weight"], initial["teacher.out.weight"])
    for name in ("student.out.weight", "generator.begin.weight", "pool"):
        assert not np.array_equal(one[name], two[name]), name


def test_the_rate_falls_by_an_equal_share_in_each_round_and_ends_with_the_run(
    two_rounds: tuple[Trained, Trained, list[dict[str, object]]],
) -> None:
    """Three epochs of the teacher are half of the run, as two of the student are: counted one by one they would have
    taken three quarters of the fall, and all of it where a teacher has 200."""
    rates = [event["learning_rate"] for event in two_rounds[2] if event["event"] == "epoch"]
    parts = [0, 1 / 6, 2 / 6, 2 / 4, 3 / 4]
    low, high = plan().learning_rate_min, plan().learning_rate
    assert rates == pytest.approx([low + (high - low) * (1 + math.cos(math.pi * part)) / 2 for part in parts])


def test_the_rate_warms_up_once_in_a_run(tmp_path: Path) -> None:
    """In the teacher's three epochs; round 2 does not begin in the middle of it again."""
    events = list[dict[str, object]]()
    warming = learning.site(plan(warmup_epochs=3, schedule="restarts", learning_rate=0.004))
    train(warming, tmp_path, first_round(warming, tmp_path, events.append).next, events.append)
    rates = [event["learning_rate"] for event in events if event["event"] == "epoch"]
    assert rates[:4] == pytest.approx([0.001, 0.002, 0.003, 0.004]) and 0.003 < rates[4] < 0.004  # type: ignore[operator]


def test_nothing_of_teacher_or_pool_is_in_a_checkpoint(
    two_rounds: tuple[Trained, Trained, list[dict[str, object]]],
) -> None:
    for done in two_rounds[:2]:
        sent, own = read_weights(done.out), read_weights(done.own)
        assert {name.partition(".")[0] for name in sent} == {"student", "generator"}
        teacher = own["teacher.trunk.net.conv1.weight"].tobytes()
        assert teacher not in done.out.read_bytes() and teacher in done.own.read_bytes()


def test_who_is_asked_follows_the_phase(two_rounds: tuple[Trained, Trained, list[dict[str, object]]]) -> None:
    image = torch.rand(3, 3, learning.SIZE, learning.SIZE)
    model = begin(site(), two_rounds[0].next).learner.model.eval()
    assert isinstance(model, TeacherAndStudent)
    assert torch.equal(model(image), model.student(image))
    model.distils.zero_()
    assert torch.equal(model(image), model.teacher(image))


def test_a_teacher_that_was_lost_with_a_disk_learns_before_anybody_learns_from_it(
    two_rounds: tuple[Trained, Trained, list[dict[str, object]]], tmp_path: Path
) -> None:
    """It learned in round 1 alone: a student of its first values would be averaged into everybody's."""
    events: list[dict[str, object]] = []
    lost = train(site(), tmp_path, replace(two_rounds[0].next, mine=None, mine_sha256=None), events.append)
    assert all(set(event["terms"]) == {"teacher"} for event in events if event["event"] == "epoch")  # type: ignore[call-overload]
    sent, before = read_weights(lost.out), read_weights(two_rounds[0].out)
    assert all(np.array_equal(sent[name], before[name]) for name in sent)
    assert begin(site(), lost.next).learner.model.distils == 1


def test_from_the_third_round_on_the_generator_is_refined_by_everybodys_students(
    two_rounds: tuple[Trained, Trained, list[dict[str, object]]], tmp_path: Path
) -> None:
    events: list[dict[str, object]] = []
    both = {"ash": two_rounds[0].out, "birch": two_rounds[1].out}
    done = [
        train(site(), tmp_path / str(n), replace(two_rounds[1].next, full_set=full_set), events.append)
        for n, full_set in enumerate([{"ash": two_rounds[0].out}, both])
    ]
    terms = [set(event["terms"]) for event in events if event["event"] == "epoch"]  # type: ignore[call-overload]
    assert terms == [{"refinement", "synthesis", "distilled"}, {"synthesis", "distilled"}] * 2
    one, other = (read_weights(each.out)["generator.begin.weight"] for each in done)
    assert not np.array_equal(one, other)


def test_a_round_that_was_killed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    first = first_round(site(), tmp_path / "a")
    undisturbed = train(site(), tmp_path / "a", first.next)
    again = first_round(site(), tmp_path / "b")

    def dies(event: dict[str, object]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(site(), tmp_path / "b", again.next, dies)
    resumed = train(site(), tmp_path / "b", again.next)
    assert resumed.out.read_bytes() == undisturbed.out.read_bytes()
    assert resumed.own.read_bytes() == undisturbed.own.read_bytes()
    assert first_start(site(), tmp_path / "c").round == 1
