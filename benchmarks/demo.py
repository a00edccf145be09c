"""`python -m benchmarks demo`: trains the GPT on real text once per implementation, and measures as it goes.

Every implementation starts from the same weights and sees the same batches, in a process of its own. The
processes train in turns, a few steps each in an order that changes every round, so that whatever slows the
machine down for a while slows all of them down alike.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.demo_options import IMPLEMENTATIONS, DemoError, DemoOptions
from benchmarks.processes import Event, WorkerFailed, WorkerProcess, WorkerRefused, worker_environment
from benchmarks.report import RowWriter, results_folder
from benchmarks.timing import round_order
from fastattn.training.data import BPETokenizer, ByteTokenizer, DataError, read_texts

# Called with what is going on and how many units of work were done since the last call.
Progress = Callable[[str, float], None]

# What a unit of the progress bar is: a training step. Starting a process takes about as long as five.
_START_UNITS = 5.0


@dataclass
class Outcome:
    """What one implementation did: its steps, its memory, and why it stopped if it did."""

    name: str
    reason: str | None = None
    parameters: int = 0
    first_step_s: float | None = None
    steps: list[Event] = field(default_factory=list)
    peak_bytes: int | None = None
    held_bytes: int | None = None


@dataclass
class Point:
    """One implementation at one sequence length of the speed and memory plot."""

    name: str
    seq_len: int
    ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    reason: str | None = None


@dataclass
class DemoResult:
    """Everything that was measured."""

    outcomes: dict[str, Outcome]
    points: list[Point]
    tokens: int


def load_tokens(options: DemoOptions) -> tuple[Tensor, int]:
    """The text as tokens, and the size of the tokenizer's vocabulary.

    Raises:
        DemoError: a file cannot be used, or the text is too short; one line.
    """
    try:
        for path in options.data:
            mode = os.stat(path).st_mode if os.path.exists(path) else 0
            if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
                raise DataError(f"{path} is a device, not a file")
        texts = read_texts(options.data or None)
        for text in texts:
            if "\0" in text:
                raise DataError(f"the text holds a NUL character near {text[:20]!r}: this is not a text file")
        if options.tokenizer == "bytes":
            tokenizer: ByteTokenizer | BPETokenizer = ByteTokenizer()
        else:
            tokenizer = BPETokenizer.train(texts, max(options.vocabulary, 257))
        tokens = tokenizer.encode(texts)
    except (DataError, OSError) as error:
        raise DemoError(f"cannot use the text: {error}") from error
    least = options.seq_len + 1
    if tokens.numel() < least:
        raise DemoError(
            f"the text has {tokens.numel()} tokens; --seq-len {options.seq_len} needs at least {least}"
        )
    return tokens, tokenizer.vocab_size


def make_folder(out: str | None) -> Path:
    """The results folder: the one asked for, or a new dated one."""
    if out is not None:
        return results_folder(Path(out))
    base = Path("demo-results") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return results_folder(path)


def planned_units(options: DemoOptions) -> float:
    """Length of the progress bar."""
    lengths = sum((2 + rounds_at(n, options)) * n / options.seq_len for n in options.seq_lens)
    return len(options.implementations) * (2 * _START_UNITS + options.steps + 2 + lengths)


def rounds_at(seq_len: int, options: DemoOptions) -> int:
    """Timed steps at a length of the plot: up to five times as many where a step is short, and noise large."""
    return options.repeats * max(1, min(5, options.seq_len // seq_len))


class Demo:
    """The processes of one run and what they reported."""

    def __init__(self, options: DemoOptions, tokens: Tensor, folder: Path, progress: Progress) -> None:
        self.options, self.tokens, self.progress = options, tokens, progress
        self.outcomes = {name: Outcome(name) for name in options.implementations}
        self.points: list[Point] = []
        self._workers: dict[str, WorkerProcess] = {}
        self._logs = folder / "logs"
        self._logs.mkdir(exist_ok=True)
        # What an interrupted run leaves behind; a run that ends says all of it in its report.
        (folder / "demo.jsonl").unlink(missing_ok=True)
        self._rows = RowWriter(folder / "demo.jsonl")

    def run(self) -> DemoResult:
        with tempfile.TemporaryDirectory(prefix="fastattn-demo-") as scratch:
            try:
                self._start(Path(scratch))
                self._first_steps()
                self._train()
                self._memory()
                for seq_len in self.options.seq_lens if self._workers else ():
                    self._measure_length(seq_len)
            finally:
                for worker in self._workers.values():
                    worker.stop()
        return DemoResult(self.outcomes, self.points, self.tokens.numel())

    def _start(self, scratch: Path) -> None:
        torch.save(self.tokens, scratch / "tokens.pt")
        # Those that compile do so at the same time and share the cores.
        threads = (os.cpu_count() or 1) // max(1, sum(IMPLEMENTATIONS[n][1] for n in self.outcomes))
        for name in self.options.implementations:
            # A fresh compiler cache each, so that one row's compilation is not paid by another's.
            extra = {
                "TORCHINDUCTOR_CACHE_DIR": str(scratch / f"inductor-{name}"),
                "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, threads)),
            }
            setup = {"name": name, "options": asdict(self.options), "tokens": str(scratch / "tokens.pt")}
            self._workers[name] = WorkerProcess(
                "benchmarks.demo_worker", setup, self._logs / f"{name}.log", worker_environment(extra)
            )
        for name in list(self._workers):
            with self._failing(name):
                self.outcomes[name].parameters = self._workers[name].wait("ready")["parameters"]
            self.progress("starting the processes", _START_UNITS)

    def _first_steps(self) -> None:
        """Forward and backward once, not counted; those that compile do so side by side, as it takes long."""
        eager = [name for name in self._workers if not IMPLEMENTATIONS[name][1]]
        compiled = [name for name in self._workers if IMPLEMENTATIONS[name][1]]
        for together in (*([name] for name in eager), compiled):
            for name in together:
                self.progress(f"first step of {name}" + (", compiling" if together is compiled else ""), 0)
                with self._failing(name):
                    self._workers[name].begin({"do": "first"})
            for name in together:
                if name in self._workers:
                    with self._failing(name):
                        self.outcomes[name].first_step_s = self._workers[name].wait("done")["seconds"]
                self.progress(f"first step of {name}", _START_UNITS)

    def _train(self) -> None:
        left, index = self.options.steps, 0
        while left and self._workers:
            turn = min(left, self.options.steps_per_turn)
            for name in round_order(list(self._workers), index):
                with self._failing(name):
                    self._workers[name].ask({"do": "train", "steps": turn}, self._stepped(name))
            left -= turn
            index += 1

    def _stepped(self, name: str) -> Callable[[Event], None]:
        def note(event: Event) -> None:
            step = {key: event[key] for key in ("step", "loss", "ms", "timed")}
            self.outcomes[name].steps.append(step)
            self._rows.write({"implementation": name, **step})
            done = event["step"] + 1
            self.progress(f"training, step {done} of {self.options.steps}: loss {event['loss']:.3f}", 1)

        return note

    def _memory(self) -> None:
        size = {"batch_size": self.options.batch_size, "seq_len": self.options.seq_len}
        for name in list(self._workers):
            with self._failing(name):
                event = self._workers[name].ask({"do": "memory", **size})
                self.outcomes[name].peak_bytes, self.outcomes[name].held_bytes = event["peak"], event["held"]
            self.progress("peak memory of a step", 2)

    def _measure_length(self, seq_len: int) -> None:
        """Time and memory of a training step at one length: warm up, then interleaved rounds."""
        points = {name: Point(name, seq_len) for name in self._workers}
        self.points += points.values()
        size = {"batch_size": self.options.batch_size, "seq_len": seq_len}
        units, label = seq_len / self.options.seq_len, f"a step at {seq_len:,} tokens"
        longer = {p.name: p.reason for p in self.points if p.reason is not None}
        for name, point in points.items():
            point.reason = longer.get(name)  # what a shorter sequence could not do, a longer one cannot
            if point.reason is None:
                with self._failing(name, point):
                    self._workers[name].ask({"do": "steps", "steps": 1, **size})
                    point.peak_bytes = self._workers[name].ask({"do": "memory", **size})["peak"]
            self.progress(label, 2 * units)
        for index in range(rounds_at(seq_len, self.options)):
            for name in round_order(list(points), index):
                if points[name].reason is None:
                    with self._failing(name, points[name]):
                        point = points[name]
                        point.ms += self._workers[name].ask({"do": "steps", "steps": 1, **size})["ms"]
                self.progress(label, units)
        for point in points.values():
            self._rows.write(asdict(point))

    @contextmanager
    def _failing(self, name: str, point: Point | None = None) -> Iterator[None]:
        """Turns a failure inside into the row's reason; a process that died takes no further part."""
        try:
            yield
        except (WorkerFailed, WorkerRefused) as failure:
            if point is not None:
                point.reason = str(failure)
            else:
                self.outcomes[name].reason = str(failure)
            if point is None or isinstance(failure, WorkerFailed):
                self._workers.pop(name).stop()


def run_demo(
    options: DemoOptions, progress_for: Callable[[float], Any]
) -> tuple[Path, DemoResult, DemoOptions]:
    """Checks everything that can be checked, then trains.

    Args:
        options: from `make_options`.
        progress_for: a context manager of a `Progress`, given the number of units.

    Returns:
        (results folder, what was measured, the options with the tokenizer's vocabulary).

    Raises:
        DemoError, FolderError: nothing was trained; the message is one line.
    """
    tokens, vocabulary = load_tokens(options)
    options = with_vocabulary(options, vocabulary)
    folder = make_folder(options.out)
    if "TRITON_INTERPRET" in os.environ:
        print(
            "TRITON_INTERPRET is set; the demo runs without it, as the interpreter is for tests",
            file=sys.stderr,
        )
    with progress_for(planned_units(options)) as progress:
        result = Demo(options, tokens, folder, progress).run()
    return folder, result, options


def with_vocabulary(options: DemoOptions, vocabulary: int) -> DemoOptions:
    """A model never smaller than its tokenizer; a larger one (GPT-2's) stays."""
    return replace(options, vocabulary=max(vocabulary, options.vocabulary))
