"""What annotation tools write → a folder of one's own, which data.py reads.

utils/coco.py and utils/labelme.py read the tools' files; here is what both need: objects, images,
sentences, splits, the search for image files, and the folder that is written.

H W height and width of the image
"""

import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote, unquote_plus

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.common import READ_ERRORS, UserError, as_user_error, check_writable
from utils.images import (
    decode_image,
    file_inside,
    image_errors,
    read_image,
    read_shape,
    uint8_mask,
)
from utils.tokenizer import is_blank

UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # Label Studio's prefix
VERSIONED = re.compile(r"(.+)[_-](\w+)\.rf\.[\w-]+\.\w+")  # Roboflow: photo_jpg.rf.<hash>.jpg
SENTENCE_KEYS = ("sentences", "caption", "description")
SPLIT_NAMES = {"valid": "val", "validation": "val"}
CORRECT = "correct it, or remove it from the file"


@dataclass
class AnnotatedObject:
    """One object: its sentences, and `draw(H, W)` → its mask, bool (H, W). `name` is for errors."""

    name: str
    sentences: list[str]
    draw: Callable


@dataclass
class AnnotatedImage:
    """One image with its objects.

    file: a path, or a file's bytes; orientation: EXIF's, 1 where image and file are the same way
    up; upright: whether the annotations belong to the image as it is seen, or as it is stored;
    is_clear: whether its size tells that; height, width: of the image that they belong to.
    """

    name: str
    file: Path | bytes
    height: int
    width: int
    orientation: int
    upright: bool
    is_clear: bool
    split: str | None
    objects: list = field(default_factory=list)


def annotated_image(name, file, stated, upright, split) -> AnnotatedImage:
    """Read the size of an image file or a file's bytes, and find which way up it was annotated.

    stated: its (H, W) according to the annotations, or None; upright: the answer where stored and
    seen image have the same size. ValueError where neither has the size stated.
    """
    with image_errors(name if isinstance(file, bytes) else file):
        height, width, orientation = read_shape(as_file(file))
    stored = (height, width)
    seen = (width, height) if orientation >= 5 else stored
    if stated not in (None, stored, seen):
        sizes = f"height and width are {stated} in the annotations, {stored} in the image"
        raise ValueError(f"{sizes} {name}: give the images that were annotated")
    is_clear = stated is not None and stored != seen
    if is_clear:
        upright = stated == seen
    height, width = seen if upright else stored
    return AnnotatedImage(
        name=name,
        file=file,
        height=height,
        width=width,
        orientation=orientation,
        upright=upright,
        is_clear=is_clear or orientation == 1,
        split=split,
    )


def check_same_way(first, image):
    """ValueError where one row or file has an image the other way up than another one."""
    if first.upright != image.upright:
        raise ValueError(f"{image.name} is annotated as it is stored and as EXIF turns it")


def as_file(file):
    """A path as it is, bytes as a file in memory."""
    return io.BytesIO(file) if isinstance(file, bytes) else file


# ------------------------------------------------------------------------------------------- fields
def read_json(path) -> dict:
    """A JSON file's content. UserError where it is no JSON object."""
    with as_user_error(path, "check the path, or save it as UTF-8 text"):
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "one value"
        raise UserError(f"{path}: it holds {kind}, no annotations: export it as COCO or LabelMe")
    return content


def rows_of(content, key) -> list[dict]:
    """The list of objects under `key`. ValueError where it is something else."""
    rows = content[key]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key!r} is no list of objects")
    return rows


def sentences_of(row) -> list[str]:
    """What a row says of its object: its sentences, or its caption, or its description.

    CVAT writes what its user added under "attributes".
    """
    attributes = row.get("attributes")
    places = [row, attributes] if isinstance(attributes, dict) else [row]
    for place in places:
        for key in SENTENCE_KEYS:
            value = place.get(key)
            values = value if isinstance(value, list) else [value]
            sentences = [parse_sentence(value) for value in values]
            if any(sentences):
                return [sentence for sentence in sentences if sentence]
    return []


def parse_sentence(value) -> str:
    """A sentence, which RefCOCO wraps as {"sent": …}; "" if it is missing or blank."""
    if isinstance(value, dict):
        value = value["sent"]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no sentence")
    value.encode()  # ValueError: half a character
    return "" if is_blank(value) else " ".join(value.split())


def split_of(row) -> str | None:
    """The split that a tool wrote, by our names."""
    split = row.get("split")
    if split is None:
        return None
    if not isinstance(split, str) or is_blank(split):
        raise ValueError(f"split is {split!r}")
    return SPLIT_NAMES.get(split, split)


def set_split(image, split):
    """Note the split of an image. ValueError where another one is noted already."""
    if split and image.split not in (None, split):
        raise ValueError(f"its image is in split {image.split}, so it cannot be in {split}")
    image.split = image.split or split


def is_number(value) -> bool:
    """Whether it is a finite number, and not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def size_of(row, height_key, width_key) -> tuple[int, int] | None:
    """(H, W) as a row states it; None where it is missing, or 0 as some tools write."""
    height = row.get(height_key)
    width = row.get(width_key)
    return (int(height), int(width)) if height and width else None


# ------------------------------------------------------------------------------------ finding files
class ImageFinder:
    """Finds the images of annotations in a folder and the folders inside.

    The names that tools write are not always those on the disk: backslashes, addresses of uploads,
    %20, prefixes, other folders, other capital letters, accents as letters of their own.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.by_name = defaultdict(list)
        self.by_original = defaultdict(list)  # by the name before a tool added to it
        for place, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if name.startswith("."):
                    continue
                self.by_name[fold(name)].append(Path(place, name))
                if original_name(name) != name:
                    self.by_original[fold(original_name(name))].append(Path(place, name))

    def find(self, name) -> Path:
        """The file that `name` means. ValueError where there is none, or there may be several."""
        plain = PureWindowsPath(name).as_posix()
        for text in (plain, unquote(plain)):
            try:
                return file_inside(self.folder, text)
            except ValueError:
                continue
        bases = [base_name(text) for text in (plain, unquote(plain), unquote_plus(plain))]
        originals = [original_name(base) for base in bases]
        searches = [(self.by_name, bases), (self.by_name, originals), (self.by_original, bases)]
        for table, keys in searches:
            for key in keys:
                if fold(key) in table:
                    return choose(table[fold(key)], plain)
        raise ValueError(f"{name} is not in {self.folder}")


def fold(name) -> str:
    """A name less what differs between systems: capitals, and how accents are written."""
    return unicodedata.normalize("NFC", name).casefold()


def base_name(text) -> str:
    """The file's name in a path or an address, such as /data/local-files/?d=folder/x.jpg."""
    address, _, query = text.partition("?")
    path = query.removeprefix("d=") if query.startswith("d=") else address
    return path.rpartition("/")[2]


def original_name(name) -> str:
    """A file's name before Label Studio or Roboflow added to it."""
    uploaded = UPLOADED.fullmatch(name)
    if uploaded:
        return uploaded[1]
    versioned = VERSIONED.fullmatch(name)
    if versioned:
        return f"{versioned[1]}.{versioned[2]}"
    return name


def is_other_version(image) -> bool:
    """Whether one of annotations and file is Roboflow's version of a photograph, the other not."""
    name = base_name(unquote(PureWindowsPath(image.name).as_posix()))
    return bool(VERSIONED.fullmatch(name)) != bool(VERSIONED.fullmatch(image.file.name))


def choose(paths, name) -> Path:
    """Of files with one name, the one whose folders fit as well. ValueError where several do."""
    wanted = [fold(part) for part in reversed(name.split("/"))]
    scores = []
    for path in paths:
        parts = [fold(part) for part in reversed(path.parts)]
        same = [a == b for a, b in zip(wanted[1:], parts[1:], strict=False)]
        scores.append(same.index(False) if False in same else len(same))
    best = [path for path, score in zip(paths, scores, strict=True) if score == max(scores)]
    if len(best) > 1:
        raise ValueError(f"{name} may be {min(best)} or {max(best)}")
    return best[0]


# ------------------------------------------------------------------------------------------- splits
def assign_splits(images, split=None, seed=0) -> list[str]:
    """The split of each image: of a name all, of a share so many in val, of None the tool's own.

    Where the tool wrote none, all train. UserError where it did so for some images only.
    """
    if isinstance(split, float):
        count = max(1, round(split * len(images)))
        if count >= len(images):
            raise UserError(f"--split {split}: of {len(images)} images none is left to train")
        val = set(np.random.default_rng(seed).permutation(len(images))[:count].tolist())
        return ["val" if i in val else "train" for i in range(len(images))]
    if split:
        return [split] * len(images)
    known = [image.split for image in images]
    missing = known.count(None)
    if 0 < missing < len(images):
        raise UserError(f"{missing} of {len(images)} images have no split: choose one by --split")
    return ["train"] * len(images) if missing else known


# ------------------------------------------------------------------------------------------ writing
def write_dataset(out, images, split=None, seed=0) -> Counter:
    """Write images, masks and refs.jsonl into the new folder `out`, whole or not at all.

    Returns the counts of what is in it, and of what was left out for having no pixel.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} is there already: remove it, or name another folder by --out")
    check_writable(out, folder=True)
    if not images:
        raise UserError(f"{out}: no object is left to write: check the annotations")
    splits = assign_splits(images, split, seed)
    parent = next(path for path in out.absolute().parents if path.is_dir())
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name[:50]}-") as place:
        work = Path(place, "folder")
        counts = write_files(work, images, splits)
        if not counts["objects"]:
            raise UserError(f"{out}: no object holds a pixel: check the annotations")
        out.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work, out)
    return counts


def write_files(folder, images, splits) -> Counter:
    """Write everything into `folder` and count it."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    counts = Counter()
    stems = set()
    bar = tqdm(images, desc="images", unit="image", file=sys.stdout)
    with open(folder / "refs.jsonl", "w", encoding="utf-8") as file:
        for image, split in zip(bar, splits, strict=True):
            stem = new_stem(image, stems)
            records = write_image(folder, image, stem)
            counts["objects"] += len(records)
            counts["sentences"] += sum(len(record["sentences"]) for record in records)
            counts["images"] += bool(records)
            counts["empty"] += len(image.objects) - len(records)
            counts["unclear"] += count_unclear(records)
            counts[f"in {split}"] += len(records)
            for record in records:
                file.write(json.dumps(record | {"split": split}, ensure_ascii=False) + "\n")
    return counts


def write_image(folder, image, stem) -> list[dict]:
    """Write an image and the masks of its objects, and return their lines of refs.jsonl."""
    if isinstance(image.file, bytes):
        with image_errors(f"the image in {image.name}"):
            pixels = decode_image(as_file(image.file), exif=image.upright)
    else:
        pixels = read_image(image.file, exif=image.upright)
    records = []
    for k, thing in enumerate(image.objects):
        with as_user_error(thing.name, CORRECT, (*READ_ERRORS, UserError)):
            mask = thing.draw(image.height, image.width)
        if not mask.any():
            continue
        mask_name = f"masks/{stem}_{k}.png"
        Image.fromarray(uint8_mask(mask)).save(folder / mask_name)
        records.append({"mask": mask_name, "sentences": thing.sentences})
    if not records:
        return []
    image_name = f"images/{stem}{suffix_of(image)}"
    if image.orientation != 1:  # without EXIF, every reader sees the same
        Image.fromarray(pixels).save(folder / image_name)
    elif isinstance(image.file, bytes):
        (folder / image_name).write_bytes(image.file)
    else:
        shutil.copyfile(image.file, folder / image_name)
    return [{"image": image_name} | record for record in records]


def suffix_of(image) -> str:
    """The ending of the image's new file."""
    if image.orientation != 1:
        return ".png"
    if isinstance(image.file, bytes):
        return ".png" if image.file.startswith(b"\x89PNG") else ".jpg"
    return image.file.suffix.lower()


def new_stem(image, taken) -> str:
    """A name for the image's files that no other has and every system takes."""
    name = image.name if isinstance(image.file, bytes) else image.file.name
    stem = unicodedata.normalize("NFC", Path(name).stem)
    stem = re.sub(r"[^\w.()+-]", "_", stem).strip(".")[:50] or "image"
    number = 1
    unique = stem
    while unique.casefold() in taken:
        number += 1
        unique = f"{stem}-{number}"
    taken.add(unique.casefold())
    return unique


def count_unclear(records) -> int:
    """How many objects of an image share a sentence with another one."""
    uses = Counter(sentence for record in records for sentence in set(record["sentences"]))
    return sum(any(uses[sentence] > 1 for sentence in record["sentences"]) for record in records)
