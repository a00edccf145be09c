"""Softmax attention: its implementations and the public function; the operators are in `_attention_operators`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    scaled_dot_product_attention as torch_sdpa,  # bound here: F's may be replaced by ours
)

from fastattn import dispatch, reference
from fastattn.dispatch import Implementation, Operation
from fastattn.kernels._attention_config import score_load
from fastattn.kernels._attention_forms import FORMS, fitting_config, form_reason, layout_reason
from fastattn.kernels._layout import rows_too_far
from fastattn.kernels._target import target_of
from fastattn.ops._attention_call import Features, check_attention, four_dimensions, options_of
from fastattn.ops._attention_operators import apply_attention
from fastattn.ops._attention_quantized import refuse_triton_quantized, run_rounded
from fastattn.ops._autograd import needs_graph

# The widest head whose forward, and whose backward, fits in registers and shared memory.
_MAX_HEAD_DIM = 512
_MAX_HEAD_DIM_BACKWARD = 256

# Below this many scores nobody needs to ask whether PyTorch's operator would hold them all, or to fear for a mask.
_FEW_SCORES = 1 << 16
_SDPA_MATH = 0  # torch.nn.attention.SDPBackend.MATH, as torch._fused_sdp_choice returns it
_SDPA_CHOOSES = ("cpu", "cuda", "xpu")  # where PyTorch has that function

# The oldest NVIDIA architecture whose shared memory holds the kernels' tiles.
_MIN_CAPABILITY = (8, 0)

Result = Tensor | tuple[Tensor, Tensor]


def cast_attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Any, ...]:
    """Autocast as for PyTorch's operator: q, k and v but float64 take the autocast dtype."""
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (t if t.dtype in (dtype, torch.float64) else t.to(dtype) for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must have one dtype after autocast, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    return (q, k, v, *others)


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
    for name, width in (("head_dim", q.size(-1)), ("v's head_dim", v.size(-1))):
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


def _blockwise_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> str | None:
    """Why PyTorch's own operator does not serve this call in linear memory, or None."""
    if return_lse:
        return "PyTorch's operator does not return the log-sum-exp"
    if features is not None:
        asked = [name for name in _NEEDS_BLOCKS if getattr(features, name) is not None]
        asked += ["dropout_p"] * bool(
            features.dropout_p
        )  # always, so that a seed drops the same whatever else is asked
        if asked:
            return f"PyTorch's operator does not take {asked[0]}"
        if features.bias is not None and needs_graph(features.bias):
            return "PyTorch's operator holds all scores for the gradient of a bias"
        if features.bias is not None and features.bias.dtype not in (q.dtype, torch.float32):
            return f"PyTorch's operator takes no bias of {features.bias.dtype} with {q.dtype}"
        if features.bias is not None and (causal is not False or features.mask is not None):
            return "PyTorch's operator does not take a bias with another mask"
        if features.deterministic and q.device.type != "cpu":
            return "PyTorch's operator is not deterministic on every device"
    if causal is not False and scale is not None and scale <= 0:
        return f"PyTorch's operator masks before it scales, which gives NaN with scale={scale}"
    few = not torch.compiler.is_compiling() and q.size(2) * k.size(2) <= _FEW_SCORES
    if _needs_mask(q, k, causal, features):
        return None if few else "PyTorch's operator would need a mask of all scores"
    if few:
        return None
    mask = None if features is None else features.bias if features.mask is None else features.mask
    if holds_all_scores(q, k, v, mask, 0.0, causal is not False, None, q.size(1) != k.size(1)):
        return "PyTorch's operator would hold all scores at once"
    return None


_NEEDS_BLOCKS = ("softcap", "alibi_slopes", "sinks", "key_lengths", "cu_seqlens_q")


def _needs_mask(q: Tensor, k: Tensor, causal: bool | str, features: Features | None) -> bool:
    """Whether PyTorch's operator knows what a query sees only from a mask of all scores."""
    if features is not None and (features.window is not None or (causal and features.mask is not None)):
        return True
    return causal == "bottom_right" and q.size(2) != k.size(2) and q.size(2) != 1


def holds_all_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    grouped: bool,
) -> bool:
    """Whether PyTorch's operator is known to take its path of quadratic memory, with more than a few scores."""
    if torch.compiler.is_compiling():
        # The compiler cannot ask; no fused path takes these on every device.
        if dropout_p or q.size(-1) != v.size(-1) or needs_graph(mask):
            return True
        return not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if q.size(-2) * k.size(-2) <= _FEW_SCORES or q.device.type not in _SDPA_CHOOSES:
        return False
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped)
    return choice == _SDPA_MATH


def _refuse_torch(q: Tensor, *others: Any) -> str | None:
    """Blocks of PyTorch operators are no PyTorch operator: transforms cannot look into them."""
    reason = dispatch.refuse_transforms()
    if reason is None or _blockwise_reason(q, *others) is None:
        return None
    return reason


def run_torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> Result:
    """A checked call by PyTorch's operator, or by blocks of operators where that does not serve it."""
    if features is not None and features.quantize is not None:
        return run_rounded(run_torch_attention, q, k, v, causal, scale, features, return_lse)
    if _blockwise_reason(q, k, v, causal, scale, features, return_lse) is not None:
        return run_attention("blockwise", q, k, v, causal, scale, features, return_lse)
    # A single query at the bottom right sees every key.
    is_causal = causal is not False and not (causal == "bottom_right" and q.size(2) == 1)
    mask: Tensor | None = None
    if features is not None:
        mask = features.mask if features.bias is None else features.bias
    if _needs_mask(q, k, causal, features):
        seen = _visible_keys(q, k, causal, features)
        mask, is_causal = seen if mask is None else mask & seen, False
    grouped = False
    if q.size(1) != k.size(1):  # a branch: with dynamic shapes the comparison itself is not a plain bool
        grouped = True
    return torch_sdpa(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)


def _visible_keys(q: Tensor, k: Tensor, causal: bool | str, features: Features | None) -> Tensor:
    """(seq_q, seq_k), bool: what causal and window let each query see."""
    sizes = q.size(2), k.size(2)
    seen = reference.causal_mask(*sizes, causal, q.device) if causal else None
    if features is not None and features.window is not None:
        window = reference.window_mask(*sizes, features.window, causal, q.device)
        seen = window if seen is None else seen & window
    assert seen is not None  # asked for where one of the two is there
    return seen


def _describe_torch(*arguments: Any) -> str:
    features = arguments[5]
    if features is not None and features.quantize is not None:
        described = _describe_torch(*arguments[:5], features._replace(quantize=None), *arguments[6:])
        return f"{described}, of values rounded to e4m3 and back in float32: the kernels' numbers without their speed"
    reason = _blockwise_reason(*arguments)
    if reason is None:
        return "torch.nn.functional.scaled_dot_product_attention"
    return f"blocks of PyTorch operators in linear memory ({reason})"


def _run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> Result:
    if features is None:
        return reference.attention(q, k, v, causal=causal, scale=scale, return_lse=return_lse)
    if features.quantize is not None:
        return run_rounded(_run_reference, q, k, v, causal, scale, features, return_lse)
    keywords = {name: getattr(features, name) for name in _REFERENCE_FEATURES}
    keywords |= {"bias": four_dimensions(features.bias), "mask": four_dimensions(features.mask)}
    if features.cu_seqlens_q is None or features.cu_seqlens_k is None:
        return reference.attention(q, k, v, causal=causal, scale=scale, return_lse=return_lse, **keywords)
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    operands = (*packed, features.cu_seqlens_q, features.cu_seqlens_k)
    options: dict[str, Any] = {"causal": causal, "scale": scale, "return_lse": True, **keywords}
    out, lse = reference.attention_varlen(*operands, **options)
    out, lse = out.transpose(0, 1)[None], lse[None]
    return (out, lse) if return_lse else out


_REFERENCE_FEATURES = (
    "window", "softcap", "alibi_slopes", "sinks", "dropout_p", "key_lengths"
)  # fmt: skip


def _forms_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> tuple[list[str], dict[str, str]]:
    """The forms of the kernels that a call launches, and why not the others."""
    # Without dropout, which would draw a seed.
    drawn = features is not None and features.dropout_p
    asked = options_of(
        q, k, causal, scale, features._replace(dropout_p=0.0) if drawn and features else features
    )
    load = score_load(asked._replace(dropout_p=features.dropout_p) if drawn and features else asked)
    target, head_dim = target_of(q.device), max(q.size(-1), v.size(-1))
    unread = layout_reason((q, k, v), asked)
    config = fitting_config(None, unread is None, head_dim, q.dtype, target, load)
    taken = {"reduction" if config.reduce_dq else config.dk_dv.form, config.forward.form, config.dq.form}
    refused = {}
    for form in FORMS:
        if form not in taken:
            reason = form_reason(head_dim, q.dtype, target, load, form) or unread
            refused[form] = reason or "no measurement on this architecture says that it is the faster"
    return [form for form in FORMS if form in taken], refused


def _describe_triton(*arguments: Any) -> str:
    features = arguments[5]
    quantized = "" if features is None or features.quantize is None else f", {features.quantize} products"
    rows = " and ".join(_forms_of(*arguments)[0])
    return f"fused Triton kernels, memory linear in the sequence{quantized}; rows by {rows}"


def _other_forms(*arguments: Any) -> dict[str, str]:
    return _forms_of(*arguments)[1]


ATTENTION_IMPLEMENTATIONS = (
    Implementation(
        "triton",
        run=lambda *arguments: run_attention("triton", *arguments),
        refuse=refuse_triton_attention,
        describe=_describe_triton,
        forms=_other_forms,
    ),
    Implementation("torch", run=run_torch_attention, refuse=_refuse_torch, describe=_describe_torch),
    Implementation(
        "reference",
        run=_run_reference,
        refuse=lambda *arguments: None,
        describe=lambda *arguments: "the formula in PyTorch operators, holding all scores",
        only_by_name=True,
    ),
)


def _pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    bias: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    key_lengths: Tensor | None,
    deterministic: bool,
    quantize: str | None,
    return_lse: bool,
) -> tuple[Any, ...]:
    features = None
    if (
        window is not None or bias is not None or mask is not None or softcap is not None or sinks is not None
        or alibi_slopes is not None or dropout_p or key_lengths is not None or deterministic or quantize is not None
    ):  # fmt: skip
        features = Features(
            window,
            bias,
            mask,
            softcap,
            alibi_slopes,
            sinks,
            dropout_p,
            key_lengths,
            deterministic,
            quantize=quantize,
        )
    return q, k, v, causal, scale, features, return_lse


_ATTENTION = Operation(
    "attention", check_attention, ATTENTION_IMPLEMENTATIONS, cast=cast_attention, pack=_pack
)


@_ATTENTION.public
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,  # an int, because torch.compile takes a default that is a float for an input
    key_lengths: Tensor | None = None,
    deterministic: bool = False,
    quantize: str | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    r"""Softmax attention in memory linear in the sequence; every option goes with every other.

    .. math::
        O_i = \sum_j P_{ij} V_j, \qquad P_{ij} = \exp(S_{ij} - L_i), \qquad L_i = \log \sum_j \exp S_{ij}, \qquad
        S_{ij} = c \tanh(s\, Q_i \cdot K_j / c) - a\, |i + n_k - n_q - j| + B_{ij}

    with j over the keys that query i may see, and without c the plain product.

    Args:
        q: (batch, heads, seq_q, head_dim), floating.
        k, v: (batch, kv_heads, seq_k, head_dim) and (batch, kv_heads, seq_k, v_dim) in q's dtype; kv_heads divides
            heads, and query head h reads key head h // (heads // kv_heads) (grouped-query attention), without a
            repeated copy.
        causal: False; "top_left": query i sees keys j <= i, PyTorch's `is_causal`; "bottom_right": keys
            j <= i + seq_k - seq_q, flash-attn's `causal`; True where seq_q == seq_k, so that both agree.
        window: (left, right): query i sees the keys from i - left to i + right, both included; None or -1 for no
            end. It lies as `causal` says, and like flash-attn's at the bottom right without.
        scale: s, 1 / sqrt(head_dim) by default; any finite number.
        bias: B, broadcastable to (batch, heads, seq_q, seq_k), floating; -inf hides a key. Its gradient has its own
            shape, and is summed where it is made.
        mask: broadcastable to (batch, heads, seq_q, seq_k), bool: whether a query sees a key.
        softcap: c, a bound of the scores.
        alibi_slopes: a, (heads,) or (batch, heads); without a gradient.
        sinks: (heads,), floating: the score of one more key whose value is 0, so that the weights of the others add
            up to less than 1.
        dropout_p: probability to drop a weight, whenever it is not 0; the others are divided by 1 - dropout_p.
        key_lengths: (batch,), int32 or int64: keys from there on are hidden, and not read. Causal masks and windows
            lie as if they were there.
        deterministic: gradients equal bit for bit from run to run. With the launch configs that ship they always are;
            this, as `torch.use_deterministic_algorithms(True)`, rules out those that add dq up by atomics.
        quantize: "e4m3" rounds q, k, v and the weights to 8 bits before each product, for inference; see the notes.
        return_lse: also return L.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        O, (batch, heads, seq_q, v_dim) in q's dtype, laid out in memory as q is; with `return_lse` also L,
        (batch, heads, seq_q), natural logarithm, float32 (float64 for float64), sinks counted, differentiable as
        well. A query that sees no key has O = 0, L = -inf (or its sink) and no gradient.

    Raises:
        TypeError: a tensor has a wrong dtype, or the dtypes differ outside autocast.
        ValueError: shapes or devices do not fit, or an argument's value is unknown.
        NotSupported: the implementation asked for cannot take the call, or alibi_slopes wants a gradient, or anything
            does with `quantize`, which also goes with no dropout and with no torch.func transform.

    Notes:
        Triton: products of 16-bit inputs accumulate in float32, and so does the softmax; float32 products are full
        float32, not TF32. head_dim and v_dim go up to 256, without gradients to 512. The backward is deterministic
        and saves q, k, v, O and L. Any strides with a contiguous last dimension are read in place; another layout of
        q, k or v is copied, bias and mask never are. A second derivative raises.
        Few queries, as a step of decoding has: the heads of a group share the rows of a tile, so that its keys are read
        once, and keys are split over as many programs as fill the device, each to its own share of key_lengths. Their
        float32 results, head_dim numbers a query and split, are added up in a fixed order.
        Dropout draws a seed from PyTorch's generator of q's device: `torch.manual_seed` repeats it, and
        `torch.utils.checkpoint` recomputes the same. The kernels and PyTorch's path drop different weights.
        Under autocast q, k and v are cast to its dtype, as PyTorch's operator does. Within torch.func transforms
        and forward-mode AD, calls go to PyTorch's operator, or are refused where it has no path.
        With quantize="e4m3" the relative error of O, in the mean square and against float64, is about 5 % where scores
        have a standard deviation of at most 1, as normal inputs have, whatever the means of k's channels and the sizes
        of v's, and below 6 % in the tests; that of L is below 0.05. Both grow with the scores, whose own error does: at
        deviations of 2, 4 and 8, to 8, 10 and 14 % and to 0.03, 0.11 and 0.3. Where one channel of k is 20 times as
        wide as all others, O's is 7 to 20 %.
        q has a scale a query, k one for 128 keys and a head, behind the mean of each channel, v one a channel and a
        head; the call makes them, in two reads of k and v and one of q. The kernels need compute capability 8.9 and
        head_dim and v_dim up to 256, and add up the products of weights and values in float32, but above v_dim 128 on
        Hopper, where the tensor cores keep some 14 bits. "torch" and "reference" compute in float32 with the same
        rounded q, k and v, but do not round the weights. An infinity counts as NaN; a query, a
        channel of v or 128 keys less their mean that lie below 2^-110 whole count as 0. Few queries gain no time by
        it: making the operands moves more bytes than their call without.

    Source:
        Dao, "FlashAttention-2" (2023), algorithms 1 and 2; Dao et al., "Flash-Decoding" (2023), for split keys;
        Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Press et al., "Train Short, Test
        Long" (2022) for ALiBi; Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011) for dropout; Shah
        et al., "FlashAttention-3" (2024), section 3.3, and Zhang et al., "SageAttention" (2024), for 8 bits and the
        mean of the keys.
    """
    return _ATTENTION(
        implementation,
        *_pack(
            q, k, v, causal, window, scale, bias, mask, softcap, alibi_slopes, sinks, dropout_p, key_lengths,
            deterministic, quantize, return_lse,
        ),
    )  # fmt: skip
