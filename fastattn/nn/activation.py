"""Activation modules in the place of torch.nn's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.gelu import gelu


class GELU(torch.nn.GELU):
    """`torch.nn.GELU` by `fastattn.gelu`."""

    def __init__(self, approximate: str = "none", *, implementation: str | None = None) -> None:
        super().__init__(approximate)
        self.implementation = implementation

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.approximate, implementation=self.implementation)
