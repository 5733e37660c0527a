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

# What image folders hold. A closed list: Pillow's rarer readers (EPS starts Ghostscript) never see a stranger's bytes.
_READERS: Final = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    BmpImagePlugin.BmpImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    TiffImagePlugin.TiffImageFile,
    PpmImagePlugin.PpmImageFile,
)
FORMATS: Final = tuple(reader.format for reader in _READERS)
FILTERS: Final = {"box": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR}


class UnreadableError(Exception):
    """An image that cannot be decoded. The message is the reason, in a few words."""


def decode(data: bytes) -> Image.Image:
    """Decode an image file's bytes to 8-bit RGB, exactly as `Image.convert("RGB")` does: pixels as stored (an EXIF
    rotation is not applied, ImageNet's convention), the first frame of an animation, alpha dropped. The exception is
    16-bit grey, of which Pillow would clip all above 255 to white: its high byte is taken.

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
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, IndexError, struct.error, zlib.error) as error:
        # Pillow's readers raise all of these on damaged files.
        raise UnreadableError(f"damaged: {_one_line(error)}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableError("pixels are floating-point numbers of unknown range")
    return image.convert("RGB")


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
