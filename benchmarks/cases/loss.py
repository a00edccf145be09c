"""Losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.base import DTYPE_NAMES, draw, everything, spread_rows


@dataclass(frozen=True)
class LossCase:
    """Mean cross-entropy of logits (rows, vocabulary); a tenth of the targets is ignored."""

    rows: int
    vocabulary: int
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "loss"

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.vocabulary}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return (draw(self.rows, self.vocabulary, dtype=self.dtype, device=device, requires_grad=True),)

    def targets(self, device: torch.device | str) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        targets = torch.randint(self.vocabulary, (self.rows,), generator=generator)
        targets[::10] = -100
        return targets.to(device)

    def reference(self, *tensors: Tensor) -> Tensor:
        """In float32 or wider, as PyTorch's own; the mean of lse - logit of the target."""
        (logits,) = tensors
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = self.targets(logits.device)
        kept = targets != -100
        chosen = wide.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        return ((torch.logsumexp(wide, 1) - chosen) * kept).sum().div(kept.sum()).to(logits.dtype)

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)
