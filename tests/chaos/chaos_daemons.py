"""One federation of real daemons, from one seed: kills, stops, crash points, cut and dead lines; then calm.

outcome = run(1234, folder)
outcome.problems        # empty: every peer fused every round into the bytes of an undisturbed run

What the seed decides is which faults there are and in which order. When exactly they strike is the machine's doing.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster import Cluster, free_ports
from federations import NAMES
from proxy import Proxy

from hsl_node.errors import HslError, NotInitialised
from hsl_node.federation.plan import Plan
from hsl_node.host.durable import Step
from hsl_node.sync.round import Phase, from_json
from hsl_node.sync.store.journal import Journal

TRAINER = ["--bytes", "400000", "--epochs", "1"]
CALM_AFTER_S = 12.0  # no fault begins later
HANG_S = 180.0  # after that; a back-off is at most a minute, a silence of a line 45 s
DEADLINES = (
    "from hsl_node.host.pace import Pace\nfrom hsl_node.sync.send import push\nfrom hsl_node.sync.wire import login\n"
    "push.BACKOFF = Pace(1.0, 4.0)\nlogin.KEY_REFUSED_WAIT_S = 4.0\n"
)
STEPS = (
    Step.START_STATE, Step.SENDER_SIGN, Step.RECEIVER_PART, Step.RECEIVER_COMMIT, Step.RECEIVER_CLAIM,
    Step.RECEIVER_VERIFIED, Step.RECEIVER_ADMIT, Step.RECEIVER_RECORD, Step.RECEIVER_RECEIPT, Step.RECEIVER_RELEASE,
    Step.SENDER_DELIVERED, Step.TRAINER_OUTBOX, Step.FUSION_WRITE, Step.FUSION_RECORD, Step.FUSION_PRUNE,
    Step.JOURNAL_NOTE,
)  # fmt: skip
KINDS = ("kill", "kill", "crash", "crash", "crash", "stop", "cut", "cut", "hole", "deaf", "mute", "down", "slow")


@dataclass
class DaemonOutcome:
    seed: int
    problems: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Fault:
    at_s: float
    kind: str
    name: str
    lasts_s: float
    count: int
    point: str

    def __str__(self) -> str:
        more = {"crash": f" at {self.point}", "cut": f" after {self.count} bytes", "kill": "", "stop": ""}
        return f"{self.kind} {self.name}" + more.get(self.kind, f" for {self.lasts_s:.1f} s")


@dataclass(frozen=True)
class DaemonScenario:
    names: tuple[str, ...]
    rounds: int
    faults: tuple[Fault, ...]


def scenario(seed: int) -> DaemonScenario:
    rng = random.Random(f"daemons {seed}")
    names = NAMES[: rng.choice((3, 3, 4, 5))]
    faults = [
        Fault(
            rng.uniform(0, CALM_AFTER_S), rng.choice(KINDS), rng.choice(names), rng.uniform(0.5, 4),
            rng.choice((rng.randint(1, 10_000), rng.randint(1, 2_000_000))),
            f"{rng.choice([p for s in STEPS for p in s.points])}#{rng.randint(1, 3)}",
        )
        for _ in range(rng.randint(4, 4 + 2 * len(names)))
    ]  # fmt: skip
    return DaemonScenario(names, rng.choice((2, 3)), tuple(sorted(faults, key=lambda f: f.at_s)))


@cache
def expected(names: tuple[str, ...], rounds: int) -> dict[int, str]:
    """What an undisturbed run fuses."""
    with (
        TemporaryDirectory(prefix="chaos-") as folder,
        Cluster(Path(folder), names, _plan(rounds), trainer=TRAINER) as cluster,
    ):
        cluster.start_all()
        cluster.wait_finished()
        return cluster.fused(names[0])


def run(seed: int, folder: Path) -> DaemonOutcome:
    plan, outcome = scenario(seed), DaemonOutcome(seed)
    right = expected(plan.names, plan.rounds)
    rng = random.Random(f"run {seed}")
    epoch_s = ["--epoch-s", str(rng.choice((0.3, 1.0, 2.0)))]
    shutil.rmtree(folder, ignore_errors=True)
    with proxies(plan.names) as lines, Cluster(
        folder, plan.names, _plan(plan.rounds), trainer=[*TRAINER, *epoch_s], prelude=DEADLINES,
        via={n: f"127.0.0.1:{line.port}" for n, line in lines.items()},
        ports={n: line.target_port for n, line in lines.items()},
    ) as cluster:  # fmt: skip
        Chaos(cluster, lines, plan, outcome, rng).run(right)
    return outcome


class Chaos:
    def __init__(
        self,
        cluster: Cluster,
        lines: dict[str, Proxy],
        plan: DaemonScenario,
        outcome: DaemonOutcome,
        rng: random.Random,
    ) -> None:
        self.cluster, self.lines, self.plan, self.outcome, self.rng = cluster, lines, plan, outcome, rng
        self.up_at: dict[str, float] = {}  # a daemon that is down, and when it is started again
        self.killed: set[str] = set()
        self.crash: dict[str, str] = {}  # where the next process of a daemon is to die
        self.began = time.monotonic()
        self.until: list[tuple[float, Proxy, str, Any]] = []

    def say(self, what: str) -> None:
        self.outcome.log.append(f"{time.monotonic() - self.began:8.2f}  {what}")

    def run(self, right: dict[int, str]) -> None:
        self.cluster.start_all()
        faults = list(self.plan.faults)
        calm_at = self.began + CALM_AFTER_S
        finished: set[str] = set()
        while len(finished) < len(self.plan.names) or (time.monotonic() < calm_at and faults):
            now = time.monotonic()
            while faults and now - self.began >= faults[0].at_s:
                self.befall(faults.pop(0))
            self.tend(now, calm=now > calm_at)
            finished = {n for n in self.plan.names if n not in self.up_at and self.state(n) == "finished"}
            if now > calm_at + HANG_S:
                states = {n: self.state(n) for n in self.plan.names}
                self.outcome.problems.append(f"hang: {states}")
                break
            time.sleep(0.05)
        self.outcome.problems += judge(self.cluster, right)
        if self.outcome.problems:
            self.outcome.log += [f"--- {n}\n{self.cluster.output(n)}" for n in self.plan.names]

    def state(self, name: str) -> str:
        with suppress(HslError):
            return str(self.cluster.status(name)["state"])
        return "down"

    def tend(self, now: float, *, calm: bool) -> None:
        """Whoever is down is started again, as systemd would do it."""
        for name, process in self.cluster.processes.items():
            code = process.poll()
            if code is None or name in self.up_at:
                continue
            self.say(f"{name} ended with {code}")
            if code not in (-signal.SIGKILL, -signal.SIGTERM, 0):  # SIGTERM: asked to leave before it could listen
                self.outcome.problems.append(f"{name} ended with {code}:\n{self.cluster.output(name)[-600:]}")
            self.up_at[name] = now + (0.1 if calm else self.rng.choice((0.0, self.rng.uniform(0, 4))))
        for name in [n for n, at in self.up_at.items() if at <= now]:
            del self.up_at[name]
            point = self.crash.pop(name, "")
            self.cluster.start(name, **({"HSL_CRASH_AT": point} if point and not calm else {}))
        for mark in [u for u in self.until if u[0] <= now or calm]:
            self.until.remove(mark)
            self.undo(mark[1], mark[2], mark[3])

    def befall(self, fault: Fault) -> None:
        self.say(f"FAULT {fault}")
        self.outcome.faults[fault.kind] += 1
        process, line = self.cluster.processes[fault.name], self.lines[fault.name]
        end = time.monotonic() + fault.lasts_s
        match fault.kind:
            case "kill":
                process.kill()
            case "crash":  # its next process dies there, or not at all
                self.crash[fault.name] = f"{fault.point} {self.cluster.root / f'mark-{fault.at_s:.6f}'}"
                process.kill()
            case "stop":
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
            case "cut":
                line.cut_after = line.bytes_up + fault.count
            case "hole" | "deaf" | "mute":
                setattr(line, fault.kind, True)
                self.until.append((end, line, fault.kind, False))
            case "slow":
                line.bits_per_s = 2e6
                self.until.append((end, line, "bits_per_s", None))
            case "down":
                call(line.down())
                self.until.append((end, line, "up", None))

    def undo(self, line: Proxy, what: str, value: Any) -> None:
        if what == "up":
            if line._server is None:
                call(line.up())
        else:
            setattr(line, what, value)


def judge(cluster: Cluster, right: dict[int, str]) -> list[str]:
    """What is wrong with what the daemons have left."""
    problems = []
    for name in cluster.names:
        layout = cluster.layout(name)
        try:
            journal = Journal.read_only(layout.journal)
        except NotInitialised:
            problems.append(f"{name} has not finished: it has no journal")
            continue
        content, fused = journal.state(), {r["round"]: r["sha256"] for r in journal.rows("fused")}
        journal.close()
        state = from_json(content) if content else None
        if state is None or state.phase is not Phase.FINISHED:
            problems.append(f"{name} has not finished: {state and state.phase}, {state and state.reason}")
        if fused != right:
            problems.append(f"{name} fused {_short(fused)}, an undisturbed run {_short(right)}")
        if list((layout.state / "evidence").iterdir()):
            problems.append(f"{name} holds evidence against somebody")
    return problems


# ------------------------------------------------------------------ lines between the daemons, on a loop of their own

_loop: asyncio.AbstractEventLoop | None = None


def call(work: Any) -> Any:
    assert _loop is not None
    return asyncio.run_coroutine_threadsafe(work, _loop).result(30)


@contextmanager
def proxies(names: tuple[str, ...]) -> Iterator[dict[str, Proxy]]:
    """In front of each daemon's inbox, one."""
    global _loop
    _loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_loop.run_forever, daemon=True)
    thread.start()
    lines = {name: Proxy(port) for name, port in zip(names, free_ports(len(names)), strict=True)}
    try:
        for line in lines.values():
            call(line.up())
        yield lines
    finally:
        for line in lines.values():
            call(line.down())
        _loop.call_soon_threadsafe(_loop.stop)
        thread.join()
        _loop.close()


def _plan(rounds: int) -> Plan:
    return Plan(method="fedavg", fusion="weighted_mean", rounds=rounds, epochs_per_round=1, plateau_rounds=100)


def _short(digests: dict[int, str]) -> dict[int, str]:
    return {r: d[:8] for r, d in sorted(digests.items())}
