"""Fixtures of the op tests, and the conformance matrix that a full run writes to docs/conformance.md."""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from pathlib import Path

# Graphs that the compiler kept from an earlier state of the tree would call operators by their earlier schemas.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter: it has to be known before Triton is first imported.
INTERPRET_TRITON = not torch.cuda.is_available()
if INTERPRET_TRITON:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent
CAPABILITIES = (  # the columns of the matrix, and the values of @pytest.mark.capability
    "forward",
    "backward",
    "double backward",
    "vmap",
    "func",
    "compile",
    "export",
    "autocast",
    "deterministic",
    "empty",
    "NaN",
    "> 2^31 elements",
    "opcheck",
)


def pytest_addoption(parser):
    parser.addoption(
        "--conformance", action="store_true", help="write docs/conformance.md, whatever subset of tests runs"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "capability(name): the column of docs/conformance.md that the test fills")
    config.conformance = defaultdict(set)


# ------------------------------------------------------------------------------------------------- conformance matrix


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed or report.skipped:
        properties = dict(report.user_properties)
        if "conformance" in properties:
            CONFORMANCE[properties["conformance"]].add("fail" if report.failed else report.outcome)


CONFORMANCE = defaultdict(set)  # (op, dtype, layout, capability) -> outcomes


@pytest.fixture(autouse=True)
def _conformance_cell(request):
    mark = request.node.get_closest_marker("capability")
    if mark:
        params = request.node.callspec.params
        dtype = str(params.get("dtype", "")).removeprefix("torch.")
        layout = params["layout"].name
        request.node.user_properties.append(("conformance", (params["spec"].name, dtype, layout, mark.args[0])))


def _is_full_run(config) -> bool:
    selected = config.option.keyword or config.option.markexpr or config.option.lf or config.option.deselect
    return not selected and all(Path(arg).resolve() in (ROOT, ROOT / "tests") for arg in config.args)


def pytest_sessionfinish(session):
    if CONFORMANCE and (session.config.option.conformance or _is_full_run(session.config)):
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "conformance.md").write_text(_conformance_page())


def _conformance_page() -> str:
    symbols = {"passed": "✓", "skipped": "–", "fail": "**✗**"}
    lines = [
        "# Conformance of the operators on the CPU",
        "",
        "Written by the test run (`pytest tests`); do not edit. ✓ passed, **✗** failed, – does not apply.",
        "What each column checks is the test of `tests/test_ops.py` marked with its name.",
        "The layout of boxes (nms, batched_nms) is rows of coordinates, or `strided`, a slice of something else.",
    ]
    ops = sorted({key[0] for key in CONFORMANCE})
    for op in ops:
        lines += [
            "",
            f"## {op}",
            "",
            f"| dtype | layout | {' | '.join(CAPABILITIES)} |",
            "|---" * (2 + len(CAPABILITIES)) + "|",
        ]
        for dtype, layout in dict.fromkeys(key[1:3] for key in CONFORMANCE if key[0] == op):
            cells = []
            for capability in CAPABILITIES:
                outcomes = CONFORMANCE.get((op, dtype, layout, capability), {"skipped"})
                worst = next(o for o in ("fail", "passed", "skipped") if o in outcomes)
                cells.append(symbols[worst])
            lines.append(f"| {dtype} | {layout} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture
def poison():
    """Fills what the kernels are given to write with NaN or the largest integer, so that what they leave unwritten
    shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request):
    """Each backend for a GPU that can run without one: Triton in its interpreter, CUDA in a core that emulates it."""
    import pyzoo
    from pyzoo._ext import C

    name = request.param
    if name == "cuda" and C.build_info()["cuda_archs"] != "emulated":
        pytest.skip("the core was not built with PYZOO_CUDA=emulate")
    if name == "triton" and not (INTERPRET_TRITON and importlib.util.find_spec("triton")):
        pytest.skip("Triton has no interpreter here")
    with pyzoo.backend(name):
        yield name


@pytest.fixture
def set_isa():
    """Forces an instruction set of the core for one test."""
    from pyzoo import _C

    yield _C.set_isa
    _C.set_isa("")


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
