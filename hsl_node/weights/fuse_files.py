"""Fuse checkpoint files chunk by chunk: in a memory that grows with nothing."""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from hsl_node.errors import Altered, PeerDataError
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.names import Digest, Peer
from hsl_node.host.durable import Step, replacing
from hsl_node.weights.active_sets import Table
from hsl_node.weights.checkpoint_file import CHUNK_BYTES, MAGNITUDE_MAX, Array, Schema, TensorSpec, read_chunk
from hsl_node.weights.combinations import BLOCK, COMBINATIONS, Combination, FullSet, Products, combine, stands_still
from hsl_node.weights.fusion import RULES, shares_of, weighted_mean

log = logging.getLogger(__name__)

# (tensor, first element, that chunk of every peer in sorted order): one who watches, and changes nothing
See = Callable[[TensorSpec, int, Sequence[Array]], None]
Chunks = Iterator[tuple[TensorSpec, int, list[Array]]]  # the same, of every file of a fusion: the base comes last

READ_BYTES = 4 * 1024 * 1024  # of all peers together: with 4 peers a whole chunk each, with 64 peers 64 KiB
BLOCK_BYTES = 8 * BLOCK  # of the widest float: chunks begin where blocks of products do, whatever the number of peers
BASE = "the fused model that this round began with"


def fuse_files(
    rule: str,
    paths: Mapping[Peer, Path],
    samples: Mapping[Peer, int],
    schema: Schema,
    out: Path | None,
    progress: Callable[[float], None] | None = None,
    see: See | None = None,
    expected: Mapping[Peer, str] | None = None,
    *,
    said: Mapping[Peer, Mapping[str, float]] | None = None,
    base: Path | None = None,
    base_sha256: str | None = None,
    clip: float = 0.0,
) -> Digest:
    """Fuse the full set into `out`, durably (`durable.replacing`); gives its sha256. None: for the sha256 alone.

    The files were checked on arrival (`checkpoint_file.check_file`), and may have changed on the disk since:
    `expected` has the sha256 of each, compared in the pass that reads it. `progress` receives the share done, 0 to 1.
    What only some rules read (`FUSION_RULES`): `said`, the numbers that each peer signed; `base`, the fused model that
    the round began with; `clip`, the furthest that FedCOME moves a number (0: as far as it will).

    Raises:
        Altered: a file is gone, or not what was expected; nothing was put into place.
    """
    peers, shares = sorted(paths), shares_of(samples)
    files = {_of(peer): paths[peer] for peer in peers}
    right = {_of(peer): sha256 for peer, sha256 in (expected or {}).items()}
    if FUSION_RULES[rule].needs_base:
        assert base is not None, f"{rule} counts from the fused model that the round began with"
        files[BASE] = base
        right |= {BASE: base_sha256} if base_sha256 else {}
    tell = progress or (lambda share: None)
    combination, coefficients = COMBINATIONS.get(rule), list[float]()
    first = 0.5 if combination is not None and combination.products else 0.0  # of the work: one of two passes
    if combination is not None:
        full = FullSet([samples[p] for p in peers], [(said or {}).get(p, {}) for p in peers])
        if combination.products:
            once = passed(files, schema, right, lambda share: tell(first * share))
            full = replace(full, products=_products(once, combination, len(peers)))
        coefficients = [*combination.coefficients(full)]
        by_peer = dict(zip(peers, coefficients, strict=True))
        log.info("coefficients", extra={"rule": rule, "coefficients": by_peer})
        if full.products and stands_still(coefficients, full.products):
            log.warning("the updates cancel each other out: the fused model stays as it was", extra={"rule": rule})
    digest = hashlib.sha256(schema.header)
    with replacing(out, Step.FUSION_WRITE) if out else nullcontext() as target:
        if target:
            target.write(schema.header)
        for spec, start, chunks in passed(files, schema, right, lambda share: tell(first + (1 - first) * share)):
            theirs, before = chunks[: len(peers)], chunks[-1] if BASE in files else None
            if see:
                see(spec, start, theirs)
            if combination is not None and combination.takes(spec.name, theirs[0].dtype.kind):
                fused = combine(theirs, coefficients, before, clip, MAGNITUDE_MAX)  # or no peer would take it
            else:  # what takes no coefficients takes the shares
                fused = RULES.get(rule, weighted_mean)(theirs, shares)
            del chunks, theirs, before
            digest.update(fused.data)
            if target:
                target.write(fused.data)
    return Digest(digest.hexdigest())


def _products(chunks_of_all: Chunks, combination: Combination, peers: int) -> Table:
    products = Products(peers)
    for spec, _, chunks in chunks_of_all:
        if combination.takes(spec.name, chunks[0].dtype.kind):
            products.see(chunks[-1], chunks[:-1])
        del chunks  # before the next ones are read
    return products.table


def passed(
    files: Mapping[str, Path], schema: Schema, right: Mapping[str, str], progress: Callable[[float], None]
) -> Chunks:
    """(tensor, first element, that chunk of every file), each once and in order. Names of files are for errors.

    Raises:
        Altered: a file is gone, or, after the last chunk, its sha256 is not the `right` one.
    """
    with ExitStack() as stack:
        opened, read = {}, {}
        for what, path in files.items():
            with _whole(what, path):
                opened[what] = stack.enter_context(open(path, "rb"))
                read[what] = hashlib.sha256(opened[what].read(len(schema.header)))

        def chunk_of(what: str, spec: TensorSpec, start: int, count: int) -> Array:
            with _whole(what, files[what]):
                chunk = read_chunk(opened[what], spec, start, count)
            read[what].update(chunk.data)  # every chunk once and in order: in the end the sha256 of the file
            return chunk

        blocks = max(1, min(CHUNK_BYTES, READ_BYTES // len(files)) // BLOCK_BYTES)
        for spec in schema.tensors:
            for start, count in spec.pieces(blocks * BLOCK_BYTES):
                yield spec, start, [chunk_of(what, spec, start, count) for what in files]
            progress((spec.offset + spec.bytes) / schema.file_bytes)
        for what, path in files.items():
            if what in right and read[what].hexdigest() != right[what]:
                raise _altered(what, path, "altered on")


@contextmanager
def _whole(what: str, path: Path) -> Iterator[None]:
    """It was whole, and could be read, when it came."""
    try:
        yield
    except PeerDataError as exc:
        raise _altered(what, path, "cut short on") from exc
    except FileNotFoundError as exc:
        raise _altered(what, path, "gone from") from exc
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        raise _altered(what, path, "not readable any more on") from exc


def _of(peer: Peer) -> str:
    return f"the checkpoint of {peer}"


def _altered(what: str, path: Path, how: str) -> Altered:
    return Altered(f"{what}, {path}, is {how} this disk since it was checked")
