"""Image files to upright 8-bit RGB arrays."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# The formats that are opened. Others are left out because nobody photographs in them or because reading them
# runs another program (EPS starts Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 80_000_000  # below the 89 million at which Pillow starts to warn
BACKGROUND = (128, 128, 128)  # what shows through transparent pixels: the grey of the aligned face's border


def load_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image file as upright 8-bit RGB.

    The EXIF orientation is applied. 16-bit greyscale is scaled to 8 bits (65535 becomes 255), CMYK and
    palettes are converted, transparency is laid over `BACKGROUND`, greyscale and 1-bit are repeated over the
    channels, and an animation gives its first frame. Colour profiles are not applied: the numbers are those
    stored.

    Args:
        path: the file; one of `FORMATS`, whatever its name ends in.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        uint8 (H, W, 3), contiguous, writable.

    Raises:
        TypeError: `path` is not a path.
        ValueError: the file is missing, is not a regular file, is not an image, is damaged, is too large, or
            has no 8- or 16-bit scale. The message names the file.
    """
    name = repr(os.fsdecode(path))  # repr: a name may hold line breaks or bytes that are not text
    try:
        if not os.path.isfile(path):  # also keeps open() from waiting for ever on a pipe or a device
            raise ValueError("it is not a regular file" if os.path.exists(path) else "there is no such file")
        with open(path, "rb") as file:
            return read_image(file, max_pixels)
    except (OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"cannot read image {name}: {reason}") from error


def read_image(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """As `load_image`, from an open file; the message of the error does not name it.

    Args:
        file: open for reading bytes, at its beginning.
        max_pixels: as in `load_image`.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ValueError: as `load_image`.
        MemoryError: there is too little for the pixels.
    """
    from PIL import UnidentifiedImageError

    try:
        if not file.read(1):
            raise ValueError("the file is empty")
        file.seek(0)
        return _decode(file, max_pixels)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is in none of the formats {', '.join(FORMATS)}") from error
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged data
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(reason) from error


def check_image(image: np.ndarray, name: str = "image") -> np.ndarray:
    """An image array as contiguous uint8 RGB (H, W, 3); greyscale (H, W) is repeated over the channels.

    Raises:
        TypeError: not a NumPy array, or not uint8.
        ValueError: another shape (channels first, an alpha channel, a batch), or no pixels.
    """
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8 with values from 0 to 255, got dtype {image.dtype}")
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)  # (H, W) -> (H, W, 3)
    if image.ndim != 3 or image.shape[2] != 3:
        hint = "; the channels must come last" if image.ndim == 3 and image.shape[0] == 3 else ""
        raise ValueError(
            f"{name} must be RGB, shape (H, W, 3), or greyscale, shape (H, W), got {image.shape}{hint}"
        )
    if image.size == 0:
        raise ValueError(f"{name} has no pixels, shape {image.shape}")
    return np.ascontiguousarray(image)


def _decode(file: BinaryIO, max_pixels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height == 0:
            raise ValueError(f"it has no pixels ({width} x {height})")
        if width * height > max_pixels:
            raise ValueError(f"its {width} x {height} pixels are more than the limit of {max_pixels}")
        ImageOps.exif_transpose(image, in_place=True)  # in place, because a copy forgets its format
        return np.array(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow's own conversion clips at 255 in place of scaling. PPM's maximum is 65535 after loading,
        # whatever the file's.
        pixels = (np.asarray(image).astype(np.uint32) + 128) // 257  # (H, W), rounded; 65535 = 255 · 257
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit (mode {image.mode}), which have no agreed white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")
