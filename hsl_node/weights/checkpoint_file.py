"""Checkpoint files: safetensors, written in one canonical form and checked before anything is believed. numpy only.

The header is checked here before any tensor is read: the format's library accepts a 44 MiB header of empty tensors,
duplicate keys and NaN. All peers of a federation share one `Schema`, so all checkpoints have the same header and size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hsl_node.errors import PeerDataError, escaped
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
    """The one canonical header of these tensors."""
    entries: dict[str, Any] = {}
    position = 0
    for name in sorted(weights):
        array = weights[name]
        size = array.size * array.dtype.itemsize
        entries[name] = {
            "dtype": _CODES[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return parse_header(len(text).to_bytes(8, "little") + text)


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


def read_weights(path: Path) -> dict[str, Array]:
    """All tensors of a checkpoint file of our own. A peer's file goes through `check_file` first."""
    schema = read_schema(path)
    with open(path, "rb") as file:
        return {spec.name: _read_tensor(file, spec) for spec in schema.tensors}


def read_schema(path: Path) -> Schema:
    with open(path, "rb") as file:
        return parse_header(_read_header(file))


def parse_header(header: bytes) -> Schema:
    """Check a safetensors header.

    Raises:
        PeerDataError: code `header`; length, JSON, a duplicate key, metadata, an unknown dtype, a negative or huge
            shape, gaps, overlaps, or names out of order.
    """
    length = int.from_bytes(header[:8], "little")
    if length > HEADER_MAX_BYTES or len(header) != 8 + length:
        raise _bad(f"header of {length} bytes")
    try:
        entries = json.loads(header[8:].decode("ascii"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as exc:
        raise _bad(f"header is not JSON: {exc}") from exc
    if not isinstance(entries, dict) or not 0 < len(entries) <= TENSORS_MAX:
        raise _bad("header holds no tensors, or too many")
    tensors = []
    position = 0
    for name, entry in entries.items():
        spec = _spec(name, entry, 8 + length + position)
        if entry["data_offsets"] != [position, position + spec.bytes]:
            raise _bad(f"tensor {escaped(name)!r} leaves a gap or overlaps")
        position += spec.bytes
        tensors.append(spec)
    if [t.name for t in tensors] != sorted(entries):
        raise _bad("tensors are not sorted by name")
    return Schema(header, tuple(tensors))


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
            parse_header(header)  # says what is malformed, if it is
            raise PeerDataError("names, dtypes or shapes are not those of this model", code="header")
        digest = hashlib.sha256(header)
        bad: PeerDataError | None = None
        for spec in schema.tensors:
            for chunk in _chunks(file, spec):
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


def _chunks(file: BinaryIO, spec: TensorSpec) -> Iterator[Array]:
    elements = math.prod(spec.shape)
    step = CHUNK_BYTES // np.dtype(DTYPES[spec.dtype]).itemsize
    for start in range(0, elements, step):
        yield read_chunk(file, spec, start, min(step, elements - start))


def _read_tensor(file: BinaryIO, spec: TensorSpec) -> Array:
    return read_chunk(file, spec, 0, math.prod(spec.shape)).reshape(spec.shape)


def _read_header(file: BinaryIO) -> bytes:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if length > HEADER_MAX_BYTES:
        raise _bad(f"header of {length} bytes")
    return prefix + file.read(length)


def _spec(name: str, entry: Any, offset: int) -> TensorSpec:
    if name == "__metadata__" or not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"entry {escaped(name)!r} is not a plain tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(shape, list) or len(shape) > 8:
        raise _bad(f"tensor {escaped(name)!r}: dtype or rank not used here")
    if not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise _bad(f"tensor {escaped(name)!r}: empty or huge dimension")
    if not isinstance(offsets, list) or not all(type(n) is int for n in offsets):
        raise _bad(f"tensor {escaped(name)!r}: offsets are not whole numbers")
    return TensorSpec(name, dtype, tuple(shape), offset)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _bad(what: str) -> PeerDataError:
    return PeerDataError(f"not a checkpoint: {what}", code="header")
