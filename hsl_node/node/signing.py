"""Signs what this node made, after its peers were asked whether anybody objects: one manifest a round, for good."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from hsl_node import __version__
from hsl_node.errors import ConfigError, PeerDataError
from hsl_node.federation import identity
from hsl_node.federation.methods import package_of
from hsl_node.federation.names import Digest, Round
from hsl_node.node.here import Here, Keys
from hsl_node.node.machine import Happened
from hsl_node.node.trainer import Event
from hsl_node.sync.candidates import best_scores
from hsl_node.sync.manifest import Manifest, check_said, claim_of, parse_manifest
from hsl_node.sync.plateau import plateaued
from hsl_node.sync.round import Declare, Phase, State, Trained
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.checkpoint_file import Schema


@dataclass(frozen=True)
class Signing:
    here: Here
    keys: Keys
    schema: Schema
    state: Callable[[], State]
    nobody_objects: Callable[[], Awaitable[None]]  # see `BeforeSigning.check`

    async def declare(self, action: Declare) -> Happened:
        """A statement of the model that this node stands on."""
        samples = int(self.here.journal.meta("samples") or 0)
        if action.round > 0:  # the opening statement may be corrected
            await self.nobody_objects()
        return self._promise(self._manifest(action.round, Digest(action.base), 0, samples))

    async def trained(self, round: Round, event: Event) -> Happened:
        """The checkpoint in outbox/, by the trainer's word of it.

        Raises:
            ConfigError: the method says what its own card does not allow.
        """
        await self.nobody_objects()
        digest = Digest(event["sha256"])
        manifest = self._manifest(round, digest, event["bytes"], event["samples"], event["score"], event["said"])
        try:
            check_said(manifest, self.here.federation.plan)
        except PeerDataError as exc:
            raise ConfigError(
                f"this node {exc.message}: every peer would refuse that, so nothing was signed",
                remedy="it is a fault of the method's code: install a version without it at all hospitals",
            ) from exc
        return self._promise(manifest)

    def _manifest(
        self,
        round: Round,
        sha256: Digest,
        size: int,
        samples: int,
        score: float | None = None,
        said: Mapping[str, float] = {},
    ) -> Manifest:
        here, state, plan = self.here, self.state(), self.here.federation.plan
        before = best_scores(here.journal.scores_of(here.me), here.journal.candidates())
        scores = [*(found for r, found in before.items() if r < round), score]
        return Manifest(
            federation=here.federation.digest,
            round=round,
            peer=here.me,
            sha256=sha256,
            bytes=size,
            base=state.base,
            inputs={str(p): str(d) for p, d in state.inputs.items()},
            samples=samples,
            score=score,
            said={name: float(value) for name, value in said.items()},
            plateau=plateaued(scores, rounds=plan.plateau_rounds, improvement=plan.plateau_improvement),
            halted=state.phase is Phase.HALTED,
            anchor=here.federation.anchor.fingerprint if here.federation.anchor else None,
            schema=self.schema.digest,
            instance=here.journal.meta("instance") or "",
            software=software(here.journal, here.federation.plan.method),
        )

    def _promise(self, manifest: Manifest) -> Happened:
        """Once durable, this round has one checkpoint of mine. The pushes follow from the state."""
        journal, me, ring = self.here.journal, self.here.me, self.keys.ring
        sha256 = Digest(manifest.sha256)
        signed = journal.signed(manifest.round)
        if signed is not None and signed[0] == sha256 and manifest.round > 0:
            # Signed before the state was lost, and trained again: there is one manifest of a round, the first.
            document = signed[1]
            keys = ring.chain(me)  # the key may have been replaced since
            manifest = parse_manifest(identity.verify(document, keys, identity.MANIFEST_NAMESPACE))
        else:
            document = self.keys.identity.sign(manifest.content(), identity.MANIFEST_NAMESPACE)
        return Happened(
            Trained(claim_of(manifest)),
            (
                lambda: journal.record_signed(manifest.round, sha256, document),
                lambda: journal.record_manifest(manifest.round, me, sha256, document, manifest.content()),
            ),
        )


def software(journal: Journal, method: str) -> str:
    """Versions that decide what is computed, for manifests and for people; last the package that brings the method."""
    said = f"hsl-node {__version__}, torch {journal.meta('torch') or 'unknown'}"
    return ", ".join([said, *filter(None, [package_of(method)])])[:80]
