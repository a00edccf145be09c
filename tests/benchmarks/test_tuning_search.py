"""The decision between the config of now and its candidates."""

from dataclasses import asdict

import pytest

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks.cases import LayerNormCase
from benchmarks.tuning import report
from benchmarks.tuning.plan import plan
from benchmarks.tuning.search import Search
from fastattn.kernels._pointwise_config import GeluConfig
from tests.benchmarks.tuning_on_nothing import BACKWARD, GELU, H200, FakeBench, compile_well, row_of, search


def test_the_faster_candidate_is_chosen():
    best = GeluConfig(2048, 8)
    bench = FakeBench(lambda config: 0.9 if config == best else 1.0)
    result = search(bench)
    assert result.config == asdict(best) and result.duel.won and result.key == ("sm_90", 32, 1)
    assert result.duel.ratio.high < 0.95 and result.duel.ms < result.duel.current_ms
    (part,) = result.parts
    assert all(len(c.samples) == len(c.current_samples) == 8 for c in part.candidates)
    assert (part.current, part.chosen) == ("block=1024 num_warps=4", "block=2048 num_warps=8")
    assert len(part.duel.samples) >= 3 and all(len(times) == 30 for times in part.duel.samples)
    assert bench.checked.count(best) == 2  # as a candidate, and all parts together


@pytest.mark.parametrize(
    ("gain", "noise"), ((0.0, 0.05), (0.008, 0.0001), (0.02, 0.6)), ids=("equal", "less than 1 %", "noisy")
)
def test_a_candidate_within_the_noise_is_not_chosen(gain, noise):
    """The fastest of many is below the config of now by chance."""
    best = GeluConfig(2048, 8)
    for seed in range(5):
        bench = FakeBench(lambda config: 1.0 - gain * (config == best), noise)
        bench.random.seed(seed)
        result = search(bench)
        assert result.config is None and result.why == "no candidate was faster beyond the noise"
        assert result.parts[0].chosen == result.parts[0].current


def test_what_spills_is_not_run():
    best = GeluConfig(2048, 8)
    bench = FakeBench(lambda config: 0.5 if config == best else 1.0)

    def compile(jobs):
        return [[row_of(), row_of(spill_loads=3 * (job.candidate == best))] for job in jobs]

    result = search(bench, compile=compile)
    assert result.config is None and best not in bench.checked and best not in bench.timed
    (dropped,) = [c for c in result.parts[0].candidates if c.dropped]
    assert (
        dropped.label == "block=2048 num_warps=8"
        and dropped.dropped == "kernel: spills, 3 loads and 0 stores"
    )


def test_what_is_too_large_or_does_not_compile_is_not_run():
    bench = FakeBench(lambda config: 1.0)
    rows = [row_of(shared=2000), row_of(error="CompilationError: no")]
    result = search(bench, compile=lambda jobs: [[rows[index % 2]] for index, _ in enumerate(jobs)])
    assert bench.timed == [] and result.config is None
    reasons = {candidate.dropped for candidate in result.parts[0].candidates}
    assert reasons == {"kernel: shared memory 2000 is above 1000 bytes", "kernel: CompilationError: no"}


def test_what_is_wrong_is_not_timed_and_is_reported():
    best = GeluConfig(2048, 8)
    bench = FakeBench(lambda config: 0.5 if config == best else 1.0, wrong=(best,))
    result = search(bench)
    assert best in bench.checked and best not in bench.timed and result.config is None
    line = "dropped: gelu tile block=2048 num_warps=8: wrong: output differs"
    assert line in report.dropped_lines([result])


def test_what_fails_while_it_is_timed_is_dropped():
    best = GeluConfig(2048, 8)
    result = search(FakeBench(lambda config: 1.0, fails=(best,)))
    (dropped,) = [c for c in result.parts[0].candidates if c.dropped]
    assert dropped.dropped == "OutOfResources: shared memory"
    result = search(FakeBench(lambda config: 1.0, fails=(GELU.config,)))
    assert result.config is None and len(result.parts[0].candidates) > 5


def test_parts_are_tuned_one_after_another_and_then_all_together():
    def cost(config):
        return 1.0 - 0.1 * (config.walk.num_warps == 16) - 0.1 * (config.programs == 528)

    bench = FakeBench(cost)
    result = search(bench, BACKWARD)
    changed = [part.part for part in result.parts if part.chosen != part.current]
    assert changed == ["walk", "programs"]
    assert (result.config["walk"]["num_warps"], result.config["programs"]) == (16, 528)
    assert 0.75 < result.duel.ratio.value < 0.85


def test_parts_that_do_not_go_together_change_nothing():
    """Each is faster alone, beside what the others are at the time; a last comparison is of all of them."""

    def cost(config):
        one, other = config.walk.num_warps == 16, config.programs == 528
        return 1.0 if one and other and len(bench.checked) > last else 1.0 - 0.1 * one - 0.1 * other

    last = 1 << 30
    bench = FakeBench(cost)
    search(bench, BACKWARD)
    last = len(bench.checked) - 1  # the check before that comparison
    bench = FakeBench(cost)
    result = search(bench, BACKWARD)
    assert [part.part for part in result.parts if part.chosen != part.current] == ["walk", "programs"]
    assert result.config is None and result.why == "all together not faster beyond the noise"
    assert result.duel is not None and not result.duel.won


def test_candidates_that_launch_the_same_are_tried_once():
    """A norm's forward has no stages, and a tile that holds whole rows makes no means in a launch of its own."""
    result = search(FakeBench(lambda config: 1.0), plan([LayerNormCase(64, 1024)], H200, ["norm_forward"])[0])
    labels = [candidate.label for candidate in result.parts[0].candidates]
    assert labels and all("num_stages=1" in label for label in labels)
    parts = {part.part: part for part in search(FakeBench(lambda config: 1.0), BACKWARD).parts}
    assert not parts["row_means"].candidates and parts["sums"].candidates
    assert len(parts["walk"].candidates) <= 24


def test_time_that_is_over_ends_a_task_between_its_parts():
    """What was found until then is compared and kept; the first part is always tuned."""
    bench = FakeBench(lambda config: 0.8 if config.walk.num_warps == 16 else 1.0)
    late = Search(H200, compile_well, 30, end=0.0).task(BACKWARD, bench)
    assert [part.part for part in late.parts] == ["walk"] and late.config["walk"]["num_warps"] == 16
    assert late.unfinished == ("row_means", "sums", "programs")
    assert search(bench, BACKWARD).unfinished == ()


def test_no_more_candidates_than_asked_for():
    bench = FakeBench(lambda config: 1.0)
    found = Search(H200, compile_well, 30, most=3).task(BACKWARD, bench)
    assert [len(part.candidates) for part in found.parts] == [3, 0, 3, 2]
