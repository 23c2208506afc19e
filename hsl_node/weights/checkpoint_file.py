"""Checkpoint files: safetensors, written in one canonical form and checked before anything is believed. numpy only.

The header is checked here before any tensor is read: the format's library accepts a 44 MiB header of empty tensors,
duplicate keys and NaN. All peers of a federation share one `Schema`, so all checkpoints have the same header and size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hsl_node.errors import PeerDataError
from hsl_node.federation.names import Digest
from hsl_node.host.durable import Step, replacing

Array = NDArray[Any]
Weights = Mapping[str, Array]  # name -> array, dtype kept

HEADER_MAX_BYTES = 1024 * 1024  # a ResNet50 MMoE has 700 tensors and a 75 KiB header
TENSORS_MAX = 10_000
# The same for all, or one peer would take what another refuses. Weights stay below 10; the variances that BatchNorm
# keeps, squares, came to 12 at the default learning rate, to 2e5 at 0.1, to 4e7 at 1, the highest that a plan may have.
MAGNITUDE_MAX = 1e9
CHUNK_BYTES = 1024 * 1024  # a chunk stays in the processor's cache; larger ones are no faster
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
}
_CODES = {np.dtype(d): code for code, d in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str  # safetensors' word: F32, I64, ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def pieces(self, max_bytes: int) -> Iterator[tuple[int, int]]:
        """(first element, how many) of each piece of at most `max_bytes`."""
        elements, step = math.prod(self.shape), max_bytes // np.dtype(DTYPES[self.dtype]).itemsize
        for start in range(0, elements, step):
            yield start, min(step, elements - start)


@dataclass(frozen=True)
class Schema:
    """Names, dtypes and shapes of every shared tensor, in file order (sorted by name), and the header they give."""

    header: bytes  # the file's first bytes: 8 for the length, then JSON
    tensors: tuple[TensorSpec, ...]

    @property
    def file_bytes(self) -> int:
        last = self.tensors[-1]
        return last.offset + last.bytes

    @cached_property
    def digest(self) -> Digest:
        return Digest(hashlib.sha256(self.header).hexdigest())


def schema_of(weights: Weights) -> Schema:
    return _schema({name: (_CODES[a.dtype.newbyteorder("<")], a.shape) for name, a in weights.items()})


def _schema(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Schema:
    """The one canonical header of tensors of these names, dtypes and shapes."""
    entries: dict[str, Any] = {}
    specs: list[TensorSpec] = []
    position = 0
    for name, (dtype, shape) in sorted(tensors.items()):
        specs.append(TensorSpec(name, dtype, shape, position))
        end = position + specs[-1].bytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Schema(header, tuple(replace(spec, offset=len(header) + spec.offset) for spec in specs))


def write_weights(path: Path, weights: Weights, step: Step = Step.FILE_WEIGHTS) -> Digest:
    """Write a checkpoint durably (`durable.replacing`) and give back its sha256."""
    schema = schema_of(weights)
    digest = hashlib.sha256(schema.header)
    with replacing(path, step) as file:
        file.write(schema.header)
        for spec in schema.tensors:
            data = np.ascontiguousarray(weights[spec.name], dtype=DTYPES[spec.dtype]).tobytes()
            digest.update(data)
            file.write(data)
    return Digest(digest.hexdigest())


def digest_of(weights: Weights) -> tuple[Digest, int]:
    """sha256 and size of the file that `write_weights` would write."""
    schema = schema_of(weights)
    digest = hashlib.sha256(schema.header)
    for spec in schema.tensors:
        digest.update(np.ascontiguousarray(weights[spec.name], dtype=DTYPES[spec.dtype]).data)
    return Digest(digest.hexdigest()), schema.file_bytes


def read_weights(path: Path) -> dict[str, Array]:
    """All tensors of a checkpoint file of our own. A peer's file goes through `check_file` first."""
    schema = read_schema(path)
    with open(path, "rb") as file:
        return {
            spec.name: read_chunk(file, spec, 0, math.prod(spec.shape)).reshape(spec.shape) for spec in schema.tensors
        }


def read_schema(path: Path) -> Schema:
    with open(path, "rb") as file:
        return parse_header(_read_header(file))


def parse_header(header: bytes) -> Schema:
    """What a safetensors header says, which must be spelt as `schema_of` spells it: each lie would be another spelling.

    Raises:
        PeerDataError: code `header`.
    """
    length = int.from_bytes(header[:8], "little")
    if length > HEADER_MAX_BYTES or len(header) != 8 + length:
        raise _bad(f"header of {length} bytes")
    try:
        entries: dict[str, Any] = json.loads(header[8:])
        schema = _schema({name: (entry["dtype"], _shape(entry["shape"])) for name, entry in entries.items()})
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise _bad("its header does not describe tensors") from exc
    if not 0 < len(entries) <= TENSORS_MAX or "__metadata__" in entries:
        raise _bad("its header holds no tensors, too many, or something else")
    if schema.header != header:
        raise _bad("its header is not in the canonical form")
    return schema


def _shape(said: list[int]) -> tuple[int, ...]:
    if len(said) > 8 or not all(type(n) is int and 0 < n < 2**31 for n in said):
        raise ValueError("rank not used here, or an empty or huge dimension")
    return tuple(said)


def check_file(path: Path, schema: Schema, *, sha256: str) -> None:
    """Check a claimed checkpoint file against what the manifest and the model say, cheapest check first.

    Raises:
        PeerDataError: code `size`, `header`, `sha256`, `nonfinite` or `magnitude`.
    """
    size = path.stat().st_size
    if size != schema.file_bytes:
        raise PeerDataError(f"file of {size} bytes, this model has {schema.file_bytes}", code="size")
    with open(path, "rb") as file:
        header = _read_header(file)
        if header != schema.header:
            raise PeerDataError("names, dtypes or shapes are not those of this model", code="header")
        digest = hashlib.sha256(header)
        bad: PeerDataError | None = None
        for spec in schema.tensors:
            for start, count in spec.pieces(CHUNK_BYTES):
                chunk = read_chunk(file, spec, start, count)
                digest.update(chunk.data)
                bad = bad or fault(spec.name, chunk)
    if digest.hexdigest() != sha256:
        raise PeerDataError(f"file has sha256 {digest.hexdigest()[:12]}, manifest says {sha256[:12]}", code="sha256")
    if bad:
        raise bad


def fault(name: str, values: Array) -> PeerDataError | None:
    """Why these values of a tensor are not to be fused: code `nonfinite` or `magnitude`. Counters may be any."""
    if values.dtype.kind != "f":
        return None
    low, high = float(values.min()), float(values.max())  # NaN where a value is
    if not math.isfinite(low) or not math.isfinite(high):
        return PeerDataError(f"tensor {name!r} holds NaN or infinity", code="nonfinite")
    if max(-low, high) > MAGNITUDE_MAX:
        worst = max(-low, high)
        return PeerDataError(f"tensor {name!r} holds {worst:.3g}, beyond {MAGNITUDE_MAX:.0e}", code="magnitude")
    if low < 0 and name.endswith("running_var"):  # its square root is taken
        return PeerDataError(f"tensor {name!r} holds a negative variance, {low:.3g}", code="magnitude")
    return None


def read_chunk(file: BinaryIO, spec: TensorSpec, start: int, count: int) -> Array:
    """Elements [start, start + count) of one tensor."""
    dtype = np.dtype(DTYPES[spec.dtype])
    file.seek(spec.offset + start * dtype.itemsize)
    data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise PeerDataError(f"file ends inside tensor {spec.name!r}", code="size")
    return np.frombuffer(data, dtype=dtype)


def _read_header(file: BinaryIO) -> bytes:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if length > HEADER_MAX_BYTES:
        raise _bad(f"header of {length} bytes")
    return prefix + file.read(length)


def _bad(what: str) -> PeerDataError:
    return PeerDataError(f"not a checkpoint: {what}", code="header")
