"""PixelCNN draws digits, better if it sees all pixels before, through gates, and knows the class or what was encoded.

Sections 2 and 3 on scikit-learn's 8 x 8 digits with four levels of grey, of which settings have seen two parts, and
figures are of the third; and what a map s = m(h) is for, on noise with a bright square somewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo._extras import need
from pyzoo.models.gated_pixelcnn import GatedPixelCNN, PixelCNNAutoEncoder, gate
from pyzoo.models.pixelcnn import Autoregressive, PixelCNN, bits_per_dim, init_weights, make_head
from pyzoo.nn import MaskedConv2d
from pyzoo.ops.masked_conv2d import live_weights
from pyzoo.reproduce import Report, gain_of
from pyzoo.reproduce._digits import digit_parts

LEVELS, BATCH = 4, 50
# Chosen on the validation digits: with half of the layers gates do no better than ReLU, with twice the steps all nets
# learn the training digits by heart.
STEPS, RATE = 560, 4e-3
OPTIONS = {"layers": 8, "kernel": 3, "first_kernel": 3, "head": 32}  # small kernels: the blind spot is larger
GATED = {"channels": 1, "levels": LEVELS, "width": 12, **OPTIONS}
RUNS = 5  # of each of the nets that are compared, from the same seeds


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


NETS: dict[str, Callable[[], Autoregressive]] = {  # none has fewer weights than the first
    "two stacks, gated": partial(GatedPixelCNN, **GATED),
    "two stacks, ReLU": partial(GatedPixelCNN, gated=False, **{**GATED, "width": 18}),
    "one stack, gated": partial(GatedSingleStack, 17),
    "one stack, ReLU": partial(PixelCNN, **{**GATED, "width": 19}),
}
CONDITIONAL = partial(GatedPixelCNN, condition=10, **GATED)
ENCODER = partial(PixelCNNAutoEncoder, 10, (8, 8), maps=(32, 48, 64), location=(8, 8), **GATED)


def reproduce(report: Report) -> None:
    """Checks the papers' claims; see the module."""
    check_order(report)
    (images, labels), (tests, test_labels) = quantized("train"), quantized("test")
    first = report.seed * RUNS
    with ProcessPoolExecutor(min(4, torch.get_num_threads()), get_context("spawn")) as pool:
        encoder = pool.submit(trained, ENCODER, first, images)
        conditional = pool.submit(trained, CONDITIONAL, first, images, labels)
        nets = {n: [pool.submit(trained, make, first + i, images) for i in range(RUNS)] for n, make in NETS.items()}
        location = {name: pool.submit(trained_location, size, first) for name, size in LOCATIONS.items()}
        models = {name: [run.result() for run in runs] for name, runs in nets.items()}
        encoder, conditional = encoder.result(), conditional.result()
        location = {name: run.result() for name, run in location.items()}

    best = compare(report, models, tests)

    judge = need("sklearn.linear_model", "pyzoo reproduce gated_pixelcnn").LogisticRegression(max_iter=1000)
    judge.fit(images.flatten(1), labels)

    def agrees(samples: Tensor, classes: Tensor) -> float:
        return float((judge.predict(samples.flatten(1)) == classes.numpy()).mean())

    told = bits_of(conditional, tests, test_labels)
    measured = f"{told:.3f} bits per pixel, {best:.3f} without"
    report.check("knowing the class", "helps the likelihood a little", measured, told < best)
    classes = torch.arange(10).repeat(100)
    generator = torch.Generator().manual_seed(report.seed)
    samples = conditional.sample((1000, 8, 8), classes, generator=generator)
    share, real = agrees(samples, classes), agrees(tests, test_labels)
    measured = f"{share:.0%} of 1000 are what was asked for, says a classifier that has {real:.0%} of real ones right"
    report.check("samples of a class look like it", "they do (Figure 3)", measured, share >= 0.7)

    upper = torch.arange(8)[:, None] < 4
    free = models["two stacks, gated"][0]
    halves = [free.sample((len(tests), 8, 8), image=tests, known=upper, generator=generator) for _ in range(3)]
    share = agrees(halves[0], test_labels)
    report.check("lower halves drawn for upper ones fit", "no figure", f"{share:.0%} are the digit", share >= 0.5)

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

    check_location(report, location)
    check_speed(report)
    report.save(picture(samples, tests, upper, halves, drawn))


def compare(report: Report, models: dict[str, list[Autoregressive]], tests: Tensor) -> float:
    """Gates against ReLU, two stacks against one: differences of runs from one seed, their mean against its error.
    Returns the bits per pixel of the gated net."""
    bits, sizes = {}, {}
    for name, runs in models.items():
        bits[name] = [bits_of(model, tests) for model in runs]
        sizes[name] = size_of(runs[0])
        found = ", ".join(f"{value:.3f}" for value in bits[name])
        report.note(f"{name}, {sizes[name]} weights: {found} bits per pixel of new digits")
    for name, other, what in (
        ("two stacks, gated", "two stacks, ReLU", "gates beat ReLU, at equal size"),
        ("two stacks, gated", "one stack, gated", "two stacks beat one, which has a blind spot"),
        ("two stacks, ReLU", "one stack, ReLU", "two stacks beat one, with ReLU"),
        ("two stacks, gated", "one stack, ReLU", "Gated PixelCNN beats PixelCNN"),
    ):
        mean, error = gain_of(bits[name], bits[other])
        means = f"{sum(bits[name]) / RUNS:.3f}, not {sum(bits[other]) / RUNS:.3f}"
        measured = f"{means}: {mean:.4f} +- {error:.4f} bits, of {RUNS} pairs of runs"
        claimed = "3.03, not 3.14, bits per value of CIFAR-10, gates and stacks together"
        report.check(what, claimed, measured, mean > 2 * error and sizes[other] >= sizes[name])
    return sum(bits["two stacks, gated"]) / RUNS


# ----------------------------------------------------------------------------------------------------- data, training


def quantized(part: str) -> tuple[Tensor, Tensor]:
    images, labels = digit_parts()[part]
    return (images * (LEVELS - 1)).round().long(), labels


def trained(make: Callable[[], nn.Module], seed: int, *data: Tensor) -> nn.Module:
    """One run, on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = make()

    def draw() -> tuple[Tensor, ...]:
        picked = torch.randint(len(data[0]), (BATCH,))
        return tuple(part[picked] for part in data)

    learn(model, draw, STEPS, RATE)
    return model


def learn(model: nn.Module, draw: Callable[[], tuple[Tensor, ...]], steps: int, rate: float) -> None:
    """Adam; from the middle on the rate falls to zero."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / steps))
    for _ in range(steps):
        x, *h = draw()
        optimizer.zero_grad()
        bits_per_dim(model(x, *h), x).backward()
        optimizer.step()
        schedule.step()


def size_of(model: nn.Module) -> int:
    """Numbers that are learned; masked weights do not count."""
    masked = 0
    for m in model.modules():
        if isinstance(m, MaskedConv2d):
            order = {"colors": m.colors, "gates": m.gates}
            masked += int((~live_weights(m.out_channels, m.in_channels, m.kernel_size, m.mask, **order)).sum())
    return sum(p.numel() for p in model.parameters()) - masked


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


LOCATIONS = {"h": None, "s = m(h)": (16, 16)}


def draw_location(count: int = 32) -> tuple[Tensor, Tensor]:
    """Noise, in one of 16 places a bright square; h is the place."""
    place = torch.randint(16, (count,))
    bright = F.one_hot(place, 16).view(count, 1, 4, 4).float()
    return (torch.rand(count, 1, 16, 16) < 0.3 + 0.67 * F.interpolate(bright, scale_factor=4)).long(), place


def trained_location(location: tuple[int, int] | None, seed: int) -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = GatedPixelCNN(1, 2, width=16, layers=3, kernel=5, head=16, condition=16, location=location)
    learn(model, draw_location, 200, 5e-3)
    return model


def check_location(report: Report, models: dict[str, nn.Module]) -> None:
    torch.manual_seed(report.seed)
    tests = draw_location(500)
    bits = {name: bits_of(model, *tests) for name, model in models.items()}
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
