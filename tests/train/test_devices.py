"""Several devices of one site give the round that one gives, but for rounding. Here: processes on the CPU, gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import threading
import tomllib
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import learning
import pytest
import ranks
import tomli_w
import torch
from every_method import runnable
from torch.multiprocessing import ProcessRaisedException
from trainer_process import Event, Process, state_of

from hsl_node.errors import ConfigError
from hsl_node.host.layout import Layout
from hsl_node.train import devices
from hsl_node.train.hardware import prepare
from hsl_node.train.methods import method_of
from hsl_node.train.site import open_site
from hsl_node.weights.checkpoint_file import read_weights

CASES = [("group", 8, 0), ("batch", 8, 0), ("batch", 7, 0), ("batch", 2, 0), ("group", 9, 2), ("batch", 9, 2)]


@pytest.fixture(autouse=True)
def deterministic() -> None:
    prepare(device="cpu", threads=1, precision="float32", image_size=learning.SIZE)


@pytest.mark.parametrize(
    ("count", "parts"),
    [(2, [[4], [4], [3], [1], [2, 2], [2, 2]]), (3, [[2], [2], [2], [2], [3], [3]])],
)
def test_a_batchs_gradient_statistics_and_loss_are_those_of_one_device(
    count: int, parts: list[list[int]], tmp_path: Path
) -> None:
    """Also of a batch with fewer images than devices, of which each computes all. Micro-batches are a device's own:
    with them BatchNorm sees what is computed at one time, here as well as there."""
    found = ranks.on(count, tmp_path, ranks.gradient, CASES)
    for case, (norm, images, micro_batch) in enumerate(CASES):
        values, sizes = found[0][case]
        assert sizes == parts[case], (norm, images, micro_batch)
        for other in found[1:]:
            assert all(torch.equal(values[name], other[case][0][name]) for name in values)
        if (norm, micro_batch, count) == ("batch", 2, 2):
            continue
        whole, _ = ranks.gradient(norm, images, 0)
        assert values.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(values[name].float(), whole[name].float(), rtol=1e-4, atol=1e-6)


def test_two_devices_train_the_round_that_one_trains_but_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HSL without dropout, of which each device draws its own."""
    monkeypatch.setattr("hsl_node.train.networks.mmoe.EXPERT_DROPOUT", 0.0)
    monkeypatch.setattr("hsl_node.train.networks.mmoe.TOWER_DROPOUT", 0.0)
    methods = ["fedavg", "hsl"]
    both = ranks.on(2, tmp_path, ranks.one_round, [(method, tmp_path / "two" / method) for method in methods])
    for number, method in enumerate(methods):
        one = ranks.one_round(method, tmp_path / "one" / method)
        first, second = both[0][number], both[1][number]
        assert first.state == second.state and first.state.epoch == one.state.epoch == 2
        assert first.state.steps == one.state.steps and first.state.best.epoch == one.state.best.epoch
        assert first.state.best.validation.loss == pytest.approx(one.state.best.validation.loss, rel=1e-4)
        start = read_weights(tmp_path / "one" / method / "fused" / "r000000.safetensors")
        alone, together = read_weights(one.own), read_weights(first.own)
        assert alone.keys() == together.keys()
        for name, expected in alone.items():
            assert abs(together[name] - expected).max() < 1e-4, name
        moved = max(abs(alone[name] - start[name]).max() for name in start if alone[name].dtype.kind == "f")
        assert moved > 1e-2


@pytest.mark.full
def test_every_method_that_is_not_refused_keeps_the_same_model_on_each_device(tmp_path: Path) -> None:
    methods = [name for name in runnable() if not method_of(name).one_device]
    first, second = ranks.on(2, tmp_path, ranks.model_after, [(name, tmp_path / name) for name in methods])
    assert len(methods) == len(runnable()) - 2
    for name, here, there in zip(methods, first, second, strict=True):
        assert all(torch.equal(here[tensor], there[tensor]) for tensor in here), name


def test_a_process_that_opened_other_images_than_the_first_does_not_train(tmp_path: Path) -> None:
    """A hospital may add some between the trainer's start and a round's."""
    with pytest.raises(ProcessRaisedException, match="TrainerError: the images have changed since this run's start"):
        ranks.on(2, tmp_path, ranks.gradient, [], images=42)


class _Twice:
    """What a first process is told, and a second one cannot be."""

    given = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        self.given += 1
        if self.given == 2:
            raise OSError("no memory for another process")
        return _Twice, ()


def follow(rank: int, place: str, told: _Twice) -> None:
    threading.Event().wait()


def test_processes_that_were_started_are_ended_where_a_further_one_cannot_be() -> None:
    site = learning.site()
    site = replace(site, hardware=replace(site.hardware, devices=3))
    with (
        pytest.raises(OSError, match="no memory for another"),
        devices.company(site, follow, (told := _Twice(),), pytest.fail),
    ):
        pytest.fail("it trains without them")
    assert told.given == 2
    for process in multiprocessing.active_children():
        assert wait([process.sentinel], 30)  # its exit status is for the thread that watches it


# ---------------------------------------------------------------- the trainer


def state_with(folder: Path, devices: int, **changes: Any) -> Path:
    state = state_of(folder, **changes)
    node = tomllib.loads((state / "node.toml").read_text())
    node["train"]["gpus"] = devices
    (state / "node.toml").write_text(tomli_w.dumps(node))
    return state


def start(state: Path) -> tuple[Process, dict[str, Any]]:
    process, path = Process(state), state / "fused" / "r000000.safetensors"
    done = process.do("initialised", job="init", out=str(path))[-1]
    assert done["device"] == "cpu x 2"
    base = {"base": str(path), "base_sha256": done["sha256"]}
    outputs = {"out": str(state / "r1.safetensors"), "own": str(Layout(state).own(1))}
    return process, {"job": "train", "round": 1, **outputs, **base}


def others_of(process: Process) -> list[int]:
    children = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.full
def test_killed_here_and_there_two_devices_end_with_the_bytes_of_two_that_nobody_killed(tmp_path: Path) -> None:
    def is_in_epoch_2(event: Event) -> bool:
        return event["event"] == "progress" and event["epoch"] == 2

    untouched = state_with(tmp_path / "a", 2)
    process, job = start(untouched)
    expected = process.do("trained", **job)[-1]
    process.close()

    state = state_with(tmp_path / "b", 2)
    process, job = start(state)
    process.send(json.dumps(job))
    process.until(lambda e: e["event"] == "epoch")
    (other,) = others_of(process)
    os.kill(other, signal.SIGKILL)
    error = process.until(lambda e: e["event"] == "error")[-1]
    assert "the process of device 2, of those that train together, ended (exit status -9)" in error["message"]
    assert "train.gpus = 1" in error["remedy"] and process.popen.wait() == 1
    process.close()

    process, job = start(state)
    process.send(json.dumps(job))
    process.until(is_in_epoch_2)
    (other,) = others_of(process)
    gone = os.pidfd_open(other)
    process.close()  # SIGKILL
    assert select.select([gone], [], [], 60.0)[0]  # the other one leaves by itself
    os.close(gone)

    process, job = start(state)
    assert process.do("trained", **job)[-1] == expected
    process.close()
    assert (state / "r1.safetensors").read_bytes() == (untouched / "r1.safetensors").read_bytes()
    assert learning.same_bytes(state / "trainer", untouched / "trainer")


@pytest.mark.parametrize("method", ["harmofl", "fedppkt"])
def test_a_method_that_cannot_be_computed_in_parts_is_refused_at_the_start(method: str, tmp_path: Path) -> None:
    state = state_with(tmp_path, 2, method=method)
    with pytest.raises(ConfigError, match=f"{method} trains on one device: ") as caught:
        open_site(state)
    assert caught.value.remedy == "set train.gpus = 1 in node.toml"
