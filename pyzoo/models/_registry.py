"""The list of models: ``pyzoo.create_model(name)`` builds one, ``pyzoo.list_models()`` names them all."""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

# One module a paper. Each registers its models when it is imported.
PAPERS = (
    "resnet",
    "vgg",
    "spp_net",
    "fpn",
    "faster_rcnn",
    "mask_rcnn",
    "ssd",
    "yolo_v1",
    "pixelcnn",
    "gated_pixelcnn",
    "neural_style",
    "revnet",
    "mobilenet_v2",
)


@dataclass(frozen=True)
class Entry:
    """What is known of a model before it is built.

    Attributes:
        name: what :func:`create_model` takes.
        build: makes the model; keyword arguments override its defaults.
        paper: title, first author and arXiv number.
        task: ``"classification"``, logits of a batch of images; ``"features"``, a dict of their maps by layer;
            ``"detection"``, torchvision's contract: a list of images, with targets in training, becomes a dict of
            losses or a list of dicts of boxes, labels and scores; or ``"generation"``, logits [N, C, K, H, W] of a
            batch of images [N, C, H, W] of K levels, and of what they are conditioned on, if anything.
        input: what images the model wants: shape, dtype, color order, range, normalisation.
        parameters: how many numbers the model of the paper learns, exactly; masked weights do not count.
        tiny: arguments that make it small enough for a test.
        size: height and width of an image for the tiny model.
    """

    name: str
    build: Callable[..., nn.Module]
    paper: str
    task: str
    input: str
    parameters: int
    tiny: dict[str, Any]
    size: tuple[int, int]


_ENTRIES: dict[str, Entry] = {}


def register_model(name: str, build: Callable[..., nn.Module], **about) -> None:
    """Adds a model to the list; ``about`` are the fields of :class:`Entry`."""
    if name in _ENTRIES:
        raise ValueError(f"register_model: {name!r} is already the model of {_ENTRIES[name].paper}")
    _ENTRIES[name] = Entry(name, build, **about)


def _entries() -> dict[str, Entry]:
    for paper in PAPERS:
        importlib.import_module(f"pyzoo.models.{paper}")
    return _ENTRIES


def list_models(pattern: str = "*") -> list[str]:
    """The names of all models that match a shell pattern, as ``"resnet*"``."""
    return sorted(name for name in _entries() if fnmatch(name, pattern))


def table() -> str:
    """All models by paper, with what ``pyzoo reproduce`` shows of it, in Markdown: README.md has it."""
    lines = ["| paper | models | parameters | `pyzoo reproduce` |", "|---|---|---|---|"]
    by_paper: dict[str, list[Entry]] = {paper: [] for paper in PAPERS}
    for entry in _entries().values():
        build = getattr(entry.build, "func", entry.build)  # of a functools.partial
        by_paper[build.__module__.rpartition(".")[2]].append(entry)
    for paper, entries in by_paper.items():
        if not entries:  # FPN: a part of others
            continue
        numbers = sorted(entry.parameters for entry in entries)
        parameters = " .. ".join(f"{n / 1e6:.1f} M" for n in dict.fromkeys((numbers[0], numbers[-1])))
        source = Path(__file__).parents[1] / "reproduce" / f"{paper}.py"
        shows = ""  # of the first PixelCNN: what that of the second shows
        if source.exists():
            shows = f"`{paper}`: " + ast.get_docstring(ast.parse(source.read_text())).partition("\n")[0]
        names = ", ".join(f"`{name}`" for name in _abbreviated([entry.name for entry in entries]))
        lines.append(f"| {entries[0].paper} | {names} | {parameters} | {shows} |")
    return "\n".join(lines)


def _abbreviated(names: list[str]) -> list[str]:
    """resnet18, resnet34 -> resnet{18,34}."""
    families: dict[tuple[str, str], list[str]] = {}
    for name in names:
        before, number, after = re.fullmatch(r"(\D*)(\d*)(.*)", name).groups()
        families.setdefault((before, after), []).append(number)
    braced = {key: numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}" for key, numbers in families.items()}
    return [f"{before}{number}{after}" for (before, after), number in braced.items()]


def model_entry(name: str) -> Entry:
    """What is known of a model.

    Raises:
        ValueError: there is no model of that name; the message has the nearest ones.
    """
    entries = _entries()
    if name not in entries:
        near = difflib.get_close_matches(str(name), entries, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "pyzoo.list_models() has them all"
        raise ValueError(f"create_model: there is no model {name!r}; {hint}")
    return entries[name]


def create_model(name: str, **kwargs) -> nn.Module:
    """Builds a model with random weights, as its paper initialises them.

    ::

        model = pyzoo.create_model("resnet50", num_classes=10)

    Args:
        name: one of :func:`list_models`.
        kwargs: what that model's own function in ``pyzoo.models`` takes.

    Raises:
        ValueError: there is no model of that name.
    """
    return model_entry(name).build(**kwargs)
