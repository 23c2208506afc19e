"""Trunks: their features, stages and norms, first values, and libraries that are asked for by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from learning import CPU, SIZE
from torch import nn

from hsl_node.errors import ConfigError
from hsl_node.federation.plan import Plan
from hsl_node.train.networks.backbone import Trunk
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.networks.initial import initialise
from hsl_node.train.networks.vit import VisionTransformer, projection_names

OURS = ["tiny", "resnet18", "resnet34", "resnet50", "efficientnet_lite0", "vit_tiny"]


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def trunk_of(backbone: str, norm: str = "batch") -> Trunk:
    trunk = Trunk(backbone, norm, SIZE)
    initialise(trunk, 1)
    return trunk


@pytest.mark.parametrize(
    ("backbone", "features"),
    [
        ("resnet18", 512),
        ("resnet34", 512),
        ("resnet50", 2048),
        ("tiny", 64),
        ("efficientnet_lite0", 1280),
        ("vit_tiny", 128),
        ("torchvision:mobilenet_v3_small", 1024),
        ("timm:test_resnet", 96),
    ],
)
def test_each_backbone_gives_its_features(backbone: str, features: int) -> None:
    if backbone.startswith("timm:"):
        pytest.importorskip("timm", reason="the timm extra is not installed")
    trunk = Trunk(backbone, image_size=SIZE).eval()
    assert trunk.features == features
    assert trunk(images(2)).shape == (2, features)


def test_bfloat16_stays_inside_the_trunk() -> None:
    trunk = Trunk("tiny").eval()
    exact = trunk(images())
    trunk.precision = torch.bfloat16
    rounded = trunk(images())
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert CPU.dtype == torch.float32


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("tiny", [(16, 16), (32, 8), (64, 4)]),
        ("resnet18", [(64, 16), (64, 8), (128, 4), (256, 2), (512, 1)]),
        ("resnet50", [(64, 16), (256, 8), (512, 4), (1024, 2), (2048, 1)]),
        ("efficientnet_lite0", [(32, 16), (24, 8), (40, 4), (112, 2), (320, 1)]),
        ("vit_tiny", [(128, 8)] * 7),
    ],
)
def test_stages_are_maps_of_the_stem_and_each_stage(backbone: str, expected: list[tuple[int, int]]) -> None:
    trunk = trunk_of(backbone).eval()
    feature, stages = trunk.with_stages(images(2))
    assert [(s.shape[1], s.shape[2]) for s in stages] == expected
    assert all(s.shape[0] == 2 and s.shape[2] == s.shape[3] for s in stages)
    assert torch.equal(feature, trunk(images(2)))  # looking changes nothing


@pytest.mark.parametrize("backbone", ["tiny", "resnet18", "resnet50"])
def test_stages_come_before_their_last_relu(backbone: str) -> None:
    trunk = trunk_of(backbone).eval()
    feature, stages = trunk.with_stages(images(2))
    assert all((s < 0).any() for s in stages)
    torch.testing.assert_close(F.relu(stages[-1]).mean((2, 3)), feature)


def test_gradients_pass_through_stages_and_features_at_once() -> None:
    classifier = Classifier(Plan(backbone="tiny", image_size=SIZE))
    initialise(classifier, 1)
    logits, stages = classifier.with_stages(images(2))
    (logits.sum() + sum(s.square().mean() for s in stages)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in classifier.parameters())


def test_a_librarys_network_has_no_stages_that_we_know_of() -> None:
    with pytest.raises(ConfigError, match="stages of its network, and those of torchvision:mobilenet_v3_small"):
        Trunk("torchvision:mobilenet_v3_small", image_size=SIZE).with_stages(images(2))


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("backbone", ["tiny", "resnet18", "resnet34", "resnet50", "efficientnet_lite0"])
def test_group_norm_takes_the_place_of_every_batch_norm(backbone: str) -> None:
    batch, group = trunk_of(backbone), trunk_of(backbone, "group").eval()
    places = {name for name, m in batch.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert places and places == {name for name, m in group.named_modules() if isinstance(m, nn.GroupNorm)}
    assert not any("running" in name for name in group.state_dict())
    together, apart = group(images(4)), torch.cat([group(one[None]) for one in images(4)])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)  # an image is normalised by itself
    assert torch.equal(group.train()(images(4)), together) and (together != 0).any()


def test_group_norm_is_refused_where_norms_of_a_library_are_activations_too() -> None:
    pytest.importorskip("timm", reason="the timm extra is not installed")
    with pytest.raises(ConfigError, match='norm = "group" is not to be had for timm:tf_efficientnet_lite0'):
        Trunk("timm:tf_efficientnet_lite0", "group", SIZE)


# ---------------------------------------------------------------- first values


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "vit_tiny", "torchvision:swin_t", "timm:test_vit"])
def test_first_values_follow_from_the_seed_alone_for_every_kind_of_layer(backbone: str) -> None:
    if backbone.startswith("timm:"):
        pytest.importorskip("timm", reason="the timm extra is not installed")
    found = []
    size = 160 if backbone == "timm:test_vit" else 32
    for seed in (5, 6):
        torch.manual_seed(seed)
        trunk = Trunk(backbone, image_size=size)
        initialise(trunk, 1)
        found.append(trunk.state_dict())
    assert found[0] and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert torch.isfinite(trunk.eval()(torch.rand(2, 3, size, size))).all()


# ---------------------------------------------------------------- the small transformer


def test_vit_tiny_is_as_large_as_fedtps() -> None:
    """Published: the hypernetwork makes 3 x 512 x 128 numbers for each of 6 blocks."""
    model = VisionTransformer(32)
    names = projection_names(model)
    assert len(names) == 18
    assert sum(model.get_parameter(name).numel() for name in names) == 6 * 3 * 512 * 128
    assert projection_names(model, "q") == [f"blocks.{n}.attention.q.weight" for n in range(6)]


def test_no_tensor_of_vit_tiny_depends_on_the_number_of_patches() -> None:
    small, large = VisionTransformer(32).state_dict(), VisionTransformer(64).state_dict()
    assert {n: t.shape for n, t in small.items()} == {n: t.shape for n, t in large.items()}


def test_vit_tiny_knows_where_a_patch_lies() -> None:
    trunk = trunk_of("vit_tiny").eval()
    image = images(1)
    moved = image.roll(8, dims=3)  # two patches to the right
    assert not torch.allclose(trunk(image), trunk(moved), atol=1e-4)


# ---------------------------------------------------------------- names and sizes


@pytest.mark.parametrize(
    ("backbone", "size", "words"),
    [
        ("torchvision:resnet19", 32, "has no classifier 'resnet19'"),
        ("torchvision:vit_b_16", 64, "does not turn an image of 64 px into features"),
        ("torchvision:googlenet", 96, "more than one row of features"),
        ("timm:hf_hub_somewhere", 32, "has no model 'hf_hub_somewhere'"),
    ],
)
def test_a_network_that_is_not_there_or_not_for_this_size_is_refused(backbone: str, size: int, words: str) -> None:
    if backbone.startswith("timm:"):
        pytest.importorskip("timm", reason="the timm extra is not installed")
    with pytest.raises(ConfigError, match=words):
        Trunk(backbone, image_size=size)


def test_a_network_of_timm_gets_images_normalised_as_it_was_trained() -> None:
    pytest.importorskip("timm", reason="the timm extra is not installed")
    trunk = Trunk("timm:vit_base_patch32_clip_quickgelu_224")
    white = (torch.ones(3) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert trunk.scale is not None
    found = white.view(3, 1, 1) * trunk.scale + trunk.shift
    torch.testing.assert_close(found.flatten(), torch.tensor([1.93034, 2.07488, 2.1459]), atol=1e-5, rtol=0)
    assert "scale" not in trunk.state_dict()  # a constant: it does not travel


# ---------------------------------------------------------------- export


@pytest.mark.sample(2)
@pytest.mark.parametrize(("backbone", "norm"), [("tiny", "group"), ("resnet18", "batch")])
def test_norms_become_onnx(tmp_path: Path, backbone: str, norm: str) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    from onnx.reference import ReferenceEvaluator

    model = Classifier(
        Plan.model_validate({"backbone": backbone, "norm": norm, "image_size": SIZE, "recalibrate": False})
    ).eval()
    initialise(model, 1)
    free = {"image_BCHW": {0: torch.export.Dim("images")}}
    torch.onnx.export(
        model, (images(2),), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=free, external_data=False, verbose=False
    )
    graph = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(graph)
    (found,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: images(3).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images(3)).detach(), atol=1e-4, rtol=1e-4)
