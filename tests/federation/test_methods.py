"""Methods in the plan: their cards, their own settings in a table, and what is said of a wrong one."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from federations import FederationOf

from hsl_node.errors import ConfigError
from hsl_node.federation.config import Federation, federation_text, load_federation
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import CARDS, card_of
from hsl_node.federation.plan import Plan, load_plan


@pytest.fixture(scope="module")
def federation(federation_of: FederationOf) -> Federation:
    return federation_of(3).federation


def refused(*settings: str, path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        load_plan(path, settings)
    return refusal.value.message.split("\n")


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_consistent(name: str) -> None:
    card = card_of(name)
    assert card.name == name not in Plan.model_fields, "a method's table stands beside the plan's settings"
    assert card.faith in ("exact", "adapted", "assumed")
    assert card.optimizer in ("", "adam", "adamw", "sgd")
    assert {said.name for said in card.says if said.low >= said.high} == set()
    assert list(card.problems(card.settle({}))) == [], "a default is allowed"
    for preset in card.presets:
        assert list(card.problems(card.settle({"preset": preset}))) == []
    assert all(setting.does for setting in card.settings.values())


def test_settings_of_the_method_stand_in_its_table_and_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('method = "hsl"\n[hsl]\nencoder = "shared"\n')
    plan = load_plan(tmp_path / "plan.toml", ["hsl.experts=4"])
    assert plan.settings == {
        "encoder": "shared",
        "embedding": "softmax",
        "temperature": 3.0,
        "gate_temperature": 1.0,
        "anchor_weight": 1.0,
        "experts": 4,
        "anchor_every": 1,
    }
    assert load_plan(None, ["method=fedprox", "fedprox.mu=1"]).settings == {"mu": 1.0}
    assert load_plan(None, ["method=fedprox"]) == Plan(method="fedprox", settings={"mu": 0.01})
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan
    assert load_plan(None, ["augment.flip=true", "augment.turn=10"]).augment.turn == 10.0


def test_the_fusion_rule_in_force_is_the_authors_where_the_plan_names_none() -> None:
    assert Plan().fusion is None and Plan().rule == "mean"
    assert Plan(method="fedavg").rule == "weighted_mean"
    assert Plan(method="fedavg", fusion="median").rule == "median"
    assert {card.fusion for card in CARDS.values()} <= FUSION_RULES.keys()


def test_the_table_of_the_method_is_in_the_federations_file_and_digest(tmp_path: Path, federation: Federation) -> None:
    made = federation.model_copy(update={"plan": Plan(method="fedprox", settings={"mu": 0.5})})
    text = federation_text(made)
    assert tomllib.loads(text)["plan"]["fedprox"] == {"mu": 0.5} and "\n[plan.fedprox]\nmu = 0.5\n" in text
    (tmp_path / "federation.toml").write_text(text)
    assert load_federation(tmp_path) == made
    assert made.digest != federation.model_copy(update={"plan": Plan(method="fedprox")}).digest


def test_all_that_is_wrong_is_said_at_once_each_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    (path := tmp_path / "plan.toml").write_text(
        'method = "fedprox"\nrounds = 0\nencoder = "shared"\nclasses = ["a", "a"]\n[fedprox]\nmy = 1\nmu = "big"\n'
        "[hsl]\nexperts = 3\n"
    )
    assert refused(path=path) == [
        f'{path}:8: hsl: settings of hsl, but the plan has method = "fedprox"',
        f"{path}:6: fedprox.my: no setting of fedprox; did you mean 'mu'? (it has mu)",
        f"{path}:7: fedprox.mu: 'big' given, 0 to 1000 is expected",
        f"{path}:2: rounds: 0 given, needs 1 or more",
        f"{path}:3: unknown key 'encoder'; did you mean 'hsl.encoder'?",
    ]
    assert refused("classes=a,a", "split_percent=1,2,3") == [
        "--set: split_percent: three positive numbers that add up to 100",
        "--set: classes: a class is named twice",
    ]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("method=fedprx", "method: 'fedprx' is no method of this installation; did you mean 'fedprox'? (it has "),
        ("method=", "method: '' is no method of this installation (it has fedavg, "),
        ("hsl=3", "hsl: a table of the method's settings is expected"),
        ("hsl.experts=0", "hsl.experts: 0 given, 1 to 256 is expected"),
        ("hsl.experts=2.5", "hsl.experts: 2.5 given, 1 to 256 is expected"),
        ("hsl.experts=true", "hsl.experts: True given, 1 to 256 is expected"),
        ("hsl.temperature=nan", "hsl.temperature: nan given, 0.01 to 100 is expected"),
        ("hsl.encoder=both", "hsl.encoder: 'both' given, separate | shared is expected"),
        ("augment.flop=true", "unknown key 'augment.flop'; did you mean 'flip'?"),
        ("backbone=resnet19", "backbone: 'resnet19' is no backbone; did you mean 'resnet18'?; one of resnet18, "),
        ("backbone=timm:../x", "backbone: 'timm:../x' is no backbone"),
    ],
)  # fmt: skip
def test_a_wrong_setting_of_a_method_is_answered_in_a_sentence(setting: str, said: str) -> None:
    (line,) = refused(setting)
    assert line.startswith(f"--set: {said}")


def test_a_federation_file_of_an_earlier_version_is_refused_in_one_sentence(
    tmp_path: Path, federation: Federation
) -> None:
    text = federation_text(federation).replace("version = 2", "version = 1").replace("seed = 1", "experts = 12")
    (tmp_path / "federation.toml").write_text(text)
    with pytest.raises(ConfigError, match="finish that run with the version that began it") as refusal:
        load_federation(tmp_path)
    assert "\n" not in refusal.value.message
