"""FedTP's hypernetwork: a small net that makes each peer's attention projections from an embedding of the peer.

Every peer derives it for itself from what all peers sent, so all must get the same bytes: float64 numpy, sums by
`add.reduce` in a fixed order, no matrix product (whose order is the processor's), rounded to float32 after each step.

Shapes: K peers, E numbers of an embedding, H of a hidden layer, O of all projections together. A net is a mapping:
"embedding" (K, E), "weight0" (H, E), "bias0" (H,), ..., the last weight (O, H). Its moments have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Net = Mapping[str, NDArray[np.float32]]


def generate(net: Net, embedding: NDArray[np.float32]) -> Array:
    """A peer's projections (O,) from its embedding (E,)."""
    return _layers(net, embedding)[-1]


def pull(net: Net, embedding: NDArray[np.float32], apart: Array, share: float) -> dict[str, Array]:
    """The gradient of a peer: share * J' (generated - trained), for every weight and bias, and for "embedding" (E,)."""
    inputs = _layers(net, embedding)
    found, slope = {}, share * apart
    for n in reversed(range(_depth(net))):
        found[f"weight{n}"] = slope[:, None] * inputs[n][None]
        found[f"bias{n}"] = slope
        slope = np.add.reduce(net[f"weight{n}"].astype(np.float64) * slope[:, None], axis=0)
        if n:
            slope = slope * (inputs[n] > 0)
    return {**found, "embedding": slope}


def no_longer(apart: Array, made: Array) -> Array:
    """`apart`, shortened to the length of `made`: one peer's projections of 1e9 would throw all others' as far."""
    longest, length = (float(np.sqrt(np.add.reduce(x * x))) for x in (made, apart))
    return apart * (longest / length) if length > longest else apart


def descended(
    net: Net,
    moments: Net,
    pulls: Iterable[tuple[int, Mapping[str, Array]]],
    *,
    rate: float,
    momentum: float,
    decay: float,
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """One step of SGD, as torch's: (net, moments) after it. `pulls`: (row of the peer's embedding, its gradient).

    Embeddings of peers that took no part keep still: no decay, no momentum.
    """
    total: dict[str, Array] = {}
    rows: dict[int, Array] = {}
    for row, found in pulls:
        rows[row] = found["embedding"]
        for name in found.keys() - {"embedding"}:
            total[name] = total[name] + found[name] if name in total else found[name]
    new, moved = dict(net), dict(moments)
    new["embedding"], moved["embedding"] = net["embedding"].copy(), moments["embedding"].copy()

    def step(value: NDArray[np.float32], moment: NDArray[np.float32], gradient: Array) -> tuple[Array, Array]:
        speed = momentum * moment.astype(np.float64) + (gradient + decay * value.astype(np.float64))
        return value.astype(np.float64) - rate * speed, speed

    for row, gradient in rows.items():
        new["embedding"][row], moved["embedding"][row] = step(
            net["embedding"][row], moments["embedding"][row], gradient
        )
    for name, gradient in total.items():
        value, speed = step(net[name], moments[name], gradient)
        new[name], moved[name] = value.astype(np.float32), speed.astype(np.float32)
    return new, moved


def fingerprint(*nets: Mapping[str, NDArray[np.generic]]) -> float:
    """A number below 2 to the 48th by which peers see that they have the same bytes."""
    digest = sha256()
    for net in nets:
        for name in sorted(net):
            digest.update(name.encode() + np.ascontiguousarray(net[name]).tobytes())
    return float(int.from_bytes(digest.digest()[:6], "big"))


def _layers(net: Net, embedding: NDArray[np.float32]) -> list[Array]:
    """What goes into each layer, and at the end what comes out."""
    found = [embedding.astype(np.float64)]
    for n in range(_depth(net)):
        weight, bias = net[f"weight{n}"].astype(np.float64), net[f"bias{n}"].astype(np.float64)
        out = np.add.reduce(weight * found[n], axis=1) + bias
        found.append(np.maximum(out, 0) if n < _depth(net) - 1 else out)
    return found


def _depth(net: Net) -> int:
    return sum(name.startswith("weight") for name in net)
