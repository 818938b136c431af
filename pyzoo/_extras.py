"""Packages that are installed for some purposes only."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, purpose: str) -> ModuleType:
    """Imports a package of the extra ``train``.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what wants it and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is there, and misses something itself
        message = f"{purpose} needs {package}; install it with: pip install 'pyzoo[train]'"
        raise ModuleNotFoundError(message, name=package) from error
