"""README.md holds the figures that the committed results give, and no others."""

import json

import pytest

from benchmarks import readme


def test_readme_is_what_the_results_give():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.render(text) == text, "run: python -m benchmarks readme"
    assert text.count("<!-- figures:") == 4


def test_figures_follow_the_results(tmp_path):
    folder = tmp_path / "device" / "demo"
    folder.mkdir(parents=True)
    content = json.loads(next(readme.RESULTS.glob("*/demo/demo.json")).read_text(encoding="utf-8"))
    content["summary"][0]["median_ms"] = 123.456
    (folder / "demo.json").write_text(json.dumps(content))
    text = readme.render("before\n<!-- figures: demo -->\nold\n<!-- end -->\nafter", tmp_path)
    assert text.startswith("before\n<!-- figures: demo -->\n") and text.endswith("<!-- end -->\nafter")
    assert "| naive | 123.5 (" in text and "old" not in text


def test_a_line_for_every_case_of_the_suites(tmp_path):
    folder = tmp_path / "device" / "run"
    folder.mkdir(parents=True)
    content = json.loads(next(readme.RESULTS.glob("*/run/results.json")).read_text(encoding="utf-8"))
    for row in content["rows"]:
        if row["provider"] == "fastattn" and row["operation"] == "gelu":
            row["time_vs_torch"] = 123.456
    (folder / "results.json").write_text(json.dumps(content))
    text = readme.render("<!-- figures: run -->\n<!-- end -->", tmp_path)
    ours = [
        row["operation"]
        for row in content["rows"]
        if row["provider"] == "fastattn" and row["status"] == "ok" and row["suite"] != "options"
    ]
    assert text.count("\n| ") - 1 == len(
        [operation for operation in ours if operation not in ("host", "import")]
    )
    assert text.count("123.46 [") == ours.count("gelu") > 0
    assert "the same provider timed twice differs by" in text


def put(results, device, change=lambda content: None):
    """The committed run as another device's."""
    content = json.loads(next(readme.RESULTS.glob("*/run/results.json")).read_text(encoding="utf-8"))
    change(content)
    (results / device / "run").mkdir(parents=True)
    (results / device / "run" / "results.json").write_text(json.dumps(content))


def test_naive_out_of_memory_is_a_cell(tmp_path):
    """On a GPU naive attention does not fit from some length on; that was a KeyError."""

    def out_of_memory(content):
        for row in content["rows"]:
            if row["provider"] == "naive" and row["operation"] == "attention":
                for key in [key for key in row if "_ms" in key or "time_vs" in key or key == "peak_mib"]:
                    del row[key]
                row |= {"status": "out of memory", "reason": "out of memory"}

    put(tmp_path, "device", out_of_memory)
    lines = readme.render("<!-- figures: run -->\n<!-- end -->", tmp_path).splitlines()
    (line, *_) = [line for line in lines if line.startswith("| attention | ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[4] == "out of memory" and "[" in cells[5] and cells[6].startswith(", ")


def test_every_device_has_its_section_and_gpus_come_first(tmp_path):
    """Only the first in the alphabet was shown."""
    put(tmp_path, "a-cpu")
    put(tmp_path, "b-gpu", lambda content: content["environment"].update(device_type="cuda"))
    text = readme.render("<!-- figures: run -->\n<!-- end -->", tmp_path)
    assert text.count("| operation | case |") == 2
    assert 0 < text.index("benchmarks/results/b-gpu/run") < text.index("benchmarks/results/a-cpu/run")


def test_missing_or_broken_results_are_one_line(tmp_path):
    with pytest.raises(readme.ReadmeError, match=r"no device has run/results\.json in "):
        readme.render("<!-- figures: run -->\n<!-- end -->", tmp_path)
    (tmp_path / "gpu" / "run").mkdir(parents=True)
    (tmp_path / "gpu" / "run" / "results.json").write_text("{")
    with pytest.raises(readme.ReadmeError, match=r"cannot read .*/gpu/run/results\.json: "):
        readme.render("<!-- figures: run -->\n<!-- end -->", tmp_path)


def test_unknown_figures_list_the_known():
    with pytest.raises(readme.ReadmeError, match="figures: speed is unknown; there are demo, host"):
        readme.render("<!-- figures: speed -->\n<!-- end -->")
