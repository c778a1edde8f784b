"""The only place where a Triton kernel is launched, and where the device's architecture is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

# What the interpreter's launches are planned for: it has no architecture of its own.
INTERPRETED_ARCH = 90
INTERPRETED_MULTIPROCESSORS = 3  # fewer than tiles: persistent kernels go round their loop there, too


@functools.cache
def arch_of(device: torch.device) -> int:
    """Compute capability without the dot (90 for Hopper); on a CPU the one that the interpreter stands in for."""
    if device.type != "cuda":
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, one on each: the grid of a persistent kernel."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Address(NamedTuple):
    """All that a launch asks of a descriptor's tensor; a cached descriptor must not keep its memory alive."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


@functools.lru_cache(maxsize=4096)
def _descriptor(pointer: int, dtype: torch.dtype, shape: tuple, strides: tuple, block: tuple,
                make: Callable[..., Any]) -> Any:
    return make(_Address(pointer, dtype), list(shape), list(strides), list(block))


def descriptor(tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...],
               block: tuple[int, ...], make: Callable[..., Any] = TensorDescriptor) -> Any:
    """A host tensor descriptor (TMA) over `tensor`'s memory, cached: PyTorch's allocator returns to its addresses.

    Args:
        tensor: starts at a multiple of 16 bytes.
        shape: what loads and stores are clipped to; loads read zeros outside.
        strides: in elements; multiples of 16 bytes but for the last, which is 1.
        block: elements of one load or store, powers of two.
        make: builds it for a GPU; a Gluon kernel's descriptors know their layout in shared memory, too.
    """
    if tensor.device.type == "cpu":  # the interpreter asks for the storage
        return TensorDescriptor(tensor, list(shape), list(strides), list(block))
    return _descriptor(tensor.data_ptr(), tensor.dtype, shape, strides, block, make)


def launch(kernel: Any, programs: int, arguments: Mapping[str, Any], device: torch.device,
           options: Mapping[str, int]) -> None:
    """Runs `programs` instances of `kernel` on the device that holds its tensors.

    Args:
        kernel: a `@triton.jit` or `@gluon.jit` function.
        programs: size of the one-dimensional grid.
        arguments: value of every parameter of the kernel.
        device: where every tensor of `arguments` lives; a CPU needs the Triton interpreter.
        options: num_warps and num_stages.
    """
    if device.type == "cuda":
        # Triton launches on the current device, whichever device its pointers belong to.
        with torch.cuda.device(device):
            kernel[(programs,)](**arguments, **options)
    else:
        kernel[(programs,)](**arguments, **options)
