"""What ``make gpu`` measures, with nothing but torch: ``python -m benchmarks.gpu BACKEND DTYPE SECONDS FILE``.

Runs the quick cases on a GPU, one of each operator after the other, until the time is over; prints a line for each, and
the table of the ratios; the samples go to FILE.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import pyzoo
from pyzoo import info

from . import measure, readme_table, suite


def cases(backend: str, end: float) -> Iterator[tuple]:
    """Until then, in turns: those of the operators that the backend has kernels for."""
    has = info.collect()["ops"]
    specs = [spec for spec in suite.load_specs().values() if has.get(spec.name, {}).get(backend, info.YES) == info.YES]
    turns = itertools.zip_longest(*(suite.cases([spec], quick=True) for spec in specs))
    yield from itertools.takewhile(lambda _: time.monotonic() < end, filter(None, itertools.chain(*turns)))


def line(result: measure.Result) -> str:
    if result.status != "ok":
        return f"{result.op} {result.id}: {result.status}: {result.note}"
    peer = f", {suite.format_ratio(result.ratio)} {result.peer_name}" if result.ratio else ""
    ceiling = f", {result.ceiling_fraction:.0%} of the ceiling" if result.ceiling_fraction else ""
    return f"{result.op} {result.id}: {suite.format_ms(result.pyzoo_seconds)} ms{peer}{ceiling}"


def run(backend: str, dtype: str, selected: Iterable[tuple], file: Path, device: str = "cuda") -> int:
    """1 if a case disagreed or failed."""
    with pyzoo.backend(backend):
        document = suite.run(
            selected,
            quick=True,
            device=device,
            dtype=getattr(torch, dtype),
            on_result=lambda result: print(line(result), flush=True),
        )
    document["results"].sort(key=lambda result: result["op"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{readme_table.table(document)}\n\n{file}")
    return 1 if suite.problems(document["results"]) else 0


if __name__ == "__main__":
    backend, dtype, seconds, file = sys.argv[1:]
    sys.exit(run(backend, dtype, cases(backend, time.monotonic() + float(seconds)), Path(file)))
