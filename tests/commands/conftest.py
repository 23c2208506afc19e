"""Images, and two nodes that are enrolled with each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import federation_file
from PIL import Image
from ports import free_ports

from hsl_node.admin import enrol


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder per class, 20 images each."""
    rng = np.random.default_rng(1)
    for label in ("benign", "malignant"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for n in range(20):
            pixels = rng.integers(0, 255, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{n}.png")
    return tmp_path / "images"


@pytest.fixture
def two(tmp_path: Path, images: Path) -> tuple[Path, Path]:
    """ash and birch, enrolled with each other, on free ports."""
    states = []
    for name in ("ash", "birch"):
        address = f"127.0.0.1:{free_ports(1)[0]}"
        enrol.init(tmp_path / name, name=name, address=address, listen=address, data=images)
        states.append(tmp_path / name)
    path = federation_file(tmp_path, *states, classes=("benign", "malignant"))
    for state in states:
        enrol.join(state, path)
    return states[0], states[1]
