"""What fastattn.rotary_embedding refuses, and positions that were not checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn
from fastattn.testing import make_tensor
from tests.rotary_checks import DIM, FAST, look_at_no_values, tables

X, (COS, SIN) = torch.randn(2, 3, 5, 8), tables(6, 8)
PACKED, BOUNDS = torch.randn(7, 3, 8), torch.tensor([0, 3, 7])
BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x-not-a-tensor": ({"x": 1.0}, TypeError, "x must be a torch.Tensor, not float"),
    "x-of-integers": ({"x": X.long()}, TypeError, "x has dtype=torch.int64; a floating-point dtype"),
    "x-of-2-dimensions": (
        {"x": X[0, 0]},
        ValueError,
        r"x has shape \(5, 8\); \(batch, heads, seq, head_dim\)",
    ),
    "packed-without-bounds": ({"x": PACKED}, ValueError, "with cu_seqlens or positions, "),
    "bounds-of-4-dimensions": ({"cu_seqlens": BOUNDS}, ValueError, r"x has shape \(2, 3, 5, 8\)"),
    "cos-not-a-tensor": ({"cos": 1.0}, TypeError, "cos must be a torch.Tensor, not float"),
    "shapes-of-tables": (
        {"sin": SIN[:, :2]},
        ValueError,
        r"shapes \(6, 4\) and \(6, 2\); \(positions, rotary",
    ),
    "3-d-tables": ({"cos": COS[None], "sin": SIN[None]}, ValueError, r"shapes \(1, 6, 4\) and"),
    "rotary-dim": ({"x": X[..., :7]}, ValueError, "rotary_dim=8, .* must lie within 2 and head_dim=7"),
    "no-pair": ({"cos": COS[:, :0], "sin": SIN[:, :0]}, ValueError, "rotary_dim=0, .* must lie within 2"),
    "dtype-of-tables": (
        {"cos": COS.double(), "sin": SIN.double()},
        TypeError,
        r"cos and sin have torch.float64 and torch.float64; both must have float32 or x's torch.float32",
    ),
    "two-dtypes": ({"sin": SIN.bfloat16()}, TypeError, "cos and sin have torch.float32 and torch.bfloat16"),
    "device": ({"cos": COS.to("meta"), "sin": SIN.to("meta")}, ValueError, "cos is on meta, but x is on cpu"),
    "offset-beyond": ({"offsets": 2}, ValueError, "position 6 lies outside of cos and sin, which have 6"),
    "offset-negative": ({"offsets": -1}, ValueError, "position -1 lies outside of cos and sin"),
    "offset-float": ({"offsets": 1.0}, TypeError, "offsets must be an int or a torch.Tensor, not float"),
    "offset-bool": ({"offsets": True}, TypeError, "offsets must be an int or a torch.Tensor, not bool"),
    "starts-beyond": ({"offsets": torch.tensor([0, 2])}, ValueError, "position 6 lies outside"),
    "starts-negative": ({"offsets": torch.tensor([0, -2])}, ValueError, "position -2 lies outside"),
    "starts-shape": (
        {"offsets": torch.tensor([0, 1, 1])},
        ValueError,
        r"offsets has shape \(3,\), not \(2,\)",
    ),
    "starts-dtype": (
        {"offsets": torch.ones(2)},
        TypeError,
        "offsets has dtype=torch.float32 and must be int32",
    ),
    "positions-beyond": ({"positions": torch.arange(2, 7)}, ValueError, "position 6 lies outside"),
    "positions-negative": ({"positions": torch.arange(-1, 4)}, ValueError, "position -1 lies outside"),
    "positions-shape": (
        {"positions": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"positions has shape \(2,\), not \(5,\) or \(2, 5\)",
    ),
    "positions-list": ({"positions": [1]}, TypeError, "positions must be a torch.Tensor, not list"),
    "positions-and-offsets": (
        {"positions": torch.zeros(5, dtype=torch.int64), "offsets": 1},
        ValueError,
        "offsets and positions say the same",
    ),
    "packed-positions-shape": (
        {"x": PACKED, "positions": torch.zeros(5, dtype=torch.int64)},
        ValueError,
        r"positions has shape \(5,\), not \(7,\)",
    ),
    "bounds-beyond": (
        {"x": PACKED, "cu_seqlens": BOUNDS + BOUNDS},
        ValueError,
        "cu_seqlens ends at 14, beyond",
    ),
    "bounds-fall": (
        {"x": PACKED, "cu_seqlens": BOUNDS.flip(0)},
        ValueError,
        "must begin with 0 and never fall",
    ),
    "longest": (
        {"x": PACKED, "cu_seqlens": BOUNDS, "max_seqlen": 3},
        ValueError,
        "has a sequence of 4 rows, above max_seqlen=3",
    ),
    "sequence-beyond": (
        {"x": PACKED, "cu_seqlens": BOUNDS, "offsets": 3},
        ValueError,
        "position 6 lies outside",
    ),
    "sequence-start-beyond": (
        {"x": PACKED, "cu_seqlens": BOUNDS, "offsets": torch.tensor([4, 2])},
        ValueError,
        "position 6 lies outside",
    ),
    "implementation": (
        {"implementation": "cuda"},
        ValueError,
        "fastattn.rotary_embedding has 'triton', 'torch'",
    ),
}


@pytest.mark.parametrize("change, error, message", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_names_the_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "cos": COS, "sin": SIN} | change
    x = arguments.pop("x")
    with pytest.raises(error, match=message):
        fastattn.rotary_embedding(x, **arguments)


def test_q_and_k_must_fit() -> None:
    with pytest.raises(ValueError, match=r"q has shape \(2, 3, 5, 8\) and k \(2, 3, 4, 8\)"):
        fastattn.rotary_embedding_qk(X, X[:, :, :4], COS, SIN)
    with pytest.raises(TypeError, match="q and k must have one dtype"):
        fastattn.rotary_embedding_qk(X, X.bfloat16(), COS, SIN)


def test_longest_is_held_against_the_tables_where_bounds_are_not_read() -> None:
    packed, bounds = PACKED.to("meta"), BOUNDS.to("meta")
    with pytest.raises(ValueError, match="position 6 lies outside"):
        fastattn.rotary_embedding(
            packed, COS.to("meta"), SIN.to("meta"), cu_seqlens=bounds, max_seqlen=7, implementation="torch"
        )


def test_last_sequence_may_end_at_the_last_position() -> None:
    """The longest sequence does not start furthest on: each is checked with its own start."""
    starts = torch.tensor([3, 2])
    y = fastattn.rotary_embedding(PACKED, COS, SIN, cu_seqlens=BOUNDS, offsets=starts)
    assert y.isfinite().all()


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("kind", ["offsets", "positions", "packed", "starts"])
def test_positions_that_were_not_checked_give_nan(
    kind: str, implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where values are not read: rows beyond the tables are NaN, and the others right."""
    look_at_no_values(monkeypatch)
    buffer = torch.full((9, DIM // 2), 7.0, device=device)
    cos, sin = tables(5, device=device)
    buffer[2:7] = cos
    cos = buffer[2:7]
    x = make_tensor(2, 2, 4, DIM, device=device)
    huge, places = 1 << 40, torch.tensor([[0, -1, 4, 5], [1 << 40, 1, -(1 << 40), 3]], device=device)
    options: dict[str, Any] = {"positions": places}
    if kind == "offsets":
        options, places = (
            {"offsets": torch.tensor([3, -2], device=device)},
            torch.tensor([[3, 4, 5, 6], [-2, -1, 0, 1]], device=device),
        )
    elif kind == "packed":
        x = x.transpose(1, 2).flatten(0, 1)
        options = {"cu_seqlens": torch.tensor([0, 1, 8], device=device)}
        places = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6], device=device)
    elif kind == "starts":
        x = x.transpose(1, 2).flatten(0, 1)
        options = {
            "cu_seqlens": torch.tensor([0, 4, 8], device=device),
            "offsets": torch.tensor([huge, 1], device=device),
        }
        places = torch.tensor([huge, huge, huge, huge, 1, 2, 3, 4], device=device)
    y = fastattn.rotary_embedding(x, cos, sin, implementation=implementation, **options)
    outside = (places < 0) | (places > 4)
    y = y.transpose(-2, -3) if y.dim() == 4 else y  # (..., heads, head_dim) behind the places
    assert y[outside].isnan().all() and y[~outside].isfinite().all()


@pytest.mark.parametrize("bounds", [[0, 100, -7, 5], [-9, 3, 3, 2], [4, 4, 4, 4]], ids=str)
def test_wrong_bounds_read_nothing_beyond(
    bounds: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at_no_values(monkeypatch)
    x, cu_seqlens = make_tensor(9, 2, DIM, device=device), torch.tensor(bounds, device=device)
    y = fastattn.rotary_embedding(x, *tables(device=device), cu_seqlens=cu_seqlens, implementation="triton")
    assert y.shape == x.shape
