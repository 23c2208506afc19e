"""The manual page is what the commands say now, and a formatter has nothing against it."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from man_page import PAGE, man_page
from path_options import commands


def test_the_manual_page_is_as_the_commands_are() -> None:
    assert PAGE.read_text(encoding="utf-8") == man_page(), "make docs"


def test_it_names_every_command_and_can_be_formatted() -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    command = ["groff", "-man", "-Tascii", "-ww", str(PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    shown = " ".join(done.stdout.split())
    assert not [name for name, _ in commands() if f"hsl-node {name}" not in shown]
