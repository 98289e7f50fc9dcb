"""timm's architecture families, each in a small variant, with images for it; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import manifold_nets as mn

_SMALL_VIT = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2}
# Family → model, size of the images, arguments.
_TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet": ("resnet18", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "resnetv2 with group norm": ("resnetv2_50d_gn", 64, {"layers": (1, 1, 1, 1)}),
    "nf_resnet": ("nf_resnet26", 64, {"depths": (1, 1, 1, 1), "channels": (32, 64, 128, 128)}),
    "nfnet": ("eca_nfnet_l0", 64, {"depths": (1, 1, 1, 1)}),
    "densenet": ("densenet121", 64, {"block_config": (2, 2, 2, 2)}),
    "dpn": ("dpn48b", 64, {"k_sec": (1, 1, 2, 1)}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "levit": ("levit_128s", 224, {"depth": (1, 1, 1)}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mobilevitv2": ("mobilevitv2_050", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "repvgg": ("repvgg_a0", 64, {}),
    "repvit": ("repvit_m0_9", 64, {"depth": (1, 1, 2, 1)}),
    "convnext": ("convnext_atto", 64, {}),
    "convnextv2": ("convnextv2_atto", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {"depths": (1, 1, 2, 2)}),
    "efficientformerv2": ("efficientformerv2_s0", 224, {"depths": (1, 1, 2, 2)}),
    "efficientvit": ("efficientvit_m0", 224, {}),
    "efficientvit of mit": ("efficientvit_b0", 64, {}),
    "coatnet": ("coatnet_pico_rw_224", 64, {"img_size": 64}),
    "maxvit": ("maxvit_pico_rw_256", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
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
    "pvt": ("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
    "twins": ("twins_svt_small", 224, {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 64)}),
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
    "res2net": ("res2net50_14w_8s", 64, {"layers": (1, 1, 1, 1)}),
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
# Families whose networks take no smaller depth: so many of their blocks, which are all alike, are kept.
_KEPT_BLOCKS = {"mlp-mixer": 1, "gmixer": 1, "resmlp": 2, "convmixer": 2}


def timm_network(family: str) -> tuple[nn.Module, Any]:
    """A small network of a family of timm, made shallower where its arguments allow, and images for it."""
    name, size, kwargs = _TIMM[family]
    model = mn.sources.load_model(f"timm:{name}", kwargs={"num_classes": 10, **kwargs})
    if family in _KEPT_BLOCKS:
        model.blocks = model.blocks[: _KEPT_BLOCKS[family]]
    return model, torch.randn(4, 3, size, size)
