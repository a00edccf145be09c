"""Who is measured: one decorated function a provider.

A provider takes a case and a device and returns a function of the case's inputs, or raises `Absent` with the
reason why it cannot run there; a call that raises `NotSupported` counts as absent too. Absent providers are
printed, not dropped. To measure a kernel of your own, decorate a function in the same way:

    @provider("gelu", "mine")
    def mine(case, device):
        return lambda x: my_gelu(x, case.approximate)
"""

from benchmarks.providers import (
    attention,
    attention_e4m3,
    attention_forms,
    loss,
    mlp,
    model,
    norm,
    peers,
    rotary,
)
from benchmarks.providers.registry import (
    BASELINES,
    NOTES,
    PROVIDERS,
    Absent,
    Function,
    Provider,
    compiled,
    provider,
    refuse_interpreter,
)

# isort: split
# Behind the operations' own, as in the tables.
from benchmarks.providers import liger

# Their import registers them.
assert attention and attention_forms and norm and mlp and loss and model and peers and liger and rotary
assert attention_e4m3

__all__ = [
    "BASELINES",
    "NOTES",
    "PROVIDERS",
    "Absent",
    "Function",
    "Provider",
    "compiled",
    "provider",
    "refuse_interpreter",
]
