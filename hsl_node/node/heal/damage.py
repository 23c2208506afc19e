"""A checkpoint of this node is gone from its disk, or no longer what it was: noticed, told, and healed by its peers.

    at the start          is all there, whole, that the saved state relies on? existence and size
    where it is read      its sha256, before anything is made of it: fusion, training, validation, a refused push

Either sets the mark of `mark.py`: the node asks its peers and fetches what they keep. A disk that goes on
altering files is recovered from ever more slowly, and loudly: systemd would start the node every ten seconds.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from hsl_node.federation.names import Digest, Round
from hsl_node.host.layout import Layout
from hsl_node.host.pace import Pace
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal.mark import ALTERED, Mark, set_mark
from hsl_node.sync.recovered import relied_on
from hsl_node.sync.round import Phase, State
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.whole import state_of

log = logging.getLogger(__name__)

ROUNDS_LOUD = 5  # so long it is told of, and counted: a sound disk does this once in years
# Before a recovery within these rounds: none before the first, then 1 min, 10 min, an hour.
PAUSE = Pace(60, 3600, growth=10)


def files_of(journal: Journal, layout: Layout, state: State) -> dict[Path, tuple[Digest, int]] | None:
    """What this state relies on: path -> (sha256, bytes). None: the journal does not know all of it."""
    files: dict[Path, tuple[Digest, int]] = {}
    for round, peer in relied_on(state):
        row = journal.manifest(round, peer)
        if row is None:
            return None
        if size := row["content"]["bytes"]:
            path = layout.checkpoint(round, peer, state.me)
            files[path] = Digest(row["sha256"]), size
    return files


def require_whole(journal: Journal, layout: Layout, state: State, model_bytes: int) -> None:
    """A look at the names and sizes, at every start; sets the mark where one is gone."""
    files = files_of(journal, layout, state) or {}
    sizes = {path: size for path, (_, size) in files.items()}
    if state.phase is Phase.TRAIN:
        sizes[layout.fused(state.round - 1)] = model_bytes
    states = {path.relative_to(layout.state): state_of(path, size=size) for path, size in sorted(sizes.items())}
    if harmed := [f"{path} is {how}" for path, how in states.items() if how != "whole"]:
        found(journal, state.round, ", ".join(harmed))


def found(journal: Journal, round: Round, what: str) -> None:
    """Remember it, and that the next start asks the peers."""
    log.error("a file is not what it was", extra={"round": round, "reason": what})
    rounds = [*_rounds(journal, round), round]
    with journal.transaction():
        journal.set_meta(ALTERED, json.dumps({"rounds": rounds, "what": what}))
        journal.note("error", ALTERED, what)
        set_mark(journal, Mark(what))


def renew(journal: Journal, alarms: Alarms, round: Round) -> float:
    """The alarm as the journal says; gives the seconds to wait before a recovery that follows from it."""
    times = len(_rounds(journal, round))
    if not times:
        alarms.settle(ALTERED)
        return 0.0
    what = json.loads(journal.meta(ALTERED) or "")["what"]
    pause_s = PAUSE.after(times - 1)
    text = f"the disk of this node lost or altered what was checked before; last: {what}. Nothing was made of it"
    if times > 1:
        text += f". It did so {times} times within {ROUNDS_LOUD} rounds: the disk, or the memory, is failing"
        text += f"; each time the node waits longer ({pause_s / 60:.0f} min) before it asks its peers again"
    fix = "look at disk and memory (`smartctl`, the kernel's log); move the node to a sound disk: `hsl-node backup`, "
    fix += "`hsl-node restore`. Then `hsl-node recover --from-peers` goes on at once"
    alarms.sound(ALTERED, text, fix)
    return pause_s


def _rounds(journal: Journal, round: Round) -> list[Round]:
    """When it happened, as far as that is not long ago."""
    content = json.loads(journal.meta(ALTERED) or "null")
    return [r for r in content["rounds"] if r > round - ROUNDS_LOUD] if content else []
