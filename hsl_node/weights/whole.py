"""Is a file what it was? One question, one set of words. Loads fast."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Literal

from hsl_node.federation.names import Digest

How = Literal["whole", "gone", "cut short", "altered", "unreadable"]


def state_of(path: Path, sha256: str | None = None, size: int | None = None) -> How:
    """How a file is, by what is known of it. Without `sha256` nothing is read; "cut short" is any other size.

    It may go at any moment: the intake moves what it claims. "unreadable": the disk fails there.

    Raises:
        OSError: rights, say; that tells nothing of the file.
    """
    try:
        if path.stat().st_size != size and size is not None:
            return "cut short"
        return "altered" if sha256 is not None and sha256_of(path) != sha256 else "whole"
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.EIO):
            raise
        return "gone" if exc.errno == errno.ENOENT else "unreadable"


def holds(path: Path, sha256: str) -> bool:
    """Is this the file?"""
    return state_of(path, sha256) == "whole"


def sha256_of(path: Path) -> Digest:
    with open(path, "rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").hexdigest())
