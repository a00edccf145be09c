"""The normalizations under torch.compile, export, autocast and checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import dispatch
from fastattn.testing import make_tensor
from tests.ops.test_norm import ALL, DTYPES, FAST, leaves, results


@pytest.mark.parametrize(
    "dynamic, implementation",
    [(True, "triton"), (None, "triton"), (None, "torch")],
    ids=["dynamic-triton", "mark-dynamic-triton", "mark-dynamic-torch"],
)
def test_compiles_whole_with_dynamic_shapes(
    dynamic: bool | None, implementation: str, device: torch.device
) -> None:
    """One graph, forward and backward, serves several numbers of rows; weight and bias may be one tensor.

    The first call may be compiled twice: the compiler first takes eps for a dynamic number, then specializes.
    """
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return fastattn.layer_norm(x, x.shape[-1], weight, weight, implementation=implementation)

    compiled = torch.compile(norm, fullgraph=True, backend=frames, dynamic=dynamic)
    weight = make_tensor(17, device=device, requires_grad=True, seed=1)
    compilations = []
    for rows in (5, 7, 16):
        x = make_tensor(2, rows, 17, device=device, requires_grad=True)
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 1)
        y = compiled(x, weight)
        torch.testing.assert_close(y, norm(x, weight))
        found = torch.autograd.grad(y.square().sum(), (x, weight))
        expected = torch.autograd.grad(norm(x, weight).square().sum(), (x, weight))
        torch.testing.assert_close(found, expected)
        compilations.append(frames.frame_count)
    assert len(set(compilations)) == 1


def test_compiles_whole_without_gradients(device: torch.device) -> None:
    x, weight, bias = leaves((3, 8), (8,), "bf16", "fp32", device)
    compiled = torch.compile(
        lambda: fastattn.layer_norm(x, 8, weight, bias, implementation="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(), fastattn.layer_norm(x, 8, weight, bias))


@pytest.mark.parametrize("implementation", FAST)
def test_every_option_compiles_whole_and_exports(implementation: str, device: torch.device) -> None:
    """All options at once, with a dynamic number of rows."""
    torch._dynamo.reset()

    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Any:
            return fastattn.rms_norm(
                x,
                17,
                weight,
                zero_centered_weight=True,
                out_dtype=torch.float16,
                return_statistics=True,
                save="output",
                implementation=implementation,
            )

    module = Norm()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = (make_tensor(17, device=device, seed=1).abs() + 0.5).requires_grad_()
    for rows in (5, 7):
        x = make_tensor(rows, 17, device=device, requires_grad=True)
        (y, rstd), (expected, expected_rstd) = compiled(x, weight), module(x, weight)
        torch.testing.assert_close((y, rstd), (expected, expected_rstd))
        found = torch.autograd.grad(y.float().square().sum(), (x, weight))
        torch.testing.assert_close(
            found, torch.autograd.grad(expected.float().square().sum(), (x, weight)), atol=1e-2, rtol=1e-2
        )
    exported = torch.export.export(
        module, (x.detach(), weight.detach()), dynamic_shapes=({0: torch.export.Dim("rows")}, None)
    )
    x = make_tensor(9, 17, device=device)
    torch.testing.assert_close(exported.module()(x, weight.detach()), module(x, weight))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_autocast_matches_pytorch(
    dtype: str, autocast: torch.dtype, implementation: str, device: torch.device
) -> None:
    """The CPU's autocast leaves LayerNorm alone; a GPU's computes and returns float32."""
    x, weight, bias = leaves((4, 9), (9,), dtype, dtype, device)
    with torch.autocast(device.type, dtype=autocast):
        expected = F.layer_norm(x, (9,), weight, bias)
        y = fastattn.layer_norm(x, 9, weight, bias, implementation=implementation)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
    assert [gradient.dtype for gradient in found] == [DTYPES[dtype]] * 3
    torch.testing.assert_close(found, torch.autograd.grad(expected.float().square().sum(), (x, weight, bias)))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_gpu_autocast_gives_float32_but_float64(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own dispatcher says what its function returns, of tensors on a GPU that need not be there."""
    monkeypatch.setattr(dispatch, "_capability", lambda index: (9, 0))
    ours, theirs = getattr(fastattn, name), getattr(F, name)
    on = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            weight = torch.ones(4, device="cuda")
            for dtype in (torch.float16, torch.float32, torch.float64):
                x = torch.empty(2, 4, dtype=dtype, device="cuda")
                if implementation == "triton" and dtype == torch.float64:
                    continue
                y = ours(x, 4, weight, implementation=implementation)
                assert y.dtype == theirs(x, (4,), weight).dtype
                bf16 = torch.bfloat16
                assert ours(x, 4, weight, out_dtype=bf16, implementation=implementation).dtype == bf16
                add = getattr(fastattn, f"add_{name}")
                y, h = add(x, x.half(), 4, weight, implementation=implementation)
                assert (y.dtype, h.dtype) == (theirs(x, (4,), weight).dtype, torch.float16)
                y, h = add(x, None, 4, weight, out_dtype=bf16, implementation=implementation)
                assert (y.dtype, h.dtype) == (bf16, dtype)
    finally:
        torch.set_autocast_enabled("cuda", on)


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    inputs = leaves((4, 9), (9,), "fp32", "fp32", device)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastattn.layer_norm(x, 9, weight, bias, implementation=implementation)

    plain = torch.autograd.grad(norm(*inputs).square().sum(), inputs)
    kept = torch.utils.checkpoint.checkpoint(norm, *inputs, use_reentrant=False)
    recomputed = torch.autograd.grad(kept.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["inductor"])
def test_compiles_with_inductor(backend: str, device: torch.device) -> None:
    inputs = leaves((64, 768), (768,), "bf16", "fp32", device)
    norm = torch.compile(
        lambda x, w, b: F.gelu(fastattn.layer_norm(x, 768, w, b, implementation="triton")),
        fullgraph=True,
        backend=backend,
    )
    found = results(norm, inputs, torch.ones(64, 768, device=device))
    expected = results(
        lambda x, w, b: F.gelu(fastattn.layer_norm(x, 768, w, b)), inputs, torch.ones(64, 768, device=device)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=2e-2)
