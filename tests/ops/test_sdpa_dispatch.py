"""What goes through `scaled_dot_product_attention` besides plain tensors, and what is refused as PyTorch refuses it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastattn
from fastattn.testing import make_tensor
from tests.ops.test_sdpa_contract import IMPLEMENTATIONS, THEIRS, operands, ours, outcome

Q = torch.randn(2, 4, 5, 8)
K = torch.randn(2, 4, 7, 8)
REFUSED: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "rank-1": ([Q[0, 0, 0], K[0, 0, 0], K[0, 0, 0]], {}),
    "key-of-rank-1": ([Q, K[0, 0, 0], K], {}),
    "mask-rank-5": ([Q, K, K], dict(attn_mask=torch.zeros(1, 1, 1, 5, 7))),
    "mask-float64": ([Q, K, K], dict(attn_mask=torch.zeros(5, 7).double())),
    "mask-int64": ([Q, K, K], dict(attn_mask=torch.ones(5, 7).long())),
    "mask-bfloat16": ([Q, K, K], dict(attn_mask=torch.zeros(5, 7).bfloat16())),
    "mask-rows": ([Q, K, K], dict(attn_mask=torch.zeros(4, 7))),
    "mask-keys": ([Q, K, K], dict(attn_mask=torch.zeros(5, 6))),
    "mask-heads": ([Q, K, K], dict(attn_mask=torch.zeros(3, 5, 7))),
    "mask-batch": ([Q, K, K], dict(attn_mask=torch.zeros(3, 4, 5, 7))),
    "mask-rank-1": ([Q, K, K], dict(attn_mask=torch.zeros(7))),
    "mask-rank-0": ([Q, K, K], dict(attn_mask=torch.tensor(0.0))),
    "dtypes": ([Q, K.double(), K], {}),
    "value-dtype": ([Q, K, K.bfloat16()], {}),
    "head-dim": ([Q, K[..., :4], K], {}),
    "batches": ([Q, K.repeat(2, 1, 1, 1)[:3], K.repeat(2, 1, 1, 1)[:3]], {}),
    "heads": ([Q, K[:, :2], K[:, :2]], {}),
    "heads-do-not-divide": ([Q, K[:, :3], K[:, :3]], dict(enable_gqa=True)),
    "dropout-above-1": ([Q, K, K], dict(dropout_p=1.5)),
    "dropout-below-0": ([Q, K, K], dict(dropout_p=-0.5)),
    "scale": ([Q, K, K], dict(scale="x")),
    "mask-is-a-list": ([Q, K, K], dict(attn_mask=[1.0])),
    "devices": ([Q, K.to("meta"), K], {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_pytorch_refuses_is_refused(name: str) -> None:
    """With the same error, type and message; forced to the kernels, by NotSupported at least."""
    tensors, keywords = REFUSED[name]
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)) as theirs:
        THEIRS(*tensors, **keywords)
    for function in (fastattn.scaled_dot_product_attention, ours("torch")):
        with pytest.raises(theirs.type) as found:
            function(*tensors, **keywords)
        messages = (re.sub(r" \(position \d\)", "", str(error.value)) for error in (found, theirs))
        assert len(set(messages)) == 1
    with pytest.raises((theirs.type, fastattn.NotSupported)):
        ours("triton")(*tensors, **keywords)


def test_odd_calls_that_pytorch_takes_are_taken() -> None:
    for tensors, keywords in (
        ([Q[:, :1], K, K], {}),
        ([Q, K, K], dict(attn_mask=torch.zeros(5, 7, requires_grad=True))),
        ([Q, K, K], dict(attn_mask=torch.zeros(2, 4, 5, 7).transpose(0, 1).contiguous().transpose(0, 1))),
        ([Q, K, K], dict(attn_mask=torch.zeros(5, 14)[:, ::2])),
        ([Q, K, K], dict(dropout_p=0)),
        ([Q, K, K], dict(scale=1)),
    ):
        expected = THEIRS(*tensors, **keywords)
        torch.testing.assert_close(fastattn.scaled_dot_product_attention(*tensors, **keywords), expected)
        torch.testing.assert_close(ours("torch")(*tensors, **keywords), expected)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("boolean", [False, True])
def test_a_mask_with_is_causal_is_refused(implementation: str | None, boolean: bool) -> None:
    """By the path that PyTorch takes for such shapes: its maths. Its fused path on CPUs takes both."""
    mask = torch.zeros(5, 7)
    keywords = dict(attn_mask=mask == 0 if boolean else mask, is_causal=True)
    function = fastattn.scaled_dot_product_attention if implementation is None else ours(implementation)
    with sdpa_kernel(SDPBackend.MATH):
        with pytest.raises(RuntimeError) as theirs:
            THEIRS(Q, K, K, **keywords)
        with pytest.raises((RuntimeError, fastattn.NotSupported)) as found:
            function(Q, K, K, **keywords)
    assert implementation == "triton" or str(found.value) == str(theirs.value)


BIASES = {"upper-left": causal_upper_left, "lower-right": causal_lower_right}


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("rows, keys", [(5, 7), (7, 7)])
def test_causal_biases(
    rows: int,
    keys: int,
    name: str,
    assigned: bool,
    implementation: str | None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when ours is what F has: CausalBias calls F's function, and asks whether it was called by it."""
    tensors = operands((1, 2, rows, 8), (1, 2, keys, 8), (1, 2, keys, 8), device=device)
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    mask = seen.tril(diagonal=keys - rows if name == "lower-right" else 0)
    expected = outcome(THEIRS, tensors, mask, {})
    function = fastattn.scaled_dot_product_attention if implementation is None else ours(implementation)
    if assigned:
        monkeypatch.setattr(F, "scaled_dot_product_attention", function)
        function = lambda *a, **k: F.scaled_dot_product_attention(*a, **k)  # noqa: E731
    found = _with_bias(function, tensors, BIASES[name](rows, keys))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _with_bias(function: Any, tensors: list[Tensor], bias: Any) -> list[Tensor]:
    """`outcome`, for a mask that is no plain tensor."""
    return outcome(lambda *a, attn_mask, **k: function(*a, attn_mask=bias, **k), tensors, None, {})


@pytest.mark.parametrize("implementation", ["torch", None])
def test_causal_bias_with_is_causal_is_refused(implementation: str | None) -> None:
    keywords = dict(attn_mask=causal_upper_left(5, 7), is_causal=True)
    function = fastattn.scaled_dot_product_attention if implementation is None else ours(implementation)
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)) as theirs:
        THEIRS(Q, K, K, **keywords)
    with pytest.raises(theirs.type):
        function(Q, K, K, **keywords)


def jagged(*lengths: int, heads: int = 1, width: int = 8, seed: int = 0) -> Tensor:
    rows = [make_tensor(n, heads, width, seed=seed + n) for n in lengths]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    return nested


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("is_causal", [False, True])
def test_jagged_nested_tensors(implementation: str | None, is_causal: bool) -> None:
    """Each sequence is an attention by itself; PyTorch's own function on each of them is the truth."""
    if implementation == "torch" and is_causal:
        pytest.skip("PyTorch's own function has no causal path for nested tensors on a CPU")
    lengths = (3, 33, 1, 7)
    leaves = [jagged(*lengths, seed=10 * place) for place in range(3)]
    function = fastattn.scaled_dot_product_attention if implementation is None else ours(implementation)
    out = function(*(t.transpose(1, 2) for t in leaves), is_causal=is_causal)
    assert out.is_nested and out.layout == torch.jagged
    parts = [[t.detach().requires_grad_() for t in leaf.unbind()] for leaf in leaves]
    found = out.transpose(1, 2).unbind()
    gradients = torch.autograd.grad(out.transpose(1, 2).values().square().sum(), leaves)
    for n in range(len(lengths)):
        tensors = [part[n].transpose(0, 1) for part in parts]
        expected = THEIRS(*tensors, is_causal=is_causal).transpose(0, 1)
        torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=1e-5)
        truth = torch.autograd.grad(expected.square().sum(), [part[n] for part in parts])
        actual = [g.unbind()[n] for g in gradients]
        torch.testing.assert_close(actual, list(truth), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["triton", None])
def test_jagged_keys_of_other_lengths(implementation: str | None) -> None:
    q, k = jagged(3, 9, 1), jagged(5, 2, 7, seed=20)
    function = fastattn.scaled_dot_product_attention if implementation is None else ours(implementation)
    out = function(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2))
    for a, b, found in zip(q.unbind(), k.unbind(), out.transpose(1, 2).unbind(), strict=True):
        a, b = a.transpose(0, 1), b.transpose(0, 1)
        torch.testing.assert_close(found, THEIRS(a, b, b).transpose(0, 1), rtol=1e-4, atol=1e-5)
