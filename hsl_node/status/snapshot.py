"""What a node is at one moment: schema 1, its JSON, and which of its fields may leave the hospital.

Filled in the daemon by node/snapshot.py, and by recorded.py from the journal while that is down. None: not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from hsl_node import __version__

# A name, a digest or a word of this program; a plain `str` is free text, and stays here.
Word = Annotated[str, "may leave in a support bundle"]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """As it is here by default: a node that was never started. Times are wall clock, in seconds."""

    schema: int = 1
    node: Word | None = None
    fingerprint: Word | None = None
    version: Word = __version__
    instance: Word | None = None
    pid: int | None = None
    state: Word = "stopped"
    since: float | None = None
    started: float | None = None
    ended: Ended | None = None
    federation: Agreed = field(default_factory=lambda: Agreed())
    round: int | None = None
    rounds: int | None = None
    phase: Word | None = None
    reason: str = ""
    epoch: Epoch | None = None
    busy: Busy | None = None
    fusing: float | None = None  # share done
    peers: tuple[PeerStatus, ...] = ()
    waiting_for: tuple[Word, ...] = ()
    waiting_since: float | None = None
    still_to_do: StillToDo | None = None
    disk: Disk | None = None
    device: Word | None = None
    trainer: TrainerStatus | None = None
    loss_terms: LossTerms | None = None
    last_fused: Fused | None = None
    scores: tuple[Scores, ...] = ()
    score_name: Word = "AUC"  # what people call it
    model: Model | None = None  # this hospital's
    warnings: tuple[StatusWarning, ...] = ()
    next: str = ""  # of a node that has not begun, or is to recover: what to do next

    def as_json(self) -> dict[str, Any]:
        return asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if (k, v) != ("revoked", None)})


@dataclass(frozen=True)
class Ended:
    how: Word  # stopped | failed | killed
    at: float
    text: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Agreed:
    """Of the federation."""

    name: Word | None = None
    hash: Word | None = None
    peers: int | None = None
    rounds: int | None = None
    method: Word | None = None
    task: str | None = None


@dataclass(frozen=True)
class Epoch:
    epoch: int | None
    of: int
    batch: int | None
    batches: int | None
    images_per_s: float | None


@dataclass(frozen=True)
class Busy:
    """Of the trainer, with what is no epoch."""

    event: str
    what: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class PeerStatus:
    name: Word
    address: str | None = None
    fingerprint: Word | None = None
    revoked: bool | None = None  # None is left out of the JSON
    connected: bool = False
    last_seen: float | None
    sent: Sent
    received: Received
    receipt: Word | None
    life: Life | None = None


@dataclass(frozen=True)
class Life:
    """Of the node itself. `last_seen` is something else: when it last came here, or brought something."""

    state: Word  # alive | down | paused | unknown
    since: float | None = None  # of down: its last sign of life; of paused
    heard: float | None = None  # its last sign of life
    federation: Word | None = None  # the hash of the file that it joined
    clock_s: float | None = None  # by how much its clock is ahead of this one's


@dataclass(frozen=True)
class Sent:
    state: Word
    round: int
    bytes: int = 0
    total: int = 0
    rate: float | None = None  # bytes per second
    retries: int = 0
    resent: int = 0
    last_error: str = ""
    next_try_s: float | None = None


@dataclass(frozen=True)
class Received:
    state: Word
    round: int
    bytes: int = 0
    total: int = 0
    rate: float | None = None
    sha256: Word | None = None
    score: float | None = None


@dataclass(frozen=True)
class StillToDo:
    """What a node that has finished or halted must stay up for."""

    deliver_to: tuple[Word, ...]  # peers without its last statement
    validate: int | None  # the round of its last fused model


@dataclass(frozen=True)
class Disk:
    free: int
    need: int | None = None


@dataclass(frozen=True)
class TrainerStatus:
    pid: int | None
    state: Word
    restarts: int
    last_event_s: float
    last_error: str


@dataclass(frozen=True)
class LossTerms:
    """Of the last epoch that was trained here, in the method's order."""

    round: int
    epoch: int
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Term:
    name: Word
    mean: float  # over the images that it was taken of


@dataclass(frozen=True)
class Fused:
    round: int
    sha256: Word
    score: float | None


@dataclass(frozen=True)
class Scores:
    """Validation on this site's images: of its own checkpoint, of what was fused, and of that recalibrated. None:
    undefined, or not known."""

    round: int
    own: float | None
    fused: float | None
    recalibrated: float | None = None


@dataclass(frozen=True)
class Model:
    """The best on this site's validation images: `sync/candidates.py`."""

    kind: Word  # own | fused | recalibrated
    round: int
    sha256: Word
    score: float | None
    why: Word


@dataclass(frozen=True)
class StatusWarning:
    code: Word
    text: str
    since: float | None
    fix: str


def from_json(found: Mapping[str, Any]) -> Snapshot:
    """What the daemon answered. A field that another version of it tells is left out."""
    made: Snapshot = _made(Snapshot, found)
    return made


def leaving(kind: Any) -> frozenset[str]:
    """Names of the fields of a class here, and of those within it, that a support bundle may hold: no free text."""
    parts = {name: _parts(kind) for name, kind in _fields(kind).items()}
    within = (leaving(part) for found in parts.values() for part in found if is_dataclass(part))
    return frozenset(name for name, found in parts.items() if str not in found).union(*within)


@cache
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _parts(kind: Any) -> tuple[Any, ...]:
    """What a type names: `tuple[Word, ...] | None` gives Word, `...` and None's type."""
    within = () if get_origin(kind) is Annotated else get_args(kind)
    return tuple(part for one in within for part in _parts(one)) or (kind,)


def _made(kind: Any, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_made(kind, one) for one in value)
    inner: Any = next((part for part in _parts(kind) if is_dataclass(part)), None)
    if inner is None or value is None:
        return value
    return inner(**{name: _made(type_, value[name]) for name, type_ in _fields(inner).items() if name in value})
