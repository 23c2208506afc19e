"""Fusion by numbers worked out by hand, and the same bytes from files as in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from weights import Contribution, fuse

from hsl_node.errors import Altered
from hsl_node.federation.fusion_rules import FUSION_RULES, ROBUST_PEERS_MIN
from hsl_node.federation.names import Peer
from hsl_node.weights.checkpoint_file import CHUNK_BYTES, DTYPES, Array, read_weights, schema_of, write_weights
from hsl_node.weights.combinations import COMBINATIONS
from hsl_node.weights.fuse_files import fuse_files
from hsl_node.weights.fusion import RULES, shares_of
from hsl_node.weights.whole import sha256_of

ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
MEANS = [name for name in RULES if not FUSION_RULES[name].robust]
ROBUST = [name for name in RULES if FUSION_RULES[name].robust]


def of(*arrays: Array) -> dict[Peer, Contribution]:
    """A full set: one array each, from peers of different sizes."""
    return {Peer(f"peer{i:02}"): Contribution({"w": a}, samples=i + 1) for i, a in enumerate(arrays)}


def f32(*values: float) -> Array:
    return np.array(values, dtype=np.float32)


def test_mean_counts_every_peer_the_same_whatever_its_size():
    fused = fuse(
        "mean",
        {
            ASH: Contribution({"w": f32(1, 2)}, samples=1),
            BIRCH: Contribution({"w": f32(3, 4)}, samples=1000),
            CEDAR: Contribution({"w": f32(8, 0)}, samples=7),
        },
    )
    np.testing.assert_array_equal(fused["w"], f32(4, 2))  # (1+3+8)/3, (2+4+0)/3


def test_weighted_mean_counts_images():
    fused = fuse(
        "weighted_mean",
        {ASH: Contribution({"w": f32(1, 10)}, samples=300), BIRCH: Contribution({"w": f32(5, 2)}, samples=100)},
    )
    np.testing.assert_array_equal(fused["w"], f32(2, 8))  # 0.75 x 1 + 0.25 x 5, 0.75 x 10 + 0.25 x 2


@pytest.mark.parametrize("rule", RULES)
def test_integers_take_the_maximum(rule):
    """BatchNorm's batch counters: (7 + 9) / 2 batches would be a count that no network has seen."""
    counters = {p: Contribution({"n": np.array(n, dtype=np.int64)}, samples=10) for p, n in ((ASH, 7), (BIRCH, 9))}
    fused = fuse(rule, counters)
    assert fused["n"] == 9
    assert (fused["n"].dtype, fused["n"].shape) == (np.int64, ())


def test_the_median_is_the_middle_value_of_every_coordinate():
    fused = fuse("median", of(f32(1, 9, -4), f32(3, 2, -9), f32(8, 5, 7)))
    np.testing.assert_array_equal(fused["w"], f32(3, 5, -4))


def test_the_median_of_an_even_number_of_peers_is_the_mean_of_the_middle_two():
    fused = fuse("median", of(f32(1, 10), f32(100, 2), f32(4, -7), f32(2, 4)))
    np.testing.assert_array_equal(fused["w"], f32(3, 3))  # 1 [2 4] 100; -7 [2 4] 10


def test_the_trimmed_mean_leaves_out_one_value_on_each_side_of_five():
    fused = fuse("trimmed_mean", of(f32(1, 0), f32(2, -8), f32(1e30, 3), f32(9, 6), f32(4, 50)))
    np.testing.assert_array_equal(fused["w"], f32(5, 3))  # (2+4+9)/3, (0+3+6)/3


@pytest.mark.parametrize(("peers", "trimmed"), [(2, 0), (3, 1), (4, 1), (5, 1), (9, 1), (10, 2), (14, 2), (64, 12)])
def test_the_trimmed_mean_leaves_out_a_fifth_and_one_at_least(peers, trimmed):
    """Values 0, 1, 4, 9, ...: the trimmed mean of squares tells how many were left out."""
    fused = fuse("trimmed_mean", of(*(np.array([float(i * i)]) for i in range(peers))))
    kept = [i * i for i in range(trimmed, peers - trimmed)]
    assert fused["w"][0] == sum(kept) / len(kept)


@pytest.mark.parametrize("rule", ROBUST)
def test_two_peers_have_no_middle_but_their_mean(rule):
    np.testing.assert_array_equal(fuse(rule, of(f32(1, 5), f32(4, -5)))["w"], f32(2.5, 0))


def test_every_rule_that_a_plan_may_name_is_computed_and_no_other():
    assert list(FUSION_RULES) == [*RULES, *COMBINATIONS]


@pytest.mark.parametrize("rule", RULES)
def test_the_table_says_truly_which_rules_a_poisoned_minority_cannot_move(rule):
    """The smallest federation in which the rule is allowed to be robust: one of three sends a huge number."""
    fused = fuse(rule, of(f32(1), f32(2), f32(1e30)))["w"]
    assert (fused <= 2) == FUSION_RULES[rule].robust
    assert (FUSION_RULES[rule].peers_min >= ROBUST_PEERS_MIN) == FUSION_RULES[rule].robust


@pytest.mark.parametrize("rule", MEANS)
def test_floats_accumulate_in_float64(rule):
    """2^24 + 1 + 1 is 2^24 in float32, since each 1 is rounded away. The true mean of the four is 2^22 + 0.5."""
    values = {ASH: 2.0**24, BIRCH: 1.0, CEDAR: 1.0, Peer("durmast"): 0.0}
    fused = fuse(rule, {p: Contribution({"w": f32(v)}, samples=1) for p, v in values.items()})
    single = np.float32(2.0**24) + np.float32(1) + np.float32(1)
    assert single / 4 == 2.0**22, "this example would not notice float32"
    assert fused["w"][0] == np.float32(2.0**22 + 0.5)


def test_the_kept_values_of_the_trimmed_mean_accumulate_in_float64():
    """The same with a value to trim on each side: 0, 1, 1, 2^24 stay of -1 and 2^30."""
    fused = fuse("trimmed_mean", of(*(f32(v) for v in (2.0**24, 1.0, 1.0, 0.0, 2.0**30, -1.0))))
    assert fused["w"][0] == np.float32(2.0**22 + 0.5)


@pytest.mark.parametrize("rule", RULES)
def test_the_largest_float32_of_all_peers_does_not_overflow(rule):
    top = np.finfo(np.float32).max
    for peers in ((ASH, BIRCH, CEDAR), (ASH, BIRCH)):
        assert fuse(rule, {p: Contribution({"w": f32(top)}, samples=3) for p in peers})["w"][0] == top


weights = hnp.arrays(np.float32, 5, elements=st.floats(-1e6, 1e6, width=32))


@given(st.lists(weights, min_size=2, max_size=5), st.permutations(range(5)), st.sampled_from(sorted(RULES)))
def test_the_order_in_which_checkpoints_came_does_not_matter(arrays, order, rule):
    peers = [Peer(f"peer{i}") for i in range(len(arrays))]
    full_set = {p: Contribution({"w": a}, samples=i + 1) for i, (p, a) in enumerate(zip(peers, arrays, strict=True))}
    shuffled = {peers[i]: full_set[peers[i]] for i in order if i < len(peers)}
    assert fuse(rule, full_set)["w"].tobytes() == fuse(rule, shuffled)["w"].tobytes()


@given(st.lists(weights, min_size=2, max_size=7), st.randoms(), st.sampled_from(ROBUST))
def test_who_holds_which_weights_changes_no_byte_of_a_robust_fusion(arrays, random, rule):
    """They sort the values, so not even the order of adding depends on a name; -0 and 0 are told apart here."""
    shuffled = random.sample(arrays, len(arrays))
    assert fuse(rule, of(*arrays))["w"].tobytes() == fuse(rule, of(*shuffled))["w"].tobytes()


outliers = hnp.arrays(np.float32, 5, elements=st.floats(allow_nan=False, allow_infinity=False, width=32))


@given(st.lists(weights, min_size=2, max_size=7), outliers, st.integers(0, 7), st.sampled_from(ROBUST))
def test_one_peer_of_three_or_more_moves_a_robust_fusion_no_further_than_the_range_of_the_others(
    honest, outlier, place, rule
):
    fused = fuse(rule, of(*honest[:place], outlier, *honest[place:]))["w"]
    assert (np.min(honest, axis=0) <= fused).all()
    assert (fused <= np.max(honest, axis=0)).all()


def test_one_peer_moves_the_mean_as_far_as_it_likes():
    """What the robust rules are for."""
    assert fuse("mean", of(f32(1), f32(2), f32(3e30)))["w"][0] > 9e29


@given(st.lists(hnp.arrays(np.float64, 4, elements=st.floats(-9, 9)), min_size=1, max_size=20))
def test_the_median_is_numpys(arrays):
    """An independent computation, for every number of peers that a sorting network might get wrong."""
    np.testing.assert_allclose(fuse("median", of(*arrays))["w"], np.median(arrays, axis=0), atol=1e-14)


@given(st.lists(weights, min_size=2, max_size=5))
def test_the_mean_of_equal_checkpoints_is_the_checkpoint(arrays):
    full_set = {Peer(f"peer{i}"): Contribution({"w": arrays[0]}, samples=1) for i in range(len(arrays))}
    np.testing.assert_array_equal(fuse("mean", full_set)["w"], arrays[0])


def test_inputs_are_left_as_they_were():
    mine = f32(1, 2)
    fuse("mean", {ASH: Contribution({"w": mine}, 1), BIRCH: Contribution({"w": f32(3, 4)}, 1)})
    np.testing.assert_array_equal(mine, f32(1, 2))


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=8))
def test_shares_add_up_to_one_in_sorted_peer_order(counts):
    samples = {Peer(f"peer{9 - i}"): n for i, n in enumerate(counts)}
    shares = shares_of(samples)
    assert sum(shares) == pytest.approx(1)
    assert shares == [samples[p] / sum(counts) for p in sorted(samples)]


@pytest.mark.parametrize("counts", [[0, 0], [-1, 5]])
def test_threat_09_sample_counts_that_add_up_to_nothing_are_refused(counts):
    with pytest.raises(ValueError, match="add up to nothing"):
        shares_of(dict(zip((ASH, BIRCH), counts, strict=True)))


# ------------------------------------------------------------------ from files


def checkpoints(folder: Path, peers: int, elements: int = 1000) -> tuple[dict[Peer, Contribution], dict[Peer, Path]]:
    """Checkpoints with every dtype, a scalar and a tensor of `elements` floats."""
    full_set, paths = {}, {}
    for i in range(peers):
        rng = np.random.default_rng(i)
        peer = Peer(f"peer{i}")
        tensors = {f"t.{code}": (rng.standard_normal((3, 2)) * 9).astype(d) for code, d in DTYPES.items()}
        tensors["big"] = rng.standard_normal(elements, dtype=np.float32)
        tensors["batches"] = np.array(40 + i, dtype=np.int64)
        full_set[peer] = Contribution(tensors, samples=10 * i + 1)
        paths[peer] = folder / f"{peer}.safetensors"
        write_weights(paths[peer], tensors)
    return full_set, paths


def samples_of(full_set: dict[Peer, Contribution]) -> dict[Peer, int]:
    return {p: c.samples for p, c in full_set.items()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("peers", [2, 5])
def test_files_fuse_to_the_same_bytes_as_in_memory(tmp_path, rule, peers):
    """The big tensor spans several chunks and ends inside one."""
    full_set, paths = checkpoints(tmp_path, peers, elements=2 * CHUNK_BYTES // 4 + 123)
    schema = schema_of(full_set[Peer("peer0")].weights)
    digest = fuse_files(rule, paths, samples_of(full_set), schema, tmp_path / "fused.safetensors")
    assert digest == write_weights(tmp_path / "in-memory.safetensors", fuse(rule, full_set))
    assert digest == sha256_of(tmp_path / "fused.safetensors")
    assert (tmp_path / "fused.safetensors").read_bytes() == (tmp_path / "in-memory.safetensors").read_bytes()


@given(st.integers(2, 4), st.integers(1, 50), st.sampled_from(sorted(RULES)))
@settings(max_examples=15)
def test_small_files_of_any_shape_fuse_to_the_same_bytes(tmp_path_factory, peers, elements, rule):
    folder = tmp_path_factory.mktemp("fuse")
    full_set, paths = checkpoints(folder, peers, elements)
    schema = schema_of(full_set[Peer("peer0")].weights)
    digest = fuse_files(rule, paths, samples_of(full_set), schema, folder / "fused.safetensors")
    assert digest == write_weights(folder / "in-memory.safetensors", fuse(rule, full_set))


def test_the_fused_file_appears_whole_or_not_at_all(tmp_path):
    full_set, paths = checkpoints(tmp_path, 2)
    paths[Peer("peer1")].write_bytes(paths[Peer("peer1")].read_bytes()[:-5])
    with pytest.raises(Altered, match=r"the checkpoint of peer1, .* is cut short"):
        fuse_files("mean", paths, samples_of(full_set), schema_of(full_set[Peer("peer0")].weights), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_a_fusion_that_is_repeated_gives_the_same_file(tmp_path):
    full_set, paths = checkpoints(tmp_path, 3)
    schema = schema_of(full_set[Peer("peer0")].weights)
    (tmp_path / "fused.tmp").write_bytes(b"left by a crash")
    digests = {fuse_files("mean", paths, samples_of(full_set), schema, tmp_path / "fused") for _ in range(2)}
    assert len(digests) == 1
    assert read_weights(tmp_path / "fused")["batches"] == 42


def test_progress_runs_to_one(tmp_path):
    full_set, paths = checkpoints(tmp_path, 2)
    seen: list[float] = []
    schema = schema_of(full_set[Peer("peer0")].weights)
    fuse_files("mean", paths, samples_of(full_set), schema, tmp_path / "fused", seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1


@pytest.mark.parametrize(
    ("rule", "chunks"), [("weighted_mean", 10), ("trimmed_mean", 14), ("median", 14), ("come", 14)]
)
def test_memory_grows_neither_with_the_peers_nor_with_the_tensor(tmp_path, rule, chunks):
    """One 16 MiB tensor from 2, 4 and 8 peers: a few chunks of memory in every case. The robust rules sort a copy."""
    full_set, paths = checkpoints(tmp_path, 8, elements=4 * 1024 * 1024)
    schema = schema_of(full_set[Peer("peer0")].weights)
    samples = samples_of(full_set)
    del full_set
    peaks = [peak_of_fusion(rule, {p: paths[p] for p in list(paths)[:n]}, samples, schema, tmp_path) for n in (2, 4, 8)]
    assert peaks[-1] < 1.5 * peaks[0]
    assert max(peaks) < chunks * CHUNK_BYTES


def peak_of_fusion(rule, paths, samples, schema, folder: Path) -> int:
    tracemalloc.start()
    try:
        base = paths[Peer("peer1")]  # any file of this model
        fuse_files(rule, paths, {p: samples[p] for p in paths}, schema, folder / "fused", base=base)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
