"""Backup and restore: one tar file with what cannot be made anew. Works beside a running daemon.

    backup.json          first: format, versions, sha256 and size of every file that follows
    node.toml federation.toml keyring.toml splits.json keys/node_ed25519 keys/node_ed25519.next (in a key change)
    anchor.safetensors journal.sqlite3 fused/r000012.safetensors

A restore reads plain members only, header by header: the file may come from anybody.
The journal is copied as of one moment. The outbox is left out: the peers keep what was published. A restored node asks
them what it has signed since (`recovery.py`), so an old backup does no harm.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hsl_node import __version__
from hsl_node.errors import ConfigError, LocalStateError, UsageError, escaped
from hsl_node.federation import config, identity, keyring, node_toml, toml_file
from hsl_node.federation.config import Federation
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.federation.strings import Name, PeerName, Sha256
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.host.hints import addressed
from hsl_node.host.scratch import scratch
from hsl_node.host.units import size
from hsl_node.node.heal.mark import Mark, set_mark
from hsl_node.status import last_words
from hsl_node.sync.store import models
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.layout import Layout
from hsl_node.sync.store.store import lock

FORMAT: Literal["hsl-node backup"] = "hsl-node backup"
VERSION: Literal[1] = 1
INDEX = "backup.json"
INDEX_MAX_BYTES = 64 * 1024
MEMBERS_MAX = 16  # eight, and two fused models
SETTINGS_MAX_BYTES = 1024 * 1024  # node.toml, federation.toml, keyring.toml, the keys
MEMBER_MAX_BYTES = 1 << 40  # anchor set, journal, fused models: the room on the disk is looked at before
KEY = "keys/node_ed25519"
NEXT = KEY + ".next"  # the new key of `key rotate`, until --finish
BLOCK_BYTES = 1024 * 1024
FOUND_SHOWN = 5  # of what lies where a node is to be restored
MIXED = "its files are of two nodes: take another copy of it, or an older backup"
STAGING = ".restore"  # in the state directory: a restore that was cut short, to be made again
_NAME = re.compile(
    r"node\.toml|federation\.toml|keyring\.toml|splits\.json|anchor\.safetensors|journal\.sqlite3"
    r"|keys/node_ed25519(\.next)?|fused/r[0-9]{6}\.safetensors",
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

    @model_validator(mode="after")
    def _consistent(self) -> Index:
        for name, measured in self.files.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"it names a file that no backup holds: {escaped(name, 80)}")
            if measured.bytes > SETTINGS_MAX_BYTES and (name.endswith(".toml") or name in (KEY, NEXT)):
                raise ValueError(f"{name} has {measured.bytes} bytes")
        if "node.toml" not in self.files:
            raise ValueError("it holds no node.toml")
        if self.has_key is not (KEY in self.files):
            raise ValueError(f"it holds {KEY}, or not, against what it says")
        return self


@dataclass(frozen=True)
class Summary:
    """What a backup holds, for people."""

    path: Path
    node: str
    federation: str | None  # short hash
    files: tuple[str, ...]
    bytes: int
    has_key: bool
    written: str  # date and time, for display
    left_out: tuple[str, ...] = ()  # what a restore will have to get elsewhere, and where


# ------------------------------------------------------------------ backup


def backup(state: Path, target: Path, *, with_key: bool = True) -> Summary:
    """Write `target`, mode 0600, whole or not at all.

    Raises:
        UsageError: it exists.
        LocalStateError: something cannot be read, or the disk is full.
    """
    if target.exists():
        raise UsageError(f"{target} exists already; nothing was changed", remedy="name another file")
    try:
        return _backup(state, target, with_key=with_key)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise LocalStateError(
            f"{target} could not be written: {exc.strerror}; the backup is not made",
            remedy="make room in that folder, or name another; the node itself goes on",
        ) from exc


def _backup(state: Path, target: Path, *, with_key: bool) -> Summary:
    layout, node = Layout(state), node_toml.load_node(state)
    left_out: list[str] = []
    with scratch(target.parent, ".hsl-node-backup-") as folder, ExitStack() as stack:
        sources: dict[str, IO[bytes]] = {}

        def add(name: str, path: Path) -> bool:
            with suppress(FileNotFoundError):
                sources[name] = stack.enter_context(open(path, "rb"))  # held open: it may be pruned meanwhile
                return True
            return False

        for name in ("node.toml", "federation.toml", "keyring.toml", "splits.json"):
            add(name, state / name)
        if with_key:
            add(NEXT, state / NEXT)  # before the key: a `--finish` in between leaves it twice in here, not out
            if not add(KEY, layout.key):
                left_out.append(f"the private key: it is not at {layout.key}")
        fused: list[models.Model] = []
        if layout.journal.exists():
            copy = folder / "journal.sqlite3"
            fused = _copy_journal(layout.journal, copy)
            add("journal.sqlite3", copy)
        for model in fused:
            name, path = _member_of(model), layout.fused(model.round)
            if not add(name, path):
                left_out.append(_told(models.Harm(model, "gone"), layout))
        if not add("anchor.safetensors", layout.anchor) and node.anchor is not None:
            left_out.append(f"the anchor set {node.anchor}")
        index = _index(state, node, sources)
        for model in fused:
            if (found := index.files.get(_member_of(model))) and found.sha256 != model.sha256:
                del sources[_member_of(model)]
                left_out.append(_told(models.Harm(model, "altered"), layout))
        index = index.model_copy(update={"files": {name: index.files[name] for name in sources}})
        with (
            durable.replacing(target, Step.BACKUP_WRITE, mode=0o600, once=True) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar,  # a header a member, of any size
        ):
            _add_member(tar, INDEX, io.BytesIO(index.model_dump_json(indent=2, ensure_ascii=True).encode("ascii")))
            for name, source in sources.items():
                with _readable(name):
                    _add_member(tar, name, source)
    return _summary(target, index, tuple(left_out))


def _copy_journal(source: Path, target: Path) -> list[models.Model]:
    """A copy as of one moment; gives the fused models that it needs: the last one and the best."""
    with closing(Journal.read_only(source)) as journal:
        journal.copy(target)
    with closing(Journal.read_only(target)) as journal:
        state, found = journal.state(), {model.round: model for model in models.models(journal)}
        last = state["round"] - 1 if state else 0
        if last > 0 and last not in found:
            found |= {r: models.Model(r, sha256, "the last one") for r, sha256 in journal.fused_digests([last]).items()}
        return [found[round] for round in sorted(found)]


def _member_of(model: models.Model) -> str:
    return f"fused/r{model.round:06d}.safetensors"


def _told(harm: models.Harm, layout: Layout) -> str:
    return f"{harm.text(layout)}. What to do: {addressed(harm.fix(layout), layout.state)}"


def _index(state: Path, node: NodeConfig, sources: dict[str, IO[bytes]]) -> Index:
    federation = config.load_federation(state) if (state / "federation.toml").exists() else None
    anchor = federation.anchor.fingerprint if federation and federation.anchor else None
    return Index(
        hsl_node=__version__,
        node=node.name,
        federation=federation.digest if federation else None,
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        anchor=AnchorPlace(path=str(node.anchor or Layout(state).anchor), fingerprint=anchor) if anchor else None,
        has_key=KEY in sources,
        files={name: _measured_file(name, source) for name, source in sources.items()},
    )


def _measured_file(name: str, source: IO[bytes]) -> Measured:
    with _readable(name):
        return _measured(_blocks(source))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Raises: LocalStateError."""
    try:
        yield
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        raise LocalStateError(
            f"{name} cannot be read: {exc.strerror}; the backup is not made",
            remedy="the disk under the state directory fails there: look at it (`smartctl`, `dmesg`)",
        ) from exc


def _measured(blocks: Iterable[bytes]) -> Measured:
    digest, size = hashlib.sha256(), 0
    for block in blocks:
        digest.update(block)
        size += len(block)
    return Measured(sha256=digest.hexdigest(), bytes=size)


def _blocks(source: IO[bytes]) -> Iterator[bytes]:
    source.seek(0)
    while block := source.read(BLOCK_BYTES):
        yield block


def _add_member(tar: tarfile.TarFile, name: str, source: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size = source.seek(0, os.SEEK_END)
    member.mode, member.mtime = 0o600, int(time.time())
    source.seek(0)
    tar.addfile(member, source)


# ------------------------------------------------------------------ restore


def restore(state: Path, source: Path) -> Summary:
    """Make a state directory from a backup; checked before anything is written, and marked as restored.

    Raises:
        UsageError: something lies in the state directory already.
        LocalStateError: the file is damaged, of a newer hsl-node, or no backup.
        AlreadyRunning: a daemon holds the state directory.
    """
    index = verify(source)
    _require_free(state, index)
    _require_room(state, index)
    layout = Layout(state)
    existed = state.exists()
    placed: list[Path] = []
    layout.make()
    held = lock(layout.state / "run" / "lock")
    staging = state / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in (staging, staging / "keys", staging / "fused"):
            folder.mkdir(mode=0o700)
        _unpack(source, index, staging)
        _check(staging, layout, index)
        with closing(Journal.create(staging / "journal.sqlite3")) as journal, journal.transaction():
            set_mark(journal, Mark(f"it was restored from a backup of {index.written}"))
            last_words.forget(journal)
        names = sorted(index.files.keys() | {"journal.sqlite3"}, key=lambda n: (n == "node.toml", n))
        for name in names:  # node.toml last: whoever finds it finds everything else
            with durable.passing(Step.RESTORE_PLACE):
                durable.rename(staging / name, state / name)
                placed.append(state / name)
                durable.sync_folder((state / name).parent)
        shutil.rmtree(staging)
    except BaseException:
        for path in reversed(placed):
            path.unlink(missing_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        if not existed:
            shutil.rmtree(state, ignore_errors=True)
        raise
    finally:
        held.close()
    return _summary(source, index)


def verify(source: Path) -> Index:
    """The index of a backup all of whose files have the sha256 that it names.

    Raises:
        LocalStateError: see `restore`.
    """
    with _opened(source) as file:
        index = _read_index(source, file)
        seen = set()
        for name, content in _members(source, file, index):
            if _measured(content) != index.files[name]:
                raise _damaged(source, f"{name} has not the sha256 that {INDEX} names")
            seen.add(name)
        if missing := index.files.keys() - seen:
            raise _damaged(source, f"{', '.join(sorted(missing))} is missing")
    return index


def _unpack(source: Path, index: Index, folder: Path) -> None:
    with _opened(source) as tar:
        _read_index(source, tar)
        for name, content in _members(source, tar, index):
            with durable.replacing(folder / name, Step.RESTORE_UNPACK, mode=0o600) as file:
                if _measured(_copied(content, file)) != index.files[name]:
                    raise _damaged(source, f"{name} changed while it was read")


def _copied(blocks: Iterable[bytes], file: IO[bytes]) -> Iterator[bytes]:
    for block in blocks:
        file.write(block)
        yield block


def _check(staging: Path, layout: Layout, index: Index) -> None:
    """Do the parts belong together? Else a daemon would find out later."""
    node = toml_file.read_toml(staging / "node.toml", NodeConfig)
    if node.name != index.node:
        raise ConfigError(f"the backup is of {index.node}, its node.toml of {node.name}", remedy=MIXED)
    key = staging / KEY if index.has_key else layout.key
    if (staging / "federation.toml").exists() and key.exists():
        federation = toml_file.read_toml(staging / "federation.toml", Federation)
        keyring.require_mine(keyring.load(staging, federation), node.name, identity.load(key).public)
    if (staging / "journal.sqlite3").exists():
        with closing(Journal.read_only(staging / "journal.sqlite3")) as journal:
            saved = journal.state()
        if saved is not None and saved["me"] != node.name:
            me = escaped(str(saved["me"]), 80)
            raise ConfigError(f"the backup's journal is of {me}, its node.toml of {node.name}", remedy=MIXED)


def _require_free(state: Path, index: Index) -> None:
    """Nothing but folders, keys that the backup leaves out, what a restore left that was cut short, and what a file
    system keeps for itself.
    """
    unfinished = (state / STAGING).exists() and not (state / "node.toml").exists()

    def expected(path: Path) -> bool:
        name = path.relative_to(state).as_posix()
        if (
            name == "run/lock"
            or name.startswith("lost+found/")
            or (not index.has_key and name in (KEY, NEXT) and name not in index.files)
        ):
            return True
        return unfinished and (name.startswith(f"{STAGING}/") or _NAME.fullmatch(name) is not None)

    lying = (path for path in state.rglob("*") if (path.is_symlink() or not path.is_dir()) and not expected(path))
    found = [escaped(path.relative_to(state).as_posix(), 80) for path in itertools.islice(lying, FOUND_SHOWN + 1)]
    if found:
        shown = ", ".join(found[:FOUND_SHOWN]) + (", ..." if len(found) > FOUND_SHOWN else "")
        what = "holds a node already" if (state / "node.toml").exists() else "is not empty"
        raise UsageError(
            f"{state} {what} ({shown}); nothing was changed",
            remedy="give an empty or new directory with --state, or move the old one away first",
        )


def _require_room(state: Path, index: Index) -> None:
    there = next(folder for folder in (state, *state.parents) if folder.exists())
    need, free = sum(m.bytes for m in index.files.values()), shutil.disk_usage(there).free
    if need > free:
        raise LocalStateError(
            f"the backup holds {size(need)}, {there} has room for {size(free)}; nothing was restored",
            remedy="make room there, or give another directory with --state",
        )


def _read_index(source: Path, file: IO[bytes]) -> Index:
    """The first member.

    Raises:
        LocalStateError: it is none of ours, or not as we write it.
    """
    first = _next_member(file)
    if first is None or first.name != INDEX or first.size > INDEX_MAX_BYTES:
        raise LocalStateError(f"{source} is no backup of hsl-node", remedy="give a file that `hsl-node backup` wrote")
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
        what = error["msg"].removeprefix("Value error, ")
        raise _damaged(source, f"{INDEX}: {where}{': ' if where else ''}{escaped(what)}") from exc
    except (ValueError, RecursionError) as exc:
        raise _damaged(source, f"its {INDEX} cannot be read") from exc


def _members(source: Path, file: IO[bytes], index: Index) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Each further member with its content, which is to be read before the next one.

    Raises:
        LocalStateError: one that the index does not name, or twice, or of another size.
    """
    left = dict(index.files)
    while member := _next_member(file):
        measured = left.pop(member.name, None)
        if measured is None or member.size != measured.bytes:
            raise _damaged(source, f"{escaped(member.name, 80)} is not as {INDEX} says")
        yield member.name, _content(file, member)


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
        raise UsageError(f"there is no file {source}", remedy="name the file that `hsl-node backup` wrote") from exc
    except (tarfile.TarError, EOFError) as exc:
        raise _damaged(source, str(exc)) from exc


def _damaged(source: Path, what: str) -> LocalStateError:
    return LocalStateError(
        f"{source} is damaged or no backup of hsl-node: {what}; nothing was restored",
        remedy="take another copy of it, or an older backup: the peers have what came later",
    )


def _summary(path: Path, index: Index, left_out: tuple[str, ...] = ()) -> Summary:
    federation = index.federation[:8] if index.federation else None
    total = sum(m.bytes for m in index.files.values())
    return Summary(path, index.node, federation, tuple(index.files), total, index.has_key, index.written, left_out)
