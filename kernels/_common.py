"""What the kernels share."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl


def wide(*dtypes: torch.dtype) -> tl.dtype:
    """The type that sums and coordinates are kept in: float64 as soon as one of ``dtypes`` is, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def dtype_of_sums(x: torch.Tensor) -> torch.dtype:
    """The same for a tensor of partial sums of ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def float32_precision(setting: str) -> str:
    """What float32 is multiplied in, given torch's setting for the library that a kernel stands for."""
    return "tf32" if setting == "tf32" and torch.version.hip is None else "ieee"


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


BLOCK_BOXES = 32  # bits of the word that says which of so many boxes reach a tile


@triton.jit
def boxes_on_tile(p_bounds, k0, boxes, i_n, y_first, y_last, x_first, x_last, BLOCK_K: tl.constexpr):
    """A bit for each of the boxes from k0 on that reach a tile of image i_n. ``p_bounds`` [5, K] has for each box its
    image, or -1, and its first and last row and column."""
    o_k = k0 + tl.arange(0, BLOCK_K)
    m_k = o_k < boxes
    p_k = p_bounds + o_k
    hit = (tl.load(p_k, m_k, -1) == i_n) & (tl.load(p_k + boxes, m_k, 0) <= y_last)
    hit = hit & (tl.load(p_k + 2 * boxes, m_k, 0) >= y_first) & (tl.load(p_k + 3 * boxes, m_k, 0) <= x_last)
    hit = hit & (tl.load(p_k + 4 * boxes, m_k, 0) >= x_first)
    return tl.sum(tl.where(hit, tl.full((BLOCK_K,), 1, tl.int32) << (o_k - k0), 0))
