"""SynFlow: how much flows through the network along all its paths, without any data (Tanaka et al. 2020)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from derc.errors import DercError
from derc.modules import Normalize
from derc.scoring.evidence import Evidence, Subject, squash


@dataclass(frozen=True)
class SynFlow:
    """log Σ |θ ⊙ ∂R/∂θ|, R the sum of the outputs for an image of ones with |θ| in place of θ (Tanaka et al. 2020).

    The network is made positive throughout: a batch norm in eval mode is |γ| / σ · x + |β|, other normalisations, which
    would take all scale away, are |γ| · x + |β|, attention and other softmax weigh all evenly, clips have no upper end,
    and the image is of ones after its normalisation. In float64, on a copy. One forward and one backward pass of one
    image.
    Raises DercError where the flow is not finite.
    """

    name: ClassVar[str] = "synflow"
    needs: ClassVar[frozenset[str]] = frozenset()
    sees_precision: ClassVar[bool] = False

    def measure(self, subject: Subject, evidence: Evidence) -> float:
        _, height, width, channels = evidence.probe.images.shape
        return log_flow(subject.network, (channels, height, width))

    def share(self, value: float) -> float:
        return squash(value, 100.0)


def log_flow(network: nn.Module, shape: tuple[int, int, int]) -> float:
    """SynFlow of `network` for images (C, H, W); -inf where nothing flows."""
    network = positive(network)
    parameters = [parameter for parameter in network.parameters() if parameter.is_floating_point()]
    with torch.enable_grad(), doubles(), Positive():
        flow = network(torch.ones(1, *shape)).sum()
        gradients = torch.autograd.grad(flow, parameters, allow_unused=True)
    products = [(p * g).abs().sum().detach() for p, g in zip(parameters, gradients, strict=True) if g is not None]
    total = float(torch.stack(products).sum()) if products else 0.0
    if not math.isfinite(total):
        raise DercError("synflow is not finite for this network: choose another --objective")
    return math.log(total) if total > 0 else -math.inf


@torch.no_grad()
def positive(network: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode with |θ| in place of θ, and images taken as they are."""
    network = copy.deepcopy(network).double().eval()
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.abs_().requires_grad_()
    for module in network.modules():
        if isinstance(module, Normalize):
            module.mean.zero_()
            module.std.fill_(1)
    return network


@contextmanager
def doubles() -> Iterator[None]:
    """Inside, tensors made without a type are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Positive(TorchFunctionMode):
    """Replaces, inside, what would make a value negative or take its scale away."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return RULES.get(func, func)(*args, **(kwargs or {}))


def _along(value: Tensor | None, x: Tensor) -> Tensor | float:
    """Per-channel values (C,) beside x (N, C, …)."""
    return 1.0 if value is None else value.reshape(1, -1, *[1] * (x.dim() - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, variance: Tensor | None, eps: float) -> Tensor:
    scale = 1.0 if variance is None else torch.sqrt(variance + eps)
    found = x * _along(weight, x) / _along(scale if isinstance(scale, Tensor) else None, x)
    return found if bias is None else found + _along(bias, x)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    return _affine(x, weight, bias, running_var, eps)


def _raw_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, *rest: Any
) -> Tensor:
    return _affine(x, weight, bias, var, float(rest[2]))


def _layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    found = x if weight is None else x * weight
    return found if bias is None else found + bias


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return x if weight is None else x * weight


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    return _affine(x, weight, bias, None, 0.0)


def _unclipped(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.relu()


def _even(x: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    """Softmax as a constant: where logits are beyond all scale, their derivative is noise beyond all scale."""
    return torch.full_like(x, 1 / x.shape[-1 if dim is None else dim], requires_grad=False)


def _even_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return value.mean(-2, keepdim=True).expand(*query.shape[:-1], value.shape[-1])


def _even_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    *rest: Any,
    **more: Any,
) -> tuple[Tensor, None]:
    """torch.nn.MultiheadAttention; tokens are on the first axis."""
    weight: Tensor = more["v_proj_weight"] if in_weight is None else in_weight[2 * width :]
    mixed = F.linear(value.mean(0, keepdim=True), weight, None if in_bias is None else in_bias[2 * width :])
    return F.linear(mixed, rest[4], rest[5]).expand(query.shape[0], *mixed.shape[1:-1], -1), None


def _bounded_exp(x: Tensor) -> Tensor:
    """Where it is beyond all scale its derivative is 0, so that what saturates after it gives no 0 · ∞."""
    return x.clamp(max=100.0).exp()


RULES: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    torch.batch_norm: _raw_batch_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.hardtanh: _unclipped,
    F.relu6: _unclipped,
    torch.clamp: _unclipped,
    Tensor.clamp: _unclipped,
    Tensor.clamp_: _unclipped,
    F.softmax: _even,
    torch.softmax: _even,
    Tensor.softmax: _even,
    F.scaled_dot_product_attention: _even_attention,
    F.multi_head_attention_forward: _even_heads,
    torch.exp: _bounded_exp,
    Tensor.exp: _bounded_exp,
}
