"""Small models of transformers, and what they compute."""

from __future__ import annotations

from typing import Any

import torch

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "vocab_size": 128, "num_key_value_heads": 2, "pad_token_id": 0}
IDS = torch.arange(16)[None]


def llama(kind: str = "LlamaForCausalLM", **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.LlamaConfig(**LLAMA, **more)).eval()


def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def noise(model: Any) -> Any:
    """The model with adapters that do something, as after training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()
