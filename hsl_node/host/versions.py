"""Versions of this program and of what its results depend on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from hsl_node import __version__

PACKAGES = ("torch", "torchvision", "numpy", "asyncssh", "paramiko", "cryptography", "pydantic", "safetensors")


def this_program() -> str:
    """`hsl-node 0.1.0`, in a checkout with its commit: no release is tagged yet."""
    return f"hsl-node {__version__}" + (f" (commit {found})" if (found := commit()) else "")


def commit() -> str | None:
    """Of the checkout that this runs from, with "+" where files differ from it; None: no checkout, or no git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    found = {
        "hsl-node": __version__,
        "commit": commit() or "unknown",
        "python": platform.python_version(),
        "system": f"{os.uname().sysname} {os.uname().release}",
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
