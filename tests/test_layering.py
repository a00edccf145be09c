"""Imports run one way, Triton is imported late, and no environment variable of ours exists.

The sources are parsed, not run, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each layer may import, besides itself. Kernels are reached through `ops` alone, where the argument
# checks and autograd are; benchmarks and tests measure them directly.
_PACKAGE = frozenset(
    {"dispatch", "fastattn", "flash_attn", "models", "nn", "ops", "reference", "testing", "training"}
)
MAY_IMPORT = {
    "kernels": frozenset[str](),
    "reference": frozenset[str](),
    "dispatch": frozenset[str](),
    "testing": frozenset({"reference"}),
    "ops": frozenset({"dispatch", "kernels", "reference"}),
    "flash_attn": frozenset({"dispatch", "ops"}),
    "nn": frozenset({"dispatch", "ops", "reference"}),
    "models": frozenset({"dispatch", "nn", "ops", "reference"}),
    "training": frozenset({"dispatch", "models", "nn", "ops", "reference"}),
    "fastattn": _PACKAGE,  # fastattn/__init__.py
    "benchmarks": _PACKAGE | {"kernels"},
    "tests": _PACKAGE | {"benchmarks", "kernels"},
}

# What a layer of the package may import from outside when it is itself imported.
RUN_TIME = frozenset({"torch"})
RUN_TIME_OF_KERNELS = frozenset({"torch", "triton"})

# Environment variables that the package may read: other projects' own.
FOREIGN_VARIABLES = frozenset({"TRITON_INTERPRET"})


@dataclass(frozen=True)
class Import:
    """One imported module; `late` where importing the file does not import it."""

    target: str
    line: int
    late: bool


@dataclass(frozen=True)
class Source:
    """A file under the name that it is imported by."""

    module: str
    tree: ast.Module
    is_package: bool = False

    @property
    def layer(self) -> str:
        return _layer(self.module)

    @property
    def is_shipped(self) -> bool:
        return self.module.partition(".")[0] == "fastattn"


def _layer(module: str) -> str:
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] or top if top == "fastattn" else top


@cache
def _sources() -> tuple[Source, ...]:
    found = []
    for folder, package in (
        ("kernels", "fastattn.kernels"),
        ("fastattn", "fastattn"),
        ("benchmarks", "benchmarks"),
        ("tests", "tests"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "fastattn" and parts[0] == "kernels":
                continue  # through the link, on Pythons whose rglob follows links
            is_package = parts[-1] == "__init__"
            module = ".".join((package, *(parts[:-1] if is_package else parts)))
            found.append(Source(module, ast.parse(path.read_text("utf-8"), str(path)), is_package))
    return tuple(found)


def _imports(source: Source) -> Iterator[Import]:
    yield from _imports_below(source, source.tree, late=False)


def _imports_below(source: Source, node: ast.AST, late: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, late)
    elif isinstance(node, ast.ImportFrom):
        base = _base_of_from(source, node)
        for alias in node.names:
            # fastattn.kernels has nothing but modules; of fastattn's own names the layers are modules.
            is_module = base == "fastattn.kernels" or (base == "fastattn" and alias.name in MAY_IMPORT)
            yield Import(f"{base}.{alias.name}" if is_module else base, node.lineno, late)
    elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
        target = _known_module(node.args[0]) if node.args else ""
        if target:
            yield Import(target, node.lineno, late)
    children: list[tuple[ast.AST, bool]] = [(child, late) for child in ast.iter_child_nodes(node)]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        body = node.body if isinstance(node.body, list) else [node.body]
        children = [(child, late or child in body) for child, _ in children]
    elif isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
        children = [(child, late or child in node.body) for child, _ in children]
    for child, child_late in children:
        yield from _imports_below(source, child, child_late)


def _base_of_from(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = source.module.split(".")
    up = node.level - source.is_package
    base = package[: len(package) - up] + ([node.module] if node.module else [])
    return ".".join(base)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _known_module(node: ast.expr) -> str:
    """The module that import_module's argument names; of f"a.b.{x}" a.b, and "" of f"fastattn.{x}"."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
        known = str(node.values[0].value).rpartition(".")[0]
        return "" if known == "fastattn" else known
    return ""


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@cache
def _triton_free_kernels() -> frozenset[str]:
    """The modules of fastattn.kernels whose import does not import Triton: the host side's helpers."""
    early = {
        source.module: {found.target for found in _imports(source) if not found.late}
        for source in _sources()
        if source.layer == "kernels"
    }
    free = {module for module, targets in early.items() if not any(_is_in(t, "triton") for t in targets)}
    while lost := {
        module for module in free if any(_is_in(t, "fastattn.kernels") for t in early[module] - free)
    }:
        free -= lost
    return frozenset(free)


def wrong_directions(source: Source) -> Iterator[str]:
    """Imports of a layer that the file's own layer may not use."""
    allowed = MAY_IMPORT[source.layer] | {source.layer}
    for found in _imports(source):
        if found.target.partition(".")[0] not in ("fastattn", "benchmarks", "tests"):
            continue
        if _layer(found.target) not in allowed:
            yield f"{source.module}:{found.line}: {source.layer} may not import {found.target}"


def wrong_names(source: Source) -> Iterator[str]:
    """Imports of the top-level name `kernels`, which belongs to another distribution."""
    for found in _imports(source):
        if _is_in(found.target, "kernels"):
            yield f"{source.module}:{found.line}: import fastattn.kernels, not kernels"


def early_imports(source: Source) -> Iterator[str]:
    """What importing fastattn would import besides PyTorch and the standard library."""
    if not source.is_shipped:
        return
    allowed = RUN_TIME_OF_KERNELS if source.layer == "kernels" else RUN_TIME
    for found in _imports(source):
        if found.late:
            continue
        top = found.target.partition(".")[0]
        if _is_in(found.target, "fastattn.kernels"):
            if source.layer != "kernels" and found.target not in _triton_free_kernels():
                yield f"{source.module}:{found.line}: {found.target} needs Triton: import it in the function"
        elif top != "fastattn" and top not in allowed and top not in sys.stdlib_module_names:
            yield f"{source.module}:{found.line}: {top} is imported with fastattn: import it in the function"


def environment_switches(source: Source) -> Iterator[str]:
    """Reads of the environment other than of another project's variable named on the spot."""
    if not source.is_shipped:
        pattern = re.compile(r"FASTATTN_\w+")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and pattern.fullmatch(str(node.value)):
                yield f"{source.module}:{node.lineno}: {node.value} is an environment variable of ours"
        return
    named: set[ast.expr] = set()
    for node in ast.walk(source.tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript):
            use, key = node.value, node.slice
        elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
            use, key = node.func, node.args[0]
            if node.func.attr == "get":
                use = node.func.value
        if isinstance(key, ast.Constant) and key.value in FOREIGN_VARIABLES:
            named.add(use)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            is_read = any(alias.name in ("environ", "getenv") for alias in node.names)
        else:
            is_read = (
                isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and node not in named
            )
        if is_read:
            yield f"{source.module}:{node.lineno}: reads the environment"


RULES = (wrong_directions, wrong_names, early_imports, environment_switches)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule):
    sources = _sources()
    assert {source.layer for source in sources} >= {"fastattn", "kernels", "ops", "tests"}
    complaints = [complaint for source in sources for complaint in rule(source)]
    assert not complaints, "\n".join(complaints)


def test_every_layer_has_a_row():
    assert {source.layer for source in _sources()} <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        (wrong_directions, "fastattn.kernels.gelu", "from fastattn.dispatch import NotSupported"),
        (wrong_directions, "fastattn.dispatch", "def f():\n    from fastattn.ops.gelu import gelu"),
        (wrong_directions, "fastattn.reference", "from . import dispatch"),
        (wrong_directions, "fastattn.ops.gelu", "from .. import nn"),
        (wrong_directions, "fastattn.ops.gelu", "import_module('fastattn.models')"),
        (wrong_directions, "fastattn.nn", "from fastattn import models"),
        (wrong_directions, "fastattn.nn", "from fastattn import gelu"),
        (wrong_directions, "fastattn.nn", "def f():\n    import fastattn.kernels.gelu"),
        (wrong_directions, "fastattn.models.gpt", "import fastattn.training.loop"),
        (wrong_directions, "fastattn.training.loop", "import benchmarks.cases"),
        (wrong_directions, "fastattn.testing", "from .ops.gelu import gelu"),
        (wrong_directions, "benchmarks.cases", "from tests import inputs"),
        (wrong_names, "fastattn.ops.gelu", "def f():\n    from kernels.gelu import gelu_forward"),
        (wrong_names, "tests.ops.test_gelu", "import kernels"),
        (wrong_names, "fastattn.ops._register", "importlib.import_module(f'kernels.{name}')"),
        (early_imports, "fastattn.ops.gelu", "from fastattn.kernels import gelu"),
        (early_imports, "fastattn.ops.gelu", "import fastattn.kernels"),
        (early_imports, "fastattn.ops.gelu", "from ..kernels.gelu import gelu_forward"),
        (early_imports, "fastattn.dispatch", "try:\n    import triton\nexcept ImportError:\n    pass"),
        (early_imports, "fastattn.ops.gelu", "class A:\n    import triton.language as tl"),
        (early_imports, "fastattn.training.data", "import tokenizers"),
        (early_imports, "fastattn.kernels.gelu", "import numpy as np"),
        (environment_switches, "fastattn.dispatch", "os.environ.get('FASTATTN_IMPLEMENTATION')"),
        (environment_switches, "fastattn.dispatch", "os.environ['FASTATTN_IMPLEMENTATION']"),
        (environment_switches, "fastattn.dispatch", "os.getenv('FASTATTN_IMPLEMENTATION')"),
        (environment_switches, "fastattn.dispatch", "name = 'X'\nos.environ.get(name)"),
        (environment_switches, "fastattn.dispatch", "'DEBUG' in os.environ"),
        (environment_switches, "fastattn.kernels.gelu", "from os import getenv"),
        (environment_switches, "benchmarks.cases", "os.environ['FASTATTN_CASES']"),
    ],
)
def test_rule_sees_a_breach(rule, module, text):
    assert len(list(rule(Source(module, ast.parse(text))))) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fastattn.kernels.gelu", "import triton\nfrom fastattn.kernels import _target\nfrom . import _math"),
        ("fastattn.ops.gelu", "from fastattn import reference\nfrom fastattn.dispatch import Operation"),
        ("fastattn.ops.gelu", "def f():\n    from fastattn.kernels.gelu import gelu_forward"),
        (
            "fastattn.ops.gelu",
            "from fastattn.kernels import _config\nfrom fastattn.kernels._target import Target",
        ),
        ("fastattn.ops._register", "f = lambda name: import_module(f'fastattn.kernels.{name}')"),
        ("fastattn.ops._register", "f = lambda name: import_module(f'fastattn.{name}')"),
        ("fastattn.ops.gelu", "if TYPE_CHECKING:\n    import triton"),
        ("fastattn.models.gpt", "from fastattn import nn\nfrom .blocks import Block"),
        ("fastattn.training.data", "def f():\n    import tokenizers"),
        ("fastattn.dispatch", "os.environ.get('TRITON_INTERPRET', '0')\nos.environ['TRITON_INTERPRET']"),
        ("fastattn.dispatch", "os.getenv('TRITON_INTERPRET')\nx.get('anything')"),
        ("benchmarks.cases", "import fastattn, numpy\nfrom fastattn.kernels import gelu\n{**os.environ}"),
        ("tests.kernels.test_gelu", "import fastattn, benchmarks.cases, tests.inputs, triton"),
    ],
)
def test_rules_allow(module, text):
    source = Source(module, ast.parse(text))
    assert [complaint for rule in RULES for complaint in rule(source)] == []
