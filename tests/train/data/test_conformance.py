"""All files of pydicom's own test set, and every mode and format that Pillow writes, against their own renderings.

`pytest -s` on this file prints how many are decoded, refused and differing. Pillow's package ships no pictures, so they
are made here. Each accepted difference stands with its reason.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
from numpy.typing import NDArray
from pictures import decode_image, noise
from PIL import Image, ImageOps
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.pixels.utils import pixel_array

from hsl_node.train.data import dicom, images, picture
from hsl_node.train.data.pixels import UnreadableImage

Array = NDArray[Any]

DICOM_FILES = Path(pydicom.data.__file__).parent
ROUNDING = 1  # grey level


@dataclass
class Survey:
    """What became of a set of files; a name stands in one place only."""

    decoded: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # reason
    differing: dict[str, int] = field(default_factory=dict)  # largest difference, grey levels
    lost: list[str] = field(default_factory=list)  # refused here, and the library renders it

    def look(self, name: str, content: bytes, rendering: Callable[[bytes], Array]) -> None:
        try:
            expected = rendering(content)
        except Exception:  # the library's own failures are many
            expected = None
        try:
            with images._unreadable(content):
                kind = dicom if dicom.is_dicom(content) else picture
                found = kind.pixels_of(content, "middle", None)
        except UnreadableImage as exc:
            self.refused[name] = exc.message
            if expected is not None:
                self.lost.append(name)
            return
        self.decoded.append(name)
        assert found.dtype == np.uint8 and expected is not None and found.shape == expected.shape, name
        difference = int(np.abs(found.astype(int) - expected.astype(int)).max())
        if difference > ROUNDING:
            self.differing[name] = difference

    def told(self, title: str) -> str:
        reasons = "\n".join(f"    {n:4} {reason}" for reason, n in Counter(self.refused.values()).most_common())
        return (
            f"{title}: {len(self.decoded) + len(self.refused)} files, {len(self.decoded)} decoded,"
            f" {len(self.refused)} refused, {len(self.differing)} of those decoded differ\n{reasons}"
        )


# ---------------------------------------------------------------- DICOM


def dicom_survey() -> Survey:
    survey = Survey()
    for path in sorted(DICOM_FILES.rglob("*")):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            survey.look(path.relative_to(DICOM_FILES).as_posix(), path.read_bytes(), pydicoms_rendering)
    return survey


def pydicoms_rendering(content: bytes) -> Array:
    """pydicom's functions one after the other; what they give, linearly to 0..255 from end to end of its range."""
    header = pydicom.dcmread(io.BytesIO(content))
    raw = pixel_array(header, index=int(header.get("NumberOfFrames") or 1) // 2)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        return (apply_color_lut(raw, header) / 257 + 0.5).astype(np.uint8)
    if raw.ndim == 3:
        return (raw / (2.0**header.BitsStored - 1) * 255 + 0.5).astype(np.uint8)
    values = apply_modality_lut(raw, header)
    shown = apply_voi_lut(values, header)
    if shown is not values:
        ends = apply_voi_lut(np.array([-1e9, 1e9]), header)
    elif header.BitsStored in (1, 8) and values is raw:
        ends = np.array([0, 2**header.BitsStored - 1])
    else:
        ends = np.array([values.min(), values.max()])
    unit = np.clip((shown - ends.min()) / max(ends.max() - ends.min(), 1), 0, 1)
    return ((1 - unit if header.PhotometricInterpretation == "MONOCHROME1" else unit) * 255 + 0.5).astype(np.uint8)


def test_every_file_of_pydicoms_test_set_is_rendered_as_by_pydicom_or_refused_in_words():
    survey = dicom_survey()
    print("\n" + survey.told("pydicom's test set"))
    assert survey.differing == {} and survey.lost == []
    assert len(survey.decoded) >= 90


# ---------------------------------------------------------------- pictures

MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "TIFF": [{"compression": c} for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")],
    "JPEG": [{"quality": 95}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}],
    "PNG": [{}, {"bits": 1}, {"bits": 2}, {"bits": 4}, {"compress_level": 0}],
    "WEBP": [{}, {"lossless": True}],
    "JPEG2000": [{}, {"irreversible": True}, {"no_jp2": True}],
    "GIF": [{}, {"interlace": False}],
}


def written() -> Iterator[tuple[str, bytes]]:
    """Every mode that a format of Pillow takes, in each variant and with each turn."""
    rng = np.random.default_rng(1)
    colour = Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)).resize((48, 24))
    colour.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 48, dtype=np.uint8), (24, 1))))
    deep = np.asarray(colour.convert("L")).astype(np.uint16) * 16 + 3
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            for n, options in enumerate(VARIANTS.get(kind, [{}])):
                for turn in (1, 6):
                    content = io.BytesIO()
                    exif = Image.Exif()
                    exif[274] = turn
                    try:
                        if mode in ("I", "I;16", "F"):
                            image = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(deep).convert(mode)
                        else:
                            image = colour.convert("RGB" if mode in ("LAB", "HSV") else mode).convert(mode)
                        image.save(content, format=kind, exif=exif, **options)
                    except Exception:  # no such mode in this format
                        continue
                    yield f"{kind} {mode} {n} turned {turn}", content.getvalue()


def pillows_rendering(content: bytes) -> Array:
    """Pillow's own conversion; what is deeper than 8 bits, linearly from its least to its greatest value."""
    image = Image.open(io.BytesIO(content), formats=picture.FORMATS)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(float)
        return ((values - values.min()) / (values.max() - values.min()) * 255 + 0.5).astype(np.uint8)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


def over_black(content: bytes) -> Array:
    """As Pillow blends it."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=picture.FORMATS)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB"))


def transparent(content: bytes) -> bool:
    try:
        return bool(Image.open(io.BytesIO(content), formats=picture.FORMATS).has_transparency_data)
    except OSError:
        return False


# Accepted: Pillow's convert("RGB") drops transparency and shows what hides behind it; here it is blended over black.
# Accepted: a bare JPEG 2000 stream does not say that its fourth channel is black ink: transparent everywhere.
NOT_RENDERED = ["JPEG2000 CMYK 2 turned 1", "JPEG2000 CMYK 2 turned 6"]


def test_every_mode_of_every_format_is_rendered_as_by_pillow_or_refused_in_words():
    files = dict(written())
    survey, blended = Survey(), Survey()
    for name, content in files.items():
        survey.look(name, content, pillows_rendering)
    for name in survey.differing:
        assert transparent(files[name]), name
        blended.look(name, files[name], over_black)
    print("\n" + survey.told("What Pillow writes"))
    assert len(files) >= 300 and len(survey.decoded) >= 200
    assert blended.differing == {}
    assert survey.lost == NOT_RENDERED


def test_a_file_that_is_damaged_anywhere_ends_decoded_or_in_words():
    """Single and many bytes, in the header and in the pixels, and cut short: 300 files, never a traceback."""
    rng = random.Random(1)
    files = [path for path in sorted((DICOM_FILES / "test_files").glob("*.dcm")) if path.stat().st_size < 1e5]
    whole = [path.read_bytes() for path in files]
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM"):
        picture_file = io.BytesIO()
        Image.fromarray(noise(1)).save(picture_file, format=kind)
        whole += [picture_file.getvalue()] * 4
    ends: Counter[str] = Counter()
    for _ in range(300):
        content = bytearray(rng.choice(whole))
        for _ in range(rng.choice([1, 10, 40])):
            content[rng.randrange(min(len(content), rng.choice([300, 2000, 10**9])))] = rng.randrange(256)
        content = content[: rng.choice([len(content), len(content), rng.randrange(len(content))])]
        try:
            assert decode_image(bytes(content), 16).dtype == np.uint8
            ends["decoded"] += 1
        except UnreadableImage as exc:
            ends[exc.message] += 1
    assert ends["decoded"] > 30 and len(ends) > 8
