"""Pictures that Pillow reads -> grey or RGB bytes, turned as the file says."""

from __future__ import annotations

import io
import warnings
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from hsl_node.train.data.pixels import UnreadableImage, as_bytes
from hsl_node.train.data.preprocessing import Window

Array = NDArray[Any]

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM")
WITH_FRAMES = ("TIFF", "PNG", "WEBP", "GIF")  # what else has several pictures (MPO, gain map) has one and its helpers
_ORIENTATION, _PHOTOMETRIC, _NEW_SUBFILE_TYPE, _SAMPLE_FORMAT = 274, 262, 254, 339  # tags of TIFF and EXIF
_UNSIGNED, _SIGNED = 1, 2  # of Sample Format
NOT_ONLY_BYTES = ("I", "F")  # modes of Pillow for more than 8 bits, beside those that begin with I;16

NO_KIND = "is no PNG, JPEG, TIFF, BMP, WebP, GIF, JPEG 2000, PGM, PPM or DICOM image, or is damaged"
_VIDEO = "is a video: save the frames that matter as images"

# What a file begins with, for those that are read and for those whose name helps a person further.
READ = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"P5\n": "PGM",
    b"P6\n": "PPM",
}
NOT_READ = {
    b"PK\x03\x04": "is a ZIP archive, no image",
    b"\x1f\x8b": "is compressed with gzip: unpack it",
    b"7z\xbc\xaf": "is a 7z archive, no image",
    b"%PDF": "is a PDF document, no image",
    b"<": "is a web page or XML, no image",
    b"\x1aE\xdf\xa3": _VIDEO,
    b"\0\0\x01\xba": _VIDEO,
    b"\0\0\x01\xb3": _VIDEO,
    b"\x93NUMPY": "is a NumPy array: save it as PNG, or several in an .npz file",
    b"\x89HDF": "is HDF5: save its images as PNG",
    b"8BPS": "is a Photoshop file: save it as PNG",
    b"NRRD": "is NRRD: save its slices as DICOM or 16-bit PNG",
}
_HEIF_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")

warnings.filterwarnings("ignore", module=r"PIL\.")  # they may quote a file's text, and would go to the terminal


def is_picture(head: bytes) -> bool:
    return _kind_read(head) is not None


def pixels_of(content: bytes, frame: Literal["middle", "first"], window: Window | None) -> Array:
    """(H, W) grey or (H, W, 3) RGB, uint8, of the file's content."""
    image = _open(io.BytesIO(content))
    pages = _pages(image)
    image.seek(pages[len(pages) // 2 if frame == "middle" else 0])
    halved = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) and image.mode in ("LA", "RGB", "RGBA")
    image.load()
    if halved:
        _require_upper_bits(image)
    numbers = _numbers(image)
    white_is_zero = _tag(image, _PHOTOMETRIC, 1) == 0
    image = ImageOps.exif_transpose(image)
    if image.mode in NOT_ONLY_BYTES or image.mode.startswith("I;16"):
        grey = as_bytes(np.asarray(image).view(numbers) if numbers else np.asarray(image), window)
        return 255 - grey if white_is_zero else grey  # Pillow inverts up to 8 bits by itself
    if image.has_transparency_data:
        image = _on_black(image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    return np.asarray(image.convert("RGB"))


def outline(file: BinaryIO) -> tuple[int, int, int]:
    """Pages, height and width in px, as it is shown: without decoding."""
    image = _open(file)
    width, height = image.size
    if image.getexif().get(_ORIENTATION, 1) >= 5:  # lies on its side
        width, height = height, width
    return len(_pages(image)), height, width


def why_not(content: bytes, exc: Exception) -> str:
    """Words for a failure of Pillow or pydicom. They hold nothing of the file but its kind."""
    if not content:
        return "is empty"
    if isinstance(exc, Image.DecompressionBombError):
        return "has more pixels than Pillow reads safely"
    kind = _kind_read(content)
    if kind is None and isinstance(exc, UnidentifiedImageError):
        return _not_read(content) or NO_KIND
    if kind is not None and isinstance(exc, (OSError, SyntaxError, EOFError)):
        return f"is a {kind} image of an unusual kind, or is cut short or damaged"
    return f"cannot be decoded: damaged, or of an unusual kind ({type(exc).__name__})"


def _open(file: Any) -> Image.Image:
    return Image.open(file, formats=FORMATS)


def _pages(image: Image.Image) -> list[int]:
    """Of which pictures of the file one is chosen. Not a TIFF's thumbnails, masks and pages of another size."""
    frames = range(getattr(image, "n_frames", 1)) if image.format in WITH_FRAMES else range(1)
    if image.format != "TIFF" or len(frames) == 1:
        return list(frames)
    sizes, helpers = [], []
    for page in frames:
        image.seek(page)
        sizes.append(image.size)
        helpers.append(_tag(image, _NEW_SUBFILE_TYPE, 0) & 0b101)  # reduced, mask
    return [page for page in frames if page == 0 or (sizes[page] == sizes[0] and not helpers[page])]


def _require_upper_bits(image: Image.Image) -> None:
    """Pillow keeps the upper 8 of 16 bits beside colour or transparency: of 12 bits in 16 these are nearly black.

    Raises:
        UnreadableImage: grey with transparency, or no more than a quarter of the range is used.
    """
    colours = image.getextrema()[: 1 if image.mode == "LA" else 3]
    if image.mode == "LA" or max(np.ravel(colours)) < 64:
        raise UnreadableImage(
            "has 16 bits beside colour or transparency, which are not read whole: save it as 16-bit grey, or as 8 bits"
        )


def _tag(image: Image.Image, number: int, default: Any) -> Any:
    """What a TIFF says of itself, else the default."""
    return image.tag_v2.get(number, default) if isinstance(image, TiffImageFile) else default


def _numbers(image: Image.Image) -> str:
    """The type of a TIFF's pixels where Pillow takes it for another, else "". Raises: UnreadableImage."""
    kind = _tag(image, _SAMPLE_FORMAT, (_UNSIGNED,))[0] if isinstance(image, TiffImageFile) else 0
    if kind == _SIGNED and image.mode == "L":
        raise UnreadableImage("is a TIFF of signed 8 bits: save it as 16 bits")
    return "uint32" if kind == _UNSIGNED and image.mode == "I" else ""


def _on_black(image: Image.Image) -> Image.Image:
    """Blended over black, the background of medical images. What is opaque everywhere keeps its bytes."""
    clear = image.convert("RGBA")
    low, high = clear.getchannel("A").getextrema()
    if high == 0:
        raise UnreadableImage("is transparent everywhere")
    if low == 255:
        return image.convert("L" if image.mode in ("LA", "La", "L", "1") else "RGB")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "black"), clear).convert("RGB")


def _kind_read(content: bytes) -> str | None:
    if content[:2] == b"BM" and content[6:10] == b"\0\0\0\0":
        return "BMP"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    return next((kind for mark, kind in READ.items() if content.startswith(mark)), None)


def _not_read(content: bytes) -> str | None:
    if content[4:8] == b"ftyp":
        return "is HEIC or AVIF: convert it to PNG or JPEG" if content[8:12] in _HEIF_BRANDS else _VIDEO
    if content[:4] == b"RIFF" and content[8:12] == b"AVI ":
        return _VIDEO
    if content[344:348] in (b"n+1\0", b"ni1\0"):
        return "is NIfTI: save its slices as DICOM or 16-bit PNG"
    return next((words for mark, words in NOT_READ.items() if content.lstrip().startswith(mark)), None)
