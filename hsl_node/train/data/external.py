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
from hsl_node.train.data.gathering import read_images
from hsl_node.train.data.ledger import read_ledger
from hsl_node.train.data.sources import ANCHOR_BUILD, TEST, first_few
from hsl_node.train.progress import Progress, unheard


@dataclass(frozen=True)
class External:
    dataset: Dataset  # all of it test
    left_out: int  # images that were trained or validated on here, or whose patients were


def open_external(state: Path, data: DataConfig, progress: Progress = unheard) -> External:
    """The images of `data`, decoded as the plan and its window say.

    Raises:
        DataError: no images, a label that is no class; images that cannot be read, by name: for the own terminal.
        LocalStateError: the disk is full, or the split ledger is damaged.
    """
    plan, layout = load_federation(state).plan, Layout(state)
    gathered, pixels = read_images(data, plan, layout.cache, progress, tells_all=True, asked=ANCHOR_BUILD)
    if gathered.unreadable:
        named = first_few(f"{gathered.source.name(item)}: {reason}" for item, reason in gathered.unreadable)
        every = len(gathered.items) + len(gathered.unreadable)
        raise DataError(
            "\n".join([f"{len(gathered.unreadable)} of {every} images cannot be read", *named]),
            remedy="mend or leave out these files; nothing was measured",
        )
    if pixels is None:
        raise DataError("no image there has a label", remedy="see data.labels in node.toml, which counts here too")
    learned = {key for page in read_ledger(layout.splits).values() for key, split in page.items() if split != TEST}
    keep = [n for n, image in enumerate(gathered.images) if not {image.sha256, image.key, *image.spellings} & learned]
    images = [gathered.images[n] for n in keep]
    dataset = Dataset(
        images=pixels[keep],
        labels=np.array([image.label for image in images], np.int64),
        split=np.full(len(images), TEST, np.int8),
        ids=tuple(image.sha256 for image in images),
        patients=tuple(image.patient for image in images),
    )
    return External(dataset, len(gathered.images) - len(images))
