"""fastattn.rotary_tables, and the module that holds them."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.testing import make_tensor
from tests.rotary_checks import DIM, rotate_half


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tables_are_rounded_once(dtype: torch.dtype) -> None:
    """In float32 the angle 131071 is off by more than cos's own rounding, by a factor of ten thousand."""
    length = 131072
    cos, sin = fastattn.rotary_tables(length, 6, base=500.0, scale=0.5, dtype=dtype)
    assert cos.shape == sin.shape == (length, 3) and cos.dtype == sin.dtype == dtype
    position = torch.arange(length, dtype=torch.float64) * 0.5
    for pair in range(3):
        angle = position / 500.0 ** (2 * pair / 6)
        for table, expected in ((cos, angle.cos()), (sin, angle.sin())):
            torch.testing.assert_close(table[:, pair], expected.to(dtype))
    assert cos[0].eq(1).all() and sin[0].eq(0).all()


def test_tables_name_what_is_wrong() -> None:
    for keywords, error, message in (
        ({"rotary_dim": 5}, ValueError, "rotary_dim=5 must be even"),
        ({"seq_len": -1}, ValueError, "seq_len=-1 must be at least 0"),
        ({"base": 0.0}, ValueError, "base=0.0 must be positive"),
        ({"dtype": torch.int32}, TypeError, "dtype=torch.int32 must be a floating-point dtype"),
    ):
        with pytest.raises(error, match=message):
            fastattn.rotary_tables(**{"seq_len": 4, "rotary_dim": 4} | keywords)


def test_module(device: torch.device) -> None:
    module = fastattn.nn.RotaryEmbedding(DIM, 20, base=100.0, interleaved=True, device=device)
    assert not module.state_dict() and not list(module.parameters())
    x = make_tensor(2, 3, 7, DIM, device=device)
    cos, sin = fastattn.rotary_tables(20, DIM, base=100.0, device=device)
    expected = rotate_half(x, cos[4:11], sin[4:11], interleaved=True)
    torch.testing.assert_close(module(x, offsets=4), expected)
    positions = torch.arange(4, 11, device=device)
    torch.testing.assert_close(module(x, positions=positions), expected)
    packed = x[0].transpose(0, 1).contiguous()
    bounds = torch.tensor([0, 7], device=device)
    found = module(packed, offsets=4, cu_seqlens=bounds, max_seqlen=7, inplace=True)
    assert found is packed
    torch.testing.assert_close(found, expected[0].transpose(0, 1))
    with pytest.raises(ValueError, match="position 20 lies outside of cos and sin, which have 20 positions"):
        module(x, offsets=14)
    assert repr(module) == "RotaryEmbedding(8, max_seq_len=20, base=100.0, interleaved=True)"


def test_module_keeps_exact_tables() -> None:
    """model.bfloat16() would round them, and to_empty() of a model on "meta" leave whatever memory holds."""
    expected = fastattn.nn.RotaryEmbedding(DIM, 300).cos
    for module in (
        torch.nn.Sequential(fastattn.nn.RotaryEmbedding(DIM, 300)).bfloat16(),
        torch.nn.Sequential(fastattn.nn.RotaryEmbedding(DIM, 300, device="meta")).to_empty(device="cpu"),
    ):
        assert torch.equal(module[0].cos, expected)
