"""You Only Look Once: Unified, Real-Time Object Detection. J. Redmon, S. Divvala, R. Girshick, A. Farhadi. CVPR 2016,
arXiv 1506.02640.

Detection is one regression from the whole image to an S x S grid: the cell with the centre of an object predicts B
boxes with a confidence each, and one set of class scores. One pass, no proposals; one class a cell is all there can be.

The paper's two networks and three that darknet, the authors' program, had later; :mod:`pyzoo.models.darknet` reads and
writes its ``.weights`` files, whose order of outputs is the one here.

Departures from the paper, which follow darknet:
    outputs are all class scores, then all confidences, then all boxes; ``as_grid`` makes the paper's tensor of them.
    the fast network has its 256 linear units between the convolutions and the 4096, which the paper does not tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models._registry import register_model
from pyzoo.nn.boxes import box_area, box_iou, clip_boxes, is_large, paired_iou, to_centres, to_corners
from pyzoo.nn.conv import conv_bn
from pyzoo.nn.detection import check_images, check_targets
from pyzoo.ops import batched_nms

# ------------------------------------------------------------------------------------------------- networks, Figure 3

P = "pool"  # 2x2, stride 2; the others are kernel, channels and perhaps stride of a convolution
BLOCK_4 = ((1, 256), (3, 512))
BLOCK_5 = ((1, 512), (3, 1024))
CLASSIFIED = ((7, 64, 2), P, (3, 192), P, (1, 128), (3, 256), (1, 256), (3, 512), P)  # 56 x 56 -> 28 x 28
CLASSIFIED += (*BLOCK_4 * 4, *BLOCK_5, P, *BLOCK_5 * 2)  # the 20 convolutions that ImageNet trains first; 14 x 14
DEEP = (*CLASSIFIED, (3, 1024), (3, 1024, 2), (3, 1024), (3, 1024))  # 7 x 7
SHALLOW = ((3, 16), P, (3, 32), P, (3, 64), P, (3, 128), P, (3, 256), P, (3, 512), P, (3, 1024))

# convolutions, what follows up to the last linear layer, batch norm, B; parameters for 20 classes at 448 x 448
NETWORKS = {
    "yolo_v1": (DEEP, (("fc", 4096), "leaky", "dropout"), False, 2, 271_703_550),
    "yolo_v1_fast": (
        (*SHALLOW, (3, 1024), (3, 1024)),
        (("fc", 256), ("fc", 4096), "leaky", "dropout"),
        False,
        2,
        45_089_374,
    ),
    "yolo_v1_small": (DEEP, (("fc", 512), "leaky", ("fc", 4096), "leaky", "dropout"), False, 2, 93_970_430),
    "yolo_v1_tiny": ((*SHALLOW, (3, 256)), (), True, 2, 27_095_374),
    "yolo_v1_local": (DEEP, (("local", 256), "leaky", "dropout"), True, 3, 197_301_875),
}


class ConvLayer(nn.Module):
    """Convolution, batch norm if there is any, leaky ReLU (equation 2)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, batch_norm: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(out_channels, momentum=0.01) if batch_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = conv_bn(x, self.conv, self.bn)
        return F.leaky_relu(x, 0.1, inplace=True)


class LocallyConnected2d(nn.Module):
    """A 3x3 convolution with weights of its own at each of ``side`` x ``side`` places."""

    def __init__(self, in_channels: int, out_channels: int, side: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(side * side, out_channels, in_channels * 9))
        self.bias = nn.Parameter(torch.zeros(out_channels, side, side))

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1)  # [N, in * 9, places]
        return (self.weight @ columns.permute(2, 1, 0)).permute(2, 1, 0).reshape(-1, *self.bias.shape) + self.bias


def make_features(layers, width: float, batch_norm: bool) -> tuple[nn.Sequential, int, int]:
    """The convolutions, with the channels they end in and their stride."""
    modules, channels, total_stride = [], 3, 1
    for layer in layers:
        if layer == P:
            modules.append(nn.MaxPool2d(2))
            total_stride *= 2
            continue
        kernel, outputs, stride = (*layer, 1)[:3]
        outputs = max(1, round(outputs * width))
        modules.append(ConvLayer(channels, outputs, kernel, stride, batch_norm))
        channels, total_stride = outputs, total_stride * stride
    return nn.Sequential(*modules), channels, total_stride


def make_head(layers, channels: int, side: int, width: float, outputs: int) -> nn.Sequential:
    """What follows the last map [N, channels, side, side], up to the outputs."""
    scaled = [(layer[0], max(1, round(layer[1] * width))) if isinstance(layer, tuple) else layer for layer in layers]
    modules: list[nn.Module] = []
    inputs, flat = channels * side * side, False
    for layer in (*scaled, ("fc", outputs)):
        match layer:
            case "leaky":
                modules.append(nn.LeakyReLU(0.1, inplace=True))
            case "dropout":
                modules.append(nn.Dropout())
            case ("local", units):
                modules.append(LocallyConnected2d(channels, units, side))
                inputs = units * side * side
            case ("fc", units):
                if not flat:
                    modules.append(nn.Flatten())  # in the order channel, row, column
                modules.append(nn.Linear(inputs, units))
                inputs, flat = units, True
    return nn.Sequential(*modules)


def init_weights(model: nn.Module) -> None:
    """He's normal initialisation for leaky ReLU. (The paper does not say; darknet's is uniform and smaller.)"""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, a=0.1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LocallyConnected2d):
            nn.init.normal_(module.weight, std=math.sqrt(2 / 1.01 / module.weight.shape[2]))


# ------------------------------------------------------------------------------------------------- boxes in the grid


def encode(boxes: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """(cx, cy, w, h) relative to the image, [n, 4] -> the cell of each (column, row), [n, 2], and what it is to
    predict, [n, 4]: the centre relative to the cell, and the roots of the sizes relative to the image."""
    centre = boxes[:, :2] * grid
    cell = centre.floor().clamp(0, grid - 1)
    return cell, torch.cat((centre - cell, boxes[:, 2:].sqrt()), 1)


def decode(predicted: Tensor, cell: Tensor, grid: int) -> Tensor:
    """The inverse of :func:`encode`; leading dimensions broadcast."""
    return torch.cat(((predicted[..., :2] + cell) / grid, predicted[..., 2:].square()), -1)


# ------------------------------------------------------------------------------------------------------------ detector


class YOLOv1(nn.Module):
    """Detector after torchvision's contract: a list of images [3, H, W], RGB in [0, 1], with targets in training,
    becomes a dict of losses, or else a list of dicts of ``boxes``, ``labels`` and ``scores``. Images are stretched.

    A tensor [N, 3, image_size, image_size] becomes the raw outputs [N, S * S * (C + 5 * B)], for C classes.

    Args:
        layers, head: the network, as in :data:`NETWORKS`. S is the side of its last map.
        batch_norm: in each convolution, which then has no bias.
        boxes: B, boxes a cell.
        num_classes: C + 1, as the label 0, the background, is counted; the network has no output for it.
        image_size: side of the image that the network sees; a multiple of its stride.
        width: multiplies the channels.
        score_threshold: least score of a detection. The paper's average precisions are those of 0.001.
        nms_threshold: of two boxes of a class that overlap more the better one stays.
        half: halves the losses, so that their gradients are the differences that darknet takes; it sums them over the
            batch, and divides its learning rate by it.
    """

    def __init__(
        self,
        layers: Sequence,
        head: Sequence = (),
        *,
        batch_norm: bool = False,
        boxes: int = 2,
        num_classes: int = 21,
        image_size: int = 448,
        width: float = 1.0,
        score_threshold: float = 0.2,
        nms_threshold: float = 0.5,
        half: bool = False,
    ):
        super().__init__()
        if num_classes < 2 or boxes < 1:
            raise ValueError(
                f"YOLOv1: num_classes must be 2 or more and boxes 1 or more, got {num_classes} and {boxes}"
            )
        self.features, channels, stride = make_features(layers, width, batch_norm)
        if image_size < stride or image_size % stride:
            raise ValueError(f"YOLOv1: image_size must be a multiple of the stride, {stride}, got {image_size}")
        self.grid, self.boxes, self.num_classes, self.image_size = image_size // stride, boxes, num_classes, image_size
        self.parts = [self.grid**2 * k for k in (num_classes - 1, boxes, 4 * boxes)]
        self.head = make_head(head, channels, self.grid, width, sum(self.parts))
        self.score_threshold, self.nms_threshold, self.half = score_threshold, nms_threshold, half
        init_weights(self)

    def forward(self, images: Sequence[Tensor] | Tensor, targets: Sequence[dict[str, Tensor]] | None = None):
        if isinstance(images, Tensor):
            if targets is not None:
                raise TypeError("YOLOv1: images must be a list where there are targets, got a tensor")
            return self.head(self.features(images))
        check_images("YOLOv1", images)
        if self.training:
            check_targets("YOLOv1", images, targets, self.num_classes)
        sizes = [tuple(image.shape[1:]) for image in images]
        output = self(self.stretch(images))
        return self.losses(output, targets, sizes) if self.training else self.detect(output, sizes)

    def stretch(self, images: Sequence[Tensor]) -> Tensor:
        """A batch of what the network sees: each image at its size, whatever the aspect; corners stay corners."""
        size = (self.image_size, self.image_size)
        stretched = [F.interpolate(image[None], size, mode="bilinear", align_corners=True) for image in images]
        return torch.cat(stretched).contiguous(memory_format=torch.channels_last)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw outputs: classes [N, S, S, C], confidences [N, S, S, B], boxes [N, S, S, B, 4] (see :func:`encode`)."""
        n, s = len(output), self.grid
        classes, confidences, boxes = output.split(self.parts, 1)
        return classes.view(n, s, s, -1), confidences.view(n, s, s, -1), boxes.view(n, s, s, -1, 4)

    def as_grid(self, output: Tensor) -> Tensor:
        """Raw outputs as the paper has them, [N, S, S, 5 B + C]: B times (x, y, w, h, confidence), then classes."""
        classes, confidences, boxes = self.split(output)
        return torch.cat((torch.cat((boxes, confidences[..., None]), -1).flatten(3), classes), -1)

    # -------------------------------------------------------------------------------------------------- training

    def assign(self, targets: Sequence[dict[str, Tensor]], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """The objects that are learned: for each the index of its cell among N S S, the cell (column, row), what it is
        to predict, and the class, from 0 up. In a cell with several objects chance chooses one; tiny ones are left out.
        """
        boxes = [
            clip_boxes(t["boxes"], size) / t["boxes"].new_tensor(size[::-1] * 2)
            for t, size in zip(targets, sizes, strict=True)
        ]
        counts = torch.tensor([len(b) for b in boxes], device=boxes[0].device)
        image = torch.arange(len(boxes), device=boxes[0].device).repeat_interleave(counts)
        boxes, labels = torch.cat(boxes), torch.cat([t["labels"] for t in targets])
        order = torch.randperm(len(boxes), device=boxes.device)
        order = order[is_large(boxes[order], 0.005)]
        cell, coordinates = encode(to_centres(boxes[order]), self.grid)
        index = (image[order] * self.grid + cell[:, 1].long()) * self.grid + cell[:, 0].long()
        cells = len(targets) * self.grid**2
        first = index.new_full((cells,), len(index))
        first.scatter_reduce_(0, index, torch.arange(len(index), device=index.device), "amin")
        first = first[first < len(index)]
        return index[first], cell[first], coordinates[first], labels[order][first] - 1

    def losses(self, output: Tensor, targets: Sequence[dict[str, Tensor]], sizes) -> dict[str, Tensor]:
        """The terms of equation 3, summed over cells, the mean over images. A confidence is to be the overlap of object
        and box, as it is predicted; for the gradient that is a constant."""
        output = output if output.dtype == torch.float64 else output.float()
        classes, confidences, boxes = (part.flatten(0, 2) for part in self.split(output))
        index, cell, wanted, label = self.assign(targets, sizes)
        wanted, boxes = wanted.to(output), boxes[index]  # [M, 4], [M, B, 4]
        with torch.no_grad():
            # The box that overlaps the object most is responsible; if none does, the nearest.
            found, truth = (decode(x, cell[:, None], self.grid) for x in (boxes, wanted[:, None]))
            overlap = paired_iou(to_corners(found), to_corners(truth))  # [M, B]
            distance = (found - truth).square().sum(2)
            best = torch.where(overlap.amax(1, keepdim=True) > 0, overlap, -distance).argmax(1)
            rows = torch.arange(len(index), device=index.device)
            others = torch.ones_like(confidences)
            others[index, best] = 0  # the other boxes of a cell with an object see none either
        losses = {
            "loss_box": 5 * (boxes[rows, best] - wanted).square().sum(),
            "loss_object": (confidences[index, best] - overlap[rows, best]).square().sum(),
            "loss_no_object": 0.5 * (confidences * others).square().sum(),
            "loss_classes": (classes[index] - F.one_hot(label, classes.shape[1])).square().sum(),
        }
        return {name: loss / (len(targets) * (1 + self.half)) for name, loss in losses.items()}

    # ------------------------------------------------------------------------------------------------- inference

    def decode(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs -> boxes [N, S S B, 4], corners relative to the image, and their scores [N, S S B, C]: the
        confidence times the class score (equation 1)."""
        classes, confidences, boxes = self.split(output)
        row, column = torch.meshgrid(*[torch.arange(self.grid, device=output.device)] * 2, indexing="ij")
        boxes = to_corners(decode(boxes, torch.stack((column, row), -1)[:, :, None], self.grid))
        return boxes.flatten(1, 3), (confidences[..., None] * classes[:, :, :, None]).flatten(1, 3)

    def detect(self, output: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Raw outputs -> the detections of each image, in its pixels, best first."""
        output = output if output.dtype == torch.float64 else output.float()
        return [self._detect(*of_image, size) for *of_image, size in zip(*self.decode(output), sizes, strict=True)]

    def _detect(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        box, label = (scores > self.score_threshold).nonzero().unbind(1)
        score = scores[box, label]
        keep = batched_nms((boxes - boxes.min())[box], score, label, self.nms_threshold)
        boxes = clip_boxes(boxes[box[keep]] * boxes.new_tensor(size[::-1] * 2), size)
        inside = box_area(boxes) > 0  # else all of it is outside of the image
        return {"boxes": boxes[inside], "labels": label[keep][inside] + 1, "scores": score[keep][inside]}


def pretraining_net(model: YOLOv1, num_classes: int = 1000, *, layers: int = 24) -> nn.Sequential:
    """The first convolutions of a detector as a classifier, [N, 3, 224, 224] -> logits (Section 2.2). They are the
    detector's own: training the one trains the other.

    Args:
        model: the detector.
        num_classes: of ImageNet.
        layers: how many convolutions and poolings; 24 are the full network's 20 convolutions.
    """
    if not 0 < layers <= len(model.features) or not isinstance(model.features[layers - 1], ConvLayer):
        raise ValueError(f"pretraining_net: layers must end with one of the {len(model.features)}, a convolution")
    channels = model.features[layers - 1].conv.out_channels
    pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*model.features[:layers], *pooling, nn.Linear(channels, num_classes))


def combine(rcnn: dict[str, Tensor], yolo: dict[str, Tensor], threshold: float = 0.5) -> dict[str, Tensor]:
    """Detections of Fast R-CNN in an image, with those that YOLO finds too scored higher (Section 4.3).

    The paper gives no formula; this is ours: score + overlap * YOLO's score, for YOLO's box of the same class that
    overlaps most, if by more than the threshold.
    """
    if not len(yolo["boxes"]):
        return rcnn
    overlap = box_iou(rcnn["boxes"], yolo["boxes"])  # [R, Y]
    overlap = torch.where(rcnn["labels"][:, None] == yolo["labels"], overlap, 0)
    most, which = overlap.max(1)
    scores = rcnn["scores"] + torch.where(most > threshold, most * yolo["scores"][which], 0)
    order = scores.argsort(descending=True, stable=True)
    return {name: value[order] for name, value in {**rcnn, "scores": scores}.items()}


# ------------------------------------------------------------------------------------------------------------- registry

for _name, (_layers, _head, _batch_norm, _boxes, _parameters) in NETWORKS.items():
    register_model(
        _name,
        partial(YOLOv1, _layers, _head, batch_norm=_batch_norm, boxes=_boxes),
        paper="You Only Look Once: Unified, Real-Time Object Detection, Redmon et al., arXiv 1506.02640",
        task="detection",
        input="list of [3, H, W] float, RGB in [0, 1], stretched to 448 x 448; labels from 1 up",
        parameters=_parameters,
        tiny={"width": 1 / 32, "image_size": 128, "num_classes": 4, "score_threshold": 0.05},
        size=(60, 80),
    )
