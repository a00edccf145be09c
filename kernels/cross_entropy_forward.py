"""Cross-entropy of rows of logits: the loss in one pass, and the gradient in a second one where it is wanted at once.

A row's statistics are its maximum and the logarithm of sum exp(x - maximum), kept apart: their sum, the log-sum-exp,
would lose the digits of the second where logits are large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import empty_contiguous
from fastattn.kernels._loss_config import (
    CrossEntropyConfig,
    rows_plan,
    select_cross_entropy_forward_config,
)
from fastattn.kernels._math import LOG2_E, _tanh
from fastattn.kernels._norm_tiles import _multiple_of
from fastattn.kernels._plan import constants_of

# What one program adds up at a time; the sums of a loss are small beside its logits.
_REDUCE_BLOCK = 4096


@triton.jit
def _exp(x):
    """exp of what is at most 0, in two instructions; tl.exp takes three more to keep results below 2^-126."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _row_offsets(rows, stride_outer, stride_inner, INNER):
    """Where rows (int64) begin, see `RowStrides`."""
    if INNER is None:
        return rows * stride_inner
    else:
        return rows // INNER * stride_outer + rows % INNER * stride_inner


@triton.jit
def _soft_capped(x, softcap, DTYPE: tl.constexpr):
    """softcap * tanh(x / softcap) of logits that were stored in DTYPE.

    To an ulp or two in float32. In 16 bits to 1e-7 of the cap, a hundredth of what a logit at the cap is rounded by:
    the exact form took so many instructions that the compiler waited for each load before it asked for the next.
    """
    if DTYPE.primitive_bitwidth == 16:
        return _tanh(x * (1.0 / softcap), "ratio") * softcap
    else:
        return _tanh(x / softcap, "exact") * softcap


@triton.jit
def _load_logits(row_ptrs, columns, inside, softcap):
    """A float32 tile of soft-capped logits, -inf outside; row_ptrs is (BLOCK_M, 1)."""
    x = tl.load(row_ptrs + columns[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    if softcap is not None:
        x = tl.where(inside, _soft_capped(x, softcap, row_ptrs.dtype.element_ty), float("-inf"))
    return x


@triton.jit
def _load_target(row_ptrs, target, known, softcap):
    """The soft-capped logit of each row's target (BLOCK_M, 1); NaN where the target is no class."""
    x = tl.load(row_ptrs + target[:, None], mask=known[:, None], other=float("nan")).to(tl.float32)
    if softcap is not None:
        x = _soft_capped(x, softcap, row_ptrs.dtype.element_ty)
    return x


@triton.jit
def _row_statistics(
    row_ptrs, read, limit, CLASSES, softcap, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Of rows seen tile by tile: the maximum, log sum exp(x - maximum), and with SUMS sum (x - maximum).

    Online softmax (Milakov and Gimelshein, 2018, algorithm 3), in natural units: the difference is taken before the
    product with log2(e), so that large logits lose nothing. A maximum of -inf is replaced by 0.
    """
    columns = tl.arange(0, BLOCK_N)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    distances = tl.zeros((BLOCK_M,), tl.float32)
    pivot = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, limit, BLOCK_N):
        inside = read[:, None] & (start + columns < CLASSES)[None, :]  # the last column tile overruns
        x = _load_logits(row_ptrs, start + columns, inside, softcap)  # (BLOCK_M, BLOCK_N)
        old_pivot = pivot
        new_max = tl.maximum(row_max, tl.max(x, 1))
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        x -= pivot[:, None]
        row_sum = row_sum * _exp(row_max - pivot) + tl.sum(_exp(x), 1)
        row_max = new_max
        if SUMS:
            # What was summed relative to the old pivot moves by the distance of the two, once for each class.
            moved = tl.where(old_pivot == pivot, 0.0, (old_pivot - pivot) * start)
            distances += moved + tl.sum(tl.where(inside, x, 0.0), 1)
    return pivot, tl.log(row_sum), distances


@triton.jit
def _write_gradient(
    row_ptrs,
    gradient_ptrs,
    columns,
    inside,
    kept,
    target,
    pivot,
    log_sum,
    of_softmax,
    of_target,
    share,
    softcap,
):
    """Stores one tile of p * of_softmax - onehot(target) * of_target - share, times the soft cap's derivative.

    p = exp(x - pivot - log_sum); `of_softmax`, `of_target` and `share` are (BLOCK_M,). Rows that are not kept get
    zeros, and `share` is None where there is none.
    """
    x = _load_logits(row_ptrs, columns, inside, softcap)
    gradient = _exp((x - pivot[:, None]) - log_sum[:, None]) * of_softmax[:, None]
    gradient -= tl.where(columns[None, :] == target[:, None], of_target[:, None], 0.0)
    if share is not None:
        gradient -= share[:, None]
    if softcap is not None:
        # d tanh(u) / du = 1 - tanh(u)^2
        slope = x / softcap
        gradient *= 1.0 - slope * slope
    gradient = tl.where(kept[:, None], gradient, 0.0)
    tl.store(gradient_ptrs + columns[None, :], gradient.to(gradient_ptrs.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["ROWS", "INNER", "stride_outer", "ignore_index"])
def _cross_entropy_forward_kernel(
    logits_ptr,
    target_ptr,
    scale_ptr,
    loss_ptr,
    statistics_ptr,
    stride_outer,
    stride_inner,
    INNER,
    ROWS,
    CLASSES,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    ALL_ROWS: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes the losses of BLOCK_M rows; grid (cdiv(ROWS, BLOCK_M),).

    Logits have unit column stride; target, scale, loss (ROWS,) and statistics (2, ROWS) are contiguous. ALIGNMENT
    divides CLASSES and the row strides. Rows whose target is `ignore_index` get loss 0, and are not read without
    ALL_ROWS. Where WRITES_GRADIENT, a row's gradient, times its scale if there is one, replaces its logits.
    `smoothing`, `z_loss` and `softcap` are None where nothing is asked for, `statistics_ptr` where they are not kept.
    """
    stride_inner, CLASSES = _multiple_of(stride_inner, ALIGNMENT), _multiple_of(CLASSES, ALIGNMENT)
    stride_outer = _multiple_of(stride_outer, ALIGNMENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < ROWS  # (BLOCK_M,): the last program overruns
    target = tl.load(target_ptr + rows, mask=row_inside, other=ignore_index).to(tl.int64)
    kept = row_inside & (target != ignore_index)
    known = kept & (target >= 0) & (target < CLASSES)
    row_ptrs = logits_ptr + _row_offsets(rows, stride_outer, stride_inner, INNER)[:, None]  # (BLOCK_M, 1)

    read = row_inside if ALL_ROWS else kept
    limit = tl.max(tl.where(read, CLASSES, 0), 0)
    pivot, log_sum, distances = _row_statistics(
        row_ptrs, read, limit, CLASSES, softcap, smoothing is not None, BLOCK_M, BLOCK_N
    )
    # loss = lse - (1 - s) x_target - s mean(x) + z lse^2, with lse = pivot + log_sum.
    distance = pivot - tl.sum(_load_target(row_ptrs, target, known, softcap), 1)
    if smoothing is not None:
        distance = distance * (1.0 - smoothing) - distances / CLASSES * smoothing
        distance = tl.where(known, distance, float("nan"))
    loss = log_sum + distance
    if z_loss is not None:
        lse = pivot + log_sum
        loss += lse * lse * z_loss
    loss = tl.where(kept, loss, 0.0)
    tl.store(loss_ptr + rows, loss.to(loss_ptr.dtype.element_ty), mask=row_inside)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + rows, pivot, mask=row_inside)
        tl.store(statistics_ptr + ROWS.to(tl.int64) + rows, log_sum, mask=row_inside)

    if WRITES_GRADIENT:
        of_target = tl.where(known, 1.0, float("nan"))
        if scale_ptr is not None:
            of_target *= tl.load(scale_ptr + rows, mask=row_inside, other=0.0)
        share = None if smoothing is None else of_target * smoothing / CLASSES
        of_softmax, of_target = _coefficients(of_target, pivot + log_sum, smoothing, z_loss)
        columns = tl.arange(0, BLOCK_N)
        # No warp may write before all have read the target's logit.
        tl.debug_barrier()
        for start in range(0, CLASSES, BLOCK_N):
            inside = row_inside[:, None] & (start + columns < CLASSES)[None, :]
            _write_gradient(
                row_ptrs, row_ptrs, start + columns, inside, kept, target, pivot, log_sum,
                of_softmax, of_target, share, softcap,
            )  # fmt: skip


@triton.jit
def _coefficients(scale, lse, smoothing, z_loss):
    """What `_write_gradient` multiplies with, for rows whose loss has the gradient `scale` (BLOCK_M,).

    d loss / dx_j = (1 + 2 z lse) p_j - (1 - s) onehot_j - s / classes, whose last term is not among them: where there
    is none it is None, which a function cannot return in Triton 3.6.
    """
    of_softmax, of_target = scale, scale
    if z_loss is not None:
        of_softmax = scale * (lse * (2.0 * z_loss) + 1.0)
    if smoothing is not None:
        of_target = scale * (1.0 - smoothing)
    return of_softmax, of_target


@triton.jit(do_not_specialize=["ROWS", "ignore_index"])
def _reduce_losses_kernel(
    losses_ptr, target_ptr, loss_ptr, kept_ptr, ROWS, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program adds up all losses in a fixed order, and counts the rows that are kept; grid (1,)."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, ROWS, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = rows < ROWS  # (BLOCK,): the last tile overruns
        total += tl.load(losses_ptr + rows, mask=inside, other=0.0)
        target = tl.load(target_ptr + rows, mask=inside, other=ignore_index).to(tl.int64)
        count += (inside & (target != ignore_index)).to(tl.int32)
    loss = tl.sum(total, 0)
    kept = tl.sum(count, 0).to(tl.float32)
    if MEAN:
        loss = loss / kept
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(kept_ptr, kept)


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    loss_dtype: torch.dtype,
    all_rows: bool,
    *,
    config: CrossEntropyConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of logits (..., classes), reduced; see `fastattn.cross_entropy` for the formula.

    Args:
        logits: rows that `row_strides` can describe.
        target: integers of logits' leading dimensions.
        all_rows: whether the statistics of ignored rows are computed too.
        config: replaces the selected launch config.

    Returns:
        the loss in `loss_dtype`; statistics (2, ...) in float32, the maximum and the logarithm of the sum of
        exponentials relative to it; and the number of rows that are kept, in float32 (with reduction "none", which
        needs none, an empty tensor).
    """
    losses = empty_contiguous(target, loss_dtype if reduction == "none" else torch.float32)
    statistics = logits.new_empty((2, *target.shape), dtype=torch.float32)
    _launch_forward(
        logits, target, None, losses, statistics, ignore_index, label_smoothing, z_loss, softcap,
        all_rows=all_rows, writes_gradient=False, config=config,
    )  # fmt: skip
    if reduction == "none":
        return losses, statistics, statistics.new_empty(0)
    loss, kept = reduce_losses(losses, target, ignore_index, reduction == "mean", loss_dtype)
    return loss, statistics, kept


def reduce_losses(
    losses: Tensor, target: Tensor, ignore_index: int, mean: bool, loss_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum or the mean of the losses of rows, in `loss_dtype`, and the number of rows that are kept, in float32."""
    loss = losses.new_empty((), dtype=loss_dtype)
    kept = losses.new_empty(())
    with _target.launching_on(losses):
        launch(
            _reduce_losses_kernel,
            (1,),
            constants_of(
                _target.target_of(losses.device),
                ROWS=losses.numel(),
                MEAN=mean,
                BLOCK=_REDUCE_BLOCK,
                num_warps=8,
            ),
            losses_ptr=losses,
            target_ptr=target.contiguous(),
            loss_ptr=loss,
            kept_ptr=kept,
            ignore_index=ignore_index,
        )
    return loss, kept


def cross_entropy_of_chunk(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    losses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    writes_gradient: bool,
    *,
    config: CrossEntropyConfig | None = None,
) -> None:
    """Writes the losses (rows,) of logits (rows, classes), and over the logits, if asked for, their gradient.

    Args:
        scale: (rows,) float32, the gradients of the losses; None for ones.
    """
    _launch_forward(
        logits, target, scale, losses, None, ignore_index, label_smoothing, z_loss, softcap,
        all_rows=False, writes_gradient=writes_gradient, config=config,
    )  # fmt: skip


def _launch_forward(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    losses: Tensor,
    statistics: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    *,
    all_rows: bool,
    writes_gradient: bool,
    config: CrossEntropyConfig | None,
) -> None:
    if losses.numel() == 0:
        return
    target_device = _target.target_of(logits.device)
    _, chosen, constants = rows_plan(
        logits.shape,
        logits.stride(),
        select_cross_entropy_forward_config,
        logits.dtype,
        config,
        target_device,
    )
    with _target.launching_on(logits):
        launch(
            _cross_entropy_forward_kernel,
            (ceil_div(losses.numel(), chosen.block_m),),
            constants,
            logits_ptr=logits,
            # The kernel reads them side by side; a column of a batch of tokens is not.
            target_ptr=target.contiguous(),
            scale_ptr=None if scale is None else scale.contiguous(),
            loss_ptr=losses,
            statistics_ptr=statistics,
            ignore_index=ignore_index,
            smoothing=label_smoothing or None,
            z_loss=z_loss or None,
            softcap=softcap,
            ALL_ROWS=all_rows,
            WRITES_GRADIENT=writes_gradient,
        )
