"""``pyzoo tune``: measures the configurations that the Triton kernels offer on this GPU, and keeps the fastest."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

import pyzoo
from pyzoo.cli import CommandError
from pyzoo.kernels import _configs

from . import measure, suite

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tune(args: Namespace) -> int:
    """Runs the verb; returns the exit status."""
    if not torch.cuda.is_available():
        raise CommandError(f"tune: torch {torch.__version__} sees no GPU")
    specs = suite.load_specs()
    if unknown := sorted(set(args.ops) - set(specs)):
        raise CommandError(f"unknown op {', '.join(unknown)}; there are: {', '.join(specs)}")
    selected = suite.cases([specs[name] for name in args.ops or specs], quick=args.quick)
    work = [(*pair, dtype) for pair in selected for dtype in (DTYPES if pair[0].differentiable else DTYPES[:1])]
    family = _configs.family(torch.device("cuda", torch.cuda.current_device()))
    file = Path(args.output or _configs.CACHE) / f"{family}.json"
    best: dict[str, list[dict]] = json.loads(file.read_text()) if file.exists() else {}
    with pyzoo.backend("triton"):
        for number, (spec, case, dtype) in enumerate(work, 1):
            print(f"{number} of {len(work)}: {spec.name} {case.id}, {dtype}", flush=True)
            call, _ = measure.prepare(spec, case, "cuda", dtype)
            for kernel, entries in fastest(call).items():
                measured = [(entry["dtype"], entry["shape"]) for entry in entries]
                before = [e for e in best.get(kernel, []) if (e["dtype"], e["shape"]) not in measured]
                best[kernel] = before + entries
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(best, indent=1, sort_keys=True) + "\n")
    print(f"{sum(map(len, best.values()))} configurations of {len(best)} kernels: {file}")
    return 0


def fastest(call: measure.Call) -> dict[str, list[dict]]:
    """For each kernel that ``call`` launches, the candidates with which the call is fastest, for each shape in it."""
    launches: dict[str, list[tuple]] = {}
    number: dict[str, int] = {}  # of the candidate to take

    def choose(kernel, candidates, family, dtype, shape):
        if (candidates, dtype, shape) not in launches.setdefault(kernel, []):
            launches[kernel].append((candidates, dtype, shape))
        return candidates[min(number.get(kernel, 0), len(candidates) - 1)]

    before, _configs.choose = _configs.choose, choose
    try:
        call()
        for kernel, shapes in launches.items():
            seconds = {}
            for number[kernel] in range(max(len(candidates) for candidates, _, _ in shapes)):
                try:
                    call()
                    loops, _ = measure.sample_size(call, 2e-3)
                    seconds[number[kernel]] = min(measure.seconds_per_call(call, loops) for _ in range(7))
                except OutOfResources:  # it takes more than this GPU has
                    continue
            number[kernel] = min(seconds, key=seconds.get)
    finally:
        _configs.choose = before
    return {
        kernel: [
            {"dtype": dtype, "shape": shape, "config": candidates[min(number[kernel], len(candidates) - 1)]}
            for candidates, dtype, shape in shapes
        ]
        for kernel, shapes in launches.items()
    }
