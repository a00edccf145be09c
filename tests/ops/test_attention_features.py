"""`fastattn.attention` with every option, alone, together, and at random: values and gradients against float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.testing import assert_accurate, make_tensor

IMPLEMENTATIONS = ("triton", "torch")
LEARNED = ("q", "k", "v", "bias", "sinks")
BATCH, HEADS, KV_HEADS, SEQ_Q, SEQ_K, WIDTH = 2, 2, 1, 13, 19, 8


def operands(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    v_dim: int = WIDTH,
    seq_k: int = SEQ_K,
    batch: int = BATCH,
) -> dict[str, Any]:
    shapes = dict(
        q=(batch, HEADS, SEQ_Q, WIDTH), k=(batch, KV_HEADS, seq_k, WIDTH), v=(batch, KV_HEADS, seq_k, v_dim)
    )
    return {
        name: make_tensor(*shape, dtype=dtype, seed=seed, device=device)
        for seed, (name, shape) in enumerate(shapes.items())
    }


BIAS = make_tensor(1, HEADS, SEQ_Q, SEQ_K, seed=6)
BIAS[..., 3:9] = -math.inf
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": dict(causal="top_left"),
    "bottom-right": dict(causal="bottom_right"),
    "window": dict(window=(9, 5)),
    "window-left": dict(window=(4, None), causal="top_left"),
    "window-without-ends": dict(window=(None, -1)),
    "scale": dict(scale=0.7),
    "bias": dict(bias=BIAS),
    "bias-of-keys": dict(bias=make_tensor(BATCH, 1, 1, SEQ_K, seed=7)),
    "bias-of-rank-2": dict(bias=make_tensor(SEQ_Q, SEQ_K, seed=8)),
    "mask": dict(mask=make_tensor(BATCH, 1, 1, SEQ_K, seed=9) > -0.3),
    "mask-of-rank-3": dict(mask=make_tensor(HEADS, SEQ_Q, SEQ_K, seed=10) > 0.2),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.125])),
    "alibi-of-batches": dict(alibi_slopes=torch.tensor([[0.5, 0.125], [0.3, 0.0]])),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0])),
    "dropout": dict(dropout_p=0.3),
    "key-lengths": dict(key_lengths=torch.tensor([0, 15])),
    "deterministic": dict(deterministic=True),
}
TOGETHER: dict[str, tuple[str, ...]] = {
    "gemma": ("window-left", "softcap"),
    "gpt-oss": ("window-left", "sinks", "mask"),
    "t5": ("bias", "mask", "dropout", "scale"),
    "alphafold": ("bias", "bias-of-keys", "sinks"),
    "mpt": ("alibi-of-batches", "key-lengths", "causal"),
    "scores": ("softcap", "bias-of-rank-2", "alibi", "bottom-right"),
    "hidden": ("window", "mask-of-rank-3", "key-lengths", "sinks"),
    "everything": ("bottom-right", "window", "bias", "mask", "softcap", "alibi", "sinks", "dropout", "key-lengths"),
}  # fmt: skip
ALL = dict(OPTIONS)
for name, parts in TOGETHER.items():
    ALL[name] = {key: value for part in parts for key, value in OPTIONS[part].items()}
# A bottom right is no longer one where a window gives a causal of its own.
ALL["everything"]["causal"] = "bottom_right"


def moved(options: dict[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The tensors on a device, and the floating ones of these that are inputs like q in a dtype."""
    found = dict(options)
    for name, value in options.items():
        if isinstance(value, Tensor):
            found[name] = value.to(device)
            if dtype is not None and value.is_floating_point():
                found[name] = found[name].to(dtype)
    return found


def results(function: Any, given: dict[str, Any], return_lse: bool = True) -> dict[str, Tensor]:
    """out and lse, and the gradients, through both, of what can have one; without lse where it is not asked for."""
    given = dict(given)
    wanted = [name for name in LEARNED if given.get(name) is not None]
    for name in wanted:
        given[name] = given[name].detach().requires_grad_()
    found = function(**given, return_lse=return_lse)
    out, lse = found if return_lse else (found, None)
    dout = make_tensor(*out.shape, seed=20, device=out.device).to(out.dtype)
    if lse is None:
        gradients = torch.autograd.grad(out, [given[name] for name in wanted], dout)
        return {"out": out, **{f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}}
    dlse = make_tensor(*lse.shape, seed=21, device=out.device).to(lse.dtype)
    dlse = dlse.masked_fill(lse == -math.inf, 0.0)
    gradients = torch.autograd.grad((out, lse), [given[name] for name in wanted], (dout, dlse))
    return {"out": out, "lse": lse, **{f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}}


def kept(given: dict[str, Any], implementation: str, seed: int) -> Tensor:
    """Dropout's keep-mask for a seed: q and k of zeros give each weight alike, and v tells them apart."""
    torch.manual_seed(seed)
    q, k, seq_k = given["q"], given["k"], given["k"].size(2)
    eye = torch.eye(seq_k, dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    p = given["dropout_p"]
    return fastattn.attention(q * 0, k * 0, eye, dropout_p=p, implementation=implementation) > 0


def check(given: dict[str, Any], implementation: str, return_lse: bool = True) -> None:
    dtype = given["q"].dtype
    exact = dict(given)
    exact.pop("deterministic", None)
    if given.get("dropout_p"):
        exact["keep"] = kept(given, implementation, seed=3)
    torch.manual_seed(3)
    found = results(partial(fastattn.attention, implementation=implementation), given, return_lse)
    truth = results(reference.attention, moved(exact, dtype=torch.float64), return_lse)
    peer = results(reference.attention, exact, return_lse)
    lse = truth["lse"][truth["lse"].isfinite()] if return_lse else truth["out"].new_zeros(0)
    recomputed = max(1.0, lse.abs().max().item()) if lse.numel() and dtype == torch.float32 else 1.0
    scale = truth["dv"].abs().max().item() if truth["dv"].numel() else 0.0
    terms = max(1.0, given["q"][..., 0].numel() * given["k"].size(2) / 64)
    assert found.keys() == truth.keys()
    for name, actual in found.items():
        gradient = name not in ("out", "lse")
        expected = peer[name] if name != "lse" else peer[name].to(actual.dtype)
        assert name != "lse" or actual.dtype == torch.promote_types(dtype, torch.float32)
        assert_accurate(
            actual,
            expected,
            truth[name],
            name=name,
            growth=recomputed * math.sqrt(terms) if gradient else 1.0,
            scale=scale if gradient else 0.0,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients(name: str, implementation: str, device: torch.device) -> None:
    check(operands(device) | moved(ALL[name], device), implementation)


# What PyTorch's own operator takes while there are few scores: by is_causal, or with a mask made for it.
OPERATORS = (
    "causal", "bottom-right", "window", "window-left", "window-without-ends", "scale", "mask", "mask-of-rank-3"
)  # fmt: skip


@pytest.mark.parametrize("name", [*OPERATORS, "masked-window", "deterministic"])
def test_values_and_gradients_by_pytorchs_operator(name: str) -> None:
    """Without the log-sum-exp, which it does not return; with it the tests above go in blocks."""
    masked_window = OPTIONS["window-left"] | OPTIONS["mask"]
    given = operands() | moved(masked_window if name == "masked-window" else OPTIONS[name])
    assert _by_pytorchs_operator(given)
    check(given, "torch", return_lse=False)


def test_a_constant_bias_by_pytorchs_operator() -> None:
    """A bias that wants a gradient goes in blocks."""
    bias = OPTIONS["bias-of-keys"]["bias"]
    given = operands()
    assert _by_pytorchs_operator(given | dict(bias=bias))
    found, expected = (
        results(partial(function, bias=bias, **keywords), given, return_lse=False)
        for function, keywords in (
            (fastattn.attention, dict(implementation="torch")),
            (reference.attention, {}),
        )
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _by_pytorchs_operator(given: dict[str, Any]) -> bool:
    explained = fastattn.explain(fastattn.attention, **given, implementation="torch")
    return explained.description == "torch.nn.functional.scaled_dot_product_attention"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["everything", "t5", "causal"])
def test_runs_are_equal_bit_for_bit(name: str, implementation: str, device: torch.device) -> None:
    given = operands(device) | moved(ALL[name], device) | dict(deterministic=True)
    for return_lse in (True, False):
        first, second = (_run(given, implementation, return_lse) for _ in range(2))
        assert all(torch.equal(first[result], second[result]) for result in first)


def _run(given: dict[str, Any], implementation: str, return_lse: bool) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return results(partial(fastattn.attention, implementation=implementation), given, return_lse)


@pytest.mark.parametrize("name", ["gemma", "t5", "hidden", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """With a value width of its own. The kernels' own tests have these dtypes with every pair of options."""
    options = moved(ALL[name])
    for learned in ("bias", "sinks"):
        if learned in options:
            options[learned] = options[learned].to(dtype)
    check(operands(dtype=dtype, v_dim=12) | options, "torch")


def option_sets() -> st.SearchStrategy[set[str]]:
    names = ("window", "bias", "mask", "softcap", "alibi", "sinks", "dropout", "key_lengths", "causal")
    return st.sets(st.sampled_from(names), max_size=5)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Any call: sizes, views for operands, dtype and options."""
    size = st.integers(1, 40)
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seq_q, seq_k, width, v_dim = draw(size), draw(size), draw(st.integers(1, 33)), draw(st.integers(1, 33))
    heads = kv_heads * groups
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shapes = dict(
        q=(batch, heads, seq_q, width), k=(batch, kv_heads, seq_k, width), v=(batch, kv_heads, seq_k, v_dim)
    )
    given = {name: draw(views(shape, dtype, seed)) for seed, (name, shape) in enumerate(shapes.items())}
    options = draw(option_sets())
    full = (batch, heads, seq_q, seq_k)
    if "bias" in options:
        given["bias"] = draw(views(draw(broadcasts(full)), dtype, 6))
    if "mask" in options:
        given["mask"] = draw(views(draw(broadcasts(full)), torch.float32, 7)) > -0.7
    if "window" in options:
        end = st.one_of(st.none(), st.integers(-1, 45))
        given["window"] = (draw(end), draw(end))
    if "softcap" in options:
        given["softcap"] = draw(st.sampled_from([0.5, 3.0, 30.0]))
    if "alibi" in options:
        given["alibi_slopes"] = make_tensor(batch, heads, seed=8).abs() / 4
    if "sinks" in options:
        given["sinks"] = make_tensor(heads, dtype=dtype, seed=9)
    if "dropout" in options:
        given["dropout_p"] = draw(st.sampled_from([0.1, 0.6, 1.0]))
    if "key_lengths" in options:
        given["key_lengths"] = torch.tensor([draw(st.integers(0, seq_k)) for _ in range(batch)])
    if "causal" in options:
        given["causal"] = draw(st.sampled_from(["top_left", "bottom_right"]))
    return given


@st.composite
def broadcasts(draw: st.DrawFn, full: tuple[int, ...]) -> tuple[int, ...]:
    shape = tuple(draw(st.sampled_from([1, n])) for n in full)
    return shape[draw(st.integers(0, 2)) :] if draw(st.booleans()) else shape


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of this shape: contiguous, turned, expanded, or a slice of a larger one that holds NaN."""
    kind = draw(st.sampled_from(["contiguous", "turned", "innermost", "expanded", "sliced", "stepped"]))
    if kind == "turned" and len(shape) > 2:
        first, second, *rest = range(len(shape))[-3:]
        order = [*range(len(shape) - 3), second, first, *rest]
        return make_tensor(*(shape[d] for d in order), dtype=dtype, seed=seed).permute(order)
    if kind == "innermost":
        return make_tensor(*shape[:-2], shape[-1], shape[-2], dtype=dtype, seed=seed).mT
    if kind == "expanded":
        return make_tensor(1, *shape[1:], dtype=dtype, seed=seed).expand(shape)
    if kind in ("sliced", "stepped"):
        step = 1 if kind == "sliced" else 2
        whole = torch.full((*shape[:-1], step * shape[-1] + 3), math.nan, dtype=dtype)
        part = whole[..., 1 : 1 + step * shape[-1] : step]
        part.copy_(make_tensor(*shape, dtype=dtype, seed=seed))
        return part
    return make_tensor(*shape, dtype=dtype, seed=seed)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(calls())
def test_any_call_by_torch(call: dict[str, Any]) -> None:
    check(call, "torch")


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(calls())
def test_any_call_by_triton(call: dict[str, Any]) -> None:
    check(call, "triton")
