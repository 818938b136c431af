"""The ``.weights`` files of darknet, the program of YOLO's authors: read into a :class:`~pyzoo.models.yolo_v1.YOLOv1`,
and written from one.

A file is a header and then, layer after layer, little-endian float32 and nothing else: no names, no shapes.

    header      int32 major, minor, revision; the images seen, as int32, from version 0.2 on as int64
    convolution biases; with batch norm its scales, means, variances; weights [out, in, k, k]
    local       biases [out, row, column]; weights [place, out, in * k * k]
    connected   biases; weights, [out, in] today, [in, out] in files of 2015
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pyzoo.models.yolo_v1 import ConvLayer, LocallyConnected2d, YOLOv1

FLAG = 1000  # a major or minor version above says that connected weights are [in, out]


def _layers(model: YOLOv1) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
    """Each layer with its tensors, in the order of the file."""
    for name, module in model.named_modules():
        if isinstance(module, ConvLayer):
            bn = module.bn
            if bn is None:
                first = [("biases", module.conv.bias)]
            else:
                names = ("biases", "scales", "means", "variances")
                first = list(zip(names, (bn.bias, bn.weight, bn.running_mean, bn.running_var), strict=True))
            yield name, [*first, ("weights", module.conv.weight)]
        elif isinstance(module, (nn.Linear, LocallyConnected2d)):
            yield name, [("biases", module.bias), ("weights", module.weight)]


def _read_header(path: Path, file) -> tuple[int, int, int]:
    """Major and minor version, images seen; the file is left behind the header."""
    head = file.read(12)
    if len(head) < 12:
        raise ValueError(f"{path}: the header takes 16 bytes or more, the file has {len(head)}")
    major, minor, revision = struct.unpack("<3i", head)
    if min(major, minor, revision) < 0:
        raise ValueError(f"{path}: the header (bytes 0 to 12) says version {major}.{minor}.{revision}: not darknet's")
    count = struct.Struct("<q" if major * 10 + minor >= 2 and max(major, minor) < FLAG else "<i")
    tail = file.read(count.size)
    if len(tail) < count.size:
        raise ValueError(f"{path}: the header takes {12 + count.size} bytes, the file has {12 + len(tail)}")
    (seen,) = count.unpack(tail)
    if seen < 0:
        raise ValueError(f"{path}: the header (bytes 12 to {12 + count.size}) says {seen} images were seen")
    return major, minor, seen


def load_weights(model: YOLOv1, path: str | os.PathLike, *, fc_transposed: bool | None = None) -> int:
    """Reads a file into the model, and returns how many images it was trained with. The model changes only if the whole
    file is right.

    Args:
        model: of the configuration that the file was written with; the file itself does not tell.
        path: the file.
        fc_transposed: whether weights of connected layers are [in, out], as in files of 2015. By default what the
            header says; that of version 0.0 and 0.1 does not, and needs an answer.

    Raises:
        ValueError: the file is shorter or longer than the model, or has values that are none. The message names the
            layer and the bytes.
    """
    path = Path(path)
    with open(path, "rb") as file:
        major, minor, seen = _read_header(path, file)
        start, size = file.tell(), os.fstat(file.fileno()).st_size
    if fc_transposed is None:
        fc_transposed = max(major, minor) > FLAG
        if not fc_transposed and major * 10 + minor < 2:
            raise ValueError(
                f"{path}: a file of version {major}.{minor} does not say how weights of connected layers are stored:"
                " fc_transposed must be True ([in, out], as in 2015) or False ([out, in])"
            )

    layers = list(_layers(model))
    at = start
    for name, tensors in layers:
        values = sum(t.numel() for _, t in tensors)
        if at + 4 * values > size:
            raise ValueError(
                f"{path}: too short: layer {name} takes bytes {at} to {at + 4 * values}, the file has {size}"
            )
        at += 4 * values
    if at != size:
        raise ValueError(
            f"{path}: too long: the last layer, {layers[-1][0]}, ends at byte {at}, the file has {size - at} more"
        )

    data = torch.from_numpy(np.memmap(path, "<f4", "c", start))
    loaded, at = [], 0
    for name, tensors in layers:
        for what, tensor in tensors:
            values = data[at : at + tensor.numel()]
            if not values.isfinite().all() or (what == "variances" and (values < 0).any()):
                span = f"bytes {start + 4 * at} to {start + 4 * (at + tensor.numel())}"
                raise ValueError(f"{path}: layer {name}: {what} ({span}) must be finite, variances not negative")
            at += tensor.numel()
            is_transposed = fc_transposed and what == "weights" and tensor.dim() == 2
            loaded.append((tensor, values.view(*tensor.shape[::-1]).T if is_transposed else values.view(tensor.shape)))
    with torch.no_grad():
        for tensor, values in loaded:
            tensor.copy_(values)
    return seen


def save_weights(model: YOLOv1, path: str | os.PathLike, *, seen: int = 0) -> None:
    """Writes the model to a file of version 0.2, which darknet reads with the model's configuration.

    Args:
        model: with parameters of any dtype; the file has float32.
        path: the file; what was there is replaced.
        seen: images that it was trained with; darknet goes on from there.
    """
    with open(path, "wb") as file:
        file.write(struct.pack("<3iq", 0, 2, 0, seen))
        for _, tensors in _layers(model):
            for _, tensor in tensors:
                file.write(tensor.detach().float().cpu().numpy().astype("<f4").tobytes())
