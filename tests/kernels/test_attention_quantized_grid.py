"""Attention on e4m3 operands where queries are few: heads of a group in one tile, keys in splits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_decode_config import select_decode_config
from fastattn.kernels._attention_grid import few_queries_grid, may_fold
from fastattn.kernels._attention_plan import reach_of
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS, target_of
from fastattn.kernels.attention_quantized import attention_e4m3_forward
from fastattn.testing import make_tensor
from tests.ops.test_attention_quantized import BOUND, k_with_means, operands, relative_error

E4M3 = torch.float8_e4m3fn


def decode_inputs(
    device: torch.device,
    seq_q: int = 1,
    groups: int = 4,
    kv_heads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q, k and v of 150 keys: two blocks with scales of their own, one of them far larger."""
    shapes = ((groups * kv_heads, seq_q), (kv_heads, 150), (kv_heads, 150))
    q, k, v = (make_tensor(2, *shape, 40, seed=n, device=device) for n, shape in enumerate(shapes))
    k = k_with_means(k)
    k[:, :, 130:] *= 0.25
    return [t.to(dtype) for t in (q, k, v)]


OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "bottom-right": dict(right=0, bottom_right=True),
    "window": dict(left=120, right=3, bottom_right=True),
    "softcap": dict(softcap=1.5),
    # A sink as heavy as the keys: its weight is relative to theirs, which are 2^8 times as large within the loop.
    "sinks": dict(sinks=torch.linspace(2.0, 6.0, 4)),
    "alibi": dict(alibi_slopes=torch.linspace(0.0, 0.1, 4)[None]),
    "lengths": dict(key_lengths=torch.tensor([133, 0], dtype=torch.int32)),
    "bias-of-heads": dict(bias=make_tensor(1, 4, 1, 150, seed=5)),
}


def moved(name: str, device: torch.device) -> AttentionOptions:
    found = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
    return AttentionOptions(0.16, **found)


FOLDED_AND_SPLIT = [
    (1, name, True, True) for name in OPTIONS if name not in ("bias-of-heads", "bottom-right")
]


@pytest.mark.parametrize(
    "seq_q, name, folded, split",
    [
        *FOLDED_AND_SPLIT,
        (1, "bias-of-heads", False, False),
        (3, "bottom-right", True, True),
        (13, "sinks", True, False),
    ],
)
def test_folded_and_split_is_the_plain_kernel(
    seq_q: int, name: str, folded: bool, split: bool, device: torch.device
) -> None:
    """lse to the last digits, as operands are the same; out but for weights rounded relative to a split's maximum."""
    q, k, v = decode_inputs(device, seq_q)
    asked = moved(name, device)
    few = few_queries_grid(4, 1, reach_of(asked, q, k), 48, E4M3, INTERPRETER, may_fold(asked))
    assert few is not None and (few.folded, len(few.grid) == 2) == (folded, split)
    plain = select_attention_config(48, E4M3, target_of(q.device))
    expected, expected_lse = attention_e4m3_forward(q, k, v, *asked, config=plain)
    out, lse = attention_e4m3_forward(q, k, v, *asked)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert relative_error(out, expected.double()) < 0.03


@pytest.mark.parametrize("above", [-30.0, 4.0, 14.0, -math.inf], ids=str)
@pytest.mark.parametrize("grid", ["plain", "few-queries"])
def test_a_sink_far_above_the_keys_leaves_their_digits(grid: str, above: float, device: torch.device) -> None:
    """Weights were rounded relative to the sink: at 9 above the largest score, to multiples of 2^-9 of their scale."""
    q, k, v = operands(device, 9, 150, 64, torch.float32)
    sinks = torch.full((2,), above, device=device)
    truth, lse_truth = reference.attention(
        *(t.double() for t in (q, k, v)), sinks=sinks.double(), return_lse=True
    )
    config = select_attention_config(48, E4M3, target_of(q.device)) if grid == "plain" else None
    out, lse = attention_e4m3_forward(q, k, v, *AttentionOptions(0.125, sinks=sinks), config=config)
    assert relative_error(out, truth) < BOUND
    assert float((lse - lse_truth).square().mean().sqrt()) < 0.05


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_step_of_decoding_has_the_stated_error(packed: bool, device: torch.device) -> None:
    """Against float64, with caches of several lengths and NaN behind them; a sequence without keys has its sinks."""
    lengths = (133, 0, 150, 1)
    q, k, v = (t[:1].repeat(4, 1, 1, 1) for t in decode_inputs(device, 1, 2, 2))
    k += make_tensor(4, 1, 1, 40, seed=11, device=device)
    sinks, key_lengths = torch.linspace(0.0, 2.0, 4, device=device), torch.tensor(lengths, device=device)
    truth, lse_truth = reference.attention(
        *(t.double() for t in (q, k, v)), sinks=sinks.double(), key_lengths=key_lengths, return_lse=True
    )
    for n, length in enumerate(lengths):
        k[n, :, length:], v[n, :, length:] = math.nan, math.inf
    call: dict[str, Any] = dict(sinks=sinks, key_lengths=key_lengths, return_lse=True, quantize="e4m3")
    if packed:
        starts_q, starts_k = torch.arange(5, device=device), 150 * torch.arange(5, device=device)
        rows = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        out, lse = fastattn.attention_varlen(*rows, starts_q, starts_k, **call, implementation="triton")
        out, lse = out[:, :, None], lse.T[..., None]
    else:
        out, lse = fastattn.attention(q, k, v, **call, implementation="triton")
    assert not out[1].any()
    assert float((lse - lse_truth).square().mean().sqrt()) < 0.05
    # One by one, as the sequence of a single key has by far the largest results.
    assert all(relative_error(out[n], truth[n]) < 1.5 * BOUND for n in (0, 2, 3))


def test_tiles_are_as_deep_as_a_product_of_8_bits() -> None:
    """And whole in a block of keys that share a scale."""
    for name in ("sm_89", "sm_90", "sm_100", "sm_120"):
        for rows in (1, 17, 65, 128):
            for head_dim in (16, 64, 80, 128, 200, 256):
                tiles = select_decode_config(rows, head_dim, E4M3, KNOWN_TARGETS[name]).tiles
                assert tiles.block_n in (32, 64, 128)
    q, k, v = decode_inputs(torch.device("cpu"))
    plain = select_attention_config(40, E4M3, INTERPRETER)
    for block_n in (16, 256):
        config = replace(plain, forward=replace(plain.forward, block_n=block_n))
        with pytest.raises(ValueError, match=f"block_n={block_n} must be 32, 64 or 128 with e4m3"):
            attention_e4m3_forward(q, k, v, 0.1, config=config)
