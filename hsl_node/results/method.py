"""What was done, in the sentences that a paper's methods section needs; and whom to cite."""

from __future__ import annotations

from hsl_node import __version__
from hsl_node.federation.config import Federation
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.plan import Plan

METHODS = {
    "hsl": "HeteroSync Learning: a multi-gate mixture of experts that learns the hospital's own task beside one public "
    "anchor task, the same at every hospital",
    "fedavg": "federated averaging of one classifier, without an anchor task",
    "local": "one classifier, never fused",
}
FITS = {"squeeze": "squeezed to a square", "pad": "padded to a square"}
CITATION = {
    "hsl": "Hu, H.-T., Li, M.-D., Lin, X.-X. et al. Addressing data heterogeneity in distributed medical imaging with "
    "heterosync learning. Published online 24 October 2025",
    "fedavg": "McMahan, B. et al. Communication-efficient learning of "
    "deep networks from decentralized data. AISTATS (2017)",
}


def sentences(federation: Federation) -> list[tuple[str, str]]:
    """(what, how), in the order of a methods section."""
    plan = federation.plan
    anchor = federation.anchor
    return [
        ("method", f"{METHODS[plan.method]}; trunk {plan.backbone}, {plan.image_size} × {plan.image_size} px"),
        ("first weights", _first_weights(plan)),
        *(
            [("anchor set", f"{anchor.name}, {anchor.images} images, the same file at every hospital")]
            if anchor
            else []
        ),
        ("split", _split(plan)),
        ("loss", _loss(plan)),
        (
            "optimiser",
            f"Adam, batches of {plan.batch_size}, weight decay {plan.weight_decay:g}, learning rate by cosine from "
            f"{plan.learning_rate:g} to {plan.learning_rate_min:g} every {plan.cosine_period_epochs} epochs",
        ),
        ("images", f"{FITS[plan.fit]}, not augmented; scaled by ImageNet's mean and deviation per channel"),
        (
            "rounds",
            f"{plan.rounds} planned, of {plan.epochs_per_round} local epochs each; the epoch with the best validation "
            f"AUC goes into the fusion ({plan.rule}: {FUSION_RULES[plan.rule].does}); all hospitals take part in "
            f"every round. The run ends early when no hospital gained {plan.plateau_improvement:.1%} in validation AUC "
            f"for {plan.plateau_rounds} rounds",
        ),
        (
            "which model",
            "the fused model of the round with the best validation AUC at the hospital; a threshold, where there is "
            "one, from validation images too. No test image chose anything",
        ),
        *([("other than published", differences(plan))] if differences(plan) else []),
    ]


def differences(plan: Plan) -> str:
    """From the publication, where the numbers could be compared with its own."""
    if plan.method != "hsl":
        return ""
    return (
        "an image is scored beside the mean anchor embedding, not beside a random anchor image (`hsl-node evaluate "
        "--random-pairing` measures both). The authors' code, other than their text, uses AdamW, sends the epoch with "
        "the lowest training loss, and never steps its cosine schedule"
    )


def citations(plan: Plan) -> list[str]:
    return [*([CITATION[plan.method]] if plan.method in CITATION else []), f"hsl-node {__version__}"]


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
    anchor = ", plus that of as many anchor images, 1:1" if plan.method == "hsl" else ""
    return f"{kind}{anchor}; classes are not weighted"
