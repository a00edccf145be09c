"""Attention's forward on operands rounded to e4m3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.attention import AttentionCase
from fastattn import reference


@dataclass(frozen=True)
class AttentionE4M3Case(AttentionCase):
    """`fastattn.attention(..., quantize="e4m3")`, without options and without gradients."""

    operation: ClassVar[str] = "attention_e4m3"

    @property
    def name(self) -> str:
        return f"e4m3-{super().name}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in super().inputs(device))

    def reference(self, *tensors: Tensor) -> Tensor:
        """The formula in float64; in the case's dtype with operands and weights rounded, of which results may have
        twice the error."""
        q, k, v = tensors
        if q.dtype == torch.float64:
            exact = reference.attention(q, k, v, causal=self.causal)
            assert isinstance(exact, Tensor)
            return exact
        rounded_q, rounded_k, rounded_v, _ = reference.round_e4m3(q, k, v)
        groups = q.size(1) // k.size(1)
        scores = rounded_q @ rounded_k.repeat_interleave(groups, dim=1).transpose(2, 3)
        scores *= 1.0 / math.sqrt(q.size(3))
        if self.causal:
            seen = reference.causal_mask(q.size(2), k.size(2), self.causal, q.device)
            scores.masked_fill_(~seen, -math.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        total = weights.sum(-1, keepdim=True)
        weights = (weights * 256.0).to(torch.float8_e4m3fn).to(torch.float32)
        result: Tensor = (weights @ rounded_v.repeat_interleave(groups, dim=1)) / (total * 256.0)
        return result.to(q.dtype)
