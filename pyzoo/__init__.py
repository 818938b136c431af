"""pyzoo: compiled kernels for PyTorch that install anywhere, and the classic papers assembled from them.

Submodules load when first used, so ``import pyzoo`` is fast and needs no torch.
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    "accelerate",
    "backend",
    "checkpoint",
    "compat",
    "create_model",
    "data",
    "info",
    "list_models",
    "metrics",
    "models",
    "nn",
    "numpy",
    "ops",
    "patch",
    "train",
]


def __getattr__(name: str):
    if name == "patch":
        from pyzoo._patch import patch

        return patch
    if name == "accelerate":
        from pyzoo._accelerate import accelerate

        return accelerate
    if name == "backend":
        from pyzoo._backend import backend

        return backend
    if name in ("create_model", "list_models"):
        return getattr(importlib.import_module("pyzoo.models"), name)
    if name in __all__:
        return importlib.import_module(f"pyzoo.{name}")
    raise AttributeError(f"module 'pyzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
