"""Liger Kernel's functions as providers, written against 0.8.5: absent where it is not installed.

None has been run here yet: without a GPU each is absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import (
    AddRMSNormCase,
    GegluCase,
    LayerNormCase,
    LinearLossCase,
    LossCase,
    RMSNormCase,
    RotaryCase,
    SwigluCase,
)
from benchmarks.providers import registry
from benchmarks.providers.registry import NOTES, Absent, Function, provider

# What it takes where a case names no epsilon, as PyTorch does.
_EPS = torch.finfo(torch.float32).eps


def _functional(device: torch.device) -> Any:
    return registry.import_peer("liger_kernel.transformers.functional", device)


@provider("layer_norm", "liger")
def liger_layer_norm(case: LayerNormCase, device: torch.device) -> Function:
    function = _functional(device).liger_layer_norm
    if not case.affine:
        raise Absent("Liger's LayerNorm has a weight and a bias")
    return lambda x, weight, bias: function(x, weight, bias, 1e-5)


@provider("rms_norm", "liger")
def liger_rms_norm(case: RMSNormCase, device: torch.device) -> Function:
    """Not in place, as it is by default: the gradient that arrives would be written over."""
    function = _functional(device).liger_rms_norm
    if not case.affine:
        raise Absent("Liger's RMSNorm has a weight")
    return lambda x, weight: function(x, weight, _EPS, in_place=False)


@provider("add_rms_norm", "liger")
def liger_add_rms_norm(case: AddRMSNormCase, device: torch.device) -> Function:
    """It returns (y, sum), as ours does; not in place, as above."""
    function = _functional(device).liger_fused_add_rms_norm
    if case.residual_dtype not in (None, case.dtype):
        raise Absent("Liger's sum has x's dtype")
    return lambda x, residual, weight: function(x, residual, weight, _EPS, in_place=False)


@provider("geglu", "liger")
def liger_geglu(case: GegluCase, device: torch.device) -> Function:
    """The gate comes first. Halves that lie apart are copied before its kernel reads them."""
    function = _functional(device).liger_geglu
    if case.approximate != "tanh":
        raise Absent(f"Liger's GEGLU has the tanh form alone, not approximate={case.approximate!r}")
    return lambda x: _gated(function, x)


@provider("swiglu", "liger")
def liger_swiglu(case: SwigluCase, device: torch.device) -> Function:
    """The gate comes first, as above."""
    function = _functional(device).liger_swiglu
    return lambda x: _gated(function, x)


def _gated(function: Function, x: Tensor) -> Any:
    value, gate = x.chunk(2, dim=-1)
    return function(gate, value)


@provider("rotary", "liger")
def liger_rotary(case: RotaryCase, device: torch.device) -> Function:
    """On a copy of x, over which it writes. It takes keys too: one head of zeros, which stay zeros."""
    function = _functional(device).liger_rope
    if case.interleaved:
        raise Absent("Liger's rotary embedding turns halves; its interleaved form takes complex tables")
    cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(0) for t in case.tables(device))
    keys = torch.zeros(case.batch, case.seq, 1, case.head_dim, dtype=case.dtype, device=device)

    def call(x: Tensor) -> Tensor:
        turned: Tensor = function(x.clone(), keys.transpose(1, 2), cos, sin)[0]
        return turned

    return call


@provider("loss", "liger")
def liger_cross_entropy(case: LossCase, device: torch.device) -> Function:
    """With gradients on a copy of the logits, over which it writes them: the other providers need the logits.

    Without, it has to be told by a tensor that needs none: what it writes follows `logits.requires_grad` alone.
    """
    function = _functional(device).liger_cross_entropy
    targets = case.targets(device)

    def call(logits: Tensor) -> Tensor:
        graph = logits.requires_grad and torch.is_grad_enabled()
        loss: Tensor = function(logits.clone() if graph else logits.detach(), targets)
        return loss

    return call


@provider("linear_loss", "liger")
def liger_linear_cross_entropy(case: LinearLossCase, device: torch.device) -> Function:
    """Its functional form, by name: positions after the first three have changed between versions."""
    function = _functional(device).liger_fused_linear_cross_entropy
    targets = case.targets(device)
    return lambda x, weight: function(input=x, weight=weight, target=targets)


NOTES["loss", "liger", "forward+backward"] = "its time holds a copy of the logits, which it overwrites"
for _direction in ("forward", "forward+backward"):
    NOTES["rotary", "liger", _direction] = (
        "its time holds a copy of x, which it overwrites, and a head of keys"
    )
    for _operation in ("geglu", "swiglu"):
        NOTES[_operation, "liger", _direction] = (
            "its time holds copies of the halves, which it takes as two tensors"
        )
