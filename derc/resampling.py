"""Weights for another input size: position tables and windows resampled by the library that the network is from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from derc import huggingface
from derc.errors import UsageError
from derc.factories import architecture, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = Mapping[str, Tensor]


def options(factory: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Arguments with which the library of `factory` may build a network for images of `size` (H, W)."""
    square = size[0] == size[1]
    plain = size[0] if square else list(size)
    match factory.partition(":")[0]:
        case "timm":
            return [{"img_size": plain}]
        case "torchvision":
            return [{"image_size": plain}, {"input_size": list(size)}]
        case "transformers":
            return [{"image_size": size[0]}] * square + [{"image_size": list(size)}]
    return []


def resampled(factory: str, kwargs: Mapping[str, Any], native: nn.Module, target: nn.Module) -> State:
    """The weights of `native` for `target`, the same network built with `kwargs` for another input size.

    Raises UsageError where the library cannot resample one of them.
    """
    own, given = target.state_dict(), native.state_dict()
    library = factory.partition(":")[0]
    if any(given[key].shape != value.shape for key, value in own.items() if key in given):
        try:
            given = _by_library(factory, kwargs, native, target)
        except Exception as error:  # what a library does for shapes that it was not made for
            raise UsageError(f"{library} cannot resample its weights: {first_line(error)}") from error
    wrong = [key for key, value in own.items() if key not in given or given[key].shape != value.shape]
    if wrong:
        raise UsageError(f"{library} cannot resample its weights for another input size ({wrong[0]})")
    return {key: given[key] for key in own}


def _by_library(factory: str, kwargs: Mapping[str, Any], native: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    library, _, name = factory.partition(":")
    match library:
        case "timm":
            return _timm(name, kwargs, native.state_dict())
        case "torchvision":
            return _torchvision(target, native.state_dict())
        case "transformers":
            return _transformers(native, target)
    return dict(native.state_dict())


def _timm(name: str, kwargs: Mapping[str, Any], given: State) -> dict[str, Tensor]:
    """timm's own filter, which it runs on every pretrained checkpoint that it loads."""
    import timm

    head = {"num_classes": kwargs["num_classes"]} if "num_classes" in kwargs else {}
    overlay = {"state_dict": dict(given), "custom_load": False, "label_offset": 0, **head}
    module: nn.Module = timm.create_model(architecture(name), pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    return dict(module.state_dict())


def _torchvision(target: nn.Module, given: State) -> dict[str, Tensor]:
    """torchvision's own interpolation of a vision transformer's position table."""
    from torchvision.models import VisionTransformer
    from torchvision.models.vision_transformer import interpolate_embeddings

    if not isinstance(target, VisionTransformer):
        return dict(given)
    return dict(interpolate_embeddings(target.image_size, target.patch_size, dict(given)))


def _transformers(native: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    """transformers' own interpolation of position tables, which its networks do at run time when asked to."""
    import torch

    found = dict(native.state_dict())
    for path, module in native.named_modules():
        table: Any = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Parameter) and hasattr(module, "interpolate_pos_encoding"):
            other: Any = target.get_submodule(path)
            height, width = huggingface.image_size(target)
            tokens = torch.empty_like(other.position_embeddings)
            with torch.no_grad():
                found[f"{path}.position_embeddings"] = module.interpolate_pos_encoding(tokens, height, width).detach()
    return found
