"""Training speed of the published MMoE (ResNet18): our loop against a plain one, side by side in one run.

    python benchmarks/train_step.py --sizes 64,128,224 --seconds 10

A *pair* is one primary and one anchor image, forward and backward. The plain loop is what one writes first: float32,
torch's default memory format and Adam, a Python loop over experts, every image decoded from its JPEG in every epoch.
The middle column is the plain loop with images decoded beforehand, so that decoding and arithmetic can be told apart.
Ours is `train_epoch` itself: uint8 from a memory map, bfloat16 and channels-last where they pay, fused Adam.

Run it on a machine that does nothing else, or with --threads 1: two threads wait for each other, in bfloat16 without
sleeping, and beside other busy processes that wait is most of the time.

The two alternate in short windows, so that a busy machine slows both; the ratio is the median over pairs of windows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hsl_node.train.hardware import Hardware, prepare  # first: it settles OpenMP before torch is loaded

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hsl_node.federation.plan import Plan
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from hsl_node.train.loop import train_epoch
from hsl_node.train.method import Site, Start
from hsl_node.train.methods import method_of
from hsl_node.train.networks.initial import initialise
from hsl_node.train.networks.mmoe import HIDDEN, TASK, MMoE
from hsl_node.train.start import Training, new_learner

JPEG_SIDE = (600, 450)  # px; ultrasound frames in BUS-BRA are of this order, chest films are larger
BATCHES = 2  # per epoch: short windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu | cuda")
    parser.add_argument("--sizes", default="64,128,224", help="pixels a side, separated by commas")
    parser.add_argument("--seconds", type=float, default=10.0, help="per size and loop, in all windows together")
    parser.add_argument("--windows", type=int, default=5, help="pairs of windows, each giving one ratio")
    parser.add_argument("--batch", type=int, default=32, help="pairs in a batch")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_jpegs(Path(folder), BATCHES * arguments.batch)
        for size in map(int, arguments.sizes.split(",")):
            rows.append(compare(Path(folder), files, size, arguments))
            print(json.dumps(rows[-1]), flush=True)
    print()
    print("| px | plain, JPEG each epoch | plain, decoded before | ours | ours / plain (lowest-highest) | ours |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['px']} | {r['plain_jpeg']:.1f} | {r['plain_decoded']:.1f} | {r['ours']:.1f} | "
            f"{r['ratio']:.1f} ({r['ratio_lowest']:.1f}-{r['ratio_highest']:.1f}) | {r['ours_is']} |"
        )
    print("\npairs/s, medians\n")
    print(json.dumps({"machine": facts(arguments.device), "batch": arguments.batch, "rows": rows}, indent=2))


def compare(folder: Path, files: list[Path], size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    hardware = prepare(device=arguments.device, threads=arguments.threads, image_size=size)
    decoded = np.stack([decode(f, size) for f in files])
    labels = np.arange(len(files), dtype=np.int64) % 2
    site = site_of(folder / f"{size}.u8", decoded, labels, arguments.batch, hardware)
    ours = Ours(site)
    plain = Plain(hardware.device)
    jpeg = Loop(plain, lambda i: decode(files[i], size), labels, arguments.batch)
    memory = Loop(plain, lambda i: decoded[i], labels, arguments.batch)
    loops: list[Callable[[], int]] = [jpeg.epoch, memory.epoch, ours.epoch]
    for loop in loops:
        loop()  # the first steps choose kernels and fill caches
    window_s = arguments.seconds / arguments.windows
    rates = [[rate(loop, window_s, hardware) for loop in loops] for _ in range(arguments.windows)]
    ratios = [o / j for j, _, o in rates]
    plain_jpeg, plain_decoded, our_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    layout = "channels-last" if hardware.memory_format == torch.channels_last else "contiguous"
    return {
        "px": size,
        "plain_jpeg": plain_jpeg,
        "plain_decoded": plain_decoded,
        "ours": our_rate,
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "ours_is": f"{hardware.precision}, {layout}",
        "threads": hardware.threads,
    }


def rate(epoch: Callable[[], int], seconds: float, hardware: Hardware) -> float:
    """Pairs per second over whole epochs, at least `seconds` long."""
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or done == 0:
        done += epoch()
        if hardware.device.type == "cuda":
            torch.cuda.synchronize()
    return done / spent


# ---------------------------------------------------------------- ours


class Ours:
    """`train_epoch` of the product, as the trainer calls it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        learner = new_learner(site)
        initialise(learner.model, 1)
        self.training = Training(learner, Start(1, {}))

    def epoch(self) -> int:
        train_epoch(self.training, 1, 1e-3, lambda _: None)
        return len(self.site.dataset.labels)


def site_of(path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], batch: int, hardware: Hardware) -> Site:
    images.tofile(path)
    mapped = np.memmap(path, np.uint8, "r", shape=images.shape)
    dataset = Dataset(mapped, labels, np.zeros(len(labels), np.int8), tuple(map(str, range(len(labels)))))
    anchor = AnchorSet("benchmark", ("a", "b"), mapped, labels)
    plan = Plan(batch_size=batch, image_size=images.shape[1])
    return Site("bench", "", plan, method_of("hsl"), dataset, anchor, hardware)


# ---------------------------------------------------------------- the plain loop


class LoopedExperts(nn.Module):
    """The same experts, one module each, in a Python loop."""

    def __init__(self, experts: int, inputs: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Dropout(0.3), nn.Linear(HIDDEN, TASK))
            for _ in range(experts)
        )

    def forward(self, joint: Tensor) -> Tensor:
        return torch.stack([expert(joint) for expert in self.experts], dim=1)  # (B, E, 32)


class Plain:
    """Model and step in float32, without any of our choices."""

    def __init__(self, device: torch.device) -> None:
        model = MMoE(backbone="resnet18")
        model.experts = LoopedExperts(12, 1024)  # type: ignore[assignment]
        self.device = device
        self.model = model.to(device).train()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4, foreach=False)

    def step(self, primary: Tensor, label: Tensor, anchor: Tensor, anchor_label: Tensor) -> None:
        out_primary, out_anchor = self.model(primary.to(self.device), anchor.to(self.device))
        loss = F.binary_cross_entropy(torch.sigmoid(out_primary[:, 0]), label.to(self.device))
        loss = loss + F.binary_cross_entropy(torch.sigmoid(out_anchor[:, 0]), anchor_label.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Loop:
    """One epoch: each image read by `image_of`, made a normalised float tensor, stacked."""

    def __init__(
        self, plain: Plain, image_of: Callable[[int], NDArray[np.uint8]], labels: NDArray[np.int64], batch: int
    ) -> None:
        self.plain, self.image_of, self.batch = plain, image_of, batch
        self.labels = torch.from_numpy(labels).float()
        self.mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD)[:, None, None]

    def epoch(self) -> int:
        primary, anchor = torch.randperm(len(self.labels)), torch.randperm(len(self.labels))
        for p, a in zip(primary.split(self.batch), anchor.split(self.batch), strict=True):
            self.plain.step(self._stack(p), self.labels[p], self._stack(a), self.labels[a])
        return len(self.labels)

    def _stack(self, where: Tensor) -> Tensor:
        return torch.stack([self._tensor(self.image_of(int(i))) for i in where])  # (B, 3, S, S)

    def _tensor(self, image: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(image).expand(3, -1, -1).float() / 255
        return (pixels - self.mean) / self.std


# ---------------------------------------------------------------- images and machine


def write_jpegs(folder: Path, count: int) -> list[Path]:
    """Grey speckle of fixed seed: as hard to decode as ultrasound."""
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (JPEG_SIDE[1] // 4, JPEG_SIDE[0] // 4), dtype=np.uint8))
        files.append(folder / f"{number}.jpg")
        coarse.resize(JPEG_SIDE, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image.convert("L").resize((size, size), Image.Resampling.BILINEAR))


def facts(device: str) -> dict[str, Any]:
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "amx_bfloat16": bool(torch.cpu._is_amx_tile_supported()),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "jpeg_px": JPEG_SIDE,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
