"""A whole training step of a GPT with each implementation: forward, backward and the optimizer's update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import GptCase, shape_of
from benchmarks.costs import gpt_step_flops
from benchmarks.demo_options import IMPLEMENTATIONS
from benchmarks.measure import Row, failing, failure_of, figures, release, timed
from benchmarks.memory import peak_memory
from benchmarks.timing import Timer, make_timer
from fastattn.models import GPT, TransformerConfig
from fastattn.testing import assert_accurate
from fastattn.training.loop import TrainConfig, make_optimizer, train


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


def make_step(case: GptCase, name: str, device: torch.device) -> Callable[[], Any]:
    """A step that can be repeated, checked and run once.

    Raises:
        Failed, Absent: it cannot run, or its loss is wrong.
    """
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
    except Exception as error:
        raise failure_of(error) from error
    return step


def measure_gpt(
    case: GptCase, device: torch.device, rounds: int, names: tuple[str, ...], timer: Timer | None = None
) -> Iterator[Row]:
    """A row for each implementation, as `measure_case` gives for an operation."""
    torch._dynamo.reset()
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name in names:
        rows[name] = {"operation": case.operation, "case": case.name, "shape": shape_of(case)}
        rows[name] |= {"direction": "step", "provider": name, "status": "ok"}
        if device.type == "cuda":  # the loop reads the loss's value, and so every step waits
            rows[name]["waits_for_device"] = True
        with failing(rows[name]):
            calls[name] = make_step(case, name, device)
    samples = timed(calls, rows, timer or make_timer(device), rounds)
    for name, call in calls.items():
        if rows[name]["status"] == "ok":
            with failing(rows[name]):
                rows[name] |= _measured(case, call, figures(name, samples), device)
    yield from rows.values()
    release(device)


def _measured(case: GptCase, call: Callable[[], Any], found: Row, device: torch.device) -> Row:
    return found | {
        "tflops": gpt_step_flops(case) / found["median_ms"] / 1e9,
        "tokens_per_s": case.batch * case.seq_len / found["median_ms"] * 1e3,
        "peak_mib": peak_memory(call, device) / 2**20,
    }
