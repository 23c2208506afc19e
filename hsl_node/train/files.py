"""Files of the node's own about its images: written whole or not at all, readable by nobody else."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hsl_node.errors import LocalStateError
from hsl_node.sync.tensors import fsync_folder


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a new file (mode 0600) that takes the place of `path` only when the block ends without an error.

    Raises:
        LocalStateError: the disk is full, or the folder cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        fsync_folder(path.parent)
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        raise LocalStateError(
            f"{path} cannot be written: {os.strerror(exc.errno) if exc.errno else type(exc).__name__}",
            remedy="free some space on that disk" if full else "check that the folder belongs to this user",
        ) from exc
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
