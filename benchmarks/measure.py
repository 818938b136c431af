"""The measuring core: does a case agree with its peer, how long do both take, how near is pyzoo to the ceiling.

pyzoo and the peer alternate in one process on the same input (A B A B ...), so that whatever else the machine does hits
both; the ratio is the median of the pairwise ratios. A case whose outputs disagree is never timed.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace

import torch

import pyzoo

Call = Callable[[], object]

# (rtol, atol) where a spec names none; atol is relative to the largest expected magnitude, see assert_agrees.
TOLERANCES = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 8e-3),
}


@dataclass(frozen=True)
class Budget:
    """How long one case may be timed: as many pairs as fit into ``seconds``, within the two limits."""

    seconds: float
    max_pairs: int
    min_pairs: int = 3
    min_sample: float = 1e-3  # a sample of a faster call repeats it for this many seconds, above the timer's noise


FULL = Budget(seconds=1.2, max_pairs=15)
QUICK = Budget(seconds=0.5, max_pairs=7)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches with torch on the same number of threads: copying memory and multiplying matrices."""

    copy_bytes_per_second: float
    gemm_flops_per_second: float

    def floor_seconds(self, case) -> float:
        """The least time the case can take on this machine; 0 when its spec names no floor."""
        return max(case.floor_bytes / self.copy_bytes_per_second, case.floor_flops / self.gemm_flops_per_second)


@dataclass
class Result:
    """One case. ``status`` is ``ok``, ``disagrees`` (outputs differ, so no times) or ``failed`` (an exception)."""

    op: str
    id: str
    group: str
    direction: str
    size: float
    peer_name: str
    status: str = "ok"
    note: str = ""
    pyzoo_seconds: float | None = None
    peer_seconds: float | None = None
    ratio: float | None = None  # peer / pyzoo: above 1, pyzoo is faster
    floor_seconds: float | None = None
    ceiling_fraction: float | None = None
    pyzoo_bytes: int | None = None  # peak memory of step cases
    peer_bytes: int | None = None
    pyzoo_samples: list[float] = field(default_factory=list)
    peer_samples: list[float] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)


class Disagreement(Exception):
    """The outputs of pyzoo and of what it is compared with differ."""


def tensors_of(value) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order; numbers become tensors, so that they are compared."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(value)]
    if isinstance(value, dict):
        value = value.values()
    return [tensor for item in value for tensor in tensors_of(item)]


def assert_agrees(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], spec) -> None:
    """Raises :class:`Disagreement` unless indices are equal and values are within the spec's tolerance.

    The absolute tolerance scales with the largest expected value: a gradient is a sum of thousands of terms, whose
    rounding depends on the order of summation and not on the size of the result.
    """
    actual, expected = list(actual), list(expected)
    if len(actual) != len(expected):
        raise Disagreement(f"{len(actual)} outputs, expected {len(expected)}")
    for got, want in zip(actual, expected, strict=True):
        if got.shape != want.shape:
            raise Disagreement(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        if spec.exact or not want.is_floating_point():
            wrong = got != want
        else:
            rtol, atol = spec.tolerances.get(want.dtype) or TOLERANCES[want.dtype]
            got, want = got.double(), want.double()
            largest = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
            wrong = ~torch.isclose(got, want, rtol=rtol, atol=atol * max(1.0, largest), equal_nan=True)
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise Disagreement(
                f"{int(wrong.sum())} of {wrong.numel()} values differ, the first at {where}: "
                f"{got[where].item()}, expected {want[where].item()}"
            )


def make_call(function: Callable, args: tuple, kwargs: dict, backward: bool, differentiable: tuple[int, ...]) -> Call:
    """What is timed: ``function(*args, **kwargs)``, or only the backward pass of it."""
    if not backward:
        return lambda: function(*args, **kwargs)
    args, inputs = list(args), []
    for index in differentiable:
        if index < len(args):  # else it was left out
            args[index] = _as_leaves(args[index], inputs)
    outputs = [out for out in tensors_of(function(*args, **kwargs)) if out.requires_grad]
    # The same values for pyzoo and the peer, each in the format of its own output, as a next layer would send them.
    generator = torch.Generator().manual_seed(0)
    grads = [torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator)) for out in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def _as_leaves(value, leaves: list[torch.Tensor]):
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]
    if isinstance(value, dict):
        return type(value)((key, _as_leaves(item, leaves)) for key, item in value.items())
    return type(value)(_as_leaves(item, leaves) for item in value)


def move(value, device: str, dtype: torch.dtype | None = None):
    """``value`` with all tensors and modules inside of it on ``device``, and what is floating there in ``dtype``."""
    if isinstance(value, (torch.Tensor, torch.nn.Module)):
        is_cast = isinstance(value, torch.nn.Module) or value.is_floating_point()
        return value.to(device, dtype if is_cast else None)
    if is_dataclass(value):
        return replace(value, **{f.name: move(getattr(value, f.name), device, dtype) for f in fields(value)})
    if isinstance(value, dict):
        return {key: move(item, device, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device, dtype) for item in value)
    return value


def prepare(spec, case, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Call, Call | None]:
    """Builds the case's input, checks pyzoo against the peer (the reference where there is none), returns both calls.

    This is the first run of both, so it also loads libraries and faults in memory. ``dtype`` is that of what can have a
    gradient: boxes, for example, stay as they are.
    """
    with pyzoo.backend(None):  # it may call operators, on the CPU
        args, kwargs = case.make()
    args = tuple(move(arg, device, dtype if i in spec.differentiable else None) for i, arg in enumerate(args))
    kwargs = move(kwargs, device)

    def call(function: Callable) -> Call:
        return make_call(function, args, kwargs, case.backward, spec.differentiable)

    ours, other = call(spec.op), call(spec.peer or spec.reference)
    assert_agrees(tensors_of(ours()), tensors_of(other()), spec)
    return ours, other if spec.peer else None


def seconds_per_call(call: Call, loops: int = 1) -> float:
    _wait_for_gpu()
    start = time.perf_counter()
    for _ in range(loops):
        call()
    _wait_for_gpu()
    return (time.perf_counter() - start) / loops


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(call: Call) -> int:
    """The most that torch's allocator had given out at a time during ``call()``, not counting what it returns."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = tensors_of(call())
        returned = sum(tensor.untyped_storage().nbytes() for tensor in results)
        return max(torch.cuda.max_memory_allocated() - before - returned, 0)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print lines of its own
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = tensors_of(call())
    nodes, changes = recorded.profiler.kineto_results.experimental_event_tree(), []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    changes.sort()
    last = {address: i for i, (_, address, size) in enumerate(changes) if size > 0}
    returned = {last.get(tensor.untyped_storage().data_ptr()) for tensor in results}
    return max(itertools.accumulate((c[2] for i, c in enumerate(changes) if i not in returned), initial=0))


@contextmanager
def gc_paused() -> Iterator[None]:
    """The collector would otherwise run inside whichever sample happens to trigger it."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sample_size(call: Call, least: float) -> tuple[int, float]:
    """How many calls in a row last for ``least`` seconds, and how long they did. Doubled until they do: the first calls
    after other work, which find cold caches, say little of those that follow."""
    n = 1
    while (seconds := n * seconds_per_call(call, n)) < least:
        n *= 2
    return n, seconds


def plan(calls: list[Call], budget: Budget) -> tuple[int, list[int]]:
    """Number of rounds, and how often one sample repeats each call. Runs each once or more, which warms the caches."""
    loops, seconds = zip(*(sample_size(call, budget.min_sample) for call in calls), strict=True)
    return max(budget.min_pairs, min(budget.max_pairs, int(budget.seconds / sum(seconds)))), list(loops)


def interleave(calls: list[Call], budget: Budget, before_sample: Call | None = None) -> list[list[float]]:
    """Samples, in seconds per call, of the calls run in turn: A B A B ...

    ``before_sample`` runs untimed before each sample (to evict the caches); a sample is then a single call.
    """
    with gc_paused():
        rounds, loops = plan(calls, budget)
        samples: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, n, times in zip(calls, loops, samples, strict=True):
                if before_sample:
                    before_sample()
                    n = 1
                times.append(seconds_per_call(call, n))
    return samples


def paired_ratio(ours: list[float], peer: list[float]) -> float:
    """How many times faster than the peer: the median of the ratios of neighbouring samples."""
    return statistics.median(b / a for a, b in zip(ours, peer, strict=True))


def run_case(
    spec,
    case,
    budget: Budget,
    ceilings: Ceilings,
    before_sample: Call | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Result:
    """Checks and times one case. What goes wrong stands in the result: one broken case must not hide the others."""
    direction = "step" if case.step else "backward" if case.backward else "forward"
    result = Result(spec.name, case.id, case.group, direction, case.size, spec.peer_name if spec.peer else "")
    try:
        ours, peer = prepare(spec, case, device, dtype)
        samples = interleave([ours, peer] if peer else [ours], budget, before_sample)
        if case.step:
            result.pyzoo_bytes, result.peer_bytes = peak_bytes(ours), peak_bytes(peer) if peer else None
    except Disagreement as error:
        result.status, result.note = "disagrees", str(error)
        return result
    except ImportError:
        raise  # the peer is not installed: nothing to compare any case with
    except Exception as error:
        result.status, result.note = "failed", f"{type(error).__name__}: {error}"
        return result
    result.pyzoo_samples = samples[0]
    result.pyzoo_seconds = statistics.median(samples[0])
    if peer:
        result.peer_samples = [seconds / case.peer_share for seconds in samples[1]]
        result.peer_seconds = statistics.median(result.peer_samples)
        result.ratio = paired_ratio(result.pyzoo_samples, result.peer_samples)
    # The floors of the cases are those of float32; the other tensors are small.
    if floor := ceilings.floor_seconds(case) * (dtype.itemsize / 4 if dtype else 1):
        result.floor_seconds = floor
        result.ceiling_fraction = floor / result.pyzoo_seconds
    return result


def measure_ceilings(device: str = "cpu", dtype: torch.dtype | None = None, repeats: int = 15) -> Ceilings:
    """The best of several runs: a ceiling is what the machine can do, not what it does on average."""
    copy_mib, gemm_size = (256, 1536) if device == "cpu" else (1024, 8192)
    source = torch.ones(copy_mib << 18, device=device)
    target = torch.empty_like(source)
    a, b = torch.rand(2, gemm_size, gemm_size, device=device, dtype=dtype).unbind()
    out = torch.empty_like(a)
    pixels, kernel = a.view(1, 32, gemm_size // 32, gemm_size).permute(0, 3, 1, 2), b.view(gemm_size, gemm_size, 1, 1)

    def best(call: Call) -> float:
        call()
        return min(seconds_per_call(call) for _ in range(repeats))

    with gc_paused():
        copied = 2 * source.numel() * source.element_size()  # each byte is read once and written once
        return Ceilings(
            copy_bytes_per_second=copied / best(lambda: target.copy_(source)),
            # torch has two libraries for a product, and which one is faster depends on the processor.
            gemm_flops_per_second=2
            * gemm_size**3
            / min(best(lambda: torch.mm(a, b, out=out)), best(lambda: torch.conv2d(pixels, kernel))),
        )


def cache_evictor(mib: int = 256) -> Call:
    """A call that sweeps a buffer larger than the last-level cache, for measurements with cold caches."""
    buffer = torch.zeros(mib << 18)
    return lambda: buffer.add_(1)


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.geometric_mean(values) if values else float("nan")
