"""RoIPool.

Forward: a program pools some bins of one box for some channels, walking over their pixels. Backward: a program owns a
tile of pixels for some channels and gathers what the boxes that reach it give, in their order: no atomic operation, so
the gradient is deterministic. A bin gives to the pixel that its maximum came from, so the tile compares its pixels with
that. There are many bins to a tile: their gradients and maxima lie with the channels next to each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyzoo.kernels._common import BLOCK_BOXES, block, boxes_on_tile, divide, wide
from pyzoo.kernels._configs import pick

# ----------------------------------------------------------------------------------------------------------- geometry


@triton.jit
def _image(p_rois, s_roi, k, images):
    """The image of box k, cut to an integer; -1 where there is none of that number."""
    image = tl.load(p_rois + k * s_roi).to(tl.float32)
    return tl.where((image > -1) & (image < images), image, -1.0).to(tl.int32)


@triton.jit
def _round(x):
    """Half away from zero."""
    whole = tl.floor(tl.abs(x))
    whole += tl.where(tl.abs(x) - whole >= 0.5, 1.0, 0.0).to(x.dtype)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def _axis(p_low, p_high, scale, size, BINS: tl.constexpr, GEOMETRY: tl.constexpr):
    """First pixel and size of a bin of a box along one axis, in torchvision's arithmetic, and the size of the map: 0
    for a box with a side that is not finite."""
    low = _round(tl.load(p_low).to(GEOMETRY) * scale)
    high = _round(tl.load(p_high).to(GEOMETRY) * scale)
    finite = (tl.abs(low) < float("inf")) & (tl.abs(high) < float("inf"))
    limit = 1073741824.0
    start = tl.where(finite, tl.minimum(tl.maximum(low, -limit), limit), 0.0).to(tl.int64)
    end = tl.where(finite, tl.minimum(tl.maximum(high, -limit), limit), 0.0).to(tl.int64)
    length = tl.maximum(end - start + 1, 1).to(GEOMETRY)
    return start, divide(length, tl.full(length.shape, BINS, GEOMETRY)), tl.where(finite, size, 0)


@triton.jit
def _pixels(start, bin, size, o_bin):
    """Pixels [begin, end) of some bins."""
    begin = start + tl.floor(o_bin.to(bin.dtype) * bin).to(tl.int64)
    end = start + tl.ceil((o_bin + 1).to(bin.dtype) * bin).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), size)
    return begin.to(tl.int32), tl.minimum(tl.maximum(end, 0), size).to(tl.int32)


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=["images", "height", "width"])
def _roi_pool_fwd_kernel(
    p_input,  # [N, C, H, W]
    p_rois,  # [K, 5]
    p_output,  # [K, C, PH, PW], or None
    p_index,  # [K, C, PH, PW]: the pixel y * W + x of each maximum, -1 for none; or None
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
    s_index_k,
    s_index_c,
    s_index_h,
    s_index_w,
    images,
    channels,
    height,
    width,
    scale: tl.float64,
    PH: tl.constexpr,
    PW: tl.constexpr,
    GEOMETRY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_k = tl.program_id(0).to(tl.int64)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_ph, o_pw = o_p // PW, o_p % PW
    m_p, m_c = o_p < PH * PW, o_c < channels
    m_out = m_c[:, None] & m_p[None, :]

    image = _image(p_rois, s_roi, i_k, images)
    p_box = p_rois + i_k * s_roi
    scale = tl.full((), scale, GEOMETRY)
    start_y, bin_y, size_y = _axis(p_box + 2 * s_coord, p_box + 4 * s_coord, scale, height, PH, GEOMETRY)
    start_x, bin_x, size_x = _axis(p_box + s_coord, p_box + 3 * s_coord, scale, width, PW, GEOMETRY)
    y_begin, y_end = _pixels(start_y, bin_y, size_y, o_ph)
    x_begin, x_end = _pixels(start_x, bin_x, size_x, o_pw)
    rows = tl.max(tl.where(m_p, y_end - y_begin, 0)) if image >= 0 else 0
    columns = tl.max(tl.where(m_p, x_end - x_begin, 0)) if image >= 0 else 0

    p_map = p_input + image.to(tl.int64) * s_in_n + (o_c * s_in_c)[:, None]
    # Torchvision starts from the least float32, which half precision rounds to -inf. NaN is not above it.
    LEAST: tl.constexpr = -3.4028234663852886e38 if p_input.dtype.element_ty == VALUE else float("-inf")
    best = tl.full((BLOCK_C, BLOCK_P), LEAST, VALUE)
    index = tl.full((BLOCK_C, BLOCK_P), -1, tl.int32)
    for r in range(rows):
        y = y_begin + r
        for c in range(columns):
            x = x_begin + c
            m = m_c[:, None] & (m_p & (y < y_end) & (x < x_end))[None, :]
            value = tl.load(p_map + (y.to(tl.int64) * s_in_h + x.to(tl.int64) * s_in_w)[None, :], m, float("-inf"))
            better = value.to(VALUE) > best
            best = tl.where(better, value.to(VALUE), best)
            index = tl.where(better, (y * width + x)[None, :], index)

    if p_output is not None:
        best = tl.where(((y_begin < y_end) & (x_begin < x_end))[None, :], best, 0.0)
        best = tl.where(image >= 0, best, float("nan"))  # a program cannot raise: an image that is not there shows
        p_out = p_output + i_k * s_out_k + (o_c * s_out_c)[:, None]
        p_out += (o_ph.to(tl.int64) * s_out_h + o_pw.to(tl.int64) * s_out_w)[None, :]
        tl.store(p_out, best.to(p_output.dtype.element_ty), m_out)
    if p_index is not None:
        p_at = p_index + i_k * s_index_k + (o_c * s_index_c)[:, None]
        p_at += (o_ph.to(tl.int64) * s_index_h + o_pw.to(tl.int64) * s_index_w)[None, :]
        tl.store(p_at, index, m_out)


def _fwd_configs(bins, channels, channels_last):
    # Neighbours in memory are channels in channels_last, else bins.
    for p, c in [(8, 128), (16, 64), (4, 256)] if channels_last else [(64, 8), (32, 16), (64, 16)]:
        yield {"BLOCK_P": block(bins, p), "BLOCK_C": block(channels, c), "num_warps": 4}


def _pool(input, rois, output, index, height, width, spatial_scale):
    boxes, channels = rois.shape[0], input.shape[1]
    if boxes * channels == 0:
        return
    shape = {"bins": height * width, "channels": channels, "channels_last": input.stride(1) == 1}
    config = pick(_roi_pool_fwd_kernel, _fwd_configs, input.device, input.dtype, **shape)
    grid = (boxes, triton.cdiv(height * width, config["BLOCK_P"]), triton.cdiv(channels, config["BLOCK_C"]))
    _roi_pool_fwd_kernel[grid](
        *(input, rois, output, index),
        *(*input.stride(), *rois.stride(), *_strides(output), *_strides(index)),
        *(*input.shape, spatial_scale),
        PH=height,
        PW=width,
        GEOMETRY=wide(input.dtype, rois.dtype),
        VALUE=wide(input.dtype),
        **config,
        enable_fp_fusion=False,  # bins as the CPU rounds them
    )


def _strides(x):
    return (0, 0, 0, 0) if x is None else x.stride()


def _as_pooled(positions, height, width):
    """[K, PH * PW, C] as [K, C, PH, PW]."""
    return positions.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def roi_pool_fwd(input, rois, output, argmax, spatial_scale, positions=None):
    """``positions`` is int32: the pixels of the maxima, like ``argmax``, but with the channels next to each other."""
    height, width = output.shape[2:]
    index = argmax if positions is None else _as_pooled(positions, height, width)
    _pool(input, rois, output, index, height, width, spatial_scale)
    return True


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["boxes", "images", "height", "width"])
def _bounds_kernel(
    p_rois,  # [K, 5]
    p_bounds,  # [5, K]: image, first and last row, first and last column of a box
    s_roi,
    s_coord,
    boxes,
    images,
    height,
    width,
    scale: tl.float64,
    PH: tl.constexpr,
    PW: tl.constexpr,
    GEOMETRY: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < boxes
    k = tl.where(m_k, o_k, 0)
    p_box = p_rois + k * s_roi
    scale = tl.full((), scale, GEOMETRY)
    start_y, bin_y, size_y = _axis(p_box + 2 * s_coord, p_box + 4 * s_coord, scale, height, PH, GEOMETRY)
    start_x, bin_x, size_x = _axis(p_box + s_coord, p_box + 3 * s_coord, scale, width, PW, GEOMETRY)
    tl.store(p_bounds + o_k, _image(p_rois, s_roi, k, images), m_k)
    zero = tl.zeros((BLOCK_K,), tl.int32)
    tl.store(p_bounds + boxes + o_k, _pixels(start_y, bin_y, size_y, zero)[0], m_k)
    tl.store(p_bounds + 2 * boxes + o_k, _pixels(start_y, bin_y, size_y, zero + PH - 1)[1] - 1, m_k)
    tl.store(p_bounds + 3 * boxes + o_k, _pixels(start_x, bin_x, size_x, zero)[0], m_k)
    tl.store(p_bounds + 4 * boxes + o_k, _pixels(start_x, bin_x, size_x, zero + PW - 1)[1] - 1, m_k)


@triton.jit
def _bins_on(start, bin, size, first, last, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr):
    """The bins [begin, end) that have some of the pixels from first to last."""
    o_bin = tl.arange(0, BLOCK_BINS)
    begin, end = _pixels(start, bin, size, o_bin)
    hit = (o_bin < BINS) & (begin <= last) & (end > first)
    return tl.min(tl.where(hit, o_bin, BINS)), tl.max(tl.where(hit, o_bin + 1, 0))


@triton.jit(do_not_specialize=["boxes", "height", "width"])
def _roi_pool_bwd_kernel(
    p_grad_output,  # [K, PH * PW, C]
    p_index,  # [K, PH * PW, C]
    p_rois,  # [K, 5]
    p_bounds,  # [5, K]
    p_grad_input,  # [N, C, H, W]
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
    GEOMETRY: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PH: tl.constexpr,
    BLOCK_PW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AT_ONCE: tl.constexpr,  # bins, whose loads wait for memory together
):
    tiles_x = tl.cdiv(width, BLOCK_W)
    tiles = tl.cdiv(height, BLOCK_H) * tiles_x
    i_tile, i_n = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    y_first, x_first = i_tile // tiles_x * BLOCK_H, i_tile % tiles_x * BLOCK_W
    y_last, x_last = y_first + BLOCK_H - 1, x_first + BLOCK_W - 1
    o_p = tl.arange(0, BLOCK_H * BLOCK_W)
    o_y, o_x = y_first + o_p // BLOCK_W, x_first + o_p % BLOCK_W
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    pixel = tl.where(o_x < width, o_y * width + o_x, -2)
    scale = tl.full((), scale, GEOMETRY)

    total = tl.zeros((BLOCK_C, BLOCK_H * BLOCK_W), SUM)
    for k0 in range(0, boxes, BLOCK_K):
        hits = boxes_on_tile(p_bounds, k0, boxes, i_n, y_first, y_last, x_first, x_last, BLOCK_K)
        if hits != 0:
            for j in range(BLOCK_K):
                if (hits >> j) & 1:
                    i_k = tl.full((), k0 + j, tl.int64)
                    p_box = p_rois + i_k * s_roi
                    start, bin, size = _axis(p_box + 2 * s_coord, p_box + 4 * s_coord, scale, height, PH, GEOMETRY)
                    ph_begin, ph_end = _bins_on(start, bin, size, y_first, y_last, PH, BLOCK_PH)
                    start, bin, size = _axis(p_box + s_coord, p_box + 3 * s_coord, scale, width, PW, GEOMETRY)
                    pw_begin, pw_end = _bins_on(start, bin, size, x_first, x_last, PW, BLOCK_PW)
                    columns = pw_end - pw_begin
                    bins = (ph_end - ph_begin) * columns
                    o_box = i_k * (PH * PW) * channels + o_c
                    for b0 in range(0, bins, AT_ONCE):
                        for u in tl.static_range(AT_ONCE):
                            b = b0 + u
                            at = (ph_begin + b // columns) * PW + pw_begin + b % columns
                            m = m_c & (b < bins)
                            o_bin = o_box + at.to(tl.int64) * channels
                            index = tl.load(p_index + o_bin, m, -1)
                            grad = tl.load(p_grad_output + o_bin, m, 0.0).to(SUM)
                            mine = index[:, None] == pixel[None, :]
                            total = tl.where(mine, total + grad[:, None], total)
    p_out = p_grad_input + i_n.to(tl.int64) * s_in_n + (o_c * s_in_c)[:, None]
    p_out += (o_y.to(tl.int64) * s_in_h + o_x.to(tl.int64) * s_in_w)[None, :]
    m = m_c[:, None] & ((o_y < height) & (o_x < width))[None, :]
    tl.store(p_out, total.to(p_grad_input.dtype.element_ty), m)


def _bwd_configs(channels, bins):
    for h, w, c, at_once, warps in [(4, 8, 32, 4, 4), (4, 4, 64, 4, 4), (4, 8, 64, 4, 8), (8, 8, 32, 4, 8)]:
        config = {"BLOCK_H": h, "BLOCK_W": w, "BLOCK_C": block(channels, c), "AT_ONCE": at_once}
        yield {**config, "num_warps": warps}


def roi_pool_bwd(grad_output, input, rois, grad_input, spatial_scale, positions=None):
    if grad_input.numel() == 0:
        return
    boxes, channels, pooled_height, pooled_width = grad_output.shape
    images, _, height, width = grad_input.shape
    if positions is None:
        positions = torch.empty((boxes, pooled_height * pooled_width, channels), dtype=torch.int32, device=rois.device)
        index = _as_pooled(positions, pooled_height, pooled_width)
        _pool(input, rois, None, index, pooled_height, pooled_width, spatial_scale)
    options = {
        "PH": pooled_height,
        "PW": pooled_width,
        "GEOMETRY": wide(grad_input.dtype, rois.dtype),
        "enable_fp_fusion": False,  # bins as the CPU rounds them
    }
    bounds = torch.empty((5, boxes), dtype=torch.int32, device=rois.device)
    if boxes:
        _bounds_kernel[(triton.cdiv(boxes, BLOCK_BOXES),)](
            *(rois, bounds, *rois.stride(), boxes, images, height, width, spatial_scale),
            **options,
            BLOCK_K=BLOCK_BOXES,
        )
    shape = {"channels": channels, "bins": pooled_height * pooled_width}
    config = pick(_roi_pool_bwd_kernel, _bwd_configs, grad_input.device, grad_input.dtype, **shape)
    tiles = triton.cdiv(height, config["BLOCK_H"]) * triton.cdiv(width, config["BLOCK_W"])
    _roi_pool_bwd_kernel[(tiles * images, triton.cdiv(channels, config["BLOCK_C"]))](
        # One copy, if it is not laid out like this: strided reads by each tile would cost more.
        *(grad_output.permute(0, 2, 3, 1).contiguous(), positions, rois, bounds, grad_input),
        *(*rois.stride(), *grad_input.stride()),
        *(boxes, channels, height, width, spatial_scale),
        **options,
        SUM=wide(grad_input.dtype),
        BLOCK_K=BLOCK_BOXES,
        BLOCK_PH=block(pooled_height, 1 << 20),
        BLOCK_PW=block(pooled_width, 1 << 20),
        **config,
    )
