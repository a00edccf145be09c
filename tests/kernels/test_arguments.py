"""Kernel arguments in tuples, and results of helpers, as the oldest Triton that is supported compiles them.

Its compiler, 3.6.0's, is not among what tests run with: it fails where later ones and the interpreter do not.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the arguments are Triton's")

import fastattn.kernels
from fastattn.kernels._arguments import Rows, plane_of, rows_of, score_of
from fastattn.kernels._options import AttentionOptions

KERNELS = Path(next(iter(fastattn.kernels.__path__)))


def fields_of(found: tuple[Any, ...]) -> list[Any]:
    """All that a tuple holds, in tuples too, with what Triton's constants hold."""
    values: list[Any] = []
    for value in found:
        values += fields_of(value) if isinstance(value, tuple) else [getattr(value, "value", value)]
    return values


PLANES = {
    "whole": torch.zeros(2, 4, 5, 6),
    "row": torch.zeros(2, 1, 1, 6),
    "column": torch.zeros(1, 4, 5, 1),
    "number": torch.zeros(1, 1, 1, 1),
}


@pytest.mark.parametrize("name", PLANES)
def test_tuples_that_are_compared_with_none_hold_none_and_strings_nowhere(name: str) -> None:
    """A soft cap and the name of tanh's form, in one tuple, did not compile, nor did a stride of None."""
    options = AttentionOptions(
        1.0, softcap=2.0, dropout_p=0.5, bias=PLANES[name], mask=PLANES[name] > 0,
        alibi_slopes=torch.ones(2, 4), dropout_seed=torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    score = score_of(options, PLANES[name])
    tuples = [value for value in score if isinstance(value, tuple)]
    assert len(tuples) == 4
    for value in fields_of((*tuples, plane_of(PLANES[name]))):
        assert value is not None and not isinstance(value, str)


@pytest.mark.parametrize("width", [64, 72, 100, 63])
def test_rows_hold_no_none(width: int) -> None:
    """As did a row's unit of None, of which every kernel of attention asks the type."""
    rows = rows_of(torch.zeros(2, 3, 5, width))
    assert isinstance(rows, Rows) and None not in [v for v in fields_of(rows) if not isinstance(v, Tensor)]
    assert rows.unit.value * rows.stride_m == width


def _results(value: ast.expr) -> list[ast.expr]:
    """What an expression may be or, as a tuple, hold."""
    if isinstance(value, ast.Tuple):
        return [found for part in value.elts for found in _results(part)]
    if isinstance(value, ast.IfExp):
        return _results(value.body) + _results(value.orelse)
    return [value]


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _may_be_none(function: ast.FunctionDef) -> set[str]:
    """Names that a function assigns None to, alone or among others."""
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and any(map(_is_none, _results(node.value))):
            names |= {part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)}
    return names


def test_helpers_never_return_none() -> None:
    """Nor a tuple that holds it: what is not there is None with the caller, by the same constant condition."""
    seen = 0
    for path in sorted(KERNELS.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(function, ast.FunctionDef) or not any(
                "jit" in ast.unparse(decorator) for decorator in function.decorator_list
            ):
                continue
            seen += 1
            absent = _may_be_none(function)
            for node in ast.walk(function):
                if not isinstance(node, ast.Return) or node.value is None:
                    continue
                for part in _results(node.value):
                    assert not _is_none(part), function.name
                    assert not (isinstance(part, ast.Name) and part.id in absent), function.name
    assert seen > 80
