"""The cached PixelCNN sampler: one launch draws all pixels of all images.

A program draws one image, row by row, pixel by pixel, color by color, as the compiled core does: the vertical stack
once for each row, over all of its columns; the horizontal stack for one column and the channels of one color. What the
layers keep lies in global memory, a region for each image. Programs never meet: the only barrier is that of a program
with itself, after each step whose results other lanes read. One compiled kernel serves every network: what the layers
are is a table in memory, which the kernel walks through.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyzoo.kernels._common import block, divide
from pyzoo.kernels._configs import pick

# --------------------------------------------------------------------------------------------------------- description
# Layer, p_layer[...]; offsets count numbers, those of the caches in the region of an image. ci: inputs, p: width.
#    0 ci    1 p    2 rows above    3 columns on either side    4 whether it has a residual
#    5 ... 8    the weights of vertical [rows * columns * ci, 2p], horizontal [columns * ci, 2p], link [2p, 2p], output
#               [p, p], and  9 ... 12  their biases
#   13 ... 16   condition of the vertical gate: offset, or -1, and strides of images, rows, columns;  17 ... 20  of the
#               horizontal gate
#   21 above: [rows, as a ring][column, with zeros on both sides][ci], what the vertical convolution reads
#   22 left:  [column, with zeros on the left][ci], what the horizontal convolution reads of this row
#   23 link:  [column][2p], what the vertical stack gives to the horizontal gate in this row
#   24 gate:  [2p], what goes into the gate at this pixel
# What follows the last layer has, of all these, 3 and 22.
# Layer of the head, p_head[...]: 0 inputs  1 outputs  2 weight [inputs, outputs]  3 bias  4 its outputs in the region.
# The 2p channels are colors of a tanh half and a sigmoid half each; but for those of the vertical gate: two halves.
FIELDS, HEAD_FIELDS = tl.constexpr(25), tl.constexpr(5)
UNKNOWN = tl.constexpr(torch.iinfo(torch.int64).min)


def _describe(layers, head, height, width):
    """The table, the weights, the conditions, the numbers in the region of an image, and the offset in it of a scratch
    row [column][2p]."""
    table, weights, conditions, sizes = [], [], [], {"weights": 0, "conditions": 0, "region": 0}

    def put(what, tensor):
        (weights if what == "weights" else conditions).append(tensor.reshape(-1))
        return keep(what, tensor.numel())

    def keep(what, count):
        sizes[what] += count
        return sizes[what] - count

    def condition(tensor):  # [B, H, W, 2p], expanded where it does not depend on the pixel
        if tensor is None:
            return [-1, 0, 0, 0]
        if tensor.stride(1) == tensor.stride(2) == 0:
            tensor = tensor[:, :1, :1]
            return [put("conditions", tensor), tensor.shape[3], 0, 0]
        offset = put("conditions", tensor)
        return [offset, height * width * tensor.shape[3], width * tensor.shape[3], tensor.shape[3]]

    for *tensors, on_vertical, on_horizontal, residual in layers:
        inputs, (_, _, rows, columns), p = tensors[0].shape[1], tensors[0].shape, tensors[6].shape[0]
        side = columns // 2
        table += [inputs, p, rows, side, int(residual)]
        table += [put("weights", weight.permute(2, 3, 1, 0)) for weight in tensors[::2]]
        table += [put("weights", bias) for bias in tensors[1::2]]
        table += [*condition(on_vertical), *condition(on_horizontal)]
        table += [keep("region", rows * (width + 2 * side) * inputs), keep("region", (width + side) * inputs)]
        table += [keep("region", width * 2 * p), keep("region", 2 * p)]
    table += [0] * 22 + [keep("region", width * p)] + [0] * 2
    for weight, bias in head:
        outputs, inputs = weight.shape[:2]
        table += [inputs, outputs, put("weights", weight.permute(2, 3, 1, 0)), put("weights", bias)]
        table += [keep("region", outputs)]
    scratch = keep("region", width * 2 * max(layer[6].shape[0] for layer in layers))
    device = weights[0].device
    conditions = torch.cat(conditions) if conditions else weights[0].new_empty(0)
    return torch.tensor(table, device=device), torch.cat(weights), conditions, sizes["region"], scratch


@triton.jit
def _size(p_field):
    return tl.load(p_field).to(tl.int32)


# ------------------------------------------------------------------------------------------------------------ products


@triton.jit
def _gate(x, y):
    """tanh(x) sigmoid(y)"""
    e = tl.exp(-2.0 * tl.abs(x))
    tanh = divide(1.0 - e, 1.0 + e)
    return divide(tl.where(x < 0.0, -tanh, tanh), 1.0 + tl.exp(-y))


@triton.jit
def _rows_times(total, p_rows, p_weight, depth, s_weight, m_rows, m_columns, BLOCK_K: tl.constexpr):
    """``total`` + rows [depth] * columns of a matrix [depth, ...]."""
    o_k = tl.arange(0, BLOCK_K)
    for k in range(0, depth, BLOCK_K):
        m_k = k + o_k < depth
        left = tl.load(p_rows[:, None] + (k + o_k)[None, :], m_rows[:, None] & m_k[None, :], 0.0)
        right = tl.load(p_weight[None, :] + ((k + o_k) * s_weight)[:, None], m_k[:, None] & m_columns[None, :], 0.0)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def _times(
    p_row,
    p_weight,
    depth,
    s_weight,
    m_columns,
    half,
    BEFORE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row [depth], of which first is taken the ReLU or the gate, * columns of a matrix [depth, ...]."""
    o_k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_N), p_row.dtype.element_ty)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + o_k
        m_k = k < depth
        if BEFORE == "gate":
            k_tanh = k // half * half + k
            row = _gate(tl.load(p_row + k_tanh, m_k, 0.0), tl.load(p_row + k_tanh + half, m_k, 0.0))
        else:
            row = tl.load(p_row + k, m_k, 0.0)
            if BEFORE == "relu":
                row = tl.where(row < 0.0, 0.0, row)
        right = tl.load(p_weight[None, :] + (k * s_weight)[:, None], m_k[:, None] & m_columns[None, :], 0.0)
        total += row[:, None] * right
    return tl.sum(total, 0)


# --------------------------------------------------------------------------------------------------------------- stacks


@triton.jit
def _condition(p_conditions, p_field, i_image, y, o_x, o_n, m):
    offset = tl.load(p_field)
    at = offset + i_image * tl.load(p_field + 1) + y * tl.load(p_field + 2)
    p_at = p_conditions + at + (o_x * tl.load(p_field + 3))[:, None] + o_n[None, :]
    return tl.load(p_at, m & (offset >= 0), 0.0)


@triton.jit
def _vertical_stack(
    p_layers,
    p_weights,
    p_conditions,
    p_region,
    scratch,
    i_image,
    y,
    layers,
    width,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All layers of row y, which depend on the rows above alone."""
    NUMBER: tl.constexpr = p_region.dtype.element_ty
    p_vertical = p_region + scratch
    for i_layer in range(layers):
        p = p_layers + i_layer * FIELDS
        inputs, gates, rows, side = _size(p), 2 * _size(p + 1), _size(p + 2), _size(p + 3)
        kernel_row = (2 * side + 1) * inputs
        above_row = (width + 2 * side) * inputs
        first = y if i_layer == 0 else y + 1  # the oldest row: the first layer does not see its own
        p_above, p_link = p_region + tl.load(p + 21), p_region + tl.load(p + 23)
        p_vertical_weight, p_link_weight = p_weights + tl.load(p + 5), p_weights + tl.load(p + 7)
        for x0 in range(0, width, BLOCK_X):
            o_x = x0 + tl.arange(0, BLOCK_X)
            m_x = o_x < width
            for n0 in range(0, gates, BLOCK_Y):
                o_n = n0 + tl.arange(0, BLOCK_Y)
                m_n = o_n < gates
                m = m_x[:, None] & m_n[None, :]
                total = tl.zeros((BLOCK_X, BLOCK_Y), NUMBER)
                for r in range(rows):
                    p_rows = p_above + (first + r) % rows * above_row + o_x * inputs
                    p_weight = p_vertical_weight + r * kernel_row * gates + o_n
                    total = _rows_times(total, p_rows, p_weight, kernel_row, gates, m_x, m_n, BLOCK_K)
                total += tl.load(p_weights + tl.load(p + 9) + o_n, m_n, 0.0)[None, :]
                total += _condition(p_conditions, p + 13, i_image, y, o_x, o_n, m)
                tl.store(p_vertical + (o_x * gates)[:, None] + o_n[None, :], total, m)
        tl.debug_barrier()
        for x0 in range(0, width, BLOCK_X):
            o_x = x0 + tl.arange(0, BLOCK_X)
            m_x = o_x < width
            for n0 in range(0, gates, BLOCK_Y):
                o_n = n0 + tl.arange(0, BLOCK_Y)
                m_n = o_n < gates
                m = m_x[:, None] & m_n[None, :]
                total = tl.zeros((BLOCK_X, BLOCK_Y), NUMBER)
                p_rows = p_vertical + o_x * gates
                total = _rows_times(total, p_rows, p_link_weight + o_n, gates, gates, m_x, m_n, BLOCK_K)
                total += tl.load(p_weights + tl.load(p + 11) + o_n, m_n, 0.0)[None, :]
                total += _condition(p_conditions, p + 17, i_image, y, o_x, o_n, m)
                tl.store(p_link + (o_x * gates)[:, None] + o_n[None, :], total, m)
        if i_layer + 1 < layers:
            half, rows, side = gates // 2, _size(p + FIELDS + 2), _size(p + FIELDS + 3)
            p_next = p_region + tl.load(p + FIELDS + 21) + (y % rows * (width + 2 * side) + side) * half
            for i in range(0, width * half, BLOCK):
                o_i = i + tl.arange(0, BLOCK)
                m_i = o_i < width * half
                p_tanh = p_vertical + (o_i // half * half + o_i)
                gated = _gate(tl.load(p_tanh, m_i, 0.0), tl.load(p_tanh + half, m_i, 0.0))
                tl.store(p_next + o_i, gated, m_i)
        tl.debug_barrier()


@triton.jit
def _horizontal_stack(
    p_layers, p_weights, p_region, x, c, layers, COLORS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The channels of color c, in all layers, of column x; the colors before it are there."""
    for i_layer in range(layers):
        p = p_layers + i_layer * FIELDS
        inputs, width, side = _size(p), _size(p + 1), _size(p + 3)
        half = width // COLORS
        p_left = p_region + tl.load(p + 22) + x * inputs
        p_gate = p_region + tl.load(p + 24)
        # The first layer sees earlier colors, the others their own, too; masked weights are not read.
        own = (c if i_layer == 0 else c + 1) * (inputs // COLORS)
        for n0 in range(0, 2 * half, BLOCK_N):
            o_n = c * 2 * half + n0 + tl.arange(0, BLOCK_N)
            m_n = o_n < (c + 1) * 2 * half
            p_weight = p_weights + tl.load(p + 6) + o_n
            total = _times(p_left, p_weight, side * inputs + own, 2 * width, m_n, half, "", BLOCK_K, BLOCK_N)
            total += tl.load(p_weights + tl.load(p + 10) + o_n, m_n, 0.0)
            total += tl.load(p_region + tl.load(p + 23) + x * 2 * width + o_n, m_n, 0.0)
            tl.store(p_gate + o_n, total, m_n)
        tl.debug_barrier()
        residual, next_side = tl.load(p + 4) != 0, _size(p + FIELDS + 3)
        p_next = p_region + tl.load(p + FIELDS + 22) + (x + next_side) * width
        for n0 in range(0, half, BLOCK_N):
            o_n = c * half + n0 + tl.arange(0, BLOCK_N)
            m_n = o_n < (c + 1) * half
            p_weight = p_weights + tl.load(p + 8) + o_n
            total = _times(p_gate, p_weight, (c + 1) * half, width, m_n, half, "gate", BLOCK_K, BLOCK_N)
            total += tl.load(p_weights + tl.load(p + 12) + o_n, m_n, 0.0)
            total += tl.load(p_left + side * inputs + o_n, m_n & residual, 0.0)
            tl.store(p_next + o_n, total, m_n)
        tl.debug_barrier()


@triton.jit
def _head(
    p_head, p_weights, p_region, p_in, c, layers, COLORS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The logits of color c."""
    for i_layer in range(layers):
        p = p_head + i_layer * HEAD_FIELDS
        inputs, outputs = _size(p), _size(p + 1)
        p_out = p_region + tl.load(p + 4)
        for n0 in range(0, outputs // COLORS, BLOCK_N):
            o_n = c * (outputs // COLORS) + n0 + tl.arange(0, BLOCK_N)
            m_n = o_n < (c + 1) * (outputs // COLORS)
            p_weight = p_weights + tl.load(p + 2) + o_n
            total = _times(p_in, p_weight, (c + 1) * (inputs // COLORS), outputs, m_n, 1, "relu", BLOCK_K, BLOCK_N)
            tl.store(p_out + o_n, total + tl.load(p_weights + tl.load(p + 3) + o_n, m_n, 0.0), m_n)
        p_in = p_out
        tl.debug_barrier()
    return p_in


@triton.jit
def _draw(p_logits, levels, scale, u, BLOCK_L: tl.constexpr):
    """min(#{k : cdf(k) < u}, K - 1) with the cdf of softmax(logits / temperature), summed in float64. Where a logit is
    NaN: 0."""
    o_l = tl.arange(0, BLOCK_L)
    most = tl.load(p_logits)
    for k in range(0, levels, BLOCK_L):
        most = tl.maximum(most, tl.max(tl.load(p_logits + k + o_l, k + o_l < levels, float("-inf")), 0))
    total = tl.zeros((), tl.float64)
    for k in range(0, levels, BLOCK_L):
        total += tl.sum(_powers(p_logits, k + o_l, levels, most, scale), 0)
    below, value = tl.zeros((), tl.float64), tl.zeros((), tl.int32)
    for k in range(0, levels, BLOCK_L):
        powers = _powers(p_logits, k + o_l, levels, most, scale)
        cdf = below + tl.cumsum(powers, 0)
        value += tl.sum(((cdf < u * total) & (k + o_l < levels)).to(tl.int32), 0)
        below += tl.sum(powers, 0)
    return tl.minimum(value, levels - 1)


@triton.jit
def _powers(p_logits, o_l, levels, most, scale):
    m_l = o_l < levels
    power = tl.exp((tl.load(p_logits + o_l, m_l, 0.0) - most) * scale)
    return tl.where(m_l, power.to(tl.float64), 0.0)


# --------------------------------------------------------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["scratch", "region", "layers", "head_layers", "height", "width", "levels"])
def _pixelcnn_sample_kernel(
    p_table,  # layers, what follows them, layers of the head
    p_weights,
    p_conditions,
    p_regions,  # [B, region]
    p_uniforms,  # [B, C, H, W]
    p_samples,  # [B, C, H, W]
    p_logits,  # [B, C, K, H, W]
    scratch: tl.int64,
    region: tl.int64,
    layers,
    head_layers,
    height,
    width,
    levels,
    scale: tl.float64,  # 1 / temperature
    COLORS: tl.constexpr,
    WITH_LOGITS: tl.constexpr,
    BLOCK_X: tl.constexpr,  # the vertical stack: columns of a row,
    BLOCK_Y: tl.constexpr,  # columns of a matrix,
    BLOCK_V: tl.constexpr,  # rows of it
    BLOCK_K: tl.constexpr,  # the horizontal stack and the head: rows of a matrix,
    BLOCK_N: tl.constexpr,  # columns of it
    BLOCK_L: tl.constexpr,  # levels
):
    i_image = tl.program_id(0).to(tl.int64)
    p_region = p_regions + i_image * region
    NUMBER: tl.constexpr = p_regions.dtype.element_ty
    p_after, p_head = p_table + layers * FIELDS, p_table + (layers + 1) * FIELDS
    rows, side, last_width = _size(p_table + 2), _size(p_table + 3), _size(p_after - FIELDS + 1)
    p_left = p_region + tl.load(p_table + 22) + side * COLORS  # what the first layers read: the image
    p_above = p_region + tl.load(p_table + 21) + side * COLORS
    for y in range(height):
        _vertical_stack(
            p_table,
            p_weights,
            p_conditions,
            p_region,
            scratch,
            i_image,
            y,
            layers,
            width,
            BLOCK_X,
            BLOCK_Y,
            BLOCK_V,
            BLOCK_L,
        )
        for x in range(width):
            for c in range(COLORS):
                _horizontal_stack(p_table, p_weights, p_region, x, c, layers, COLORS, BLOCK_K, BLOCK_N)
                i_value = ((i_image * COLORS + c) * height + y) * width + x
                value = tl.load(p_samples + i_value)
                wanted = WITH_LOGITS  # of this color, or of one after it, which reads what the head makes of this one
                for later in range(COLORS - c):
                    wanted |= tl.load(p_samples + i_value + later * height * width) == UNKNOWN
                if wanted:
                    p_last = p_region + tl.load(p_after + 22) + x * last_width
                    p_out = _head(p_head, p_weights, p_region, p_last, c, head_layers, COLORS, BLOCK_K, BLOCK_N)
                    p_out += c * levels
                    if WITH_LOGITS:
                        for k in range(0, levels, BLOCK_L):
                            o_l = k + tl.arange(0, BLOCK_L)
                            o_logit = ((i_image * COLORS + c) * levels + o_l) * height * width + y * width + x
                            tl.store(p_logits + o_logit, tl.load(p_out + o_l, o_l < levels, 0.0), o_l < levels)
                    if value == UNKNOWN:
                        value = _draw(
                            p_out, levels, tl.full((), scale, NUMBER), tl.load(p_uniforms + i_value), BLOCK_L
                        ).to(tl.int64)
                        tl.store(p_samples + i_value, value)
                scaled = divide(2.0 * value.to(NUMBER), tl.full((), levels - 1, NUMBER)) - 1.0
                tl.store(p_left + x * COLORS + c, scaled)
                tl.debug_barrier()
        for i in range(0, width * COLORS, BLOCK_L):
            o_i = i + tl.arange(0, BLOCK_L)
            row = tl.load(p_left + o_i, o_i < width * COLORS, 0.0)
            tl.store(p_above + y % rows * (width + 2 * side) * COLORS + o_i, row, o_i < width * COLORS)
        tl.debug_barrier()


def _configs(columns, width, levels, size):
    """As large as registers allow: a step takes as long as its weights do from the cache. ``size``: bytes of a
    number."""
    for x, y, n in [(32, 32, 128), (16, 64, 128), (32, 64, 64)] if size == 4 else [(16, 32, 64)]:
        config = {"BLOCK_X": max(block(columns, x), 16), "BLOCK_Y": y, "BLOCK_V": 16, "BLOCK_K": 32}
        config |= {"BLOCK_N": block(2 * width, n), "BLOCK_L": max(block(levels, 256), 64)}
        yield {**config, "num_warps": 8, "num_stages": 2}


def pixelcnn_sample(layers, head, uniforms, samples, logits, temperature):
    if samples.numel() == 0:
        return
    images, colors, height, width = samples.shape
    levels = head[-1][0].shape[0] // colors
    table, weights, conditions, region, scratch = _describe(layers, head, height, width)
    regions = weights.new_zeros((images, region))
    shape = {"columns": width, "width": layers[-1][6].shape[0], "levels": levels, "size": weights.element_size()}
    config = pick(_pixelcnn_sample_kernel, _configs, weights.device, weights.dtype, **shape)
    _pixelcnn_sample_kernel[(images,)](
        *(table, weights, conditions, regions, uniforms, samples, samples if logits is None else logits),
        *(scratch, region, len(layers), len(head), height, width, levels, 1 / temperature),
        COLORS=colors,
        WITH_LOGITS=logits is not None,
        **config,
    )
