"""Kernels that run with the candidates."""

import ast
import gc
import math
import weakref
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks.cases import AttentionE4M3Case, GeluCase
from benchmarks.progress import progress_bar
from benchmarks.timing import CpuTimer
from benchmarks.tuning import command, table
from benchmarks.tuning.bench import CaseBench, running_launches
from benchmarks.tuning.plan import plan
from benchmarks.tuning.resume import read_results
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_tables import AttentionTiles
from fastattn.kernels._pointwise_config import GeluConfig
from fastattn.kernels._target import target_of
from tests.benchmarks.tuning_on_nothing import BF16, DESCRIBED, options


@pytest.fixture
def gelu_on_a_cpu(monkeypatch):
    """Triton's provider under the interpreter, which has no time to speak of: programs are counted instead."""
    monkeypatch.setattr("benchmarks.providers.mlp.refuse_interpreter", lambda device: None)

    def timer(call):
        with running_launches() as launches:
            call()
        return float(sum(math.prod(launch.grid) for launch in launches))

    return CaseBench("select_gelu_config", [GeluCase(5, 600)], torch.device("cpu"), lambda device: timer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is a test below")
def test_kernels_run_with_the_candidates(gelu_on_a_cpu):
    """3,000 elements forward and backward: 3 programs of 1,024 each, 2 of 2,048."""
    dropped = []
    samples = gelu_on_a_cpu.samples(
        [GeluConfig(1024, 4), GeluConfig(2048, 4)], {"gelu_forward", "gelu_backward"}, 2, dropped.append
    )
    assert samples == [pytest.approx([6, 6]), pytest.approx([4, 4])] and dropped == []
    assert gelu_on_a_cpu.samples([GeluConfig(1024, 4)], {"gelu_backward"}, 1, dropped.append) == [
        pytest.approx([3])
    ]
    assert gelu_on_a_cpu.samples([GeluConfig(1024, 4)], {"rotary"}, 1, dropped.append) == [[]]
    reasons = []
    broken = gelu_on_a_cpu.samples(
        [GeluConfig(1024, 4), GeluConfig(1000, 4)], {"gelu_forward"}, 1, lambda *what: reasons.append(what)
    )
    assert broken[1] == [] and len(broken[0]) == 1
    ((place, why),) = reasons
    assert place == 1 and "power of 2" in why


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is a test below")
def test_a_forward_alone_is_checked_and_timed(monkeypatch):
    """Of attention on e4m3 operands: fewer keys a tile are other values in memory too, so both kernels change."""
    monkeypatch.setattr("benchmarks.providers.attention_e4m3.refuse_interpreter", lambda device: None)
    device = torch.device("cpu")
    case = AttentionE4M3Case(1, 1, 130, 32, causal="top_left")

    def timer(call):
        with running_launches() as launches:
            call()
        return float(sum(math.prod(launch.grid) for launch in launches))

    bench = CaseBench(select_attention_config.__name__, [case], device, lambda device: timer)
    config = select_attention_config(32, torch.float8_e4m3fn, target_of(device))
    other = replace(config, forward=AttentionTiles(64, 64, 1, 1))
    for tried in (config, other):
        bench.check(tried)
    samples = bench.samples([config, other], {"quantize_keys", "attention_forward"}, 1, print)
    assert samples == [pytest.approx([2 + 5]), pytest.approx([2 + 3])]
    with pytest.raises(ValueError, match="block_n=16 must be 32, 64 or 128 with e4m3"):
        bench.check(replace(config, forward=AttentionTiles(64, 16, 1, 1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is a test below")
def test_no_tensors_are_kept_from_one_comparison_to_the_next(gelu_on_a_cpu):
    """Timers keep the calls that they have timed, and these the tensors of their launches: a GPU was full soon."""
    calls = []

    def new_timer(device):
        timer = CpuTimer(sample_ms=0.0)

        def timed(call):
            calls.append(weakref.ref(call))
            return timer(call)

        return timed

    gelu_on_a_cpu.new_timer = new_timer
    (samples,) = gelu_on_a_cpu.samples([GeluConfig(1024, 4)], {"gelu_forward"}, 2, print)
    assert len(samples) == len(calls) == 2
    gc.collect()
    assert all(call() is None for call in calls)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is a test below")
def test_the_result_of_each_candidate_is_checked(gelu_on_a_cpu, monkeypatch):
    gelu_on_a_cpu.check(GeluConfig(2048, 4))
    from fastattn.kernels import gelu

    monkeypatch.setattr(gelu, "ceil_div", lambda a, b: a // b)  # the last block is left out
    with pytest.raises(AssertionError):
        gelu_on_a_cpu.check(GeluConfig(2048, 4))


@pytest.mark.gpu
def test_gelu_is_tuned_on_a_gpu(tmp_path, device):
    """All of it, on a small case: candidates compiled in processes, checked, timed alone, and the table rendered."""
    target = target_of(device)
    tasks = plan([GeluCase(2048, 4096, dtype=BF16)], target, ["gelu"])
    arguments = options("--rounds", "10")
    described = DESCRIBED | {"device": torch.cuda.get_device_name(device)}

    def make_bench(task):
        return CaseBench(task.select, task.cases, device)

    (result,), late = command.search_all(
        tasks, target, described, tmp_path, arguments, progress_bar, make_bench
    )
    assert late == [] and result.key == (target.name,)
    (part,) = result.parts
    timed = [candidate for candidate in part.candidates if candidate.ratio is not None]
    assert timed and all(0.05 < candidate.ratio.value < 20 for candidate in timed)
    assert all(candidate.dropped for candidate in part.candidates if candidate.ratio is None)
    entered = replace(result, config=result.config or asdict(tasks[0].config), duel=result.duel or part.duel)
    ast.parse(table.render(*table.merged({}, {}, [entered], described)))
    assert read_results(tmp_path / "tuning.jsonl", {}) == [result]
