"""One simulated federation from one seed: faults until they end, then it must come to rest, and with the right bytes.

outcome = run(1234)
outcome.problems        # empty: every peer fused every round into the bytes of an undisturbed run
outcome.log             # every event, the same again for the same seed
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import random
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from chaos_disk import SimulatedDisk, watch_parts
from chaos_faults import befall, heal
from chaos_link import Connected
from chaos_net import Net, Way
from chaos_plan import Scenario, federation_of, identity_of, port_of, scenario, undisturbed
from chaos_site import Site, StandIn, fuse_watched
from virtual_time import BEGIN_S, OWNER, Hang, VirtualLoop

from hsl_node.errors import DiskFailed
from hsl_node.federation.names import Peer
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.sync.manifest import content_digest
from hsl_node.sync.round import Phase, from_json
from hsl_node.sync.store.journal import Journal

HANG_S = 3 * 3600.0  # of the federation's time after the last fault; the longest wait of the protocol is an hour
BLOCK_BYTES = 1024  # so that a checkpoint of 4 KB travels as a real one does: in blocks
ERRORS = ("push broke", "asking broke", "bug in the inbox", "peers disagree", "equivocation")  # never without a cause


@dataclass
class Outcome:
    seed: int
    problems: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    fused: dict[int, str] = field(default_factory=dict)  # round -> digest
    faults: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    simulated_s: float = 0.0

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.log).encode()).hexdigest()


def run(seed: int, defect: str = "") -> Outcome:
    """`defect`: what is wrong with the first peer, on purpose (`chaos_site.py`)."""
    plan = scenario(seed)
    return simulate(plan, defect, expected=expected(plan.shape))


@cache
def expected(shape: tuple[int, int, str]) -> dict[int, str]:
    """What an undisturbed run fuses."""
    outcome = simulate(undisturbed(shape), "", expected=None)
    assert not outcome.problems, outcome.problems
    assert sorted(outcome.fused) == list(range(shape[1] + 1))
    return outcome.fused


def simulate(plan: Scenario, defect: str, expected: dict[int, str] | None) -> Outcome:
    outcome = Outcome(plan.seed)
    root = Path(tempfile.mkdtemp(prefix="chaos-", dir=_shm()))
    collecting = gc.isenabled()
    gc.disable()  # when it runs is not ours to decide
    try:
        world = World(plan, defect, root, outcome)
        world.run()
        world.judge(expected)
    finally:
        if collecting:
            gc.enable()
        shutil.rmtree(root, ignore_errors=True)
    return outcome


class World:
    def __init__(self, plan: Scenario, defect: str, root: Path, outcome: Outcome) -> None:
        self.plan, self.outcome = plan, outcome
        self.rng = random.Random(f"run {plan.seed}")
        self.loop = VirtualLoop(self.rng)
        ways = {(a, b): Way(self.rng.uniform(0.001, 0.08)) for a in plan.peers for b in plan.peers if a != b}
        self.net = Net(self.loop, self.rng, ways, self.problem)
        federation = federation_of(plan.shape)
        self.sites: dict[Peer, Site] = {}
        for peer in plan.peers:
            address = f"127.0.0.1:{port_of(peer)}"
            config = NodeConfig(name=peer, address=address, listen=address)
            self.sites[peer] = Site(
                peer, config, federation, identity_of(peer), self.net, self.rng, root, self.say,
                defect=defect if peer == plan.peers[0] else "",
            )  # fmt: skip

    def say(self, who: str, what: str) -> None:
        self.outcome.log.append(f"{self.loop.now - BEGIN_S:12.4f}  {who:12}  {what}")

    def problem(self, what: str) -> None:
        self.outcome.problems.append(what)
        self.say("PROBLEM", what)

    # -------------------------------------------------------------- running

    def run(self) -> None:
        with self._in_place_of_the_world(), self.loop as loop:
            loop.set_exception_handler(self._exception)
            try:
                loop.run_until_complete(self._all())
            except Hang as exc:
                self.problem(f"hang: {exc}")
            finally:
                self.outcome.simulated_s = loop.now - BEGIN_S
                self.outcome.lives = sum(site.lives for site in self.sites.values())
        for site in self.sites.values():
            for life in [*site.held, *([site.life] if site.life else [])]:
                if life.store is not None:
                    life.store.close()
            site.disk.close()

    async def _all(self) -> None:
        for site in self.sites.values():
            self.net.later(self.loop.now + self.rng.choice((0.0, self.rng.uniform(0, 30))), site.start)
        for fault in self.plan.faults:
            self.net.later(BEGIN_S + fault.at_s, befall, self, fault)
        self.net.later(BEGIN_S + self.plan.calm_s, heal, self)
        while not self._at_rest():
            if self.loop.now > BEGIN_S + self.plan.calm_s + HANG_S:
                raise Hang("; ".join(self._waits(site) for site in self.sites.values()))
            await asyncio.sleep(1.0)

    def _at_rest(self) -> bool:
        if self.loop.now < BEGIN_S + self.plan.calm_s:
            return False
        nodes = [site.life.node for site in self.sites.values() if site.life is not None]
        states = [node.state for node in nodes if node is not None and node.state is not None]
        if any(s.phase is Phase.HALTED for s in states):
            raise Hang("halted: " + "; ".join(self._waits(site) for site in self.sites.values()))
        return len(states) == len(self.sites) and all(s.phase is Phase.FINISHED and not s.owed for s in states)

    def _waits(self, site: Site) -> str:
        node = site.life.node if site.life else None
        if node is None or node.state is None:
            return f"{site.peer}: {'starting' if site.life else 'down'}"
        state = node.state
        work = ", ".join(sorted(str(key) for key, _ in node.tasks.items()))
        return f"{site.peer}: {state.phase} of round {state.round}, missing {state.missing}, {state.reason} [{work}]"

    def _exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        owner = OWNER.get()
        if owner is None or not owner.dead:
            self.problem(f"{context.get('message')}: {context.get('exception')!r}")

    # -------------------------------------------------------------- what stands in for the world outside

    @contextmanager
    def _in_place_of_the_world(self) -> Iterator[None]:
        net, rng = self.net, self.rng
        replaced: dict[str, Any] = {
            "hsl_node.host.durable.disk": SimulatedDisk(rng),
            "hsl_node.host.durable._reached": lambda step, where: (life := OWNER.get()) and life.reached(step, where),
            "hsl_node.host.durable.disk_failed": _disk_failed,
            "hsl_node.host.durable.on_failure": None,  # each node sets it for its process; here they share one
            "hsl_node.sync.store.journal.disk_failed": _disk_failed,
            "hsl_node.sync.inbox.part.Part.write": watch_parts(rng),
            "hsl_node.sync.send.push.connect": lambda *args, **more: Connected(net, *args, **more),
            "hsl_node.node.peers.links.connect": lambda *args, **more: Connected(net, *args, **more),
            "hsl_node.sync.wire.transport.BLOCK_BYTES": BLOCK_BYTES,
            "hsl_node.sync.send.deliver.BLOCK_BYTES": BLOCK_BYTES,
            "hsl_node.node.training.Trainer": StandIn,
            "hsl_node.node.poisoning.fuse_watched": fuse_watched,
            "hsl_node.node.daemon.serve": _no_control_socket,
            "hsl_node.node.delivery.random": (drawn := SimpleNamespace(Random=lambda: random.Random(rng.random()))),
            "hsl_node.node.peers.links.random": drawn,
            "hsl_node.node.peers.liveness.random": drawn,
            "asyncssh.listen": net.listen,
        }
        limits = "hsl_node.host.log_limit.LogLimit.__init__.__defaults__"
        log = logging.getLogger("hsl_node")
        handler, level, propagate = _Log(self), log.level, log.propagate
        with contextlib.ExitStack() as stack:
            for target, new in replaced.items():
                stack.enter_context(patch(target, new))
            stack.enter_context(patch(limits, (lambda: self.loop.now,)))
            stack.enter_context(patch.object(secrets, "token_hex", lambda n=8: rng.randbytes(n).hex()))
            log.addHandler(handler)
            log.setLevel(logging.INFO)
            log.propagate = False
            try:
                yield
            finally:
                log.removeHandler(handler)
                log.setLevel(level)
                log.propagate = propagate

    # -------------------------------------------------------------- judging

    def judge(self, expected: dict[int, str] | None) -> None:
        signed: dict[tuple[str, int], set[str]] = {}
        for peer, site in self.sites.items():
            for end in site.bad_ends:
                self.problem(end)
            if not site.layout.journal.exists():
                self.problem(f"{peer} has no journal")
                continue
            with Journal.read_only(site.layout.journal) as journal:
                fused = {row["round"]: row["sha256"] for row in journal.rows("fused")}
                content = journal.state()
                for row in journal.rows("manifests"):
                    signed.setdefault((row["peer"], row["round"]), set()).add(content_digest(row["content"]))
            state = from_json(content) if content else None
            rounds = list(range(self.plan.rounds + 1))
            if state is None or state.phase is not Phase.FINISHED or sorted(fused) != rounds:
                self.problem(f"{peer} lost a round: it has fused {sorted(fused)} of {rounds}")
            if expected is not None and any(fused[r] != expected[r] for r in fused.keys() & expected.keys()):
                self.problem(f"{peer} fused other bytes than an undisturbed run: {_short(fused)}, {_short(expected)}")
            last = site.layout.fused(self.plan.rounds)
            if last.exists() and fused.get(self.plan.rounds) not in _digests(last, site.altered.get(last, [])):
                self.problem(f"{peer}: the last fused model on disk is not what its journal says")
            if list((site.layout.state / "evidence").iterdir()):
                self.problem(f"{peer} holds evidence against somebody")
            self.outcome.fused = fused
        for (peer, round), lines in [*signed.items(), *self.net.published.items()]:
            if len(lines) > 1:
                self.problem(f"{peer} signed {len(lines)} manifests of round {round}")


class _Log(logging.Handler):
    """The daemons' own events, into ours."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        life, said = OWNER.get(), record.getMessage()
        if (life is not None and life.dead) or asyncio._get_running_loop() is None:
            return  # a killed process, or what was under way at the end and is thrown away: no word of a node
        names = ("peer", "round", "phase", "sha256", "code", "reason", "text")
        fields = [f"{n}={getattr(record, n)}" for n in names if hasattr(record, n)]
        self._world.say(str(life or ""), f"{said} {' '.join(fields)}"[:300])
        if said == "a file is not what it was" and life is not None and not life.site.altered:
            self._world.problem(f"{life} lost what it had promised to keep: {' '.join(fields)}")
        if said in ERRORS:
            error = record.exc_info[1] if record.exc_info else ""
            self._world.problem(f"{life}: {said} {error!r} {' '.join(fields)}"[:600])


def _disk_failed(message: str) -> DiskFailed:
    error = DiskFailed(message)
    life: Any = OWNER.get()
    if life is not None:
        life.site.disk_failed(error)
    return error


@contextlib.asynccontextmanager
async def _no_control_socket(path: Path, handler: object) -> AsyncIterator[None]:
    yield


def _digests(path: Path, altered: list[tuple[int, int]]) -> list[str]:
    """Of the file; and of what it was before its disk altered these bits.

    Once a last model is validated nobody reads it until `evaluate`, `predict` or `verify`, which compare.
    """
    content = bytearray(path.read_bytes())
    found = [hashlib.sha256(content).hexdigest()]
    for at, bit in altered:
        content[at] ^= bit
    return [*found, hashlib.sha256(content).hexdigest()]


def _short(digests: dict[int, str]) -> dict[int, str]:
    return {r: d[:8] for r, d in sorted(digests.items())}


def _shm() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
