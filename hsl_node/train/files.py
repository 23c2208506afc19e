"""Files of the node's own about its images: written whole or not at all, readable by nobody else."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hsl_node.errors import LocalStateError
from hsl_node.sync import durable
from hsl_node.sync.durable import Step


@contextmanager
def replacing(path: Path, step: Step = Step.FILE_RESULT) -> Iterator[BinaryIO]:
    """Write a new file (mode 0600) that takes the place of `path` only when the block ends without an error.

    Raises:
        LocalStateError: the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with durable.replacing(path, step, mode=0o600, shared=True) as file:
            yield file
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        raise LocalStateError(
            f"{path} cannot be written: {os.strerror(exc.errno) if exc.errno else type(exc).__name__}",
            remedy="free some space on that disk" if full else "check that the folder belongs to this user",
        ) from exc
