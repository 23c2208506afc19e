"""May a peer's old key go? Only when nothing that it has signed can still be on its way: no round is signed twice.

In the midst of a run its newest manifest says so: one that the new key signed comes after all of the old one. After the
last manifest of a run there is none to wait for. Then it is asked which key it uses: to our own last manifest, brought
once more, it answers with a new receipt, whatever program its inbox is.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from hsl_node.admin.ping import login
from hsl_node.errors import HslError, PeerDataError, TransportError, WaitTimeout
from hsl_node.federation import config, identity, keyring, node_toml
from hsl_node.federation.identity import MANIFEST_NAMESPACE
from hsl_node.federation.keyring import KeyUpdate
from hsl_node.federation.names import Digest, FileName, Kind, Peer, Round
from hsl_node.federation.strings import fingerprint
from hsl_node.host.layout import Layout
from hsl_node.sync.round import Phase
from hsl_node.sync.send.deliver import Parcel, answers_with
from hsl_node.sync.store.journal import Journal

ANSWER_S = 30.0  # to log in, and for an inbox of another program, which its daemon looks into every second


def require_settled(state: Path, peer: Peer, update: KeyUpdate) -> None:
    """Nothing that this peer signed with its old key is missing here, and it uses the new one.

    Raises:
        HslError: it may be, or does not; says what to wait for.
        TransportError, KeyRefused, WaitTimeout: the run is over, and the peer cannot be asked which key it uses.
    """
    with Journal.read_only(Layout(state).journal) as journal:
        saved = journal.state() or {"phase": None, "round": 0, "owed": ()}
        newest = journal.last_manifest(peer)
        # Where I have finished or halted nobody comes further than I did: with its manifest of that round all is here.
        over = saved["phase"] in (Phase.FINISHED, Phase.HALTED) and newest and newest["round"] >= saved["round"]
        mine = journal.signed(saved["round"]) if over else None
        owed = [r for r, p in saved["owed"] if p == peer]
    again = "call this again when it is: `hsl-node status` shows the round; until then both keys count"
    if owed:
        raise HslError(
            f"round {owed[0]} is not delivered to {peer} yet: its receipt may be signed with the old key", remedy=again
        )
    if newest is None:
        raise HslError(
            f"nothing of {peer} has arrived in this run yet: its first manifest may be signed with the old key",
            remedy=again,
        )
    try:
        identity.verify(newest["document"], update.new, MANIFEST_NAMESPACE)
    except PeerDataError:
        if mine is None:
            raise HslError(
                f"the last manifest of {peer} (round {newest['round']}) is signed with its old key: it has not "
                "changed over, or nothing new of it has arrived since",
                remedy=f"{peer} runs hsl-node key rotate --finish; {again}",
            ) from None
        _require_new_receipt(state, peer, update, saved["round"], *mine)


def _require_new_receipt(
    state: Path, peer: Peer, update: KeyUpdate, round: Round, sha256: Digest, manifest: bytes
) -> None:
    node, federation = node_toml.load_node(state), config.load_federation(state)
    me, card = identity.load(identity.find_key(Layout(state).key)), federation.get(peer)
    parcel = Parcel(FileName(federation.fed8, round, Peer(node.name), sha256, Kind.DATA), None, 0, manifest)

    async def ask() -> bool:
        async with asyncio.timeout(ANSWER_S), login(card, node, me, keyring.load(state, federation)) as link:
            return await answers_with(link, parcel, card=card, federation=federation, key=update.new)

    later = "call this again; until then both keys count"
    try:
        changed = asyncio.run(ask())
    except (TimeoutError, TransportError) as exc:
        remedy = f"see that the daemon of {peer} runs, then {later}"
        if isinstance(exc, TransportError):
            text = f"the run is over, so {peer} has to be asked which key it uses: {exc.message}"
            raise TransportError(text, remedy=remedy) from exc
        text = f"{peer} was asked which key it uses, and has not answered for {ANSWER_S:.0f} s"
        raise WaitTimeout(text, remedy=remedy) from exc
    if not changed:
        raise HslError(
            f"{peer} answers with its old key {fingerprint(update.old)}: it has not changed over",
            remedy=f"{peer} runs hsl-node key rotate --finish, and starts its daemon again where that says so; then "
            f"{later}",
        )
