"""The sum of each channel over images and positions, the gradient of a bias.

Each program adds up a share of the positions of some channels, a second kernel the shares, in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyzoo.kernels._common import add_up, block, dtype_of_sums, splits, wide
from pyzoo.kernels._configs import pick


@triton.jit
def _channel_sum_kernel(
    p_map,  # [N, C, M]
    p_shares,  # [S, C]
    s_n,
    s_c,
    s_m,
    channels,
    positions,
    chunks,  # of the positions of one image
    all_chunks,
    shares,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    i_s = tl.program_id(1)
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    total = tl.zeros((BLOCK_C, BLOCK_M), SUM)
    for chunk in range(i_s, all_chunks, shares):
        o_m = (chunk % chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        p = p_map + (chunk // chunks).to(tl.int64) * s_n + (o_c * s_c)[:, None] + (o_m * s_m)[None, :]
        total += tl.load(p, m_c[:, None] & (o_m < positions)[None, :], 0.0).to(SUM)
    total = tl.sum(total, 1)
    tl.store(p_shares + i_s.to(tl.int64) * channels + o_c, total.to(p_shares.dtype.element_ty), m_c)


@triton.jit
def _channel_sum_total_kernel(
    p_shares,  # [S, C]
    p_output,  # [C]
    channels,
    shares,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    total = add_up(p_shares + o_c, channels, shares, m_c, BLOCK_S)
    tl.store(p_output + o_c, total.to(p_output.dtype.element_ty), m_c)


def _configs(channels, positions, channels_last):
    for size, warps in [(4096, 4), (2048, 4), (8192, 8)]:
        if channels_last:
            c = block(channels, 128)
            m = block(positions, size // c)
        else:
            m = block(positions, size)
            c = block(channels, size // m)
        yield {"BLOCK_C": c, "BLOCK_M": m, "num_warps": warps}


def channel_sum(map, output):
    x = map.flatten(2)
    images, channels, positions = x.shape
    if channels == 0:
        return
    shape = {"channels": channels, "positions": positions, "channels_last": x.stride(1) == 1}
    config = pick(_channel_sum_kernel, _configs, x.device, x.dtype, **shape)
    programs = triton.cdiv(channels, config["BLOCK_C"])
    chunks = triton.cdiv(positions, config["BLOCK_M"])
    count = splits(images * chunks, programs)
    shares = output
    if count > 1:
        shares = torch.empty((count, channels), dtype=dtype_of_sums(x), device=x.device)
    sizes = (channels, positions, chunks, images * chunks, count)
    _channel_sum_kernel[(programs, count)](x, shares, *x.stride(), *sizes, SUM=wide(x.dtype), **config)
    if count > 1:
        grid = (triton.cdiv(channels, 64),)
        _channel_sum_total_kernel[grid](shares, output, channels, count, BLOCK_C=64, BLOCK_S=32)
