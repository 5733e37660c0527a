"""Every kind of image file has a defined outcome."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.resize import Preparation, UnreadableError, decode, fitted, strict_decoding, upright
from tests.data_prep.archives import encoded, pixels

RGB = pixels(1, 40)[0][:, :24]


def plain(data: bytes, side: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX))


def palette(transparent: bool) -> bytes:
    image = Image.fromarray(RGB).quantize(16)
    return encoded(image, "PNG", **({"transparency": 3} if transparent else {}))


def animation() -> bytes:
    first, *others = (Image.fromarray(frame).quantize(32) for frame in pixels(3, 20))
    return encoded(first, "GIF", save_all=True, append_images=others)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RGB, "JPEG", exif=exif.tobytes())


FILES = {
    "jpeg": encoded(RGB, "JPEG"),
    "progressive jpeg": encoded(RGB, "JPEG", progressive=True),
    "cmyk jpeg": encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "grey jpeg": encoded(RGB[..., 0], "JPEG"),
    "exif-rotated jpeg": rotated(),
    "png": encoded(RGB),
    "grey and alpha": encoded(Image.fromarray(RGB).convert("LA")),
    "rgba": encoded(Image.fromarray(RGB).convert("RGBA")),
    "one bit": encoded(Image.fromarray(RGB).convert("1")),
    "palette": palette(transparent=False),
    "palette with transparency": palette(transparent=True),
    "bmp": encoded(RGB, "BMP"),
    "gif": animation(),
    "webp": encoded(RGB, "WEBP", lossless=True),
    "tiff": encoded(RGB, "TIFF"),
    "1x1": encoded(RGB[:1, :1]),
    "20000x1": encoded(np.resize(RGB, (1, 20000, 3))),
    "1x20000": encoded(np.resize(RGB, (20000, 1, 3))),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("side", [8, 32, 33])
def test_equal_to_pillows_own_box_resize(kind: str, side: int) -> None:
    resized = fitted(decode(FILES[kind]), Preparation(side))
    assert resized.shape == (side, side, 3)
    assert resized.dtype == np.uint8
    assert np.array_equal(resized, plain(FILES[kind], side))


def test_an_exif_rotation_is_not_applied() -> None:
    assert decode(FILES["exif-rotated jpeg"]).size == (24, 40)


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(deep), kind)))[..., 0], deep >> 8)


def tiff(values: np.ndarray) -> bytes:
    """A grey TIFF of these whole numbers, (H, W), as they are."""
    kind = {"u": 1, "i": 2}[values.dtype.kind]
    (height, width), data = values.shape, values.tobytes()
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    entries = [struct.pack("<HHII", *(tag, 4, 1, value)) for tag, value in {**tags, 279: len(data), 339: kind}.items()]
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", 10) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("bits", [8, 12, 16, 20, 31, 32])
def test_deep_grey_is_scaled_by_its_own_range(bits: int) -> None:
    """Twelve bits in sixteen, and whole numbers of 32 bits, would otherwise be nearly black."""
    levels = np.arange(256, dtype=np.uint64).reshape(16, 16) << (bits - 8)
    for dtype in ("<u2", "<u4") if bits <= 16 else ("<u4",):
        assert np.array_equal(np.asarray(decode(tiff(levels.astype(dtype))))[..., 1], levels >> (bits - 8))
    if bits <= 16:
        assert np.array_equal(
            np.asarray(decode(encoded(Image.fromarray(levels.astype(np.uint16)))))[..., 0], levels >> (bits - 8)
        )


def test_numbers_below_zero_are_named() -> None:
    for dtype in ("<i2", "<i4"):
        with pytest.raises(UnreadableError, match="pixels are numbers below 0, of unknown range"):
            decode(tiff(np.arange(-8, 8, dtype=dtype).reshape(4, 4)))


def test_deep_color_that_would_be_nearly_black_is_named() -> None:
    """Pillow reads the high byte of 16-bit color only."""

    def png(top: int) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        rows = b"".join(b"\0" + struct.pack(">6H", 0, 1, top, top, 9, top) for _ in range(2))
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

    assert np.asarray(decode(png(65535))).max() == 255
    with pytest.raises(UnreadableError, match="16-bit color of which 12 bits at most are used"):
        decode(png(4095))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not an image of a known format"),
        (encoded(RGB, "JPEG")[:-200], "damaged: .*truncated"),
        (encoded(RGB, "JPEG")[:30], "damaged|not an image"),
        (encoded(RGB)[:400], "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image of a known format"),
    ],
)
def test_damaged_files_are_named_errors(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_damage_anywhere_is_either_decoded_or_named() -> None:
    rng, rule = np.random.default_rng(0), Preparation(8, fit="pad", exif="apply")
    for kind, data in FILES.items():
        if len(data) > 10_000:
            continue
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 4):
                damaged[position] = rng.integers(256)
            with strict_decoding():
                try:
                    image = decode(bytes(damaged[: rng.integers(len(data) // 2, len(data) + 1)]))
                except UnreadableError:
                    continue
            assert image.mode == "RGB", kind
            assert fitted(upright(image, rule), rule).shape == (8, 8, 3)


def test_a_decompression_bomb_is_not_decoded() -> None:
    for side in (10_000, 20_000):  # above the limit, and above twice the limit
        bomb = encoded(Image.new("1", (side, side)))
        with strict_decoding(), pytest.raises(UnreadableError, match="too large"):
            decode(bomb)
