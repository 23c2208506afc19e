"""A hospital in memory, for the tests of the learning side: small images that a tiny model can learn."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from hsl_node.federation.methods import Need, card_of
from hsl_node.federation.plan import Plan
from hsl_node.train import checkpoint
from hsl_node.train.batches import upload
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.hardware import Hardware
from hsl_node.train.method import Site
from hsl_node.train.methods import method_of
from hsl_node.train.networks.backbone import Trunk
from hsl_node.train.networks.initial import initialise

SIZE = 32

CPU = Hardware(torch.device("cpu"), torch.get_num_threads(), "float32", torch.contiguous_format)


def small_plan(**changes: object) -> Plan:
    settings: dict[str, object] = {
        "backbone": "tiny",
        "image_size": SIZE,
        "batch_size": 8,
        "epochs_per_round": 2,
        "rounds": 2,
        "precision": "float32",
    }
    if Need.WEIGHTS in card_of(str(changes.get("method", "hsl"))).needs:
        settings["backbone_weights"] = encoder_file()[1]
    if changes.get("method", "hsl") == "hsl":
        settings["hsl"] = {"experts": 3, **changes.pop("hsl", {})}  # type: ignore[dict-item]
    return Plan.model_validate({**settings, **changes})


def blobs(count: int, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright square whose side tells the class: (N, S, S) uint8, (N,) int64, classes alternating."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, SIZE, SIZE), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % classes
    for image, label in zip(images, labels, strict=True):
        side = 5 + 7 * int(label)
        y, x = rng.integers(0, SIZE - side, 2)
        image[y : y + side, x : x + side] = 230
    return images, labels


def dataset(train: int = 40, validation: int = 12, test: int = 16, classes: int = 2, seed: int = 0) -> Dataset:
    images, labels = blobs(train + validation + test, classes, seed)
    split = np.repeat(np.array([0, 1, 2], np.int8), [train, validation, test])
    return Dataset(images, labels, split, tuple(f"{n:064x}" for n in range(len(images))), (None,) * len(images))


def of_images(data: Dataset, images: np.ndarray) -> Dataset:
    return replace(data, images=images)


def anchor(count: int = 24) -> AnchorSet:
    images, labels = blobs(count, seed=99)
    return AnchorSet("blobs", ("small", "large"), images, labels)


@cache
def encoder_file() -> tuple[Path, str]:
    """A weight file of the tiny trunk, for methods that need one, and its sha256. The same bytes in each process."""
    trunk = Trunk("tiny")
    initialise(trunk, 7)
    path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    save_file(trunk.net.state_dict(), path)
    atexit.register(shutil.rmtree, path.parent)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def site(plan: Plan | None = None, data: Dataset | None = None, peer: str = "mercy") -> Site:
    plan = plan or small_plan()
    method = method_of(plan.method)
    return Site(
        peer=peer,
        run="0" * 64,
        plan=plan,
        method=method,
        dataset=data or dataset(classes=len(plan.classes)),
        anchor=anchor() if Need.ANCHOR in plan.card.needs else None,
        hardware=CPU,
        backbone_weights=encoder_file()[0] if plan.backbone_weights else None,
    )


def images_of(site: Site, split: int) -> torch.Tensor:
    return upload(site.dataset.images[site.indices(split)], site.hardware)


def all_of(trainer: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an epoch checkpoint: the last epoch's model and Adam's moments, not only the best weights."""
    saved = checkpoint.load(trainer)
    assert saved is not None
    moments = {
        f"{optimizer}/{n}/{k}": v
        for optimizer, content in saved.optimizers.items()
        for n, state in content["state"].items()
        for k, v in state.items()
    }
    return {**saved.model, **moments}


def same_bytes(one: Path, other: Path) -> bool:
    a, b = all_of(one), all_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
