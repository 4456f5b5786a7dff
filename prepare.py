"""Download RefCOCO, RefCOCO+, RefCOCOg or gRefCOCO and its COCO images; or convert annotations.

    python prepare.py refcoco --data DIR                 some 20,000 single images (about 3 GB)
    python prepare.py refcoco --data DIR --all-images    the whole train2014.zip (13 GB, kept)
    python prepare.py grefcoco --data DIR                its images; annotations come by browser
    python prepare.py from-coco FILE.json --images DIR --out FOLDER
    python prepare.py from-labelme DIR --out FOLDER

Stop a download at any time, by Ctrl-C or a power cut: the same command continues where it was,
because a file gets its own name only when it is whole. Everything is checked: splits must have the
published sizes, and images must decode at the size that the annotations state.

from-coco and from-labelme write a folder of one's own, whole or not at all (docs/own_data.md).
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import REFCOCO_FILES, read_refer
from utils.annotations import is_other_version, write_dataset
from utils.coco import BOX_ONLY, read_coco
from utils.common import SEED, Parser, UserError, as_user_error, command, integer, write_file
from utils.download import NETWORK_ERRORS, download, request, retry, sha256, size_of
from utils.labelme import files_further_inside, read_labelme

ANNOTATIONS_URL = (
    "https://web.archive.org/web/{day}/https://bvisionweb1.cs.unc.edu/licheng/referit/data"
)
ARCHIVED = {  # the day of the Wayback Machine's copy
    "refcoco": "20220413011718",
    "refcoco+": "20220413011656",
    "refcocog": "20220413012904",
}
BY_BROWSER = {"grefcoco": "https://github.com/henghuiding/gRefCOCO"}  # a drive without archives
IMAGES_URL = "http://images.cocodataset.org"
IMAGE_NAME = re.compile(r"COCO_train2014_\d{12}\.jpg")
PUBLISHED = {  # dataset: split: refs, sentences, images; of gRefCOCO's splits nothing is
    "refcoco": {
        "train": (42404, 120624, 16994),
        "val": (3811, 10834, 1500),
        "testA": (1975, 5657, 750),
        "testB": (1810, 5095, 750),
    },
    "refcoco+": {
        "train": (42278, 120191, 16992),
        "val": (3805, 10758, 1500),
        "testA": (1975, 5726, 750),
        "testB": (1798, 4889, 750),
    },
    "refcocog-umd": {
        "train": (42226, 80512, 21899),
        "val": (2573, 4896, 1300),
        "test": (5023, 9602, 2600),
    },
    "refcocog-google": {
        "train": (44822, 85474, 24698),
        "val": (5000, 9536, 4650),
    },
}
IMAGES_IN_ALL = {"grefcoco": 19_994}
TRAIN2014_IMAGES = 82_783
BYTES_PER_IMAGE = 165_000  # on average
ANNOTATION_BYTES = 500_000_000  # a generous guess
MAX_FILE_BYTES = 2**30  # the most that one image or one member of an archive may hold
MAX_CONSECUTIVE_FAILURES = 20  # images failing one after the other: the server is away


# ------------------------------------------------------------------------------------- annotations
def unpack(path: Path, pattern: str, folder: Path):
    """Write the members of the zip `path` whose full name fits `pattern` flat into `folder`.

    Files that are there already stay. Only contents are written: no member's path or link leads
    out of `folder`. UserError where the zip is damaged.
    """
    # RuntimeError: a password or an unknown compression method
    errors = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        as_user_error(f"{path} is damaged", "remove it and run this again", errors),
        zipfile.ZipFile(path) as archive,
    ):
        members = [x for x in archive.infolist() if re.fullmatch(pattern, x.filename)]
        bar = tqdm(members, desc=f"unpacking {path.name}", unit="file", file=sys.stdout)
        for member in bar:
            if member.file_size > MAX_FILE_BYTES:
                size = f"{member.file_size:,} bytes"
                raise zipfile.BadZipFile(f"{member.filename} would be {size}")
            target = folder / member.filename.rpartition("/")[2]
            if size_of(target) == member.file_size:
                continue
            tmp_path = Path(f"{target}.part")
            with archive.open(member) as content, open(tmp_path, "wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
            os.replace(tmp_path, target)


def check_sizes(name: str, refs: list):
    """Print refs, sentences and images of every split; UserError where they are not as published.

    The published sentence counts of RefCOCO+ and RefCOCOg are from memory: another number is told.
    """
    splits = {ref.split for ref in refs} | PUBLISHED.get(name, {}).keys()
    for split in sorted(splits):
        group = [ref for ref in refs if ref.split == split]
        sentences = sum(len(ref.sentences) for ref in group)
        images = len({ref.image_id for ref in group})
        found = (len(group), sentences, images)
        print(f"{name} {split}: {len(group):,} refs, {sentences:,} sentences, {images:,} images")
        if name not in PUBLISHED:
            print_targets(name, split, group)
            continue
        published = PUBLISHED[name].get(split, (0, 0, 0))
        same_objects = (found[0], found[2]) == (published[0], published[2])
        if not same_objects or (name == "refcoco" and found != published):
            sizes = f"{found} refs, sentences, images, published are {published}"
            raise UserError(f"split {split} of {name} has {sizes}")
        if found != published:
            expected = f"{published[1]:,} sentences were expected in {split}"
            print(f"note: {expected}; refs and images are as published")


def print_targets(name: str, split: str, refs: list):
    """Print how many sentences of a split name several objects, and how many none."""
    several = 0
    none = 0
    for ref in refs:
        objects = len(ref.mask[0])
        several += len(ref.sentences) if objects > 1 else 0
        none += len(ref.sentences) if objects == 0 else 0
    print(f"{name} {split}: {several:,} sentences name several objects, {none:,} none")


def read_annotations(name: str, root: Path, origin) -> dict:
    """Check a dataset's files → {image name: (width, height)}. A UserError blames `origin`."""
    try:
        refs = read_refer(name, root)
        check_sizes(name, refs)
        sizes = {}
        for ref in refs:
            segmentations, height, width = ref.mask
            sizes[ref.image.name] = (width, height)
            if not IMAGE_NAME.fullmatch(ref.image.name):
                raise UserError(f"{ref.image.name!r} is no image of train2014")
        return sizes
    except UserError as error:
        remedy = "name a better copy by --annotations-url"
        raise UserError(f"{origin} is no good, {remedy}: {error}") from error


def prepare_annotations(name: str, root: Path, url: str | None) -> dict:
    """Have a dataset's files in its folder, downloaded if need be → {image name: (width, height)}.

    What fails the checks never gets there. url: of the archive, None where there is none.
    """
    refs_file = root / REFCOCO_FILES[name]
    folder = refs_file.parent
    if refs_file.exists() and (folder / "instances.json").exists():
        return read_annotations(name, root, origin=f"{folder} (remove it)")

    if url is None:
        files = f"{refs_file.name} and instances.json"
        todo = f"get them by browser from {BY_BROWSER[name]} and put them into {folder}"
        raise UserError(f"{name}: {files} are nowhere to be downloaded by a program: {todo}")
    archive = root / f"{folder.name}.zip"
    unpacked = root / "unpacking"
    if not archive.exists():
        download(url, archive)
    print(f"{archive.name}: SHA-256 {sha256(archive)} (none is published)")
    try:
        pattern = re.escape(folder.name) + r"/(refs\(\w+\)\.p|grefs\(\w+\)\.json|instances\.json)"
        unpack(archive, pattern, unpacked / folder.name)
        sizes = read_annotations(name, unpacked, origin=url)
        folder.mkdir(exist_ok=True)
        for file in (unpacked / folder.name).iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
        archive.unlink()
    return sizes


# ------------------------------------------------------------------------------------------ images
def check_image(file, size: tuple[int, int]):
    """Decode a whole JPEG; OSError where it is broken or has not the (width, height) stated."""
    try:
        with Image.open(file, formats=["JPEG"]) as image:
            if image.size != size:
                raise ValueError(f"{image.size} pixels instead of {size}")
            image.load()
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"not the image expected: {error}") from error


def fetch_image(url: str, path: Path, size: tuple[int, int], stop: threading.Event) -> str | None:
    """Have one whole image at `path`. Returns why it could not be had, or None.

    stop: once it is set, no further attempt is made.
    """
    tmp_path = path.with_name(f"{path.name}.part")

    def attempt():
        with request(url) as answer:
            tmp_path.write_bytes(answer.read(MAX_FILE_BYTES))
        check_image(tmp_path, size)
        os.replace(tmp_path, path)

    with contextlib.suppress(OSError):  # there is no image, or a broken one
        check_image(path, size)
        return None
    path.unlink(missing_ok=True)
    try:
        retry(attempt, wait=stop.wait)
    except NETWORK_ERRORS as error:
        tmp_path.unlink(missing_ok=True)
        return str(error) or repr(error)
    return None


def fetch_images(sizes: dict, folder: Path, url: str, workers: int) -> dict[str, str]:
    """Have all images {name: (width, height)} in `folder`, `workers` at a time.

    Returns those that could not be had, {name: why}. UserError where too many fail in a row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    missing = {}
    failures_in_a_row = 0
    pool = ThreadPoolExecutor(workers)
    try:
        names = {}
        for name in sorted(sizes):
            job = pool.submit(fetch_image, f"{url}/{name}", folder / name, sizes[name], stop)
            names[job] = name
        bar = {"desc": "images", "total": len(names), "unit": "image", "file": sys.stdout}
        for job in tqdm(as_completed(names), **bar):
            reason = job.result()
            if reason is None:
                failures_in_a_row = 0
                continue
            missing[names[job]] = reason
            failures_in_a_row += 1
            if failures_in_a_row == min(MAX_CONSECUTIVE_FAILURES, len(names)):
                failed = f"{failures_in_a_row} images in a row failed ({reason})"
                raise UserError(f"{url}: {failed}: try again later, or use --images-url")
    finally:  # after the last image, an error or Ctrl-C: do not wait for the rest
        stop.set()
        pool.shutdown(cancel_futures=True)
    return missing


# ---------------------------------------------------------------------------------------- commands
def check_space(name: str, root: Path, all_images: bool):
    """Print how much disk the run may still take; UserError where there is less."""
    images = TRAIN2014_IMAGES
    if not all_images:
        rows = PUBLISHED.get(name, {}).values()
        images = IMAGES_IN_ALL.get(name) or sum(images for refs, sentences, images in rows)
    images_there = len(list(root.glob("images/train2014/*.jpg")))
    need = ANNOTATION_BYTES + max(0, images - images_there) * BYTES_PER_IMAGE
    if all_images and not (root / "train2014.zip").exists():
        zip_bytes = TRAIN2014_IMAGES * BYTES_PER_IMAGE
        need += max(0, zip_bytes - size_of(root / "train2014.zip.part"))
    free = shutil.disk_usage(root).free
    message = f"{root} has {free / 1e9:.1f} GB free, and {name} may take {need / 1e9:.1f} GB more"
    print(message)
    if need > free:
        raise UserError(f"{message}: make room, or name another folder by --data")


def download_dataset(args):
    """Have everything the dataset needs in args.data, and print what is missing."""
    root = args.data
    root.mkdir(parents=True, exist_ok=True)
    check_space(args.action, root, args.all_images)

    folder = Path(REFCOCO_FILES[args.action]).parent.name
    annotations_url = args.annotations_url
    if annotations_url is None and folder in ARCHIVED:
        annotations_url = ANNOTATIONS_URL.format(day=ARCHIVED[folder])
    archive_url = annotations_url and f"{annotations_url.rstrip('/')}/{folder}.zip"
    sizes = prepare_annotations(args.action, root, archive_url)

    images_url = args.images_url.rstrip("/")
    image_folder = root / "images" / "train2014"
    if args.all_images:
        archive = root / "train2014.zip"
        if not archive.exists():
            download(f"{images_url}/zips/train2014.zip", archive)
        unpack(archive, "train2014/" + IMAGE_NAME.pattern, image_folder)
    missing = fetch_images(sizes, image_folder, f"{images_url}/train2014", args.workers)

    lines = [f"{name}\t{reason}\n" for name, reason in sorted(missing.items())]
    write_file(root / "missing.txt", "".join(lines).encode("utf-8"))
    whole = len(sizes) - len(missing)
    print(f"{whole:,} images are whole, {len(missing):,} missing ({root / 'missing.txt'})")
    print(f"next: python train.py --backbone RN101 --dataset {args.action} --data {root}")


def from_coco(args):
    """Convert COCO's JSON into a folder of one's own."""
    upright = args.exif == "shown"
    options = {"boxes": args.boxes, "upright": upright, "pixels": args.pixels}
    images, without_mask = read_coco(args.annotations, args.images, **options)
    notes = []
    for lack, count in without_mask.items():
        filled = args.boxes == "fill" and lack == BOX_ONLY
        done = "the boxes are taken as masks" if filled else "left out"
        notes.append(f"{count:,} annotations with {lack}: {done}")
    unclear = sum(not image.is_clear for image in images)
    if unclear:
        way = "as it is shown" if upright else "as it is stored"
        other = "stored" if upright else "shown"
        told = f"{unclear} images are turned by EXIF, and their size does not tell which way up"
        notes.append(f"{told} they were annotated: taken {way} (--exif {other} for the other)")
    versions = sum(is_other_version(image) for image in images)
    if versions:
        told = f"{versions} images are Roboflow's versions in the annotations or in the folder only"
        notes.append(f"{told}: a version may be flipped or cut, so look whether the masks fit")
    convert(args, images, notes)


def from_labelme(args):
    """Convert a folder of LabelMe's JSON files into a folder of one's own."""
    images = read_labelme(args.annotations)
    annotated = [image for image in images if image.objects]
    empty = len(images) - len(annotated)
    notes = [f"{empty:,} images without objects: left out"] if empty else []
    inside = files_further_inside(args.annotations)
    if inside:
        files = f"{len(inside):,} JSON files in folders inside ({inside[0]} first)"
        notes.append(f"{files}: not read")
    convert(args, annotated, notes)


def convert(args, images, notes):
    """Write the folder; print what is in it, what is not, and the next command."""
    counts = write_dataset(args.out, images, args.split, args.seed)
    in_splits = {key.removeprefix("in "): n for key, n in counts.items() if key.startswith("in ")}
    splits = ", ".join(f"{split} {count:,}" for split, count in in_splits.items() if count)
    content = f"{counts['objects']:,} objects, {counts['sentences']:,} sentences"
    print(f"{args.out}: {content}, {counts['images']:,} images; {splits}")
    if counts["empty"]:
        notes.append(f"{counts['empty']:,} objects that hold no pixel: left out")
    if counts["unclear"]:
        shared = f"{counts['unclear']:,} objects share a sentence with another of their image"
        notes.append(f"{shared}: rewrite those sentences in {args.out / 'refs.jsonl'}")
    for note in notes:
        print(f"note: {note}")
    shown = "train" if in_splits.get("train") else next(split for split in in_splits)
    option = "" if shown == "train" else f" --split {shown}"
    print(f"next: python data.py show {args.out}{option}")


def split_option(text) -> str | float:
    """An argparse type: a split's name, or the share of the images that become val."""
    if text in ("train", "val", "test"):
        return text
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        message = f"{text} is neither train, val or test nor a share between 0 and 1"
        raise argparse.ArgumentTypeError(message)
    return share


def add_download_options(parser):
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="the folder for everything"
    )
    parser.add_argument(
        "--all-images", action="store_true", help="fetch the whole train2014.zip, 13 GB twice"
    )
    parser.add_argument(
        "--workers", type=integer(1, 64), default=8, metavar="N", help="images at a time (8)"
    )
    parser.add_argument(
        "--images-url",
        default=IMAGES_URL,
        metavar="URL",
        help="has train2014/*.jpg and zips/train2014.zip",
    )
    parser.add_argument(
        "--annotations-url",
        metavar="URL",
        help="has refcoco.zip, refcoco+.zip, refcocog.zip, grefcoco.zip",
    )


def add_folder_options(parser):
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the new folder that is written"
    )
    parser.add_argument(
        "--split",
        type=split_option,
        metavar="SPLIT",
        help="train, val or test for all images, or the share of them that becomes val, such as "
        "0.1 (the tool's own splits, or else train)",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the choice of images for val (0)")


def arguments(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", help="what to do"
    )
    for name in REFCOCO_FILES:
        download_parser = actions.add_parser(name, help=f"download {name}")
        add_download_options(download_parser)

    coco = actions.add_parser("from-coco", help="convert COCO's JSON: CVAT, Label Studio, Roboflow")
    coco.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="the JSON file")
    coco.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="the folder of its images"
    )
    coco.add_argument(
        "--boxes",
        choices=["skip", "fill"],
        help="leave out annotations that have a box and no mask, or take their boxes as masks",
    )
    coco.add_argument(
        "--exif",
        choices=["stored", "shown"],
        default="stored",
        help="whether masks belong to images as they are stored or as EXIF turns them, where their "
        "size does not tell (stored)",
    )
    coco.add_argument(
        "--pixels", action="store_true", help="take coordinates that look like percent as pixels"
    )
    add_folder_options(coco)

    labelme = actions.add_parser("from-labelme", help="convert a folder of LabelMe's JSON files")
    labelme.add_argument("annotations", type=Path, metavar="DIR", help="their folder")
    add_folder_options(labelme)
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = arguments(argv)
    if args.action == "from-coco":
        from_coco(args)
    elif args.action == "from-labelme":
        from_labelme(args)
    else:
        try:
            with as_user_error(args.data, "name a folder that can be written by --data", OSError):
                download_dataset(args)
        except KeyboardInterrupt as error:
            raise UserError("stopped; the same command continues where it was") from error


if __name__ == "__main__":
    main()
