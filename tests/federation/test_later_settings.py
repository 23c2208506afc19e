"""Settings of the plan that came after its first form: at their defaults neither digest nor file tells of them."""

from __future__ import annotations

import tomllib

import pytest

from hsl_node.federation import plan as plan_module
from hsl_node.federation.config import Federation, PeerCard, federation_text
from hsl_node.federation.plan import ADDED_LATER, Plan, agreed


def test_a_setting_that_came_later_changes_the_digest_only_where_it_is_not_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a run goes on through the upgrade. None came yet: these three stand in for them."""
    keys = (
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB8eHRwbGhkYFxYVFBMSERAPDg0MCwoJCAcGBQQDAgEA",
    )
    cards = tuple(
        PeerCard(name=name, address=f"{name}.example:8922", key=key)
        for name, key in zip(("ada", "ben"), keys, strict=True)
    )
    plan = Plan(method="fedavg")
    federation = Federation(name="t", plan=plan, peer=cards)
    unchanged = federation.digest
    assert federation.agreed_json.count(b'"frame":"middle"') == 1 and ADDED_LATER == ()
    for change in ({"fit": "pad"}, {"frame": "first"}, {"silence_alarm_minutes": 61}):
        other = Federation(name="t", plan=plan.model_copy(update=change), peer=cards)
        assert other.digest != unchanged

    monkeypatch.setattr(plan_module, "ADDED_LATER", ("fit", "frame", "silence_alarm_minutes"))
    earlier = federation.digest
    assert earlier != unchanged and b'"frame"' not in federation.agreed_json
    for change in ({"fit": "pad"}, {"frame": "first"}, {"silence_alarm_minutes": 61}):
        other = Federation(name="t", plan=plan.model_copy(update=change), peer=cards)
        assert other.digest not in (unchanged, earlier)
    written = tomllib.loads(federation_text(federation))["plan"]
    assert written.keys().isdisjoint(plan_module.ADDED_LATER), "an earlier version reads it"


def test_a_method_has_its_settings_in_the_digest_and_the_file_also_at_their_defaults() -> None:
    plan = Plan(method="fedprox")
    assert agreed(plan)["fedprox"] == {"mu": 0.01}
    assert agreed(Plan(method="fedprox", settings={"mu": 0.1}))["fedprox"] == {"mu": 0.1}
    assert "fedavg" not in agreed(Plan(method="fedavg")), "it has none"
