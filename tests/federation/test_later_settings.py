"""Settings of the plan that came after its first form: at their defaults neither digest nor file tells of them."""

from __future__ import annotations

import tomllib

from hsl_node.federation.config import Federation, PeerCard, federation_text
from hsl_node.federation.plan import ADDED_LATER, Plan


def test_a_setting_that_came_later_changes_the_digest_only_where_it_is_not_its_default() -> None:
    """The number was printed by the version before these settings: a run goes on through the upgrade."""
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
    assert federation.digest == "bfab3e07c97117a8dff0a8935d7bef4164b1826921267d159665693a6a94c3e8"
    for change in ({"fit": "pad"}, {"frame": "first"}, {"silence_alarm_minutes": 61}):
        other = Federation(name="t", plan=plan.model_copy(update=change), peer=cards)
        assert other.digest != federation.digest
    assert set(ADDED_LATER) == {"fit", "frame", "silence_alarm_minutes"}

    assert tomllib.loads(federation_text(federation))["plan"].keys().isdisjoint(ADDED_LATER), (
        "an earlier version reads it"
    )
