"""Each term of a method's loss by its name, from the trainer's word to log, status, histories and report."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learning
import pytest
from command_line import run
from federations import FederationOf
from trained_state import make_state

from hsl_node.federation.config import AnchorCard
from hsl_node.federation.names import Peer
from hsl_node.host.layout import Layout
from hsl_node.node.alarms import Alarms
from hsl_node.node.training import Training
from hsl_node.results import report
from hsl_node.status.page import Look, fetch, render
from hsl_node.study.simulate import simulate
from hsl_node.sync.store.journal import Journal

TERMS = {
    "fedprox": ["primary", "proximal"],
    "hsl": ["primary", "anchor"],
    "fedrcl": ["primary", "contrast", "relaxation"],
}


def four_digits(value: float) -> str:
    return f"{value:.4g}"


@pytest.mark.parametrize("method", TERMS)
def test_the_terms_of_a_real_run_have_their_names_and_means_wherever_they_are_told(
    tmp_path: Path, federation_of: FederationOf, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Two rounds of two epochs are trained; the daemon's own code keeps what the trainer says."""
    plan = learning.small_plan(method=method)
    card = AnchorCard(name="blobs", fingerprint="a" * 64, images=24, image_size=32) if method == "hsl" else None
    state = make_state(tmp_path, federation_of(2, plan=plan, anchor=card), "ash")
    events: list[dict[str, Any]] = []
    simulate({Peer("ash"): learning.site(plan, peer="ash")}, tmp_path / "run", lambda _, event: events.append(event))
    epochs = [event for event in events if event["event"] == "epoch"]
    means = [event["terms"] for event in epochs]
    assert [list(of) for of in means] == [TERMS[method]] * 4
    assert len({mean for of in means for mean in of.values()}) == 4 * len(TERMS[method]), "no two are the same"
    with caplog.at_level(logging.INFO), Journal.create(Layout(state).journal) as journal:
        here: Any = SimpleNamespace(journal=journal, layout=Layout(state))
        for event in epochs:
            Training(here, Alarms(), None)._heard(event)

    by_name = [{name: four_digits(mean) for name, mean in of.items()} for of in means]
    logged = [vars(record)["terms"] for record in caplog.records if record.message == "epoch"]
    assert logged == [", ".join(f"{name} {mean}" for name, mean in of.items()) for of in by_name]

    found = fetch(state)
    assert found.loss_terms is not None and {term.name: term.mean for term in found.loss_terms.terms} == means[-1]
    (line,) = (
        line for line in render(found, now=0.0, look=Look(width=200)).splitlines() if line.startswith("loss terms")
    )
    assert line.split(maxsplit=2)[2] == f"{logged[-1]} (round 2, epoch 2)"

    rounds = json.loads(run("--state", state, "round", "history", "--json").stdout)
    assert [one["terms"] for one in rounds] == [means[1], means[3]], "of each round's last epoch"
    titles, *rows = (line.split() for line in run("--state", state, "round", "history").stdout.splitlines())
    at = titles.index("primary")
    assert titles[at : at + len(TERMS[method])] == TERMS[method]
    for row, of in zip(rows, (by_name[1], by_name[3]), strict=True):
        assert " ".join(of.values()) in " ".join(row)

    page = report.build([state], tmp_path / "report.html").read_text(encoding="utf-8")
    text = " ".join(
        re.sub(r"<[^>]*>", " ", page.partition("<h2>Terms of the loss</h2>")[2].partition("</section>")[0]).split()
    )
    for name in TERMS[method]:
        lowest = min(range(4), key=lambda n, name=name: means[n][name])  # type: ignore[misc]
        first, last, least = (f"{by_name[n][name]} round {n // 2 + 1}, epoch {n % 2 + 1}" for n in (0, 3, lowest))
        assert f"{name} {first} {last} {least}" in text
    assert " ".join(f"round {n // 2 + 1} {n % 2 + 1} {' '.join(by_name[n].values())}" for n in range(4)) in text
    own = ", ".join(TERMS[method][1:]) if method != "hsl" else ""
    assert ("plus the method&#39;s own: " in page) == bool(own) and own in page
