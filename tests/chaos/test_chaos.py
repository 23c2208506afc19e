"""`make chaos` in short; and that it finds what is wrong, says with which seed, and repeats a seed event by event."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import chaos
import chaos_daemons
import chaos_plan
import chaos_sim
import pytest
from chaos_site import DEFECTS

SEEDS = range(20, 40)  # every kind of fault leaves its trace in one of them
FOUND_IN, TRIED = range(100), 10  # a defect must show in one of so many of these, those where it is likely to first


@functools.cache
def outcome(seed: int) -> chaos_sim.Outcome:
    return chaos_sim.run(seed)


@pytest.mark.sample(5)
@pytest.mark.parametrize("seed", SEEDS)
def test_threat_22_a_simulated_federation_under_chaos_ends_with_the_bytes_of_an_undisturbed_one(seed: int) -> None:
    if outcome(seed).problems:
        print(*outcome(seed).log[-300:], sep="\n")  # else nobody could say why
    assert outcome(seed).problems == []


@pytest.mark.full
def test_every_kind_of_fault_is_among_them_and_strikes() -> None:
    outcomes = [outcome(seed) for seed in SEEDS]
    faults = sum((o.faults for o in outcomes), Counter[str]())
    assert faults.keys() == {*chaos_plan.AT_ONE, *chaos_plan.BETWEEN}
    log = "\n".join(line for o in outcomes for line in o.log)
    for trace in (
        "is killed", "loses power", "dies at", "is asked to leave", "exit 0", "No space left on device",
        "connection reset", "connection refused", "nothing moved for", "disk I/O error",
    ):  # fmt: skip
        assert trace in log, trace
    assert sum(o.lives for o in outcomes) > 1.3 * sum(len(chaos_plan.scenario(s).peers) for s in SEEDS)


def test_a_seed_is_the_same_again_event_by_event() -> None:
    """Also in another process, where sets and dicts of strings have another order."""
    busiest = outcome(max(SEEDS, key=lambda seed: len(chaos_plan.scenario(seed).faults)))
    assert busiest.lives > len(chaos_plan.scenario(busiest.seed).peers)
    assert chaos_sim.run(busiest.seed).log == busiest.log
    code = f"import chaos_sim; print(chaos_sim.run({busiest.seed}).fingerprint)"
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == busiest.fingerprint


# What forgets shows only where power is lost too: many federations.
@pytest.mark.parametrize(
    "defect", [pytest.param(d, marks=pytest.mark.full) if d == "syncs nothing" else d for d in DEFECTS]
)
def test_a_node_that_is_wrong_on_purpose_is_found(defect: str) -> None:
    """One hangs, one fuses other bytes, one cannot repeat its training, one's disk forgets what it promised."""
    needs = {"trains otherwise after a restart": ("kill", "crash"), "syncs nothing": ("power", "blackout")}

    def chances(seed: int) -> int:
        plan = chaos_plan.scenario(seed)
        return sum(f.peer == plan.peers[0] and f.kind in needs.get(defect, ()) for f in plan.faults)

    for seed in sorted(FOUND_IN, key=chances, reverse=True)[:TRIED]:
        if problems := chaos_sim.run(seed, defect).problems:
            break
    else:
        raise AssertionError(f"nothing was found in {TRIED} federations")
    words = {
        "fuses one wrong weight": "fused the same checkpoints into other bytes",
        "never trains": "hang: ",
        "trains otherwise after a restart": "fused other bytes than an undisturbed run",
        "syncs nothing": "lost what it had promised to keep",
    }
    assert any(words[defect] in p for p in problems), problems


def test_a_failure_names_the_seed_the_events_and_the_command_that_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, arguments = io.StringIO(), ["--seed", "3", "--simulated", "1", "--daemons", "0"]
    assert chaos.main([*arguments, "--defect", "never trains"], out) == 1
    said = out.getvalue()
    assert "FAILED: simulated federation, seed 3" in said and "hang: " in said
    assert "python tests/chaos/chaos.py --seed 3 --simulated 1 --daemons 0\n" in said
    assert "1 hangs, 1 failed in all" in said
    assert "FAULT" in (tmp_path / "build" / "chaos" / "simulated-3.log").read_text()

    out = io.StringIO()
    assert chaos.main(arguments, out) == 0
    assert "0 lost rounds, 0 disagreements, 0 hangs, 0 failed in all" in out.getvalue()


def test_threat_22_daemons_under_chaos_end_with_the_bytes_of_undisturbed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same folders, looked at with other digests in mind, are called wrong."""
    left: list[chaos_daemons.Cluster] = []
    monkeypatch.setattr(chaos_daemons, "judge", lambda c, right: left.append(c) or _judge(c, right))
    outcome = chaos_daemons.run(SEED_OF_DAEMONS, tmp_path / "federation")
    assert outcome.problems == [], outcome.log
    assert outcome.faults.total() >= 4
    assert any("ended with -9" in line for line in outcome.log)
    plan = chaos_daemons.scenario(SEED_OF_DAEMONS)
    right = chaos_daemons.expected(plan.names, plan.rounds)
    problems = _judge(left[0], {**right, 1: "0" * 64})
    assert len(problems) == len(plan.names) and all("an undisturbed run" in p for p in problems)


SEED_OF_DAEMONS = 0  # three daemons, two of them killed
_judge = chaos_daemons.judge


def test_daemons_that_never_finish_are_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_daemons, "CALM_AFTER_S", 0.0)
    monkeypatch.setattr(chaos_daemons, "HANG_S", 1.0)
    monkeypatch.setattr(chaos_daemons, "expected", lambda names, rounds: {})
    monkeypatch.setattr(chaos_daemons, "TRAINER", [*chaos_daemons.TRAINER, "--epoch-s", "1000"])
    outcome = chaos_daemons.run(SEED_OF_DAEMONS, tmp_path / "federation")
    assert any(p.startswith("hang: ") for p in outcome.problems)
