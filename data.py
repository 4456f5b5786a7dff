"""3. Images, masks and referring expressions: RefCOCO, a folder of one's own, drawn scenes.

    dataset = open_dataset("refcoco", "val", data="data")  # len(dataset), dataset[i] → Sample
    python data.py show refcoco --split val --data data --out sheet.png

Images and masks stay uint8 until they are on the device, where whole batches are normalized.

B batch · L tokens · H W the image's own height and width · S side of the square the model sees
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from clip_model import PIXEL_MEAN, PIXEL_STD
from config import NOTHING_BELOW
from toy.scenes import FLAVOURS, SPLITS, Scenes
from utils.common import SEED, Parser, UserError, as_user_error, command, integer
from utils.distributed import rank, world_size
from utils.images import decode_segmentation, file_inside, read_image, resize, to_mask
from utils.plots import contact_sheet
from utils.refer import REFS_ERRORS, count_targets, objects_of, read_refs
from utils.tokenizer import is_blank, tokenize

REFCOCO_FILES = {
    "refcoco": "refcoco/refs(unc).p",
    "refcoco+": "refcoco+/refs(unc).p",
    "refcocog-umd": "refcocog/refs(umd).p",
    "refcocog-google": "refcocog/refs(google).p",
    "grefcoco": "grefcoco/grefs(unc).json",
}
RECORD_FORMAT = (
    'a line is {"image": "images/x.jpg", "mask": "masks/x.png", '
    '"sentences": ["the red cup"], "split": "train"}'
)
MEAN = 255 * torch.tensor(PIXEL_MEAN).view(3, 1, 1)
STD = 255 * torch.tensor(PIXEL_STD).view(3, 1, 1)
tokenize_cached = functools.lru_cache(maxsize=2**16)(tokenize)
copy_once = functools.cache(Tensor.to)  # each copy would wait for all that the GPU does


# ---------------------------------------------------------------------------------------- datasets
@dataclass(frozen=True)
class Sample:
    """One object (of gRefCOCO any number) and its sentences; until `load`, pixels are on disk."""

    image: np.ndarray | Path  # uint8 (H, W, 3)
    mask: np.ndarray | Path | tuple  # bool (H, W), or COCO's (segmentations, H, W)
    sentences: tuple[str, ...]
    sent_ids: tuple[int, ...]
    ref_id: int
    image_id: int
    split: str

    def __post_init__(self):
        texts = [*self.sentences, self.split]
        ids = [*self.sent_ids, self.ref_id, self.image_id]
        if {type(text) for text in texts} != {str} or {type(number) for number in ids} != {int}:
            raise ValueError("sentences and split must be text, ids whole numbers")
        "".join(texts).encode()  # ValueError: a lone surrogate
        np.array(ids, dtype=np.int64)  # OverflowError: more than 64 bits
        count = len(set(self.sent_ids))
        if count == 0 or count != len(self.sentences):
            raise ValueError(f"{len(self.sentences)} sentences with {count} different sent_ids")

    def load(self) -> "Sample":
        """The same with image and mask in memory. UserError if one is damaged or sizes differ."""
        own_mask = isinstance(self.mask, Path)
        mask_name = self.mask if own_mask else f"the mask of ref {self.ref_id}"
        image = read_image(self.image, exif=own_mask)  # COCO's masks belong to the pixels as stored
        mask = read_image(self.mask, convert=to_mask) if own_mask else None
        mask_size = mask.shape if own_mask else self.mask[1:]
        with as_user_error(mask_name, "draw or unpack it again"):
            if mask_size != image.shape[:2]:
                sizes = f"height and width {mask_size}, but {self.image} has {image.shape[:2]}"
                raise ValueError(sizes)
            if mask is None:
                mask = np.zeros(mask_size, bool)
                for segmentation in self.mask[0]:
                    mask |= decode_segmentation(segmentation, *mask_size)
        return replace(self, image=image, mask=mask)


@dataclass(frozen=True)
class RefDataset:
    """One split of one dataset: len() objects, [i] → loaded Sample (or Scene, with its fields)."""

    name: str
    split: str
    samples: list | Scenes | ConcatDataset  # list: samples on disk

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        sample = self.samples[i]
        return sample.load() if isinstance(self.samples, list) else sample

    def counts(self) -> dict[str, int]:
        """Refs, images and sentences; of scenes only refs, for drawing them all takes minutes."""
        if not isinstance(self.samples, list):
            return {"refs": len(self)}
        images = {sample.image_id for sample in self.samples}
        sentences = sum(len(sample.sentences) for sample in self.samples)
        return {"refs": len(self), "images": len(images), "sentences": sentences}


class SplitNotFound(UserError):
    """The dataset is readable but has no such split."""


def open_dataset(name, split, data=None, limit=None, side=160, skipped=None) -> RefDataset:
    """Open drawn scenes, a set of the RefCOCO family, a folder with refs.jsonl, or a comma's mix.

    data: the folder that prepare.py filled ("data"); limit: at most so many objects of each name;
    side: pixels of a scene; skipped: a list that takes the errors of single lines of refs.jsonl.
    In a mix, no image trains that an evaluation split in it shows (ledger 27: leaks).
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least 1")
    names = [name] if Path(name).is_dir() else [part.strip() for part in name.split(",")]
    if len(names) > 1 and split != "train":
        raise UserError(f"{name}: a mix is for training; evaluate one dataset at a time")

    tables = {part: read_samples(part, Path(data or "data"), skipped) for part in names}
    if len(names) > 1:
        leave_out_evaluated(tables)
    parts = []
    for part in names:
        samples = select_split(part, split, tables[part], limit, side)
        parts.append(RefDataset(part, split, samples))
    return parts[0] if len(parts) == 1 else RefDataset(name, split, ConcatDataset(parts))


def read_samples(name, data, skipped=None) -> list[Sample] | None:
    """All splits' samples; None for drawn scenes. UserError for an unknown name."""
    if name in FLAVOURS:
        return None
    if name in REFCOCO_FILES:
        return read_refer(name, data)
    if Path(name, "refs.jsonl").is_file():
        return read_folder(Path(name), skipped)
    names = ", ".join([*FLAVOURS, *REFCOCO_FILES, f"or a folder with refs.jsonl ({RECORD_FORMAT})"])
    raise UserError(f"no dataset {name!r}: choose {names}")


def leave_out_evaluated(tables):
    """Keep, of each RefCOCO set, the training samples whose image no evaluation split shows."""
    coco_names = [name for name in tables if name in REFCOCO_FILES]
    samples = [sample for name in coco_names for sample in tables[name]]
    evaluated = {sample.image_id for sample in samples if sample.split != "train"}
    for name in coco_names:
        train = [sample for sample in tables[name] if sample.split == "train"]
        tables[name] = [sample for sample in train if sample.image_id not in evaluated]
        lost = len(train) - len(tables[name])
        shared = len({sample.image_id for sample in train} & evaluated)
        print(f"{name}: {lost:,} refs left out, evaluation splits show their {shared:,} images")


def select_split(name, split, samples, limit, side) -> list[Sample] | Scenes:
    """The first `limit` samples of a split, except those whose image prepare.py could not get."""
    splits = SPLITS if samples is None else sorted({sample.split for sample in samples})
    if split not in splits:
        available = ", ".join(splits) or "none"
        raise SplitNotFound(f"{name}: split {split} has no refs; available splits: {available}")
    if samples is None:
        return Scenes(name, split, limit=limit, side=side)

    samples = [sample for sample in samples if sample.split == split][:limit]
    images = {sample.image for sample in samples}
    absent = {path for path in images if not path.is_file()}
    if not absent:
        return samples
    note = min(absent).parents[2] / "missing.txt"  # the image is DIR/images/train2014/x.jpg
    lines = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
    known = {line.split("\t")[0] for line in lines}  # names of images that prepare.py could not get
    unknown = [path for path in absent if path.name not in known]
    if unknown:  # said now, not after an hour of training
        more = f"{min(unknown)} is missing, and {len(unknown) - 1:,} more images"
        raise UserError(f"{more}: get them with `python prepare.py {name} --data DIR`")
    print(f"{name} {split}: leaving out {len(absent):,} images that prepare.py could not get")
    if len(absent) == len(images):
        raise UserError(f"{name} {split}: none of the {len(samples):,} refs has its image")
    return [sample for sample in samples if sample.image not in absent]


# ------------------------------------------------------------------------------------ files on disk
def read_refer(name, data) -> list[Sample]:
    """All refs of a RefCOCO set, from the archive's own refs and instances.json."""
    refs_file = data / REFCOCO_FILES[name]
    instances_file = refs_file.with_name("instances.json")
    remedy = f"get it with `python prepare.py {name} --data {data}`"

    with as_user_error(instances_file, remedy):
        instances = json.loads(instances_file.read_text(encoding="utf-8"))
        images = {}
        for row in instances["images"]:
            file_name = PureWindowsPath(row["file_name"]).name  # / and \ part folders
            if len(file_name.encode()) > 255:
                raise ValueError("an image's name is longer than any file's")
            path = data / "images" / "train2014" / file_name
            images[row["id"]] = (path, row["height"], row["width"])
        annotations = instances["annotations"]
        segmentations = {row["id"]: row["segmentation"] for row in annotations}
        crowds = {row["id"] for row in annotations if row.get("iscrowd")}

    with as_user_error(refs_file, remedy, errors=REFS_ERRORS):
        refs = read_refs(refs_file)

    samples = []
    with as_user_error(refs_file, remedy):
        for ref in refs:
            image, height, width = images[ref["image_id"]]
            objects = objects_of(ref, segmentations, crowds)
            if objects is None:
                print(f"{name}: ref {ref['ref_id']} is left out, for it names crowds alone")
                continue
            sentences = ref["sentences"]
            sample = Sample(
                image=image,
                mask=(objects, height, width),
                sentences=tuple(sentence["sent"] for sentence in sentences),
                sent_ids=tuple(sentence.get("sent_id", i) for i, sentence in enumerate(sentences)),
                ref_id=ref["ref_id"],
                image_id=ref["image_id"],
                split=ref["split"],
            )
            samples.append(sample)
    return samples


def read_folder(folder, skipped=None) -> list[Sample]:
    """All refs of a folder of one's own: refs.jsonl, one JSON object a line (RECORD_FORMAT)."""
    path = folder / "refs.jsonl"
    with as_user_error(path, "save it as UTF-8 text"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")

    samples = {}  # by ref_id
    image_ids = {}  # by file name
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        with as_user_error(f"{path} line {number}", RECORD_FORMAT, skipped=skipped):
            record = json.loads(line)
            sample = parse_record(record, folder, len(samples), image_ids)
            if sample.ref_id in samples:
                raise ValueError(f"ref_id {sample.ref_id} is taken already")
            samples[sample.ref_id] = sample
    return list(samples.values())


def parse_record(record, folder, index, image_ids) -> Sample:
    """One line of refs.jsonl → Sample; ref_id, sent_ids and split have defaults."""
    sentences = record["sentences"]
    is_text = isinstance(sentences, list) and all(isinstance(text, str) for text in sentences)
    if not is_text or any(is_blank(text) for text in sentences):
        raise ValueError("sentences must be a list of texts, and none of them empty")
    image = file_inside(folder, record["image"])
    return Sample(
        image=image,
        mask=file_inside(folder, record["mask"]),
        sentences=tuple(sentences),
        sent_ids=tuple(record.get("sent_ids", range(len(sentences)))),
        ref_id=record.get("ref_id", index),
        image_id=image_ids.setdefault(image, len(image_ids)),
        split=record.get("split", "train"),
    )


# --------------------------------------------------------------------------------------- letterbox
@dataclass(frozen=True)
class Letterbox:
    """Where an image of size `original` (H, W) lies in a square of side `size`."""

    size: int
    original: tuple[int, int]

    @property
    def rectangle(self) -> tuple[int, int, int, int]:
        """top, left, height, width: scale min(S/H, S/W), centered, at least one pixel each way."""
        H, W = self.original
        height = max(1, round(H * self.size / max(H, W)))
        width = max(1, round(W * self.size / max(H, W)))
        return (self.size - height) // 2, (self.size - width) // 2, height, width

    def pad(self, values, border) -> Tensor:
        """(C, height, width) → (C, S, S), around it `border` (C, 1, 1)."""
        top, left, height, width = self.rectangle
        if height == width == self.size:
            return values
        square = border.to(values.dtype).repeat(1, self.size, self.size)
        square[:, top : top + height, left : left + width] = values
        return square


def letterbox(image, size) -> tuple[Tensor, Letterbox]:
    """uint8 (H, W, 3) → uint8 (3, S, S) and its Letterbox. The border has CLIP's mean color."""
    box = Letterbox(size, image.shape[:2])
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    pixels = resize(pixels, box.rectangle[2:], "bicubic")
    return box.pad(pixels, border=MEAN.round()), box


def letterbox_mask(mask, box) -> Tensor:
    """bool (H, W) → uint8 (1, S, S), 0..255: edges are soft where the mask is resized."""
    values = 255 * torch.from_numpy(mask)[None].byte()
    values = resize(values, box.rectangle[2:], "bilinear")
    return box.pad(values, border=torch.zeros(1, 1, 1))


def unletterbox(maps, box) -> Tensor:
    """float (…, S, S) → (…, H, W): what lies in the rectangle, bicubic at the image's own size."""
    top, left, height, width = box.rectangle
    inside = maps[..., top : top + height, left : left + width].reshape(-1, height, width)
    inside = resize(inside, box.original, "bicubic", antialias=False)
    return inside.view(*maps.shape[:-2], *box.original)


def normalize(images) -> Tensor:
    """uint8 (B, 3, S, S) → float32 on the same device, normalized as CLIP's images were."""
    mean = copy_once(MEAN, images.device)
    std = copy_once(STD, images.device)
    return (images.float() - mean) / std


# ----------------------------------------------------------------------------------------- training
class TrainDataset:
    """Objects with one sentence each, drawn anew every epoch; train_loader sets `epoch`."""

    def __init__(self, dataset, size, max_tokens, seed=0):
        self.dataset = dataset
        self.size = size
        self.max_tokens = max_tokens
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        """image uint8 (3, S, S), tokens (L,), mask uint8 (1, S, S), ref_id, sentence."""
        sample = self.dataset[i]
        # depends on seed, epoch and object alone: not on workers, order or resuming
        rng = np.random.default_rng((self.seed, self.epoch, i))
        sentence = sample.sentences[rng.integers(len(sample.sentences))]
        image, box = letterbox(sample.image, self.size)
        return {
            "image": image,
            "tokens": tokenize_cached(sentence, self.max_tokens)[0],
            "mask": letterbox_mask(sample.mask, box),
            "ref_id": sample.ref_id,
            "sentence": sentence,
        }


def epoch_batches(n, batch_size, seed, epoch) -> list[list[int]]:
    """range(n) in a seeded order, in batches. A short last one is dropped if a full one remains."""
    order = np.random.default_rng((seed, epoch)).permutation(n).tolist()
    batches = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


def train_loader(train_set, batch_size, epoch, start=0, workers=0, device="cpu") -> DataLoader:
    """The batches of one epoch from number `start` on; of each, this process's share."""
    train_set.epoch = epoch
    batches = epoch_batches(len(train_set), batch_size, train_set.seed, epoch)[start:]
    return DataLoader(
        train_set,
        batch_sampler=[batch[rank() :: world_size()] for batch in batches],
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator().manual_seed(train_set.seed),  # leaves the global one alone
    )


def to_device(batch, device) -> dict:
    """A loader's batch on `device`: image normalized (channels_last), mask float32 0..1, tokens."""
    non_blocking = torch.device(device).type == "cuda"  # only then is the memory pinned
    images = batch["image"].to(device, non_blocking=non_blocking)
    tokens = batch["tokens"].to(device, non_blocking=non_blocking)
    masks = batch["mask"].to(device, non_blocking=non_blocking)
    images = normalize(images).contiguous(memory_format=torch.channels_last)
    return batch | {"image": images, "tokens": tokens, "mask": masks.float() / 255}


# ------------------------------------------------------------------------------------- command line
@command
def main(argv=None):
    parser = Parser(description="Draw a contact sheet of a dataset.")
    parser.add_argument("action", choices=["show"], help="what to do")
    parser.add_argument("dataset", help=", ".join([*FLAVOURS, *REFCOCO_FILES, "or a FOLDER"]))
    parser.add_argument("--split", default="train", help="which split (train)")
    parser.add_argument("--data", metavar="DIR", help="the folder prepare.py filled (data)")
    parser.add_argument("--number", type=integer(1, 1000), default=24, help="how many objects (24)")
    parser.add_argument("--seed", type=SEED, default=0, help="of their random choice (0)")
    parser.add_argument("--out", default="sheet.png", metavar="FILE", help="where (sheet.png)")
    args = parser.parse_args(argv)
    dataset = open_dataset(args.dataset, args.split, args.data)
    chosen = np.random.default_rng(args.seed).permutation(len(dataset))[: args.number]
    contact_sheet(Subset(dataset, sorted(chosen.tolist())), args.out)
    print(f"{dataset.name} {dataset.split} {dataset.counts()}; {len(chosen)} are in {args.out}")
    if dataset.name in NOTHING_BELOW:
        print(count_targets(dataset), end="")


if __name__ == "__main__":
    main()
