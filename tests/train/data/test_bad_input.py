"""What bad input gets: named, with its line and the nearest right one, before anything is trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from data_sets import PLAN, checked, opened, table_rows
from pictures import write_folders, write_table

from hsl_node.errors import DataError, LocalStateError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data import cache as cache_module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": None}, "data.path is not set"),
        ({"path": Path("/nowhere/at/all")}, "does not exist"),
        ({"columns": {"lable": "x"}}, "'lable' is no column we know; did you mean 'label'"),
        ({"columns": {"lables": "label"}}, "'lables' is no column we know; did you mean 'label'"),
        ({"columns": {"file": "path"}}, "'file' is no column we know; turn it round: path=file"),
        ({"columns": {"label": "labels"}}, "t.csv:1: no column 'labels' for the label; did you mean 'label'"),
        ({"columns": {"patient": "mrn"}}, "t.csv:1: no column 'mrn' for the patient"),
        ({"filter": {"devise": "x"}}, "has no column 'devise'; did you mean 'device'"),
        ({"filter": {"device": "Logik 7"}}, "has device = 'Logik 7'; did you mean 'Logiq 7'"),
        ({"window_center": 40.0}, "belong together"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write_table(tmp_path / "d/t.csv", [{**row, "device": "Logiq 7"} for row in table_rows()])
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path, DataConfig(**{"path": path, **change}))
    assert caught.value.remedy and caught.value.exit_code == 78


@pytest.mark.parametrize(("name", "content"), [("t.csv", b"PK\x03\x04 "), ("t.xls", b"\xd0\xcf\x11\xe0 ")])
def test_a_spreadsheets_workbook_is_called_one(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .* it is a workbook") as caught:
        opened(tmp_path, DataConfig(path=tmp_path / name))
    assert "CSV" in caught.value.remedy


def test_paths_of_a_windows_drive_are_called_that(tmp_path: Path) -> None:
    path = write_table(tmp_path / "d/t.csv", rows := table_rows())
    path.write_text(path.read_text().replace(rows[3]["path"], "C:\\images\\" + rows[3]["path"]))
    with pytest.raises(DataError) as caught:
        opened(tmp_path, DataConfig(path=path))
    assert "a Windows drive" in caught.value.remedy


def test_every_unknown_label_is_named_at_once_with_line_and_the_class_of_the_same_letters(tmp_path: Path) -> None:
    rows = table_rows()
    rows[2]["label"], rows[5]["label"] = "malignent", "Benign"
    with pytest.raises(DataError) as caught:
        opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    assert "t.csv:4: label 'malignent' is no class\n" in caught.value.message, "what it means is not for us to guess"
    assert "t.csv:7: label 'Benign' is no class; did you mean 'benign'?" in caught.value.message
    assert "no federation joined yet" not in caught.value.remedy, "it cannot know, and mostly one is"


def test_a_row_of_blanks_is_named_and_an_empty_one_is_none(tmp_path: Path) -> None:
    """Blanks may be what stray delimiters left of an image."""
    path = write_table(tmp_path / "d/t.csv", table_rows())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "," * lines[0].count(","), *lines[3:]]))
    opened(tmp_path, DataConfig(path=path))
    path.write_text("\n".join([*lines[:3], " ," * lines[0].count(","), *lines[3:]]))
    with pytest.raises(DataError, match=r"t\.csv:4: no such image file"):
        opened(tmp_path, DataConfig(path=path))


def test_rows_without_image_or_label_are_named_by_line(tmp_path: Path) -> None:
    path = write_table(tmp_path / "d/t.csv", table_rows())
    (tmp_path / "d/img/3.png").unlink()
    path.write_text(path.read_text().replace("img/6.png,malignant", "img/6.png,"))
    with pytest.raises(DataError) as caught:
        opened(tmp_path, DataConfig(path=path))
    assert caught.value.message == "t.csv:5: no such image file\nt.csv:8: no label"


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10}))
    with pytest.raises(DataError, match="class 'malignant' has no images"):
        opened(tmp_path, data)


def test_a_hospital_may_lack_one_of_three_classes_and_is_told_what_follows(tmp_path: Path) -> None:
    """It learns that class from the others; two classes are left to tell apart."""
    three = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    dataset = opened(tmp_path, three, PLAN.model_copy(update={"classes": ("benign", "malignant", "normal")}))
    assert any("'normal' has no images here: AUC and its like are means over" in w for w in dataset.warnings)
    assert set(dataset.labels.tolist()) == {0, 1}
    one = DataConfig(path=write_folders(tmp_path / "one", {"benign": 10}))
    with pytest.raises(DataError, match="class 'normal' has no images"):
        opened(tmp_path, one, PLAN.model_copy(update={"classes": ("benign", "malignant", "normal")}))


@pytest.mark.parametrize("few", [1, 2])
def test_a_class_of_too_few_patients_is_refused_with_counts(tmp_path: Path, few: int) -> None:
    """Below three, training, validation and test cannot all see the class."""
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": few}))
    with pytest.raises(DataError, match=f"{few} images of {few} patients") as caught:
        opened(tmp_path, data)
    assert "at least three patients" in caught.value.remedy
    assert not (tmp_path / "splits.json").exists(), "a split that is refused must not be remembered"


def test_a_one_class_validation_split_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "split": ("train", "val", "test")[n % 6 // 2]} for n, row in enumerate(table_rows(24))]
    rows = [r for r in rows if (r["split"], r["label"]) != ("val", "malignant")]
    with pytest.raises(DataError, match="the validation split lacks class 'malignant'"):
        opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))


def test_a_one_class_test_split_is_a_warning(tmp_path: Path) -> None:
    """Training can go on; only the AUC of the test will be undefined."""
    rows = [{**row, "split": ("train", "val", "test")[n % 6 // 2]} for n, row in enumerate(table_rows(24))]
    rows = [r for r in rows if (r["split"], r["label"]) != ("test", "malignant")]
    dataset = opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    assert any("AUC will be undefined" in w for w in dataset.warnings)


def test_threat_31_a_patient_on_two_sides_of_the_split_column_is_named_by_lines(tmp_path: Path) -> None:
    rows = [{**row, "split": "train"} for row in table_rows()]
    rows[3]["split"] = "test"
    with pytest.raises(DataError, match=r"t.csv:4, t.csv:5: .*two sides"):
        opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    ignoring = DataConfig(path=tmp_path / "d/t.csv", columns={"split": ""})
    assert len(opened(tmp_path, ignoring).ids) == 12


def test_unreadable_images_stop_the_node_until_they_are_excluded(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    (root / "benign/CANARY.png").write_bytes(b"not a png")
    (root / "benign/half.jpg").write_bytes((root / "benign/000.png").read_bytes()[:90])
    with pytest.raises(DataError, match="2 of 22 images cannot be read") as caught:
        opened(tmp_path, DataConfig(path=root))
    assert "CANARY" not in str(caught.value), "the worker's errors reach the log"
    report = checked(tmp_path, DataConfig(path=root))
    assert sorted(name for name, _ in report.unreadable) == ["benign/CANARY.png", "benign/half.jpg"]
    assert not report.ok and report.images == 20
    without = DataConfig(path=root, exclude=("benign/CANARY.png", "half.jpg"))
    assert len(opened(tmp_path, without).ids) == 20


def test_threat_19_a_canary_in_paths_and_patients_reaches_no_log_error_or_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    rows = [{**row, "path": f"CANARY-{n}.png", "patient": f"CANARY {n}"} for n, row in enumerate(table_rows(20))]
    path = write_table(tmp_path / "d/t.csv", rows)
    dataset = opened(tmp_path, DataConfig(path=path))
    (tmp_path / "d/CANARY-3.png").write_bytes(b"damaged")
    with pytest.raises(DataError) as caught:
        opened(tmp_path, DataConfig(path=path))
    with pytest.raises(DataError) as filtered:
        opened(tmp_path, DataConfig(path=path, filter={"patient": "CANARI 7"}))
    stored = b"".join(p.read_bytes() for p in [tmp_path / "splits.json", *(tmp_path / "cache").iterdir()])
    for text in (str(caught.value), str(filtered.value), caplog.text, repr(dataset), stored.decode("latin-1")):
        assert "CANARY" not in text


def test_a_full_disk_is_a_local_error_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 5, "malignant": 5}))
    fired = []

    def full(*args: Any) -> None:
        fired.append(args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_build", full)
    with pytest.raises(LocalStateError, match="No space left") as caught:
        opened(tmp_path, data)
    assert fired and "free some space" in caught.value.remedy
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".index"]
