"""How each kind of fault of `chaos_plan.py` is done to a simulated federation, and undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos_disk import FailingJournal
from chaos_plan import Fault
from virtual_time import BEGIN_S, context_of

from hsl_node.federation.names import INBOX, FileName, Kind, Peer

if TYPE_CHECKING:
    from chaos_sim import World
    from chaos_site import Site


def befall(world: World, fault: Fault) -> None:
    """Let it happen now. A fault that ends by itself ends no later than all of them."""
    site, now = world.sites[fault.peer], world.loop.now
    until = min(now + fault.lasts_s, BEGIN_S + world.plan.calm_s)
    world.say("FAULT", str(fault))
    world.outcome.faults[fault.kind] += 1
    there = (fault.peer, fault.other)
    match fault.kind:
        case "kill" | "power":
            site.kill(power=fault.kind == "power")
        case "crash" | "blackout":
            if site.life is not None:
                site.life.fuse = (fault.count, fault.kind == "blackout")
        case "stop":
            site.stop()
        case "full":
            site.disk.full = True
            world.net.later(until, setattr, site.disk, "full", False)
        case "disk":
            site.disk.fails = (fault.what, fault.count, fault.code)
        case "journal":
            if site.life is not None and site.life.store is not None:
                FailingJournal(site.life.store.journal, site.disk, fault.count, fault.what == "done")
        case "rot":
            _alter(world, site)
        case "back":
            if site.take_snapshot():
                world.net.later(until, site.set_back)
        case "cut":
            world.net.ways[there].cut_after = fault.count
        case "hole":
            _hold(world, [there, there[::-1]], until)
        case "mute" | "deaf":
            _hold(world, [there if fault.kind == "mute" else there[::-1]], until)
        case "slow":
            way = world.net.ways[there]
            way.bytes_per_s = fault.count
            world.net.later(until, setattr, way, "bytes_per_s", 2e6)
        case "refuse":
            world.net.ways[there].refuses_until = until
        case "part":
            one = set(fault.what.split(","))
            _hold(world, [(a, b) for a, b in world.net.ways if (a in one) != (b in one)], until)
        case "again":
            _deliver_again(world, *there)
        case _:
            raise AssertionError(fault.kind)


def heal(world: World) -> None:
    """All that could still go wrong is taken away; what is down comes up by itself."""
    world.say("FAULT", "no more")
    for site in world.sites.values():
        site.disk.full, site.disk.fails = False, None
        if site.life is not None:
            site.life.fuse = None
            if site.life.store is not None and isinstance(site.life.store.journal._db, FailingJournal):
                site.life.store.journal._db._left = 0  # type: ignore[unreachable]
    for way in world.net.ways.values():
        way.bytes_per_s, way.cut_after = 2e6, None


def _hold(world: World, ways: list[tuple[Peer, Peer | None]], until: float) -> None:
    for way in ways:
        world.net.ways[way].held_until = max(world.net.ways[way].held_until, until)  # type: ignore[index]


def _alter(world: World, site: Site) -> None:
    """One bit of one checkpoint, as it lies on the disk; who is alive is not told, and who is down neither."""
    state = site.layout.state
    files = [p for where in ("outbox/r*", "inbox/r*/*", "fused/r*") for p in sorted(state.glob(f"{where}.safetensors"))]
    if not files:
        return
    path = world.rng.choice(files)
    content = bytearray(path.read_bytes())
    at, bit = world.rng.randrange(len(content)), 1 << world.rng.randrange(8)
    content[at] ^= bit
    path.write_bytes(content)
    site.altered.setdefault(path, []).append((at, bit))
    world.say("FAULT", f"altered {path.relative_to(state)}")


def _deliver_again(world: World, sender: Peer, receiver: Peer | None) -> None:
    """What `sender` signed last lies in the receiver's inbox once more, as a copy that was long on its way."""
    assert receiver is not None
    here, there = world.sites[sender].life, world.sites[receiver].life
    if here is None or here.store is None or there is None or there.node is None or there.node.server is None:
        return
    journal, server = here.store.journal, there.node.server
    round = journal.last_signed()
    signed = journal.signed(round) if round is not None else None
    folder = there.site.layout.homes / sender / INBOX
    if round is None or signed is None or not folder.is_dir():
        return
    data = here.site.layout.outbox(round)
    name = FileName(there.site.federation.fed8, round, sender, signed[0], Kind.DATA)
    files = {str(name): data.read_bytes()} if data.exists() else {}
    for file, content in {**files, str(name.of(Kind.MANIFEST)): signed[1]}.items():
        if not (folder / file).exists():
            (folder / file).write_bytes(content)
    context_of(there).run(server.admission.on_commit, sender)
