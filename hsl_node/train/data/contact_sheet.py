"""A page of thumbnails per class and split: the quickest way to see that labels, windows and orientation are right.

It shows patients' images: written for this user only (0600), never sent anywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hsl_node.federation.plan import Plan
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.files import replacing
from hsl_node.train.data.sources import SPLIT_NAMES

THUMBNAIL, STEP, MARGIN, CAPTION = 96, 102, 32, 30  # px; STEP from one thumbnail to the next
COLUMNS, ROWS = 4, 3  # thumbnails of one class and split
BLOCK_WIDTH, BLOCK_HEIGHT = COLUMNS * STEP + MARGIN, CAPTION + ROWS * STEP + MARGIN  # px
CLASSES_MAX = 20  # rows of blocks on one sheet; a plan with more classes shows the first
LETTERS_MAX = 28  # of a class above its block; more would run into the next

BACKGROUND, TEXT = (18, 22, 28), (236, 240, 245)


def contact_sheet(dataset: Dataset, plan: Plan, path: Path) -> None:
    """Write a PNG. Which images it shows follows their digests: the same data give the same sheet."""
    classes = plan.classes[:CLASSES_MAX]
    top = 2 * MARGIN + CAPTION
    size = (MARGIN + len(SPLIT_NAMES) * BLOCK_WIDTH, top + len(classes) * BLOCK_HEIGHT)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    facts = f"{len(dataset.ids)} images, shown at {plan.image_size} px as the model sees them"
    draw.text((MARGIN, MARGIN - 8), f"{plan.task}\n{facts}; patient images: for this screen only", fill=TEXT, font=font)
    for label, name in enumerate(classes):
        for split, side in enumerate(SPLIT_NAMES):
            x, y = MARGIN + split * BLOCK_WIDTH, top + label * BLOCK_HEIGHT
            numbers = np.flatnonzero((dataset.labels == label) & (dataset.split == split)).tolist()
            draw.text((x, y), f"{side} {len(numbers)}: {name[:LETTERS_MAX]}", fill=TEXT, font=font)
            shown = sorted(numbers, key=lambda n: dataset.ids[n])[: COLUMNS * ROWS]
            for place, number in enumerate(shown):
                picture = Image.fromarray(np.asarray(dataset.images[number])).resize((THUMBNAIL, THUMBNAIL))
                sheet.paste(picture, (x + place % COLUMNS * STEP, y + CAPTION + place // COLUMNS * STEP))
    with replacing(path) as file:
        sheet.save(file, format="PNG", optimize=True)
