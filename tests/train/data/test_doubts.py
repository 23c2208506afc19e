"""Any doubt about patients, labels or pictures is told, with the count, by `data check` and at a start alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_sets import PLAN, checked, opened, table_rows
from pictures import noise, real_data, write_dicom, write_folders, write_png, write_table
from PIL import Image

from hsl_node.errors import DataError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.train.data.doubts import examine
from hsl_node.train.data.gathering import gather
from hsl_node.train.data.patients import names_somebody, spelling
from hsl_node.train.data.splits import assign
from hsl_node.train.progress import unheard

Row = dict[str, str]


def warned(tmp_path: Path, data: DataConfig, plan: Plan = PLAN) -> tuple[str, ...]:
    """The warnings of `data check`, which a start gives as well, but for what only a comparison of all pairs finds."""
    warnings = checked(tmp_path, data, plan).warnings
    there = opened(tmp_path, data, plan).warnings
    assert set(there) <= set(warnings) and {w for w in warnings if "patient" in w} <= set(there)
    return warnings


def rows_of(count: int = 60) -> list[Row]:
    return table_rows(count)


# ---------------------------------------------------------------- patients


@pytest.mark.parametrize("word", ["", "nan", "NA", "n/a", "None", "NULL", "unknown", "Anonymous", "<NA>", "-", "?"])
def test_threat_31_a_word_that_names_no_patient_is_none_and_is_counted(tmp_path: Path, word: str) -> None:
    """As one patient its images were on one side; as nobody's they may lie on both, and that is said."""
    rows = [{**row, "patient": word if n % 3 == 0 else row["patient"]} for n, row in enumerate(rows_of())]
    data = DataConfig(path=write_table(tmp_path / "d/t.csv", rows))
    report = checked(tmp_path, data)
    assert report.summary.named == {"patient": 40, "study": 0, "image": 20}
    (told,) = (w for w in warned(tmp_path, data) if "name no patient" in w)
    said = f"{word!r} 20" if word else "empty 20"
    assert told.startswith(f"20 of 60 images name no patient ({said})")


def test_threat_31_a_table_whose_patients_are_all_unknown_says_so(tmp_path: Path) -> None:
    rows = [{**row, "patient": "nan"} for row in rows_of()]
    report = checked(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    assert not report.grouped and report.patients == 60
    assert any(w.startswith("no patient is known ('nan' 60)") for w in report.warnings)


def test_threat_31_an_identifier_with_most_of_the_images_may_be_a_placeholder(tmp_path: Path) -> None:
    rows = [{**row, "patient": "ZZZ-0" if n >= 40 else row["patient"]} for n, row in enumerate(rows_of())]
    warnings = warned(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    (told,) = (w for w in warnings if "one patient has" in w)
    assert told.startswith("one patient has 20 of 60 images") and "t.csv:42" in told and "ZZZ" not in told


@pytest.mark.parametrize("name", ["Patient ID", "patient_id", "PatientID", "case", "Subject", "Pat. Nr. (subject)"])
def test_threat_31_the_column_that_may_name_the_patients_is_named_with_a_line_that_works(
    tmp_path: Path, name: str
) -> None:
    rows = [{"path": r["path"], "label": r["label"], name: r["patient"]} for r in rows_of()]
    path = write_table(tmp_path / "d/t.csv", rows)
    (told,) = (w for w in checked(tmp_path, DataConfig(path=path)).warnings if "no patient is known" in w)
    line = told[told.index("columns = ") : told.index(" under [data]")]
    assert line == f'columns = {{ patient = "{name}" }}'
    assert checked(tmp_path, DataConfig(path=path, columns=toml(line)["columns"])).patients == 30


def toml(line: str) -> dict[str, dict[str, str]]:
    import tomllib

    return tomllib.loads(line)


def test_threat_31_several_spellings_of_a_patient_are_one_and_are_counted(tmp_path: Path) -> None:
    rows = [{**row, "patient": f"{n // 2}.0" if n % 2 else f"{n // 2}"} for n, row in enumerate(rows_of())]
    data = DataConfig(path=write_table(tmp_path / "d/t.csv", rows))
    assert checked(tmp_path, data).patients == 30
    assert any(w.startswith("30 patients are spelt in several ways") for w in warned(tmp_path, data))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("2024-01-{:02d}", "{}.1.2024"), ("1/{}/2024", "{:02d}.01.2024"), ("2024-3-{}", "2024-03-{:02d} 00:00:00")),
        *(("P{:03d}", "P{}"), ("P-{}", "p{}"), ("pat_{}", "pat {}"), ('="{:05d}"', "{:05d}"), ("'{:05d}", "{}")),
        *(("P{}\u200b", "P{}"), ("\ufeff{}", "{}"), ("A\u2011{}", "A-{}"), ("+{}", "{}")),
        *(("1,{:03d}", "1{:03d}"), ("1.{:03d}", "1{:03d}"), ("{}.0000E+04", "{}0000"), ("{},5e5", "{}50000")),
    ],
)
def test_threat_31_what_a_spreadsheet_or_a_second_export_makes_of_an_identifier(
    tmp_path: Path, one: str, other: str
) -> None:
    words = [(other if n % 2 else one).format(n // 2 % 9 + 1 if "e" in one.lower() else n // 2) for n in range(36)]
    rows = [{**row, "patient": word} for row, word in zip(rows_of(36), words, strict=True)]
    assert checked(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows))).patients == len(set(words)) // 2


def test_identifiers_that_differ_in_more_than_their_spelling_stay_apart() -> None:
    apart = [
        "1-2",
        "12",
        "1-20",
        "P1",
        "P10",
        "Q1",
        "101",
        "1.2.840.1",
        "1.2.840.10",
        "2024-01-05",
        "2024-1-6",
        "9E999999",
        "anon 12",
        "K.A.",
    ]
    assert len({spelling(word) for word in apart}) == len(apart) and all(map(names_somebody, apart))


@pytest.mark.parametrize(
    "word", ["#REF!", "#NAME?", "not known", "no patient", "Anonymous^Patient", "-1", "-99.0", "?"]
)
def test_threat_31_words_and_codes_for_nobody_are_counted(tmp_path: Path, word: str) -> None:
    rows = [{**row, "patient": word if n % 10 == 0 else row["patient"]} for n, row in enumerate(rows_of())]
    warnings = warned(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    assert any(w.startswith(f"6 of 60 images name no patient ({word!r} 6)") for w in warnings)


@pytest.mark.parametrize("word", ["k.A.", "zu klären", "0", "9999"])
def test_threat_31_a_patient_called_unlike_the_others_is_a_doubt(tmp_path: Path, word: str) -> None:
    """Whatever the language: it stays one patient, and its first row is named."""
    rows = [{**row, "patient": word if n % 10 == 0 else row["patient"]} for n, row in enumerate(rows_of())]
    warnings = warned(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    assert any(w.startswith("6 of 60 images are of 1 patients called unlike") and "t.csv:2" in w for w in warnings)


def test_one_identifier_for_all_is_a_doubt(tmp_path: Path) -> None:
    """A spreadsheet rounds 123456789001, 123456789002 and so on to one number."""
    rows = [{**row, "patient": f"{123456789000 + n:.5E}"} for n, row in enumerate(rows_of())]
    report = checked(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    assert any(w.startswith("one patient has 60 of 60 images: does") for w in report.warnings)


def test_threat_31_patients_that_are_one_by_their_dicom_files_are_a_doubt(tmp_path: Path) -> None:
    """The column holds a number of the examination: 24 of them, of 12 patients."""
    for n in range(24):
        write_dicom(tmp_path / f"d/{n}.dcm", noise(n), PatientID=f"MRN{n // 2}")
    rows = [{"path": f"{n}.dcm", "label": PLAN.classes[n // 2 % 2], "patient": f"exam {n}"} for n in range(24)]
    warnings = warned(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows)))
    assert any(w.startswith("24 patients of the table are 12 by the PatientID") for w in warnings)


@pytest.mark.parametrize("same", ["PatientID", "StudyInstanceUID"])
def test_threat_31_a_row_without_patient_is_of_whom_the_table_names_for_the_same_dicom_patient_or_study(
    tmp_path: Path, same: str
) -> None:
    for n in range(40):
        tags = {"PatientID": "", "StudyInstanceUID": f"1.2.{n + 1}", same: f"1.3.{n // 2 + 1}"}
        write_dicom(tmp_path / f"d/img/{n}.png", noise(n), **tags)
    rows = [{**row, "patient": row["patient"] if n % 2 else ""} for n, row in enumerate(rows_of(40))]
    assert checked(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows))).patients == 20


def test_one_study_in_all_files_is_told_with_a_remedy_that_works(tmp_path: Path) -> None:
    for n in range(40):
        write_dicom(
            tmp_path / f"d/{PLAN.classes[n // 2 % 2]}/{n}", noise(n), PatientID=f"P{n // 2}", StudyInstanceUID="1.2"
        )
    assert any(
        w.startswith("20 patients share 1 StudyInst")
        for w in checked(tmp_path, DataConfig(path=tmp_path / "d")).warnings
    )
    rows = [{**r, "path": f"{r['label']}/{n}"} for n, r in enumerate(rows_of(40))]
    assert checked(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", rows))).patients == 20


def test_threat_31_dicom_files_without_patient_are_counted_by_what_groups_them(tmp_path: Path) -> None:
    for n in range(24):
        tags = {"StudyInstanceUID": f"1.2.{n // 2}"} if n < 16 else {}
        write_dicom(tmp_path / "d" / PLAN.classes[n // 2 % 2] / f"{n}.dcm", noise(n), PatientID="", **tags)
    warnings = warned(tmp_path, DataConfig(path=tmp_path / "d"))
    assert any(w.startswith("16 of 24 images name no patient and are grouped by their DICOM study") for w in warnings)
    assert any(w.startswith("8 of 24 images name no patient") for w in warnings)


# ---------------------------------------------------------------- labels


def refused(tmp_path: Path, data: DataConfig, plan: Plan = PLAN) -> DataError:
    """`data check` is not ready, and a start refuses."""
    assert not checked(tmp_path, data, plan).ok
    with pytest.raises(DataError) as caught:
        opened(tmp_path, data, plan)
    return caught.value


def test_one_image_under_two_labels_of_a_table_is_a_problem_that_names_both(tmp_path: Path) -> None:
    rows = rows_of(24)
    path = write_table(tmp_path / "d/t.csv", rows)
    (tmp_path / "d/img/2.png").write_bytes((tmp_path / "d/img/0.png").read_bytes())  # another patient, malignant
    data = DataConfig(path=path)
    assert "t.csv:2 'benign' = t.csv:4 'malignant'" in refused(tmp_path, data).message
    (problem,) = checked(tmp_path, data).problems
    assert problem == "1 images are there under two labels: img/0.png 'benign' = img/2.png 'malignant'"
    assert opened(tmp_path, DataConfig(path=path, exclude=("img/2.png",))).images.shape[0] == 23


def test_one_image_in_two_class_folders_is_a_problem_also_where_it_was_saved_anew(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    with Image.open(root / "benign/003.png") as picture:
        picture.save(root / "malignant/copy.png", compress_level=0)
    assert (root / "malignant/copy.png").read_bytes() != (root / "benign/003.png").read_bytes()
    data = DataConfig(path=root)
    assert "folder benign 'benign' = folder malignant 'malignant'" in refused(tmp_path, data).message
    (problem,) = checked(tmp_path, data).problems
    assert "benign/003.png 'benign' = malignant/copy.png 'malignant'" in problem


def test_one_image_of_an_npz_file_under_two_labels_is_a_problem(tmp_path: Path) -> None:
    images = np.stack([noise(n, (28, 28)) for n in range(20)])
    images[7] = images[4]
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 2, class_names=np.array(PLAN.classes))
    message = refused(tmp_path, DataConfig(path=tmp_path / "a.npz")).message
    assert "a.npz images[4] 'benign' = a.npz images[7] 'malignant'" in message


@pytest.mark.timeout(60)
def test_a_table_with_a_row_for_each_of_two_findings_is_told_at_once(tmp_path: Path) -> None:
    """20,000 images under two labels: compared each with each they took minutes, at each start."""
    images = np.arange(20_000, dtype=np.uint16).view(np.uint8).reshape(-1, 1, 2)
    twice = dict(train_images=images, train_labels=np.zeros(20_000, int), val_images=images)
    np.savez(tmp_path / "a.npz", **twice, val_labels=np.ones(20_000, int), class_names=np.array(PLAN.classes))
    data, plan = DataConfig(path=tmp_path / "a.npz", columns={"split": ""}), PLAN
    gathered = gather(data, plan, tmp_path / "cache", unheard)
    found = examine(data, gathered, None, assign(gathered.images, plan.split_percent, plan.seed), plan)
    assert found.problems[0].text.startswith("20000 images are there under two labels: a.npz train_images[0] 'benign'")
    assert found.problems[0].text.endswith("... and 19992 more")


@pytest.mark.parametrize(
    ("words", "classes"),
    [
        (("M", "B"), ("benign", "malignant")),
        (("1", "0"), ("benign", "malignant")),
        (("masks", "malignant"), ("negative", "positive")),
        (("abnormal", "normal-variant"), ("normal", "pneumonia")),
    ],
)
def test_no_remedy_guesses_what_a_label_means(tmp_path: Path, words: tuple[str, str], classes: tuple[str, str]) -> None:
    """Followed, `M = "benign"` would have turned every diagnosis round."""
    rows = [{**row, "label": words[n // 2 % 2]} for n, row in enumerate(rows_of(12))]
    folders = write_folders(tmp_path / "f", dict.fromkeys(words, 5))
    for path in (write_table(tmp_path / "d/t.csv", rows), folders):
        with pytest.raises(DataError) as caught:
            opened(tmp_path, DataConfig(path=path), Plan(classes=classes, image_size=16))
        assert "did you mean" not in str(caught.value)
        remedy = caught.value.remedy
        line = remedy[remedy.index("labels = ") : remedy.index(" under [data]")]
        assert (
            toml(line)["labels"] == dict.fromkeys(words, "?") and f"classes of the plan: {', '.join(classes)}" in remedy
        )


def test_a_question_mark_that_was_copied_is_no_class_either(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 5, "M": 5}), labels={"M": "?"})
    with pytest.raises(DataError, match=r"label 'M' = '\?' in data.labels is no class"):
        opened(tmp_path, data)


def test_numbers_of_an_npz_file_without_names_are_asked_for(tmp_path: Path) -> None:
    """With the plan's order taken for theirs, pneumonia silently got the zeros."""
    plan = Plan(classes=("pneumonia", "normal"), image_size=16)
    np.savez(tmp_path / "a.npz", images=np.stack([noise(n) for n in range(20)]), labels=np.arange(20) % 2)
    with pytest.raises(DataError, match=r"a.npz images\[0\]: label '0' is no class") as caught:
        opened(tmp_path, DataConfig(path=tmp_path / "a.npz"), plan)
    assert 'labels = { "0" = "?", "1" = "?" }' in caught.value.remedy
    data = DataConfig(path=tmp_path / "a.npz", labels={"0": "normal", "1": "pneumonia"})
    assert opened(tmp_path, data, plan).labels.tolist() == [1, 0] * 10


def test_a_number_is_one_label_in_all_its_spellings(tmp_path: Path) -> None:
    spelt = {"benign": ("0", "0.0", "00"), "malignant": ("1", "1.0", "1,0")}
    rows = [{**row, "label": spelt[row["label"]][n % 3]} for n, row in enumerate(rows_of(24))]
    data = DataConfig(path=write_table(tmp_path / "d/t.csv", rows), labels={"0": "benign", "1": "malignant"})
    assert opened(tmp_path, data).labels.tolist() == [n // 2 % 2 for n in range(24)]


# ---------------------------------------------------------------- counts and pictures


def test_a_class_with_one_image_in_each_split_is_a_warning(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 60, "malignant": 3}))
    told = [w for w in warned(tmp_path, data) if "few images" in w]
    assert told == [
        "class 'malignant' has few images: below 3 in a split, figures say little"
        " (3 images of 3 patients: train 1, validation 1, test 1)"
    ]


def test_thumbnails_and_pictures_of_one_colour_are_counted(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 60, "malignant": 60})
    for n in range(3):
        write_png(root / f"benign/tiny{n}.png", noise(500 + n, (3, 4)))
    for n in range(2):
        write_png(root / f"benign/white{n}.png", np.full((20 + n, 20), 255, np.uint8))
    warnings = warned(tmp_path, DataConfig(path=root))
    assert "3 of 125 images are smaller than 16 px: thumbnails?" in warnings
    assert "2 of 125 images are of one colour all over: nothing can be learned from them" in warnings


# ---------------------------------------------------------------- a split that is given


def test_threat_31_a_given_split_that_cuts_copies_names_all_and_its_remedy_works(tmp_path: Path) -> None:
    parts = {f"{part}_images": np.stack([noise(n, (28, 28)) for n in range(at, at + 60)])
             for part, at in (("train", 0), ("val", 55), ("test", 110))}  # fmt: skip
    labels = {f"{part}_labels": np.arange(at, at + 60) % 2 for part, at in (("train", 0), ("val", 55), ("test", 110))}
    np.savez(tmp_path / "a.npz", **parts, **labels, class_names=np.array(PLAN.classes))
    with pytest.raises(DataError, match=r"\(20 images in 10 groups\)") as caught:
        checked(tmp_path, DataConfig(path=tmp_path / "a.npz"))
    for n in range(5):
        assert f"train_images[{55 + n}], val_images[{n}]" in caught.value.message
        assert f"val_images[{55 + n}], test_images[{n}]" in caught.value.message
    assert 'columns = { split = "" }' in caught.value.remedy
    assert checked(tmp_path, DataConfig(path=tmp_path / "a.npz", columns={"split": ""})).ok


def test_threat_31_folders_that_cut_copies_can_be_split_by_the_node(tmp_path: Path) -> None:
    for part, first in (("train", 0), ("test", 15)):
        write_folders(tmp_path / "d" / part, {"benign": 20}, first_seed=first)
        write_folders(tmp_path / "d" / part, {"malignant": 20}, first_seed=first + 100)
    with pytest.raises(DataError, match=r"\(20 images in 10 groups\)"):
        opened(tmp_path, DataConfig(path=tmp_path / "d"))
    assert len(opened(tmp_path, DataConfig(path=tmp_path / "d", columns={"split": ""})).ids) == 80


def test_the_published_split_of_pneumoniamnist_cuts_eight_copies(tmp_path: Path) -> None:
    data = DataConfig(path=real_data("pneumoniamnist28") / "pneumoniamnist28.npz")
    plan = Plan(classes=("normal", "pneumonia"), image_size=28)
    with pytest.raises(DataError, match=r"\(16 images in 8 groups\)"):
        checked(tmp_path, data, plan)
    report = checked(tmp_path, DataConfig(path=data.path, columns={"split": ""}), plan)
    assert report.ok and report.images == 5835 and len(report.duplicates) == 8
