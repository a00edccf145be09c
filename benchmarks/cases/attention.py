"""Attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.base import DTYPE_NAMES, draw
from fastattn import reference


@dataclass(frozen=True)
class AttentionCase:
    """softmax(q k^T) v with q (batch, heads, seq_q, head_dim) and k, v (batch, kv_heads, seq_k, head_dim)."""

    batch: int
    heads: int
    seq_q: int
    head_dim: int
    kv_heads: int | None = None
    seq_k: int | None = None
    causal: str | bool = False
    dtype: torch.dtype = torch.float32
    # What else modifies the scores, by the names of benchmarks/inspection/rows.py: the inspector's cases alone have it.
    score: str = ""

    operation: ClassVar[str] = "attention"

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """(batch, heads, kv_heads, seq_q, seq_k, head_dim), with the defaults filled in."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        seq_k = self.seq_q if self.seq_k is None else self.seq_k
        return self.batch, self.heads, kv_heads, self.seq_q, seq_k, self.head_dim

    @property
    def name(self) -> str:
        batch, heads, kv_heads, seq_q, seq_k, head_dim = self.shape
        mask = str(self.causal).replace("_", "-") if self.causal else "full"
        groups = f"h{heads}" if heads == kv_heads else f"h{heads}kv{kv_heads}"
        lengths = f"s{seq_q}" if seq_q == seq_k else f"q{seq_q}k{seq_k}"
        score = f"-{self.score}" if self.score else ""
        return f"{DTYPE_NAMES[self.dtype]}-{mask}-b{batch}{groups}-{lengths}-d{head_dim}{score}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        batch, heads, kv_heads, seq_q, seq_k, head_dim = self.shape
        sizes = ((heads, seq_q), (kv_heads, seq_k), (kv_heads, seq_k))
        return tuple(
            draw(batch, h, s, head_dim, dtype=self.dtype, device=device, requires_grad=True, seed=seed)
            for seed, (h, s) in enumerate(sizes)
        )

    def reference(self, *tensors: Tensor) -> Tensor:
        out = reference.attention(*tensors, causal=self.causal)
        return out if isinstance(out, Tensor) else out[0]

    def part(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The first key head with its queries, of the first sequence, and the last one of the last."""
        return tuple(torch.cat(pair) for pair in zip(*self.samples(results), strict=True))

    def samples(self, given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Heads are independent of each other, so each of the two is computed from its own part."""
        _, heads, kv_heads, *_ = self.shape
        counts = (heads // kv_heads,) * 2 + (1, 1)
        pairs = list(zip(given, counts, strict=False))
        return [tuple(t[:1, :count] for t, count in pairs), tuple(t[-1:, -count:] for t, count in pairs)]
