"""What one training step of HSL costs, by the plan's settings: anchors in every batch or in some, two encoders or one.

    python benchmarks/learning_speed.py --px 64 --batch 32

`train_epoch` itself, with the ResNet18 form of the plan, on drawn images. All settings take turns in short windows of a
few steps, in one process, so that a busy machine slows all alike; a ratio is the median over windows of this setting's
steps per second over those of the first, which is the published form. Beside it, what a validation costs with the
whole anchor set and with the part of it that epochs are compared beside. Score is not measured here: a faster step is
worth something at an equal score only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from hsl_node.train.hardware import Hardware, prepare  # first: it settles OpenMP before torch is loaded

# isort: split
import numpy as np

from hsl_node.federation.plan import Plan
from hsl_node.train import scoring
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.sources import VALIDATION
from hsl_node.train.loop import train_epoch
from hsl_node.train.method import Site, Start
from hsl_node.train.methods import method_of
from hsl_node.train.networks.initial import initialise
from hsl_node.train.start import Training, new_learner

SETTINGS: Mapping[str, Mapping[str, object]] = {
    "published: separate": {"encoder": "separate"},
    "separate, anchors in every 2nd batch": {"encoder": "separate", "anchor_every": 2},
    "separate, anchors in every 4th batch": {"encoder": "separate", "anchor_every": 4},
    "separate, anchors in every 8th batch": {"encoder": "separate", "anchor_every": 8},
    "shared": {"encoder": "shared"},
    "shared, anchors in every 4th batch": {"encoder": "shared", "anchor_every": 4},
    "shared, anchors in every 8th batch": {"encoder": "shared", "anchor_every": 8},
}
STEPS = 8  # in a window: each of `anchor_every` comes out whole
VALIDATED, ANCHORS = 64, 512  # images; the paper's anchor set has 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu | cuda")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    arguments = parser.parse_args()
    hardware = prepare(device=arguments.device, threads=arguments.threads, image_size=arguments.px)
    with tempfile.TemporaryDirectory() as folder:
        trainings = {
            name: training_of(Path(folder), arguments.px, arguments.batch, hardware, settings)
            for name, settings in SETTINGS.items()
        }
        rates = turns(trainings, arguments.windows)
        first = next(iter(rates))
        print(f"{arguments.px} px, batch {arguments.batch}, {hardware.facts}, {hardware.processor}\n")
        print("| setting | steps/s | to the first (lowest-highest) |\n|---|---|---|")
        for name, found in rates.items():
            ratios = [a / b for a, b in zip(found, rates[first], strict=True)]
            span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"| {name} | {statistics.median(found):.2f} | {span} |", flush=True)
        whole, part = validations(trainings[first])
        print(f"\nvalidation of {VALIDATED} images: {whole:.1f} s beside {ANCHORS} anchors, {part:.1f} s beside")
        print(f"{scoring.COMPARED_ANCHORS} of them: {whole / part:.1f} times as fast")
        print(json.dumps({name: [round(rate, 3) for rate in found] for name, found in rates.items()}))


def training_of(folder: Path, px: int, batch: int, hardware: Hardware, settings: Mapping[str, object]) -> Training:
    """A hospital of drawn images, with a new learner."""
    path, count = folder / f"{px}.u8", STEPS * batch + VALIDATED
    if not path.exists():
        np.random.default_rng(0).integers(0, 256, (max(count, ANCHORS), px, px), dtype=np.uint8).tofile(path)
    images = np.memmap(path, np.uint8, "r").reshape(-1, px, px)
    split = np.where(np.arange(count) < STEPS * batch, 0, VALIDATION).astype(np.int8)
    data = Dataset(images[:count], np.arange(count, dtype=np.int64) % 2, split, tuple(map(str, range(count))))
    anchor = AnchorSet("drawn", ("a", "b"), images[:ANCHORS], np.arange(ANCHORS, dtype=np.int64) % 2)
    plan = Plan.model_validate({"batch_size": batch, "image_size": px, "epoch": "own", "hsl": settings})
    learner = new_learner(Site("bench", "", plan, method_of("hsl"), data, anchor, hardware))
    initialise(learner.model, 1)
    return Training(learner, Start(1, {}))


def turns(trainings: Mapping[str, Training], windows: int) -> dict[str, list[float]]:
    """Steps per second of each, window by window; one window before counts for nothing."""
    found: dict[str, list[float]] = {name: [] for name in trainings}
    for window in range(windows + 1):
        for name, training in trainings.items():
            started = time.perf_counter()
            train_epoch(training, 1, 1e-3, lambda _: None)  # the means that it gives back wait for the device
            if window:
                found[name].append(STEPS / (time.perf_counter() - started))
    return found


def validations(training: Training) -> tuple[float, float]:
    site, model, seconds = training.learner.site, training.learner.model, []
    for anchors in (None, scoring.COMPARED_ANCHORS):
        started = time.perf_counter()
        scoring.answers(site, model, VALIDATION, anchors=anchors)
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


if __name__ == "__main__":
    main()
