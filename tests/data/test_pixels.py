"""Images of every mode and depth become 8-bit RGB, or are refused: none comes out black or white unnoticed."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from tnt_timm.data.decoding import DamagedImage, decode

SHORT, DOUBLE = 3, 12  # TIFF types


@pytest.fixture(scope="module")
def grey(photograph):
    """(24, 32) uint8, from 0 to 255."""
    values = np.asarray(photograph.convert("L").resize((32, 24)), dtype=np.float64)
    return np.rint((values - values.min()) * 255 / (values.max() - values.min())).astype(np.uint8)


def saved(image, format="TIFF", tags=(), **options):
    """Write an image, or an array, and return the file's content. `tags` are (number, value, type)."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if tags:
        options["tiffinfo"] = ImageFileDirectory_v2()
        for number, value, kind in tags:
            options["tiffinfo"].tagtype[number] = kind
            options["tiffinfo"][number] = value
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(content):
    """Decode to an array (H, W, 3)."""
    image = decode(io.BytesIO(content))
    assert image.mode == "RGB"
    return np.asarray(image)


def stated(low, high):
    """TIFF tags of a range."""
    return [(340, low, DOUBLE), (341, high, DOUBLE)]


def patched(content, tag, value):
    """Change a SHORT of a little-endian TIFF that has a single value."""
    entry = content.index(struct.pack("<HHI", tag, SHORT, 1))
    return content[: entry + 8] + struct.pack("<H", value) + content[entry + 10 :]


def twelve_bits(values):
    """A TIFF of 12-bit values: two of them in three bytes."""
    height, width = values.shape
    first, second = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    entries = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries = [struct.pack("<HHIHH", tag, SHORT, 1, value, 0) for tag, value in entries]
    entries.append(struct.pack("<HHII", 279, 4, 1, len(packed)))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_colour(values):
    """A grey PNG with 16 bits in each of three channels, which Pillow cannot write."""
    height, width = values.shape
    rows = np.repeat(values.astype(">u2"), 3, axis=1).tobytes()
    rows = b"".join(b"\0" + rows[start : start + 6 * width] for start in range(0, len(rows), 6 * width))
    header = struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


SAME = {  # as many grey levels as `grey` has, stored in another way
    "16 bits, PNG": lambda g: saved(g.astype(np.uint16) * 256 + 77, "PNG"),
    "16 bits, TIFF": lambda g: saved(g.astype(np.uint16) * 256 + 77),
    "16 bits, big-endian": lambda g: saved(Image.fromarray((g.astype(np.int32)) * 257).convert("I;16B")),
    "16 bits, compressed": lambda g: saved(g.astype(np.uint16) * 256, compression="tiff_lzw"),
    "16 bits, PGM": lambda g: saved(g.astype(np.uint16) * 256, "PPM"),
    "16 bits, JPEG 2000": lambda g: saved(g.astype(np.uint16) * 256, "JPEG2000"),
    "16 bits, in colour": lambda g: deep_colour(g.astype(np.uint16) * 256 + 77),
    "12 bits, TIFF": lambda g: twelve_bits(g.astype(np.uint16) * 16 + 9),
    "12 bits in 16, stated": lambda g: saved(g.astype(np.uint16) * 16 + 9, tags=stated(0, 4095)),
    "8 bits in 16, stated": lambda g: saved(g.astype(np.uint16), tags=stated(0, 255)),
    "white is zero": lambda g: patched(saved((255 - g).astype(np.uint16) * 256), 262, 0),
    "32 bits, unsigned": lambda g: patched(saved((g.astype(np.uint32) << 24).view(np.int32)), 339, 1),
    "32 bits, stated": lambda g: saved(g.astype(np.int32) * 1000 - 100_000, tags=stated(-100_000, 155_000)),
    "32 bits from 0 to 255": lambda g: saved(g.astype(np.int32)),
    "float from 0 to 1": lambda g: saved(g.astype(np.float32) / 255),
    "float from 0 to 1, PFM": lambda g: saved(g.astype(np.float32) / 255, "PPM"),
    "float from 0 to 255": lambda g: saved(g.astype(np.float32)),
    "float, stated": lambda g: saved(g.astype(np.float32) * 2 - 100, tags=stated(-100, 410)),
    "float, white is zero": lambda g: patched(saved(1 - g.astype(np.float32) / 255), 262, 0),
    "black, 16 bits": lambda g: saved(np.zeros_like(g, np.uint16), "PNG"),
    "black, float": lambda g: saved(np.zeros_like(g, np.float32)),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_range_of_an_image_counts(kind, grey):
    expected = np.zeros_like(grey) if kind.startswith("black") else grey
    found = read(SAME[kind](grey))
    assert np.array_equal(found, np.stack([expected] * 3, -1))


REFUSED = {
    "12 bits in 16": (lambda g: saved(g.astype(np.uint16) * 16 + 9, "PNG"), "nearly black"),
    "8 bits in 16": (lambda g: saved(g.astype(np.uint16)), "nearly black"),
    "12 bits in 16, PGM": (lambda g: b"P5 32 24 65535\n" + (g * np.uint16(16)).astype(">u2").tobytes(), "nearly black"),
    "12 bits in 16, PPM": (
        lambda g: b"P6 32 24 65535\n" + np.repeat(g * np.uint16(16), 3).astype(">u2").tobytes(),
        "nearly black",
    ),
    "12 bits in 16, in colour": (lambda g: deep_colour(g.astype(np.uint16) * 16), "nearly black"),
    "8 bits in 16, in colour": (lambda g: deep_colour(g.astype(np.uint16)), "nearly black"),
    "24 bits in 32": (lambda g: saved(g.astype(np.int32) << 16), "values from 0 to 1.67117e.07 in a range"),
    "24 bits in 32, unsigned": (lambda g: patched(saved(g.astype(np.int32) << 12), 339, 1), "nearly black"),
    "0 and 1 in 32 bits": (lambda g: saved((g > 100).astype(np.int32)), "values from 0 to 1 in a range"),
    "temperatures": (lambda g: saved(g.astype(np.float32) / 25 - 3), "values from -3 to 7.2 in a range"),
    "brighter than white": (lambda g: saved(g.astype(np.float32) / 200), "values from 0 to 1.275 in a range"),
    "outside of its range": (lambda g: saved(g.astype(np.float32), tags=stated(0, 1)), "outside of its stated range"),
    "NaN": (lambda g: saved(np.where(g == 0, np.nan, g / 255).astype(np.float32)), "NaN or infinite"),
    "infinite": (lambda g: saved(np.where(g == 0, np.inf, g / 255).astype(np.float32)), "NaN or infinite"),
    "a line": (lambda g: saved(np.zeros((1, 60_000), np.uint8), "PNG"), "too narrow"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_no_image_comes_out_black_or_white_unnoticed(kind, grey):
    make, reason = REFUSED[kind]
    with pytest.raises(DamagedImage, match=reason):
        read(make(grey))


ORDINARY = """RGB PNG, RGB JPEG, RGB WEBP, RGB AVIF, RGBX TIFF, RGBA PNG, L PNG, L JPEG, LA PNG, 1 PNG, P PNG, P GIF, P ICNS,
    PA TIFF, CMYK JPEG, CMYK TIFF, YCbCr TIFF, LAB TIFF, RGB;16 BMP""".split(",")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("brightness", [1, 0.05])
def test_8_bit_images_keep_the_pixels_that_pillow_gives(kind, brightness, photograph):
    """Also those that are really dark."""
    mode, format = kind.split()
    image = photograph.resize((32, 32)).point(lambda value: value * brightness)
    options = {}
    if mode == "P":
        image = image.convert("RGBA").quantize(16)
        options = {} if format == "ICNS" else dict(transparency=bytes(range(16)) if format == "PNG" else 3)
    elif mode == "RGB;16":  # 5, 6 and 5 bits
        values = np.asarray(image).astype(np.uint16) >> 3
        rows = (values[..., 0] << 11 | values[..., 1] << 6 | values[..., 2]).astype("<u2")[::-1].tobytes()
        head = struct.pack("<IiiHHIIiiII3I", 40, 32, 32, 1, 16, 3, len(rows), 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
        content = b"BM" + struct.pack("<IHHI", 14 + len(head) + len(rows), 0, 0, 14 + len(head)) + head + rows
    else:
        image = image.convert(mode) if mode != "PA" else image.convert("P").convert("PA")
    if mode != "RGB;16":
        content = saved(image, format, **options)
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(read(content), expected)


def test_premultiplied_alpha(grey):
    """Mode La, which Pillow cannot convert to RGB."""
    pair = Image.merge("LA", [Image.fromarray(grey // 2), Image.new("L", (32, 24), 128)])
    found = read(patched(saved(pair), 338, 1))
    assert np.abs(found[..., 0].astype(int) - grey).max() <= 2


def without(content, kind):
    start = content.index(kind) - 4
    return content[:start] + content[start + 12 + struct.unpack(">I", content[start : start + 4])[0] :]


@pytest.mark.parametrize("transparency", [{}, dict(transparency=3)])
def test_a_png_that_lost_its_palette(transparency, photograph):
    content = saved(photograph.resize((32, 32)).quantize(16), "PNG", **transparency)
    assert read(content).any()
    for broken in (without(content, b"PLTE"), content.replace(*emptied_palette(content))):
        with pytest.raises(DamagedImage, match="palette is missing"):
            read(broken)


def emptied_palette(content):
    start = content.index(b"PLTE") - 4
    length = struct.unpack(">I", content[start : start + 4])[0]
    return content[start : start + 12 + length], chunk(b"PLTE", b"")


def test_a_tiff_whose_palette_has_8_bits(photograph):
    content = saved(photograph.resize((32, 32)).quantize(16))
    colours = np.asarray(Image.open(io.BytesIO(content)).tag_v2[320])
    start = content.index(colours.astype("<u2").tobytes())
    small = (colours >> 8).astype("<u2").tobytes()
    with pytest.raises(DamagedImage, match="palette"):
        read(content[:start] + small + content[start + len(small) :])
