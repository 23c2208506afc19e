"""`benchmarks/methods.py`: the table of the learning methods, made small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import learning
import pytest
from sources import REPOSITORY

from hsl_node.federation.methods import CARDS
from hsl_node.train.site import checkpoint_bytes


def table_of(*methods: str) -> dict[str, dict[str, str]]:
    command = [sys.executable, "benchmarks/methods.py", "--quick", "--methods", *methods]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=True)
    titles, _, *rows = (
        [c.strip() for c in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"
    )
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def test_each_figure_of_the_table_is_counted_or_measured() -> None:
    """FedAvg beside itself sends as much; FedBN sends less, HSL more; of those that send no model the table says so."""
    table = table_of("fedavg", "fedbn", "hsl", "splitavg", "local")
    assert list(table) == ["fedavg", "fedbn", "hsl", "splitavg", "local"]
    sent = {name: row["bytes / FedAvg"] for name, row in table.items()}
    assert sent["fedavg"] == "1" and sent["local"] == "none"
    assert 0.9 < float(sent["fedbn"]) < 1 < float(sent["hsl"])
    crossed = 2 * (
        2 * 16 * 16 * 16 * 16 * 4 + 16 * 8
    )  # epochs of one batch: (16, 16, 16, 16) float32 up and down, labels
    whole = checkpoint_bytes(learning.small_plan(method="fedavg", image_size=16))
    assert float(sent["splitavg"]) == pytest.approx(crossed / whole, rel=0.03), "a file has a header"
    assert all(float(row["seconds / FedAvg"]) > 0 for row in table.values())
    assert [row["kept beside"] for row in table.values()] == ["", "private tensors", "", "", ""]
    for name, row in table.items():
        file = REPOSITORY / Path(*CARDS[name].code.partition(":")[0].split(".")).with_suffix(".py")
        assert row["lines (code)"].startswith(f"{len(file.read_text().splitlines())} (")
        assert row["here"].startswith(CARDS[name].faith)
        assert ("in simulations only" in row["here"]) == bool(CARDS[name].simulation_only)
    own = (REPOSITORY / "tests/train/methods/test_fedbn.py").read_text().count("\ndef test_")
    assert table["fedbn"]["its tests"] == f"test_fedbn {own}"
    assert "networks/mmoe" in table["hsl"]["lines (code)"] and "test_model" in table["hsl"]["its tests"]
    assert "study/splitavg" in table["splitavg"]["lines (code)"]
