"""Losses, by PyTorch and by fastattn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import LossCase
from benchmarks.providers.registry import Absent, Function, compiled, provider


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


@provider("loss", "fastattn")
def loss_ours(case: LossCase, device: torch.device) -> Function:
    raise Absent("fastattn has no fused cross-entropy yet")
