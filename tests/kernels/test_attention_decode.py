"""Attention of few queries: heads of a group in the rows of one tile, and keys in splits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.kernels._attention_decode_config import CombineTiles, DecodeConfig, select_decode_config
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._config import forced_config
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels._target import INTERPRETER
from fastattn.kernels.attention_forward import attention_forward
from fastattn.testing import assert_accurate, make_tensor
from tests.attention_checks import AttentionCase
from tests.attention_options import Case, check_options, make_inputs, make_options
from tests.few_queries import decode_inputs, grid_for, grid_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TILES = AttentionTiles(16, 16, 1, 1, one_loop=True)
PLAIN = AttentionConfig(*[AttentionTiles(16, 16, 1, 1)] * 3)


# With what the interpreter makes of each: whether heads share a tile, and in how many the keys are split.
CASES = [
    (Case(batch=1, heads=2, kv_heads=2, seq_q=1, seq_k=133, head_dim=40, v_dim=24), (False, 4)),
    (Case(heads=4, kv_heads=1, seq_q=1, seq_k=95, head_dim=64, v_dim=64, dtype=BF16, sinks=True), (True, 2)),
    (Case(batch=1, kv_heads=1, seq_q=3, seq_k=101, causal="bottom_right", alibi="bh"), (True, 3)),
    (Case(batch=1, heads=3, kv_heads=1, seq_q=7, seq_k=133, causal="top_left"), (True, 1)),
    # The first query sees one key of a window that reaches beyond the keys, the last ones of the rest.
    (Case(batch=1, heads=6, seq_q=5, seq_k=133, window=(70, 9), softcap=2.0, sinks=True), (True, 2)),
    # Without a right end.
    (Case(batch=1, heads=2, kv_heads=1, seq_q=3, seq_k=133, window=(70, -1)), (True, 2)),
    # More queries than keys: the first ones see none.
    (Case(batch=1, heads=8, seq_q=16, seq_k=9, causal="bottom_right"), (True, 1)),
    (Case(heads=2, kv_heads=1, seq_q=4, seq_k=70, lengths=True, mask="bk"), (True, 2)),
    (Case(batch=1, heads=2, kv_heads=1, seq_q=3, seq_k=70, mask="hk", bias="qk"), (False, 2)),
    (Case(batch=1, heads=2, kv_heads=1, seq_q=3, seq_k=70, bias="qk", mask="bqk"), (True, 2)),
    (Case(batch=1, heads=2, kv_heads=1, seq_q=2, seq_k=70, dropout_p=0.25), (False, 2)),
    (Case(heads=4, seq_q=5, seq_k=133, packed=True, lengths=True, sinks=True, alibi="bh"), (True, 2)),
    (Case(batch=3, heads=2, seq_q=20, seq_k=100, packed=True, causal="bottom_right", dtype=FP16), (False, 2)),
]


@pytest.mark.parametrize("case, grid", CASES, ids=[str(case) for case, _ in CASES])
def test_few_queries_are_right(case: Case, grid: tuple[bool, int], device: torch.device) -> None:
    """Every option, forward and, from what the splits make of out and lse, backward."""
    inputs = make_inputs(case)
    assert grid_of(inputs["q"], inputs["v"], make_options(case, inputs)) == grid
    check_options(case, "triton", device)


@contextmanager
def splits(count: int, programs: int, block_s: int = 4) -> Iterator[None]:
    """Within the block, tiles of 16 rows and keys, and so many splits for a grid of so many programs, however short."""
    config = DecodeConfig(TILES, count * programs, 1, CombineTiles(block_s, 1))
    with forced_config(select_decode_config, config):
        yield


OPTIONS = {
    "full": {},
    "bottom-right": {"right": 0, "bottom_right": True},
    "top-left": {"right": 0},
    # The second tile of the three queries begins with the last key of a tile.
    "window": {"left": 53, "right": 3, "bottom_right": True},
    "softcap": {"softcap": 1.5},
}


@pytest.mark.parametrize(
    "seq_q, groups, name",
    [
        (1, 1, "full"),
        (1, 4, "full"),
        (1, 8, "bottom-right"),
        (3, 8, "full"),
        (3, 8, "window"),
        (7, 4, "bottom-right"),
        (7, 4, "top-left"),
        (7, 3, "softcap"),
    ],
)
def test_splits_are_the_unsplit_kernel(seq_q: int, groups: int, name: str, device: torch.device) -> None:
    """Also in more splits than there are tiles of keys: the float32 results of both differ in the order of sums."""
    q, k, v = (t.to(device) for t in decode_inputs(seq_q, groups, 1, 40))
    asked = AttentionOptions(0.16, **OPTIONS[name])
    expected = attention_forward(q, k, v, *asked, config=PLAIN)
    programs = -(-seq_q * groups // 16) * 2
    for count in (1, 3, 21):
        with splits(count, programs):
            few = grid_for(q, v, asked, INTERPRETER)
            assert few is not None and few.folded == (groups > 1)
            if name == "full":  # visible keys bound it elsewhere
                assert few.grid == ((programs,) if count == 1 else (programs, count))
            found = attention_forward(q, k, v, *asked)
        for name_of, one, other in zip(("out", "lse"), found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-6, msg=f"{name_of}, {count} splits")


@pytest.mark.parametrize("sinks", [None, "sinks"])
@pytest.mark.parametrize("seq_q", [1, 3])
def test_keys_that_are_hidden_are_not_read(seq_q: int, sinks: str | None, device: torch.device) -> None:
    """Caches that hold 0, 1, 37 and 133 of 133 keys, NaN and infinity behind, each in splits of its own keys."""
    lengths = torch.tensor([0, 1, 37, 133], dtype=torch.int32)
    q = make_tensor(4, 4, seq_q, 16, seed=0)
    k, v = (make_tensor(4, 2, 133, 16, seed=seed) for seed in (1, 2))
    sink = None if sinks is None else make_tensor(4, seed=3)
    truth = [
        reference.attention(
            *(t[n : n + 1].double() for t in (q, k, v)),
            key_lengths=lengths[n : n + 1],
            sinks=None if sink is None else sink.double(),
            scale=0.25,
            return_lse=True,
        )
        for n in range(4)
    ]
    for n, length in enumerate(lengths):
        k[n, :, length:], v[n, :, length:] = math.nan, math.inf
    asked = AttentionOptions(0.25, sinks=sink, key_lengths=lengths)
    q, k, v = (t.to(device) for t in (q, k, v))
    asked = asked._replace(**{n: t.to(device) for n, t in asked._asdict().items() if isinstance(t, Tensor)})
    for count in (1, 3, 20):
        with splits(count, 8):
            assert grid_of(q, v, asked) == (True, count)
            found = attention_forward(q, k, v, *asked)
        for one, parts in zip(found, zip(*truth, strict=True), strict=True):
            torch.testing.assert_close(one.double().cpu(), torch.cat(parts), atol=1e-6, rtol=1e-6)
        assert found[0][0].eq(0).all()
        expected = torch.full((4,), -math.inf) if sink is None else sink
        torch.testing.assert_close(found[1][0], expected.to(device)[:, None].expand(4, seq_q))


def test_large_scores_keep_their_digits(device: torch.device) -> None:
    """Scores of 2^15 in base 2, exact to an eighth: the log-sum-exp of a split would be rounded to 1/256 there, and so
    would be the weights between two of them. Splits keep maxima and sums instead.
    """
    q, k, v = (t.to(device) for t in decode_inputs(1, 4))
    q, k = torch.ones_like(q), (k * 8).round() / 8
    k[..., 0] = 2.0**15
    scale = math.log(2.0)
    truth = reference.attention(q.double(), k.double(), v.double(), scale=scale)
    with splits(5, 4):
        found = attention_forward(q, k, v, *AttentionOptions(scale))[0]
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=0)


def test_runs_are_equal_bit_for_bit_and_write_every_row(poisoned_memory: None, device: torch.device) -> None:
    """Rows that no sequence covers have no split either: what lies in the buffers there, NaN, goes nowhere."""
    q, k, v = (
        t.to(device) for t in (make_tensor(1, h, n, 16, seed=h) for h, n in ((4, 23), (2, 301), (2, 301)))
    )
    starts_q = torch.tensor([2, 3, 3, 10, 21], dtype=torch.int32, device=device)
    starts_k = torch.tensor([1, 140, 150, 151, 300], dtype=torch.int32, device=device)
    asked = AttentionOptions(
        0.25, -1, 0, True, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=11, max_seqlen_k=149
    )
    with splits(3, 2 * 2 * 4):
        assert grid_of(q, v, asked) == (True, 3)
        runs = [attention_forward(q, k, v, *asked) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    out, lse = runs[0]
    truth, lse_truth = reference.attention_varlen(
        *(t[0].transpose(0, 1).double() for t in (q, k, v)), starts_q, starts_k, causal="bottom_right", scale=0.25,
        return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out[0].transpose(0, 1).double(), truth, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse[0].double(), lse_truth, atol=1e-6, rtol=1e-6)


def test_nan_in_one_row_stays_there(device: torch.device) -> None:
    """Rows of several heads share a tile, and splits a row: a NaN query spoils its own row and nothing else."""
    q, k, v = (t.to(device) for t in decode_inputs(3, 4))
    q[0, 5, 1] = math.nan
    with splits(4, 4):
        out, lse = attention_forward(q, k, v, *AttentionOptions(0.25))
    assert out[0, 5, 1].isnan().all() and lse[0, 5, 1].isnan()
    out[0, 5, 1], lse[0, 5, 1] = 0.0, 0.0
    assert out.isfinite().all() and lse.isfinite().all()


def test_layouts_and_inputs_of_a_cache(device: torch.device) -> None:
    """q as a projection leaves it, k and v the filled part of a cache (batch, seq, heads, width), NaN behind."""
    q, k, v = (t.to(device) for t in decode_inputs(3, 4))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    caches = [torch.full((2, 150, 2, 16), math.nan, device=device) for _ in "kv"]
    for cache, tensor in zip(caches, (k, v), strict=True):
        cache[:, :133] = tensor.transpose(1, 2)
    views = [cache[:, :133].transpose(1, 2) for cache in caches]
    kept = [t.clone() for t in (q, *views)]
    asked = AttentionOptions(0.25, right=0, bottom_right=True)
    with splits(4, 4):
        found = attention_forward(q, *views, *asked)
        expected = attention_forward(q.contiguous(), k, v, *asked)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[0].stride() == q.stride()
    assert all(torch.equal(one, other) for one, other in zip(kept, (q, *views), strict=True))


def test_public_functions_take_few_queries(device: torch.device) -> None:
    """`attention`, PyTorch's signature with a mask of padding, and packed sequences, by the kernels."""
    q, k, v = (t.to(device) for t in decode_inputs(1, 4))
    truth = reference.attention(q.double(), k.double(), v.double())
    peer = reference.attention(q, k, v)
    with fastattn.use_implementation("triton"):
        found = fastattn.attention(q, k, v)
        assert_accurate(found, peer, truth, name="attention")
        seen = torch.ones(2, 1, 1, 133, dtype=torch.bool, device=device)
        masked = fastattn.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        torch.testing.assert_close(masked, found, atol=1e-6, rtol=1e-6)
        starts = [torch.arange(3, device=device) * n for n in (1, 133)]
        rows = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        packed = fastattn.attention_varlen(*rows, *starts, 1, 133)
        torch.testing.assert_close(packed.unflatten(0, (2, 1)).transpose(1, 2), found, atol=1e-6, rtol=1e-6)


REAL_SIZES = [
    AttentionCase(1, 32, 8, 1, 32768, 128, False, None, BF16),
    AttentionCase(16, 32, 8, 1, 8191, 128, "bottom_right", None, BF16),
    AttentionCase(1, 32, 1, 1, 30001, 128, False, None, FP16),
    AttentionCase(2, 16, 16, 1, 5000, 64, False, None, BF16),
    AttentionCase(1, 24, 4, 5, 9999, 64, "bottom_right", None, BF16),
    AttentionCase(1, 8, 1, 16, 4097, 256, "bottom_right", None, FP16),
    AttentionCase(1, 8, 2, 100, 20000, 80, "bottom_right", None, BF16),
    AttentionCase(1, 8, 2, 3, 3001, 128, "bottom_right", None, FP32),
    AttentionCase(1, 4, 1, 2, 3001, 320, False, None, BF16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: AttentionCase) -> None:
    inputs = case.inputs(torch.device("cuda"))
    tensors, call = (inputs["q"], inputs["k"], inputs["v"]), {"causal": case.causal, "return_lse": True}
    with torch.no_grad():
        found = fastattn.attention(*tensors, **call, implementation="triton")
        truth = reference.attention(*(t.double() for t in tensors), **call)
        peer = reference.attention(*tensors, **call)
        again = [fastattn.attention(*tensors, **call, implementation="triton") for _ in range(10)]
    for name, *results in zip(("out", "lse"), found, peer, truth, strict=True):
        assert_accurate(*results, name=name)
    assert all(torch.equal(one, other) for run in again for one, other in zip(found, run, strict=True))


@pytest.mark.gpu
def test_a_partly_filled_cache_in_a_graph() -> None:
    """Lengths are read on the device: a graph that was captured once serves a cache that fills."""
    q, cache = (
        torch.randn(2, 32, 1, 128, device="cuda", dtype=BF16),
        torch.full((2, 2, 8, 8192, 128), math.nan),
    )
    cache = cache.to("cuda", BF16)
    lengths = torch.tensor([0, 0], device="cuda", dtype=torch.int32)
    for _ in range(3):
        fastattn.attention(q, *cache, key_lengths=lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.attention(q, *cache, key_lengths=lengths)
    for filled in ([1, 0], [77, 5000], [8192, 4097]):
        for n, length in enumerate(filled):
            cache[:, n, :, :length] = torch.randn(2, 8, length, 128, device="cuda", dtype=BF16)
        lengths.copy_(torch.tensor(filled))
        graph.replay()
        truth = reference.attention(q.double(), *cache.nan_to_num().double(), key_lengths=lengths)
        peer = reference.attention(q, *cache.nan_to_num(), key_lengths=lengths)
        assert_accurate(out, peer, truth, name="out")


@pytest.mark.gpu
def test_offsets_beyond_2_to_31() -> None:
    """The last head's keys lie beyond 2^31 elements, in splits and folded."""
    k = torch.randn(1, 5, 2**22, 128, device="cuda", dtype=BF16)
    q = torch.randn(1, 20, 1, 128, device="cuda", dtype=BF16)
    out, lse = attention_forward(q, k, k, *AttentionOptions(0.1))
    last = [t.clone() for t in (q[:, 16:], k[:, 4:])]
    parts = reference.attention(last[0].float(), last[1].float(), last[1].float(), scale=0.1, return_lse=True)
    torch.testing.assert_close(out[:, 16:].float(), parts[0], atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(lse[:, 16:], parts[1], atol=1e-3, rtol=1e-4)
