"""Feature Pyramid Networks for Object Detection. T.-Y. Lin, P. Dollar, R. Girshick, K. He, B. Hariharan, S. Belongie.
CVPR 2017, arXiv 1612.03144.

The maps of a backbone are fine but know little, or know much but are coarse. Each pyramid level is the map of its size
plus the level above it, upsampled: fine maps that know what the coarse ones do. All levels have as many channels, so
that one head serves all. Detectors on it: ``pyzoo.models.faster_rcnn`` and ``pyzoo.models.mask_rcnn``.

Departures from the paper: boxes are pooled by RoIAlign, not RoIPool; ``pool`` of the heads takes any other. Which level
a box belongs to (equation 1) is torchvision's to the last bit, 1e-6 added to the level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models.resnet import TABLE_1, ResNet
from pyzoo.nn.batch_norm import FrozenBatchNorm2d
from pyzoo.nn.conv import conv_bn
from pyzoo.nn.detection import rename_keys

PATHS = ("both", "bottom-up", "top-down")  # the whole, and what Table 1 (d) and (e) leave of it


class FPN(nn.Module):
    """C2..C5, or any maps each about half as large as the one before, -> P2..P5 and P6, a list of [N, channels, H, W].

    Args:
        in_channels: of each map, finest first.
        channels: of each level.
        paths: "both"; "bottom-up", no level is added to a finer one; or "top-down", only the coarsest map is used.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, *, paths: str = "both"):
        super().__init__()
        if paths not in PATHS:
            raise ValueError(f"FPN: paths must be one of {', '.join(PATHS)}, got {paths!r}")
        self.paths = paths
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in in_channels
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = conv_bn(maps[-1], self.inner_blocks[-1][0])  # M5
        levels = [conv_bn(merged, self.layer_blocks[-1][0])]  # P5
        for i in reversed(range(len(maps) - 1)):
            above = F.interpolate(merged, maps[i].shape[-2:]) if self.paths != "bottom-up" else None  # nearest
            if self.paths == "top-down":
                merged = above
            else:
                merged = conv_bn(maps[i], self.inner_blocks[i][0])  # lateral
                if above is not None:
                    merged += above
            levels.insert(0, conv_bn(merged, self.layer_blocks[i][0]))
        return [*levels, levels[-1][:, :, ::2, ::2]]  # P6 is P5, subsampled; only the RPN looks at it

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for blocks in ("inner_blocks", "layer_blocks"):  # older files of torchvision have no ".0"
            rename_keys(
                state_dict, prefix, {f"{blocks}.{i}.": f"{blocks}.{i}.0." for i in range(len(self.inner_blocks))}
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class ResNetFPN(nn.Module):
    """Images [N, 3, H, W] -> P2..P6, at strides 4 to 64; 800 x 1344 gives 200 x 336, 100 x 168, 50 x 84,
    25 x 42, 13 x 21.

    Args:
        depth: of the ResNet.
        channels: of each level.
        width: of the ResNet.
        norm_layer: of the ResNet. Its weights come trained, and batches are too small for statistics: frozen. To train
            from nothing, ``nn.BatchNorm2d``; for torchvision's released files,
            ``partial(FrozenBatchNorm2d, eps=0.0)``.
        trainable: how many of the ResNet's five stages learn, the last ones; torchvision lets three.
        paths: as in :class:`FPN`.
    """

    strides = (4, 8, 16, 32)  # of the levels that boxes are pooled from

    def __init__(
        self,
        depth: int = 50,
        channels: int = 256,
        *,
        width: int = 64,
        norm_layer: Callable[..., nn.Module] = FrozenBatchNorm2d,
        trainable: int = 5,
        paths: str = "both",
    ):
        super().__init__()
        block, blocks, _ = TABLE_1[depth]
        self.body = ResNet(block, blocks, width=width, norm_layer=norm_layer)
        del self.body.fc
        freeze_stages(self.body, trainable)
        self.fpn = FPN(self.body.out_channels, channels, paths=paths)
        self.out_channels = channels

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.fpn(self.body.features(x))


def freeze_stages(body: ResNet, trainable: int) -> None:
    """Only the last ``trainable`` of the five stages learn; batch norm counts to the convolutions before it."""
    if not 0 <= trainable <= 5:
        raise ValueError(f"ResNetFPN: trainable must be from 0 to 5, got {trainable}")
    stages = ([body.conv1, body.bn1], [body.layer1], [body.layer2], [body.layer3], [getattr(body, "layer4", None)])
    for module in (module for stage in stages[: 5 - trainable] for module in stage if module is not None):
        module.requires_grad_(False)
