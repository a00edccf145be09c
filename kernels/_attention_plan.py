"""What launches of attention take beside tensors: found once for each layout, kind of scores, dtype and target.

A plan is kept, so it depends on no tensor and on no address, and the forward's on no exact number of keys: a cache that
grows by a key a step, in place or into new tensors whose strides are others, has the plan of the step before.
Descriptors do depend on addresses: a launcher asks `layout_reason` where a plan has any, and takes the plan without
them if there is a reason.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels import _target
from fastattn.kernels._attention_config import heads_together, score_load, takes_parts
from fastattn.kernels._attention_decode_config import CombineTiles
from fastattn.kernels._attention_forms import fitting_config, uses_descriptors
from fastattn.kernels._attention_grid import counted_keys, few_queries_grid, may_fold
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._config import ceil_div
from fastattn.kernels._layout import block_d, first_block, rows_narrow, rows_readable
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._plan import Constants, planned
from fastattn.kernels._target import Target


class AttentionLaunch(NamedTuple):
    """Of one kernel: its tiles, its grid, and its arguments that are no tensors."""

    tiles: AttentionTiles
    grid: tuple[int, ...]
    constants: Constants


class ForwardPlan(NamedTuple):
    """How `attention_forward` launches, and which of q, k and v it reads where they lie.

    `forward` lacks SEQ_K and MAX_SEQ_K. `combine`: the launch that puts splits of the keys together, where the grid has
    an axis 1 of them.
    """

    descriptors: bool
    in_place: tuple[bool, ...]
    forward: AttentionLaunch
    combine: CombineTiles | None = None


class BackwardPlan(NamedTuple):
    """How `attention_backward` launches, and which of q, k, v, out and dout it reads where they lie.

    `dv` is the launch of dv alone; `separate_dk_dv` and `reduce_dq` are those of the config.
    """

    descriptors: bool
    in_place: tuple[bool, ...]
    delta: AttentionLaunch
    dq: AttentionLaunch
    dk_dv: AttentionLaunch
    dv: AttentionLaunch
    dbias: AttentionLaunch
    separate_dk_dv: bool
    reduce_dq: bool


Strides = tuple[tuple[int, ...], ...]


_ForwardLayout = tuple[
    torch.Size, torch.Size, Strides, torch.dtype, str, tuple[Any, ...], AttentionConfig | None, Target, bool
]


@planned
def forward_plan(
    shape_q: tuple[int, ...],
    shape_v: tuple[int, ...],
    strides: Strides,
    dtype: torch.dtype,
    load: str,
    reach: tuple[Any, ...],
    config: AttentionConfig | None,
    target: Target,
    folds: bool = False,
    described: bool = True,
) -> ForwardPlan:
    """The plan of tensors of these shapes and strides.

    Args:
        load: see `score_load`.
        reach: see `reach_of`.
        config: replaces the one chosen for the shape and target, also where queries are few.
        folds: see `may_fold`.
        described: whether descriptors can read the tensors.
    """
    # Kept for the call as it is, one look-up where nothing grows, and for it less what a further key changes.
    return _forward_plan(
        shape_q, shape_v[1], shape_v[3], tuple([rows_readable(of) for of in strides]),
        rows_narrow((shape_q[3], shape_v[3]), strides), dtype, load,
        (*reach[:5], counted_keys(reach)), config, target, folds, described,
    )  # fmt: skip


@planned
def _forward_plan(
    shape_q: tuple[int, ...],
    kv_heads: int,
    v_dim: int,
    in_place: tuple[bool, ...],
    narrow: bool,
    dtype: torch.dtype,
    load: str,
    reach: tuple[Any, ...],
    config: AttentionConfig | None,
    target: Target,
    folds: bool,
    described: bool,
) -> ForwardPlan:
    """`reach` has the keys in round numbers, see `counted_keys`."""
    width, heads = max(shape_q[3], v_dim), shape_q[1]
    sizes = _sizes(shape_q, kv_heads, v_dim, reach, takes_parts(dtype, target, load))
    few = few_queries_grid(heads, kv_heads, reach, width, dtype, target, folds) if config is None else None
    if few is not None:
        launch = _by_queries(few.tiles, heads, sizes, reach, _HEAD_AFTER_HEAD)._replace(grid=few.grid)
        # Products do not bind there.
        launch.constants.update(**_whole(sizes), FOLDED=few.folded, SPLIT=len(few.grid) > 1)
        return ForwardPlan(False, in_place, launch, few.combine if len(few.grid) > 1 else None)
    config = fitting_config(config, described, width, dtype, target, load, v_dim, narrow)
    together, _ = _heads_together(sizes, heads, reach, dtype, target)
    launch = _by_queries(config.forward, heads, sizes, reach, together)
    launch.constants.update(FOLDED=False, SPLIT=False)
    return ForwardPlan(uses_descriptors(config), in_place, launch)


@planned
def backward_plan(
    shape_q: tuple[int, ...],
    shape_v: tuple[int, ...],
    strides: Strides,
    dtype: torch.dtype,
    load: str,
    reach: tuple[Any, ...],
    config: AttentionConfig | None,
    target: Target,
    described: bool = True,
) -> BackwardPlan:
    """The plan of tensors of these shapes and strides; see `forward_plan`."""
    batch, heads, seq_q, head_dim = shape_q
    kv_heads, v_dim = shape_v[1], shape_v[3]
    narrow = rows_narrow((head_dim, v_dim), strides)
    config = fitting_config(config, described, max(head_dim, v_dim), dtype, target, load, v_dim, narrow)
    sizes = _sizes(shape_q, kv_heads, v_dim, reach, takes_parts(dtype, target, load))
    sizes |= {"SEQ_K": shape_v[2], "MAX_SEQ_K": reach[5]}
    sequences = reach[3]
    by_queries, by_keys = _heads_together(sizes, heads, reach, dtype, target)
    return BackwardPlan(
        uses_descriptors(config),
        tuple(rows_readable(of) for of in strides),
        AttentionLaunch(
            config.delta,
            (ceil_div(seq_q, config.delta.block_m) * heads * batch,),
            Constants(
                HEADS=heads, SEQ_Q=seq_q, V_DIM=v_dim,
                BLOCK_M=config.delta.block_m, BLOCK_V=block_d(v_dim), num_warps=config.delta.num_warps,
            ),
        ),
        _by_queries(config.dq, heads, sizes, reach, by_queries),
        _by_keys(config.dk_dv, kv_heads, sizes, reach, by_keys),
        _by_keys(config.dv or config.dk_dv, kv_heads, sizes, reach, by_keys),
        # The grid is of the bias, whose shape is not known here.
        AttentionLaunch(
            config.dbias, (0,), Constants(HEADS=heads, SEQUENCES=sequences, **sizes, **_tiled(config.dbias))
        ),
        config.separate_dk_dv,
        config.reduce_dq,
    )  # fmt: skip


def reach_of(asked: AttentionOptions, q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """Which keys a query sees, and of which sequences, as numbers.

    Returns:
        left, right, bottom_right: those of the options.
        sequences, longest_q, longest_k: how many sequences there are, and the rows of the longest.
    """
    window = asked.left, asked.right, asked.bottom_right
    batch, _, seq_q, _ = q.shape
    if asked.cu_seqlens_q is None and asked.cu_seqlens_k is None:
        return *window, batch, seq_q, k.size(2)
    return *window, asked.sequences(batch), asked.longest_q(seq_q), asked.longest_k(k.size(2))


def forward_layout(
    q: Tensor, k: Tensor, v: Tensor, asked: AttentionOptions, config: AttentionConfig | None
) -> _ForwardLayout:
    """The arguments of `forward_plan`."""
    return (
        q.shape, v.shape, (q.stride(), k.stride(), v.stride()), q.dtype, score_load(asked), reach_of(asked, q, k),
        config, _target.target_of(q.device), may_fold(asked),
    )  # fmt: skip


def read_in_place(tensors: tuple[Tensor, ...], in_place: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """What kernels read of the tensors: each itself, or a contiguous copy."""
    if all(in_place):
        return tensors
    return tuple(
        tensor if readable else tensor.clone(memory_format=torch.contiguous_format)
        for tensor, readable in zip(tensors, in_place, strict=True)
    )


def _by_queries(
    tiles: AttentionTiles, heads: int, sizes: dict[str, Any], reach: tuple[Any, ...], together: dict[str, Any]
) -> AttentionLaunch:
    """The launch of a kernel whose programs each take a tile of queries."""
    sequences, longest_q = reach[3:5]
    return AttentionLaunch(
        tiles,
        (ceil_div(longest_q, tiles.block_m) * heads * sequences,),
        Constants(HEADS=heads, **together, **_tiled(tiles), **_columns(tiles, sizes), **tiles.loop),
    )


def _by_keys(
    tiles: AttentionTiles,
    kv_heads: int,
    sizes: dict[str, Any],
    reach: tuple[Any, ...],
    together: dict[str, Any],
) -> AttentionLaunch:
    """The launch of a kernel whose programs each take a tile of keys."""
    sequences, _longest_q, longest_k = reach[3:]
    return AttentionLaunch(
        tiles,
        (ceil_div(longest_k, tiles.block_n) * kv_heads * sequences,),
        Constants(KV_HEADS=kv_heads, **together, **_tiled(tiles), **_columns(tiles, sizes), **tiles.loop),
    )


_HEAD_AFTER_HEAD: dict[str, Any] = {"HEADS_TOGETHER": None, "HEADS_ABSENT": None}


def _heads_together(
    sizes: dict[str, Any], heads: int, reach: tuple[Any, ...], dtype: torch.dtype, target: Target
) -> list[dict[str, Any]]:
    """The sections of heads, of kernels by queries and of those by keys."""
    groups, (sequences, longest_q, longest_k) = sizes["GROUPS"], reach[3:]
    width = (sizes["HEAD_DIM"] + sizes["V_DIM"]) * dtype.itemsize
    # With a window on both sides the tiles of a head are about as long as each other.
    balance = sizes["HAS_RIGHT"] and not sizes["HAS_LEFT"]
    key_heads = heads // groups * sequences
    found = []
    # The query heads of a group share their keys, and are mixed as one; a program of keys walks all of them.
    for rows, mixed in ((longest_k, groups), (longest_q * groups, 1)):
        sections = heads_together(rows * width, key_heads, balance, target)
        if sections is None:
            found.append(_HEAD_AFTER_HEAD)
        else:
            found.append({"HEADS_TOGETHER": mixed * sections[0], "HEADS_ABSENT": mixed * sections[1]})
    return found


def _sizes(
    shape_q: tuple[int, ...], kv_heads: int, v_dim: int, reach: tuple[Any, ...], parts: bool
) -> dict[str, Any]:
    """The arguments of kernels that are of the call and not of the tiles, but for how many keys there are."""
    block = first_block if parts else block_d
    _, heads, seq_q, head_dim = shape_q
    left, right, bottom_right, _, longest_q, _ = reach
    return {
        "GROUPS": heads // kv_heads,
        "SEQ_Q": seq_q,
        "MAX_SEQ_Q": longest_q,
        "LEFT": left,
        "RIGHT": right,
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "BOTTOM_RIGHT": bottom_right,
        "HEAD_DIM": head_dim,
        "V_DIM": v_dim,
        "BLOCK_D": block(head_dim),
        "BLOCK_V": block(v_dim),
    }


def _whole(sizes: dict[str, Any]) -> dict[str, int]:
    """Blocks that hold all columns."""
    return {"BLOCK_D": block_d(sizes["HEAD_DIM"]), "BLOCK_V": block_d(sizes["V_DIM"])}


def _columns(tiles: AttentionTiles, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes, with blocks of all columns where descriptors load them."""
    return sizes | _whole(sizes) if tiles.descriptors else sizes


def _tiled(tiles: AttentionTiles) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
