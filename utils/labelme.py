"""LabelMe's JSON files → annotated images.

A mask is what LabelMe draws, with PIL's ImageDraw; shapes of one group and label are one object.

H W height and width of the image
"""

import base64
import io
import math
from collections import defaultdict
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image, ImageDraw

from utils.annotations import (
    CORRECT,
    AnnotatedImage,
    AnnotatedObject,
    ImageFinder,
    annotated_image,
    check_same_way,
    is_number,
    parse_sentence,
    read_json,
    rows_of,
    sentences_of,
    set_split,
    size_of,
    split_of,
)
from utils.common import UserError, as_user_error
from utils.images import decode_image, image_errors, to_mask, uint8_mask

POINTS = {  # shape_type: how many points it has
    "circle": (2,),
    "mask": (2,),
    "oriented_rectangle": (4,),
    "polygon": range(3, 10**6),
    "rectangle": (2,),
}
WITHOUT_AREA = ("line", "linestrip", "point", "points")


def read_labelme(folder) -> list[AnnotatedImage]:
    """A folder of LabelMe's JSON files → an AnnotatedImage for each."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give that of LabelMe's JSON files")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".json")
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise UserError(f"{folder} holds no JSON file: give the folder of LabelMe's JSON files")
    finder = ImageFinder(folder)
    images = {}
    for path in paths:
        image = read_labelme_file(path, finder)
        file = image.file.resolve() if isinstance(image.file, Path) else image.file
        first = images.setdefault(file, image)
        if first is not image:  # an image is in one split, in however many files its objects are
            with as_user_error(path, CORRECT):
                check_same_way(first, image)
                set_split(first, image.split)
            first.objects += image.objects
    return list(images.values())


def files_further_inside(folder) -> list[Path]:
    """JSON files in the folders inside, which are not read."""
    folder = Path(folder)
    paths = [path for path in folder.glob("*/**/*") if path.suffix.lower() == ".json"]
    return [path for path in paths if not path.name.startswith(".")]


def read_labelme_file(path, finder) -> AnnotatedImage:
    """One JSON file, with the image inside it or beside it."""
    content = read_json(path)
    with as_user_error(path, "correct it; a file that is not LabelMe's, move away"):
        shapes = rows_of(content, "shapes")
        file = find_image(path, content, finder)
        stated = size_of(content, "imageHeight", "imageWidth")
        image = annotated_image(path.name, file, stated, upright=True, split=split_of(content))
    groups = defaultdict(list)
    for number, shape in enumerate(shapes, start=1):
        with as_user_error(f"{path} shape {number}", CORRECT):
            check_shape(shape)
            group = shape.get("group_id")
            is_alone = group in (None, "") or group != group  # NaN is what a table lacks
            key = ("shape", number) if is_alone else ("group", group)
            groups[shape["label"], key].append(shape)
    with as_user_error(path, "save them as pixels"):
        check_units(shapes)
    for (label, _), members in groups.items():
        name = f"{path} {label!r}"
        with as_user_error(name, CORRECT):
            sentences = group_sentences(label, members)
        image.objects.append(AnnotatedObject(name, sentences, partial(draw_shapes, members)))
    return image


def find_image(path, content, finder) -> Path | bytes:
    """The image that was annotated: the copy in the JSON file, or else the file that it names."""
    if content.get("imageData"):
        return base64.b64decode(content["imageData"])
    name = content["imagePath"]
    beside = path.parent / PureWindowsPath(name).as_posix()  # may lead out: ../images/x.jpg
    return beside if beside.is_file() else finder.find(name)


def group_sentences(label, shapes) -> list[str]:
    """The descriptions of an object's shapes, or else their label."""
    sentences = [sentence for shape in shapes for sentence in sentences_of(shape)]
    sentences = list(dict.fromkeys(sentences)) or [parse_sentence(label)]
    if sentences == [""]:
        raise ValueError("it has neither a label nor a description")
    return sentences


# ------------------------------------------------------------------------------------------- shapes
def shape_type(shape) -> str:
    """LabelMe's shape_type, which old files do not have."""
    return shape.get("shape_type") or "polygon"


def check_shape(shape):
    """ValueError for a shape that has no area, or whose points do not fit its type."""
    kind = shape_type(shape)
    points = shape["points"]
    if kind in WITHOUT_AREA:
        raise ValueError(f"a {kind} has no area, so it is no mask")
    if kind not in POINTS:
        raise ValueError(f"shape_type {kind!r} is not one of {', '.join(POINTS)}")
    if not isinstance(shape["label"], str):
        raise ValueError(f"label {shape['label']!r} is no text")
    for x, y in points:
        if not is_number(x) or not is_number(y):
            raise ValueError(f"point {x}, {y} is no pair of numbers")
    if len(points) not in POINTS[kind] and not (kind == "rectangle" and is_upright_box(points)):
        raise ValueError(f"a {kind} of {len(points)} points")


def check_units(shapes):
    """ValueError where all points look like shares of the image. A mask has a size of its own."""
    drawn = [shape["points"] for shape in shapes if shape_type(shape) != "mask"]
    numbers = [number for points in drawn for point in points for number in point]
    is_whole = all(number == int(number) for number in numbers)
    if numbers and not is_whole and min(numbers) >= 0 and max(numbers) <= 1:
        raise ValueError(f"points up to {max(numbers):g} look like shares of the image")


def is_upright_box(points) -> bool:
    """Whether these are four corners of an upright rectangle, as X-AnyLabeling writes it."""
    xs = {x for x, y in points}
    ys = {y for x, y in points}
    corners = {(x, y) for x, y in points}
    return len(points) == len(corners) == 4 and len(xs) == len(ys) == 2


def draw_shapes(shapes, height, width) -> np.ndarray:
    """The union of shapes → bool (H, W)."""
    mask = np.zeros((height, width), bool)
    for shape in shapes:
        mask |= draw_shape(shape, height, width)
    return mask


def draw_shape(shape, height, width) -> np.ndarray:
    """One shape → bool (H, W), by the calls of PIL that LabelMe makes."""
    kind = shape_type(shape)
    points = [(x, y) for x, y in shape["points"]]
    xs = [x for x, y in points]
    ys = [y for x, y in points]
    limit = 2 * max(height, width)
    if max(xs + ys) > limit or min(xs + ys) < -limit:
        raise ValueError("a point lies far outside the image")
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    if kind == "mask":
        paste_mask(canvas, shape)
    elif kind == "rectangle":
        draw.rectangle((min(xs), min(ys), max(xs), max(ys)), fill=1, outline=1)
    elif kind == "circle":
        radius = math.dist(*points)
        x, y = points[0]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1, outline=1)
    else:
        draw.polygon(points, fill=1, outline=1)
    return np.asarray(canvas) > 0


def paste_mask(canvas, shape):
    """Draw a mask, which LabelMe keeps as a PNG of the rectangle between its two points."""
    with image_errors(f"the mask of {shape['label']!r}"):
        file = io.BytesIO(base64.b64decode(shape["mask"]))
        mask = decode_image(file, exif=False, convert=to_mask)
    corners = np.array(shape["points"])
    (left, top), (right, bottom) = corners.round().astype(int).tolist()
    size = (bottom - top + 1, right - left + 1)
    is_whole = (corners == corners.round()).all()
    difference = max(abs(size[0] - mask.shape[0]), abs(size[1] - mask.shape[1]))
    if difference > (0 if is_whole else 1):  # a mask that was moved keeps its size
        raise ValueError(f"its mask has height and width {mask.shape}, its points say {size}")
    canvas.paste(Image.fromarray(uint8_mask(mask)), (left, top))
