"""The daemon of one hospital. Runs the actions of the round machine and feeds back what happened.

The only file that knows both `sync` and the trainer. Read `sync/round.py` first: there is what happens; here is how.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from hsl_node import __version__, config, identity, missing, poisoning, service
from hsl_node.alarms import Alarms
from hsl_node.config import Federation, NodeConfig
from hsl_node.control import serve
from hsl_node.delivery import Delivery
from hsl_node.errors import FederationMismatch, LocalStateError, escaped
from hsl_node.identity import Identity
from hsl_node.intake import Intake, claim_of
from hsl_node.keys import warnings_of
from hsl_node.node_status import snapshot
from hsl_node.offers import Offers
from hsl_node.proof import Proofs
from hsl_node.recovery import Recovery, machine_id
from hsl_node.sync import durable, keyring
from hsl_node.sync import round as machine
from hsl_node.sync.durable import Step
from hsl_node.sync.journal import Journal
from hsl_node.sync.keyring import Keyring
from hsl_node.sync.limits import Limits, Quota
from hsl_node.sync.manifest import Manifest, parse_manifest
from hsl_node.sync.names import Digest, Peer, Round
from hsl_node.sync.plateau import plateaued
from hsl_node.sync.round import Action, Arrived, Declare, Delivered, Fuse, Fused, Phase, Proven, Push, Train, Trained
from hsl_node.sync.server import InboxServer
from hsl_node.sync.store import Layout, Store, paths_of
from hsl_node.sync.tensors import Schema, read_schema, sha256_of
from hsl_node.trainer import Trainer

log = logging.getLogger(__name__)

NO_ROOM_RETRY_S = 30.0
PULSE_S = 5.0  # watchdog, systemd's status line
STARTING_S = 60.0  # what a start that is alive may take from each pulse on
_COMMITS = {
    Trained: Step.SENDER_SIGN,
    Arrived: Step.RECEIVER_RECORD,
    Proven: Step.RECEIVER_RECORD,
    Fused: Step.FUSION_RECORD,
    Delivered: Step.SENDER_DELIVERED,
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
        self.trainer = Trainer(self.layout.state, self._trainer_event, self.trainer_command)
        self.started = time.time()
        self.state: machine.State | None = None
        self.schema: Schema | None = None
        self.server: InboxServer | None = None
        self.epoch: dict[str, Any] | None = None  # live progress of the trainer
        self.busy: dict[str, Any] | None = None
        self.fusing = 0.0
        self.alarms = Alarms()
        self.keyring = keyring.load(self.layout.state, self.federation)
        self.intake = Intake(self)
        self.delivery = Delivery(self)
        self.offers = Offers(self)
        self.recovery = Recovery(self)
        self.proofs = Proofs(self)
        self.paused = self.journal.meta("paused") == "1"
        self._running: dict[Action | str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._fatal: BaseException | None = None

    # ------------------------------------------------------------------ life

    async def run(self) -> int:
        """From start to SIGTERM. Gives the exit code."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._stopping.set)
        durable.on_failure = lambda error: loop.call_soon_threadsafe(self._disk_failed, error)  # whoever catches it
        async with serve(self.layout.state / "run" / "control.sock", self._control):
            self._tell_keys()
            self._spawn("pulse", self._pulse())
            self._spawn("begin", self._begin())
            await self._stopping.wait()
            service.notify("STOPPING=1", "STATUS=leaving")
            log.info("stopping")
            await self._end()
        if self._fatal is not None:
            raise self._fatal
        return 0

    async def _begin(self) -> None:
        """Know the model, open the inbox, take up the round where the journal left it."""
        initial = self.layout.fused(0)
        if not initial.exists() or self.journal.state() is None:
            await self.trainer.run({"job": "init"})
        self.schema = read_schema(initial)
        digest = await asyncio.to_thread(sha256_of, initial)
        mark = self.recovery.due()
        if mark is not None:
            self._require_same_federation()
            await self._open_inbox()  # whoever lost its state too is answered meanwhile
            await self.recovery.run(digest, mark)
        self.state = self._load_state(digest)
        poisoning.renew(self.journal, self.alarms, self.me, self.federation.peers)
        if self.server is None:
            await self._open_inbox()
        self._spawn("look", self.recovery.check())
        self._spawn("proofs", self.proofs.watch())
        self._spawn("missing", missing.watch(self))
        for peer in self.others:
            self._spawn(f"intake {peer}", self.intake.watch(peer))
        service.notify("READY=1")
        log.info("started", extra={"round": self.state.round, "phase": str(self.state.phase)})
        self._reconcile()

    def _require_same_federation(self) -> None:
        """Raises: FederationMismatch: rounds of another federation are in the journal."""
        saved, before = self.journal.state(), self.journal.meta("federation")
        if saved is not None and before != self.federation.digest and machine.from_json(saved).round > 0:
            raise FederationMismatch(
                f"this journal belongs to federation {str(before)[:8]}, federation.toml is now {self.federation.fed8}",
                remedy="join the old file again, or start the new federation in a new state directory",
            )

    def _load_state(self, initial: Digest) -> machine.State:
        self._require_same_federation()
        saved = self.journal.state()
        new = machine.State(me=self.me, peers=self.federation.peers, rounds=self.federation.plan.rounds, base=initial)
        if self.journal.meta("machine") is None:
            self.journal.set_meta("machine", machine_id())
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
        host, port = config.split_address(self.config.listen)
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
        durable.on_failure = lambda error: None

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
                    wanted[action] = lambda a=action: self._train(a)  # type: ignore[misc]
                case Declare():
                    wanted[action] = lambda a=action: self._declare(a)  # type: ignore[misc]
                case Fuse():
                    wanted[f"fuse {action.round}"] = lambda a=action: self._fuse(a)  # type: ignore[misc]
                case Push() if not self.keyring.is_revoked(action.peer):
                    wanted[action] = lambda a=action: self.delivery.push(a)  # type: ignore[misc]
                case _:
                    pass
        if self._last_to_validate() is not None and not self.paused:
            wanted["validate"] = self._validate_last
        for key in [k for k in self._running if not isinstance(k, str) or k.split()[0] in ("fuse", "validate")]:
            task = self._running[key]
            if key not in wanted and not task.done() and task is not asyncio.current_task():
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

    # ------------------------------------------------------------------ actions

    async def _declare(self, action: Declare) -> None:
        samples = int(self.journal.meta("samples") or 0)
        if action.round > 0:  # the opening statement may be corrected
            await self.recovery.check()
        self._publish(self._manifest(action.round, Digest(action.base), 0, samples, None, self.known_state()))

    async def _train(self, action: Train) -> None:
        await self._wait_for_room()
        try:
            event = await self.trainer.run(
                {
                    "job": "train",
                    "round": action.round,
                    "base": str(self.layout.fused(action.round - 1)),
                    "base_sha256": action.base,
                    "out": str(self.layout.outbox(action.round)),
                }
            )
        finally:
            self.epoch = self.busy = None
        await self.recovery.check()
        self._publish(
            self._manifest(
                action.round,
                Digest(event["sha256"]),
                event["bytes"],
                event["samples"],
                event["auc"],
                self.known_state(),
            )
        )

    def _manifest(
        self, round: Round, sha256: Digest, size: int, samples: int, auc: float | None, state: machine.State
    ) -> Manifest:
        plan = self.federation.plan
        aucs = [*self.journal.my_aucs(self.me, round), auc]
        return Manifest(
            federation=self.federation.digest,
            round=round,
            peer=self.me,
            sha256=sha256,
            bytes=size,
            base=state.base,
            inputs={str(p): str(d) for p, d in state.inputs.items()},
            samples=samples,
            auc=auc,
            plateau=plateaued(aucs, rounds=plan.plateau_rounds, improvement=plan.plateau_improvement),
            halted=state.phase is Phase.HALTED,
            anchor=self.federation.anchor.fingerprint if self.federation.anchor else None,
            schema=self.known_schema().digest,
            instance=self.journal.meta("instance") or "",
            software=self.software(),
        )

    def _publish(self, manifest: Manifest) -> None:
        """Promise it durably: from here on this round has one checkpoint of mine. The pushes follow from the state."""
        sha256 = Digest(manifest.sha256)
        signed = self.journal.signed(manifest.round)
        if signed is not None and signed[0] == sha256 and manifest.round > 0:
            # Signed before the state was lost, and trained again: there is one manifest of a round, the first.
            document = signed[1]
            keys = self.keyring.chain(self.me)  # the key may have been replaced since
            manifest = parse_manifest(identity.verify(document, keys, identity.MANIFEST_NAMESPACE))
        else:
            document = self.identity.sign(manifest.content(), identity.MANIFEST_NAMESPACE)
        self.apply(
            Trained(claim_of(manifest)),
            lambda: self.journal.record_signed(manifest.round, sha256, document),
            lambda: self.journal.record_manifest(manifest.round, self.me, sha256, document, manifest.content()),
        )

    async def _fuse(self, action: Fuse) -> None:
        state = self.known_state()
        samples = {p: c.samples for p, c in state.have.items()}
        paths = paths_of(self.layout, action.round, self.me, state.peers)

        def progress(share: float) -> None:
            self.fusing = share

        while True:
            try:
                digest, figures = await asyncio.to_thread(
                    poisoning.fuse_watched,
                    self.federation.plan.fusion,
                    paths,
                    samples,
                    self.known_schema(),
                    self.layout.fused(action.round - 1),
                    self.layout.fused(action.round),
                    progress,
                )
                break
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                self.alarms.sound("disk", f"no room for the fused model: {exc.strerror}", "free some space")
                await asyncio.sleep(NO_ROOM_RETRY_S)
        self.alarms.settle("disk")
        self.fusing = 0.0
        log.info("fused", extra={"round": action.round, "sha256": digest, "peers": len(paths)})
        self.apply(
            Fused(action.round, digest),
            lambda: self.journal.record_fused(action.round, digest),
            lambda: poisoning.record_fusion(self.journal, action.round, figures),
        )
        poisoning.renew(self.journal, self.alarms, self.me, state.peers)
        best = self.journal.best_fused()
        await asyncio.to_thread(
            self.store.prune, self.known_state().round, frozenset({0} | ({best[0]} if best else set()))
        )

    def _last_to_validate(self) -> Round | None:
        """The last fusion has no next round to be validated in."""
        state = self.known_state()
        if state.phase not in (Phase.AGREE, Phase.FINISHED) or state.round == 0:
            return None
        done = {r["round"]: r["validated"] for r in self.journal.rows("fused")}
        return None if done.get(state.round - 1) else state.round - 1

    async def _validate_last(self) -> None:
        round = self._last_to_validate()
        if round is not None:
            await self.trainer.run({"job": "validate", "round": round, "base": str(self.layout.fused(round))})
        self.busy = None
        await self.trainer.stop()  # nothing more to train: give the memory back

    async def _wait_for_room(self) -> None:
        while True:
            try:
                self.store.require_room(self.known_schema().file_bytes, len(self.federation.peers))
                return self.alarms.settle("disk")
            except LocalStateError as exc:
                self.alarms.sound("disk", exc.message, exc.remedy)
                await asyncio.sleep(NO_ROOM_RETRY_S)

    # ------------------------------------------------------------------ the inbox server's word

    def _connected(self, peer: Peer) -> None:
        self.intake.last_seen[peer] = time.time()
        self.delivery.wake(peer)
        self.proofs.connected(peer)

    def _seen_twice(self, peer: Peer, twice: bool) -> None:
        """Two processes with this peer's key take turns in connecting: see `sync/runs.py`."""
        if twice:
            text = f"two nodes with the key of {peer} are at work: a clone, or a copy of its state directory"
            fix = f"call {peer}: it must stop one of them and restart the other; nothing differing is fused meanwhile"
            self.alarms.sound(f"twice {peer}", text, fix)
        else:
            self.alarms.settle(f"twice {peer}")

    def _disk_failed(self, error: LocalStateError) -> None:
        """A failed fsync is never retried: leave, and go on from the journal."""
        self._fatal = self._fatal or error
        self._stopping.set()

    # ------------------------------------------------------------------ keys

    def trust(self, changed: Keyring, own: Identity) -> None:
        """The operator changed keyring.toml, or this node's key: sessions of keys that went end, pushes begin anew."""
        before, self.keyring = self.keyring, changed
        rekeyed = own.public != self.identity.public
        self.identity = own
        if self.server is not None:
            self.server.trust(changed)
            if rekeyed:
                self.server.show(own)
        if rekeyed:
            log.warning("this node uses another key now", extra={"fingerprint": own.fingerprint})
        for peer in self.federation.peers:
            if before.keys(peer) != changed.keys(peer):
                now = keyring.shown(changed.keys(peer))
                was = keyring.shown(before.keys(peer))
                log.warning("keys changed", extra={"peer": peer, "before": was, "now": now})
                self.journal.note("warning", "keys", f"{peer}: keys that count here now: {now}")
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

    # ------------------------------------------------------------------ trainer events, control, pulse

    def _trainer_event(self, event: dict[str, Any]) -> None:
        with self.journal.transaction():
            self._record(event)

    def _record(self, event: dict[str, Any]) -> None:
        match event.get("event"):
            case "initialised":
                self.journal.set_meta("samples", str(event["images"]["train"]))
                self.journal.set_meta("torch", str(event["versions"]["torch"]))
                self.journal.set_meta("device", str(event["device"]))
                for number, text in enumerate(event.get("warnings", ())):
                    self.alarms.sound(f"data {number}", text, "look at `hsl-node data check`")
            case "progress":
                self.epoch = event
                self.busy = None
            case "busy":
                self.busy = event
            case "epoch":
                self.journal.record_epoch(event["round"], event["epoch"], event)
                log.info("epoch", extra={k: event.get(k) for k in ("round", "epoch", "auc", "validation_loss")})
            case "validated":
                self.journal.record_validation(event["round"], event["auc"], event.get("loss"))
                log.info("fused model validated", extra={"round": event["round"], "auc": event["auc"]})
                poisoning.record_validation(self.journal, self.me, event)
                poisoning.renew(self.journal, self.alarms, self.me, self.federation.peers)
            case _:
                pass

    async def _control(self, op: str, request: dict[str, Any]) -> dict[str, Any]:
        match op:
            case "status":
                return {"ok": True, "status": snapshot(self)}
            case "pause" | "resume":
                self.paused = op == "pause"
                self.journal.set_meta("paused", "1" if self.paused else "0")
                log.info(op)
                if self.state is not None:
                    self._reconcile()
                return {"ok": True}
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

    async def _pulse(self) -> None:
        """Tell systemd that the loop lives, and what the node is doing."""
        while True:
            service.notify("WATCHDOG=1", f"STATUS={self._headline()}")
            if self.state is None:  # a first start decodes all images, however long that takes
                service.notify(service.extend(STARTING_S))
            self._watch_room()
            await asyncio.sleep(min(PULSE_S, service.watchdog_interval_s() or PULSE_S))

    def _watch_room(self) -> None:
        """Below its reserve our inbox takes nothing any more; the peers only learn that it failed, so say it here."""
        disk = os.statvfs(self.layout.state)
        free, least = disk.f_bavail * disk.f_frsize, Quota.reserve_bytes
        if self.schema is not None:
            least += self.schema.file_bytes
        if free >= least:
            return self.alarms.settle("room")
        text = f"{free / 1e6:.0f} MB free: no checkpoint of a peer is taken in below {least / 1e6:.0f} MB"
        self.alarms.sound("room", text, "free some space; the node goes on by itself")

    def _headline(self) -> str:
        """One line for `systemctl status`."""
        state = self.state
        if state is None:
            return "starting"
        training = 0 < state.round <= state.rounds and state.phase is not Phase.FINISHED
        waiting = f", waiting for {', '.join(state.missing)}" if state.me in state.have and state.missing else ""
        return str(state.phase) + (f", round {state.round} of {state.rounds}" if training else "") + waiting

    def software(self) -> str:
        """Versions that decide what is computed, for manifests and for people."""
        return f"hsl-node {__version__}, torch {self.journal.meta('torch') or 'unknown'}"[:80]

    def known_state(self) -> machine.State:
        assert self.state is not None, "asked for the state before it was loaded"
        return self.state

    def known_schema(self) -> Schema:
        assert self.schema is not None, "asked for the schema before it was known"
        return self.schema
