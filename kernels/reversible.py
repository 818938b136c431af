"""The additive coupling of reversible blocks, and its inverse; a result may be written over the half it comes from.

Tensors of any strides: their dimensions are ordered as they lie in memory, and those that follow one another in all
tensors are taken as one, which leaves one dimension for dense halves, two for halves of the channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyzoo.kernels._configs import pick


@triton.jit
def _offsets(o, sizes, strides):
    """Where the elements ``o`` lie; sizes and strides from the innermost dimension on."""
    offsets = tl.zeros(o.shape, tl.int64)
    for d in tl.static_range(len(sizes)):
        if d + 1 < len(sizes):
            offsets += (o % sizes[d]).to(tl.int64) * strides[d]
            o = o // sizes[d]
        else:
            offsets += o.to(tl.int64) * strides[d]
    return offsets


@triton.jit
def _reversible_kernel(
    p_base,
    p_update,
    p_out,  # base + update, or less update
    p_grad_base,
    p_grad_update,
    p_grad_out,  # grad_base + grad_update
    sizes,
    s_base,
    s_update,
    s_out,
    s_grad_base,
    s_grad_update,
    s_grad_out,
    numel,
    MINUS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    LARGE: tl.constexpr,  # more elements than int32 can number
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    if LARGE:
        i = i.to(tl.int64)
    o = i * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    base = tl.load(p_base + _offsets(o, sizes, s_base), m)
    update = tl.load(p_update + _offsets(o, sizes, s_update), m).to(base.dtype)
    tl.store(p_out + _offsets(o, sizes, s_out), base - update if MINUS else base + update, m)
    if WITH_GRAD:
        grad = tl.load(p_grad_base + _offsets(o, sizes, s_grad_base), m)
        update = tl.load(p_grad_update + _offsets(o, sizes, s_grad_update), m).to(grad.dtype)
        tl.store(p_grad_out + _offsets(o, sizes, s_grad_out), grad + update, m)


def _configs(numel):
    for size, warps in [(1024, 4), (512, 4), (2048, 8)]:
        yield {"BLOCK": size, "num_warps": warps}


def _couple(tensors, minus):
    out = tensors[2]
    numel = out.numel()
    if numel == 0:
        return
    config = pick(_reversible_kernel, _configs, out.device, tensors[1].dtype, numel=numel)
    sizes, strides = _merged(tensors)
    none = [None] * (6 - len(tensors))
    _reversible_kernel[(triton.cdiv(numel, config["BLOCK"]),)](
        *(*tensors, *none, sizes, *strides, *none, numel),
        MINUS=minus,
        WITH_GRAD=not none,
        LARGE=numel > 2**31 - config["BLOCK"],
        **config,
    )


def _merged(tensors):
    """Sizes, and strides of each tensor, from the innermost dimension on."""
    out = tensors[2]
    sizes, strides = [], []
    for d in sorted((d for d in range(out.dim()) if out.shape[d] > 1), key=out.stride):
        here = [t.stride(d) for t in tensors]
        if sizes and all(s == sizes[-1] * inner for s, inner in zip(here, strides[-1], strict=True)):
            sizes[-1] *= out.shape[d]
        else:
            sizes.append(out.shape[d])
            strides.append(here)
    if not sizes:
        return (1,), [(1,)] * len(tensors)
    return tuple(sizes), list(zip(*strides, strict=True))


def reversible_fwd(x, update, y):
    _couple((x, update, y), minus=False)


def reversible_inv(y, update, x):
    _couple((y, update, x), minus=True)


def reversible_bwd(y, update, x, grad_y, grad_update, grad_x):
    _couple((y, update, x, grad_y, grad_update, grad_x), minus=True)
