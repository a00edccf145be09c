"""The registered operators of the normalizations, and the autograd Function around them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops._autograd import differentiable_gradients, needs_graph, refuse_second_derivative
from fastattn.ops._norm_torch import normalize
from fastattn.ops._register import register


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rowscale: Tensor | None,
    dropout_seed: Tensor | None,
    dims: int,
    eps: float,
    centered: bool,
    zero_centered: bool,
    dropout_p: float,
    sum_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[: x.dim() - dims]
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(0 if sum_dtype is None else x.shape, dtype=sum_dtype),
        x.new_empty(rows if centered else 0, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


def _backward_fake(
    dy: Tensor,
    dresidual_out: Tensor | None,
    kept: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rowscale: Tensor | None,
    dropout_seed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dims: int,
    centered: bool,
    zero_centered: bool,
    from_output: bool,
    dropout_p: float,
    dsum_dtype: torch.dtype | None,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = kept.shape[kept.dim() - dims :]
    return (
        kept.new_empty(0 if dsum_dtype is None else kept.shape, dtype=dsum_dtype),
        kept.new_empty(0 if dx_dtype is None else kept.shape, dtype=dx_dtype),
        kept.new_empty(0 if dweight_dtype is None else shape, dtype=dweight_dtype),
        kept.new_empty(0 if dbias_dtype is None else shape, dtype=dbias_dtype),
    )


# `dims` is the number of trailing dimensions that are normalized over; see the launchers for the rest. A dtype of None
# says that a result is not asked for; an operator cannot return None, so an empty tensor stands in its place.
_forward = register(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? rowscale, Tensor? dropout_seed,"
    " int dims, float eps, bool centered, bool zero_centered, float dropout_p, ScalarType? sum_dtype,"
    " ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher="kernels.norm_forward",
    fake=_forward_fake,
)
_backward = register(
    "norm_backward(Tensor dy, Tensor? dresidual_out, Tensor kept, Tensor? weight, Tensor? bias, Tensor? rowscale,"
    " Tensor? dropout_seed, Tensor? mean, Tensor rstd, int dims, bool centered, bool zero_centered, bool from_output,"
    " float dropout_p, ScalarType? dsum_dtype, ScalarType? dx_dtype, ScalarType? dweight_dtype,"
    " ScalarType? dbias_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher="kernels.norm_backward",
    fake=_backward_fake,
)


class NormOptions(NamedTuple):
    """The last arguments of the forward operator, see `fastattn.kernels.norm_forward.norm_forward`."""

    dims: int
    eps: float
    centered: bool
    zero_centered: bool
    dropout_p: float
    sum_dtype: torch.dtype | None
    out_dtype: torch.dtype


class NormFunction(torch.autograd.Function):
    """What `apply_norm` returns, with its gradients.

    Saves what was normalized or, `from_output`, y and bias; weight; the float32 statistics; x_hat is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        from_output: bool,
        return_statistics: bool,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        rowscale: Tensor | None,
        dropout_seed: Tensor | None,
        options: NormOptions,
    ) -> Tensor | tuple[Tensor, ...]:
        y, summed, mean, rstd = _forward(x, residual, weight, bias, rowscale, dropout_seed, *options)
        ctx.options = options
        ctx.from_output = from_output
        ctx.save_for_backward(
            y if from_output else x if options.sum_dtype is None else summed,
            weight,
            bias if from_output else None,
            rowscale,
            dropout_seed,
            mean if options.centered and not from_output else None,
            rstd,
        )
        # Of these, backward needs the dtypes alone; double backward takes the value of bias to be zero.
        ctx.x_dtype = x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        # The sum where only the parameters are trained; what follows it is then not recorded for nothing.
        constants = [] if options.sum_dtype is None or any(ctx.needs_input_grad[2:4]) else [summed]
        if return_statistics:
            constants += [mean, rstd] if options.centered else [rstd]
        if constants:
            ctx.mark_non_differentiable(*constants)
        return _asked_for(options, return_statistics, y, summed, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: checkpointing unpacks each tensor one time.
        saved = ctx.saved_tensors
        dresidual_out = None if ctx.options.sum_dtype is None else others[0]
        if dy is None:
            # y is not used: the norm has no part in any gradient, and its x_hat, of which a zero weight behind a saved
            # y leaves NaN, is not asked for.
            found = [*_branch_gradients(ctx, saved, dresidual_out), None, None]
        elif torch.is_grad_enabled() and not ctx.from_output:
            found = _differentiable_backward(ctx, saved, dy, dresidual_out)
        else:
            found = _kernel_backward(ctx, saved, dy, dresidual_out)
        return None, None, *found, None, None, None


def _asked_for(
    options: NormOptions, return_statistics: bool, y: Tensor, summed: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """y, the sum where there is one, and the statistics where asked for; y alone is no tuple."""
    if options.sum_dtype is None and not return_statistics:
        return y
    found = (y,) if options.sum_dtype is None else (y, summed)
    if not return_statistics:
        return found
    return (*found, mean, rstd) if options.centered else (*found, rstd)


def _kernel_backward(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor, dresidual_out: Tensor | None
) -> list[Tensor | None]:
    """Gradients of x, residual, weight and bias; None for those not asked for."""
    kept, weight, bias, rowscale, dropout_seed, mean, rstd = saved
    needs = need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[2:6]
    # One tensor serves both where the branch is added as it is.
    shared = rowscale is None and dropout_seed is None and ctx.residual_dtype in (None, ctx.x_dtype)
    if shared:
        dsum_dtype = ctx.x_dtype if need_x or need_residual else None
    else:
        dsum_dtype = ctx.residual_dtype if need_residual else None
    dims, _, centered, zero_centered, dropout_p, _, _ = ctx.options
    dsum, dx, dweight, dbias = _backward(
        dy,
        dresidual_out,
        kept,
        weight,
        bias,
        rowscale,
        dropout_seed,
        mean,
        rstd,
        dims,
        centered,
        zero_centered,
        ctx.from_output,
        dropout_p,
        dsum_dtype,
        ctx.x_dtype if need_x and not shared else None,
        weight.dtype if need_weight else None,
        ctx.bias_dtype if need_bias else None,
    )
    found = [dsum if shared else dx, dsum, dweight, dbias]
    if torch.is_grad_enabled():
        name, instead = "a normalization with save='output'", "save='input' has one"
        found = refuse_second_derivative(name, found, (kept, weight, dy, dresidual_out), instead)
    return [gradient if need else None for gradient, need in zip(found, needs, strict=True)]


def _differentiable_backward(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor, dresidual_out: Tensor | None
) -> list[Tensor | None]:
    """As `_kernel_backward`, from PyTorch's operators."""
    kept, weight = saved[:2]
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[2:6]
    dims, eps, centered, zero_centered, _, _, out_dtype = ctx.options
    shape = kept.shape[kept.dim() - dims :]
    # No gradient depends on bias, so any value will do.
    bias = None if ctx.bias_dtype is None else kept.new_zeros(shape, dtype=ctx.bias_dtype).requires_grad_()
    dsum, dweight, dbias = differentiable_gradients(
        lambda h, weight, bias: normalize(
            h, shape, weight, bias, eps, not centered, zero_centered, out_dtype
        ),
        (kept, weight, bias),
        (need_x or need_residual, need_weight, need_bias),
        dy,
    )
    if dsum is not None and dresidual_out is not None:
        dsum = dsum + dresidual_out
    return [*_branch_gradients(ctx, saved, dsum), dweight, dbias]


def _branch_gradients(
    ctx: Any, saved: tuple[Tensor, ...], dsum: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and residual from that of their sum, by PyTorch's operators; None for those not asked for."""
    kept, _, _, rowscale, dropout_seed, _, _ = saved
    need_x, need_residual = ctx.needs_input_grad[2:4]
    if dsum is None:
        return None, None
    dx, dims = dsum, ctx.options.dims
    if need_x and rowscale is not None:
        dx = dx * rowscale.float().reshape(rowscale.shape + (1,) * dims)
    if need_x and dropout_seed is not None:
        dx = dx * dropout_factors(kept, dropout_seed, dims, ctx.options.dropout_p)
    return (
        dx.to(ctx.x_dtype) if need_x else None,
        dsum.to(ctx.residual_dtype) if need_residual else None,
    )


def dropout_factors(like: Tensor, dropout_seed: Tensor, dims: int, dropout_p: float) -> Tensor:
    """What dropout multiplies each element by, 0 or 1 / (1 - p), in float32: the sum that the kernel makes of ones."""
    with torch.no_grad():
        ones = torch.ones(like.shape, device=like.device)
        options = NormOptions(dims, 1.0, False, False, dropout_p, torch.float32, torch.float32)
        return _forward(ones, None, None, None, None, dropout_seed, *options)[1]


def apply_norm(
    from_output: bool, return_statistics: bool, options: NormOptions, x: Tensor, *others: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """y, the sum where there is one, and the statistics where asked for; recorded for autograd where it is needed.

    `others` are residual, weight, bias, rowscale and dropout_seed. y alone is no tuple.
    """
    if not needs_graph(x, *others):
        return _asked_for(options, return_statistics, *_forward(x, *others, *options))
    if torch.compiler.is_compiling():
        # The compiler refuses a Function that is given one tensor twice.
        others = tuple(None if t is None else t.view_as(t) for t in others)
    return NormFunction.apply(from_output, return_statistics, x, *others, options)
