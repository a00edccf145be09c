"""`fastattn.attention` with its options in what traces, recomputes, casts or transforms a call, and its memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import reference
from fastattn.kernels._options import AttentionOptions
from fastattn.testing import make_tensor
from tests.attention_options import Case, make_inputs, make_options
from tests.ops.test_attention_features import (
    ALL,
    BIAS,
    IMPLEMENTATIONS,
    OPTIONS,
    moved,
    operands,
    results,
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_under_checkpoint(use_reentrant: bool, implementation: str, device: torch.device) -> None:
    """The recomputation draws the same mask, and so the same gradient, because the seed is PyTorch's generator's."""
    given = operands(device, batch=1)
    q = given.pop("q").requires_grad_()

    def attend(q: Tensor) -> Tensor:
        return fastattn.attention(q, **given, dropout_p=0.4, implementation=implementation)

    torch.manual_seed(1)
    out = attend(q)
    (expected,) = torch.autograd.grad(out.square().sum(), q)
    torch.manual_seed(1)
    again = checkpoint(attend, q, use_reentrant=use_reentrant)
    torch.rand(3)  # what is drawn in between changes nothing
    again.square().sum().backward()
    assert torch.equal(out, again) and torch.equal(q.grad, expected)
    assert not torch.equal(out, attend(q))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_under_compile(implementation: str, device: torch.device) -> None:
    """Forward and backward of one compiled call see one mask: out is linear in v, so <dout, out> = <dv, v>."""
    given = operands(device, batch=1)
    v = given.pop("v").requires_grad_()
    compiled = torch.compile(
        lambda v: fastattn.attention(given["q"], given["k"], v, dropout_p=0.4, implementation=implementation),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.manual_seed(1)
    out = compiled(v)
    torch.manual_seed(1)
    assert torch.equal(out, compiled(v))
    torch.manual_seed(2)
    assert not torch.equal(out, compiled(v))
    dout = make_tensor(*out.shape, seed=5, device=device)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close((dout * out).sum(), (dv * v).sum())


class Several(torch.nn.Module):
    """Bias, window, softcap, sinks and lse in one call."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.implementation = implementation

    def forward(self, q: Tensor, k: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.attention(
            q, k, k, causal="top_left", bias=bias, window=(9, None), softcap=2.0, sinks=sinks,
            return_lse=True, implementation=self.implementation,
        )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_compile_whole_with_dynamic_shapes(implementation: str, device: torch.device) -> None:
    frames = CompileCounterWithBackend("aot_eager")
    module = Several(implementation)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=frames)
    for length in (17, 21):
        shapes = ((1, 1, length, 8), (1, 1, length + 5, 8), (1, 1, 1, length + 5), (1,))
        leaves = [make_tensor(*s, seed=n, device=device).requires_grad_() for n, s in enumerate(shapes)]
        expected, found = module(*leaves), compiled(*leaves)
        torch.testing.assert_close(found, expected)
        gradients = [
            torch.autograd.grad(o.square().sum() + lse.sum(), leaves) for o, lse in (expected, found)
        ]
        torch.testing.assert_close(*gradients)
    assert frames.frame_count == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_everything_compiles_whole(implementation: str, device: torch.device) -> None:
    """Every option in one call, tensors and all; compiled, it draws the same dropout."""
    given = operands(device, v_dim=12) | moved(ALL["everything"], device) | dict(deterministic=True)
    attend = partial(fastattn.attention, implementation=implementation)
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=frames)
    torch.manual_seed(1)
    expected = results(attend, given)
    torch.manual_seed(1)
    torch.testing.assert_close(results(compiled, given), expected)
    assert frames.frame_count == 1


class WithBuffer(torch.nn.Module):
    """One option as a buffer, whose sizes the compiler takes for constants where it takes the inputs' for symbols."""

    def __init__(self, name: str, value: Tensor) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("value", value)

    def forward(self, q: Tensor) -> Tensor:
        return fastattn.attention(q, q, q, **{self.name: self.value}, implementation="torch")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("alibi_slopes", (2,)),
        ("alibi_slopes", (1, 2)),
        ("alibi_slopes", (3, 2)),
        ("sinks", (2,)),
        ("bias", (2, 1, 1)),
    ],
    ids=str,
)
def test_options_may_be_buffers_of_a_compiled_module(name: str, shape: tuple[int, ...]) -> None:
    """ALiBi's slopes are one in most models; looked for in a tuple of shapes, theirs broke the graph."""
    module = WithBuffer(name, make_tensor(*shape, seed=1).abs())
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for length in (9, 12):
        q = make_tensor(3, 2, length, 8)
        torch.testing.assert_close(compiled(q), module(q))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["attention", "attention_blockwise"])
def test_opcheck_with_everything(kind: str, packed: bool, device: torch.device) -> None:
    """Every argument that the operators have, none of them at its default."""
    case = Case(
        heads=1, kv_heads=1, seq_q=3, seq_k=11, v_dim=12, causal="bottom_right", window=(9, 0), softcap=2.0, bias="qk",
        mask="bk", alibi="bh", sinks=True, lengths=True, dropout_p=0.4, packed=packed,
    )  # fmt: skip
    inputs = make_inputs(case, device)
    for name in ("k", "v"):  # without the NaN of keys that no query sees
        inputs[name] = inputs[name].nan_to_num(1.0, 1.0)
    options = make_options(case, inputs)._replace(deterministic=True)
    unset = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    given = {n: getattr(options, n) for n in AttentionOptions._field_defaults}
    kept = {n for n, value in given.items() if value is None or value == AttentionOptions._field_defaults[n]}
    assert kept == (set() if packed else unset)
    q, k, v = (inputs[name] for name in "qkv")
    forward = getattr(torch.ops.fastattn, f"{kind}_forward").default
    backward = getattr(torch.ops.fastattn, f"{kind}_backward").default
    torch.library.opcheck(forward, (q, k, v, *options))
    out, lse = forward(q, k, v, *options)
    torch.library.opcheck(backward, (inputs["dout"], inputs["dlse"], q, k, v, out, lse, [True] * 5, *options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_export(implementation: str, device: torch.device) -> None:
    """The exported program has one operator for the call, and takes other lengths."""
    shapes = ((1, 1, 17, 8), (1, 1, 22, 8), (1, 1, 1, 22), (1,))
    given = tuple(make_tensor(*s, seed=n, device=device) for n, s in enumerate(shapes))
    rows, keys = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("keys", min=2, max=64)
    dynamic = ({2: rows}, {2: keys}, {3: keys}, None)
    module = Several(implementation)
    with torch.no_grad():
        program = torch.export.export(module, given, dynamic_shapes=dynamic).module()
    others = (given[0][:, :, :9], given[1][:, :, :13], given[2][..., :13], given[3])
    for call in (given, others):
        torch.testing.assert_close(program(*call), module(*call))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_with_a_bias(bias_dtype: torch.dtype, implementation: str, device: torch.device) -> None:
    """q, k and v are cast; bias and sinks stay as they are, and their gradients with them."""
    given = operands(device, batch=1) | dict(
        bias=BIAS.to(device, bias_dtype), sinks=torch.tensor([0.5, 1.0], device=device)
    )
    wide = operands(device, batch=1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = results(lambda **g: fastattn.attention(**g, implementation=implementation), given)
    assert found["out"].dtype == torch.bfloat16 and found["lse"].dtype == torch.float32
    for name, tensor in given.items():
        assert found[f"d{name}"].dtype == tensor.dtype
    narrow = {name: tensor.bfloat16() for name, tensor in wide.items()}
    expected = results(lambda **g: fastattn.attention(**g, implementation=implementation), given | narrow)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", [10, 3])
def test_two_partial_results_merge(cut: int, implementation: str, device: torch.device) -> None:
    """By the natural-logarithm lse of each half of the keys, values and gradients are the whole's.

    Key lengths of 0 and 6 leave rows without keys in one half or in both.
    """

    def merged(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, implementation: str) -> Tensor:
        parts = []
        for keys in (slice(0, cut), slice(cut, None)):
            lengths = torch.tensor([6, 14], device=q.device) - keys.start
            length = k[:, :, keys].size(2)
            parts.append(
                fastattn.attention(
                    q, k[:, :, keys], v[:, :, keys], bias=bias[..., keys], softcap=3.0,
                    key_lengths=lengths.clamp(0, length), return_lse=True, implementation=implementation,
                )
            )  # fmt: skip
        (out, lse), (out_b, lse_b) = parts
        # contracts.md's formula; sigmoid(-inf - finite) is 0 and its gradient as well.
        return out - torch.sigmoid(lse_b - lse).unsqueeze(-1) * (out - out_b)

    def whole(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, implementation: str) -> Tensor:
        return fastattn.attention(
            q, k, v, bias=bias, softcap=3.0, key_lengths=torch.tensor([6, 14], device=q.device),
            implementation=implementation,
        )  # fmt: skip

    q, k, v = operands(device, seq_k=17).values()
    bias = make_tensor(1, 1, 1, 17, seed=4, device=device)
    leaves = [t.detach().requires_grad_() for t in (q[:, :1], k, v, bias)]
    found, expected = (f(*leaves, implementation) for f in (merged, whole))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(o.square().sum(), leaves) for o in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["bias", "sinks", "everything"])
def test_second_derivative_is_refused(name: str, implementation: str, device: torch.device) -> None:
    given = operands(device) | moved(ALL[name], device)
    leaves = [given[n].requires_grad_() for n in ("q", "k", "v")]
    out = fastattn.attention(**given, implementation=implementation)
    gradients = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    # Where PyTorch's own operator serves the call, so does its refusal.
    error, message = fastattn.NotSupported, "no second derivative"
    if implementation == "torch" and name == "bias":
        error, message = RuntimeError, "derivative for aten::_scaled_dot_product"  # type: ignore[assignment]
    for gradient in gradients:
        with pytest.raises(error, match=message):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OPTIONS)
def test_transforms_are_right_or_refused(name: str, implementation: str | None) -> None:
    """Never a gradient that is silently wrong or 0: `torch.func.grad`, also of a learned option, and `vmap`."""
    given = operands() | moved(OPTIONS[name])
    learned = "bias" if "bias" in given else "sinks" if "sinks" in given else "q"

    def loss(function: Any, value: Tensor, **more: Any) -> Tensor:
        return function(**(given | {learned: value}), **more).square().sum()

    def ours(value: Tensor) -> Tensor:
        return loss(fastattn.attention, value, implementation=implementation)

    values = torch.stack([given[learned], 0.5 * given[learned]])
    for transformed in (
        lambda f: torch.func.grad(f)(values[0]),
        lambda f: torch.vmap(f)(values),
        lambda f: torch.vmap(torch.func.grad(f))(values),
    ):
        try:
            found = transformed(ours)
        except fastattn.NotSupported as refusal:
            assert "torch.func transforms" in str(refusal)
            continue
        given.pop("deterministic", None)
        truth = transformed(lambda value: loss(reference.attention, value))
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)


def test_memory_is_linear_with_every_score_option() -> None:
    """8,192 x 8,192 scores would take 256 MiB in float32, each of several times."""
    from torch.profiler import ProfilerActivity, profile

    q, k, v = (make_tensor(1, 1, 8192, 16, seed=seed).requires_grad_() for seed in range(3))
    bias = make_tensor(1, 1, 1, 8192, seed=4).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        out = fastattn.attention(
            q, k, v, causal="top_left", bias=bias, window=(4096, None), softcap=5.0, implementation="torch"
        )
        out.sum().backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert 0 < peak < 48 * 2**20  # 63 with blocks of 2^24 scores
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v, bias))


def test_numbers_may_be_inputs_of_a_compiled_function() -> None:
    """With dynamic shapes the compiler traces a float argument; a check by math.isfinite broke the graph."""

    def attend(q: Tensor, softcap: float, scale: float) -> Tensor:
        return fastattn.attention(q, q, q, softcap=softcap, scale=scale, implementation="torch")

    compiled = torch.compile(attend, fullgraph=True, backend="eager", dynamic=True)
    q = make_tensor(1, 2, 9, 16)
    for softcap, scale in ((5.0, 0.3), (2.0, 0.1)):
        torch.testing.assert_close(compiled(q, softcap, scale), attend(q, softcap, scale))
