"""What the tests of the benchmarks share."""

import pytest

from fastattn import dispatch


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the benchmarks run on a CPU: without Triton's interpreter, which the other tests need."""
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
