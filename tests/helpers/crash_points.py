"""A federation of two daemons, of which one is killed at a named point, and commands that are."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import WAIT_S, Cluster

from hsl_node import cli
from hsl_node.federation.names import Digest, FileName, Kind, Peer
from hsl_node.federation.plan import Plan
from hsl_node.host import control, durable
from hsl_node.host.durable import Step
from hsl_node.sync.store.journal import Journal

PLAN = Plan(method="fedavg", fusion="mean", rounds=2, epochs_per_round=2, plateau_rounds=100)
NAMES = ("ash", "birch")
TRAINER = ["--bytes", "20000"]
IN_THE_TRAINER = {Step.START_INITIAL, Step.TRAINER_OUTBOX}


def federation_in(folder: Path, rounds: int) -> Cluster:
    return Cluster(folder, NAMES, PLAN.model_copy(update={"rounds": rounds}), trainer=TRAINER)


def undisturbed_run(folder: Path, rounds: int) -> dict[int, str]:
    with federation_in(folder, rounds) as cluster:
        cluster.start_all()
        return digests_at_the_end(cluster)


def digests_at_the_end(cluster: Cluster) -> dict[int, str]:
    """After all rounds: the same at both peers, and the last one on disk too."""
    cluster.wait_finished()
    one, other = (cluster.fused(name) for name in NAMES)
    assert one == other
    for name in NAMES:
        assert hashlib.sha256(cluster.layout(name).fused(max(one)).read_bytes()).hexdigest() == one[max(one)]
    return one


def killed_at(cluster: Cluster, point: str, mark: Path) -> None:
    """Run ash until it, or its trainer, has killed itself there; a trainer is started again by its daemon."""
    name = point.partition("#")[0]
    if name in Step.RECEIVER_REFUSED.points:
        deliver_rubbish(cluster)
    process = cluster.start("ash", HSL_CRASH_AT=f"{point} {mark}")
    in_the_trainer = any(name in step.points for step in IN_THE_TRAINER)
    end = time.monotonic() + WAIT_S
    while not mark.exists() or (process.poll() is None and not in_the_trainer):
        assert process.poll() in (None, -signal.SIGKILL), f"{point}: ash ended otherwise\n{cluster.output('ash')}"
        assert time.monotonic() < end, f"{point} was never reached\n{cluster.output('ash')}"
        time.sleep(0.01)
    if in_the_trainer:
        assert int(mark.read_text()) != process.pid
        said = "exit status -9"
        while said not in (log := (cluster.layout("ash").state / "log" / "hsl-node.log").read_text()):
            assert time.monotonic() < end, f"{point}: the trainer did not die\n{log[-2000:]}"
            time.sleep(0.01)
        cluster.kill("ash")
    else:
        assert (process.returncode, int(mark.read_text())) == (-signal.SIGKILL, process.pid)


def deliver_rubbish(cluster: Cluster) -> None:
    """Put a manifest without a signature into ash's inbox."""
    inbox = cluster.layout("ash").homes / "birch" / "inbox"
    inbox.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = FileName(cluster.federation.fed8, 1, Peer("birch"), Digest("e" * 64), Kind.MANIFEST)
    (inbox / str(name)).write_bytes(b"rubbish\n")


def documents(cluster: Cluster, name: str, round: int) -> dict[str, bytes]:
    """The manifests of a round in this node's journal, by peer; and what it has `signed` itself."""
    with Journal.read_only(cluster.layout(name).journal) as journal:
        found = {p: row["document"] for p in NAMES if (row := journal.manifest(round, Peer(p)))}
        signed = journal.signed(round)
        return found | ({"signed": signed[1]} if signed else {})


def _begin(crash: str, body: Callable[..., None], *arguments: Any) -> None:
    durable._crash = durable._planned(crash)  # what loading the module does with HSL_CRASH_AT
    body(*arguments)


def command(*words: str) -> None:
    cli.main(words)


@dataclass
class Killed:
    """A command of one node, killed at points one after the other; with what it left, it is given again."""

    fresh: Callable[..., int | None]
    cluster: Cluster
    folder: Path  # of the marks

    def at(self, name: str, *words: str, points: list[str], then: Callable[[], object] = lambda: None) -> None:
        for point in points:
            mark = self.folder / f"mark{sum(1 for _ in self.folder.glob('mark*'))}"
            ended = self.run(name, *words, crash=f"{point} {mark}")
            assert (ended, mark.exists()) == (-signal.SIGKILL, True), (words, point)
            then()

    def run(self, name: str, *words: str, crash: str = "") -> int | None:
        return self.fresh(command, "--state", str(self.cluster.layout(name).state), *words, crash=crash)


def held_in_round_1(cluster: Cluster) -> None:
    """birch holds training, so that all that follows falls into the run for certain; ash waits for it."""
    cluster.start("birch")
    cluster.wait_until("birch", lambda s: s["phase"] is not None, "there")
    control.ask(cluster.layout("birch").state, "pause")
    cluster.start("ash")
    cluster.wait_until("ash", lambda s: s["round"] == 1 and s["waiting_for"] == ["birch"], "waiting for birch")
