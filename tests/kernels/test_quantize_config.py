"""The pure functions behind e4m3's launches."""

from __future__ import annotations

import pytest
import torch

from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._quantize_config import quantize_tile, select_chunks
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS

E4M3_TARGETS = [KNOWN_TARGETS[name] for name in ("sm_89", "sm_90", "sm_100", "sm_120")]


@pytest.mark.parametrize("target", [INTERPRETER, *E4M3_TARGETS], ids=lambda target: target.name)
def test_chunks_cover_all_rows_once(target):
    for block_d in (32, 64, 128, 256):
        block_m = quantize_tile(block_d, target).block_m
        assert block_m >= 16 and block_m % 16 == 0
        for rows in (1, 255, 256, 257, 4096, 131_073):
            for heads in (1, 3, 8, 5000):
                chunks, chunk = select_chunks(rows, heads, block_m, target)
                assert chunk % block_m == 0 and (chunks - 1) * chunk < rows <= chunks * chunk


def test_few_heads_have_many_chunks_and_many_heads_one():
    """Two programs a multiprocessor, and no more, since whoever comes next reads the statistics of all."""
    target = KNOWN_TARGETS["sm_90"]
    assert select_chunks(32_768, 1, 32, target)[0] == 128  # of 256 rows
    assert target.multiprocessors < 8 * select_chunks(32_768, 8, 32, target)[0] <= 2 * target.multiprocessors
    assert select_chunks(32_768, 1024, 32, target) == (1, 32_768)


@pytest.mark.parametrize("target", E4M3_TARGETS, ids=lambda target: target.name)
def test_tiles_of_e4m3(target):
    """An 8-bit product is 32 deep, and keys are the depth of the second one."""
    for head_dim in (1, 64, 80, 128, 200, 256):
        for load in ("plain", "light", "thin", "plane", "heavy"):
            tiles = select_attention_config(head_dim, torch.float8_e4m3fn, target, load).forward
            assert tiles.block_n >= 32 and tiles.form == "pointers"
