"""Attention, backward for keys and values, on sm_90: `attention_backward_dk_dv` by warp groups, in Gluon.

As in FlashAttention-3 (Shah et al., 2024): one warp loads tiles of queries and of gradients into rings in shared
memory, and each of two warp groups owns 64 keys. A group issues k q^T and v dO^T together, computes the weights while
the second runs, and the gradients of the scores while P^T dO runs; the other group's work overlaps with either.

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
from fastattn.kernels._config import ceil_div
from fastattn.kernels._math import LOG2_E
from fastattn.kernels._options import AttentionOptions
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
    q, dout, k, v, statistics, queries, own, batch, kv_head, heads, GROUPS, first_key, begin, lap, PADDED, ROWS
):  # fmt: skip
    """The loads of a program: its own keys and values, then tiles of queries, head after head of the group."""
    tiles, full = own
    keys, values = tiles
    CONSUMERS: gl.constexpr = keys.shape[0]
    for group in gl.static_range(CONSUMERS):
        barrier = full.index(group)
        mbarrier.expect(barrier, k.block_type.nbytes + v.block_type.nbytes)
        corner = [batch, kv_head, first_key + group * _ROWS, 0]
        _copy(k, corner, barrier, keys.index(group))
        _copy(v, corner, barrier, values.index(group))
    tiles, full, free = queries
    rows, gradients, shifts, deltas = tiles
    BLOCK_M: gl.constexpr = shifts.shape[1]
    nbytes: gl.constexpr = q.block_type.nbytes + dout.block_type.nbytes + 2 * statistics.block_type.nbytes
    for step in range(lap * GROUPS):
        head = kv_head * GROUPS + step // lap
        first_row = begin + step % lap * BLOCK_M
        place = (batch * heads + head) * PADDED + first_row
        slot, barrier = _claim(full, free, step, nbytes)
        _copy(q, [batch, head, first_row, 0], barrier, rows.index(slot))
        _copy(statistics, [place], barrier, shifts.index(slot))
        _copy(dout, [batch, head, first_row, 0], barrier, gradients.index(slot))
        _copy(statistics, [ROWS + place], barrier, deltas.index(slot))


@gluon.jit
def _step(
    k, v, dk, dv, queries, scale_log2, ahead, step,
    MASKED: gl.constexpr, NEEDS_DK: gl.constexpr, NEEDS_DV: gl.constexpr,
):  # fmt: skip
    """Adds dS^T Q and P^T dO of a tile of queries; scores are (keys, queries).

    ahead: by how many rows the first query that sees the first key lies behind the tile's first.
    """
    slot = _await(queries, step)
    q, dout = _tile(queries[0][0], slot), _tile(queries[0][1], slot)
    BLOCK_M: gl.constexpr = q.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    zeros = gl.zeros([_ROWS, BLOCK_M], gl.float32, SCORES)
    products = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if NEEDS_DK:
        dweights = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(1 if NEEDS_DK else 0, deps=[products])
    shift = queries[0][2].index(slot).load(QUERIES)
    weights = gl.exp2(gl.fma(products, scale_log2, gl.expand_dims(shift, 0)))
    if MASKED:
        # Counted from the tile's own place, and not found once for all tiles: that would take registers of every loop.
        rows = gl.expand_dims(gl.arange(0, BLOCK_M, layout=QUERIES) - ahead, 0)
        keys = gl.expand_dims(gl.arange(0, _ROWS, layout=gl.SliceLayout(1, SCORES)), 1)
        weights = gl.where(rows >= keys, weights, 0.0)
    if NEEDS_DV:
        kept = gl.convert_layout(weights.to(dout.dtype), gl.DotOperandLayout(0, dv.type.layout, 2))
        dv = warpgroup_mma(kept, dout, dv, is_async=True)
    if NEEDS_DK:
        dweights = warpgroup_mma_wait(1 if NEEDS_DV else 0, deps=[dweights])
        delta = queries[0][3].index(slot).load(QUERIES)
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
    return dk, dv


@gluon.jit
def _consume(
    queries, own, dk_rows, dv_rows, scale, heads, GROUPS, block_key, begin, lap, SEQ_Q, SEQ_K, HIGH,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, V_DIM: gl.constexpr, HAS_RIGHT: gl.constexpr,
    NEEDS_DK: gl.constexpr, NEEDS_DV: gl.constexpr,
):  # fmt: skip
    """What one warp group does: 64 keys of a program's block."""
    tiles, arrived = own
    keys, values = tiles
    BLOCK_M: gl.constexpr = queries[0][2].shape[1]
    BLOCK_D: gl.constexpr = keys.shape[4]
    BLOCK_V: gl.constexpr = values.shape[4]
    DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    DV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    first_key = block_key + GROUP * _ROWS
    # Each head has `lap` tiles: these keys see none of the first `unseen`, and all of them from `full` on.
    unseen, full, _f, _e = _query_schedule(first_key, SEQ_Q, 0, HIGH, False, HAS_RIGHT, BLOCK_M, _ROWS)
    unseen = gl.minimum((unseen - begin) // BLOCK_M, lap)
    full = gl.minimum((full - begin) // BLOCK_M, lap)
    scale_log2 = scale * LOG2_E
    dk = gl.zeros([_ROWS, BLOCK_D], gl.float32, DK)
    dv = gl.zeros([_ROWS, BLOCK_V], gl.float32, DV)
    mbarrier.wait(arrived.index(GROUP), 0)
    k, v = _tile(keys, GROUP), _tile(values, GROUP)
    for member in range(GROUPS):
        first = member * lap
        for step in range(first, first + unseen):
            _await(queries, step)
            _release(queries, step)
        if HAS_RIGHT:
            for step in range(first + unseen, first + full):
                ahead = first_key - HIGH - begin - (step - first) * BLOCK_M
                dk, dv = _step(k, v, dk, dv, queries, scale_log2, ahead, step, True, NEEDS_DK, NEEDS_DV)
        for step in range(first + full, first + lap):
            dk, dv = _step(k, v, dk, dv, queries, scale_log2, 0, step, False, NEEDS_DK, NEEDS_DV)
    HEADS, HEADS_TOGETHER, HEADS_ABSENT, BLOCK_N = heads
    # Found again: kept, they would take registers throughout the loop.
    _t, batch, head = _split_program(gl.cdiv(SEQ_K, BLOCK_N), HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    if NEEDS_DK:
        _store_rows_of_group(dk_rows, dk * scale, batch, head, first_key, SEQ_K, HEAD_DIM, keys.dtype)
    if NEEDS_DV:
        _store_rows_of_group(dv_rows, dv, batch, head, first_key, SEQ_K, V_DIM, keys.dtype)


@gluon.jit(
    do_not_specialize=[
        "KV_HEADS",
        "SEQ_Q",
        "SEQ_K",
        "PADDED",
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
    PADDED,
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
):
    """One program computes BLOCK_N = 128 rows of dk and dv of one key head, 64 a warp group.

    Grid (cdiv(SEQ_K, BLOCK_N) * KV_HEADS * batch,), as of `_attention_dk_dv_kernel`. q, k, v and dout are descriptors
    of tiles (1, 1, 64 or BLOCK_M, width), statistics of BLOCK_M numbers of what `_attention_statistics_kernel` finds,
    (2, ROWS), PADDED a head, a multiple of BLOCK_M; dk and dv are `Rows`.
    """
    CONSUMERS: gl.constexpr = BLOCK_N // _ROWS
    blocks = gl.cdiv(SEQ_K, BLOCK_N)
    tile, batch, head = _split_program(blocks, KV_HEADS, HEADS_TOGETHER, HEADS_ABSENT)
    _k, _o, _l, high = _key_window(batch, None, SEQ_Q, SEQ_K, 0, RIGHT, BOTTOM_RIGHT)
    first_key = tile * BLOCK_N
    begin, _f, _e, end = _query_schedule(first_key, SEQ_Q, 0, high, False, HAS_RIGHT, BLOCK_M, BLOCK_N)
    lap = gl.cdiv(gl.maximum(end - begin, 0), BLOCK_M)

    own = ((_slots(k, CONSUMERS), _slots(v, CONSUMERS)), _barriers(CONSUMERS, 1))
    queries = (
        (_slots(q, STAGES), _slots(dout, STAGES), _slots(statistics, STAGES), _slots(statistics, STAGES)),
        _barriers(STAGES, 1),
        _barriers(STAGES, CONSUMERS),
    )
    heads = (KV_HEADS, HEADS_TOGETHER, HEADS_ABSENT, BLOCK_N)
    batch = batch.to(gl.int32)
    head = head.to(gl.int32)
    gl.warp_specialize(
        [
            (_consume, (
                queries, own, dk, dv, scale, heads, GROUPS, first_key, begin, lap, SEQ_Q, SEQ_K, high,
                0, HEAD_DIM, V_DIM, HAS_RIGHT, NEEDS_DK, NEEDS_DV,
            )),
            (_consume, (
                queries, own, dk, dv, scale, heads, GROUPS, first_key, begin, lap, SEQ_Q, SEQ_K, high,
                1, HEAD_DIM, V_DIM, HAS_RIGHT, NEEDS_DK, NEEDS_DV,
            )),
            (_produce, (
                q, dout, k, v, statistics, queries, own, batch, head, KV_HEADS * GROUPS, GROUPS, first_key, begin, lap,
                PADDED, ROWS,
            )),
        ],
        [4, 1],
        [_REGISTERS, _FEW_REGISTERS],
    )  # fmt: skip


_STATISTICS = 1024  # rows of a program

_CONSTANTS = (
    "KV_HEADS", "GROUPS", "SEQ_Q", "SEQ_K", "RIGHT", "HAS_RIGHT", "BOTTOM_RIGHT", "HEAD_DIM", "V_DIM", "BLOCK_M",
    "BLOCK_N", "num_warps",
)  # fmt: skip


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
    launch: AttentionLaunch,
) -> None:
    """Fills dk and dv, each unless it is None, where `fastattn.kernels._attention_forms` has no reason against it."""
    width_q, width_v = width_of(q.size(3)), width_of(v.size(3))
    rows = launch.tiles.block_m
    needs_dk, needs_dv = dk is not None, dv is not None
    # The kernel writes no gradient that is not needed; any tensor can stand for its pointer.
    dk, dv = k if dk is None else dk, v if dv is None else dv
    batch, heads, seq_q = lse.shape
    padded = ceil_div(seq_q, rows) * rows
    count = batch * heads * padded
    found = lse.new_empty(2, count)
    with _target.launching_on(q):
        _attention_statistics_kernel[(ceil_div(count, _STATISTICS),)](
            lse_ptr=lse,
            delta_ptr=delta,
            found_ptr=found,
            SEQ_Q=seq_q,
            PADDED=padded,
            COUNT=count,
            BLOCK=_STATISTICS,
        )
        _attention_dk_dv_warp_groups_kernel[launch.grid](
            q=described_rows(q, rows, width_q),
            k=described_rows(k, _ROWS.value, width_q),
            v=described_rows(v, _ROWS.value, width_v),
            dout=described_rows(dout, rows, width_v),
            statistics=described_numbers(found, rows),
            dk=Rows(dk, *dk.stride()[:3]),
            dv=Rows(dv, *dv.stride()[:3]),
            scale=asked.scale,
            PADDED=padded,
            ROWS=count,
            NEEDS_DK=needs_dk,
            NEEDS_DV=needs_dv,
            STAGES=launch.tiles.num_stages,
            # A section of one head is head after head.
            HEADS_TOGETHER=launch.constants["HEADS_TOGETHER"] or 1,
            HEADS_ABSENT=launch.constants["HEADS_ABSENT"] or 0,
            **{name: launch.constants[name] for name in _CONSTANTS},
        )
