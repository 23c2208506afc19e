"""The models that results are taken from, each hospital's best ones and after the run the last. Are they there?

What the run itself reads is checked where it is read (`damage.py`); nothing of the run reads these any more. One that
is gone or altered is named by `status`, `doctor`, `verify`, `backup` and whoever would use it. A fused one the daemon
fetches from its peers (`fetch_models.py`): each keeps the last fused models, and its own best ones. A hospital's own
model (`Layout.own`) nobody else has: only a backup brings it back. Loads fast.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hsl_node.federation.names import Digest, Round
from hsl_node.host.layout import Layout
from hsl_node.sync.candidates import KINDS, ModelKind, find_best
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.whole import How, state_of

BEST = "the best on this hospital's validation images"
OVER = ("finished", "halted")  # phases of `sync/round.py`
WORDS: dict[ModelKind, str] = {
    "own": "this hospital's own model of round {}",
    "fused": "the fused model of round {}",
    "recalibrated": "the fused model of round {}, recalibrated",
}
# Where a method keeps tensors private, a fused model is used beside the hospital's own ones of the same round.
BESIDE = "its private tensors belong to a fused model that is kept"


@dataclass(frozen=True)
class Model:
    kind: ModelKind
    round: Round
    sha256: Digest  # of its file; a recalibrated one has that of the fused model
    why: str  # it is kept

    @property
    def what(self) -> str:
        return f"{WORDS[self.kind].format(self.round)} ({self.why})"

    def path(self, layout: Layout) -> Path:
        return layout.own(self.round) if self.kind == "own" else layout.fused(self.round)

    @property
    def code(self) -> str:
        """Of the alarm where it is lost: a name for its file."""
        return f"{'own' if self.kind == 'own' else 'fused'} {self.round}"


@dataclass(frozen=True)
class Harm:
    model: Model
    how: How
    why: str = "the disk fails there"

    def text(self, layout: Layout) -> str:
        path = self.model.path(layout)
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
        if self.model.kind == "own":
            return self.otherwise(layout)
        return (
            "`hsl-node start` (where the daemon runs, `hsl-node stop` first): it fetches the file from a peer that has "
            f"it. {self.otherwise(layout)}"
        )

    def otherwise(self, layout: Layout) -> str:
        path = self.model.path(layout)
        back = (
            f"`tar -xf BACKUP -C {shlex.quote(str(layout.state))} {path.relative_to(layout.state)}`, as this node's "
            "user; without a backup of it, "
        )
        if self.model.kind == "own":
            return (
                f"No other hospital has it: {back}`--round N` of `hsl-node evaluate`, `hsl-node export` and `hsl-node "
                "predict` takes the fused model of a round"
            )
        return (
            "Each hospital keeps the last fused models, and the one that is best on its own validation images. Where "
            f"no peer has this one: {back}`--round N` of `hsl-node evaluate`, `hsl-node export` and `hsl-node predict` "
            "takes another round"
        )


def models(journal: Journal) -> list[Model]:
    """Those that are kept for people, as the journal says: of each file one."""
    state, every = journal.state(), journal.candidates()
    best = find_best(every)
    found: dict[str, Model] = {}
    for kind in KINDS:
        if one := find_best([other for other in every if other.kind == kind]):
            why = BEST if one == best else f"the best {kind} one there"
            _add(found, Model(kind, one.round, one.sha256, why), first=one == best)
    if state is not None and state["phase"] in OVER and state["round"] > 1:
        last = state["round"] - 1
        for sha256 in journal.fused_digests([last]).values():
            _add(found, Model("fused", last, sha256, "the last one"), first=False)
    if journal.meta("private") == "1":
        own = journal.own_digests()
        for round in [model.round for model in found.values() if model.kind != "own"]:
            if round in own:
                _add(found, Model("own", round, own[round], BESIDE), first=False)
    return sorted(found.values(), key=lambda model: (model.round, model.kind))


def _add(found: dict[str, Model], model: Model, *, first: bool) -> None:
    """`first`: its kind and reason stand before those that the same file has too."""
    if other := found.get(model.code):
        a, b = (model, other) if first else (other, model)
        model = Model(a.kind, a.round, a.sha256, f"{a.why}, and {b.why}")
    found[model.code] = model


def kept(models: Iterable[Model]) -> tuple[frozenset[Round], frozenset[Round]]:
    """Rounds of the fused models, and of the own ones."""
    own = frozenset(model.round for model in models if model.kind == "own")
    return frozenset(model.round for model in models if model.kind != "own"), own


def harm_of(layout: Layout, model: Model, *, whole: bool = True) -> Harm | None:
    """None: the file is there. `whole`: and has its sha256, for which all of it is read."""
    try:
        how = state_of(model.path(layout), model.sha256 if whole else None)
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
