"""Versions of this program and of what its results depend on."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from hsl_node import __version__

PACKAGES = ("torch", "torchvision", "numpy", "asyncssh", "paramiko", "cryptography", "pydantic", "safetensors")


def versions() -> dict[str, str]:
    found = {
        "hsl-node": __version__,
        "python": platform.python_version(),
        "system": f"{os.uname().sysname} {os.uname().release}",
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
