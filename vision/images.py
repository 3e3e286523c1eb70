"""One image from whatever holds it, as 8-bit RGB: a file, the bytes of one, or an array of pixels."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..core.errors import InputError

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".ico", ".avif"),
}
LARGEST = 178_956_970  # pixels: beyond, Pillow takes a file for a decompression bomb
ASPECT = 8  # a longer strip than this is cut to its middle before it is resized

# What Pillow grumbles about and reads all the same: odd metadata, and images of half of LARGEST.
warnings.filterwarnings("ignore", module=r"PIL\.")

Item = Path | bytes | np.ndarray


def read_image(item: Item, name: str, enough: int | None = None) -> Image.Image:
    """The first frame, turned as EXIF says, as mode RGB.

    item     a file, the bytes of one, or an array (H, W), (H, W, 1, 3 or 4) or (1 or 3, H, W): uint8, uint16, or floats
             from 0 to 1
    name     what an error names
    enough   a JPEG may be decoded at a smaller scale if its shorter side keeps at least so many pixels

    Grey and palette become colours; what is transparent is shown on white; 16 bits are scaled to 8. Raises InputError
    for what is no image, damaged, cut short, or larger than LARGEST.
    """
    if isinstance(item, np.ndarray):
        return _to_rgb(_from_array(item, name))
    try:
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as image:
            if enough is not None and image.format == "JPEG" and min(image.size) > enough:
                shrink = min(image.size) / enough
                image.draft(None, (int(image.width / shrink), int(image.height / shrink)))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise InputError(f"{name}: an image of more than {LARGEST:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: no image of a kind that can be read") from None
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: a damaged image ({reason})") from None


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, 2)  # channels first
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)) or 0 in pixels.shape:
        raise InputError(f"{name}: an array {pixels.shape}; an image is (H, W), (H, W, 1, 3 or 4) or (1 or 3, H, W)")
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    elif np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            raise InputError(f"{name}: an array of floats that are not all between 0 and 1")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    elif pixels.dtype == np.uint16:
        pixels = _eight_bits(pixels)
    elif pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > 255:
            raise InputError(f"{name}: an array of {pixels.dtype} that are not all between 0 and 255")
        pixels = pixels.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits of grey
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, to_rgb) or image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits, or of floats, as uint8: of the smallest of the usual ranges that holds it."""
    values = np.nan_to_num(pixels.astype(np.float64), posinf=0, neginf=0).clip(min=0)
    ranges = (1.0, 255.0, 65535.0) if np.issubdtype(pixels.dtype, np.floating) else (255.0, 65535.0)
    if pixels.dtype == np.uint16:
        ranges = (65535.0,)
    top = next((r for r in ranges if values.max(initial=0) <= r), float(values.max(initial=1)))
    return np.rint(values * (255 / top)).astype(np.uint8)


def bounded(image: Image.Image) -> Image.Image:
    """The middle of a strip longer than ASPECT: resized whole it would be as long as memory allows, or longer."""
    width, height = image.size
    if max(width, height) <= ASPECT * min(width, height):
        return image
    length = ASPECT * min(width, height)
    if width > height:
        left = (width - length) // 2
        return image.crop((left, 0, left + length, height))
    top = (height - length) // 2
    return image.crop((0, top, width, top + length))
