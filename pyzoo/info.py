"""``python -m pyzoo.info`` or ``pyzoo info``: versions, the compiled core, operators and backends, threads.

Nothing that is missing or broken stops it: each part that cannot be had says why.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from pyzoo import _backend
from pyzoo._backend import BACKENDS

OPS = {  # operator -> what the core needs for it, up to the name of the device
    "roi_align": ("roi_align_fwd", "roi_align_bwd"),
    "multiscale_roi_align": ("roi_align_fwd", "roi_align_bwd"),
    "roi_pool": ("roi_pool_fwd", "roi_pool_bwd"),
    "nms": ("nms",),
    "batched_nms": ("nms",),
    "spatial_pyramid_pool2d": ("spatial_pyramid_pool2d_fwd", "spatial_pyramid_pool2d_bwd"),
    "gram_matrix": ("gram_matrix_fwd", "gram_matrix_bwd"),
    "gram_loss": ("gram_loss_fwd", "gram_matrix_bwd"),
    "masked_conv2d": ("masked_conv2d_fwd", "masked_conv2d_bwd", "channel_sum"),
    "depthwise_conv2d": (
        "depthwise_conv2d_fwd",
        "depthwise_conv2d_bwd_input",
        "depthwise_conv2d_bwd_weight",
        "channel_sum",
    ),
    "batch_norm_act": ("batch_norm_act_fwd", "batch_norm_act_bwd"),
    "pixelcnn_sample": ("pixelcnn_sample",),
    "reversible": ("reversible_fwd", "reversible_inv", "reversible_bwd"),
}
YES = "yes"


def collect() -> dict[str, Any]:
    """All that :func:`main` prints: "versions", "core", "ops" (operator -> backend -> "yes" or why not), "threads"."""
    versions = {"pyzoo": _version("pyzoo"), "python": f"{platform.python_implementation()} {platform.python_version()}"}
    versions["system"] = f"{platform.platform()}, {_processor()}"
    versions |= {name: _version(name) for name in ("numpy", "torch", "torchvision", "triton")}
    versions["cuda"] = _cuda()
    core = _core()
    return {"versions": versions, "core": core, "ops": _ops(versions), "threads": _threads()}


def _version(package: str) -> str:
    try:
        return importlib.import_module(package).__version__
    except ModuleNotFoundError as error:
        return "not installed" if error.name == package else f"does not import: {error}"
    except Exception as error:  # a broken install may raise anything
        return f"does not import: {type(error).__name__}: {error}"


def _cuda() -> str:
    """torch's CUDA and the devices it sees."""
    torch = sys.modules.get("torch")
    try:
        if torch is None:
            return "no torch"
        if not torch.version.cuda:
            return "torch is built without CUDA"
        if not torch.cuda.is_available():
            return f"{torch.version.cuda}, no device"
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{torch.version.cuda}, {', '.join(devices)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _core() -> dict[str, Any]:
    """``build_info()`` and the file of the core, or {"error": why it does not load}."""
    from pyzoo import _ext

    if isinstance(_ext.C, _ext.MissingCore):
        return {"error": _ext.explain(_ext.C.error)}
    try:
        build = _ext.C.build_info()
    except Exception as error:  # PYZOO_CPU_ISA names an instruction set that is not here
        return {"error": f"the core does not start: {error}"}
    return {**build, "file": _ext.C.__file__}


def _ops(versions: dict) -> dict[str, dict[str, str]]:
    """Where an operator's tensors may be: the CPU for "cpu", a GPU for the others. What is missing says why."""

    reference = YES if versions["torch"][0].isdigit() else f"torch: {versions['torch']}"

    def status(backend: str, slice: str, kernels: tuple[str, ...]) -> str:
        if backend == "reference":
            return reference
        device = "cpu" if backend == "cpu" else "cuda"
        reasons = (_backend.why_not(backend, slice, kernel, device) for kernel in kernels)
        return next((reason for reason in reasons if reason), YES)

    return {op: {b: status(b, _slice(op), kernels) for b in BACKENDS} for op, kernels in OPS.items()}


def _slice(op: str) -> str:
    """The folder of csrc/ and the file of kernels/ that an operator has its kernels in."""
    return {"multiscale_roi_align": "roi_align", "batched_nms": "nms", "gram_loss": "gram_matrix"}.get(op, op)


def _threads() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    count = torch.get_num_threads() if hasattr(torch, "get_num_threads") else None
    return {
        "count": f"{count} (torch.get_num_threads)" if count else os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        "openmp_runtimes": openmp_runtimes(),
    }


def openmp_runtimes() -> list[str] | None:
    """Files of the OpenMP runtimes that this process has loaded, or None where the system does not tell.

    There must be at most one: two runtimes keep two sets of threads, which get in each other's way.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")}
    return sorted(f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp")))


def render(info: dict[str, Any]) -> str:
    """The text of :func:`collect`'s data."""
    core, threads = info["core"], info["threads"]
    lines = [f"{name:12} {value}" for name, value in info["versions"].items()]
    if "error" in core:
        lines += ["", core["error"]]
    else:
        archs = core["cuda_archs"] or "none: no nvcc at build time, PYZOO_CUDA=0, or no CUDA kernels in this version"
        lines += [
            "",
            f"core         {core['file']}",
            f"compiler     {core['compiler']}",
            f"instructions {core['isa']} (of {', '.join(core['isas'])}; PYZOO_CPU_ISA forces one)",
            f"OpenMP       {'yes' if core['openmp'] else 'no: kernels run on one thread'}",
            f"CUDA archs   {archs}",
        ]
    runtimes = threads["openmp_runtimes"]
    lines.append(f"threads      {threads['count']}")
    if runtimes is not None:
        note = "" if len(runtimes) < 2 else "   (more than one: expect slow and oversubscribed threads)"
        lines.append(f"runtimes     {', '.join(runtimes) or 'no OpenMP'}{note}")

    rows = [["op", *BACKENDS], *([op, *(status[b] for b in BACKENDS)] for op, status in info["ops"].items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["", *("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)]
    return "\n".join(lines)


def main() -> int:
    """Prints the report; returns 1 if the compiled core does not load."""
    info = collect()
    print(render(info))
    return 1 if "error" in info["core"] else 0


if __name__ == "__main__":
    sys.exit(main())
