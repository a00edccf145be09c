"""Attention, forward, on sm_90: the same sums as `attention_forward`, by warp groups of different tasks, in Gluon.

The overlaps of FlashAttention-3 (Shah et al., 2024): one warp loads tiles of keys and values into rings in shared
memory, and each of two warp groups owns 64 queries. A group issues the product of its queries with the next tile of
keys before it computes the softmax of this one, and waits for it afterwards; the other group's work overlaps with
either. Gluon says where a product is waited for, which Triton's own language does not. Groups drift apart by
themselves: to have them take turns, as the paper does, needs barriers among some of a program's warps, and Gluon has
none.

Imported by a launch of this form alone: Gluon is experimental, and no other kernel needs it.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from fastattn.kernels import _target
from fastattn.kernels._arguments import LOG2_E as _LOG2_E
from fastattn.kernels._arguments import Rows
from fastattn.kernels._attention_plan import AttentionLaunch
from fastattn.kernels._launch import launch
from fastattn.kernels._math import LN_2, LOG2_E
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._tiles import _key_schedule, _key_window, _split_program
from fastattn.kernels._warp_groups import (
    _FEW_REGISTERS,
    _REGISTERS,
    _ROWS,
    _arrived,
    _barriers,
    _copy,
    _load,
    _release,
    _slots,
    _store_rows_of_group,
    _tile,
    described_rows,
    width_of,
)


@gluon.jit
def _produce(q, k, v, queries, keys, values, batch, head, kv_head, first_row, tiles):
    """The loads of a program, from the last tile of keys to the first; a tile's values behind the next tile's keys."""
    slots, full = queries
    CONSUMERS: gl.constexpr = slots.shape[0]
    BLOCK_N: gl.constexpr = keys[0].shape[3]
    for group in gl.static_range(CONSUMERS):
        mbarrier.expect(full.index(group), q.block_type.nbytes)
        _copy(q, [batch, head, first_row + group * _ROWS, 0], full.index(group), slots.index(group))
    _load(k, batch, kv_head, (tiles - 1) * BLOCK_N, keys, 0)
    for step in range(1, tiles):
        first = (tiles - 1 - step) * BLOCK_N
        _load(k, batch, kv_head, first, keys, step)
        _load(v, batch, kv_head, first + BLOCK_N, values, step - 1)
    _load(v, batch, kv_head, 0, values, tiles - 1)


@gluon.jit
def _weigh(
    products, row_max, row_sum, scale, first_row, first_key, SEQ_K, HIGH,
    HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """A tile's weights, the factor for what was summed before, and the running maximum (of scores, base 2) and sum.

    `_online_softmax_step` of products that are scaled as they meet the exponential: with scale > 0 the largest product
    is the largest score.
    """
    LAYOUT: gl.constexpr = products.type.layout
    if MASKED:
        rows = gl.arange(0, products.shape[0], layout=gl.SliceLayout(1, LAYOUT))
        keys = gl.arange(0, products.shape[1], layout=gl.SliceLayout(0, LAYOUT))
        last = rows * 0 + (SEQ_K - 1 - first_key)
        if HAS_RIGHT:
            last = gl.minimum(last, rows + (first_row + HIGH - first_key))
        # Eighths of keys are compared with what their places in an eighth leave: constants with four numbers.
        keys = gl.expand_dims(keys, 0)
        products = gl.where((keys & -8) <= gl.expand_dims(last, 1) - (keys & 7), products, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(products, 1) * scale)
    # A row that has seen no key yet has maximum -inf: a finite pivot makes its weights 0 and not NaN.
    pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(gl.fma(products, scale, -gl.expand_dims(pivot, 1)))
    rescale = gl.exp2(row_max - pivot)
    row_sum = row_sum * rescale + gl.sum(weights, 1)
    return weights, rescale, new_max, row_sum


@gluon.jit
def _step(
    queries, keys, values, products, accumulator, row_max, row_sum, scale, first_row, tiles, step, SEQ_K, HIGH,
    GROUP: gl.constexpr, HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Adds a tile whose products q . k are given, and returns those of the next one, which run beside the softmax."""
    BLOCK_N: gl.constexpr = keys[0].shape[3]
    SCORES: gl.constexpr = products.type.layout
    OUT: gl.constexpr = accumulator.type.layout
    if not LAST:
        zeros = gl.zeros([_ROWS, BLOCK_N], gl.float32, SCORES)
        next_keys = _arrived(keys, step + 1).permute((1, 0))
        # 0, which the compiler cannot know: descriptors of a wide q, one for each 16 columns, would all be found before
        # the loop, and take more registers than it has.
        nothing = step >> 30 if queries.shape[4] > 128 else 0
        q = _tile(queries, GROUP + nothing)
        running = warpgroup_mma(q, next_keys, zeros, use_acc=False, is_async=True)
    weights, rescale, row_max, row_sum = _weigh(
        products,
        row_max,
        row_sum,
        scale,
        first_row,
        (tiles - 1 - step) * BLOCK_N,
        SEQ_K,
        HIGH,
        HAS_RIGHT,
        MASKED,
    )
    weights = gl.convert_layout(weights.to(keys[0].dtype), gl.DotOperandLayout(0, OUT, 2))
    accumulator = accumulator * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, OUT)), 1)
    if not LAST:
        products = warpgroup_mma_wait(0, deps=[running])
        _release(keys, step + 1)
    accumulator = warpgroup_mma(weights, _arrived(values, step), accumulator)
    if not LAST:
        _release(values, step)
    return products, accumulator, row_max, row_sum


@gluon.jit
def _consume(
    queries, keys, values, out, lse_ptr, sink, block_row, tiles, scale, heads, SEQ_Q, SEQ_K, HIGH,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, V_DIM: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """What one warp group does: 64 rows of a program's block."""
    BLOCK_N: gl.constexpr = keys[0].shape[3]
    BLOCK_V: gl.constexpr = values[0].shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    first_row = block_row + GROUP * _ROWS
    # Steps from `begin` on are at keys that these rows see, those from `full` on at no others; the last step, at the
    # first keys, is taken in any case.
    _b, _f, full_end, end = _key_schedule(first_row, SEQ_K, 0, HIGH, False, HAS_RIGHT, _ROWS, BLOCK_N)
    end = gl.where(first_row < SEQ_Q, end, 0)
    begin = tiles - gl.maximum(gl.cdiv(end, BLOCK_N), 1)
    full = gl.maximum(tiles - full_end // BLOCK_N, begin)
    for step in range(begin):
        _arrived(keys, step)
        _release(keys, step)
        _arrived(values, step)
        _release(values, step)

    # One more key, seen first, whose value is 0; none where sink is -inf.
    row_max = gl.full([_ROWS], sink, gl.float32, gl.SliceLayout(1, SCORES))
    row_sum = gl.where(row_max == float("-inf"), 0.0, 1.0)
    accumulator = gl.zeros([_ROWS, BLOCK_V], gl.float32, OUT)
    mbarrier.wait(queries[1].index(GROUP), 0)
    q = _tile(queries[0], GROUP)
    zeros = gl.zeros([_ROWS, BLOCK_N], gl.float32, SCORES)
    products = warpgroup_mma(q, _arrived(keys, begin).permute((1, 0)), zeros, use_acc=False)
    _release(keys, begin)
    # Two steps at a time: what one computes is where the other reads it. An odd one goes to the loop before.
    full += (tiles - 1 - full) & 1
    for step in range(begin, gl.minimum(full, tiles - 1)):
        products, accumulator, row_max, row_sum = _step(
            queries[0], keys, values, products, accumulator, row_max, row_sum, scale, first_row, tiles, step, SEQ_K,
            HIGH, GROUP, HAS_RIGHT, True, False,
        )  # fmt: skip
    for pair in range(full, tiles - 1, 2):
        for second in gl.static_range(2):
            products, accumulator, row_max, row_sum = _step(
                queries[0], keys, values, products, accumulator, row_max, row_sum, scale, first_row, tiles,
                pair + second, SEQ_K, HIGH, GROUP, HAS_RIGHT, False, False,
            )  # fmt: skip
    products, accumulator, row_max, row_sum = _step(
        queries[0], keys, values, products, accumulator, row_max, row_sum, scale, first_row, tiles, tiles - 1, SEQ_K,
        HIGH, GROUP, HAS_RIGHT, True, True,
    )  # fmt: skip
    _store(
        accumulator, row_max, row_sum, out, lse_ptr, heads, SEQ_Q, first_row, keys[0].dtype, BLOCK_M, V_DIM
    )


@gluon.jit
def _store(
    accumulator, row_max, row_sum, out, lse_ptr, heads, SEQ_Q, first_row,
    dtype: gl.constexpr, BLOCK_M: gl.constexpr, V_DIM: gl.constexpr,
):  # fmt: skip
    """Writes 64 rows of out and lse."""
    OUT: gl.constexpr = accumulator.type.layout
    HEADS, HEADS_TOGETHER, HEADS_ABSENT = heads  # in the grid, see `_split_program`
    # Found again: kept, they would take registers throughout the loop.
    _tile, batch, head = _split_program(gl.cdiv(SEQ_Q, BLOCK_M), HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    # A row that saw no key has row_sum 0: its output is 0, whatever the values are, and its lse -inf.
    unseen = row_sum == 0.0
    factor = gl.convert_layout(gl.where(unseen, 0.0, 1.0 / row_sum), gl.SliceLayout(1, OUT))
    factor = gl.expand_dims(factor, 1)
    result = gl.where(factor == 0.0, 0.0, accumulator * factor)
    _store_rows_of_group(out, result, batch, head, first_row, SEQ_Q, V_DIM, dtype)
    rows = first_row + gl.arange(0, _ROWS, layout=row_sum.type.layout)
    lse = gl.where(unseen, float("-inf"), (row_max + gl.log2(row_sum)) * LN_2)
    gl.store(lse_ptr + (batch * HEADS + head) * SEQ_Q + rows, lse, mask=rows < SEQ_Q)


@gluon.jit(do_not_specialize=["HEADS", "SEQ_Q", "SEQ_K", "RIGHT", "HEADS_TOGETHER", "HEADS_ABSENT"])
def _attention_forward_warp_groups_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    sinks_ptr,
    scale,
    HEADS,
    GROUPS,
    SEQ_Q,
    SEQ_K,
    RIGHT,
    HEADS_TOGETHER,
    HEADS_ABSENT,
    HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr,
    V_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program computes BLOCK_M = 128 rows of out and lse of one head, 64 a warp group.

    Grid (cdiv(SEQ_Q, BLOCK_M) * HEADS * batch,), as of `_attention_forward_kernel`. q, k and v are descriptors of tiles
    (1, 1, 64 or BLOCK_N, width), out is `Rows`, lse (batch, HEADS, SEQ_Q), contiguous. scale is in base 2 and above 0.
    """
    CONSUMERS: gl.constexpr = BLOCK_M // _ROWS
    gl.static_assert(CONSUMERS == 2, "there are two warp groups, of 64 queries each")
    blocks = gl.cdiv(SEQ_Q, BLOCK_M)
    tile, batch, head = _split_program(blocks, HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    _k, _o, _l, high = _key_window(batch, None, SEQ_Q, SEQ_K, 0, RIGHT, BOTTOM_RIGHT)
    first_row = (blocks - 1 - tile) * BLOCK_M
    _b, _f, _e, end = _key_schedule(first_row, SEQ_K, 0, high, False, HAS_RIGHT, BLOCK_M, BLOCK_N)
    tiles = gl.maximum(gl.cdiv(end, BLOCK_N), 1)
    sink = gl.to_tensor(float("-inf"))
    if sinks_ptr is not None:
        sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2_E

    queries = (_slots(q, CONSUMERS), _barriers(CONSUMERS, 1))
    keys = (_slots(k, STAGES), _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))
    values = (_slots(v, STAGES), _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))
    heads = (HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    batch = batch.to(gl.int32)
    head = head.to(gl.int32)
    gl.warp_specialize(
        [
            (_consume, (
                queries, keys, values, out, lse_ptr, sink, first_row, tiles, scale, heads, SEQ_Q, SEQ_K, high,
                0, BLOCK_M, V_DIM, HAS_RIGHT,
            )),
            (_consume, (
                queries, keys, values, out, lse_ptr, sink, first_row, tiles, scale, heads, SEQ_Q, SEQ_K, high,
                1, BLOCK_M, V_DIM, HAS_RIGHT,
            )),
            (_produce, (q, k, v, queries, keys, values, batch, head, head // GROUPS, first_row, tiles)),
        ],
        [4, 1],
        [_REGISTERS, _FEW_REGISTERS],
    )  # fmt: skip


_CONSTANTS = (
    "HEADS", "GROUPS", "SEQ_Q", "RIGHT", "HAS_RIGHT", "BOTTOM_RIGHT", "V_DIM", "BLOCK_M", "BLOCK_N",
    "num_warps",
)  # fmt: skip


def launch_warp_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    asked: AttentionOptions,
    plan: AttentionLaunch,
) -> None:
    """Fills out and lse, where `fastattn.kernels._attention_forms` has no reason against it."""
    width_q, width_v = width_of(q.size(3)), width_of(v.size(3))
    rows = plan.tiles.block_n
    with _target.launching_on(q):
        launch(
            _attention_forward_warp_groups_kernel,
            plan.grid,
            plan.constants.only(_CONSTANTS),
            q=described_rows(q, _ROWS.value, width_q),
            k=described_rows(k, rows, width_q),
            v=described_rows(v, rows, width_v),
            out=Rows(out, *out.stride()[:3]),
            lse_ptr=lse,
            sinks_ptr=None if asked.sinks is None else asked.sinks.contiguous(),
            scale=asked.scale * _LOG2_E,
            SEQ_K=k.size(2),
            STAGES=plan.tiles.num_stages,
            # A section of one head is head after head.
            HEADS_TOGETHER=plan.constants["HEADS_TOGETHER"] or 1,
            HEADS_ABSENT=plan.constants["HEADS_ABSENT"] or 0,
        )
