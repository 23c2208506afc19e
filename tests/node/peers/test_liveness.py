"""A dead hospital does not look alive, a paused one not busy, and none with another federation file a slow one.

Two nodes of which there is what asks and what answers, over real inboxes; time is the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from boxes import on_loop
from federations import ASH, BIRCH, CEDAR, Members, make_federation
from hostile import until
from parts import Parts
from ports import free_ports

from hsl_node.errors import PeerDataError
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import LIFE_NAMESPACE
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan
from hsl_node.host.hints import addressed
from hsl_node.node.alarms import QUIET_S
from hsl_node.node.peers import liveness as module
from hsl_node.node.peers.liveness import Liveness
from hsl_node.node.peers.serve import Serve
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.life import CLOCK_LIMIT_S, Life, Sign, asking_path, find_sign, judged, parse_life, wrong_clocks
from hsl_node.sync.offer import parse_path
from hsl_node.sync.wire.transport import OperationFailed

PLAN = Plan(method="fedavg", silence_alarm_minutes=60)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Node:
    """One node's inbox and what asks the others; `start` to be asked, `ask` to ask all whose turn it is."""

    def __init__(self, members: Members, me: Peer, port: int, folder: Path, clock: Clock) -> None:
        self.members, self.me, self.port, self.folder = members, me, port, folder
        self.parts = Parts(members, folder / me, me)
        self.paused_s: float | None = None
        self.needs = True
        self.life = Liveness(
            *self.parts.all, lambda: self.paused_s, lambda: (), lambda peer: self.needs, clock=clock
        )  # fmt: skip
        self.server: InboxServer | None = None

    async def start(self) -> None:
        here, keys, _, _ = self.parts.all
        admission = Admission(
            federation=self.members.federation, me=self.me, data_bytes=1000, on_commit=lambda peer: None,
            on_connect=self.life.heard, on_other_federation=self.life.federation_of,
            offer=Serve(here, keys, lambda: None, self.life.exchanged).open,
        )  # fmt: skip
        self.server = InboxServer(admission, identity=keys.identity, homes=self.folder / f"{self.me}-homes")
        await self.server.start("127.0.0.1", self.port)

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop()
            self.server = None

    async def ask(self) -> list[Peer]:
        due = self.life._due()
        for peer in due:
            await self.life._ask(peer)
        return due

    def says(self, peer: Peer) -> str:
        return self.life.of(peer).state

    def alarm(self, code: str) -> str:
        self.life._tell_clocks()
        for peer in self.parts.here.others:
            self.life._tell(peer)
        return next((a["text"] for a in self.parts.alarms.listing() if a["code"] == code), "")


@contextlib.asynccontextmanager
async def nodes(folder: Path, count: int = 2, **others: Federation) -> AsyncIterator[tuple[Clock, dict[Peer, Node]]]:
    """All started. `others`: whose federation file is another one."""
    ports = free_ports(count)
    names = make_federation(count).peers
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)}
    members = make_federation(count, plan=PLAN, addresses=addresses)
    clock = Clock()
    made = {}
    for name, port in zip(names, ports, strict=True):
        its = members
        if name in others:
            card = {c.name: c for c in members.federation.peer}
            peers = tuple(card[c.name] for c in others[name].peer)
            its = replace(members, federation=others[name].model_copy(update={"peer": peers}))
        made[name] = Node(its, name, port, folder, clock)
        await made[name].start()
    try:
        yield clock, made
    finally:
        for node in made.values():
            await node.stop()
            node.parts.close()


# ------------------------------------------------------------------ alive, down, paused, unknown


@on_loop
async def test_one_question_tells_both_and_whoever_was_asked_need_not_ask(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (clock, node):
        assert (node[ASH].says(BIRCH), node[BIRCH].says(ASH)) == ("unknown", "unknown")
        assert await node[ASH].ask() == [BIRCH]
        assert (node[ASH].says(BIRCH), node[BIRCH].says(ASH)) == ("alive", "alive")
        assert await node[BIRCH].ask() == []
        clock.now += node[BIRCH].life.every_s * 1.3
        assert await node[BIRCH].ask() == [ASH]
        assert await node[ASH].ask() == []


@on_loop
async def test_a_peer_that_stopped_is_down_soon_and_an_alarm_after_the_plans_time_and_neither_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with nodes(tmp_path) as (clock, node):
        await node[ASH].ask()
        await node[BIRCH].stop()
        for _ in range(4):
            clock.now += 60
            await node[ASH].ask()
        life = node[ASH].life.of(BIRCH)
        assert (life.state, node[ASH].alarm("silent birch")) == ("down", "")
        assert life.since is not None and life.since == pytest.approx(life.heard, abs=0.1)

        clock.now += 56 * 60
        assert node[ASH].alarm("silent birch") == "no sign of life of birch for 60 min; the plan allows 60 min"
        await node[BIRCH].start()
        clock.now += 60
        await node[ASH].ask()
        assert (node[ASH].says(BIRCH), node[ASH].alarm("silent birch")) == ("alive", "")


@on_loop
async def test_a_peer_that_never_came_is_down_and_an_alarm_too(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (clock, node):
        await node[BIRCH].stop()
        await node[ASH].ask()
        clock.now += 3600
        assert node[ASH].says(BIRCH) == "down"
        assert node[ASH].alarm("silent birch").startswith("no sign of life of birch since this node started")


@on_loop
async def test_a_peer_that_has_finished_and_stopped_is_no_alarm_for_ever(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (clock, node):
        await node[ASH].ask()
        await node[BIRCH].stop()
        clock.now += 7200
        assert node[ASH].alarm("silent birch")
        node[ASH].needs = False
        assert (node[ASH].says(BIRCH), node[ASH].alarm("silent birch")) == ("down", "")


@on_loop
async def test_a_paused_peer_is_seen_at_once_by_who_is_asked_and_by_who_asks_and_an_alarm_after_the_plans_time(
    tmp_path: Path,
) -> None:
    async with nodes(tmp_path, 3) as (clock, node):
        for each in node.values():
            await each.ask()
        node[BIRCH].paused_s = 5.0
        node[BIRCH].life.tell_all()
        assert await node[BIRCH].ask() == [ASH, CEDAR]
        assert [node[p].says(BIRCH) for p in (ASH, CEDAR)] == ["paused", "paused"]
        since = node[ASH].life.of(BIRCH).since
        assert since is not None and since == pytest.approx(module.time.time() - 5, abs=2)
        assert node[ASH].alarm("peer paused birch") == ""

        clock.now += 3600
        node[BIRCH].paused_s = 3605.0
        await node[CEDAR].ask()
        assert node[CEDAR].alarm("peer paused birch") == "birch is paused by its operator for 60 min; all wait for it"
        (fix,) = (a["fix"] for a in node[CEDAR].parts.alarms.listing() if a["code"] == "peer paused birch")
        assert addressed(fix, tmp_path) == "call birch; over there: hsl-node resume"  # not with a path of this machine
        assert not node[CEDAR].alarm("silent birch")
        node[BIRCH].paused_s = None
        node[BIRCH].life.tell_all()
        await node[BIRCH].ask()
        assert (node[CEDAR].says(BIRCH), node[CEDAR].alarm("peer paused birch")) == ("alive", "")


@on_loop
async def test_an_earlier_version_that_knows_no_sign_is_alive_while_it_answers_and_is_not_bothered_again_for_an_hour(
    tmp_path: Path,
) -> None:
    async with nodes(tmp_path) as (clock, node):
        asked: list[str] = []

        def offer(peer: Peer, name: str, twice: bool) -> int:
            asked.append(name)
            raise PeerDataError("not a name below offer/", code="name")

        server: Any = node[BIRCH].server
        server.admission.offer = offer
        for _ in range(5):
            await node[ASH].ask()
            assert node[ASH].says(BIRCH) == "alive" and node[ASH].life.of(BIRCH).clock_s is None
            clock.now += 80
        assert len(asked) == 1
        await node[BIRCH].stop()
        clock.now += 300
        await node[ASH].ask()
        assert node[ASH].says(BIRCH) == "down"


def test_of_another_programs_inbox_without_a_sign_nothing_is_known_and_with_an_old_one_it_is_down() -> None:
    assert judged(None, paused=False, gives_signs=False, patience_s=150) == "unknown"
    assert judged(200, paused=False, gives_signs=True, patience_s=150) == "down"
    assert judged(200, paused=True, gives_signs=True, patience_s=150) == "down", "it was paused when it went"
    assert judged(20, paused=True, gives_signs=True, patience_s=150) == "paused"


def test_a_login_is_a_sign_of_life_and_so_is_a_connection_that_carries_our_checkpoint(tmp_path: Path) -> None:
    clock = Clock()
    parts = Parts(make_federation(2, plan=PLAN), tmp_path, ASH)
    carrying: list[Peer] = []
    life = Liveness(*parts.all, lambda: None, lambda: carrying, lambda peer: True, clock=clock)
    clock.now += 7200
    assert life.of(BIRCH).state == "down"
    carrying.append(BIRCH)
    assert life.of(BIRCH).state == "alive"
    carrying.clear()
    clock.now += 7200
    assert life.of(BIRCH).state == "down"
    life.heard(BIRCH)
    assert life.of(BIRCH).state == "alive"
    parts.close()


@pytest.mark.parametrize(("peers", "seconds"), [(2, 60.0), (8, 60.0), (64, 315.0)])
def test_a_large_federation_asks_no_more_often_in_all(peers: int, seconds: float) -> None:
    """64 nodes: 63 pairs of each in 315 s and more, shared by two: a login in 10 s."""
    from types import SimpleNamespace

    others = tuple(Peer(f"p{n}") for n in range(peers - 1))
    here: Any = SimpleNamespace(others=others, federation=SimpleNamespace(plan=PLAN))
    life = Liveness(here, *[None] * 3, *[lambda *_: None] * 3)  # type: ignore[arg-type]
    assert life.every_s == seconds


# ------------------------------------------------------------------ another federation file


@on_loop
async def test_a_peer_with_another_federation_file_is_named_at_both_sides_with_both_hashes(tmp_path: Path) -> None:
    other = make_federation(2, plan=PLAN.model_copy(update={"rounds": 61})).federation
    async with nodes(tmp_path, birch=other) as (_, node):
        ours, theirs = (node[p].members.federation.fed8 for p in (ASH, BIRCH))
        assert ours != theirs
        await node[ASH].ask()
        assert node[ASH].alarm("federation birch") == (
            f"birch joined another federation file ({theirs}, ours is {ours}): nothing of it is taken here"
        )
        assert (
            node[BIRCH]
            .alarm("federation ash")
            .startswith(f"ash joined another federation file ({ours}, ours is {theirs})")
        )
        assert (node[ASH].says(BIRCH), node[ASH].life.of(BIRCH).federation) == ("alive", theirs)


def test_a_peer_that_joins_our_file_again_is_sent_to_at_once(tmp_path: Path) -> None:
    parts = Parts(make_federation(2, plan=PLAN), tmp_path, ASH)
    ours = parts.here.federation.fed8
    parts.liveness.federation_of(BIRCH, "5adf52bc")
    assert "federation birch" in parts.alarms and not parts.liveness.on_our_file[BIRCH].is_set()
    parts.liveness.said(BIRCH, Sign(ours, 1))
    assert "federation birch" not in parts.alarms and parts.liveness.on_our_file[BIRCH].is_set()
    parts.close()


# ------------------------------------------------------------------ clocks


@pytest.mark.parametrize(
    ("ahead", "mine", "others"),
    [
        ({BIRCH: 59.0}, 0.0, {}),
        ({BIRCH: 300.0}, 0.0, {BIRCH: 300.0}),
        ({BIRCH: 300.0, CEDAR: 1.0}, 0.0, {BIRCH: 300.0}),
        ({BIRCH: 300.0, CEDAR: 300.0}, -300.0, {}),
        ({BIRCH: -300.0, CEDAR: -299.0, ASH: 5.0}, 0.0, {BIRCH: -300.0, CEDAR: -299.0}),
        ({BIRCH: 300.0, CEDAR: 301.0, ASH: 299.0}, -299.0, {}),
        ({BIRCH: 300.0, CEDAR: 300.0, ASH: -300.0}, 0.0, {BIRCH: 300.0, CEDAR: 300.0, ASH: -300.0}),
    ],
)
def test_the_clock_that_most_others_contradict_is_the_wrong_one(
    ahead: dict[Peer, float], mine: float, others: dict[Peer, float]
) -> None:
    assert wrong_clocks(ahead) == (mine, others)


@on_loop
async def test_a_wrong_clock_is_named_here_or_there_and_a_clock_that_is_set_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(tmp_path, 3) as (_, node):
        for each in node.values():
            await each.ask()
        assert not node[ASH].alarm("clock") and abs(node[ASH].life.of(BIRCH).clock_s or 99) < CLOCK_LIMIT_S
        real = module.time.time
        monkeypatch.setattr(module.time, "time", lambda: real() - 7290)  # this machine's clock is set back
        assert node[ASH].alarm("clock") == (
            "the clock of this machine is 2 h 01 min behind most of the hospitals' (2 asked)"
        )
        monkeypatch.setattr(module.time, "time", real)
        assert node[ASH].alarm("clock") == ""
        node[ASH].life.said(BIRCH, Sign(node[ASH].members.federation.fed8, int(real()) + 330))
        assert node[ASH].alarm("clock birch") == "the clock of birch is 5 min ahead of most of the others'"


# ------------------------------------------------------------------ hostile


@pytest.mark.parametrize(
    "name",
    ["5adf52bc-1764461000.life", "5adf52bc-1764461000-paused-600.life", "00000000-0-paused-0.life", "5adf52bc.life"],
)
def test_a_sign_is_a_name_below_offer_and_is_read_back_as_it_was(name: str) -> None:
    sign = find_sign(name)
    assert sign is not None and sign.name() == name and parse_path(asking_path(sign).encode()) == name


@pytest.mark.parametrize(
    "name",
    ["5adf52bc-.life", "5adf52b.life", "5adf52bc-paused-1.life",
     "5adf52b-1.life", "5adf52bc-1-paused-.life", "5adf52bc-123456789012.life", "5adf52bc--1.life",
     "5adf52bc-1-paused-1234567890.life", "5ADF52BC-1.life", "5adf52bc-1.life\n", "5adf52bc-\u0661.life"],
)  # fmt: skip
def test_threat_20_what_is_no_sign_says_nothing(name: str) -> None:
    assert find_sign(name) is None


def test_threat_20_a_peer_speaks_for_itself_alone(tmp_path: Path) -> None:
    members = make_federation(3, plan=PLAN)
    digest, key = members.federation.digest, members.identities[BIRCH]
    life = Life(federation=digest, peer=BIRCH, at=5, paused_s=None)
    document = key.sign(life.content(), LIFE_NAMESPACE)
    assert parse_life(document, BIRCH, [key.public]).at == 5
    for peer, keys, shown in ((CEDAR, [key.public], document), (BIRCH, [members.identities[CEDAR].public], document)):
        with pytest.raises(PeerDataError):
            parse_life(shown, peer, keys)
    parts = Parts(members, tmp_path, ASH)
    parts.liveness.said(BIRCH, Sign("5adf52bc", 5, 10**9 - 1))
    told = parts.liveness.of(CEDAR)
    assert (told.state, told.federation, told.clock_s) == ("unknown", None, None)
    assert not [a for a in parts.alarms.listing() if "cedar" in a["code"]]
    assert parts.liveness.of(BIRCH).since is not None, "31 years are shown, not a traceback"
    parts.close()


def test_threat_20_a_peer_that_changes_its_word_without_end_is_one_alarm_that_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts(make_federation(2, plan=PLAN), tmp_path, ASH)
    ours = parts.here.federation.fed8
    for number in range(300):
        parts.liveness.said(BIRCH, Sign(f"{number:08x}", number * 1000, number))
        parts.liveness.said(BIRCH, Sign(ours, int(module.time.time())))
    assert len(caplog.records) < 60 and QUIET_S
    assert {a["code"] for a in parts.alarms.listing()} == {"federation birch", "clock birch"}
    parts.close()


# ------------------------------------------------------------------ another program's inbox


@on_loop
async def test_a_node_behind_another_programs_inbox_lays_its_sign_where_the_others_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server there runs on while the node is down: only a newer sign is one."""
    parts = Parts(make_federation(2, plan=PLAN), tmp_path, BIRCH)
    homes = tmp_path / "homes"
    (homes / ASH / "receipts").mkdir(parents=True)
    clock, here = Clock(), parts.here
    monkeypatch.setattr(type(here), "embedded", False)
    monkeypatch.setattr(type(here), "homes", homes)
    laying = Liveness(*parts.all, lambda: None, lambda: (), lambda peer: True, clock=clock)
    laying._lay()
    file = homes / ASH / "receipts/hsl1_birch.life"
    assert file.stat().st_mode & 0o777 == 0o644

    class Link:
        async def read(self, path: str, offset: int, count: int) -> bytes:
            assert path == "receipts/hsl1_birch.life"
            if not file.exists():
                raise OperationFailed("no such file")
            return file.read_bytes()

    asker = Parts(make_federation(2, plan=PLAN), tmp_path / "asker", ASH)
    life = Liveness(*asker.all, lambda: None, lambda: (), lambda peer: True, clock=clock)
    monkeypatch.setattr(life, "_foreign", lambda peer: True)
    link: Any = Link()
    await life.greet(link, BIRCH)
    assert life.of(BIRCH).state == "alive"
    clock.now += 600
    await life.greet(link, BIRCH)  # the same sign: the node may be gone
    assert life.of(BIRCH).state == "down"
    monkeypatch.setattr(module.time, "time", lambda real=module.time.time: real() + 60)
    laying._lay()
    await life.greet(link, BIRCH)
    assert life.of(BIRCH).state == "alive"
    file.unlink()
    clock.now += 3600
    await life.greet(link, BIRCH)  # it gave signs once: a folder that was emptied is no excuse
    assert life.of(BIRCH).state == "down"
    life._tell(BIRCH)
    assert "silent birch" in asker.alarms
    parts.close()
    asker.close()


@on_loop
async def test_whoever_watches_asks_by_itself_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (_, node):
        task = asyncio.create_task(node[ASH].life.watch())
        is_alive: Callable[[], bool] = lambda: node[BIRCH].says(ASH) == "alive"  # noqa: E731
        await until(is_alive)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("sign of life")]


def test_a_command_that_asks_says_which_file_it_joined_and_nothing_of_the_life_of_its_node(tmp_path: Path) -> None:
    parts = Parts(make_federation(2, plan=PLAN), tmp_path, ASH)
    parts.liveness.said(BIRCH, Sign("5adf52bc", None))
    told = parts.liveness.of(BIRCH)
    assert (told.state, told.heard, told.clock_s) == ("unknown", None, None)
    assert "federation birch" in parts.alarms
    parts.close()
