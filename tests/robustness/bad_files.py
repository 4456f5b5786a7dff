"""What test_bad_input.py feeds the commands: hostile, damaged and odd but good files, by name."""

import io
import json
import os
import pickle
import shutil
import zlib

import numpy as np
import torch
from PIL import Image

from checkpoint import VERSION
from conftest import HEIGHT, WIDTH, record, rectangle, refer_tables, write_folder, write_refer


class Code:
    """Pickled, it asks whoever loads it to make a folder: the proof that code ran."""

    def __reduce__(self):
        return os.mkdir, ("CODE-RAN",)


def encode(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def torch_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def png_chunk(kind, content):
    length = len(content).to_bytes(4, "big")
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return length + kind + content + checksum


def bomb():
    """A PNG of a hundred bytes whose header promises 60,000 × 60,000 pixels."""
    side = (60000).to_bytes(4, "big")
    header = png_chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    pixels = png_chunk(b"IDAT", zlib.compress(b"0"))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + png_chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
HOSTILE = {"version": VERSION, "config": {}, "tuned": Code()}
ALMOST_OFFICIAL = {"state_dict": {"module.backbone.visual.conv1.weight": torch.zeros(3)}}
FILES = {  # name: content
    "photo.png": encode(NOISE),
    "empty.png": b"",
    "text.png": b"not an image",
    "cut.png": encode(NOISE)[:2000],
    "cut.jpg": encode(NOISE, "JPEG")[:1500],
    "cut.gif": encode(NOISE, "GIF")[:30],
    "bomb.png": bomb(),
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "empty.pt": b"",
    "text.pt": b"not a checkpoint",
    "code.pt": pickle.dumps(HOSTILE),
    "code-zip.pt": torch_file(HOSTILE),
    "number.pt": torch_file(5),
    "other.pt": torch_file({"weight": torch.zeros(2, 2)}),
    "names.pt": torch_file({5: torch.zeros(2), "weight": "text"}),
    "official-like.pt": torch_file(ALMOST_OFFICIAL),
    "state-5.pt": torch_file({"state_dict": 5}),
    "mixed/bad.png": b"not an image",
    "spoilt/bad.png": b"not an image",
    "mixed/good.png": encode(NOISE),
    "deep.json": b"[" * 100_000,
    "hollow/readme.txt": b"no image here",
}


# ------------------------------------------------------------------------------------------- edits
def set_in(*path_and_value):
    """An edit of nested containers.

    set_in("config", "size", 5)(file) sets file["config"]["size"] = 5.
    """
    *path, key, value = path_and_value

    def edit(container):
        for step in path:
            container = container[step]
        container[key] = value

    return edit


def drop(*path):
    """The edit that deletes what lies at the end of the path."""
    *path, key = path

    def edit(container):
        for step in path:
            container = container[step]
        del container[key]

    return edit


def first_tensor_is_text(file):
    tensors = file["tuned"]
    tensors[next(iter(tensors))] = "x"


def bias_is_nan(file):
    file["tuned"]["projector.txt.bias"].fill_(float("nan"))


CHECKPOINTS = {  # name: an edit of run/last.pt, what the line names beside the file
    "version": (set_in("version", 99), "version 99"),
    "version-1": (set_in("version", 1), "version 1"),
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
    "tuned-text": (first_tensor_is_text, ""),
    "tuned-less": (drop("tuned", "projector.txt.weight"), "projector.txt.weight"),
    "tuned-more": (set_in("tuned", "clip.logit_scale", torch.zeros(())), "clip.logit_scale"),
    "tuned-shape": (
        set_in("tuned", "projector.txt.weight", torch.zeros(2, 2)),
        "projector.txt.weight",
    ),
    "tuned-nan": (bias_is_nan, "finite"),
}
RUNS = {  # the same, for --resume
    "a-model": (set_in("training", None), "last.pt"),
    "no-random": (drop("training", "random"), "random"),
    "no-args": (drop("args"), "args"),
    "optimizer": (set_in("training", "optimizer", {"state": {}, "param_groups": []}), ""),
    "torch-state": (set_in("training", "random", "torch", torch.zeros(5)), ""),
    "steps-text": (set_in("training", "state", "global_step", "many"), ""),
}
LINES = {  # name: a second line of refs.jsonl
    "json": "{not json",
    "list": "[1]",
    "deep": "[" * 100_000,
    "no-mask": json.dumps({"image": "images/0.png", "sentences": ["x"]}),
    "no-sentences": json.dumps({"image": "images/0.png", "mask": "masks/0.png"}),
    "blank": json.dumps(record(sentences=["\t \u200b"])),
    "none": json.dumps(record(sentences=[])),
    "one-text": json.dumps(record(sentences="a cup")),
    "number": json.dumps(record(sentences=[5])),
    "nothing-inside": json.dumps(record(sentences=[[None]])),
    "twice": json.dumps(record(ref_id=0)),
    "id-text": json.dumps(record(ref_id="x")),
    "id-half": json.dumps(record(ref_id=1.5)),
    "id-nan": json.dumps(record(ref_id=float("nan"))),
    "sent-ids": json.dumps(record(sent_ids=[1, 2])),
    "split": json.dumps(record(split=5)),
    "up": json.dumps(record(image="../photo.png")),
    "absolute": json.dumps(record(mask="/etc/hostname")),
    "gone": json.dumps(record(mask="masks/none.png")),
    "folder": json.dumps(record(image="images")),
    "null-byte": json.dumps(record(image="images/\0.png")),
    "image-5": json.dumps(record(image=5)),
}
MASKS = {  # name: what lies in the place of masks/0.png
    "gray": Image.fromarray(rectangle(0, 0, 5, 5).astype(np.uint8) * 128),
    "soft": Image.linear_gradient("L").resize((WIDTH, HEIGHT)),
    "size": Image.new("L", (WIDTH + 1, HEIGHT), 255),
}


def edit_refs(edit):
    """An edit of (refs, instances) that changes the refs only."""

    def edit_both(refs, instances):
        edit(refs)

    return edit_both


def edit_instances(edit):
    """An edit of (refs, instances) that changes the instances only."""

    def edit_both(refs, instances):
        edit(instances)

    return edit_both


def set_height(height):
    return edit_instances(set_in("images", 0, "height", height))


def set_polygon(polygon):
    return edit_instances(set_in("annotations", 0, "segmentation", [polygon]))


def set_rle(key, value):
    return edit_instances(set_in("annotations", 1, "segmentation", key, value))


def replace_refs(new_refs):
    """An edit of (refs, instances) that returns both anew."""

    def replace(refs, instances):
        return new_refs, instances

    return replace


def replace_instances(refs, instances):
    return refs, []


FAR = 1e18
TREES = {  # name: what is named, an edit of (refs, instances)
    "refs-number": ("refs(unc).p", replace_refs(5)),
    "refs-dict": ("refs(unc).p", replace_refs({"a": 1})),
    "refs-code": ("refs(unc).p", replace_refs([Code()])),
    "ref-no-split": ("refs(unc).p", edit_refs(drop(0, "split"))),
    "ref-no-sentences": ("refs(unc).p", edit_refs(set_in(0, "sentences", []))),
    "ref-sentence-number": ("refs(unc).p", edit_refs(set_in(0, "sentences", 0, "sent", 5))),
    "ref-other-image": ("refs(unc).p", edit_refs(set_in(0, "image_id", 77))),
    "ref-other-mask": ("refs(unc).p", edit_refs(set_in(0, "ann_id", 77))),
    "ref-id-text": ("refs(unc).p", edit_refs(set_in(0, "ref_id", "x"))),
    "instances-list": ("instances.json", replace_instances),
    "instances-no-height": ("instances.json", edit_instances(drop("images", 0, "height"))),
    "height-huge": ("the mask of ref 10", set_height(10**9)),
    "height-negative": ("the mask of ref 10", set_height(-HEIGHT)),
    "height-text": ("the mask of ref 10", set_height("30")),
    "other-size": ("the mask of ref 10", set_height(HEIGHT + 1)),
    "polygon-text": ("the mask of ref 10", set_polygon(["a"] * 6)),
    "polygon-nan": ("the mask of ref 10", set_polygon([float("nan")] * 6)),
    "polygon-far": ("the mask of ref 10", set_polygon([0, 0, 9, FAR, FAR, 9])),
    "polygon-line": ("the mask of ref 10", set_polygon([1, 1, 2, 2])),
    "runs-short": ("the mask of ref 11", set_rle("counts", [5, 5])),
    "runs-negative": ("the mask of ref 11", set_rle("counts", [-5, 1205])),
    "runs-text": ("the mask of ref 11", set_rle("counts", "~~~~~~")),
    "runs-size": ("the mask of ref 11", set_rle("size", [10**6, 10**6])),
}


# ------------------------------------------------------------------------------------- on the disk
def build_world(world):
    """Every good and bad file there is, each under the name its case gives it."""
    for name, content in FILES.items():
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_bytes(content)
    build_folders(world)
    build_neighbors(world)
    build_trees(world)


def build_folders(world):
    """Folders of one's own: a good one, and one for each bad line, mask or image."""
    write_folder(world / "own", [record(0), record(1)])
    for name, line in LINES.items():
        folder = write_folder(world / f"line-{name}", [record()])
        with open(folder / "refs.jsonl", "a") as file:
            file.write(line + "\n")
    for name, mask in MASKS.items():
        folder = write_folder(world / f"mask-{name}", [record()])
        mask.save(folder / "masks" / "0.png")
    folder = write_folder(world / "cut-image", [record(0), record(1)])
    (folder / "images" / "1.png").write_bytes(FILES["cut.png"])
    folder = write_folder(world / "three", [record(0), record(1), {"image": "images/0.png"}])
    (folder / "images" / "1.png").write_bytes(FILES["cut.png"])
    folder = write_folder(world / "latin", [])
    (folder / "refs.jsonl").write_bytes(b'{"image": "\xe9"}')


def build_neighbors(world):
    """Images that are odd and good."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right
    NOISE.save(world / "exif.jpg", exif=exif)
    NOISE.convert("P").save(world / "palette.png")
    NOISE.convert("L").save(world / "gray.png")
    NOISE.convert("LA").save(world / "see-through.png")
    ramp = np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13
    Image.fromarray(ramp).save(world / "16-bit.png")
    Image.new("RGB", (1, 1), "blue").save(world / "one.png")
    Image.new("RGB", (20000, 8), "blue").save(world / "wide.png")
    frames = [NOISE.rotate(90), NOISE.rotate(180)]
    NOISE.save(world / "animated.gif", save_all=True, append_images=frames)
    # a name from an older system, which is not UTF-8
    shutil.copy(world / "photo.png", os.fsencode(world) + b"/caf\xe9.png")


def build_trees(world):
    """RefCOCO: a good tree, and one for each damage."""
    write_refer(world / "refer")
    for name, (_, edit) in TREES.items():
        write_refer(world / f"tree-{name}")
        refs, instances = refer_tables()
        refs, instances = edit(refs, instances) or (refs, instances)
        path = world / f"tree-{name}" / "refcoco" / "refs(unc).p"
        path.write_bytes(pickle.dumps(refs, protocol=0))
        path.with_name("instances.json").write_text(json.dumps(instances))
    refs_file = write_refer(world / "tree-cut")
    refs_file.write_bytes(pickle.dumps(refer_tables()[0])[:-100])
    refs_file = write_refer(world / "tree-cut-json")
    refs_file.with_name("instances.json").write_text('{"images": [')
    refs_file = write_refer(world / "tree-deep")
    refs_file.with_name("instances.json").write_bytes(FILES["deep.json"])
    shutil.copytree(world / "refer", world / "tree-gone")
    image = "COCO_train2014_000000000001.jpg"
    (world / "tree-gone" / "images" / "train2014" / image).unlink()


def build_checkpoints(world):
    """The checkpoint of the world's own run, edited."""
    for name, (edit, _) in (CHECKPOINTS | RUNS).items():
        file = torch.load(world / "run" / "last.pt", weights_only=True)
        edit(file)
        torch.save(file, world / f"{name}.pt")
    whole = (world / "run" / "last.pt").read_bytes()
    (world / "cut.pt").write_bytes(whole[:-5000])
