"""`python -m benchmarks ops` and `gpu`, host costs, and the pytest-benchmark files."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as commands
from benchmarks import gpu, ops
from benchmarks.cases import GeluCase
from benchmarks.environment import REPOSITORY
from benchmarks.host import host_pairs, measure_host, measure_import
from benchmarks.measure import DIRECTIONS
from benchmarks.report import read_rows


@pytest.fixture
def small_case(monkeypatch):
    """One case of each operation that costs nothing."""
    monkeypatch.setattr(ops, "operation_cases", lambda operation, device: (GeluCase(3, 8), GeluCase(4, 8)))


@pytest.mark.usefixtures("small_case", "no_interpreter")
def test_ops_writes_every_file_and_prints_the_folder_last(tmp_path, capsys):
    arguments = ["ops", "gelu", "host", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path)]
    arguments += ["--cases", "3x8", "--providers", "naive", "fastattn", "--commit", "abc"]
    assert commands.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gelu.png", "ops.csv", "ops.json", "ops.jsonl"}
    content = json.loads((tmp_path / "ops.json").read_text())
    rows = content["rows"]
    assert read_rows(tmp_path / "ops.jsonl") == rows
    assert {row["case"] for row in rows if row["operation"] == "gelu"} == {"fp32-erf-3x8"}
    measured = {(row["provider"], row["direction"]): row for row in rows if row["operation"] == "gelu"}
    assert set(measured) == {
        (name, direction)
        for name in ("naive", "fastattn", "fastattn-triton", "fastattn-torch")
        for direction in DIRECTIONS
    }
    assert all(row["commit"] == content["environment"]["commit"] == "abc" for row in rows)
    assert sum(row["operation"] == "host" for row in rows) == len(host_pairs())
    assert "gelu fastattn-triton: absent in 2 rows" in out


@pytest.mark.usefixtures("small_case", "no_interpreter")
def test_ops_rows_survive_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "measure_host", lambda device, rounds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        commands.main(f"ops gelu host --device cpu --rounds 1 --providers naive --out {tmp_path}".split())
    assert len(read_rows(tmp_path / "ops.jsonl")) == 2 * len(DIRECTIONS)


@pytest.mark.usefixtures("no_interpreter")
def test_host_cost_is_the_difference_to_pytorch():
    rows = list(measure_host(rounds=3))
    assert [row["case"] for row in rows] == [f"{name}, cpu" for name in host_pairs()]
    for row in rows:
        assert 0 < row["low_us"] <= row["median_us"] <= row["high_us"]
        assert row["above_torch_us"] < row["median_us"]


@pytest.mark.parametrize("name", host_pairs())
@pytest.mark.usefixtures("no_interpreter")
def test_host_pairs_compute_the_same(name):
    ours, theirs = host_pairs()[name]  # on the same tensors
    with torch.no_grad():
        torch.testing.assert_close(ours(), theirs())


def test_import_does_not_import_triton():
    row = measure_import(rounds=1)
    assert row["imports_triton"] is False
    assert 0 < row["median_s"] < row["torch_s"] + 60


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Commands that `gpu` would run, in the order of running; the exit code of each by a word in it."""
    ran, codes = [], {}

    def logged(command, log):
        ran.append(command)
        log.write_text("")
        return next((code for word, code in codes.items() if word in command), 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device, commit: {"device": "pretended", "commit": commit})
    monkeypatch.setattr(gpu, "_logged", logged)
    return ran, codes


def test_gpu_runs_tests_then_operations_then_the_demo(pretend_gpu, tmp_path):
    ran, _ = pretend_gpu
    assert commands.main(["gpu", "--out", str(tmp_path), "--commit", "abc"]) == 0
    assert ["pytest" in command for command in ran] == [True, False, False]
    assert f"--junitxml={tmp_path / 'gpu-tests.xml'}" in ran[0] and "gpu" in ran[0]
    assert " ".join(ran[1][3:]) == f"ops --device cuda --out {tmp_path} --rounds 20 --commit abc"
    assert " ".join(ran[2][3:]) == f"demo --device cuda --out {tmp_path / 'demo'} --commit abc"
    assert json.loads((tmp_path / "environment.json").read_text()) == {"device": "pretended", "commit": "abc"}


def test_gpu_goes_on_after_a_failure_and_reports_it(pretend_gpu, tmp_path, capsys):
    ran, codes = pretend_gpu
    codes["pytest"] = 1
    assert commands.main(["gpu", "--out", str(tmp_path)]) == 1
    assert len(ran) == 3
    assert "tests failed; see the log" in capsys.readouterr().err


def test_gpu_runs_chosen_parts(pretend_gpu, tmp_path):
    ran, _ = pretend_gpu
    assert commands.main(["gpu", "--out", str(tmp_path), "--parts", "ops"]) == 0
    assert [command[3] for command in ran] == ["ops"]


def test_logged_output_is_on_the_terminal_and_in_the_file(tmp_path, capsys):
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert gpu._logged([sys.executable, "-c", program], tmp_path / "log") == 3
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]
    assert sorted(capsys.readouterr().out.split()) == ["err", "out"]


@pytest.mark.slow
def test_benchmark_files_run_and_record_rates(tmp_path):
    """`pytest benchmarks`: found, checked, timed, with FLOPs, bytes and rates beside the times."""
    chosen = "(erf-1024x1024 and not compile and not fastattn) or (host and gelu)"
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-k", chosen]
    # Within a pytest-xdist worker, pytest-benchmark would take the inner pytest for one too and not measure.
    environment = {
        k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")
    }
    done = subprocess.run(
        [*command, f"--benchmark-json={output}"],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(output.read_text())
    benchmarks = {b["name"]: b for b in content["benchmarks"]}
    gelu = [b for name, b in benchmarks.items() if name.startswith("test_gelu")]
    assert len(gelu) == 2 * len(DIRECTIONS)
    assert {name for name in benchmarks if name.startswith("test_host")} == {
        "test_host_cost[gelu-fastattn]",
        "test_host_cost[gelu-torch]",
    }
    for benchmark in gelu:
        info = benchmark["extra_info"]
        assert info["bytes"] in (2 * 4 << 20, 5 * 4 << 20)
        assert info["gbytes_per_s"] == pytest.approx(info["bytes"] / benchmark["stats"]["median"] / 1e9)
        assert info["peak_bytes"] >= 4 << 20
    assert content["machine_info"]["fastattn"]["torch"] == torch.__version__
