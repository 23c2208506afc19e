"""From a hospital's folder, table or .npz file to a split data set."""

from __future__ import annotations

import errno
import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import PLAN, TEST, TRAIN, VALIDATION, checked, opened, per_class, sha256_of, table_rows
from pictures import decode_image, noise, real_data, write_dicom, write_folders, write_png, write_table

from hsl_node.errors import DataError, DataUnavailable, LocalStateError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import durable
from hsl_node.train.data import digests as digests_module
from hsl_node.train.data import gathering as data_module


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
        path=tmp_path / "d/t.csv",
        columns={"label": "class"},
        filter={"device": "Logiq 7 *"},
        labels={"benign": "benign"},
    )
    with pytest.raises(DataError, match="2 patients"):  # 8 images of 4 patients: too few, but rightly selected
        opened(tmp_path, data)
    assert checked(tmp_path, data).images == 8
    assert checked(tmp_path, DataConfig(**{**data.model_dump(), "filter": {"device": "Logiq 70 @10MHz"}})).images == 16


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
    dataset = opened(tmp_path, DataConfig(path=tmp_path / "a.npz", labels={"0": "benign", "1": "malignant"}))
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
    np.savez(path, images=images, labels=np.arange(20) % 2, class_names=np.array(PLAN.classes))
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


def test_images_of_a_folder_are_found_by_their_content(tmp_path: Path) -> None:
    """As scanners and archives name them; a DICOMDIR and notes are counted as no images, a damaged .png as one."""
    root = write_folders(tmp_path / "d", {"benign": 6, "malignant": 6})
    for name in ("1.2.826.0.1.3680043.8.498.17", "0.IMA", "IM0001", "scan.xyz"):
        write_dicom(root / "benign" / name, noise(len(name)))
    (root / "malignant/000.png").rename(root / "malignant/000")
    (root / "benign/DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(20) + b"1.2.840.10008.1.3.10")
    (root / "benign/notes.txt").write_bytes(b"P1 has a cough")
    (root / "benign/damaged.png").write_bytes(b"")
    report = checked(tmp_path, DataConfig(path=root))
    assert sum(report.counts["benign"].values()) == 10 and sum(report.counts["malignant"].values()) == 6
    assert "2 files of the folder are no images and were passed over" in report.warnings
    assert report.unreadable == (("benign/damaged.png", "is empty"),)


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


def test_the_images_before_the_first_in_colour_and_after_it_are_as_they_were(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 7, "malignant": 7})
    write_png(root / "malignant/000a.png", np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    dataset = opened(tmp_path, DataConfig(path=root))
    by_id = {sha256_of(p): decode_image(p, 16) for p in root.rglob("*.png")}
    for image, sha256 in zip(dataset.images, dataset.ids, strict=True):
        pixels = by_id[sha256]
        np.testing.assert_array_equal(image, pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1))


# ---------------------------------------------------------------- real images


def test_breast_ultrasound_by_scanner(tmp_path: Path) -> None:
    """The three larger scanners of BUS-BRA are usable as they are; ratios and patients as they should be."""
    path = real_data("busbra") / "metadata.csv"
    sizes = {"GE Logiq 7 @10-14MHz": (617, 285), "Toshiba Aplio 300 *": (71, 68), "U-Systems*": (14, 11)}
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


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
LABELS = np.arange(12) % 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": np.repeat(PIXELS[..., None], 4, 3)}, r"images holds uint8 of shape \(12, 8, 8, 4\)"),
        ({"images": np.repeat(PIXELS[:, None], 3, 1)}, r"shape \(12, 3, 8, 8\)"),
        ({"images": PIXELS.reshape(12, -1)}, r"shape \(12, 64\)"),
        ({"images": np.array(["a.png"] * 12)}, "images holds str"),
        ({"images": PIXELS.astype(complex)}, "images holds complex128"),
        ({"labels": LABELS.astype(float)}, r"not one whole number or word per image \(float64, shape \(12,\)\)"),
        ({"labels": np.eye(2, dtype=int)[LABELS]}, r"\(int64, shape \(12, 2\)\)"),
        ({"mask_images": PIXELS, "mask_labels": LABELS}, "mask_images: neither train, val nor test"),
        ({"class_names": np.array({"a": 1})}, "it holds some"),
    ],
)
def test_arrays_that_are_no_images_or_labels_are_told_with_type_and_shape(tmp_path: Path, change, said: str) -> None:
    """Each image used to be "empty", and masks were images."""
    np.savez(tmp_path / "d.npz", **{"images": PIXELS, "labels": LABELS, **change})
    with pytest.raises(DataError, match=said):
        opened(tmp_path, DataConfig(path=tmp_path / "d.npz", labels={"0": "benign", "1": "malignant"}))


def test_arrays_in_other_letters_count_and_others_are_named(tmp_path: Path) -> None:
    """`Test_Images` beside `train_images` was left out without a word."""
    words = np.array([b"benign ", b"malignant"])[LABELS]
    test = {"Test_Images": PIXELS[6:], "Test_Labels": words[6:], "patients": LABELS}
    np.savez(tmp_path / "d.npz", train_images=PIXELS[:6], train_labels=words[:6], **test)
    report = checked(tmp_path, DataConfig(path=tmp_path / "d.npz"))
    assert report.images == 12 and sum(c["test"] for c in report.counts.values()) == 6
    assert "d.npz: not read: patients" in report.warnings


def test_numbers_other_than_bytes_are_stretched_and_that_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=PIXELS.astype(np.int64), labels=np.array(["benign", "malignant"])[LABELS])
    (told,) = (w for w in checked(tmp_path, DataConfig(path=tmp_path / "d.npz")).warnings if "int64" in w)
    assert "smallest and largest value become black and white" in told


def test_an_npz_file_that_is_none_or_is_damaged_inside_is_no_traceback(tmp_path: Path) -> None:
    np.save(tmp_path / "n.npy", PIXELS)
    (tmp_path / "n.npy").rename(tmp_path / "n.npz")
    (tmp_path / "g.npz").write_bytes(gzip.compress(b"x"))
    for name in ("n.npz", "g.npz"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read as \.npz.*: it is no archive of arrays"):
            opened(tmp_path, DataConfig(path=tmp_path / name))
    np.savez(tmp_path / "d.npz", images=PIXELS.repeat(99, 1), labels=np.array(["benign", "malignant"])[LABELS])
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[50_000] ^= 255
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"d\.npz: images is damaged or cut short"):
        opened(tmp_path, DataConfig(path=tmp_path / "d.npz"))
