"""Personalised: half own, half the others' mean, by the worked numbers; the rest is HSL."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsl_node.federation.methods import CARDS, Need
from hsl_node.train.method import Start, take_fused
from hsl_node.train.methods.hsl import HSL
from hsl_node.train.methods.personalised import PERSONALISED, half_own

WORKED = {"a": (1.0, -2.0), "b": (2.0, 0.0), "c": (4.0, 1.0)}


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.register_buffer("running_var", torch.ones(1))
        self.register_buffer("batches", torch.tensor(0))


def started(sent: dict[str, dict[str, Tensor]], me: str, own: float = 0.5, mine: bool = True) -> dict[str, Tensor]:
    """What `me` goes on from, after a plain mean in float32, the largest counters."""
    fused = {
        name: torch.stack([t[name] for t in sent.values()]).double().mean(0).float()
        if tensor.is_floating_point()
        else torch.stack([t[name] for t in sent.values()]).max()
        for name, tensor in sent[me].items()
    }
    learner: Any = SimpleNamespace(model=Numbers(), settings={"own": own})
    half_own(learner, Start(2, fused, samples=dict.fromkeys(sent, 10), mine=sent[me] if mine else {}))
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def of(values: dict[str, tuple[float, ...]]) -> dict[str, dict[str, Tensor]]:
    return {
        peer: {"w": torch.tensor(w), "running_var": torch.tensor([0.5 + i]), "batches": torch.tensor(5 - i)}
        for i, (peer, w) in enumerate(values.items())
    }


def test_the_worked_example_buffers_too():
    found = {peer: started(of(WORKED), peer) for peer in WORKED}
    by_hand = {"a": [2.0, -0.75], "b": [2.25, -0.25], "c": [2.75, 0.0]}
    assert {p: f["w"].tolist() for p, f in found.items()} == {p: pytest.approx(w, abs=1e-6) for p, w in by_hand.items()}
    # variances 0.5, 1.5, 2.5: half of 0.5 and half of 2; the largest counter
    assert found["a"]["running_var"].item() == pytest.approx(1.25) and found["a"]["batches"] == 5
    mean = torch.stack([f["w"] for f in found.values()]).mean(0)
    torch.testing.assert_close(mean, torch.tensor([7 / 3, -1 / 3]))
    torch.testing.assert_close(found["c"]["w"] - found["a"]["w"], 0.25 * torch.tensor([3.0, 3.0]))  # alpha of three


@pytest.mark.parametrize(("peers", "alpha"), [(2, 0.0), (3, 0.25), (5, 0.375)])
def test_the_share_of_the_own_model_in_terms_of_the_common_mean(peers, alpha):
    sent = of({f"p{i}": (float(i == 0), 0.0) for i in range(peers)})
    found = started(sent, "p0")["w"][0].item()
    assert found == pytest.approx(alpha + (1 - alpha) / peers)


def test_two_hospitals_get_the_mean_to_the_bit():
    sent = of({"a": (0.1, 1e-20), "b": (0.7, -3.3)})
    mean = ((sent["a"]["w"].double() + sent["b"]["w"].double()) / 2).float()
    assert torch.equal(started(sent, "a")["w"], mean) and torch.equal(started(sent, "b")["w"], mean)


def test_equal_hospitals_stay_equal_and_one_that_wants_all_of_its_own_has_it():
    same = of({"a": (0.3, -7.0), "b": (0.3, -7.0), "c": (0.3, -7.0)})
    torch.testing.assert_close(started(same, "b")["w"], same["b"]["w"])
    assert torch.equal(started(of(WORKED), "c", own=1.0)["w"], of(WORKED)["c"]["w"])


def test_the_first_round_and_one_whose_own_file_is_lost_begin_from_what_everybody_has():
    found = started(of(WORKED), "a", mine=False)
    torch.testing.assert_close(found["w"], torch.tensor([7 / 3, -1 / 3]))


def test_it_is_hsl_but_for_where_a_round_begins():
    assert replace(PERSONALISED, name="hsl", adopt=take_fused) == HSL
    card, hsl = CARDS["personalised"], CARDS["hsl"]
    assert (card.needs, card.fusion) == (hsl.needs | {Need.OWN}, "mean")
    assert set(card.settings) - set(hsl.settings) == {"own"} and card.settings["own"].low == 0.5  # no negative variance
