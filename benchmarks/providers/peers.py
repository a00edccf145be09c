"""Other packages' kernels as providers: absent where they are not installed.

Written against flash-attn 2.8 and 4.0b36, xFormers 0.0.35 and QuACK 0.6.5 (which has a LayerNorm, but no public
function of it); Liger Kernel's are in liger.py. None has been run here yet: without a GPU each is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import AttentionCase, LossCase
from benchmarks.providers import registry
from benchmarks.providers.attention import refuse_options
from benchmarks.providers.registry import Absent, Function, provider


@provider("attention", "flex-compile")
def flex_attention(case: AttentionCase, device: torch.device) -> Function:
    """PyTorch's FlexAttention, compiled, with its block mask made beforehand."""
    flex = registry.import_peer("torch.nn.attention.flex_attention", device)
    for name in case.asked:
        if name in ("dropout", "sinks"):
            raise Absent(f"FlexAttention has no {name}")
    batch, heads, kv_heads, seq_q, seq_k, _ = case.shape
    keywords = case.keywords(device)
    mask_mod = _flex_mask(case, keywords)
    mask = None
    if mask_mod is not None:
        of_batch = batch if {"mask", "key_lengths"} & keywords.keys() else None
        mask = flex.create_block_mask(mask_mod, of_batch, None, seq_q, seq_k, device=device)
    compiled: Function = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)
    options = {"block_mask": mask, "enable_gqa": heads != kv_heads}
    if keywords.get("return_lse"):
        options["return_lse"] = True
    return lambda q, k, v, *learned: compiled(
        q, k, v, score_mod=_flex_score(case, keywords, learned), **options
    )


def _flex_mask(case: AttentionCase, keywords: dict[str, Any]) -> Callable[..., Any] | None:
    """Which keys a query sees, as a function of batch, head, query and key; None where it sees all."""
    *_, seq_q, seq_k, _ = case.shape
    offset = seq_k - seq_q if case.causal != "top_left" else 0
    left, padding, lengths = keywords.get("window"), keywords.get("mask"), keywords.get("key_lengths")
    if not case.causal and left is None and padding is None and lengths is None:
        return None

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        found = j <= i + offset if case.causal or left is not None else j >= 0
        if left is not None:
            found = found & (j >= i + offset - left[0])
        if padding is not None:
            found = found & padding[b, 0, 0, j]
        return found if lengths is None else found & (j < lengths[b])

    return seen


def _flex_score(
    case: AttentionCase, keywords: dict[str, Any], learned: tuple[Tensor, ...]
) -> Callable[..., Any] | None:
    """What becomes of a score; None where it stays as it is."""
    softcap, slopes, bias = (
        keywords.get("softcap"),
        keywords.get("alibi_slopes"),
        case.learned(learned).get("bias"),
    )
    if softcap is None and slopes is None and bias is None:
        return None
    shift = case.shape[4] - case.shape[3]

    def modified(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[h] * (i + shift - j).abs()
        return score if bias is None else score + bias[0, h, i, j]

    return modified


def _flash(module: str) -> Callable[[AttentionCase, torch.device], Function]:
    """flash-attn's functions: (batch, seq, heads, head_dim), causal at the bottom right."""

    def flash(case: AttentionCase, device: torch.device) -> Function:
        function = registry.import_peer(module, device).flash_attn_func
        if case.causal == "top_left" and case.shape[3] != case.shape[4]:
            raise Absent("flash-attn aligns a causal mask at the bottom right")
        options = _flash_options(case, device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            operands = (t.transpose(1, 2) for t in (q, k, v))
            out = function(*operands, causal=bool(case.causal), **options)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return call

    return flash


def _flash_options(case: AttentionCase, device: torch.device) -> dict[str, Any]:
    """flash-attn 2's words for the options; its successors have most of them under the same names."""
    names = {"window": "window_size", "softcap": "softcap", "alibi": "alibi_slopes", "dropout": "dropout_p"}
    for name in case.asked:
        if name not in names:
            raise Absent(f"flash-attn has no {name} that is measured here")
    keywords = case.keywords(device)
    ours = {"alibi": "alibi_slopes", "dropout": "dropout_p"}
    return {names[name]: keywords[ours.get(name, name)] for name in case.asked}


provider("attention", "flash-attn-2")(_flash("flash_attn"))
provider("attention", "flash-attn-3")(_flash("flash_attn_interface"))
provider("attention", "flash-attn-4")(_flash("flash_attn.cute"))


@provider("attention", "xformers")
def xformers_attention(case: AttentionCase, device: torch.device) -> Function:
    ops = registry.import_peer("xformers.ops", device)
    biases = registry.import_peer("xformers.ops.fmha.attn_bias", device)
    _, heads, kv_heads, *_ = case.shape
    if heads != kv_heads:
        raise Absent("grouped heads take another layout in xFormers")
    refuse_options(case, "measured without options only")
    names = {"top_left": "LowerTriangularMask", "bottom_right": "LowerTriangularFromBottomRightMask"}
    bias = getattr(biases, names[str(case.causal)])() if case.causal else None
    return lambda q, k, v: ops.memory_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=bias
    ).transpose(1, 2)


@provider("loss", "quack")
def quack_cross_entropy(case: LossCase, device: torch.device) -> Function:
    function = registry.import_peer("quack.cross_entropy", device).cross_entropy
    targets = case.targets(device)
    return lambda logits: function(logits, targets)
