"""One hospital of a simulated federation: its disk, and its daemon, which starts, dies and starts again.

The daemon is the real `Daemon` with its real journal and files. Only the trainer is a stand-in, as in `cluster.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from chaos_disk import SiteDisk
from chaos_net import Net
from virtual_time import OWNER, Killed, Process, context_of

from hsl_node.errors import Altered, LocalStateError
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.host.durable import Step
from hsl_node.host.layout import Layout
from hsl_node.node import poisoning
from hsl_node.node.daemon import Daemon
from hsl_node.node.launch import DISK_ERRORS
from hsl_node.node.snapshot import snapshot
from hsl_node.sync.store.store import Store
from hsl_node.weights.checkpoint_file import write_weights
from hsl_node.weights.whole import holds, sha256_of

FLOATS = 1100  # of one checkpoint: a handful of the simulation's small blocks
# What can be wrong with a node on purpose, so that chaos is seen to find it.
DEFECTS = ("fuses one wrong weight", "never trains", "trains otherwise after a restart", "syncs nothing")


def tensors(*seed: object) -> dict[str, np.ndarray]:
    """Weights as a function of `seed`."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "little"))
    return {
        "a.weight": rng.standard_normal(FLOATS // 2, dtype=np.float32),
        "b.weight": rng.standard_normal((FLOATS // 4, 2), dtype=np.float32),
        "norm.num_batches_tracked": np.array(rng.integers(1, 1000), dtype=np.int64),
    }


class Life(Process):
    """One process of the daemon, from start to end."""

    def __init__(self, site: Site, number: int) -> None:
        super().__init__()
        self.site = site
        self.number = number
        self.node: Daemon | None = None
        self.store: Store | None = None
        self.fuse: tuple[int, bool] | None = None  # passages of crash points left to live, and whether power fails
        self.training = False

    def __str__(self) -> str:
        return f"{self.site.peer}.{self.number}"

    def reached(self, step: Step, where: str) -> None:
        """In place of `durable._reached`."""
        if self.dead:
            raise Killed
        if self.fuse is not None:
            left, power = self.fuse
            self.fuse = (left - 1, power)
            if left <= 1:
                self.fuse = None
                self.site.say(f"dies at {step.label}:{where}")
                self.site.kill(power=power)
                raise Killed


@dataclass
class Site:
    peer: Peer
    config: NodeConfig
    federation: Federation
    identity: Identity
    net: Net
    rng: random.Random
    root: Path
    log: Callable[[str, str], None]  # (who, what)
    defect: str = ""  # what is wrong with this node, on purpose
    train_s: tuple[float, float] = (0.5, 20.0)
    life: Life | None = None
    lives: int = 0
    bad_ends: list[str] = field(default_factory=list)
    down: bool = False
    away: bool = False  # it does not start: its state is being put back
    set_backs: int = 0
    altered: dict[Path, list[tuple[int, int]]] = field(default_factory=dict)  # by its disk: file -> (byte, bit)

    def __post_init__(self) -> None:
        self.layout = Layout(self.root / self.peer)
        assert self.defect in ("", *DEFECTS)
        self.disk = SiteDisk(self.root / f"lost-{self.peer}", forgetful=self.defect == "syncs nothing")
        self.held: list[Any] = []  # whatever a dead process held; let go of at the very end

    def say(self, what: str) -> None:
        self.log(str(self.life or self.peer), what)

    # -------------------------------------------------------------- a process

    def start(self) -> None:
        if self.life is not None or self.away:
            return
        self.lives += 1
        self.down = False
        self.life = life = Life(self, self.lives)
        self.say("starts")
        self.net.loop.create_task(self._live(life), context=context_of(life))

    async def _live(self, life: Life) -> None:
        fired = self.disk.fired
        outcome: object = 0
        try:
            life.store = store = Store(self.layout)
            try:
                run = hashlib.sha256(str(life).encode()).hexdigest()[:16]
                me = replace(self.identity, run=run)
                life.node = Daemon(self.config, self.federation, me, store, snapshot)
                outcome = await life.node.run()
            finally:
                store.close()
        except Killed:
            return
        except Exception as exc:
            outcome = exc
        self._ended(life, outcome, disk_failed=self.disk.fired > fired)

    def _ended(self, life: Life, outcome: object, *, disk_failed: bool) -> None:
        said = f"{type(outcome).__name__}: {outcome}" if isinstance(outcome, Exception) else f"exit {outcome}"
        said = said.replace(f"{self.root}/", "")  # a folder of this run alone
        self.say(f"ended: {said}")
        ours = isinstance(outcome, LocalStateError) or getattr(outcome, "errno", None) in DISK_ERRORS
        healing = isinstance(outcome, Altered) and bool(self.altered)
        finds_out = "set back" in said and self.set_backs > 0
        if ("set back" in said or (outcome != 0 and not healing and not (ours and disk_failed))) and not finds_out:
            self.bad_ends.append(f"{life} ended: {said}")
        self._gone(life, silent=False)
        self.restart(self.rng.uniform(0.5, 20))

    def kill(self, *, power: bool = False) -> None:
        """SIGKILL, or the plug: the second takes back what was not synced, and nobody is told."""
        life = self.life
        if life is None:
            return
        self.say("loses power" if power else "is killed")
        self._gone(life, silent=power)
        if power:
            self.say(f"{self.disk.power_cut(self.rng)} changes lost")
        self.restart(self.rng.choice((0.2, self.rng.uniform(0.5, 10), self.rng.uniform(10, 200))))

    def _gone(self, life: Life, *, silent: bool) -> None:
        life.dead, self.life = True, None
        self.held.append(life)
        self.net.died(life, silent=silent)
        if life.store is not None:  # not now: we may be in the midst of a transaction, which unwinds
            self.net.later(0, life.store.close)

    def take_snapshot(self) -> bool:
        """Of the whole state, as it is at this moment. False: nothing to go back to, or another one is kept."""
        state, copy = self.layout.state, self.root / f"snapshot-{self.peer}"
        if copy.exists() or not self.layout.journal.exists():
            return False
        journal = sqlite3.connect(self.layout.journal)
        try:
            tables = {name for (name,) in journal.execute("SELECT name FROM sqlite_master")}
            if "state" not in tables or journal.execute("SELECT 1 FROM state").fetchone() is None:
                return False  # a lost disk, which only `recover --from-peers` may heal
            shutil.copytree(state, copy, symlinks=True, ignore=shutil.ignore_patterns("run", "journal.sqlite3*"))
            kept = sqlite3.connect(copy / "journal.sqlite3")
            journal.backup(kept)
            kept.close()
        finally:
            journal.close()
        self.say("a snapshot is taken")
        return True

    def set_back(self) -> None:
        """To the snapshot, as a machine is, without a word to it."""
        self.away = True
        if self.life is not None:
            self._gone(self.life, silent=False)
        self.net.later(self.net.loop.now + 0.01, self._put_back)  # then the dead process's journal is closed

    def _put_back(self) -> None:
        copy = self.root / f"snapshot-{self.peer}"
        self.disk.close()
        shutil.rmtree(self.layout.state)
        copy.rename(self.layout.state)
        self.say("is set back")
        self.away, self.set_backs = False, self.set_backs + 1
        self.start()

    def restart(self, after_s: float) -> None:
        self.net.later(self.net.loop.now + after_s, self.start)

    def stop(self) -> None:
        """SIGTERM."""
        if self.life is not None and self.life.node is not None:
            self.say("is asked to leave")
            self.life.node._stopping.set()

    def disk_failed(self, error: LocalStateError) -> None:
        """What `durable.on_failure` does, in a process of its own."""
        life = self.life
        if life is not None and life.node is not None and not life.training:
            self.net.loop.call_soon(life.node._failed, error)


def fuse_watched(rule: str, *args: Any, **more: Any) -> Any:
    """In place of `poisoning.fuse_watched`."""
    digest, figures = _fuse_watched(rule, *args, **more)
    life, out = OWNER.get(), args[4]
    if isinstance(life, Life) and life.site.defect == "fuses one wrong weight":
        content = out.read_bytes()
        out.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        digest = sha256_of(out)
    return digest, figures


_fuse_watched = poisoning.fuse_watched


class StandIn:
    """In place of the trainer: a checkpoint is a function of peer, round and the fused model it starts from."""

    def __init__(self, state: Path, on_event: Callable[[dict[str, Any]], None], command: object = None) -> None:
        life = OWNER.get()
        assert isinstance(life, Life)
        self._life, self._on_event = life, on_event
        self._initial = Layout(state).fused(0)
        self._one_job = asyncio.Lock()
        self.initialised: dict[str, Any] | None = None
        self.initial: str | None = None

    async def run(self, job: dict[str, Any]) -> dict[str, Any]:
        async with self._one_job:
            while True:
                try:
                    if self.initialised is None:
                        self.initialised = await self._do({"job": "init", "out": str(self._initial)})
                    return self.initialised if job["job"] == "init" else await self._do(job)
                except Altered:
                    raise
                except (OSError, LocalStateError) as exc:
                    self._life.site.say(f"trainer failed: {exc}")
                    self.initialised = None
                    await asyncio.sleep(5)

    async def _do(self, job: dict[str, Any]) -> dict[str, Any]:
        site = self._life.site
        me, samples = site.peer, 10 + len(site.peer)
        await asyncio.sleep(site.rng.uniform(0.1, 1))
        match job["job"]:
            case "init":
                out = Path(job["out"])
                if self.initial is None or not holds(out, self.initial):
                    self.initial = self._write(out, Step.START_INITIAL, "initial")
                event = {"event": "initialised", "device": "none", "versions": {"torch": "stand-in"}}
                event["sha256"] = self.initial
                event["images"] = {"train": samples, "validation": 2, "test": 3}
            case "train" | "validate" if not holds(Path(job["base"]), job["base_sha256"]):
                raise Altered(f"{job['base']} is not the model to start from")
            case "train":
                round, out = job["round"], Path(job["out"])
                self._on_event(
                    {"event": "validated", "round": round - 1, "score": 0.5, "loss": 0.7, "recalibrated": None}
                )
                if site.defect == "never trains":
                    await asyncio.Event().wait()
                await asyncio.sleep(site.rng.uniform(*site.train_s))
                lives = site.lives if site.defect == "trains otherwise after a restart" else 0
                seed = me, round, job["base_sha256"], lives
                own = self._write(Path(job["own"]), Step.TRAINER_OWN, *seed)
                sha256 = self._write(out, Step.TRAINER_OUTBOX, *seed)
                event = {"event": "trained", "round": round, "sha256": sha256, "bytes": out.stat().st_size}
                event |= {
                    "samples": samples,
                    "score": 0.5 + 0.4 * (1 - 0.5**round),
                    "loss": 0.6,
                    "said": {},
                    "own_sha256": own,
                }
            case _:
                event = {"event": "validated", "round": job["round"], "score": 0.6, "loss": 0.6, "recalibrated": None}
        self._on_event(event)
        return event

    def _write(self, out: Path, step: Step, *seed: object) -> str:
        self._life.training = True
        try:
            return write_weights(out, tensors(*seed), step)
        finally:
            self._life.training = False

    async def stop(self) -> None:
        self.initialised = None

    def status(self) -> dict[str, Any]:
        return {"pid": None, "state": "idle", "restarts": 0, "last_event_s": 0.0, "last_error": ""}
