"""Gram matrices of feature maps, the style loss, and their gradient.

Forward: a program multiplies two blocks of channels, a tile on or below the diagonal, over a share of the positions:
few channels of a large map are shared out among many programs. A second kernel adds up the shares in their order,
divides in the type of the sums, and writes each tile and its mirror image; for the loss also what it differs from the
target by, and the squares of that.

Backward: (S + S^T) F, one product. For features of 16 bits, S + S^T is scaled row by row to numbers of size one and
split in two of 16 bits, so that tensor cores lose nothing of it and nothing underflows.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from pyzoo.kernels._common import add_up, block, divide, dot, dtype_of_sums, float32_precision, splits, wide
from pyzoo.kernels._configs import pick


def _divisor(channels: int, positions: int, normalize: bool) -> float:
    return float(max(channels * positions, 1)) if normalize else 1.0


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit
def _tile(i):
    """Row and column of tile i among those on and below the diagonal."""
    row = ((tl.sqrt(8.0 * i + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > i, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= i, row + 1, row)
    return row, i - row * (row + 1) // 2


@triton.jit
def _gram_matrix_fwd_kernel(
    p_features,  # [N, C, M]
    p_shares,  # [S, N * tiles, BLOCK_C, BLOCK_C]
    s_n,
    s_c,
    s_m,
    channels,
    positions,
    length,  # of a share
    tiles,
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    i_t, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, column = _tile((i_t % tiles).to(tl.int32))
    o_i, o_j = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_C)
    o_r, o_c = row.to(tl.int64) * BLOCK_C + o_i, column.to(tl.int64) * BLOCK_C + o_j
    p_image = p_features + i_t // tiles * s_n
    p_rows, p_columns = p_image + (o_r * s_c)[:, None], p_image + (o_c * s_c)[None, :]
    m_r, m_c = (o_r < channels)[:, None], (o_c < channels)[None, :]

    total = tl.zeros((BLOCK_C, BLOCK_C), SUM)
    start = i_s * length
    for m in range(0, tl.minimum(length, positions - start).to(tl.int32), BLOCK_M):
        o_m = start + (m + tl.arange(0, BLOCK_M))
        m_m, at = o_m < positions, o_m * s_m
        rows = tl.load(p_rows + at[None, :], m_r & m_m[None, :], 0.0)
        if ONE_TILE:
            columns = tl.trans(rows)
        else:
            columns = tl.load(p_columns + at[:, None], m_c & m_m[:, None], 0.0)
        total = dot(rows, columns, total, PRECISION)
    p = p_shares + ((i_s * tl.num_programs(0) + i_t) * BLOCK_C + o_i[:, None]) * BLOCK_C + o_j[None, :]
    tl.store(p, total)


@triton.jit
def _gram_matrix_total_kernel(
    p_shares,  # [S, N * tiles, BLOCK_C, BLOCK_C]
    p_target,  # [N, C, C]
    p_gram,  # [N, C, C]: with a target, what the Gram matrix differs from it by
    p_squares,  # [N * tiles, parts of a tile]
    s_target_n,
    s_target_r,
    s_target_c,
    channels,
    shares,
    tiles,
    divisor: tl.float64,
    WITH_TARGET: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_t, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = i_p * BLOCK + tl.arange(0, BLOCK)
    p = p_shares + i_t * BLOCK_C * BLOCK_C + o
    total = add_up(p, tl.num_programs(0).to(tl.int64) * BLOCK_C * BLOCK_C, shares, o >= 0, BLOCK_S)
    total = divide(total, tl.full((BLOCK,), divisor, SUM))

    row, column = _tile((i_t % tiles).to(tl.int32))
    o_r, o_c = row.to(tl.int64) * BLOCK_C + o // BLOCK_C, column.to(tl.int64) * BLOCK_C + o % BLOCK_C
    m_lower, m_upper = (o_r < channels) & (o_c <= o_r), (o_r < channels) & (o_c < o_r)
    i_n = i_t // tiles
    lower, upper = total, total
    if WITH_TARGET:
        p = p_target + i_n * s_target_n
        lower -= tl.load(p + o_r * s_target_r + o_c * s_target_c, m_lower, 0.0).to(SUM)
        upper -= tl.load(p + o_c * s_target_r + o_r * s_target_c, m_upper, 0.0).to(SUM)
        squares = tl.where(m_lower, lower * lower, 0.0) + tl.where(m_upper, upper * upper, 0.0)
        tl.store(p_squares + i_t * tl.num_programs(1) + i_p, tl.sum(squares))
    p = p_gram + i_n * channels * channels
    tl.store(p + o_r * channels + o_c, lower.to(p_gram.dtype.element_ty), m_lower)
    tl.store(p + o_c * channels + o_r, upper.to(p_gram.dtype.element_ty), m_upper)


@triton.jit
def _gram_loss_total_kernel(p_squares, p_loss, count, divisor: tl.float64, SUM: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), SUM)
    for i in range(0, count, BLOCK):
        o = i + tl.arange(0, BLOCK)
        total += tl.load(p_squares + o, o < count, 0.0)
    tl.store(p_loss, divide(tl.sum(total), tl.full((), divisor, SUM)))


def _fwd_configs(element_size, channels, positions):
    of_16_bits = [(64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 3), (32, 128, 4, 3)]
    if channels >= 256:
        of_16_bits[:2] = of_16_bits[1::-1]
    of_32_bits = [(64, 32, 4, 2), (64, 16, 4, 2), (32, 32, 4, 3), (128, 16, 8, 3)]
    of_64_bits = [(32, 16, 4, 2), (32, 32, 4, 2), (64, 16, 8, 2)]
    for c, m, warps, stages in {2: of_16_bits, 4: of_32_bits, 8: of_64_bits}[element_size]:
        yield {"BLOCK_C": max(block(channels, c), 16), "BLOCK_M": m, "num_warps": warps, "num_stages": stages}


def _gram(features, target, gram, normalize):
    """Writes the Gram matrices to ``gram``, less ``target`` if there is one; then returns the sums of the squares."""
    x = features.flatten(2)
    images, channels, positions = x.shape
    sums = {"dtype": dtype_of_sums(x), "device": x.device}
    if gram.numel() == 0:
        return torch.empty(0, **sums)
    configs = partial(_fwd_configs, x.element_size())
    config = pick(_gram_matrix_fwd_kernel, configs, x.device, x.dtype, channels=channels, positions=positions)
    size = config["BLOCK_C"]
    blocks = triton.cdiv(channels, size)
    tiles = blocks * (blocks + 1) // 2
    steps = triton.cdiv(positions, config["BLOCK_M"])
    # Four times fewer shares than programs fit: each is written and read again.
    length = triton.cdiv(steps, splits(steps, 4 * images * tiles)) * config["BLOCK_M"]
    count = max(triton.cdiv(positions, length), 1) if length else 1
    shares = torch.empty((count, images * tiles, size, size), **sums)
    _gram_matrix_fwd_kernel[(images * tiles, count)](
        *(x, shares, *x.stride(), channels, positions, length, tiles),
        ONE_TILE=tiles == 1,
        PRECISION=float32_precision(torch.backends.cuda.matmul.fp32_precision),  # as torch.bmm
        SUM=wide(x.dtype),
        **config,
    )
    part = min(size * size, 256)
    squares = torch.empty((images * tiles, size * size // part), **sums)
    _gram_matrix_total_kernel[squares.shape](
        *(shares, target, gram, squares),
        *((0, 0, 0) if target is None else target.expand(images, -1, -1).stride()),
        *(channels, count, tiles, _divisor(channels, positions, normalize)),
        WITH_TARGET=target is not None,
        SUM=wide(x.dtype),
        BLOCK_C=size,
        BLOCK=part,
        BLOCK_S=block(count, 16),
    )
    return squares


def gram_matrix_fwd(features, gram, normalize):
    _gram(features, None, gram, normalize)


def gram_loss_fwd(features, target, difference, loss, normalize):
    squares = _gram(features, target, difference, normalize)
    divisor = float(max(difference.numel(), 1))
    _gram_loss_total_kernel[(1,)](squares, loss, squares.numel(), divisor, SUM=wide(loss.dtype), BLOCK=1024)


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _symmetric_kernel(
    p_grad,  # [N, C, C]
    p_high,  # [N, C, C]
    p_low,  # [N, C, C]
    p_scale,  # [N, C]: what S + S^T has been divided by, row by row
    s_n,
    s_r,
    s_c,
    channels,
    row_blocks,
    divisor: tl.float64,
    SPLIT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_n = (tl.program_id(0) // row_blocks).to(tl.int64)
    o_r = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < channels
    p_image = p_grad + i_n * s_n
    scale = tl.full((BLOCK_R,), 1.0, SUM)
    if SPLIT:
        most = tl.zeros((BLOCK_R,), SUM)
        for c in range(0, channels, BLOCK_C):
            row = _symmetric(p_image, s_r, s_c, channels, o_r, m_r, c, SUM, BLOCK_C)
            most = tl.maximum(most, tl.max(tl.abs(row), 1))
        # The power of two of the largest, unless that is zero or not finite.
        power = (most.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where((power > 0.0) & (power < float("inf")), power, 1.0)
    for c in range(0, channels, BLOCK_C):
        row = _symmetric(p_image, s_r, s_c, channels, o_r, m_r, c, SUM, BLOCK_C)
        if SPLIT:
            row = row / scale[:, None]
        o_c = c + tl.arange(0, BLOCK_C)
        at = (i_n * channels + o_r[:, None]) * channels + o_c[None, :]
        m = m_r[:, None] & (o_c < channels)[None, :]
        high = row.to(p_high.dtype.element_ty)
        tl.store(p_high + at, high, m)
        if SPLIT:
            low = row - high.to(SUM)
            low = tl.where(tl.abs(low) < float("inf"), low, 0.0)
            tl.store(p_low + at, low.to(p_low.dtype.element_ty), m)
    tl.store(p_scale + i_n * channels + o_r, divide(scale, tl.full((BLOCK_R,), divisor, SUM)), m_r)


@triton.jit
def _symmetric(p_image, s_r, s_c, channels, o_r, m_r, c, SUM: tl.constexpr, BLOCK_C: tl.constexpr):
    """Some rows of S + S^T, BLOCK_C columns from c on."""
    o_c = c + tl.arange(0, BLOCK_C).to(tl.int64)
    m = m_r[:, None] & (o_c < channels)[None, :]
    of_row = tl.load(p_image + (o_r * s_r)[:, None] + (o_c * s_c)[None, :], m, 0.0)
    return of_row.to(SUM) + tl.load(p_image + (o_r * s_c)[:, None] + (o_c * s_r)[None, :], m, 0.0).to(SUM)


@triton.jit
def _gram_matrix_bwd_kernel(
    p_high,  # [N, C, C]
    p_low,  # [N, C, C]
    p_scale,  # [N, C]
    p_features,  # [N, C, M]
    p_grad_features,  # [N, C, M]
    s_n,
    s_c,
    s_m,
    s_out_n,
    s_out_c,
    s_out_m,
    channels,
    positions,
    row_blocks,
    column_blocks,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i = tl.program_id(0)  # the rows of one block of positions are neighbours, which read the same features
    o_c = (i % row_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_m = (i // row_blocks % column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_n = (i // row_blocks // column_blocks).to(tl.int64)
    m_c, m_m = o_c < channels, o_m < positions
    at = (i_n * channels + o_c[:, None]) * channels
    p_x = p_features + i_n * s_n + (o_m * s_m)[None, :]

    total = tl.zeros((BLOCK_C, BLOCK_M), SUM)
    for k in range(0, channels, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < channels
        x = tl.load(p_x + (o_k.to(tl.int64) * s_c)[:, None], m_k[:, None] & m_m[None, :], 0.0)
        m = m_c[:, None] & m_k[None, :]
        high = tl.load(p_high + at + o_k[None, :], m, 0.0)
        total = dot(high, x, total, PRECISION)
        if SPLIT:
            low = tl.load(p_low + at + o_k[None, :], m, 0.0)
            total = dot(low, x, total, PRECISION)
    total *= tl.load(p_scale + i_n * channels + o_c, m_c, 0.0)[:, None]
    p = p_grad_features + i_n * s_out_n + (o_c * s_out_c)[:, None] + (o_m * s_out_m)[None, :]
    tl.store(p, total.to(p_grad_features.dtype.element_ty), m_c[:, None] & m_m[None, :])


def _bwd_configs(element_size, channels, positions):
    of_16_bits = [(64, 128, 32, 4, 3), (128, 128, 32, 8, 3), (64, 64, 64, 4, 3), (128, 64, 32, 4, 3)]
    of_32_bits = [(64, 64, 32, 4, 2), (64, 64, 16, 4, 3), (64, 128, 16, 8, 3), (32, 64, 32, 4, 2)]
    of_64_bits = [(32, 32, 16, 4, 2), (32, 64, 16, 4, 2)]
    for c, m, k, warps, stages in {2: of_16_bits, 4: of_32_bits, 8: of_64_bits}[element_size]:
        sizes = {"BLOCK_C": block(channels, c), "BLOCK_M": block(positions, m), "BLOCK_K": block(channels, k)}
        yield {name: max(size, 16) for name, size in sizes.items()} | {"num_warps": warps, "num_stages": stages}


def gram_matrix_bwd(grad_gram, features, grad_features, normalize):
    if grad_features.numel() == 0:
        return
    x = features.flatten(2)
    images, channels, positions = x.shape
    out = grad_features.view(x.shape)
    split = x.element_size() == 2
    high = torch.empty(grad_gram.shape, dtype=x.dtype, device=x.device)
    low = torch.empty_like(high) if split else high
    scale = torch.empty((images, channels), dtype=dtype_of_sums(x), device=x.device)
    row_blocks = triton.cdiv(channels, 16)
    _symmetric_kernel[(images * row_blocks,)](
        *(grad_gram, high, low, scale, *grad_gram.stride()),
        *(channels, row_blocks, _divisor(channels, positions, normalize)),
        SPLIT=split,
        SUM=wide(x.dtype),
        BLOCK_R=16,
        BLOCK_C=block(channels, 64),
    )
    configs = partial(_bwd_configs, x.element_size())
    config = pick(_gram_matrix_bwd_kernel, configs, x.device, x.dtype, channels=channels, positions=positions)
    row_blocks, column_blocks = triton.cdiv(channels, config["BLOCK_C"]), triton.cdiv(positions, config["BLOCK_M"])
    _gram_matrix_bwd_kernel[(images * row_blocks * column_blocks,)](
        *(high, low, scale, x, out, *x.stride(), *out.stride()),
        *(channels, positions, row_blocks, column_blocks),
        SPLIT=split,
        PRECISION=float32_precision(torch.backends.cuda.matmul.fp32_precision),  # as torch.bmm
        SUM=wide(x.dtype),
        **config,
    )
