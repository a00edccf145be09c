"""What layers and models fuse around a residual stream, and when they may.

What computes with a part's parameters, and not by calling it, does so only where the part is what was put there and
nothing watches it: another module in its place, a hook (pruning, sharding) or a parametrization is called.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastattn.dispatch import linear_dtype
from fastattn.nn.norm import LayerNorm
from fastattn.ops.norm import add_layer_norm, layer_norm

_M = TypeVar("_M", bound=torch.nn.Module)


def is_plain(module: Any, kind: type[_M]) -> TypeGuard[_M]:
    """Whether the module is of this very class and nothing watches its calls: then its parameters say it all."""
    return (
        type(module) is kind
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
    )


def dropout_p(dropout: torch.nn.Module) -> float | None:
    """The probability that an element is dropped; None where the module may do something else."""
    if is_plain(dropout, torch.nn.Identity):
        return 0
    if not is_plain(dropout, torch.nn.Dropout):
        return None
    return dropout.p if dropout.training else 0


def normalize(x: Tensor, norm: torch.nn.Module, out_dtype: torch.dtype | None = None) -> Tensor:
    """norm(x), in `out_dtype` where the norm is ours; None for its own."""
    if out_dtype is None or not is_plain(norm, LayerNorm):
        out: Tensor = norm(x)
        return out
    y: Tensor = layer_norm(
        x,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        out_dtype=out_dtype,
        implementation=norm.implementation,
    )
    return y


def add_and_normalize(
    branch: Tensor,
    x: Tensor,
    dropout: torch.nn.Module,
    norm: torch.nn.Module,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(total), total) of total = x + dropout(branch); the first in `out_dtype`, or in the sum's dtype."""
    if not is_plain(norm, LayerNorm):
        total = x + dropout(branch)
        return norm(total), total
    p = dropout_p(dropout)
    if p is None:
        branch, p = dropout(branch), 0
    # Within autocast the branch alone is narrow. The norm of the sum has the sum's dtype, as with PyTorch's operators.
    dtype = None if branch.dtype == x.dtype else torch.promote_types(branch.dtype, x.dtype)
    y, total = add_layer_norm(
        branch,
        x,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        dropout_p=p,
        residual_dtype=dtype,
        out_dtype=dtype if out_dtype is None else out_dtype,
        implementation=norm.implementation,
    )
    return y, total


def read_stream(
    x: Tensor, branch: Tensor | None, dropout: torch.nn.Module, norm: torch.nn.Module
) -> tuple[Tensor, Tensor]:
    """What linear layers read of the stream with a branch added, normalised; and that sum.

    Within autocast the first is written in its dtype at once, so that no wide copy of it is made.

    Args:
        x: the stream.
        branch: has yet to be added to it; None for nothing.
        dropout: of the branch.
    """
    narrow = linear_dtype(x)
    out_dtype = None if narrow == x.dtype else narrow
    if branch is None:
        return normalize(x, norm, out_dtype), x
    return add_and_normalize(branch, x, dropout, norm, out_dtype)
