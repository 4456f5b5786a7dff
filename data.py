"""3b. Pictures, masks, sentences: the RefCOCO family, a folder of one's own, drawn scenes; letterbox and loaders.

    source = open_dataset("refcoco", "val", data="data")      # len(source), source[i] -> Item, source.counts()
    python data.py show refcoco --split val --data data --out sheet.png

H W the picture's own height and width · S side of the square the model sees · L words · K sentences of one object
"""

import contextlib
import json
import pickle
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as coco
from torch.utils.data import ConcatDataset, DataLoader

from clip_model import PIXEL_MEAN, PIXEL_STD, is_blank, tokenize
from command import SEED, Parser, UserError, command, integer
from scenes import FLAVOURS, SPLITS, Scenes

REFER = {"refcoco": "refcoco/refs(unc).p", "refcoco+": "refcoco+/refs(unc).p"}
REFER |= {f"refcocog-{by}": f"refcocog/refs({by}).p" for by in ("umd", "google")}
RECORD = 'a line is {"image": "images/x.jpg", "mask": "masks/x.png", "sentences": ["the red cup"], "split": "train"}'
MEAN, STD = (255 * torch.tensor(numbers).view(3, 1, 1) for numbers in (PIXEL_MEAN, PIXEL_STD))


@dataclass(frozen=True)
class Item:
    """One object and what people said of it. On disk: the picture's path, the mask's path or COCO's (shape, H, W)."""

    picture: np.ndarray | Path  # uint8 (H, W, 3)
    mask: np.ndarray | Path | tuple  # bool (H, W)
    sentences: tuple[str, ...]
    sent_ids: tuple[int, ...]
    ref_id: int
    image_id: int
    split: str

    def __post_init__(self):
        texts, ids = (*self.sentences, self.split), (*self.sent_ids, self.ref_id, self.image_id)
        if {type(text) for text in texts} != {str} or {type(number) for number in ids} != {int}:
            raise ValueError("sentences and split must be text, ids whole numbers")
        "".join(texts).encode(), np.int64([*ids])  # half a character, or a number of 20 digits, fails late otherwise
        if not len(self.sentences) == len(set(self.sent_ids)) > 0:
            raise ValueError(f"{len(self.sentences)} sentences with {len(set(self.sent_ids))} different sent_ids")

    def load(self) -> "Item":
        """The same with picture and mask in memory; the mask may not have another size."""
        own = isinstance(self.mask, Path)  # RefCOCO's masks are drawn on the picture as it is stored
        picture = read_picture(self.picture, exif=own)
        with blame(self.mask if own else f"the mask of ref {self.ref_id}", "draw or unpack it again"):
            mask = read_picture(self.mask, convert=to_mask) if own else None
            shape = mask.shape if own else self.mask[1:]
            if shape != picture.shape[:2]:
                raise ValueError(f"height and width {shape}, but {self.picture} has {picture.shape[:2]}")
            return replace(self, picture=picture, mask=mask if own else draw_mask(*self.mask))


@dataclass(frozen=True)
class Source:
    """One split of one data set: len() objects, [i] -> Item (or a Scene, which has the same fields)."""

    name: str
    split: str
    items: list | Scenes | ConcatDataset

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i].load() if isinstance(self.items, list) else self.items[i]

    def counts(self) -> dict[str, int]:
        """Refs, images, sentences; of scenes refs alone, for their sentences are written as they are drawn."""
        refs = self.items if isinstance(self.items, list) else []
        more = {"images": len({ref.image_id for ref in refs}), "sentences": sum(len(ref.sentences) for ref in refs)}
        return {"refs": len(self)} | (more if refs else {})


def open_dataset(name, split, data=None, limit=None, side=160, skipped=None) -> Source:
    """A Source by name: scenes, scenes+, scenes-g, a RefCOCO set (REFER), a folder with refs.jsonl, a comma's mix.

    data: the folder that `prepare.py` filled ("data"); limit: the first so many objects; side: pixels of a scene.
    skipped: a list for what is wrong with lines of refs.jsonl, which else is a UserError.
    In a mix no picture trains that an evaluation split of the sets in it shows (ledger 27: leaks).
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least 1")
    names = [name] if Path(name).is_dir() else [part.strip() for part in name.split(",")]
    if len(names) > 1 and split != "train":
        raise UserError(f"{name}: a mix is for training; evaluate one data set at a time")
    refs = {part: None if part in FLAVOURS else read_refs(part, Path(data or "data"), skipped) for part in names}
    if len(names) > 1:
        shown = {ref.image_id for part in names if part in REFER for ref in refs[part] if ref.split != "train"}
        for part in [part for part in refs if part in REFER]:
            every = [ref for ref in refs[part] if ref.split == "train"]
            refs[part] = [ref for ref in every if ref.image_id not in shown]
            lost, gone = len(every) - len(refs[part]), len({ref.image_id for ref in every} & shown)
            print(f"{part}: {lost:,} refs left out, evaluation splits show their {gone:,} pictures")
    parts = [Source(part, split, choose(part, split, refs[part], limit, side)) for part in names]
    return parts[0] if len(parts) == 1 else Source(name, split, ConcatDataset(parts))


def read_refs(name, data, skipped=None) -> list[Item]:
    if name not in REFER and not Path(name, "refs.jsonl").is_file():
        known = ", ".join([*FLAVOURS, *REFER])
        raise UserError(f"no data set {name!r}: choose {known}, or a folder with refs.jsonl ({RECORD})")
    return read_refer(name, data) if name in REFER else read_folder(Path(name), skipped)


class NoSplit(UserError):
    """The data set is whole, but has no such split."""


def choose(name, split, refs, limit, side) -> list[Item] | Scenes:
    there = SPLITS if refs is None else sorted({ref.split for ref in refs})
    if split not in there:
        raise NoSplit(f"{name}: split {split} has no refs; the splits there are: {', '.join(there) or 'none'}")
    if refs is None:
        return Scenes(name, split, limit=limit, side=side)
    refs = [ref for ref in refs if ref.split == split][:limit]
    gone = {ref.picture for ref in refs if not ref.picture.is_file()}
    noted = missing_in(min(gone).parents[2]) if gone else set()  # DIR/images/train2014/x.jpg
    known = {path for path in gone if path.name in noted}
    if gone - known:  # said now, not after an hour of training
        remedy = f"get them with `python prepare.py {name} --data DIR`"
        raise UserError(f"{min(gone - known)} is missing, and {len(gone - known) - 1:,} more pictures: {remedy}")
    if known:
        print(f"{name} {split}: leaving out the refs of {len(known):,} pictures that prepare.py could not get")
    return [ref for ref in refs if ref.picture not in known]


def missing_in(folder) -> set[str]:
    """Names of the pictures that prepare.py could not get: the first word of each line of missing.txt."""
    note = Path(folder, "missing.txt")
    return {line.split("\t")[0] for line in note.read_text("utf-8").splitlines()} if note.is_file() else set()


@contextlib.contextmanager
def blame(thing, remedy, skipped=None):
    """Whatever goes wrong inside is told as one line about `thing`: a damaged or hostile file can fail in any way.

    skipped: a list that takes the line; without it the line is a UserError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        line = f"{thing}: {' '.join(reason.split())[:200]}: {remedy}"
        if skipped is None:
            raise UserError(line) from None
        skipped.append(line)


class NoClasses(pickle.Unpickler):
    def find_class(self, module, name):
        raise ValueError(f"asks for {module}.{name} and may run code; lists, dicts, text and numbers need no class")


def read_refer(name, data) -> list[Item]:
    """Every ref of one of the RefCOCO sets, from the archives' own files."""
    path, pictures, refs = data / REFER[name], data / "images" / "train2014", []
    instances, remedy = path.with_name("instances.json"), f"get it with `python prepare.py {name} --data {data}`"
    with blame(instances, remedy):
        tables = json.loads(instances.read_text())
        images = {row["id"]: (Path(row["file_name"]).name, row["height"], row["width"]) for row in tables["images"]}
        if any(len(name.encode()) > 255 for name, *_ in images.values()):
            raise ValueError("a picture's name is longer than any file's")
        shapes = {row["id"]: row["segmentation"] for row in tables["annotations"]}
    with blame(path, remedy), open(path, "rb") as file:
        for ref in NoClasses(file, encoding="latin1").load():  # bytes of Python 2; the tokenizer's ftfy mends accents
            picture, height, width = images[ref["image_id"]]
            sentences = tuple(sentence["sent"] for sentence in ref["sentences"])
            sent_ids = tuple(sentence.get("sent_id", i) for i, sentence in enumerate(ref["sentences"]))
            mask, ids = (shapes[ref["ann_id"]], height, width), (ref["ref_id"], ref["image_id"])
            refs.append(Item(pictures / picture, mask, sentences, sent_ids, *ids, ref["split"]))
    return refs


def read_folder(folder, skipped=None) -> list[Item]:
    """A folder of one's own: refs.jsonl, one JSON object a line (RECORD; sent_ids and ref_id where wanted)."""
    path, refs, numbers = folder / "refs.jsonl", {}, {}
    with blame(path, "save it as UTF-8 text"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    for count, line in enumerate(lines, 1):
        with blame(f"{path} line {count}", RECORD, skipped):
            if line.strip():
                record = json.loads(line)
                sentences, files = record["sentences"], [record["image"], record["mask"]]
                if type(sentences) is not list or any(map(is_blank, sentences)):
                    raise ValueError("sentences must be a list, and none of them empty")
                if any(Path(f).is_absolute() or ".." in Path(f).parts or not (folder / f).is_file() for f in files):
                    raise ValueError(f"{' or '.join(files)} is not a file inside the folder")
                number, sent_ids = record.get("ref_id", len(refs)), record.get("sent_ids", range(len(sentences)))
                if number in refs:
                    raise ValueError(f"ref_id {number} is taken already")
                ids, split = (number, numbers.setdefault(files[0], len(numbers))), record.get("split", "train")
                refs[number] = Item(*(folder / f for f in files), tuple(sentences), tuple(sent_ids), *ids, split)
    return list(refs.values())


def to_rgb(image) -> np.ndarray:
    """PIL image -> uint8 (H, W, 3): 16-bit grey becomes 8-bit, what is transparent becomes white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def to_mask(image) -> np.ndarray:
    """PIL image -> bool (H, W): 0 is outside; inside is 255, or 1 throughout, as some tools write it."""
    values = np.asarray(image.convert("L"))
    if not any(np.isin(values, pair).all() for pair in ([0, 255], [0, 1])):
        raise ValueError(f"a mask holds 0 and 255 only (as PNG, edges not softened), not {np.unique(values)[:6]}")
    return values > 0


def read_picture(path, exif=True, convert=to_rgb) -> np.ndarray:
    """A file -> uint8 (H, W, 3), turned as EXIF says, an animation's first frame; UserError names a bad file."""
    with blame(path, "check the path, or save it anew as PNG"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # a small file can unpack to gigabytes
        if Path(path).stat().st_size == 0:
            raise ValueError("the file is empty")
        with Image.open(path) as image:
            return convert(ImageOps.exif_transpose(image) if exif else image)


def draw_mask(shape, height, width) -> np.ndarray:
    """COCO's segmentation -> bool (H, W): polygons OR-ed, run lengths column by column, as text or as numbers."""
    if isinstance(shape, list):
        polygons = [points for points in shape if len(points) >= 6]  # fewer than three corners hold no pixel
        if not all(abs(x) <= 2 * max(height, width) for points in polygons for x in points):
            raise ValueError("a corner lies far outside the picture")  # of which the library would crash
        return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)
    runs = shape["counts"] if isinstance(shape["counts"], list) else run_lengths(shape["counts"])
    if [*shape["size"]] != [height, width] or sum(runs) != height * width or min(runs) < 0:
        raise ValueError("the run lengths do not fill the picture")  # the library would show what memory held before
    return coco.decode(coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)).astype(bool)


def run_lengths(text) -> list[int]:
    """COCO's text for run lengths, unpacked: characters of 5 bits, low ones first, a sixth bit says that more follow.

    From the fourth run on a number is the difference to the run before the last.
    """
    runs, number, shift = [], 0, 0
    for byte in text.encode() if isinstance(text, str) else text:
        number |= (byte - 48 & 31) << shift
        shift += 5
        if not byte - 48 & 32:
            number -= (byte - 48 >> 4 & 1) << shift  # the highest bit is the sign
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return runs


@dataclass(frozen=True)
class Box:
    """Where a picture of size `original` (H, W) lies in a square of side `size`."""

    size: int
    original: tuple[int, int]

    @property
    def rectangle(self) -> tuple[int, int, int, int]:
        """top, left, height, width: scale min(S/H, S/W), centred, at least one pixel each way."""
        height, width = (max(1, round(side * self.size / max(self.original))) for side in self.original)
        return (self.size - height) // 2, (self.size - width) // 2, height, width

    def paste(self, values) -> torch.Tensor:
        """(C, height, width) -> (C, S, S), zeros around."""
        top, left, height, width = self.rectangle
        return F.pad(values, (left, self.size - left - width, top, self.size - top - height))


def resize(values, size, mode, antialias) -> torch.Tensor:
    """torchvision's, imported when the first picture needs it: it takes a second that `--help` can do without."""
    from torchvision.transforms.v2.functional import resize as torchvisions

    return torchvisions(values, size, mode, antialias=antialias)


def letterbox(picture, size) -> tuple[torch.Tensor, Box]:
    """uint8 (H, W, 3) -> float32 (3, S, S), normalised as CLIP's, and its Box. The border, CLIP's mean colour, is 0."""
    box = Box(size, picture.shape[:2])
    pixels = resize(torch.from_numpy(picture).permute(2, 0, 1), box.rectangle[2:], Image.BICUBIC, antialias=True)
    return box.paste((pixels.contiguous().float() - MEAN) / STD), box


def letterbox_mask(mask, box) -> torch.Tensor:
    """bool (H, W) -> float32 (1, S, S): edges are soft where the picture was resized, the border is 0."""
    values = torch.from_numpy(mask).float()[None]
    return box.paste(resize(values, box.rectangle[2:], Image.BILINEAR, antialias=True))


def unletterbox(maps, box) -> torch.Tensor:
    """(…, S, S) -> (…, H, W): the picture's rectangle, back at its own size by bicubic interpolation."""
    top, left, height, width = box.rectangle
    inside = maps[None, ..., top : top + height, left : left + width]
    return resize(inside, box.original, Image.BICUBIC, antialias=False)[0]


class TrainSet:
    """Objects with one sentence each, drawn anew every epoch; the loop sets `epoch`."""

    def __init__(self, source, size, words, seed=0):
        self.source, self.size, self.words, self.seed, self.epoch = source, size, words, seed, 0

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        """image (3, S, S), tokens (L,), mask (1, S, S), ref_id, sentence."""
        item = self.source[i]
        # the draw hangs on seed, epoch and object alone: not on workers, order or where a run was resumed
        sentence = item.sentences[np.random.default_rng((self.seed, self.epoch, i)).integers(len(item.sentences))]
        image, box = letterbox(item.picture, self.size)
        tokens, mask = tokenize([sentence], self.words)[0], letterbox_mask(item.mask, box)
        return {"image": image, "tokens": tokens, "mask": mask, "ref_id": item.ref_id, "sentence": sentence}


def count_cut(sentences, words) -> int:
    """How many of the sentences are longer than `words` tokens, start and end included, and so lose their end."""
    return int(tokenize(sentences, words + 1)[:, -1].count_nonzero())


def epoch_batches(n, batch_size, seed, epoch) -> list[list[int]]:
    """All of range(n) in a seeded order, in batches; the last short one is dropped only if a full one remains."""
    order = np.random.default_rng((seed, epoch)).permutation(n).tolist()
    batches = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


def train_loader(train_set, batch_size, epoch, start=0, workers=0, share=slice(None)) -> DataLoader:
    """The batches of one epoch from number `start` on; share: the items of each that one of several processes takes."""
    train_set.epoch = epoch
    batches = [b[share] for b in epoch_batches(len(train_set), batch_size, train_set.seed, epoch)[start:]]
    dice = torch.Generator().manual_seed(train_set.seed)  # its own, so that loading never moves the training's dice
    pin = torch.cuda.is_available()
    return DataLoader(train_set, batch_sampler=batches, num_workers=workers, pin_memory=pin, generator=dice)


@command
def main(argv=None):
    parser = Parser(description="Draw a contact sheet of a data set.")
    add = parser.add_argument
    add("action", choices=["show"])
    add("dataset", help=", ".join([*FLAVOURS, *REFER, "or a FOLDER"]))
    add("--split", default="train")
    add("--data", metavar="DIR", help="the folder prepare.py filled (data)")
    add("--number", type=integer(1, 1000), default=24, help="how many objects (24)")
    add("--seed", type=SEED, default=0, help="which ones")
    add("--out", default="sheet.png", metavar="FILE")
    args = parser.parse_args(argv)
    from predict import contact_sheet  # where the pictures are drawn

    source = open_dataset(args.dataset, args.split, args.data)
    chosen = np.random.default_rng(args.seed).permutation(len(source))[: args.number].tolist()
    contact_sheet([source[i] for i in sorted(chosen)], args.out)
    print(f"{source.name} {source.split} {source.counts()}; {len(chosen)} of them in {args.out}")


if __name__ == "__main__":
    main()
