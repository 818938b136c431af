"""Very Deep Convolutional Networks for Large-Scale Image Recognition. K. Simonyan, A. Zisserman. ICLR 2015,
arXiv 1409.1556.

Nothing but 3x3 convolutions, in blocks between max-pools: two of them see as much as one 5x5 and three as one 7x7, with
fewer weights and more non-linearities between. Depth is what the configurations A to E differ in.

Parameter names are torchvision's. Layers have the names of the paper's Caffe files, ``conv4_2``, ``relu4_2``,
``pool4``, and every one of them can be tapped (:meth:`VGG.taps`): style transfer, perceptual losses and detectors do.

Departures from the paper, each with an option for the original:
    He's initialisation; ``init="normal"`` is the paper's, from which only configuration A trains without batch norm,
    and ``init="glorot"`` what its authors recommend since.
    other sizes than 224 are average-pooled to 7x7 before the first linear layer; :func:`fc_as_conv` is the paper's
    dense evaluation, Section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from pyzoo.models._registry import register_model
from pyzoo.nn.conv import conv_bn, has_hooks

# Table 1. Channels of the convolutions of each block, in multiples of the first block's; negative: a 1x1 convolution.
TABLE_1 = {
    "A": ((1,), (2,), (4, 4), (8, 8), (8, 8)),
    "B": ((1, 1), (2, 2), (4, 4), (8, 8), (8, 8)),
    "C": ((1, 1), (2, 2), (4, 4, -4), (8, 8, -8), (8, 8, -8)),
    "D": ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)),
    "E": ((1, 1), (2, 2), (4, 4, 4, 4), (8, 8, 8, 8), (8, 8, 8, 8)),
}
POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}

# ------------------------------------------------------------------------------------------------------------- features


def make_features(
    config: str, *, batch_norm: bool = False, width: int = 64, pool: str = "max", in_channels: int = 3
) -> nn.Sequential:
    """The convolutional part: [N, 3, H, W] -> [N, 8 * width, H / 32, W / 32]. Arguments as of :class:`VGG`."""
    layers: list[nn.Module] = []
    for block in TABLE_1[config]:
        for multiple in block:
            channels, size = abs(multiple) * width, 3 if multiple > 0 else 1
            layers.append(nn.Conv2d(in_channels, channels, size, padding=size // 2))
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU(inplace=True))
            in_channels = channels
        layers.append(POOLS[pool](2, 2))
    return nn.Sequential(*layers)


def layer_index(features: Iterable[nn.Module]) -> dict[str, int]:
    """Where each layer of :func:`make_features` is: {"conv1_1": 0, "relu1_1": 1, ..., "pool1": 4, ...}."""
    index, block, conv = {}, 1, 0
    for i, layer in enumerate(features):
        if isinstance(layer, nn.Conv2d):
            conv += 1
            index[f"conv{block}_{conv}"] = i
        elif isinstance(layer, nn.BatchNorm2d):
            index[f"bn{block}_{conv}"] = i
        elif isinstance(layer, nn.ReLU):
            index[f"relu{block}_{conv}"] = i
        else:
            index[f"pool{block}"] = i
            block, conv = block + 1, 0
    return index


def run(layers: Iterable[nn.Module], x: Tensor, taps: dict[int, Tensor] | None = None) -> Tensor:
    """The layers one after the other, a convolution, its batch norm and its ReLU in one pass where that is the same.
    Outputs of the layers whose indices are keys of ``taps`` are put there."""
    layers, taps, i = list(layers), {} if taps is None else taps, 0
    while i < len(layers):
        layer, bn = layers[i], None
        if isinstance(layer, nn.Conv2d):
            if isinstance(_after(layers, i), nn.BatchNorm2d) and i not in taps:
                i, bn = i + 1, layers[i + 1]
            following = _after(layers, i)
            relu = type(following) is nn.ReLU and i not in taps and not has_hooks(following)
            x = conv_bn(x, layer, bn, "relu" if relu else None)
            i += relu
        else:
            x = run(layer, x) if isinstance(layer, nn.Sequential) else layer(x)
        if i in taps:  # an in-place ReLU may be next
            taps[i] = x.clone() if isinstance(_after(layers, i), nn.ReLU) else x
        i += 1
    return x


def _after(layers: list[nn.Module], i: int) -> nn.Module | None:
    return layers[i + 1] if i + 1 < len(layers) else None


# ---------------------------------------------------------------------------------------------------------------- model


class VGG(nn.Module):
    """[N, in_channels, H, W], H and W at least 32, -> logits [N, num_classes].

    Args:
        config: "A" to "E" of Table 1.
        num_classes: outputs.
        batch_norm: a batch norm after each convolution, as in torchvision's twins.
        width: channels of the first block; the later ones have 2, 4, 8 and 8 times as many.
        hidden: outputs of the two linear layers before the last.
        pool: "max", or "avg" as style transfer prefers.
        dropout: after these two.
        in_channels: of the images.
        init: "he", "normal" or "glorot".
    """

    def __init__(
        self,
        config: str = "D",
        num_classes: int = 1000,
        *,
        batch_norm: bool = False,
        width: int = 64,
        hidden: int = 4096,
        pool: str = "max",
        dropout: float = 0.5,
        in_channels: int = 3,
        init: str = "he",
    ):
        super().__init__()
        _check_choice("config", config, TABLE_1)
        _check_choice("pool", pool, POOLS)
        _check_choice("init", init, INITS)
        self.features = make_features(config, batch_norm=batch_norm, width=width, pool=pool, in_channels=in_channels)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(8 * width * 7 * 7, hidden),  # fc6
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),  # fc7
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),  # fc8
        )
        self.out_channels = 8 * width
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                INITS[init](module)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < 32:
            raise ValueError(f"VGG: images must be at least 32 x 32, got {x.shape[-2]} x {x.shape[-1]}")
        x = run(self.features, x.contiguous(memory_format=torch.channels_last))  # [N, 512, H / 32, W / 32]
        return self.classifier(self.avgpool(x).flatten(1))

    def taps(self, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Outputs of the layers of these names, and no layer after the last of them is run.

        Args:
            x: images [N, in_channels, H, W].
            names: "conv4_2" (before batch norm and ReLU), "bn4_2", "relu4_2" or "pool4".

        Raises:
            ValueError: there is no layer of such a name.
        """
        index, names = layer_index(self.features), list(names)
        for name in names:
            _check_choice("taps", name, index)
        taken = {index[name]: x for name in names}
        run(self.features[: max(taken, default=-1) + 1], x.contiguous(memory_format=torch.channels_last), taken)
        return {name: taken[index[name]] for name in names}


def _check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"VGG: {what} must be one of {', '.join(allowed)}, got {value!r}")


def _he(module: nn.Conv2d | nn.Linear) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        _normal(module)


def _normal(module: nn.Conv2d | nn.Linear) -> None:
    nn.init.normal_(module.weight, 0, 0.01)


def _glorot(module: nn.Conv2d | nn.Linear) -> None:
    nn.init.xavier_uniform_(module.weight)


INITS = {"he": _he, "normal": _normal, "glorot": _glorot}


def fc_as_conv(vgg: VGG) -> nn.Sequential:
    """The linear layers as convolutions, 7x7 and 1x1, with the same weights: [N, 512, h, w], what ``vgg.features``
    gives, -> a map of logits [N, num_classes, h - 6, w - 6]. Section 3.2; FCN builds on it."""
    layers: list[nn.Module] = []
    for layer in vgg.classifier:
        if isinstance(layer, nn.Linear):
            size = 1 if layers else 7
            conv = nn.Conv2d(layer.in_features // size**2, layer.out_features, size)
            conv.weight = nn.Parameter(layer.weight.detach().unflatten(1, (-1, size, size)).clone())
            conv.bias = nn.Parameter(layer.bias.detach().clone())
            layer = conv
        layers.append(type(layer)(layer.p) if isinstance(layer, nn.Dropout) else layer)
    return nn.Sequential(*layers).train(vgg.training)


def from_caffe_names(state: dict[str, Tensor], vgg: VGG) -> dict[str, Tensor]:
    """Weights named as in the paper's Caffe files, ``conv1_1.weight`` .. ``fc8.bias``, under the names of ``vgg``;
    others stay as they are."""
    names = {name: f"features.{i}" for name, i in layer_index(vgg.features).items()}
    names |= {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}
    split = {key: key.rpartition(".") for key in state}
    return {f"{names.get(layer, layer)}.{what}": state[key] for key, (layer, _, what) in split.items()}


# Mean and divisor of RGB in [0, 255], and whether the channels are then turned around. Weights want their own.
INPUTS = {
    "torchvision": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False),
    "caffe": ((123.68, 116.779, 103.939), (1, 1, 1), True),
}


def prepare(images: Tensor, weights: str = "torchvision") -> Tensor:
    """RGB images [..., 3, H, W] in [0, 1] as the weights were trained with: torchvision's, or those of "caffe" files,
    which are BGR with the mean subtracted."""
    _check_choice("weights", weights, INPUTS)
    mean, std, flip = INPUTS[weights]
    out = (images * 255 - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]
    return out.flip(-3) if flip else out


# ------------------------------------------------------------------------------------------------------------- registry

PAPER = "Very Deep Convolutional Networks for Large-Scale Image Recognition, Simonyan and Zisserman, arXiv 1409.1556"
ABOUT = {
    "paper": PAPER,
    "task": "classification",
    "input": "[N, 3, H, W] float, RGB in [0, 1] through pyzoo.models.vgg.prepare; trained at 224",
    "tiny": {"width": 4, "hidden": 16, "num_classes": 5},
    "size": (64, 97),
}

# name: configuration, parameters without and with batch norm
NETS = {
    "vgg11": ("A", 132_863_336, 132_868_840),
    "vgg13": ("B", 133_047_848, 133_053_736),
    "vgg16c": ("C", 133_638_952, None),
    "vgg16": ("D", 138_357_544, 138_365_992),
    "vgg19": ("E", 143_667_240, 143_678_248),
}

for _name, (_config, _parameters, _with_bn) in NETS.items():
    register_model(_name, partial(VGG, _config), parameters=_parameters, **ABOUT)
    if _with_bn:
        register_model(f"{_name}_bn", partial(VGG, _config, batch_norm=True), parameters=_with_bn, **ABOUT)
