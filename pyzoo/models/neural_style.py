"""Image Style Transfer Using Convolutional Neural Networks. L. A. Gatys, A. S. Ecker, M. Bethge. CVPR 2016; first as
A Neural Algorithm of Artistic Style, arXiv 1508.06576.

In a net that has learned to classify, the map of a deep layer says what is in a picture, and which channels of a layer
are active together, its Gram matrix, says what the picture is painted like. A third picture is sought, by gradient
descent on its pixels, that has the map of one picture and the Gram matrices of another.

Departures from the paper, each with an option for the original (the first two are in :data:`PAPER`):
    the content loss is a mean, so that a weight does as much in a picture of any size; ``content_loss="sum"``.
    the search starts from the content; ``init="noise"``.
    filters are scaled to a mean activation of 1 on the two pictures rather than on ImageNet, which is not at hand; for
    those who have it, :func:`rescale` takes any pictures.
Without trained weights filters are random, which is enough for textures; see :data:`RANDOM`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pyzoo.models._registry import register_model
from pyzoo.models._style_colors import luminance_of, match_colors, with_luminance_of
from pyzoo.models._style_tiles import Tiles
from pyzoo.models._style_weights import load, randomize, rescale, resize
from pyzoo.models.vgg import INPUTS, layer_index, make_features, prepare, run
from pyzoo.nn.conv import forget
from pyzoo.ops import gram_loss

CONTENT = {"conv4_2": 0.05}
STYLE = {f"conv{block}_1": 0.2 for block in range(1, 6)}

# Options of :func:`style_transfer`: those of the paper; those of the first author's program, whose style loss of a
# layer is 1000 times the mean squared difference of F F^T / (N M); and those for random filters.
PAPER = {"content_layers": {"conv4_2": 1e-3}, "content_loss": "sum", "style_layers": STYLE, "init": "noise"}
PORT = {
    "content_layers": {"conv4_2": 1.0},
    "style_layers": {f"conv{i}_1": 4e3 / n**2 for i, n in enumerate((64, 128, 256, 512, 512), 1)},
    "init": "content",
}
RANDOM = {"content_layers": {"conv2_2": 0.02}, "style_layers": {f"conv{block}_1": 1 / 3 for block in range(1, 4)}}

# ------------------------------------------------------------------------------------------------------------------ net


class StyleNet(nn.Module):
    """The convolutions of VGG-19, with average pooling: images [N, 3, H, W], RGB in [0, 1], -> maps after the ReLU,
    by name of layer, "conv1_1" [N, 64, H, W] to "conv5_4" [N, 512, H / 16, W / 16].

    Args:
        pool: "avg", or "max" as in VGG.
        width: channels of the first block.
        inputs: what weights want, a key of :data:`pyzoo.models.vgg.INPUTS`.
    """

    def __init__(self, *, pool: str = "avg", width: int = 64, inputs: str = "torchvision"):
        super().__init__()
        self.features = make_features("E", pool=pool, width=width)
        self.inputs = inputs
        self.index = {f"conv{name[4:]}": i for name, i in layer_index(self.features).items() if name[:4] == "relu"}
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """No layer after the last of ``layers`` (by default all) is run."""
        layers = list(self.index) if layers is None else list(layers)
        maps = dict(self.walk(images, layers))
        return {name: maps[name] for name in layers}

    def walk(self, images: Tensor, layers: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Names and maps of these layers, each before the next is run."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{list(images.shape)} of {images.dtype}"
            raise ValueError(f"StyleNet: images must be [N, 3, H, W] of a floating dtype, in [0, 1], got {got}")
        x, start = prepare(images, self.inputs).contiguous(memory_format=torch.channels_last), 0
        for end, name in sorted((self.index[name] + 1, name) for name in set(layers)):
            x, start = run(self.features[start:end], x), end
            yield name, x

    def stride(self, layer: str) -> int:
        return 2 ** (int(layer[4]) - 1)


def style_net(
    weights: str | Path | None = None, images: Sequence[Tensor] = (), *, pool: str = "avg", seed: int = 0
) -> StyleNet:
    """A net for style transfer between these images, to which its filters are scaled.

    Args:
        weights: a file of torchvision's VGG-19, or of one whose layers are named as in Caffe, ``conv1_1.weight``;
            None for random filters.
        images: [3, H, W], RGB in [0, 1].
        pool: "avg" or "max".
        seed: of random filters.
    """
    net = StyleNet(pool=pool).requires_grad_(False)
    if weights is None:
        randomize(net, seed)
    else:
        load(net, weights)
    if images:
        rescale(net, images, compensate=weights is not None)
    return net


# --------------------------------------------------------------------------------------------------------------- losses


class Objective:
    """What of the picture differs from the content and the style, equation 7, and the gradient in its pixels.

    content: w / 2 sum of (F - P)^2, equation 1; or w times the mean of (F - P)^2.
    style: w / (4 N^2) sum of (G / M - A / M')^2, equation 4, where pictures may have different numbers of positions.

    Args:
        net: whose maps are compared.
        content: the picture to have the maps of, [1, 3, H, W]; or None.
        style: the picture to have the Gram matrices of; or None.
        content_layers, style_layers: weights by name of layer.
        content_loss: "mean" or "sum".
        tile: the net sees the picture in tiles of this height and width, and what they border on. Values are those of
            the whole up to rounding. Maps of the content are kept, but those that the gradient needs only for one tile.
    """

    def __init__(
        self,
        net: StyleNet,
        content: Tensor | None,
        style: Tensor | None,
        content_layers: Mapping[str, float],
        style_layers: Mapping[str, float],
        content_loss: str = "mean",
        tile: int | None = None,
    ):
        self.net, self.content_loss = net, content_loss
        self.content_layers = {} if content is None else dict(content_layers)
        self.style_layers = {} if style is None else dict(style_layers)
        self.layers = sorted({*self.content_layers, *self.style_layers}, key=list(net.index).index)
        self.tiles = Tiles(net, self.layers, tile)
        with torch.no_grad():
            self.content = {} if content is None else self.tiles.maps(content, self.content_layers)
            self.style = {} if style is None else self.tiles.grams(style, self.style_layers)
        forget(net)  # a step keeps its maps, and has no room for more

    def backward(self, image: Tensor) -> dict[str, float]:
        """Both losses; the gradient of their sum becomes ``image.grad``."""
        return (self._backward_whole if self.tiles.tile is None else self._backward_tiled)(image)

    def _backward_whole(self, image: Tensor) -> dict[str, float]:
        content = style = image.new_zeros(())
        # Each loss before the next layer: autograd then makes its gradient just before that of its layer.
        for name, maps in self.net.walk(image, self.layers):
            if name in self.content_layers:
                content = content + self._content_loss(name, maps)
            if name in self.style_layers:
                weight = self.style_layers[name] * maps.shape[1] ** 2 / 4
                style = style + weight * gram_loss(maps, self.style[name])
        image.grad = torch.autograd.grad(content + style, image)[0].contiguous()  # as L-BFGS wants it
        return {"content": content.item(), "style": style.item()}

    def _backward_tiled(self, image: Tensor) -> dict[str, float]:
        """First the Gram matrices, without a gradient; the gradient in them is that in the maps of each tile."""
        with torch.no_grad():
            grams = self.tiles.grams(image, self.style_layers)
            forget(self.net)
            difference = {name: gram - self.style[name] for name, gram in grams.items()}
        style = sum(w / 4 * difference[name].square().sum().item() for name, w in self.style_layers.items())
        content = 0.0
        image.grad = torch.zeros_like(image)
        for crop, maps, places in self.tiles.crops(image, self.layers, grad=True):
            loss = crop.new_zeros(())
            for name in self.content_layers:
                loss = loss + self._content_loss(name, maps[name], places[name])
            content += loss.item()
            for name, w in self.style_layers.items():
                loss = loss + (difference[name] * self.tiles.gram_part(image, name, maps[name])).sum() * (w / 2)
            (grad,) = torch.autograd.grad(loss, crop)
            image.grad[..., places["crop"][0], places["crop"][1]] += grad
        return {"content": content, "style": style}

    def _content_loss(self, name: str, maps: Tensor, place: tuple[slice, slice] = (slice(None), slice(None))) -> Tensor:
        target = self.content[name]
        scale = 1 / target.numel() if self.content_loss == "mean" else 0.5
        return (maps - target[..., place[0], place[1]]).square().sum() * (self.content_layers[name] * scale)


# ------------------------------------------------------------------------------------------------------------- transfer

OPTIMIZERS = {"lbfgs": 1.0, "adam": 0.02}  # and their learning rates, for pixels in [0, 1]
HISTORY = 20  # steps that L-BFGS remembers, two numbers a value of the picture each
INITS = ("content", "style", "noise")
COLORS = (None, "match", "luminance")


def style_transfer(
    content: Tensor | None,
    style: Tensor | None,
    net: StyleNet,
    *,
    steps: int = 500,
    optimizer: str = "lbfgs",
    lr: float | None = None,
    init: str | Tensor = "content",
    content_layers: Mapping[str, float] = CONTENT,
    style_layers: Mapping[str, float] = STYLE,
    content_loss: str = "mean",
    color: str | None = None,
    tile: int | None = None,
    seed: int = 0,
    callback: Callable[[int, dict[str, float], Tensor], object] | None = None,
) -> tuple[Tensor, list[dict[str, float]]]:
    """A picture with the content of one and the style of another.

    ::

        net = style_net("vgg19-dcbb9e9d.pth", [content, style])
        image, losses = style_transfer(content, style, net)

    Args:
        content: [3, H, W] of float, RGB in [0, 1]; None: nothing but the style counts.
        style: the same, of any other size; None: nothing but the content counts.
        net: what :func:`style_net` gives, on the device of the pictures.
        steps: how often losses and their gradient are computed.
        optimizer: "lbfgs", or "adam", which keeps 6 numbers a pixel rather than 120.
        lr: learning rate; by default 1 for L-BFGS and 0.02 for Adam.
        init: "content", "style", "noise" or a picture, which is scaled to the size of the content.
        content_layers, style_layers: weights by name of layer, "conv1_1" to "conv5_4"; see :class:`Objective`.
        content_loss: "mean", or "sum" as in the paper.
        color: "match" or "luminance" keep the colors of the content: the style first gets their mean and covariance, or
            lightness alone is transferred (Gatys et al., arXiv 1606.05897).
        tile: height and width of what the net sees at once, for pictures of any size in bounded memory; None: all.
        seed: of the noise.
        callback: ``callback(step, losses, image)`` after each step.

    Returns:
        the picture [3, H, W], values not clipped; and a dict a step of step, loss, and its parts content and style.

    Raises:
        FloatingPointError: the search left the finite numbers.
        TypeError, ValueError: an argument is not as said.
    """
    _require(optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}", optimizer)
    _require(steps > 0, "steps", "at least 1", steps)
    _require(color in COLORS, "color", "None, 'match' or 'luminance'", color)
    _require(content_loss in ("mean", "sum"), "content_loss", "'mean' or 'sum'", content_loss)
    _require(tile is None or tile > 0, "tile", "None or at least 1", tile)
    _check_layers("content_layers", content_layers, net)
    _check_layers("style_layers", style_layers, net)
    counting = {**content_layers, **({} if style is None else style_layers)}  # the result must have a cell of each
    content = _checked("content", content, net, counting)
    style = _checked("style", style, net, style_layers)
    given = {"content": content, "style": style}
    if isinstance(init, Tensor):  # without a content it has the size of the result
        given["init"], init = _checked("init", init, net, style_layers if content is None else {}), "init"
    weights = [*({} if content is None else content_layers).values(), *({} if style is None else style_layers).values()]
    _require(any(weights), "content, style", "a picture and layers of it, one at least with a weight above 0", "none")
    _require(color is None or not (content is None or style is None), "color", "None without both pictures", color)
    _require(init == "noise" or given.get(init) is not None, "init", "'noise' or a picture that is given", init)

    shown = content
    if color == "match":
        style = match_colors(style, content)
    elif color == "luminance":
        content, style = luminance_of(content, style)
    objective = Objective(net, content, style, content_layers, style_layers, content_loss, tile)
    size = next(given[k] for k in ("content", "init", "style") if given.get(k) is not None).shape[2:]
    image = noise(size, net, seed) if init == "noise" else resize(given[init], size).contiguous().clone()
    image, history = image.requires_grad_(), []
    lr = OPTIMIZERS[optimizer] if lr is None else lr
    if optimizer == "lbfgs":
        options = {"history_size": HISTORY, "tolerance_grad": 0, "tolerance_change": 0}
        search = torch.optim.LBFGS([image], lr, max_iter=1, **options)
    else:
        search = torch.optim.Adam([image], lr)
    scale = None

    def closure() -> float:
        nonlocal scale
        losses = objective.backward(image)
        history.append({"step": len(history) + 1, "loss": sum(losses.values()), **losses})
        if scale is None:  # both optimizers have constants for gradients of about 1
            scale = 1 / max(image.grad.abs().mean().item(), 1e-30)
        image.grad *= scale
        return history[-1]["loss"] * scale

    def picture() -> Tensor:
        return (with_luminance_of(image.detach(), shown) if color == "luminance" else image.detach())[0]

    for step in range(1, steps + 1):
        search.step(closure)
        if not torch.isfinite(image).all():
            raise FloatingPointError(f"style_transfer: pixels are not finite after step {step}; try a smaller lr")
        if callback is not None:
            callback(step, history[-1], picture())
    return picture(), history


def texture_synthesis(
    style: Tensor, net: StyleNet, size: tuple[int, int] | None = None, *, seed: int = 0, **options
) -> tuple[Tensor, list[dict[str, float]]]:
    """A picture of the style alone, from noise, of height and width ``size``; else as :func:`style_transfer`."""
    if size is None:
        size = _checked("style", style, net, {}).shape[2:]
    start = noise(size, net, seed)[0]
    return style_transfer(None, style, net, init=start, **options)


def content_inversion(content: Tensor, net: StyleNet, layer: str, **options) -> tuple[Tensor, list[dict[str, float]]]:
    """A picture, from noise, with the maps of one layer: what that layer knows; else as :func:`style_transfer`."""
    return style_transfer(content, None, net, init="noise", content_layers={layer: 1.0}, **options)


def noise(size: Iterable[int], net: StyleNet, seed: int = 0) -> Tensor:
    """White noise [1, 3, H, W] around the color that the net takes for zero."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor(INPUTS[net.inputs][0])[:, None, None]
    return ((mean + 30 * torch.randn(1, 3, *size, generator=generator)) / 255).to(net.features[0].weight)


# -------------------------------------------------------------------------------------------------------------- checks


def _require(holds: bool, name: str, allowed: str, value: object) -> None:
    if not holds:
        raise ValueError(f"style_transfer: {name} must be {allowed}, got {value!r}")


def _check_layers(name: str, layers: Mapping[str, float], net: StyleNet) -> None:
    for layer, weight in layers.items():
        _require(layer in net.index, name, f"weights of some of {', '.join(net.index)}", layer)
        _require(0 <= weight < float("inf"), f"{name}[{layer!r}]", "finite and not negative", weight)


def _checked(name: str, image: Tensor | None, net: StyleNet, layers: Iterable[str]) -> Tensor | None:
    """The picture with a batch dimension; each of the layers has at least one cell of it."""
    if image is None:
        return None
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"style_transfer: {name} must be a tensor of a floating dtype, got {got}")
    _require(image.dim() == 3 and image.shape[0] == 3, name, "of shape [3, H, W]", list(image.shape))
    deepest = max(layers, default="conv1_1")
    least = net.stride(deepest)
    size = list(image.shape[1:])
    _require(min(size) >= least, name, f"at least {least} x {least} for {deepest}", size)
    _require(bool(torch.isfinite(image).all()), name, "finite", "NaN or infinity")
    return image.detach()[None]


# ------------------------------------------------------------------------------------------------------------- registry

register_model(
    "neural_style_vgg19",
    StyleNet,
    paper="Image Style Transfer Using Convolutional Neural Networks, Gatys et al., arXiv 1508.06576",
    task="features",
    input="[N, 3, H, W] float, RGB in [0, 1]",
    parameters=20_024_384,
    tiny={"width": 4},
    size=(32, 49),
)
