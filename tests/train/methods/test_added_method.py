"""docs/researcher/add-a-method.md as somebody follows it: two files and an entry point, installed beside hsl-node."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learning
import pytest
import torch
from sources import REPOSITORY

from hsl_node.errors import ConfigError
from hsl_node.federation.methods import Card, card_of, cards, package_of
from hsl_node.federation.plan import load_plan
from hsl_node.train.hardware import prepare
from hsl_node.train.loop import train_round
from hsl_node.train.method import Method
from hsl_node.train.site import initial_weights
from hsl_node.train.start import StartFiles
from hsl_node.train.tasks.classification import primary_loss
from hsl_node.weights.checkpoint_file import read_weights

PAGE = (REPOSITORY / "docs" / "researcher" / "add-a-method.md").read_text(encoding="utf-8")
CARD, METHOD, LOSS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
ENTRY_POINT = re.search(r'\[project\.entry-points\."hsl_node\.methods"\]\n(.*?)\n```', PAGE, re.S)[1]  # type: ignore[index]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's package, as an installer lays it down."""
    packages = tmp_path / "packages"
    info = packages / "huberprox-1.0.dist-info"
    info.mkdir(parents=True)
    (packages / "huberprox_card.py").write_text(CARD)
    (packages / "huberprox.py").write_text(METHOD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: huberprox\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[hsl_node.methods]\n{ENTRY_POINT.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(packages)
    yield packages
    for found in (card_of, package_of):
        found.cache_clear()
    for name in ("huberprox", "huberprox_card"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def trained(folder: Path, method: str, **table: Any) -> tuple[Path, list[dict[str, Any]]]:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)
    site = learning.site(learning.small_plan(method=method, **table))
    base = folder / "base.safetensors"
    digest, _ = initial_weights(folder, site.plan, site.method, base)
    events: list[dict[str, Any]] = []
    out = folder / "out.safetensors"
    files = StartFiles(round=1, base=base, base_sha256=digest)
    train_round(
        site, folder=folder / "trainer", files=files, out=out, own=folder / "own.safetensors", report=events.append
    )
    return out, [event for event in events if event["event"] == "epoch"]


def test_its_project_file_names_every_module_that_an_installer_must_take() -> None:
    project = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE, re.S)[1])  # type: ignore[index]
    assert sorted(project["tool"]["setuptools"]["py-modules"]) == ["huberprox", "huberprox_card"]  # else pip gives up


def test_the_pages_method_trains_with_its_own_term_and_settings(installed: Path, tmp_path: Path) -> None:
    _, epochs = trained(tmp_path / "a", "huberprox", huberprox={"mu": 0.5})
    assert [sorted(epoch["terms"]) for epoch in epochs] == [["primary", "pull"], ["primary", "pull"]]
    assert all(epoch["terms"]["pull"] > 0 for epoch in epochs)


def test_without_its_term_it_gives_the_bytes_of_fedavg(installed: Path, tmp_path: Path) -> None:
    (out, _), (plain, _) = trained(tmp_path / "a", "huberprox", huberprox={"mu": 0}), trained(tmp_path / "b", "fedavg")
    ours, theirs = read_weights(out), read_weights(plain)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_plan_and_help_know_it_and_its_package_is_named(installed: Path) -> None:
    assert "huberprox" in cards() and package_of("huberprox") == "huberprox 1.0" and package_of("fedavg") == ""
    assert load_plan(None, ["method=huberprox", "huberprox.far=2"]).settings == {"mu": 0.01, "far": 2.0}
    with pytest.raises(ConfigError, match=r"huberprox\.far: 0 given, 1e-06 to 100 is expected"):
        load_plan(None, ["method=huberprox", "huberprox.far=0"])


def test_where_it_is_not_installed_it_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError) as refusal:
        load_plan(None, ["method=huberprox"])
    assert "'huberprox' is no method of this installation; did you mean 'fedprox'?" in refusal.value.message
    assert "a package that adds methods, may bring it: install what the others have" in refusal.value.message


def test_its_card_is_read_without_torch(installed: Path) -> None:
    code = "import sys, hsl_node.federation.methods as m; m.card_of('huberprox'); print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(REPOSITORY)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("CARD = 3", "huberprox = huberprox_card:CARD of the package huberprox 1.0 is no card of that name"),
        ("CARD = NOTHING", "cannot be loaded: NameError"),
        (CARD.replace('faith="assumed"', 'fusion="krum"'), "its fusion, task or faith is none that this version"),
    ],
    ids=["no card", "an error", "an unknown fusion"],
)
def test_a_package_whose_card_is_none_stops_no_other_method(installed: Path, card: str, said: str) -> None:
    (installed / "huberprox_card.py").write_text(card)
    assert "huberprox" not in cards() and "fedprox" in cards()
    with pytest.raises(ConfigError, match=said):
        load_plan(None, ["method=huberprox"])


def test_the_page_names_every_field_of_a_method_and_its_files_are_short() -> None:
    _, _, methods_part = PAGE.partition("## What a method may say")
    table = re.findall(r"^\| `(\w+)` \|", methods_part, re.M)
    assert table == [field.name for field in fields(Method) if field.name != "name"]
    assert len(METHOD.splitlines()) + len(CARD.splitlines()) <= 80


def test_the_page_names_the_fields_of_a_card() -> None:
    """All but those of presets, which are for one method with a published form of its own, and of other tasks."""
    told = PAGE.partition("## What a card may say")[2].partition("## What a method may say")[0]
    left_out = {"presets", "plan_presets", "task"}
    assert set(re.findall(r"`(\w+)`", told)) >= {field.name for field in fields(Card)} - left_out


def test_the_pages_loss_in_place_of_the_tasks_own_is_what_it_says() -> None:
    """One image of class 1 with log-odds ln 3, smoothing 0.1: 0.9 * 0.287682 and 0.1 * (0.287682 + 1.386294) / 2."""
    found: dict[str, Any] = {}
    exec(LOSS, found)
    network = SimpleNamespace(ask=lambda model, image, reference: torch.tensor([[math.log(3)]]))
    learner = SimpleNamespace(
        site=SimpleNamespace(method=SimpleNamespace(network=network)), plan=SimpleNamespace(classes=("a", "b"))
    )
    batch = SimpleNamespace(image=None, target=torch.tensor([1]))
    step = SimpleNamespace(
        learner=learner, batch=batch, model=None, settings={"smoothing": 0.1}, task=SimpleNamespace(loss=primary_loss)
    )
    terms = found["smoothed"](step)
    assert terms["primary"].item() == pytest.approx(0.258914, abs=1e-6)
    assert terms["smoothing"].item() == pytest.approx(0.083699, abs=1e-6)
