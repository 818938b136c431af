"""Non-maximum suppression: greedy and exact, without waiting for the host.

The boxes are sorted by score, and by class before that where classes are compared: then boxes that may suppress each
other lie together. They are taken in chunks. Which boxes of a chunk suppress which of it is a matrix of bits, made by
as many programs as it has tiles. One program then walks over the chunk, some boxes at a time, and decides which are
kept. For the boxes after the chunk no bits are stored: they are compared with the kept ones only. So a box takes CHUNK
bits of memory, however many there are, and a chunk two launches.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from pyzoo.kernels._common import block, divide, wide
from pyzoo.kernels._configs import pick

CHUNK = 4096  # boxes; a power of 2

# ------------------------------------------------------------------------------------------------------------- sorting


@triton.jit
def _nms_key_kernel(
    p_scores,  # [B, N]
    p_key,  # [B, N]: ascending for descending scores, NaN first, -0 equal to 0
    s_batch,
    s_score,
    n,
    SCORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    score = tl.load(p_scores + i_b * s_batch + o_n * s_score, m_n, 0.0).to(SCORE)
    KEY: tl.constexpr = p_key.dtype.element_ty
    LARGEST: tl.constexpr = 2 ** (KEY.primitive_bitwidth - 1) - 1
    bits = tl.where(score == 0, 0.0, score).to(KEY, bitcast=True)
    key = tl.where(bits >= 0, -1 - bits, bits & LARGEST)
    tl.store(p_key + i_b * n + o_n, tl.where(score == score, key, -LARGEST - 1), m_n)


@triton.jit
def _nms_gather_kernel(
    p_boxes,  # [B, N, 4]
    p_order,  # [B, N]: the box of each rank
    p_rank,  # [B, N]: the rank at each place, or None: the same
    p_idxs,  # [B, N], or None
    p_largest,  # [B]: of the coordinates; or None
    p_sorted,  # [B, 5, N]: x1, y1, x2, y2 and area of the box at each place
    p_dead,  # [B, N]: whether a box is known to be suppressed; none is
    s_batch,
    s_box,
    s_coord,
    s_idxs_batch,
    s_idx,
    n,
    BLOCK: tl.constexpr,
):
    BOX: tl.constexpr = p_sorted.dtype.element_ty
    blocks = tl.cdiv(n, BLOCK)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    rank = o_n
    if p_rank is not None:
        rank = tl.load(p_rank + i_b * n + o_n, m_n, 0)
    index = tl.load(p_order + i_b * n + rank, m_n, 0)
    p_box = p_boxes + i_b * s_batch + index * s_box
    x1 = tl.load(p_box, m_n, 0.0).to(BOX)
    y1 = tl.load(p_box + s_coord, m_n, 0.0).to(BOX)
    x2 = tl.load(p_box + 2 * s_coord, m_n, 0.0).to(BOX)
    y2 = tl.load(p_box + 3 * s_coord, m_n, 0.0).to(BOX)
    if p_largest is not None:  # what torchvision does to separate classes, rounding included
        by = tl.load(p_idxs + i_b * s_idxs_batch + index * s_idx, m_n, 0).to(BOX) * (tl.load(p_largest + i_b) + 1.0)
        x1, y1, x2, y2 = x1 + by, y1 + by, x2 + by, y2 + by
    p_to = p_sorted + i_b * 5 * n + o_n
    tl.store(p_to, x1, m_n)
    tl.store(p_to + n, y1, m_n)
    tl.store(p_to + 2 * n, x2, m_n)
    tl.store(p_to + 3 * n, y2, m_n)
    tl.store(p_to + 4 * n, (x2 - x1) * (y2 - y1), m_n)
    tl.store(p_dead + i_b * n + o_n, tl.zeros((BLOCK,), tl.int8), m_n)


# --------------------------------------------------------------------------------------------------------- suppression


@triton.jit
def _of_one_class(p_classes, o_i, m_i, o_j, m_j):
    """[I, J], or all, where there are no classes."""
    m = m_i[:, None] & m_j[None, :]
    if p_classes is not None:
        m = m & (tl.load(p_classes + o_i, m_i, 0)[:, None] == tl.load(p_classes + o_j, m_j, 0)[None, :])
    return m


@triton.jit
def _suppresses(p_boxes, n, o_i, m_i, o_j, m_j, threshold):
    """[I, J]: whether box i, if kept, suppresses box j. These operations in this order define the overlap: with NaN,
    std::max and std::min return their first argument."""
    p_i, p_j = p_boxes + o_i, p_boxes + o_j
    x1_i, x1_j = tl.load(p_i, m_i, 0.0)[:, None], tl.load(p_j, m_j, 0.0)[None, :]
    y1_i, y1_j = tl.load(p_i + n, m_i, 0.0)[:, None], tl.load(p_j + n, m_j, 0.0)[None, :]
    x2_i, x2_j = tl.load(p_i + 2 * n, m_i, 0.0)[:, None], tl.load(p_j + 2 * n, m_j, 0.0)[None, :]
    y2_i, y2_j = tl.load(p_i + 3 * n, m_i, 0.0)[:, None], tl.load(p_j + 3 * n, m_j, 0.0)[None, :]
    area_i, area_j = tl.load(p_i + 4 * n, m_i, 0.0)[:, None], tl.load(p_j + 4 * n, m_j, 0.0)[None, :]
    width = tl.where(x2_j < x2_i, x2_j, x2_i) - tl.where(x1_i < x1_j, x1_j, x1_i)
    height = tl.where(y2_j < y2_i, y2_j, y2_i) - tl.where(y1_i < y1_j, y1_j, y1_i)
    inter = tl.where(width > 0, width, 0.0) * tl.where(height > 0, height, 0.0)
    return divide(inter, area_i + area_j - inter) > tl.full((), threshold, inter.dtype)


@triton.jit
def _any(flags):
    """Over the first dimension."""
    return tl.max(flags.to(tl.int32), 0) != 0


@triton.jit
def _nms_mask_kernel(
    p_boxes,  # [B, 5, N]
    p_classes,  # [B, N], or None
    p_mask,  # [B, words, CHUNK]: bit i of word w for box j of the same chunk: whether 32 * w + i < j would suppress it
    n,
    threshold: tl.float64,
    CHUNK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    TILES: tl.constexpr = CHUNK // BLOCK_J
    words = tl.cdiv(n, 32)
    i_tile = tl.program_id(0) % TILES
    i = (tl.program_id(0) // TILES).to(tl.int64)
    i_word, i_b = i % words, i // words
    o_32 = tl.arange(0, 32)
    o_i = i_word * 32 + o_32
    j_first = i_word * 32 // CHUNK * CHUNK + i_tile * BLOCK_J
    o_j = j_first + tl.arange(0, BLOCK_J)
    if (j_first < n) & (j_first + BLOCK_J > i_word * 32):  # what else there is will not be looked at
        if p_classes is not None:
            p_classes += i_b * n
        bits = tl.zeros((BLOCK_J,), tl.int32)
        m_i, m_j = o_i < n, o_j < n
        m = _of_one_class(p_classes, o_i, m_i, o_j, m_j) & (o_i[:, None] < o_j[None, :])
        if tl.max(m.to(tl.int32)) != 0:
            hit = m & _suppresses(p_boxes + i_b * 5 * n, n, o_i, m_i, o_j, m_j, threshold)
            bits = tl.sum(hit.to(tl.int32) << o_32[:, None], 0)
        tl.store(p_mask + i * CHUNK + i_tile * BLOCK_J + tl.arange(0, BLOCK_J), bits, m_j)


@triton.jit
def _pack(flags, BLOCK: tl.constexpr):
    """Words of 32 flags each."""
    return tl.sum(tl.reshape(flags.to(tl.int32) << (tl.arange(0, BLOCK) % 32), (BLOCK // 32, 32)), 1)


@triton.jit(do_not_specialize=["limit", "chunk", "chunks"])
def _nms_scan_kernel(
    p_mask,  # [B, words, CHUNK]
    p_dead,  # [B, N]
    p_rank,  # [B, N], or None
    p_words,  # [B, words]: the boxes that are kept, by place
    p_kept,  # [B, N]: the same, by rank
    p_places,  # [B, N]: the places of those that are kept
    p_counts,  # [B, chunks + 1]: how many are kept before each chunk
    n,
    limit,
    chunk,
    chunks,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    words = tl.cdiv(n, 32)
    first = tl.full((), chunk, tl.int64) * CHUNK
    p_counts += i_b * (chunks + 1) + chunk
    p_words += i_b * words
    p_mask += i_b * words * CHUNK
    o_j = tl.arange(0, BLOCK)
    o_v = tl.arange(0, BLOCK // 32)
    count = tl.load(p_counts, chunk > 0, 0)
    tl.store(p_counts, count)
    size = tl.minimum(n - first, CHUNK) if count < limit else first * 0
    for b0 in range(0, size.to(tl.int32), BLOCK):
        m_j = b0 + o_j < size
        alive = m_j & (tl.load(p_dead + i_b * n + first + b0 + o_j, m_j, 1) == 0)
        # Against what is kept of the blocks before.
        for w0 in range(0, b0 // 32, WORDS):
            o_w = first // 32 + w0 + tl.arange(0, WORDS)
            m_w = w0 + tl.arange(0, WORDS) < b0 // 32
            kept = tl.load(p_words + o_w, m_w, 0)
            mask = tl.load(p_mask + o_w[:, None] * CHUNK + (b0 + o_j)[None, :], m_w[:, None] & m_j[None, :], 0)
            alive = alive & (_any((mask & kept[:, None]) != 0) == 0)
        # Within the block: a box is kept if no kept box suppresses it. Starting from all, what holds for the first t
        # boxes of a chain of suppressions is right after t rounds; few chains are longer than three.
        o_w = (first + b0) // 32 + o_v
        m = (o_w < words)[:, None] & (o_v[:, None] <= o_j[None, :] // 32) & m_j[None, :]
        mask = tl.load(p_mask + o_w[:, None] * CHUNK + (b0 + o_j)[None, :], m, 0)
        now, kept, changed = alive, _pack(alive, BLOCK), 1
        while changed != 0:
            now = alive & (_any((mask & kept[:, None]) != 0) == 0)
            packed = _pack(now, BLOCK)
            changed = tl.max((packed != kept).to(tl.int32))
            kept = packed
        place = first + b0 + o_j
        position = count + tl.cumsum(now.to(tl.int32), 0) - 1
        tl.store(p_words + o_w, kept, o_w < words)
        tl.store(p_places + i_b * n + position, place.to(tl.int32), now)
        rank = place
        if p_rank is not None:
            rank = tl.load(p_rank + i_b * n + place, m_j, 0)
        tl.store(p_kept + i_b * n + rank, now.to(tl.int8), m_j)
        count += tl.sum(now.to(tl.int32))
        tl.debug_barrier()  # the next block reads p_words
    tl.store(p_counts + 1, count)


@triton.jit(do_not_specialize=["limit", "chunk", "chunks"])
def _nms_apply_kernel(
    p_boxes,  # [B, 5, N]
    p_classes,  # [B, N], or None
    p_places,  # [B, N]
    p_counts,  # [B, chunks + 1]
    p_dead,  # [B, N]: programs that find the same box write the same
    n,
    limit,
    threshold: tl.float64,
    chunk,
    chunks,
    CHUNK: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PART: tl.constexpr,
):
    first = (tl.full((), chunk, tl.int64) + 1) * CHUNK
    tiles = tl.cdiv(n - first, BLOCK_J)
    i_tile, i_b = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    p_counts += i_b * (chunks + 1) + chunk
    begin, end = tl.load(p_counts), tl.load(p_counts + 1)
    begin += tl.program_id(1) * PART
    end = tl.minimum(begin + PART, end) if end < limit else begin
    if p_classes is not None:
        p_classes += i_b * n
    o_j = first + i_tile * BLOCK_J + tl.arange(0, BLOCK_J)
    m_j = o_j < n
    dead = o_j < 0
    for k in range(begin, end, BLOCK_I):
        o_k = k + tl.arange(0, BLOCK_I)
        m_i = o_k < end
        o_i = tl.load(p_places + i_b * n + o_k, m_i, 0).to(tl.int64)
        m = _of_one_class(p_classes, o_i, m_i, o_j, m_j)
        if tl.max(m.to(tl.int32)) != 0:
            dead = dead | _any(m & _suppresses(p_boxes + i_b * 5 * n, n, o_i, m_i, o_j, m_j, threshold))
    tl.store(p_dead + i_b * n + o_j, tl.full((BLOCK_J,), 1, tl.int8), m_j & dead)


@triton.jit(do_not_specialize=["limit"])
def _nms_emit_kernel(
    p_kept,  # [B, N]
    p_order,  # [B, N]
    p_keep,  # [B, M]: the boxes that are kept, then -1
    p_count,  # [B]
    s_batch,
    s_keep,
    n,
    limit,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_keep += i_b * s_batch
    o = tl.arange(0, BLOCK)
    count = tl.zeros((), tl.int64)
    for r0 in range(0, n, BLOCK):
        o_r = i_b * n + r0 + o
        m_r = r0 + o < n
        kept = (tl.load(p_kept + o_r, m_r, 0) != 0).to(tl.int64)
        position = count + tl.cumsum(kept, 0) - 1
        index = tl.load(p_order + o_r, m_r, 0)
        tl.store(p_keep + position * s_keep, index, (kept != 0) & (position < limit))
        count += tl.sum(kept)
    count = tl.minimum(count, limit)
    tl.store(p_count + i_b, count)
    for k0 in range(0, limit, BLOCK):
        o_k = tl.full((), k0, tl.int64) + o
        tl.store(p_keep + o_k * s_keep, tl.full((BLOCK,), -1, tl.int64), (o_k >= count) & (o_k < limit))


# ------------------------------------------------------------------------------------------------------------ launcher


def _mask_configs(boxes, float64):
    for j, warps in ((128, 8), (64, 4)) if float64 else ((128, 4), (128, 8), (256, 8), (64, 2)):
        yield {"BLOCK_J": j, "num_warps": warps}


def _scan_configs(boxes):
    for size, words, warps in (256, 32, 8), (128, 32, 4), (256, 64, 8):
        yield {"BLOCK": size, "WORDS": words, "num_warps": warps}


def _apply_configs(boxes, float64):
    configs = (16, 128, 512, 4), (32, 128, 512, 4), (16, 128, 1024, 4), (32, 256, 512, 8)
    for i, j, part, warps in configs[:1] if float64 else configs:  # more of float64 would not fit the registers
        yield {"BLOCK_I": i, "BLOCK_J": j, "PART": part, "num_warps": warps}


@functools.lru_cache
def _round_down(x: float, dtype: torch.dtype) -> float:
    """The largest number of this type that is not above x: an overlap is above one when it is above the other."""
    rounded = torch.tensor(x, dtype=dtype, device="cpu")
    return (rounded if rounded.item() <= x else rounded.nextafter(rounded.new_tensor(-math.inf))).item()


def nms(boxes, scores, idxs, iou_threshold, keep, shift_classes):
    """How many are kept is a tensor: nobody has waited for it."""
    batch, n, limit = keep.shape[:-1], boxes.shape[-2], keep.shape[-1]
    kept_count = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    entries = kept_count.numel()
    if entries * n == 0:
        keep.fill_(-1)
        return kept_count
    if boxes.dim() == 2:
        boxes, scores, keep = boxes[None], scores[None], keep[None]
        idxs = None if idxs is None else idxs[None]
    box_type = torch.promote_types(boxes.dtype, torch.float32)

    def new(*shape, dtype=torch.int32):
        return torch.empty((entries, *shape), dtype=dtype, device=boxes.device)

    # Sorting. Integers, since libraries differ in where they put NaN and -0.
    blocks = entries * triton.cdiv(n, 1024)
    key = new(n, dtype=torch.int64 if scores.dtype == torch.float64 else torch.int32)
    _nms_key_kernel[(blocks,)](scores, key, *scores.stride(), n, SCORE=wide(scores.dtype), BLOCK=1024)
    order = key.sort(stable=True).indices
    classes = rank = largest = None
    if idxs is not None:
        if shift_classes:
            largest = boxes.amax((1, 2)).to(box_type)
        else:
            classes, rank = idxs.gather(1, order).sort(stable=True)
    sorted, dead = new(5, n, dtype=box_type), new(n, dtype=torch.int8)
    _nms_gather_kernel[(blocks,)](
        *(boxes, order, rank, idxs, largest, sorted, dead),
        *(*boxes.stride(), *((0, 0) if idxs is None else idxs.stride()), n),
        BLOCK=1024,
        enable_fp_fusion=False,
    )

    # Suppression.
    threshold = _round_down(iou_threshold, box_type)
    arguments = boxes.device, boxes.dtype
    mask_config = pick(_nms_mask_kernel, _mask_configs, *arguments, boxes=n, float64=boxes.dtype == torch.float64)
    scan_config = pick(_nms_scan_kernel, _scan_configs, *arguments, boxes=n)
    apply_config = pick(_nms_apply_kernel, _apply_configs, *arguments, boxes=n, float64=boxes.dtype == torch.float64)
    size = max(block(n, CHUNK), mask_config["BLOCK_J"], scan_config["BLOCK"])
    chunks, words = triton.cdiv(n, size), triton.cdiv(n, 32)
    mask = new(words, size)
    _nms_mask_kernel[(entries * words * (size // mask_config["BLOCK_J"]),)](
        *(sorted, classes, mask, n, threshold), CHUNK=size, **mask_config, enable_fp_fusion=False
    )
    kept_words, kept, places, counts = new(words), new(n, dtype=torch.int8), new(n), new(chunks + 1)
    enough = limit if rank is None else n  # to be kept; classes come one after the other, not by score
    for chunk in range(chunks):
        _nms_scan_kernel[(entries,)](
            *(mask, dead, rank, kept_words, kept, places, counts, n, enough, chunk, chunks), CHUNK=size, **scan_config
        )
        rest = n - (chunk + 1) * size
        if rest > 0:
            tiles = triton.cdiv(rest, apply_config["BLOCK_J"])
            _nms_apply_kernel[(entries * tiles, triton.cdiv(size, apply_config["PART"]))](
                *(sorted, classes, places, counts, dead, n, enough, threshold, chunk, chunks),
                CHUNK=size,
                **apply_config,
                enable_fp_fusion=False,
            )
    _nms_emit_kernel[(entries,)](
        *(kept, order, keep, kept_count, *keep.stride(), n, limit), BLOCK=block(n, 4096), num_warps=8
    )
    return kept_count
