"""A state that was set back after a receipt and before the next own signature: found without a command, and mended.

Threat 12. Real daemons, real SFTP; the trainer is a stand-in. Set back past a signature: test_recovery.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from claims import START, checkpoint
from cluster import WAIT_S, Cluster, warned
from every_phase import has
from lost_disk import LOST, NAMES, PLAN, require_same
from plain_inbox import release, with_a_plain_inbox

from hsl_node.federation.names import Peer
from hsl_node.host.durable import Step
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal import set_back as set_back_module
from hsl_node.node.heal.set_back import AGAIN_MAX, SetBack
from hsl_node.node.peers.fetch import FAIR_BYTES_PER_S
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.round import Event, Forgotten, Phase, State
from hsl_node.sync.store.journal import Journal

# A minute of patience is for people; who is waited for is asked at once and often.
HURRY = (
    "import hsl_node.node.heal.fetch_missing as m, hsl_node.node.equivocation as p; "
    "m.PATIENCE_S, p.PATIENCE_S, p.PAUSE = 0.5, 0.2, p.Pace(0.5, 1)"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict[int, str]]:
    found = {}
    for names in (NAMES, NAMES[:2]):
        with Cluster(tmp_path_factory.mktemp("undisturbed"), names, PLAN) as cluster:
            cluster.start_all()
            cluster.wait_finished()
            found[names] = cluster.fused("ash")
    return found


def snapshot(cluster: Cluster, name: str) -> Path:
    """Of a node that does not run, as its file system or its machine makes it."""
    copy = cluster.root / f"snapshot of {name}"
    shutil.copytree(cluster.layout(name).state, copy, symlinks=True, ignore=shutil.ignore_patterns("run"))
    return copy


def set_back(cluster: Cluster, name: str, copy: Path) -> None:
    cluster.kill(name)
    state = cluster.layout(name).state
    shutil.rmtree(state)
    shutil.copytree(copy, state, symlinks=True)


def last_signed(cluster: Cluster, name: str) -> int | None:
    with Journal.read_only(cluster.layout(name).journal) as journal:
        return journal.last_signed()


def all_delivered(cluster: Cluster, names: Iterable[str], round: int) -> None:
    """These have signed this round, and the receipts of all others for it."""
    for name in names:
        cluster.wait_until(
            name, lambda s: all(p["receipt"] == f"round {round}: accepted" for p in s["peers"]), f"{round} delivered"
        )


def waits_in_round_1(cluster: Cluster, victim: str, *late: str) -> Path:
    """The victim has signed round 1 and waits for the late ones, whose trainers are held. Gives a copy of its state."""
    for name in late:
        cluster.hold(name)
    cluster.start_all()
    there = (1, "collect", sorted(late))
    cluster.wait_until(victim, lambda s: (s["round"], s["phase"], sorted(s["waiting_for"])) == there, "waits")
    cluster.wait_until(victim, lambda s: "round 1: accepted" in {p["receipt"] for p in s["peers"]}, "delivered")
    cluster.stop(victim)
    return snapshot(cluster, victim)


def require_told_and_mended(cluster: Cluster, right: dict[int, str], *lost: str) -> None:
    require_same(cluster, right)
    log = cluster.layout("birch").event_log.read_text()
    for peer in lost:
        assert f"the checkpoint of {peer} is at other peers and not on its way here" in log
    told = [w["text"] for w in cluster.status("birch")["warnings"] if w["code"].startswith(("lost", "set back"))]
    assert all("over, shown until it was quiet" in text for text in told), told


@pytest.mark.sample(3, "set back")
@pytest.mark.parametrize("names", [NAMES[:2], NAMES], ids=["of two", "of three"])
@pytest.mark.parametrize("position", ["collecting", "fusing"])
def test_threat_12_a_node_set_back_past_what_it_acknowledged_gets_it_from_peers_that_are_one_round_ahead(
    tmp_path: Path, undisturbed: dict[Any, dict[int, str]], names: tuple[str, ...], position: str
) -> None:
    """All others have fused round 1, have birch's receipts for rounds 1 and 2, and will send neither again."""
    with Cluster(tmp_path, names, PLAN, prelude=HURRY) as cluster:
        copy = waits_in_round_1(cluster, "birch", "ash")
        cluster.hold("birch", 2)
        cluster.hold("ash", 2)
        if position == "fusing":
            cluster.crash("birch", Step.FUSION_WRITE.points[0])
            shutil.rmtree(copy)
            copy = snapshot(cluster, "birch")
        cluster.start("birch")
        cluster.wait_until("birch", lambda s: (s["round"], s["phase"]) == (2, "train"), "fused round 1")
        cluster.release("ash")
        others = [n for n in names if n != "birch"]
        all_delivered(cluster, others, 2)
        for name in others:
            cluster.wait_until(name, lambda s: (s["round"], s["waiting_for"]) == (2, ["birch"]), "waits for birch")
        set_back(cluster, "birch", copy)
        cluster.release("birch")
        cluster.start("birch")
        require_told_and_mended(cluster, undisturbed[names], *(["ash"] if position == "collecting" else []))


@pytest.mark.sample(3, "set back")
@pytest.mark.parametrize("file", ["there", "gone"])
def test_threat_12_a_node_set_back_past_what_it_acknowledged_gets_it_from_peers_in_the_same_round(
    tmp_path: Path, undisturbed: dict[Any, dict[int, str]], file: str
) -> None:
    """ash has birch's receipt for round 1, in which all still wait for cedar. `gone`: ash has lost the file since."""
    with Cluster(tmp_path, NAMES, PLAN, prelude=HURRY) as cluster:
        copy = waits_in_round_1(cluster, "birch", "ash", "cedar")
        cluster.hold("ash", 2)  # so that no word of its next round tells birch
        cluster.start("birch")
        all_delivered(cluster, ["ash"], 1)
        cluster.wait_until("birch", lambda s: has(s, 1, "ash") and s["waiting_for"] == ["cedar"], "has ash's")
        cluster.wait_until("cedar", lambda s: has(s, 1, "ash"), "cedar too")
        set_back(cluster, "birch", copy)
        if file == "gone":
            cluster.layout("ash").outbox(1).rename(tmp_path / "lost")
        cluster.start("birch")
        cluster.wait_until("birch", lambda s: has(s, 1, "ash") and s["waiting_for"] == ["cedar"], "has it again")
        if file == "gone":
            (tmp_path / "lost").rename(cluster.layout("ash").outbox(1))
        release(cluster, "ash", "cedar")
        require_told_and_mended(cluster, undisturbed[NAMES], "ash")


@pytest.mark.sample(3, "set back")
def test_threat_12_a_node_set_back_behind_the_closing_statement_of_a_peer_gets_it(
    tmp_path: Path, undisturbed: dict[Any, dict[int, str]]
) -> None:
    """Nothing is signed after it: ash has finished, and no next round will ever show it."""
    with Cluster(tmp_path, NAMES[:2], PLAN, prelude=HURRY) as cluster:
        cluster.hold("birch", 3)
        cluster.start("birch")

        def last_round() -> None:
            cluster.wait_until("birch", lambda s: has(s, 3, "ash"), "has ash's: nobody will send it while ash is down")
            release(cluster, "birch")

        cluster.crash("ash", f"{Step.FUSION_WRITE.points[0]}#3", last_round)
        cluster.kill("ash")  # it has ended; it was meant to
        cluster.wait_until("birch", lambda s: last_signed(cluster, "birch") == 4, "waits for ash's statement")
        cluster.stop("birch")
        copy = snapshot(cluster, "birch")
        cluster.start_all()
        cluster.wait_finished()
        all_delivered(cluster, ["ash"], 4)
        set_back(cluster, "birch", copy)
        cluster.start("birch")
        require_told_and_mended(cluster, undisturbed[NAMES[:2]], "ash")


@pytest.mark.sample(3, "set back")
def test_threat_12_a_node_set_back_that_could_ask_nobody_at_its_start_leaves_when_it_can(
    tmp_path: Path, undisturbed: dict[Any, dict[int, str]]
) -> None:
    """Past its own signature of round 2. The others are in round 3 and keep no checkpoint of round 1 any more."""
    with Cluster(tmp_path, NAMES, PLAN, prelude=HURRY) as cluster:
        copy = waits_in_round_1(cluster, "birch", "ash")
        for name in NAMES:
            cluster.hold(name, 3)
        cluster.start("birch")
        for name in NAMES:
            cluster.wait_until(name, lambda s: (s["round"], s["phase"]) == (3, "train"), "in round 3")
        for name in ("ash", "cedar"):
            cluster.kill(name)
        set_back(cluster, "birch", copy)
        process = cluster.start("birch")
        log = cluster.layout("birch").event_log
        cluster.wait_until("birch", lambda s: log.read_text().count("not asked") >= 2, "asks ash in vain")
        cluster._meant_to_end.add("birch")
        for name in ("ash", "cedar"):
            cluster.start(name)
        assert process.wait(WAIT_S) == LOST
        assert "set back" in cluster.output("birch")
        release(cluster, *NAMES)
        cluster.start("birch")
        require_same(cluster, undisturbed[NAMES])


@pytest.mark.sample(3, "set back")
def test_threat_12_a_peer_that_cannot_be_asked_sends_again_what_a_node_that_was_set_back_had_acknowledged(
    tmp_path: Path, undisturbed: dict[Any, dict[int, str]]
) -> None:
    """cedar's inbox is OpenSSH; ash, which has the file too, is down. cedar sees what birch's signed list lacks."""
    with with_a_plain_inbox(tmp_path, HURRY) as cluster:
        copy = waits_in_round_1(cluster, "birch", "cedar")
        for name in NAMES:
            cluster.hold(name, 2)
        cluster.start("birch")
        cluster.wait_until("birch", lambda s: (s["round"], s["phase"]) == (2, "train"), "fused round 1")
        release(cluster, "ash", "cedar")
        all_delivered(cluster, ["cedar"], 2)
        cluster.wait_until("cedar", lambda s: (s["round"], s["waiting_for"]) == (2, ["birch"]), "waits for birch")
        cluster.kill("ash")
        set_back(cluster, "birch", copy)
        cluster.start("birch")
        cluster.wait_until("cedar", lambda s: warned(s, "set back birch"), "says who was set back")
        cluster.wait_until("birch", lambda s: (s["round"], s["phase"]) == (2, "train"), "fused round 1 again")
        cluster.release("birch")
        cluster.start("ash")
        require_same(cluster, undisturbed[NAMES])
        cluster.wait_until("cedar", lambda s: not warned(s, "set back birch"), "the alarm has ended")


# ------------------------------------------------------------------ what a list may bring about

ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
WAITS = replace(START, phase=Phase.COLLECT, round=2, have={ASH: checkpoint(ASH, 2)})  # ash waits for both others


class Fake:
    """Of ash, what `SetBack` needs: rounds that it has signed, and what comes of a list."""

    def __init__(self, state: State = WAITS, signed: tuple[int, ...] = (0, 1, 2), embedded: bool = True) -> None:
        self.looks = 0
        self.applied: list[Event] = []
        journal = SimpleNamespace(
            last_signed=lambda: max(signed), signed=lambda round: (b"", b"") if round in signed else None
        )
        here: Any = SimpleNamespace(me=ASH, others=(BIRCH, CEDAR), embedded=embedded, journal=journal)
        self.machine: Any = SimpleNamespace(state=state, tell=lambda happened: self.applied.append(happened.event))
        self.alarms = Alarms()
        self.set_back = SetBack(here, self.alarms, self.machine, self.look, 10 * FAIR_BYTES_PER_S)

    def look(self) -> None:
        self.looks += 1

    def hears(self, peer: Peer, *manifests: tuple[Peer, int], round: int = 2, recovering: bool = False) -> None:
        listed = [Listed(peer=p, round=r, sha256="5" * 64, document="d" * 64) for p, r in manifests]
        offer = Offer(
            federation="f" * 64, peer=peer, asker=ASH, nonce="0" * 16, recovering=recovering, round=round,
            phase="collect", twice=False, manifests=listed, files=[],
        )  # fmt: skip
        self.set_back.heard(offer)

    @property
    def warnings(self) -> list[str]:
        return [a["code"] for a in self.alarms.listing()]


MINE = ((ASH, 0), (ASH, 1), (ASH, 2))


def test_threat_12_a_peer_that_is_merely_slow_is_neither_asked_for_nor_named() -> None:
    ash = Fake()
    for _ in range(50):
        ash.hears(BIRCH, *MINE, (BIRCH, 1))
        ash.hears(CEDAR, *MINE, (BIRCH, 1), (CEDAR, 1), (CEDAR, 3))
    assert ash.set_back.listed() == frozenset() and not ash.warnings and not ash.looks and not ash.applied


def test_threat_12_what_is_waited_for_and_listed_is_missing_until_it_is_here_or_was_refused() -> None:
    ash = Fake()
    ash.hears(BIRCH, *MINE, (BIRCH, 2), (CEDAR, 2))
    assert ash.set_back.listed() == {BIRCH, CEDAR}
    ash.alarms.sound("refused cedar", "fails a check", "")
    assert ash.set_back.listed() == {BIRCH}, "it would be refused again"
    ash.machine.state = replace(WAITS, have={**WAITS.have, BIRCH: checkpoint(BIRCH, 2)})
    assert ash.set_back.listed() == frozenset()
    ash.machine.state = replace(WAITS, round=3, have={ASH: checkpoint(ASH, 3)})
    assert ash.set_back.listed() == frozenset(), "of another round"


def test_what_may_be_on_its_way_to_another_servers_inbox_is_given_the_time_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(set_back_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ash = Fake(embedded=False)
    ash.hears(BIRCH, *MINE, (BIRCH, 2))
    now[0] += 9.9
    assert ash.set_back.listed() == frozenset()
    now[0] += 0.2  # ten times what a fair line carries in a second
    assert ash.set_back.listed() == {BIRCH}


def test_threat_12_a_list_with_a_later_signature_of_ours_only_makes_this_node_ask() -> None:
    """What it does then, and that it takes a signature of its own to end it: `BeforeSigning.check`, test_asking.py."""
    ash = Fake()
    ash.hears(BIRCH, *MINE, (ASH, 3))
    assert ash.looks == 1 and not ash.applied and not ash.warnings


def test_threat_12_who_lost_what_it_acknowledged_is_named_once_it_says_so_twice_and_no_longer_than_it_does() -> None:
    ash = Fake(replace(WAITS, owed=frozenset({(2, BIRCH)})))
    for _ in range(3):
        ash.hears(BIRCH, (ASH, 0), round=1)  # lacks round 1; round 2 is still on its way
        ash.hears(CEDAR, round=0, recovering=True)
    (alarm,) = ash.alarms.listing()
    assert alarm["code"] == "set back birch" and "has this node's round 1, its signed list" in alarm["text"]
    assert not ash.applied, "it asks for it"
    ash.hears(BIRCH, (ASH, 0), (ASH, 1), round=1)
    assert not ash.warnings
    ash.hears(BIRCH, (ASH, 0), round=1)
    assert not ash.warnings, "one list may have crossed a delivery"


def test_threat_03_a_peer_that_says_again_and_again_that_it_has_lost_a_checkpoint_gets_it_three_times_more() -> None:
    ash = Fake(embedded=False)
    for _ in range(50):
        ash.hears(BIRCH, (ASH, 0), round=1)
    assert sorted(set(ash.applied), key=lambda f: f.round) == [Forgotten(BIRCH, 1), Forgotten(BIRCH, 2)]
    assert len(ash.applied) == 2 * AGAIN_MAX
    ash.hears(BIRCH, round=7)
    ash.hears(BIRCH, round=7)
    assert len(ash.applied) == 2 * AGAIN_MAX, "what this node has not signed, nobody can have lost"
