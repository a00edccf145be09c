"""The loop: its schedule, what it decays, accumulation, records, and what stops it."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn.models import GPT, tiny
from fastattn.training import loop
from fastattn.training.data import ByteTokenizer, batches, read_texts
from fastattn.training.loop import StepRecord, TrainConfig, evaluate, learning_rate, make_optimizer, train


class Line(nn.Module):
    """The least model whose call returns a loss: fits y = w x."""

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), weight))
        self.calls: list[tuple[bool, torch.dtype]] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        product = x @ self.weight
        self.calls.append((self.training, product.dtype))
        return (product.float() - y).square().mean()


def _line_batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.rand(4, 1, generator=generator)
        yield x, 3 * x


def _gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(tiny(n_layers=1, implementation="torch", **changes))


def _text() -> Tensor:
    return ByteTokenizer().encode(read_texts()[:10])


def test_learns_real_text_and_records_it() -> None:
    config = TrainConfig(steps=12, learning_rate=1e-2, warmup_steps=2)
    seen: list[StepRecord] = []
    history = train(_gpt(), batches(_text(), 4, 16), config, on_step=seen.append)
    assert seen == history
    assert [record.step for record in history] == list(range(12))
    assert history[-1].loss < history[0].loss - 0.5
    for record in history:
        assert record.tokens == 4 * 16
        assert record.seconds > 0
        assert record.learning_rate == learning_rate(record.step, config)
        assert record.grad_norm is not None and record.grad_norm > 0


def test_same_seed_same_history() -> None:
    config = TrainConfig(steps=3, learning_rate=1e-2)
    losses = [[r.loss for r in train(_gpt(), batches(_text(), 2, 16, seed=7), config)] for _ in range(2)]
    assert losses[0] == losses[1]


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainConfig(steps=11, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(step, config) for step in range(11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.55)  # half way down the cosine
    assert rates[10] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert learning_rate(0, TrainConfig(steps=1, learning_rate=1.0)) == 1.0
    constant = TrainConfig(steps=5, learning_rate=1.0, final_learning_rate=1.0)
    assert {learning_rate(step, constant) for step in range(5)} == {1.0}


def test_decays_matrices_only() -> None:
    model = _gpt()
    optimizer = make_optimizer(model, TrainConfig(steps=1, weight_decay=0.3, betas=(0.8, 0.9)))
    decayed, kept = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and kept["weight_decay"] == 0.0
    assert decayed["betas"] == (0.8, 0.9)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in kept["params"]} == {
        n for n in names.values() if "norm" in n or n.endswith("bias")
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_frozen_parameters_stay() -> None:
    model = _gpt()
    model.position_embedding.weight.requires_grad_(False)
    before = model.position_embedding.weight.clone()
    config = TrainConfig(steps=2)
    groups = make_optimizer(model, config).param_groups
    assert all(p is not model.position_embedding.weight for group in groups for p in group["params"])
    train(model, batches(_text(), 2, 16), config)
    assert torch.equal(model.position_embedding.weight, before)


def test_accumulation_is_the_larger_batch() -> None:
    """Two batches of two in one step give the weights and the loss that one batch of four gives."""
    text = _text()
    large = list(next(batches(text, 4, 16)))
    halves = [tuple(t[:2] for t in large), tuple(t[2:] for t in large)]
    whole, accumulated = _gpt(), _gpt()
    (one,) = train(whole, [large], TrainConfig(steps=1, grad_clip=None))
    (two,) = train(accumulated, halves, TrainConfig(steps=1, accumulation=2, grad_clip=None))
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert two.tokens == one.tokens == 64
    assert one.grad_norm is None
    gradients = []
    for model, micro in ((whole, [large]), (accumulated, halves)):
        model.zero_grad()
        for batch in micro:
            (model(*batch) / len(micro)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # Adam's first step is the sign of the gradient, so only gradients above rounding are compared.
    clear = gradients[0].abs() > 1e-4
    weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (whole, accumulated)]
    torch.testing.assert_close(weights[0][clear], weights[1][clear], rtol=0, atol=1e-6)


def test_gradients_are_clipped() -> None:
    clipped, plain = Line(), Line()
    options = {"steps": 1, "learning_rate": 1.0, "weight_decay": 0.0}
    for model, clip in ((clipped, 0.5), (plain, None)):
        config = TrainConfig(**options, grad_clip=clip)
        (record,) = train(
            model, _line_batches(1), config, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)
        )
    norm = plain.weight.item()  # plain gradient descent at rate 1 from 0 moves by the gradient
    assert norm > 0.5
    assert clipped.weight.item() == pytest.approx(0.5, rel=1e-5)
    assert record.grad_norm is None


def test_updates_by_the_schedules_rate() -> None:
    """Plain gradient descent from 0 moves by rate times gradient, whatever rate the optimizer came with."""
    moved = []
    for rate in (1.0, 0.25):
        model = Line()
        config = TrainConfig(steps=1, learning_rate=rate, grad_clip=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
        train(model, _line_batches(1), config, optimizer=optimizer)
        moved.append(model.weight.item())
    assert moved[1] == pytest.approx(0.25 * moved[0])
    x, y = next(_line_batches(1))
    assert moved[0] == pytest.approx((2 * x * y).mean().item())


def test_start_continues_the_schedule() -> None:
    config = TrainConfig(steps=6, warmup_steps=3)
    history = train(Line(), _line_batches(2), config, start=4)
    assert [record.step for record in history] == [4, 5]
    assert history[0].learning_rate == learning_rate(4, config)


def test_autocast_runs_the_model_in_bfloat16() -> None:
    model = Line()
    train(model, _line_batches(1), TrainConfig(steps=1, autocast=torch.bfloat16))
    assert model.calls == [(True, torch.bfloat16)]
    assert model.weight.dtype == torch.float32
    evaluate(model, _line_batches(1), torch.bfloat16)
    assert model.calls[1:] == [(False, torch.bfloat16)]


def test_evaluates_without_training() -> None:
    model = Line(1.0)
    model.train()
    loss = evaluate(model, _line_batches(3))
    expected = [(2 * x).square().mean().item() for x, _ in _line_batches(3)]
    assert loss == pytest.approx(sum(expected) / 3)
    assert model.weight.item() == 1.0 and model.weight.grad is None
    assert model.training and model.calls == [(False, torch.float32)] * 3
    with pytest.raises(ValueError, match="there are no batches to evaluate on"):
        evaluate(model, [])


def test_time_is_taken_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is synchronised before the clock is read, both times, and batches are made outside."""
    events = []
    monkeypatch.setattr(loop, "_synchronize", lambda device: events.append("synchronize"))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: events.append("clock") or float(len(events)))

    def made() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in _line_batches(1):
            events.append("batch")
            yield batch

    train(Line(), made(), TrainConfig(steps=1))
    assert events == ["batch", "synchronize", "clock", "synchronize", "clock"]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_stops_before_a_loss_that_is_not_finite_is_learnt(value: float) -> None:
    """The update was made and on_step called first, so a checkpoint of NaN replaced the last good one."""
    model, seen = Line(), []
    bad = [(torch.ones(1, 1), torch.full((1, 1), y)) for y in (1.0, value, 1.0)]
    with pytest.raises(FloatingPointError, match=f"the loss is {value} at step 1"):
        train(model, bad, TrainConfig(steps=3), on_step=lambda record: seen.append(model.weight.item()))
    assert len(seen) == 1 and math.isfinite(seen[0])
    assert model.weight.item() == seen[0]


def test_stops_before_gradients_that_are_not_finite_are_learnt() -> None:
    """The loss of 0 is finite, but not the slope of sqrt there."""

    class Root(Line):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x @ self.weight).sqrt().sum()

    model = Root()
    with pytest.raises(FloatingPointError, match="the norm of the gradients is inf at step 0"):
        train(model, _line_batches(1), TrainConfig(steps=1))
    assert model.weight.item() == 0.0


def test_gradients_from_before_are_dropped() -> None:
    """A backward before train() was added to the first step: here it would turn the step around.

    Also of a parameter that only the model has, which would shrink the step by clipping, or the optimizer.
    """
    weights = []
    for before in (None, 1e3):
        model, outside = Line(), nn.Parameter(torch.zeros(1, 1))
        model.unused = nn.Parameter(torch.zeros(1, 1))
        if before is not None:
            for parameter in (model.weight, model.unused, outside):
                parameter.grad = torch.full((1, 1), before)
        optimizer = torch.optim.SGD([model.weight, outside], lr=1.0)
        train(model, _line_batches(1), TrainConfig(steps=1), optimizer=optimizer)
        weights.append((model.weight.item(), outside.item()))
    assert weights[0] == weights[1]
    assert weights[0][0] > 0


def test_says_when_batches_run_out() -> None:
    with pytest.raises(ValueError, match="the batches ended at step 1, which needs 2 and found 1"):
        train(Line(), _line_batches(3), TrainConfig(steps=2, accumulation=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"accumulation": 0}, "accumulation=0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be at least 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be at least 0 and finite"),
        ({"learning_rate": math.inf}, "learning_rate=inf must be at least 0 and finite"),
        ({"weight_decay": math.nan}, "weight_decay=nan must be at least 0 and finite"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"grad_clip": 0.0}, "grad_clip=0.0 must be above 0, or None"),
        ({"grad_clip": math.nan}, "grad_clip=nan must be above 0, or None"),
        ({"autocast": torch.float16}, "autocast=torch.float16 must be torch.bfloat16 or None"),
    ],
)
def test_config_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 1, **changes})


@pytest.mark.parametrize("start", [-1, 2])
def test_start_out_of_range(start: int) -> None:
    with pytest.raises(ValueError, match=f"start={start} must be at least 0 and below steps=2"):
        train(Line(), _line_batches(2), TrainConfig(steps=2), start=start)
