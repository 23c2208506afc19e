"""What the exchange of a round left on this node: for whoever trains on from its fusion, or scores that.

All of it is in the journal and in files, so a round that is begun again, or a model that is opened a year later, begins
with the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.whole import holds


@dataclass(frozen=True)
class Left:
    """Peers that gave no checkpoint in that round are not in it; of round 0 nothing is."""

    said: Mapping[Peer, Mapping[str, float]]  # signed numbers
    samples: Mapping[Peer, int]
    full_set: Mapping[Peer, tuple[Path, Digest]]  # the checkpoints, which are kept for a round or two
    own: tuple[Path, Digest] | None  # all tensors of what this node sent; the file may be gone, its digest unknown


def left_by(journal: Journal, layout: Layout, me: Peer, round: Round) -> Left:
    rows = {Peer(row["peer"]): row for row in journal.manifests_of(round) if row["content"]["bytes"] > 0}
    own = journal.own_digests().get(round)
    return Left(
        said={peer: row["content"]["said"] for peer, row in sorted(rows.items())},
        samples={peer: row["content"]["samples"] for peer, row in sorted(rows.items())},
        full_set={p: (layout.checkpoint(round, p, me), Digest(row["sha256"])) for p, row in sorted(rows.items())},
        own=(layout.own(round), own) if own else None,
    )


def newest_whole(layout: Layout, digests: Mapping[Round, Digest], until: Round) -> tuple[Round, Path, Digest] | None:
    """The last of this node's own files, of this round or one before, that is whole. `digests`: of the journal."""
    for round in sorted((r for r in digests if r <= until), reverse=True):
        if holds(layout.own(round), digests[round]):
            return round, layout.own(round), digests[round]
    return None
