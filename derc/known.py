"""What a library says of its networks: input size, normalisation, labels, licence, and where weights are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from derc import modelfolder
from derc.errors import UsageError, suggest
from derc.factories import LIBRARIES, architecture, onnx_path


@dataclass(frozen=True)
class Known:
    """A library's network; None and empty where the library does not say. Fields as in `Donor`."""

    factory: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None
    licence: str = "unknown"
    source: str = ""
    weights: Path | None = None
    repository: str = ""


def is_stored(factory: str) -> bool:
    """Whether `factory` names a folder or repository that holds weights: these are then the donor's."""
    library, _, name = factory.partition(":")
    return library == "transformers" and modelfolder.is_stored(name)


def of_file(factory: str, folder: Path, input_size: list[int] | None) -> Known:
    """What an ONNX file says: the size of its images, which are taken as they are unless the zoo file says otherwise.

    Raises UsageError for a damaged file, or one that leaves the size open where `input_size` does not give it.
    """
    from derc.onnxdonor import file

    path = onnx_path(factory, folder)
    size = file.read(path).size(tuple(input_size) if input_size else None)
    return Known(factory, input_size=size)


def known(factory: str, folder: Path, offline: bool) -> Known:
    """What the library of `factory` says; `source` is empty where it publishes no weights.

    Raises UsageError for an unknown network or tag, MissingDependencyError where the hub is needed and not reached.
    """
    library, _, name = factory.partition(":")
    match library:
        case "timm":
            return _timm(name)
        case "torchvision":
            return _torchvision(name)
        case "transformers" if modelfolder.is_stored(name):
            return _transformers(name, folder, offline)
        case "transformers":
            raise UsageError(
                f"{factory} names a class, which has no weights of its own: give a folder or OWNER/NAME on the hub, or "
                "a zoo file with weights"
            )
    schemes = ", ".join(f"{scheme}:NAME" for scheme in LIBRARIES)
    raise UsageError(f"nobody publishes weights of {factory}, only of {schemes}: give them as a file")


def _timm(name: str) -> Known:
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UsageError(f"timm has no network {base!r}{suggest(base, timm.list_models())}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UsageError(f"timm has no weights {tag!r} of {base}, known: {tags}{suggest(tag, tags)}")
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise UsageError(f"timm knows no input size of {name}: name it in a zoo file with its input_size and weights")
    channels, height, width = config.input_size
    return Known(
        factory=f"timm:{name}",
        input_size=(channels, height, width),
        mean=tuple(config.mean),
        std=tuple(config.std),
        labels=_timm_labels(asdict(config)),
        licence=config.license or "unknown",
        source=str(config.hf_hub_id or config.url or ""),
    )


def _timm_labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """WordNet ids where the head is one of ImageNet's label sets, else the indices; None for a headless network."""
    from timm.data.imagenet_info import infer_imagenet_subset

    subset = infer_imagenet_subset(config)
    return _imagenet(subset) if subset else tuple(str(index) for index in range(config["num_classes"])) or None


def _imagenet(subset: str) -> tuple[str, ...]:
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo(subset)
    return tuple(info.label_names())


def _common(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """ImageNet's 1000 classes under one set of names, whichever names a library has for them."""
    if labels and len(labels) == 1000 and (labels[0][:5].lower(), labels[-1][:6].lower()) == ("tench", "toilet"):
        return _imagenet("imagenet-1k")
    return labels


def _torchvision(name: str) -> Known:
    from torchvision import models

    base, _, tag = name.partition(".")
    networks = models.list_models(module=models)
    if base not in networks:
        raise UsageError(f"torchvision has no classifier {base!r}{suggest(base, networks)}")
    members = models.get_model_weights(base).__members__
    if tag and tag not in members:
        raise UsageError(f"torchvision has no weights {tag!r} of {base}, known: {list(members)}{suggest(tag, members)}")
    weights = members[tag] if tag else models.get_model_weights(base).DEFAULT
    images = weights.transforms()
    return Known(
        factory=f"torchvision:{name}",
        kwargs={"transform_input": True} if architecture(name) in ("googlenet", "inception_v3") else {},
        input_size=(3, images.crop_size[0], images.crop_size[0]),
        mean=tuple(images.mean),
        std=tuple(images.std),
        labels=_common(tuple(weights.meta["categories"])),
        licence="BSD-3-Clause",
        source=weights.url,
    )


def _transformers(name: str, folder: Path, offline: bool) -> Known:
    found = modelfolder.read(name, folder, offline)
    return Known(
        factory=f"transformers:{found.kind}",
        kwargs=found.kwargs,
        input_size=found.input_size,
        mean=found.mean,
        std=found.std,
        labels=_common(found.labels),
        source=name if found.repository else Path(name).name,
        weights=found.weights,
        repository=found.repository,
    )
