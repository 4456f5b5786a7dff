"""EXIF blocks, masks and annotation files at random: read right, or refused in one line.

Never a traceback, and never another mask than PIL draws for LabelMe's shapes and pycocotools for
COCO's. ETRIS_FUZZ=3000 tries so many of each; what they found stands in test_annotations.py and
tests/utils/test_images.py.
"""

import base64
import contextlib
import io
import json
import math
import os
import random
import struct

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco

import prepare
from data import open_dataset
from utils.common import UserError
from utils.images import TURNS, read_image, read_pil, to_mask

COUNT = int(os.environ.get("ETRIS_FUZZ", "150"))


def array_rng(rng):
    return np.random.default_rng(rng.randrange(2**32))


# --------------------------------------------------------------------------------------------- EXIF
STORED = np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3
TAGS = [0x0001, 0x010F, 0x0110, 0x011A, 0x0128, 0x0131, 0x0132, 0x8769, 0x8825, 0x9286, 0xC4A5]


def random_tag(rng, order):
    """A tag of EXIF's with any type, count and value: 12 bytes."""
    tag = rng.choice([*TAGS, rng.randrange(0x0113, 65536)])
    kind = rng.choice([*range(14), 16, 17, 18, 129, rng.randrange(65536)])
    count = rng.choice([0, 1, 1, 2, 4, 5, 1000, 2**31, rng.randrange(2**32)])
    value = rng.choice([rng.randbytes(4), struct.pack(f"{order}L", rng.randrange(200))])
    return struct.pack(f"{order}HHL", tag, kind, count) + value


def random_exif(rng):
    """An EXIF block of odd tags around an orientation, and that orientation (1: it has none)."""
    order = rng.choice("<>")
    entries = [random_tag(rng, order) for _ in range(rng.randrange(7))]
    orientation = rng.choice([None, 0, *range(1, 9), 9, 65535])
    if orientation is not None:
        entry = struct.pack(f"{order}HHLHH", 0x0112, 3, 1, orientation, rng.choice([0, 7]))
        entries.insert(rng.randint(0, len(entries)), entry)
    start = rng.choice([8, 8, 20])
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", start)
    block = head + bytes(start - 8) + struct.pack(f"{order}H", len(entries)) + b"".join(entries)
    block += struct.pack(f"{order}L", rng.choice([0, 8, rng.randrange(2**32)]))
    block += rng.randbytes(rng.randrange(60))
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(1, 40)), 1
    return block, orientation or 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Image.open, over damaged tags
def test_exif_of_any_kind_turns_the_pixels_or_leaves_them(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "x"
    for _ in range(COUNT):
        block, orientation = random_exif(rng)
        kind = rng.choice(["JPEG", "PNG", "WEBP"])
        exif = b"Exif\0\0" + block if kind == "JPEG" else block
        options = {"lossless": True} if kind == "WEBP" else {}
        Image.fromarray(STORED).save(path, kind, exif=exif, **options)
        with Image.open(path) as image:
            upright = image.convert("RGB")
        if orientation in TURNS:
            upright = upright.transpose(TURNS[orientation])
        np.testing.assert_array_equal(read_image(path), upright, err_msg=repr(block))
        with Image.open(path) as image:
            np.testing.assert_array_equal(read_pil(image), upright, err_msg=repr(block))


# -------------------------------------------------------------------------------------------- masks
def random_blob(rng, height, width):
    """bool (H, W) of a few rectangles; sometimes nothing or everything."""
    mask = np.zeros((height, width), bool)
    for _ in range(rng.randrange(4)):
        top = rng.randrange(height)
        left = rng.randrange(width)
        mask[top : rng.randrange(top, height) + 1, left : rng.randrange(left, width) + 1] = True
    return mask


def gray_mask(rng, mask):
    """A mask without transparency, in any mode."""
    mode = rng.choice(["1", "L", "P", "RGB", "CMYK", "I", "I;16", "F", "RGBA", "LA"])
    inside = rng.choice([1, 255])
    if mode == "1":
        return Image.fromarray(mask)
    if mode == "I":
        return Image.fromarray(mask.astype(np.int32) * rng.choice([inside, 65535]))
    if mode == "I;16":
        return Image.fromarray(mask.astype(np.uint16) * rng.choice([inside, 65535]))
    if mode == "F":
        return Image.fromarray(mask.astype(np.float32) * inside)
    image = Image.fromarray(mask.astype(np.uint8) * inside)
    if mode == "P":
        palette = image.copy().convert("P")
        palette.putpalette([0, 0, 0] + [inside] * 765)
        return palette
    return image.convert(mode)


def alpha_mask(rng, mask):
    """A mask in the alpha channel, over one color; what is transparent may have another."""
    shown = rng.choice([(255, 255, 255), (0, 0, 0), (200, 30, 30), (1, 1, 1)])
    hidden = rng.choice([(255, 255, 255), (0, 0, 0), (90, 200, 30)])
    colors = np.where(mask[..., None], np.uint8(shown), np.uint8(hidden))
    alpha = mask.astype(np.uint8) * rng.choice([1, 255])
    image = Image.fromarray(np.dstack([colors, alpha]))
    if shown == (255, 255, 255) and rng.random() < 0.3:
        return image.convert("LA")
    return image


def palette_mask(rng, mask):
    """A palette of two colors, one of them transparent by its number or by a table."""
    palette = Image.fromarray(mask.astype(np.uint8)).convert("P")
    palette.putpalette([*rng.choice([(0, 0, 0), (255, 255, 255)]), 255, 255, 255])
    palette.info["transparency"] = rng.choice([0, bytes([0, 255])])
    return palette


def both_mask(rng, mask):
    """Black and white, of which some is transparent; that is outside."""
    visible = random_blob(rng, *mask.shape)
    hidden = np.uint8([rng.randrange(256) for _ in range(3)])
    colors = np.where(visible[..., None], np.uint8(255) * mask[..., None], hidden)
    image = Image.fromarray(np.dstack([colors, 255 * visible.astype(np.uint8)]))
    shown = mask[visible]
    is_clear = visible.all() or (shown.any() and not shown.all())
    return image, mask & visible if is_clear else visible


def soft_mask(rng, mask):
    """Edges that are softened: nothing tells where they end."""
    values = array_rng(rng).integers(2, 255, mask.shape, np.uint8)
    values[0, 0] = rng.choice([2, 100, 254])
    if rng.random() < 0.5:
        return Image.fromarray(values)
    values[-1, -1] = 0 if values.size > 1 else values[-1, -1]
    white = np.full((*mask.shape, 3), 255, np.uint8)
    alpha = np.dstack([white, values])
    return Image.fromarray(alpha) if values.size > 1 else Image.fromarray(values)


def test_masks_of_every_mode_are_what_they_show(tmp_path):
    rng = random.Random(1)
    for number in range(COUNT):
        mask = random_blob(rng, rng.randrange(1, 12), rng.randrange(1, 12))
        way = rng.choice([gray_mask, alpha_mask, palette_mask, both_mask, soft_mask])
        image = way(rng, mask)
        if way is both_mask:
            image, mask = image
        if way in (alpha_mask, palette_mask) and mask.all():
            mask = read_white(image)
        in_tiff = image.mode in ("CMYK", "I", "F")
        path = tmp_path / ("x.tif" if in_tiff or rng.random() < 0.1 else "x.png")
        if path.suffix == ".tif" and image.mode == "P":
            path = tmp_path / "x.png"
        image.save(path)
        try:
            found = read_image(path, convert=to_mask)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            assert way is soft_mask or image.mode in ("LA", "RGBA"), (number, error)
            continue
        assert way is not soft_mask, number
        np.testing.assert_array_equal(found, mask, err_msg=f"{number} {way.__name__}")


def read_white(image):
    """An opaque mask is what its colors say: white is inside."""
    return np.asarray(image.convert("RGBA").convert("RGB"))[..., 0] > 0


# ----------------------------------------------------------------------------------------- anything
WORDS = ["", "x", "é", "流", "\ud83d", "\x00", "../x", "[[1, 2]]", "0", "cup", "photo_0.png"]


def junk(rng, depth=2):
    """Any JSON."""
    numbers = [0, 1, -1, 0.5, 1e9, 10**20, -1e300, float("nan"), float("inf"), rng.random() * 50]
    simple = [None, True, False, rng.choice(numbers), rng.choice(WORDS), rng.choice(numbers)]
    if depth and rng.random() < 0.4:
        if rng.random() < 0.5:
            return [junk(rng, depth - 1) for _ in range(rng.randrange(5))]
        return {rng.choice(WORDS): junk(rng, depth - 1) for _ in range(rng.randrange(3))}
    return rng.choice(simple)


def damage(rng, value):
    """Replace, remove or repeat something somewhere inside `value`."""
    place = value
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(list(keys))
        inside = place[key]
        if rng.random() < 0.5 and isinstance(inside, dict | list) and inside:
            place = inside
            continue
        how = rng.random()
        if how < 0.7:
            place[key] = junk(rng)
        elif how < 0.85 or isinstance(place, dict):
            del place[key]
        else:
            place.insert(key, inside)
        return


def run(argv):
    """Run prepare.py → its exit status, and what it said on stderr."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            prepare.main([str(word) for word in argv])
        except SystemExit as stopped:
            return stopped.code, error.getvalue()
    return 0, error.getvalue()


def check(rng_number, status, error, out, expected, is_whole):
    """The folder has the masks expected of each sentence, or there is one line and no folder."""
    if status:
        assert status == 2, rng_number
        assert len(error.splitlines()) == 1, (rng_number, error)
        assert error.startswith("error: ")
        assert not out.exists()
        assert not is_whole, (rng_number, error)
        return
    text = (out / "refs.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    samples = {}
    for split in {record["split"] for record in records}:
        dataset = open_dataset(str(out), split)
        samples[split] = iter([dataset[i] for i in range(len(dataset))])
    found = {}
    for record in records:
        sample = next(samples[record["split"]])
        for sentence in record["sentences"]:
            if sentence in expected:
                found[sentence] = sample
    for sentence, sample in found.items():
        mask = expected[sentence](*sample.image.shape[:2])
        np.testing.assert_array_equal(sample.mask, mask, err_msg=f"{rng_number} {sentence}")
    if is_whole:
        assert found, rng_number


def save_image(rng, path):
    """A photograph with any orientation → height and width as stored, orientation."""
    height = rng.randrange(8, 60)
    width = rng.randrange(8, 60)
    orientation = rng.choice([1, 1, 1, *range(2, 9)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = array_rng(rng).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return height, width, orientation


def empty_folder(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    return folder


# -------------------------------------------------------------------------------------------- COCO
def random_polygon(rng, height, width):
    count = rng.randrange(3, 8)
    whole = rng.random() < 0.3
    corners = []
    for _ in range(count):
        x = rng.uniform(-2, width + 2)
        y = rng.uniform(-2, height + 2)
        corners += [round(x), round(y)] if whole else [x, y]
    return corners


def runs_of(mask):
    column = [False, *mask.T.ravel().tolist(), None]
    turns = [i for i in range(len(column) - 1) if column[i] != column[i + 1]]
    return [b - a for a, b in zip([0, *turns], turns, strict=False)]


def random_segmentation(rng, height, width):
    """A segmentation as some tool writes it, and the function of H and W that pycocotools is."""
    polygons = [random_polygon(rng, height, width) for _ in range(rng.randrange(1, 4))]

    def draw_polygons(height, width):
        return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)

    blob = random_blob(rng, height, width)

    def draw_blob(height, width):
        return blob

    encoded = coco.encode(np.asfortranarray(blob.astype(np.uint8)))["counts"].decode()
    size = [height, width]
    ways = [
        (polygons, draw_polygons),
        ([[1, 1, 5, 5], *polygons], draw_polygons),
        (json.dumps(polygons), draw_polygons),
        ({"size": size, "counts": runs_of(blob)}, draw_blob),
        ({"size": size, "counts": encoded}, draw_blob),
        (encoded, draw_blob),
    ]
    if len(polygons) == 1:
        pairs = [list(pair) for pair in zip(polygons[0][::2], polygons[0][1::2], strict=True)]
        ways += [(polygons[0], draw_polygons), ([pairs], draw_polygons)]
    return rng.choice(ways)


def coco_name(rng, name):
    """What a tool writes for the file `name`."""
    prefix = rng.choice(["", "images/", "images\\", "upload/1/0a1b2c3d-", "../data/", "C:\\x\\"])
    return prefix + name


def random_coco(rng, folder):
    """A COCO file's content; by sentence, what pycocotools draws for the object."""
    content = {"info": {}, "licenses": [], "images": [], "annotations": []}
    content["categories"] = [{"id": 1, "name": "cup", "supercategory": ""}]
    expected = {}
    number = 0
    for image_id in range(rng.randrange(1, 4)):
        name = f"photo_{image_id}.{rng.choice(['png', 'jpg', 'tif'])}"
        height, width, orientation = save_image(rng, folder / "photos" / name)
        if orientation >= 5 and rng.random() < 0.5:  # annotated as it is shown
            height, width = width, height
        row = {"id": image_id, "file_name": coco_name(rng, name), "height": height, "width": width}
        content["images"].append(row)
        for _ in range(rng.randrange(1, 4)):
            segmentation, draw = random_segmentation(rng, height, width)
            box = [rng.uniform(0, width / 2), rng.uniform(0, height / 2), width / 3, height / 3]
            if rng.random() < 0.15:
                segmentation = rng.choice([[], None, [[1, 1, 5, 5]]])

                def draw(height, width, box=box):
                    return coco.decode(coco.frPyObjects(np.array([box]), height, width))[..., 0] > 0

            sentence = f"object {number}"
            expected[sentence] = draw
            annotation = {
                "id": number,
                "image_id": image_id,
                "category_id": 1,
                "segmentation": segmentation,
                "bbox": box,
                "area": 1.0,
                "iscrowd": int(isinstance(segmentation, dict)),
                rng.choice(["caption", "description"]): sentence,
            }
            content["annotations"].append(annotation)
            number += 1
    return content, expected


def draws_nothing(content, expected):
    """Whether no object of the file holds a pixel."""
    sizes = {row["id"]: (row["height"], row["width"]) for row in content["images"]}
    rows = content["annotations"]
    return not any(expected[f"object {row['id']}"](*sizes[row["image_id"]]).any() for row in rows)


def test_coco_files_are_read_as_pycocotools_draws_them(tmp_path):
    """Half of them are damaged somewhere. A damaged mask is another one, and is not compared."""
    for number in range(COUNT):
        rng = random.Random(number)
        folder = empty_folder(tmp_path)
        content, expected = random_coco(rng, folder)
        is_whole = not draws_nothing(content, expected)
        before = json.loads(json.dumps(content))
        options = ["--boxes", "fill", "--pixels"]
        if number % 2:
            options = rng.choice([options, ["--boxes", "skip"], ["--boxes", "fill"], []])
            for _ in range(rng.randrange(1, 4)):
                damage(rng, content)
            is_whole = False
            expected = undamaged(before, content, expected)
        path = folder / "instances.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        out = folder / "mine"
        argv = ["from-coco", path, "--images", folder / "photos", "--out", out]
        status, error = run([*argv, *options])
        check(number, status, error, out, expected, is_whole)


def undamaged(before, after, expected):
    """The objects whose row, and whose image's row, are as they were."""
    kept = {}
    rows = after.get("annotations")
    images = after.get("images")
    if not isinstance(rows, list) or not isinstance(images, list):
        return kept
    for row in before["annotations"]:
        image = next(image for image in before["images"] if image["id"] == row["image_id"])
        if rows.count(row) == 1 and images.count(image) == 1:
            sentence = f"object {row['id']}"
            kept[sentence] = expected[sentence]
    return kept


# ------------------------------------------------------------------------------------------ LabelMe
def labelme_draws(shape, height, width):
    """LabelMe's own shape_to_mask: the calls of PIL that it makes."""
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    points = [tuple(point) for point in shape["points"]]
    kind = shape.get("shape_type")
    if kind == "circle":
        (x, y), (edge_x, edge_y) = points
        d = math.sqrt((x - edge_x) ** 2 + (y - edge_y) ** 2)
        draw.ellipse([x - d, y - d, x + d, y + d], outline=1, fill=1)
    elif kind == "rectangle":
        (x0, y0), (x1, y1) = points
        draw.rectangle([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], outline=1, fill=1)
    elif kind == "mask":
        mask = np.zeros((height, width), bool)
        (x0, y0), (x1, y1) = points
        values = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"])))).astype(bool)
        mask[y0 : y1 + 1, x0 : x1 + 1] = values
        return mask
    else:
        draw.polygon(points, outline=1, fill=1)
    return np.asarray(canvas) > 0


def random_shape(rng, height, width):
    """A shape of LabelMe's that encloses an area."""
    kinds = ["polygon", "rectangle", "circle", "oriented_rectangle", "mask", None]
    kind = rng.choice(kinds)
    count = {"polygon": rng.randrange(3, 9), None: 3, "oriented_rectangle": 4}.get(kind, 2)
    points = [[rng.uniform(-1, width), rng.uniform(-1, height)] for _ in range(count)]
    if rng.random() < 0.3:
        points = [[round(x), round(y)] for x, y in points]
    shape = {"label": "cup", "points": points, "group_id": None, "flags": {}, "mask": None}
    if kind:
        shape["shape_type"] = kind
    if kind == "mask":
        left = rng.randrange(width)
        top = rng.randrange(height)
        right = rng.randrange(left, width)
        bottom = rng.randrange(top, height)
        shape["points"] = [[left, top], [right, bottom]]
        blob = random_blob(rng, bottom - top + 1, right - left + 1)
        file = io.BytesIO()
        Image.fromarray(blob.astype(np.uint8) * rng.choice([1, 255])).save(file, "PNG")
        shape["mask"] = base64.b64encode(file.getvalue()).decode()
    return shape


def random_labelme(rng, folder):
    """LabelMe's file content beside its image; by sentence, what LabelMe draws for the object."""
    image = folder / rng.choice(["notes", "photos"]) / f"photo.{rng.choice(['png', 'jpg'])}"
    height, width, orientation = save_image(rng, image)
    if orientation >= 5:
        height, width = width, height
    shapes = []
    expected = {}
    for number in range(rng.randrange(1, 4)):
        members = [random_shape(rng, height, width) for _ in range(rng.randrange(1, 4))]
        for shape in members:
            shape["label"] = f"object {number}"
            shape["group_id"] = rng.choice([None, number]) if len(members) == 1 else number
        shapes += members

        def draw(height, width, members=members):
            return np.any([labelme_draws(shape, height, width) for shape in members], axis=0)

        expected[f"object {number}"] = draw
    if rng.random() < 0.3:
        rng.shuffle(shapes)
    content = {
        "version": "5.4.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"..{rng.choice('/' + chr(92))}{image.parent.name}/{image.name}",
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }
    if rng.random() < 0.2:
        content["imageData"] = base64.b64encode(image.read_bytes()).decode()
    drawn = any(draw(height, width).any() for draw in expected.values())
    return content, expected, drawn


def test_labelmes_files_are_read_as_labelme_draws_them(tmp_path):
    """Half of them are damaged somewhere. A damaged object is another one, and is not compared."""
    for number in range(COUNT):
        rng = random.Random(number)
        folder = empty_folder(tmp_path)
        (folder / "notes").mkdir(exist_ok=True)
        content, expected, is_whole = random_labelme(rng, folder)
        before = json.loads(json.dumps(content))
        if number % 2:
            for _ in range(rng.randrange(1, 4)):
                damage(rng, content)
            is_whole = False
            expected = undamaged_shapes(before, content, expected)
        path = folder / "notes" / "photo.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        out = folder / "mine"
        status, error = run(["from-labelme", folder / "notes", "--out", out])
        check(number, status, error, out, expected, is_whole)


def undamaged_shapes(before, after, expected):
    """The objects all of whose shapes are as they were, in an image that is."""
    if any(after.get(key) != before[key] for key in ("imageHeight", "imageWidth", "imagePath")):
        return {}
    shapes = after.get("shapes")
    if not isinstance(shapes, list):
        return {}
    kept = {}
    for sentence, draw in expected.items():
        members = [shape for shape in before["shapes"] if shape["label"] == sentence]
        now = [s for s in shapes if isinstance(s, dict) and s.get("label") == sentence]
        if all(now.count(shape) == members.count(shape) for shape in members) and len(now) == len(
            members
        ):
            kept[sentence] = draw
    return kept
