"""Loads the compiled core ``pyzoo._C`` once, and when that fails says why at the first call instead of at import.

``from pyzoo._ext import C`` never raises; ``C.nms_cpu(...)`` does when there is no usable core. Needs no torch.
"""

import platform
import sys
import sysconfig
from pathlib import Path


def explain(error: Exception) -> str:
    """What the core was built for, what was found here, and how to fix it."""
    here = Path(__file__).parent
    built = sorted(p.name for suffix in ("so", "pyd") for p in here.glob(f"_C*.{suffix}"))
    python = f"{platform.python_implementation()} {platform.python_version()}"
    machine = f"{sysconfig.get_platform()} ({platform.machine()}, {platform.libc_ver()[0] or sys.platform})"
    return (
        "pyzoo's compiled core (pyzoo._C) cannot be used.\n"
        f"  built: {', '.join(built) if built else 'nothing'} in {here}\n"
        f"  needed: _C{sysconfig.get_config_var('EXT_SUFFIX')} for {python} on {machine}\n"
        f"  loader: {type(error).__name__}: {error}\n"
        "  fix: pip install --force-reinstall --no-cache-dir pyzoo — or, in a clone, pip install . — with this Python"
    )


class MissingCore:
    """Stands in for the core; every use raises ``ImportError``."""

    def __init__(self, error: Exception):
        self.error = error

    def __getattr__(self, name: str):
        raise ImportError(explain(self.error)) from self.error


def load():
    """The module ``pyzoo._C``, or a ``MissingCore`` that keeps the failure."""
    try:
        from pyzoo import _C
    except (ImportError, OSError) as error:
        return MissingCore(error)
    return _C


C = load()
