"""Softmax attention: the public function and its implementations.

The kernels' part is in `_attention_triton`, that of PyTorch's operators in `_attention_torch`, the operators of both in
`_attention_operators`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.dispatch import Implementation, Operation
from fastattn.ops._again import Again
from fastattn.ops._attention_call import Features, check_attention, four_dimensions, options_of
from fastattn.ops._attention_operators import Result, run_attention
from fastattn.ops._attention_quantized import run_rounded
from fastattn.ops._attention_torch import describe_torch, refuse_torch_attention, run_torch_attention
from fastattn.ops._attention_triton import describe_triton, other_forms, refuse_triton_attention


def cast_attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Any, ...]:
    """Autocast as for PyTorch's operator: q, k and v but float64 take the autocast dtype."""
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (t if t.dtype in (dtype, torch.float64) else t.to(dtype) for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must have one dtype after autocast, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    return (q, k, v, *others)


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


ATTENTION_IMPLEMENTATIONS = (
    Implementation(
        "triton",
        run=partial(run_attention, "triton"),
        refuse=refuse_triton_attention,
        describe=describe_triton,
        forms=other_forms,
    ),
    Implementation("torch", run=run_torch_attention, refuse=refuse_torch_attention, describe=describe_torch),
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


# With fewer queries, as in steps of decoding, keys are split, and their number is another each time.
_FEWEST_QUERIES_AGAIN = 16


def _learn(q: Tensor, k: Tensor, v: Tensor, causal: bool | str, scale: float | None) -> Any:
    check_attention(q, k, v, causal, scale, None, False)
    if refuse_triton_attention(q, k, v, causal, scale) is not None:
        return None
    from fastattn.kernels.attention_again import plain_forward

    return plain_forward(q, k, v, *options_of(q, k, causal, scale, None))


_again = Again(_learn)


def _at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    return_lse: bool,
) -> Any:
    """What a call without options launches whose like was made before; None elsewhere."""
    if features is not None or torch.compiler.is_compiling():
        return None
    try:
        if q.shape[2] < _FEWEST_QUERIES_AGAIN:
            return None
    except (AttributeError, IndexError, RuntimeError):
        return None  # for the check's error
    run = _again((q, k, v), (causal, type(causal), scale, type(scale)), q, k, v, causal, scale)
    if run is None:
        return None
    found = run(q, k, v)
    return found if return_lse else found[0]


_ATTENTION = Operation(
    "attention",
    check_attention,
    ATTENTION_IMPLEMENTATIONS,
    cast=cast_attention,
    pack=_pack,
    at_once=_at_once,
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
        channel of v or 128 keys less their mean that lie below 2^-110 whole count as 0.
        Keys and values in 8 bits that are kept from call to call are not taken, and raise NotSupported: a step of
        decoding gains nothing by quantize="e4m3". Of each key of head_dim 128 the call without it reads 512 bytes of k
        and v; with it 512 twice, to make 256, which it writes and reads: three times as many. Kept, 256 would be read.

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
