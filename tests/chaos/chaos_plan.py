"""What one seed means: a federation, and the faults that befall it until they end. All drawn before anything runs."""

from __future__ import annotations

import errno
import hashlib
import random
from dataclasses import dataclass
from functools import cache

import asyncssh
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from federations import NAMES

from hsl_node.federation.config import Federation, PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan

FUSIONS = ("weighted_mean", "median")
BETWEEN = ("cut", "hole", "deaf", "mute", "slow", "refuse", "part", "again")
AT_ONE = (
    "kill",
    "kill",
    "crash",
    "crash",
    "crash",
    "power",
    "blackout",
    "stop",
    "full",
    "disk",
    "disk",
    "journal",
    "rot",
    "back",
)


@dataclass(frozen=True)
class Fault:
    """`kind` at `at_s` seconds after the start; what the other fields mean depends on it."""

    at_s: float
    kind: str
    peer: Peer
    other: Peer | None = None
    lasts_s: float = 0.0
    count: int = 0
    what: str = ""
    code: int = 0

    def __str__(self) -> str:
        more = [str(x) for x in (self.other, self.what, errno.errorcode.get(self.code), self.count or None) if x]
        return " ".join([self.kind, self.peer, *more, *([f"for {self.lasts_s:.1f} s"] if self.lasts_s else [])])


@dataclass(frozen=True)
class Scenario:
    seed: int
    peers: tuple[Peer, ...]
    rounds: int
    fusion: str
    faults: tuple[Fault, ...]
    calm_s: float  # from here on nothing goes wrong any more

    @property
    def shape(self) -> tuple[int, int, str]:
        return len(self.peers), self.rounds, self.fusion


def scenario(seed: int) -> Scenario:
    rng = random.Random(f"scenario {seed}")
    n = rng.choices((3, 4, 5, 6, 7), (35, 30, 20, 10, 5))[0]
    peers = tuple(Peer(p) for p in NAMES[:n])
    calm_s = rng.uniform(20, 160)
    faults = [_fault(rng, peers, calm_s) for _ in range(rng.randint(3, 4 + 2 * n))]
    return Scenario(
        seed, peers, rng.choice((1, 2, 2, 3)), rng.choice(FUSIONS), tuple(sorted(faults, key=lambda f: f.at_s)), calm_s
    )


def undisturbed(shape: tuple[int, int, str]) -> Scenario:
    n, rounds, fusion = shape
    return Scenario(-1, tuple(Peer(p) for p in NAMES[:n]), rounds, fusion, (), 0.0)


def _fault(rng: random.Random, peers: tuple[Peer, ...], calm_s: float) -> Fault:
    at_s, (peer, other) = rng.uniform(0, calm_s), rng.sample(peers, 2)
    lasts_s = rng.choice((rng.uniform(1, 20), rng.uniform(20, 150)))
    if rng.random() < 0.5:
        match kind := rng.choice(BETWEEN):
            case "cut":
                return Fault(at_s, kind, peer, other, count=rng.choice((1, rng.randint(1, 9000))))
            case "again":
                return Fault(at_s, kind, peer, other)
            case "slow":
                return Fault(at_s, kind, peer, other, lasts_s, count=rng.choice((100, 1000, 10_000)))
            case "part":
                return Fault(at_s, kind, peer, None, lasts_s, what=",".join(sorted(rng.sample(peers, len(peers) // 2))))
            case _:
                return Fault(at_s, kind, peer, other, lasts_s)
    match kind := rng.choice(AT_ONE):
        case "crash" | "blackout":
            return Fault(at_s, kind, peer, count=rng.choice((1, rng.randint(1, 10), rng.randint(1, 60))))
        case "full" | "back":
            return Fault(at_s, kind, peer, None, lasts_s)
        case "disk":
            operation = rng.choice(("open", "write", "write", "fsync", "fsync", "rename", "link", "unlink", "mkdir"))
            code = errno.EIO if operation == "fsync" else rng.choice((errno.ENOSPC, errno.EIO))
            return Fault(at_s, kind, peer, count=rng.randint(1, 12), what=operation, code=code)
        case "journal":
            return Fault(at_s, kind, peer, count=rng.randint(1, 8), what=rng.choice(("done", "not done")))
        case "rot":  # of one disk of each federation: what is altered at everybody is lost
            return Fault(at_s, kind, peers[0])
        case _:
            return Fault(at_s, kind, peer)


@cache
def identity_of(name: str) -> Identity:
    """The same key in every run, so that every run signs the same bytes."""
    secret = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"chaos {name}".encode()).digest())
    pem = secret.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return Identity(asyncssh.import_private_key(pem))


def port_of(peer: Peer) -> int:
    return 9001 + NAMES.index(peer)


@cache
def federation_of(shape: tuple[int, int, str]) -> Federation:
    n, rounds, fusion = shape
    plan = Plan(method="fedavg", fusion=fusion, rounds=rounds, epochs_per_round=1, plateau_rounds=1000)  # type: ignore[arg-type]
    cards = [PeerCard(name=p, address=f"127.0.0.1:{port_of(Peer(p))}", key=identity_of(p).public) for p in NAMES[:n]]
    return Federation(name="chaos", plan=plan, peer=tuple(cards))
