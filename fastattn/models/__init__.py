"""The reference Transformer in its four usual shapes, built from the same blocks.

Read in this order: config.py (the sizes), blocks.py (attention, MLP, residuals), then any of gpt.py, bert.py,
encoder_decoder.py and vit.py. `implementation` in the config switches every operation of a model between the
naive formulas, PyTorch's fused functions and fastattn's.
"""

from fastattn.models.bert import BERT
from fastattn.models.config import (
    ImageTransformerConfig,
    TransformerConfig,
    bert_base,
    gpt2_124m,
    tiny,
    transformer_base,
    vit_base_16,
)
from fastattn.models.encoder_decoder import EncoderDecoder
from fastattn.models.gpt import GPT
from fastattn.models.vit import ViT

__all__ = [
    "BERT",
    "GPT",
    "EncoderDecoder",
    "ImageTransformerConfig",
    "TransformerConfig",
    "ViT",
    "bert_base",
    "gpt2_124m",
    "tiny",
    "transformer_base",
    "vit_base_16",
]
