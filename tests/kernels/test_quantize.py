"""The kernels that make e4m3 operands, against the formula in PyTorch operators, which rounds the same to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import reference
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels.quantize import Operands, quantize_operands
from fastattn.testing import make_tensor

BLOCK_N = 32


def operands(device: torch.device, seq_q: int = 5, seq_k: int = 70, **changes: object) -> list[Tensor]:
    """q (2, 4, seq_q, 40) and k, v with 2 heads, of 40 and 24 channels; channel means far from 0."""
    dtype: torch.dtype = changes.get("dtype", torch.bfloat16)  # type: ignore[assignment]
    shapes = ((2, 4, seq_q, 40), (2, 2, seq_k, 40), (2, 2, seq_k, 24))
    q, k, v = (make_tensor(*s, dtype=dtype, seed=n, device=device) for n, s in enumerate(shapes))
    return [q, k + 5 * make_tensor(40, dtype=dtype, seed=3, device=device), v]


def rows_of_values(made: Operands) -> Tensor:
    """(batch, kv_heads, blocks * 128, columns) in float32: the tiles turned back, and their keys in their own order."""
    tiles = (
        made.v.float().unflatten(3, (128 // BLOCK_N, -1, BLOCK_N)).flatten(2, 3)
    )  # (.., tiles, columns, keys)
    # Of 16 keys, those two by two that a thread's products belong to are neighbours.
    place = torch.arange(BLOCK_N, device=tiles.device).view(-1, 2, 4, 2).transpose(1, 2).flatten()
    ordered = torch.empty_like(tiles)
    ordered[..., place] = tiles
    return ordered.transpose(3, 4).flatten(2, 3)


def values_of(made: Operands, like: Tensor) -> Tensor:
    """(batch, kv_heads, seq_k, v_dim) in float32."""
    seq_k, v_dim = like.shape[2:]
    rows = rows_of_values(made)
    assert not rows[:, :, seq_k:].any() and not rows[..., v_dim:].any()
    columns = made.statistics[:, :, 1, None, :v_dim]
    return rows[:, :, :seq_k, :v_dim] * columns


def check(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, exactly: bool = True
) -> Operands:
    made = quantize_operands(q, k, v, AttentionOptions(1.0, key_lengths=key_lengths), BLOCK_N)
    expected_q, expected_k, expected_v, shift = reference.round_e4m3(q, k, v, key_lengths)
    head_dim = q.size(3)
    k_scales = made.k_scales.transpose(1, 2).repeat_interleave(128, 2)[:, :, : k.size(2), None]
    found_k = made.k.float()[..., :head_dim] * k_scales
    found_q = made.q.float()[..., :head_dim] * made.terms[:, :, 0, :, None]
    if key_lengths is not None:
        seen = torch.arange(k.size(2), device=k.device) < key_lengths[:, None]
        found_k = torch.where(seen[:, None, :, None], found_k, 0.0)
    assert not made.q.float()[..., head_dim:].any()
    tolerance = {"rtol": 1e-6, "atol": 0.0} if exactly else {"rtol": 0.07, "atol": 1e-3}
    for found, expected in ((found_q, expected_q), (found_k, expected_k), (values_of(made, v), expected_v)):
        torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)
    torch.testing.assert_close(made.terms[:, :, 1], shift, equal_nan=True, rtol=1e-4, atol=1e-4)
    return made


@pytest.mark.parametrize("seq_k", [1, 31, 64, 300])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
def test_operands_are_those_of_the_formula(dtype: torch.dtype, seq_k: int, device: torch.device) -> None:
    """300 keys are several tiles of values, and several chunks whose statistics are put together."""
    if seq_k == 300 and dtype != torch.bfloat16:
        pytest.skip("the dtype shows in fewer keys")
    q, k, v = operands(device, seq_k=seq_k, dtype=dtype)
    if seq_k == 300:  # more heads would leave each one chunk
        q, k, v = q[:1, :2], k[:1, :1], v[:1, :1]
    check(q, k, v, exactly=device.type == "cpu")


def test_strides_are_read_in_place(device: torch.device) -> None:
    """As a projection leaves them: (batch, seq, heads, width) in memory, and rows wider than the head."""
    q, k, v = operands(device)
    wide = torch.full((2, 70, 2, 64), torch.nan, dtype=k.dtype, device=device)
    wide[..., :40] = k.transpose(1, 2)
    check(
        q,
        wide[..., :40].transpose(1, 2),
        v.transpose(1, 2).contiguous().transpose(1, 2),
        exactly=device.type == "cpu",
    )


def test_hidden_keys_are_not_read(device: torch.device) -> None:
    """NaN and 10^30 at hidden keys change neither means nor scales; a sequence may have no key at all."""
    q, k, v = operands(device)
    lengths = torch.tensor([37, 0], dtype=torch.int32, device=device)
    k[0, :, 37:], v[0, :, 37:], k[1], v[1] = 1e30, 1e30, torch.nan, torch.nan
    made = check(q, k, v, lengths, exactly=device.type == "cpu")
    assert made.statistics.isfinite().all() and (made.statistics[1, :, 1] == 1.0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_what_is_not_finite_becomes_nan_by_itself(bad: float, device: torch.device) -> None:
    """Infinities too, as e4m3 has none; nothing else of the head, which shares the scale, changes."""
    clean, spoiled = operands(device), operands(device)
    places = ((0, 1, 2, 3), (1, 1, 40, 7), (0, 0, 69, 5))
    for tensor, place in zip(spoiled, places, strict=True):
        tensor[place] = bad
    for tensor, (batch, head, row, column) in zip(clean, places, strict=True):
        tensor[batch, head, row, column] = tensor[batch, head, row - 1, column]  # hardly another mean
    made, without = (
        check(*spoiled, exactly=device.type == "cpu"),
        quantize_operands(*clean, AttentionOptions(1.0), BLOCK_N),
    )
    assert [int(t.float().isnan().sum()) for t in (made.q, made.k, made.v)] == [1, 1, 1]
    torch.testing.assert_close(made.statistics[:, :, 1:], without.statistics[:, :, 1:], rtol=0.02, atol=0.0)


def test_zeros_and_the_smallest_numbers_have_scale_1(device: torch.device) -> None:
    q, k, v = (t * 0.0 for t in operands(device, dtype=torch.float32))
    k += 3.0  # of which nothing is left without the mean
    v[..., 0] = 1e-38
    made = check(q, k, v)
    assert (made.statistics[:, :, 1:] == 1.0).all() and (made.terms[:, :, 0] == 1.0).all()


def test_extreme_values_keep_their_digits(device: torch.device) -> None:
    """float16's largest, in one channel of v; each channel has a scale of its own."""
    q, k, v = operands(device, dtype=torch.float16)
    v[..., 3] *= 60000 / v[..., 3].abs().max()
    made = check(q, k, v, exactly=device.type == "cpu")
    torch.testing.assert_close(values_of(made, v), v.float(), rtol=2**-4, atol=0.01)


def test_two_runs_are_equal(device: torch.device) -> None:
    given = operands(device, seq_k=300)
    first, second = (quantize_operands(*given, AttentionOptions(1.0), BLOCK_N) for _ in range(2))
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True)
    )


# Sequences whose ends are before, at and behind those of 128 rows, some without keys; two rows are of none.
PACKED = (1, 127, 0, 128, 300, 129, 0, 0, 40)


def test_packed_operands_are_those_of_the_formula(device: torch.device) -> None:
    """Each sequence has its own blocks, which no other writes to, and there are as many as there is memory for."""
    starts = torch.tensor([0, *PACKED], dtype=torch.int32, device=device).cumsum(0).int()
    total = sum(PACKED) + 2
    q, k, v = (t[:1] for t in operands(device, total, total))
    for n in range(len(PACKED)):  # of other sizes and means
        rows = slice(int(starts[n]), int(starts[n + 1]))
        k[:, :, rows] += n
        v[:, :, rows] *= 1 + n
    k[:, :, -2:], v[:, :, -2:] = torch.nan, torch.nan
    asked = AttentionOptions(
        1.0, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=max(PACKED), max_seqlen_k=max(PACKED)
    )
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        made = quantize_operands(q, k, v, asked, BLOCK_N)
    finally:
        torch.use_deterministic_algorithms(False)
    rows = (t[0].transpose(0, 1) for t in (q, k, v))
    expected = [t.transpose(0, 1) for t in reference.round_e4m3_varlen(*rows, starts, starts)]
    blocks = made.v.size(2)
    assert made.k_scales.shape == (1, blocks, 2) and blocks == total // 128 + len(PACKED)
    values = rows_of_values(made)[..., :24]
    written = [
        place in range(start // 128 + n, start // 128 + n + max(1, -(-length // 128)))
        for n, (start, length) in enumerate(zip(starts[:-1].tolist(), PACKED, strict=True))
        for place in range(blocks)
    ]
    of_one = torch.tensor(written, device=device).view(-1, blocks)
    assert int(of_one.sum(0).max()) == 1 and torch.equal(of_one.any(0), made.k_scales[0, :, 0].isfinite())
    tolerance = {
        "rtol": 1e-6 if device.type == "cpu" else 0.07,
        "atol": 1e-6 if device.type == "cpu" else 1e-2,
    }
    for n, length in enumerate(PACKED):
        first, block = int(starts[n]), int(starts[n]) // 128 + n
        for place in range(0, length, 128):
            here, at = slice(first + place, first + min(place + 128, length)), block + place // 128
            size = here.stop - here.start
            found_k = made.k.float()[0, :, here, :40] * made.k_scales[0, at, :, None, None]
            found_v = values[0, :, at * 128 : (at + 1) * 128] * made.statistics[n, :, 1, None, :24]
            torch.testing.assert_close(found_k, expected[1][:, here], **tolerance)
            torch.testing.assert_close(found_v[:, :size], expected[2][:, here], **tolerance)
            assert not found_v[:, size:].any()
        found_q = (
            made.q.float()[0, :, first : first + length, :40]
            * made.terms[0, :, 0, first : first + length, None]
        )
        torch.testing.assert_close(found_q, expected[0][:, first : first + length], **tolerance)
    covered = slice(0, int(starts[-1]))
    torch.testing.assert_close(made.terms[0, :, 1, covered], expected[3][:, covered], rtol=1e-4, atol=1e-4)


def test_means_of_no_keys_and_of_lengths_beyond_the_last_key(device: torch.device) -> None:
    """The mean was divided by a length as given: 0 keys gave NaN, and 8 of 4 keys half of it."""
    q, k, v = operands(device, seq_k=4)
    shift = reference.round_e4m3(q, k[:, :, :0], v[:, :, :0])[3]
    assert shift.shape == q.shape[:3] and not shift.any()
    beyond, whole = (
        reference.round_e4m3(q, k, v, None if n is None else torch.full((2,), n, device=device))
        for n in (8, None)
    )
    assert all(torch.equal(a, b) for a, b in zip(beyond, whole, strict=True))
    assert not reference.round_e4m3(q, k, v, torch.zeros(2, dtype=torch.int32, device=device))[3].any()
