"""From a hospital's folder, table or .npz file to a split, cached data set; and what bad input gets."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import noise, real_data, write_dicom, write_folders, write_png, write_table
from PIL import Image

from hsl_node.errors import DataError, DataUnavailable, LocalStateError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import durable
from hsl_node.train.data import cache as cache_module
from hsl_node.train.data import dataset as data_module
from hsl_node.train.data import digests as digests_module
from hsl_node.train.data import files as files_module
from hsl_node.train.data.check import DataReport, check
from hsl_node.train.data.contact_sheet import contact_sheet
from hsl_node.train.data.dataset import Dataset, decode_image, open_dataset
from hsl_node.train.data.duplicates import difference_hash, near_duplicates
from hsl_node.train.data.images import decode_bytes

PLAN = Plan(classes=("benign", "malignant"), image_size=16)
TRAIN, VALIDATION, TEST = 0, 1, 2


def opened(tmp_path: Path, data: DataConfig, plan: Plan = PLAN, **more: Any) -> Dataset:
    return open_dataset(data, plan, cache=tmp_path / "cache", ledger=tmp_path / "splits.json", **more)


def checked(tmp_path: Path, data: DataConfig, plan: Plan = PLAN) -> DataReport:
    return check(data, plan, cache=tmp_path / "cache", ledger=tmp_path / "splits.json")


def table_rows(count: int = 12) -> list[dict[str, str]]:
    """Two images per patient, half of the patients malignant."""
    words = ("benign", "malignant")
    return [{"path": f"img/{n}.png", "label": words[n // 2 % 2], "patient": f"pt{n // 2}"} for n in range(count)]


def per_class(dataset: Dataset) -> list[list[int]]:
    """Images per class and split."""
    return [[int(((dataset.labels == c) & (dataset.split == s)).sum()) for s in range(3)] for c in range(2)]


# ---------------------------------------------------------------- sources


def test_a_folder_per_class(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    dataset = opened(tmp_path, data)
    assert dataset.images.shape == (20, 16, 16) and dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int64 and dataset.split.dtype == np.int8
    assert per_class(dataset) == [[6, 1, 3], [6, 1, 3]]
    assert not dataset.images.flags.writeable


def test_every_pixel_is_that_of_its_own_file(tmp_path: Path) -> None:
    """ids are the files' sha256; the image beside an id is what decode_image gives for that file."""
    root = write_folders(tmp_path / "d", {"benign": 100, "malignant": 40})  # more than one batch of threads
    dataset = opened(tmp_path, DataConfig(path=root))
    by_id = {digests_module.hashlib.sha256(p.read_bytes()).hexdigest(): p for p in root.rglob("*.png")}
    assert set(by_id) == set(dataset.ids)
    for n, sha256 in enumerate(dataset.ids):
        np.testing.assert_array_equal(dataset.images[n], decode_image(by_id[sha256], 16))
        assert PLAN.classes[dataset.labels[n]] == by_id[sha256].parent.name


def test_folders_named_train_and_test_hold_the_classes(tmp_path: Path) -> None:
    write_folders(tmp_path / "d/train", {"benign": 7, "malignant": 7})
    write_folders(tmp_path / "d/test", {"benign": 5, "malignant": 5}, first_seed=100)
    dataset = opened(tmp_path, DataConfig(path=tmp_path / "d"))
    assert per_class(dataset) == [[6, 1, 5], [6, 1, 5]]


def test_a_table_with_its_own_column_names_and_a_filter(tmp_path: Path) -> None:
    rows = [
        {
            "file": r["path"],
            "class": r["label"],
            "patient": r["patient"],
            "device": f"Logiq {7 if n < 8 else 70} @10MHz",
        }
        for n, r in enumerate(table_rows(24))
    ]
    write_table(tmp_path / "d/t.csv", [{"path": r.pop("file"), **r} for r in map(dict, rows)])
    data = DataConfig(
        path=tmp_path / "d/t.csv", columns={"label": "class"}, filter={"device": "Logiq 7"}, labels={"benign": "benign"}
    )
    with pytest.raises(DataError, match="2 patients"):  # 8 images of 4 patients: too few, but rightly selected
        opened(tmp_path, data)
    assert checked(tmp_path, data).images == 8
    assert checked(tmp_path, DataConfig(**{**data.model_dump(), "filter": {"device": "Logiq 70"}})).images == 16


def test_threat_31_images_of_one_patient_stay_on_one_side(tmp_path: Path) -> None:
    data = DataConfig(path=write_table(tmp_path / "d/t.csv", table_rows(40)))
    dataset = opened(tmp_path, data)
    assert all(dataset.split[n] == dataset.split[n + 1] for n in range(0, 40, 2))
    assert set(dataset.split.tolist()) == {TRAIN, VALIDATION, TEST}


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_table_from_a_european_spreadsheet(tmp_path: Path, delimiter: str) -> None:
    """Semicolons, a byte order mark, paths with backslashes."""
    rows = [{**row, "path": row["path"].replace("/", "\\")} for row in table_rows()]
    path = write_table(tmp_path / "d/t.csv", rows, delimiter)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(opened(tmp_path, DataConfig(path=path)).ids) == 12


def test_labels_are_mapped_and_unwanted_ones_left_out(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"0": 5, "1": 5, "artefact": 3})
    data = DataConfig(path=root, labels={"0": "benign", "1": "malignant", "artefact": ""})
    assert len(opened(tmp_path, data).ids) == 10


def test_an_npz_file_with_images_and_labels(tmp_path: Path) -> None:
    images = np.stack([noise(n, (28, 28)) for n in range(20)])
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 2)
    dataset = opened(tmp_path, DataConfig(path=tmp_path / "a.npz"))
    assert dataset.labels.tolist() == [n % 2 for n in range(20)]
    assert len(set(dataset.ids)) == 20


def test_an_npz_file_in_three_parts_keeps_its_split(tmp_path: Path) -> None:
    """The layout of MedMNIST: labels of shape (N, 1)."""
    parts = {"train": 8, "val": 4, "test": 6}
    arrays: dict[str, Any] = {}
    for n, (part, count) in enumerate(parts.items()):
        arrays[f"{part}_images"] = np.stack([noise(100 * n + i, (28, 28)) for i in range(count)])
        arrays[f"{part}_labels"] = (np.arange(count) % 2)[:, None]
    np.savez(tmp_path / "a.npz", **arrays, class_names=np.array(["malignant", "benign"]))
    dataset = opened(tmp_path, DataConfig(path=tmp_path / "a.npz"))
    assert per_class(dataset) == [[4, 2, 3], [4, 2, 3]]
    assert dataset.labels[0] == 1, "number 0 stands for what the file calls it, not for the plan's first class"


def test_an_npz_file_whose_share_fails_while_it_is_read_is_named_and_not_the_disk_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests of the images were remembered, so their pixels are read only when the cache is written."""
    told: list[LocalStateError] = []
    monkeypatch.setattr(durable, "on_failure", told.append)
    path = tmp_path / "a.npz"
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(20) % 2)
    opened(tmp_path, DataConfig(path=path))
    for cached in (tmp_path / "cache").glob("*.images"):
        cached.unlink()

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    gather = data_module.gather
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "gather", lambda *a: (gather(*a), patch.setattr(np, "load", failing))[0])
        with pytest.raises(DataUnavailable, match=r"^a\.npz cannot be read: Input/output error\n.*share"):
            opened(tmp_path, DataConfig(path=path))
    assert told == [] and not list((tmp_path / "cache").glob("*.images*"))
    assert len(opened(tmp_path, DataConfig(path=path)).images) == 20


def test_an_npz_file_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object), labels=np.array([object()]))
    with pytest.raises(DataError, match="without pickled objects"):
        opened(tmp_path, DataConfig(path=tmp_path / "a.npz"))


def test_dicom_in_a_folder_is_grouped_by_its_patient_id(tmp_path: Path) -> None:
    for n in range(24):
        folder = tmp_path / "d" / PLAN.classes[n // 2 % 2]
        write_dicom(folder / f"{n}", noise(n), PatientID=f"MRN{n // 2}")  # no suffix, as scanners write them
    report = checked(tmp_path, DataConfig(path=tmp_path / "d"))
    assert (report.images, report.patients, report.grouped) == (24, 12, True)
    everything = b"".join(p.read_bytes() for p in (tmp_path / "cache").iterdir())
    assert b"MRN" not in everything


def test_one_colour_image_makes_the_whole_set_colour(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 80, "malignant": 4})
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    write_png(root / "malignant/red.png", red)
    dataset = opened(tmp_path, DataConfig(path=root))
    assert dataset.images.shape == (85, 16, 16, 3)
    sha256 = digests_module.hashlib.sha256((root / "malignant/red.png").read_bytes()).hexdigest()
    np.testing.assert_array_equal(dataset.images[dataset.ids.index(sha256)], red)
    first = decode_image(root / "benign/000.png", 16)
    np.testing.assert_array_equal(dataset.images[0], np.stack([first] * 3, axis=-1))


@pytest.mark.parametrize("chunk", [100, 256, 300])
def test_turning_the_set_to_colour_works_chunk_by_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """The colour image comes after grey ones that fill several chunks, and grey ones follow it."""
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", chunk)
    root = write_folders(tmp_path / "d", {"benign": 7, "malignant": 7})
    write_png(root / "malignant/000a.png", np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    dataset = opened(tmp_path, DataConfig(path=root))
    by_id = {_sha256(p): decode_image(p, 16) for p in root.rglob("*.png")}
    for image, sha256 in zip(dataset.images, dataset.ids, strict=True):
        pixels = by_id[sha256]
        np.testing.assert_array_equal(image, pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1))


# ---------------------------------------------------------------- the ledger


def test_images_added_later_move_no_patient(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 20, "malignant": 20})
    before = opened(tmp_path, DataConfig(path=root))
    for n in range(30):
        write_png(root / "benign" / f"000-new{n}.png", noise(500 + n))
    after = opened(tmp_path, DataConfig(path=root))
    sides = dict(zip(after.ids, after.split.tolist(), strict=True))
    assert len(after.ids) == 70
    assert {i: sides[i] for i in before.ids} == dict(zip(before.ids, before.split.tolist(), strict=True))


def test_the_ledger_keeps_a_page_per_seed_and_who_is_gone(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 20, "malignant": 20})
    first = opened(tmp_path, DataConfig(path=root))
    opened(tmp_path, DataConfig(path=root), PLAN.model_copy(update={"seed": 2}))
    opened(tmp_path, DataConfig(path=root, exclude=("benign/003.png",)))
    pages = json.loads((tmp_path / "splits.json").read_text())["splits"]
    assert sorted(pages) == ["seed 1, 60/10/30", "seed 2, 60/10/30"]
    assert pages["seed 1, 60/10/30"] == dict(zip(first.ids, first.split.tolist(), strict=True))


def test_threat_19_the_ledger_is_private_and_names_no_patient(tmp_path: Path) -> None:
    opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", table_rows())))
    assert "pt1" not in (tmp_path / "splits.json").read_text()
    private = [tmp_path / "splits.json", *(tmp_path / "cache").iterdir()]
    assert len(private) == 3 and all(p.stat().st_mode & 0o077 == 0 for p in private)


def test_a_damaged_ledger_stops_instead_of_making_a_new_split(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    (tmp_path / "splits.json").write_text('{"version": 1, "spl')
    with pytest.raises(LocalStateError, match="split ledger"):
        opened(tmp_path, data)


# ---------------------------------------------------------------- the cache


def counting(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many files are hashed and decoded from now on."""
    count = {"hashed": 0, "decoded": 0}
    digest, decode = digests_module._digest, cache_module.decode_image

    def counted_digest(*args: Any) -> Any:
        count["hashed"] += 1
        return digest(*args)

    def counted_decode(*args: Any) -> Any:
        count["decoded"] += 1
        return decode(*args)

    monkeypatch.setattr(digests_module, "_digest", counted_digest)
    monkeypatch.setattr(cache_module, "decode_image", counted_decode)
    return count


def test_the_second_open_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = counting(monkeypatch)
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    first = opened(tmp_path, data)
    assert count == {"hashed": 20, "decoded": 20}
    second = opened(tmp_path, data)
    assert count == {"hashed": 20, "decoded": 20}
    np.testing.assert_array_equal(first.images, second.images)
    assert (first.ids, first.split.tolist()) == (second.ids, second.split.tolist())


def test_a_changed_image_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    before = opened(tmp_path, DataConfig(path=root))
    count = counting(monkeypatch)
    write_png(root / "benign/000.png", noise(99))
    os.utime(root / "benign/000.png", ns=(time.time_ns(), time.time_ns() + 1_000_000))
    after = opened(tmp_path, DataConfig(path=root))
    assert count == {"hashed": 1, "decoded": 20}
    assert after.ids[0] != before.ids[0] and after.ids[1:] == before.ids[1:]
    np.testing.assert_array_equal(after.images[0], decode_image(root / "benign/000.png", 16))


@pytest.mark.parametrize("damage", ["truncated", "one bit", "header", "empty"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    good = opened(tmp_path, data).images.copy()
    (path,) = (tmp_path / "cache").glob("*.images")
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-7] ^= 1
    elif damage == "header":
        content[5] ^= 255
    path.unlink()
    path.write_bytes({"truncated": content[:-100], "empty": b""}.get(damage, bytes(content)))
    count = counting(monkeypatch)
    np.testing.assert_array_equal(opened(tmp_path, data).images, good)
    assert count == {"hashed": 0, "decoded": 20}


def test_a_damaged_index_costs_only_time(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    first = opened(tmp_path, data)
    (index,) = (tmp_path / "cache").glob("*.index")
    index.write_text('{"version": 1, "files": 3')
    assert opened(tmp_path, data).ids == first.ids


def remembered(tmp_path: Path) -> list[int]:
    """How many images each index knows."""
    return [len(json.loads(p.read_bytes())["files"]) for p in (tmp_path / "cache").glob("*.index")]


def test_images_that_are_exported_anew_each_night_are_remembered_once(tmp_path: Path) -> None:
    """New times of change, one new name, one gone. Before, each night added all of them, for ever."""
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    for night in range(4):
        for path in root.rglob("*.png"):
            os.utime(path, (1e9 + night, 1e9 + night))
        (root / f"benign/{night:03d}.png").rename(root / f"benign/1{night:02d}.png")
        opened(tmp_path, DataConfig(path=root))
        assert remembered(tmp_path) == [20]


def test_two_tables_of_one_folder_remember_their_images_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table_rows(80)
    tables = [
        DataConfig(path=write_table(tmp_path / f"d/{name}.csv", part))
        for name, part in (("old", rows[:40]), ("new", rows[40:]))
    ]
    for data in tables:
        opened(tmp_path, data)
    count = counting(monkeypatch)
    for data in tables:
        opened(tmp_path, data)
    assert count == {"hashed": 0, "decoded": 0}
    assert remembered(tmp_path) == [40, 40]


def test_of_tables_that_are_named_by_their_day_the_last_few_are_remembered(tmp_path: Path) -> None:
    for day in range(6):
        opened(tmp_path, DataConfig(path=write_table(tmp_path / f"d/{day}.csv", table_rows(40))))
    assert remembered(tmp_path) == [40] * files_module.CACHES_KEPT


def test_only_the_last_few_caches_are_kept(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 4, "malignant": 4}))
    for size in range(16, 22):
        opened(tmp_path, data, PLAN.model_copy(update={"image_size": size}))
    assert len(list((tmp_path / "cache").glob("*.images"))) == files_module.CACHES_KEPT
    assert not list((tmp_path / "cache").glob(".*"))


def test_progress_goes_over_all_images_twice_when_nothing_is_known(tmp_path: Path) -> None:
    """Once for reading, once for decoding; the worker turns it into signs of life."""
    seen: list[tuple[int, int]] = []
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 5, "malignant": 5}))
    opened(tmp_path, data, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 10) for n in range(1, 11)] * 2


def test_the_images_are_never_written_to(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 5, "malignant": 5})
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*.png")}
    opened(tmp_path, DataConfig(path=root))
    checked(tmp_path, DataConfig(path=root))
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()} == before


# ---------------------------------------------------------------- what bad input gets


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": None}, "data.path is not set"),
        ({"path": Path("/nowhere/at/all")}, "does not exist"),
        ({"columns": {"lable": "x"}}, "'lable' is no column we know; did you mean 'label'"),
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


def test_every_unknown_label_is_named_at_once_with_line_and_nearest_class(tmp_path: Path) -> None:
    rows = table_rows()
    rows[2]["label"], rows[5]["label"] = "malignent", "Benign"
    with pytest.raises(DataError) as caught:
        opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    assert "t.csv:4: label 'malignent' is no class; did you mean 'malignant'?" in caught.value.message
    assert "t.csv:7: label 'Benign' is no class; did you mean 'benign'?" in caught.value.message


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


# ---------------------------------------------------------------- data check


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
    side = {p.relative_to(root).as_posix(): split_of[_sha256(p)] for p in root.rglob("*.*")}
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


# ---------------------------------------------------------------- real images


def test_breast_ultrasound_by_scanner(tmp_path: Path) -> None:
    """The three larger scanners of BUS-BRA are usable as they are; ratios and patients as they should be."""
    path = real_data("busbra") / "metadata.csv"
    sizes = {"GE Logiq 7": (617, 285), "Toshiba Aplio 300": (71, 68), "U-Systems": (14, 11)}
    for device, expected in sizes.items():
        data = DataConfig(path=path, columns={"path": "file", "label": "class"}, filter={"device": device})
        dataset = opened(tmp_path / device, data)
        table = np.array(per_class(dataset))
        assert tuple(table.sum(axis=1)) == expected and dataset.images.ndim == 3 and table.min() >= 1
        ideal = table.sum(axis=1, keepdims=True) * (0.6, 0.1, 0.3)
        assert np.abs(table - ideal).max() <= 2, "a patient has two images: no split can promise more"


def test_chest_films_keep_their_published_test_set(tmp_path: Path) -> None:
    root = real_data("cxr_pneumonia")
    data = DataConfig(path=root / "metadata.csv", columns={"path": "file", "label": "class"})
    report = checked(tmp_path, data, Plan(classes=("normal", "pneumonia"), image_size=16))
    assert report.ok and report.channels == 1, "stored as RGB, but grey"
    assert (report.counts["normal"]["test"], report.counts["pneumonia"]["test"]) == (231, 387)
    assert report.near_duplicates == ()


def _sha256(path: Path) -> str:
    return digests_module.hashlib.sha256(path.read_bytes()).hexdigest()


def test_decode_bytes_and_decode_image_agree(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", noise(1))
    np.testing.assert_array_equal(decode_bytes(path.read_bytes(), 16), decode_image(path, 16))
