"""Labelled images from elsewhere, for `evaluate --data`: prepared as this site's own, and none that it learned from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hsl_node.errors import DataError
from hsl_node.federation.config import load_federation
from hsl_node.federation.node_toml import DataConfig
from hsl_node.host.layout import Layout
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.gathering import read_images, unreadable_error
from hsl_node.train.data.ledger import read_ledger
from hsl_node.train.data.sources import ANCHOR_BUILD, TEST
from hsl_node.train.progress import Progress, unheard

LEFT_OUT = -1  # no part of a split


@dataclass(frozen=True)
class External:
    dataset: Dataset  # all of it test, but what is left out
    left_out: int  # images that are this site's own, or whose patients were trained or validated on here


def open_external(state: Path, data: DataConfig, progress: Progress = unheard) -> External:
    """The images of `data`, decoded as the plan and its window say.

    Raises:
        DataError: no images, a label that is no class; images that cannot be read, by name: for the own terminal.
        LocalStateError: the disk is full, or the split ledger is damaged.
    """
    plan, layout = load_federation(state).plan, Layout(state)
    gathered, pixels = read_images(data, plan, layout.cache, progress, tells_all=True, asked=ANCHOR_BUILD)
    if gathered.unreadable:
        raise unreadable_error(gathered, gathered.source.name, "mend or leave out these files; nothing was measured")
    if pixels is None:
        raise DataError("no image there has a label", remedy="see data.labels in node.toml, which counts here too")
    pages = read_ledger(layout.splits).values()
    learned = {key for page in pages for key, split in page.items() if split != TEST}
    own = {key for page in pages for key in page}  # its test images too: who looks at those is to be counted
    foreign = [i.sha256 not in own and not {i.key, *i.spellings} & learned for i in gathered.images]
    dataset = Dataset(
        images=pixels,
        labels=np.array([image.label for image in gathered.images], np.int64),
        split=np.where(foreign, TEST, LEFT_OUT).astype(np.int8),
        ids=tuple(image.sha256 for image in gathered.images),
        patients=tuple(image.patient for image in gathered.images),
    )
    return External(dataset, len(foreign) - sum(foreign))
