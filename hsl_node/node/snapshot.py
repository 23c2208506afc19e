"""A running node's snapshot: every figure is measured now or read from the journal, none is configured state."""

from __future__ import annotations

import os
import sqlite3
import time
from typing import TYPE_CHECKING

from hsl_node.federation.names import Peer
from hsl_node.federation.strings import fingerprint
from hsl_node.node.trainer import KILL_SILENT_S
from hsl_node.status import snapshot as schema
from hsl_node.status.recorded import HALTED_FIX, receipt_text, still_to_do, told_by
from hsl_node.status.snapshot import Snapshot, StatusWarning
from hsl_node.sync.round import Phase
from hsl_node.sync.store.room import reserve_of

if TYPE_CHECKING:
    from hsl_node.node.daemon import Node


def snapshot(node: Node) -> Snapshot:
    state = node.state
    trainer = schema.TrainerStatus(**node.trainer.status())
    phases = {r["phase"]: r["started"] for r in node.journal.rows("phases", state.round)} if state else {}
    since = phases.get(str(state.phase), node.started) if state else node.started
    waiting = list(state.missing) if state and state.me in state.have else []
    waiting = waiting or sorted(node.recovery.waiting) or _held_by(node, trainer.state)
    receipts = node.journal.last_receipts()
    word = _word(node, trainer.state)
    return Snapshot(
        node=node.me,
        fingerprint=node.identity.fingerprint,
        pid=os.getpid(),
        state=word,
        since=max(since, node.paused_at) if word == "paused" else since,
        started=node.started,
        federation=schema.Agreed(
            name=node.federation.name,
            hash=node.federation.fed8,
            peers=len(node.federation.peers),
            rounds=node.federation.plan.rounds,
            method=node.federation.plan.method,
            task=node.federation.plan.task,
        ),
        round=state.round if state else None,
        rounds=node.federation.plan.rounds,
        phase=str(state.phase) if state else None,
        reason=state.reason if state else "",
        epoch=_epoch(node),
        busy=schema.Busy(**node.work.busy) if node.work.busy else None,
        fusing=node.work.fusing or None,
        peers=tuple(_peer(node, p, receipts.get(p)) for p in node.others),
        waiting_for=tuple(waiting),
        waiting_since=since if waiting else None,
        still_to_do=_still_to_do(node),
        disk=_disk(node),
        trainer=trainer,
        warnings=_warnings(node, trainer, since),
        **told_by(node.journal, node.me),
    )


def _word(node: Node, trainer: str) -> str:
    state = node.state
    if state is None:
        if "recovering" in node.alarms:  # until it is done, also when all have answered
            return "recovering"
        return "degraded" if trainer in ("silent", "restarting") else "starting"
    if state.phase is Phase.HALTED:
        return "halted"
    if trainer in ("silent", "restarting") or state.reason or "diverged" in node.alarms:
        return "degraded"
    match state.phase:
        case Phase.TRAIN:
            return "paused" if node.paused else "waiting" if _held_by(node, trainer) else "training"
        case Phase.FUSE:
            return "fusing"
        case Phase.FINISHED:
            return "finished"
        case Phase.AGREE:
            return "agreeing"
        case _:
            return "sending" if any(r == state.round for r, _ in state.owed) else "waiting"


def _still_to_do(node: Node) -> schema.StillToDo | None:
    state = node.state
    if state is None:
        return None
    return still_to_do(node.journal, state.phase, {p for _, p in state.owed if not node.keyring.is_revoked(p)})


def _held_by(node: Node, trainer: str) -> list[Peer]:
    """Whose word keeps this node from signing; while it trains that costs nothing yet."""
    return [] if trainer == "working" else list(node.asking.held_by)


def _epoch(node: Node) -> schema.Epoch | None:
    progress = node.work.epoch
    if progress is None:
        return None
    epoch, batch, batches, images_per_s = (progress.get(k) for k in ("epoch", "batch", "batches", "images_per_s"))
    return schema.Epoch(epoch, node.federation.plan.epochs_per_round, batch, batches, images_per_s)


def _peer(node: Node, peer: Peer, receipt: sqlite3.Row | None) -> schema.PeerStatus:
    card, revoked = node.federation.get(peer), node.keyring.is_revoked(peer)
    transfer = node.delivery.transfers[peer]
    return schema.PeerStatus(
        name=peer,
        address=card.address,
        fingerprint=fingerprint(node.keyring.newest(peer)),
        revoked=revoked,
        connected=node.server is not None and peer in node.server.connected(),
        last_seen=node.intake.last_seen.get(peer),
        sent=schema.Sent(
            state="revoked" if revoked else transfer.state,
            round=transfer.round,
            bytes=transfer.sent,
            total=transfer.total,
            rate=transfer.rate_bytes_per_s,
            retries=transfer.retries,
            resent=transfer.resent_bytes,
            last_error=transfer.last_error,
            next_try_s=max(0.0, transfer.next_try - time.monotonic()) if transfer.next_try else None,
        ),
        received=_received(node, peer),
        receipt=receipt_text(receipt),
    )


def _received(node: Node, peer: Peer) -> schema.Received:
    round = node.state.round if node.state else 0
    incoming = next((i for i in node.server.incoming(round) if i.name.peer == peer), None) if node.server else None
    total = node.schema.file_bytes if node.schema else 0
    claim = node.state.have.get(peer) if node.state else None
    if claim is not None:
        row = node.journal.manifest(claim.round, peer)
        size = 0 if claim.statement else total
        return schema.Received(
            "verified", round, size, total, 0.0, claim.sha256, row["content"]["auc"] if row else None
        )
    if incoming is not None:
        return schema.Received("receiving", round, incoming.bytes, incoming.total, incoming.rate_bytes_per_s)
    state = "refused" if f"refused {peer}" in node.alarms else "nothing"
    return schema.Received("revoked" if node.keyring.is_revoked(peer) else state, round, 0, total, 0.0)


def _disk(node: Node) -> schema.Disk | None:
    if node.schema is None:
        return None
    room = node.store.room(node.schema.file_bytes, len(node.federation.peers), reserve_of(node.config.inbox.kind))
    return schema.Disk(room.free, room.round)


def _warnings(node: Node, trainer: schema.TrainerStatus, since: float) -> tuple[StatusWarning, ...]:
    warnings = [StatusWarning(**alarm) for alarm in node.alarms.listing()]
    if trainer.state in ("silent", "restarting"):
        text = (
            f"the trainer gave no sign of life for {trainer.last_event_s:.0f} s"
            if trainer.state == "silent"
            else f"the trainer died and is started again ({trainer.restarts} so far): {trainer.last_error}"
        )
        minutes = f"{KILL_SILENT_S / 60:.0f}"
        fix = f"see log/trainer.log; the node restarts it after {minutes} min of silence and loses at most one epoch"
        warnings.append(StatusWarning("trainer", text, time.time() - trainer.last_event_s, fix))
    if node.paused and node.state is not None and not node.is_over():
        text = "training is paused here; the other hospitals will wait for this one"
        if node.state.phase in (Phase.FINISHED, Phase.HALTED):
            text = "this node is paused: its last fused model is not validated"
        warnings.append(StatusWarning("paused", text, node.paused_at, "`hsl-node resume`"))
    if node.state is not None and node.state.reason:
        warnings.insert(0, StatusWarning("halted", node.state.reason, since, HALTED_FIX))
    return tuple(warnings)
