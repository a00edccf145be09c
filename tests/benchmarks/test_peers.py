"""The adapters of other packages, against stand-ins that keep each package's own conventions."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

from benchmarks.cases import AttentionCase, LossCase
from benchmarks.measure import Inputs, prepare
from benchmarks.providers import Absent
from fastattn import reference
from tests.benchmarks.conftest import agrees

CPU = torch.device("cpu")
SQUARE = AttentionCase(1, 2, 17, 16, causal="top_left")
LONG_KEYS = AttentionCase(2, 4, 9, 16, kv_heads=2, seq_k=13, causal="bottom_right")
WITH_OPTIONS = [
    replace(LONG_KEYS, options=options)
    for options in ("window", "softcap", "alibi", "lse", "bias", "mask", "lengths", "window+alibi+lengths")
]


def flash_attention(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    """flash-attn's convention: (batch, seq, heads, head_dim), causal aligned at the bottom right."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    options = dict(window=window_size, softcap=softcap or None, alibi_slopes=alibi_slopes)
    return reference.attention(q, k, v, causal="bottom_right" if causal else False, **options).transpose(1, 2)


@pytest.mark.parametrize("case", (SQUARE, LONG_KEYS), ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("name", "module", "with_lse"),
    (
        ("flash-attn-2", "flash_attn", False),
        ("flash-attn-3", "flash_attn_interface", False),
        ("flash-attn-4", "flash_attn.cute", True),
    ),
)
def test_flash_attn(case, name, module, with_lse, install):
    function = (lambda *t, **o: (flash_attention(*t, **o), None)) if with_lse else flash_attention
    install(module, flash_attn_func=function)
    agrees(case, name)


@pytest.mark.parametrize("options", ("window", "softcap", "alibi", "window+softcap"))
def test_flash_attn_with_options(options, install):
    install("flash_attn", flash_attn_func=flash_attention)
    agrees(replace(LONG_KEYS, options=options), "flash-attn-2")


def test_flash_attn_names_the_options_that_it_does_not_have(install):
    install("flash_attn", flash_attn_func=flash_attention)
    with pytest.raises(Absent, match="flash-attn has no bias"):
        prepare(Inputs(replace(LONG_KEYS, options="window+bias"), CPU), "flash-attn-2", "forward")


def test_flash_attn_refuses_an_alignment_that_it_does_not_have(install):
    install("flash_attn", flash_attn_func=flash_attention)
    with pytest.raises(Absent, match="aligns a causal mask at the bottom right"):
        prepare(
            Inputs(AttentionCase(1, 2, 9, 16, seq_k=13, causal="top_left"), CPU), "flash-attn-2", "forward"
        )


def test_xformers(install):
    class LowerTriangularMask:
        causal = "top_left"

    class LowerTriangularFromBottomRightMask:
        causal = "bottom_right"

    def memory_efficient_attention(q, k, v, attn_bias=None):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return reference.attention(q, k, v, causal=attn_bias.causal if attn_bias else False).transpose(1, 2)

    install(
        "xformers.ops.fmha.attn_bias",
        LowerTriangularMask=LowerTriangularMask,
        LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
    )
    sys.modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    agrees(SQUARE, "xformers")
    agrees(AttentionCase(1, 2, 9, 16, seq_k=13), "xformers")
    agrees(AttentionCase(1, 2, 9, 16, seq_k=13, causal="bottom_right"), "xformers")
    with pytest.raises(Absent, match="grouped heads"):
        prepare(Inputs(LONG_KEYS, CPU), "xformers", "forward")


@pytest.mark.parametrize("case", (SQUARE, LONG_KEYS, *WITH_OPTIONS), ids=lambda case: case.name)
def test_flex_attention_is_pytorchs_own(case, install, monkeypatch):
    """The real function, not compiled; on a CPU it has no backward."""
    compiled = torch.compile  # FlexAttention itself asks for it too

    def eagerly(function, **options):
        if function is not flex_attention.flex_attention:
            return compiled(function, **options)
        return lambda *tensors, **others: function(*(t.detach() for t in tensors), **others)

    monkeypatch.setattr(torch, "compile", eagerly)
    prepare(Inputs(case, CPU), "flex-compile", "forward")


def test_quack(install):
    install("quack.cross_entropy", cross_entropy=F.cross_entropy)
    agrees(LossCase(21, 13), "quack")
