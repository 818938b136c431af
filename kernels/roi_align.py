"""RoIAlign on the levels of a pyramid, a launch for each; one feature map is a pyramid of one level.

Forward: a program pools some bins of one box for some channels, walking over their samples. Backward: a program owns a
tile of pixels for some channels and gathers what the boxes that reach it give, in their order: no atomic operation, so
the gradient is deterministic. RoIAlign is separable, therefore what a box gives to a tile is, for each channel,
Wy^T G Wx with the weights of its bins on the rows and columns of the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyzoo.kernels._common import BLOCK_BOXES, block, boxes_on_tile, divide, wide
from pyzoo.kernels._configs import pick

# ----------------------------------------------------------------------------------------------------------- geometry


@triton.jit
def _box(p_rois, s_roi, s_coord, k, GEOMETRY: tl.constexpr):
    """Image and corners of box k. The number of the image is cut to an integer; -1 where it is negative or NaN."""
    p_box = p_rois + k * s_roi
    image = tl.load(p_box).to(tl.float32)
    image = tl.where(image > -1, image, -1.0).to(tl.int32)
    x1 = tl.load(p_box + s_coord).to(GEOMETRY)
    y1 = tl.load(p_box + 2 * s_coord).to(GEOMETRY)
    x2 = tl.load(p_box + 3 * s_coord).to(GEOMETRY)
    y2 = tl.load(p_box + 4 * s_coord).to(GEOMETRY)
    return image, x1, y1, x2, y2


@triton.jit
def _level_of(x1, y1, x2, y2, first_level, canonical_scale, canonical_level, epsilon, LEVELS: tl.constexpr):
    """The level for a box: Lin et al. 2017, equation 1. A box with one negative side has none: -1."""
    size = tl.sqrt_rn(((x2 - x1) * (y2 - y1)).to(tl.float32))
    k = tl.floor(canonical_level + tl.log2(size / canonical_scale) + epsilon) - first_level
    k = tl.where(k == k, tl.minimum(tl.maximum(k, 0.0), LEVELS - 1.0), -1.0)
    return (k if LEVELS > 1 else tl.zeros_like(size)).to(tl.int32)


@triton.jit
def _axis(low, high, scale, BINS: tl.constexpr, SAMPLING: tl.constexpr, ALIGNED: tl.constexpr):
    """Start, size of a bin and samples in a bin of a box along one axis, in torchvision's order of operations."""
    offset = 0.5 if ALIGNED else 0.0
    start = low * scale - offset
    size = (high * scale - offset) - start
    if not ALIGNED:
        size = tl.where(size < 1.0, 1.0, size)
    bin = divide(size, tl.full(size.shape, BINS, size.dtype))
    grid = tl.full(bin.shape, SAMPLING, bin.dtype) if SAMPLING > 0 else tl.ceil(bin)
    # What is not finite, or has more than 2^31 samples, pools to zero.
    ok = (tl.abs(start) < float("inf")) & (tl.abs(bin) < float("inf")) & (grid < 2147483648.0)
    return start, bin, tl.where(ok & (grid > 0.0), grid, 0.0)


@triton.jit
def _sample_range(start, bin, grid, o_bin, low, high):
    """The samples [begin, end) of some bins that can lie in [low, high]: a few more, but not all 2^30 of a huge bin."""
    origin = start + o_bin * bin
    per_pixel = grid / bin
    slack = 2.0 + 1e-6 * (tl.abs(origin * per_pixel) + grid)
    begin = tl.floor(tl.minimum(tl.maximum((low - origin) * per_pixel - slack, 0.0), grid))
    end = tl.ceil(tl.minimum(tl.maximum((high - origin) * per_pixel + slack, 0.0), grid))
    some = bin > 0.0  # an inverted box has few samples, if any
    return tl.where(some, begin, 0.0).to(tl.int32), tl.where(some, end, grid).to(tl.int32)


@triton.jit
def _interpolate(start, bin, grid, o_bin, i, size):
    """The two pixels around sample i of some bins, their weights, and whether the sample counts."""
    x = (
        start
        + o_bin * bin
        + divide((i.to(bin.dtype) + 0.5) * bin, tl.maximum(grid, 1.0) + tl.zeros_like(i).to(bin.dtype))
    )
    inside = (x >= -1.0) & (x <= size) & (size > 0)
    x = tl.where(inside, tl.maximum(x, 0.0), 0.0)
    low = tl.minimum(x.to(tl.int32), size - 1)
    weight = tl.where(low < size - 1, x - low, 0.0)
    return low, tl.minimum(low + 1, size - 1), 1.0 - weight, weight, inside


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=["images", "height", "width", "level", "first_level"])
def _roi_align_fwd_kernel(
    p_input,  # [N, C, H, W]
    p_rois,  # [K, 5]
    p_output,  # [K, C, PH, PW]
    s_in_n,
    s_in_c,
    s_in_h,
    s_in_w,
    s_roi,
    s_coord,
    s_out_k,
    s_out_c,
    s_out_h,
    s_out_w,
    images,
    channels,
    height,
    width,
    scale: tl.float64,
    level,
    first_level,
    canonical_scale: tl.float64,
    canonical_level: tl.float64,
    epsilon: tl.float64,
    PH: tl.constexpr,
    PW: tl.constexpr,
    SAMPLING: tl.constexpr,
    ALIGNED: tl.constexpr,
    LEVELS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_k = tl.program_id(0).to(tl.int64)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_ph, o_pw = o_p // PW, o_p % PW
    m_p, m_c = o_p < PH * PW, o_c < channels

    image, x1, y1, x2, y2 = _box(p_rois, s_roi, s_coord, i_k, GEOMETRY)
    known = (image >= 0) & (image < images)
    its_level = _level_of(x1, y1, x2, y2, first_level, canonical_scale, canonical_level, epsilon, LEVELS)
    if tl.maximum(its_level, 0) != level:  # the first writes the zeros of a box without a level
        return
    sampled = known & (its_level >= 0)
    start_y, bin_y, grid_y = _axis(y1, y2, tl.full((), scale, GEOMETRY), PH, SAMPLING, ALIGNED)
    start_x, bin_x, grid_x = _axis(x1, x2, tl.full((), scale, GEOMETRY), PW, SAMPLING, ALIGNED)
    begin_y, end_y = _sample_range(start_y, bin_y, grid_y, o_ph, -1.0, height)
    begin_x, end_x = _sample_range(start_x, bin_x, grid_x, o_pw, -1.0, width)
    rows = tl.max(tl.where(m_p, end_y - begin_y, 0)) if sampled else 0
    columns = tl.max(tl.where(m_p, end_x - begin_x, 0)) if sampled else 0

    p_map = p_input + image.to(tl.int64) * s_in_n + (o_c * s_in_c)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), SUM)
    for r in range(rows):
        i_y = begin_y + r
        y_low, y_high, wy_low, wy_high, in_y = _interpolate(start_y, bin_y, grid_y, o_ph, i_y, height)
        in_y = in_y & (i_y < end_y) & m_p
        row_low, row_high = y_low.to(tl.int64) * s_in_h, y_high.to(tl.int64) * s_in_h
        for c in range(columns):
            i_x = begin_x + c
            x_low, x_high, wx_low, wx_high, in_x = _interpolate(start_x, bin_x, grid_x, o_pw, i_x, width)
            m = (in_y & in_x & (i_x < end_x))[:, None] & m_c[None, :]
            x_low, x_high = x_low.to(tl.int64) * s_in_w, x_high.to(tl.int64) * s_in_w
            top_left = tl.load(p_map + (row_low + x_low)[:, None], m, 0.0).to(SUM)
            top_right = tl.load(p_map + (row_low + x_high)[:, None], m, 0.0).to(SUM)
            bottom_left = tl.load(p_map + (row_high + x_low)[:, None], m, 0.0).to(SUM)
            bottom_right = tl.load(p_map + (row_high + x_high)[:, None], m, 0.0).to(SUM)
            total += (wy_low * wx_low).to(SUM)[:, None] * top_left + (wy_low * wx_high).to(SUM)[:, None] * top_right
            total += (wy_high * wx_low).to(SUM)[:, None] * bottom_left
            total += (wy_high * wx_high).to(SUM)[:, None] * bottom_right
    mean = total / tl.maximum(grid_y * grid_x, 1.0).to(SUM)
    mean = tl.where(known, mean, float("nan"))  # a program cannot raise: an image that is not there shows
    p_out = (
        p_output + i_k * s_out_k + (o_ph * s_out_h + o_pw * s_out_w).to(tl.int64)[:, None] + (o_c * s_out_c)[None, :]
    )
    tl.store(p_out, mean.to(p_output.dtype.element_ty), m_p[:, None] & m_c[None, :])


def _fwd_configs(bins, channels, channels_last):
    # Neighbours in memory are channels in channels_last, else bins.
    for p, c in [(8, 128), (16, 64), (4, 256)] if channels_last else [(64, 8), (32, 16), (64, 4)]:
        yield {"BLOCK_P": block(bins, p), "BLOCK_C": block(channels, c), "num_warps": 4}


def roi_align_fwd(inputs, rois, output, scales, sampling_ratio, aligned, level_map):
    boxes, channels, height, width = output.shape
    if output.numel() == 0:
        return
    shape = {"bins": height * width, "channels": channels, "channels_last": output.stride(1) == 1}
    config = pick(_roi_align_fwd_kernel, _fwd_configs, output.device, output.dtype, **shape)
    grid = (boxes, triton.cdiv(height * width, config["BLOCK_P"]), triton.cdiv(channels, config["BLOCK_C"]))
    for level, (x, scale) in enumerate(zip(inputs, scales, strict=True)):
        _roi_align_fwd_kernel[grid](
            *(x, rois, output),
            *(*x.stride(), *rois.stride(), *output.stride()),
            *(*x.shape, scale, level),
            *(level_map or (0, 1.0, 0.0, 0.0)),
            PH=height,
            PW=width,
            SAMPLING=max(sampling_ratio, 0),
            ALIGNED=aligned,
            LEVELS=len(inputs),
            GEOMETRY=wide(x.dtype, rois.dtype),
            SUM=wide(x.dtype),
            **config,
            enable_fp_fusion=False,  # sampling points as the CPU rounds them
        )


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["boxes", "height", "width", "level", "first_level"])
def _bounds_kernel(
    p_rois,  # [K, 5]
    p_bounds,  # [5, K]: image, first and last row, first and last column that a box reaches; image -1: none
    s_roi,
    s_coord,
    boxes,
    height,
    width,
    scale: tl.float64,
    level,
    first_level,
    canonical_scale: tl.float64,
    canonical_level: tl.float64,
    epsilon: tl.float64,
    PH: tl.constexpr,
    PW: tl.constexpr,
    SAMPLING: tl.constexpr,
    ALIGNED: tl.constexpr,
    LEVELS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < boxes
    image, x1, y1, x2, y2 = _box(p_rois, s_roi, s_coord, tl.where(m_k, o_k, 0), GEOMETRY)
    its_level = _level_of(x1, y1, x2, y2, first_level, canonical_scale, canonical_level, epsilon, LEVELS)
    start_y, bin_y, grid_y = _axis(y1, y2, tl.full((), scale, GEOMETRY), PH, SAMPLING, ALIGNED)
    start_x, bin_x, grid_x = _axis(x1, x2, tl.full((), scale, GEOMETRY), PW, SAMPLING, ALIGNED)
    tl.store(p_bounds + o_k, tl.where((its_level == level) & (grid_y * grid_x > 0.0), image, -1), m_k)
    first, last = _reach(start_y, bin_y * PH, height)
    tl.store(p_bounds + boxes + o_k, first, m_k)
    tl.store(p_bounds + 2 * boxes + o_k, last, m_k)
    first, last = _reach(start_x, bin_x * PW, width)
    tl.store(p_bounds + 3 * boxes + o_k, first, m_k)
    tl.store(p_bounds + 4 * boxes + o_k, last, m_k)


@triton.jit
def _reach(start, length, size):
    """The first and last pixel that the samples of a box can touch, with one to spare."""
    low = tl.minimum(start, start + length)
    high = tl.maximum(start, start + length)
    first = tl.minimum(tl.maximum(low - 1.0, 0.0), size * 1.0)
    last = tl.minimum(tl.maximum(high + 2.0, -1.0), size * 1.0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _weights(start, bin, grid, o_bin, o_pixel, size):
    """[bins, pixels]: the sum of the weights of the samples of each bin on each pixel of a tile."""
    first, last = tl.min(o_pixel), tl.max(o_pixel)
    begin, end = _sample_range(start, bin, grid, o_bin, first - 1.0, last + 1.0)
    weights = tl.zeros((o_bin.shape[0], o_pixel.shape[0]), bin.dtype)
    for r in range(tl.max(end - begin)):
        low, high, w_low, w_high, inside = _interpolate(start, bin, grid, o_bin, begin + r, size)
        inside = inside & (begin + r < end)
        weights += tl.where(inside[:, None] & (low[:, None] == o_pixel[None, :]), w_low[:, None], 0.0)
        weights += tl.where(inside[:, None] & (high[:, None] == o_pixel[None, :]), w_high[:, None], 0.0)
    return weights


@triton.jit(do_not_specialize=["boxes", "height", "width"])
def _roi_align_bwd_kernel(
    p_grad_output,  # [K, C, PH, PW]
    p_rois,  # [K, 5]
    p_bounds,  # [5, K]
    p_grad_input,  # [N, C, H, W]
    s_out_k,
    s_out_c,
    s_out_h,
    s_out_w,
    s_roi,
    s_coord,
    s_in_n,
    s_in_c,
    s_in_h,
    s_in_w,
    boxes,
    channels,
    height,
    width,
    scale: tl.float64,
    PH: tl.constexpr,
    PW: tl.constexpr,
    SAMPLING: tl.constexpr,
    ALIGNED: tl.constexpr,
    GEOMETRY: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PH: tl.constexpr,
    BLOCK_PW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_x = tl.cdiv(width, BLOCK_W)
    o_y = tl.program_id(0) // tiles_x * BLOCK_H + tl.arange(0, BLOCK_H)
    o_x = tl.program_id(0) % tiles_x * BLOCK_W + tl.arange(0, BLOCK_W)
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_n = tl.program_id(2)
    m_c = o_c < channels
    y_first, y_last, x_first, x_last = tl.min(o_y), tl.max(o_y), tl.min(o_x), tl.max(o_x)
    o_ph, o_pw = tl.arange(0, BLOCK_PH), tl.arange(0, BLOCK_PW)

    total = tl.zeros((BLOCK_C, BLOCK_H, BLOCK_W), SUM)
    for k0 in range(0, boxes, BLOCK_K):
        hits = boxes_on_tile(p_bounds, k0, boxes, i_n, y_first, y_last, x_first, x_last, BLOCK_K)
        if hits != 0:
            for j in range(BLOCK_K):
                if (hits >> j) & 1:
                    i_k = tl.full((), k0 + j, tl.int64)
                    _, x1, y1, x2, y2 = _box(p_rois, s_roi, s_coord, i_k, GEOMETRY)
                    start_y, bin_y, grid_y = _axis(y1, y2, tl.full((), scale, GEOMETRY), PH, SAMPLING, ALIGNED)
                    start_x, bin_x, grid_x = _axis(x1, x2, tl.full((), scale, GEOMETRY), PW, SAMPLING, ALIGNED)
                    on_y = _weights(start_y, bin_y, grid_y, o_ph, o_y, height).to(SUM)
                    on_x = _weights(start_x, bin_x, grid_x, o_pw, o_x, width).to(SUM)
                    on_y = on_y / tl.maximum(grid_y * grid_x, 1.0).to(SUM)
                    p_grad = p_grad_output + i_k * s_out_k + (o_c * s_out_c)[:, None] + (o_pw * s_out_w)[None, :]
                    for ph in range(PH):
                        grad = tl.load(p_grad + ph * s_out_h, m_c[:, None] & (o_pw < PW)[None, :], 0.0).to(SUM)
                        row = tl.sum(tl.where(on_x != 0.0, grad[:, :, None] * on_x, 0.0), 1)  # [C, W]; inf * 0 is not 0
                        on_row = tl.sum(tl.where((o_ph == ph)[:, None], on_y, 0.0), 0)[:, None]  # [H, 1]
                        total += tl.where(on_row != 0.0, on_row * row[:, None, :], 0.0)
    p_out = p_grad_input + i_n.to(tl.int64) * s_in_n + (o_c * s_in_c)[:, None, None]
    p_out += (o_y.to(tl.int64) * s_in_h)[None, :, None] + (o_x.to(tl.int64) * s_in_w)[None, None, :]
    m = m_c[:, None, None] & (o_y < height)[None, :, None] & (o_x < width)[None, None, :]
    tl.store(p_out, total.to(p_grad_input.dtype.element_ty), m)


def _bwd_configs(channels, bins):
    for h, w, c, warps in [(8, 8, 32, 4), (8, 8, 16, 4), (4, 8, 64, 4), (8, 16, 32, 8)]:
        yield {"BLOCK_H": h, "BLOCK_W": w, "BLOCK_C": block(channels, c), "num_warps": warps}


def roi_align_bwd(grad_output, rois, grad_inputs, scales, sampling_ratio, aligned, level_map):
    boxes, channels, pooled_height, pooled_width = grad_output.shape
    bounds = torch.empty((5, boxes), dtype=torch.int32, device=rois.device)
    for level, (x, scale) in enumerate(zip(grad_inputs, scales, strict=True)):
        if x.numel() == 0:
            continue
        images, _, height, width = x.shape
        options = {
            "PH": pooled_height,
            "PW": pooled_width,
            "SAMPLING": max(sampling_ratio, 0),
            "ALIGNED": aligned,
            "GEOMETRY": wide(x.dtype, rois.dtype),
            "enable_fp_fusion": False,  # sampling points as the CPU rounds them
        }
        if boxes:
            _bounds_kernel[(triton.cdiv(boxes, BLOCK_BOXES),)](
                *(rois, bounds, *rois.stride(), boxes, height, width, scale, level),
                *(level_map or (0, 1.0, 0.0, 0.0)),
                **options,
                LEVELS=len(grad_inputs),
                BLOCK_K=BLOCK_BOXES,
            )
        shape = {"channels": channels, "bins": pooled_height * pooled_width}
        config = pick(_roi_align_bwd_kernel, _bwd_configs, x.device, x.dtype, **shape)
        tiles = triton.cdiv(height, config["BLOCK_H"]) * triton.cdiv(width, config["BLOCK_W"])
        _roi_align_bwd_kernel[(tiles, triton.cdiv(channels, config["BLOCK_C"]), images)](
            *(grad_output, rois, bounds, x),
            *(*grad_output.stride(), *rois.stride(), *x.stride()),
            *(boxes, channels, height, width, scale),
            **options,
            SUM=wide(x.dtype),
            BLOCK_K=BLOCK_BOXES,
            BLOCK_PH=block(pooled_height, 1 << 20),
            BLOCK_PW=block(pooled_width, 1 << 20),
            **config,
        )
