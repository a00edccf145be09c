"""The wheel holds what it should and works away from the checkout; importing fastattn stays light."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# Packages that fastattn may use inside a function but that importing it must not import.
OPTIONAL = {"matplotlib", "rich", "safetensors", "tensorboard", "tokenizers", "transformers", "triton"}


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def _version() -> str:
    for node in ast.parse((ROOT / "fastattn" / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise AssertionError("fastattn/__init__.py assigns no __version__")


def _python(code: str, folder: Path, **environment: str) -> str:
    """Runs code in a fresh interpreter that sees installed packages, but neither `folder` nor PYTHONPATH."""
    # tests/conftest.py sets it for this process.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    completed = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


def test_package_list_is_the_tree():
    packages = {"fastattn.kernels"}
    for path in (ROOT / "fastattn").rglob("*.py"):
        parts = path.relative_to(ROOT).parent.parts
        packages.add(".".join(parts))
    assert _pyproject()["tool"]["setuptools"]["packages"] == sorted(packages)


def test_every_regular_package_has_an_init():
    for package in _pyproject()["tool"]["setuptools"]["packages"]:
        # fastattn.kernels is a namespace portion: with an __init__.py, `import kernels` from the
        # checkout's root would shadow the distribution of that name.
        has_init = (ROOT / package.replace(".", "/") / "__init__.py").exists()
        assert has_init == (package != "fastattn.kernels"), package


def test_kernels_link_is_relative():
    assert os.readlink(ROOT / "fastattn" / "kernels") == os.path.join("..", "kernels")


def test_constraints_pin_every_requirement():
    project = _pyproject()["project"]
    extras = project["optional-dependencies"]
    required = project["dependencies"] + extras["test"] + extras["bench"] + extras["train"]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {_normalized(line.partition("==")[0]) for line in lines if line and not line.startswith("#")}
    assert {_normalized(Requirement(requirement).name) for requirement in required} <= pins
    assert all("==" in line for line in lines if line and not line.startswith("#"))


def test_constraints_pin_what_make_install_brings() -> None:
    """Everything that the package and its extras test and bench need, and what that needs in turn."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {_normalized(line.partition("==")[0]) for line in lines if "==" in line}
    extras = _pyproject()["project"]["optional-dependencies"]
    waiting = [*_pyproject()["project"]["dependencies"], *extras["test"], *extras["bench"]]
    seen: set[str] = set()
    while waiting:
        name = _normalized(Requirement(waiting.pop()).name)
        if name in seen or name.startswith(("nvidia-", "cuda-")):  # the first of these are torch's own pins
            continue
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another Python or platform
        seen.add(name)
        here = {"extra": ""}
        waiting += [r for r in needed if (marker := Requirement(r).marker) is None or marker.evaluate(here)]
    assert {"torch", "pytest", "matplotlib", "huggingface-hub"} <= seen
    assert seen <= pins


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout keeps no build folder, with no network."""
    pytest.importorskip("setuptools", minversion="77.0.3", reason="builds the wheel without isolation")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("fastattn", "kernels", "benchmarks", "tests"):
        shutil.copytree(
            ROOT / name, folder / "src" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "src" / name)
    # Building must not import torch, which a build machine need not have.
    (folder / "poison").mkdir()
    (folder / "poison" / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    completed = subprocess.run(
        [*command, "-w", str(folder / "dist"), str(folder / "src")],
        env={**os.environ, "PYTHONPATH": str(folder / "poison")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    (built,) = (folder / "dist").iterdir()
    return built


def test_wheel_is_pure_python(wheel):
    assert wheel.name == f"fastattn-{_version()}-py3-none-any.whl"


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"fastattn-{_version()}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"fastattn", info}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastattn").rglob("*.py")}
    sources |= {f"fastattn/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").glob("*.py")}
    assert len([name for name in sources if name.startswith("fastattn/kernels/")]) > 3
    assert {name for name in names if not name.startswith(info)} == sources | {"fastattn/py.typed"}


def test_wheel_metadata(wheel):
    info = f"fastattn-{_version()}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode("utf-8"))
        licence = archive.read(f"{info}/licenses/LICENSE").decode("utf-8")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in licence
    assert "Copyright The fastattn authors" in licence
    required = [
        requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement
    ]
    assert sorted(re.split(r"[^\w]", requirement)[0] for requirement in required) == ["torch", "triton"]
    assert "fastattn" in str(metadata.get_payload())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target)]
    completed = subprocess.run([*command, str(wheel)], capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return target


def test_installed_wheel_works_outside_the_checkout(installed, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import importlib.resources
import fastattn, fastattn.models, fastattn.testing, fastattn.training, torch
x = torch.linspace(-3, 3, 7)
torch.testing.assert_close(fastattn.gelu(x), torch.nn.functional.gelu(x))
assert "def " in importlib.resources.files("fastattn.kernels").joinpath("gelu.py").read_text("utf-8")
import fastattn.kernels
for path in [fastattn.__file__, fastattn.models.__file__, *fastattn.kernels.__path__]:
    assert path.startswith({str(installed)!r}), path
print(fastattn.__version__)
"""
    assert _python(code, tmp_path) == _version()


def test_installed_kernels_run_outside_the_checkout(installed, tmp_path):
    """Triton reads a kernel's source file when it compiles or interprets it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import fastattn, torch
x = torch.linspace(-3, 3, 7)
torch.testing.assert_close(fastattn.gelu(x, implementation="triton"), torch.nn.functional.gelu(x))
q = torch.linspace(-1, 1, 40).reshape(1, 1, 5, 8).requires_grad_()
results = [fastattn.attention(q, q, q, softcap=3.0, implementation=name) for name in ("triton", "torch")]
torch.testing.assert_close(*results)
torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), q) for out in results))
print(sys.modules["fastattn.kernels.gelu"].__file__)
"""
    output = _python(code, tmp_path, TRITON_INTERPRET="1")
    assert Path(output).parent == installed / "fastattn" / "kernels"


def test_the_oldest_triton_that_is_tried_is_the_oldest_allowed():
    makefile = (ROOT / "Makefile").read_text()
    (tried,) = re.findall(r"^OLDEST_TRITON := (\S+)$", makefile, re.MULTILINE)
    (allowed,) = re.findall(r'"triton>=([^;]+);', (ROOT / "pyproject.toml").read_text())
    assert tried.startswith(allowed + ".")


def test_import_leaves_triton_and_optional_packages_alone(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
before = set(sys.modules)
import fastattn, fastattn.models, fastattn.testing, fastattn.training
assert fastattn.__file__.startswith({str(ROOT)!r})
print(*sorted((set(sys.modules) - before) & {OPTIONAL!r}))
"""
    assert _python(code, tmp_path) == ""


def test_import_works_without_triton(tmp_path):
    """As on macOS and Windows: the calls go to PyTorch, and forcing Triton says why it cannot be."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["triton"] = None
import fastattn, torch
x = torch.linspace(-3, 3, 7)
torch.testing.assert_close(fastattn.gelu(x), torch.nn.functional.gelu(x))
try:
    fastattn.gelu(x, implementation="triton")
except fastattn.NotSupported as error:
    print(error)
"""
    assert "Triton is not installed" in _python(code, tmp_path)
