"""The trainer as a real process: its protocol, what it says, and that SIGKILL at any moment costs nothing but time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import learning
import pytest
from trainer_process import Event, Process, state_of

from hsl_node.host.layout import Layout
from hsl_node.train.lock import LOCK_FILE, hold_lock
from hsl_node.weights.checkpoint_file import read_schema
from hsl_node.weights.whole import sha256_of


@pytest.fixture
def start() -> Iterator[Callable[[Path], Process]]:
    running: list[Process] = []

    def started(state: Path) -> Process:
        running.append(Process(state))
        running[-1].until(lambda e: e["event"] == "ready")
        return running[-1]

    yield started
    for process in running:
        process.close()


def initial(process: Process, state: Path) -> dict[str, Any]:
    path = state / "fused" / "r000000.safetensors"
    done = process.do("initialised", job="init", out=str(path))[-1]
    return {"base": str(path), "base_sha256": done["sha256"]}


def outputs(state: Path, round: int) -> dict[str, str]:
    return {"out": str(state / f"r{round}.safetensors"), "own": str(Layout(state).own(round))}


def train(process: Process, state: Path, round: int, base: dict[str, Any]) -> list[Event]:
    return process.do("trained", job="train", round=round, **outputs(state, round), **base)


def two_rounds(process: Process, state: Path, base: dict[str, Any]) -> Event:
    """Round 2 starts from what round 1 gave, as in a federation of one."""
    first = train(process, state, 1, base)[-1]
    second = {"base": str(state / "r1.safetensors"), "base_sha256": first["sha256"]}
    return train(process, state, 2, second)[-1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Event, list[Event], Event]:
    """A state directory after two rounds that nothing disturbed; what `init`, round 1 and round 2 said."""
    state = state_of(tmp_path_factory.mktemp("undisturbed"))
    process = Process(state)
    try:
        first = process.do("initialised", job="init", out=str(state / "fused" / "r000000.safetensors"))[-1]
        base = initial(process, state)
        events = train(process, state, 1, base)
        return state, first, events, two_rounds(process, state, base)
    finally:
        process.close()


def test_a_round_says_what_the_supervisor_needs(undisturbed: tuple[Path, Event, list[Event], Event]) -> None:
    state, first, events, _ = undisturbed
    path, out = state / "fused" / "r000000.safetensors", state / "r1.safetensors"
    assert first["sha256"] == sha256_of(path) and first["bytes"] == path.stat().st_size
    assert sum(first["images"].values()) == 60 and first["images"]["train"] == 36
    assert (first["device"], first["threads"], first["precision"]) == ("cpu", 1, "float32")
    assert first["warnings"] == []
    assert first["split"]["by"] == "patient" and first["split"]["groups"] == {"train": 36, "validation": 6, "test": 18}
    assert first["parameters"] > 0 and set(first["versions"]) >= {"torch", "numpy", "hsl_node"}

    trained = events[-1]
    assert trained["sha256"] == sha256_of(out) and trained["bytes"] == out.stat().st_size
    assert (trained["round"], trained["samples"], trained["epochs"]) == (1, 36, 2)
    epochs = {e["epoch"]: e for e in events if e["event"] == "epoch"}
    assert trained["score"] == epochs[trained["best_epoch"]]["score"]
    assert read_schema(out).digest == read_schema(path).digest  # what peers check against
    assert [e["round"] for e in events if e["event"] == "validated"] == [0]


@pytest.mark.sample(2, "real trainers killed")
def test_threat_22_killed_with_sigkill_again_and_again_the_run_ends_with_the_same_bytes(
    tmp_path: Path, start: Callable[[Path], Process], undisturbed: tuple[Path, Event, list[Event], Event]
) -> None:
    """Four kills in one round: before its first epoch, after one, in the middle of one, and after the last."""
    moments: list[Callable[[Event], bool]] = [
        lambda e: e["event"] == "validated",
        lambda e: e["event"] == "epoch" and e["epoch"] == 1,
        lambda e: e["event"] == "progress" and e["epoch"] == 2,
        lambda e: e["event"] == "trained",
    ]
    state = state_of(tmp_path)
    for moment in moments:
        process = start(state)
        base = initial(process, state)
        process.send(json.dumps({"job": "train", "round": 1, **outputs(state, 1), **base}))
        process.until(moment)
        process.popen.kill()
        assert process.popen.wait() == -9

    process = start(state)
    untouched, *_, last = undisturbed
    assert two_rounds(process, state, initial(process, state)) == last
    assert (state / "r2.safetensors").read_bytes() == (untouched / "r2.safetensors").read_bytes()
    assert learning.same_bytes(state / "trainer", untouched / "trainer")

    validated = process.do(
        "validated", job="validate", round=2, base=str(state / "r2.safetensors"), base_sha256=last["sha256"]
    )[-1]
    assert validated["score"] == last["score"] and validated["loss"] > 0
    process.send('{"job": "quit"}')
    assert process.popen.wait() == 0


def test_when_the_supervisor_dies_the_trainer_leaves_in_mid_round(
    tmp_path: Path, start: Callable[[Path], Process]
) -> None:
    state = state_of(tmp_path, epochs_per_round=1000, patience_epochs=1000)
    process = start(state)
    base = initial(process, state)
    process.send(json.dumps({"job": "train", "round": 1, **outputs(state, 1), **base}))
    process.until(lambda e: e["event"] == "progress")
    assert process.popen.stdin is not None
    process.popen.stdin.close()  # what the kernel does when the supervisor ends, however it ends
    assert process.popen.wait() == 0
    assert not (state / "r1.safetensors").exists()  # it did not finish the round first


def test_a_job_that_fails_is_an_event_and_the_next_job_runs(tmp_path: Path, start: Callable[[Path], Process]) -> None:
    state = state_of(tmp_path)
    anchor = (state / "anchor.safetensors").read_bytes()
    (state / "anchor.safetensors").write_bytes(anchor[:-1] + b"x")
    process = start(state)
    process.send(json.dumps({"job": "init", "out": str(state / "fused" / "r000000.safetensors")}))
    error = process.until(lambda e: e["event"] == "error")[-1]
    assert error["error"] == "FederationMismatch" and error["exit_code"] == 17

    (state / "anchor.safetensors").write_bytes(anchor)
    base = initial(process, state)
    process.send(json.dumps({"job": "train", "round": 1, "out": "x", "own": "y", **base, "base_sha256": "0" * 64}))
    error = process.until(lambda e: e["event"] == "error")[-1]
    assert error["error"] == "Altered" and error["exit_code"] == 15 and error["remedy"]
    process.send('{"job": "dance"}')
    assert "dance" in process.until(lambda e: e["event"] == "error")[-1]["message"]
    assert train(process, state, 1, base)[-1]["event"] == "trained"


def has_open(pid: int, path: Path) -> bool:
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if descriptor.readlink() == path:
                return True
    return False


def test_a_second_trainer_on_the_same_state_waits_for_the_first_to_leave(
    tmp_path: Path, start: Callable[[Path], Process]
) -> None:
    state = state_of(tmp_path)
    with hold_lock(state / "trainer"):
        second = Process(state)
        try:
            while not has_open(second.popen.pid, state / "trainer" / LOCK_FILE):
                assert second.popen.poll() is None
                time.sleep(0.01)
            os.set_blocking(second.popen.stdout.fileno(), False)  # type: ignore[union-attr]
            assert second.popen.poll() is None and not second.popen.stdout.readline()  # type: ignore[union-attr]
            os.set_blocking(second.popen.stdout.fileno(), True)  # type: ignore[union-attr]
        except BaseException:
            second.close()
            raise
    try:
        second.until(lambda e: e["event"] == "ready")
    finally:
        second.close()
