"""FedPPKT (Wei et al., VCIP 2024): a private teacher teaches a student by synthetic images; student and generator are
averaged, and no model that travels has seen a real image.

Exact: the loss of synthesis (the teacher's norm statistics, a drawn label, disagreement with the student from the
second time on), two steps of a copy of the generator and of the latents whose summed gradients move the generator, the
best batch into a pool; T^2 KL with T = 20; plain means. Adapted: round 1 trains the teacher, by the plan's optimizer
and schedule, which move the student too; `distillations` steps of it for each batch of the hospital's images, which it
never sees (theirs: 200 an epoch); a batch of synthesis has `images` images. Their server refines the fused generator by
everybody's students; here each hospital does, from round 3 on (in round 2 no student has learned), with draws of its
own, so that the mean of the next generators stands for the one refined; `refinements` steps (theirs: 500). Assumed: by
the optimizer of synthesis. Small images only. The best model of round 1 is the teacher: a plan wants a large
plateau_rounds.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from hsl_node.federation.plan import Plan
from hsl_node.train.method import Learner, Network, Start, Step, Terms, beginning, put, take_fused
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.networks import fedppkt as parts
from hsl_node.train.networks.fedppkt import TeacherAndStudent, classes_of
from hsl_node.train.optimizers import by_plan
from hsl_node.train.updates import descend

META_RATE = 0.01  # Adam's, of the generator
TEMPERATURE = 20.0


def distil(step: Step) -> Terms:
    """The student on synthetic images, beside the teacher's answers."""
    model = cast(TeacherAndStudent, step.model)
    images = model.drawn(len(step.batch.image))
    with torch.no_grad():
        teacher = classes_of(model.teacher(images))
    return {"distilled": parts.distilled(teacher, classes_of(model.student(images)), TEMPERATURE)}


def teach(step: Step) -> Terms:
    answer = cast(TeacherAndStudent, step.model).teacher(step.batch.image)
    return {"teacher": step.task.loss(answer, step.batch.target)}


def by_phase(step: Step) -> Terms | None:
    model, terms = cast(TeacherAndStudent, step.model), dict[str, Tensor]()
    if not model.distils:
        return descend(teach)(step)
    if model.made_in != (now := step.round * 10_000 + step.epoch):
        if step.epoch == 1 and step.round > 2 and step.start.full_set and step.settings["refinements"]:
            terms["refinement"] = parts.refine(model, students(step), step.settings)
        terms["synthesis"] = parts.synthesise(model, step.learner.optimizers["meta"], step.settings)  # once an epoch
        model.made_in.fill_(now)
    model.teacher.eval(), model.student.train()
    for _ in range(int(step.settings["distillations"])):
        terms.update(descend(distil)(step) or {})
    return terms


def students(step: Step) -> list[nn.Module]:
    """Everybody's, as they were sent in the last round; frozen."""
    found, full_set = list[nn.Module](), step.start.full_set
    for peer in sorted(full_set):
        student = copy.deepcopy(cast(TeacherAndStudent, step.model).student)
        sent = {n.removeprefix("student."): t for n, t in full_set[peer].items() if n.startswith("student.")}
        put(student, sent)
        found.append(student.eval().requires_grad_(False))
    return found


def next_phase(learner: Learner, start: Start) -> None:
    """A teacher that was lost with a disk learns for a round, before anybody learns from it."""
    take_fused(learner, start)
    cast(TeacherAndStudent, learner.model).distils.fill_(int(start.round > 1 and len(start.mine) > 0))


def optimizers(model: nn.Module, plan: Plan) -> dict[str, Optimizer]:
    return by_plan(model, plan) | {"meta": Adam(cast(TeacherAndStudent, model).generator.parameters(), lr=META_RATE)}


FEDPPKT = replace(
    FEDAVG,
    name="fedppkt",
    network=Network(TeacherAndStudent, at_home=parts.at_home),
    passes=(by_phase,),
    optimizers=optimizers,
    travels=beginning("student.", "generator."),
    adopt=next_phase,
    epochs=lambda plan, round: int(plan.settings["teacher_epochs"]) if round == 1 else plan.epochs_per_round,
    one_device="its generator learns beside `backward`, and students draw their images themselves",
)
