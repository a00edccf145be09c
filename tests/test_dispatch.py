"""explain, use_implementation, and the choice between implementations."""

from __future__ import annotations

import threading

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.dispatch import Implementation, NotSupported, Operation
from fastattn.kernels._attention_config import select_attention_config
from fastattn.kernels._attention_tables import AttentionConfig, AttentionTiles
from fastattn.kernels._config import forced_config
from fastattn.testing import make_tensor


def _operation(*refusals: str | None) -> Operation:
    implementations = tuple(
        Implementation(
            f"way{i}",
            run=lambda x, i=i: i,
            refuse=lambda x, reason=reason: reason,
            describe=lambda x, i=i: f"way number {i}",
        )
        for i, reason in enumerate(refusals)
    )
    return Operation("made_up", lambda x: None, implementations)


def test_the_first_that_takes_the_call_runs() -> None:
    assert _operation(None, None)(None, 0) == 0
    assert _operation("too wide", None)(None, 0) == 1


def test_every_refusal_is_named_when_none_takes_the_call() -> None:
    with pytest.raises(NotSupported, match=r"made_up takes this call \(way0: too wide; way1: too long\)"):
        _operation("too wide", "too long")(None, 0)


def test_explain_names_the_choice_and_each_refusal() -> None:
    explanation = _operation("too wide", None, None).explain(None, 0)
    assert explanation.implementation == "way1"
    assert explanation.refusals == {"way0": "too wide", "way2": "'way1' comes first"}
    assert str(explanation).splitlines() == [
        "fastattn.made_up takes 'way1': way number 1",
        "  not 'way0': too wide",
        "  not 'way2': 'way1' comes first",
    ]


def test_explain_agrees_with_what_runs(device: torch.device) -> None:
    x = torch.ones(2, 3, device=device)
    q = torch.ones(1, 1, 4, 16, device=device)
    for function, arguments in (
        (fastattn.gelu, (x,)),
        (fastattn.layer_norm, (x, (3,))),
        (fastattn.attention, (q, q, q)),
        (fastattn.scaled_dot_product_attention, (q, q, q)),
    ):
        explanation = fastattn.explain(function, *arguments)
        assert explanation.operation == function.__name__
        assert explanation.implementation == "triton"
        assert explanation.refusals["reference"] == "runs only when asked for by name"
    assert fastattn.explain(fastattn.gelu, x.double()).implementation == "torch"
    assert fastattn.explain(q, q, q).operation == "attention"
    assert fastattn.explain(fastattn.gelu, x, implementation="torch").implementation == "torch"


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            dict(attn_mask=torch.ones(4, 4, dtype=torch.bool), is_causal=True),
            "attn_mask and is_causal together",
        ),
        (dict(attn_mask=torch.ones(4, 4).long()), "attn_mask has dtype=torch.int64"),
        (dict(attn_mask=torch.ones(4, 4).double()), "attn_mask has dtype=torch.float64"),
        (dict(attn_mask=torch.ones(5, 4)), "bias has shape (5, 4), which does not broadcast to (1, 1, 4, 4)"),
        (dict(dropout_p=1.5), "dropout_p=1.5 is no number from 0 to 1"),
        (dict(query=torch.ones(1, 6, 4, 16), key=torch.ones(1, 2, 4, 16)), "head counts differ without"),
        (dict(value=torch.ones(1, 1, 5, 16)), "k has shape"),
        (dict(query=torch.ones(3, 1, 4, 16), key=torch.ones(2, 1, 4, 16)), "Attempting to broadcast"),
        (dict(key=torch.ones(1, 1, 4, 16, dtype=torch.float64)), "the dtypes differ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_fused_goes_to_pytorch(change: dict, reason: str) -> None:
    arguments = dict.fromkeys(("query", "key", "value"), torch.ones(1, 1, 4, 16)) | change
    explanation = fastattn.explain(fastattn.scaled_dot_product_attention, **arguments)
    assert explanation.implementation == "torch"
    assert explanation.refusals["triton"].startswith(reason)
    assert explanation.description == "torch.nn.functional.scaled_dot_product_attention"


def test_explain_says_which_form_of_the_kernels_runs(device: torch.device) -> None:
    """And, not printed, why not another; a seed of dropout is not drawn for that."""
    q = torch.zeros(1, 2, 20, 16, device=device)  # more than few
    given = {"causal": True, "implementation": "triton", "dropout_p": 0.5}
    torch.manual_seed(3)
    found = fastattn.explain(q, q, q, **given)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))
    assert found.description == "fused Triton kernels, memory linear in the sequence; rows by pointers"
    if device.type == "cpu":
        assert found.forms["descriptors"] == "descriptors has tiles for sm_90 alone, not for interpreter"
    assert "pointers" not in found.forms and "descriptors" not in str(found)
    tiles = AttentionTiles(32, 32, 1, 1, "descriptors")
    with forced_config(select_attention_config, AttentionConfig(tiles, tiles, tiles, reduce_dq=True)):
        found = fastattn.explain(q, q, q, **given)
        assert found.description.endswith("rows by descriptors and reduction")
        assert set(found.forms) >= {"pointers", "specialized"}
        few = q[:, :, :8]
        assert fastattn.explain(few, few, few, **given).description.endswith(
            "rows by pointers and descriptors and reduction"
        )
        packed = [q[0].transpose(0, 1)] * 3, torch.tensor([0, 20], device=device, dtype=torch.int32)
        found = fastattn.explain(
            fastattn.attention_varlen, *packed[0], packed[1], packed[1], implementation="triton"
        )
        assert "rows by pointers" in found.description
    assert fastattn.explain(q, q, q, implementation="torch").forms == {}


def test_explain_says_why_blocks_of_pytorch_run() -> None:
    q, k = torch.ones(1, 1, 4, 16, dtype=torch.float64), torch.ones(1, 1, 6, 16, dtype=torch.float64)
    assert "does not take softcap" in fastattn.explain(q, k, k, softcap=2.0).description
    long = torch.ones(1, 1, 300, 16, dtype=torch.float64)
    assert "need a mask of all scores" in fastattn.explain(long, long, long, window=(3, 0)).description
    assert "does not return the log-sum-exp" in fastattn.explain(q, k, k, return_lse=True).description


def test_explain_knows_public_functions_only() -> None:
    with pytest.raises(ValueError, match=r"explain\(\) knows fastattn.*; not <built-in function len>"):
        fastattn.explain(len, [])
    with pytest.raises(TypeError, match="missing a required argument: 'k'"):
        fastattn.explain(torch.ones(1, 1, 4, 16))


def test_use_implementation_forces_restores_and_nests() -> None:
    x = torch.ones(3)
    with fastattn.use_implementation("reference"):
        assert fastattn.explain(fastattn.gelu, x).implementation == "reference"
        with fastattn.use_implementation("torch"):
            assert fastattn.explain(fastattn.gelu, x).implementation == "torch"
            assert (
                fastattn.explain(fastattn.gelu, x, implementation="reference").implementation == "reference"
            )
        assert fastattn.explain(fastattn.gelu, x).implementation == "reference"
    assert fastattn.explain(fastattn.gelu, x).implementation != "reference"


def test_use_implementation_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), fastattn.use_implementation("reference"):
        raise KeyError
    assert dispatch._forced.name is None


def test_use_implementation_holds_in_its_own_thread_only() -> None:
    found: list[str | None] = []
    with fastattn.use_implementation("torch"):
        thread = threading.Thread(target=lambda: found.append(dispatch._forced.name))
        thread.start()
        thread.join()
    assert found == [None]


def test_use_implementation_raises_where_it_cannot_serve() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    q = torch.ones(1, 1, 4, 16)
    with (
        fastattn.use_implementation("triton"),
        pytest.raises(NotSupported, match="implementation='triton': attn_mask and is_causal together"),
    ):
        fastattn.scaled_dot_product_attention(q, q, q, mask, is_causal=True)
    with (
        pytest.raises(ValueError, match="'cuda' is unknown; there are 'triton', 'torch', 'reference'"),
        fastattn.use_implementation("cuda"),
    ):
        pass


def test_use_implementation_holds_under_compile() -> None:
    """A compiled function follows the block that it is called in, and is compiled again when that changes."""
    compiled = torch.compile(lambda x: fastattn.gelu(x), fullgraph=True, backend="eager")
    x = torch.linspace(-3, 3, 50)
    for name in ("reference", "torch", "triton"):
        with fastattn.use_implementation(name):
            assert torch.equal(compiled(x), fastattn.gelu(x, implementation=name))


def test_cpu_without_the_interpreter_takes_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    explanation = fastattn.explain(fastattn.gelu, torch.ones(3))
    assert explanation.implementation == "torch"
    assert explanation.refusals["triton"].startswith("the tensors are not on a GPU")


def test_attention_trains_on_a_cpu_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward by what a user's CPU takes: PyTorch's operator, and blocks for what it has not."""
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    for options in ({}, dict(window=(2, 0), softcap=2.0)):
        found, expected = [], []
        for function, results in ((fastattn.attention, found), (fastattn.reference.attention, expected)):
            q, k, bias = (make_tensor(1, 2, 7, n, seed=n).requires_grad_() for n in (8, 8, 7))
            learned = dict(bias=bias) if options else {}
            out = function(q, k, k, causal="top_left", **learned, **options)
            results += [out, *torch.autograd.grad(out.square().sum(), [q, k, *learned.values()])]
        torch.testing.assert_close(found, expected)
        assert fastattn.explain(q, k, k, causal="top_left", **learned, **options).implementation == "torch"


def test_without_triton_everything_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    q = torch.ones(1, 1, 4, 16)
    assert fastattn.explain(q, q, q).refusals["triton"] == "Triton is not installed"
    assert fastattn.attention(q, q, q, causal=True).shape == q.shape


@pytest.mark.parametrize(
    "capability, dtype, reason",
    [
        ((9, 0), torch.bfloat16, None),
        ((8, 0), torch.bfloat16, None),
        ((7, 5), torch.float16, None),
        ((7, 5), torch.bfloat16, r"compute capability (7, 5) is below (8, 0) for torch.bfloat16"),
        ((7, 0), torch.float16, r"compute capability (7, 0) is below (7, 5) for torch.float16"),
        ((9, 0), torch.float64, r"dtype=torch.float64 is not one of float16, bfloat16, float32"),
    ],
    ids=str,
)
def test_a_gpu_is_refused_by_capability_and_dtype(
    capability: tuple[int, int], dtype: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that only claim to be on a GPU, also while the compiler traces."""
    from torch._subclasses import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(dispatch, "_capabilities", {})
    with FakeTensorMode(), monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        x = torch.empty(3, device="cuda:0", dtype=dtype)
        assert dispatch.refuse_triton(x, dtype) == reason


def test_the_capability_is_a_constant_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    monkeypatch.setattr(dispatch, "_capabilities", {})
    compiled = torch.compile(lambda x: x * dispatch._capability(3)[1], fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
