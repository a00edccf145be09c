"""What `fastattn.attention` refuses, each by a message that shows the value and the bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dispatch

Q = torch.randn(2, 4, 5, 8)
K = torch.randn(2, 4, 7, 8)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # TypeError: what is no tensor, and dtypes.
    "bias-as-a-number": (dict(bias=1.0), TypeError, r"bias must be a torch.Tensor, not float"),
    "bias-of-bool": (
        dict(bias=torch.ones(5, 7).bool()),
        TypeError,
        r"bias has dtype=torch.bool; a floating-point dtype is needed",
    ),
    "bias-of-float64": (
        dict(bias=torch.zeros(5, 7).double()),
        TypeError,
        r"bias has dtype=torch.float64, and q torch.float32",
    ),
    "mask-as-a-list": (dict(mask=[True]), TypeError, r"mask must be a torch.Tensor, not list"),
    "mask-of-floats": (
        dict(mask=torch.zeros(5, 7)),
        TypeError,
        r"mask has dtype=torch.float32 and must be bool; what is added to the scores is a bias",
    ),
    "slopes-as-a-list": (dict(alibi_slopes=[0.5]), TypeError, r"alibi_slopes must be a torch.Tensor, not list"),
    "slopes-of-integers": (dict(alibi_slopes=torch.ones(4).long()), TypeError, r"alibi_slopes has dtype=torch.int64"),
    "sinks-as-a-number": (dict(sinks=0.0), TypeError, r"sinks must be a torch.Tensor, not float"),
    "sinks-of-integers": (dict(sinks=torch.ones(4).int()), TypeError, r"sinks has dtype=torch.int32"),
    "lengths-as-a-list": (dict(key_lengths=[1, 2]), TypeError, r"key_lengths must be a torch.Tensor, not list"),
    "lengths-of-floats": (
        dict(key_lengths=torch.ones(2)),
        TypeError,
        r"key_lengths has dtype=torch.float32 and must be int32 or int64",
    ),
    # ValueError: shapes.
    "bias-of-rank-1": (dict(bias=torch.zeros(7)), ValueError, r"bias has 1 dimensions; 2 to 4 are needed"),
    "bias-of-rank-5": (dict(bias=torch.zeros(1, 1, 1, 5, 7)), ValueError, r"bias has 5 dimensions"),
    "bias-of-other-keys": (
        dict(bias=torch.zeros(5, 6)),
        ValueError,
        r"bias has shape \(5, 6\), which does not broadcast to \(2, 4, 5, 7\)",
    ),
    "bias-of-another-batch": (
        dict(bias=torch.zeros(3, 1, 1, 7)),
        ValueError,
        r"bias has shape \(3, 1, 1, 7\), which does not broadcast to \(2, 4, 5, 7\)",
    ),
    "mask-of-rank-1": (dict(mask=torch.ones(7).bool()), ValueError, r"mask has 1 dimensions; 2 to 4 are needed"),
    "mask-of-other-heads": (
        dict(mask=torch.ones(2, 5, 7).bool()),
        ValueError,
        r"mask has shape \(2, 5, 7\), which does not broadcast to \(2, 4, 5, 7\)",
    ),
    "slopes-of-other-heads": (
        dict(alibi_slopes=torch.ones(2)),
        ValueError,
        r"alibi_slopes has shape \(2,\), not \(4,\) or \(2, 4\)",
    ),
    "sinks-of-other-heads": (dict(sinks=torch.ones(1)), ValueError, r"sinks has shape \(1,\), not \(4,\)"),
    "lengths-of-another-batch": (
        dict(key_lengths=torch.tensor([1])),
        ValueError,
        r"key_lengths has shape \(1,\), not \(2,\)",
    ),
    # ValueError: values.
    "length-above": (
        dict(key_lengths=torch.tensor([3, 8])),
        ValueError,
        r"key_lengths holds 8; it must lie within 0 and 7",
    ),
    "length-below": (
        dict(key_lengths=torch.tensor([-1, 9])),
        ValueError,
        r"key_lengths holds -1; it must lie within 0 and 7",
    ),
    "window-of-one-end": (dict(window=(3,)), ValueError, r"window=\(3,\) must be \(left, right\), each None, -1"),
    "window-as-a-number": (dict(window=3), ValueError, r"window=3 must be \(left, right\)"),
    "window-below": (dict(window=(-2, 0)), ValueError, r"window=\(-2, 0\) must be \(left, right\)"),
    "window-of-floats": (dict(window=(1.5, 0)), ValueError, r"window=\(1.5, 0\) must be \(left, right\)"),
    "softcap-of-0": (dict(softcap=0.0), ValueError, r"softcap=0.0 must be positive and finite, or None"),
    "softcap-below": (dict(softcap=-1.0), ValueError, r"softcap=-1.0 must be positive and finite"),
    "softcap-infinite": (dict(softcap=math.inf), ValueError, r"softcap=inf must be positive and finite"),
    "softcap-nan": (dict(softcap=math.nan), ValueError, r"softcap=nan must be positive and finite"),
    "dropout-above": (dict(dropout_p=1.1), ValueError, r"dropout_p=1.1 must be a number from 0 to 1"),
    "dropout-below": (dict(dropout_p=-0.1), ValueError, r"dropout_p=-0.1 must be a number from 0 to 1"),
    "dropout-nan": (dict(dropout_p=math.nan), ValueError, r"dropout_p=nan must be a number from 0 to 1"),
    "dropout-as-text": (dict(dropout_p="x"), ValueError, r"dropout_p='x' must be a number from 0 to 1"),
    "scale-as-text": (dict(scale="x"), ValueError, r"scale='x' must be a finite number"),
    "scale-infinite": (dict(scale=math.inf), ValueError, r"scale=inf must be a finite number"),
    "scale-nan": (dict(scale=math.nan), ValueError, r"scale=nan must be a finite number"),
    # ValueError: devices.
    **{
        f"{name}-elsewhere": (
            {name: tensor.to("meta")},
            ValueError,
            rf"{name} is on meta, but q is on cpu",
        )
        for name, tensor in dict(
            bias=torch.zeros(5, 7),
            mask=torch.ones(5, 7).bool(),
            alibi_slopes=torch.ones(4),
            sinks=torch.ones(4),
            key_lengths=torch.tensor([1, 2]),
        ).items()
    },
    "slopes-with-a-gradient": (
        dict(alibi_slopes=torch.ones(4, requires_grad=True)),
        fastattn.NotSupported,
        r"alibi_slopes has no gradient: detach it, or give slope \* distance as a bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("implementation", [None, "triton", "torch", "reference"])
def test_message(
    change: dict[str, Any], error: type[Exception], message: str, implementation: str | None
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        fastattn.attention(Q, K, K, **change, implementation=implementation)


def test_slopes_with_a_gradient_are_taken_where_none_is_recorded() -> None:
    slopes = torch.full((4,), 0.5, requires_grad=True)
    with torch.no_grad():
        found = fastattn.attention(Q, K, K, alibi_slopes=slopes)
    torch.testing.assert_close(found, fastattn.reference.attention(Q, K, K, alibi_slopes=slopes.detach()))


@pytest.mark.parametrize("learned", ["bias", "sinks"])
def test_a_wide_head_with_a_learned_option_alone(learned: str) -> None:
    """Only q, k and v were asked whether they want a gradient, so that a backward began that no kernel has."""
    q = torch.randn(1, 2, 4, 320)
    option = {learned: torch.randn(*((4, 4) if learned == "bias" else (2,)), requires_grad=True)}
    explained = fastattn.explain(q, q, q, **option)
    assert explained.refusals["triton"] == "head_dim=320 is above 256, the most with gradients"
    found = fastattn.attention(q, q, q, **option)
    expected = fastattn.reference.attention(q, q, q, **option)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), option.values()) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_values_on_a_gpu_are_checked_within_debug_checks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them waits for the device. A tensor that says it lies there stands for one."""
    asked: list[Tensor] = []

    def as_on_a_gpu(tensor: Tensor) -> bool:
        asked.append(tensor)
        return dispatch._debug_checks.on

    monkeypatch.setattr("fastattn.ops._attention_call.checking", as_on_a_gpu)
    lengths, starts = torch.tensor([9, -1]), torch.tensor([0, 9, 3])
    packed = torch.randn(5, 4, 8)
    calls = (
        lambda: fastattn.attention(Q, K, K, key_lengths=lengths, implementation="torch"),
        lambda: fastattn.attention_varlen(
            packed, packed, packed, starts, starts, 5, 5, implementation="torch"
        ),
    )
    for call in calls:
        assert call().isfinite().all()
        with fastattn.debug_checks(), pytest.raises(ValueError, match=r"key_lengths holds -1|never fall"):
            call()
        assert call().isfinite().all()
    assert any(tensor is lengths for tensor in asked)


def test_checking_asks_for_the_device_the_block_and_the_compiler() -> None:
    class OnGpu:
        is_meta = False
        device = torch.device("cuda")

    assert dispatch.checking(torch.tensor([1])) and not dispatch.checking(torch.tensor([1], device="meta"))
    assert not dispatch.checking(OnGpu())  # type: ignore[arg-type]
    with fastattn.debug_checks():
        assert dispatch.checking(OnGpu())  # type: ignore[arg-type]
        assert not dispatch.checking(torch.tensor([1], device="meta"))
    assert not dispatch.checking(OnGpu())  # type: ignore[arg-type]
