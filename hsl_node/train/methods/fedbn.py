"""FedBN (Li et al. 2021): all is averaged but the normalisation layers, which stay each hospital's own.

Exact: parameters and statistics of every such layer stay, found by type; plain mean of the rest. Assumed: LayerNorm and
GroupNorm stay too, by the paper's reasoning. A hospital uses its own layers with the fused rest; for a site outside the
federation the paper has no model, and an exported one carries the layers of the hospital that exported it.
"""

from __future__ import annotations

from dataclasses import replace

from hsl_node.train.method import all_but, norm_tensors
from hsl_node.train.methods.fedavg import FEDAVG

FEDBN = replace(FEDAVG, name="fedbn", travels=all_but(norm_tensors))
