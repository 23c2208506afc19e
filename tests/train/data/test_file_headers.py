"""`data check` says what the plan's `frame` and `fit` decide about these images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_sets import PLAN, checked
from pictures import noise, write_dicom, write_folders, write_png
from PIL import Image

from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.images import Outline, outline


def warned(tmp_path: Path, root: Path, word: str, **plan: str) -> list[str]:
    report = checked(tmp_path, DataConfig(path=root), PLAN.model_copy(update=plan))
    return [w for w in report.warnings if word in w]


@pytest.mark.parametrize("frame", ["middle", "first"])
def test_files_with_several_frames_are_counted_and_the_one_taken_is_named(tmp_path: Path, frame: str) -> None:
    root = write_folders(tmp_path / "d", {"benign": 6, "malignant": 6})
    write_dicom(root / "benign/cine.dcm", np.stack([noise(n, (20, 24)) for n in range(30)]))
    pages = [Image.fromarray(noise(n)) for n in range(3)]
    pages[0].save(root / "malignant/pages.tif", save_all=True, append_images=pages[1:])
    write_dicom(root / "benign/one.dcm", noise(99, (20, 24)))
    assert warned(tmp_path, root, "frames", frame=frame) == [
        f"2 files hold several frames or pages (up to 30): the {frame} one of each is taken (`frame` in the plan)"
    ]


def test_of_single_images_nothing_is_said(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 6, "malignant": 6})
    assert warned(tmp_path, root, "frame") == warned(tmp_path, root, "wide") == []


def test_shapes_that_squeezing_distorts_differently_are_told(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 6, "malignant": 6})  # 24 x 20 px: 1.2
    write_png(root / "benign/wide.png", noise(50, (25, 53)))
    write_png(root / "benign/tall.png", noise(51, (50, 32)))
    assert warned(tmp_path, root, "wide", fit="squeeze") == [
        "the images are 0.64 to 2.12 times as wide as tall and squeezed into a square, each differently"
        ' (`fit` in the plan; "pad" keeps their shape)'
    ]
    assert warned(tmp_path, root, "wide", fit="pad") == []


def test_the_report_names_what_is_done_to_each_image(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 6, "malignant": 6})
    report = checked(tmp_path, DataConfig(path=root, window_center=40, window_width=400))
    assert report.as_json()["preprocessing"] == (
        "squeezed into 16 × 16 px (bilinear, antialiased); middle frame of several; grey of DICOM and of more than"
        " 8 bits: window 40/400"
    )


def test_an_outline_is_of_the_picture_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    Image.fromarray(noise(1, (10, 40))).save(tmp_path / "a.png", exif=exif)
    assert outline(tmp_path / "a.png") == Outline(frames=1, height=40, width=10)
    assert outline(write_dicom(tmp_path / "b", noise(1, (10, 40)))) == Outline(frames=1, height=10, width=40)
    assert outline(tmp_path / "absent") is None
