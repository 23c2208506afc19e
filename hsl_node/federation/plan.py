"""What all peers agreed to train. Defaults are the published HSL form."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from hsl_node.errors import UsageError
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.strings import Frozen, Name, Sha256
from hsl_node.federation.toml_file import parse, read_text, validate


def _fusion(name: str) -> str:
    if name not in FUSION_RULES:
        raise ValueError(f"{name!r} is no fusion rule: one of {', '.join(FUSION_RULES)}")
    return name


FusionName = Annotated[str, AfterValidator(_fusion)]


class Plan(Frozen):
    """What all peers agreed to train. Defaults are the published form of HeteroSync Learning."""

    method: Literal["hsl", "fedavg", "local"] = "hsl"
    task: Name = "primary task"
    classes: tuple[Name, ...] = Field(("negative", "positive"), min_length=2, max_length=100)  # order = label
    rounds: int = Field(20, ge=1, le=10_000)
    epochs_per_round: int = Field(5, ge=1, le=1000)
    seed: int = Field(1, ge=0, lt=2**31)
    image_size: int = Field(224, ge=16, le=1024)  # px, square
    batch_size: int = Field(32, ge=2, le=4096)  # primary images; as many anchor images are paired with them

    backbone: Literal["resnet18", "resnet34", "resnet50", "tiny"] = "resnet18"
    backbone_weights: Sha256 | None = None  # of a local weight file that all peers start from; None: random
    encoder: Literal["separate", "shared"] = "separate"
    embedding: Literal["softmax", "layernorm"] = "softmax"
    temperature: float = Field(3.0, gt=0, le=100)
    experts: int = Field(12, ge=1, le=256)

    learning_rate: float = Field(1e-3, gt=0, le=1)
    learning_rate_min: float = Field(1e-4, ge=0, le=1)
    cosine_period_epochs: int = Field(10, ge=1, le=10_000)
    weight_decay: float = Field(1e-4, ge=0, le=1)
    optimizer_state: Literal["keep", "reset"] = "keep"  # Adam's moments across a fusion
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where it pays

    fusion: FusionName = "mean"
    patience_epochs: int = Field(5, ge=1, le=10_000)  # local epochs without a better AUC end a round early
    plateau_rounds: int = Field(3, ge=1, le=10_000)
    plateau_improvement: float = Field(0.005, ge=0, le=1)  # relative
    split_percent: tuple[int, int, int] = (60, 10, 30)  # train, validation, test

    fit: Literal["squeeze", "pad"] = "squeeze"  # how an image that is not square becomes one; the paper squeezes
    frame: Literal["middle", "first"] = "middle"  # which frame of a file that holds several
    silence_alarm_minutes: int = Field(60, ge=1, le=100_000)  # a peer that gave no sign of life for so long: an alarm

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if sum(self.split_percent) != 100 or min(self.split_percent) < 1:
            raise ValueError("split_percent: three positive numbers that add up to 100")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a class is named twice")
        if self.learning_rate_min > self.learning_rate:
            raise ValueError("learning_rate_min: larger than learning_rate")
        return self


# Settings that came after the first released form: an earlier version trains as their defaults say and knows them not,
# so a default is left out of what is agreed by digest. Such a run goes on through an upgrade. New settings go here.
ADDED_LATER = ("fit", "frame", "silence_alarm_minutes")


def agreed(plan: Plan) -> dict[str, Any]:
    """The plan as it goes into the federation's digest."""
    content = plan.model_dump(mode="json")
    defaults = Plan().model_dump(mode="json")
    return {key: v for key, v in content.items() if key not in ADDED_LATER or v != defaults[key]}


def load_plan(path: Path | None, settings: Sequence[str] = ()) -> Plan:
    """A plan file (none: the defaults), then `key=value` settings: TOML values, bare words, or lists as `a,b`."""
    source = path or Path("--set")
    text = read_text(path) if path else ""
    raw: dict[str, Any] = parse(source, text)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting!r} is not of the form key=value", remedy="e.g. --set rounds=10")
        raw[key.strip()] = _value(key.strip(), value.strip())
    return validate(source, text, raw, Plan)


def _value(key: str, text: str) -> Any:
    """Of the command line: as in TOML, or a list as `benign,malignant`, where a name may be a number."""
    if key == "classes" and not text.startswith("["):
        return [part.strip() for part in text.split(",")]
    return text if "," in text and key != "split_percent" and text[:1] not in "[\"'" else _setting(text)


def _setting(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # TOMLDecodeError, or a number of 5000 digits; nested too deeply
        return [_setting(part.strip()) for part in text.split(",")] if "," in text else text
