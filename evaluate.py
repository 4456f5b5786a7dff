"""5. How good is it: oIoU, mIoU and Pr@X over every sentence, at the picture's own size (FACTS 3).

    python evaluate.py runs/x/best.pt --dataset refcoco --split val --data data --json val.json

For each sentence I = |P ∩ G| and U = |P ∪ G|, P the pixels whose probability is over the threshold, G the object's.
oIoU = ΣI / ΣU (large objects count more), mIoU = mean of I / U, Pr@X = share of sentences with I / U > X; in percent.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from clip_model import UserError, command, tokenize
from data import FLAVOURS, REFER, Box, TrainSet, letterbox, letterbox_mask, open_dataset, unletterbox
from official import load_checkpoint, pick_device

THRESHOLD = 0.35  # the original's, and that of CRIS before it
PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)


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


def predict_probabilities(model, images, tokens) -> torch.Tensor:
    """images (B, 3, S, S), tokens (B, L) -> (B, S, S) in 0..1, about: bicubic enlargement may overshoot a little."""
    probabilities = model(images, tokens).float().sigmoid()
    size, corners = images.shape[-2:], getattr(model, "align_corners", False)
    return F.interpolate(probabilities, size, mode="bicubic", align_corners=corners)[:, 0]


class EvalSet(TrainSet):
    """Objects with all their K sentences, and the mask at the picture's own size."""

    def __getitem__(self, i):
        """image (3, S, S), tokens (K, L), mask bool (H, W), box, cut (K,), and the item's ids, sentences, kinds."""
        item = self.source[i]
        image, box = letterbox(item.picture, self.size)
        longer = tokenize(item.sentences, self.words + 1)
        own = {name: getattr(item, name, None) for name in ("ref_id", "image_id", "sent_ids", "sentences", "kinds")}
        more = {"tokens": tokenize(item.sentences, self.words), "cut": longer[:, -1] > 0}
        return own | more | {"image": image, "mask": torch.from_numpy(item.mask), "box": box}


def sentence_batches(items, batch_size):
    """Lists of (item, number of the sentence), batch_size long but for the last, whatever the sentences per object."""
    pairs = ((item, k) for item in items for k in range(len(item["sentences"])))
    return iter(lambda: list(itertools.islice(pairs, batch_size)), [])


def predict_masks(model, batch, device, threshold, dtype) -> list[torch.Tensor]:
    """A batch of (item, number of the sentence) -> a bool mask each, at its picture's own size."""
    images = torch.stack([item["image"] for item, _ in batch]).to(device)
    tokens = torch.stack([item["tokens"][k] for item, k in batch]).to(device)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None):
        maps = predict_probabilities(model, images, tokens)
    return [unletterbox(one, item["box"]) > threshold for one, (item, _) in zip(maps, batch, strict=True)]


@torch.inference_mode()
def evaluate(model, source, device="cpu", *, limit=None, batch_size=32, threshold=THRESHOLD, dtype=None, workers=0,
             progress=True, save_masks=None) -> tuple[dict, list[dict]]:  # fmt: skip
    """Every sentence of the first `limit` objects -> (result, one row per sentence).

    result: summarise's numbers, counts and protocol; row: ref_id, sent_id, sentence, I, U, IoU in percent, kind.
    dtype: of autocast, None for none; save_masks: a folder. The model returns to the mode, train or eval, it had.
    """
    objects = source if limit is None else Subset(source, range(min(limit, len(source))))
    loader = DataLoader(EvalSet(objects, model.size, model.words), batch_size=None, num_workers=workers)
    was_training, rows, images, cut = model.training, [], set(), 0
    model.eval()
    try:
        for batch in sentence_batches(tqdm(loader, "evaluate", disable=not progress, leave=False), batch_size):
            masks = predict_masks(model, batch, device, threshold, dtype)
            for (item, k), mask in zip(batch, masks, strict=True):
                images.add(item["image_id"])
                cut += int(item["cut"][k])
                rows.append(score(item, k, mask))
                if save_masks:
                    write_picture(Path(save_masks, f"{item['ref_id']}_{item['sent_ids'][k]}.png"), mask.cpu().numpy())
    finally:
        model.train(was_training)
    counts = {"sentences": len(rows), "refs": len(objects), "images": len(images), "cut": cut}
    protocol = {"threshold": threshold, "resolution": "original", "policy": "every sentence", "size": model.size}
    where = {"dataset": source.name, "split": source.split, "words": model.words}
    return summarise([row["I"] for row in rows], [row["U"] for row in rows]) | counts | protocol | where, rows


def score(item, k, mask) -> dict:
    both, either = intersection_union(mask, item["mask"].to(mask.device))
    row = {"ref_id": item["ref_id"], "sent_id": item["sent_ids"][k], "sentence": item["sentences"][k]}
    row |= {"I": both, "U": either, "IoU": 100 * float(iou(both, either))}
    return row | ({"kind": item["kinds"][k]} if item["kinds"] else {})


def grid_ceiling(source, size) -> dict[str, float]:
    """What no model on a grid of size / 4 can much exceed: the true masks, averaged in its cells and enlarged again."""
    table = []
    for item in (source[i] for i in range(len(source))):
        cells = F.avg_pool2d(letterbox_mask(item.mask, box := Box(size, item.mask.shape))[None], 4)
        square = F.interpolate(cells, (size, size), mode="bicubic")[0, 0]
        table.append(intersection_union(unletterbox(square, box) > 0.5, torch.from_numpy(item.mask)))
    return summarise(*zip(*table, strict=True))


def write_file(path, content: bytes):
    """Whole or not at all: written beside, then moved into place."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
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


def table(result) -> str:
    """The numbers under their names, with what was measured and how."""
    counts = ", ".join(f"{result[what]:,} {what}" for what in ("refs", "sentences", "images"))
    how = f"at the picture's own size, probability > {result['threshold']}, model at {result['size']}"
    cut = f"{result['cut']:,} sentences are longer than {result['words']} tokens and were cut" if result["cut"] else ""
    names = ["oIoU", "mIoU", *(f"Pr@{x}" for x in PRECISIONS)]
    numbers = [" ".join(f"{name:>7}" for name in names), " ".join(f"{result[name]:7.2f}" for name in names)]
    lines = [f"{result['dataset']} {result['split']}: {counts}", f"{result['policy']}, {how}", cut, *numbers]
    return "\n".join(line for line in lines if line)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure a checkpoint, this project's or a published one.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--dataset", default="scenes", help=", ".join([*FLAVOURS, *REFER, "or a FOLDER (scenes)"]))
    add("--split", default="val", help="(val)")
    add("--data", metavar="DIR", help="the folder prepare.py filled (data)")
    add("--limit", type=int, metavar="N", help="the first N objects only")
    add("--json", metavar="FILE", help="write the result")
    add("--csv", metavar="FILE", help="write one row per sentence")
    add("--save-masks", metavar="DIR", help="write <ref_id>_<sent_id>.png, 0 and 255")
    add("--weights", metavar="FILE", help="of the frozen CLIP, where it is not in the cache")
    add("--batch-size", type=int, default=32, help="sentences at a time (32)")
    add("--workers", type=int, default=0, help="processes that read pictures (0)")
    add("--device", choices=["cpu", "cuda", "mps"])
    add("--threshold", type=float, default=THRESHOLD, help=f"of the probability ({THRESHOLD})")
    args = parser.parse_args(argv)
    if not 0 <= args.threshold <= 1 or args.batch_size < 1:
        raise UserError(f"--threshold {args.threshold}, --batch-size {args.batch_size}: 0 to 1, and at least 1")
    device, reason = pick_device(args.device)
    print(f"device {device}: {reason}")
    model = load_checkpoint(args.checkpoint, args.weights, device)
    source = open_dataset(args.dataset, args.split, args.data, args.limit, side=model.size)
    more = {"threshold": args.threshold, "workers": args.workers, "save_masks": args.save_masks}
    result, rows = evaluate(model, source, device, batch_size=args.batch_size, **more)
    print(table(result))
    if args.json:
        write_file(args.json, json.dumps(result | {"checkpoint": args.checkpoint}, indent=1).encode())
    if args.csv:
        writer = csv.DictWriter(text := io.StringIO(newline=""), rows[0])
        writer.writeheader(), writer.writerows(rows)
        write_file(args.csv, text.getvalue().encode())


if __name__ == "__main__":
    main()
