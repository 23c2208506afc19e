"""The snapshot of a node whose daemon is down: what journal and keyring.toml know, and nothing live."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Collection
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any

from hsl_node.errors import HslError
from hsl_node.federation.names import Peer, Round
from hsl_node.host.layout import Layout
from hsl_node.status import snapshot as schema
from hsl_node.status.last_words import find_ending
from hsl_node.status.snapshot import Snapshot, StatusWarning
from hsl_node.sync.candidates import find_best, in_words
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.models import harmed

ERROR_NOTES = 3  # the last things that went wrong, newest last
SCORES = ("score", "recalibrated_score")  # of a fused model
RECOVER = "`hsl-node start`: it asks its peers what it has signed, and goes on from there"
HALTED_FIX = (
    "nothing is trained on until the hospitals have settled it; `hsl-node verify` shows what is proven, the signed "
    "documents of each round are in the journal (`hsl-node verify --export DIR`)"
)


def from_journal(state: Path) -> Snapshot:
    keys = _of_the_keys(state)
    layout = Layout(state)
    if not layout.journal.exists():
        return Snapshot(warnings=keys, next=_next(layout))
    with Journal.read_only(layout.journal) as journal:
        revoked = {w.code.removeprefix("revoked ") for w in keys}
        ended, found, marked = (
            find_ending(journal),
            _recorded(journal, revoked),
            json.loads(journal.meta("recover") or "null"),
        )
    warnings = list(found.warnings)
    if ended is not None and ended.how != "stopped":
        since = ended.at if ended.how == "failed" else None  # when it was killed nobody knows
        warnings.insert(0, StatusWarning("ended", ended.text, since, ended.fix))
    for harm in harmed(layout, whole=False):  # a look at their names; their bytes are compared at the next start
        warnings.append(StatusWarning(harm.model.code, harm.text(layout), None, harm.fix(layout)))
    disk = schema.Disk(shutil.disk_usage(state).free)
    left = RECOVER if marked else "" if found.node else _next(layout)
    return replace(found, ended=ended, disk=disk, warnings=(*warnings, *keys), next=left)


def _next(layout: Layout) -> str:
    """What brings a node to its first round."""
    if not layout.federation_toml.exists():
        return "give your card to the others, and `hsl-node federation join FILE` with the file that you agreed on"
    return "`hsl-node data check`, `hsl-node doctor`, then `hsl-node start`"


def _of_the_keys(state: Path) -> tuple[StatusWarning, ...]:
    """Whose keys are being changed, or revoked. From keyring.toml, which changes while the daemon is down too."""
    if not Layout(state).keyring_toml.exists():
        return ()
    from hsl_node.federation import config, keyring, node_toml  # slow to load: only where a key was changed or revoked
    from hsl_node.federation.keyring import warnings_of

    try:
        me, federation = Peer(node_toml.load_node(state).name), config.load_federation(state)
        ring = keyring.load(state, federation)
    except HslError as exc:
        return (StatusWarning("keys", exc.message, None, exc.remedy),)
    found = [warning for peer in federation.peers for warning in warnings_of(ring, peer, me).items()]
    return tuple(StatusWarning(code, text, None, fix) for code, (text, fix) in found)


def still_to_do(journal: Journal, phase: str, owed: Collection[str]) -> schema.StillToDo | None:
    """None: nothing, or the run is not over."""
    validate = journal.last_unvalidated()
    if phase not in ("finished", "halted") or not (owed or validate):
        return None
    return schema.StillToDo(tuple(sorted(owed)), validate)


def _recorded(journal: Journal, revoked: Collection[str]) -> Snapshot:
    state = journal.state()
    if state is None:
        return Snapshot()
    me, round = state["me"], state["round"]
    phases, receipts = journal.rows("phases", round), journal.last_receipts()
    waiting = [p for p in state["peers"] if p not in state["have"]] if me in state["have"] else []
    since = max((r["started"] for r in phases), default=None)
    return Snapshot(
        node=me,
        since=journal.last_written() or since,
        federation=schema.Agreed(
            hash=(journal.meta("federation") or "")[:8] or None, peers=len(state["peers"]), rounds=state["rounds"]
        ),
        round=round,
        rounds=state["rounds"],
        phase=state["phase"],
        reason=state["reason"],
        peers=tuple(_peer(state, p, journal.last_manifest(p), receipts.get(p)) for p in state["peers"] if p != me),
        waiting_for=tuple(waiting),
        waiting_since=since if waiting else None,
        still_to_do=still_to_do(journal, state["phase"], {p for _, p in state["owed"]} - set(revoked)),
        warnings=_warnings(journal, state),
        **told_by(journal, me),
    )


def told_by(journal: Journal, me: Peer) -> dict[str, Any]:
    """Fields of a Snapshot that a running node, too, has from its journal."""
    fused = {r["round"]: r for r in journal.rows("fused") if r["round"] > 0}
    mine, last = journal.scores_of(me), max(fused, default=None)
    every, score = journal.candidates(), journal.meta("score_name") or Snapshot.score_name
    best = find_best(every)
    trained = journal.rows("epochs", Round((last or 0) + 1)) or journal.rows("epochs", Round(last or 0))
    return {
        "instance": journal.meta("instance"),
        "device": journal.meta("device"),
        "loss_terms": _loss_terms(trained[-1]) if trained else None,
        "last_fused": schema.Fused(last, fused[last]["sha256"], fused[last]["score"]) if last else None,
        "scores": tuple(
            schema.Scores(round, mine.get(round), *(fused[round][key] if round in fused else None for key in SCORES))
            for round in sorted(mine.keys() | fused.keys())
        ),
        "score_name": score,
        "model": schema.Model(best.kind, best.round, best.sha256, best.score, in_words(every, score)) if best else None,
    }


def _loss_terms(row: dict[str, Any]) -> schema.LossTerms:
    return schema.LossTerms(row["round"], row["epoch"], tuple(starmap(schema.Term, row["content"]["terms"].items())))


def receipt_text(receipt: sqlite3.Row | None) -> str | None:
    return f"round {receipt['round']}: {receipt['code']}" if receipt else None


def _peer(
    state: dict[str, Any], peer: str, last: dict[str, Any] | None, receipt: sqlite3.Row | None
) -> schema.PeerStatus:
    claim, round = state["have"].get(peer), state["round"]
    size = last["content"]["bytes"] if claim and last else 0
    owed = any(p == peer and r == round for r, p in state["owed"])
    delivered = receipt is not None and receipt["round"] == round and receipt["accepted"] and not owed
    return schema.PeerStatus(
        name=peer,
        last_seen=last["at"] if last else None,
        sent=schema.Sent("done" if delivered else "idle", round),
        received=schema.Received(
            "verified" if claim else "nothing",
            round,
            bytes=size,
            total=size,
            sha256=claim["sha256"] if claim else None,
            score=last["content"]["score"] if claim and last else None,
        ),
        receipt=receipt_text(receipt),
    )


def _warnings(journal: Journal, state: dict[str, Any]) -> tuple[StatusWarning, ...]:
    told_anew = ("halted", "keys")  # as it is now: below, and `_of_the_keys`
    notes = [n for n in journal.rows("notes") if n["level"] in ("error", "warning") and n["code"] not in told_anew]
    halted = [StatusWarning("halted", state["reason"], None, HALTED_FIX)] if state["reason"] else []
    return (*halted, *(StatusWarning(n["code"], n["text"], n["at"], "") for n in notes[-ERROR_NOTES:]))
