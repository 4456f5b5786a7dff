"""What several test files share: a tiny RefCOCO tree and a folder of one's own, written as a user has them on disk."""

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

from clip_model import tokenize
from command import keep_memory

HEIGHT, WIDTH = 30, 40
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits a deaf one, and its tests


@pytest.fixture(autouse=True)
def memory_goes_back():
    """What a fast model in one test lets its process keep (`set_fast`), the next one does not inherit."""
    yield
    keep_memory(False)


def rectangle(top, left, bottom, right):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def corners(top, left, bottom, right):
    return [left, top, right, top, right, bottom, left, bottom]


def refer_tables():
    """Refs and instances.json of four objects in four pictures, one for each way to write a mask."""
    text = coco.encode(np.asfortranarray(rectangle(10, 20, 20, 30).astype(np.uint8)))["counts"].decode()
    column = [0, HEIGHT, HEIGHT * (WIDTH - 1)]  # column by column: the first one inside, all others outside
    shapes = [
        [corners(5, 5, 15, 15), corners(10, 10, 20, 25)],  # two polygons that overlap
        {"size": [HEIGHT, WIDTH], "counts": text},
        {"size": [HEIGHT, WIDTH], "counts": column},
        [corners(0, 0, HEIGHT, WIDTH // 2)],
    ]
    splits = ["train", "train", "val", "testA"]
    files = [f"COCO_train2014_{number:012d}.jpg" for number in range(4)]
    refs = [
        {"ref_id": 10 + i, "ann_id": 100 + i, "image_id": i, "file_name": files[i].replace(".jpg", f"_{i}.jpg"),
         "split": splits[i], "category_id": 1, "sent_ids": [2 * i, 2 * i + 1],
         "sentences": [{"sent": f"left thing {i}", "sent_id": 2 * i, "raw": "Left!", "tokens": ["left"]},
                       {"sent": f"thing {i}", "sent_id": 2 * i + 1, "raw": "thing", "tokens": ["thing"]}]}
        for i in range(4)
    ]  # fmt: skip
    images = [{"id": i, "file_name": files[i], "height": HEIGHT, "width": WIDTH} for i in range(4)]
    masks = [{"id": 100 + i, "image_id": i, "segmentation": shapes[i], "iscrowd": i == 2} for i in range(4)]
    return refs, {"images": images, "annotations": masks}


def write_refer(data, name="refcoco/refs(unc).p", tables=None, protocol=0):
    """The tables as files under `data`, with a picture for each; returns the refs file."""
    refs, instances = tables or refer_tables()
    path = Path(data, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(refs, protocol=protocol))
    path.with_name("instances.json").write_text(json.dumps(instances))
    pictures = Path(data, "images", "train2014")
    pictures.mkdir(parents=True, exist_ok=True)
    for image in instances["images"]:
        shade = np.full((image["height"], image["width"], 3), 40 * (image["id"] % 6), np.uint8)
        Image.fromarray(shade).save(pictures / image["file_name"])
    return path


def write_folder(folder, records):
    """A folder of one's own: two pictures, their masks, and refs.jsonl with one line for each record."""
    for kind in ("images", "masks"):
        Path(folder, kind).mkdir(parents=True, exist_ok=True)
    for number in range(2):
        picture = np.full((HEIGHT, WIDTH, 3), 90 * number, np.uint8)
        Image.fromarray(picture).save(Path(folder, "images", f"{number}.png"))
        mask = rectangle(0, 0, 10 + 10 * number, 10).astype(np.uint8) * 255
        Image.fromarray(mask).save(Path(folder, "masks", f"{number}.png"))
    Path(folder, "refs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Path(folder)


def record(number=0, **changes):
    return {"image": f"images/{number}.png", "mask": f"masks/{number}.png", "sentences": ["a cup"]} | changes


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
    """Stands in for ETRIS: finds what is bright, or what is dark where the sentence begins with "dark"."""

    size, words, align_corners = 32, 6, False

    def forward(self, images, tokens):
        assert not self.training and images.shape[1:] == (3, self.size, self.size) and tokens.shape[1] == self.words
        dark = tokens[:, 1] == tokenize(["dark"], 3)[0, 1]
        sign = torch.where(dark, -1.0, 1.0).view(-1, 1, 1, 1)
        return 20 * sign * torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)


@pytest.fixture
def bright_model():
    return BrightModel()
