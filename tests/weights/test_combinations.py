"""Fusions by coefficients: worked numbers of each method, its properties, and the same bytes whatever the machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from weights import Contribution, fuse

from hsl_node.errors import Altered
from hsl_node.federation.fusion_rules import FUSION_RULES, ROBUST_PEERS_MIN
from hsl_node.federation.names import Peer
from hsl_node.node.poisoning import fuse_watched
from hsl_node.weights import fuse_files as fuse_module
from hsl_node.weights.active_sets import nonnegative
from hsl_node.weights.checkpoint_file import (
    CHUNK_BYTES,
    DTYPES,
    MAGNITUDE_MAX,
    Array,
    check_file,
    read_chunk,
    read_weights,
    schema_of,
    write_weights,
)
from hsl_node.weights.combinations import BLOCK, COMBINATIONS, FullSet, Products, combine, stands_still
from hsl_node.weights.fuse_files import fuse_files
from hsl_node.weights.whole import sha256_of

SAID = {"steps": 3.0, "evenness": 0.5, "mu": 0.25}
FREE = [rule for rule, c in COMBINATIONS.items() if not c.convex]


def full_set(*arrays: object, samples: object = (), said: object = ()) -> dict[Peer, Contribution]:
    counts, numbers = list(samples) or [1] * len(arrays), list(said) or [SAID] * len(arrays)  # type: ignore[call-overload]
    return {
        Peer(f"peer{i:02}"): Contribution({"w": np.array(a, np.float64)}, counts[i], numbers[i])
        for i, a in enumerate(arrays)
    }


def table(updates: Array) -> list[list[float]]:
    products = Products(len(updates))
    products.see(np.zeros(updates.shape[1]), list(updates))
    return [list(row) for row in products.table]


def steps(*numbers: float) -> list[dict[str, float]]:
    return [{"steps": n} for n in numbers]


def test_the_table_says_truly_what_each_combination_reads():
    for name, combination in COMBINATIONS.items():
        rule = FUSION_RULES[name]
        assert rule.needs_base == (combination.products or not combination.convex)
        assert rule.measures == combination.products
        full = FullSet([3, 1], [{n: 1.0 for n in rule.said}] * 2, [[1.0, 0.0], [0.0, 1.0]])
        coefficients = combination.coefficients(full)  # no other number is asked for
        by_images = list(coefficients) != list(combination.coefficients(FullSet([1, 1], full.said, full.products)))
        assert by_images == rule.by_images
        if combination.convex:
            assert min(coefficients) >= 0 and math.fsum(coefficients) == pytest.approx(1)


# ------------------------------------------------------------------ FedNova

BASE, G_A, G_B, RATE = np.array([1.0, -1.0]), np.array([1.0, 2.0]), np.array([-2.0, 1.0]), 0.1


def linear(*entered: float) -> dict[Peer, Contribution]:
    """Peers with losses g.w: whatever each did, its update is -rate x (how often its gradient entered) x g."""
    arrays = [BASE - RATE * a * g for a, g in zip(entered, (G_A, G_B), strict=True)]
    return full_set(*arrays, samples=(10, 30), said=steps(*entered))


@pytest.mark.parametrize(
    ("entered", "fused"), [((2, 4), (1.4375, -1.4375)), ((2.5, 6.125), (1.65234, -1.65234))], ids=["plain", "momentum"]
)
def test_fednova_counts_each_direction_once_however_many_steps_were_taken(entered, fused):
    """2 and 4 steps of plain SGD; with momentum 0.5 their gradients entered 2.5 and 6.125 times. FedAvg: 1.55, -1.4."""
    assert fuse("nova", linear(*entered), {"w": BASE})["w"] == pytest.approx(fused, rel=1e-5)
    if entered == (2, 4):
        assert fuse("weighted_mean", linear(2, 4))["w"] == pytest.approx([1.55, -1.4])


def test_fednova_by_steps_where_momentum_counted_goes_elsewhere():
    """The trap: steps in place of how often a gradient entered."""
    right = linear(2.5, 6.125).values()
    wrong = full_set(*(c.weights["w"] for c in right), samples=(10, 30), said=steps(2, 4))
    assert fuse("nova", wrong, {"w": BASE})["w"] == pytest.approx([1.69453, -1.6207], rel=1e-5)


@given(st.floats(1, 1e4), st.floats(1, 1e4))
def test_fednova_of_linear_losses_is_one_step_along_the_mean_gradient(a, b):
    effective = (a + 3 * b) / 4
    expected = BASE - RATE * effective * (G_A + 3 * G_B) / 4
    np.testing.assert_allclose(fuse("nova", linear(a, b), {"w": BASE})["w"], expected, rtol=1e-9, atol=1e-9)


def test_fednova_of_equal_steps_is_fedavg():
    peers = full_set((1, -2), (2, 0), (4, 1), samples=(10, 30, 60), said=steps(7, 7, 7))
    assert fuse("nova", peers, {"w": np.zeros(2)})["w"] == pytest.approx([3.1, 0.4])


# ------------------------------------------------------------------ FedCOME

D = np.array([(0.0, -2.0, -1.0), (1.0, 1.0, 0.0), (0.0, 0.0, 2.0)])
V = np.array([(1, -1, 0), (1, 0, 0), (2 / 3, -2 / 3, 4 / 3)])


def vectors(updates: Array) -> Array:
    products = table(updates)
    return np.stack([updates[k] + np.array(nonnegative(products, k)) @ updates for k in range(len(updates))])


def test_fedcome_is_the_worked_example():
    np.testing.assert_allclose(vectors(D), V, atol=1e-12)
    coefficients = COMBINATIONS["come"].coefficients(FullSet([1, 2, 1], products=table(D)))
    assert coefficients == pytest.approx([2 / 3, 11 / 12, 1 / 2])
    update = fuse("come", full_set(*(5 + D), samples=(1, 2, 1)), {"w": np.full(3, 5.0)})["w"] - 5
    assert update == pytest.approx([11 / 12, -5 / 12, 1 / 3])
    assert D @ update == pytest.approx([0.5, 0.5, 2 / 3])
    assert D @ (D[0] + 2 * D[1] + D[2]) / 4 == pytest.approx([-0.25, 0.5, 0.5])  # FedAvg goes against the first


some_updates = hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=7).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=st.integers(-9, 9).map(float))
)


@given(some_updates)
def test_fedcomes_vectors_are_against_no_update_and_no_longer_than_what_they_came_of(updates):
    found = vectors(updates)
    assert (found @ updates.T >= -1e-9).all()
    np.testing.assert_array_less(np.linalg.norm(found, axis=1), np.linalg.norm(updates, axis=1) + 1e-9)
    peers = full_set(*updates, samples=range(1, len(updates) + 1))
    fused = fuse("come", peers, {"w": np.zeros(updates.shape[1])})["w"]
    assert (updates @ fused >= -1e-9).all()


@given(some_updates, st.sampled_from([1e-3, 0.5, 2.0, 1e3]))
def test_fedcomes_vectors_scale_with_the_updates(updates, times):
    np.testing.assert_allclose(vectors(times * updates), times * vectors(updates), atol=1e-9 * times)


def test_fedcomes_vectors_are_the_nearest_of_all_that_are_against_none():
    """An independent search: no point of the cone that steps from v can reach is nearer to d."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        updates = rng.standard_normal((4, 3))
        for d, v in zip(updates, vectors(updates), strict=True):
            tried = v + rng.standard_normal((4000, 3)) * 10.0 ** rng.uniform(-4, 1, (4000, 1))
            allowed = tried[(tried @ updates.T >= 0).all(axis=1)]
            assert (np.linalg.norm(allowed - d, axis=1) >= np.linalg.norm(v - d) - 1e-9).all()


def test_fedcome_without_a_conflict_is_fedavg_to_the_bit():
    rng = np.random.default_rng(0)
    base = rng.standard_normal(500).astype(np.float32)
    arrays = [base + np.abs(rng.standard_normal(500)).astype(np.float32) for _ in range(4)]
    peers = {Peer(f"peer{i}"): Contribution({"w": a}, 7 * i + 3) for i, a in enumerate(arrays)}
    assert fuse("come", peers, {"w": base})["w"].tobytes() == fuse("weighted_mean", peers)["w"].tobytes()


def test_fedcome_of_updates_in_all_directions_stands_still_and_says_so(tmp_path, caplog):
    """(1, 0), (0, 1), (-1, -1): the only vector against none of them is 0."""
    base, updates = np.array([3.0, 4.0]), np.array([(1.0, 0.0), (0.0, 1.0), (-1.0, -1.0)])
    assert fuse("come", full_set(*(base + updates)), {"w": base})["w"] == pytest.approx(base)
    write_weights(tmp_path / "base", {"w": base})
    paths = {Peer(f"peer{i}"): tmp_path / f"peer{i}" for i in range(3)}
    for path, update in zip(paths.values(), updates, strict=True):
        write_weights(path, {"w": base + update})
    more = {"base": tmp_path / "base", "said": {}}
    fuse_files("come", paths, dict.fromkeys(paths, 1), schema_of({"w": base}), tmp_path / "fused", **more)
    assert any("cancel each other out" in r.message for r in caplog.records)
    assert not stands_still([0.5, 0.5], table(updates[:2]))


def test_fedcome_moves_no_number_further_than_its_clip():
    peers = full_set((1.0, 0.001, -3.0), (1.0, 0.002, -1.0))
    fused = fuse("come", peers, {"w": np.zeros(3)}, clip=0.005)["w"]
    assert fused == pytest.approx([0.005, 0.0015, -0.005])


# ------------------------------------------------------------------ FedDyS


def test_feddys_counts_peers_by_their_evenness():
    peers = full_set((1, 0), (0, 2), said=[{"evenness": 0.63093}, {"evenness": 0.9}])
    assert fuse("entropy_weighted", peers)["w"] == pytest.approx([0.412122, 1.17576], rel=1e-5)


def test_feddys_leaves_a_peer_of_one_class_out_and_falls_back_to_shares_where_all_have_one():
    one, none = {"evenness": 0.8}, {"evenness": 0.0}
    assert fuse("entropy_weighted", full_set((5, 1), (99, 99), said=[one, none]))["w"] == pytest.approx([5, 1])
    peers = full_set((0, 0), (4, 8), samples=(1, 3), said=[none, none])
    assert fuse("entropy_weighted", peers)["w"] == pytest.approx([3, 6])


# ------------------------------------------------------------------ swarm: the geometric median


def geometric(*points: object) -> Array:
    arrays = np.array(points, np.float64)
    return fuse("geometric_median", full_set(*arrays), {"w": np.zeros(arrays.shape[1])})["w"]


def test_the_geometric_median_is_the_closed_form_and_stays_where_the_mean_runs_away():
    corner = (3 - math.sqrt(3)) / 6
    assert geometric((0, 0), (1, 0), (0, 1)) == pytest.approx([corner, corner])
    assert geometric((0, 0), (1, 0), (0, 1000)) == pytest.approx([0.499423, 0.288675], abs=1e-6)
    assert fuse("mean", full_set((0, 0), (1, 0), (0, 1000)))["w"] == pytest.approx([1 / 3, 1000 / 3])


def test_the_geometric_median_is_of_the_whole_model_and_not_of_each_tensor():
    """(0,0), (1,0), (0,1) with each coordinate a tensor: one by one both would be 0."""
    corner = (3 - math.sqrt(3)) / 6
    points = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    peers = {
        Peer(f"p{i}"): Contribution({"a": np.array([x]), "b": np.array([y])}, 1) for i, (x, y) in enumerate(points)
    }
    fused = fuse("geometric_median", peers, {"a": np.zeros(1), "b": np.zeros(1)})
    assert [fused["a"][0], fused["b"][0]] == pytest.approx([corner, corner])


def test_the_geometric_median_turns_with_the_points_and_its_unit_vectors_cancel_out():
    rng = np.random.default_rng(3)
    for _ in range(20):
        points = rng.standard_normal((5, 3))
        turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        median = geometric(*points)
        np.testing.assert_allclose(geometric(*(points @ turn)), median @ turn, atol=1e-6)
        away = points - median
        length = np.linalg.norm(away, axis=1, keepdims=True)
        pull = (away / length).sum(axis=0)
        assert np.linalg.norm(pull) < 1e-4 or length.min() < 1e-3  # or it is one of the points, whose pull is 1


def test_the_geometric_median_may_be_one_of_the_checkpoints():
    """Weiszfeld would divide by its distance, 0."""
    assert geometric((0, 0), (0, 0), (3, 4)) == pytest.approx([0, 0], abs=1e-6)
    assert geometric((2, 2), (2, 2), (2, 2)) == pytest.approx([2, 2])
    assert geometric((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)) == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(("peers", "liars"), [(ROBUST_PEERS_MIN, 1), (5, 2), (64, 31)])
@pytest.mark.parametrize("rule", COMBINATIONS)
def test_the_table_says_truly_which_combinations_a_poisoned_minority_cannot_move(rule, peers, liars):
    """The largest values that a peer takes of another, weights and statistics."""
    honest = [{"w": np.array([i, 1.0, 2.0]), "n.running_var": np.array([1.0 + i])} for i in range(peers - liars)]
    liar = {"w": np.full(3, MAGNITUDE_MAX), "n.running_var": np.array([MAGNITUDE_MAX])}
    sent = [Contribution(w, 1, SAID) for w in [*honest, *[liar] * liars]]
    base = {"w": np.zeros(3), "n.running_var": np.ones(1)}
    fused = fuse(rule, {Peer(f"p{i:02}"): c for i, c in enumerate(sent)}, base)
    worst = max(float(np.abs(a).max()) for a in fused.values())
    assert (worst < 10 * peers * peers) == FUSION_RULES[rule].robust


# ------------------------------------------------------------------ what all have in common


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_counters_take_the_maximum_and_variances_never_fall_below_0(rule):
    """FedNova's coefficients here are 2.5 and 0.25 x 2.5 / 10: statistics by them would be below 0 or above all."""
    said = [{"steps": a, "evenness": e, "mu": 0.5} for a, e in ((1.0, 1.0), (9.0, 0.5))]
    sent = [
        {"n.running_var": np.array([v]), "n.w": np.array([w]), "n.count": np.array(c)}
        for v, w, c in ((0.0, 1.0, 7), (8.0, -1.0, 3))
    ]
    peers = {Peer(f"p{i}"): Contribution(w, n, s) for i, (w, n, s) in enumerate(zip(sent, (3, 1), said, strict=True))}
    fused = fuse(rule, peers, {"n.running_var": np.ones(1), "n.w": np.zeros(1), "n.count": np.array(1)})
    assert fused["n.count"] == 7
    assert 0 <= fused["n.running_var"][0] <= 8
    if rule in FREE:
        assert fused["n.running_var"][0] == 2  # 3 and 1 images


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_equal_checkpoints_stay_what_they_are(rule):
    same = np.array([1.5, -2.25, 1e9])
    fused = fuse(rule, full_set(same, same, same), {"w": same})["w"]
    assert fused == pytest.approx(same, rel=1e-15)


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_the_order_in_which_checkpoints_came_does_not_matter(rule):
    rng = np.random.default_rng(2)
    said = [{"steps": float(i + 1), "evenness": 0.2 * i, "mu": 0.1 * i} for i in range(4)]
    peers = full_set(*rng.standard_normal((4, 9)), samples=(1, 2, 3, 4), said=said)
    shuffled = dict(reversed(peers.items()))
    base = {"w": rng.standard_normal(9)}
    assert fuse(rule, peers, base)["w"].tobytes() == fuse(rule, shuffled, base)["w"].tobytes()


def test_what_a_coefficient_carries_beyond_all_bounds_stays_what_peers_take(tmp_path):
    """A peer that says one step of many counts a thousand times, and what it makes is still a file that may be sent."""
    peers = full_set((9e8, -9e8), (0, 0), said=steps(1, 1e7))
    fused = fuse("nova", peers, {"w": np.zeros(2)})
    assert fused["w"].tolist() == [MAGNITUDE_MAX, -MAGNITUDE_MAX]
    check_file(tmp_path / "f", schema_of(fused), sha256=write_weights(tmp_path / "f", fused))
    half = [np.array([6e4], np.float16), np.array([0], np.float16)]
    assert combine(half, [9.0, 0.0], np.zeros(1, np.float16))[0] == np.finfo(np.float16).max


# ------------------------------------------------------------------ from files


def checkpoints(folder: Path, peers: int, elements: int = 1000):
    """Full set, paths, base: every dtype, a scalar, statistics and a tensor of `elements` floats."""
    everything, paths, base = {}, {}, {}
    for i in range(-1, peers):
        rng = np.random.default_rng(i + 1)
        tensors = {f"t.{code}": (rng.standard_normal((3, 2)) * 9).astype(d) for code, d in DTYPES.items()}
        tensors["big"] = rng.standard_normal(elements, dtype=np.float32)
        tensors["n.running_var"] = rng.random(5, dtype=np.float32)
        tensors["batches"] = np.array(40 + i, dtype=np.int64)
        if i < 0:
            base = tensors
            write_weights(folder / "base", base)
            continue
        peer = Peer(f"peer{i}")
        said = {"steps": 3.0 + 2 * i, "evenness": 1 / (2 + i), "mu": 1 / (3 + i)}
        everything[peer] = Contribution(tensors, samples=10 * i + 1, said=said)
        paths[peer] = folder / f"{peer}.safetensors"
        write_weights(paths[peer], tensors)
    return everything, paths, base


def arguments(everything, paths, base, folder: Path):
    positional = (paths, {p: c.samples for p, c in everything.items()}, schema_of(base), folder / "fused")
    return positional, {"said": {p: c.said for p, c in everything.items()}, "base": folder / "base"}


@pytest.mark.parametrize("rule", COMBINATIONS)
@pytest.mark.parametrize("peers", [2, 5])
def test_files_fuse_to_the_same_bytes_as_in_memory(tmp_path, rule, peers):
    """The big tensor spans several chunks, ends inside one, and takes blocks of products that end inside a chunk."""
    everything, paths, base = checkpoints(tmp_path, peers, elements=2 * CHUNK_BYTES // 4 + 123)
    positional, named = arguments(everything, paths, base, tmp_path)
    shares: list[float] = []
    digest = fuse_files(rule, *positional, shares.append, **named)
    assert (
        digest == write_weights(tmp_path / "in-memory", fuse(rule, everything, base)) == sha256_of(tmp_path / "fused")
    )
    assert shares == sorted(shares) and shares[-1] == 1
    assert (shares[0] < 0.01) and any(0.49 < s < 0.51 for s in shares) == COMBINATIONS[rule].products


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_how_much_is_read_at_a_time_changes_no_byte(tmp_path, monkeypatch, rule):
    everything, paths, base = checkpoints(tmp_path, 3, elements=9 * BLOCK + 77)
    positional, named = arguments(everything, paths, base, tmp_path)
    digest = fuse_files(rule, *positional, **named)
    for read in (1, 3 * 8 * BLOCK, 10**9):
        monkeypatch.setattr(fuse_module, "READ_BYTES", read)
        assert fuse_files(rule, *positional, **named) == digest


def test_products_are_those_of_exact_sums(tmp_path):
    rng = np.random.default_rng(0)
    base, rows = rng.standard_normal(3 * BLOCK + 5), rng.standard_normal((3, 3 * BLOCK + 5))
    products = Products(3)
    products.see(base, list(rows))
    for i in range(3):
        for j in range(3):
            exact = math.fsum((rows[i] - base) * (rows[j] - base))
            assert products.table[i][j] == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_watching_changes_no_byte_of_a_combination(tmp_path, rule):
    everything, paths, base = checkpoints(tmp_path, 3)
    (paths, samples, schema, out), named = arguments(everything, paths, base, tmp_path)
    alone = fuse_files(rule, paths, samples, schema, out, **named)
    watched, figures = fuse_watched(rule, paths, samples, schema, tmp_path / "base", out, said=named["said"])
    assert watched == alone and set(figures) == set(paths)


@pytest.mark.parametrize("rule", COMBINATIONS)
@pytest.mark.parametrize("which", ["peer1.safetensors", "base"])
def test_threat_23_whatever_a_combination_read_is_compared_before_its_file_is_in_place(tmp_path, rule, which):
    """Wherever it was altered: before the first pass, or between the two."""
    everything, paths, base = checkpoints(tmp_path, 2)
    positional, named = arguments(everything, paths, base, tmp_path)
    named |= {
        "expected": {p: sha256_of(path) for p, path in paths.items()},
        "base_sha256": sha256_of(tmp_path / "base"),
    }
    digest = fuse_files(rule, *positional, **named)
    (tmp_path / "fused").unlink()
    content = (tmp_path / which).read_bytes()

    def spoil(share: float = 1.0) -> None:
        if share >= 0.5:
            (tmp_path / which).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    for when in (None, spoil) if COMBINATIONS[rule].products else (None,):
        if when is None:
            spoil()
        if which == "base" and not FUSION_RULES[rule].needs_base:
            assert fuse_files(rule, *positional, **named) == digest
            continue
        what = "the fused model that this round began with" if which == "base" else "the checkpoint of peer1"
        with pytest.raises(Altered, match=f"{what}, .*{which}, is altered on"):
            fuse_files(rule, *positional, when, **named)
        assert not (tmp_path / "fused").exists()
        (tmp_path / which).write_bytes(content)


def test_threat_23_a_base_that_is_gone_or_cut_short_is_told_as_that(tmp_path):
    everything, paths, base = checkpoints(tmp_path, 2)
    positional, named = arguments(everything, paths, base, tmp_path)
    (tmp_path / "base").write_bytes((tmp_path / "base").read_bytes()[:-1])
    with pytest.raises(Altered, match="is cut short on"):
        fuse_files("nova", *positional, **named)
    (tmp_path / "base").unlink()
    with pytest.raises(Altered, match="is gone from"):
        fuse_watched(
            "nova",
            positional[0],
            positional[1],
            positional[2],
            tmp_path / "base",
            tmp_path / "fused",
            said=named["said"],
        )


ANYWHERE = """
import sys
from pathlib import Path
import numpy as np
from hsl_node.weights.checkpoint_file import read_schema
from hsl_node.weights.fuse_files import fuse_files
folder = Path(sys.argv[1])
paths = {f"peer{i}": folder / f"peer{i}.safetensors" for i in range(3)}
said = {p: {"steps": 3.0 + 2 * i, "evenness": 1 / (2 + i), "mu": 1 / (3 + i)} for i, p in enumerate(paths)}
samples = {p: 10 * i + 1 for i, p in enumerate(paths)}
schema = read_schema(folder / "base")
for rule in sys.argv[2:]:
    print(fuse_files(rule, paths, samples, schema, None, said=said, base=folder / "base"))
print(*np.show_config(mode="dicts")["SIMD Extensions"].get("found", []), file=sys.stderr)
"""


def test_threads_and_vector_instructions_change_no_byte(tmp_path):
    """With one thread and four, and with numpy's own fast paths switched off one after the other."""
    everything, paths, base = checkpoints(tmp_path, 3, elements=5 * BLOCK + 11)
    positional, named = arguments(everything, paths, base, tmp_path)
    here = [fuse_files(rule, *positional, **named) for rule in COMBINATIONS]
    paths_found: list[str] = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])  # type: ignore[call-overload, index]
    for threads, off in (("1", []), ("4", paths_found[-1:]), ("2", paths_found)):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        more = {**dict.fromkeys(names, threads), "NPY_DISABLE_CPU_FEATURES": " ".join(off)}
        command = [sys.executable, "-c", ANYWHERE, str(tmp_path), *COMBINATIONS]
        done = subprocess.run(
            command, env={**os.environ, **more}, capture_output=True, text=True, timeout=120, check=True
        )
        assert done.stdout.split() == here, more
        assert done.stderr.split() == [path for path in paths_found if path not in off], (
            "a switch that switches nothing"
        )


def test_the_base_is_read_at_the_chunks_place(tmp_path):
    """By hand, at the end of a tensor of several chunks."""
    everything, paths, base = checkpoints(tmp_path, 2, elements=CHUNK_BYTES // 4 + 9)
    positional, named = arguments(everything, paths, base, tmp_path)
    fuse_files("nova", *positional, **named)
    spec = next(s for s in schema_of(base).tensors if s.name == "big")
    with open(tmp_path / "fused", "rb") as file:
        last = read_chunk(file, spec, CHUNK_BYTES // 4 + 8, 1)[0]
    w, a, b = (float(weights["big"][-1]) for weights in (base, *(c.weights for c in everything.values())))
    effective = (1 * 3 + 11 * 5) / 12
    assert last == pytest.approx(w + effective * ((a - w) / 12 / 3 + 11 / 12 * (b - w) / 5), rel=1e-6)
    assert read_weights(tmp_path / "fused")["batches"] == 41
