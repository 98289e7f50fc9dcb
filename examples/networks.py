"""Small networks of many architectures, with inputs for them: `python examples/networks.py` lists them.

torchvision's and timm's families in their smallest variants, and tiny random configurations of transformers' models;
nothing is downloaded. Other scripts take them from `SUITES`.

    python examples/networks.py transformers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import manifold_nets as mn

TORCHVISION = (
    "alexnet resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg16_bn densenet121 mobilenet_v2 mobilenet_v3_small "
    "efficientnet_b0 googlenet inception_v3 regnet_y_400mf shufflenet_v2_x1_0 mnasnet1_0 fcn_resnet50 "
    "deeplabv3_resnet50 r2plus1d_18"
).split()
_TORCHVISION_KWARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}
_TORCHVISION_SHAPES = {"inception_v3": (4, 3, 299, 299), "r2plus1d_18": (2, 3, 8, 64, 64)}

_SMALL_VIT = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2}
# Family → model, size of the images, arguments.
_TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet": ("resnet18", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "resnetv2 with group norm": ("resnetv2_50d_gn", 64, {}),
    "nf_resnet": ("nf_resnet26", 64, {}),
    "nfnet": ("eca_nfnet_l0", 64, {}),
    "densenet": ("densenet121", 96, {}),
    "dpn": ("dpn48b", 64, {}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "levit": ("levit_128s", 224, {}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mobilevitv2": ("mobilevitv2_050", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "repvgg": ("repvgg_a0", 64, {}),
    "repvit": ("repvit_m0_9", 64, {}),
    "convnext": ("convnext_atto", 64, {}),
    "convnextv2": ("convnextv2_atto", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformerv2": ("efficientformerv2_s0", 224, {}),
    "efficientvit": ("efficientvit_m0", 224, {}),
    "efficientvit of mit": ("efficientvit_b0", 64, {}),
    "coatnet": ("coatnet_pico_rw_224", 64, {"img_size": 64}),
    "maxvit": ("maxvit_pico_rw_256", 64, {"img_size": 64}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        64,
        {"img_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "swinv2": ("swinv2_tiny_window8_256", 64, {"img_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}),
    "vit": ("vit_tiny_patch16_224", 64, _SMALL_VIT),
    "vit with qk_norm": ("vit_tiny_patch16_224", 64, {**_SMALL_VIT, "qk_norm": True}),
    "deit": ("deit_tiny_patch16_224", 64, _SMALL_VIT),
    "beit": ("beit_base_patch16_224", 64, _SMALL_VIT),
    "eva": ("eva02_tiny_patch14_224", 56, {**_SMALL_VIT, "img_size": 56}),
    "cait": ("cait_xxs24_224", 64, _SMALL_VIT),
    "xcit": ("xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 2}),
    "crossvit": ("crossvit_tiny_240", 240, {"depth": ((1, 1, 0),)}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "hiera": ("hiera_tiny_224", 224, {"stages": (1, 1, 1, 1), "embed_dim": 32}),
    "davit": ("davit_tiny", 64, {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 4)}),
    "focalnet": ("focalnet_tiny_srf", 64, {}),
    "pvt": ("pvt_v2_b0", 64, {}),
    "twins": ("twins_svt_small", 224, {"depths": (1, 1, 1, 1)}),
    "convit": ("convit_tiny", 64, {"img_size": 64, "depth": 3, "local_up_to_layer": 2}),
    "tnt": ("tnt_s_patch16_224", 64, {"img_size": 64, "depth": 2}),
    "nest": ("nest_tiny", 64, {"img_size": 64}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64}),
    "nextvit": ("nextvit_small", 64, {}),
    "swiftformer": ("swiftformer_xs", 64, {}),
    "shvit": ("shvit_s1", 128, {}),
    "xception": ("xception41", 64, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "dla": ("dla46_c", 64, {}),
    "res2net": ("res2net50_14w_8s", 64, {}),
    "resnest": ("resnest14d", 64, {}),
    "sknet": ("skresnet18", 64, {}),
    "cspnet": ("cspresnet50", 64, {}),
    "selecsls": ("selecsls42", 64, {}),
    "tresnet": ("tresnet_m", 64, {}),
    "mobileone": ("mobileone_s0", 64, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv4": ("mobilenetv4_conv_small", 64, {}),
    "efficientnet": ("efficientnet_b0", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "tinynet": ("tinynet_e", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "lcnet": ("lcnet_050", 64, {}),
    "mixnet": ("mixnet_s", 64, {}),
    "poolformer": ("poolformer_s12", 64, {}),
    "gernet": ("gernet_s", 64, {}),
    "regnet": ("regnety_002", 64, {}),
    "eca": ("ecaresnet26t", 64, {}),
    "botnet": ("botnet26t_256", 64, {"img_size": 64}),
    "halonet": ("halonet26t", 256, {}),
    "lambda": ("lambda_resnet26t", 64, {"img_size": 64}),
    "sequencer": ("sequencer2d_s", 56, {"img_size": 56, "layers": (1, 1, 1, 1)}),
    "mlp-mixer": ("mixer_s32_224", 64, {"img_size": 64}),
    "gmixer": ("gmixer_12_224", 64, {"img_size": 64}),
    "resmlp": ("resmlp_12_224", 64, {"img_size": 64}),
    "inception_next": ("inception_next_atto", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "rdnet": ("rdnet_tiny", 64, {"num_init_features": 32}),
    "mambaout": ("test_mambaout", 64, {}),
    "convmixer": ("convmixer_768_32", 64, {}),
}
TIMM = list(_TIMM)

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


def torchvision_network(name: str) -> tuple[nn.Module, Any]:
    """A network of torchvision, and images (or clips) of the size that it is tried with."""
    model = mn.sources.load_model(f"torchvision:{name}", kwargs=_TORCHVISION_KWARGS.get(name, {}))
    return model, torch.randn(_TORCHVISION_SHAPES.get(name, (4, 3, 96, 96)))


def timm_network(family: str) -> tuple[nn.Module, Any]:
    """The smallest network of a family of timm, made smaller where its arguments allow, and images for it."""
    name, size, kwargs = _TIMM[family]
    model = mn.sources.load_model(f"timm:{name}", kwargs={"num_classes": 10, **kwargs})
    return model, torch.randn(4, 3, size, size)


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


SUITES: dict[str, tuple[list[str], Callable[[str], tuple[nn.Module, Any]]]] = {
    "torchvision": (TORCHVISION, torchvision_network),
    "timm": (TIMM, timm_network),
    "transformers": (TRANSFORMERS, transformers_network),
}


def main() -> None:
    """List the networks of the suites that are named, or of all."""
    parser = argparse.ArgumentParser(description="List the networks of the coverage table.")
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], metavar="SUITE")
    for suite in parser.parse_args().suites or SUITES:
        names, _ = SUITES[suite]
        print(f"{suite}: {len(names)} networks: {', '.join(names)}")


if __name__ == "__main__":
    main()
