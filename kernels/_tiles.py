"""Loads and stores of two-dimensional tiles, and which tiles of the score matrix a program visits.

A tile's first row is found with 64-bit arithmetic, the elements within the tile with 32-bit: half the registers.
The launchers copy a tensor whose rows lie too far apart for that (`fastattn.kernels._layout.rows_contiguous`).

The score matrix is (SEQ_Q, SEQ_K). A schedule says which tiles have anything to compute and which of these
need a mask; `_visible` says it of a single score. Both read the same rule, at this one place: query i sees key
j where j <= i + CAUSAL_OFFSET (if causal) and j < SEQ_K.
"""

import triton
import triton.language as tl


@triton.jit
def _load_rows(
    ptr,
    first,
    stride,
    SEQ,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAY_OVERRUN: tl.constexpr,
):
    """(ROWS, BLOCK_D): rows first .. first + ROWS of a (SEQ, HEAD_DIM) matrix, zeros beyond its last column.

    With MAY_OVERRUN also zeros beyond its last row; without, no row may lie there.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MAY_OVERRUN:
        inside = (first + rows < SEQ)[:, None]
        if BLOCK_D != HEAD_DIM:
            inside = inside & (columns < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    elif BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_rows(
    ptr,
    tile,
    first,
    stride,
    SEQ,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes a (ROWS, BLOCK_D) tile to rows first .. first + ROWS of a (SEQ, HEAD_DIM) matrix."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = (first + rows < SEQ)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _split_program(TILES, HEADS):
    """This program's (tile, batch, head) of a grid (TILES * HEADS * batches,); neighbours share a head.

    One grid axis, because the others end at 65,535. int64, because the indices meet strides next.
    """
    program = tl.program_id(0)
    head = program // TILES
    return program % TILES, (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64)


@triton.jit
def _key_schedule(
    first_row,
    SEQ_K,
    CAUSAL_OFFSET,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that BLOCK_M queries from first_row visit: [0, full_end) without a mask, [full_end, end) with one."""
    end = SEQ_K
    full_end = SEQ_K
    if IS_CAUSAL:
        # The first row sees the fewest keys, the last one the most.
        end = tl.minimum(SEQ_K, tl.maximum(0, first_row + BLOCK_M + CAUSAL_OFFSET))
        full_end = tl.minimum(SEQ_K, tl.maximum(0, first_row + 1 + CAUSAL_OFFSET))
    return full_end // BLOCK_N * BLOCK_N, end


@triton.jit
def _query_schedule(
    first_key,
    SEQ_Q,
    CAUSAL_OFFSET,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Queries that see BLOCK_N keys from first_key: [begin, full_begin) with a mask, [full_begin, SEQ_Q) without."""
    begin = first_key * 0  # a tensor, as in the branch below, and not a constant
    full_begin = begin
    if IS_CAUSAL:
        # The first query to see the first key, and the first to see the last key.
        begin = tl.maximum(0, first_key - CAUSAL_OFFSET) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(0, first_key + BLOCK_N - 1 - CAUSAL_OFFSET), BLOCK_M) * BLOCK_M
    return begin, full_begin


@triton.jit
def _visible(rows, keys, SEQ_K, CAUSAL_OFFSET, IS_CAUSAL: tl.constexpr):
    """Whether each query sees each key; rows and keys broadcast against each other."""
    if IS_CAUSAL:
        return (keys <= rows + CAUSAL_OFFSET) & (keys < SEQ_K)
    else:
        # The second part holds of every row: it gives the result the shape of the scores, as the branch above does.
        return (keys < SEQ_K) & (rows >= 0)
