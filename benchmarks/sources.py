"""Networks of other libraries than timm: which ones the benchmarks look at, and how each is built."""

from __future__ import annotations

from typing import Any

from torch import nn

Source = tuple[str, str, dict[str, Any], tuple[int, int, int]]
"""Name, factory, its arguments, input size (C, H, W)."""

LARGEST = 100_000_000
DROPPED = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
PATHS = {"drop_path_rate": 0.1}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": DROPPED,
    "DeiTForImageClassification": DROPPED,
    "ViTMSNForImageClassification": DROPPED,
    "BeitForImageClassification": PATHS,
    "Data2VecVisionForImageClassification": PATHS,
    "Dinov2ForImageClassification": PATHS | {"image_size": 224, "patch_size": 14},
    "Dinov2WithRegistersForImageClassification": PATHS | {"image_size": 224, "patch_size": 14},
    "Dinov2Model": {"image_size": 224, "patch_size": 14},
    "SwinForImageClassification": PATHS,
    "Swinv2ForImageClassification": PATHS,
    "ConvNextForImageClassification": PATHS,
    "ConvNextV2ForImageClassification": PATHS,
    "ResNetForImageClassification": {},
    "RegNetForImageClassification": {},
    "BitForImageClassification": {},
    "MobileNetV1ForImageClassification": {},
    "MobileNetV2ForImageClassification": {},
    "EfficientNetForImageClassification": {},
    "SegformerForImageClassification": PATHS,
    "PvtForImageClassification": {},
    "PvtV2ForImageClassification": PATHS,
    "MobileViTForImageClassification": {"image_size": 256},
    "MobileViTV2ForImageClassification": {"image_size": 256},
    "LevitForImageClassification": {},
    "PoolFormerForImageClassification": PATHS,
    "FocalNetForImageClassification": PATHS,
    "CvtForImageClassification": {},
    "HieraForImageClassification": PATHS,
    "SwiftFormerForImageClassification": PATHS,
    "HGNetV2ForImageClassification": {},
}
"""Default configs, with something random in training where the config knows it."""
SIZES = {"MobileViTForImageClassification": 256, "MobileViTV2ForImageClassification": 256}
TUPLES = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}
"""Without the heads that make a tuple of the output in training."""


def torchvision_sources() -> list[Source]:
    """Every classifier of torchvision up to LARGEST parameters, at the size that its weights want."""
    from torchvision import models

    found = []
    for name in models.list_models(module=models):
        weights = models.get_model_weights(name).DEFAULT
        if weights.meta["num_params"] <= LARGEST:
            size = weights.transforms().crop_size[0]
            found.append((f"torchvision:{name}", f"torchvision:{name}", TUPLES.get(name, {}), (3, size, size)))
    return found


def transformers_sources() -> list[Source]:
    """transformers' image networks with their default configs."""
    return [
        (f"transformers:{name}", f"transformers:{name}", fields, (3, SIZES.get(name, 224), SIZES.get(name, 224)))
        for name, fields in TRANSFORMERS.items()
    ]


def listed() -> list[Source]:
    """All of them."""
    return [*torchvision_sources(), *transformers_sources()]


def make_listed(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network that `listed` names, with random weights, and its input size."""
    from derc.factories import make

    for known, factory, kwargs, size in listed():
        if known == name:
            return make(name, factory, kwargs, None), size
    raise ValueError(f"benchmarks/sources.py lists no network {name!r}")
