"""Which device is taken: a GPU counts only where torch has code for it. The GPUs here are told, not real."""

from __future__ import annotations

import logging

import pytest
import torch

from hsl_node.errors import ConfigError
from hsl_node.train import hardware
from hsl_node.train.hardware import prepare


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number=0: f"GPU {number}")
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


def told(monkeypatch: pytest.MonkeyPatch, code: list[str], *gpus: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: code)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number=0: gpus[number])


@pytest.mark.parametrize(
    ("code", "gpu", "runs"),
    [
        (["sm_75", "sm_80", "sm_90"], (8, 0), True),
        (["sm_75", "sm_80", "sm_90"], (8, 6), True),  # its generation's code, from an earlier step
        (["sm_86"], (8, 0), False),  # a later step than the GPU's
        (["sm_75", "sm_80"], (6, 1), False),  # a GTX 1080 Ti, for which current builds have no code
        (["sm_80", "sm_90"], (12, 0), False),  # newer than all the code, and none that a driver could translate
        (["sm_80", "sm_90", "compute_90"], (12, 0), True),
        (["compute_90"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),  # a letter: this GPU alone
        ([], (9, 0), False),  # a torch without CUDA
    ],
)
def test_a_gpu_counts_where_torch_has_code_for_it(
    machine: pytest.MonkeyPatch, code: list[str], gpu: tuple[int, int], runs: bool
) -> None:
    told(machine, code, gpu)
    assert hardware._has_code_for(0) is runs


def test_auto_trains_on_the_cpu_and_says_why_where_torch_has_no_code_for_the_gpu(
    machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told(machine, ["sm_75", "sm_80"], (6, 1))
    with caplog.at_level(logging.WARNING):
        assert prepare(device="auto", threads=1, precision="float32").device.type == "cpu"
    assert "no code for GPU 0 (compute capability 6.1); it has code for sm_75 sm_80" in caplog.text


def test_auto_takes_the_first_gpu_that_works(machine: pytest.MonkeyPatch) -> None:
    told(machine, ["sm_80"], (6, 1), (8, 0))
    assert prepare(device="auto", threads=1, precision="float32").device == torch.device("cuda:1")
    told(machine, ["sm_80"], (8, 0), (8, 6))
    assert prepare(device="auto", threads=1, precision="float32").device == torch.device("cuda")


def test_a_gpu_that_is_asked_for_and_has_no_code_is_refused_with_the_remedy(machine: pytest.MonkeyPatch) -> None:
    told(machine, ["sm_80"], (8, 0), (6, 1))
    with pytest.raises(ConfigError, match=r'train.device = "cuda:1".*no code for GPU 1') as caught:
        prepare(device="cuda:1", threads=1, precision="float32")
    assert "build of torch for this GPU" in caught.value.remedy
    assert prepare(device="cuda:0", threads=1, precision="float32").device == torch.device("cuda:0")


def test_depthwise_networks_train_in_float32_on_a_cpu_that_has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: True)
    found = {
        backbone: prepare(device="cpu", threads=1, image_size=96, backbone=backbone)
        for backbone in ("resnet18", "efficientnet_lite0", "timm:mobilenetv3_large_100")
    }
    assert [hw.precision for hw in found.values()] == ["bfloat16", "float32", "float32"]
    assert {hw.memory_format for hw in found.values()} == {torch.channels_last}
    asked = prepare(device="cpu", threads=1, precision="bfloat16", image_size=96, backbone="efficientnet_lite0")
    assert asked.precision == "bfloat16"


def test_several_devices_are_those_from_the_first_one_on(machine: pytest.MonkeyPatch) -> None:
    told(machine, ["sm_80"], (6, 1), (8, 0), (8, 6))
    found = [prepare(device="auto", threads=1, precision="float32", devices=2, rank=rank) for rank in range(2)]
    assert [str(hardware.device) for hardware in found] == ["cuda:1", "cuda:2"]
    assert found[0].facts["device"] == "cuda:1 x 2"
    assert prepare(device="auto", threads=1, precision="float32").facts["device"] == "cuda:1"
    with pytest.raises(ConfigError, match=r'train.gpus = 2 from "cuda:2" on: torch sees 3 CUDA device') as caught:
        prepare(device="cuda:2", threads=1, precision="float32", devices=2)
    assert "train.gpus = 1" in caught.value.remedy
    told(machine, ["sm_80"])
    with pytest.raises(ConfigError, match=r'train.gpus = 2 from "cpu" on: torch sees 0 CUDA device'):
        prepare(device="auto", threads=1, precision="float32", devices=2)


def test_several_processes_on_the_processor_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(hardware, "available_cores", lambda: 8)
    assert [prepare(device="cpu", precision="float32", devices=n).threads for n in (2, 3, 16)] == [4, 2, 1]
    torch.set_num_threads(before)


def test_threads_follow_the_quota_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(hardware, "available_cores", lambda: 3)
    assert prepare(device="cpu", precision="float32").threads == 3
    torch.set_num_threads(before)
