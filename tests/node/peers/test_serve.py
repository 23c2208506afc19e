"""What a node keeps for a peer that lost its state: who may read what of it, and how much. birch is hostile."""

from __future__ import annotations

import asyncio
import cProfile
import hashlib
import os
import pstats
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import pytest
from asyncssh.constants import FXF_APPEND, FXF_CREAT, FXF_EXCL, FXF_READ, FXF_TRUNC, FXF_WRITE
from asyncssh.sftp import SFTPError, SFTPNoSuchFile, SFTPPermissionDenied
from boxes import ASH, BIRCH, CEDAR, DATA, DATA_BYTES, Box, inbox, on_loop, tree
from cluster import Cluster
from federations import make_federation
from memory_file import in_memory
from two_faces import begin, signed

from hsl_node.errors import PeerDataError
from hsl_node.federation import identity
from hsl_node.federation.names import Digest, FileName, Kind, Peer
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.node.peers.serve import Serve
from hsl_node.sync.ask import ask
from hsl_node.sync.clones import ALONE_S, believed
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.offer import Offer, file_path, parse_offer, state_path
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.wire.connect import connect

NONCE = "0123456789abcdef"
SHA = hashlib.sha256(DATA).hexdigest()


def offering(box: Box, folder: Path) -> list[tuple[Peer, str, bool]]:
    """Let ash offer DATA under its sha256 and "list" for every nonce; gives what it is asked for."""
    asked: list[tuple[Peer, str, bool]] = []
    (folder / "kept").write_bytes(DATA)
    (folder / "list").write_bytes(b"list")

    def offer(peer: Peer, name: str, twice: bool) -> int:
        asked.append((peer, name, twice))
        if name not in (SHA, NONCE):
            raise FileNotFoundError(2, "not on the list")
        return os.open(folder / ("kept" if name == SHA else "list"), os.O_RDONLY)

    box.admission.offer = offer
    return asked


@on_loop
async def test_a_peer_reads_what_is_offered_to_it_and_the_offerer_knows_who_asks(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        asked = offering(box, tmp_path)
        async with client.open(state_path(NONCE), "rb") as file:
            assert await file.read() == b"list"
        async with client.open(file_path(SHA), "rb") as file:
            assert await file.read() == DATA
        assert asked == [(BIRCH, NONCE, False), (BIRCH, SHA, False)]


@on_loop
async def test_threat_12_nothing_below_offer_can_be_written_listed_renamed_or_removed(tmp_path: Path) -> None:
    async with inbox(tmp_path, log_lines_per_minute=0) as box, box.sftp() as client:
        asked = offering(box, tmp_path)
        before = tree(tmp_path)
        path = file_path(SHA)
        for flags in (FXF_WRITE, FXF_READ | FXF_WRITE, FXF_WRITE | FXF_CREAT | FXF_EXCL, FXF_READ | FXF_APPEND,
                      FXF_READ | FXF_TRUNC, FXF_READ | FXF_CREAT):  # fmt: skip
            with pytest.raises(SFTPPermissionDenied):
                await client.open(path, flags)
        part = f"parts/{box.name().as_part()}"
        for attack in (client.remove(path), client.rename(path, part), client.rename(part, path), client.stat(path),
                       client.listdir("offer"), client.chmod(path, 0o666), client.mkdir("offer"),
                       client.symlink("/etc/passwd", path), client.truncate(path, 1)):  # fmt: skip
            with pytest.raises(SFTPError):
                await attack
        assert asked == [] and tree(tmp_path) == before
        await box.honest()


@on_loop
async def test_threat_01_no_name_below_offer_leads_elsewhere(tmp_path: Path) -> None:
    async with inbox(tmp_path, log_lines_per_minute=0) as box, box.sftp() as client:
        asked = offering(box, tmp_path)
        for name in ("../secret", "", ".", "..", "x", SHA.upper(), SHA[:-1], SHA + "0", SHA + "/", "/" + SHA,
                     SHA + "\n", NONCE, NONCE + ".state.", NONCE + ".state/..", "cedar/" + SHA, str(box.name()),
                     SHA + "\0", "\u0663" * 64, "keys/node_ed25519", "../keys/node_ed25519"):  # fmt: skip
            with pytest.raises(SFTPPermissionDenied):
                await client.open(f"offer/{name}", FXF_READ)
        with pytest.raises(SFTPNoSuchFile):
            await client.open(file_path("0" * 64), FXF_READ)
        assert asked == [(BIRCH, "0" * 64, False)]


@on_loop
async def test_lists_bytes_and_handles_are_limited_for_each_peer_and_others_are_served(tmp_path: Path) -> None:
    limits = {"offers_per_minute": 3, "offer_files_per_hour": 2, "handles_per_connection": 4}
    async with inbox(tmp_path, log_lines_per_minute=0, **limits) as box, box.sftp() as client:
        offering(box, tmp_path)
        for _ in range(3):
            await (await client.open(state_path(NONCE), FXF_READ)).close()
        with pytest.raises(SFTPPermissionDenied, match="too often"):
            await client.open(state_path(NONCE), FXF_READ)
        read = 0
        with pytest.raises(SFTPPermissionDenied, match="more than a recovery needs"):
            while True:
                async with client.open(file_path(SHA), "rb") as file:
                    read += len(await file.read(2**18, 0))
        assert DATA_BYTES < read <= 2 * (DATA_BYTES + 2**20)
        files = [await client.open(file_path(SHA), FXF_READ) for _ in range(4)]
        with pytest.raises(SFTPPermissionDenied, match="too many open files"):
            await client.open(file_path(SHA), FXF_READ)
        for file in files:
            await file.close()
        async with box.sftp(CEDAR) as other, other.open(state_path(NONCE), "rb") as file:
            assert await file.read() == b"list"
        assert box.rejected("rate") >= 2


@on_loop
async def test_threat_12_a_process_that_comes_back_after_another_is_told_to_both_and_to_us(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box:
        asked = offering(box, tmp_path)
        told: list[tuple[Peer, bool]] = []
        box.admission.on_twice = lambda peer, twice: told.append((peer, twice))

        async def come(run: str) -> None:
            version = {"client_version": f"hsl1_{run}"} if run else {}
            async with box.connect(**version) as connection, connection.start_sftp_client() as client:
                await (await client.open(state_path(NONCE), FXF_READ)).close()

        one, two, new = "1" * 16, "2" * 16, "3" * 16
        for run in (one, two, one, two, "", new):
            await come(run)
        assert [twice for _, twice in told] == [False, False, True, True, False]
        assert [twice for _, _, twice in asked] == [False, False, True, True, False, False]


@on_loop
async def test_an_answer_counts_only_for_its_question_its_asker_and_with_its_peers_key(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box:
        federation, ash = box.members.federation, box.members.identities[ASH]
        offer = Offer(
            federation=federation.digest, peer=ASH, asker=BIRCH, nonce=NONCE, recovering=False, round=1, phase="train",
            twice=False, manifests=[], files=[],
        )  # fmt: skip
        document = ash.sign(offer.content(), identity.OFFER_NAMESPACE)
        right = {"peer": ASH, "asker": BIRCH, "nonce": NONCE, "keys": [federation.get(ASH).key]}
        assert parse_offer(document, federation, **right) == offer  # type: ignore[arg-type]
        for other in ({"nonce": "f" * 16}, {"asker": CEDAR}, {"peer": CEDAR}):
            with pytest.raises(PeerDataError):
                parse_offer(document, federation, **{**right, **other})  # type: ignore[arg-type]
        with pytest.raises(PeerDataError):
            forged = box.members.identities[CEDAR].sign(offer.content(), identity.OFFER_NAMESPACE)
            parse_offer(forged, federation, **right)  # type: ignore[arg-type]
        with pytest.raises(PeerDataError):
            as_manifest = ash.sign(offer.content(), identity.MANIFEST_NAMESPACE)
            parse_offer(as_manifest, federation, **right)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("saying", "denying", "since_s", "held"),
    [
        (0, 2, 0, False),
        (1, 1, 0, True),
        (1, 1, ALONE_S - 1, True),
        (1, 1, ALONE_S, False),  # a clone would have met the other one too
        (1, 62, ALONE_S, False),
        (1, 0, 10 * ALONE_S, True),  # two hospitals, or nobody else answers: nothing speaks against it
        (2, 1, 10 * ALONE_S, True),
        (2, 61, 10 * ALONE_S, True),
    ],
)
def test_threat_12_one_peers_word_of_a_clone_is_believed_for_a_while_and_that_of_two_without_end(
    saying: int, denying: int, since_s: float, held: bool
) -> None:
    assert believed(saying, denying, since_s) is held


LIAR_PLAN = Plan(method="fedavg", fusion="mean", rounds=5, epochs_per_round=1, plateau_rounds=100)
IMPATIENT = """
import hsl_node.node.before_signing as a, hsl_node.sync.clones as r, hsl_node.sync.wire.transport as p
a.RETRY, a.ALONE_S, r.ALONE_S, a.BEFORE_SIGNING = a.Pace(0.1, 0.1), 2, 2, p.Patience()
"""


@pytest.mark.parametrize("honest", [("ash", "birch"), ("ash",)])
def test_threat_12_a_peer_that_speaks_of_a_clone_without_end_is_named_and_stops_only_whom_nobody_contradicts(
    tmp_path: Path, honest: tuple[str, ...]
) -> None:
    """cedar delivers as it should, and says to whoever asks that two processes have its key."""
    asyncio.run(asyncio.wait_for(slandered(tmp_path, honest), 200))


async def slandered(tmp_path: Path, honest: tuple[str, ...]) -> None:
    trainer = ["--bytes", "60000", "--tensors", "3"]
    with Cluster(tmp_path, (*honest, "cedar"), LIAR_PLAN, trainer=trainer, prelude=IMPATIENT) as cluster:
        liar = identity.load(cluster.layout("cedar").key)

        def offer(asker: Peer, name: str, twice: bool) -> int:
            content = Offer(
                federation=cluster.federation.digest, peer="cedar", asker=asker, nonce=name, recovering=False,
                round=1, phase="train", twice=True, manifests=[], files=[],
            ).content()  # fmt: skip
            return in_memory(liar.sign(content, identity.OFFER_NAMESPACE))

        admission = Admission(
            federation=cluster.federation, me=CEDAR,
            data_bytes=200_000, on_commit=lambda peer: None, on_connect=lambda peer: None, offer=offer,
        )  # fmt: skip
        server = InboxServer(admission, identity=liar, homes=tmp_path / "homes")
        await server.start("127.0.0.1", cluster.ports["cedar"])
        try:
            await asyncio.to_thread(begin, cluster, "cedar", honest)
            if len(honest) == 1:
                status = await asyncio.to_thread(
                    cluster.wait_until, "ash", lambda s: s["state"] == "waiting", "waits, having trained"
                )
                assert status["waiting_for"] == ["cedar"]
                assert "says cedar" in slander(status)
                return
            for name in honest:  # nothing keeps round 1 from being signed
                genuine = await asyncio.to_thread(signed, cluster, name, 1)
                assert genuine["round"] == 1
                await asyncio.to_thread(
                    cluster.wait_until,
                    name,
                    lambda s: "says cedar" in slander(s) and "Not believed" in slander(s),
                    "named",
                )
        finally:
            await server.stop()


def slander(status: dict[str, Any]) -> str:
    return next((w["text"] for w in status["warnings"] if w["code"] == "twice"), "")


def test_threat_04_a_list_costs_no_more_after_ten_thousand_rounds(tmp_path: Path) -> None:
    """Counted in calls: files looked at and rows read are those that are kept or listed."""
    calls = [calls_of_a_list(tmp_path / str(rounds), rounds) for rounds in (400, 2000)]
    assert calls[1] < 1.05 * calls[0]


def calls_of_a_list(folder: Path, rounds: int) -> int:
    """Function calls that one list takes, after so many rounds of three peers."""
    members = make_federation(3)
    layout = Layout(folder)
    layout.make()
    with Journal.create(layout.journal) as journal:
        with journal.transaction():
            for round in range(rounds):
                journal.record_fused(round, Digest(f"{round:064x}"))
                for peer in members.peers:
                    digest = Digest(hashlib.sha256(f"{peer} {round}".encode()).hexdigest())
                    journal.record_manifest(round, peer, digest, digest.encode(), {})
        for kept in (rounds - 2, rounds - 1):
            layout.fused(kept).write_bytes(b"model")
        state: Any = SimpleNamespace(round=rounds - 1, phase="train")
        here: Any = SimpleNamespace(
            journal=journal, me=ASH, layout=layout, federation=members.federation, homes=layout.homes
        )
        keys: Any = SimpleNamespace(identity=members.identities[ASH])
        offers = Serve(here, keys, lambda: state)
        os.close(offers.open(BIRCH, NONCE, False))  # what is imported late
        profile = cProfile.Profile()
        descriptor = profile.runcall(offers.open, BIRCH, NONCE, False)
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            keys = [members.federation.get(ASH).key]
            offer = parse_offer(file.read(), members.federation, peer=ASH, asker=BIRCH, nonce=NONCE, keys=keys)
        assert {f"{kept:064x}" for kept in (rounds - 2, rounds - 1)} <= set(offer.files)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_threat_12_a_real_list_names_what_every_peer_was_sent_and_nothing_of_another_peers_home(tmp_path: Path) -> None:
    """And a manifest of the asker that nobody has looked at yet."""
    plan = Plan(method="fedavg", fusion="mean", rounds=3, epochs_per_round=2, plateau_rounds=100)
    with Cluster(tmp_path, ("ash", "birch", "cedar"), plan) as cluster:
        cluster.hold("cedar", 2)  # nobody gets beyond round 2
        cluster.start_all()
        cluster.wait_until("ash", lambda s: s["round"] == 2 and s["waiting_for"] == ["cedar"], "waiting for cedar")
        cluster.kill("cedar")
        cluster.stop("birch")
        state = cluster.layout("ash").state
        fed8 = cluster.federation.fed8
        unseen = {
            p: FileName(fed8, 3, Peer(p), Digest(hashlib.sha256(p.encode()).hexdigest()), Kind.MANIFEST)
            for p in ("birch", "cedar")
        }
        for peer, name in unseen.items():
            (state / "quarantine" / "homes" / peer / "inbox" / str(name)).write_text(f"delivered by {peer}")
            data = state / "quarantine" / "homes" / peer / "inbox" / str(name.of(Kind.DATA))
            data.write_text(f"private data of {peer}")

        @on_loop
        async def look() -> None:
            me = identity.load(cluster.layout("birch").key)
            async with connect(cluster.federation.get("ash"), BIRCH, me) as link:
                keys = [cluster.federation.get(ASH).key]
                offer, _ = await ask(link, cluster.federation, peer=ASH, me=BIRCH, keys=keys)
                listed = {(m.peer, m.round) for m in offer.manifests}
                assert {("birch", r) for r in (0, 1, 2, 3)} <= listed
                assert {("ash", r) for r in (0, 1, 2)} <= listed
                assert ("cedar", 3) not in listed
                kept = {hashlib.sha256(f.read_bytes()).hexdigest() for f in state.rglob("*.safetensors")}
                assert unseen["birch"].sha256 in offer.files and unseen["cedar"].sha256 not in offer.files
                assert set(offer.files) - {unseen["birch"].sha256} <= kept
                for name in (state / "keys" / "node_ed25519", state / "journal.sqlite3", state / "federation.toml"):
                    digest = hashlib.sha256(name.read_bytes()).hexdigest()
                    with pytest.raises(asyncssh.SFTPError) as refused:
                        await link.sftp.open(file_path(digest), FXF_READ)  # type: ignore[attr-defined]
                    assert isinstance(refused.value, SFTPNoSuchFile)
                mine = hashlib.sha256((state / "inbox" / "r000001" / "birch.safetensors").read_bytes()).hexdigest()
                assert len(await link.read(file_path(mine), 0, 1000)) == 1000

        look()
