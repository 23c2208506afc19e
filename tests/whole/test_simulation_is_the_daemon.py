"""For every method: what three real daemons fuse is what the simulation fuses, byte for byte."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import tomli_w
from cluster import Cluster, final_digests
from every_method import IDLE_FIRST_ROUND, PEERS, SIZES, plan_for, runnable
from PIL import Image

from hsl_node.federation.config import AnchorCard
from hsl_node.federation.methods import Need
from hsl_node.federation.names import Peer
from hsl_node.study.simulate import simulate
from hsl_node.train.data import anchor as anchors
from hsl_node.train.site import open_site

PX = 16


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each, of unlike size and brightness, with a folder for each class."""
    folder = tmp_path_factory.mktemp("hospitals")
    for number, peer in enumerate(PEERS):
        rng = np.random.default_rng(number)
        for label, level in (("negative", 80 + 20 * number), ("positive", 140 + 20 * number)):
            (folder / peer / label).mkdir(parents=True)
            for i in range(SIZES[peer]):
                image = rng.normal(level, 30, (20, 20)).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / peer / label / f"{i}.png")
    return folder


def cluster_of(root: Path, method: str, hospitals: Path) -> Cluster:
    rounds = 2 + (method in IDLE_FIRST_ROUND)  # fedppkt's generator is refined from the third on
    plan = plan_for(method, image_size=PX, rounds=rounds, epochs_per_round=1 if method != "hsl" else 2)
    card = None
    node: dict[str, Any] = {"train": {"threads": 1, "device": "cpu"}}
    if plan.backbone_weights:
        node["train"]["backbone_weights"] = str(learning.encoder_file()[0])
    if Need.ANCHOR in plan.card.needs:
        made, path = anchors.digits_standin(PX, n=20), root / "anchor.safetensors"
        fingerprint = anchors.save(made, path)
        card = AnchorCard(name=made.name, fingerprint=fingerprint, images=len(made.labels), image_size=PX)
        node["anchor"] = str(path)
    cluster = Cluster(root / "nodes", PEERS, plan, trainer=None, anchor=card, node=node)
    for peer in PEERS:
        toml = cluster.layout(peer).state / "node.toml"
        content = tomllib.loads(toml.read_text())
        toml.write_text(tomli_w.dumps({**content, "data": {"path": str(hospitals / peer)}}))
    return cluster


@pytest.mark.sample(3, "real daemons with real trainers")
@pytest.mark.parametrize("method", runnable())
def test_three_daemons_fuse_what_the_simulation_fuses(tmp_path: Path, hospitals: Path, method: str) -> None:
    with cluster_of(tmp_path, method, hospitals) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        daemons = final_digests(cluster)
        sites = {Peer(peer): open_site(cluster.layout(peer).state) for peer in PEERS}
    simulated = {done.round: done.sha256 for done in simulate(sites, tmp_path / "simulation")}
    assert simulated == {0: simulated[0], **daemons}
    assert len(set(simulated.values())) == 3  # nothing stood still, but for an idle first round
