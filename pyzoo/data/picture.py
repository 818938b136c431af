"""Pictures in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyzoo._extras import need


def read_picture(path: str | Path, longest: int | None = None) -> Tensor:
    """A picture in a file of any kind that Pillow reads -> [3, H, W] of float in [0, 1], RGB, as it is meant to be
    seen: turned as its EXIF data says, what is transparent on white, a palette or grey as colors.

    Args:
        path: the file.
        longest: the longer side, to which larger pictures are scaled down.

    Raises:
        OSError: there is no such file, or it is no picture, or damaged.
    """
    image, ops = (need(f"PIL.{name}", "pyzoo.data.read_picture") for name in ("Image", "ImageOps"))
    try:
        with image.open(path) as file:
            picture = ops.exif_transpose(file)
            if picture.mode.startswith("I;16"):  # Pillow would cut off what is above 255
                picture = image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            picture = picture.convert("RGBA")
    except (image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise OSError(f"cannot read {path}: {error}") from error
    picture = image.alpha_composite(image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if longest is not None and longest < max(picture.size):
        scale = longest / max(picture.size)
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def write_picture(picture: Tensor, path: str | Path) -> None:
    """Writes [3, H, W], RGB, to a file whose ending says of what kind; values are clipped to [0, 1]."""
    image = need("PIL.Image", "pyzoo.data.write_picture")
    pixels = (picture.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    image.fromarray(pixels.numpy()).save(path, quality=95)


def check_writable(path: str | Path) -> None:
    """Raises ValueError where :func:`write_picture` does not know the ending of ``path``."""
    image = need("PIL.Image", "pyzoo.data.write_picture")
    if image.registered_extensions().get(Path(path).suffix.lower()) not in image.SAVE:
        raise ValueError(f"{path} must end in .png, .jpg or another ending of a picture that Pillow writes")
