"""5. How good is it: oIoU, mIoU and Pr@X over every sentence, at the picture's own size.

    python evaluate.py runs/x/best.pt --dataset refcoco --split val --data data --json val.json
    python evaluate.py runs/x/best.pt --split test-numbers --by digits --by objects       drawn scenes: where it fails

For each sentence I = |P ∩ G| and U = |P ∪ G|, P the pixels whose probability is over the threshold, G the object's.
oIoU = ΣI / ΣU (large objects count more), mIoU = mean of I / U, Pr@X = share of sentences with I / U > X; in percent.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from clip_model import tokenize
from command import Parser, UserError, command, integer
from data import FLAVOURS, REFER, Box, TrainSet, letterbox, letterbox_mask, open_dataset, unletterbox
from etris import ETRIS, set_fast
from official import load_checkpoint, pick_device
from parallel import ALONE
from scenes import WORLD

THRESHOLD = 0.35  # the original's, and that of CRIS before it
PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)
HIDDEN = {0.0: "none", 0.1: "up to 10 %", 0.25: "up to 25 %", 1.0: "more"}  # shares of an object, by --by occlusion
BY = ("kind", "objects", "occlusion", "digits")


def intersection_union(prediction, truth) -> tuple[int, int]:
    """Two bool masks (H, W) -> pixels in both, pixels in either."""
    return int((prediction & truth).sum()), int((prediction | truth).sum())


def iou(intersection, union):
    """I / U; 1 where both masks are empty: nothing was to be found, and nothing was."""
    intersection, union = np.asarray(intersection, float), np.asarray(union, float)
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def summarise(intersections, unions) -> dict[str, float]:
    """One I and one U per sentence -> {"oIoU", "mIoU", "Pr@0.5" … "Pr@0.9"} in percent."""
    each = iou(intersections, unions)
    means = {"oIoU": iou(np.sum(intersections), np.sum(unions)), "mIoU": each.mean()}
    return {name: 100 * float(x) for name, x in (means | {f"Pr@{x}": np.mean(each > x) for x in PRECISIONS}).items()}


def predict_probabilities(model, images, tokens, owner=None) -> torch.Tensor:
    """images (B, 3, S, S), tokens (B, L) -> (B, S, S) in 0..1, about: bicubic enlargement may overshoot a little.

    owner (B,): the number of each sentence's picture, where there are fewer; below its bridges ETRIS sees each once.
    """
    shared = owner is not None and type(model) is ETRIS
    logits = model(images, tokens, owner=owner) if shared else model(images if owner is None else images[owner], tokens)
    probabilities = logits.float().sigmoid()
    size, corners = images.shape[-2:], getattr(model, "align_corners", False)
    return F.interpolate(probabilities, size, mode="bicubic", align_corners=corners)[:, 0]


class EvalSet(TrainSet):
    """Objects with all their K sentences, and the mask at the picture's own size; `wrong` with one it cannot read."""

    def __getitem__(self, i):
        """image (3, S, S), tokens (K, L), mask bool (H, W), box, cut (K,), and the item's ids, sentences, kinds."""
        try:
            item = self.source[i]
        except UserError as error:
            return {"wrong": error}
        image, box = letterbox(item.picture, self.size)
        longer = tokenize(item.sentences, self.words + 1)
        names = ("ref_id", "image_id", "sent_ids", "sentences", "kinds", "things", "target", "occlusion")
        own = {name: getattr(item, name, None) for name in names}
        more = {"tokens": tokenize(item.sentences, self.words), "cut": longer[:, -1] > 0}
        return own | more | {"image": image, "mask": torch.from_numpy(item.mask), "box": box}


def sentence_batches(items, batch_size):
    """Lists of (item, number of the sentence), batch_size long but for the last, whatever the sentences per object."""
    pairs = ((item, k) for item in items for k in range(len(item["sentences"])))
    return iter(lambda: list(itertools.islice(pairs, batch_size)), [])


def predict_masks(model, batch, device, threshold, dtype) -> list[torch.Tensor]:
    """A batch of (item, number of the sentence) -> a bool mask each, at its picture's own size."""
    pictures = {item["image_id"]: item["image"] for item, _ in batch}
    images, numbers = torch.stack(list(pictures.values())).to(device), {key: i for i, key in enumerate(pictures)}
    owner = torch.tensor([numbers[item["image_id"]] for item, _ in batch], device=device)
    tokens = torch.stack([item["tokens"][k] for item, k in batch]).to(device)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None):
        maps = predict_probabilities(model, images, tokens, owner)
    return [unletterbox(one, item["box"]) > threshold for one, (item, _) in zip(maps, batch, strict=True)]


@torch.inference_mode()
def evaluate(model, source, device="cpu", *, limit=None, batch_size=32, threshold=THRESHOLD, dtype=None, workers=0,
             progress=True, save_masks=None, keep_going=False, world=ALONE) -> tuple[dict, list[dict]]:  # fmt: skip
    """Every sentence of the first `limit` objects -> (result, one row per sentence).

    result: summarise's numbers, counts and protocol; row: ref_id, sent_id, sentence, I, U, IoU in percent; of scenes
    also kind, objects, occlusion, and where a sentence names a digit, that digit and the thing found.
    dtype: of autocast, None for none; save_masks: a folder. The model returns to the mode, train or eval, it had.
    keep_going: an object that cannot be read is told and counted, else it is a UserError.
    world: the processes that share the work, an object each once; all get the whole answer.
    """
    count = len(source) if limit is None else min(limit, len(source))
    objects = EvalSet(Subset(source, world.part(count)), model.size, model.words)
    loader = DataLoader(objects, batch_size=None, num_workers=workers)
    bar = tqdm(loader, "evaluate", disable=not progress or None, leave=False)  # None: off where nobody looks
    was_training, rows, seen, skipped = model.training, [], [], []
    model.eval()
    try:
        for batch in sentence_batches(readable(bar, keep_going, skipped), batch_size):
            masks = predict_masks(model, batch, device, threshold, dtype)
            for (item, k), mask in zip(batch, masks, strict=True):
                seen.append((item["image_id"], int(item["cut"][k])))
                rows.append(score(item, k, mask))
                if save_masks:
                    write_picture(Path(save_masks, f"{item['ref_id']}_{item['sent_ids'][k]}.png"), mask.cpu().numpy())
    finally:
        model.train(was_training)
    rows, seen, skipped = world.gather(rows), world.gather(seen), len(world.gather(skipped))
    if not rows:
        raise UserError(f"{source.name} {source.split}: all objects were skipped: nothing is left to measure")
    images, cut = zip(*seen, strict=True)
    counts = {"sentences": len(rows), "refs": count - skipped, "images": len(set(images)), "cut": sum(cut)}
    counts |= {"skipped": skipped}
    protocol = {"threshold": threshold, "resolution": "original", "policy": "every sentence", "size": model.size}
    where = {"dataset": source.name, "split": source.split, "words": model.words}
    return summarise([row["I"] for row in rows], [row["U"] for row in rows]) | counts | protocol | where, rows


def readable(items, keep_going, skipped):
    """The items that could be read. The first other one ends it all, or each is told on stderr and put down."""
    for item in items:
        if "wrong" not in item:
            yield item
        elif not keep_going:
            raise item["wrong"]
        else:
            skipped.append(tell(item["wrong"]))


def tell(wrong) -> str:
    print(f"skipped: {wrong}", file=sys.stderr)
    return str(wrong)


def score(item, k, mask) -> dict:
    both, either = intersection_union(mask, item["mask"].to(mask.device))
    row = {"ref_id": item["ref_id"], "sent_id": item["sent_ids"][k], "sentence": item["sentences"][k]}
    row |= {"I": both, "U": either, "IoU": 100 * float(iou(both, either))}
    return row | (scene_facts(item, item["kinds"][k], mask) if item["kinds"] else {})


def scene_facts(item, kind, mask) -> dict:
    """What the appendix's failures hang on: kind of sentence, how many objects, the hidden share, digits."""
    hidden = next(label for share, label in HIDDEN.items() if item["occlusion"] <= share)
    asked = item["things"][item["target"]].digit if kind == "digit" else None
    found = None if asked is None else found_thing(item["things"], mask)
    return {"kind": kind, "objects": len(item["things"]), "occlusion": hidden, "digit": asked, "found": found}


def found_thing(things, mask) -> str:
    """A digit, "no digit" or "nothing": the thing within whose radius most of the mask (S, S) lies."""
    y, x = (mask.nonzero().T.float().cpu() + 0.5) * WORLD / len(mask)
    inside = [int(((x - thing.x) ** 2 + (y - thing.y) ** 2 <= thing.r**2).sum()) for thing in things]
    best = things[int(np.argmax(inside))]
    return "nothing" if not any(inside) else "no digit" if best.digit is None else str(best.digit)


def group_scores(rows, by) -> dict[str, dict]:
    """{value of the column `by`: summarise's numbers and the sentences}; digits: {asked: {found: how many}}."""
    groups, column = {}, "digit" if by == "digits" else by
    order = list(HIDDEN.values()).index if by == "occlusion" else lambda value: value
    for row in sorted((row for row in rows if row[column] is not None), key=lambda row: order(row[column])):
        groups.setdefault(str(row[column]), []).append(row)
    if by == "digits":
        return {asked: dict(Counter(row["found"] for row in some)) for asked, some in groups.items()}
    columns = {name: [[row[key] for row in some] for key in ("I", "U")] for name, some in groups.items()}
    return {name: {"sentences": len(both[0])} | summarise(*both) for name, both in columns.items()}


def draw_groups(by, groups, path):
    """A figure of group_scores: bars of mIoU with the sentences in each, or who is taken for whom."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4.5), layout="constrained")
    axis = figure.subplots()
    if by == "digits":
        columns = [*map(str, range(10)), "no digit", "nothing"]
        counts = np.array([[some.get(name, 0) for name in columns] for some in groups.values()])
        axis.imshow(counts / counts.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
        for (y, x), count in np.ndenumerate(counts):
            axis.text(x, y, count or "", ha="center", va="center", fontsize=8, color="orange")
        axis.set_xticks(range(len(columns)), columns, rotation=45)
        axis.set_yticks(range(len(groups)), groups)
        axis.set(xlabel="found", ylabel="asked for", title="sentences that name a digit")
    else:
        bars = axis.bar(list(groups), [x["mIoU"] for x in groups.values()], color="#0072B2")
        axis.bar_label(bars, [f"{x['sentences']:,}" for x in groups.values()], fontsize=8)
        axis.set(xlabel=by, ylabel="mIoU, percent", ylim=(0, 105), title="above the bars: sentences")
    figure.savefig(buffer := io.BytesIO(), dpi=110, format="png")
    write_file(path, buffer.getvalue())


def grid_ceiling(source, size) -> dict[str, float]:
    """What no model on a grid of size / 4 can much exceed: the true masks, averaged in its cells and enlarged again."""
    table = []
    for item in (source[i] for i in range(len(source))):
        cells = F.avg_pool2d(letterbox_mask(item.mask, box := Box(size, item.mask.shape))[None], 4)
        square = F.interpolate(cells, (size, size), mode="bicubic")[0, 0]
        table.append(intersection_union(unletterbox(square, box) > 0.5, torch.from_numpy(item.mask)))
    return summarise(*zip(*table, strict=True))


def check_writable(path, folder=False):
    """UserError, before any work, where `path` cannot become a file (a folder)."""
    there = next((place for place in (Path(path), *Path(path).parents) if place.exists()), Path())
    if there.is_dir() != (folder or there != Path(path)) or not os.access(there, os.W_OK):
        raise UserError(f"{path} cannot be written: {there} is in the way: name another")


def write_file(path, content: bytes):
    """Whole or not at all: written beside, then moved into place."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def write_picture(path, array):
    """uint8 (H, W) or (H, W, 3) -> a PNG, or bool (H, W) -> one with 0 and 255."""
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8) * 255 if array.dtype == bool else array).save(buffer, "PNG")
    write_file(path, buffer.getvalue())


def by_table(by, groups) -> str:
    """One line a group: its numbers, or of digits what was found how often."""

    def numbers(x):
        if by == "digits":
            return "  ".join(f"{name}: {count}" for name, count in sorted(x.items(), key=lambda pair: -pair[1]))
        return f"{x['sentences']:>7,} sentences  oIoU {x['oIoU']:6.2f}  mIoU {x['mIoU']:6.2f}"

    return "\n".join([f"by {by}", *(f"  {name:<11}{numbers(x)}" for name, x in groups.items())])


def table(result) -> str:
    """The numbers under their names, with what was measured and how."""
    counts = ", ".join(f"{result[what]:,} {what}" for what in ("refs", "sentences", "images"))
    how = f"at the picture's own size, probability > {result['threshold']}, model at {result['size']}"
    cut = f"{result['cut']:,} sentences are longer than {result['words']} tokens and were cut" if result["cut"] else ""
    skipped = f"{result['skipped']:,} skipped, for they cannot be read" if result.get("skipped") else ""
    names = ["oIoU", "mIoU", *(f"Pr@{x}" for x in PRECISIONS)]
    numbers = [" ".join(f"{name:>7}" for name in names), " ".join(f"{result[name]:7.2f}" for name in names)]
    lines = [f"{result['dataset']} {result['split']}: {counts}", f"{result['policy']}, {how}", cut, skipped, *numbers]
    return "\n".join(line for line in lines if line)


@command
def main(argv=None):
    parser = Parser(description="Measure a checkpoint, this project's or a published one.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--dataset", default="scenes", help=", ".join([*FLAVOURS, *REFER, "or a FOLDER (scenes)"]))
    add("--split", default="val", help="(val)")
    add("--data", metavar="DIR", help="the folder prepare.py filled (data)")
    add("--limit", type=integer(), metavar="N", help="the first N objects only")
    add("--json", metavar="FILE", help="write the result")
    add("--csv", metavar="FILE", help="write one row per sentence")
    add("--save-masks", metavar="DIR", help="write <ref_id>_<sent_id>.png, 0 and 255")
    add("--weights", metavar="FILE", help="of the frozen CLIP, where it is not in the cache")
    add("--batch-size", type=integer(), default=32, help="sentences at a time (32)")
    add("--workers", type=integer(0, 64), default=0, help="processes that read pictures (0)")
    add("--device", choices=["cpu", "cuda", "mps"])
    add("--keep-going", action="store_true", help="skip what cannot be read: said, and counted as skipped")
    add("--by", choices=BY, action="append", default=[], help="of scenes: the score by it, with a figure; repeatable")
    add("--words", type=integer(3, 77), metavar="N", help="tokens a sentence has at most (the checkpoint's)")
    add("--threshold", type=float, default=THRESHOLD, help=f"of the probability ({THRESHOLD})")
    args = parser.parse_args(argv)
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: choose a probability, 0 to 1")
    for name in filter(None, (args.json, args.csv)):
        check_writable(name)
    if args.json and args.json == args.csv:
        raise UserError(f"--json {args.json} and --csv: give them different names")
    if args.save_masks:
        check_writable(args.save_masks, folder=True)
    device, reason = pick_device(args.device)
    print(f"device {device}: {reason}")
    if args.by and args.dataset not in FLAVOURS:
        raise UserError(f"--by {args.by[0]}: only drawn scenes know it: choose --dataset {', '.join(FLAVOURS)}")
    model = set_fast(load_checkpoint(args.checkpoint, args.weights, device, args.words))
    model.words = args.words or model.words
    wrong_lines = [] if args.keep_going else None
    source = open_dataset(args.dataset, args.split, args.data, args.limit, model.size, wrong_lines)
    more = {"threshold": args.threshold, "workers": args.workers, "keep_going": args.keep_going}
    with tempfile.TemporaryDirectory() as fresh:  # all masks or none, should a picture be bad
        more |= {"batch_size": args.batch_size, "save_masks": args.save_masks and fresh}
        result, rows = evaluate(model, source, device, **more)
        for path in Path(fresh).iterdir():
            write_file(Path(args.save_masks, path.name), path.read_bytes())
    result["skipped"] += len([tell(line) for line in wrong_lines or ()])
    print(table(result))
    result |= {"by": {by: group_scores(rows, by) for by in args.by}} if args.by else {}
    for by, groups in result.get("by", {}).items():
        if not groups:
            print(f"by {by}: no sentence of {args.split} names one; --split test-numbers does")
            continue
        figure = Path(args.json or args.checkpoint).with_name(f"{Path(args.json or args.split).stem}-by-{by}.png")
        draw_groups(by, groups, figure)
        print(f"{by_table(by, groups)}\n  → {figure}")
    if args.json:
        write_file(args.json, json.dumps(result | {"checkpoint": args.checkpoint}, indent=1).encode())
    if args.csv:
        writer = csv.DictWriter(text := io.StringIO(newline=""), rows[0])
        writer.writeheader(), writer.writerows(rows)
        write_file(args.csv, text.getvalue().encode())


if __name__ == "__main__":
    main()
