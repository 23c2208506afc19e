"""Federated averaging (McMahan et al. 2017): one plain classifier, w = sum of n_k / n * w_k.

Exact: the weighting by training images, buffers included. Adapted: every peer takes part in every round and computes
the same average itself; local epochs and schedule are the plan's.
"""

from __future__ import annotations

from hsl_node.train.method import Method, task_loss
from hsl_node.train.networks.classifier import CLASSIFIER
from hsl_node.train.updates import descend

FEDAVG = Method("fedavg", CLASSIFIER, passes=(descend(task_loss),))
