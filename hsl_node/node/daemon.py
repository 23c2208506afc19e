"""The daemon of one hospital: starts, wires and ends its components. The only file that names them all.

Read `sync/round.py` first: there is what happens in a round. `machine.py` drives it; `training.py`, `fusing.py`,
`signing.py` and `delivery.py` perform its actions; `intake.py` takes in what the others send.

A daemon has two lives, one after the other. *Opening*: the trainer makes the model known, and a node that may have
lost something asks its peers. *Running*: the round is known, and all components exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from hsl_node.errors import Altered, LocalStateError, escaped
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import Identity
from hsl_node.federation.keyring import warnings_of
from hsl_node.federation.methods import Need
from hsl_node.federation.names import Digest, FileName, Peer, Round
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.federation.strings import split_address
from hsl_node.host import durable, systemd
from hsl_node.host.control import serve
from hsl_node.host.durable import Step
from hsl_node.host.moment import Moment
from hsl_node.node import poisoning
from hsl_node.node.alarms import Alarms
from hsl_node.node.before_signing import BeforeSigning
from hsl_node.node.checks import MAPPING_FIX, mapping_needed, require_quota
from hsl_node.node.delivery import Delivery
from hsl_node.node.equivocation import Equivocations
from hsl_node.node.fusing import Fusing
from hsl_node.node.heal import damage, mark
from hsl_node.node.heal.fetch_missing import FetchMissing
from hsl_node.node.heal.fetch_models import FetchModels
from hsl_node.node.heal.recovery import Recovery
from hsl_node.node.heal.set_back import SetBack
from hsl_node.node.here import Here, Keys
from hsl_node.node.inbox_alarms import InboxAlarms
from hsl_node.node.intake import Intake
from hsl_node.node.machine import Happened, Machine, Perform, Wanted
from hsl_node.node.peers.fetch import Fetch
from hsl_node.node.peers.links import Links
from hsl_node.node.peers.liveness import Liveness
from hsl_node.node.peers.serve import Serve
from hsl_node.node.pulse import Pulse
from hsl_node.node.reload import Reload
from hsl_node.node.signing import Signing
from hsl_node.node.tasks import Tasks
from hsl_node.node.training import Training, last_to_validate
from hsl_node.status import last_words
from hsl_node.status.snapshot import Snapshot
from hsl_node.sync import round as rounds
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.limits import Limits
from hsl_node.sync.inbox.server import InboxServer, Incoming
from hsl_node.sync.round import Declare, Fuse, Phase, Push, State, Train
from hsl_node.sync.store import models
from hsl_node.sync.store.store import Store
from hsl_node.weights.checkpoint_file import Schema, read_schema
from hsl_node.weights.whole import holds

log = logging.getLogger(__name__)


class Daemon:
    """`run` is the whole life; everything else reacts."""

    def __init__(
        self,
        config: NodeConfig,
        federation: Federation,
        identity: Identity,
        store: Store,
        snapshot: Callable[[Daemon], Snapshot],
        trainer_command: list[str] | None = None,
    ) -> None:
        """`snapshot`: what `status` shows. `trainer_command` stands in for the trainer in tests."""
        self.here = here = Here(config, federation, store)
        self.alarms = Alarms()
        self.tasks = Tasks(self._failed)
        self.keys = Keys(here, identity)
        self.links = Links(here, self.keys)
        self.liveness = Liveness(
            here, self.keys, self.alarms, self.links, self._paused_s, self._connected_peers, self._needs
        )
        self.links.greet = self.liveness.greet
        self.delivery = Delivery(here, self.keys, self.alarms, self.links, self.liveness)
        self.serve = Serve(here, self.keys, lambda: self.state, self.liveness.exchanged)
        self.training = Training(here, self.alarms, trainer_command)
        self.pulse = Pulse(
            here,
            self.alarms,
            self.training.trainer,
            lambda: self.state,
            self._checkpoint_bytes,
        )
        self.reload = Reload(here, self.keys, self.alarms, self._checkpoint_bytes, self._reloaded)
        self.schema: Schema | None = None  # from here on: None while it is not known, or not there
        self.server: InboxServer | None = None
        self.recovery: Recovery | None = None
        self.running: Running | None = None
        self.started = Moment()
        self.last_seen: dict[Peer, Moment] = {}
        self.paused = here.journal.meta("paused") == "1"
        self.paused_at = Moment(float(here.journal.meta("paused_at") or time.time()))
        self.keys.changed.append(self._keys_changed)
        self._snapshot = snapshot
        self._stopping = asyncio.Event()
        self._stopped_by = ""
        self._fatal: BaseException | None = None

    @property
    def state(self) -> State | None:
        """Of the round; None while opening."""
        return self.running.machine.state if self.running else None

    # ------------------------------------------------------------------ life

    async def run(self) -> int:
        """From start to SIGTERM. Gives the exit code."""
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._stop, sign.name)
        loop.add_signal_handler(signal.SIGHUP, self.reload)

        def failed(error: LocalStateError) -> None:
            """From any thread, whoever catches it; in the last commit too, which no turn of the loop follows."""
            self._fatal = self._fatal or error
            loop.call_soon_threadsafe(self._stopping.set)

        durable.on_failure = failed
        try:
            async with serve(self.here.layout.socket, self._control):
                last_words.note_running(self.here.journal)
                self._tell_keys()
                self.tasks.spawn("pulse", self.pulse.beat())
                self.tasks.spawn("signs of life", self.liveness.watch())
                self.tasks.spawn("begin", self._begin())
                await self._stopping.wait()
                systemd.notify("STOPPING=1", "STATUS=leaving")
                log.info("stopping", extra={"by": self._stopped_by or "an error"})
                await self._end()
                if self._fatal is None:  # else `launch.py` leaves the word
                    last_words.note(self.here.journal, None)
        finally:
            durable.on_failure = lambda error: None
        if self._fatal is not None:
            raise self._fatal
        return 0

    async def _begin(self) -> None:
        """Know the model, open the inbox, take up the round where the journal left it."""
        here = self.here
        initial = await self._initial_weights()
        self.schema = schema = read_schema(here.layout.fused(0))
        require_quota(here.config, schema.file_bytes)
        fetch = Fetch(here, self.alarms, self.links, schema.file_bytes)
        due = self._recovery_due(schema)
        if due is not None:
            await self._open_inbox(schema)  # whoever lost its state too is answered meanwhile
            await self._let_the_disk_rest()
            self.recovery = Recovery(here, self.keys, self.alarms, self.links, fetch, due)
            await self.recovery.run(initial)
        state = self._load_state(initial)
        poisoning.renew(here.journal, self.alarms, here.me, here.federation.peers)
        damage.renew(here.journal, self.alarms, state.round)
        if self.server is None:
            await self._open_inbox(schema)
        self.running = Running(self, schema, fetch, state)
        self.running.start()
        systemd.notify("READY=1")
        log.info("started", extra={"round": state.round, "phase": str(state.phase)})
        self.running.machine.reconcile()

    async def _initial_weights(self) -> Digest:
        journal, trainer, initial = self.here.journal, self.training.trainer, self.here.layout.fused(0)
        known = journal.fused_digests([0]).get(0)
        if known and initial.exists() and not await asyncio.to_thread(holds, initial, known):
            log.warning("the initial weights are altered on this disk, or of another version: they are made anew")
            initial.unlink()
        digest = trainer.initial = known if initial.exists() else None
        if digest is None or journal.state() is None or self._needs_its_gpu():
            made = await trainer.run({"job": "init"})
            # As it was written, not as it lies there: what the disk alters from now on is found where it is read.
            digest = trainer.initial = digest or Digest(made["sha256"])
        return digest

    def _needs_its_gpu(self) -> bool:
        """Only torch can tell whether the GPU that node.toml names is there; better now than when training is due."""
        saved, train = self.here.journal.state(), self.here.config.train
        named = train.device.startswith("cuda") or train.gpus > 1
        return named and not (saved and saved["phase"] == Phase.FINISHED)

    def _recovery_due(self, schema: Schema) -> mark.Mark | None:
        """Told to, or needed: what the saved state relies on is not all there."""
        journal = self.here.journal
        saved = journal.state()
        ours = journal.meta("federation") == self.here.federation.digest
        if saved is not None and ours and mark.find_mark(journal) is None:
            damage.require_whole(journal, self.here.layout, rounds.from_json(saved), schema.file_bytes)
        return mark.due(journal)

    async def _let_the_disk_rest(self) -> None:
        """One that alters files again and again: the peers are asked ever more rarely, and the operator at once."""
        saved = self.here.journal.state()
        pause_s = damage.renew(self.here.journal, self.alarms, saved["round"] if saved else 0)
        if pause_s:
            systemd.notify("READY=1", "STATUS=its disk alters files: look at `hsl-node status`")
            log.error("waits before it asks its peers again", extra={"wait_s": pause_s})
            await asyncio.sleep(pause_s)

    def _load_state(self, initial: Digest) -> State:
        here, journal = self.here, self.here.journal
        saved = journal.state()
        new = State(me=here.me, peers=here.federation.peers, rounds=here.federation.plan.rounds, base=initial)
        if journal.meta("machine") is None:
            journal.set_meta("machine", mark.machine_id())
        if saved is not None and journal.meta("federation") == here.federation.digest:
            state = rounds.from_json(saved)
            if state.round > 0 or state.base == initial:
                return state
        with journal.transaction(Step.START_STATE):
            journal.set_meta("federation", here.federation.digest)
            if journal.meta("instance") is None:
                journal.set_meta("instance", secrets.token_hex(8))
            journal.save_state(rounds.to_json(new))
            journal.record_fused(0, initial)
            journal.record_phase(new.round, new.phase)
        return new

    async def _open_inbox(self, schema: Schema) -> None:
        config = self.here.config
        if not self.here.embedded:
            return
        host, port = split_address(config.listen)
        if note := mapping_needed(config):
            self.alarms.sound("ports", f"{note}. No peer has come in since the start", MAPPING_FIX)
        watch = self._inbox_alarms = InboxAlarms(self.here, self.alarms, schema.file_bytes)
        admission = Admission(
            federation=self.here.federation,
            me=self.here.me,
            data_bytes=schema.file_bytes,
            on_commit=self._delivered_here,
            on_connect=self._connected,
            on_twice=self._seen_twice,
            on_other_federation=self.liveness.federation_of,
            on_full=watch.full,
            on_gone=watch.gone,
            offer=self.serve.open,
            limits=Limits(quota=watch.quota()),
            keyring=self.keys.ring,
        )
        self.server = InboxServer(admission, identity=self.keys.identity, homes=self.here.homes)
        await self.server.start(host, port)

    def _checkpoint_bytes(self) -> int:
        """0: not known yet."""
        return self.schema.file_bytes if self.schema else 0

    def _reloaded(self) -> None:
        if self.server is not None:
            self.server.allow(self._inbox_alarms.quota())

    async def _end(self) -> None:
        """Leave in order: no task, process, socket or transaction stays behind."""
        await self.tasks.end()
        await self.training.trainer.stop()
        if self.server is not None:
            await self.server.stop()

    def _stop(self, by: str) -> None:
        if not self._stopping.is_set():
            self._stopped_by = by
            self._stopping.set()
            last_words.note_asked(self.here.journal, by)

    def _failed(self, error: BaseException) -> None:
        """Whatever nobody could handle ends the process; the journal makes the restart safe."""
        self._fatal = self._fatal or error
        self._stopping.set()
        if isinstance(error, Altered) and self._fatal is error and self.state is not None:
            with contextlib.suppress(LocalStateError):  # no room: the next start finds it again
                what = error.message.replace(f"{self.here.layout.state}/", "")
                damage.found(self.here.journal, self.state.round, what)

    # ------------------------------------------------------------------ the inbox server's word

    def _delivered_here(self, peer: Peer) -> None:
        self.alarms.settle(f"quota {peer}")
        if self.running:
            self.running.intake.wake(peer)

    def _connected(self, peer: Peer) -> None:
        self.last_seen[peer] = Moment()
        self.liveness.heard(peer)
        self.alarms.settle("ports")
        self.links.refused[peer].called()
        self.delivery.wake(peer)
        if self.running:
            self.running.equivocations.connected(peer)
            self.running.missing.connected(peer)

    def _seen_twice(self, peer: Peer, twice: bool) -> None:
        """Two processes with this peer's key take turns in connecting: see `sync/clones.py`."""
        if twice:
            text = f"two nodes with the key of {peer} are at work: a clone, or a copy of its state directory"
            fix = f"call {peer}: it must stop one of them and restart the other; nothing differing is fused meanwhile"
            self.alarms.sound(f"twice {peer}", text, fix)
        else:  # a process that nobody saw before ends nothing by itself: the two may be there still
            self.alarms.settle(f"twice {peer}", when_quiet=True)

    # ------------------------------------------------------------------ who lives

    def _paused_s(self) -> float | None:
        return self.paused_at.ago_s if self.paused and not self.is_over() else None

    def _connected_peers(self) -> Collection[Peer]:
        """Who holds a connection to us; and whose own server takes our checkpoint just now."""
        here, transfers = self.here, self.delivery.transfers
        ours = self.server.admission.connected() if self.server else frozenset()
        taking = {p for p in here.others if transfers[p].state in ("sending", "waiting for receipt")}
        return ours | {p for p in taking if here.federation.get(p).host_key is None}

    def _needs(self, peer: Peer) -> bool:
        """Must this node hear of it, for the run to go on? Whose last statement is here, and has ours, may leave."""
        state = self.state
        if state is None or any(p == peer for _, p in state.owed):
            return True
        match state.phase:
            case Phase.FINISHED | Phase.HALTED:
                return False
            case Phase.AGREE:
                return state.round == 0 or peer in state.missing
            case _:
                return True

    # ------------------------------------------------------------------ keys

    def _keys_changed(self, peers: Collection[Peer], ours: bool) -> None:
        """Sessions of keys that went end, pushes begin anew from the bytes that lie there."""
        if self.server is not None:
            self.server.admission.trust(self.keys.ring)
            if ours:
                self.server.show(self.keys.identity)
        self._tell_keys()
        if self.running:
            self.running.machine.reconcile(lambda key: isinstance(key, Push) and (ours or key.peer in peers))

    def _tell_keys(self) -> None:
        for peer in self.here.federation.peers:
            warnings = warnings_of(self.keys.ring, peer, self.here.me)
            for code in (f"revoked {peer}", f"keys {peer}"):
                self.alarms.sound_or_settle(code, warnings.get(code))

    # ------------------------------------------------------------------ its operator, on the control socket

    async def _control(self, op: str, request: dict[str, Any]) -> dict[str, Any]:
        match op:
            case "status":
                return {"ok": True, "status": self._snapshot(self).as_json()}
            case "pause" | "resume":
                changed, phase = self._pause(op == "pause"), self.state and self.state.phase
                return {"ok": True, "changed": changed, "phase": phase, "over": self.is_over()}
            case "stop":
                self._stop("`hsl-node stop`")
                return {"ok": True}
            case "keys":
                self.keys.read_again()
                return {"ok": True, "fingerprint": self.keys.identity.fingerprint}
            case _:
                return {"ok": False, "error": f"unknown request {escaped(op)!r}"}

    def _pause(self, paused: bool) -> bool:
        """False: it was so before, or there is nothing left to pause."""
        if paused == self.paused or (paused and self.is_over()):
            return False
        self.paused, self.paused_at = paused, Moment()
        self.here.journal.set_meta("paused_at", str(self.paused_at.wall))
        self.here.journal.set_meta("paused", "1" if paused else "0")
        log.info("pause" if paused else "resume")
        self.liveness.tell_all()
        if self.running:
            self.running.machine.reconcile()
        return True

    def is_over(self) -> bool:
        """Nothing is left to compute: no round, no last validation."""
        state = self.state
        if state is None or state.phase not in (Phase.FINISHED, Phase.HALTED):
            return False
        return last_to_validate(self.here.journal, state) is None


class Running:
    """What exists once the model and the round are known, and how it is joined."""

    def __init__(self, daemon: Daemon, schema: Schema, fetch: Fetch, state: State) -> None:
        here, keys, alarms, links = daemon.here, daemon.keys, daemon.alarms, daemon.links
        self._daemon = daemon
        self._schema = schema
        self._fetch = fetch
        self.machine = machine = Machine(here.journal, state, daemon.tasks, self._wanted)
        self.before_signing = BeforeSigning(here, keys, alarms, links)
        self.signing = Signing(here, keys, schema, self._state, self.before_signing.check)
        self.fusing = Fusing(here, alarms, schema, self._state)
        self.equivocations = Equivocations(here, keys, alarms, links, machine)
        self.intake = Intake(here, keys, alarms, machine, schema, self.equivocations, self._taken, self._misses)
        self.set_back = SetBack(here, alarms, machine, self.ask_all, schema.file_bytes)
        recovered = daemon.recovery is not None
        self.missing = FetchMissing(
            here, keys, alarms, links, fetch, machine, self.set_back, self._incoming, self.intake.wake, recovered
        )
        self.models = FetchModels(here, keys, alarms, links, fetch, self._state, lambda: self.missing.at_work)
        links.heard.append(self.set_back.heard)

    def start(self) -> None:
        spawn = self._daemon.tasks.spawn
        self.ask_all()
        spawn("equivocations", self.equivocations.watch())
        spawn("missing", self.missing.watch())
        spawn("models", self.models.watch())
        for peer in self._daemon.here.others:
            spawn(f"intake {peer}", self.intake.watch(peer))

    def ask_all(self) -> None:
        """Whether anybody objects to this process, if that is not being asked."""
        if "ask all" not in self._daemon.tasks:
            self._daemon.tasks.spawn("ask all", self.before_signing.check())

    def _state(self) -> State:
        return self.machine.state

    def _incoming(self, round: Round) -> Sequence[Incoming]:
        return self._daemon.server.incoming(round) if self._daemon.server else ()

    def _misses(self, data: FileName) -> None:
        if self._daemon.server:
            self._daemon.server.home(data.peer).misses(data)

    def _taken(self, peer: Peer) -> None:
        self._daemon.alarms.settle(f"gone {peer}", when_quiet=True)
        self._daemon.last_seen[peer] = Moment()
        self._daemon.liveness.heard(peer)
        self.missing.look()

    # ------------------------------------------------------------------ who performs what

    def _wanted(self, state: State) -> Wanted:
        daemon = self._daemon
        wanted: dict[Any, Perform] = {}
        for action in rounds.todo(state):
            match action:
                case Train() if not daemon.paused:
                    wanted[action] = partial(self._train, action)
                case Declare():
                    wanted[action] = partial(self.signing.declare, action)
                case Fuse():
                    wanted[f"fuse {action.round}"] = partial(self._fuse, action)
                case Push() if not daemon.keys.ring.is_revoked(action.peer):
                    wanted[action] = partial(daemon.delivery.push, action)
        if last_to_validate(daemon.here.journal, state) is not None and not daemon.paused:
            wanted["validate"] = partial(daemon.training.validate_last, self._state)
        return wanted

    async def _train(self, action: Train) -> Happened:
        event = await self._daemon.training.train(action, self._schema.file_bytes)
        return await self.signing.trained(action.round, event)

    async def _fuse(self, action: Fuse) -> None:
        self.machine.tell(await self.fusing.fuse(action))
        here, alarms, round = self._daemon.here, self._daemon.alarms, self.machine.state.round
        poisoning.renew(here.journal, alarms, here.me, here.federation.peers)
        damage.renew(here.journal, alarms, round)
        self._fetch.forget()
        fused, own = models.kept(models.models(here.journal))
        sets = fused if Need.FULL_SET in here.federation.plan.card.needs else frozenset[Round]()
        await asyncio.to_thread(here.store.prune, round, fused | {Round(0)}, own, sets)
