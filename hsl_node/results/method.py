"""What was done, in the sentences that a paper's methods section needs; and whom to cite."""

from __future__ import annotations

from collections.abc import Sequence

from hsl_node import __version__
from hsl_node.federation.config import Federation
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import FAITH, Need
from hsl_node.federation.plan import Augment, Plan, has_attention

FITS = {"squeeze": "squeezed to a square", "pad": "padded to a square"}
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}
BALANCES = {
    "none": "classes are not weighted",
    "weights": "a class weighs the more the rarer it is at the hospital",
    "sampler": "images of rarer classes are drawn more often",
}


def sentences(federation: Federation, terms: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(what, how), in the order of a methods section. terms: of the loss, as training named them."""
    plan, anchor = federation.plan, federation.anchor
    score, differ = plan.card.score_name, differences(plan)
    found = [
        ("method", f"{plan.card.title}; trunk {plan.backbone}{_norm(plan)}, {plan.image_size} × {plan.image_size} px"),
        ("compared with its publication", FAITH[plan.card.faith] + (", but for what is named below" if differ else "")),
        ("the method's settings", ", ".join(f"{key} {_value(value)}" for key, value in plan.settings.items())),
        ("first weights", _first_weights(plan)),
        ("anchor set", f"{anchor.name}, {anchor.images} images, the same file at every hospital" if anchor else ""),
        ("split", _split(plan)),
        ("loss", _loss(plan, terms)),
        ("optimiser", _optimizer(plan)),
        (
            "images",
            f"{FITS[plan.fit]}, {_augmented(plan.augment)}; scaled by {_scale(plan)} mean and deviation per channel",
        ),
        (
            "rounds",
            f"{plan.rounds} planned, of {plan.epochs_per_round} local epochs each{_epoch(plan)}"
            f"{_patience(plan, score)}; the epoch with the "
            f"best validation {score} goes into the fusion ({plan.rule}: {FUSION_RULES[plan.rule].does}); all "
            "hospitals take part in every round. The run ends early when no hospital gained "
            f"{plan.plateau_improvement:.1%} in validation {score} for {plan.plateau_rounds} rounds",
        ),
        ("which model", _chosen(plan, score)),
        ("other than published", differ),
    ]
    return [(what, how) for what, how in found if how]


def differences(plan: Plan) -> str:
    """From the publication, where the numbers could be compared with its own."""
    card = plan.card
    rule = [f"fused by {plan.rule}; its authors fuse by {card.fusion}"] if plan.rule != card.fusion else []
    return "; ".join([*rule, *from_preset(plan), *([card.differs] if card.differs else [])])


def from_preset(plan: Plan) -> list[str]:
    """What the method's `preset = "published"` has otherwise: of its own settings, and of the plan's."""
    card, of_plan = plan.card, plan.model_dump()
    pairs = [(key, plan.settings[key], value) for key, value in card.presets.get("published", {}).items()]
    pairs += [(key, of_plan[key], value) for key, value in card.plan_presets.get("published", {}).items()]
    return [
        "images altered in training, published as they are"
        if key == "augment"
        else f"{key} {_value(here)}, published {_value(there)}"
        for key, here, there in pairs
        if here != there
    ]


def citations(plan: Plan) -> list[str]:
    return [*([plan.card.cite] if plan.card.cite else []), f"hsl-node {__version__}"]


def _value(value: object) -> str:
    return (
        ("on" if value else "off")
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _norm(plan: Plan) -> str:
    return " with GroupNorm in place of BatchNorm" if plan.norm == "group" else ""


def _first_weights(plan: Plan) -> str:
    if plan.backbone_weights is None:
        return f"random, from seed {plan.seed}"
    return f"trunk from a weight file (sha256 {plan.backbone_weights[:12]}), the rest random, from seed {plan.seed}"


def _split(plan: Plan) -> str:
    train, validation, test = plan.split_percent
    return (
        f"{train} / {validation} / {test} % train, validation, test by label, unless a table fixes it; "
        f"images of one known patient on one side; seed {plan.seed}"
    )


def _loss(plan: Plan, terms: Sequence[str]) -> str:
    kind = "binary cross-entropy" if len(plan.classes) == 2 else "cross-entropy"
    anchor = ""
    if (weight := plan.settings.get("anchor_weight")) is not None:  # fedktl has an anchor set and no such term
        times = "that" if weight == 1 else f"{weight:g} times that"
        every = plan.settings.get("anchor_every", 1)
        anchor = f", plus {times} of as many anchor images" + ("" if every == 1 else f", in each batch of {every}")
    own = ", ".join(name for name in terms if name not in ("primary", "anchor"))
    more = f", plus the method's own: {own}" if own else ""
    return f"{kind}{anchor}{more}; {BALANCES[plan.class_balance]}"


def _scale(plan: Plan) -> str:
    return "its trunk's own" if plan.backbone.startswith("timm:") else "ImageNet's"


def _optimizer(plan: Plan) -> str:
    momentum = f", momentum {plan.momentum:g}" if plan.momentum else ""
    anew = ", begun anew in each round" if plan.optimizer_state == "reset" else ""
    clipped = f", gradients clipped to a norm of {plan.clip_norm:g}" if plan.clip_norm else ""
    falls = f"every {plan.cosine_period_epochs} epochs" if plan.schedule == "restarts" else "once over the run"
    warm = f", after a rise over the first {plan.warmup_epochs} epochs" if plan.warmup_epochs else ""
    return (
        f"{OPTIMIZERS[plan.optimizer]}{momentum}{anew}, batches of {plan.batch_size}, "
        f"weight decay {plan.weight_decay:g}{clipped}, "
        f"learning rate by cosine from {plan.learning_rate:g} to {plan.learning_rate_min:g} {falls}{warm}"
    )


def _augmented(augment: Augment) -> str:
    how = [
        *(["mirrored left and right"] if augment.flip else []),
        *(["mirrored up and down"] if augment.flip_upright else []),
        *([f"turned by up to {augment.turn:g} degrees"] if augment.turn else []),
        *(
            f"{what} changed by up to {getattr(augment, key):.0%}"
            for key, what in (
                ("shift", "place"),
                ("zoom", "size"),
                ("brightness", "brightness"),
                ("contrast", "contrast"),
            )
            if getattr(augment, key)
        ),
    ]
    return f"in training at random {', '.join(how)}" if how else "not augmented"


def _epoch(plan: Plan) -> str:
    if teacher := plan.settings.get("teacher_epochs"):
        return f", after a first of {teacher}, of the teacher alone"
    if Need.ANCHOR not in plan.card.needs:
        return ""
    own = "a pass over the hospital's own images"
    return f" ({own if plan.epoch == 'own' else 'a pass over the larger of own images and anchor set'})"


def _patience(plan: Plan, score: str) -> str:
    if plan.patience_epochs >= plan.epochs_per_round:
        return ""
    return f", fewer where {plan.patience_epochs} have brought no better validation {score}"


def _chosen(plan: Plan, score: str) -> str:
    kept = plan.norm == "batch" and not has_attention(plan.backbone) and Need.WEIGHTS not in plan.card.needs
    again = ", the same with BatchNorm statistics of the hospital's own training images"
    again = again if plan.recalibrate and kept else ""  # else there are no statistics to measure
    return (
        f"of the fused models{again}, and the hospital's own after their local epochs: that with the best validation "
        f"{score} at the hospital; a threshold, where there is one, from validation images too. No test image chose "
        "anything"
    )
