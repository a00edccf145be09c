"""Every row of the contract of `torch.nn.functional.scaled_dot_product_attention`, held against that function itself.

Truth is PyTorch's function in float64 on the same rounded inputs, the peer PyTorch's function in the same dtype.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing import assert_accurate, make_tensor

IMPLEMENTATIONS = ("triton", "torch")
Shape = tuple[int, ...]
THEIRS = F.scaled_dot_product_attention


def ours(implementation: str) -> Callable[..., Tensor]:
    def call(*arguments: Any, **keywords: Any) -> Tensor:
        with fastattn.use_implementation(implementation):
            return fastattn.scaled_dot_product_attention(*arguments, **keywords)

    return call


def outcome(
    function: Callable[..., Tensor], tensors: list[Tensor], mask: Tensor | None, keywords: dict[str, Any]
) -> list[Tensor]:
    """The result, and the gradients of query, key, value and a floating mask."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().requires_grad_()
    out = function(*leaves, attn_mask=mask, **keywords)
    wanted = leaves if mask is None or not mask.requires_grad else [*leaves, mask]
    dout = make_tensor(*out.shape, seed=9, device=out.device).to(tensors[0].dtype).to(out.dtype)
    return [out, *torch.autograd.grad(out, wanted, dout)]


def check(
    implementation: str, tensors: list[Tensor], mask: Tensor | None = None, **keywords: Any
) -> list[Tensor]:
    """Result and gradients: values, shapes, dtypes, and the result's strides, as PyTorch's."""
    double = [t.double() for t in tensors]
    double_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    truth = outcome(THEIRS, double, double_mask, keywords)
    peer = outcome(THEIRS, tensors, mask, keywords)
    found = outcome(ours(implementation), tensors, mask, keywords)
    assert len(found) == len(truth)
    # A weight's error comes back in every gradient, whose terms are as large as dv's and may cancel.
    scale = max([t.abs().max().item() for t in truth[1:4] if t.numel()], default=0.0)
    for place, (name, actual) in enumerate(zip(("out", "dq", "dk", "dv", "dmask"), found, strict=False)):
        assert actual.dtype == peer[place].dtype
        # A float32 mask's gradient comes from results in the query's dtype.
        actual = actual.to(tensors[0].dtype)
        assert_accurate(
            actual,
            peer[place].to(actual.dtype),
            truth[place],
            name=name,
            growth=8.0 if place else 2.0,
            scale=scale if place else 0.0,
        )
    if tensors[0].size(-1) == tensors[2].size(-1):  # else PyTorch's maths path gives a contiguous result
        assert strides(found[0]) == strides(peer[0])
    assert all(a.isfinite().all() for a in found)
    return found


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Those that matter: of dimensions with more than one element, of a tensor that has any."""
    return tuple(s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and tensor.numel())


def operands(*shapes: Shape, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> list[Tensor]:
    return [make_tensor(*shape, dtype=dtype, seed=seed, device=device) for seed, shape in enumerate(shapes)]


def causal_keywords(name: str) -> dict[str, Any]:
    return dict(is_causal=True) if name == "causal" else {}


SHAPES: dict[str, tuple[Shape, Shape, Shape]] = {
    "rank-2": ((5, 8), (7, 8), (7, 8)),
    "rank-3": ((2, 5, 8), (2, 7, 8), (2, 7, 8)),
    "rank-4": ((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "rank-5": ((2, 2, 1, 5, 8), (2, 2, 1, 7, 8), (2, 2, 1, 7, 8)),
    "ranks-mixed": ((2, 2, 5, 8), (2, 7, 8), (7, 8)),
    "query-of-lower-rank": ((5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "batch-of-query": ((1, 1, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "batch-of-key": ((2, 1, 5, 8), (1, 1, 7, 8), (2, 1, 7, 8)),
    "batches-of-rank-5": ((2, 1, 2, 5, 8), (1, 2, 2, 7, 8), (2, 2, 2, 7, 8)),
    "head-1-of-query": ((1, 1, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    "head-1-of-keys": ((1, 3, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8)),
    "head-1-of-value": ((1, 3, 5, 8), (1, 3, 7, 8), (1, 1, 7, 8)),
    "wider-value": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 12)),
    "narrower-value": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 4)),
    "odd-widths": ((1, 2, 33, 7), (1, 2, 35, 7), (1, 2, 35, 5)),
}


# The interpreter takes about a second for a call with its backward: it gets every shape once, every other causal.
RANKS = [(name, causal, "torch") for name in SHAPES for causal in ("full", "causal")]
RANKS += [(name, ("full", "causal")[place % 2], "triton") for place, name in enumerate(SHAPES)]


@pytest.mark.parametrize("name, causal, implementation", RANKS)
def test_ranks_and_broadcasting(name: str, causal: str, implementation: str, device: torch.device) -> None:
    """With `is_causal` the first key is seen by the first query, whatever the lengths: 5 x 7, 33 x 35."""
    check(implementation, operands(*SHAPES[name], device=device), **causal_keywords(causal))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads, k_heads, v_heads", [(4, 2, 2), (4, 2, 1), (2, 1, 2), (4, 4, 2), (6, 2, 3)])
def test_grouped_heads(
    heads: int, k_heads: int, v_heads: int, implementation: str, device: torch.device
) -> None:
    """PyTorch repeats keys and values each for itself, so that their head counts may differ."""
    tensors = operands((1, heads, 5, 8), (1, k_heads, 7, 8), (1, v_heads, 7, 8), device=device)
    check(implementation, tensors, enable_gqa=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 1, 2, 5, 8)], ids=str)
def test_grouped_heads_of_other_ranks(shape: Shape, implementation: str, device: torch.device) -> None:
    heads = (*shape[:-3], 1, 7, 8)
    check(implementation, operands(shape, heads, heads, device=device), enable_gqa=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows, keys", [(40, 7), (7, 40), (9, 1), (33, 33)])
def test_is_causal_lies_at_the_top_left(
    rows: int, keys: int, implementation: str, device: torch.device
) -> None:
    tensors = operands((1, 1, rows, 8), (1, 1, keys, 8), (1, 1, keys, 8), device=device)
    out = check(implementation, tensors, is_causal=True)[0]
    torch.testing.assert_close(out[:, :, 0], tensors[2][:, :, 0])


MASKS: dict[str, Shape] = {
    "ls": (5, 7),
    "1s": (1, 7),
    "l1": (5, 1),
    "11": (1, 1),
    "hls": (3, 5, 7),
    "b1ls": (2, 1, 5, 7),
    "1h1s": (1, 3, 1, 7),
    "bhl1": (2, 3, 5, 1),
    "b11s": (2, 1, 1, 7),
    "bhls": (2, 3, 5, 7),
}


KINDS = ("bool", "float", "bfloat16", "float32 with bfloat16")
MASKED = [(name, kind, "torch") for name in MASKS for kind in KINDS]
MASKED += [(name, KINDS[place % 4], "triton") for place, name in enumerate(MASKS)]
# A gradient of each shape that is reduced.
MASKED += [(name, "float", "triton") for name in ("11", "b1ls", "1h1s")]


@pytest.mark.parametrize("name, kind, implementation", MASKED)
def test_masks(name: str, kind: str, implementation: str, device: torch.device) -> None:
    """Shapes and dtypes; a floating mask's gradient has the mask's own shape and dtype."""
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    tensors = operands((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), dtype=dtype, device=device)
    mask = make_tensor(*MASKS[name], seed=5, device=device)
    mask = mask > -0.5 if kind == "bool" else mask.to(dtype) if kind == "bfloat16" else mask
    check(implementation, tensors, mask)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(5, 7), (3, 5, 7), (2, 1, 5, 7), (2, 1, 3, 1, 7), (1, 2, 3, 5, 7)], ids=str
)
def test_masks_of_rank_5(shape: Shape, implementation: str, device: torch.device) -> None:
    tensors = operands((1, 2, 3, 5, 8), (1, 1, 3, 7, 8), (1, 2, 3, 7, 8), device=device)
    if shape[0] == 2 and len(shape) == 5:
        tensors[0] = make_tensor(2, 1, 3, 5, 8, device=device)
        tensors[2] = tensors[2][:, :1]
    mask = make_tensor(*shape, seed=5, device=device)
    check(implementation, tensors, mask > -0.5 if len(shape) == 4 else mask)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 5, 7), (1, 3, 2, 1, 7), (2, 3, 2, 5, 7)], ids=str)
def test_masks_of_two_batches(shape: Shape, implementation: str, device: torch.device) -> None:
    """Both larger than 1, so that their order shows."""
    tensors = operands((2, 3, 2, 5, 8), (2, 3, 1, 7, 8), (2, 3, 1, 7, 8), device=device)
    check(implementation, tensors, make_tensor(*shape, seed=5, device=device))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rank", [2, 3])
def test_masks_of_lower_rank(rank: int, implementation: str, device: torch.device) -> None:
    tensors = operands(*((3, 5, 8)[3 - rank :], (3, 7, 8)[3 - rank :], (3, 7, 8)[3 - rank :]), device=device)
    for shape in ((5, 7), (3, 5, 7))[: rank - 1]:
        check(implementation, tensors, make_tensor(*shape, seed=5, device=device))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_fully_masked_rows(kind: str, implementation: str, device: torch.device) -> None:
    """They give 0, and gradients of 0 and not NaN; so does a call in which no row sees anything."""
    tensors = operands((2, 1, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), device=device)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool, device=device)
    mask[0, :, 1:3] = False
    mask[1] = False
    if kind == "-inf":
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
    out, dq, *_ = check(implementation, tensors, mask)
    assert not out[0, :, 1:3].any() and not out[1].any()
    assert not dq[0, :, 1:3].any() and not dq[1].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_the_least_finite_number_is_the_mean(implementation: str, device: torch.device) -> None:
    """transformers masks so: all scores are rounded to the same number, and the softmax is uniform."""
    q, k, v = operands((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), device=device)
    mask = torch.zeros(5, 7, device=device)
    mask[2] = torch.finfo(torch.float32).min
    out = ours(implementation)(q, k, v, mask)
    torch.testing.assert_close(out[:, :, 2], v.mean(dim=2))
    torch.testing.assert_close(out, THEIRS(q, k, v, mask))


EMPTY: dict[str, tuple[Shape, Shape, Shape]] = {
    "keys": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    "rows": ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "rows-and-keys": ((2, 3, 0, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    "batch": ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
    "v-dim": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 0)),
    "keys-of-rank-2": ((5, 8), (0, 8), (0, 8)),
}


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("causal", ["full", "causal"])
@pytest.mark.parametrize("name", EMPTY)
def test_empty(name: str, causal: str, implementation: str | None, device: torch.device) -> None:
    if implementation == "triton" and name == "v-dim":
        pytest.skip("no kernel has tiles of no columns; the automatic choice goes to PyTorch")
    keywords = causal_keywords(causal)
    tensors = operands(*EMPTY[name], device=device)
    function = fastattn.scaled_dot_product_attention if implementation is None else ours(implementation)
    expected, found = (outcome(f, tensors, None, keywords) for f in (THEIRS, function))
    for actual, theirs in zip(found, expected, strict=True):
        assert actual.shape == theirs.shape and actual.dtype == theirs.dtype
        assert not actual.any()


@pytest.mark.parametrize("implementation", ["torch", None])
def test_no_head_dim(implementation: str | None, device: torch.device) -> None:
    """Without products every score is the same (PyTorch's default scale is 1/0): whatever PyTorch says."""
    tensors = operands((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 8), device=device)
    function = fastattn.scaled_dot_product_attention if implementation is None else ours(implementation)
    for keywords in ({}, dict(scale=1.0)):
        expected, found = (outcome(f, tensors, None, keywords) for f in (THEIRS, function))
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", ["full", "causal"])
@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 3])
def test_scales(scale: float, causal: str, implementation: str, device: torch.device) -> None:
    tensors = operands((1, 1, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8), device=device)
    if scale <= 0 and causal == "causal":
        # PyTorch masks before it scales, and its own result is NaN there; the formula is the truth.
        expected = fastattn.reference.attention(*tensors, causal="top_left", scale=scale)
        if implementation == "triton":
            found = ours(implementation)(*tensors, is_causal=True, scale=scale)
            torch.testing.assert_close(found, expected)
        return
    check(implementation, tensors, scale=scale, **causal_keywords(causal))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout(implementation: str, device: torch.device) -> None:
    """Also under no_grad; p = 1 drops all; on the average nothing changes."""
    q, k = operands((1, 2, 128, 8), (1, 2, 16, 8), device=device)
    v = torch.ones(1, 2, 16, 16, device=device)
    attend = ours(implementation)
    with torch.no_grad():
        torch.manual_seed(0)
        out = attend(q, k, v, dropout_p=0.4)
        assert not torch.equal(out, attend(q, k, v))
        torch.manual_seed(0)
        assert torch.equal(out, attend(q, k, v, dropout_p=0.4))
        assert not attend(q, k, v, dropout_p=1.0).any()
    # The mean of 256 rows of weights that sum to 1; a row's variance is p / (1 - p) times the sum of their squares,
    # about 1 / 4 here.
    assert abs(out[..., 0].mean().item() - 1.0) < 4 * math.sqrt(0.4 / 0.6 / 4 / 256)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_of_everything_has_no_gradient(implementation: str, device: torch.device) -> None:
    tensors = operands((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), device=device)
    for found in outcome(ours(implementation), tensors, None, dict(dropout_p=1.0)):
        assert torch.equal(found, torch.zeros_like(found))


def laid_out(shape: Shape, order: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    """A tensor of this shape whose memory has the dimensions in this order."""
    back = [order.index(d) for d in range(len(order))]
    return make_tensor(*(shape[d] for d in order), seed=seed, device=device).permute(back)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "order, v_dim",
    [((0, 1, 2, 3), 8), ((0, 2, 1, 3), 8), ((0, 2, 1, 3), 12), ((2, 0, 1, 3), 8), ((1, 0, 2, 3), 8)],
    ids=str,
)
def test_layouts(order: tuple[int, ...], v_dim: int, implementation: str, device: torch.device) -> None:
    """q made as (batch, seq, heads, head_dim), as every model does, gives a result laid out like that."""
    shapes = ((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, v_dim))
    tensors = [laid_out(shape, order, device, seed) for seed, shape in enumerate(shapes)]
    out = check(implementation, tensors)[0]
    assert implementation == "torch" or strides(out.permute(order)) == strides(
        torch.empty(out.permute(order).shape)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_of_views(implementation: str, device: torch.device) -> None:
    """Expanded, sliced and turned operands: their values, and not what lies between, are read."""
    q = make_tensor(2, 1, 5, 16, device=device)[..., ::2]
    k = make_tensor(1, 1, 7, 8, seed=1, device=device).expand(2, -1, -1, -1)
    v = make_tensor(2, 1, 8, 9, seed=2, device=device).mT[:, :, 1:8]
    tensors = [q, k, v]
    expected, found = (outcome(f, tensors, None, {}) for f in (THEIRS, ours(implementation)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("float32", "bfloat16", "float16")], ids=str)
@pytest.mark.parametrize("masked", [None, "float32", "bfloat16", "bool"])
def test_autocast(
    masked: str | None, dtypes: tuple[str, ...], implementation: str, device: torch.device
) -> None:
    tensors = operands((2, 1, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), device=device)
    tensors = [t.to(getattr(torch, dtype)) for t, dtype in zip(tensors, dtypes, strict=True)]
    mask = None
    if masked is not None:
        mask = make_tensor(2, 1, 5, 7, seed=5, device=device)
        mask = mask > 0 if masked == "bool" else mask.to(getattr(torch, masked))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        expected, found = (outcome(f, tensors, mask, {}) for f in (THEIRS, ours(implementation)))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert found[0].dtype == torch.bfloat16
    for actual, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, theirs, rtol=2e-2, atol=4e-2)


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's path goes in blocks of operators, as where PyTorch's own function would hold many scores."""
    module = importlib.import_module("fastattn.ops.scaled_dot_product_attention")
    monkeypatch.setattr(module, "holds_all_scores", lambda *arguments: True)


@pytest.mark.parametrize("causal", ["full", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_ranks_and_broadcasting_in_blocks(name: str, causal: str, in_blocks: None) -> None:
    check("torch", operands(*SHAPES[name]), **causal_keywords(causal))


@pytest.mark.parametrize("k_heads, v_heads", [(2, 2), (2, 1), (1, 2), (6, 3), (2, 3)])
def test_grouped_heads_in_blocks(k_heads: int, v_heads: int, in_blocks: None) -> None:
    check("torch", operands((2, 1, 6, 5, 8), (1, k_heads, 7, 8), (2, 1, v_heads, 7, 8)), enable_gqa=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MASKS)
def test_masks_in_blocks(name: str, kind: str, in_blocks: None) -> None:
    test_masks(name, kind, "torch", torch.device("cpu"))


@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_fully_masked_rows_in_blocks(kind: str, in_blocks: None) -> None:
    test_fully_masked_rows(kind, "torch", torch.device("cpu"))


@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (2, 1, 3, 1, 7), (1, 2, 3, 5, 7)], ids=str)
def test_masks_of_rank_5_in_blocks(shape: Shape, in_blocks: None) -> None:
    test_masks_of_rank_5(shape, "torch", torch.device("cpu"))


@pytest.mark.parametrize("shape", [(2, 1, 1, 5, 7), (1, 3, 2, 1, 7), (2, 3, 2, 5, 7)], ids=str)
def test_masks_of_two_batches_in_blocks(shape: Shape, in_blocks: None) -> None:
    test_masks_of_two_batches(shape, "torch", torch.device("cpu"))
