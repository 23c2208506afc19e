"""Pictures through Pillow: orientation, photometric meaning, depth, the first picture; what is damaged is told."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import decode_image, noise
from PIL import Image, ImageCms, TiffImagePlugin

from hsl_node.train.data import images
from hsl_node.train.data.pixels import UnreadableImage

CORNER = np.zeros((16, 16), np.uint8)
CORNER[:8, :8] = 255  # the upper left quarter is white


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, format=kind, **options)
    return content.getvalue()


def quarters(pixels: np.ndarray) -> str:
    """Which quarter is white: one letter each, row by row."""
    return "".join("#" if pixels[y : y + 4, x : x + 4].mean() > 127 else "." for y in (2, 10) for x in (2, 10))


# ---------------------------------------------------------------- orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
@pytest.mark.parametrize(("turn", "white"), [(1, "#..."), (2, ".#.."), (3, "...#"), (6, ".#.."), (8, "..#.")])
def test_every_format_is_turned_as_its_exif_says(kind: str, turn: int, white: str):
    exif = Image.Exif()
    exif[274] = turn
    assert quarters(decode_image(saved(Image.fromarray(CORNER), kind, exif=exif), 16)) == white


def test_a_turned_picture_is_taller_where_it_was_wider():
    """16-bit PNG, too: 40 x 10 px turned by 90 degrees, padded, is a column."""
    exif = Image.Exif()
    exif[274] = 6
    wide = Image.fromarray(np.tile(np.arange(40, dtype=np.uint16) * 1000, (10, 1)))
    column = decode_image(saved(wide, "PNG", exif=exif), 40, fit="pad")
    assert column[:, :14].max() == 0 and (np.diff(column[:, 20].astype(int)) > 0).all()


# ---------------------------------------------------------------- the first picture


def test_of_a_jpeg_with_a_second_picture_the_first_counts_and_is_turned():
    """MPO: what phones write, with a depth map or a gain map behind the picture."""
    exif = Image.Exif()
    exif[274] = 3
    second = Image.new("L", (16, 16), 255)
    content = saved(Image.fromarray(CORNER), "MPO", save_all=True, append_images=[second], exif=exif)
    assert Image.open(io.BytesIO(content)).n_frames == 2  # type: ignore[attr-defined]
    assert quarters(decode_image(content, 16)) == "...#"


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP", "GIF"])
def test_pages_and_films_follow_the_plan(tmp_path: Path, kind: str):
    """Like the frames of DICOM: the middle of 3, or the first."""
    pages = [Image.new("L", (16, 16), grey) for grey in (50, 100, 200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(pages[0], kind, save_all=True, append_images=pages[1:], **options)
    (tmp_path / "a").write_bytes(content)
    assert images.count_frames(tmp_path / "a") == 3
    assert abs(int(decode_image(content, 16)[8, 8]) - 100) <= 1
    assert abs(int(decode_image(content, 16, frame="first")[8, 8]) - 50) <= 1


def test_a_thumbnail_or_a_mask_in_a_tiff_is_no_page():
    """Of another size, or marked as reduced (1) or as a mask (4) in NewSubfileType."""
    page, thumbnail = Image.new("L", (16, 16), 50), Image.new("L", (4, 4), 200)
    assert (decode_image(saved(page, "TIFF", save_all=True, append_images=[thumbnail]), 16) == 50).all()
    for mark in (1, 4):
        content = io.BytesIO()
        with TiffImagePlugin.AppendingTiffWriter(content) as file:
            page.save(file, format="TIFF")
            file.newFrame()
            Image.new("L", (16, 16), 200).save(file, format="TIFF", tiffinfo={254: mark})
        assert (decode_image(content.getvalue(), 16) == 50).all()


# ---------------------------------------------------------------- photometric meaning and depth


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.float32])
def test_white_is_zero_means_the_same_at_every_depth(dtype: type, compression: str | None):
    """Tag 262 = 0: the smallest value is white."""
    values = np.array([[0, 1], [0, 1]]) if dtype is np.bool_ else np.array([[0, 100], [200, 200]])
    picture = Image.fromarray(values.astype(dtype))
    plain = saved(picture, "TIFF", compression=compression)
    at = plain.index(b"\x06\x01\x03\x00\x01\x00\x00\x00\x01\x00")  # tag 262, SHORT, one value: 1
    found = decode_image(plain[: at + 8] + b"\0\0" + plain[at + 10 :], 2)
    if dtype is np.uint8:
        assert found.tolist() == [[255, 155], [55, 55]]
    elif dtype is np.bool_:
        assert found.tolist() == [[255, 0], [255, 0]]
    else:
        assert found.tolist() == [[255, 127], [0, 0]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_sixteen_bits_keep_their_depth(kind: str):
    """12-bit values in 16 bits: 1000, 3000, 5000 -> 0, 128, 255; a cut to 8 bits would leave 3, 11, 19."""
    pixels = np.repeat(np.repeat(np.array([[1000, 3000], [5000, 5000]], np.uint16), 8, 0), 8, 1)
    found = decode_image(saved(Image.fromarray(pixels), kind), 16)
    assert found[::8, ::8].tolist() == [[0, 128], [255, 255]]


def test_a_float_tiff_uses_its_own_range_and_refuses_what_is_no_number():
    values = np.array([[-1, 0], [1, 1]], np.float32)
    assert decode_image(saved(Image.fromarray(values), "TIFF"), 2).tolist() == [[0, 128], [255, 255]]
    for bad in (np.nan, np.inf):
        values[0, 0] = bad
        with pytest.raises(UnreadableImage, match="no number"):
            decode_image(saved(Image.fromarray(values), "TIFF"), 2)


@pytest.mark.parametrize(("dtype", "grey"), [(np.uint8, 77), (np.uint16, 0), (np.float32, 0)])
def test_an_even_picture_keeps_8_bits_and_is_black_above(dtype: type, grey: int):
    """More than 8 bits have no scale of their own, so an even picture has neither bright nor dark."""
    assert (decode_image(saved(Image.fromarray(np.full((4, 4), 77, dtype)), "TIFF"), 4) == grey).all()


# ---------------------------------------------------------------- colour and transparency


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_is_blended_over_black(kind: str):
    """Red 200 at half opacity: 100. What hides behind full transparency does not show."""
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = (200, 0, 0, 128)
    pixels[1] = (0, 255, 0, 0)
    pixels[1, 1] = (10, 20, 200, 255)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = decode_image(saved(Image.fromarray(pixels), kind, **options), 2)
    assert found.tolist() == [[[100, 0, 0]] * 2, [[0, 0, 0], [10, 20, 200]]]


def test_a_transparent_entry_of_a_palette_or_a_grey_is_black_too():
    grey = Image.fromarray(np.array([[50, 250], [50, 250]], np.uint8))
    found = decode_image(saved(grey, "PNG", transparency=250), 2)
    assert found.tolist() == [[50, 0], [50, 0]]
    indexed = Image.fromarray(np.array([[0, 1], [0, 1]], np.uint8), mode="P")
    indexed.putpalette([200, 0, 0, 0, 200, 0])
    assert decode_image(saved(indexed, "PNG", transparency=1), 2).tolist() == [[[200, 0, 0], [0, 0, 0]]] * 2


def test_a_picture_that_is_transparent_everywhere_is_refused():
    with pytest.raises(UnreadableImage, match="transparent everywhere"):
        decode_image(saved(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG"), 4)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "YCbCr"), ("TIFF", "LAB")])
def test_other_colour_spaces_become_rgb(kind: str, mode: str):
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(red, srgb, lab, outputMode="LAB")
        assert picture is not None
    else:
        picture = red.convert(mode)
    found = decode_image(saved(picture, kind), 16)[8, 8].astype(int)
    assert np.abs(found - (200, 30, 30)).max() <= 3


def test_a_colour_profile_changes_nothing():
    """Hospitals' pictures carry the same few profiles or none; the bytes are what was measured."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(saved(Image.fromarray(pixels), "PNG", icc_profile=profile), 8), pixels)


def test_a_progressive_jpeg_is_as_good_as_another():
    picture = Image.fromarray(noise(1, (32, 32)))
    plain, progressive = (decode_image(saved(picture, "JPEG", progressive=p), 32) for p in (False, True))
    np.testing.assert_array_equal(plain, progressive)


# ---------------------------------------------------------------- content, not name


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM"])
def test_every_format_is_known_by_its_content(tmp_path: Path, kind: str):
    path = tmp_path / "without a name"
    path.write_bytes(saved(Image.fromarray(noise(1)), kind))
    assert images.looks_like_image(path)
    path.rename(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png", 16).shape == (16, 16)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(40), "is a ZIP archive, no image"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page or XML, no image"),
        (b"\0\0\0\x20ftypmp42" + bytes(40), "is a video: save the frames that matter as images"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(40), "is a video: save the frames that matter as images"),
        (b"\0\0\0\x20ftypheic" + bytes(40), "is HEIC or AVIF: convert it to PNG or JPEG"),
        (bytes(344) + b"n+1\0", "is NIfTI: save its slices as DICOM or 16-bit PNG"),
        (b"%PDF-1.7", "is a PDF document, no image"),
        (b"\x30\x80\x06\x09\x2a\x86\x48", "is no PNG, JPEG, .* or is damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is a PNG image of an unusual kind, or is cut short or damaged"),
    ],
)
def test_what_is_no_image_is_named_by_what_it_is(tmp_path: Path, content: bytes, reason: str):
    """A file that is called .png is looked at, and told: a download that went wrong must not be passed over."""
    (tmp_path / "a.png").write_bytes(content)
    assert images.looks_like_image(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match=f"^{reason}$"):
        decode_image(tmp_path / "a.png", 16)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"patient,label\n", b"BMI: 27 kg/m2 ...", b"P17,benign\n"])
def test_what_neither_is_an_image_nor_called_one_is_passed_over(tmp_path: Path, content: bytes):
    (tmp_path / "notes").write_bytes(content)
    assert not images.looks_like_image(tmp_path / "notes")


def test_what_cannot_be_opened_is_told_and_what_is_no_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    os.mkfifo(tmp_path / "pipe.png")
    assert not images.looks_like_image(tmp_path / "pipe.png") and not images.looks_like_image(tmp_path / "absent")
    (tmp_path / "IM0001").touch()
    monkeypatch.setattr(images, "open", refuse, raising=False)
    assert images.looks_like_image(tmp_path / "IM0001")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_picture_that_is_cut_short_is_refused(kind: str, kept: float):
    """Pillow could fill the rest with grey: then a model learns the grey."""
    content = saved(Image.fromarray(noise(1, (64, 64))), kind)
    with pytest.raises(UnreadableImage, match="cut short"):
        decode_image(content[: int(len(content) * kept)], 16)


def test_a_decompression_bomb_is_refused():
    """A PNG of 60,000 x 60,000 px: 3.6 GB out of a few hundred bytes."""
    plain = saved(Image.new("L", (16, 16)), "PNG")
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + plain[24:29]
    bomb = plain[:12] + header + zlib.crc32(header).to_bytes(4, "big") + plain[33:]
    with pytest.raises(UnreadableImage, match="more pixels than Pillow reads safely"):
        decode_image(bomb, 16)


# ---------------------------------------------------------------- more bits than Pillow keeps


def png_of_16_bits(pixels: np.ndarray, colour_type: int) -> bytes:
    """(H, W, channels); Pillow itself writes no such PNG."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(("channels", "colour_type"), [(2, 4), (3, 2), (4, 6)])
def test_twelve_bits_beside_colour_or_transparency_are_refused_and_not_nearly_black(channels: int, colour_type: int):
    """4095 of 65535 came out as 15 of 255."""
    pixels = np.full((2, 2, channels), 65535, np.uint16)
    pixels[..., : 3 if channels > 2 else 1] = np.array([[0, 1000], [2000, 4095]])[..., None]
    with pytest.raises(UnreadableImage, match="save it as 16-bit grey"):
        decode_image(png_of_16_bits(pixels, colour_type), 2)


def test_colour_that_uses_its_16_bits_keeps_the_upper_8():
    pixels = np.zeros((1, 1, 3), np.uint16) + np.array([0x1234, 0x8000, 0xFFFF], np.uint16)
    assert decode_image(png_of_16_bits(pixels, 2), 1).tolist() == [[[0x12, 0x80, 0xFF]]]


def tiff_of(pixels: np.ndarray, sample_format: int) -> bytes:
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: pixels.itemsize * 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    entries = {**tags, 279: pixels.nbytes, 339: sample_format}
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    start = struct.pack("<I", 8 + pixels.nbytes)
    return b"II*\0" + start + pixels.tobytes() + struct.pack("<H", len(entries)) + listed + b"\0\0\0\0"


def test_unsigned_32_bits_of_a_tiff_are_not_taken_as_signed():
    pixels = np.array([[0, 1_000_000_000], [2_000_000_000, 4_000_000_000]], np.uint32)
    assert decode_image(tiff_of(pixels, 1), 2).tolist() == [[0, 64], [128, 255]]


def test_signed_8_bits_of_a_tiff_are_refused():
    """Pillow takes -1 for 255."""
    with pytest.raises(UnreadableImage, match="signed 8 bits"):
        decode_image(tiff_of(np.array([[-1, 1]], np.int8).repeat(2, 0), 2), 2)
