"""The main job end to end, tiny: real processes, real training, every file it promises."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from benchmarks import demo, demo_report
from benchmarks.demo import Demo, DemoResult, Outcome, Point
from benchmarks.demo_options import DemoOptions
from benchmarks.environment import REPOSITORY
from benchmarks.processes import WorkerFailed, WorkerRefused

STEPS, BATCH, LENGTH, LENGTHS = 3, 2, 32, (16, 48)
NAMES = ("naive", "torch", "torch-compile", "fastattn")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run with an implementation that cannot: torch.compile without a C++ compiler."""
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 100)
    command = [sys.executable, "-m", "benchmarks", "demo", "--data", text, "--out", folder / "out"]
    sizes = {"--layers": 1, "--width": 32, "--heads": 2, "--repeats": 2, "--steps": STEPS}
    sizes |= {"--batch-size": BATCH, "--seq-len": LENGTH, "--device": "cpu"}
    command += [str(word) for pair in sizes.items() for word in pair]
    command += ["--seq-lens", *map(str, LENGTHS), "--implementations", *NAMES]
    environment = {**os.environ, "CXX": "/nonexistent/c++", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", done


@pytest.fixture(scope="module")
def content(run):
    return json.loads((run[0] / "demo.json").read_text())


def test_last_line_is_the_folder(run):
    folder, done = run
    assert done.stdout.splitlines()[-1] == str(folder)


def test_every_file_is_there(run):
    found = {path.name for path in run[0].iterdir()}
    assert found == {
        "demo.json",
        "demo.jsonl",
        "lengths.csv",
        "logs",
        "loss.png",
        "speed-memory.png",
        "steps.csv",
        "summary.csv",
        "table.txt",
    }
    for name in ("loss.png", "speed-memory.png"):
        with Image.open(run[0] / name) as picture:
            assert picture.width > 800


def test_progress_and_notice_are_on_standard_error(run):
    errors = run[1].stderr
    assert "TRITON_INTERPRET is set; the demo runs without it" in errors
    assert "of 3: loss" in errors
    assert errors.splitlines()[-1] == "100 %  done"
    assert "Traceback" not in errors


def test_the_same_losses_for_every_implementation(content):
    losses = {
        name: [s["loss"] for s in content["steps"] if s["implementation"] == name]
        for name in ("naive", "torch", "fastattn")
    }
    assert all(len(values) == STEPS for values in losses.values())
    for name in ("torch", "fastattn"):
        assert losses[name] == pytest.approx(losses["naive"], abs=1e-5)
    assert losses["naive"][-1] < losses["naive"][0]


def test_summary_holds_what_was_measured(content):
    rows = {row["implementation"]: row for row in content["summary"]}
    assert list(rows) == list(NAMES)
    for name in ("naive", "torch", "fastattn"):
        row = rows[name]
        assert row["status"] == "ok"
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["timed_steps"] == STEPS
        assert row["tokens_per_s"] == pytest.approx(BATCH * LENGTH / row["median_ms"] * 1e3)
        assert row["peak_mib"] > row["held_mib"] > 0
        assert row["largest_loss_difference"] < 1e-5
        assert row["first_step_s"] > 0
    assert rows["torch"]["time_vs_torch"] == rows["naive"]["time_vs_naive"] == 1.0
    assert rows["fastattn"]["held_mib"] == rows["naive"]["held_mib"]


def test_without_a_compiler_the_row_says_so(run, content):
    row = next(row for row in content["summary"] if row["implementation"] == "torch-compile")
    assert row["status"] == "failed"
    assert "compiler" in row["reason"].lower()
    assert f"torch-compile did not run: {row['reason']}" in run[1].stdout


def test_memory_and_time_at_every_length(content):
    points = [(p["implementation"], p["seq_len"]) for p in content["lengths"]]
    assert points == [(name, length) for length in LENGTHS for name in ("naive", "torch", "fastattn")]
    for point in content["lengths"]:  # twice as many at half the training's length
        assert point["timed_steps"] == {16: 4, 48: 2}[point["seq_len"]]
    peaks = {(p["implementation"], p["seq_len"]): p["peak_mib"] for p in content["lengths"]}
    assert peaks["naive", 48] > peaks["naive", 16]
    assert peaks["naive", 48] > peaks["fastattn", 48]


def test_csv_agrees_with_json(run, content):
    with (run[0] / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["implementation"] for row in rows] == list(NAMES)
    assert float(rows[0]["median_ms"]) == content["summary"][0]["median_ms"]
    assert rows[0]["torch"] == content["environment"]["torch"]
    with (run[0] / "steps.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(content["steps"]) == 3 * STEPS


def test_no_path_is_recorded(run, content):
    assert content["options"]["data"] == ["text.txt"]
    assert str(Path(run[0]).parent) not in (run[0] / "demo.json").read_text()


def test_each_row_was_on_disk_as_it_came(run):
    lines = [json.loads(line) for line in (run[0] / "demo.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 3 * STEPS
    assert sum("seq_len" in line for line in lines) == 3 * len(LENGTHS)


class FakeWorker:
    """Answers at once, and fails as told: {what is asked for: exception}."""

    asked: ClassVar[list[tuple[str, str, int]]] = []
    log: ClassVar[list[tuple[str, str]]] = []
    failures: ClassVar[dict[tuple[str, str, int], Exception]] = {}

    def __init__(self, module, setup, log, environment):
        self.name, self.steps = setup["name"], 0

    def begin(self, command):
        self.begun = command
        self.log.append((self.name, "begin"))

    def wait(self, last):
        if last == "ready":
            return {"event": last, "parameters": 5}
        self.log.append((self.name, "wait"))
        return self.ask(self.begun)

    def ask(self, command, on_event=None):
        key = (self.name, command["do"], command.get("seq_len", 0))
        self.asked.append(key)
        if key in self.failures:
            raise self.failures[key]
        for _ in range(command["steps"] if command["do"] == "train" else 0):
            on_event({"event": "step", "step": self.steps, "loss": 1.0, "ms": 1.0, "timed": True})
            self.steps += 1
        return {"seconds": 1.0, "peak": 2 << 20, "held": 1 << 20, "ms": [1.0]}

    def stop(self):
        pass


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "WorkerProcess", FakeWorker)
    monkeypatch.setattr(FakeWorker, "asked", [])
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(FakeWorker, "failures", {})

    def run_fake(**options) -> DemoResult:
        tokens = demo.torch.zeros(4, dtype=demo.torch.uint8)
        chosen = DemoOptions(**{"implementations": ("naive", "torch", "fastattn"), **options})
        return Demo(chosen, tokens, tmp_path, lambda text, units: None).run()

    return run_fake


def test_training_goes_in_turns_whose_order_changes(fake):
    result = fake(steps=7, steps_per_turn=2, seq_lens=())
    turns = [name for name, do, _ in FakeWorker.asked if do == "train"]
    assert turns[:3] == ["naive", "fastattn", "torch"]
    assert turns[3:6] == ["torch", "naive", "fastattn"]
    assert turns[6:9] == ["fastattn", "torch", "naive"]
    assert len(turns) == 3 * 4
    assert all(len(outcome.steps) == 7 for outcome in result.outcomes.values())


def test_compilations_run_side_by_side_after_the_others(fake):
    names = ("torch-compile", "naive", "fastattn-compile")
    result = fake(steps=1, seq_lens=(), implementations=names)
    assert [name for name, do, _ in FakeWorker.asked if do == "first"] == [
        "naive",
        "torch-compile",
        "fastattn-compile",
    ]
    begun = [entry for entry in FakeWorker.log if entry[1] in ("begin", "wait")]
    assert begun[-4:] == [
        ("torch-compile", "begin"),
        ("fastattn-compile", "begin"),
        ("torch-compile", "wait"),
        ("fastattn-compile", "wait"),
    ]
    assert all(outcome.first_step_s == 1.0 for outcome in result.outcomes.values())


def test_death_in_training_costs_one_row(fake):
    FakeWorker.failures = {("torch", "train", 0): WorkerFailed("killed by SIGKILL")}
    result = fake(steps=2, seq_lens=(8,))
    assert result.outcomes["torch"].reason == "killed by SIGKILL"
    assert [p.name for p in result.points] == ["naive", "fastattn"]
    assert all(len(result.outcomes[name].steps) == 2 for name in ("naive", "fastattn"))


def test_everything_dead_is_still_a_result(fake):
    FakeWorker.failures = {(n, "first", 0): WorkerFailed("no") for n in ("naive", "torch", "fastattn")}
    result = fake(steps=2, seq_lens=(8,))
    assert all(outcome.reason == "no" for outcome in result.outcomes.values())
    assert result.points == []


def test_out_of_memory_at_a_length_is_a_point_and_longer_ones_are_not_tried(fake):
    FakeWorker.failures = {("naive", "steps", 16): WorkerRefused("out of memory")}
    result = fake(steps=1, seq_lens=(8, 16, 32))
    reasons = {(p.name, p.seq_len): p.reason for p in result.points}
    assert [reasons["naive", s] for s in (8, 16, 32)] == [None, "out of memory", "out of memory"]
    assert all(reasons["torch", s] is None for s in (8, 16, 32))
    assert ("naive", "steps", 32) not in FakeWorker.asked
    summary, points = demo_report.summary_rows(result, DemoOptions()), demo_report.point_rows(result)
    assert summary[0]["status"] == "ok"
    assert demo_report.reasons(summary, points) == ["naive did not run at 16, 32 tokens: out of memory"]


def outcome(name, times, losses, timed=None):
    timed = timed or [True] * len(times)
    steps = [
        {"step": i, "loss": loss, "ms": ms, "timed": counts}
        for i, (ms, loss, counts) in enumerate(zip(times, losses, timed, strict=True))
    ]
    return Outcome(name, steps=steps, first_step_s=1.0, peak_bytes=1, held_bytes=1)


def test_summary_leaves_out_steps_that_are_not_timed():
    result = DemoResult({"torch": outcome("torch", [99.0, 2.0, 4.0], [1.0] * 3, [False, True, True])}, [], 9)
    (row,) = demo_report.summary_rows(result, DemoOptions(seq_len=300, batch_size=2))
    assert (row["median_ms"], row["timed_steps"]) == (3.0, 2)
    assert row["tokens_per_s"] == pytest.approx(600 / 3e-3)
    assert row["largest_loss_difference"] is None


def test_summary_compares_with_naive_and_torch():
    outcomes = {
        "naive": outcome("naive", [4.0, 4.0], [3.0, 2.0]),
        "torch": outcome("torch", [2.0, 2.0], [3.0, 2.5]),
    }
    naive, torch_row = demo_report.summary_rows(DemoResult(outcomes, [], 9), DemoOptions())
    assert (naive["time_vs_torch"], torch_row["time_vs_naive"]) == (2.0, 0.5)
    assert torch_row["largest_loss_difference"] == 0.5
    assert torch_row["final_loss"] == 2.5


def test_points_without_times_are_failed_rows():
    result = DemoResult({}, [Point("naive", 8, reason="gone"), Point("torch", 8, [2.0, 4.0], 1 << 20)], 9)
    failed, done = demo_report.point_rows(result)
    assert (failed["status"], failed["reason"]) == ("failed", "gone")
    assert (done["median_ms"], done["peak_mib"]) == (3.0, 1.0)
