"""The norm launchers at real sizes, on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastattn import reference
from fastattn.testing import assert_accurate, make_tensor
from tests.norm_checks import (
    EPS,
    Case,
    backward,
    check,
    check_statistics,
    forward,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

REAL_SIZES = [
    Case(8192, 4096, "bf16"),
    Case(8192, 4096, "fp32"),
    Case(16384, 768, "bf16", "fp32"),
    Case(5000, 1001, "fp16"),
    Case(4096, 8192, "bf16"),
    Case(512, 16384, "fp32"),
    Case(512, 32768, "bf16", "fp32"),
    Case(300, 131072, "bf16"),
    Case(300, 131072, "fp32"),
    Case(64, 300001, "fp32"),
    Case(100_000, 3, "fp32"),
    Case(8192, 4096, "bf16", rms=True),
    Case(8192, 1024, "bf16", adds=True),
    Case(4096, 4096, "bf16", "fp32", adds=True, residual="fp32", dropout_p=0.1),
    Case(1024, 8192, "bf16", adds=True, rowscale=True, from_output=True),
    Case(300, 65536, "bf16", adds=True, residual="fp32", dropout_p=0.1, rms=True),
    Case(300, 65536, "bf16", adds=True),
]


@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: Case, device: torch.device) -> None:
    check(case, case.tensors(device))


@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes_give_the_same_bits_twice(case: Case, device: torch.device) -> None:
    given = case.tensors(device)
    runs = []
    for _ in range(2):
        found = forward(case, given)
        runs.append((*found, *backward(case, given, found).values()))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_large_mean_and_small_variance_in_wide_rows(device: torch.device) -> None:
    for width in (4096, 131072):
        case = Case(rows=8, width=width)
        x = 1e4 + 0.1 * make_tensor(8, width, device=device)
        y, _, mean, rstd = forward(case, {"x": x})
        assert (y - reference.layer_norm(x.double(), width, None, None, EPS)).abs().max() < 1e-4
        check_statistics(case, x, mean, rstd)


@pytest.mark.slow
def test_more_than_2_31_elements(device: torch.device) -> None:
    """65,600 rows of 32,768 columns: elements past the 2^31st are in the last 64 rows."""
    case = Case(rows=65_600, width=32_768, dtype="fp16", has_bias=False)
    x = torch.randn(65_600, 32_768, dtype=torch.float16, device=device)
    given = {"x": x, "weight": make_tensor(32_768, dtype=torch.float16, device=device)}
    found = forward(case, given)
    gradients = backward(case, given | {"dy": found[0]}, found)
    short, last = replace(case, rows=80), given | {"x": x[-80:].clone()}
    found_last = forward(short, last)
    gradients_last = backward(short, last | {"dy": found_last[0]}, found_last, asked="r")
    assert torch.equal(found[0][-80:], found_last[0])
    assert torch.equal(gradients["r"][-80:], gradients_last["r"])


def test_dweight_error_grows_with_the_root_of_the_rows(device: torch.device) -> None:
    """A sum over 100,000 rows in bfloat16 is as near as float32's, and not off by its own size in rounding."""
    case = Case(rows=100_000, width=256, dtype="bf16", parameters="fp32")
    given = case.tensors(device)
    found = backward(case, given, forward(case, given))
    x_hat = reference.layer_norm(given["x"].double(), 256, eps=EPS)
    truth = (given["dy"].double() * x_hat).sum(0)
    peer = (given["dy"].float() * x_hat.float()).sum(0)
    assert_accurate(found["w"], peer, truth, growth=math.sqrt(case.rows))


def test_no_recompilation_as_the_number_of_rows_changes(device: torch.device) -> None:
    """Also for 1 row and for multiples of 16, which Triton tells apart unless it is told not to."""
    from fastattn.kernels import _partials
    from fastattn.kernels import norm_backward as back
    from fastattn.kernels import norm_forward as ahead

    kernels = (
        ahead._norm_forward_kernel,
        back._norm_backward_kernel,
        back._norm_row_means_kernel,
        _partials._sum_partials_kernel,
    )

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def run(rows: int) -> None:
        for width in (768, 1001, 20_000):
            for case in (Case(rows, width, "bf16"), Case(rows, width, "bf16", adds=True, dropout_p=0.1)):
                given = case.tensors(device)
                backward(case, given, forward(case, given))

    run(100)
    before = compiled()
    for rows in (1, 2, 16, 17, 64, 4096):
        run(rows)
    assert compiled() == before


def test_more_column_tiles_than_an_axis_has_programs(device: torch.device) -> None:
    """131,073 tiles of 256 columns: what did not launch at all."""
    case = Case(rows=2, width=(1 << 25) + 1, has_bias=False)
    given = case.tensors(device)
    found = forward(case, given)
    gradients = backward(case, given, found, asked="rw")
    x, weight = (given[name].requires_grad_() for name in ("x", "weight"))
    y = torch.nn.functional.layer_norm(x, (case.width,), weight, None, EPS)
    torch.testing.assert_close(found[0], y, atol=1e-3, rtol=1e-3)
    for letter, expected in zip("rw", torch.autograd.grad(y, (x, weight), given["dy"]), strict=True):
        torch.testing.assert_close(gradients[letter], expected, atol=1e-3, rtol=1e-3)
