"""The processes that train together: one, or as many as `torchrun` started."""

from __future__ import annotations

import atexit
import importlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: its number.
        world: how many there are.
        device: where it computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        values = values.to(self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the first one's running statistics."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def join(device: str = "auto") -> Processes:
    """Join the processes of `torchrun`; without it, this one is alone.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N"; under torchrun, "auto" and "cuda" take the GPU of the
            process's local rank.

    Raises:
        ValueError: a device that is not there.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local}"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if place.type == "cuda":
        if not torch.cuda.is_available() or place.index >= torch.cuda.device_count():
            raise ValueError(f"device {device}: PyTorch sees {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(place)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # Its functions keep the group that is there at its import, else done when a model is wrapped:
        # the group's threads would run into the interpreter's end, which can abort the process.
        importlib.import_module("torch.distributed.nn.functional")
        # Until this process ends: a second group on the same port could meet the store of the first.
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    if not dist.is_initialized():
        return Processes(0, 1, place)
    return Processes(dist.get_rank(), dist.get_world_size(), place)
