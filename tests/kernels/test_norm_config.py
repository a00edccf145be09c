"""The launch configs that the norms are given."""

from __future__ import annotations

import math

import pytest

from fastattn.kernels._norm_config import select_norm_backward_config, select_norm_forward_config
from fastattn.kernels._target import KNOWN_TARGETS
from tests.norm_checks import (
    DTYPES,
)


@pytest.mark.parametrize("target", KNOWN_TARGETS)
@pytest.mark.parametrize("heavy", [False, True], ids=["light", "heavy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_configs_cover_every_width(dtype: str, heavy: bool, target: str) -> None:
    known = KNOWN_TARGETS[target]
    lanes = 64 if known.backend == "hip" else 32
    for exponent in range(21):
        for width in (2**exponent, 2**exponent + 1, 3 * 2**exponent):
            alignment, dtypes = math.gcd(width, 16), [DTYPES[dtype]] * 3
            ahead = select_norm_forward_config(width, alignment, DTYPES[dtype], heavy, known)
            back = select_norm_backward_config(width, alignment, dtypes, heavy, known)
            for config in (ahead, back.walk, back.row_means, back.sums):
                tile = config.block_m * config.block_n
                assert tile.bit_count() == 1
                assert config.block_n >= 4  # of which one draw of random numbers serves as many
                assert config.num_warps * lanes <= 1024
                # At most 32 elements a thread, or their sums spill.
                assert tile <= 32 * config.num_warps * lanes
            # What is in flight fits, with both programs of 8 warps.
            tile_bytes = back.walk.block_m * back.walk.block_n * 3 * DTYPES[dtype].itemsize
            programs = max(16 * 32 // (back.walk.num_warps * lanes), 1)
            assert programs * (back.walk.num_stages - 1) * tile_bytes < known.shared_memory
            # At most a few megabytes of partial sums for each parameter at the usual widths.
            assert back.programs <= 8 * known.multiprocessors
