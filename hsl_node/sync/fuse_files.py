"""Fuse checkpoint files chunk by chunk: the same bytes as `fusion.fuse`, in a memory that grows with nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from hsl_node.sync.durable import Step, replacing
from hsl_node.sync.fusion import RULES, shares_of
from hsl_node.sync.names import Digest, Peer
from hsl_node.sync.tensors import CHUNK_BYTES, DTYPES, Array, Schema, TensorSpec, read_chunk

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
) -> Digest:
    """Fuse the full set into `out`, durably (`durable.replacing`); gives its sha256.

    The files were checked on arrival (`tensors.check_file`); `progress` receives the share done, 0 to 1.
    """
    digest = hashlib.sha256(schema.header)
    shares = shares_of(samples)
    with ExitStack() as stack:
        files = [stack.enter_context(open(paths[p], "rb")) for p in sorted(paths)]
        target = stack.enter_context(replacing(out, Step.FUSION_WRITE))
        target.write(schema.header)
        for spec in schema.tensors:
            step = min(CHUNK_BYTES, READ_BYTES // len(files)) // np.dtype(DTYPES[spec.dtype]).itemsize
            elements = math.prod(spec.shape)
            for start in range(0, elements, step):
                chunks = [read_chunk(f, spec, start, min(step, elements - start)) for f in files]
                if see:
                    see(spec, start, chunks)
                fused = RULES[rule](chunks, shares)
                del chunks  # before the next ones are read
                digest.update(fused.data)
                target.write(fused.data)
            if progress:
                progress((spec.offset + spec.bytes) / schema.file_bytes)
    return Digest(digest.hexdigest())
