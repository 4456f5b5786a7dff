"""Image files, mask files and COCO's segmentations, decoded into arrays; resizing.

C channels · H W height and width of the image
"""

import contextlib
import functools
import io
import re
import struct
import warnings
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco

from utils.common import READ_ERRORS, UserError, as_user_error

# A small file can unpack to gigabytes. Pillow's own limit is 89 megapixels; phones have 200.
MAX_MEGAPIXELS = 250
Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 10**6
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)
# Pillow's decoders of rare formats raise the last two, on files that are damaged.
IMAGE_ERRORS = (*READ_ERRORS, ArithmeticError, NotImplementedError)
# Pillow names these formats, or writes them, but does not decode them.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
# Of a camera's raw file it would decode the preview.
RAW_ENDINGS = {".arw", ".cr2", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"}

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: C:// is a Windows drive

ORIENTATION = 0x0112  # EXIF's tag; its value 1: as stored
TURNS = {  # orientation: what makes the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INVERSE = {6: 8, 8: 6}  # the orientation that takes a turn back; each other one does so itself
UNNAMED = "a channel of no stated meaning"  # our key in a PIL image's info
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}  # chunks; eXIf: orientation


# ------------------------------------------------------------------------------------------- modes
def to_rgb(image) -> np.ndarray:
    """PIL image → uint8 (H, W, 3). Deep gray is scaled to 8 bits; what is transparent is white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        gray = to_8_bits(values)
        gray[~opaque_gray(image, values)] = 255
        return np.repeat(gray[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def opaque_gray(image, values) -> np.ndarray:
    """Deep gray (H, W) → bool (H, W): all of it, less the one value that a PNG says is not."""
    transparent = image.info.get("transparency")
    return values != transparent if isinstance(transparent, int) else np.ones_like(values, bool)


def to_8_bits(values) -> np.ndarray:
    """Gray of 16 bits, 32 bits or floats → uint8, by the range that its values use.

    Ranges are 0..1 (floats), 0..255 and 0..65535. ValueError where none fits, or where the values
    use so little of it that it may be another: cameras and scanners have 10 and 12 bits.
    """
    low = values.min()
    high = values.max()
    if not (low >= 0 and high <= 65535):  # with NaN
        raise ValueError(f"gray values from {low} to {high}: save it with 0 to 255")
    if values.dtype.kind == "f" and high <= 1:
        gray = (255 * values).round()
    elif high <= 255:
        gray = values.round()
    else:
        gray = values // 257
    is_deep = values.dtype.itemsize > 2 or high > 255
    if is_deep and high > 0 and gray.max() < 16:
        raise ValueError(f"gray values up to {high}, of a range that is unclear: save it as 8 bits")
    return gray.astype(np.uint8)


# ------------------------------------------------------------------------------------------- masks
def to_mask(image) -> np.ndarray:
    """PIL image → bool (H, W). Outside is 0, inside 255, or 1 throughout, as some tools write.

    Transparency: where the opaque pixels are of one color, they are the object. Otherwise the
    colors tell, and transparent pixels are outside. ValueError for what stays ambiguous.
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        opaque = opaque_gray(image, values)
        if opaque.all():
            return two_levels(values, "values")
        return see_through_mask(values[..., None], opaque)
    if not image.has_transparency_data:
        gray = gray_of(np.asarray(image.convert("RGB")))
        if UNNAMED in image.info and gray.min() == gray.max():
            raise ValueError(f"a mask of one color and {UNNAMED}: save it as black and white")
        return two_levels(gray, "values")
    image = image.convert("RGBA")
    pixels = np.asarray(image.convert("RGB"))
    alpha = np.asarray(image.getchannel("A"))
    if alpha.min() == alpha.max() > 0:  # it says nothing
        return two_levels(gray_of(pixels), "values")
    return see_through_mask(pixels, two_levels(alpha, "transparency"))


def see_through_mask(pixels, opaque) -> np.ndarray:
    """Pixels (H, W, C) of which some are opaque, bool (H, W) → bool (H, W), as to_mask says."""
    shown = pixels[opaque]
    hidden = pixels[~opaque]
    if (shown != shown[:1]).any():
        mask = np.zeros_like(opaque)
        mask[opaque] = two_levels(gray_of(shown), "opaque values")
        return mask
    if not shown.any() and (hidden != hidden[:1]).any():
        raise ValueError("colors and transparency of the mask disagree: save it as black and white")
    return opaque


def uint8_mask(mask) -> np.ndarray:
    """bool (H, W) → uint8, 0 and 255."""
    return mask.astype(np.uint8) * 255


def gray_of(pixels) -> np.ndarray:
    """uint8 (…, 3) → uint8 (…). ValueError where there are colors."""
    if (pixels != pixels[..., :1]).any():
        raise ValueError("a mask is black and white, this one is colored")
    return pixels[..., 0]


def two_levels(values, what) -> np.ndarray:
    """Whether each value is inside. ValueError unless there are two: 0, and 1 or the largest."""
    inside = values.max()
    levels = (0, 1, 255, 65535) if values.dtype.itemsize > 1 else (0, 1, 255)
    if inside not in levels or not np.isin(values, [0, inside]).all():
        found = np.unique(values)[:6]
        soft = f"a mask holds 0 and 255 only (as PNG, edges not softened), not {what} {found}"
        raise ValueError(soft)
    return values > 0


# ------------------------------------------------------------------------------------------- files
def file_inside(folder, name) -> Path:
    """The file `name` of a folder. A backslash parts folders as well: Windows writes it.

    ValueError where there is no such file, or the name leads out of the folder.
    """
    for path in (Path(name), Path(PureWindowsPath(name).as_posix())):
        leads_out = path.is_absolute() or ".." in path.parts
        if not leads_out and (folder / path).is_file():
            return folder / path
    raise ValueError(f"{name} is not a file inside the folder")


@functools.cache
def image_endings() -> set[str]:
    """The file endings of the formats that Pillow decodes here, such as .jpg."""
    endings = Image.registered_extensions()
    return {ending for ending, kind in endings.items() if kind not in NOT_DECODED}


def is_image_name(path) -> bool:
    """Whether a file is an image, by its name. macOS puts a hidden ._x.jpg beside x.jpg."""
    return path.suffix.lower() in image_endings() and not path.name.startswith(".")


def read_image(path, exif=True, convert=to_rgb) -> np.ndarray:
    """Read a file, of an animation the first frame → uint8 (H, W, 3), or what `convert` returns.

    exif: turn the image as its EXIF orientation says. UserError names a file that cannot be read.
    """
    if URL.match(str(path)):
        raise UserError(
            f"{path}: a URL, and nothing is downloaded here: download it first, then give the file"
        )
    with image_errors(path):
        if Path(path).stat().st_size == 0:
            raise ValueError("the file is empty")
        if Path(path).suffix.lower() in RAW_ENDINGS:
            raise ValueError("a camera's raw file")
        return decode_image(path, exif, convert)


def read_image_bytes(data: bytes, name) -> np.ndarray:
    """`read_image` of a file's content; `name` is what an error calls it."""
    with image_errors(name):
        if not data:
            raise ValueError("it is empty")
        return decode_image(io.BytesIO(data))


def read_pil(image) -> np.ndarray:
    """A PIL image → uint8 (H, W, 3), upright. UserError where it cannot be read."""
    width, height = image.size
    with image_errors(f"the PIL image {image.mode} {width} × {height}"), quiet():
        return to_rgb(oriented(image))


@contextlib.contextmanager
def image_errors(thing):
    """What reading an image raises, as a UserError."""
    smaller = f"scale it down, to {MAX_MEGAPIXELS} megapixels at most"
    anew = "check the path, or save it anew as PNG"
    with as_user_error(thing, smaller, TOO_LARGE), as_user_error(thing, anew, IMAGE_ERRORS):
        yield


@contextlib.contextmanager
def quiet():
    """No warnings about damaged metadata around whole pixels; the limit of pixels is a limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_image(file, exif=True, convert=to_rgb) -> np.ndarray:
    """`read_image` of a path or a BytesIO, with Pillow's own errors."""
    with quiet():
        return convert(open_image(file, functools.partial(oriented, exif=exif)))


def read_shape(file) -> tuple[int, int, int]:
    """Height and width of the stored image, and its EXIF orientation, of a path or a BytesIO."""
    with quiet():
        return open_image(file, stored_shape)


def open_image(file, use):
    """`use` of the PIL image in a file; where metadata cannot be read, of the image without it."""
    try:
        with Image.open(file) as image:
            return use(image)
    except IMAGE_ERRORS as error:
        data = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
        bare = without_metadata(data)
        with contextlib.suppress(*IMAGE_ERRORS), Image.open(io.BytesIO(bare)) as image:
            return use(image)
        if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
            raise ValueError("cannot identify an image in it") from error
        raise


# ---------------------------------------------------------------------------------------- metadata
def oriented(image, exif=True):
    """Load the pixels of a PIL image and turn it upright; with `exif` False, leave it as stored."""
    is_deep = has_deep_channels(image)  # asked first: finding the orientation may load a PNG
    check_white(image)
    check_shallow_gray(image)
    if has_unnamed_channel(image):
        image.info[UNNAMED] = True  # for to_mask
    orientation = find_orientation(image)
    if hasattr(image, "tag_v2"):  # a TIFF, which Pillow turns while it loads it
        with hidden_metadata(image, orientation):
            image.load()
        needed = 1 if exif else INVERSE.get(orientation, orientation)
    else:
        image.load()
        needed = orientation if exif else 1
    if is_deep:
        check_deep_channels(image)
    return image.transpose(TURNS[needed]) if needed in TURNS else image


def has_deep_channels(image) -> bool:
    """Whether several channels have 16 bits in the file. Pillow loads the upper 8 of each."""
    return len(image.getbands()) > 1 and ";16" in str(getattr(image, "tile", ""))


def has_unnamed_channel(image) -> bool:
    """Whether a TIFF or BMP has a channel, an X to Pillow, which it does not load: alpha or not."""
    return re.search("'[A-Z]*X", str(getattr(image, "tile", ""))) is not None


def check_shallow_gray(image):
    """ValueError for gray of 2 or 4 bits with a transparent value, which Pillow does not scale."""
    is_shallow = re.search("'L;[24]'", str(getattr(image, "tile", ""))) is not None
    if is_shallow and image.info.get("transparency"):
        raise ValueError("gray of 2 or 4 bits of which one value is transparent: save it as 8 bits")


def check_deep_channels(image):
    """ValueError where the upper 8 bits say nothing, since the values were of 8 to 12 bits."""
    ranges = dict(zip(image.getbands(), image.getextrema(), strict=True))
    opacity = ranges.pop("A", (255, 255))
    brightest = max(high for low, high in ranges.values())
    if max(opacity) < 16 or (min(opacity) == 255 and brightest < 16):
        raise ValueError("channels of 16 bits that use only the lower ones: save it as 8 bits")


def check_white(image):
    """ValueError for a TIFF whose white is 0 where Pillow would not turn the values around."""
    white_is_zero = hasattr(image, "tag_v2") and image.tag_v2.get(262) == 0
    if white_is_zero and image.mode.startswith(("I", "F")):
        raise ValueError("a TIFF of deep gray whose white is 0: save it with black as 0")


def stored_shape(image) -> tuple[int, int, int]:
    """Height, width and orientation of a PIL image that is not loaded yet."""
    width, height = image.size
    if hasattr(image, "tag_v2"):  # image.size may be that of the upright image
        width = image.tag_v2[256]
        height = image.tag_v2[257]
    return height, width, find_orientation(image)


@contextlib.contextmanager
def hidden_metadata(image, orientation):
    """Let Pillow find the orientation alone where it reads all metadata of a TIFF."""
    metadata = Image.Exif()
    metadata[ORIENTATION] = orientation
    xmp = image.info.pop("xmp", None)

    def getexif():
        return metadata

    image.getexif = getexif
    try:
        yield
    finally:
        del image.getexif
        if xmp is not None:
            image.info["xmp"] = xmp


def find_orientation(image) -> int:
    """The EXIF orientation of a PIL image, 1 to 8, whatever else its metadata holds."""
    if hasattr(image, "tag_v2"):
        found = image.tag_v2.get(ORIENTATION)
    else:
        found = None
        with contextlib.suppress(*IMAGE_ERRORS):
            found = image.getexif().get(ORIENTATION)
        if found is None:  # Pillow stops at the first damaged tag
            found = parse_orientation(image.info.get("exif"))
    return found if found in TURNS else 1


def parse_orientation(block) -> int | None:
    """The orientation in an EXIF block (bytes), of which nothing else is read."""
    if not isinstance(block, bytes):
        return None
    block = re.sub(rb"^(Exif\0\0)+", b"", block)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    with contextlib.suppress(struct.error):  # it ends early
        (start,) = struct.unpack_from(f"{order}L", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHL", block, entry)
            if tag == ORIENTATION and kind in (3, 4) and values == 1:
                form = {3: "H", 4: "L"}[kind]
                return struct.unpack_from(order + form, block, entry + 8)[0]
    return None


def without_metadata(data: bytes) -> bytes:
    """A JPEG's or PNG's bytes, less what neither pixels nor orientation need."""
    kept = [data]
    with contextlib.suppress(struct.error):  # it ends early
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            kept = [data[:8], *png_chunks(data)]
        elif data.startswith(b"\xff\xd8"):
            kept = [data[:2], *jpeg_segments(data)]
    return b"".join(kept)


def png_chunks(data):
    """The chunks of a PNG that its pixels and its orientation need."""
    start = 8
    while start < len(data):
        (length,) = struct.unpack_from(">L", data, start)
        end = start + 12 + length
        if data[start + 4 : start + 8] in PNG_PIXELS:
            yield data[start:end]
        start = end


def jpeg_segments(data):
    """The same of a JPEG: not the segments of applications (APP0 …) nor comments, except EXIF."""
    start = 2
    while data[start + 1] != 0xDA:  # the pixels come last
        (length,) = struct.unpack_from(">H", data, start + 2)
        end = start + 2 + length
        marker = data[start + 1]
        is_application = 0xE0 <= marker <= 0xEF or marker == 0xFE
        is_exif = marker == 0xE1
        is_adobe = marker == 0xEE and length >= 14  # says how colors are coded
        if not is_application or is_exif or is_adobe:
            yield data[start:end]
        start = end
    yield data[start:]


# ---------------------------------------------------------------------------- resizing and drawing
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
