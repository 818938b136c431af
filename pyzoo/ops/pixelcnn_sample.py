"""Sampling from a Gated PixelCNN, each pixel from cached activations.

The network: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016
(https://arxiv.org/abs/1606.05328). The caches: Ramachandran et al., "Fast Generation for Convolutional Autoregressive
Models", 2017 (https://arxiv.org/abs/1704.06001).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from pyzoo._backend import Kernel, specified_by
from pyzoo.ops import _common as common

Condition = Sequence[tuple[Tensor | None, Tensor | None]]

_kernel = Kernel("pixelcnn_sample", "pixelcnn_sample")

# -------------------------------------------------------------------------------------------------------- description


@dataclass(frozen=True, eq=False)
class PixelCNNLayer:
    """The weights of one gated layer: width p, ci input channels, an odd kernel n, r = (n + 1) / 2.

    In a tensor of 2p channels the first p go into tanh, the last p into the sigmoid. A bias may be None.

    Args:
        vertical_weight, vertical_bias: [2p, ci, r, n] and [2p]. Output row i sees rows i - r + 1 ... i of the vertical
            stack, in the first layer rows i - r ... i - 1 of the image.
        horizontal_weight, horizontal_bias: [2p, ci, 1, n // 2 + 1] and [2p]. The columns on the left and, last, the
            pixel itself, of which a channel sees those of earlier colors and, but for the first layer, of its own.
        link_weight, link_bias: [2p, 2p, 1, 1] and [2p]. From what the vertical gate gets to what the horizontal gets.
        output_weight, output_bias: [p, p, 1, 1] and [p]. After the horizontal gate; sees colors up to its own.
        residual: whether the input of the horizontal stack is added to the output. Not in the first layer.
    """

    vertical_weight: Tensor
    vertical_bias: Tensor | None
    horizontal_weight: Tensor
    horizontal_bias: Tensor | None
    link_weight: Tensor
    link_bias: Tensor | None
    output_weight: Tensor
    output_bias: Tensor | None
    residual: bool = True


@dataclass(frozen=True, eq=False)
class PixelCNNNetwork:
    """The weights of a Gated PixelCNN over images of C channels (colors) of K levels.

    The channels of every layer are C equal runs, one a color; so is each half of the 2p channels of a gate. What is
    masked need not be zero in the weights: it is not looked at. The tensors are those of the model's modules, as they
    are; gradients do not flow through sampling.

    Args:
        layers: the gated layers. The first one reads the image, scaled to 2 x / (K - 1) - 1, and pads it with zeros.
        head: pairs of a weight [q, p, 1, 1] and a bias [q] or None: a ReLU, then a 1x1 convolution that sees colors
            up to its own. The last one has C * K outputs.

    Raises:
        TypeError: what should be a tensor is none, or is not of a floating dtype.
        ValueError: shapes or devices do not fit together.
    """

    layers: Sequence[PixelCNNLayer]
    head: Sequence[tuple[Tensor, Tensor | None]]

    def __post_init__(self):
        if len(self.layers) == 0 or len(self.head) == 0:
            raise ValueError(
                f"PixelCNNNetwork: layers and head must not be empty, got {len(self.layers)} and {len(self.head)}"
            )
        for name, tensor in self._named_tensors():
            if tensor is None and name.endswith("bias"):
                continue
            common.check_tensor("PixelCNNNetwork", name, tensor)
            common.check_floating("PixelCNNNetwork", name, tensor)
            common.check_same_device("PixelCNNNetwork", name, tensor, "layers[0].vertical_weight", self._first)
            if name.endswith("weight") and tensor.dim() != 4:
                raise ValueError(f"PixelCNNNetwork: {name} must have 4 dimensions, got shape {list(tensor.shape)}")
        inputs = self.channels
        if inputs < 1:
            raise ValueError("PixelCNNNetwork: layers[0].vertical_weight must have at least one input channel, got 0")
        for i, layer in enumerate(self.layers):
            inputs = self._check_layer(f"layers[{i}]", layer, inputs)
        if self.layers[0].residual:
            raise ValueError("PixelCNNNetwork: layers[0].residual must be False: a pixel would see itself")
        for i, (weight, bias) in enumerate(self.head):
            outputs = weight.shape[0]
            _check_colors(f"head[{i}].weight: the number of outputs", outputs, self.channels)
            _check_shape(f"head[{i}].weight", weight, (outputs, inputs, 1, 1))
            _check_shape(f"head[{i}].bias", bias, (outputs,))
            inputs = outputs
        if self.levels < 2:
            raise ValueError(
                f"PixelCNNNetwork: head[{len(self.head) - 1}].weight must have C * K = {self.channels} * K outputs"
                f" with K >= 2, got {inputs}"
            )

    @property
    def channels(self) -> int:
        return self._first.shape[1]

    @property
    def levels(self) -> int:
        return self.head[-1][0].shape[0] // self.channels

    @cached_property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 if a weight is, else float32."""
        dtypes = [tensor.dtype for _, tensor in self._named_tensors() if tensor is not None]
        return reduce(torch.promote_types, dtypes, torch.float32)

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def _first(self) -> Tensor:
        return self.layers[0].vertical_weight

    def _named_tensors(self):
        for i, layer in enumerate(self.layers):
            for name in _TENSORS:
                yield f"layers[{i}].{name}", getattr(layer, name)
        for i, (weight, bias) in enumerate(self.head):
            yield f"head[{i}].weight", weight
            yield f"head[{i}].bias", bias

    def _check_layer(self, name: str, layer: PixelCNNLayer, inputs: int) -> int:
        width, kernel = layer.output_weight.shape[0], layer.vertical_weight.shape[3]
        _check_colors(f"{name}.output_weight: the number of outputs", width, self.channels)
        if kernel % 2 == 0:
            shape = list(layer.vertical_weight.shape)
            raise ValueError(f"PixelCNNNetwork: {name}.vertical_weight must have an odd kernel, got {shape}")
        _check_shape(f"{name}.vertical_weight", layer.vertical_weight, (2 * width, inputs, kernel // 2 + 1, kernel))
        _check_shape(f"{name}.horizontal_weight", layer.horizontal_weight, (2 * width, inputs, 1, kernel // 2 + 1))
        _check_shape(f"{name}.link_weight", layer.link_weight, (2 * width, 2 * width, 1, 1))
        _check_shape(f"{name}.output_weight", layer.output_weight, (width, width, 1, 1))
        for bias in ("vertical_bias", "horizontal_bias", "link_bias"):
            _check_shape(f"{name}.{bias}", getattr(layer, bias), (2 * width,))
        _check_shape(f"{name}.output_bias", layer.output_bias, (width,))
        if layer.residual and inputs != width:
            raise ValueError(f"PixelCNNNetwork: {name}.residual needs as many inputs as outputs, got {inputs}, {width}")
        return width


_TENSORS = tuple(name for name in PixelCNNLayer.__dataclass_fields__ if name != "residual")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"PixelCNNNetwork: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _check_colors(what: str, count: int, colors: int) -> None:
    if count < 1 or count % colors:
        raise ValueError(f"PixelCNNNetwork: {what} must be a multiple of the {colors} image channels, got {count}")


# ---------------------------------------------------------------------------------------------------------- reference


def _color_mask(weight: Tensor, colors: int, *, halves: int = 1, strict: bool = False) -> Tensor:
    """Which of the inputs of its own pixel an output sees: [outputs, inputs, 1, 1] of 0 and 1.

    Those of colors up to its own, or if ``strict`` of earlier ones.
    """
    outputs, inputs = weight.shape[:2]
    color_out = torch.arange(outputs, device=weight.device) % (outputs // halves) * colors // (outputs // halves)
    color_in = torch.arange(inputs, device=weight.device) * colors // inputs
    sees = color_in < color_out[:, None] if strict else color_in <= color_out[:, None]
    return sees.to(weight.dtype)[..., None, None]


def _masked(network: PixelCNNNetwork) -> PixelCNNNetwork:
    """The network in its dtype, with zeros where weights are masked."""
    colors = network.channels

    def convert(tensor):
        return None if tensor is None else tensor.to(network.dtype)

    layers = []
    for i, layer in enumerate(network.layers):
        tensors = {name: convert(getattr(layer, name)) for name in _TENSORS}
        weight = tensors["horizontal_weight"]
        own = weight[..., -1:] * _color_mask(weight, colors, halves=2, strict=i == 0)
        tensors["horizontal_weight"] = torch.cat([weight[..., :-1], own], -1)
        tensors["output_weight"] = tensors["output_weight"] * _color_mask(tensors["output_weight"], colors)
        layers.append(PixelCNNLayer(**tensors, residual=layer.residual))
    head = [(convert(weight) * _color_mask(convert(weight), colors), convert(bias)) for weight, bias in network.head]
    return PixelCNNNetwork(layers, head)


def _logits(network: PixelCNNNetwork, x: Tensor, condition: list) -> Tensor:
    """:func:`pixelcnn_logits_reference` of a network that is masked already."""
    if x.numel() == 0:  # no convolution takes images of no rows or columns
        return x.new_zeros((*x.shape[:2], network.levels, *x.shape[2:]), dtype=network.dtype)
    height = x.shape[2]
    v = h = 2 * x.to(network.dtype) / (network.levels - 1) - 1
    for i, (layer, (on_vertical, on_horizontal)) in enumerate(zip(network.layers, condition, strict=True)):
        rows, kernel = layer.vertical_weight.shape[2:]
        side, above = kernel // 2, rows if i == 0 else rows - 1
        seen = F.pad(v, (side, side, above, 0))[:, :, : height + rows - 1]
        vertical = F.conv2d(seen, layer.vertical_weight, layer.vertical_bias) + on_vertical
        horizontal = F.conv2d(F.pad(h, (side, 0)), layer.horizontal_weight, layer.horizontal_bias)
        horizontal = horizontal + F.conv2d(vertical, layer.link_weight, layer.link_bias) + on_horizontal
        v = _gate(vertical)
        out = F.conv2d(_gate(horizontal), layer.output_weight, layer.output_bias)
        h = h + out if layer.residual else out
    for weight, bias in network.head:
        h = F.conv2d(h.relu(), weight, bias)
    return h.unflatten(1, (network.channels, network.levels))


def _gate(x: Tensor) -> Tensor:
    f, g = x.chunk(2, 1)
    return f.tanh() * g.sigmoid()


def _draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """min(#{k: cdf(k) < u}, K - 1) for logits [B, K] and uniforms [B], in float64."""
    cdf = (logits.double() / temperature).softmax(1).cumsum(1)
    return (cdf < uniforms[:, None]).sum(1).clamp(max=logits.shape[1] - 1)


def pixelcnn_logits_reference(network: PixelCNNNetwork, x: Tensor, condition: Condition | None = None) -> Tensor:
    """The logits [B, C, K, H, W] of a Gated PixelCNN for images ``x`` [B, C, H, W] of levels 0 ... K - 1.

    Plain PyTorch, differentiable: the specification of :func:`pixelcnn_sample`, which has ``condition``, too.
    """
    op = "pixelcnn_logits_reference"
    _check_network(op, network)
    common.check_tensor(op, "x", x)
    if x.dim() != 4 or x.shape[1] != network.channels:
        raise ValueError(f"{op}: x must have shape [B, {network.channels}, H, W], got {list(x.shape)}")
    return _logits(_masked(network), x, _addends(op, network, condition, x.shape[0], *x.shape[2:]))


@torch.no_grad()
def pixelcnn_sample_reference(
    network: PixelCNNNetwork,
    size: Sequence[int],
    condition: Condition | None = None,
    *,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    image: Tensor | None = None,
    known: Tensor | None = None,
    return_logits: bool = False,
):
    """:func:`pixelcnn_sample` by a loop of full forwards, one for each value that is drawn: H * W * C of them."""
    op = "pixelcnn_sample_reference"
    addends, uniforms, x = _arguments(op, network, size, condition, uniforms, generator, temperature, image, known)
    masked = _masked(network)
    unknown = x == _UNKNOWN
    x = x.masked_fill(unknown, 0)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            for c in range(x.shape[1]):
                draw = unknown[:, c, i, j]
                if draw.any():
                    logits = _logits(masked, x, addends)[:, c, :, i, j]
                    x[:, c, i, j] = torch.where(draw, _draw(logits, uniforms[:, c, i, j], temperature), x[:, c, i, j])
    return (x, _logits(masked, x, addends)) if return_logits else x


# ---------------------------------------------------------------------------------------------------------- arguments

_UNKNOWN = torch.iinfo(torch.int64).min  # marks, for the operator, the values to be drawn


def _check_network(op: str, network) -> None:
    if not isinstance(network, PixelCNNNetwork):
        raise TypeError(f"{op}: network must be a PixelCNNNetwork, got {type(network).__name__}")


def _addends(op: str, network: PixelCNNNetwork, condition, images: int, height: int, width: int) -> list:
    """The condition as pairs of what can be added to [B, 2p, H, W]: a tensor of 4 dimensions, or 0."""
    if condition is None:
        return [(0, 0)] * len(network.layers)
    if len(condition) != len(network.layers):
        raise ValueError(
            f"{op}: condition must have one pair for each of the {len(network.layers)} layers, got {len(condition)}"
        )

    def addend(name, t, channels):
        if t is None:
            return 0
        common.check_tensor(op, name, t)
        common.check_floating(op, name, t)
        common.check_same_device(op, name, t, "network", network)
        if t.shape not in ((images, channels), (images, channels, height, width)):
            raise ValueError(
                f"{op}: {name} must have shape {[images, channels]} or {[images, channels, height, width]},"
                f" got {list(t.shape)}"
            )
        return (t if t.dim() == 4 else t[..., None, None]).to(network.dtype)

    pairs = []
    for i, (layer, pair) in enumerate(zip(network.layers, condition, strict=True)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{op}: condition[{i}] must be a pair (vertical, horizontal), got {type(pair).__name__}")
        channels = layer.vertical_weight.shape[0]
        pairs.append(tuple(addend(f"condition[{i}][{k}]", t, channels) for k, t in enumerate(pair)))
    return pairs


def _arguments(op, network, size, condition, uniforms, generator, temperature, image, known):
    """The condition as addends, and what :func:`_draws_and_start` gives."""
    _check_network(op, network)
    drawn = _draws_and_start(op, network, size, uniforms, generator, temperature, image, known)
    return _addends(op, network, condition, *size), *drawn


def _draws_and_start(op, network, size, uniforms=None, generator=None, temperature=1.0, image=None, known=None):
    """The uniforms, and the values to start from, ``_UNKNOWN`` where they are to be drawn. ``network`` is anything with
    channels, levels and a device."""
    if len(size) != 3 or not all(isinstance(n, (int, torch.SymInt)) and n >= 0 for n in size):
        raise ValueError(f"{op}: size must be (B, H, W), got {size!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")
    images, height, width = size
    shape = (images, network.channels, height, width)
    if uniforms is None:
        device = network.device if generator is None else generator.device
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64, device=device).to(network.device)
    else:
        if generator is not None:
            raise ValueError(f"{op}: give either uniforms or a generator, got both")
        _check_values(op, "uniforms", uniforms, shape, network)
        common.check_floating(op, "uniforms", uniforms)
    if (image is None) != (known is None):
        raise ValueError(f"{op}: image and known go together, got only {'known' if image is None else 'image'}")
    if image is None:
        return uniforms.double(), torch.full(shape, _UNKNOWN, dtype=torch.int64, device=network.device)
    _check_values(op, "image", image, shape, network)
    if image.is_floating_point() or image.is_complex():
        raise TypeError(f"{op}: image must be integers, got {image.dtype}")
    common.check_tensor(op, "known", known)
    common.check_same_device(op, "known", known, "network", network)
    if known.dtype != torch.bool:
        raise TypeError(f"{op}: known must be bool, got {known.dtype}")
    try:
        known = known.expand(shape)
    except RuntimeError:
        raise ValueError(f"{op}: known must expand to shape {list(shape)}, got {list(known.shape)}") from None
    if not torch.compiler.is_compiling() and image.device.type != "meta":  # else the core finds out
        bad = image[known & ((image < 0) | (image >= network.levels))]
        if bad.numel():
            raise ValueError(f"{op}: image must be in [0, {network.levels}) where known, got {bad[0].item()}")
    return uniforms.double(), torch.where(known, image.long(), _UNKNOWN)


def _check_values(op: str, name: str, x, shape: tuple[int, ...], network: PixelCNNNetwork) -> None:
    common.check_tensor(op, name, x)
    common.check_same_device(op, name, x, "network", network)
    if x.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(x.shape)}")


# ----------------------------------------------------------------------------------------------------------- operator


def _flat(network: PixelCNNNetwork) -> list[Tensor]:
    """All weights and biases, layer by layer, then the head's."""

    def pairs():
        for layer in network.layers:
            yield from (
                (getattr(layer, w), getattr(layer, b)) for w, b in zip(_TENSORS[::2], _TENSORS[1::2], strict=True)
            )
        yield from network.head

    return [t.detach() for w, b in pairs() for t in (w, w.new_zeros(w.shape[0]) if b is None else b)]


def _network(weights: Sequence[Tensor], residual: Sequence[bool]) -> PixelCNNNetwork:
    step = len(_TENSORS)
    layers = [PixelCNNLayer(*weights[i * step : (i + 1) * step], residual=r) for i, r in enumerate(residual)]
    head = weights[len(layers) * step :]
    return PixelCNNNetwork(layers, list(zip(head[::2], head[1::2], strict=True)))


def _by_color(x: Tensor, colors: int) -> Tensor:
    """Orders the 2p channels, two halves of colors, as colors of two halves: what the core expects."""
    return x.unflatten(0, (2, colors, -1)).transpose(0, 1).flatten(0, 2)


def _new_logits(network: PixelCNNNetwork, start: Tensor, return_logits: bool) -> Tensor:
    shape = (start.shape[0], network.channels, network.levels, *start.shape[2:]) if return_logits else (0,)
    return start.new_empty(shape, dtype=network.dtype)


def _fake(weights, residual, condition, uniforms, start, temperature, return_logits):
    samples = torch.empty_like(start, memory_format=torch.contiguous_format)
    return samples, _new_logits(_network(weights, residual), start, return_logits)


def _impl(weights, residual, condition, uniforms, start, temperature, return_logits):
    network = _network(weights, residual)
    samples = start.clone(memory_format=torch.contiguous_format)
    logits = _new_logits(network, start, return_logits)
    images, _, height, width = start.shape

    def convert(tensor, by_color=False):
        tensor = tensor.to(network.dtype)
        return (_by_color(tensor, network.channels) if by_color else tensor).contiguous()

    def addend(tensor, by_color=False):  # [B, 2p, 1, 1] or [B, 2p, H, W] -> [B, H, W, 2p]
        if tensor is None:
            return None
        if by_color:
            tensor = _by_color(tensor.transpose(0, 1), network.channels).transpose(0, 1)
        return tensor.to(network.dtype).permute(0, 2, 3, 1).contiguous().expand(images, height, width, -1)

    layers = [
        (
            *(convert(getattr(layer, name), name.startswith(("horizontal", "link"))) for name in _TENSORS),
            addend(on_vertical),
            addend(on_horizontal, by_color=True),
            layer.residual,
        )
        for layer, on_vertical, on_horizontal in zip(network.layers, condition[::2], condition[1::2], strict=True)
    ]
    head = [(convert(weight), convert(bias)) for weight, bias in network.head]
    _kernel(
        samples.device, layers, head, uniforms.contiguous(), samples, logits if return_logits else None, temperature
    )
    return samples, logits


common.lib.define(
    "pixelcnn_sample(Tensor[] weights, bool[] residual, Tensor?[] condition, Tensor uniforms, Tensor start,"
    " float temperature, bool return_logits) -> (Tensor, Tensor)"
)
for _device in common._DEVICES:
    common.lib.impl("pixelcnn_sample", _impl, _device)
torch.library.register_fake("pyzoo::pixelcnn_sample", _fake, lib=common.lib)


@torch.no_grad()
@specified_by(pixelcnn_sample_reference)
def pixelcnn_sample(
    network: PixelCNNNetwork,
    size: Sequence[int],
    condition: Condition | None = None,
    *,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    image: Tensor | None = None,
    known: Tensor | None = None,
    return_logits: bool = False,
):
    """Draws images from a Gated PixelCNN, or completes them, in one compiled call.

    Row by row, pixel by pixel, color by color; each value x costs only what it changes. The vertical stack runs once
    for each row, over all of its columns; the horizontal stack runs for one column, and of that for the channels of
    one color, from activations kept of the columns on the left and the rows above. All images take each step
    together, some on each thread. A value is min(#{k: cdf(k) < u}, K - 1) for its uniform u and the cdf of
    softmax(logits / temperature).

    :func:`pixelcnn_sample_reference` draws the same from the same uniforms, by H * W * C full forwards. In float64 the
    samples are equal. In float32 the logits of both agree to 1e-5 of the largest, so that a u closer than 1e-5 to a
    step of the cdf may give the neighbouring value, after which the two images go different ways; so do those of a CPU
    and of a GPU. An image depends neither on the number of threads nor on the rest of the batch.

    Args:
        network: the weights; float64 is computed in float64, all other dtypes in float32 (not in TF32).
        size: (B, H, W).
        condition: what is added in each layer to the inputs of the vertical and of the horizontal gate, as pairs of
            tensors or None: [B, 2p] (V h of a vector h) or [B, 2p, H, W] (V * s of a map s). The link carries what is
            added to the vertical gate on to the horizontal one.
        uniforms: Tensor[B, C, H, W] in [0, 1), any floating dtype; by default drawn in float64.
        generator: what draws them, for a seed: ``torch.Generator().manual_seed(0)``, which is one of the CPU, draws
            the same for networks on all devices. By default torch's global one of the network's device.
        temperature: positive; below 1 for likelier images.
        image: integer Tensor[B, C, H, W]; where ``known``, bool and expandable to it, its values are kept, and the
            rest is drawn, each value given the known ones that come before it.
        known: see ``image``.
        return_logits: also return the logits that the values were drawn from, before the temperature.

    Returns:
        int64 Tensor[B, C, H, W] of values 0 ... K - 1; with ``return_logits`` also Tensor[B, C, K, H, W] in the dtype
        computed in. No gradient flows.

    Raises:
        TypeError: an argument is not of the type or dtype it must have.
        ValueError: a shape, a device, the temperature or a known value does not fit.
        NotImplementedError: there is no backend where the network is.
    """
    op = "pixelcnn_sample"
    addends, uniforms, start = _arguments(op, network, size, condition, uniforms, generator, temperature, image, known)
    addends = [None if isinstance(t, int) else t.detach() for pair in addends for t in pair]
    residual = [layer.residual for layer in network.layers]
    samples, logits = torch.ops.pyzoo.pixelcnn_sample(
        _flat(network), residual, addends, uniforms.detach(), start, temperature, return_logits
    )
    return (samples, logits) if return_logits else samples
