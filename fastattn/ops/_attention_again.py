"""Attention whose like was called before: past checks, refusals and plans, at half of the host's time.

That is for calls without options and without gradients, and not for few queries, whose keys grow by one a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import dispatch
from fastattn.kernels._plan import planned
from fastattn.ops._attention_call import Features, check_attention, options_of
from fastattn.ops._attention_triton import refuse_triton_attention
from fastattn.ops._register import is_direct

# With fewer, as in steps of decoding, keys are split, and their number is another each time.
_FEWEST_QUERIES = 16
# For how many layouts it is known how they are launched.
_MOST_KNOWN = 4096

_UNKNOWN: Any = object()


@planned
def _known() -> dict[tuple[Any, ...], Any]:
    """How calls are launched, or None where not so, by all that decides; forgotten where plans are."""
    return {}


def attend_again(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> Any:
    """What the Triton kernels return, or None where the call has to go another way."""
    if features is not None or torch.compiler.is_compiling():
        return None
    try:
        shape = q.shape
        if not (q.is_cuda or dispatch.INTERPRETING) or shape[2] < _FEWEST_QUERIES or not is_direct(q, k, v):
            return None
        if forward_ad._current_level >= 0 or dispatch.autocasts(q):
            return None
        key = (
            shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, causal, scale, type(causal),
        )  # fmt: skip
        run = _known().get(key, _UNKNOWN)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return None  # for the check's error, or of a layout without strides
    if run is _UNKNOWN:
        run = _learn(q, k, v, causal, scale)
        known = _known()
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[key] = run
    if run is None:
        return None
    out, lse = run(q, k, v)
    return (out, lse) if return_lse else out


def _learn(q: Tensor, k: Tensor, v: Tensor, causal: bool | str, scale: float | None) -> Any:
    check_attention(q, k, v, causal, scale, None, False)
    if refuse_triton_attention(q, k, v, causal, scale) is not None:
        return None
    from fastattn.kernels.attention_again import plain_forward

    return plain_forward(q, k, v, *options_of(q, k, causal, scale, None))
