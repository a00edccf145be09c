"""What goes before the model of a launch config: forced ones, then measured ones; and what keys hold."""

import ast
from collections import defaultdict
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch

from fastattn.kernels import _attention_forms, _config
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_decode_config import select_decode_config
from fastattn.kernels._attention_forms import FORMS, fitting_config, form_reason, select_attention_form
from fastattn.kernels._attention_tables import AttentionTiles
from fastattn.kernels._config import asked_configs, forced_config, measured_configs
from fastattn.kernels._linear_config import select_linear_config
from fastattn.kernels._loss_config import (
    select_cross_entropy_backward_config,
    select_cross_entropy_forward_config,
)
from fastattn.kernels._measured import MEASURED, RUNS
from fastattn.kernels._measurement import Measured, Run
from fastattn.kernels._norm_config import select_norm_backward_config, select_norm_forward_config
from fastattn.kernels._partials_config import select_partial_sums_config
from fastattn.kernels._pointwise_config import (
    GeluConfig,
    select_gelu_config,
    select_tile_config,
    select_walk_config,
)
from fastattn.kernels._rotary_config import select_rotary_config
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS
from fastattn.kernels.gelu import gelu_forward

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
H200 = KNOWN_TARGETS["sm_90"]
RUN = {"a run": Run("NVIDIA H200", 132, "2.13.0", "3.7.1", "abc", "2026-01-01")}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

_WIDTHS = (
    1,
    3,
    4,
    64,
    65,
    127,
    255,
    256,
    257,
    768,
    1000,
    1024,
    4095,
    4096,
    8192,
    16384,
    16385,
    50257,
    131072,
)
_ALIGNED = tuple(product(_WIDTHS, (1, 2, 4, 8, 16), (BF16, FP16, FP32)))
# Arguments before the target, as calls give them.
CALLS = {
    select_gelu_config: list(product((BF16, FP16, FP32), (1, 2))),
    select_tile_config: [(*call, tensors) for call in _ALIGNED for tensors in (1, 2, 3)],
    select_partial_sums_config: [(width,) for width in _WIDTHS],
    select_walk_config: _ALIGNED,
    select_norm_forward_config: [(*call, heavy) for call in _ALIGNED for heavy in (False, True)],
    select_norm_backward_config: [
        (width, alignment, dtypes, heavy)
        for width, alignment, heavy in product(_WIDTHS, (1, 2, 4, 16), (False, True))
        for dtypes in ([BF16] * 2, [BF16, FP32], [FP32] * 2, [FP16] * 3, [BF16, FP32, FP32])
    ],
    select_cross_entropy_forward_config: _ALIGNED,
    select_cross_entropy_backward_config: _ALIGNED,
    select_rotary_config: list(product((1, 3, 16, 31, 32, 64, 100, 128), (0, 1, 64, 65, 128), (BF16, FP32))),
    select_linear_config: [(BF16,), (FP16,), (FP32,)],
    select_attention_config: list(product((16, 64, 80, 128, 160, 192, 256, 512), (BF16, FP16, FP32))),
    select_decode_config: list(
        product((1, 16, 17, 100, 500), (16, 64, 80, 100, 200, 512), (BF16, FP16, FP32))
    )
    + list(product((1, 17, 100), (16, 80, 100, 256), (torch.float8_e4m3fn,))),
}


def named(select):
    return select.__name__.removeprefix("select_").removesuffix("_config")


def entry_of(config, **fields):
    return Measured(asdict(config) | fields, 1.0, 1.2, ("a case",), "a run")


def key_of(select, *arguments):
    with asked_configs() as asked:
        select(*arguments)
    return asked[0].key


def test_every_config_is_chosen_by_a_tunable_function():
    defined = {
        node.name
        for path in KERNELS.glob("_*_config.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("select_")
        and node.name.endswith("_config")
    }
    assert defined == set(_config._overrides) == {select.__name__ for select in CALLS}


@pytest.mark.parametrize("select", CALLS, ids=named)
def test_forced_before_measured_before_modelled(select):
    call = (*CALLS[select][0], H200)
    modelled = select(*call)
    first = fields(modelled)[0].name
    other = {key: value * 2 for key, value in asdict(modelled).items() if isinstance(value, int)}
    if is_dataclass(getattr(modelled, first)):
        numbers = {key: value * 2 for key, value in asdict(modelled)[first].items() if isinstance(value, int)}
        other = {first: asdict(modelled)[first] | numbers}
    table = {select.__name__: {key_of(select, *call): entry_of(modelled, **other)}}
    with measured_configs(table, RUN):
        measured = select(*call)
        assert type(measured) is type(modelled) and measured != modelled and hash(measured)
        assert asdict(measured) == asdict(modelled) | other
        assert select(*call) is measured  # made once
        with forced_config(select, modelled):
            assert select(*call) is modelled
            with forced_config(select.__name__, measured):
                assert select(*call) is measured
            assert select(*call) is modelled
        assert select(*call) is measured
    assert select(*call) == modelled
    assert not _config._overrides[select.__name__].active


def test_measured_ones_are_of_their_key_and_architecture_alone():
    modelled = select_norm_forward_config(4096, 16, BF16, False, H200)
    table = {
        "select_norm_forward_config": {("sm_90", 4096, True, 16, False): entry_of(modelled, num_warps=16)}
    }
    with measured_configs(table, RUN):
        assert select_norm_forward_config(4096, 16, BF16, False, H200).num_warps == 16
        assert select_norm_forward_config(2049, 8, FP16, False, H200).num_warps == 16
        for call in (
            (2048, 16, BF16, False),
            (4096, 1, BF16, False),
            (4096, 16, FP32, False),
            (4096, 16, BF16, True),
        ):
            assert select_norm_forward_config(*call, H200).num_warps != 16
        for target in KNOWN_TARGETS.values():
            if target is not H200:
                assert select_norm_forward_config(4096, 16, BF16, False, target).num_warps != 16


def test_the_interpreter_has_no_measured_ones():
    """Whatever a table holds: its tiles are small so that tests reach several of them."""
    table = {"select_gelu_config": {("interpreter", 16, 1): entry_of(GeluConfig(64, 1))}}
    with measured_configs(table, RUN):
        assert select_gelu_config(BF16, 1, INTERPRETER) == GeluConfig(1024, 4)
        with forced_config(select_gelu_config, GeluConfig(64, 1)):
            assert select_gelu_config(BF16, 1, INTERPRETER) == GeluConfig(64, 1)


def test_programs_of_a_walk_follow_the_multiprocessors():
    """An H100 of 114 multiprocessors takes what was measured on 132, with as many programs on each."""
    modelled = select_norm_backward_config(4096, 16, [BF16] * 2, False, H200)
    table = {
        "select_norm_backward_config": {
            ("sm_90", 4096, True, (16, 16), False): entry_of(modelled, programs=528)
        }
    }
    with measured_configs(table, RUN):
        assert select_norm_backward_config(4096, 16, [BF16] * 2, False, H200).programs == 528
        smaller = select_norm_backward_config(4096, 16, [BF16] * 2, False, replace(H200, multiprocessors=114))
        assert smaller.programs == 4 * 114
        assert smaller.walk == modelled.walk


@pytest.mark.parametrize("select", CALLS, ids=named)
def test_keys_are_few_and_tell_configs_apart(select):
    """What has one key has one modelled config, so that a measured one replaces nothing else than it was timed beside.

    A norm's rows of dtypes are tuples, and nothing in a key is longer than that.
    """
    for target in KNOWN_TARGETS.values():
        configs = defaultdict(set)
        with asked_configs() as asked:
            for call in CALLS[select]:
                select(*call, target)
        for name, key, config in asked:
            assert name == select.__name__ and key[0] == target.name
            assert all(isinstance(value, int | str | tuple) for value in key)
            configs[key].add(config)
        assert all(len(found) == 1 for found in configs.values())
        assert len(configs) <= 240


def test_loads_and_head_dimensions_of_attention_are_in_its_key():
    assert key_of(select_attention_config, 80, BF16, H200, "heavy") == ("sm_90", 16, 128, "heavy")
    assert key_of(select_attention_config, 80, BF16, H200) == ("sm_90", 16, 80, "plain")
    assert key_of(select_attention_config, 192, BF16, H200, "plain", 128) == (
        "sm_90",
        16,
        (192, 128),
        "plain",
    )
    assert key_of(select_attention_config, 512, BF16, H200, "heavy") == ("sm_90", 16, 512, "plain")
    assert key_of(select_attention_config, 64, FP32, H200) == ("sm_90", 32, 64, "plain")
    assert key_of(select_attention_config, 80, torch.float8_e4m3fn, H200) == ("sm_90", 8, 128, "plain")


def test_a_forced_config_is_what_a_kernel_runs_with(device):
    """The kernel reads past no end either: 100 elements in blocks of 32."""
    x = torch.linspace(-3, 3, 100, device=device)
    with asked_configs() as asked, forced_config(select_gelu_config, GeluConfig(32, 1)):
        y = gelu_forward(x, "none")
    assert [one.config for one in asked] == [GeluConfig(32, 1)]
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))


def test_a_config_in_a_config_is_replaced_field_by_field():
    modelled = select_attention_config(128, BF16, H200)
    new = _config.with_fields(modelled, {"forward": {"block_n": 128}, "separate_dk_dv": True})
    assert new.forward == replace(modelled.forward, block_n=128) and isinstance(new.forward, AttentionTiles)
    assert new.separate_dk_dv and not modelled.separate_dk_dv
    assert replace(new, forward=modelled.forward, separate_dk_dv=False) == modelled
    with pytest.raises(TypeError, match="no_such_field"):
        _config.with_fields(modelled, {"no_such_field": 1})


def test_the_shipped_table_is_whole():
    """Every entry names its run, and makes a config of the type that its function returns, with all fields."""
    samples = {select.__name__: select(*calls[0], H200) for select, calls in CALLS.items()}
    for name, entries in MEASURED.items():
        for key, entry in entries.items():
            assert key[0] in KNOWN_TARGETS and entry.run in RUNS
            assert entry.ms < entry.replaced_ms and entry.cases
            assert asdict(_config.with_fields(samples[name], entry.config)) == entry.config


def test_a_forced_config_can_be_of_one_key():
    """A call may ask for two keys, forward and backward, and tuning changes one of them."""
    with forced_config(select_gelu_config, GeluConfig(32, 1), ("sm_90", 16, 1)):
        assert select_gelu_config(BF16, 1, H200) == GeluConfig(32, 1)
        for other in ((BF16, 2, H200), (FP32, 1, H200), (BF16, 1, KNOWN_TARGETS["sm_80"])):
            assert select_gelu_config(*other) != GeluConfig(32, 1)
    assert select_gelu_config(BF16, 1, H200) != GeluConfig(32, 1)


def test_a_measured_form_of_attentions_loop_is_chosen_and_falls_back():
    """To the modelled tiles of pointers where descriptors cannot read the rows: the entry is of another form."""
    modelled = select_attention_config(128, BF16, H200)
    new = select_attention_form(128, BF16, H200, "plain", "descriptors")
    table = {"select_attention_config": {("sm_90", 16, 128, "plain"): entry_of(new)}}
    with measured_configs(table, RUN):
        assert fitting_config(None, True, 128, BF16, H200, "plain") == new
        assert fitting_config(None, False, 128, BF16, H200, "plain") == modelled
        assert fitting_config(None, True, 64, BF16, H200, "plain").forward.form == "pointers"
    assert fitting_config(None, True, 128, BF16, H200, "plain") == modelled


@pytest.mark.parametrize("shipped", FORMS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_was_measured_goes_before_the_form_that_ships(
    shipped: str, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever forms both are of; one that is forced goes before both. An entry may have tiles for dv alone."""
    monkeypatch.setattr(_attention_forms, "SHIPPED_FORM", shipped)
    call = (head_dim, BF16, H200, "plain")
    forms = {form: select_attention_form(*call, form) for form in FORMS if form_reason(*call, form) is None}
    modelled = forms.get(shipped, forms["pointers"])
    assert fitting_config(None, True, *call) == modelled == select_attention_config(*call)
    assert fitting_config(None, False, *call) == forms["pointers"]
    assert select_attention_config(head_dim, FP32, H200).forward.form == "pointers"
    for form, measured in forms.items():
        table = {"select_attention_config": {("sm_90", 16, head_dim, "plain"): entry_of(measured)}}
        with measured_configs(table, RUN):
            with asked_configs() as asked:
                assert fitting_config(None, True, *call) == measured, form
            assert [(of.key, of.config) for of in asked] == [(("sm_90", 16, head_dim, "plain"), measured)]
            assert fitting_config(None, False, *call) == forms["pointers"]
            # A form that is asked for by name is its own.
            assert {name: select_attention_form(*call, name) for name in forms} == forms
            for forced in forms.values():
                with forced_config(select_attention_config, forced):
                    assert fitting_config(None, True, *call) == forced
    assert fitting_config(None, True, *call) == modelled
