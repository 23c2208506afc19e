"""`init` at a terminal: it shows columns and labels, is told their meaning; `data check` takes its node.toml."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from command_line import run, shell
from PIL import Image

from hsl_node.federation.node_toml import load_node


def table_of(folder: Path) -> Path:
    rows = ["scan,finding,person"]
    for n in range(40):
        name = f"{n}.png"
        Image.effect_noise((20, 20), 40 + n).save(folder / name)
        rows.append(f"{name},{'BM'[n % 2]},p{n}")
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    return folder / "images.csv"


def at_a_terminal(typed: str, *words: str) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "hsl_node", *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        said = b""
        try:
            while block := os.read(ours, 4096):
                said += block
        except OSError:  # EIO: the other end is closed
            pass
        code = process.wait(60)
    os.close(ours)
    return code, said.decode()


def test_at_a_terminal_it_asks_and_the_node_toml_is_one_that_data_check_takes(tmp_path: Path) -> None:
    state, table = tmp_path / "ash", table_of(tmp_path)
    words = ["--state", str(state), "init", "--name", "ash", "--address", "127.0.0.1:9001", "--data", str(table)]
    code, said = at_a_terminal("file\nscan\nfinding\nperson\nbenign,malignant\nbenign\nmalignant\n", *words)
    assert code == 0, said
    assert "Columns of images.csv: scan (e.g. 0.png), finding (e.g. B)" in said
    assert "B (20 images), M (20 images)" in said and "One of: scan, finding, person" in said
    data = load_node(state).data
    assert data.columns == {"path": "scan", "label": "finding", "patient": "person"}
    assert data.labels == {"B": "benign", "M": "malignant"}
    assert "data check --classes benign,malignant" in said
    checked = run("--state", state, "data", "check", "--classes", "benign,malignant")
    assert "no column" not in checked.output and "benign" in checked.output and checked.exit_code == 0, checked.output


def test_an_end_of_input_ends_the_questions_and_the_node_is_made(tmp_path: Path) -> None:
    state, table = tmp_path / "ash", table_of(tmp_path)
    words = ["--state", str(state), "init", "--name", "ash", "--address", "127.0.0.1:9001", "--data", str(table)]
    code, said = at_a_terminal("scan\n\x04", *words)
    assert code == 0 and "Not answered" in said and load_node(state).data.columns == {}


def test_in_a_script_nothing_is_asked(tmp_path: Path) -> None:
    state, table = tmp_path / "ash", table_of(tmp_path)
    done = shell("--state", state, "init", "--name", "ash", "--address", "127.0.0.1:9001", "--data", table)
    assert done.returncode == 0 and "Which column" not in done.stderr
    assert load_node(state).data.labels == {}
