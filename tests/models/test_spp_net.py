"""SPP-net: the sizes of ZF-5, regions against whole maps and RoI pooling, windows, images of many sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn

import pyzoo
from pyzoo.models import model_entry
from pyzoo.models.spp_net import (
    CAFFE_NAMES,
    MIN_SIDE,
    PYRAMID_30,
    PYRAMID_50,
    ZF5,
    LocalResponseNorm,
    SPPNet,
    choose_scales,
    map_windows,
    pool_regions,
    scaled_size,
    sliding_pyramid_pool2d,
)
from pyzoo.ops import roi_pool, spatial_pyramid_pool2d

F = nn.functional


def make(name: str = "zf5_spp", **kwargs) -> SPPNet:
    torch.manual_seed(0)
    return pyzoo.create_model(name, **{**model_entry(name).tiny, **kwargs}).eval()


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("side", "sides"), [(224, (110, 55, 26, 13)), (180, (88, 44, 20, 10)), (256, (126, 63, 30, 15))]
)
def test_maps(side, sides):
    seen = []
    with torch.device("meta"):
        model = ZF5()
        for module in (model.conv1, model.conv2, model.pool):
            module.register_forward_hook(lambda *a: seen.append(a[2].shape[2]))
        out = model(torch.empty(1, 3, side, side))
    assert tuple(seen) == sides
    assert out.shape == (1, 256, sides[-1], sides[-1])


def test_map_side():
    """As it comes out, of the scales of detection, too; below the least side there is no map."""
    assert [ZF5.map_side(side) for side in (480, 576, 688, 864, 1200)] == [29, 35, 42, 53, 74]
    model = ZF5(1 / 96)
    for side in range(MIN_SIDE, 90):
        assert model(torch.rand(1, 3, side, MIN_SIDE)).shape[2:] == (ZF5.map_side(side), 1)
    assert MIN_SIDE == 31
    for size in ((MIN_SIDE - 1, 50), (50, MIN_SIDE - 1), (1, 1)):
        with pytest.raises(ValueError, match=r"images must have sides of 31 or more, got \[1, 3,"):
            model(torch.rand(1, 3, *size))


@pytest.mark.parametrize(("name", "features"), [("zf5", 9_216), ("zf5_spp", 12_800), ("zf5_spp30", 7_680)])
def test_features(name, features):
    with torch.device("meta"):
        model = pyzoo.create_model(name)
        assert sum(p.numel() for p in model.features.parameters()) == 3_726_464
        for side in (224, 180) if model.levels else (224,):
            maps = model.features(torch.empty(2, 3, side, side))
            assert model.pool(maps).shape == (2, features)


def test_centers_of_cells():
    """What a cell of conv5 sees is centered at pixel 20 + 16 i."""
    model = ZF5(1 / 32).double().eval()
    model.norm = nn.Identity()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    image = torch.zeros(1, 3, 500, 500).double().requires_grad_()
    x = F.avg_pool2d(model.conv1(image), 3, 2)  # each pixel has a gradient
    x = F.avg_pool2d(model.conv2(x), 3, 2)
    x = model.conv5(model.conv4(model.conv3(x)))
    (gradient,) = torch.autograd.grad(x[0, 0, 14, 12], image)
    rows, columns = (gradient[0, 0].sum(dim).nonzero()[:, 0] for dim in (1, 0))
    assert (rows[0] + rows[-1]) / 2 == 20 + 16 * 14
    assert (columns[0] + columns[-1]) / 2 == 20 + 16 * 12


def test_response_norm():
    """Caffe's, within a channel, pixel by pixel."""
    x = torch.randn(1, 2, 4, 5).double() * 50
    out = LocalResponseNorm()(x)
    for c, y, column in ((0, 0, 0), (1, 2, 3), (1, 3, 4), (0, 1, 0)):
        total = sum(
            x[0, c, i, j].item() ** 2
            for i in range(max(0, y - 1), min(4, y + 2))
            for j in range(max(0, column - 1), min(5, column + 2))
        )
        expected = x[0, c, y, column].item() / (1 + 5e-5 * total / 9) ** 0.75
        assert math.isclose(out[0, c, y, column].item(), expected)


def test_caffe_names():
    model = make()
    keys = {f"{name}.{kind}" for name in CAFFE_NAMES.values() for kind in ("weight", "bias")}
    assert keys == set(model.state_dict())


# -------------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("levels", [PYRAMID_50, PYRAMID_30, (1, 2, 4), (7,), (5, (2, 3))])
def test_regions_are_pooled_as_maps(levels):
    """Of every size up to 24 x 24, smaller than the grid as well; so are the gradients, with ties."""
    torch.manual_seed(0)
    maps = torch.randint(0, 50, (2, 3, 30, 29)).double().requires_grad_()
    boxes = torch.tensor(
        [(x, y, x + w, y + h) for w in range(1, 25) for h in range(1, 25) for x, y in ((w % 5, h % 6),)]
    )
    pooled = pool_regions(maps, [boxes[::2], boxes[1::2]], levels)
    whole = [
        spatial_pyramid_pool2d(maps[i, :, y1:y2, x1:x2], levels)
        for i in range(2)
        for x1, y1, x2, y2 in boxes[i::2].tolist()
    ]
    whole = torch.stack(whole)
    torch.testing.assert_close(pooled, whole, rtol=0, atol=0)
    weights = torch.randn_like(whole)
    gradients = [torch.autograd.grad((out * weights).sum(), maps)[0] for out in (pooled, whole)]
    torch.testing.assert_close(*gradients)


def test_regions_of_all_sides():
    """Bins in floating point are those in integers, for the levels of the paper, up to the largest maps."""
    maps = torch.rand(1, 1, 1, 130)
    for levels in (PYRAMID_50, PYRAMID_30):
        levels = [(1, n) for n in levels]
        for side in range(1, 129):
            region = torch.tensor([[1, 0, 1 + side, 1]])
            expected = spatial_pyramid_pool2d(maps[0, :, :, 1 : 1 + side], levels)
            torch.testing.assert_close(pool_regions(maps, region, levels)[0], expected, rtol=0, atol=0)


def test_single_level_is_roi_pooling():
    torch.manual_seed(0)
    maps = torch.randn(1, 4, 20, 20)
    boxes = torch.tensor([[0, 0, 20, 20], [3, 2, 10, 16], [5, 5, 6, 6]])
    inclusive = torch.cat((torch.zeros(3, 1), (boxes - torch.tensor([0, 0, 1, 1])) * 16.0), 1)
    expected = torchvision.ops.roi_pool(maps, inclusive, (7, 7), 1 / 16).flatten(1)
    torch.testing.assert_close(pool_regions(maps, boxes, (7,)), expected, rtol=0, atol=0)
    torch.testing.assert_close(roi_pool(maps, inclusive, 7, 1 / 16).flatten(1), expected, rtol=0, atol=0)


def test_negative_values():
    """The maximum does not start from 0."""
    maps = torch.full((1, 2, 9, 9), -3.0)
    assert (pool_regions(maps, torch.tensor([[1, 1, 3, 3]])) == -3).all()


def test_sliding_windows():
    """The rule of the bins and the sliding windows agree at 13 for 6, 3, 2, 1 and at 10 for 3, 2, 1, not for 6."""
    torch.manual_seed(0)
    for side, levels, same in ((13, (6, 3, 2, 1), True), (10, (3, 2, 1), True), (10, (6,), False)):
        maps = torch.randn(2, 3, side, side)
        sliding = sliding_pyramid_pool2d(maps, levels)
        assert torch.equal(sliding, spatial_pyramid_pool2d(maps, levels)) == same
    seen = maps[:, :, :7, :7].amax((2, 3))  # all that the first six windows see of ten rows
    assert torch.equal(sliding.view(2, 3, 36).amax(2), seen)
    model = make(sliding_windows=True)
    assert model(torch.rand(1, 3, 224, 224)).shape == (1, 5)
    for shape in ((1, 3, 13, 12), (1, 3, 5, 5)):
        with pytest.raises(ValueError, match="maps must be square with sides of 6 or more"):
            sliding_pyramid_pool2d(torch.rand(shape), PYRAMID_50)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (torch.tensor([[0, 0, 5, 5, 5]]), r"regions\[0\] must be \[K, 4\] integers, got \[1, 5\]"),
        (torch.tensor([[0.0, 0, 5, 5]]), r"must be \[K, 4\] integers, got \[1, 4\] torch.float32"),
        (torch.tensor([[0, 0, 9, 5]]), r"must be cells of the 7 x 8 map, got \[0, 0, 9, 5\]"),
        (torch.tensor([[0, 0, 8, 8]]), r"must be cells of the 7 x 8 map"),
        (torch.tensor([[-1, 0, 3, 3]]), r"must be cells of the 7 x 8 map"),
        (torch.tensor([[0, 0, 3, 3], [2, 2, 2, 5]]), r"must be cells of the 7 x 8 map, got \[2, 2, 2, 5\]"),
        ([], "regions for each of 1 maps, got 0"),
    ],
)
def test_refuses_regions(regions, message):
    with pytest.raises(ValueError, match=message):
        pool_regions(torch.rand(1, 2, 7, 8), regions)


# -------------------------------------------------------------------------------------------------------------- windows


def test_map_windows():
    """The authors' rule, number by number, in their coordinates: pixels and cells from 1, ends inclusive."""
    torch.manual_seed(0)
    corner = torch.rand(200, 2) * 300
    windows = torch.cat((corner, corner + torch.rand(200, 2) * torch.tensor([200.0, 12.0]) + 1), 1).round()
    for origin, margin, stride in ((20, 0, 16), (0, 0, 16), (14, 6.5, 12)):
        regions = map_windows(windows, (20, 30), stride=stride, origin=origin, margin=margin)
        for window, region in zip(windows.tolist(), regions.tolist(), strict=True):
            for axis, cells in ((0, 30), (1, 20)):
                x0, x1 = window[axis] + 1, window[axis + 2]
                o0, o = origin + 1, margin
                low = math.floor((x0 - o0 + o) / stride + 0.5) + 1
                high = math.ceil((x1 - o0 - o) / stride - 0.5) + 1
                if low > high:
                    low = high = math.floor((low + high) / 2)
                low, high = (min(max(cell, 1), cells) for cell in (low, high))
                assert (region[axis], region[axis + 2]) == (low - 1, high)
    assert map_windows(torch.zeros(0, 4), (3, 3)).shape == (0, 4)


def test_map_windows_by_the_paper():
    windows = torch.tensor([[0.0, 16, 49, 80], [15, 17, 34, 35], [1, 1, 9, 9]])
    expected = [[1, 2, 3, 5], [1, 2, 3, 3], [0, 0, 1, 1]]
    assert map_windows(windows, (10, 10), paper=True).tolist() == expected


def test_map_windows_finds_the_cells():
    """A window from the center of a cell to that of another one becomes the region from the one to the other."""
    cells = torch.tensor([[0, 0, 3, 4], [2, 5, 2, 6]])
    windows = 20 + 16 * cells + torch.tensor([0, 0, 1, 1])
    assert map_windows(windows, (9, 9)).tolist() == (cells + torch.tensor([0, 0, 1, 1])).tolist()
    everywhere = torch.tensor([[-1e6, -1e6, 1e6, 1e6], [400, 400, 500, 500], [-9, -9, -1, -1]])
    assert map_windows(everywhere, (9, 8)).tolist() == [[0, 0, 8, 9], [7, 8, 8, 9], [0, 0, 1, 1]]


@pytest.mark.parametrize("window", [[0, 0, 0, 5], [5, 5, 3, 9], [0, 0, math.nan, 5], [0, 0, math.inf, 5]])
def test_refuses_windows(window):
    with pytest.raises(ValueError, match="map_windows: windows must be finite with x1 < x2 and y1 < y2, got"):
        map_windows(torch.tensor([[0.0, 0, 9, 9], window]), (5, 5))
    with pytest.raises(ValueError, match="window_features: windows must be"):
        make().window_features(torch.rand(3, 60, 60), torch.tensor([window]))
    with pytest.raises(ValueError, match=r"windows must be \[K, 4\], got \[4\]"):
        map_windows(torch.tensor(window), (5, 5))


def test_scales():
    assert scaled_size((375, 500), 480) == (480, 640)
    assert scaled_size((500, 375), 480) == (640, 480)
    # An image of 500 x 400: factors 1.2, 1.44, 1.72, 2.16, 3
    windows = torch.tensor(
        [[0, 0, 400, 500], [0, 0, 224 / 1.44, 224 / 1.44], [9, 9, 139, 139], [0, 0, 104, 104], [0, 0, 9, 9]]
    )
    assert choose_scales(windows, (500, 400)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["zf5_spp", "zf5"])
def test_window_features(name):
    """Of each window those that the maps of its scale have in its region; of the whole image those of the image."""
    model = make(name)
    image = torch.rand(3, 100, 150)
    windows = torch.tensor([[0, 0, 150, 100], [20, 10, 90, 70], [40, 40, 70, 80], [0, 0, 150, 100], [100, 3, 140, 50]])
    scales, side = (100, 150, 240), 100
    with torch.no_grad():
        pooled = model.window_features(image, windows, scales=scales, side=side)
        chosen = choose_scales(windows, (100, 150), scales, side).tolist()
        assert set(chosen) == {0, 1, 2}
        for window, i, features in zip(windows.tolist(), chosen, pooled, strict=True):
            size = scaled_size((100, 150), scales[i])
            maps = model.features(F.interpolate(image[None], size, mode="bilinear"))
            ratio = (size[1] / 150, size[0] / 100) * 2
            region = map_windows(torch.tensor([[x * r for x, r in zip(window, ratio, strict=True)]]), maps.shape[2:])
            x1, y1, x2, y2 = region[0].tolist()
            expected = spatial_pyramid_pool2d(maps[0, :, y1:y2, x1:x2], model.levels or (6,))
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        if model.levels:
            torch.testing.assert_close(pooled[0], model.pool(model.features(image[None]))[0], rtol=0, atol=0)
        assert model.classify(pooled).shape == (5, 5)
        assert model.window_features(image, windows[:0]).shape == (0, pooled.shape[1])


def test_window_features_have_gradients():
    model = make()
    pooled = model.window_features(
        torch.rand(3, 60, 60), torch.tensor([[0, 0, 60, 60], [9, 9, 20, 20]]), scales=(60, 90)
    )
    pooled.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.features.parameters())


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_images_of_many_sizes():
    """In one call, or each by itself; training on them moves the one set of weights."""
    model = make()
    images = [torch.rand(3, *size) for size in ((31, 31), (64, 200), (224, 224), (180, 180))]
    with torch.no_grad():
        together = model(images)
        for image, logits in zip(images, together, strict=True):
            torch.testing.assert_close(model(image[None])[0], logits)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for side in (112, 90):
        loss = F.cross_entropy(model(torch.rand(2, 3, side, side)), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_a_pyramid_there_is_one_size():
    model = make("zf5")
    assert model(torch.rand(1, 3, 224, 224)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"must give 6 x 6, as for images of 224 x 224; it gives 4 x 4"):
        model(torch.rand(1, 3, 180, 180))


def test_on_other_convolutions():
    torch.manual_seed(0)
    vgg = torchvision.models.vgg11(weights=None).features[:-1]
    model = SPPNet(vgg, 512, (4, 2, 1), num_classes=7, hidden=16).eval()
    with torch.no_grad():
        assert model([torch.rand(3, 32, 70), torch.rand(3, 50, 40)]).shape == (2, 7)
    assert model.fc6.in_features == 512 * 21
