"""Fuses the full set into one model: `Fusing.fuse` -> `poisoning.fuse_watched` -> `weights/fuse_files.py`."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.node import poisoning
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here
from hsl_node.node.machine import Happened
from hsl_node.sync.round import Fuse, Fused, State
from hsl_node.sync.store.exchange import left_by
from hsl_node.weights.checkpoint_file import Schema

log = logging.getLogger(__name__)

NO_ROOM_RETRY_S = 30.0  # a fusion reads all checkpoints again


@dataclass
class Fusing:
    here: Here
    alarms: Alarms
    schema: Schema
    state: Callable[[], State]
    share: float = 0.0  # done

    async def fuse(self, action: Fuse) -> Happened:
        here, state, plan = self.here, self.state(), self.here.federation.plan
        rule = plan.rule
        samples = {p: c.samples for p, c in state.have.items()}
        said = left_by(here.journal, here.layout, here.me, action.round).said
        paths = {p: here.layout.checkpoint(action.round, p, here.me) for p in state.peers}

        def progress(share: float) -> None:
            self.share = share

        while True:
            try:
                digest, figures = await asyncio.to_thread(
                    partial(poisoning.fuse_watched, said=said, clip=plan.fusion_clip),
                    rule,
                    paths,
                    samples,
                    self.schema,
                    here.layout.fused(action.round - 1),
                    here.layout.fused(action.round),
                    progress,
                    action.inputs,
                    state.base,
                )
                break
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                self.alarms.sound("disk", f"no room for the fused model: {exc.strerror}", "free some space")
                await asyncio.sleep(NO_ROOM_RETRY_S)
        self.alarms.settle("disk")
        self.share = 0.0
        log.info("fused", extra={"round": action.round, "sha256": digest, "peers": len(paths)})
        weighed = samples if FUSION_RULES[rule].by_images else {}
        counted = {p: {name: said[p][name] for name in FUSION_RULES[rule].said} for p in samples}
        weights = poisoning.weights_of(rule, samples, said)
        return Happened(
            Fused(action.round, digest),
            (
                lambda: here.journal.record_fused(action.round, digest),
                lambda: poisoning.record_fusion(
                    here.journal, action.round, figures, weighed, counted, weights, plan.epochs_per_round
                ),
            ),
        )
