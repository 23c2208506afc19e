"""Fuse checkpoint files chunk by chunk: in a memory that grows with nothing."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hsl_node.errors import Altered, PeerDataError
from hsl_node.federation.names import Digest, Peer
from hsl_node.host.durable import Step, replacing
from hsl_node.weights.checkpoint_file import CHUNK_BYTES, Array, Schema, TensorSpec, read_chunk
from hsl_node.weights.fusion import RULES, shares_of

# (tensor, first element, that chunk of every peer in sorted order): one who watches, and changes nothing
See = Callable[[TensorSpec, int, Sequence[Array]], None]

READ_BYTES = 4 * 1024 * 1024  # of all peers together: with 4 peers a whole chunk each, with 64 peers 64 KiB


def fuse_files(
    rule: str,
    paths: Mapping[Peer, Path],
    samples: Mapping[Peer, int],
    schema: Schema,
    out: Path | None,
    progress: Callable[[float], None] | None = None,
    see: See | None = None,
    expected: Mapping[Peer, str] | None = None,
) -> Digest:
    """Fuse the full set into `out`, durably (`durable.replacing`); gives its sha256. None: for the sha256 alone.

    The files were checked on arrival (`checkpoint_file.check_file`), and may have changed on the disk since:
    `expected` has the sha256 of each, compared in the pass that reads it. `progress` receives the share done, 0 to 1.

    Raises:
        Altered: a file is gone, or not what was expected; nothing was put into place.
    """
    digest = hashlib.sha256(schema.header)
    shares = shares_of(samples)
    peers = sorted(paths)
    with ExitStack() as stack:
        files, read = {}, {}
        for peer in peers:
            with _whole(peer, paths[peer]):
                files[peer] = stack.enter_context(open(paths[peer], "rb"))
                read[peer] = hashlib.sha256(files[peer].read(len(schema.header)))

        def chunk_of(peer: Peer, spec: TensorSpec, start: int, count: int) -> Array:
            with _whole(peer, paths[peer]):
                chunk = read_chunk(files[peer], spec, start, count)
            read[peer].update(chunk.data)  # every chunk once and in order: in the end the sha256 of the file
            return chunk

        target = stack.enter_context(replacing(out, Step.FUSION_WRITE)) if out else None
        if target:
            target.write(schema.header)
        for spec in schema.tensors:
            for start, count in spec.pieces(min(CHUNK_BYTES, READ_BYTES // len(peers))):
                chunks = [chunk_of(peer, spec, start, count) for peer in peers]
                if see:
                    see(spec, start, chunks)
                fused = RULES[rule](chunks, shares)
                del chunks  # before the next ones are read
                digest.update(fused.data)
                if target:
                    target.write(fused.data)
            if progress:
                progress((spec.offset + spec.bytes) / schema.file_bytes)
        for peer in peers:  # before the rename
            if expected is not None and read[peer].hexdigest() != expected[peer]:
                raise _altered(peer, paths[peer], "altered on")
    return Digest(digest.hexdigest())


@contextmanager
def _whole(peer: Peer, path: Path) -> Iterator[None]:
    """It was whole, and could be read, when it came."""
    try:
        yield
    except PeerDataError as exc:
        raise _altered(peer, path, "cut short on") from exc
    except FileNotFoundError as exc:
        raise _altered(peer, path, "gone from") from exc
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        raise _altered(peer, path, "not readable any more on") from exc


def _altered(peer: Peer, path: Path, how: str) -> Altered:
    return Altered(f"the checkpoint of {peer}, {path}, is {how} this disk since it was checked")
