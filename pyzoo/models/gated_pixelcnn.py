"""Conditional Image Generation with PixelCNN Decoders. A. van den Oord, N. Kalchbrenner, O. Vinyals, L. Espeholt,
A. Graves, K. Kavukcuoglu. NIPS 2016, arXiv 1606.05328.

An image is generated value by value: p(x) is the product of p(x_i | x_1 ... x_i-1), row by row, pixel by pixel, red
before green before blue, all of them from one pass of masked convolutions, each a softmax over 256 levels. A vertical
stack sees all rows above and a horizontal one the row so far, so that no pixel before is missed; their units are gated,
y = tanh(W_f * x) . sigmoid(W_g * x), and conditioned on a class, a vector or what an encoder makes of another image.

:class:`PixelCNN` is the earlier net (Pixel Recurrent Neural Networks, A. van den Oord et al., ICML 2016, arXiv
1601.06759): one stack of masked convolutions with ReLU, which has a blind spot.

What the paper leaves open: levels are scaled to [-1, 1]; m, which makes the map s = m(h), and the encoder of the
auto-encoder are those below. Implementations with shortcuts between vertical layers and color groups of every third
channel have another geometry, so their weights do not fit here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models._registry import register_model
from pyzoo.ops import MaskedConv2d, PixelCNNLayer, PixelCNNNetwork, pixelcnn_sample
from pyzoo.ops.masked_conv2d import live_weights

# ----------------------------------------------------------------------------------------------------------- likelihood


def bits_per_dim(logits: Tensor, x: Tensor) -> Tensor:
    """-log2 p(x) over the number of values: the loss. ``logits`` [N, C, K, H, W] of levels ``x`` [N, C, H, W]."""
    return F.cross_entropy(logits.flatten(0, 1), x.flatten(0, 1).long()) / math.log(2)


class Autoregressive(nn.Module):
    """``model(x, h)``: images [N, C, H, W] of integers 0 ... K - 1 -> logits [N, C, K, H, W], each made of the values
    that come before its own, and of ``h``, if the model is conditional.

    A subclass has ``logits(image, s)``: of the scaled image, and of what :meth:`condition_map` makes of h.
    """

    def __init__(self, channels: int, levels: int, condition: int = 0, location: nn.Module | None = None):
        super().__init__()
        if channels < 1 or levels < 2:
            name = type(self).__name__
            raise ValueError(f"{name}: channels must be at least 1 and levels 2, got {channels} and {levels}")
        self.channels, self.levels, self.condition, self.location = channels, levels, condition, location

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        image = self.scale(x)
        return self.logits(image, self.condition_map(h, (len(x), *x.shape[2:])))

    def scale(self, x: Tensor) -> Tensor:
        """Levels 0 ... K - 1 as numbers from -1 to 1, in the dtype of the weights."""
        name, parameter = type(self).__name__, next(self.parameters())
        if not isinstance(x, Tensor) or x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: x must be a tensor of integers, the levels, got {got}")
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"{name}: x must have shape [N, {self.channels}, H, W], got {list(x.shape)}")
        if not torch.compiler.is_compiling() and x.numel():
            least, most = (int(value) for value in x.aminmax())
            if least < 0 or most >= self.levels:
                raise ValueError(f"{name}: x must be in [0, {self.levels}), got {least if least < 0 else most}")
        return x.to(parameter.dtype) * (2 / (self.levels - 1)) - 1

    def condition_map(self, h: Tensor | None, size: Sequence[int]) -> Tensor | None:
        """What the layers are conditioned on: s = m(h) [N, channels, H, W], or h itself as a map [N, condition, 1, 1].

        Args:
            h: [N, condition] of a floating dtype; or [N] of integers, classes: short for one-hot vectors.
            size: (N, H, W) of the images.
        """
        name, parameter = type(self).__name__, next(self.parameters())
        if not self.condition:
            if h is not None:
                raise ValueError(f"{name}: h must be None, as the model has no condition")
            return None
        if not isinstance(h, Tensor) or h.dtype == torch.bool or h.is_complex():
            got = h.dtype if isinstance(h, Tensor) else type(h).__name__
            raise TypeError(f"{name}: h must be a tensor of floats, or of integers, classes, got {got}")
        shape = (size[0], self.condition) if h.is_floating_point() else (size[0],)
        if h.shape != shape:
            raise ValueError(f"{name}: h must have shape {list(shape)} if of {h.dtype}, got {list(h.shape)}")
        if not h.is_floating_point():
            bad = () if torch.compiler.is_compiling() else h[(h < 0) | (h >= self.condition)]
            if len(bad):
                raise ValueError(f"{name}: h must be classes in [0, {self.condition}), got {int(bad[0])}")
            h = F.one_hot(h.long(), self.condition)
        h = h.to(parameter.dtype)
        if self.location is None:
            return h[..., None, None]
        s = self.location(h)
        if s.shape[2:] != tuple(size[1:]):
            raise ValueError(f"{name}: images must be {list(s.shape[2:])}, as location, got {list(size[1:])}")
        return s

    @torch.no_grad()
    def sample(
        self,
        size: Sequence[int],
        h: Tensor | None = None,
        *,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        image: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Images [N, C, H, W] for ``size`` (N, H, W), by a full pass for each value. Arguments as of
        :func:`pyzoo.ops.pixelcnn_sample`."""
        if (image is None) != (known is None):
            raise ValueError(f"{type(self).__name__}: image and known go together, got only one of them")
        shape, device = (size[0], self.channels, *size[1:]), next(self.parameters()).device
        s = self.condition_map(h, size)
        if uniforms is None:
            source = device if generator is None else generator.device
            uniforms = torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)
        known = torch.zeros(shape, dtype=torch.bool, device=device) if known is None else known.expand(shape)
        x = torch.zeros(shape, dtype=torch.int64, device=device)
        x = x if image is None else torch.where(known, image, x)
        for i in range(shape[2]):
            for j in range(shape[3]):
                for c in range(shape[1]):
                    logits = self.logits(self.scale(x), s)[:, c, :, i, j].double()
                    cdf = (logits / temperature).softmax(1).cumsum(1)
                    drawn = (cdf < uniforms[:, c, i, j, None]).sum(1).clamp(max=self.levels - 1)
                    x[:, c, i, j] = torch.where(known[:, c, i, j], x[:, c, i, j], drawn)
        return x


# ------------------------------------------------------------------------------------------ Gated PixelCNN, Section 2


def gate(x: Tensor) -> Tensor:
    """tanh(x_f) . sigmoid(x_g), equation 2: x_f and x_g are the halves of the channels."""
    f, g = x.chunk(2, 1)
    return f.tanh() * g.sigmoid()


class GatedLayer(nn.Module):
    """Figure 2. Vertical and horizontal maps [N, width, H, W] and s -> the same of the next layer.

    The first layer reads the image instead. It alone excludes the row itself from the vertical stack and the pixel
    itself from the horizontal one, so nothing is added to what it gives: that would be the pixel.
    """

    def __init__(self, inputs: int, width: int, kernel: int, *, colors: int, condition: int, gated: bool, first: bool):
        super().__init__()
        outputs, self.first = (2 if gated else 1) * width, first
        self.activation = gate if gated else F.relu
        kind, self.rows = ("a" if first else "b"), kernel // 2 + 1
        # Of the kernel's height the rows above count; with them, but for the first layer, the middle one.
        height = 2 * self.rows + 1 if first else kernel
        order = {"colors": colors, "gates": 2 if gated else 1}
        self.vertical = MaskedConv2d(inputs, outputs, (height, kernel), mask=f"vertical_{kind}")
        self.horizontal = MaskedConv2d(inputs, outputs, (1, kernel), mask=f"horizontal_{kind}", **order)
        self.link = MaskedConv2d(outputs, outputs, 1, mask="vertical_b")  # of one tap: masks nothing
        self.output = MaskedConv2d(width, width, 1, mask="B", colors=colors)
        if condition:  # equation 4, and with a map s equation 5
            self.vertical_condition = nn.Conv2d(condition, outputs, 1, bias=False)
            self.horizontal_condition = nn.Conv2d(condition, outputs, 1, bias=False)

    def forward(self, v: Tensor, h: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        v, out = self.vertical(v), self.horizontal(h)
        if s is not None:
            v, out = v + self.vertical_condition(s), out + self.horizontal_condition(s)
        out = self.output(self.activation(out + self.link(v)))
        return self.activation(v), out if self.first else h + out

    def weights(self) -> PixelCNNLayer:
        """Those that count, as the sampler wants them."""
        return PixelCNNLayer(
            *(self.vertical.weight[:, :, : self.rows], self.vertical.bias),
            *(self.horizontal.weight[..., : self.rows], self.horizontal.bias),
            *(self.link.weight, self.link.bias),
            *(self.output.weight, self.output.bias),
            residual=not self.first,
        )


def init_weights(model: nn.Module) -> None:
    """LeCun's normal initialisation, 1 / sqrt(n) of the n weights that count, and no bias: gates shrink what they get,
    and with PyTorch's, which counts what is masked, they would learn slower still."""
    for m in model.modules():
        if isinstance(m, MaskedConv2d):
            with torch.device("cpu"):
                live = live_weights(m.gates * m.colors, m.colors, m.kernel_size, m.mask, colors=m.colors, gates=m.gates)
            fan_in = int(live.sum()) / len(live) * m.in_channels / m.colors
            nn.init.normal_(m.weight, std=max(fan_in, 1) ** -0.5)
            nn.init.zeros_(m.bias)


def make_head(width: int, hidden: int, channels: int, levels: int) -> nn.Sequential:
    """Two 1x1 convolutions, each after a ReLU: [N, width, H, W] -> [N, channels * levels, H, W]."""
    conv = partial(MaskedConv2d, kernel_size=1, mask="B", colors=channels)
    return nn.Sequential(nn.ReLU(), conv(width, hidden), nn.ReLU(), conv(hidden, channels * levels))


class GatedPixelCNN(Autoregressive):
    """``model(x, h)``: images [N, C, H, W] of integers 0 ... K - 1 -> logits [N, C, K, H, W].

    Args:
        channels: C, colors that are generated one after the other.
        levels: K.
        width: maps of each stack, a multiple of ``channels``.
        layers: after the first.
        kernel: of those, odd.
        first_kernel: of the first layer, odd.
        head: maps between the last two convolutions.
        condition: length of the vectors h, or number of classes; 0 for none.
        location: height and width of the images, if h says what is where: layers then see the map s = m(h).
        gated: else units are ReLU, which the paper compares with.
    """

    def __init__(
        self,
        channels: int = 3,
        levels: int = 256,
        *,
        width: int = 384,
        layers: int = 20,
        kernel: int = 5,
        first_kernel: int = 7,
        head: int = 1023,
        condition: int = 0,
        location: tuple[int, int] | None = None,
        gated: bool = True,
    ):
        if location and not condition:
            raise ValueError("GatedPixelCNN: location needs a condition, got 0")
        super().__init__(channels, levels, condition, location and Deconvolution(condition, width, location))
        layer = partial(GatedLayer, colors=channels, condition=width if location else condition, gated=gated)
        self.gated = gated
        self.layers = nn.ModuleList([layer(channels, width, first_kernel, first=True)])
        self.layers.extend(layer(width, width, kernel, first=False) for _ in range(layers))
        self.head = make_head(width, head, channels, levels)
        init_weights(self)

    def logits(self, image: Tensor, s: Tensor | None = None) -> Tensor:
        v = h = image
        for layer in self.layers:
            v, h = layer(v, h, s)
        return self.head(h).unflatten(1, (self.channels, self.levels))

    def network(self) -> PixelCNNNetwork:
        """The weights as :func:`pyzoo.ops.pixelcnn_sample` wants them; nothing is copied."""
        head = [(conv.weight, conv.bias) for conv in self.head if isinstance(conv, MaskedConv2d)]
        return PixelCNNNetwork([layer.weights() for layer in self.layers], head)

    @torch.no_grad()
    def sample(self, size: Sequence[int], h: Tensor | None = None, *, cached: bool = True, **options) -> Tensor:
        """Draws images, or the rest of images, from p(x | h).

        Args:
            size: (N, H, W).
            h: of each image, as in training.
            cached: else by a full pass for each value, as it is done for units without a gate.
            options: ``generator``, ``temperature``, ``uniforms``; ``image`` and ``known``, a bool mask: what is known
                is kept. As of :func:`pyzoo.ops.pixelcnn_sample`.

        Returns:
            int64 Tensor[N, C, H, W].
        """
        if not (cached and self.gated):
            return super().sample(size, h, **options)
        s, terms = self.condition_map(h, size), None
        if s is not None:
            terms = [(layer.vertical_condition(s), layer.horizontal_condition(s)) for layer in self.layers]
            terms = terms if self.location is not None else [tuple(t.flatten(1) for t in pair) for pair in terms]
        return pixelcnn_sample(self.network(), size, terms, **options)


class Deconvolution(nn.Sequential):
    """m of Section 2.3: h [N, inputs] -> s [N, channels, H, W]. It begins with a map of about 4 x 4."""

    def __init__(self, inputs: int, channels: int, size: tuple[int, int]):
        doublings = 0
        while not any(side % 2 ** (doublings + 1) or side < 8 * 2**doublings for side in size):
            doublings += 1
        start = (channels, *(side // 2**doublings for side in size))
        super().__init__(nn.Linear(inputs, math.prod(start)), nn.Unflatten(1, start))
        for _ in range(doublings):
            self.extend([nn.ReLU(), nn.ConvTranspose2d(channels, channels, 4, 2, 1)])


# -------------------------------------------------------------------------------------------- auto-encoder, Section 2.4


class PixelCNNAutoEncoder(nn.Module):
    """``model(x)``: images [N, C, H, W] of integers -> logits [N, C, K, H, W] of x given h = encoder(x).

    Trained end to end for the likelihood alone, the decoder takes care of texture, so h is left with what is in the
    image.

    Args:
        bottleneck: length of h; 10 and 100 in the paper.
        size: height and width of the images.
        maps: of the three convolutions of the encoder.
        decoder: options of :class:`GatedPixelCNN`.
    """

    def __init__(
        self,
        bottleneck: int = 100,
        size: tuple[int, int] = (32, 32),
        *,
        maps: tuple[int, int, int] = (100, 150, 200),
        **decoder,
    ):
        super().__init__()
        if min(size) < 4 or bottleneck < 1:
            got = f"{list(size)} and {bottleneck}"
            raise ValueError(f"PixelCNNAutoEncoder: size must be at least 4 x 4 and bottleneck 1, got {got}")
        self.decoder = GatedPixelCNN(condition=bottleneck, **decoder)
        self.size = tuple(size)
        self.encoder = nn.Sequential(
            nn.Conv2d(self.decoder.channels, maps[0], 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(maps[0], maps[1], 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(maps[1], maps[2], 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(maps[2] * (size[0] // 4) * (size[1] // 4), bottleneck),
        )

    def encode(self, x: Tensor) -> Tensor:
        """h [N, bottleneck]."""
        image = self.decoder.scale(x)
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(f"PixelCNNAutoEncoder: images must be {list(self.size)}, got {list(x.shape[2:])}")
        return self.encoder(image)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, self.encode(x))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, **options) -> Tensor:
        """An image drawn from p(. | h) for each of ``x``; options as of :meth:`GatedPixelCNN.sample`."""
        return self.decoder.sample((len(x), *self.size), self.encode(x), **options)


# --------------------------------------------------------------------------------------- PixelCNN, arXiv 1601.06759


class Residual(nn.Module):
    """1x1 to half of the maps, a masked convolution, 1x1 back, each after a ReLU; and the input."""

    def __init__(self, width: int, kernel: int, colors: int):
        super().__init__()
        conv = partial(MaskedConv2d, mask="B", colors=colors)
        self.conv1 = conv(2 * width, width, 1)
        self.conv2 = conv(width, width, kernel)
        self.conv3 = conv(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.conv2(self.conv1(x.relu()).relu()).relu())


class PixelCNN(Autoregressive):
    """``model(x)``: images [N, C, H, W] of integers 0 ... K - 1 -> logits [N, C, K, H, W]. Not conditional.

    What is in its window before the pixel, but right of it, it sees in part only: of the row above,
    ``first_kernel // 2`` columns.

    Args:
        width: half of the maps between blocks; a multiple of ``channels``. paper: 128, which three does not divide.
        layers: residual blocks.
        channels, levels, kernel, first_kernel, head: as of :class:`GatedPixelCNN`.
    """

    def __init__(
        self,
        channels: int = 3,
        levels: int = 256,
        *,
        width: int = 129,
        layers: int = 15,
        kernel: int = 3,
        first_kernel: int = 7,
        head: int = 1023,
    ):
        super().__init__(channels, levels)
        self.first = MaskedConv2d(channels, 2 * width, first_kernel, mask="A", colors=channels)
        self.blocks = nn.Sequential(*(Residual(width, kernel, channels) for _ in range(layers)))
        self.head = make_head(2 * width, head, channels, levels)
        init_weights(self)

    def logits(self, image: Tensor, s: None = None) -> Tensor:
        return self.head(self.blocks(self.first(image))).unflatten(1, (self.channels, self.levels))


# ------------------------------------------------------------------------------------------------------------- registry

PAPER = "Conditional Image Generation with PixelCNN Decoders, van den Oord et al., arXiv 1606.05328"
ICML = "Pixel Recurrent Neural Networks, van den Oord et al., arXiv 1601.06759"
TINY = {"levels": 4, "width": 6, "layers": 2, "kernel": 3, "first_kernel": 3, "head": 6}
ABOUT = {"task": "generation", "input": "[N, 3, H, W] integers, RGB 0 .. 255", "size": (6, 9)}

register_model("gated_pixelcnn", GatedPixelCNN, paper=PAPER, parameters=119_569_023, tiny=TINY, **ABOUT)
register_model(
    "gated_pixelcnn_imagenet",
    partial(GatedPixelCNN, condition=1000),
    paper=PAPER,
    parameters=151_825_023,
    tiny={**TINY, "condition": 5},
    **ABOUT,
)
register_model(
    "pixelcnn_autoencoder",
    PixelCNNAutoEncoder,
    paper=PAPER,
    parameters=124_727_673,
    tiny={**TINY, "bottleneck": 4, "size": (6, 9), "maps": (3, 4, 5)},
    **ABOUT,
)
register_model("pixelcnn", PixelCNN, paper=ICML, parameters=2_558_865, tiny=TINY, **ABOUT)
