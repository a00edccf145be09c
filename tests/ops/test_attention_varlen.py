"""`fastattn.attention_varlen`: packed sequences by every implementation, held against each sequence by itself."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import reference
from fastattn.kernels._options import AttentionOptions
from fastattn.testing import assert_accurate, make_tensor

IMPLEMENTATIONS = ("triton", "torch")
LEARNED = ("q", "k", "v", "bias", "sinks")
HEADS, KV_HEADS, WIDTH, V_DIM = 2, 1, 8, 8
# Sequences with more queries than keys, no queries, fewer, and no keys.
LENGTHS_Q, LENGTHS_K = (5, 0, 19, 3), (2, 4, 33, 0)
SEQUENCES, MAX_Q, MAX_K = len(LENGTHS_Q), max(LENGTHS_Q), max(LENGTHS_K)


def offsets(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=dtype)


def operands(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    v_dim: int = V_DIM,
    kv_heads: int = KV_HEADS,
    lengths_q: tuple[int, ...] = LENGTHS_Q,
    lengths_k: tuple[int, ...] = LENGTHS_K,
) -> dict[str, Any]:
    shapes = dict(
        q=(sum(lengths_q), HEADS, WIDTH),
        k=(sum(lengths_k), kv_heads, WIDTH),
        v=(sum(lengths_k), kv_heads, v_dim),
    )
    found: dict[str, Any] = {
        name: make_tensor(*shape, dtype=dtype, seed=seed, device=device)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return found | dict(
        cu_seqlens_q=offsets(lengths_q).to(device), cu_seqlens_k=offsets(lengths_k).to(device)
    )


def results(function: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """out, lse, and the gradients through both; a row without keys has an lse without a gradient."""
    given = dict(given)
    wanted = [name for name in LEARNED if given.get(name) is not None]
    for name in wanted:
        given[name] = given[name].detach().requires_grad_()
    out, lse = function(**given, return_lse=True)
    dout = make_tensor(*out.shape, seed=20, device=out.device).to(out.dtype)
    dlse = make_tensor(*lse.shape, seed=21, device=out.device).to(lse.dtype)
    dlse = dlse.masked_fill(lse == -math.inf, 0.0)
    gradients = torch.autograd.grad((out, lse), [given[name] for name in wanted], (dout, dlse))
    return {"out": out, "lse": lse, **{f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}}


def check(given: dict[str, Any], implementation: str, **own: Any) -> dict[str, Tensor]:
    """`own` are the arguments that the reference has no need of."""
    dtype = given["q"].dtype
    exact = {
        n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()
    }
    truth = results(reference.attention_varlen, exact)
    peer = results(reference.attention_varlen, given)
    found = results(lambda **g: fastattn.attention_varlen(**g, **own, implementation=implementation), given)
    lse = truth["lse"][truth["lse"].isfinite()]
    recomputed = max(1.0, lse.abs().max().item()) if lse.numel() and dtype == torch.float32 else 1.0
    scale = truth["dv"].abs().max().item() if truth["dv"].numel() else 0.0
    assert found["lse"].shape == (HEADS, given["q"].size(0)) and found["lse"].dtype == torch.float32
    for name, actual in found.items():
        gradient = name not in ("out", "lse")
        assert_accurate(
            actual,
            peer[name],
            truth[name],
            name=name,
            growth=5 * recomputed if gradient else 1.0,
            scale=scale if gradient else 0.0,
        )
    return found


BIAS = make_tensor(SEQUENCES, HEADS, MAX_Q, MAX_K, seed=6)
BIAS[2, :, 3] = -math.inf
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-left": dict(causal="top_left"),
    "bottom-right": dict(causal="bottom_right"),
    "window": dict(window=(9, 5)),
    "window-causal": dict(window=(4, None), causal="bottom_right"),
    "window-top-left": dict(window=(4, 0), causal="top_left"),
    "bias": dict(bias=BIAS),
    "bias-of-keys": dict(bias=make_tensor(SEQUENCES, 1, 1, MAX_K, seed=7)),
    "bias-of-heads": dict(bias=make_tensor(1, HEADS, MAX_Q, MAX_K, seed=7)),
    "mask": dict(mask=make_tensor(SEQUENCES, 1, MAX_Q, MAX_K, seed=8) > -0.3),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0])),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.125])),
    "alibi-of-sequences": dict(alibi_slopes=make_tensor(SEQUENCES, HEADS, seed=9).abs() / 8),
    "key-lengths": dict(key_lengths=torch.tensor([1, 4, 20, 0])),
    "scale": dict(scale=-0.4),
}
OPTIONS["everything"] = dict(
    causal="bottom_right",
    **{n: v for name in ("bias", "mask", "sinks", "softcap", "alibi", "key-lengths") for n, v in OPTIONS[name].items()},
    window=(20, None),
)  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients(name: str, implementation: str, device: torch.device) -> None:
    options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in OPTIONS[name].items()}
    found = check(operands(device) | options, implementation, max_seqlen_q=MAX_Q, max_seqlen_k=MAX_K)
    # The queries of sequence 3 have no keys.
    rows = slice(sum(LENGTHS_Q[:3]), sum(LENGTHS_Q[:4]))
    assert not found["out"][rows].any() and not found["dq"][rows].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sizes", [dict(v_dim=12), dict(v_dim=4, kv_heads=2), dict(lengths_q=(0, 0), lengths_k=(3, 0))], ids=str
)
def test_sizes(sizes: dict[str, Any], implementation: str, device: torch.device) -> None:
    """Values of their own width, as many heads as queries, and no queries at all; without the longest lengths."""
    check(operands(device, **sizes), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_causal_with_one_tensor_of_offsets(
    dtype: torch.dtype, implementation: str, device: torch.device
) -> None:
    """Then both alignments agree; offsets may be int64, and lie between others."""
    lengths = (7, 0, 20, 1)
    given = operands(device, lengths_q=lengths, lengths_k=lengths)
    starts = torch.stack([offsets(lengths, dtype)] * 2, dim=1).to(device)[:, 0]
    given["cu_seqlens_q"] = given["cu_seqlens_k"] = starts
    found = check(given | dict(causal="top_left"), implementation)
    again = results(
        lambda **g: fastattn.attention_varlen(**g, causal=True, implementation=implementation), given
    )
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_in_no_sequence(implementation: str, device: torch.device) -> None:
    """Those after the last offset: out 0, lse -inf, no gradient."""
    given = operands(device)
    given["cu_seqlens_q"] = given["cu_seqlens_q"] - torch.tensor([0, 0, 0, 0, 3], device=device).int()
    given["cu_seqlens_k"] = given["cu_seqlens_k"] - torch.tensor([0, 0, 0, 9, 9], device=device).int()
    found = check(given, implementation)
    assert not found["out"][-3:].any() and (found["lse"][:, -3:] == -math.inf).all()
    assert not found["dq"][-3:].any() and not found["dk"][-9:].any() and not found["dv"][-9:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layouts(implementation: str, device: torch.device) -> None:
    """q, k and v as slices of one packed projection."""
    lengths = (5, 14)
    packed = make_tensor(19, 3, HEADS, WIDTH, device=device)
    given = dict(zip("qkv", packed.unbind(1), strict=True))
    starts = offsets(lengths).to(device)
    check(given | dict(cu_seqlens_q=starts, cu_seqlens_k=starts), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout(implementation: str, device: torch.device) -> None:
    """Reproducible; out is linear in v with the mask of the forward, so that <dout, out> = <dv, v>."""
    given = operands(device)
    given["v"].requires_grad_()

    def attend(p: float, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return fastattn.attention_varlen(**given, dropout_p=p, implementation=implementation)

    out = attend(0.4, 1)
    assert torch.equal(out, attend(0.4, 1)) and not torch.equal(out, attend(0.4, 2))
    assert not torch.equal(out, attend(0.0, 1)) and not attend(1.0, 1).any()
    dout = make_tensor(*out.shape, seed=5, device=device)
    (dv,) = torch.autograd.grad(out, given["v"], dout)
    torch.testing.assert_close((dout * out).sum(), (dv * given["v"]).sum())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation: str, device: torch.device) -> None:
    given = operands(device)
    narrow = {n: t.bfloat16() if t.is_floating_point() else t for n, t in given.items()}
    expected = fastattn.attention_varlen(**narrow, implementation=implementation)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = fastattn.attention_varlen(**given, implementation=implementation)
    assert torch.equal(found, expected)


def test_without_asking_for_an_implementation(device: torch.device) -> None:
    given = operands(device)
    out = fastattn.attention_varlen(**given)
    torch.testing.assert_close(out, fastattn.attention_varlen(**given, implementation="reference"))
    explained = fastattn.explain(fastattn.attention_varlen, **given)
    assert explained.operation == "attention_varlen" and explained.implementation == "triton"


UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("kind", ["attention", "attention_blockwise"])
def test_opcheck(kind: str, device: torch.device) -> None:
    given = operands(device)
    q, k, v = (given[name].transpose(0, 1)[None] for name in "qkv")
    forward = getattr(torch.ops.fastattn, f"{kind}_forward").default
    backward = getattr(torch.ops.fastattn, f"{kind}_backward").default
    options = AttentionOptions(
        0.25,
        left=7,
        bottom_right=True,
        bias=make_tensor(SEQUENCES, 1, 1, MAX_K, seed=7, device=device),
        cu_seqlens_q=given["cu_seqlens_q"],
        cu_seqlens_k=given["cu_seqlens_k"],
        max_seqlen_q=MAX_Q,
        max_seqlen_k=MAX_K,
    )
    torch.library.opcheck(forward, (q, k, v, *options), test_utils=UTILS)
    out, lse = forward(q, k, v, *options)
    torch.library.opcheck(
        backward, (out, lse, q, k, v, out, lse, [True] * 4 + [False], *options), test_utils=UTILS
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_whole_with_dynamic_totals(implementation: str, device: torch.device) -> None:
    """One graph for batches of several totals and longest lengths, also where one tensor is both offsets."""
    frames = CompileCounterWithBackend("aot_eager")

    def attend(x: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        return fastattn.attention_varlen(
            x, x, x, starts, starts, longest, longest, causal=True, window=(8, None), return_lse=True,
            implementation=implementation,
        )  # fmt: skip

    compiled = torch.compile(attend, fullgraph=True, backend=frames, dynamic=True)
    for lengths in ((5, 9, 3), (4, 6, 17)):
        x = make_tensor(sum(lengths), HEADS, WIDTH, device=device).requires_grad_()
        starts = offsets(lengths).to(device)
        expected, found = (f(x, starts, max(lengths)) for f in (attend, compiled))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(o.square().sum() + lse.sum(), x) for o, lse in (expected, found)]
        torch.testing.assert_close(*gradients)
    assert frames.frame_count == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_everything_compiles_whole(implementation: str, device: torch.device) -> None:
    """Every option in one call, dropout drawn alike, and without waiting for the longest lengths."""
    options = OPTIONS["everything"] | dict(dropout_p=0.3, max_seqlen_q=MAX_Q, max_seqlen_k=MAX_K)
    given = operands(device, v_dim=12)
    given |= {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    attend = partial(fastattn.attention_varlen, implementation=implementation)
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=frames)
    torch.manual_seed(1)
    expected = results(attend, given)
    torch.manual_seed(1)
    torch.testing.assert_close(results(compiled, given), expected)
    assert frames.frame_count == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivative_and_transforms_are_refused(implementation: str, device: torch.device) -> None:
    given = operands(device)
    q = given.pop("q").requires_grad_()
    attend = lambda q: fastattn.attention_varlen(q, **given, implementation=implementation)  # noqa: E731
    (gradient,) = torch.autograd.grad(attend(q).square().sum(), q, create_graph=True)
    with pytest.raises(fastattn.NotSupported, match="no second derivative"):
        gradient.sum().backward()
    with pytest.raises(fastattn.NotSupported, match=r"within torch.func transforms"):
        torch.func.grad(lambda q: attend(q).sum())(q.detach())


Q, STARTS = torch.randn(12, 2, 8), torch.tensor([0, 5, 12])
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not-a-tensor": (dict(q=[1.0]), ValueError, r"q must be a tensor \(total, heads, head_dim\), not list"),
    "rank": (dict(k=Q[None]), ValueError, r"k must be a tensor \(total, heads, head_dim\), not \(1, 12, 2, 8\)"),
    "integers": (dict(q=Q.long()), TypeError, r"q has dtype=torch.int64; a floating-point dtype"),
    "totals": (dict(v=Q[:3]), ValueError, r"k has shape \(12, 2, 8\) and v \(3, 2, 8\)"),
    "head-dim": (dict(k=Q[..., :4], v=Q[..., :4]), ValueError, r"k has head_dim=4, but q has head_dim=8"),
    "heads": (dict(q=torch.randn(12, 3, 8)), ValueError, r"heads=3 must be a multiple of k's heads=2"),
    "starts-of-floats": (dict(cu_seqlens_q=STARTS.float()), TypeError, r"cu_seqlens_q must be a tensor of int32"),
    "starts-as-a-list": (dict(cu_seqlens_k=[0, 12]), TypeError, r"cu_seqlens_k must be a tensor of int32"),
    "starts-of-rank-2": (
        dict(cu_seqlens_q=STARTS[None]),
        ValueError,
        r"cu_seqlens_q has shape \(1, 3\), not \(sequences \+ 1,\)",
    ),
    "no-starts": (
        dict(cu_seqlens_k=STARTS[:0]),
        ValueError,
        r"cu_seqlens_k has shape \(0,\), not \(sequences \+ 1,\)",
    ),
    "falling": (
        dict(cu_seqlens_q=torch.tensor([0, 7, 5])),
        ValueError,
        r"cu_seqlens_q must begin with 0 and never fall",
    ),
    "not-from-0": (
        dict(cu_seqlens_k=torch.tensor([1, 5, 12])),
        ValueError,
        r"cu_seqlens_k must begin with 0 and never fall",
    ),
    "beyond": (
        dict(cu_seqlens_q=torch.tensor([0, 5, 13])),
        ValueError,
        r"cu_seqlens_q ends at 13, beyond the 12 rows there are",
    ),
    "too-long": (
        dict(max_seqlen_k=6),
        ValueError,
        r"cu_seqlens_k has a sequence of 7 rows, above max_seqlen=6",
    ),
    "sequences": (
        dict(cu_seqlens_k=torch.tensor([0, 12])),
        ValueError,
        r"cu_seqlens_q is of 2 sequences and cu_seqlens_k of 1",
    ),
    "ambiguous": (
        dict(cu_seqlens_k=STARTS.clone(), causal=True),
        ValueError,
        r"causal=True is ambiguous where cu_seqlens_q and cu_seqlens_k are two tensors",
    ),
    "bias": (
        dict(bias=torch.zeros(2, 2, 5, 7)),
        ValueError,
        r"bias has shape \(2, 2, 5, 7\), which does not broadcast to \(2, 2, 7, 7\)",
    ),
    "slopes": (
        dict(alibi_slopes=torch.zeros(3, 2)),
        ValueError,
        r"alibi_slopes has shape \(3, 2\), not \(2,\) or \(2, 2\)",
    ),
    "key-lengths": (
        dict(key_lengths=torch.tensor([1])),
        ValueError,
        r"key_lengths has shape \(1,\), not \(2,\)",
    ),
    "device": (dict(cu_seqlens_q=STARTS.to("meta"), max_seqlen_q=7), ValueError, r"cu_seqlens_q is on meta, but q is"),
}  # fmt: skip


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input_names_the_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(q=Q, k=Q, v=Q, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS) | change
    with pytest.raises(error, match=message):
        fastattn.attention_varlen(**arguments)
