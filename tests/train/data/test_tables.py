"""Tables as people have them: every row is used or accounted for, and nothing in it is taken for something else."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from data_sets import PLAN, checked, opened, table_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import noise, write_folders, write_png, write_table

from hsl_node.errors import DataError, DataUnavailable
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.check import DataReport
from hsl_node.train.data.tables import read_rows


def table(tmp_path: Path, change=lambda text: text, count: int = 24) -> Path:
    """A table whose text is changed after its images were made."""
    path = write_table(tmp_path / "d/t.csv", table_rows(count))
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    return path


def balanced(report: DataReport) -> dict[str, int]:
    """What became of the rows, beside those that are used; the sum is what was read."""
    assert report.account["used"] == report.images
    return {why: count for why, count in report.account.items() if why != "used"}


# ---------------------------------------------------------------- cells in the wrong column


def test_threat_31_rows_with_a_cell_too_many_are_refused_by_line(tmp_path: Path) -> None:
    """A comma without quotes moved the patient into a column that nobody reads."""
    path = table(tmp_path, lambda text: text.replace("benign,pt0", "benign,left, upper,pt0"))
    with pytest.raises(DataError, match=r"t\.csv:2: 5 cells, the header has 3\nt\.csv:3: 5 cells") as caught:
        opened(tmp_path, DataConfig(path=path))
    assert "quotes around it" in caught.value.remedy


def test_an_empty_cell_at_the_end_of_every_row_does_no_harm_and_of_some_rows_is_refused(tmp_path: Path) -> None:
    every = table(tmp_path / "a", lambda text: text.replace("\n", ",\n").replace("patient,", "patient"))
    assert checked(tmp_path / "a", DataConfig(path=every)).patients == 12
    some = table(tmp_path / "b", lambda text: text.replace("pt3\n", "pt3,\n"))
    with pytest.raises(DataError, match=r"t\.csv:8: 4 cells, the header has 3"):
        opened(tmp_path / "b", DataConfig(path=some))


def test_threat_31_rows_with_a_cell_too_few_are_counted_and_told_by_line(tmp_path: Path) -> None:
    data = DataConfig(path=table(tmp_path, lambda text: text.replace(",pt3\n", "\n")))
    told = (
        "2 of 24 rows have fewer cells than the header, so that a value may stand in the wrong column: t.csv, line 8, 9"
    )
    assert told in checked(tmp_path, data).warnings and told in opened(tmp_path, data).warnings


def test_two_columns_of_one_name_are_refused_where_the_name_is_used(tmp_path: Path) -> None:
    path = table(tmp_path, lambda text: text.replace("patient\n", "patient,label\n"))
    with pytest.raises(DataError, match=r"t\.csv:1: 2 columns are called 'label'"):
        opened(tmp_path, DataConfig(path=path))
    rows = [{**row, "note": "a", "other": "b"} for row in table_rows(24)]
    unused = write_table(tmp_path / "e/t.csv", rows)
    unused.write_text(unused.read_text(encoding="utf-8").replace("note,other", "note,note"), encoding="utf-8")
    assert checked(tmp_path, DataConfig(path=unused)).images == 24
    with pytest.raises(DataError, match="2 columns are called 'note'"):
        opened(tmp_path, DataConfig(path=unused, filter={"note": "a"}))


# ---------------------------------------------------------------- headers


def test_a_table_without_a_header_is_called_so(tmp_path: Path) -> None:
    path = table(tmp_path, lambda text: text.split("\n", 1)[1])
    with pytest.raises(DataError, match=r"t\.csv:1: a row with an image, but no header") as caught:
        opened(tmp_path, DataConfig(path=path))
    assert "e.g. path,label,patient" in caught.value.remedy


def test_the_likely_columns_are_named_in_one_line_that_works(tmp_path: Path) -> None:
    path = table(tmp_path, lambda text: text.replace("path,label,patient", "file,class,Patient ID"))
    with pytest.raises(DataError, match=r"t\.csv:1: no column 'path' for the path\n") as caught:
        opened(tmp_path, DataConfig(path=path))
    assert 'columns = { path = "file", label = "class", patient = "Patient ID" }' in caught.value.remedy
    columns = {"path": "file", "label": "class", "patient": "Patient ID"}
    assert checked(tmp_path, DataConfig(path=path, columns=columns)).patients == 12


# ---------------------------------------------------------------- encodings, separators, names of files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_in_any_encoding_and_with_any_separator(tmp_path: Path, encoding: str, delimiter: str) -> None:
    rows = [{**row, "path": f"img/Müller, {n}.png", "patient": f'Ä"{n // 2}'} for n, row in enumerate(table_rows(24))]
    path = write_table(tmp_path / "d/t.csv", rows, delimiter)
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    report = checked(tmp_path, DataConfig(path=path))
    assert (report.images, report.patients) == (24, 12)
    assert any("read as Windows-1252" in w for w in report.warnings) == (encoding == "cp1252")


def test_a_spreadsheets_line_about_its_separator_is_no_header(tmp_path: Path) -> None:
    path = table(tmp_path, lambda text: "sep=;\n" + text.replace(",", ";").replace("pt3", "pt3;"))
    with pytest.raises(DataError, match=r"t\.csv:9: 4 cells"):
        opened(tmp_path, DataConfig(path=path))
    path.write_text(path.read_text(encoding="utf-8").replace("pt3;", "pt3"), encoding="utf-8")
    assert checked(tmp_path, DataConfig(path=path)).patients == 12


@pytest.mark.parametrize(("disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_with_accents_are_found_in_both_forms_also_by_exclude(tmp_path: Path, disk: str, written: str) -> None:
    rows = [{**row, "path": unicodedata.normalize(disk, f"img/Bäck{n}.png")} for n, row in enumerate(table_rows(24))]
    path = write_table(tmp_path / "d/t.csv", rows)
    path.write_text(unicodedata.normalize(written, path.read_text(encoding="utf-8")), encoding="utf-8")
    exclude = (unicodedata.normalize(written, "img/Bäck3.png"),)
    assert checked(tmp_path, DataConfig(path=path, exclude=exclude)).images == 23


def test_the_path_that_was_tried_is_told_on_the_terminal_and_nowhere_else(tmp_path: Path) -> None:
    path = table(tmp_path, lambda text: text.replace("img/3.png", "img/CANARY.png"))
    tried = tmp_path / "d/img/CANARY.png"
    with pytest.raises(DataError, match=rf"t\.csv:5: no such image file: {tried}"):
        checked(tmp_path, DataConfig(path=path))
    with pytest.raises(DataError, match=r"t\.csv:5: no such image file\n") as caught:
        opened(tmp_path, DataConfig(path=path))
    assert "CANARY" not in str(caught.value) and "`hsl-node data check` shows where" in caught.value.remedy


# ---------------------------------------------------------------- every row is accounted for


def test_a_filter_takes_exact_values_and_says_which(tmp_path: Path) -> None:
    devices = ("GE Logiq 7", "GE Logiq 70", "GE Logiq 7 @10MHz", "other")
    rows = [{**row, "device": devices[n // 2 % 4]} for n, row in enumerate(table_rows(80))]
    path = write_table(tmp_path / "d/t.csv", rows)
    with pytest.raises(DataError, match="device = 'GE Logiq'") as caught:
        opened(tmp_path, DataConfig(path=path, filter={"device": "GE Logiq"}))
    assert "'GE Logiq 7', 'GE Logiq 7 @10MHz', 'GE Logiq 70'" in caught.value.remedy
    assert 'filter = { device = "GE Logiq*" }' in caught.value.remedy
    exact = checked(tmp_path, DataConfig(path=path, filter={"device": "GE Logiq 7"}))
    assert exact.taken == {"device": {"GE Logiq 7": 20}}
    assert balanced(exact) == {"data.filter: another device": 60}
    pattern = checked(tmp_path, DataConfig(path=path, filter={"device": "GE Logiq 7*"}))
    assert pattern.taken == {"device": {"GE Logiq 7": 20, "GE Logiq 70": 20, "GE Logiq 7 @10MHz": 20}}


def test_a_value_of_a_private_column_is_not_listed(tmp_path: Path) -> None:
    report = checked(tmp_path, DataConfig(path=table(tmp_path), filter={"patient": "pt*"}))
    assert report.taken == {"patient": {}} and report.images == 24


def test_exclude_says_how_many_images_each_entry_leaves_out_and_takes_patterns(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 12, "malignant": 12})
    for n in range(5):
        write_png(root / f"benign/{n:03d}_mask.png", noise(900 + n))
    report = checked(tmp_path, DataConfig(path=root, exclude=("000.png", "*_mask.png", "benign/01?.png", "no*.png")))
    assert report.excluded == {"000.png": 2, "*_mask.png": 5, "benign/01?.png": 2}
    assert balanced(report) == {"named in data.exclude": 9} and report.images == 20
    assert any("no image is called no*.png" in w for w in report.warnings)


def test_hidden_and_system_folders_are_left_out_and_counted(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 12, "malignant": 12})
    for n, name in enumerate(("benign/.ipynb_checkpoints/0.png", "benign/@eaDir/0.png", "__MACOSX/benign/._0.png")):
        write_png(root / name, noise(700 + n))
    write_png(root / "malignant/._000.png", noise(800))
    write_png(root / "beside.png", noise(801))
    report = checked(tmp_path, DataConfig(path=root))
    assert report.images == 24 and balanced(report) == {
        "hidden, or in a hidden or system folder": 4,
        "beside the class folders": 1,
    }


def test_linked_folders_are_read_once_and_a_link_back_does_not_go_round(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 12, "malignant": 12})
    write_folders(tmp_path / "elsewhere", {"patient": 5}, first_seed=300)
    (root / "benign/linked").symlink_to(tmp_path / "elsewhere/patient")
    (root / "benign/again").symlink_to(tmp_path / "elsewhere/patient")
    (root / "benign/round").symlink_to(root / "benign")
    report = checked(tmp_path, DataConfig(path=root))
    assert report.images == 29 and balanced(report) == {}


def test_a_folder_that_cannot_be_listed_is_named_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    root = write_folders(tmp_path / "d", {"benign": 12, "malignant": 12})
    write_folders(root / "benign", {"CANARY": 2}, first_seed=100)
    real = os.scandir

    def refusing(path):
        if "CANARY" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataUnavailable, match=r"^folder benign: a folder in it cannot be listed") as caught:
        opened(tmp_path, DataConfig(path=root))
    assert "CANARY" not in str(caught.value)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(["used", "filtered", "unwanted", "excluded", "empty", "unreadable"]), max_size=30),
)
def test_every_row_is_accounted_for(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    kinds = ["used"] * 12 + kinds
    rows = []
    for n, kind in enumerate(kinds):
        row = {"path": f"img/{kind}{n}.png", "label": PLAN.classes[n % 2], "device": "A", "patient": f"p{n}"}
        rows.append(
            {**row, "device": "B"} if kind == "filtered" else {**row, "label": "?"} if kind == "unwanted" else row
        )
    path = write_table(folder / "d/t.csv", rows)
    for n, kind in enumerate(kinds):
        if kind == "unreadable":
            (folder / f"d/img/{kind}{n}.png").write_bytes(b"no picture %d" % n)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text(
        "\n".join([lines[0], *(",,," if k == "empty" else line for k, line in zip(kinds, lines[1:], strict=True))]),
        encoding="utf-8",
    )
    data = DataConfig(path=path, filter={"device": "A"}, labels={"?": ""}, exclude=("excluded*",))
    account = checked(folder, data).account
    names = {"data.filter: another device": "filtered", 'label \'?\' = "" in data.labels': "unwanted",
             "named in data.exclude": "excluded", "empty rows": "empty", "cannot be read": "unreadable"}  # fmt: skip
    assert {names.get(why, why): count for why, count in account.items()} == {k: kinds.count(k) for k in set(kinds)}
    assert sum(account.values()) == len(read_rows(path).rows) + kinds.count("empty") == len(kinds)


# ---------------------------------------------------------------- .npz


@pytest.mark.parametrize("labels", [30, 50])
def test_an_npz_file_with_another_number_of_labels_than_of_images_is_refused(tmp_path: Path, labels: int) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(labels) % 2)
    with pytest.raises(DataError, match=f"a.npz: images holds 40 images, its labels are {labels}"):
        opened(tmp_path, DataConfig(path=tmp_path / "a.npz"))


def test_images_of_an_npz_file_without_labels_are_not_passed_over(tmp_path: Path) -> None:
    arrays = {"train_images": np.zeros((4, 8, 8), np.uint8), "test_images": np.zeros((4, 8, 8), np.uint8)}
    np.savez(tmp_path / "a.npz", **arrays, train_labels=np.arange(4) % 2)
    with pytest.raises(DataError, match=r"a\.npz: no labels for test_images"):
        opened(tmp_path, DataConfig(path=tmp_path / "a.npz"))


# ---------------------------------------------------------------- what other programs write


@pytest.mark.parametrize(
    ("delimiter", "column"),
    [(";", "size (w,h,d,e)"), (",", "a;b;c;d;e"), ("\t", "size (w,h,d,e)"), (",", "bar|bar|bar|bar")],
)
def test_signs_in_a_header_do_not_decide_what_separates_the_cells(tmp_path: Path, delimiter: str, column: str) -> None:
    path = write_table(tmp_path / "d/t.csv", [{**row, "note": "x"} for row in table_rows(24)], delimiter)
    path.write_text(path.read_text(encoding="utf-8").replace("note", column, 1), encoding="utf-8")
    assert read_rows(path).header == ("path", "label", "patient", column)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "SEP=,\n" + text,
        lambda text: '"sep=,"\n' + text,
        lambda text: "\n".join(", ".join(f'"{c}"' for c in line.split(",")) for line in text.splitlines()),
        lambda text: text.replace("\n", "\r"),
    ],
)
def test_other_programs_first_lines_blanks_and_line_ends_are_read(tmp_path: Path, change) -> None:
    assert checked(tmp_path, DataConfig(path=table(tmp_path, change))).patients == 12


def test_utf_32_is_read(tmp_path: Path) -> None:
    path = table(tmp_path)
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-32"))
    assert read_rows(path).header == ("path", "label", "patient")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "first line is empty"),
        (b"\npath,label\na,b\n", "first line is empty"),
        (b"Export of May\npath,label\na,b\n", "first line is one cell, the rows below it are more: a title"),
        (b"PK\x03\x04rest of a workbook", "a workbook or an archive"),
    ],
)
def test_what_is_no_table_yet_is_told_as_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_rows(tmp_path / "t.csv")


def test_rows_that_an_open_quote_swallows_are_told(tmp_path: Path) -> None:
    """8 of 24 rows became the text of one cell, and the sum of the rows was right all the same."""
    rows = [{**row, "note": "n"} for row in table_rows(24)]
    path = write_table(tmp_path / "d/t.csv", rows)
    text = path.read_text(encoding="utf-8").replace("pt2,n", 'pt2,"n', 1).replace("pt6,n", 'pt6,n"', 1)
    path.write_text(text, encoding="utf-8")
    report = checked(tmp_path, DataConfig(path=path))
    assert report.images == 16 and any("is a quote not closed? t.csv, up to line 14" in w for w in report.warnings)


def test_a_column_of_long_texts_is_no_open_quote(tmp_path: Path) -> None:
    rows = [{**row, "report": "seen, twice\nleft, upper, outer, no more"} for row in table_rows(24)]
    assert read_rows(write_table(tmp_path / "d/t.csv", rows)).doubts == ()


def test_a_split_in_a_column_of_another_name_is_told_with_a_line_that_works(tmp_path: Path) -> None:
    rows = [{**row, "Set": ("train", "val", "test")[n // 4 % 3]} for n, row in enumerate(table_rows(24))]
    path = write_table(tmp_path / "d/t.csv", rows)
    (told,) = (w for w in checked(tmp_path, DataConfig(path=path)).warnings if "not used" in w)
    assert told.endswith('columns = { split = "Set" } under [data] in node.toml')
    used = checked(tmp_path, DataConfig(path=path, columns={"split": "Set"}))
    assert [sum(c[s] for c in used.counts.values()) for s in ("train", "validation", "test")] == [8, 8, 8]


@pytest.mark.parametrize(
    ("cell", "said"), [("", "t.csv:2: no such image file: the path is empty"), ("a" * 5000, "t.csv:2: no such image")]
)
def test_a_path_that_is_none_or_too_long_is_told_by_its_line(tmp_path: Path, cell: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        checked(tmp_path, DataConfig(path=table(tmp_path, lambda text: text.replace("img/0.png", cell, 1))))
