"""Which backend runs a kernel: the one that was forced, else the first that can where the tensors are."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

from pyzoo._ext import C, MissingCore

BACKENDS = ("cpu", "cuda", "triton", "reference")
DEFAULT = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}  # device -> what is tried, in this order

forced: str | None = None


class backend:
    """Forces a backend: "cpu" (compiled), "cuda" (compiled), "triton", "reference" (plain PyTorch); None: none.

    Takes effect at once, for all threads; as a context manager, until its end. A backend that cannot run raises when an
    operator is called, and says why: nothing else takes its place. ``PYZOO_BACKEND`` forces one from the start. Triton
    kernels run on CPU tensors if ``TRITON_INTERPRET=1`` is set, slowly, for tests.

    Raises:
        ValueError: there is no backend of that name.
    """

    def __init__(self, name: str | None):
        global forced
        if name not in (*BACKENDS, None):
            raise ValueError(f"backend: name must be one of {', '.join(BACKENDS)} or None, got {name!r}")
        self.name, self._before = name, forced
        forced = name

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *exception) -> None:
        global forced
        forced = self._before

    def __repr__(self) -> str:
        return f"backend({self.name!r})"


def specified_by(reference: Callable) -> Callable:
    """Decorates an operator: under ``backend("reference")`` its arguments go to ``reference``."""

    def decorate(operator: Callable) -> Callable:
        @functools.wraps(operator)
        def call(*args, **kwargs):
            return (reference if forced == "reference" else operator)(*args, **kwargs)

        return call

    return decorate


class Kernel:
    """The kernel ``name`` of the slice ``op``, on whatever device: ``<name>_cpu`` or ``<name>_cuda`` of the compiled
    core, or ``<name>`` of ``pyzoo.kernels.<op>``, which take the same arguments."""

    def __init__(self, op: str, name: str):
        self.op, self.name = op, name

    def __call__(self, device, *args):
        if forced is None and device.type == "cpu":
            return self._cpu(*args)
        kernel = self._find(device.type)
        if device.type == "cpu":
            return kernel(*args)
        import torch

        with torch.get_device_module(device).device(device):
            return kernel(*args)

    @functools.cached_property
    def _cpu(self) -> Callable:
        return getattr(C, f"{self.name}_cpu")

    def exists(self, device) -> bool:
        """Whether there is one for tensors of ``device``, had none been forced."""
        return _exists(self.op, self.name, device.type)

    def _find(self, device: str) -> Callable:
        if forced == "reference":
            raise NotImplementedError(
                f"{self.name}: the functions of pyzoo.ops have a reference, their kernels have not"
            )
        names = [forced] if forced else DEFAULT.get(device, ())
        reasons = {name: why_not(name, self.op, self.name, device) for name in names}
        for name, reason in reasons.items():
            if reason is None:
                return self._of_triton if name == "triton" else getattr(C, f"{self.name}_{name}")
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "there are none for it"
        raise NotImplementedError(f"{self.name}: no backend can run on {device} tensors ({why})")

    @functools.cached_property
    def _of_triton(self) -> Callable:
        return getattr(importlib.import_module(f"pyzoo.kernels.{self.op}"), self.name)


@functools.cache
def _exists(op: str, kernel: str, device: str) -> bool:
    return any(why_not(name, op, kernel, device) is None for name in DEFAULT.get(device, ()))


def runs_on_core(device) -> bool:
    """Whether the kernels for tensors of ``device`` are those that the core has for the CPU."""
    return device.type == "cpu" and forced in (None, "cpu")


def why_not(backend: str, op: str, kernel: str, device: str) -> str | None:
    """Why ``backend`` cannot run ``kernel`` of the slice ``op`` on tensors of ``device``, or None if it can."""
    if backend == "triton":
        if not _has_module(f"pyzoo.kernels.{op}"):
            return "no kernel yet"
        if not _has_module("triton"):
            return "triton is not installed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on a GPU; on CPU tensors only under TRITON_INTERPRET=1"
        return None
    if isinstance(C, MissingCore):
        return "the core does not load"
    if not hasattr(C, f"{kernel}_{backend}"):
        return "not in the core"
    if device == backend or (backend == "cuda" and device == "cpu" and _emulates_cuda()):
        return None
    return f"runs on {backend} tensors"


@functools.cache
def _emulates_cuda() -> bool:
    """Whether the core was built to run its CUDA kernels on the CPU, for tests."""
    return C.build_info()["cuda_archs"] == "emulated"


@functools.cache
def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


if name := os.environ.get("PYZOO_BACKEND"):
    backend(name)
