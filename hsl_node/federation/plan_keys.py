"""What each setting of the plan means, in words; its default and its limits are read off `plan.py`.

The same sentences as in docs/researcher/plan.md: a test compares.
"""

from __future__ import annotations

from typing import Any

MEANING = {
    "method": (
        "hsl: HeteroSync Learning, with an anchor set. fedavg: one plain classifier, no anchor set. (local, "
        "never fused, is a reference for comparisons: the daemon refuses it)"
    ),
    "task": ("what it is, for people"),
    "classes": (
        "names of the classes; their order is the label 0, 1, ... Of two the second is the positive one: AUC "
        "and sensitivity are about it. 2 to 100 of them"
    ),
    "rounds": (
        "how many times models are fused, at most: a run ends before when all hospitals have their plateau "
        "(plateau_rounds); 60 rounds have ended at 11"
    ),
    "epochs_per_round": (
        "passes over the images between two fusions. With hsl an epoch is a pass over the larger of the "
        "hospital's training images and the anchor set; the smaller one is repeated"
    ),
    "seed": ("of splits, initial weights and all drawing in training"),
    "image_size": ("pixels, square; the anchor set's too. 16 to 1024"),
    "batch_size": ("images in a batch; as many anchor images are paired with them"),
    "backbone": ("the network's trunk: resnet18, resnet34, resnet50; tiny for trials"),
    "backbone_weights": (
        "sha256 of a local weight file that all start from (train.backbone_weights in each node.toml), as "
        "torchvision saves it; none: random"
    ),
    "encoder": ("separate: an encoder for each task; shared: one for both"),
    "embedding": ("how the two encoders' features are joined: softmax as published, or layernorm"),
    "temperature": ("of that softmax"),
    "experts": ("small networks that both tasks share"),
    "learning_rate": ("at the beginning of each cycle"),
    "learning_rate_min": ("at its end"),
    "cosine_period_epochs": ("length of a cycle, in epochs"),
    "weight_decay": ("Adam's"),
    "optimizer_state": ("keep: Adam's moments go on across a fusion; reset: they begin anew each round"),
    "precision": ("auto: bfloat16 where it pays; or float32, bfloat16"),
    "fusion": ("how checkpoints become one: below"),
    "patience_epochs": ("so many epochs without a better validation AUC end a round early"),
    "plateau_rounds": (
        "a hospital has its plateau after so many rounds without gain in validation AUC of its trained model;"
        " when all have, the run ends"
    ),
    "plateau_improvement": ("what counts as gain, relative to the best AUC before"),
    "split_percent": ("train, validation, test"),
    "fit": (
        "how an image that is not square becomes one: squeeze as in the paper, pad keeps its shape, with "
        "black beside it"
    ),
    "frame": ("which frame, or page, of a file with several is taken: middle or first"),
    "silence_alarm_minutes": ("a peer without a sign of life for so long becomes an alarm"),
}


def defaults() -> dict[str, str]:
    """As they stand in a TOML file; "none" where there is none."""
    from hsl_node.federation.plan import Plan  # loads slowly, and the help wants the keys alone

    return {key: _word(value) for key, value in Plan().model_dump(mode="json").items()}


def limits() -> dict[str, str]:
    """The values that are allowed: a range, or the words to choose from; "" where the meaning says it."""
    from hsl_node.federation.plan import Plan

    return {key: _limit(schema) for key, schema in Plan.model_json_schema()["properties"].items()}


def _word(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _limit(schema: dict[str, Any]) -> str:
    if isinstance(words := schema.get("enum"), list):
        return " | ".join(map(str, words))
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum", 0) - 1 if "exclusiveMaximum" in schema else None)
    return "" if low is None or high is None else f"{'above ' * ('exclusiveMinimum' in schema)}{low} to {high}"
