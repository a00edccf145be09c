"""On what a figure was measured: device, clocks, versions, commit, threads, date."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def environment(device: torch.device | str, commit: str | None = None) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a measurement; no paths and no user names.

    Args:
        device: where the measurement runs.
        commit: the commit, for a checkout without its history; read from git otherwise.
    """
    device = torch.device(device)
    found, dirty = _commit()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        **(_cuda(device) if device.type == "cuda" else {}),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "fastattn": version_of("fastattn"),
        "commit": commit or found,
        "dirty": dirty,
    }


def row_environment(described: dict[str, Any]) -> dict[str, Any]:
    """The part of an environment that is written into every row."""
    keys = ("date", "device", "driver", "torch", "triton", "commit", "dirty", "threads")
    return {key: described[key] for key in keys if key in described}


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type


def version_of(distribution: str) -> str | None:
    """The installed version, the checkout's own for fastattn, or None."""
    if distribution == "fastattn":
        import fastattn

        return fastattn.__version__
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cuda(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    (driver,) = _nvidia_smi(device, "driver_version")
    return {
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": driver,
        "clocks_before": clocks(device),
    }


def clocks(device: torch.device | str) -> dict[str, int | None]:
    """MHz of the multiprocessors and of the memory now, None where they are not known; nothing on a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return {}
    answers = _nvidia_smi(device, "clocks.sm", "clocks.mem")
    found = [int(mhz) if mhz and mhz.isdigit() else None for mhz in answers]
    return dict(zip(("clock_mhz", "memory_clock_mhz"), found, strict=True))


def _nvidia_smi(device: torch.device, *fields: str) -> list[str | None]:
    """What the driver's tool says of this GPU, which it may count otherwise than PyTorch does."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    # The tool knows no part of a GPU by the part's own name: then the first GPU's answer has to do.
    answer = (_output([*query, f"--id=GPU-{uuid}"]) if uuid else None) or _output(query)
    if not answer:
        return [None] * len(fields)
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    return [*values, *[None] * (len(fields) - len(values))]


def _commit() -> tuple[str, bool | None]:
    """(hash, whether tracked files differ from it); ("unknown", None) outside a git checkout."""
    commit = _output(["git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return "unknown", None
    changes = _output(["git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no"])
    return commit, None if changes is None else bool(changes)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
