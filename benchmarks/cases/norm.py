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

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.width}" + ("" if self.affine else "-plain")

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        shapes = ((self.rows, self.width), (self.width,), (self.width,))[: 3 if self.affine else 1]
        return tuple(
            draw(*shape, dtype=self.dtype, device=device, requires_grad=True, seed=seed)
            for seed, shape in enumerate(shapes)
        )

    def reference(self, *tensors: Tensor) -> Tensor:
        weight, bias = tensors[1:] or (None, None)
        return reference.layer_norm(tensors[0], self.width, weight, bias)

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)
