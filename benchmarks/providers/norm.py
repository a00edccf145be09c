"""Normalization, by PyTorch and by fastattn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.cases import AddLayerNormCase, AddRMSNormCase, LayerNormCase, RMSNormCase
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


@provider("rms_norm", "naive")
def rms_norm_naive(case: RMSNormCase, device: torch.device) -> Function:
    return lambda x, *weight: reference.rms_norm(x, case.width, *weight)


@provider("rms_norm", "torch")
def rms_norm_torch(case: RMSNormCase, device: torch.device) -> Function:
    return lambda x, *weight: F.rms_norm(x, (case.width,), *weight)


@provider("rms_norm", "torch-compile")
def rms_norm_compile(case: RMSNormCase, device: torch.device) -> Function:
    return compiled(rms_norm_naive(case, device), device)


def _rms_norm_ours(implementation: str | None) -> Provider:
    def ours(case: RMSNormCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        shape = (case.width,)
        return lambda x, *weight: fastattn.rms_norm(x, shape, *weight, implementation=implementation)

    return ours


provider("rms_norm", "fastattn")(_rms_norm_ours(None))
provider("rms_norm", "fastattn-triton")(_rms_norm_ours("triton"))
provider("rms_norm", "fastattn-torch")(_rms_norm_ours("torch"))


# These return two tensors, y and the sum, and a gradient arrives at each.
@provider("add_layer_norm", "naive")
def add_layer_norm_naive(case: AddLayerNormCase, device: torch.device) -> Function:
    return case.reference


@provider("add_layer_norm", "torch")
def add_layer_norm_torch(case: AddLayerNormCase, device: torch.device) -> Function:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        total = residual + x
        return F.layer_norm(total, (case.width,), weight.to(total), bias.to(total)).to(x.dtype), total

    return call


@provider("add_layer_norm", "torch-compile")
def add_layer_norm_compile(case: AddLayerNormCase, device: torch.device) -> Function:
    return compiled(add_layer_norm_naive(case, device), device)


def _add_layer_norm_ours(implementation: str | None) -> Provider:
    def ours(case: AddLayerNormCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        shape = (case.width,)

        def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            return fastattn.add_layer_norm(x, residual, shape, weight, bias, implementation=implementation)

        return call

    return ours


provider("add_layer_norm", "fastattn")(_add_layer_norm_ours(None))
provider("add_layer_norm", "fastattn-triton")(_add_layer_norm_ours("triton"))
provider("add_layer_norm", "fastattn-torch")(_add_layer_norm_ours("torch"))


@provider("add_rms_norm", "naive")
def add_rms_norm_naive(case: AddRMSNormCase, device: torch.device) -> Function:
    return case.reference


@provider("add_rms_norm", "torch")
def add_rms_norm_torch(case: AddRMSNormCase, device: torch.device) -> Function:
    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = residual + x
        return F.rms_norm(total, (case.width,), weight.to(total)).to(x.dtype), total

    return call


@provider("add_rms_norm", "torch-compile")
def add_rms_norm_compile(case: AddRMSNormCase, device: torch.device) -> Function:
    return compiled(add_rms_norm_naive(case, device), device)


def _add_rms_norm_ours(implementation: str | None) -> Provider:
    def ours(case: AddRMSNormCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        shape = (case.width,)

        def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return fastattn.add_rms_norm(x, residual, shape, weight, implementation=implementation)

        return call

    return ours


provider("add_rms_norm", "fastattn")(_add_rms_norm_ours(None))
provider("add_rms_norm", "fastattn-triton")(_add_rms_norm_ours("triton"))
provider("add_rms_norm", "fastattn-torch")(_add_rms_norm_ours("torch"))
