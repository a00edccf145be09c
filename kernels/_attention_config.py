"""Launch configs of the attention kernels: tables, and the pure functions that choose from them.

A config says where it came from: measured on a device, or compiled and read. None here has been measured on a
GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import KNOWN_TARGETS, Target


@dataclass(frozen=True)
class AttentionTiles:
    """A tile of the score matrix, block_m queries by block_n keys, and how its program is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """Launch configs of the attention kernels.

    `separate_dk_dv` computes dk and dv in a launch each: eight products instead of seven, but one accumulator a
    program instead of two, which is what fits at large head dimensions.
    """

    forward: AttentionTiles
    dq: AttentionTiles
    dk_dv: AttentionTiles
    separate_dk_dv: bool = False
    delta: AttentionTiles = AttentionTiles(64, 0, 4, 1)
    dbias: AttentionTiles = AttentionTiles(64, 32, 4, 1)


_INTERPRETED = AttentionTiles(32, 32, 1, 1)
_INTERPRETED_ATTENTION = AttentionConfig(
    _INTERPRETED, _INTERPRETED, _INTERPRETED, delta=_INTERPRETED, dbias=_INTERPRETED
)

# By family of targets, bits of the dtype and padded head dimension: (block_m, block_n, num_warps, num_stages). All
# of them compiled and read on sm_80, sm_90 and gfx942 (tests/kernels/test_machine_code.py: no spills, shared memory
# within the limit, HGMMA on sm_90), and chosen by registers, as the largest tile that does not spill. None is measured.
_ATTENTION: dict[tuple[str, int, int], AttentionConfig] = {
    ("hopper", 16, 64): AttentionConfig(
        AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 128, 8, 2)
    ),
    ("hopper", 16, 128): AttentionConfig(
        AttentionTiles(128, 64, 8, 2), AttentionTiles(128, 64, 8, 2), AttentionTiles(32, 64, 8, 2)
    ),
    ("hopper", 16, 256): AttentionConfig(
        AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 32, 8, 2), AttentionTiles(32, 64, 8, 2), True
    ),
    ("ampere", 16, 64): AttentionConfig(
        AttentionTiles(128, 64, 8, 2), AttentionTiles(128, 64, 8, 2), AttentionTiles(32, 128, 8, 2)
    ),
    ("ampere", 16, 128): AttentionConfig(
        AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 64, 8, 2), AttentionTiles(32, 64, 8, 2)
    ),
    ("ampere", 16, 256): AttentionConfig(
        AttentionTiles(64, 32, 8, 2), AttentionTiles(32, 32, 8, 2), AttentionTiles(32, 32, 8, 2)
    ),
    # 64 KB of shared memory: AMD's CDNA.
    ("small", 16, 64): AttentionConfig(
        AttentionTiles(128, 64, 8, 1), AttentionTiles(64, 64, 8, 1), AttentionTiles(32, 64, 4, 1)
    ),
    ("small", 16, 128): AttentionConfig(
        AttentionTiles(64, 64, 8, 1), AttentionTiles(64, 32, 8, 1), AttentionTiles(32, 64, 8, 1)
    ),
    ("small", 16, 256): AttentionConfig(
        AttentionTiles(32, 32, 8, 1), AttentionTiles(32, 32, 4, 1), AttentionTiles(16, 32, 8, 1), True
    ),
    # float32 has no tensor cores here (full precision): plain multiply-adds from shared memory.
    ("hopper", 32, 64): AttentionConfig(
        AttentionTiles(64, 32, 8, 2), AttentionTiles(32, 32, 8, 1), AttentionTiles(32, 32, 8, 1)
    ),
    ("hopper", 32, 128): AttentionConfig(
        AttentionTiles(32, 16, 8, 1), AttentionTiles(16, 32, 8, 1), AttentionTiles(16, 32, 8, 1)
    ),
    ("hopper", 32, 256): AttentionConfig(
        AttentionTiles(32, 16, 8, 1), AttentionTiles(16, 16, 8, 1), AttentionTiles(16, 16, 8, 1)
    ),
}
for _width in (64, 128, 256):
    _ATTENTION["ampere", 32, _width] = _ATTENTION["small", 32, _width] = _ATTENTION["hopper", 32, _width]
# A program of 4 waves may use 512 registers a lane on CDNA; one of 8 waves spills here.
_ATTENTION["small", 32, 256] = AttentionConfig(
    AttentionTiles(32, 16, 8, 1), AttentionTiles(16, 16, 4, 1), AttentionTiles(16, 16, 4, 1)
)


# The same where a score is modified by more than a soft cap, ALiBi or a window's left end: loads of a bias or mask and
# random numbers take registers of their own. With one of those three alone ("light"), dk and dv need them already.
_ATTENTION_HEAVY: dict[tuple[str, int, int], AttentionConfig] = {
    ("hopper", 16, 64): AttentionConfig(
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(32, 64, 8, 2),
        dbias=AttentionTiles(64, 32, 8, 1),
    ),
    ("hopper", 16, 128): AttentionConfig(
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(64, 32, 8, 2),
        AttentionTiles(16, 64, 8, 2),
        dbias=AttentionTiles(64, 32, 8, 1),
    ),
    ("hopper", 16, 256): AttentionConfig(
        AttentionTiles(64, 32, 8, 2),
        AttentionTiles(64, 16, 8, 2),
        AttentionTiles(16, 64, 8, 2),
        separate_dk_dv=True,
        dbias=AttentionTiles(64, 16, 8, 1),
    ),
    ("ampere", 16, 64): AttentionConfig(
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(32, 32, 4, 2),
        dbias=AttentionTiles(64, 32, 8, 1),
    ),
    ("ampere", 16, 128): AttentionConfig(
        AttentionTiles(64, 64, 8, 2),
        AttentionTiles(64, 32, 8, 2),
        AttentionTiles(32, 32, 8, 2),
        dbias=AttentionTiles(32, 16, 4, 1),
    ),
    ("ampere", 16, 256): AttentionConfig(
        AttentionTiles(32, 32, 4, 1),
        AttentionTiles(32, 16, 8, 2),
        AttentionTiles(16, 32, 8, 2),
        separate_dk_dv=True,
        dbias=AttentionTiles(32, 16, 8, 1),
    ),
    ("small", 16, 64): AttentionConfig(
        AttentionTiles(64, 32, 8, 1),
        AttentionTiles(64, 32, 8, 1),
        AttentionTiles(16, 64, 4, 1),
        dbias=AttentionTiles(32, 32, 4, 1),
    ),
    ("small", 16, 128): AttentionConfig(
        AttentionTiles(32, 32, 8, 1),
        AttentionTiles(32, 16, 8, 1),
        AttentionTiles(16, 32, 8, 1),
        dbias=AttentionTiles(32, 16, 4, 1),
    ),
    ("small", 16, 256): AttentionConfig(
        AttentionTiles(16, 32, 8, 1),
        AttentionTiles(16, 16, 8, 1),
        AttentionTiles(16, 16, 8, 1),
        separate_dk_dv=True,
        dbias=AttentionTiles(16, 16, 8, 1),
    ),
}
for _family in ("hopper", "ampere", "small"):
    for _width in (64, 128, 256):
        _ATTENTION_HEAVY[_family, 32, _width] = replace(
            _ATTENTION[_family, 32, _width], dbias=AttentionTiles(16, 16, 4, 1)
        )

# Head dimensions above 256 have a forward alone.
_ATTENTION_WIDEST = {
    ("hopper", 16): AttentionTiles(64, 32, 8, 2),
    ("ampere", 16): AttentionTiles(32, 16, 8, 1),
    ("small", 16): AttentionTiles(16, 16, 8, 1),
    ("hopper", 32): AttentionTiles(16, 16, 8, 1),
    ("ampere", 32): AttentionTiles(16, 16, 8, 1),
    ("small", 32): AttentionTiles(16, 16, 8, 1),
}


def select_attention_config(
    head_dim: int, dtype: torch.dtype, target: Target, load: str = "plain"
) -> AttentionConfig:
    """The tiles for a head dimension up to 512 (the wider of q's and v's), a dtype and a target.

    `load` is what modifies the scores: "plain", "light" or "heavy", see `score_load`.
    """
    if target.backend == "interpreter":
        return _INTERPRETED_ATTENTION
    family, bits = _attention_family(target), 32 if dtype == torch.float32 else 16
    if head_dim > 256:
        tiles = _ATTENTION_WIDEST[family, bits]
        return AttentionConfig(tiles, tiles, tiles)
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    plain, heavy = _ATTENTION[family, bits, width], _ATTENTION_HEAVY[family, bits, width]
    if load == "light":
        light = replace(plain, dk_dv=heavy.dk_dv, separate_dk_dv=heavy.separate_dk_dv)
        # Elsewhere the plain tiles leave no register free.
        return light if width == 64 or (family == "hopper" and width == 128) else heavy
    return heavy if load == "heavy" else plain


def score_load(asked: AttentionOptions) -> str:
    """What the options take of registers in the inner loop: "plain", "light" or "heavy"."""
    if asked.bias is not None or asked.mask is not None or asked.dropout_p:
        return "heavy"
    light = (asked.left >= 0) + (asked.softcap != 0.0) + (asked.alibi_slopes is not None)
    return ("plain", "light", "heavy", "heavy")[light]


def _attention_family(target: Target) -> str:
    if target.shared_memory >= KNOWN_TARGETS["sm_90"].shared_memory:
        return "hopper"
    return "ampere" if target.shared_memory >= KNOWN_TARGETS["sm_86"].shared_memory else "small"
