"""What is tried in the place of a launch config: pure functions of the config and the target.

A config is tuned a part at a time: a config of several kernels by the kernel, a number of programs by itself. Fields
are known by their names and types alone, so that a new one is tuned as the others are: sizes of blocks are halved and
doubled, flags turned. What no halving reaches, such as another form of attention's loop, begins at configs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import product, zip_longest
from math import log2, prod
from typing import Any

from fastattn.kernels._attention_tables import AttentionTiles
from fastattn.kernels._linear_config import LinearConfig
from fastattn.kernels._rotary_config import RotaryConfig
from fastattn.kernels._target import Target

# The part of a config that is one tile with its warps and stages.
TILE = "tile"
# Each of these is a part of its own.
_ALONE = ("group_m", "programs", "least_keys")
# Sizes that the shape alone gives.
_GIVEN = {RotaryConfig: ("block_d", "block_rest")}
# Tiles that are multiplied: no side of a matrix instruction is shorter.
_MULTIPLIED = (AttentionTiles, LinearConfig)
_LEAST_SIDE = 16
# One draw of random numbers serves so many columns.
_LEAST_COLUMNS = 4
_MOST_THREADS = 1024
# A tile may hold so many times more or fewer elements a thread than the one of now.
_MOST_STEP = 4
# The forms of attention's loop whose warps and masks are the tile's to choose; the others divide the warps themselves.
_PLAIN_FORMS = ("pointers", "descriptors")
# The most registers of a thread, or None where the compiler is free.
_LIMIT = "registers"
# What is no matter of speed alone: gradients whose bits differ from run to run.
_NEVER = ("reduce_dq",)
# Words among the fields of a tile.
_WORDS = ("form",)


def parts(config: Any) -> list[str]:
    """The parts of a config in the order in which they are tuned."""
    tile = _tile_fields(config)
    found = [TILE] if any(name not in _ALONE for name in tile) else []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _NEVER:
            continue
        if is_dataclass(value) or field.name in _ALONE or (isinstance(value, bool) and not tile):
            found.append(field.name)
    return found


def candidates(
    config: Any, part: str, target: Target, columns: int | None = None, starts: Sequence[Any] = ()
) -> list[Any]:
    """Configs that differ from this one in a part, the nearest first.

    Args:
        columns: how wide a tile over rows can be of use.
        starts: further configs, each of which is tried, and what is near to it.
    """
    value = getattr(config, part, None)
    if is_dataclass(value):
        near = [candidates(value, TILE, target, columns)]
        for start in dict.fromkeys(getattr(other, part) for other in starts):
            if start != value:
                near.append([start, *candidates(start, TILE, target, columns)])
        # In turn, so that no start is left out where there are more than can be timed.
        tried = dict.fromkeys(
            new for of_all in zip_longest(*near) for new in of_all if new not in (None, value)
        )
        return [replace(config, **{part: new}) for new in tried]
    if part != TILE:
        return [replace(config, **{part: new}) for new in _choices(part, value, target) if new != value]
    names = [name for name in _tile_fields(config) if name not in _ALONE]
    options = [_choices(name, getattr(config, name), target) for name in names]
    made = (replace(config, **dict(zip(names, values, strict=True))) for values in product(*options))
    sensible = [new for new in made if new != config and _makes_sense(new, config, target, columns)]
    return sorted(sensible, key=lambda new: _distance(new, config, names))


def part_of(config: Any, part: str) -> Any:
    """The values of a part: a config, a number, or what the tile's fields hold."""
    return config if part == TILE else getattr(config, part)


def label(config: Any, part: str) -> str:
    """A part's values in few words, as in "block_m=128 num_warps=8"."""
    value = part_of(config, part)
    if not is_dataclass(value):
        return f"{part}={value}"
    words = [name for name in _WORDS if hasattr(value, name)]
    names = [name for name in _tile_fields(value) if name not in _ALONE]
    return " ".join(f"{name}={getattr(value, name)}" for name in (*names, *words))


def _tile_fields(config: Any) -> list[str]:
    """Numbers and flags of a config that holds no other configs."""
    if any(is_dataclass(getattr(config, field.name)) for field in fields(config)):
        return []
    given = _GIVEN.get(type(config), ())
    if getattr(config, "form", "pointers") not in _PLAIN_FORMS:
        given = ("num_warps", "one_loop")
    return [
        f.name
        for f in fields(config)
        if (isinstance(getattr(config, f.name), int) or f.name == _LIMIT) and f.name not in given
    ]


def _choices(name: str, value: Any, target: Target) -> list[Any]:
    if name == _LIMIT:  # what lets four programs of 8 warps onto a multiprocessor, and two
        return list(dict.fromkeys([value, None, *((64, 128) if target.backend == "cuda" else ())]))
    if isinstance(value, bool):
        return [value, not value]
    if name == "num_warps":  # 4, 8 and 16 of 32 threads
        return sorted({value, *((2, 4, 8) if target.backend == "hip" else (4, 8, 16))})
    if name == "num_stages":
        return sorted({value, 1, 2, 3, 4})
    if name == "pieces":
        return sorted({value, 1, 2, 4})
    if name.startswith("block") or name in _ALONE:
        return sorted({max(value // 2, min(value, 1)), value, 2 * value})
    return [value]


def _makes_sense(new: Any, old: Any, target: Target, columns: int | None) -> bool:
    threads = new.num_warps * (64 if target.backend == "hip" else 32)
    if threads > _MOST_THREADS:
        return False
    blocks = {f.name: getattr(new, f.name) for f in fields(new) if f.name.startswith("block")}
    if isinstance(new, _MULTIPLIED):
        pieces = getattr(new, "pieces", 1)
        shortest = min(size for size in (*blocks.values(), blocks["block_n"] // pieces) if size)
        if shortest < _LEAST_SIDE:
            return False
    else:
        width = blocks.get("block_n", _LEAST_COLUMNS)
        if width < _LEAST_COLUMNS or (columns is not None and width > max(columns, old.block_n)):
            return False
    # In place each pair must have a thread of its own.
    if isinstance(new, RotaryConfig) and new.block_m * new.block_d < threads:
        return False
    step = _elements_a_thread(new) / _elements_a_thread(old)
    return 1 / _MOST_STEP <= step <= _MOST_STEP


def _elements_a_thread(config: Any) -> float:
    sizes = (getattr(config, f.name) for f in fields(config) if f.name.startswith("block"))
    return prod(size for size in sizes if size) / config.num_warps


def _distance(new: Any, old: Any, names: list[str]) -> float:
    """Doublings and turned flags that lie between, a stage as much as a doubling."""
    total = 0.0
    for name in names:
        a, b = getattr(new, name), getattr(old, name)
        if name == _LIMIT:
            total += a != b
        elif a != b:
            doubles = a and b and not isinstance(a, bool) and name != "num_stages"
            total += abs(log2(a / b)) if doubles else abs(a - b)
    return total
