"""The adapters of other packages, against stand-ins that keep each package's own conventions."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

from benchmarks.cases import AttentionCase, LayerNormCase, LinearLossCase, LossCase, RMSNormCase
from benchmarks.measure import DIRECTIONS, Inputs, _empty_row, prepare
from benchmarks.providers import Absent, peers
from fastattn import reference

CPU = torch.device("cpu")
SQUARE = AttentionCase(1, 2, 17, 16, causal="top_left")
LONG_KEYS = AttentionCase(2, 4, 9, 16, kv_heads=2, seq_k=13, causal="bottom_right")
WITH_OPTIONS = [
    replace(LONG_KEYS, options=options)
    for options in ("window", "softcap", "alibi", "lse", "bias", "mask", "lengths", "window+alibi+lengths")
]


@pytest.fixture
def install(monkeypatch):
    """Puts a module with these members where an import finds it, and lets peers run without a GPU."""

    class Gpu:
        type = "cuda"

    real = peers._import
    monkeypatch.setattr(peers, "_import", lambda module, device: real(module, Gpu))

    def put(name, **members):
        module = ModuleType(name)
        vars(module).update(members)
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
        monkeypatch.setitem(sys.modules, name, module)

    return put


def agrees(case, name):
    inputs = Inputs(case, CPU)
    for direction in DIRECTIONS:
        prepare(inputs, name, direction)


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


def test_liger_writes_over_its_logits_and_spoils_nobody_elses(install):
    seen = []

    class CrossEntropy(torch.autograd.Function):
        """Liger's way: the forward puts the gradient where the logits were."""

        @staticmethod
        def forward(ctx, logits, targets):
            with torch.enable_grad():
                leaf = logits.detach().clone().requires_grad_()
                loss = F.cross_entropy(leaf, targets)
                seen.append(logits)
                if logits.requires_grad:
                    logits.copy_(torch.autograd.grad(loss, leaf)[0])
            ctx.save_for_backward(logits)
            return loss.detach()

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0] * grad, None

    install(
        "liger_kernel.transformers.functional",
        liger_cross_entropy=CrossEntropy.apply,
        liger_layer_norm=lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps),
        liger_rms_norm=lambda x, weight, eps, *, in_place: F.rms_norm(x, weight.shape, weight, eps),
    )
    agrees(LossCase(21, 13), "liger")
    inputs = Inputs(LossCase(21, 13), CPU)
    for direction, copies in zip(DIRECTIONS, (False, True), strict=True):
        prepare(inputs, "liger", direction)
        # A copy is timed only where there is something to protect, and its row says so.
        assert (seen[-1].data_ptr() != inputs.tensors[0].data_ptr()) is copies
        note = _empty_row(inputs.case, direction, "liger").get("note", "")
        assert ("copy of the logits" in note) is copies
    agrees(LayerNormCase(5, 33), "liger")
    agrees(RMSNormCase(5, 33), "liger")
    with pytest.raises(Absent, match="has a weight and a bias"):
        prepare(Inputs(LayerNormCase(5, 33, affine=False), CPU), "liger", "forward")


def test_quack(install):
    install("quack.cross_entropy", cross_entropy=F.cross_entropy)
    agrees(LossCase(21, 13), "quack")


def test_ligers_linear_loss_is_called_by_name(install):
    """Its functional form, (input, weight, target, bias, ...), with weight (classes, width)."""

    def linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
        return F.cross_entropy(F.linear(input, weight, bias), target, ignore_index=ignore_index)

    install("liger_kernel.transformers.functional", liger_fused_linear_cross_entropy=linear_cross_entropy)
    agrees(LinearLossCase(21, 8, 13), "liger")
