"""A small vision transformer, that of FedTP (Li et al. 2023, models/vit.py): 2.0 million numbers.

Exact: width 128, 6 blocks of 8 heads x 64 and an MLP of 256, dropout 0.1, class token, patches of 4 px at 32 px.
Ours: fixed sines as positions (theirs are learned), so that no tensor hangs on the image's size; larger images have
larger patches, 16 a side at most; q, k and v are three layers, so that a method can name them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_PATCH = 4  # px
PATCHES = 16  # a side, at most: attention costs the fourth power of it
HEADS = 8


class VisionTransformer(nn.Module):
    """(B, 3, S, S) -> (B, 128), the class token after the last block. A rim of less than a patch is not looked at."""

    WIDTH = 128

    def __init__(
        self, image_size: int, *, depth: int = 6, head: int = 64, mlp: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        patch = patch_side(image_size)
        self.dropout = dropout
        self.patches = nn.Conv2d(3, self.WIDTH, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, self.WIDTH))
        self.blocks = nn.ModuleList(_Block(self.WIDTH, head, mlp, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(self.WIDTH)
        self.positions: Tensor
        self.register_buffer("positions", _sines(image_size // patch, self.WIDTH), persistent=False)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        tokens = self.patches(image_BCHW).flatten(2).transpose(1, 2) + self.positions  # (B, N, 128)
        tokens = torch.cat([self.token.expand(image_BCHW.shape[0], -1, -1), tokens], dim=1)  # (B, 1 + N, 128)
        tokens = F.dropout(tokens, self.dropout, self.training)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]  # type: ignore[no-any-return]

    def after_stages(self) -> Sequence[nn.Module]:
        """The first block's input is what the patches became, the second's what the first block gave, ..."""
        return [*self.blocks, self.norm]


class Attention(nn.Module):
    """Every token looks at every token: (B, N, W) -> (B, N, W). `q`, `k` and `v` are what FedTP personalises."""

    def __init__(self, width: int, head: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.q = nn.Linear(width, HEADS * head, bias=False)
        self.k = nn.Linear(width, HEADS * head, bias=False)
        self.v = nn.Linear(width, HEADS * head, bias=False)
        self.out = nn.Linear(HEADS * head, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (to(tokens).unflatten(2, (HEADS, -1)).transpose(1, 2) for to in (self.q, self.k, self.v))
        share = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=3)  # (B, heads, N, N)
        seen = (share @ v).transpose(1, 2).flatten(2)  # (B, N, heads * head)
        return F.dropout(self.out(seen), self.dropout, self.training)


def projection_names(model: nn.Module, which: str = "qkv") -> list[str]:
    """Names of the weights that make queries, keys and values, as they lie in the model; `which`: some of the three.

    >>> projection_names(VisionTransformer(32, depth=1), "q")
    ['blocks.0.attention.q.weight']
    """
    attentions = [at for at, module in model.named_modules() if isinstance(module, Attention)]
    return [f"{at}.{letter}.weight" for at in attentions for letter in which]


def patch_side(image_size: int) -> int:
    """Pixels a side of a patch.

    >>> [patch_side(s) for s in (32, 64, 96, 224)]
    [4, 4, 6, 14]
    """
    return max(SMALLEST_PATCH, -(-image_size // PATCHES))


class _Block(nn.Module):
    def __init__(self, width: int, head: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, head, dropout)
        self.norm_mlp = nn.LayerNorm(width)
        self.widen = nn.Linear(width, mlp)
        self.narrow = nn.Linear(mlp, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm_attention(tokens))
        wide = F.dropout(F.gelu(self.widen(self.norm_mlp(tokens))), self.dropout, self.training)
        return tokens + F.dropout(self.narrow(wide), self.dropout, self.training)


def _sines(side: int, width: int) -> Tensor:
    """Where each of side x side patches lies, row by row: (side * side, width), half of it for y and half for x."""
    frequency = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # (side, width / 4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, width / 2)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).float()
