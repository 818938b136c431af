"""Finds what stands out in photographs with pyzoo, repeats each step with torchvision, compares results and times.

    python demo/photographs.py [--image PATH ...]

Without arguments it takes the two photographs that scikit-learn ships. It is the first half of a detector in which
nothing is trained: a convolutional pyramid marks what differs from the photograph's margin, a region proposal head
scores nine boxes at each position by what stands out inside minus what stands out around, non-maximum suppression
keeps the best, and RoIAlign and RoIPool cut out their features, as a second stage would need them. The weights are
formulas: Gabor filters, opponent colors, boxes. Pictures go to out/demo. Exits with 1 if a result differs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

import pyzoo
from pyzoo._ext import C

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import measure

LONG_SIDE = 640  # larger photographs are scaled down to it, in pixels
STRIDES = (8, 16, 32)
ANCHOR_SCALES = (12, 12 * 2 ** (1 / 3), 12 * 2 ** (2 / 3))  # side of a square anchor in strides
ANCHOR_RATIOS = (2 / 3, 1, 3 / 2)  # height / width
SIZE_BONUS = 0.75  # power of a box's area in its score: a part of an object stands out as much as all of it
SURROUND = 1.4  # side of a box with what is around it, in sides of the box
BINS = 7
PROPOSALS = 1000
COLOURS = ("red", "orange", "yellow", "lime", "cyan")


# -------------------------------------------------------------------------------------------------------------- pyramid


def gaussian(size: int, sigma: float) -> Tensor:
    x = torch.arange(size) - (size - 1) / 2
    g = torch.exp(-(x**2) / (2 * sigma**2))
    return torch.outer(g, g) / g.sum() ** 2


def gabor(size: int, angle: float, phase: float, wavelength: float = 4, sigma: float = 2) -> Tensor:
    """An edge or line detector of one direction; blind to uniform areas."""
    y, x = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij")
    wave = torch.cos(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / wavelength + phase)
    kernel = wave * gaussian(size, sigma)
    kernel = kernel - kernel.mean()
    return kernel / kernel.abs().sum()


class Pyramid(nn.Module):
    """Opponent colors, halved again and again; 96 oriented filters and a map of what stands out at each of STRIDES."""

    def __init__(self):
        super().__init__()
        light, red_green, blue_yellow = [1 / 3, 1 / 3, 1 / 3], [1, -1, 0], [-1 / 2, -1 / 2, 1]
        angles = [i * math.pi / 8 for i in range(8)]
        filters = torch.stack([gabor(9, angle, i * math.pi / 2) for angle in angles for i in range(4)])
        self.register_buffer("opponent", torch.tensor([light, red_green, blue_yellow])[:, :, None, None])
        self.register_buffer("blur", gaussian(5, 1).expand(3, 1, 5, 5))
        self.register_buffer("filters", filters[:, None].repeat(3, 1, 1, 1))

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[1, 3, H, W] in 0..1 -> features [1, 96, Hi, Wi] and maps [1, 1, Hi, Wi] in -0.3..1, both finest first."""
        x, colors = F.conv2d(image, self.opponent), []
        for i in range(1, int(math.log2(STRIDES[-1])) + 1):
            x = F.conv2d(F.pad(x, [2] * 4, mode="replicate"), self.blur, stride=2, groups=3)
            if 2**i in STRIDES:
                colors.append(x)
        features = [F.conv2d(F.pad(x, [4] * 4, mode="replicate"), self.filters, groups=3).relu() for x in colors]
        return features, self.standing_out(colors)

    @staticmethod
    def standing_out(colors: list[Tensor]) -> list[Tensor]:
        """The color distance of each pixel from the margin of the photograph, in the spread of the colors there.

        What touches the margin is background: Wei et al., "Geodesic Saliency Using Background Priors", 2012.
        """
        finest = colors[0][0]
        sides = (finest[:, :2], finest[:, -2:], finest[:, :, :2], finest[:, :, -2:])
        margin = torch.cat([side.flatten(1) for side in sides], 1)
        mean, spread = margin.mean(1)[:, None, None], torch.cov(margin) + 1e-4 * torch.eye(3)
        whiten = torch.linalg.inv(torch.linalg.cholesky(spread))[:, :, None, None]
        maps = [F.conv2d(x - mean, whiten).norm(dim=1, keepdim=True) for x in colors]
        for i in reversed(range(len(maps) - 1)):  # top down, as in a feature pyramid network: fills gaps in objects
            maps[i] = (maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:], mode="bilinear")) / 2
        middle, width = maps[0].mean() + maps[0].std() / 2, maps[0].std() / 2 + 1e-6
        return [F.leaky_relu(((x - middle) / width).tanh(), 0.3) for x in maps]


# ---------------------------------------------------------------------------------------------------------------- boxes


def anchor_sides() -> list[tuple[float, float]]:
    """(width, height) of the boxes at each position, in strides."""
    return [(scale / math.sqrt(ratio), scale * math.sqrt(ratio)) for scale in ANCHOR_SCALES for ratio in ANCHOR_RATIOS]


def anchors(height: int, width: int, stride: int) -> Tensor:
    """Boxes [height * width * 9, 4] around each position of a level, in pixels of the photograph."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) * stride, (torch.arange(width) + 0.5) * stride, indexing="ij")
    centres, sides = torch.stack([x, y], 2).reshape(-1, 1, 2), torch.tensor(anchor_sides()) * stride
    return torch.cat([centres - sides / 2, centres + sides / 2], 2).reshape(-1, 4)


def proposal_head() -> Tensor:
    """Weights [9, 2, k, k]: the mean of a map inside each anchor, minus 1.5 times that of its positive part around."""
    reach = math.ceil(SURROUND * max(map(max, anchor_sides())) / 2)
    position = torch.arange(-reach, reach + 1).abs()

    def box(width: float, height: float) -> Tensor:
        return torch.outer(*[(side / 2 - position + 0.5).clamp(0, 1) for side in (height, width)])

    def weights(width: float, height: float) -> Tensor:
        inside = box(width, height)
        around = box(SURROUND * width, SURROUND * height) - inside
        return torch.stack([inside / inside.sum(), -1.5 * around / around.sum()]) * (width * height) ** SIZE_BONUS

    return torch.stack([weights(width, height) for width, height in anchor_sides()])


def propose(maps: list[Tensor], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """All anchors [n, 4], clipped to the photograph, their scores [n] and levels [n]."""
    head = proposal_head()
    boxes, scores, levels = [], [], []
    for level, (x, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        contrast = F.conv2d(torch.cat([x, x.relu()], 1), head, padding=head.shape[-1] // 2)
        box = anchors(*x.shape[2:], stride).clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        boxes.append(box)
        scores.append(contrast[0].permute(1, 2, 0).flatten() * (stride**2 / (height * width)) ** SIZE_BONUS)
        levels.append(torch.full((len(box),), level))
    return torch.cat(boxes), torch.cat(scores), torch.cat(levels)


# ----------------------------------------------------------------------------------------------------------- comparison


class Comparison:
    """Runs each step with both libraries, insists on equal results, and prints the times side by side."""

    def __init__(self, runs: int):
        self.budget = measure.Budget(seconds=5, max_pairs=runs, min_pairs=min(runs, 3))
        self.total = [0.0, 0.0]
        print(f"  {'':54}{'torchvision':>12}{'pyzoo':>10}{'faster':>9}")

    def step(self, what: str, call: Callable):
        """What ``call(pyzoo.ops)`` returns, after ``call(torchvision.ops)`` returned the same.

        The same means equal indices, and values equal to rounding.
        """
        ours, theirs = call(pyzoo.ops), call(torchvision.ops)
        to_rounding = SimpleNamespace(exact=False, tolerances={})
        try:
            measure.assert_agrees(measure.tensors_of(ours), measure.tensors_of(theirs), to_rounding)
        except measure.Disagreement as error:
            sys.exit(f"  {what}: pyzoo and torchvision differ: {error}")
        samples = measure.interleave([lambda: call(pyzoo.ops), lambda: call(torchvision.ops)], self.budget)
        times = [statistics.median(s) for s in samples]
        self.total = [sum(pair) for pair in zip(self.total, times, strict=True)]
        self.row(what, *times, measure.paired_ratio(*samples))
        return ours

    def summary(self) -> None:
        self.row("all steps", *self.total, self.total[1] / self.total[0])

    @staticmethod
    def row(what: str, ours: float, theirs: float, ratio: float) -> None:
        print(f"  {what:54}{theirs * 1e3:9.1f} ms{ours * 1e3:7.1f} ms{ratio:8.1f}x", flush=True)


def detect(image: Tensor, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [n, 4] of what stands out, best first, their scores [n], and the map [h, w] they were found in."""
    height, width = image.shape[2:]
    features, maps = Pyramid()(image)
    boxes, scores, levels = propose(maps, height, width)
    names = [str(stride) for stride in STRIDES]
    compare = Comparison(runs)

    def suppress_in_level(ops):
        keep = ops.batched_nms(boxes, scores, levels, 0.7)
        return keep.sort().values, scores[keep]  # boxes of equal score may come in any order from torchvision

    keep, _ = compare.step(f"best of {len(boxes)} anchors, by level (batched_nms, 0.7)", suppress_in_level)
    keep = keep[scores[keep].argsort(descending=True)][:PROPOSALS]
    proposals, count, channels = [boxes[keep]], len(keep), features[0].shape[1]

    def pool(ops, inputs=features):
        pooler = ops.MultiScaleRoIAlign(names, BINS, 2)
        return pooler(dict(zip(names, inputs, strict=True)), proposals, [(height, width)])

    def pool_with_gradient(ops):
        inputs = [x.detach().requires_grad_() for x in features]
        pooled = pool(ops, inputs)
        return pooled.detach(), torch.autograd.grad(pooled.square().sum(), inputs)

    def max_pool(ops):
        return ops.roi_pool(features[0], proposals, BINS, 1 / STRIDES[0])

    compare.step(f"pool {count} boxes x {channels} channels (MultiScaleRoIAlign)", pool)
    compare.step("the same and its gradient", pool_with_gradient)
    compare.step(f"pool {count} boxes x {channels} channels (roi_pool)", max_pool)
    keep = compare.step(f"best of {len(boxes)} anchors (nms, 0.1)", lambda ops: ops.nms(boxes, scores, 0.1))
    compare.summary()
    keep = keep[scores[keep] > 0.1 * scores[keep[:1]]][: len(COLOURS)]
    return boxes[keep], scores[keep], maps[0][0, 0]


# ------------------------------------------------------------------------------------------------------------- pictures


def photographs(paths: list[Path]) -> list[tuple[str, Image.Image]]:
    """(name, picture) of the files, or of the photographs that scikit-learn ships."""
    if not paths:
        from sklearn.datasets import load_sample_images

        sample = load_sample_images()
        names = [Path(name).stem for name in sample.filenames]
        return list(zip(names, map(Image.fromarray, sample.images), strict=True))
    images = []
    for path in paths:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        image.thumbnail((LONG_SIDE, LONG_SIDE))
        images.append((path.stem, image))
    return images


def draw(photograph: Image.Image, boxes: Tensor, scores: Tensor, standing_out: Tensor) -> Image.Image:
    """The photograph with the boxes, and beside it the map they were scored on."""
    width, height = photograph.size
    grey = Image.fromarray((standing_out.clamp(0, 1) * 255).byte().numpy()).resize(photograph.size)
    picture = Image.new("RGB", (2 * width, height))
    picture.paste(photograph, (0, 0))
    picture.paste(grey, (width, 0))
    pen = ImageDraw.Draw(picture)
    found = list(zip(boxes.tolist(), scores.tolist(), COLOURS, strict=False))
    for (x1, y1, x2, y2), score, color in reversed(found):  # the best on top
        for left in (0, width):
            pen.rectangle((left + x1, y1, left + min(x2, width - 1), min(y2, height - 1)), outline=color, width=3)
        pen.text((width + x1 + 6, y1 + 4), f"{score:.2f}", fill=color)
    return picture


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--image", nargs="+", type=Path, default=[], metavar="PATH", help="your own photographs")
    add("-o", "--output", type=Path, default=Path("out/demo"), metavar="DIR", help="folder (default: %(default)s)")
    add("--runs", type=int, default=7, metavar="N", help="measure each step at most so often (default: %(default)s)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    versions = f"pyzoo {pyzoo.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}"
    print(f"{versions}; {torch.get_num_threads()} threads, {C.build_info()['isa']}")
    for name, photograph in photographs(args.image):
        print(f"\n{name}, {photograph.width} x {photograph.height} pixels")
        image = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None] / 255
        boxes, scores, standing_out = detect(image, args.runs)
        path = args.output / f"{name}.png"
        draw(photograph, boxes, scores, standing_out).save(path)
        print(f"  all results equal; boxes drawn: {len(boxes)}, in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
