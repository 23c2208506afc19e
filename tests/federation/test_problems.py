"""A wrong value is told in the product's words: no sentence of the validation library reaches a person."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plan_words import PAGE, page_with_methods, rows
from pydantic import BaseModel, ValidationError

from hsl_node.admin.archive import AnchorPlace, Index, Measured
from hsl_node.commands.data import _plan
from hsl_node.errors import ConfigError, UsageError
from hsl_node.federation import plan_keys, toml_file
from hsl_node.federation.config import AnchorCard, Federation, PeerCard
from hsl_node.federation.keyring import Accepted, KeyringFile, Revoked
from hsl_node.federation.methods import CARDS
from hsl_node.federation.node_toml import DataConfig, InboxConfig, NodeConfig, TrainConfig
from hsl_node.federation.plan import UNALTERED, Augment, Plan, load_plan
from hsl_node.federation.problems import KINDS, PATTERNS, in_words

MODELS: tuple[type[BaseModel], ...] = (
    Plan, Federation, PeerCard, AnchorCard, NodeConfig, DataConfig, TrainConfig, InboxConfig, KeyringFile, Accepted,
    Revoked, Index, Measured, AnchorPlace,
)  # fmt: skip
WRONG = (
    None, True, -1, 0, 1, 10**12, 10**30, 1.5, math.inf, math.nan, -0.5, "", "x", "1.5", "x" * 5000, "a b", "9" * 5000,
    "\n", [], ["a"], ["a"] * 3, ["a"] * 5000, [[]], [{}], [1, 2, 3], [1, 2], {}, {"a": 1}, {"a": "b"}, {1: 2},
)  # fmt: skip
LIBRARY = re.compile(
    r"(?i)input should|valid (tuple|list|string|integer|number|dictionary)|after validation|should match pattern|"
    r"field required|extra inputs|should have at (least|most)|unable to parse|instance of|Value error|pydantic|"
    r"\bstr\b|\bint\b|\btuple\b|\bdict\b|another value|another form"
)


def problems(model: type[BaseModel]) -> Iterator[dict[str, Any]]:
    for content in ({}, {"unknown": 1}, *({name: value} for name in model.model_fields for value in WRONG)):
        try:
            model.model_validate(content)
        except ValidationError as exc:
            yield from map(dict, exc.errors())


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_no_problem_of_a_model_is_told_in_the_librarys_words(model: type[BaseModel]) -> None:
    found = list(problems(model))
    assert {p["type"] for p in found} <= KINDS and len(found) > 10
    told = {in_words(problem) for problem in found}
    assert not [text for text in told if LIBRARY.search(re.sub(r"'[^']*'", "", text))]


@pytest.mark.parametrize("tried", ["augment = false", 'augment = "off"'])
def test_augmentation_that_is_switched_off_is_answered_with_what_switches_it_off(tmp_path: Path, tried: str) -> None:
    """There is no one switch; the page shows the same table."""
    (tmp_path / "plan.toml").write_text(tried)
    with pytest.raises(ConfigError) as refused:
        load_plan(tmp_path / "plan.toml")
    advised = refused.value.message.split("to alter no image: ")[1]
    shown = PAGE.read_text().split("alters no image.\n")[1].split("\n## ")[0]
    for text in (advised, re.sub("(?m)^ +", "", shown)):
        (tmp_path / "plan.toml").write_text(text)
        assert load_plan(tmp_path / "plan.toml").augment == UNALTERED


def test_together_they_find_most_kinds() -> None:
    """Else the test above looked at nothing."""
    seen = {p["type"] for model in MODELS for p in problems(model)}
    assert {"missing", "extra_forbidden", "value_error", "literal_error", "string_pattern_mismatch", "too_short",
            "too_long", "tuple_type", "dict_type", "string_type", "finite_number"} <= seen  # fmt: skip


def test_every_form_of_a_text_has_words() -> None:
    schemas = " ".join(str(model.model_json_schema()) for model in MODELS)
    used = {p for p in re.findall(r"'pattern': '(.*?)'[,}]", schemas)}
    assert used and {p.replace("\\\\", "\\") for p in used} <= set(PATTERNS)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("classes=benign", "--set: classes: 1 given, needs 2 or more of them"),
        ("learning_rate=0,001", "--set: learning_rate: '0,001' given, a number is expected"),
        ("rounds=0", "--set: rounds: 0 given, needs 1 or more"),
        ("rounds=many", "--set: rounds: 'many' given, a whole number is expected"),
        ("backbone=vgg", "--set: backbone: 'vgg' is no backbone; one of resnet18, resnet34, resnet50, tiny, "),
        ("backbone_weights=abc", "--set: backbone_weights: 'abc' given, expected is 64 digits 0-9 and a-f"),
        ("split_percent=60,40", "--set: split_percent.2: is missing"),
        ("runds=3", "--set: unknown key 'runds'; did you mean 'rounds'?"),
    ],
)  # fmt: skip
def test_a_wrong_setting_says_what_was_given_and_what_is_expected(setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_plan(None, [setting])
    assert said.replace("split_percent.2: is missing", "'split_percent.2' is missing") in refusal.value.message
    assert "`hsl-node federation plan` lists all keys" in refusal.value.remedy


def test_the_classes_of_data_check_are_called_as_they_were_given(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        _plan(tmp_path, "benign", None)
    assert refusal.value.message == "--classes: 1 given, needs 2 or more of them"
    assert _plan(tmp_path, "0,1", None).classes == ("0", "1"), "a class may be called as a number"


def test_a_file_that_windows_began_with_a_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xef\xbb\xbfrounds = 7\r\n")
    assert load_plan(path).rounds == 7


def test_an_empty_file_is_called_that_and_a_line_that_is_no_toml_named(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="the file is empty"):
        toml_file.read_toml(path, Federation)
    path.write_text("rounds = 1\nrounds two\n")
    with pytest.raises(ConfigError) as refusal:
        toml_file.read_toml(path, Federation)
    assert refusal.value.message.startswith(f"{path}:2: not valid TOML: ")


def test_the_printed_plan_says_what_the_page_says() -> None:
    """`hsl-node federation plan`, docs/researcher/plan.md and the model itself name the same keys and defaults."""
    assert {key: text for key, _, text in rows()} == plan_keys.MEANING, "make docs"
    fields = [key for key in Plan.model_fields if key not in ("settings", "augment")]
    assert list(plan_keys.MEANING) == [*fields, *(f"augment.{key}" for key in Augment.model_fields)]
    assert {key: default.replace('"', "") for key, default, _ in rows()} == plan_keys.defaults()
    assert page_with_methods() == PAGE.read_text(), "make docs"
    assert plan_keys.limits().keys() == plan_keys.defaults().keys() and plan_keys.limits()["momentum"] == "0 to below 1"
    assert plan_keys.limits()["rounds"] == "1 to 10000" and plan_keys.limits()["method"] == " | ".join(
        name for name, card in CARDS.items() if not card.simulation_only
    )
