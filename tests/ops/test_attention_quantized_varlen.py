"""`fastattn.attention_varlen(..., quantize="e4m3")`: each packed sequence as if it were alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import NotSupported, reference
from fastattn.kernels._options import AttentionOptions
from fastattn.testing import make_tensor
from tests.ops.test_attention_quantized import BOUND, relative_error

IMPLEMENTATIONS = ("triton", "torch", "reference")
HEADS, KV_HEADS, WIDTH, V_DIM = 2, 2, 40, 24
# The 128 packed rows from 0, 128 and 256 on are each of two sequences or more; one has no keys, one no queries.
LENGTHS_Q, LENGTHS_K = (5, 3, 33, 0, 20), (70, 0, 150, 3, 100)
SEQUENCES, MAX_Q, MAX_K = len(LENGTHS_Q), max(LENGTHS_Q), max(LENGTHS_K)


def offsets(lengths: tuple[int, ...], device: Any = None) -> Tensor:
    return torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=torch.int32, device=device)


def operands(device: torch.device, beyond: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Sequences that differ in the means of k's channels and in the sizes of k and v; `beyond` rows are of none."""
    total_q, total_k = sum(LENGTHS_Q) + beyond, sum(LENGTHS_K) + beyond
    shapes = dict(q=(total_q, HEADS, WIDTH), k=(total_k, KV_HEADS, WIDTH), v=(total_k, KV_HEADS, V_DIM))
    given: dict[str, Any] = {
        name: make_tensor(*shape, seed=seed, device=device)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    starts = offsets(LENGTHS_K)
    for n in range(SEQUENCES):
        rows = slice(int(starts[n]), int(starts[n + 1]))
        given["k"][rows] += 4 * make_tensor(WIDTH, seed=10 + n, device=device)
        given["v"][rows] *= 10.0 ** (2 * n)
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    starts_q, starts_k = offsets(LENGTHS_Q, device), offsets(LENGTHS_K, device)
    return given | dict(cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)


def sequence(result: Tensor, n: int, lengths: tuple[int, ...] = LENGTHS_Q) -> Tensor:
    starts = offsets(lengths)
    return result[int(starts[n]) : int(starts[n + 1])]


BIAS = make_tensor(SEQUENCES, HEADS, MAX_Q, MAX_K, seed=6)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bottom-right": dict(causal="bottom_right"),
    "window": dict(window=(90, 5)),
    "bias": dict(bias=BIAS),
    "mask-of-keys": dict(mask=make_tensor(SEQUENCES, 1, 1, MAX_K, seed=8) > -0.5),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0])),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi_slopes=make_tensor(SEQUENCES, HEADS, seed=9).abs() / 8),
    "key-lengths": dict(key_lengths=torch.tensor([61, 0, 131, 0, 99])),
}
_TOGETHER = ("bias", "mask-of-keys", "sinks", "softcap", "alibi", "key-lengths")
OPTIONS["everything"] = dict(
    causal="bottom_right", window=(140, None), **{k: v for n in _TOGETHER for k, v in OPTIONS[n].items()}
)


def _options(name: str, device: torch.device) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in OPTIONS[name].items()}


@pytest.mark.parametrize(
    "name", [name for name in OPTIONS if name not in ("mask-of-keys", "softcap", "sinks")]
)
def test_each_sequence_has_the_stated_error(name: str, device: torch.device) -> None:
    """Against float64, sequence by sequence, as the largest would hide the others; lse likewise."""
    given, options = operands(device), _options(name, device)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    truth, lse_truth = reference.attention_varlen(
        **wide,
        **{
            n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in options.items()
        },
        return_lse=True,
    )
    rounded = None
    for implementation in reversed(IMPLEMENTATIONS):
        out, lse = fastattn.attention_varlen(
            **given, **options, quantize="e4m3", return_lse=True, implementation=implementation
        )
        finite = lse_truth.isfinite()
        assert torch.equal(lse[~finite].double(), lse_truth[~finite])
        assert float((lse - lse_truth)[finite].square().mean().sqrt()) < 0.06
        rounded = out.double() if rounded is None else rounded
        for n in range(SEQUENCES):
            found, exact, same = (sequence(t, n) for t in (out, truth, rounded))
            if not exact.any():
                assert not found.any()
                continue
            # Few keys average little; where nothing but the weights' rounding differs, it is theirs alone.
            assert relative_error(found, exact) < 1.5 * BOUND, (implementation, n)
            assert relative_error(found, same) < (0.03 if implementation == "triton" else 1e-4)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_each_sequence_is_rounded_as_if_it_were_alone(implementation: str, device: torch.device) -> None:
    given = operands(device)
    out, lse = fastattn.attention_varlen(
        **given, causal="bottom_right", quantize="e4m3", return_lse=True, implementation=implementation
    )
    for n in range(SEQUENCES):
        q, k, v = (
            sequence(given[name], n, lengths).transpose(0, 1)[None]
            for name, lengths in (("q", LENGTHS_Q), ("k", LENGTHS_K), ("v", LENGTHS_K))
        )
        alone, alone_lse = fastattn.attention(
            q, k, v, causal="bottom_right", quantize="e4m3", return_lse=True, implementation=implementation
        )
        # Means are sums in another order, whose last digit may round a key otherwise, and the kernels round weights
        # relative to another maximum where keys are split.
        found, most = sequence(out, n).transpose(0, 1), 0.02 if implementation == "triton" else 1e-3
        assert (found - alone[0]).norm() <= most * alone.norm()
        torch.testing.assert_close(sequence(lse.T, n).T, alone_lse[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_what_is_in_no_sequence_leaks_nothing(implementation: str, device: torch.device) -> None:
    """NaN and infinities in rows behind the last offset and in hidden keys leave every bit as it was."""
    clean = operands(device, beyond=30)
    spoiled = {name: tensor.clone() for name, tensor in clean.items()}
    lengths = (61, 0, 131, 3, 100)
    for name, value in (("q", math.nan), ("k", 1e30), ("v", math.nan)):
        spoiled[name][-30:] = value
        for n, (whole, seen) in enumerate(zip(LENGTHS_K, lengths, strict=True)):
            if name != "q" and whole != seen:
                sequence(spoiled[name], n, LENGTHS_K)[seen:] = value
    call = dict(quantize="e4m3", return_lse=True, implementation=implementation)
    key_lengths = torch.tensor(lengths, device=device)
    expected, found = (
        fastattn.attention_varlen(**given, **call, key_lengths=key_lengths) for given in (clean, spoiled)
    )
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    assert not found[0][-30:].any() and (found[1][:, -30:] == -math.inf).all()


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_a_nan_stays_in_its_sequence(implementation: str, device: torch.device) -> None:
    """The rows of sequences 0 and 2 lie within the same 128, and so do those of 2 and 4."""
    clean = operands(device)
    spoiled = {name: tensor.clone() for name, tensor in clean.items()}
    sequence(spoiled["k"], 2, LENGTHS_K)[7] = math.nan
    sequence(spoiled["v"], 2, LENGTHS_K)[::2] = math.inf
    expected, found = (
        fastattn.attention_varlen(**given, quantize="e4m3", implementation=implementation)
        for given in (clean, spoiled)
    )
    for n in range(SEQUENCES):
        if n == 2:
            assert sequence(found, n).isnan().all()
        else:
            assert torch.equal(sequence(found, n), sequence(expected, n))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("empty", ["keys", "queries", "sequences", "longest"])
def test_empty(empty: str, implementation: str, device: torch.device) -> None:
    given = operands(device)
    if empty == "keys":
        given["k"], given["v"] = given["k"][:0], given["v"][:0]
        given["cu_seqlens_k"] = torch.zeros_like(given["cu_seqlens_k"])
    elif empty == "longest":  # keys that are in no sequence
        given["cu_seqlens_k"] = torch.zeros_like(given["cu_seqlens_k"])
    elif empty == "queries":
        given["q"], given["cu_seqlens_q"] = given["q"][:0], torch.zeros_like(given["cu_seqlens_q"])
    else:
        given["cu_seqlens_q"], given["cu_seqlens_k"] = given["cu_seqlens_q"][:1], given["cu_seqlens_k"][:1]
    sinks = torch.tensor([0.5, -1.0], device=device)
    call: dict[str, Any] = dict(return_lse=True, sinks=sinks, implementation=implementation)
    out, lse = fastattn.attention_varlen(**given, quantize="e4m3", **call)
    _, plain_lse = fastattn.attention_varlen(**given, **call)
    assert out.shape == (given["q"].size(0), HEADS, V_DIM) and not out.any()
    torch.testing.assert_close(lse, plain_lse)


def test_refused_as_without_packing(device: torch.device) -> None:
    given = operands(device)
    with pytest.raises(NotSupported, match=r"dropout_p=0.1 must be 0 with quantize='e4m3'"):
        fastattn.attention_varlen(**given, dropout_p=0.1, quantize="e4m3")
    with pytest.raises(ValueError, match=r"quantize='int8' must be None or 'e4m3'"):
        fastattn.attention_varlen(**given, quantize="int8")
    with pytest.raises(NotSupported, match="has no gradient"):
        fastattn.attention_varlen(**given | dict(q=given["q"].requires_grad_()), quantize="e4m3")


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_compiles_whole_with_dynamic_totals(implementation: str, device: torch.device) -> None:
    def attend(x: Tensor, starts: Tensor, longest: int) -> Any:
        return fastattn.attention_varlen(
            x, x, x, starts, starts, longest, longest, causal=True, softcap=3.0, return_lse=True,
            quantize="e4m3", implementation=implementation,
        )  # fmt: skip

    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=frames, dynamic=True)
    for lengths in ((5, 9, 3), (4, 6, 17)):
        x = make_tensor(sum(lengths), HEADS, 16, device=device)
        starts = offsets(lengths, device)
        expected, found = (f(x, starts, max(lengths)) for f in (attend, compiled))
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    assert frames.frame_count == 1


def test_opcheck_and_explain(device: torch.device) -> None:
    given = operands(device)
    q, k, v = (given[name].transpose(0, 1)[None] for name in "qkv")
    options = AttentionOptions(
        0.25,
        left=7,
        bottom_right=True,
        cu_seqlens_q=given["cu_seqlens_q"],
        cu_seqlens_k=given["cu_seqlens_k"],
        max_seqlen_q=MAX_Q,
        max_seqlen_k=MAX_K,
    )
    torch.library.opcheck(torch.ops.fastattn.attention_e4m3_forward.default, (q, k, v, *options))
    explained = fastattn.explain(fastattn.attention_varlen, **given, quantize="e4m3")
    assert explained.implementation == "triton" and "e4m3 products" in explained.description


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_autocast_and_slices_of_a_projection(implementation: str, device: torch.device) -> None:
    """q, k and v of one packed tensor, read where they lie; under autocast in its dtype."""
    packed, starts = make_tensor(150, 3, HEADS, WIDTH, device=device), offsets((100, 50), device)

    def attend(x: Tensor) -> Tensor:
        out: Tensor = fastattn.attention_varlen(
            *x.unbind(1), starts, starts, causal=True, quantize="e4m3", implementation=implementation
        )
        return out

    whole = [t.contiguous() for t in packed.unbind(1)]
    expected = fastattn.attention_varlen(
        *whole, starts, starts, causal=True, quantize="e4m3", implementation=implementation
    )
    assert torch.equal(attend(packed), expected)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = attend(packed)
    assert found.dtype == torch.bfloat16 and torch.equal(found, attend(packed.bfloat16()))


@pytest.mark.gpu
def test_real_sizes(device: torch.device) -> None:
    lengths = (4096, 1, 5000, 127, 0, 300)
    starts, total = offsets(lengths, device), sum(lengths)
    q, k, v = (
        make_tensor(total, heads, 128, dtype=torch.bfloat16, seed=n, device=device)
        for n, heads in enumerate((8, 2, 2))
    )
    call: dict[str, Any] = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    truth = fastattn.attention_varlen(q.float(), k.float(), v.float(), **call)
    out = fastattn.attention_varlen(q, k, v, **call, quantize="e4m3", implementation="triton")
    for n in range(len(lengths)):
        if lengths[n] > 1:
            exact = sequence(truth, n, lengths).double()
            assert relative_error(sequence(out, n, lengths), exact) < 1.5 * BOUND
