"""Two or three processes that compute a batch together, without a trainer around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import learning
import numpy as np
import rounds
import torch
import torch.multiprocessing
from every_method import plan_for
from torch import Tensor, nn

from hsl_node.train import devices
from hsl_node.train.batches import upload
from hsl_node.train.hardware import prepare
from hsl_node.train.method import Batch, Learner, Site, Start, Step, task_loss
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.networks import mmoe
from hsl_node.train.optimizers import by_plan
from hsl_node.train.updates import backward


def network(norm: str) -> nn.Module:
    kinds = {"group": lambda: nn.GroupNorm(2, 8), "batch": lambda: nn.BatchNorm2d(8)}
    torch.manual_seed(3)
    first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), kinds[norm](), nn.ReLU())
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)).train()


def step_of(model: nn.Module, images: int, micro_batch: int = 0, **plan: Any) -> Step:
    data = learning.dataset(train=images)
    site = replace(learning.site(learning.small_plan(method="fedavg", **plan), data), micro_batch=micro_batch)
    site = replace(site, method=replace(FEDAVG, network=replace(FEDAVG.network, ask=lambda m, x, _: m(x))))
    where = np.arange(images)
    batch = Batch(upload(data.images[:images], learning.CPU), torch.from_numpy(data.labels[:images]), where)
    learner = Learner(site, model, by_plan(model, site.plan))
    return Step(learner, batch, Start(1, {}), None, {}, 1.0, 1, 1)


def gradient(norm: str, images: int, micro_batch: int) -> tuple[dict[str, Tensor], list[int]]:
    """One batch's gradients, statistics and loss by their names; and how many images the network saw at once."""
    model, sizes = network(norm), list[int]()
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    terms = backward(step_of(model, images, micro_batch), task_loss)
    assert terms is not None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **dict(model.named_buffers()), **terms}, sizes


def without_dropout() -> None:
    """Each device draws its own, as each part of a batch does."""
    mmoe.EXPERT_DROPOUT = mmoe.TOWER_DROPOUT = 0.0


def site_of(method: str, **changes: Any) -> Site:
    """SGD: Adam would divide what is only rounding by itself."""
    plan = learning.small_plan(method=method, optimizer="sgd", learning_rate=0.02, weight_decay=0.0, **changes)
    return learning.site(plan, learning.dataset(train=21))  # batches of 8, 8, 5


def one_round(method: str, folder: Path, **changes: Any) -> rounds.Trained:
    site = site_of(method, **changes)
    return rounds.train(site, folder, devices.once(lambda: rounds.first_start(site, folder)))


def model_after(method: str, folder: Path) -> dict[str, Tensor]:
    """What a round of it leaves in this process's model, by the names of a state_dict."""
    site, learners = learning.site(plan_for(method, epochs_per_round=1), learning.dataset(train=21)), list[Learner]()

    def beside(learner: Learner, start: Start) -> Any:
        learners.append(learner)
        return site.method.beside(learner, start)

    watched = replace(site, method=replace(site.method, beside=beside))
    rounds.train(watched, folder, devices.once(lambda: rounds.first_start(site, folder)))
    return dict(learners[0].model.state_dict())


def on(
    ranks: int, folder: Path, work: Callable[..., Any], cases: list[tuple[Any, ...]], images: int = 40
) -> list[list[Any]]:
    """What `work` gives for each case at each rank, all in the same processes. `images`: that the last one opens."""
    args = (ranks, folder, work, cases, images)
    torch.multiprocessing.start_processes(_run, args, nprocs=ranks, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(rank: int, ranks: int, folder: Path, work: Callable[..., Any], cases: Any, images: int) -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)
    without_dropout()
    site = learning.site(data=learning.dataset(train=images if rank == ranks - 1 else 40))
    devices.join(replace(site, hardware=replace(site.hardware, devices=ranks)), rank, str(folder))
    torch.save([work(*case) for case in cases], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
