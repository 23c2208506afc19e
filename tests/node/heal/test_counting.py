"""A key that was replaced, in the wrong hands: what it signed counts as far as newer signatures name it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from claims import START
from federations import Members
from recovering import BIRCH, CEDAR, ME, Long, Site, by, run

from hsl_node.federation.identity import Identity
from hsl_node.federation.keyring import Accepted, Keyring, KeyringFile, sign_update
from hsl_node.federation.names import Digest
from hsl_node.node.before_signing import BeforeSigning
from hsl_node.node.peers.fetch import HeldUp
from hsl_node.sync.round import Phase


class Replaced:
    """ash has replaced its key, in round 3, and lost its disk later. cedar has found the old one."""

    def __init__(self, members: Members, folder: Path) -> None:
        self.old = members.identities[ME]
        self.new = Identity(asyncssh.generate_private_key("ssh-ed25519"))
        ring = Keyring.of(members.federation)
        update = sign_update(ring, ME, self.old, self.new.public)
        self.ring = Keyring.of(members.federation, KeyringFile(update=(Accepted(document=update, finished=True),)))
        self.site = Site(members, folder, self.ring)
        self.before = {p: self.site.manifest(p, 3) for p in (ME, BIRCH, CEDAR)}
        for peer in (BIRCH, CEDAR):
            self.site.givers[peer].list(self.before[peer], by(members.identities[peer], self.before[peer]))

    def inputs(self) -> dict[str, str]:
        return {p: m.digest for p, m in self.before.items()}


def old_keys(site: Site) -> list[dict[str, Any]]:
    return [a for a in site.alarms.listing() if a["code"].startswith("old key")]


@pytest.fixture
def replaced(members: Members, tmp_path: Path) -> Replaced:
    return Replaced(members, tmp_path / "state")


def test_threat_17_what_was_signed_before_the_key_was_replaced_still_counts(replaced: Replaced) -> None:
    async def story() -> None:
        mine = replaced.site.manifest(ME, 4, replaced.inputs())
        replaced.site.givers[BIRCH].list(mine, by(replaced.old, mine))
        assert mine in [h.manifest for h in (await replaced.site.asked()).values()]

    run(story)


def test_threat_17_a_replaced_key_says_nothing_of_a_round_that_the_new_one_signed(replaced: Replaced) -> None:
    async def story() -> None:
        mine = replaced.site.manifest(ME, 4, replaced.inputs())
        forged = replaced.site.manifest(ME, 4, replaced.inputs(), samples=99)
        replaced.site.givers[BIRCH].list(mine, by(replaced.new, mine))
        replaced.site.givers[CEDAR].list(forged, by(replaced.old, forged))
        found = [h.manifest for h in (await replaced.site.asked()).values()]
        assert mine in found and forged not in found
        assert not list(replaced.site.evidence.iterdir())

    run(story)


def test_threat_17_a_replaced_keys_signature_of_long_ago_fits_what_the_journal_has_of_the_others(
    replaced: Replaced,
) -> None:
    """Nobody lists what the others signed before it: they list their last rounds."""

    async def story() -> None:
        site = replaced.site
        long = Long(site)
        mine, _ = long.held[ME, 21]
        document = by(replaced.old, mine)
        for table in ("manifests WHERE round = 21 AND peer = 'ash'", "signed WHERE round = 21"):
            long.journal._db.execute(f"DELETE FROM {table}")
        for giver in site.givers.values():
            giver.listed = []
        site.givers[BIRCH].list(mine, document)
        held = await site.asked()
        assert {h.manifest.round for h in held.values()} == {21, 39, 40}

    run(story)


def test_threat_17_a_round_forged_with_a_replaced_key_is_not_gone_on_from(replaced: Replaced) -> None:
    """It names manifests of a round before, as birch never signed them. Loud, with both names."""

    async def story() -> None:
        forged = replaced.site.manifest(ME, 6, {p: "9" * 64 for p in (ME, BIRCH, CEDAR)})
        replaced.site.givers[CEDAR].list(forged, by(replaced.old, forged))
        with pytest.raises(
            HeldUp, match="which cedar keeps and which was made with a key that has been replaced"
        ) as up:
            await replaced.site.asked()
        assert up.value.peer == BIRCH

    run(story)


def test_threat_17_a_round_to_come_is_not_gone_on_from_however_well_it_was_forged_with_a_replaced_key(
    replaced: Replaced,
) -> None:
    """Every member knows the digests that it has to name. But the new key has signed a round before it."""

    async def story() -> None:
        site = replaced.site
        now = {p: site.manifest(p, 4, replaced.inputs()) for p in (ME, BIRCH, CEDAR)}
        forged = site.manifest(ME, 5, {p: m.digest for p, m in now.items()})
        for peer, giver in site.givers.items():
            giver.list(now[peer], by(site.members.identities[peer], now[peer]))
            giver.list(now[ME], by(replaced.new, now[ME]))
        site.givers[CEDAR].list(forged, by(replaced.old, forged))
        found = [h.manifest for h in (await site.asked()).values()]
        assert now[ME] in found and forged not in found
        (alarm,) = old_keys(site)
        assert alarm["code"] == "old key ash" and alarm["text"].startswith("cedar keeps")

    run(story)


def test_threat_17_a_round_of_long_ago_that_a_replaced_key_signs_again_is_neither_taken_nor_proof_against_its_owner(
    replaced: Replaced,
) -> None:
    """Both are signed with the old key: the one counts that the round after it names, as far as the new key's."""

    async def story() -> None:
        site = replaced.site
        mine = {3: site.manifest(ME, 3, {ME: "1" * 64})}
        for round in (4, 5):
            mine[round] = site.manifest(ME, round, {ME: mine[round - 1].digest})
        forged = mine[3].model_copy(update={"samples": 77})
        for round, key in ((3, replaced.old), (4, replaced.old), (5, replaced.new)):
            site.givers[BIRCH].list(mine[round], by(key, mine[round]))
        site.givers[CEDAR].list(forged, by(replaced.old, forged))
        counts = [h.manifest for h in (await site.asked()).values() if h.peer == ME]
        assert sorted(m.round for m in counts) == [3, 4, 5] and forged not in counts
        assert not list(site.evidence.iterdir())
        assert [a["code"] for a in old_keys(site)] == ["old key ash"]

    run(story)


def test_threat_17_two_of_the_last_round_that_a_replaced_key_signed_hold_up_by_name_and_prove_nothing(
    replaced: Replaced,
) -> None:
    """The key was changed after the end: nothing comes after it that could name the right one."""

    async def story() -> None:
        site = replaced.site
        genuine = site.manifest(ME, 4, replaced.inputs())
        forged = genuine.model_copy(update={"samples": 77})
        site.givers[BIRCH].list(genuine, by(replaced.old, genuine))
        site.givers[CEDAR].list(forged, by(replaced.old, forged))
        with pytest.raises(HeldUp, match="birch and cedar keep two different manifests of this node's round 4"):
            await site.asked()
        assert not list(site.evidence.iterdir())

    run(story)


def test_threat_17_what_only_a_replaced_key_says_makes_nothing_else_certain(replaced: Replaced) -> None:
    """Two chains of it, and no newer key has signed anything yet: nobody can tell which one is forged."""

    async def story() -> None:
        site = replaced.site
        for giver, samples in ((BIRCH, 10), (CEDAR, 77)):
            fourth = site.manifest(ME, 4, replaced.inputs(), samples=samples)
            fifth = site.manifest(ME, 5, {ME: fourth.digest}, samples=samples)
            for manifest in (fourth, fifth):
                site.givers[giver].list(manifest, by(replaced.old, manifest))
        with pytest.raises(HeldUp, match="birch and cedar keep two different manifests"):
            await site.asked()
        assert not list(site.evidence.iterdir())

    run(story)


def test_threat_17_the_same_round_signed_again_with_the_new_key_is_no_forgery(replaced: Replaced) -> None:
    """Only birch had it, and could not be asked: the round was trained again, to the same bytes."""

    async def story() -> None:
        site = replaced.site
        mine = site.manifest(ME, 4, replaced.inputs())
        site.givers[BIRCH].list(mine, by(replaced.old, mine))
        site.givers[CEDAR].list(mine, by(replaced.new, mine))
        assert mine in [h.manifest for h in (await site.asked()).values()]
        assert not old_keys(site)

    run(story)


@pytest.mark.parametrize("revoked", [False, True])
def test_threat_17_a_replaced_key_of_a_peer_rewrites_no_round_here_and_sends_nothing_in_its_name(
    members: Members, tmp_path: Path, revoked: bool
) -> None:
    """cedar has found birch's old key, and lists with it a round of long ago and one to come."""

    async def story() -> None:
        old, new = members.identities[BIRCH], Identity(asyncssh.generate_private_key("ssh-ed25519"))
        ring = Keyring.of(members.federation)
        file = KeyringFile(update=(Accepted(document=sign_update(ring, BIRCH, old, new.public), finished=True),))
        ring = Keyring.of(members.federation, file)
        if revoked:
            ring = ring.revoking(BIRCH, "")
        site = Site(members, tmp_path / "state", ring)
        theirs = {3: site.manifest(BIRCH, 3), 4: site.manifest(BIRCH, 4, {BIRCH: site.manifest(BIRCH, 3).digest})}
        mine = {4: site.manifest(ME, 4, {BIRCH: theirs[3].digest}), 5: site.manifest(ME, 5, {BIRCH: theirs[4].digest})}
        forged = [site.manifest(BIRCH, round, {BIRCH: theirs[4].digest}, samples=77) for round in (3, 6)]
        for round, manifest in mine.items():
            site.givers[CEDAR].list(manifest, by(members.identities[ME], manifest))
            site.givers[CEDAR].list(theirs[round - 1], by(old if round == 4 else new, theirs[round - 1]))
        for manifest in forged:
            site.givers[CEDAR].list(manifest, by(old, manifest))
        found = [h.manifest for h in (await site.asked()).values()]
        assert all(m in found for m in (*mine.values(), *theirs.values()))
        assert not any(m in found for m in forged)
        (alarm,) = old_keys(site)
        assert alarm["code"] == "old key birch" and alarm["text"].startswith("cedar keeps")
        assert alarm["fix"].endswith("call birch and cedar")

    run(story)


def test_threat_17_what_was_brought_by_hand_and_does_not_count_is_forgotten(replaced: Replaced) -> None:
    """The mailed folder alone did not show it; what birch lists does."""

    async def story() -> None:
        site = replaced.site
        now, forged = site.manifest(ME, 4, replaced.inputs()), site.manifest(ME, 9, replaced.inputs())
        site.givers[BIRCH].list(now, by(replaced.new, now))
        journal = site.journal
        journal.record_manifest(9, ME, forged.sha256, by(replaced.old, forged), forged.content())
        held = await site.asked()
        assert now in [h.manifest for h in held.values()] and forged not in [h.manifest for h in held.values()]
        state = replace(START, me=ME, phase=Phase.COLLECT, round=4)
        site.recovery._write(state, Digest("a" * 64), held)
        assert journal.manifest(9, ME) is None and journal.last_signed() == 4

    run(story)


def test_threat_17_whose_one_replaced_key_signed_all_there_is_of_it_is_believed(replaced: Replaced) -> None:
    """ash has changed its key and signed nothing since; what it signed before is one chain."""

    async def story() -> None:
        site = replaced.site
        fourth = {p: site.manifest(p, 4, replaced.inputs()) for p in (ME, BIRCH, CEDAR)}
        mine = [fourth[ME], site.manifest(ME, 5, {p: m.digest for p, m in fourth.items()})]
        for manifest in mine:
            site.givers[BIRCH].list(manifest, by(replaced.old, manifest))
        for peer, giver in site.givers.items():
            giver.list(fourth[peer], by(site.members.identities[peer], fourth[peer]))
        found = [h.manifest for h in (await site.asked()).values()]
        assert all(m in found for m in mine) and not old_keys(site)

    run(story)


def test_threat_17_a_node_does_not_take_itself_for_set_back_by_its_replaced_key(replaced: Replaced) -> None:
    """The live daemon, that is: its journal knows a round signed with the new key."""

    async def story() -> None:
        site, now = replaced.site, replaced.site.manifest(ME, 4, replaced.inputs())
        journal = site.journal
        forged = site.manifest(ME, 6)
        site.givers[CEDAR].list(forged, by(replaced.old, forged))
        journal.record_signed(4, Digest(now.sha256), by(replaced.new, now))
        async with site.givers[BIRCH].serving(), site.givers[CEDAR].serving():
            await BeforeSigning(*site.parts.all).check()
        assert not journal.meta("recover") and not site.alarms.listing()

    run(story)
