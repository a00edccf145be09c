"""The rotary launchers: tiles, heads of a program, layouts and units, and the config that is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import reference, rotary_tables
from fastattn.kernels import rotary as module
from fastattn.kernels._rotary_config import RotaryConfig, heads_of_program, select_rotary_config
from fastattn.kernels._target import KNOWN_TARGETS
from fastattn.testing import assert_accurate, make_tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(tensors: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> None:
    """Both launchers against the formula, in whose float32 the peer is computed."""
    call = (cos, sin, None, None, None, 2, interleaved, conjugate)
    results = module.rotary_embedding(tensors, *call)
    overwritten = [x.clone() for x in tensors]
    module.rotary_embedding_in_place(overwritten, *call)
    sign = -1 if conjugate else 1
    for x, y, z in zip(tensors, results, overwritten, strict=True):
        options = {"interleaved": interleaved, "offsets": 2}
        truth = reference.rotary_embedding(x.double(), cos.double(), sign * sin.double(), **options)
        peer = reference.rotary_embedding(x.float(), cos.float(), sign * sin.float(), **options)
        assert_accurate(y, peer.to(x.dtype), truth)
        assert torch.equal(y, z)


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("head_dim, rotary_dim", [(2, 2), (6, 4), (16, 16), (126, 126), (127, 2), (40, 20)])
def test_tiles_of_any_width(head_dim: int, rotary_dim: int, interleaved: bool, device: torch.device) -> None:
    """5 positions are tiles of 4 and 1, and 3 and 4 heads programs of 2, of two tensors in one launch."""
    cos, sin = rotary_tables(7, rotary_dim, device=device)
    q = make_tensor(1, 3, 5, head_dim, device=device)
    k = make_tensor(1, 4, 5, head_dim, device=device, seed=1)
    for conjugate in (False, True) if head_dim == 16 else (head_dim == 6,):
        check([q, k], cos, sin, interleaved, conjugate)


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
def test_16_bit_features_and_tables(dtype: torch.dtype, interleaved: bool, device: torch.device) -> None:
    x = make_tensor(1, 3, 7, 16, dtype=dtype, device=device)
    for tables in (torch.float32, dtype):
        check([x], *rotary_tables(9, 16, dtype=tables, device=device), interleaved, False)


STRIDES = {
    "heads-within-rows": (7 * 3 * 8, 8, 3 * 8, 1),
    "of-qkv": (7 * 72, 24, 72, 1),
    "odd": (7 * 75, 25, 75, 1),
    "padded-rows": (3 * 7 * 12, 7 * 12, 12, 1),
    "last-not-contiguous": (7 * 3 * 16, 7 * 16, 16, 2),
    "heads-reversed-order": (1000, 8, 100, 1),
}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES.keys())
def test_layouts(strides: tuple[int, ...], device: torch.device) -> None:
    """Gaps hold NaN; in place they are still there afterwards, and nothing was copied to be read but the last."""
    x = make_tensor(2, 3, 7, 8, device=device, strides=strides)
    cos, sin = rotary_tables(9, 8, device=device)
    check([x], cos, sin, False, False)
    flat = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,))
    gaps = flat.isnan()
    expected = reference.rotary_embedding(x, cos, sin)
    module.rotary_embedding_in_place([x], cos, sin, None, None, None, 0, False, False)
    assert torch.equal(flat.isnan(), gaps)
    torch.testing.assert_close(x, expected)


def test_output_has_the_order_of_dimensions(device: torch.device) -> None:
    x = make_tensor(2, 7, 3, 8, device=device).transpose(1, 2)
    cos, sin = rotary_tables(7, 8, device=device)
    call = (cos, sin, None, None, None, 0, False, False)
    assert module.rotary_embedding([x], *call)[0].stride() == x.stride()
    holes = make_tensor(2, 7, 3, 3, 8, device=device)[:, :, 0].transpose(1, 2)
    assert module.rotary_embedding([holes], *call)[0].stride() == (7 * 3 * 8, 8, 3 * 8, 1)


def test_tables_of_other_strides(device: torch.device) -> None:
    """Halves of duplicated tables, as models keep them, are read in place; others are copied."""
    x = make_tensor(1, 2, 5, 8, device=device)
    cos, sin = rotary_tables(7, 8, device=device)
    wide = torch.cat((cos, cos), dim=-1)[:, :4]
    turned = sin.t().contiguous().t()
    check([x], wide, turned, False, False)


def test_configs_give_each_pair_in_place_a_thread() -> None:
    for target in KNOWN_TARGETS.values():
        threads_of_a_warp = 64 if target.backend == "hip" else 32
        for pairs in (1, 3, 16, 64, 128, 200, 1024, 4096):
            config = select_rotary_config(pairs, 0, torch.bfloat16, target)
            assert config.block_d >= pairs and config.block_d & (config.block_d - 1) == 0
            assert config.block_m * config.block_d >= config.num_warps * threads_of_a_warp
    for call, arch, tile in (
        ((64, 0), "sm_90", (16, 64, 0, 4)),
        ((64, 0), "gfx942", (16, 64, 0, 2)),
        ((16, 64), "sm_90", (32, 16, 64, 4)),
    ):
        target = KNOWN_TARGETS[arch]
        programs = 32 * target.multiprocessors
        assert select_rotary_config(*call, torch.bfloat16, target) == RotaryConfig(*tile, programs)
    assert select_rotary_config(1, 254, torch.bfloat16, KNOWN_TARGETS["sm_90"]).block_rest == 256


def test_programs_take_many_heads_where_there_are_many_positions() -> None:
    target = KNOWN_TARGETS["sm_90"]
    programs = select_rotary_config(64, 0, torch.bfloat16, target).programs
    assert programs == 32 * target.multiprocessors
    assert heads_of_program([32], 1, programs) == 1
    assert heads_of_program([32], 1 << 20, programs) == 32
    assert heads_of_program([32, 8], 1 << 20, programs) == 32
    for tiles in (500, 1024, 3000):
        group = heads_of_program([32], tiles, programs)
        groups = -(-32 // group)
        assert tiles * groups >= 16 * target.multiprocessors or group == 1
        assert group * groups < 32 + groups  # none has much less to do than another
    assert heads_of_program([3], 64, 32) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bf16", "fp32"))
def test_real_sizes(dtype: torch.dtype, interleaved: bool, device: torch.device) -> None:
    x = make_tensor(2, 4096, 32, 128, dtype=dtype, device=device).transpose(1, 2)
    check([x, x[:, :8]], *rotary_tables(4098, 128, device=device), interleaved, False)


@pytest.mark.gpu
def test_more_than_2_31_elements(device: torch.device) -> None:
    x = torch.ones(2, 1 << 17, 66, 128, dtype=torch.bfloat16, device=device).transpose(1, 2)
    cos, sin = rotary_tables(1 << 17, 128, device=device)
    last = x[-1:, -1:, -9:].clone()
    module.rotary_embedding_in_place([x], cos, sin, None, None, None, 0, False, False)
    expected = reference.rotary_embedding(last, cos, sin, offsets=(1 << 17) - 9)
    torch.testing.assert_close(x[-1:, -1:, -9:], expected)
