"""The daemon of one hospital. Runs the actions of the round machine and feeds back what happened.

Read `sync/round.py` first: there is what happens; here is how. The exchange (`sync/`) and the trainer know nothing of
each other: this file starts both, `work.py` carries results from one to the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from hsl_node.errors import Altered, LocalStateError, escaped
from hsl_node.federation import identity, keyring, strings
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import Identity
from hsl_node.federation.keyring import Keyring, warnings_of
from hsl_node.federation.names import Digest, Peer
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.host import durable, systemd
from hsl_node.host.control import serve
from hsl_node.host.durable import Step
from hsl_node.node import checks, poisoning
from hsl_node.node.alarms import Alarms
from hsl_node.node.checks import MAPPING_FIX, mapping_needed
from hsl_node.node.delivery import Delivery
from hsl_node.node.equivocation import Proofs
from hsl_node.node.heal import damage, fetch_models, mark
from hsl_node.node.heal.fetch_missing import Missing
from hsl_node.node.heal.recovery import Recovery
from hsl_node.node.heal.set_back import SetBack
from hsl_node.node.intake import Intake
from hsl_node.node.peers.links import Asking
from hsl_node.node.peers.serve import Offers
from hsl_node.node.pulse import Pulse
from hsl_node.node.snapshot import snapshot
from hsl_node.node.trainer import Trainer
from hsl_node.node.work import Work
from hsl_node.status import last_words
from hsl_node.sync import round as machine
from hsl_node.sync.inbox.limits import Limits
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.round import (
    Action,
    Arrived,
    Declare,
    Delivered,
    Forgotten,
    Fuse,
    Fused,
    Phase,
    Proven,
    Push,
    Train,
    Trained,
)
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.layout import Layout
from hsl_node.sync.store.room import Quota
from hsl_node.sync.store.store import Store
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.weights.checkpoint_file import Schema, holds, read_schema

log = logging.getLogger(__name__)

_COMMITS = {
    Trained: Step.SENDER_SIGN,
    Arrived: Step.RECEIVER_RECORD,
    Proven: Step.RECEIVER_RECORD,
    Fused: Step.FUSION_RECORD,
    Delivered: Step.SENDER_DELIVERED,
    Forgotten: Step.SENDER_DELIVERED,
}


@dataclass
class Node:
    """One running daemon. `run` is the whole life; everything else reacts."""

    config: NodeConfig
    federation: Federation
    identity: Identity
    store: Store
    trainer: Trainer = field(init=False)
    trainer_command: list[str] | None = None

    def __post_init__(self) -> None:
        self.me = Peer(self.config.name)
        self.layout: Layout = self.store.layout
        self.journal: Journal = self.store.journal
        self.others = tuple(p for p in self.federation.peers if p != self.me)
        self.work = Work(self)
        self.trainer = Trainer(self.layout.state, self.work.event, self.trainer_command)
        self.started = time.time()
        self.state: machine.State | None = None
        self.schema: Schema | None = None
        self.server: InboxServer | None = None
        self.alarms = Alarms()
        self.keyring = keyring.load(self.layout.state, self.federation)
        self.refused = {p: RefusedKey(p, random.Random()) for p in self.others}
        self.intake = Intake(self)
        self.delivery = Delivery(self)
        self.offers = Offers(self)
        self.asking = Asking(self)
        self.recovery = Recovery(self)
        self.proofs = Proofs(self)
        self.missing = Missing(self)
        self.set_back = SetBack(self)
        self.paused = self.journal.meta("paused") == "1"
        self.paused_at = float(self.journal.meta("paused_at") or self.started)
        self._running: dict[Action | str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._fatal: BaseException | None = None

    # ------------------------------------------------------------------ life

    async def run(self) -> int:
        """From start to SIGTERM. Gives the exit code."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._stopping.set)

        def failed(error: LocalStateError) -> None:
            """From any thread, whoever catches it; in the last commit too, which no turn of the loop follows."""
            self._fatal = self._fatal or error
            loop.call_soon_threadsafe(self._stopping.set)

        durable.on_failure = failed
        try:
            async with serve(self.layout.state / "run" / "control.sock", self._control):
                last_words.note_running(self.journal)
                self._tell_keys()
                self._spawn("pulse", Pulse(self).beat())
                self._spawn("begin", self._begin())
                await self._stopping.wait()
                systemd.notify("STOPPING=1", "STATUS=leaving")
                log.info("stopping")
                await self._end()
                if self._fatal is None:  # else `launch.py` leaves the word
                    last_words.note(self.journal, None)
        finally:
            durable.on_failure = lambda error: None
        if self._fatal is not None:
            raise self._fatal
        return 0

    async def _begin(self) -> None:
        """Know the model, open the inbox, take up the round where the journal left it."""
        initial = self.layout.fused(0)
        known = self.journal.fused_digests([0]).get(0)
        if known and initial.exists() and not await asyncio.to_thread(holds, initial, known):
            log.warning("the initial weights are altered on this disk, or of another version: they are made anew")
            initial.unlink()
        digest = self.trainer.initial = known if initial.exists() else None
        if digest is None or self.journal.state() is None or self._needs_its_gpu():
            made = await self.trainer.run({"job": "init"})
            # As it was written, not as it lies there: what the disk alters from now on is found where it is read.
            digest = self.trainer.initial = digest or Digest(made["sha256"])
        self.schema = read_schema(initial)
        due = self._recovery_due()
        if due is not None:
            checks.require_same_federation(self.journal, self.federation)
            await self._open_inbox()  # whoever lost its state too is answered meanwhile
            await self._let_the_disk_rest()
            await self.recovery.run(digest, due)
        self.state = self._load_state(digest)
        poisoning.renew(self.journal, self.alarms, self.me, self.federation.peers)
        damage.renew(self.journal, self.alarms, self.state.round)
        if self.server is None:
            await self._open_inbox()
        self.look()
        self._spawn("proofs", self.proofs.watch())
        self._spawn("missing", self.missing.watch())
        self._spawn("kept", fetch_models.watch(self))
        for peer in self.others:
            self._spawn(f"intake {peer}", self.intake.watch(peer))
        systemd.notify("READY=1")
        log.info("started", extra={"round": self.state.round, "phase": str(self.state.phase)})
        self._reconcile()

    def look(self) -> None:
        """Ask all peers whether anybody objects to this process, if that is not being asked."""
        if "look" not in self._running:
            self._spawn("look", self.asking.check())

    def _needs_its_gpu(self) -> bool:
        """Only torch can tell whether the GPU that node.toml names is there; better now than when training is due."""
        saved = self.journal.state()
        return self.config.train.device.startswith("cuda") and not (saved and saved["phase"] == Phase.FINISHED)

    def _recovery_due(self) -> mark.Mark | None:
        """Told to, or needed: what the saved state relies on is not all there."""
        saved = self.journal.state()
        ours = self.journal.meta("federation") == self.federation.digest
        if saved is not None and ours and mark.find_mark(self.journal) is None:
            state = machine.from_json(saved)
            damage.require_whole(self.journal, self.layout, state, self.known_schema().file_bytes)
        return mark.due(self.journal)

    async def _let_the_disk_rest(self) -> None:
        """One that alters files again and again: the peers are asked ever more rarely, and the operator at once."""
        saved = self.journal.state()
        pause_s = damage.renew(self.journal, self.alarms, saved["round"] if saved else 0)
        if pause_s:
            systemd.notify("READY=1", "STATUS=its disk alters files: look at `hsl-node status`")
            log.error("waits before it asks its peers again", extra={"wait_s": pause_s})
            await asyncio.sleep(pause_s)

    def _load_state(self, initial: Digest) -> machine.State:
        checks.require_same_federation(self.journal, self.federation)
        saved = self.journal.state()
        new = machine.State(me=self.me, peers=self.federation.peers, rounds=self.federation.plan.rounds, base=initial)
        if self.journal.meta("machine") is None:
            self.journal.set_meta("machine", mark.machine_id())
        if saved is not None and self.journal.meta("federation") == self.federation.digest:
            state = machine.from_json(saved)
            if state.round > 0 or state.base == initial:
                return state
        with self.journal.transaction(Step.START_STATE):
            self.journal.set_meta("federation", self.federation.digest)
            if self.journal.meta("instance") is None:
                self.journal.set_meta("instance", secrets.token_hex(8))
            self.journal.save_state(machine.to_json(new))
            self.journal.record_fused(0, initial)
            self.journal.record_phase(new.round, new.phase)
        return new

    async def _open_inbox(self) -> None:
        if self.config.inbox.kind != "embedded":
            return
        host, port = strings.split_address(self.config.listen)
        if note := mapping_needed(self.config):
            self.alarms.sound("ports", f"{note}. No peer has come in since the start", MAPPING_FIX)
        self.server = InboxServer(
            identity=self.identity,
            federation=self.federation,
            me=self.me,
            homes=self.layout.homes,
            data_bytes=self.known_schema().file_bytes,
            on_commit=self.intake.wake,
            on_connect=self._connected,
            on_fatal=self._disk_failed,
            on_twice=self._seen_twice,
            offer=self.offers.open,
            limits=Limits(quota=Quota(bytes=self.config.inbox.quota_mib * 2**20)),
            keyring=self.keyring,
        )
        await self.server.start(host, port)

    async def _end(self) -> None:
        """Leave in order: no task, process, socket or transaction stays behind."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.trainer.stop()
        if self.server is not None:
            await self.server.stop()

    # ------------------------------------------------------------------ the round machine, driven

    def apply(self, event: machine.Event, *records: Callable[[], None]) -> None:
        """One event: next state and its records durable in one transaction, then the actions."""
        before = self.known_state()
        after, _ = machine.step(before, event)
        with self.journal.transaction(_COMMITS[type(event)]):
            for record in records:
                record()
            self.journal.save_state(machine.to_json(after))
            self.journal.record_phase(after.round, after.phase)
        self.state = after
        if (after.phase, after.round) != (before.phase, before.round):
            log.info("phase", extra={"phase": str(after.phase), "round": after.round, "base": after.base[:12]})
            self.intake.wake()  # what waited one round ahead may be acceptable now
        if after.reason != before.reason:
            log.error("peers disagree", extra={"phase": str(after.phase), "reason": after.reason})
            self.journal.note("error", "disagreement", after.reason)
        self._reconcile()

    def _reconcile(self) -> None:
        """Start what is to do and not under way; cancel what is under way and not to do any more."""
        wanted: dict[Action | str, Callable[[], Coroutine[Any, Any, None]]] = {}
        for action in machine.todo(self.known_state()):
            match action:
                case Train() if not self.paused:
                    wanted[action] = lambda a=action: self.work.train(a)  # type: ignore[misc]
                case Declare():
                    wanted[action] = lambda a=action: self.work.declare(a)  # type: ignore[misc]
                case Fuse():
                    wanted[f"fuse {action.round}"] = lambda a=action: self.work.fuse(a)  # type: ignore[misc]
                case Push() if not self.keyring.is_revoked(action.peer):
                    wanted[action] = lambda a=action: self.delivery.push(a)  # type: ignore[misc]
                case _:
                    pass
        if self.work.last_to_validate() is not None and not self.paused:
            wanted["validate"] = self.work.validate_last
        for key in [k for k in self._running if not isinstance(k, str) or k.split()[0] in ("fuse", "validate")]:
            task = self._running[key]
            if key not in wanted and not task.done() and not task.cancelling() and task is not asyncio.current_task():
                task.cancel()
        for key, start in wanted.items():
            if key not in self._running:
                self._spawn(key, start())

    def _spawn(self, key: Action | str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=str(key))
        self._running[key] = task
        task.add_done_callback(lambda t: self._ended(key, t))

    def _ended(self, key: Action | str, task: asyncio.Task[None]) -> None:
        if self._running.get(key) is task:
            del self._running[key]
        if task.cancelled():
            if not self._stopping.is_set() and self.state is not None:
                asyncio.get_running_loop().call_soon(self._reconcile)  # it may be wanted again by now
        elif (error := task.exception()) is not None:
            # Whatever no action could handle ends the process; the journal makes the restart safe.
            self._fatal = self._fatal or error
            self._stopping.set()
            if isinstance(error, Altered) and self._fatal is error:  # others may meet the same file while we leave
                with contextlib.suppress(LocalStateError):  # no room: the next start finds it again
                    what = error.message.replace(f"{self.layout.state}/", "")
                    damage.found(self.journal, self.known_state().round, what)

    # ------------------------------------------------------------------ the inbox server's word

    def _connected(self, peer: Peer) -> None:
        self.intake.last_seen[peer] = time.time()
        self.alarms.settle("ports")
        self.refused[peer].called()
        self.delivery.wake(peer)
        self.proofs.connected(peer)
        self.missing.connected(peer)

    def _seen_twice(self, peer: Peer, twice: bool) -> None:
        """Two processes with this peer's key take turns in connecting: see `sync/clones.py`."""
        if twice:
            text = f"two nodes with the key of {peer} are at work: a clone, or a copy of its state directory"
            fix = f"call {peer}: it must stop one of them and restart the other; nothing differing is fused meanwhile"
            self.alarms.sound(f"twice {peer}", text, fix)
        else:  # a process that nobody saw before ends nothing by itself: the two may be there still
            self.alarms.settle(f"twice {peer}", when_quiet=True)

    def _disk_failed(self, error: LocalStateError) -> None:
        """A failed fsync is never retried: leave, and go on from the journal."""
        self._fatal = self._fatal or error
        self._stopping.set()

    # ------------------------------------------------------------------ keys

    def trust(self, changed: Keyring, own: Identity) -> None:
        """The operator changed keyring.toml, or this node's key: sessions of keys that went end, pushes begin anew."""
        before, self.keyring = self.keyring, changed
        rekeyed = own.public != self.identity.public
        self.identity = replace(own, run=self.identity.run)  # the process is the same, whatever key it uses
        if self.server is not None:
            self.server.trust(changed)
            if rekeyed:
                self.server.show(self.identity)
        if rekeyed:
            log.warning("this node uses another key now", extra={"fingerprint": own.fingerprint})
        for peer in self.federation.peers:
            if before.keys(peer) != changed.keys(peer):
                now = keyring.shown(changed.keys(peer))
                was = keyring.shown(before.keys(peer))
                log.warning("keys changed", extra={"peer": peer, "before": was, "now": now})
                self.journal.note("warning", "keys", f"{peer}: keys that count here now: {now}")
                if peer != self.me:
                    self.delivery.wake(peer)
        for peer in self.others:
            if rekeyed or before.keys(peer) != changed.keys(peer):
                self.refused[peer] = RefusedKey(peer, random.Random())  # it was another key that was refused
        for action, task in self._running.items():
            if isinstance(action, Push) and (rekeyed or before.keys(action.peer) != changed.keys(action.peer)):
                task.cancel()  # what is owed is begun again at once, from the bytes that lie there
        self._tell_keys()
        self.intake.wake()
        if self.state is not None:
            self._reconcile()

    def _tell_keys(self) -> None:
        for peer in self.federation.peers:
            warnings = warnings_of(self.keyring, peer, self.me)
            for code in (f"revoked {peer}", f"keys {peer}"):
                if code in warnings:
                    self.alarms.sound(code, *warnings[code])
                else:
                    self.alarms.settle(code)

    # ------------------------------------------------------------------ its operator, on the control socket

    async def _control(self, op: str, request: dict[str, Any]) -> dict[str, Any]:
        match op:
            case "status":
                return {"ok": True, "status": snapshot(self).as_json()}
            case "pause" | "resume":
                changed, phase = self._pause(op == "pause"), self.state and self.state.phase
                return {"ok": True, "changed": changed, "phase": phase, "over": self.is_over()}
            case "stop":
                self._stopping.set()
                return {"ok": True}
            case "keys":
                self.trust(
                    keyring.load(self.layout.state, self.federation),
                    identity.load(identity.find_key(self.layout.key)),
                )
                return {"ok": True, "fingerprint": self.identity.fingerprint}
            case _:
                return {"ok": False, "error": f"unknown request {escaped(op)!r}"}

    def _pause(self, paused: bool) -> bool:
        """False: it was so before, or there is nothing left to pause."""
        if paused == self.paused or (paused and self.is_over()):
            return False
        self.paused, self.paused_at = paused, time.time()
        self.journal.set_meta("paused_at", str(self.paused_at))
        self.journal.set_meta("paused", "1" if paused else "0")
        log.info("pause" if paused else "resume")
        if self.state is not None:
            self._reconcile()
        return True

    def is_over(self) -> bool:
        """Nothing is left to compute: no round, no last validation."""
        over = self.state is not None and self.state.phase in (Phase.FINISHED, Phase.HALTED)
        return over and self.work.last_to_validate() is None

    def known_state(self) -> machine.State:
        assert self.state is not None, "asked for the state before it was loaded"
        return self.state

    def known_schema(self) -> Schema:
        assert self.schema is not None, "asked for the schema before it was known"
        return self.schema
