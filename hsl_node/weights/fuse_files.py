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
    out: Path,
    progress: Callable[[float], None] | None = None,
    see: See | None = None,
    expected: Mapping[Peer, str] | None = None,
) -> Digest:
    """Fuse the full set into `out`, durably (`durable.replacing`); gives its sha256.

    The files were checked on arrival (`checkpoint_file.check_file`), and may have changed on the disk since:
    `expected` has the sha256 of each, compared in the pass that reads it. `progress` receives the share done, 0 to 1.

    Raises:
        Altered: a file is gone, or not what was expected; nothing was put into place.
    """
    digest = hashlib.sha256(schema.header)
    shares = shares_of(samples)
    with ExitStack() as stack:
        files = [stack.enter_context(_Input(p, paths[p], len(schema.header))) for p in sorted(paths)]
        target = stack.enter_context(replacing(out, Step.FUSION_WRITE))
        target.write(schema.header)
        for spec in schema.tensors:
            for start, count in spec.pieces(min(CHUNK_BYTES, READ_BYTES // len(files))):
                chunks = [f.read(spec, start, count) for f in files]
                if see:
                    see(spec, start, chunks)
                fused = RULES[rule](chunks, shares)
                del chunks  # before the next ones are read
                digest.update(fused.data)
                target.write(fused.data)
            if progress:
                progress((spec.offset + spec.bytes) / schema.file_bytes)
        if expected is not None:  # before the rename
            for file in files:
                file.require(expected[file.peer])
    return Digest(digest.hexdigest())


class _Input:
    """One checkpoint of the full set; hashed while it is read, header first, then every chunk once and in order."""

    def __init__(self, peer: Peer, path: Path, header_bytes: int) -> None:
        self.peer = peer
        self._path = path
        with self._whole():
            self._file = open(path, "rb")  # noqa: SIM115  (closed in `__exit__`)
            self._sha256 = hashlib.sha256(self._file.read(header_bytes))

    def __enter__(self) -> _Input:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, spec: TensorSpec, start: int, count: int) -> Array:
        with self._whole():
            chunk = read_chunk(self._file, spec, start, count)
        self._sha256.update(chunk.data)
        return chunk

    def require(self, sha256: str) -> None:
        if self._sha256.hexdigest() != sha256:
            raise self._altered("altered on")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """It was whole, and could be read, when it came."""
        try:
            yield
        except PeerDataError as exc:
            raise self._altered("cut short on") from exc
        except FileNotFoundError as exc:
            raise self._altered("gone from") from exc
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            raise self._altered("not readable any more on") from exc

    def _altered(self, how: str) -> Altered:
        return Altered(f"the checkpoint of {self.peer}, {self._path}, is {how} this disk since it was checked")
