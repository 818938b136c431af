"""Average precision and recall of detections as COCO defines them, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from pyzoo._extras import need

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NAMES += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def coco_map(
    predictions: Iterable[Mapping[str, Tensor]], targets: Iterable[Mapping[str, Tensor]], kind: str = "bbox"
) -> dict[str, float]:
    """COCO's twelve figures of detections, image by image in the order given.

    Args:
        predictions: a dict an image: ``boxes`` [n, 4] (x1, y1, x2, y2), ``scores`` [n], ``labels`` [n]; for
            ``kind="segm"`` also ``masks`` [n, 1, H, W] or [n, H, W], set where they are above 0.5.
        targets: a dict an image: ``boxes``, ``labels``, for ``kind="segm"`` ``masks`` [n, H, W]; ``iscrowd`` and
            ``area`` where known (else nothing is a crowd, and the area is the mask's, or without masks the box's).
        kind: what must overlap: "bbox" or "segm".

    Returns:
        AP, AP50, AP75, AP_small, AP_medium, AP_large, AR1, AR10, AR100, AR_small, AR_medium, AR_large. A class that
        the targets do not have is left out; a figure for which they have nothing is -1. Small is an area below 32²,
        large one above 96² pixels.
    """
    if kind not in ("bbox", "segm"):
        raise ValueError(f"coco_map: kind must be 'bbox' or 'segm', got {kind!r}")
    coco, cocoeval = need("pycocotools.coco", "coco_map"), need("pycocotools.cocoeval", "coco_map")
    predictions, targets = list(predictions), list(targets)
    if len(predictions) != len(targets):
        raise ValueError(f"coco_map: there are {len(predictions)} predictions and {len(targets)} targets")
    truth = [_annotations(target, kind, i, "targets") for i, target in enumerate(targets)]
    found = [_annotations(prediction, kind, i, "predictions") for i, prediction in enumerate(predictions)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = cocoeval.COCOeval(_coco(coco, truth), _coco(coco, found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, evaluation.stats.tolist(), strict=True))


def _coco(module, annotations: list[list[dict]]):
    """pycocotools' index of the annotations of each image."""
    index = module.COCO()
    flat = [annotation for image in annotations for annotation in image]
    index.dataset = {
        # The size of an image is looked up, and then not used.
        "images": [{"id": i, "height": 0, "width": 0} for i in range(len(annotations))],
        "categories": [{"id": label} for label in sorted({annotation["category_id"] for annotation in flat})],
        "annotations": [{**annotation, "id": i} for i, annotation in enumerate(flat, 1)],  # id 0 would be no match
    }
    index.createIndex()
    return index


def _annotations(objects: Mapping[str, Tensor], kind: str, image: int, argument: str) -> list[dict]:
    """The objects of one image, in COCO's terms."""
    needed = ["boxes", "labels"] + ["scores"] * (argument == "predictions") + ["masks"] * (kind == "segm")
    if missing := [key for key in needed if key not in objects]:
        raise ValueError(f"coco_map: {argument}[{image}] must have {', '.join(needed)}; it lacks {', '.join(missing)}")
    n = len(objects["boxes"])
    if wrong := [key for key in needed if len(objects[key]) != n]:
        lengths = ", ".join(f"{len(objects[key])} {key}" for key in wrong)
        raise ValueError(f"coco_map: {argument}[{image}] has {n} boxes, but {lengths}")
    boxes = objects["boxes"].detach().double().cpu().reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)  # x, y, width, height
    columns = {
        "image_id": [image] * n,
        "category_id": objects["labels"].tolist(),
        "bbox": boxes.tolist(),
        "area": boxes[:, 2:].prod(1).tolist(),
        "iscrowd": [0] * n,
    }
    if "masks" in objects and (kind == "segm" or argument == "targets"):
        masks = objects["masks"].detach()
        masks = (masks > 0.5).reshape(n, *masks.shape[-2:]).cpu().numpy().astype(np.uint8)
        columns["area"] = masks.sum((1, 2), dtype=np.int64).tolist()
        if kind == "segm":
            encode = need("pycocotools.mask", "coco_map").encode
            columns["segmentation"] = encode(np.asfortranarray(masks.transpose(1, 2, 0)))
    if argument == "predictions":
        columns["score"] = objects["scores"].tolist()
    else:
        columns.update({key: objects[key].tolist() for key in ("area", "iscrowd") if key in objects})
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
