"""The learning methods that a plan may name, as plan, manifest, daemon and help must know them. No torch.

A method is a `Card` here and a value in `train/methods/`, which the card's `code` names. Another package adds one by an
entry point of the group `hsl_node.methods`: its name is the method's, its value "module:CARD".
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from hsl_node.errors import escaped
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.method_card import FAITH as FAITH
from hsl_node.federation.method_card import SCORE_NAMES as SCORE_NAMES
from hsl_node.federation.method_card import Card as Card
from hsl_node.federation.method_card import Need as Need
from hsl_node.federation.method_card import Said as Said
from hsl_node.federation.method_card import Setting as Setting
from hsl_node.federation.method_card import nearest as nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "hsl_node.methods"  # of the entry points


def cards() -> Mapping[str, Card]:
    """All that are installed. One whose package cannot be loaded is left out: `card_of` says why."""
    found = dict(CARDS)
    for name in sorted(_others().keys() - CARDS.keys()):
        with suppress(ValueError):
            found[name] = card_of(name)
    return found


@cache
def package_of(name: str) -> str:
    """The package that brings a method, and its version; "" for a method of hsl-node itself."""
    if name in CARDS:
        return ""
    point = _others().get(name)
    return f"{point.dist.name} {point.dist.version}" if point and point.dist else name


def _others() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # takes a while, and nearly nobody needs it

    return {point.name: point for point in entry_points(group=GROUP)}


@cache
def card_of(name: str) -> Card:
    """The card of a method, of this package or of another that is installed.

    Raises:
        ValueError: there is none; with the nearest name.
    """
    if name in CARDS:
        return CARDS[name]
    others = _others()
    if name in others:
        where = f"the entry point {name} = {others[name].value} of the package {package_of(name)}"
        try:
            card = others[name].load()
        except Exception as exc:  # somebody else's code
            raise ValueError(f"{where} cannot be loaded: {escaped(repr(exc), 200)}") from exc
        if not isinstance(card, Card) or card.name != name:
            raise ValueError(f"{where} is no card of that name")
        if card.fusion not in FUSION_RULES or card.task not in SCORE_NAMES or card.faith not in FAITH:
            raise ValueError(f"{where}: its fusion, task or faith is none that this version of hsl-node has")
        return card
    known = [name for name in (*CARDS, *others) if name not in CARDS or not CARDS[name].simulation_only]
    raise ValueError(
        f"'{escaped(name, 60)}' is no method of this installation{nearest(name, known)} (it has {', '.join(known)}). "
        "Another version of hsl-node, or a package that adds methods, may bring it: install what the others have"
    )


# In the order of their names. `code` is loaded by the trainer alone.
_METHODS = "hsl_node.train.methods."
NO_CHANGE: Mapping[str, float | bool] = {
    **dict.fromkeys(("shift", "zoom", "turn", "brightness", "contrast"), 0.0),
    **dict.fromkeys(("flip", "flip_upright"), False),
}  # the plan's `augment` switched off

CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        Card(
            "adafedprox",
            "federated averaging in which a policy decides each round how far the mean is held back",
            _METHODS + "adafedprox:ADAFEDPROX",
            fusion="interpolated",
            faith="assumed",
            cite="AdaFedProx, IEEE Transactions on Consumer Electronics (2024); the authors' code, "
            "github.com/Pranabiitp/AdaFedProx",
            says=(
                Said("accuracy", 0, 1),
                Said("entropy", 0, 1),
                Said("epochs", 0, 1),
                Said("loss", 0, 1e6),
                Said("mu", 0, 1),
                Said("score", 0, 1),
            ),
            private=True,
        ),
        Card(
            "central",
            "one classifier trained on the images of all hospitals together",
            _METHODS + "references:CENTRAL",
            simulation_only="it pools the images of all hospitals, and no image leaves one: "
            "hsl_node.study.simulate compares with it",
        ),
        Card(
            "fedavg",
            "federated averaging of one classifier, without an anchor task",
            _METHODS + "fedavg:FEDAVG",
            cite="McMahan, B. et al. Communication-efficient learning of deep networks from decentralized data. "
            "AISTATS (2017)",
        ),
        Card(
            "fedbn",
            "federated averaging of all but the normalisation layers, which stay at each hospital",
            _METHODS + "fedbn:FEDBN",
            fusion="mean",
            cite="Li, X. et al. FedBN: federated learning on non-IID features via local batch normalization. "
            "ICLR (2021)",
            private=True,
        ),
        Card(
            "fedcome",
            "federated averaging of updates that give way to each other, so that none goes against another's",
            _METHODS + "fedcome:FEDCOME",
            fusion="come",
            faith="adapted",
            cite="Zheng, S. et al. Federated learning via consensus mechanism on heterogeneous data: a new perspective "
            "on convergence. arXiv 2311.12358 (2023)",
            settings={
                "clip": Setting(0.0, 0, 1e9, does="no number moves further than this in a fusion; 0: as far as it will")
            },
        ),
        Card(
            "feddp",
            "heads of each hospital's own on a common trunk, calibrated in the last round where the heads disagree",
            _METHODS + "feddp:FEDDP",
            faith="adapted",
            cite="Wang, J. et al. FedDP: dual personalization in federated medical image segmentation. IEEE "
            "Transactions on Medical Imaging (2023)",
            needs=frozenset({Need.LABELS, Need.FULL_SET}),
            settings={
                "calibration": Setting(1.0, 0, 1000, does="weight of the loss where the hospitals' heads disagree"),
            },
            private=True,
            beside="every hospital's head",
        ),
        Card(
            "feddps",
            "federated averaging of models that train on samples spread as everybody's images are (as assumed: only "
            "the publication's abstract was to be had)",
            _METHODS + "feddps:FEDDPS",
            faith="assumed",
            cite="FedDpS: distribution-preserving sampling. IEEE International Conference on Big Data (2024)",
            needs=frozenset({Need.LABELS, Need.FULL_SET}),
            beside="a mixture of each hospital's images",
        ),
        Card(
            "feddys",
            "training on the images that the model is least sure of; hospitals count by how even their classes are",
            _METHODS + "feddys:FEDDYS",
            fusion="entropy_weighted",
            faith="adapted",
            cite="FedDyS: the authors' code, github.com/ensiyeKiya/FedDyS",
            says=(Said("evenness", 0, 1),),
            settings={
                "evenness": Setting(
                    "entropy",
                    choices=("entropy", "classes"),
                    does="entropy: that of the label shares; classes: the number of classes present, as released",
                )
            },
        ),
        Card(
            "fedktl",
            "no weights travel: class prototypes do, and a generator's images say what those of all hospitals mean",
            _METHODS + "fedktl:FEDKTL",
            fusion="mean",
            faith="adapted",
            cite="Zhang, J. et al. An upload-efficient scheme for transferring knowledge from a server-side "
            "pre-trained generator to clients in heterogeneous federated learning. CVPR (2024)",
            needs=frozenset({Need.LABELS, Need.ANCHOR, Need.FULL_SET}),
            settings={
                "generator": Setting(
                    "",
                    file=True,
                    does="sha256 of a local ONNX file that makes images (train.generator in each node.toml); empty: "
                    "principal components of the anchor set stand in",
                ),
                "latent": Setting(16, 1, 4096, does="numbers that stand for an image of the generator"),
                "weight": Setting(50.0, 0, 1000, does="of the generated images beside the hospital's own"),
            },
            private=True,
            beside="prototypes",
        ),
        Card(
            "fednova",
            "federated averaging of each hospital's mean step, however many steps it took",
            _METHODS + "fednova:FEDNOVA",
            fusion="nova",
            faith="adapted",
            differs="BatchNorm statistics take the mean by images (the authors' code leaves them at each hospital); "
            "with mu the fused model goes as far as the steps count, not as many as were taken",
            cite="Wang, J. et al. Tackling the objective inconsistency problem in heterogeneous federated "
            "optimization. NeurIPS (2020)",
            says=(Said("steps", 1, 1e9),),
            settings={"mu": Setting(0.0, 0, 1, does="weight of half the squared distance from the fused model")},
            optimizer="sgd",
        ),
        Card(
            "fedppkt",
            "a private teacher teaches a student by synthetic images; student and generator are averaged",
            _METHODS + "fedppkt:FEDPPKT",
            fusion="mean",
            faith="adapted",
            cite="Wei, Q. et al. FedPPKT: federated learning with privacy-preserving knowledge transfer. VCIP (2024)",
            needs=frozenset({Need.LABELS, Need.BATCHNORM, Need.FULL_SET}),
            differs="the fused generator is refined by each hospital at the start of a round, not once by a server",
            settings={
                "teacher_epochs": Setting(200, 1, 10_000, does="of round 1, in which the teacher learns alone"),
                "images": Setting(64, 2, 4096, does="synthetic images made in each epoch (published: 256)"),
                "pool": Setting(1024, 2, 65_536, does="synthetic images that a hospital keeps"),
                "distillations": Setting(5, 1, 1000, does="steps of the student for each batch of own images"),
                "refinements": Setting(
                    50,
                    0,
                    10_000,
                    does="steps of the generator by everybody's students, at a round's start; published: 500",
                ),
                "norms": Setting(10.0, 0, 1000, does="weight of the teacher's norm statistics in synthesis"),
                "label": Setting(0.4, 0, 1000, does="weight of the drawn label"),
                "disagreement": Setting(1.1, 0, 1000, does="weight of where teacher and student disagree"),
            },
            private=True,
        ),
        Card(
            "fedprox",
            "federated averaging in which local training is held near the fused model",
            _METHODS + "fedprox:FEDPROX",
            cite="Li, T. et al. Federated optimization in heterogeneous networks. MLSys (2020)",
            settings={
                "mu": Setting(0.01, 0, 1000, does="weight of half the squared distance from the fused model"),
            },
        ),
        Card(
            "fedrcl",
            "federated averaging with a relaxed contrastive loss at every stage of the network",
            _METHODS + "fedrcl:FEDRCL",
            fusion="mean",
            faith="adapted",
            cite="Seo, S. et al. Relaxed contrastive learning for federated learning. CVPR (2024)",
            settings={
                "temperature": Setting(0.05, 0.001, 10, does="of the similarities in both terms"),
                "contrast": Setting(1.0, 0, 1000, does="weight of the contrastive term"),
                "relaxation": Setting(1.0, 0, 1000, does="weight of the term that keeps a class from collapsing"),
                "similar": Setting(0.7, -1, 1, does="from which similarity on a class counts as collapsing"),
            },
        ),
        Card(
            "fedtp",
            "federated averaging of a transformer whose attention projections a hypernetwork makes for each hospital",
            _METHODS + "fedtp:FEDTP",
            faith="adapted",
            cite="Li, H. et al. FedTP: federated learning by transformer personalization. IEEE TNNLS (2023)",
            needs=frozenset({Need.LABELS, Need.TRANSFORMER, Need.FULL_SET}),
            says=(Said("hypernetwork", 0, 2**48),),
            settings={
                "embedding": Setting(16, 1, 1024, does="numbers that stand for a hospital (published: 128)"),
                "hidden": Setting(8, 1, 1024, does="width of both hidden layers (published: three of 150)"),
                "rate": Setting(0.01, 0, 10, does="the hypernetwork's learning rate"),
                "momentum": Setting(0.9, 0, 0.999, does="of its SGD"),
                "decay": Setting(0.001, 0, 1, does="of its weights and of the embeddings"),
            },
            private=True,
            beside="every hospital's own projections",
        ),
        Card(
            "flexfair",
            "federated averaging in which hospitals whose loss is above the mean count for more",
            _METHODS + "flexfair:FLEXFAIR",
            faith="adapted",
            cite="FlexFair: the authors' code, github.com/MaksimXing/FlexFair",
            differs="the other hospitals' losses are those of the last round, not of every batch",
            says=(Said("loss", 0, 1e6),),
            settings={"lambda": Setting(2.0, 0, 1000, does="weight of the variance of the hospitals' losses")},
            optimizer="sgd",
        ),
        Card(
            "frozen",
            "features of an encoder that nobody trains, as CLIP's, and a linear head, which alone is averaged",
            _METHODS + "frozen:FROZEN",
            faith="assumed",
            cite="Radford, A. et al. Learning transferable visual models from natural language supervision. "
            "ICML (2021)",
            needs=frozenset({Need.LABELS, Need.WEIGHTS}),
            private=True,
            plan_presets={"": {"augment": NO_CHANGE}},  # an image's features are then computed once
        ),
        Card(
            "harmofl",
            "images with one common amplitude spectrum, and descent to where the loss is flat",
            _METHODS + "harmofl:HARMOFL",
            fusion="mean",
            faith="adapted",
            cite="Jiang, M., Wang, Z., Dou, Q. HarmoFL: harmonizing local and global drifts in federated learning on "
            "heterogeneous medical images. AAAI (2022)",
            beside="amplitudes of images",
            settings={
                "alpha": Setting(0.05, 0, 10, does="how far from the weights the gradient is taken"),
                "box": Setting(
                    0.0,
                    0,
                    0.4,
                    does="half-width of the common low frequencies, as a share of the side; 0: the mean alone",
                ),
            },
        ),
        Card(
            "hsl",
            "HeteroSync Learning: a multi-gate mixture of experts that learns the hospital's own task beside one "
            "public anchor task, the same at every hospital",
            _METHODS + "hsl:HSL",
            fusion="mean",
            cite="Hu, H.-T., Li, M.-D., Lin, X.-X. et al. Addressing data heterogeneity in distributed medical imaging "
            "with heterosync learning. Nature Communications (online 24 October 2025)",
            differs="an image is scored beside the mean anchor embedding, not beside a random anchor image (`hsl-node "
            "evaluate --random-pairing` measures both). The authors' code, other than their text, uses AdamW, sends "
            "the epoch with the lowest training loss, never steps its cosine schedule, and begins with ImageNet's "
            "weights in both encoders (`backbone_weights`) and towers drawn Xavier-uniform (here as torch draws them)",
            needs=frozenset({Need.LABELS, Need.ANCHOR}),
            settings={
                "encoder": Setting(
                    "shared",
                    choices=("shared", "separate"),
                    does="shared: one for both tasks; separate: an encoder for each, as published",
                ),
                "embedding": Setting(
                    "softmax_scaled",
                    choices=("softmax_scaled", "layernorm", "softmax"),
                    does="how the features of both tasks' images are joined: softmax as published, which is flat; "
                    "softmax_scaled: that times the number of features, less 1; layernorm",
                ),
                "temperature": Setting(3.0, 0.01, 100, does="of that softmax"),
                "gate_temperature": Setting(1.0, 0.01, 100, does="of the softmax that weights the experts"),
                "anchor_weight": Setting(0.1, 0, 1000, does="how much the anchor loss counts beside the primary one"),
                "experts": Setting(12, 1, 256, does="small networks that both tasks share"),
                "anchor_every": Setting(1, 1, 1000, does="only each so-many-th batch has anchor images; 1: every one"),
                "preset": Setting(
                    "default",
                    choices=("default", "published"),
                    does="published: all settings as its authors have them; the plan's too, where it names none",
                ),
            },
            presets={
                "published": {
                    "encoder": "separate",
                    "embedding": "softmax",
                    "temperature": 3.0,
                    "gate_temperature": 1.0,
                    "anchor_weight": 1.0,
                    "experts": 12,
                    "anchor_every": 1,
                },
            },
            plan_presets={
                "published": {
                    "augment": NO_CHANGE,
                    "class_balance": "none",
                    "clip_norm": 0.0,
                    "epoch": "longest",
                    "norm": "batch",
                    "optimizer": "adam",
                    "recalibrate": False,
                    "schedule": "restarts",
                    "warmup_epochs": 0,
                },
            },
        ),
        Card(
            "local",
            "one classifier, never fused",
            _METHODS + "references:LOCAL",
            simulation_only="it never fuses, so there is nothing to exchange; for each hospital's model without the "
            "others: `hsl-node evaluate --alone`",
        ),
        Card(
            "metafed",
            "a ring in which each hospital learns from the one before it (parallel ring)",
            _METHODS + "metafed:METAFED",
            fusion="mean",
            faith="adapted",
            cite="Chen, Y. et al. MetaFed: federated learning among federations with cyclic knowledge distillation. "
            "IEEE Transactions on Neural Networks and Learning Systems (2023)",
            needs=frozenset({Need.LABELS, Need.FULL_SET}),
            says=(Said("able", 0, 1),),
            settings={
                "threshold": Setting(
                    0.6,
                    0,
                    1,
                    does="a hospital imitates, and keeps its own weights, once its validation score was above this",
                ),
                "strength": Setting(1.0, 0, 1000, does="weight of the imitation"),
                "hopeless": Setting(
                    0.5,
                    0,
                    1,
                    does="below this validation score the last model of the ring is not imitated in the last "
                    "round, unless it's better than the own one",
                ),
                "share_norms": Setting(True, does="weights that are taken over include those of normalisation layers"),
            },
        ),
        Card(
            "splitavg",
            "one network in two parts, whose cut is crossed in every batch",
            _METHODS + "references:SPLITAVG",
            faith="adapted",
            cite="Zhang, M. et al. SplitAVG: a heterogeneity-aware federated deep learning method for medical imaging. "
            "IEEE Journal of Biomedical and Health Informatics (2022)",
            plan_presets={"": {"augment": NO_CHANGE}},  # of a plan without `preset`
            simulation_only="it sends activations and labels in every batch, which is 642 GB for 2,000 images and 100 "
            "epochs, and patients' images in effect: hsl_node.study.splitavg compares with it",
        ),
        Card(
            "swarm",
            "swarm learning: one classifier, merged by every hospital for itself",
            _METHODS + "swarm:SWARM",
            fusion="mean",
            faith="adapted",
            cite="Warnat-Herresthal, S. et al. Swarm Learning for decentralized and confidential clinical machine "
            "learning. Nature 594 (2021)",
        ),
    )
}
_MORE: Mapping[str, Card] = {
    "metafed_ring": replace(
        CARDS["metafed"],
        name="metafed_ring",
        title="a ring in which one model goes round, from each hospital to the next",
        code=_METHODS + "metafed:METAFED_RING",
        simulation_only="its hospitals train one after the other, each in an exchange of its own: "
        'method = "metafed" is the ring that a federation can run',
    ),
    "personalised": replace(  # on the network of hsl, so with its settings
        CARDS["hsl"],
        name="personalised",
        title="HeteroSync Learning in which a hospital goes on from half its own model and half the others' mean",
        needs=CARDS["hsl"].needs | {Need.OWN},
        code=_METHODS + "personalised:PERSONALISED",
        settings={
            **CARDS["hsl"].settings,
            "own": Setting(0.5, 0.5, 1, does="share of the own model in what a hospital goes on from"),
        },
    ),
}
CARDS = dict(sorted({**CARDS, **_MORE}.items()))


def of_methods(known: Mapping[str, Card] = CARDS) -> dict[str, Setting]:
    """The settings of methods that a federation can agree on, of this package if no others are given, as `--set` names
    them."""
    cards = [card for card in known.values() if not card.simulation_only]
    return {f"{card.name}.{key}": setting for card in cards for key, setting in card.settings.items()}
