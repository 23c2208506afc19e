"""Checkpoint files: the canonical form, and every way in which a header can lie."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hsl_node.errors import PeerDataError
from hsl_node.weights.checkpoint_file import (
    DTYPES,
    HEADER_MAX_BYTES,
    MAGNITUDE_MAX,
    TENSORS_MAX,
    Schema,
    check_file,
    parse_header,
    read_schema,
    read_weights,
    schema_of,
    write_weights,
)
from hsl_node.weights.whole import sha256_of

MODEL = {
    "bn.num_batches_tracked": np.array(7, dtype=np.int64),
    "bn.running_mean": np.array([0.5, -0.5], dtype=np.float32),
    "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
}


def header_bytes(entries: Any) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def entry(shape: list[Any], start: int, dtype: str = "F32", end: int | None = None) -> dict[str, Any]:
    size = int(np.prod(shape)) * 4 if end is None else end - start
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def refused(header: bytes) -> PeerDataError:
    with pytest.raises(PeerDataError) as refusal:
        parse_header(header)
    assert refusal.value.code == "header"
    return refusal.value


# ------------------------------------------------------------------ the canonical form

tensors = st.dictionaries(
    st.text(min_size=1, max_size=20),
    st.sampled_from(sorted(DTYPES)).flatmap(
        lambda code: hnp.arrays(DTYPES[code], hnp.array_shapes(min_dims=0, max_dims=4, max_side=4))
    ),
    min_size=1,
    max_size=5,
)


@given(tensors)
@settings(max_examples=40)
def test_what_is_written_is_read_back_with_names_dtypes_and_bits(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    digest = write_weights(path, weights)
    assert digest == sha256_of(path)
    back = read_weights(path)
    assert list(back) == sorted(weights)
    for name, array in weights.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()


@given(tensors)
@settings(max_examples=40)
def test_the_safetensors_library_reads_our_files(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    write_weights(path, weights)
    back = safetensors.numpy.load_file(path)
    assert back.keys() == weights.keys()
    assert all(back[n].tobytes() == a.tobytes() and back[n].shape == a.shape for n, a in weights.items())


def test_the_size_is_known_to_the_byte(tmp_path):
    """Header 8 + n; data: one int64, two and six float32 = 40 bytes."""
    write_weights(tmp_path / "x", MODEL)
    schema = schema_of(MODEL)
    assert schema.file_bytes == len(schema.header) + 40 == (tmp_path / "x").stat().st_size
    assert [t.offset - len(schema.header) for t in schema.tensors] == [0, 8, 16]


def test_equal_weights_give_equal_bytes_whatever_their_order_and_memory_layout(tmp_path):
    shuffled = dict(reversed(MODEL.items())) | {"fc.weight": np.asfortranarray(MODEL["fc.weight"])}
    assert write_weights(tmp_path / "a", MODEL) == write_weights(tmp_path / "b", shuffled)


def test_peers_with_the_same_model_share_one_schema(tmp_path):
    write_weights(tmp_path / "x", {n: a + a.dtype.type(1) for n, a in MODEL.items()})
    assert read_schema(tmp_path / "x") == schema_of(MODEL)
    assert read_schema(tmp_path / "x").digest == schema_of(MODEL).digest
    assert schema_of({**MODEL, "fc.weight": MODEL["fc.weight"].T}).digest != schema_of(MODEL).digest


def test_threat_22_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    write_weights(tmp_path / "x", MODEL)
    before = (tmp_path / "x").read_bytes()
    monkeypatch.setattr("os.rename", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_weights(tmp_path / "x", {n: a * 0 for n, a in MODEL.items()})
    assert (tmp_path / "x").read_bytes() == before


# ------------------------------------------------------------------ header bombs (threat 6)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\0",
        b"\0" * 7,
        struct.pack("<Q", 0),
        struct.pack("<Q", 100) + b"{}",  # shorter than it says
        struct.pack("<Q", 2) + b"{} ",  # longer than it says
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", HEADER_MAX_BYTES + 1) + b" " * (HEADER_MAX_BYTES + 1),
    ],
    ids=["empty", "1 byte", "7 bytes", "no JSON", "short", "long", "2^63", "2^64-1", "1 MiB and a byte"],
)
def test_threat_06_a_header_of_another_length_is_refused(header):
    refused(header)


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"[]",
        b"null",
        b"7",
        b"{",
        b'{"w":' * 100_000,
        b"[" * 500_000,
        b"\xff\xfe{}",
        '{"ä":{}}'.encode(),
        b'{"w":' + b"9" * 10_000 + b"}",
        b'{"w":NaN}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}garbage',
    ],
    ids=lambda text: repr(text[:20]),
)
def test_threat_06_a_header_that_is_no_json_object_of_tensors_is_refused(text):
    refused(header_bytes(text))


def test_threat_06_duplicate_keys_are_refused():
    one = b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    parse_header(header_bytes(b"{" + one + b"}"))
    refused(header_bytes(b"{" + one + b"," + one + b"}"))
    refused(header_bytes(one.replace(b'"dtype"', b'"dtype":"F64","dtype"').join((b"{", b"}"))))


@pytest.mark.parametrize(
    "entries",
    [
        {"__metadata__": {"format": "pt"}},
        {"__metadata__": {"x": "y" * 100_000}, "w": entry([1], 0)},
        {"__metadata__": entry([1], 0)},
        {"w": None},
        {"w": [1, 2]},
        {"w": {"dtype": "F32", "shape": [1]}},
        {"w": {**entry([1], 0), "more": 1}},
        {"w": entry([1], 0, dtype="F8_E4M3", end=1)},
        {"w": entry([1], 0, dtype="BOOL", end=1)},
        {"w": entry([1], 0, dtype="f32")},
        {"w": {**entry([1], 0), "dtype": ["F32"]}},
        {"w": {**entry([1], 0), "dtype": None}},
        {"w": {**entry([1], 0), "shape": 1}},
        {"w": {**entry([1], 0), "shape": "1"}},
        {"w": entry([0], 0)},
        {"w": entry([1, 0], 0)},
        {"w": entry([-1], 0, end=4)},
        {"w": entry([-2, -2], 0, end=16)},
        {"w": {**entry([1], 0), "shape": [1.0]}},
        {"w": {**entry([1], 0), "shape": [True]}},
        {"w": {**entry([1], 0), "shape": [[1]]}},
        {"w": {**entry([1], 0), "shape": [2**31]}},
        {"w": {**entry([1], 0), "shape": [2**63, 2]}},
        {"w": {**entry([1], 0), "shape": [1] * 9}},
        {"w": {**entry([1], 0), "data_offsets": [0]}},
        {"w": {**entry([1], 0), "data_offsets": [0, 4, 8]}},
        {"w": {**entry([1], 0), "data_offsets": None}},
        {"w": {**entry([1], 0), "data_offsets": [0.0, 4.0]}},
        {"w": {**entry([1], 0), "data_offsets": [False, 4]}},
        {"w": entry([1], 4)},
        {"w": entry([1], 0, end=8)},
        {"w": {**entry([1], 0), "data_offsets": [4, 0]}},
        {"w": {**entry([1], 0), "data_offsets": [-4, 0]}},
        {"a": entry([2], 0), "b": entry([2], 4)},
        {"a": entry([2], 0), "b": entry([2], 12)},
        {"a": entry([2], 0), "b": entry([2], 0)},
        {"b": entry([2], 0), "a": entry([2], 8)},
        {"b": entry([2], 8), "a": entry([2], 0)},
        {f"t{i:06d}": entry([1], 4 * i) for i in range(TENSORS_MAX + 1)},
    ],
    ids=lambda entries: json.dumps(entries)[:70],
)
def test_threat_06_each_lie_in_a_header_is_refused(entries):
    refused(header_bytes(entries))


def test_threat_06_a_header_of_700_000_empty_tensors_costs_no_more_than_its_first_bytes(tmp_path):
    """The library accepts this one: 44 MiB of header."""
    path = tmp_path / "bomb"
    empty = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path.write_bytes(header_bytes(b"{" + b",".join(empty % i for i in range(700_000)) + b"}"))
    assert path.stat().st_size > 30 * 1024 * 1024
    assert_bounded(lambda: read_schema(path), code="header")


def test_threat_06_a_file_that_claims_exabytes_is_refused_by_its_size_without_reading_it(tmp_path):
    entries = {"w": {"dtype": "F64", "shape": [2**31 - 1] * 8, "data_offsets": [0, 8 * (2**31 - 1) ** 8]}}
    schema = parse_header(header_bytes(entries))
    path = tmp_path / "x"
    path.write_bytes(schema.header)
    assert_bounded(lambda: check_file(path, schema, sha256="0" * 64), code="size")


def assert_bounded(attack: Callable[[], object], code: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PeerDataError) as refusal:
            attack()
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert refusal.value.code == code


def test_threat_20_names_from_a_hostile_header_are_escaped_and_capped_in_the_message():
    error = refused(header_bytes({"\x1b[31m\n" + "x" * 500_000: entry([0], 0)}))
    assert len(str(error)) < 400
    assert str(error).isprintable()


@given(st.binary(max_size=200))
def test_threat_06_no_bytes_do_more_than_be_refused(data):
    for header in (data, struct.pack("<Q", len(data)) + data):
        try:
            schema = parse_header(header)
        except PeerDataError as error:
            assert error.code == "header"
        else:
            assert schema.header == header


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["F32", "I64"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values)
def test_threat_06_no_json_does_more_than_be_refused(value):
    try:
        parse_header(header_bytes(value))
    except PeerDataError as error:
        assert error.code == "header"


# ------------------------------------------------------------------ a claimed file against manifest and model


def written(folder: Path, weights: dict[str, Any] = MODEL) -> tuple[Path, Schema, str]:
    path = folder / "x.safetensors"
    return path, schema_of(MODEL), write_weights(path, weights)


def test_a_right_file_passes(tmp_path):
    path, schema, sha256 = written(tmp_path)
    check_file(path, schema, sha256=sha256)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: b * 2])
def test_threat_06_a_file_of_another_size_is_refused(tmp_path, change):
    path, schema, sha256 = written(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    require_refused(path, schema, sha256, code="size")


@pytest.mark.parametrize("position", [-1, -40, -20])
def test_threat_18_one_flipped_bit_in_the_data_is_refused(tmp_path, position):
    path, schema, sha256 = written(tmp_path)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    require_refused(path, schema, sha256, code="sha256")


@pytest.mark.parametrize(
    "other",
    [
        {**MODEL, "fc.weight": MODEL["fc.weight"].T},
        {**MODEL, "fc.weight": MODEL["fc.weight"].view(np.int32)},
        {("fc.weighu" if n == "fc.weight" else n): a for n, a in MODEL.items()},
    ],
    ids=["shape", "dtype", "name"],
)
def test_threat_06_another_model_of_the_same_size_is_refused(tmp_path, other):
    path, schema, sha256 = written(tmp_path, other)
    assert path.stat().st_size == schema.file_bytes
    require_refused(path, schema, sha256, code="header")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(b'"dtype":"F32","shape":[2,3]', b'"shape":[2,3],"dtype":"F32"'), (b',"fc', b', "fc')],
    ids=["order", "space"],
)
def test_threat_06_another_spelling_of_the_right_header_is_refused(tmp_path, ours, theirs):
    """Two spellings of one model would be two digests of one content. Padding gives way, so the size stays right."""
    path, schema, _ = written(tmp_path)
    other = schema.header[8:].rstrip(b" ").replace(ours, theirs).ljust(len(schema.header) - 8)
    assert schema.header[8:] != other
    assert json.loads(other) == json.loads(schema.header[8:])
    refused(schema.header[:8] + other)
    path.write_bytes(schema.header[:8] + other + path.read_bytes()[len(schema.header) :])
    require_refused(path, schema, sha256_of(path), code="header")


FLOATS = {f"t.{code}": np.ones((2, 3), dtype=d) for code, d in DTYPES.items()} | {"scalar": np.ones((), np.float32)}


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [n for n, a in FLOATS.items() if a.dtype.kind == "f"])
def test_threat_07_one_bad_value_in_any_float_tensor_is_refused_and_the_tensor_named(tmp_path, name, poison):
    weights = {n: a.copy() for n, a in FLOATS.items()}
    weights[name][(-1,) * weights[name].ndim] = poison
    sha256 = write_weights(tmp_path / "x", weights)
    with pytest.raises(PeerDataError, match=name) as refusal:
        check_file(tmp_path / "x", schema_of(FLOATS), sha256=sha256)
    assert refusal.value.code == "nonfinite"


def test_threat_07_a_bad_value_in_the_last_chunk_of_a_large_tensor_is_found(tmp_path):
    big = np.zeros(700_001, dtype=np.float32)
    schema = schema_of({"w": big})
    big[-1] = np.nan
    require_refused(tmp_path / "x", schema, write_weights(tmp_path / "x", {"w": big}), code="nonfinite")


@pytest.mark.parametrize("value", [1e38, -1e38, 1.01 * MAGNITUDE_MAX])
@pytest.mark.parametrize("name", [n for n, a in FLOATS.items() if a.dtype.itemsize > 2 and a.dtype.kind == "f"])
def test_threat_08_a_value_beyond_all_honest_ones_is_refused_and_the_tensor_named(tmp_path, name, value):
    weights = {n: a.copy() for n, a in FLOATS.items()}
    weights[name][(-1,) * weights[name].ndim] = value
    sha256 = write_weights(tmp_path / "x", weights)
    with pytest.raises(PeerDataError, match=name) as refusal:
        check_file(tmp_path / "x", schema_of(FLOATS), sha256=sha256)
    assert refusal.value.code == "magnitude"


def test_threat_08_a_negative_variance_is_refused(tmp_path):
    """Finite, and small: but BatchNorm takes its square root."""
    weights = {"e.bn1.running_var": np.array([1, -1e-3], np.float32)}
    sha256 = write_weights(tmp_path / "x", weights)
    require_refused(tmp_path / "x", schema_of(weights), sha256, code="magnitude")


def test_large_counters_and_honest_statistics_pass(tmp_path):
    big = {"bn.num_batches_tracked": np.array(2**60), "bn.running_var": np.array([0, 4.5e7], np.float32)}
    weights = {**big, "w": np.array([-MAGNITUDE_MAX, MAGNITUDE_MAX])}
    sha256 = write_weights(tmp_path / "x", weights)
    check_file(tmp_path / "x", schema_of(weights), sha256=sha256)


def test_a_wrong_hash_is_reported_before_what_the_wrong_bytes_hold(tmp_path):
    path, schema, _ = written(tmp_path, {**MODEL, "bn.running_mean": np.array([np.nan, 1], np.float32)})
    require_refused(path, schema, "0" * 64, code="sha256")


def require_refused(path: Path, schema: Schema, sha256: str, code: str) -> None:
    with pytest.raises(PeerDataError) as refusal:
        check_file(path, schema, sha256=sha256)
    assert refusal.value.code == code
