"""Attention of widths whose rows lie in two tiles, see `fastattn.kernels._parts`: which do, and that they are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import fastattn
from fastattn.kernels import _attention_plan
from fastattn.kernels._attention_config import select_attention_config, takes_parts, width_class
from fastattn.kernels._attention_forms import fitting_config, select_attention_form
from fastattn.kernels._attention_plan import backward_plan, forward_plan
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._config import forced_config
from fastattn.kernels._layout import block_d, first_block, rows_narrow
from fastattn.kernels._parts import _add_product_to_rows, _store_parts
from fastattn.kernels._plan import forget_plans
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS, Target
from fastattn.ops import _attention_triton
from tests.attention_checks import AttentionCase, assert_attention_accurate
from tests.attention_options import Case, check_options
from tests.kernels.test_attention import _with_gaps, run

BF16, FP32 = torch.bfloat16, torch.float32
H200 = KNOWN_TARGETS["sm_90"]
# Two tiles of queries and of keys, of heads that do not share one; the options take every kernel and branch.
SMALL = Case(1, 2, 2, 35, 40, scale=0.1)
WIDTHS = {
    (65, 65): dict(causal="top_left", bias="hqk"),
    (72, 72): dict(lengths=True, batch=2),
    (80, 80): dict(packed=True, batch=2, causal="bottom_right"),
    (81, 81): dict(window=(9, 5), sinks=True),
    (96, 96): dict(dropout_p=0.3, bias="k"),
    (97, 97): dict(causal="top_left"),
    (144, 144): dict(softcap=3.0, causal="bottom_right"),
    (160, 160): dict(mask="qk", sinks=True),
    (192, 192): dict(alibi="h", causal="top_left", bias="qk"),
    (192, 128): dict(causal="bottom_right", bias="hqk", lengths=True),
    (128, 192): dict(causal="top_left", dropout_p=0.3),
    (80, 64): dict(bias="hk", window=(9, 5)),
    (64, 80): dict(packed=True, sinks=True),
}


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_width_is_right(widths: tuple[int, int], device: torch.device) -> None:
    """Forward and backward against the formula; NaN lies where no program may read (`check_options`)."""
    head_dim, v_dim = widths
    check_options(replace(SMALL, head_dim=head_dim, v_dim=v_dim, **WIDTHS[widths]), "triton", device)


@pytest.mark.parametrize("head_dim", [65, 72, 144, 176])
@pytest.mark.parametrize(
    "separate, reduce_dq", [(False, False), (True, True)], ids=["two-kernels", "reduction"]
)
def test_columns_behind_the_last_are_neither_read_nor_written(
    head_dim: int, separate: bool, reduce_dq: bool, device: torch.device
) -> None:
    """NaN between the rows, where the second tile is wider than what is left of them."""
    tiles = AttentionTiles(32, 32, 1, 1)
    config = AttentionConfig(tiles, tiles, tiles, separate, reduce_dq=reduce_dq)
    case = AttentionCase(batch=2, causal="top_left", seq_q=35, seq_k=40, head_dim=head_dim)
    inputs = {name: _with_gaps(t) if t.dim() == 4 else t for name, t in case.inputs(device).items()}
    assert_attention_accurate(case, inputs, run(case, inputs, config))


@pytest.mark.parametrize("arch, head_dim, v_dim", [("sm_90", 96, 96), ("sm_80", 192, 128)], ids=str)
def test_shipped_tiles_of_parts_are_right(arch: str, head_dim: int, v_dim: int, device: torch.device) -> None:
    config = select_attention_config(head_dim, BF16, KNOWN_TARGETS[arch], "plain", v_dim)
    case = Case(1, 1, 1, 130, 133, head_dim, v_dim, torch.float16, causal="bottom_right", scale=0.1)
    with forced_config(select_attention_config, config):
        check_options(case, "triton", device)


@triton.jit
def _write_ones(stored, added, HEAD_DIM: tl.constexpr):
    parts = (tl.full((16, 64), 1.0, tl.float32), tl.full((16, 16), 1.0, tl.float32))
    _store_parts(stored, parts, 0, 80, 16, HEAD_DIM, 16, 64)
    ones = tl.full((16, 16), 1.0, tl.float32)
    _add_product_to_rows((added, 80, 0), ones, parts, 0, 16, HEAD_DIM, 16, 64)


def test_padding_of_the_second_tile_is_not_written(device: torch.device) -> None:
    """Not even where it is not 0: rows of 72 columns, 80 apart."""
    stored, added = torch.zeros(2, 16, 80, device=device)
    _write_ones[(1,)](stored, added, HEAD_DIM=72)
    assert stored[:, :72].eq(1.0).all() and added[:, :72].eq(16.0).all()
    assert not stored[:, 72:].any() and not added[:, 72:].any()


def test_few_queries_have_whole_rows(device: torch.device) -> None:
    """Also where a group's heads share a tile and the keys are split."""
    check_options(Case(1, 4, 1, 3, 150, 80, 144, causal="bottom_right", scale=0.1), "triton", device)


@pytest.mark.parametrize(
    "width, first",
    [(16, 16), (48, 64), (64, 64), (65, 64), (72, 64), (80, 64), (96, 64), (97, 128), (112, 128), (128, 128),
     (129, 128), (144, 128), (160, 128), (192, 128), (193, 256), (224, 256), (256, 256), (257, 512), (320, 512)],
)  # fmt: skip
def test_which_widths_have_two_tiles(width: int, first: int) -> None:
    """Where the second is at most half as wide as the first: fewer columns than in one tile, by a quarter or more."""
    assert first_block(width) == first
    if first < width:
        assert first + block_d(width - first) <= 0.75 * block_d(width)


def test_which_targets_have_two_tiles() -> None:
    found = {arch: takes_parts(BF16, target, "plain") for arch, target in KNOWN_TARGETS.items()}
    assert {arch for arch, takes in found.items() if takes} == {"sm_80", "sm_90"}
    assert not any(takes_parts(FP32, target, "plain") for target in KNOWN_TARGETS.values())
    assert not takes_parts(torch.float8_e4m3fn, H200, "plain")
    assert not takes_parts(BF16, H200, "light")
    assert takes_parts(FP32, INTERPRETER, "heavy")


CLASSES = {
    (64, 64): 64, (65, 65): 128, (72, 72): 80, (192, 100): 256, (80, 80): 80,
    (80, 64): 80, (96, 96): 96, (97, 97): 128, (144, 144): 160,
    (160, 160): 160, (192, 192): 192, (192, 136): 192, (192, 128): (192, 128), (144, 64): (192, 128),
    (256, 128): 256, (300, 300): 512,
}  # fmt: skip


def test_tiles_follow_the_second_part_on_sm_80() -> None:
    a100 = KNOWN_TARGETS["sm_80"]
    found = [width_class(width, BF16, a100, "plain", 128) for width in (136, 144, 160, 184, 192)]
    assert found == [160, 160, 160, (192, 128), (192, 128)]


@pytest.mark.parametrize(
    "widths, distance, narrow",
    [
        ((96, 96), 96, False),
        ((96, 96), 104, False),
        ((96, 96), 100, True),
        ((96, 96), 97, True),
        ((90, 96), 96, True),
    ],
    ids=["dense", "wide-rows", "of-100", "odd", "a-narrow-q"],
)
def test_narrow_loads_have_the_tiles_of_the_padded_width(
    widths: tuple[int, int], distance: int, narrow: bool
) -> None:
    """In larger tiles they spill: their addresses take the registers."""
    assert not rows_narrow((96, 96), [(80_000, 96, 192, 1)])
    assert rows_narrow((96, 96), [(80_000, 96, 192, 1), (80_000, 100, 200, 1)])
    q_dim, v_dim = widths
    strides = tuple((400 * distance, 200 * distance, distance, 1) for _ in range(5))
    shapes = (1, 2, 200, q_dim), (1, 2, 200, v_dim)
    reach = (-1, 0, False, 1, 200, 200)
    width = 128 if narrow else 96
    expected = select_attention_config(width, BF16, H200, "plain", width)
    forward = forward_plan(*shapes, strides[:3], BF16, "plain", reach, None, H200)
    backward = backward_plan(*shapes, strides, BF16, "plain", reach, None, H200)
    found = forward.forward.tiles, backward.dq.tiles, backward.dk_dv.tiles
    assert found == (expected.forward, expected.dq, expected.dk_dv)


@pytest.mark.parametrize("distance", [96, 97])
def test_explain_asks_for_the_config_of_the_launch(distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def recorded(*arguments: Any) -> AttentionConfig:
        asked.append(arguments)
        return fitting_config(*arguments)

    for place in (_attention_plan, _attention_triton):
        monkeypatch.setattr(place, "fitting_config", recorded)
    rows = torch.zeros(1, 2, 140, distance)
    q, v = rows[..., :96], rows[..., :64]
    forget_plans()
    fastattn.explain(q, q, v, implementation="triton")
    fastattn.attention(q, q, v, implementation="triton")
    forget_plans()
    assert len(asked) > 1 and all(call[2:] == asked[0][2:] for call in asked)


@pytest.mark.parametrize("widths", CLASSES, ids=str)
def test_tiles_follow_both_widths(widths: tuple[int, int]) -> None:
    """One config a class, and that of the padded width where rows are not in two tiles."""
    head_dim, v_dim = widths
    assert width_class(head_dim, BF16, H200, "plain", v_dim) == CLASSES[widths]
    padded = min(block_d(head_dim, 64), 512)
    for dtype, arch in ((BF16, "gfx942"), (BF16, "sm_100"), (FP32, "sm_90"), (torch.float8_e4m3fn, "sm_90")):
        assert width_class(head_dim, dtype, KNOWN_TARGETS[arch], "plain", v_dim) == padded
    if head_dim <= 256:
        asked = select_attention_config(head_dim, BF16, H200, "heavy", v_dim)
        assert asked == select_attention_config(padded, BF16, H200, "heavy")


def blocks(
    config: AttentionConfig | None,
    widths: tuple[int, int],
    target: Target,
    dtype: torch.dtype = BF16,
    seq_q: int = 4096,
) -> set[tuple[int, int]]:
    """(BLOCK_D, BLOCK_V) of all launches of a call that have both."""
    shape_q, shape_v = (2, 8, seq_q, widths[0]), (2, 2, 4096, widths[1])
    reach = (-1, 0, True, 2, seq_q, 4096)
    strides = ((1, 1, 1, 1),) * 5
    forward = forward_plan(shape_q, shape_v, strides[:3], dtype, "plain", reach, config, target, True)
    backward = backward_plan(shape_q, shape_v, strides, dtype, "plain", reach, config, target)
    launches = [forward.forward]
    if seq_q > 1:
        launches += [backward.dq, backward.dk_dv, backward.dv, backward.dbias]
    return {(launch.constants["BLOCK_D"], launch.constants["BLOCK_V"]) for launch in launches}


def test_launches_have_the_tiles_that_their_loads_serve() -> None:
    """Pointers two, descriptors one of all columns, and few queries one as well."""
    assert blocks(None, (192, 128), H200) == {(128, 128)}
    assert blocks(None, (72, 160), H200) == {(64, 128)}
    assert blocks(None, (96, 96), H200, seq_q=1) == {(128, 128)}
    for arch, dtype in (("gfx942", BF16), ("sm_100", BF16), ("sm_90", FP32)):
        assert blocks(None, (96, 192), KNOWN_TARGETS[arch], dtype) == {(128, 256)}
    described = select_attention_form(96, BF16, H200, "plain", "descriptors")
    # Of the bias's gradient, which has no form of its own, two.
    assert blocks(described, (96, 96), H200) == {(128, 128), (64, 64)}
