"""Bring a delivered file where only we can reach it, so that what is checked is what is used. Blocking.

Renaming is enough where our own server wrote the file, which delivers nothing that is still open for writing. Another
server may let a sender keep its file open across the rename: then the bytes are copied.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from hsl_node.errors import PeerDataError
from hsl_node.federation.names import FileName
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.sync.store.plain_files import is_in_motion, open_plain, require_plain, unlink
from hsl_node.weights.checkpoint_file import CHUNK_BYTES


def claim(name: FileName, inbox: int, target: Path, expected: int, *, foreign: bool) -> bool:
    """Bring `name` of the folder `inbox` to `target`. False: it is not here.

    Raises:
        PeerDataError: code `file` or `size`; the file is removed.
    """
    try:
        status = os.stat(str(name), dir_fd=inbox, follow_symlinks=False)
    except FileNotFoundError:
        return target.exists()  # claimed before a crash
    if foreign and is_in_motion(status):
        return False
    try:
        require_plain(status)
        if status.st_size != expected:
            raise PeerDataError(f"{status.st_size} bytes of {expected}", code="size")
        if foreign:
            _copy(name, inbox, target, expected)
            return True
        try:
            with durable.passing(Step.RECEIVER_CLAIM):
                durable.rename(str(name), target, old_folder=inbox)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            _copy(name, inbox, target, expected)
        require_plain(os.lstat(target))
        return True
    except PeerDataError:
        unlink(str(name), inbox)
        target.unlink(missing_ok=True)
        raise


def _copy(name: FileName, inbox: int, target: Path, expected: int) -> None:
    """Copy the bytes into a file of our own, then remove the original.

    Raises:
        PeerDataError: code `file` or `size`; it is no plain file, or grew or shrank meanwhile.
    """
    target.unlink(missing_ok=True)
    with durable.passing(Step.RECEIVER_CLAIM):
        try:
            with os.fdopen(open_plain(str(name), os.O_RDONLY, inbox), "rb", buffering=0) as source:
                # Not O_EXCL: the same file may just have been fetched from another peer (`fetch_missing.py`).
                own = durable.disk.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
                with durable.disk.file(own) as copy:
                    done = 0
                    while block := source.read(CHUNK_BYTES):
                        done += len(block)
                        if done > expected:
                            break
                        copy.write(block)
                    if done != expected:
                        raise PeerDataError(f"{done} bytes of {expected}: changed while it was read", code="size")
                    copy.flush()
                    durable.sync(own, target.name)  # before the original goes
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        durable.sync_folder(target.parent)
        with suppress(FileNotFoundError):  # taken back by its sender, as another server may allow
            durable.disk.unlink(str(name), folder=inbox)
