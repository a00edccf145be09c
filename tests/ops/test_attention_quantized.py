"""`fastattn.attention(..., quantize="e4m3")`: its stated error, its options, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn import NotSupported, dispatch, reference
from fastattn.kernels._options import AttentionOptions
from fastattn.testing import make_tensor
from tests.ops.test_attention_features import ALL, BIAS, HEADS, OPTIONS, SEQ_K, SEQ_Q, moved

IMPLEMENTATIONS = ("triton", "torch", "reference")
# Relative, in the mean square, against float64 on the same inputs: what the docstring states. Operands alone, with no
# weight rounded, give 4.5 %.
BOUND = 0.06


def operands(
    device: torch.device,
    seq_q: int = 40,
    seq_k: int = 150,
    width: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((1, 2, seq_q, width), (1, 1, seq_k, width), (1, 1, seq_k, width))
    q, k, v = (make_tensor(*s, dtype=dtype, seed=n, device=device) for n, s in enumerate(shapes))
    return q, k, v


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def errors(given: tuple[Tensor, Tensor, Tensor], implementation: str, **options: Any) -> tuple[float, float]:
    """Of out, relative, and of lse, absolute; both in the mean square, against the formula in float64."""
    call = {**options, "return_lse": True}
    truth, lse_truth = reference.attention(*(t.double() for t in given), **call)
    out, lse = fastattn.attention(*given, **call, quantize="e4m3", implementation=implementation)
    assert out.dtype == given[0].dtype and lse.dtype == torch.float32
    finite = lse_truth.isfinite()
    assert torch.equal(lse[~finite].double(), lse_truth[~finite])
    return relative_error(out, truth), float((lse - lse_truth)[finite].square().mean().sqrt())


def k_with_means(k: Tensor) -> Tensor:
    """Channels whose mean is far from 0, as in the keys of large models (Zhang et al., 2024)."""
    return k + 6 * make_tensor(k.size(-1), dtype=k.dtype, seed=7, device=k.device)


def v_with_a_large_channel(v: Tensor) -> Tensor:
    return v * torch.where(torch.arange(v.size(-1), device=v.device) == 3, 200.0, 1.0).to(v.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "inputs", ["normal", "k-with-means", "v-with-a-large-channel", "queries-of-all-sizes"]
)
def test_stated_error(inputs: str, implementation: str, device: torch.device) -> None:
    q, k, v = operands(device)
    if inputs == "k-with-means":
        k = k_with_means(k)
    elif inputs == "v-with-a-large-channel":
        v = v_with_a_large_channel(v)
    elif (
        inputs == "queries-of-all-sizes"
    ):  # of which one scale for a block of them would leave the smallest nothing
        q = q * torch.logspace(-6, 0, q.size(2), base=10, device=device).to(q.dtype)[:, None]
    error, lse_error = errors((q, k, v), implementation, causal="bottom_right")
    assert error < BOUND and lse_error < 0.05
    if inputs == "v-with-a-large-channel":  # each channel by itself, as the large one hides the others
        truth = reference.attention(q.double(), k.double(), v.double(), causal="bottom_right")
        out = fastattn.attention(
            q, k, v, causal="bottom_right", quantize="e4m3", implementation=implementation
        )
        assert all(relative_error(out[..., c], truth[..., c]) < 1.5 * BOUND for c in range(v.size(-1)))


@pytest.mark.parametrize("size, bounds", [(2, (0.08, 0.05)), (4, (0.12, 0.15)), (8, (0.16, 0.4))])
def test_stated_error_of_larger_scores(size: int, bounds: tuple[float, float], device: torch.device) -> None:
    """It grows with them, as the docstring says: the bound of scores of deviation 1 is theirs alone."""
    q, k, v = operands(device, seq_k=600)
    error, lse_error = errors((q * size, k, v), "torch")
    assert BOUND < error < bounds[0] and lse_error < bounds[1]


def test_naive_rounding_has_twice_the_error(device: torch.device) -> None:
    """One scale a tensor and no mean subtracted, on the same inputs: what the mean and the scales are for."""
    q, k, v = operands(device)
    k = k_with_means(k)
    truth = reference.attention(q.double(), k.double(), v.double())
    naive = []
    for tensor in (q, k, v):
        scale = tensor.abs().amax().float() / 448
        naive.append((tensor.float() / scale).to(torch.float8_e4m3fn).float() * scale)
    ours = fastattn.attention(q, k, v, quantize="e4m3", implementation="torch")
    assert relative_error(reference.attention(*naive), truth) > 2 * relative_error(ours, truth)


COVERED = {
    name: {key: value for key, value in options.items() if key != "dropout_p"}
    for name, options in ALL.items()
    if name not in ("dropout", "deterministic", "t5")
}


@pytest.mark.parametrize("name", COVERED)
def test_every_option_goes_with_it(name: str, device: torch.device) -> None:
    """All three implementations round the same operands; only the kernels round the weights, and lse has none."""
    shapes = ((2, HEADS, SEQ_Q, 40), (2, 1, SEQ_K, 40), (2, 1, SEQ_K, 24))
    q, k, v = (make_tensor(*s, seed=n, device=device) for n, s in enumerate(shapes))
    k, options = k_with_means(k), moved(COVERED[name], device)
    call = {**options, "quantize": "e4m3", "return_lse": True}
    (out, lse), (torch_out, torch_lse), (naive_out, naive_lse) = (
        fastattn.attention(q, k, v, **call, implementation=implementation)
        for implementation in IMPLEMENTATIONS
    )
    torch.testing.assert_close(torch_lse, lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(naive_lse, lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(naive_out, torch_out, atol=1e-4, rtol=1e-4)
    assert relative_error(out, torch_out.double()) < 0.03
    exact = reference.attention(q.double(), k.double(), v.double(), **_wide(options))
    assert isinstance(exact, Tensor) and relative_error(out, exact) < 1.5 * BOUND  # few keys average little


def _wide(options: dict[str, Any]) -> dict[str, Any]:
    dropped = ("deterministic",)
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in options.items()
        if key not in dropped
    }


@pytest.mark.parametrize("width", [1, 63, 80, 128, 192, 256])
def test_head_dims(width: int, device: torch.device) -> None:
    q, k, v = operands(device, 5, 67, width)
    assert errors((q, k, v[..., : max(1, width // 2)]), "triton")[0] < 1.5 * BOUND


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
@pytest.mark.parametrize("seq_q, seq_k", [(1, 1), (1, 127), (63, 1), (33, 65)])
def test_sizes_and_dtypes(seq_q: int, seq_k: int, dtype: torch.dtype, device: torch.device) -> None:
    given = operands(device, seq_q, seq_k, 32, dtype)
    error, _ = errors(given, "triton", causal="bottom_right")
    # A single key is its head's mean, and a channel's largest value: neither loses anything.
    assert error < (BOUND if seq_k > 1 else 0.005)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty(implementation: str, device: torch.device) -> None:
    for seq_q, seq_k in ((0, 5), (4, 0)):
        q, k, v = operands(device, seq_q, seq_k, 16)
        call = {"quantize": "e4m3", "return_lse": True, "implementation": implementation}
        out, lse = fastattn.attention(q, k, v, **call)
        assert out.shape == q.shape and not out.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_hidden_keys_leak_nothing(implementation: str, device: torch.device) -> None:
    """NaN and huge numbers behind key_lengths leave every bit as it was."""
    q, k, v = operands(device, 9, 50, 32)
    call = {
        "quantize": "e4m3",
        "key_lengths": torch.tensor([37], device=device),
        "implementation": implementation,
    }
    clean = fastattn.attention(q, k, v, **call)
    k[:, :, 37:], v[:, :, 37:] = 1e30, math.nan
    assert torch.equal(fastattn.attention(q, k, v, **call), clean)


def test_nan_reaches_what_it_belongs_to_alone(device: torch.device) -> None:
    """In a query, its row; in a key of the second tile, under a causal mask, the rows from its tile of queries on."""
    q, k, v = operands(device, 70, 70, 32)
    q[0, 1, 3, 5], k[0, 0, 66, 2] = math.nan, math.inf
    out = fastattn.attention(q, k, v, causal=True, quantize="e4m3", implementation="triton")
    rows = out.isnan().all(-1)
    assert rows[0, 1, 3] and rows[0, :, 66:].all() and int(rows[0, :, :64].sum()) == 1
    assert out[0, :, :64].isnan().sum() == 32


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_layout_follows_q_and_two_runs_are_equal(implementation: str, device: torch.device) -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands(device, 33, 40, 16))
    first, second = (
        fastattn.attention(q, k, v, quantize="e4m3", implementation=implementation) for _ in range(2)
    )
    assert torch.equal(first, second)
    if implementation == "triton":
        assert first.stride() == q.stride()


def test_a_gradient_is_refused_and_not_wrong(device: torch.device) -> None:
    q, k, v = operands(device, 4, 4, 16)
    for implementation in (None, *IMPLEMENTATIONS):
        with pytest.raises(NotSupported, match=r"has no gradient: call it within torch.no_grad\(\)"):
            fastattn.attention(q, k.requires_grad_(), v, quantize="e4m3", implementation=implementation)
    with pytest.raises(NotSupported, match="no gradient"):
        sinks = torch.zeros(2, device=device, requires_grad=True)
        fastattn.attention(q, k.detach(), v, sinks=sinks, quantize="e4m3")
    with torch.no_grad():
        assert not fastattn.attention(q, k, v, quantize="e4m3").requires_grad
    with pytest.raises(NotSupported, match="no gradient"):
        torch.func.grad(lambda q: fastattn.attention(q, k.detach(), v, quantize="e4m3").sum())(q)
    for transform in (lambda f: torch.func.vmap(f)(q[None]), lambda f: torch.func.jvp(f, (q,), (q,))):
        with pytest.raises(NotSupported, match="no derivative and no rule for vmap"):
            transform(lambda q: fastattn.attention(q, k.detach(), v, quantize="e4m3"))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(quantize="int8"), ValueError, r"quantize='int8' must be None or 'e4m3'"),
        (dict(quantize=8), ValueError, r"quantize=8 must be None or 'e4m3'"),
        (dict(quantize="e4m3", dropout_p=0.1), NotSupported, r"dropout_p=0.1 must be 0 with quantize='e4m3'"),
    ],
    ids=["format", "number", "dropout"],
)
def test_refused_arguments(
    options: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        fastattn.attention(*operands(device, 4, 4, 16), **options)


def test_operands_in_8_bits_are_refused_by_name(device: torch.device) -> None:
    """A cache that was rounded once and kept: without its scales its numbers are not those of the keys."""
    q, k, v = operands(device, 4, 4, 16)
    low = [t.to(torch.float8_e4m3fn) for t in (q, k, v)]
    reason = "has dtype=torch.float8_e4m3fn; quantize='e4m3' makes its own operands of 16 or 32 bits"
    for implementation in (None, *IMPLEMENTATIONS):
        for given, name in (((q, *low[1:]), "k"), ((q, k, low[2]), "v"), (low, "q")):
            with pytest.raises(NotSupported, match=f"{name} {reason}"):
                fastattn.attention(*given, quantize="e4m3", implementation=implementation)
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(NotSupported, match=f"k {reason}"):
        fastattn.attention(q, *low[1:], quantize="e4m3")
    starts = torch.tensor([0, 4], device=device)
    rows = [t[0].transpose(0, 1) for t in (q, *low[1:])]
    with pytest.raises(NotSupported, match=f"k {reason}"):
        fastattn.attention_varlen(*rows, starts, starts, quantize="e4m3")


def test_wider_heads_and_dtypes_are_refused_by_name(device: torch.device) -> None:
    with pytest.raises(
        TypeError, match=r"dtype=torch.float64; quantize='e4m3' takes float16, bfloat16 or float32"
    ):
        fastattn.attention(*operands(device, 4, 4, 16, torch.float64), quantize="e4m3")
    wide = operands(device, 4, 4, 272)
    with pytest.raises(NotSupported, match="head_dim=272 is above 256, the most with quantize='e4m3'"):
        fastattn.attention(*wide, quantize="e4m3", implementation="triton")
    assert errors(wide, "torch")[0] < 1.5 * BOUND


@pytest.mark.parametrize(
    "capability, hip, reason",
    [
        ((8, 9), None, None),
        ((9, 0), None, None),
        ((12, 0), None, None),
        ((8, 0), None, r"compute capability (8, 0) is below (8, 9), the least with products of e4m3"),
        ((9, 4), "6.2", "AMD's 8-bit products on gfx942 take float8_e4m3fnuz, another format than e4m3"),
    ],
    ids=["sm_89", "sm_90", "sm_120", "sm_80", "gfx942"],
)
def test_gpus_without_it_are_refused_by_name(
    capability: tuple[int, int], hip: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that only claim to be on a GPU; the plain call takes all of these."""
    monkeypatch.setattr(dispatch, "_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode(), monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        q = torch.empty(1, 1, 4, 64, device="cuda:0", dtype=torch.bfloat16)
        arguments = fastattn.ops.attention._pack(q, q, q, *[None] * 0, **_PLAIN)
        assert fastattn.ops._attention_triton.refuse_triton_attention(*arguments) == reason


_PLAIN: dict[str, Any] = dict(
    causal=False, window=None, scale=None, bias=None, mask=None, softcap=None, alibi_slopes=None, sinks=None,
    dropout_p=0, key_lengths=None, deterministic=False, quantize="e4m3", return_lse=False,
)  # fmt: skip


def test_explain_names_what_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(device, 4, 4, 16)
    found = fastattn.explain(q, k, v, quantize="e4m3")
    assert found.implementation == "triton" and "e4m3 products" in found.description
    found = fastattn.explain(q, k, v, quantize="e4m3", implementation="torch")
    assert "rounded to e4m3 and back" in found.description
    if device.type == "cpu":
        monkeypatch.setattr(dispatch, "interpreter_rounds_e4m3", False)
        reason = fastattn.explain(q, k, v, quantize="e4m3").refusals["triton"]
        assert reason == "Triton's interpreter cuts digits off where it should round to e4m3"


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_compiles_whole_with_dynamic_shapes(implementation: str, device: torch.device) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fastattn.attention(
            q,
            k,
            v,
            causal="bottom_right",
            softcap=3.0,
            return_lse=True,
            quantize="e4m3",
            implementation=implementation,
        )

    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=frames)
    for length in (17, 21):
        given = operands(device, length, length + 5, 16)
        torch.testing.assert_close(compiled(*given), attend(*given), atol=1e-2, rtol=1e-2)
    assert frames.frame_count == 1


def test_plain_torch_path_compiles_whole(device: torch.device) -> None:
    given = operands(device, 17, 22, 16)
    compiled = torch.compile(
        lambda *t: fastattn.attention(*t, quantize="e4m3", implementation="torch"),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = fastattn.attention(*given, quantize="e4m3", implementation="torch")
    torch.testing.assert_close(compiled(*given), expected, atol=1e-2, rtol=1e-2)


class Quantized(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = fastattn.attention(q, k, v, quantize="e4m3", implementation="triton")
        return out


def test_export(device: torch.device) -> None:
    """The exported program has one operator for the call, and takes other lengths."""
    given, others = operands(device, 17, 22, 16), operands(device, 9, 13, 16)
    rows, keys = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("keys", min=2, max=64)
    program = torch.export.export(
        Quantized(), given, dynamic_shapes=({2: rows}, {2: keys}, {2: keys})
    ).module()
    for call in (given, others):
        assert torch.equal(program(*call), Quantized()(*call))


def test_opcheck(device: torch.device) -> None:
    q, k, v = operands(device, 20, 23, 16)
    bias = BIAS.to(device)[..., :1].expand(1, 2, SEQ_Q, 1)[:, :, :1]
    for options in (
        AttentionOptions(0.25),
        AttentionOptions(0.25, 5, 0, True, 2.0, bias=bias, sinks=make_tensor(2, device=device)),
    ):
        torch.library.opcheck(torch.ops.fastattn.attention_e4m3_forward.default, (q, k, v, *options))


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_autocast(implementation: str, device: torch.device) -> None:
    """As without: q, k and v take autocast's dtype, then they are rounded."""
    q, k, v = operands(device, 9, 12, 16, torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = fastattn.attention(q, k, v, quantize="e4m3", implementation=implementation)
    low = fastattn.attention(
        *(t.bfloat16() for t in (q, k, v)), quantize="e4m3", implementation=implementation
    )
    assert out.dtype == torch.bfloat16 and torch.equal(out, low)


def test_options_are_those_of_the_plain_call() -> None:
    """What the tests above cover is every option but dropout, which is refused."""
    covered = {key for options in OPTIONS.values() for key in options}
    asked = set(_PLAIN) - {"quantize", "return_lse"}
    assert covered == asked


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_real_sizes(causal: bool, width: int, device: torch.device) -> None:
    """16k keys, where an accumulator of few bits would show."""
    shapes = ((1, 8, 1024, width), (1, 2, 16384, width), (1, 2, 16384, width))
    q, k, v = (make_tensor(*s, dtype=torch.bfloat16, seed=n, device=device) for n, s in enumerate(shapes))
    mask: Any = "bottom_right" if causal else False
    for keys in (k, k_with_means(k)):
        truth = fastattn.attention(q.float(), keys.float(), v.float(), causal=mask)
        out = fastattn.attention(q, keys, v, causal=mask, quantize="e4m3", implementation="triton")
        assert relative_error(out, truth.double()) < BOUND
