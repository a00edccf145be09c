"""Activations, and the MLP around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.base import DTYPE_NAMES, draw, everything, spread_rows
from fastattn import reference


@dataclass(frozen=True)
class GeluCase:
    """GELU of x (rows, width)."""

    rows: int
    width: int
    approximate: str = "none"
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "gelu"

    @property
    def name(self) -> str:
        form = "erf" if self.approximate == "none" else self.approximate
        return f"{DTYPE_NAMES[self.dtype]}-{form}-{self.rows}x{self.width}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return (draw(self.rows, self.width, dtype=self.dtype, device=device, requires_grad=True),)

    def reference(self, *tensors: Tensor) -> Tensor:
        (x,) = tensors
        return reference.gelu(x, self.approximate)

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)


@dataclass(frozen=True)
class BiasGeluCase(GeluCase):
    """GELU of x (rows, width) plus a bias (width,)."""

    operation: ClassVar[str] = "bias_gelu"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        bias = draw(self.width, dtype=self.dtype, device=device, requires_grad=True, seed=1)
        return (*super().inputs(device), bias)

    def reference(self, *tensors: Tensor) -> Tensor:
        x, bias = tensors
        return reference.bias_gelu(x, bias, self.approximate)


@dataclass(frozen=True)
class GegluCase(GeluCase):
    """value * gelu(gate) of x (rows, 2 * width), value first."""

    operation: ClassVar[str] = "geglu"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return (draw(self.rows, 2 * self.width, dtype=self.dtype, device=device, requires_grad=True),)

    def reference(self, *tensors: Tensor) -> Tensor:
        (x,) = tensors
        return reference.geglu(x, None, self.approximate)


@dataclass(frozen=True)
class SwigluCase:
    """value * silu(gate) of x (rows, 2 * width), value first."""

    rows: int
    width: int
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "swiglu"

    @property
    def name(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}-{self.rows}x{self.width}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return (draw(self.rows, 2 * self.width, dtype=self.dtype, device=device, requires_grad=True),)

    def reference(self, *tensors: Tensor) -> Tensor:
        (x,) = tensors
        return reference.swiglu(x)

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)


@dataclass(frozen=True)
class MlpCase:
    """gelu(x W1^T + b1) W2^T + b2 of x (rows, width), with W1 (hidden, width)."""

    rows: int
    width: int
    hidden: int
    approximate: str = "tanh"
    dtype: torch.dtype = torch.float32

    operation: ClassVar[str] = "mlp"

    @property
    def name(self) -> str:
        form = "erf" if self.approximate == "none" else self.approximate
        return f"{DTYPE_NAMES[self.dtype]}-{form}-{self.rows}x{self.width}x{self.hidden}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        width, hidden = self.width, self.hidden
        x, *parameters = (
            draw(*shape, dtype=self.dtype, device=device, seed=seed)
            for seed, shape in enumerate(
                ((self.rows, width), (hidden, width), (hidden,), (width, hidden), (width,))
            )
        )
        # As after initialization: products keep the size of what they are made from.
        scales = (width**-0.5, 1.0, hidden**-0.5, 1.0)
        scaled = (p * scale for p, scale in zip(parameters, scales, strict=True))
        return tuple(t.requires_grad_() for t in (x, *scaled))

    def reference(self, *tensors: Tensor) -> Tensor:
        x, w1, b1, w2, b2 = tensors
        return F.linear(reference.gelu(F.linear(x, w1, b1), self.approximate), w2, b2)

    part = staticmethod(spread_rows)
    samples = staticmethod(everything)
