"""Plans of launches: kept by what they depend on, and forgotten where the choice of configs changes."""

from typing import Any

import torch

from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_forms import select_attention_form
from fastattn.kernels._attention_plan import backward_plan, forward_plan, read_in_place
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._config import asked_configs, forced_config
from fastattn.kernels._pointwise_config import TileConfig, select_tile_config, tile_plan
from fastattn.kernels._target import KNOWN_TARGETS

TARGET = KNOWN_TARGETS["sm_90"]


def test_a_plan_is_made_once_for_a_layout() -> None:
    first = tile_plan((6, 8), ((8, 1),), torch.bfloat16, 1, None, TARGET)
    assert tile_plan((6, 8), ((8, 1),), torch.bfloat16, 1, None, TARGET) is first
    assert tile_plan((6, 8), ((11, 1),), torch.bfloat16, 1, None, TARGET).distances == (11,)


def test_a_forced_config_goes_before_a_kept_plan() -> None:
    usual = tile_plan((6, 8), ((8, 1),), torch.bfloat16, 1, None, TARGET)
    with forced_config(select_tile_config, TileConfig(2, 16, 8)):
        assert tile_plan((6, 8), ((8, 1),), torch.bfloat16, 1, None, TARGET).constants["num_warps"] == 8
    assert tile_plan((6, 8), ((8, 1),), torch.bfloat16, 1, None, TARGET) == usual
    with asked_configs() as asked:
        tile_plan((6, 8), ((8, 1),), torch.bfloat16, 1, None, TARGET)
    assert [call.select for call in asked] == ["select_tile_config"]


def attention_layout(**changes: Any) -> tuple[Any, ...]:
    """The arguments of a plan of attention: 2 sequences, 4 heads on 2, 130 queries on 260 keys, causal."""
    arguments = {
        "shape_q": (2, 4, 130, 64),
        "shape_v": (2, 2, 260, 64),
        "strides": ((33280, 8320, 64, 1), (33280, 16640, 64, 1), (33280, 16640, 64, 1)),
        "dtype": torch.bfloat16,
        "load": "plain",
        "reach": (-1, 0, False, 2, 130, 260),
        "config": None,
        "target": TARGET,
    }
    return tuple((arguments | changes).values())


def test_attention_has_a_plan_for_each_layout_and_reach() -> None:
    plan = forward_plan(*attention_layout())
    assert forward_plan(*attention_layout()) is plan
    tiles = select_attention_config(64, torch.bfloat16, TARGET).forward
    assert plan.forward.tiles == tiles and plan.forward.grid == (-(-130 // tiles.block_m) * 8,)
    window = forward_plan(*attention_layout(reach=(7, 0, True, 2, 130, 260), load="light")).forward
    found = [window.constants[name] for name in ("LEFT", "RIGHT", "HAS_LEFT", "HAS_RIGHT", "BOTTOM_RIGHT")]
    assert found == [7, 0, True, True, True]
    packed = forward_plan(*attention_layout(reach=(-1, 0, False, 5, 300, 270))).forward
    assert packed.grid == (-(-300 // tiles.block_m) * 20,)
    assert packed.constants["MAX_SEQ_Q"] == 300 and "MAX_SEQ_K" not in packed.constants
    backward = backward_plan(*attention_layout())
    assert backward.dk_dv.constants["KV_HEADS"] == 2 and backward.dq.constants["HEADS"] == 4
    assert backward.dk_dv.grid == (-(-260 // backward.dk_dv.tiles.block_n) * 4,)


def test_attention_copies_what_its_plan_cannot_read() -> None:
    tensors = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 16, 4).transpose(2, 3)
    strides = tuple(tensor.stride() for tensor in tensors)
    plan = forward_plan(*attention_layout(strides=strides))
    assert plan.in_place == (True, False)
    one, other = read_in_place(tensors, plan.in_place)
    assert one is tensors[0] and other.stride() == (64, 64, 16, 1)


def test_a_forced_config_goes_before_a_kept_plan_of_attention() -> None:
    usual = forward_plan(*attention_layout()), backward_plan(*attention_layout())
    tiles = AttentionTiles(16, 16, 4, 1)
    with forced_config(select_attention_config, AttentionConfig(tiles, tiles, tiles, separate_dk_dv=True)):
        assert forward_plan(*attention_layout()).forward.tiles == tiles
        backward = backward_plan(*attention_layout())
        assert backward.dq.tiles == tiles and backward.separate_dk_dv
    assert (forward_plan(*attention_layout()), backward_plan(*attention_layout())) == usual


def test_what_descriptors_cannot_read_has_a_plan_of_its_own() -> None:
    """Of one layout: whether descriptors can read it also depends on addresses, which no plan may."""
    config = select_attention_form(64, torch.bfloat16, TARGET, "plain", "descriptors")
    with_them = forward_plan(*attention_layout(config=config))
    without = forward_plan(*attention_layout(config=config), described=False)
    assert with_them.descriptors and with_them.forward.tiles is config.forward
    assert not without.descriptors and without == forward_plan(*attention_layout())
