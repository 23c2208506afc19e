"""A federation of real daemons on this machine: state folders, keys, ports, processes. For tests and benchmarks.

with Cluster(tmp_path, names=("ash", "birch"), plan=Plan(method="fedavg", rounds=2)) as cluster:
    cluster.start_all()
    cluster.wait_finished()
    assert cluster.fused_digests_agree()
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import tomli_w
from ports import free_ports

from hsl_node.errors import NotRunning
from hsl_node.federation import identity
from hsl_node.federation.config import AnchorCard, Federation, PeerCard, federation_text
from hsl_node.federation.plan import Plan
from hsl_node.host.control import ask
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal

STAND_IN = Path(__file__).resolve().parents[2] / "benchmarks" / "stand_in_trainer.py"
# `hsl-node start`, with another trainer command
_START = """
import sys
from pathlib import Path
from hsl_node.host import event_log
from hsl_node.node import launch
from hsl_node.errors import HslError
state = Path(sys.argv[1])
event_log.setup(state)
try:
    sys.exit(launch.run(state, sys.argv[2:]))
except HslError as exc:
    print(f"Error: {exc}", file=sys.stderr)
    sys.exit(exc.exit_code)
"""
WAIT_S = 240  # a bound for a broken run; never what decides a test
# How long it takes to act on what was seen. With 1.5 every test must still pass, as on a very busy machine.
SLOW_POLL_S = float(os.environ.get("HSL_TEST_SLOW_POLL", "0"))


@dataclass(frozen=True)
class Tree:
    """Another version of hsl-node, in a folder of its own."""

    folder: Path
    start: str  # Python that does there what `_START` does here

    @property
    def stand_in(self) -> Path:
        return self.folder / STAND_IN.relative_to(STAND_IN.parents[1])

    @property
    def environment(self) -> dict[str, str]:
        """With it, and that folder as its own, a Python process is of that version, and what it starts too."""
        return {"PYTHONPATH": str(self.folder)}


class Cluster:
    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        plan: Plan,
        *,
        trainer: Sequence[str] | None = (),
        anchor: AnchorCard | None = None,
        node: Mapping[str, Any] = {},
        via: Mapping[str, str] = {},
        prelude: str = "",
        ports: Mapping[str, int] = {},
    ) -> None:
        """`trainer`: arguments of the stand-in trainer; None: the real one. `node`: more settings for every node.toml.

        `via`: peer -> address at which the *others* reach it (a proxy); it listens on a port of its own, or on that
        of `ports`. `prelude`: Python that every daemon runs first, to shorten a wait or to bend its clock;
        `sys.argv[1]` is its state directory.
        """
        self.root, self.names = root, tuple(names)
        self.trainer = trainer
        self.prelude = prelude
        self.trees: dict[str, Tree] = {}  # whose node is of another version than this one
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._meant_to_end: set[str] = set()
        self.ports = dict(zip(self.names, free_ports(len(self.names)), strict=True)) | dict(ports)
        keys = {n: identity.generate(self.layout(n).key) for n in self.names}
        cards = [
            PeerCard(name=n, address=via.get(n, f"127.0.0.1:{self.ports[n]}"), key=keys[n].public) for n in self.names
        ]
        self.federation = Federation(name="cluster", plan=plan, peer=tuple(cards), anchor=anchor)
        for name in self.names:
            layout = self.layout(name)
            layout.make()
            address = f"127.0.0.1:{self.ports[name]}"
            content = {"name": name, "address": address, "listen": address, **node}
            (layout.state / "node.toml").write_text(tomli_w.dumps(content))
            (layout.state / "federation.toml").write_text(federation_text(self.federation))

    def layout(self, name: str) -> Layout:
        return Layout(self.root / name)

    def start(self, name: str, **environment: str) -> subprocess.Popen[bytes]:
        self._meant_to_end.discard(name)
        state, tree = str(self.layout(name).state), self.trees.get(name)
        stand_in, start, place = (tree.stand_in, tree.start, tree.environment) if tree else (STAND_IN, _START, {})
        trainer: list[str] = []  # the real one
        if self.trainer is not None:
            hold = str(self.hold_file(name))
            trainer = [sys.executable, str(stand_in), "--state", state, "--hold", hold, *self.trainer]
        command = [sys.executable, "-m", "hsl_node.cli", "--state", state, "start"]
        if trainer or self.prelude:
            command = [sys.executable, "-c", f"{self.prelude}\n{start}", state, *trainer]
        with open(self.layout(name).state / "log" / "output.txt", "ab") as output:
            self.processes[name] = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                cwd=tree and tree.folder,
                env={**os.environ, **place, **environment},
            )
        return self.processes[name]

    def start_all(self) -> None:
        for name in self.names:
            self.start(name)

    def hold(self, name: str, round: int = 1) -> None:
        """Its stand-in trainer ends no epoch of this round or a later one until `release`, however long that is."""
        file = self.hold_file(name)
        file.with_suffix(".new").write_text(str(round))
        file.with_suffix(".new").replace(file)

    def release(self, name: str) -> None:
        self.hold_file(name).unlink()

    def hold_file(self, name: str) -> Path:
        return self.root / f"{name}.hold"  # not in its state directory, which some tests lose

    def crash(self, name: str, point: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Start it, and wait until the daemon has killed itself at this point of `host/durable.py`.

        `meanwhile`: called once it has been started; it lets the daemon come to that point.
        """
        mark = self.root / f"crash{sum(1 for _ in self.root.glob('crash*'))}"
        process = self.start(name, HSL_CRASH_AT=f"{point} {mark}")
        meanwhile()
        assert process.wait(WAIT_S) == -signal.SIGKILL, f"{point}\n{self.output(name)}"
        assert mark.read_text() == str(process.pid), "the daemon died, not its trainer"

    def kill(self, name: str) -> None:
        """SIGKILL: nothing is saved that was not saved."""
        self._meant_to_end.add(name)
        self.processes[name].kill()
        self.processes[name].wait()

    def stop(self, name: str) -> int:
        self._meant_to_end.add(name)
        self.processes[name].send_signal(signal.SIGTERM)
        return self.processes[name].wait(WAIT_S)

    def status(self, name: str) -> dict[str, Any]:
        """Raises: NotRunning."""
        status: dict[str, Any] = ask(self.layout(name).state, "status", WAIT_S)["status"]
        time.sleep(SLOW_POLL_S)
        return status

    def wait_until(
        self, name: str, wanted: Callable[[dict[str, Any]], bool], what: str, every_s: float = 0.02
    ) -> dict[str, Any]:
        """Poll one node's status until it is as wanted."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            for other, process in self.processes.items():
                code = process.poll()
                ended = code is not None and (other == name or other not in self._meant_to_end)
                assert not ended, f"{other} ended with {code} while {name} was to be: {what}\n{self.output(other)}"
            try:
                status = self.status(name)
            except NotRunning:
                status = {}
            if status and wanted(status):
                return status
            time.sleep(every_s)
        raise AssertionError(f"{name} never came to: {what}; it says {status}\n{self.output(name)}")

    def wait_finished(self, every_s: float = 0.02) -> None:
        for name in self.names:
            self.wait_until(name, lambda s: s["state"] == "finished", "finished", every_s)

    def finish_in_step(self, first: str, second: str) -> None:
        """To the end of a run of these two, in which `first` gets a receipt for each round.

        Else the second's next manifest may come before its receipt, and is as good: `_still_owed` in sync/round.py.
        """
        self.hold(second)
        self.start_all()
        for round in range(1, self.federation.plan.rounds + 1):
            self.wait_until(
                first, lambda s, r=round: (s["round"], s["state"]) == (r, "waiting"), f"round {round} delivered"
            )  # type: ignore[misc]
            self.hold(second, round + 1)
        self.wait_finished()
        last = f"round {self.federation.plan.rounds + 1}: accepted"
        self.wait_until(first, lambda s: all(p["receipt"] == last for p in s["peers"]), last)

    def output(self, name: str) -> str:
        return (self.layout(name).state / "log" / "output.txt").read_text()[-4000:]

    def fused(self, name: str) -> dict[int, str]:
        """Digest of every fused model this node's journal holds, by round."""
        with Journal.read_only(self.layout(name).journal) as journal:
            return {r["round"]: r["sha256"] for r in journal.rows("fused")}

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def final_digests(cluster: Cluster) -> dict[int, str]:
    """The digests of all rounds, after making sure that every peer has the same ones, on disk too."""
    digests = [cluster.fused(n) for n in cluster.names]
    assert all(d == digests[0] for d in digests)
    for name in cluster.names:
        last = max(digests[0])
        path = cluster.layout(name).fused(last)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digests[0][last]
    return digests[0]


def warned(status: dict[str, Any], code: str) -> bool:
    return any(w["code"] == code for w in status["warnings"])


def peer(status: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(p for p in status["peers"] if p["name"] == name)
    return found
