"""SSD: Single Shot MultiBox Detector. W. Liu, D. Anguelov, D. Erhan, C. Szegedy, S. Reed, C.-Y. Fu, A. Berg. ECCV 2016,
arXiv 1512.02325.

One network and no proposals: at each cell of several maps, fine ones for small objects and coarse ones for large, a few
default boxes of fixed sizes and shapes; a 3x3 convolution scores every one of them for each class and moves it.

Parameter names are those of torchvision's ``ssd300_vgg16``. Its "highres" extractor has not the maps of the paper's
SSD512; this follows the paper.

Departures from the authors' code, as in torchvision, each with an option for the original:
    default boxes have the sizes of their COCO model; ``boxes="voc"`` are those for VOC.
    no side of a default box is longer than the image; ``clamp_sizes=False``.
    sizes are not cut to whole pixels; ``whole_sizes=True``.
    each object takes its best box after the others are matched, a later object before an earlier one;
    ``matching="bipartite"`` takes the best pairs first, one box for one object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models import vgg
from pyzoo.models._registry import register_model
from pyzoo.nn.boxes import BoxCoder, box_iou, clip_boxes, match
from pyzoo.nn.conv import conv_bn
from pyzoo.nn.detection import check_images, check_targets
from pyzoo.ops import batched_nms

# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Layout:
    """The maps of an SSD and their default boxes.

    Attributes:
        size: height and width of the image that the network sees.
        maps: cells along each side of each map.
        extras: what gives each map from the third on: channels of a 1x1 convolution, channels, kernel size, stride and
            padding of the next; channels are in multiples of VGG's first block.
        steps: pixels from cell to cell of each map.
        ratios: aspect ratios of each map, besides 1.
        sizes: for "coco" and "voc", the size in pixels of each map's boxes, and one more.
    """

    size: int
    maps: tuple[int, ...]
    extras: tuple[tuple[int, int, int, int, int], ...]
    steps: tuple[int, ...]
    ratios: tuple[tuple[int, ...], ...]
    sizes: dict[str, tuple[float, ...]] = field(hash=False)


SSD300 = Layout(
    size=300,
    maps=(38, 19, 10, 5, 3, 1),
    extras=(
        (4, 8, 3, 2, 1),  # conv8
        (2, 4, 3, 2, 1),  # conv9
        (2, 4, 3, 1, 0),  # conv10
        (2, 4, 3, 1, 0),  # conv11
    ),
    steps=(8, 16, 32, 64, 100, 300),
    ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    sizes={"coco": (21, 45, 99, 153, 207, 261, 315), "voc": (30, 60, 111, 162, 213, 264, 315)},
)
SSD512 = Layout(
    size=512,
    maps=(64, 32, 16, 8, 4, 2, 1),
    extras=(
        (4, 8, 3, 2, 1),  # conv8
        (2, 4, 3, 2, 1),  # conv9
        (2, 4, 3, 2, 1),  # conv10
        (2, 4, 3, 2, 1),  # conv11
        (2, 4, 4, 1, 1),  # conv12
    ),
    steps=(8, 16, 32, 64, 128, 256, 512),
    ratios=((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    sizes={
        "coco": (20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72),
        "voc": (35.84, 76.8, 153.6, 230.4, 307.2, 384, 460.8, 537.6),
    },
)

# -------------------------------------------------------------------------------------------------------- default boxes


def box_shapes(layout: Layout, boxes: str, whole_sizes: bool = False) -> list[list[tuple[float, float]]]:
    """Widths and heights of the default boxes at each cell, in fractions of the image, a list for each map."""
    sizes = [(int(size) if whole_sizes else size) / layout.size for size in layout.sizes[boxes]]
    shapes = []
    for size, following, ratios in zip(sizes[:-1], sizes[1:], layout.ratios, strict=True):
        mean = math.sqrt(size * following)
        shape = [(size, size), (mean, mean)]
        for root in map(math.sqrt, ratios):
            shape += [(size * root, size / root), (size / root, size * root)]
        shapes.append(shape)
    return shapes


@lru_cache(maxsize=16)
def default_boxes(layout: Layout, boxes: str = "coco", clamp_sizes: bool = True, whole_sizes: bool = False) -> Tensor:
    """All default boxes of a layout in pixels: map after map, row after row, cell after cell. [A, 4]

    Args:
        layout: :data:`SSD300` or :data:`SSD512`.
        boxes: "coco" or "voc".
        clamp_sizes: no side is longer than the image.
        whole_sizes: sizes are cut to whole pixels.
    """
    out = []
    shapes = box_shapes(layout, boxes, whole_sizes)
    # In fractions of the image and in this order, for the same rounding as in torchvision.
    with torch.inference_mode(False), torch.device("cpu"):
        for cells, step, shape in zip(layout.maps, layout.steps, shapes, strict=True):
            centre = (torch.arange(cells) + 0.5) / (layout.size / step)
            y, x = torch.meshgrid(centre, centre, indexing="ij")
            centre = torch.stack((x, y), -1)[:, :, None]  # [cells, cells, 1, 2]
            half = 0.5 * torch.tensor(shape).clamp(max=1 if clamp_sizes else math.inf)
            out.append((torch.cat((centre - half, centre + half), -1) * layout.size).view(-1, 4))
        return torch.cat(out)


# -------------------------------------------------------------------------------------------------------------- network


class Backbone(nn.Module):
    """[N, 3, S, S] -> the maps, Figure 2: conv4_3 with its channels scaled to one length, conv7, and the extras."""

    def __init__(self, layout: Layout, width: int = 64, batch_norm: bool = False, config: str = "D"):
        super().__init__()
        layers = vgg.make_features(config, batch_norm=batch_norm, width=width)
        index = vgg.layer_index(layers)
        layers[index["pool3"]].ceil_mode = True  # 75 -> 38
        self.scale_weight = nn.Parameter(torch.full((8 * width,), 20.0))
        self.features = layers[: index["pool4"]]
        fc = nn.Sequential(
            nn.MaxPool2d(3, 1, 1),  # pool5
            *_conv(8 * width, 16 * width, 3, padding=6, dilation=6, batch_norm=batch_norm),  # fc6
            *_conv(16 * width, 16 * width, 1, batch_norm=batch_norm),  # fc7
        )
        self.out_channels = [8 * width, 16 * width]
        self.extra = nn.ModuleList([nn.Sequential(*layers[index["pool4"] : index["pool5"]], fc)])
        for reduced, channels, size, stride, padding in layout.extras:
            narrow = _conv(self.out_channels[-1], reduced * width, 1, batch_norm=batch_norm)
            wide = _conv(reduced * width, channels * width, size, stride, padding, batch_norm=batch_norm)
            self.extra.append(nn.Sequential(*narrow, *wide))
            self.out_channels.append(channels * width)
        _xavier(fc)
        _xavier(self.extra[1:])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = vgg.run(self.features, x)  # conv4_3 [N, 512, S / 8, S / 8]
        # paper: Section 3.1, as in ParseNet; the next layer reads the map as it was
        maps = [F.normalize(x) * self.scale_weight[:, None, None]]
        for layers in self.extra:
            x = vgg.run(layers, x)  # conv7 [N, 1024, S / 16, S / 16]; conv8_2 ..
            maps.append(x)
        return maps


def _conv(*args, batch_norm: bool, **kwargs) -> list[nn.Module]:
    conv = nn.Conv2d(*args, **kwargs)
    return [conv, *([nn.BatchNorm2d(conv.out_channels)] if batch_norm else []), nn.ReLU(inplace=True)]


class Predictors(nn.Module):
    """A 3x3 convolution for each map: maps [N, C, h, w] -> [N, A, columns], in the order of the default boxes."""

    def __init__(self, in_channels: Sequence[int], boxes_per_cell: Sequence[int], columns: int):
        super().__init__()
        self.columns = columns
        self.module_list = nn.ModuleList(
            nn.Conv2d(channels, boxes * columns, 3, padding=1)
            for channels, boxes in zip(in_channels, boxes_per_cell, strict=True)
        )
        _xavier(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        out = [conv_bn(x, conv).permute(0, 2, 3, 1) for conv, x in zip(self.module_list, maps, strict=True)]
        return torch.cat([x.flatten(1).unflatten(1, (-1, self.columns)) for x in out], 1)


class Network(nn.Module):
    """[N, 3, S, S], normalised -> offsets [N, A, 4] of the default boxes and logits [N, A, num_classes], 0 is
    background. What :class:`SSD` does before and after depends on the data; this compiles and exports."""

    def __init__(self, backbone: nn.Module, head: nn.ModuleDict):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(x.contiguous(memory_format=torch.channels_last))
        return self.head["regression_head"](maps), self.head["classification_head"](maps)


def _xavier(module: nn.Module) -> None:
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)


# ----------------------------------------------------------------------------------------------- matching, Section 2.2


def match_best(iou: Tensor, threshold: float = 0.5) -> Tensor:
    """Each box stands for the object it overlaps most, if by ``threshold``; then each object has the box that overlaps
    it most in any case. Of two that want the same box the later one has it.

    Args:
        iou: [objects, boxes], at least one object.

    Returns:
        [boxes] int64: the object, or a negative number for background.
    """
    objects = torch.arange(len(iou), device=iou.device)
    forced = torch.full_like(iou[0], -1, dtype=torch.int64).scatter_reduce(0, iou.argmax(1), objects, "amax")
    return torch.where(forced >= 0, forced, match(iou, threshold, threshold))


def match_bipartite(iou: Tensor, threshold: float = 0.5) -> Tensor:
    """The pair of object and box that overlap most is matched, then the next one of those left, while they overlap at
    all; then each box that is left stands for the object it overlaps most, if by ``threshold``. Arguments and result
    as of :func:`match_best`."""
    out = match(iou, threshold, threshold)
    objects = torch.arange(len(iou), device=iou.device)
    left = iou.clone()
    while True:
        # All pairs at once that are the best for both: none of them can be taken by a better one.
        overlap, box = left.max(1)
        taken = (left[:, box].argmax(0) == objects) & (overlap > 1e-6)
        if not taken.any():
            return out
        out[box[taken]] = objects[taken]
        left[taken] = -1
        left[:, box[taken]] = -1


MATCHING = {"best": match_best, "bipartite": match_bipartite}


def hardest(loss: Tensor, positive: Tensor, ratio: float = 3) -> Tensor:
    """Which negatives count: in each image those of the largest loss, ``ratio`` times as many as positives or all
    there are. [N, A], [N, A] -> [N, A] bool; Section 2.2, hard negative mining."""
    order = loss.masked_fill(positive, -math.inf).sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank < ratio * positive.sum(1, keepdim=True)) & ~positive


# ------------------------------------------------------------------------------------------------------------- detector


class SSD(nn.Module):
    """torchvision's detection contract: ``model(images, targets)`` is a dict of losses in training, ``model(images)`` a
    list of dicts of boxes, labels and scores in evaluation. Images are resized to the size of the layout.

    Args:
        num_classes: outputs, background among them.
        layout: :data:`SSD300`, :data:`SSD512` or one's own.
        boxes: which sizes of the layout: "coco" or "voc".
        clamp_sizes, whole_sizes: as of :func:`default_boxes`.
        config, width: VGG's configuration, and the channels of its first block.
        batch_norm: after each convolution but the predictors'; it is then easy to train from scratch.
        matching: "best" or "bipartite".
        iou_thresh: overlap that makes a default box positive.
        negatives: how many count for each positive.
        score_thresh, topk_candidates, nms_thresh, detections_per_img: a class has at most so many candidates above the
            score; of those that overlap more than this the best remains, and so many are the result.
        image_mean, image_std: subtracted from RGB in [0, 1], and then divided by.
    """

    def __init__(
        self,
        num_classes: int = 91,
        *,
        layout: Layout = SSD300,
        boxes: str = "coco",
        clamp_sizes: bool = True,
        whole_sizes: bool = False,
        config: str = "D",
        width: int = 64,
        batch_norm: bool = False,
        matching: str = "best",
        iou_thresh: float = 0.5,
        negatives: float = 3,
        score_thresh: float = 0.01,
        topk_candidates: int = 400,
        nms_thresh: float = 0.45,
        detections_per_img: int = 200,
        image_mean: tuple[float, float, float] = (0.48235, 0.45882, 0.40784),
        image_std: tuple[float, float, float] = (1 / 255, 1 / 255, 1 / 255),
    ):
        super().__init__()
        for what, value, allowed in (
            ("boxes", boxes, layout.sizes),
            ("matching", matching, MATCHING),
            ("config", config, vgg.TABLE_1),
        ):
            if value not in allowed:
                raise ValueError(f"SSD: {what} must be one of {', '.join(allowed)}, got {value!r}")
        per_cell = [len(shapes) for shapes in box_shapes(layout, boxes)]
        self.backbone = Backbone(layout, width, batch_norm, config)
        self.head = nn.ModuleDict(
            {
                "classification_head": Predictors(self.backbone.out_channels, per_cell, num_classes),
                "regression_head": Predictors(self.backbone.out_channels, per_cell, 4),
            }
        )
        self.layout, self.num_classes = layout, num_classes
        self._boxes = partial(default_boxes, layout, boxes, clamp_sizes, whole_sizes)
        self.coder = BoxCoder((10, 10, 5, 5))
        self.matching, self.iou_thresh, self.negatives = MATCHING[matching], iou_thresh, negatives
        self.score_thresh, self.topk_candidates = score_thresh, topk_candidates
        self.nms_thresh, self.detections_per_img = nms_thresh, detections_per_img
        self.image_mean, self.image_std = image_mean, image_std

    @property
    def network(self) -> Network:
        """What has the parameters: ``torch.compile(model.network)``, ``torch.export.export(model.network, ...)``."""
        return Network(self.backbone, self.head)

    def default_boxes(self, device: torch.device | str = "cpu") -> Tensor:
        """[A, 4], in pixels of the image that the network sees."""
        return self._boxes().to(device)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None):
        check_images("SSD", images)
        if self.training:
            check_targets("SSD", images, targets, self.num_classes)
        offsets, logits = self.network(self.prepare(images))
        if self.training:
            size = [image.shape[-2:] for image in images]
            boxes = [self._scaled(target["boxes"], s) for target, s in zip(targets, size, strict=True)]
            return self.losses(offsets, logits, boxes, [target["labels"] for target in targets])
        found = self.detect(offsets, logits)
        for entry, image in zip(found, images, strict=True):
            entry["boxes"] = self._scaled(entry["boxes"], image.shape[-2:], back=True)
        return found

    def prepare(self, images: Sequence[Tensor]) -> Tensor:
        """What the network is given: all images at its size, normalised. [N, 3, S, S], channels last."""
        size = (self.layout.size, self.layout.size)
        mean, std = (images[0].new_tensor(v)[:, None, None] for v in (self.image_mean, self.image_std))
        out = images[0].new_empty((len(images), 3, *size)).contiguous(memory_format=torch.channels_last)
        for entry, image in zip(out, images, strict=True):
            entry.copy_(F.interpolate(((image - mean) / std)[None], size, mode="bilinear")[0])
        return out

    def _scaled(self, boxes: Tensor, size: Sequence[int], back: bool = False) -> Tensor:
        """Boxes of an image of ``size`` (height, width) in pixels of what the network sees, or back."""
        height, width = size
        ratio = [self.layout.size / width, self.layout.size / height]
        if back:
            ratio = [width / self.layout.size, height / self.layout.size]
        return boxes * boxes.new_tensor(ratio * 2)

    # --------------------------------------------------------------------------------------------------------- training

    def losses(
        self, offsets: Tensor, logits: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Equations 1 to 3; ``boxes`` and ``labels`` are an image's objects, in pixels of what the network sees."""
        default = self.default_boxes(offsets.device)
        found = [
            self.matching(box_iou(b, default), self.iou_thresh) if len(b) else b.new_full((len(default),), -1).long()
            for b in boxes
        ]
        found = torch.stack(found)  # [N, A]
        image, box = (found >= 0).nonzero(as_tuple=True)
        first = torch.tensor([0, *(len(b) for b in boxes)][:-1], device=found.device).cumsum(0)
        matched = found[image, box] + first[image]  # among all objects of the batch
        normaliser = max(1, len(matched))

        target = self.coder.encode(torch.cat(list(boxes))[matched], default[box])
        localisation = F.smooth_l1_loss(offsets[image, box], target, reduction="sum")

        classes = torch.zeros_like(found)
        classes[image, box] = torch.cat(list(labels))[matched]
        with torch.no_grad():
            loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes)
            counts = (classes > 0) | hardest(loss, classes > 0, self.negatives)
        confidence = F.cross_entropy(logits[counts], classes[counts], reduction="sum")
        return {"bbox_regression": localisation / normaliser, "classification": confidence / normaliser}

    # ------------------------------------------------------------------------------------------------------- evaluation

    def detect(self, offsets: Tensor, logits: Tensor) -> list[dict[str, Tensor]]:
        """Boxes, in pixels of what the network sees, labels and scores of each image, best first."""
        size = (self.layout.size, self.layout.size)
        boxes = clip_boxes(self.coder.decode(offsets, self.default_boxes(offsets.device)), size)
        scores = logits.softmax(-1)[..., 1:]
        return [self._detect(*entry) for entry in zip(boxes, scores, strict=True)]

    def _detect(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        box, label, score = candidates(scores, self.score_thresh, self.topk_candidates)
        boxes, label = boxes[box], label + 1
        keep = batched_nms(boxes, score, label, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[keep], "labels": label[keep], "scores": score[keep]}


def candidates(scores: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each class the ``count`` best of the scores above ``threshold``: [A, classes] -> the box, the class and the
    score of each."""
    above = scores > threshold
    if above.sum(0).max() > count:
        score, box = scores.topk(count, 0)  # [count, classes]
        rank, label = (score > threshold).nonzero(as_tuple=True)
        return box[rank, label], label, score[rank, label]
    box, label = above.nonzero(as_tuple=True)
    return box, label, scores[box, label]


# --------------------------------------------------------------------------------------------------- weights of VGG-16


@torch.no_grad()
def load_vgg(model: SSD, weights: vgg.VGG) -> None:
    """Starts from a classifier, a VGG-16 of the same width: its convolutions as they are, its linear layers thinned
    out. Of fc6's 7x7 taps each third remains, and of the outputs of both so many that they fit (a trous)."""
    features = [*model.backbone.features, *model.backbone.extra[0][:-1]]
    for ours, theirs in zip(features, weights.features, strict=False):
        ours.load_state_dict(theirs.state_dict())
    fc6, fc7 = (layer for layer in model.backbone.extra[0][-1] if isinstance(layer, nn.Conv2d))
    linear6, linear7 = weights.classifier[0], weights.classifier[3]
    every = linear6.out_features // fc6.out_channels
    fc6.weight.copy_(linear6.weight.unflatten(1, (-1, 7, 7))[::every, :, ::3, ::3])
    fc6.bias.copy_(linear6.bias[::every])
    fc7.weight.copy_(linear7.weight[::every, ::every, None, None])
    fc7.bias.copy_(linear7.bias[::every])


# ------------------------------------------------------------------------------------------------------------- registry

ABOUT = {
    "paper": "SSD: Single Shot MultiBox Detector, Liu et al., arXiv 1512.02325",
    "task": "detection",
    "input": "list of [3, H, W] float, RGB in [0, 1]; resized to 300 x 300 or 512 x 512 and normalised inside",
    "tiny": {"width": 2, "num_classes": 3},
    "size": (60, 80),
}
register_model("ssd300_vgg16", SSD, parameters=35_641_826, **ABOUT)
register_model("ssd512_vgg16", partial(SSD, layout=SSD512), parameters=37_513_116, **ABOUT)
