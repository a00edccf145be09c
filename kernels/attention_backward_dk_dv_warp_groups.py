"""Attention, backward for keys and values, on sm_90: `attention_backward_dk_dv` by warp groups, in Gluon.

As in FlashAttention-3 (Shah et al., 2024): one warp loads tiles of queries and of gradients into a ring each in shared
memory, and each of two warp groups owns 64 keys. A group issues k q^T and v dO^T together, computes the weights while
the second runs, and the gradients of the scores while P^T dO runs; the other group's work overlaps with either.

Scalars, and descriptors of a product's operands, take registers beside the accumulators: hence one loop with branches
for all kinds of tiles, and indices that are found again.

Imported by a launch of this form alone: Gluon is experimental, and no other kernel needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from fastattn.kernels import _target
from fastattn.kernels._arguments import Rows
from fastattn.kernels._attention_plan import AttentionLaunch
from fastattn.kernels._attention_tables import AttentionTiles
from fastattn.kernels._config import ceil_div
from fastattn.kernels._launch import launch
from fastattn.kernels._math import LOG2_E
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._plan import constants_of
from fastattn.kernels._target import Target
from fastattn.kernels._tiles import _key_window, _query_schedule, _split_program
from fastattn.kernels._warp_groups import (
    _FEW_REGISTERS,
    _REGISTERS,
    _ROWS,
    _await,
    _barriers,
    _claim,
    _copy,
    _release,
    _slots,
    _store_rows_of_group,
    _tile,
    described_numbers,
    described_rows,
    width_of,
)


@triton.jit(do_not_specialize=["SEQ_Q", "PADDED"])
def _attention_statistics_kernel(
    lse_ptr, delta_ptr, found_ptr, SEQ_Q, PADDED, COUNT, BLOCK: tl.constexpr
):  # fmt: skip
    """-lse in base 2 and delta, of PADDED rows a head: of a row without keys, and of one that is not there, -inf and 0.

    Grid (cdiv(COUNT, BLOCK),), COUNT the rows of all heads; found is (2, COUNT). As of `_load_log2_sum`.
    """
    places = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = places % PADDED
    inside = (row < SEQ_Q) & (places < COUNT)
    source = places // PADDED * SEQ_Q + row
    lse = tl.load(lse_ptr + source, mask=inside, other=float("-inf"))
    shift = tl.where(lse == float("-inf"), float("-inf"), lse * -LOG2_E)
    delta = tl.load(delta_ptr + source, mask=inside, other=0.0)
    tl.store(found_ptr + places, shift, mask=places < COUNT)
    tl.store(found_ptr + COUNT + places, delta, mask=places < COUNT)


@gluon.jit
def _produce(
    q, dout, k, v, statistics, own, queries, gradients, batch, kv_head, heads, GROUPS, first_key, begin, lap, SEQ_Q,
    ROWS, NEEDS_DK: gl.constexpr,
):  # fmt: skip
    """The loads of a program: its own keys and values, then tiles of queries, head after head of the group."""
    keys, values, arrived = own
    CONSUMERS: gl.constexpr = keys.shape[0]
    for group in gl.static_range(CONSUMERS):
        # Over at once, and a branch: the addresses of all these copies together have no registers.
        mbarrier.wait(queries[2].index(0), 1)
        barrier = arrived.index(group)
        corner = [batch, kv_head, first_key + group * _ROWS, 0]
        if NEEDS_DK:
            mbarrier.expect(barrier, k.block_type.nbytes + v.block_type.nbytes)
            _copy(v, corner, barrier, values.index(group))
        else:
            mbarrier.expect(barrier, k.block_type.nbytes)
        _copy(k, corner, barrier, keys.index(group))
    rows, shifts = queries[0]
    tiles, deltas = gradients[0]
    BLOCK_M: gl.constexpr = shifts.shape[1]
    q_bytes: gl.constexpr = q.block_type.nbytes + statistics.block_type.nbytes
    dout_bytes: gl.constexpr = dout.block_type.nbytes + (statistics.block_type.nbytes if NEEDS_DK else 0)
    padded = gl.cdiv(SEQ_Q, BLOCK_M) * BLOCK_M
    for member in range(GROUPS):
        head = kv_head * GROUPS + member
        for tile in range(lap):
            step = member * lap + tile
            first_row = begin + tile * BLOCK_M
            place = (batch * heads + head) * padded + first_row
            slot, barrier = _claim(queries[1], queries[2], step, q_bytes)
            _copy(q, [batch, head, first_row, 0], barrier, rows.index(slot))
            _copy(statistics, [place], barrier, shifts.index(slot))
            slot, barrier = _claim(gradients[1], gradients[2], step, dout_bytes)
            _copy(dout, [batch, head, first_row, 0], barrier, tiles.index(slot))
            if NEEDS_DK:
                _copy(statistics, [ROWS + place], barrier, deltas.index(slot))


@gluon.jit
def _mask(weights, ahead):
    """0 for a query that does not see its key; the first key's first query is `ahead` rows behind the tile's first.

    Eighths of rows are compared with what their places in an eighth leave: constants with four numbers of a thread.
    """
    SCORES: gl.constexpr = weights.type.layout
    rows = gl.expand_dims(gl.arange(0, weights.shape[1], layout=gl.SliceLayout(0, SCORES)), 0)
    keys = gl.expand_dims(gl.arange(0, weights.shape[0], layout=gl.SliceLayout(1, SCORES)) + ahead, 1)
    return gl.where((rows & -8) >= keys - (rows & 7), weights, 0.0)


@gluon.jit
def _step(
    own, dk, dv, queries, gradients, scale_log2, ahead, step,
    GROUP: gl.constexpr, HAS_RIGHT: gl.constexpr, NEEDS_DK: gl.constexpr, NEEDS_DV: gl.constexpr,
):  # fmt: skip
    """Adds dS^T Q and P^T dO of a tile of queries; scores are (keys, queries)."""
    keys, values, _ = own
    BLOCK_M: gl.constexpr = queries[0][1].shape[1]
    # 0, which the compiler cannot know: descriptors of wide tiles, one for each 16 columns, would all be found before
    # the loop, and take more registers than it has.
    nothing = step >> 30 if NEEDS_DK and keys.shape[4] + gradients[0][0].shape[4] > 256 else 0
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    zeros = gl.zeros([_ROWS, BLOCK_M], gl.float32, SCORES)
    slot = _await(queries, step) + nothing
    k, q = _tile(keys, GROUP + nothing), _tile(queries[0][0], slot)
    products = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    at = _await(gradients, step) + nothing
    dout = _tile(gradients[0][0], at)
    if NEEDS_DK:
        v = _tile(values, GROUP + nothing)
        dweights = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(1 if NEEDS_DK else 0, deps=[products])
    shift = queries[0][1].index(slot).load(QUERIES)
    weights = gl.exp2(gl.fma(products, scale_log2, gl.expand_dims(shift, 0)))
    if HAS_RIGHT:
        if ahead > 1 - _ROWS:
            weights = _mask(weights, ahead)
    elif not NEEDS_DV:
        # Over long ago: a branch, as that of the mask, beyond which the assembler does not move the exponentials, to
        # behind the next wait.
        _await(queries, step)
    if NEEDS_DV:
        kept = gl.convert_layout(weights.to(dout.dtype), gl.DotOperandLayout(0, dv.type.layout, 2))
        dv = warpgroup_mma(kept, dout, dv, is_async=True)
    if NEEDS_DK:
        dweights = warpgroup_mma_wait(1 if NEEDS_DV else 0, deps=[dweights])
        delta = gradients[0][1].index(at).load(QUERIES)
        if not NEEDS_DV:
            _release(gradients, step)
        dscores = weights * (dweights - gl.expand_dims(delta, 0))
        dscores = gl.convert_layout(dscores.to(q.dtype), gl.DotOperandLayout(0, dk.type.layout, 2))
        dk = warpgroup_mma(dscores, q, dk, is_async=True)
    if NEEDS_DK and NEEDS_DV:
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    elif NEEDS_DK:
        dk = warpgroup_mma_wait(0, deps=[dk])
    else:
        dv = warpgroup_mma_wait(0, deps=[dv])
    _release(queries, step)
    if NEEDS_DV:
        _release(gradients, step)
    return dk, dv


@gluon.jit
def _consume(
    own, queries, gradients, dk_rows, dv_rows, scale, heads, GROUPS, block_key, begin, lap, SEQ_K, HIGH,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, V_DIM: gl.constexpr, HAS_RIGHT: gl.constexpr,
    NEEDS_DK: gl.constexpr, NEEDS_DV: gl.constexpr,
):  # fmt: skip
    """What one warp group does: 64 keys of a program's block."""
    keys, _, arrived = own
    BLOCK_M: gl.constexpr = queries[0][1].shape[1]
    BLOCK_D: gl.constexpr = keys.shape[4]
    BLOCK_V: gl.constexpr = gradients[0][0].shape[4]
    DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    DV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    first_key = block_key + GROUP * _ROWS
    scale_log2 = scale * LOG2_E
    dk = gl.zeros([_ROWS, BLOCK_D], gl.float32, DK)
    dv = gl.zeros([_ROWS, BLOCK_V], gl.float32, DV)
    mbarrier.wait(arrived.index(GROUP), 0)
    # One loop with branches and not one for each kind of tile: between loops, scalars had no registers.
    for member in range(GROUPS):
        for tile in range(lap):
            step = member * lap + tile
            # By how many rows the first query that sees the first key lies behind the tile's first.
            ahead = first_key - HIGH - begin - tile * BLOCK_M
            if HAS_RIGHT:
                seen = ahead < BLOCK_M
            else:
                seen = True
            if seen:
                dk, dv = _step(
                    own, dk, dv, queries, gradients, scale_log2, ahead, step, GROUP, HAS_RIGHT, NEEDS_DK, NEEDS_DV,
                )  # fmt: skip
            else:
                _await(queries, step)
                _release(queries, step)
                _await(gradients, step)
                _release(gradients, step)
    HEADS, HEADS_TOGETHER, HEADS_ABSENT, BLOCK_N = heads
    # Found again: kept, they would take registers throughout the loop.
    _t, batch, head = _split_program(gl.cdiv(SEQ_K, BLOCK_N), HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    if NEEDS_DK:
        _store_rows_of_group(dk_rows, dk * scale, batch, head, first_key, SEQ_K, HEAD_DIM, keys.dtype)
    if NEEDS_DV:
        _store_rows_of_group(dv_rows, dv, batch, head, first_key, SEQ_K, V_DIM, keys.dtype)


@gluon.jit
def _ring(slots, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    return slots, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)


@gluon.jit(
    do_not_specialize=[
        "KV_HEADS",
        "SEQ_Q",
        "SEQ_K",
        "ROWS",
        "RIGHT",
        "HEADS_TOGETHER",
        "HEADS_ABSENT",
    ]
)
def _attention_dk_dv_warp_groups_kernel(
    q,
    k,
    v,
    dout,
    statistics,
    dk,
    dv,
    scale,
    KV_HEADS,
    GROUPS,
    SEQ_Q,
    SEQ_K,
    ROWS,
    RIGHT,
    HEADS_TOGETHER,
    HEADS_ABSENT,
    HAS_RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr,
    NEEDS_DK: gl.constexpr,
    NEEDS_DV: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    V_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    STAGES_DOUT: gl.constexpr,
):
    """One program computes BLOCK_N = 128 rows of dk and dv of one key head, 64 a warp group.

    Grid (cdiv(SEQ_K, BLOCK_N) * KV_HEADS * batch,), as of `_attention_dk_dv_kernel`. q, k, v and dout are descriptors
    of tiles (1, 1, 64 or BLOCK_M, width), statistics of BLOCK_M numbers of what `_attention_statistics_kernel` finds,
    (2, ROWS), of each head SEQ_Q rounded up to a multiple of BLOCK_M; dk and dv are `Rows`. STAGES and STAGES_DOUT are
    slots for tiles of q and of dO.
    """
    CONSUMERS: gl.constexpr = BLOCK_N // _ROWS
    gl.static_assert(CONSUMERS == 2, "there are two warp groups, of 64 keys each")
    blocks = gl.cdiv(SEQ_K, BLOCK_N)
    tile, batch, head = _split_program(blocks, KV_HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    _k, _o, _l, high = _key_window(batch, None, SEQ_Q, SEQ_K, 0, RIGHT, BOTTOM_RIGHT)
    first_key = tile * BLOCK_N
    begin, _f, _e, end = _query_schedule(first_key, SEQ_Q, 0, high, False, HAS_RIGHT, BLOCK_M, BLOCK_N)
    lap = gl.cdiv(gl.maximum(end - begin, 0), BLOCK_M)

    keys, shifts, gradients = _slots(k, CONSUMERS), _slots(statistics, STAGES), _slots(dout, STAGES_DOUT)
    # dv alone reads no values and no delta: others stand for them.
    values = _slots(v, CONSUMERS) if NEEDS_DK else keys
    deltas = _slots(statistics, STAGES_DOUT) if NEEDS_DK else shifts
    own = (keys, values, _barriers(CONSUMERS, 1))
    queries = _ring((_slots(q, STAGES), shifts), STAGES, CONSUMERS)
    gradients = _ring((gradients, deltas), STAGES_DOUT, CONSUMERS)
    heads = (KV_HEADS, HEADS_TOGETHER, HEADS_ABSENT, BLOCK_N)
    batch = batch.to(gl.int32)
    head = head.to(gl.int32)
    gl.warp_specialize(
        [
            (_consume, (
                own, queries, gradients, dk, dv, scale, heads, GROUPS, first_key, begin, lap, SEQ_K, high,
                0, HEAD_DIM, V_DIM, HAS_RIGHT, NEEDS_DK, NEEDS_DV,
            )),
            (_consume, (
                own, queries, gradients, dk, dv, scale, heads, GROUPS, first_key, begin, lap, SEQ_K, high,
                1, HEAD_DIM, V_DIM, HAS_RIGHT, NEEDS_DK, NEEDS_DV,
            )),
            (_produce, (
                q, dout, k, v, statistics, own, queries, gradients, batch, head, KV_HEADS * GROUPS, GROUPS, first_key,
                begin, lap, SEQ_Q, ROWS, NEEDS_DK,
            )),
        ],
        [4, 1],
        [_REGISTERS, _FEW_REGISTERS],
    )  # fmt: skip


_STATISTICS = 1024  # rows of a program
_BARRIERS = 1024  # bytes of barriers and of what Triton itself keeps in shared memory, and more

_CONSTANTS = (
    "KV_HEADS", "GROUPS", "SEQ_Q", "SEQ_K", "RIGHT", "HAS_RIGHT", "BOTTOM_RIGHT", "HEAD_DIM", "V_DIM", "BLOCK_M",
    "BLOCK_N", "num_warps",
)  # fmt: skip


def _stages_of_gradients(
    tiles: AttentionTiles, width_q: int, width_v: int, needs_dk: bool, target: Target
) -> int:
    """Slots for tiles of dO: as many as for those of q, or what their room in shared memory leaves, at least one."""
    statistics = 4 * tiles.block_m
    keys = 2 * tiles.block_n * (width_q + width_v * needs_dk)
    queries = tiles.num_stages * (2 * tiles.block_m * width_q + statistics)
    room = target.shared_memory - _BARRIERS - keys - queries
    return min(tiles.num_stages, max(1, room // (2 * tiles.block_m * width_v + statistics)))


def launch_dk_dv_warp_groups(
    dk: Tensor | None,
    dv: Tensor | None,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    asked: AttentionOptions,
    plan: AttentionLaunch,
) -> None:
    """Fills dk and dv, each unless it is None, where `fastattn.kernels._attention_forms` has no reason against it."""
    width_q, width_v = width_of(q.size(3)), width_of(v.size(3))
    rows, target = plan.tiles.block_m, _target.target_of(q.device)
    needs_dk, needs_dv = dk is not None, dv is not None
    # The kernel writes no gradient that is not needed; any tensor can stand for its pointer.
    dk, dv = k if dk is None else dk, v if dv is None else dv
    batch, heads, seq_q = lse.shape
    padded = ceil_div(seq_q, rows) * rows
    count = batch * heads * padded
    found = lse.new_empty(2, count)
    with _target.launching_on(q):
        launch(
            _attention_statistics_kernel,
            (ceil_div(count, _STATISTICS),),
            constants_of(target, SEQ_Q=seq_q, PADDED=padded, COUNT=count, BLOCK=_STATISTICS),
            lse_ptr=lse,
            delta_ptr=delta,
            found_ptr=found,
        )
        launch(
            _attention_dk_dv_warp_groups_kernel,
            plan.grid,
            plan.constants.only(_CONSTANTS),
            q=described_rows(q, rows, width_q),
            k=described_rows(k, _ROWS.value, width_q),
            v=described_rows(v, _ROWS.value, width_v),
            dout=described_rows(dout, rows, width_v),
            statistics=described_numbers(found, rows),
            dk=Rows(dk, *dk.stride()[:3]),
            dv=Rows(dv, *dv.stride()[:3]),
            scale=asked.scale,
            ROWS=count,
            NEEDS_DK=needs_dk,
            NEEDS_DV=needs_dv,
            STAGES=plan.tiles.num_stages,
            STAGES_DOUT=_stages_of_gradients(plan.tiles, width_q, width_v, needs_dk, target),
            # A section of one head is head after head.
            HEADS_TOGETHER=plan.constants["HEADS_TOGETHER"] or 1,
            HEADS_ABSENT=plan.constants["HEADS_ABSENT"] or 0,
        )
