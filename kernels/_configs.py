"""Which configuration a kernel is launched with: its blocks, warps and stages.

A launcher offers candidates, the first of which is a sane default. What has been measured is data: ``configs/<family of
the GPU>.json`` maps a kernel to the candidates that won, each with its dtype and shape, and a launch takes that of the
nearest shape. Nothing is measured in the user's process, except by ``pyzoo tune``.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "configs"


def pick(kernel: Callable, candidates: Callable, device: torch.device, dtype: torch.dtype, **shape: int) -> dict:
    """The configuration that won for the nearest measured shape of this dtype, or the first of
    ``candidates(**shape)``."""
    found = list(candidates(**shape))
    entries = _measured(_family(device)).get(kernel.__name__)
    nearest = _nearest(entries, str(dtype).removeprefix("torch."), shape) if entries else None
    return nearest if nearest in found else found[0]  # not in them: they have changed since, or depend on the shape


def _nearest(entries: list[dict], dtype: str, shape: dict[str, int]) -> dict | None:
    near = [entry for entry in entries if entry["dtype"] == dtype and entry["shape"].keys() == shape.keys()]

    def distance(entry: dict) -> float:
        return sum(abs(math.log2((n + 1) / (entry["shape"][name] + 1))) for name, n in shape.items())

    return min(near, key=distance)["config"] if near else None


@functools.cache
def _measured(family: str) -> dict[str, list[dict]]:
    """kernel -> entries {"dtype", "shape", "config"}."""
    file = FOLDER / f"{family}.json"
    return json.loads(file.read_text()) if file.exists() else {}


@functools.cache
def _family(device: torch.device) -> str:
    """``sm_90`` for an H100 or H200, ``gfx942`` for an MI300, else the type of the device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", "").partition(":")[0] or f"sm_{properties.major}{properties.minor}"
