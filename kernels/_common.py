"""What the kernels share."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl


def wide(*dtypes: torch.dtype) -> tl.dtype:
    """The type that sums and coordinates are kept in: float64 as soon as one of ``dtypes`` is, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def block(n: int, most: int) -> int:
    """The size of a block for ``n`` elements: the next power of 2, or ``most``."""
    return min(triton.next_power_of_2(max(n, 1)), most)


@triton.jit
def divide(x, y):
    """As IEEE 754 rounds it, which ``/`` of float32 does not."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


def splits(parts: int, programs: int) -> int:
    """Among how many each of ``programs`` shares the ``parts`` of its sum, so that all together fill a GPU."""
    return max(1, min(parts, 1024 // programs))


@triton.jit
def add_up(p_row, s_row, rows, m, BLOCK: tl.constexpr):
    """The sum of some rows of partial sums, in an order that depends on nothing but their number."""
    total = tl.zeros(p_row.shape, p_row.dtype.element_ty)
    for r in range(0, rows, BLOCK):
        o_r = r + tl.arange(0, BLOCK)
        p = p_row[None, :] + (o_r.to(tl.int64) * s_row)[:, None]
        total += tl.sum(tl.load(p, (o_r < rows)[:, None] & m[None, :], 0.0), 0)
    return total


INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """``total`` + left * right; PRECISION is that of float32."""
    if INTERPRETED:  # where a product takes the bits of bfloat16 for integers
        left, right = left.to(total.dtype), right.to(total.dtype)
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
