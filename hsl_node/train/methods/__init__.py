"""The learning methods by the name they have in the plan. Explicit; nothing is imported by string."""

from __future__ import annotations

from hsl_node.train.method import Method
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.methods.hsl import HSL
from hsl_node.train.methods.local import LOCAL

METHODS: dict[str, Method] = {m.name: m for m in (HSL, FEDAVG, LOCAL)}
