"""FedTP: the hypernetwork's step, worked by hand and by its properties, and that every peer derives the same one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import learning
import numpy as np
import pytest
import torch
from rounds import Trained, first_round, train

from hsl_node.federation.names import Peer
from hsl_node.train.methods.fedtp import FEDTP
from hsl_node.train.networks.fedtp import Hypernetwork, PersonalTransformer
from hsl_node.train.networks.hypernetwork import Net, descended, fingerprint, generate, pull
from hsl_node.train.networks.initial import initialise
from hsl_node.train.start import StartFiles, adopted
from hsl_node.weights.checkpoint_file import read_schema, read_weights, write_weights
from hsl_node.weights.fuse_files import fuse_files

SETTINGS = {"rate": 0.01, "momentum": 0.9, "decay": 0.001}
PEERS = ("ash", "birch")


def floats(values: object) -> np.ndarray:
    return np.array(values, np.float32)


LINEAR = {"embedding": floats([[1, 0], [0.5, 1]]), "weight0": floats([[1, 2], [0, -1]]), "bias0": floats([0.1, 0.2])}
TRAINED = np.array([[1.3, 0.2], [2.0, -1.0]])
SHARES = (0.25, 0.75)  # images 1 : 3


def zeros(net: Net) -> dict[str, np.ndarray]:
    return {name: np.zeros_like(array) for name, array in net.items()}


def pulls_of(net: Net, trained: np.ndarray = TRAINED) -> list[tuple[int, dict[str, np.ndarray]]]:
    rows = []
    for row, share in enumerate(SHARES):
        embedding = net["embedding"][row]
        rows.append((row, pull(net, embedding, generate(net, embedding) - trained[row], share)))
    return rows


def deep(seed: int = 0) -> Net:
    rng = np.random.default_rng(seed)
    shapes = {"embedding": (2, 3), "weight0": (4, 3), "bias0": (4,), "weight1": (2, 4), "bias1": (2,)}
    return {name: floats(rng.standard_normal(shape)) for name, shape in shapes.items()}


def test_the_worked_numbers() -> None:
    made = [generate(LINEAR, e) for e in LINEAR["embedding"]]
    np.testing.assert_allclose(made, [[1.1, 0.2], [2.6, -0.8]], rtol=1e-6)
    (_, a), (_, b) = pulls_of(LINEAR)
    np.testing.assert_allclose(a["weight0"] + b["weight0"], [[0.175, 0.45], [0.075, 0.15]], rtol=1e-5)
    np.testing.assert_allclose(a["bias0"] + b["bias0"], [0.4, 0.15], rtol=1e-5)
    np.testing.assert_allclose([a["embedding"], b["embedding"]], [[-0.05, -0.1], [0.45, 0.75]], rtol=1e-5)

    new, _ = descended(LINEAR, zeros(LINEAR), pulls_of(LINEAR), **SETTINGS)
    np.testing.assert_allclose(new["bias0"], [0.095999, 0.198498], atol=1e-6)  # [0.104, 0.2015] with the wrong sign
    made = [generate(new, e) for e in new["embedding"]]
    np.testing.assert_allclose(made, [[1.09672, 0.196746], [2.57112, -0.795842]], atol=1e-5)


def test_the_gradient_is_that_of_half_the_squared_distance() -> None:
    net = deep()
    ((_, a), (_, b)), small = pulls_of(net), 1e-6

    def distance(changed: Net) -> float:
        made = [generate(changed, e) for e in changed["embedding"]]
        return sum(s / 2 * ((m - t) ** 2).sum() for s, m, t in zip(SHARES, made, TRAINED, strict=True))

    for name in ("weight0", "bias0", "weight1", "bias1"):
        for at in np.ndindex(net[name].shape):
            up, down = ({**net, name: net[name].astype(np.float64)} for _ in range(2))
            up[name][at] += small
            down[name][at] -= small
            by_differences = (distance(up) - distance(down)) / (2 * small)
            assert a[name][at] + b[name][at] == pytest.approx(by_differences, abs=1e-4)


def test_where_all_trained_what_was_made_nothing_changes() -> None:
    made = np.array([generate(LINEAR, e) for e in LINEAR["embedding"]])
    new, moments = descended(LINEAR, zeros(LINEAR), pulls_of(LINEAR, made), rate=1, momentum=0.9, decay=0)
    assert all(np.array_equal(new[name], LINEAR[name]) for name in LINEAR)
    assert not any(array.any() for array in moments.values())


def test_a_linear_step_goes_as_far_as_its_formula_says() -> None:
    """One peer, its embedding held: made projections move by rate (|e|^2 + 1) (trained - made)."""
    net = {**LINEAR, "embedding": floats([[0.6, 0.8]])}
    before = generate(net, net["embedding"][0])
    gradient = pull(net, net["embedding"][0], before - TRAINED[0], 1.0)
    new, _ = descended(net, zeros(net), [(0, gradient)], rate=0.1, momentum=0, decay=0)
    moved = generate(new, net["embedding"][0]) - before
    np.testing.assert_allclose(moved, 0.1 * 2 * (TRAINED[0] - before), rtol=1e-5)


def test_what_is_made_comes_nearer_to_what_was_trained() -> None:
    net, moments = deep(1), zeros(deep(1))
    apart = []
    for _ in range(30):
        apart.append(sum(np.abs(generate(net, net["embedding"][k]) - TRAINED[k]).sum() for k in range(2)))
        net, moments = descended(net, moments, pulls_of(net), **SETTINGS)
    assert apart[-1] < 0.7 * apart[0]


def test_momentum_is_torchs_and_who_took_no_part_keeps_its_embedding() -> None:
    net, moments = dict(LINEAR), zeros(LINEAR)
    bias = torch.tensor([0.1, 0.2], requires_grad=True)
    optimizer = torch.optim.SGD([bias], lr=0.01, momentum=0.9, weight_decay=0.001)
    for _ in range(3):
        gradient = {"weight0": np.zeros((2, 2)), "bias0": np.array([0.4, 0.15]), "embedding": np.ones(2)}
        net, moments = descended(net, moments, [(0, gradient)], **SETTINGS)
        bias.grad = torch.tensor([0.4, 0.15])
        optimizer.step()
    np.testing.assert_allclose(net["bias0"], bias.detach().numpy(), rtol=1e-5)
    assert np.array_equal(net["embedding"][1], LINEAR["embedding"][1]) and not moments["embedding"][1].any()


# ---------------------------------------------------------------- in a federation


def site_of(peer: str) -> learning.Site:
    plan = learning.small_plan(
        method="fedtp", backbone="vit_tiny", epochs_per_round=1, fedtp={"hidden": 2, "rate": 0.1}
    )
    return learning.site(plan, learning.dataset(16, 4, 4, seed=PEERS.index(peer)), peer)


def hyper_of(model: torch.nn.Module) -> Hypernetwork:
    assert isinstance(model, PersonalTransformer)
    return model.hyper


@pytest.fixture(scope="module")
def second_round(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Trained], dict[str, StartFiles]]:
    folder = tmp_path_factory.mktemp("fedtp")
    done = {peer: first_round(site_of(peer), folder / peer) for peer in PEERS}
    paths = {Peer(peer): one.out for peer, one in done.items()}
    samples = {Peer("ash"): 1, Peer("birch"): 3}
    digest = fuse_files("weighted_mean", paths, samples, read_schema(paths[Peer("ash")]), folder / "fused")
    said = {Peer(p): one.state.best.said for p, one in done.items() if one.state.best}
    common = {"base": folder / "fused", "base_sha256": digest, "said": said, "samples": samples, "full_set": paths}
    return done, {peer: replace(one.next, **common) for peer, one in done.items()}


def test_each_hospital_begins_with_projections_of_its_own_and_the_same_rest() -> None:
    plan = site_of("ash").plan
    model = PersonalTransformer(plan)
    initialise(model, plan.seed)
    before = model.flat(model.state_dict())
    made = [generate(model.hyper.read()[0], model.hyper.embedding_of(peer)) for peer in PEERS]
    assert not np.array_equal(made[0], made[1])
    assert np.abs(made[0] - before).mean() < np.abs(before).mean()  # as large as projections are


def test_every_peer_derives_the_same_hypernetwork_and_it_never_travels(
    second_round: tuple[dict[str, Trained], dict[str, StartFiles]],
) -> None:
    done, starts = second_round
    models = {peer: adopted(site_of(peer), files)[0].model for peer, files in starts.items()}
    prints = {fingerprint(*hyper_of(model).read()) for model in models.values()}
    assert len(prints) == 1
    before = PersonalTransformer(site_of("ash").plan).hyper
    assert prints != {fingerprint(*before.read())}  # it has learnt
    for peer, model in models.items():
        sent, own = read_weights(done[peer].out), read_weights(done[peer].own)
        assert not [name for name in sent if name.startswith("hyper.")]
        assert any(name.startswith("hyper.moment_") for name in own)
        state, fused = model.state_dict(), read_weights(starts[peer].base)
        personal = set(models[peer].projections)  # type: ignore[arg-type]
        assert len(personal) == 18
        for name in fused:
            assert np.array_equal(state[name].numpy(), fused[name]) is (name not in personal), name
            assert np.array_equal(state[name].numpy(), sent[name]) is False or name not in personal, name


def test_the_step_is_that_of_the_checkpoints_weighted_by_images(
    second_round: tuple[dict[str, Trained], dict[str, StartFiles]],
) -> None:
    done, starts = second_round
    model = PersonalTransformer(site_of("ash").plan)
    for peer in PEERS:
        model.hyper.add(peer)
    net, moments = model.hyper.read()
    pulls = []
    for row, (peer, share) in enumerate(zip(PEERS, SHARES, strict=True)):
        trained = model.flat({n: torch.tensor(a) for n, a in read_weights(done[peer].out).items()})
        embedding = net["embedding"][row]
        pulls.append((row, pull(net, embedding, generate(net, embedding) - trained, share)))
    new, _ = descended(net, moments, pulls, rate=0.1, momentum=0.9, decay=0.001)
    here = adopted(site_of("birch"), starts["birch"])[0].model
    expected = generate(new, new["embedding"][1]).astype(np.float32)
    assert np.array_equal(model.flat(here.state_dict()).astype(np.float32), expected)


def test_a_killed_process_takes_the_same_step_once(
    second_round: tuple[dict[str, Trained], dict[str, StartFiles]],
) -> None:
    _, starts = second_round
    one, other = (adopted(site_of("ash"), starts["ash"])[0].model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_next_round_goes_on_and_keeps_the_momentum(
    second_round: tuple[dict[str, Trained], dict[str, StartFiles]], tmp_path: Path
) -> None:
    _, starts = second_round
    done = train(site_of("ash"), tmp_path, starts["ash"])
    own = read_weights(done.own)
    assert done.state.best is not None
    learnt = adopted(site_of("ash"), starts["ash"])[0].model
    assert done.state.best.said == {"hypernetwork": fingerprint(*hyper_of(learnt).read())}
    assert np.abs(own["hyper.moment_bias2"]).sum() > 0
    moments = hyper_of(learnt).read()[1]  # what the next step begins with
    assert all(np.array_equal(moments[name], own[f"hyper.moment_{name}"]) for name in moments)


def test_a_peer_with_another_hypernetwork_is_named_and_changes_nothing_here(
    second_round: tuple[dict[str, Trained], dict[str, StartFiles]], caplog: pytest.LogCaptureFixture
) -> None:
    """Its disk was lost, or it lies: that number is signed for good, and a refusal would be the end of the run."""
    _, starts = second_round
    right = adopted(site_of("ash"), starts["ash"])[0].model.state_dict()
    assert not caplog.records
    false = replace(starts["ash"], said={**starts["ash"].said, Peer("birch"): {"hypernetwork": 1.0}})
    found = adopted(site_of("ash"), false)[0].model.state_dict()
    assert all(torch.equal(found[name], right[name]) for name in right)
    assert "not the hypernetwork of birch in round 1" in caplog.text


def test_one_checkpoint_with_projections_of_1e9_does_not_end_the_run_of_all(
    second_round: tuple[dict[str, Trained], dict[str, StartFiles]], tmp_path: Path
) -> None:
    """They pass every check. Everybody's hypernetwork then made projections far beyond 1e9, which no peer takes, and
    it keeps what it has learned."""
    done, starts = second_round
    model = PersonalTransformer(site_of("ash").plan)
    evil = {
        n: np.full_like(a, 1e9) if n in model.projections else a for n, a in read_weights(done["birch"].out).items()
    }
    write_weights(tmp_path / "evil", evil)
    full_set = {**starts["ash"].full_set, Peer("birch"): tmp_path / "evil"}
    honest, found = (
        model.flat(adopted(site_of("ash"), files)[0].model.state_dict())
        for files in (starts["ash"], replace(starts["ash"], full_set=full_set))
    )
    assert np.abs(found).max() < 2 * np.abs(honest).max()


def test_a_hospital_that_lost_its_hypernetwork_says_so_and_goes_on_with_a_new_one(
    second_round: tuple[dict[str, Trained], dict[str, StartFiles]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    _, starts = second_round
    third = replace(starts["ash"], round=3)  # what was said of it in round 2 is another than the first
    said = {peer: {"hypernetwork": 7.0} for peer in third.said}
    done = train(site_of("ash"), tmp_path, replace(third, said=said, mine=None, mine_sha256=None))
    assert "not the hypernetwork of ash, birch in round 2" in caplog.text
    assert done.state.best is not None and done.state.best.said["hypernetwork"] != 7.0


def test_only_the_hypernetwork_stays() -> None:
    model = PersonalTransformer(site_of("ash").plan)
    assert FEDTP.travels(model) == {name for name in model.state_dict() if not name.startswith("hyper.")}
