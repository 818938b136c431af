"""Why the deep nets were trained in stages: from N(0, 0.01) they do not start, from He's or with batch norm they do.

Section 3.1.1 of the paper: configuration A begins with random weights of that deviation, deeper nets with A's. On
scikit-learn's digits, with an eighth of the channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyzoo.data import digits
from pyzoo.models.vgg import VGG
from pyzoo.reproduce import Report

# What is trained: configuration, options, steps.
RUNS = {
    "vgg11, He": ("A", {}, 350),
    "vgg11, He, batch norm": ("A", {"batch_norm": True}, 250),
    "vgg16, N(0, 0.01)": ("D", {"init": "normal"}, 300),
    "vgg16, N(0, 0.01), batch norm": ("D", {"init": "normal", "batch_norm": True}, 450),
}
SAMPLES, BATCH, RATE = 1000, 50, 0.01


def reproduce(report: Report) -> None:
    """Checks the paper's claims; see the module."""
    images, labels = digits()
    images, labels = F.interpolate(images[:SAMPLES], (32, 32), mode="bilinear") * 2 - 1, labels[:SAMPLES]
    losses, errors = {}, {}
    for name, (config, options, steps) in RUNS.items():
        torch.manual_seed(report.seed)
        model = VGG(config, 10, width=8, hidden=128, in_channels=1, **options)
        if not options:  # for linear layers 0.01 is He's with 20000 inputs, but these have 1568 and 128
            for layer in model.classifier[::3]:
                torch.nn.init.kaiming_normal_(layer.weight)
        losses[name], errors[name] = train(model, images, labels, steps)
        report.note(f"{name:30} loss {losses[name][-1]:.3f}, {errors[name]:5.1%} of the training digits wrong")
    for name in list(RUNS)[:2]:
        report.check(f"{name}: learns 1000 digits", "below 5 % wrong", f"{errors[name]:.1%}", errors[name] < 0.05)
    stuck, with_bn = list(RUNS)[2:]
    chance = math.log(10)
    report.check(
        f"{stuck}: is where it began after {RUNS[stuck][2]} steps",
        f"a loss of log 10 = {chance:.3f}",
        f"{losses[stuck][-1]:.3f}",
        abs(losses[stuck][-1] - chance) < 0.05,
    )
    report.check(
        f"{with_bn}: learns",
        "a loss below 1.5",
        f"{losses[with_bn][-1]:.3f}",
        losses[with_bn][-1] < 1.5,
    )
    report.save(plot(losses))


def train(model: VGG, images: Tensor, labels: Tensor, steps: int) -> tuple[list[float], float]:
    """Losses, each the mean over the last ten steps, and the part of the images that is wrong in the end."""
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    losses = []
    for _ in range(steps):
        batch = torch.randperm(len(images))[:BATCH]
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        wrong = (model(images).argmax(1) != labels).float().mean().item()
    return [sum(losses[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(steps)], wrong


def plot(losses: dict[str, list[float]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in losses.items():
        axes.plot(values, label=name)
    axes.axhline(math.log(10), color="black", linewidth=0.5)
    axes.set(xlabel="step", ylabel="training loss, mean of ten steps", yscale="log")
    axes.legend(frameon=False)
    return figure
