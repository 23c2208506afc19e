"""Take in what a peer delivered: cheapest check first, on bytes that nobody else can change any more. Blocking.

    inbox/ of the sender          ours alone                        the node
    manifest ── read once ──────► name, owner, signature, version, federation, round, setup
    data ────── claimed ────────► size, sha256, header, finite ──► store, journal, then `answer`: receipt, manifest gone

The manifest stays in inbox/ until it is answered, so a crash at any point leaves it there and the next scan takes up
the work again, with the data it finds in inbox/, in `claimed/` or (`kept`) in the store. Data is claimed by renaming it
into a private folder; where another server writes the inbox (`foreign`) its sender may still hold the file open, so
the bytes are copied instead. Scan one sender at a time and act on the result before the next scan.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hsl_node.errors import FederationMismatch, LocalStateError, PeerDataError, escaped
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import MANIFEST_NAMESPACE, RECEIPT_NAMESPACE, Identity, verify
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import INBOX, PARTS, RECEIPTS, Digest, FileName, Kind, Peer, Round, parse_file_name
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.host.layout import Layout
from hsl_node.sync.inbox.claim import claim
from hsl_node.sync.manifest import (
    MANIFEST_MAX_BYTES,
    About,
    Manifest,
    Receipt,
    check,
    find_heading,
    parse_manifest,
    require_same_setup,
    require_same_version,
)
from hsl_node.sync.store.plain_files import is_in_motion, open_folder, open_plain, unlink
from hsl_node.weights.checkpoint_file import Schema, check_file

log = logging.getLogger(__name__)

ENTRIES_MAX = 1000  # of one inbox in one scan; an account that another server gives away may hold any number
JUNK_REPORTED_MAX = 20  # of one scan, one by one; all are removed
MANIFESTS_MAX = 64  # checked in one scan; an honest sender has two
REFUSED_MAX = 64  # refused manifests kept per sender, the newest
RECEIPTS_MAX = 4096  # per sender; an honest one has one a round, a hostile one makes us refuse without end
TEXT_MAX = 280  # of a receipt, which allows 300
PART_MAX_AGE_S = 24 * 3600.0
AGE_BELIEVED_S = 30 * 24 * 3600.0  # older, or of the future: the clock has jumped, the file has not aged


@dataclass(frozen=True)
class Arrival:
    """A checkpoint or statement that passed every check."""

    sender: Peer
    manifest: Manifest
    document: bytes  # the signed manifest, to keep
    data: Path | None  # private, verified, fsynced. None: a statement, or the data is in the store already


@dataclass(frozen=True)
class Refusal:
    """A file that failed a check."""

    sender: Peer
    name: str  # escaped: it may be anything
    error: PeerDataError | FederationMismatch
    manifest: Manifest | None = None  # where its signature held and all of it could be read
    about: About | None = None  # where its signature held: what to answer, also where the rest cannot be read
    document: bytes | None = None
    kept: Path | None = None  # the evidence: a signed manifest. Refused data is deleted, its digest is in the manifest

    @property
    def code(self) -> str:
        return self.error.code if isinstance(self.error, PeerDataError) else "setup"


@dataclass(frozen=True)
class Search:
    """What is looked for, and what it is compared with."""

    sender: Peer
    me: Peer
    homes: Path
    layout: Layout
    federation: Federation
    keyring: Keyring
    current: Round
    schema: Schema
    anchor: str | None
    foreign: bool  # another server writes the inbox
    software: str = ""
    signed: Mapping[Round, Digest] = field(default_factory=dict)
    taken: Collection[Digest] = ()
    missing: list[FileName] = field(default_factory=list)  # filled by `scan`: data whose manifest is here, alone


def scan(search: Search) -> list[Arrival | Refusal]:
    """Everything in the sender's inbox/ that is complete, checked.

    A manifest whose data is not there yet waits, and so does data without manifest. A manifest one round beyond the
    window is reported but stays: it becomes acceptable. One that differs from `signed`, the sender's manifests of the
    open rounds that are known, is refused without a look at its data (code `equivocation`). That, and a manifest of a
    past round, may be proof: it stays until it is answered. Everything else that is refused is removed.
    What comes with a manifest of `taken` is removed without a look: checking a large checkpoint costs its receiver more
    than its sender.

    Raises:
        LocalStateError: our own disk or permissions.
    """
    sender = search.sender
    assert sender != search.me
    found: list[Arrival | Refusal] = []
    with _ours(f"inbox of {sender}"), open_folder(search.homes, sender, INBOX) as inbox:
        (search.layout.claimed / sender).mkdir(mode=0o700, parents=True, exist_ok=True)
        manifests, junk = [], 0
        with os.scandir(inbox) as entries:
            files = [e.name for e in itertools.islice(entries, ENTRIES_MAX) if not e.is_dir(follow_symlinks=False)]
        for text in files:
            try:
                name = _deliverable(text, sender)
            except PeerDataError as exc:
                unlink(text, inbox)
                junk += 1
                if junk <= JUNK_REPORTED_MAX:
                    found.append(_refusal(search, escaped(text), exc))
            else:
                if name.kind is Kind.MANIFEST:
                    manifests.append(name)
        if junk > JUNK_REPORTED_MAX:
            log.warning("more files of other names removed", extra={"peer": sender, "files": junk})
        for name in sorted(manifests)[:MANIFESTS_MAX]:
            with suppress(FileNotFoundError):  # taken back by its sender, as another server may allow
                item = _take(search, name, inbox)
                if item is not None:
                    found.append(item)
    return found


def answer(
    sender: Peer,
    manifest: About,
    *,
    homes: Path,
    me: Peer,
    identity: Identity,
    accepted: bool,
    code: str,
    text: str,
) -> None:
    """Write the signed receipt, then let go of the manifest. Only after the journal knows.

    Raises:
        LocalStateError: our own disk or permissions.
    """
    receipt = Receipt(
        federation=manifest.federation,
        round=manifest.round,
        peer=sender,
        sha256=manifest.sha256,
        receiver=me,
        accepted=accepted,
        code=code,
        text=escaped(text, TEXT_MAX),
    )
    name = manifest.file_name()
    with _ours(f"receipts of {sender}"):
        with open_folder(homes, sender, RECEIPTS) as folder:
            if not accepted:
                _drop_oldest(folder, RECEIPTS_MAX)
            _write_document(folder, str(name.of(Kind.RECEIPT)), identity.sign(receipt.content(), RECEIPT_NAMESPACE))
        with (
            durable.passing(Step.RECEIVER_RELEASE),
            open_folder(homes, sender, INBOX) as inbox,
            suppress(FileNotFoundError),
        ):
            durable.disk.unlink(str(name), folder=inbox)


def collect_parts(sender: Peer, *, homes: Path, claimed: Path, current: Round, now: float) -> int:
    """Delete what nobody will finish: old parts, old data without manifest. `now` is wall clock. Gives the count.

    What belongs to the current or a later round stays, however long its line is down: it may still be finished.
    """
    removed = 0
    with _ours(f"home of {sender}"):
        with open_folder(homes, sender, INBOX) as inbox:
            present = set(os.listdir(inbox))
            removed += _remove_old((n for n in present if _is_orphan(n, present, current)), inbox, now)
        with open_folder(homes, sender, PARTS) as parts:
            removed += _remove_old((n for n in os.listdir(parts) if not _is_wanted(n, current)), parts, now)
        with open_folder(homes, sender, RECEIPTS) as receipts:
            torn = [n for n in os.listdir(receipts) if n.startswith(".")]  # a kill left them half written
            removed += _remove_old(torn, receipts, now)
        if (claimed / sender).is_dir():
            with open_folder(claimed, sender, ".") as private:
                left = [n for n in os.listdir(private) if _is_orphan(n, present, current + 2)]
                removed += _remove_old(left, private, now)
    if removed:
        log.info("old parts deleted", extra={"peer": sender, "files": removed})
    return removed


# ---------------------------------------------------------------- one manifest and its data


def _take(search: Search, name: FileName, inbox: int) -> Arrival | Refusal | None:
    """Check one manifest and its data. None: the data is not there yet."""
    document: bytes | None = None
    about: About | None = None
    manifest: Manifest | None = None
    data: Path | None = None
    if search.foreign and is_in_motion(os.stat(str(name), dir_fd=inbox, follow_symlinks=False)):
        return None
    try:
        document = _read_document(inbox, name)
        line = verify(document, search.keyring.keys(search.sender), MANIFEST_NAMESPACE)
        heading = find_heading(line)
        if heading and heading.file_name() == name and heading.federation == search.federation.digest:
            about = heading
            require_same_version(heading, search.me)
        about = manifest = parse_manifest(line)
        if _contradicts(search, manifest, name):
            raise PeerDataError("another manifest of this round was signed before", code="equivocation")
        check(manifest, name, search.federation, search.sender, search.current)
        require_same_setup(manifest, anchor=search.anchor, schema=search.schema.digest, software=search.software)
        data_name = name.of(Kind.DATA)
        if manifest.digest in search.taken:
            unlink(str(data_name), inbox)
        if manifest.statement or manifest.digest in search.taken:
            return Arrival(search.sender, manifest, document, None)
        if manifest.bytes != search.schema.file_bytes:
            raise PeerDataError(
                f"announces {manifest.bytes} bytes, this model has {search.schema.file_bytes}", code="size"
            )
        target = search.layout.claimed / search.sender / str(data_name)
        if not claim(data_name, inbox, target, search.schema.file_bytes, foreign=search.foreign):
            if _is_kept(search, manifest):
                return Arrival(search.sender, manifest, document, None)
            search.missing.append(data_name)
            return None
        data = target
        check_file(data, search.schema, sha256=manifest.sha256)
        _make_durable(data)
        return Arrival(search.sender, manifest, document, data)
    except (PeerDataError, FederationMismatch) as exc:
        code = getattr(exc, "code", "")
        if manifest is not None and manifest.round == search.current + 2 and code == "round":
            return Refusal(search.sender, str(name), exc, manifest, manifest, document)
        if code != "equivocation" and not (code == "round" and manifest and 0 < manifest.round < search.current):
            unlink(str(name), inbox)
        if about is not None:  # signed, so the data is its sender's too; else it may still get a good manifest
            unlink(str(name.of(Kind.DATA)), inbox)
        if data is not None:
            data.unlink(missing_ok=True)
        return _refusal(search, str(name), exc, manifest, about, document)


def _deliverable(text: str, sender: Peer) -> FileName:
    """A name that may lie in this inbox.

    Raises:
        PeerDataError: code `name` or `owner`.
    """
    name = parse_file_name(text)
    if name.peer != sender:
        raise PeerDataError(f"{sender!r} delivered a file of {name.peer!r}", code="owner")
    if name.part or name.kind is Kind.RECEIPT:
        raise PeerDataError("not a file that is delivered", code="name")
    return name


def _read_document(folder: int, name: FileName) -> bytes:
    """The whole manifest, read once: all checks are on these bytes."""
    descriptor = open_plain(str(name), os.O_RDONLY, folder)
    with os.fdopen(descriptor, "rb") as file:
        document = file.read(MANIFEST_MAX_BYTES + 1)
    if len(document) > MANIFEST_MAX_BYTES:
        raise PeerDataError(f"manifest of more than {MANIFEST_MAX_BYTES} bytes", code="size")
    return document


def _contradicts(search: Search, manifest: Manifest, name: FileName) -> bool:
    ours = (manifest.federation, manifest.file_name()) == (search.federation.digest, name)
    return ours and search.signed.get(manifest.round, manifest.digest) != manifest.digest


def _is_kept(search: Search, manifest: Manifest) -> bool:
    """Did this checkpoint reach the store before a crash? Its bytes are checked there again, and made durable."""
    path = search.layout.inbox(manifest.round, search.sender)
    try:
        check_file(path, search.schema, sha256=manifest.sha256)
        durable.accept(path)
    except (PeerDataError, FileNotFoundError):
        return False
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        return False
    return True


# ---------------------------------------------------------------- evidence and files


def _refusal(
    search: Search,
    name: str,
    error: PeerDataError | FederationMismatch,
    manifest: Manifest | None = None,
    about: About | None = None,
    document: bytes | None = None,
) -> Refusal:
    kept = None
    if document:
        folder = search.layout.refused / search.sender
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = folder / f"{hashlib.sha256(document).hexdigest()[:32]}.manifest"  # our name, not the sender's
        durable.write(kept, document, Step.RECEIVER_REFUSED)
        with open_folder(folder.parent, search.sender, ".") as descriptor:
            _drop_oldest(descriptor, REFUSED_MAX + 1)
    return Refusal(search.sender, name, error, manifest, about, document, kept)


def _write_document(folder: int, name: str, document: bytes) -> None:
    """Atomically, durably, and readable for the account that another server gives the sender."""
    with durable.replacing(name, Step.RECEIVER_RECEIPT, folder=folder, shared=True) as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(document)


def _drop_oldest(folder: int, most: int) -> None:
    """Leave at most `most` - 1 files, the newest."""
    names = os.listdir(folder)
    if len(names) < most:
        return
    age = {n: os.stat(n, dir_fd=folder, follow_symlinks=False).st_mtime_ns for n in names}
    for name in sorted(names, key=lambda n: age[n])[: len(names) - most + 1]:
        unlink(name, folder)


def _is_orphan(text: str, present: Iterable[str], current: Round) -> bool:
    try:
        name = parse_file_name(text)
    except PeerDataError:
        return False
    return name.kind is Kind.DATA and name.round < current and str(name.of(Kind.MANIFEST)) not in present


def _is_wanted(part: str, current: Round) -> bool:
    try:
        return current <= parse_file_name(part).round <= current + 1
    except PeerDataError:
        return False


def _remove_old(names: Iterable[str], folder: int, now: float) -> int:
    removed = 0
    for name in names:
        with suppress(FileNotFoundError):
            age_s = now - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime
            if PART_MAX_AGE_S < age_s <= AGE_BELIEVED_S:
                removed += unlink(name, folder)
            elif not -PART_MAX_AGE_S <= age_s <= AGE_BELIEVED_S:  # its day begins anew, by the new clock
                with suppress(PermissionError):  # another server's account owns it: it stays until the clock is right
                    os.utime(name, (now, now), dir_fd=folder, follow_symlinks=False)
    return removed


def _make_durable(path: Path) -> None:
    with durable.passing(Step.RECEIVER_VERIFIED), open(path, "rb") as file:
        durable.sync(file.fileno(), path.name)


@contextmanager
def _ours(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise LocalStateError(
            f"{what}: {exc.strerror or exc}",
            remedy="check disk, folders and permissions (`hsl-node inbox provision` shows those of an existing server)",
        ) from exc
