"""The compiled core. Private: use pyzoo.ops, pyzoo.nn or pyzoo.numpy.

Kernels write their result into the array that they are given for it. Arrays are anything with ``__dlpack__``, of any
strides.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

class Array(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

class BuildInfo(TypedDict):
    version: str
    compiler: str
    isa: str
    isas: list[str]
    openmp: bool
    cuda_archs: str

# First level, canonical scale, canonical level, epsilon.
LevelMap = tuple[int, float, float, float]

def build_info() -> BuildInfo: ...
def set_isa(name: str) -> None: ...
def nms_cpu(
    boxes: Array, scores: Array, idxs: Array | None, iou_threshold: float, keep: Array, shift_classes: bool
) -> int | list[int]: ...
def roi_align_fwd_cpu(
    inputs: Sequence[Array],
    rois: Array,
    output: Array,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    level_map: LevelMap | None,
) -> None: ...
def roi_align_bwd_cpu(
    grad_output: Array,
    rois: Array,
    grad_inputs: Sequence[Array],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    level_map: LevelMap | None,
) -> None: ...
def roi_pool_fwd_cpu(
    input: Array,
    rois: Array,
    output: Array,
    argmax: Array | None,
    spatial_scale: float,
    positions: Array | None = None,
) -> bool: ...
def roi_pool_bwd_cpu(
    grad_output: Array,
    input: Array,
    rois: Array,
    grad_input: Array,
    spatial_scale: float,
    positions: Array | None = None,
) -> None: ...
def roi_pool_bwd_argmax_cpu(grad_output: Array, rois: Array, argmax: Array, grad_input: Array) -> None: ...
