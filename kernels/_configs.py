"""Which configuration a kernel is launched with: its blocks, warps and stages.

A launcher offers candidates, the first of which is a sane default. What has been measured is data: ``<family of the
GPU>.json`` maps a kernel to the candidates that won, each with its dtype and shape, and a launch takes that of the
nearest shape. ``pyzoo tune`` measures, nothing else does; it writes into the user's cache, which comes before what was
installed.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

INSTALLED = Path(__file__).parent / "configs"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyzoo" / "configs"


def pick(kernel: Callable, candidates: Callable, device: torch.device, dtype: torch.dtype, **shape: int) -> dict:
    """The configuration that won for the nearest measured shape of this dtype, or the first of
    ``candidates(**shape)``."""
    found = list(candidates(**shape))
    return choose(kernel.__name__, found, family(device), str(dtype).removeprefix("torch."), shape)


def nearest(kernel: str, candidates: list[dict], family: str, dtype: str, shape: dict[str, int]) -> dict:
    entries = measured(family).get(kernel, [])
    # Not among the candidates: they have changed since, or this shape has others.
    near = [entry for entry in entries if entry["dtype"] == dtype and entry["config"] in candidates]

    def distance(entry: dict) -> float:
        return sum(abs(math.log2((n + 1) / (entry["shape"].get(name, 0) + 1))) for name, n in shape.items())

    return min(near, key=distance)["config"] if near else candidates[0]


choose = nearest  # what pyzoo tune replaces while it measures


@functools.cache
def measured(family: str) -> dict[str, list[dict]]:
    """kernel -> entries {"dtype", "shape", "config"}."""
    for folder in (CACHE, INSTALLED):
        file = folder / f"{family}.json"
        if file.exists():
            return json.loads(file.read_text())
    return {}


@functools.cache
def family(device: torch.device) -> str:
    """``sm_90`` for an H100 or H200, ``gfx942`` for an MI300, else the type of the device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", "").partition(":")[0] or f"sm_{properties.major}{properties.minor}"
