"""Masks of classes: decoded to class indices, and turned like their images."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from .decoding import FORMATS, PNG_BIT_DEPTH, BadImageError, upright

IGNORED_CLASS = 255  # of pixels that losses and metrics leave out
MASK_MODES = ("1", "L", "P", "I", "I;16")  # what Pillow calls grey levels and palette indices


def decode_mask(encoded: bytes, name: str) -> np.ndarray:
    """Decodes a PNG to the numbers that it stores: grey levels, or the indices of a palette.

    Returns:
        integers (H, W), 0 to 65535.

    Raises:
        BadImageError: not a PNG, or a damaged one.
        ValueError: a PNG in colour; names the file.
    """
    if not encoded:
        raise BadImageError("the file of its mask is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as mask:
            mode, values = mask.mode, np.array(mask)
    except UnidentifiedImageError as error:
        raise BadImageError(f"its mask is no PNG file: it begins with {encoded[:16]!r}") from error
    except Exception as error:  # on hostile bytes the decoder raises nearly anything
        raise BadImageError(f"its mask: {type(error).__name__}: {error}".splitlines()[0]) from error
    if mode not in MASK_MODES:
        raise ValueError(
            f"{name} is a mask in colour (mode {mode}); a mask holds the index of each pixel's class: convert it to a "
            "PNG of grey levels or of palette indices"
        )
    depth = encoded[PNG_BIT_DEPTH]
    if mode == "L" and depth < 8:
        values //= 255 // (2**depth - 1)  # Pillow spreads grey of 2 or 4 bits over 0..255
    return values.astype(np.intp)


def turned_as(encoded: bytes, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) of an upright image of that size, turned as the EXIF block of the image says if need be."""
    if values.shape == size:
        return values
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        turned = np.array(upright(Image.fromarray(values.astype(np.int32)), image))
    if turned.shape != size:
        height, width = values.shape
        raise BadImageError(f"its mask is {width} x {height} pixels, the image {size[1]} x {size[0]} (width x height)")
    return turned
