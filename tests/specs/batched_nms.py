"""Non-maximum suppression by class: samples, errors and benchmark cases."""

from __future__ import annotations

import functools

import torch

import pyzoo.ops
from tests.specs import inputs
from tests.specs import nms as single
from tests.specs.inputs import INF, NAN
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample


def peer(boxes, scores, idxs, iou_threshold):
    from torchvision.ops import batched_nms

    return batched_nms(boxes, scores, idxs, iou_threshold)


def classes(count: int, number: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(number, (count,), generator=inputs.generator(seed + 2))


def samples(dtype, memory_format):
    def sample(id, boxes, scores, idxs, threshold=0.5, peer=True, **kwargs):
        boxes, scores = torch.as_tensor(boxes).to(dtype), torch.as_tensor(scores).to(dtype)
        if memory_format == torch.channels_last:  # for boxes: coordinates in columns
            boxes = boxes.transpose(-2, -1).contiguous().transpose(-2, -1)
        return Sample(id, (boxes, scores, torch.as_tensor(idxs), threshold), kwargs, peer=peer and not kwargs)

    for count in (0, 1, 2, 9, 33, 100, 999, 1000, 1001, 1500):  # torchvision changes its algorithm after 1000
        for number in (1, 7, 80):
            boxes, scores = single.clustered(count, seed=count), single.random_scores(count)
            yield sample(f"{count}_boxes_{number}_classes", boxes, scores, classes(count, number))
    boxes, scores, idxs = single.clustered(300), single.random_scores(300), classes(300, 5)
    for threshold in (0.0, 0.3, 0.7, 1.0):
        yield sample(f"threshold_{threshold}", boxes, scores, idxs, threshold)
    yield sample("ties", boxes, (scores * 8).round(), idxs)
    # Beyond 1000 boxes the peer sorts what it kept by an unstable sort.
    tied = (single.random_scores(1500) * 8).round()
    yield sample("ties_1500", single.clustered(1500), tied, classes(1500, 3), peer=False)
    # Classes moved far away lose their low bits, and with them overlaps near the threshold.
    yield sample("large_classes", boxes, scores, idxs * 1_000_003)
    yield sample("large_classes_1500", single.clustered(1500), single.random_scores(1500), classes(1500, 3) * 1_000_003)
    yield sample("negative_classes", boxes, scores, idxs - 3)
    yield sample("negative_boxes", boxes - 2000, scores, idxs)
    for idxs_dtype in (torch.int32, torch.uint8, torch.float32, torch.bool):
        yield sample(f"idxs_{idxs_dtype}".replace("torch.", ""), boxes, scores, idxs.to(idxs_dtype))
    for id, boxes_, scores_, threshold in single.hand_made():
        scores_ = scores_ or torch.linspace(0.9, 0.1, len(boxes_))
        yield sample(f"{id}_one_class", boxes_, scores_, [3] * len(boxes_), threshold)
        yield sample(f"{id}_two_classes", boxes_, scores_, [i % 2 for i in range(len(boxes_))], threshold)
    far = torch.cat([single.clustered(1200), torch.tensor([[0, 0, INF, 9], [NAN, 0, 5, 5], [0, 0, 1e30, 9]])])
    yield sample("not_finite_1500", far, single.random_scores(1203), classes(1203, 4))
    for k in (0, 5, 400):
        yield sample(f"max_output_{k}", boxes, scores, idxs, max_output=k)
    batch = torch.stack([single.clustered(50, seed=s) for s in range(3)])
    batch_scores = torch.stack([single.random_scores(50, seed=s) for s in range(3)])
    yield sample("batch", batch, batch_scores, classes(150, 4).reshape(3, 50), max_output=9)
    yield sample("batch_of_none", batch[:0], batch_scores[:0], classes(0, 4).reshape(0, 50), max_output=9)


def errors():
    boxes, scores, idxs = torch.rand(4, 4), torch.rand(4), torch.arange(4)
    good = {"boxes": boxes, "scores": scores, "idxs": idxs, "iou_threshold": 0.5}
    for id, change, error, match in (
        ("boxes_shape", {"boxes": torch.rand(4, 5)}, ValueError, r"boxes must have shape \[N, 4\].*got \[4, 5\]"),
        ("boxes_integer", {"boxes": boxes.int()}, TypeError, "boxes must be float32.*got torch.int32"),
        ("scores_shape", {"scores": scores[:3]}, ValueError, r"scores must have shape \[4\], got \[3\]"),
        ("idxs_shape", {"idxs": idxs[:3]}, ValueError, r"idxs must have shape \[4\], got \[3\]"),
        ("idxs_type", {"idxs": [0, 1, 2, 3]}, TypeError, "idxs must be a torch.Tensor, got list"),
        ("idxs_fraction", {"idxs": idxs + 0.5}, ValueError, "idxs must be whole numbers"),
        ("idxs_nan", {"idxs": idxs * NAN}, ValueError, "idxs must be whole numbers"),
        ("idxs_complex", {"idxs": idxs.cfloat()}, TypeError, "idxs must be integers, got torch.complex64"),
        ("device", {"idxs": idxs.to("meta")}, ValueError, "must be on one device, got cpu and meta"),
        ("threshold", {"iou_threshold": NAN}, ValueError, "iou_threshold must not be NaN"),
        ("max_output", {"max_output": -1}, ValueError, "max_output must not be negative, got -1"),
    ):
        yield ErrorSample(id, (), {**good, **change}, error=error, match=match)


def bench():
    for spread, make_boxes in (("dense", single.clustered), ("sparse", single.scattered)):
        for count in (300, 1000, 5000, 20_000, 100_000):

            def make(count=count, make_boxes=make_boxes):
                return (make_boxes(count), single.random_scores(count), classes(count, 80), 0.5), {}

            floors = single.floors(count)
            yield BenchCase(
                f"{count} boxes of 80 classes, {spread}, threshold 0.5",
                f"80 classes, {spread}",
                make,
                size=count,
                quick=count in (1000, 20_000),
                floor_bytes=floors["floor_bytes"] + 8.0 * count,
                floor_flops=floors["floor_flops"],
            )


SPEC = OpSpec(
    name="batched_nms",
    op=pyzoo.ops.batched_nms,
    reference=pyzoo.ops.batched_nms_reference,
    samples=samples,
    errors=errors,
    bench=bench,
    peer=peer,
    peer_name="torchvision",
    exact=True,
    layouts=("rows", "strided"),
    tensors=3,
    typical="100_boxes_7_classes",
    static={"max_output": 9},
    export=single.export,
    huge=functools.partial(
        single.huge, lambda boxes: pyzoo.ops.batched_nms(boxes, single.random_scores(9), classes(9, 2), 0.5)
    ),
)
