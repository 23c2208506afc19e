"""Several GPUs of one site compute each batch together: a process for each, by torch's DistributedDataParallel (DDP).

All run the same round on the same files. In `updates.backward` each takes its parts of the batch, and all get the whole
batch's gradient, so that models and optimisers stay alike. Rank 0 is the trainer process; what is asked of it by
`once` (validation, choice of the epoch, every file) the others are told.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from hsl_node.errors import ConfigError, HslError, TrainerError
from hsl_node.train.method import Learner, Loss, Site, Step, Terms

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # with each other, also while rank 0 validates: who hangs is ended by the daemon
GRACE_S = 5.0  # a broken connection is noticed first; within this time it is told whose process ended


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def once(ask: Callable[[], T]) -> T:
    """What rank 0 finds, at every rank."""
    if ranks() == 1:
        return ask()
    found = [ask() if rank() == 0 else None]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    return cast(T, found[0])


# ---------------------------------------------------------------- one batch


class _Asked(nn.Module):
    """A loss as DDP wants it: the forward of a module. Methods ask parts of their model, and not the whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Loss, step: Step) -> Terms | None:
        return loss(step)


def backward(learner: Learner, loss: Loss, parts: Sequence[tuple[Step, float]]) -> Terms:
    """`updates.backward` of a batch whose parts, with their shares, are dealt out to the ranks in turn.

    BatchNorm's statistics are those of the parts that are computed at one time: of the whole batch without
    micro-batches.
    """
    if learner.together is None:
        # With unused parameters allowed DDP never arranges its buckets anew, as it would after a first step that uses
        # all: a resumed round would add up in another order.
        learner.together = DistributedDataParallel(
            _Asked(learner.model), broadcast_buffers=False, find_unused_parameters=True
        )
    model = learner.together
    found: dict[str, Tensor] = {}
    mine = parts[rank() :: ranks()]
    whole = parts[0][0] is parts[-1][0]  # too few images to be split: each rank computes all of them
    for number, (part, share) in enumerate(mine, 1):
        with nullcontext() if number == len(mine) else model.no_sync(), nullcontext() if whole else _WholeBatchNorm():
            terms = model(loss, part)
            if terms is None:
                raise ConfigError("its method skips batches", remedy="set train.gpus = 1 in node.toml")
            (sum(terms.values()) * (share * ranks())).backward()  # DDP takes the mean over the ranks
        for name, term in terms.items():
            found[name] = found.get(name, 0) + term.detach().float() * share
    values = torch.stack([*found.values()])
    dist.all_reduce(values)
    return dict(zip(found, values, strict=True))


class _WholeBatchNorm(TorchFunctionMode):
    """Within it BatchNorm in training sees the images of all ranks. torch's SyncBatchNorm refuses a CPU, and replaces
    modules: timm's with an activation would lose it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As F.batch_norm: (B, C, ...) -> the same. Sums of all ranks are added in float64, where they cancel nothing."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    wide = x.float()
    variance, mean = (v.double() for v in torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0))  # (C,)
    sums = torch.stack([mean, variance + mean.square(), torch.ones_like(mean)]) * (x.numel() / x.shape[1])
    first, second, count = _Sum.apply(sums)
    mean = first / count
    variance = (second / count - mean.square()).clamp(min=0)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    scale = (variance + eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return torch.addcmul(shift.float().view(shape), wide, scale.float().view(shape)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """Over the ranks, of values and, on the way back, of gradients."""

    @staticmethod
    def forward(context: Any, mine: Tensor) -> Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradient: Tensor) -> Tensor:
        return _Sum.forward(context, gradient[0])


# ---------------------------------------------------------------- the processes


@contextmanager
def company(
    site: Site, follow: Callable[..., None], args: tuple[Any, ...], failed: Callable[[HslError], None]
) -> Iterator[None]:
    """While it is open, processes run `follow(rank, place, *args)` and compute with this one, which is rank 0.

    When one of them ends too early `failed` is called in a thread, whatever this process waits for; it must not return.
    After an error in here the others are gone and the group is not: this process has to leave.
    """
    count = site.hardware.devices
    if count == 1:
        yield
        return
    spawn = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as place:
        others, closing = list[BaseProcess](), threading.Event()
        try:
            for number in range(1, count):
                process: BaseProcess = spawn.Process(target=follow, args=(number, place, *args), daemon=True)
                process.start()
                others.append(process)
                threading.Thread(target=_watch, args=(number, process, closing, failed), daemon=True).start()
            join(site, 0, place)
            yield
            dist.destroy_process_group()
        except RuntimeError:
            time.sleep(GRACE_S)
            raise
        finally:
            closing.set()
            for process in others:
                process.kill()


def join(site: Site, rank: int, place: str) -> None:
    """Meet the others in the folder `place`; they talk over the machine's own network alone.

    Raises: TrainerError: this process did not open the images that rank 0 opened.
    """
    if rank:  # without rank 0, however it ended, there is nothing to do and nothing to tidy up
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    cuda = site.hardware.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(site.hardware.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{place}/group",
        rank=rank,
        world_size=site.hardware.devices,
        timeout=PATIENCE,
    )
    images = site.dataset
    seen = hashlib.sha256(repr((images.ids, images.labels.tolist(), images.split.tolist())).encode()).hexdigest()
    if once(lambda: seen) != seen:
        raise TrainerError("the images have changed since this run's start", remedy="the trainer opens them anew")


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(0)


def _watch(rank: int, process: BaseProcess, closing: threading.Event, failed: Callable[[HslError], None]) -> None:
    process.join()
    if process.exitcode and not closing.is_set():
        failed(
            TrainerError(
                f"the process of device {rank + 1}, of those that train together, ended (exit status "
                f"{process.exitcode})",
                remedy="all start again from the last epoch; if it comes again, see log/trainer.log, or set "
                "train.gpus = 1 in node.toml",
            )
        )
