"""One training step of the GPT with each implementation: forward, backward and the optimizer's update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import GPT_CPU, GPT_GPU, GptCase
from benchmarks.conftest import median_of, time_call
from benchmarks.costs import gpt_step_flops
from benchmarks.demo_options import IMPLEMENTATIONS
from benchmarks.measure import first_line, release
from benchmarks.memory import peak_memory
from fastattn.models import GPT, TransformerConfig
from fastattn.testing import assert_accurate
from fastattn.training.loop import TrainConfig, make_optimizer, train

# On a CPU each compiled step takes half a minute to build; `python -m benchmarks demo` times those.
_NAMES = [n for n, (_, compiled) in IMPLEMENTATIONS.items() if torch.cuda.is_available() or not compiled]
_CASES = GPT_GPU if torch.cuda.is_available() else GPT_CPU


def make_gpt(case: GptCase, name: str, device: torch.device) -> GPT:
    """The same weights for every implementation."""
    implementation, compiled = IMPLEMENTATIONS[name]
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=case.vocabulary,
        max_length=case.seq_len,
        d_model=case.width,
        n_layers=case.layers,
        n_heads=case.heads,
        approximate="tanh",
        implementation=implementation,
    )
    model = GPT(config).to(device)
    for block in model.blocks if compiled else ():
        block.compile()
    return model


def make_batch(case: GptCase, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, case.batch, case.seq_len)
    inputs, targets = torch.randint(case.vocabulary, shape, generator=generator).to(device)
    return inputs, targets


def check_loss(model: GPT, case: GptCase, batch: tuple[Tensor, Tensor]) -> None:
    """The loss is as near to the truth, naive in float64, as naive is in float32."""
    device = batch[0].device
    with torch.no_grad():
        naive = make_gpt(case, "naive", device)
        peer = naive(*batch)
        truth = naive.double()(*batch)
        assert_accurate(model(*batch), peer, truth, name="loss")


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("case", _CASES, ids=[case.name for case in _CASES])
def test_gpt_step(case: GptCase, name: str, device: torch.device, benchmark: Any) -> None:
    release(device)
    torch._dynamo.reset()
    model, batch = make_gpt(case, name, device), make_batch(case, device)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    config = TrainConfig(steps=1, autocast=autocast)
    optimizer = make_optimizer(model, config)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield batch

    def step() -> None:
        train(model, batches(), config, optimizer=optimizer)

    try:
        check_loss(model, case, batch)
        step()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        pytest.skip(f"absent: {first_line(error)}")
    time_call(benchmark, step, device)
    flops, milliseconds = gpt_step_flops(case), median_of(benchmark)
    benchmark.extra_info |= {
        "flops": flops,
        "tflops": flops / milliseconds / 1e9,
        "tokens_per_s": case.batch * case.seq_len / milliseconds * 1e3,
        "peak_bytes": peak_memory(step, device),
    }
