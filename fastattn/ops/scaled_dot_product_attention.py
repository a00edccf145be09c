"""`torch.nn.functional.scaled_dot_product_attention` to the letter: fused where the kernels take the call."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import (
    scaled_dot_product_attention as torch_sdpa,  # bound here: F's may be replaced by ours
)

from fastattn import dispatch, reference
from fastattn.dispatch import Implementation, NotSupported, Operation
from fastattn.ops._attention_call import Features, check_attention
from fastattn.ops._attention_operators import run_attention
from fastattn.ops._attention_torch import holds_all_scores, run_torch_attention
from fastattn.ops._attention_triton import refuse_triton_attention
from fastattn.ops._check import check_floating
from fastattn.ops.attention import cast_attention
from fastattn.ops.attention_varlen import nested_attention, refuse_nested


class _Refused(Exception):
    """A call that is not ours to fuse; the message says why."""


def _check_sdpa(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> None:
    check_floating("query", "key", "value", query=query, key=key, value=value)


def _overrides(tensor: Tensor | None) -> bool:
    """Whether a subclass of Tensor has its own say in what PyTorch's functions do."""
    return type(tensor) is not Tensor and isinstance(tensor, Tensor) and (
        type(tensor).__torch_function__ not in _PLAIN_TORCH_FUNCTIONS
    )  # fmt: skip


_PLAIN_TORCH_FUNCTIONS = (Tensor.__torch_function__, torch._C._disabled_torch_function_impl)


def _canonical(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Any, ...]:
    """The arguments of `run_attention` for what PyTorch's function takes: 4-D, batches and heads broadcast.

    Raises:
        _Refused: PyTorch's own function has to take the call, or to refuse it.
    """
    if any(map(_overrides, (query, key, value))):
        raise _Refused("a subclass of Tensor has its own attention")
    if not (isinstance(dropout_p, (float, int)) and 0.0 <= dropout_p <= 1.0):
        raise _Refused(f"dropout_p={dropout_p!r} is no number from 0 to 1")
    if type(is_causal) is not bool:
        raise _Refused(f"is_causal={is_causal!r} is not a bool")
    if not (attn_mask is None or isinstance(attn_mask, Tensor)):
        raise _Refused(f"attn_mask is a {type(attn_mask).__name__}")
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise _Refused("query, key and value need 2 dimensions at least")
    if not query.dtype == key.dtype == value.dtype:
        raise _Refused("the dtypes differ")
    causal: bool | str = "top_left" if is_causal else False
    if _overrides(attn_mask):
        causal, attn_mask = _causal_bias(attn_mask, query, key, is_causal), None
    elif is_causal and attn_mask is not None:
        raise _Refused("attn_mask and is_causal together are refused by PyTorch's function")
    q, k, v, batches = _four_dimensions(query, key, value, enable_gqa)
    features = None
    if attn_mask is not None or dropout_p:
        mask = None if attn_mask is None else _mask_of(attn_mask, query, (*batches, *q.shape[1:3], k.size(2)))
        boolean = mask is not None and mask.dtype == torch.bool
        features = Features(
            bias=None if boolean else mask, mask=mask if boolean else None, dropout_p=float(dropout_p)
        )
    try:
        check_attention(q, k, v, causal, scale, features, False)
    except (TypeError, ValueError) as error:
        raise _Refused(str(error)) from error
    return q, k, v, causal, scale, features, False


def _causal_bias(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> str:
    """The alignment that one of torch.nn.attention.bias's masks stands for."""
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(bias, CausalBias) or is_causal:
        raise _Refused(f"attn_mask is a {type(bias).__name__}")
    if (bias.seq_len_q, bias.seq_len_kv) != (query.size(-2), key.size(-2)):
        raise _Refused(f"attn_mask is made for {bias.seq_len_q} x {bias.seq_len_kv} scores")
    return "top_left" if bias.variant == CausalVariant.UPPER_LEFT else "bottom_right"


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(batch, heads, seq, width) of each, and the batch dimensions that were made one."""
    tensors = [t.unsqueeze(0) if t.dim() == 2 else t for t in (query, key, value)]
    try:
        batches = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
    except RuntimeError as error:
        raise _Refused(str(error)) from error
    batch = math.prod(batches)  # not -1, which an empty tensor does not determine
    q, k, v = (t.expand(*batches, *t.shape[-3:]).reshape(batch, *t.shape[-3:]) for t in tensors)
    heads, k_heads, v_heads = q.size(1), k.size(1), v.size(1)
    most = max(heads, k_heads, v_heads)
    if enable_gqa:
        if min(k_heads, v_heads) == 0 or heads % k_heads or heads % v_heads:
            raise _Refused(f"{heads} heads do not divide among {k_heads} and {v_heads}")
        most = k_heads if k_heads == v_heads else math.lcm(k_heads, v_heads)
    elif any(count not in (1, most) for count in (heads, k_heads, v_heads)):
        raise _Refused("head counts differ without enable_gqa")
    else:
        q = q.expand(-1, most, -1, -1)
        most = 1 if k_heads == v_heads == 1 else most
    return q, _with_heads(k, most), _with_heads(v, most), tuple(batches)


def _with_heads(keys: Tensor, heads: int) -> Tensor:
    """Keys or values for so many heads: one shared without a copy, several repeated with one."""
    if keys.size(1) == 1:
        return keys.expand(-1, heads, -1, -1)
    return keys if keys.size(1) == heads else keys.repeat_interleave(heads // keys.size(1), dim=1)


def _mask_of(mask: Tensor, query: Tensor, full: tuple[int, ...]) -> Tensor:
    """A mask of at most 4 dimensions; one of more has its batches made one, with a copy where some are broadcast."""
    if mask.dim() < 2:
        raise _Refused("attn_mask needs 2 dimensions at least")
    if mask.dtype not in (torch.bool, query.dtype) and not (
        mask.dtype == torch.float32 and query.dtype in (torch.float16, torch.bfloat16)
    ):
        raise _Refused(f"attn_mask has dtype={mask.dtype}, and query {query.dtype}")
    batches = len(full) - 3
    if batches == 1 and mask.dim() <= 4:
        return mask
    if mask.dim() <= 3:
        return mask
    if mask.dim() > len(full):
        raise _Refused(f"attn_mask has {mask.dim()} dimensions, and the scores {len(full)}")
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])  # AlphaFold's pair bias
    shape = (*full[:batches], *mask.shape[-3:])
    try:
        return mask.expand(shape).reshape(math.prod(full[:batches]), *mask.shape[-3:])
    except RuntimeError as error:
        raise _Refused(str(error)) from error


def _refuse_triton_sdpa(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    if query.is_nested:
        return refuse_nested(query, key, value, *others)
    reason = dispatch.refuse_triton(query, query.dtype)
    if reason is not None:
        return reason
    try:
        return refuse_triton_attention(*_canonical(query, key, value, *others))
    except (_Refused, NotSupported) as refusal:
        return str(refusal)


def _run_triton(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    if query.is_nested:
        return nested_attention(query, key, value, *others)
    return _shaped(run_attention("triton", *_canonical(query, key, value, *others)), query, key, value)


def _shaped(out: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The 4-D result with the dimensions that PyTorch's function would return."""
    if query.dim() == key.dim() == value.dim() == 4:
        return out
    if max(query.dim(), key.dim(), value.dim()) == 2:
        return out[0, 0]
    batches = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    return out.reshape(*batches, *out.shape[1:])


def _blockwise_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Any, ...] | None:
    """What blocks of PyTorch operators are given where PyTorch's function would hold all scores; else None."""
    tensors = (query, key, value)
    if min(t.dim() for t in tensors) < 2 or query.is_nested or any(map(_overrides, (*tensors, attn_mask))):
        return None
    if not holds_all_scores(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        return None
    if dispatch.refuse_transforms() is not None:
        return None
    try:
        return _canonical(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    except (_Refused, NotSupported):
        return None


def _run_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if _overrides(attn_mask) and not any(map(_overrides, (query, key, value))):
        return _run_subclassed_mask(*arguments)
    blocks = _blockwise_arguments(*arguments)
    if blocks is not None:
        return _shaped(run_attention("blockwise", *blocks), query, key, value)
    return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _run_subclassed_mask(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, *others: Any) -> Tensor:
    """CausalBias asks whether it was called by what F has, which may be ours, and else is taken for an empty mask."""
    try:
        if dispatch.refuse_transforms() is None:
            found = run_torch_attention(*_canonical(query, key, value, attn_mask, *others))
            return _shaped(found, query, key, value)
    except (_Refused, NotSupported):
        pass
    dropout_p, is_causal, scale, enable_gqa = others
    out: Tensor = type(attn_mask).__torch_function__(
        F.scaled_dot_product_attention,
        (type(attn_mask),),
        (query, key, value, attn_mask, dropout_p, is_causal),
        dict(scale=scale, enable_gqa=enable_gqa),
    )
    return out


def _describe_torch(*arguments: Any) -> str:
    if _blockwise_arguments(*arguments) is not None:
        return (
            "blocks of PyTorch operators in linear memory (PyTorch's operator would hold all scores at once)"
        )
    return "torch.nn.functional.scaled_dot_product_attention"


_SDPA = Operation(
    "scaled_dot_product_attention",
    _check_sdpa,
    (
        Implementation(
            "triton",
            run=_run_triton,
            refuse=_refuse_triton_sdpa,
            describe=lambda *arguments: "fused Triton kernels, memory linear in the sequence",
        ),
        Implementation("torch", run=_run_torch, refuse=lambda *arguments: None, describe=_describe_torch),
        Implementation(
            "reference",
            run=reference.scaled_dot_product_attention,
            refuse=lambda *arguments: None,
            describe=lambda *arguments: "the formula in PyTorch operators, holding all scores",
            only_by_name=True,
        ),
    ),
    cast=cast_attention,
)


@_SDPA.public
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with its signature and behaviour.

    Everything that PyTorch's function takes runs in the Triton kernels, in linear memory; what it refuses goes to it,
    so that the error is its own. `fastattn.attention` is the same kernel with more choices.

    Args:
        query: (..., heads, seq_q, head_dim), or jagged nested (batch, heads, seq, head_dim).
        key, value: (..., kv_heads, seq_k, head_dim) and (..., kv_heads, seq_k, v_dim); batches and single heads are
            broadcast; other head counts differ only with `enable_gqa`.
        attn_mask: broadcastable to (..., heads, seq_q, seq_k); bool (True attends), or added to the scores; or one
            of torch.nn.attention.bias's causal masks.
        dropout_p: probability to drop a weight; applied whenever it is not 0.
        is_causal: query i sees keys j <= i (top-left alignment).
        scale: multiplies the scores; 1 / sqrt(head_dim) by default.
        enable_gqa: let query heads share key and value heads.

    Returns:
        (..., heads, seq_q, v_dim), in the query's dtype (autocast's under autocast).

    Raises:
        TypeError: an operand is not a floating-point tensor.
        RuntimeError, ValueError: as PyTorch's function raises.
        NotSupported: within `use_implementation("triton")`, where the kernels cannot take the call.
    """
    return _SDPA(None, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
