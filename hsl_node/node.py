"""The daemon of one hospital. Runs the actions of the round machine and feeds back what happened.

The only file that knows both `sync` and the trainer. Read `sync/round.py` first: there is what happens; here is how.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsl_node import __version__, config, identity, service
from hsl_node.config import Federation, NodeConfig
from hsl_node.control import serve
from hsl_node.errors import ConfigError, Equivocation, FederationMismatch, HslError, LocalStateError, escaped
from hsl_node.node_status import snapshot
from hsl_node.sync import receive
from hsl_node.sync import round as machine
from hsl_node.sync.fuse_files import fuse_files
from hsl_node.sync.journal import Journal
from hsl_node.sync.manifest import Manifest
from hsl_node.sync.names import Digest, FileName, Kind, Peer, Round
from hsl_node.sync.push import Parcel, Transfer, push
from hsl_node.sync.round import Action, Arrived, Claim, Declare, Delivered, Fuse, Fused, Phase, Push, Train, Trained
from hsl_node.sync.server import InboxServer
from hsl_node.sync.store import Layout, Store, paths_of
from hsl_node.sync.tensors import Schema, read_schema, sha256_of
from hsl_node.trainer import Trainer

log = logging.getLogger(__name__)

RESCAN_S = 30.0  # the embedded inbox announces every arrival; this is the safety net
RESCAN_DIRECTORY_S = 1.0  # an inbox that another server writes has to be looked at
REFUSED_RETRY_S = 60.0  # a peer refused our checkpoint; a person may mend the reason at either site meanwhile
NO_ROOM_RETRY_S = 30.0
PULSE_S = 5.0  # watchdog, systemd's status line


@dataclass
class Warning_:  # noqa: N801  (the builtin has the other name)
    code: str
    text: str
    fix: str
    since: float


@dataclass
class Node:
    """One running daemon. `run` is the whole life; everything else reacts."""

    config: NodeConfig
    federation: Federation
    identity: identity.Identity
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
        self.transfers = {p: Transfer(peer=p) for p in self.others}
        self.last_seen: dict[Peer, float] = {}
        self.verified: dict[Peer, tuple[Round, Digest]] = {}
        self.warnings: dict[str, Warning_] = {}
        self.paused = self.journal.meta("paused") == "1"
        self._running: dict[Action | str, asyncio.Task[None]] = {}
        self._wake_push = {p: asyncio.Event() for p in self.others}
        self._wake_scan = {p: asyncio.Event() for p in self.others}
        self._one_push = {p: asyncio.Lock() for p in self.others}
        self._stopping = asyncio.Event()
        self._fatal: BaseException | None = None

    # ------------------------------------------------------------------ life

    async def run(self) -> int:
        """From start to SIGTERM. Gives the exit code."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._stopping.set)
        async with serve(self.layout.state / "run" / "control.sock", self._control):
            self._spawn("pulse", self._pulse())
            self._spawn("begin", self._begin())
            await self._stopping.wait()
            service.notify("STOPPING=1", "STATUS=saving and leaving")
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
        self.state = self._load_state(await asyncio.to_thread(sha256_of, initial))
        await self._open_inbox()
        for peer in self.others:
            self._spawn(f"ingest {peer}", self._ingest(peer))
        service.notify("READY=1")
        log.info("started", extra={"round": self.state.round, "phase": str(self.state.phase)})
        self._reconcile()

    def _load_state(self, initial: Digest) -> machine.State:
        saved = self.journal.state()
        new = machine.State(me=self.me, peers=self.federation.peers, rounds=self.federation.plan.rounds, base=initial)
        before = self.journal.meta("federation")
        if saved is not None and before == self.federation.digest:
            state = machine.from_json(saved)
            if state.round > 0 or state.base == initial:
                return state
        elif saved is not None and machine.from_json(saved).round > 0:
            raise FederationMismatch(
                f"this journal belongs to federation {str(before)[:8]}, federation.toml is now {self.federation.fed8}",
                remedy="join the old file again, or start the new federation in a new state directory",
            )
        with self.journal.transaction():
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
            data_bytes=self._schema().file_bytes,
            on_commit=self._committed,
            on_connect=self._connected,
            on_fatal=self._disk_failed,
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

    def _apply(self, event: machine.Event, *records: Callable[[], None]) -> None:
        """One event: next state and its records durable in one transaction, then the actions."""
        before = self._state()
        after, _ = machine.step(before, event)
        with self.journal.transaction():
            for record in records:
                record()
            self.journal.save_state(machine.to_json(after))
            self.journal.record_phase(after.round, after.phase)
        self.state = after
        if (after.phase, after.round) != (before.phase, before.round):
            log.info("phase", extra={"phase": str(after.phase), "round": after.round, "base": after.base[:12]})
            for wake in self._wake_scan.values():
                wake.set()  # what waited one round ahead may be acceptable now
        if after.phase is Phase.HALTED and before.phase is not Phase.HALTED:
            log.error("halted: peers disagree", extra={"reason": after.reason})
            self.journal.note("error", "halted", after.reason)
        self._reconcile()

    def _reconcile(self) -> None:
        """Start what is to do and not under way; cancel what is under way and not to do any more."""
        wanted: dict[Action | str, Callable[[], Coroutine[Any, Any, None]]] = {}
        for action in machine.todo(self._state()):
            match action:
                case Train() if not self.paused:
                    wanted[action] = lambda a=action: self._train(a)  # type: ignore[misc]
                case Declare():
                    wanted[action] = lambda a=action: self._declare(a)  # type: ignore[misc]
                case Fuse():
                    wanted[f"fuse {action.round}"] = lambda a=action: self._fuse(a)  # type: ignore[misc]
                case Push():
                    wanted[action] = lambda a=action: self._push(a)  # type: ignore[misc]
                case _:
                    pass
        if self._last_to_validate() is not None and not self.paused:
            wanted["validate"] = self._validate_last
        for key in [k for k in self._running if not isinstance(k, str) or k.split()[0] in ("fuse", "validate")]:
            if key not in wanted and not self._running[key].done():
                self._running[key].cancel()
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
        event = self.trainer.initialised or await self.trainer.run({"job": "init"})
        state = self._state()
        samples = int(event["images"]["train"])
        self.journal.set_meta("samples", str(samples))
        self.journal.set_meta("torch", str(event.get("versions", {}).get("torch", "")))
        self.journal.set_meta("device", str(event.get("device", "")))
        self._publish(self._manifest(action.round, Digest(action.base), 0, samples, None, state))

    async def _train(self, action: Train) -> None:
        await self._wait_for_room()
        self.epoch = None
        event = await self.trainer.run(
            {
                "job": "train",
                "round": action.round,
                "base": str(self.layout.fused(action.round - 1)),
                "base_sha256": action.base,
                "out": str(self.layout.outbox(action.round)),
            }
        )
        self.epoch = None
        self._publish(
            self._manifest(
                action.round, Digest(event["sha256"]), event["bytes"], event["samples"], event["auc"], self._state()
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
            plateau=machine.plateaued(aucs, rounds=plan.plateau_rounds, improvement=plan.plateau_improvement),
            anchor=self.federation.anchor.fingerprint if self.federation.anchor else None,
            schema=self._schema().digest,
            instance=self.journal.meta("instance") or "",
            software=f"hsl-node {__version__}, torch {self.journal.meta('torch') or 'unknown'}"[:80],
        )

    def _publish(self, manifest: Manifest) -> None:
        """Promise it durably: from here on this round has one checkpoint of mine. The pushes follow from the state."""
        document = self.identity.sign(manifest.content(), identity.MANIFEST_NAMESPACE)
        sha256 = Digest(manifest.sha256)
        self._apply(
            Trained(claim_of(manifest)),
            lambda: self.journal.record_signed(manifest.round, sha256, document),
            lambda: self.journal.record_manifest(manifest.round, self.me, sha256, document, manifest.content()),
        )

    async def _push(self, action: Push) -> None:
        """Deliver to one peer until it accepts. Older rounds first."""
        peer = action.peer
        async with self._one_push[peer]:
            parcel = self._parcel(action.round)
            transfer = self.transfers[peer]
            began = time.monotonic()
            while True:
                receipt = await push(
                    self.federation.get(peer),
                    parcel,
                    me=self.me,
                    identity=self.identity,
                    federation=self.federation,
                    client=self.config.client,
                    transfer=transfer,
                    wake=self._wake_push[peer],
                    rng=random.Random(),
                )
                document = b""
                if receipt.accepted:
                    break
                text = f"{peer} refuses this node's round {action.round} ({receipt.code}): {escaped(receipt.text)}"
                self._warn(
                    f"refused by {peer}", text, "settle it with that hospital; this node tries again every minute"
                )
                await asyncio.sleep(REFUSED_RETRY_S)
            self._settle(f"refused by {peer}")
            seconds = time.monotonic() - began
            self._apply(
                Delivered(peer, action.round),
                lambda: self.journal.record_receipt(
                    action.round, peer, receipt.accepted, receipt.code, receipt.text, document
                ),
                lambda: self.journal.record_transfer(
                    action.round, peer, "sent", parcel.bytes, transfer.resent_bytes, transfer.retries, seconds
                ),
            )
            log.info("delivered", extra={"peer": peer, "round": action.round, "bytes": parcel.bytes})

    def _parcel(self, round: Round) -> Parcel:
        signed = self.journal.signed(round)
        if signed is None:
            raise LocalStateError(f"round {round} is owed but was never signed", remedy="restore the journal")
        sha256, document = signed
        name = FileName(self.federation.fed8, round, self.me, sha256, Kind.DATA)
        data = self.layout.outbox(round)
        manifest = self.journal.manifest(round, self.me)
        size = 0 if manifest is None else int(manifest["content"]["bytes"])
        return Parcel(name=name, data=data if size else None, bytes=size, manifest=document)

    async def _fuse(self, action: Fuse) -> None:
        state = self._state()
        samples = {p: c.samples for p, c in state.have.items()}
        paths = paths_of(self.layout, action.round, self.me, state.peers)

        def progress(share: float) -> None:
            self.fusing = share

        digest = await asyncio.to_thread(
            fuse_files,
            self.federation.plan.fusion,
            paths,
            samples,
            self._schema(),
            self.layout.fused(action.round),
            progress,
        )
        self.fusing = 0.0
        log.info("fused", extra={"round": action.round, "sha256": digest, "peers": len(paths)})
        self._apply(Fused(action.round, digest), lambda: self.journal.record_fused(action.round, digest))
        best = self.journal.best_fused()
        await asyncio.to_thread(self.store.prune, self._state().round, frozenset({0} | ({best[0]} if best else set())))

    def _last_to_validate(self) -> Round | None:
        """The last fusion has no next round to be validated in."""
        state = self._state()
        if state.phase not in (Phase.AGREE, Phase.FINISHED) or state.round == 0:
            return None
        done = {r["round"]: r["validated"] for r in self.journal.rows("fused")}
        return None if done.get(state.round - 1) else state.round - 1

    async def _validate_last(self) -> None:
        round = self._last_to_validate()
        if round is not None:
            await self.trainer.run({"job": "validate", "round": round, "base": str(self.layout.fused(round))})
        await self.trainer.stop()  # nothing more to train: give the memory back

    async def _wait_for_room(self) -> None:
        while True:
            try:
                self.store.require_room(self._schema().file_bytes, len(self.federation.peers))
                return self._settle("disk")
            except LocalStateError as exc:
                self._warn("disk", exc.message, exc.remedy)
                await asyncio.sleep(NO_ROOM_RETRY_S)

    # ------------------------------------------------------------------ what arrives

    def _committed(self, peer: Peer) -> None:
        self._wake_scan[peer].set()

    def _disk_failed(self, error: LocalStateError) -> None:
        """A failed fsync is never retried: leave, and go on from the journal."""
        self._fatal = self._fatal or error
        self._stopping.set()

    def _connected(self, peer: Peer) -> None:
        self.last_seen[peer] = time.time()
        self._wake_push[peer].set()  # it is up again: whatever we owe it goes now

    async def _ingest(self, peer: Peer) -> None:
        """Take in what this peer has put into our inbox, for ever."""
        directory = self.config.inbox.directory
        homes = self.layout.homes if directory is None else directory
        wake = self._wake_scan[peer]
        while True:
            wake.clear()
            found = await asyncio.to_thread(
                receive.scan,
                peer,
                homes=homes,
                claimed=self.layout.claimed,
                federation=self.federation,
                current=self._state().round,
                schema=self._schema(),
                anchor=self.federation.anchor.fingerprint if self.federation.anchor else None,
                me=self.me,
                take_digest=self.server.take_digest if self.server else (lambda p, n: None),
            )
            for item in found:
                match item:
                    case receive.Arrival():
                        await self._arrived(item, homes)
                    case receive.Refusal():
                        self._refused(item, homes)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), RESCAN_S if directory is None else RESCAN_DIRECTORY_S)

    async def _arrived(self, arrival: receive.Arrival, homes: Path) -> None:
        peer, manifest = arrival.sender, arrival.manifest
        self.last_seen[peer] = time.time()
        state = self._state()
        if manifest.round == 0 and manifest.base != state.base and state.round == 0:
            text = (
                f"initial weights differ: {peer} {manifest.base[:12]} ({escaped(manifest.software)}), "
                f"{self.me} {state.base[:12]} ({self._software()})"
            )
            self._warn(f"setup {peer}", text, "same hsl-node and torch versions, same backbone_weights at both sites")
            return self._answer(arrival, homes, accepted=False, code="initial", text=text)
        self._settle(f"setup {peer}")
        self._settle(f"refused {peer}")
        known = self.journal.manifest(manifest.round, peer)
        if known is not None and known["sha256"] != manifest.sha256 and manifest.round > 0:
            self._keep_proof(known["document"], arrival)
        elif arrival.data is not None:
            await asyncio.to_thread(self.store.admit, arrival.data, manifest.round, peer)
        self.verified[peer] = (manifest.round, Digest(manifest.sha256))
        log.info(
            "checkpoint verified",
            extra={"peer": peer, "round": manifest.round, "bytes": manifest.bytes, "sha256": manifest.sha256},
        )
        equivocated = known is not None and known["sha256"] != manifest.sha256 and manifest.round > 0
        records: list[Callable[[], None]] = []
        if not equivocated:
            records.append(
                lambda: self.journal.record_manifest(
                    manifest.round, peer, manifest.sha256, arrival.document, manifest.content()
                )
            )
        self._apply(Arrived(claim_of(manifest)), *records)
        self._answer(
            arrival,
            homes,
            accepted=not equivocated,
            code="equivocation" if equivocated else "accepted",
            text="" if not equivocated else "two different checkpoints were signed for this round",
        )

    def _refused(self, refusal: receive.Refusal, homes: Path) -> None:
        """Say why to our operator, and to the sender where its signature held."""
        peer, manifest, error = refusal.sender, refusal.manifest, refusal.error
        code = getattr(error, "code", "setup")
        if manifest is not None and code == "round":
            known = self.journal.manifest(manifest.round, peer)
            if known is not None and known["sha256"] == manifest.sha256:  # our receipt was lost: say it again
                receive.answer(
                    peer,
                    manifest,
                    homes=homes,
                    me=self.me,
                    identity=self.identity,
                    accepted=True,
                    code="accepted",
                    text="",
                )
                return
            if known is not None:
                self._keep_proof(known["document"], refusal)
        log.warning("refused", extra={"peer": peer, "code": code, "reason": escaped(error.message)})
        self.journal.note("warning", f"refused {code}", f"{peer}: {escaped(error.message)}")
        self._warn(
            f"refused {peer}", f"{peer} sent what fails a check ({code}): {escaped(error.message)}", error.remedy
        )
        if manifest is not None:
            receive.answer(
                peer,
                manifest,
                homes=homes,
                me=self.me,
                identity=self.identity,
                accepted=False,
                code=code,
                text=escaped(error.message, 280),
            )

    def _answer(self, arrival: receive.Arrival, homes: Path, *, accepted: bool, code: str, text: str) -> None:
        receive.answer(
            arrival.sender,
            arrival.manifest,
            homes=homes,
            me=self.me,
            identity=self.identity,
            accepted=accepted,
            code=code,
            text=escaped(text, 280),
        )

    def _keep_proof(self, known: bytes, other: receive.Arrival | receive.Refusal) -> None:
        manifest = other.manifest
        if manifest is None or not isinstance(other, receive.Arrival):
            return
        stem = f"r{manifest.round:06d}_{other.sender}"
        self.store.keep_evidence(f"{stem}_first.manifest", known)
        path = self.store.keep_evidence(f"{stem}_{manifest.sha256[:12]}.manifest", other.document)
        error = Equivocation(
            f"{other.sender} signed two different checkpoints for round {manifest.round}; proof in {path.parent}",
            remedy="call that hospital: its node was cloned, restored from an old backup, or taken over",
        )
        log.error("equivocation", extra={"peer": other.sender, "round": manifest.round})
        self._warn(f"equivocation {other.sender}", error.message, error.remedy)

    # ------------------------------------------------------------------ trainer events, control, pulse

    def _trainer_event(self, event: dict[str, Any]) -> None:
        match event.get("event"):
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
            case "warning":
                self._warn("trainer", str(event.get("text")), str(event.get("fix", "")))
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
            case _:
                return {"ok": False, "error": f"unknown request {escaped(op)!r}"}

    async def _pulse(self) -> None:
        """Tell systemd that the loop lives, and what the node is doing."""
        while True:
            status = snapshot(self)
            service.notify("WATCHDOG=1", f"STATUS={status['state']}, round {status['round']} of {status['rounds']}")
            await asyncio.sleep(min(PULSE_S, service.watchdog_interval_s() or PULSE_S))

    def _warn(self, code: str, text: str, fix: str) -> None:
        if code not in self.warnings:
            self.warnings[code] = Warning_(code, text, fix, time.time())
            log.warning("warning", extra={"code": code, "text": text})

    def _settle(self, code: str) -> None:
        self.warnings.pop(code, None)

    def _software(self) -> str:
        return f"hsl-node {__version__}, torch {self.journal.meta('torch') or 'unknown'}"

    def _state(self) -> machine.State:
        assert self.state is not None, "asked for the state before it was loaded"
        return self.state

    def _schema(self) -> Schema:
        assert self.schema is not None, "asked for the schema before it was known"
        return self.schema


def claim_of(manifest: Manifest) -> Claim:
    """The part of a manifest that the round machine needs."""
    return Claim(
        peer=Peer(manifest.peer),
        round=manifest.round,
        sha256=Digest(manifest.sha256),
        base=Digest(manifest.base),
        inputs={Peer(p): Digest(d) for p, d in manifest.inputs.items()},
        samples=manifest.samples,
        plateau=manifest.plateau,
        statement=manifest.statement,
        software=manifest.software,
    )


def run(state: Path, trainer_command: list[str] | None = None) -> int:
    """The daemon in the foreground; gives its exit code. `trainer_command` stands in for the trainer in tests.

    Raises:
        HslError: what ended it, with its own exit code.
    """
    node_config = config.load_node(state)
    federation = config.load_federation(state)
    me = identity.load(_key_path(state))
    config.require_member(federation, node_config.name, me.public)
    _require_anchor(state, node_config, federation)
    os.umask(0o077)
    store = Store(Layout(state))
    try:
        return asyncio.run(_run(node_config, federation, me, store, trainer_command))
    finally:
        store.close()


async def _run(
    node_config: NodeConfig,
    federation: Federation,
    me: identity.Identity,
    store: Store,
    trainer_command: list[str] | None,
) -> int:
    return await Node(node_config, federation, me, store, trainer_command=trainer_command).run()


def _key_path(state: Path) -> Path:
    """systemd hands the key over as a credential; elsewhere it lies in the state directory."""
    credential = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / "node.key"
    return credential if credential.exists() else Layout(state).key


def _require_anchor(state: Path, node_config: NodeConfig, federation: Federation) -> None:
    if federation.anchor is None:
        return
    path = node_config.anchor or Layout(state).anchor
    if not path.exists():
        raise ConfigError(
            f"no anchor set at {path}; the federation uses {federation.anchor.name!r}",
            remedy=f"copy the anchor file there (fingerprint {federation.anchor.fingerprint[:12]}...)",
        )
    found = sha256_of(path)
    if found != federation.anchor.fingerprint:
        raise FederationMismatch(
            f"{path} has fingerprint {found[:12]}, the federation's anchor set {federation.anchor.fingerprint[:12]}",
            remedy="copy the anchor file of the federation; `hsl-node anchor verify` compares",
        )


__all__ = ["HslError", "Node", "run"]
