"""What all peers agreed to train, and what cannot be right together. A method's settings are its card's."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from hsl_node.errors import UsageError, escaped
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import NO_CHANGE, Card, Need, card_of, nearest
from hsl_node.federation.strings import Frozen, Name, Sha256
from hsl_node.federation.toml_file import parse, read_text, validate


def _fusion(name: str) -> str:
    if name not in FUSION_RULES:
        known = ", ".join(FUSION_RULES)
        raise ValueError(f"'{escaped(name, 60)}' is no fusion rule{nearest(name, FUSION_RULES)}; one of {known}")
    return name


def _backbone(name: str) -> str:
    package, _, model = name.partition(":")
    if name not in BACKBONES and not (package in LIBRARIES and re.fullmatch(r"[a-z0-9_.]{1,100}", model, re.ASCII)):
        known = ", ".join([*BACKBONES, *(f"{library}:NAME" for library in LIBRARIES)])
        raise ValueError(f"'{escaped(name, 60)}' is no backbone{nearest(name, [*BACKBONES])}; one of {known}")
    return name


BACKBONES = ("resnet18", "resnet34", "resnet50", "tiny", "efficientnet_lite0", "vit_tiny")
LIBRARIES = ("torchvision", "timm")  # `timm:NAME` is that package's model of that name
FusionName = Annotated[str, AfterValidator(_fusion)]
MethodName = Annotated[str, AfterValidator(lambda name: card_of(name).name)]


class Augment(Frozen):
    """How training images are altered, anew in every epoch; all 0: not at all. Why these: docs/decisions, 0080."""

    flip: bool = True  # left and right
    flip_upright: bool = False  # up and down
    shift: float = Field(0.1, ge=0, le=0.5)  # of the side, at most
    zoom: float = Field(0.15, ge=0, le=0.5)  # in or out, at most
    turn: float = Field(15.0, ge=0, le=180)  # degrees either way, at most
    brightness: float = Field(0.2, ge=0, le=1)  # of the range, at most
    contrast: float = Field(0.2, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _table(cls, raw: Any) -> Any:
        """`augment = false` is what people try first."""
        if isinstance(raw, Mapping | cls):
            return raw
        raise ValueError(f"a table of settings is expected; to alter no image: {NO_AUGMENT}")


UNALTERED = Augment.model_validate(NO_CHANGE)
NO_AUGMENT = f"augment = {{ {', '.join(f'{key} = {str(value).lower()}' for key, value in NO_CHANGE.items())} }}"


class Plan(Frozen):
    """What all peers agreed to train. The published HSL is `[plan.hsl] preset = "published"`, not these defaults."""

    method: MethodName = "hsl"
    task: Name = "primary task"
    classes: tuple[Name, ...] = Field(("negative", "positive"), min_length=2, max_length=100)  # order = label
    rounds: int = Field(20, ge=1, le=10_000)
    epochs_per_round: int = Field(5, ge=1, le=1000)
    epoch: Literal["longest", "own"] = "longest"  # an epoch is a pass over the larger of own and anchor set, or the own
    seed: int = Field(1, ge=0, lt=2**31)
    image_size: int = Field(224, ge=16, le=1024)  # px, square
    batch_size: int = Field(32, ge=2, le=4096)  # primary images; as many anchor images are paired with them
    class_balance: Literal["none", "weights", "sampler"] = "none"

    backbone: Annotated[str, AfterValidator(_backbone)] = "resnet18"
    backbone_weights: Sha256 | None = None  # of a local weight file that all peers start from; None: random
    norm: Literal["batch", "group"] = "batch"
    recalibrate: bool = True  # BatchNorm statistics of a fused model are measured anew, of own training images

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = Field(0.0, ge=0, lt=1)  # SGD's
    learning_rate: float = Field(1e-3, gt=0, le=1)
    learning_rate_min: float = Field(1e-4, ge=0, le=1)
    schedule: Literal["restarts", "cosine_run"] = "cosine_run"  # cycles, or one fall over the whole run
    cosine_period_epochs: int = Field(10, ge=1, le=10_000)
    warmup_epochs: int = Field(0, ge=0, le=10_000)  # of the run: from nearly 0 to learning_rate
    weight_decay: float = Field(1e-4, ge=0, le=1)
    clip_norm: float = Field(0.0, ge=0, le=1e6)  # of the gradient; 0: not clipped
    optimizer_state: Literal["keep", "reset"] = "keep"  # the optimiser's moments across a fusion
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where it pays

    fusion: FusionName | None = None  # None: the rule of the method's authors
    patience_epochs: int = Field(5, ge=1, le=10_000)  # local epochs without a better score end a round early
    plateau_rounds: int = Field(3, ge=1, le=10_000)
    plateau_improvement: float = Field(0.005, ge=0, le=1)  # relative
    split_percent: tuple[int, int, int] = (60, 10, 30)  # train, validation, test

    fit: Literal["squeeze", "pad"] = "squeeze"  # how an image that is not square becomes one; the paper squeezes
    frame: Literal["middle", "first"] = "middle"  # which frame of a file that holds several
    silence_alarm_minutes: int = Field(60, ge=1, le=100_000)  # a peer that gave no sign of life for so long: an alarm
    augment: Augment = Augment()
    settings: Mapping[str, Any] = Field(default_factory=dict)  # the method's; in a file its own table, [plan.fedprox]

    @property
    def card(self) -> Card:
        return card_of(self.method)

    @property
    def rule(self) -> str:
        """The fusion rule in force, a name of FUSION_RULES."""
        return self.fusion or self.card.fusion

    @property
    def fusion_clip(self) -> float:
        """How far the rule `come` moves a number at most, by the method's setting; 0: as far as it will."""
        return float(self.settings.get("clip", 0.0)) if self.rule == "come" else 0.0

    @model_validator(mode="wrap")
    @classmethod
    def _with_settings(cls, raw: Any, handler: ModelWrapValidatorHandler[Plan]) -> Plan:
        """The method's table becomes `settings`; what is wrong in it is told together with all else."""
        if not isinstance(raw, Mapping):
            return handler(raw)
        content, found = dict(raw), list[InitErrorDetails]()
        card = _find_card(content.get("method", cls.model_fields["method"].default))
        given = content.pop("settings", {})
        if not isinstance(given, Mapping):
            found.append(problem_at(("settings",), "a table of the method's settings is expected"))
            given = {}
        for name in [key for key in raw if key not in cls.model_fields and _find_card(key)]:
            table = content.pop(name)
            if not isinstance(table, Mapping):
                found.append(problem_at((name,), "a table of the method's settings is expected"))
            elif card is not None and name != card.name:
                words = (
                    f'settings of {name}, but the plan has method = "{card.name}": leave them out, or method = "{name}"'
                )
                found.append(problem_at((name,), words))
            else:
                given = {**given, **table}
        if card is not None:
            wrong = list(card.problems(given))
            found += [problem_at((card.name, key), words) for key, words in wrong]
            for key, usual in card.plan_presets.get(str(given.get("preset", "")), {}).items():
                named = content.get(key, usual)
                both = isinstance(usual, Mapping) and isinstance(named, Mapping)
                content[key] = {**usual, **named} if both else named
            content["settings"] = {} if wrong else card.settle(given)
        try:
            plan = handler(content)
            found += [problem_at((key,), words) for key, words in _contradictions(plan)]
        except ValidationError as exc:
            found += [
                InitErrorDetails(type=e["type"], loc=e["loc"], input=e["input"], ctx=e.get("ctx", {}))
                for e in exc.errors()
            ]
            wrong_keys = {str(e["loc"][0]) for e in exc.errors()}
            meant = {near for key in wrong_keys for near in get_close_matches(key, cls.model_fields, n=1)}
            rest = handler({key: value for key, value in content.items() if key not in wrong_keys})
            found += [problem_at((key,), words) for key, words in _contradictions(rest, wrong_keys | meant)]
        if found:
            raise ValidationError.from_exception_data("Plan", found)
        return plan

    @model_serializer(mode="wrap")
    def _with_table(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        settings = content.pop("settings", None)
        return {**content, self.method: settings} if settings else content


def _find_card(name: object) -> Card | None:
    try:
        return card_of(name) if isinstance(name, str) else None
    except ValueError:
        return None


def problem_at(where: tuple[str, ...], words: str) -> InitErrorDetails:
    """A problem of a setting, in words, for `ValidationError.from_exception_data`: all of a file are told at once."""
    return InitErrorDetails(type="value_error", loc=where, input=None, ctx={"error": ValueError(words)})


def has_attention(backbone: str) -> bool:
    return bool(re.search(r"(^|[:_.])(vit|deit|swin)", backbone))


def _contradictions(plan: Plan, wrong: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Settings that are right alone and not together, and what the method needs of them: (key, in words). Nothing is
    said of what hangs on the `wrong` ones."""
    for keys, words in _found(plan):
        if not set(keys.split()) & set(wrong):
            yield keys.split()[0], words


def _found(p: Plan) -> Iterator[tuple[str, str]]:
    """(the settings that it hangs on, the one to tell it at first; in words)."""
    card, rule = p.card, FUSION_RULES[p.rule]
    if sum(p.split_percent) != 100 or min(p.split_percent) < 1:
        yield "split_percent", "three positive numbers that add up to 100"
    if len(set(p.classes)) != len(p.classes):
        yield "classes", "a class is named twice"
    if p.learning_rate_min > p.learning_rate:
        yield "learning_rate_min learning_rate", "larger than learning_rate"
    if p.warmup_epochs >= (epochs := p.rounds * p.epochs_per_round):
        yield "warmup_epochs rounds epochs_per_round", f"no epoch is left after it: the run has {epochs}"
    if card.optimizer and p.optimizer != card.optimizer:
        words = f'the formula of {card.name} is true of {card.optimizer} alone: optimizer = "{card.optimizer}"'
        yield "optimizer method", words
    if p.momentum and p.optimizer != "sgd":
        yield "momentum optimizer", f"is a setting of sgd, and the plan has {p.optimizer}: leave it out"
    if p.norm == "group" and p.recalibrate:
        yield "recalibrate norm", "GroupNorm keeps no statistics that could be made anew: recalibrate = false"
    if p.norm == "group" and has_attention(p.backbone):
        yield "norm backbone", f'{p.backbone} has no BatchNorm to be replaced: norm = "batch"'
    if p.norm == "group" and Need.BATCHNORM in card.needs:
        yield "norm method", f'{card.name} needs {Need.BATCHNORM}: norm = "batch"'
    if Need.TRANSFORMER in card.needs and not has_attention(p.backbone):
        words = f'{card.name} needs {Need.TRANSFORMER}, {p.backbone} has none: e.g. backbone = "vit_tiny"'
        yield "backbone method", words
    if Need.WEIGHTS in card.needs and p.backbone_weights is None:
        yield "backbone_weights method", f"{card.name} needs {Need.WEIGHTS}: its sha256 is missing here"
    if missing := sorted(set(rule.said) - {said.name for said in card.says}):
        words = f"{p.rule} counts by {', '.join(missing)}, which {card.name} does not say: {card.fusion} is its own"
        yield "fusion method", words
    if rule.measures and card.beside:
        words = (
            f"{p.rule} measures whole checkpoints, and those of {card.name} hold {card.beside} too: "
            f"{card.fusion} is its own"
        )
        yield "fusion method", words


# Settings that came after the form of federation.toml version 2: an earlier version trains as their defaults say and
# knows them not, so a default is left out of what is agreed by digest. Such a run goes on through an upgrade. New
# settings go here once there was a release.
ADDED_LATER: tuple[str, ...] = ()


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
    if isinstance(inner := raw.get("plan"), Mapping):  # with [plan.NAME] as federation.toml has it
        raw = {**inner, **{key: value for key, value in raw.items() if key != "plan"}}
    put_settings(raw, settings)
    return validate(source, text, raw, Plan)


def put_settings(raw: dict[str, Any], settings: Sequence[str]) -> None:
    """`key=value` settings into a plan as it is read.

    Raises:
        UsageError: one is of another form.
    """
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting!r} is not of the form key=value", remedy="e.g. --set rounds=10")
        *tables, name = key.strip().split(".")  # fedprox.mu: the key mu of the table fedprox
        place = raw
        for table in tables:
            place[table] = dict(place[table]) if isinstance(place.get(table), Mapping) else {}
            place = place[table]
        place[name] = _value(key.strip(), value.strip())


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
