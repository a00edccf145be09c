"""Activation modules: torch.nn's own in its place, and gated ones with their linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops.gated import geglu, reglu, swiglu
from fastattn.ops.gelu import gelu


class GELU(torch.nn.GELU):
    """`torch.nn.GELU` by `fastattn.gelu`; `approximate` may be "quick" too."""

    def __init__(self, approximate: str = "none", *, implementation: str | None = None) -> None:
        super().__init__(approximate)
        self.implementation = implementation

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.approximate, implementation=self.implementation)


class _GatedLinear(torch.nn.Module):
    """A linear layer to twice `dim_out`, whose second half gates the first: (..., dim_in) to (..., dim_out).

    The layer is called `proj`, and holds value before gate, as in diffusers and x-transformers.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(dim_in, 2 * dim_out, bias=bias, device=device, dtype=dtype)
        self.implementation = implementation


class GEGLU(_GatedLinear):
    """value * gelu(gate) of a linear layer's halves, by `fastattn.geglu`.

    Args:
        dim_in, dim_out: widths of input and output; the layer, `proj`, is twice as wide as the output.
        bias: whether the layer has one.
        approximate: "none", "tanh" or "quick".
        device, dtype: of the parameters.
        implementation: as in `fastattn.geglu`.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        bias: bool = True,
        approximate: str = "none",
        device: Any = None,
        dtype: Any = None,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(dim_in, dim_out, bias, device, dtype, implementation=implementation)
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        return geglu(self.proj(input), None, self.approximate, implementation=self.implementation)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SwiGLU(_GatedLinear):
    """value * silu(gate) of the halves of a linear layer, `proj`, by `fastattn.swiglu`; arguments as `GEGLU`'s."""

    def forward(self, input: Tensor) -> Tensor:
        return swiglu(self.proj(input), implementation=self.implementation)


class ReGLU(_GatedLinear):
    """value * relu(gate) of the halves of a linear layer, `proj`, by `fastattn.reglu`; arguments as `GEGLU`'s."""

    def forward(self, input: Tensor) -> Tensor:
        return reglu(self.proj(input), implementation=self.implementation)
