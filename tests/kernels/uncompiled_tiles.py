"""Prints the tiles of attention's tables, in 16 bits, that no shipped case launches on the given architectures.

Run in a process of its own: launches are recorded only where kernels are compiled.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.cases import AttentionCase
from benchmarks.inspection import launches_of, shipped_cases
from benchmarks.inspection.cases import is_telling
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_tables import AttentionTiles
from fastattn.kernels._target import KNOWN_TARGETS

# (kernel, head dimension, tile)
Tile = tuple[str, int, AttentionTiles]


def tiles_of_tables(arch: str) -> set[Tile]:
    found: set[Tile] = set()
    for width in (64, 128, 256):
        for load in ("plain", "light", "thin", "plane", "heavy"):
            config = select_attention_config(width, torch.bfloat16, KNOWN_TARGETS[arch], load)
            found |= {(name, width, getattr(config, name)) for name in ("forward", "dq", "dk_dv")}
            if config.dv is not None:
                found.add(("dk_dv", width, config.dv))
            if load in ("plane", "heavy"):  # the others have no bias
                found.add(("dbias", width, config.dbias))
    return found


def launched_tiles(arch: str) -> set[Tile]:
    found: set[Tile] = set()
    for case in shipped_cases():
        if isinstance(case, AttentionCase) and case.dtype == torch.bfloat16 and is_telling(case, arch):
            for launch in launches_of(case, arch):
                names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
                if all(name in launch.arguments for name in names):
                    sizes = (launch.arguments[name] for name in names)
                    tiles = AttentionTiles(*sizes, one_loop=launch.arguments.get("ONE_LOOP", False))
                    found.add((launch.name.removeprefix("attention_"), case.head_dim, tiles))
    return found


if __name__ == "__main__":
    for arch in sys.argv[1:]:
        for tile in sorted(tiles_of_tables(arch) - launched_tiles(arch), key=str):
            print(arch, *tile)
