"""predict on files, folders and tables: each image told, in a stable order, whatever else lies there."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import code, run
from federations import FederationOf
from finished_run import PLAN, finished_run
from pictures import noise, write_dicom, write_folders, write_png
from PIL import Image

from hsl_node.errors import DataError, NotInitialised, UsageError
from hsl_node.host.layout import Layout
from hsl_node.host.terminal import print_json
from hsl_node.results import asked, predict
from hsl_node.train.bundle import Card, Computed, Decision
from hsl_node.train.data.preprocessing import Preprocessing
from hsl_node.weights.whole import sha256_of


@pytest.fixture
def state(tmp_path: Path, federation_of: FederationOf) -> Path:
    return finished_run(tmp_path, federation_of)


def predicted(state: Path, names: Sequence[Path]) -> dict[str, Any]:
    return predict.predict(predict.open_predictor(state, None, None), asked.gather(names))


@dataclass
class Bright:
    """Stands for a model: the mean brightness is the probability of the second class. Notes the batches it is given."""

    card: Card
    batches: list[int] = field(default_factory=list)

    def __call__(self, squares: Sequence[Any]) -> Any:
        self.batches.append(len(squares))
        light = np.array([square.mean() / 255 for square in squares])
        return np.stack([1 - light, light], axis=1)


def bright(decision: Decision | None = None) -> Any:
    card = Card(
        classes=PLAN.classes,
        decision=decision,
        preprocessing=Preprocessing.of(PLAN),
        plan=PLAN,
        hardware=Computed(precision="float32", threads=1, device="cpu", processor="any"),
        round=1,
        source_weights_sha256="a" * 64,
    )
    return Bright(card)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ---------------------------------------------------------------- what is told of an image


def test_predictions_are_probabilities_of_each_class_in_the_order_given(state: Path, tmp_path: Path) -> None:
    images = sorted((tmp_path / "images").rglob("*.png"))[:5]
    found = predicted(state, images)
    assert [Path(row["image"]) for row in found["images"]] == images
    for row in found["images"]:
        assert set(row["probabilities"]) == {"benign", "malignant"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    backwards = predicted(state, images[::-1])
    assert [r["probabilities"] for r in backwards["images"]][::-1] == [
        {k: pytest.approx(v, abs=1e-6) for k, v in r["probabilities"].items()} for r in found["images"]
    ]
    (tmp_path / "out.csv").write_text("an earlier one, of mode 0644")
    predict.write_out(predict.csv_text(found), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").stat().st_mode & 0o777 == 0o600, "names of images may be names of patients"
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[2]["malignant"]) == pytest.approx(found["images"][2]["probabilities"]["malignant"], abs=1e-6)
    assert {r["model_sha256"] for r in rows} == {sha256_of(Layout(state).fused(1))}


def test_a_file_name_of_other_bytes_than_utf_8_is_told_in_every_output_alike(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the file, on a terminal, as JSON, and by `data check`: a scanner's M\\xfcller.png."""
    names = [os.fsencode(tmp_path) + name for name in (b"/M\xfcller.png", "/König.png".encode())]
    for name in names:
        shutil.copyfile(next((tmp_path / "images").rglob("*.png")), name)
    found = predicted(state, [Path(os.fsdecode(name)) for name in names])
    predict.write_out(predict.csv_text(found), tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [
            f"{tmp_path}/M\\udcfcller.png",
            f"{tmp_path}/König.png",
        ]
    predict.write_out(predict.csv_text(found), None)
    assert capsys.readouterr().out == (tmp_path / "out.csv").read_text(encoding="utf-8")
    print_json(found)
    assert f"{tmp_path}/M\\udcfcller.png" in capsys.readouterr().out
    predict.write_out(predict.json_text(found), None)
    assert f"{tmp_path}/M\\udcfcller.png" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_output_ends_at_a_name_that_the_terminal_has_no_letters_for(tmp_path: Path, encoding: str) -> None:
    folder = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    for name in (b"/benign/M\xfcller.png", "/benign/König.png".encode()):
        Path(os.fsdecode(os.fsencode(folder) + name)).write_text("no picture")
    command = [sys.executable, "-m", "hsl_node", "--state", str(tmp_path / "ash")]
    init = ["init", "--name", "ash", "--address", "127.0.0.1:9001", "--data", str(folder)]
    subprocess.run([*command, *init], check=True, capture_output=True)
    done = subprocess.run(
        [*command, "data", "check", "--classes", "benign,malignant", "--image-size", "16"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 78 and not done.stderr, done.stderr.decode()
    shown = done.stdout.decode(encoding)
    assert "benign/M\\udcfcller.png" in shown
    assert ("benign/König.png" if encoding == "utf-8" else "benign/K\\xf6nig.png") in shown


def test_colour_and_grey_copies_of_an_image_get_the_same_prediction(state: Path, tmp_path: Path) -> None:
    grey = next((tmp_path / "images").rglob("*.png"))
    with Image.open(grey) as image:
        image.convert("RGB").save(tmp_path / "colour.png")
    first, second = predicted(state, [grey, tmp_path / "colour.png"])["images"]
    assert first["probabilities"] == second["probabilities"]


def test_an_image_in_colour_is_predicted_beside_a_grey_one_as_alone(state: Path, tmp_path: Path) -> None:
    grey, stained = next((tmp_path / "images").rglob("*.png")), tmp_path / "stained.png"
    with Image.open(grey) as image:
        Image.merge("RGB", (image.convert("L"), image.convert("L").point(lambda v: 255 - v), image.convert("L"))).save(
            stained
        )
    beside = predicted(state, [grey, stained])["images"]
    (alone,) = predicted(state, [stained])["images"]
    assert alone["probabilities"] == beside[1]["probabilities"] != beside[0]["probabilities"]


def test_from_the_threshold_on_an_image_counts_as_positive_and_without_one_nothing_is_decided(tmp_path: Path) -> None:
    """Grey 51 of 255 is 0.2, 102 is 0.4, 153 is 0.6."""
    names = [write_png(tmp_path / f"{v}.png", np.full((16, 16), v, np.uint8)) for v in (51, 102, 153)]
    found = predict.predict(bright(Decision(threshold=0.4, rule="Youden")), asked.gather(names))
    assert [row["decision"] for row in found["images"]] == ["benign", "malignant", "malignant"]
    assert found["decision"] == {"threshold": 0.4, "rule": "Youden"} and found["positive"] == "malignant"
    text = predict.csv_text(found)
    assert text.splitlines()[0] == "image,benign,malignant,decision,note,model_sha256"
    assert [(row["malignant"], row["decision"]) for row in rows_of(text)] == [
        ("0.200000", "benign"), ("0.400000", "malignant"), ("0.600000", "malignant"),
    ]  # fmt: skip
    without = predict.csv_text(predict.predict(bright(), asked.gather(names)))
    assert without.splitlines()[0] == "image,benign,malignant,note,model_sha256"


def test_which_frame_of_several_was_taken_is_noted(tmp_path: Path) -> None:
    """Frames of 0, 100, 200 and 50, all in 8 bits: the middle one, n // 2 from 0, is the third."""
    frames = np.stack([np.full((20, 24), v, np.uint8) for v in (0, 100, 200, 50)])
    several = write_dicom(tmp_path / "cine.dcm", frames, WindowCenter=128, WindowWidth=256)
    found = predict.predict(bright(), asked.gather([several, write_png(tmp_path / "one.png", noise(1))]))["images"]
    assert [row["note"] for row in found] == ["frame 3 of 4", ""]
    assert found[0]["probabilities"]["malignant"] == pytest.approx(200 / 255, abs=0.01)


# ---------------------------------------------------------------- what cannot be read


def test_unreadable_images_are_all_named_and_all_others_are_predicted(state: Path, tmp_path: Path) -> None:
    good = next((tmp_path / "images").rglob("*.png"))
    (tmp_path / "text.png").write_text("no picture")
    names = [tmp_path / "text.png", good, tmp_path / "absent.png"]
    done = run("--state", state, "predict", *names, "--out", tmp_path / "out.csv")
    assert code(done) == 78
    assert "text.png" in str(done.exception)
    assert "absent.png: no such file" in str(done.exception)
    assert good.name not in str(done.exception)
    rows = rows_of((tmp_path / "out.csv").read_text())
    assert [row["image"] for row in rows] == [str(name) for name in names]
    assert [bool(row["malignant"]) for row in rows] == [False, True, False]
    assert rows[2]["note"] == "no such file" and rows[0]["note"] and not rows[1]["note"]


def test_where_none_can_be_read_nothing_is_written(state: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    done = run("--state", state, "predict", tmp_path / "text.png", "--out", tmp_path / "out.csv")
    assert code(done) == 78 and "1 of 1 images cannot be read" in str(done.exception)
    assert not (tmp_path / "out.csv").exists() and done.stdout == ""
    with pytest.raises(DataError, match=r"text\.png"):
        predicted(state, [tmp_path / "text.png"])


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    good = write_png(tmp_path / "good.png", noise(1))
    found = predict.predict(bright(), asked.gather([tmp_path / "pipe.png", good]))["images"]
    assert [row["note"] for row in found] == ["is no file", ""]
    found = predict.predict(bright(), asked.gather([tmp_path]))["images"]
    assert [row["image"] for row in found] == [str(good)]


def test_images_are_held_a_batch_at_a_time_whatever_their_number(tmp_path: Path) -> None:
    """130 images, 2 of them unreadable: batches of 64, 64 and 0 readable ones; each keeps its place."""
    for n in range(130):
        write_png(tmp_path / f"{n:03d}.png", np.full((16, 16), n, np.uint8))
    for n in (5, 77):
        (tmp_path / f"{n:03d}.png").write_text("no picture")
    model, heard = bright(), []
    rows = predict.predict(model, asked.gather([tmp_path]), lambda done, total: heard.append((done, total)))["images"]
    assert model.batches == [64, 64]
    assert heard == [(n, 130) for n in range(1, 131)]
    for n, row in enumerate(rows):
        assert row["image"].endswith(f"{n:03d}.png")
        expected = None if n in (5, 77) else pytest.approx(n / 255)
        assert (row["probabilities"] or {"malignant": None})["malignant"] == expected


# ---------------------------------------------------------------- folders


def test_a_folder_is_walked_by_content_and_what_is_no_image_is_counted(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    write_png(root / "b" / "2.png", noise(2))
    write_png(root / "a.png", noise(1))
    os.rename(write_png(root / "b" / "x.png", noise(3)), root / "b" / "0.IMA.old")  # a PNG by content
    os.rename(write_dicom(root / "d.dcm", noise(4)), root / "1.2.826.17")
    (root / "broken.png").write_text("no picture")  # calls itself an image: told, not passed over
    for junk in (".DS_Store", "Thumbs.db", "b/.ipynb_checkpoints/2.png", "@eaDir/2.png", "__MACOSX/x/2.png"):
        write_png(root / "junk.png", noise(5))
        (root / junk).parent.mkdir(parents=True, exist_ok=True)
        os.rename(root / "junk.png", root / junk)
    (root / "notes.txt").write_text("seen by Dr. Ash")
    (root / "gone.png").symlink_to(root / "nowhere")  # so does this one
    (root / "same").symlink_to(root / "b")  # each folder once
    (root / "b" / "above").symlink_to(root)
    found = asked.gather([root])
    names = [path.relative_to(root).as_posix() for path in found.files]
    assert names == ["1.2.826.17", "a.png", "b/0.IMA.old", "b/2.png", "broken.png", "gone.png"]
    assert found.left_out == {
        "hidden or system files": 2,
        "hidden or system folders": 3,
        "files that are no images": 1,
    }
    assert asked.gather([root]) == found


def test_a_folder_is_predicted_by_the_nodes_own_model(state: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "notes.txt").write_text("x")
    done = run("--state", state, "predict", tmp_path / "images")
    assert done.exit_code == 0, done.output
    rows = rows_of(done.stdout)
    assert len(rows) == len(list((tmp_path / "images").rglob("*.png"))) and all(row["malignant"] for row in rows)
    assert "files that are no images" in done.stderr


@pytest.mark.parametrize("layout", ["empty", "only hidden"])
def test_a_folder_without_images_is_refused_with_what_lies_there(tmp_path: Path, layout: str) -> None:
    (tmp_path / "scans").mkdir()
    if layout == "only hidden":
        (tmp_path / "scans" / ".x.png").write_text("x")
    with pytest.raises(UsageError, match="scans: no images") as caught:
        asked.gather([tmp_path / "scans"])
    assert ("1 hidden" in caught.value.message) == (layout == "only hidden")


def test_a_folder_that_cannot_be_listed_is_told_like_an_image_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may list all of them: the system's refusal is played."""
    good, closed = write_png(tmp_path / "a.png", noise(1)), str(tmp_path / "closed")
    os.mkdir(closed)
    listed = os.scandir

    def scandir(path: str) -> Any:
        if path == closed:
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    rows = predict.predict(bright(), asked.gather([tmp_path]))["images"]
    assert [(row["image"], row["note"]) for row in rows] == [
        (str(good), ""),
        (closed, "is a folder that cannot be listed"),
    ]


# ---------------------------------------------------------------- tables


def test_a_tables_files_are_predicted_in_its_order_by_the_nodes_rules(tmp_path: Path) -> None:
    """Paths from the table's own folder, also as Windows writes them; a BOM; quoted separators."""
    for name in ("one.png", "sub/two.png"):
        write_png(tmp_path / "t" / name, noise(1))
    table = tmp_path / "t" / "scans.csv"
    table.write_text('path;"age, sex, site"\nsub\\two.png;"61; f, x"\none.png;"5, m, x"\nabsent.png;\n', "utf-8-sig")
    found = asked.gather([table])
    names = [path.relative_to(table.parent).as_posix() for path in found.files]
    assert names == ["sub/two.png", "one.png", "absent.png"]
    rows = predict.predict(bright(), found)["images"]
    assert [row["note"] for row in rows] == ["", "", "no such file (scans.csv:4)"]


def test_a_tables_own_column_is_named_by_node_toml_or_on_the_command_line(state: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "one.png", noise(1))
    table = tmp_path / "scans.csv"
    table.write_text("file,label\none.png,benign\n")
    done = run("--state", state, "predict", table)
    assert code(done) == 78
    assert "scans.csv:1: no column 'path'" in str(done.exception) and "--column file" in str(done.exception)
    assert run("--state", state, "predict", table, "--column", "file").exit_code == 0
    with open(state / "node.toml", "a") as file:
        file.write('\n[data.columns]\npath = "file"\n')
    assert run("--state", state, "predict", table).exit_code == 0


def test_arrays_are_no_image_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(UsageError, match="arrays"):
        asked.gather([tmp_path / "set.npz"])


# ---------------------------------------------------------------- outputs


def test_json_goes_to_the_file_as_well_as_to_the_terminal(state: Path, tmp_path: Path) -> None:
    image = next((tmp_path / "images").rglob("*.png"))
    shown = json.loads(run("--state", state, "predict", image, "--json").stdout)
    done = run("--state", state, "predict", image, "--json", "--out", tmp_path / "out.json")
    assert done.stdout == "" and json.loads((tmp_path / "out.json").read_text()) == shown
    assert shown["images"][0]["image"] == str(image) and shown["sha256"] == sha256_of(Layout(state).fused(1))
    assert "squeezed into 16" in shown["preprocessing"]


@pytest.mark.parametrize("out", ["a folder", "no folder", "below a file"])
def test_where_nothing_can_be_written_nothing_is_computed(state: Path, tmp_path: Path, out: str) -> None:
    image = next((tmp_path / "images").rglob("*.png"))
    place = {"a folder": tmp_path, "no folder": tmp_path / "none" / "x.csv", "below a file": image / "x.csv"}[out]
    Layout(state).fused(1).unlink()  # that would be told first, where a model was looked for
    done = run("--state", state, "predict", image, "--out", place)
    assert isinstance(done.exception, UsageError) and str(place) in done.exception.message


@pytest.mark.parametrize("what", ["an image", "a table"])
def test_results_never_take_the_place_of_an_image_or_of_a_table(state: Path, tmp_path: Path, what: str) -> None:
    """`--out *.png` names the first image as the output."""
    images = sorted((tmp_path / "images").rglob("*.png"))[:3]
    out = images[0] if what == "an image" else tmp_path / "images" / "metadata.csv"
    before = out.read_bytes()
    done = run("--state", state, "predict", "--out", out, *(images[1:] if what == "an image" else [out]))
    assert isinstance(done.exception, UsageError) and "name another file" in done.exception.remedy
    assert out.read_bytes() == before


def test_without_a_node_the_way_to_an_exported_model_is_said(tmp_path: Path) -> None:
    done = run("--state", tmp_path / "none", "predict", write_png(tmp_path / "x.png", noise(1)))
    assert isinstance(done.exception, NotInitialised) and "--model FOLDER" in done.exception.remedy


def test_of_many_images_that_cannot_be_read_some_are_named_and_all_are_in_the_output(tmp_path: Path) -> None:
    write_png(tmp_path / "good.png", noise(1))
    for n in range(30):
        (tmp_path / f"{n:02d}.png").touch()
    found = predict.predict(bright(), asked.gather([tmp_path]))
    lines = predict.unreadable_error(found["images"]).message.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("30 of 31 images cannot be read", "... and 10 more", 22)
    assert predict.csv_text(found).count("is empty") == 30
