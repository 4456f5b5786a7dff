"""prepare.py from-coco and from-labelme: the tools' own masks, whole or not at all, or one line."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as coco

import data
import prepare
from data import open_dataset
from utils import annotations

HEIGHT = 60
WIDTH = 80
SQUARE = [10, 5, 30, 5, 30, 25, 10, 25]
TRIANGLE = [40, 10, 70, 10, 70, 50]


# ------------------------------------------------------------------------------------------ helpers
def save_photo(path, size=(WIDTH, HEIGHT), orientation=1):
    """A photograph whose upper left quarter is white, as it is stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "gray")
    image.paste("white", (0, 0, size[0] // 2, size[1] // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


def annotation(number=1, segmentation=(SQUARE,), **more):
    row = {"id": number, "image_id": 7, "category_id": 1, "bbox": [10, 5, 20, 20]}
    if isinstance(segmentation, tuple):
        segmentation = list(segmentation)
    return row | {"segmentation": segmentation, "iscrowd": 0, "area": 400} | more


def coco_file(folder, rows, name="a.png", **image):
    """instances.json in `folder`, of one image; the image is a.png in folder/photos."""
    if not (folder / "photos").exists():
        save_photo(folder / "photos" / "a.png")
    image = {"id": 7, "file_name": name, "height": HEIGHT, "width": WIDTH} | image
    content = {
        "images": [image],
        "annotations": rows,
        "categories": [{"id": 1, "name": "cup", "supercategory": "none"}],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def from_coco(folder, *options):
    files = [str(folder / "instances.json"), "--images", str(folder / "photos")]
    prepare.main(["from-coco", *files, "--out", str(folder / "mine"), *options])
    return lines_of(folder / "mine")


def shape(points, kind="polygon", label="cup", **more):
    row = {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}}
    return row | more


def labelme_file(folder, shapes, name="a", **more):
    """a.json in folder/notes, with a.jpg beside it."""
    if not (folder / "notes" / f"{name}.jpg").exists():
        save_photo(folder / "notes" / f"{name}.jpg")
    content = {
        "version": "5.4.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{name}.jpg",
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }
    path = folder / "notes" / f"{name}.json"
    path.write_text(json.dumps(content | more, ensure_ascii=False), encoding="utf-8")
    return path


def from_labelme(folder, *options):
    out = str(folder / "mine")
    prepare.main(["from-labelme", str(folder / "notes"), "--out", out, *options])
    return lines_of(folder / "mine")


def lines_of(folder):
    """The records of a folder of one's own, each with the sample that data.py reads for it."""
    lines = (folder / "refs.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    samples = {split: open_dataset(str(folder), split) for split in {r["split"] for r in records}}
    counters = dict.fromkeys(samples, 0)
    for record in records:
        split = record["split"]
        record["sample"] = samples[split][counters[split]]
        counters[split] += 1
    return records


def refusal(run, folder, capsys, *options):
    """The one line of an attempt that is refused and leaves the folder as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run(folder, *options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    return error


def coco_mask(segmentation, height=HEIGHT, width=WIDTH):
    """What pycocotools draws for polygons."""
    return coco.decode(coco.merge(coco.frPyObjects(segmentation, height, width))).astype(bool)


# -------------------------------------------------------------------------------------- COCO: masks
def runs_of(mask):
    """COCO's run lengths as numbers, and as text."""
    column = [False, *mask.T.ravel().tolist(), None]
    turns = [i for i in range(len(column) - 1) if column[i] != column[i + 1]]
    text = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    return np.diff([0, *turns]).tolist(), text


RUNS, TEXT = runs_of(coco_mask([SQUARE]))
SEGMENTATIONS = {
    "a polygon": [SQUARE],
    "a polygon not in a list": SQUARE,
    "a polygon of pairs": [[[10, 5], [30, 5], [30, 25], [10, 25]]],
    "a two-corner polygon first": [[3, 3, 8, 8], SQUARE],
    "a point last": [SQUARE, [3, 3]],
    "an empty polygon last": [SQUARE, []],
    "run lengths": {"size": [HEIGHT, WIDTH], "counts": RUNS},
    "compressed run lengths": {"size": [HEIGHT, WIDTH], "counts": TEXT},
    "a polygon as text": json.dumps([SQUARE]),
    "run lengths as text": json.dumps({"size": [HEIGHT, WIDTH], "counts": RUNS}),
    "the text of compressed run lengths": TEXT,
}


@pytest.mark.parametrize("kind", SEGMENTATIONS)
@pytest.mark.parametrize("crowd", [0, 1])
def test_every_way_to_write_a_mask_gives_pycocotools_own(tmp_path, kind, crowd):
    coco_file(tmp_path, [annotation(3, SEGMENTATIONS[kind], iscrowd=crowd)])
    [record] = from_coco(tmp_path)
    np.testing.assert_array_equal(record["sample"].mask, coco_mask([SQUARE]))
    assert record["sentences"] == ["cup"]


def test_several_polygons_are_one_object(tmp_path):
    coco_file(tmp_path, [annotation(3, [SQUARE, TRIANGLE])])
    [record] = from_coco(tmp_path)
    np.testing.assert_array_equal(record["sample"].mask, coco_mask([SQUARE, TRIANGLE]))


def test_the_text_of_run_lengths_may_begin_as_json_does(tmp_path):
    """A run of 43 pixels is written [1."""
    mask = np.ones((HEIGHT, WIDTH), bool)
    mask[:43, 0] = False
    text = runs_of(mask)[1]
    assert text.startswith("[1")
    coco_file(tmp_path, [annotation(3, text)])
    [record] = from_coco(tmp_path)
    np.testing.assert_array_equal(record["sample"].mask, mask)


BOX_ONLY = {
    "an empty list": [],
    "none": None,
    "an empty text": "",
    "an empty list as text": "[]",
    "a line": [[3, 3, 8, 8]],
}


@pytest.mark.parametrize("kind", BOX_ONLY)
def test_a_box_without_a_mask_is_refused_left_out_or_filled_as_one_asks(tmp_path, capsys, kind):
    """It ended with a traceback and half a folder."""
    boxed = annotation(2, BOX_ONLY[kind], bbox=[3.4, 7.5, 10, 20.2])
    coco_file(tmp_path, [annotation(1), boxed, annotation(3, [TRIANGLE])])
    error = refusal(from_coco, tmp_path, capsys)
    assert "of 3 annotations 1 with a box and no mask" in error
    assert "--boxes skip" in error and "--boxes fill" in error

    records = from_coco(tmp_path, "--boxes", "skip")
    assert len(records) == 2
    assert "1 annotations with a box and no mask: left out" in capsys.readouterr().out
    (tmp_path / "mine").rename(tmp_path / "skipped")

    records = from_coco(tmp_path, "--boxes", "fill")
    [box] = coco.frPyObjects(np.array([[3.4, 7.5, 10, 20.2]]), HEIGHT, WIDTH)
    np.testing.assert_array_equal(records[1]["sample"].mask, coco.decode(box))
    filled = "1 annotations with a box and no mask: the boxes are taken as masks"
    assert filled in capsys.readouterr().out


def test_neither_mask_nor_box_is_left_out_and_counted(tmp_path, capsys):
    """As in files of captions."""
    bare = {"id": 2, "image_id": 7, "caption": "a cup"}
    coco_file(tmp_path, [annotation(1), bare])
    assert "1 with neither mask nor box" in refusal(from_coco, tmp_path, capsys)
    assert len(from_coco(tmp_path, "--boxes", "fill")) == 1
    assert "1 annotations with neither mask nor box: left out" in capsys.readouterr().out


def test_an_object_without_a_pixel_is_left_out_and_counted(tmp_path, capsys):
    tiny = [[10.1, 10.1, 10.2, 10.1, 10.2, 10.2]]
    assert not coco_mask(tiny).any()
    coco_file(tmp_path, [annotation(1), annotation(2, tiny)])
    assert len(from_coco(tmp_path)) == 1
    assert "1 objects that hold no pixel: left out" in capsys.readouterr().out
    (tmp_path / "mine").rename(tmp_path / "before")
    coco_file(tmp_path, [annotation(2, tiny)])
    assert "no object holds a pixel" in refusal(from_coco, tmp_path, capsys)


# ---------------------------------------------------------------------------------- COCO: sentences
SENTENCES = {  # name: fields of an annotation, its sentences
    "sentences": ({"sentences": ["the red cup", "cup"]}, ["the red cup", "cup"]),
    "RefCOCO's": ({"sentences": [{"sent": "red cup", "tokens": []}]}, ["red cup"]),
    "one text": ({"sentences": "red cup"}, ["red cup"]),
    "caption": ({"caption": "a  red\ncup"}, ["a red cup"]),
    "description": ({"description": "a red cup"}, ["a red cup"]),
    "the first that says something": ({"sentences": [], "caption": " ", "description": "x"}, ["x"]),
    "CVAT's attribute": ({"attributes": {"occluded": False, "caption": "x"}}, ["x"]),
    "the category": ({"caption": None, "attributes": {"occluded": False}}, ["cup"]),
    "accents": ({"caption": "une tasse à café 流"}, ["une tasse à café 流"]),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_come_from_the_fields_that_tools_have_for_them(tmp_path, name):
    fields, expected = SENTENCES[name]
    coco_file(tmp_path, [annotation(1, **fields)])
    [record] = from_coco(tmp_path)
    assert record["sentences"] == expected
    assert list(record["sample"].sentences) == expected


def test_objects_that_share_a_sentence_are_counted(tmp_path, capsys):
    rows = [annotation(1), annotation(2, [TRIANGLE]), annotation(3, [TRIANGLE], caption="other")]
    coco_file(tmp_path, rows)
    from_coco(tmp_path)
    assert "note: 2 objects share a sentence with another of their image" in capsys.readouterr().out


# ----------------------------------------------------------------------------- COCO: names of files
NAMES = {  # what the annotations say: what is on the disk below photos/
    "images\\x.png": "images/x.png",
    "C:\\Users\\me\\x.png": "x.png",
    "my%20photo%20%C3%A9.png": "my photo é.png",
    "caf\u00e9.png": "cafe\u0301.png",  # accents as macOS writes them
    "X.PNG": "x.png",
    "x.png": "deep/er/x.png",
    "train/x.png": "x.png",
    "/data/upload/3/0a1b2c3d-x.png": "x.png",
    "upload/3/0a1b2c3d-my_x.png": "my_x.png",
    "images\\0a1b2c3d-x.png": "images/0a1b2c3d-x.png",
    "plain.png": "0a1b2c3d-plain.png",
    "/data/local-files/?d=set%20a/x.png": "set a/x.png",
    "/data/local-files/?d=x.png": "x.png",
    "http://localhost:8080/data/x.png?token=abc": "x.png",
    "http://localhost:8080/data/my%20photo.png": "my photo.png",
    "https://host/data/x.png?key=a/b": "x.png",
    "https://host/data/my%20photo.png?signature=a%2Fb": "my photo.png",
    "my+photo.png": "my photo.png",
    "x_jpg.rf.5f2b1c9e0a7d4e3f8b6a1c2d3e4f5a6b.jpg": "x.jpg",
    "x_png.rf.5f2b.jpg": "train/x_png.rf.5f2b.jpg",
    "y.jpg": "y_jpg.rf.5f2b.jpg",
    "z_jpg.rf.Ab-9_z.jpg": "z.jpg",
}


@pytest.mark.parametrize("name", NAMES)
def test_images_are_found_under_the_names_that_tools_write(tmp_path, name):
    save_photo(tmp_path / "photos" / NAMES[name])
    save_photo(tmp_path / "photos" / "another.png")
    (tmp_path / "photos" / "._x.png").write_bytes(b"macOS")
    coco_file(tmp_path, [annotation()], name=name)
    [record] = from_coco(tmp_path)
    np.testing.assert_array_equal(record["sample"].mask, coco_mask([SQUARE]))


def test_of_files_with_the_same_name_the_folder_decides_or_nobody(tmp_path, capsys):
    for folder in ("train", "val"):
        save_photo(tmp_path / "photos" / folder / "x.png")
    coco_file(tmp_path, [annotation()], name="export\\val\\x.png")
    path = annotations.ImageFinder(tmp_path / "photos").find("export\\val\\x.png")
    assert path == tmp_path / "photos" / "val" / "x.png"
    assert len(from_coco(tmp_path)) == 1
    (tmp_path / "mine").rename(tmp_path / "before")
    coco_file(tmp_path, [annotation()], name="x.png")
    error = refusal(from_coco, tmp_path, capsys)
    assert "train/x.png or" in error and "val/x.png" in error


def test_two_names_that_lead_to_one_file_are_refused(tmp_path, capsys):
    """Roboflow turns and mirrors copies of a photograph: the photograph itself would be wrong."""
    save_photo(tmp_path / "photos" / "x.jpg")
    path = coco_file(tmp_path, [annotation(1), annotation(2, image_id=8)], name="x_jpg.rf.1a.jpg")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["images"].append(content["images"][0] | {"id": 8, "file_name": "x_jpg.rf.2b.jpg"})
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "the same file" in refusal(from_coco, tmp_path, capsys)


def two_rows(folder, first, second, orientation=1):
    """instances.json with two rows of images for one file, as an export merged from two has."""
    save_photo(folder / "photos" / "a.png", orientation=orientation)
    path = coco_file(folder, [annotation(1), annotation(2, [TRIANGLE], image_id=8)])
    content = json.loads(path.read_text(encoding="utf-8"))
    row = content["images"][0]
    content["images"] = [row | first, row | {"id": 8} | second]
    path.write_text(json.dumps(content), encoding="utf-8")


def test_two_rows_of_one_file_must_both_have_its_size(tmp_path, capsys):
    """Of the second one it was not looked at: two photographs of one name, and one is here."""
    two_rows(tmp_path, {}, {})
    assert [record["image"] for record in from_coco(tmp_path)] == ["images/a.png"] * 2
    (tmp_path / "mine").rename(tmp_path / "before")
    two_rows(tmp_path, {}, {"width": 2 * WIDTH, "height": 2 * HEIGHT})
    assert "image 8: height and width are (120, 160)" in refusal(from_coco, tmp_path, capsys)


@pytest.mark.parametrize("size", [{"width": WIDTH, "height": HEIGHT}, {"width": 0, "height": 0}])
def test_two_rows_of_one_file_must_have_it_the_same_way_up(tmp_path, capsys, size):
    two_rows(tmp_path, size, {"width": HEIGHT, "height": WIDTH}, orientation=6)
    error = refusal(from_coco, tmp_path, capsys)
    assert "image 8: a.png is annotated as it is stored and as EXIF turns it" in error


@pytest.mark.parametrize("name, file", [("x_jpg.rf.1a.jpg", "x.jpg"), ("x.jpg", "x_jpg.rf.1a.jpg")])
def test_roboflows_version_in_place_of_a_photograph_is_said(tmp_path, capsys, name, file):
    """It may be mirrored, which no file tells."""
    save_photo(tmp_path / "photos" / file)
    coco_file(tmp_path, [annotation()], name=name)
    assert len(from_coco(tmp_path)) == 1
    assert "note: 1 images are Roboflow's versions" in capsys.readouterr().out
    coco_file(tmp_path, [annotation()], name=file)
    (tmp_path / "mine").rename(tmp_path / "before")
    assert len(from_coco(tmp_path)) == 1
    assert "Roboflow" not in capsys.readouterr().out


def test_missing_images_are_counted_and_the_first_is_named(tmp_path, capsys):
    path = coco_file(tmp_path, [annotation(1), annotation(2, image_id=8)], name="none.png")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["images"].append(content["images"][0] | {"id": 8, "file_name": "nor.png"})
    path.write_text(json.dumps(content), encoding="utf-8")
    error = refusal(from_coco, tmp_path, capsys)
    assert "none.png is not in" in error and "and 1 more images: check --images" in error


def test_files_get_names_that_every_system_takes(tmp_path):
    """Two photographs of one name, and one whose name has what Windows forbids."""
    names = ["a/x.png", "b/X.png", "c/what?.png"]
    for name in names:
        save_photo(tmp_path / "photos" / name)
    rows = [annotation(i, image_id=i) for i in range(3)]
    path = coco_file(tmp_path, rows)
    content = json.loads(path.read_text(encoding="utf-8"))
    image = content["images"][0]
    content["images"] = [image | {"id": i, "file_name": name} for i, name in enumerate(names)]
    path.write_text(json.dumps(content), encoding="utf-8")
    records = from_coco(tmp_path)
    images = ["images/x.png", "images/X-2.png", "images/what_.png"]
    assert [record["image"] for record in records] == images
    assert [record["mask"] for record in records][1:] == ["masks/X-2_0.png", "masks/what__0.png"]


# -------------------------------------------------------------------------------------- COCO: units
def large(folder, rows, size=(640, 480)):
    save_photo(folder / "photos" / "a.png", size)
    return coco_file(folder, rows, width=size[0], height=size[1])


PERCENT = [12.5, 20.0, 62.5, 20.0, 62.5, 75.0, 12.5, 75.0]


def test_percent_where_pixels_are_promised_are_refused(tmp_path, capsys):
    """All of a large image's coordinates below 100, or some of a small image's outside."""
    large(tmp_path, [annotation(1, [PERCENT])])
    error = refusal(from_coco, tmp_path, capsys)
    assert "coordinates up to 75 look like percent" in error and "--pixels" in error
    coco_file(tmp_path / "small", [annotation(1, [PERCENT])])
    assert "look like percent" in refusal(from_coco, tmp_path / "small", capsys)
    large(tmp_path, [annotation(1, [], bbox=[12.5, 20, 50, 55])])
    assert "look like percent" in refusal(from_coco, tmp_path, capsys, "--boxes", "fill")


def test_shares_where_pixels_are_promised_are_refused(tmp_path, capsys):
    coco_file(tmp_path, [annotation(1, [[x / 100 for x in PERCENT]])])
    assert "look like shares of the image" in refusal(from_coco, tmp_path, capsys)


def test_pixels_that_look_like_percent_are_taken_if_one_says_so(tmp_path):
    large(tmp_path, [annotation(1, [PERCENT])])
    [record] = from_coco(tmp_path, "--pixels")
    np.testing.assert_array_equal(record["sample"].mask, coco_mask([PERCENT], 480, 640))


def test_pixels_are_not_taken_for_percent(tmp_path):
    """One object in the corner of a middling image, or one anywhere else in a large one."""
    large(tmp_path, [annotation(1)], (160, 120))
    assert len(from_coco(tmp_path)) == 1
    (tmp_path / "mine").rename(tmp_path / "before")
    large(tmp_path, [annotation(1), annotation(2, [[300, 10, 400, 10, 400, 90]])])
    assert len(from_coco(tmp_path)) == 2


# --------------------------------------------------------------------------------------- COCO: EXIF
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_masks_belong_to_the_pixels_as_they_are_stored(tmp_path, orientation, ending):
    """Image and mask agree in the new folder, for every reader: its image has no EXIF."""
    save_photo(tmp_path / "photos" / f"a.{ending}", orientation=orientation)
    coco_file(tmp_path, [annotation()], name=f"a.{ending}")
    [record] = from_coco(tmp_path)
    sample = record["sample"]
    np.testing.assert_array_equal(sample.mask, coco_mask([SQUARE]))
    assert sample.image[:20, :30].min() > 200
    assert sample.image[:, 50:].max() < 200
    with Image.open(tmp_path / "mine" / record["image"]) as image:
        assert image.size == (WIDTH, HEIGHT)


def test_a_size_that_only_the_turned_image_has_decides(tmp_path):
    """CVAT and Label Studio annotate what they show. Turned right, the white is upper right."""
    save_photo(tmp_path / "photos" / "a.jpg", orientation=6)
    coco_file(tmp_path, [annotation()], name="a.jpg", width=HEIGHT, height=WIDTH)
    [record] = from_coco(tmp_path)
    sample = record["sample"]
    np.testing.assert_array_equal(sample.mask, coco_mask([SQUARE], WIDTH, HEIGHT))
    assert sample.image[:30, 40:].min() > 200
    with Image.open(tmp_path / "mine" / record["image"]) as image:
        assert image.size == (HEIGHT, WIDTH)
        assert 0x0112 not in image.getexif()


def test_where_the_size_does_not_tell_it_is_said_and_one_can_choose(tmp_path, capsys):
    """Turned by half, an image has the size that it had."""
    save_photo(tmp_path / "photos" / "a.jpg", orientation=3)
    coco_file(tmp_path, [annotation()], name="a.jpg")
    [record] = from_coco(tmp_path)
    assert record["sample"].image[:20, :30].min() > 200
    out = capsys.readouterr().out
    assert "1 images are turned by EXIF" in out and "taken as it is stored (--exif shown" in out
    (tmp_path / "mine").rename(tmp_path / "before")
    [record] = from_coco(tmp_path, "--exif", "shown")
    assert record["sample"].image[40:, 50:].min() > 200
    np.testing.assert_array_equal(record["sample"].mask, coco_mask([SQUARE]))


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path, capsys):
    coco_file(tmp_path, [annotation()], width=WIDTH + 1)
    assert "give the images that were annotated" in refusal(from_coco, tmp_path, capsys)


@pytest.mark.parametrize("size", [{"height": None, "width": None}, {"height": 0, "width": 0}])
def test_a_size_that_is_not_stated_is_the_images(tmp_path, size):
    coco_file(tmp_path, [annotation()], **size)
    assert len(from_coco(tmp_path)) == 1


# ------------------------------------------------------------------------------------------- splits
def many(folder, count=10, **fields):
    """`count` images with two objects each."""
    path = coco_file(folder, [])
    content = json.loads(path.read_text(encoding="utf-8"))
    row = content["images"][0]
    content["images"] = []
    for i in range(count):
        save_photo(folder / "photos" / f"{i}.png")
        more = {key: values[i] for key, values in fields.items()}
        content["images"].append(row | {"id": i, "file_name": f"{i}.png"} | more)
        rows = [annotation(2 * i, image_id=i), annotation(2 * i + 1, [TRIANGLE], image_id=i)]
        content["annotations"] += rows
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def splits_of(records):
    """{image: its splits}"""
    found = {}
    for record in records:
        found.setdefault(record["image"], set()).add(record["split"])
    return found


def test_a_share_of_the_images_becomes_val_by_the_seed(tmp_path):
    many(tmp_path)
    found = []
    for number, seed in enumerate(["0", "0", "1"]):
        splits = splits_of(from_coco(tmp_path, "--split", "0.3", "--seed", seed))
        assert all(len(split) == 1 for split in splits.values())
        assert list(splits.values()).count({"val"}) == 3
        found.append(splits)
        (tmp_path / "mine").rename(tmp_path / f"before-{number}")
    assert found[0] == found[1] != found[2]


def test_the_tools_own_splits_are_kept_and_a_name_overrules_them(tmp_path, capsys):
    """Roboflow's valid is val."""
    many(tmp_path, 3, split=["train", "valid", "test"])
    splits = splits_of(from_coco(tmp_path))
    assert list(splits.values()) == [{"train"}, {"val"}, {"test"}]
    (tmp_path / "mine").rename(tmp_path / "before")
    splits = splits_of(from_coco(tmp_path, "--split", "test"))
    assert list(splits.values()) == [{"test"}] * 3
    assert f"next: python data.py show {tmp_path / 'mine'} --split test" in capsys.readouterr().out


def test_without_splits_all_images_train(tmp_path):
    many(tmp_path, 2)
    assert {record["split"] for record in from_coco(tmp_path)} == {"train"}


def test_splits_for_some_images_only_are_refused(tmp_path, capsys):
    many(tmp_path, 3, split=["train", None, "val"])
    assert "1 of 3 images have no split: choose one by --split" in refusal(
        from_coco, tmp_path, capsys
    )


def test_objects_of_one_image_in_two_splits_are_refused(tmp_path, capsys):
    coco_file(tmp_path, [annotation(1, split="train"), annotation(2, [TRIANGLE], split="val")])
    assert "in split train, so it cannot be in val" in refusal(from_coco, tmp_path, capsys)


# ----------------------------------------------------------------------------------- COCO: refusals
BAD_ROWS = {  # name: fields of an annotation, what the line says
    "a list of points": ({"segmentation": [[1, 1], [9, 1], [9, 9]]}, "list of points"),
    "an odd count": ({"segmentation": [[*SQUARE, 4]]}, "pairs of numbers"),
    "text in a polygon": ({"segmentation": [["a"] * 6]}, "pairs of numbers"),
    "no number": ({"segmentation": [[float("nan")] * 6]}, "pairs of numbers"),
    "far outside": ({"segmentation": [[0, 0, 1e6, 0, 9, 9]]}, "far outside"),
    "run lengths of another image": (
        {"segmentation": {"size": [WIDTH, HEIGHT], "counts": RUNS}},
        "do not fill",
    ),
    "run lengths that end early": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}},
        "do not fill",
    ),
    "text that is no run lengths": ({"segmentation": "a box"}, ""),
    "run lengths of nothing": ({"segmentation": "mnop"}, ""),
    "text that is no JSON": ({"segmentation": "[[1, 2"}, ""),
    "a number": ({"segmentation": 5}, "segmentation is 5"),
    "a number as sentence": ({"caption": 5}, "5 is no sentence"),
    "half a character": ({"caption": "a \ud83d"}, "surrogates"),
    "no category": ({"category_id": 9}, "no sentence"),
    "a number as split": ({"split": 3}, "split is 3"),
    "another image": ({"image_id": 99}, "image 99"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_annotation_is_named_in_one_line(tmp_path, capsys, name):
    fields, says = BAD_ROWS[name]
    path = coco_file(tmp_path, [])
    content = json.loads(path.read_text(encoding="utf-8"))
    content["annotations"] = [annotation(1), annotation(2) | fields]
    path.write_text(json.dumps(content), encoding="utf-8")
    error = refusal(from_coco, tmp_path, capsys)
    assert "instances.json" in error and says in error
    assert name == "another image" or "annotation 2" in error


BAD_BOXES = [[1, 2, 3], [1, 2, 0, 5], [1, 2, -3, 5], ["a", 1, 1, 1], [1, 2, 1e9, 5], "box"]


@pytest.mark.parametrize("box", BAD_BOXES)
def test_a_bad_box_is_named_in_one_line(tmp_path, capsys, box):
    coco_file(tmp_path, [annotation(1), annotation(2, [], bbox=box)])
    assert "annotation 2" in refusal(from_coco, tmp_path, capsys, "--boxes", "fill")


def test_boxes_of_two_corners_are_told_where_one_would_leave_its_image(tmp_path, capsys):
    """[left, top, right, bottom] was taken as COCO's [left, top, width, height], and cut."""
    rows = [annotation(1, [], bbox=[5, 5, 20, 20]), annotation(2, [], bbox=[40, 30, 70, 55])]
    coco_file(tmp_path, rows)
    error = refusal(from_coco, tmp_path, capsys, "--boxes", "fill")
    assert "boxes look like [left, top, right, bottom]" in error
    # a box that is none of two corners; and one that leaves by rounding
    coco_file(tmp_path, [*rows, annotation(3, [], bbox=[50, 10, 12, 12])])
    assert len(from_coco(tmp_path, "--boxes", "fill")) == 3
    (tmp_path / "mine").rename(tmp_path / "before")
    coco_file(tmp_path, [annotation(1, [], bbox=[30, 20, 51.5, 41])])
    assert len(from_coco(tmp_path, "--boxes", "fill")) == 1


def test_a_rotated_box_is_not_filled(tmp_path, capsys):
    coco_file(tmp_path, [annotation(1, [], attributes={"rotation": 30.0})])
    assert "rotated" in refusal(from_coco, tmp_path, capsys, "--boxes", "fill")


BAD_FILES = {  # name: content, what the line says
    "no JSON": (b"{", "save it as UTF-8"),
    "another encoding": ('{"a": "é"}'.encode("cp1252"), "save it as UTF-8"),
    "Label Studio's own JSON": (b'[{"id": 1, "annotations": []}]', "export it as COCO"),
    "no annotations": (b'{"images": []}', "no 'annotations'"),
    "a table that is none": (b'{"images": 5, "annotations": []}', "'images' is no list"),
    "deep": (b"[" * 100_000, "instances.json"),
    "two categories of one id": (
        b'{"images": [], "annotations": [], "categories": '
        b'[{"id": 1, "name": "cup"}, {"id": 1, "name": "dog"}]}',
        "categories cup and dog have the same id",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_coco_is_named_in_one_line(tmp_path, capsys, name):
    content, says = BAD_FILES[name]
    coco_file(tmp_path, []).write_bytes(content)
    assert says in refusal(from_coco, tmp_path, capsys)


def test_a_file_with_a_mark_of_windows_at_its_start_is_read(tmp_path):
    path = coco_file(tmp_path, [annotation()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(from_coco(tmp_path)) == 1


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_written(tmp_path, capsys):
    path = many(tmp_path, 3)
    image = tmp_path / "photos" / "2.png"
    image.write_bytes(image.read_bytes()[:-80])
    assert "2.png" in refusal(from_coco, tmp_path, capsys)
    image.write_bytes(b"ftypheic")
    assert "2.png" in refusal(from_coco, tmp_path, capsys)
    assert path.exists()


# ------------------------------------------------------------------------------ whole or not at all
def test_a_folder_that_is_there_is_refused_and_stays(tmp_path, capsys):
    coco_file(tmp_path, [annotation()])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep", encoding="utf-8")
    assert "is there already" in refusal(from_coco, tmp_path, capsys)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_whatever_ends_it_in_the_middle_nothing_is_left(tmp_path, monkeypatch, stop):
    many(tmp_path, 4)
    before = sorted(tmp_path.rglob("*"))
    write_image = annotations.write_image
    calls = []

    def write_two(*given):
        calls.append(given)
        if len(calls) == 3:
            raise stop
        return write_image(*given)

    monkeypatch.setattr(annotations, "write_image", write_two)
    with pytest.raises(SystemExit):
        from_coco(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_above_are_made_with_the_rights_of_other_folders(tmp_path):
    coco_file(tmp_path, [annotation()])
    files = [str(tmp_path / "instances.json"), "--images", str(tmp_path / "photos")]
    prepare.main(["from-coco", *files, "--out", str(tmp_path / "a" / "b")])
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_written_is_counted_and_the_next_command_shows_it(tmp_path, capsys, monkeypatch):
    coco_file(tmp_path, [annotation(1, sentences=["a", "b"]), annotation(2, [TRIANGLE])])
    monkeypatch.chdir(tmp_path)
    prepare.main(["from-coco", "instances.json", "--images", "photos", "--out", "mine"])
    out = capsys.readouterr().out
    assert "mine: 2 objects, 3 sentences, 1 images; train 2" in out
    [command] = [line for line in out.splitlines() if line.startswith("next: ")]
    assert command == "next: python data.py show mine"
    data.main(command.split()[3:])
    assert (tmp_path / "sheet.png").exists()


# ------------------------------------------------------------------------------------------ LabelMe
def drawn(method, *points):
    """What PIL draws: the calls of LabelMe's own shape_to_mask."""
    canvas = Image.new("L", (WIDTH, HEIGHT))
    getattr(ImageDraw.Draw(canvas), method)(*points, fill=1, outline=1)
    return np.asarray(canvas) > 0


def png_text(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pasted(values, left, top):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + values.shape[0], left : left + values.shape[1]] = values
    return mask


BLOB = np.random.default_rng(0).random((11, 21)) < 0.5
RADIUS = math.hypot(12, 5)
SLANTED = [[20, 10], [50, 20], [45, 35], [15, 25]]
STAR = [[10.5, 5.2], [60.7, 30.1], [12.3, 40.9], [44.0, 3.3]]
SHAPES = {  # name: shape, its mask
    "polygon": (shape(STAR), drawn("polygon", [tuple(point) for point in STAR])),
    "no type, as in old files": (
        {"label": "cup", "points": STAR},
        drawn("polygon", [tuple(point) for point in STAR]),
    ),
    "rectangle": (
        shape([[10, 10], [50, 40]], "rectangle"),
        drawn("rectangle", (10, 10, 50, 40)),
    ),
    "rectangle from below": (
        shape([[50.6, 10.2], [10.1, 40.7]], "rectangle"),
        drawn("rectangle", (10.1, 10.2, 50.6, 40.7)),
    ),
    "rectangle of four corners": (
        shape([[10, 10], [50, 10], [50, 40], [10, 40]], "rectangle"),
        drawn("rectangle", (10, 10, 50, 40)),
    ),
    "circle": (
        shape([[40, 30], [52, 35]], "circle"),
        drawn("ellipse", (40 - RADIUS, 30 - RADIUS, 40 + RADIUS, 30 + RADIUS)),
    ),
    "oriented rectangle": (
        shape(SLANTED, "oriented_rectangle"),
        drawn("polygon", [tuple(point) for point in SLANTED]),
    ),
    "mask": (
        shape([[30, 20], [50, 30]], "mask", mask=png_text(BLOB.astype(np.uint8))),
        pasted(BLOB, 30, 20),
    ),
    "mask of 0 and 255": (
        shape([[30, 20], [50, 30]], "mask", mask=png_text(BLOB * np.uint8(255))),
        pasted(BLOB, 30, 20),
    ),
    "mask that was moved": (
        shape([[30.3, 19.6], [50.3, 29.6]], "mask", mask=png_text(BLOB)),
        pasted(BLOB, 30, 20),
    ),
    "mask over the edge": (
        shape([[70, 55], [90, 65]], "mask", mask=png_text(BLOB)),
        pasted(BLOB[:5, :10], 70, 55),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_labelme_is_drawn_as_labelme_draws_it(tmp_path, name):
    """A rectangle of 41 × 31 pixels was a diagonal of 31."""
    given, expected = SHAPES[name]
    labelme_file(tmp_path, [given])
    [record] = from_labelme(tmp_path)
    np.testing.assert_array_equal(record["sample"].mask, expected)
    assert record["sentences"] == ["cup"]
    if name == "rectangle":
        assert record["sample"].mask.sum() == 41 * 31


def test_shapes_of_one_group_and_label_are_one_object(tmp_path):
    """Two halves of a cup behind a pole were two objects with the same sentence."""
    shapes = [
        shape([[5, 5], [15, 25]], "rectangle", group_id=0),
        shape([[5, 40], [15, 50]], "rectangle"),
        shape([[25, 5], [35, 25]], "rectangle", group_id=0),
        shape([[45, 5], [55, 25]], "rectangle", group_id=0, label="pole"),
        shape([[45, 40], [55, 50]], "rectangle"),
    ]
    labelme_file(tmp_path, shapes)
    records = from_labelme(tmp_path)
    halves = drawn("rectangle", (5, 5, 15, 25)) | drawn("rectangle", (25, 5, 35, 25))
    assert [record["sentences"] for record in records] == [["cup"], ["cup"], ["pole"], ["cup"]]
    np.testing.assert_array_equal(records[0]["sample"].mask, halves)


@pytest.mark.parametrize("group", [None, "", float("nan")])
def test_shapes_without_a_group_stay_alone(tmp_path, group):
    labelme_file(tmp_path, [shape(STAR, group_id=group), shape(SLANTED, group_id=group)])
    assert len(from_labelme(tmp_path)) == 2


def test_an_image_with_two_files_is_one_image_in_one_split(tmp_path, capsys):
    """A copy in train and one in val would be a leak."""
    for name in "ab":
        labelme_file(tmp_path, [shape(STAR, label=name)], name=name, imagePath="a.jpg")
    records = from_labelme(tmp_path)
    assert [record["sentences"] for record in records] == [["a"], ["b"]]
    assert len({record["image"] for record in records}) == 1
    (tmp_path / "mine").rename(tmp_path / "before")
    for name, split in {"a": "train", "b": "val"}.items():
        labelme_file(tmp_path, [shape(STAR)], name=name, imagePath="a.jpg", split=split)
    assert "b.json: its image is in split train" in refusal(from_labelme, tmp_path, capsys)


def test_an_image_with_two_files_is_the_same_way_up_in_both(tmp_path, capsys):
    """The second file's masks were cut at the first one's size."""
    save_photo(tmp_path / "notes" / "a.jpg", orientation=6)
    labelme_file(tmp_path, [shape(STAR)])
    turned = {"imageHeight": WIDTH, "imageWidth": HEIGHT, "imagePath": "a.jpg"}
    labelme_file(tmp_path, [shape([[10, 50], [50, 75]], "rectangle")], name="b", **turned)
    assert "b.json: b.json is annotated as it is stored" in refusal(from_labelme, tmp_path, capsys)


def test_points_that_are_shares_of_the_image_are_refused(tmp_path, capsys):
    """They were one pixel. Whole numbers may be pixels, and a mask's own size is known."""
    labelme_file(tmp_path, [shape([[0.1, 0.2], [0.9, 0.2], [0.5, 1]])])
    error = refusal(from_labelme, tmp_path, capsys)
    assert "a.json: points up to 1 look like shares of the image: save them as pixels" in error
    labelme_file(tmp_path, [shape([[0, 0], [1, 1]], "rectangle")])
    [record] = from_labelme(tmp_path)
    assert record["sample"].mask.sum() == 4


def test_files_in_folders_inside_are_not_read_and_said(tmp_path, capsys):
    path = labelme_file(tmp_path, [shape(STAR)])
    (tmp_path / "notes" / "more").mkdir()
    (tmp_path / "notes" / "more" / "b.JSON").write_bytes(path.read_bytes())
    assert len(from_labelme(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "1 JSON files in folders inside" in out and "b.JSON first): not read" in out


def test_descriptions_are_the_sentences_of_a_group_each_once(tmp_path):
    first = shape(STAR, group_id=1, description="the red cup")
    labelme_file(tmp_path, [first, first | {"description": ""}, first, shape(STAR, description="")])
    records = from_labelme(tmp_path)
    assert [record["sentences"] for record in records] == [["the red cup"], ["cup"]]


@pytest.mark.parametrize("kind", ["line", "linestrip", "point", "points"])
def test_what_has_no_area_is_refused_by_name(tmp_path, capsys, kind):
    labelme_file(tmp_path, [shape(STAR), shape([[10, 10], [50, 40]], kind)])
    error = refusal(from_labelme, tmp_path, capsys)
    assert f"a.json shape 2: a {kind} has no area" in error


BAD_SHAPES = {  # name: shape, what the line says
    "unknown": (shape(STAR, "cuboid"), "'cuboid' is not one of"),
    "two corners": (shape(STAR[:2]), "a polygon of 2 points"),
    "a rectangle of three": (shape(STAR[:3], "rectangle"), "a rectangle of 3 points"),
    "a slanted rectangle": (shape(SLANTED, "rectangle"), "a rectangle of 4 points"),
    "a circle of one": (shape(STAR[:1], "circle"), "a circle of 1 points"),
    "no number": (shape([[float("nan"), 1], *STAR]), "no pair of numbers"),
    "three numbers": (shape([[1, 2, 3]] * 3), "shape 1"),
    "far outside": (shape([[0, 0], [1e9, 0], [5, 5]]), "far outside"),
    "no points": ({"label": "cup", "shape_type": "polygon"}, "no 'points'"),
    "a number as label": (shape(STAR, label=5), "label 5 is no text"),
    "no label": (shape(STAR, label=" "), "neither a label nor a description"),
    "a mask of another size": (
        shape([[30, 20], [51, 30]], "mask", mask=png_text(BLOB)),
        "its points say (11, 22)",
    ),
    "a mask of another size between pixels": (
        shape([[30.5, 20.5], [60.5, 30.5]], "mask", mask=png_text(BLOB)),
        "its points say",
    ),
    "a mask that is none": (
        shape([[30, 20], [50, 30]], "mask", mask="bm8gUE5H"),
        "the mask of 'cup'",
    ),
    "no mask": (shape([[30, 20], [50, 30]], "mask", mask=None), "the mask of 'cup'"),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_a_bad_shape_is_named_in_one_line(tmp_path, capsys, name):
    bad, says = BAD_SHAPES[name]
    labelme_file(tmp_path, [bad])
    error = refusal(from_labelme, tmp_path, capsys)
    assert says in error and "a.json" in error


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_belong_to_the_image_as_it_is_shown(tmp_path, orientation):
    """LabelMe turns images as their EXIF says. The white quarter tells where it has gone."""
    save_photo(tmp_path / "notes" / "a.jpg", orientation=orientation)
    with Image.open(tmp_path / "notes" / "a.jpg") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    height, width = upright.shape[:2]
    labelme_file(tmp_path, [shape(STAR)], imageHeight=height, imageWidth=width)
    [record] = from_labelme(tmp_path)
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in STAR], fill=1, outline=1)
    np.testing.assert_array_equal(record["sample"].image, upright)
    np.testing.assert_array_equal(record["sample"].mask, np.asarray(canvas) > 0)
    with Image.open(tmp_path / "mine" / record["image"]) as image:
        assert image.size == (width, height)


def test_the_copy_of_the_image_inside_the_file_is_what_was_annotated(tmp_path):
    """The photograph beside it may be gone, or scaled since."""
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(file, "JPEG")
    inside = base64.b64encode(file.getvalue()).decode()
    save_photo(tmp_path / "notes" / "a.jpg", (20, 10))
    labelme_file(tmp_path, [shape(STAR)], imageData=inside)
    [record] = from_labelme(tmp_path)
    assert (tmp_path / "mine" / record["image"]).read_bytes() == file.getvalue()
    assert record["sample"].image[0, 0, 0] > 200


@pytest.mark.parametrize("name", ["..\\photos\\x y.jpg", "../photos/x y.jpg", "C:\\photos\\b.jpg"])
def test_the_image_is_found_where_the_file_says(tmp_path, name):
    save_photo(tmp_path / "photos" / "x y.jpg")
    save_photo(tmp_path / "notes" / "b.jpg")
    labelme_file(tmp_path, [shape(STAR)], imagePath=name)
    assert len(from_labelme(tmp_path)) == 1


def test_other_files_of_the_folder_are_left_alone(tmp_path, capsys):
    """macOS' ._a.json is no JSON. An image without objects is left out, and said."""
    labelme_file(tmp_path, [shape(STAR)])
    labelme_file(tmp_path, [], name="b")
    (tmp_path / "notes" / "._a.json").write_bytes(b"\x00\x05\x16\x07" + bytes(90))
    (tmp_path / "notes" / "c.txt").write_bytes(b"")
    assert len(from_labelme(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "1 images without objects: left out" in out
    assert "1 objects, 1 sentences, 1 images; train 1" in out


BAD_NOTES = {  # name: fields of the file, what the line says
    "another size": ({"imageHeight": 61}, "give the images that were annotated"),
    "no image": ({"imagePath": "none.jpg"}, "none.jpg is not in"),
    "no name": ({"imagePath": None}, "a.json"),
    "a damaged copy": ({"imageData": "bm8gaW1hZ2U="}, "a.json"),
    "no shapes": ({"shapes": None}, "'shapes' is no list"),
    "a shape that is none": ({"shapes": [5]}, "'shapes' is no list"),
}


@pytest.mark.parametrize("name", BAD_NOTES)
def test_a_bad_file_of_labelme_is_named_in_one_line(tmp_path, capsys, name):
    fields, says = BAD_NOTES[name]
    labelme_file(tmp_path, **{"shapes": [shape(STAR)]} | fields)
    assert says in refusal(from_labelme, tmp_path, capsys)


def test_a_folder_without_labelmes_files_is_said(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    assert "holds no JSON file" in refusal(from_labelme, tmp_path, capsys)
    (tmp_path / "notes").rmdir()
    assert "no such folder" in refusal(from_labelme, tmp_path, capsys)


def test_labelmes_splits_and_a_share(tmp_path):
    for i in range(4):
        labelme_file(tmp_path, [shape(STAR), shape(SLANTED)], name=str(i), split="val")
    assert {record["split"] for record in from_labelme(tmp_path)} == {"val"}
    (tmp_path / "mine").rename(tmp_path / "before")
    splits = splits_of(from_labelme(tmp_path, "--split", "0.25"))
    assert sorted(map(sorted, splits.values())) == [["train"]] * 3 + [["val"]]


def test_a_share_that_leaves_nothing_to_train_is_refused(tmp_path, capsys):
    labelme_file(tmp_path, [shape(STAR)])
    assert "none is left to train" in refusal(from_labelme, tmp_path, capsys, "--split", "0.5")
    for text in ("1", "0", "-1", "nan", "vall"):
        assert "neither train, val or test" in refusal(
            from_labelme, tmp_path, capsys, "--split", text
        )


def test_a_mistake_of_ours_is_a_traceback_and_leaves_nothing(tmp_path, monkeypatch):
    coco_file(tmp_path, [annotation()])
    before = sorted(tmp_path.rglob("*"))

    def broken(*_):
        raise AssertionError("ours")

    monkeypatch.setattr(annotations, "new_stem", broken)
    with pytest.raises(AssertionError, match="ours"):
        from_coco(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
