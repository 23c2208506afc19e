"""`data check` and `anchor build` over a folder of images."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import run
from PIL import Image

from hsl_node.admin import enrol
from hsl_node.errors import DataError, UsageError


def test_data_check_counts_and_draws(tmp_path: Path, images: Path) -> None:
    state = tmp_path / "ash"
    enrol.init(state, name="ash", address="127.0.0.1:9001", listen=None, data=images)
    sheet = tmp_path / "sheet.png"
    options = ("--classes", "benign,malignant", "--image-size", "16")
    done = run("--state", state, "data", "check", *options, "--contact-sheet", sheet)
    assert done.exit_code == 0, done.output
    benign = next(line for line in done.stdout.splitlines() if line.startswith("benign"))
    assert benign.split() == ["benign", "12", "2", "6", "20"]
    assert done.stdout.rstrip().endswith(f"wrote {sheet}") and Image.open(sheet).width > 100
    found = json.loads(run("--state", state, "data", "check", *options, "--json").stdout)
    assert found["ok"] and found["images"] == 40


def test_data_check_says_what_prevents_training_and_exits_78(tmp_path: Path, images: Path) -> None:
    (images / "benign" / "0.png").write_bytes(b"no picture")
    state = tmp_path / "ash"
    enrol.init(state, name="ash", address="127.0.0.1:9001", listen=None, data=images)
    done = run("--state", state, "data", "check", "--classes", "benign,malignant", "--image-size", "16")
    assert done.exit_code == 78
    assert "problem: 1 images cannot be read" in done.stdout and "unreadable: " in done.stdout
    assert "not ready to train" in done.stdout


def test_anchor_build_makes_the_same_file_from_the_same_images(tmp_path: Path, images: Path) -> None:
    for name in ("a", "b"):
        options = ("--data", images, "--classes", "benign,malignant", "-n", "5", "--image-size", "16")
        done = run("anchor", "build", *options, "--out", tmp_path / name)
        assert done.exit_code == 0 and "10 images of 16 px" in done.stdout
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = run("anchor", "build", "--digits", "--out", tmp_path / "a")
    assert isinstance(again.exception, UsageError) and "nothing was changed" in str(again.exception)


def test_anchor_build_reads_a_table_with_names_of_its_own_as_its_errors_say(tmp_path: Path, images: Path) -> None:
    """Whoever builds an anchor set has no node.toml for it: each error names the option that helps."""
    table = tmp_path / "public.csv"
    rows = [f"{file.relative_to(tmp_path)},{file.parent.name},none" for file in sorted(images.rglob("*.png"))]
    table.write_text("\n".join(["file,dx,split", *rows]))
    words: list[str | Path] = ["anchor", "build", "--data", table, "--image-size", "16", "--out", tmp_path / "a"]
    for advice, then in (
        ("--column path=", ["--column", "path=file"]),
        ("--column label=", ["--column", "label=dx"]),
        ("--column split=", ["--column", "split="]),
        ("--classes: benign, malignant", ["--classes", "benign,malignant"]),
    ):
        done = run(*words, "--classes", "good,bad")
        assert isinstance(done.exception, DataError)
        assert advice in done.exception.remedy and "node.toml" not in str(done.exception), done.exception
        words += then
    assert "40 images of 16 px" in run(*words).stdout
    wrong = run("anchor", "build", "--data", table, "--classes", "a,b", "--out", tmp_path / "b", "--column", "dx")
    assert isinstance(wrong.exception, UsageError) and "--column label=dx" in wrong.exception.remedy
