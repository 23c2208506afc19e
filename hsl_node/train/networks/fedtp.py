"""A transformer classifier with the hypernetwork that makes its projections; both are tensors of one model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hsl_node.errors import ConfigError
from hsl_node.federation.config import PEERS_MAX
from hsl_node.federation.plan import Plan
from hsl_node.train.networks.classifier import Classifier
from hsl_node.train.networks.hypernetwork import Net
from hsl_node.train.networks.initial import stream
from hsl_node.train.networks.vit import projection_names


class Hypernetwork(nn.Module):
    """Buffers, so that a checkpoint of all tensors holds it and no optimizer moves it. Two hidden layers.

    First values: hidden layers as torch's; the output's bias is what the projections begin with anyway, its weights are
    as small as these. An embedding follows from the peer's name.
    """

    def __init__(self, plan: Plan, first: NDArray[np.float64]) -> None:
        super().__init__()
        self.seed, self.wide = plan.seed, int(plan.settings["embedding"])
        hidden = int(plan.settings["hidden"])
        shapes = [(hidden, self.wide), (hidden, hidden), (len(first), hidden)]
        net = {"embedding": np.zeros((PEERS_MAX, self.wide))}
        for n, shape in enumerate(shapes):
            last = n == len(shapes) - 1
            small = float(np.abs(first).max()) if last else 1.0
            net[f"weight{n}"] = self._drawn(f"weight{n}").uniform(-1, 1, shape) * small / math.sqrt(shape[1])
            net[f"bias{n}"] = first if last else self._drawn(f"bias{n}").uniform(-1, 1, shape[0]) / math.sqrt(shape[1])
        for name, array in net.items():
            self.register_buffer(name, torch.from_numpy(array.astype(np.float32)))
            self.register_buffer(f"moment_{name}", torch.zeros(array.shape))
        self.names = sorted(net)
        self.register_buffer("peers", torch.zeros(PEERS_MAX, dtype=torch.int64))  # a hash of the name; 0: free

    def embedding_of(self, peer: str) -> NDArray[np.float32]:
        row = self.row_of(peer)
        if row is not None:
            found: NDArray[np.float32] = self.read()[0]["embedding"][row]
            return found
        return self._drawn(f"embedding/{peer}").standard_normal(self.wide).astype(np.float32)

    def row_of(self, peer: str) -> int | None:
        where = (self._peers() == _hash(peer)).nonzero()[0]
        return int(where[0]) if len(where) else None

    def add(self, peer: str) -> int:
        """The peer's row; a new peer gets the first that is free."""
        row = self.row_of(peer)
        if row is None:
            first, embedding = self.embedding_of(peer), self.get_buffer("embedding")
            row = int((self._peers() == 0).nonzero()[0][0])
            embedding[row] = torch.from_numpy(first).to(embedding.device)
            self.get_buffer("peers")[row] = _hash(peer)
        return row

    def read(self) -> tuple[Net, Net]:
        """The net, and its moments."""
        found = [{n: self.get_buffer(p + n).cpu().numpy() for n in self.names} for p in ("", "moment_")]
        return found[0], found[1]

    def write(self, net: Net, moments: Net) -> None:
        for prefix, content in (("", net), ("moment_", moments)):
            for name in self.names:
                buffer = self.get_buffer(prefix + name)
                buffer.copy_(torch.from_numpy(np.array(content[name])).to(buffer.device))

    def _peers(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.get_buffer("peers").cpu().numpy()
        return found

    def _drawn(self, name: str) -> np.random.Generator:
        return stream(self.seed, f"hypernetwork/{name}")


class PersonalTransformer(Classifier):
    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.projections = projection_names(self)
        if not self.projections:
            raise ConfigError(
                f"fedtp knows the attention projections of vit_tiny, and not those of {plan.backbone}",
                remedy='set backbone = "vit_tiny", or take another method',
            )
        shapes = [tuple(self.get_parameter(name).shape) for name in self.projections]
        begin = [
            stream(plan.seed, name).uniform(-1, 1, shape).ravel() / math.sqrt(shape[1])  # as `initialise` draws them
            for name, shape in zip(self.projections, shapes, strict=True)
        ]
        self.hyper = Hypernetwork(plan, np.concatenate(begin))

    def take(self, projections: NDArray[np.float64]) -> None:
        """Put all projections (O,) in their places."""
        at = 0
        for name in self.projections:
            parameter = self.get_parameter(name)
            part = projections[at : (at := at + parameter.numel())].reshape(parameter.shape)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(part.astype(np.float32)))

    def flat(self, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
        """All projections of a checkpoint as (O,)."""
        return np.concatenate([tensors[name].double().cpu().numpy().ravel() for name in self.projections])


def _hash(peer: str) -> int:
    return int.from_bytes(hashlib.sha256(peer.encode()).digest()[:8], "big") >> 1 or 1
