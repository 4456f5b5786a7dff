"""8. All that comes over the network: RefCOCO, RefCOCO+, RefCOCOg with the COCO pictures they use; CLIP's and DINOv2's
weights.

    python prepare.py refcoco --data DIR                 some 20,000 pictures, fetched one by one (about 3 GB)
    python prepare.py refcoco --data DIR --all-images    the whole train2014.zip (13 GB), kept beside what it holds

Stop it whenever you like, by Ctrl-C or by a power cut: a file gets its own name only when it is whole, and the same
command continues where it was. Nothing is believed: splits must have the published sizes, pictures must decode at the
size stated for them, OpenAI's weights must have the published hash; see unpack() and data.py for zips and pickles.
"""

import argparse
import contextlib
import hashlib
import http.client
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from clip_model import SIZES, build_clip
from command import Parser, UserError, command, integer
from data import REFER, blame, read_refer
from detris import SIZES as DINO_SIZES
from detris import build_dino
from official import read_weights

WAYBACK = {"refcoco": "20220413011718", "refcoco+": "20220413011656", "refcocog": "20220413012904"}  # the day it kept
ANNOTATIONS = "https://web.archive.org/web/{day}/https://bvisionweb1.cs.unc.edu/licheng/referit/data"
IMAGES = "http://images.cocodataset.org"
# fmt: off
PUBLISHED = {  # set -> split -> refs, sentences, images
    "refcoco": {"train": (42404, 120624, 16994), "val": (3811, 10834, 1500),
                "testA": (1975, 5657, 750), "testB": (1810, 5095, 750)},
    "refcoco+": {"train": (42278, 120191, 16992), "val": (3805, 10758, 1500),
                 "testA": (1975, 5726, 750), "testB": (1798, 4889, 750)},
    "refcocog-umd": {"train": (42226, 80512, 21899), "val": (2573, 4896, 1300), "test": (5023, 9602, 2600)},
    "refcocog-google": {"train": (44822, 85474, 24698), "val": (5000, 9536, 4650)},
}
OPENAI = "https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt"
MIRROR = "https://huggingface.co/timm/{mirror}.openai/resolve/main/open_clip_pytorch_model.bin"
CLIP_FILES = {  # name -> SHA-256 of OpenAI's file, name on the mirror
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "resnet50_clip"),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "resnet101_clip"),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "resnet50x4_clip"),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "resnet50x16_clip"),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "resnet50x64_clip"),
    "ViT-B-32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "vit_base_patch32_clip_224"),
    "ViT-B-16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "vit_base_patch16_clip_224"),
    "ViT-L-14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "vit_large_patch14_clip_224"),
    "ViT-L-14-336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "vit_large_patch14_clip_336")
}
# fmt: on
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{kind}/dinov2_{kind}_reg4_pretrain.pth"
DINO_FILES = {"dinov2-base": "vitb14", "dinov2-large": "vitl14"}
PICTURE = re.compile(r"COCO_train2014_\d{12}\.jpg")
TRAIN2014, PICTURE_BYTES = 82783, 165_000  # pictures in train2014, and what one takes on average
ANNOTATION_BYTES, MOST_BYTES = 500_000_000, 2**30  # a generous guess, and the most that one file may hold
TIMEOUT, WAITS = 20, (1, 2, 4)  # seconds: of silence before giving up, and from one attempt to the next
IN_A_ROW = 20  # so many pictures failing one after the other: the server is away, not the pictures
NETWORK = (OSError, http.client.HTTPException)  # what a connection fails with: time-outs and HTTP errors are OSErrors


def request(url, start=0):
    """Open `url` from byte `start` on; the answer is a context manager."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no address: it begins with http:// or https://")
    headers = {"User-Agent": "etris-prepare"} | ({"Range": f"bytes={start}-"} if start else {})
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def insist(attempt, wait=time.sleep):
    """attempt(), and again after each of WAITS if it fails, but not after a plain no nor once wait() is true."""
    for seconds in (*WAITS, None):
        try:
            return attempt()
        except NETWORK as error:
            no = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 416, 429)
            if no or seconds is None or wait(seconds):
                raise


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def append(url, part):
    """Fetch what `part` still lacks of `url`; ConnectionError where the answer is shorter than it promised."""
    start = size_of(part)
    try:
        answer = request(url, start)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing follows: `part` is of another file, or a kill came just after its last byte
            part.unlink()
        raise
    if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        start = 0  # the server sends all of it again
    total = start + int(length) if (length := answer.headers.get("Content-Length")) else None
    bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, file=sys.stdout)
    with answer, bar, open(part, "ab" if start else "wb") as file:
        while chunk := answer.read(1 << 18):
            bar.update(file.write(chunk))
    if total is not None and size_of(part) != total:
        raise ConnectionError(f"it broke off after {size_of(part):,} of {total:,} bytes")


def download(url, path, whole=zipfile.is_zipfile):
    """Fetch `url` to `path`, going on from `path`.part. UserError if it cannot be had, or if whole(part) is false."""
    part = Path(f"{path}.part")
    try:
        insist(lambda: append(url, part))
    except NETWORK as error:
        raise UserError(f"{url}: {str(error) or repr(error)}: try again later, or use another address") from None
    if not whole(part):
        part.unlink()
        raise UserError(f"{url}: what came is not the file expected, or broken: try later, or another address")
    os.replace(part, path)


def unpack(path, pattern, folder):
    """Put the members of the zip `path` whose full name fits `pattern` flat into `folder`, if not there already."""
    folder.mkdir(parents=True, exist_ok=True)  # contents alone are written: no path or link of a member leads anywhere
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = [member for member in archive.infolist() if re.fullmatch(pattern, member.filename)]
            for member in tqdm(wanted, desc=f"unpacking {path.name}", unit="file", file=sys.stdout):
                target = folder / member.filename.rpartition("/")[2]
                if size_of(target) == member.file_size:
                    continue
                if member.file_size > MOST_BYTES:
                    raise zipfile.BadZipFile(f"{member.filename} would be {member.file_size:,} bytes")
                with archive.open(member) as source, open(f"{target}.part", "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                os.replace(f"{target}.part", target)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: unknown method, password
        raise UserError(f"{path} is damaged ({error}); remove it and run this again") from None


def check_sizes(name, refs):
    """Print refs, sentences and images by split; UserError where they are not those published for the set `name`."""
    for split in sorted({ref.split for ref in refs} | PUBLISHED[name].keys()):
        group, published = [r for r in refs if r.split == split], PUBLISHED[name].get(split, (0, 0, 0))
        here = len(group), sum(len(ref.sentences) for ref in group), len({ref.image_id for ref in group})
        print("{} {}: {:,} refs, {:,} sentences, {:,} images".format(name, split, *here))
        if here[::2] != published[::2] or (name == "refcoco" and here != published):
            raise UserError(f"split {split} of {name} has {here} refs, sentences, images, published are {published}")
        if here != published:  # the sentence counts of + and g are from memory
            print(f"note: {published[1]:,} sentences were expected in {split}; refs and images are as published")


def read_annotations(name, root, source):
    """The pictures of a set, {file name: (width, height)}, if its split sizes are right; UserError blames `source`."""
    try:
        refs = read_refer(name, root)
        check_sizes(name, refs)
        pictures = {ref.picture.name: ref.mask[:0:-1] for ref in refs}  # mask: (segmentation, height, width)
        if odd := [file for file in pictures if not PICTURE.fullmatch(file)]:
            raise UserError(f"{odd[0]!r} is no picture of train2014")
        return pictures
    except UserError as error:
        raise UserError(f"{source} is no good, name a better copy by --annotations-url: {error}") from None


def prepare_annotations(name, root, url):
    """Have the files of a set in its folder, downloading them if need be; what fails the check never gets there."""
    folder, refs = REFER[name].split("/")
    if (root / folder / refs).exists() and (root / folder / "instances.json").exists():
        return read_annotations(name, root, f"{root / folder} (remove it)")
    archive, fresh = root / f"{folder}.zip", root / "unpacking"
    if not archive.exists():
        download(url, archive)
    print(f"{archive.name}: SHA-256 {sha256(archive)} (none is published)")
    try:
        unpack(archive, re.escape(folder) + r"/(refs\(\w+\)\.p|instances\.json)", fresh / folder)
        pictures = read_annotations(name, fresh, url)
        (root / folder).mkdir(exist_ok=True)
        for file in (fresh / folder).iterdir():
            os.replace(file, root / folder / file.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        archive.unlink()
    return pictures


def check_picture(file, size):
    """Decode a JPEG (a path or a file) to its end; OSError where it is broken or not of the (width, height) stated."""
    try:
        with Image.open(file, formats=["JPEG"]) as picture:
            if picture.size != size:
                raise ValueError(f"{picture.size} pixels instead of {size}")
            picture.load()
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"not the picture expected: {error}") from None


def fetch_picture(url, path, size, stop):
    """Have one whole picture at `path`. Returns None, or why it could not be had; the Event `stop` ends the waiting."""
    part = path.with_name(path.name + ".part")

    def attempt():
        with request(url) as answer:
            part.write_bytes(answer.read(MOST_BYTES))
        check_picture(part, size)
        os.replace(part, path)

    with contextlib.suppress(OSError):  # there is none, or a broken one
        return check_picture(path, size)
    path.unlink(missing_ok=True)
    try:
        return insist(attempt, stop.wait)
    except NETWORK as error:
        part.unlink(missing_ok=True)
        return str(error) or repr(error)


def fetch_pictures(pictures, folder, url, workers):
    """Have all pictures {file name: size} in `folder`, `workers` at a time. Returns those that failed, {name: why}."""
    folder.mkdir(parents=True, exist_ok=True)
    stop, missing, in_a_row = threading.Event(), {}, 0
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = {pool.submit(fetch_picture, f"{url}/{n}", folder / n, pictures[n], stop): n for n in sorted(pictures)}
        for job in tqdm(as_completed(jobs), desc="pictures", total=len(jobs), unit="picture", file=sys.stdout):
            if reason := job.result():
                missing[jobs[job]] = reason
            in_a_row = in_a_row + 1 if reason else 0
            if in_a_row == min(IN_A_ROW, len(jobs)):
                raise UserError(f"{url}: {in_a_row} pictures in a row failed ({reason}); later, or use --images-url")
    finally:  # after the last one, an error or Ctrl-C alike: nobody waits for the rest
        stop.set()
        pool.shutdown(cancel_futures=True)
    return missing


def check_space(name, root, all_images):
    """Say how much disk the run may still take, and UserError where there is less."""
    images = TRAIN2014 if all_images else sum(images for _, _, images in PUBLISHED[name].values())
    need = ANNOTATION_BYTES + max(0, images - len(list(root.glob("images/train2014/*.jpg")))) * PICTURE_BYTES
    if all_images and not (root / "train2014.zip").exists():
        need += max(0, TRAIN2014 * PICTURE_BYTES - size_of(root / "train2014.zip.part"))
    free = shutil.disk_usage(root).free
    said = f"{root} has {free / 1e9:.1f} GB free, and {name} may take {need / 1e9:.1f} GB more"
    print(said)
    if need > free:
        raise UserError(f"{said}: make room, or name another folder by --data")


def cache_folder():
    return Path(os.environ.get("ETRIS_CACHE") or Path.home() / ".cache" / "etris")


def clip_file(name):
    """The official CLIP `name`, a plain fp32 state dict in the cache (ETRIS_CACHE, else ~/.cache/etris): its Path."""
    cache = cache_folder()
    if (cache / f"{name}.pt").exists():
        return cache / f"{name}.pt"
    if name not in CLIP_FILES:  # ours, and not shipped yet
        raise UserError(f"weights/{name}.pt is not there: make it by `python pretrain.py {name}`, or --weights random")
    (expected, mirror), reasons = CLIP_FILES[name], []
    for url, digest in ((OPENAI.format(sha256=expected, name=name), expected), (MIRROR.format(mirror=mirror), None)):
        try:
            return fetch_clip(name, url, digest, cache)
        except UserError as error:
            reasons.append(str(error) if url in str(error) else f"{url}: {error}")
    raise UserError(
        f"no weights of {name}: {'; '.join(reasons)}. Three ways out: connect to a network; fetch one of these files "
        "elsewhere and give it by --weights FILE; or do without, by --weights random or --backbone tiny"
    )


def fetch_clip(name, url, digest, cache):
    """Download a CLIP, check it (its SHA-256 where known; names and shapes always), keep it as plain fp32: its Path."""
    with blame(cache, "name a folder that can be written by the environment variable ETRIS_CACHE"):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as fresh:
            path, plain = Path(fresh, name), Path(fresh, "plain")
            download(url, path, lambda part: digest in (None, sha256(part)))
            print(f"{url}: SHA-256 {sha256(path)}, {'as' if digest else 'none is'} published")
            state = read_weights(path)
            if build_clip(state, url).size != SIZES[name]:
                raise UserError(f"{url}: holds a CLIP of other sizes than {name}")
            torch.save(state, plain)
            return plain.replace(cache / f"{name}.pt")


def dino_file(name):
    """DINOv2 with registers as its authors publish it, in the cache (see clip_file): its Path.

    They publish no hash: the file's own is written beside it when it first comes, and held against it ever after.
    """
    if name not in DINO_FILES:  # ours, and not shipped yet
        raise UserError(f"weights/{name}.pt is not there: make it by `python pretrain.py {name}`, or --weights random")
    cache = cache_folder()
    path, note = cache / f"{name}.pth", cache / f"{name}.sha256"
    if not path.exists():
        note.unlink(missing_ok=True)
        fetch_dino(name, DINOV2.format(kind=DINO_FILES[name]), cache)
    digest = sha256(path)
    if not note.exists():
        note.write_text(f"{digest}  {path.name}\n")
        print(f"{path.name}: SHA-256 {digest}, none is published; kept in {note}")
    if note.read_text().split() != [digest, path.name]:
        raise UserError(
            f"{path}: changed since it came (SHA-256 {digest[:12]}…, {note.name} says otherwise): remove it"
        )
    return path


def fetch_dino(name, url, cache):
    """Download a DINOv2 into the cache, if its names and shapes are those of `name`."""

    def whole(part):
        with contextlib.suppress(UserError):
            return build_dino(read_weights(part)).size == DINO_SIZES[name]

    with blame(cache, "name a folder that can be written by the environment variable ETRIS_CACHE"):
        cache.mkdir(parents=True, exist_ok=True)
        try:
            download(url, cache / f"{name}.pth", whole)
        except UserError as error:
            raise UserError(f"no weights of {name}: {error}; or fetch it elsewhere and give it by --weights FILE, or "
                            "do without, by --weights random or --backbone tiny-dino") from None  # fmt: skip


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=REFER)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--all-images", action="store_true", help="the whole train2014.zip, 13 GB twice")
    parser.add_argument("--workers", type=integer(1, 64), default=8, metavar="N", help="pictures at a time (8)")
    parser.add_argument("--images-url", default=IMAGES, metavar="URL", help="has train2014/*.jpg, zips/train2014.zip")
    parser.add_argument("--annotations-url", metavar="URL", help="has refcoco.zip, refcoco+.zip, refcocog.zip")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse(argv)
    root, folder = args.data, REFER[args.dataset].split("/")[0]
    images, base = root / "images" / "train2014", args.images_url.rstrip("/")
    address = (args.annotations_url or ANNOTATIONS.format(day=WAYBACK[folder])).rstrip("/") + f"/{folder}.zip"
    try:
        root.mkdir(parents=True, exist_ok=True)
        check_space(args.dataset, root, args.all_images)
        pictures = prepare_annotations(args.dataset, root, address)
        if args.all_images:
            if not (root / "train2014.zip").exists():
                download(f"{base}/zips/train2014.zip", root / "train2014.zip")
            unpack(root / "train2014.zip", "train2014/" + PICTURE.pattern, images)
        missing = fetch_pictures(pictures, images, f"{base}/train2014", args.workers)
        (root / "missing.txt").write_text("".join(f"{n}\t{why}\n" for n, why in sorted(missing.items())), "utf-8")
    except OSError as error:
        raise UserError(f"{root}: {error}; name a folder that can be written by --data") from None
    except KeyboardInterrupt:
        raise UserError("stopped; the same command continues where it was") from None
    print(f"{len(pictures) - len(missing):,} pictures are whole, {len(missing):,} missing ({root / 'missing.txt'})")
    print(f"next: python train.py --backbone RN101 --dataset {args.dataset} --data {root}")


if __name__ == "__main__":
    main()
