"""`doctor` names what is broken, and `ping` logs in at the real inbox."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncssh
import pytest
from cluster import WAIT_S, Cluster
from command_line import shell
from memory_file import in_memory
from ports import free_ports

from hsl_node.admin import doctor
from hsl_node.admin.ping import ping, text
from hsl_node.errors import ConfigError, LocalStateError, UsageError
from hsl_node.federation import config, identity, node_toml, strings
from hsl_node.federation.identity import LIFE_NAMESPACE
from hsl_node.federation.names import Peer
from hsl_node.federation.node_toml import TrainConfig
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here
from hsl_node.node.pulse import Pulse
from hsl_node.sync import life
from hsl_node.sync.store.room import Quota
from hsl_node.sync.store.store import Store


def outcomes(state: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    return {check.name: check.outcome for check in doctor.examine(state)}


def beside(state: Path, work: Callable[[], Any], members: config.Federation | None = None) -> Any:
    """Do something while the real inbox of this node listens."""
    from hsl_node.sync.inbox.admission import Admission
    from hsl_node.sync.inbox.server import InboxServer

    node = node_toml.load_node(state)

    async def serving() -> Any:
        admission = Admission(
            federation=members or config.load_federation(state), me=Peer(node.name), data_bytes=1000,
            on_commit=lambda peer: None, on_connect=lambda peer: None,
        )  # fmt: skip
        server = InboxServer(admission, identity=identity.load(Layout(state).key), homes=Layout(state).homes)
        await server.start(*strings.split_address(node.listen))
        try:
            return await asyncio.to_thread(work)
        finally:
            await server.stop()

    return asyncio.run(serving())


def test_doctor_finds_a_key_that_is_not_the_pinned_one(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that answers is not yet the peer."""
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    ash, birch = two
    pinned = strings.fingerprint(identity.load(Layout(birch).key).public)
    Layout(birch).key.unlink()
    identity.generate(Layout(birch).key)
    (check,) = [c for c in beside(birch, lambda: doctor.examine(ash)) if c.name == "peer birch"]
    assert (check.outcome, check.exit_code) == ("failed", 12)
    assert pinned in check.text and "peer update" in check.fix


def test_doctor_finds_a_sound_node_sound(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = beside(two[1], lambda: outcomes(two[0], monkeypatch))
    assert set(checks.values()) == {"ok"} and "peer birch" in checks
    assert doctor.exit_code(doctor.examine(two[0])) == 13, "birch is away now"


def test_doctor_proves_that_torch_computes() -> None:
    assert " on " in doctor._torch(TrainConfig())


def test_doctor_misses_the_gpus_that_are_to_train_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` would refuse them."""
    monkeypatch.setattr(doctor, "_TORCH", """print('{"version": "2.9", "devices": ["A", "B"]}')""")
    assert doctor._torch(TrainConfig(gpus=2)) == "2.9 on A, B"
    assert doctor._torch(TrainConfig(device="cpu", gpus=3)) == "2.9 on A, B"
    for wrong in (TrainConfig(gpus=3), TrainConfig(device="cuda:1", gpus=2)):
        with pytest.raises(ConfigError, match=r"torch 2.9 sees 2 GPU\(s\), node.toml says device = .*, gpus = [23]"):
            doctor._torch(wrong)
    monkeypatch.setattr(doctor, "_TORCH", """print('{"version": "2.9", "devices": []}')""")
    for wrong in (TrainConfig(gpus=2), TrainConfig(device="cuda")):
        with pytest.raises(ConfigError, match=r"torch 2.9 sees 0 GPU") as refused:
            doctor._torch(wrong)
        assert "train.gpus = 1" in refused.value.remedy and 'train.device = "cpu"' in refused.value.remedy


@pytest.mark.parametrize(
    ("fault", "check", "code"),
    [
        (lambda s: s.chmod(0o755), "state directory", 15),
        (lambda s: (s / "node.toml").write_text("nmae = 1"), "settings", 78),
        (lambda s: Layout(s).key.chmod(0o644), "key", 15),
        (lambda s: Layout(s).key.unlink(), "key", 10),
        (lambda s: (s / "federation.toml").unlink(), "federation", 10),
        (lambda s: _edit(s / "node.toml", 'address = "127', 'address = "128'), "federation", 78),
        (lambda s: _edit(s / "node.toml", "/images", "/imagse"), "images", 15),
        (lambda s: _edit(s / "node.toml", 'listen = "127', 'listen = "192.0.2.1:1" # "'), "port", 15),
    ],
)
def test_doctor_names_what_is_broken(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], object], check: str, code: int
) -> None:
    fault(two[0])
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    checks = doctor.examine(two[0])
    first = next(c for c in checks if c.outcome == "failed")
    assert (first.name, first.exit_code) == (check, code) and first.fix
    assert doctor.exit_code(checks) == code
    assert first.fix.split()[0] in doctor.text(checks, colour=False)


@pytest.mark.parametrize("free", [3_900_000, 136_000_000, 268_500_000, 10**12])
def test_the_disk_is_not_sound_while_the_daemon_says_that_it_takes_no_checkpoint_in(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Doctor, status, and the daemon's two alarms go by the same figures."""
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    monkeypatch.setattr("hsl_node.sync.store.store.shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    store, node = Store(Layout(two[0])), config.load_federation(two[0])
    with closing(store):
        store.layout.fused(0).write_bytes(bytes(100_000))
        here, alarms, nothing = Here(node_toml.load_node(two[0]), node, store), Alarms(), cast(Any, None)
        Pulse(here, alarms, nothing, lambda: None, lambda: 100_000)._watch_room()
        (disk,) = [c for c in doctor.examine(two[0]) if c.name == "disk"]
        refuses = "room" in alarms
        try:
            store.require_room(100_000, 2, Quota.reserve_bytes)
            starts = True
        except LocalStateError:
            starts = False
    assert (disk.outcome == "ok") == (starts and not refuses) == (free == 10**12), disk
    if refuses:
        assert disk.text == alarms.listing()[0]["text"] and disk.fix


def test_a_taken_port_has_the_same_exit_code_and_words_from_doctor_and_start(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(strings.split_address(node_toml.load_node(two[0]).listen)):
        monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
        check = next(c for c in doctor.examine(two[0]) if c.name == "port")
        started = shell("--state", two[0], "start")
    assert (check.outcome, check.exit_code, started.returncode) == ("failed", 15, 15)
    assert check.text in started.stderr and check.fix in started.stderr
    assert not (two[0] / "log" / "trainer.log").exists() and not Layout(two[0]).fused(0).exists()


def test_a_port_that_only_a_mapping_makes_right_is_noted(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    (port,) = free_ports(1)
    _edit(two[0] / "node.toml", f'listen = "{node_toml.load_node(two[0]).listen}"', f'listen = "127.0.0.1:{port}"')
    check = next(c for c in doctor.examine(two[0]) if c.name == "port")
    told = strings.split_address(node_toml.load_node(two[0]).address)[1]
    assert check.outcome == "warning" and str(port) in check.text and str(told) in check.text and check.fix


def test_the_note_about_the_ports_goes_when_a_peer_comes_in(tmp_path: Path) -> None:
    """Behind a mapping (here: birch is told the port where ash really listens) it is no fault."""
    with Cluster(tmp_path, ("ash", "birch"), Plan(method="fedavg", rounds=1, epochs_per_round=1)) as cluster:
        settings = cluster.layout("ash").state / "node.toml"
        _edit(settings, f'address = "127.0.0.1:{cluster.ports["ash"]}"', 'address = "127.0.0.1:1"')
        cluster.start("ash")
        noted = lambda s: any(w["code"] == "ports" for w in s["warnings"])  # noqa: E731
        cluster.wait_until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch")
        assert noted(cluster.status("ash"))
        cluster.start("birch")
        cluster.wait_finished()
        assert not noted(cluster.status("ash"))


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _another_key() -> str:
    return identity.Identity(asyncssh.generate_private_key("ssh-ed25519")).public


@pytest.mark.parametrize(
    ("fault", "check", "code"),
    [
        (lambda s: Layout(s).journal.write_bytes(random.Random(1).randbytes(8192)), "journal", 15),
        (lambda s: _edit(s / "federation.toml", "rounds = 1", "rounds = 2"), "journal", 17),
        (lambda s: shutil.copy(Layout(s.parent / "birch").journal, Layout(s).journal), "journal", 17),
    ],
)
def test_what_start_refuses_doctor_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], object], check: str, code: int
) -> None:
    """A journal that is none any more, or another hospital's, and a federation.toml that was edited in mid-run."""
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    with Cluster(tmp_path, ("ash", "birch"), Plan(method="fedavg", rounds=1, epochs_per_round=1)) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        assert cluster.stop("ash") == cluster.stop("birch") == 0
        state = cluster.layout("ash").state
        sound = {c.name: c.outcome for c in doctor.examine(state)}
        assert sound["journal"] == "ok"
        for beside in state.glob("journal.sqlite3-*"):
            beside.unlink()
        fault(state)
        failed = next(c for c in doctor.examine(state) if c.name == check)
        assert (failed.outcome, failed.exit_code) == ("failed", code) and failed.fix
        assert cluster.start("ash").wait(WAIT_S) == code
        assert failed.text in cluster.output("ash")


def test_a_federation_file_that_was_edited_after_it_was_joined_starts_nothing(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joining looks for the same; the others would only say later that this one joined another file."""
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    state = two[0]
    _edit(Layout(state).federation_toml, "seed = ", "seed = 7")
    done = shell("--state", state, "start")
    assert done.returncode == 78 and "it was edited after it was made" in done.stderr
    assert any("it was edited" in check.text for check in doctor.examine(state) if check.outcome == "failed")


def test_ping_logs_in_at_the_real_inbox_and_tells_refusal_from_absence(two: tuple[Path, Path]) -> None:
    ash, birch = two
    federation = config.load_federation(birch)
    serve = lambda members: beside(birch, lambda: ping(ash, []), members)  # noqa: E731
    (answer,) = serve(federation)
    assert answer.exit_code == 0 and answer.seconds > 0
    stranger = federation.get("ash").model_copy(update={"key": _another_key()})
    (answer,) = serve(federation.model_copy(update={"peer": (stranger, federation.get("birch"))}))
    assert answer.exit_code == 12 and "does not accept our key" in answer.error
    (answer,) = ping(ash, ["birch"])
    assert answer.exit_code == 13
    with pytest.raises(UsageError, match="is this node"):
        ping(ash, ["ash"])


def test_doctor_and_ping_name_another_federation_file_a_wrong_clock_and_a_pause_over_there(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ash, birch = two
    mine, key = config.load_federation(birch), identity.load(Layout(birch).key)
    said: dict[str, Any] = {"federation": mine.digest, "peer": "birch", "paused_s": None}

    def beside_birch() -> tuple[str, str, str]:
        """What doctor makes of birch, and what ping says of it."""
        from hsl_node.sync.inbox import server

        def offer(peer: Peer, name: str, twice: bool) -> int:
            assert name == f"{mine.fed8}.life", "a command says nothing of the life of its node"
            return in_memory(key.sign(life.Life(**said).content(), LIFE_NAMESPACE))

        made = server.InboxServer
        monkeypatch.setattr(server, "InboxServer", lambda admission, **rest: _offering(made(admission, **rest), offer))
        monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
        checks, (answer,) = beside(birch, lambda: (doctor.examine(ash), ping(ash, [])))
        monkeypatch.setattr(server, "InboxServer", made)
        check = next(c for c in checks if c.name == "peer birch")
        return check.outcome, check.text, text(answer)

    def _offering(server: Any, offer: Any) -> Any:
        server.admission.offer = offer
        return server

    said["at"] = int(time.time())
    assert beside_birch()[0] == "ok"
    said["at"] = int(time.time()) + 1830
    assert beside_birch()[:2] == ("warning", "its clock is 30 min ahead of this one")
    said |= {"at": int(time.time()), "paused_s": 7200}
    outcome, _, shown = beside_birch()
    assert outcome == "warning" and "paused by its operator for 2 h 00 min" in shown
    said["federation"] = "5adf52bc" + "0" * 56
    outcome, found, shown = beside_birch()
    assert outcome == "failed" and f"(5adf52bc, ours is {mine.fed8})" in found and "federation diff" in shown


def test_doctor_asks_whether_the_address_that_the_others_have_ends_here(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon runs, so its port is its own; that says nothing of the address that was agreed on."""
    ash, birch = two
    monkeypatch.setattr(doctor, "ask", lambda state, what: {"status": {"pid": 4711}})

    def port() -> doctor.Check:
        return doctor._check("port", lambda: doctor._port(ash, node_toml.load_node(ash)))

    assert beside(ash, port).outcome == "ok"
    away = port()
    assert away.outcome == "warning" and "does not end there: ash at 127.0.0.1" in away.text
    Layout(ash).key.rename(ash / "key")
    identity.generate(Layout(ash).key)
    assert "shows the host key" in beside(ash, port).text, "another machine answers there"
    assert birch


def test_doctor_says_which_congestion_control_fast_lines_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "congestion_control", lambda: "bbr")
    assert doctor._line() == "bbr on fast lines"
    monkeypatch.setattr(doctor, "congestion_control", lambda: "cubic")
    assert doctor._line().startswith("cubic") and "bbr" in doctor._line()
