"""Trains a round and validates the last fused model, in the trainer process; keeps what the trainer says."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from hsl_node.errors import Altered, Diverged, HslError, LocalStateError
from hsl_node.federation.methods import Need
from hsl_node.federation.names import Digest, Round
from hsl_node.host.units import digits
from hsl_node.node import poisoning
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here
from hsl_node.node.trainer import Event, Trainer
from hsl_node.status import last_words
from hsl_node.sync.round import Phase, State, Train
from hsl_node.sync.store.exchange import left_by, newest_whole
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.whole import holds

log = logging.getLogger(__name__)

ROOM_LOOK_S = 5.0  # a look at the free space costs nothing
DIVERGED = (
    "nothing more is computed; `hsl-node pause`, then `hsl-node resume` tries again. Where the fused model is spoilt, "
    'all hospitals see the same: agree on a new plan, with fusion = "median" or without the peer that is named. Where '
    "only this site's training is, look at its data; else agree on a lower learning_rate"
)
DATA_FIX = "of the plan: nothing in this run, whoever made it decides for the next; else see `hsl-node data check`"
OWN_FIX = (
    "nothing for the run: it goes on, and what this hospital keeps to itself is learned again. No other hospital has "
    "such files, so look at the disk, and let `hsl-node backup` run every day"
)
COPY = "`hsl-node stop`, then `hsl-node start`: it fetches the file from a peer that has it; after that"


class Training:
    def __init__(self, here: Here, alarms: Alarms, command: list[str] | None) -> None:
        """`command` stands in for the trainer in tests."""
        self._here = here
        self._alarms = alarms
        self.trainer = Trainer(here.layout.state, self._heard, command)
        self.epoch: Event | None = None  # live progress of the trainer
        self.busy: Event | None = None

    async def train(self, action: Train, checkpoint_bytes: int) -> Event:
        """One round's local epochs; gives the trainer's word of the checkpoint that lies in outbox/ then."""
        layout, base = self._here.layout, Round(action.round - 1)
        await self._wait_for_room(checkpoint_bytes)
        try:
            start = await self._start(base, action.base)
            files = {"out": str(layout.outbox(action.round)), "own": str(layout.own(action.round))}
            return await self._run({"job": "train", "round": action.round, **start, **files}, base=base)
        finally:
            self.epoch = self.busy = None

    async def validate_last(self, state: Callable[[], State]) -> None:
        """See `last_to_validate`."""
        layout = self._here.layout
        self._alarms.settle("unvalidated")
        round = last_to_validate(self._here.journal, state())
        try:
            if round is not None:
                start = await self._start(round, state().base)
                await self._run({"job": "validate", "round": round, **start}, base=round)
        except HslError as exc:
            if state().phase is not Phase.HALTED:
                raise
            why, fix = last_words.said(exc)  # nothing may disturb a halt: no end of the daemon, no recovery
            why = f"the last fused model could not be validated: {why}".replace(f"{layout.state}/", "")
            fix = COPY if isinstance(exc, Altered) else fix
            await self._stand_still("unvalidated", why, f"{fix}: `hsl-node pause`, then `hsl-node resume`")
            raise
        finally:
            self.busy = None
        await self.trainer.stop()  # nothing more to train: give the memory back

    async def _start(self, round: Round, base: Digest) -> dict[str, Any]:
        """What whoever goes on from the fusion of `round` begins with, as the trainer's jobs have it.

        Raises:
            Altered: the method reads the checkpoints of that round, and one is gone or altered.
        """
        here, card = self._here, self._here.federation.plan.card
        left = left_by(here.journal, here.layout, here.me, round)
        full_set = left.full_set if Need.FULL_SET in card.needs else {}
        for peer, (path, sha256) in full_set.items():
            if not await asyncio.to_thread(holds, path, sha256):
                raise Altered(f"{path}, the checkpoint of {peer} in round {round}, is gone or altered on this disk")
        mine = await asyncio.to_thread(newest_whole, here.layout, here.journal.own_digests(), round)
        if mine is not None and mine[0] < round and not card.keeps:
            mine = None
        if round > 0 and card.keeps and (mine is None or mine[0] < round):
            self._tell_own_lost(round, mine[0] if mine else None)
        else:
            self._alarms.settle("own")
        return {
            "base": str(here.layout.fused(round)),
            "base_sha256": base,
            "said": left.said,
            "samples": left.samples,
            "full_set": {peer: str(path) for peer, (path, _) in full_set.items()},
            "mine": str(mine[1]) if mine else None,
            "mine_sha256": mine[2] if mine else None,
        }

    def _tell_own_lost(self, round: Round, older: Round | None) -> None:
        what = self._here.layout.own(round).relative_to(self._here.layout.state)
        text = f"the tensors of round {round} that only this hospital has are lost ({what}): it goes on "
        text += f"with those of round {older}" if older else "without them, and what it keeps to itself begins anew"
        if "own" not in self._alarms:
            self._here.journal.note("warning", "own", text)
        self._alarms.sound("own", text, OWN_FIX)

    async def _run(self, job: dict[str, Any], base: Round) -> Event:
        """A job of the trainer, on the fused model of round `base`. One that gives no finite numbers is over, but not
        the daemon: it stays reachable, says so, and the operator may have it tried again.

        Raises:
            HslError: what only the operator's files can mend.
        """
        self._alarms.settle("diverged")
        try:
            return await self.trainer.run(job)
        except Diverged as exc:
            fault = poisoning.named_in(self._here.journal, base)
            text = exc.message + (f". In the fusion that it began with: {fault}" if fault else "")
            await self._stand_still("diverged", text, DIVERGED)
            raise

    async def _stand_still(self, code: str, text: str, fix: str) -> None:
        """A job is over, but not the daemon: until `pause`, or the end."""
        self.epoch = self.busy = None
        self._alarms.sound(code, text, fix)
        self._here.journal.note("error", code, text)
        await self.trainer.stop()
        await asyncio.Event().wait()

    async def _wait_for_room(self, checkpoint_bytes: int) -> None:
        here = self._here
        try:
            while True:
                try:
                    return here.store.require_room(checkpoint_bytes, len(here.federation.peers), here.reserve_bytes)
                except LocalStateError as exc:
                    self._alarms.sound("disk", exc.message, exc.remedy)
                    await asyncio.sleep(ROOM_LOOK_S)
        finally:
            self._alarms.settle("disk")  # also where training was paused meanwhile: nobody waits for room then

    # ------------------------------------------------------------------ the trainer's word

    def _heard(self, event: Event) -> None:
        here, journal = self._here, self._here.journal
        with journal.transaction():
            match event.get("event"):
                case "initialised":
                    self.busy = None  # images are decoded, and this may be followed by a long wait for the peers
                    journal.set_meta("samples", str(event["images"]["train"]))
                    journal.set_meta("split", json.dumps(event.get("split", {})))  # how it was made, with counts
                    journal.set_meta("torch", str(event["versions"]["torch"]))
                    journal.set_meta("device", str(event["device"]))
                    journal.set_meta(
                        "score_name", here.federation.plan.card.score_name
                    )  # for who looks while it is down
                    journal.set_meta("private", "1" if here.federation.plan.card.keeps else "0")
                    warnings = event.get("warnings", ())
                    for number, text in enumerate(warnings):
                        self._alarms.sound(f"data {number}", text, DATA_FIX)
                    number = len(warnings)
                    while f"data {number}" in self._alarms:  # of the images as an earlier trainer found them
                        self._alarms.settle(f"data {number}")
                        number += 1
                case "progress":
                    self.epoch = event
                    self.busy = None
                case "busy":
                    self.busy = event
                case "epoch":
                    journal.record_epoch(event["round"], event["epoch"], event)
                    terms = ", ".join(f"{name} {digits(mean)}" for name, mean in event["terms"].items())
                    told = {k: event.get(k) for k in ("round", "epoch", "score", "validation_loss")}
                    log.info("epoch", extra={**told, "terms": terms})
                case "validated":
                    again = event["recalibrated"] or {}
                    recalibrated = again.get("score"), again.get("loss")
                    journal.record_validation(event["round"], event["score"], event["loss"], recalibrated)
                    figures = {"score": event["score"], "recalibrated": recalibrated[0]}
                    log.info("fused model validated", extra={"round": event["round"], **figures})
                    poisoning.record_validation(journal, here.me, event)
                    poisoning.renew(journal, self._alarms, here.me, here.federation.peers)
                case "trained":
                    journal.record_own(event["round"], event["own_sha256"], event["score"], event["loss"])


def last_to_validate(journal: Journal, state: State) -> Round | None:
    """The last fusion has no next round to be validated in, nor has that before a halt."""
    if state.phase not in (Phase.AGREE, Phase.FINISHED, Phase.HALTED) or state.round == 0:
        return None
    return journal.last_unvalidated()
