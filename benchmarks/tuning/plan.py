"""What is tuned: each key that the cases ask for, with the cases that ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import BiasGeluCase, GeluCase, LayerNormCase, LossCase, OpCase, RMSNormCase
from benchmarks.inspection import launches_of
from benchmarks.inspection.cases import LAUNCHED, has_instructions
from benchmarks.suites import SUITES
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_forms import FORMS, form_reason, select_attention_form
from fastattn.kernels._config import Key, asked_configs
from fastattn.kernels._target import KNOWN_TARGETS, Target

# Of a key so many cases are timed: the first that ask for it.
_MOST_CASES = 2
# What takes most of a model's time comes first, since a GPU's may be short.
_SUITES = ("attention", "norm", "loss", "mlp", "rotary", "options", "decode", "e4m3")
_LONGEST = 8192
_BF16 = torch.bfloat16


class PlanError(Exception):
    """What was asked for cannot be tuned; the message says what can."""


@dataclass(frozen=True)
class Task:
    """One key of a function that chooses launch configs.

    Attributes:
        select: the function's name.
        key: the architecture, then what the function's own key gives.
        cases: what is timed.
        config: what the function returns now.
        starts: configs that are far from it, and worth a try with what is near to them: attention's other forms.
    """

    select: str
    key: Key
    cases: tuple[OpCase, ...]
    config: Any
    starts: tuple[Any, ...] = ()

    @property
    def label(self) -> str:
        return f"{short_name(self.select)} {' '.join(map(str, self.key[1:]))}".strip()

    @property
    def columns(self) -> int | None:
        """How wide a tile over rows can be: rounded-up widths come first in the keys of what goes over rows."""
        over_rows = short_name(self.select).startswith(("norm", "tile", "walk", "cross_entropy"))
        return int(self.key[1]) if over_rows else None

    @property
    def case_names(self) -> tuple[str, ...]:
        return tuple(f"{case.operation} {case.name}" for case in self.cases)


def tuning_cases() -> list[OpCase]:
    """The GPU's cases of the suites that launch kernels of ours alone, and widths and dtypes that these leave out."""
    cases: list[OpCase] = [case for name in _SUITES for case in SUITES[name].gpu]
    cases += [LayerNormCase(16384, width, dtype=_BF16) for width in (2048, 5120)]
    cases += [RMSNormCase(16384, 1024), GeluCase(8192, 4096), BiasGeluCase(8192, 4096)]
    cases += [LossCase(65536, 1024, _BF16), LossCase(8192, 32768)]
    # Other operations launch nothing of their own. Long sequences take long, and tell nothing more.
    return [case for case in cases if case.operation in LAUNCHED and getattr(case, "seq_q", 0) <= _LONGEST]


def plan(cases: Iterable[OpCase], target: Target, kernels: Sequence[str] = ()) -> list[Task]:
    """A task for each key that a call of one of the cases asks for on the target, forward or backward.

    Args:
        kernels: short names of functions, or their beginnings; all where empty.

    Raises:
        PlanError: no function has such a name.
    """
    found: dict[tuple[str, Key], tuple[Any, list[OpCase]]] = {}
    with mock.patch.dict(KNOWN_TARGETS, {target.name: target}):
        for case in (case for case in cases if has_instructions(case, target.name)):
            with asked_configs() as asked:
                launches_of(case, target.name)
            for select, key, config in dict.fromkeys(asked):
                found.setdefault((select, key), (config, []))[1].append(case)
    names = dict.fromkeys(short_name(select) for select, _ in found)
    for wanted in kernels:
        if not any(name.startswith(wanted) for name in names):
            raise PlanError(f"kernel {wanted!r} is unknown; there are {', '.join(names)}")
    return [
        Task(select, key, tuple(dict.fromkeys(asking))[:_MOST_CASES], config, _starts(select, key, target))
        for (select, key), (config, asking) in found.items()
        if not kernels or short_name(select).startswith(tuple(kernels))
    ]


def _starts(select: str, key: Key, target: Target) -> tuple[Any, ...]:
    """The configs of all forms of attention's loop that have one for this key (`form_reason`)."""
    if select != select_attention_config.__name__ or key[1] == 8:  # e4m3 operands have one form
        return ()
    _, bits, width, load = key
    head_dim, v_dim = width if isinstance(width, tuple) else (width, width)
    call = (head_dim, torch.float32 if bits == 32 else _BF16, target, load)
    served = [form for form in FORMS if form_reason(*call, form) is None]
    return tuple(select_attention_form(*call, form, v_dim) for form in served)


def short_name(select: str) -> str:
    """A function's name without what all of them have: "norm_forward"."""
    return select.removeprefix("select_").removesuffix("_config")
