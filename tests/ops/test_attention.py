"""fastattn.attention and fastattn.scaled_dot_product_attention, through every implementation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn.kernels._options import AttentionOptions
from fastattn.testing import assert_accurate, make_tensor
from tests.attention_checks import AttentionCase, check_attention, results

FAST = ("triton", "torch")

MASKS = [
    AttentionCase(causal=causal, seq_q=seq_q, seq_k=seq_k)
    for causal in (False, "top_left", "bottom_right")
    for seq_q, seq_k in ((1, 1), (1, 63), (63, 1), (45, 67), (67, 45))
]
HEAD_DIMS = [
    AttentionCase(seq_q=33, seq_k=35, head_dim=d, causal="top_left", heads=1)
    for d in (1, 20, 64, 80, 96, 112, 128, 160, 192, 256)
]
HEADS = [
    AttentionCase(batch=batch, heads=heads, kv_heads=kv_heads, seq_q=35, seq_k=34, causal="bottom_right")
    for batch, heads, kv_heads in ((2, 1, 1), (1, 4, 2), (2, 3, 1))
]
SCALES = [AttentionCase(scale=scale, causal="top_left", seq_k=40) for scale in (0.0, -0.3, 2.0)]
LOW_PRECISION = [
    AttentionCase(dtype=dtype, causal=causal, head_dim=head_dim)
    for dtype in (torch.bfloat16, torch.float16)
    for causal, head_dim in ((False, 16), ("top_left", 40), ("bottom_right", 64))
]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", [*MASKS, *HEAD_DIMS, *HEADS, *SCALES, *LOW_PRECISION], ids=str)
def test_matches_reference(case: AttentionCase, implementation: str, device: torch.device) -> None:
    check_attention(case, implementation, device)


def test_torch_implementation_takes_float64() -> None:
    """Float64 is not for Triton; the rounding errors allowed are 2^29 times smaller than float32's."""
    check_attention(AttentionCase(dtype=torch.float64, causal="bottom_right"), "torch", torch.device("cpu"))


@pytest.mark.parametrize("implementation", [*FAST, "reference"])
def test_fully_masked_rows_are_zero(implementation: str, device: torch.device) -> None:
    """Bottom-right with more queries than keys: the first seq_q - seq_k rows see nothing."""
    case = AttentionCase(seq_q=40, seq_k=7, causal="bottom_right")
    found = results(case, case.inputs(device), implementation)
    assert torch.equal(found["out"][:, :, :33], torch.zeros_like(found["out"][:, :, :33]))
    assert (found["lse"][:, :, :33] == -math.inf).all()
    assert torch.equal(found["dq"][:, :, :33], torch.zeros_like(found["dq"][:, :, :33]))
    assert found["lse"][:, :, 33:].isfinite().all()
    assert all(found[name].isfinite().all() for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
def test_empty(implementation: str, shape: tuple[int, ...], device: torch.device) -> None:
    batch, heads, seq_q, seq_k = shape
    q = torch.randn(batch, heads, seq_q, 16, device=device, requires_grad=True)
    k = torch.randn(batch, heads, seq_k, 16, device=device, requires_grad=True)
    out, lse = fastattn.attention(q, k, k, return_lse=True, implementation=implementation)
    alone = fastattn.attention(q, k, k, implementation=implementation)
    assert out.shape == alone.shape == q.shape and not out.any() and not alone.any()
    assert (lse == -math.inf).all()
    for result in (out, alone):
        dq, dk = torch.autograd.grad(result.sum(), (q, k))
        assert not dq.any() and not dk.any()


@pytest.mark.parametrize("implementation", FAST)
def test_extreme_scores_stay_finite(implementation: str, device: torch.device) -> None:
    """Scores near +-1e4: exp would overflow without the running maximum, and underflow to 0/0 without a pivot."""
    q, k, v = (make_tensor(1, 1, 40, 16, seed=seed, device=device) for seed in range(3))
    out = fastattn.attention(50 * q, 50 * k, v, causal=True, implementation=implementation)
    truth = fastattn.reference.attention((50 * q).double(), (50 * k).double(), v.double(), causal=True)
    peer = fastattn.reference.attention(50 * q, 50 * k, v, causal=True)
    assert_accurate(out, peer, truth, growth=2000)  # of scores near 1e4, an ulp is 1e-3


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_matches_pytorch(implementation: str, dtype: torch.dtype, device: torch.device) -> None:
    q, k = make_tensor(1, 2, 20, 16, seed=1, device=device), make_tensor(1, 2, 20, 16, seed=2, device=device)
    q.requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        expected = F.scaled_dot_product_attention(q, k.to(dtype), k)
        out = fastattn.attention(q, k.to(dtype), k, implementation=implementation)
        with fastattn.use_implementation(implementation):
            drop_in = fastattn.scaled_dot_product_attention(q, k.to(dtype), k)
    assert out.dtype == drop_in.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(drop_in, expected, atol=2e-2, rtol=2e-2)
    (gradient,) = torch.autograd.grad(out.float().sum(), q)
    assert gradient.dtype == torch.float32


def test_float64_stays_float64_under_autocast() -> None:
    q = torch.randn(1, 1, 4, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            fastattn.attention(q, q, q).dtype
            == F.scaled_dot_product_attention(q, q, q).dtype
            == torch.float64
        )


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    q = make_tensor(1, 1, 20, 16, device=device, requires_grad=True)

    def attend(q: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, q, q, causal=True, implementation=implementation)

    (plain,) = torch.autograd.grad(attend(q).square().sum(), q)
    kept = torch.utils.checkpoint.checkpoint(attend, q, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(kept.square().sum(), q)
    assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("implementation", FAST)
def test_compiles_whole_with_dynamic_shapes(
    implementation: str, return_lse: bool, device: torch.device
) -> None:
    """One graph, forward and backward, serves several lengths; q, k and v may be one tensor."""
    frames = CompileCounterWithBackend("aot_eager")

    def attend(x: torch.Tensor) -> torch.Tensor:
        found = fastattn.attention(
            x, x, x, causal="top_left", return_lse=return_lse, implementation=implementation
        )
        return found[0] + found[1].unsqueeze(-1) if return_lse else found

    compiled = torch.compile(attend, fullgraph=True, backend=frames, dynamic=True)
    for length in (17, 40):
        x = make_tensor(1, 2, length, 16, device=device, requires_grad=True)
        out = compiled(x)
        torch.testing.assert_close(out, attend(x))
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        (expected,) = torch.autograd.grad(attend(x).square().sum(), x)
        torch.testing.assert_close(gradient, expected)
    assert frames.frame_count == 1


@pytest.mark.parametrize("kind", ["attention", "attention_blockwise"])
def test_opcheck(kind: str, device: torch.device) -> None:
    q = make_tensor(1, 2, 20, 16, seed=1, device=device).transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (make_tensor(1, 1, 23, 16, seed=seed, device=device) for seed in (2, 3))
    forward = getattr(torch.ops.fastattn, f"{kind}_forward").default
    backward = getattr(torch.ops.fastattn, f"{kind}_backward").default
    # T5's layout, heads innermost, which the gradient has too.
    bias = make_tensor(1, 20, 23, 2, device=device).permute(0, 3, 1, 2)
    sinks = make_tensor(2, device=device)
    for options in (
        AttentionOptions(0.25),
        AttentionOptions(0.25, 5, 0, True, 2.0, bias=bias, sinks=sinks, mask=bias > -1),
    ):
        torch.library.opcheck(forward, (q, k, v, *options))
        out, lse = forward(q, k, v, *options)
        given = [options.bias is not None, options.sinks is not None]
        torch.library.opcheck(backward, (out, lse, q, k, v, out, lse, [True] * 3 + given, *options))
        torch.library.opcheck(backward, (out, None, q, k, v, out, lse, [False, True] + [False] * 3, *options))


@pytest.mark.parametrize("implementation", FAST)
def test_second_derivative_raises(implementation: str, device: torch.device) -> None:
    q = make_tensor(1, 1, 5, 16, device=device, requires_grad=True)
    out, lse = fastattn.attention(q, q, q, return_lse=True, implementation=implementation)
    (gradient,) = torch.autograd.grad(out.sum() + lse.sum(), q, create_graph=True)
    with pytest.raises(fastattn.NotSupported, match="no second derivative"):
        gradient.sum().backward()


def test_second_derivative_of_the_reference_is_right() -> None:
    q = make_tensor(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda q: fastattn.attention(q, q, q, causal=True, implementation="reference"), (q,)
    )


def test_blockwise_memory_is_linear() -> None:
    """16,384 x 8,192 scores would take 512 MiB in float32; blocks of them exist one at a time."""
    from torch.profiler import ProfilerActivity, profile

    q = torch.randn(1, 1, 16_384, 16)
    k = torch.randn(1, 1, 8_192, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fastattn.attention(q, k, k, causal="bottom_right", return_lse=True, implementation="torch")
    largest = max(
        event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    assert 0 < largest <= 64 * 2**20


def test_reads_grouped_heads_without_repeating_them() -> None:
    q, k = torch.randn(1, 8, 64, 16), torch.randn(1, 2, 64, 16)
    expected = fastattn.attention(
        q, k.repeat_interleave(4, 1), k.repeat_interleave(4, 1), implementation="torch"
    )
    torch.testing.assert_close(fastattn.attention(q, k, k, implementation="torch"), expected)


Q = torch.randn(2, 4, 5, 16)
BAD_INPUTS = {
    "not-a-tensor": (dict(q=[1.0]), TypeError, r"q must be a torch.Tensor, not list"),
    "integers": (dict(q=Q.long()), TypeError, r"q has dtype=torch.int64; a floating-point dtype"),
    "rank": (dict(q=Q[0]), ValueError, r"q, k and v have 3, 4 and 4 dimensions"),
    "batch": (dict(k=Q[:1], v=Q[:1]), ValueError, r"k has batch=1, but q has batch=2"),
    "heads": (dict(k=Q[:, :3], v=Q[:, :3]), ValueError, r"heads=4 must be a multiple of k's heads=3"),
    "no-heads": (dict(k=Q[:, :0], v=Q[:, :0]), ValueError, r"heads=4 must be a multiple of k's heads=0"),
    "head-dim": (dict(k=Q[..., :8], v=Q[..., :8]), ValueError, r"k has head_dim=8, but q has head_dim=16"),
    "lengths": (dict(v=Q[:, :, :3]), ValueError, r"k has shape \(2, 4, 5, 16\) and v \(2, 4, 3, 16\)"),
    "dtypes": (
        dict(k=Q.double()),
        TypeError,
        r"one dtype, not torch.float32, torch.float64 and torch.float32",
    ),
    "devices": (dict(k=Q.to("meta")), ValueError, r"k is on meta, but q is on cpu"),
    "causal": (dict(causal="left"), ValueError, r"causal='left' must be False, True, 'top_left' or"),
    "ambiguous": (dict(q=Q[:, :, :2], causal=True), ValueError, r"ambiguous with seq_q=2 and seq_k=5"),
    "implementation": (
        dict(implementation="foo"),
        ValueError,
        r"'foo' is unknown; fastattn.attention has 'triton'",
    ),
}


@pytest.mark.parametrize("change, error, message", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_names_the_value(change: dict, error: type[Exception], message: str) -> None:
    arguments = dict(q=Q, k=Q, v=Q) | change
    with pytest.raises(error, match=message):
        fastattn.attention(**arguments)


def test_head_dim_above_the_limit_goes_to_pytorch(device: torch.device) -> None:
    for head_dim, needs_gradient, reason in (
        (520, False, "head_dim=520 is above 512"),
        (320, True, "head_dim=320 is above 256, the most with gradients"),
    ):
        q = make_tensor(1, 1, 4, head_dim, device=device, requires_grad=needs_gradient)
        explanation = fastattn.explain(q, q, q)
        assert explanation.implementation == "torch"
        assert explanation.refusals["triton"] == reason
        torch.testing.assert_close(fastattn.attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
        with pytest.raises(fastattn.NotSupported, match=f"implementation='triton': {reason}"):
            fastattn.attention(q, q, q, implementation="triton")
    with torch.no_grad():
        torch.testing.assert_close(
            fastattn.attention(q, q, q, implementation="triton"), F.scaled_dot_product_attention(q, q, q)
        )


@pytest.mark.parametrize("implementation", FAST)
def test_autocast_keeps_statistics_and_products_wide(implementation: str, device: torch.device) -> None:
    """Autocast reaches into what is made of PyTorch operators: lse was 0.1 off, dq 9e-3."""
    wide = [3 * make_tensor(1, 2, 64, 64, seed=seed, device=device) for seed in range(3)]
    narrow = [t.bfloat16().requires_grad_() for t in wide]
    expected = fastattn.attention(*narrow, return_lse=True, implementation=implementation)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = fastattn.attention(*wide, return_lse=True, implementation=implementation)
        inside = torch.autograd.grad(expected[0].sum(), narrow, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    outside = torch.autograd.grad(expected[0].sum(), narrow)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("implementation", FAST)
def test_autocast_refuses_dtypes_that_stay_mixed(implementation: str, device: torch.device) -> None:
    q, k = torch.randn(1, 1, 3, 4, device=device), torch.randn(1, 1, 3, 4, device=device).double()
    with (
        torch.autocast(device.type, dtype=torch.bfloat16),
        pytest.raises(TypeError, match="one dtype after autocast"),
    ):
        fastattn.attention(q, k, k, implementation=implementation)


@pytest.mark.parametrize("implementation", FAST)
def test_a_nan_gradient_of_an_empty_rows_lse_goes_nowhere(implementation: str, device: torch.device) -> None:
    """Merging partial results gives such a row's lse, -inf, the gradient NaN; once it spoiled all of dk."""
    q, k = make_tensor(1, 1, 5, 16, device=device), make_tensor(1, 1, 2, 16, seed=1, device=device)
    leaves = q.requires_grad_(), k.requires_grad_()
    out, lse = fastattn.attention(
        q, k, k, causal="bottom_right", return_lse=True, implementation=implementation
    )
    dlse = torch.zeros_like(lse)
    expected = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), dlse), retain_graph=True)
    dlse[:, :, :3] = math.nan
    found = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), dlse))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_registered_backward_takes_any_strides_of_lse(device: torch.device) -> None:
    q, k, v = (make_tensor(2, 3, 20, 16, seed=seed, device=device) for seed in range(3))
    out, lse = torch.ops.fastattn.attention_forward(q, k, v, 0.25)
    turned = lse.transpose(1, 2).contiguous().transpose(1, 2)
    found, expected = (
        torch.ops.fastattn.attention_backward(out, None, q, k, v, out, given, [True] * 5, 0.25)
        for given in (turned, lse)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_pytorch_would_hold_whole_goes_in_blocks() -> None:
    """A last dimension with a stride is no input for PyTorch's fused operators; also while the compiler traces."""
    q = torch.randn(1, 1, 16, 512).mT
    explained = fastattn.explain(q, q, q, implementation="torch")
    assert (
        "blocks of PyTorch operators in linear memory (PyTorch's operator would hold" in explained.description
    )
    expected = fastattn.reference.attention(q, q, q)
    torch.testing.assert_close(fastattn.attention(q, q, q, implementation="torch"), expected)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda q: fastattn.attention(q, q, q, implementation="torch"), fullgraph=True, backend=backend
    )
    torch.testing.assert_close(compiled(q), expected)
    assert "attention_blockwise_forward" in graphs[0].code


@pytest.mark.parametrize("seq_q", [1, 4, 200])
def test_torch_at_the_bottom_right(seq_q: int) -> None:
    """A single query sees every key, and a few get a mask; many queries go in blocks."""
    seq_k = 400
    q, k = torch.randn(1, 1, seq_q, 8), torch.randn(1, 1, seq_k, 8)
    found = fastattn.attention(q, k, k, causal="bottom_right", implementation="torch")
    torch.testing.assert_close(found, fastattn.reference.attention(q, k, k, causal="bottom_right"))
    description = fastattn.explain(q, k, k, causal="bottom_right", implementation="torch").description
    assert description.startswith("torch.nn" if seq_q * seq_k <= 1 << 16 else "blocks")
