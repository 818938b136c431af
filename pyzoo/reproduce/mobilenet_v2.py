"""A ReLU among few channels destroys what they carry: the spiral of Figure 1, and linear bottlenecks on digits.

Figure 1: a curve in the plane is embedded at random in more dimensions, rectified, and read back linearly as well as
is possible. Figure 6a, on scikit-learn's handwritten digits: thin nets that differ only in a ReLU6 at the end of each
block, with the same parameters and multiplications, in pairs of runs from one seed.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor, nn

from pyzoo.models.mobilenet_v2 import ConvBNReLU6, InvertedResidual, conv1x1, init_weights
from pyzoo.reproduce import _classification, gain_of
from pyzoo.reproduce._classification import error_of
from pyzoo.reproduce._digits import digit_parts

DIMENSIONS, DRAWS = (2, 3, 5, 15, 30), 20
STEPS, BATCH, RATE, SEEDS, CHANNELS = 400, 64, 5e-3, 5, (2, 3, 4)
KINDS = {True: "linear", False: "ReLU6"}


def reproduce(report) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))

    errors = [spiral_error(n, report.seed) for n in DIMENSIONS]
    linear = spiral_error(2, report.seed, linear=True)
    for n, error in zip(DIMENSIONS, errors, strict=True):
        report.note(f"spiral through ReLU in {n:2} dimensions: error {error:.3f} of a signal of {signal():.3f}")
    claim = "what ReLU makes of 2 or 3 dimensions is not recovered, of 15 to 30 it is (Figure 1)"
    measured = ", ".join(f"{n}: {error:.3f}" for n, error in zip(DIMENSIONS, errors, strict=True))
    holds = errors == sorted(errors, reverse=True) and errors[0] > 0.2 and errors[3] < 0.02
    report.check("ReLU loses what lies in few dimensions", claim, measured, holds)
    report.check("a linear map does not", "2 dimensions suffice", f"error {linear:.0e}", linear < 1e-5)
    left.plot(DIMENSIONS, errors, "o-", label="ReLU")
    left.plot([2], [linear], "s", label="linear")
    left.axhline(signal(), color="grey", linestyle=":", label="signal")
    left.set(xlabel="dimensions", ylabel="error of the spiral read back", title="Figure 1", xticks=DIMENSIONS)
    left.legend()

    (images, labels), (tests, test_labels) = (digit_parts()[part] for part in ("train", "test"))
    mean, deviation = images.mean(), images.std()
    images, tests = (images - mean) / deviation, (tests - mean) / deviation
    loss: dict[bool, list[float]] = {True: [], False: []}
    error: dict[bool, list[float]] = {True: [], False: []}
    for channels, seed in product(CHANNELS, range(report.seed * SEEDS, (report.seed + 1) * SEEDS)):
        for is_linear, kind in KINDS.items():
            torch.manual_seed(seed)
            model = thin_net(is_linear, channels)
            curve = train(model, images, labels)
            loss[is_linear].append(sum(curve[-50:]) / 50)
            error[is_linear].append(error_of(model, tests, test_labels))
            if channels == CHANNELS[-1]:
                smooth = torch.tensor(curve).unfold(0, 20, 1).mean(1)
                style = {"color": "C0" if is_linear else "C1", "label": None if seed % SEEDS else kind}
                right.plot(range(20, STEPS + 1), smooth, **style)
    for i, channels in enumerate(CHANNELS):
        for is_linear, kind in KINDS.items():
            found = ", ".join(f"{value:.1%}" for value in error[is_linear][i * SEEDS : (i + 1) * SEEDS])
            report.note(f"{channels} channels between blocks, {kind:6}: test errors {found}")
    parameters = sum(p.numel() for p in thin_net(True).parameters())
    same = parameters == sum(p.numel() for p in thin_net(False).parameters())
    report.check("both cost the same", "a ReLU6 has no parameters", f"{parameters} parameters", same)
    for what, figures, form in (("loss in training", loss, ".3f"), ("test error", error, ".1%")):
        gain, error_of_gain = gain_of(figures[True], figures[False])
        means = " and ".join(f"{sum(figures[key]) / len(figures[key]):{form}} {kind}" for key, kind in KINDS.items())
        measured = f"{means}; {gain:{form}} +- {error_of_gain:{form}} less, of {len(figures[True])} pairs of runs"
        claim = "lower with linear bottlenecks (Figure 6a)"
        report.check(f"{what} of thin nets", claim, measured, gain > 2 * error_of_gain)
    right.set(
        xlabel="step",
        ylabel="training loss, mean of 20 steps",
        yscale="log",
        title=f"Figure 6a, on digits, {CHANNELS[-1]} channels",
    )
    right.legend()
    report.save(figure)


# --------------------------------------------------------------------------------------------------- Figure 1, a spiral


def spiral() -> Tensor:
    """[1000, 2], two turns that fit into the unit circle; float64, as a linear map is to be inverted."""
    t = torch.linspace(0, 4 * math.pi, 1000, dtype=torch.float64)
    return torch.stack([t * t.cos(), t * t.sin()], 1) / (4 * math.pi)


def signal() -> float:
    return spiral().square().mean().sqrt().item()


def spiral_error(n: int, seed: int, linear: bool = False) -> float:
    """Of the best linear map from ReLU(X T) back to X, the mean over random T [2, n]."""
    generator, x, errors = torch.Generator().manual_seed(seed), spiral(), []
    for _ in range(DRAWS):
        y = x @ torch.randn(2, n, generator=generator, dtype=torch.float64)
        y = y if linear else y.relu()
        back = y @ torch.linalg.lstsq(y, x, driver="gelsd").solution
        errors.append((back - x).square().mean().sqrt().item())
    return sum(errors) / DRAWS


# --------------------------------------------------------------------------------------- Figure 6a, thin nets on digits


def thin_net(linear: bool, channels: int = 4) -> nn.Sequential:
    """[N, 1, 8, 8] -> [N, 10]: five blocks between which there are no more than four channels."""
    strides = (1, 1, 2, 1, 1)
    blocks = [InvertedResidual(channels, channels, stride, linear=linear) for stride in strides]
    first = ConvBNReLU6(nn.Conv2d(1, channels, 3, padding=1, bias=False))
    last = ConvBNReLU6(conv1x1(channels, 64))
    model = nn.Sequential(first, *blocks, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    init_weights(model)
    return model


def train(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """The losses of a run whose last quarter has a tenth of the rate."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [STEPS * 3 // 4])
    return _classification.train(model, images, labels, optimizer, schedule, STEPS, BATCH)
