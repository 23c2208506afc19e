"""The rules between a file and the network's input are one value, which a cache and an exported model carry."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from data_sets import PLAN, opened, sha256_of
from pictures import decode_image, noise, write_dicom, write_png
from PIL import Image

from hsl_node.errors import DataError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.train.data.cache import key_of
from hsl_node.train.data.preprocessing import Preprocessing, Window


def test_it_follows_the_plan_and_the_window_of_the_site():
    plan = Plan(image_size=128, fit="pad", frame="first")
    found = Preprocessing.of(plan, Window(center=40, width=400))
    assert found.to_json() == {
        "version": 2,
        "image_size": 128,
        "fit": "pad",
        "frame": "first",
        "window": {"center": 40.0, "width": 400.0, "shape": "LINEAR"},
        "grey": "own VOI LUT, own window, else own range",
        "resize": "bilinear, antialiased",
        "channels": "RGB; grey in all three",
        "value_range": "0..1",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


@pytest.mark.parametrize("window", [None, Window(center=0.5, width=1, shape="SIGMOID")])
def test_what_goes_out_with_a_model_comes_back_the_same(window: Window | None):
    before = Preprocessing.of(Plan(fit="pad"), window)
    assert Preprocessing.from_json(before.to_json()) == before


@pytest.mark.parametrize(
    "change",
    [{"version": 3}, {"resize": "bicubic"}, {"mean": [0.5, 0.5, 0.5]}, {"window": {"center": 1, "width": 0}}, {"a": 1}],
)
def test_rules_that_this_version_does_not_carry_out_are_refused(change: dict[str, object]):
    """Else a model would be shown other pixels than it learned from, silently."""
    with pytest.raises(DataError, match="preprocessing is not one that this version"):
        Preprocessing.from_json({**Preprocessing(image_size=32).to_json(), **change})


def test_each_rule_names_another_cache():
    base = Preprocessing(image_size=32)
    others = [
        base.model_copy(update=change)
        for change in (
            {"image_size": 33},
            {"fit": "pad"},
            {"frame": "first"},
            {"window": Window(center=1, width=2)},
            {"window": Window(center=1, width=2, shape="SIGMOID")},
            {"version": 3},
        )
    ]
    assert len({key_of(p, ["ab" * 32]) for p in (base, *others)}) == 7


def test_pictures_of_8_and_16_bits_give_the_bytes_that_they_gave_before(tmp_path: Path):
    """A run that goes on through the update trains on the same pixels. The digest is the version before's."""
    colour = np.random.default_rng(5).integers(0, 256, (21, 33, 3), dtype=np.uint8)
    pictures = {
        "grey": Image.fromarray(noise(1)),
        "colour": Image.fromarray(colour),
        "grey as colour": Image.fromarray(np.repeat(noise(2)[..., None], 3, axis=2)),
        "palette": Image.fromarray(colour).quantize(16),
        "black and white": Image.fromarray(noise(3)).convert("1"),
        "sixteen": Image.fromarray(noise(4).astype(np.uint16) * 16),
        "opaque": Image.fromarray(colour).convert("RGBA"),
        "grey, opaque": Image.fromarray(noise(6)).convert("LA"),
    }
    digest = hashlib.sha256()
    for name, picture in pictures.items():
        for suffix in ("png", "tiff"):
            picture.save(tmp_path / f"{name}.{suffix}")
            found = decode_image(tmp_path / f"{name}.{suffix}", 16)
            digest.update(f"{name} {suffix} {found.shape}".encode() + found.tobytes())
    assert digest.hexdigest() == "3bfe48066d30881044390d12aff94d8a772797b2127d814d0a480ca58c178ab4"


def test_padding_keeps_the_shape_of_the_picture(tmp_path: Path):
    """Taller than wide, a sign of malignancy, stays so: 40 x 10 white px become 16 x 4 with black beside them."""
    path = write_png(tmp_path / "a.png", np.full((40, 10), 255, np.uint8))
    wide = write_png(tmp_path / "b.png", np.full((10, 40, 3), (255, 0, 0), np.uint8))
    found = decode_image(path, 16, fit="pad")
    assert (found[:, 6:10] == 255).all() and found.sum() == 16 * 4 * 255
    np.testing.assert_array_equal(decode_image(path, 16), np.full((16, 16), 255))
    red = decode_image(wide, 16, fit="pad")
    assert (red[6:10, :, 0] == 255).all() and red.sum() == 16 * 4 * 255


@pytest.mark.parametrize(("setting", "value"), [("fit", "pad"), ("frame", "first")])
def test_the_plan_and_the_sites_window_reach_the_images_that_are_trained_on(tmp_path: Path, setting: str, value: str):
    """And an image that was decoded under other rules is decoded again."""
    root = tmp_path / "d"
    for n, name in enumerate(PLAN.classes * 6):
        cine = np.stack([noise(3 * n + k, (40, 12)).astype(np.uint16) for k in range(3)])
        write_dicom(root / name / f"{n}", cine, PatientID=f"P{n}")
    data = DataConfig(path=root, window_center=100, window_width=150)
    before = opened(tmp_path, data).images.copy()
    dataset = opened(tmp_path, data, PLAN.model_copy(update={setting: value}))
    paths = {sha256_of(path): path for path in root.rglob("*") if path.is_file()}
    window = Window(center=100, width=150)
    for name, pixels, old in zip(dataset.ids, dataset.images, before, strict=True):
        np.testing.assert_array_equal(pixels, decode_image(paths[name], 16, window, **{setting: value}))
        assert (pixels != old).any()


def test_its_words_name_every_choice():
    assert Preprocessing(image_size=64).words() == (
        "squeezed into 64 × 64 px (bilinear, antialiased); middle frame of several; grey of DICOM and of more than"
        " 8 bits: own VOI LUT, own window, else own range"
    )
    window = Window(center=40, width=400)
    assert Preprocessing(image_size=64, fit="pad", frame="first", window=window).words() == (
        "padded with black to 64 × 64 px (bilinear, antialiased); first frame of several; grey of DICOM and of more"
        " than 8 bits: window 40/400"
    )
