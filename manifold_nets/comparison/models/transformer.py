"""A small character-level transformer that normalizes queries and keys and the outputs of its blocks."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

__all__ = ["CharacterTransformer"]


class _Attention(nn.Module):
    """Causal attention with normalized queries and keys, and a normalized output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads) for _ in range(2))
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape

        def split(projection: nn.Linear) -> Tensor:
            return cast(Tensor, projection(x)).view(n, length, self.heads, -1)

        query, key = self.query_norm(split(self.query)), self.key_norm(split(self.key))
        mixed = scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), split(self.value).transpose(1, 2), is_causal=True
        )
        return cast(Tensor, self.norm(self.out(mixed.transpose(1, 2).reshape(n, length, width))))


class _Perceptron(nn.Module):
    """A gated perceptron with a normalized output."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.down(silu(self.gate(x)) * self.up(x))))


class CharacterTransformer(nn.Module):
    """A causal transformer with normalized queries and keys and normalized outputs of its blocks.

    Scale-invariant are the projections to queries and keys, head by head, and, each as a whole, the projections to
    values, to the outputs of the blocks, and up.

    Args:
        characters: size of the alphabet.
        length: longest sequence.
        width: of the residual stream.
        blocks: how many.
        heads: of the attention; a divisor of the width.

    References:
        Henry et al., *Query-key normalization for transformers*, arXiv:2010.04245; the order of normalizations of
        *2 OLMo 2 Furious*, arXiv:2501.00656.

    Example:
        >>> CharacterTransformer(103, 64, width=16, blocks=1, heads=2)(torch.zeros(3, 64, dtype=torch.long)).shape
        torch.Size([3, 103, 64])
    """

    def __init__(self, characters: int, length: int, *, width: int = 64, blocks: int = 2, heads: int = 4) -> None:
        if width % heads:
            raise ValueError(f"heads: found {heads}; expected a divisor of the width, {width}. Choose such a number.")
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([_Attention(width, heads), _Perceptron(width, 2 * width)]) for _ in range(blocks)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters (n, length) to scores of the next ones (n, characters, length)."""
        hidden = self.characters(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            for part in cast(nn.ModuleList, block):
                hidden = hidden + part(hidden)
        return cast(Tensor, self.head(self.norm(hidden))).transpose(1, 2)
