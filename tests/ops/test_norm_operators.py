"""The registered operators of the normalizations: opcheck, and statistics of any strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn.testing import make_tensor
from tests.ops.comparison import ALL_CHECKS, CHECKS_OF_ARGUMENTS

FORWARD, BACKWARD = torch.ops.fastattn.norm_forward.default, torch.ops.fastattn.norm_backward.default


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
def test_opcheck(centered: bool, everything: bool, device: torch.device) -> None:
    x = make_tensor(4, 3, 2, 5, device=device, dtype=torch.bfloat16).transpose(0, 1)
    options: tuple[Any, ...] = (2, 1e-5, centered, False, 0.0, None, torch.bfloat16)
    weight = rowscale = seed = residual = None
    if everything:
        weight = make_tensor(2, 5, device=device)
        residual = make_tensor(3, 4, 2, 5, device=device)
        rowscale, seed = make_tensor(3, 4, device=device), torch.tensor([1, 2], device=device)
        options = (2, 1e-5, centered, True, 0.5, torch.float32, torch.float16)
    checks = ALL_CHECKS if everything and centered else CHECKS_OF_ARGUMENTS
    torch.library.opcheck(FORWARD, (x, residual, weight, weight, rowscale, seed, *options), test_utils=checks)
    y, summed, mean, rstd = FORWARD(x, residual, weight, weight, rowscale, seed, *options)
    kept, gradient = (summed, summed) if everything else (x, None)
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float32)
    flags = (2, centered, True, False, 0.5 if everything else 0.0)
    arguments = (gradient, kept, weight, weight, rowscale, seed, mean if centered else None, rstd, *flags)
    if everything:
        torch.library.opcheck(BACKWARD, (y, *arguments, *dtypes), test_utils=checks)
    else:
        torch.library.opcheck(BACKWARD, (y, *arguments, torch.bfloat16, None, None, None), test_utils=checks)


def test_backward_takes_any_strides_of_the_statistics(device: torch.device) -> None:
    x = make_tensor(3, 4, 8, device=device)
    y, _, mean, rstd = FORWARD(x, None, None, None, None, None, 1, 1e-5, True, False, 0.0, None, x.dtype)
    turned = [statistic.t().contiguous().t() for statistic in (mean, rstd)]
    before, after = (
        (y, None, x, None, None, None, None),
        (1, True, False, False, 0.0, x.dtype, None, None, None),
    )
    assert torch.equal(BACKWARD(*before, *turned, *after)[0], BACKWARD(*before, mean, rstd, *after)[0])
