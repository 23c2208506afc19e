"""What `data check` prints, and that `doctor` refuses of the images what a start refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run

from hsl_node.admin import doctor
from hsl_node.errors import DataError
from hsl_node.federation.config import load_federation
from hsl_node.federation.node_toml import load_node
from hsl_node.host.layout import Layout
from hsl_node.train.data.dataset import Dataset, open_dataset


def begin(state: Path) -> Dataset:
    """Open the images as the trainer does at a start."""
    federation, layout = load_federation(state), Layout(state)
    data = load_node(state).data
    return open_dataset(data, federation.plan, cache=layout.cache, ledger=layout.splits, run=federation.digest)


def images_by_doctor(state: Path, monkeypatch: pytest.MonkeyPatch) -> doctor.Check:
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    return next(check for check in doctor.examine(state) if check.name == "images")


def test_every_file_is_accounted_for_and_the_positive_class_is_named(two: tuple[Path, Path], images: Path) -> None:
    (images / "benign" / "notes.txt").write_text("x")
    (images / "benign" / ".hidden.png").write_bytes(b"x")
    out = run("--state", two[0], "data", "check").stdout
    assert "files: 42 read = 40 used + 1 hidden, or in a hidden or system folder + 1 no images" in out.replace(
        "1 no images + 1 hidden, or in a hidden or system folder",
        "1 hidden, or in a hidden or system folder + 1 no images",
    )
    assert "positive: 'malignant', the second class of the plan" in out
    assert "split: 40 by image" in out
    assert out.rstrip().endswith("ready to train, but see the 4 warnings above")


def test_labels_that_moved_and_images_that_went_since_the_run_began_are_counted(
    two: tuple[Path, Path], images: Path
) -> None:
    """Before, `data check` was content, and the alarm that noticed later sent people back to it."""
    state = two[0]
    assert not any("since the run began" in w for w in begin(state).warnings)
    for n in range(6):
        (images / "benign" / f"{n}.png").rename(images / "malignant" / f"moved{n}.png")
    for n in range(3):
        (images / "malignant" / f"{n}.png").unlink()
    told = "since the run began: 6 images were benign and are now malignant; 3 of 20 images of malignant are gone"
    done = run("--state", state, "data", "check")
    assert f"warning: {told}" in done.stdout and done.exit_code == 0
    assert "since the run began: benign 20 then, 14 now, malignant 20 then, 23 now; 0 images are new" in done.stdout
    assert told in begin(state).warnings
    found = json.loads(run("--state", state, "data", "check", "--json").stdout)
    assert found["since"] == {
        "began": {"benign": 20, "malignant": 20},
        "gone": {"malignant": 3},
        "relabelled": {"benign and are now malignant": 6},
        "new": 0,
    }
    assert sum(found["account"].values()) == 37


def test_a_ledger_of_the_version_before_begins_with_what_is_there(two: tuple[Path, Path]) -> None:
    state = two[0]
    before = begin(state)
    path = Layout(state).splits
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["begun"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "since the run began" not in run("--state", state, "data", "check").stdout
    assert begin(state).split.tolist() == before.split.tolist()
    assert "benign 20 then, 20 now" in run("--state", state, "data", "check").stdout


def test_doctor_refuses_a_label_that_a_start_refuses(
    two: tuple[Path, Path], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert images_by_doctor(two[0], monkeypatch).outcome == "ok"
    (images / "benign").rename(images / "B")
    found = images_by_doctor(two[0], monkeypatch)
    assert (found.outcome, found.exit_code) == ("failed", 78) and "label 'B' is no class" in found.text
    with pytest.raises(DataError) as caught:
        begin(two[0])
    assert caught.value.message == found.text and 'labels = { B = "?" }' in found.fix


def test_doctor_refuses_an_image_under_two_labels_once_the_images_were_read(
    two: tuple[Path, Path], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "malignant" / "copy.png").write_bytes((images / "benign" / "0.png").read_bytes())
    assert run("--state", two[0], "data", "check").exit_code == 78
    found = images_by_doctor(two[0], monkeypatch)
    assert found.exit_code == 78 and "1 images are there under two labels" in found.text
    assert not Layout(two[0]).splits.exists()


def test_doctor_counts_what_has_a_class_and_how_it_is_split(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "40 of 40 files have a class of the plan" in images_by_doctor(two[0], monkeypatch).text
    begin(two[0])
    assert images_by_doctor(two[0], monkeypatch).text.endswith("split by image")
