"""Every kind of image file has a defined outcome."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.resize import UnreadableError, decode, strict_decoding, to_size
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
    resized = to_size(decode(FILES[kind]), side)
    assert resized.shape == (side, side, 3)
    assert resized.dtype == np.uint8
    assert np.array_equal(resized, plain(FILES[kind], side))


def test_an_exif_rotation_is_not_applied() -> None:
    assert decode(FILES["exif-rotated jpeg"]).size == (24, 40)


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(deep), kind)))[..., 0], deep >> 8)


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
    rng = np.random.default_rng(0)
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


def test_a_decompression_bomb_is_not_decoded() -> None:
    for side in (10_000, 20_000):  # above the limit, and above twice the limit
        bomb = encoded(Image.new("1", (side, side)))
        with strict_decoding(), pytest.raises(UnreadableError, match="too large"):
            decode(bomb)


def test_bilinear_is_pillows() -> None:
    image = Image.fromarray(pixels(1, 96)[0])
    assert np.array_equal(to_size(image, 32, "bilinear"), np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))
