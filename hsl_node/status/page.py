"""One snapshot of a node as a page of text.

What a person needs at 3 am: what is wrong and what to do first, then what the node does, whom it waits for, each peer.
Imports nothing that is slow to load.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from hsl_node.errors import NotRunning, escaped
from hsl_node.host.control import ask
from hsl_node.host.files import require_initialised
from hsl_node.host.hints import addressed
from hsl_node.host.units import age, clock, digits, duration, figure, progress, size
from hsl_node.status.recorded import from_journal
from hsl_node.status.snapshot import PeerStatus, Received, Sent, Snapshot, StatusWarning, from_json

Lines = list[str]
Blocks = list[Lines]  # what is shown or left out as a whole

WIDTH = 80
SCORE_ROUNDS = 9  # columns of the table of scores that fit into 80
_LABEL = 11
_RED, _YELLOW, _GREEN, _BOLD, _DIM = "31", "33", "32", "1", "2"
_COLOUR = {
    "degraded": _RED, "halted": _RED, "stopped": _RED, "paused": _YELLOW, "waiting": _YELLOW, "finished": _GREEN,
}  # fmt: skip
_SIGNS = ("images", "influence", "said", "share", "validation")  # a test: those of poisoning.py
_ENDED = {"stopped": "stopped", "failed": "ended by an error"}  # killed: a warning says so, nobody knows when


@dataclass(frozen=True)
class Look:
    """How to draw: a terminal, a pipe, a log file."""

    width: int = WIDTH
    colour: bool = False
    unicode: bool = True
    bars: bool = False  # bars instead of byte counts, for the live view

    def paint(self, text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self.colour and codes and text else text

    def bar(self, fraction: float, cells: int) -> str:
        done = round(min(1.0, max(0.0, fraction)) * cells)
        full, empty = ("█", "░") if self.unicode else ("#", ".")
        return full * done + empty * (cells - done)


# ------------------------------------------------------------------ where a snapshot comes from


def fetch(state: Path) -> Snapshot:
    """The daemon's snapshot, or the journal's with `state` = "stopped"; its hints name the state directory.

    Raises:
        NotInitialised: this is no state directory of a node.
        WaitTimeout: the daemon runs but does not answer.
    """
    require_initialised(state)
    try:
        found = from_json(ask(state, "status")["status"])
    except NotRunning:
        found = from_journal(state)
    told = [replace(warning, fix=addressed(warning.fix, state)) for warning in found.warnings]
    warnings = tuple(sorted(told, key=_is_sign))  # else each kind in its order
    return replace(found, warnings=warnings, next=addressed(found.next, state))


def _is_sign(warning: StatusWarning) -> bool:
    """What only may mean something (poisoning.py) stands below what stops this node."""
    return warning.code.partition(" ")[0] in _SIGNS


# ------------------------------------------------------------------ the page


def render(snapshot: Snapshot, *, now: float, look: Look = Look(), height: int | None = None) -> str:
    """The whole page, lines no wider than `look.width`, without a line break at the end.

    `height`: so many lines at most, for a screen that does not scroll.
    """
    down, alarms = _not_running(snapshot, now, look), _warnings(snapshot, now, look)
    summary, peers, scores = _summary(snapshot, now, look), _peers(snapshot, now, look), _scores(snapshot, look)
    if height is not None:
        alarms, peers, scores = _fitted(alarms, peers, scores, height - len(down) - len(summary))
    blank = [""] if alarms else []
    return "\n".join([*down, *chain(*alarms), *blank, *summary, *chain(*peers), *scores])


def _fitted(alarms: Blocks, peers: Blocks, scores: Lines, room: int) -> tuple[Blocks, Blocks, Lines]:
    """First the scores go; then each alarm has one line; then alarms, and at last hospitals, are only counted."""

    def over() -> int:
        return sum(map(len, (*alarms, *peers, scores))) + bool(alarms) - room

    if over() > 0:
        scores = []
    if over() > 0:
        alarms = [[_cut(block)] for block in alarms]
    if over() > 0:
        alarms = _counted(alarms, len(alarms) - over() - 1, "and {} more alarms; `hsl-node status` has all")
    if over() > 0 and peers:
        peers = [peers[0], *([row[0]] for row in peers[1:])]  # without what stands below a row
    if over() > 0 and peers:
        peers = _counted(peers, len(peers) - over() - 1, "and {} more hospitals")
    return alarms, peers, scores


def _cut(block: Lines) -> str:
    return f"{block[0]} …" if len(block) > 1 else block[0]


def _counted(blocks: Blocks, most: int, rest: str) -> Blocks:
    kept = max(1, most)
    return blocks if len(blocks) <= kept + 1 else [*blocks[:kept], [rest.format(len(blocks) - kept)]]


def _not_running(snapshot: Snapshot, now: float, look: Look) -> list[str]:
    if snapshot.state != "stopped":
        return []
    since, ended = snapshot.since, snapshot.ended
    lines = []
    if ended and ended.how in _ENDED:
        by = f", {ended.text}" if ended.how == "stopped" and ended.text else ""
        lines = [f"{_ENDED[ended.how]} {clock(ended.at, now)} ({age(now - ended.at)} ago){by}"]
    if snapshot.node:
        last = f", last written {clock(since, now)} ({age(now - since)} ago)" if since else ""
        lines += [f"below is what the journal knows{last}"]
    elif not ended:
        lines = ["it has not been started here yet."]
    lines += _wrapped(f"next: {snapshot.next}", look.width - _LABEL - 2, "", "") if snapshot.next else []
    first, *more = lines or ["its first start did not come far."]
    return [look.paint("not running", _BOLD, _RED) + f"  {first}", *(f"{'':{_LABEL}}  {line}" for line in more), ""]


def _warnings(snapshot: Snapshot, now: float, look: Look) -> Blocks:
    blocks: Blocks = []
    for warning in snapshot.warnings:
        since = f" ({age(now - warning.since)} ago)" if warning.since else ""
        text = _wrapped(escaped(warning.text, 600) + since, look.width, "! ", "  ")
        lines = [look.paint(line, _BOLD, _RED) for line in text]
        if warning.fix:
            lines += _wrapped(escaped(warning.fix, 600), look.width, "  what to do: ", "              ")
        blocks.append(lines)
    return blocks


def _summary(snapshot: Snapshot, now: float, look: Look) -> list[str]:
    if not snapshot.node:
        return []
    federation, state = snapshot.federation, snapshot.state
    word = look.paint(state, _BOLD, _COLOUR.get(state, _GREEN))
    since = snapshot.since if state != "stopped" else None
    how_long = f" since {clock(since, now)} ({duration(now - since)})" if since else ""
    facts = [federation.name, federation.hash and f"hash {federation.hash}", f"{federation.peers} peers"]
    facts += [federation.method, federation.task]
    lines = [f"{look.paint(snapshot.node, _BOLD)}  {word}{how_long}"]
    lines += _field("federation", ", ".join(escaped(str(f), 60) for f in facts if f), look)
    lines += _field("round", _round(snapshot), look)
    lines += _field("still to do", _still_to_do(snapshot), look)
    lines += _field("waiting for", _waiting(snapshot, now), look)
    lines += _field("epoch", _epoch(snapshot, look), look)
    lines += _field("busy", _busy(snapshot, look), look)
    lines += _field("trainer", _trainer(snapshot), look)
    lines += _field("loss terms", _loss_terms(snapshot), look)
    lines += _field("last fusion", _fusion(snapshot), look)
    lines += _field("your model", escaped(snapshot.model.why, 300) if snapshot.model else "", look)
    lines += _field("disk", _disk(snapshot), look)
    return lines


def _field(label: str, text: str, look: Look) -> list[str]:
    if not text:
        return []
    first, *more = textwrap.wrap(text, look.width - _LABEL - 2) or [""]
    return [f"{look.paint(f'{label:{_LABEL}}', _DIM)}  {first}", *(f"{'':{_LABEL}}  {line}" for line in more)]


def _round(snapshot: Snapshot) -> str:
    rounds = snapshot.rounds
    match snapshot.round, snapshot.phase:
        case None, _ if snapshot.state == "recovering":
            return "known when the peers have answered"
        case None, _ if snapshot.instance:
            return "being taken up where the journal left it"
        case None, _:
            return "not begun"
        case 0, _:
            return f"0 of {rounds}: the peers compare plan, anchor and initial weights"
        case after, "agree":
            return f"{after - 1} of {rounds} fused; the peers compare the last fusion"
        case after, "finished" if rounds and after - 1 < rounds:
            return f"{after - 1} of {rounds} fused; the run is complete: all had reached their plateau"
        case after, "finished":
            return f"{after - 1} of {rounds} fused; the run is complete"
        case round, phase:
            return f"{round} of {rounds}, phase {phase}"


def _still_to_do(snapshot: Snapshot) -> str:
    left = snapshot.still_to_do
    if left is None:
        return ""
    what = [f"deliver this node's last statement to {', '.join(left.deliver_to)}"] if left.deliver_to else []
    what += [f"validate the last fused model (round {left.validate})"] if left.validate else []
    return f"{'; '.join(what)}. Keep the daemon running until this line is gone"


def _waiting(snapshot: Snapshot, now: float) -> str:
    names, since = snapshot.waiting_for, snapshot.waiting_since
    return f"{', '.join(names)}{f', for {duration(now - since)}' if since else ''}" if names else ""


def _epoch(snapshot: Snapshot, look: Look) -> str:
    epoch = snapshot.epoch
    if epoch is None or not epoch.epoch:
        return ""
    within = (epoch.batch or 0) / epoch.batches if epoch.batches else 0.0
    bar = look.bar((epoch.epoch - 1 + within) / epoch.of, 20)
    rate = f", {epoch.images_per_s:.1f} images/s" if epoch.images_per_s else ""
    return f"{epoch.epoch} of {epoch.of}  {bar}  batch {epoch.batch} of {epoch.batches}{rate}"


def _busy(snapshot: Snapshot, look: Look) -> str:
    busy = snapshot.busy
    if busy is None:
        return ""
    return f"{escaped(busy.what, 30)}  {look.bar(busy.done / max(busy.total, 1), 20)}  {busy.done} of {busy.total}"


def _trainer(snapshot: Snapshot) -> str:
    trainer, device = snapshot.trainer, snapshot.device
    if not trainer:
        return f"on {device}" if device else ""
    heard = f", last heard {duration(trainer.last_event_s)} ago" if trainer.state == "silent" else ""
    again = f", restarts so far: {trainer.restarts}" if trainer.restarts else ""
    return f"{trainer.state}{f' on {device}' if device else ''}{heard}{again}"


def _loss_terms(snapshot: Snapshot) -> str:
    last = snapshot.loss_terms
    if not last:
        return ""
    terms = ", ".join(f"{escaped(term.name, 60)} {digits(term.mean)}" for term in last.terms)
    return f"{terms} (round {last.round}, epoch {last.epoch})"


def _fusion(snapshot: Snapshot) -> str:
    fused = snapshot.last_fused
    if not fused:
        return ""
    return f"round {fused.round}, sha256 {fused.sha256[:12]}, validation {snapshot.score_name} {figure(fused.score)}"


def _disk(snapshot: Snapshot) -> str:
    disk = snapshot.disk
    if disk is None:
        return ""
    need = f", {size(disk.need)} needed to start a round" if disk.need is not None else ""
    return f"{size(disk.free)} free{need}"


# ------------------------------------------------------------------ the tables


def _peers(snapshot: Snapshot, now: float, look: Look) -> Blocks:
    """The header, then a block for each peer, then the legend."""
    if not snapshot.peers:
        return []
    room = max(8, look.width - sum(_CELLS) - 2 * len(_CELLS))
    name_width = min(room, max(len("peer"), *(len(p.name) for p in snapshot.peers)))
    widths = (name_width, *_CELLS)
    last = "last file" if snapshot.state == "stopped" else "last seen"  # connections are not in the journal
    blocks = [["", look.paint(_row(("peer", "is", "sent", "received", last), widths), _DIM)]]
    for peer in snapshot.peers:
        sent, received = peer.sent, peer.received
        life = peer.life.state if peer.life else "-"
        came = _received(received, snapshot.score_name, look)
        cells = (_shortened(peer.name, name_width), life, _sent(sent, look), came, _seen(peer, now))
        colour = {"refused": (_RED,), "waiting to retry": (_YELLOW,)}.get(sent.state, ())
        colour = (_RED,) if received.state == "refused" or life == "down" else colour
        lines = [_row(cells, widths), *_life(peer, now, look), *_trouble(sent, look)]
        blocks.append([look.paint(line, *colour) for line in lines])
    if any(_has_score(peer.received) for peer in snapshot.peers):
        legend = (
            f"{snapshot.score_name}: that hospital's checkpoint of this round on its own validation images, as it says"
        )
        blocks.append([look.paint(line, _DIM) for line in _wrapped(legend, look.width, "", "")])
    return blocks


_CELLS = (7, 21, 21, 9)  # is, sent, received, last seen; the name has the rest of the width


def _row(cells: tuple[str, ...], widths: tuple[int, ...]) -> str:
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _sent(sent: Sent, look: Look) -> str:
    match sent.state:
        case "idle":
            return "-"
        case "sending":
            return _moving(sent, sent.bytes, look)
        case "waiting for receipt":
            return "sent, no receipt yet"
        case "done":
            return f"{size(sent.total)} delivered" if sent.total else "delivered"
        case "waiting to retry":
            return f"{progress(sent.bytes, sent.total)}, retry {sent.retries}"
        case state:
            return state


def _received(received: Received, score: str, look: Look) -> str:
    match received.state:
        case "nothing":
            return "-"
        case "receiving":
            return _moving(received, received.bytes, look)
        case "verified" if _has_score(received):
            return f"{size(received.total)}, {score} {figure(received.score)}"
        case "verified":
            return f"{size(received.total)} verified" if received.total else "verified"
        case state:
            return state


def _has_score(received: Received) -> bool:
    return received.state == "verified" and received.score is not None


def _life(peer: PeerStatus, now: float, look: Look) -> list[str]:
    """Below a peer's row: since when it is down, or paused."""
    life = peer.life
    if life is None or life.since is None:
        return []
    what = "paused by its operator" if life.state == "paused" else "no sign of life"
    since = f"{what} since {clock(life.since, now)} ({duration(now - life.since)})"
    return _wrapped(since, look.width, _below(look), "    ")


def _below(look: Look) -> str:
    return "  └ " if look.unicode else "  > "


def _moving(transfer: Sent | Received, done: int, look: Look) -> str:
    rate = f"{size(transfer.rate)}/s" if transfer.rate else ""
    if look.bars and transfer.total:
        fraction = done / transfer.total
        return f"{look.bar(fraction, 8)} {fraction:4.0%} {rate}".rstrip()
    return f"{progress(done, transfer.total)} {rate}".rstrip()


def _trouble(sent: Sent, look: Look) -> list[str]:
    """Below a peer's row: why sending does not work, and when it is tried again."""
    if sent.state == "done" or not (sent.last_error or sent.next_try_s is not None):
        return []
    parts = [escaped(sent.last_error, 300)] if sent.last_error else []
    parts += [f"next try in {duration(sent.next_try_s)}"] if sent.next_try_s is not None else []
    parts += [f"{size(sent.resent)} sent twice"] if sent.resent else []
    return _wrapped("; ".join(parts), look.width, _below(look), "    ")


def _seen(peer: PeerStatus, now: float) -> str:
    if peer.connected:
        return "now"
    return age(now - peer.last_seen) if peer.last_seen else "not yet"


def _scores(snapshot: Snapshot, look: Look) -> list[str]:
    rows = snapshot.scores[-SCORE_ROUNDS:]
    if not rows:
        return []
    columns = [
        ("round", *(str(r.round) for r in rows)),
        ("own model", *(figure(r.own) for r in rows)),
        ("fused", *(figure(r.fused) for r in rows)),
    ]
    if any(r.recalibrated is not None for r in rows):
        columns.append(("recalibrated", *(figure(r.recalibrated) for r in rows)))
    wide = max(_LABEL, *(len(label) for label, *_ in columns))
    lines = [f"{label:{wide}}" + "".join(f"{cell:>7}" for cell in cells) for label, *cells in columns]
    return ["", look.paint(f"validation {snapshot.score_name} on this site's images", _DIM), *lines]


def _shortened(name: str, width: int) -> str:
    """Long names differ at their ends more often than in the middle."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


def _wrapped(text: str, width: int, first: str, further: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=further)
