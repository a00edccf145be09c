"""What the functions that choose launch configs share. Configs are frozen data, chosen from shape, dtype and target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import partial, wraps
from inspect import signature
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args, get_type_hints

import torch

from fastattn.kernels._measured import MEASURED, RUNS
from fastattn.kernels._measurement import Measured, Run
from fastattn.kernels._plan import forget_plans
from fastattn.kernels._target import Target

# Of axes 1 and 2 of a grid; axis 0 ends at 2^31 - 1.
MOST_OF_AXIS = 65_535

P = ParamSpec("P")
C = TypeVar("C")
Key = tuple[Any, ...]


class Asked(NamedTuple):
    """A call of a function that chooses a launch config: its name, its key, and what it returned."""

    select: str
    key: Key
    config: Any


class _Overrides:
    """What goes before the model of one function, if anything does.

    Attributes:
        active: whether there is anything, as a dict that is not empty: the quickest thing to ask for.
        measured: entries of `MEASURED`.
        forced: a config that replaces all others, of `forced_key` alone where that is not None.
        built: the configs made of entries, which hold plain values, by multiprocessors and key.
    """

    def __init__(self, measured: dict[Key, Measured]) -> None:
        self.measured = measured
        self.forced: Any = None
        self.forced_key: Key | None = None
        self.built: dict[Key, Any] = {}
        self.active: dict[str, bool] = {}
        self.refresh()

    def refresh(self) -> None:
        forget_plans()
        self.active.clear()
        if self.measured or self.forced is not None or _listening:
            self.active["active"] = True


_overrides: dict[str, _Overrides] = {}
_runs = dict(RUNS)
# For tuning, which is one thread: lists that collect calls.
_listening: list[list[Asked]] = []


def tunable(key: Callable[..., Key]) -> Callable[[Callable[P, C]], Callable[P, C]]:
    """Decorator of a function that chooses a launch config by a model: what was measured goes before it.

    The function returns the config that `forced_config` gives, else the measured one of its target and key, else the
    modelled one. One of its parameters is `target`. The interpreter, where nothing can be measured, has modelled ones.

    Args:
        key: from the function's own arguments, what its choice depends on beside the architecture: few discrete
            values, such as sizes rounded up to powers of 2, and never a number of rows.
    """

    def decorate(model: Callable[P, C]) -> Callable[P, C]:
        name = model.__name__
        place = list(signature(model).parameters).index("target")
        overrides = _overrides[name] = _Overrides(MEASURED.get(name, {}))
        active = overrides.active

        @wraps(model)
        def select(*arguments: P.args, **keywords: P.kwargs) -> C:
            if not active:
                return model(*arguments, **keywords)
            target: Any = keywords["target"] if "target" in keywords else arguments[place]
            full_key = (target.name, *key(*arguments, **keywords))
            config = overrides.forced if overrides.forced_key in (None, full_key) else None
            if config is None and target.backend != "interpreter":
                config = _measured_config(overrides, full_key, target, partial(model, *arguments, **keywords))
            if config is None:
                config = model(*arguments, **keywords)
            for asked in _listening:
                asked.append(Asked(name, full_key, config))
            return config

        return select

    return decorate


def _measured_config(overrides: _Overrides, key: Key, target: Target, model: Callable[[], Any]) -> Any:
    """The measured config, or None; the programs of a walk are as many a multiprocessor as on the device of the run.

    `model` returns a config that has the right types, of which every value is replaced.
    """
    entry = overrides.measured.get(key)
    if entry is None:
        return None
    place = (target.multiprocessors, key)
    if place not in overrides.built:
        config = with_fields(model(), entry.config)
        if "programs" in entry.config:
            share = target.multiprocessors / _runs[entry.run].multiprocessors
            config = replace(config, programs=max(1, round(entry.config["programs"] * share)))
        overrides.built[place] = config
    return overrides.built[place]


def with_fields(config: Any, fields: dict[str, Any]) -> Any:
    """A config with the values of these fields, of which a dictionary is the fields of a config in it."""
    return replace(config, **{name: _field(config, name, value) for name, value in fields.items()})


def _field(config: Any, name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    held = getattr(config, name)
    if held is None:  # attention's dv, of whose type None is the other half
        made: Any = next(filter(is_dataclass, get_args(get_type_hints(type(config))[name])))
        return made(**value)
    return with_fields(held, value)


@contextmanager
def forced_config(select: Callable[..., C] | str, config: C, key: Key | None = None) -> Iterator[None]:
    """Within the block, a function that chooses launch configs returns this one, whatever it is asked for.

    For tuning and tests: it holds in all threads.

    Args:
        key: for which alone it does, the architecture first; None: for all.
    """
    overrides = _overrides[select if isinstance(select, str) else select.__name__]
    before = overrides.forced, overrides.forced_key
    try:
        overrides.forced, overrides.forced_key = config, key
        overrides.refresh()
        yield
    finally:
        overrides.forced, overrides.forced_key = before
        overrides.refresh()


@contextmanager
def asked_configs() -> Iterator[list[Asked]]:
    """Within the block, what is asked of all functions that choose launch configs is collected."""
    asked: list[Asked] = []
    before = list(_listening)
    try:
        _listen([*before, asked])
        yield asked
    finally:
        _listen(before)


def _listen(lists: list[list[Asked]]) -> None:
    _listening[:] = lists
    for overrides in _overrides.values():
        overrides.refresh()


@contextmanager
def measured_configs(measured: dict[str, dict[Key, Measured]], runs: dict[str, Run]) -> Iterator[None]:
    """Within the block, these tables stand in the place of those of `_measured.py`."""
    before = {name: overrides.measured for name, overrides in _overrides.items()}, dict(_runs)
    try:
        _install(measured, runs)
        yield
    finally:
        _install(*before)


def _install(measured: dict[str, dict[Key, Measured]], runs: dict[str, Run]) -> None:
    _runs.clear()
    _runs.update(runs)
    for name, overrides in _overrides.items():
        overrides.measured = measured.get(name, {})
        overrides.built.clear()
        overrides.refresh()


def loads_are_wide(alignment: int, dtype: torch.dtype) -> bool:
    """Whether a thread can load 8 bytes or more at a time."""
    return alignment * dtype.itemsize >= 8


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover a size. `triton.cdiv` costs a launch microseconds, more than an allocation."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of 2 that is not below size."""
    return 1 << (size - 1).bit_length()


def warps_of(count: int, target: Target) -> int:
    """Warps of 32 threads, as this target's number of warps: AMD's hold 64."""
    return max(count // 2, 1) if target.backend == "hip" else count


def walk_grid(rows: int, width: int, block_m: int, block_n: int, programs: int) -> tuple[int, int, int]:
    """The grid of a kernel of which about `programs` walk the rows: programs of each column tile, and column tiles.

    A row of 2^24 columns has more tiles than the 65,535 of an axis: they take two, the last of them with tiles beyond
    the row, and the kernel is compiled for that once more. See `_column_tile`. Axis 0 holds the programs, since the
    registers of the kernels were seen to depend on that: with the tiles there, the norms' backward took 145 instead of
    128 in 768 columns, or 1 program instead of 2.
    """
    tiles = ceil_div(width, block_n)
    of_axis_2 = ceil_div(tiles, MOST_OF_AXIS)
    return min(ceil_div(programs, tiles), ceil_div(rows, block_m)), ceil_div(tiles, of_axis_2), of_axis_2
