"""What the operations with dropout share on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_dropout(dropout_p: Any) -> None:
    """Raises ValueError for what is no probability."""
    if not (isinstance(dropout_p, (int, float)) and 0.0 <= dropout_p <= 1.0):
        raise ValueError(f"dropout_p={dropout_p!r} must be a number from 0 to 1")


def draw_seed(tensor: Tensor) -> Tensor:
    """Seed and offset from PyTorch's generator of the tensor's device, so that `torch.manual_seed` fixes them."""
    return torch.randint(-(2**62), 2**62, (2,), device=tensor.device)
