"""Rotary position embeddings as a module that holds the tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.rotary import rotary_embedding, rotary_tables


class RotaryEmbedding(torch.nn.Module):
    """`fastattn.rotary_embedding` with the tables of `fastattn.rotary_tables` for positions below `max_seq_len`.

    Args:
        rotary_dim: how many features of a head are rotated; even.
        max_seq_len: how many positions there are. The tables do not grow: a position beyond them is a ValueError.
        base, scale: of the angles, as `fastattn.rotary_tables` takes them.
        interleaved: which features are pairs, as `fastattn.rotary_embedding` takes it.
        device: of the tables.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    The tables are float32 whatever dtype the module is moved to, and no part of its state dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        rotary_dim: int,
        max_seq_len: int,
        base: float = 10000.0,
        interleaved: bool = False,
        *,
        scale: float = 1,
        device: Any = None,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.rotary_dim, self.max_seq_len = rotary_dim, max_seq_len
        self.base, self.scale = base, scale
        self.interleaved, self.implementation = interleaved, implementation
        cos, sin = self._tables(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _tables(self, device: Any) -> tuple[Tensor, Tensor]:
        return rotary_tables(
            self.max_seq_len, self.rotary_dim, base=self.base, scale=self.scale, device=device
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        was_meta = self.cos.is_meta
        super()._apply(fn, recurse)
        # model.bfloat16() would round the tables, and to_empty() of a model on "meta" leave them without values.
        if self.cos.dtype != torch.float32 or was_meta:
            self.cos, self.sin = self._tables(self.cos.device)
        return self

    def forward(
        self,
        x: Tensor,
        *,
        offsets: int | Tensor = 0,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        inplace: bool = False,
    ) -> Tensor:
        return rotary_embedding(
            x,
            self.cos,
            self.sin,
            interleaved=self.interleaved,
            offsets=offsets,
            positions=positions,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            inplace=inplace,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, max_seq_len={self.max_seq_len}, base={self.base}, interleaved={self.interleaved}"
