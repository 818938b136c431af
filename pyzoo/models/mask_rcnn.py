"""Mask R-CNN. K. He, G. Gkioxari, P. Dollar, R. Girshick. ICCV 2017, arXiv 1703.06870.

Faster R-CNN with a third branch: a small fully convolutional network that draws, for every class, the object inside a
box. Classes do not compete for pixels; the box branch says which one to take. Boxes are pooled without rounding
(RoIAlign), which pixels of a mask need.

``maskrcnn_resnet50_fpn`` is equal to torchvision's. Departures from the paper:
    targets of the masks are soft: RoIAlign of the object's mask, not its polygon drawn at 28 x 28.
    masks are resized to boxes of whole pixels, as torchvision does; ``paste="grid"`` samples them at the centres of
    the image's pixels, as detectron2 does, which is more exact.
Options for the paper's comparisons: ``competing=True``, a softmax over the classes at each pixel (Table 2b);
``class_agnostic=True``, one mask for all classes (Section 4.1); and any ``pool``, as RoIPool (Table 2c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models._registry import register_model
from pyzoo.models.faster_rcnn import TINY_FPN, FasterRCNN, RoIHeads, RoIs, fpn_parts
from pyzoo.nn.conv import conv_bn
from pyzoo.nn.detection import rename_keys
from pyzoo.ops import roi_align

# ---------------------------------------------------------------------------------------------------------- mask branch


class MaskHead(nn.Sequential):
    """Pooled boxes [K, C, 14, 14] -> [K, channels, 14, 14]: convolutions of 3x3. Figure 4, right."""

    def __init__(self, in_channels: int, channels: int = 256, layers: int = 4):
        widths = [in_channels, *[channels] * layers]
        super().__init__(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True))
                for before, after in pairwise(widths)
            )
        )
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        for conv, _ in self:
            x = conv_bn(x, conv, activation="relu")
        return x

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        rename_keys(state_dict, prefix, {f"mask_fcn{i + 1}.": f"{i}.0." for i in range(len(self))})  # older files
        super()._load_from_state_dict(state_dict, prefix, *args)


class MaskPredictor(nn.Module):
    """[K, C, 14, 14] -> logits [K, classes, 28, 28], or, with ``labels`` [K], of those classes alone [K, 1, 28, 28]."""

    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, channels, 2, 2)
        self.mask_fcn_logits = nn.Conv2d(channels, num_classes, 1)
        init_convs(self)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = F.relu(self.conv5_mask(x), inplace=True)
        if labels is None:
            return self.mask_fcn_logits(x)
        weight, bias = self.mask_fcn_logits.weight[labels, :, 0, 0], self.mask_fcn_logits.bias[labels]
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [K, 784, C]
        return (pixels @ weight[:, :, None]).view(len(x), 1, *x.shape[2:]) + bias[:, None, None, None]


def init_convs(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, size: int) -> Tensor:
    """What of the masks [n, H, W] of the ``objects`` [K] is in the boxes [K, 4]: [K, size, size], in [0, 1]."""
    rois = torch.cat((objects[:, None].to(boxes), boxes), 1)
    return roi_align(masks[:, None].to(boxes), rois, size)[:, 0]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], how: str = "resize") -> Tensor:
    """Masks [n, 1, M, M] of boxes [n, 4] in an image of ``size`` (height, width): [n, 1, height, width].

    Bilinear sampling is separable: a product with what the rows of the image take of those of the mask, and one with
    the same for columns. Around the mask is a ring of zeros, which all that is outside takes.
    """
    m = masks.shape[-1] + 2
    masks = F.pad(masks[:, 0], (1, 1, 1, 1))
    centre, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * (m / (m - 2))
    start, end = centre - half, centre + half
    if how == "resize":  # whole pixels, both ends in the box
        start, end = start.trunc(), end.trunc() + 1
    scale = m / (end - start).clamp(min=1 if how == "resize" else 1e-6)
    columns, rows = (
        taken((torch.arange(n, device=boxes.device) + 0.5 - start[:, i, None]) * scale[:, i, None] - 0.5, m).to(masks)
        for i, n in enumerate((size[1], size[0]))
    )
    return (rows @ masks @ columns.mT)[:, None]


def taken(at: Tensor, count: int) -> Tensor:
    """How much each of ``count`` pixels weighs in a sample at [...]: [..., count]."""
    return (1 - (at.clamp(0, count - 1)[..., None] - torch.arange(count, device=at.device)).abs()).clamp(min=0)


class MaskRoIHeads(RoIHeads):
    """:class:`pyzoo.models.faster_rcnn.RoIHeads` with a mask branch: a loss more, or ``masks`` [n, 1, 28, 28].

    Args:
        parts: of RoIHeads.
        mask_head, mask_predictor: the branch.
        class_agnostic: one mask for all classes.
        competing: a softmax over classes at each pixel, not a sigmoid for each class.
        options: of RoIHeads.
    """

    def __init__(
        self,
        *parts: Any,
        mask_head: nn.Module,
        mask_predictor: nn.Module,
        class_agnostic: bool = False,
        competing: bool = False,
        **options: Any,
    ):
        super().__init__(*parts, **options)
        self.mask_head, self.mask_predictor = mask_head, mask_predictor
        self.class_agnostic, self.competing = class_agnostic, competing

    def mask_logits(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        x = self.mask_head(self.pool(maps, boxes, 14))
        return self.mask_predictor(x, torch.zeros_like(labels) if self.class_agnostic else labels)

    def losses(self, maps: Sequence[Tensor], rois: Sequence[RoIs], targets) -> dict[str, Tensor]:
        """Only positives have masks; the box branch, the mask branch: in parallel, on the same proposals."""
        positives = [len(roi.objects) for roi in rois]
        boxes = [roi.boxes[:n] for roi, n in zip(rois, positives, strict=True)]
        labels = torch.cat([roi.labels[:n] for roi, n in zip(rois, positives, strict=True)])
        logits = self.mask_logits(maps, boxes, None if self.competing else labels)
        wanted = torch.cat(
            [
                mask_targets(target["masks"], box, roi.objects, logits.shape[-1])
                for target, box, roi in zip(targets, boxes, rois, strict=True)
            ]
        )
        if not len(labels):
            loss = logits.sum() * 0
        elif self.competing:
            loss = F.cross_entropy(logits, (wanted > 0.5) * labels[:, None, None])
        else:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], wanted)
        return {**super().losses(maps, rois, targets), "loss_mask": loss}

    def detect(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], batch) -> list[dict[str, Tensor]]:
        """One after the other: masks are drawn in the boxes that were found."""
        found = super().detect(maps, proposals, batch)
        labels = torch.cat([each["labels"] for each in found])
        logits = self.mask_logits(maps, [each["boxes"] for each in found], None if self.competing else labels)
        if self.competing:
            masks = logits.softmax(1)[torch.arange(len(labels), device=labels.device), labels][:, None]
        else:
            masks = logits.sigmoid()
        for each, mask in zip(found, masks.split([len(each["labels"]) for each in found]), strict=True):
            each["masks"] = mask
        return found


class MaskRCNN(FasterRCNN):
    """:class:`pyzoo.models.faster_rcnn.FasterRCNN` whose targets have masks [n, H, W], and whose detections have
    masks [n, 1, H, W] in [0, 1]: the object is where they are above 0.5.

    Args:
        parts, input: of FasterRCNN.
        paste: "resize" or "grid".
    """

    needs_masks = True

    def __init__(self, *parts: Any, paste: str = "resize", **input: Any):
        super().__init__(*parts, **input)
        if paste not in ("resize", "grid"):
            raise ValueError(f"MaskRCNN: paste must be 'resize' or 'grid', got {paste!r}")
        self.paste = paste

    def resize_target(self, target, old: Sequence[int], new: Sequence[int]) -> dict[str, Tensor]:
        masks = target["masks"]
        if tuple(old) != tuple(new):
            masks = F.interpolate(masks[:, None].to(torch.uint8), tuple(new))[:, 0]  # nearest
        return {**super().resize_target(target, old, new), "masks": masks}

    def restore(self, found: dict[str, Tensor], image: Tensor, size: Sequence[int]) -> dict[str, Tensor]:
        found = super().restore(found, image, size)
        masks = paste_masks(found["masks"], found["boxes"], tuple(image.shape[1:]), self.paste)
        return {**found, "masks": masks}


def maskrcnn_fpn(
    depth: int = 50,
    num_classes: int = 91,
    *,
    mask_channels: int = 256,
    mask_layers: int = 4,
    class_agnostic: bool = False,
    competing: bool = False,
    pool: Callable[..., Tensor] | None = None,
    paste: str = "resize",
    heads: Mapping[str, Any] = {},
    input: Mapping[str, Any] = {},
    **parts: Any,
) -> MaskRCNN:
    """On a ResNet's feature pyramid.

    Args:
        depth: of the ResNet.
        num_classes: background included.
        mask_channels, mask_layers: of the mask branch.
        class_agnostic, competing: see :class:`MaskRoIHeads`.
        pool: in place of RoIAlign, see :class:`pyzoo.models.faster_rcnn.RoIHeads`.
        paste: see :class:`MaskRCNN`.
        heads, input, parts: as of :func:`pyzoo.models.faster_rcnn.fasterrcnn_fpn`.
    """
    backbone, rpn, align, box_head, box_predictor = fpn_parts(depth, num_classes=num_classes, **parts)
    roi_heads = MaskRoIHeads(
        pool or align,
        box_head,
        box_predictor,
        mask_head=MaskHead(backbone.out_channels, mask_channels, mask_layers),
        mask_predictor=MaskPredictor(mask_channels, mask_channels, 1 if class_agnostic else num_classes),
        class_agnostic=class_agnostic,
        competing=competing,
        **heads,
    )
    return MaskRCNN(backbone, rpn, roi_heads, num_classes, paste=paste, **input)


# ------------------------------------------------------------------------------------------------------------- registry

# depth of the ResNet: parameters
FPN_NETS = {50: 44_401_393, 101: 63_341_297}

for _depth, _parameters in FPN_NETS.items():
    register_model(
        f"maskrcnn_resnet{_depth}_fpn",
        partial(maskrcnn_fpn, depth=_depth),
        parameters=_parameters,
        paper="Mask R-CNN, He et al., arXiv 1703.06870",
        task="detection",
        input="a list of [3, H, W] float, RGB in [0, 1], of any sizes; the model resizes and normalises",
        tiny={**TINY_FPN, "mask_channels": 8, "mask_layers": 2},
        size=(64, 96),
    )
