"""Tiny random configurations of transformers' models, with keyword inputs for them; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import manifold_nets as mn

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = {**_TEXT, "num_key_value_heads": 2}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_SPEECH = {
    **_VISION, "vocab_size": 20, "conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
# Name → class of the model, class of its configuration, arguments, inputs.
_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 8}, "tokens"),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER, "tokens"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_DECODER, "head_dim": 8}, "tokens"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, "tokens"),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}, "masked tokens"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 4}, "masked tokens"),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        "tokens",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1,
         "eos_token_id": 2},
        "tokens",
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _TEXT, "masked tokens"),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        "two texts",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_VISION, "image_size": 32, "patch_size": 8}, "images 32"),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "images 32",
    ),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", _STAGES, "images 64"),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {**_STAGES, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16},
        "images 64",
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
        "images 64",
    ),
    "regnet": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 2, 1], "groups_width": 8},
        "images 64",
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, "sound"),
    "wav2vec2, stable": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {**_SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
        "sound",
    ),
}  # fmt: skip
TRANSFORMERS = list(_TRANSFORMERS)


def transformers_network(name: str) -> tuple[nn.Module, Any]:
    """A tiny random configuration of a model of transformers, and keyword inputs for it."""
    mn.sources.import_torchvision()  # transformers imports it as well, where it is installed
    import transformers

    model, config, kwargs, kind = _TRANSFORMERS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**kwargs)), _inputs(kind)


def _inputs(kind: str) -> dict[str, Tensor]:
    what, _, size = kind.partition(" ")
    if what == "images":
        return {"pixel_values": torch.randn(3, 3, int(size), int(size))}
    if kind == "sound":
        return {"input_values": torch.randn(3, 800)}
    inputs = {"input_ids": torch.randint(3, 64, (3, 9))}
    if kind == "two texts":
        inputs["decoder_input_ids"] = torch.randint(3, 64, (3, 5))
    if kind == "masked tokens":
        inputs["attention_mask"] = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 8 + [0]])
    return inputs
