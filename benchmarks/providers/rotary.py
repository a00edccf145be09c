"""Rotary position embeddings, by PyTorch and by fastattn."""

from __future__ import annotations

import torch
from torch import Tensor

import fastattn
from benchmarks.cases import RotaryCase
from benchmarks.providers.registry import Function, Provider, compiled, provider, refuse_interpreter
from fastattn import reference


@provider("rotary", "naive")
def rotary_naive(case: RotaryCase, device: torch.device) -> Function:
    cos, sin = case.tables(device)
    return lambda x: reference.rotary_embedding(x, cos, sin, interleaved=case.interleaved)


@provider("rotary", "torch")
def rotary_torch(case: RotaryCase, device: torch.device) -> Function:
    """x * cos + rotate_half(x) * sin in float32, as models are written; PyTorch has no operator of its own."""
    tables = case.tables(device)
    if case.interleaved:
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in tables)
    else:
        cos, sin = (torch.cat((t, t), dim=-1) for t in tables)

    def rotate_half(x: Tensor) -> Tensor:
        if case.interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((-x2, x1), dim=-1)

    def rotate(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * cos + rotate_half(wide) * sin).to(x.dtype)

    return rotate


@provider("rotary", "torch-compile")
def rotary_compile(case: RotaryCase, device: torch.device) -> Function:
    return compiled(rotary_torch(case, device), device)


def _ours(implementation: str | None) -> Provider:
    def ours(case: RotaryCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        cos, sin = case.tables(device)
        return lambda x: fastattn.rotary_embedding(
            x, cos, sin, interleaved=case.interleaved, implementation=implementation
        )

    return ours


provider("rotary", "fastattn")(_ours(None))
provider("rotary", "fastattn-triton")(_ours("triton"))
provider("rotary", "fastattn-torch")(_ours("torch"))
