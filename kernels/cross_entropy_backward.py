"""The gradient of a cross-entropy from the saved statistics: one read of the logits, one write."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_contiguous
from fastattn.kernels._loss_config import CrossEntropyConfig, rows_plan, select_cross_entropy_backward_config
from fastattn.kernels._norm_tiles import _multiple_of
from fastattn.kernels.cross_entropy_forward import (
    _coefficients,
    _row_offsets,
    _write_gradient,
)


@triton.jit(do_not_specialize=["ROWS", "INNER", "stride_outer", "ignore_index", "stride_dlogits_outer"])
def _cross_entropy_backward_kernel(
    dloss_ptr,
    dlse_ptr,
    logits_ptr,
    target_ptr,
    statistics_ptr,
    kept_ptr,
    dlogits_ptr,
    stride_outer,
    stride_inner,
    stride_dlogits_outer,
    stride_dlogits_inner,
    INNER,
    ROWS,
    CLASSES,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    PER_ROW: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes a tile of dlogits; grid (cdiv(ROWS, BLOCK_M), cdiv(CLASSES, BLOCK_N)).

    Layouts as in the forward; dlogits has rows like the logits', and may be the logits. dloss is (ROWS,) where
    PER_ROW, else one number, divided by the one at `kept_ptr` if there is that. dlse (ROWS,) is the gradient of the
    log-sum-exp, or None.
    """
    stride_inner, CLASSES = _multiple_of(stride_inner, ALIGNMENT), _multiple_of(CLASSES, ALIGNMENT)
    stride_outer = _multiple_of(stride_outer, ALIGNMENT)
    stride_dlogits_inner = _multiple_of(stride_dlogits_inner, ALIGNMENT)
    stride_dlogits_outer = _multiple_of(stride_dlogits_outer, ALIGNMENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < ROWS  # (BLOCK_M,): the last program overruns
    inside = row_inside[:, None] & (columns < CLASSES)[None, :]  # (BLOCK_M, BLOCK_N): the last tile overruns
    target = tl.load(target_ptr + rows, mask=row_inside, other=ignore_index).to(tl.int64)
    kept = row_inside & (target != ignore_index)
    known = kept & (target >= 0) & (target < CLASSES)
    pivot = tl.load(statistics_ptr + rows, mask=row_inside, other=0.0)
    log_sum = tl.load(statistics_ptr + ROWS.to(tl.int64) + rows, mask=row_inside, other=0.0)

    if PER_ROW:
        scale = tl.load(dloss_ptr + rows, mask=row_inside, other=0.0).to(tl.float32)
    else:
        scale = tl.load(dloss_ptr).to(tl.float32)
        if kept_ptr is not None:
            scale = scale / tl.load(kept_ptr)
    # A target that is no class makes its row NaN, as its loss.
    scale = tl.where(kept, tl.where(known, scale, float("nan")), 0.0)
    of_softmax, of_target = _coefficients(scale, pivot + log_sum, smoothing, z_loss)
    share = None if smoothing is None else scale * smoothing / CLASSES
    if dlse_ptr is not None:
        # d lse / dx_j = p_j, for ignored rows too.
        kept = row_inside
        of_softmax = tl.where(scale == 0.0, 0.0, of_softmax) + tl.load(
            dlse_ptr + rows, mask=row_inside, other=0.0
        )
    row_ptrs = logits_ptr + _row_offsets(rows, stride_outer, stride_inner, INNER)[:, None]  # (BLOCK_M, 1)
    gradient_ptrs = (
        dlogits_ptr + _row_offsets(rows, stride_dlogits_outer, stride_dlogits_inner, INNER)[:, None]
    )
    _write_gradient(
        row_ptrs, gradient_ptrs, columns, inside, kept, target, pivot, log_sum,
        of_softmax, of_target, share, softcap,
    )  # fmt: skip


def cross_entropy_backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    kept: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    *,
    config: CrossEntropyConfig | None = None,
) -> Tensor:
    """dlogits, contiguous in the shape of logits (..., classes), from what the forward returned.

    Args:
        dloss: the gradient of the loss, one number, or with reduction "none" one for each row; None for 0.
        dlse: the gradient of the log-sum-exp, of logits' leading dimensions; None for 0.
        config: replaces the selected launch config.
    """
    dlogits = empty_contiguous(logits)
    _launch_backward(
        dloss, dlse, logits, target, statistics, kept, dlogits,
        ignore_index, reduction, label_smoothing, z_loss, softcap, config,
    )  # fmt: skip
    return dlogits


def cross_entropy_backward_(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    kept: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """As `cross_entropy_backward`, but dlogits is written over the logits."""
    _launch_backward(
        dloss, dlse, logits, target, statistics, kept, logits,
        ignore_index, reduction, label_smoothing, z_loss, softcap, None,
    )  # fmt: skip


def _launch_backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    kept: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    config: CrossEntropyConfig | None,
) -> None:
    if logits.numel() == 0:
        return
    chosen_for = _target.target_of(logits.device)
    strides, chosen, constants = rows_plan(
        logits.shape, logits.stride(), select_cross_entropy_backward_config, logits.dtype, config, chosen_for
    )
    rows, classes = constants["ROWS"], constants["CLASSES"]
    outer, inner = strides.outer_stride, strides.inner_stride
    if dlogits is not logits:
        inner = classes
        outer = 0 if strides.inner is None else classes * strides.inner
    if dloss is None:
        dloss = statistics.new_zeros(target.shape if reduction == "none" else ())
    grid = (ceil_div(rows, chosen.block_m), ceil_div(classes, chosen.block_n))
    with _target.launching_on(logits):
        launch(
            _cross_entropy_backward_kernel,
            grid,
            constants,
            dloss_ptr=dloss.contiguous(),
            dlse_ptr=None if dlse is None else dlse.contiguous(),
            logits_ptr=logits,
            target_ptr=target.contiguous(),
            statistics_ptr=statistics.contiguous(),
            kept_ptr=kept if reduction == "mean" else None,
            dlogits_ptr=dlogits,
            stride_dlogits_outer=outer,
            stride_dlogits_inner=inner,
            ignore_index=ignore_index,
            smoothing=label_smoothing or None,
            z_loss=z_loss or None,
            softcap=softcap,
            PER_ROW=reduction == "none",
        )
