"""`hsl-node backup` and `restore`: what cannot be made anew, in one file; works beside a running daemon.

The journal is copied as of one moment. Checkpoints are left out, as the peers keep what was published, but for those of
which a method makes a fused model that is kept. A restored node asks its peers what it has signed since
(`node/heal/recovery.py`), so an old backup does no harm.
"""

from __future__ import annotations

import errno
import io
import itertools
import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hsl_node import __version__
from hsl_node.admin import archive
from hsl_node.admin.archive import KEY, NEXT, AnchorPlace, Index
from hsl_node.errors import ConfigError, LocalStateError, UsageError, escaped
from hsl_node.federation import config, identity, keyring, node_toml, toml_file
from hsl_node.federation.config import Federation
from hsl_node.federation.methods import Need
from hsl_node.federation.names import Digest, Peer
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.host.files import require_new
from hsl_node.host.hints import addressed
from hsl_node.host.layout import Layout
from hsl_node.host.units import size
from hsl_node.node.heal.mark import Mark, set_mark
from hsl_node.status import last_words
from hsl_node.sync.store import models
from hsl_node.sync.store.exchange import left_by
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import lock
from hsl_node.weights.whole import holds

FOUND_SHOWN = 5  # of what lies where a node is to be restored
MIXED = "its files are of two nodes: take another copy of it, or an older backup"


# ------------------------------------------------------------------ backup


def backup(state: Path, target: Path, *, with_key: bool = True) -> tuple[Index, tuple[str, ...]]:
    """Write `target`, mode 0600, whole or not at all. Also gives what a restore will have to get elsewhere, and where.

    Raises:
        UsageError: it exists.
        LocalStateError: something cannot be read, or the disk is full.
    """
    require_new(target)
    try:
        return _backup(state, target, with_key=with_key)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise LocalStateError(
            f"{target} could not be written: {exc.strerror}; the backup is not made",
            remedy="make room in that folder, or name another; the node itself goes on",
        ) from exc


def _backup(state: Path, target: Path, *, with_key: bool) -> tuple[Index, tuple[str, ...]]:
    layout, node = Layout(state), node_toml.load_node(state)
    left_out: list[str] = []
    with ExitStack() as stack:
        sources: dict[str, io.BufferedReader] = {}

        def add(name: str, path: Path) -> bool:
            with suppress(FileNotFoundError):
                sources[name] = stack.enter_context(open(path, "rb"))  # held open: it may be pruned meanwhile
                return True
            return False

        for path in (layout.node_toml, layout.federation_toml, layout.keyring_toml, layout.splits):
            add(path.name, path)
        if with_key:
            add(NEXT, state / NEXT)  # before the key: a `--finish` in between leaves it twice in here, not out
            if not add(KEY, layout.key):
                left_out.append(f"the private key: it is not at {layout.key}")
        needed: list[models.Model] = []
        sets: dict[Path, Digest] = {}
        if layout.journal.exists():
            with TemporaryDirectory(dir=target.parent, prefix=".hsl-node-backup-") as folder:
                copy = Path(folder) / layout.journal.name
                with Journal.read_only(layout.journal) as journal:
                    journal.copy(copy)
                with Journal.read_only(copy) as journal:
                    needed = _models_needed(journal)
                    sets = _sets_needed(journal, layout, Peer(node.name), needed)
                add(copy.name, copy)  # held open, and gone: whoever is killed from here on leaves nothing
        for model in needed:
            name, harm = model.path(Layout(Path())).as_posix(), models.harm_of(layout, model)
            if harm and harm.how == "unreadable":
                raise archive.unreadable(name, "it is on a failing disk")
            if harm or not add(name, model.path(layout)):
                harm = harm or models.Harm(model, "gone")
                left_out.append(f"{harm.text(layout)}. What to do: {addressed(harm.fix(layout), layout.state)}")
        for path, sha256 in sets.items():
            if not holds(path, sha256) or not add(path.relative_to(state).as_posix(), path):
                left_out.append(
                    f"{path.relative_to(state)}, of which the method makes a fused model: it is lost or altered"
                )
        if not add(layout.anchor.name, layout.anchor) and node.anchor is not None:
            left_out.append(f"the anchor set {node.anchor}")
        index = _index(state, node, sources)
        with durable.replacing(target, Step.BACKUP_WRITE, mode=0o600, once=True) as file:
            archive.write(file, index, sources)
    return index, tuple(left_out)


def _models_needed(journal: Journal) -> list[models.Model]:
    """The last fused model, the own one of its round and that of the round which is exchanged now, and the best."""
    state, found = journal.state(), {model.code: model for model in models.models(journal)}
    now = state["round"] if state else 0
    own = journal.own_digests()
    last = [models.Model("fused", r, sha256, "the last one") for r, sha256 in journal.fused_digests([now - 1]).items()]
    last += [models.Model("own", r, own[r], "what this node sent last") for r in (now - 1, now) if r in own]
    found = {model.code: model for model in last if model.round > 0} | found
    return sorted(found.values(), key=lambda model: (model.round, model.kind))


def _sets_needed(journal: Journal, layout: Layout, me: Peer, needed: Iterable[models.Model]) -> dict[Path, Digest]:
    """Everybody's checkpoints of the fused models' rounds, where the method reads them: path -> sha256."""
    if not layout.federation_toml.exists() or Need.FULL_SET not in config.load_federation(layout.state).plan.card.needs:
        return {}
    rounds = sorted({model.round for model in needed if model.kind != "own"})
    return dict(found for round in rounds for found in left_by(journal, layout, me, round).full_set.values())


def _index(state: Path, node: NodeConfig, sources: dict[str, io.BufferedReader]) -> Index:
    federation = config.load_federation(state) if Layout(state).federation_toml.exists() else None
    anchor = federation.anchor.fingerprint if federation and federation.anchor else None
    return Index(
        hsl_node=__version__,
        node=node.name,
        federation=federation.digest if federation else None,
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        anchor=AnchorPlace(path=str(node.anchor or Layout(state).anchor), fingerprint=anchor) if anchor else None,
        has_key=KEY in sources,
        files={name: archive.measured_file(name, source) for name, source in sources.items()},
    )


# ------------------------------------------------------------------ restore


def restore(state: Path, source: Path) -> Index:
    """Make a state directory from a backup; checked in a folder beside before any of it counts, and marked as restored.

    Raises:
        UsageError: something lies in the state directory already.
        LocalStateError: the file is damaged, of a newer hsl-node, or no backup.
        AlreadyRunning: a daemon holds the state directory.
    """
    index = archive.read_index(source)
    _require_free(state, index)
    _require_room(state, index)
    layout = Layout(state)
    existed = state.exists()
    placed: list[Path] = []
    layout.make()
    held = lock(layout.lock)
    staging = layout.restoring
    inside = Layout(staging)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in (staging, inside.keys, inside.fused_folder, inside.trainer):
            folder.mkdir(mode=0o700)
        archive.unpack(source, staging)
        _check(inside, layout, index)
        with Journal.create(inside.journal) as journal, journal.transaction():
            set_mark(journal, Mark(f"it was restored from a backup of {index.written}"))
            last_words.forget(journal)
        names = sorted(index.files.keys() | {layout.journal.name}, key=lambda n: (n == layout.node_toml.name, n))
        for name in names:  # node.toml last: whoever finds it finds everything else
            with durable.passing(Step.RESTORE_PLACE):
                (state / name).parent.mkdir(mode=0o700, exist_ok=True)
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
    return index


def _check(staging: Layout, layout: Layout, index: Index) -> None:
    """Do the parts belong together? Else a daemon would find out later."""
    node = toml_file.read_toml(staging.node_toml, NodeConfig)
    if node.name != index.node:
        raise ConfigError(f"the backup is of {index.node}, its node.toml of {node.name}", remedy=MIXED)
    key = staging.key if index.has_key else layout.key
    if staging.federation_toml.exists() and key.exists():
        federation = toml_file.read_toml(staging.federation_toml, Federation)
        keyring.require_mine(keyring.load(staging.state, federation), node.name, identity.load(key).public)
    if staging.journal.exists():
        with Journal.read_only(staging.journal) as journal:
            saved = journal.state()
        if saved is not None and saved["me"] != node.name:
            me = escaped(str(saved["me"]), 80)
            raise ConfigError(f"the backup's journal is of {me}, its node.toml of {node.name}", remedy=MIXED)


def _require_free(state: Path, index: Index) -> None:
    """Nothing but folders, keys that the backup leaves out, what a restore left that was cut short, and what a file
    system keeps for itself.
    """
    layout = Layout(state)
    unfinished = layout.restoring.exists() and not layout.node_toml.exists()

    def expected(path: Path) -> bool:
        name = path.relative_to(state).as_posix()
        brought_by_hand = {KEY, NEXT} - index.files.keys() if not index.has_key else ()
        if path == layout.lock or name.startswith("lost+found/") or name in brought_by_hand:
            return True
        return unfinished and (layout.restoring in path.parents or archive.MEMBER.fullmatch(name) is not None)

    lying = (path for path in state.rglob("*") if (path.is_symlink() or not path.is_dir()) and not expected(path))
    found = [escaped(path.relative_to(state).as_posix(), 80) for path in itertools.islice(lying, FOUND_SHOWN + 1)]
    if found:
        shown = ", ".join(found[:FOUND_SHOWN]) + (", ..." if len(found) > FOUND_SHOWN else "")
        what = "holds a node already" if layout.node_toml.exists() else "is not empty"
        raise UsageError(
            f"{state} {what} ({shown}); nothing was changed",
            remedy="give an empty or new directory with --state, or move the old one away first",
        )


def _require_room(state: Path, index: Index) -> None:
    there = next(folder for folder in (state, *state.parents) if folder.exists())
    need, free = index.bytes, shutil.disk_usage(there).free
    if need > free:
        raise LocalStateError(
            f"the backup holds {size(need)}, {there} has room for {size(free)}; nothing was restored",
            remedy="make room there, or give another directory with --state",
        )
