"""Host cost of one eager call of each public operation on tiny tensors, beside PyTorch's own function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.host import MAX_CALL_US, host_pairs
from fastattn import dispatch

_PAIRS = host_pairs("cpu")


@pytest.mark.skipif(
    dispatch.INTERPRETING, reason="TRITON_INTERPRET is set: the interpreter's time says nothing"
)
@pytest.mark.parametrize("provider", ("fastattn", "torch"))
@pytest.mark.parametrize("name", _PAIRS)
def test_host_cost(name: str, provider: str, benchmark: Any) -> None:
    call = _PAIRS[name][("fastattn", "torch").index(provider)]
    benchmark.extra_info["bound_us_above_torch"] = MAX_CALL_US
    with torch.no_grad():
        benchmark.pedantic(call, rounds=30, iterations=200, warmup_rounds=5)
