"""Launch configs of the attention kernels: the pure functions that choose from `_attention_tables`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from fastattn.kernels._attention_tables import (
    ATTENTION,
    ATTENTION_E4M3,
    ATTENTION_HEAVY,
    ATTENTION_LIGHT,
    ATTENTION_PARTS,
    ATTENTION_PLANE,
    ATTENTION_WIDEST,
    INTERPRETED_ATTENTION,
    AttentionConfig,
    Width,
)
from fastattn.kernels._config import tunable
from fastattn.kernels._layout import block_d, first_block, is_broadcast
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import KNOWN_TARGETS, Target

_BITS = {torch.float32: 32, torch.float8_e4m3fn: 8}


def bits_of(dtype: torch.dtype) -> int:
    """Of an element, as tables and keys have it: what is no float32 and no e4m3 has 16."""
    return _BITS.get(dtype, 16)


def takes_parts(dtype: torch.dtype, target: Target, load: str) -> bool:
    """Whether rows lie in two tiles where `fastattn.kernels._layout.first_block` has two.

    Where that was compiled, wins and does not spill, which is on sm_80 and sm_90, in 16 bits, with scores that nothing
    modifies. Elsewhere one padded tile: in 32 bits 96 columns spill, with dropout and a bias too (sm_80); on gfx942 and
    sm_100 instructions bind, of which two tiles take more; on sm_89 and sm_120 tiles of sm_80 spill. The interpreter
    has two always.
    """
    if target.backend == "interpreter":
        return True
    return target.arch in (80, 90) and dtype in (torch.float16, torch.bfloat16) and load == "plain"


def width_class(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    load: str,
    v_dim: int | None = None,
    narrow: bool = False,
) -> Width:
    """What tiles depend on of the widths: head_dim, the wider of q's and v's, rounded up to what its tiles hold.

    v's width counts where q and k lie in two tiles of up to 192 columns and v in one: (192, 128). `narrow` is that of
    `fastattn.kernels._layout.rows_narrow`: the addresses of such loads take the registers that are left.
    """
    if head_dim > 256:
        return 512
    first = first_block(head_dim)
    if first >= head_dim or not takes_parts(dtype, target, load):
        return _padded_width(head_dim)
    if narrow or head_dim % 8 or (v_dim or 0) % 8:
        return _padded_width(head_dim)
    if first == 128 and v_dim is not None and v_dim <= 128:
        # On sm_80 tiles for 192 spill with a second part of 16 or 32 columns.
        few = target.arch == 80 and block_d(head_dim - first) < 64
        return 160 if few else (192, 128)
    return max(first + first // 4, first + block_d(head_dim - first))


@tunable(
    lambda head_dim, dtype, target, load="plain", v_dim=None, narrow=False: (
        bits_of(dtype),
        width_class(head_dim, dtype, target, load, v_dim, narrow),
        load if head_dim <= 256 else "plain",
    )
)
def select_attention_config(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    load: str = "plain",
    v_dim: int | None = None,
    narrow: bool = False,
) -> AttentionConfig:
    """The tiles for a head dimension up to 512 (the wider of q's and v's), a dtype and a target: the form that ships.

    `load` is what modifies the scores: "plain", "light", "thin", "plane" or "heavy", see `score_load`. `v_dim` is v's
    width, if it may be less; for `narrow` see `width_class`.
    """
    # Which is made of this module's.
    from fastattn.kernels._attention_forms import SHIPPED_FORM, select_attention_form

    return select_attention_form(head_dim, dtype, target, load, SHIPPED_FORM, v_dim, narrow)


def pointers_config(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    load: str = "plain",
    v_dim: int | None = None,
    narrow: bool = False,
) -> AttentionConfig:
    """The same of the form "pointers", which serves every call; modelled, whatever was measured."""
    if target.backend == "interpreter":
        return INTERPRETED_ATTENTION
    family, bits = attention_family(target), bits_of(dtype)
    if bits == 8:
        blackwell = isinstance(target.arch, int) and 100 <= target.arch < 120
        tiles = ATTENTION_E4M3["sm_100" if blackwell else family, _padded_width(head_dim)][load != "plain"]
        return AttentionConfig(tiles, tiles, tiles)
    if head_dim > 256:
        tiles = ATTENTION_WIDEST[family, bits]
        return AttentionConfig(tiles, tiles, tiles)
    key = (family, bits, _padded_width(head_dim))
    config = heavy = ATTENTION_HEAVY[key]
    if load == "plain":
        width = width_class(head_dim, dtype, target, load, v_dim, narrow)
        config = ATTENTION_PARTS.get((family, width), ATTENTION[key])
    elif load == "plane":
        config = ATTENTION_PLANE.get(key, heavy)
    elif load == "light" or (load == "thin" and family == "hopper"):
        config = ATTENTION_LIGHT.get(key, heavy)
    return _one_loop(config) if family == "hopper" and target.arch == 100 and bits == 16 else config


@cache
def _one_loop(config: AttentionConfig) -> AttentionConfig:
    """The same with one loop in dk and dv: of two, sm_100 spills at every width."""
    dk_dv = replace(config.dk_dv, one_loop=True)
    if config == ATTENTION_PLANE["hopper", 16, 128]:
        # Of 8 warps dk has 128 registers a thread there, and spills one with a window and a soft cap.
        dk_dv = replace(dk_dv, num_warps=4)
    return replace(config, dk_dv=dk_dv)


def heads_together(bytes_of_head: int, heads: int, balance: bool, target: Target) -> tuple[int, int] | None:
    """How heads' programs are mixed so that the longest start first: (together, absent) of `_split_program`.

    What the programs of a section read is to stay in half of the L2: one section begins while another ends
    (FlashAttention-3's scheduler has sections by L2 too). None is head after head.

    Args:
        bytes_of_head: what all programs of a head read, keys and values or queries and gradients.
        heads: of all sequences.
        balance: whether the programs of a head differ in length.
    """
    if not balance or not target.l2:
        return None
    together = max(1, min(heads, target.l2 // 2 // max(1, bytes_of_head)))
    return together, -heads % together


def score_load(asked: AttentionOptions) -> str:
    """What the options take of registers in the inner loop.

    "plain": nothing. "light": one or two of a window's left end, a soft cap and ALiBi. "thin": a bias or mask of which
    a tile has one row or one column, at most with one of those or another of its kind. "plane": a bias or mask without
    such a broadcast, at most with one that has it. "heavy": dropout, and everything else.
    """
    planes, whole = [], 0
    if asked.bias is not None or asked.mask is not None:
        planes = [plane for plane in (asked.bias, asked.mask) if plane is not None]
        whole = sum(not any(is_broadcast(plane, dim) for dim in (2, 3)) for plane in planes)
    others = (asked.left >= 0) + (asked.softcap != 0.0) + (asked.alibi_slopes is not None)
    if asked.dropout_p or whole > 1 or (whole and others):
        return "heavy"
    if whole:
        return "plane"
    if others + len(planes) > 2:
        return "heavy"
    return "thin" if planes else "light" if others else "plain"


def _padded_width(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def attention_family(target: Target) -> str:
    """The row of the tables that serves a target, by its shared memory."""
    if target.shared_memory >= KNOWN_TARGETS["sm_90"].shared_memory:
        return "hopper"
    return "ampere" if target.shared_memory >= KNOWN_TARGETS["sm_86"].shared_memory else "small"
