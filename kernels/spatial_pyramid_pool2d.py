"""Spatial pyramid pooling, all levels in one launch.

Forward: a program pools some channels, one row of bins after the other: down the columns of the map, whose pixels are
read as they lie in memory, then along the row for each bin. The map comes from memory once, for the other levels from
the cache. Where there are too few channels to fill a GPU, several programs share the rows of bins. Backward: a program
owns a tile of pixels for some channels and gathers what the bins that reach it give, level after level: no atomic
operation, so the gradient is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyzoo.kernels._common import block, wide
from pyzoo.kernels._configs import pick


@triton.jit
def _pixels(i, size, BINS: tl.constexpr):
    """Pixels [begin, end) of bin i along an axis."""
    i = i.to(tl.int64)
    return (i * size // BINS).to(tl.int32), (((i + 1) * size + BINS - 1) // BINS).to(tl.int32)


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit
def _pool_level(
    p_map,  # [C] of a block
    p_output,  # [C], of this level
    p_argmax,
    s_h,
    s_w,
    m_c,
    height,
    width,
    i_first,
    parts,
    PH: tl.constexpr,
    PW: tl.constexpr,
    AVERAGE: tl.constexpr,
    SUM: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """The rows of bins i_first, i_first + parts, ...; or so many bins, if not WHOLE."""
    STRIPS: tl.constexpr = 1 if WHOLE else PW
    AT_ONCE: tl.constexpr = 1 if PW == 1 or not WHOLE else 2 if PW == 2 else 4  # bins
    NONE: tl.constexpr = 2147483647
    o_p = tl.arange(0, BLOCK_R * BLOCK_X)
    o_r, o_x = o_p // BLOCK_X, o_p % BLOCK_X
    for i_strip in range(i_first, PH * STRIPS, parts):
        i_ph, i_pw0 = tl.full((), i_strip, tl.int64) // STRIPS, tl.full((), i_strip, tl.int64) % STRIPS
        y_begin, y_end = _pixels(i_ph, height, PH)
        x_begin, x_end = _pixels(i_pw0, width, STRIPS)
        value = tl.full((BLOCK_C, BLOCK_R * BLOCK_X), 0.0 if AVERAGE else float("-inf"), SUM)
        index = tl.full((BLOCK_C, BLOCK_R * BLOCK_X), NONE, tl.int32)
        for y0 in range(y_begin, y_end, BLOCK_R):
            for x0 in range(x_begin, x_end, BLOCK_X):  # once, if WHOLE
                y, x = y0 + o_r, x0 + o_x
                m = m_c[:, None] & ((y < y_end) & (x < x_end))[None, :]
                new = tl.load(p_map[:, None] + (y.to(tl.int64) * s_h + x.to(tl.int64) * s_w)[None, :], m, 0.0).to(SUM)
                if AVERAGE:
                    value += new
                else:
                    wins = m & ((new > value) | (new != new) | (index == NONE))  # the last NaN wins, as in torch
                    value = tl.where(wins, new, value)
                    index = tl.where(wins, (y * width + x)[None, :], index)
        for pw0 in range(0, PW // STRIPS, AT_ONCE):
            i_pw = i_pw0 + pw0 + tl.arange(0, AT_ONCE)
            m_bin = i_pw < PW
            begin, end = _pixels(i_pw, width, PW)
            m = m_bin[:, None] & (o_x >= 0)
            if WHOLE:
                m = m & (o_x >= begin[:, None]) & (o_x < end[:, None])
            m = m[:, None, :]
            o_bin = (i_ph * PW + i_pw)[:, None]
            m_out = m_bin[:, None] & m_c[None, :]
            if AVERAGE:
                count = (y_end - y_begin).to(tl.int64) * (end - begin)
                pooled = tl.sum(tl.where(m, value[None, :, :], 0.0), 2) / count.to(SUM)[:, None]
            else:
                nan = value != value
                last_nan = tl.max(tl.where(m & nan[None, :, :], index[None, :, :], -1), 2)
                largest = tl.max(tl.where(m & (value == value)[None, :, :], value[None, :, :], float("-inf")), 2)
                pooled = tl.where(last_nan >= 0, float("nan"), largest)
                if p_argmax is not None:
                    best = m & (value[None, :, :] == largest[:, :, None])
                    first = tl.min(tl.where(best, index[None, :, :], NONE), 2)
                    tl.store(p_argmax[None, :] + o_bin, tl.where(last_nan >= 0, last_nan, first), m_out)
            tl.store(p_output[None, :] + o_bin, pooled.to(p_output.dtype.element_ty), m_out)


@triton.jit(do_not_specialize=["height", "width", "parts"])
def _spatial_pyramid_pool2d_fwd_kernel(
    p_input,  # [N, C, H, W]
    p_output,  # [N, C * bins]
    p_argmax,  # [N, C * bins], or None
    s_n,
    s_c,
    s_h,
    s_w,
    channels,
    height,
    width,
    parts,
    LEVELS: tl.constexpr,  # height, width, height, width, ...
    BINS: tl.constexpr,  # in all levels
    AVERAGE: tl.constexpr,
    SUM: tl.constexpr,
    WHOLE: tl.constexpr,  # a block is as wide as the map, and pools a row of bins; else one bin
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    i_part, i = tl.program_id(0) % parts, tl.program_id(0) // parts
    blocks = tl.cdiv(channels, BLOCK_C)
    o_c = (i % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_n = (i // blocks).to(tl.int64)
    m_c = o_c < channels
    p_map = p_input + i_n * s_n + o_c * s_c
    i_first = 0  # of what the parts share
    o_level = i_n * channels * BINS
    for level in tl.static_range(len(LEVELS) // 2):
        _pool_level(
            p_map,
            p_output + o_level + o_c * (LEVELS[2 * level] * LEVELS[2 * level + 1]),
            None if p_argmax is None else p_argmax + o_level + o_c * (LEVELS[2 * level] * LEVELS[2 * level + 1]),
            s_h,
            s_w,
            m_c,
            height,
            width,
            (i_part + parts - i_first % parts) % parts,
            parts,
            PH=LEVELS[2 * level],
            PW=LEVELS[2 * level + 1],
            AVERAGE=AVERAGE,
            SUM=SUM,
            WHOLE=WHOLE,
            BLOCK_C=BLOCK_C,
            BLOCK_R=BLOCK_R,
            BLOCK_X=BLOCK_X,
        )
        i_first += LEVELS[2 * level] * (1 if WHOLE else LEVELS[2 * level + 1])
        o_level += tl.full((), channels, tl.int64) * (LEVELS[2 * level] * LEVELS[2 * level + 1])


def _fwd_configs(channels, width, channels_last):
    # Neighbours in memory are channels in channels_last, else the pixels of a row.
    whole = width <= (64 if channels_last else 256)
    columns = triton.next_power_of_2(width) if whole else (16 if channels_last else 64)
    for size, warps in (1024, 4), (2048, 8), (2048, 4):
        rows = max(size // (32 * columns), 1) if channels_last else 4
        config = {"BLOCK_R": min(rows, 8), "BLOCK_X": columns, "WHOLE": whole, "num_warps": warps}
        yield {**config, "BLOCK_C": block(channels, max(size // (columns * config["BLOCK_R"]), 1))}


ENOUGH = 1024  # programs, to fill a GPU


def spatial_pyramid_pool2d_fwd(input, levels, output, argmax, average):
    if output.numel() == 0:
        return
    images, channels, height, width = input.shape
    shape = {"channels": channels, "width": width, "channels_last": input.stride(1) == 1}
    config = pick(_spatial_pyramid_pool2d_fwd_kernel, _fwd_configs, input.device, input.dtype, **shape)
    programs = images * triton.cdiv(channels, config["BLOCK_C"])
    strips = sum(h * (1 if config["WHOLE"] else w) for h, w in _grids(levels))
    parts = min(triton.cdiv(ENOUGH, programs), strips)
    _spatial_pyramid_pool2d_fwd_kernel[(parts * programs,)](
        *(input, output, argmax, *input.stride(), channels, height, width, parts),
        LEVELS=tuple(levels),
        BINS=sum(h * w for h, w in _grids(levels)),
        AVERAGE=average,
        SUM=wide(input.dtype),
        **config,
    )


def _grids(levels):
    return zip(levels[::2], levels[1::2], strict=True)


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _bins_on(first, last, size, BINS: tl.constexpr):
    """The bins [begin, end) that have some of the pixels from first to last."""
    last = tl.full((), tl.minimum(last, size - 1), tl.int64)
    return tl.full((), first, tl.int64) * BINS // size, ((last + 1) * BINS - 1) // size + 1


@triton.jit
def _gather_level(
    p_grad,  # [C] of a block, of this level
    p_argmax,
    m_c,
    o_y,
    o_x,
    pixel,
    y_first,
    y_last,
    x_first,
    x_last,
    height,
    width,
    PH: tl.constexpr,
    PW: tl.constexpr,
    SUM: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """[C, P]: what the bins of a level give to the pixels of a tile."""
    total = tl.zeros((m_c.shape[0], pixel.shape[0]), SUM)
    ph_begin, ph_end = _bins_on(y_first, y_last, height, PH)
    pw_begin, pw_end = _bins_on(x_first, x_last, width, PW)
    columns = (pw_end - pw_begin).to(tl.int32)
    bins = ((ph_end - ph_begin) * columns).to(tl.int32)
    for b0 in range(0, bins, AT_ONCE):
        b = b0 + tl.arange(0, AT_ONCE)
        i_ph, i_pw = ph_begin + b // columns, pw_begin + b % columns
        o_bin = (i_ph * PW + i_pw)[:, None]
        m = (b < bins)[:, None] & m_c[None, :]
        grad = tl.load(p_grad[None, :] + o_bin, m, 0.0).to(SUM)
        if p_argmax is not None:
            mine = tl.load(p_argmax[None, :] + o_bin, m, -2)[:, :, None] == pixel[None, None, :]
        else:
            y_begin, y_end = _pixels(i_ph, height, PH)
            x_begin, x_end = _pixels(i_pw, width, PW)
            count = (y_end - y_begin).to(tl.int64) * (x_end - x_begin)
            grad /= count.to(SUM)[:, None]
            mine = (o_y >= y_begin[:, None]) & (o_y < y_end[:, None])
            mine = (mine & (o_x >= x_begin[:, None]) & (o_x < x_end[:, None]) & (b < bins)[:, None])[:, None, :]
        total += tl.sum(tl.where(mine, grad[:, :, None], 0.0), 0)
    return total


@triton.jit(do_not_specialize=["height", "width"])
def _spatial_pyramid_pool2d_bwd_kernel(
    p_grad_output,  # [N, C * bins]
    p_argmax,  # [N, C * bins], or None: the gradient of the mean
    p_grad_input,  # [N, C, H, W]
    s_n,
    s_c,
    s_h,
    s_w,
    channels,
    height,
    width,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    AT_ONCE: tl.constexpr,  # bins, whose loads wait for memory together
):
    tiles_x = tl.cdiv(width, BLOCK_W)
    tiles = tl.cdiv(height, BLOCK_H) * tiles_x
    i_tile, i_n = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    y_first, x_first = i_tile // tiles_x * BLOCK_H, i_tile % tiles_x * BLOCK_W
    o_p = tl.arange(0, BLOCK_H * BLOCK_W)
    o_y, o_x = y_first + o_p // BLOCK_W, x_first + o_p % BLOCK_W
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    pixel = tl.where(o_x < width, o_y * width + o_x, -1)

    total = tl.zeros((BLOCK_C, BLOCK_H * BLOCK_W), SUM)
    o_level = i_n * channels * BINS
    for level in tl.static_range(len(LEVELS) // 2):
        o_grad = o_level + o_c * (LEVELS[2 * level] * LEVELS[2 * level + 1])
        total += _gather_level(
            p_grad_output + o_grad,
            None if p_argmax is None else p_argmax + o_grad,
            m_c,
            o_y,
            o_x,
            pixel,
            y_first,
            y_first + BLOCK_H - 1,
            x_first,
            x_first + BLOCK_W - 1,
            height,
            width,
            PH=LEVELS[2 * level],
            PW=LEVELS[2 * level + 1],
            SUM=SUM,
            AT_ONCE=AT_ONCE,
        )
        o_level += tl.full((), channels, tl.int64) * (LEVELS[2 * level] * LEVELS[2 * level + 1])
    p_out = p_grad_input + i_n * s_n + (o_c * s_c)[:, None] + (o_y.to(tl.int64) * s_h + o_x.to(tl.int64) * s_w)[None, :]
    m = m_c[:, None] & ((o_y < height) & (o_x < width))[None, :]
    tl.store(p_out, total.to(p_grad_input.dtype.element_ty), m)


def _bwd_configs(channels, width, channels_last):
    w, c = (8, 32) if channels_last else (32, 8)
    for h, more, at_once, warps in (4, 1, 4, 4), (4, 1, 8, 4), (4, 2, 4, 8), (2, 2, 4, 4):
        config = {"BLOCK_H": h * w // block(width, w), "BLOCK_W": block(width, w), "BLOCK_C": block(channels, c * more)}
        yield {**config, "AT_ONCE": at_once, "num_warps": warps}


def spatial_pyramid_pool2d_bwd(grad_output, argmax, levels, grad_input):
    if grad_input.numel() == 0:
        return
    images, channels, height, width = grad_input.shape
    shape = {"channels": channels, "width": width, "channels_last": grad_input.stride(1) == 1}
    config = pick(_spatial_pyramid_pool2d_bwd_kernel, _bwd_configs, grad_input.device, grad_input.dtype, **shape)
    tiles = triton.cdiv(height, config["BLOCK_H"]) * triton.cdiv(width, config["BLOCK_W"])
    _spatial_pyramid_pool2d_bwd_kernel[(tiles * images, triton.cdiv(channels, config["BLOCK_C"]))](
        *(grad_output, argmax, grad_input, *grad_input.stride(), channels, height, width),
        LEVELS=tuple(levels),
        BINS=sum(h * w for h, w in _grids(levels)),
        SUM=wide(grad_input.dtype),
        **config,
    )
