"""Where a training runs: plainly on one device, or through Accelerate in mixed precision or in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from derc.errors import MissingDependencyError, UsageError
from derc.training.examples import Share


def open_runner(precision: str, device: str) -> Runner:
    """Accelerate's for mixed precision or several processes, else the plain one.

    Raises UsageError for a device that is not here, MissingDependencyError where Accelerate is needed and absent.
    """
    place = _device(device)
    if precision == "fp16" and place.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU to train on: give bf16 or fp32")
    if precision == "fp32" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Runner(place)
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"training in {precision} or in several processes needs the package accelerate, which is not installed: "
            'pip install "derc[train]"'
        ) from error
    return Accelerated(precision, place)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used here ({reason}): give cpu, or leave it out") from error
    return device


class Runner:
    """One process on `device` in float32."""

    share = Share()
    scaler: Any = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as it is called while training."""
        return network

    def context(self) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients."""
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float) -> None:
        """One step of the optimiser with the gradients clipped to the norm `clip`, 0: as they are."""
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return values

    def wait(self) -> None:
        """Until every process is here."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.share.rank == 0


class Accelerated(Runner):
    """Accelerate's mixed precision, and its processes where it was launched with several."""

    def __init__(self, precision: str, device: torch.device) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # it remembers the precision of an earlier training in this process
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=device.type == "cpu",
            kwargs_handlers=[unused],
        )
        super().__init__(self.accelerator.device)
        self.share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        self.scaler = self.accelerator.scaler

    def wrap(self, network: nn.Module) -> nn.Module:
        wrapped: nn.Module = self.accelerator.prepare_model(network) if self.share.world > 1 else network
        return wrapped

    def context(self) -> AbstractContextManager[Any]:
        found: AbstractContextManager[Any] = self.accelerator.autocast()
        return found

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float) -> None:
        if self.scaler is None:
            super().step(optimizer, parameters, clip)
            return
        self.scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def total(self, values: Tensor) -> Tensor:
        found: Tensor = self.accelerator.reduce(values, "sum")
        return found

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()
