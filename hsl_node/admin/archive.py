"""The tar file of a backup: plain members behind an index with the sha256 and size of each, checked before it is used.

    backup.json          first: format, versions, sha256 and size of every file that follows
    node.toml federation.toml keyring.toml splits.json keys/node_ed25519 keys/node_ed25519.next (in a key change)
    anchor.safetensors journal.sqlite3 fused/r000012.safetensors trainer/own_r000012.safetensors
    inbox/r000012/north.safetensors outbox/r000012.safetensors    where a method makes a fused model of these

It is read header by header, plain members only: the file may come from anybody.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hsl_node import __version__
from hsl_node.errors import LocalStateError, UsageError, escaped
from hsl_node.federation.names import PEER_PATTERN
from hsl_node.federation.problems import in_words
from hsl_node.federation.strings import Name, PeerName, Sha256
from hsl_node.host import durable
from hsl_node.host.durable import Step

FORMAT: Literal["hsl-node backup"] = "hsl-node backup"
VERSION: Literal[1] = 1
INDEX = "backup.json"
INDEX_MAX_BYTES = 64 * 1024
MEMBERS_MAX = 280  # eight, three fused models, six own ones, and of three rounds 64 hospitals' checkpoints
SETTINGS_MAX_BYTES = 1024 * 1024  # node.toml, federation.toml, keyring.toml, the keys
MEMBER_MAX_BYTES = 1 << 40  # anchor set, journal, models: the room on the disk is looked at before
KEY = "keys/node_ed25519"
NEXT = KEY + ".next"  # the new key of `key rotate`, until --finish
BLOCK_BYTES = 1024 * 1024
MEMBER = re.compile(
    r"node\.toml|federation\.toml|keyring\.toml|splits\.json|anchor\.safetensors|journal\.sqlite3"
    r"|keys/node_ed25519(\.next)?|(fused/|trainer/own_|outbox/)r[0-9]{6}\.safetensors"
    rf"|inbox/r[0-9]{{6}}/{PEER_PATTERN}\.safetensors",
    re.ASCII,
)


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Measured(Strict):
    sha256: Sha256
    bytes: int = Field(ge=0, le=MEMBER_MAX_BYTES)


class AnchorPlace(Strict):
    path: str
    fingerprint: Sha256


class Index(Strict):
    """backup.json."""

    format: Literal["hsl-node backup"] = FORMAT
    version: Literal[1] = VERSION
    hsl_node: Name
    node: PeerName
    federation: Sha256 | None
    written: Name
    anchor: AnchorPlace | None
    has_key: bool
    files: dict[str, Measured] = Field(max_length=MEMBERS_MAX)

    @property
    def bytes(self) -> int:
        return sum(measured.bytes for measured in self.files.values())

    @model_validator(mode="after")
    def _consistent(self) -> Index:
        for name, measured in self.files.items():
            if not MEMBER.fullmatch(name):
                raise ValueError(f"it names a file that no backup holds: {escaped(name, 80)}")
            if measured.bytes > SETTINGS_MAX_BYTES and (name.endswith(".toml") or name in (KEY, NEXT)):
                raise ValueError(f"{name} has {measured.bytes} bytes")
        if "node.toml" not in self.files:
            raise ValueError("it holds no node.toml")
        if self.has_key is not (KEY in self.files):
            raise ValueError(f"it holds {KEY}, or not, against what it says")
        return self


# ------------------------------------------------------------------ written


def write(file: IO[bytes], index: Index, sources: Mapping[str, IO[bytes]]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:  # a header a member, of any size
        _add_member(tar, INDEX, io.BytesIO(index.model_dump_json(indent=2, ensure_ascii=True).encode("ascii")))
        for name, source in sources.items():
            with _readable(name):
                _add_member(tar, name, source)


def measured_file(name: str, source: io.BufferedReader) -> Measured:
    with _readable(name):
        source.seek(0)
        return Measured(sha256=hashlib.file_digest(source, "sha256").hexdigest(), bytes=source.tell())


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Raises: LocalStateError."""
    try:
        yield
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        raise unreadable(name, str(exc.strerror)) from exc


def unreadable(name: str, why: str) -> LocalStateError:
    return LocalStateError(
        f"{name} cannot be read: {why}; the backup is not made",
        remedy="the disk under the state directory fails there: look at it (`smartctl`, `dmesg`)",
    )


def _add_member(tar: tarfile.TarFile, name: str, source: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size = source.seek(0, os.SEEK_END)
    member.mode, member.mtime = 0o600, int(time.time())
    source.seek(0)
    tar.addfile(member, source)


# ------------------------------------------------------------------ read


def read_index(source: Path) -> Index:
    """What a backup says of itself.

    Raises:
        LocalStateError: it is damaged, of a newer hsl-node, or no backup.
    """
    with _opened(source) as file:
        return _first_member(source, file)


def unpack(source: Path, folder: Path) -> None:
    """Every file of a backup, each with the sha256 that the index names, into a folder that a restore will move.

    Raises:
        LocalStateError: as `read_index`; one is missing, not in the index, there twice, or not what the index says.
    """
    with _opened(source) as tar:
        left = dict(_first_member(source, tar).files)
        while member := _next_member(tar):
            measured = left.pop(member.name, None)
            if measured is None or member.size != measured.bytes:
                raise _damaged(source, f"{escaped(member.name, 80)} is not as {INDEX} says")
            (folder / member.name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with durable.replacing(folder / member.name, Step.RESTORE_UNPACK, mode=0o600) as file:
                digest = hashlib.sha256()
                for block in _content(tar, member):
                    digest.update(block)
                    file.write(block)
                if digest.hexdigest() != measured.sha256:
                    raise _damaged(source, f"{member.name} has not the sha256 that {INDEX} names")
        if left:
            raise _damaged(source, f"{', '.join(sorted(left))} is missing")


def _first_member(source: Path, file: IO[bytes]) -> Index:
    first = _next_member(file)
    if first is None or first.name != INDEX or first.size > INDEX_MAX_BYTES:
        raise LocalStateError(f"{source} is no backup of hsl-node", remedy="give a file that hsl-node backup wrote")
    try:
        content = json.loads(b"".join(_content(file, first)))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("another format")
        version = content.get("version")
        if type(version) is int and version > VERSION:
            raise LocalStateError(
                f"{source} was written by a newer hsl-node ({escaped(str(content.get('hsl_node')), 40)}; "
                f"here {__version__})",
                remedy="install that version, then restore",
            )
        return Index.model_validate(content)
    except ValidationError as exc:
        error = exc.errors()[0]
        where = escaped(".".join(str(key) for key in error["loc"]), 80)
        what = in_words(error)
        raise _damaged(source, f"{INDEX}: {where}{': ' if where else ''}{escaped(what)}") from exc
    except (ValueError, RecursionError) as exc:
        raise _damaged(source, f"its {INDEX} cannot be read") from exc


def _next_member(file: IO[bytes]) -> tarfile.TarInfo | None:
    """The header at this place of the file; None: the end of the archive.

    A member has one header and its content as it stands: no link, no hole, no second header with a name or a size in
    it. So a small file stays small, and what is read is never more than is there.

    Raises:
        tarfile.TarError: something else.
    """
    header = file.read(tarfile.BLOCKSIZE)
    if not header.strip(b"\0"):
        return None
    member = tarfile.TarInfo.frombuf(header, "ascii", "backslashreplace")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise tarfile.TarError(f"{escaped(member.name, 80)} is no plain file")
    return member


def _content(file: IO[bytes], member: tarfile.TarInfo) -> Iterator[bytes]:
    """Raises: EOFError: the file ends before."""
    left = member.size
    while left > 0:
        block = file.read(min(left, BLOCK_BYTES))
        if not block:
            raise EOFError("it ends too early")
        left -= len(block)
        yield block
    file.read(-member.size % tarfile.BLOCKSIZE)


@contextmanager
def _opened(source: Path) -> Iterator[IO[bytes]]:
    try:
        with open(source, "rb") as file:
            yield file
    except FileNotFoundError as exc:
        raise UsageError(f"there is no file {source}", remedy="name the file that hsl-node backup wrote") from exc
    except IsADirectoryError as exc:
        raise UsageError(
            f"{source} is a folder", remedy="name the file that hsl-node backup wrote, in it perhaps"
        ) from exc
    except (tarfile.TarError, EOFError) as exc:
        raise _damaged(source, str(exc)) from exc


def _damaged(source: Path, what: str) -> LocalStateError:
    return LocalStateError(
        f"{source} is damaged or no backup of hsl-node: {what}; nothing was restored",
        remedy="take another copy of it, or an older backup: the peers have what came later",
    )
