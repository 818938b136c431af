"""Finds the cases in ``tests/specs``, runs them, and describes the machine they ran on."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

import pyzoo
from pyzoo import _backend
from pyzoo._ext import C

from . import measure

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1


def load_specs() -> dict[str, object]:
    """Every ``OpSpec`` that a module of ``tests/specs`` defines, by the op's name."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from tests.specs.spec import OpSpec

    specs = {}
    for module in pkgutil.iter_modules([str(ROOT / "tests" / "specs")]):
        values = vars(importlib.import_module(f"tests.specs.{module.name}")).values()
        specs.update({value.name: value for value in values if isinstance(value, OpSpec)})
    return dict(sorted(specs.items()))


def cases(specs: Iterable, quick: bool = False) -> Iterator[tuple]:
    """(spec, case) for every case, or for the quick ones."""
    for spec in specs:
        for case in spec.bench():
            if case.quick or not quick:
                yield spec, case


def run(
    selected: list[tuple],
    *,
    quick: bool = False,
    cold: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    on_case: Callable[[object, object], None] = lambda spec, case: None,
    on_result: Callable[[measure.Result], None] = lambda result: None,
) -> dict:
    """Measures the (spec, case) pairs and returns the document that is written as JSON and rendered as HTML."""
    load = system_load()
    ceilings = measure.measure_ceilings(device, dtype)
    evict = measure.cache_evictor() if cold else None
    results = []
    for spec, case in selected:
        on_case(spec, case)
        budget = measure.QUICK if quick else measure.FULL
        result = measure.run_case(spec, case, budget, ceilings, evict, device, dtype)
        results.append(result.to_dict())
        on_result(result)
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            "quick": quick,
            "cache": "cold" if cold else "warm",
            "threads": torch.get_num_threads(),
            "dtype": str(dtype or torch.float32).removeprefix("torch."),
            "backend": _backend.forced,
        },
        "load_before": load,
        "ceilings": asdict(ceilings),
        "results": results,
    }


def summary(results: list[dict]) -> list[dict]:
    """Geometric means of the ratios: one row for each op, one for each op and direction, one for everything."""
    timed = [result for result in results if result["ratio"]]

    def row(op: str, direction: str, chosen: list[dict]) -> dict:
        ratios = [result["ratio"] for result in chosen]
        spread = {"mean": measure.geometric_mean(ratios), "least": min(ratios), "most": max(ratios)}
        return {"op": op, "direction": direction, "cases": len(ratios), **spread}

    rows = []
    for op in dict.fromkeys(result["op"] for result in timed):
        of_op = [result for result in timed if result["op"] == op]
        directions = dict.fromkeys(result["direction"] for result in of_op)
        rows.append(row(op, "all", of_op))
        if len(directions) > 1:
            rows += [row(op, d, [result for result in of_op if result["direction"] == d]) for d in directions]
    if len({result["op"] for result in timed}) > 1:
        rows.append(row("all", "all", timed))
    return rows


def format_ratio(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 100 else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def format_ms(seconds: float | None) -> str:
    """Milliseconds with three significant digits."""
    if seconds is None:
        return ""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms > 99.9 else f"{ms:#.3g}" if ms >= 1e-3 else "<0.001"


def problems(results: list[dict]) -> list[str]:
    """One sentence for each distinct reason why cases of an op have no result."""
    reasons: dict[tuple, list[str]] = {}
    for result in results:
        if result["status"] != "ok":
            reasons.setdefault((result["op"], result["status"], result["note"]), []).append(result["id"])
    return [f"{op} {status}: {note} (in: {'; '.join(ids)})" for (op, status, note), ids in reasons.items()]


def regressions(results: list[dict], baseline: list[dict], tolerance: float = 1.25) -> list[str]:
    """What got worse since the baseline: cases whose ratio fell by more than ``tolerance``, one sentence each."""
    before = {(result["op"], result["id"]): result["ratio"] for result in baseline if result["ratio"]}
    worse = []
    for result in results:
        old = before.get((result["op"], result["id"]))
        if old and result["ratio"] and result["ratio"] * tolerance < old:
            worse.append(f"{result['op']} {result['id']}: {result['ratio']:.2f}x, was {old:.2f}x")
    return worse


def machine(device: str = "cpu") -> dict:
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {
        **gpu,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "isa": C.build_info()["isa"],
    }


def summary_line(document: dict) -> str:
    """What it was measured on."""
    machine, settings = document["machine"], document["settings"]
    cpu = f"{machine['cpu']}, {settings['threads']} threads, {machine['isa']}"
    if "gpu" not in machine:
        return cpu
    backend = f", backend {settings['backend']}" if settings["backend"] else ""
    return f"{machine['gpu']}, CUDA {machine['cuda']}, {settings['dtype']}{backend}"


def system_load() -> float | None:
    """How many processes wanted to run in the minute before: they disturb the measurement."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy(document: dict) -> str:
    """A warning when other processes disturbed the measurement, else nothing."""
    load = document["load_before"]
    return (
        f"other processes kept this machine busy (load {load}): do not quote these times" if (load or 0) > 0.5 else ""
    )


def versions() -> dict:
    return {
        "pyzoo": pyzoo.__version__,
        "compiler": C.build_info()["compiler"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
    }


def commit() -> str | None:
    """The commit of the pyzoo that ran, ``+changes`` if files differ from it; None if it is not from this checkout."""
    if Path(pyzoo.__file__).resolve().parents[1] != ROOT:
        return None
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
