"""README.md holds the figures that the committed results give, and no others."""

import json

import pytest

from benchmarks import readme


def test_readme_is_what_the_results_give():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.render(text) == text, "run: python -m benchmarks readme"
    assert text.count("<!-- figures:") == 3


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
        row["operation"] for row in content["rows"] if row["provider"] == "fastattn" and row["status"] == "ok"
    ]
    assert text.count("\n| ") - 1 == len(
        [operation for operation in ours if operation not in ("host", "import")]
    )
    assert text.count("123.46 [") == ours.count("gelu") > 0
    assert "the same provider timed twice differs by" in text


def test_unknown_figures_list_the_known():
    with pytest.raises(readme.ReadmeError, match="figures: speed is unknown; there are demo, host"):
        readme.render("<!-- figures: speed -->\n<!-- end -->")
