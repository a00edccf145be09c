"""A Transformer block, with each implementation of the models."""

from __future__ import annotations

import torch

from benchmarks.cases import BlockCase, call_block
from benchmarks.providers.registry import Function, Provider, provider, refuse_interpreter


def _block(implementation: str, compiles: bool = False) -> Provider:
    def provide(case: BlockCase, device: torch.device) -> Function:
        if implementation == "fastattn":
            refuse_interpreter(device)
        block = case.block(implementation, device)
        if compiles:
            block.compile(dynamic=False)
        return lambda x, *parameters: call_block(block, x, *parameters)

    return provide


for _name, _implementation, _compiles in (
    ("naive", "naive", False),
    ("torch", "torch", False),
    ("torch-compile", "torch", True),
    ("fastattn", "fastattn", False),
    ("fastattn-compile", "fastattn", True),
):
    provider("block", _name)(_block(_implementation, _compiles))
