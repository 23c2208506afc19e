"""One image file -> one small uint8 square, as training, `predict` and everybody else sees it.

Content decides what a file is, not its name. Shapes: (S, S) grey, (S, S, 3) colour; S in px.

    dicom.py   grey-scale chain, frames, patients        picture.py   PNG, JPEG, TIFF and other pictures, by Pillow
    pixels.py  numbers -> bytes -> square                preprocessing.py   the rules, as a value
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hsl_node.train.data import dicom, picture
from hsl_node.train.data.pixels import UnreadableImage, as_bytes, to_square
from hsl_node.train.data.preprocessing import Preprocessing

Array = NDArray[Any]

IMAGE_SUFFIXES = frozenset(  # named so, a file is told as damaged where it is no image
    {".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".pgm", ".ppm"}
    | {".dcm", ".dicom", ".ima"}
)
HEAD_BYTES = 1024  # enough for every mark, and for the class in a DICOM file's first group


@dataclass(frozen=True)
class Outline:
    """What is in a file before anything is decoded."""

    frames: int  # or pages; 1: a single image
    height: int  # px, as it is shown
    width: int


def decode(image: Path | bytes, preprocessing: Preprocessing) -> Array:
    """One image file, or its content -> (S, S) grey or (S, S, 3) colour, uint8.

    Raises:
        UnreadableImage: missing, damaged, or of a kind we cannot read.
    """
    content = image if isinstance(image, bytes) else content_of(image)
    with _unreadable(content):
        kind = dicom if dicom.is_dicom(content) else picture
        pixels: Array = kind.pixels_of(content, preprocessing.frame, preprocessing.window)
        return to_square(pixels, preprocessing.image_size, preprocessing.fit)


def decode_array(pixels: Array, preprocessing: Preprocessing) -> Array:
    """As `decode`, from an array (H, W), (H, W, 1) or (H, W, 3) of an .npz file. No window: it is not a scanner's."""
    with _unreadable(b""):
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        return to_square(as_bytes(pixels, None), preprocessing.image_size, preprocessing.fit)


def content_of(path: Path) -> bytes:
    """Raises: UnreadableImage."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UnreadableImage(f"cannot be opened: {exc.strerror}") from None


def looks_like_image(path: Path) -> bool:
    """Is it worth decoding? By its name or its first bytes: a damaged `.png` is told as damaged, not passed over.

    So is a file that cannot be opened, and a link with such a name to where nothing is. A DICOMDIR is none: it lists
    images and holds none.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES or not path.is_file():
        return path.is_file() or (path.is_symlink() and path.suffix.lower() in IMAGE_SUFFIXES)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return True
    return not dicom.is_directory(head) if dicom.is_dicom(head) else picture.is_picture(head)


def outline(path: Path) -> Outline | None:
    """From the file's header alone; None where that cannot be told."""
    try:
        with open(path, "rb") as file:
            kind = dicom if dicom.is_dicom(file.read(HEAD_BYTES)) else picture
            file.seek(0)
            return Outline(*kind.outline(file))
    except Exception:  # decoding tells what is wrong with it
        return None


def count_frames(path: Path) -> int:
    """Frames or pages that the file holds; 1 where that cannot be told."""
    found = outline(path)
    return found.frames if found else 1


def dicom_owner(content: bytes) -> tuple[str, str]:
    """PatientID and StudyInstanceUID of a DICOM file, or "". For hashing only: never shown, logged or stored."""
    if not dicom.is_dicom(content):
        return "", ""
    with _unreadable(content):
        return dicom.owner_of(content)


@contextmanager
def _unreadable(content: bytes) -> Iterator[None]:
    """Decoders fail in many ways on damaged files, and their words may quote the file: only the kind is kept."""
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as exc:
        if dicom.is_dicom(content):
            raise UnreadableImage(
                "is a DICOM file that is cut short, damaged, or does not describe its pixels"
            ) from None
        raise UnreadableImage(picture.why_not(content, exc)) from None
