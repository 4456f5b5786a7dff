"""What several test files share: a tiny RefCOCO tree and a folder of one's own, written to disk."""

import json
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from utils.tokenizer import tokenize

HEIGHT = 30
WIDTH = 40
# a job in the background ignores SIGINT, and so would the commands that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


def rectangle(top, left, bottom, right):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def corners(top, left, bottom, right):
    return [left, top, right, top, right, bottom, left, bottom]


def refer_tables():
    """Refs and instances.json of four objects in four images, one for each way to write a mask."""
    inside = np.asfortranarray(rectangle(10, 20, 20, 30).astype(np.uint8))
    text = coco.encode(inside)["counts"].decode()
    column = [0, HEIGHT, HEIGHT * (WIDTH - 1)]  # the first column inside, all others outside
    segmentations = [
        [corners(5, 5, 15, 15), corners(10, 10, 20, 25)],  # two polygons that overlap
        {"size": [HEIGHT, WIDTH], "counts": text},
        {"size": [HEIGHT, WIDTH], "counts": column},
        [corners(0, 0, HEIGHT, WIDTH // 2)],
    ]
    refs = []
    images = []
    annotations = []
    for i, split in enumerate(["train", "train", "val", "testA"]):
        name = f"COCO_train2014_{i:012d}"
        ref = {
            "ref_id": 10 + i,
            "ann_id": 100 + i,
            "image_id": i,
            "file_name": f"{name}_{i}.jpg",
            "split": split,
            "category_id": 1,
            "sent_ids": [2 * i, 2 * i + 1],
            "sentences": [
                {
                    "sent": f"left thing {i}",
                    "sent_id": 2 * i,
                    "raw": "Left!",
                    "tokens": ["left"],
                },
                {
                    "sent": f"thing {i}",
                    "sent_id": 2 * i + 1,
                    "raw": "thing",
                    "tokens": ["thing"],
                },
            ],
        }
        image = {"id": i, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
        annotation = {
            "id": 100 + i,
            "image_id": i,
            "segmentation": segmentations[i],
            "iscrowd": i == 2,
        }
        refs.append(ref)
        images.append(image)
        annotations.append(annotation)
    return refs, {"images": images, "annotations": annotations}


def write_refer(data, name="refcoco/refs(unc).p", tables=None, protocol=0):
    """The tables as files under `data`, with an image for each; returns the refs file."""
    refs, instances = tables or refer_tables()
    path = Path(data, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    as_json = path.suffix == ".json"
    path.write_bytes(json.dumps(refs).encode() if as_json else pickle.dumps(refs, protocol))
    path.with_name("instances.json").write_text(json.dumps(instances))
    folder = Path(data, "images", "train2014")
    folder.mkdir(parents=True, exist_ok=True)
    for row in instances["images"]:
        shade = np.full((row["height"], row["width"], 3), 40 * (row["id"] % 6), np.uint8)
        Image.fromarray(shade).save(folder / row["file_name"])
    return path


def grefer_tables():
    """gRefCOCO's: refs with two objects, with none, with one and a crowd, and with a crowd alone.

    The objects are those of refer_tables, all on image 0 but for the last ref's; 102 is a crowd.
    """
    refs, instances = refer_tables()
    several = [[100, 101], [-1], [103, 102], [102]]
    for ref, ann_ids in zip(refs, several, strict=True):
        ref["ann_id"] = ann_ids
        ref["category_id"] = [1] * len(ann_ids)
    return refs, instances


def write_folder(folder, records):
    """A folder of one's own: two images, their masks, and refs.jsonl with a line per record."""
    for kind in ("images", "masks"):
        Path(folder, kind).mkdir(parents=True, exist_ok=True)
    for number in range(2):
        image = np.full((HEIGHT, WIDTH, 3), 90 * number, np.uint8)
        Image.fromarray(image).save(Path(folder, "images", f"{number}.png"))
        mask = rectangle(0, 0, 10 + 10 * number, 10).astype(np.uint8) * 255
        Image.fromarray(mask).save(Path(folder, "masks", f"{number}.png"))
    lines = [json.dumps(record) + "\n" for record in records]
    Path(folder, "refs.jsonl").write_text("".join(lines))
    return Path(folder)


def record(number=0, **changes):
    """A line of refs.jsonl about image and mask `number`."""
    line = {"image": f"images/{number}.png", "mask": f"masks/{number}.png", "sentences": ["a cup"]}
    return line | changes


@pytest.fixture
def refer_tree(tmp_path):
    write_refer(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def refer_sample():
    folder = os.environ.get("REFER_SAMPLE")
    if not folder:
        pytest.skip("REFER_SAMPLE is not set: no real sample of RefCOCO here")
    return Path(folder)


class BrightModel(torch.nn.Module):
    """Stands in for ETRIS: finds what is bright, or dark where the sentence begins with "dark"."""

    size = 32
    max_tokens = 6
    align_corners = False

    def forward(self, images, tokens):
        assert not self.training
        assert images.shape[1:] == (3, self.size, self.size)
        assert tokens.shape[1] == self.max_tokens
        dark = tokens[:, 1] == tokenize(["dark"], 3)[0, 1]
        sign = torch.where(dark, -1.0, 1.0).view(-1, 1, 1, 1)
        brightness = images.mean(1, keepdim=True)
        return 20 * sign * torch.nn.functional.avg_pool2d(brightness, 4)


@pytest.fixture
def bright_model():
    return BrightModel()
