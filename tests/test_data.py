"""3b. What `data.py` promises: every way to write a mask, what is refused, letterbox there and back, seeded draws."""

import json
import os
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from conftest import HEIGHT, WIDTH, corners, record, rectangle, refer_tables, write_folder, write_refer
from PIL import Image

import data
from clip_model import PIXEL_MEAN, PIXEL_STD, UserError
from data import (
    REFER,
    TrainSet,
    count_cut,
    draw_mask,
    epoch_batches,
    letterbox,
    letterbox_mask,
    open_dataset,
    read_picture,
    train_loader,
    unletterbox,
)


# ------------------------------------------------------------------------------------------------ the RefCOCO family
@pytest.mark.parametrize("protocol", [0, 2])
def test_refs_and_sentences_are_read_from_either_pickle(tmp_path, protocol):
    """The archives hold protocol 0 of Python 2; copies in circulation were written again with 2."""
    write_refer(tmp_path, protocol=protocol)
    source = open_dataset("refcoco", "train", tmp_path)
    assert source.counts() == {"refs": 2, "sentences": 4, "images": 2}
    item = source[1]
    assert (item.ref_id, item.image_id, item.sent_ids) == (11, 1, (2, 3))
    assert item.sentences == ("left thing 1", "thing 1")
    assert item.picture.shape == (HEIGHT, WIDTH, 3) and item.picture.dtype == np.uint8


def test_bytes_of_python_2_are_read_as_text(tmp_path):
    """Protocol 0 of Python 2 writes S'…' where Python 3 writes V…: both are text here, accents too."""
    path = write_refer(tmp_path)
    old = path.read_bytes().replace(b"Vleft thing 0\n", b"S'left caf\\xe9 0'\n")
    path.write_bytes(old)
    assert open_dataset("refcoco", "train", tmp_path)[0].sentences[0] == "left café 0"


def test_two_polygons_of_one_object_are_joined(refer_tree):
    """Rows 5-14, columns 5-14 (100 pixels) and rows 10-19, columns 10-24 (150), 25 in both: 225, and none twice."""
    mask = open_dataset("refcoco", "train", refer_tree)[0].mask
    expected = rectangle(5, 5, 15, 15) | rectangle(10, 10, 20, 25)
    assert mask.dtype == bool and mask.sum() == 225
    np.testing.assert_array_equal(mask, expected)


def test_a_polygon_of_two_corners_holds_no_pixel():
    """Four numbers in front would make the library read every polygon as a box (left, top, width, height)."""
    np.testing.assert_array_equal(draw_mask([[3, 3, 8, 8], corners(5, 5, 15, 15)], HEIGHT, WIDTH)[5:15, 5:15], True)
    assert draw_mask([[3, 3, 8, 8], corners(5, 5, 15, 15)], HEIGHT, WIDTH).sum() == 100


def test_run_lengths_as_text_and_as_numbers(refer_tree):
    """COCO counts down the columns: [0, 30, …] fills the first column, not the first row."""
    np.testing.assert_array_equal(open_dataset("refcoco", "train", refer_tree)[1].mask, rectangle(10, 20, 20, 30))
    np.testing.assert_array_equal(open_dataset("refcoco", "val", refer_tree)[0].mask, rectangle(0, 0, HEIGHT, 1))


def test_run_lengths_equal_a_loop_over_pixels():
    """Slow and obvious: runs alternate outside, inside, outside …, pixel k stands in column k // H, row k % H."""
    rng = np.random.default_rng(0)
    runs = rng.multinomial(7 * 5, np.ones(9) / 9).tolist()
    slow, k = np.zeros((7, 5), bool), 0
    for number, run in enumerate(runs):
        for _ in range(run):
            slow[k % 7, k // 7] = number % 2 == 1
            k += 1
    np.testing.assert_array_equal(draw_mask({"size": [7, 5], "counts": runs}, 7, 5), slow)


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = write_refer(tmp_path)
    path.write_bytes(pickle.dumps([Hostile()], protocol=0))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p.*system"):
        open_dataset("refcoco", "train", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickle.dumps(7), pickle.dumps([{"ref_id": 1}]), b"\x80\x02]q\x00"]
)
def test_a_malformed_pickle_is_named(tmp_path, content):
    write_refer(tmp_path).write_bytes(content)
    with pytest.raises(UserError, match=r"refs\(unc\)\.p.*prepare\.py refcoco"):
        open_dataset("refcoco", "train", tmp_path)


@pytest.mark.parametrize(
    "field, value", [("ref_id", "7"), ("split", 3), ("image_id", None), ("sentences", []), ("ann_id", 5)]
)
def test_a_ref_with_a_wrong_field_is_named(tmp_path, field, value):
    refs, instances = refer_tables()
    refs[2][field] = value
    write_refer(tmp_path, tables=(refs, instances))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p"):
        open_dataset("refcoco", "train", tmp_path)


@pytest.mark.parametrize(
    "shape",
    [[], [[1, 2]], {"size": [HEIGHT, WIDTH], "counts": [5, 5]}, {"counts": 3}, {"size": [2, 2], "counts": "04"}, 7,
     {"size": [HEIGHT, WIDTH], "counts": "04"}, {"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]},
     {"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]},
     [[0, 0, 1e12, 0, 1e12, 1e12]], [[0, 0, 2.5 * WIDTH, 0, 9, 9]], [[0, 0, float("nan"), 0, 5, 5]]],
)  # fmt: skip
def test_a_broken_mask_is_named(tmp_path, shape):
    """No polygon, one of one point, run lengths that end early or belong to a smaller or a turned picture.

    And what ends the whole process inside pycocotools: corners far outside the picture, or that are no number.
    """
    refs, instances = refer_tables()
    instances["annotations"][0]["segmentation"] = shape
    write_refer(tmp_path, tables=(refs, instances))
    with pytest.raises(UserError, match="ref 10"):
        open_dataset("refcoco", "train", tmp_path)[0]


def test_a_picture_with_a_name_no_file_can_have_is_said(tmp_path):
    """The system refuses to look for it with an error of its own."""
    refs, instances = refer_tables()
    write_refer(tmp_path, tables=(refs, instances))
    instances["images"][1]["file_name"] = "x" * 300
    (tmp_path / "refcoco" / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(UserError, match=r"instances\.json: a picture's name is longer"):
        open_dataset("refcoco", "train", tmp_path)
    instances["images"][1]["file_name"] = "x" * 251 + ".jpg"  # 255 bytes are the longest that there can be
    write_refer(tmp_path, tables=(refs, instances))
    assert open_dataset("refcoco", "train", tmp_path)[1].ref_id == 11


def test_a_picture_of_another_size_than_its_mask_is_named(refer_tree):
    name = "COCO_train2014_000000000000.jpg"
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(refer_tree / "images" / "train2014" / name)
    with pytest.raises(UserError, match=rf"ref 10.*{name}"):
        open_dataset("refcoco", "train", refer_tree)[0]


def test_pictures_of_refcoco_are_taken_as_stored(refer_tree):
    """Their masks were drawn on the stored pixels; one's own pictures are turned (test below)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = refer_tree / "images" / "train2014" / "COCO_train2014_000000000000.jpg"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)
    assert open_dataset("refcoco", "train", refer_tree)[0].picture.shape == (HEIGHT, WIDTH, 3)


def test_missing_files_name_the_command_that_gets_them(tmp_path):
    with pytest.raises(UserError, match=r"prepare\.py refcocog-umd --data"):
        open_dataset("refcocog-umd", "train", tmp_path)
    write_refer(tmp_path)
    (tmp_path / "images" / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000001\.jpg is missing.*prepare\.py refcoco"):
        open_dataset("refcoco", "train", tmp_path)


def test_an_empty_split_says_which_splits_there_are(refer_tree):
    with pytest.raises(UserError, match="split testB has no refs; the splits there are: testA, train, val"):
        open_dataset("refcoco", "testB", refer_tree)
    with pytest.raises(UserError, match="split testA has no refs; the splits there are: train, val, test"):
        open_dataset("scenes", "testA")


def test_an_unknown_name_says_which_names_there_are(tmp_path):
    with pytest.raises(UserError, match="refcocoo.*scenes, .*refcocog-google"):
        open_dataset("refcocoo", "train", tmp_path)


def test_limit_takes_the_first_objects(refer_tree):
    source = open_dataset("refcoco", "train", refer_tree, limit=1)
    assert [source[i].ref_id for i in range(len(source))] == [10]
    assert len(open_dataset("scenes", "val", limit=3)) == 3
    with pytest.raises(UserError, match="--limit 0"):
        open_dataset("refcoco", "train", refer_tree, limit=0)


def test_a_mix_trains_on_no_picture_that_is_evaluated(refer_tree, capsys):
    """RefCOCO+ shows picture 1 in its testB, which is a training picture of RefCOCO: both sets lose it."""
    refs, instances = refer_tables()
    refs[1]["split"] = "testB"
    refs[3]["split"] = "train"  # testA of RefCOCO
    write_refer(refer_tree, REFER["refcoco+"], (refs, instances))
    mix = open_dataset("refcoco, refcoco+,scenes", "train", refer_tree, limit=2)
    items = [mix[i] for i in range(len(mix))]
    assert [item.image_id for item in items[:2]] == [0, 0] and len(items) == 4
    out = capsys.readouterr().out
    line = "1 refs left out, evaluation splits show their 1 pictures"
    assert f"refcoco: {line}" in out and f"refcoco+: {line}" in out
    with pytest.raises(UserError, match="one data set at a time"):
        open_dataset("refcoco,refcoco+", "val", refer_tree)


def test_the_real_sample_is_read_whole(refer_sample):
    """47 refs, 95 sentences, 35 pictures as its README counts; every mask has a pixel and its picture's size."""
    sizes = {"train": 23, "val": 7, "testA": 10, "testB": 7}
    sources = [open_dataset("refcoco", split, refer_sample) for split in sizes]
    assert [len(source) for source in sources] == list(sizes.values())
    assert sum(source.counts()["sentences"] for source in sources) == 95
    items = [source[i] for source in sources for i in range(len(source))]
    assert len({item.image_id for item in items}) == 35
    assert all(item.mask.any() and item.mask.shape == item.picture.shape[:2] for item in items)
    with pytest.raises(UserError, match="split train has no refs"):
        open_dataset("refcocog-google", "train", refer_sample)


# ------------------------------------------------------------------------------------------------ a folder of one's own
def test_a_folder_of_ones_own_fills_in_what_is_missing(tmp_path):
    """No ref_id: the record's number; no sent_id: the place in its ref; no split: train. Blank lines do not count."""
    own = write_folder(tmp_path, [record(0, sentences=["a", "b"]), record(1, ref_id=7, sent_ids=[5], split="val")])
    (own / "refs.jsonl").write_text("\n" + (own / "refs.jsonl").read_text())
    first, second = open_dataset(str(own), "train")[0], open_dataset(str(own), "val")[0]
    assert (first.ref_id, first.sent_ids, first.sentences) == (0, (0, 1), ("a", "b"))
    assert (second.ref_id, second.sent_ids, second.image_id) == (7, (5,), 1)
    np.testing.assert_array_equal(second.mask, rectangle(0, 0, 20, 10))


@pytest.mark.parametrize(
    "line, says",
    [
        ("{not json", "line 2"),
        (json.dumps([1]), "line 2"),
        ("{}", "line 2.*no 'sentences'"),
        ("0", "line 2"),
        (json.dumps({"image": "images/0.png"}), "line 2.*no 'sentences'"),
        (json.dumps(record(sentences=[" "])), "line 2.*empty"),
        (json.dumps(record(sentences=[])), "line 2.*0 sentences"),
        (json.dumps(record(sentences="a cup")), "line 2.*list"),
        (json.dumps(record(sentences=[5])), "line 2"),
        (json.dumps(record(ref_id=0)), "line 2.*ref_id 0 is taken"),
        (json.dumps(record(ref_id="x")), "line 2.*whole numbers"),
        (json.dumps(record(ref_id=2**63)), "line 2"),
        (json.dumps(record(sentences=["half a \ud83d"])), "line 2.*surrogates"),
        (json.dumps(record(sent_ids=[1, 2])), "line 2.*sent_ids"),
        (json.dumps(record(image="../x.png")), "line 2.*inside the folder"),
        (json.dumps(record(mask="/etc/hostname")), "line 2.*inside the folder"),
        (json.dumps(record(mask="masks/none.png")), "line 2.*none.png"),
        (json.dumps(record(image=5)), "line 2"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, says):
    own = write_folder(tmp_path / "own", [record()])
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "x.png")
    with open(own / "refs.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=rf"refs\.jsonl {says}"):
        open_dataset(str(own), "train")


def test_ones_own_pictures_are_turned_as_exif_says(tmp_path):
    """Orientation 6 turns 40x30 as stored into 30x40 as seen; the mask is as one saw it."""
    own, exif = write_folder(tmp_path, [record()]), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(own / "images" / "0.png", exif=exif)
    with pytest.raises(UserError, match=r"masks.0\.png.*\(30, 40\).*\(40, 30\)"):
        open_dataset(str(own), "train")[0]
    Image.new("L", (HEIGHT, WIDTH), 255).save(own / "masks" / "0.png")
    assert open_dataset(str(own), "train")[0].mask.shape == (WIDTH, HEIGHT)


def test_a_mask_may_be_written_with_ones_but_not_with_soft_edges(tmp_path):
    own = write_folder(tmp_path, [record()])
    values = rectangle(0, 0, 5, 5).astype(np.uint8)
    Image.fromarray(values).save(own / "masks" / "0.png")
    assert open_dataset(str(own), "train")[0].mask.sum() == 25
    Image.fromarray(values * 255 + rectangle(9, 9, 10, 10).astype(np.uint8) * 3).save(own / "masks" / "0.png")
    with pytest.raises(UserError, match=r"masks.0\.png: a mask holds 0 and 255 only.*\[ *0 +3 +255\]"):
        open_dataset(str(own), "train")[0]


# ------------------------------------------------------------------------------------------------ pictures
def pixel(path, image, **options):
    image.save(path, **options)
    return read_picture(path)[0, 0].tolist()


def test_pictures_of_every_mode_become_rgb(tmp_path):
    """Worked by hand: 16-bit grey 65534 / 257 = 254.99, cut to 254; half transparent black over white is 127."""
    grey16 = Image.fromarray(np.full((2, 2), 65534, np.uint16))
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(tmp_path / "a.png", Image.new("L", (2, 2), 90)) == [90, 90, 90]
    assert pixel(tmp_path / "b.png", grey16) == [254, 254, 254]
    assert pixel(tmp_path / "c.png", palette) == [255, 0, 0]
    assert pixel(tmp_path / "d.png", Image.new("RGBA", (2, 2), (0, 0, 0, 0))) == [255, 255, 255]
    assert pixel(tmp_path / "e.png", Image.new("RGBA", (2, 2), (0, 0, 0, 128))) == [127, 127, 127]
    assert pixel(tmp_path / "f.png", palette, transparency=1) == [255, 255, 255]
    assert pixel(tmp_path / "g.tif", Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == [255, 0, 0]
    assert pixel(tmp_path / "h.png", Image.new("1", (2, 2), 1)) == [255, 255, 255]
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    assert pixel(tmp_path / "i.gif", frames[0], save_all=True, append_images=frames[1:]) == [255, 0, 0]


def test_exif_turns_the_pixels(tmp_path):
    """Orientation 6: the camera was turned right, so what is stored top left is seen top right."""
    picture, exif = np.zeros((2, 3, 3), np.uint8), Image.Exif()
    picture[0, 0] = 255
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "x.png", exif=exif)
    assert np.argwhere(read_picture(tmp_path / "x.png")[..., 0] == 255).tolist() == [[0, 1]]
    assert read_picture(tmp_path / "x.png", exif=False)[0, 0, 0] == 255


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_a_bad_picture_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png"):
        read_picture(tmp_path / "x.png")


def test_a_truncated_picture_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-500])
    with pytest.raises(UserError, match=r"x\.jpg.*truncated"):
        read_picture(tmp_path / "x.jpg")


def test_a_picture_of_enormous_size_is_refused(tmp_path, monkeypatch):
    """PIL only warns up to twice its limit; here the limit is the limit."""
    Image.new("RGB", (11, 10)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"x\.png.*110 pixels"):
        read_picture(tmp_path / "x.png")


# ------------------------------------------------------------------------------------------------ letterbox
def test_letterbox_by_hand():
    """2 high, 4 wide into 8: scale 2, so 4x8 in rows 2-5; the border is CLIP's mean colour, exactly 0 normalised."""
    image, box = letterbox(np.full((2, 4, 3), 255, np.uint8), 8)
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32
    assert box.rectangle == (2, 0, 4, 8) and box.original == (2, 4)
    white = (1 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    assert torch.all(image[:, [0, 1, 6, 7]] == 0)
    torch.testing.assert_close(image[:, 2:6], white.view(3, 1, 1).expand(3, 4, 8))


def test_letterbox_of_a_square_of_the_right_size_only_normalises():
    picture = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    image, box = letterbox(picture, 6)
    expected = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / (
        torch.tensor(PIXEL_STD).view(3, 1, 1)
    )
    torch.testing.assert_close(image, expected)
    mask = picture[..., 0] > 99
    assert torch.equal(letterbox_mask(mask, box)[0], torch.from_numpy(mask).float())
    maps = torch.rand(2, 6, 6)
    assert torch.equal(unletterbox(maps, box), maps)


@pytest.mark.parametrize("height, width", [(480, 640), (640, 427), (50, 61), (1, 900), (900, 1), (16, 16)])
def test_a_map_comes_back_where_it_was(height, width):
    """Two ramps, x and y, go into the square and back: their values are the picture's own coordinates again."""
    square, box = letterbox(np.zeros((height, width, 3), np.uint8), 64)
    top, left, inner_height, inner_width = box.rectangle
    assert min(inner_height, inner_width) >= 1 and max(inner_height, inner_width) == 64
    rows = ((torch.arange(64) - top + 0.5) / inner_height).view(64, 1).expand(64, 64)
    columns = ((torch.arange(64) - left + 0.5) / inner_width).expand(64, 64)
    back = unletterbox(torch.stack([rows, columns]), box)
    assert back.shape == (2, height, width)
    expected_rows = ((torch.arange(height) + 0.5) / height).view(-1, 1).expand(height, width)
    expected_columns = ((torch.arange(width) + 0.5) / width).expand(height, width)
    # at the border the interpolation has half a cell of the small map to invent
    assert (back[0] - expected_rows).abs().max() <= 0.5 / inner_height
    assert (back[1] - expected_columns).abs().max() <= 0.5 / inner_width


@pytest.mark.parametrize("height, width", [(480, 640), (300, 100), (40, 50)])
def test_a_mask_survives_letterbox_and_back(height, width):
    """An ellipse into 128x128 and back keeps at least 97 % IoU, and its soft edge only where it has an edge."""
    y, x = np.mgrid[:height, :width]
    mask = ((y / height - 0.5) / 0.3) ** 2 + ((x / width - 0.4) / 0.25) ** 2 < 1
    _, box = letterbox(np.zeros((height, width, 3), np.uint8), 128)
    square = letterbox_mask(mask, box)
    assert square.shape == (1, 128, 128) and square.min() >= 0 and square.max() <= 1 + 1e-6
    back = (unletterbox(square, box)[0] > 0.5).numpy()
    assert (back & mask).sum() / (back | mask).sum() > 0.97


def test_unletterbox_takes_maps_of_any_number_of_axes():
    _, box = letterbox(np.zeros((3, 6, 3), np.uint8), 8)
    maps = torch.rand(2, 5, 8, 8)
    whole = unletterbox(maps, box)
    assert whole.shape == (2, 5, 3, 6)
    torch.testing.assert_close(whole[1, 3], unletterbox(maps[1, 3], box))


# ------------------------------------------------------------------------------------------------ for the loop
def test_a_training_item_has_the_models_shapes(refer_tree):
    item = TrainSet(open_dataset("refcoco", "train", refer_tree), 32, 8)[0]
    assert item["image"].shape == (3, 32, 32) and item["mask"].shape == (1, 32, 32) and item["tokens"].shape == (8,)
    assert item["ref_id"] == 10 and item["sentence"] in ("left thing 0", "thing 0")


def test_the_sentence_depends_on_seed_epoch_and_object_alone(refer_tree):
    """Read forwards or backwards the draw is the same; over twenty epochs both sentences turn up."""
    sets = [TrainSet(open_dataset("refcoco", "train", refer_tree), 32, 8, seed=3) for _ in range(2)]
    drawn = []
    for epoch in range(20):
        for train_set in sets:
            train_set.epoch = epoch
        forwards = [sets[0][i]["sentence"] for i in (0, 1)]
        backwards = [sets[1][i]["sentence"] for i in (1, 0)][::-1]
        assert forwards == backwards
        drawn.append(forwards[0])
    assert set(drawn) == {"left thing 0", "thing 0"}


def test_every_epoch_sees_every_object_in_another_order():
    """Ten objects in threes: the single last one is dropped; two objects in threes: the short batch is all there is."""
    batches = epoch_batches(10, 3, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == [3, 3, 3] and len(set(sum(batches, []))) == 9
    assert batches == epoch_batches(10, 3, seed=0, epoch=1)
    assert batches != epoch_batches(10, 3, seed=0, epoch=2) and batches != epoch_batches(10, 3, seed=1, epoch=1)
    assert sorted(epoch_batches(2, 3, 0, 0)[0]) == [0, 1] and [len(b) for b in epoch_batches(4, 3, 0, 0)] == [3]
    assert sorted(sum(epoch_batches(6, 3, 0, 0), [])) == list(range(6))


def test_a_loader_started_in_the_middle_gives_what_was_left(refer_tree):
    train_set = TrainSet(open_dataset("refcoco", "train", refer_tree), 16, 8)
    whole = list(train_loader(train_set, 1, epoch=4))
    rest = list(train_loader(train_set, 1, epoch=4, start=1))
    assert train_set.epoch == 4 and len(whole) == 2 and len(rest) == 1
    assert whole[1]["sentence"] == rest[0]["sentence"] and torch.equal(whole[1]["image"], rest[0]["image"])


def test_sentences_over_the_limit_are_counted():
    """start + one + two + end = 4 tokens: fits into 4, not into 3."""
    assert count_cut(["one two", "one"], 4) == 0 and count_cut(["one two", "one"], 3) == 1


def test_show_draws_a_sheet(refer_tree, tmp_path, capsys):
    data.main(["show", "refcoco", "--data", str(refer_tree), "--number", "2", "--out", str(tmp_path / "sheet.png")])
    assert read_picture(tmp_path / "sheet.png").std() > 0
    assert "'refs': 2" in capsys.readouterr().out


def test_show_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        data.main(["show", "refcoco", "--data", str(tmp_path), "--out", str(tmp_path / "sheet.png")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "prepare.py refcoco" in error
    assert not (tmp_path / "sheet.png").exists()


def test_a_picture_that_prepare_noted_as_missing_is_left_out_and_said(refer_tree, capsys):
    """missing.txt names it: its refs go, the others stay; a picture missing without a note is an error."""
    pictures = refer_tree / "images" / "train2014"
    (pictures / "COCO_train2014_000000000000.jpg").unlink()
    with pytest.raises(UserError, match="is missing, and 0 more"):
        open_dataset("refcoco", "train", refer_tree)
    (refer_tree / "missing.txt").write_text("COCO_train2014_000000000000.jpg\tHTTP 404\n")
    assert [item.ref_id for item in open_dataset("refcoco", "train", refer_tree).items] == [11]
    assert "leaving out the refs of 1 pictures" in capsys.readouterr().out


def test_a_mask_is_averaged_as_it_shrinks():
    """Every eighth column of 256, at an eighth of the size: 1/8 everywhere, not some columns whole and others lost."""
    mask = np.zeros((256, 256), bool)
    mask[:, ::8] = True
    square = letterbox_mask(mask, letterbox(np.zeros((256, 256, 3), np.uint8), 32)[1])
    assert (square[..., 1:-1] - 1 / 8).abs().max() < 0.05


def test_an_object_and_a_split_stay_as_they_were_read(refer_tree):
    """Many hands hold the same ones: to change one is an error, said at the place that tries."""
    source = open_dataset("refcoco", "train", refer_tree)
    for thing in (source, source[0]):
        with pytest.raises(FrozenInstanceError):
            thing.split = "val"


def test_scenes_are_160_pixels_wide_unless_asked():
    assert open_dataset("scenes", "val", limit=1)[0].picture.shape == (160, 160, 3)
