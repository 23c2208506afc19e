"""A model taken away: it predicts by itself, to the byte as at its node; what was altered, cut or of old is refused."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import code, run
from federations import FederationOf
from finished_run import PLAN, finished_run
from pictures import noise, write_dicom, write_png
from PIL import Image
from typer.testing import CliRunner

from hsl_node.commands.app import app
from hsl_node.errors import ConfigError, UsageError
from hsl_node.host.layout import Layout
from hsl_node.results import evaluate, export
from hsl_node.sync.store.journal import Journal
from hsl_node.train import scoring
from hsl_node.train.bundle import NEEDED, SUMS_FILE, Decision, read_card
from hsl_node.train.data.images import decode
from hsl_node.train.predictor import of_bundle
from hsl_node.weights.checkpoint_file import read_weights
from hsl_node.weights.whole import sha256_of


@pytest.fixture
def state(tmp_path: Path, federation_of: FederationOf) -> Path:
    return finished_run(tmp_path, federation_of)


@pytest.fixture
def model(state: Path, tmp_path: Path) -> Path:
    export.export(state, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Grey and colour, of odd sizes, of few and many bits, with frames, transparent, turned; and one that is broken."""
    folder = tmp_path / "scans"
    colour = np.random.default_rng(3).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    write_png(folder / "grey.png", noise(1, (31, 77)))
    write_png(folder / "colour.png", colour)
    write_png(folder / "deep.png", np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    write_png(folder / "small.png", noise(2, (3, 4)))
    ct = np.arange(-300, 300, dtype=np.int16).reshape(20, 30)
    write_dicom(folder / "ct.dcm", ct, WindowCenter=40, WindowWidth=400)
    write_dicom(folder / "cine.dcm", np.stack([noise(n) for n in range(5)]))
    write_dicom(folder / "colour.dcm", colour)
    Image.fromarray(noise(4, (40, 20))).save(folder / "turned.jpg", exif=_turned())
    Image.fromarray(np.dstack([colour, noise(5, (33, 47))])).save(folder / "clear.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def set_window(state: Path) -> None:
    text = (state / "node.toml").read_text().replace("[data]", "[data]\nwindow_center = 40\nwindow_width = 400")
    (state / "node.toml").write_text(text)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# ---------------------------------------------------------------- parity


def test_the_exported_folder_predicts_to_the_byte_as_the_node_on_a_machine_without_one(
    state: Path, scans: Path, model: Path, tmp_path: Path
) -> None:
    """No state directory, no home, and no network: the process's sockets fail. The node has a window of its own."""
    set_window(state)
    export.export(state, model)
    by_node = run("--state", state, "predict", scans, "--out", tmp_path / "node.csv")
    assert code(by_node) == 78 and "1 of 10 images cannot be read" in str(by_node.exception)
    away = model.rename(tmp_path / "elsewhere")
    for path in (state, tmp_path / "images"):
        path.rename(tmp_path / f"hidden {path.name}")
    alone = (
        "import socket, sys\n"
        "def refused(*a, **k): raise AssertionError('a socket')\n"
        "socket.socket.connect = socket.socket.bind = refused\n"
        "from hsl_node.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    (tmp_path / "home").mkdir(mode=0o500)
    words = ["--state", tmp_path / "none", "predict", "--model", away, scans, "--out", tmp_path / "away.csv"]
    done = subprocess.run(
        [sys.executable, "-c", alone, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 78 and "broken.png" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "away.csv").read_bytes() == (tmp_path / "node.csv").read_bytes()
    assert len((tmp_path / "away.csv").read_text().splitlines()) == 11
    assert not (tmp_path / "none").exists()


def test_the_exported_folder_gives_what_evaluate_scored_and_decides_by_its_threshold(
    tmp_path: Path, federation_of: FederationOf
) -> None:
    """220 patients: enough of each class in validation for a threshold."""
    state = finished_run(tmp_path, federation_of, patients=220)
    done = run("--state", state, "evaluate", "--scores", tmp_path / "scores.csv", "--json")
    threshold = json.loads(done.stdout)["thresholds"]["fused"]
    assert "Youden" in threshold["rule"]
    export.export(state, tmp_path / "model")
    assert read_card(tmp_path / "model").decision == Decision(threshold=threshold["value"], rule=threshold["rule"])
    with open(tmp_path / "scores.csv", newline="") as file:
        scored = [row for row in csv.DictReader(file) if (row["model"], row["split"]) == ("fused", "test")]
    files = [tmp_path / "images" / row["image"] for row in scored]
    found = json.loads(run("predict", "--model", tmp_path / "model", *files, "--json").stdout)["images"]
    assert len(found) > 60
    told = [np.float32(row["p_malignant"]) for row in scored]
    assert [np.float32(row["probabilities"]["malignant"]) for row in found] == told
    positive = [p >= np.float32(threshold["value"]) for p in told]
    assert [row["decision"] == "malignant" for row in found] == positive and {True, False} == set(positive)


def test_the_onnx_file_agrees_on_every_kind_of_image(state: Path, scans: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    from onnx.reference import ReferenceEvaluator

    _, missing = export.export(state, tmp_path / "model", onnx=True)
    assert missing == "" and sha256_of(tmp_path / "model" / "model.onnx")
    predictor = of_bundle(tmp_path / "model")
    (scans / "broken.png").unlink()
    squares = [decode(path, predictor.card.preprocessing) for path in sorted(scans.iterdir())]
    assert {square.ndim for square in squares} == {2, 3} and len(squares) == 9
    colour = [square if square.ndim == 3 else np.repeat(square[..., None], 3, axis=-1) for square in squares]
    pixels = np.stack(colour).transpose(0, 3, 1, 2).astype(np.float32) / 255
    (found,) = ReferenceEvaluator(onnx.load(tmp_path / "model" / "model.onnx")).run(None, {"pixels": pixels})
    np.testing.assert_allclose(found, predictor(squares)[:, 1], atol=1e-4)


# ---------------------------------------------------------------- the card


def test_export_holds_the_weights_and_says_where_they_come_from(state: Path, tmp_path: Path) -> None:
    evaluate.evaluate(state)
    files, missing = export.export(state, tmp_path / "model")
    assert {f.name for f in files} == {*NEEDED, SUMS_FILE} == {p.name for p in (tmp_path / "model").iterdir()}
    assert missing == ""  # ONNX was not asked for
    assert {oct(f.stat().st_mode & 0o777) for f in files} == {"0o600"}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o700
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    assert card["trained_by"] == "ash"
    assert card["source_weights_sha256"] == sha256_of(Layout(state).fused(1))
    assert card["test"]["images"] == evaluate.evaluate(state)["images"]["test"]
    exported, fused = read_weights(files[0]), read_weights(Layout(state).fused(1))
    assert exported.keys() == fused.keys()
    assert all((exported[n] == fused[n]).all() for n in fused)
    assert subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=tmp_path / "model", capture_output=True).returncode == 0


def test_the_card_holds_the_preprocessing_the_classes_and_what_was_computed_with(state: Path, tmp_path: Path) -> None:
    set_window(state)
    export.export(state, tmp_path / "model")
    content = json.loads((tmp_path / "model" / "model.json").read_text())
    assert (content["format"], content["positive"], content["classes"]) == (2, "malignant", ["benign", "malignant"])
    prepared = content["preprocessing"]
    assert (prepared["image_size"], prepared["fit"], prepared["frame"]) == (16, "squeeze", "middle")
    assert (prepared["window"]["center"], prepared["window"]["width"]) == (40, 400)
    assert (prepared["resize"], prepared["mean"]) == ("bilinear, antialiased", [0.485, 0.456, 0.406])
    assert (content["hardware"]["threads"], content["hardware"]["precision"]) == (1, "float32")
    assert content["hardware"]["processor"] and content["plan"]["backbone"] == "tiny"
    assert read_card(tmp_path / "model").preprocessing.window.width == 400  # type: ignore[union-attr]
    words = (tmp_path / "model" / "CARD.md").read_text()
    told = ("centre 40 and width 400", "squeezed into 16 x 16", "middle one (n // 2", "Threshold: none", "`malignant`")
    for said in told:
        assert said in words, said


@pytest.mark.parametrize("fit", ["squeeze", "pad"])
def test_what_the_card_says_is_enough_to_repeat_the_preprocessing(
    tmp_path: Path, scans: Path, federation_of: FederationOf, fit: str
) -> None:
    """Its own example in Pillow and numpy, run here, gives the bytes that it names, and those of any 8-bit picture."""
    state = finished_run(tmp_path, federation_of, plan=PLAN.model_copy(update={"fit": fit}))
    export.export(state, tmp_path / "model")
    words = (tmp_path / "model" / "CARD.md").read_text()
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", words, re.DOTALL)[0], names)
    example = names["prepare"](tmp_path / "model" / "example.png")
    assert example.shape == (16, 16, 3) and hashlib.sha256(example.tobytes()).hexdigest() in words
    for y, x, values in re.findall(r"^\| (\d+), (\d+) \| ([\d, ]+) \|$", words, re.MULTILINE):
        assert [int(v) for v in values.split(",")] == example[int(y), int(x)].tolist()
    predictor = of_bundle(tmp_path / "model")
    for picture in ("grey.png", "colour.png", "small.png", "turned.jpg"):
        square = decode(scans / picture, predictor.card.preprocessing)
        square = square if square.ndim == 3 else np.repeat(square[..., None], 3, axis=-1)
        np.testing.assert_array_equal(names["prepare"](scans / picture), square, err_msg=picture)
    uploaded = scoring.upload(example[None].copy(), predictor.hardware).numpy()
    np.testing.assert_allclose(names["network_input"](tmp_path / "model" / "example.png"), uploaded, atol=1e-5)
    (said,) = re.findall(r"probabilities of it: benign ([\d.]+), malignant ([\d.]+)\.", words)
    assert [f"{p:.6f}" for p in predictor([example])[0]] == list(said)


def test_the_words_on_windows_are_enough_to_repeat_them(state: Path, tmp_path: Path) -> None:
    """A CT of 16 bits through centre 40 and width 400, LINEAR, by the standard's formula; then Pillow's resize."""
    stored = np.arange(-600, 600, dtype=np.int16).reshape(30, 40)
    write_dicom(tmp_path / "ct.dcm", stored, WindowCenter=40, WindowWidth=400, RescaleSlope=2, RescaleIntercept=-100)
    export.export(state, tmp_path / "model")
    values = stored * 2.0 - 100
    grey = np.clip(((values - 39.5) / 399 + 0.5) * 255, 0, 255)
    bytes_ = np.floor(grey + 0.5).astype(np.uint8)
    expected = np.asarray(Image.fromarray(bytes_).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode(tmp_path / "ct.dcm", read_card(tmp_path / "model").preprocessing), expected)


def test_an_export_without_onnx_says_so_in_one_line_with_the_remedy(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["--state", str(state), "export", "--out", str(tmp_path / "model"), "--onnx"])
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == len(NEEDED) + 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("No ONNX file: onnx and onnxscript not installed: pip install 'hsl-node[onnx]'")


def record_evaluation(state: Path, name: str = "evaluation", **more: object) -> None:
    images = {"train": 30, "validation": 25, "test": 12}
    sha256 = sha256_of(Layout(state).fused(1))
    record = {
        "kind": "fused",
        "round": 1,
        "rounds": {},
        "why": "",
        "weights": {"fused": sha256},
        "test": {"fused": {"auc": 0.9}},
        "images": images,
        **more,
    }
    with Journal.create(Layout(state).journal) as journal:
        journal.record_result(name, record)


@pytest.mark.parametrize("name", ["evaluation", "evaluation of round 1"])
def test_the_threshold_that_the_evaluation_chose_goes_out_and_decides_as_at_the_node(
    state: Path, tmp_path: Path, scans: Path, name: str
) -> None:
    (scans / "broken.png").unlink()
    undecided = run("--state", state, "predict", scans).stdout
    chances = sorted(float(line.split(",")[2]) for line in undecided.splitlines()[1:])
    middle = (chances[4] + chances[5]) / 2
    rule = "largest Youden's J on 12 positive and 13 negative validation images"
    record_evaluation(state, name, thresholds={"fused": {"value": middle, "rule": rule}}, patients=None)
    export.export(state, tmp_path / "model")
    assert read_card(tmp_path / "model").decision.model_dump() == {"threshold": middle, "rule": rule}  # type: ignore[union-attr]
    words = (tmp_path / "model" / "CARD.md").read_text()
    assert (
        f"Threshold: {middle:.6f}. {rule}" in words and "train 30, validation 25, test 12; no patient is known" in words
    )
    decided = run("predict", "--model", tmp_path / "model", scans).stdout
    assert decided == run("--state", state, "predict", scans).stdout
    assert [line.split(",")[3] for line in decided.splitlines()].count("malignant") == 4
    assert [line.split(",")[3] for line in decided.splitlines()].count("benign") == 5


@pytest.mark.parametrize("thresholds", [None, {}])
def test_where_no_threshold_is_recorded_nothing_is_decided(state: Path, model: Path, thresholds: object) -> None:
    record_evaluation(state, thresholds=thresholds, patients={"train": 3, "validation": 3, "test": 3})
    export.export(state, model)
    assert read_card(model).decision is None
    words = (model / "CARD.md").read_text()
    assert "Threshold: none." in words and "train 30 of 3 patients" in words


def test_of_too_few_validation_images_no_threshold_is_chosen_and_nothing_is_decided(state: Path, model: Path) -> None:
    assert evaluate.evaluate(state)["thresholds"]["fused"]["rule"].startswith("not chosen")
    export.export(state, model)
    assert read_card(model).decision is None
    assert json.loads((model / "model.json").read_text())["data"]["split_sha256"]


# ---------------------------------------------------------------- what is refused


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edited(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, edited, Path.unlink], ids=["cut", "edited", "gone"])
@pytest.mark.parametrize("name", [*NEEDED, SUMS_FILE])
def test_a_folder_that_is_not_what_was_exported_is_refused_by_the_files_name(
    model: Path, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(model / name)
    done = run("predict", "--model", model, write_png(tmp_path / "x.png", noise(1)))
    assert isinstance(done.exception, ConfigError) and code(done) == 78
    if (name, harm) != (SUMS_FILE, edited):  # there the file whose line it is
        assert str(model / name) in done.exception.message, done.exception
    assert re.search("cut or altered|missing|no line", done.exception.message)
    assert "copy the whole folder again" in done.exception.remedy
    assert done.stdout == ""


def test_an_edited_threshold_is_refused_though_the_card_is_still_one(model: Path) -> None:
    content = json.loads((model / "model.json").read_text())
    content["decision"] = {"threshold": 0.1, "rule": "as I like it"}
    (model / "model.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"model\.json was cut or altered after the export"):
        read_card(model)


def test_a_line_that_is_gone_from_the_sums_is_missed(model: Path) -> None:
    lines = (model / SUMS_FILE).read_text().splitlines(keepends=True)
    (model / SUMS_FILE).write_text("".join(line for line in lines if "model.json" not in line))
    with pytest.raises(ConfigError, match=r"SHA256SUMS was cut or altered: no line for model\.json"):
        read_card(model)


@pytest.mark.parametrize(
    ("number", "said", "remedy"),
    [(1, "by an earlier version", "export it again"), (3, "by a later version", "upgrade")],
)
def test_a_model_of_another_version_is_refused_with_the_way_out(
    model: Path, number: int, said: str, remedy: str
) -> None:
    """The version before wrote model.safetensors and model.json, and no sums."""
    for name in (SUMS_FILE, "CARD.md", "example.png"):
        (model / name).unlink()
    (model / "model.json").write_text(json.dumps({"format": number, "versions": {"hsl_node": "0.1"}, "plan": {}}))
    with pytest.raises(ConfigError, match=said) as caught:
        read_card(model)
    assert remedy in caught.value.remedy and "hsl-node 0.1" in caught.value.message


@pytest.mark.parametrize("what", ["missing", "a file", "an empty folder", "a file of it"])
def test_what_is_no_exported_folder_is_refused_in_words(model: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"missing": tmp_path / "none", "a file": tmp_path / "x.png", "an empty folder": tmp_path / "empty"}
    place = places.get(what, model / "model.json")
    done = run("predict", "--model", place, write_png(tmp_path / "x.png", noise(1)))
    assert isinstance(done.exception, UsageError) and str(place) in done.exception.message
    assert "the folder that hsl-node export wrote" in done.exception.remedy


def test_weights_and_a_card_of_two_models_are_refused_though_the_sums_are_right(model: Path) -> None:
    """As somebody may put them together."""
    content = json.loads((model / "model.json").read_text())
    content["plan"]["backbone"] = "resnet18"
    (model / "model.json").write_text(json.dumps(content))
    lines = (model / SUMS_FILE).read_text().splitlines()
    lines = [f"{sha256_of(model / 'model.json')}  model.json" if "model.json" in line else line for line in lines]
    (model / SUMS_FILE).write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match="are of two models"):
        of_bundle(model)


def test_an_export_into_an_earlier_ones_folder_leaves_nothing_of_that_behind(state: Path, tmp_path: Path) -> None:
    """An ONNX file of other weights beside these would be believed."""
    folder = tmp_path / "model"
    export.export(state, folder)
    (folder / "model.onnx").write_text("of an earlier export")
    files, _ = export.export(state, folder)
    assert {p.name for p in folder.iterdir()} == {f.name for f in files} == {*NEEDED, SUMS_FILE}
    of_bundle(folder)


def test_an_export_that_is_cut_short_leaves_a_folder_that_nobody_predicts_with(
    state: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hsl_node.train.export.card_text", full)
    with pytest.raises(OSError, match="No space"):
        export.export(state, model)
    with pytest.raises(ConfigError, match="SHA256SUMS is missing"):
        read_card(model)


def test_a_round_belongs_to_this_nodes_models(model: Path, tmp_path: Path) -> None:
    done = run("predict", "--model", model, "--round", "2", write_png(tmp_path / "x.png", noise(1)))
    assert isinstance(done.exception, UsageError) and "leave --round out" in done.exception.remedy


def test_sums_of_something_else_are_not_written_over(state: Path, tmp_path: Path) -> None:
    (tmp_path / SUMS_FILE).write_text("of the hospital's own archive")
    with pytest.raises(UsageError, match="SHA256SUMS is of no exported model"):
        export.export(state, tmp_path)
    assert (tmp_path / SUMS_FILE).read_text() == "of the hospital's own archive"
