"""Encoded bytes or pixels -> uint8 RGB at the resolution of the data set, by Pillow."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

# What image folders hold, by ending. A closed list: Pillow's rarer readers (EPS starts Ghostscript) never see a
# stranger's bytes.
_READERS: Final = {
    JpegImagePlugin.JpegImageFile.format: (".jpg", ".jpeg", ".jfif", ".jpe"),
    PngImagePlugin.PngImageFile.format: (".png",),
    BmpImagePlugin.BmpImageFile.format: (".bmp",),
    GifImagePlugin.GifImageFile.format: (".gif",),
    WebPImagePlugin.WebPImageFile.format: (".webp",),
    TiffImagePlugin.TiffImageFile.format: (".tif", ".tiff"),
    PpmImagePlugin.PpmImageFile.format: (".ppm", ".pgm"),
}
HEIF_SUFFIXES: Final = (".heic", ".heif")
try:
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()
    _READERS["HEIF"] = HEIF_SUFFIXES
FORMATS: Final = tuple(_READERS)
SUFFIXES: Final = frozenset(suffix for suffixes in _READERS.values() for suffix in suffixes)
ORIENTATION, SAMPLE_FORMAT = 0x0112, 339  # EXIF and TIFF tags
SIGNED = 2
FILTERS: Final = {"box": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR}


class UnreadableError(Exception):
    """An image that cannot be decoded. The message is the reason, in a few words."""


def decode(data: bytes) -> Image.Image:
    """Decode an image file's bytes to 8-bit RGB, exactly as `Image.convert("RGB")` does: pixels as stored (an EXIF
    rotation is not applied, ImageNet's convention), the first frame of an animation, alpha dropped. The exceptions are
    16 and 32-bit grey, of which Pillow would clip all above 255 to white: they are scaled by the smallest of 8, 12, 16
    bits, or above the number of bits, that holds the file's largest pixel.

    Raises: UnreadableError for what cannot be read whole: no image, a truncated one, one too large to be real.
    """
    if not data:
        raise UnreadableError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _to_rgb(image)
    except UnidentifiedImageError:
        raise UnreadableError("not an image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError(f"too large: {_one_line(error)}") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        OverflowError,
        IndexError,
        struct.error,
        zlib.error,
    ) as error:
        # Pillow's readers raise all of these on damaged files.
        raise UnreadableError(f"damaged: {_one_line(error)}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_high_byte(image)).convert("RGB")
    if image.mode == "F":
        raise UnreadableError("pixels are floating-point numbers of unknown range")
    deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))  # of which Pillow takes the high bytes
    rgb = image.convert("RGB")
    if deep and max(high for _, high in rgb.getextrema()) < 16:  # type: ignore[misc]
        raise UnreadableError("16-bit color of which 12 bits at most are used: nearly black; convert it to 8 bits")
    return rgb


def _high_byte(image: Image.Image) -> NDArray[np.uint8]:
    """Grey of more than 8 bits, (H, W), at 8 bits."""
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0:
        if SIGNED in np.atleast_1d(getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, 1)):
            raise UnreadableError("pixels are numbers below 0, of unknown range")
        values &= 0xFFFFFFFF  # Pillow reads unsigned 32-bit numbers as signed ones
    top = int(values.max(initial=0))
    bits = next((bits for bits in (8, 12, 16) if top < 1 << bits), top.bit_length())
    return (values >> (bits - 8)).astype(np.uint8)


def is_rotated(image: Image.Image) -> bool:
    """Whether a decoded image's EXIF data ask to show it rotated or mirrored."""
    try:
        return "exif" in image.info and image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error):  # EXIF data that is none
        return False


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def to_size(image: Image.Image, resolution: int, filter_name: str = "box") -> NDArray[np.uint8]:
    """Resize the whole image to resolution x resolution: (H, W, 3) uint8, to the bit
    `image.resize((resolution, resolution), Image.BOX)`. An image of that size is left as it is."""
    size = (resolution, resolution)
    return np.asarray(image if image.size == size else image.resize(size, FILTERS[filter_name]))


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Within: images above Pillow's bomb limit (89 million pixels) are errors; its remarks on odd metadata are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
