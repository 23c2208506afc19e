"""Does a hospital get a better model from the federation than alone? BUS-BRA by scanner: four hospitals, of 902, 809,
139 and 25 images, beside an anchor set of chest X-rays.

    python benchmarks/learning_busbra.py --data busbra --anchor cxr_pneumonia --out cells
    python benchmarks/learning_busbra.py --data busbra --anchor cxr_pneumonia --out cells-quick --quick
    python benchmarks/learning_busbra.py --data busbra --anchor cxr_pneumonia --out cells --reach

One *cell* is one arm and one seed: a whole federation, simulated by the product's own training and fusion, or one
training alone or on all images together, of as many epochs with the same settings. Each cell is a file in --out; called
again, the benchmark goes on with those that lack, and prints the table of those that are there (--table: only that).
The seed decides initial weights, split, order and augmentation. Every hospital's model is chosen by its own validation
images as in the product; test images are looked at once, in the end.

--reach measures instead how much of the anchor loss's gradient arrives where the primary task's does, for each form of
HSL: one batch of the largest hospital, before any training and after five epochs there.

Test AUC is the mean over seeds; intervals (95 %) and differences draw patients again, with all their images, seeds and
arms, so a difference is paired.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hsl_node.train.hardware import Hardware, prepare  # first: it settles OpenMP before torch is loaded

# isort: split
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from hsl_node.demo.setup import Hospital, make_anchor, table_hospitals
from hsl_node.federation.names import Digest, Peer
from hsl_node.federation.plan import Plan, load_plan
from hsl_node.study.simulate import Exchanged, begun, next_round
from hsl_node.sync.candidates import Candidate, ModelKind, find_best
from hsl_node.train.batches import normalise
from hsl_node.train.data import anchor
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.dataset import Dataset, open_dataset
from hsl_node.train.data.files import replacing
from hsl_node.train.data.sources import TEST, TRAIN
from hsl_node.train.method import Site
from hsl_node.train.methods import method_of
from hsl_node.train.networks.anchor_reach import anchor_reach
from hsl_node.train.networks.mmoe import MMoE
from hsl_node.train.scoring import answers, as_log_odds, open_fused, open_model, validate
from hsl_node.train.site import initial_model
from hsl_node.train.tasks.classification import primary_loss

RESAMPLES = 1000
FEWEST = 10  # patients of a class, for an interval (decision 0070)
TRAINING = (  # what all arms but the first have in common
    "schedule=cosine_run",
    "epoch=own",
    "augment.flip=true",
    "augment.shift=0.1",
    "augment.zoom=0.15",
    "augment.turn=15",
    "augment.brightness=0.2",
    "augment.contrast=0.2",
)
SOFTMAX = ("hsl.preset=published", "recalibrate=true")  # the published network in today's training
SEPARATE = ("hsl.encoder=separate", "hsl.anchor_weight=1")  # an encoder for each task, as published
ARMS: Mapping[str, tuple[str, ...]] = {
    "hsl published": (
        "method=hsl",
        "hsl.preset=published",
        "fusion=mean",
        "schedule=restarts",
        "epoch=longest",
        "recalibrate=false",
    ),
    "hsl": ("method=hsl", *TRAINING),
    "hsl softmax": ("method=hsl", *SOFTMAX, *TRAINING),
    "hsl sharp gates": ("method=hsl", *SOFTMAX, "hsl.gate_temperature=0.01", *TRAINING),
    "hsl separate": ("method=hsl", *SEPARATE, *TRAINING),
    "hsl separate layernorm": ("method=hsl", *SEPARATE, "hsl.embedding=layernorm", *TRAINING),
    "hsl weight 1": ("method=hsl", "hsl.anchor_weight=1", *TRAINING),
    "hsl layernorm": ("method=hsl", "hsl.embedding=layernorm", *TRAINING),
    "fedavg": ("method=fedavg", *TRAINING),
    "fedbn": ("method=fedbn", *TRAINING),
    "fedprox": ("method=fedprox", *TRAINING),
    "alone": ("method=hsl", *TRAINING),
    "central": ("method=hsl", *TRAINING),
    "alone plain": ("method=fedavg", *TRAINING),
    "central plain": ("method=fedavg", *TRAINING),
}
QUICK = ("backbone=tiny", "image_size=32", "rounds=2", "epochs_per_round=2")


@dataclass(frozen=True)
class Bench:
    """What all cells share."""

    out: Path
    hospitals: Sequence[Hospital]
    classes: tuple[str, ...]
    anchor: Path
    common: Sequence[str]  # settings of the plan
    hardware: Hardware

    def plan(self, arm: str, seed: int) -> Plan:
        plan = load_plan(None, [*ARMS[arm], *self.common, f"seed={seed}"])
        return plan.model_copy(update={"classes": self.classes})

    def cell(self, arm: str, seed: int) -> Path:
        return self.out / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}.json"

    def sites(self, arm: str, seed: int) -> dict[Peer, Site]:
        plan = self.plan(arm, seed)
        anchors = anchor.load(self.anchor)

        def site(hospital: Hospital) -> Site:
            dataset = open_dataset(
                hospital.data,
                plan,
                cache=self.out / "images" / hospital.name,
                ledger=self.out / "splits" / f"{hospital.name}-{seed}.json",
            )
            return Site(hospital.name, "benchmark", plan, method_of(plan.method), dataset, anchors, self.hardware)

        return {Peer(hospital.name): site(hospital) for hospital in self.hospitals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of BUS-BRA, or any table of images")
    parser.add_argument("--group-by", default="device", help="the column whose values are the hospitals")
    parser.add_argument("--anchor", type=Path, required=True, help="images of the anchor set, or the set itself")
    parser.add_argument("--out", type=Path, required=True, help="where the cells are, and the decoded images")
    parser.add_argument("--arms", default=",".join(ARMS), help="separated by commas")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--set", action="append", default=[], help="of the plan, for every arm; e.g. image_size=64")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--quick", action="store_true", help="tiny network, 32 px, 2 rounds of 2 epochs, one seed")
    parser.add_argument("--against", default="hsl", help="the arm that the others are compared with")
    parser.add_argument(
        "--reach", action="store_true", help="of the forms of HSL: what of the anchor loss arrives where"
    )
    parser.add_argument("--table", action="store_true", help="of the cells that are there, without any training")
    args = parser.parse_args()
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    common = [*(QUICK if args.quick else ()), *args.set]
    settings = load_plan(None, common)
    size = settings.image_size
    hospitals, classes = table_hospitals(out, args.data, args.group_by)
    anchors = out / "anchor.safetensors"
    if not anchors.exists():
        make_anchor(out, args.anchor, size, 1, lambda what, done, total: None)
    hardware = prepare(
        device="cpu",
        threads=args.threads,
        precision=settings.precision,
        image_size=size,
        backbone=settings.backbone,
    )
    bench = Bench(out, hospitals, classes, anchors, common, hardware)
    arms = args.arms.split(",")
    seeds = [1] if args.quick else [int(seed) for seed in args.seeds.split(",")]
    if args.reach:
        print("\n".join(reach_table(bench, [arm for arm in arms if arm.startswith("hsl")], seeds)))
        return
    if not args.table:
        for seed in seeds:
            for arm in arms:
                if not bench.cell(arm, seed).exists():
                    began = time.monotonic()
                    content = measured(bench, arm, seed)
                    with replacing(bench.cell(arm, seed)) as file:
                        file.write(json.dumps({**content, "seconds": time.monotonic() - began}).encode())
                    print(f"{arm}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    print("\n".join(table(bench, arms, seeds, args.against)))


# ---------------------------------------------------------------- a cell


def measured(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """Of each hospital: all its candidates with their validation, and what the chosen one says of the test images."""
    sites = bench.sites(arm, seed)
    folder = bench.out / "running" / bench.cell(arm, seed).stem
    shutil.rmtree(folder, ignore_errors=True)
    how = arm.split()[0]
    if how in ("alone", "central"):
        trained = {"all": pooled(sites)} if how == "central" else sites
        found: dict[str, Any] = {}
        for name, site in trained.items():
            done = next(rounds({Peer(name): in_one_round(site)}, folder / name))
            for peer in sites if how == "central" else [name]:
                found[peer] = hospital(sites[Peer(peer)], [("own", opened_own(sites[Peer(peer)], done, name))], None)
    else:
        found = {}
        for done in rounds(sites, folder):
            for peer, site in sites.items():
                models: list[tuple[ModelKind, Callable[[], nn.Module]]] = [
                    ("fused", opened_fused(site, done, recalibrate=False))
                ]
                if done.round > 1:  # before that nothing of the others is in it
                    models.insert(0, ("own", opened_own(site, done, peer)))
                if site.plan.recalibrate:
                    models.append(("recalibrated", opened_fused(site, done, recalibrate=True)))
                found[peer] = hospital(site, models, found.get(peer), done.round)
    shutil.rmtree(folder, ignore_errors=True)
    return {"arm": arm, "seed": seed, "plan": bench.plan(arm, seed).model_dump(mode="json"), "hospitals": found}


def rounds(sites: Mapping[Peer, Site], folder: Path) -> Iterator[Exchanged]:
    """All planned rounds; of each, the files of the one before are gone when the next is asked for."""
    done = begun(sites, folder)
    for _ in range(next(iter(sites.values())).plan.rounds):
        before, done = done, next_round(sites, folder, done, lambda peer, event: None)
        yield done
        for path in (before.fused, *before.sent.values(), *before.own.values()):
            path.unlink()


def in_one_round(site: Site) -> Site:
    """As many epochs, and no exchange between them: what `train_alone` does."""
    plan = site.plan
    epochs = plan.rounds * plan.epochs_per_round
    return replace(
        site, plan=plan.model_copy(update={"rounds": 1, "epochs_per_round": epochs, "patience_epochs": epochs})
    )


def pooled(sites: Mapping[Peer, Site]) -> Site:
    """One hospital that has the images of all."""
    first = next(iter(sites.values()))
    sets = [site.dataset for site in sites.values()]
    whole = Dataset(
        images=np.concatenate([s.images for s in sets]),
        labels=np.concatenate([s.labels for s in sets]),
        split=np.concatenate([s.split for s in sets]),
        ids=tuple(id for s in sets for id in s.ids),
    )
    return replace(first, peer="all", dataset=whole)


def opened_own(site: Site, done: Exchanged, peer: str) -> Callable[[], nn.Module]:
    return lambda: open_model(done.own[Peer(peer)], site.plan, site.hardware)[1]


def opened_fused(site: Site, done: Exchanged, *, recalibrate: bool) -> Callable[[], nn.Module]:
    return lambda: open_fused(site, done.start(site), recalibrate=recalibrate)


def hospital(
    site: Site,
    models: Sequence[tuple[ModelKind, Callable[[], nn.Module]]],
    before: Mapping[str, Any] | None,
    round: int = 1,
) -> dict[str, Any]:
    """What is known of a hospital after one more round: the candidates, and the best one's answers to the test."""
    found = list(before["candidates"]) if before else []
    test = dict(before["test"]) if before else {}
    for kind, open_it in models:
        model = open_it()
        verdict = validate(site, model)
        found.append([kind, round, verdict.score, verdict.loss])
        best = find_best([Candidate(k, r, Digest(""), score, loss) for k, r, score, loss in found])
        if best and [best.kind, best.round] == [kind, round]:
            where = site.indices(TEST)
            test = {
                "model": f"{kind} {round}",
                "patients": [site.dataset.patients[i] or site.dataset.ids[i] for i in where],
                "labels": site.dataset.labels[where].tolist(),
                "log_odds": np.ravel(as_log_odds(answers(site, model, TEST))).astype(float).tolist(),
            }
    return {"candidates": found, "test": test}


# ---------------------------------------------------------------- what of the anchor loss arrives where


def reach_table(bench: Bench, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    yield "| form | seeds | on features, at first | on the encoder | on features, after 5 epochs | on the encoder |"
    yield "|---|---|---|---|---|---|"
    for arm in arms:
        found = np.mean([reach(bench, arm, seed) for seed in seeds], axis=0)
        yield f"| {arm} | {len(seeds)} | {' | '.join(f'{share:.2g}' for share in found)} |"


def reach(bench: Bench, arm: str, seed: int) -> list[float]:
    """Anchor loss's gradient / primary loss's, on the features and on the encoder: before training, after 5 epochs."""
    name, site = max(bench.sites(arm, seed).items(), key=lambda one: len(one[1].dataset.images))
    site = replace(site, plan=site.plan.model_copy(update={"rounds": 1, "epochs_per_round": 5, "patience_epochs": 5}))
    anchors = cast(AnchorSet, site.anchor)
    images = site.indices(TRAIN)[: site.plan.batch_size]
    beside = np.linspace(0, len(anchors.images) - 1, len(images)).astype(int)  # of both classes

    def tensors(all_images: NDArray[np.uint8], labels: NDArray[np.int64], which: NDArray[Any]) -> tuple[Tensor, Tensor]:
        return normalise(torch.from_numpy(all_images[which])), torch.from_numpy(labels[which])

    pairs = (
        *tensors(site.dataset.images, site.dataset.labels, images),
        *tensors(anchors.images, anchors.labels, beside),
    )
    found: list[float] = []
    folder = bench.out / "running" / f"reach-{bench.cell(arm, seed).stem}"
    shutil.rmtree(folder, ignore_errors=True)
    for model in (
        initial_model(site.plan, site.method, None),
        opened_own(site, next(rounds({name: site}, folder)), name)(),
    ):
        shares = anchor_reach(cast(MMoE, model), *pairs, primary_loss, site.plan.settings["anchor_weight"])
        found += [shares.features, shares.encoder]
    shutil.rmtree(folder, ignore_errors=True)
    return found


# ---------------------------------------------------------------- the table


def table(bench: Bench, arms: Sequence[str], seeds: Sequence[int], against: str) -> Iterator[str]:
    """Test AUC of each hospital and arm with its interval, and what the arm `against` has more."""
    cells = {
        (arm, seed): json.loads(bench.cell(arm, seed).read_text("utf-8"))["hospitals"]
        for arm in arms
        for seed in seeds
        if bench.cell(arm, seed).exists()
    }
    yield f"| hospital | arm | seeds | test AUC | {against} - this arm | chosen |"
    yield "|---|---|---|---|---|---|"
    for hospital in bench.hospitals:
        of = {arm: {s: cells[arm, s][hospital.name]["test"] for s in seeds if (arm, s) in cells} for arm in arms}
        patients = sorted({p for tests in of.values() for test in tests.values() for p in test["patients"]})
        times = np.random.default_rng(1).multinomial(len(patients), [1 / len(patients)] * len(patients), RESAMPLES)
        times = np.concatenate([np.ones((1, len(patients)), np.int64), times])  # first: the figure itself
        number = {patient: i for i, patient in enumerate(patients)}
        known = {
            (p, y)
            for t in of.values()
            for test in t.values()
            for p, y in zip(test["patients"], test["labels"], strict=True)
        }
        sure = all(sum(y == label for _, y in known) >= FEWEST for label in (0, 1))
        figures = {arm: {s: aucs(test, number, times) for s, test in tests.items()} for arm, tests in of.items()}
        for arm in arms:
            if not of[arm]:
                continue
            both = [s for s in of[arm] if arm != against and s in figures.get(against, {})]
            more = [figures[against][s] - figures[arm][s] for s in both]
            own = words(np.mean([*figures[arm].values()], axis=0), sure)
            difference = words(np.mean(more, axis=0), sure, "+.3f") if more else ""
            chosen = ", ".join(test["model"] for test in of[arm].values())
            yield f"| {hospital.name} | {arm} | {len(of[arm])} | {own} | {difference} | {chosen} |"


def aucs(test: Mapping[str, Any], number: Mapping[str, int], times: NDArray[np.int64]) -> NDArray[np.float64]:
    """One figure for each row of `times`, how often every patient is drawn; nan where a class is not."""
    labels = np.array(test["labels"])
    drawn = times[:, [number[patient] for patient in test["patients"]]]  # (resamples, images)
    return np.array(
        [
            roc_auc_score(labels, test["log_odds"], sample_weight=row) if len(set(labels[row > 0])) == 2 else np.nan
            for row in drawn
        ]
    )


def words(figures: NDArray[np.float64], sure: bool, how: str = ".3f") -> str:
    """The figure, and the middle 95 % of its resamples; without these where a class has too few patients."""
    if np.isnan(figures[0]):
        return "undefined"
    if not sure:
        return f"{figures[0]:{how}} (too few patients for an interval)"
    low, high = np.nanpercentile(figures[1:], [2.5, 97.5])
    return f"{figures[0]:{how}} [{low:{how}}, {high:{how}}]"


if __name__ == "__main__":
    main()
