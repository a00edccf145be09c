"""The training loop: AdamW, a warm-up and cosine schedule, clipping, and honest times.

config = TrainConfig(steps=100, learning_rate=3e-4, autocast=torch.bfloat16)
history = train(model, batches(tokens, batch_size=8, seq_len=256), config)
print(history[-1].loss, history[-1].tokens / history[-1].seconds)
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps in all; the schedule ends there.
        learning_rate: the highest, reached after the warm-up.
        final_learning_rate: the last, as a fraction of the highest.
        warmup_steps: steps of linear growth from 0.
        weight_decay: for matrices and embeddings only.
        betas: AdamW's.
        grad_clip: largest norm of all gradients together; None does not clip.
        accumulation: batches a step; their gradients are averaged.
        autocast: torch.bfloat16 runs the model under autocast, None in the dtype of its weights.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int
    learning_rate: float = 6e-4
    final_learning_rate: float = 0.1
    warmup_steps: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float | None = 1.0
    accumulation: int = 1
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        # Asked so that NaN, which every comparison denies, is refused too.
        for name in ("steps", "accumulation"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "final_learning_rate", "warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and finite")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip={self.grad_clip} must be above 0, or None")
        if self.autocast not in (None, torch.bfloat16):
            # float16 gradients underflow without a loss scaler, which this loop does not have.
            raise ValueError(f"autocast={self.autocast} must be torch.bfloat16 or None")


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did.

    Args:
        step: counts from 0.
        loss: mean over the step's batches, before the update.
        seconds: forward, backward and update, with the device synchronised before and after; making the
            batches is not in it.
        tokens: targets the loss was taken over, padding included.
        learning_rate: that the update used.
        grad_norm: of all gradients together before clipping; None where there is no clipping.
    """

    step: int
    loss: float
    seconds: float
    tokens: int
    learning_rate: float
    grad_norm: float | None


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    on_step: Callable[[StepRecord], object] | None = None,
) -> list[StepRecord]:
    """Trains a model whose call returns its loss, as `model(*batch)`.

    Gradients left over from before are dropped.

    Args:
        model: any module, compiled or not, for example a `fastattn.models.GPT`.
        batches: tuples of tensors on the model's device; `config.accumulation` of them make a step.
        config: how to train.
        optimizer: to go on with, as a resumed training does; None makes one with `make_optimizer`.
        start: the step to begin with, below config.steps; batches must begin there too.
        on_step: called after each step with its record, for a progress bar or a log.

    Returns:
        a record for each step from `start` on.

    Raises:
        ValueError: the batches end before the steps do, or `start` is not a step.
        FloatingPointError: the loss or the norm of the gradients became infinite or NaN. That step made no
            update and called no `on_step`, so the weights and what was last saved are those before it.
    """
    if not 0 <= start < config.steps:
        raise ValueError(f"start={start} must be at least 0 and below steps={config.steps}")
    if optimizer is None:
        optimizer = make_optimizer(model, config)
    model.train()
    # Clipping reads the model's gradients, the update the optimizer's; one may hold more than the other.
    model.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=True)
    history = []
    remaining = iter(batches)
    for step in range(start, config.steps):
        record = _step(model, _take(remaining, config.accumulation, step), optimizer, config, step)
        history.append(record)
        if on_step is not None:
            on_step(record)
    return history


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], autocast: torch.dtype | None = None) -> float:
    """The mean loss of a model over finitely many batches, each weighing the same, without dropout."""
    was_training = model.training
    model.eval()
    try:
        losses = []
        for batch in batches:
            with _autocast(_device_of(model), autocast):
                losses.append(model(*batch))
    finally:
        model.train(was_training)
    if not losses:
        raise ValueError("there are no batches to evaluate on")
    return torch.stack(losses).mean().item()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, not biases nor LayerNorm's weights; fused on a GPU."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = _device_of(model).type == "cuda"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step: linear growth during the warm-up, then a cosine down to the final rate.

    Source: Loshchilov and Hutter, "SGDR" (2017), equation 5, without restarts.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 at the first step, 0 at the last
    return config.learning_rate * (config.final_learning_rate + (1.0 - config.final_learning_rate) * cosine)


def _step(
    model: nn.Module,
    micro_batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
) -> StepRecord:
    device = _device_of(model)
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    _synchronize(device)
    began = time.perf_counter()
    losses = []
    for batch in micro_batches:
        with _autocast(device, config.autocast):
            loss = model(*batch) / len(micro_batches)
        loss.backward()
        losses.append(loss.detach())
    norm = None
    if config.grad_clip is not None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
    # Waits for the backward: an update from a loss that is not finite cannot be taken back.
    mean_loss = torch.stack(losses).sum().item()
    _check_finite("loss", mean_loss, step)
    _check_finite("norm of the gradients", norm, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _synchronize(device)
    seconds = time.perf_counter() - began
    return StepRecord(
        step=step,
        loss=mean_loss,
        seconds=seconds,
        tokens=sum(batch[-1].numel() for batch in micro_batches),
        learning_rate=rate,
        grad_norm=norm,
    )


def _check_finite(name: str, value: float | None, step: int) -> None:
    if value is not None and not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {step}")


def _take(batches: Iterator[Batch], count: int, step: int) -> list[Batch]:
    taken = list(itertools.islice(batches, count))
    if len(taken) < count:
        raise ValueError(f"the batches ended at step {step}, which needs {count} and found {len(taken)}")
    return taken


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was queued, so that a clock shows what it did."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
