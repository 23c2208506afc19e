"""Swarm learning (Warnat-Herresthal et al., Nature 2021): merging without a server, by mean or by a median.

Exact: the merges, each a fusion rule that the plan names (`fusion = "mean"`, the default, "weighted_mean", "median",
"geometric_median"); no leader is elected, as every peer merges for itself. Adapted: one merge a round instead of one
every so many batches, and no adaptive frequency of merging: a round's length is the plan's. Training is plain.
"""

from __future__ import annotations

from dataclasses import replace

from hsl_node.train.methods.fedavg import FEDAVG

SWARM = replace(FEDAVG, name="swarm")
