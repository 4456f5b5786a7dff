"""3. What `data.py` promises: files that are read or refused, letterbox and back, seeded draws."""

import json
import os
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from PIL import Image

import data
from clip_model import PIXEL_MEAN, PIXEL_STD
from conftest import (
    HEIGHT,
    WIDTH,
    grefer_tables,
    record,
    rectangle,
    refer_tables,
    write_folder,
    write_refer,
)
from data import (
    REFCOCO_FILES,
    TrainDataset,
    epoch_batches,
    letterbox,
    letterbox_mask,
    normalize,
    open_dataset,
    to_device,
    train_loader,
    unletterbox,
)
from toy.scenes import plan_scene
from utils.common import UserError
from utils.images import read_image


# ------------------------------------------------------------------------------- the RefCOCO family
@pytest.mark.parametrize("protocol", [0, 2])
def test_refs_and_sentences_are_read_from_either_pickle(tmp_path, protocol):
    """The archives hold protocol 0 of Python 2; copies in circulation were written again with 2."""
    write_refer(tmp_path, protocol=protocol)
    dataset = open_dataset("refcoco", "train", tmp_path)
    assert dataset.counts() == {"refs": 2, "sentences": 4, "images": 2}
    sample = dataset[1]
    assert (sample.ref_id, sample.image_id, sample.sent_ids) == (11, 1, (2, 3))
    assert sample.sentences == ("left thing 1", "thing 1")
    assert sample.image.shape == (HEIGHT, WIDTH, 3)
    assert sample.image.dtype == np.uint8


def test_bytes_of_python_2_are_read_as_text(tmp_path):
    """Protocol 0 of Python 2 writes S'…' where Python 3 writes V…: both are text, accents too."""
    path = write_refer(tmp_path)
    old = path.read_bytes().replace(b"Vleft thing 0\n", b"S'left caf\\xe9 0'\n")
    path.write_bytes(old)
    assert open_dataset("refcoco", "train", tmp_path)[0].sentences[0] == "left café 0"


def test_two_polygons_of_one_object_are_joined(refer_tree):
    """Rows 5-14, columns 5-14 (100 pixels), rows 10-19, columns 10-24 (150); 25 in both: 225."""
    mask = open_dataset("refcoco", "train", refer_tree)[0].mask
    expected = rectangle(5, 5, 15, 15) | rectangle(10, 10, 20, 25)
    assert mask.dtype == bool
    assert mask.sum() == 225
    np.testing.assert_array_equal(mask, expected)


def test_run_lengths_as_text_and_as_numbers(refer_tree):
    """COCO counts down the columns: [0, 30, …] fills the first column, not the first row."""
    text = open_dataset("refcoco", "train", refer_tree)[1]
    numbers = open_dataset("refcoco", "val", refer_tree)[0]
    np.testing.assert_array_equal(text.mask, rectangle(10, 20, 20, 30))
    np.testing.assert_array_equal(numbers.mask, rectangle(0, 0, HEIGHT, 1))


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = write_refer(tmp_path)
    path.write_bytes(pickle.dumps([Hostile()], protocol=0))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p.*system"):
        open_dataset("refcoco", "train", tmp_path)
    assert not (tmp_path / "ran").exists()


MALFORMED = [b"", b"garbage", pickle.dumps(7), pickle.dumps([{"ref_id": 1}]), b"\x80\x02]q\x00"]


@pytest.mark.parametrize("content", MALFORMED)
def test_a_malformed_pickle_is_named(tmp_path, content):
    write_refer(tmp_path).write_bytes(content)
    with pytest.raises(UserError, match=r"refs\(unc\)\.p.*prepare\.py refcoco"):
        open_dataset("refcoco", "train", tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [("ref_id", "7"), ("split", 3), ("image_id", None), ("sentences", []), ("ann_id", 5)],
)
def test_a_ref_with_a_wrong_field_is_named(tmp_path, field, value):
    refs, instances = refer_tables()
    refs[2][field] = value
    write_refer(tmp_path, tables=(refs, instances))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p"):
        open_dataset("refcoco", "train", tmp_path)


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        [[1, 2]],
        {"size": [HEIGHT, WIDTH], "counts": [5, 5]},
        {"counts": 3},
        {"size": [2, 2], "counts": "04"},
        7,
        {"size": [HEIGHT, WIDTH], "counts": "04"},
        {"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]},
        {"size": [HEIGHT, WIDTH], "counts": [0.5, HEIGHT * WIDTH - 0.5]},
        [[0, 0, 1e12, 0, 1e12, 1e12]],
        [[0, 0, 2.5 * WIDTH, 0, 9, 9]],
        [[0, 0, float("nan"), 0, 5, 5]],
    ],
)
def test_a_broken_mask_is_named(tmp_path, segmentation):
    """No polygon, one of one point, run lengths that end early or belong to another image.

    And what ends the process inside pycocotools: corners far outside the image, or no number.
    """
    refs, instances = refer_tables()
    instances["annotations"][0]["segmentation"] = segmentation
    write_refer(tmp_path, tables=(refs, instances))
    with pytest.raises(UserError, match="ref 10"):
        open_dataset("refcoco", "train", tmp_path)[0]


def test_an_image_with_a_name_no_file_can_have_is_said(tmp_path):
    """The system refuses to look for it with an error of its own."""
    refs, instances = refer_tables()
    write_refer(tmp_path, tables=(refs, instances))
    instances["images"][1]["file_name"] = "x" * 300
    (tmp_path / "refcoco" / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(UserError, match=r"instances\.json: an image's name is longer"):
        open_dataset("refcoco", "train", tmp_path)
    instances["images"][1]["file_name"] = "x" * 251 + ".jpg"  # 255 bytes are the most there can be
    write_refer(tmp_path, tables=(refs, instances))
    assert open_dataset("refcoco", "train", tmp_path)[1].ref_id == 11


def test_an_image_of_another_size_than_its_mask_is_named(refer_tree):
    name = "COCO_train2014_000000000000.jpg"
    larger = Image.new("RGB", (WIDTH, HEIGHT + 1))
    larger.save(refer_tree / "images" / "train2014" / name)
    with pytest.raises(UserError, match=rf"ref 10.*{name}"):
        open_dataset("refcoco", "train", refer_tree)[0]


def test_images_of_refcoco_are_taken_as_stored(refer_tree):
    """Their masks were drawn on the stored pixels; one's own images are turned (test below)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = refer_tree / "images" / "train2014" / "COCO_train2014_000000000000.jpg"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)
    assert open_dataset("refcoco", "train", refer_tree)[0].image.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("folder", ["train2014\\", "C:\\coco\\train2014\\", "train2014/"])
def test_names_of_images_may_have_folders_of_either_slash(refer_tree, folder):
    """instances.json prepared on Windows, read on Linux."""
    refs, instances = refer_tables()
    for row in instances["images"]:
        row["file_name"] = folder + row["file_name"]
    instances_file = refer_tree / "refcoco" / "instances.json"
    instances_file.write_text(json.dumps(instances), encoding="utf-8")
    assert open_dataset("refcoco", "train", refer_tree)[1].image.shape == (HEIGHT, WIDTH, 3)


def test_missing_files_name_the_command_that_gets_them(tmp_path):
    with pytest.raises(UserError, match=r"prepare\.py refcocog-umd --data"):
        open_dataset("refcocog-umd", "train", tmp_path)
    write_refer(tmp_path)
    (tmp_path / "images" / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000001\.jpg is missing.*prepare\.py refcoco"):
        open_dataset("refcoco", "train", tmp_path)


def test_an_image_that_prepare_noted_as_missing_is_left_out_and_said(refer_tree, capsys):
    """missing.txt names it: its refs go, the others stay; missing without a note is an error."""
    images = refer_tree / "images" / "train2014"
    (images / "COCO_train2014_000000000000.jpg").unlink()
    with pytest.raises(UserError, match="is missing, and 0 more"):
        open_dataset("refcoco", "train", refer_tree)
    (refer_tree / "missing.txt").write_text("COCO_train2014_000000000000.jpg\tHTTP 404\n")
    dataset = open_dataset("refcoco", "train", refer_tree)
    assert [sample.ref_id for sample in dataset.samples] == [11]
    assert "leaving out 1 images" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the 1 refs has its image"):
        open_dataset("refcoco", "train", refer_tree, limit=1)


def test_an_empty_split_says_which_splits_there_are(refer_tree):
    says = "split testB has no refs; available splits: testA, train, val"
    with pytest.raises(UserError, match=says):
        open_dataset("refcoco", "testB", refer_tree)
    says = "split testA has no refs; available splits: train, val, test"
    with pytest.raises(UserError, match=says):
        open_dataset("scenes", "testA")


def test_an_unknown_name_says_which_names_there_are(tmp_path):
    with pytest.raises(UserError, match="refcocoo.*scenes, .*refcocog-google"):
        open_dataset("refcocoo", "train", tmp_path)


def test_limit_takes_the_first_objects(refer_tree):
    dataset = open_dataset("refcoco", "train", refer_tree, limit=1)
    assert [dataset[i].ref_id for i in range(len(dataset))] == [10]
    assert len(open_dataset("scenes", "val", limit=3)) == 3
    with pytest.raises(UserError, match="--limit 0"):
        open_dataset("refcoco", "train", refer_tree, limit=0)


def test_a_mix_trains_on_no_image_that_is_evaluated(refer_tree, capsys):
    """RefCOCO+ shows image 1 in testB; RefCOCO trains on it: both sets lose it."""
    refs, instances = refer_tables()
    refs[1]["split"] = "testB"
    refs[3]["split"] = "train"  # testA of RefCOCO
    write_refer(refer_tree, REFCOCO_FILES["refcoco+"], (refs, instances))
    mix = open_dataset("refcoco, refcoco+,scenes", "train", refer_tree, limit=2)
    samples = [mix[i] for i in range(len(mix))]
    assert [sample.image_id for sample in samples[:2]] == [0, 0]
    assert len(samples) == 4
    out = capsys.readouterr().out
    line = "1 refs left out, evaluation splits show their 1 images"
    assert f"refcoco: {line}" in out
    assert f"refcoco+: {line}" in out
    with pytest.raises(UserError, match="one dataset at a time"):
        open_dataset("refcoco,refcoco+", "val", refer_tree)


# ----------------------------------------------------------------------------------------- gRefCOCO
@pytest.fixture
def grefer_tree(tmp_path):
    write_refer(tmp_path, REFCOCO_FILES["grefcoco"], grefer_tables())
    return tmp_path


def test_several_objects_are_one_mask(grefer_tree):
    """225 pixels of the two polygons and rows 10-19, columns 20-29 (100); 50 in both."""
    sample = open_dataset("grefcoco", "train", grefer_tree)[0]
    expected = rectangle(5, 5, 15, 15) | rectangle(10, 10, 20, 25) | rectangle(10, 20, 20, 30)
    np.testing.assert_array_equal(sample.mask, expected)
    assert sample.mask.sum() == 225 + 100 - 50
    assert (sample.ref_id, sample.sentences) == (10, ("left thing 0", "thing 0"))


def test_no_target_is_an_empty_mask(grefer_tree):
    """[-1] says so. It trains and is drawn like any other."""
    dataset = open_dataset("grefcoco", "train", grefer_tree)
    sample = dataset[1]
    assert sample.mask.shape == (HEIGHT, WIDTH)
    assert not sample.mask.any()
    item = TrainDataset(dataset, 32, 17)[1]
    assert item["mask"].shape == (1, 32, 32)
    assert not item["mask"].any()
    sheet = grefer_tree / "sheet.png"
    data.main(["show", "grefcoco", "--data", str(grefer_tree), "--out", str(sheet)])
    assert sheet.is_file()


def test_show_counts_the_sentences_that_fit_nothing_one_object_or_several(grefer_tree, capsys):
    """Two sentences for two objects, two for none; in val one object, beside a crowd."""
    lines = []
    for split in ("train", "val"):
        sheet = str(grefer_tree / "sheet.png")
        show = ["show", "grefcoco", "--split", split, "--data", str(grefer_tree)]
        data.main([*show, "--out", sheet])
        lines.append(capsys.readouterr().out.splitlines()[-1])
    of = "of the sentences of {} refs fit: {} nothing, {} one object, {} several"
    assert lines[0] == of.format(2, 2, 0, 2)
    assert lines[1] == of.format(1, 0, 2, 0)


def test_show_counts_the_targets_of_scenes_any_and_no_others(tmp_path, capsys):
    sheet = str(tmp_path / "sheet.png")
    data.main(["show", "scenes-any", "--split", "val", "--number", "1", "--out", sheet])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("of the sentences of 500 refs fit: ")
    found = {"nothing": 0, "one object": 0, "several": 0}
    for i in range(500):
        plan = plan_scene("scenes-any", "val", i)
        name = {0: "nothing", 1: "one object"}.get(len(plan.targets), "several")
        found[name] += len(plan.sentences)
    assert line.split(": ")[1] == ", ".join(f"{count} {name}" for name, count in found.items())
    data.main(["show", "scenes", "--split", "val", "--number", "1", "--out", sheet])
    assert "fit" not in capsys.readouterr().out


def test_crowds_are_left_out_of_several_and_refs_of_crowds_alone_altogether(grefer_tree, capsys):
    """Ref 12 names the left half and a crowd: the left half stays. Ref 13 names the crowd alone."""
    sample = open_dataset("grefcoco", "val", grefer_tree)[0]
    np.testing.assert_array_equal(sample.mask, rectangle(0, 0, HEIGHT, WIDTH // 2))
    assert "ref 13 is left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="testA has no refs; available splits: train, val"):
        open_dataset("grefcoco", "testA", grefer_tree)


@pytest.mark.parametrize("ann_id", [[], [-1, 100], [5], ["100"], [[100]], None, 7])
def test_a_ref_with_wrong_objects_is_named(tmp_path, ann_id):
    """No object at all, no target beside one, an unknown one, text, a list, nothing."""
    refs, instances = grefer_tables()
    refs[0]["ann_id"] = ann_id
    write_refer(tmp_path, REFCOCO_FILES["grefcoco"], (refs, instances))
    with pytest.raises(UserError, match=r"grefs\(unc\)\.json.*prepare\.py grefcoco"):
        open_dataset("grefcoco", "train", tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"7", b'[{"ref_id": 1}]', b"\xff[]", b"[1]"])
def test_a_malformed_json_of_refs_is_named(grefer_tree, content):
    (grefer_tree / REFCOCO_FILES["grefcoco"]).write_bytes(content)
    with pytest.raises(UserError, match=r"grefs\(unc\)\.json.*prepare\.py grefcoco"):
        open_dataset("grefcoco", "train", grefer_tree)


def test_grefcoco_takes_part_in_the_filter_of_a_mix(grefer_tree, capsys):
    """gRefCOCO's val shows image 2, on which RefCOCO trains here: it is left out."""
    refs, instances = refer_tables()
    refs[2]["split"] = "train"
    refs[3]["split"] = "train"
    write_refer(grefer_tree, REFCOCO_FILES["refcoco"], (refs, instances))
    mix = open_dataset("refcoco,grefcoco", "train", grefer_tree)
    assert [mix[i].image_id for i in range(len(mix))] == [0, 1, 3, 0, 1]
    assert "refcoco: 1 refs left out" in capsys.readouterr().out


def test_the_real_sample_is_read_whole(refer_sample):
    """47 refs, 95 sentences, 35 images as its README counts; each mask has its image's size."""
    sizes = {"train": 23, "val": 7, "testA": 10, "testB": 7}
    datasets = [open_dataset("refcoco", split, refer_sample) for split in sizes]
    assert [len(dataset) for dataset in datasets] == list(sizes.values())
    assert sum(dataset.counts()["sentences"] for dataset in datasets) == 95
    samples = [dataset[i] for dataset in datasets for i in range(len(dataset))]
    assert len({sample.image_id for sample in samples}) == 35
    for sample in samples:
        assert sample.mask.any()
        assert sample.mask.shape == sample.image.shape[:2]
    with pytest.raises(UserError, match="split train has no refs"):
        open_dataset("refcocog-google", "train", refer_sample)


def test_an_object_and_a_split_stay_as_they_were_read(refer_tree):
    """Many hands hold the same ones: to change one is an error, said at the place that tries."""
    dataset = open_dataset("refcoco", "train", refer_tree)
    for thing in (dataset, dataset[0]):
        with pytest.raises(FrozenInstanceError):
            thing.split = "val"


def test_scenes_are_160_pixels_wide_unless_asked():
    assert open_dataset("scenes", "val", limit=1)[0].image.shape == (160, 160, 3)


# ---------------------------------------------------------------------------- a folder of one's own
def test_a_folder_of_ones_own_fills_in_what_is_missing(tmp_path):
    """No ref_id: the record's number; no sent_id: the sentence's; no split: train."""
    first = record(0, sentences=["a", "b"])
    second = record(1, ref_id=7, sent_ids=[5], split="val")
    own = write_folder(tmp_path, [first, second])
    (own / "refs.jsonl").write_text("\n" + (own / "refs.jsonl").read_text())
    first = open_dataset(str(own), "train")[0]
    second = open_dataset(str(own), "val")[0]
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


def test_wrong_lines_can_be_skipped_and_are_kept_in_a_list(tmp_path):
    own = write_folder(tmp_path, [record(), record(sentences=[]), record(1)])
    skipped = []
    assert len(open_dataset(str(own), "train", skipped=skipped)) == 2
    assert len(skipped) == 1
    assert "line 2" in skipped[0]


def test_a_folder_prepared_on_windows_is_read(tmp_path):
    """Its names have backslashes. Both spellings of a file are the same image, of one id."""
    windows = {"image": "images\\0.png", "mask": "masks\\1.png", "sentences": ["a cup"]}
    own = write_folder(tmp_path, [record(0), windows])
    dataset = open_dataset(str(own), "train")
    np.testing.assert_array_equal(dataset[1].mask, rectangle(0, 0, 20, 10))
    assert [sample.image_id for sample in dataset.samples] == [0, 0]


def test_a_mask_in_the_alpha_channel_is_the_object(tmp_path):
    """White everywhere and opaque where the object is: it was read as the whole image."""
    own = write_folder(tmp_path, [record()])
    white = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    inside = rectangle(10, 20, 30, 35)
    mask = Image.fromarray(np.dstack([white, 255 * inside.astype(np.uint8)]))
    mask.save(own / "masks" / "0.png")
    np.testing.assert_array_equal(open_dataset(str(own), "train")[0].mask, inside)
    mask.putalpha(Image.linear_gradient("L").resize(mask.size))
    mask.save(own / "masks" / "0.png")
    with pytest.raises(UserError, match=r"masks.0\.png: .*transparency"):
        open_dataset(str(own), "train")[0]


def test_ones_own_images_are_turned_as_exif_says(tmp_path):
    """Orientation 6 turns 40x30 as stored into 30x40 as seen; the mask is as one saw it."""
    own = write_folder(tmp_path, [record()])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(own / "images" / "0.png", exif=exif)
    with pytest.raises(UserError, match=r"masks.0\.png.*\(30, 40\).*\(40, 30\)"):
        open_dataset(str(own), "train")[0]
    Image.new("L", (HEIGHT, WIDTH), 255).save(own / "masks" / "0.png")
    assert open_dataset(str(own), "train")[0].mask.shape == (WIDTH, HEIGHT)


def test_a_mask_may_be_written_with_ones_but_not_with_soft_edges(tmp_path):
    own = write_folder(tmp_path, [record()])
    ones = rectangle(0, 0, 5, 5).astype(np.uint8)
    Image.fromarray(ones).save(own / "masks" / "0.png")
    assert open_dataset(str(own), "train")[0].mask.sum() == 25
    soft = ones * 255 + rectangle(9, 9, 10, 10).astype(np.uint8) * 3
    Image.fromarray(soft).save(own / "masks" / "0.png")
    says = r"masks.0\.png: a mask holds 0 and 255 only.*\[ *0 +3 +255\]"
    with pytest.raises(UserError, match=says):
        open_dataset(str(own), "train")[0]


# --------------------------------------------------------------------------------------- letterbox
def test_letterbox_by_hand():
    """2 high, 4 wide into 8: scale 2, so 4x8 in rows 2-5.

    The border has CLIP's mean color, (122.77, 116.75, 104.09) rounded, as the original's uint8
    image. Normalized, it is 0 but for the rounding.
    """
    square, box = letterbox(np.full((2, 4, 3), 255, np.uint8), 8)
    assert square.shape == (3, 8, 8)
    assert square.dtype == torch.uint8
    assert box.rectangle == (2, 0, 4, 8)
    assert box.original == (2, 4)
    border = square[:, [0, 1, 6, 7]]
    assert torch.equal(border, torch.tensor([123, 117, 104]).byte().view(3, 1, 1).expand(3, 4, 8))
    assert torch.all(square[:, 2:6] == 255)

    image = normalize(square[None])[0]
    assert image.dtype == torch.float32
    white = (1 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    torch.testing.assert_close(image[:, 2:6], white.view(3, 1, 1).expand(3, 4, 8))
    step = 1 / (255 * torch.tensor(PIXEL_STD)).view(3, 1, 1)  # of a uint8 value, normalized
    assert torch.all(image[:, [0, 1, 6, 7]].abs() < step / 2)


def test_letterbox_of_a_square_of_the_right_size_only_normalizes():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    square, box = letterbox(pixels, 6)
    assert torch.equal(square, torch.from_numpy(pixels).permute(2, 0, 1))
    mean = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD).view(3, 1, 1)
    torch.testing.assert_close(normalize(square[None])[0], (square / 255 - mean) / std)
    mask = pixels[..., 0] > 99
    assert torch.equal(letterbox_mask(mask, box)[0], torch.from_numpy(mask).byte() * 255)
    maps = torch.rand(2, 6, 6)
    assert torch.equal(unletterbox(maps, box), maps)


SIZES = [(480, 640), (640, 427), (50, 61), (1, 900), (900, 1), (16, 16)]


@pytest.mark.parametrize("height, width", SIZES)
def test_a_map_comes_back_where_it_was(height, width):
    """Two ramps, x and y, go into the square and back: again the image's own coordinates."""
    _, box = letterbox(np.zeros((height, width, 3), np.uint8), 64)
    top, left, inner_height, inner_width = box.rectangle
    assert min(inner_height, inner_width) >= 1
    assert max(inner_height, inner_width) == 64
    rows = ((torch.arange(64) - top + 0.5) / inner_height).view(64, 1).expand(64, 64)
    columns = ((torch.arange(64) - left + 0.5) / inner_width).expand(64, 64)
    back = unletterbox(torch.stack([rows, columns]), box)
    assert back.shape == (2, height, width)
    expected_rows = ((torch.arange(height) + 0.5) / height).view(-1, 1).expand(height, width)
    expected_columns = ((torch.arange(width) + 0.5) / width).expand(height, width)
    # at the border the interpolation has half a cell of the small map to invent
    assert (back[0] - expected_rows).abs().max() <= 0.5 / inner_height
    assert (back[1] - expected_columns).abs().max() <= 0.5 / inner_width


@pytest.mark.parametrize("height, width", SIZES[:4])
def test_a_mask_in_uint8_is_the_one_in_floats_but_for_a_255th(height, width):
    """Not of (900, 1): there torch's antialiasing of floats repeats the first pixel."""
    rng = np.random.default_rng(0)
    mask = rng.random((height, width)) < 0.5
    _, box = letterbox(np.zeros((height, width, 3), np.uint8), 64)
    top, left, inner_height, inner_width = box.rectangle
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(mask)[None, None].float(),
        (inner_height, inner_width),
        mode="bilinear",
        antialias=True,
    )
    square = letterbox_mask(mask, box).float() / 255
    inside = square[0, top : top + inner_height, left : left + inner_width]
    assert (inside - expected[0, 0]).abs().max() <= 1 / 255
    assert square.sum() == pytest.approx(inside.sum())


@pytest.mark.parametrize("height, width", [(480, 640), (300, 100), (40, 50)])
def test_a_mask_survives_letterbox_and_back(height, width):
    """An ellipse into 128x128 and back keeps at least 97 % IoU."""
    y, x = np.mgrid[:height, :width]
    mask = ((y / height - 0.5) / 0.3) ** 2 + ((x / width - 0.4) / 0.25) ** 2 < 1
    _, box = letterbox(np.zeros((height, width, 3), np.uint8), 128)
    square = letterbox_mask(mask, box).float() / 255
    assert square.shape == (1, 128, 128)
    back = (unletterbox(square, box)[0] > 0.5).numpy()
    assert (back & mask).sum() / (back | mask).sum() > 0.97


def test_a_mask_is_averaged_as_it_shrinks():
    """Every eighth column of 256, at an eighth of the size: 1/8 everywhere, no column lost."""
    mask = np.zeros((256, 256), bool)
    mask[:, ::8] = True
    _, box = letterbox(np.zeros((256, 256, 3), np.uint8), 32)
    square = letterbox_mask(mask, box).float() / 255
    assert (square[..., 1:-1] - 1 / 8).abs().max() < 0.05


def test_unletterbox_takes_maps_of_any_number_of_axes():
    _, box = letterbox(np.zeros((3, 6, 3), np.uint8), 8)
    maps = torch.rand(2, 5, 8, 8)
    whole = unletterbox(maps, box)
    assert whole.shape == (2, 5, 3, 6)
    torch.testing.assert_close(whole[1, 3], unletterbox(maps[1, 3], box))


# ------------------------------------------------------------------------------------ for the loop
def test_a_training_item_has_the_models_shapes(refer_tree):
    item = TrainDataset(open_dataset("refcoco", "train", refer_tree), 32, 8)[0]
    assert item["image"].shape == (3, 32, 32)
    assert item["mask"].shape == (1, 32, 32)
    assert item["tokens"].shape == (8,)
    assert item["ref_id"] == 10
    assert item["sentence"] in ("left thing 0", "thing 0")


def test_a_batch_travels_as_uint8_and_is_normalized_on_the_device(refer_tree):
    train_set = TrainDataset(open_dataset("refcoco", "train", refer_tree), 32, 8)
    batch = next(iter(train_loader(train_set, 2, epoch=0)))
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    moved = to_device(batch, "cpu")
    assert torch.equal(moved["image"], normalize(batch["image"]))
    assert moved["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved["mask"], batch["mask"] / 255)
    assert moved["mask"].dtype == torch.float32
    for key in ("tokens", "ref_id", "sentence"):
        assert moved[key] is batch[key]


def test_copies_wait_unless_the_device_is_a_gpu_with_pinned_memory(refer_tree, monkeypatch):
    """A copy to another device that is not waited for may take memory that is freed by then."""
    batch = next(
        iter(train_loader(TrainDataset(open_dataset("refcoco", "train", refer_tree), 32, 8), 2, 0))
    )
    asked = []
    copy = torch.Tensor.to

    def to(tensor, *args, **options):
        asked.append(options.get("non_blocking", False))
        return copy(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    assert to_device(batch, "meta")["image"].device.type == "meta"
    assert len(asked) >= 3
    assert not any(asked)


def test_the_sentence_depends_on_seed_epoch_and_object_alone(refer_tree):
    """Read forwards or backwards the draw is the same; over twenty epochs both turn up."""
    dataset = open_dataset("refcoco", "train", refer_tree)
    first = TrainDataset(dataset, 32, 8, seed=3)
    second = TrainDataset(dataset, 32, 8, seed=3)
    drawn = []
    for epoch in range(20):
        first.epoch = epoch
        second.epoch = epoch
        forwards = [first[i]["sentence"] for i in (0, 1)]
        backwards = [second[i]["sentence"] for i in (1, 0)]
        assert forwards == backwards[::-1]
        drawn.append(forwards[0])
    assert set(drawn) == {"left thing 0", "thing 0"}


def test_every_epoch_sees_every_object_in_another_order():
    """Ten objects in threes: the single last one is dropped. Two in threes: it is all there is."""
    batches = epoch_batches(10, 3, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert len(set(sum(batches, []))) == 9
    assert batches == epoch_batches(10, 3, seed=0, epoch=1)
    assert batches != epoch_batches(10, 3, seed=0, epoch=2)
    assert batches != epoch_batches(10, 3, seed=1, epoch=1)
    assert sorted(epoch_batches(2, 3, 0, 0)[0]) == [0, 1]
    assert [len(batch) for batch in epoch_batches(4, 3, 0, 0)] == [3]
    assert sorted(sum(epoch_batches(6, 3, 0, 0), [])) == list(range(6))


def test_a_loader_started_in_the_middle_gives_what_was_left(refer_tree):
    train_set = TrainDataset(open_dataset("refcoco", "train", refer_tree), 16, 8)
    whole = list(train_loader(train_set, 1, epoch=4))
    rest = list(train_loader(train_set, 1, epoch=4, start=1))
    assert train_set.epoch == 4
    assert len(whole) == 2
    assert len(rest) == 1
    assert whole[1]["sentence"] == rest[0]["sentence"]
    assert torch.equal(whole[1]["image"], rest[0]["image"])


def test_processes_share_every_batch(refer_tree, monkeypatch):
    train_set = TrainDataset(open_dataset("scenes", "train", limit=10, side=16), 16, 8)
    whole = list(train_loader(train_set, 5, epoch=0))
    monkeypatch.setattr("data.world_size", lambda: 2)
    first = list(train_loader(train_set, 5, epoch=0))
    monkeypatch.setattr("data.rank", lambda: 1)
    second = list(train_loader(train_set, 5, epoch=0))
    for batch, even, odd in zip(whole, first, second, strict=True):
        assert even["ref_id"].tolist() == batch["ref_id"][::2].tolist()
        assert odd["ref_id"].tolist() == batch["ref_id"][1::2].tolist()


def test_loading_leaves_the_global_generator_alone(refer_tree):
    train_set = TrainDataset(open_dataset("refcoco", "train", refer_tree), 16, 8)
    before = torch.get_rng_state()
    list(train_loader(train_set, 1, epoch=0))
    assert torch.equal(before, torch.get_rng_state())


# ----------------------------------------------------------------------------------------- command
def test_show_draws_a_sheet(refer_tree, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    show = ["show", "refcoco", "--data", str(refer_tree), "--number", "2"]
    data.main([*show, "--out", str(out)])
    assert read_image(out).std() > 0
    assert "'refs': 2" in capsys.readouterr().out


def test_show_says_what_is_wrong_in_one_line(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    with pytest.raises(SystemExit) as stopped:
        data.main(["show", "refcoco", "--data", str(tmp_path), "--out", str(out)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert "prepare.py refcoco" in error
    assert not out.exists()
