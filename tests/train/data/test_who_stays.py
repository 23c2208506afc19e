"""Who was trained on is never tested with: images are known by content and by patient, whatever a table says later."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from data_sets import PLAN, TEST, opened, table_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import noise, write_dicom, write_folders, write_table

from hsl_node.errors import DataError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.data.splits import patient_key

Row = dict[str, str]
SPELLINGS = (
    lambda n: f"{n}",
    lambda n: f"{n}.0",
    lambda n: f"{n:05d}",
    lambda n: f" {n},0 ",
    lambda n: f"P-{n}",
    lambda n: f"new {n * 7919}",
)


def rows_of(count: int = 60, patient: str = "{}") -> list[Row]:
    """Two images per patient."""
    return [{**row, "patient": patient.format(n // 2)} for n, row in enumerate(table_rows(count))]


def sides(dataset: Dataset) -> dict[str, int]:
    return dict(zip(dataset.ids, dataset.split.tolist(), strict=True))


def rewritten(path: Path, rows: list[Row]) -> DataConfig:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return DataConfig(path=path)


def moved(before: Dataset, after: Dataset) -> int:
    then, now = sides(before), sides(after)
    return sum(then[i] != now[i] for i in then.keys() & now.keys())


@pytest.mark.parametrize("again", ["{}.0", "0{}", "{},0", "patient nr {}"])
def test_threat_31_a_patient_that_is_spelt_otherwise_keeps_its_side(tmp_path: Path, again: str) -> None:
    """A column that once held a gap turns 7 into 7.0; another export gives other names to all."""
    before = opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows_of())))
    after = opened(tmp_path, rewritten(tmp_path / "d/t.csv", rows_of(patient=again)))
    assert moved(before, after) == 0 and len(after.ids) == 60


def test_threat_31_images_stay_where_they_are_when_the_patient_column_is_lost(tmp_path: Path) -> None:
    before = opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows_of())))
    rows = [{k: v for k, v in row.items() if k != "patient"} for row in rows_of()]
    after = opened(tmp_path, rewritten(tmp_path / "d/t.csv", rows))
    assert moved(before, after) == 0


def test_threat_31_patients_who_were_split_as_single_images_are_refused_with_counts_and_a_remedy_that_works(
    tmp_path: Path,
) -> None:
    rows = [{k: v for k, v in row.items() if k != "patient"} for row in rows_of()]
    before = opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    then = sides(before)
    pairs = [set(list(then.values())[n : n + 2]) for n in range(0, 60, 2)]
    apart = sum(len(pair) == 2 for pair in pairs)
    data = rewritten(tmp_path / "d/t.csv", rows_of())
    with pytest.raises(
        DataError, match=rf"already on different sides.*\({2 * apart} images in {apart} groups\)"
    ) as told:
        opened(tmp_path, data)
    assert '{ patient = "" }' in told.value.remedy
    assert moved(before, opened(tmp_path, DataConfig(path=data.path, columns={"patient": ""}))) == 0


def test_threat_31_a_ledger_of_the_version_before_knows_its_patients_in_another_spelling(tmp_path: Path) -> None:
    """It holds hashes of the patients as they were written then, and of no image."""
    for then, now in (("7.0", "7"), ("7", "007"), ("Pt 7", "Pt 7")):
        folder = tmp_path / now
        rows = [{**row, "patient": now if n < 2 else row["patient"]} for n, row in enumerate(rows_of(40, "x{}"))]
        write_table(folder / "d/t.csv", rows)
        for side in (0, 1, 2):
            page = {patient_key(then): side}
            (folder / "splits.json").write_text(
                json.dumps({"version": 1, "splits": {"seed 1, 60/10/30": page}}), encoding="utf-8"
            )
            assert opened(folder, DataConfig(path=folder / "d/t.csv")).split[:2].tolist() == [side] * 2


@pytest.mark.parametrize("kind", ["table", "dicom"])
def test_threat_31_whom_the_version_before_took_for_a_patient_called_unknown_stays_where_all_of_it_was(
    tmp_path: Path, kind: str
) -> None:
    rows = [{**row, "patient": "unknown" if n < 10 else row["patient"]} for n, row in enumerate(rows_of(40, "x{}"))]
    path = write_table(tmp_path / "d/t.csv", rows)
    if kind == "dicom":  # no patient in the table, and the same word in the files
        for n in range(10):
            write_dicom(tmp_path / "d" / rows[n]["path"], noise(n), PatientID="unknown")
        path = rewritten(path, [{**row, "patient": row["patient"].replace("unknown", "")} for row in rows]).path
    for side in (0, 1, 2):
        ledger = {"version": 1, "splits": {"seed 1, 60/10/30": {patient_key("unknown"): side}}}
        (tmp_path / "splits.json").write_text(json.dumps(ledger), encoding="utf-8")
        for _ in range(2):  # the second time from memory
            found = opened(tmp_path, DataConfig(path=path))
            assert found.split[:10].tolist() == [side] * 10 and found.patients[:10] == (None,) * 10


def test_threat_31_whom_the_version_before_knew_by_its_file_stays_where_the_table_now_names_it(tmp_path: Path) -> None:
    """A row without a patient goes by rows of the same PatientID that have one; the ledger holds the PatientID."""
    rows = [
        {**row, "patient": "" if n < 5 else "seven" if n < 10 else row["patient"]} for n, row in enumerate(rows_of())
    ]
    path = write_table(tmp_path / "d/t.csv", rows)
    for n in range(10):
        write_dicom(tmp_path / "d" / rows[n]["path"], noise(n), PatientID="A7")
    for side in (0, 1, 2):
        ledger = {"version": 1, "splits": {"seed 1, 60/10/30": {patient_key("A7"): side}}}
        (tmp_path / "splits.json").write_text(json.dumps(ledger), encoding="utf-8")
        assert opened(tmp_path, DataConfig(path=path)).split[:10].tolist() == [side] * 10


def test_threat_31_a_split_that_is_given_later_moves_nobody(tmp_path: Path) -> None:
    """`evaluate` reads node.toml again: it would have tested with images that were trained on."""
    rows = [{**row, "fold": ("train", "val", "test")[n // 4 % 3]} for n, row in enumerate(rows_of())]
    path = write_table(tmp_path / "d/t.csv", rows)
    before = opened(tmp_path, DataConfig(path=path))
    into = sum(s != TEST and n // 4 % 3 == TEST for n, s in enumerate(before.split.tolist()))
    assert into > 0
    with pytest.raises(DataError, match=r"would move .* images from train to test") as told:
        opened(tmp_path, DataConfig(path=path, columns={"split": "fold"}))
    numbers = [
        int(w) for line in told.value.message.split(", ") for w in line.split() if w.isdigit() and "to test" in line
    ]
    assert sum(numbers) == into
    assert moved(before, opened(tmp_path, DataConfig(path=path))) == 0


def test_threat_31_an_image_that_goes_to_another_patient_does_not_go_to_another_side(tmp_path: Path) -> None:
    before = opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows_of())))
    rows = rows_of()
    train, test = (before.split.tolist().index(side) for side in (0, 2))
    rows[train]["patient"] = rows[test]["patient"]
    with pytest.raises(DataError, match="already on different sides"):
        opened(tmp_path, rewritten(tmp_path / "d/t.csv", rows))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spelt=st.sampled_from(SPELLINGS), seed=st.integers(0, 1000), change=st.sampled_from(["add", "drop", "none"]))
def test_threat_31_no_order_spelling_or_further_column_moves_an_image(
    tmp_path_factory: pytest.TempPathFactory, spelt, seed: int, change: str
) -> None:
    folder = tmp_path_factory.mktemp("property")
    rows = rows_of(24)
    before = opened(folder, DataConfig(path=write_table(folder / "d/t.csv", rows)))
    again = [{**row, "patient": spelt(n // 2)} for n, row in enumerate(rows)]
    random.Random(seed).shuffle(again)
    if change == "add":
        again = [{"note": f"n{n}", **row, "site": "here"} for n, row in enumerate(again)]
    if change == "drop":
        again = [{k: v for k, v in row.items() if k != "patient"} for row in again]
    after = opened(folder, rewritten(folder / "d/t.csv", again))
    assert moved(before, after) == 0 and set(after.ids) == set(before.ids)


# ---------------------------------------------------------------- DICOM without a patient


def test_threat_31_dicom_without_patient_is_grouped_by_study_also_beside_files_that_name_one(tmp_path: Path) -> None:
    """20 studies of two images; of one study, one image names the patient, and the patient has a second study."""
    for n in range(40):
        who = {0: "MRN1", 2: "MRN1"}.get(n, "unknown" if n % 3 else "")
        folder = tmp_path / "d" / PLAN.classes[n // 2 % 2]
        write_dicom(folder / f"{n:02d}.dcm", noise(n), PatientID=who, StudyInstanceUID=f"1.2.3.{n // 2}")
    dataset = opened(tmp_path, DataConfig(path=tmp_path / "d"))
    of_study: dict[int, set[int]] = {}
    numbers = [n for c in (0, 1) for n in range(40) if n // 2 % 2 == c]  # the order of the folders
    for n, side, group in zip(numbers, dataset.split.tolist(), dataset.group.tolist(), strict=True):
        of_study.setdefault(n // 2, set()).add((side, group))
    assert all(len(s) == 1 for s in of_study.values()) and of_study[0] == of_study[1]
    assert dataset.summary is not None and dataset.summary.by == "mixed"
    assert dataset.summary.named == {"patient": 2, "study": 38, "image": 0}
    assert sum(dataset.summary.groups.values()) == 19


# ---------------------------------------------------------------- what every page of results can read


def test_the_summary_says_by_what_was_split_and_how_many_stand_behind_each_side(tmp_path: Path) -> None:
    by_patient = opened(tmp_path / "a", DataConfig(path=write_table(tmp_path / "a/d/t.csv", rows_of(40)))).summary
    assert by_patient is not None and by_patient.by == "patient"
    assert by_patient.images == {"train": 24, "validation": 4, "test": 12}
    assert by_patient.groups == {"train": 12, "validation": 2, "test": 6}
    alone = opened(tmp_path / "b", DataConfig(path=write_folders(tmp_path / "b/d", {"benign": 10, "malignant": 10})))
    assert alone.summary is not None and alone.summary.by == "image"
    assert alone.summary.named == {"patient": 0, "study": 0, "image": 20} and len(set(alone.group.tolist())) == 20
