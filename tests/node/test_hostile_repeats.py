"""A peer that delivers what was accepted long ago, again and again: it costs its receiver next to nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from cluster import Cluster, warned
from hostile import Hostile, Signed, put, until
from two_faces import at, begin, face

from hsl_node.federation.names import RECEIPTS, Digest, Kind
from hsl_node.federation.plan import Plan
from hsl_node.host import control

PLAN = Plan(method="fedavg", fusion="mean", rounds=5, epochs_per_round=1, plateau_rounds=100)
TIMES = 5
# Each check of a checkpoint is told, each line is written, and birch takes its time after what it knows.
TELL = """
import sys
import hsl_node.node.intake, hsl_node.sync.inbox.receive as receive
from hsl_node.host.log_limit import LogLimit
LogLimit.allows = lambda self, who: True
hsl_node.node.intake.AGAIN_S = 3600 if sys.argv[1].endswith("birch") else 0.01
genuine = receive.check_file
def told(path, *args, **more):
    print("CHECKED", path.name, file=sys.stderr, flush=True)
    return genuine(path, *args, **more)
receive.check_file = told
"""


def test_threat_04_what_was_accepted_is_not_checked_again_and_not_told_again(tmp_path: Path) -> None:
    with Cluster(tmp_path, ("ash", "birch", "cedar"), PLAN, prelude=TELL) as cluster:
        begin(cluster)
        manifest, data = face(cluster, 1.0)
        for name in ("ash", "birch"):
            control.ask(cluster.layout(name).state, "pause")
        asyncio.run(asyncio.wait_for(repeated(cluster, manifest, data), 200))
        lines = (cluster.layout("ash").state / "log" / "output.txt").read_text().splitlines()
        assert sum("CHECKED" in x and "cedar" in x for x in lines) == 1
        assert sum("checkpoint verified" in x and "peer=cedar round=1" in x for x in lines) == 1


def test_threat_20_what_was_accepted_before_ends_no_alarm(tmp_path: Path) -> None:
    """cedar sent rubbish and its accepted manifest by turns: the alarm was gone whenever somebody looked."""
    with Cluster(tmp_path, ("ash", "birch", "cedar"), PLAN) as cluster:
        cluster.hold("birch")  # all of it in round 1
        begin(cluster)
        manifest, data = face(cluster, 1.0)
        asyncio.run(asyncio.wait_for(by_turns(cluster, manifest, data), 200))


async def by_turns(cluster: Cluster, manifest: Signed, data: bytes) -> None:
    cedar, shown = at(cluster, "ash"), "refused cedar"
    rubbish = Signed({}, b"rubbish", replace(manifest.name, sha256=Digest("0" * 64)))

    async def taken(what: Signed, with_data: bytes | None = None) -> list[str]:
        await cedar.deliver(what, with_data)
        await until(lambda: not lies(cluster, "ash", what))
        return [w["text"] for w in cluster.status("ash")["warnings"] if w["code"] == shown]

    await taken(rubbish)
    await asyncio.to_thread(cluster.wait_until, "ash", lambda s: warned(s, shown), "refuses it")
    await taken(manifest, data)
    await asyncio.to_thread(cluster.wait_until, "ash", lambda s: not warned(s, shown), "a new manifest ends it")
    await taken(rubbish)
    await asyncio.to_thread(cluster.wait_until, "ash", lambda s: warned(s, shown), "refuses it again")
    (text,) = await taken(manifest)
    assert text.startswith("raised 2 times: cedar sent"), "it is not over"


async def repeated(cluster: Cluster, manifest: Signed, data: bytes) -> None:
    cedar, key = at(cluster, "ash"), cluster.federation.get("ash").key  # type: ignore[arg-type]
    await cedar.deliver(manifest, data)
    assert (await cedar.receipt(manifest, key)).accepted
    receipt = cluster.layout("ash").homes / "cedar" / RECEIPTS / str(manifest.name.of(Kind.RECEIPT))
    for time in range(TIMES):
        if time == TIMES - 1:
            receipt.unlink()
        await again(cluster, "ash", cedar, manifest, data if time == 1 else None)
    assert (await cedar.receipt(manifest, key)).accepted, "a lost receipt is written anew"

    birch = at(cluster, "birch")
    await birch.deliver(manifest, data)
    await again(cluster, "birch", birch, manifest, None)
    await birch.deliver(manifest, None)
    await again(cluster, "ash", cedar, manifest, None)
    assert lies(cluster, "birch", manifest), "what is known is looked at once in a while"


async def again(cluster: Cluster, name: str, cedar: Hostile, manifest: Signed, data: bytes | None) -> None:
    """Deliver once more; wait until nothing of it lies there."""
    await until(lambda: not lies(cluster, name, manifest))
    await cedar.deliver(manifest, data)
    await until(lambda: not lies(cluster, name, manifest))
    async with cedar.sftp() as client:
        if data is not None:
            await put(client, manifest.name.of(Kind.DATA), data)  # the first was thrown away, or this is refused


def lies(cluster: Cluster, name: str, manifest: Signed) -> bool:
    return (cluster.layout(name).homes / "cedar" / "inbox" / str(manifest.name)).exists()
