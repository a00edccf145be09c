"""One training step of the GPT with each implementation: forward, backward and the optimizer's update."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import GptCase
from benchmarks.conftest import median_of, time_call
from benchmarks.costs import gpt_step_flops
from benchmarks.demo_options import IMPLEMENTATIONS
from benchmarks.measure import Failed, release
from benchmarks.memory import peak_memory
from benchmarks.suites import TRAINING_STEPS
from benchmarks.training_step import make_step

# On a CPU each compiled step takes half a minute to build; `python -m benchmarks demo` times those.
_NAMES = [n for n, (_, compiled) in IMPLEMENTATIONS.items() if torch.cuda.is_available() or not compiled]
_CASES = TRAINING_STEPS["cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("case", _CASES, ids=[case.name for case in _CASES])
def test_gpt_step(case: GptCase, name: str, device: torch.device, benchmark: Any) -> None:
    release(device)
    torch._dynamo.reset()
    try:
        step = make_step(case, name, device)
    except Failed as failure:
        if failure.status == "out of memory":
            pytest.skip("out of memory")
        raise
    time_call(benchmark, step, device)
    flops, milliseconds = gpt_step_flops(case), median_of(benchmark)
    benchmark.extra_info |= {
        "flops": flops,
        "tflops": flops / milliseconds / 1e9,
        "tokens_per_s": case.batch * case.seq_len / milliseconds * 1e3,
        "peak_bytes": peak_memory(step, device),
    }
