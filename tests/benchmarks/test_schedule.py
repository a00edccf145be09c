"""The order in which attention's programs start: the kernels' is the model's, and it fills a device evenly."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.schedule import OUTSIDE, Work, least, makespan, order, row, sections, static_makespan
from fastattn.kernels._attention_config import heads_together
from fastattn.kernels._attention_plan import backward_plan, forward_plan
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS
from fastattn.kernels._tiles import _split_program

H200 = KNOWN_TARGETS["sm_90"]


@triton.jit(do_not_specialize=["TILES", "HEADS", "TOGETHER", "ABSENT"])
def _places_kernel(places_ptr, TILES, HEADS, TOGETHER, ABSENT):
    tile, batch, head = _split_program(TILES, HEADS, TOGETHER, ABSENT)
    place = places_ptr + tl.program_id(0) * 2
    tl.store(place, tile.to(tl.int64))
    tl.store(place + 1, batch * HEADS + head)


@pytest.mark.parametrize(
    "tiles, heads, batch, together",
    [(3, 2, 2, 1), (3, 5, 1, 2), (2, 3, 2, 4), (1, 3, 2, 2), (2, 2, 2, 4), (2, 2, 2, None)],
    ids=str,
)
def test_kernels_have_the_order_of_the_model(
    tiles: int, heads: int, batch: int, together: int | None, device: torch.device
) -> None:
    """Each tile of each head once: whole sections, one that is not, one of all heads."""
    absent = None if together is None else -heads * batch % together
    sections = {"TOGETHER": together, "ABSENT": absent}
    places = torch.full((tiles * heads * batch, 2), -1, device=device)
    _places_kernel[(places.size(0),)](places_ptr=places, TILES=tiles, HEADS=heads, **sections)
    found = [tuple(place) for place in places.tolist()]
    assert found == order(tiles, heads * batch, together or 1)
    assert sorted(found) == list(product(range(tiles), range(heads * batch)))


def test_the_model_starts_a_program_where_one_ends() -> None:
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 1, 3], 2) == 4
    assert static_makespan([4, 3, 2, 1], 2) == 5
    assert least([4, 1, 1], 3) == 4 and least([2, 2, 2], 3) == 2
    work = Work(1, 200, 128, 64)
    assert [work.time(tile) for tile in range(work.tiles)] == [4 + OUTSIDE, 2 + OUTSIDE]


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("seq", [512, 1024, 2048, 4096, 8192, 16384])
def test_sections_fill_the_device(seq: int, programs: int) -> None:
    """16,384 tokens of 16 heads of 128: at most 6 % over the least time, where head after head takes up to 14 %."""
    work = Work(16 * 16384 // seq, seq, 128, 64)
    together = sections(work, 512, H200)
    one, mixed, everything, *_ = row(work, together, programs * H200.multiprocessors)
    assert 1.0 <= everything <= mixed + 0.02
    assert mixed <= min(1.06, one + 0.001)


def test_sections_stay_in_half_of_the_l2() -> None:
    """A pure function of sizes; None, head after head, without a cache, and where nothing is to be balanced."""
    for seq in (512, 4096, 32768, 1 << 20):
        together = max(1, 25 * 2**20 // (seq * 512))
        assert heads_together(seq * 512, 1000, True, H200) == (together, -1000 % together)
    assert heads_together(1 << 20, 7, True, H200) == (7, 0)
    assert heads_together(0, 16, True, H200) == (16, 0)
    assert heads_together(1 << 20, 16, False, H200) is None
    assert heads_together(1 << 20, 16, True, KNOWN_TARGETS["gfx942"]) is None


def _layout(left: int, right: int, dtype: torch.dtype = torch.bfloat16, heads: int = 4) -> tuple[object, ...]:
    shapes = (16, heads, 4096, 128), (16, 2, 4096, 128)
    strides = tuple((math.prod(shape[1:]), 4096 * 128, 128, 1) for shape in shapes for _ in range(3))[:3]
    return *shapes, strides, dtype, "plain", (left, right, False, 16, 4096, 4096), None, H200


def test_plans_count_what_the_loops_read() -> None:
    """Queries of a group share their keys; a program of keys walks the queries of its whole group."""
    causal, whole, window = (_layout(-1, 0), _layout(-1, -1), _layout(512, 0))
    plan = backward_plan(*causal)
    # 2 MB of keys and values a key head, of 32: 12 at a time, of which the first section lacks 4.
    for launch in (forward_plan(*causal).forward, plan.dq):
        assert (launch.constants["HEADS_TOGETHER"], launch.constants["HEADS_ABSENT"]) == (24, 8)
    for launch in (plan.dk_dv, plan.dv):
        assert (launch.constants["HEADS_TOGETHER"], launch.constants["HEADS_ABSENT"]) == (6, 4)
    for layout in (whole, window):
        assert forward_plan(*layout).forward.constants["HEADS_TOGETHER"] is None
        assert backward_plan(*layout).dk_dv.constants["HEADS_ABSENT"] is None


def test_the_interpreter_has_sections() -> None:
    """So that tests of attention run them, also one that is not whole."""
    assert heads_together(67 * 32 * 4, 8, True, INTERPRETER) == (3, 1)
