"""A Llama with two layers and biases, for the tests of transformers."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

Auto = transformers.AutoModelForCausalLM


def make(dtype=torch.float32, tied=True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attention_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).logits


MAP = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"} | {
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
}
