"""The operators, with torchvision's signatures where it has them; each is also ``torch.ops.pyzoo.<name>``."""

from pyzoo.ops.batch_norm_act import batch_norm_act, batch_norm_act_reference
from pyzoo.ops.depthwise_conv2d import DepthwiseConv2d, depthwise_conv2d, depthwise_conv2d_reference
from pyzoo.ops.gram_matrix import (
    GramLoss,
    GramMatrix,
    gram_loss,
    gram_loss_reference,
    gram_matrix,
    gram_matrix_reference,
)
from pyzoo.ops.masked_conv2d import MaskedConv2d, masked_conv2d, masked_conv2d_reference
from pyzoo.ops.nms import batched_nms, batched_nms_reference, nms, nms_reference
from pyzoo.ops.pixelcnn_sample import (
    PixelCNNLayer,
    PixelCNNNetwork,
    pixelcnn_logits_reference,
    pixelcnn_sample,
    pixelcnn_sample_reference,
)
from pyzoo.ops.roi_align import (
    MultiScaleRoIAlign,
    RoIAlign,
    multiscale_roi_align,
    multiscale_roi_align_reference,
    roi_align,
    roi_align_reference,
)
from pyzoo.ops.roi_pool import RoIPool, roi_pool, roi_pool_reference
from pyzoo.ops.spatial_pyramid_pool2d import (
    SpatialPyramidPool2d,
    spatial_pyramid_pool2d,
    spatial_pyramid_pool2d_reference,
)

__all__ = [
    "DepthwiseConv2d",
    "GramLoss",
    "GramMatrix",
    "MaskedConv2d",
    "MultiScaleRoIAlign",
    "PixelCNNLayer",
    "PixelCNNNetwork",
    "RoIAlign",
    "RoIPool",
    "SpatialPyramidPool2d",
    "batch_norm_act",
    "batch_norm_act_reference",
    "batched_nms",
    "batched_nms_reference",
    "depthwise_conv2d",
    "depthwise_conv2d_reference",
    "gram_loss",
    "gram_loss_reference",
    "gram_matrix",
    "gram_matrix_reference",
    "masked_conv2d",
    "masked_conv2d_reference",
    "multiscale_roi_align",
    "multiscale_roi_align_reference",
    "nms",
    "nms_reference",
    "pixelcnn_logits_reference",
    "pixelcnn_sample",
    "pixelcnn_sample_reference",
    "roi_align",
    "roi_align_reference",
    "roi_pool",
    "roi_pool_reference",
    "spatial_pyramid_pool2d",
    "spatial_pyramid_pool2d_reference",
]
