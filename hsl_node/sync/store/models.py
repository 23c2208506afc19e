"""The fused models that results are taken from: this hospital's best one, and after the run the last. Are they there?

What the run itself reads is checked where it is read (`damage.py`); nothing of the run reads these any more. One that
is gone or altered is named by `status`, `doctor`, `verify`, `backup` and whoever would use it, and the daemon fetches
it from its peers (`fetch_models.py`): each keeps the last fused models, and its own best one. Loads fast.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from hsl_node.federation.names import Digest, Round
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.whole import How, state_of

BEST = "the best on this hospital's validation images"
OVER = ("finished", "halted")  # phases of `sync/round.py`


@dataclass(frozen=True)
class Model:
    round: Round
    sha256: Digest
    why: str  # it is kept

    @property
    def what(self) -> str:
        return f"the fused model of round {self.round} ({self.why})"


@dataclass(frozen=True)
class Harm:
    model: Model
    how: How
    why: str = "the disk fails there"

    def text(self, layout: Layout) -> str:
        path = layout.fused(self.model.round)
        if self.how == "gone":
            return f"{self.model.what} is lost: {path} is not there"
        if self.how == "unreadable":
            return f"{self.model.what} cannot be read: {path}: {self.why}"
        return (
            f"{self.model.what} is altered: {path} is not the file with sha256 {self.model.sha256[:12]} that the "
            "journal names"
        )

    def fix(self, layout: Layout) -> str:
        """For who stands before a command; the daemon itself does the first of it."""
        return (
            "`hsl-node start` (where the daemon runs, `hsl-node stop` first): it fetches the file from a peer that has "
            f"it. {self.otherwise(layout)}"
        )

    def otherwise(self, layout: Layout) -> str:
        path = layout.fused(self.model.round)
        return (
            "Each hospital keeps the last fused models, and the one that is best on its own validation images. Where "
            f"no peer has this one: `tar -xf BACKUP -C {shlex.quote(str(layout.state))} "
            f"{path.relative_to(layout.state)}`, as this node's user; without a backup of it, `--round N` of "
            "`hsl-node evaluate`, `hsl-node export` and `hsl-node predict` takes another round"
        )


def models(journal: Journal) -> list[Model]:
    """Those that are kept for people, as the journal says."""
    state, best = journal.state(), journal.best_fused()
    found = {best[0]: Model(*best, BEST)} if best else {}
    if state is not None and state["phase"] in OVER and state["round"] > 1:
        last = state["round"] - 1
        for sha256 in journal.fused_digests([last]).values():
            why = f"the last one, and {found[last].why}" if last in found else "the last one"
            found[last] = Model(last, sha256, why)
    return [found[round] for round in sorted(found)]


def harm_of(layout: Layout, model: Model, *, whole: bool = True) -> Harm | None:
    """None: the file is there. `whole`: and has its sha256, for which all of it is read."""
    try:
        how = state_of(layout.fused(model.round), model.sha256 if whole else None)
    except OSError as exc:  # its owner and rights, a file system that is damaged: nothing that the round needs
        return Harm(model, "unreadable", exc.strerror or str(exc))
    return None if how == "whole" else Harm(model, how)


def harmed(layout: Layout, *, whole: bool = True) -> list[Harm]:
    """Of all that are kept, whether the daemon runs or not.

    Raises:
        NotInitialised, LocalStateError: there is no journal, or it cannot be read.
    """
    with Journal.read_only(layout.journal) as journal:
        found = [harm for model in models(journal) if (harm := harm_of(layout, model, whole=whole))]
        still = models(journal) if found else []  # another one may be the best by now, and that one pruned
    return [harm for harm in found if harm.model in still]
