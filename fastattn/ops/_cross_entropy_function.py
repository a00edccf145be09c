"""The registered operators of the cross-entropy, and the autograd Function around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops._autograd import differentiable_gradients, needs_graph
from fastattn.ops._loss import LossOptions, operator_loss
from fastattn.ops._register import register


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    loss_dtype: torch.dtype,
    all_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[:-1]
    loss = logits.new_empty(shape if reduction == "none" else (), dtype=loss_dtype)
    kept = logits.new_empty(0 if reduction == "none" else (), dtype=torch.float32)
    return loss, logits.new_empty((2, *shape), dtype=torch.float32), kept


_OPTIONS = "int ignore_index, str reduction, float label_smoothing, float z_loss, float? softcap"
_SAVED = "Tensor? dloss, Tensor? dlse, Tensor logits, Tensor target, Tensor statistics, Tensor kept"

# Logits have the classes last; `all_rows` asks for the statistics of ignored rows too.
_forward = register(
    f"cross_entropy_forward(Tensor logits, Tensor target, {_OPTIONS}, ScalarType loss_dtype, bool all_rows)"
    " -> (Tensor, Tensor, Tensor)",
    launcher="kernels.cross_entropy_forward",
    fake=_forward_fake,
)
_backward = register(
    f"cross_entropy_backward({_SAVED}, {_OPTIONS}) -> Tensor",
    launcher="kernels.cross_entropy_backward",
    fake=lambda dloss, dlse, logits, *others: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
_backward_in_place = register(
    f"cross_entropy_backward_({_SAVED.replace('Tensor logits', 'Tensor(a!) logits')}, {_OPTIONS}) -> ()",
    launcher="kernels.cross_entropy_backward",
    fake=lambda *arguments: None,
)


class CrossEntropyFunction(torch.autograd.Function):
    """Saves the logits, the target, and two float32 statistics a row; the backward recomputes the softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        options: LossOptions,
        dtype: torch.dtype,
        return_lse: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        loss, statistics, kept = _forward(logits, target, *options, dtype, return_lse)
        ctx.save_for_backward(logits, target, statistics, kept)
        ctx.options, ctx.dtype, ctx.inplace, ctx.overwritten = options, dtype, inplace, False
        ctx.set_materialize_grads(False)
        return loss, statistics[0] + statistics[1] if return_lse else None

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if dloss is None and dlse is None:
            return None, *nothing
        logits, target, statistics, kept = _unpack(ctx)
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dloss, dlse, logits, target), *nothing
        given = (dloss, dlse, logits, target, statistics, kept, *ctx.options)
        if not ctx.inplace:
            return _backward(*given), *nothing
        _backward_in_place(*given)
        # A kernel's writes are not counted by themselves.
        torch.autograd.graph.increment_version(logits)
        ctx.overwritten = True
        return logits.detach(), *nothing


def _unpack(ctx: Any) -> tuple[Tensor, ...]:
    if not ctx.inplace:
        return ctx.saved_tensors
    if ctx.overwritten:
        raise RuntimeError(
            "fastattn.cross_entropy, inplace=True: the logits hold their gradient since the first backward; "
            "a second one needs inplace=False"
        )
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            "fastattn.cross_entropy, inplace=True: the logits, the target or the graph are not what they were at the "
            f"forward; another loss of the same logits, also in place, may have written over them ({error})"
        ) from error


def _differentiable_backward(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, logits: Tensor, target: Tensor
) -> Tensor | None:
    def both(logits: Tensor) -> list[Tensor]:
        rows = logits.reshape(-1, logits.size(-1))
        loss, lse = operator_loss(rows, target.reshape(-1), None, ctx.options, dlse is not None, ctx.dtype)
        outputs = []
        if dloss is not None:
            outputs.append(loss.to(dloss.dtype).reshape(dloss.shape))
        if dlse is not None and lse is not None:
            outputs.append(lse.reshape(dlse.shape))
        return outputs

    given = [gradient for gradient in (dloss, dlse) if gradient is not None]
    return differentiable_gradients(both, (logits,), (True,), given)[0]


def apply_cross_entropy(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    dtype: torch.dtype,
    return_lse: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss in `dtype` and, if asked for, the log-sum-exp; recorded for autograd where it is needed.

    Logits have the classes last.
    """
    if not needs_graph(logits):
        loss, statistics, _ = _forward(logits, target, *options, dtype, return_lse)
        return loss, statistics[0] + statistics[1] if return_lse else None
    # A compiler manages the memory of its graph itself.
    inplace = inplace and not torch.compiler.is_compiling()
    found: tuple[Tensor, Tensor | None] = CrossEntropyFunction.apply(
        logits, target, options, dtype, return_lse, inplace
    )
    return found
