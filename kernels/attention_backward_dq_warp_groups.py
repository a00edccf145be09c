"""Attention, backward for the queries, on sm_90: `attention_backward_dq` by warp groups, in Gluon.

As in FlashAttention-3 (Shah et al., 2024): a program loads tiles of keys and values into rings in shared memory, and
each of two warp groups owns 64 queries. A group issues q k^T and dO v^T together and computes the weights while the
second runs; the other group's work overlaps with the rest.

Imported by a launch of this form alone: Gluon is experimental, and no other kernel needs it.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from fastattn.kernels import _target
from fastattn.kernels._arguments import Rows
from fastattn.kernels._attention_plan import AttentionLaunch
from fastattn.kernels._launch import launch
from fastattn.kernels._math import LOG2_E
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._tiles import _key_schedule, _key_window, _split_program
from fastattn.kernels._warp_groups import (
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
def _produce(q, k, v, dout, own, keys, values, batch, head, kv_head, first_row, tiles):
    """The loads of a program: its own queries and gradients, then keys and values from the last tile to the first."""
    slots, full = own
    rows, gradients = slots
    CONSUMERS: gl.constexpr = rows.shape[0]
    BLOCK_N: gl.constexpr = keys[0].shape[3]
    for group in gl.static_range(CONSUMERS):
        barrier = full.index(group)
        mbarrier.expect(barrier, q.block_type.nbytes + dout.block_type.nbytes)
        corner = [batch, head, first_row + group * _ROWS, 0]
        _copy(q, corner, barrier, rows.index(group))
        _copy(dout, corner, barrier, gradients.index(group))
    for step in range(tiles):
        first = (tiles - 1 - step) * BLOCK_N
        _load(k, batch, kv_head, first, keys, step)
        _load(v, batch, kv_head, first, values, step)


@gluon.jit
def _step(
    kept, dq, own, keys, values, shift, delta, last_key, scale_log2, tiles, step,
    MASKED: gl.constexpr, KEPT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Adds dS k of a tile of keys."""
    BLOCK_N: gl.constexpr = keys[0].shape[3]
    BLOCK_D: gl.constexpr = keys[0].shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    if KEPT:
        q, dout = kept
    else:
        # The group, in a way that the compiler cannot see: it would keep the addresses of all steps of both products
        # in registers throughout the loop, which there are not.
        slot = GROUP + (step >> 30)
        q, dout = _tile(own[0][0], slot), _tile(own[0][1], slot)
    zeros = gl.zeros([_ROWS, BLOCK_N], gl.float32, SCORES)
    k = _arrived(keys, step)
    products = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    v = _arrived(values, step)
    dweights = warpgroup_mma(dout, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(1, deps=[products])
    weights = gl.exp2(gl.fma(products, scale_log2, gl.expand_dims(shift, 1)))
    if MASKED:
        columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        last = last_key - (tiles - 1 - step) * BLOCK_N
        weights = gl.where(gl.expand_dims(columns, 0) <= gl.expand_dims(last, 1), weights, 0.0)
    # Over long ago: a branch, across which the assembler does not move the exponentials to behind the next wait.
    mbarrier.wait(own[1].index(GROUP), 0)
    dweights = warpgroup_mma_wait(0, deps=[dweights])
    _release(values, step)
    dscores = weights * (dweights - gl.expand_dims(delta, 1))
    dscores = gl.convert_layout(dscores.to(k.dtype), gl.DotOperandLayout(0, DQ, 2))
    dq = warpgroup_mma(dscores, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    _release(keys, step)
    return dq


@gluon.jit
def _consume(
    own, keys, values, dq_rows, lse_ptr, delta_ptr, statistics, block_row, tiles, scale, heads, SEQ_Q, SEQ_K, HIGH,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """What one warp group does: 64 rows of a program's block."""
    BLOCK_N: gl.constexpr = keys[0].shape[3]
    BLOCK_D: gl.constexpr = keys[0].shape[4]
    BLOCK_V: gl.constexpr = values[0].shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    # Whether q and dO fit registers, beside dq, two tiles of scores and the addresses: their products read half as much
    # shared memory then.
    KEPT: gl.constexpr = BLOCK_D // 2 + BLOCK_N + (BLOCK_D + BLOCK_V) // 4 <= 192
    first_row = block_row + GROUP * _ROWS
    # Steps from `begin` on are at keys that these rows see, those from `full` on at no others.
    _b, _f, full_end, end = _key_schedule(first_row, SEQ_K, 0, HIGH, False, HAS_RIGHT, _ROWS, BLOCK_N)
    end = gl.where(first_row < SEQ_Q, end, 0)
    begin = tiles - gl.cdiv(end, BLOCK_N)
    full = gl.maximum(tiles - full_end // BLOCK_N, begin)
    for step in range(begin):
        _arrived(keys, step)
        _release(keys, step)
        _arrived(values, step)
        _release(values, step)

    rows = first_row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, SCORES))
    inside = rows < SEQ_Q
    lse = gl.load(lse_ptr + (statistics + rows), mask=inside, other=float("-inf"))
    delta = gl.load(delta_ptr + (statistics + rows), mask=inside, other=0.0)
    unseen = lse == float("-inf")  # a row that sees no key, or is not there: all its weights are 0
    shift = gl.where(unseen, float("-inf"), lse * -LOG2_E)
    last_key = rows * 0 + (SEQ_K - 1)
    if HAS_RIGHT:
        last_key = gl.minimum(last_key, rows + HIGH)
    # Of what is loaded, since what is computed from numbers of threads alone is found at the kernel's beginning and
    # spilled from there to the loop.
    last_key = gl.where(unseen, -1, last_key)
    mbarrier.wait(own[1].index(GROUP), 0)
    kept = (0, 0)
    if KEPT:
        OPERAND: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
        kept = (_tile(own[0][0], GROUP).load(OPERAND), _tile(own[0][1], GROUP).load(OPERAND))
    dq = gl.zeros([_ROWS, BLOCK_D], gl.float32, DQ)
    scale_log2 = scale * LOG2_E
    for step in range(begin, full):
        dq = _step(
            kept, dq, own, keys, values, shift, delta, last_key, scale_log2, tiles, step, True, KEPT, GROUP
        )
    for step in range(full, tiles):
        dq = _step(
            kept, dq, own, keys, values, shift, delta, last_key, scale_log2, tiles, step, False, KEPT, GROUP
        )
    HEADS, HEADS_TOGETHER, HEADS_ABSENT = heads
    # Found again: kept, they would take registers throughout the loop.
    _t, batch, head = _split_program(gl.cdiv(SEQ_Q, BLOCK_M), HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    _store_rows_of_group(dq_rows, dq * scale, batch, head, first_row, SEQ_Q, HEAD_DIM, keys[0].dtype)


@gluon.jit(do_not_specialize=["HEADS", "SEQ_Q", "SEQ_K", "RIGHT", "HEADS_TOGETHER", "HEADS_ABSENT"])
def _attention_dq_warp_groups_kernel(
    q,
    k,
    v,
    dout,
    dq,
    lse_ptr,
    delta_ptr,
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
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program computes BLOCK_M = 128 rows of dq of one head, 64 a warp group.

    Grid (cdiv(SEQ_Q, BLOCK_M) * HEADS * batch,), as of `_attention_dq_kernel`. q, k, v and dout are descriptors of
    tiles (1, 1, 64 or BLOCK_N, width), dq is `Rows`, lse and delta are (batch, HEADS, SEQ_Q), contiguous.
    """
    CONSUMERS: gl.constexpr = BLOCK_M // _ROWS
    gl.static_assert(CONSUMERS == 2, "there are two warp groups, of 64 queries each")
    # A tile of values is needed for less long than one of keys, which dS k reads too.
    VALUES: gl.constexpr = STAGES - 1 if STAGES > 1 else 1
    blocks = gl.cdiv(SEQ_Q, BLOCK_M)
    tile, batch, head = _split_program(blocks, HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    _k, _o, _l, high = _key_window(batch, None, SEQ_Q, SEQ_K, 0, RIGHT, BOTTOM_RIGHT)
    first_row = (blocks - 1 - tile) * BLOCK_M
    _b, _f, _e, end = _key_schedule(first_row, SEQ_K, 0, high, False, HAS_RIGHT, BLOCK_M, BLOCK_N)
    tiles = gl.cdiv(end, BLOCK_N)
    statistics = (batch * HEADS + head) * SEQ_Q

    own = ((_slots(q, CONSUMERS), _slots(dout, CONSUMERS)), _barriers(CONSUMERS, 1))
    keys = (_slots(k, STAGES), _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))
    values = (_slots(v, VALUES), _barriers(VALUES, 1), _barriers(VALUES, CONSUMERS))
    heads = (HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    batch = batch.to(gl.int32)
    head = head.to(gl.int32)
    # The first has the registers that the others leave, 24 of a thread; with a group in its place there are spills.
    gl.warp_specialize(
        [
            (_produce, (q, k, v, dout, own, keys, values, batch, head, head // GROUPS, first_row, tiles)),
            (_consume, (
                own, keys, values, dq, lse_ptr, delta_ptr, statistics, first_row, tiles, scale, heads, SEQ_Q, SEQ_K,
                high, 0, BLOCK_M, HEAD_DIM, HAS_RIGHT,
            )),
            (_consume, (
                own, keys, values, dq, lse_ptr, delta_ptr, statistics, first_row, tiles, scale, heads, SEQ_Q, SEQ_K,
                high, 1, BLOCK_M, HEAD_DIM, HAS_RIGHT,
            )),
        ],
        [4, 4],
        [_REGISTERS, _REGISTERS],
    )  # fmt: skip


_CONSTANTS = (
    "HEADS", "GROUPS", "SEQ_Q", "SEQ_K", "RIGHT", "HAS_RIGHT", "BOTTOM_RIGHT", "HEAD_DIM", "BLOCK_M", "BLOCK_N",
    "num_warps",
)  # fmt: skip


def launch_dq_warp_groups(
    dq: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    asked: AttentionOptions,
    plan: AttentionLaunch,
) -> None:
    """Fills dq, where `fastattn.kernels._attention_forms` has no reason against it."""
    width_q, width_v = width_of(q.size(3)), width_of(v.size(3))
    rows = plan.tiles.block_n
    with _target.launching_on(q):
        launch(
            _attention_dq_warp_groups_kernel,
            plan.grid,
            plan.constants.only(_CONSTANTS),
            q=described_rows(q, _ROWS.value, width_q),
            k=described_rows(k, rows, width_q),
            v=described_rows(v, rows, width_v),
            dout=described_rows(dout, _ROWS.value, width_v),
            dq=Rows(dq, *dq.stride()[:3]),
            lse_ptr=lse,
            delta_ptr=delta,
            scale=asked.scale,
            STAGES=plan.tiles.num_stages,
            # A section of one head is head after head.
            HEADS_TOGETHER=plan.constants["HEADS_TOGETHER"] or 1,
            HEADS_ABSENT=plan.constants["HEADS_ABSENT"] or 0,
        )
