"""Rows as a run of the suite on an imaginary GPU would give them."""

from itertools import product

ENVIRONMENT = {
    "date": "2026-11-22T09:32:35+00:00",
    "device": "Imaginary <GPU>",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
    "driver": "580.1",
    "commit": "b362a085b94e",
    "dirty": True,
    "clocks_before": {"sm": 1980, "memory": 3201},
    "clocks_after": {"sm": 1965, "memory": 3201},
}
CEILINGS = [
    {"suite": "attention", "operation": "ceiling", "case": "matmul", "provider": "torch", "tflops": 720.0},
    {
        "suite": "attention",
        "operation": "ceiling",
        "case": "copy",
        "provider": "torch",
        "gbytes_per_s": 4100.0,
    },
]
# provider -> time of a forward over that of the fastest
ATTENTION = {
    "naive": 9.0,
    "torch": 1.1,
    "torch-compile": 7.0,
    "sdpa-flash": 1.2,
    "sdpa-efficient": 2.1,
    "sdpa-cudnn": 1.0,
    "sdpa-math": 10.0,
    "flex-attention": 1.4,
    "fastattn": 1.05,
    "fastattn-triton": 1.06,
    "fastattn-torch": 1.11,
}
NORM = {"naive": 5.0, "torch": 1.5, "torch-compile": 1.1, "liger": 1.3, "fastattn": 1.0}


def timed(common, provider, milliseconds, flops, traffic, mib):
    tflops, gbytes = flops / milliseconds / 1e9, traffic / milliseconds / 1e6
    return {
        **common,
        "provider": provider,
        "status": "ok",
        "median_ms": milliseconds,
        "low_ms": milliseconds * 0.97,
        "high_ms": milliseconds * 1.04,
        "rounds": 20,
        "tflops": tflops,
        "gbytes_per_s": gbytes,
        "roofline_share": min(1.0, tflops / 720 + gbytes / 4100),
        "host_us": 18.25,
        "peak_mib": mib,
        "time_vs_torch": 0.95,
        "time_vs_torch_low": 0.93,
        "time_vs_torch_high": 0.97,
    }


def attention_rows(direction, head_dim, length):
    batch = 16384 // length
    common = {
        "suite": "attention",
        "operation": "attention",
        "case": f"b{batch}-h16-s{length}-d{head_dim}-top_left-bf16",
        "direction": direction,
        "shape": {
            "batch": batch,
            "heads": 16,
            "kv_heads": 16,
            "seq_q": length,
            "seq_k": length,
            "head_dim": head_dim,
            "causal": "top_left",
            "dtype": "bf16",
        },
    }
    flops = 2 * 16384 * 16 * length * head_dim * (1 if direction == "forward" else 3.5)
    traffic = 8 * 16384 * 16 * head_dim * (1 if direction == "forward" else 3)
    for provider, slower in ATTENTION.items():
        mib = 16384 * 16 * (head_dim * 8 + (length * 4 if slower > 5 else 0)) / 2**20
        if mib > 10000:
            yield {**common, "provider": provider, "status": "out of memory", "reason": "out of memory"}
            continue
        ideal = flops / 650e9 + 0.02
        yield timed(common, provider, ideal * slower, flops, traffic, mib)
    reason = "flash-attn is not installed <b>&"
    yield {**common, "provider": "flash-attn-3", "status": "absent", "reason": reason}


def norm_rows(direction, rows, width):
    common = {
        "suite": "norm",
        "operation": "layer_norm",
        "case": f"bf16-{rows}x{width}",
        "direction": direction,
        "shape": {"rows": rows, "width": width, "dtype": "bf16"},
    }
    traffic = rows * width * (4 if direction == "forward" else 10)
    for provider, slower in NORM.items():
        milliseconds = (traffic / 3.9e9 + 0.004) * slower
        yield timed(common, provider, milliseconds, traffic * 1.8, traffic, traffic / 2**20)


def suite_rows():
    directions = ("forward", "forward+backward")
    rows = list(CEILINGS)
    for direction, head_dim, length in product(directions, (64, 128), (1024, 4096, 16384)):
        rows += attention_rows(direction, head_dim, length)
    for direction, sizes in product(directions, ((16384, 768), (16384, 4096), (16384, 8192), (4096, 65536))):
        rows += norm_rows(direction, *sizes)
    return rows
