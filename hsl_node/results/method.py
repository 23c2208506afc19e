"""What was done, in the sentences that a paper's methods section needs; and whom to cite."""

from __future__ import annotations

from hsl_node import __version__
from hsl_node.federation.config import Federation
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import SCORE_NAMES, Need
from hsl_node.federation.plan import Augment, Plan

FITS = {"squeeze": "squeezed to a square", "pad": "padded to a square"}
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}
BALANCES = {
    "none": "classes are not weighted",
    "weights": "a class weighs the more the rarer it is at the hospital",
    "sampler": "images of rarer classes are drawn more often",
}


def sentences(federation: Federation) -> list[tuple[str, str]]:
    """(what, how), in the order of a methods section."""
    plan, anchor = federation.plan, federation.anchor
    score = SCORE_NAMES[plan.card.task]
    found = [
        ("method", f"{plan.card.title}; trunk {plan.backbone}{_norm(plan)}, {plan.image_size} × {plan.image_size} px"),
        ("the method's settings", ", ".join(f"{key} {_value(value)}" for key, value in plan.settings.items())),
        ("first weights", _first_weights(plan)),
        ("anchor set", f"{anchor.name}, {anchor.images} images, the same file at every hospital" if anchor else ""),
        ("split", _split(plan)),
        ("loss", _loss(plan)),
        ("optimiser", _optimizer(plan)),
        (
            "images",
            f"{FITS[plan.fit]}, {_augmented(plan.augment)}; scaled by ImageNet's mean and deviation per channel",
        ),
        (
            "rounds",
            f"{plan.rounds} planned, of {plan.epochs_per_round} local epochs each{_epoch(plan)}; the epoch with the "
            f"best validation {score} goes into the fusion ({plan.rule}: {FUSION_RULES[plan.rule].does}); all "
            "hospitals take part in every round. The run ends early when no hospital gained "
            f"{plan.plateau_improvement:.1%} in validation {score} for {plan.plateau_rounds} rounds",
        ),
        ("which model", _chosen(plan, score)),
        ("other than published", differences(plan)),
    ]
    return [(what, how) for what, how in found if how]


def differences(plan: Plan) -> str:
    """From the publication, where the numbers could be compared with its own."""
    card = plan.card
    published = card.presets.get("published", {})
    changed = [
        f"{key} {_value(plan.settings[key])}, published {_value(value)}"
        for key, value in published.items()
        if plan.settings[key] != value
    ]
    rule = [f"fused by {plan.rule}; its authors fuse by {card.fusion}"] if plan.rule != card.fusion else []
    return "; ".join([*rule, *changed, *([card.differs] if card.differs else [])])


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


def _loss(plan: Plan) -> str:
    kind = "binary cross-entropy" if len(plan.classes) == 2 else "cross-entropy"
    anchor = ", plus that of as many anchor images" if Need.ANCHOR in plan.card.needs else ""
    return f"{kind}{anchor}; {BALANCES[plan.class_balance]}"


def _optimizer(plan: Plan) -> str:
    momentum = f", momentum {plan.momentum:g}" if plan.momentum else ""
    clipped = f", gradients clipped to a norm of {plan.clip_norm:g}" if plan.clip_norm else ""
    falls = f"every {plan.cosine_period_epochs} epochs" if plan.schedule == "restarts" else "once over the run"
    warm = f", after a rise over the first {plan.warmup_epochs} epochs" if plan.warmup_epochs else ""
    return (
        f"{OPTIMIZERS[plan.optimizer]}{momentum}, batches of {plan.batch_size}, weight decay {plan.weight_decay:g}"
        f"{clipped}, learning rate by cosine from {plan.learning_rate:g} to {plan.learning_rate_min:g} {falls}{warm}"
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
    if Need.ANCHOR not in plan.card.needs:
        return ""
    own = "a pass over the hospital's own images"
    return f" ({own if plan.epoch == 'own' else 'a pass over the larger of own images and anchor set'})"


def _chosen(plan: Plan, score: str) -> str:
    again = ", the same with BatchNorm statistics of the hospital's own training images" if plan.recalibrate else ""
    return (
        f"of the fused models{again}, and the hospital's own after their local epochs: that with the best validation "
        f"{score} at the hospital; a threshold, where there is one, from validation images too. No test image chose "
        "anything"
    )
