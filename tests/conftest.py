"""What all tests share: without a GPU, Triton kernels run in Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

# Before anything imports Triton, which reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastattn import dispatch
from tests.interpreter import add_bulk_reductions, leave_out_idle_work, mend_bfloat16

if dispatch.INTERPRETING:
    mend_bfloat16()
    add_bulk_reductions()
    leave_out_idle_work()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def give_memory_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of a GPU that several processes test on, behind a test of real sizes."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
