"""Attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.cases.attention_options import fixed_keywords, learned_parameters, split_options
from benchmarks.cases.base import DTYPE_NAMES, draw, everything, spread_rows
from fastattn import reference


@dataclass(frozen=True)
class AttentionCase:
    """softmax(q k^T) v with q (batch, heads, seq_q, head_dim) and k, v (batch, kv_heads, seq_k, head_dim).

    `options` names what else is asked for, as in "bias+dropout"; see attention_options.py.
    """

    batch: int
    heads: int
    seq_q: int
    head_dim: int
    kv_heads: int | None = None
    seq_k: int | None = None
    causal: str | bool = False
    dtype: torch.dtype = torch.float32
    options: str = ""

    operation: ClassVar[str] = "attention"
    operands: ClassVar[int] = 3

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
        options = f"-{self.options}" if self.options else ""
        return f"{DTYPE_NAMES[self.dtype]}-{mask}-b{batch}{groups}-{lengths}-d{head_dim}{options}"

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of the options."""
        return split_options(self.options)

    @property
    def plain(self) -> AttentionCase | None:
        """The case without its options, which is timed beside it; None where it has none."""
        return replace(self, options="") if self.options else None

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """q, k, v, and what the options learn."""
        batch, heads, kv_heads, seq_q, seq_k, head_dim = self.shape
        sizes = ((heads, seq_q), (kv_heads, seq_k), (kv_heads, seq_k))
        operands = tuple(
            draw(batch, h, s, head_dim, dtype=self.dtype, device=device, requires_grad=True, seed=seed)
            for seed, (h, s) in enumerate(sizes)
        )
        return (*operands, *learned_parameters(self.asked, self.shape, self.dtype, device).values())

    def keywords(self, device: torch.device | str) -> dict[str, Any]:
        """`fastattn.attention`'s keywords but those of learned parameters."""
        fixed = fixed_keywords(self.asked, self.shape, self.dtype, torch.device(device))
        return {"causal": self.causal, **fixed}

    def learned(self, parameters: tuple[Tensor, ...]) -> dict[str, Any]:
        """The learned parameters, given in the order of `inputs`, by their keywords."""
        return dict(
            zip(learned_parameters(self.asked, self.shape, self.dtype, "meta"), parameters, strict=True)
        )

    def reference(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        q, k, v, *parameters = tensors
        return reference.attention(q, k, v, **self.keywords(q.device), **self.learned(tuple(parameters)))

    def part(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The first key head with its queries, of the first sequence, and the last one of the last.

        With options, rows of all of it; nothing under dropout, where each provider drops other weights.
        """
        if self.options:
            return () if "dropout" in self.asked else spread_rows(results)
        return tuple(torch.cat(pair) for pair in zip(*self.samples(results), strict=True))

    def samples(self, given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Heads are independent of each other, so each of the two is computed from its own part.

        Not so with options, whose gradients add up over the batch.
        """
        if self.options:
            return everything(given)
        _, heads, kv_heads, *_ = self.shape
        counts = (heads // kv_heads,) * 2 + (1, 1)
        pairs = list(zip(given, counts, strict=False))
        return [tuple(t[:1, :count] for t, count in pairs), tuple(t[-1:, -count:] for t, count in pairs)]
