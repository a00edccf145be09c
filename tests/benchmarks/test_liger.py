"""The adapters of Liger Kernel, against stand-ins with its functions' signatures, orders and habits."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import (
    AddRMSNormCase,
    GegluCase,
    LayerNormCase,
    LinearLossCase,
    LossCase,
    RMSNormCase,
    RotaryCase,
    SwigluCase,
)
from benchmarks.measure import DIRECTIONS, Inputs, _empty_row, prepare
from benchmarks.providers import NOTES, PROVIDERS, Absent
from tests.benchmarks.conftest import agrees

CPU = torch.device("cpu")


class Recorded(NamedTuple):
    """What a stand-in was called with."""

    loss: list[torch.Tensor]
    rope: list[torch.Tensor]


@pytest.fixture
def liger(install):
    """Liger's functional module: same names, same parameters in the same order, same defaults."""
    seen = Recorded([], [])

    class CrossEntropy(torch.autograd.Function):
        """The forward puts the gradient where the logits were."""

        @staticmethod
        def forward(ctx, logits, targets):
            with torch.enable_grad():
                leaf = logits.detach().clone().requires_grad_()
                loss = F.cross_entropy(leaf, targets)
                seen.loss.append(logits)
                if logits.requires_grad:
                    logits.copy_(torch.autograd.grad(loss, leaf)[0])
            ctx.save_for_backward(logits)
            return loss.detach()

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0] * grad, None

    class Rope(torch.autograd.Function):
        """q and k (batch, heads, seq, head_dim), cos and sin (1, seq, head_dim); writes over what is in its layout."""

        @staticmethod
        def forward(ctx, q, k, cos, sin):
            ctx.save_for_backward(cos, sin)
            seen.rope.append(q)
            return Rope.turn(q, cos, sin), Rope.turn(k, cos, sin)

        @staticmethod
        def backward(ctx, dq, dk):
            cos, sin = ctx.saved_tensors
            return Rope.turn(dq, cos, -sin), Rope.turn(dk, cos, -sin), None, None

        @staticmethod
        def turn(x, cos, sin):
            assert cos.shape == sin.shape == (1, x.size(2), x.size(3))
            x = x.transpose(1, 2).contiguous()
            half = torch.cat((-x[..., x.size(-1) // 2 :], x[..., : x.size(-1) // 2]), dim=-1)
            x.copy_(x * cos[0, :, None] + half * sin[0, :, None])
            return x.transpose(1, 2)

    def fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place, "the gradient that arrives would be written over"
        total = R + X
        return F.rms_norm(total, W.shape, W + offset, eps), total

    def rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place, "the gradient that arrives would be written over"
        return F.rms_norm(X, W.shape, W + offset, eps)

    def fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
        return F.cross_entropy(F.linear(input, weight, bias), target, ignore_index=ignore_index)

    def rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        return Rope.apply(q, k, cos, sin)

    install(
        "liger_kernel.transformers.functional",
        liger_cross_entropy=CrossEntropy.apply,
        liger_fused_linear_cross_entropy=fused_linear_cross_entropy,
        liger_layer_norm=lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
        liger_rms_norm=rms_norm,
        liger_fused_add_rms_norm=fused_add_rms_norm,
        liger_geglu=lambda a, b: F.gelu(a, approximate="tanh") * b,
        liger_swiglu=lambda a, b: F.silu(a) * b,
        liger_rope=rope,
    )
    return seen


@pytest.mark.parametrize(
    "case",
    (
        LayerNormCase(5, 33),
        RMSNormCase(5, 33),
        AddRMSNormCase(5, 33),
        GegluCase(3, 17, "tanh"),
        SwigluCase(3, 17),
        RotaryCase(2, 3, 9, 16),
        LossCase(21, 13),
        LinearLossCase(21, 8, 13),
    ),
    ids=lambda case: f"{case.operation}-{case.name}",
)
def test_agrees_with_the_reference(case, liger):
    agrees(case, "liger")


def test_every_adapter_is_tested():
    tested = set(test_agrees_with_the_reference.pytestmark[0].args[1])
    assert {case.operation for case in tested} == {
        name for name, found in PROVIDERS.items() if "liger" in found
    }


@pytest.mark.parametrize(
    ("case", "reason"),
    (
        (LayerNormCase(5, 33, affine=False), "has a weight and a bias"),
        (RMSNormCase(5, 33, affine=False), "has a weight"),
        (AddRMSNormCase(5, 33, torch.bfloat16, torch.float32), "Liger's sum has x's dtype"),
        (GegluCase(3, 17), "has the tanh form alone, not approximate='none'"),
        (RotaryCase(1, 2, 5, 6, interleaved=True), "turns halves"),
    ),
    ids=lambda value: getattr(value, "operation", ""),
)
def test_what_it_does_not_have_is_absent(case, reason, liger):
    with pytest.raises(Absent, match=reason):
        prepare(Inputs(case, CPU), "liger", "forward")


def test_it_writes_over_its_logits_and_spoils_nobody_elses(liger):
    inputs = Inputs(LossCase(21, 13), CPU)
    for direction, copies in zip(DIRECTIONS, (False, True), strict=True):
        prepare(inputs, "liger", direction)
        # A copy is timed only where there is something to protect, and its row says so.
        assert (liger.loss[-1].data_ptr() != inputs.tensors[0].data_ptr()) is copies
        note = _empty_row(inputs.case, direction, "liger").get("note", "")
        assert ("copy of the logits" in note) is copies


def test_it_rotates_a_copy_and_says_so(liger):
    """In the layout of the cases it writes over what it is given."""
    inputs = Inputs(RotaryCase(2, 3, 9, 16), CPU)
    for direction in DIRECTIONS:
        prepare(inputs, "liger", direction)
        assert liger.rope[-1].data_ptr() != inputs.tensors[0].data_ptr()
        assert liger.rope[-1].transpose(1, 2).is_contiguous()
        assert "a copy of x" in NOTES["rotary", "liger", direction]


def test_its_gates_are_two_tensors_and_its_rows_say_so():
    for operation in ("geglu", "swiglu"):
        for direction in DIRECTIONS:
            assert "copies of the halves" in NOTES[operation, "liger", direction]
