"""What the kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def wide(*dtypes: torch.dtype) -> tl.dtype:
    """The type that sums and coordinates are kept in: float64 as soon as one of ``dtypes`` is, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def block(n: int, most: int) -> int:
    """The size of a block for ``n`` elements: the next power of 2, or ``most``."""
    return min(triton.next_power_of_2(n), most)


@triton.jit
def divide(x, y):
    """As IEEE 754 rounds it, which ``/`` of float32 does not."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y
