"""Pictures that are too large for a net to see at once, in tiles: Neural style transfer in high resolution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from pyzoo.ops import gram_matrix


def windows(size: int, tile: int | None, halo: int) -> list[tuple[int, int, int, int]]:
    """Along one axis: where a crop begins, its core begins, its core ends and it ends. Cores tile the axis."""
    if tile is None:
        return [(0, 0, size, size)]
    ends = [(begin, min(begin + tile, size)) for begin in range(0, size, tile)]
    return [(max(0, begin - halo), begin, end, min(size, end + halo)) for begin, end in ends]


def halo_of(net: nn.Module, layers: Sequence[str]) -> tuple[int, int]:
    """The deepest stride of these layers, and how far beyond its own pixels their deepest cell sees, in multiples of
    that: 16 and 80 for conv5_1. What padding does at the edge of a crop does not reach its core."""
    reach, stride = 0, 1
    for layer in net.features[: max(net.index[name] for name in layers)]:
        if isinstance(layer, nn.Conv2d):
            reach += stride * (layer.kernel_size[0] // 2)
        elif not isinstance(layer, nn.ReLU):
            stride *= 2
    return stride, -(-reach // stride) * stride


class Tiles:
    """What a :class:`pyzoo.models.neural_style.StyleNet` makes of pictures [1, 3, H, W], from crops of them.

    Args:
        net: whose maps are wanted.
        layers: which, at most.
        tile: height and width of what the net sees at once, but for what that borders on, rounded up to cells of the
            deepest layer; None: the whole picture.
    """

    def __init__(self, net: nn.Module, layers: Sequence[str], tile: int | None):
        self.net = net
        stride, self.halo = halo_of(net, layers)
        self.tile = None if tile is None else -(-tile // stride) * stride

    def crops(self, image: Tensor, layers: Iterable[str], grad: bool = False) -> Iterator[tuple[Tensor, dict, dict]]:
        """Crops of the image; the cores of their maps, by layer; where those are in the maps of the whole, and the
        "crop" in the image."""
        for y0, y1, y2, y3 in windows(image.shape[2], self.tile, self.halo):
            for x0, x1, x2, x3 in windows(image.shape[3], self.tile, self.halo):
                crop = image.detach()[..., y0:y3, x0:x3].requires_grad_(grad)
                cores, places = {}, {"crop": (slice(y0, y3), slice(x0, x3))}
                for name, maps in self.net(crop, layers).items():
                    s = self.net.stride(name)  # divides all but the size of the image, which pooling rounds down
                    cores[name] = maps[..., (y1 - y0) // s : (y2 - y0) // s, (x1 - x0) // s : (x2 - x0) // s]
                    places[name] = slice(y1 // s, y2 // s), slice(x1 // s, x2 // s)
                yield crop, cores, places

    def maps(self, image: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """Those of the whole."""
        whole: dict[str, Tensor] = {}
        for _, maps, places in self.crops(image, layers):
            for name, core in maps.items():
                if name not in whole:
                    size = [side // self.net.stride(name) for side in image.shape[2:]]
                    whole[name] = core.new_empty(1, *size, core.shape[1]).permute(0, 3, 1, 2)
                whole[name][..., places[name][0], places[name][1]] = core
        return whole

    def grams(self, image: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """Gram matrices over N M."""
        grams: dict[str, Tensor] = {}
        for _, maps, _ in self.crops(image, layers):
            for name, core in maps.items():
                part = self.gram_part(image, name, core)
                grams[name] = grams[name] + part if name in grams else part
        return grams

    def gram_part(self, image: Tensor, name: str, core: Tensor) -> Tensor:
        """What the positions of ``core`` give to the Gram matrix of the whole image."""
        positions = (image.shape[2] // self.net.stride(name)) * (image.shape[3] // self.net.stride(name))
        return gram_matrix(core) * (core.shape[2] * core.shape[3] / positions)
