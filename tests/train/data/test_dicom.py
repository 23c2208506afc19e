"""DICOM: the standard's grey-scale chain, worked out by hand; content decides; what holds no pixels is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest
from pictures import decode_image, noise, write_dicom
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEGExtended12Bit, JPEGLosslessSV1

from hsl_node.train.data import dicom, images
from hsl_node.train.data.pixels import UnreadableImage
from hsl_node.train.data.preprocessing import Window

PIXELS = np.array([[0, 100], [150, 255]], np.uint16)
TEST_FILES = Path(pydicom.data.__file__).parent / "test_files"


def item(**tags: Any) -> Dataset:
    found = Dataset()
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def lut(first: int, bits: int, values: list[int]) -> Dataset:
    found = item(LUTDescriptor=[len(values), first, bits])
    found.add_new("LUTData", "US", values)
    found["LUTDescriptor"].VR = "US" if first >= 0 else "SS"
    return found


def decoded(tmp_path: Path, pixels: np.ndarray, **tags: Any) -> list[list[int]]:
    found = decode_image(write_dicom(tmp_path / "a", pixels, **tags), pixels.shape[-1])
    return found.tolist()


# ---------------------------------------------------------------- grey-scale chain


def test_a_voi_lut_is_used(tmp_path: Path):
    """65535 - 257 i for stored i of 0..255: 0 -> 255, 64 -> 191, 255 -> 0."""
    table = lut(0, 16, [65535 - 257 * i for i in range(256)])
    pixels = np.array([[0, 64], [255, 255]], np.uint16)
    assert decoded(tmp_path, pixels, VOILUTSequence=Sequence([table])) == [[255, 191], [0, 0]]


def test_a_voi_lut_counts_before_a_window_as_in_pydicom(tmp_path: Path):
    table = lut(0, 8, list(range(255, -1, -1)))
    tags = {"VOILUTSequence": Sequence([table]), "WindowCenter": 128, "WindowWidth": 256}
    assert decoded(tmp_path, PIXELS, **tags) == [[255, 155], [105, 0]]


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_values_beside_a_voi_lut_take_its_ends(tmp_path: Path, bits: int):
    """A LUT for 100..103 after a rescale by -50: stored 0 -> below, 151 -> second entry (a third), 255 -> above."""
    top = 2**bits - 1
    table = lut(100, bits, [0, top // 3, top, top])
    pixels = np.array([[0, 151], [152, 255]], np.uint16)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -50, "VOILUTSequence": Sequence([table])}
    assert decoded(tmp_path, pixels, **tags) == [[0, 85], [255, 255]]


@pytest.mark.parametrize("declared", [-100, 65436])
def test_a_voi_lut_that_begins_below_zero(tmp_path: Path, declared: int):
    """Values -100, 0, 100, 155 through a LUT from -100 on, 0..255; its start may be written as unsigned."""
    table = lut(-100, 8, list(range(256)))
    table["LUTDescriptor"].VR = "US" if declared > 0 else "SS"
    table.LUTDescriptor = [256, declared, 8]
    values = np.array([[-100, 0], [100, 155]], np.int16)
    if declared < 0:
        assert decoded(tmp_path, values, VOILUTSequence=Sequence([table])) == [[0, 100], [200, 255]]
    rescaled = {"RescaleSlope": 1, "RescaleIntercept": -100, "VOILUTSequence": Sequence([table])}
    assert decoded(tmp_path, (values + 100).astype(np.uint16), **rescaled) == [[0, 100], [200, 255]]


def test_the_sites_window_counts_before_a_voi_lut(tmp_path: Path):
    path = write_dicom(tmp_path / "a", PIXELS, VOILUTSequence=Sequence([lut(0, 8, list(range(255, -1, -1)))]))
    assert decode_image(path, 2, Window(center=128, width=256)).tolist() == [[0, 100], [150, 255]]


def test_an_unknown_window_shape_is_taken_as_linear_and_an_empty_window_as_none(tmp_path: Path):
    odd = {"WindowCenter": 128, "WindowWidth": 256, "VOILUTFunction": "CUBIC"}
    assert decoded(tmp_path, PIXELS, **odd) == [[0, 100], [150, 255]]
    half = PIXELS * 2  # of more than 8 bits: its own range
    for tags in ({"WindowCenter": None, "WindowWidth": None}, {"WindowCenter": 5, "WindowWidth": 0}):
        assert decoded(tmp_path, half, **tags) == [[0, 100], [150, 255]]


def test_a_lut_with_two_entries_to_a_word(tmp_path: Path):
    """8 bits packed as the standard wants them: 255 - i, as in pydicom's reader bytes and no list."""
    table = item(LUTDescriptor=[256, 0, 8])
    table["LUTDescriptor"].VR = "US"
    table.add_new("LUTData", "OW", bytes(range(255, -1, -1)))
    assert decoded(tmp_path, PIXELS, VOILUTSequence=Sequence([table])) == [[255, 155], [105, 0]]


def test_a_modality_lut_comes_before_the_window(tmp_path: Path):
    """Stored 0..3 mean 0, 1000, 2000, 4000; LINEAR_EXACT around 2000, 4000 wide: n / 4000."""
    table = lut(0, 12, [0, 1000, 2000, 4000])
    tags = {"ModalityLUTSequence": Sequence([table]), "WindowCenter": 2000, "WindowWidth": 4000}
    pixels = np.array([[0, 1], [2, 3]], np.uint8)
    found = decoded(tmp_path, pixels, VOILUTFunction="LINEAR_EXACT", **tags)
    assert found == [[0, 64], [128, 255]]


@pytest.mark.parametrize("name", ["XRayAngiographicImageStorage", "XRayRadiofluoroscopicImageStorage"])
def test_the_modality_lut_of_fluoroscopy_is_not_for_display(tmp_path: Path, name: str):
    """It leads from the logarithm back to the beam's intensity (as in DCMTK and dcm4che; pydicom applies it)."""
    table = lut(0, 16, [0, 1, 2, 50000])
    pixels = np.array([[0, 1], [2, 3]], np.uint8)
    tags = {"WindowCenter": 2, "WindowWidth": 4, "ModalityLUTSequence": Sequence([table])}
    assert decoded(tmp_path, pixels, SOPClassUID=getattr(uid, name), **tags) == [[0, 85], [170, 255]]


def test_a_sigmoid_window(tmp_path: Path):
    """1 / (1 + exp(-4 (x - 100) / 50)): 0 -> 0.0003, 100 -> 0.5, 150 -> 0.982, 255 -> 1."""
    tags = {"WindowCenter": 100, "WindowWidth": 50, "VOILUTFunction": "SIGMOID"}
    assert decoded(tmp_path, PIXELS, **tags) == [[0, 128], [250, 255]]


@pytest.mark.parametrize("place", ["Shared", "PerFrame"])
def test_window_and_rescale_of_an_enhanced_file_lie_in_its_functional_groups(tmp_path: Path, place: str):
    """Raw 0, 100, 150, 255 with slope 4, intercept -400 are -400, 0, 200, 620; window 40/400: 0, 102, 230, 255."""
    group = item(
        PixelValueTransformationSequence=Sequence([item(RescaleSlope=4, RescaleIntercept=-400, RescaleType="HU")]),
        FrameVOILUTSequence=Sequence([item(WindowCenter=40, WindowWidth=400)]),
    )
    groups = {f"{place}FunctionalGroupsSequence": Sequence([group] * (3 if place == "PerFrame" else 1))}
    assert decoded(tmp_path, np.stack([PIXELS] * 3), **groups) == [[0, 102], [230, 255]]


def test_each_frame_has_its_own_window_and_rescale(tmp_path: Path):
    """The frame's own before the shared ones, each by itself: slope 1 and 2 of the frames, one window for both."""
    frames = [
        item(PixelValueTransformationSequence=Sequence([item(RescaleSlope=slope, RescaleIntercept=0)]))
        for slope in (1, 2)
    ]
    shared = item(
        FrameVOILUTSequence=Sequence([item(WindowCenter=128, WindowWidth=256)]),
        PixelValueTransformationSequence=Sequence([item(RescaleSlope=9, RescaleIntercept=9)]),
    )
    path = write_dicom(
        tmp_path / "a",
        np.stack([PIXELS, PIXELS]),
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(frames),
    )
    assert decode_image(path, 2, frame="first").tolist() == [[0, 100], [150, 255]]
    assert decode_image(path, 2).tolist() == [[0, 200], [255, 255]]  # the second of two is the middle one


@pytest.mark.parametrize("limit", [{}, {"PixelPaddingRangeLimit": -1900}])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_counts_for_no_range_and_is_black(tmp_path: Path, limit: dict[str, int], photometric: str):
    """Without it 100, 200, 300 are 0, 128, 255; inverted 255, 127, 0. The padding is background in both."""
    pixels = np.array([[-2000, -1950 if limit else -2000, 100], [200, 300, 300], [300, 300, 300]], np.int16)
    found = decoded(tmp_path, pixels, PixelPaddingValue=-2000, PhotometricInterpretation=photometric, **limit)
    own, half, top = (0, 128, 255) if photometric == "MONOCHROME2" else (255, 127, 0)
    assert found[:2] == [[0, 0, own], [half, top, top]]


def test_padding_that_was_written_unsigned_fits_signed_pixels(tmp_path: Path):
    path = write_dicom(tmp_path / "a", np.array([[-2000, 100], [200, 300]], np.int16), PixelPaddingValue=-2000)
    content = path.read_bytes().replace(b"\x28\x00\x20\x01SS\x02\x00", b"\x28\x00\x20\x01US\x02\x00")
    assert content != path.read_bytes()
    assert decode_image(content, 2).tolist() == [[0, 0], [128, 255]]


def test_padding_is_black_under_a_window_too(tmp_path: Path):
    """-2000 is below the window, and would be white where MONOCHROME1 inverts it."""
    tags = {"PixelPaddingValue": -2000, "WindowCenter": 200.5, "WindowWidth": 201}
    pixels = np.array([[-2000, 100], [200, 300]], np.int16)
    assert decoded(tmp_path, pixels, PhotometricInterpretation="MONOCHROME1", **tags) == [[0, 255], [127, 0]]


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", None, False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "INVERSE", True),
    ],
)
def test_what_is_inverted_is_inverted_once(tmp_path: Path, photometric: str, shape: str | None, inverted: bool):
    tags = {"PresentationLUTShape": shape} if shape else {}
    found = decoded(tmp_path, PIXELS.astype(np.uint8), PhotometricInterpretation=photometric, **tags)
    assert found == ([[255, 155], [105, 0]] if inverted else [[0, 100], [150, 255]])


def test_eight_bits_without_a_window_stay_as_they_are(tmp_path: Path):
    """As in a PNG: an ultrasound image means the same in both, and an even one does not turn black."""
    assert decoded(tmp_path, np.array([[10, 20], [30, 40]], np.uint8)) == [[10, 20], [30, 40]]
    assert decoded(tmp_path, np.full((2, 2), 77, np.uint8), RescaleSlope=1, RescaleIntercept=0) == [[77, 77]] * 2


def test_bits_outside_of_those_stored_are_no_part_of_a_pixel(tmp_path: Path):
    """12 of 16 bits, an overlay in the highest; 12 bits in the upper part of 16. 0, 1000, 2000 -> 0, 128, 255."""
    pixels = np.array([[0, 1000], [2000, 2000]], np.uint16)
    assert decoded(tmp_path, pixels | 0x8000, BitsStored=12, HighBit=11) == [[0, 128], [255, 255]]
    assert decoded(tmp_path, pixels << 4, BitsStored=12, HighBit=15) == [[0, 128], [255, 255]]
    signed = np.array([[-1000, 0], [1000, 1000]], np.int16) & 0x0FFF
    assert decoded(tmp_path, signed, BitsStored=12, HighBit=11) == [[0, 128], [255, 255]]


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint32, np.int32])
def test_every_whole_number_type(tmp_path: Path, dtype: type):
    assert decoded(tmp_path, np.array([[0, 50], [100, 100]], dtype)) == [[0, 128], [255, 255]]


def test_one_bit_becomes_black_and_white(tmp_path: Path):
    """Bits of a byte from the lowest on: 0b1010 are 0, 1, 0, 1."""
    path = write_dicom(tmp_path / "a", np.zeros((2, 2), np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0)
    header = pydicom.dcmread(path)
    header.PixelData = bytes([0b1010, 0])
    header.save_as(path)
    assert decode_image(path, 2).tolist() == [[0, 255], [0, 255]]
    header.PixelData = bytes([0b1111, 0])
    header.save_as(path)
    assert decode_image(path, 2).tolist() == [[255, 255], [255, 255]]  # even, and white all the same


def float_dicom(path: Path, values: list[float], **tags: Any) -> Path:
    write_dicom(path, np.zeros((2, 2), np.uint32), **tags)
    header = pydicom.dcmread(path)
    del header.PixelData
    header.FloatPixelData = np.array(values, np.float32).tobytes()
    header.save_as(path)
    return path


def test_float_pixels(tmp_path: Path):
    assert decode_image(float_dicom(tmp_path / "a", [-1, 0, 1, 1]), 2).tolist() == [[0, 128], [255, 255]]
    padded = float_dicom(tmp_path / "b", [-1e9, -1, 0, 1], FloatPixelPaddingValue=-1e9)
    assert decode_image(padded, 2).tolist() == [[0, 0], [128, 255]]


def test_pixels_that_are_no_number_are_refused(tmp_path: Path):
    with pytest.raises(UnreadableImage, match="no number"):
        decode_image(float_dicom(tmp_path / "a", [0, 1, 2, float("nan")]), 2)


# ---------------------------------------------------------------- colour


def palette(bits: int) -> dict[str, Any]:
    """Entries 0..3: black, red, green, white."""
    top = 2**bits - 1
    colours = {"Red": [0, top, 0, top], "Green": [0, 0, top, top], "Blue": [0, 0, 0, top]}
    found: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, values in colours.items():
        found[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, bits]
        found[f"{name}PaletteColorLookupTableData"] = np.array(values, f"<u{bits // 8}").tobytes()
    return found


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_gives_its_colours(tmp_path: Path, bits: int):
    found = decoded(tmp_path, np.array([[0, 1], [2, 3]], np.uint8), **palette(bits))
    assert found == [[[0, 0, 0], [255, 0, 0]], [[0, 255, 0], [255, 255, 255]]]


def test_a_palette_that_uses_half_of_its_range_is_not_stretched(tmp_path: Path):
    tags = palette(16)
    tags["RedPaletteColorLookupTableData"] = np.array([0, 32896, 0, 32896], "<u2").tobytes()
    assert decoded(tmp_path, np.array([[1, 1], [0, 1]], np.uint8), **tags)[0][0] == [128, 0, 0]


def test_planes_one_after_the_other(tmp_path: Path):
    pixels = np.random.default_rng(4).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path = write_dicom(tmp_path / "a", pixels, PlanarConfiguration=1, PixelData=pixels.transpose(2, 0, 1).tobytes())
    np.testing.assert_array_equal(decode_image(path, 4), pixels)


@pytest.mark.parametrize("photometric", ["CMYK", "HSV", "YBR_PARTIAL_422"])
def test_colours_that_would_be_taken_for_rgb_are_refused(tmp_path: Path, photometric: str):
    path = write_dicom(tmp_path / "a", np.zeros((2, 2, 3), np.uint8), PhotometricInterpretation=photometric)
    with pytest.raises(UnreadableImage, match=r"holds colours of a kind that is not read|DICOM file"):
        decode_image(path, 2)


def test_colour_of_sixteen_bits_keeps_its_scale(tmp_path: Path):
    """32896 of 65535 is 128, whatever the brightest pixel."""
    pixels = np.zeros((2, 2, 3), np.uint16)
    pixels[..., 0] = 32896
    assert decoded(tmp_path, pixels)[0][0] == [128, 0, 0]


# ---------------------------------------------------------------- what a file is


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("reportsi.dcm", r"holds no pixels \(Basic Text SR Storage\)"),
        ("rtstruct.dcm", r"holds no pixels \(RT Structure Set Storage\)"),
        ("rtplan.dcm", r"holds no pixels \(RT Plan Storage\)"),
        ("waveform_ecg.dcm", r"holds no pixels \(12-lead ECG Waveform Storage\)"),
        ("dicomdirtests/DICOMDIR", r"holds no pixels \(Media Storage Directory Storage\)"),
        ("MR_truncated.dcm", "cut short, damaged"),
        ("nested_priv_SQ.dcm", "does not describe its pixels"),
    ],
)
def test_what_holds_no_pixels_is_told_in_words(name: str, reason: str):
    with pytest.raises(UnreadableImage, match=reason):
        decode_image(TEST_FILES / name, 8)


def test_a_video_is_named(tmp_path: Path):
    path = write_dicom(tmp_path / "a", noise(1))
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    header["PixelData"].VR = "OB"
    header.PixelData = encapsulate([b"\0\0\0\x1cftypmp42" + bytes(20)])
    header.save_as(path)
    with pytest.raises(UnreadableImage, match="is a video"):
        decode_image(path, 8)


def test_a_file_from_before_the_mark_is_read(tmp_path: Path):
    """No preamble and no file meta: from archives of the nineties, or cut off by a tool."""
    whole = write_dicom(tmp_path / "a", noise(2, (8, 8))).read_bytes()
    bare = whole[whole.index(b"\x08\x00\x16\x00UI") :]
    np.testing.assert_array_equal(decode_image(bare, 8), decode_image(whole, 8))


@pytest.mark.parametrize("name", ["1.2.826.0.1.3680043.8.498.17", "0.IMA", "IM0001", "scan.png", "x.DCM"])
def test_dicom_is_found_whatever_its_name(tmp_path: Path, name: str):
    assert images.looks_like_image(write_dicom(tmp_path / name, noise(3)))


def test_a_dicomdir_is_no_image():
    assert not images.looks_like_image(TEST_FILES / "dicomdirtests" / "DICOMDIR")


def test_more_pixels_than_are_safe_are_refused(tmp_path: Path):
    path = write_dicom(tmp_path / "a", np.zeros((2, 2), np.uint8), Rows=60000, Columns=60000)
    with pytest.raises(UnreadableImage, match="more pixels than are read safely"):
        decode_image(path, 8)


# ---------------------------------------------------------------- compression


def test_a_missing_decoder_is_named_by_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch):
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "available_plugins", property(lambda self: ()))
    with pytest.raises(UnreadableImage, match=r"pip install 'hsl-node\[dicom\]'"):
        decode_image(TEST_FILES / "SC_rgb_jpeg_gdcm.dcm", 8)


def test_the_decoder_that_no_extra_brings_is_named_with_its_licence(monkeypatch: pytest.MonkeyPatch):
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "available_plugins", property(lambda self: ("gdcm", "pillow")))
    with pytest.raises(UnreadableImage, match="GPL-3: pip install pylibjpeg pylibjpeg-libjpeg"):
        decode_image(TEST_FILES / "JPGExtended.dcm", 8)
    assert JPEGExtended12Bit == dicom._JPEG_EXTENDED


@pytest.mark.parametrize(
    "name",
    [
        *("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_jls_lossy_line.dcm", "SC_rgb_jls_lossy_sample.dcm", "GDCMJ2K_TextGBR.dcm"),
        *("JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm", "MR_small_jpeg_ls_lossless.dcm"),
    ],
)
def test_with_the_extra_the_compressed_files_decode(name: str):
    pytest.importorskip("gdcm")
    assert decode_image(TEST_FILES / name, 16).std() > 10


def test_with_the_extra_a_lossless_file_gives_the_pixels_of_the_plain_one():
    pytest.importorskip("gdcm")
    plain = decode_image(TEST_FILES / "MR_small.dcm", 64)
    np.testing.assert_array_equal(decode_image(TEST_FILES / "MR_small_jpeg_ls_lossless.dcm", 64), plain)


@pytest.mark.parametrize("name", ["SC_rgb_jpeg_dcmtk.dcm", "MR_small_RLE.dcm", "examples_jpeg2k.dcm"])
def test_compressed_pixels_that_are_cut_short_are_refused_as_damaged(tmp_path: Path, name: str):
    """Not half of an image; and no decoder is asked for where one is there."""
    header = pydicom.dcmread(TEST_FILES / name)
    whole = next(generate_frames(header.PixelData, number_of_frames=1))
    header.PixelData = encapsulate([whole[: len(whole) // 4 * 2]])
    header.save_as(tmp_path / "a")
    with pytest.raises(UnreadableImage, match="is damaged inside its compressed pixels") as caught:
        decode_image(tmp_path / "a", 8)
    assert "pip install" not in caught.value.message or name == "examples_jpeg2k.dcm"


def test_a_header_without_its_pixels_is_told(tmp_path: Path):
    path = write_dicom(tmp_path / "a", noise(1))
    header = pydicom.dcmread(path, stop_before_pixels=True)
    header.save_as(path)
    with pytest.raises(UnreadableImage, match=r"^holds no pixels \(Secondary .*\): only its header, or cut short$"):
        decode_image(path, 8)


@pytest.mark.parametrize("syntax", ["1.2.3.4", "1.2.840.113619.5.2"])
def test_a_private_transfer_syntax_is_told(tmp_path: Path, syntax: str):
    path = write_dicom(tmp_path / "a", noise(1))
    same_length = syntax + "\0" * (len(ExplicitVRLittleEndian) + 1 - len(syntax))
    path.write_bytes(path.read_bytes().replace(ExplicitVRLittleEndian.encode() + b"\0", same_length.encode()))
    with pytest.raises(UnreadableImage):
        decode_image(path, 8)
    assert JPEGLosslessSV1 != syntax


def test_the_first_window_that_means_something_counts(tmp_path: Path):
    """A width of 0 means nothing: 128 of 0/128 is one grey value below the middle of the second."""
    tags = {"WindowCenter": [100, 128], "WindowWidth": [0, 256]}
    assert decoded(tmp_path, PIXELS, **tags) == [[0, 100], [150, 255]]


def test_padding_whose_sign_does_not_reach_beyond_bits_stored(tmp_path: Path):
    """-2000 in 12 bits is 0x830; the file's Pixel Padding Value has 16."""
    stored = np.array([[-2000, 0], [100, 200]], np.int16)
    raw = (stored.astype(np.int32) & 0xFFF).astype(np.int16)
    tags = {"BitsStored": 12, "HighBit": 11, "PixelPaddingValue": -2000}
    assert decoded(tmp_path, raw, **tags) == [[0, 0], [128, 255]]
