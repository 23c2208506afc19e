"""What one training step of HSL costs, by the plan's settings: anchors in every batch or in some, two encoders or one.

    python benchmarks/learning_speed.py --px 64 --batch 32 --threads 1 [--before CLONE]

`train_epoch` itself, with the ResNet18 form of the plan, on drawn images. All settings take turns in short windows of a
few steps, so that a busy machine slows all alike, and a step counts by its processor time (all threads'; with --device
cuda by the clock). A ratio is the median over windows of this setting's steps per second over those of the first, the
published form as it is now; with --before, as it is in another clone, whose own `train_step.py` runs beside this one.
Beside it, what a validation costs with the whole anchor set and with the part of it that epochs are compared beside.
Score is not measured here: a faster step is worth something at an equal score only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
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
    "published: two encoders, anchors in every batch": {"preset": "published"},
    "as by default: one encoder, altered images": {},
    "... `anchor_every` 2": {"anchor_every": 2},
    "... 4": {"anchor_every": 4},
    "... 8": {"anchor_every": 8},
    '`encoder = "separate"`': {"encoder": "separate"},
    "... separate, `anchor_every` 8": {"encoder": "separate", "anchor_every": 8},
}
BEFORE = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/benchmarks"]
from train_step import Ours, prepare, site_of
import numpy as np
px, batch, threads, steps = map(int, sys.argv[3:])
images = np.random.default_rng(0).integers(0, 256, (steps * batch, px, px), dtype=np.uint8)
hardware = prepare(device="cpu", threads=threads, image_size=px)
ours = Ours(site_of(Path(sys.argv[2]), images, np.arange(len(images)) % 2, batch, hardware))
for _ in sys.stdin:
    started = time.process_time()
    ours.epoch()
    print(time.process_time() - started, flush=True)
"""
Window = Callable[[], float]  # takes STEPS steps and says how many seconds they took
STEPS = 8  # in a window: each of `anchor_every` comes out whole
VALIDATED, ANCHORS = 64, 512  # images; the paper's anchor set has 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu | cuda")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--before", type=Path, help="a clone at an earlier commit; its published form is the first row")
    arguments = parser.parse_args()
    px, batch = arguments.px, arguments.batch
    hardware = prepare(device=arguments.device, threads=arguments.threads, image_size=px)
    clock = time.perf_counter if hardware.device.type == "cuda" else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        trainings = {name: training_of(Path(folder), px, batch, hardware, s) for name, s in SETTINGS.items()}
        windows: dict[str, Window] = {name: window_of(training, clock) for name, training in trainings.items()}
        if arguments.before:
            earlier = window_before(arguments.before.resolve(), Path(folder), px, batch, hardware)
            windows = {f"published, as in {arguments.before.name}": earlier, **windows}
        rates = turns(windows, arguments.windows)
        first = next(iter(rates))
        print(f"{px} px, batch {batch}, {hardware.facts}, {hardware.processor}\n")
        print("| setting | steps/s | to the first (lowest-highest) |\n|---|---|---|")
        for name, found in rates.items():
            ratios = [a / b for a, b in zip(found, rates[first], strict=True)]
            span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"| {name} | {statistics.median(found):.2f} | {span} |", flush=True)
        whole, part = validations(next(iter(trainings.values())))
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


def window_of(training: Training, clock: Callable[[], float]) -> Window:
    def window() -> float:
        started = clock()
        train_epoch(training, 1, 1e-3, lambda _: None)  # the means that it gives back wait for the device
        return clock() - started

    return window


def window_before(clone: Path, folder: Path, px: int, batch: int, hardware: Hardware) -> Window:
    """The same of another clone, in a process of its own that computes when it is asked; on the CPU."""
    numbers = map(str, (px, batch, hardware.threads, STEPS))
    command = [sys.executable, "-c", BEFORE, str(clone), str(folder / "before.u8"), *numbers]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ask, answer = child.stdin, child.stdout
    assert ask is not None and answer is not None

    def window() -> float:
        print(file=ask, flush=True)
        return float(answer.readline())

    return window


def turns(windows: Mapping[str, Window], count: int) -> dict[str, list[float]]:
    """Steps per second of each, window by window; one window before counts for nothing."""
    found: dict[str, list[float]] = {name: [] for name in windows}
    for number in range(count + 1):
        for name, window in windows.items():
            rate = STEPS / window()
            if number:
                found[name].append(rate)
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
