"""FedCOME (arXiv 2311.12358): plain training, and a fusion in which no hospital's update goes against another's.

Exact: each update gives way to the nearest vector that has no negative product with any update, then the mean by images
(the fusion `come`, weights/combinations.py), over all weights at once. Adapted: the plan's optimizer; `clip`, how far a
fusion moves a number at most, is 0.005 with the published SGD and off here, since Adam's steps are larger. Assumed:
BatchNorm's statistics take the mean by images. Where updates point in all directions the only such vector is 0, and the
model stands still: the log says so.
"""

from __future__ import annotations

from dataclasses import replace

from hsl_node.train.methods.fedavg import FEDAVG

FEDCOME = replace(FEDAVG, name="fedcome")
