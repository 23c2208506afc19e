"""What a federation is compared with and does itself never do: FedAvg's classifier alone, on pooled images, and split.

Exact: each is plain training of the same network; who trains with what is the simulation's (study/simulate.py,
study/splitavg.py). Adapted in SplitAVG: the plan's optimizer, which keeps its state. For a hospital's own model without
its federation see `train_alone` in alone.py: any method has it.
"""

from __future__ import annotations

from dataclasses import replace

from hsl_node.train.methods.fedavg import FEDAVG

LOCAL = replace(FEDAVG, name="local")
CENTRAL = replace(FEDAVG, name="central")
SPLITAVG = replace(FEDAVG, name="splitavg")
