"""A pyramid lets one set of weights take all sizes, better than global pooling; one pass serves all windows.

Small nets on scikit-learn's handwritten digits, upscaled to 24 x 24 and tested from 16 x 16 to 32 x 32, three seeds;
and ZF-5 on 200 windows of an image.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.data import digits
from pyzoo.models.spp_net import PYRAMID_50, SPPNet, zf5

SIDES = (16, 20, 24, 28, 32)
EPOCHS, BATCH, SEEDS = 12, 32, 3
WINDOWS = 200
NETS = {  # levels, sides of the epochs
    "pyramid 4, 2, 1": ((4, 2, 1), (24,)),
    "global maximum": ((1,), (24,)),
    "pyramid, 24 and 18 in turn": ((4, 2, 1), (24, 18)),
}


def reproduce(report) -> None:
    from matplotlib.figure import Figure

    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(report.seed))
    train, test = order[:1297], order[1297:]

    axes = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    errors = {}
    for name, (levels, sides) in NETS.items():
        runs = []
        for seed in range(report.seed, report.seed + SEEDS):
            model = fit(seed, levels, sides, images[train], labels[train])
            runs.append([error_of(model, resized(images[test], side), labels[test]) for side in SIDES])
        errors[name] = torch.tensor(runs).mean(0)
        report.note(f"{name:27} error at {SIDES}: " + ", ".join(f"{e:.1%}" for e in errors[name].tolist()))
        axes.plot(SIDES, errors[name] * 100, marker="o", label=name)
    pyramid, maximum, in_turn = errors.values()

    measured = f"error {pyramid[2]:.1%} at 24, at most {pyramid.max():.1%} from 16 to 32"
    holds = pyramid[2] < 0.1 and pyramid.max() < 0.13
    report.check("one set of weights takes all sizes", "any size, no crop or warp (Section 2)", measured, bool(holds))
    measured = f"at each size, on the average {maximum.mean():.1%} against {pyramid.mean():.1%}"
    claim = "bins of several grids gain over a single level (Table 2)"
    report.check("it beats the global maximum", claim, measured, bool((pyramid < maximum).all()))
    measured = f"error at most {in_turn.max():.1%}"
    report.check(
        "it trains on two sizes in turn",
        "shared weights, an epoch each (Section 2.3)",
        measured,
        bool(in_turn.max() < 0.13),
    )

    once, each, same = time_windows(report.seed)
    measured = f"{once * 1e3:.0f} ms, of each window warped to 224 x 224 {each * 1e3:.0f} ms: {each / once:.0f} times"
    report.check(
        f"{WINDOWS} windows from one pass", "24 to 102 times faster than R-CNN (Table 9)", measured, each > 10 * once
    )
    report.check("the window of a whole image", "has the features of the image", "equal" if same else "not equal", same)

    axes.axvline(24, color="gray", linewidth=0.5)
    axes.set(xlabel="side of the test images (trained at 24)", ylabel="test error, %", ylim=(0, None))
    axes.set_title("SPP-net: one set of weights on images of all sizes")
    axes.legend(loc="upper center")
    report.save(axes.figure)


def resized(images: Tensor, side: int) -> Tensor:
    """[N, 1, 8, 8] -> [N, 3, side, side]: the whole digit, not a crop of it."""
    images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1)


def fit(seed: int, levels, sides, images: Tensor, labels: Tensor) -> SPPNet:
    """Adam; each epoch has one size."""
    torch.manual_seed(seed)
    features = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU()
    )
    model = SPPNet(features, 32, levels, num_classes=10, hidden=256)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(EPOCHS):
        x = resized(images, sides[epoch % len(sides)])
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def error_of(model: SPPNet, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) != labels).float().mean().item()


@torch.no_grad()
def time_windows(seed: int) -> tuple[float, float, bool]:
    """Seconds that the features of windows of a 256 x 256 image take from one pass, and from one each as in R-CNN; and
    whether those of the whole image are the image's."""
    generator = torch.Generator().manual_seed(seed)
    model = zf5(PYRAMID_50, hidden=1).eval()
    image = torch.rand(3, 256, 256, generator=generator)
    corner = torch.rand(WINDOWS, 2, generator=generator) * 190
    windows = (
        torch.cat((corner, corner + 32 + torch.rand(WINDOWS, 2, generator=generator) * 100), 1).clamp(max=256).round()
    )
    windows[0] = torch.tensor([0, 0, 256, 256])

    def once() -> Tensor:
        return model.window_features(image, windows, scales=(256,))

    def each() -> None:
        for x1, y1, x2, y2 in windows.long().tolist():
            model.pool(model.features(F.interpolate(image[None, :, y1:y2, x1:x2], (224, 224), mode="bilinear")))

    same = torch.equal(once()[0], model.pool(model.features(image[None]))[0])
    return min(seconds(once) for _ in range(5)), seconds(each), same


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
