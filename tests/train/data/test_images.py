"""One image file becomes one small uint8 square, whatever its format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pictures import decode_image, noise, write_dicom, write_png
from PIL import Image

from hsl_node.train.data.images import decode_array, dicom_owner
from hsl_node.train.data.pixels import UnreadableImage
from hsl_node.train.data.preprocessing import Preprocessing, Window


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_a_grey_picture_of_the_right_size_keeps_every_pixel(tmp_path: Path, suffix: str) -> None:
    """given a lossless 20 x 20 file, decoding at 20 px changes nothing."""
    pixels = noise(1, (20, 20))
    path = write_png(tmp_path / f"a.{suffix}", pixels)
    np.testing.assert_array_equal(decode_image(path, 20), pixels)


def test_a_jpeg_is_decoded_close_to_what_was_saved(tmp_path: Path) -> None:
    pixels = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    decoded = decode_image(tmp_path / "a.jpg", 24)
    assert decoded.dtype == np.uint8 and decoded.shape == (24, 24)
    assert np.abs(decoded.astype(int) - pixels).max() <= 6


def test_a_colour_picture_keeps_three_channels(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[..., 0] = 200
    np.testing.assert_array_equal(decode_image(write_png(tmp_path / "a.png", pixels), 8), pixels)


def test_grey_content_stored_as_rgb_becomes_one_channel(tmp_path: Path) -> None:
    """Most chest X-ray collections store grey as RGB: three equal channels would cost three times the memory."""
    grey = noise(2, (16, 16))
    assert decode_image(write_png(tmp_path / "a.png", np.repeat(grey[..., None], 3, axis=2)), 16).shape == (16, 16)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_use_the_images_own_range(tmp_path: Path, suffix: str) -> None:
    """12-bit data in a 16-bit file must not come out black: 1000 -> 0, 3000 -> 128, 5000 -> 255."""
    pixels = np.array([[1000, 3000], [5000, 5000]], np.uint16)
    path = write_png(tmp_path / f"a.{suffix}", pixels)
    np.testing.assert_array_equal(decode_image(path, 2), [[0, 128], [255, 255]])


def test_a_window_from_the_configuration_applies_to_sixteen_bit_pictures(tmp_path: Path) -> None:
    """Center 3000.5, width 2001: 2000 -> 0 and 4000 -> 255."""
    path = write_png(tmp_path / "a.png", np.array([[1000, 2000], [3000, 4000]], np.uint16))
    np.testing.assert_array_equal(decode_image(path, 2, Window(center=3000.5, width=2001)), [[0, 0], [128, 255]])


def test_the_whole_picture_is_squeezed_into_the_square(tmp_path: Path) -> None:
    """The paper resizes to 224 x 224: nothing is cut off, the aspect ratio is not kept."""
    pixels = np.zeros((10, 40), np.uint8)
    pixels[:, 20:] = 255
    np.testing.assert_array_equal(
        decode_image(write_png(tmp_path / "a.png", pixels), 10)[5] > 127, [False] * 5 + [True] * 5
    )


def test_shrinking_is_antialiased() -> None:
    """A one-pixel checkerboard becomes an even grey; picking single pixels would give black or white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    inner = decode_array(board, Preprocessing(image_size=8))[1:-1, 1:-1]
    assert inner.min() >= 126 and inner.max() <= 129


@pytest.mark.parametrize(("mode", "shape"), [("P", (6, 6, 3)), ("RGBA", (6, 6, 3)), ("LA", (6, 6)), ("1", (6, 6))])
def test_every_mode_of_pillow_ends_as_grey_or_rgb(tmp_path: Path, mode: str, shape: tuple[int, ...]) -> None:
    picture = np.zeros((6, 6, 3), np.uint8)
    picture[:3] = (250, 10, 10)
    Image.fromarray(picture).convert(mode).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png", 6).shape == shape


def test_a_jpeg_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8] = 255  # the upper half is white as stored
    exif = Image.Exif()
    exif[274] = 3  # turned by 180 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    decoded = decode_image(tmp_path / "a.jpg", 16)
    assert decoded[:6].max() < 30 and decoded[10:].min() > 220


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1)])
def test_an_array_of_an_npz_file_is_decoded_like_a_picture(shape: tuple[int, ...]) -> None:
    assert decode_array(noise(3, (9, 7)).reshape(shape), Preprocessing(image_size=5)).shape == (5, 5)


# ---------------------------------------------------------------- DICOM


def test_dicom_goes_through_rescale_and_its_own_window(tmp_path: Path) -> None:
    """Stored 0, 500, 1000, 2000 with slope 2 and intercept -1000 are -1000, 0, 1000, 3000; the window of center 0.5 and
    width 2001 maps -1000 to 0, 0 to 127.5 (rounded up) and 1000 to 255."""
    pixels = np.array([[0, 500], [1000, 2000]], np.uint16)
    path = write_dicom(
        tmp_path / "a.dcm", pixels, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=0.5, WindowWidth=2001
    )
    np.testing.assert_array_equal(decode_image(path, 2), [[0, 128], [255, 255]])


def test_the_first_of_several_windows_counts(tmp_path: Path) -> None:
    pixels = np.array([[0, 100], [200, 300]], np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels, WindowCenter=[100.5, 5], WindowWidth=[201, 2])
    np.testing.assert_array_equal(decode_image(path, 2), [[0, 128], [255, 255]])


def test_a_window_from_the_configuration_overrides_the_files_own(tmp_path: Path) -> None:
    pixels = np.array([[0, 100], [200, 300]], np.int16)
    path = write_dicom(tmp_path / "a.dcm", pixels, WindowCenter=100.5, WindowWidth=201)
    np.testing.assert_array_equal(decode_image(path, 2, Window(center=250.5, width=101)), [[0, 0], [0, 255]])


def test_a_window_of_width_one_is_a_threshold(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", np.array([[0, 99], [100, 300]], np.uint16), WindowCenter=100, WindowWidth=1)
    np.testing.assert_array_equal(decode_image(path, 2), [[0, 0], [255, 255]])


def test_dicom_without_a_window_uses_its_range_without_the_padding(tmp_path: Path) -> None:
    """Padding of -2000 around values of 100 to 300 would leave no contrast."""
    pixels = np.array([[-2000, 100], [200, 300]], np.int16)
    path = write_dicom(tmp_path / "a.dcm", pixels, PixelPaddingValue=-2000)
    np.testing.assert_array_equal(decode_image(path, 2), [[0, 0], [128, 255]])


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "a.dcm", np.array([[0, 128], [255, 255]], np.uint8), PhotometricInterpretation="MONOCHROME1"
    )
    np.testing.assert_array_equal(decode_image(path, 2), [[255, 127], [0, 0]])


def test_of_several_frames_the_middle_one_is_used(tmp_path: Path) -> None:
    frames = np.zeros((5, 4, 4), np.uint8)
    frames[2] = np.arange(16).reshape(4, 4) * 17
    np.testing.assert_array_equal(decode_image(write_dicom(tmp_path / "a.dcm", frames), 4), frames[2])


def test_colour_dicom_keeps_its_bytes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(write_dicom(tmp_path / "a.dcm", pixels), 6), pixels)


def test_a_dicom_file_is_known_by_its_content_not_its_name(tmp_path: Path) -> None:
    tags = {"PatientID": "  MRN 77 ", "StudyInstanceUID": "1.2.3"}
    content = write_dicom(tmp_path / "IM0001", noise(5, (6, 6)), **tags).read_bytes()
    assert decode_image(content, 6).shape == (6, 6)
    assert dicom_owner(content) == ("MRN 77", "1.2.3")
    assert dicom_owner(b"no dicom") == ("", "")


# ---------------------------------------------------------------- what cannot be read


def test_a_truncated_jpeg_is_unreadable_not_half_grey(tmp_path: Path) -> None:
    Image.fromarray(noise(6, (64, 64))).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(UnreadableImage):
        decode_image(content[: len(content) // 2], 8)


def test_truncated_dicom_is_unreadable(tmp_path: Path) -> None:
    content = write_dicom(tmp_path / "a.dcm", noise(7, (64, 64))).read_bytes()
    with pytest.raises(UnreadableImage):
        decode_image(content[:-2000], 8)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"%PDF-1.7 ...", b"GIF89a" + b"\0" * 40]
)
def test_what_is_no_image_is_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode_image(content, 8)


def test_threat_19_no_message_quotes_the_path(tmp_path: Path) -> None:
    """It may reach a log."""
    (tmp_path / "CANARY").write_bytes(b"x")
    for name in ("CANARY", "CANARY-absent"):
        with pytest.raises(UnreadableImage) as caught:
            decode_image(tmp_path / name, 8)
        assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8), np.full((4, 4), np.nan)])
def test_arrays_that_are_no_image_are_unreadable(bad: np.ndarray) -> None:
    with pytest.raises(UnreadableImage):
        decode_array(bad, Preprocessing(image_size=8))


def test_a_file_and_its_content_give_the_same(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", noise(1))
    np.testing.assert_array_equal(decode_image(path.read_bytes(), 16), decode_image(path, 16))
