"""What a node computes for its federation: trains, fuses, validates, and signs what it made.

Its coroutines perform actions of the round machine (`sync/round.py`), and tell it what came of them (`Node.apply`).
A fusion is `Work.fuse` -> `poisoning.fuse_watched` -> `weights/fuse_files.py` -> a rule of `weights/fusion.py`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING, Any

from hsl_node import __version__
from hsl_node.errors import Altered, Diverged, HslError, LocalStateError
from hsl_node.federation import identity
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.names import Digest, Round
from hsl_node.node import poisoning
from hsl_node.node.heal import damage
from hsl_node.status import last_words
from hsl_node.sync import round as machine
from hsl_node.sync.manifest import Manifest, claim_of, parse_manifest
from hsl_node.sync.plateau import plateaued
from hsl_node.sync.round import Declare, Fuse, Fused, Phase, Train, Trained
from hsl_node.sync.store.layout import paths_of
from hsl_node.sync.store.room import reserve_of

if TYPE_CHECKING:
    from hsl_node.node.daemon import Node

log = logging.getLogger(__name__)

NO_ROOM_RETRY_S = 30.0  # a fusion reads all checkpoints again
ROOM_LOOK_S = 5.0  # a look at the free space costs nothing
DIVERGED = (
    "nothing more is computed; `hsl-node pause`, then `hsl-node resume` tries again. Where the fused model is spoilt, "
    'all hospitals see the same: agree on a new plan, with fusion = "median" or without the peer that is named. Where '
    "only this site's training is, look at its data; else agree on a lower learning_rate"
)

COPY = "`hsl-node stop`, then `hsl-node start`: it fetches the file from a peer that has it; after that"


class Work:
    """One for each daemon."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.epoch: dict[str, Any] | None = None  # live progress of the trainer
        self.busy: dict[str, Any] | None = None
        self.fusing = 0.0  # share done

    async def declare(self, action: Declare) -> None:
        node = self._node
        samples = int(node.journal.meta("samples") or 0)
        if action.round > 0:  # the opening statement may be corrected
            await node.asking.check()
        self._publish(self._manifest(action.round, Digest(action.base), 0, samples, None, node.known_state()))

    async def train(self, action: Train) -> None:
        node = self._node
        await self._wait_for_room()
        try:
            event = await self._run(
                {
                    "job": "train",
                    "round": action.round,
                    "base": str(node.layout.fused(action.round - 1)),
                    "base_sha256": action.base,
                    "out": str(node.layout.outbox(action.round)),
                },
                base=Round(action.round - 1),
            )
        finally:
            self.epoch = self.busy = None
        await node.asking.check()
        self._publish(
            self._manifest(
                action.round,
                Digest(event["sha256"]),
                event["bytes"],
                event["samples"],
                event["auc"],
                node.known_state(),
            )
        )

    async def _run(self, job: dict[str, Any], base: Round) -> dict[str, Any]:
        """A job of the trainer, on the fused model of round `base`. One that gives no finite numbers is over, but not
        the daemon: it stays reachable, says so, and the operator may have it tried again.

        Raises:
            HslError: what only the operator's files can mend.
        """
        node = self._node
        node.alarms.settle("diverged")
        try:
            return await node.trainer.run(job)
        except Diverged as exc:
            fault = poisoning.named_in(node.journal, base)
            text = exc.message + (f". In the fusion that it began with: {fault}" if fault else "")
            await self._stand_still("diverged", text, DIVERGED)
            raise

    async def _stand_still(self, code: str, text: str, fix: str) -> None:
        """A job is over, but not the daemon: until `pause`, or the end."""
        node = self._node
        self.epoch = self.busy = None
        node.alarms.sound(code, text, fix)
        node.journal.note("error", code, text)
        await node.trainer.stop()
        await asyncio.Event().wait()

    def _manifest(
        self, round: Round, sha256: Digest, size: int, samples: int, auc: float | None, state: machine.State
    ) -> Manifest:
        node = self._node
        plan = node.federation.plan
        aucs = [*(found for r, found in node.journal.aucs_of(node.me).items() if r < round), auc]
        return Manifest(
            federation=node.federation.digest,
            round=round,
            peer=node.me,
            sha256=sha256,
            bytes=size,
            base=state.base,
            inputs={str(p): str(d) for p, d in state.inputs.items()},
            samples=samples,
            auc=auc,
            plateau=plateaued(aucs, rounds=plan.plateau_rounds, improvement=plan.plateau_improvement),
            halted=state.phase is Phase.HALTED,
            anchor=node.federation.anchor.fingerprint if node.federation.anchor else None,
            schema=node.known_schema().digest,
            instance=node.journal.meta("instance") or "",
            software=self.software(),
        )

    def _publish(self, manifest: Manifest) -> None:
        """Promise it durably: from here on this round has one checkpoint of mine. The pushes follow from the state."""
        node = self._node
        sha256 = Digest(manifest.sha256)
        signed = node.journal.signed(manifest.round)
        if signed is not None and signed[0] == sha256 and manifest.round > 0:
            # Signed before the state was lost, and trained again: there is one manifest of a round, the first.
            document = signed[1]
            keys = node.keyring.chain(node.me)  # the key may have been replaced since
            manifest = parse_manifest(identity.verify(document, keys, identity.MANIFEST_NAMESPACE))
        else:
            document = node.identity.sign(manifest.content(), identity.MANIFEST_NAMESPACE)
        node.apply(
            Trained(claim_of(manifest)),
            lambda: node.journal.record_signed(manifest.round, sha256, document),
            lambda: node.journal.record_manifest(manifest.round, node.me, sha256, document, manifest.content()),
        )

    async def fuse(self, action: Fuse) -> None:
        node, state = self._node, self._node.known_state()
        samples = {p: c.samples for p, c in state.have.items()}
        by_images = FUSION_RULES[node.federation.plan.fusion].by_images
        paths = paths_of(node.layout, action.round, node.me, state.peers)

        def progress(share: float) -> None:
            self.fusing = share

        while True:
            try:
                digest, figures = await asyncio.to_thread(
                    poisoning.fuse_watched,
                    node.federation.plan.fusion,
                    paths,
                    samples,
                    node.known_schema(),
                    node.layout.fused(action.round - 1),
                    node.layout.fused(action.round),
                    progress,
                    action.inputs,
                    state.base,
                )
                break
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                node.alarms.sound("disk", f"no room for the fused model: {exc.strerror}", "free some space")
                await asyncio.sleep(NO_ROOM_RETRY_S)
        node.alarms.settle("disk")
        self.fusing = 0.0
        log.info("fused", extra={"round": action.round, "sha256": digest, "peers": len(paths)})
        node.apply(
            Fused(action.round, digest),
            lambda: node.journal.record_fused(action.round, digest),
            lambda: poisoning.record_fusion(node.journal, action.round, figures, samples if by_images else {}),
        )
        poisoning.renew(node.journal, node.alarms, node.me, state.peers)
        damage.renew(node.journal, node.alarms, node.known_state().round)
        node.asking.forget()
        best = node.journal.best_fused()
        await asyncio.to_thread(
            node.store.prune, node.known_state().round, frozenset({0} | ({best[0]} if best else set()))
        )

    def last_to_validate(self) -> Round | None:
        """The last fusion has no next round to be validated in, nor has that before a halt."""
        state = self._node.known_state()
        if state.phase not in (Phase.AGREE, Phase.FINISHED, Phase.HALTED) or state.round == 0:
            return None
        return self._node.journal.last_unvalidated()

    async def validate_last(self) -> None:
        node = self._node
        node.alarms.settle("unvalidated")
        round = self.last_to_validate()
        try:
            if round is not None:
                base, sha256 = node.layout.fused(round), node.known_state().base
                job = {"job": "validate", "round": round, "base": str(base), "base_sha256": sha256}
                await self._run(job, base=round)
        except HslError as exc:
            if node.known_state().phase is not Phase.HALTED:
                raise
            why, fix = last_words.said(exc)  # nothing may disturb a halt: no end of the daemon, no recovery
            why = f"the last fused model could not be validated: {why}".replace(f"{node.layout.state}/", "")
            fix = COPY if isinstance(exc, Altered) else fix
            await self._stand_still("unvalidated", why, f"{fix}: `hsl-node pause`, then `hsl-node resume`")
            raise
        finally:
            self.busy = None
        await node.trainer.stop()  # nothing more to train: give the memory back

    async def _wait_for_room(self) -> None:
        node = self._node
        try:
            while True:
                try:
                    size, peers = node.known_schema().file_bytes, len(node.federation.peers)
                    return node.store.require_room(size, peers, reserve_of(node.config.inbox.kind))
                except LocalStateError as exc:
                    node.alarms.sound("disk", exc.message, exc.remedy)
                    await asyncio.sleep(ROOM_LOOK_S)
        finally:
            node.alarms.settle("disk")  # also where training was paused meanwhile: nobody waits for room then

    # ------------------------------------------------------------------ the trainer's word

    def event(self, event: dict[str, Any]) -> None:
        with self._node.journal.transaction():
            self._record(event)

    def _record(self, event: dict[str, Any]) -> None:
        node = self._node
        match event.get("event"):
            case "initialised":
                self.busy = None  # images are decoded, and this may be followed by a long wait for the peers
                node.journal.set_meta("samples", str(event["images"]["train"]))
                node.journal.set_meta("torch", str(event["versions"]["torch"]))
                node.journal.set_meta("device", str(event["device"]))
                warnings = event.get("warnings", ())
                for number, text in enumerate(warnings):
                    node.alarms.sound(f"data {number}", text, "look at `hsl-node data check`")
                number = len(warnings)
                while f"data {number}" in node.alarms:  # of the images as an earlier trainer found them
                    node.alarms.settle(f"data {number}")
                    number += 1
            case "progress":
                self.epoch = event
                self.busy = None
            case "busy":
                self.busy = event
            case "epoch":
                node.journal.record_epoch(event["round"], event["epoch"], event)
                log.info("epoch", extra={k: event.get(k) for k in ("round", "epoch", "auc", "validation_loss")})
            case "validated":
                node.journal.record_validation(event["round"], event["auc"], event.get("loss"))
                log.info("fused model validated", extra={"round": event["round"], "auc": event["auc"]})
                poisoning.record_validation(node.journal, node.me, event)
                poisoning.renew(node.journal, node.alarms, node.me, node.federation.peers)
            case _:
                pass

    def software(self) -> str:
        """Versions that decide what is computed, for manifests and for people."""
        return f"hsl-node {__version__}, torch {self._node.journal.meta('torch') or 'unknown'}"[:80]
