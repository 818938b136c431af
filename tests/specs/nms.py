"""Non-maximum suppression: samples, errors and benchmark cases."""

from __future__ import annotations

import functools
import math

import torch

import pyzoo.ops
from tests.specs import inputs
from tests.specs.inputs import INF, NAN
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample


def peer(boxes, scores, iou_threshold):
    from torchvision.ops import nms

    return nms(boxes, scores, iou_threshold)


def scattered(count: int, seed: int = 0) -> torch.Tensor:
    """Boxes of 16 to 64 pixels on a canvas that grows with their number: nearly all are kept."""
    g = inputs.generator(seed)
    corner = torch.rand(count, 2, generator=g) * 100 * math.sqrt(max(count, 1))
    return torch.cat([corner, corner + 16 * 4 ** torch.rand(count, 2, generator=g)], dim=1)


def clustered(count: int, seed: int = 0, members: int = 25) -> torch.Tensor:
    """Clusters of shaken copies of a box: most are suppressed."""
    g = inputs.generator(seed)
    centres = inputs.photo_boxes(-(-count // members), seed=seed)
    boxes = centres.repeat_interleave(members, 0)[:count]
    boxes = boxes + torch.randn(count, 4, generator=g) * 0.06 * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes[torch.randperm(count, generator=g)]


def random_scores(count: int, seed: int = 0) -> torch.Tensor:
    """All different: torch.rand repeats itself among some thousands, and torchvision leaves ties in any order."""
    return (torch.randperm(count, generator=inputs.generator(seed + 1)) + 0.5) / max(count, 1)


def hand_made():
    """(id, boxes, scores, threshold) of cases that decide between right and nearly right."""
    a = [0.0, 0, 10, 10]
    yield "at_threshold", [a, [0, 0, 10, 5]], [0.9, 0.8], 0.5  # the overlap is 0.5, which is not above 0.5
    yield "above_threshold", [a, [0, 0, 10, 5]], [0.9, 0.8], 0.4999999
    yield "third", [[0, 0, 3, 1], [0, 0, 1, 1]], [0.9, 0.8], 1 / 3  # compared in double: float32(1/3) > 1/3
    yield "touching", [a, [10, 0, 20, 10]], [0.9, 0.8], 0.0
    yield "chain", [a, [4, 0, 14, 10], [8, 0, 18, 10]], [0.9, 0.8, 0.7], 0.3  # what is suppressed suppresses nothing
    yield "equal", [a] * 5, [0.5] * 5, 0.5
    yield "equal_kept", [a] * 5, [0.5] * 5, 1.0
    yield "inverted", [[10, 10, 0, 0], [9, 9, 1, 1], a, [10, 0, 0, 10]], [0.9, 0.8, 0.7, 0.6], 0.3
    yield "no_area", [[5, 5, 5, 5], [5, 5, 5, 5], [0, 5, 10, 5], a], [0.9, 0.8, 0.7, 0.6], 0.0
    yield "nan_scores", [a, a, [50, 50, 60, 60], a], [0.5, NAN, NAN, 0.9], 0.5
    yield "inf_scores", [a, [50, 50, 60, 60], [90, 90, 95, 95]], [-INF, INF, 0.0], 0.5
    yield "signed_zeros", [a, [50, 50, 60, 60], [90, 90, 95, 95]], [-0.0, 0.0, -0.0], 0.5
    yield (
        "nan_boxes",
        [a, [NAN, 0, 10, 10], [0, NAN, 10, 10], [0, 0, NAN, 10], [0, 0, 10, NAN], [1, 0, 10, 10]],
        None,
        0.5,
    )
    yield "inf_boxes", [[0, 0, INF, 10], [0, 0, 10, INF], [-INF, 0, 10, 10], [-INF, -INF, INF, INF], a], None, 0.3
    yield "huge", [[0, 0, 1e30, 1e30], [1, 1, 1e30, 9e29], [-3e38, 0, 3e38, 1], a], None, 0.5
    yield "tiny", [[0, 0, 1e-30, 1e-30], [0, 0, 1e-30, 1e-30], [0, 0, 1e-20, 1e-20]], None, 0.5


def samples(dtype, memory_format):
    def sample(id, boxes, scores, threshold, peer=True, **kwargs):
        boxes, scores = torch.as_tensor(boxes).to(dtype), torch.as_tensor(scores).to(dtype)
        if memory_format == torch.channels_last:  # for boxes: coordinates in columns
            boxes = boxes.transpose(-2, -1).contiguous().transpose(-2, -1)
        return Sample(id, (boxes, scores, threshold), kwargs, peer=peer and not kwargs)

    for count in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 300):
        yield sample(f"clustered_{count}", clustered(count, seed=count), random_scores(count), 0.5)
        yield sample(f"scattered_{count}", scattered(count, seed=count), random_scores(count), 0.5)
    for threshold in (0.0, 0.1, 0.3, 0.7, 0.99, 1.0, 1.5):
        yield sample(f"threshold_{threshold}", inputs.photo_boxes(200), random_scores(200), threshold)
    yield sample("clustered_1500", clustered(1500), random_scores(1500), 0.5)
    yield sample("ties", clustered(400), (random_scores(400) * 8).round(), 0.4)
    yield sample("grid", clustered(400).round(), random_scores(400), 0.5)
    yield sample("negative", clustered(200) - 700, random_scores(200) - 0.5, 0.5)
    for id, boxes, scores, threshold in hand_made():
        yield sample(id, boxes, scores or torch.linspace(0.9, 0.1, len(boxes)), threshold)
    for k in (0, 1, 5, 100):
        yield sample(f"max_output_{k}", clustered(60), random_scores(60), 0.5, max_output=k)
    boxes = torch.stack([clustered(50, seed=s) for s in range(3)])
    scores = torch.stack([random_scores(50, seed=s) for s in range(3)])
    yield sample("batch", boxes, scores, 0.5, max_output=7)
    yield sample("batch_of_none", boxes[:0], scores[:0], 0.5, max_output=7)
    yield sample("batch_no_boxes", boxes[:, :0], scores[:, :0], 0.5, max_output=7)
    strided = torch.cat([clustered(90).to(dtype), random_scores(90).to(dtype)[:, None]], dim=1)
    yield Sample("columns_of_one", (strided[::2, :4], strided[::2, 4], 0.5))
    yield Sample("expanded", (strided[:1, :4].expand(6, -1), strided[:1, 4].expand(6), 0.5))
    yield Sample("mixed_dtypes", (strided[:, :4], strided[:, 4].double(), 0.5), peer=False)


def errors():
    boxes, scores = torch.rand(4, 4), torch.rand(4)
    good = {"boxes": boxes, "scores": scores, "iou_threshold": 0.5}
    for id, change, error, match in (
        ("boxes_shape", {"boxes": torch.rand(4, 5)}, ValueError, r"boxes must have shape \[N, 4\].*got \[4, 5\]"),
        ("boxes_rank", {"boxes": torch.rand(4)}, ValueError, r"boxes must have shape \[N, 4\].*got \[4\]"),
        ("batch", {"boxes": boxes[None], "scores": scores[None]}, ValueError, r"\[B, N, 4\] needs max_output"),
        ("boxes_integer", {"boxes": boxes.int()}, TypeError, "boxes must be float32.*got torch.int32"),
        ("boxes_type", {"boxes": [[1.0]]}, TypeError, "boxes must be a torch.Tensor, got list"),
        ("boxes_sparse", {"boxes": boxes.to_sparse()}, NotImplementedError, "SparseCPU"),
        ("scores_shape", {"scores": scores[:3]}, ValueError, r"scores must have shape \[4\], got \[3\]"),
        ("scores_rank", {"scores": scores[:, None]}, ValueError, r"scores must have shape \[4\], got \[4, 1\]"),
        ("scores_integer", {"scores": scores.long()}, TypeError, "scores must be float32.*got torch.int64"),
        ("device", {"scores": scores.to("meta")}, ValueError, "must be on one device, got cpu and meta"),
        ("threshold", {"iou_threshold": NAN}, ValueError, "iou_threshold must not be NaN"),
        ("max_output", {"max_output": -1}, ValueError, "max_output must not be negative, got -1"),
    ):
        yield ErrorSample(id, (), {**good, **change}, error=error, match=match)


def floors(count: int, kept: int | None = None) -> dict[str, float]:
    """Bytes: boxes and scores once. Operations: a sort, and one overlap (14) for each box."""
    return {"floor_bytes": 20.0 * count, "floor_flops": count * (14 + math.log2(max(count, 2)))}


def bench():
    for spread, make_boxes in (("dense", clustered), ("sparse", scattered)):
        for count in (10, 100, 300, 1000, 5000, 20_000, 100_000):
            for threshold in (0.3, 0.5, 0.7) if count in (1000, 5000) else (0.5,):

                def make(count=count, make_boxes=make_boxes, threshold=threshold):
                    return (make_boxes(count), random_scores(count), threshold), {}

                yield BenchCase(
                    f"{count} boxes, {spread}, threshold {threshold}",
                    f"{spread}, threshold {threshold}",
                    make,
                    size=count,
                    quick=threshold == 0.5 and count in (10, 1000, 20_000),
                    **floors(count),
                )


def export(tensors):
    """The number of boxes."""
    return tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors), [x[:40] for x in tensors]


def huge(call, sparse, memory_format):
    """Boxes far apart in memory."""
    near = clustered(9)
    stride = 2**31 // 7
    boxes = sparse(9 * stride).as_strided((9, 4), (stride, 1))
    boxes.copy_(near)
    return call(boxes), call(near.to(boxes.dtype))


SPEC = OpSpec(
    name="nms",
    op=pyzoo.ops.nms,
    reference=pyzoo.ops.nms_reference,
    samples=samples,
    errors=errors,
    bench=bench,
    peer=peer,
    peer_name="torchvision",
    exact=True,
    layouts=("rows", "strided"),
    tensors=2,
    typical="clustered_100",
    static={"max_output": 9},
    export=export,
    huge=functools.partial(huge, lambda boxes: pyzoo.ops.nms(boxes, random_scores(9), 0.5)),
)
