"""Running functions a second time, like the first time: random numbers, train or eval mode, buffers, autocast, and
running statistics that are updated once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from pyzoo.nn._batch_statistics import Statistics, can_record, is_large, recording, replaying
from pyzoo.ops import _common as common

# In training mode these normalize with the statistics of the batch; without tracking they do just that and no more. In
# evaluation mode they leave their buffers alone.
_BATCH_NORMS = {_BatchNorm.forward, SyncBatchNorm.forward}


def run(name: str, function: nn.Module, x: Tensor) -> Tensor:
    """``function(x)``, which has to leave ``x`` alone and to keep its shape."""
    version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
    out = function(x)
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(out).__name__}")
    if out.shape != x.shape or out.device != x.device:
        raise ValueError(
            f"{name} must keep shape and device of its input, {list(x.shape)} on {x.device}, "
            f"got {list(out.shape)} on {out.device}"
        )
    if out.dtype not in common._FLOATS or (out.dtype == torch.float64) > (x.dtype == torch.float64):
        raise TypeError(f"{name} must return {x.dtype}, float32 or a narrower floating dtype, got {out.dtype}")
    if version is not None and x._version != version:
        raise RuntimeError(f"{name} modifies its input in place, as ReLU(inplace=True) does in the first place")
    return out


def updates_statistics(module: nn.Module) -> bool:
    return type(module).forward in _BATCH_NORMS and module.training and module.track_running_stats


@dataclass(eq=False, slots=True)
class Part:
    """One function in one call, and what its first run was like."""

    name: str
    module: nn.Module
    read: list[tuple[dict, str, Tensor]] = field(default_factory=list)  # parameters, buffers that it does not change
    trainable: list[Tensor] = field(default_factory=list)  # parameters that want a gradient, each once
    owners: list[dict] = field(default_factory=list)  # of buffers that it may change
    versions: list[int] = field(default_factory=list)  # of what it read
    changed: list[tuple[dict, str, Tensor]] = field(default_factory=list)  # buffers, as they were before
    norms: dict[_BatchNorm, list[Statistics | None]] = field(default_factory=dict)  # what these found in their batches
    rng: list[Tensor] | None = None  # before, if it drew random numbers
    dtype: torch.dtype | None = None


class Replay:
    """The functions of one call. ``first_run`` and ``second_run`` are contexts that run them, one at a time."""

    def __init__(self, functions: Sequence[tuple[str, nn.Module]]):
        self.flags: list[tuple[dict, str, bool]] = []  # of modules, in the second run
        self.parts = [self._part(name, module) for name, module in functions]

    def _part(self, name: str, module: nn.Module) -> Part:
        part, trainable = Part(name, module), {}
        modules, seen = [module], set()
        while modules:
            m = modules.pop()
            if m is None or m in seen:
                continue
            seen.add(m)
            modules += m._modules.values()
            attributes = m.__dict__
            if "training" in attributes:  # a compiled module passes it on
                self.flags.append((attributes, "training", m.training))
            parameters, buffers = m._parameters, m._buffers
            for key, p in parameters.items():
                if p is not None:
                    part.read.append((parameters, key, p))
                    if p.requires_grad:
                        trainable[id(p)] = p
            if buffers:
                if updates_statistics(m):
                    self.flags.append((attributes, "track_running_stats", False))
                    if can_record(m):
                        part.norms[m] = []
                elif type(m).forward not in _BATCH_NORMS:
                    part.owners.append(buffers)
                else:
                    part.read += [(buffers, key, b) for key, b in buffers.items() if b is not None]
        part.trainable = list(trainable.values())
        return part

    @contextmanager
    def first_run(self, x: Tensor) -> Iterator[Callable[[Part, Tensor], Tensor]]:
        self.generators, self.autocast = _generators(x), _autocast(x.device)
        rng = self._rng()

        def run_first(part: Part, x: Tensor) -> Tensor:
            nonlocal rng
            before = [(o, key, b, b._version, b.clone()) for o in part.owners for key, b in o.items() if b is not None]
            norms = part.norms if is_large(x) else {}
            for norm, found in norms.items():
                norm.__dict__["forward"] = recording(norm, found)
            try:
                out = run(part.name, part.module, x)
            finally:
                for norm in norms:
                    norm.__dict__.pop("forward", None)  # gone, if another thread runs the same modules
            part.dtype = out.dtype
            after = self._rng()
            if not all(map(torch.equal, rng, after)):
                part.rng, rng = rng, after
            for owner, key, b, version, copy in before:
                if owner.get(key) is b and b._version == version:
                    part.read.append((owner, key, b))
                else:
                    part.changed.append((owner, key, copy))
            part.versions = [t._version for _, _, t in part.read]
            return out

        with _set(self.autocast):
            yield run_first

    @contextmanager
    def second_run(self, stand_ins: Mapping[int, Tensor]) -> Iterator[Callable[[Part, Tensor], Tensor]]:
        """``stand_ins`` take the places of parameters, by the id of the parameter. All is as before when it is over."""
        rng, undo = self._rng(), []

        def put(owner: dict, key: str, value) -> None:
            undo.append((owner, key, owner.get(key, undo)))
            owner[key] = value

        def run_again(part: Part, x: Tensor) -> Tensor:
            for owner, key, b in part.changed:
                put(owner, key, b.clone())
            for norm, found in part.norms.items():
                if len(found) == 1 and found[0]:  # one batch, whatever order the function now takes
                    put(norm.__dict__, "forward", replaying(norm, found[0]))
                elif "forward" in norm.__dict__:  # it has that of another function, which shares it
                    put(norm.__dict__, "forward", MethodType(type(norm).forward, norm))
            if part.rng:
                self._set_rng(part.rng)
            out = run(part.name, part.module, x)
            if out.dtype != part.dtype:
                raise RuntimeError(f"{part.name} returned {part.dtype} in the forward pass, now {out.dtype}")
            return out

        try:
            for owner, key, flag in self.flags:
                if owner[key] is not flag:
                    put(owner, key, flag)
            for part in self.parts:
                for (owner, key, t), version in zip(part.read, part.versions, strict=True):
                    if t._version != version:
                        raise RuntimeError(
                            f"{part.name}: '{key}' of shape {list(t.shape)} was modified in place between forward and "
                            "backward"
                        )
                    value = stand_ins.get(id(t), t)
                    if owner[key] is not value:
                        put(owner, key, value)
            with _set(self.autocast):
                yield run_again
        finally:
            for owner, key, value in reversed(undo):
                if value is undo:  # there was none
                    owner.pop(key, None)
                else:
                    owner[key] = value
            self._set_rng(rng)

    def _rng(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _set_rng(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


def _generators(x: Tensor) -> list[torch.Generator]:
    """Where the functions may get random numbers from: the CPU, and the device of the input."""
    if isinstance(x, FakeTensor) or x.is_meta:
        return []
    if x.device.type == "cpu":
        return [torch.default_generator]
    return [torch.default_generator, torch.get_device_module(x.device).default_generators[x.device.index]]


def _autocast(device: torch.device) -> list[tuple[str, torch.dtype, bool]]:
    """Autocast as it is now, for the CPU and the device of the input."""
    kinds = [kind for kind in {"cpu", device.type} if torch.amp.is_autocast_available(kind)]
    return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]


@contextmanager
def _set(autocast: Sequence[tuple[str, torch.dtype, bool]]) -> Iterator[None]:
    """Without its cache: a weight that was cast where no graph is recorded must not be found by who records one, and
    would keep memory besides."""
    with ExitStack() as stack:
        for state in autocast:
            stack.enter_context(torch.autocast(*state, cache_enabled=False))
        yield
