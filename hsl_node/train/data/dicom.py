"""DICOM files -> grey or RGB bytes: the standard's grey-scale chain (PS3.3, C.11 and C.7.6.16), by pydicom.

    stored bits -> modality LUT or rescale -> VOI LUT or window, else own range -> MONOCHROME1 inverted -> padding black

What is the same for all frames and what is each frame's own is looked for in the functional groups too.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from contextlib import suppress
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hsl_node.train.data.pixels import UnreadableImage, full_range, windowed
from hsl_node.train.data.preprocessing import Window

Array = NDArray[Any]

_MAGIC_AT, _MAGIC = 128, b"DICM"
# Without the mark (before 1995, or cut off): group 2 or 8 first, with a type of explicit VR or a short length.
_BARE = re.compile(rb"[\x02\x08]\0.\0([A-Z]{2}|[\x00-\x80]\0\0\0)|\0[\x02\x08]\0.[A-Z]{2}", re.DOTALL)
_DIRECTORY = b"1.2.840.10008.1.3.10"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_GREY_TAGS = (
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
)
_GREY_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_FLUOROSCOPY = ("1.2.840.10008.5.1.4.1.1.12.1", "1.2.840.10008.5.1.4.1.1.12.2")  # XA and XRF Image Storage
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # what pydicom gives as RGB
_VIDEO = "1.2.840.10008.1.2.4.1"  # prefix of MPEG-2, MPEG-4 and HEVC: ...100 to ...108
_JPEG_BASELINE, _JPEG_EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
DAMAGED = "is damaged inside its compressed pixels"
NEEDS_DECODER = "is compressed in a way that needs another decoder: pip install 'hsl-node[dicom]'"
NEEDS_GPL_DECODER = (  # a licence that nobody should get without asking for it
    "is a JPEG of 12 bits, whose only decoder is GPL-3: pip install pylibjpeg pylibjpeg-libjpeg, or convert the file"
)

logging.getLogger("pydicom").addHandler(logging.NullHandler())
logging.getLogger("pydicom").propagate = False  # its warnings quote values of the file: names, dates
warnings.filterwarnings("ignore", module=r"pydicom\.")  # and so do these


def is_dicom(content: bytes) -> bool:
    return content[_MAGIC_AT : _MAGIC_AT + 4] == _MAGIC or _BARE.match(content) is not None


def is_directory(head: bytes) -> bool:
    """A DICOMDIR: it lists other files."""
    return _DIRECTORY in head


def owner_of(content: bytes) -> tuple[str, str]:
    """PatientID and StudyInstanceUID, "" where there is none. Raises whatever pydicom raises."""
    tags = ["PatientID", "StudyInstanceUID"]
    header = _read(io.BytesIO(content), specific_tags=tags, stop_before_pixels=True)
    patient, study = (str(header.get(tag, "") or "").strip() for tag in tags)
    return patient, study


def outline(file: BinaryIO) -> tuple[int, int, int]:
    """Frames, height and width in px: from the header alone."""
    header = _read(file, specific_tags=["NumberOfFrames", "Rows", "Columns"], stop_before_pixels=True)
    return _frames(header), int(header.Rows), int(header.Columns)


def pixels_of(content: bytes, frame: Literal["middle", "first"], window: Window | None) -> Array:
    """(H, W) grey or (H, W, 3) RGB, uint8, of the file's content. `window`, where set, is used instead of the file's.

    Raises:
        UnreadableImage: no pixels, a video, or no decoder for it; else whatever pydicom raises.
    """
    header = _read(io.BytesIO(content))
    if not any(tag in header for tag in _PIXELS):
        stripped = ": only its header, or cut short" if "Rows" in header else ""
        raise UnreadableImage(f"holds no pixels ({_class_of(header)}){stripped}")
    if int(header.get("Rows", 0)) * int(header.get("Columns", 0)) > 2 * (Image.MAX_IMAGE_PIXELS or 0):
        raise UnreadableImage("has more pixels than are read safely")
    index = _frames(header) // 2 if frame == "middle" else 0
    raw = _decoded(header, index)
    photometric = str(header.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        return _palette_colour(_stored_bits(raw, header), header)
    if raw.ndim == 3:
        if photometric not in _COLOURS:
            raise UnreadableImage("holds colours of a kind that is not read (neither RGB nor YBR_FULL, _ICT or _RCT)")
        return _scaled(_stored_bits(raw, header), header.BitsStored)
    return _grey(raw, _grey_tags(header, index), header, window)


# ---------------------------------------------------------------- grey


def _grey(raw: Array, tags: Any, header: Any, window: Window | None) -> Array:
    """(H, W) as stored -> uint8. `tags`: what the file says of this frame's grey values."""
    from pydicom.pixels.processing import apply_modality_lut

    stored = _stored_bits(raw, header)
    padding = _padding(raw, header) | _padding(stored, header)  # its sign may not reach beyond Bits Stored
    values = apply_modality_lut(stored, tags)
    window = window or (None if "VOILUTSequence" in tags else _own_window(tags))
    if window:
        grey = windowed(np.where(padding, 0, values), window)
    elif "VOILUTSequence" in tags:
        grey = _through_lut(values, tags)
    elif values is stored and stored.dtype.kind == "u" and header.BitsStored <= 8:
        grey = _scaled(stored, header.BitsStored)
    else:
        grey = full_range(values, values[~padding])
    if header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        grey = 255 - grey
    return np.where(padding, np.uint8(0), grey)


def _grey_tags(header: Any, index: int) -> Any:
    """The frame's own functional groups before the shared ones, these before the file's own tags; empty ones left out.

    A rescale that changes nothing is left out. LUTs are declared as 16 bits wide, of which pydicom reads all lengths.
    """
    from pydicom.dataset import Dataset

    shared, own = (header.get(f"{which}FunctionalGroupsSequence") or [] for which in ("Shared", "PerFrame"))
    groups = [*shared[:1], *own[index : index + 1]]
    places = [header, *(group.get(name)[0] for group in groups for name in _GREY_GROUPS if group.get(name))]
    tags = Dataset()
    tags.file_meta = header.file_meta
    for place in places:
        for tag in _GREY_TAGS:
            if (value := place.get(tag)) is not None and (not hasattr(value, "__len__") or len(value)):
                tags[tag] = place[tag]
    slope, intercept = float(tags.get("RescaleSlope", 1)), float(tags.get("RescaleIntercept", 0))
    if (slope, intercept) == (1, 0):
        tags.pop("RescaleSlope", None), tags.pop("RescaleIntercept", None)
    else:
        tags.RescaleSlope, tags.RescaleIntercept = slope, intercept
    if header.get("SOPClassUID") in _FLUOROSCOPY:
        tags.pop("ModalityLUTSequence", None)  # leads back to the beam's intensity, and is not for display
    for item in [*tags.get("ModalityLUTSequence", ()), *tags.get("VOILUTSequence", ())]:
        if isinstance(item.LUTData, bytes) and len(item.LUTData) < 2 * (item.LUTDescriptor[0] or 65536):
            item.add_new(
                "LUTData", "US", list(item.LUTData)
            )  # two entries of 8 bits to a word, which pydicom can't read
    for item in tags.get("ModalityLUTSequence", ()):
        item.LUTDescriptor = [*item.LUTDescriptor[:2], 16]
    return tags


def _padding(raw: Array, header: Any) -> Array:
    """Where nothing was measured: (H, W) bool, from Pixel Padding Value to Range Limit. Compared as they are stored."""
    for kind in ("", "Float", "DoubleFloat") if raw.dtype.kind != "f" else ("Float", "DoubleFloat"):
        first = header.get(f"{kind}PixelPaddingValue")
        if isinstance(first, int | float):
            last = header.get(f"{kind}PixelPaddingRangeLimit")
            ends = np.array([first, last if isinstance(last, int | float) else first])
            low, high = np.sort(ends if raw.dtype.kind == "f" else ends.astype(np.int64).astype(raw.dtype))
            return np.isnan(raw) if np.isnan(low) else (raw >= low) & (raw <= high)
    return np.zeros(raw.shape, dtype=np.bool_)


def _stored_bits(raw: Array, header: Any) -> Array:
    """Bits outside of Bits Stored may hold overlays, and belong to no pixel; padding may lie there."""
    if raw.dtype.kind == "f" or header.file_meta.TransferSyntaxUID.is_compressed:
        return raw
    bits, stored = raw.dtype.itemsize * 8, int(header.BitsStored)
    high = int(header.get("HighBit", stored - 1))
    if not stored - 1 <= high < bits:
        high = stored - 1
    return (raw << (bits - 1 - high)) >> (bits - stored)


def _own_window(tags: Any) -> Window | None:
    """The first window of the file that means something, if it has one."""
    shape = str(tags.get("VOILUTFunction", "")).strip().upper()
    centers, widths = (
        [*v] if hasattr(v := tags.get(tag), "append") else [v] for tag in ("WindowCenter", "WindowWidth")
    )
    for center, width in zip(centers, widths, strict=False):
        with suppress(TypeError, ValueError):
            known = shape if shape in ("SIGMOID", "LINEAR_EXACT") else "LINEAR"
            return Window(center=float(center), width=float(width), shape=known)
    return None


def _through_lut(values: Array, tags: Any) -> Array:
    """Through the first VOI LUT; its widest output is white."""
    from pydicom.pixels.processing import apply_voi

    item = tags.VOILUTSequence[0]
    entries, start, bits = item.LUTDescriptor
    if start > 32767 and values.min() < 0:
        start -= 65536  # written as unsigned, for values that a rescale made negative
    item.LUTDescriptor = [entries, start, 16]
    inside = np.clip(np.rint(values), start, start + (entries or 65536) - 1).astype(np.int32)
    found = apply_voi(inside, tags)
    return _scaled(found, max(bits, int(found.max()).bit_length()))


# ---------------------------------------------------------------- colour


def _palette_colour(raw: Array, header: Any) -> Array:
    from pydicom.pixels.processing import apply_color_lut

    colour = apply_color_lut(raw, header)[..., :3]  # a fourth is transparency
    bits = 16 if colour.max() > 255 else 8  # 8 bits may lie in 16
    return _scaled(colour, bits)


def _scaled(values: Array, bits: int) -> Array:
    """0 .. 2^bits - 1 -> 0..255, rounded to the nearest."""
    if bits == 8:
        return np.ascontiguousarray(values.astype(np.uint8))
    scaled: Array = (np.clip(values / (2.0**bits - 1), 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    return scaled


# ---------------------------------------------------------------- reading


def _decoded(header: Any, index: int) -> Array:
    """One frame as stored, (H, W) or (H, W, samples); YBR comes back as RGB.

    Pillow first, which everybody has: else a lossy file would differ by what else is installed.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    syntax = header.file_meta.TransferSyntaxUID
    if syntax.startswith(_VIDEO):
        raise UnreadableImage("is a video: save the frames that matter as images")
    try:
        plugins = get_decoder(syntax).available_plugins if syntax.is_compressed else ()
    except (NotImplementedError, ValueError):  # how pydicom says that it has no decoder, or knows no such syntax
        raise UnreadableImage(
            "is stored in a transfer syntax that is not read here: convert it, e.g. with `gdcmconv`"
        ) from None
    if not syntax.is_compressed:
        return pixel_array(header, index=index, correct_unused_bits=False)  # it knows no High Bit; `_stored_bits` does
    for plugin in sorted(plugins, key=lambda name: name != "pillow"):
        with suppress(Exception):  # what one refuses another may take
            return pixel_array(header, index=index, decoding_plugin=plugin)
    if syntax == _JPEG_EXTENDED and "pylibjpeg" not in plugins:
        raise UnreadableImage(NEEDS_GPL_DECODER)
    if not plugins:
        raise UnreadableImage(NEEDS_DECODER)
    may_help = plugins == ("pillow",) and syntax != _JPEG_BASELINE
    raise UnreadableImage(DAMAGED + (f", or {NEEDS_DECODER}" if may_help else ""))


def _read(file: BinaryIO, **options: Any) -> Any:
    """pydicom is imported where the first DICOM file turns up: it takes 0.3 s."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # odd values are no reason to refuse
    header = pydicom.dcmread(file, force=True, **options)
    if not header.file_meta.get("TransferSyntaxUID"):  # from before there was one
        implicit, little = header.original_encoding
        explicit = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
    return header


def _frames(header: Any) -> int:
    try:
        return max(1, int(header.get("NumberOfFrames") or 1))
    except (TypeError, ValueError):
        return 1


def _class_of(header: Any) -> str:
    """What kind of object it is, in the standard's words; nothing that the file itself says."""
    from pydicom.uid import UID

    uid = UID(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or ""))
    return str(uid.name) if uid.name != uid else "of an unknown class"
