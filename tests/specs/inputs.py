"""Inputs that several specs share: feature maps and boxes, ordinary and degenerate, and the floors of the pooling
ops."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

IMAGE_HEIGHT, IMAGE_WIDTH = 800, 1088
NAN, INF = math.nan, math.inf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(*shape: int, dtype=torch.float32, memory_format=torch.contiguous_format, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype).contiguous(memory_format=memory_format)


def random_rois(count: int, images: int, height: float, width: float, *, seed: int = 0) -> Tensor:
    """[K, 5]: corners anywhere in and a little around a map of height x width."""
    g = generator(seed)
    index = torch.randint(images, (count, 1), generator=g).float()
    size = torch.tensor([width, height])
    a, b = (torch.rand(count, 2, generator=g) * 1.4 * size - 0.2 * size for _ in range(2))
    return torch.cat([index, torch.minimum(a, b), torch.maximum(a, b)], dim=1)


def photo_boxes(count: int, *, smallest: float = 16, largest: float = 400, seed: int = 0) -> Tensor:
    """[K, 4] as a detector sees them: sides log-uniform, within an 800 x 1088 image."""
    g = generator(seed)
    side = smallest * (largest / smallest) ** torch.rand(count, 2, generator=g)
    image = torch.tensor([IMAGE_WIDTH, IMAGE_HEIGHT])
    corner = torch.rand(count, 2, generator=g) * (image - side).clamp(min=0)
    return torch.cat([corner, torch.minimum(corner + side, image)], dim=1)


def photo_rois(count: int, images: int, **kwargs) -> Tensor:
    """[K, 5] of :func:`photo_boxes`, the images in order."""
    index = torch.arange(count) * images // max(count, 1)
    return torch.cat([index.float()[:, None], photo_boxes(count, **kwargs)], dim=1)


def boxes_dtype(dtype: torch.dtype) -> torch.dtype:
    """Boxes of half precision features are float32: the mixture that a network under autocast makes."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def pooling_inputs(dtype: torch.dtype, memory_format: torch.memory_format) -> Iterator[tuple]:
    """(id, features, boxes, output_size, spatial_scale, whether the peer is defined there) for the RoI ops."""

    def maps(*shape, seed=0):
        return features(*shape, dtype=dtype, memory_format=memory_format, seed=seed)

    def rois(*rows):
        return torch.tensor(rows).reshape(-1, 5).to(boxes_dtype(dtype))

    def random(*args, **kwargs):
        return random_rois(*args, **kwargs).to(boxes_dtype(dtype))

    x = maps(2, 5, 13, 17)
    boxes = random(9, 2, 26, 34)
    yield "random", x, boxes, (3, 4), 0.5, True
    yield "many_boxes", x, random(70, 2, 13, 17), 2, 1.0, True
    for channels in (1, 3, 17, 33, 64, 130, 260):
        yield f"channels_{channels}", maps(2, channels, 9, 10, seed=channels), random(5, 2, 9, 10, seed=1), 2, 1.0, True
    yield "one_pixel", maps(1, 3, 1, 1), random(4, 1, 2, 2), 2, 1.0, True
    yield "one_row", maps(1, 3, 1, 9), random(4, 1, 2, 9), (1, 3), 1.0, True
    yield "one_bin", x, boxes, 1, 0.5, True
    yield "seven", x, boxes, 7, 0.5, True
    yield "fourteen", x, random(3, 2, 13, 17), (14, 14), 1.0, True
    yield "many_bins", x, random(3, 2, 13, 17), (18, 20), 1.0, True
    yield "scale", x, random(6, 2, 130, 170), (2, 3), 0.1, True
    yield "no_boxes", x, boxes[:0], 2, 1.0, True
    yield "no_images", x[:0], boxes[:0], 2, 1.0, True
    yield "no_channels", x[:, :0], boxes, 2, 0.5, True
    yield "no_rows", x[:, :, :0], boxes, 2, 0.5, False
    yield "no_columns", x[..., :0], boxes, 2, 0.5, False
    yield "box_list", x, [boxes[:3, 1:], boxes[3:, 1:]], 2, 0.5, True
    yield "box_list_empty", x, [boxes[:0, 1:], boxes[:2, 1:]], 2, 0.5, True
    yield "fraction_of_index", x, rois([0.9, 1, 2, 8, 9], [0.5, 1, 2, 8, 9], [1.5, 1, 2, 8, 9]), 2, 1.0, True
    yield (
        "outside",
        x,
        rois([0, -50, -50, -20, -20], [1, 40, 3, 60, 9], [0, 3, -9, 6, 30], [1, -4, 5, 90, 9]),
        2,
        1.0,
        True,
    )
    yield "edges", x, rois([0, 0, 0, 17, 13], [1, -1, -1, 18, 14], [0, 16, 12, 17, 13], [1, 0, 0, 16, 12]), 3, 1.0, True
    yield "inverted", x, rois([0, 9, 8, 3, 2], [1, 9, 2, 3, 8], [1, 3, 8, 9, 2]), 2, 1.0, True
    yield "no_area", x, rois([0, 4, 4, 4, 4], [1, 2, 3, 9, 3], [1, 5.5, 2, 5.5, 9], [0, 0, 0, 0, 0]), 2, 1.0, True
    yield "halves", x, rois([0, 0.5, 1.5, 2.5, 3.5], [1, -0.5, -1.5, 4.5, 6.5], [0, 0.49999997, 1, 3, 5]), 2, 1.0, True
    yield "long", x, rois([0, -3e4, 2, 3e4, 9], [1, 2, -2e4, 9, 1e4]), 2, 1.0, True
    bad = [[0, NAN, 1, 5, 6], [1, 1, NAN, 5, 6], [0, 1, 1, INF, 6], [1, -INF, 1, 5, INF], [1, INF, INF, INF, INF]]
    yield "not_finite", x, rois(*bad, [0, -3e38, 1, 3e38, 9], [1, 1, 2, 8, 9]), 2, 1.0, False
    yield "half_boxes", x, boxes.half(), 2, 0.5, False
    yield "bfloat16_boxes", x, boxes.bfloat16(), 2, 0.5, False
    yield "double_boxes", x, boxes.double(), 2, 0.5, False
    yield "sliced", maps(3, 8, 15, 20)[1:, 1:6, ::2, 2:-1], random(6, 2, 8, 17), 2, 1.0, True
    yield "transposed", maps(2, 5, 17, 13).transpose(2, 3), boxes, 2, 0.5, True
    yield "expanded", maps(1, 1, 13, 17).expand(2, 5, -1, -1), boxes, 2, 0.5, True
    yield "repeated_pixel", maps(2, 5, 1, 1).expand(-1, -1, 13, 17), boxes, 2, 0.5, True
    yield "boxes_transposed", x, boxes.t().contiguous().t(), 2, 0.5, True
    yield "boxes_expanded", x, boxes[:1].expand(5, -1), 2, 0.5, True
    holes = maps(2, 5, 13, 17)
    holes[:, :, 4:7, 3:9] = NAN
    yield "nan_features", holes, boxes, (3, 4), 0.5, True


def small_pooling(call, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple:
    """``OpSpec.small`` of ``call(features, boxes)``. No two features are equal."""
    values = torch.randperm(2 * 2 * 5 * 4, generator=generator()).reshape(2, 2, 5, 4) / 10 - 4
    boxes = torch.tensor([[0, 0.2, 0.3, 3.1, 4.2], [1, 1, 0, 2.5, 2], [0, -1, 2, 6, 3.0]]).to(boxes_dtype(dtype))
    return lambda x: call(x, boxes), (values.to(dtype).contiguous(memory_format=memory_format),)


def export_pooling(tensors: list) -> tuple:
    """``OpSpec.export``: height and width of the maps, and the number of boxes."""
    maps, boxes = tensors
    dim = torch.export.Dim.DYNAMIC
    smaller = tree_map(lambda x: torch.empty_like(x[:, :, 1:, 1:]).copy_(x[:, :, 1:, :-1]), maps)
    return (tree_map(lambda x: {2: dim, 3: dim}, maps), {0: dim}), [smaller, boxes[:5]]


def huge_pooling(call, sparse, memory_format: torch.memory_format) -> tuple:
    """``OpSpec.huge`` of ``call(features, boxes)``: a corner of the last of three maps of 16 x 7168 x 7168."""
    shape, far = (3, 16, 7168, 7168), (slice(2, 3), slice(None), slice(7100, None), slice(7100, None))
    map = sparse(math.prod(shape))
    if memory_format == torch.channels_last:
        map = map.view(3, 7168, 7168, 16).permute(0, 3, 1, 2)
    map = map.view(shape)
    map[far] = features(1, 16, 68, 68, dtype=map.dtype)
    boxes = torch.tensor([[2, 7110, 7105, 7160, 7150], [2, 7140, 7130, 7168, 7168.0]]).to(boxes_dtype(map.dtype))
    return call(map, boxes), call(map[far], boxes - torch.tensor([2, 7100, 7100, 7100, 7100]).to(boxes))


POOLING_ERRORS = (  # id, (replacements of the arguments of a good call), error, match
    (
        "input_rank",
        {"input": torch.zeros(3, 8, 8)},
        ValueError,
        r"input must have shape \[N, C, H, W\], got \[3, 8, 8\]",
    ),
    ("input_integer", {"input": torch.zeros(1, 3, 8, 8).int()}, TypeError, "input must be float32.*got torch.int32"),
    (
        "input_complex",
        {"input": torch.zeros(1, 3, 8, 8).cfloat()},
        TypeError,
        "input must be float32.*got torch.complex64",
    ),
    ("input_array", {"input": [[1.0]]}, TypeError, "input must be a torch.Tensor, got list"),
    ("input_sparse", {"input": torch.zeros(1, 3, 8, 8).to_sparse()}, TypeError, "must be dense"),
    ("boxes_shape", {"boxes": torch.zeros(7, 4)}, ValueError, r"boxes must have shape \[K, 5\], got \[7, 4\]"),
    ("boxes_rank", {"boxes": torch.zeros(5)}, ValueError, r"boxes must have shape \[K, 5\], got \[5\]"),
    ("boxes_integer", {"boxes": torch.zeros(2, 5).long()}, TypeError, "boxes must be float32.*got torch.int64"),
    ("boxes_type", {"boxes": 3}, TypeError, r"boxes must be a Tensor\[K, 5\] or a list of Tensor\[L, 4\], got int"),
    ("boxes_list", {"boxes": [torch.zeros(2, 5)]}, ValueError, r"boxes\[0\] must have shape \[L, 4\], got \[2, 5\]"),
    ("boxes_list_type", {"boxes": [[1.0]]}, TypeError, r"boxes\[0\] must be a torch.Tensor"),
    ("boxes_list_integer", {"boxes": [torch.zeros(2, 4).int()]}, TypeError, r"boxes\[0\] must be float32"),
    (
        "boxes_device",
        {"boxes": torch.zeros(2, 5, device="meta")},
        ValueError,
        "must be on one device, got cpu and meta",
    ),
    ("index_high", {"boxes": torch.tensor([[1.0, 0, 0, 2, 2]])}, ValueError, r"batch index must be in \[0, 1\), got 1"),
    (
        "index_low",
        {"boxes": torch.tensor([[-1.0, 0, 0, 2, 2]])},
        ValueError,
        r"batch index must be in \[0, 1\), got -1",
    ),
    (
        "index_nan",
        {"boxes": torch.tensor([[NAN, 0, 0, 2, 2]])},
        ValueError,
        r"batch index must be in \[0, 1\), got -?nan",
    ),
    ("scale_negative", {"spatial_scale": -1.0}, ValueError, "spatial_scale must be positive and finite, got -1.0"),
    ("scale_zero", {"spatial_scale": 0.0}, ValueError, "spatial_scale must be positive and finite, got 0.0"),
    ("scale_nan", {"spatial_scale": NAN}, ValueError, "spatial_scale must be positive and finite, got nan"),
    ("scale_inf", {"spatial_scale": INF}, ValueError, "spatial_scale must be positive and finite, got inf"),
    ("size_zero", {"output_size": 0}, ValueError, "output_size must be at least 1 x 1, got 0 x 0"),
    ("size_negative", {"output_size": (2, -1)}, ValueError, "output_size must be at least 1 x 1, got 2 x -1"),
    ("size_three", {"output_size": (1, 2, 3)}, ValueError, "output_size must be an int or two ints, got 3 values"),
    ("size_float", {"output_size": 2.5}, TypeError, "output_size must be an int or two ints, got 2.5"),
)


def touched_pixels(rois: Tensor, scale: float, images: int, height: int, width: int) -> int:
    """How many pixels the boxes cover together: what any implementation has to read."""
    touched = torch.zeros(images, height, width, dtype=torch.bool).numpy()
    for image, x1, y1, x2, y2 in (rois * torch.tensor([1, scale, scale, scale, scale])).tolist():
        touched[int(image), max(int(y1), 0) : int(y2) + 2, max(int(x1), 0) : int(x2) + 2] = True
    return int(touched.sum())
