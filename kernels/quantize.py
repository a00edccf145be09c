"""q, k and v in e4m3 for attention's forward: statistics of keys and values, then one pass over each tensor.

    q_i = sq_i * q'_i        k_j = mean + sk_b * k'_j        v_jc = sv_c * v'_jc

with primes for e4m3, sq a query's own scale, mean the keys' mean of each channel, sk one scale for 128 keys and sv one
a channel. So q_i . k_j = sq_i sk_b * q'_i . k'_j + q_i . mean: a factor a query and tile, and a summand a query, which
`_quantized` takes from here. The mean leaves what all keys share out of what is rounded: subtracting it is
SageAttention's (Zhang et al., 2024), where the summand is dropped; here it stays, for soft caps, sinks and lse, whose
scores may not be shifted.

Whatever mean is subtracted, it comes back, and scales only say what is rounded how: so values that are not finite, and
hidden keys, stay out of the statistics. An infinity becomes NaN, as e4m3 has none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._arguments import _in_elements, rows_of, sequences_of
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._layout import block_d
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._plan import constants_of
from fastattn.kernels._quantize_config import quantize_tile, select_chunks
from fastattn.kernels._quantized import E4M3_BLOCK, _first_block, _in_value_order
from fastattn.kernels._tiles import _load_rows, _sequence, _split_program, _store_rows

# The largest number of e4m3, and below what a scale would not be a normal number of float32: what is smaller is 0.
_LARGEST = tl.constexpr(448.0)
_LEAST = tl.constexpr(2.0**-110)


class Operands(NamedTuple):
    """What `quantize_operands` returns; `_first_block` says which blocks of 128 keys are a sequence's.

    Attributes:
        q: (batch, heads, seq_q, width), e4m3, width being head_dim rounded up to a multiple of 16, with zeros.
        k: (batch, kv_heads, seq_k, width); rows of hidden keys are not written.
        v: (batch, kv_heads, blocks, columns * 128), e4m3: v_dim rounded up to columns, a power of two, and
            transposed within tiles of keys, whose order is `_in_value_order`'s; zeros beyond the last key of its block,
            and blocks without a key are not written.
        k_scales: (batch, blocks, kv_heads), float32: sk.
        terms: (batch, heads, 2, seq_q), float32: a query's scale sq and its summand q . mean.
        statistics: (sequences, kv_heads, 2, columns of the wider), float32: mean and sv.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_scales: Tensor
    terms: Tensor
    statistics: Tensor


@triton.jit
def _finite_or_nan(x):
    return tl.where(tl.abs(x) < float("inf"), x, float("nan"))


@triton.jit
def _finite_size(x):
    """|x|, or 0 where it is not finite."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def _scale_of(largest):
    """The scale with which a largest absolute value becomes e4m3's; 1 where all is 0, or as good as 0."""
    return tl.where(largest < _LEAST, 1.0, largest * (1.0 / _LARGEST))


@triton.jit
def _visible_keys(batch, sequences, SEQ_K, MAX_SEQ_K):
    """(batch of the tensors, first key, number of keys) of a sequence, without hidden ones."""
    held, start, length = _sequence(batch, sequences.starts_k, SEQ_K, MAX_SEQ_K)
    if sequences.key_lengths is not None:
        length = tl.minimum(length, tl.maximum(tl.load(sequences.key_lengths + batch), 0))
    return held, start, length


@triton.jit(do_not_specialize=["KV_HEADS", "SEQ_K", "MAX_SEQ_K", "CHUNKS", "CHUNK"])
def _quantize_statistics_kernel(
    k,
    v,
    partials_ptr,
    sequences,
    KV_HEADS,
    SEQ_K,
    MAX_SEQ_K,
    CHUNKS,
    CHUNK,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program finds, of CHUNK keys of one head, the sum of each channel of k and the largest |v| of each of v.

    Grid (CHUNKS * KV_HEADS * sequences,). k and v are `Rows`, partials (sequences, KV_HEADS, CHUNKS, 2, BLOCK_D),
    contiguous; BLOCK_D covers both widths.
    """
    k, v = _in_elements(k), _in_elements(v)
    chunk, batch, head = _split_program(CHUNKS, KV_HEADS)
    held, start, length = _visible_keys(batch, sequences, SEQ_K, MAX_SEQ_K)
    k_ptr = k.ptr + held * k.stride_b + head * k.stride_h + start * k.stride_m
    v_ptr = v.ptr + held * v.stride_b + head * v.stride_h + start * v.stride_m
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    largest = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in tl.range(chunk * CHUNK, tl.minimum(length, (chunk + 1) * CHUNK), BLOCK_M):
        keys = _load_rows(k_ptr, first, k.stride_m, length, HEAD_DIM, BLOCK_M, BLOCK_D, True).to(tl.float32)
        total += tl.where(tl.abs(keys) < float("inf"), keys, 0.0)
        values = _load_rows(v_ptr, first, v.stride_m, length, V_DIM, BLOCK_M, BLOCK_D, True).to(tl.float32)
        largest = tl.maximum(largest, _finite_size(values))
    columns = tl.arange(0, BLOCK_D)
    corner = partials_ptr + ((batch * KV_HEADS + head) * CHUNKS + chunk) * (2 * BLOCK_D)
    tl.store(corner + columns, tl.sum(total, 0))
    tl.store(corner + (BLOCK_D + columns), tl.max(largest, 0))


@triton.jit
def _statistics_of(partials_ptr, CHUNKS, length, BLOCK_D: tl.constexpr):
    """A head's mean of k and scales of v, both (BLOCK_D,)."""
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    largest = tl.zeros((BLOCK_D,), tl.float32)
    for chunk in tl.range(0, CHUNKS):
        corner = partials_ptr + chunk * (2 * BLOCK_D)
        total += tl.load(corner + columns)
        largest = tl.maximum(largest, tl.load(corner + (BLOCK_D + columns)))
    # A sum beyond float32 leaves no mean, and nothing is subtracted.
    mean = total / tl.maximum(length, 1)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0), _scale_of(largest)


@triton.jit(do_not_specialize=["KV_HEADS", "SEQ_K", "MAX_SEQ_K", "CHUNKS"])
def _quantize_keys_kernel(
    k,
    v,
    k_out,
    v_out,
    k_scales_ptr,
    statistics_ptr,
    partials_ptr,
    sequences,
    KV_HEADS,
    SEQ_K,
    MAX_SEQ_K,
    CHUNKS,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program writes BLOCK_M keys and values of one head in e4m3; the first of a head also its statistics.

    Grid (cdiv(MAX_SEQ_K, BLOCK_M) * KV_HEADS * sequences,). All four tensors are `Rows`, see `Operands`; partials as
    `_quantize_statistics_kernel` wrote them. BLOCK_N is the keys of attention's tiles, which divide BLOCK_M.
    """
    k, v, k_out, v_out = _in_elements(k), _in_elements(v), _in_elements(k_out), _in_elements(v_out)
    block, batch, head = _split_program(tl.cdiv(MAX_SEQ_K, BLOCK_M), KV_HEADS)
    held, start, length = _visible_keys(batch, sequences, SEQ_K, MAX_SEQ_K)
    # What queries see of a sequence without keys is its statistics alone.
    if (block > 0) & (block * BLOCK_M >= length):
        return
    place = batch * KV_HEADS + head
    partials_ptr += place * CHUNKS * (2 * BLOCK_D)
    mean, v_scales = _statistics_of(partials_ptr, CHUNKS, length, BLOCK_D)
    columns = tl.arange(0, BLOCK_D)
    if block == 0:
        corner = statistics_ptr + place * (2 * BLOCK_D)
        tl.store(corner + columns, mean)
        tl.store(corner + (BLOCK_D + columns), v_scales)
    first = block * BLOCK_M
    k_ptr = k.ptr + held * k.stride_b + head * k.stride_h + start * k.stride_m
    keys = _load_rows(k_ptr, first, k.stride_m, length, HEAD_DIM, BLOCK_M, BLOCK_D, True).to(tl.float32)
    keys = _finite_or_nan(keys) - mean[None, :]
    inside = (first + tl.arange(0, BLOCK_M) < length)[:, None]
    k_scale = _scale_of(tl.max(tl.where(inside, _finite_size(keys), 0.0)))
    block += _first_block(batch, sequences.starts_k, start)
    tl.store(k_scales_ptr + (held * tl.cdiv(SEQ_K, BLOCK_M) + block) * KV_HEADS + head, k_scale)
    k_out_ptr = k_out.ptr + held * k_out.stride_b + head * k_out.stride_h + start * k_out.stride_m
    _store_rows(k_out_ptr, keys * (1.0 / k_scale), first, k_out.stride_m, length, WIDTH, BLOCK_M, BLOCK_D)

    v_ptr = v.ptr + held * v.stride_b + head * v.stride_h + start * v.stride_m
    values = _load_rows(v_ptr, first, v.stride_m, length, V_DIM, BLOCK_M, BLOCK_D, True).to(tl.float32)
    values = (_finite_or_nan(values) * (1.0 / v_scales)[None, :]).to(v_out.ptr.dtype.element_ty)
    ordered = _in_value_order(tl.trans(values))  # (BLOCK_D, BLOCK_M)
    places = tl.arange(0, BLOCK_M)[None, :]
    v_out_ptr = v_out.ptr + held * v_out.stride_b + head * v_out.stride_h + block * v_out.stride_m
    offsets = places // BLOCK_N * (BLOCK_V * BLOCK_N) + columns[:, None] * BLOCK_N + places % BLOCK_N
    tl.store(v_out_ptr + offsets, ordered, mask=(columns < BLOCK_V)[:, None] & (places >= 0))


@triton.jit(do_not_specialize=["HEADS", "SEQ_Q", "MAX_SEQ_Q"])
def _quantize_queries_kernel(
    q,
    q_out,
    terms_ptr,
    statistics_ptr,
    sequences,
    HEADS,
    GROUPS,
    SEQ_Q,
    MAX_SEQ_Q,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes BLOCK_M queries of one head in e4m3, and their terms.

    Grid (cdiv(MAX_SEQ_Q, BLOCK_M) * HEADS * sequences,). q and q_out are `Rows`; statistics are those of the keys.
    """
    q, q_out = _in_elements(q), _in_elements(q_out)
    tile, batch, head = _split_program(tl.cdiv(MAX_SEQ_Q, BLOCK_M), HEADS)
    held, start, length = _sequence(batch, sequences.starts_q, SEQ_Q, MAX_SEQ_Q)
    first = tile * BLOCK_M
    if first >= length:
        return
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mean = tl.load(statistics_ptr + (batch * (HEADS // GROUPS) + head // GROUPS) * (2 * BLOCK_D) + columns)
    q_ptr = q.ptr + held * q.stride_b + head * q.stride_h + start * q.stride_m
    queries = _load_rows(q_ptr, first, q.stride_m, length, HEAD_DIM, BLOCK_M, BLOCK_D, True).to(tl.float32)
    queries = _finite_or_nan(queries)
    scale = _scale_of(tl.max(_finite_size(queries), 1))  # (BLOCK_M,)
    terms_ptr += (held * HEADS + head) * 2 * SEQ_Q + start
    tl.store(terms_ptr + rows, scale, mask=rows < length)
    tl.store(terms_ptr + SEQ_Q + rows, tl.sum(queries * mean[None, :], 1), mask=rows < length)
    q_out_ptr = q_out.ptr + held * q_out.stride_b + head * q_out.stride_h + start * q_out.stride_m
    queries = queries * (1.0 / scale)[:, None]
    _store_rows(q_out_ptr, queries, first, q_out.stride_m, length, WIDTH, BLOCK_M, BLOCK_D)


def padded_width(head_dim: int) -> int:
    """Of a row of q or k, so that each begins at a multiple of 16 bytes."""
    return -(-head_dim // 16) * 16


def _empty_operands(q: Tensor, k: Tensor, v: Tensor, asked: AttentionOptions) -> Operands:
    batch, heads, seq_q, head_dim = q.shape
    kv_heads, seq_k, v_dim = v.size(1), v.size(2), v.size(3)
    block, sequences, e4m3 = E4M3_BLOCK.value, asked.sequences(batch), torch.float8_e4m3fn
    blocks = triton.cdiv(seq_k, block) if asked.cu_seqlens_k is None else seq_k // block + sequences
    # As wide as an 8-bit product takes them, whose depth is 32.
    width, width_v = padded_width(head_dim), block_d(v_dim, least=32)
    return Operands(
        q.new_empty((batch, heads, seq_q, width), dtype=e4m3),
        k.new_empty((batch, kv_heads, seq_k, width), dtype=e4m3),
        v.new_empty((batch, kv_heads, blocks, width_v * block), dtype=e4m3),
        k.new_empty((batch, blocks, kv_heads), dtype=torch.float32),
        q.new_empty((batch, heads, 2, seq_q), dtype=torch.float32),
        q.new_empty((sequences, kv_heads, 2, max(block_d(head_dim, least=32), width_v)), dtype=torch.float32),
    )


def quantize_operands(q: Tensor, k: Tensor, v: Tensor, asked: AttentionOptions, block_n: int) -> Operands:
    """q, k and v in e4m3, values in tiles of `block_n` keys.

    Args:
        q: (batch, heads, seq_q, head_dim), not empty, last dimension contiguous; 16 bits or float32.
        k, v: (batch, kv_heads, seq_k, head_dim) and (batch, kv_heads, seq_k, v_dim).
        asked: of which lengths of keys and packed sequences count; hidden keys and rows of no sequence are not read.

    Raises:
        ValueError: tiles of so many keys are not whole in a block of 128, or less than an 8-bit product is deep.
    """
    if block_n not in (32, 64, 128):
        raise ValueError(f"block_n={block_n} must be 32, 64 or 128 with e4m3")
    batch, heads, seq_q, head_dim = q.shape
    kv_heads, seq_k, v_dim = v.size(1), v.size(2), v.size(3)
    made = _empty_operands(q, k, v, asked)
    width, widest, block = made.q.size(3), made.statistics.size(3), E4M3_BLOCK.value
    sequences, longest_q, longest_k = asked.sequences(batch), asked.longest_q(seq_q), asked.longest_k(seq_k)
    target = _target.target_of(q.device)
    config = quantize_tile(widest, target)
    chunks, chunk = select_chunks(longest_k, sequences * kv_heads, config.block_m, target)
    partials = q.new_empty((sequences, kv_heads, chunks, 2, widest), dtype=torch.float32)
    rows, of_keys = sequences_of(asked), {"KV_HEADS": kv_heads, "SEQ_K": seq_k, "MAX_SEQ_K": longest_k}
    with _target.launching_on(q):
        launch(
            _quantize_statistics_kernel, (chunks * kv_heads * sequences,),
            constants_of(
                target, **of_keys, CHUNKS=chunks, CHUNK=chunk, HEAD_DIM=head_dim, V_DIM=v_dim,
                BLOCK_M=config.block_m // 2, BLOCK_D=widest, num_warps=config.num_warps,
            ),
            k=rows_of(k), v=rows_of(v), partials_ptr=partials, sequences=rows,
        )  # fmt: skip
        launch(
            _quantize_keys_kernel, (ceil_div(longest_k, block) * kv_heads * sequences,),
            constants_of(
                target, **of_keys, CHUNKS=chunks, HEAD_DIM=head_dim, V_DIM=v_dim, WIDTH=width,
                BLOCK_M=block, BLOCK_N=block_n, BLOCK_D=widest, BLOCK_V=made.v.size(3) // block,
                num_warps=config.keys_warps,
            ),
            k=rows_of(k), v=rows_of(v), k_out=rows_of(made.k), v_out=rows_of(made.v),
            k_scales_ptr=made.k_scales, statistics_ptr=made.statistics, partials_ptr=partials, sequences=rows,
        )  # fmt: skip
        launch(
            _quantize_queries_kernel, (ceil_div(longest_q, config.block_m) * heads * sequences,),
            constants_of(
                target, HEADS=heads, GROUPS=heads // kv_heads, SEQ_Q=seq_q, MAX_SEQ_Q=longest_q,
                HEAD_DIM=head_dim, WIDTH=width, BLOCK_M=config.block_m, BLOCK_D=widest, num_warps=config.num_warps,
            ),
            q=rows_of(q), q_out=rows_of(made.q), terms_ptr=made.terms, statistics_ptr=made.statistics, sequences=rows,
        )  # fmt: skip
    return made
