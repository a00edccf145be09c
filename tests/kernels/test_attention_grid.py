"""How attention of few queries is launched: what chooses the grid, its plans, and what `explain` says of it."""

from __future__ import annotations

import math
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.kernels._attention_decode_config import select_decode_config
from fastattn.kernels._attention_grid import FewQueriesGrid, counted_keys, splits_to_fill
from fastattn.kernels._attention_plan import _forward_plan
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import KNOWN_TARGETS
from fastattn.kernels.attention_forward import attention_forward
from fastattn.ops import _attention_triton
from fastattn.ops._attention_call import Features
from fastattn.testing import make_tensor
from tests.few_queries import decode_inputs, grid_for, grid_of

H200 = KNOWN_TARGETS["sm_90"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _meta(batch: int, heads: int, seq: int, width: int = 128) -> Tensor:
    return torch.empty(batch, heads, seq, width, dtype=BF16, device="meta")


GRIDS = {
    "32-heads-of-8": ((1, 32, 8, 1, 32768), {}, (True, 33)),
    "a-batch": ((16, 32, 8, 1, 8192), {}, (True, 2)),
    "a-full-device": ((64, 32, 8, 1, 4096), {}, (True, 1)),
    "tokens-of-a-draft": ((1, 32, 8, 8, 32768), {}, (True, 33)),
    "one-key-head": ((1, 32, 1, 1, 131072), {}, (True, 264)),
    "short-keys": ((1, 32, 8, 1, 1024), {}, (True, 4)),
    "fewer-keys-than-a-split": ((1, 32, 8, 1, 100), {}, (True, 1)),
    "no-groups": ((1, 8, 8, 1, 32768), {}, (False, 33)),
    "a-window": ((1, 32, 8, 1, 32768), {"left": 1023, "right": 0, "bottom_right": True}, (True, 4)),
    # Without a right end the last query sees no key but those before it, as no others are there.
    "a-window-without-a-right-end": ((1, 32, 8, 1, 32768), {"left": 1023, "bottom_right": True}, (True, 4)),
    "a-window-beyond-the-keys": (
        (1, 32, 8, 1, 32768),
        {"left": 1023, "right": 9999, "bottom_right": True},
        (True, 4),
    ),
    "a-window-at-the-top-left": ((1, 32, 8, 1, 32768), {"left": 1023, "right": 512}, (True, 2)),
    "a-top-left-window-without-a-right-end": ((1, 32, 8, 1, 32768), {"left": 1023}, (True, 33)),
    "top-left": ((1, 32, 8, 1, 32768), {"right": 0}, (True, 1)),
    "bottom-right": ((1, 32, 8, 1, 32768), {"right": 0, "bottom_right": True}, (True, 33)),
    "more-queries": ((1, 32, 8, 32, 32768), {}, (True, 16)),
    "more-queries-than-fold": ((1, 32, 8, 64, 32768), {}, (False, 8)),
    "as-many-queries-as-keys": ((8, 12, 12, 128, 128), {}, None),
    "a-training": ((2, 16, 4, 129, 32768), {}, None),
    "a-bias-of-each-head": ((1, 32, 8, 1, 32768), {"bias": (1, 32, 1, 32768)}, (False, 8)),
    "a-bias-of-all-heads": ((1, 32, 8, 1, 32768), {"bias": (1, 1, 1, 32768)}, (True, 33)),
    "dropout": ((1, 32, 8, 1, 32768), {"dropout_p": 0.1}, (False, 8)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_a_pure_function(name: str) -> None:
    (batch, heads, kv_heads, seq_q, seq_k), options, expected = GRIDS[name]
    given = {n: torch.empty(x, device="meta") if isinstance(x, tuple) else x for n, x in options.items()}
    q, v = _meta(batch, heads, seq_q), _meta(batch, kv_heads, seq_k)
    asked = AttentionOptions(1.0, **given)
    assert grid_of(q, v, asked, H200) == expected
    few = grid_for(q, v, asked, H200)
    if expected is not None:
        assert isinstance(few, FewQueriesGrid) and few.tiles.form == "pointers" and few.tiles.block_m >= 64


REACHES = {
    "full": {},
    "bottom-right": {"right": 0, "bottom_right": True},
    "top-left": {"right": 5},
    "window": {"left": 40, "right": 3, "bottom_right": True},
    "left": {"left": 40, "bottom_right": True},
    "left-top-left": {"left": 40},
}


@pytest.mark.parametrize("name", REACHES)
def test_keys_are_counted_as_the_mask_shows_them(name: str) -> None:
    """From the first key that any query sees to the last, in round numbers from below."""
    asked = AttentionOptions(1.0, **REACHES[name])
    for seq_q, seq_k in product((1, 3, 16), (1, 31, 32, 33, 90, 257)):
        rows, keys = torch.arange(seq_q)[:, None], torch.arange(seq_k)[None]
        place = rows + (seq_k - seq_q if asked.bottom_right else 0)
        seen = torch.ones(seq_q, seq_k, dtype=torch.bool)
        seen &= keys >= place - asked.left if asked.left >= 0 else seen
        seen &= keys <= place + asked.right if asked.right >= 0 else seen
        columns = seen.any(0).nonzero()
        exact = int(columns[-1] - columns[0]) + 1 if len(columns) else 0
        reach = (asked.left, asked.right, asked.bottom_right, 1, seq_q, seq_k)
        assert (counted_keys(reach, exact=True), counted_keys(reach)) == (exact, exact // 32 * 32)


def test_keys_are_counted_in_round_numbers() -> None:
    """From below by at most a sixteenth or 31, the same again when counted again, and few of them."""
    everything = [counted_keys((-1, -1, False, 1, 1, seq_k)) for seq_k in range(1 << 17)]
    assert len(set(everything)) <= 8 * 16 + 16
    for seq_k, counted in enumerate(everything):
        assert 0 <= seq_k - counted <= max(31, seq_k // 16)
        assert counted % 32 == 0 and counted_keys((-1, -1, False, 1, 1, counted)) == counted


CACHES = {
    # One that is concatenated anew at each step, so that strides of batches and heads change, and one that is filled.
    "concatenated": lambda cache, length: cache[:, :, :length].contiguous(),
    "filled": lambda cache, length: cache[:, :, :length],
    "filled-seq-first": lambda cache, length: cache.transpose(1, 2).contiguous()[:, :length].transpose(1, 2),
}


@pytest.mark.parametrize("layout", CACHES)
@pytest.mark.parametrize("name", ["full", "bottom-right", "window", "packed"])
def test_a_growing_cache_has_few_plans(name: str, layout: str, device: torch.device) -> None:
    """And each call its own number of keys: NaN lies behind, and a plan with an old number would miss the last key.

    From 60 to 70 keys 64 are passed, where the interpreter begins to split.
    """
    q, k, v = (t.to(device) for t in decode_inputs(1, 4))
    for tensor in (k, v):
        tensor[:, :, 70:] = math.nan
    asked = AttentionOptions(0.25, **REACHES.get(name, {}))
    if name == "packed":
        q, k, v = q[:1], k[:1], v[:1]
    before, grids = _forward_plan.cache_info().misses, set()
    for length in range(60, 70, 3):
        keys, values = (CACHES[layout](t, length) for t in (k, v))
        if name == "packed":
            starts = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (1, length)]
            asked = AttentionOptions(
                0.25, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlen_q=1, max_seqlen_k=length
            )
        found = attention_forward(q, keys, values, *asked)
        grids.add(grid_of(q, values, asked))
        window = (asked.left, None) if asked.left >= 0 else None
        wide = [t.double() for t in (q, keys, values)]
        expected = reference.attention(*wide, scale=0.25, return_lse=True, window=window)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, atol=2e-6, rtol=2e-6)
    assert grids == ({(True, 1)} if name == "window" else {(True, 1), (True, 2)})
    assert _forward_plan.cache_info().misses - before <= (1 if name == "window" else 2)


CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "no-groups": ((2, 2, 1, 133), {}),
    "groups": ((4, 1, 1, 95), {}),
    "causal": ((4, 2, 3, 101), {"causal": "bottom_right"}),
    "window": ((4, 2, 1, 133), {"window": (90, None)}),
    "short-window": ((4, 2, 1, 133), {"window": (40, None)}),
    "dropout": ((2, 1, 3, 100), {"dropout_p": 0.5}),
    "mask-of-each-head": ((2, 1, 3, 100), {"mask": (2, 1, 100)}),
    "mask-of-all-heads": ((2, 1, 3, 100), {"mask": (1, 100)}),
    "more-queries": ((2, 1, 90, 30), {}),
    "packed": ((4, 1, 3, 133), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_explain_names_the_grid_that_is_launched(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads in a tile and splits, as the launcher has them."""
    (heads, kv_heads, seq_q, seq_k), options = CALLS[name]
    q, k = (make_tensor(1, *shape, 16).to(device) for shape in ((heads, seq_q), (kv_heads, seq_k)))
    given = {
        n: torch.ones(x, dtype=torch.bool, device=device) if n == "mask" else x for n, x in options.items()
    }
    function, tensors = fastattn.attention, (q, k, k)
    if name == "packed":
        starts = (torch.tensor([0, n], device=device, dtype=torch.int32) for n in (seq_q, seq_k))
        function = fastattn.attention_varlen
        tensors = (*(t[0].transpose(0, 1) for t in tensors), *starts, seq_q, seq_k)
    launched: list[str] = []

    def launch(_kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], **_others: Any) -> None:
        parts = [f"{constants['GROUPS']} query heads in a tile"] if constants["FOLDED"] else []
        parts += [f"keys in {grid[1]} splits"] if constants["SPLIT"] else []
        launched.append("; the forward with " + " and ".join(parts) if parts else "")

    described = fastattn.explain(function, *tensors, **given, implementation="triton").description
    monkeypatch.setattr(import_module("fastattn.kernels.attention_forward"), "launch", launch)
    function(*tensors, **given, implementation="triton")
    assert [described.partition("rows by pointers")[2].partition(" of about ")[0]] == launched


SAID = {
    "32-heads-of-8": "; the forward with 4 query heads in a tile and keys in 33 splits of about 993",
    "a-window": "; the forward with 4 query heads in a tile and keys in 4 splits of about 256",
    "a-full-device": "; the forward with 4 query heads in a tile",
    "no-groups": "; the forward with keys in 33 splits of about 993",
    "a-training": "",
}


@pytest.mark.parametrize("name", SAID)
def test_explain_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch, heads, kv_heads, seq_q, seq_k), options, _ = GRIDS[name]
    monkeypatch.setattr(_attention_triton, "target_of", lambda device: H200)
    q, k = _meta(batch, heads, seq_q), _meta(batch, kv_heads, seq_k)
    features = Features(window=(options["left"], 0)) if options else None
    described = _attention_triton.describe_triton(q, k, k, False, None, features, False)
    assert described == "fused Triton kernels, memory linear in the sequence; rows by pointers" + SAID[name]
    quantized = Features(quantize="e4m3")
    on_e4m3 = _attention_triton.describe_triton(q, k, k, False, None, quantized, False)
    assert "e4m3 products" in on_e4m3
    for words in ("splits", "query heads in a tile"):
        assert (words in on_e4m3) == (words in SAID[name])


def test_explain_of_nothing(device: torch.device) -> None:
    """Without queries or keys no kernel is launched, and without key heads none can be divided."""
    q, k = torch.empty(1, 2, 1, 16, device=device), torch.empty(1, 2, 0, 16, device=device)
    for pair in ((q, k), (k, q), (q[:, :0], q[:, :0])):
        said = fastattn.explain(*pair, pair[1], implementation="triton").description
        assert said.endswith("rows by pointers")


def test_splits_fill_rounds() -> None:
    """Whole rounds, or the fullest of up to four; 1 where there are more programs than those hold."""
    counts = {0: 1, 1: 264, 8: 33, 100: 5, 128: 2, 132: 2, 264: 1, 265: 3, 500: 1, 5000: 1}
    assert {programs: splits_to_fill(programs, 264) for programs in counts} == counts
    for programs in range(1, 1200):
        found = splits_to_fill(programs, 264)
        assert found >= 1 and (found == 1 or programs * found <= 4 * 264)
        assert programs > 264 or found * programs >= 0.75 * 264


@pytest.mark.parametrize("arch", KNOWN_TARGETS)
def test_every_target_has_tiles_for_few_rows(arch: str) -> None:
    target = KNOWN_TARGETS[arch]
    for rows, width, dtype in product(
        (1, 16, 17, 64, 65, 500), (16, 40, 64, 96, 100, 256, 512), (BF16, FP16, FP32)
    ):
        config = select_decode_config(rows, width, dtype, target)
        assert config.tiles.form == "pointers" and min(config.tiles.block_m, config.tiles.block_n) >= 16
        assert config.programs % target.multiprocessors == 0 and config.least_keys % 32 == 0
        # Fewer rows never take a larger tile.
        assert config.tiles.block_m <= select_decode_config(rows + 64, width, dtype, target).tiles.block_m
