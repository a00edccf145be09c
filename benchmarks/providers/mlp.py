"""Activations and the MLP, by PyTorch and by fastattn."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.cases import GeluCase, MlpCase
from benchmarks.providers.registry import (
    PROVIDERS,
    Function,
    Provider,
    compiled,
    provider,
    refuse_interpreter,
)
from fastattn import reference


@provider("gelu", "naive")
def gelu_naive(case: GeluCase, device: torch.device) -> Function:
    return lambda x: reference.gelu(x, case.approximate)


@provider("gelu", "torch")
def gelu_torch(case: GeluCase, device: torch.device) -> Function:
    return lambda x: F.gelu(x, approximate=case.approximate)


@provider("gelu", "torch-compile")
def gelu_compile(case: GeluCase, device: torch.device) -> Function:
    return compiled(gelu_naive(case, device), device)


def _gelu_ours(implementation: str | None) -> Provider:
    def ours(case: GeluCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        return lambda x: fastattn.gelu(x, case.approximate, implementation=implementation)

    return ours


provider("gelu", "fastattn")(_gelu_ours(None))
provider("gelu", "fastattn-triton")(_gelu_ours("triton"))
provider("gelu", "fastattn-torch")(_gelu_ours("torch"))


def _mlp(gelu: Callable[[Tensor, str], Tensor]) -> Provider:
    def provide(case: MlpCase, device: torch.device) -> Function:
        return lambda x, w1, b1, w2, b2: F.linear(gelu(F.linear(x, w1, b1), case.approximate), w2, b2)

    return provide


provider("mlp", "naive")(_mlp(reference.gelu))
provider("mlp", "torch")(_mlp(lambda x, approximate: F.gelu(x, approximate=approximate)))


@provider("mlp", "torch-compile")
def mlp_compile(case: MlpCase, device: torch.device) -> Function:
    return compiled(PROVIDERS["mlp"]["torch"](case, device), device)


@provider("mlp", "fastattn")
def mlp_ours(case: MlpCase, device: torch.device) -> Function:
    """PyTorch's products around our GELU; they are not fused yet."""
    refuse_interpreter(device)
    return _mlp(fastattn.gelu)(case, device)
