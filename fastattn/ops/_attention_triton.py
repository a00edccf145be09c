"""Attention by the Triton kernels: what they refuse, and which of their forms a call takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.kernels._attention_config import score_load
from fastattn.kernels._attention_forms import FORMS, fitting_config, form_reason, layout_reason
from fastattn.kernels._attention_grid import FewQueriesGrid, counted_keys, few_queries_grid, may_fold
from fastattn.kernels._attention_plan import reach_of
from fastattn.kernels._config import ceil_div
from fastattn.kernels._layout import rows_narrow, rows_too_far
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import Target, target_of
from fastattn.ops._attention_call import Features, options_of
from fastattn.ops._attention_quantized import refuse_triton_quantized
from fastattn.ops._autograd import needs_graph

# The widest head whose forward, and whose backward, fits in registers and shared memory.
_MAX_HEAD_DIM = 512
_MAX_HEAD_DIM_BACKWARD = 256

# The oldest NVIDIA architecture whose shared memory holds the kernels' tiles.
_MIN_CAPABILITY = (8, 0)


def refuse_triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str = False,
    scale: float | None = None,
    features: Features | None = None,
    return_lse: bool = False,
) -> str | None:
    reason = dispatch.refuse_triton(q, q.dtype, _MIN_CAPABILITY)
    if reason is not None:
        return reason
    for name, width in (("head_dim", q.shape[-1]), ("v's head_dim", v.shape[-1])):
        if width > _MAX_HEAD_DIM:
            return f"{name}={width} is above {_MAX_HEAD_DIM}"
        if width == 0:
            return f"{name}=0 is below 1"
        if width > _MAX_HEAD_DIM_BACKWARD and _records(q, k, v, features):
            return f"{name}={width} is above {_MAX_HEAD_DIM_BACKWARD}, the most with gradients"
    if dispatch.INTERPRETING and q.dtype == torch.bfloat16 and not dispatch.interpreter_multiplies_bfloat16:
        return "Triton's interpreter multiplies bfloat16 as integers"
    if features is not None:
        if features.quantize is not None:
            reason = refuse_triton_quantized(q, v)
            if reason is not None:
                return reason
        for name, plane in (("bias", features.bias), ("mask", features.mask)):
            if plane is not None and rows_too_far(plane):
                return f"{name}'s strides {tuple(plane.stride())} are 2^22 or more"
    return None


def _records(q: Tensor, k: Tensor, v: Tensor, features: Features | None) -> bool:
    """Whether the call will have a backward."""
    if features is None:
        return needs_graph(q, k, v)
    return needs_graph(q, k, v, features.bias, features.sinks)


class _Launches(NamedTuple):
    """What decides how a call is launched, found as the launchers find it, but without the seed of dropout.

    `dtype` is that of the products.
    """

    asked: AttentionOptions
    load: str
    target: Target
    dtype: torch.dtype
    few: FewQueriesGrid | None


def _launches_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> _Launches:
    drawn = 0.0 if features is None else features.dropout_p
    if features is not None and drawn:
        features = features._replace(dropout_p=0.0)
    asked = options_of(q, k, causal, scale, features)._replace(dropout_p=drawn)
    target, few = target_of(q.device), None
    quantized = features is not None and features.quantize is not None
    dtype = torch.float8_e4m3fn if quantized else q.dtype
    if q.numel() and v.numel():
        width, reach = max(q.size(3), v.size(3)), reach_of(asked, q, k)
        few = few_queries_grid(q.size(1), k.size(1), reach, width, dtype, target, may_fold(asked))
    return _Launches(asked, score_load(asked), target, dtype, few)


def _forms_of(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[list[str], dict[str, str]]:
    """The forms of the kernels that a call launches, and why not the others."""
    asked, load, target, dtype, few = _launches_of(q, k, v, *others)
    head_dim = max(q.size(-1), v.size(-1))
    unread = layout_reason((q, k, v), asked)
    strides = tuple(tensor.stride() for tensor in (q, k, v))
    narrow = rows_narrow((q.size(-1), v.size(-1)), strides)
    config = fitting_config(None, unread is None, head_dim, dtype, target, load, v.size(-1), narrow)
    forward = config.forward if few is None else few.tiles
    taken = {"reduction" if config.reduce_dq else config.dk_dv.form, forward.form, config.dq.form}
    refused = {}
    for form in FORMS:
        if form not in taken:
            reason = form_reason(head_dim, dtype, target, load, form) or unread
            refused[form] = reason or "no measurement on this architecture says that it is the faster"
    return [form for form in FORMS if form in taken], refused


def describe_triton(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> str:
    features = others[2]
    quantized = "" if features is None or features.quantize is None else f", {features.quantize} products"
    rows = " and ".join(_forms_of(q, k, v, *others)[0])
    said = [f"fused Triton kernels, memory linear in the sequence{quantized}", f"rows by {rows}"]
    forward = _few_queries(q, k, v, *others)
    if forward:
        said.append(f"the forward with {' and '.join(forward)}")
    return "; ".join(said)


def _few_queries(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> list[str]:
    """What the forward does with the heads and keys of few queries."""
    asked, *_, few = _launches_of(q, k, v, *others)
    found = []
    if few is not None and few.folded:
        found.append(f"{q.size(1) // k.size(1)} query heads in a tile")
    if few is not None and few.splits > 1:
        keys = counted_keys(reach_of(asked, q, k), exact=True)
        found.append(f"keys in {few.splits} splits of about {ceil_div(keys, few.splits)}")
    return found


def other_forms(*arguments: Any) -> dict[str, str]:
    return _forms_of(*arguments)[1]
