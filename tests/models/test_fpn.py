"""FPN: sizes, counts, torchvision's numbers, which level a box is pooled from, ablations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyzoo.models.faster_rcnn import align_levels
from pyzoo.models.fpn import FPN, ResNetFPN

STRIDES = (4, 8, 16, 32)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_counts():
    with torch.device("meta"):
        fpn, small = FPN((256, 512, 1024, 2048)), FPN((64, 128, 256, 512))
    assert count(fpn.inner_blocks) == 984_064
    assert count(fpn.layer_blocks) == 2_360_320
    assert count(small) == 2_607_104


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((800, 1344), [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]),
        ((224, 224), [(56, 56), (28, 28), (14, 14), (7, 7), (4, 4)]),
    ],
)
def test_sizes(size, expected):
    with torch.device("meta"):
        levels = ResNetFPN(18, 8, width=4)(torch.empty(1, 3, *size))
    assert [tuple(level.shape) for level in levels] == [(1, 8, *each) for each in expected]


@pytest.mark.parametrize("size", [(64, 96), (203, 331)])
def test_equal_to_torchvision(size):
    ops = pytest.importorskip("torchvision").ops
    torch.manual_seed(0)
    channels = (8, 16, 32, 64)
    theirs = ops.FeaturePyramidNetwork(list(channels), 24, ops.feature_pyramid_network.LastLevelMaxPool())
    ours = FPN(channels, 24)
    ours.load_state_dict(theirs.state_dict())
    maps = [torch.randn(2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(channels, STRIDES, strict=True)]
    expected = theirs({str(i): x for i, x in enumerate(maps)})
    torch.testing.assert_close(ours(maps), list(expected.values()), rtol=1e-5, atol=1e-5)
    channels_last = [x.to(memory_format=torch.channels_last) for x in maps]
    torch.testing.assert_close(ours(channels_last), list(expected.values()), rtol=1e-5, atol=1e-5)


def identity_fpn(paths="both") -> FPN:
    """Every convolution gives what it takes."""
    fpn = FPN((3, 3, 3, 3), 3, paths=paths)
    for module in fpn.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.dirac_(module.weight)
    return fpn


def test_levels_are_sums_of_nearest_upsampling():
    maps = [torch.randn(1, 3, 50 // 2**i + 1, 70 // 2**i + 1) for i in range(4)]  # 51 x 71 .. 7 x 9
    levels = identity_fpn()(maps)
    expected = maps[3]
    for i in (2, 1, 0):
        expected = F.interpolate(expected, maps[i].shape[2:], mode="nearest") + maps[i]
        torch.testing.assert_close(levels[i], expected)
    assert torch.equal(levels[4], levels[3][:, :, ::2, ::2])


def test_ablations():
    maps = [torch.randn(1, 3, 64 // 2**i, 64 // 2**i) for i in range(4)]
    torch.testing.assert_close(identity_fpn("bottom-up")(maps)[:4], maps)
    levels = identity_fpn("top-down")(maps)
    for i in range(4):
        torch.testing.assert_close(levels[i], F.interpolate(maps[3], scale_factor=2 ** (3 - i)) if i < 3 else maps[3])


# Sides of a box, and the level it belongs to
LEVELS = [(224, 224, 4), (112, 112, 3), (111.9, 111.9, 2), (448, 448, 5), (30, 30, 2), (1000, 1000, 5), (100, 501.8, 4)]
LEVELS += [(0, 0, 2), (0, 50, 2), (447.9, 447.9, 4), (223.9, 223.9, 3)]


def test_which_level():
    """Boxes of all levels in one list, of two images; the result is in their order."""
    maps = [torch.full((2, 1, 1024 // s, 1024 // s), float(i + 2)) for i, s in enumerate(STRIDES)]
    for i in range(4):
        maps[i][1] += 10
    boxes = torch.tensor([[3.0, 2, 3 + w, 2 + h] for w, h, _ in LEVELS])
    pooled = align_levels(maps, [boxes, boxes.flip(0)], 7, strides=STRIDES).mean((1, 2, 3))
    expected = torch.tensor([float(level) for *_, level in LEVELS])
    torch.testing.assert_close(pooled, torch.cat((expected, expected.flip(0) + 10)))


def test_older_names():
    fpn, other = FPN((4, 8), 6), FPN((4, 8), 6)
    state = {key.replace(".0.weight", ".weight").replace(".0.bias", ".bias"): v for key, v in fpn.state_dict().items()}
    assert "inner_blocks.1.weight" in state
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(fpn.parameters(), other.parameters(), strict=True))


def test_trainable():
    backbone = ResNetFPN(18, 8, width=4, norm_layer=torch.nn.BatchNorm2d, trainable=3)
    learns = {name for name, parameter in backbone.body.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in learns} == {"layer2", "layer3", "layer4"}
    assert all(parameter.requires_grad for parameter in ResNetFPN(18, 8, width=4).parameters())


def test_bad_input():
    with pytest.raises(ValueError, match="paths must be one of both, bottom-up, top-down, got 'sideways'"):
        FPN((4, 8), paths="sideways")
    with pytest.raises(ValueError, match="trainable must be from 0 to 5, got 6"):
        ResNetFPN(18, width=4, trainable=6)
