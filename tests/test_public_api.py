"""The public names, and that functions which mirror PyTorch's have its signature."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastattn


def test_all_names_exist_and_are_documented() -> None:
    for name in fastattn.__all__:
        member = getattr(fastattn, name)
        if name != "__version__":
            assert inspect.getdoc(member), f"fastattn.{name} has no docstring"


@pytest.mark.parametrize("name, count", [("layer_norm", 5), ("rms_norm", 4)])
def test_norms_have_pytorchs_arguments(name: str, count: int) -> None:
    """What is ours can only be said by name; the add_ forms have a residual behind x and options of their own."""
    theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    ours = inspect.signature(getattr(fastattn, name)).parameters
    assert len(theirs) == count and list(ours)[1:count] == [p.name for p in theirs[1:]]
    assert [p.default for p in list(ours.values())[1:count]] == [p.default for p in theirs[1:]]
    options = ["zero_centered_weight", "out_dtype", "return_statistics", "save", "implementation"]
    assert list(ours)[count:] == options
    added = inspect.signature(getattr(fastattn, f"add_{name}")).parameters
    assert list(added)[: count + 1] == ["x", "residual", *list(ours)[1:count]]
    more = ["dropout_p", "rowscale", "zero_centered_weight", "residual_dtype", *options[1:]]
    assert list(added)[count + 1 :] == more
    for parameters, first in ((ours, count), (added, count + 1)):
        assert {p.kind for p in list(parameters.values())[first:]} == {inspect.Parameter.KEYWORD_ONLY}


def test_cross_entropy_has_pytorchs_arguments() -> None:
    theirs = inspect.signature(F.cross_entropy).parameters
    ours = inspect.signature(fastattn.cross_entropy).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[name].default for name in theirs] == [p.default for p in theirs.values()]
    others = list(ours.values())[len(theirs) :]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in others)


def test_scaled_dot_product_attention_has_pytorchs_signature() -> None:
    """PyTorch's is a builtin; its signature stands at the head of its documentation."""
    text = F.scaled_dot_product_attention.__doc__.split("->")[0]
    theirs = re.findall(r"(\w+)(?:=([\w.]+))?(?=[,)])", text[text.index("(") :])
    ours = [
        (p.name, "" if p.default is inspect.Parameter.empty else str(p.default))
        for p in inspect.signature(fastattn.scaled_dot_product_attention).parameters.values()
    ]
    assert ours == theirs


def test_scaled_dot_product_attention_matches_pytorch() -> None:
    """Calls that are fused and calls that are handed on, positional and by keyword."""
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 7, 16)
    mask = torch.rand(9, 7) > 0.3
    for arguments in (
        dict(enable_gqa=True),
        dict(enable_gqa=True, is_causal=True, scale=0.1),
        dict(enable_gqa=True, attn_mask=mask),
        dict(enable_gqa=True, attn_mask=mask.float()),
    ):
        expected = F.scaled_dot_product_attention(q, k, k, **arguments)
        torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, k, **arguments), expected)
        with fastattn.use_implementation("reference"):
            torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, k, **arguments), expected)
    flat = torch.randn(9, 16)
    torch.testing.assert_close(
        fastattn.scaled_dot_product_attention(flat, flat, flat, None, 0.0, True),
        F.scaled_dot_product_attention(flat, flat, flat, None, 0.0, True),
    )


def test_every_registered_operator_is_known() -> None:
    """A new one is given to torch.library.opcheck, as these are in tests/ops, before its name is here."""
    both_ways = {"attention", "attention_blockwise", "cross_entropy", "gelu", "linear_cross_entropy", "norm"}
    both_ways |= {"bias_activation", "gated", "linear_activation"}
    known = {f"{name}_{way}" for name in both_ways for way in ("forward", "backward")}
    known |= {
        "attention_e4m3_forward",
        "cross_entropy_backward_",
        "gated_packed_backward",
        "rotary_embedding",
        "rotary_embedding_in_place",
    }
    found = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastattn::")}
    assert found == {f"fastattn::{name}" for name in known}


def _run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_submodules_are_there_when_asked_for() -> None:
    """`import fastattn` alone left its submodules an AttributeError; it imports them late."""
    script = (
        "import sys, fastattn\n"
        "late = ['fastattn.flash_attn', 'fastattn.models', 'fastattn.testing']\n"
        "submodules = {'flash_attn', 'models', 'nn', 'testing'}\n"
        "print([name in sys.modules for name in late], submodules <= set(dir(fastattn)))\n"
        "print(fastattn.flash_attn.flash_attn_func is not None, end=' ')\n"
        "print(fastattn.models.GPT.__name__, fastattn.testing.ATOL != {}, fastattn.nn.GELU.__name__)\n"
        "print([name in sys.modules for name in late], hasattr(fastattn, 'typo'))"
    )
    assert _run(script).splitlines() == [
        "[False, False, False] True",
        "True GPT True GELU",
        "[True, True, True] False",
    ]


def test_type_checkers_see_submodules_and_nothing_that_is_not_there() -> None:
    """A module's __getattr__ that type checkers see would make every name right."""
    pytest.importorskip("mypy", reason="mypy is not installed (extra `test`)")
    script = "import fastattn; reveal_type(fastattn.models.tiny); fastattn.testing.ATOL; fastattn.typo"
    # Without the other packages, as reading PyTorch takes half a minute.
    options = (
        "--config-file= --no-site-packages --ignore-missing-imports --follow-imports=silent --cache-dir="
    )
    command = [sys.executable, "-m", "mypy", *f"{options}{os.devnull}".split(), "-c", script]
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root).stdout
    assert "-> fastattn.models.config.TransformerConfig" in found
    assert re.findall("error: .*", found) == ['error: Module has no attribute "typo"  [attr-defined]']


def test_import_changes_nothing_in_pytorch() -> None:
    script = (
        "import torch.nn.functional as F, torch\n"
        "before = F.scaled_dot_product_attention, F.layer_norm, F.gelu, torch.get_float32_matmul_precision()\n"
        "import fastattn\n"
        "after = F.scaled_dot_product_attention, F.layer_norm, F.gelu, torch.get_float32_matmul_precision()\n"
        "print(before == after)"
    )
    assert _run(script).strip() == "True"
