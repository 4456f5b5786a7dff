"""5. Measure a checkpoint: oIoU, mIoU and Pr@X over every sentence, at the image's own size.

    python evaluate.py runs/x/best.pt --dataset refcoco --split val --data data --json val.json
    python evaluate.py runs/x/best.pt --split test-numbers --by digits --by objects

Of each sentence, I = |P ∩ G| and U = |P ∪ G|: P the pixels whose probability is over the threshold,
G those of the object. oIoU = ΣI / ΣU, in which large objects count more; mIoU = mean of I / U;
Pr@X = share of sentences with I / U > X. All in percent. Where sentences may fit several objects or
none (gRefCOCO) also gIoU, cIoU, N-acc and T-acc: docs/metrics.md.

B batch · L tokens · K sentences of one object · H W the image's own size · S side of the square
"""

import csv
import io
import itertools
import json
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from checkpoint import load_checkpoint
from config import NOTHING_BELOW
from data import (
    REFCOCO_FILES,
    Letterbox,
    letterbox,
    letterbox_mask,
    normalize,
    open_dataset,
    unletterbox,
)
from fast import set_fast
from toy.scenes import FLAVOURS, WORLD, Scene
from utils.common import (
    AMP_CHOICES,
    Parser,
    UserError,
    check_writable,
    command,
    default_workers,
    integer,
    pick_device,
    pick_dtype,
    warn,
    write_file,
)
from utils.distributed import all_gather_rows, rank, world_size
from utils.plots import draw_groups, write_png
from utils.tokenizer import tokenize

THRESHOLD = 0.35  # the original's, and that of CRIS before it
PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
GROUPINGS = ("kind", "objects", "occlusion", "digits")  # of scenes, for --by
OCCLUSION_BINS = {0.0: "none", 0.1: "up to 10 %", 0.25: "up to 25 %", 1.0: "more"}


# ----------------------------------------------------------------------------------------- metrics
def intersection_union(prediction, truth) -> tuple:
    """Two bool masks (H, W) → pixels in both, pixels in either; counts stay on the device."""
    return (prediction & truth).sum(), (prediction | truth).sum()


def iou(intersection, union):
    """I / U; 1 where both masks are empty: nothing was to be found, and nothing was (ledger 25)."""
    intersection = np.asarray(intersection, float)
    union = np.asarray(union, float)
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def summarize(intersections, unions) -> dict[str, float]:
    """One I and one U per sentence → {"oIoU", "mIoU", "Pr@0.5" … "Pr@0.9"} in percent."""
    ious = iou(intersections, unions)
    overall = iou(np.sum(intersections), np.sum(unions))
    result = {"oIoU": 100 * float(overall), "mIoU": 100 * float(ious.mean())}
    for threshold in PRECISION_THRESHOLDS:
        result[f"Pr@{threshold}"] = 100 * float(np.mean(ious > threshold))
    return result


def summarize_any(intersections, unions, truths, nothing_below) -> dict[str, float | None]:
    """One I, U and |G| per sentence → {"gIoU", "cIoU", "N-acc", "T-acc"} in percent: gRefCOCO's.

    A prediction of fewer than `nothing_below` pixels counts as empty: the model says "nothing".
    gIoU: mean of I / U; of a sentence without target 1 if the model says so, else 0. cIoU: ΣI / ΣU.
    N-acc: share of the sentences without target, of which the model says so. T-acc: share of the
    others, of which it does not. None: there are no such sentences.
    """
    intersections = np.asarray(intersections)
    unions = np.asarray(unions)
    truths = np.asarray(truths)
    says_nothing = intersections + unions - truths < nothing_below  # |P| = I + U − |G|
    intersections = np.where(says_nothing, 0, intersections)
    unions = np.where(says_nothing, truths, unions)
    no_target = truths == 0
    return {
        "gIoU": 100 * float(iou(intersections, unions).mean()),
        "cIoU": 100 * float(iou(intersections.sum(), unions.sum())),
        "N-acc": percent(says_nothing[no_target]),
        "T-acc": percent(~says_nothing[~no_target]),
    }


def percent(right) -> float | None:
    """The share of True in percent; None of none."""
    return 100 * float(right.mean()) if len(right) else None


def grid_ceiling(dataset, size) -> dict[str, float]:
    """About the best scores of a grid of size / 4: true masks, averaged in its cells, enlarged."""
    table = []
    for i in range(len(dataset)):
        mask = dataset[i].mask
        box = Letterbox(size, mask.shape)
        square = letterbox_mask(mask, box)[None].float() / 255  # (1, 1, S, S)
        cells = F.avg_pool2d(square, 4)
        square = F.interpolate(cells, (size, size), mode="bicubic")
        found = unletterbox(square[0, 0], box) > 0.5
        table.append(torch.stack(intersection_union(found, torch.from_numpy(mask))).tolist())
    intersections, unions = zip(*table, strict=True)
    return summarize(intersections, unions)


# -------------------------------------------------------------------------------------- prediction
def predict_probabilities(model, images, tokens) -> Tensor:
    """images float (B, 3, S, S), normalized; tokens (B, L) → (B, S, S), 0..1.

    The bicubic enlargement may overshoot a little.
    """
    probabilities = model(images, tokens).float().sigmoid()
    align_corners = getattr(model, "align_corners", False)
    size = images.shape[-2:]
    maps = F.interpolate(probabilities, size, mode="bicubic", align_corners=align_corners)
    return maps[:, 0]


class EvalDataset:
    """Objects with all their K sentences, and their masks at the image's own size."""

    def __init__(self, dataset, size, max_tokens):
        self.dataset = dataset
        self.size = size
        self.max_tokens = max_tokens

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        """image uint8 (3, S, S), box, mask bool (H, W), area, tokens (K, L), K × truncated, sample.

        Of an object that cannot be read: error.
        """
        try:
            sample = self.dataset[i]
        except UserError as error:
            return {"error": error}
        image, box = letterbox(sample.image, self.size)
        longer = tokenize(sample.sentences, self.max_tokens + 1)
        return {
            "image": image,
            "box": box,
            "mask": torch.from_numpy(sample.mask),
            "area": int(sample.mask.sum()),
            "tokens": tokenize(sample.sentences, self.max_tokens),
            "truncated": (longer[:, -1] > 0).tolist(),
            "sample": replace(sample, image=None, mask=None),  # they are tensors now
        }


def readable(items, keep_going, skipped):
    """The items that could be read. Another one is a UserError; keep_going: it is said, noted."""
    for item in items:
        if "error" not in item:
            yield item
        elif keep_going:
            skipped.append(warn(item["error"]))
        else:
            raise item["error"]


def upload(items, device):
    """The items with their tensors on `device`: copied once, whatever the number of sentences."""
    non_blocking = device.type == "cuda"  # only then is the memory pinned
    for item in items:
        tensors = {}
        for name in ("image", "mask", "tokens"):
            tensors[name] = item[name].to(device, non_blocking=non_blocking)
        yield item | tensors


def sentence_batches(items, batch_size):
    """Lists of (item, index of the sentence), each `batch_size` long but for the last."""
    pairs = ((item, k) for item in items for k in range(len(item["tokens"])))
    while batch := list(itertools.islice(pairs, batch_size)):
        yield batch


def count_pixels(batch, masks) -> list[tuple[int, int]]:
    """I and U of each sentence, read all at once: a read waits for all that the GPU does."""
    counts = []
    for (item, _), mask in zip(batch, masks, strict=True):
        counts.extend(intersection_union(mask, item["mask"]))
    return torch.stack(counts).view(-1, 2).tolist()


def predict_masks(model, batch, device, threshold, dtype) -> list[Tensor]:
    """A batch of (item on `device`, index of the sentence) → one bool mask (H, W) each."""
    images = normalize(torch.stack([item["image"] for item, _ in batch]))
    tokens = torch.stack([item["tokens"][k] for item, k in batch])
    autocast = dtype not in (None, torch.float32)
    with torch.autocast(device.type, dtype=dtype, enabled=autocast):
        maps = predict_probabilities(model, images, tokens)  # (B, S, S)
    masks = []
    for probabilities, (item, _) in zip(maps, batch, strict=True):
        masks.append(unletterbox(probabilities, item["box"]) > threshold)
    return masks


# -------------------------------------------------------------------------------------- evaluation
def rank_range(count: int, rank: int, world_size: int) -> range:
    """The piece of range(count) that this process evaluates."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


@contextmanager
def evaluation_mode(model):
    """Dropout is off, BatchNorm takes its running statistics; afterwards all is as it was before.

    cuDNN does not time its convolutions either, so train.py and evaluate.py give the same number.
    """
    was_training = model.training
    was_benchmark = torch.backends.cudnn.benchmark
    model.eval()
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        model.train(was_training)
        torch.backends.cudnn.benchmark = was_benchmark


@torch.inference_mode()
def evaluate(
    model,
    dataset,
    device="cpu",
    *,
    limit=None,
    batch_size=32,
    threshold=THRESHOLD,
    dtype=None,
    workers=0,
    progress=True,
    save_masks=None,
    keep_going=False,
    nothing_below=None,
) -> tuple[dict, list[dict]]:
    """Measure every sentence of the first `limit` objects → (result, one row per sentence).

    result: the scores, counts and protocol; row: ref_id, sent_id, sentence, I, U, IoU in percent,
    |G|; of scenes also kind, objects, occlusion, digit and found where a sentence names a digit.
    dtype: of autocast, None for none; save_masks: a folder for the masks; keep_going: skip, and
    count, objects that cannot be read. Processes of torchrun share the objects; all get all rows.
    nothing_below: summarize_any's; None: config.NOTHING_BELOW, else without these scores.
    """
    device = torch.device(device)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    share = Subset(dataset, rank_range(count, rank(), world_size()))
    items = EvalDataset(share, model.size, model.max_tokens)
    pin = device.type == "cuda"
    loader = DataLoader(items, batch_size=None, num_workers=workers, pin_memory=pin)
    hidden = None if progress else True  # None: shown in a terminal only
    bar = tqdm(loader, "evaluate", disable=hidden, leave=False)

    rows = []
    seen = []  # (image_id, whether the sentence was truncated)
    skipped = []
    with evaluation_mode(model):
        items = upload(readable(bar, keep_going, skipped), device)
        for batch in sentence_batches(items, batch_size):
            masks = predict_masks(model, batch, device, threshold, dtype)
            counts = count_pixels(batch, masks)
            for (item, k), mask, (intersection, union) in zip(batch, masks, counts, strict=True):
                rows.append(score(item, k, mask, intersection, union))
                seen.append((item["sample"].image_id, item["truncated"][k]))
                if save_masks:
                    name = f"{rows[-1]['ref_id']}_{rows[-1]['sent_id']}.png"
                    write_png(Path(save_masks, name), mask.cpu().numpy())

    rows = all_gather_rows(rows)
    seen = all_gather_rows(seen)
    skipped = all_gather_rows(skipped)
    if not rows:
        all_skipped = "all objects were skipped: nothing is left to measure"
        raise UserError(f"{dataset.name} {dataset.split}: {all_skipped}")
    if nothing_below is None:
        nothing_below = NOTHING_BELOW.get(dataset.name)
    result = {
        **scores_of(rows, nothing_below),
        "sentences": len(rows),
        "refs": count - len(skipped),
        "images": len({image_id for image_id, _ in seen}),
        "cut": sum(truncated for _, truncated in seen),
        "skipped": len(skipped),
        "threshold": threshold,
        "resolution": "original",
        "policy": "every sentence",
        "size": model.size,
        "dataset": dataset.name,
        "split": dataset.split,
        "words": model.max_tokens,
        "device": device.type,
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
    }
    return result, rows


def scores_of(rows, nothing_below=None) -> dict:
    """The scores of these rows, with gRefCOCO's if `nothing_below` is a number."""
    intersections = [row["I"] for row in rows]
    unions = [row["U"] for row in rows]
    scores = summarize(intersections, unions)
    if nothing_below is not None:
        truths = [row["G"] for row in rows]
        scores.update(summarize_any(intersections, unions, truths, nothing_below))
        scores["nothing_below"] = nothing_below
    return scores


def score(item, k, mask, intersection, union) -> dict:
    """The row of the item's sentence k, of which `mask` (H, W) was predicted."""
    sample = item["sample"]
    row = {
        "ref_id": sample.ref_id,
        "sent_id": sample.sent_ids[k],
        "sentence": sample.sentences[k],
        "I": intersection,
        "U": union,
        "IoU": 100 * float(iou(intersection, union)),
        "G": item["area"],
    }
    if isinstance(sample, Scene):
        row.update(scene_facts(sample, k, mask))
    return row


def scene_facts(scene, k, mask) -> dict:
    """What the paper's appendix B blames failures on: number of objects, occlusion, digits."""
    digit = None
    found = None
    if scene.kinds[k] == "digit":
        digit = scene.things[scene.target].digit
        found = found_thing(scene.things, mask)
    return {
        "kind": scene.kinds[k],
        "objects": len(scene.things),
        "occlusion": occlusion_bin(scene.occlusion),
        "digit": digit,
        "found": found,
    }


def occlusion_bin(occlusion) -> str:
    for limit, name in OCCLUSION_BINS.items():
        if occlusion <= limit:
            return name


def found_thing(things, mask) -> str:
    """The thing in whose radius most of the mask (S, S) lies: a digit, "no digit" or "nothing"."""
    scale = WORLD / len(mask)
    y, x = (mask.nonzero().T.float().cpu() + 0.5) * scale
    pixels = []
    for thing in things:
        inside = (x - thing.x) ** 2 + (y - thing.y) ** 2 <= thing.r**2
        pixels.append(int(inside.sum()))
    if not any(pixels):
        return "nothing"
    digit = things[int(np.argmax(pixels))].digit
    return "no digit" if digit is None else str(digit)


def group_scores(rows, by) -> dict[str, dict]:
    """Scores of the rows that share a value of `by` → {value: {"sentences", "oIoU", …}}.

    by "digits": {digit asked for: {found: how many}}, over the sentences that name a digit.
    """
    column = "digit" if by == "digits" else by
    values = {row[column] for row in rows if row[column] is not None}
    order = OCCLUSION_BINS.values() if by == "occlusion" else sorted(values)
    groups = {}
    for value in order:
        group = [row for row in rows if row[column] == value]
        if not group:
            continue
        if by == "digits":
            groups[str(value)] = dict(Counter(row["found"] for row in group))
        else:
            scores = summarize([row["I"] for row in group], [row["U"] for row in group])
            groups[str(value)] = {"sentences": len(group), **scores}
    return groups


# ------------------------------------------------------------------------------------------ output
def format_result(result) -> str:
    """The scores under their names, with what was measured and how."""
    refs = f"{result['refs']:,} refs"
    sentences = f"{result['sentences']:,} sentences"
    images = f"{result['images']:,} images"
    lines = [
        f"{result['dataset']} {result['split']}: {refs}, {sentences}, {images}",
        f"{result['policy']}, at the image's own size, probability > {result['threshold']}, "
        f"model at {result['size']}, {result['dtype']}",
    ]
    if result["cut"]:
        lines.append(f"{result['cut']:,} sentences are longer than {result['words']} tokens: cut")
    if result.get("skipped"):
        lines.append(f"{result['skipped']:,} skipped: they cannot be read")
    names = ["oIoU", "mIoU", *[f"Pr@{threshold}" for threshold in PRECISION_THRESHOLDS]]
    lines.append(" ".join(f"{name:>7}" for name in names))
    lines.append(" ".join(f"{result[name]:7.2f}" for name in names))
    if "gIoU" in result:
        lines.append(f"fewer than {result['nothing_below']} pixels count as nothing:")
        names = ["gIoU", "cIoU", "N-acc", "T-acc"]
        lines.append(" ".join(f"{name:>7}" for name in names))
        values = [result[name] for name in names]
        lines.append(" ".join("      –" if x is None else f"{x:7.2f}" for x in values))
    return "\n".join(lines)


def format_groups(by, groups) -> str:
    """One line per group: its scores, or of a digit what was found how often."""
    lines = [f"by {by}"]
    for name, group in groups.items():
        if by == "digits":
            found = sorted(group.items(), key=lambda pair: -pair[1])
            text = "  ".join(f"{digit}: {count}" for digit, count in found)
        else:
            scores = f"oIoU {group['oIoU']:6.2f}  mIoU {group['mIoU']:6.2f}"
            text = f"{group['sentences']:>7,} sentences  {scores}"
        lines.append(f"  {name:<11}{text}")
    return "\n".join(lines)


def print_groups(args, groups_by):
    """Each grouping as lines, and as a figure beside the JSON file (else the checkpoint)."""
    folder = Path(args.json or args.checkpoint).parent
    stem = Path(args.json or args.split).stem
    for by, groups in groups_by.items():
        if not groups:
            print(f"by {by}: no sentence of {args.split} names one; --split test-numbers does")
            continue
        figure = folder / f"{stem}-by-{by}.png"
        draw_groups(by, groups, figure)
        print(format_groups(by, groups))
        print(f"  → {figure}")


def write_csv(path, rows):
    """One line per sentence, under the rows' own keys."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


# ------------------------------------------------------------------------------------- command line
def arguments(argv=None):
    """The parsed command line. UserError, before any work, where it asks for the impossible."""
    parser = Parser(description="Measure a checkpoint, this project's or a published one.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of train.py, or published")
    # Data
    names = ", ".join([*FLAVOURS, *REFCOCO_FILES, "or a FOLDER (scenes)"])
    parser.add_argument("--dataset", default="scenes", help=names)
    parser.add_argument("--split", default="val", help="which split (val)")
    parser.add_argument("--data", metavar="DIR", help="the folder prepare.py filled (data)")
    parser.add_argument("--limit", type=integer(), metavar="N", help="the first N objects only")
    parser.add_argument(
        "--keep-going", action="store_true", help="skip what cannot be read: said, and counted"
    )
    # Model
    parser.add_argument(
        "--weights", metavar="FILE", help="of the frozen CLIP, where it is not in the cache"
    )
    parser.add_argument(
        "--words", type=integer(3, 77), metavar="N", help="tokens per sentence (the checkpoint's)"
    )
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"of the probability ({THRESHOLD})"
    )
    parser.add_argument(
        "--nothing-below",
        type=integer(),
        metavar="N",
        help="a mask of fewer pixels says nothing: for gIoU, cIoU, N-acc and T-acc (50 of grefcoco "
        "and scenes-any, which alone have these metrics by default)",
    )
    # Run
    parser.add_argument("--batch-size", type=integer(), default=32, help="sentences at a time (32)")
    parser.add_argument(
        "--workers", type=integer(0, 64), help="processes that read images (0; 8 on a GPU)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda", "mps"], help="where to run (the best available)"
    )
    parser.add_argument(
        "--amp", default="auto", choices=AMP_CHOICES, help="number format, as train.py's (auto)"
    )
    # Output
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--csv", metavar="FILE", help="write one row per sentence")
    parser.add_argument(
        "--save-masks", metavar="DIR", help="write <ref_id>_<sent_id>.png, 0 or 255"
    )
    parser.add_argument(
        "--by",
        choices=GROUPINGS,
        action="append",
        default=[],
        help="of scenes: the scores by it, with a figure; may be repeated",
    )
    args = parser.parse_args(argv)

    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: choose a probability, 0 to 1")
    if args.json:
        check_writable(args.json)
    if args.csv:
        check_writable(args.csv)
    if args.json and args.json == args.csv:
        raise UserError(f"--json {args.json} and --csv: give them different names")
    if args.save_masks:
        check_writable(args.save_masks, folder=True)
    if args.by and args.dataset not in FLAVOURS:
        scenes = ", ".join(FLAVOURS)
        raise UserError(f"--by {args.by[0]}: only drawn scenes have it: choose --dataset {scenes}")
    return args


@command
def main(argv=None):
    args = arguments(argv)
    device, device_reason = pick_device(args.device)
    dtype, dtype_reason = pick_dtype(device, args.amp)
    print(f"device {device}: {device_reason}; numbers {str(dtype)[6:]}: {dtype_reason}")
    model = load_checkpoint(args.checkpoint, args.weights, device, args.words)
    model = set_fast(model).to(memory_format=torch.channels_last)
    bad_lines = [] if args.keep_going else None
    dataset = open_dataset(
        args.dataset, args.split, args.data, args.limit, model.size, skipped=bad_lines
    )

    # all masks or none: they are moved into place once every image was read
    with tempfile.TemporaryDirectory() as folder:
        result, rows = evaluate(
            model,
            dataset,
            device,
            batch_size=args.batch_size,
            threshold=args.threshold,
            dtype=dtype,
            workers=default_workers(device) if args.workers is None else args.workers,
            save_masks=folder if args.save_masks else None,
            keep_going=args.keep_going,
            nothing_below=args.nothing_below,
        )
        for path in Path(folder).iterdir():
            write_file(Path(args.save_masks, path.name), path.read_bytes())
    for line in bad_lines or ():
        warn(line)
        result["skipped"] += 1

    print(format_result(result))
    if args.by:
        result["by"] = {by: group_scores(rows, by) for by in args.by}
        print_groups(args, result["by"])
    if args.json:
        result["checkpoint"] = args.checkpoint
        write_file(args.json, json.dumps(result, indent=1).encode())
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
