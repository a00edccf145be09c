"""fastattn.flash_attn: flash-attn 2.8's signatures, and every form's results and gradients against the formula."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import flash_attn, reference
from fastattn.testing import assert_accurate, make_tensor

FAST = ("triton", "torch")

# Names, order and defaults as in flash_attn/flash_attn_interface.py of flash-attn 2.8; `...` for no default.
_TAIL: dict[str, Any] = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
_STARTS = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), ...)
SIGNATURES: dict[str, dict[str, Any]] = {
    "flash_attn_func": {"q": ..., "k": ..., "v": ..., **_TAIL},
    "flash_attn_kvpacked_func": {"q": ..., "kv": ..., **_TAIL},
    "flash_attn_qkvpacked_func": {"qkv": ..., **_TAIL},
    "flash_attn_varlen_func": {"q": ..., "k": ..., "v": ..., **_STARTS, **_TAIL, "block_table": None},
    "flash_attn_varlen_kvpacked_func": {"q": ..., "kv": ..., **_STARTS, **_TAIL},
    "flash_attn_varlen_qkvpacked_func": {"qkv": ..., "cu_seqlens": ..., "max_seqlen": ..., **_TAIL},
}

# Lengths of packed sequences: more queries than keys, no queries, no keys.
LENGTHS_Q, LENGTHS_K = (9, 0, 4), (5, 7, 0)

# (seq_q, seq_k, batch, arguments); with "slopes" for alibi_slopes their shape.
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "full": (13, 21, 1, {}),
    "scale": (13, 21, 1, {"softmax_scale": 0.4}),
    "causal-more-keys": (9, 14, 1, {"causal": True}),
    "causal-more-queries": (45, 29, 1, {"causal": True}),
    "window": (15, 19, 1, {"window_size": (3, 2)}),
    "window-left": (19, 15, 1, {"window_size": (2, -1)}),
    "window-causal": (15, 19, 1, {"window_size": (4, 9), "causal": True}),
    "softcap": (11, 11, 1, {"softcap": 1.5}),
    "alibi": (11, 16, 1, {"slopes": (2,)}),
    "alibi-of-each-batch": (7, 9, 2, {"slopes": (2, 2), "causal": True}),
    "all": (
        17, 12, 1,
        {
            "causal": True, "window_size": (6, -1), "softcap": 2.0, "slopes": (2,), "softmax_scale": 0.3,
            "deterministic": True,
        },
    ),
}  # fmt: skip


def _arguments(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    given = dict(options)
    if "slopes" in given:
        given["alibi_slopes"] = make_tensor(*given.pop("slopes"), device=device, seed=9).abs() / 4
    return given


def _of_reference(given: dict[str, Any]) -> dict[str, Any]:
    """flash-attn's arguments as those of `fastattn.reference`."""
    return {
        "causal": "bottom_right" if given.get("causal") else False,
        "window": given.get("window_size"),
        "scale": given.get("softmax_scale"),
        "softcap": given.get("softcap"),
        "alibi_slopes": given.get("alibi_slopes"),
    }


def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _operands(shape_q: tuple[int, ...], shape_k: tuple[int, ...], **keywords: Any) -> list[Tensor]:
    """q, k, v and out's gradient; two heads, one of keys, 16 wide."""
    shapes = ((*shape_q, 2, 16), (*shape_k, 1, 16), (*shape_k, 1, 16), (*shape_q, 2, 16))
    return [make_tensor(*shape, seed=seed, **keywords) for seed, shape in enumerate(shapes)]


def _naive(
    operands: list[Tensor], given: dict[str, Any], dtype: torch.dtype, *starts: Tensor
) -> list[Tensor]:
    """out, softmax_lse, dq, dk and dv by the formula in this dtype; the loss is out * dout + lse."""
    q, k, v, dout = (t.detach().to(dtype).requires_grad_() for t in operands)
    options: dict[str, Any] = {**_of_reference(given), "return_lse": True}
    if starts:
        out, lse = reference.attention_varlen(q, k, v, *starts, **options)
    else:
        out, lse = reference.attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)
        out = out.transpose(1, 2)
    return _with_gradients(out, lse, (q, k, v), dout)


def _with_gradients(out: Tensor, lse: Tensor | None, inputs: Any, dout: Tensor) -> list[Tensor]:
    loss = (out * dout).sum()
    if lse is None:
        return [out, *torch.autograd.grad(loss, inputs)]
    loss = loss + torch.where(lse.isfinite(), lse, 0.0).sum()
    return [out, lse, *torch.autograd.grad(loss, inputs)]


def _check(found: list[Tensor], operands: list[Tensor], given: dict[str, Any], *starts: Tensor) -> None:
    dtype = operands[0].dtype
    truth = _naive(operands, given, torch.float64, *starts)
    peer = _naive(operands, given, dtype, *starts)
    peer[1] = _naive(operands, given, torch.promote_types(dtype, torch.float32), *starts)[1]
    unseen = (truth[1] == -math.inf).transpose(-1, -2)
    assert found[0][unseen].eq(0).all() and found[2][unseen].eq(0).all()
    # As in tests/attention_options.py: recomputed weights carry lse's rounding error, and dq and dk are differences of
    # terms as large as dv's.
    lse = truth[1][truth[1].isfinite()]
    recomputed = max(1.0, lse.abs().max().item()) if dtype in (torch.float32, torch.float64) else 1.0
    terms = math.sqrt(max(1.0, truth[1].numel() * operands[1].size(-3) / 64))
    for name, mine, other, true in zip(("out", "lse", "dq", "dk", "dv"), found, peer, truth, strict=True):
        growth = recomputed * terms if name.startswith("d") else 1.0
        scale = truth[4].abs().max().item() if name in ("dq", "dk") else 0.0
        assert_accurate(mine, other, true, name=name, growth=growth, scale=scale)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_flash_attns(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    ours = [(p.name, ... if p.default is inspect.Parameter.empty else p.default) for p in parameters.values()]
    assert ours == list(SIGNATURES[name].items())
    assert set(flash_attn.__all__) == set(SIGNATURES)
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case: str, implementation: str, device: torch.device) -> None:
    seq_q, seq_k, batch, options = CASES[case]
    given = _arguments(options, device)
    operands = _operands((batch, seq_q), (batch, seq_k), device=device)
    q, k, v = (t.detach().requires_grad_() for t in operands[:3])
    with fastattn.use_implementation(implementation):
        out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, **given, return_attn_probs=True)
    assert s_dmask is None and lse.shape == (batch, 2, seq_q) and out.is_contiguous()
    _check(_with_gradients(out, lse, (q, k, v), operands[3]), operands, given)


@pytest.mark.parametrize("case", CASES)
def test_without_attn_probs_and_without_gradients(case: str, device: torch.device) -> None:
    """PyTorch's own operator serves some of these calls."""
    seq_q, seq_k, batch, options = CASES[case]
    given = _arguments(options, device)
    operands = _operands((batch, seq_q), (batch, seq_k), device=device)
    q, k, v = (t.detach().requires_grad_() for t in operands[:3])
    with fastattn.use_implementation("torch"):
        out = flash_attn.flash_attn_func(q, k, v, **given)
        with torch.no_grad():
            plain = flash_attn.flash_attn_func(q, k, v, **given)
    expected, _ = reference.attention(
        *(t.transpose(1, 2) for t in (q, k, v)), **_of_reference(given), return_lse=True
    )
    assert not plain.requires_grad and plain.is_contiguous()
    torch.testing.assert_close(plain, expected.detach().transpose(1, 2))
    torch.testing.assert_close(
        _with_gradients(out, None, (q, k, v), operands[3]),
        _with_gradients(expected.transpose(1, 2), None, (q, k, v), operands[3]),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("implementation", FAST)
def test_any_dtype(implementation: str, dtype: torch.dtype, device: torch.device) -> None:
    operands = _operands((1, 6), (1, 8), dtype=dtype, device=device)
    q, k, v = (t.detach().requires_grad_() for t in operands[:3])
    forced = "torch" if dtype == torch.float64 else implementation
    with fastattn.use_implementation(forced):
        out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    _check(_with_gradients(out, lse, (q, k, v), operands[3]), operands, {"causal": True})


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "window_size": (3, -1), "softcap": 2.0, "slopes": (3, 2), "softmax_scale": 0.3}],
    ids=["full", "all"],
)
def test_varlen(options: dict[str, Any], implementation: str, device: torch.device) -> None:
    """Sequences without queries and without keys are among them."""
    given = _arguments(options, device)
    starts = _offsets(LENGTHS_Q, device), _offsets(LENGTHS_K, device)
    operands = _operands((sum(LENGTHS_Q),), (sum(LENGTHS_K),), device=device)
    q, k, v = (t.detach().requires_grad_() for t in operands[:3])
    longest = max(LENGTHS_Q), max(LENGTHS_K)
    with fastattn.use_implementation(implementation):
        out, lse, s_dmask = flash_attn.flash_attn_varlen_func(
            q, k, v, *starts, *longest, **given, return_attn_probs=True
        )
    with fastattn.use_implementation("torch"), torch.no_grad():
        plain = flash_attn.flash_attn_varlen_func(q, k, v, *starts, *longest, **given)
    assert s_dmask is None and lse.shape == (2, sum(LENGTHS_Q)) and out.is_contiguous()
    torch.testing.assert_close(plain, out.detach())
    _check(_with_gradients(out, lse, (q, k, v), operands[3]), operands, given, *starts)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("packed", ["kv", "qkv"])
def test_packed_forms_equal_the_unpacked(
    packed: str, varlen: bool, implementation: str, device: torch.device
) -> None:
    """Bit for bit, the gradient in the packed tensor's own layout."""
    lengths = (0, 11)
    rows = (11,) if varlen else (1, 11)
    start = _offsets(lengths, device)
    q, k, v = (make_tensor(*rows, 2, 16, device=device, seed=s, requires_grad=True) for s in range(3))
    dout = make_tensor(*rows, 2, 16, device=device, seed=3)
    together = torch.stack((q, k, v) if packed == "qkv" else (k, v), dim=-3).detach().requires_grad_()
    once: tuple[Any, ...] = (start, max(lengths)) if varlen else ()
    twice: tuple[Any, ...] = (start, start, max(lengths), max(lengths)) if varlen else ()
    form = "flash_attn_varlen" if varlen else "flash_attn"
    operands = (together, *once) if packed == "qkv" else (q, together, *twice)
    options = {"causal": True, "window_size": (5, -1), "softcap": 3.0, "return_attn_probs": True}
    with fastattn.use_implementation(implementation):
        expected = getattr(flash_attn, f"{form}_func")(q, k, v, *twice, **options)
        found = getattr(flash_attn, f"{form}_{packed}packed_func")(*operands, **options)
    assert found[0].is_contiguous() and found[0].shape == (*rows, 2, 16) and found[2] is None
    assert found[1].shape == ((2, 11) if varlen else (1, 2, 11))
    gradients = torch.autograd.grad(expected[0], (q, k, v), dout)
    inputs = (together,) if packed == "qkv" else (q, together)
    *dq, gradient = torch.autograd.grad(found[0], inputs, dout)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for mine, other in zip((*dq, *gradient.unbind(-3)), gradients, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("varlen", [False, True])
def test_packed_tensors_are_handed_on_without_a_copy(varlen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.extend((q, k, v))
        assert options["deterministic"] is True
        return q

    monkeypatch.setattr(flash_attn, "attention_varlen" if varlen else "attention", spy)
    if varlen:
        qkv, start = torch.randn(5, 3, 2, 16), torch.tensor([0, 5])
        flash_attn.flash_attn_varlen_qkvpacked_func(qkv, start, 5, deterministic=True)
    else:
        qkv = torch.randn(1, 5, 3, 2, 16)
        flash_attn.flash_attn_qkvpacked_func(qkv, deterministic=True)
    assert [t.data_ptr() - qkv.data_ptr() for t in seen] == [4 * 32 * part for part in range(3)]


def _dropped_weights(varlen: bool, dropout_p: float, seq: int, device: torch.device) -> Tensor:
    """The weights after dropout, (seq, 2 heads, seq): scores are 0, and v lets every weight through."""
    q, v = torch.zeros(1, seq, 2, 16, device=device), torch.eye(seq, device=device)[None, :, None]
    k = q[:, :, :1]
    if not varlen:
        return flash_attn.flash_attn_func(q, k, v, dropout_p)[0]
    start = torch.tensor([0, seq], device=device)
    return flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], start, start, seq, seq, dropout_p)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("varlen", [False, True])
def test_dropout(varlen: bool, implementation: str, device: torch.device) -> None:
    """Also without gradients; the right share of weights, scaled up, and the same for a seed."""
    seq, dropout_p = 45, 0.3
    with fastattn.use_implementation(implementation), torch.no_grad():
        torch.manual_seed(1)
        first = _dropped_weights(varlen, dropout_p, seq, device)
        second = _dropped_weights(varlen, dropout_p, seq, device)
        torch.manual_seed(1)
        again = _dropped_weights(varlen, dropout_p, seq, device)
    assert torch.equal(first, again) and not torch.equal(first, second)
    kept = first > 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / (seq * (1 - dropout_p))))
    # Five standard deviations of a mean over 2 * 45 * 45 draws.
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())
    assert abs(kept.double().mean().item() - (1 - dropout_p)) < 5 * deviation


@pytest.mark.parametrize("implementation", FAST)
def test_dropout_drops_the_same_weights_in_the_backward(implementation: str, device: torch.device) -> None:
    """out is linear in v, so that dv . v is dout . out only with the forward's weights."""
    q, k, v, dout = _operands((1, 20), (1, 20), device=device)
    v.requires_grad_()
    with fastattn.use_implementation(implementation):
        out = flash_attn.flash_attn_func(q, k, v, dropout_p=0.5, causal=True)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close((dv * v).sum(), (dout * out).sum(), rtol=1e-4, atol=1e-4)


def _graphs(frames: CompileCounterWithBackend) -> int:
    """Without the empty one that Dynamo may count when a process first uses it."""
    return sum(any(node.op == "placeholder" for node in graph.graph.nodes) for graph in frames.graphs)


@pytest.mark.parametrize("implementation", FAST)
def test_compiles_whole_with_dynamic_shapes(implementation: str, device: torch.device) -> None:
    frames = CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(12, -1), softcap=5.0)

    compiled = torch.compile(attend, fullgraph=True, backend=frames, dynamic=True)
    for seq_q, seq_k in ((9, 14), (11, 17)):
        operands = _operands((1, seq_q), (1, seq_k), device=device)
        q, k, v = (t.detach().requires_grad_() for t in operands[:3])
        with fastattn.use_implementation(implementation):
            found = compiled(q, k, v)
        with fastattn.use_implementation("torch"):
            expected = attend(q, k, v)
        torch.testing.assert_close(
            _with_gradients(found, None, (q, k, v), operands[3]),
            _with_gradients(expected, None, (q, k, v), operands[3]),
        )
    assert _graphs(frames) == 1


@pytest.mark.parametrize("implementation", FAST)
def test_varlen_compiles_whole_with_dynamic_shapes(implementation: str, device: torch.device) -> None:
    """Self-attention gives one tensor of offsets twice, which Dynamo refuses as inputs of an autograd Function."""
    frames = CompileCounterWithBackend("aot_eager")

    def attend(qkv: Tensor, start: Tensor, longest: int) -> Tensor:
        q, k, v = qkv.unbind(1)
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            q, k, v, start, start, longest, longest, causal=True, return_attn_probs=True
        )
        return out * lse.t()[..., None]

    compiled = torch.compile(attend, fullgraph=True, backend=frames, dynamic=True)
    for lengths in ((4, 7), (9, 3)):
        qkv = make_tensor(sum(lengths), 3, 2, 16, device=device, requires_grad=True)
        arguments = (qkv, _offsets(lengths, device), max(lengths))
        with fastattn.use_implementation(implementation):
            found = compiled(*arguments)
        with fastattn.use_implementation("torch"):
            expected = attend(*arguments)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), qkv),
            torch.autograd.grad(expected.square().sum(), qkv),
        )
    assert _graphs(frames) == 1


def test_a_softcap_of_zero_or_less_is_none() -> None:
    q = make_tensor(1, 6, 2, 16)
    assert torch.equal(flash_attn.flash_attn_func(q, q, q, softcap=-1.0), flash_attn.flash_attn_func(q, q, q))


def test_block_table_is_refused() -> None:
    q, start = torch.randn(5, 2, 16), torch.tensor([0, 5])
    with pytest.raises(fastattn.NotSupported, match="block_table is given: keys and values in pages"):
        flash_attn.flash_attn_varlen_func(q, q, q, start, start, 5, 5, block_table=torch.zeros(1, 1))


_Q, _KV, _START = torch.zeros(1, 6, 2, 16), torch.zeros(6, 2, 2, 16), torch.tensor([0, 6])


@pytest.mark.parametrize(
    ("function", "operands", "options", "message"),
    [
        ("flash_attn_func", (_Q[0], _Q, _Q), {}, r"q has shape \(6, 2, 16\), not \(batch, seq, heads, head_dim\)"),
        ("flash_attn_func", (_Q, _Q[:, :4], _Q), {}, r"k has shape \(1, 4, 2, 16\) and v \(1, 6, 2, 16\)"),
        ("flash_attn_func", (_Q, _Q[..., :8], _Q), {}, "k has head_dim=8, but q has head_dim=16"),
        ("flash_attn_func", (_Q, _Q, _Q), {"causal": "top_left"}, "causal='top_left' must be False or True"),
        ("flash_attn_func", (_Q, _Q, _Q), {"window_size": 4}, "window_size=4 must be"),
        ("flash_attn_func", (_Q, _Q, _Q), {"window_size": (4, None)}, r"window_size=\(4, None\) must be"),
        ("flash_attn_func", (_Q, _Q, _Q), {"softcap": math.nan}, "softcap=nan must be positive"),
        ("flash_attn_func", (_Q, _Q, _Q), {"dropout_p": 1.5}, "dropout_p=1.5 must be"),
        ("flash_attn_func", (_Q, _Q, _Q), {"alibi_slopes": torch.ones(3)}, r"alibi_slopes has shape \(3,\)"),
        ("flash_attn_kvpacked_func", (_Q, _Q), {}, r"kv has shape \(1, 6, 2, 16\), not \(batch, seq, 2, kv_h"),
        ("flash_attn_qkvpacked_func", (_Q[:, :, None],), {}, r"qkv has shape \(1, 6, 1, 2, 16\), not \(batch, "),
        ("flash_attn_varlen_func", (_Q, _Q, _Q, _START, _START, 6, 6), {}, r"q has shape .*, not \(total, heads, h"),
        ("flash_attn_varlen_qkvpacked_func", (_Q, _START, 6), {}, r"qkv has shape .*, not \(total, 3, heads, "),
        ("flash_attn_varlen_kvpacked_func", (_Q[0], _KV, _START, _START, 6, 3), {}, "6 rows, above max_seqlen=3"),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    function: str, operands: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(flash_attn, function)(*operands, **options)


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"q must be a torch\.Tensor, not list"):
        flash_attn.flash_attn_func([1.0], _Q, _Q)


def test_slopes_that_want_a_gradient_are_refused() -> None:
    with pytest.raises(fastattn.NotSupported, match="alibi_slopes has no gradient"):
        flash_attn.flash_attn_func(_Q, _Q, _Q, alibi_slopes=torch.ones(2, requires_grad=True))
