"""Preserving Color in Neural Artistic Style Transfer. L. A. Gatys, M. Bethge, A. Hertzmann, E. Shechtman. arXiv
1606.05897.

The style is recolored before (:func:`match_colors`), or lightness alone is transferred (:func:`luminance_of`).
"""

from __future__ import annotations

import torch
from torch import Tensor

TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def match_colors(image: Tensor, other: Tensor) -> Tensor:
    """Gives the pixels of ``image`` mean and covariance of the other's: x -> S_o^(1/2) S_i^(-1/2) (x - m_i) + m_o."""

    def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x[0].flatten(1).double()
        values, vectors = torch.linalg.eigh(x.cov(correction=0))
        return x.mean(1, keepdim=True), values.clamp(min=1e-5).sqrt(), vectors

    (mean, deviations, axes), (new_mean, new_deviations, new_axes) = moments(image), moments(other)
    map = new_axes * new_deviations @ new_axes.T @ (axes / deviations @ axes.T)
    return (map @ (image[0].flatten(1) - mean) + new_mean).view(image.shape).to(image.dtype)


def luminance_of(content: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
    """Both in grey; the style with the mean and the deviation of the content."""
    y, other = (torch.einsum("nchw,c->nhw", x, x.new_tensor(TO_YIQ[0]))[:, None] for x in (content, style))
    other = (other - other.mean()) * (y.std(correction=0) / other.std(correction=0).clamp(min=1e-3)) + y.mean()
    return y.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)


def with_luminance_of(image: Tensor, content: Tensor) -> Tensor:
    """The content, with the luminance of ``image``: grey is added where it differs."""
    return content + torch.einsum("nchw,c->nhw", image - content, content.new_tensor(TO_YIQ[0]))[:, None]
