"""The loss of logits = input W^T + b, a chunk of rows at a time, so that the logits are never held whole.

Gradients are made where the logits are, in the forward (as in Liger Kernel, Hsu et al., 2024), and the incoming
gradient is multiplied in afterwards; in float16 what the mean divides by too, so that small ones do not underflow. The
products are PyTorch's; weight and bias gradients are added up in float32 (`_loss_sums`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastattn.dispatch import autocasts
from fastattn.ops._loss import LossOptions
from fastattn.ops._loss_sums import Sums, rows_of

_F = TypeVar("_F", bound=Callable[..., Any])

# Rows of a chunk come in multiples of what matrix products take at a time.
ROW_TILE = 128
# Logits that one thread of a CPU works on at a time, 512 KiB in float32: a quarter of a Xeon's L2. Losses and gradients
# of 256 rows and 32,768 classes in bfloat16 took 14 ms so, and 41 ms all at once in memory that is fresh each time.
_PIECE = 1 << 17


class Chunks(NamedTuple):
    """How a call is computed, in the order of the registered operators.

    Attributes:
        memory_budget: bytes that a chunk's logits and what is made of them may take; None for the rule of `chunk_rows`.
        compute_dtype: of the products.
        triton: whether the kernels compute the losses, rather than PyTorch's operators.
    """

    memory_budget: int | None
    compute_dtype: torch.dtype
    triton: bool


@lru_cache(maxsize=4096)
def chunk_rows(
    rows: int,
    width: int,
    classes: int,
    bytes_per_logit: int,
    itemsize: int,
    least: int,
    budget: int | None,
    piece: int = 0,
    piece_bytes: int = 0,
) -> int:
    """How many rows a chunk has, the last perhaps fewer; at least 1.

    Without a budget a chunk may take a quarter of the bytes that input and weight hold, but has `least` rows anyway.
    Chunks are of about one size, in multiples of 128 rows from there on. `piece` rows of it take `piece_bytes` a logit
    more.

    Each chunk reads and writes all of dweight in float32, 8 bytes for 2 FLOPs a row: on an H200 (4.8 TB/s, 790
    TFLOP/s of bf16 products) that takes as long as the product at 660 rows. `least` is 1,024 on a GPU; on a CPU 128,
    above which the time was seen not to fall, of 16 bits 512: a product of 256 rows and 32,768 classes took a Xeon as
    long as one of 512, and the chunk's part of dweight is rounded and widened besides.
    """
    most_bytes = (rows + classes) * width * itemsize // 4 if budget is None else budget
    of_pieces = piece * classes * piece_bytes
    if most_bytes < of_pieces + piece * classes * bytes_per_logit:  # a chunk is one piece
        of_pieces, bytes_per_logit = 0, bytes_per_logit + piece_bytes
    most = (most_bytes - of_pieces) // max(classes * bytes_per_logit, 1)
    most = max(most, least if budget is None else 1)
    if most >= rows:
        return max(rows, 1)
    if most < ROW_TILE:
        return most
    most = most // ROW_TILE * ROW_TILE
    chunks = -(-rows // most)
    return -(-rows // (chunks * ROW_TILE)) * ROW_TILE


def chunk_rows_of(input: Tensor, weight: Tensor, softcap: float | None, how: Chunks) -> int:
    """`chunk_rows` of a call with input (rows, width) and weight (classes, width)."""
    itemsize = how.compute_dtype.itemsize
    # See `_loss_of` and `_loss_by_operators`.
    work = 0 if how.triton else 4 * (itemsize < 4) + max(itemsize, 4) * (softcap is not None)
    least = 1024 if input.is_cuda else (4 if itemsize < 4 else 1) * ROW_TILE
    (rows, width), classes = input.shape, weight.size(0)
    if input.is_cpu:
        piece = piece_rows(classes)
        return chunk_rows(rows, width, classes, itemsize, itemsize, least, how.memory_budget, piece, work)
    return chunk_rows(rows, width, classes, itemsize + work, itemsize, least, how.memory_budget)


def piece_rows(classes: int) -> int:
    """How many rows of logits PyTorch's operators work on at a time on a CPU: what its threads' caches hold."""
    return max(_PIECE * torch.get_num_threads() // max(classes, 1), 1)


def _in_given_dtypes(function: _F) -> _F:
    """Decorator: turns autocast and autograd off; dtypes are chosen here, and gradients made by hand."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        with torch.no_grad():
            if not autocasts(arguments[0]):
                return function(*arguments)
            with torch.autocast(arguments[0].device.type, enabled=False):
                return function(*arguments)

    return run  # type: ignore[return-value]


def divides_first(options: LossOptions, how: Chunks, dtype: torch.dtype) -> bool:
    """Whether dlogits are those of a mean before they are rounded to the products' dtype, and dinput to its `dtype`.

    So dinput is rounded once wherever the incoming gradient is a power of 2. Not in float16, whose smallest number
    many a probability divided by the number of rows would not reach.
    """
    return options.reduction == "mean" and torch.float16 not in (how.compute_dtype, dtype)


def shares_of(target: Tensor, kept: Tensor) -> Tensor:
    """Each row's share of the mean, (rows,); without a row that is kept the gradients are 0, and stay so."""
    return kept.clamp(min=1.0).reciprocal_().expand(target.shape).contiguous()


@_in_given_dtypes
def linear_cross_entropy_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    needs_dinput: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    loss_dtype: torch.dtype,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the number of kept rows, and the gradients of the sum of the losses, or of their mean.

    Of the mean where `divides_first` says so.

    Args:
        input: (rows, width).
        target: (rows,).
        others: the fields of LossOptions and of Chunks.

    Returns:
        loss in `loss_dtype`; kept () in float32 or wider; dinput in input's dtype, dweight and dbias in float32 or
        wider, an empty tensor in the place of one that is not asked for.
    """
    options, how = LossOptions(*others[:5]), Chunks(*others[5:])
    wide = torch.promote_types(how.compute_dtype, torch.float32)
    losses = input.new_empty(target.shape, dtype=wide)
    sums = Sums.of(input, weight, needs_dinput, needs_dweight, needs_dbias, wide)
    needs_any = needs_dinput or needs_dweight or needs_dbias
    share = None
    if needs_any and divides_first(options, how, input.dtype):
        share = shares_of(target, _kept(target, options, wide))
    for rows, logits, work, x, w in _chunks(input, weight, bias, options.softcap, how):
        scale = None if share is None else rows_of(share, rows)
        dlogits = _loss_of(
            logits, work, rows_of(target, rows), scale, rows_of(losses, rows), options, needs_any
        )
        sums.add(rows, dlogits, x, w)
    loss, kept = _reduced(losses, target, options, loss_dtype, how.triton)
    return loss, kept, *sums.given(input)


@_in_given_dtypes
def linear_cross_entropy_backward(
    dloss: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    needs_dinput: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients where each row's loss has its own, dloss (rows,): every chunk is computed again."""
    options, how = LossOptions(*others[:5]), Chunks(*others[5:])
    wide = torch.promote_types(how.compute_dtype, torch.float32)
    dloss = dloss.to(wide).contiguous()
    losses = torch.empty_like(dloss)
    sums = Sums.of(input, weight, needs_dinput, needs_dweight, needs_dbias, wide)
    for rows, logits, work, x, w in _chunks(input, weight, bias, options.softcap, how):
        part, scale, of_losses = (rows_of(tensor, rows) for tensor in (target, dloss, losses))
        dlogits = _loss_of(logits, work, part, scale, of_losses, options, True)
        sums.add(rows, dlogits, x, w)
    return sums.given(input)


def _chunks(
    input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, how: Chunks
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor, Tensor]]:
    """Of each chunk its rows, its logits, memory for PyTorch's operators to work in, its input, and the weight.

    Logits, input and weight are in the products' dtype; logits and the memory, which may be the same, are those of
    the chunk before. The memory is of as many rows as are worked on at a time; the kernels need none.
    """
    rows, classes = input.size(0), weight.size(0)
    size = chunk_rows_of(input, weight, softcap, how)  # at most `rows`, if there are any
    dtype = how.compute_dtype
    weight = weight.to(dtype)
    if bias is not None:
        bias = bias.to(dtype)
    buffer = input.new_empty((size, classes), dtype=dtype)
    work = None
    if not how.triton:
        work = buffer[: min(size, piece_rows(classes))] if input.is_cpu else buffer
        if dtype.itemsize < 4:
            work = torch.empty_like(work, dtype=torch.float32)
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        x, logits = rows_of(input, chunk).to(dtype), rows_of(buffer, slice(0, chunk.stop - start))
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        yield chunk, logits, work, x, weight


def _kept(target: Tensor, options: LossOptions, dtype: torch.dtype) -> Tensor:
    """How many rows are not ignored, ()."""
    return (target != options.ignore_index).sum(dtype=dtype)


def _reduced(
    losses: Tensor, target: Tensor, options: LossOptions, dtype: torch.dtype, triton: bool
) -> tuple[Tensor, Tensor]:
    """The loss in `dtype`, of the losses of all rows, and how many of these are kept."""
    if options.reduction == "none":
        return losses.to(dtype), _kept(target, options, losses.dtype)
    mean = options.reduction == "mean"
    if triton:
        from fastattn.kernels.cross_entropy_forward import reduce_losses

        return reduce_losses(losses, target, options.ignore_index, mean, dtype)
    loss, kept = losses.sum(), _kept(target, options, losses.dtype)
    return (loss / kept if mean else loss).to(dtype), kept


def _loss_of(
    logits: Tensor,
    work: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    losses: Tensor,
    options: LossOptions,
    writes_gradient: bool,
) -> Tensor:
    """Writes a chunk's losses and, if asked for, dlogits over the logits, which it returns.

    `scale` (rows,) holds the gradients of the losses, None for ones. `work` is in the losses' dtype, of as many rows as
    PyTorch's operators work on at a time, and may be a part of the logits; without it the kernels are taken.
    """
    if work is not None:
        for start in range(0, logits.size(0), work.size(0)):
            rows = slice(start, start + work.size(0))
            part = logits[rows]
            x = part if part.dtype == work.dtype else work[: part.size(0)].copy_(part)
            of_rows = None if scale is None else scale[rows]
            _loss_by_operators(x, target[rows], of_rows, losses[rows], options, writes_gradient)
            if writes_gradient and x is not part:
                part.copy_(x)
        return logits
    from fastattn.kernels.cross_entropy_forward import cross_entropy_of_chunk

    ignore_index, _, label_smoothing, z_loss, softcap = options
    cross_entropy_of_chunk(
        logits, target, scale, losses, ignore_index, label_smoothing, z_loss, softcap, writes_gradient
    )
    return logits


def _loss_by_operators(
    x: Tensor,
    target: Tensor,
    scale: Tensor | None,
    losses: Tensor,
    options: LossOptions,
    writes_gradient: bool,
) -> None:
    """Of logits x, over which the gradient is written, and where that is not asked for something.

    With m the maximum of a row, lse = m + log sum exp(x - m); see `fastattn.cross_entropy` for the loss, whose gradient
    in x is (1 + 2 z lse) softmax(x) - (1 - s) onehot(target) - s / classes.
    """
    ignore_index, _, smoothing, z_loss, softcap = options
    ignored = target == ignore_index
    target = target.long()
    named_a_class = (target >= 0) & (target < x.size(1))
    named = target.masked_fill(~named_a_class, 0).unsqueeze(1)  # (rows, 1)
    capped = None
    if softcap is not None:
        x = x.div_(softcap).tanh_()
        capped = x.clone() if writes_gradient else None
        x.mul_(softcap)
    pivot = x.amax(1, keepdim=True)
    pivot.masked_fill_(pivot == -math.inf, 0.0)
    x.sub_(pivot)
    distance = -x.gather(1, named).squeeze(1)
    if smoothing:
        distance.mul_(1.0 - smoothing).sub_(x.mean(1), alpha=smoothing)
    # A target that is no class makes its row's loss and gradient NaN; PyTorch's operators would assert on a GPU, which
    # ends the process.
    total = x.exp_().sum(1).masked_fill_(~(named_a_class | ignored), math.nan)
    log_sum = total.log()
    torch.add(log_sum, distance, out=losses)
    of_softmax, of_target = total.reciprocal_(), torch.full_like(total, smoothing - 1.0)
    if z_loss:
        lse = log_sum.add_(pivot.squeeze(1))
        losses.addcmul_(lse, lse, value=z_loss)
        of_softmax.mul_(lse.mul_(2.0 * z_loss).add_(1.0))
    losses.masked_fill_(ignored, 0.0)
    if not writes_gradient:
        return
    if scale is not None:
        of_softmax.mul_(scale)
        of_target.mul_(scale)
    x.mul_(of_softmax.unsqueeze(1)).scatter_add_(1, named, of_target.unsqueeze(1))
    if smoothing:
        share = smoothing / x.size(1)
        x.sub_(share if scale is None else (scale * share).unsqueeze(1))
    if capped is not None:
        x.mul_(capped.square_().neg_().add_(1.0))
    _zero_rows(x, ignored)


def _zero_rows(tensor: Tensor, chosen: Tensor) -> None:
    """Zeros in the chosen rows, whatever is there."""
    if tensor.is_cpu:  # where looking at values waits for nothing
        tensor.index_fill_(0, chosen.nonzero().squeeze(1), 0.0)
    else:
        tensor.masked_fill_(chosen.unsqueeze(1), 0.0)
