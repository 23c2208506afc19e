"""Backup and restore: one tar file with what cannot be made anew. Works beside a running daemon.

    backup.json          first: format, versions, sha256 and size of every file that follows
    node.toml federation.toml keyring.toml splits.json keys/node_ed25519 anchor.safetensors
    journal.sqlite3 fused/r000012.safetensors

The journal is copied as of one moment. The outbox is left out: the peers keep what was published. A restored node asks
them what it has signed since (`recovery.py`), so an old backup does no harm.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hsl_node import __version__, config, identity, toml_file
from hsl_node.config import Federation, NodeConfig
from hsl_node.errors import ConfigError, LocalStateError, UsageError
from hsl_node.recover_mark import Mark, set_mark
from hsl_node.sync import durable, keyring
from hsl_node.sync.durable import Step
from hsl_node.sync.journal import Journal
from hsl_node.sync.store import Layout, lock

FORMAT, VERSION = "hsl-node backup", 1
INDEX = "backup.json"
INDEX_MAX_BYTES = 1024 * 1024
KEY = "keys/node_ed25519"
BLOCK_BYTES = 1024 * 1024
STAGING = ".restore"  # in the state directory: a restore that was cut short, to be made again
_NAME = re.compile(
    r"node\.toml|federation\.toml|keyring\.toml|splits\.json|anchor\.safetensors|journal\.sqlite3|keys/node_ed25519"
    r"|fused/r[0-9]{6}\.safetensors",
    re.ASCII,
)


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
    layout, node = Layout(state), config.load_node(state)
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".hsl-node-backup-") as folder, ExitStack() as stack:
        sources: dict[str, IO[bytes]] = {}

        def add(name: str, path: Path) -> bool:
            with suppress(FileNotFoundError):
                sources[name] = stack.enter_context(open(path, "rb"))  # held open: it may be pruned meanwhile
                return True
            return False

        for name in ("node.toml", "federation.toml", "keyring.toml", "splits.json"):
            add(name, state / name)
        if with_key and not add(KEY, layout.key):
            left_out.append(f"the private key: it is not at {layout.key}")
        fused = []
        if layout.journal.exists():
            copy = Path(folder) / "journal.sqlite3"
            fused = _copy_journal(layout.journal, copy)
            add("journal.sqlite3", copy)
        for round in fused:
            name = layout.fused(round).relative_to(state).as_posix()
            if not add(name, layout.fused(round)):
                left_out.append(f"the fused model of round {round}: the peers have it")
        if not add("anchor.safetensors", layout.anchor) and node.anchor is not None:
            left_out.append(f"the anchor set {node.anchor}")
        index = _index(state, node, sources, with_key)
        with (
            durable.replacing(target, Step.BACKUP_WRITE, mode=0o600, once=True) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            _add_member(tar, INDEX, io.BytesIO(json.dumps(index, indent=2).encode()))
            for name, source in sources.items():
                _add_member(tar, name, source)
    return _summary(target, index, tuple(left_out))


def _copy_journal(source: Path, target: Path) -> list[int]:
    """A copy as of one moment; gives the rounds whose fused models it needs: the last one and the best."""
    uri = f"{source.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as theirs, closing(sqlite3.connect(target)) as ours:
        theirs.backup(ours)
        ours.execute("PRAGMA journal_mode = DELETE")  # one file, without a write-ahead log beside it
    with closing(Journal.read_only(target)) as journal:
        state, best = journal.state(), journal.best_fused()
        rounds = {state["round"] - 1} if state else set()
        return sorted(r for r in rounds | ({best[0]} if best else set()) if r > 0)


def _index(state: Path, node: NodeConfig, sources: dict[str, IO[bytes]], with_key: bool) -> dict[str, Any]:
    federation = config.load_federation(state) if (state / "federation.toml").exists() else None
    anchor = federation.anchor.fingerprint if federation and federation.anchor else None
    return {
        "format": FORMAT,
        "version": VERSION,
        "hsl_node": __version__,
        "node": node.name,
        "federation": federation.digest if federation else None,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "anchor": {"path": str(node.anchor or Layout(state).anchor), "fingerprint": anchor} if anchor else None,
        "has_key": with_key and KEY in sources,
        "files": {name: _measured(source) for name, source in sources.items()},
    }


def _measured(source: IO[bytes]) -> dict[str, Any]:
    source.seek(0)
    digest, size = hashlib.sha256(), 0
    while block := source.read(BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    return {"sha256": digest.hexdigest(), "bytes": size}


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
        UsageError: a node lives in the state directory already.
        LocalStateError: the file is damaged, of a newer hsl-node, or no backup.
        AlreadyRunning: a daemon holds the state directory.
    """
    index = verify(source)
    _require_free(state, index)
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
            set_mark(journal, Mark(f"it was restored from a backup of {index['written']}"))
        names = sorted(index["files"].keys() | {"journal.sqlite3"}, key=lambda n: (n == "node.toml", n))
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


def verify(source: Path) -> dict[str, Any]:
    """The index of a backup all of whose files have the sha256 that it names.

    Raises:
        LocalStateError: see `restore`.
    """
    with _opened(source) as tar:
        index = _read_index(source, tar)
        seen = set()
        for member, content in _members(source, tar, index):
            if _measured(content) != index["files"][member]:
                raise _damaged(source, f"{member} has not the sha256 that {INDEX} names")
            seen.add(member)
        if missing := index["files"].keys() - seen:
            raise _damaged(source, f"{', '.join(sorted(missing))} is missing")
    return index


def _unpack(source: Path, index: dict[str, Any], folder: Path) -> None:
    with _opened(source) as tar:
        _read_index(source, tar)
        for name, content in _members(source, tar, index):
            with durable.replacing(folder / name, Step.RESTORE_UNPACK, mode=0o600) as file:
                shutil.copyfileobj(content, file, BLOCK_BYTES)
                size = file.tell()
            if size != index["files"][name]["bytes"]:
                raise _damaged(source, f"{name} changed while it was read")


def _check(staging: Path, layout: Layout, index: dict[str, Any]) -> None:
    """Do the parts belong together? Else a daemon would find out later."""
    node = toml_file.read_toml(staging / "node.toml", NodeConfig)
    key = staging / KEY if KEY in index["files"] else layout.key
    if (staging / "federation.toml").exists() and key.exists():
        federation = toml_file.read_toml(staging / "federation.toml", Federation)
        keyring.require_mine(keyring.load(staging, federation), node.name, identity.load(key).public)
    if (staging / "journal.sqlite3").exists():
        with closing(Journal.read_only(staging / "journal.sqlite3")) as journal:
            saved = journal.state()
        if saved is not None and saved["me"] != node.name:
            raise ConfigError(f"the backup's journal is of {saved['me']}, its node.toml of {node.name}")


def _require_free(state: Path, index: dict[str, Any]) -> None:
    unfinished = (state / STAGING).exists() and not (state / "node.toml").exists()
    kept = [n for n in ("node.toml", "federation.toml", "journal.sqlite3", "splits.json") if (state / n).exists()]
    if KEY in index["files"] and (state / KEY).exists():
        kept.append(KEY)
    if kept and not unfinished:
        raise UsageError(
            f"{state} holds a node already ({', '.join(kept)}); nothing was changed",
            remedy="give an empty or new directory with --state, or move the old one away first",
        )


def _read_index(source: Path, tar: tarfile.TarFile) -> dict[str, Any]:
    first = tar.next()
    content = tar.extractfile(first) if first and first.isreg() and first.name == INDEX else None
    if first is None or content is None or first.size > INDEX_MAX_BYTES:
        raise LocalStateError(f"{source} is no backup of hsl-node", remedy="give a file that `hsl-node backup` wrote")
    try:
        index: dict[str, Any] = json.loads(content.read())
        if index["format"] != FORMAT:
            raise ValueError(index["format"])
        if index["version"] > VERSION:
            raise LocalStateError(
                f"{source} was written by a newer hsl-node ({index['hsl_node']}; here {__version__})",
                remedy="install that version, then restore",
            )
        files = {str(name): (str(f["sha256"]), int(f["bytes"])) for name, f in index["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _damaged(source, f"its {INDEX} cannot be read") from exc
    if wrong := [name for name in files if not _NAME.fullmatch(name)]:
        raise _damaged(source, f"it names a file that no backup holds: {wrong[0][:80]!r}")
    if "node.toml" not in files:
        raise _damaged(source, "it holds no node.toml")
    return index


def _members(source: Path, tar: tarfile.TarFile, index: dict[str, Any]) -> Iterator[tuple[str, IO[bytes]]]:
    try:
        while member := tar.next():
            known = index["files"].get(member.name)
            content = tar.extractfile(member) if member.isreg() else None
            if known is None or content is None or member.size != known["bytes"]:
                raise _damaged(source, f"{member.name[:80]!r} is not as {INDEX} says")
            yield member.name, content
    except (tarfile.TarError, EOFError) as exc:
        raise _damaged(source, str(exc)) from exc


@contextmanager
def _opened(source: Path) -> Iterator[tarfile.TarFile]:
    try:
        with open(source, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
    except FileNotFoundError as exc:
        raise UsageError(f"there is no file {source}", remedy="name the file that `hsl-node backup` wrote") from exc
    except (tarfile.TarError, EOFError) as exc:
        raise _damaged(source, str(exc) or "it is no tar file") from exc


def _damaged(source: Path, what: str) -> LocalStateError:
    return LocalStateError(
        f"{source} is damaged or no backup of hsl-node: {what}; nothing was restored",
        remedy="take another copy of it, or an older backup: the peers have what came later",
    )


def _summary(path: Path, index: dict[str, Any], left_out: tuple[str, ...] = ()) -> Summary:
    files = index["files"]
    federation = index["federation"][:8] if index["federation"] else None
    return Summary(
        path, index["node"], federation, tuple(files), sum(f["bytes"] for f in files.values()), index["has_key"],
        index["written"], left_out,
    )  # fmt: skip
