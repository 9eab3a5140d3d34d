"""Pretrained weights of the libraries' networks, from the local hub caches first and from the network where allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from derc.checkpoints import FILES, load, shard_names
from derc.errors import MissingDependencyError, UsageError
from derc.factories import architecture, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
REMEDY = "run once with a connection, or give the weights as a file with --checkpoint (in a zoo file: weights)"


def timm_state(name: str, kwargs: Mapping[str, Any], offline: bool) -> dict[str, Tensor]:
    """The weights that timm publishes for `name`, fitted by timm to the network that `kwargs` make.

    Raises MissingDependencyError where they cannot be had, UsageError where `kwargs` make another head of them.
    """
    import timm

    config = _timm_config(name)
    if kwargs.get("num_classes", config.num_classes) not in (0, config.num_classes):
        raise UsageError(
            f"the pretrained weights of {name} have {config.num_classes} classes, not {kwargs['num_classes']}: leave "
            "num_classes away, or take 0 for the network without its head"
        )
    foreign = config.custom_load == "hf" if config.hf_hub_id else bool(config.custom_load)
    overlay = {"file": str(timm_file(name, offline)), "custom_load": foreign}
    module: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    return dict(module.state_dict())


def timm_file(name: str, offline: bool) -> Path:
    """The file that timm's weights of `name` lie in; raises as `timm_state` does."""
    config = _timm_config(name)
    if not config.hf_hub_id:
        url, file = (config.url, "") if isinstance(config.url, str) else config.url
        return url_file(url, name, offline, file)
    repository, _, revision = config.hf_hub_id.partition("@")
    file = config.hf_hub_filename
    names = (re.sub(r"(pytorch_model)?\.\w+$", _safe, file), file) if file else WEIGHTS
    return repository_file(repository, names, name, offline, revision or None)


def _timm_config(name: str) -> Any:
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise UsageError(f"timm publishes no weights of {name}: give a file, or name another tag")
    return config


def _safe(ending: re.Match[str]) -> str:
    return "model.safetensors" if ending[1] else ".safetensors"


def torchvision_state(name: str, offline: bool) -> dict[str, Tensor]:
    """The weights that torchvision publishes for `name`: of the tag that it ends in, else the best."""
    from torchvision import models

    known = models.get_model_weights(architecture(name))
    tag = name.partition(".")[2]
    if tag and tag not in known.__members__:
        raise UsageError(
            f"torchvision has no weights {tag!r} of {architecture(name)}, known: {list(known.__members__)}"
        )
    weights = known[tag] if tag else known.DEFAULT
    state = load(url_file(weights.url, name, offline)).state
    if architecture(name).startswith("densenet"):
        return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key): state[key] for key in state}
    return state


def repository_state(repository: str, offline: bool) -> dict[str, Tensor]:
    """The weights in a repository of the hub, which may lie in several files."""
    path = repository_file(repository, FILES, repository, offline)
    if path.suffix == ".json":
        for shard in shard_names(path):
            repository_file(repository, [shard], repository, offline)
    return load(path).state


def repository_file(
    repository: str, names: Sequence[str], what: str, offline: bool, revision: str | None = None
) -> Path:
    """The first of the files `names` that the hub's `repository` has, from the local cache where it is there.

    Raises MissingDependencyError, with `what` is looked for, where it is neither there nor to be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    if offline:
        raise _absent(what, f"not in the local hub cache of {repository}, and this run is offline")
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise _absent(what, f"no connection to the hub for {repository}") from error
        except Exception as error:  # the hub client raises errors of several libraries
            raise _absent(what, first_line(error)) from error
    raise _absent(what, f"{repository} has none of {', '.join(names)}")


def url_file(url: str, what: str, offline: bool, file: str = "") -> Path:
    """What lies at `url`, from torch.hub's cache where it is there; raises as `repository_file` does."""
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", file or Path(urlparse(url).path).name)
    if path.is_file():
        return path
    if offline:
        raise _absent(what, f"{path} is not there, and this run is offline")
    path.parent.mkdir(parents=True, exist_ok=True)
    start = re.search(r"-([a-f0-9]{8,})\.", path.name)
    try:
        torch.hub.download_url_to_file(url, str(path), start[1] if start else None, progress=False)
    except Exception as error:  # urllib, sockets and torch raise errors of several kinds
        raise _absent(what, first_line(error)) from error
    return path


def _absent(what: str, reason: str) -> MissingDependencyError:
    return MissingDependencyError(f"the pretrained weights of {what} cannot be had ({reason}): {REMEDY}")
