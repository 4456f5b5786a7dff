"""What test_bad_input.py feeds the commands: hostile and damaged files by name, and odd ones that are good."""

import io
import json
import os
import pickle
import shutil
import zlib

import numpy as np
import torch
from conftest import HEIGHT, WIDTH, record, rectangle, refer_tables, write_folder, write_refer
from PIL import Image


class Code:
    """Pickled, it asks whoever loads it to make a folder: the proof that code ran."""

    def __reduce__(self):
        return os.mkdir, ("CODE-RAN",)


def png(image, **options):
    image.save(file := io.BytesIO(), options.pop("format", "PNG"), **options)
    return file.getvalue()


def torch_file(thing):
    torch.save(thing, file := io.BytesIO())
    return file.getvalue()


def bomb():
    """A PNG of a hundred bytes whose header promises 60,000 × 60,000 pixels."""

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
SMALL = Image.new("RGB", (WIDTH, HEIGHT), "red")
FILES = {  # name → content
    "photo.png": png(NOISE),
    "empty.png": b"",
    "text.png": b"not a picture",
    "cut.png": png(NOISE)[:2000],
    "cut.jpg": png(NOISE, format="JPEG")[:1500],
    "cut.gif": png(NOISE, format="GIF")[:30],
    "bomb.png": bomb(),
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "empty.pt": b"",
    "text.pt": b"not a checkpoint",
    "code.pt": pickle.dumps({"version": 1, "config": {}, "tuned": Code()}),
    "code-zip.pt": torch_file({"version": 1, "config": {}, "tuned": Code()}),
    "number.pt": torch_file(5),
    "other.pt": torch_file({"weight": torch.zeros(2, 2)}),
    "names.pt": torch_file({5: torch.zeros(2), "weight": "text"}),
    "official-like.pt": torch_file({"state_dict": {"module.backbone.visual.conv1.weight": torch.zeros(3)}}),
    "state-5.pt": torch_file({"state_dict": 5}),
    "mixed/bad.png": b"not a picture",
    "spoilt/bad.png": b"not a picture",
    "mixed/good.png": png(NOISE),
    "deep.json": b"[" * 100_000,
    "hollow/readme.txt": b"no picture here",
}


def set_in(*path_and_value):
    """An edit of nested containers: set_in("config", "size", 5)(file) sets file["config"]["size"] = 5."""
    *path, key, value = path_and_value

    def edit(thing):
        for step in path:
            thing = thing[step]
        thing[key] = value

    return edit


def drop(*path):
    def edit(thing):
        for step in path[:-1]:
            thing = thing[step]
        del thing[path[-1]]

    return edit


CHECKPOINTS = {  # an edit of run/last.pt → what the line names beside the file
    "version": (set_in("version", 99), "version 99"),
    "no-identity": (drop("identity"), "identity"),
    "other-frozen": (set_in("identity", "sha256", "0" * 64), "000000000000"),
    "other-backbone": (set_in("config", "backbone", "tiny-vit"), "this one is tiny-vit"),
    "no-backbone": (set_in("config", "backbone", "RN7"), "RN7"),
    "other-system": (set_in("config", "system", "barleria"), ""),
    "no-system": (set_in("config", "system", "sam"), "sam"),
    "new-option": (set_in("config", "colour", "red"), "colour"),
    "config-text": (set_in("config", "x"), ""),
    "size-text": (set_in("config", "size", "x"), ""),
    "size-huge": (set_in("config", "size", 32 * 10**7), ""),
    "tuned-list": (set_in("tuned", [1]), ""),
    "tuned-text": (lambda file: file["tuned"].update({next(iter(file["tuned"])): "x"}), ""),
    "tuned-less": (lambda file: file["tuned"].pop("projector.txt.weight"), "projector.txt.weight"),
    "tuned-more": (set_in("tuned", "clip.logit_scale", torch.zeros(())), "clip.logit_scale"),
    "tuned-shape": (set_in("tuned", "projector.txt.weight", torch.zeros(2, 2)), "projector.txt.weight"),
    "tuned-nan": (lambda file: file["tuned"]["projector.txt.bias"].fill_(float("nan")), "finite"),
}
RUNS = {  # the same, for --resume
    "a-model": (set_in("training", None), "last.pt"),
    "no-random": (drop("training", "random"), "random"),
    "no-args": (drop("args"), "args"),
    "adam": (set_in("training", "adam", {"state": {}, "param_groups": []}), ""),
    "dice": (set_in("training", "random", "torch", torch.zeros(5)), ""),
    "steps-text": (set_in("training", "steps", "many"), ""),
}
LINES = {  # a second line of refs.jsonl
    "json": "{not json",
    "list": "[1]",
    "deep": "[" * 100_000,
    "no-mask": json.dumps({"image": "images/0.png", "sentences": ["x"]}),
    "no-sentences": json.dumps({"image": "images/0.png", "mask": "masks/0.png"}),
    "blank": json.dumps(record(sentences=["\t \u200b"])),
    "none": json.dumps(record(sentences=[])),
    "one-text": json.dumps(record(sentences="a cup")),
    "number": json.dumps(record(sentences=[5])),
    "twice": json.dumps(record(ref_id=0)),
    "id-text": json.dumps(record(ref_id="x")),
    "id-half": json.dumps(record(ref_id=1.5)),
    "id-nan": '{"image": "images/0.png", "mask": "masks/0.png", "sentences": ["x"], "ref_id": NaN}',
    "sent-ids": json.dumps(record(sent_ids=[1, 2])),
    "split": json.dumps(record(split=5)),
    "up": json.dumps(record(image="../photo.png")),
    "absolute": json.dumps(record(mask="/etc/hostname")),
    "gone": json.dumps(record(mask="masks/none.png")),
    "folder": json.dumps(record(image="images")),
    "null-byte": json.dumps(record(image="images/\0.png")),
    "image-5": json.dumps(record(image=5)),
}
MASKS = {  # in the place of masks/0.png
    "grey": Image.fromarray(rectangle(0, 0, 5, 5).astype(np.uint8) * 128),
    "soft": Image.linear_gradient("L").resize((WIDTH, HEIGHT)),
    "size": Image.new("L", (WIDTH + 1, HEIGHT), 255),
}
TREES = {  # what is named, and an edit of (refs, instances)
    "refs-number": ("refs(unc).p", lambda refs, tables: (5, tables)),
    "refs-dict": ("refs(unc).p", lambda refs, tables: ({"a": 1}, tables)),
    "refs-code": ("refs(unc).p", lambda refs, tables: ([Code()], tables)),
    "ref-no-split": ("refs(unc).p", lambda refs, tables: drop(0, "split")(refs)),
    "ref-no-sentences": ("refs(unc).p", lambda refs, tables: set_in(0, "sentences", [])(refs)),
    "ref-sentence-number": ("refs(unc).p", lambda refs, tables: set_in(0, "sentences", 0, "sent", 5)(refs)),
    "ref-other-image": ("refs(unc).p", lambda refs, tables: set_in(0, "image_id", 77)(refs)),
    "ref-other-mask": ("refs(unc).p", lambda refs, tables: set_in(0, "ann_id", 77)(refs)),
    "ref-id-text": ("refs(unc).p", lambda refs, tables: set_in(0, "ref_id", "x")(refs)),
    "instances-list": ("instances.json", lambda refs, tables: (refs, [])),
    "instances-no-height": ("instances.json", lambda refs, tables: drop("images", 0, "height")(tables)),
    "height-huge": ("the mask of ref 10", lambda refs, tables: set_in("images", 0, "height", 10**9)(tables)),
    "height-negative": ("the mask of ref 10", lambda refs, tables: set_in("images", 0, "height", -HEIGHT)(tables)),
    "height-text": ("the mask of ref 10", lambda refs, tables: set_in("images", 0, "height", "30")(tables)),
    "other-size": ("the mask of ref 10", lambda refs, tables: set_in("images", 0, "height", HEIGHT + 1)(tables)),
    "polygon-text": (
        "the mask of ref 10",
        lambda refs, tables: set_in("annotations", 0, "segmentation", [["a"] * 6])(tables),
    ),
    "polygon-nan": (
        "the mask of ref 10",
        lambda refs, tables: set_in("annotations", 0, "segmentation", [[float("nan")] * 6])(tables),
    ),
    "polygon-far": (
        "the mask of ref 10",
        lambda refs, tables: set_in("annotations", 0, "segmentation", [[0, 0, 9, 1e18, 1e18, 9]])(tables),
    ),
    "polygon-line": (
        "the mask of ref 10",
        lambda refs, tables: set_in("annotations", 0, "segmentation", [[1, 1, 2, 2]])(tables),
    ),
    "runs-short": (
        "the mask of ref 11",
        lambda refs, tables: set_in("annotations", 1, "segmentation", "counts", [5, 5])(tables),
    ),
    "runs-negative": (
        "the mask of ref 11",
        lambda refs, tables: set_in("annotations", 1, "segmentation", "counts", [-5, 1205])(tables),
    ),
    "runs-text": (
        "the mask of ref 11",
        lambda refs, tables: set_in("annotations", 1, "segmentation", "counts", "~~~~~~")(tables),
    ),
    "runs-size": (
        "the mask of ref 11",
        lambda refs, tables: set_in("annotations", 1, "segmentation", "size", [10**6, 10**6])(tables),
    ),
}


def build_world(world):
    """Every good and bad file there is, each under the name its case gives it."""
    for name, content in FILES.items():
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_bytes(content)
    write_folder(world / "own", [record(0), record(1)])
    for name, line in LINES.items():
        folder = write_folder(world / f"line-{name}", [record()])
        with open(folder / "refs.jsonl", "a") as file:
            file.write(line + "\n")
    for name, mask in MASKS.items():
        mask.save(write_folder(world / f"mask-{name}", [record()]) / "masks" / "0.png")
    (write_folder(world / "cut-picture", [record(0), record(1)]) / "images" / "1.png").write_bytes(FILES["cut.png"])
    mixed = write_folder(world / "three", [record(0), record(1), {"image": "images/0.png"}])
    (mixed / "images" / "1.png").write_bytes(FILES["cut.png"])
    build_neighbours(world)
    (write_folder(world / "latin", []) / "refs.jsonl").write_bytes(b'{"image": "\xe9"}')
    write_refer(world / "refer")
    for name, (_, edit) in TREES.items():
        refs, tables = refer_tables()
        write_refer(world / f"tree-{name}")
        edited = edit(refs, tables) or (refs, tables)
        path = world / f"tree-{name}" / "refcoco" / "refs(unc).p"
        path.write_bytes(pickle.dumps(edited[0], protocol=0))
        path.with_name("instances.json").write_text(json.dumps(edited[1]))
    (write_refer(world / "tree-cut")).write_bytes(pickle.dumps(refer_tables()[0])[:-100])
    write_refer(world / "tree-cut-json").with_name("instances.json").write_text('{"images": [')
    write_refer(world / "tree-deep").with_name("instances.json").write_bytes(FILES["deep.json"])
    shutil.copytree(world / "refer", world / "tree-gone")
    (world / "tree-gone" / "images" / "train2014" / "COCO_train2014_000000000001.jpg").unlink()


def build_neighbours(world):
    """Pictures that are odd and good."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right
    NOISE.save(world / "exif.jpg", exif=exif)
    NOISE.convert("P").save(world / "palette.png")
    NOISE.convert("L").save(world / "grey.png")
    NOISE.convert("LA").save(world / "see-through.png")
    Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13).save(world / "16-bit.png")
    Image.new("RGB", (1, 1), "blue").save(world / "one.png")
    Image.new("RGB", (20000, 8), "blue").save(world / "wide.png")
    NOISE.save(world / "animated.gif", save_all=True, append_images=[NOISE.rotate(90), NOISE.rotate(180)])
    shutil.copy(world / "photo.png", os.fsencode(world) + b"/caf\xe9.png")  # a name from an older system


def build_checkpoints(world):
    for name, (edit, _) in (CHECKPOINTS | RUNS).items():
        file = torch.load(world / "run" / "last.pt", weights_only=True)
        edit(file)
        torch.save(file, world / f"{name}.pt")
    (world / "cut.pt").write_bytes((world / "run" / "last.pt").read_bytes()[:-5000])
