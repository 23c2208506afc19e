"""A fusion that counts by what the peers said: the node hands it all that they signed, and looks at it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from federations import make_federation
from parts import Parts

from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.federation.plan import Plan
from hsl_node.host.durable import Step
from hsl_node.node.fusing import Fusing
from hsl_node.sync.round import Claim, Fuse, Fused, Phase, State
from hsl_node.weights.checkpoint_file import read_schema, read_weights, write_weights

ASH, BIRCH, CEDAR = PEERS = (Peer("ash"), Peer("birch"), Peer("cedar"))


def wrote(path: Path, value: float) -> Digest:
    path.parent.mkdir(exist_ok=True)
    return write_weights(path, {"w": np.array([value, -value], np.float32)}, Step.FUSION_WRITE)


def test_said_numbers_and_the_base_reach_the_fusion_and_what_each_counts_by_is_recorded(tmp_path, monkeypatch):
    """FedNova by hand: n 1:3:0 parts of 4, base 1; updates 2, 4 and 8 in 2, 4 and 8 steps are 1 a step each, and all
    went sum p_k a_k = (2 + 3 x 4 + 4 x 8) / 8 = 5.75 steps: 1 + 5.75."""
    monkeypatch.setattr(Plan, "rule", property(lambda plan: "nova"))
    parts = Parts(make_federation(3), tmp_path / "ash", ASH)
    layout, journal = parts.here.layout, parts.here.journal
    base = wrote(layout.fused(1), 1.0)
    have, samples = {}, dict(zip(PEERS, (10, 30, 40), strict=True))
    for peer, steps in zip(PEERS, (2.0, 4.0, 8.0), strict=True):
        sha256 = wrote(layout.checkpoint(2, peer, ASH), 1.0 + steps)
        content = {"bytes": 9, "samples": samples[peer], "said": {"steps": steps}, "score": 0.5}
        journal.record_manifest(2, peer, sha256, b"", content)
        have[peer] = Claim(peer, Round(2), sha256, base, {}, Digest(f"{steps:064}"), samples[peer])
    state = State(ASH, PEERS, 9, base, phase=Phase.FUSE, round=2, have=have)
    fusing = Fusing(parts.here, parts.alarms, read_schema(layout.fused(1)), lambda: state)
    happened = asyncio.run(fusing.fuse(Fuse(Round(2), {p: c.sha256 for p, c in have.items()})))
    for record in happened.records:
        record()
    assert isinstance(happened.event, Fused)
    assert read_weights(layout.fused(2))["w"] == pytest.approx([6.75, -6.75])
    found = journal.influence(Round(2))
    assert found is not None and set(found["peers"]) == set(PEERS)
    assert found["said"] == {} and found["share"] == {}  # parts .125 / 2, .375 / 4 and .5 / 8: none above half
    parts.close()
