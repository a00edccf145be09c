"""What the tests of fastattn.rotary_embedding share: tables, and the rotation as model code has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.testing import make_tensor

FAST = ("triton", "torch")
ALL = (*FAST, "reference")
DIM = 8


def tables(length: int = 40, rotary_dim: int = DIM, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    return fastattn.rotary_tables(length, rotary_dim, device=device)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x cos + rotate_half(x) sin as model code has it, with angles (seq, pairs) or (batch, 1, seq, pairs)."""
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        half = x.size(-1) // 2
        other = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.to(x.dtype) + other * sin.to(x.dtype)


def both(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx."""
    x = x.detach().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, make_tensor(*x.shape, device=x.device, seed=9).to(x.dtype))[0]


def look_at_no_values(monkeypatch: Any) -> None:
    """As where positions and lengths lie on a GPU: they are not checked."""
    for module in ("_rotary_call", "_rotary_torch", "_attention_call"):
        monkeypatch.setattr(f"fastattn.ops.{module}.checking", lambda tensor: False)
