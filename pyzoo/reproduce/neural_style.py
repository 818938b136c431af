"""Content and style of two photographs come apart, and go into one picture; even with random filters.

The two photographs of scikit-learn, small, and a VGG-19 with random filters. What the paper shows in pictures is
measured by its losses; one picture shows the rest.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo._extras import need
from pyzoo.models.neural_style import (
    RANDOM,
    STYLE,
    Objective,
    StyleNet,
    content_inversion,
    noise,
    style_net,
    style_transfer,
    texture_synthesis,
)
from pyzoo.models.vgg import prepare

SMALL, LARGE, HUGE = (64, 96), (128, 192), (512, 768)
STATUS = Path("/proc/self/status")


def photographs(size: tuple[int, int]) -> list[Tensor]:
    """A temple, and a flower."""
    images = need("sklearn.datasets", "pyzoo reproduce neural_style").load_sample_images().images
    images = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 for image in images]
    return [F.interpolate(image, size, mode="bilinear", antialias=True)[0] for image in images]


def reproduce(report) -> None:
    """Checks the paper's claims; see the module."""
    content, style = photographs(SMALL)
    nets = {pool: style_net(None, [content, style], pool=pool, seed=report.seed) for pool in ("avg", "max")}
    trade_off(report, content, style, nets["avg"])
    layers_know(report, content, nets["avg"])
    for pool, net in nets.items():
        losses = texture_synthesis(style, net, steps=80, seed=report.seed)[1]
        report.note(f"{pool} pooling: style {losses[0]['style']:.3f} -> {losses[-1]['style']:.3f}")
    pictures(report)
    compare_with_plain(report)


def trade_off(report, content: Tensor, style: Tensor, net: StyleNet) -> None:
    """Figure 4: more weight on the content keeps more of it, and less of the style."""
    alone = Objective(net, content[None], None, {"conv4_2": 1.0}, {}, "sum")
    contents, styles = [], []
    for ratio in (0, 1e-6, 1e-5):
        layers = {"content_layers": {"conv4_2": ratio}, "content_loss": "sum", "style_layers": STYLE}
        image, losses = style_transfer(content, style, net, steps=80, init="noise", seed=report.seed, **layers)
        contents.append(alone.backward(image[None].requires_grad_())["content"])
        styles.append(losses[-1]["style"])
        if ratio == 0:
            measured = f"{losses[0]['style']:.3f} -> {styles[0]:.3f}"
            holds = styles[0] <= 0.7 * losses[0]["style"]
            report.check("from noise, the style loss falls in 80 steps", "to 0.7 of what it was", measured, holds)
    claim = "content falls, style rises with alpha / beta = 0, 1e-6, 1e-5 (Figure 4)"
    measured = f"content {', '.join(f'{x:.0f}' for x in contents)}; style {', '.join(f'{x:.3f}' for x in styles)}"
    holds = contents[0] > contents[1] > contents[2] and styles[0] < styles[1] < styles[2]
    report.check("content is traded against style", claim, measured, holds)


def layers_know(report, content: Tensor, net: StyleNet) -> None:
    """Figure 1: what can be rebuilt from the maps of a layer."""
    quality = {}
    for layer in ("conv1_2", "conv2_2", "conv4_2"):
        image, _ = content_inversion(content, net, layer, steps=60, seed=report.seed)
        quality[layer] = -10 * (image - content).square().mean().log10().item()
    first, second, third = quality.values()
    claim = "low layers keep the pixels, deep ones do not (Figure 1)"
    measured = ", ".join(f"{layer} {value:.1f} dB" for layer, value in quality.items())
    report.check("rebuilt from one layer", claim, measured, first >= 20 and first > second >= third - 0.5)


def pictures(report) -> None:
    content, style = photographs(LARGE)
    net = style_net(None, [content, style], seed=report.seed)
    options = {"steps": 100, "seed": report.seed, **RANDOM}
    texture, losses = texture_synthesis(style, net, steps=150, style_layers=RANDOM["style_layers"], seed=report.seed)
    measured = f"{losses[0]['style']:.4f} -> {losses[-1]['style']:.4f}"
    holds = losses[-1]["style"] < 0.02 * losses[0]["style"]
    report.check("a texture from noise (three blocks, 150 steps)", "the statistics of the flower", measured, holds)
    transferred, losses = style_transfer(content, style, net, **options)
    measured = f"{losses[0]['style']:.3f} -> {losses[-1]['style']:.3f}, content {losses[-1]['content']:.3f}"
    holds = losses[-1]["loss"] < 0.2 * losses[0]["loss"]
    report.check("the temple in the style of the flower", "the loss falls to a fifth", measured, holds)
    matched, luminance = (style_transfer(content, style, net, color=c, **options)[0] for c in ("match", "luminance"))
    titles = ("content", "style", "texture of the style", "transfer", "style in its colors", "luminance alone")
    report.save(draw(titles, (content, style, texture, transferred, matched, luminance)))


def draw(titles: tuple[str, ...], images: tuple[Tensor, ...]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, title, image in zip(figure.subplots(2, 3).flat, titles, images, strict=True):
        axes.imshow(image.clamp(0, 1).permute(1, 2, 0))
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    return figure


# ------------------------------------------------------------------------------------------------- plain implementation


class Plain:
    """The same losses as PyTorch's tutorial writes them: layers one by one, each loss after its layer, Gram matrices by
    a product, F.mse_loss."""

    def __init__(self, net: StyleNet, content: Tensor, style: Tensor):
        last = max(net.index[name] for name in (*STYLE, "conv4_2")) + 1
        layers = [nn.ReLU() if isinstance(m, nn.ReLU) else m for m in net.features[:last]]
        self.net, self.layers = net, nn.Sequential(*layers).to(memory_format=torch.contiguous_format)
        self.taps = {net.index[name]: name for name in (*STYLE, "conv4_2")}
        with torch.no_grad():
            self.content = dict(self.walk(content))["conv4_2"]
            self.style = {name: self.gram(maps) for name, maps in self.walk(style) if name in STYLE}

    def walk(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        x = prepare(x, self.net.inputs)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                yield self.taps[i], x

    def gram(self, maps: Tensor) -> Tensor:
        maps = maps[0].flatten(1)
        return maps @ maps.T / maps.numel()

    def backward(self, image: Tensor) -> dict[str, float]:
        content = style = image.new_zeros(())
        for name, maps in self.walk(image):
            if name == "conv4_2":
                content = content + 0.05 * F.mse_loss(maps, self.content)
            else:
                difference = F.mse_loss(self.gram(maps), self.style[name])
                style = style + STYLE[name] * maps.shape[1] ** 2 / 4 * difference
        (image.grad,) = torch.autograd.grad(content + style, image)
        return {"content": content.item(), "style": style.item()}


KINDS: dict[str, Callable] = {
    "plain": Plain,
    "pyzoo": lambda *args: Objective(*args, {"conv4_2": 0.05}, STYLE),
    "pyzoo, tile=128": lambda *args: Objective(*args, {"conv4_2": 0.05}, STYLE, tile=128),
}


def compare_with_plain(report) -> None:
    """Time of a step, in turns, and how much more memory the process takes while it computes one."""
    calls, images, results, samples = {}, {}, {}, {"plain": [], "pyzoo": []}
    content, style = (image[None] for image in photographs((256, 384)))
    for kind in samples:
        net = style_net(None, [content[0], style[0]], seed=report.seed)
        calls[kind], images[kind] = KINDS[kind](net, content, style), noise((256, 384), net).requires_grad_()
        results[kind] = calls[kind].backward(images[kind])
    for _ in range(5):
        for kind, call in calls.items():
            started = time.perf_counter()
            call.backward(images[kind])
            samples[kind].append(time.perf_counter() - started)
    difference = images["plain"].grad - images["pyzoo"].grad
    error = (difference.norm() / images["plain"].grad.norm()).item()
    claim = "within 1 %: rounding in float32 moves values across the zero of a ReLU"
    report.check("the gradient of the plain implementation", claim, f"{error:.2%}", error < 0.01)
    ratio = statistics.median(a / b for a, b in zip(samples["plain"], samples["pyzoo"], strict=True))
    times = ", ".join(f"{kind} {statistics.median(s) * 1e3:.0f} ms" for kind, s in samples.items())
    report.note(f"a step at 256 x 384: {times}: {ratio:.2f} times as fast")
    if not STATUS.exists():
        report.note("memory is measured on Linux only")
        return
    peaks = {kind: peak_in_new_process(kind) for kind in KINDS}
    report.note("with malloc's own threshold: " + memory({kind: peak_in_new_process(kind, None) for kind in KINDS}))
    claim = "as much as the plain implementation, which has to keep the same maps; in tiles less than half of it"
    plain, whole, tiled = peaks.values()
    holds = whole < 1.1 * plain and tiled < plain / 2
    report.check(f"memory of a step at {HUGE[0]} x {HUGE[1]}", claim, memory(peaks), holds)


def memory(peaks: dict[str, float]) -> str:
    return ", ".join(f"{kind} {peak:.0f} MiB" for kind, peak in peaks.items())


def peak_in_new_process(kind: str, threshold: int | None = 2**20) -> float:
    """In MiB. Blocks of ``threshold`` bytes and more go back to the system when they are freed. glibc raises its own
    threshold as it sees fit, and then measures as much what it holds back as what is in use."""
    command = f"from pyzoo.reproduce.neural_style import peak; peak({kind!r})"
    env = {**os.environ, **({} if threshold is None else {"MALLOC_MMAP_THRESHOLD_": str(threshold)})}
    done = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True, env=env)
    return float(done.stdout)


def peak(kind: str) -> None:
    """Prints by how many MiB the largest resident size grows in one step."""
    net = style_net()
    image = noise(HUGE, net)
    small = image[..., :64, :96]
    KINDS[kind](net, small, small).backward(small.contiguous().requires_grad_())  # what libraries allocate once
    before = largest_resident_size()
    KINDS[kind](net, image, image).backward(image.requires_grad_())
    print(largest_resident_size() - before)


def largest_resident_size() -> float:
    """In MiB. The one of getrusage would be that of the parent process, where that is larger."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
