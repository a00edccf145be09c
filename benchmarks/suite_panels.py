"""What a suite's plots show: which rate, over which size, and which cases make one curve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Row

# Which size a curve runs over, in this order; the others name the curve's family.
_AXES = {
    "sequence": "sequence length",
    "seq_len": "sequence length",
    "seq": "sequence length",
    "seq_k": "keys",
    "seq_q": "queries",
    "width": "width",
    "vocabulary": "vocabulary",
    "rows": "rows",
    "batch": "batch",
}
# From so many FLOPs a byte on, arithmetic and not memory is what limits GPUs of this decade.
_COMPUTE_BOUND = 60.0


@dataclass(frozen=True)
class Unit:
    """What is drawn: a key of the rows, its name on the axis, and whether the axis is a log one."""

    key: str
    label: str
    log: bool = False


MEMORY = Unit("peak_mib", "peak memory, MiB (lower is better)", log=True)


@dataclass(frozen=True)
class Panel:
    """Rows that share all sizes but one, `axis`; `values` are (that size, row)."""

    operation: str
    direction: str
    family: str
    axis: str
    values: tuple[tuple[float, Row], ...]

    @property
    def rows(self) -> list[Row]:
        return [row for _, row in self.values]


def speed_unit(rows: Sequence[Row]) -> Unit:
    """Tokens a second where they were counted, TFLOP/s or GB/s by what limits the operation, else the time."""
    intensities = sorted(value for row in rows if (value := intensity(row)) is not None)
    attention = any(str(row.get("operation", "")).startswith("attention") for row in rows)
    decode = any(row.get("suite") == "decode" for row in rows)
    if any(row.get("tokens_per_s") for row in rows):
        return Unit("tokens_per_s", "tokens/s (higher is better)")
    if intensities and not decode:
        if attention or intensities[len(intensities) // 2] >= _COMPUTE_BOUND:
            return Unit("tflops", "TFLOP/s (higher is better)")
        return Unit("gbytes_per_s", "GB/s (higher is better)")
    for key, name in (("gbytes_per_s", "GB/s"), ("tflops", "TFLOP/s")):
        if any(row.get(key) for row in rows):
            return Unit(key, f"{name} (higher is better)")
    return Unit("median_ms", "ms a call (lower is better)", log=True)


def intensity(row: Row) -> float | None:
    """FLOPs a byte, of the operation's least work and traffic."""
    tflops, gbytes = row.get("tflops"), row.get("gbytes_per_s")
    return 1e3 * tflops / gbytes if tflops and gbytes else None


def panels(rows: Iterable[Row]) -> tuple[list[Panel], list[Row]]:
    """Curves over a size with two points or more, and the rows that are on none.

    The batch is no part of a family where it follows from the sequence length, as in cases of equal token counts.
    """
    groups: dict[tuple[Any, ...], list[tuple[float, Row]]] = {}
    rest = []
    for row in rows:
        sizes = _sizes(row)
        axis = next((key for key in _AXES if isinstance(sizes.get(key), (int, float))), None)
        if axis is None:
            rest.append(row)
            continue
        family = _family({key: value for key, value in sizes.items() if key not in (axis, "batch")})
        key = (row["operation"], row["direction"], family, _AXES[axis])
        groups.setdefault(key, []).append((sizes[axis], row))
    found = []
    for key, values in groups.items():
        for name, part in _split_by_batch(key[2], values):
            if len({size for size, _ in part}) > 1:
                found.append(Panel(key[0], key[1], name, key[3], tuple(sorted(part, key=lambda v: v[0]))))
            else:
                rest += [row for _, row in part]
    return found, rest


def _sizes(row: Row) -> dict[str, Any]:
    shape = row.get("shape")
    if not isinstance(shape, dict):
        return {}
    if "seq_q" in shape and shape["seq_q"] == shape.get("seq_k"):
        equal = {"sequence": shape["seq_q"]}
        return equal | {key: value for key, value in shape.items() if key not in ("seq_q", "seq_k")}
    return dict(shape)


def _split_by_batch(
    family: str, values: list[tuple[float, Row]]
) -> list[tuple[str, list[tuple[float, Row]]]]:
    """One group a batch where a size occurs with two batches, which would draw a curve twice over it."""
    points = [(size, row["provider"]) for size, row in values]
    if len(set(points)) == len(points):
        return [(family, values)]
    batches: dict[Any, list[tuple[float, Row]]] = {}
    for size, row in values:
        batches.setdefault(row["shape"].get("batch"), []).append((size, row))
    return [(f"batch {batch}, {family}", part) for batch, part in batches.items()]


def _family(sizes: dict[str, Any]) -> str:
    """Sizes in words, as in "16 heads, head dim 64, causal top_left, bf16"."""
    words = []
    for key, value in sizes.items():
        if key == "kv_heads" and value == sizes.get("heads"):
            continue
        if value is None or value is False:
            words += ["not causal"] if key == "causal" else []
        elif key == "dtype":
            words.append(str(value))
        elif key in ("heads", "kv_heads", "layers", "rows"):
            words.append(f"{value} {key.replace('kv_', 'key ')}")
        elif value is True:
            words.append(key.replace("_", " "))
        else:
            words.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(words)


def short_size(size: float) -> str:
    """16384 as 16k, 1000 as 1000."""
    return f"{size / 1024:g}k" if size >= 1024 and size % 1024 == 0 else f"{size:g}"
