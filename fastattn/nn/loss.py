"""Losses in the place of torch.nn's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import NotSupported
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

    def extra_repr(self) -> str:
        return ", ".join(_said(self, z_loss=0.0, softcap=None))


class LinearCrossEntropyLoss(torch.nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` (new in PyTorch 2.13) by `fastattn.linear_cross_entropy`, in any PyTorch.

    The head is its child `linear`, with torch.nn's names and initial values; for a tied one assign
    `loss.linear.weight = embedding.weight`.

    Args:
        in_features, num_classes, bias, device, dtype, reduction, label_smoothing: as torch.nn's.
        ignore_index: as torch.nn's; None is -100.
        out_features, weight, options: accepted only at their defaults; `memory_budget` says how large chunks are.
        z_loss, softcap, memory_budget, implementation: as `fastattn.linear_cross_entropy`'s.

    Raises:
        NotSupported: `out_features`, `weight` or `options` is given.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        memory_budget: int | None = None,
        implementation: str | None = None,
    ) -> None:
        for name, asked in (("out_features", out_features), ("weight", weight), ("options", options)):
            if asked is not None and asked != ():
                raise NotSupported(f"{name} is not supported by fastattn.linear_cross_entropy")
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.memory_budget = memory_budget
        self.implementation = implementation

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of (..., in_features) against (...) class indices."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            memory_budget=self.memory_budget,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        linear = self.linear
        head = f"in_features={linear.in_features}, num_classes={linear.out_features}, bias={linear.bias is not None}"
        said = _said(
            self,
            reduction="mean",
            ignore_index=None,
            label_smoothing=0.0,
            z_loss=0.0,
            softcap=None,
            memory_budget=None,
        )
        return ", ".join([head, *said])


def _said(module: torch.nn.Module, **defaults: Any) -> list[str]:
    """The attributes that are not at their defaults, as arguments."""
    given = {name: getattr(module, name) for name in defaults}
    return [f"{name}={value!r}" for name, value in given.items() if value != defaults[name]]
