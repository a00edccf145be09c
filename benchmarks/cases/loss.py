"""Losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.base import DTYPE_NAMES, draw, everything, spread_rows
from fastattn import reference


@dataclass(frozen=True)
class LossCase:
    """Mean cross-entropy of logits (rows, vocabulary); a tenth of the targets is ignored.

    Only the inspector's cases have `all_options`: label smoothing, z-loss and a soft cap.
    """

    rows: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    all_options: bool = False

    operation: ClassVar[str] = "loss"

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.vocabulary}" + "-options" * self.all_options

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return (draw(self.rows, self.vocabulary, dtype=self.dtype, device=device, requires_grad=True),)

    def targets(self, device: torch.device | str) -> Tensor:
        return _targets(self.rows, self.vocabulary, device)

    def reference(self, *tensors: Tensor) -> Tensor:
        """In float32 or wider, as PyTorch's own; the mean of lse - logit of the target."""
        (logits,) = tensors
        return _mean_loss(logits, self.targets(logits.device))

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)


@dataclass(frozen=True)
class LinearLossCase:
    """The same of logits x W^T, with x (rows, width) and W (vocabulary, width)."""

    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "linear_loss"

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.width}x{self.vocabulary}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        x = draw(self.rows, self.width, dtype=self.dtype, device=device)
        # Logits of size 1, as after initialization.
        weight = draw(self.vocabulary, self.width, dtype=self.dtype, device=device, seed=1) * self.width**-0.5
        return x.requires_grad_(), weight.requires_grad_()

    def targets(self, device: torch.device | str) -> Tensor:
        return _targets(self.rows, self.vocabulary, device)

    def reference(self, *tensors: Tensor) -> Tensor:
        x, weight = tensors
        return _mean_loss(F.linear(x, weight), self.targets(x.device))

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)


def _targets(rows: int, vocabulary: int, device: torch.device | str) -> Tensor:
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    targets[::10] = -100
    return targets.to(device)


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = reference.cross_entropy(wide, targets)
    assert isinstance(loss, Tensor)
    return loss.to(logits.dtype)
