"""Pictures in files."""

from __future__ import annotations

import io
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
        OSError: there is no such file, or it is no picture, or damaged, or of 32 bits a pixel.
    """
    image, ops = (need(f"PIL.{name}", "pyzoo.data.read_picture") for name in ("Image", "ImageOps"))
    try:
        with image.open(path) as file:
            picture = ops.exif_transpose(file)
            if picture.mode.startswith("I;16"):  # Pillow would cut off what is above 255
                picture = image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.mode in ("I", "F"):
                raise ValueError("it has 32 bits a pixel, and does not say what is white")
            picture = picture.convert("RGBA")
    except (image.DecompressionBombError, SyntaxError, ValueError, OSError) as error:
        if isinstance(error, OSError) and str(path) in str(error):
            raise
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
    """Finds out before long work whether :func:`write_picture` can write to ``path``, whose folder it makes.

    Raises:
        OSError: the folder cannot be made, or the file cannot be opened for writing.
        ValueError: pictures are not written to files with its ending.
    """
    image, path = need("PIL.Image", "pyzoo.data.write_picture"), Path(path)
    try:
        image.new("RGB", (1, 1)).save(io.BytesIO(), image.registered_extensions()[path.suffix.lower()])
    except (KeyError, OSError) as error:
        message = f"{path} must end in .png, .jpg or another ending of a picture that Pillow writes"
        raise ValueError(message) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()
