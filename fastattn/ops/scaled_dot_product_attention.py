"""`torch.nn.functional.scaled_dot_product_attention` to the letter: fused where the kernels take the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import (
    scaled_dot_product_attention as torch_sdpa,  # bound here: F's may be replaced by ours
)

from fastattn import reference
from fastattn.dispatch import Implementation, Operation
from fastattn.ops._check import check_attention_shapes, check_floating, check_same_device
from fastattn.ops.attention import apply_attention, cast_attention, holds_all_scores, refuse_triton_attention


def _describe_sdpa(query: Tensor, *others: Any) -> str:
    all_scores = query.dim() == 4 and holds_all_scores(query, *others)
    return "torch.nn.functional.scaled_dot_product_attention" + (", holding all scores at once" * all_scores)


def _check_sdpa(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> None:
    check_floating(query=query, key=key, value=value)


def _refuse_triton_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    reason = refuse_triton_attention(query)
    if reason is not None:
        return reason
    if attn_mask is not None:
        return "attn_mask is not fused yet"
    if not (isinstance(dropout_p, (float, int)) and dropout_p == 0.0):
        return f"dropout_p={dropout_p!r} is not fused yet"
    if type(is_causal) is not bool:
        return f"is_causal={is_causal!r} is not a bool"
    if not query.dim() == key.dim() == value.dim() == 4:
        return "only 4-D (batch, heads, seq, head_dim) tensors are fused yet"
    if not query.dtype == key.dtype == value.dtype:
        return "the dtypes differ"
    if query.size(1) != key.size(1) and not enable_gqa:
        return "head counts differ without enable_gqa"
    try:
        check_attention_shapes(query, key, value)
        check_same_device("query", query, key=key, value=value)
    except ValueError as error:
        return str(error)
    return None


_SDPA = Operation(
    "scaled_dot_product_attention",
    _check_sdpa,
    (
        Implementation(
            "triton",
            run=lambda q, k, v, mask, dropout_p, is_causal, scale, enable_gqa: apply_attention(
                "triton", q, k, v, is_causal, scale, False
            ),
            refuse=_refuse_triton_sdpa,
            describe=lambda *arguments: "fused Triton kernels, memory linear in the sequence",
        ),
        Implementation(
            "torch",
            run=lambda q, k, v, mask, dropout_p, is_causal, scale, enable_gqa: torch_sdpa(
                q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            ),
            refuse=lambda *arguments: None,
            describe=_describe_sdpa,
        ),
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

    Calls that the Triton kernels take (4-D, no mask, no dropout) run there; every other call goes to PyTorch's
    own function, and `fastattn.explain` says so. `fastattn.attention` is the same kernel with more choices.

    Args:
        query: (..., heads, seq_q, head_dim).
        key, value: (..., kv_heads, seq_k, head_dim); kv_heads differs from heads only with `enable_gqa`.
        attn_mask: broadcastable to (..., heads, seq_q, seq_k); bool (True attends), or added to the scores.
        dropout_p: probability to drop a weight; applied whenever it is not 0.
        is_causal: query i sees keys j <= i (top-left alignment).
        scale: multiplies the scores; 1 / sqrt(head_dim) by default.
        enable_gqa: let query heads share key and value heads.

    Returns:
        (..., heads, seq_q, head_dim), in the query's dtype (autocast's under autocast).

    Raises:
        TypeError: an operand is not a floating-point tensor.
        RuntimeError, ValueError: as PyTorch's function raises.
        NotSupported: within `use_implementation("triton")`, where the kernels cannot take the call.
    """
    return _SDPA(None, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
