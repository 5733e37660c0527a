"""Encoded bytes or pixels -> uint8 RGB at the resolution of the data set, by Pillow."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
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
FILTERS: Final = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# What Pillow's readers raise on damaged files.
_DAMAGED: Final = (
    *(OSError, ValueError, SyntaxError, EOFError, OverflowError, IndexError, KeyError, TypeError),
    *(struct.error, zlib.error),
)
PIECE = 2**20  # bytes of a file
FITS: Final = ("squash", "crop", "pad")
EXIF: Final = ("apply", "stored")
_TURNS: Final = {  # orientation -> what shows the stored pixels as they were seen
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Preparation(NamedTuple):
    """How images become those of a data set, `resolution` pixels high and wide.

    fit: "squash" resizes the whole image to the square. "crop" resizes it until its shorter side fits, and keeps the
    middle of the longer one. "pad" resizes it until its longer side fits, and centers it on `color` (R, G, B), None for
    black. exif: "apply" turns an image as its EXIF data ask, "stored" does not.
    """

    resolution: int
    filter_name: str = "box"
    fit: str = "squash"
    exif: str = "stored"
    color: tuple[int, int, int] | None = None


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
    except _DAMAGED as error:
        raise UnreadableError(f"damaged: {_one_line(error)}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = Image.fromarray(_high_byte(image)).convert("RGB")
        grey.info = image.info
        return grey
    if image.mode == "F":
        raise UnreadableError("pixels are floating-point numbers of unknown range")
    deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))  # of which Pillow takes the high bytes
    if image.format == "JPEG" and image.mode == "RGB":  # `convert` would copy all pixels
        image.load()
        return image
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


def orientation(image: Image.Image) -> int:
    """How a decoded image's EXIF data ask to show it: 2 to 8 rotated or mirrored, 1 as it is."""
    try:
        value = image.getexif().get(ORIENTATION, 1) if image.info else 1
    except _DAMAGED:  # EXIF data that is none
        return 1
    return value if value in _TURNS else 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def upright(image: Image.Image, rule: Preparation) -> Image.Image:
    """A decoded image, turned where the rule says so: to the bit as `ImageOps.exif_transpose`."""
    turn = _TURNS.get(orientation(image)) if rule.exif == "apply" else None
    return image if turn is None else image.transpose(turn)


def fitted(image: Image.Image, rule: Preparation) -> NDArray[np.uint8]:
    """An upright image at the rule's resolution, (H, W, 3) uint8. To the bit, for "squash" `image.resize((R, R))`, for
    "crop" a resize to R * long // short by R and the middle (torchvision's `Resize` and `CenterCrop`), for "pad"
    `ImageOps.pad`. Nothing is resampled that has its size already.

    Raises: UnreadableError for an image so long that what "crop" cuts from would have more pixels than Pillow's limit.
    """
    size, side, limit = resized(image.size, rule), rule.resolution, Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise UnreadableError(f"too long to crop: {image.width} x {image.height} pixels")
    if image.size != size:
        image = image.resize(size, FILTERS[rule.filter_name])
    if size != (side, side):
        left, top = (round((length - side) / 2) for length in size)
        image = image.crop((left, top, left + side, top + side))  # black where that is outside of the image
    pixels = np.array(image)
    if rule.fit == "pad" and rule.color is not None:
        fill_margins(pixels, size, rule.color)
    return pixels


def resized(size: tuple[int, int], rule: Preparation) -> tuple[int, int]:
    """The width and height to which an image of this size is resized before it is cropped or padded."""
    side, (width, height) = rule.resolution, size
    if rule.fit == "crop":
        return side * width // min(size), side * height // min(size)
    if rule.fit == "pad":  # ImageOps.pad's rounding, but never to nothing
        return (
            (side, max(1, round(height / width * side)))
            if width > height
            else (max(1, round(width / height * side)), side)
        )
    return side, side


def inner(size: tuple[int, int], side: int) -> tuple[slice, slice]:
    """The rows and columns of an image of `size` that is centered on a square."""
    left, top = (round((side - length) / 2) for length in size)
    return slice(top, top + size[1]), slice(left, left + size[0])


def fill_margins(pixels: NDArray[np.uint8], size: tuple[int, int], color: Sequence[int]) -> None:
    """Give a square (H, W, 3) with an image of `size` at its center this color elsewhere, in place."""
    inside = inner(size, len(pixels))
    kept = pixels[inside].copy()
    pixels[:] = color
    pixels[inside] = kept


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Within: images above Pillow's bomb limit (89 million pixels) are errors; its remarks on odd metadata are not.

    Files go to the decoder in larger pieces than Pillow's, 64 KB, which takes 1 % less time. What Pillow says of a
    truncated file depends on the pieces, so they are the same for all who decode.
    """
    before, ImageFile.MAXBLOCK = ImageFile.MAXBLOCK, PIECE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.MAXBLOCK = before
