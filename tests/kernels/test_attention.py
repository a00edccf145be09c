"""The attention launchers: layouts, memory they may not read, tiles as shipped, determinism."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from fastattn.kernels._arguments import rows_of
from fastattn.kernels._attention_config import score_load, select_attention_config, width_class
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._layout import block_d, rows_contiguous, rows_too_far
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import KNOWN_TARGETS
from fastattn.kernels.attention_backward import attention_backward
from fastattn.kernels.attention_forward import attention_forward
from fastattn.testing import make_tensor
from tests.attention_checks import RESULTS, AttentionCase, assert_attention_accurate, check_attention
from tests.attention_options import Case, check_options

CASE = AttentionCase(causal="bottom_right", seq_q=45, seq_k=67)
SCALE = 0.25  # 1 / sqrt(16)
ALL = (True, True, True, False, False)  # gradients of q, k and v


def run(
    case: AttentionCase, inputs: dict[str, Tensor], config: AttentionConfig | None = None
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv from the launchers."""
    q, k, v, dout, dlse = inputs.values()
    options = options_of(case.causal, 1.0 / math.sqrt(case.head_dim))
    out, lse = attention_forward(q, k, v, *options, config=config)
    gradients = attention_backward(dout, dlse, q, k, v, out, lse, ALL, *options, config=config)
    return dict(zip(RESULTS, (out, lse, *gradients[:3]), strict=True))


def options_of(causal: bool | str = False, scale: float = SCALE) -> AttentionOptions:
    return AttentionOptions(scale, right=0 if causal else -1, bottom_right=causal == "bottom_right")


@pytest.mark.parametrize("shipped", [("sm_90", 64), ("sm_90", 256), ("gfx942", 128)], ids=str)
def test_shipped_tiles_are_right(shipped: tuple[str, int], device: torch.device) -> None:
    """The interpreter's own tiles are small; these are the shapes a GPU runs, two or more tiles each way."""
    arch, head_dim = shipped
    config = select_attention_config(head_dim, torch.bfloat16, KNOWN_TARGETS[arch])
    case = AttentionCase(
        seq_q=150, seq_k=133, head_dim=head_dim, heads=1, causal="bottom_right", dtype=torch.bfloat16
    )
    inputs = case.inputs(device)
    assert_attention_accurate(case, inputs, run(case, inputs, config))


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (64, 16)])
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_uneven_tiles_cover_every_score(
    block_m: int, block_n: int, causal: bool | str, device: torch.device
) -> None:
    """Tiles much longer one way than the other: several diagonal tiles a program, in both kernels' loops."""
    tiles = AttentionTiles(block_m, block_n, 1, 1)
    config = AttentionConfig(tiles, tiles, tiles, separate_dk_dv=not causal, delta=tiles)
    case = AttentionCase(seq_q=70, seq_k=90, causal=causal)
    inputs = case.inputs(device)
    assert_attention_accurate(case, inputs, run(case, inputs, config))


def _packed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v as views of (batch, seq, heads, head_dim) memory, with NaN between the rows."""
    return {name: _with_gaps(t) if t.dim() == 4 else t for name, t in inputs.items()}


def _with_gaps(tensor: Tensor) -> Tensor:
    batch, heads, seq, width = tensor.shape
    strides = (seq * heads * (width + 3), width + 3, heads * (width + 3), 1)
    memory = tensor.new_full((batch * seq * heads * (width + 3),), math.nan)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


def _expanded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys, values and the incoming gradient shared by the batch with a stride of 0."""
    return {name: t if name in ("q", "dlse") else t[:1].expand(2, *t.shape[1:]) for name, t in inputs.items()}


def _column_major(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A last dimension that is not contiguous: the launcher copies."""
    return {name: t.mT.contiguous().mT if t.dim() == 4 else t for name, t in inputs.items()}


LAYOUTS = {"packed-nan-gaps": _packed, "expanded": _expanded, "column-major": _column_major}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: object, device: torch.device) -> None:
    case = AttentionCase(batch=2, causal="top_left", seq_q=35, seq_k=40)
    inputs = layout(case.inputs(device))
    actual = run(case, inputs)
    assert_attention_accurate(case, inputs, actual)
    assert all(actual[name].stride(-1) == 1 for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("head_dim, unit", [(16, 1), (17, 1), (18, 2), (20, 4), (24, 8)])
def test_strides_count_units(head_dim: int, unit: int, device: torch.device) -> None:
    """Of every tensor in every kernel: rows that 16 elements do not divide, but 2, 4 or 8 do."""
    assert rows_of(torch.empty(1, 2, 3, head_dim)).unit.value == unit
    case = AttentionCase(batch=2, seq_q=35, seq_k=20, head_dim=head_dim)
    inputs = case.inputs(device)
    assert_attention_accurate(case, inputs, run(case, inputs))
    check_options(Case(1, 2, 1, 20, 20, head_dim=head_dim, v_dim=head_dim, bias="hqk"), "triton", device)


def test_output_follows_the_strides_of_the_query(device: torch.device) -> None:
    q = make_tensor(2, 5, 3, 16, device=device).transpose(1, 2)
    out, _ = attention_forward(q, q, q, *options_of())
    assert out.stride() == q.stride()


def test_rows_too_far_apart_for_32_bits_are_copied() -> None:
    near = torch.empty(1, device="meta").as_strided((1, 1, 4, 16), (0, 0, 2**23 - 1, 1))
    far = torch.empty(1, device="meta").as_strided((1, 1, 4, 16), (0, 0, 2**23, 1))
    assert rows_contiguous(near) is near
    assert rows_contiguous(far).stride(2) == 16


def test_planes_too_far_apart_for_32_bits_are_refused() -> None:
    """A bias or mask is never copied; strides of a dimension of size 1 do not count."""
    memory = torch.empty(1, device="meta")
    assert not rows_too_far(memory.as_strided((1, 1, 4, 16), (2**40, 2**40, 2**22 - 1, 1)))
    assert rows_too_far(memory.as_strided((1, 1, 4, 16), (0, 0, 2**22, 1)))
    assert rows_too_far(memory.as_strided((1, 1, 1, 16), (0, 0, 0, 2**22)))
    assert not rows_too_far(memory.as_strided((1, 1, 1, 16), (0, 0, 2**40, 1)))


def test_every_element_of_the_results_is_written(device: torch.device) -> None:
    """Deterministic mode fills fresh memory with NaN, so an element that no program writes shows."""
    inputs = CASE.inputs(device)
    torch.use_deterministic_algorithms(True)
    try:
        actual = run(CASE, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_attention_accurate(CASE, inputs, actual)


def test_runs_are_equal_bit_for_bit_and_inputs_untouched(device: torch.device) -> None:
    inputs = CASE.inputs(device)
    kept = {name: t.clone() for name, t in inputs.items()}
    first, second = run(CASE, inputs), run(CASE, inputs)
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)
    assert all(torch.equal(inputs[name], kept[name]) for name in inputs)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)], ids=str)
def test_only_needed_gradients_are_computed(
    needs: tuple[int, ...], separate: bool, device: torch.device
) -> None:
    inputs = CASE.inputs(device)
    tiles = AttentionTiles(32, 32, 1, 1)
    config = AttentionConfig(tiles, tiles, tiles, separate, tiles)
    full = run(CASE, inputs, config)
    q, k, v, dout, dlse = inputs.values()
    flags = [bool(need) for need in needs]
    options = options_of("bottom_right")
    results = attention_backward(
        dout, dlse, q, k, v, full["out"], full["lse"], [*flags, False, False], *options, config=config
    )
    for name, gradient, needed in zip(RESULTS[2:], results[:3], flags, strict=True):
        assert torch.equal(gradient, full[name] if needed else gradient.new_empty(0))


def test_nan_in_one_row_stays_there(device: torch.device) -> None:
    """A NaN query spoils its own output row and nothing else."""
    q, k, v, _, _ = CASE.inputs(device).values()
    q = q.clone()
    q[0, 1, 40] = math.nan
    out, lse = attention_forward(q, k, v, *options_of())
    assert out[0, 1, 40].isnan().all() and lse[0, 1, 40].isnan()
    out[0, 1, 40], lse[0, 1, 40] = 0.0, 0.0
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("head_dim, width", [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128), (192, 256)])
def test_head_dims_are_padded_to_powers_of_two(head_dim: int, width: int) -> None:
    assert block_d(head_dim) == width


@pytest.mark.parametrize("arch", KNOWN_TARGETS)
def test_every_target_has_a_config(arch: str) -> None:
    """A pure function of head dimension, dtype and target, which no sequence length changes."""
    for head_dim in range(1, 257):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            config = select_attention_config(head_dim, dtype, KNOWN_TARGETS[arch])
            width = width_class(head_dim, dtype, KNOWN_TARGETS[arch], "plain")
            assert config is select_attention_config(width, dtype, KNOWN_TARGETS[arch])
            for tiles in (config.forward, config.dq, config.dk_dv):
                assert min(tiles.block_m, tiles.block_n) >= 16
                assert tiles.num_warps in (1, 2, 4, 8)


def test_tiles_follow_what_modifies_a_score() -> None:
    """A mask of padding, a tile of which is one row, keeps the tiles of a call without; a whole bias does not."""
    plain, whole = AttentionOptions(1.0), torch.empty(1, 4, 128, 128)
    padding = torch.empty(2, 1, 1, 128, dtype=torch.bool)
    loads = {
        "plain": plain._replace(right=0, bottom_right=True, sinks=torch.empty(4)),
        "light": plain._replace(left=5, softcap=30.0),
        "thin": plain._replace(mask=padding.expand(2, 4, 128, 128), left=5),
        "plane": plain._replace(bias=whole, mask=padding),
        "heavy": plain._replace(dropout_p=0.1),
    }
    assert {name: score_load(options) for name, options in loads.items()} == {name: name for name in loads}
    assert score_load(plain._replace(bias=whole, softcap=30.0)) == "heavy"
    assert score_load(plain._replace(left=5, softcap=30.0, mask=padding)) == "heavy"
    config = {
        load: select_attention_config(64, torch.bfloat16, KNOWN_TARGETS["sm_90"], load) for load in loads
    }
    assert config["thin"].forward == config["light"].forward == config["plain"].forward
    assert config["plane"].forward != config["plain"].forward != config["heavy"].forward
    for arch, head_dim, dtype in product(KNOWN_TARGETS, (64, 128, 256), (torch.bfloat16, torch.float32)):
        for load in loads:
            tiles = select_attention_config(head_dim, dtype, KNOWN_TARGETS[arch], load).dbias
            assert min(tiles.block_m, tiles.block_n) >= 16


REAL_SIZES = [
    AttentionCase(2, 16, 4, 1024, 1024, 64, "top_left", None, torch.bfloat16),
    AttentionCase(1, 8, 8, 2048, 2048, 128, False, None, torch.bfloat16),
    AttentionCase(1, 8, 2, 777, 1999, 128, "bottom_right", None, torch.float16),
    AttentionCase(1, 4, 2, 1025, 511, 80, "bottom_right", None, torch.bfloat16),
    AttentionCase(1, 4, 4, 1000, 1000, 256, "top_left", None, torch.bfloat16),
    AttentionCase(1, 4, 1, 640, 1280, 192, False, None, torch.float16),
    AttentionCase(1, 4, 2, 500, 700, 64, "top_left", None, torch.float32),
    AttentionCase(1, 2, 1, 300, 200, 128, False, None, torch.float32),
    AttentionCase(1, 2, 1, 300, 200, 256, "bottom_right", None, torch.float32),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: AttentionCase) -> None:
    check_attention(case, "triton", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 112, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_head_dim_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    case = AttentionCase(1, 4, 2, 257, 391, head_dim, "bottom_right", None, dtype)
    check_attention(case, "triton", torch.device("cuda"))


@pytest.mark.gpu
def test_repeats_are_equal_bit_for_bit_on_the_gpu() -> None:
    """A race would show as a result that moves between runs."""
    case = AttentionCase(2, 16, 4, 2048, 2048, 128, "top_left", None, torch.bfloat16)
    inputs = case.inputs(torch.device("cuda"))
    first = run(case, inputs)
    for _ in range(20):
        again = run(case, inputs)
        assert all(torch.equal(first[name], again[name]) for name in RESULTS)


@pytest.mark.gpu
def test_more_than_2_to_31_elements() -> None:
    """Offsets of 32 bits would wrap in the last head: its rows lie beyond 2^31 elements."""
    q = torch.randn(1, 17, 2**21, 64, device="cuda", dtype=torch.bfloat16)[:, :, :]
    assert q.numel() > 2**31
    k = torch.randn(1, 17, 64, 64, device="cuda", dtype=torch.bfloat16)
    out, _ = attention_forward(q, k, k, *options_of(scale=0.125))
    q_end, k_end = q[:, -1:, -128:].clone(), k[:, -1:].clone()
    last, _ = attention_forward(q_end, k_end, k_end, *options_of(scale=0.125))
    assert torch.equal(out[:, -1:, -128:], last)
