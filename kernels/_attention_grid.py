"""Which programs the forward launches where queries are few: tiles of a group's heads, and keys in splits.

A program for each tile of queries and head leaves most of a GPU idle there, fills few rows of its tile, and reads the
keys of a group once for every query head. Pure functions of sizes; imports no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastattn.kernels._attention_decode_config import CombineTiles, select_decode_config
from fastattn.kernels._attention_tables import AttentionTiles
from fastattn.kernels._config import ceil_div
from fastattn.kernels._layout import is_broadcast
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import Target

# So few queries are taken as few by themselves, and more as long as they are no more rows than a tile has, with those
# of the other heads of a group. Beyond, products take as long as loads (an H200 does 206 FLOPs in the time of a byte,
# and a row 1 FLOP for each byte of keys and values in 16 bits).
FEW_QUERIES = 16
FEW_ROWS = 128
# What share of its rounds a grid is to fill, FlashAttention-2's number (Dao, 2023), and of how many rounds at most.
_FULL_ENOUGH = 0.85
_MOST_ROUNDS = 4
# In which keys are counted at least, so that a cache which grows by a key a step has few plans. The fewest keys of a
# split are a multiple of it.
_KEYS = 32


@dataclass(frozen=True)
class FewQueriesGrid:
    """How the forward is launched where there are few queries.

    Attributes:
        tiles: of queries and keys.
        combine: the launch that puts splits together.
        folded: whether the rows of a tile are those of all query heads of a group.
        grid: of the kernel: tiles of queries, over all heads and sequences, and where keys are split, in how many.
    """

    tiles: AttentionTiles
    combine: CombineTiles
    folded: bool
    grid: tuple[int, ...]

    @property
    def splits(self) -> int:
        return self.grid[1] if len(self.grid) > 1 else 1


def few_queries_grid(
    heads: int,
    kv_heads: int,
    reach: tuple[Any, ...],
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    folds: bool,
) -> FewQueriesGrid | None:
    """The grid of a call with few queries, or None where the plain one serves as well.

    Args:
        reach: see `fastattn.kernels._attention_plan.reach_of`.
        head_dim: the wider of q's and v's.
        folds: see `may_fold`.
    """
    sequences, seq_q = reach[3:5]
    if seq_q > FEW_ROWS:
        return None
    groups = heads // kv_heads if folds else 1
    folded = groups > 1 and (seq_q <= FEW_QUERIES or seq_q * groups <= FEW_ROWS)
    rows, heads = (seq_q * groups, kv_heads) if folded else (seq_q, heads)
    config = select_decode_config(rows, head_dim, dtype, target)
    programs = ceil_div(rows, config.tiles.block_m) * heads * sequences
    splits = min(splits_to_fill(programs, config.programs), counted_keys(reach) // config.least_keys)
    if splits <= 1 and not folded and seq_q > FEW_QUERIES:
        return None  # tiles of more keys do
    return FewQueriesGrid(
        config.tiles, config.combine, folded, (programs,) if splits <= 1 else (programs, splits)
    )


def counted_keys(reach: tuple[Any, ...], exact: bool = False) -> int:
    """At most so many keys lie between the first that a query of a sequence sees and the last, in round numbers.

    Rounded down by up to a sixteenth, and to a multiple of 32: what is chosen by it holds for all of these, so that a
    growing cache has 16 plans on its way to twice the keys. Counting twice changes nothing.

    Args:
        exact: not rounded.
    """
    left, right, bottom_right, _sequences, seq_q, keys = reach
    # No key lies behind the last query's own place at the bottom right, and none before the first's at the top left.
    beyond = left if bottom_right else right
    if 0 <= beyond < keys - seq_q:
        keys = seq_q + beyond
    if exact:
        return int(keys)
    below: int = keys.bit_length() - 5
    return keys >> below << below if keys >= 32 * _KEYS else keys & -_KEYS


def may_fold(asked: AttentionOptions) -> bool:
    """Whether rows of several heads may share a tile: not where random numbers, a bias or a mask are a head's own.

    These are drawn or read for a tile of one head.
    """
    bias, mask = asked.bias, asked.mask
    return not (
        asked.dropout_p
        or (bias is not None and not is_broadcast(bias, 1))
        or (mask is not None and not is_broadcast(mask, 1))
    )


def splits_to_fill(programs: int, fitting: int) -> int:
    """In how many splits each program's keys fill a device on which `fitting` programs run at a time.

    The fewest that fill whole rounds to 85 %, of up to 4 rounds, or else those that come nearest: programs for 1.1
    rounds would take the time of 2. With more programs than 4 rounds, 1.
    """
    best, fullest = 1, 0.0
    for rounds in range(1, _MOST_ROUNDS + 1):
        splits = rounds * fitting // max(programs, 1)
        full = splits * programs / (rounds * fitting)
        if full > fullest:
            best, fullest = splits, full
        if fullest >= _FULL_ENOUGH:
            break
    return best
