"""The card of a learning method: what plan, manifest, daemon and help must know of it. No torch.

The cards that there are: `methods.py`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hsl_node.errors import escaped

Value = float | bool | str
SCORE_NAMES: Mapping[str, str] = {"classification": "AUC"}  # a task's score, as people read it


FAITH: Mapping[str, str] = {
    "exact": "as published",
    "adapted": "adapted from what was published",
    "assumed": "in part assumed, where nothing published says it",
}


class Need(StrEnum):
    """What a method cannot do without."""

    ANCHOR = "an anchor set"
    LABELS = "labelled images"
    FULL_SET = "the checkpoints of the last round, one by one"
    OWN = "what the hospital sent last"
    WEIGHTS = "a weight file that the plan names"
    TRANSFORMER = "a backbone with attention"
    BATCHNORM = "BatchNorm layers"


@dataclass(frozen=True)
class Said:
    """One number that a peer signs beside its checkpoint. Bounded: a fusion may count by it; nobody can check it."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Setting:
    """One setting of a method: a number, a switch or a word, as its default is. Limits are included."""

    default: Value
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    file: bool = False  # the sha256 of one, or ""
    does: str = ""

    @property
    def values(self) -> str:
        """What is allowed, for people; "" where all is."""
        if isinstance(self.default, bool):
            return "true | false"
        if isinstance(self.default, str):
            return "a sha256 (64 digits 0-9 and a-f)" if self.file else " | ".join(self.choices)
        if self.low is None or self.high is None:
            return "" if self.low is None else f"{self.low:g} or more"
        return f"{self.low:g} to {self.high:g}"

    def taken(self, value: object) -> Value:
        """Raises: ValueError: it is of another type, or beyond the limits."""
        usual = self.default
        if isinstance(usual, bool):
            right = isinstance(value, bool)
        elif isinstance(usual, str):
            form = _SHA256 if self.file else _WORD
            right = isinstance(value, str) and (value in self.choices if self.choices else bool(form.match(value)))
        elif isinstance(value, bool) or not isinstance(value, int if isinstance(usual, int) else int | float):
            right = False
        else:
            low, high = self.low, self.high
            right = abs(value) < math.inf and (low is None or value >= low) and (high is None or value <= high)
        if not right:
            kind = "a word" if isinstance(usual, str) else "a whole number" if isinstance(usual, int) else "a number"
            raise ValueError(f"{escaped(repr(value), 60)} given, {self.values or kind} is expected")
        return float(value) if type(usual) is float else value  # type: ignore[arg-type, return-value]


_WORD = re.compile(r"[\w.:/+-]{0,120}\Z", re.ASCII)
_SHA256 = re.compile(r"([0-9a-f]{64})?\Z")


@dataclass(frozen=True)
class Card:
    """A method, for all who do not train."""

    name: str
    title: str  # a sentence for reports and help
    code: str  # "module:VALUE" of its torch half
    fusion: str = "weighted_mean"  # its authors' rule, a name of FUSION_RULES
    faith: str = "exact"  # of FAITH; why stands in the docstring of the torch half
    cite: str = ""
    differs: str = ""  # what is otherwise than in the publication, for reports
    task: str = "classification"
    needs: frozenset[Need] = frozenset({Need.LABELS})
    says: tuple[Said, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)  # `preset` of the plan -> what it fixes
    plan_presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # ... and the plan's other defaults
    optimizer: str = ""  # the only one that its formula is true of
    private: bool = False  # some tensors never leave the hospital
    beside: str = ""  # what its checkpoints hold beside weights: how far apart they lie tells nothing then
    simulation_only: str = ""  # why no federation can agree on it

    @property
    def facts(self) -> str:
        """What somebody who chooses it must know, in a line."""
        needs = [str(need) for need in Need if need in self.needs and need != Need.LABELS]
        return "; ".join(
            [
                *([] if self.simulation_only else [f"fused by {self.fusion}"]),
                *([f"needs {', '.join(needs)}"] if needs else []),
                *([f"optimizer = {self.optimizer}"] if self.optimizer else []),
                *(["some tensors stay in the hospital"] if self.private else []),
                *([f"says {', '.join(said.name for said in self.says)}"] if self.says else []),
                *([f"in simulations only: {self.simulation_only}"] if self.simulation_only else []),
                self.compared,
            ]
        )

    @property
    def compared(self) -> str:
        """With its publication, in words."""
        only = f' with {self.name}.preset = "published"' if "published" in self.presets else ""
        return FAITH[self.faith] + only

    @property
    def score_name(self) -> str:
        """What people call its score."""
        return SCORE_NAMES.get(self.task, "score")

    @property
    def keeps(self) -> bool:
        """Does the model that a hospital uses hang on tensors that nobody else has?"""
        return self.private or Need.OWN in self.needs

    def settle(self, given: Mapping[str, object]) -> dict[str, Value]:
        """All settings: those given, and the defaults of the others. Only what `problems` has nothing against."""
        usual = self.presets.get(str(given.get("preset", "")), {})
        return {
            key: setting.taken(given.get(key, usual.get(key, setting.default)))
            for key, setting in self.settings.items()
        }

    def problems(self, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
        """What is wrong with settings as they were given: (key, in words)."""
        preset = str(given.get("preset", ""))
        fixed = self.presets.get(preset, {})
        for key, value in given.items():
            key = str(key)
            if key not in self.settings:
                has = ", ".join(self.settings) or "none"
                yield key, f"no setting of {self.name}{nearest(key, self.settings)} (it has {has})"
                continue
            try:
                if self.settings[key].taken(value) != fixed.get(key, value):
                    yield key, f'preset = "{preset}" has {fixed[key]} here: leave one of the two out'
            except ValueError as exc:
                yield key, str(exc)


def nearest(word: str, known: Mapping[str, object] | list[str]) -> str:
    """A hint to the name that was meant; "" where none is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
