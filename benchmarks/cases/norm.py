"""Normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases.base import DTYPE_NAMES, draw, everything, spread_rows
from fastattn import reference


@dataclass(frozen=True)
class LayerNormCase:
    """LayerNorm over the last dimension of x (rows, width)."""

    rows: int
    width: int
    affine: bool = True
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "layer_norm"
    parameters: ClassVar[int] = 2

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.width}" + ("" if self.affine else "-plain")

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        rows = [(self.rows, self.width)]
        shapes = rows + [(self.width,)] * (self.parameters if self.affine else 0)
        return tuple(
            draw(*shape, dtype=self.dtype, device=device, requires_grad=True, seed=seed)
            for seed, shape in enumerate(shapes)
        )

    def reference(self, *tensors: Tensor) -> Tensor:
        weight, bias = tensors[1:] or (None, None)
        return reference.layer_norm(tensors[0], self.width, weight, bias)

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)


@dataclass(frozen=True)
class RMSNormCase(LayerNormCase):
    """RMSNorm over the last dimension of x (rows, width); without a bias."""

    operation: ClassVar[str] = "rms_norm"
    parameters: ClassVar[int] = 1

    def reference(self, *tensors: Tensor) -> Tensor:
        weight = tensors[1] if self.affine else None
        return reference.rms_norm(tensors[0], self.width, weight)


@dataclass(frozen=True)
class AddLayerNormCase:
    """(y, h) of h = residual + x, both (rows, width), and its LayerNorm y; gradients arrive at both.

    `residual_dtype` is that of residual and h, None for x's. Only the inspector's cases have a `dropout_p`: providers
    would drop different elements.
    """

    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    residual_dtype: torch.dtype | None = None
    dropout_p: float = 0.0

    operation: ClassVar[str] = "add_layer_norm"
    affine: ClassVar[bool] = True
    parameters: ClassVar[int] = 2

    @property
    def name(self) -> str:
        residual = "" if self.residual_dtype is None else f"-{DTYPE_NAMES[self.residual_dtype]}-residual"
        dropout = f"-dropout{self.dropout_p}" if self.dropout_p else ""
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.width}{residual}{dropout}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """x, residual, weight and, where there is one, bias."""
        rows, width = (self.rows, self.width), (self.width,)
        drawn: list[tuple[tuple[int, ...], torch.dtype]] = [
            (rows, self.dtype),
            (rows, self.residual_dtype or self.dtype),
        ]
        drawn += [(width, self.dtype)] * self.parameters
        return tuple(
            draw(*shape, dtype=dtype, device=device, requires_grad=True, seed=seed)
            for seed, (shape, dtype) in enumerate(drawn)
        )

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, residual, weight, bias = tensors
        total = reference.residual_sum(x, residual)
        return reference.layer_norm(total, self.width, weight, bias, out_dtype=x.dtype), total

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)


@dataclass(frozen=True)
class AddRMSNormCase(AddLayerNormCase):
    """(y, h) of h = residual + x and its RMSNorm y; without a bias."""

    operation: ClassVar[str] = "add_rms_norm"
    parameters: ClassVar[int] = 1

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, residual, weight = tensors
        total = reference.residual_sum(x, residual)
        return reference.rms_norm(total, self.width, weight, out_dtype=x.dtype), total
