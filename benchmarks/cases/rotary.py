"""Rotary position embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.base import DTYPE_NAMES, draw, everything, spread_rows
from fastattn import reference, rotary_tables


@dataclass(frozen=True)
class RotaryCase:
    """Rotation of all features of x (batch, heads, seq, head_dim), in memory (batch, seq, heads, head_dim)."""

    batch: int
    heads: int
    seq: int
    head_dim: int
    interleaved: bool = False
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "rotary"

    @property
    def name(self) -> str:
        pairing = "interleaved" if self.interleaved else "halves"
        return f"b{self.batch}-h{self.heads}-s{self.seq}-d{self.head_dim}-{pairing}-{DTYPE_NAMES[self.dtype]}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        x = draw(self.batch, self.seq, self.heads, self.head_dim, dtype=self.dtype, device=device)
        return (x.transpose(1, 2).requires_grad_(),)

    def tables(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """cos and sin in float32, which every provider may turn into what it takes before it is timed."""
        return rotary_tables(self.seq, self.head_dim, device=device)

    def reference(self, *tensors: Tensor) -> Tensor:
        (x,) = tensors
        return reference.rotary_embedding(x, *self.tables(x.device), interleaved=self.interleaved)

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)
