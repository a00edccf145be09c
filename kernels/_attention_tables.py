"""Tables of the attention kernels' tiles, by targets, bits, widths and what modifies the scores.

What is here was compiled and read; none of it has been measured on a GPU yet. `_attention_config` chooses from it, what
was measured (`_measured`) goes before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
INTERPRETED_ATTENTION = AttentionConfig(
    _INTERPRETED, _INTERPRETED, _INTERPRETED, delta=_INTERPRETED, dbias=_INTERPRETED
)

# By family of targets, bits of the dtype and padded head dimension: (block_m, block_n, num_warps, num_stages). All
# of them compiled and read on sm_80, sm_90 and gfx942 (tests/kernels/test_machine_code.py: no spills, shared memory
# within the limit, HGMMA on sm_90). None is measured. On sm_90 they are those with the fewest instructions a score in
# the loop that do not spill; elsewhere the largest that do not spill. With 8 warps the keys of dk and dv, and the
# queries of dq, have to be 128: of 64, both warp groups compute the same scores. One loop is what such tiles need to
# fit at head_dim 128 and 256.
ATTENTION: dict[tuple[str, int, int], AttentionConfig] = {
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
    ATTENTION["ampere", 32, _width] = ATTENTION["small", 32, _width] = ATTENTION["hopper", 32, _width]
# A program of 4 waves may use 512 registers a lane on CDNA; one of 8 waves spills here.
ATTENTION["small", 32, 256] = AttentionConfig(
    AttentionTiles(32, 16, 8, 1), AttentionTiles(16, 16, 4, 1), AttentionTiles(16, 16, 4, 1)
)


# e4m3 operands have a forward alone, where there are products of them: by family and padded head dimension, plain and
# with anything that modifies the scores, all compiled and read in bf16. With 4 warps a tile of 128 x 128 leaves room
# for a second program on sm_90 at 64, whose softmax can run beside the first one's products; on sm_100 it spills.
ATTENTION_E4M3 = {
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
ATTENTION_PLANE: dict[tuple[str, int, int], AttentionConfig] = {
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
ATTENTION_HEAVY: dict[tuple[str, int, int], AttentionConfig] = {
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
        ATTENTION_HEAVY[_family, 32, _width] = replace(
            ATTENTION[_family, 32, _width], dbias=AttentionTiles(16, 16, 4, 1)
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
ATTENTION_LIGHT = {
    ("hopper", 16, 64): replace(ATTENTION["hopper", 16, 64], dk_dv=AttentionTiles(32, 128, 8, 2)),
    ("hopper", 16, 128): ATTENTION_PLANE["hopper", 16, 128],
    ("ampere", 16, 64): replace(ATTENTION["ampere", 16, 64], dk_dv=AttentionTiles(32, 32, 4, 2)),
    ("small", 16, 64): replace(ATTENTION["small", 16, 64], dk_dv=AttentionTiles(16, 64, 4, 1)),
}


# Of plain calls whose rows lie in two tiles (`fastattn.kernels._parts`), by `width_class`: the columns that are not
# there leave registers for more queries or keys. Others have the tiles of the width they would be padded to.
ATTENTION_PARTS: dict[tuple[str, Width], AttentionConfig] = {
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
