"""Order, statistics and the CPU timer of benchmarks/timing.py, on a clock that the tests turn themselves."""

import statistics
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import GeluCase
from benchmarks.measure import measure_case
from benchmarks.timing import (
    CpuTimer,
    CudaTimer,
    host_cost,
    interleave,
    round_order,
    summarize,
    time_ratio,
    waits_for_device,
)


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float, log: list[str] | None = None, name: str = ""):
        def spend() -> None:
            self.now += seconds
            if log is not None:
                log.append(name)

        return spend


def test_summary_is_median_and_quartiles():
    summary = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (summary.median, summary.low, summary.high, summary.count) == (3.0, 2.0, 4.0, 5)
    assert summary.spread == pytest.approx(2 / 3)


def test_summary_ignores_one_wild_sample():
    assert summarize([1.0] * 9 + [1000.0]).median == 1.0


def test_summary_of_one_sample_and_of_none():
    assert summarize([7.0]).median == summarize([7.0]).high == 7.0
    with pytest.raises(ValueError, match="at least one value"):
        summarize([])


@pytest.mark.parametrize("names", ("ab", "abc", "abcd", "abcde"))
def test_every_provider_takes_every_place_and_follows_every_other(names):
    """Rotation alone keeps the same neighbours, so that whoever follows a slow one is always the same."""
    orders = [round_order(names, index) for index in range(2 * len(names))]
    assert all(sorted(order) == list(names) for order in orders)
    for place in range(len(names)):
        assert Counter(order[place] for order in orders) == dict.fromkeys(names, 2)
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert follows == {(a, b): 2 for a in names for b in names if a != b}


def test_interleaving_alternates_providers_and_warms_up_first():
    clock, log = Clock(), []
    calls = {name: clock.call(0.001, log, name) for name in "abc"}

    def timer(call):
        call()
        return 1.0

    samples = interleave(calls, timer, rounds=4, warmup=1)
    assert "".join(log) == "abc" + "acb" + "bac" + "cba" + "bca"
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_interleaving_a_drifting_machine_leaves_the_ratio_alone():
    """A machine that gets 10 % slower each round slows both alike."""
    state = {"slowness": 1.0}
    clock = Clock()

    def call(base):
        def spend():
            state["slowness"] *= 1.05
            clock.now += base * state["slowness"]

        return spend

    def timer(function):
        start = clock.now
        function()
        return clock.now - start

    samples = interleave({"one": call(1e-3), "two": call(2e-3)}, timer, rounds=20, warmup=0)
    assert time_ratio(samples["two"], samples["one"]).value == pytest.approx(2.0, rel=0.06)


def test_interleave_nothing():
    assert interleave({}, CpuTimer(), rounds=3) == {}


def test_cpu_timer_measures_milliseconds_a_call():
    clock = Clock()
    timer = CpuTimer(sample_ms=10, clock=clock)
    assert timer(clock.call(0.004)) == pytest.approx(4.0)


def test_cpu_timer_repeats_short_calls_within_a_sample():
    clock, log = Clock(), []
    timer = CpuTimer(sample_ms=10, clock=clock)
    call = clock.call(0.001, log, "x")
    assert timer(call) == pytest.approx(1.0)
    assert len(log) == 1 + 10  # one to choose, ten to fill 10 ms
    timer(call)
    assert len(log) == 21  # chosen once


def test_cpu_timer_does_not_confuse_calls():
    clock = Clock()
    timer = CpuTimer(sample_ms=10, clock=clock)
    assert timer(clock.call(0.001)) == pytest.approx(1.0)
    assert timer(clock.call(0.05)) == pytest.approx(50.0)


@pytest.fixture
def device_clock(monkeypatch):
    """A device whose head starts are recorded; it has caught up with the host where a call says so."""

    device = SimpleNamespace(sleeps=[], late=False)

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def query(self):
            return device.late

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleeps.append)
    return device


def test_a_call_that_waits_for_the_device_delays_no_other(device_clock):
    """One such call made the head start 64 times as long for all others, for the rest of the run."""
    timer = CudaTimer("cpu")

    def waits():
        device_clock.late = True

    def queues():
        device_clock.late = False

    least = timing._GPU_HEAD_START_CYCLES
    assert timer(waits) == 1.0
    assert device_clock.sleeps == [least * 2**n for n in range(7)] + [least]
    device_clock.sleeps.clear()
    assert timer(waits) == timer(queues) == 1.0
    assert device_clock.sleeps == [least, least]
    assert waits_for_device(timer, waits) and not waits_for_device(timer, queues)
    assert not waits_for_device(CpuTimer(), waits)


def test_a_head_start_that_is_enough_is_kept_for_its_call(device_clock):
    timer = CudaTimer("cpu")

    def slow():
        device_clock.late = device_clock.sleeps[-1] < 4 * timing._GPU_HEAD_START_CYCLES

    timer(slow)
    timer(slow)
    assert [cycles // timing._GPU_HEAD_START_CYCLES for cycles in device_clock.sleeps] == [1, 2, 4, 4]
    assert not timer.waits(slow)


def test_rows_say_which_call_waits_for_the_device(device_clock, no_interpreter):
    device_clock.late = True
    (row,) = measure_case(
        GeluCase(3, 17),
        torch.device("cpu"),
        1,
        directions=("forward",),
        names=("torch",),
        timer=CudaTimer("cpu"),
    )
    assert row["waits_for_device"] is True and row["median_ms"] == 1.0


def test_a_call_that_fails_is_dropped_and_the_others_go_on():
    clock, errors = Clock(), []
    left = iter(range(4))

    def failing():
        if next(left, None) is None:
            raise RuntimeError("boom")

    calls = {"a": clock.call(0.001), "b": failing}
    timer = lambda call: (call(), 1.0)[1]  # noqa: E731
    samples = interleave(
        calls, timer, rounds=5, dropped=lambda name, error: errors.append((name, str(error)))
    )
    assert samples == {"a": [1.0] * 5} and errors == [("b", "boom")]
    with pytest.raises(RuntimeError, match="boom"):
        interleave({"b": failing}, timer, rounds=1)


def test_host_cost_is_in_microseconds():
    clock = Clock()
    costs = host_cost({"slow": clock.call(3e-6), "fast": clock.call(1e-6)}, rounds=5, repeats=10, clock=clock)
    assert statistics.median(costs["slow"]) == pytest.approx(3.0)
    assert statistics.median(costs["fast"]) == pytest.approx(1.0)
    assert len(costs["slow"]) == 5


def test_ratio_of_equal_samples_is_one_with_no_interval():
    samples = [3.0, 1.0, 2.0, 5.0]
    ratio = time_ratio(samples, samples)
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)


def test_ratio_interval_holds_the_truth_and_shrinks_with_samples():
    noise = [1.0 + 0.1 * ((7 * i) % 11 - 5) / 5 for i in range(110)]
    other = [2.0 + 0.2 * ((5 * i) % 11 - 5) / 5 for i in range(110)]
    few, many = time_ratio(other[:11], noise[:11]), time_ratio(other, noise)
    for ratio in (few, many):
        assert ratio.low <= 2.0 <= ratio.high
        assert ratio.low <= ratio.value <= ratio.high
    assert many.high - many.low < few.high - few.low


def test_ratio_pairs_the_rounds_that_two_shared():
    """Rounds of very different speed, the same for both: only pairing sees that the ratio never moves."""
    rounds = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0]
    ratio = time_ratio([2 * r for r in rounds], rounds)
    assert ratio.low == ratio.high == pytest.approx(2.0)


def test_ratio_of_unequal_counts_draws_each_side_on_its_own():
    ratio = time_ratio([2.0, 4.0, 6.0], [1.0, 2.0])
    assert ratio.value == pytest.approx(4 / 1.5)
    assert ratio.low < ratio.value < ratio.high
