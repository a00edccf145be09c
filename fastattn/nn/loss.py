"""Losses in the place of torch.nn's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` by `fastattn.cross_entropy`, with its z-loss and soft cap."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        implementation: str | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.implementation = implementation

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            implementation=self.implementation,
        )
        return loss


class LinearCrossEntropyLoss(torch.nn.Module):
    """`fastattn.linear_cross_entropy` with its options; weight and bias belong to whoever calls it."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        memory_budget: int | None = None,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.memory_budget = memory_budget
        self.implementation = implementation

    def forward(self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """The loss of (..., width) by a weight (classes, width), a target (...) and a bias (classes,) or None."""
        return linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            memory_budget=self.memory_budget,
            implementation=self.implementation,
        )
