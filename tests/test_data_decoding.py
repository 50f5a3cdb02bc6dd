"""Whatever the file is, the pixels are the ones that were defined; what is no image is refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mimae.data.images.decoding import BadImageError, decode_image
from mimae.tests.data_helpers import encode, photograph

GENERATOR = np.random.default_rng(0)
SIXTEEN_BIT = GENERATOR.integers(0, 65536, (5, 7, 3)).astype(np.uint16)


def pixels(image, mode="RGB"):
    values = np.array(image.convert(mode))
    return torch.from_numpy(np.atleast_3d(values)).permute(2, 0, 1)


def pillow(encoded, mode="RGB"):
    return pixels(Image.open(io.BytesIO(encoded)), mode)


def png(values, colour_type):
    """Writes a 16-bit PNG by hand, since Pillow cannot: colour types 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def scaled(values):
    return torch.from_numpy(np.round(np.atleast_3d(values) / 257).astype(np.uint8)).permute(2, 0, 1)


@pytest.mark.parametrize("options", [{}, {"quality": 96, "subsampling": 0}, {"progressive": True}])
def test_jpeg_is_bit_identical_to_pillow(options):
    encoded = encode(photograph(), **options)
    assert torch.equal(decode_image(encoded, 3), pillow(encoded))


def test_grey_jpeg_becomes_rgb_and_colour_becomes_luma():
    encoded = encode(photograph().convert("L"))
    assert torch.equal(decode_image(encoded, 1), pillow(encoded, "L"))
    assert torch.equal(decode_image(encoded, 3), pillow(encoded))
    encoded = encode(photograph())
    luma = Image.open(io.BytesIO(encoded))
    luma.draft("L", luma.size)  # has libjpeg give the luma channel alone
    assert torch.equal(decode_image(encoded, 1), pixels(luma, "L"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("file_format", ["PNG", "GIF", "TIFF", "BMP"])
def test_plain_modes_give_the_colours_they_stand_for(mode, file_format):
    encoded = encode(photograph().convert(mode), file_format)
    assert torch.equal(decode_image(encoded, 3), pillow(encoded))
    assert torch.equal(decode_image(encoded, 1), pillow(encoded, "L"))


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(file_format):
    image = photograph().convert("CMYK")
    encoded = encode(image, file_format)
    assert torch.equal(decode_image(encoded, 3), pillow(encoded))
    assert (decode_image(encoded, 3).float() - pixels(photograph()).float()).abs().mean() < 10  # not inverted


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode):
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image = image.convert(mode)
    assert decode_image(encode(image, "PNG"), 3).tolist() == [[[200, 255]]] * 3
    assert decode_image(encode(image, "PNG"), 1).tolist() == [[[200, 255]]]


def test_half_transparent_red_is_pink():
    encoded = encode(Image.new("RGBA", (1, 1), (255, 0, 0, 51)), "PNG")
    assert decode_image(encoded, 3).flatten().tolist() == [255, 204, 204]  # 255 - 51 of each missing colour


def test_palette_with_transparency_is_composited_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putpixel((1, 0), 1)
    encoded = encode(image, "PNG", transparency=1)
    assert decode_image(encoded, 3)[:, 0].tolist() == [[10, 255], [20, 255], [30, 255]]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(file_format):
    encoded = encode(Image.fromarray(SIXTEEN_BIT[..., 0]), file_format)
    assert torch.equal(decode_image(encoded, 1), scaled(SIXTEEN_BIT[..., 0]))
    assert torch.equal(decode_image(encoded, 3), scaled(SIXTEEN_BIT[..., 0]).expand(3, -1, -1))


def test_sixteen_bit_colour_png_is_scaled_with_its_low_byte():
    decoded = decode_image(png(SIXTEEN_BIT, 2), 3)
    assert torch.equal(decoded, scaled(SIXTEEN_BIT))
    assert not torch.equal(decoded, torch.from_numpy((SIXTEEN_BIT >> 8).astype(np.uint8)).permute(2, 0, 1))


def test_sixteen_bit_alpha_png_is_composited_on_white():
    opaque = np.concatenate([SIXTEEN_BIT, np.full((5, 7, 1), 65535, np.uint16)], axis=2)
    assert torch.equal(decode_image(png(opaque, 6), 3), scaled(SIXTEEN_BIT))
    clear = np.concatenate([SIXTEEN_BIT[..., :1], np.zeros((5, 7, 1), np.uint16)], axis=2)
    assert (decode_image(png(clear, 4), 3) == 255).all()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(photograph().resize((40, 24)), file_format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    assert expected.size == ((40, 24) if orientation < 5 else (24, 40))
    assert torch.equal(decode_image(encoded, 3), pixels(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_corrupt_exif_block_costs_nothing_but_itself(file_format):
    image = photograph().resize((40, 24))
    encoded = encode(image, file_format, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff\xff\xff\xff")
    assert decode_image(encoded, 3).shape == (3, 24, 40)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    for file_format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        encoded = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert decode_image(encoded, 3)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (20000, 50)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_odd_sizes_decode(size, file_format):
    assert decode_image(encode(photograph().resize(size), file_format), 3).shape == (3, size[1], size[0])


def test_the_contents_decide_and_not_the_name():
    """ImageNet's n02105855_2933.JPEG is a PNG."""
    assert torch.equal(decode_image(encode(photograph(), "PNG"), 3), pixels(photograph()))


def jpeg_bomb():
    """A JPEG whose header announces 65,500 x 65,500 pixels."""
    encoded = bytearray(encode(photograph()))
    frame = encoded.index(b"\xff\xc0")
    encoded[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(encoded)


def with_header(encoded, before_frame):
    """A JPEG with more bytes between its first marker and the rest."""
    return encoded[:2] + before_frame + encoded[2:]


HEADERS = {
    "comment": b"\xff\xfe\x00\x10" + b"\xff\xc0\x00\x0b\x08\x00\x01\x00\x01\x03" + b"....",  # reads as a frame
    "application data": b"\xff\xe5\x00\x02",
    "padding": b"\xff\xff\xff\xfe\x00\x02",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_whatever_stands_before_a_jpegs_frame_its_pixels_are_pillows_and_a_bomb_is_a_bomb(header):
    encoded = with_header(encode(photograph()), header)
    assert torch.equal(decode_image(encoded, 3), pillow(encoded))
    with pytest.raises(BadImageError, match="Bomb"):
        decode_image(with_header(jpeg_bomb(), header), 3)


def test_the_grey_of_a_file_of_several_frames_is_that_of_its_colours():
    encoded = encode(photograph(), "MPO", save_all=True, append_images=[photograph("coffee")])
    assert torch.equal(decode_image(encoded, 1), pixels(Image.open(io.BytesIO(encoded)).convert("RGB"), "L"))


def test_a_jpeg_that_ends_within_its_header_is_refused():
    encoded = encode(photograph())
    for end in range(1, 700):  # its header
        with pytest.raises(BadImageError):
            decode_image(encoded[:end], 3)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>404 Not Found</body></html>", "not an image"),
        (encode(photograph())[:9000], "truncated"),
        (encode(photograph(), "PNG")[:9000], "truncated"),
        (encode(photograph().convert("CMYK"))[:9000], "truncated"),
        (png(SIXTEEN_BIT, 2)[:60], "PNG|png"),
        (jpeg_bomb(), "Bomb"),
        (encode(Image.fromarray(np.float32([[0.5]])), "TIFF"), "floating-point"),
        (encode(Image.fromarray(np.int32([[70000]])), "TIFF"), "32-bit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not an image"),
    ],
    ids=["empty", "html", "jpeg", "png", "cmyk", "png16", "bomb", "float", "int32", "eps"],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_what_cannot_be_decoded_is_refused_with_a_reason(encoded, reason):
    with pytest.raises(BadImageError, match=reason) as caught:
        decode_image(encoded, 3)
    assert caught.value.reason == str(caught.value)


def test_arrays_pass_through_and_convert_between_grey_and_colour():
    grey = GENERATOR.integers(0, 256, (1, 4), dtype=np.uint8)
    assert torch.equal(decode_image(grey, 1), torch.from_numpy(grey)[None])
    assert torch.equal(decode_image(grey[..., None], 3), torch.from_numpy(grey).expand(3, -1, -1))
    colour = np.array(photograph())
    assert torch.equal(decode_image(colour, 1), pixels(photograph(), "L"))
    five = GENERATOR.integers(0, 256, (2, 3, 5), dtype=np.uint8)
    assert torch.equal(decode_image(five, 5), torch.from_numpy(five).permute(2, 0, 1))


def test_channels_that_do_not_fit_are_an_error_of_the_set_up_not_a_bad_image():
    for encoded, channels, message in (
        (np.zeros((2, 3, 5), np.uint8), 3, "set num_channels to 5"),
        (encode(photograph()), 5, "1 or 3 channels"),
        (np.zeros((2, 3), np.float32), 1, "uint8"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            decode_image(encoded, channels)
        assert not isinstance(caught.value, BadImageError)
