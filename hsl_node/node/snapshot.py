"""A running node's snapshot: every figure is measured now or read from the journal, none is configured state."""

from __future__ import annotations

import os
import sqlite3
import time

from hsl_node.federation.names import Peer
from hsl_node.federation.strings import fingerprint
from hsl_node.node.daemon import Daemon
from hsl_node.node.trainer import KILL_SILENT_S, TROUBLED
from hsl_node.status import snapshot as schema
from hsl_node.status.recorded import HALTED_FIX, receipt_text, still_to_do, told_by
from hsl_node.status.snapshot import Snapshot, StatusWarning
from hsl_node.sync.round import Phase


def snapshot(daemon: Daemon) -> Snapshot:
    here, state = daemon.here, daemon.state
    federation, plan, journal = here.federation, here.federation.plan, here.journal
    trainer = schema.TrainerStatus(**daemon.training.trainer.status())
    since = (daemon.running.machine.entered if daemon.running else daemon.started).wall
    waiting = list(state.missing) if state and state.me in state.have else []
    recovering_from = sorted(daemon.recovery.waiting.peers) if daemon.recovery and not daemon.running else []
    waiting = waiting or recovering_from or _held_by(daemon, trainer.state)
    receipts = journal.last_receipts()
    word = _word(daemon, trainer.state)
    return Snapshot(
        node=here.me,
        fingerprint=daemon.keys.identity.fingerprint,
        pid=os.getpid(),
        state=word,
        since=max(since, daemon.paused_at.wall) if word == "paused" else since,
        started=daemon.started.wall,
        federation=schema.Agreed(
            federation.name, federation.fed8, len(federation.peers), plan.rounds, plan.method, plan.task
        ),
        round=state.round if state else None,
        rounds=plan.rounds,
        phase=str(state.phase) if state else None,
        reason=state.reason if state else "",
        epoch=_epoch(daemon),
        busy=schema.Busy(**daemon.training.busy) if daemon.training.busy else None,
        fusing=(daemon.running and daemon.running.fusing.share) or None,
        peers=tuple(_peer(daemon, p, receipts.get(p)) for p in here.others),
        waiting_for=tuple(waiting),
        waiting_since=since if waiting else None,
        still_to_do=_still_to_do(daemon),
        disk=_disk(daemon),
        trainer=trainer,
        warnings=_warnings(daemon, trainer, since),
        **told_by(journal, here.me),
    )


def _word(daemon: Daemon, trainer: str) -> str:
    state = daemon.state
    if state is None:
        if "recovering" in daemon.alarms:  # until it is done, also when all have answered
            return "recovering"
        return "degraded" if trainer in TROUBLED else "starting"
    if state.phase is Phase.HALTED:
        return "halted"
    if trainer in TROUBLED or state.reason or "diverged" in daemon.alarms:
        return "degraded"
    match state.phase:
        case Phase.TRAIN:
            return "paused" if daemon.paused else "waiting" if _held_by(daemon, trainer) else "training"
        case Phase.FUSE:
            return "fusing"
        case Phase.FINISHED:
            return "finished"
        case Phase.AGREE:
            return "agreeing"
        case _:
            return "sending" if any(r == state.round for r, _ in state.owed) else "waiting"


def _still_to_do(daemon: Daemon) -> schema.StillToDo | None:
    state, ring = daemon.state, daemon.keys.ring
    if state is None:
        return None
    return still_to_do(daemon.here.journal, state.phase, {p for _, p in state.owed if not ring.is_revoked(p)})


def _held_by(daemon: Daemon, trainer: str) -> list[Peer]:
    """Whose word keeps this node from signing; while it trains that costs nothing yet."""
    return [] if trainer == "working" or daemon.running is None else list(daemon.running.before_signing.waiting_for)


def _epoch(daemon: Daemon) -> schema.Epoch | None:
    progress = daemon.training.epoch
    if progress is None:
        return None
    told = {key: progress.get(key) for key in ("epoch", "batch", "batches", "images_per_s")}
    return schema.Epoch(of=daemon.here.federation.plan.epochs_per_round, **told)


def _peer(daemon: Daemon, peer: Peer, receipt: sqlite3.Row | None) -> schema.PeerStatus:
    card, revoked = daemon.here.federation.get(peer), daemon.keys.ring.is_revoked(peer)
    transfer = daemon.delivery.transfers[peer]
    return schema.PeerStatus(
        name=peer,
        address=card.address,
        fingerprint=fingerprint(daemon.keys.ring.newest(peer)),
        revoked=revoked,
        connected=daemon.server is not None and peer in daemon.server.admission.connected(),
        last_seen=daemon.last_seen[peer].wall if peer in daemon.last_seen else None,
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
        received=_received(daemon, peer),
        receipt=receipt_text(receipt),
        life=None if revoked else daemon.liveness.of(peer),
    )


def _received(daemon: Daemon, peer: Peer) -> schema.Received:
    round = daemon.state.round if daemon.state else 0
    total = daemon.schema.file_bytes if daemon.schema else 0
    claim = daemon.state.have.get(peer) if daemon.state else None
    if claim is not None:
        row = daemon.here.journal.manifest(claim.round, peer)
        score = row["content"]["score"] if row else None
        return schema.Received("verified", round, 0 if claim.statement else total, total, 0.0, claim.sha256, score)
    for incoming in daemon.server.incoming(round) if daemon.server else ():
        if incoming.name.peer == peer:
            return schema.Received("receiving", round, incoming.bytes, incoming.total, incoming.rate_bytes_per_s)
    state = "refused" if f"refused {peer}" in daemon.alarms else "nothing"
    return schema.Received("revoked" if daemon.keys.ring.is_revoked(peer) else state, round, 0, total, 0.0)


def _disk(daemon: Daemon) -> schema.Disk | None:
    here = daemon.here
    if daemon.schema is None:
        return None
    room = here.store.room(daemon.schema.file_bytes, len(here.federation.peers), here.reserve_bytes)
    return schema.Disk(room.free, room.round)


def _warnings(daemon: Daemon, trainer: schema.TrainerStatus, since: float) -> tuple[StatusWarning, ...]:
    state = daemon.state
    warnings = [StatusWarning("halted", state.reason, since, HALTED_FIX)] if state and state.reason else []
    warnings += [StatusWarning(**alarm) for alarm in daemon.alarms.listing()]
    if trainer.state in TROUBLED:
        text = f"the trainer gave no sign of life for {trainer.last_event_s:.0f} s"
        when = f"after {KILL_SILENT_S / 60:.0f} min of silence"
        if trainer.state == "restarting":
            text = f"the trainer died and is started again ({trainer.restarts} so far): {trainer.last_error}"
            when = "by itself, ever more rarely while it dies"
        fix = f"see log/trainer.log; the node restarts it {when}, from the last epoch on the disk"
        warnings.append(StatusWarning("trainer", text, time.time() - trainer.last_event_s, fix))
    if daemon.paused and state and not daemon.is_over():
        text = "training is paused here; the other hospitals will wait for this one"
        if state.phase in (Phase.FINISHED, Phase.HALTED):
            text = "this node is paused: its last fused model is not validated"
        warnings.append(StatusWarning("paused", text, daemon.paused_at.wall, "`hsl-node resume`"))
    return tuple(warnings)
