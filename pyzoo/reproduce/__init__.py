"""``pyzoo reproduce PAPER``: what a paper claims, run small, beside what comes out. One module a paper.

Each module has a docstring, whose first line says what is run, and ``reproduce(report)``.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path


class Report:
    """Claimed beside measured, printed as it comes in.

    Attributes:
        paper: the module's name.
        folder: where plots and pictures go.
        seed: for all that is random.
    """

    def __init__(self, paper: str, folder: Path, seed: int = 0):
        self.paper, self.folder, self.seed = paper, folder, seed
        self.failed: list[str] = []
        self._started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def check(self, what: str, claimed: str, measured: str, holds: bool) -> None:
        """One claim: what is compared, the paper's word, our number, and whether that supports it."""
        if not holds:
            self.failed.append(what)
        print(f"  {'ok  ' if holds else 'FAIL'}  {what}\n          claimed:  {claimed}\n          measured: {measured}")

    def note(self, text: str) -> None:
        """What is worth knowing, but nothing that could fail."""
        print(f"        {text}")

    def save(self, figure, name: str = "") -> None:
        """A matplotlib figure or a PIL image, as PNG."""
        path = self.folder / f"{self.paper}{name and '_' + name}.png"
        save = getattr(figure, "savefig", None) or figure.save
        save(path)
        print(f"        picture: {path}")

    def close(self) -> int:
        """Prints the verdict and returns the exit status."""
        verdict = f"does not hold: {'; '.join(self.failed)}" if self.failed else "holds"
        print(f"{self.paper}: {verdict} ({time.monotonic() - self._started:.0f} s)")
        return 1 if self.failed else 0


def gain_of(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """By how much less ours are, in pairs of runs from one seed: the mean, and its standard error."""
    gains = [other - our for our, other in zip(ours, others, strict=True)]
    return statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5


def papers() -> list[str]:
    """What there is to reproduce."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def run(paper: str, folder: Path, seed: int = 0) -> int:
    """Runs one paper's claims; returns 0 if all hold, else 1."""
    module = importlib.import_module(f"pyzoo.reproduce.{paper}")
    print(f"{paper}: {module.__doc__.strip().splitlines()[0]}")
    report = Report(paper, folder, seed)
    module.reproduce(report)
    return report.close()
