"""The snapshot of a node whose daemon is down: what journal and keyring.toml know; the same dict, live parts None."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hsl_node import __version__
from hsl_node.errors import HslError
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.status.last_words import find_ending
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.layout import Layout
from hsl_node.sync.store.models import harmed

ERROR_NOTES = 3  # the last things that went wrong, newest last
HALTED_FIX = (
    "nothing is trained on until the hospitals have settled it; `hsl-node verify` shows what is proven, the signed "
    "documents of each round are in the journal (`hsl-node verify --export DIR`)"
)


def from_journal(state: Path) -> dict[str, Any]:
    """What the journal knows: the same dict, live parts None."""
    snapshot: dict[str, Any] = {
        "schema": 1, "node": None, "fingerprint": None, "version": __version__, "instance": None, "pid": None,
        "state": "stopped", "since": None, "started": None, "ended": None,
        "federation": {"name": None, "hash": None, "peers": None, "rounds": None, "method": None, "task": None},
        "round": None, "rounds": None, "phase": None, "reason": "", "epoch": None, "busy": None, "fusing": None,
        "peers": [], "waiting_for": [], "waiting_since": None, "still_to_do": None, "disk": None,
        "device": None, "trainer": None, "last_fused": None, "aucs": [], "best": None, "warnings": [],
    }  # fmt: skip
    keys = _of_the_keys(state)
    if not (state / "journal.sqlite3").exists():
        return snapshot | {"warnings": keys}
    journal = Journal.read_only(state / "journal.sqlite3")
    try:
        revoked = {w["code"].removeprefix("revoked ") for w in keys}
        ended, found = find_ending(journal), snapshot | _recorded(journal, revoked)
        disk = {"free": shutil.disk_usage(state).free, "need": None}
        warnings = _of_the_end(ended) + found["warnings"] + _of_the_models(state) + keys
        return found | {"ended": ended, "disk": disk, "warnings": warnings}
    finally:
        journal.close()


def _of_the_end(ended: dict[str, Any] | None) -> list[dict[str, Any]]:
    if ended is None or ended["how"] == "stopped":
        return []
    since = ended["at"] if ended["how"] == "failed" else None  # when it was killed nobody knows
    return [{"code": "ended", "text": ended["text"], "since": since, "fix": ended["fix"]}]


def _of_the_models(state: Path) -> list[dict[str, Any]]:
    """A look at their names; their bytes are compared at the next start."""
    layout = Layout(state)
    return [
        {"code": f"fused {h.model.round}", "text": h.text(layout), "since": None, "fix": h.fix(layout)}
        for h in harmed(layout, whole=False)
    ]


def _of_the_keys(state: Path) -> list[dict[str, Any]]:
    """Whose keys are being changed, or revoked. From keyring.toml, which changes while the daemon is down too."""
    if not (state / "keyring.toml").exists():
        return []
    from hsl_node.federation import (
        config,
        keyring,
        node_toml,  # slow to load: only where a key was changed or revoked
    )
    from hsl_node.federation.keyring import warnings_of

    try:
        me, federation = Peer(node_toml.load_node(state).name), config.load_federation(state)
        ring = keyring.load(state, federation)
    except HslError as exc:
        return [{"code": "keys", "text": exc.message, "since": None, "fix": exc.remedy}]
    found = [warning for peer in federation.peers for warning in warnings_of(ring, peer, me).items()]
    return [{"code": code, "text": text, "since": None, "fix": fix} for code, (text, fix) in found]


def still_to_do(journal: Journal, phase: str, owed: Collection[str]) -> dict[str, Any] | None:
    """What a node that has finished or halted must stay up for: `deliver_to`, peers without its last statement;
    `validate`, the round of its last fused model. None: nothing, or the run is not over.
    """
    validate = journal.last_unvalidated()
    if phase not in ("finished", "halted") or not (owed or validate):
        return None
    return {"deliver_to": sorted(owed), "validate": validate}


def _recorded(journal: Journal, revoked: Collection[str]) -> dict[str, Any]:
    state = journal.state()
    if state is None:
        return {}
    me, round = state["me"], state["round"]
    phases, receipts = journal.rows("phases", round), journal.last_receipts()
    fused = [{k: r[k] for k in ("round", "sha256", "auc")} for r in journal.rows("fused") if r["round"] > 0]
    best = journal.best_fused()
    digest = journal.meta("federation")
    waiting = [p for p in state["peers"] if p not in state["have"]] if me in state["have"] else []
    since = max((r["started"] for r in phases), default=None)
    return {
        "node": me,
        "instance": journal.meta("instance"),
        "since": journal.last_written() or since,
        "federation": {
            "name": None,
            "hash": digest[:8] if digest else None,
            "peers": len(state["peers"]),
            "rounds": state["rounds"],
            "method": None,
            "task": None,
        },
        "round": round,
        "rounds": state["rounds"],
        "phase": state["phase"],
        "reason": state["reason"],
        "peers": [
            _recorded_peer(state, p, journal.last_manifest(p), receipts.get(p)) for p in state["peers"] if p != me
        ],
        "waiting_for": waiting,
        "waiting_since": since if waiting else None,
        "still_to_do": still_to_do(journal, state["phase"], {p for _, p in state["owed"]} - set(revoked)),
        "device": journal.meta("device"),
        "last_fused": fused[-1] if fused else None,
        "aucs": aucs(journal.aucs_of(me), fused),
        "best": {"round": best[0], "sha256": best[1]} if best else None,
        "warnings": _recorded_warnings(journal, state),
    }


def aucs(local: Mapping[Round, float | None], fused: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation AUC per round of this site: of its own checkpoint, and of what was fused. None: undefined."""
    after = {r["round"]: r["auc"] for r in fused}
    return [{"round": r, "local": local.get(r), "fused": after.get(r)} for r in sorted(local.keys() | after.keys())]


def _recorded_peer(
    state: dict[str, Any], peer: str, last: dict[str, Any] | None, receipt: sqlite3.Row | None
) -> dict[str, Any]:
    claim = state["have"].get(peer)
    size = last["content"]["bytes"] if claim and last else 0
    owed = any(p == peer and r == state["round"] for r, p in state["owed"])
    delivered = receipt is not None and receipt["round"] == state["round"] and receipt["accepted"] and not owed
    return {
        "name": peer, "address": None, "fingerprint": None, "connected": False,
        "last_seen": last["at"] if last else None,
        "sent": {
            "state": "done" if delivered else "idle", "round": state["round"], "bytes": 0, "total": 0, "rate": None,
            "retries": 0, "resent": 0, "last_error": "", "next_try_s": None,
        },
        "received": {
            "state": "verified" if claim else "nothing", "round": state["round"], "bytes": size, "total": size,
            "rate": None, "sha256": Digest(claim["sha256"]) if claim else None,
            "auc": last["content"]["auc"] if claim and last else None,
        },
        "receipt": f"round {receipt['round']}: {receipt['code']}" if receipt else None,
    }  # fmt: skip


def _recorded_warnings(journal: Journal, state: dict[str, Any]) -> list[dict[str, Any]]:
    told_anew = ("halted", "keys")  # as it is now: below, and `_of_the_keys`
    notes = [n for n in journal.rows("notes") if n["level"] in ("error", "warning") and n["code"] not in told_anew]
    warnings = [{"code": n["code"], "text": n["text"], "since": n["at"], "fix": ""} for n in notes[-ERROR_NOTES:]]
    if state["reason"]:
        warnings.insert(0, {"code": "halted", "text": state["reason"], "since": None, "fix": HALTED_FIX})
    return warnings
