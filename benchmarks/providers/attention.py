"""Attention, by PyTorch and by fastattn."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import fastattn
from benchmarks.cases import AttentionCase
from benchmarks.providers.registry import Absent, Function, Provider, compiled, provider, refuse_interpreter
from fastattn import reference

_COMPILED_LENGTH = 1024


@provider("attention", "naive")
def attention_naive(case: AttentionCase, device: torch.device) -> Function:
    keywords = case.keywords(device)
    return lambda q, k, v, *learned: reference.attention(q, k, v, **keywords, **case.learned(learned))


@provider("attention", "torch")
def attention_torch(case: AttentionCase, device: torch.device) -> Function:
    """PyTorch's own choice of back end; bottom-right alignment is its CausalBias, which its GPU back ends know."""
    _, heads, kv_heads, seq_q, seq_k, _ = case.shape
    if case.options:
        return _attention_torch_options(case, device)
    mask: Tensor | None = None
    if case.causal == "bottom_right" and seq_q != seq_k:
        mask = causal_lower_right(seq_q, seq_k)
        if device.type != "cuda":
            mask = reference.causal_mask(seq_q, seq_k, case.causal, device)
    is_causal = bool(case.causal) and mask is None
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, enable_gqa=heads != kv_heads
    )


def _attention_torch_options(case: AttentionCase, device: torch.device) -> Function:
    """What PyTorch's operator has, as its users write it: one mask made beforehand, added to a bias in each call."""
    _, heads, kv_heads, seq_q, seq_k, _ = case.shape
    for name in case.asked:
        if name in ("softcap", "lse", "sinks"):
            raise Absent(f"PyTorch's operator has no {name}")
    keywords = case.keywords(device)
    seen = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device)
    if case.causal:
        seen = reference.causal_mask(seq_q, seq_k, case.causal, device)
    if "window" in keywords:
        seen = seen & reference.window_mask(seq_q, seq_k, keywords["window"], case.causal, device)
    if "mask" in keywords:
        seen = seen & keywords["mask"]
    if "key_lengths" in keywords:
        padding = torch.arange(seq_k, device=device) >= keywords["key_lengths"][:, None]
        seen = seen & ~padding[:, None, None]
    added: Tensor | None = None
    if "alibi_slopes" in keywords:
        place = torch.arange(seq_q, device=device)[:, None] + (seq_k - seq_q)
        distance = (place - torch.arange(seq_k, device=device)).abs()
        added = (-keywords["alibi_slopes"][:, None, None] * distance).to(case.dtype)
        added = added.masked_fill(~seen, -math.inf)
    dropout_p, plain = keywords.get("dropout_p", 0.0), case.asked == ("dropout",)
    is_causal = plain and bool(case.causal)

    def call(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        mask = seen if added is None else added
        for bias in learned:
            mask = bias.masked_fill(~seen, -math.inf) if added is None else added + bias
        return F.scaled_dot_product_attention(
            q, k, v, None if plain else mask, dropout_p, is_causal, enable_gqa=heads != kv_heads
        )

    return call


@provider("attention", "torch-compile")
def attention_compile(case: AttentionCase, device: torch.device) -> Function:
    """torch.compile of the naive formula; on a GPU at a training's usual length alone, as each case compiles anew."""
    refuse_options(case, "compiled without options only: each case takes as long as all others")
    if device.type == "cuda" and case.seq_q > _COMPILED_LENGTH:
        raise Absent(
            f"compiled at up to {_COMPILED_LENGTH:,} tokens only: each case takes as long as all others"
        )
    return compiled(attention_naive(case, device), device)


def refuse_options(case: AttentionCase, reason: str) -> None:
    """Raises `Absent` for a case with options."""
    if case.options:
        raise Absent(reason)


def _forced(backend: SDPBackend) -> Provider:
    def forced(case: AttentionCase, device: torch.device) -> Function:
        if device.type != "cuda":
            raise Absent(f"a GPU's back end; the device is {device.type}")
        function = attention_torch(case, device)

        def call(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                return function(*tensors)

        return call

    return forced


provider("attention", "sdpa-flash")(_forced(SDPBackend.FLASH_ATTENTION))
provider("attention", "sdpa-efficient")(_forced(SDPBackend.EFFICIENT_ATTENTION))
provider("attention", "sdpa-cudnn")(_forced(SDPBackend.CUDNN_ATTENTION))
provider("attention", "sdpa-math")(_forced(SDPBackend.MATH))


def _attention_ours(implementation: str | None) -> Provider:
    def ours(case: AttentionCase, device: torch.device) -> Function:
        if implementation != "torch":
            refuse_interpreter(device)
        keywords = case.keywords(device) | {"implementation": implementation}
        return lambda q, k, v, *learned: fastattn.attention(q, k, v, **keywords, **case.learned(learned))

    return ours


provider("attention", "fastattn")(_attention_ours(None))
provider("attention", "fastattn-triton")(_attention_ours("triton"))
provider("attention", "fastattn-torch")(_attention_ours("torch"))
