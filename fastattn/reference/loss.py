"""Losses by their formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """-sum_c q_c w_c log softmax(x)_c + z_loss * logsumexp(x)^2, over the classes c, dimension 1 (0 of a vector).

    q is `target` if that holds probabilities, else 1 at the class it names, and then smoothed: (1 - s) q + s / classes.
    x is `softcap * tanh(logits / softcap)`. Rows whose target is `ignore_index` count for nothing.
    """
    x = logits.movedim(1, -1) if logits.dim() > 1 else logits
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    classes = x.size(-1)
    w = x.new_ones(classes) if weight is None else weight.to(x.dtype)
    if target.is_floating_point():
        q = target.movedim(1, -1) if target.dim() > 1 else target
        kept = q.new_ones(q.shape[:-1], dtype=torch.bool)
        of_row = kept.to(x.dtype)
    else:
        target = target.reshape(x.shape[:-1]).long()
        kept = target != ignore_index
        named = torch.where(kept, target, 0)
        q = F.one_hot(named, classes).to(x.dtype)
        of_row = w[named] * kept
    q = (1.0 - label_smoothing) * q + label_smoothing / classes
    lse = torch.logsumexp(x, -1)
    log_p = x - lse.unsqueeze(-1)
    losses = -torch.where(q == 0.0, 0.0, q * w * log_p).sum(-1)
    losses = torch.where(kept, losses, 0.0)
    squares = torch.where(kept, z_loss * lse.square(), 0.0)
    if reduction == "none":
        loss = losses + squares if z_loss else losses
    else:
        loss, square = losses.sum(), squares.sum()
        if reduction == "mean":
            loss, square = loss / of_row.sum(), square / kept.sum()
        loss = loss + square if z_loss else loss
    return (loss, lse) if return_lse else loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The cross-entropy of logits = input W^T + b, with input (..., width) and target (...)."""
    logits = F.linear(input.reshape(-1, input.size(-1)), linear_weight, linear_bias)
    loss = cross_entropy(
        logits, target.reshape(-1), None, ignore_index, reduction, label_smoothing, z_loss, softcap
    )
    assert isinstance(loss, Tensor)
    return loss.reshape(target.shape) if reduction == "none" else loss
