"""A method may come of another package than hsl-node: the same one everywhere, or it is told before training."""

from __future__ import annotations

import pytest

from hsl_node.errors import FederationMismatch
from hsl_node.sync.manifest import Manifest, require_same_setup

SCHEMA = "0" * 64


def manifest_of(software: str) -> Manifest:
    return Manifest.model_construct(peer="birch", anchor=None, schema_=SCHEMA, software=software)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("hsl-node 1, torch 2, huber 1.0", "hsl-node 1, torch 3, huber 1.1", "huber 1.0, this node from huber 1.1"),
        ("hsl-node 1, torch 2", "hsl-node 1, torch 2, huber 1.1", "none, this node from huber 1.1"),
        ("hsl-node 1, torch 2, \x1b[8m", "hsl-node 1, torch 2", r"\\x1b\[8m, this node from none"),
    ],
)
def test_threat_28_a_method_of_another_package_or_version_is_named(theirs: str, ours: str, said: str) -> None:
    with pytest.raises(FederationMismatch, match=f"birch has the plan's method from package {said}"):
        require_same_setup(manifest_of(theirs), anchor=None, schema=SCHEMA, software=ours)


def test_versions_of_hsl_node_and_torch_may_differ_while_the_package_is_the_same() -> None:
    for more in ("", ", huber 1.0"):
        theirs, ours = f"hsl-node 1, torch 2{more}", f"hsl-node 2, torch 3{more}"
        require_same_setup(manifest_of(theirs), anchor=None, schema=SCHEMA, software=ours)
