"""Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks. S. Ren, K. He, R. Girshick, J. Sun.
NIPS 2015, arXiv 1506.01497; the head is Fast R-CNN's, R. Girshick, ICCV 2015, arXiv 1504.08083.

A small network slides over the map of a backbone and says, for boxes of fixed sizes at every place (anchors), whether
there is an object and how to move the box onto it: the region proposal network (RPN). The best of these boxes are
pooled from the same map, classified and moved once more.

Two assemblies: ``fasterrcnn_resnet50_fpn`` on a feature pyramid, equal to torchvision's; and the paper's own on VGG-16,
``fasterrcnn_vgg16``, whose settings, where they differ, are PAPER_RPN and PAPER_HEADS below.

Departures from the paper: joint training, not in four alternating steps. Boxes are exclusive everywhere (x2 - x1 is the
width): what the paper's code counts as (x1, y1, x2, y2), both ends in the box, is here (x1, y1, x2 + 1, y2 + 1). An
object that overlaps no anchor has no best anchor. A box that is decoded loses that code's extra pixel on the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models import vgg
from pyzoo.models._registry import register_model
from pyzoo.models.fpn import ResNetFPN
from pyzoo.nn.boxes import BELOW, BoxCoder, box_iou, clip_boxes, is_large, match, sample
from pyzoo.nn.conv import conv_bn
from pyzoo.nn.detection import InputTransform, check_images, check_targets, rename_keys, resize_boxes
from pyzoo.ops import batched_nms, multiscale_roi_align, roi_pool

PAPER_INPUT = {
    "min_size": 600,
    "max_size": 1000,
    "mean": (122.7717 / 255, 115.9465 / 255, 102.9801 / 255),
    "std": (1 / 255, 1 / 255, 1 / 255),
    "bgr": True,
    "divisor": 1,
}
PAPER_RPN = {
    "softmax": True,
    "cross_border": False,
    "before_nms": (12000, 6000),
    "after_nms": (2000, 300),
    "min_size": 16,
    "small_first": True,
}
PAPER_HEADS = {"samples": 128, "beta": 1, "nms_threshold": 0.3}

# -------------------------------------------------------------------------------------------------------------- anchors

RATIOS = (0.5, 1, 2)  # height / width


def anchor_cells(sizes: Sequence[float], ratios: Sequence[float] = RATIOS) -> list[list[int]]:
    """Boxes of area size² around (0, 0), for each ratio all sizes; torchvision's, with rounded corners."""
    half = [(s / math.sqrt(r) / 2, s * math.sqrt(r) / 2) for r in ratios for s in sizes]
    return [[-round(w), -round(h), round(w), round(h)] for w, h in half]


def paper_cells(scales: Sequence[float] = (8, 16, 32), ratios: Sequence[float] = RATIOS) -> list[list[float]]:
    """The paper's 9 boxes, around the centre of the first cell of 16 x 16; 12 with scale 4, as for COCO."""
    widths = [round(math.sqrt(16 * 16 / ratio)) for ratio in ratios]
    sizes = [(w * s, round(w * r) * s) for w, r in zip(widths, ratios, strict=True) for s in scales]
    return [[8 - w / 2, 8 - h / 2, 8 + w / 2, 8 + h / 2] for w, h in sizes]


def make_anchors(
    cells: Sequence[Sequence[Sequence[float]]], maps: Sequence[Tensor], size: Sequence[int], stride: int | None = None
) -> list[Tensor]:
    """Anchors of each map, [H * W * A, 4], row by row; ``cells`` are those of the first place. The stride of a map is
    what goes into the ``size`` (height, width) of the padded images."""
    anchors = []
    for x, cell in zip(maps, cells, strict=True):
        height, width = x.shape[2:]
        step_y, step_x = (stride, stride) if stride else (size[0] // height, size[1] // width)
        y = torch.arange(height, device=x.device, dtype=torch.float32)[:, None] * step_y
        x = torch.arange(width, device=x.device, dtype=torch.float32) * step_x
        corner = torch.stack(torch.broadcast_tensors(x, y, x, y), -1)[:, :, None]  # [H, W, 1, 4]
        anchors.append((corner + corner.new_tensor(cell)).view(-1, 4))
    return anchors


# ------------------------------------------------------------------------------------------------------------------ RPN


class RPNHead(nn.Module):
    """Maps -> objectness [N, H * W * A] and offsets [N, H * W * A, 4] of the anchors, as lists. Figure 3, left.

    Args:
        channels: of the maps.
        anchors: A.
        softmax: objectness is the difference of two outputs, object and background, as in the paper.
    """

    def __init__(self, channels: int, anchors: int, softmax: bool = False):
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)))
        self.cls_logits = nn.Conv2d(channels, anchors * (2 if softmax else 1), 1)
        self.bbox_pred = nn.Conv2d(channels, anchors * 4, 1)
        self.softmax = softmax
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # One convolution for both outputs: the map is read once.
        weight = torch.cat((self.cls_logits.weight, self.bbox_pred.weight))
        bias = torch.cat((self.cls_logits.bias, self.bbox_pred.bias))
        objectness, offsets = [], []
        for x in maps:
            out = F.conv2d(conv_bn(x, self.conv[0][0], activation="relu"), weight, bias)
            out = out.permute(0, 2, 3, 1)  # [N, H, W, A + 4 A]
            cls, box = out.split((len(self.cls_logits.bias), len(self.bbox_pred.bias)), -1)
            if self.softmax:
                background, object_ = cls.chunk(2, -1)
                cls = object_ - background
            objectness.append(cls.flatten(1))
            offsets.append(box.reshape(len(box), -1, 4))
        return objectness, offsets

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        rename_keys(state_dict, prefix, {"conv.": "conv.0.0."})  # torchvision's older files
        super()._load_from_state_dict(state_dict, prefix, *args)


def assign(candidates: Tensor, boxes: Tensor, *thresholds, **options) -> Tensor:
    """:func:`pyzoo.nn.boxes.match` of candidates [n, 4] to boxes [m, 4], of either of which there may be none."""
    if not len(boxes) or not len(candidates):
        return torch.full((len(candidates),), BELOW, device=boxes.device)
    return match(box_iou(boxes, candidates), *thresholds, **options)


class RPN(nn.Module):
    """Maps -> boxes [n, 4] of each image that may be objects, the likeliest first; in training also losses.

    Args:
        channels: of the maps.
        cells: anchors at the first place of each map.
        stride: of the maps; None for what goes into the image.
        softmax: see :class:`RPNHead`.
        thresholds: an anchor is positive from this overlap, negative below that.
        samples, positive_fraction: how many anchors of an image the losses look at; at most so many positives.
        cross_border: whether the losses look at anchors that cross the border of the image.
        beta: where the smooth L1 loss turns linear.
        before_nms: of each map only so many best boxes are looked at, in training and in evaluation.
        nms_threshold: boxes that overlap a better one more are dropped.
        after_nms: the best of those left, in training and in evaluation.
        min_size: smaller boxes are dropped.
        small_first: they are before the best are chosen, and their sizes are meant in the image as it came.
    """

    def __init__(
        self,
        channels: int,
        cells: Sequence[Sequence[Sequence[float]]],
        *,
        stride: int | None = None,
        softmax: bool = False,
        thresholds: tuple[float, float] = (0.7, 0.3),
        samples: int = 256,
        positive_fraction: float = 0.5,
        cross_border: bool = True,
        beta: float = 1 / 9,
        before_nms: tuple[int, int] = (2000, 1000),
        nms_threshold: float = 0.7,
        after_nms: tuple[int, int] = (2000, 1000),
        min_size: float = 1e-3,
        small_first: bool = False,
    ):
        super().__init__()
        self.head = RPNHead(channels, len(cells[0]), softmax)
        self.coder = BoxCoder()
        self.cells, self.stride, self.cross_border = cells, stride, cross_border
        self.thresholds, self.samples, self.positive_fraction, self.beta = thresholds, samples, positive_fraction, beta
        self.before_nms, self.nms_threshold, self.after_nms = before_nms, nms_threshold, after_nms
        self.min_size, self.small_first = min_size, small_first

    def forward(self, maps: Sequence[Tensor], batch, targets=None) -> tuple[list[Tensor], dict[str, Tensor]]:
        objectness, offsets = self.head(maps)
        anchors = make_anchors(self.cells, maps, batch.images.shape[2:], self.stride)
        with torch.no_grad():
            proposals = self.propose(objectness, offsets, anchors, batch)
        if targets is None:
            return proposals, {}
        losses = self.losses(torch.cat(objectness, 1), torch.cat(offsets, 1), torch.cat(anchors), batch, targets)
        return proposals, losses

    def propose(self, objectness, offsets, anchors, batch) -> list[Tensor]:
        before, after = (limit[0 if self.training else 1] for limit in (self.before_nms, self.after_nms))
        scores, boxes = [], []
        for score, offset, anchor in zip(objectness, offsets, anchors, strict=True):
            if not self.small_first:  # decode only the best
                score, best = score.topk(min(before, score.shape[1]), 1)
                offset, anchor = offset.gather(1, best[..., None].expand(-1, -1, 4)), anchor[best]
            scores.append(score.sigmoid())
            boxes.append(self.coder.decode(offset, anchor))
        level = torch.cat([torch.full(score.shape[1:], i, device=score.device) for i, score in enumerate(scores)])
        proposals = []
        for score, box, size, scale in zip(torch.cat(scores, 1), torch.cat(boxes, 1), *batch[1:], strict=True):
            box = clip_boxes(box, size)
            large = is_large(box, self.min_size * (scale if self.small_first else 1)).nonzero()[:, 0]
            if self.small_first:
                large = large[score[large].topk(min(before, len(large))).indices]
            box = box[large]
            kept = batched_nms(box, score[large], level[large], self.nms_threshold)
            proposals.append(box[kept[:after]])
        return proposals

    def losses(self, objectness, offsets, anchors, batch, targets) -> dict[str, Tensor]:
        """Equation 1, both terms over the number of anchors drawn."""
        logits, labels, moved, wanted = [], [], [], []
        for i, ((height, width), target) in enumerate(zip(batch.sizes, targets, strict=True)):
            label = torch.full((len(anchors),), -1, device=anchors.device)
            inside = slice(None)
            if not self.cross_border:
                inside = ((anchors[:, :2] >= 0) & (anchors[:, 2:] <= anchors.new_tensor((width, height)))).all(1)
            matched = torch.full_like(label, BELOW)
            matched[inside] = assign(anchors[inside], target["boxes"], *self.thresholds, keep_best=True)
            label[inside] = matched[inside].clamp(max=0) + 1  # 1 for an object, 0 for none, -1 in between
            positive, negative = sample(label, self.samples, self.positive_fraction)
            drawn = torch.cat((positive, negative))
            logits.append(objectness[i, drawn])
            labels.append(label[drawn])
            moved.append(offsets[i, positive])
            wanted.append(self.coder.encode(target["boxes"][matched[positive]], anchors[positive]))
        logits, labels = torch.cat(logits), torch.cat(labels)
        count = max(len(labels), 1)
        objectness = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
        box = F.smooth_l1_loss(torch.cat(moved), torch.cat(wanted), beta=self.beta, reduction="sum")
        return {
            "loss_objectness": objectness / count,
            "loss_rpn_box_reg": box / count,
        }


# ---------------------------------------------------------------------------------------------------------- Fast R-CNN


class TwoMLPHead(nn.Module):
    """Pooled boxes [K, C, 7, 7] -> [K, hidden]: two linear layers."""

    def __init__(self, in_features: int, hidden: int, dropout: float = 0):
        super().__init__()
        self.fc6 = nn.Linear(in_features, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.fc6(x.flatten(1)), inplace=True))
        return self.dropout(F.relu(self.fc7(x), inplace=True))


class FastRCNNPredictor(nn.Module):
    """[K, hidden] -> logits [K, num_classes], class 0 being background, and offsets [K, num_classes, 4]."""

    def __init__(self, hidden: int, num_classes: int):
        super().__init__()
        self.cls_score = nn.Linear(hidden, num_classes)
        self.bbox_pred = nn.Linear(hidden, num_classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x).unflatten(1, (-1, 4))


def align_levels(maps: Sequence[Tensor], boxes, size: int, *, strides: Sequence[int], canonical=(224, 4)) -> Tensor:
    """Boxes [n, 4] of each image, each from the level for its size (FPN, equation 1), 2 x 2 samples a bin."""
    maps = maps[: len(strides)]
    return multiscale_roi_align(maps, boxes, size, [1 / s for s in strides], 2, False, *canonical)


def pool_map(maps: Sequence[Tensor], boxes, size: int, *, stride: int) -> Tensor:
    """The paper's RoIPool, which counts both ends of a box as part of it."""
    return roi_pool(maps[0], [box - box.new_tensor((0, 0, 1, 1)) for box in boxes], size, 1 / stride)


class RoIs(NamedTuple):
    """Proposals of an image that were drawn for the losses, and which of its objects they stand for."""

    boxes: Tensor  # [n, 4]
    labels: Tensor  # [n], 0 is background
    objects: Tensor  # [positives]; the positives come first


class RoIHeads(nn.Module):
    """Maps and proposals -> losses in training, else detections: dicts of boxes, labels and scores.

    Args:
        pool: called with maps, boxes of each image and a size, gives [K, C, size, size].
        box_head: [K, C, 7, 7] -> [K, D].
        box_predictor: [K, D] -> logits [K, classes], offsets [K, classes, 4].
        iou: a proposal that overlaps an object as much stands for it.
        samples, positive_fraction: how many proposals of an image the losses look at; at most so many positives.
        beta: where the smooth L1 loss turns linear.
        score_threshold, nms_threshold, detections: what is reported: scores above the first, at most so many.
    """

    def __init__(
        self,
        pool: Callable[..., Tensor],
        box_head: nn.Module,
        box_predictor: nn.Module,
        *,
        iou: float = 0.5,
        samples: int = 512,
        positive_fraction: float = 0.25,
        beta: float = 1 / 9,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
    ):
        super().__init__()
        self.pool, self.box_head, self.box_predictor = pool, box_head, box_predictor
        self.coder = BoxCoder((10, 10, 5, 5))
        self.iou, self.samples, self.positive_fraction, self.beta = iou, samples, positive_fraction, beta
        self.score_threshold, self.nms_threshold, self.detections = score_threshold, nms_threshold, detections

    def predict(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.pool(maps, boxes, 7)))

    def draw(self, proposals: Tensor, target: Mapping[str, Tensor]) -> RoIs:
        """The objects themselves are among the proposals."""
        proposals = torch.cat((proposals, target["boxes"]))
        matched = assign(proposals, target["boxes"], self.iou, self.iou)
        positive, negative = sample(matched.clamp(max=0) + 1, self.samples, self.positive_fraction)
        objects = matched[positive]
        labels = torch.cat((target["labels"][objects], torch.zeros_like(negative)))
        return RoIs(proposals[torch.cat((positive, negative))], labels, objects)

    def losses(self, maps: Sequence[Tensor], rois: Sequence[RoIs], targets) -> dict[str, Tensor]:
        """Fast R-CNN, equation 1: only the offsets of the true class count, and those of background never."""
        logits, offsets = self.predict(maps, [roi.boxes for roi in rois])
        labels = torch.cat([roi.labels for roi in rois])
        positive = (labels > 0).nonzero()[:, 0]
        wanted = [
            self.coder.encode(target["boxes"][roi.objects], roi.boxes[: len(roi.objects)])
            for roi, target in zip(rois, targets, strict=True)
        ]
        moved = offsets[positive, labels[positive]]
        box = F.smooth_l1_loss(moved, torch.cat(wanted), beta=self.beta, reduction="sum")
        return {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": box / len(labels)}

    def detect(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], batch) -> list[dict[str, Tensor]]:
        logits, offsets = self.predict(maps, proposals)
        counts = [len(p) for p in proposals]
        found = []
        for score, offset, proposal, size in zip(
            logits.softmax(-1).split(counts), offsets.split(counts), proposals, batch.sizes, strict=True
        ):
            roi, label = (score[:, 1:] > self.score_threshold).nonzero().unbind(1)
            label = label + 1
            score = score[roi, label]
            box = clip_boxes(self.coder.decode(offset[roi, label], proposal[roi]), size)
            large = is_large(box, 1e-2)
            box, label, score = box[large], label[large], score[large]
            kept = batched_nms(box, score, label, self.nms_threshold)[: self.detections]
            found.append({"boxes": box[kept], "labels": label[kept], "scores": score[kept]})
        return found


# ---------------------------------------------------------------------------------------------------------------- model


class FasterRCNN(nn.Module):
    """Images (a list of [3, H, W], RGB in [0, 1]) -> losses in training, else for each image a dict of boxes [n, 4] in
    its pixels, labels [n] and scores [n]. Targets are dicts of boxes and labels.

    Args:
        backbone: [N, 3, H, W] -> list of maps.
        rpn: maps -> proposals.
        roi_heads: maps and proposals -> detections.
        num_classes: background included.
        input: arguments of :class:`pyzoo.nn.detection.InputTransform`.
    """

    needs_masks = False

    def __init__(self, backbone: nn.Module, rpn: RPN, roi_heads: RoIHeads, num_classes: int, **input: Any):
        super().__init__()
        self.transform = InputTransform(**input)
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads
        self.num_classes = num_classes

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None):
        name = type(self).__name__
        check_images(name, images)
        if self.training:
            check_targets(name, images, targets, self.num_classes, self.needs_masks)
        batch = self.transform.batch(images, self.training)
        maps = self.backbone(batch.images)
        if self.training:
            sizes = zip(images, batch.sizes, targets, strict=True)
            targets = [self.resize_target(target, image.shape[1:], size) for image, size, target in sizes]
            proposals, losses = self.rpn(maps, batch, targets)
            rois = [self.roi_heads.draw(*each) for each in zip(proposals, targets, strict=True)]
            return {**self.roi_heads.losses(maps, rois, targets), **losses}
        found = self.roi_heads.detect(maps, self.rpn(maps, batch)[0], batch)
        return [self.restore(*each) for each in zip(found, images, batch.sizes, strict=True)]

    @torch.no_grad()
    def propose(self, images: Sequence[Tensor]) -> list[Tensor]:
        """What the RPN alone finds: boxes [n, 4] of each image in its pixels, the likeliest first."""
        check_images(type(self).__name__, images)
        batch = self.transform.batch(images, self.training)
        found = self.rpn(self.backbone(batch.images), batch)[0]
        return [resize_boxes(b, size, i.shape[1:]) for b, size, i in zip(found, batch.sizes, images, strict=True)]

    def resize_target(self, target, old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        boxes = target["boxes"].to(torch.promote_types(target["boxes"].dtype, torch.float32))
        return {"labels": target["labels"], "boxes": resize_boxes(boxes, old, new)}

    def restore(self, found: dict[str, Tensor], image: Tensor, size: Sequence[int]) -> dict[str, Tensor]:
        """A detection in the image as it came, which had ``size`` when it was made."""
        return {**found, "boxes": resize_boxes(found["boxes"], size, image.shape[1:])}


def fpn_parts(
    depth: int = 50,
    *,
    channels: int = 256,
    anchor_sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
    canonical: tuple[float, float] = (224, 4),
    hidden: int = 1024,
    num_classes: int = 91,
    rpn: Mapping[str, Any] = {},
    **backbone: Any,
) -> tuple[nn.Module, RPN, Callable[..., Tensor], nn.Module, nn.Module]:
    """What Faster and Mask R-CNN on a feature pyramid share: backbone, RPN, pooling, box head and predictor."""
    backbone = ResNetFPN(depth, channels, **backbone)
    proposer = RPN(channels, [anchor_cells(sizes) for sizes in anchor_sizes], **rpn)
    pool = partial(align_levels, strides=backbone.strides, canonical=canonical)
    return backbone, proposer, pool, TwoMLPHead(channels * 49, hidden), FastRCNNPredictor(hidden, num_classes)


def fasterrcnn_fpn(
    depth: int = 50,
    num_classes: int = 91,
    *,
    heads: Mapping[str, Any] = {},
    input: Mapping[str, Any] = {},
    **parts: Any,
) -> FasterRCNN:
    """On a ResNet's feature pyramid.

    Args:
        depth: of the ResNet.
        num_classes: background included.
        heads, input: arguments of :class:`RoIHeads` and :class:`pyzoo.nn.detection.InputTransform`.
        parts: arguments of :func:`fpn_parts` and :class:`pyzoo.models.fpn.ResNetFPN`; ``rpn`` are those of
            :class:`RPN`.
    """
    backbone, rpn, *rest = fpn_parts(depth, num_classes=num_classes, **parts)
    return FasterRCNN(backbone, rpn, RoIHeads(*rest, **heads), num_classes, **input)


class VGG16Map(nn.Module):
    """[N, 3, H, W] -> [relu5_3], [N, 512, H / 16, W / 16]; the first ``frozen_blocks`` do not learn."""

    def __init__(self, width: int, frozen_blocks: int):
        super().__init__()
        self.body = vgg.make_features("D", width=width)[:-1]  # all but pool5
        for layer in self.body:
            if isinstance(layer, nn.Conv2d):
                vgg.INITS["he"](layer)
                nn.init.zeros_(layer.bias)
        self.out_channels = 8 * width
        pools = [i for i, layer in enumerate(self.body) if isinstance(layer, nn.MaxPool2d)]
        self.body[: pools[frozen_blocks - 1] if frozen_blocks else 0].requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [vgg.run(self.body, x)]


def fasterrcnn_vgg16(
    num_classes: int = 21,
    *,
    width: int = 64,
    hidden: int = 4096,
    dropout: float = 0.5,
    scales: Sequence[float] = (8, 16, 32),
    frozen_blocks: int = 0,
    rpn: Mapping[str, Any] = {},
    heads: Mapping[str, Any] = {},
    input: Mapping[str, Any] = {},
) -> FasterRCNN:
    """The paper's own, on conv5_3 of VGG-16.

    Args:
        num_classes: background included.
        width: channels of VGG's first block.
        hidden, dropout: of the two linear layers.
        scales: of the anchors, in 16 pixels; (4, 8, 16, 32) for COCO.
        frozen_blocks: of VGG, that do not learn; 2 in the paper, which starts from trained weights.
        rpn, heads, input: arguments of :class:`RPN`, :class:`RoIHeads` and :class:`pyzoo.nn.detection.InputTransform`,
            in place of the paper's.
    """
    backbone = VGG16Map(width, frozen_blocks)
    channels = backbone.out_channels
    proposer = RPN(channels, [paper_cells(scales)], stride=16, **{**PAPER_RPN, **rpn})
    predictor = FastRCNNPredictor(hidden, num_classes)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    head = TwoMLPHead(channels * 49, hidden, dropout)
    heads = RoIHeads(partial(pool_map, stride=16), head, predictor, **{**PAPER_HEADS, **heads})
    return FasterRCNN(backbone, proposer, heads, num_classes, **{**PAPER_INPUT, **input})


CAFFE_NAMES = {
    "rpn_conv/3x3": "rpn.head.conv.0.0",
    "rpn_cls_score": "rpn.head.cls_logits",
    "rpn_bbox_pred": "rpn.head.bbox_pred",
    "fc6": "roi_heads.box_head.fc6",
    "fc7": "roi_heads.box_head.fc7",
    "cls_score": "roi_heads.box_predictor.cls_score",
    "bbox_pred": "roi_heads.box_predictor.bbox_pred",
}


def from_caffe_names(state: Mapping[str, Tensor], model: FasterRCNN) -> dict[str, Tensor]:
    """Weights of the authors' Caffe files, ``conv1_1.weight`` .. ``bbox_pred.bias``, for :func:`fasterrcnn_vgg16`.
    Those files have the scales of the box targets multiplied into ``bbox_pred``; here the coder has them."""
    names = {name: f"backbone.body.{i}" for name, i in vgg.layer_index(model.backbone.body).items()} | CAFFE_NAMES
    out = {}
    for key, value in state.items():
        layer, _, what = key.rpartition(".")
        if layer == "bbox_pred":
            scale = value.new_tensor(model.roi_heads.coder.weights).repeat(len(value) // 4)
            value = value * scale.view(-1, *[1] * (value.dim() - 1))
        out[f"{names.get(layer, layer)}.{what}"] = value
    return out


# ------------------------------------------------------------------------------------------------------------- registry

ABOUT = {
    "paper": "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks, Ren et al., "
    "arXiv 1506.01497",
    "task": "detection",
    "input": "a list of [3, H, W] float, RGB in [0, 1], of any sizes; the model resizes and normalises",
}
TINY_FPN = {
    "depth": 18,
    "width": 4,
    "channels": 8,
    "hidden": 16,
    "num_classes": 5,
    "heads": {"detections": 10},  # random weights: scores are nearly equal, and further down change places
    "input": {"min_size": 64, "max_size": 128},
}
TINY_VGG = {"width": 4, "hidden": 16, "scales": (1, 2, 4), "num_classes": 5, "input": {"min_size": 64, "max_size": 128}}

# depth of the ResNet: parameters
FPN_NETS = {50: 41_755_286, 101: 60_695_190}

for _depth, _parameters in FPN_NETS.items():
    _build = partial(fasterrcnn_fpn, depth=_depth)
    _about = {"parameters": _parameters, "tiny": TINY_FPN, "size": (64, 96), **ABOUT}
    register_model(f"fasterrcnn_resnet{_depth}_fpn", _build, **_about)

register_model("fasterrcnn_vgg16", fasterrcnn_vgg16, parameters=137_078_239, tiny=TINY_VGG, size=(64, 96), **ABOUT)
