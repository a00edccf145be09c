"""The arguments of the four normalizations: checked, and handed to an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch, reference
from fastattn.dispatch import (
    TRITON_DTYPES,
    Implementation,
    NotSupported,
    autocasts,
    checking,
    refuse_dtype,
    refuse_triton,
)
from fastattn.ops import _norm_torch
from fastattn.ops._again import Again
from fastattn.ops._check import check_floating, check_same_device, fits
from fastattn.ops._dropout import check_dropout, draw_seed
from fastattn.ops._norm_operators import NormOptions, apply_norm

_TORCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Shape = int | Sequence[int]


class Features(NamedTuple):
    """What a call asks for beyond x, a weight and a bias: the public functions' keyword arguments.

    `rms` says RMSNorm, `adds` that there is a sum before it, which is returned too.
    """

    rms: bool
    adds: bool
    zero_centered: bool = False
    out_dtype: torch.dtype | None = None
    return_statistics: bool = False
    save: str = "input"
    dropout_p: float = 0
    rowscale: Tensor | None = None
    residual_dtype: torch.dtype | None = None


# Of calls that ask for nothing.
LAYER, RMS = Features(rms=False, adds=False), Features(rms=True, adds=False)
ADD_LAYER, ADD_RMS = Features(rms=False, adds=True), Features(rms=True, adds=True)


def check(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    features: Features,
) -> None:
    """Raises TypeError, ValueError or NotSupported for arguments that no implementation takes."""
    if not (x is not None and fits(x, x) and fits(weight, x) and fits(bias, x)):
        check_floating("x", x=x, weight=weight, bias=bias)
        check_same_device("x", x, weight=weight, bias=bias)
    shape = _as_shape(normalized_shape)
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape={shape} must be the last {len(shape)} dimensions of x, which has "
            f"shape {tuple(x.shape)}"
        )
    if weight is not None and weight.shape != shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, not normalized_shape={shape}")
    if bias is not None and bias.shape != shape:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, not normalized_shape={shape}")
    if not isinstance(eps, (float, int)) and not (eps is None and features.rms):
        raise TypeError(f"eps must be a float, not {type(eps).__name__}")
    if features.out_dtype is not None:
        _check_dtype("out_dtype", features.out_dtype)
    if features.save != "input":
        _check_save(weight, features)
    if features.adds:
        _check_sum(x, residual, len(shape), features)


def at_once(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    features: Features,
) -> Any:
    """What a call without options gives that needs no check, or None.

    On a CPU, of tensors of one dtype, that is PyTorch's own function, which asks what `check` asks; where it raises,
    the error is `check`'s. On a GPU, what a call launches whose like was made before.
    """
    adds = features is ADD_LAYER or features is ADD_RMS
    if not (adds or features is LAYER or features is RMS) or torch.compiler.is_compiling():
        return None
    if dispatch.INTERPRETING or getattr(x, "is_cuda", False):
        return _call_again(x, residual, normalized_shape, weight, bias, eps, features)
    try:
        dtype = x.dtype
        if not (
            x.is_cpu
            and not x.is_nested
            and dtype in _TORCH_DTYPES
            and (weight is None or weight.dtype is dtype)
            and (bias is None or bias.dtype is dtype)
            and (eps is None or type(eps) is float)
        ):
            return None
        shape = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
        if not all(type(size) is int for size in shape):  # type: ignore[union-attr]
            return None
        if not adds:
            return _norm_torch.plain(x, shape, weight, bias, eps, features.rms)  # type: ignore[arg-type]
        if (
            residual is None
            or residual.dtype is not dtype
            or residual.shape != x.shape  # which PyTorch would broadcast
        ):
            return None
        total = residual + x
        return _norm_torch.plain(total, shape, weight, bias, eps, features.rms), total  # type: ignore[arg-type]
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def _call_again(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    features: Features,
) -> Any:
    shape = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
    if not isinstance(shape, (tuple, list)) or (features.adds and residual is None):
        return None
    shape = tuple(shape)
    others = (shape, *map(type, shape), eps, type(eps), features.rms)
    run = _again((x, residual, weight, bias), others, x, residual, shape, weight, bias, eps, features)
    if run is None:
        return None
    y, summed, _, _ = run(x, residual, weight, bias)
    return (y, summed) if features.adds else y


def _learn(
    x: Tensor,
    residual: Tensor | None,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    features: Features,
) -> Any:
    check(x, residual, shape, weight, bias, eps, features)
    if _refuse_triton(x, residual, shape, weight, bias, eps, features) is not None:
        return None
    from fastattn.kernels.norm_again import plain_norm

    return plain_norm(x, residual, weight, bias, len(shape), float(_eps_of(eps)), not features.rms)


_again = Again(_learn)


def _eps_of(eps: float | None) -> float:
    return torch.finfo(torch.float32).eps if eps is None else eps


def _check_save(weight: Tensor | None, features: Features) -> None:
    if features.save != "output":
        raise ValueError(f"save={features.save!r} must be 'input' or 'output'")
    if weight is not None and checking(weight):
        zero = -1.0 if features.zero_centered else 0.0
        if (weight.detach() == zero).any():
            raise ValueError(f"save='output' recomputes x from y / scale, and a scale is 0 (weight={zero})")


def _check_sum(x: Tensor, residual: Tensor | None, dims: int, features: Features) -> None:
    rowscale = features.rowscale
    if not (fits(residual, x) and fits(rowscale, x)):
        check_floating(residual=residual, rowscale=rowscale)
        check_same_device("x", x, residual=residual, rowscale=rowscale)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, not x's {tuple(x.shape)}")
    if features.dropout_p != 0:
        check_dropout(features.dropout_p)
    if features.residual_dtype is not None:
        _check_dtype("residual_dtype", features.residual_dtype)
    if rowscale is not None:
        rows = x.shape[: x.dim() - dims]
        if rowscale.shape != rows:
            raise ValueError(
                f"rowscale has shape {tuple(rowscale.shape)}, not {tuple(rows)}, one factor a row"
            )
        if rowscale.requires_grad and torch.is_grad_enabled():
            raise NotSupported("rowscale has no gradient: detach it, or multiply x by it")


def _check_dtype(name: str, dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name}={dtype} must be a floating-point dtype, or None")


def _as_shape(normalized_shape: Shape) -> tuple[int, ...]:
    if isinstance(normalized_shape, (int, torch.SymInt, Integral)):
        normalized_shape = (normalized_shape,)
    elif not isinstance(normalized_shape, (tuple, list, Sequence)):
        raise TypeError(
            f"normalized_shape must be an int or a sequence of ints, not {type(normalized_shape).__name__}"
        )
    for size in normalized_shape:
        if not isinstance(size, (int, torch.SymInt, Integral)) or isinstance(size, bool):
            raise TypeError(f"normalized_shape={normalized_shape!r} holds {size!r}, which is not an int")
    if not normalized_shape:
        raise ValueError("normalized_shape=() must have at least one dimension")
    return tuple(normalized_shape)


def out_dtype_of(x: Tensor, features: Features) -> torch.dtype:
    """y's dtype: what is asked for, or what autocast makes of PyTorch's function on this device type.

    A GPU's autocast computes normalizations in float32, but in float64 where that is given; the CPU's leaves them
    alone, and meta tensors have none.
    """
    if features.out_dtype is not None:
        return features.out_dtype
    if x.device.type == "cpu" or not autocasts(x):
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def _sum_dtype(x: Tensor, residual: Tensor | None, features: Features) -> torch.dtype:
    return features.residual_dtype or (x if residual is None else residual).dtype


def _is_x_itself(x: Tensor, residual: Tensor | None, features: Features) -> bool:
    """Whether the sum has x as its only term, unchanged."""
    return (
        residual is None
        and not features.dropout_p
        and features.rowscale is None
        and features.residual_dtype in (None, x.dtype)
    )


def _refuse_triton(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    features: Features,
) -> str | None:
    dtype = x.dtype
    reason = refuse_triton(x, dtype)
    if reason is not None:
        return reason
    for tensor in (residual, weight, bias, features.rowscale):
        if tensor is not None and tensor.dtype != dtype:
            reason = refuse_triton(tensor, tensor.dtype)
            if reason is not None:
                return reason
    for asked in (features.out_dtype, features.residual_dtype):
        if asked is not None and asked not in TRITON_DTYPES:
            return refuse_dtype(asked)
    return None


def _refuse_torch(x: Tensor, residual: Tensor | None, *others: Any) -> str | None:
    if x.dtype in _TORCH_DTYPES and (residual is None or residual.dtype in _TORCH_DTYPES):
        return None
    wrong = x if residual is None or x.dtype not in _TORCH_DTYPES else residual
    return f"dtype={wrong.dtype} is not one of float16, bfloat16, float32, float64"


def _run_triton(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    features: Features,
) -> Any:
    dims = 1 if isinstance(normalized_shape, int) else len(_as_shape(normalized_shape))
    sums = features.adds and not _is_x_itself(x, residual, features)
    options = NormOptions(
        dims,
        _eps_of(eps),
        not features.rms,
        features.zero_centered,
        float(features.dropout_p),
        _sum_dtype(x, residual, features) if sums else None,
        out_dtype_of(x, features),
    )
    seed = draw_seed(x) if features.dropout_p else None
    found = apply_norm(
        features.save == "output",
        features.return_statistics,
        options,
        x,
        residual,
        weight,
        bias,
        features.rowscale,
        seed,
    )
    if sums or not features.adds:
        return found
    return (found[0], x, *found[1:]) if isinstance(found, tuple) else (found, x)


def _run_torch(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    features: Features,
) -> Any:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else _as_shape(normalized_shape)
    # PyTorch's call at once where it is one, since each further question costs host time.
    if not (features.adds or features.return_statistics or features.zero_centered or features.out_dtype):
        dtype = x.dtype
        if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
            return _norm_torch.plain(x, shape, weight, bias, eps, features.rms)
    normalized = x
    if features.adds and not _is_x_itself(x, residual, features):
        dtype = _sum_dtype(x, residual, features)
        normalized = _norm_torch.residual_sum(x, residual, features.rowscale, features.dropout_p, dtype)
    y = _norm_torch.normalize(
        normalized, shape, weight, bias, eps, features.rms, features.zero_centered, out_dtype_of(x, features)
    )
    return _results(y, normalized, len(shape), eps, features)


def _run_reference(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    features: Features,
) -> Any:
    shape = _as_shape(normalized_shape)
    normalized = x
    if features.adds:
        normalized = reference.residual_sum(
            x,
            residual,
            dropout_p=features.dropout_p,
            rowscale=features.rowscale,
            residual_dtype=features.residual_dtype,
        )
    options: dict[str, Any] = {
        "zero_centered_weight": features.zero_centered,
        "out_dtype": out_dtype_of(x, features),
    }
    if features.rms:
        y = reference.rms_norm(normalized, shape, weight, eps, **options)
    else:
        y = reference.layer_norm(normalized, shape, weight, bias, 0.0 if eps is None else eps, **options)
    return _results(y, normalized, len(shape), eps, features)


def _results(y: Tensor, normalized: Tensor, dims: int, eps: float | None, features: Features) -> Any:
    if not features.adds and not features.return_statistics:
        return y
    found = (y, normalized) if features.adds else (y,)
    if features.return_statistics:
        return (*found, *_norm_torch.statistics(normalized, dims, eps, features.rms))
    return found


def _describe_torch(x: Tensor, residual: Tensor | None, *others: Any) -> str:
    features = others[-1]
    name = "torch.nn.functional.rms_norm" if features.rms else "torch.nn.functional.layer_norm"
    return name + (" of a sum by PyTorch's operators" if features.adds else "")


def _describe_triton(x: Tensor, residual: Tensor | None, *others: Any) -> str:
    features = others[-1]
    kept = "y" if features.save == "output" else "what is normalized"
    statistics = "rstd" if features.rms else "mean and rstd"
    return f"Triton kernels each way, saving {kept} and float32 {statistics}"


IMPLEMENTATIONS = (
    Implementation("triton", run=_run_triton, refuse=_refuse_triton, describe=_describe_triton),
    Implementation("torch", run=_run_torch, refuse=_refuse_torch, describe=_describe_torch),
    Implementation(
        "reference",
        run=_run_reference,
        refuse=lambda *arguments: None,
        describe=lambda *arguments: "the formula in PyTorch operators",
        only_by_name=True,
    ),
)
