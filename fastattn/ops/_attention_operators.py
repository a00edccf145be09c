"""The registered attention operators and their autograd Function; everything public is built on `apply_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels._layout import empty_gradient, empty_out
from fastattn.kernels._options import AttentionOptions
from fastattn.ops._attention_call import Features, options_of
from fastattn.ops._autograd import needs_graph, refuse_second_derivative
from fastattn.ops._register import register

Result = Tensor | tuple[Tensor, Tensor]

_OPTIONS = (
    "float scale, int left=-1, int right=-1, bool bottom_right=False, float softcap=0.0, float dropout_p=0.0,"
    " Tensor? bias=None, Tensor? mask=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? key_lengths=None,"
    " Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? dropout_seed=None,"
    " SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, bool deterministic=False"
)
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)"
_BACKWARD = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool[] needs,"
    f" {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)
_BIAS, _SINKS = (AttentionOptions._fields.index(name) for name in ("bias", "sinks"))


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return empty_out(q, v), q.new_empty(q.shape[:3], dtype=wide)


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    asked = AttentionOptions(*options)  # PyTorch leaves out trailing defaults
    return tuple(
        empty_gradient(tensor) if needed and tensor is not None else q.new_empty(0)
        for tensor, needed in zip((q, k, v, asked.bias, asked.sinks), needs, strict=True)
    )


# One pair of operators for each way to compute: the Triton kernels, and blocks of PyTorch operators; of e4m3 operands
# a forward alone.
_forward = {
    "triton": register("attention_forward" + _FORWARD, "kernels.attention_forward", _fake_forward),
    "e4m3": register("attention_e4m3_forward" + _FORWARD, "kernels.attention_quantized", _fake_forward),
    "blockwise": register("attention_blockwise_forward" + _FORWARD, "ops.attention_blockwise", _fake_forward),
}
_backward = {
    "triton": register("attention_backward" + _BACKWARD, "kernels.attention_backward", _fake_backward),
    "blockwise": register(
        "attention_blockwise_backward" + _BACKWARD, "ops.attention_blockwise", _fake_backward
    ),
}


class AttentionFunction(torch.autograd.Function):
    """(out, lse) with gradients of q, k, v, bias and sinks through both.

    Saves the inputs, out and lse; nothing of size seq_q x seq_k but a bias or mask that is one.
    """

    @staticmethod
    def forward(ctx: Any, kind: str, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse = _forward[kind](q, k, v, *options)
        tensors = [o for o in options if isinstance(o, Tensor)]
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.kind, ctx.options = kind, [_SAVED if isinstance(o, Tensor) else o for o in options]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        saved = iter(tensors)
        options = [next(saved) if o is _SAVED else o for o in ctx.options]
        wanted = ctx.needs_input_grad
        places = (1, 2, 3, 4 + _BIAS, 4 + _SINKS)
        needs = [wanted[place] for place in places]
        if dout is None:
            dout = torch.zeros_like(out)
        gradients = _backward[ctx.kind](dout, dlse, q, k, v, out, lse, needs, *options)
        if torch.is_grad_enabled():
            sources = (q, k, v, options[_BIAS], options[_SINKS], dout, dlse)
            gradients = refuse_second_derivative("fastattn.attention", gradients, sources)
        results: list[Tensor | None] = [None] * len(wanted)
        for place, gradient, needed in zip(places, gradients, needs, strict=True):
            results[place] = gradient if needed else None
        return tuple(results)


# Stands in a list of options for a tensor that autograd has saved.
_SAVED = "a saved tensor"


def _own_view(option: Any) -> Any:
    return option.view_as(option) if isinstance(option, Tensor) else option


def apply_attention(
    kind: str, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """out and lse by "triton" or "blockwise", recorded for autograd where anything needs a gradient."""
    if not needs_graph(q, k, v, options.bias, options.sinks):
        out, lse = _forward[kind](q, k, v, *options)
        return out, lse
    if torch.compiler.is_compiling():
        # The compiler refuses a Function that is given one tensor twice: q for k, or offsets for queries and keys.
        k, v = k.view_as(k), v.view_as(v)
        options = AttentionOptions(*map(_own_view, options))
    return AttentionFunction.apply(kind, q, k, v, *options)


def run_attention(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> Result:
    """A checked call by "triton" or "blockwise"."""
    if features is not None and features.quantize is not None:
        kind = features.quantize
    out, lse = apply_attention(kind, q, k, v, options_of(q, k, causal, scale, features))
    return (out, lse) if return_lse else out
