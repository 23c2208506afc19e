"""What each setting of the plan means, in words; its default and its limits are read off `plan.py`.

The same sentences as in docs/researcher/plan.md: a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hsl_node.federation.methods import CARDS

MEANING = {
    "method": (
        "hsl: HeteroSync Learning, with an anchor set; fedavg: plain averaging, without one; all others, and "
        "what each needs, are listed by hsl-node federation plan. (local, never fused, is a reference for "
        "comparisons: the daemon refuses it)"
    ),
    "task": ("what it is, for people"),
    "classes": (
        "names of the classes; their order is the label 0, 1, ... Of two the second is the positive one: AUC "
        "and sensitivity are about it. 2 to 100 of them"
    ),
    "rounds": (
        "how many times models are fused, at most: a run ends before when all hospitals have their plateau "
        "(plateau_rounds)"
    ),
    "epochs_per_round": (
        "passes over the images between two fusions. With an anchor set beside them the smaller of the two is"
        " repeated (epoch)"
    ),
    "epoch": (
        "longest: where there is an anchor set, a pass over the larger of it and the hospital's training "
        "images; own: always over the hospital's images"
    ),
    "seed": ("of splits, initial weights and all drawing in training"),
    "image_size": ("pixels, square; the anchor set's too. 16 to 1024"),
    "batch_size": (
        "images in a batch; as many anchor images are paired with them. A machine with little memory computes"
        " a batch in parts (train.micro_batch in its node.toml)"
    ),
    "class_balance": (
        "weights: in the loss a class counts the more the rarer it is at this hospital; sampler: a rarer "
        "class is drawn more often; none: as it is"
    ),
    "backbone": (
        "the network's trunk: resnet18, resnet34, resnet50, efficientnet_lite0, vit_tiny; tiny for trials; "
        "torchvision:NAME and timm:NAME: a model of that package, which then must be installed everywhere"
    ),
    "backbone_weights": (
        "sha256 of a local weight file that all start from (train.backbone_weights in each node.toml), as "
        "torchvision saves it; none: random"
    ),
    "norm": (
        "batch: BatchNorm, as the trunk was published; group: GroupNorm in its place, which keeps no "
        "statistics of a hospital's images"
    ),
    "recalibrate": (
        "a fused model is also tried with the BatchNorm statistics of the hospital's own training images, and"
        " taken so where that is better; what travels stays the same"
    ),
    "optimizer": ("adam, adamw (weight decay apart from the gradient) or sgd; some methods are true of sgd alone"),
    "momentum": ("that of sgd"),
    "learning_rate": ("the highest: at the beginning of each cycle, or of the run"),
    "learning_rate_min": ("at its end"),
    "schedule": (
        "restarts: cycles of cosine_period_epochs; cosine_run: one fall over the planned run, an equal share "
        "of it in each round"
    ),
    "cosine_period_epochs": ("length of a cycle of schedule = restarts, in epochs"),
    "warmup_epochs": ("of the run's beginning, in which the rate rises from nearly 0"),
    "weight_decay": ("how strongly weights are drawn to 0"),
    "clip_norm": ("a gradient longer than this is shortened to it; 0: none is"),
    "optimizer_state": ("keep: the optimiser's moments go on across a fusion; reset: they begin anew each round"),
    "precision": ("auto: bfloat16 where it pays; or float32, bfloat16"),
    "fusion": ("how checkpoints become one: below; none: as the method's authors do"),
    "patience_epochs": ("so many epochs without a better validation AUC end a round early"),
    "plateau_rounds": (
        "a hospital has its plateau when the best model of its last so many rounds (own, fused or "
        "recalibrated, by validation AUC) is no gain on the best before them; when all have, the run ends"
    ),
    "plateau_improvement": ("what counts as gain, relative to the best AUC before"),
    "split_percent": ("train, validation, test"),
    "fit": (
        "how an image that is not square becomes one: squeeze as in the paper, pad keeps its shape, with "
        "black beside it"
    ),
    "frame": ("which frame, or page, of a file with several is taken: middle or first"),
    "silence_alarm_minutes": ("a peer without a sign of life for so long becomes an alarm"),
    "augment.flip": (
        "training images are mirrored left and right at random; each epoch draws anew, and nothing else than "
        "training sees it"
    ),
    "augment.flip_upright": ("also upside down; in ultrasound and X-ray up is up"),
    "augment.shift": ("moved by up to this share of the side; what comes into the picture is black"),
    "augment.zoom": ("larger or smaller by up to this share"),
    "augment.turn": ("turned by up to so many degrees either way"),
    "augment.brightness": ("lighter or darker by up to this share of each pixel; black stays black"),
    "augment.contrast": ("stronger or weaker in contrast by up to this share, about the image's mean"),
}


def defaults() -> dict[str, str]:
    """As they stand in a TOML file; "none" where there is none."""
    from hsl_node.federation.plan import Plan  # loads slowly, and the help wants the keys alone

    content = Plan().model_dump(mode="json")
    del content[Plan().method]
    return {key: word(value) for key, value in flat(content)}


def limits() -> dict[str, str]:
    """The values that are allowed: a range, or the words to choose from; "" where the meaning says it."""
    from hsl_node.federation.plan import Augment, Plan

    schemas = Plan.model_json_schema()["properties"]
    del schemas["settings"]
    augment = Augment.model_json_schema()["properties"]
    schemas |= {f"augment.{key}": schema for key, schema in augment.items()}
    found = {key: _limit(schema) for key, schema in schemas.items() if key != "augment"}
    return found | {"method": " | ".join(name for name, card in CARDS.items() if not card.simulation_only)}


def flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting by the key that `--set` gives it."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def word(value: object) -> str:
    """A value as people write it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _limit(schema: dict[str, Any]) -> str:
    if schema.get("type") == "boolean":
        return "true | false"
    if isinstance(words := schema.get("enum"), list):
        return " | ".join(map(str, words))
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if isinstance(below, int) and high is None:
        high = below - 1
    if low is None or (high is None and below is None):
        return ""
    return f"{'above ' * ('exclusiveMinimum' in schema)}{low} to " + (
        f"{high}" if below is None or high else f"below {below}"
    )
