"""One bit for each element of a tensor: what backward has to remember of a ReLU.

Bit i of byte b belongs to element 8 * b + i in the order of the elements in memory, so that a mask serves dense
tensors in any layout; the bits behind the last element are 0.
"""

from __future__ import annotations

import functools

import torch

# Times eight bytes of 0 or 1 (the first lowest), the top byte holds them as bits (the first lowest).
_GATHER = 0x0102040810204080


def dense(t: torch.Tensor) -> torch.Tensor:
    """The elements of a dense `t`, contiguous or in channels_last memory, as one row in the order of memory."""
    if t.dim() == 4 and not t.is_contiguous():
        t = t.permute(0, 2, 3, 1)
    return t.view(-1)


def pack(flags: torch.Tensor) -> torch.Tensor:
    """Eight flags a byte.

    Args:
        flags: bool of any shape, dense in contiguous or channels_last memory.

    Returns:
        uint8 of [ceil(numel / 8)].
    """
    row = dense(flags).view(torch.uint8)
    if row.numel() % 8:
        row = torch.nn.functional.pad(row, (0, -row.numel() % 8))
    if row.storage_offset() % 8:
        row = row.clone()
    words = row.view(torch.int64) * _GATHER
    return words.view(torch.uint8)[7::8].contiguous()


@functools.cache
def _spread(device: torch.device) -> torch.Tensor:
    """Byte -> its bits as eight bytes of 0 or 1 in one word."""
    values = torch.arange(256, device=device)
    return ((values[:, None] >> torch.arange(8, device=device)) & 1).to(torch.uint8).view(torch.int64).view(-1)


def unpack(bits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The flags that `pack` was given, as bool in the shape and layout of the dense tensor `like`."""
    flags = _spread(bits.device)[bits.int()].view(torch.bool)[:like.numel()]
    if like.is_contiguous():
        return flags.view(like.shape)
    n, c, h, w = like.shape
    return flags.view(n, h, w, c).permute(0, 3, 1, 2)
