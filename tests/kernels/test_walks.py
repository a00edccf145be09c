"""The grids of kernels of which a fixed number of programs walk the rows, in column tiles."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn.kernels import bias_activation, norm_backward
from fastattn.kernels._config import MOST_OF_AXIS, walk_grid
from fastattn.kernels._norm_config import NormBackwardConfig, NormConfig, select_norm_backward_config
from fastattn.kernels._pointwise_config import WalkConfig, select_walk_config
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS
from fastattn.testing import make_tensor
from tests.norm_checks import Case, check

TARGETS = {"interpreter": INTERPRETER, **KNOWN_TARGETS}


def test_programs_share_the_column_tiles() -> None:
    assert walk_grid(rows=1000, width=100, block_m=4, block_n=128, programs=64) == (64, 1, 1)
    assert walk_grid(rows=1000, width=300, block_m=4, block_n=128, programs=64) == (22, 3, 1)
    assert walk_grid(rows=5, width=300, block_m=4, block_n=128, programs=64) == (2, 3, 1)
    assert walk_grid(rows=1, width=1 << 20, block_m=4, block_n=16, programs=64) == (1, 32_768, 2)


@pytest.mark.parametrize("target", TARGETS)
def test_grids_stay_in_bounds_at_any_width(target: str) -> None:
    """A row of 2^24 columns has more column tiles than axis 1 has programs: norms and biases did not launch."""
    known = TARGETS[target]
    for width in (1, 4096, 1 << 20, (1 << 24) + 1, 1 << 30):
        alignment = math.gcd(width, 16)
        norm = select_norm_backward_config(width, alignment, [torch.bfloat16] * 3, False, known)
        bias = select_walk_config(width, alignment, torch.bfloat16, known)
        for tile, programs in ((norm.walk, norm.programs), (bias, bias.programs)):
            for rows in (1, 10_000_000):
                walking, *axes = walk_grid(rows, width, tile.block_m, tile.block_n, programs)
                tiles = axes[0] * axes[1]
                assert max(axes) <= MOST_OF_AXIS and 1 <= walking <= programs
                assert width <= tiles * tile.block_n < width + axes[1] * tile.block_n


class _Kernel:
    """Stands for a kernel, and keeps the grids that it is launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.grids.append(grid)
        return lambda **arguments: None


def test_launches_of_very_wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^24 + 1 columns on "meta", where they take no memory: 65,537 column tiles, which all stood on axis 1."""
    norm, bias, others = _Kernel(), _Kernel(), _Kernel()
    monkeypatch.setattr(norm_backward, "_norm_backward_kernel", norm)
    monkeypatch.setattr(norm_backward, "_norm_row_means_kernel", others)
    monkeypatch.setattr(bias_activation, "_bias_activation_backward_kernel", bias)
    monkeypatch.setattr("fastattn.kernels._partials._sum_partials_kernel", others)
    x = torch.empty(3, (1 << 24) + 1, device="meta")
    weight, rstd, kind = x[0], x[:, 0], torch.float32
    norm_backward.norm_backward(
        x, None, x, weight, None, None, None, rstd, rstd, 1, True, False, False, 0.0, kind, None, kind, kind
    )
    bias_activation.bias_activation_backward(x, x, weight, "gelu", True, kind, False)
    assert norm.grids and bias.grids and len(others.grids) == 3
    assert all(max(grid[1:], default=1) <= MOST_OF_AXIS for k in (norm, bias, others) for grid in k.grids)


@pytest.mark.parametrize("most", [MOST_OF_AXIS, 4], ids=["one-axis", "two-axes"])
def test_many_column_tiles_and_several_programs_of_each(
    most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 tiles of 4 columns, on two axes with one beyond the row: each program's columns and sums are its own."""
    monkeypatch.setattr("fastattn.kernels._config.MOST_OF_AXIS", most)
    tile = NormConfig(block_m=2, block_n=4, num_warps=1)
    form = NormBackwardConfig(walk=tile, row_means=tile, sums=tile, programs=10)
    assert walk_grid(5, 19, 2, 4, form.programs) == ((2, 5, 1) if most > 4 else (2, 3, 2))
    case = Case(rows=5, width=19, adds=True, dropout_p=0.3)
    check(case, case.tensors(device), (tile, form))


def test_column_tiles_of_a_bias_on_two_axes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.kernels._config.MOST_OF_AXIS", 2)
    x, dy, bias = make_tensor(5, 19, device=device), make_tensor(5, 19, device=device, seed=1), None
    config = WalkConfig(block_m=2, block_n=4, num_warps=1, num_stages=1, programs=10)
    dx, dbias, _ = bias_activation.bias_activation_backward(
        dy, x, bias, "gelu", True, torch.float32, False, config=config
    )
    leaf = x.requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(leaf), leaf, dy)
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(dbias, expected.sum(0))
