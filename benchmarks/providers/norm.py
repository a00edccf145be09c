"""Normalization, by PyTorch and by fastattn."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastattn
from benchmarks.cases import LayerNormCase
from benchmarks.providers.registry import Function, Provider, compiled, provider, refuse_interpreter
from fastattn import reference


@provider("layer_norm", "naive")
def layer_norm_naive(case: LayerNormCase, device: torch.device) -> Function:
    return lambda x, *affine: reference.layer_norm(x, case.width, *affine)


@provider("layer_norm", "torch")
def layer_norm_torch(case: LayerNormCase, device: torch.device) -> Function:
    return lambda x, *affine: F.layer_norm(x, (case.width,), *affine)


@provider("layer_norm", "torch-compile")
def layer_norm_compile(case: LayerNormCase, device: torch.device) -> Function:
    return compiled(layer_norm_naive(case, device), device)


def _layer_norm_ours(implementation: str | None) -> Provider:
    def ours(case: LayerNormCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        shape = (case.width,)
        return lambda x, *affine: fastattn.layer_norm(x, shape, *affine, implementation=implementation)

    return ours


provider("layer_norm", "fastattn")(_layer_norm_ours(None))
provider("layer_norm", "fastattn-triton")(_layer_norm_ours("triton"))
provider("layer_norm", "fastattn-torch")(_layer_norm_ours("torch"))
