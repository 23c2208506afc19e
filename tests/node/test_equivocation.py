"""A peer that shows two faces to real daemons: both name it, with its own signatures as proof, and nobody goes on."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cluster import Cluster, warned
from command_line import code, run
from federations import FederationOf, Members
from hostile import until
from memory_file import in_memory
from two_faces import CULPRIT, HONEST, PLAN, TRAINER, at, begin, deliver, face, signed, until_logged

from hsl_node.admin import verify
from hsl_node.errors import PeerDataError
from hsl_node.federation import identity
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.identity import MANIFEST_NAMESPACE, OFFER_NAMESPACE
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Peer
from hsl_node.host import durable
from hsl_node.host.layout import Layout
from hsl_node.node import equivocation
from hsl_node.node.alarms import Alarms
from hsl_node.sync import evidence
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.manifest import Manifest, content_digest
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.store.store import Store

# Whoever waits for a peer asks it soon, for what it alone may have seen.
HURRY = "import hsl_node.node.equivocation as p; p.PATIENCE_S, p.PAUSE, p.LOOK_S = 0.5, p.Pace(0.5, 2), 0.2"


def test_threat_11_x_to_one_and_y_to_the_other_gives_both_the_proof_without_the_liars_help(tmp_path: Path) -> None:
    """cedar is played by the test. Its two checkpoints are right in every way but that there are two."""
    with Cluster(tmp_path, (*HONEST, CULPRIT), PLAN, trainer=TRAINER) as cluster:
        begin(cluster)
        faces = {name: face(cluster, value) for name, value in zip(HONEST, (1.0, 2.0), strict=True)}
        for name, (manifest, data) in faces.items():
            deliver(manifest, data, cluster, name)
        for name in HONEST:
            status = cluster.wait_until(name, lambda s: any(w["code"] == "halted" for w in s["warnings"]), "a halt")
            assert CULPRIT in next(w["text"] for w in status["warnings"] if w["code"] == "halted")
            assert sorted(cluster.fused(name)) == [0, 1], "nobody went on"
            assert halted_since(status) == halted_since(cluster.status(name)), "it is not always just now"
        for name in HONEST:
            require_both(cluster, name, {m.digest for m, _ in faces.values()})
            assert f"peer={CULPRIT}" in cluster.output(name)
        require_export(cluster, "ash", tmp_path / "export")

        assert cluster.stop("ash") == 0
        cluster.start("ash")
        cluster.wait_until("ash", lambda s: warned(s, f"equivocation {CULPRIT}"), "named again after a restart")


def test_threat_11_a_halt_told_to_one_and_a_checkpoint_to_the_other_is_proven_to_both(tmp_path: Path) -> None:
    """ash is told that cedar halted in round 1; birch gets its checkpoint, goes on, and waits for ash in round 2."""
    with Cluster(tmp_path, (*HONEST, CULPRIT), PLAN, trainer=TRAINER, prelude=HURRY) as cluster:
        begin(cluster)
        checkpoint, data = face(cluster, 1.0)
        base = checkpoint.content["base"]
        halted = at(cluster, "ash").manifest(checkpoint.content, sha256=base, bytes=0, score=None, halted=True)
        deliver(halted, None, cluster, "ash")
        cluster.wait_until("ash", lambda s: s["state"] == "halted", "told of a halt")
        deliver(checkpoint, data, cluster, "birch")
        for name in HONEST:
            require_both(cluster, name, {halted.digest, checkpoint.digest})
        status = cluster.wait_until("birch", lambda s: any(w["code"] == "halted" for w in s["warnings"]), "says it")
        assert f"{CULPRIT} signed two different manifests" in status["reason"]
        assert sorted(cluster.fused("ash")) == [0]
        # With its own signature given it fuses, and objects in round 2; proof that comes before halts it in round 1.
        status = cluster.wait_until("birch", lambda s: s["round"] == 2 or s["state"] == "halted", "round 1 is over")
        assert sorted(cluster.fused("birch")) == ([0, 1] if status["round"] == 2 else [0])


def test_threat_11_two_faces_of_a_round_after_the_end_leave_the_run_finished(tmp_path: Path) -> None:
    """A run that a plateau ends early has a next round by number. Who signs it goes on alone, once or twice."""
    plan = PLAN.model_copy(update={"rounds": 9, "plateau_rounds": 1, "plateau_improvement": 1.0})
    with Cluster(tmp_path, (*HONEST, CULPRIT), plan, trainer=TRAINER) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        cluster.kill(CULPRIT)
        end = cluster.status("ash")["round"]
        assert end <= plan.rounds, "the plateau ended it"
        closing = {**signed(cluster, "ash", end), "peer": CULPRIT}
        data = cluster.layout("ash").outbox(end - 1).read_bytes()
        for samples in (15, 16):
            manifest = at(cluster, "ash").about(data, {**closing, "round": end + 1}, samples=samples)
            deliver(manifest, data, cluster, "ash")
            key = cluster.federation.get("ash").key
            receipt = asyncio.run(asyncio.wait_for(at(cluster, "ash").receipt(manifest, key), 60))
            assert (receipt.accepted, receipt.code) == (False, "ended")
        status = cluster.status("ash")
        assert (status["state"], status["reason"]) == ("finished", "")
        assert not list((cluster.layout("ash").state / "inbox").glob(f"r{end + 1:06}/*"))


@pytest.mark.parametrize("valid", [True, False])
def test_threat_22_a_proof_whose_finder_was_killed_before_its_journal_had_the_word_halts_it(
    tmp_path: Path, valid: bool
) -> None:
    with Cluster(tmp_path, (*HONEST, CULPRIT), PLAN, trainer=TRAINER) as cluster:
        begin(cluster)
        first, second = (face(cluster, value)[0].document for value in (1.0, 2.0))
        cluster.kill("ash")
        folder = cluster.layout("ash").state / "evidence"
        for name, document in zip(evidence.names(1, Peer(CULPRIT)), (first, second if valid else first), strict=True):
            (folder / name).write_bytes(document)
        cluster.start("ash")
        if valid:
            status = cluster.wait_until("ash", lambda s: s["reason"], "objects")
            assert f"{CULPRIT} signed two different manifests for round 1" in status["reason"]
            assert warned(status, f"equivocation {CULPRIT}")
        else:
            until_logged(cluster, "ash", "proves nothing")
            status = cluster.wait_until("ash", lambda s: s["phase"] == "collect", "goes on")
            assert not status["reason"] and not warned(status, f"equivocation {CULPRIT}")


@pytest.mark.parametrize("kind", ["another's signature", "changed after signing", "no signature", "says the same"])
def test_threat_11_an_innocent_peer_is_not_framed_by_what_it_never_signed(tmp_path: Path, kind: str) -> None:
    """birch is played by the test, server included: it names another manifest of cedar, and shows a forged one."""
    asyncio.run(asyncio.wait_for(framed(tmp_path, kind), 200))


def test_threat_11_who_says_that_it_recovers_is_named_with_its_word_for_it(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(framed(tmp_path, "no signature", recovering=True), 200))


async def framed(tmp_path: Path, kind: str, recovering: bool = False) -> None:
    with Cluster(tmp_path, ("ash", "birch", "cedar"), PLAN, trainer=TRAINER, prelude=HURRY) as cluster:
        liar = identity.load(cluster.layout("birch").key)
        wanted: list[str] = []
        shown: dict[str, bytes] = {}  # sha256 of the document -> the document
        listed: list[Listed] = []

        def offer(asker: Peer, name: str, twice: bool) -> int:
            if len(name) == 64:
                wanted.append(name)
                return in_memory(shown[name])
            content = Offer(
                federation=cluster.federation.digest, peer="birch", asker=asker, nonce=name,
                recovering=recovering, round=2, phase="collect", twice=False, manifests=listed, files=[],
            ).content()  # fmt: skip
            return in_memory(liar.sign(content, OFFER_NAMESPACE))

        admission = Admission(
            federation=cluster.federation, me=Peer("birch"),
            data_bytes=200_000, on_commit=lambda peer: None, on_connect=lambda peer: None, offer=offer,
        )  # fmt: skip
        server = InboxServer(admission, identity=liar, homes=tmp_path / "homes")
        await server.start("127.0.0.1", cluster.ports["birch"])
        try:
            await asyncio.to_thread(begin, cluster, "birch", ("ash", "cedar"))
            manifest, data = await asyncio.to_thread(face, cluster, 1.0, "birch")
            for name in ("ash", "cedar"):
                await at(cluster, name, "birch").deliver(manifest, data)
            genuine = await asyncio.to_thread(signed, cluster, "ash", 2)
            innocent = await asyncio.to_thread(signed, cluster, "cedar", 1)
            forged, document = FORGED[kind](cluster, innocent)
            digest = hashlib.sha256(document).hexdigest()
            shown[digest] = document
            listed.append(Listed(peer="cedar", round=1, sha256=forged["sha256"], document=digest))
            inputs = {**genuine["inputs"], "cedar": content_digest({**innocent, "samples": 77})}
            await at(cluster, "ash", "birch").deliver(
                at(cluster, "ash", "birch").about(data, {**genuine, "peer": "birch"}, inputs=inputs), data
            )
            await until(lambda: digest in wanted)  # ash has read it
            status = await asyncio.to_thread(
                cluster.wait_until, "ash", lambda s: warned(s, "unproven birch"), "says who shows nothing"
            )
            assert not any(w["code"].startswith("equivocation") for w in status["warnings"])
            text = next(w["text"] for w in status["warnings"] if w["code"] == "unproven birch")
            assert "nothing is proven against cedar" in text
            assert ("It says that it has lost its documents" in text) == recovering
            assert list((cluster.layout("ash").state / "evidence").iterdir()) == []
        finally:
            await server.stop()


def by_another(cluster: Cluster, genuine: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    content = {**genuine, "samples": 77}
    return content, identity.load(cluster.layout("birch").key).sign(content, MANIFEST_NAMESPACE)


def changed(cluster: Cluster, genuine: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    content = {**genuine, "samples": 77}
    true = identity.load(cluster.layout("cedar").key).sign(genuine, MANIFEST_NAMESPACE)
    return content, canonical_json(content) + b"\n" + true.partition(b"\n")[2]


def unsigned(cluster: Cluster, genuine: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    content = {**genuine, "samples": 77}
    return content, canonical_json(content) + b"\n"


def the_same(cluster: Cluster, genuine: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """What cedar did sign, in an armour of another width: other bytes, and no other statement."""
    line, _, armour = identity.load(cluster.layout("cedar").key).sign(genuine, MANIFEST_NAMESPACE).partition(b"\n")
    return genuine, line + b"\n" + armour + b"\n"


FORGED: dict[str, Callable[[Cluster, dict[str, Any]], tuple[dict[str, Any], bytes]]] = {
    "another's signature": by_another,
    "changed after signing": changed,
    "no signature": unsigned,
    "says the same": the_same,
}


def test_a_pair_that_proves_nothing_is_a_defect_and_no_accusation(tmp_path: Path) -> None:
    """Whoever puts files into evidence/ frames nobody: `verify` checks signature, round, name and that they differ."""
    with Cluster(tmp_path, ("ash", "birch"), PLAN, trainer=TRAINER) as cluster:
        cluster.start_all()
        content = signed(cluster, "birch", 1)
        for name in cluster.names:
            cluster.stop(name)
        state, key = cluster.layout("ash").state, identity.load(cluster.layout("birch").key)
        stranger = identity.load(cluster.layout("ash").key)
        first = key.sign(content, MANIFEST_NAMESPACE)
        other = {**content, "samples": 77}
        worthless = [
            first,
            stranger.sign(other, MANIFEST_NAMESPACE),
            key.sign({**other, "round": 3}, MANIFEST_NAMESPACE),
            key.sign({**other, "federation": "0" * 64}, MANIFEST_NAMESPACE),
            b"",
            bytes(100),
        ]
        for second in worthless:
            for name, document in zip(evidence.names(1, Peer("birch")), (first, second), strict=True):
                (state / "evidence" / name).write_bytes(document)
            (proof,) = evidence.kept(state / "evidence")
            with pytest.raises(PeerDataError):
                evidence.require_proof(proof, (key.public,), cluster.federation)
            found = verify.examine(state)
            assert found.proofs == [] and any("proves nothing" in d for d in found.defects)
        (state / "evidence" / evidence.names(1, Peer("birch"))[1]).write_bytes(key.sign(other, MANIFEST_NAMESPACE))
        found = verify.examine(state)
        assert [(p.round, p.peer) for p in found.proofs] == [(1, "birch")]
        assert not any("proves nothing" in d for d in found.defects)


class Killed(BaseException):
    """kill -9."""


class Finder:
    """A node that finds two manifests of birch for round 7, of three that birch signed."""

    def __init__(self, members: Members, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.members, self.layout, self._patch = members, Layout(folder), monkeypatch
        self.layout.make()
        self.said = [self._manifest(samples) for samples in (1, 2, 3)]
        self.documents = [members.identities[Peer("birch")].sign(m.content(), MANIFEST_NAMESPACE) for m in self.said]

    def _manifest(self, samples: int) -> Manifest:
        return Manifest(
            federation=self.members.federation.digest, round=7, peer="birch", sha256="7" * 64, bytes=1000,
            base="b" * 64, inputs={}, samples=samples, score=0.5, said={}, plateau=False, halted=False, anchor=None,
            schema="e" * 64, instance="f" * 16, software="test",
        )  # fmt: skip

    def find(self, first: int, second: int, killed: int = 0) -> bool:
        """In a process of its own, killed at the n-th point; False: it came to the end before."""
        left = killed

        def reached(step: object, where: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        store: Any = SimpleNamespace(layout=self.layout)
        store.keep_evidence = lambda name, document: Store.keep_evidence(store, name, document)
        here: Any = SimpleNamespace(store=store, layout=self.layout, me=Peer("ash"), federation=self.members.federation)
        keys: Any = SimpleNamespace(ring=Keyring.of(self.members.federation))
        links, machine = cast(Any, None), cast(Any, SimpleNamespace(tell=lambda happened: None))
        with self._patch.context() as patch:
            patch.setattr(durable, "_reached", reached)
            try:
                found = equivocation.Equivocations(here, keys, Alarms(), links, machine)
                found.keep(self.documents[first], self.said[second], self.documents[second])
            except Killed:
                return True
        return False

    def proven(self) -> set[int] | None:
        """The samples of the two documents that lie there as a proof; None: none does."""
        with contextlib.suppress(PeerDataError):
            for found in evidence.kept(self.layout.state / "evidence"):
                keys = Keyring.of(self.members.federation).chain("birch")
                return {m.samples for m in evidence.require_proof(found, keys, self.members.federation)}
        return None


def test_threat_22_a_proof_is_whole_though_a_kill_left_one_of_its_documents_and_they_come_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federation_of: FederationOf
) -> None:
    """The journal is lost with the kill, so what this node "had" and what differs from it may be another two."""
    members, died = federation_of(2), 0
    for n in range(1, 9):  # eight points: four for each file
        for m in range(1, 9):
            finder = Finder(members, tmp_path / f"{n} {m}", monkeypatch)
            assert finder.find(0, 1, killed=n)
            whole = finder.proven()
            died += finder.find(1, 0, killed=m)
            assert whole is None or finder.proven() == whole, "what was proven is proven"
            finder.find(1, 0)
            assert finder.proven() == {1, 2}
    assert died > 30, "the second finder was hardly ever killed"


def test_threat_11_a_whole_proof_stays_and_what_proves_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federation_of: FederationOf
) -> None:
    finder = Finder(federation_of(2), tmp_path / "ash", monkeypatch)
    finder.find(0, 1)
    finder.find(2, 0)
    assert finder.proven() == {1, 2}, "the first two are proof; not hundreds"
    first = finder.layout.state / "evidence" / evidence.names(7, Peer("birch"))[0]
    for rotten in (b"", first.read_bytes().replace(b'"samples":1', b'"samples":9'), finder.documents[1]):
        first.write_bytes(rotten)
        assert finder.proven() is None
        finder.find(2, 0)
        assert finder.proven() == {1, 3}
        finder.find(0, 1)
        assert finder.proven() == {1, 3}
        for path, document in zip(evidence.names(7, Peer("birch")), finder.documents, strict=False):
            (first.parent / path).write_bytes(document)


def halted_since(status: dict[str, Any]) -> float:
    return float(next(w["since"] for w in status["warnings"] if w["code"] == "halted"))


def require_both(cluster: Cluster, name: str, digests: set[str]) -> None:
    """This node has both documents, with a valid signature, and says whose they are."""
    status = cluster.wait_until(name, lambda s: warned(s, f"equivocation {CULPRIT}"), "proof")
    assert [w["code"] for w in status["warnings"] if w["code"].startswith("equivocation")] == [
        f"equivocation {CULPRIT}"
    ]
    (proof,) = evidence.kept(cluster.layout(name).state / "evidence")
    key = cluster.federation.get(CULPRIT).key
    assert {m.digest for m in evidence.require_proof(proof, (key,), cluster.federation)} == digests


def require_export(cluster: Cluster, name: str, folder: Path) -> None:
    """`verify` shows the proof; stock ssh-keygen confirms it."""
    done = run("--state", str(cluster.layout(name).state), "verify", "--export", str(folder))
    assert f"PROOF   round 1: {CULPRIT} signed two different manifests" in done.stdout
    assert code(done) == 14  # the other victim stands on another model
    listed = [line.split() for line in (folder / "index").read_text().splitlines()]
    both = [file for signer, _, file in listed if file.startswith("evidence_") and signer == CULPRIT]
    assert len(both) == 2 and len({json.loads((folder / file).read_text())["sha256"] for file in both}) == 2
    assert subprocess.run(["sh", str(folder / "check.sh")]).returncode == 0
