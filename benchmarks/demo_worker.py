"""One implementation of the main job in a process of its own: JSON commands in, JSON events out, a line each.

A process each, so that a crash, a missing compiler or exhausted memory costs one row and not the run. The
parent lets the processes work in turns; one that waits for its turn uses no core.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.demo_options import IMPLEMENTATIONS, DemoOptions
from benchmarks.measure import first_line
from benchmarks.memory import held_by, peak_memory
from benchmarks.timing import synchronize
from fastattn.models import GPT
from fastattn.training.data import batches
from fastattn.training.loop import StepRecord, TrainConfig, make_optimizer, train

Command = dict[str, Any]


class Worker:
    """The model, its optimizer and the state of its training."""

    def __init__(
        self, name: str, options: DemoOptions, tokens: Tensor, commands: TextIO, events: TextIO
    ) -> None:
        self.options, self.tokens = options, tokens
        self.commands, self.events = commands, events
        self.device = torch.device(options.device)
        implementation, self.compiled = IMPLEMENTATIONS[name]
        torch.manual_seed(options.seed)  # before the model and on the CPU: the same weights in every process
        self.model = GPT(options.model_config(implementation)).to(self.device)
        self.config = TrainConfig(
            steps=options.steps,
            learning_rate=options.learning_rate,
            warmup_steps=min(options.steps // 10, 100),
            autocast=torch.bfloat16 if options.dtype == "bf16" else None,
        )
        self.optimizer = make_optimizer(self.model, self.config)
        if self.compiled:
            for module in self.model.blocks if options.compile_scope == "block" else (self.model,):
                module.compile(dynamic=options.compile_dynamic)

    def serve(self) -> None:
        """Answers commands until "stop" or the end of the input."""
        self.send(event="ready", parameters=sum(p.numel() for p in self.model.parameters()))
        while (command := self.receive()) is not None:
            fits = True
            try:
                getattr(self, "do_" + command.pop("do"))(**command)
            except torch.OutOfMemoryError:
                fits = False
            if not fits:  # out here, where the error no longer holds the step's tensors
                self.optimizer.zero_grad(set_to_none=True)
                gc.collect()
                self.rest()
                self.send(event="refused", reason="out of memory")

    def send(self, **event: Any) -> None:
        self.events.write(json.dumps(event) + "\n")
        self.events.flush()

    def receive(self) -> Command | None:
        line = self.commands.readline()
        command = json.loads(line) if line else {"do": "stop"}
        return None if command["do"] == "stop" else command

    def rest(self) -> None:
        """Gives cached memory back, as the other processes share the device."""
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def batches(self, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        tokens = self.tokens
        if tokens.numel() <= seq_len:  # a length of the plot beyond the text: only its time matters
            tokens = tokens.repeat(seq_len // tokens.numel() + 2)
        return batches(tokens, batch_size, seq_len, self.options.seed, device=self.device)

    def do_first(self) -> None:
        """Forward and backward of the first batch without an update: compiles, and warms up."""
        start = time.perf_counter()
        inputs, targets = next(self.batches(self.options.batch_size, self.options.seq_len))
        autocast = nullcontext()
        if self.config.autocast is not None:
            autocast = torch.autocast(self.device.type, self.config.autocast)  # type: ignore[assignment]
        with autocast:
            loss = self.model(inputs, targets)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        self.rest()
        self.send(event="done", seconds=seconds)

    def do_train(self, steps: int) -> None:
        """The whole training, in turns: after so many steps, waits for the next command to train."""
        turn, taken = steps, 0

        def end_of_step(record: StepRecord) -> None:
            nonlocal turn, taken
            timed = taken >= self.options.untimed_per_turn
            self.send(event="step", step=record.step, loss=record.loss, ms=record.seconds * 1e3, timed=timed)
            taken += 1
            if taken == turn and record.step + 1 < self.config.steps:
                self.rest()
                self.send(event="done")
                command = self.receive()
                if command is None:
                    raise SystemExit(0)
                turn, taken = command["steps"], 0

        stream = self.batches(self.options.batch_size, self.options.seq_len)
        train(self.model, stream, self.config, optimizer=self.optimizer, on_step=end_of_step)
        self.rest()
        self.send(event="done")

    def do_steps(self, batch_size: int, seq_len: int, steps: int) -> None:
        """Times whole training steps at some length, after those that are not timed in any turn."""
        untimed = self.options.untimed_per_turn
        seconds = self.more_steps(batch_size, seq_len, untimed + steps)[untimed:]
        self.rest()
        self.send(event="done", ms=[s * 1e3 for s in seconds])

    def do_memory(self, batch_size: int, seq_len: int) -> None:
        """Peak bytes of one training step: what is always there, and the most that comes on top."""
        self.optimizer.zero_grad(set_to_none=True)
        state = (t for entry in self.optimizer.state.values() for t in entry.values() if torch.is_tensor(t))
        held = held_by([*self.model.parameters(), *self.model.buffers(), *state])
        step = peak_memory(lambda: self.more_steps(batch_size, seq_len, 1), self.device)
        self.rest()
        self.send(event="done", held=held, peak=held + step)

    def more_steps(self, batch_size: int, seq_len: int, steps: int) -> list[float]:
        """Seconds of further steps of the same loop: the same work, but at a learning rate of 0."""
        config = replace(self.config, steps=steps, warmup_steps=0, learning_rate=0.0)
        stream = self.batches(batch_size, seq_len)
        return [r.seconds for r in train(self.model, stream, config, optimizer=self.optimizer)]


def main() -> None:
    # The protocol keeps the real standard output; whatever else prints goes to the log with the errors.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    setup = json.loads(sys.stdin.readline())
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in setup["options"].items()}
    options = DemoOptions(**values)
    try:
        tokens = torch.load(setup["tokens"], weights_only=True)
        Worker(setup["name"], options, tokens, sys.stdin, events).serve()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        events.write(json.dumps({"event": "failed", "reason": reason}) + "\n")
        events.flush()
        raise


if __name__ == "__main__":
    main()
