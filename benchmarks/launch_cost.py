"""What a call costs on the host above the launch of its kernels, measured without a device.

A stand-in for Triton's driver has no device: kernels are compiled for one architecture and never run, since what would
hand them to the driver does nothing, and tensors of the CPU stand for the device's. The public functions then take the
path they take on a GPU, and their time is all but the driver's own launch, the check of the current device, and what a
GPU's allocator costs more than a CPU's. Beside it: the same launches alone, by Triton's `kernel[grid](...)`.

    python -m benchmarks.launch_cost layer_norm rotary_embedding

With `--calls` the functions of Python that a call enters are counted instead, which takes no clock: a test bounds them.

It is a process of its own, since Triton's interpreter must be off and kernels that are bound to the stand-in are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastattn
from benchmarks.environment import REPOSITORY
from benchmarks.measure import Row
from benchmarks.timing import summarize
from fastattn import dispatch
from fastattn.kernels._plan import forget_plans

Call = Callable[[], Any]

# What an eager forward may cost above `kernel[grid](...)`, in microseconds.
MAX_ABOVE_LAUNCH_US = 10.0
# Calls between two looks at the clock: short enough that most are not interrupted where others compute.
_BURST = 20
_ROWS, _WIDTH, _HEADS, _HEAD_DIM = 16, 256, 4, 64
_FIRST, _STEPS = 1000, 5000


@contextlib.contextmanager
def without_device(arch: str = "sm_90") -> Iterator[None]:
    """Within the block, tensors of the CPU are launched on as if they were those of a GPU of this architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fastattn.kernels import _target
    from fastattn.ops import _loss, _norm_call, _rotary_call

    target = _target.KNOWN_TARGETS[arch]
    compiled_for = GPUTarget("cuda", target.arch, 32)
    stand_in = SimpleNamespace(
        utils=SimpleNamespace(
            load_binary=lambda *arguments: (1, 1, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": target.shared_memory},
        ),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: compiled_for,
        launcher_cls=lambda source, metadata: lambda *arguments: None,
    )
    replacements: list[tuple[Any, str, Any]] = [
        (driver, "_active", stand_in),
        (dispatch, "INTERPRETING", True),
        (dispatch, "interpreter_multiplies_bfloat16", True),
        (_target, "target_of", lambda device: target),
        # The values of a GPU's tensors are not read.
        *((module, "checking", lambda tensor: False) for module in (_loss, _norm_call, _rotary_call)),
    ]
    with contextlib.ExitStack() as patches:
        for place, name, value in replacements:
            patches.enter_context(mock.patch.object(place, name, value))
        patches.callback(forget_plans)  # which are those of the stand-in
        forget_plans()
        yield


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Within the block `kernel[grid](...)` does nothing with its arguments."""
    with _triton_s_launches(lambda kernel, grid, keywords: None):
        yield


def launches_of(call: Call) -> list[Call]:
    """What Triton's own launches of a call are, once it has kept none."""
    found: list[tuple[Any, Any, dict[str, Any]]] = []
    forget_plans()
    with _triton_s_launches(lambda *launch: found.append(launch)):
        call()
    return [partial(kernel[grid], **keywords) for kernel, grid, keywords in found]


@contextlib.contextmanager
def _triton_s_launches(instead: Callable[[Any, Any, dict[str, Any]], object]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    def launcher(kernel: Any, grid: Any) -> Call:
        return lambda **keywords: instead(kernel, grid, keywords)

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield


def launch_calls(gradients: bool) -> dict[str, tuple[Call, tuple[Tensor, ...]]]:
    """For each public operation a call on small bfloat16 tensors, and the tensors whose gradients are taken."""

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_(gradients)

    q, k, v = (make(1, _HEADS, _ROWS, _HEAD_DIM) for _ in range(3))
    x, residual, weight, bias = make(_ROWS, _WIDTH), make(_ROWS, _WIDTH), make(_WIDTH), make(_WIDTH)
    # PyTorch's products run, and are counted as ours.
    tiny, up, down, few = make(4, 16), make(16, 16), make(16, 16), torch.arange(4)
    cos, sin = fastattn.rotary_tables(_ROWS, _HEAD_DIM)
    target = torch.arange(_ROWS)
    norm = (_WIDTH,)
    calls: dict[str, tuple[Call, tuple[Tensor, ...]]] = {
        "layer_norm": (lambda: fastattn.layer_norm(x, norm, weight, bias), (x, weight, bias)),
        "rms_norm": (lambda: fastattn.rms_norm(x, norm, weight), (x, weight)),
        "add_layer_norm": (
            lambda: fastattn.add_layer_norm(x, residual, norm, weight, bias)[0],
            (x, residual, weight, bias),
        ),
        "attention": (lambda: fastattn.attention(q, k, v, causal=True), (q, k, v)),
        "cross_entropy": (lambda: fastattn.cross_entropy(x, target), (x,)),
        "rotary_embedding": (lambda: fastattn.rotary_embedding(q, cos, sin), (q,)),
        "rotary_embedding_qk": (lambda: fastattn.rotary_embedding_qk(q, k, cos, sin)[0], (q,)),
        "swiglu": (lambda: fastattn.swiglu(x), (x,)),
        "bias_gelu": (lambda: fastattn.bias_gelu(x, bias), (x, bias)),
        "gelu": (lambda: fastattn.gelu(x), (x,)),
        "mlp": (lambda: fastattn.mlp(tiny, up, None, down, None, implementation="triton"), (tiny, up, down)),
        "linear_cross_entropy": (lambda: fastattn.linear_cross_entropy(tiny, up, few), (tiny, up)),
    }
    if not gradients:
        caches = _growing_caches(make(1, _HEADS, _FIRST + _STEPS, _HEAD_DIM))
        calls["attention_step"] = (lambda: fastattn.attention(q[:, :, :1], *next(caches)), (q,))
    return calls


def _growing_caches(longest: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """k and v of one more key each time, contiguous, in splits; more than plans are kept, so that none comes again."""
    heads, most, width = longest.shape[1:]
    flat = longest.flatten()
    caches = [flat[: heads * seq * width].view(1, heads, seq, width) for seq in range(_FIRST, most)]
    return itertools.cycle([(cache, cache) for cache in caches])


def measure_launches(
    operations: list[str], rounds: int, clock: Callable[[], float] = time.thread_time
) -> Iterator[Row]:
    """Rows of calls and of their launches alone, forward and with gradients; needs `without_device`.

    Both are taken in turn in each round, next to an allocation, whose time tells how fast the machine is just then.
    """
    like = torch.empty(_ROWS, _WIDTH)
    for gradients in (False, True):
        for name, (call, inputs) in launch_calls(gradients).items():
            if operations and name not in operations:
                continue
            if gradients:
                call = _with_backward(call, inputs)
            launches = partial(_all, launches_of(call))
            samples_of: tuple[list[float], list[float], list[float]] = ([], [], [])
            for step in range(-2, rounds):
                samples = [
                    _burst(timed, clock) for timed in (call, launches, partial(torch.empty_like, like))
                ]
                if step >= 0:  # kernels are compiled and plans made before
                    for kept, sample in zip(samples_of, samples, strict=True):
                        kept.append(sample)
            whole, alone, unit = samples_of
            share = summarize(whole)
            yield {
                "operation": "launch",
                "case": name,
                "direction": "forward+backward" if gradients else "forward",
                "provider": "fastattn",
                "status": "ok",
                "median_us": share.median,
                "low_us": share.low,
                "high_us": share.high,
                "least_us": min(whole),
                "triton_us": min(alone),
                "empty_us": min(unit),
                "bound_us": None if gradients else MAX_ABOVE_LAUNCH_US,
                "rounds": rounds,
            }


def python_calls(call: Call) -> int:
    """How many functions written in Python a call enters, without itself and what stands in for a launch."""
    entered = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal entered
        if event == "call" and frame.f_code.co_filename != __file__:
            entered += 1

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def count_calls(operations: list[str]) -> Iterator[Row]:
    """Rows of the calls of Python forward and with gradients; needs `without_device`, and compiles nothing.

    Of launches that is the first of each: one that is kept is some more, the same for all.
    """
    with without_launches():
        for gradients in (False, True):
            for name, (call, inputs) in launch_calls(gradients).items():
                if operations and name not in operations:
                    continue
                if gradients:
                    call = _with_backward(call, inputs)
                for _ in range(3):  # plans are made, and what launches the call again is learned
                    call()
                direction = "forward+backward" if gradients else "forward"
                yield {
                    "operation": "launch",
                    "case": name,
                    "direction": direction,
                    "calls": python_calls(call),
                }


def _with_backward(call: Call, inputs: tuple[Tensor, ...]) -> Call:
    gradient = torch.ones_like(call())
    return lambda: torch.autograd.grad(call(), inputs, gradient)


def _all(calls: list[Call]) -> None:
    for call in calls:
        call()


def _burst(call: Call, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(_BURST):
        call()
    return (clock() - start) / _BURST * 1e6


def launch_rows(operations: tuple[str, ...] = (), rounds: int = 200, timeout: float = 600.0) -> Iterator[Row]:
    """The rows of `measure_launches` from a process of its own, or one that says why there are none."""
    command = [sys.executable, "-m", "benchmarks.launch_cost", "--json", "--rounds", str(rounds), *operations]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout
        )
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    except subprocess.TimeoutExpired:
        done, reason = None, f"not measured within {timeout:g} s"
    if done is not None and done.returncode == 0:
        yield from map(json.loads, done.stdout.splitlines())
        return
    yield {
        "operation": "launch",
        "case": "all",
        "direction": "forward",
        "provider": "fastattn",
        "status": "absent",
        "reason": reason,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_cost", description=__doc__)
    parser.add_argument("operations", nargs="*", help="names of public functions; all by default")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--calls", action="store_true", help="count calls of Python instead of microseconds")
    parser.add_argument("--json", action="store_true", help="one row a line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with without_device(options.arch):
        rows = measure_launches(options.operations, options.rounds)
        if options.calls:
            rows = count_calls(options.operations)
        for row in rows:
            line = json.dumps(row) if options.json else _shown(row)
            print(line, flush=True)
    return 0


def _shown(row: Row) -> str:
    if "calls" in row:
        return f"{row['case']:22s} {row['direction']:17s} {row['calls']:4d} calls of Python"
    return (
        f"{row['case']:22s} {row['direction']:17s} {row['least_us']:6.1f} us at least, {row['median_us']:6.1f} in the "
        f"middle; Triton's launch alone {row['triton_us']:6.1f}; an allocation {row['empty_us']:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
