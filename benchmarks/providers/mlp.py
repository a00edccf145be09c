"""Activations and the MLP, by PyTorch and by fastattn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.cases import BiasGeluCase, GegluCase, GeluCase, MlpCase, SwigluCase
from benchmarks.providers.registry import (
    PROVIDERS,
    Function,
    Provider,
    compiled,
    provider,
    refuse_interpreter,
)
from fastattn import reference
from fastattn.kernels._pointwise_config import GELU_FORMS


@provider("gelu", "naive")
def gelu_naive(case: GeluCase, device: torch.device) -> Function:
    return lambda x: reference.gelu(x, case.approximate)


@provider("gelu", "torch")
def gelu_torch(case: GeluCase, device: torch.device) -> Function:
    return lambda x: F.gelu(x, approximate=case.approximate)


@provider("gelu", "torch-compile")
def gelu_compile(case: GeluCase, device: torch.device) -> Function:
    return compiled(gelu_naive(case, device), device)


@provider("bias_gelu", "naive")
def bias_gelu_naive(case: BiasGeluCase, device: torch.device) -> Function:
    return lambda x, bias: reference.bias_gelu(x, bias, case.approximate)


@provider("bias_gelu", "torch")
def bias_gelu_torch(case: BiasGeluCase, device: torch.device) -> Function:
    return lambda x, bias: F.gelu(x + bias, approximate=case.approximate)


@provider("geglu", "naive")
def geglu_naive(case: GegluCase, device: torch.device) -> Function:
    return lambda x: reference.geglu(x, None, case.approximate)


@provider("geglu", "torch")
def geglu_torch(case: GegluCase, device: torch.device) -> Function:
    def call(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate, approximate=case.approximate)

    return call


@provider("swiglu", "naive")
def swiglu_naive(case: SwigluCase, device: torch.device) -> Function:
    return case.reference


@provider("swiglu", "torch")
def swiglu_torch(case: SwigluCase, device: torch.device) -> Function:
    def call(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)

    return call


@provider("bias_gelu", "torch-compile")
def bias_gelu_compile(case: BiasGeluCase, device: torch.device) -> Function:
    return compiled(bias_gelu_torch(case, device), device)


@provider("geglu", "torch-compile")
def geglu_compile(case: GegluCase, device: torch.device) -> Function:
    return compiled(geglu_torch(case, device), device)


@provider("swiglu", "torch-compile")
def swiglu_compile(case: SwigluCase, device: torch.device) -> Function:
    return compiled(swiglu_torch(case, device), device)


_OURS: dict[str, Callable[..., Tensor]] = {
    "gelu": lambda case, x, **options: fastattn.gelu(x, case.approximate, **options),
    "bias_gelu": lambda case, x, bias, **options: fastattn.bias_gelu(x, bias, case.approximate, **options),
    "geglu": lambda case, x, **options: fastattn.geglu(x, None, case.approximate, **options),
    "swiglu": lambda case, x, **options: fastattn.swiglu(x, **options),
    "mlp": lambda case, *tensors, **options: fastattn.mlp(
        *tensors, activation=GELU_FORMS[case.approximate], **options
    ),
}


def _ours(operation: str, implementation: str | None) -> Provider:
    def ours(case: Any, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        return partial(_OURS[operation], case, implementation=implementation)

    return ours


for _operation in _OURS:
    provider(_operation, "fastattn")(_ours(_operation, None))
    if _operation != "mlp":
        provider(_operation, "fastattn-triton")(_ours(_operation, "triton"))
        provider(_operation, "fastattn-torch")(_ours(_operation, "torch"))


def _mlp(gelu: Callable[[Tensor, str], Tensor]) -> Provider:
    def provide(case: MlpCase, device: torch.device) -> Function:
        return lambda x, w1, b1, w2, b2: F.linear(gelu(F.linear(x, w1, b1), case.approximate), w2, b2)

    return provide


provider("mlp", "naive")(_mlp(reference.gelu))
provider("mlp", "torch")(_mlp(lambda x, approximate: F.gelu(x, approximate=approximate)))


@provider("mlp", "torch-compile")
def mlp_compile(case: MlpCase, device: torch.device) -> Function:
    return compiled(PROVIDERS["mlp"]["torch"](case, device), device)


# Both paths, whichever of them "fastattn" takes.
provider("mlp", "fastattn-fused")(_ours("mlp", "triton-fused"))
provider("mlp", "fastattn-separate")(_ours("mlp", "triton-separate"))
