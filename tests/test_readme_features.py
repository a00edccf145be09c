"""README.md's table of features names, for every yes of ours, tests that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
README = TESTS.parent / "README.md"
HEADING = "## Attention's features beside the peers'"


def section(text: str) -> str:
    return text.partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the section's table, without its head."""
    lines = [line for line in section(text).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named_tests(text: str) -> dict[str, str]:
    """The section's numbered list: a test's path and name by its number."""
    return dict(re.findall(r"^(\d+)\. `([\w/]+\.py::test_\w+)`", section(text), re.MULTILINE))


def exists(test: str, folder: Path = TESTS) -> bool:
    path, _, name = test.partition("::")
    if not (folder / path).is_file():
        return False
    body = ast.parse((folder / path).read_text("utf-8")).body
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in body)


def faults(text: str) -> list[str]:
    """What is wrong with the table; nothing, where every yes of ours names tests and every test is there."""
    tests, found, used = named_tests(text), [], set()
    for feature, ours, *_, numbers in rows(text):
        asked = numbers.replace(",", " ").split()
        used |= set(asked)
        found += [f"{feature}: no test has the number {number}" for number in asked if number not in tests]
        if ours.startswith("yes") and not asked:
            found.append(f"{feature}: a yes without a test")
        if not ours.startswith(("yes", "no")):
            found.append(f"{feature}: neither yes nor no")
    found += [f"{test} does not exist" for test in tests.values() if not exists(test)]
    found += [f"{test} backs no feature" for number, test in tests.items() if number not in used]
    items = re.findall(r"^\d+\. ", section(text), re.MULTILINE)
    if [item.rstrip(". ") for item in items] != [str(n + 1) for n in range(len(tests))]:
        found.append("the list of tests is not numbered from 1 on, each with a `path::test`")
    return found


def test_every_yes_names_tests_that_exist() -> None:
    text = README.read_text("utf-8")
    assert len(rows(text)) > 20 and all(len(row) == 8 for row in rows(text))
    assert sum(row[1].startswith("yes") for row in rows(text)) > 15
    assert faults(text) == []


BREACHES: dict[str, tuple[Callable[[str], str], str]] = {
    "a-test-that-is-gone": (lambda text: text.replace("::test_masks`", "::test_maskss`"), "does not exist"),
    "a-file-that-is-gone": (
        lambda text: text.replace("`test_dispatch.py::", "`test_none.py::"),
        "does not exist",
    ),
    "a-yes-without-a-test": (
        lambda text: re.sub(r"(\| ALiBi .*\|) 4 \|", r"\1 |", text),
        "ALiBi: a yes without",
    ),
    "a-number-of-nothing": (lambda text: re.sub(r"(\| ALiBi .*\|) 4 \|", r"\1 99 |", text), "the number 99"),
    "a-test-for-nothing": (lambda text: text.replace("| 21, 22 |", "| 21 |"), "backs no feature"),
    "no-path": (lambda text: text.replace("`test_packaging.py::test_wheel", "`test_wheel"), "not numbered"),
    "neither-yes-nor-no": (
        lambda text: text.replace("| ALiBi | yes", "| ALiBi | maybe"),
        "neither yes nor no",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_seen(name: str) -> None:
    change, message = BREACHES[name]
    text = README.read_text("utf-8")
    assert change(text) != text
    assert any(message in fault for fault in faults(change(text)))


def test_a_test_in_a_comment_is_none(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("# def test_a(): ...\nTEXT = 'def test_a():'\n\ndef test_b(): ...\n")
    assert exists("test_it.py::test_b", tmp_path) and not exists("test_it.py::test_a", tmp_path)
