"""What one op's spec file provides. The same lists feed the tests (``tests/test_ops.py``) and the benchmarks
(``benchmarks/``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sample:
    """One call of the public function: ``op(*args, **kwargs)``. ``args[i]`` for i in ``OpSpec.differentiable`` takes
    gradients.

    ``peer`` says that the peer takes these arguments and its answer is defined.
    """

    id: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    peer: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class ErrorSample(Sample):
    """A call that must raise ``error`` with a message matching the regular expression ``match``."""

    error: type[Exception] = ValueError
    match: str = ""


@dataclass(frozen=True)
class BenchCase:
    """One timed case. ``make()`` builds fresh arguments; backward cases time only the backward pass. Step cases call a
    function that runs both passes itself; their peak memory is measured, too.

    ``size`` is the x value of the time-against-size plot within ``group`` (for nms the number of boxes, for RoI ops the
    number of boxes times channels); ``floor_bytes`` and ``floor_flops`` are the least the op must move and compute,
    from which the fraction of this machine's ceiling follows. ``peer_share`` is the part of the work that a call of the
    peer does, where all of it would take minutes: its times are divided by it.
    """

    id: str
    group: str
    make: Callable[[], tuple[tuple, dict]]
    backward: bool = False
    size: float = 0.0
    floor_bytes: float = 0.0
    floor_flops: float = 0.0
    quick: bool = False
    peer_share: float = 1.0
    step: bool = False


@dataclass(frozen=True)
class OpSpec:
    name: str
    op: Callable
    reference: Callable
    samples: Callable[[torch.dtype, torch.memory_format], Iterator[Sample]]
    errors: Callable[[], Iterator[ErrorSample]]
    bench: Callable[[], Iterator[BenchCase]]
    peer: Callable | None = None  # the function a user would call instead, same arguments; looked up lazily
    peer_name: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    layouts: tuple[str, str] = ("NCHW", "NHWC")  # what samples make of torch.contiguous_format, torch.channels_last
    differentiable: tuple[int, ...] = ()
    wide_output: bool = False  # float32 for half precision; else the output has the dtype of the first argument
    exact: bool = False  # outputs are indices: compare for equality, not within tolerance
    tolerances: dict[torch.dtype, tuple[float, float]] = field(default_factory=dict)  # dtype -> (rtol, atol)
    autocast: bool = False  # casts its tensors to the dtype of autocast; else autocast changes nothing

    # What the tests of transforms and compilers need.
    tensors: int = 1  # the first so many arguments are what vmap maps over and a program is exported for
    typical: str = ""  # id of the sample that stands for all, its ``tensors`` all tensors; default: the first
    static: dict = field(default_factory=dict)  # keywords that make the shape of the output independent of the data
    # A function of tensors and few enough of their numbers for whole Jacobians, away from where it is not smooth.
    small: Callable[[torch.dtype, torch.memory_format], tuple[Callable, tuple[torch.Tensor, ...]]] | None = None
    # From the typical tensors, the dimensions that export leaves open, and tensors of other sizes there.
    export: Callable[[list[torch.Tensor]], tuple[tuple, list[torch.Tensor]]] | None = None
    # Given a maker of huge flat tensors, which cost nothing where untouched: the output with offsets beyond 2^31, and
    # the same from a small input.
    huge: Callable[[Callable[[int], torch.Tensor], torch.memory_format], tuple] | None = None
