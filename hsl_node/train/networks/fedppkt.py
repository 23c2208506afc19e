"""FedPPKT's parts: a teacher that stays, a student that never sees a real image, and a generator between them.

Shapes: N synthetic images, S pixels a side, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hsl_node.errors import ConfigError
from hsl_node.federation.plan import Plan
from hsl_node.train.batches import normalise
from hsl_node.train.networks.classifier import Classifier

LATENT = 256
SYNTHESIS_STEPS = 2
RATES, BETAS = (5e-3, 0.015), (0.5, 0.999)  # Adam's, of the generator's copy and of the latents
REFINED_BY = 10.0, 1.1  # weights of the fused student's norm statistics, and of everybody's students
WIDTH = 128  # channels of the generator
LARGEST = 64  # px: the generator's first layer has 256 * 128 * (S / 4)^2 weights, 34 MB at 64 px and 413 MB at 224


class TeacherAndStudent(nn.Module):
    """In round 1 the teacher learns and is asked; after it the student: (B, 3, S, S) -> (B, C)."""

    pool: Tensor  # (P, 3, S, S) synthetic images, the newest in place of the oldest
    pooled: Tensor  # how many were ever put in
    made_in: Tensor  # the epoch of the run for which images were made last
    distils: Tensor  # 0: the teacher learns; 1: the student does

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        if plan.image_size > LARGEST:
            raise ConfigError(
                f"fedppkt makes images, and its generator is for {LARGEST} px at most; the plan has {plan.image_size}",
                remedy=f"set image_size = {LARGEST}, or take another method",
            )
        self.teacher, self.student = Classifier(plan), Classifier(plan)
        if not any(isinstance(module, _BatchNorm) for module in self.teacher.modules()):
            raise ConfigError(
                f"fedppkt makes images by what BatchNorm layers have seen, and {plan.backbone} has none",
                remedy="take a resnet or efficientnet_lite0, or another method",
            )
        self.generator, self.classes = Generator(plan.image_size), len(plan.classes)
        shape = (int(plan.settings["pool"]), 3, plan.image_size, plan.image_size)
        self.register_buffer("pool", torch.zeros(shape))
        for name in ("pooled", "made_in", "distils"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # a graph has no branches
            return torch.where(self.distils == 1, self.student(image_BCHW), self.teacher(image_BCHW))
        return (self.student if self.distils else self.teacher)(image_BCHW)  # type: ignore[no-any-return]

    @torch.no_grad()
    def keep(self, images: Tensor) -> None:
        """Put synthetic images (N, 3, S, S) into the pool."""
        where = (torch.arange(len(images), device=images.device) + self.pooled) % len(self.pool)
        self.pool[where] = images
        self.pooled += len(images)

    def drawn(self, count: int) -> Tensor:
        """So many of the pool's images, at random."""
        where = torch.randint(min(int(self.pooled), len(self.pool)), (count,))
        return self.pool[where.to(self.pool.device)]


def at_home(model: nn.Module) -> frozenset[str]:
    """What no exported model has: synthetic images, and the teacher once there is a student."""
    kept = ("pool", "teacher.") if int(model.get_buffer("distils")) else ("pool",)
    return frozenset(name for name in model.state_dict() if name.startswith(kept))


class Generator(nn.Module):
    """Latents (N, 256) -> images (N, 3, S, S), normalised as all images are. Always with the batch's statistics."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.size, self.side = image_size, -(-image_size // 4)
        self.begin = nn.Linear(LATENT, WIDTH * self.side**2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(WIDTH),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.BatchNorm2d(WIDTH),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1),
            nn.BatchNorm2d(WIDTH // 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH // 2, 3, 3, padding=1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        x = self.layers(self.begin(latents).view(-1, WIDTH, self.side, self.side))
        pixels = torch.sigmoid(x[:, :, : self.size, : self.size])
        return normalise(pixels.permute(0, 2, 3, 1) * 255)


def synthesise(model: TeacherAndStudent, meta: torch.optim.Optimizer, settings: Mapping[str, Any]) -> Tensor:
    """Make images on which the teacher is sure and the student learns most, put the best batch into the pool, and move
    the generator; gives that batch's loss ()."""
    model.eval()
    count, device, tried = int(settings["images"]), model.pool.device, list[tuple[Tensor, Tensor]]()
    latents = torch.randn(count, LATENT).to(device).requires_grad_()
    label = torch.randint(model.classes, (count,)).to(device)

    def loss(generator: nn.Module) -> Tensor:
        images = generator.train()(latents)
        with norm_distance(model.teacher) as apart:
            teacher = classes_of(model.teacher(images))
        found: Tensor = settings["norms"] * torch.stack(apart).sum() + settings["label"] * F.cross_entropy(
            teacher, label
        )
        if int(model.pooled):  # the first time there is no student to speak of
            found = found + settings["disagreement"] * disagreement(teacher, classes_of(model.student(images)))
        tried.append((found.detach(), images.detach()))
        return found

    def moves(own: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": own, "lr": RATES[0]}, {"params": [latents], "lr": RATES[1]}], betas=BETAS)

    gradients = first_order(model.generator, [latents], loss, moves, SYNTHESIS_STEPS)
    for parameter, gradient in zip(model.generator.parameters(), gradients, strict=True):
        parameter.grad = gradient
    meta.step()
    best, images = min(tried, key=lambda one: float(one[0]))
    model.keep(images)
    return best


def refine(model: TeacherAndStudent, students: Sequence[nn.Module], settings: Mapping[str, Any]) -> Tensor:
    """Move the generator alone to images that the fused student's norm layers know, and of whose class everybody's
    students are sure; gives the last loss ()."""
    model.eval()
    count, device, parameters = int(settings["images"]), model.pool.device, list(model.generator.parameters())
    moves, loss = torch.optim.Adam(parameters, lr=RATES[0], betas=BETAS), torch.zeros(())
    for _ in range(int(settings["refinements"])):
        label = torch.randint(model.classes, (count,)).to(device)
        images = model.generator.train()(torch.randn(count, LATENT).to(device))
        with norm_distance(model.student) as apart:
            model.student(images)
        norms = torch.stack(apart).sum()
        (along,) = torch.autograd.grad(norms, images)
        sure, pull = _finite([F.cross_entropy(classes_of(student(images)), label) for student in students], images)
        loss, along = REFINED_BY[0] * norms + REFINED_BY[1] * sure, REFINED_BY[0] * along + REFINED_BY[1] * pull
        for parameter, gradient in zip(parameters, torch.autograd.grad(images, parameters, along), strict=True):
            parameter.grad = gradient
        moves.step()
    return loss.detach()


def _finite(losses: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss and its gradient, without those that are no numbers: a peer's student may overflow."""
    pulls = [torch.autograd.grad(loss, images)[0] for loss in losses]
    right = [torch.isfinite(loss) & torch.isfinite(pull).all() for loss, pull in zip(losses, pulls, strict=True)]
    count = torch.stack(right).sum().clamp(min=1)

    def mean(values: Sequence[Tensor]) -> Tensor:
        kept = [torch.where(here, value, 0.0) for here, value in zip(right, values, strict=True)]
        return torch.stack(kept).sum(0) / count

    return mean([loss.detach() for loss in losses]), mean(pulls)


def classes_of(logits: Tensor) -> Tensor:
    """One logit of two classes -> two: (N, 1) -> (N, 2); others stay."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def distilled(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits (N, C), softened by T; the mean over images."""
    target = F.softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(F.log_softmax(student / temperature, dim=1), target, reduction="batchmean")


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Minus KL(teacher || student) where both choose the same class, else 0; the mean over images."""
    apart = F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="none").sum(1)
    return -(apart * (teacher.argmax(1) == student.argmax(1))).mean()


@contextmanager
def norm_distance(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, each BatchNorm layer of a model adds how far its input's mean and variance are from its own."""
    found: list[Tensor] = []

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
        variance, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)
        found.append((variance - layer.running_var).norm() + (mean - layer.running_mean).norm())

    hooks = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def first_order(
    module: nn.Module,
    others: Sequence[Tensor],
    loss: Callable[[nn.Module], Tensor],
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
    steps: int,
) -> list[Tensor]:
    """Some steps of a copy of a module, and of other tensors; gives the sum of the copy's gradients, by which the
    module itself is to be moved (first-order MAML)."""
    fast = copy.deepcopy(module)
    parameters = list(fast.parameters())
    moves, total = optimizer(parameters), [torch.zeros_like(p) for p in parameters]
    for _ in range(steps):
        moved = [*parameters, *others]
        gradients = torch.autograd.grad(loss(fast), moved)
        for tensor, gradient in zip(moved, gradients, strict=True):
            tensor.grad = gradient
        total = [one + gradient for one, gradient in zip(total, gradients, strict=False)]
        moves.step()
    return total
