"""More layers make a plain net train worse, and a residual net better: CIFAR nets of 20 and 56 layers on digits.

Section 4.2 and Figure 6, on scikit-learn's handwritten digits with half of the channels: 150 steps each. What counts is
the error in training; the plain nets have batch norm and He's initialisation as the residual ones have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pyzoo.data import digits
from pyzoo.models.resnet import CifarResNet
from pyzoo.reproduce import _classification
from pyzoo.reproduce._classification import error_of

STEPS, WARM_UP, BATCH = 150, 20, 64


def reproduce(report) -> None:
    from matplotlib.figure import Figure

    images, labels = digits()
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(report.seed))
    images, labels = images[order[:1280]], labels[order[:1280]]

    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    loss, error = {}, {}
    for depth in (20, 56):
        for kind, shortcut in (("plain", None), ("resnet", "A")):
            name = f"{kind}-{depth}"
            torch.manual_seed(report.seed)
            model = CifarResNet(depth, widths=(8, 16, 32), in_channels=1, shortcut=shortcut)
            curve = train(model, images, labels)
            loss[name], error[name] = sum(curve[-20:]) / 20, error_of(model, images, labels)
            report.note(f"{name:10} loss {loss[name]:.3f}, training error {error[name]:.1%}")
            axes.plot(curve, label=name, linestyle="-" if shortcut else "--", linewidth=1 if depth == 20 else 2.5)

    claim = "a deeper plain net has the higher training error (Figure 1, Figure 6 left)"
    measured = f"loss {loss['plain-56']:.2f} with 56 layers, {loss['plain-20']:.2f} with 20"
    report.check("plain nets degrade with depth", claim, measured, loss["plain-56"] > 1 > 2 * loss["plain-20"])
    claim = "residual nets of 56 layers train, to a low error (Figure 6 middle)"
    measured = f"loss {loss['resnet-56']:.3f}, training error {error['resnet-56']:.1%}"
    report.check("residual nets do not", claim, measured, loss["resnet-56"] < 0.2 and error["resnet-56"] < 0.06)
    norms = [gradient_norm(shortcut, images[:64], labels[:64], report.seed) for shortcut in (None, "A")]
    report.note("gradient of the first of 56 layers at the start, without batch norm: {:.0e}, {:.0e}".format(*norms))

    axes.set(xlabel="step", ylabel="training loss", ylim=(0, 3), title="ResNet: depth helps with shortcuts only")
    axes.legend()
    report.save(axes.figure)


def train(model, images, labels) -> list[float]:
    """SGD as in Section 4.2, with its warm-up; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP))
    return _classification.train(model, images, labels, optimizer, schedule, STEPS, BATCH)


def gradient_norm(shortcut, images, labels, seed) -> float:
    torch.manual_seed(seed)
    model = CifarResNet(56, widths=(8, 16, 32), in_channels=1, shortcut=shortcut)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            model.set_submodule(name, torch.nn.Identity())
    F.cross_entropy(model(images), labels).backward()
    return model.conv1.weight.grad.norm().item()
