"""Runs that are interrupted, fail in part, go on, or find a folder that is not theirs."""

import json
import os

import pytest
import torch

from benchmarks import __main__ as commands
from benchmarks import run
from benchmarks.cases import GeluCase
from benchmarks.measure import DIRECTIONS
from benchmarks.report import read_rows

SMALL = "run --suite mlp --device cpu --rounds 1 --providers naive --commit abc --out"


def run_command(text, *paths):
    return commands.main([*text.split(), *map(str, paths)])


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_an_interrupted_run_keeps_its_rows_and_goes_on(tmp_path, monkeypatch, capsys):
    def interrupted(device, rounds):
        raise KeyboardInterrupt
        yield

    arguments = "run --suite mlp host --device cpu --rounds 1 --providers naive --out"
    with monkeypatch.context() as patched:
        patched.setattr(run, "measure_host", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_command(arguments, tmp_path)
    before = read_rows(tmp_path / "rows.jsonl")
    assert len(before) == 2 + 2 * len(DIRECTIONS)  # ceilings, and two cases of one provider
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == before

    def again(*arguments, **keywords):
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(run, "measure_case", lambda *arguments, **keywords: (again() for _ in "x"))
        assert run_command(f"{arguments} {tmp_path} --resume") == 0
    after = read_rows(tmp_path / "rows.jsonl")
    assert after[: len(before)] == before and len(after) > len(before)


def interrupting(rows):
    yield from rows
    raise KeyboardInterrupt


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_a_case_cut_short_is_measured_again(tmp_path, monkeypatch):
    """Forward rows come first; after an interruption behind them the case counted as done, without a backward."""
    measure_case = run.measure_case

    def cut_short(case, *arguments, **options):
        rows = measure_case(case, *arguments, **options)
        return rows if case.rows == 3 else interrupting([next(rows)])

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, "measure_case", cut_short)
        run_command(SMALL, tmp_path)
    before = read_rows(tmp_path / "rows.jsonl")
    assert [row["case"] for row in before[2:]] == ["fp32-erf-3x8"] * 2 + ["fp32-erf-4x8"]
    assert run_command(f"{SMALL} {tmp_path} --resume") == 0
    after = read_rows(tmp_path / "rows.jsonl")
    assert after[:-2] == before[:-1]  # kept as they were
    assert [(row["case"], row["direction"]) for row in after[-2:]] == [
        ("fp32-erf-4x8", d) for d in DIRECTIONS
    ]


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_a_run_cut_short_in_its_ceilings_goes_on(tmp_path, monkeypatch):
    """With a copy and no product, the first row of the resumed run was a KeyError."""
    ceilings = list(run.measure_ceilings(None, 1))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, "measure_ceilings", lambda device, rounds: interrupting(ceilings[:1]))
        run_command(SMALL, tmp_path)
    assert run_command(f"{SMALL} {tmp_path} --resume") == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["case"] for row in rows[:2]] == ["copy", "matmul"]
    assert all(row["roofline_share"] > 0 for row in rows[2:])


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_shares_are_of_the_ceilings_that_there_are(tmp_path, monkeypatch):
    def without_product(device, rounds):
        yield {"operation": "ceiling", "case": "copy", "direction": "forward", "provider": "torch",
               "status": "ok", "median_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "gbytes_per_s": 4.0}  # fmt: skip
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "measure_ceilings", without_product)
    run_command(SMALL, tmp_path)
    _, failed, naive, *_ = read_rows(tmp_path / "rows.jsonl")
    assert (failed["suite"], failed["status"], failed["reason"]) == (
        "ceiling",
        "out of memory",
        "out of memory",
    )
    assert naive["roofline_share"] == pytest.approx(naive["gbytes_per_s"] / 4.0)


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_a_case_that_fails_as_a_whole_is_a_row_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    """Its inputs do not fit, say: that used to end the run."""
    inputs = GeluCase.inputs

    def too_large(case, device):
        if case.rows == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs(case, device)

    monkeypatch.setattr(GeluCase, "inputs", too_large)
    run_command(f"{SMALL} {tmp_path}")
    assert "gelu every: out of memory in 1 row" in capsys.readouterr().out
    _, _, failed, *others = read_rows(tmp_path / "rows.jsonl")
    assert (failed["operation"], failed["case"], failed["status"]) == (
        "gelu",
        "fp32-erf-3x8",
        "out of memory",
    )
    assert [row["status"] for row in others] == ["ok", "ok"]
    monkeypatch.setattr(GeluCase, "inputs", inputs)
    assert run_command(f"{SMALL} {tmp_path} --resume") == 0
    assert {row["status"] for row in read_rows(tmp_path / "rows.jsonl")} == {"ok"}  # taken up once more


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_an_error_in_the_host_suite_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_host", lambda device, rounds: (1 / 0 for _ in "x"))
    arguments = "run --suite host --device cpu --rounds 1 --out"
    assert run_command(arguments, tmp_path) == 1
    assert read_rows(tmp_path / "rows.jsonl")[-1]["reason"] == "ZeroDivisionError: division by zero"


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
@pytest.mark.parametrize(
    ("change", "message"),
    (
        (("--rounds 1", "--rounds 2"), "was measured with rounds 1, and this is 2"),
        (("--commit abc", "--commit xyz"), "was measured with commit abc, and this is xyz"),
        (("--providers naive", ""), "was measured with providers ['naive'], and this is []"),
    ),
)
def test_a_run_goes_on_under_the_same_conditions_only(change, message, tmp_path, capsys):
    """Rows of two commits stood side by side, and nothing said so."""
    assert run_command(SMALL, tmp_path) == 0
    before = (tmp_path / "rows.jsonl").read_bytes()
    capsys.readouterr()
    assert run_command(f"{SMALL} {tmp_path} --resume".replace(*change)) == 2
    assert capsys.readouterr().err.strip().endswith(message)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_rows_are_there_at_every_moment_of_a_resumption(tmp_path, monkeypatch):
    """The file was emptied and then written anew: a second interruption lost everything."""
    assert run_command(SMALL, tmp_path) == 0
    before = read_rows(tmp_path / "rows.jsonl")

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        run_command(f"{SMALL} {tmp_path} --resume")
    assert read_rows(tmp_path / "rows.jsonl") == before


@pytest.mark.usefixtures("small_suites", "no_interpreter")
def test_tables_are_printed_before_the_page_is_made(tmp_path, monkeypatch, capsys):
    """An error in the page's plots took the tables with it."""

    def failing(path, content):
        raise ValueError("a plot\nof [nothing]")

    monkeypatch.setattr(run.html_report, "write_html", failing)
    assert run_command(SMALL, tmp_path) == 0
    out = capsys.readouterr().out
    assert 0 < out.index("fp32-erf-3x8") < out.index("report.html is not written: ValueError: a plot\n")


@pytest.mark.usefixtures("small_suites", "no_interpreter", "no_page")
def test_a_folder_with_rows_is_not_overwritten(tmp_path, capsys):
    assert run_command(SMALL, tmp_path) == 0
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert run_command(SMALL, tmp_path) == 2
    assert "holds the rows of a run: give --resume" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_bytes() == before
