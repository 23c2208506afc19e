"""`hsl-node report`: one self-contained HTML file with everything a node's journal tells.

Of one node; of several at once where one machine holds them all (the demo). The page needs nothing from elsewhere,
holds no image, no patient and no path, and every string in it is escaped.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsl_node import __version__
from hsl_node.errors import UsageError
from hsl_node.federation.config import Federation
from hsl_node.federation.plan_keys import flat, word
from hsl_node.host.files import write_new
from hsl_node.host.units import clock, digits, duration, figure, size
from hsl_node.results import method, report_evaluations
from hsl_node.results.facts import Agreement, NodeFacts, agreement, read
from hsl_node.results.figures import PHASES, STYLES, Bar, auc_panel, timeline
from hsl_node.results.words import MODELS
from hsl_node.status.history import unusual_of

TEMPLATE = "report.html"
NOTES_MAX = 50  # the newest; a node that could not reach a peer for a week has thousands
UNUSUAL_MAX = 12  # lines: the table has them all
BARS_MAX = 4000  # of the timeline: more can neither be told apart nor drawn in seconds
PHASE_WORDS = {
    "agree": "compare setup or last fusion",
    "train": "local epochs",
    "collect": "exchange and wait for the full set",
    "fuse": "fusion",
}


def build(states: Sequence[Path], out: Path, *, note: str = "") -> Path:
    """Write one report of one node, or of several of one federation. `note` stands in its head.

    Raises:
        NotInitialised: one has no journal yet.
        UsageError: they are not of one federation.
    """
    nodes = sorted((read(state) for state in states), key=lambda n: n.name)
    if len({n.federation.digest for n in nodes}) != 1:
        raise UsageError("these nodes are of different federations", remedy="make a report of each")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        digits=digits, figure=lambda value: figure(value, "undefined"), size=size, duration=duration
    )
    federation = nodes[0].federation
    agreed, columns = agreement(nodes), report_evaluations.columns(nodes)
    panels, pictures = _auc_panels(nodes), report_evaluations.pictures(nodes)
    terms = _loss_terms(nodes)
    page = environment.get_template(TEMPLATE).render(
        title=federation.name if len(nodes) > 1 else f"{nodes[0].name} · {federation.name}",
        federation=federation,
        plan=federation.plan,
        note=note,
        tiles=_tiles(nodes, agreed),
        state=_state(nodes),
        tests=report_evaluations.entries(nodes, columns),
        columns=columns,
        pictures={picture["id"]: picture for picture in pictures},
        models={kind: MODELS[kind] for kind in STYLES if any(kind in picture["kinds"] for picture in pictures)},
        panels=panels,
        trained=max((row["round"] for panel in panels for row in panel["rows"]), default=0),
        journals=[n.name for n in nodes],
        terms=terms,
        gantt=_gantt(nodes),
        phase_words=PHASE_WORDS,
        seconds=_phase_seconds(nodes),
        transfers=_transfers(nodes),
        agreement=agreed,
        influence=_influence(nodes),
        unusual_max=UNUSUAL_MAX,
        software=_software(nodes),
        method=method.sentences(federation, [*dict.fromkeys(t["name"] for node in terms for t in node["terms"])]),
        citations=method.citations(federation.plan),
        settings=_settings(federation),
        notes=_notes(nodes, time.time()),
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        python=platform.python_version(),
    )
    write_new(out, page + "\n", replace=True)
    return out


# ------------------------------------------------------------------ the page


def _state(nodes: Sequence[NodeFacts]) -> dict[str, str]:
    """One sentence on where the run stands, and how to colour it."""
    done, planned = min(n.rounds_fused for n in nodes), nodes[0].federation.plan.rounds
    halted = [n for n in nodes if n.phase == "halted"]
    if halted:
        return {"kind": "bad", "text": f"halted after {done} rounds: {halted[0].reason}"}
    if all(n.phase == "finished" for n in nodes):
        early = "" if done == planned else ": every hospital had reached its plateau"
        return {"kind": "good", "text": f"finished after {done} of {planned} rounds{early}"}
    return {"kind": "", "text": f"running: {done} of {planned} rounds fused"}


def _tiles(nodes: Sequence[NodeFacts], agreed: Sequence[Agreement]) -> list[dict[str, str]]:
    """The figures that a reader wants first."""
    federation = nodes[0].federation
    started = [p["started"] for n in nodes for p in n.phases]
    ended = [p["ended"] or p["started"] for n in nodes for p in n.phases]
    sent = sum(t["bytes"] or 0 for n in nodes for t in n.transfers)
    samples = {m.peer: m.samples for n in nodes for m in n.manifests}
    same = bool(agreed) and all(a.agree for a in agreed)
    told = same and all(len(a.digests) == len(federation.peers) for a in agreed)
    return [
        {"label": "hospitals", "value": str(len(federation.peers))},
        {"label": "rounds fused", "value": f"{min(n.rounds_fused for n in nodes)} of {federation.plan.rounds}"},
        {"label": "training images", "value": f"{sum(samples.values()):,}"},
        {"label": "sent by " + ("all" if len(nodes) > 1 else "this node"), "value": size(sent)},
        {"label": "from first to last", "value": duration(max(ended) - min(started)) if started else "-"},
        {
            "label": "fused models",
            "value": "identical" if told else "identical so far" if same else "DIFFER" if agreed else "-",
            "kind": "good" if told else "bad" if agreed and not same else "",
        },
    ]


def _auc_panels(nodes: Sequence[NodeFacts]) -> list[dict[str, Any]]:
    """Per hospital: its own checkpoints' AUC from the manifests; the fused models' where we have its journal."""
    local: dict[str, dict[int, float | None]] = defaultdict(dict)
    for node in nodes:
        for said in node.manifests:
            if said.bytes > 0:
                local[said.peer][said.round] = said.score
    fused: dict[str, dict[int, float | None]] = {
        n.name: {r["round"]: r["score"] for r in n.fused if r["validated"]} for n in nodes
    }
    again: dict[str, dict[int, float | None]] = {
        n.name: {r["round"]: r["recalibrated_score"] for r in n.fused if r["recalibrated_loss"] is not None}
        for n in nodes
    }
    values = [a for m in (*local.values(), *fused.values(), *again.values()) for a in m.values() if a is not None]
    low = min(0.5, min(values, default=0.5)) // 0.1 / 10
    rounds = max((r for m in (*local.values(), *fused.values()) for r in m), default=1)
    why = {n.name: n.why for n in nodes}
    panels = []
    for name in nodes[0].federation.peers:
        mine, after, anew = (of.get(name, {}) for of in (local, fused, again))
        if not mine and not after:
            continue
        known = [{r: a for r, a in m.items() if a is not None} for m in (mine, after, anew)]
        panels.append(
            {
                "name": name,
                "svg": auc_panel(name, known[0], known[1], known[2], rounds, low),
                "rows": [
                    {"round": r, "local": mine.get(r), "fused": after.get(r), "again": anew.get(r)}
                    for r in sorted({*mine, *after})
                ],
                "why": why.get(name, ""),
                "fused": bool(after),
                "again": bool(anew),
                "undefined": not any(known),
            }
        )
    return panels


def _loss_terms(nodes: Sequence[NodeFacts]) -> list[dict[str, Any]]:
    """Of each hospital whose journal we have: each term's mean in each epoch that had it, and where it was lowest."""
    found = []
    for node in nodes:
        epochs = [(row["round"], row["epoch"], row["content"]["terms"]) for row in node.epochs]
        names = dict.fromkeys(name for _, _, terms in epochs for name in terms)  # in the method's order
        terms = []
        for name in names:
            had = [(round, epoch, of[name]) for round, epoch, of in epochs if name in of]
            terms.append({"name": name, "first": had[0], "last": had[-1], "lowest": min(had, key=lambda e: e[2])})
        if terms:
            found.append({"name": node.name, "terms": terms, "epochs": epochs})
    return found


def _gantt(nodes: Sequence[NodeFacts]) -> dict[str, Any]:
    """The timeline, and from which round on: of a long run the newest rounds, as many as can be told apart."""
    every = [(row, p) for row, node in enumerate(nodes) for p in node.phases if p["phase"] in PHASES]
    rounds = sorted({p["round"] for _, p in every})
    first = rounds[-max(1, BARS_MAX * len(rounds) // len(every)) :][0] if every else 0
    phases = [(row, p) for row, p in every if p["round"] >= first]
    if not phases:
        return {}
    zero, last = min(p["started"] for _, p in phases), max(p["ended"] or p["started"] for _, p in phases)
    bars = [Bar(row, p["phase"], p["started"] - zero, (p["ended"] or last) - p["started"]) for row, p in phases]
    begins: dict[int, float] = {}
    for _, p in phases:
        if p["phase"] == "train":
            begins[p["round"]] = min(p["started"] - zero, begins.get(p["round"], math.inf))
    whole = first == rounds[0]
    svg = timeline([n.name for n in nodes], bars, sorted(begins.items()), since="" if whole else f"round {first}")
    return {"svg": svg, "since": None if whole else first}


def _phase_seconds(nodes: Sequence[NodeFacts]) -> list[dict[str, Any]]:
    """Per hospital, the median seconds of a round's phases."""
    rows = []
    for node in nodes:
        spans = defaultdict(list)
        for p in node.phases:
            if p["ended"] is not None and p["phase"] in PHASES:
                spans[p["phase"]].append(p["ended"] - p["started"])
        rows.append({"name": node.name, **{k: statistics.median(v) for k, v in spans.items()}})
    return rows


def _transfers(nodes: Sequence[NodeFacts]) -> list[dict[str, Any]]:
    """Per pair of hospitals, over all rounds. Statements without a checkpoint (0 bytes) are left out."""
    rows = []
    for node in nodes:
        for peer in node.federation.peers:
            sent = [t for t in node.transfers if t["peer"] == peer and t["direction"] == "sent" and t["bytes"]]
            if not sent:
                continue
            seconds = sum(t["ended"] - t["started"] for t in sent)
            total = sum(t["bytes"] for t in sent)
            rows.append(
                {
                    "sender": node.name,
                    "receiver": peer,
                    "checkpoints": len(sent),
                    "bytes": total,
                    "seconds": seconds,
                    "rate": total / seconds / 1e6 if seconds > 0 else None,
                    "retries": sum(t["retries"] or 0 for t in sent),
                    "resent": sum(t["resent"] or 0 for t in sent),
                }
            )
    return rows


def _influence(nodes: Sequence[NodeFacts]) -> list[dict[str, Any]]:
    """Per round, each hospital's update: norm, cosine with the others' mean, and whether they are unusual. All nodes
    compute the same of the same files, so any that has a round tells it."""
    found = {round: record for node in nodes for round, record in node.influence.items()}
    return [
        {
            "round": round,
            "unusual": [f"round {round}, {name}: {why}" for name, why in sorted(unusual_of(record).items()) if why],
            "peers": [
                {
                    "norm": f"{figures['norm']:.3g}",
                    "cosine": "-" if figures["cosine"] is None else f"{figures['cosine']:.2f}".replace("-", "−"),
                    "unusual": unusual_of(record).get(name, ""),
                }
                for name, figures in sorted(record["peers"].items())
            ],
        }
        for round, record in sorted(found.items())
        if record["peers"]
    ]


def _software(nodes: Sequence[NodeFacts]) -> list[dict[str, str]]:
    """What every hospital says it runs, from its newest manifest; the machine of those whose journal we have."""
    said = {m.peer: m.software for n in nodes for m in n.manifests}
    machines = {n.name: _machine(n) for n in nodes}
    return [{"name": p, "software": s, "device": machines.get(p, "")} for p, s in sorted(said.items())]


def _machine(node: NodeFacts) -> str:
    """As the evaluation found it; else the device alone, which the trainer told."""
    found = node.measured[0].record.get("machine") if node.measured else None
    if found is None:
        return node.device
    many = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return f"{found['processor']} ({found['device']}), {many}, {found['precision']}"


def _settings(federation: Federation) -> list[tuple[str, str]]:
    plan = federation.plan.model_dump(mode="json", exclude_none=True)
    rows = [(key.replace("_", " "), word(value)) for key, value in flat(plan)]
    if federation.anchor:
        card = federation.anchor
        rows.append(("anchor set", f"{card.name}; {card.images} images of {card.image_size} px"))
        rows.append(("anchor fingerprint", card.fingerprint))
    return rows


def _notes(nodes: Sequence[NodeFacts], now: float) -> list[dict[str, Any]]:
    found = sorted(({**row, "node": n.name} for n in nodes for row in n.notes), key=lambda r: r["at"])
    return [{**row, "at": clock(row["at"], now)} for row in found[-NOTES_MAX:]]
