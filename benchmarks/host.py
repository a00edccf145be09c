"""What a call costs on the host: eager calls on tiny tensors, and importing the package."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from benchmarks.environment import REPOSITORY
from benchmarks.measure import Row
from benchmarks.timing import host_cost, summarize

# What an eager call may cost above PyTorch's own function, in microseconds, and an import in seconds.
MAX_CALL_US = 15.0
MAX_IMPORT_S = 0.3

_IMPORT = """
import json, sys, time
start = time.perf_counter()
import torch
between = time.perf_counter()
triton = "triton" in sys.modules
import fastattn
end = time.perf_counter()
print(json.dumps([between - start, end - between, "triton" in sys.modules and not triton]))
"""


def host_pairs(device: torch.device | str = "cpu") -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """(ours, PyTorch's) for each public operation, on tensors so small that only the host's work shows."""
    q, k, v = (torch.randn(1, 1, 2, 8, device=device) for _ in range(3))
    x, weight, bias = (
        torch.randn(2, 8, device=device),
        torch.ones(8, device=device),
        torch.zeros(8, device=device),
    )
    shape = (8,)
    return {
        "attention": (
            lambda: fastattn.attention(q, k, v),
            lambda: F.scaled_dot_product_attention(q, k, v),
        ),
        "attention causal": (
            lambda: fastattn.attention(q, k, v, causal="top_left"),
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ),
        "scaled_dot_product_attention": (
            lambda: fastattn.scaled_dot_product_attention(q, k, v),
            lambda: F.scaled_dot_product_attention(q, k, v),
        ),
        "layer_norm": (
            lambda: fastattn.layer_norm(x, shape, weight, bias),
            lambda: F.layer_norm(x, shape, weight, bias),
        ),
        "gelu": (lambda: fastattn.gelu(x), lambda: F.gelu(x)),
    }


def measure_host(device: torch.device | str = "cpu", rounds: int = 30) -> Iterator[Row]:
    """A row for each public operation: microseconds a call, PyTorch's, the difference; no gradients.

    The bound holds for a CPU, where both take PyTorch's operator; on a GPU ours launches a Triton kernel.
    """
    device = torch.device(device)
    for name, (ours, theirs) in host_pairs(device).items():
        with torch.no_grad():
            samples = host_cost({"fastattn": ours, "torch": theirs}, rounds)
        mine, pytorch = summarize(samples["fastattn"]), summarize(samples["torch"])
        above = summarize([a - b for a, b in zip(samples["fastattn"], samples["torch"], strict=True)])
        yield {
            "operation": "host",
            "case": f"{name}, {device.type}",
            "direction": "forward",
            "provider": "fastattn",
            "status": "ok",
            "median_us": mine.median,
            "low_us": mine.low,
            "high_us": mine.high,
            "torch_us": pytorch.median,
            "above_torch_us": above.median,
            "above_torch_low_us": above.low,
            "above_torch_high_us": above.high,
            "bound_us": MAX_CALL_US if device.type == "cpu" else None,
            "rounds": mine.count,
        }


def measure_import(rounds: int = 5) -> Row:
    """Seconds that `import fastattn` adds to `import torch`, each round in a fresh interpreter."""
    torch_s, added_s, triton = [], [], False
    for _ in range(rounds):
        command = [sys.executable, "-c", _IMPORT]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        seconds, added, imported = json.loads(done.stdout.splitlines()[-1])
        torch_s.append(seconds)
        added_s.append(added)
        triton = triton or imported
    added_summary = summarize(added_s)
    return {
        "operation": "import",
        "case": "import fastattn",
        "direction": "",
        "provider": "fastattn",
        "status": "ok",
        "median_s": added_summary.median,
        "low_s": added_summary.low,
        "high_s": added_summary.high,
        "torch_s": statistics.median(torch_s),
        "bound_s": MAX_IMPORT_S,
        "imports_triton": triton,
        "rounds": rounds,
    }
