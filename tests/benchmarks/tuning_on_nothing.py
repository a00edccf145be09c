"""A device on which a config takes as long as a function says, and runs of `tune` on it."""

import argparse
import importlib.util
import random
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.cases import AddLayerNormCase, GeluCase, LayerNormCase
from benchmarks.inspection import InspectionRow
from benchmarks.tuning import command
from benchmarks.tuning.options import add_arguments
from benchmarks.tuning.plan import plan
from benchmarks.tuning.search import Search
from fastattn.kernels._target import KNOWN_TARGETS

H200 = KNOWN_TARGETS["sm_90"]
BF16 = torch.bfloat16
DESCRIBED = {
    "device": "NVIDIA H200", "multiprocessors": 132, "driver": "1", "torch": "2.13.0", "triton": "3.7.1",
    "commit": "0123456789ab", "dirty": False, "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip
GELU = plan([GeluCase(64, 64)], H200, ["gelu"])[0]
BACKWARD = plan([LayerNormCase(8192, 1024)], H200, ["norm_backward"])[0]


def row_of(**counts):
    return InspectionRow("case", "sm_90", "kernel", "1024", 4, 3, shared_limit=1000, **counts)


def compile_well(jobs):
    return [[row_of()] for _ in jobs]


@dataclass
class FakeBench:
    """A device on which a config takes as long as a function says, with noise that all share and noise of its own."""

    cost: object
    noise: float = 0.01
    wrong: tuple = ()
    fails: tuple = ()

    def __post_init__(self):
        self.checked, self.timed, self.random = [], [], random.Random(1)

    def check(self, config):
        self.checked.append(config)
        assert config not in self.wrong, "output differs\nby 3.0"

    def samples(self, configs, kernels, rounds, dropped):
        drifts = [1 + 0.2 * self.random.random() for _ in range(rounds)]
        found = []
        for place, config in enumerate(configs):
            self.timed.append(config)
            if config in self.fails:
                dropped(place, "OutOfResources: shared memory")
                found.append([])
                continue
            noise = [1 + self.noise * (self.random.random() - 0.5) for _ in drifts]
            found.append([self.cost(config) * a * b for a, b in zip(drifts, noise, strict=True)])
        return found

    def most_at_a_time(self, config):
        return 4


def search(bench, task=GELU, compile=compile_well):
    return Search(H200, compile, 30).task(task, bench)


def winner(task=GELU, **fields):
    bench = FakeBench(lambda config: 1.0 if config == task.config else 0.8 + 0.01 * (config.num_warps != 8))
    return replace(search(bench, task), **fields)


def composite():
    """Of the longest config that there is."""
    task = plan([AddLayerNormCase(8192, 1024, BF16)], H200, ["norm_backward"])[0]
    bench = FakeBench(lambda config: 0.8 if config.programs == 1056 else 1.0)
    return search(bench, task)


def loaded(path):
    described = importlib.util.spec_from_file_location("written_measured", path)
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*arguments, "--jobs", "1"])


def run(out, tasks, chosen, described=DESCRIBED, **costs):
    """A run on a device that is not there; the tasks that it searched."""
    searched = []

    def make_bench(task):
        searched.append(task.label)
        return FakeBench(costs.get("cost", lambda config: 1.0 if config == task.config else 0.8))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "Compiler", lambda processes: nullcontext(compile_well))
        progress = lambda total: nullcontext(lambda text, units: None)  # noqa: E731
        found = command.search_all(tasks, H200, described, out, chosen, progress, make_bench)
    return searched, *found
