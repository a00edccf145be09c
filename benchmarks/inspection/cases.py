"""The cases that ship, and how the inspector launches a case: between them every kernel, with every launch config."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cases import (
    AddLayerNormCase,
    AttentionCase,
    AttentionE4M3Case,
    BiasGeluCase,
    GegluCase,
    GeluCase,
    LayerNormCase,
    LossCase,
    MlpCase,
    OpCase,
    RMSNormCase,
    RotaryCase,
    SwigluCase,
)
from benchmarks.inspection.launches import Launch, record_launches
from fastattn.kernels._attention_config import score_load
from fastattn.kernels._attention_forms import select_attention_form
from fastattn.kernels._layout import halves
from fastattn.kernels._pointwise_config import GELU_FORMS
from fastattn.ops._attention_call import Features, options_of

# One of each family of launch configs; see kernels/_*_config.py.
DEFAULT_ARCHS = ("sm_90", "sm_80", "gfx942")
# Those with products of e4m3.
_E4M3_ARCHS = ("sm_89", "sm_90", "sm_100", "sm_120")


def shipped_cases() -> list[OpCase]:
    """Calls that between them launch every kernel with every config of a family of targets."""
    cases: list[OpCase] = []
    for dtype in (torch.bfloat16, torch.float32):
        # float32 has the cases that take the most registers: each takes the assembler ten times as long.
        narrow = dtype == torch.bfloat16
        for head_dim in (64, 128, 256) if narrow else (256,):
            cases.append(AttentionCase(2, 8, 4096, head_dim, kv_heads=2, causal="top_left", dtype=dtype))
        if narrow:
            cases.append(AttentionCase(2, 8, 4096, 128, kv_heads=2, dtype=dtype))  # without a mask at all
            # The tiles of `score_load`'s "light", "plane" (twice, as these differ by head dimension) and "heavy", which
            # at 64 is those of "plane" but on Hopper.
            for head_dim, options in (
                (64, "window+softcap"),
                (64, "bias+mask"),
                (64, "bias+dropout"),
                (128, "bias"),
                (128, "bias+dropout"),
                (256, "bias+dropout"),
            ):
                cases.append(AttentionCase(2, 8, 4096, head_dim, kv_heads=2, dtype=dtype, options=options))
            cases += [
                AttentionE4M3Case(2, 8, 4096, head_dim, kv_heads=2, causal="top_left", dtype=dtype)
                for head_dim in (64, 128)
            ]
            cases.append(AttentionE4M3Case(1, 32, 1, 128, kv_heads=8, seq_k=32_768, dtype=dtype))
            # A step of decoding.
            cases.append(
                AttentionCase(1, 32, 1, 128, kv_heads=8, seq_k=32_768, causal="bottom_right", dtype=dtype)
            )
        cases += [
            LayerNormCase(8192, width, dtype=dtype)
            for width in ((64, 768, 4096, 65_536) if narrow else (4096, 65_536))
        ]
        cases.append(RotaryCase(4, 32, 4096, 128, True, dtype))
        if narrow:
            cases.append(RotaryCase(4, 32, 4096, 128, False, dtype))
            # Without a mean; with all there is before it.
            cases += [
                RMSNormCase(8192, 4096, dtype=dtype),
                AddLayerNormCase(8192, 4096, dtype, torch.float32, 0.1),
            ]
        cases += [
            GeluCase(8192, 4096, approximate, dtype)
            for approximate in (("none", "tanh") if narrow else ("none",))
        ]
        cases.append(BiasGeluCase(8192, 4096, dtype=dtype))
        if narrow:
            cases += [GegluCase(8192, 4096, dtype=dtype), MlpCase(8192, 768, 3072, "none", dtype)]
    # Padded and odd vocabularies, and few classes.
    cases += [LossCase(8192, vocabulary, torch.bfloat16, True) for vocabulary in (50_304, 50_257, 10)]
    cases.append(LossCase(8192, 50_304, torch.bfloat16))  # as most calls are
    return cases


def is_telling(case: OpCase, arch: str) -> bool:
    """Whether compiling a shipped case there can show what no other case shows; on architectures without tests, True.

    float32, whose tiles are the same everywhere but for the widest heads of "gfx942", is compiled for one
    architecture, and so is what differs from another case by less code. "gfx942" has one case of a kernel and table.
    """
    if isinstance(case, AttentionE4M3Case):
        return has_instructions(case, arch)
    if arch not in DEFAULT_ARCHS:
        return True
    head_dim = case.head_dim if isinstance(case, AttentionCase) else 0
    options = case.options if isinstance(case, AttentionCase) else ""
    if getattr(case, "dtype", None) == torch.float32:
        return arch == "sm_80" or (arch == "gfx942" and head_dim == 256)
    if case.operation == "rms_norm" or getattr(case, "approximate", "") == "tanh":
        return arch == "sm_90"
    # Where Hopper has tiles of its own, the others have those of another case.
    if (head_dim, options) in ((64, "bias+dropout"), (128, "bias")):
        return arch == "sm_90"
    if isinstance(case, AttentionCase) and not case.causal and not options:
        return arch == "sm_90"
    if arch == "gfx942":
        narrow = isinstance(case, LayerNormCase) and case.width < 4096
        small = isinstance(case, LossCase) and not (case.vocabulary == 50_304 and case.all_options)
        return not (narrow or small)
    return True


def has_instructions(case: OpCase, arch: str) -> bool:
    """Whether an architecture has the products that a case needs."""
    return not isinstance(case, AttentionE4M3Case) or arch in _E4M3_ARCHS


def launches_of(case: OpCase, arch: str, **options: object) -> list[Launch]:
    """What a call of the case launches, forward and backward; options are those of the operation's function below."""
    with record_launches(arch) as launches:
        _LAUNCH[case.operation](case, **options)
    return launches


def _launch_attention(case: AttentionCase, form: str | None = None) -> None:
    """In the form that a call takes, or another."""
    from fastattn.kernels import _target
    from fastattn.kernels.attention_backward import attention_backward
    from fastattn.kernels.attention_forward import attention_forward

    q, k, v, *learned = (t.detach() for t in case.inputs("meta"))
    keywords = case.keywords("meta") | case.learned(tuple(learned))
    keywords.pop("return_lse", None)  # it is always made
    causal = keywords.pop("causal")
    options = options_of(q, k, causal, None, Features(**keywords) if keywords else None)
    target, load = _target.target_of(q.device), score_load(options)
    config = None if form is None else select_attention_form(case.head_dim, case.dtype, target, load, form)
    out, lse = attention_forward(q, k, v, *options, config=config)
    if case.seq_q == 1:  # a step of decoding, without gradients
        return
    dout = torch.empty_like(out)
    attention_backward(dout, None, q, k, v, out, lse, [True] * 5, *options, config=config)


def _launch_attention_e4m3(case: AttentionE4M3Case) -> None:
    from fastattn.kernels.attention_quantized import attention_e4m3_forward

    q, k, v, *learned = case.inputs("meta")
    keywords = case.keywords("meta") | case.learned(tuple(learned))
    causal = keywords.pop("causal")
    options = options_of(q, k, causal, None, Features(**keywords) if keywords else None)
    attention_e4m3_forward(q, k, v, *options)


def _launch_norm(case: LayerNormCase | AddLayerNormCase) -> None:
    from fastattn.kernels.norm_backward import norm_backward
    from fastattn.kernels.norm_forward import norm_forward

    x = case.inputs("meta")[0].detach()
    adds = isinstance(case, AddLayerNormCase)
    residual = case.inputs("meta")[1].detach() if adds else None
    residual_dtype = None if residual is None else residual.dtype
    p = case.dropout_p if isinstance(case, AddLayerNormCase) else 0.0
    seed = torch.empty(2, dtype=torch.int64, device="meta") if p else None
    centered, float32 = case.parameters == 2, torch.float32
    weight = torch.empty(case.width, device="meta") if case.affine else None  # float32, as in mixed precision
    bias = weight if centered else None
    y, h, mean, rstd = norm_forward(
        x, residual, weight, bias, None, seed, 1, 1e-5, centered, False, p, residual_dtype, x.dtype
    )
    norm_backward(
        y, h if adds else None, h if adds else x, weight, bias, None, seed, mean, rstd, 1, centered, False, False,
        p, residual_dtype or x.dtype, x.dtype if adds and (p or residual_dtype != x.dtype) else None, float32,
        float32 if centered else None,
    )  # fmt: skip


def _launch_gelu(case: GeluCase) -> None:
    from fastattn.kernels.gelu import gelu_backward, gelu_forward

    x = case.inputs("meta")[0].detach()
    gelu_backward(gelu_forward(x, case.approximate), x, case.approximate)


def _launch_bias_gelu(case: BiasGeluCase) -> None:
    from fastattn.kernels.bias_activation import bias_activation_backward, bias_activation_forward

    x = case.inputs("meta")[0].detach()
    bias = torch.empty(case.width, device="meta")  # float32, as in mixed precision
    y = bias_activation_forward(x, bias, GELU_FORMS[case.approximate])
    bias_activation_backward(y, x, bias, GELU_FORMS[case.approximate], True, bias.dtype, False)


def _launch_gated(case: GegluCase | SwigluCase) -> None:
    from fastattn.kernels.gated import gated_forward, gated_packed_backward

    x = case.inputs("meta")[0].detach()
    activation = "silu" if isinstance(case, SwigluCase) else GELU_FORMS[case.approximate]
    y = gated_forward(*halves(x, False), activation)
    gated_packed_backward(y, x, activation, False)


def _launch_mlp(case: MlpCase) -> None:
    """The fused path with save="pre_activation", whose backward writes the most."""
    from fastattn.kernels.linear_activation import linear_activation_backward, linear_activation_forward

    x, w1, b1, w2, _ = (t.detach() for t in case.inputs("meta"))
    activation = GELU_FORMS[case.approximate]
    pre, _ = linear_activation_forward(x, w1, b1, activation, True, True)
    linear_activation_backward(torch.empty_like(x), w2, pre, activation, b1.dtype, True)


def _launch_rotary(case: RotaryCase) -> None:
    from fastattn.kernels.rotary import rotary_embedding

    x = case.inputs("meta")[0].detach()
    call = (*case.tables("meta"), None, None, None, 0, case.interleaved)
    rotary_embedding([x], *call, False)


def _launch_loss(case: LossCase) -> None:
    from fastattn.kernels.cross_entropy_backward import cross_entropy_backward
    from fastattn.kernels.cross_entropy_forward import cross_entropy_forward, cross_entropy_of_chunk

    logits = case.inputs("meta")[0].detach()
    target = torch.empty(case.rows, dtype=torch.int64, device="meta")
    smoothing, z_loss, softcap = (0.1, 1e-4, 30.0) if case.all_options else (0.0, 0.0, None)
    options = (-100, "mean", smoothing, z_loss, softcap)
    loss, statistics, kept = cross_entropy_forward(logits, target, *options, logits.dtype, False)
    cross_entropy_backward(loss, None, logits, target, statistics, kept, *options)
    cross_entropy_of_chunk(logits, target, None, statistics[0], -100, smoothing, z_loss, softcap, True)


_LAUNCH: dict[str, Callable[..., None]] = {
    "attention": _launch_attention,
    "layer_norm": _launch_norm,
    "rms_norm": _launch_norm,
    "add_layer_norm": _launch_norm,
    "add_rms_norm": _launch_norm,
    "gelu": _launch_gelu,
    "bias_gelu": _launch_bias_gelu,
    "geglu": _launch_gated,
    "swiglu": _launch_gated,
    "mlp": _launch_mlp,
    "rotary": _launch_rotary,
    "attention_e4m3": _launch_attention_e4m3,
    "loss": _launch_loss,
}
# The operations of which `launches_of` takes cases.
LAUNCHED = frozenset(_LAUNCH)
