"""Order, statistics and the CPU timer of benchmarks/timing.py, on a clock that the tests turn themselves."""

import statistics
from collections import Counter
from itertools import pairwise

import pytest

from benchmarks.timing import (
    CpuTimer,
    host_cost,
    interleave,
    round_order,
    summarize,
    time_ratio,
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
