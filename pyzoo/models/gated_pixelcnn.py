"""Conditional Image Generation with PixelCNN Decoders. A. van den Oord, N. Kalchbrenner, O. Vinyals, L. Espeholt,
A. Graves, K. Kavukcuoglu. NIPS 2016, arXiv 1606.05328.

A PixelCNN (:mod:`pyzoo.models.pixelcnn`) without its blind spot: a vertical stack sees all rows above and a horizontal
one the row so far, so that no pixel before is missed. Their units are gated, y = tanh(W_f * x) . sigmoid(W_g * x), and
conditioned on a class, a vector or what an encoder makes of another image.

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
from pyzoo.models.pixelcnn import (  # noqa: F401 - PixelCNN and the loss go with this net
    ABOUT,
    TINY,
    Autoregressive,
    PixelCNN,
    bits_per_dim,
    init_weights,
    make_head,
)
from pyzoo.ops import MaskedConv2d, PixelCNNLayer, PixelCNNNetwork, pixelcnn_sample

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
        super().__init__(channels, levels)
        self.condition, self.location = condition, location and Deconvolution(condition, width, location)
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

    def condition_map(self, h: Tensor | None, size: Sequence[int]) -> Tensor | None:
        """What the layers are conditioned on: s = m(h) [N, channels, H, W], or h itself as a map [N, condition, 1, 1].

        Args:
            h: [N, condition] of a floating dtype; or [N] of integers, classes: short for one-hot vectors.
            size: (N, H, W) of the images.
        """
        name, parameter = type(self).__name__, next(self.parameters())
        if not self.condition:
            return super().condition_map(h, size)
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

    def network(self) -> PixelCNNNetwork:
        """The weights as :func:`pyzoo.ops.pixelcnn_sample` wants them; nothing is copied."""
        head = [(conv.weight, conv.bias) for conv in self.head if isinstance(conv, MaskedConv2d)]
        return PixelCNNNetwork([layer.weights() for layer in self.layers], head)

    @torch.no_grad()
    def sample(self, size: Sequence[int], h: Tensor | None = None, *, cached: bool = True, **options) -> Tensor:
        """Images [N, C, H, W] drawn from p(x | h), or the rest of images.

        Args:
            cached: else by a full pass for each value, as it is done for units without a gate.
            size, h, options: as of :meth:`Autoregressive.sample`.
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


# ------------------------------------------------------------------------------------------------------------- registry

PAPER = "Conditional Image Generation with PixelCNN Decoders, van den Oord et al., arXiv 1606.05328"

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
