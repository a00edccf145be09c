"""What holds for every drop-in: torch.nn's arguments, and state dicts both ways."""

import inspect

import pytest
import torch

import fastattn
from tests.nn.pairs import EMBED, HEADS


def test_state_dicts_go_both_ways() -> None:
    for ours, theirs, arguments in (
        (fastattn.nn.LayerNorm, torch.nn.LayerNorm, (7,)),
        (fastattn.nn.AddLayerNorm, torch.nn.LayerNorm, (7,)),
        (fastattn.nn.RMSNorm, torch.nn.RMSNorm, (7,)),
        (fastattn.nn.AddRMSNorm, torch.nn.RMSNorm, (7,)),
        (fastattn.nn.GELU, torch.nn.GELU, ()),
        (fastattn.nn.MultiheadAttention, torch.nn.MultiheadAttention, (EMBED, HEADS)),
        (fastattn.nn.TransformerEncoderLayer, torch.nn.TransformerEncoderLayer, (EMBED, HEADS)),
        (fastattn.nn.TransformerDecoderLayer, torch.nn.TransformerDecoderLayer, (EMBED, HEADS)),
    ):
        module, peer = ours(*arguments), theirs(*arguments)
        assert isinstance(module, theirs)
        peer.load_state_dict(module.state_dict())
        module.load_state_dict(peer.state_dict())


@pytest.mark.parametrize("name", [name for name in fastattn.nn.__all__ if hasattr(torch.nn, name)])
def test_arguments_are_torch_nns(name: str) -> None:
    """batch_first was True by default: a drop-in that read the batch as the sequence."""
    ours, theirs = (inspect.signature(getattr(nn, name)).parameters for nn in (fastattn.nn, torch.nn))
    assert ours["implementation"].default is None
    added = ours.keys() - theirs.keys()
    assert all(ours[extra].kind is inspect.Parameter.KEYWORD_ONLY for extra in added)
    kept = [(p.name, p.default) for p in ours.values() if p.name not in added]
    assert kept == [(p.name, p.default) for p in theirs.values()]
