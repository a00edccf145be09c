"""Launch configs of the attention kernels: tables, and the pure functions that choose from them.

A config says where it came from: measured on a device, or compiled and read. None here has been measured on a
GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from fastattn.kernels._config import tunable
from fastattn.kernels._layout import block_d, first_block, is_broadcast
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import KNOWN_TARGETS, Target

# Of q's rows, or of q's and v's.
Width = int | tuple[int, int]


@dataclass(frozen=True)
class AttentionTiles:
    """A tile of the score matrix, block_m queries by block_n keys, and how its program is compiled.

    Attributes:
        form: how the loop gets its rows, see `fastattn.kernels._attention_forms`: "pointers", "descriptors", or
            "specialized", which is descriptors with warps of different tasks.
        one_loop: mask every tile, in one loop, instead of only those that need it, in loops of their own: more
            instructions a score and fewer registers. "specialized" can do no other.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    form: str = "pointers"
    one_loop: bool = False

    @property
    def descriptors(self) -> bool:
        return self.form != "pointers"

    @property
    def loop(self) -> dict[str, bool]:
        """The kernels' arguments that say what the loop is."""
        specialized = self.form == "specialized"
        return {"ONE_LOOP": self.one_loop or specialized, "SPECIALIZED": specialized}


@dataclass(frozen=True)
class AttentionConfig:
    """Launch configs of the attention kernels.

    `separate_dk_dv` computes dk and dv in a launch each: eight products instead of seven, but one accumulator a
    program instead of two, which is what fits at large head dimensions. `dv` are the tiles of its launch then, where
    they are not those of `dk_dv`.

    `reduce_dq` has the programs of dk add dq up by atomics, instead of a kernel of its own: five products instead of
    seven, or six of eight, in no fixed order. What asks for the same bits on every run never takes it.
    """

    forward: AttentionTiles
    dq: AttentionTiles
    dk_dv: AttentionTiles
    separate_dk_dv: bool = False
    delta: AttentionTiles = AttentionTiles(64, 0, 4, 1)
    dbias: AttentionTiles = AttentionTiles(64, 32, 4, 1)
    reduce_dq: bool = False
    dv: AttentionTiles | None = None


_INTERPRETED = AttentionTiles(32, 32, 1, 1)
_INTERPRETED_ATTENTION = AttentionConfig(
    _INTERPRETED, _INTERPRETED, _INTERPRETED, delta=_INTERPRETED, dbias=_INTERPRETED
)

# By family of targets, bits of the dtype and padded head dimension: (block_m, block_n, num_warps, num_stages). All
# of them compiled and read on sm_80, sm_90 and gfx942 (tests/kernels/test_machine_code.py: no spills, shared memory
# within the limit, HGMMA on sm_90). None is measured. On sm_90 they are those with the fewest instructions a score in
# the loop that do not spill; elsewhere the largest that do not spill. With 8 warps the keys of dk and dv, and the
# queries of dq, have to be 128: of 64, both warp groups compute the same scores. One loop is what such tiles need to
# fit at head_dim 128 and 256.
_ATTENTION: dict[tuple[str, int, int], AttentionConfig] = {
    ("hopper", 16, 64): AttentionConfig(
        AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 128, 8, 2)
    ),
    ("hopper", 16, 128): AttentionConfig(
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(32, 128, 8, 2, one_loop=True),
    ),
    ("hopper", 16, 256): AttentionConfig(
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(128, 32, 8, 2, one_loop=True),
        AttentionTiles(32, 128, 8, 2, one_loop=True),
        separate_dk_dv=True,
        dv=AttentionTiles(64, 128, 8, 2, one_loop=True),
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


# e4m3 operands have a forward alone, where there are products of them: by family and padded head dimension, plain and
# with anything that modifies the scores, all compiled and read in bf16. With 4 warps a tile of 128 x 128 leaves room
# for a second program on sm_90 at 64, whose softmax can run beside the first one's products; on sm_100 it spills.
_ATTENTION_E4M3 = {
    ("hopper", 64): (AttentionTiles(128, 128, 4, 2), AttentionTiles(128, 64, 8, 2)),
    ("hopper", 128): (AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 64, 8, 2)),
    ("hopper", 256): (AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 32, 4, 2)),
    ("sm_100", 64): (AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 64, 8, 2)),
    ("sm_100", 128): (AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 64, 8, 2)),
    ("sm_100", 256): (AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 64, 8, 2)),
    ("ampere", 64): (AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 64, 8, 2)),
    ("ampere", 128): (AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 64, 8, 2)),
    ("ampere", 256): (AttentionTiles(64, 64, 8, 2), AttentionTiles(64, 32, 8, 2)),
}


# The same with a bias or mask that differs from query to query and from key to key, alone or with one of a row: where
# there is none, the tiles of "heavy".
_ATTENTION_PLANE: dict[tuple[str, int, int], AttentionConfig] = {
    ("hopper", 16, 64): AttentionConfig(
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(32, 128, 8, 2),
        dbias=AttentionTiles(128, 32, 8, 1),
    ),
    ("hopper", 16, 128): AttentionConfig(
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(32, 128, 8, 2),
        separate_dk_dv=True,
        dbias=AttentionTiles(64, 32, 8, 1),
    ),
}


# The same with dropout, or with more than that: random numbers and loads take registers of their own.
_ATTENTION_HEAVY: dict[tuple[str, int, int], AttentionConfig] = {
    ("hopper", 16, 64): AttentionConfig(
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(16, 128, 8, 2),
        dbias=AttentionTiles(64, 32, 8, 1),
    ),
    ("hopper", 16, 128): AttentionConfig(
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(16, 128, 8, 2),
        separate_dk_dv=True,
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
        AttentionTiles(32, 32, 4, 1),
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
ATTENTION_WIDEST = {
    ("hopper", 16): AttentionTiles(64, 32, 8, 2),
    ("ampere", 16): AttentionTiles(32, 16, 8, 1),
    ("small", 16): AttentionTiles(16, 16, 8, 1),
    ("hopper", 32): AttentionTiles(16, 16, 8, 1),
    ("ampere", 32): AttentionTiles(16, 16, 8, 1),
    ("small", 32): AttentionTiles(16, 16, 8, 1),
}


# With one or two of a window, a soft cap and ALiBi: where there is none, the tiles of "heavy", as the plain ones leave
# no register free.
_ATTENTION_LIGHT = {
    ("hopper", 16, 64): replace(_ATTENTION["hopper", 16, 64], dk_dv=AttentionTiles(32, 128, 8, 2)),
    ("hopper", 16, 128): _ATTENTION_PLANE["hopper", 16, 128],
    ("ampere", 16, 64): replace(_ATTENTION["ampere", 16, 64], dk_dv=AttentionTiles(32, 32, 4, 2)),
    ("small", 16, 64): replace(_ATTENTION["small", 16, 64], dk_dv=AttentionTiles(16, 64, 4, 1)),
}


# Of plain calls whose rows lie in two tiles (`fastattn.kernels._parts`), by `width_class`: the columns that are not
# there leave registers for more queries or keys. Others have the tiles of the width they would be padded to.
_ATTENTION_PARTS: dict[tuple[str, Width], AttentionConfig] = {
    ("hopper", 80): AttentionConfig(
        AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 128, 8, 2), AttentionTiles(32, 128, 8, 2)
    ),
    ("hopper", 96): AttentionConfig(
        AttentionTiles(128, 128, 8, 2),
        AttentionTiles(128, 128, 8, 2),
        AttentionTiles(64, 128, 8, 2, one_loop=True),
    ),
    ("hopper", 160): AttentionConfig(
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(32, 128, 8, 2, one_loop=True),
    ),
    ("hopper", 192): AttentionConfig(
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(64, 128, 8, 2, one_loop=True),
        separate_dk_dv=True,
    ),
    ("hopper", (192, 128)): AttentionConfig(
        AttentionTiles(128, 128, 8, 2),
        AttentionTiles(128, 64, 8, 2),
        AttentionTiles(32, 128, 8, 2, one_loop=True),
    ),
    ("ampere", 80): AttentionConfig(
        AttentionTiles(128, 64, 8, 2), AttentionTiles(128, 32, 8, 2), AttentionTiles(32, 128, 8, 2)
    ),
    ("ampere", 96): AttentionConfig(
        AttentionTiles(128, 64, 8, 2), AttentionTiles(128, 32, 8, 2), AttentionTiles(16, 128, 8, 2)
    ),
    ("ampere", 160): AttentionConfig(
        AttentionTiles(128, 32, 8, 2),
        AttentionTiles(64, 32, 4, 2),
        AttentionTiles(16, 64, 4, 2, one_loop=True),
    ),
    ("ampere", 192): AttentionConfig(
        AttentionTiles(64, 32, 8, 2),
        AttentionTiles(64, 32, 8, 2),
        AttentionTiles(32, 32, 4, 2, one_loop=True),
    ),
    ("ampere", (192, 128)): AttentionConfig(
        AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 16, 4, 2), AttentionTiles(32, 32, 4, 2)
    ),
}

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
    head_dim: int, dtype: torch.dtype, target: Target, load: str, v_dim: int | None = None
) -> Width:
    """What tiles depend on of the widths: head_dim, the wider of q's and v's, rounded up to what its tiles hold.

    v's width counts where q and k lie in two tiles of up to 192 columns and v in one: (192, 128).
    """
    if head_dim > 256:
        return 512
    first = first_block(head_dim)
    if first >= head_dim or not takes_parts(dtype, target, load):
        return _padded_width(head_dim)
    if head_dim % 8 or (v_dim or 0) % 8:
        return _padded_width(head_dim)  # in narrow loads, whose addresses take the registers that are left
    if first == 128 and v_dim is not None and v_dim <= 128:
        return 192, 128
    return max(first + first // 4, first + block_d(head_dim - first))


@tunable(
    lambda head_dim, dtype, target, load="plain", v_dim=None: (
        bits_of(dtype),
        width_class(head_dim, dtype, target, load, v_dim),
        load if head_dim <= 256 else "plain",
    )
)
def select_attention_config(
    head_dim: int, dtype: torch.dtype, target: Target, load: str = "plain", v_dim: int | None = None
) -> AttentionConfig:
    """The tiles for a head dimension up to 512 (the wider of q's and v's), a dtype and a target: the form that ships.

    `load` is what modifies the scores: "plain", "light", "thin", "plane" or "heavy", see `score_load`. `v_dim` is v's
    width, if it may be less.
    """
    # Which is made of this module's.
    from fastattn.kernels._attention_forms import SHIPPED_FORM, select_attention_form

    return select_attention_form(head_dim, dtype, target, load, SHIPPED_FORM, v_dim)


def pointers_config(
    head_dim: int, dtype: torch.dtype, target: Target, load: str = "plain", v_dim: int | None = None
) -> AttentionConfig:
    """The same of the form "pointers", which serves every call; modelled, whatever was measured."""
    if target.backend == "interpreter":
        return _INTERPRETED_ATTENTION
    family, bits = attention_family(target), bits_of(dtype)
    if bits == 8:
        blackwell = isinstance(target.arch, int) and 100 <= target.arch < 120
        tiles = _ATTENTION_E4M3["sm_100" if blackwell else family, _padded_width(head_dim)][load != "plain"]
        return AttentionConfig(tiles, tiles, tiles)
    if head_dim > 256:
        tiles = ATTENTION_WIDEST[family, bits]
        return AttentionConfig(tiles, tiles, tiles)
    key = (family, bits, _padded_width(head_dim))
    config = heavy = _ATTENTION_HEAVY[key]
    if load == "plain":
        width = width_class(head_dim, dtype, target, load, v_dim)
        config = _ATTENTION_PARTS.get((family, width), _ATTENTION[key])
    elif load == "plane":
        config = _ATTENTION_PLANE.get(key, heavy)
    elif load == "light" or (load == "thin" and family == "hopper"):
        config = _ATTENTION_LIGHT.get(key, heavy)
    return _one_loop(config) if family == "hopper" and target.arch == 100 and bits == 16 else config


@cache
def _one_loop(config: AttentionConfig) -> AttentionConfig:
    """The same with one loop in dk and dv: of two, sm_100 spills at every width."""
    dk_dv = replace(config.dk_dv, one_loop=True)
    if config == _ATTENTION_PLANE["hopper", 16, 128]:
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
