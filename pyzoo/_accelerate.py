"""``pyzoo.accelerate(model)``: pyzoo's modules in a model that somebody else built.

A swap changes the class of the module and nothing else: parameters, buffers, hooks, the training flag, names and the
module's identity stay, wherever it is referenced from. That is possible because our modules keep their state under the
names of what they replace.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import torch
from torch import nn

from pyzoo.nn import DepthwiseConv2d, MultiScaleRoIAlign, RoIAlign, RoIPool
from pyzoo.ops._common import _FLOATS

ROI = {cls.__name__: cls for cls in (MultiScaleRoIAlign, RoIAlign, RoIPool)}


class Acceleration:
    """What :func:`accelerate` did, and how to undo it; as a context manager it is undone at the end.

    Attributes:
        model: the model that was changed.
        swapped: name of each module that was swapped -> what it was and is. A shared module has all its names.
        left: name of each module that was not, though it is a depthwise convolution or pools boxes -> why.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.swapped: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._originals: dict[nn.Module, type] = {}
        on_cpu = all(p.device.type == "cpu" for p in model.parameters())
        for name, module, fixed in _walk("", model, ""):
            if (new := _replacement(module)) is None:
                continue
            old = self._originals.get(module, type(module))
            if reason := fixed or _obstacle(module, old, on_cpu):
                self.left[name] = reason
                continue
            self._originals[module] = old
            module.__class__ = new
            self.swapped[name] = f"{old.__module__.partition('.')[0]}.{old.__name__} -> pyzoo.nn.{new.__name__}"

    def undo(self) -> None:
        """Gives each module its class back, unless it has been given another one since (by a parametrization, say)."""
        for module, old in self._originals.items():
            if type(module) is _replacement(module):
                module.__class__ = old
        self._originals.clear()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def __repr__(self) -> str:
        undone = "" if self._originals or not self.swapped else ", undone"
        lines = [
            f"pyzoo.accelerate({type(self.model).__name__}): {len(self.swapped)} swapped, {len(self.left)} left{undone}"
        ]
        width = max(map(len, [*self.swapped, *self.left]), default=0)
        lines += [f"  {name or '(model)':{width}}  {what}" for name, what in self.swapped.items()]
        lines += [f"  {name or '(model)':{width}}  left: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def _walk(name: str, module: nn.Module, fixed: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Every module under each of its names, and why it must stay if something around it holds on to its code."""
    if _is_compiled(module):
        fixed = "it is compiled by torch.compile: accelerate first, then compile"
    yield name, module, fixed
    for child_name, child in list(module._modules.items()):  # unlike named_children, with modules it has twice
        if child is not None:
            yield from _walk(f"{name}.{child_name}" if name else child_name, child, fixed)


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo")
    wrapper = getattr(dynamo, "OptimizedModule", ())
    return isinstance(module, wrapper) or getattr(module, "_compiled_call_impl", None) is not None


def _replacement(module: nn.Module) -> type | None:
    """What could stand for a module of this kind."""
    if isinstance(module, nn.Conv2d):
        return DepthwiseConv2d if module.groups == module.in_channels > 1 else None
    for cls in type(module).__mro__:
        if cls.__module__.startswith(("torchvision.ops.", "pyzoo.ops.")) and cls.__name__ in ROI:
            return ROI[cls.__name__]
    return None


def _obstacle(module: nn.Module, kind: type, on_cpu: bool) -> str:
    """Why a module cannot be swapped, or nothing."""
    if kind in (DepthwiseConv2d, *ROI.values()):
        return "it is pyzoo's already"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized: accelerate first, then parametrize"
    if kind is not nn.Conv2d and not kind.__module__.startswith("torchvision.ops."):
        return f"it is a subclass, {kind.__module__}.{kind.__qualname__}, with behaviour of its own"
    if replaced := {"forward", "_conv_forward"} & vars(module).keys():
        return f"its {min(replaced)} was replaced on the instance"
    if isinstance(module, nn.Conv2d):
        if module.weight.device.type != "cpu":
            return f"its weight is on {module.weight.device}; the kernels are for the CPU"
        if module.weight.dtype not in _FLOATS:
            return f"its weight is {module.weight.dtype}"
    elif not on_cpu:
        return "the model is not on the CPU, which the kernels are for"
    return ""


def accelerate(model: nn.Module, *, inplace: bool = True) -> Acceleration:
    """Swaps the modules of ``model`` that pyzoo has a faster one for. Outputs and gradients agree to rounding.

    ::

        print(pyzoo.accelerate(model))  # stays; says what was swapped, and what was left and why

        with pyzoo.accelerate(model):  # undone at the end
            train_one_epoch(model)

    Swapped are depthwise ``nn.Conv2d`` (groups equal to in_channels, any stride, padding, dilation and multiplier)
    and torchvision's ``RoIAlign``, ``RoIPool`` and ``MultiScaleRoIAlign``. Parameters, buffers, hooks, the training
    flag, names and the modules themselves stay the same objects, so optimizers, checkpoints and references to them go
    on working. Subclasses, parametrized or compiled modules and those on other devices are left, with the reason.
    When the model moves to another device later, its convolutions run there as before; undo the RoI modules first.

    Args:
        model: any module, also one of the above itself.
        inplace: change ``model``; else a deep copy, which is the result's ``model``.

    Returns:
        :class:`Acceleration`, with ``model``, ``swapped``, ``left`` and ``undo()``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    return Acceleration(model if inplace else copy.deepcopy(model))
