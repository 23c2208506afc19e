"""Past rounds: a line for each, or one in full, from the journal. Also while the daemon runs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsl_node.errors import UsageError, escaped
from hsl_node.federation.names import Round
from hsl_node.host.layout import Layout
from hsl_node.host.units import digits, duration, figure, size, table
from hsl_node.status.snapshot import Snapshot
from hsl_node.sync.candidates import in_words
from hsl_node.sync.manifest import content_digest
from hsl_node.sync.store.journal import Journal

PHASES = ("train", "collect", "fuse")  # of round.Phase: those that a round spends its time in


def rounds(state: Path) -> list[dict[str, Any]]:
    """One dict per round that this node has begun, oldest first.

    Raises:
        NotInitialised: there is no journal.
    """
    with Journal.read_only(Layout(state).journal) as journal:
        saved = journal.state()
        if saved is None:
            return []
        phases = steady(journal.rows("phases"))
        begun = sorted({r["round"] for r in phases if r["phase"] in PHASES})
        return [_round(journal, round, saved["me"], phases) for round in begun]


def round_of(state: Path, number: Round) -> dict[str, Any]:
    """One round in full.

    Raises:
        UsageError: this node has not begun that round.
    """
    with Journal.read_only(Layout(state).journal) as journal:
        saved = journal.state()
        phases = steady(journal.rows("phases"))
        if saved is None or not any(p["phase"] in PHASES for p in phases if p["round"] == number):
            raise UsageError(f"this node has not begun round {number}", remedy="`hsl-node round history` lists them")
        found = _round(journal, number, saved["me"], phases)
        receipts = {r["receiver"]: r for r in journal.rows("receipts", number)}
        transfers = {t["peer"]: t for t in journal.rows("transfers", number)}
        manifests = journal.rows("manifests", number)
        epochs = [e["content"] for e in journal.rows("epochs", number)]
        influence = (journal.influence(number) or {"peers": {}})["peers"]
        model = in_words(journal.candidates(), found["score_name"])
    peers = [
        {
            "peer": m["peer"],
            "sha256": m["sha256"],
            "manifest": content_digest(m["content"]),
            "score": m["content"]["score"],
            "said": m["content"]["said"],
            "samples": m["content"]["samples"],
            "software": m["content"]["software"],
            "arrived": m["at"],
            "receipt": receipts[m["peer"]]["code"] if m["peer"] in receipts else None,
            "sent": transfers.get(m["peer"]),
            "update": influence.get(m["peer"]),
        }
        for m in manifests
    ]
    return {**found, "peers": peers, "epochs": epochs, "model": model}


def unusual_of(influence: Mapping[str, Any] | None) -> dict[str, str]:
    """Whose update, or what it says of itself, was not usual, and why (poisoning.py)."""
    found: dict[str, str] = {}
    for key in ("unusual", "images", "said", "share"):
        for peer, why in (influence or {}).get(key, {}).items():
            found[peer] = f"{found[peer]}; {why}" if peer in found else why
    return found


def steady(phases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the journal's phases, in their order, by one clock: that of the last one.

    Each phase begins as the one before ends. Where it does not, the clock was set in between: all before it move. None
    lasts less than 0, whatever an earlier version wrote.
    """
    rows = [dict(row) for row in phases]
    shift = 0.0
    for before, after in zip(rows[-2::-1], rows[:0:-1], strict=True):
        if before["ended"] is not None:
            shift = after["started"] - before["ended"]
            before["ended"] += shift
        before["started"] = min(before["started"] + shift, before["ended"] or math.inf)
    return rows


def _round(journal: Journal, round: Round, me: str, every_phase: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    manifests, fused, transfers = (journal.rows(name, round) for name in ("manifests", "fused", "transfers"))
    phases = [p for p in every_phase if p["round"] == round]
    spent = {p["phase"]: p["ended"] - p["started"] for p in phases if p["ended"] is not None}
    return {
        "round": round,
        "began": min(p["started"] for p in phases),
        "fused": fused[0]["at"] if fused else None,
        "sha256": fused[0]["sha256"] if fused else None,
        "score_name": journal.meta("score_name") or Snapshot.score_name,
        "score_own": next((m["content"]["score"] for m in manifests if m["peer"] == me), None),
        "score_fused": fused[0]["score"] if fused else None,
        "score_recalibrated": fused[0]["recalibrated_score"] if fused else None,
        "terms": epochs[-1]["content"]["terms"] if (epochs := journal.rows("epochs", round)) else {},  # of the last
        "seconds": {phase: spent.get(phase) for phase in PHASES},
        "sent_bytes": sum(t["bytes"] + t["resent"] for t in transfers if t["direction"] == "sent"),
        "received_bytes": sum(m["content"]["bytes"] for m in manifests if m["peer"] != me),
        "unusual": unusual_of(journal.influence(round)),
    }


def text(found: Sequence[dict[str, Any]]) -> str:
    """The table of `round history`."""
    if not found:
        return "no round has begun yet"
    again = any(r["score_recalibrated"] is not None for r in found)
    terms = list(dict.fromkeys(name for r in found for name in r["terms"]))
    scores = (f"own {found[0]['score_name']}", "fused", *["recalibrated"] * again)
    header = ("round", "began", *PHASES, *terms, "sent", "received", *scores, "fused model", "unusual")
    rows = [
        (
            str(r["round"]),
            time.strftime("%m-%d %H:%M", time.localtime(r["began"])),
            *(_spent(r["seconds"][phase]) for phase in PHASES),
            *(digits(r["terms"].get(name)) for name in terms),
            size(r["sent_bytes"]),
            size(r["received_bytes"]),
            figure(r["score_own"]),
            figure(r["score_fused"]),
            *[figure(r["score_recalibrated"])] * again,
            r["sha256"][:12] if r["sha256"] else "-",
            ", ".join(r["unusual"]) or "-",
        )
        for r in found
    ]
    lines = [table(header, rows, right=range(0, 9 + again + len(terms)))]
    known = {r["round"] for r in found}
    if lost := [n for n in range(1, max(known)) if n not in known]:
        which = f"round{'s' if len(lost) > 1 else ''} {_ranges(lost)}"
        lines += [
            f"not in this journal: {which}, lost with an earlier state of this node; the other hospitals know more"
        ]
    return "\n".join(lines)


def _ranges(numbers: Sequence[int]) -> str:
    """1, 3 to 7, 9."""
    known = {*numbers}
    starts, ends = ([n for n in numbers if n + step not in known] for step in (-1, 1))
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def round_text(r: dict[str, Any]) -> str:
    """The page of `round show`."""
    ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(r["fused"])) if r["fused"] else "not yet"
    spent = ", ".join(f"{phase} {_spent(r['seconds'][phase])}" for phase in PHASES)
    found = r["score_recalibrated"]
    again = "" if found is None else f", recalibrated {figure(found)}"
    lines = [
        f"round      {r['round']}",
        f"began      {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(r['began']))}",
        f"fused      {ended}" + (f", sha256 {r['sha256']}" if r["sha256"] else ""),
        f"time       {spent}",
        f"{r['score_name']:9}  own model {figure(r['score_own'])}, fused {figure(r['score_fused'])}{again} "
        "(validation, this site)",
        *([f"your model {r['model']}"] if r["model"] else []),
    ]
    if r["peers"]:
        rows = [
            (
                p["peer"],
                p["sha256"][:12],
                p["manifest"][:12],
                figure(p["score"]),
                str(p["samples"]),
                digits(p["update"]["norm"]) if p["update"] else "-",
                _cosine(p["update"]),
                p["receipt"] or "-",
                size(p["sent"]["bytes"]) if p["sent"] else "-",
                _spent(p["sent"]["ended"] - p["sent"]["started"]) if p["sent"] else "-",
                str(p["sent"]["retries"]) if p["sent"] else "-",
            )
            for p in r["peers"]
        ]
        header = (
            "peer", "checkpoint", "manifest", r["score_name"], "images", "update", "cosine", "receipt", "sent", "in",
            "retries",
        )  # fmt: skip
        lines += ["", table(header, rows, right=(3, 4, 5, 6, 8, 9, 10))]
        lines += [f"{p}: {why}" for p, why in r["unusual"].items()]
        if any(p["said"] for p in r["peers"]):
            names = sorted({name for p in r["peers"] for name in p["said"]})
            said = [(p["peer"], *(digits(p["said"].get(name)) for name in names)) for p in r["peers"]]
            lines += ["", table(("says", *names), said, right=range(1, len(names) + 1))]
        lines += ["", *(f"{p['peer']}: {escaped(p['software'], 80)}" for p in r["peers"])]
    if r["epochs"]:
        terms = list(dict.fromkeys(name for e in r["epochs"] for name in e["terms"]))  # in the method's order
        titles = ("epoch", *(f"{name} loss" for name in terms), "validation loss", r["score_name"], "seconds")
        epochs = [
            (
                str(e["epoch"]),
                *(digits(e["terms"].get(name)) for name in terms),
                *(digits(e.get(key)) for key in ("validation_loss", "score", "seconds")),
            )
            for e in r["epochs"]
        ]
        lines += ["", table(titles, epochs, right=range(len(titles)))]
    return "\n".join(lines)


def _cosine(update: dict[str, Any] | None) -> str:
    """Of a peer's update with the others' mean."""
    return "-" if update is None or update["cosine"] is None else f"{update['cosine']:.2f}"


def _spent(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
