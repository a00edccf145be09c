"""Candidates, the decision between them, the table that is written, and the command `tune`."""

import argparse
import ast
import gc
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks import __main__ as commands
from benchmarks.cases import AddLayerNormCase, AttentionCase, GeluCase, LayerNormCase
from benchmarks.inspection import InspectionRow
from benchmarks.progress import progress_bar
from benchmarks.report import make_console
from benchmarks.timing import CpuTimer
from benchmarks.tuning import command, report, spaces, table
from benchmarks.tuning.bench import CaseBench, running_launches
from benchmarks.tuning.options import TuneError, add_arguments
from benchmarks.tuning.plan import plan, tuning_cases
from benchmarks.tuning.resume import read_results, result_of
from benchmarks.tuning.search import Search
from fastattn.kernels import _config
from fastattn.kernels._attention_config import AttentionTiles, select_attention_config
from fastattn.kernels._config import forced_config, measured_configs
from fastattn.kernels._linear_config import LinearConfig, select_linear_config
from fastattn.kernels._measured import MEASURED, RUNS
from fastattn.kernels._norm_config import select_norm_backward_config, select_norm_forward_config
from fastattn.kernels._pointwise_config import GeluConfig, select_gelu_config
from fastattn.kernels._rotary_config import RotaryConfig, select_rotary_config
from fastattn.kernels._target import KNOWN_TARGETS, target_of

ROOT = Path(__file__).resolve().parents[2]
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


def test_candidates_are_the_nearest_of_the_same_config():
    config = select_norm_forward_config(4096, 16, BF16, False, H200)
    tried = spaces.candidates(config, "tile", H200, 4096)
    assert config not in tried and len(set(tried)) == len(tried)
    assert {replace(config, block_m=2), replace(config, num_warps=8), replace(config, num_stages=3)} <= set(
        tried
    )
    assert all(new.block_n in (2048, 4096) for new in tried)  # wider than a row is of no use
    assert {new.num_warps for new in tried} == {4, 8, 16}
    changed = [
        sum(a != b for a, b in zip(asdict(new).values(), asdict(config).values(), strict=True))
        for new in tried
    ]
    assert changed[0] == 1 and changed[-1] > 2
    hip = spaces.candidates(GeluConfig(1024, 2), "tile", KNOWN_TARGETS["gfx942"])
    assert {new.num_warps for new in hip} == {2, 4, 8}


def test_parts_of_configs_of_several_kernels():
    backward = select_norm_backward_config(1024, 16, [BF16] * 2, False, H200)
    assert spaces.parts(backward) == ["walk", "row_means", "sums", "programs"]
    assert [new.programs for new in spaces.candidates(backward, "programs", H200)] == [132, 528]
    walks = spaces.candidates(backward, "walk", H200, 1024)
    assert all(replace(new, walk=backward.walk) == backward for new in walks) and len(walks) > 8
    assert spaces.parts(select_linear_config(BF16, H200)) == ["tile", "group_m"]
    assert spaces.parts(select_gelu_config(H200)) == ["tile"]
    attention = select_attention_config(128, BF16, H200)
    assert {"forward", "dq", "dk_dv", "separate_dk_dv", "delta", "dbias"} <= set(spaces.parts(attention))
    (turned,) = spaces.candidates(attention, "separate_dk_dv", H200)
    assert turned == replace(attention, separate_dk_dv=not attention.separate_dk_dv)


def test_fields_that_are_new_are_tuned_by_their_type():
    @dataclass(frozen=True)
    class NewTiles(AttentionTiles):
        descriptors: bool = False
        word: str = "kept"

    @dataclass(frozen=True)
    class NewConfig:
        forward: NewTiles
        persistent: bool = True
        limit: int | None = None

    config = NewConfig(NewTiles(64, 64, 4, 2))
    assert spaces.parts(config) == ["forward", "persistent"]
    tried = spaces.candidates(config, "forward", H200)
    assert replace(config, forward=replace(config.forward, descriptors=True)) in tried
    assert {new.forward.word for new in tried} == {"kept"}
    assert "descriptors=False" in spaces.label(config, "forward")


def test_candidates_keep_what_kernels_need():
    for pairs, target in ((64, H200), (1, H200), (64, KNOWN_TARGETS["gfx942"])):
        config = select_rotary_config(pairs, 0, target)
        threads = 64 if target.backend == "hip" else 32
        for new in spaces.candidates(config, "tile", target):
            assert isinstance(new, RotaryConfig) and new.block_d == config.block_d and new.block_rest == 0
            assert new.block_m * new.block_d >= threads * new.num_warps
    # A thread a pair already.
    tried = spaces.candidates(RotaryConfig(2, 64, 0, 4), "tile", H200)
    assert tried and all(new.block_m * 64 >= 32 * new.num_warps for new in tried)
    for config in (LinearConfig(32, 32, 16, 8, 4, 2, 2), select_linear_config(BF16, H200)):
        for new in spaces.candidates(config, "tile", H200):
            assert min(new.block_m, new.block_k, new.block_n // new.pieces) >= 16
    attention = select_attention_config(256, BF16, H200, "heavy")
    for part in ("forward", "dq", "dk_dv"):
        tiles = [getattr(new, part) for new in spaces.candidates(attention, part, H200)]
        assert min(min(t.block_m, t.block_n) for t in tiles) == 16
    assert all(new.delta.block_n == 0 for new in spaces.candidates(attention, "delta", H200))


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "gfx942"))
def test_every_function_has_tasks_and_candidates(arch):
    target = KNOWN_TARGETS[arch]
    cases = [case for case in tuning_cases() if not isinstance(case, AttentionCase) or case.seq_q == 4096]
    tasks = plan(cases, target)
    assert {task.select for task in tasks} == set(_config._overrides)
    for task in tasks:
        assert 1 <= len(task.cases) <= 2 and task.key[0] == arch
        with forced_config(task.select, task.config):
            pass
        parts = spaces.parts(task.config)
        assert parts and all(spaces.candidates(task.config, part, target, task.columns) for part in parts), (
            task.label
        )


def test_a_plan_is_of_the_gpu_at_hand():
    """Its multiprocessors, which programs follow, need not be those of the architecture's best-known GPU."""
    small = replace(H200, multiprocessors=78)
    (task,) = plan([LayerNormCase(64, 1024, dtype=BF16)], small, ["norm_backward"])
    assert task.config == select_norm_backward_config(1024, 16, [BF16] * 2, False, small)
    assert KNOWN_TARGETS["sm_90"] is H200


def test_the_faster_candidate_is_chosen():
    best = GeluConfig(2048, 8)
    bench = FakeBench(lambda config: 0.9 if config == best else 1.0)
    result = search(bench)
    assert result.config == asdict(best) and result.duel.won and result.key == ("sm_90",)
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


def winner(task=GELU, **fields):
    bench = FakeBench(lambda config: 1.0 if config == task.config else 0.8 + 0.01 * (config.num_warps != 8))
    return replace(search(bench, task), **fields)


def composite():
    """Of the longest config that there is."""
    task = plan([AddLayerNormCase(8192, 1024, BF16)], H200, ["norm_backward"])[0]
    bench = FakeBench(lambda config: 0.8 if config.programs == 528 else 1.0)
    return search(bench, task)


def loaded(path):
    described = importlib.util.spec_from_file_location("written_measured", path)
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def test_what_is_written_is_python_that_ruff_accepts_and_configs_come_from(tmp_path):
    attention = plan([AttentionCase(1, 2, 128, 128, dtype=BF16)], H200, ["attention"])[0]
    entered = replace(winner(), select=attention.select, key=attention.key, config=asdict(attention.config))
    results = [winner(), composite(), entered, replace(winner(), key=("sm_80",))]
    text = table.render(*table.merged({}, {}, results, DESCRIBED | {"device": 'NVIDIA "H200" \\'}))
    path = tmp_path / "_measured.py"
    table.write(text, path)
    assert [path.name for path in tmp_path.iterdir()] == ["_measured.py"]
    written = loaded(path)
    assert list(written.MEASURED) == sorted(written.MEASURED)
    with measured_configs(written.MEASURED, written.RUNS):
        assert asdict(select_gelu_config(H200)) == results[0].config
        assert select_gelu_config(KNOWN_TARGETS["sm_86"]) == GeluConfig(1024, 4)
        backward = select_norm_backward_config(1024, 16, [BF16] * 3, False, H200)
        assert asdict(backward) == results[1].config and backward.programs == 528
        assert select_attention_config(128, BF16, H200) == attention.config
    entry = written.MEASURED["select_gelu_config"]["sm_90",]
    assert entry.ms < entry.replaced_ms and entry.cases == ("gelu fp32-erf-64x64",)
    run = written.RUNS[entry.run]
    assert (run.torch, run.triton, run.date) == ("2.13.0", "3.7.1", "2026-01-02")
    assert (run.commit, run.multiprocessors) == ("0123456789ab", 132)
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(path)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_shipped_file_is_what_would_be_written_of_it():
    assert table.PATH.read_text() == table.render(MEASURED, RUNS)
    names = [
        node.module for node in ast.parse(table.PATH.read_text()).body if isinstance(node, ast.ImportFrom)
    ]
    assert names == ["__future__", "typing", "fastattn.kernels._measurement"]


def test_entries_of_other_keys_stay_and_runs_that_nothing_names_go():
    first, first_runs = table.merged({}, {}, [winner(), composite()], DESCRIBED)
    again = DESCRIBED | {"commit": "fedcba987654", "dirty": True}
    second, runs = table.merged(first, first_runs, [winner()], again)
    assert list(runs) == [
        "NVIDIA H200, 2026-01-02, 0123456789ab",
        "NVIDIA H200, 2026-01-02, fedcba987654 with changes",
    ]
    assert second["select_norm_backward_config"] == first["select_norm_backward_config"]
    third, runs = table.merged(second, runs, [composite()], again)
    assert len(runs) == 1 and len(third) == 2
    kept = table.merged(first, first_runs, [replace(winner(), config=None)], again)
    assert kept == (first, first_runs)
    changes = table.diff(table.render(first, first_runs), table.render(second, runs))
    assert changes.startswith("--- a/kernels/_measured.py\n+++ b/kernels/_measured.py\n@@ ")
    assert table.diff(table.render(first, first_runs), table.render(*kept)) == ""


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


def test_a_run_is_resumed_where_it_was_cut_off(tmp_path):
    tasks = [GELU, BACKWARD]
    searched, first, late = run(tmp_path, tasks[:1], options("--out", str(tmp_path)))
    assert searched == ["gelu"] and late == []
    searched, results, _ = run(tmp_path, tasks, options("--out", str(tmp_path), "--resume"))
    assert searched == [BACKWARD.label]
    assert results[0] == first[0] and results[0].config is not None
    searched, again, _ = run(tmp_path, tasks, options("--out", str(tmp_path), "--resume"))
    assert searched == [] and again == results
    with (tmp_path / "tuning.jsonl").open("a") as file:
        file.write('{"select": "cut off')
    assert run(tmp_path, tasks, options("--out", str(tmp_path), "--resume"))[0] == []
    with pytest.raises(TuneError, match=r"was measured with commit 0123456789ab, and this is other"):
        run(tmp_path, tasks, options("--resume"), DESCRIBED | {"commit": "other"})
    with pytest.raises(TuneError, match="measured with rounds 40, and this is 9"):
        run(tmp_path, tasks, options("--resume", "--rounds", "9"))


def test_time_that_is_over_leaves_the_rest(tmp_path):
    searched, results, late = run(tmp_path, [GELU, BACKWARD], options("--minutes", "1e-9"))
    assert (searched, results, late) == ([], [], [GELU.label, BACKWARD.label])


def test_an_error_is_one_keys_result(tmp_path):
    def cost(config):
        if isinstance(config, GeluConfig):
            raise torch.OutOfMemoryError("no memory")
        return 1.0

    _, results, _ = run(tmp_path, [GELU, BACKWARD], options(), cost=cost)
    assert results[0].config is None and len(results) == 2 and results[1].parts
    assert any("no memory" in line for line in report.dropped_lines(results))


def test_the_report_has_the_table_the_samples_and_the_diff(tmp_path, capsys, monkeypatch):
    path = tmp_path / "_measured.py"
    path.write_text(table.render({}, {}))
    monkeypatch.setattr(table, "PATH", path)
    monkeypatch.setattr(table.write, "__defaults__", (path,))
    result = winner()
    arguments = ([result], ["rotary 64 0"], DESCRIBED, tmp_path, make_console())
    report.report(*arguments, False)
    printed = capsys.readouterr().out
    assert (
        "block=1024 num_warps=4" in printed
        and "entered" in printed
        and "+++ b/kernels/_measured.py" in printed
    )
    assert "not tuned, as time was over: rotary 64 0" in printed
    assert path.read_text() == table.render({}, {})
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert result_of(written["results"][0]) == result and written["environment"]["device"] == "NVIDIA H200"
    assert (tmp_path / "tuning.diff").read_text().startswith("--- a/kernels/_measured.py")
    report.report(*arguments, True)
    assert loaded(path).MEASURED["select_gelu_config"]["sm_90",].config == result.config
    assert read_results(tmp_path / "none.jsonl", {}) == []


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


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ("", "PyTorch finds no GPU here, and timing needs one; --dry-run --arch sm_90 compiles without"),
        ("--dry-run --arch sm_91", "--arch 'sm_91' is unknown; there are sm_75, "),
        (
            "--dry-run --kernels softmax",
            "kernel 'softmax' is unknown; there are norm_forward, norm_backward, gelu",
        ),
        ("--dry-run --write", "--dry-run times nothing: there is nothing to write"),
        ("--arch sm_80", "--arch sm_80 is for --dry-run"),
        ("--rounds 1", "--rounds 1 must be at least 5"),
        ("--minutes 0", "--minutes 0 must be above 0"),
        ("--resume", "--resume needs --out DIR"),
        ("--jobs 0", "--jobs 0 must be at least 1"),
    ),
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_cannot_be_tuned_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "tuning_cases", lambda: [LayerNormCase(64, 64), GeluCase(64, 64)])
    assert commands.main(["tune", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"python -m benchmarks: {message}") and err.count("\n") == 1


def test_the_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("fastattn.dispatch.INTERPRETING", True)
    assert commands.main(["tune", "--dry-run"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_another_runs_folder_is_not_written_to(tmp_path):
    (tmp_path / "tuning.jsonl").write_text("{}\n")
    with pytest.raises(TuneError, match="holds a run: give --resume"):
        command._folder(options("--out", str(tmp_path)))
    assert command._folder(options("--out", str(tmp_path), "--resume")) == tmp_path


def test_a_dry_run_compiles_every_candidate(tmp_path):
    """Really, for a GPU that is not there, in another process, as the interpreter takes the compiler's place here."""
    script = (
        "from benchmarks.__main__ import main\n"
        "from benchmarks.cases import GeluCase\n"
        "from benchmarks.tuning import command, compiling\n"
        "command.tuning_cases = lambda: [GeluCase(8192, 4096, 'tanh')]\n"
        "compiling.MOST_CANDIDATES = 3\n"
        f"raise SystemExit(main('tune --dry-run --arch sm_80 --jobs 1 --out {tmp_path}'.split()))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "candidates as compiled for sm_80" in done.stdout and "block=2048 num_warps=4" in done.stdout
    found = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    assert found[0]["config"] == {"block": 1024, "num_warps": 4} and len(found) == 4
    for candidate in found:
        assert [row["kernel"] for row in candidate["rows"]] == ["gelu_forward", "gelu_backward"]
        for row in candidate["rows"]:
            assert 8 < row["registers"] < 256 and row["error"] == "" and row["spill_loads"] == 0


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
