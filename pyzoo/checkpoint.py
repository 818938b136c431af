"""Weights in files: loading them runs no code that a file brings, and what does not fit is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyzoo._extras import need

ALLOWED = (
    "a .safetensors file, or what torch.save wrote of a state dict: tensors by name, also under 'state_dict' or 'model'"
)
SHOWN = 5  # of a list of names


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    rename: Callable[[str], str | None] | None = None,
    strict: bool = True,
) -> dict[str, list[str]]:
    """Loads a state dict into a model. A prefix ``module.`` of all names, as parallel training leaves, is dropped.

    Args:
        model: is left as it was if anything is wrong.
        path: a ``.safetensors`` file, or one of ``torch.save``, which is read with ``weights_only=True``.
        rename: the model's name for a name in the file, or None to leave that one out.
        strict: the names and shapes must be the model's. Otherwise what fits is loaded, and the rest is left.

    Returns:
        the names that did not fit: "missing", "unexpected" and "shape"; all empty with ``strict=True``. Counters of
        batch norm (``num_batches_tracked``), which old files lack, are in none of them.

    Raises:
        ValueError: the file is damaged or has more in it than tensors, or (``strict=True``) does not fit.
    """
    path = Path(path)
    state = _strip_module(_read(path), model)
    if rename is not None:
        renamed = [(rename(name), name) for name in state]
        by_new = {new: old for new, old in renamed if new is not None}
        if len(by_new) < sum(new is not None for new, _ in renamed):
            twice = next(new for new, old in renamed if new is not None and by_new[new] != old)
            raise ValueError(f"load_weights: rename gives two tensors of {path} the name {twice!r}")
        state = {new: state[old] for new, old in by_new.items()}

    own = model.state_dict()
    mismatch = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "shape": [name for name in own if name in state and state[name].shape != own[name].shape],
    }
    mismatch = {k: [n for n in names if not n.endswith("num_batches_tracked")] for k, names in mismatch.items()}
    if strict and any(mismatch.values()):
        shapes = [f"{n} is {tuple(state[n].shape)}, must be {tuple(own[n].shape)}" for n in mismatch["shape"]]
        parts = {"missing": mismatch["missing"], "unexpected": mismatch["unexpected"], "wrong shape": shapes}
        found = "; ".join(f"{what} ({len(names)}): {_shorten(names)}" for what, names in parts.items() if names)
        raise ValueError(f"load_weights: {path} does not fit {type(model).__name__}: {found}")
    model.load_state_dict({n: state[n] for n in own if n in state and n not in mismatch["shape"]}, strict=False)
    return mismatch


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes a model's state dict to a ``.safetensors`` file; one that is there is replaced once this is complete."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_weights: path must end in .safetensors, got {str(path)!r}")
    # Copies, since the format knows neither strides nor tensors that share memory
    state = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in model.state_dict().items()}
    unfinished = path.with_name(path.name + ".unfinished")
    need("safetensors.torch", "pyzoo.checkpoint").save_file(state, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, path)


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict of a file."""
    with path.open("rb"):
        pass  # what cannot be opened is not a damaged file, and says so itself
    safetensors = need("safetensors.torch", "pyzoo.checkpoint") if path.suffix == ".safetensors" else None
    try:
        state = safetensors.load_file(path) if safetensors else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes
        reason = error.__context__ or error  # around it, torch puts the advice to load it unsafely
        text = f"{type(reason).__name__}: {' '.join(str(reason).split()):.150}"
        raise ValueError(f"load_weights: cannot read {path}; allowed is {ALLOWED} ({text})") from reason
    while isinstance(state, Mapping) and (inner := [state[k] for k in ("state_dict", "model") if k in state]):
        if not isinstance(inner[0], Mapping):
            break
        state = inner[0]
    entries = state.items() if isinstance(state, Mapping) else [(type(state).__name__, None)]
    wrong = [f"{k!r}" for k, value in entries if not (isinstance(k, str) and isinstance(value, Tensor))]
    if wrong or not entries:
        what = f"has other things in it: {_shorten(wrong)}" if wrong else "has no tensors in it"
        raise ValueError(f"load_weights: {path} {what}; allowed is {ALLOWED}")
    return dict(state)


def _strip_module(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    own = all(name.startswith("module.") for name in model.state_dict())
    if own or not all(name.startswith("module.") for name in state):
        return state
    return {name.removeprefix("module."): value for name, value in state.items()}


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
