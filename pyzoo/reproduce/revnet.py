"""Backpropagation without stored activations: RevNet-38 on digits, its memory, its rounding errors, its time.

With half of the channels: it learns as ResNet-32, which has as many parameters, and as itself with stored activations.
Then the bytes that autograd keeps, for 1 to 32 units a stage; how far a rebuilt activation is from the original, for a
stack of 32 blocks that has learned; and the time of a training step at full width on images of CIFAR's size.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import pyzoo
from pyzoo.models.resnet import CifarResNet
from pyzoo.models.revnet import RevNet
from pyzoo.reproduce._classification import error_of
from pyzoo.reproduce._digits import digit_parts
from pyzoo.train import fit

# Statistics that follow within 150 steps; the authors train for 80000.
NORM = partial(nn.BatchNorm2d, eps=1e-3)
STEPS, EXACT_STEPS, WARM_UP, BATCH = 200, 40, 20, 64
BLOCKS = 32
UNITS = (1, 2, 4, 8, 16, 32)


def reproduce(report) -> None:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(15, 4.5), layout="constrained").subplots(1, 3)
    learning(report, axes[0])
    memory(report, axes[1])
    rounding(report, axes[2])
    speed(report)
    report.save(axes[0].figure)


# ------------------------------------------------------------------------------------------------------------- learning


def learning(report, axes) -> None:
    nets = {
        "RevNet-38": lambda: make_revnet((3, 3, 3)),
        "stored": lambda: make_revnet((3, 3, 3), reversible=False),
        "ResNet-32": lambda: CifarResNet(32, widths=(8, 16, 32), in_channels=1),
    }
    losses, errors = {}, {}
    for name, make in nets.items():
        torch.manual_seed(report.seed)
        model = make()
        losses[name] = train(model, STEPS, report.seed)
        errors[name] = error_of(model.cpu(), *digit_parts()["test"])
        count = sum(p.numel() for p in model.parameters())
        last = sum(losses[name][-20:]) / 20
        report.note(f"{name:9} {count} parameters, last losses {last:.3f}, error on the test digits {errors[name]:.1%}")
        axes.plot(losses[name], label=name, linestyle="--" if name == "stored" else "-")
    exact = []
    for reversible in (True, False):
        torch.manual_seed(report.seed)
        exact.append(train(make_revnet((3, 3, 3), reversible=reversible).double(), EXACT_STEPS, report.seed))
    apart = max(abs(a - b) for a, b in zip(*exact, strict=True))
    claim = "the same training, up to rounding, which float32 amplifies at each ReLU whose sign it changes"
    measured = f"at most {apart:.0e} apart in {EXACT_STEPS} steps in float64"
    report.check("the losses are those with stored activations", claim, measured, apart < 1e-10)
    claim = "equal accuracy with as many parameters"
    measured = f"errors on the test digits {errors['RevNet-38']:.1%} and {errors['ResNet-32']:.1%}"
    holds = errors["RevNet-38"] < min(0.08, errors["ResNet-32"] + 0.02)
    report.check("a RevNet classifies as well as a ResNet of its size", claim, measured, holds)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="It learns as a ResNet")
    axes.legend()


def make_revnet(units, **options) -> RevNet:
    widths = (16, 16, 32, 56)[: len(units) + 1]
    return RevNet(units, widths, in_channels=1, norm_layer=NORM, **options)


def train(model, steps: int, seed: int) -> list[float]:
    """SGD as the authors', but warmed up, and slower and slower in the second half; returns the losses."""
    images, labels = digit_parts()["train"]
    dataset = torch.utils.data.TensorDataset(images.to(next(model.parameters()).dtype), labels)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=2e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / WARM_UP, 1, 2 * (1 - i / steps)))
    options = {"optimizer": optimizer, "schedule": schedule, "loss": F.cross_entropy}
    history = fit(model, dataset, batch_size=BATCH, steps=steps, seed=seed, **options)
    return [entry["loss"] for entry in history]


# --------------------------------------------------------------------------------------------------------------- memory


def memory(report, axes) -> None:
    images = digit_parts()["train"][0][:BATCH]
    kept = {}
    for reversible in (True, False):
        models = [make_revnet((units,) * 3, reversible=reversible) for units in UNITS]
        kept[reversible] = [stored_bytes(model, images) / 2**20 for model in models]
        axes.plot(UNITS, kept[reversible], "o-", label="RevNet" if reversible else "stored activations")
    claim = "activations take as much memory for any depth, O(1)"
    measured = "{0[0]:.2f} MiB with 1 unit a stage, {0[5]:.2f} MiB with 32; stored {1[0]:.1f} and {1[5]:.1f}"
    holds = min(kept[True]) == max(kept[True]) and kept[False][5] > 10 * kept[False][0]
    report.check(
        "what autograd keeps is the same for any depth", claim, measured.format(kept[True], kept[False]), holds
    )
    axes.set(xlabel="units a stage", ylabel="kept for the backward pass, MiB", xscale="log", yscale="log")
    axes.set(title="Memory does not grow with depth", xticks=UNITS, xticklabels=UNITS)
    ticks = (1, 2, 5, 10, 20, 50)
    axes.set(yticks=ticks, yticklabels=ticks)
    axes.minorticks_off()
    axes.legend()


def stored_bytes(model, images) -> int:
    """Of the storages that a forward pass leaves to the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    del out
    return sum(kept.values())


# ------------------------------------------------------------------------------------------------------------- rounding


def rounding(report, axes) -> None:
    torch.manual_seed(report.seed)
    model = make_revnet((BLOCKS + 1,))
    train(model, 60, report.seed)
    model.cpu().train()
    images, labels = (part[:BATCH] for part in digit_parts()["train"])
    gradients = []
    for reversible in (True, False):
        model.reversible = reversible
        loss = F.cross_entropy(model(images), labels)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    difference = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    measured = f"relative difference {difference:.0e}"
    report.check(
        "the gradients are those with stored activations",
        "no loss of accuracy",
        measured,
        difference < 1e-2,
    )
    kinds = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
    errors = {}
    for name, dtype in kinds.items():
        errors[name] = rebuild(model.to(dtype), images.to(dtype))
        axes.plot(range(1, BLOCKS + 1), errors[name], label=name)
    claim = "negligible errors, in float32"
    measured = f"relative error {errors['float32'][-1]:.0e} after {BLOCKS} blocks; float64 {errors['float64'][-1]:.0e}"
    holds = errors["float32"][-1] < 1e-4 and errors["float64"][-1] < 1e-12
    report.check("the rebuilt activations are the original ones", claim, measured, holds)
    axes.set(xlabel="blocks undone", ylabel="relative error of the rebuilt activation", yscale="log", ylim=(1e-17, 10))
    axes.set(title=f"Rounding errors, {BLOCKS} blocks after training")
    axes.legend()


@torch.no_grad()
def rebuild(model, images) -> list[float]:
    """Errors of what is rebuilt from the output of a stack, block by block."""
    stage = model.stages[0]
    x = stage.first(F.relu(model.init_bn(model.init_conv(images))))
    halves = list(x.chunk(2, 1))
    original = []
    for block in stage.rest:  # in the dtype of the model alone; a ReversibleSequential would keep halves in float32
        original.append(torch.cat(halves, 1))
        halves[0] = halves[0] + block.f(halves[1])
        halves[1] = halves[1] + block.g(halves[0])
    errors = []
    for block, expected in zip(reversed(stage.rest), reversed(original), strict=True):
        halves[1] = halves[1] - block.g(halves[0])
        halves[0] = halves[0] - block.f(halves[1])
        difference = torch.cat(halves, 1).double() - expected.double()
        errors.append((difference.norm() / expected.double().norm()).item())
    return errors


# ---------------------------------------------------------------------------------------------------------------- speed


def speed(report) -> None:
    model = pyzoo.create_model("revnet38_cifar")
    images, labels = torch.rand(32, 3, 32, 32), torch.arange(32) % 10

    def step(reversible: bool) -> float:
        model.reversible = reversible
        started = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        return time.perf_counter() - started

    step(True), step(False)
    pairs = [(step(True), step(False)) for _ in range(41)]
    rebuilt, stored = (median(times) * 1e3 for times in zip(*pairs, strict=True))
    ratio = median(a / b for a, b in pairs)
    claim = "one more forward pass: 4/3 of the operations"
    measured = f"{ratio:.2f}: {rebuilt:.0f} ms against {stored:.0f} ms for 32 images"
    report.check("the time of a step is at most 1.4 of that with stored activations", claim, measured, ratio <= 1.4)
