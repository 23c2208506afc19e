"""`recover --without PEER`: a peer that cannot be asked, since OpenSSH is its inbox, and what may be signed then.

Real daemons; cedar's inbox is a real sshd, which can offer nothing. See test_recovery.py for peers that can be asked.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster import WAIT_S, Cluster, peer, warned
from command_line import code, run
from every_phase import has
from lost_disk import LOST, NAMES, PLAN, lose_disk, require_same, signed
from plain_inbox import HURRY, release, with_a_plain_inbox
from ports import free_ports
from proxy import Proxy

from hsl_node.admin import recover, rotate
from hsl_node.errors import Equivocation, FederationMismatch, PeerDataError, UsageError
from hsl_node.federation import identity
from hsl_node.federation.identity import MANIFEST_NAMESPACE
from hsl_node.federation.names import Peer
from hsl_node.federation.strings import fingerprint
from hsl_node.node.heal import mark
from hsl_node.sync import evidence
from hsl_node.sync.store.journal import Journal

OTHERWISE = ["--times", "1.5"]  # a trainer that comes to other bytes than before


@pytest.mark.sample(3, "a peer that cannot be asked")
def test_threat_12_a_lost_disk_beside_a_peer_that_cannot_be_asked_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """It waits for cedar's answer, and says why none will come; told to do without, it takes all from ash."""
    with with_a_plain_inbox(tmp_path) as cluster:
        held_in_round_2(cluster)
        release(cluster, "birch", "cedar")
        cluster.wait_until("birch", lambda s: s["waiting_for"] == ["ash"], "has cedar's, and has signed")
        cluster.wait_until("ash", lambda s: has(s, 2, "birch", "cedar"), "ash has both")
        cluster.kill("birch")
        lose_disk(cluster, "birch")
        state = cluster.layout("birch").state
        recover.prepare(state)
        cluster.start("birch")
        cluster.wait_until("birch", lambda s: "offers nothing" in told(s, "recovering"), "says why")
        status = cluster.wait_until("birch", lambda s: s["waiting_for"] == ["cedar"], "waiting for cedar alone")
        assert "--without" in next(w["fix"] for w in status["warnings"] if w["code"] == "recovering")
        assert cluster.stop("birch") == 0
        done = run("--state", str(state), "recover", "--from-peers", "--without", "cedar")
        assert done.exit_code == 0
        assert "asks ash and signs nothing" in done.stdout and "Not asked: cedar" in done.stdout
        cluster.start("birch")
        release(cluster, "ash")
        require_same(cluster, undisturbed)


def held_in_round_2(cluster: Cluster) -> None:
    """All have fused round 1; none goes on before it is released."""
    for name in NAMES:
        cluster.hold(name, 2)
    cluster.start_all()
    for name in NAMES:
        cluster.wait_until(name, lambda s: s["round"] == 2, "round 2")


def only_cedar_has_round_2(cluster: Cluster, *, acknowledged: bool = False) -> bytes:
    """birch signs round 2, cedar alone takes it, and birch took cedar's; its disk is lost. Gives the manifest.

    `acknowledged`: cedar has read birch's receipt for certain, so it will never send its own again.
    """
    held_in_round_2(cluster)
    cluster.kill("ash")
    release(cluster, "birch", "cedar")
    for name, other in (("birch", "cedar"), ("cedar", "birch")):
        cluster.wait_until(
            name, lambda s, p=other: has(s, 2, p) and s["waiting_for"] == ["ash"], "each has the other's"
        )  # type: ignore[misc]
    if acknowledged:
        cluster.wait_until("cedar", lambda s: peer(s, "birch")["receipt"] == "round 2: accepted", "it knows so")
    document = signed(cluster, "birch", 2)
    cluster.kill("birch")
    lose_disk(cluster, "birch")
    return document


def come_back(cluster: Cluster, *, held: bool = False) -> None:
    """ash and birch start. `held`: ash ends no epoch yet."""
    cluster.start("ash")
    if not held:
        release(cluster, "ash")
    cluster.start("birch")


@pytest.mark.sample(3, "a peer that cannot be asked")
def test_threat_12_what_only_an_unasked_peer_holds_is_signed_again_to_the_same_bytes(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """Nobody can tell birch of its round 2. It trains it once more; manifest and checkpoint are those of before."""
    with with_a_plain_inbox(tmp_path) as cluster:
        before = only_cedar_has_round_2(cluster)
        recover.prepare(cluster.layout("birch").state, ("cedar",))
        come_back(cluster)
        require_same(cluster, undisturbed)
        assert signed(cluster, "birch", 2) == before


@pytest.mark.sample(3, "a peer that cannot be asked")
def test_threat_12_where_it_trains_to_other_bytes_the_unasked_peer_has_proof_and_all_halt(tmp_path: Path) -> None:
    """The price of --without, as lost-disk.md says it: loud, and nobody goes on with two different models."""
    with with_a_plain_inbox(tmp_path) as cluster:
        before = only_cedar_has_round_2(cluster)
        recover.prepare(cluster.layout("birch").state, ("cedar",))
        cluster.trainer = OTHERWISE
        come_back(cluster)
        cluster.wait_until("cedar", lambda s: warned(s, "equivocation birch"), "named")
        (proof,) = evidence.kept(cluster.layout("cedar").state / "evidence")
        assert (
            proof.documents() == (before, signed(cluster, "birch", 2)) and proof.documents()[0] != proof.documents()[1]
        )
        for name in NAMES:
            cluster.wait_until(name, lambda s: s["state"] == "halted", "halts")
        # Who had signed round 3 before the proof came fuses it too, and halts then: the same set, so the same model.
        assert len({digest for n in NAMES if (digest := cluster.fused(n).get(3))}) <= 1


@contextmanager
def line_to(port: int) -> Iterator[tuple[Proxy, Callable[[Coroutine[Any, Any, None]], None]]]:
    """A line to a daemon that the test can cut: (the proxy, what runs its `up` and `down`)."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run_there(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(60)

    proxy = Proxy(port)
    try:
        run_there(proxy.up())
        yield proxy, run_there
        run_there(proxy.down())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# One question, then none for an hour: only who shows itself is asked sooner. Lists that peers give to other questions
# would tell of it before that (`set_back.py`); here they do not.
ONCE = (
    HURRY
    + """; m.PAUSE, m.AFTER_CONNECT_S = m.Pace(3600, 3600), 0.2
from hsl_node.node import alarms
from hsl_node.node.heal import set_back
alarms.QUIET_S = 1.0
set_back.SetBack.heard = lambda self, offer: None
"""
)


@pytest.mark.sample(3, "a peer that cannot be asked")
def test_a_peer_that_was_away_when_it_was_asked_for_a_lost_checkpoint_is_asked_when_it_is_back(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """birch lost cedar's round 2, which cedar will not send again; ash has it, and cannot be reached for a while."""
    port = free_ports(1)[0]
    with (
        line_to(port) as (line, run_there),
        with_a_plain_inbox(tmp_path, ONCE, via={"ash": f"127.0.0.1:{line.port}"}, ports={"ash": port}) as cluster,
    ):
        only_cedar_has_round_2(cluster, acknowledged=True)
        cluster.kill("cedar")  # so that ash has nothing of it to give while birch recovers
        recover.prepare(cluster.layout("birch").state, ("cedar",))
        come_back(cluster, held=True)
        cluster.wait_until("birch", lambda s: s["waiting_for"] == ["ash", "cedar"], "has signed again")
        cluster.start("cedar")
        cluster.wait_until("ash", lambda s: has(s, 2, "birch", "cedar"), "ash has both")
        run_there(line.down())
        release(cluster, "ash")
        cluster.wait_until("birch", lambda s: warned(s, "lost cedar"), "finds that it lacks it")
        log = cluster.layout("birch").state / "log" / "hsl-node.log"
        cluster.wait_until("birch", lambda s: "not asked" in log.read_text(), "asks ash in vain")
        cluster.kill("ash")
        run_there(line.up())
        cluster.start("ash")  # it connects to birch, as who starts asks around
        require_same(cluster, undisturbed)
        cluster.wait_until("birch", lambda s: not warned(s, "lost cedar"), "the alarm has ended")


@pytest.mark.sample(3, "a peer that cannot be asked")
@pytest.mark.parametrize("case", ["the same bytes", "other bytes", "the same bytes and another key"])
def test_threat_12_with_the_export_of_the_unasked_peer_nothing_is_signed_twice(
    tmp_path: Path, undisturbed: dict[int, str], case: str
) -> None:
    """cedar's operator mails what cedar holds. The same bytes again: the run goes on. Others: birch refuses to sign."""
    with with_a_plain_inbox(tmp_path) as cluster:
        before = only_cedar_has_round_2(cluster)
        export = tmp_path / "mailed"
        assert run("--state", str(cluster.layout("cedar").state), "verify", "--export", str(export)).exit_code == 0
        state = cluster.layout("birch").state
        words = ("recover", "--from-peers", "--without", "cedar", "--documents", str(export))
        assert run("--state", str(state), *words).exit_code == 0
        if "another key" in case:  # what the old one signed is neither signed anew nor given up
            begun = rotate.begin(state)
            for name in ("ash", "cedar"):
                rotate.take(cluster.layout(name).state, begun.file, fingerprint(begun.update.new))
            rotate.finish(state, force=True)
            with open(tmp_path / "sshd" / "keys", "a") as keys:  # as `inbox provision` there, run again, would
                keys.write(begun.update.new + "\n")
        cluster.trainer = OTHERWISE if case == "other bytes" else []
        come_back(cluster)
        if case != "other bytes":
            require_same(cluster, undisturbed)
        else:
            assert cluster.processes["birch"].wait(WAIT_S) == LOST
            assert "refusing to sign" in cluster.output("birch")
            assert not list((cluster.layout("cedar").state / "evidence").iterdir())
        assert signed(cluster, "birch", 2) == before


def test_an_export_that_is_not_of_this_node_or_contradicts_it_is_refused(tmp_path: Path) -> None:
    with Cluster(tmp_path / "nodes", ("ash", "birch"), PLAN) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        for name in cluster.names:
            assert cluster.stop(name) == 0
        birch, export = cluster.layout("birch").state, tmp_path / "export"
        assert run("--state", str(cluster.layout("ash").state), "verify", "--export", str(export)).exit_code == 0
        path = export / "r000002_birch.manifest"
        content, key = json.loads(path.read_text()), identity.load(cluster.layout("birch").key)
        stranger = identity.load(cluster.layout("ash").key)

        def replaced(signer: identity.Identity, **changes: Any) -> None:
            line, _, signature = signer.sign({**content, **changes}, MANIFEST_NAMESPACE).partition(b"\n")
            path.write_bytes(line + b"\n")
            path.with_name(path.name + ".sig").write_bytes(signature)

        def refused(error: type[Exception]) -> None:
            with pytest.raises(error):
                recover.prepare(birch, ("ash",), (export,))

        for change, error in (
            (lambda: replaced(stranger), PeerDataError),
            (lambda: replaced(key, round=3), PeerDataError),
            (lambda: replaced(key, federation="0" * 64), FederationMismatch),
            (lambda: replaced(key, samples=77), Equivocation),
        ):
            change()
            refused(error)
            with Journal.read_only(cluster.layout("birch").journal) as journal:
                assert mark.find_mark(journal) is None, "nothing was changed"
                assert journal.manifest(2, Peer("birch"))["content"] == content  # type: ignore[index]
        assert [p.peer for p in evidence.kept(birch / "evidence")] == ["birch"]
        replaced(key)
        assert recover.prepare(birch, ("ash",), (export,)) == ()
        done = run("--state", str(birch), "recover", "--from-peers", "--without", "ash")
        assert "asks nobody" in done.stdout
        (tmp_path / "empty").mkdir()
        done = run("--state", str(birch), "recover", "--from-peers", "--documents", str(tmp_path / "empty"))
        assert code(done) == UsageError.exit_code


def test_threat_17_an_export_that_a_replaced_key_has_signed_is_taken_as_far_as_newer_signatures_name_it(
    tmp_path: Path,
) -> None:
    """Whoever finds birch's old key mails a folder: one with a round to come, one with another round of long ago."""
    with Cluster(tmp_path / "nodes", ("ash", "birch"), PLAN) as cluster:
        cluster.hold("ash", 3)
        cluster.start_all()
        cluster.wait_until("birch", lambda s: (s["round"], s["waiting_for"]) == (3, ["ash"]), "two rounds are fused")
        birch, export = cluster.layout("birch").state, tmp_path / "export"
        thief = identity.load(cluster.layout("birch").key)
        begun = rotate.begin(birch)
        rotate.take(cluster.layout("ash").state, begun.file, fingerprint(begun.update.new))
        rotate.finish(birch)
        release(cluster, "ash")
        cluster.wait_finished()
        for name in cluster.names:
            assert cluster.stop(name) == 0
        assert run("--state", str(cluster.layout("ash").state), "verify", "--export", str(export)).exit_code == 0

        def forge(round: int, **changes: Any) -> None:
            content = json.loads((export / "r000002_birch.manifest").read_text())
            line, _, signature = thief.sign({**content, "round": round, **changes}, MANIFEST_NAMESPACE).partition(b"\n")
            path = export / f"r{round:06}_birch.manifest"
            path.write_bytes(line + b"\n")
            path.with_name(path.name + ".sig").write_bytes(signature)

        with Journal.beside(cluster.layout("birch").journal) as journal, journal.transaction():
            for table in ("manifests", "signed"):
                journal._db.execute(f"DELETE FROM {table} WHERE round < 4")
        assert recover.prepare(birch, ("ash",), (export,)) == ()
        with Journal.read_only(cluster.layout("birch").journal) as journal:
            assert [r for r in range(1, 4) if journal.manifest(r, Peer("birch"))] == [1, 2, 3]
        for forged in ({"round": 7}, {"round": 2, "samples": 77}):
            forge(**forged)
            with pytest.raises(PeerDataError, match="signed with a key of this node that was replaced"):
                recover.prepare(birch, ("ash",), (export,))
            (export / "r000007_birch.manifest").unlink(missing_ok=True)
        assert not evidence.kept(birch / "evidence")


def told(status: dict[str, Any], warning: str) -> str:
    return "; ".join(w["text"] for w in status["warnings"] if w["code"] == warning)
