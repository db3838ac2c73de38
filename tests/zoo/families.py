"""Tiny models of many families, with random weights: one entry a family, made by its configuration.

A family that transformers adds later is one more line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T

Inputs = Mapping[str, torch.Tensor]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
T5 = {"vocab_size": 160, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
T5 |= {"decoder_start_token_id": 0, "eos_token_id": 1}
BART = {"vocab_size": 160, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64}
BART |= {"pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}
N_STYLE = {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
N_STYLE |= {"eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """One tiny model.

    Attributes:
        kind: the class in transformers.
        config: the configuration's class and what it is made of.
        inputs: "text", "image", "image text", "encoder decoder", "audio", "audio decoder", "wave" or "contrast".
        generates: whether it has `generate`.
    """

    kind: str
    config: str
    options: Mapping[str, Any]
    inputs: str = "text"
    generates: bool = True

    def make(self) -> Any:
        torch.manual_seed(0)
        options = {k: v() if callable(v) else v for k, v in self.options.items()}
        return getattr(T, self.kind)(getattr(T, self.config)(**options)).eval()

    def known(self) -> bool:
        return hasattr(T, self.kind) and hasattr(T, self.config)


def _sub(config: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(T, config)(**options)


def _lm(name: str, options: Mapping[str, Any], **more: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", {**options, **more})


def _encoder(name: str, task: str = "ForMaskedLM", **more: Any) -> Family:
    return Family(f"{name}{task}", f"{name}Config", {**TEXT, "max_position_embeddings": 64, **more}, generates=False)


def _image(name: str, task: str = "ForImageClassification", **more: Any) -> Family:
    return Family(f"{name}{task}", f"{name}Config", {**VISION, **more}, "image", generates=False)


def _experts(name: str, **more: Any) -> Family:
    return _lm(name, GQA, moe_intermediate_size=64, **more)


CLIP_TEXT = {**TEXT, "projection_dim": 32, "max_position_embeddings": 16}
FAMILIES: dict[str, Family] = {
    # decoders
    "llama": _lm("Llama", GQA), "mistral": _lm("Mistral", GQA), "qwen2": _lm("Qwen2", GQA),
    "qwen3": _lm("Qwen3", GQA, head_dim=16), "gemma": _lm("Gemma", GQA, head_dim=16),
    "gemma2": _lm("Gemma2", GQA, head_dim=16),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {**GQA, "head_dim": 16}),
    "phi": _lm("Phi", TEXT), "phi3": _lm("Phi3", GQA, original_max_position_embeddings=64),
    "stablelm": _lm("StableLm", GQA), "olmo": _lm("Olmo", GQA), "olmo2": _lm("Olmo2", GQA), "olmo3": _lm("Olmo3", GQA),
    "cohere": _lm("Cohere", GQA), "cohere2": _lm("Cohere2", GQA), "glm": _lm("Glm", GQA, head_dim=16),
    "glm4": _lm("Glm4", GQA, head_dim=16), "granite": _lm("Granite", GQA), "starcoder2": _lm("Starcoder2", GQA),
    "nemotron": _lm("Nemotron", GQA), "smollm3": _lm("SmolLM3", GQA), "ernie4_5": _lm("Ernie4_5", GQA),
    "helium": _lm("Helium", GQA, head_dim=16), "exaone4": _lm("Exaone4", GQA), "seed_oss": _lm("SeedOss", GQA),
    "persimmon": _lm("Persimmon", TEXT), "falcon": _lm("Falcon", TEXT),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", N_STYLE), "gptj": _lm("GPTJ", N_STYLE, rotary_dim=8),
    "gpt_bigcode": _lm("GPTBigCode", N_STYLE), "codegen": _lm("CodeGen", N_STYLE, rotary_dim=8),
    "openai_gpt": Family("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", N_STYLE),
    "gpt_neo": _lm("GPTNeo", {"vocab_size": 160, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "bos_token_id": 1,
                              "eos_token_id": 2, "max_position_embeddings": 64,
                              "attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": _lm("GPTNeoX", {**TEXT, "max_position_embeddings": 64}),
    "opt": _lm("OPT", {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64}),
    "bloom": _lm("Bloom", {"vocab_size": 160, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": _lm("Mpt", {"vocab_size": 160, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "biogpt": _lm("BioGpt", {**TEXT, "max_position_embeddings": 64}),
    "xglm": _lm("XGLM", {"vocab_size": 160, "d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4,
                         "max_position_embeddings": 64}),
    # state spaces and hybrids
    "mamba": _lm("Mamba", {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": _lm("Mamba2", {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8,
                             "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": _lm("FalconMamba", {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "rwkv": _lm("Rwkv", {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}),
    "jamba": _lm("Jamba", GQA, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
                 expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8,
                 use_mamba_kernels=False),
    "recurrent_gemma": _lm("RecurrentGemma", {**GQA, "num_hidden_layers": 3}, lru_width=64, attention_window_size=32,
                           head_dim=16),
    # experts
    "mixtral": _lm("Mixtral", GQA, num_local_experts=4), "qwen2_moe": _experts("Qwen2Moe", num_experts=4,
                                                                              shared_expert_intermediate_size=64),
    "qwen3_moe": _experts("Qwen3Moe", num_experts=4, num_experts_per_tok=2, head_dim=16),
    "olmoe": _lm("Olmoe", GQA, num_experts=4, num_experts_per_tok=2),
    "granitemoe": _lm("GraniteMoe", GQA, num_local_experts=4, num_experts_per_tok=2),
    "phimoe": _lm("Phimoe", GQA, num_local_experts=4),
    "gpt_oss": _lm("GptOss", GQA, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "deepseek_v3": _experts("DeepseekV3", n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                            first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8,
                            qk_nope_head_dim=8, v_head_dim=16),
    # encoders
    "bert": _encoder("Bert"), "roberta": _encoder("Roberta", max_position_embeddings=66),
    "distilbert": Family("DistilBertForMaskedLM", "DistilBertConfig",
                         {"vocab_size": 160, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
                         generates=False),
    "deberta_v2": _encoder("DebertaV2"), "electra": _encoder("Electra", embedding_size=64),
    "albert": _encoder("Albert", embedding_size=32), "mpnet": _encoder("MPNet", max_position_embeddings=66),
    "modernbert": _encoder("ModernBert", global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
    "bert_classifier": _encoder("Bert", "ForSequenceClassification", num_labels=3),
    "roberta_classifier": _encoder("Roberta", "ForSequenceClassification", max_position_embeddings=66),
    "llama_classifier": Family("LlamaForSequenceClassification", "LlamaConfig", {**GQA, "num_labels": 3},
                               generates=False),
    # encoder and decoder
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, "encoder decoder"),
    "t5_gated": Family("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"},
                       "encoder decoder"),
    "mt5": Family("MT5ForConditionalGeneration", "MT5Config", T5, "encoder decoder"),
    "umt5": Family("UMT5ForConditionalGeneration", "UMT5Config", T5, "encoder decoder"),
    "longt5": Family("LongT5ForConditionalGeneration", "LongT5Config", {**T5, "local_radius": 4}, "encoder decoder"),
    "switch": Family("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
                     {**T5, "num_experts": 2, "expert_capacity": 64}, "encoder decoder"),
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, "encoder decoder"),
    "mbart": Family("MBartForConditionalGeneration", "MBartConfig", BART, "encoder decoder"),
    "marian": Family("MarianMTModel", "MarianConfig", BART, "encoder decoder"),
    "pegasus": Family("PegasusForConditionalGeneration", "PegasusConfig", BART, "encoder decoder"),
    # pictures, and pictures with text
    "vit": _image("ViT"), "deit": _image("DeiT"), "dinov2": _image("Dinov2"), "beit": _image("Beit"),
    "swin": Family("SwinForImageClassification", "SwinConfig",
                   {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4],
                    "window_size": 4}, "image", False),
    "clip": Family("CLIPModel", "CLIPConfig",
                   {"text_config": CLIP_TEXT, "vision_config": {**VISION}, "projection_dim": 32}, "contrast", False),
    "siglip": Family("SiglipModel", "SiglipConfig", {"text_config": {**TEXT, "max_position_embeddings": 16},
                                                     "vision_config": {**VISION}}, "contrast", False),
    "llava": Family("LlavaForConditionalGeneration", "LlavaConfig",
                    {"vision_config": _sub("CLIPVisionConfig", **VISION), "text_config": _sub("LlamaConfig", **GQA),
                     "image_token_id": 150}),
    "paligemma": Family("PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
                        {"vision_config": {**VISION, "model_type": "siglip_vision_model", "projection_dim": 64},
                         "text_config": {**GQA, "model_type": "gemma", "head_dim": 16}, "image_token_id": 150,
                         "projection_dim": 64}),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
                       {"text_config": {**GQA, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
                        "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4},
                        "image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152,
                        "vision_end_token_id": 153}),
    "gemma3_multimodal": Family("Gemma3ForConditionalGeneration", "Gemma3Config",
                                {"text_config": {**GQA, "head_dim": 16}, "vision_config": {**VISION},
                                 "image_token_id": 150, "boi_token_id": 151, "eoi_token_id": 152}),
    # sound
    "whisper": Family("WhisperForConditionalGeneration", "WhisperConfig",
                      {**BART, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 64}, "audio"),
    "wav2vec2": Family("Wav2Vec2ForCTC", "Wav2Vec2Config",
                       {**TEXT, "conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
                        "num_conv_pos_embedding_groups": 2}, "wave", False),
    "hubert": Family("HubertForCTC", "HubertConfig",
                     {**TEXT, "conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                      "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
                      "num_conv_pos_embedding_groups": 2}, "wave", False),
}  # fmt: skip


def inputs_of(family: Family) -> dict[str, torch.Tensor]:
    """What the model is called with."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 140, (2, 8), generator=g)
    image = torch.randn(2, 3, 32, 32, generator=g)
    return {
        "text": {"input_ids": ids},
        "encoder decoder": {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
        "image": {"pixel_values": image},
        "contrast": {"input_ids": ids, "pixel_values": image},
        "audio": {"input_features": torch.randn(2, 16, 32, generator=g), "decoder_input_ids": ids[:, :5]},
        "wave": {"input_values": torch.randn(2, 400, generator=g)},
    }[family.inputs]
