"""Small pictures, folders, tables and DICOM files for the tests of the data side."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hsl_node.train.data.images import decode
from hsl_node.train.data.preprocessing import Preprocessing, Window

Array = NDArray[Any]


def real_data(name: str) -> Path:
    """A folder of real images; the test is skipped where it is not there."""
    root = Path(os.environ.get("HSL_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    if not (root / name).exists():
        pytest.skip(f"no real images here: {name} (set HSL_TEST_DATA)")
    return root / name


def decode_image(image: Path | bytes, size: int, window: Window | None = None, **rules: Any) -> Array:
    """As training sees it, with the plan's defaults but for `rules`."""
    return decode(image, Preprocessing(image_size=size, window=window, **rules))


def noise(seed: int, size: tuple[int, int] = (20, 24), dark: bool = False) -> Array:
    """A grey picture, different for every seed. (H, W) uint8."""
    return np.random.default_rng(seed).integers(0, 120 if dark else 256, size, dtype=np.uint8)


def write_png(path: Path, pixels: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_folders(root: Path, counts: dict[str, int], first_seed: int = 0) -> Path:
    """root/<class>/<n>.png"""
    seed = first_seed
    for name, count in counts.items():
        for n in range(count):
            write_png(root / name / f"{n:03d}.png", noise(seed))
            seed += 1
    return root


def write_table(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    """A CSV; every `path` that does not exist yet becomes a picture of its own."""
    for n, row in enumerate(rows):
        image = path.parent / row["path"].replace("\\", "/")
        if not image.exists():
            write_png(image, noise(1000 + n))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_dicom(path: Path, pixels: Array, **tags: Any) -> Path:
    """pixels: (H, W), (frames, H, W) or (H, W, 3); tags override what follows from them."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    header.PatientID = tags.pop("PatientID", "P1")
    header.SamplesPerPixel = 3 if colour else 1
    header.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    header.Rows, header.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    if colour:
        header.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        header.NumberOfFrames = len(pixels)
    header.BitsAllocated = header.BitsStored = pixels.dtype.itemsize * 8
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in tags.items():
        setattr(header, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path
