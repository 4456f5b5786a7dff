"""COCO's JSON, as CVAT, Label Studio and Roboflow export it → annotated images.

A mask is what pycocotools draws. What would need a guess is a UserError, or asks for an option.

H W height and width of the image
"""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from utils.annotations import (
    CORRECT,
    SENTENCE_KEYS,
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
from utils.images import decode_segmentation

RUN_LENGTHS = re.compile("[0-o]+")  # COCO's text for them: 64 characters, [ among them
BOX_ONLY = "a box and no mask"
NEITHER = "neither mask nor box"


def read_coco(path, folder, boxes=None, upright=False, pixels=False) -> tuple[list, Counter]:
    """COCO's JSON and its images' folder → [AnnotatedImage], and counts of objects without a mask.

    boxes: what to do with a box that has no mask, "skip" or "fill"; upright: whether masks belong
    to images as EXIF turns them, where their size does not tell; pixels: coordinates are pixels,
    though they look like percent.
    """
    path = Path(path)
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder: give that of the images by --images")
    rows, image_rows, categories = read_tables(path)
    images = find_images(path, folder, image_rows, upright)
    without_mask = Counter()
    drawn = []  # (what is drawn, H, W)
    for number, row in enumerate(rows, start=1):
        name = f"{path.name} annotation {row.get('id', f'number {number}')}"
        image = images[row["image_id"]]
        with as_user_error(name, CORRECT):
            shape = clean_segmentation(row.get("segmentation"))
            draw = draw_segmentation
            if shape is None:
                has_box = bool(row.get("bbox"))
                without_mask[BOX_ONLY if has_box else NEITHER] += 1
                if boxes != "fill" or not has_box:
                    continue
                shape = parse_box(row)
                draw = draw_box
            drawn.append((shape, image.height, image.width))
            sentences = find_sentences(row, categories)
            image.objects.append(AnnotatedObject(name, sentences, partial(draw, shape)))
            set_split(image, split_of(row))
    if without_mask and boxes is None:
        what = " and ".join(f"{count} with {lack}" for lack, count in without_mask.items())
        choice = "--boxes skip leaves them out, --boxes fill takes boxes as masks"
        raise UserError(f"{path}: of {len(rows)} annotations {what}: {choice}")
    if not pixels:
        check_units(path, drawn)
    check_boxes(path, drawn)
    different = {id(image): image for image in images.values() if image.objects}
    return list(different.values()), without_mask


def read_tables(path) -> tuple[list, dict, dict]:
    """Annotations, and by their ids the rows of their images and the names of categories."""
    content = read_json(path)
    with as_user_error(path, "export it as COCO instances"):
        rows = rows_of(content, "annotations")
        images = rows_of(content, "images")
        by_id = {row["id"]: row for row in images}
        if len(by_id) < len(images):
            raise ValueError("two images have the same id")
        categories = rows_of(content, "categories") if "categories" in content else []
        names = {}
        for row in categories:
            if names.setdefault(row["id"], row["name"]) != row["name"]:
                both = f"{names[row['id']]} and {row['name']}"
                raise ValueError(f"categories {both} have the same id")
        wanted = dict.fromkeys(row["image_id"] for row in rows)
        unknown = [repr(number) for number in wanted if number not in by_id]
        if unknown:
            raise ValueError(f"there are annotations of an image {unknown[0]}, but no such image")
        return rows, {number: by_id[number] for number in wanted}, names


# ------------------------------------------------------------------------------------------- images
def find_images(path, folder, rows, upright) -> dict:
    """{id: AnnotatedImage} for {id: row}. Rows with the same file name are the same image."""
    finder = ImageFinder(folder)
    found = {}
    by_file = {}
    missing = []
    for number, row in rows.items():
        with as_user_error(f"{path.name} image {number}", CORRECT):
            try:
                file = finder.find(row["file_name"])
            except ValueError as error:
                missing.append(str(error))
                continue
            image = parse_image(row, file, upright)
            first = by_file.setdefault(file, image)
            if first.name != image.name:
                raise ValueError(f"{first.name} and {image.name} are the same file, {file}")
            check_same_way(first, image)
            set_split(first, split_of(row))
            found[number] = first
    if missing:
        more = f", and {len(missing) - 1} more images" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}{more}: check --images")
    return found


def parse_image(row, file, upright) -> AnnotatedImage:
    """A row of images and its file → AnnotatedImage."""
    stated = size_of(row, "height", "width")
    return annotated_image(row["file_name"], file, stated, upright, split=None)


# ------------------------------------------------------------------------------------------ objects
def find_sentences(row, categories) -> list[str]:
    """An annotation's sentences, or else its category's name."""
    sentences = sentences_of(row)
    if sentences:
        return sentences
    name = parse_sentence(categories.get(row.get("category_id")))
    if not name:
        keys = ", ".join(SENTENCE_KEYS)
        raise ValueError(f"it has no sentence: none of {keys}, and no category with a name")
    return [name]


def clean_segmentation(value) -> list | dict | str | None:
    """A segmentation as tools write it → polygons, run lengths, their text, or None if empty."""
    if isinstance(value, str):
        if not value.strip("[] "):
            return None
        if RUN_LENGTHS.fullmatch(value):
            return value
        value = json.loads(value)
    if value is None or value in ([], {}):
        return None
    if isinstance(value, dict):
        return value if value["counts"] else None
    if not isinstance(value, list):
        raise ValueError(f"segmentation is {value!r}")
    if not isinstance(value[0], list):  # one polygon, not in a list
        value = [value]
    polygons = [flatten(polygon) for polygon in value]
    if len(polygons) > 2 and all(len(polygon) == 2 for polygon in polygons):
        raise ValueError("segmentation is a list of points, not of polygons")
    # fewer than three corners hold no pixel, and pycocotools would take four numbers as a box
    return [polygon for polygon in polygons if len(polygon) > 4] or None


def flatten(polygon) -> list:
    """[x, y, x, y, …] as it is; [[x, y], …], as some tools write, likewise."""
    if all(isinstance(point, list) and len(point) == 2 for point in polygon):
        polygon = [number for point in polygon for number in point]
    if len(polygon) % 2 or not all(is_number(number) for number in polygon):
        raise ValueError("a polygon is no list of pairs of numbers")
    return polygon


def parse_box(row) -> list:
    """An annotation's box, [left, top, width, height]."""
    box = row["bbox"]
    is_box = isinstance(box, list) and len(box) == 4 and all(is_number(number) for number in box)
    if not is_box or min(box[2:]) <= 0:
        raise ValueError(f"bbox is {box!r}")
    attributes = row.get("attributes")
    if isinstance(attributes, dict) and attributes.get("rotation"):
        raise ValueError("its box is rotated, and only an upright one can be filled")
    return box


def draw_segmentation(segmentation, height, width) -> np.ndarray:
    """A cleaned segmentation → bool (H, W)."""
    if isinstance(segmentation, str):
        segmentation = {"size": [height, width], "counts": segmentation}
    return decode_segmentation(segmentation, height, width)


def draw_box(box, height, width) -> np.ndarray:
    """COCO's box → bool (H, W)."""
    if max(abs(number) for number in box) > 2 * max(height, width):
        raise ValueError("the box lies far outside the image")
    [rle] = coco.frPyObjects(np.array([box], dtype=float), height, width)
    return coco.decode(rle).astype(bool)


# -------------------------------------------------------------------------------------------- units
def check_units(path, drawn):
    """UserError where coordinates look like percent of the image, or like shares of it.

    drawn: (polygons or box, H, W) for each object. Percent are from 0 to 100, and some of them lie
    outside a small image; in large images, all objects would lie in the same corner: so small a
    part of the images that chance puts them there in fewer than one of ten files.
    """
    corners = []  # (x, y, H, W)
    chance = 1.0
    for shape, height, width in drawn:
        found = corners_of(shape)
        corners += [(x, y, height, width) for x, y in found]
        if found:
            chance *= min(1, 100 / height) * min(1, 100 / width)
    if not corners:
        return
    largest = max(max(x, y) for x, y, _, _ in corners)
    smallest = min(min(x, y) for x, y, _, _ in corners)
    outside = any(x > width + 2 or y > height + 2 for x, y, height, width in corners)
    is_share = largest <= 1
    is_percent = largest <= 100 and (outside or chance < 0.1)
    if smallest >= 0 and (is_share or is_percent):
        unit = "shares of the image" if is_share else "percent of the image"
        remedy = "export pixels; if they are pixels, say so by --pixels"
        raise UserError(f"{path}: coordinates up to {largest:g} look like {unit}: {remedy}")


def check_boxes(path, drawn):
    """UserError where boxes look like [left, top, right, bottom]: only so all lie in their images.

    drawn: as in check_units.
    """
    boxes = [(*x, H, W) for x, H, W in drawn if isinstance(x, list) and not isinstance(x[0], list)]
    leaves = any(x + w > W + 2 or y + h > H + 2 for x, y, w, h, H, W in boxes)
    if leaves and all(x < right <= W and y < bottom <= H for x, y, right, bottom, H, W in boxes):
        remedy = "export COCO's boxes, [left, top, width, height]"
        raise UserError(f"{path}: boxes look like [left, top, right, bottom]: {remedy}")


def corners_of(shape) -> list[tuple]:
    """All (x, y) of polygons or of a box; none of run lengths."""
    if not isinstance(shape, list):
        return []
    if not isinstance(shape[0], list):
        left, top, width, height = shape
        return [(left, top), (left + width, top + height)]
    return [corner for polygon in shape for corner in zip(polygon[::2], polygon[1::2], strict=True)]
