"""Images in an .npz file: `images` + `labels`, or `train_images` + `train_labels` and the same for val and test."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.errors import DataError, DataUnavailable
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.sources import SPLIT_WORDS, Item, Source, first_few

Array = NDArray[Any]


def read_npz(path: Path, data: DataConfig) -> Source:
    """Pixels stay on disk. What the numbers of the labels mean is what `class_names` says, else nothing.

    Raises:
        DataError: not such a file, or another number of labels than of images.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            called = {name.casefold(): name for name in file.files}
            images = [name for name in file.files if name.casefold().endswith("images")]
            pairs = {name: called.get(f"{name.casefold().removesuffix('images')}labels") for name in images}
            labels = {name: np.asarray(file[of]) for name, of in pairs.items() if of}
            names = tuple(_words(np.atleast_1d(file["class_names"]).ravel())) if "class_names" in file.files else ()
            headers = {name: _header(file, name) for name in labels}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        why = "it holds some" if "pickle" in str(exc).casefold() else str(exc)
        if not isinstance(exc, OSError) and not zipfile.is_zipfile(path):
            why = "it is no archive of arrays, or is cut short"
        raise DataError(
            f"{path.name}: cannot be read as .npz without pickled objects: {why}",
            remedy="save it anew with numpy.savez, of arrays of numbers or of words",
        ) from exc
    alone = [name for name, of in pairs.items() if not of]
    if alone or not labels:
        raise DataError(
            f"{path.name}: no labels for {', '.join(alone)}" if alone else f"{path.name}: no arrays images and labels",
            remedy="also train_images, train_labels, val_..., test_...",
        )
    prefixes = {name: name.casefold().removesuffix("images").strip("_") for name in labels}
    if strange := [name for name, prefix in prefixes.items() if prefix and prefix not in SPLIT_WORDS]:
        raise DataError(
            f"{path.name}: {', '.join(strange)}: neither train, val nor test",
            remedy="save it without these arrays, or under one of these names",
        )
    unread = sorted(set(called.values()) - labels.keys() - set(pairs.values()) - {"class_names"})
    doubts = [f"{path.name}: not read: {', '.join(first_few(unread))}"] * bool(unread)
    items: list[Item] = []
    for array, values in labels.items():
        values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        if values.ndim != 1 or values.dtype.kind not in "iuUbS":
            raise DataError(
                f"{path.name}: labels of {array} are not one whole number or word per image"
                f" ({values.dtype.name}, shape {values.shape})",
                remedy="save them anew, e.g. labels.argmax(axis=1) of a column per class, labels.astype(int) of 1.0",
            )
        shape, dtype = headers[array]
        if len(values) != (shape[0] if shape else 0):
            raise DataError(
                f"{path.name}: {array} holds {shape[0] if shape else 0} images, its labels are {len(values)}",
                remedy="save both anew, from the same list",
            )
        if dtype.kind not in "iufb" or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise DataError(
                f"{path.name}: {array} holds {dtype.name} of shape {shape}: not numbers of shape (N, H, W),"
                " (N, H, W, 1) or (N, H, W, 3)",
                remedy="save it anew: channels last, without transparency, one slice of a volume each",
            )
        if dtype not in (np.uint8, np.bool_):
            doubts.append(
                f"{path.name}: {array} holds {dtype.name}: each image's own smallest and largest value become black and"
                " white. To keep what is common to all, save them as uint8"
            )
        split = None if data.columns else SPLIT_WORDS.get(prefixes[array])
        for n, word in enumerate(_words(values)):
            if word.isdecimal() and int(word) < len(names):
                word = names[int(word)]
            items.append(Item(f"{path.name} {array}[{n}]", word, path, (array, n), split=split))
    return Source(tuple(items), len(items), unit="images", root=path.parent, doubts=tuple(doubts))


def _words(values: Array) -> list[str]:
    """Numbers and words as words, stripped as those of a table."""
    if values.dtype.kind == "b":
        return [str(int(value)) for value in values]
    return [(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v)).strip() for v in values.tolist()]


def npz_array(path: Path, name: str) -> Array:
    """One array of an .npz file: read once to digest its images, and once more to decode them.

    Raises:
        DataUnavailable: it could be read a moment ago.
        DataError: it is damaged inside.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            array: Array = file[name]
    except OSError as exc:
        raise DataUnavailable(
            f"{path.name} cannot be read: {exc.strerror}",
            remedy="see that its share, or its disk, is sound and mounted",
        ) from exc
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        raise DataError(f"{path.name}: {name} is damaged or cut short", remedy="copy the file anew") from exc
    return array


def _header(file: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array, from its header alone: the pixels may be gigabytes."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects")
    return shape, dtype
