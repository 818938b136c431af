"""The compiled core. Private: use pyzoo.ops, pyzoo.nn or pyzoo.numpy.

Kernels write their result into the array that they are given for it. Arrays are anything with ``__dlpack__``, of any
strides. A build with CUDA kernels has for most ``<name>_cpu`` a ``<name>_cuda`` of the same arguments, found by name
(``_backend.py``), hence not listed; ``nms_cuda`` returns a tensor.
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

# The four weights and biases of a PixelCNNLayer, its conditions, whether it has a residual.
PixelCNNLayer = tuple[Array, Array, Array, Array, Array, Array, Array, Array, Array | None, Array | None, bool]

def build_info() -> BuildInfo: ...
def set_isa(name: str) -> None: ...
def batch_norm_act_fwd_cpu(
    input: Array,
    weight: Array,
    bias: Array,
    residual: Array | None,
    output: Array,
    mean: Array,
    var: Array,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    eps: float,
    activation: int,
) -> None: ...
def batch_norm_act_bwd_cpu(
    grad_output: Array,
    input: Array,
    weight: Array,
    bias: Array,
    output: Array | None,
    mean: Array,
    var: Array,
    grad_input: Array,
    grad_weight: Array,
    grad_bias: Array,
    grad_residual: Array | None,
    eps: float,
    activation: int,
) -> None: ...
def depthwise_conv2d_fwd_cpu(
    input: Array,
    weight: Array,
    bias: Array | None,
    output: Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: int,
) -> None: ...
def depthwise_conv2d_bwd_input_cpu(
    grad_output: Array,
    weight: Array,
    grad_input: Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None: ...
def depthwise_conv2d_bwd_weight_cpu(
    grad_output: Array,
    input: Array,
    grad_weight: Array,
    grad_bias: Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None: ...
def nms_cpu(
    boxes: Array, scores: Array, idxs: Array | None, iou_threshold: float, keep: Array | None, shift_classes: bool
) -> int | list[int] | Array: ...
def pixelcnn_sample_cpu(
    layers: Sequence[PixelCNNLayer],
    head: Sequence[tuple[Array, Array]],
    uniforms: Array,
    samples: Array,
    logits: Array | None,
    temperature: float,
) -> None: ...
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
    input: Array | None,
    rois: Array,
    grad_input: Array,
    spatial_scale: float,
    positions: Array | None = None,
) -> None: ...
def roi_pool_bwd_argmax_cpu(grad_output: Array, rois: Array, argmax: Array, grad_input: Array) -> None: ...
def spatial_pyramid_pool2d_fwd_cpu(
    input: Array, levels: Sequence[int], output: Array, argmax: Array | None, average: bool
) -> None: ...
def spatial_pyramid_pool2d_bwd_cpu(
    grad_output: Array, argmax: Array | None, levels: Sequence[int], grad_input: Array
) -> None: ...
def gram_matrix_fwd_cpu(features: Array, gram: Array, normalize: bool) -> None: ...
def gram_matrix_bwd_cpu(grad_gram: Array, features: Array, grad_features: Array, normalize: bool) -> None: ...
def gram_loss_fwd_cpu(features: Array, target: Array, difference: Array, loss: Array, normalize: bool) -> None: ...
def masked_conv2d_fwd_cpu(
    input: Array,
    weight: Array,
    bias: Array | None,
    output: Array,
    mask: str,
    colors: int,
    gates: int,
    groups: int,
    dilation_y: int,
    dilation_x: int,
) -> None: ...
def masked_conv2d_bwd_cpu(
    grad_output: Array,
    input: Array | None,
    weight: Array | None,
    grad_input: Array | None,
    grad_weight: Array | None,
    grad_bias: Array | None,
    mask: str,
    colors: int,
    gates: int,
    groups: int,
    dilation_y: int,
    dilation_x: int,
) -> None: ...
def channel_sum_cpu(map: Array, output: Array) -> None: ...
def pointwise_bn_act_fwd_cpu(
    conv_input: Array,
    conv_weight: Array,
    input: Array,
    weight: Array,
    bias: Array,
    residual: Array | None,
    output: Array,
    mean: Array,
    var: Array,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    eps: float,
    activation: int,
) -> None: ...
def pointwise_bn_act_bwd_cpu(
    conv_input: Array,
    conv_weight: Array,
    grad_conv_input: Array | None,
    grad_conv_weight: Array | None,
    grad_output: Array,
    input: Array,
    weight: Array,
    bias: Array,
    output: Array | None,
    mean: Array,
    var: Array,
    grad_input: Array,
    grad_weight: Array,
    grad_bias: Array,
    grad_residual: Array | None,
    eps: float,
    activation: int,
) -> None: ...
def pointwise_weight_size(outputs: int, inputs: int) -> int: ...
def pointwise_weight_cpu(weight: Array, packed: Array) -> None: ...
def pointwise_conv_cpu(
    input: Array,
    packed: Array,
    bias: Array | None,
    residual: Array | None,
    output: Array,
    activation: int,
) -> None: ...
def winograd_weight_size(outputs: int, inputs: int) -> int: ...
def winograd_weight_cpu(weight: Array, transformed: Array, turned: bool) -> None: ...
def winograd_conv_cpu(
    input: Array, weight: Array, bias: Array, output: Array, padding: int, turned: bool, relu: bool
) -> None: ...
def winograd_conv_bwd_weight_cpu(grad_output: Array, input: Array, grad_weight: Array, padding: int) -> None: ...
def reversible_fwd_cpu(x: Array, update: Array, y: Array) -> None: ...
def reversible_inv_cpu(y: Array, update: Array, x: Array) -> None: ...
def reversible_bwd_cpu(y: Array, update: Array, x: Array, grad_y: Array, grad_update: Array, grad_x: Array) -> None: ...
