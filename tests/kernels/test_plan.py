"""Plans of launches: kept by what they depend on, and forgotten where the choice of configs changes."""

import pytest

from fastattn.kernels._config import asked_configs, forced_config
from fastattn.kernels._pointwise_config import TileConfig, select_tile_config, tile_plan
from fastattn.kernels._target import KNOWN_TARGETS

TARGET = KNOWN_TARGETS["sm_90"]


def test_a_plan_is_made_once_for_a_layout() -> None:
    first = tile_plan((6, 8), ((8, 1),), None, TARGET)
    assert tile_plan((6, 8), ((8, 1),), None, TARGET) is first
    assert tile_plan((6, 8), ((11, 1),), None, TARGET).distances == (11,)


def test_a_forced_config_goes_before_a_kept_plan() -> None:
    if not hasattr(select_tile_config, "__wrapped__"):
        pytest.skip("this choice is not tunable")
    usual = tile_plan((6, 8), ((8, 1),), None, TARGET)
    with forced_config(select_tile_config, TileConfig(2, 16, 8)):
        assert tile_plan((6, 8), ((8, 1),), None, TARGET).constants["num_warps"] == 8
    assert tile_plan((6, 8), ((8, 1),), None, TARGET) == usual
    with asked_configs() as asked:
        tile_plan((6, 8), ((8, 1),), None, TARGET)
    assert [call.select for call in asked] == ["select_tile_config"]
