"""LayerNorm: every provider on every case, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import OpCase

OPERATION = "layer_norm"


def test_layer_norm(
    case: OpCase,
    direction: str,
    provider: str,
    measure: Callable[[OpCase, str, str], None],
) -> None:
    measure(case, provider, direction)
