"""Normalization modules in the place of torch.nn's, and the same behind a residual sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` by `fastattn.layer_norm`; the arguments before `implementation` are its own."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.implementation = implementation

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, implementation=self.implementation
        )
        return y


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` by `fastattn.rms_norm`; the arguments before `implementation` are its own."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.implementation = implementation

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = rms_norm(
            input, self.normalized_shape, self.weight, self.eps, implementation=self.implementation
        )
        return y


class _AddNorm(torch.nn.Module):
    """What makes a norm that of a residual sum, beside the class of the norm; `_add` is the operation of both."""

    implementation: str | None

    def __init__(
        self,
        *arguments: Any,
        dropout: float = 0.0,
        residual_dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.dropout, self.residual_dtype = dropout, residual_dtype

    def forward(
        self, x: Tensor, residual: Tensor | None = None, rowscale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, total = self._add(
            x,
            residual,
            dropout_p=self.dropout if self.training else 0,
            rowscale=rowscale,
            residual_dtype=self.residual_dtype,
            implementation=self.implementation,
        )
        return y, total

    def _add(self, x: Tensor, residual: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError


class AddLayerNorm(_AddNorm, LayerNorm):  # type: ignore[misc]
    """A residual sum and the LayerNorm behind it: `norm(x, residual)` is (y, residual + dropout(x)).

    Parameters and state dict are those of `torch.nn.LayerNorm`.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype, implementation: as `LayerNorm`'s.
        dropout: probability that an element of x is dropped, in training alone.
        residual_dtype: the dtype of the sum, as `fastattn.add_layer_norm`'s.
    """

    def _add(self, x: Tensor, residual: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        return add_layer_norm(x, residual, self.normalized_shape, self.weight, self.bias, self.eps, **options)


class AddRMSNorm(_AddNorm, RMSNorm):  # type: ignore[misc]
    """A residual sum and the RMSNorm behind it: `norm(x, residual)` is (y, residual + dropout(x)).

    Parameters and state dict are those of `torch.nn.RMSNorm`; further arguments are `AddLayerNorm`'s.
    """

    def _add(self, x: Tensor, residual: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        return add_rms_norm(x, residual, self.normalized_shape, self.weight, self.eps, **options)
