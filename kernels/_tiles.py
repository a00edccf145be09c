"""Loads and stores of two-dimensional tiles, and which tiles of the score matrix a program visits.

A tile's first row is found with 64-bit arithmetic, the elements within the tile with 32-bit: half the registers.
The launchers copy a tensor whose rows lie too far apart for that (`fastattn.kernels._layout.rows_readable`).

The score matrix of a sequence is (SEQ_Q, SEQ_K). A schedule says which tiles have anything to compute and which of
these need a mask; `_visible` says it of a single score. Both read the same rule, at this one place: query i sees key j
where i + LOW <= j <= i + HIGH (each end only if there is one) and j < SEQ_K.
"""

import triton
import triton.language as tl

from fastattn.kernels._math import LOG2_E


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
    rows=None,
):
    """(ROWS, BLOCK_D): rows first .. first + ROWS of a (SEQ, HEAD_DIM) matrix, zeros beyond its last column.

    With MAY_OVERRUN also zeros beyond its last row; without, no row may lie there. `rows`, (ROWS,), takes others
    counted from first, and ptr may differ from row to row, (ROWS, 1).
    """
    if rows is None:
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
def _rows_at(tensor, batch, head, first):
    """Where `_load_tile` finds one head's rows from `first` on: (pointer, its strides), or (descriptor, batch, head).

    tensor: `Rows`, or a descriptor of its four dimensions, which is for sequences that are not packed: first is 0 then.
    """
    if isinstance(tensor, tl.tensor_descriptor):
        return tensor, batch.to(tl.int32), head.to(tl.int32)
    else:
        corner = tensor.ptr + batch * tensor.stride_b + head * tensor.stride_h + first * tensor.stride_m
        return corner, tensor.stride_m, tensor.stride_h


@triton.jit
def _of_head(place, member):
    """The same rows of the head that lies `member` heads behind."""
    if isinstance(place[0], tl.tensor_descriptor):
        return place[0], place[1], place[2] + member
    else:
        return place[0] + tl.cast(member, tl.int64) * place[2], place[1], place[2]


@triton.jit
def _load_tile(
    place,
    first,
    SEQ,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAY_OVERRUN: tl.constexpr,
):
    """What `_load_rows` gives, from what `_rows_at` returned.

    A descriptor's load is one instruction of one thread, and has zeros beyond the tensor's own rows and columns.
    """
    if isinstance(place[0], tl.tensor_descriptor):
        return place[0].load([place[1], place[2], first, 0]).reshape([ROWS, BLOCK_D])
    else:
        return _load_rows(place[0], first, place[1], SEQ, HEAD_DIM, ROWS, BLOCK_D, MAY_OVERRUN)


@triton.jit
def _load_own_tile(
    ptr,
    first,
    stride,
    SEQ,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    rows=None,
):
    """The tile that a program keeps throughout its loop.

    Where warps are specialized the compiler gives half of the rows to each of two warp groups, and can cut no load but
    that of a descriptor of two dimensions which the kernel makes itself (Triton 3.6 to 3.9).
    """
    if SPECIALIZED:
        rows = tl.make_tensor_descriptor(ptr, [SEQ, HEAD_DIM], [stride, 1], [ROWS, BLOCK_D])
        return rows.load([first, 0])
    else:
        return _load_rows(ptr, first, stride, SEQ, HEAD_DIM, ROWS, BLOCK_D, MAY_OVERRUN=True, rows=rows)


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
    rows=None,
):
    """Writes a (ROWS, BLOCK_D) tile to rows first .. first + ROWS of a (SEQ, HEAD_DIM) matrix, or to `rows` of it.

    See `_load_rows`.
    """
    if rows is None:
        rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = (first + rows < SEQ)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_tile(
    place,
    tile,
    first,
    SEQ,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds a (ROWS, BLOCK_D) tile to float32 rows in memory, where `_rows_at` says, as atomics do: in any order.

    By a descriptor it is one bulk reduction, of what lies within the tensor.
    """
    if isinstance(place[0], tl.tensor_descriptor):
        place[0].atomic_add([place[1], place[2], first, 0], tile.reshape([1, 1, ROWS, BLOCK_D]))
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK_D)
        stride = place[1]
        pointers = place[0] + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
        inside = (first + rows < SEQ)[:, None] & (columns < HEAD_DIM)[None, :]
        tl.atomic_add(pointers, tile, mask=inside, sem="relaxed")


@triton.jit
def _load_log2_sum(lse_ptr, rows, SEQ_Q):
    """lse of some rows in base 2; +inf, which makes every weight 0, beyond the last row and where a row sees no key."""
    lse = tl.load(lse_ptr + rows, mask=rows < SEQ_Q, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def _split_program(TILES, HEADS, TOGETHER=None, ABSENT=None):
    """This program's (tile, batch, head) of a grid (TILES * HEADS * batches,).

    The heads of all sequences follow each other in sections of TOGETHER, of which the first lacks ABSENT. In a section
    a tile of all heads comes before the next tile: where tile 0 is the longest, the longest of a section start first,
    and the last section, a whole one, ends with its shortest. TOGETHER = None is head after head.

    One grid axis, because the others end at 65,535. int64, because the indices meet strides next.
    """
    program = tl.program_id(0)
    if TOGETHER is None:
        head = program // TILES
        tile = program % TILES
    else:
        # Without signs, whose division is longer: with them the forward of head_dim 256 spilled on sm_90.
        program = program.to(tl.uint32)
        TILES = tl.cast(TILES, tl.uint32)
        TOGETHER = tl.cast(TOGETHER, tl.uint32)
        ABSENT = tl.cast(ABSENT, tl.uint32)
        section = (program + ABSENT * TILES) // (TILES * TOGETHER)
        end = (section + 1) * TOGETHER - ABSENT
        first = tl.maximum(end, TOGETHER) - TOGETHER
        within = program - first * TILES
        tile = (within // (end - first)).to(tl.int32)
        head = (first + within % (end - first)).to(tl.int32)
    return tile, (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64)


@triton.jit
def _heads_of_rows(first_row, head, GROUPS, BLOCK_M: tl.constexpr, FOLDED: tl.constexpr):
    """The head of a tile's rows; with FOLDED that of each, (BLOCK_M,).

    Folded rows are those of all heads of a group, `head` being its first: row r is query r // GROUPS of head
    head + r % GROUPS.
    """
    if FOLDED:
        return head + (first_row + tl.arange(0, BLOCK_M)) % GROUPS
    else:
        return head


@triton.jit
def _queries_of_rows(first_row, GROUPS, BLOCK_M: tl.constexpr, FOLDED: tl.constexpr):
    """(first query of a tile, its rows' queries counted from there (BLOCK_M,)); see `_heads_of_rows`."""
    rows = tl.arange(0, BLOCK_M)
    if FOLDED:
        first = first_row // GROUPS
        return first, (first_row + rows) // GROUPS - first
    else:
        return first_row, rows


@triton.jit
def _sequence(batch, starts, SEQ, LONGEST):
    """(batch of the tensors, first row, rows) of a sequence: all of its own batch, or a stretch of packed rows.

    starts: (sequences + 1,), or None. Whatever it holds, the rows lie within the SEQ of the tensor, and are at most
    LONGEST, the size of a bias or mask.
    """
    if starts is None:
        return batch, batch * 0, SEQ
    else:
        first = tl.minimum(tl.maximum(tl.load(starts + batch), 0), SEQ)
        end = tl.minimum(tl.maximum(tl.load(starts + batch + 1), first), SEQ)
        return batch * 0, first.to(tl.int64), tl.minimum(end - first, LONGEST)


@triton.jit
def _key_window(batch, key_lengths, SEQ_Q, SEQ_K, LEFT, RIGHT, BOTTOM_RIGHT: tl.constexpr):
    """(SEQ_K without hidden keys, OFFSET of the last rows and keys, LOW, HIGH) of a sequence."""
    offset = SEQ_K - SEQ_Q
    place = offset if BOTTOM_RIGHT else 0
    if key_lengths is not None:
        SEQ_K = tl.minimum(SEQ_K, tl.maximum(tl.load(key_lengths + batch), 0))
    return SEQ_K, offset, place - LEFT, place + RIGHT


@triton.jit
def _key_schedule(
    first_row,
    SEQ_K,
    LOW,
    HIGH,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that BLOCK_M queries from first_row visit: [full_begin, full_end) without a mask, the rest with one.

    Returns begin, full_begin, full_end, end; the first three are multiples of BLOCK_N.
    """
    begin = first_row * 0  # tensors, as in the branches below, and not constants
    full_begin = begin
    end = SEQ_K + begin
    full_end = end
    if HAS_RIGHT:
        # The first row sees the least far, the last one the farthest.
        end = tl.minimum(SEQ_K, tl.maximum(0, first_row + BLOCK_M + HIGH))
        full_end = tl.minimum(SEQ_K, tl.maximum(0, first_row + 1 + HIGH))
    if HAS_LEFT:
        begin = tl.maximum(0, first_row + LOW) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(0, first_row + BLOCK_M - 1 + LOW), BLOCK_N) * BLOCK_N
    return begin, full_begin, full_end // BLOCK_N * BLOCK_N, end


@triton.jit
def _own_split(begin, full_begin, full_end, end, BLOCK_N: tl.constexpr):
    """What of a schedule is this program's, of as many as axis 1 of the grid has: whole tiles, or none.

    No program has more than one tile more than another.
    """
    tiles, split = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), tl.program_id(1)
    least, more = tiles // tl.num_programs(1), tiles % tl.num_programs(1)
    first = begin + (split * least + tl.minimum(split, more)) * BLOCK_N
    last = first + (least + (split < more).to(tl.int32)) * BLOCK_N
    return first, tl.maximum(full_begin, first), tl.minimum(full_end, last), tl.minimum(end, last)


@triton.jit
def _query_schedule(
    first_key,
    SEQ_Q,
    LOW,
    HIGH,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Queries that see BLOCK_N keys from first_key: [full_begin, full_end) without a mask, the rest with one.

    Returns begin, full_begin, full_end, end; the first two are multiples of BLOCK_M. Without a left end of the
    window full_end is SEQ_Q, whose last tile may overrun.
    """
    begin = first_key * 0
    full_begin = begin
    end = SEQ_Q + begin
    full_end = end
    if HAS_RIGHT:
        # The first query to see the first key, and the first to see the last key.
        begin = tl.maximum(0, first_key - HIGH) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(0, first_key + BLOCK_N - 1 - HIGH), BLOCK_M) * BLOCK_M
    if HAS_LEFT:
        # Behind the last query to see the last key, and behind the last to see the first key.
        end = tl.minimum(SEQ_Q, tl.maximum(0, first_key + BLOCK_N - LOW))
        full_end = tl.minimum(SEQ_Q, tl.maximum(0, first_key + 1 - LOW)) // BLOCK_M * BLOCK_M
    return begin, full_begin, full_end, end


@triton.jit
def _stretch(PART: tl.constexpr, begin, full_begin, full_end, end):
    """Bounds of one of a schedule's three stretches, masked, not masked, masked; or, as the fourth, of all in one."""
    if PART == 0:
        return begin, tl.minimum(full_begin, end)
    elif PART == 1:
        return full_begin, full_end
    elif PART == 2:
        return tl.maximum(full_begin, full_end), end
    else:
        return begin, end


@triton.jit
def _visible(
    first_row,
    first_key,
    rows,
    keys,
    SEQ_K,
    LOW,
    HIGH,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    ENDS_OF: tl.constexpr,
):
    """Whether each query sees each key; rows and keys count within the tile and broadcast against each other.

    ENDS_OF: "none" compares positions, in the fewest registers: for a loop that few tiles take. "rows" finds each
    row's ends within the tile first, "keys" each key's, which leaves a comparison with a constant an end and score: for
    a loop of all tiles, in which a thread's scores belong to few rows, or to few keys.
    """
    if ENDS_OF == "rows":
        last = rows * 0 + (SEQ_K - 1 - first_key)  # of the rows' shape
        if HAS_RIGHT:
            last = tl.minimum(rows + (first_row + HIGH - first_key), last)
        visible = keys <= last
        if HAS_LEFT:
            visible = visible & (keys >= rows + (first_row + LOW - first_key))
    elif ENDS_OF == "keys":
        first = keys * 0  # of the keys' shape
        if HAS_RIGHT:
            first = keys + (first_key - HIGH - first_row)
        # No row of a tile is that far.
        visible = rows >= tl.where(keys < SEQ_K - first_key, first, 1 << 20)
        if HAS_LEFT:
            visible = visible & (rows <= keys + (first_key - LOW - first_row))
    else:
        rows = first_row + rows
        keys = first_key + keys
        # The second part holds of every row: it gives the result the shape of the scores.
        visible = (keys < SEQ_K) & (rows >= 0)
        if HAS_LEFT:
            visible = visible & (keys >= rows + LOW)
        if HAS_RIGHT:
            visible = visible & (keys <= rows + HIGH)
    return visible
