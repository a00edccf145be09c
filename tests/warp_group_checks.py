"""What the simulated tests of attention by warp groups share: inputs among NaN, and faults that are to be found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.attention_checks import AttentionCase, assert_attention_accurate
from tests.gluon_device import SimulationError

Change = tuple[str, str]

# Text of the rings (`fastattn.kernels._warp_groups`), and what in its place is to fail.
RING_CHANGES: dict[str, Change] = {
    "no-wait-for-a-free-slot": (
        "    mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)",
        "    pass",
    ),
    "free-in-the-other-phase": ("((step // STAGES) & 1) ^ 1", "(step // STAGES) & 1"),
    "no-wait-for-a-full-slot": ("mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)", "pass"),
    "full-always-in-the-first-phase": ("(step % STAGES), (step // STAGES) & 1)", "(step % STAGES), 0)"),
    "slots-never-released": ("mbarrier.arrive(free.index(step % STAGES), count=1)", "pass"),
    "one-arrival-frees-a-slot": ("_barriers(STAGES, CONSUMERS)", "_barriers(STAGES, 1)"),
}


def among_nan(tensor: Tensor) -> Tensor:
    """A copy whose rows, heads and columns lie among NaN."""
    batch, heads, seq, width = tensor.shape
    memory = tensor.new_full((batch, seq + 70, heads + 1, width + 8), math.nan)
    return memory[:, :seq, :heads, :width].transpose(1, 2).copy_(tensor)


def assert_some_schedule_fails(
    run: Callable[..., dict[str, Tensor]], cases: Sequence[AttentionCase], change: Change, seeds: int
) -> None:
    """`run(case, seed, change=change)` is wrong, or says so, for one of the cases under one of the schedules."""
    for seed in range(seeds):
        for case in cases:
            try:
                found = run(case, seed, change=change)
                assert_attention_accurate(case, case.inputs(torch.device("cpu")), found)
            except (SimulationError, AssertionError):
                return
    pytest.fail("no schedule showed it")
