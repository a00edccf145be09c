"""One call of a pair of launchers with any options, and the reference's results for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.kernels._options import AttentionOptions
from fastattn.testing import assert_accurate, make_tensor

# The Triton kernels, and blocks of PyTorch operators: the same arguments, the same results.
KINDS = ("triton", "blockwise")
RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call. `bias` and `mask` name the dimensions that do not broadcast, as in "hk"."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    seq_q: int = 45
    seq_k: int = 67
    head_dim: int = 16
    v_dim: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool | str = False
    window: tuple[int, int] | None = None
    scale: float = 0.25
    softcap: float = 0.0
    bias: str | None = None
    mask: str | None = None
    alibi: str | None = None
    sinks: bool = False
    lengths: bool = False
    dropout_p: float = 0.0
    packed: bool = False

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = [f"{n}={x}" for n, x in given.items() if x != getattr(Case(), n) and n != "dtype"]
        return "-".join([str(self.dtype).removeprefix("torch."), *changed])

    def shape(self, dims: str) -> tuple[int, int, int, int]:
        sizes = dict(b=self.batch, h=self.heads, q=self.seq_q, k=self.seq_k)
        return tuple(n if name in dims else 1 for name, n in sizes.items())  # type: ignore[return-value]


def launchers(kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """forward and backward"""
    if kind == "triton":
        from fastattn.kernels.attention_backward import attention_backward
        from fastattn.kernels.attention_forward import attention_forward

        return attention_forward, attention_backward
    from fastattn.ops import attention_blockwise

    return attention_blockwise.attention_blockwise_forward, attention_blockwise.attention_blockwise_backward


def make_inputs(case: Case, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Everything that a call reads. When packed, `batch` sequences of uneven lengths, up to seq_q and seq_k."""
    rows, keys, batch = case.seq_q, case.seq_k, case.batch
    found: dict[str, Tensor] = {}
    if case.packed:
        found["cu_seqlens_q"], rows = _offsets(batch, rows, first=1)
        found["cu_seqlens_k"], keys = _offsets(batch, keys, first=0)
        batch = 1
    sizes = dict(
        q=(case.heads, rows, case.head_dim),
        k=(case.kv_heads, keys, case.head_dim),
        v=(case.kv_heads, keys, case.v_dim),
        dout=(case.heads, rows, case.v_dim),
    )
    for seed, (name, size) in enumerate(sizes.items()):
        found[name] = make_tensor(batch, *size, dtype=case.dtype, seed=seed)
    wide = torch.promote_types(case.dtype, torch.float32)
    found["dlse"] = make_tensor(batch, case.heads, rows, dtype=wide, seed=5)
    if case.bias is not None:
        found["bias"] = make_tensor(*case.shape(case.bias), dtype=case.dtype, seed=6)
        if "q" in case.bias:
            found["bias"][:, :, 1:3] = -math.inf
        if "k" in case.bias:
            found["bias"][..., 4:9] = -math.inf
    if case.mask is not None:
        found["mask"] = make_tensor(*case.shape(case.mask), seed=7) > -0.5
    if case.alibi is not None:
        found["alibi_slopes"] = make_tensor(*case.shape(case.alibi)[:2], seed=8).abs() / 8
    if case.sinks:
        found["sinks"] = make_tensor(case.heads, dtype=case.dtype, seed=9)
    if case.lengths:
        found["key_lengths"] = torch.tensor([(7 * n + 5) % (case.seq_k + 3) for n in range(case.batch)]).int()
        _poison(found)
    if case.dropout_p:
        found["dropout_seed"] = torch.tensor([1 << 40, -3])
    return {name: tensor.to(device) for name, tensor in found.items()}


def _offsets(sequences: int, longest: int, first: int) -> tuple[Tensor, int]:
    """Offsets of sequences, one of them empty and one the longest, and a total with a row before and after them."""
    lengths = [(longest * (n + first) // 2) % (longest + 1) for n in range(sequences)]
    offsets = [1]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return torch.tensor(offsets, dtype=torch.int32), offsets[-1] + 1


def _poison(found: dict[str, Tensor]) -> None:
    """NaN in keys, infinity in values from key_lengths on."""
    for n, length in enumerate(found["key_lengths"].tolist()):
        place: tuple[Any, ...] = (n, slice(None), slice(length, None))
        if "cu_seqlens_k" in found:
            start, end = found["cu_seqlens_k"][n : n + 2].tolist()
            place = (0, slice(None), slice(min(end, start + length), end))
        found["k"][place] = math.nan
        found["v"][place] = math.inf


def make_options(case: Case, inputs: dict[str, Tensor]) -> AttentionOptions:
    left, right = case.window or (-1, -1)
    names = [name for name in AttentionOptions._fields if name in inputs]
    return AttentionOptions(
        scale=case.scale,
        left=left,
        right=0 if case.causal else right,
        bottom_right=case.causal != "top_left",
        softcap=case.softcap,
        dropout_p=case.dropout_p,
        max_seqlen_q=case.seq_q if case.packed else 0,
        max_seqlen_k=case.seq_k if case.packed else 0,
        **{name: inputs[name] for name in names},
    )


def launcher_results(
    case: Case, inputs: dict[str, Tensor], kind: str, needs: tuple[bool, ...] = (True,) * 5
) -> dict[str, Tensor]:
    """out, lse and the five gradients; empty where not needed."""
    options = make_options(case, inputs)
    needs = (*needs[:3], needs[3] and "bias" in inputs, needs[4] and "sinks" in inputs)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    forward, backward = launchers(kind)
    out, lse = forward(q, k, v, *options)
    gradients = backward(inputs["dout"], inputs["dlse"], q, k, v, out, lse, list(needs), *options)
    return dict(zip(RESULTS, (out, lse, *gradients), strict=True))


def kept_weights(case: Case, inputs: dict[str, Tensor], kind: str) -> Tensor:
    """Dropout's keep-mask, which q = 0 and v = 1 let through: only seed and shapes decide on it."""
    plain = replace(case, softcap=0.0, window=None, causal=False)
    seen = {n: t for n, t in inputs.items() if n in ("cu_seqlens_q", "cu_seqlens_k", "dropout_seed")}
    q, k = torch.zeros_like(inputs["q"]), torch.zeros_like(inputs["k"])
    options = make_options(plain, seen)
    forward, _ = launchers(kind)
    if not case.packed:
        v = torch.eye(case.seq_k, dtype=case.dtype, device=q.device).expand(case.batch, case.kv_heads, -1, -1)
        return forward(q, k, v, *options)[0] > 0
    v = q.new_zeros(1, case.kv_heads, k.size(2), case.seq_k)
    kept = torch.zeros(case.shape("bhqk"), dtype=torch.bool, device=q.device)
    spans = [inputs[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
    for start, end in zip(spans[1], spans[1][1:], strict=False):
        v[0, :, start:end] = torch.eye(case.seq_k, dtype=case.dtype, device=q.device)[: end - start]
    found = forward(q, k, v, *options)[0] > 0
    for n, (start, end) in enumerate(zip(spans[0], spans[0][1:], strict=False)):
        kept[n, :, : end - start] = found[0, :, start:end]
    return kept


def naive_results(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype, kind: str) -> dict[str, Tensor]:
    """The same from the reference, with every floating input in this dtype."""
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    wanted = [n for n in ("q", "k", "v", "bias", "sinks") if n in given]
    for name in wanted:
        given[name] = given[name].detach().requires_grad_()
    names = ("bias", "mask", "alibi_slopes", "sinks", "key_lengths")
    keywords: dict[str, Any] = {n: given[n] for n in names if n in given}
    keywords.update(causal=case.causal, window=case.window, scale=case.scale, softcap=case.softcap)
    if case.dropout_p:
        keywords.update(keep=kept_weights(case, inputs, kind), dropout_p=case.dropout_p)
    operands = [given[n] for n in "qkv"]
    if case.packed:
        found = reference.attention_varlen(
            *(t[0].transpose(0, 1) for t in operands),
            inputs["cu_seqlens_q"],
            inputs["cu_seqlens_k"],
            **keywords,
            return_lse=True,
        )
        out, lse = found[0].transpose(0, 1)[None], found[1][None]
    else:
        out, lse = reference.attention(*operands, **keywords, return_lse=True)
    gradients = torch.autograd.grad(
        (out, lse), [given[n] for n in wanted], (given["dout"], given["dlse"].to(lse.dtype))
    )
    results = dict(zip([f"d{n}" for n in wanted], gradients, strict=True))
    return {"out": out, "lse": lse, **results}


def check_options(case: Case, kind: str, device: torch.device | str = "cpu") -> None:
    """Holds out, lse and every gradient against float64; the peer is the naive maths in the same dtype.

    A fully masked row gets a NaN for dlse, which must not reach any gradient.
    """
    inputs = make_inputs(case, device)
    unseen = naive_results(case, inputs, torch.float64, kind)["lse"] == -math.inf
    inputs["dlse"] = inputs["dlse"].masked_fill(unseen, math.nan)
    truth = naive_results(case, inputs, torch.float64, kind)
    peer = naive_results(case, inputs, case.dtype, kind)
    wide = torch.promote_types(case.dtype, torch.float32)
    peer["lse"] = naive_results(case, inputs, wide, kind)["lse"]
    actual = launcher_results(case, inputs, kind)
    assert not unseen.any() or actual["out"][unseen].eq(0).all()
    lse = truth["lse"][truth["lse"].isfinite()]
    # As in tests/attention_checks.py: recomputed weights carry lse's rounding error, and dq, dk, dbias and dsinks are
    # differences of terms as large as dv's.
    recomputed = max(1.0, lse.abs().max().item()) if case.dtype == wide and lse.numel() else 1.0
    scale = truth["dv"].abs().max().item() if truth["dv"].numel() else 0.0
    # In float64 the truth is no better than what it judges: the peer's error is 0, and its own as large as ours.
    own = 4.0 if case.dtype == torch.float64 else 1.0
    terms = max(1.0, case.batch * case.heads * case.seq_q * case.seq_k / 64)
    for name in truth:
        gradient = name not in ("out", "lse")
        assert_accurate(
            actual[name],
            peer[name],
            truth[name],
            name=name,
            growth=own * (recomputed * math.sqrt(terms) if gradient else 1.0),
            scale=scale if gradient and name != "dv" else 0.0,
        )
