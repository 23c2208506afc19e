"""A page of thumbnails per class and split: the quickest way to see that labels, windows and orientation are right.

It shows patients' images: written for this user only (0600), never sent anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hsl_node.federation.plan import Plan
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.files import replacing
from hsl_node.train.data.sources import SPLIT_NAMES

Array = NDArray[Any]

# px
THUMBNAIL, GAP, MARGIN = 96, 6, 32
BLOCK_GAP, CAPTION, TITLE = 28, 30, 64
COLUMNS = (5, 3, 4)  # thumbnails across, for train, validation, test
ROWS = 3
CLASSES_MAX = 20  # rows of blocks on one sheet; a plan with more classes shows the first

BACKGROUND, PANEL, TEXT, QUIET = (18, 22, 28), (28, 34, 43), (236, 240, 245), (140, 152, 168)
ACCENTS = ((96, 165, 250), (251, 191, 36), (52, 211, 153))  # train, validation, test


def contact_sheet(dataset: Dataset, plan: Plan, path: Path) -> None:
    """Write a PNG. Which images it shows follows their digests: the same data give the same sheet."""
    classes = plan.classes[:CLASSES_MAX]
    block_height = CAPTION + ROWS * (THUMBNAIL + GAP) - GAP
    width = 2 * MARGIN + sum(_across(s) for s in range(3)) + 2 * BLOCK_GAP
    height = MARGIN + TITLE + len(classes) * (block_height + BLOCK_GAP) + MARGIN - BLOCK_GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(size=24), ImageFont.load_default(size=14)
    draw.text((MARGIN, MARGIN - 4), _fitting(plan.task, title, width * 0.6), fill=TEXT, font=title)
    facts = f"{len(dataset.ids)} images, shown at {plan.image_size} px as the model sees them"
    draw.text((width - MARGIN, MARGIN + 6), facts, fill=QUIET, font=small, anchor="ra")
    draw.text((MARGIN, MARGIN + 30), "patient images: for this screen only", fill=QUIET, font=small)
    top = MARGIN + TITLE
    for label, name in enumerate(classes):
        left = MARGIN
        for split in range(3):
            numbers = np.flatnonzero((dataset.labels == label) & (dataset.split == split))
            _block(sheet, (left, top), split, name, [int(n) for n in numbers], dataset)
            left += _across(split) + BLOCK_GAP
        top += block_height + BLOCK_GAP
    with replacing(path) as file:
        sheet.save(file, format="PNG", optimize=True)


def _block(
    sheet: Image.Image, at: tuple[int, int], split: int, name: str, numbers: list[int], dataset: Dataset
) -> None:
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    left, top = at
    draw.rounded_rectangle((left, top + 3, left + 4, top + CAPTION - 10), radius=2, fill=ACCENTS[split])
    count = f"{SPLIT_NAMES[split]}  {len(numbers)}"
    room = _across(split) - 24 - font.getlength(count)
    draw.text((left + 12, top + 1), _fitting(name, font, room), fill=TEXT, font=font)
    draw.text((left + _across(split), top + 1), count, fill=QUIET, font=font, anchor="ra")
    chosen = sorted(numbers, key=lambda n: dataset.ids[n])[: COLUMNS[split] * ROWS]
    for place in range(COLUMNS[split] * ROWS):
        x = left + place % COLUMNS[split] * (THUMBNAIL + GAP)
        y = top + CAPTION + place // COLUMNS[split] * (THUMBNAIL + GAP)
        if place < len(chosen):
            sheet.paste(_thumbnail(dataset.images[chosen[place]]), (x, y))
        else:
            draw.rectangle((x, y, x + THUMBNAIL - 1, y + THUMBNAIL - 1), fill=PANEL)


def _thumbnail(image: Array) -> Image.Image:
    picture = Image.fromarray(np.asarray(image)).convert("RGB")
    larger = image.shape[0] < THUMBNAIL
    return picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC if larger else Image.Resampling.LANCZOS)


def _across(split: int) -> int:
    return COLUMNS[split] * (THUMBNAIL + GAP) - GAP


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float) -> str:
    """Cut off what would run into the next caption."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"
