"""From encoded bytes to pixels, with a defined result for whatever the file turns out to be.

Shapes: C channels (1 or 3 from a file), H, W height and width as a viewer would show the image.

| file                          | result                                                                     |
|-------------------------------|----------------------------------------------------------------------------|
| JPEG, colour or grey          | torchvision, bit-identical to Pillow; the grey of a colour JPEG is its luma |
| CMYK, YCCK                    | Pillow's conversion to RGB                                                 |
| palette, 1-bit, grey          | the colours they stand for                                                 |
| any transparency              | composited on white                                                        |
| 16 bits per channel           | round(v / 257), so that 65535 becomes 255; never clipped                   |
| EXIF orientation              | applied; an unreadable EXIF block is ignored                               |
| several frames                | the first                                                                  |
| float or 32-bit grey          | refused: their range is not defined                                        |
| more than twice Pillow's `MAX_IMAGE_PIXELS` (179 million pixels) | refused, before any pixel is decoded    |
"""

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

# What the web and data sets hold. Not all that Pillow knows: its EPS reader, for one, starts another program.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
)
JPEG_START = b"\xff\xd8\xff"
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
JPEG_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, comments, application data
SEVERAL_FRAMES = b"MPF\0"  # what the application data of an MPO begin with
PNG_BIT_DEPTH = 24  # byte offset in the header that every PNG begins with
PILLOW_MODE = {1: "L", 3: "RGB"}
READ_MODE = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


class BadImageError(ValueError):
    """An image that cannot be decoded; `reason` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode_image(encoded: bytes | np.ndarray, num_channels: int) -> torch.Tensor:
    """Decodes one image.

    Args:
        encoded: the bytes of an image file, or a uint8 array (H, W) or (H, W, C), which passes through.
        num_channels: C of the result; 1 or 3 for files, any number for arrays that have it.

    Returns:
        uint8 tensor (C, H, W).

    Raises:
        BadImageError: the bytes are no image, or a damaged, oversized or undefined one.
        ValueError: the array has another number of channels, or files cannot have `num_channels`.
    """
    if isinstance(encoded, np.ndarray):
        return _decode_array(encoded, num_channels)
    if num_channels not in PILLOW_MODE:
        raise ValueError(f"image files decode to 1 or 3 channels, not {num_channels}: set num_channels to 1 or 3")
    if not encoded:
        raise BadImageError("the file is empty")
    try:
        return _decode_file(encoded, num_channels)
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"not an image file: it begins with {encoded[:16]!r}") from error
    except Exception as error:  # on hostile bytes the decoders raise nearly anything
        raise BadImageError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _decode_file(encoded: bytes, num_channels: int) -> torch.Tensor:
    if _is_plain_jpeg(encoded):
        return _decode_jpeg(encoded, num_channels)
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:  # reads the header only, refuses bombs
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            return _decode_jpeg(encoded, num_channels)
        if image.format == "PNG" and encoded[PNG_BIT_DEPTH] == 16:
            pixels = _sixteen_bit_png(encoded)
        else:
            image.load()
            pixels = _eight_bit(image)
        return _to_tensor(_on_white(upright(pixels, image)), num_channels)


def _is_plain_jpeg(encoded: bytes) -> bool:
    """Whether the header is, beyond doubt, that of a colour or grey JPEG too small for a bomb.

    Pillow would take a twentieth of the whole way from bytes to batch to find that out; it is asked about all others.
    """
    if not encoded.startswith(JPEG_START):
        return False
    position = 2
    try:
        while encoded[position] == 0xFF:
            marker, length = struct.unpack_from(">xBH", encoded, position)
            if marker in JPEG_FRAMES:
                bits, height, width, components = struct.unpack_from(">BHHB", encoded, position + 4)
                return bits == 8 and components in READ_MODE and 0 < height * width <= (Image.MAX_IMAGE_PIXELS or 0)
            if marker not in JPEG_SEGMENTS or encoded.startswith(SEVERAL_FRAMES, position + 4):
                return False
            position += 2 + length
    except (IndexError, struct.error):  # it ends within its header
        pass
    return False


def _decode_jpeg(encoded: bytes, num_channels: int) -> torch.Tensor:
    data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    return decode_jpeg(data, mode=READ_MODE[num_channels], apply_exif_orientation=True)  # (C, H, W)


def _sixteen_bit_png(encoded: bytes) -> Image.Image:
    """Decodes with torchvision: Pillow keeps only the high byte of 16-bit colour."""
    values = decode_png(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
    values = _scale_to_eight_bits(values.permute(1, 2, 0).numpy())  # (H, W, 1..4)
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImageError("pixels are floating-point numbers, whose range is not defined")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError("pixels are 32-bit integers, whose range is not defined")
        return Image.fromarray(_scale_to_eight_bits(values))
    return image


def _scale_to_eight_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)  # = round(v / 257): 257 is odd, there is no tie


def upright(pixels: Image.Image, opened: Image.Image) -> Image.Image:
    """Turns `pixels` as the EXIF block of the opened file says."""
    try:
        pixels.info.update(exif=opened.getexif().tobytes())
        return ImageOps.exif_transpose(pixels)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return pixels


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_tensor(image: Image.Image, num_channels: int) -> torch.Tensor:
    values = np.array(image.convert(PILLOW_MODE[num_channels]))
    return torch.from_numpy(np.atleast_3d(values)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)


def _decode_array(values: np.ndarray, num_channels: int) -> torch.Tensor:
    if values.dtype != np.uint8 or values.ndim not in (2, 3):
        raise ValueError(f"an image array must be uint8 (H, W) or (H, W, C), got {values.dtype} {values.shape}")
    values = np.atleast_3d(values)  # (H, W, C)
    if values.shape[2] == num_channels:
        return torch.from_numpy(values.copy()).permute(2, 0, 1)  # (C, H, W)
    if {values.shape[2], num_channels} != {1, 3}:
        raise ValueError(
            f"the images have {values.shape[2]} channels but the model takes {num_channels}: "
            f"set num_channels to {values.shape[2]}"
        )
    return _to_tensor(Image.fromarray(values[..., 0] if num_channels == 3 else values), num_channels)
