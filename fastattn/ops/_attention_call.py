"""The arguments of the public attention functions: checked, and turned into the operators' options."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.dispatch import NotSupported, autocasts, checking
from fastattn.kernels._options import AttentionOptions
from fastattn.ops._attention_quantized import check_given_dtypes, check_quantized
from fastattn.ops._check import check_attention_shapes, check_floating, check_same_device
from fastattn.ops._dropout import check_dropout, draw_seed

# No window of so many keys ends within a sequence; beyond it 32-bit arithmetic on positions would wrap.
_UNBOUNDED = 1 << 30


class Features(NamedTuple):
    """What a call asks for beyond a plain or causal softmax, as the public functions take it."""

    window: tuple[int | None, int | None] | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    key_lengths: Tensor | None = None
    deterministic: bool = False
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    quantize: str | None = None


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | str,
    scale: float | None,
    features: Features | None,
    lse: bool,
) -> None:
    """Raises TypeError, ValueError or NotSupported for arguments that no implementation takes."""
    # Asked in one expression first, because a call by keyword for each check costs a microsecond of host time.
    usual = (
        isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
        and q.is_floating_point() and q.dtype == k.dtype == v.dtype
    )  # fmt: skip
    if not usual:
        check_floating("q", "k", "v", q=q, k=k, v=v)
    check_attention_shapes(q, k, v, packed=features is not None and features.cu_seqlens_q is not None)
    if not q.device == k.device == v.device:
        check_same_device("q", q, k=k, v=v)
    if features is not None and features.quantize is not None:
        check_given_dtypes(q, k, v)
    if not usual and not (q.dtype == k.dtype == v.dtype) and not autocasts(q):
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if scale is not None:
        _check_scale(scale)
    if features is not None:
        _check_features(q, k, features)
        if features.quantize is not None:
            check_quantized(q, k, v, features)
    if causal is False or causal == "top_left" or causal == "bottom_right":
        return
    if causal is not True:
        raise ValueError(f"causal={causal!r} must be False, True, 'top_left' or 'bottom_right'")
    if features is not None and features.cu_seqlens_q is not None:
        if features.cu_seqlens_q is not features.cu_seqlens_k:
            raise ValueError(
                "causal=True is ambiguous where cu_seqlens_q and cu_seqlens_k are two tensors: "
                "say causal='top_left' or causal='bottom_right' (flash-attn's)"
            )
    elif q.size(2) != k.size(2):
        raise ValueError(
            f"causal=True is ambiguous with seq_q={q.size(2)} and seq_k={k.size(2)}: "
            "say causal='top_left' (PyTorch's is_causal) or causal='bottom_right' (flash-attn's)"
        )


def _check_features(q: Tensor, k: Tensor, features: Features) -> None:
    heads, packed = q.size(1), features.cu_seqlens_q is not None
    check_floating(bias=features.bias, alibi_slopes=features.alibi_slopes, sinks=features.sinks)
    tensors = {name: getattr(features, name) for name in _TENSORS}
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    check_same_device("q", q, **tensors)
    _check_window(features.window)
    check_dropout(features.dropout_p)
    if features.softcap is not None and not 0 < features.softcap < math.inf:
        raise ValueError(f"softcap={features.softcap} must be positive and finite, or None")
    batch = features.cu_seqlens_q.numel() - 1 if packed and features.cu_seqlens_q is not None else q.size(0)
    full = (
        batch,
        heads,
        features.max_seqlen_q if packed else q.size(2),
        features.max_seqlen_k if packed else k.size(2),
    )
    _check_plane("bias", features.bias, full)
    _check_plane("mask", features.mask, full)
    if features.bias is not None and features.bias.dtype == torch.float64 and q.dtype != torch.float64:
        raise TypeError(f"bias has dtype=torch.float64, and q {q.dtype}")
    if features.mask is not None and features.mask.dtype != torch.bool:
        raise TypeError(
            f"mask has dtype={features.mask.dtype} and must be bool; what is added to the scores is a bias"
        )
    slopes = features.alibi_slopes
    # One by one: the compiler finds no shape in a tuple of shapes where only one side's sizes are symbols.
    if slopes is not None and not (
        slopes.shape == (heads,) or slopes.shape == (batch, heads) or slopes.shape == (1, heads)
    ):
        raise ValueError(
            f"alibi_slopes has shape {tuple(slopes.shape)}, not ({heads},) or ({batch}, {heads})"
        )
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        raise NotSupported("alibi_slopes has no gradient: detach it, or give slope * distance as a bias")
    if features.sinks is not None and features.sinks.shape != (heads,):
        raise ValueError(f"sinks has shape {tuple(features.sinks.shape)}, not ({heads},)")
    if features.key_lengths is not None:
        _check_lengths("key_lengths", features.key_lengths, (batch,), full[3])


_TENSORS = ("bias", "mask", "alibi_slopes", "sinks", "key_lengths", "cu_seqlens_q", "cu_seqlens_k")


def _check_plane(name: str, tensor: Tensor | None, full: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if not 2 <= tensor.dim() <= 4:
        raise ValueError(f"{name} has {tensor.dim()} dimensions; 2 to 4 are needed")
    for size, whole in zip(reversed(tensor.shape), reversed(full), strict=False):
        if size != 1 and size != whole:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to {full}")


def _check_window(window: Any) -> None:
    if window is None:
        return
    ends = tuple(window) if isinstance(window, (tuple, list)) else ()
    if len(ends) != 2 or not all(end is None or (isinstance(end, int) and end >= -1) for end in ends):
        raise ValueError(
            f"window={window!r} must be (left, right), each None, -1 or the number of keys seen there"
        )


def _check_scale(scale: Any) -> None:
    # The compiler's symbol for a float is neither an instance of float nor known to be finite.
    if torch.compiler.is_compiling():
        return
    if not (isinstance(scale, (int, float, torch.SymFloat)) and -math.inf < scale < math.inf):
        raise ValueError(f"scale={scale!r} must be a finite number, or None")


def _check_lengths(name: str, lengths: Tensor, shape: tuple[int, ...], most: int) -> None:
    """Integers of this shape from 0 to most; the values only where they can be read without waiting for a device."""
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype={lengths.dtype} and must be int32 or int64")
    if lengths.shape != shape:
        raise ValueError(f"{name} has shape {tuple(lengths.shape)}, not {shape}")
    if checking(lengths) and lengths.numel():
        least, largest = int(lengths.min()), int(lengths.max())
        if least < 0 or largest > most:
            raise ValueError(
                f"{name} holds {least if least < 0 else largest}; it must lie within 0 and {most}"
            )


def check_cu_seqlens(name: str, starts: Tensor, total: int, longest: int) -> None:
    """Raises for cumulative lengths that do not rise from 0 to at most `total` in steps of at most `longest`."""
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be a tensor of int32 or int64")
    if starts.dim() != 1 or starts.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(starts.shape)}, not (sequences + 1,)")
    if not checking(starts):
        return
    steps = starts.diff()
    if int(starts[0]) != 0 or (steps.numel() and int(steps.min()) < 0):
        raise ValueError(f"{name} must begin with 0 and never fall")
    if int(starts[-1]) > total:
        raise ValueError(f"{name} ends at {int(starts[-1])}, beyond the {total} rows there are")
    if steps.numel() and int(steps.max()) > longest:
        raise ValueError(f"{name} has a sequence of {int(steps.max())} rows, above max_seqlen={longest}")


def options_of(
    q: Tensor, k: Tensor, causal: bool | str, scale: float | None, features: Features | None
) -> AttentionOptions:
    """The operators' options of a checked call."""
    if scale is None:
        head_dim = q.size(-1)
        scale = 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    bottom_right = causal == "bottom_right"
    if features is None:
        # Every field, because under torch.compile a default that is a float is traced as an input of the graph.
        return AttentionOptions(
            float(scale), -1, 0 if causal else -1, bottom_right, 0.0, 0.0,
            None, None, None, None, None, None, None, None, 0, 0, False,
        )  # fmt: skip
    left, right = features.window or (None, None)
    if causal:
        right = 0
    elif features.window is not None:
        bottom_right = True  # as flash-attn's windows lie
    wide = torch.promote_types(q.dtype, torch.float32)
    slopes = features.alibi_slopes
    return AttentionOptions(
        scale=float(scale),
        left=_end(left),
        right=_end(right),
        bottom_right=bottom_right,
        softcap=float(features.softcap or 0.0),
        dropout_p=float(features.dropout_p),
        bias=four_dimensions(features.bias),
        mask=four_dimensions(features.mask),
        alibi_slopes=None if slopes is None else slopes.detach().to(wide).reshape(-1, q.size(1)),
        sinks=features.sinks,
        key_lengths=_int32(features.key_lengths),
        cu_seqlens_q=_int32(features.cu_seqlens_q),
        cu_seqlens_k=_int32(features.cu_seqlens_k),
        dropout_seed=draw_seed(q) if features.dropout_p else None,
        max_seqlen_q=features.max_seqlen_q,
        max_seqlen_k=features.max_seqlen_k,
        deterministic=bool(features.deterministic),
    )


def _end(keys: int | None) -> int:
    return -1 if keys is None or keys < 0 or keys >= _UNBOUNDED else keys


def four_dimensions(tensor: Tensor | None) -> Tensor | None:
    """A bias or mask with sizes of 1 in front."""
    return None if tensor is None else tensor[(None,) * (4 - tensor.dim())]


def _int32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.int32).contiguous()
