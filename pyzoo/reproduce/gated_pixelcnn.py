"""PixelCNN draws digits, better if it sees all pixels before, through gates, and knows the class or what was encoded.

Sections 2 and 3 on scikit-learn's 8 x 8 digits with four levels of grey; and what a map s = m(h) is for, on noise with
a bright square somewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo._extras import need
from pyzoo.data import digits
from pyzoo.models.gated_pixelcnn import (
    Autoregressive,
    GatedPixelCNN,
    PixelCNN,
    PixelCNNAutoEncoder,
    bits_per_dim,
    gate,
    init_weights,
    make_head,
)
from pyzoo.nn import MaskedConv2d
from pyzoo.reproduce import Report

LEVELS, BATCH = 4, 50
STEPS, RATE = 420, 3e-3  # 15 epochs: after many more, 1437 digits are learned by heart
RUNS = 3  # of each of the nets that are compared
OPTIONS = {"layers": 4, "kernel": 3, "first_kernel": 3, "head": 32}  # small kernels: the blind spot is larger
GATED = {"channels": 1, "levels": LEVELS, "width": 16, **OPTIONS}


class GatedSingleStack(Autoregressive):
    """One stack of masked convolutions, as PixelCNN, with gated units."""

    def __init__(self, width: int):
        super().__init__(1, LEVELS)
        kernels = [OPTIONS["first_kernel"], *[OPTIONS["kernel"]] * OPTIONS["layers"]]
        self.first = MaskedConv2d(1, 2 * width, kernels[0], mask="A", gates=2)
        self.convs = nn.ModuleList(MaskedConv2d(width, 2 * width, k, mask="B", gates=2) for k in kernels[1:])
        self.outputs = nn.ModuleList(MaskedConv2d(width, width, 1, mask="B") for _ in kernels)
        self.head = make_head(width, OPTIONS["head"], 1, LEVELS)
        init_weights(self)

    def logits(self, image: Tensor, s: None = None) -> Tensor:
        h = self.outputs[0](gate(self.first(image)))
        for conv, output in zip(self.convs, self.outputs[1:], strict=True):
            h = h + output(gate(conv(h)))
        return self.head(h).unflatten(1, (1, LEVELS))


NETS: dict[str, Callable[[], Autoregressive]] = {  # thousands of weights that count
    "two stacks, gated": partial(GatedPixelCNN, **GATED),  # 23.6
    "two stacks, ReLU": partial(GatedPixelCNN, gated=False, **GATED),  # 11.5
    "two stacks, ReLU, more maps": partial(GatedPixelCNN, gated=False, **{**GATED, "width": 23}),  # 23.2
    "one stack, gated": partial(GatedSingleStack, 22),  # 22.8
    "one stack, ReLU": partial(PixelCNN, **{**GATED, "width": 24}),  # 22.6
}


def reproduce(report: Report) -> None:
    """Checks the papers' claims; see the module."""
    (images, labels), (tests, test_labels) = quantized("train"), quantized("test")
    judge = need("sklearn.linear_model", "pyzoo reproduce gated_pixelcnn").LogisticRegression(max_iter=1000)
    judge.fit(images.flatten(1), labels)

    def agrees(samples: Tensor, classes: Tensor) -> float:
        return float((judge.predict(samples.flatten(1)) == classes.numpy()).mean())

    def trained(make: Callable[[], nn.Module], *data: Tensor, seed: int = 0, **options) -> nn.Module:
        torch.manual_seed(report.seed + seed)
        model = make()
        learn(model, lambda: batch(*data), **options)
        return model

    check_order(report)

    bits, models = {}, {}
    for name, make in NETS.items():
        models[name] = [trained(make, images, seed=seed) for seed in range(RUNS)]
        found = [bits_of(model, tests) for model in models[name]]
        bits[name] = sum(found) / RUNS
        report.note(f"{name}: {', '.join(f'{value:.3f}' for value in found)} bits per pixel of new digits")
    best = bits["two stacks, gated"]
    for name, what, margin in (
        ("two stacks, ReLU", "gated units beat as many of ReLU", 0.005),
        ("one stack, gated", "two stacks beat one of as many weights, which has a blind spot", 0.005),
        ("one stack, ReLU", "Gated PixelCNN beats PixelCNN of as many weights", 0.01),
    ):
        claimed = "3.03, not 3.14, bits per value of CIFAR-10, both together"
        measured = f"{best:.3f}, not {bits[name]:.3f}, the mean of {RUNS} runs"
        report.check(what, claimed, measured, best < bits[name] - margin)
    equal = bits["two stacks, ReLU, more maps"]
    report.note(f"more units of ReLU, with as many weights as the gated ones, have {equal:.3f}: nothing to claim there")

    model = trained(partial(GatedPixelCNN, condition=10, **GATED), images, labels)
    told = bits_of(model, tests, test_labels)
    measured = f"{told:.3f} bits per pixel, {best:.3f} without"
    report.check("knowing the class", "helps the likelihood a little", measured, told < best)
    classes = torch.arange(10).repeat(100)
    generator = torch.Generator().manual_seed(report.seed)
    samples = model.sample((1000, 8, 8), classes, generator=generator)
    share, real = agrees(samples, classes), agrees(tests, test_labels)
    measured = f"{share:.0%} of 1000 are what was asked for, says a classifier that has {real:.0%} of real ones right"
    report.check("samples of a class look like it", "they do (Figure 3)", measured, share >= 0.7)

    upper = torch.arange(8)[:, None] < 4
    free = models["two stacks, gated"][0]
    halves = [free.sample((len(tests), 8, 8), image=tests, known=upper, generator=generator) for _ in range(3)]
    share = agrees(halves[0], test_labels)
    report.check("lower halves drawn for upper ones fit", "no figure", f"{share:.0%} are the digit", share >= 0.5)

    make = partial(PixelCNNAutoEncoder, 10, (8, 8), maps=(32, 48, 64), location=(8, 8), **GATED)
    encoder = trained(make, images, steps=600, rate=4e-3)
    coded = bits_of(encoder, tests)
    drawn = [encoder.reconstruct(tests, generator=generator) for _ in range(3)]
    measured = f"{coded:.3f} bits per pixel given 10 numbers of the image, {best:.3f} without"
    report.check("auto-encoder: h says much of the image", "no figure", measured, coded < best - 0.05)
    same = min(agrees(x, test_labels) for x in drawn)
    differ = (drawn[0] != drawn[1]).float().mean().item()
    measured = f"{same:.0%} are the digit that was encoded; two drawn for one h differ in {differ:.0%} of the pixels"
    report.check(
        "its samples vary and keep what is there", "they do (Figure 5)", measured, same >= 0.65 and differ >= 0.1
    )

    check_location(report)
    check_speed(report)
    report.save(picture(samples, tests, upper, halves, drawn))


# ----------------------------------------------------------------------------------------------------- data, training


def quantized(split: str) -> tuple[Tensor, Tensor]:
    images, labels = digits(split)
    return (images * (LEVELS - 1)).round().long(), labels


def batch(*data: Tensor) -> tuple[Tensor, ...]:
    picked = torch.randint(len(data[0]), (BATCH,))
    return tuple(part[picked] for part in data)


def learn(model: nn.Module, draw: Callable[[], tuple[Tensor, ...]], steps: int = STEPS, rate: float = RATE) -> None:
    """Adam; from the middle on the rate falls to zero."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / steps))
    for _ in range(steps):
        x, *h = draw()
        optimizer.zero_grad()
        bits_per_dim(model(x, *h), x).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def bits_of(model: nn.Module, x: Tensor, *h: Tensor) -> float:
    return bits_per_dim(model(x, *h), x).item()


# ------------------------------------------------------------------------------------- order, location, speed, picture


def check_order(report: Report, layers: int = 3) -> None:
    """The derivatives of the logits of a pixel in all pixels of a window."""
    side = 3 + layers
    order = torch.arange((2 * side + 1) ** 2).view(2 * side + 1, 2 * side + 1)
    before, counts = order < order[side, side], {}
    for kind in (GatedPixelCNN, PixelCNN):
        torch.manual_seed(report.seed)
        model = kind(1, LEVELS, width=24, layers=layers, kernel=3, head=24).double()
        x = torch.randn(10, 1, *order.shape, dtype=torch.float64, requires_grad=True)
        model.logits(x)[..., side, side].square().sum().backward()
        seen = (x.grad != 0).any(0)[0]
        counts[kind] = [int(part.sum()) for part in (seen & ~before, before & ~seen, before)]
    (late, unseen, all_), (late_old, unseen_old, _) = counts.values()
    measured = f"{late} and {late_old} derivatives in later pixels or the pixel itself are not zero"
    report.check("(Gated) PixelCNN sees no later pixel", "none", measured, late == late_old == 0)
    measured = f"{unseen} of the {all_} before in a window are missed, by PixelCNN {unseen_old}"
    report.check("no blind spot", "all are seen", measured, unseen == 0 < unseen_old)


def check_location(report: Report) -> None:
    """Noise, in one of 16 places a bright square; h is the place."""

    def draw(count: int = 32) -> tuple[Tensor, Tensor]:
        place = torch.randint(16, (count,))
        bright = F.one_hot(place, 16).view(count, 1, 4, 4).float()
        return (torch.rand(count, 1, 16, 16) < 0.3 + 0.67 * F.interpolate(bright, scale_factor=4)).long(), place

    torch.manual_seed(report.seed)
    tests, bits = draw(500), {}
    for name, location in (("h", None), ("s = m(h)", (16, 16))):
        torch.manual_seed(report.seed)
        model = GatedPixelCNN(1, 2, width=16, layers=3, kernel=5, head=16, condition=16, location=location)
        learn(model, draw, 200, 5e-3)
        bits[name] = bits_of(model, *tests)
    entropy = sum(-n / 16 * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) for n, p in ((15, 0.3), (1, 0.97)))
    measured = ", ".join(f"{value:.3f} with {name}" for name, value in bits.items()) + f"; the entropy is {entropy:.3f}"
    holds = bits["s = m(h)"] < min(bits["h"] - 0.005, entropy + 0.006)
    report.check("if h says what is where, a map does better", "no figure", measured, holds)


def check_speed(report: Report) -> None:
    """Same uniforms: the same images, but for a value whose uniform is within rounding of a step of the cdf."""
    torch.manual_seed(report.seed)
    model = GatedPixelCNN(1, LEVELS, width=16, layers=4, kernel=3, head=16)
    uniforms, seconds, images = torch.rand(4, 1, 16, 16, dtype=torch.float64), [], []
    model.sample((4, 16, 16))
    for cached in (True, False):
        started = time.perf_counter()
        images.append(model.sample((4, 16, 16), uniforms=uniforms, cached=cached))
        seconds.append(time.perf_counter() - started)
    fast, slow = seconds
    measured = f"{slow / fast:.0f} x, {1000 * fast:.1f} and {1000 * slow:.0f} ms for 4 images of 16 x 16"
    equal = torch.equal(*images)
    report.check(
        "cached sampling draws the same, faster", "(arXiv 1704.06001) up to 183 x", measured, equal and slow > 5 * fast
    )


def picture(samples: Tensor, tests: Tensor, upper: Tensor, halves: list[Tensor], drawn: list[Tensor]):
    from matplotlib.figure import Figure

    hidden = torch.where(upper, tests, -1).float().masked_fill(~upper, torch.nan)
    rows = {
        "drawn, given the class": samples.view(100, 10, 8, 8)[:4],
        "upper half given, then completed three times": torch.stack([x[:10, 0].float() for x in (hidden, *halves)]),
        "a digit, then three drawn from its code of 10 numbers": torch.stack([x[:10, 0] for x in (tests, *drawn)]),
    }
    figure = Figure(figsize=(12, 2.2), layout="constrained")
    for axes, (title, cells) in zip(figure.subplots(1, len(rows)), rows.items(), strict=True):
        cells = F.pad(cells.float(), (1, 1, 1, 1), value=torch.nan)  # [4, 10, 10, 10]
        axes.imshow(cells.transpose(1, 2).flatten(2).flatten(0, 1), cmap="gray", vmin=0, vmax=LEVELS - 1)
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    return figure
