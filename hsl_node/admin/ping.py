"""`peer ping`: a real login at a peer's inbox, as the daemon does it. Shows address, network, its key and ours.

Then 64 KiB go there and come back, as parts that are removed again: a line that loses large packets alone lets a login
pass and nothing else.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hsl_node.errors import HslError, KeyRefused, PeerDataError, TransportError, UsageError
from hsl_node.federation import config, identity, keyring, node_toml
from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import PARTS, Digest, FileName, Kind, Peer
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.host.hints import addressed
from hsl_node.host.layout import Layout
from hsl_node.host.units import duration
from hsl_node.sync import life
from hsl_node.sync.manifest import MANIFEST_MAX_BYTES
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.transport import OperationFailed, OtherHostKey, Patience, Transport

CONNECT_S = 30.0  # a person waits for the answer; the daemon is more patient. A round trip of 4 s makes a login of 28 s
ANSWER_S = 20.0
PARTS_SENT = 2  # of manifests: there is room for them wherever there is any. 64 KiB in all
MTU_FIX = (
    "large packets are lost on the way, often in a tunnel or VPN whose firewall drops ICMP. Let 'fragmentation needed' "
    "and 'packet too big' pass or clamp the MSS there, or lower this machine's: `ip link set dev DEVICE mtu 1280`"
)


@dataclass(frozen=True)
class Answer:
    peer: str
    address: str
    seconds: float | None  # to log in; None: it failed
    error: str
    remedy: str
    exit_code: int
    says: str = ""  # of itself: another federation file, another time of day, paused
    remedy_of_it: str = ""
    other_federation: bool = False
    weight_s: float | None = None  # for 64 KiB there and back; None: not tried, or the server does not allow it


def ping(state: Path, names: Sequence[str], me: Identity | None = None) -> list[Answer]:
    """Log in at these peers, all at once; no names: at all others. `me`: with another key than the node's.

    Raises:
        UsageError: a name is not a peer of the federation, or is this node's own.
    """
    node, federation = node_toml.load_node(state), config.load_federation(state)
    me = me or identity.load(identity.find_key(Layout(state).key))
    ring = keyring.load(state, federation)
    cards = [federation.get(name) for name in names] or [p for p in federation.peer if p.name != node.name]
    if any(card.name == node.name for card in cards):
        raise UsageError(f"{node.name} is this node", remedy="`hsl-node status` says how it is")
    answers = asyncio.run(_ping(cards, node, me, ring, federation.fed8))
    return [
        replace(answer, remedy=addressed(answer.remedy, state), remedy_of_it=addressed(answer.remedy_of_it, state))
        for answer in answers
    ]


def text(answer: Answer) -> str:
    if answer.seconds is not None:
        weight = f"; 64 KiB there and back, {answer.weight_s:.1f} s" if answer.weight_s is not None else ""
        says = f"; {answer.says}\n  what to do: {answer.remedy_of_it}" if answer.says else ""
        return f"{answer.peer}  {answer.address}  logged in, {answer.seconds * 1000:.0f} ms{weight}{says}"
    remedy = f"\n  what to do: {answer.remedy}" if answer.remedy else ""
    return f"{answer.peer}  {answer.address}  FAILED: {answer.error}{remedy}"


def comes_back(state: Path) -> str:
    """Does a call to this node's own address, as the others are told it, end at its own inbox? Else why not."""
    node, federation = node_toml.load_node(state), config.load_federation(state)
    me, ring = identity.load(identity.find_key(Layout(state).key)), keyring.load(state, federation)

    async def call() -> None:
        async with login(federation.get(node.name), node, me, ring):
            pass

    try:
        asyncio.run(call())
    except OtherHostKey as exc:
        return exc.message
    except KeyRefused:
        return ""  # of the inbox: nobody pushes to himself
    except TransportError as exc:
        return exc.message
    return ""


def login(card: PeerCard, node: NodeConfig, me: Identity, ring: Keyring) -> AbstractAsyncContextManager[Transport]:
    patience = Patience(connect_s=CONNECT_S, answer_s=ANSWER_S)
    return connect(card, Peer(node.name), me, client=node.client, patience=patience, host_keys=ring.host_keys(card))


async def _ping(cards: Sequence[PeerCard], node: NodeConfig, me: Identity, ring: Keyring, fed8: str) -> list[Answer]:
    return list(await asyncio.gather(*(_one(card, node, me, ring, fed8) for card in cards)))


async def _one(card: PeerCard, node: NodeConfig, me: Identity, ring: Keyring, fed8: str) -> Answer:
    began = time.monotonic()
    try:
        async with login(card, node, me, ring) as link:
            answer = Answer(card.name, card.address, time.monotonic() - began, "", "", 0)
            answer = replace(answer, weight_s=await _weigh(link, fed8, Peer(node.name)))
            with suppress(TransportError, PeerDataError):  # an earlier version; another program's inbox; it is there
                path = (
                    life.file_path(Peer(card.name))
                    if card.host_key
                    else life.asking_path(life.Sign(ring.federation.fed8, None))
                )
                return _told(
                    answer, await life.ask(link, path, Peer(card.name), ring.keys(card.name)), ring, time.time()
                )
            return answer
    except HslError as exc:
        return Answer(card.name, card.address, None, exc.message, exc.remedy, exc.exit_code)


def _told(answer: Answer, its: life.Life, ring: Keyring, now: float) -> Answer:
    """With what the peer's node says of itself. A file in its inbox may be old: its clock says nothing then."""
    ours, peer = ring.federation, answer.peer
    if its.federation != ours.digest:
        text, fix = life.other_federation(peer, its.federation[:8], ours.fed8)
        return replace(answer, says=text, remedy_of_it=fix, other_federation=True)
    ahead_s = its.at - now
    if abs(ahead_s) > life.CLOCK_LIMIT_S and not ours.get(peer).host_key:
        says = f"its clock is {life.off(ahead_s)} this one"
        return replace(answer, says=says, remedy_of_it="`timedatectl` here and there says which one NTP does not set")
    if its.paused_s is not None:
        says = f"paused by its operator for {duration(its.paused_s)}"
        return replace(answer, says=says, remedy_of_it=f"call {peer}; over there: hsl-node resume")
    return answer


async def _weigh(link: Transport, fed8: str, me: Peer) -> float | None:
    """Seconds for 64 KiB there and back.

    Raises:
        TransportError: small packets pass, large ones do not, in one of the two directions; or the link broke.
    """
    began, way, passed, sent = time.monotonic(), "sent there", 0, list[str]()
    seconds = None

    def progress(end: int) -> None:
        nonlocal passed
        passed = end

    try:
        for number in range(PARTS_SENT):
            # The same names each time: what a broken line leaves there takes one of this node's few places, once.
            part = f"{PARTS}/{FileName(fed8, 0, me, Digest(f'{number:064x}'), Kind.MANIFEST).as_part()}"
            if await link.size(part) is not None:  # something small
                await link.remove(part)
            await link.write(part, secrets.token_bytes(MANIFEST_MAX_BYTES), 0, create=True, progress=progress)
            sent.append(part)
        way, passed = "asked for", 0
        for part in sent:
            passed += len(await link.read(part, 0, MANIFEST_MAX_BYTES))
        seconds = time.monotonic() - began
    except OperationFailed:  # a server of another kind, or no room: no fault of the line
        pass
    except TransportError as exc:
        if passed:
            raise
        what = f"small packets pass, large ones {way} do not (MTU)"
        raise TransportError(f"{what}: {exc.message}", remedy=MTU_FIX) from exc
    for part in sent:
        with suppress(OperationFailed):
            await link.remove(part)
    return seconds
