"""Losses, by PyTorch and by fastattn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.cases import LinearLossCase, LossCase
from benchmarks.providers.registry import Absent, Function, Provider, compiled, provider, refuse_interpreter


@provider("loss", "naive")
def loss_naive(case: LossCase, device: torch.device) -> Function:
    targets = case.targets(device)

    def naive(logits: Tensor) -> Tensor:
        chosen = (
            torch.log_softmax(logits.float(), dim=1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        )
        kept = targets != -100
        return (-(chosen * kept).sum() / kept.sum()).to(logits.dtype)

    return naive


@provider("loss", "torch")
def loss_torch(case: LossCase, device: torch.device) -> Function:
    targets = case.targets(device)
    return lambda logits: F.cross_entropy(logits, targets)


@provider("loss", "torch-compile")
def loss_compile(case: LossCase, device: torch.device) -> Function:
    return compiled(loss_naive(case, device), device)


def _loss_ours(implementation: str | None) -> Provider:
    def ours(case: LossCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        targets = case.targets(device)
        return lambda logits: fastattn.cross_entropy(logits, targets, implementation=implementation)

    return ours


provider("loss", "fastattn")(_loss_ours(None))
provider("loss", "fastattn-triton")(_loss_ours("triton"))
provider("loss", "fastattn-torch")(_loss_ours("torch"))


@provider("linear_loss", "naive")
def linear_loss_naive(case: LinearLossCase, device: torch.device) -> Function:
    """All logits, and the formula."""
    return case.reference


@provider("linear_loss", "torch")
def linear_loss_torch(case: LinearLossCase, device: torch.device) -> Function:
    targets = case.targets(device)
    return lambda x, weight: F.cross_entropy(F.linear(x, weight), targets)


@provider("linear_loss", "torch-chunked")
def linear_loss_torch_chunked(case: LinearLossCase, device: torch.device) -> Function:
    """PyTorch's own in chunks, as its options are by default; without options it is the two calls of "torch"."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"torch.nn.functional.linear_cross_entropy has no chunks in PyTorch {torch.__version__}")
    if device.type == "cpu" and case.vocabulary > 4096:
        # Chunks of some rows, each of which adds to the whole gradient of the weight.
        raise Absent("its step took 12 to 19 s on a CPU at 512 x 256 x 32,768, and a suite takes dozens")
    targets, options = case.targets(device), torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight: F.linear_cross_entropy(x, weight, targets, options=options)


@provider("linear_loss", "torch-compile")
def linear_loss_compile(case: LinearLossCase, device: torch.device) -> Function:
    return compiled(linear_loss_torch(case, device), device)


def _linear_loss_ours(implementation: str | None) -> Provider:
    def ours(case: LinearLossCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        targets = case.targets(device)
        return lambda x, weight: fastattn.linear_cross_entropy(
            x, weight, targets, implementation=implementation
        )

    return ours


provider("linear_loss", "fastattn")(_linear_loss_ours(None))
provider("linear_loss", "fastattn-triton")(_linear_loss_ours("triton"))
provider("linear_loss", "fastattn-torch")(_linear_loss_ours("torch"))
