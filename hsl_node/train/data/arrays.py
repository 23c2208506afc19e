"""Images in an .npz file: `images` + `labels`, or `train_images` + `train_labels` and the same for val and test."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.errors import DataError, DataUnavailable
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.sources import SPLIT_WORDS, Asked, Item, Source

Array = NDArray[Any]


def read_npz(path: Path, data: DataConfig, asked: Asked) -> Source:
    """Pixels stay on disk. What the numbers of the labels mean is what `class_names` says, else nothing.

    Raises:
        DataError: not such a file, or another number of labels than of images.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            pairs = [(k, f"{k.removesuffix('images')}labels") for k in file.files if k.endswith("images")]
            labels = {images: np.asarray(file[name]) for images, name in pairs if name in file.files}
            alone = [images for images, name in pairs if name not in file.files]
            names = tuple(str(n) for n in file["class_names"]) if "class_names" in file.files else ()
            counts = {images: _length(file, images) for images in labels}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as exc:
        raise DataError(
            f"{path.name}: cannot be read as .npz without pickled objects: {exc}", remedy="save it anew"
        ) from exc
    if alone or not labels:
        raise DataError(
            f"{path.name}: no labels for {', '.join(alone)}" if alone else f"{path.name}: no arrays images and labels",
            remedy="also train_images, train_labels, val_..., test_...",
        )
    items: list[Item] = []
    for images, values in labels.items():
        values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        if values.ndim != 1 or values.dtype.kind not in "iuUb":
            raise DataError(f"{path.name}: labels of {images} are not one number or word per image", remedy="mend them")
        if len(values) != counts[images]:
            raise DataError(
                f"{path.name}: {images} holds {counts[images]} images, its labels are {len(values)}",
                remedy="save both anew, from the same list",
            )
        prefix = images.removesuffix("images").strip("_").casefold()
        split = None if data.columns else SPLIT_WORDS.get(prefix)
        for n, value in enumerate(values.tolist()):
            word = str(int(value)) if values.dtype.kind != "U" else value
            if word.isdecimal() and int(word) < len(names):
                word = names[int(word)]
            items.append(Item(f"{path.name} {images}[{n}]", word, path, (images, n), split=split))
    return Source(tuple(items), len(items), unit="images", root=path.parent)


def npz_array(path: Path, name: str) -> Array:
    """One array of an .npz file: read once to digest its images, and once more to decode them.

    Raises:
        DataUnavailable: it could be read a moment ago.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            array: Array = file[name]
    except OSError as exc:
        raise DataUnavailable(
            f"{path.name} cannot be read: {exc.strerror}",
            remedy="see that its share, or its disk, is sound and mounted",
        ) from exc
    return array


def _length(file: Any, name: str) -> int:
    """Images in an array, from its header alone: the pixels may be gigabytes."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError(f"{name} holds objects")
    return int(shape[0]) if shape else 0
