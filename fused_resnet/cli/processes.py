"""The processes that torchrun starts: who one of them is, and what they tell each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class Processes:
    """One process among `count`, and the device that it computes on."""

    rank: int
    count: int
    device: str

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """The process group of all, or None where this process is alone."""
        return distributed.group.WORLD if self.count > 1 else None

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of every process's tensor."""
        if self.count > 1:
            distributed.all_reduce(values)
            values /= self.count
        return values

    def largest(self, value: int) -> int:
        """The largest number that a process gives."""
        if self.count == 1:
            return value
        number = torch.tensor(value, device=self.device)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return int(number)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Joins the processes of torchrun, over NCCL on CUDA and Gloo on a CPU; without torchrun one process is alone.

    Raises:
        ValueError: more processes on a machine than it has GPUs.
    """
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield Processes(0, 1, device)
        return
    if device == "cuda":
        place = distributed.get_node_local_rank()
        if place >= torch.cuda.device_count():
            raise ValueError(f"torchrun started more processes than there are GPUs ({torch.cuda.device_count()})")
        torch.cuda.set_device(place)
        device = f"cuda:{place}"
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()
