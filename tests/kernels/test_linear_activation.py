"""The product with an activation in its epilogue: tiles, pieces, tails, strides, and what it writes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.kernels._linear_config import LinearConfig
from fastattn.kernels.linear_activation import linear_activation_backward, linear_activation_forward
from fastattn.testing import assert_accurate, make_tensor

ROWS, WIDTH, HIDDEN, OUT = 53, 21, 79, 37
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _config(block_m: int = 16, block_n: int = 32, pieces: int = 1, group_m: int = 2) -> LinearConfig:
    return LinearConfig(block_m, block_n, 16, group_m, num_warps=4, num_stages=2, pieces=pieces)


def _inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """x, W1, b1, W2, dy."""
    shapes = ((ROWS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (OUT, HIDDEN), (ROWS, OUT))
    x, w1, b1, w2, dy = (make_tensor(*s, dtype=dtype, device=device, seed=n) for n, s in enumerate(shapes))
    return x, w1 * WIDTH**-0.5, b1, w2 * HIDDEN**-0.5, dy


def _expected(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """pre, act, dpre and db1 by PyTorch in a dtype."""
    x, w1, b1, w2, dy = (t.to(dtype) for t in tensors)
    pre = F.linear(x, w1, b1).requires_grad_()
    act = F.gelu(pre)
    (dpre,) = torch.autograd.grad(act, pre, dy @ w2)
    return [pre, act, dpre, dpre.sum(0)]


def _assert_right(found: list[Tensor], *tensors: Tensor) -> None:
    peers, truths = _expected(tensors[0].dtype, *tensors), _expected(torch.float64, *tensors)
    for name, actual, peer, truth in zip(("pre", "act", "dpre", "db1"), found, peers, truths, strict=True):
        assert_accurate(actual, peer, truth, name=name, growth=math.sqrt(ROWS) if name == "db1" else 1.0)


def _both(config: LinearConfig, *tensors: Tensor) -> list[Tensor]:
    x, w1, b1, w2, dy = tensors
    pre, act = linear_activation_forward(x, w1, b1, "gelu", True, True, config=config)
    dpre, db1, again = linear_activation_backward(dy, w2, pre, "gelu", x.dtype, True, config=config)
    assert torch.equal(act, again)
    return [pre, act, dpre, db1]


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_matches_pytorch(dtype: torch.dtype, pieces: int, device: torch.device) -> None:
    """4 x 2 tiles of which the last ones overrun, and a depth that is no multiple of a tile's."""
    tensors = _inputs(dtype, device)
    _assert_right(_both(_config(block_n=64, pieces=pieces), *tensors), *tensors)


@pytest.mark.parametrize("group_m", [1, 3, 8])
def test_every_tile_is_computed_once_in_any_grouping(group_m: int, device: torch.device) -> None:
    tensors = _inputs(torch.float32, device)
    _assert_right(_both(_config(group_m=group_m), *tensors), *tensors)


def test_whole_tiles_need_no_mask(device: torch.device) -> None:
    x, w1, b1, w2, dy = _inputs(torch.float32, device)
    tensors = (x[:48, :16], w1[:64, :16], b1[:64], w2[:32, :64], dy[:48, :32])
    _assert_right(_both(_config(), *tensors), *tensors)


LAYOUTS = {
    "rows-apart": lambda t: torch.full((t.size(0), 2 * t.size(1)), math.nan, device=t.device)[
        :, : t.size(1)
    ].copy_(t),
    "transposed": lambda t: t.t().contiguous().t(),
    "neither-stride-1": lambda t: torch.full((t.size(0), 2 * t.size(1)), math.nan, device=t.device)[
        :, ::2
    ].copy_(t),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides_and_gaps_are_not_read(layout: object, device: torch.device) -> None:
    x, w1, b1, w2, dy = _inputs(torch.float32, device)
    tensors = (layout(x), layout(w1), torch.stack([b1, b1], 1)[:, 0], layout(w2), layout(dy))
    _assert_right(_both(_config(), *tensors), *tensors)


def test_an_expanded_gradient(device: torch.device) -> None:
    x, w1, b1, w2, dy = _inputs(torch.float32, device)
    tensors = (x, w1, b1, w2, dy[:1, :1].expand(ROWS, OUT))
    _assert_right(_both(_config(), *tensors), *tensors)


def test_only_what_is_asked_for_is_written(device: torch.device) -> None:
    x, w1, _, w2, dy = _inputs(torch.float32, device)
    pre, act = linear_activation_forward(x, w1, None, "relu", True, True)
    only_pre, nothing = linear_activation_forward(x, w1, None, "relu", True, False)
    assert torch.equal(only_pre, pre) and nothing.numel() == 0
    nothing, only_act = linear_activation_forward(x, w1, None, "relu", False, True)
    assert torch.equal(only_act, act) and nothing.numel() == 0
    torch.testing.assert_close(pre, F.linear(x, w1), rtol=1e-5, atol=1e-5)
    _, db1, again = linear_activation_backward(dy, w2, pre, "relu", None, False)
    assert db1.numel() == again.numel() == 0


def test_nan_beyond_the_last_row_does_not_reach_the_sums(device: torch.device) -> None:
    """The tiles overrun x and dy by rows of NaN that lie behind them in memory."""
    tensors = list(_inputs(torch.float32, device))
    for index in (0, 4):
        rows = torch.full((ROWS + 30, tensors[index].size(1)), math.nan, device=device)
        tensors[index] = rows[:ROWS].copy_(tensors[index])
    _assert_right(_both(_config(), *tensors), *tensors)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=["rows", "width", "hidden"])
def test_empty(sizes: tuple[int, int, int], device: torch.device) -> None:
    rows, width, hidden = sizes
    x, w1 = torch.ones(rows, width, device=device), torch.ones(hidden, width, device=device)
    b1, w2, dy = (
        torch.ones(hidden, device=device),
        torch.ones(2, hidden, device=device),
        torch.ones(rows, 2, device=device),
    )
    pre, act = linear_activation_forward(x, w1, b1, "relu", True, True)
    assert torch.equal(pre, F.linear(x, w1, b1)) and torch.equal(act, pre)
    dpre, db1, _ = linear_activation_backward(dy, w2, pre, "relu", torch.float32, False)
    assert torch.equal(dpre, dy @ w2 * (pre > 0)) and torch.equal(db1, dpre.sum(0))


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    tensors = _inputs(torch.float32, device)
    first, second = _both(_config(), *tensors), _both(_config(), *tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
