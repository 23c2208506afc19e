"""The learning methods beside each other: lines, tests, faith, and what a round costs in time and in bytes.

    python benchmarks/methods.py            # 5 minutes on one core
    python benchmarks/methods.py --quick    # seconds: that it works

Three hospitals of drawn images in one process (`study/simulate.py`), one thread, processor time: training at all three,
validation and fusion. Each method takes turns with FedAvg of the same network, optimizer and augmentation, a run of
three rounds each; a ratio is the median over turns, and FedAvg's own says how much of it is noise. Settings are the
plan's and the method's defaults but for SMALL and HALF; there are as many anchor images as training images. The network
is tiny, so what does not grow with it weighs more than in a real run. Bytes are sizes of the files that a hospital
sends; with ResNet18 that of its first file, which holds the same tensors. Kept beside: what must lie at the hospital
from one round to the next, the full set being everybody's checkpoints.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from hsl_node.train.hardware import Hardware, prepare  # first: it settles OpenMP before torch is loaded

# isort: split
import numpy as np
import torch
from safetensors.torch import save_file

from hsl_node.federation.methods import CARDS, Card, Need
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan
from hsl_node.study import splitavg
from hsl_node.study.simulate import begun, simulate
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.sources import TRAIN, VALIDATION
from hsl_node.train.method import Site
from hsl_node.train.methods import method_of
from hsl_node.train.networks.backbone import Trunk
from hsl_node.train.networks.initial import initialise
from hsl_node.train.site import initial_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from sources import PACKAGE, imports, sources  # noqa: E402

PEERS = tuple(map(Peer, ("ash", "birch", "cedar")))
SMALL = {"fedppkt": {"teacher_epochs": 2}}  # instead of 200 before the first fusion
HALF = {"fedppkt", "fedtp"}  # of half the side: else these two alone take minutes
ALSO = {  # modules that only this method uses, though another knows their name
    "hsl": ("hsl_node.train.networks.mmoe",),
    "splitavg": ("hsl_node.study.splitavg",),
}
OF_ALL = ("train/test_every_method.py", "whole/test_simulation_is_the_daemon.py")  # each test there is of every method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(CARDS), choices=list(CARDS), metavar="METHOD")
    parser.add_argument(
        "--seconds", type=float, default=4, help="of processor time: no further turn of a method after it"
    )
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--images", type=int, default=48, help="for training, of each hospital")
    parser.add_argument("--quick", action="store_true", help="one turn each, 16 images of 32 px; no ResNet18")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.px, arguments.images = 0, 32, 16
    hardware = prepare(device="cpu", threads=1, precision="float32", image_size=arguments.px)
    print(
        f"{hardware.processor}, torch {torch.__version__}, {arguments.images} images of",
        end=" ",
    )
    print(f"{arguments.px} px for each of {len(PEERS)} hospitals\n")
    titles = (
        "method",
        "here",
        "lines (code)",
        "its tests",
        "seconds / FedAvg",
        "bytes / FedAvg",
        "... ResNet18",
        "kept beside",
    )
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name in arguments.methods:
        with tempfile.TemporaryDirectory() as folder:
            cost = costs(name, Path(folder), hardware, arguments)
        cells = (name, faith(CARDS[name]), lines(CARDS[name]), tests(CARDS[name]), *cost, kept(CARDS[name]))
        print(f"| {' | '.join(cells)} |", flush=True)
    functions = sum(test_files()[ROOT / "tests" / name][1] for name in OF_ALL)
    print(f"\nEach that runs between hospitals is in the {functions} tests of {' and '.join(OF_ALL)}, too.")


# ------------------------------------------------------------------ what is read off cards and files


def faith(card: Card) -> str:
    return f"{card.faith}; in simulations only" if card.simulation_only else card.faith


def kept(card: Card) -> str:
    needs = {
        "full set": Need.FULL_SET in card.needs,
        "private tensors": card.private,
        "own model": Need.OWN in card.needs,
    }
    return ", ".join(what for what, is_so in needs.items() if is_so)


def modules(card: Card) -> list[str]:
    """The method's own file, and whatever nobody else imports."""
    of_methods = {other.code.partition(":")[0] for other in CARDS.values()}
    own = [card.code.partition(":")[0], *ALSO.get(card.name, ())]
    while more := [m for m, by in importers().items() if m not in {*own, *of_methods} and by and by <= {*own}]:
        own += more
    return own


@cache
def importers() -> dict[str, set[str]]:
    """Module -> those that import it."""
    names = {module: {known(name) for name in imports(tree)} - {module} for module, tree in sources().items()}
    return {module: {other for other in names if module in names[other]} for module in names}


def known(name: str) -> str:
    """The module of what is imported; "" of what is not ours."""
    while name and name not in sources():
        name = name.rpartition(".")[0]
    return name


def lines(card: Card) -> str:
    """Of each file in all and, in brackets, without docstrings, comments and blank lines."""
    found = []
    for number, module in enumerate(modules(card)):
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        text = path.read_text(encoding="utf-8").splitlines()
        told = {n for node in ast.walk(sources()[module]) for n in docstring(node)}
        code = [
            n for n, line in enumerate(text, 1) if n not in told and line.strip() and not line.strip().startswith("#")
        ]
        found.append(f"{'' if not number else f'{path.parent.name}/{path.stem} '}{len(text)} ({len(code)})")
    return ", ".join(found)


def docstring(node: ast.AST) -> range:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or ast.get_docstring(node) is None:
        return range(0)
    return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


def tests(card: Card) -> str:
    """Files of its name, and those on what only it uses; how many tests each has, whatever its cases."""
    own, others = {*modules(card)}, {f"test_{name}" for name in CARDS} - {f"test_{card.name}"}
    stems = {f"test_{module.rpartition('.')[2]}" for module in own}
    found = []
    for path, (imported, count, text) in test_files().items():
        of_parts = path.stem in stems or (path.parent.name in ("methods", "networks") and imported & own)
        simulated = path.parent.name == "study" and card.simulation_only and f'"{card.name}"' in text
        if (of_parts or simulated) and path.stem not in others:
            found.append(f"{path.stem} {count}")
    return ", ".join(found)


@cache
def test_files() -> dict[Path, tuple[set[str], int, str]]:
    """Each with the modules of ours that it imports, the number of its tests, and its text."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(text := path.read_text(encoding="utf-8"))
        count = sum(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
        found[path] = {known(name) for name in imports(tree)}, count, text
    return found


# ------------------------------------------------------------------ what is measured


def costs(name: str, folder: Path, hardware: Hardware, arguments: Any) -> tuple[str, str, str]:
    """Time, bytes, bytes with ResNet18; each through that of FedAvg."""
    plan, compared = plans(name, folder, arguments.px // 2 if name in HALF else arguments.px)
    both, ratios, started = (plan, compared), list[float](), time.process_time()
    while not ratios or time.process_time() - started < arguments.seconds:
        turn = len(ratios)
        order = (1, 0) if turn % 2 else (0, 1)  # what comes first finds colder caches
        found = {n: run(both[n], folder / f"{turn}-{n}", hardware, turn, arguments.images) for n in order}
        ratios.append(found[0][0] / found[1][0])
    span = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
    sent = share(found[0][1] / found[1][1])
    return f"{statistics.median(ratios):.2f}{span}", sent, "" if arguments.quick else large(name, hardware)


def share(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio else "none"


def plans(name: str, folder: Path, px: int, backbone: str = "tiny") -> tuple[Plan, Plan]:
    """The method's, and FedAvg's with the same network and the same training."""
    card = CARDS[name]
    settings: dict[str, Any] = {
        "method": name, "backbone": "vit_tiny" if Need.TRANSFORMER in card.needs else backbone, "image_size": px,
        "batch_size": 16, "epoch": "own", "epochs_per_round": 2, "rounds": 3, "precision": "float32",
    }  # fmt: skip
    if card.optimizer:
        settings["optimizer"] = card.optimizer
    if Need.WEIGHTS in card.needs:
        settings["backbone_weights"] = hashlib.sha256(encoder(folder, backbone).read_bytes()).hexdigest()
    plan = Plan.model_validate({**settings, **({name: SMALL[name]} if name in SMALL else {})})
    return plan, Plan.model_validate({**settings, "method": "fedavg", "augment": plan.augment.model_dump()})


def encoder(folder: Path, backbone: str) -> Path:
    """A weight file as somebody may have it."""
    path = folder / f"{backbone}.safetensors"
    if not path.exists():
        trunk = Trunk(backbone)
        initialise(trunk, 7)
        save_file(trunk.net.state_dict(), path)
    return path


def hospitals(plan: Plan, folder: Path, hardware: Hardware, seed: int, images: int) -> dict[Peer, Site]:
    weights = encoder(folder.parent, plan.backbone) if plan.backbone_weights else None
    anchor = None
    if Need.ANCHOR in plan.card.needs:
        data = drawn(images, plan.image_size, 1000 + seed)
        anchor = AnchorSet("drawn", ("a", "b"), data.images[:images], data.labels[:images])
    method = method_of(plan.method)
    return {
        peer: Site(
            peer, "0" * 64, plan, method, drawn(images, plan.image_size, 10 * seed + n), anchor, hardware,
            backbone_weights=weights,
        )
        for n, peer in enumerate(PEERS)
    }  # fmt: skip


def drawn(images: int, px: int, seed: int) -> Dataset:
    """So many for training, a quarter as many for validation."""
    count, rng = images + images // 4, np.random.default_rng(seed)
    split = np.where(np.arange(count) < images, TRAIN, VALIDATION).astype(np.int8)
    pixels = rng.integers(0, 256, (count, px, px), dtype=np.uint8)
    return Dataset(pixels, np.arange(count, dtype=np.int64) % 2, split, tuple(f"{n:064x}" for n in range(count)))


def run(plan: Plan, folder: Path, hardware: Hardware, seed: int, images: int) -> tuple[float, float]:
    """Processor time of all rounds, seconds, and the bytes that a hospital sends in a round."""
    sites = hospitals(plan, folder, hardware, seed, images)
    started = time.process_time()
    match plan.method:
        case "splitavg":
            splitavg.simulate(sites, folder)
            return time.process_time() - started, crossing(plan, images)
        case "local":
            for peer, site in sites.items():
                simulate({peer: site}, folder / peer)
            return time.process_time() - started, 0.0
    rounds = simulate(sites, folder)[1:]
    took = time.process_time() - started
    sizes = [path.stat().st_size for done in rounds for path in done.sent.values()]
    return took, 0.0 if plan.method == "central" else statistics.mean(sizes)


def crossing(plan: Plan, images: int) -> float:
    """SplitAVG's bytes of a round: activations and labels up, gradients down, in every whole batch."""
    first = splitavg.first_of(initial_model(plan, method_of(plan.method), None))
    with torch.no_grad():
        cut = first(torch.zeros(plan.batch_size, 3, plan.image_size, plan.image_size))
    labels = torch.zeros(plan.batch_size, dtype=torch.int64)
    return plan.epochs_per_round * (images // plan.batch_size) * (2 * cut.nbytes + labels.nbytes)


def large(name: str, hardware: Hardware) -> str:
    """With ResNet18, or what the method needs instead."""
    card = CARDS[name]
    if card.simulation_only and name != "metafed_ring":
        return ""
    backbone = "vit_tiny" if Need.TRANSFORMER in card.needs else "resnet18"
    return share(first_file(name, backbone, hardware) / first_file("fedavg", backbone, hardware))


@cache
def first_file(name: str, backbone: str, hardware: Hardware) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        plan, _ = plans(name, folder.parent, 64, backbone)
        return begun(hospitals(plan, folder, hardware, 0, 4), folder).fused.stat().st_size


if __name__ == "__main__":
    main()
