"""What the journals of one or several nodes say, for the report and the demo. Read-only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsl_node.federation.config import Federation, load_federation
from hsl_node.federation.node_toml import load_node
from hsl_node.host.layout import Layout
from hsl_node.results.evaluate import find_evaluation, find_evaluations, find_scores
from hsl_node.results.scores import statistics_of
from hsl_node.results.statistics import Statistics
from hsl_node.status.history import steady
from hsl_node.status.snapshot import Snapshot
from hsl_node.sync.candidates import in_words
from hsl_node.sync.store.journal import Journal, Told


@dataclass(frozen=True)
class Measured:
    """One evaluation: of the final model, of another round's, or of images from elsewhere."""

    record: Mapping[str, Any]
    statistics: Statistics


@dataclass(frozen=True)
class NodeFacts:
    """What one node's state directory says; tables as Journal.rows gives them."""

    name: str
    federation: Federation
    device: str
    phase: str
    reason: str
    rounds_fused: int
    why: str  # which model is this hospital's, and why, in a line
    manifests: Sequence[Told]  # by rounds
    fused: Sequence[Mapping[str, Any]]  # of round 1 and later
    epochs: Sequence[Mapping[str, Any]]
    phases: Sequence[Mapping[str, Any]]
    transfers: Sequence[Mapping[str, Any]]
    notes: Sequence[Mapping[str, Any]]
    influence: Mapping[int, Mapping[str, Any]]  # round -> what poisoning.py recorded of its fusion
    evaluation: Mapping[str, Any] | None  # of the final model
    measured: Sequence[Measured] = ()  # all evaluations, that of the final model first


@dataclass(frozen=True)
class Agreement:
    """What the hospitals say the fused model of one round is."""

    round: int
    digests: Mapping[str, str]  # hospital -> sha256

    @property
    def agree(self) -> bool:
        return len(set(self.digests.values())) == 1

    @property
    def text(self) -> str:
        """The digest, or who has which."""
        if self.agree:
            return next(iter(self.digests.values()))
        return ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(self.digests.items()))


def read(state: Path) -> NodeFacts:
    """Raises: NotInitialised, ConfigError."""
    node, federation = load_node(state), load_federation(state)
    with Journal.read_only(Layout(state).journal) as journal:
        saved, every = journal.state() or {}, journal.candidates()
        fused = [r for r in journal.rows("fused") if r["round"] > 0]
        return NodeFacts(
            name=node.name,
            federation=federation,
            device=journal.meta("device") or "unknown",
            phase=str(saved.get("phase", "not started")),
            reason=str(saved.get("reason", "")),
            rounds_fused=max((r["round"] for r in fused), default=0),
            why=in_words(every, journal.meta("score_name") or Snapshot.score_name),
            manifests=tuple(journal.told()),
            fused=fused,
            epochs=journal.rows("epochs"),
            phases=steady(journal.rows("phases")),
            transfers=journal.rows("transfers"),
            notes=journal.rows("notes"),
            influence={r["round"]: found for r in fused if (found := journal.influence(r["round"]))},
            evaluation=find_evaluation(journal),
            measured=tuple(
                Measured(record, statistics_of(record, find_scores(journal, record)))
                for record in find_evaluations(journal).values()
            ),
        )


def agreement(nodes: Sequence[NodeFacts]) -> list[Agreement]:
    """Per round, the digest of the fused model at every hospital: of these nodes from their own journals, of the others
    from the signed manifests in which they say what they started the next round from."""
    digests: dict[int, dict[str, str]] = defaultdict(dict)
    for node in nodes:
        for said in node.manifests:
            if said.round > 1:
                digests[said.round - 1].setdefault(said.peer, said.base)
    for node in nodes:
        for row in node.fused:
            digests[row["round"]][node.name] = row["sha256"]
    return [Agreement(round, digests[round]) for round in sorted(digests)]
