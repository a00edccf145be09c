"""Launch configs of the MLP's kernels, and the model that chooses its path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastattn.kernels._linear_config import select_linear_config, select_mlp_path, widest_fused
from fastattn.kernels._pointwise_config import select_tile_config, select_walk_config
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS

BF16 = torch.bfloat16
H200, A100, MI300 = (KNOWN_TARGETS[name] for name in ("sm_90", "sm_80", "gfx942"))


@pytest.mark.parametrize("target", KNOWN_TARGETS.values(), ids=KNOWN_TARGETS.keys())
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_tiles_in_flight_fit_shared_memory(dtype: torch.dtype, target: object) -> None:
    c = select_linear_config(dtype, target)
    assert c.num_stages * (c.block_m + c.block_n) * c.block_k * dtype.itemsize <= target.shared_memory
    for side in (c.block_m, c.block_n, c.block_k):
        assert side >= 16 and side & (side - 1) == 0
    assert c.pieces in (1, 2, 4) and c.block_n // c.pieces >= 16 and c.block_m <= 256


@pytest.mark.parametrize(
    "target", [*KNOWN_TARGETS.values(), INTERPRETER], ids=[*KNOWN_TARGETS, "interpreter"]
)
def test_pointwise_tiles_are_powers_of_two_that_hold_the_width(target: object) -> None:
    for width in (1, 3, 64, 768, 1100, 65_536):
        for c in (
            select_tile_config(width, 16, BF16, 1, target),
            select_walk_config(width, 16, BF16, target),
        ):
            assert c.block_n & (c.block_n - 1) == 0 and c.block_m & (c.block_m - 1) == 0
            assert c.block_n <= max(64, 2 * width - 1)


def test_the_walks_programs_follow_the_device_and_nothing_else() -> None:
    assert select_walk_config(768, 16, BF16, H200).programs == 8 * 132
    assert select_walk_config(768, 16, BF16, replace(H200, multiprocessors=100)).programs == 800
    # Narrow loads take a register for each address.
    wide, narrow = (select_walk_config(768, alignment, BF16, H200) for alignment in (16, 1))
    assert narrow.block_m * narrow.block_n < wide.block_m * wide.block_n


@pytest.mark.parametrize(
    ("rows", "width", "hidden", "target", "path"),
    [
        # GPT-2's width: the pass over the hidden values is a large part of the time.
        (16_384, 768, 3072, H200, "fused"),
        (16_384, 1024, 4096, H200, "fused"),
        # Seven-billion-parameter widths: the products are nearly all of it.
        (16_384, 4096, 16_384, H200, "separate"),
        (16_384, 768, 3072, A100, "fused"),
        (16_384, 4096, 16_384, A100, "separate"),
        # Few rows fill few multiprocessors with tiles of 128.
        (64, 768, 3072, H200, "separate"),
        (1, 4096, 16_384, H200, "separate"),
        (0, 768, 3072, H200, "separate"),
    ],
)
def test_path_by_shape(rows: int, width: int, hidden: int, target: object, path: str) -> None:
    found, reason = select_mlp_path(rows, width, hidden, BF16, target)
    assert found == path
    assert rows == 0 or ("below" in reason and "assumed, not measured" in reason)


def test_tiles_that_leave_multiprocessors_idle_count_against_fusing() -> None:
    """1,408 rows are 11 x 12 tiles, one wave of 132; one row more is a second wave for its 12 tiles."""
    assert select_mlp_path(1408, 768, 3072, BF16, H200)[0] == "fused"
    assert select_mlp_path(1409, 768, 3072, BF16, H200)[0] == "separate"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((768, 3072, torch.float32, H200), "dtype=torch.float32"),
        ((768, 3072, BF16, INTERPRETER), "the interpreter"),
        ((768, 3072, torch.float16, KNOWN_TARGETS["sm_75"]), "nothing is assumed of the speed of sm_75"),
        ((100, 400, BF16, H200), "width=100 is no multiple of 16"),
        ((96, 100, BF16, H200), "hidden=100 is no multiple of 16"),
    ],
)
def test_what_is_never_fused_says_why(arguments: tuple[object, ...], reason: str) -> None:
    found, said = select_mlp_path(4096, *arguments)
    assert found == "separate" and reason in said


def test_the_widest_that_is_fused_is_where_the_model_turns() -> None:
    for target in (H200, A100):
        widest = widest_fused(BF16, target)
        assert 1024 <= widest <= 4096
        assert select_mlp_path(None, widest, 4 * widest, BF16, target)[0] == "fused"
        wider = widest + 16
        assert select_mlp_path(None, wider, 4 * wider, BF16, target)[0] == "separate"
    assert widest_fused(torch.float32, H200) == widest_fused(BF16, INTERPRETER) == 0
