"""An encoder that nobody trains, and a linear head on its features: (B, 3, S, S) -> (B, C)."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsl_node.federation.plan import UNALTERED, Plan
from hsl_node.train.method import Network
from hsl_node.train.networks.backbone import Trunk
from hsl_node.train.tasks.classification import outputs

FEATURES_MAX = 200_000  # kept in a process: 1 GB of 1280 numbers each; then the oldest goes

_features: dict[bytes, bytes] = {}  # (encoder, image) -> float32; of the process, since models come and go


class FrozenClassifier(nn.Module):
    """The encoder is in evaluation mode always, and its features have unit length.

    An image's features are computed once in a process and by itself, so they do not depend on what else is in a batch,
    and a run that was killed has the same. Where training images are altered at random (the plan's `augment`), those
    are other images each time: computed anew, batch by batch, and not kept.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.trunk = Trunk(plan.backbone, plan.norm, plan.image_size).requires_grad_(False).eval()
        self.out = nn.Linear(self.trunk.features, outputs(plan))
        self.altered = plan.augment != UNALTERED
        self._encoder = b""

    def train(self, mode: bool = True) -> FrozenClassifier:
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.out(self.features(image_BCHW))  # type: ignore[no-any-return]

    def features(self, image_BCHW: Tensor) -> Tensor:
        """(B, F), each of length 1, without a gradient."""
        if torch.compiler.is_exporting() or (self.training and self.altered):
            return F.normalize(self.trunk(image_BCHW))
        rows = [torch.frombuffer(bytearray(self._of(one)), dtype=torch.float32) for one in image_BCHW]
        return torch.stack(rows).to(image_BCHW.device)

    def _of(self, image_CHW: Tensor) -> bytes:
        key = self._key + hashlib.blake2b(image_CHW.cpu().contiguous().numpy().tobytes()).digest()
        if key not in _features:
            if len(_features) >= FEATURES_MAX:
                del _features[next(iter(_features))]
            with torch.no_grad():
                _features[key] = F.normalize(self.trunk(image_CHW[None]))[0].cpu().numpy().tobytes()
        return _features[key]

    @property
    def _key(self) -> bytes:
        """Which encoder it is; asked first when its weights are there, and they never change."""
        if not self._encoder:
            digest = hashlib.sha256(str((self.trunk.precision, self.trunk.backbone)).encode())
            for tensor in self.trunk.state_dict().values():
                digest.update(tensor.cpu().numpy().tobytes())
            self._encoder = digest.digest()
        return self._encoder


FROZEN = Network(FrozenClassifier)
