"""Image files, mask files and COCO's segmentations, decoded into arrays; resizing.

C channels · H W height and width of the image
"""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as coco

from utils.common import READ_ERRORS, as_user_error

# Pillow's decoders of rare formats raise the last three, on files that are damaged or too large.
IMAGE_ERRORS = (
    *READ_ERRORS,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
)


def to_rgb(image) -> np.ndarray:
    """PIL image → uint8 (H, W, 3). 16-bit gray becomes 8-bit, what is transparent becomes white."""
    if image.mode.startswith("I"):
        gray = np.asarray(image).clip(0, 65535) // 257
        image = Image.fromarray(gray.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def to_mask(image) -> np.ndarray:
    """PIL image → bool (H, W). Outside is 0, inside 255, or 1 throughout, as some tools write."""
    values = np.asarray(image.convert("L"))
    if not np.isin(values, [0, 255]).all() and not np.isin(values, [0, 1]).all():
        found = np.unique(values)[:6]
        raise ValueError(f"a mask holds 0 and 255 only (as PNG, edges not softened), not {found}")
    return values > 0


def read_image(path, exif=True, convert=to_rgb) -> np.ndarray:
    """Read a file, of an animation the first frame → uint8 (H, W, 3), or what `convert` returns.

    exif: turn the image as its EXIF orientation says. UserError names a file that cannot be read.
    """
    with as_user_error(path, "check the path, or save it anew as PNG", errors=IMAGE_ERRORS):
        if Path(path).stat().st_size == 0:
            raise ValueError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # damaged EXIF around whole pixels
            # a small file can unpack to gigabytes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if exif:
                    image = ImageOps.exif_transpose(image)
                return convert(image)


def resize(values, size, mode, antialias=True) -> torch.Tensor:
    """(C, H, W) → (C, *size), "bilinear" or "bicubic"; of that size already: bit for bit the same.

    uint8 is resized in uint8, which is several times faster than in floats.
    """
    if values.shape[1:] == size:
        return values
    return F.interpolate(values[None], size, mode=mode, antialias=antialias)[0]


def decode_segmentation(segmentation, height, width) -> np.ndarray:
    """COCO's segmentation → bool (H, W): a list of polygons (their union), or run lengths.

    pycocotools is C and trusts its input: what would crash it is a ValueError here.
    """
    if isinstance(segmentation, list):
        # fewer than three corners hold no pixel
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            raise ValueError("there is no polygon of three corners")
        limit = 2 * max(height, width)
        if not all(abs(x) <= limit for polygon in polygons for x in polygon):  # False for NaN, too
            raise ValueError("a corner lies far outside the image")
        rle = coco.merge(coco.frPyObjects(polygons, height, width))
        return coco.decode(rle).astype(bool)

    runs = segmentation["counts"]
    if not isinstance(runs, list):
        runs = decode_rle(runs)
    fits = list(segmentation["size"]) == [height, width] and sum(runs) == height * width
    if not fits or not all(isinstance(run, int) and run >= 0 for run in runs):
        raise ValueError("the run lengths do not fill the image")
    rle = coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return coco.decode(rle).astype(bool)


def decode_rle(text) -> list[int]:
    """COCO's text (or bytes) for run lengths → the runs, column by column, the first one outside.

    A number is characters of 5 bits, the low ones first; a sixth bit says that more follow.
    From the fourth run on, a number is the difference to the run before the last.
    """
    codes = text.encode() if isinstance(text, str) else text
    runs = []
    number = 0
    shift = 0
    for code in codes:
        code -= 48
        number |= (code & 31) << shift
        shift += 5
        if code & 32:  # more characters follow
            continue
        if code & 16:  # the highest bit is the sign
            number -= 1 << shift
        if len(runs) > 2:
            number += runs[-2]
        runs.append(number)
        number = 0
        shift = 0
    return runs
