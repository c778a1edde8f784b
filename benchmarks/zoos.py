"""The networks of `benchmarks.zoo`: torchvision, timm, Hugging Face, with random weights, nothing is downloaded."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fused_resnet.testing.shim import torchvision_shim

SIZE = 64
TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
               "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "regnet_y_400mf", "regnet_x_400mf",
               "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")
DILATED = (False, True, True)
# Beside every name of timm's that begins with one of FAMILIES.
FAMILIES = ("resnet", "resnext", "wide_resnet", "seresnet")
RELATIVES = ("seresnext50_32x4d", "seresnext101d_32x8d", "seresnextaa101d_32x8d", "ecaresnet50d", "ecaresnet50t",
             "ecaresnetlight", "ecaresnext50t_32x4d", "legacy_seresnet50", "legacy_seresnext50_32x4d", "gcresnet50t",
             "gcresnext50ts", "skresnet18", "skresnet50", "skresnext50_32x4d", "resnest14d", "resnest50d",
             "res2net50_26w_4s", "res2next50", "cspresnet50", "cspresnet50d", "cspresnext50", "regnetx_008",
             "regnety_008", "regnetz_b16", "regnetv_040", "botnet26t_256", "halonet26t", "lambda_resnet26t",
             "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0", "dla34", "hrnet_w18_small", "densenet121",
             "selecsls42b")


class Entry(NamedTuple):
    make: Callable[[], nn.Module]
    size: int = SIZE


class Tuples(nn.Module):
    """A Hugging Face model whose results are plain tuples of tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x, return_dict=False)


@functools.cache
def models() -> dict[str, Entry]:
    """Every network by its name, such as "torchvision:resnet18"."""
    torchvision_shim()
    return {**_torchvision(), **_timm(), **_huggingface()}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torchvision", "timm", "transformers")}


def _torchvision() -> dict[str, Entry]:
    import torchvision
    from torchvision.models import detection, quantization, segmentation
    from torchvision.ops.misc import FrozenBatchNorm2d

    def named(name: str, **options: Any) -> Entry:
        return Entry(functools.partial(torchvision.models.get_model, name, weights=None, **options))

    bare: dict[str, Any] = {"weights": None, "weights_backbone": None}
    entries = {name: named(name) for name in TORCHVISION}
    entries["resnet50, dilated"] = named("resnet50", replace_stride_with_dilation=DILATED)
    entries["resnet50, FrozenBatchNorm2d"] = named("resnet50", norm_layer=FrozenBatchNorm2d)
    entries["quantization.resnet18"] = Entry(lambda: quantization.resnet18(weights=None, quantize=False))
    entries["quantization.resnet50"] = Entry(lambda: quantization.resnet50(weights=None, quantize=False))
    for name in ("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"):
        make = getattr(segmentation, name)
        options = {} if name.startswith("lraspp") else {"aux_loss": True}
        entries[name] = Entry(functools.partial(make, **bare, **options))
    for name in ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn"):
        make = getattr(detection, name)
        entries[f"{name}, backbone"] = Entry(lambda make=make: make(**bare).backbone)
    return {f"torchvision:{name}": entry for name, entry in entries.items()}


def _timm() -> dict[str, Entry]:
    import timm

    def size(name: str) -> int:
        fixed = timm.get_pretrained_cfg(name, allow_unregistered=True)
        attends = fixed is not None and (fixed.fixed_input_size or "clip" in name or "halo" in name)
        return fixed.input_size[-1] if attends else SIZE

    names = [name for family in FAMILIES for name in timm.list_models(f"{family}*")] + list(RELATIVES)
    entries = {name: Entry(functools.partial(timm.create_model, name), size(name)) for name in names}
    entries["resnet50, features_only"] = Entry(functools.partial(timm.create_model, "resnet50", features_only=True))
    entries["resnet50, drop_path"] = Entry(functools.partial(timm.create_model, "resnet50", drop_path_rate=0.1))
    return {f"timm:{name}": entry for name, entry in entries.items()}


def _huggingface() -> dict[str, Entry]:
    import transformers

    def resnet(**options: Any) -> nn.Module:
        return Tuples(transformers.ResNetForImageClassification(transformers.ResNetConfig(**options)))

    def regnet(**options: Any) -> nn.Module:
        return Tuples(transformers.RegNetForImageClassification(transformers.RegNetConfig(**options)))

    def detr() -> nn.Module:
        from transformers.models.detr import modeling_detr

        config = transformers.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False,
                                         backbone_config=transformers.ResNetConfig(out_features=["stage4"]))
        return _Maps(modeling_detr.DetrConvEncoder(config))

    entries = {"ResNet-50": resnet, "ResNet-18": functools.partial(
        resnet, layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]),
        "ResNet-50, downsample_in_bottleneck": functools.partial(resnet, downsample_in_bottleneck=True),
        "RegNet-Y": functools.partial(regnet, hidden_sizes=[32, 64, 160, 384], depths=[1, 3, 6, 1], groups_width=16),
        "RegNet-X": functools.partial(regnet, layer_type="x", hidden_sizes=[32, 64, 160, 384], depths=[1, 3, 6, 1],
                                      groups_width=16), "DETR backbone": detr}
    return {f"transformers:{name}": Entry(make) for name, make in entries.items()}


class _Maps(nn.Module):
    """DETR's encoder of feature maps takes a mask beside the image."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Any) -> Any:
        return self.encoder(x, x[:, 0] > -9)
