"""A real generator file for FedKTL: loaded, used, and refused with words where it is not what the plan names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import learning
import numpy as np
import pytest
import torch
from rounds import first_round, train

from hsl_node.errors import ConfigError
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import UNALTERED
from hsl_node.study.simulate import begun
from hsl_node.train.networks.generator_file import open_generator
from hsl_node.train.start import begin
from hsl_node.train.worker import Worker
from hsl_node.weights.checkpoint_file import read_weights
from hsl_node.weights.whole import sha256_of

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
LATENT, SIDE = 4, 8


def generator_file(path: Path, seed: int = 0, end: str = "Sigmoid", channels: int = 3) -> str:
    """sigmoid(z W) as (n, channels, 8, 8); gives its sha256."""
    rng, h = np.random.default_rng(seed), onnx.helper
    weights = rng.standard_normal((LATENT, channels * SIDE * SIDE)).astype(np.float32)
    shape = np.array([-1, channels, SIDE, SIDE] if channels else [-1, 2])
    nodes = [
        h.make_node("MatMul", ["z", "W"], ["x"]),
        h.make_node(end, ["x"], ["y"]),
        h.make_node("Reshape", ["y", "shape"], ["images"]),
    ]
    graph = h.make_graph(
        nodes,
        "generator",
        [h.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n", LATENT])],
        [h.make_tensor_value_info("images", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weights, "W"), onnx.numpy_helper.from_array(shape, "shape")],
    )
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 18)]), path)
    return sha256_of(path)


def site_of(path: Path | None, sha256: str, latent: int = LATENT) -> learning.Site:
    plan = learning.small_plan(
        method="fedktl", augment=UNALTERED, fedktl={"generator": sha256, "latent": latent}, epochs_per_round=1
    )
    return replace(learning.site(plan, learning.dataset(16, 8, 4), "ash"), generator=path)


def test_its_images_are_those_of_its_latents_at_the_plans_size(tmp_path: Path) -> None:
    sha256 = generator_file(tmp_path / "g.onnx")
    found = open_generator(tmp_path / "g.onnx", sha256, LATENT, learning.SIZE)
    images = found(torch.zeros(2, LATENT))
    assert images.shape == (2, 3, learning.SIZE, learning.SIZE)
    half = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])  # sigmoid(0), normalised
    torch.testing.assert_close(images, half.view(1, 3, 1, 1).expand_as(images), atol=1e-5, rtol=0)
    assert found(torch.randn(5, LATENT)).std() > 0.1


def test_other_weights_in_the_file_change_what_is_trained_and_the_same_ones_do_not(tmp_path: Path) -> None:
    digests = [generator_file(tmp_path / f"{n}.onnx", seed) for n, seed in enumerate((0, 0, 1))]
    assert digests[0] == digests[1] != digests[2]
    done, before = [], None
    for n, sha256 in enumerate(digests):
        site = site_of(tmp_path / f"{n}.onnx", sha256)
        first = first_round(site, tmp_path / f"run{n}")
        start = replace(first.next, full_set={Peer("ash"): first.out})
        done.append(read_weights(train(site, tmp_path / f"run{n}", start).own))
        assert before is None or first.out.read_bytes() == before  # the first round has no images of it
        before = first.out.read_bytes()
        assert begin(site, start).beside.images.shape == (2, 3, learning.SIZE, learning.SIZE)
    one, same, other = (own["trunk.net.conv1.weight"] for own in done)
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no path", "the plan's generator is the file with sha256 .*node.toml names no file"),
        ("gone", r"generator .*g.onnx: No such file"),
        ("another", "its sha256 is .*, the plan names"),
        ("no onnx", "cannot be read"),
        ("latent", "takes no latents of 7 numbers"),
        ("form", "makes an array of .* x 2 of two latents"),
        ("range", "makes values from -.* to .* of two latents"),
    ],
)
def test_what_is_no_such_generator_is_refused_before_the_run_begins(tmp_path: Path, how: str, words: str) -> None:
    path: Path | None = tmp_path / "g.onnx"
    sha256 = generator_file(
        tmp_path / "g.onnx", channels=0 if how == "form" else 3, end="Identity" if how == "range" else "Sigmoid"
    )
    if how == "no path":
        path = None
    elif how == "gone":
        (tmp_path / "g.onnx").unlink()
    elif how == "another":
        generator_file(tmp_path / "g.onnx", seed=1)
    elif how == "no onnx":
        (tmp_path / "g.onnx").write_bytes(b"PK\x03\x04 a TorchScript file, say")
        sha256 = sha256_of(tmp_path / "g.onnx")
    site = site_of(path, sha256, 7 if how == "latent" else LATENT)
    with pytest.raises(ConfigError, match=words) as raised:
        begun({Peer("ash"): site}, tmp_path / "run")
    assert raised.value.remedy
    assert not (tmp_path / "run" / "fused").exists() or not list((tmp_path / "run" / "fused").iterdir())


def test_weights_beside_the_file_are_not_taken(tmp_path: Path) -> None:
    """They are in nobody's sha256."""
    generator_file(tmp_path / "g.onnx")
    onnx.save(onnx.load(tmp_path / "g.onnx"), tmp_path / "e.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(ConfigError, match=r"cannot be read|takes no latents"):
        open_generator(tmp_path / "e.onnx", sha256_of(tmp_path / "e.onnx"), LATENT, SIDE)


def test_the_trainers_first_job_asks_for_it(tmp_path: Path) -> None:
    worker = Worker(tmp_path, lambda event: None)
    worker.__dict__["site"] = site_of(None, "0" * 64)
    with pytest.raises(ConfigError, match=r"node.toml names no file"):
        worker.run({"job": "init", "out": str(tmp_path / "initial")})
