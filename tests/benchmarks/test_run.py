"""`python -m benchmarks run` and `gpu`, host costs, and the pytest-benchmark files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as commands
from benchmarks import gpu
from benchmarks.cases import GeluCase
from benchmarks.environment import REPOSITORY
from benchmarks.host import host_pairs, measure_host, measure_import
from benchmarks.measure import DIRECTIONS
from benchmarks.providers import PROVIDERS
from benchmarks.report import read_rows
from benchmarks.suites import SUITES, Suite


def run_command(text, *paths):
    return commands.main([*text.split(), *map(str, paths)])


@pytest.mark.usefixtures("small_suites", "no_interpreter")
def test_run_writes_every_file_and_prints_the_folder_last(tmp_path, capsys):
    arguments = "run --suite mlp host --device cpu --rounds 2 --cases 3x8 --providers naive fastattn --commit abc --out"
    assert run_command(arguments, tmp_path) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path)
    files = {"rows.jsonl", "rows.csv", "results.json", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == files
    content = json.loads((tmp_path / "results.json").read_text())
    rows = content["rows"]
    assert read_rows(tmp_path / "rows.jsonl") == rows
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
    naive = measured["naive", "forward"]
    assert naive["suite"] == "mlp"
    assert naive["shape"] == {"rows": 3, "width": 8, "approximate": "none", "dtype": "fp32"}
    share = max(naive["tflops"] / 2.0, naive["gbytes_per_s"] / 4.0)
    assert naive["roofline_share"] == pytest.approx(share)
    assert naive["bound_ms"] == pytest.approx(share * naive["median_ms"])


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_no_case_begins_after_its_time(tmp_path, capsys):
    assert run_command("run --suite mlp --device cpu --rounds 1 --minutes 1e-9 --out", tmp_path) == 0
    assert "not measured, as 1e-09 minutes were over: mlp gelu fp32-erf-4x8" in capsys.readouterr().out
    assert read_rows(tmp_path / "rows.jsonl") == []


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_every_suites_first_cases_come_before_any_others(tmp_path, monkeypatch):
    """When the time runs out, each suite has its most telling rows."""
    for name in ("mlp", "norm"):
        cases = tuple(GeluCase(rows, 8) for rows in range(1, 6))
        monkeypatch.setitem(SUITES, name, Suite(name, "small", cpu=cases, gpu=(), directions=("forward",)))
    assert run_command("run --suite norm mlp --device cpu --rounds 1 --providers naive --out", tmp_path) == 0
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row["operation"] == "gelu"]
    measured = [(row["suite"], row["shape"]["rows"]) for row in rows]
    order = [(suite, rows) for suite in ("norm", "mlp") for rows in (1, 2, 3)]
    order += [(suite, rows) for suite in ("norm", "mlp") for rows in (4, 5)]
    assert list(dict.fromkeys(measured)) == order


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_a_wrong_result_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(PROVIDERS["gelu"], "mine", lambda case, device: lambda x: x)
    assert run_command("run --suite mlp --device cpu --rounds 1 --providers mine --out", tmp_path) == 1


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_a_provider_of_the_users_own(tmp_path, monkeypatch, capsys):
    """benchmarks/example_provider.py, which benchmarks/README.md explains."""
    monkeypatch.setitem(PROVIDERS, "gelu", dict(PROVIDERS["gelu"]))
    example = REPOSITORY / "benchmarks" / "example_provider.py"
    arguments = f"run --suite mlp --device cpu --rounds 1 --providers sigmoid torch --with {example} --out"
    assert run_command(arguments, tmp_path) == 1
    rows = {row["provider"]: row for row in read_rows(tmp_path / "rows.jsonl") if row["operation"] == "gelu"}
    assert rows["sigmoid-approximation"]["status"] == "wrong"  # it is no exact GELU, and the check says so
    assert rows["torch"]["status"] == "ok"


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_compare_with_another_run(tmp_path, capsys):
    arguments = "run --suite mlp --device cpu --rounds 1 --cases 3x8 --providers naive --out"
    assert run_command(arguments, tmp_path / "old") == 0
    capsys.readouterr()
    assert run_command(f"{arguments} {tmp_path / 'new'} --compare {tmp_path / 'old' / 'results.json'}") == 0
    assert "naive" in capsys.readouterr().out.partition("fp32-erf-3x8")[2]


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
    memory = SimpleNamespace(total_memory=140 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    return ran, codes


def test_gpu_runs_tests_then_operations_then_the_demo(pretend_gpu, tmp_path):
    ran, _ = pretend_gpu
    assert commands.main(["gpu", "--out", str(tmp_path), "--commit", "abc"]) == 0
    assert ["pytest" in command for command in ran] == [True, False, False]
    assert f"--junitxml={tmp_path / 'gpu-tests.xml'}" in ran[0] and "gpu" in ran[0]
    assert " ".join(ran[1][3:]) == (
        f"run --device cuda --out {tmp_path} --rounds 20 --resume --minutes 5 --commit abc"
    )
    assert " ".join(ran[2][3:]) == f"demo --device cuda --out {tmp_path / 'demo'} --commit abc"
    assert json.loads((tmp_path / "environment.json").read_text()) == {"device": "pretended", "commit": "abc"}


JUNIT = '<testsuites><testsuite tests="9" failures="{}" errors="0" skipped="2"/></testsuites>'


@pytest.mark.parametrize(
    ("junit", "log", "commit", "again"),
    (
        (JUNIT.format(0), "7 passed", "abc", False),
        (JUNIT.format(0), "7 passed", "xyz", True),  # that was another commit
        (JUNIT.format(1), "1 failed", "abc", True),
        (JUNIT.format(0), "!!! KeyboardInterrupt !!!", "abc", True),
        (JUNIT.format(0)[:30], "", "abc", True),
        ('<testsuite tests="2" failures="0" errors="0" skipped="2"/>', "2 skipped", "abc", True),
    ),
)
def test_a_second_call_of_gpu_goes_on(junit, log, commit, again, pretend_gpu, tmp_path):
    """It began with the tests again, and had no more time for what it was called for."""
    ran, _ = pretend_gpu
    assert commands.main(["gpu", "--out", str(tmp_path), "--commit", "abc"]) == 0
    (tmp_path / "gpu-tests.xml").write_text(junit)
    (tmp_path / "gpu-tests.log").write_text(log)
    (tmp_path / "demo").mkdir()
    described = (tmp_path / "environment.json").read_text()
    (tmp_path / "demo" / "demo.json").write_text(f'{{"environment": {described}}}')
    ran.clear()
    assert commands.main(["gpu", "--out", str(tmp_path), "--commit", commit]) == 0
    assert ["pytest" in command for command in ran].count(True) == again
    assert [command[3] for command in ran if "pytest" not in command] == ["run", "demo"][
        : 1 + (commit != "abc")
    ]


def test_gpu_goes_on_after_a_failure_and_reports_it(pretend_gpu, tmp_path, capsys):
    ran, codes = pretend_gpu
    codes["pytest"] = 1
    assert commands.main(["gpu", "--out", str(tmp_path)]) == 1
    assert len(ran) == 3
    assert "tests failed; see the log" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "marked"), [("tests", "gpu"), ("more-tests", "not gpu")], ids=["marked-gpu", "the-rest"]
)
def test_gpu_tests_are_all_tests_those_of_peers_last(part, marked, pretend_gpu, tmp_path):
    ran, _ = pretend_gpu
    assert commands.main(["gpu", "--out", str(tmp_path), "--parts", part]) == 0
    (command,) = ran
    places = [Path(word) for word in command if word.startswith(str(REPOSITORY / "tests"))]
    assert places[-1] == REPOSITORY / "tests" / "benchmarks"
    found = {path for place in places for path in ([place] if place.is_file() else place.rglob("test_*.py"))}
    assert found == set((REPOSITORY / "tests").rglob("test_*.py"))
    assert command[command.index("-m", 3) + 1] == marked


@pytest.mark.parametrize(
    ("xdist", "cores", "gigabytes", "workers"),
    [(True, 16, 140, 8), (True, 4, 140, 4), (True, 16, 24, 1), (True, 16, 8, 1), (False, 16, 140, 1)],
)
def test_gpu_tests_share_a_large_gpu(xdist, cores, gigabytes, workers, pretend_gpu, monkeypatch, tmp_path):
    ran, _ = pretend_gpu
    real = gpu.importlib.util.find_spec
    found = {"xdist": "xdist" if xdist else None}
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name, *of: found[name] if name in found else real(name, *of)
    )
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: cores)
    memory = SimpleNamespace(total_memory=gigabytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    assert commands.main(["gpu", "--out", str(tmp_path), "--parts", "tests"]) == 0
    (command,) = ran
    assert ("-n" in command) == (workers > 1)
    if workers > 1:
        assert command[command.index("-n") + 1] == str(workers)


def test_gpu_runs_chosen_parts(pretend_gpu, tmp_path):
    ran, _ = pretend_gpu
    assert commands.main(["gpu", "--out", str(tmp_path), "--parts", "run"]) == 0
    assert [command[3] for command in ran] == ["run"]
    ran.clear()
    assert commands.main(["gpu", "--out", str(tmp_path), "--parts", "tune", "--commit", "abc"]) == 0
    (command,) = ran
    assert " ".join(command[3:]) == f"tune --out {tmp_path / 'tune'} --resume --minutes 20 --commit abc"


def test_logged_output_is_on_the_terminal_and_in_the_file(tmp_path, capsys):
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert gpu._logged([sys.executable, "-c", program], tmp_path / "log") == 3
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]
    assert sorted(capsys.readouterr().out.split()) == ["err", "out"]


@pytest.mark.slow
def test_benchmark_files_run_and_record_rates(tmp_path):
    """`pytest benchmarks`: found, checked, timed, with FLOPs, bytes and rates beside the times."""
    chosen = "(erf-1024x4096 and torch and not compile and not fastattn) or (host and gelu)"
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
    assert len(gelu) == len(DIRECTIONS)
    assert {name for name in benchmarks if name.startswith("test_host")} == {
        "test_host_cost[gelu-fastattn]",
        "test_host_cost[gelu-torch]",
    }
    for benchmark in gelu:
        info = benchmark["extra_info"]
        assert info["bytes"] in (2 * 16 << 20, 5 * 16 << 20)
        assert info["gbytes_per_s"] == pytest.approx(info["bytes"] / benchmark["stats"]["median"] / 1e9)
        assert info["peak_bytes"] >= 4 << 20
    assert content["machine_info"]["fastattn"]["torch"] == torch.__version__
