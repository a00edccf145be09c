"""What the main job trains and measures: options, and defaults that fit the machine."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.models import TransformerConfig

# Implementation -> (the model's `implementation`, whether torch.compile is applied)
IMPLEMENTATIONS = {
    "naive": ("naive", False),
    "torch": ("torch", False),
    "torch-compile": ("torch", True),
    "fastattn": ("fastattn", False),
    "fastattn-compile": ("fastattn", True),
}
# GPT-2's 50,257 tokens rounded up to a multiple of 64, which matrix products prefer; the rest never occur.
_GPT2_VOCABULARY = 50304
# Learnt by --tokenizer bpe on a CPU, where a larger output layer would hide everything else.
_CPU_BPE_VOCABULARY = 2048


class DemoError(Exception):
    """The main job cannot start; the message is the one line to show."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """A whole run. `seq_lens` are the lengths of the speed and memory plot, at the training's batch size."""

    data: tuple[str, ...] = ()
    out: str | None = None
    implementations: tuple[str, ...] = tuple(IMPLEMENTATIONS)
    device: str = "cpu"
    dtype: str = "fp32"
    tokenizer: str = "bytes"
    vocabulary: int = 256
    layers: int = 2
    width: int = 192
    heads: int = 3
    steps: int = 60
    batch_size: int = 1
    seq_len: int = 1024
    learning_rate: float = 3e-4
    seed: int = 0
    seq_lens: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    repeats: int = 3
    steps_per_turn: int = 1
    untimed_per_turn: int = 0
    compile_scope: str = "block"
    compile_dynamic: bool | None = None
    commit: str | None = None

    def model_config(self, implementation: str) -> TransformerConfig:
        """The GPT to train.

        Raises:
            ValueError: a size is out of its range.
        """
        return TransformerConfig(
            vocab_size=self.vocabulary,
            max_length=max(self.seq_len, *self.seq_lens) if self.seq_lens else self.seq_len,
            d_model=self.width,
            n_layers=self.layers,
            n_heads=self.heads,
            approximate="tanh",
            implementation=implementation,
        )

    def to_json(self) -> dict[str, Any]:
        """As recorded beside the results: file names without their folders."""
        return {**asdict(self), "data": [Path(path).name for path in self.data], "out": None}


# A CPU: a byte-level GPT with heads of the usual 64, at a length where attention is a good part of the step. The
# learning rate is low enough that a rounding difference does not grow into another training (at 1e-3 it did).
# Compiling once for all lengths saves compiling again for the plot, half a minute a row.
CPU_DEFAULTS: dict[str, Any] = {"compile_dynamic": True}
# A GPU: GPT-2 124M. Turns of several steps, as each turn begins by allocating what the last one gave back;
# that first step is not timed.
GPU_DEFAULTS: dict[str, Any] = {
    "dtype": "bf16",
    "vocabulary": _GPT2_VOCABULARY,
    "layers": 12,
    "width": 768,
    "heads": 12,
    "steps": 120,
    "batch_size": 8,
    "learning_rate": 6e-4,
    "seq_lens": (512, 1024, 2048, 4096, 8192),
    "repeats": 5,
    "steps_per_turn": 6,
    "untimed_per_turn": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks demo`; a default of None is chosen for the device."""
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH", help="UTF-8 text files or folders")
    parser.add_argument("--out", metavar="DIR", help="results folder (default: a new one in demo-results)")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=list(IMPLEMENTATIONS),
        metavar="NAME",
        help=f"which to train, of: {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument("--device", help="cpu or cuda; the GPU where there is one otherwise")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16 trains under autocast")
    parser.add_argument("--tokenizer", choices=("bytes", "bpe"), help="bpe is learnt from the text itself")
    for name, meaning in (
        ("steps", "training steps"),
        ("batch-size", "sequences a step"),
        ("seq-len", "tokens a sequence"),
        ("layers", "Transformer blocks"),
        ("width", "width of the residual stream"),
        ("heads", "attention heads"),
        ("repeats", "timed steps at a length of the speed and memory plot; more at short ones"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    parser.add_argument("--learning-rate", type=float, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="weights and batches (default 0)")
    parser.add_argument(
        "--seq-lens",
        type=int,
        nargs="*",
        metavar="N",
        help="lengths of the speed and memory plot; empty skips it",
    )
    parser.add_argument(
        "--compile-scope",
        choices=("block", "model"),
        help="what torch.compile compiles: each block (default, much sooner done) or the whole model",
    )
    parser.add_argument("--commit", help="recorded where the checkout has no git history")


def make_options(arguments: argparse.Namespace) -> DemoOptions:
    """Fills in the machine's defaults and checks every value.

    Raises:
        DemoError: a value is out of its range, or the device or the tokenizer is not there.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise DemoError(f"--device {device} must be cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DemoError(f"--device {device}: PyTorch finds no GPU here")
    chosen = dict(GPU_DEFAULTS if device.startswith("cuda") else CPU_DEFAULTS)
    for key in DemoOptions.__dataclass_fields__:
        given = getattr(arguments, key, None)
        if given is not None:
            chosen[key] = tuple(given) if isinstance(given, list) else given
    chosen["device"] = device
    chosen["implementations"] = tuple(dict.fromkeys(chosen["implementations"]))
    chosen["seq_lens"] = tuple(sorted(set(chosen.get("seq_lens", DemoOptions.seq_lens))))
    chosen["tokenizer"] = _tokenizer(arguments.tokenizer, device)
    if chosen["tokenizer"] == "bpe":
        chosen.setdefault("vocabulary", _CPU_BPE_VOCABULARY)
    options = DemoOptions(**chosen)
    _check(options)
    return options


def _tokenizer(asked: str | None, device: str) -> str:
    there = importlib.util.find_spec("tokenizers") is not None
    if asked == "bpe" and not there:
        raise DemoError("--tokenizer bpe needs the package tokenizers: pip install tokenizers")
    return asked or ("bpe" if device.startswith("cuda") and there else "bytes")


def _check(options: DemoOptions) -> None:
    for key in ("steps", "batch_size", "seq_len", "layers", "width", "heads", "repeats"):
        if getattr(options, key) < 1:
            raise DemoError(f"--{key.replace('_', '-')} {getattr(options, key)} must be at least 1")
    for length in options.seq_lens:
        if length < 1:
            raise DemoError(f"--seq-lens {length} must be at least 1")
    if not 0 < options.learning_rate < float("inf"):
        raise DemoError(f"--learning-rate {options.learning_rate} must be above 0 and finite")
    try:
        options.model_config("naive")
    except ValueError as error:
        raise DemoError(str(error)) from error
