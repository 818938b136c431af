"""Masked convolution as an implicit matrix product over the live taps alone: masked taps are not in the loop.

Forward: a program owns a tile of pixels of one image times channels of the output and walks over (tap, input channel),
as many taps at once as fill a block where channels are few. Where the order of colors lets an output see only some
channels at the centre, that tap comes last, one run of channels of one color after the other, and what an output does
not see is not added: not even NaN gets through. The gradient of the input is the same with taps mirrored and weights
transposed. Backward to the weight: a program owns (output channel) x (tap, input channel) and some of the pixels; a
second kernel adds up those parts in their order, and writes the zeros of what is masked.

Maps are dense or made so: within an image, pixel p = y W + x lies at p s_x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pyzoo.kernels._common import block, dot, dtype_of_sums, float32_precision, wide
from pyzoo.kernels._configs import pick
from pyzoo.kernels.channel_sum import channel_sum

# ----------------------------------------------------------------------------------------------------------- geometry


class _Taps(NamedTuple):
    """The live taps are an interval in row-major order. Those of ``dense`` see all channels; if ``ordered``, the centre
    comes after them, and its channels are in runs of one color."""

    first: int
    dense: int
    ordered: bool
    strict: bool  # at the centre an output sees earlier colors, but not its own

    @property
    def live(self) -> slice:
        return slice(self.first, self.first + self.dense + self.ordered)


def _taps_of(height, width, mask, colors) -> _Taps:
    strict, row = mask in ("A", "vertical_a", "horizontal_a"), height // 2 * width
    first = row if mask.startswith("horizontal") else 0
    if mask.startswith("vertical"):
        return _Taps(first, row if strict else row + width, False, strict)
    sees_centre = colors == 1 and not strict
    return _Taps(first, row + width // 2 + sees_centre - first, colors > 1, strict)


def _dense(x):
    """``x``, or a copy of it if its rows do not follow each other."""
    return x if 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3) else x.contiguous()


def _strides(x) -> tuple[int, int, int]:
    """Of the images, channels and pixels of a dense map."""
    return x.stride(0), x.stride(1), x.stride(3 if x.shape[3] > 1 else 2)


def _precision(x) -> str:
    """As torch's own convolutions, which take TF32 for float32 unless told otherwise."""
    return float32_precision(torch.backends.cudnn.conv.fp32_precision) if x.dtype == torch.float32 else "ieee"


def _is_slow(x, precision) -> bool:
    """Whether products do not run on tensor cores."""
    return x.element_size() > 2 and precision == "ieee"


def _steps(x, dilation_y, dilation_x) -> tuple[int, int]:
    """The dilation, or as far as a map reaches."""
    return min(dilation_y, x.shape[2]), min(dilation_x, x.shape[3])


@triton.jit
def _pixels(start, width, BLOCK: tl.constexpr):
    """Row and column of the pixels from ``start`` on."""
    o_p = (start % width).to(tl.int32) + tl.arange(0, BLOCK)
    return (start // width).to(tl.int32) + o_p // width, o_p % width


@triton.jit
def _shift(tap, step_y, step_x, KH: tl.constexpr, KW: tl.constexpr):
    """Rows and columns from a pixel to what a tap reads there."""
    return (tap // KW - KH // 2) * step_y, (tap % KW - KW // 2) * step_x


# ------------------------------------------------------------------------------------------------ forward, and mirrored


@triton.jit(do_not_specialize=["height", "tiles", "step_y", "step_x"])
def _masked_conv2d_kernel(
    p_input,  # [N, groups * ins, H, W]
    p_weight,  # [live taps, ins, outs] of each group
    p_bias,  # [groups * outs]
    p_output,  # [N, groups * outs, H, W]
    s_in_n,
    s_in_c,
    s_in_x,
    s_weight_group,
    s_weight_tap,
    s_weight_in,
    s_out_n,
    s_out_c,
    s_out_x,
    height,
    width,
    pixels,
    groups,
    ins,
    outs,
    tiles,  # of an image
    step_y,
    step_x,
    run_in,  # channels of one color that lie together
    run_out,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FIRST: tl.constexpr,
    DENSE: tl.constexpr,
    ORDERED: tl.constexpr,
    STRICT: tl.constexpr,
    COLORS: tl.constexpr,
    GATES_IN: tl.constexpr,
    MIRRORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,  # taps and
    BLOCK_C: tl.constexpr,  # channels that are multiplied at once
):
    tiles_o = tl.cdiv(outs, BLOCK_O)
    i_o, i_rest = tl.program_id(0) % tiles_o, tl.program_id(0) // tiles_o
    i_group, i_rest = (i_rest % groups).to(tl.int64), i_rest // groups
    start, i_n = (i_rest % tiles).to(tl.int64) * BLOCK_P, (i_rest // tiles).to(tl.int64)
    o_y, o_x = _pixels(start, width, BLOCK_P)
    o_p = start + tl.arange(0, BLOCK_P)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_p, m_o = o_p < pixels, o_o < outs
    p_in = p_input + i_n * s_in_n + i_group * ins * s_in_c + (o_p * s_in_x)[:, None]
    p_w = p_weight + i_group * s_weight_group + o_o[None, :]

    BLOCK_K: tl.constexpr = BLOCK_T * BLOCK_C
    o_k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_P, BLOCK_O), SUM)
    blocks = tl.cdiv(ins, BLOCK_C)
    for i in range(tl.cdiv(DENSE, BLOCK_T) * blocks):
        # With one tap a block, all about it stays a scalar.
        o_t = i // blocks * BLOCK_T + (o_k // BLOCK_C if BLOCK_T > 1 else tl.zeros((1,), tl.int32))
        o_c = i % blocks * BLOCK_C + o_k % BLOCK_C
        d_y, d_x = _shift(FIRST + o_t, step_y, step_x, KH, KW)
        y, x = o_y[:, None] + d_y[None, :], o_x[:, None] + d_x[None, :]
        m_c = (o_c < ins) & (o_t < DENSE)
        m = m_p[:, None] & m_c[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        o_in = o_c.to(tl.int64) * s_in_c + (d_y.to(tl.int64) * width + d_x) * s_in_x
        o_w = o_t.to(tl.int64) * s_weight_tap + o_c.to(tl.int64) * s_weight_in
        left = tl.load(p_in + o_in[None, :], m, 0.0)
        right = tl.load(p_w + o_w[:, None], m_c[:, None] & m_o[None, :], 0.0)
        total = dot(left, right, total, PRECISION)
    if ORDERED:
        color_out = (i_group * outs + o_o) // run_out % COLORS
        seen_from, seen_to = 0, COLORS  # no other color has to do with this tile
        if MIRRORED:
            seen_from = tl.min(tl.where(m_o, color_out, COLORS)).to(tl.int32) + STRICT
        else:
            seen_to = tl.max(tl.where(m_o, color_out, 0)).to(tl.int32) + 1 - STRICT
        run_blocks, seen = tl.cdiv(run_in, BLOCK_K), tl.maximum(seen_to - seen_from, 0)
        for i in range(GATES_IN * seen * run_blocks):
            i_run = i // run_blocks
            color = seen_from + i_run % seen
            o_c = i % run_blocks * BLOCK_K + o_k
            m_c = o_c < run_in
            o_c += (i_run // seen * COLORS + color) * run_in - (i_group * ins).to(tl.int32)
            m_c &= (o_c >= 0) & (o_c < ins)
            o_w = tl.full((), DENSE, tl.int64) * s_weight_tap + o_c.to(tl.int64) * s_weight_in
            left = tl.load(p_in + (o_c.to(tl.int64) * s_in_c)[None, :], m_p[:, None] & m_c[None, :], 0.0)
            right = tl.load(p_w + o_w[:, None], m_c[:, None] & m_o[None, :], 0.0)
            sees = (color_out + STRICT <= color) if MIRRORED else (color + STRICT <= color_out)
            # Not where(sees, dot(..., total), total), which Triton cannot compile for tensor memory.
            more = dot(left, right, tl.zeros((BLOCK_P, BLOCK_O), SUM), PRECISION)
            total += tl.where(sees[None, :], more, 0.0)
    if HAS_BIAS:
        total += tl.load(p_bias + i_group * outs + o_o, m_o, 0.0).to(SUM)[None, :]
    p_out = p_output + i_n * s_out_n + (i_group * outs + o_o)[None, :] * s_out_c + (o_p * s_out_x)[:, None]
    tl.store(p_out, total.to(p_output.dtype.element_ty), m_p[:, None] & m_o[None, :])


PROGRAMS = 128  # that fill a GPU: how the work is split follows from the shape alone, and so do the bits


def _configs(images, pixels, groups, ins, outs, size, slow):
    """The largest tiles that give enough programs first. ``size``: bytes of a number; ``slow``: not on tensor cores,
    where the operands take registers."""
    depth = _depth(ins, size, slow)
    tiles = [(64, 64), (64, 32), (32, 32)] if slow else [(128, 128), (128, 64), (64, 64), (32, 32)]
    if size == 8:
        tiles = tiles[1:]
    elif depth["BLOCK_T"] > 1:  # an offset and a mask for each number that is loaded: more registers
        tiles = tiles[-2:]
    configs = []
    for p, o in tiles:
        p, o = max(block(pixels, p), 16), max(block(outs, o), 16)
        programs = images * triton.cdiv(pixels, p) * groups * triton.cdiv(outs, o)
        config = {"BLOCK_P": p, "BLOCK_O": o, **depth, "num_warps": 8 if p > 64 else 4}
        configs.append((max(PROGRAMS - programs, 0), {**config, "num_stages": 3}))
    return [config for missing, config in sorted(configs, key=lambda at: at[0])]


def _depth(ins, size, slow):
    """How many taps and channels are multiplied at once: 128 bytes of each row, or half of them for few channels."""
    depth = 16 if slow else 128 // size if ins > 64 // size else 64 // size
    c = max(block(ins, depth), 1)
    return {"BLOCK_T": depth // c, "BLOCK_C": c}


def _convolve(input, weight, weight_group, bias, output, taps, kernel, steps, groups, mirrored, **order):
    """``weight``: [live taps, ins, outs], that of each group ``weight_group`` numbers after the one before."""
    images, _, height, width = output.shape
    ins, outs = input.shape[1] // groups, output.shape[1] // groups
    precision = _precision(input)
    shape = {"images": images, "pixels": height * width, "groups": groups, "ins": ins, "outs": outs}
    shape |= {"size": input.element_size(), "slow": _is_slow(input, precision)}
    config = pick(_masked_conv2d_kernel, _configs, output.device, output.dtype, **shape)
    tiles = triton.cdiv(height * width, config["BLOCK_P"])
    input = _dense(input)
    _masked_conv2d_kernel[(images * tiles * groups * triton.cdiv(outs, config["BLOCK_O"]),)](
        *(input, weight, bias, output),
        *(*_strides(input), weight_group, weight.stride(0), weight.stride(1), *_strides(output)),
        *(height, width, height * width, groups, ins, outs, tiles),
        *steps,
        KH=kernel[0],
        KW=kernel[1],
        FIRST=taps.first,
        DENSE=taps.dense,
        ORDERED=taps.ordered,
        STRICT=taps.strict,
        MIRRORED=mirrored,
        HAS_BIAS=bias is not None,
        PRECISION=precision,
        SUM=wide(input.dtype),
        **order,
        **config,
    )


def masked_conv2d_fwd(input, weight, bias, output, mask, colors, gates, groups, dilation_y, dilation_x):
    if output.numel() == 0:
        return
    out_channels, in_channels = output.shape[1], input.shape[1]
    kernel = weight.shape[2:]
    taps = _taps_of(*kernel, mask, colors)
    packed = weight.flatten(2)[:, :, taps.live].permute(2, 1, 0).contiguous()  # rows of neighbours for the loads
    steps = _steps(input, dilation_y, dilation_x)
    order = {"run_in": in_channels // colors, "run_out": out_channels // (gates * colors)}
    order |= {"COLORS": colors, "GATES_IN": 1}
    _convolve(
        *(input, packed, out_channels // groups, bias, output, taps, kernel, steps, groups, False),
        **order,
    )


def _bwd_input(grad_output, weight, grad_input, mask, colors, gates, groups, dilation_y, dilation_x):
    if grad_input.numel() == 0:
        return
    out_channels, in_channels = grad_output.shape[1], grad_input.shape[1]
    kernel = weight.shape[2:]
    taps = _taps_of(*kernel, mask, colors)
    packed = weight.flatten(2)[:, :, taps.live].permute(2, 0, 1).contiguous()
    steps = [-step for step in _steps(grad_input, dilation_y, dilation_x)]
    order = {"run_in": out_channels // (gates * colors), "run_out": in_channels // colors}
    order |= {"COLORS": colors, "GATES_IN": gates}
    weight_group = out_channels // groups * packed.shape[2]
    _convolve(
        *(grad_output, packed, weight_group, None, grad_input, taps, kernel, steps, groups, True),
        **order,
    )


# ---------------------------------------------------------------------------------------------- backward to the weight


@triton.jit(do_not_specialize=["height", "tiles", "step_y", "step_x", "pixel_blocks"])
def _masked_conv2d_bwd_weight_kernel(
    p_grad_output,  # [N, groups * outs, H, W]
    p_input,  # [N, groups * ins, H, W]
    p_parts,  # [splits, live taps, groups * outs, ins]
    s_out_n,
    s_out_c,
    s_out_x,
    s_in_n,
    s_in_c,
    s_in_x,
    height,
    width,
    pixels,
    groups,
    ins,
    outs,
    tiles,  # of an image
    pixel_blocks,  # of all images
    step_y,
    step_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FIRST: tl.constexpr,
    LIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_o, tiles_c = tl.cdiv(outs, BLOCK_O), tl.cdiv(ins, BLOCK_C)
    i_o, i_rest = tl.program_id(0) % tiles_o, tl.program_id(0) // tiles_o
    i_c, i_rest = i_rest % tiles_c, i_rest // tiles_c
    i_t, i_group = i_rest % tl.cdiv(LIVE, BLOCK_T), (i_rest // tl.cdiv(LIVE, BLOCK_T)).to(tl.int64)
    i_split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    begin = (i_split * pixel_blocks // splits).to(tl.int32)
    end = ((i_split + 1) * pixel_blocks // splits).to(tl.int32)

    o_j = tl.arange(0, BLOCK_T * BLOCK_C)
    o_t = i_t * BLOCK_T + (o_j // BLOCK_C if BLOCK_T > 1 else tl.zeros((1,), tl.int32))
    o_c = i_c * BLOCK_C + o_j % BLOCK_C
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_j, m_o = (o_c < ins) & (o_t < LIVE), o_o < outs
    d_y, d_x = _shift(FIRST + o_t, step_y, step_x, KH, KW)
    o_in = o_c.to(tl.int64) * s_in_c + (d_y.to(tl.int64) * width + d_x) * s_in_x
    p_in = p_input + i_group * ins * s_in_c + o_in[None, :]
    p_out = p_grad_output + ((i_group * outs + o_o) * s_out_c)[None, :]

    total = tl.zeros((BLOCK_O, BLOCK_T * BLOCK_C), SUM)
    for i in range(begin, end):
        start, i_n = tl.full((), i % tiles, tl.int64) * BLOCK_P, tl.full((), i // tiles, tl.int64)
        o_y, o_x = _pixels(start, width, BLOCK_P)
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = o_p < pixels
        y, x = o_y[:, None] + d_y[None, :], o_x[:, None] + d_x[None, :]
        m = m_p[:, None] & m_j[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        left = tl.load(p_out + i_n * s_out_n + (o_p * s_out_x)[:, None], m_p[:, None] & m_o[None, :], 0.0)
        right = tl.load(p_in + i_n * s_in_n + (o_p * s_in_x)[:, None], m, 0.0)
        total = dot(tl.trans(left), right, total, PRECISION)
    o_part = (i_split * LIVE + o_t) * groups * outs + i_group * outs  # row of channel 0 of the group
    p_part = p_parts + ((o_part[None, :] + o_o[:, None]) * ins + o_c[None, :])
    tl.store(p_part, total, m_o[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=["splits", "out_channels"])
def _masked_conv2d_sum_kernel(
    p_parts,  # [splits, live taps, OC, IC / groups]
    p_grad_weight,  # [OC, IC / groups, KH, KW]
    splits,
    out_channels,
    ins,
    out_group,  # channels of a group
    run_in,
    run_out,
    TAPS: tl.constexpr,
    FIRST: tl.constexpr,
    LIVE: tl.constexpr,
    CENTRE: tl.constexpr,  # the tap at which the order of colors counts, or -1
    STRICT: tl.constexpr,
    COLORS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tap = tl.program_id(0) % TAPS
    o_w = (tl.program_id(0) // TAPS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_o, o_c = o_w // ins, o_w % ins
    m_w = o_o < out_channels
    m = m_w & (tap >= FIRST) & (tap < FIRST + LIVE)
    if tap == CENTRE:
        color_in, color_out = (o_o // out_group * ins + o_c) // run_in, o_o // run_out % COLORS
        m &= color_in + STRICT <= color_out
    count = tl.full((), out_channels, tl.int64) * ins
    total = tl.zeros((BLOCK,), SUM)
    p_part = p_parts + (tap - FIRST) * count + o_w
    for _ in range(splits):
        total += tl.load(p_part, m, 0.0)
        p_part += LIVE * count
    tl.store(p_grad_weight + o_w * TAPS + tap, total.to(p_grad_weight.dtype.element_ty), m_w)


def _weight_configs(pixels, ins, outs, taps, size, slow):
    if slow:
        tiles = [(64, 64), (64, 32), (32, 64)][: 1 if size == 8 else None]
    else:
        tiles = [(64, 64), (128, 64), (64, 128), (128, 128)][: 2 if ins < 128 else None]
    for o, j in tiles:
        j = max(min(triton.next_power_of_2(ins) * triton.next_power_of_2(taps), j), 16)
        c = block(ins, j)
        config = {"BLOCK_P": 16 if slow else 128 // size, "BLOCK_O": max(block(outs, o), 16)}
        config |= {"BLOCK_T": j // c, "BLOCK_C": c}
        yield {**config, "num_warps": 8 if o * j > 4096 else 4, "num_stages": 3}


def _bwd_weight(grad_output, input, grad_weight, mask, colors, gates, groups, dilation_y, dilation_x):
    if grad_weight.numel() == 0:
        return
    out_channels, ins, *kernel = grad_weight.shape
    images, in_channels, height, width = input.shape
    taps = _taps_of(*kernel, mask, colors)
    live = taps.dense + taps.ordered
    options = {"FIRST": taps.first, "LIVE": live, "SUM": wide(input.dtype)}
    splits, parts = 0, input.new_empty(0)
    if input.numel() and live:
        outs, precision = out_channels // groups, _precision(input)
        shape = {"pixels": height * width, "ins": ins, "outs": outs, "taps": live}
        shape |= {"size": input.element_size(), "slow": _is_slow(input, precision)}
        config = pick(_masked_conv2d_bwd_weight_kernel, _weight_configs, input.device, input.dtype, **shape)
        tiles = triton.cdiv(height * width, config["BLOCK_P"])
        programs = groups * triton.cdiv(outs, config["BLOCK_O"])
        programs *= triton.cdiv(ins, config["BLOCK_C"]) * triton.cdiv(live, config["BLOCK_T"])
        # A part reads several times what it writes.
        splits = min(triton.cdiv(2 * PROGRAMS, programs), triton.cdiv(images * tiles, 4))
        parts = torch.empty((splits, live, out_channels, ins), dtype=dtype_of_sums(input), device=input.device)
        input, grad_output = _dense(input), _dense(grad_output)
        _masked_conv2d_bwd_weight_kernel[(programs, splits)](
            *(grad_output, input, parts),
            *(*_strides(grad_output), *_strides(input)),
            *(height, width, height * width, groups, ins, outs, tiles, images * tiles),
            *_steps(input, dilation_y, dilation_x),
            KH=kernel[0],
            KW=kernel[1],
            PRECISION=precision,
            **options,
            **config,
        )
    count, size = kernel[0] * kernel[1], block(out_channels * ins, 256)
    _masked_conv2d_sum_kernel[(triton.cdiv(out_channels * ins, size) * count,)](
        *(parts, grad_weight, splits, out_channels, ins, out_channels // groups),
        *(in_channels // colors, out_channels // (gates * colors)),
        TAPS=count,
        CENTRE=count // 2 if taps.ordered else -1,
        STRICT=taps.strict,
        COLORS=colors,
        BLOCK=size,
        **options,
    )


# ---------------------------------------------------------------------------------------------------------- backward


def masked_conv2d_bwd(grad_output, input, weight, grad_input, grad_weight, grad_bias, *config):
    """Writes those of the gradients that are not None."""
    if grad_input is not None:
        _bwd_input(grad_output, weight, grad_input, *config)
    if grad_weight is not None:
        _bwd_weight(grad_output, input, grad_weight, *config)
    if grad_bias is not None:
        channel_sum(grad_output, grad_bias)
