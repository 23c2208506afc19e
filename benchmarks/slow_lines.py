"""Seconds to deliver checkpoints over a shaped line, beside the ideal: bytes through the rate. As root, on Linux.

    python benchmarks/slow_lines.py --rate 32 --mb 0.25 --both
    python benchmarks/slow_lines.py --rate 4000 --peers 63 --mb 2 [--client paramiko]

Two network namespaces with one line between them, which `tc tbf` shapes in each direction (a queue of `--queue` seconds
at its beginning, as a router has). In one is a hospital that pushes to all others; those are in the other one, in one
process, and with `--both` push to it at the same time. Real inboxes, pushes, receipts; no daemon, no fusion.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncssh

from hsl_node.federation.config import Federation, PeerCard
from hsl_node.federation.identity import MANIFEST_NAMESPACE, Identity
from hsl_node.federation.names import Digest, FileName, Kind, Peer
from hsl_node.federation.plan import Plan
from hsl_node.sync.inbox.admission import Admission
from hsl_node.sync.inbox.receive import answer
from hsl_node.sync.inbox.server import InboxServer
from hsl_node.sync.manifest import Manifest
from hsl_node.sync.send.deliver import Parcel, Transfer
from hsl_node.sync.send.push import push
from hsl_node.sync.wire.login import RefusedKey

SPACES = f"hsl-line-{os.getpid()}-a", f"hsl-line-{os.getpid()}-b"
ADDRESSES = "10.213.7.1", "10.213.7.2"
PORT = 20000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=4000, help="kbit/s of each direction")
    parser.add_argument("--queue", type=float, default=1.0, help="seconds of data that the line holds before it drops")
    parser.add_argument("--peers", type=int, default=1, help="hospitals at the other end")
    parser.add_argument("--mb", type=float, default=2.0, help="of one checkpoint")
    parser.add_argument("--both", action="store_true", help="they push as well, at the same time")
    parser.add_argument("--client", choices=["asyncssh", "paramiko"], default="asyncssh")
    parser.add_argument("--end", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.end is not None:
        asyncio.run(one_end(args))
        return
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.peers + 1):
            asyncssh.generate_private_key("ssh-ed25519").write_private_key(f"{folder}/{number}.key")
        try:
            lay(args.rate, args.queue)
            print(json.dumps(measure(args, folder), indent=2))
        finally:
            for space in SPACES:
                subprocess.run(["ip", "netns", "del", space], check=False)


def lay(kbit_per_s: float, queue_s: float) -> None:
    """The line: packets of 1500 bytes, a bucket of two of them or of 5 ms, a queue of so many seconds."""
    for space in SPACES:
        run("ip", "netns", "add", space)
    run("ip", "link", "add", "line", "netns", SPACES[0], "type", "veth", "peer", "name", "line", "netns", SPACES[1])
    burst = max(3100, int(kbit_per_s * 125 * 0.005))
    for space, address in zip(SPACES, ADDRESSES, strict=True):
        run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "line")
        for device in ("lo", "line"):
            run("ip", "-n", space, "link", "set", device, "up")
        rate, limit = f"{kbit_per_s}kbit", str(int(kbit_per_s * 125 * queue_s) + burst)
        run("tc", "-n", space, "qdisc", "add", "dev", "line", "root", "tbf", "rate", rate, "burst", str(burst),
            "limit", limit)  # fmt: skip


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def carried(space: str) -> int:
    """Bytes that went out of this end, with all headers."""
    told = subprocess.run(
        ["tc", "-n", space, "-s", "-j", "qdisc", "show", "dev", "line"], check=True, capture_output=True
    )
    return int(json.loads(told.stdout)[0]["bytes"])


def measure(args: argparse.Namespace, folder: str) -> dict[str, object]:
    own = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
    ends = [
        subprocess.Popen(["ip", "netns", "exec", space, *own, "--end", str(number)],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number, space in enumerate(SPACES)
    ]  # fmt: skip
    try:
        for end in ends:
            assert end.stdin and end.stdout and end.stdout.readline() == "ready\n"
        for end in ends:
            assert end.stdin
            end.stdin.write("go\n")
            end.stdin.flush()
        found = [json.loads(end.stdout.readline()) for end in ends if end.stdout]
        crossed = [carried(space) for space in SPACES]
    finally:
        for end in ends:
            if end.stdin:
                end.stdin.close()
            end.wait()
    ideal_s = args.peers * args.mb * 1e6 * 8 / (args.rate * 1e3)
    seconds = max(f["seconds"] for f in found)
    return {
        "kbit_per_s": args.rate, "peers": args.peers, "mb": args.mb, "both_ways": args.both, "client": args.client,
        "seconds": round(seconds, 1), "ideal_s": round(ideal_s, 1), "ratio": round(seconds / ideal_s, 3),
        "bytes_on_the_line": crossed,
        "sent_twice_bytes": sum(f["twice"] for f in found), "broken_links": sum(f["retries"] for f in found),
        "last_errors": sorted({e for f in found for e in f["errors"]})[:3],
    }  # fmt: skip


async def one_end(args: argparse.Namespace) -> None:
    identities = [
        Identity(asyncssh.read_private_key(str(args.folder / f"{number}.key"))) for number in range(args.peers + 1)
    ]
    cards = tuple(
        PeerCard(name=f"p{number:02}", address=f"{ADDRESSES[number > 0]}:{PORT + number}", key=identity.public)
        for number, identity in enumerate(identities)
    )
    federation = Federation(name="a line", anchor=None, plan=Plan(method="fedavg"), peer=cards)
    data = random.Random(1).randbytes(int(args.mb * 1e6))
    here = [0] if args.end == 0 else list(range(1, args.peers + 1))
    folder = args.folder / str(args.end)
    folder.mkdir()
    (folder / "data").write_bytes(data)
    sites = [Site(folder, federation, n, identities[n], data) for n in here]
    for site in sites:
        await site.server.start(ADDRESSES[args.end], PORT + site.number)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began, transfers = time.monotonic(), []
    if args.end == 0 or args.both:
        to = [(site, card) for site in sites for card in cards if (card.name == "p00") != (args.end == 0)]
        transfers = await asyncio.gather(*(site.send(card, args.client) for site, card in to))
    result: dict[str, Any] = {
        "seconds": time.monotonic() - began,
        "twice": sum(t.resent_bytes for t in transfers),
        "retries": sum(t.retries for t in transfers),
        "errors": [t.last_error for t in transfers if t.last_error],
    }
    print(json.dumps(result), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for site in sites:
        await site.server.stop()


class Site:
    """A hospital: an inbox that accepts whatever comes whole, and a parcel for the others."""

    def __init__(self, folder: Path, federation: Federation, number: int, identity: Identity, data: bytes) -> None:
        self.number, self.federation, self.identity = number, federation, identity
        self.me, self.homes = federation.peers[number], folder / str(number)
        self.size, self.sha256 = len(data), hashlib.sha256(data).hexdigest()
        self.homes.mkdir()
        admission = Admission(
            federation=federation, me=self.me, data_bytes=len(data), on_commit=self.take, on_connect=lambda peer: None
        )
        self.server = InboxServer(admission, identity=identity, homes=self.homes)
        document = identity.sign(self.manifest(self.me).content(), MANIFEST_NAMESPACE)
        self.parcel = Parcel(self.name(self.me), folder / "data", len(data), document)

    def manifest(self, peer: Peer) -> Manifest:
        return Manifest(
            federation=self.federation.digest, round=1, peer=peer, sha256=self.sha256, bytes=self.size, base="0" * 64,
            inputs={}, samples=10, score=None, said={}, plateau=False, halted=False, anchor=None, schema="1" * 64,
            instance="line", software="line",
        )  # fmt: skip

    def name(self, peer: Peer) -> FileName:
        return FileName(self.federation.fed8, 1, peer, Digest(self.sha256), Kind.DATA)

    def take(self, peer: Peer) -> None:
        arrived = self.homes / peer / "inbox" / str(self.name(peer))
        whole = hashlib.sha256(arrived.read_bytes()).hexdigest() == self.sha256
        arrived.unlink()
        answer(peer, self.manifest(peer), homes=self.homes, me=self.me, identity=self.identity,
               accepted=whole, code="accepted" if whole else "sha256", text="")  # fmt: skip

    async def send(self, card: PeerCard, client: Any) -> Transfer:
        transfer = Transfer(Peer(card.name))
        await push(
            card, self.parcel, me=self.me, identity=self.identity, federation=self.federation, client=client,
            transfer=transfer, wake=asyncio.Event(), refused=RefusedKey(card.name, random.Random()),
            rng=random.Random(),
        )  # fmt: skip
        return transfer


if __name__ == "__main__":
    if os.geteuid() != 0:
        raise SystemExit("needs root: it makes network namespaces")
    main()
