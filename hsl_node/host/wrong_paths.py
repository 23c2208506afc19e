"""Why the operating system refused a path, in words, and what mends it; a look before a file is written. Loads fast.

Where the reason is whose files they are: `permissions.py`.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hsl_node.errors import LocalStateError, UsageError, escaped
from hsl_node.host import permissions

OF_THE_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT)
OF_THE_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)


def explained(error: OSError, state: Path | None = None, path: Path | None = None) -> LocalStateError:
    """What to raise for an error of the operating system; `path`: what was given, where the error names another."""
    if path is None and isinstance(error.filename, str):
        path = Path(error.filename)
    if isinstance(error, PermissionError) and path is not None:
        if state is not None and not path.is_absolute() and (found := permissions.unusable(state)):
            return permissions.told(state, found)  # a name within some open folder: which one the error does not say
        return permissions.denied(path.absolute(), state)
    if error.errno == errno.EROFS and path is not None and state is not None and path.absolute().is_relative_to(state):
        return permissions.read_only(path)
    text, remedy = _cause(error, path)
    return LocalStateError(text, remedy=remedy)


def require_place(path: Path) -> None:
    """A file can be written here: known before the work is done for it.

    Raises:
        UsageError: it is a folder, a device or a pipe; or its folder is missing, is none, or takes no file of this
            user.
    """
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder", remedy=f"name a file, e.g. {_word(path / 'NAME')}")
    with usage(path):
        if path.is_symlink():
            os.stat(path)
    if os.path.exists(path) and not os.path.isfile(path):  # as root it would be gone, for the whole machine
        raise UsageError(f"{path} is a device, a pipe or a socket, no file", remedy="name a file")
    folder = path.absolute().parent
    if not os.path.lexists(folder) and os.path.isdir(_there(path)):
        make = f"check the spelling; to make it: mkdir -p {_word(folder)}"
        raise UsageError(f"{path}: there is no folder {folder}", remedy=make)
    _require_takes_files(folder, path)


def require_folder(path: Path) -> None:
    """Files can be written into this folder, which is there or can be made. Raises: UsageError."""
    if os.path.lexists(path):
        with usage(path):
            os.scandir(path).close()
        _require_takes_files(path, path)
    else:
        _require_takes_files(_there(path), path)


def require_state(state: Path) -> None:
    """What is called a state directory is a folder, or not there yet. Raises: UsageError."""
    try:
        os.scandir(state).close()
    except (FileNotFoundError, PermissionError) as exc:
        if not os.path.islink(state):  # said later, with what the command wants to do
            return
        text, remedy = _cause(exc, state)
        raise UsageError(text, remedy=f"{remedy}; or give another folder with --state") from exc
    except OSError as exc:
        text, remedy = _cause(exc, state)
        raise UsageError(f"{text}; a state directory is a folder", remedy="give another one with --state") from exc


@contextmanager
def usage(path: Path) -> Iterator[None]:
    """An error of the operating system about `path` becomes one of the command line. Raises: UsageError."""
    try:
        yield
    except OSError as exc:
        said = explained(exc, path=path)
        raise UsageError(said.message, remedy=said.remedy) from exc


def _require_takes_files(folder: Path, path: Path) -> None:
    from tempfile import TemporaryFile

    with usage(path):
        try:
            TemporaryFile(dir=folder).close()  # nothing else tells: root may write anywhere but on such file systems
        except FileNotFoundError:
            if not os.path.isdir(folder):
                raise
            raise OSError(errno.EROFS, os.strerror(errno.EROFS)) from None  # /proc, say


# ------------------------------------------------------------------ what an errno means for a person


def _cause(error: OSError, path: Path | None) -> tuple[str, str]:
    """What is wrong, and what to do."""
    said = str(error.strerror or error)
    if path is None:
        return said, "check the disk: `df` shows its room, `dmesg` its faults"
    shown, there = escaped(str(path), 300), _there(path)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{shown}: {said}", f"free some space there: df -h {_word(there)}"
        case errno.EROFS:
            rest = (
                "name a place on another one; where it should not be: `dmesg` says why it is, a disk that fails perhaps"
            )
            return f"{shown}: this file system takes no files, it is read-only", rest
        case errno.ENOENT if os.path.islink(path):
            return (
                f"{shown} is a link to {os.readlink(path)}, where nothing is",
                "mend or remove the link; is a volume not mounted?",
            )
        case errno.ENOENT if there == path.absolute().parent:
            return f"{shown}: no such file or folder", f"`ls {_word(there)}` shows what is there"
        case errno.ENOENT:
            return f"{shown}: there is no folder {path.absolute().parent}", f"`ls {_word(there)}` shows what is there"
        case errno.ENOTDIR | errno.EEXIST:
            file = _file_in(path)
            which = f"{shown} is" if file == path else f"{shown}: {file} is"
            return f"{which} a file, no folder", "name a folder, or a place in one"
        case errno.EISDIR:
            return f"{shown} is a folder, and a file is needed", f"name a file: `ls {_word(path)}` shows what is in it"
        case errno.ELOOP:
            return f"{shown}: a link that leads back to itself", f"`ls -l {_word(path)}` shows it: mend or remove it"
        case errno.ENAMETOOLONG:
            return f"{shown}: the name is too long", "a name has 255 bytes at most: give a shorter one"
        case _:
            return f"{shown}: {said}", f"look at it: `ls -ld {_word(path)}`, `df {_word(there)}`, `dmesg`"


def _there(path: Path) -> Path:
    """The nearest folder above it that exists."""
    return next((p for p in path.absolute().parents if os.path.isdir(p)), Path("/"))


def _file_in(path: Path) -> Path:
    return next((p for p in (*reversed(path.absolute().parents), path) if os.path.isfile(p)), path)


def _word(path: Path) -> str:
    return shlex.quote(str(path))
