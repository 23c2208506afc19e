"""Train alone: FedAvg's classifier, never fused. The lower reference, in the simulation only.

For HSL's own model without its federation see `train_alone` in alone.py, which any method has.
"""

from __future__ import annotations

from dataclasses import replace

from hsl_node.train.methods.fedavg import FEDAVG

LOCAL = replace(FEDAVG, name="local")
