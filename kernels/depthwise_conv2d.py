"""Depthwise convolution: each lane of a program has a column of one channel and computes some rows of it below one
another, so that a number is loaded once for all the rows it counts for. Neighbouring lanes are columns in NCHW,
channels in NHWC.

Forward: lanes gather what their kernel covers. The gradient in the input is gathered, too: the pixels that leave the
same remainders when divided by the strides see the same taps of the kernel, as a convolution of stride 1. Weight: a
program adds up some taps over a share of the output's rows, a second kernel the shares, in their order.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl

from pyzoo.kernels._common import add_up, block, dtype_of_sums, splits, wide
from pyzoo.kernels._configs import pick


@triton.jit
def _add(sums, i: tl.constexpr, x):
    return sums[:i] + (sums[i] + x,) + sums[i + 1 :]  # noqa: RUF005


@triton.jit
def _gather(
    p_x,  # of the channels: [BLOCK_C, 1]
    p_weight,  # of the channels: [BLOCK_C, 1]
    s_h,
    s_w,
    m_c,
    row,  # where the first tap of the first row lies
    o_column,  # and that of each column
    height,
    width,
    first_y,  # which element of the kernel the first tap is
    first_x,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    STEP_Y: tl.constexpr,  # from tap to tap in the kernel
    STEP_X: tl.constexpr,
    DILATION_Y: tl.constexpr,  # and in the map
    DILATION_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    SOME_OUTSIDE: tl.constexpr,  # whether taps may lie outside of the kernel
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # rows of taps at a time
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The sums of the products for ROWS rows of output."""
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((BLOCK_C, BLOCK_W), SUM),)
    for tap_y in range(0, TAPS_Y, BLOCK_K):
        for tap_x in tl.range(0, TAPS_X, loop_unroll_factor=TAPS_X if TAPS_X <= 3 and not SOME_OUTSIDE else 1):
            o_x = o_column + tap_x * DILATION_X
            k_x = first_x + tap_x * STEP_X
            m_x = (o_x >= 0) & (o_x < width)
            if SOME_OUTSIDE:
                m_x = m_x & (k_x >= 0) & (k_x < KERNEL_X)
            m = m_c & m_x[None, :]
            p_column = p_x + (o_x.to(tl.int64) * s_w)[None, :]
            weights = ()
            for j in tl.static_range(BLOCK_K):
                k_y = first_y + (tap_y + j) * STEP_Y
                m_k = m_c
                if SOME_OUTSIDE:
                    m_k = m_k & (k_x >= 0) & (k_x < KERNEL_X) & (k_y >= 0) & (k_y < KERNEL_Y)
                weights += (tl.load(p_weight + (k_y * KERNEL_X + k_x), m_k, 0.0).to(SUM),)
            for i in tl.static_range((ROWS - 1) * STRIDE_Y + (BLOCK_K - 1) * DILATION_Y + 1):
                y = row + tap_y * DILATION_Y + i
                x = tl.load(p_column + y.to(tl.int64) * s_h, m & (y >= 0) & (y < height), 0.0).to(SUM)
                for j in tl.static_range(BLOCK_K):
                    if i >= j * DILATION_Y and (
                        (i - j * DILATION_Y) % STRIDE_Y == 0 and (i - j * DILATION_Y) // STRIDE_Y < ROWS
                    ):
                        product = x * weights[j]
                        if SOME_OUTSIDE:  # infinity times the zero there
                            k_y = first_y + (tap_y + j) * STEP_Y
                            product = tl.where((k_y >= 0) & (k_y < KERNEL_Y), product, 0.0)
                        sums = _add(sums, (i - j * DILATION_Y) // STRIDE_Y, product)
    return sums


def _block_of_taps(taps: int) -> int:
    """How many rows of taps a program unrolls: a divisor of ``taps``, so that none lies outside."""
    return max(k for k in range(1, 33) if taps % k == 0)


def _lanes(channels, width, channels_last, size, most_columns):
    if channels_last:
        c = block(channels, 64)
        return {"BLOCK_C": c, "BLOCK_W": block(width, size // c)}
    w = block(width, most_columns)
    return {"BLOCK_C": block(channels, size // w), "BLOCK_W": w}


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit
def _depthwise_conv2d_fwd_kernel(
    p_input,  # [N, C, H, W]
    p_weight,  # [C, 1, KH, KW]
    p_bias,  # [C]
    p_output,  # [N, C, OH, OW]
    s_in_n,
    s_in_c,
    s_in_h,
    s_in_w,
    s_out_n,
    s_out_c,
    s_out_h,
    s_out_w,
    channels,
    height,
    width,
    out_height,
    out_width,
    padding_y,
    padding_x,
    tiles_c,
    tiles_x,
    tiles_y,
    WITH_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i = tl.program_id(0)
    o_c = (i % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_x = i // tiles_c % tiles_x * BLOCK_W + tl.arange(0, BLOCK_W)
    y = i // tiles_c // tiles_x % tiles_y * ROWS
    i_n = (i // tiles_c // tiles_x // tiles_y).to(tl.int64)
    m_c = (o_c < channels)[:, None]
    sums = _gather(
        p_input + i_n * s_in_n + (o_c * s_in_c)[:, None],
        p_weight + (o_c * (KERNEL_Y * KERNEL_X))[:, None],
        s_in_h,
        s_in_w,
        m_c,
        y * STRIDE_Y - padding_y,
        o_x * STRIDE_X - padding_x,
        height,
        width,
        0,
        0,
        KERNEL_Y,
        KERNEL_X,
        KERNEL_Y,
        KERNEL_X,
        1,
        1,
        DILATION_Y,
        DILATION_X,
        STRIDE_Y,
        False,
        SUM,
        ROWS,
        BLOCK_K,
        BLOCK_C,
        BLOCK_W,
    )
    p = p_output + i_n * s_out_n + (o_c * s_out_c)[:, None] + (o_x.to(tl.int64) * s_out_w)[None, :]
    m = m_c & (o_x < out_width)[None, :]
    bias = tl.zeros((BLOCK_C, 1), SUM)
    if WITH_BIAS:
        bias += tl.load(p_bias + o_c[:, None], m_c, 0.0).to(SUM)
    for r in tl.static_range(ROWS):
        x = sums[r] + bias
        if ACTIVATION > 0:
            x = tl.where(x < 0.0, 0.0, x)  # NaN stays
        if ACTIVATION == 2:
            x = tl.where(x > 6.0, 6.0, x)
        tl.store(p + (y + r).to(tl.int64) * s_out_h, x.to(p_output.dtype.element_ty), m & (y + r < out_height))


def _configs(element_size, channels, height, width, taps, stride, channels_last):
    # Lanes, the most of them beside one another in NCHW, and rows for each: what a thread has must fit its registers.
    size = (512 if channels_last and taps <= 9 else 256) // (2 if element_size == 8 else 1)
    most = 8 if taps > 100 and stride == 1 else 4
    for lanes, columns, rows, warps in [
        (size, 32, most, 4),
        (2 * size, 64, most, 8),
        (size // 2, 32, most, 2),
        (size, 64, most // 2, 4),
        (size // 2, 32, 2 * most, 4),
    ]:
        blocks = _lanes(channels, width, channels_last, lanes, columns)
        yield {"ROWS": block(height, rows), **blocks, "num_warps": warps}


def depthwise_conv2d_fwd(input, weight, bias, output, stride, padding, dilation, activation):
    if output.numel() == 0:
        return
    images, channels, height, width = output.shape
    kernel = weight.shape[2:]
    shape = {"channels": channels, "height": height, "width": width, "taps": kernel.numel(), "stride": stride[1]}
    shape["channels_last"] = output.stride(1) == 1 and channels > 1
    configs = partial(_configs, output.element_size())
    config = pick(_depthwise_conv2d_fwd_kernel, configs, output.device, output.dtype, **shape)
    tiles = [
        triton.cdiv(channels, config["BLOCK_C"]),
        triton.cdiv(width, config["BLOCK_W"]),
        triton.cdiv(height, config["ROWS"]),
    ]
    _depthwise_conv2d_fwd_kernel[(math.prod(tiles) * images,)](
        *(input, weight, bias, output, *input.stride(), *output.stride()),
        *(channels, *input.shape[2:], height, width, *padding, *tiles),
        WITH_BIAS=bias is not None,
        ACTIVATION=activation,
        **_constants(kernel, stride, dilation),
        SUM=wide(input.dtype),
        BLOCK_K=_block_of_taps(kernel[0]),
        **config,
    )


def _constants(kernel, stride, dilation) -> dict[str, int]:
    names = ("KERNEL", kernel), ("STRIDE", stride), ("DILATION", dilation)
    return {f"{name}_{axis}": int(pair[i]) for name, pair in names for i, axis in enumerate("YX")}


# ----------------------------------------------------------------------------------------------------- input gradient


@triton.jit
def _phase(i, padding, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr):
    """For the pixels i, i + STRIDE, ...: the first element of the kernel that reaches them, and which output it reaches
    the first of them from."""
    first = tl.full((), KERNEL, tl.int32)  # none
    for k in tl.static_range(STEP):
        first = tl.where((i + padding - k * DILATION) % STRIDE == 0, k, first)
    return first, (i + padding - first * DILATION) // STRIDE


@triton.jit
def _depthwise_conv2d_bwd_input_kernel(
    p_grad_output,  # [N, C, OH, OW]
    p_weight,  # [C, 1, KH, KW]
    p_grad_input,  # [N, C, H, W]
    s_out_n,
    s_out_c,
    s_out_h,
    s_out_w,
    s_in_n,
    s_in_c,
    s_in_h,
    s_in_w,
    channels,
    height,
    width,
    out_height,
    out_width,
    padding_y,
    padding_x,
    tiles_c,
    tiles_x,
    tiles_y,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    TAPS_Y: tl.constexpr,  # of those pixels that see most
    TAPS_X: tl.constexpr,
    STEP_Y: tl.constexpr,  # between them in the kernel
    STEP_X: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i = tl.program_id(0)
    phase_x, phase_y = i % STRIDE_X, i // STRIDE_X % STRIDE_Y  # neighbours write into the same cache lines
    i = i // (STRIDE_X * STRIDE_Y)
    o_c = (i % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_x = i // tiles_c % tiles_x * BLOCK_W + tl.arange(0, BLOCK_W)
    y = i // tiles_c // tiles_x % tiles_y * ROWS
    i_n = (i // tiles_c // tiles_x // tiles_y).to(tl.int64)
    m_c = (o_c < channels)[:, None]
    first_y, from_y = _phase(phase_y, padding_y, KERNEL_Y, STRIDE_Y, DILATION_Y, STEP_Y)
    first_x, from_x = _phase(phase_x, padding_x, KERNEL_X, STRIDE_X, DILATION_X, STEP_X)
    # From the last tap to the first, which lie one after another in the output.
    REACH_Y: tl.constexpr = STEP_Y * DILATION_Y // STRIDE_Y
    REACH_X: tl.constexpr = STEP_X * DILATION_X // STRIDE_X
    sums = _gather(
        p_grad_output + i_n * s_out_n + (o_c * s_out_c)[:, None],
        p_weight + (o_c * (KERNEL_Y * KERNEL_X))[:, None],
        s_out_h,
        s_out_w,
        m_c,
        y + from_y - (TAPS_Y - 1) * REACH_Y,
        o_x + from_x - (TAPS_X - 1) * REACH_X,
        out_height,
        out_width,
        first_y + (TAPS_Y - 1) * STEP_Y,
        first_x + (TAPS_X - 1) * STEP_X,
        KERNEL_Y,
        KERNEL_X,
        TAPS_Y,
        TAPS_X,
        -STEP_Y,
        -STEP_X,
        REACH_Y,
        REACH_X,
        1,
        STRIDE_Y * STRIDE_X > 1,
        SUM,
        ROWS,
        BLOCK_K,
        BLOCK_C,
        BLOCK_W,
    )
    o_x = o_x * STRIDE_X + phase_x
    p = p_grad_input + i_n * s_in_n + (o_c * s_in_c)[:, None] + (o_x.to(tl.int64) * s_in_w)[None, :]
    m = m_c & (o_x < width)[None, :]
    for r in tl.static_range(ROWS):
        o_y = (y + r) * STRIDE_Y + phase_y
        tl.store(p + o_y.to(tl.int64) * s_in_h, sums[r].to(p_grad_input.dtype.element_ty), m & (o_y < height))


def depthwise_conv2d_bwd_input(grad_output, weight, grad_input, stride, padding, dilation):
    if grad_input.numel() == 0:
        return
    images, channels, height, width = grad_input.shape
    kernel = weight.shape[2:]
    steps = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    taps = [triton.cdiv(k, step) for k, step in zip(kernel, steps, strict=True)]
    phase_height, phase_width = triton.cdiv(height, stride[0]), triton.cdiv(width, stride[1])
    shape = {"channels": channels, "height": phase_height, "width": phase_width, "taps": taps[0] * taps[1]}
    shape |= {"stride": stride[1], "channels_last": grad_input.stride(1) == 1 and channels > 1}
    configs = partial(_configs, grad_input.element_size())
    config = pick(_depthwise_conv2d_bwd_input_kernel, configs, grad_input.device, grad_input.dtype, **shape)
    tiles = [
        triton.cdiv(channels, config["BLOCK_C"]),
        triton.cdiv(phase_width, config["BLOCK_W"]),
        triton.cdiv(phase_height, config["ROWS"]),
    ]
    _depthwise_conv2d_bwd_input_kernel[(math.prod(tiles) * images * stride[0] * stride[1],)](
        *(grad_output, weight, grad_input, *grad_output.stride(), *grad_input.stride()),
        *(channels, height, width, *grad_output.shape[2:], *padding, *tiles),
        **_constants(kernel, stride, dilation),
        TAPS_Y=taps[0],
        TAPS_X=taps[1],
        STEP_Y=steps[0],
        STEP_X=steps[1],
        SUM=wide(grad_output.dtype),
        BLOCK_K=_block_of_taps(taps[0]),
        **config,
    )


# ---------------------------------------------------------------------------------------------------- weight gradient


@triton.jit
def _depthwise_conv2d_bwd_weight_kernel(
    p_grad_output,  # [N, C, OH, OW]
    p_input,  # [N, C, H, W]
    p_weight_shares,  # [S, C, KH, KW]
    p_bias_shares,  # [S, C]
    s_out_n,
    s_out_c,
    s_out_h,
    s_out_w,
    s_in_n,
    s_in_c,
    s_in_h,
    s_in_w,
    channels,
    height,
    width,
    out_height,
    out_width,
    padding_y,
    padding_x,
    tiles_c,
    tiles_x,
    tiles_y,
    all_tiles,
    shares,
    WITH_BIAS: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KY: tl.constexpr,
    BLOCK_KX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_k, i_s = tl.program_id(0) // tiles_c, tl.program_id(1)
    o_c = (tl.program_id(0) % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    k_x = i_k % tl.cdiv(KERNEL_X, BLOCK_KX) * BLOCK_KX
    k_y = i_k // tl.cdiv(KERNEL_X, BLOCK_KX) * BLOCK_KY
    m_c = (o_c < channels)[:, None]
    p_grads, p_inputs = p_grad_output + (o_c * s_out_c)[:, None], p_input + (o_c * s_in_c)[:, None]

    bias = tl.zeros((BLOCK_C, BLOCK_W), SUM)
    sums = ()
    for _ in tl.static_range(BLOCK_KY * BLOCK_KX):
        sums += (tl.zeros((BLOCK_C, BLOCK_W), SUM),)
    for tile in range(i_s, all_tiles, shares):
        o_x = tile % tiles_x * BLOCK_W + tl.arange(0, BLOCK_W)
        y = tile // tiles_x % tiles_y * ROWS
        i_n = (tile // tiles_x // tiles_y).to(tl.int64)
        m = m_c & (o_x < out_width)[None, :]
        p = p_grads + i_n * s_out_n + (o_x.to(tl.int64) * s_out_w)[None, :]
        grads = ()
        for r in tl.static_range(ROWS):
            grad = tl.load(p + (y + r).to(tl.int64) * s_out_h, m & (y + r < out_height), 0.0).to(SUM)
            grads += (grad,)
            if WITH_BIAS:
                bias += grad
        for j_x in tl.static_range(BLOCK_KX):
            o_column = o_x * STRIDE_X - padding_x + (k_x + j_x) * DILATION_X
            m_column = m & ((o_column >= 0) & (o_column < width))[None, :]
            p = p_inputs + i_n * s_in_n + (o_column.to(tl.int64) * s_in_w)[None, :]
            for i in tl.static_range((ROWS - 1) * STRIDE_Y + (BLOCK_KY - 1) * DILATION_Y + 1):
                row = y * STRIDE_Y - padding_y + k_y * DILATION_Y + i
                x = tl.load(p + row.to(tl.int64) * s_in_h, m_column & (row >= 0) & (row < height), 0.0).to(SUM)
                for j_y in tl.static_range(BLOCK_KY):
                    if i >= j_y * DILATION_Y and (
                        (i - j_y * DILATION_Y) % STRIDE_Y == 0 and (i - j_y * DILATION_Y) // STRIDE_Y < ROWS
                    ):
                        product = grads[(i - j_y * DILATION_Y) // STRIDE_Y] * x
                        sums = _add(sums, j_y * BLOCK_KX + j_x, product)
    i_s = i_s.to(tl.int64)
    m_c = o_c < channels
    p = p_weight_shares + (i_s * channels + o_c) * (KERNEL_Y * KERNEL_X)
    for j_y in tl.static_range(BLOCK_KY):
        for j_x in tl.static_range(BLOCK_KX):
            total = tl.sum(sums[j_y * BLOCK_KX + j_x], 1).to(p_weight_shares.dtype.element_ty)
            m = m_c & (k_y + j_y < KERNEL_Y) & (k_x + j_x < KERNEL_X)
            tl.store(p + ((k_y + j_y) * KERNEL_X + k_x + j_x), total, m)
    if WITH_BIAS:
        total = tl.sum(bias, 1).to(p_bias_shares.dtype.element_ty)
        tl.store(p_bias_shares + i_s * channels + o_c, total, m_c & (i_k == 0))


@triton.jit
def _depthwise_conv2d_bwd_weight_total_kernel(
    p_weight_shares,  # [S, C * KH * KW]
    p_bias_shares,  # [S, C]
    p_grad_weight,  # [C * KH * KW]
    p_grad_bias,  # [C]
    weights,
    channels,
    shares,
    WITH_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = add_up(p_weight_shares + o, weights, shares, o < weights, BLOCK_S)
    tl.store(p_grad_weight + o, total.to(p_grad_weight.dtype.element_ty), o < weights)
    if WITH_BIAS:  # there are no fewer weights
        total = add_up(p_bias_shares + o, channels, shares, o < channels, BLOCK_S)
        tl.store(p_grad_bias + o, total.to(p_grad_bias.dtype.element_ty), o < channels)


def _bwd_weight_configs(element_size, channels, height, width, kernel_y, kernel_x, channels_last):
    registers = max(element_size // 4, 1)  # of the sum of a tap
    few = kernel_y * kernel_x * registers <= 49
    k_y, k_x = (kernel_y, kernel_x) if few else (min(kernel_y, 16), 1)
    registers *= k_y * k_x
    size = 512 if registers <= 16 else 256 if registers <= 32 else 128
    for lanes, columns, rows, warps in [
        (size, 64, 4, 4),
        (2 * size, 128, 4, 8),
        (size // 2, 32, 4, 2),
        (size, 64, 2, 4),
        (size, 32, 8, 4),
    ]:
        blocks = _lanes(channels, width, channels_last, lanes, columns)
        yield {"ROWS": block(height, rows), "BLOCK_KY": k_y, "BLOCK_KX": k_x, **blocks, "num_warps": warps}


def depthwise_conv2d_bwd_weight(grad_output, input, grad_weight, grad_bias, stride, padding, dilation):
    if grad_weight.numel() == 0:
        return
    images, channels, height, width = grad_output.shape
    kernel = grad_weight.shape[2:]
    shape = {"channels": channels, "height": height, "width": width, "kernel_y": kernel[0], "kernel_x": kernel[1]}
    shape["channels_last"] = grad_output.stride(1) == 1 and channels > 1
    configs = partial(_bwd_weight_configs, input.element_size())
    config = pick(_depthwise_conv2d_bwd_weight_kernel, configs, input.device, input.dtype, **shape)
    tiles_c = triton.cdiv(channels, config["BLOCK_C"])
    tiles = triton.cdiv(width, config["BLOCK_W"]), triton.cdiv(height, config["ROWS"])
    programs = tiles_c * triton.cdiv(kernel[0], config["BLOCK_KY"]) * triton.cdiv(kernel[1], config["BLOCK_KX"])
    count = splits(math.prod(tiles) * images, programs)
    with_bias = grad_bias is not None
    weight_shares, bias_shares = grad_weight, grad_bias
    if count > 1:
        sums = {"dtype": dtype_of_sums(input), "device": input.device}
        weight_shares = torch.empty((count, *grad_weight.shape), **sums)
        bias_shares = torch.empty((count, channels), **sums) if with_bias else None
    _depthwise_conv2d_bwd_weight_kernel[(programs, count)](
        *(grad_output, input, weight_shares, bias_shares, *grad_output.stride(), *input.stride()),
        *(channels, *input.shape[2:], height, width, *padding, tiles_c, *tiles, math.prod(tiles) * images, count),
        WITH_BIAS=with_bias,
        **_constants(kernel, stride, dilation),
        SUM=wide(input.dtype),
        **config,
    )
    if count > 1:
        size = block(grad_weight.numel(), 128)
        _depthwise_conv2d_bwd_weight_total_kernel[(triton.cdiv(grad_weight.numel(), size),)](
            *(weight_shares, bias_shares, grad_weight, grad_bias, grad_weight.numel(), channels, count),
            WITH_BIAS=with_bias,
            BLOCK=size,
            BLOCK_S=16,
        )
