"""Methods in the plan: their cards, their own settings in a table, and what is said of a wrong one."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from federations import FederationOf
from pydantic import ValidationError

from hsl_node.errors import ConfigError
from hsl_node.federation import methods
from hsl_node.federation.config import Federation, federation_text, load_federation, read_federation
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import CARDS, FAITH, Card, Need, card_of, of_methods
from hsl_node.federation.plan import Plan, has_attention, load_plan


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
    assert card.faith in FAITH
    assert card.optimizer in ("", "adam", "adamw", "sgd")
    assert {said.name for said in card.says if said.low >= said.high} == set()
    assert list(card.problems(card.settle({}))) == [], "a default is allowed"
    for preset in card.presets:
        assert list(card.problems(card.settle({"preset": preset}))) == []
    for fixed in card.plan_presets.values():
        assert fixed.keys() <= Plan.model_fields.keys()
    assert all(setting.does for setting in card.settings.values())


def test_settings_of_the_method_stand_in_its_table_and_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('method = "hsl"\n[hsl]\nencoder = "shared"\n')
    plan = load_plan(tmp_path / "plan.toml", ["hsl.experts=4"])
    assert plan.settings == {**Plan().settings, "encoder": "shared", "experts": 4}
    assert plan.settings["temperature"] == CARDS["hsl"].settings["temperature"].default
    assert load_plan(None, ["method=fedprox", "fedprox.mu=1"]).settings == {"mu": 1.0}
    assert load_plan(None, ["method=fedprox"]) == Plan(method="fedprox", settings={"mu": 0.01})
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan
    assert load_plan(None, ["augment.flip=true", "augment.turn=10"]).augment.turn == 10.0


def test_a_preset_fixes_the_settings_that_it_names() -> None:
    published = Plan(settings={"preset": "published"}).settings
    assert published == {"preset": "published", **CARDS["hsl"].presets["published"]}, "it names all of them"
    assert Plan(settings=published).settings == published, "as a file says it, all written out"
    plan = Plan(settings={"preset": "published"}, schedule="cosine_run")
    assert (plan.recalibrate, plan.schedule) == (False, "cosine_run"), "what is named wins"
    assert not any(plan.augment.model_dump().values()) and any(Plan().augment.model_dump().values())
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan
    flipped = load_plan(None, ["hsl.preset=published", "augment.flip=true"]).augment
    assert flipped.model_dump() == {**plan.augment.model_dump(), "flip": True}, "of a table too"
    frozen = {"method": "frozen", "backbone_weights": "0" * 64}
    assert not any(Plan(**frozen).augment.model_dump().values()), "features that are computed once"
    assert Plan(**frozen, augment={"turn": 9}).augment.model_dump() == {**plan.augment.model_dump(), "turn": 9.0}
    assert refused("hsl.preset=published", "hsl.experts=3") == [
        '--set: hsl.experts: preset = "published" has 12 here: leave one of the two out'
    ]


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
        f'{path}:8: hsl: settings of hsl, but the plan has method = "fedprox": leave them out, or method = "hsl"',
        f"{path}:6: fedprox.my: no setting of fedprox; did you mean 'mu'? (it has mu)",
        f"{path}:7: fedprox.mu: 'big' given, 0 to 1000 is expected",
        f"{path}:2: rounds: 0 given, needs 1 or more",
        f"{path}:3: unknown key 'encoder'; did you mean 'hsl.encoder' or 'personalised.encoder'?",
        f"{path}:4: classes: a class is named twice",
    ]
    assert refused("classes=a,a", "split_percent=1,2,3") == [
        "--set: split_percent: three positive numbers that add up to 100",
        "--set: classes: a class is named twice",
    ]


def test_what_can_still_be_checked_beside_a_wrong_value_is_and_what_hangs_on_it_is_not() -> None:
    refusal = ["optimizer=sdg", "momentum=0.5", "method=flexfair", "fusion=nova", "learning_rate_min=0.5"]
    assert [line.partition(":")[2].split(":")[0].strip() for line in refused(*refusal)] == [
        "optimizer", "learning_rate_min", "fusion",
    ]  # fmt: skip
    assert refused("learning_rate_min=0.5", "learning_rate=much", "split_percent=1,2,3") == [
        "--set: learning_rate: 'much' given, a number is expected",
        "--set: split_percent: three positive numbers that add up to 100",
    ]
    assert len(refused("method=fedtb", "backbone=resnet18", "fusion=nova")) == 1  # which needs it has is unknown
    assert refused("optimiser=sgd", "momentum=0.9") == ["--set: unknown key 'optimiser'; did you mean 'optimizer'?"]


def test_a_plan_file_may_have_its_tables_as_federation_toml_has_them(tmp_path: Path) -> None:
    (path := tmp_path / "plan.toml").write_text('rounds = 3\n[plan.hsl]\npreset = "published"\n')
    assert load_plan(path).model_dump() == load_plan(None, ["rounds=3", "hsl.preset=published"]).model_dump()
    path.write_text("[plan]\nruonds = 3\n")
    assert refused(path=path) == [f"{path}: unknown key 'ruonds'; did you mean 'rounds'?"]


def test_what_somebody_chooses_by_claims_no_more_than_is_so() -> None:
    """By its defaults HSL is not the published one; what no federation can run has no fusion, no settings to give."""
    assert CARDS["hsl"].facts.endswith('; as published with hsl.preset = "published"')
    assert CARDS["fedprox"].facts == "fused by weighted_mean; as published"
    assert not any("fused by" in card.facts for card in CARDS.values() if card.simulation_only)
    assert "metafed.threshold" in of_methods() and "metafed_ring.threshold" not in of_methods()


def test_a_misspelt_method_is_not_answered_with_those_of_simulations() -> None:
    (line,) = refused("method=centrall")
    assert "central" not in line.replace("'centrall'", "")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("method=HSL", "method: 'HSL' is no method of this installation; did you mean 'hsl'? (it has "),
        ("method=fedprx", "method: 'fedprx' is no method of this installation; did you mean 'fedprox'? (it has "),
        ("method=", "method: '' is no method of this installation (it has "),
        ("hsl=3", "hsl: a table of the method's settings is expected"),
        ("hsl.experts=0", "hsl.experts: 0 given, 1 to 256 is expected"),
        ("hsl.experts=2.5", "hsl.experts: 2.5 given, 1 to 256 is expected"),
        ("hsl.experts=true", "hsl.experts: True given, 1 to 256 is expected"),
        ("hsl.temperature=nan", "hsl.temperature: nan given, 0.01 to 100 is expected"),
        ("hsl.encoder=both", "hsl.encoder: 'both' given, shared | separate is expected"),
        ("fedktl.generator=g.onnx", "fedktl.generator: 'g.onnx' given, a sha256 (64 digits 0-9 and a-f) is expected"),
        ("mu=0.1", "unknown key 'mu'; did you mean 'fednova.mu' or 'fedprox.mu'?"),
        ("lr=0.1", "unknown key 'lr'; did you mean 'learning_rate'?"),
        ("bs=8", "unknown key 'bs'; did you mean 'batch_size'?"),
        ("augment.flop=true", "unknown key 'augment.flop'; did you mean 'flip'?"),
        ("fusion=medain", "fusion: 'medain' is no fusion rule; did you mean 'median'?; one of mean, "),
        ("backbone=resnet19", "backbone: 'resnet19' is no backbone; did you mean 'resnet18'?; one of resnet18, "),
        ("backbone=timm:../x", "backbone: 'timm:../x' is no backbone"),
    ],
)  # fmt: skip
def test_a_wrong_setting_of_a_method_is_answered_in_a_sentence(setting: str, said: str) -> None:
    (line,) = refused(setting, *["method=fedktl"] * setting.startswith("fedktl"))
    assert line.startswith(f"--set: {said}")


def test_a_federation_file_of_an_earlier_version_is_refused_in_one_sentence(
    tmp_path: Path, federation: Federation
) -> None:
    text = federation_text(federation).replace("version = 2", "version = 1").replace("seed = 1", "experts = 12")
    (tmp_path / "federation.toml").write_text(text)
    with pytest.raises(ConfigError, match="finish that run with the version that began it") as refusal:
        load_federation(tmp_path)
    assert "\n" not in refusal.value.message
    with pytest.raises(ConfigError, match="that began it") as refusal:
        read_federation(tmp_path / "federation.toml")
    assert "edited" not in refusal.value.remedy


def contradictions(**settings: object) -> list[str]:
    """What `Plan` says of these settings, each after its key."""
    with pytest.raises(ValidationError) as refusal:
        Plan.model_validate(settings)
    return [f"{'.'.join(map(str, e['loc']))}: {e['ctx']['error']}" for e in refusal.value.errors()]


STRICT = Card(
    "strict", "a method that needs everything", "nowhere:AT_ALL", optimizer="sgd",
    needs=frozenset({Need.TRANSFORMER, Need.WEIGHTS, Need.BATCHNORM}),
)  # fmt: skip


def test_what_a_method_needs_of_the_plan_is_said_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "CARDS", {**CARDS, "strict": STRICT})
    assert contradictions(method="strict", norm="group", recalibrate=False) == [
        'optimizer: the formula of strict is true of sgd alone: optimizer = "sgd"',
        'norm: strict needs BatchNorm layers: norm = "batch"',
        'backbone: strict needs a backbone with attention, resnet18 has none: e.g. backbone = "vit_tiny"',
        "backbone_weights: strict needs a weight file that the plan names: its sha256 is missing here",
    ]
    Plan(method="strict", optimizer="sgd", backbone="vit_tiny", backbone_weights="0" * 64)
    card_of.cache_clear()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"momentum": 0.9}, "momentum: is a setting of sgd, and the plan has adam: leave it out"),
        ({"norm": "group"}, "recalibrate: GroupNorm keeps no statistics that could be made anew: recalibrate = false"),
        ({"norm": "group", "recalibrate": False, "backbone": "vit_tiny", "method": "fedavg"},
         'norm: vit_tiny has no BatchNorm to be replaced: norm = "batch"'),
        ({"rounds": 2, "epochs_per_round": 3, "warmup_epochs": 6},
         "warmup_epochs: no epoch is left after it: the run has 6"),
        ({"method": "fedavg", "fusion": "nova"},
         "fusion: nova counts by steps, which fedavg does not say: weighted_mean is its own"),
        ({"method": "harmofl", "fusion": "come"},
         "fusion: come measures whole checkpoints, and those of harmofl hold amplitudes of images too: "
         "mean is its own"),
        ({"learning_rate": 1e-5}, "learning_rate_min: larger than learning_rate"),
    ],
    ids=["momentum", "group", "group-transformer", "warmup", "said", "measured", "rates"],
)  # fmt: skip
def test_settings_that_cannot_be_right_together_are_refused_with_the_reason(
    settings: dict[str, object], said: str
) -> None:
    assert contradictions(**settings) == [said]


@pytest.mark.parametrize(
    ("backbone", "has"),
    [("vit_tiny", True), ("timm:vit_small_patch16_224", True), ("torchvision:swin_t", True), ("timm:deit_tiny", True),
     ("resnet18", False), ("timm:mobilevit_s", False), ("efficientnet_lite0", False)],
)  # fmt: skip
def test_a_backbone_with_attention_is_known_by_its_name(backbone: str, has: bool) -> None:
    assert has_attention(backbone) is has


def test_what_a_federation_lacks_for_its_plan_is_said_all_at_once(federation: Federation) -> None:
    content = {
        "name": "x", "plan": Plan(method="hsl", fusion="median"), "peer": federation.peer[:2],
    }  # fmt: skip
    with pytest.raises(ValidationError) as refusal:
        Federation.model_validate(content)
    said = [str(e["ctx"]["error"]) for e in refusal.value.errors()]
    assert said == [
        "the method hsl needs an anchor set (hsl-node anchor build)",
        '"median" needs 3 peers or more, here are 2: with fewer it is the mean and protects from nothing; set fusion = '
        '"mean", or invite another peer',
    ]
    with pytest.raises(ValidationError, match="no federation can agree on local: it never fuses"):
        Federation(name="x", plan=Plan(method="local"), peer=federation.peer)
