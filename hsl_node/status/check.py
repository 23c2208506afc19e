"""`hsl-node status --check`: one line and an exit code, for a monitoring system. Loads fast.

    0 well    1 needs a person    2 broken    3 down

They are those of Nagios-style plug-ins (OK, WARNING, CRITICAL, UNKNOWN). Down is 3 whatever the reason: also where the
state directory is not there or may not be read, since then nobody can say that the node is well.
"""

from __future__ import annotations

from pathlib import Path

from hsl_node.errors import HslError, WaitTimeout, escaped
from hsl_node.host import wrong_paths
from hsl_node.status.page import fetch
from hsl_node.status.snapshot import Snapshot

WELL, PERSON, BROKEN, DOWN = 0, 1, 2, 3
WORDS = ("well", "needs a person", "broken", "down")
LINE_MAX_CHARS = 300  # what a monitoring system's table still shows

# Every alarm, `*` for what varies in its code. Well: told once more by each `status`, and nothing is to be done now.
# Broken: this node does nothing of use before it is mended, or all have stopped.
CLASSES = {
    "data *": WELL, "recovered": WELL, "share *": WELL,
    "altered": PERSON, "clock": PERSON, "clock *": PERSON, "federation *": PERSON, "fetched": PERSON,
    "fused *": PERSON, "gone *": PERSON, "images *": PERSON, "influence *": PERSON, "keys *": PERSON, "log": PERSON,
    "loses *": PERSON, "lost *": PERSON, "not shown": PERSON, "old key *": PERSON, "own": PERSON, "own *": PERSON,
    "paused": PERSON, "peer paused *": PERSON, "ports": PERSON, "quota *": PERSON, "recovering": PERSON,
    "reload": PERSON, "refused *": PERSON, "refused by *": PERSON, "revoked *": PERSON, "said *": PERSON,
    "set back *": PERSON, "setup *": PERSON, "silent *": PERSON, "twice *": PERSON, "unproven *": PERSON,
    "unvalidated": PERSON, "validation": PERSON, "wrong bytes *": PERSON,
    "disagreement": BROKEN, "disk": BROKEN, "diverged": BROKEN, "ended": BROKEN, "equivocation *": BROKEN,
    "halted": BROKEN, "keys": BROKEN, "room": BROKEN, "trainer": BROKEN, "twice": BROKEN,
}  # fmt: skip


def check(state: Path) -> tuple[int, str]:
    """Exit code and line. Raises nothing of an operator's: what cannot be looked at is down."""
    try:
        code, text = judged(fetch(state))
    except WaitTimeout as exc:
        code, text = BROKEN, exc.message
    except HslError as exc:
        code, text = DOWN, exc.message
    except OSError as exc:
        code, text = DOWN, wrong_paths.explained(exc, state).message
    line = escaped(f"{WORDS[code]}: {text}".replace("|", "/"), LINE_MAX_CHARS)  # after a | they expect figures
    return code, line


def judged(found: Snapshot) -> tuple[int, str]:
    """What a snapshot is worth, and why: its worst alarm, or what the node does."""
    if found.state == "stopped":
        how = f"; {found.ended.text}" if found.ended and found.ended.text else ""
        return DOWN, f"{found.node or 'the node'} is not running{how}"
    alarms = sorted(((class_of(w.code), w) for w in found.warnings), key=lambda pair: -pair[0])
    worst = alarms[0][0] if alarms else WELL
    loud = [w for code, w in alarms if code > WELL]
    if not loud:
        alive = sum(p.life is not None and p.life.state in ("alive", "paused") for p in found.peers)
        number = min(found.round or 0, found.rounds or 0)  # the statements after the last round are no round
        which = f", round {number} of {found.rounds}" if number and found.state != "finished" else ""
        return WELL, f"{found.node} is {found.state}{which}; {alive} of {len(found.peers)} others alive"
    more = f" (and {len(loud) - 1} more)" if len(loud) > 1 else ""
    return worst, f"{found.node}: {loud[0].code}{more}: {loud[0].text}"


def class_of(code: str) -> int:
    """Of an alarm that another version of the daemon tells, and nobody here knows: a person must look."""
    return CLASSES.get(code, CLASSES.get(f"{code.rpartition(' ')[0]} *", PERSON))
