"""`data check`: what it counts, foretells and finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_sets import PLAN, TEST, TRAIN, checked, opened, sha256_of, table_rows
from pictures import noise, write_folders, write_png, write_table
from PIL import Image

from hsl_node.errors import DataError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.contact_sheet import contact_sheet
from hsl_node.train.data.duplicates import difference_hash, near_duplicates


def test_the_report_counts_classes_splits_patients_and_sites(tmp_path: Path) -> None:
    rows = [{**row, "site": f"site {n % 2}"} for n, row in enumerate(table_rows(40))]
    report = checked(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    assert report.ok and (report.images, report.patients) == (40, 20)
    assert report.counts["benign"] == {"train": 12, "validation": 2, "test": 6}
    assert report.patient_counts == {"train": 12, "validation": 2, "test": 6}
    assert report.sites == {"site 0": 20, "site 1": 20}
    json.dumps(report.as_json())


def test_a_check_foretells_the_split_and_does_not_write_the_ledger(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 20, "malignant": 20}))
    report = checked(tmp_path, data)
    assert not (tmp_path / "splits.json").exists()
    assert report.dataset is not None
    assert report.dataset.split.tolist() == opened(tmp_path, data).split.tolist()


def test_problems_are_reported_together_not_raised(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 10})
    (root / "benign/bad.png").write_bytes(b"x")
    report = checked(tmp_path, DataConfig(path=root))
    assert report.problems == ("1 images cannot be read", "class 'malignant' has no images")


def test_threat_31_near_duplicates_across_splits_are_found_and_unlike_pictures_are_not(tmp_path: Path) -> None:
    """Ten pictures saved again as JPEG under another patient: other bytes, the same picture."""
    root = write_folders(tmp_path / "d", {"benign": 2, "malignant": 30})
    y, x = np.mgrid[:48, :48]
    for n in range(10):
        blob = (120 + 100 * np.sin(x / (3 + n) + n) * np.cos(y / (9 - n % 5))).astype(np.uint8)
        write_png(root / f"benign/blob{n}.png", blob)
        Image.fromarray(blob).save(root / f"benign/copy{n}.jpg", quality=80)
    report = checked(tmp_path, DataConfig(path=root))
    assert report.dataset is not None
    names = {f"benign/blob{n}.png": f"benign/copy{n}.jpg" for n in range(10)}
    split_of = {sha256: s for sha256, s in zip(report.dataset.ids, report.dataset.split.tolist(), strict=True)}
    side = {p.relative_to(root).as_posix(): split_of[sha256_of(p)] for p in root.rglob("*.*")}
    apart = {(a, b) for a, b in names.items() if side[a] != side[b]}
    assert apart, "with ten pairs and this seed some lie on two sides"
    assert set(report.near_duplicates) == apart
    assert any("look the same" in w for w in report.warnings)


def test_an_equal_hash_alone_is_no_near_duplicate() -> None:
    """A straight and a curved ramp brighten in the same places: one hash, but a correlation of 0.91."""
    x = np.linspace(0, 1, 64)
    ramp, curved = (np.tile((255 * x**power).astype(np.uint8), (64, 1)) for power in (1, 3))
    brighter = np.clip(ramp.astype(int) // 2 + 60, 0, 255).astype(np.uint8)
    assert difference_hash(ramp) == difference_hash(brighter) == difference_hash(curved)
    split, group = np.array([TRAIN, TEST, TEST]), np.arange(3)
    assert near_duplicates(np.stack([ramp, curved, brighter]), split, group) == [(0, 2)]


def test_threat_31_identical_files_are_reported_and_kept_together(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    (root / "benign/again.png").write_bytes((root / "benign/000.png").read_bytes())
    report = checked(tmp_path, DataConfig(path=root))
    assert report.duplicates == (("benign/000.png", "benign/again.png"),)
    assert report.patients == 20 and report.near_duplicates == ()


def test_the_report_says_where_no_patient_is_known(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    (root / "metadata.csv").write_text("path,label\n")
    (root / "benign/notes.txt").write_text("x")
    report = checked(tmp_path, DataConfig(path=root, exclude=("nothing.png",)))
    assert not report.grouped
    assert any("metadata.csv?" in w for w in report.warnings)
    assert any("1 files of the folder are no images" in w for w in report.warnings)
    assert any("no image is called nothing.png" in w for w in report.warnings)


def test_the_contact_sheet_shows_every_class_and_split_and_is_private(tmp_path: Path) -> None:
    report = checked(tmp_path, DataConfig(path=write_folders(tmp_path / "d", {"benign": 40, "malignant": 3})))
    assert report.dataset is not None
    contact_sheet(report.dataset, PLAN, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_mode & 0o077 == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 1200 and sheet.height > 700
        pixels = np.asarray(sheet.convert("L"))
    blocks = [block for half in np.array_split(pixels, 2) for block in np.array_split(half, 3, axis=1)]
    assert min((block > 100).sum() for block in blocks) > 2000, "each of the six blocks shows at least one picture"
    first = (tmp_path / "sheet.png").read_bytes()
    contact_sheet(report.dataset, PLAN, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == first


# ---------------------------------------------------------------- what to do, when followed to the letter


def test_the_remedy_for_files_that_cannot_be_read_is_no_other(tmp_path: Path) -> None:
    """It said nothing, or to add images of more patients."""
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    (root / "benign/z.png").write_bytes(b"")
    (root / "benign/gone.png").symlink_to(tmp_path / "nowhere.png")
    report = checked(tmp_path, DataConfig(path=root))
    assert {file for file, _ in report.unreadable} == {"benign/z.png", "benign/gone.png"}
    assert report.remedy.startswith("replace or convert") and "add images" not in report.remedy
    assert checked(tmp_path, DataConfig(path=root, exclude=("z.png", "benign/gone.png"))).ok


@pytest.mark.parametrize("below", ["images", "data/train"])
def test_class_folders_that_lie_deeper_are_found_and_no_class_is_asked_for(tmp_path: Path, below: str) -> None:
    write_folders(tmp_path / "d" / below, {"benign": 10, "malignant": 10})
    with pytest.raises(DataError) as caught:
        checked(tmp_path, DataConfig(path=tmp_path / "d"))
    top = below.split("/")[0]
    assert caught.value.remedy == f"the class folders lie deeper: write data.path with /{top} at its end"
    assert checked(tmp_path, DataConfig(path=tmp_path / "d" / top)).images == 20


def test_folders_beside_train_and_test_and_folders_of_patients_are_told_as_that(tmp_path: Path) -> None:
    for name, deeper in (("d", ("train", "test")), ("e", ("P1", "P2"))):
        for n, folder in enumerate(deeper):
            write_folders(tmp_path / name / folder, {"benign": 10, "malignant": 10}, first_seed=20 * n)
    (tmp_path / "d/docs").mkdir()
    with pytest.raises(DataError) as caught:
        checked(tmp_path, DataConfig(path=tmp_path / "d"))
    assert caught.value.remedy.endswith("move the others out")
    (tmp_path / "d/docs").rmdir()
    assert checked(tmp_path, DataConfig(path=tmp_path / "d")).ok
    with pytest.raises(DataError) as caught:
        checked(tmp_path, DataConfig(path=tmp_path / "e"))
    assert "use a table, which can name the patients" in caught.value.remedy


def test_a_split_inside_of_the_class_folders_is_told(tmp_path: Path) -> None:
    for n, side in enumerate(("train", "test")):
        for name in PLAN.classes:
            write_folders(tmp_path / "d" / name, {side: 10}, first_seed=40 * n + 20 * (name == "benign"))
    assert any(
        w.startswith("40 images lie in folders train")
        for w in checked(tmp_path, DataConfig(path=tmp_path / "d")).warnings
    )


def test_masks_beside_the_images_are_told_with_a_line_that_works(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    for name in PLAN.classes:
        for n in range(10):
            write_png(root / name / f"{n:03d}_mask.png", noise(500 + n + 50 * (name == "benign")))
    (told,) = (w for w in checked(tmp_path, DataConfig(path=root, exclude=("x",))).warnings if "mask" in w)
    line = told[told.index("exclude = ") : told.index(" under [data]")]
    assert line == 'exclude = ["x", "*_mask*"]'
    assert checked(tmp_path, DataConfig(path=root, exclude=("x", "*_mask*"))).images == 20
    assert not any("called mask" in w for w in checked(tmp_path, DataConfig(path=root, exclude=("*_mask*",))).warnings)


def test_a_folder_that_holds_the_file_of_the_images_names_it(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/set.npz").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        checked(tmp_path, DataConfig(path=tmp_path / "d"))
    assert caught.value.remedy.startswith("write data.path with /set.npz at its end; else a folder per class")


def test_the_folder_of_one_class_is_told_from_that_of_all(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    with pytest.raises(DataError, match="lie in no folder that names their class") as caught:
        checked(tmp_path, DataConfig(path=root / "benign"))
    assert "write the folder above it" in caught.value.remedy and checked(tmp_path, DataConfig(path=root)).ok
