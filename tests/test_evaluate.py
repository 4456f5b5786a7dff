"""5. What `evaluate.py` promises: the formulas by hand, every sentence at its image's own size."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as room
from checkpoint import load_checkpoint
from conftest import HEIGHT, WIDTH, grefer_tables, record, write_folder, write_refer
from data import REFCOCO_FILES, RefDataset, letterbox, normalize, open_dataset
from evaluate import (
    EvalDataset,
    evaluate,
    format_result,
    found_thing,
    grid_ceiling,
    group_scores,
    intersection_union,
    predict_probabilities,
    sentence_batches,
    summarize,
    summarize_any,
)
from toy.scenes import Thing
from utils.common import ROOT, UserError, write_file

PRECISIONS = ["Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9"]


# ------------------------------------------------------------------------------------ the formulas
def mask_of(*rows):
    return torch.tensor([[pixel == "#" for pixel in row] for row in rows])


def test_two_masks_whose_oiou_and_miou_differ():
    """By hand, two 4x4 pairs. First: P 8 pixels, G 8, both 4, either 12: 4/12. Second: 1/1.

    oIoU = (4 + 1) / (12 + 1) = 38.46 %; mIoU = (1/3 + 1) / 2 = 66.67 %; one of two is over 0.5.
    """
    upper = mask_of("####", "####", "....", "....")
    middle = mask_of("....", "####", "####", "....")
    corner = mask_of("#...", "....", "....", "....")
    first = intersection_union(upper, middle)
    second = intersection_union(corner, corner)
    assert (first, second) == ((4, 12), (1, 1))
    result = summarize([4, 1], [12, 1])
    assert result["oIoU"] == pytest.approx(100 * 5 / 13)
    assert result["mIoU"] == pytest.approx(100 * 2 / 3)
    assert [result[name] for name in PRECISIONS] == [50] * 5


def test_precision_counts_what_is_strictly_over():
    """IoU of exactly 0.5 is not over 0.5; 0.75 is over 0.5, 0.6 and 0.7."""
    result = summarize([1, 3], [2, 4])
    assert [result[name] for name in PRECISIONS] == [50, 50, 50, 0, 0]


def test_nothing_to_find_and_nothing_found_counts_as_right():
    """Empty and empty: 1. Something found where nothing was: 0. ΣU = 0 gives an oIoU of 1 too."""
    half = summarize([0, 0], [0, 5])
    assert half["mIoU"] == 50
    assert half["oIoU"] == 0
    assert summarize([0], [0]) == dict.fromkeys(["oIoU", "mIoU", *PRECISIONS], 100)


# P, G and what both share, in pixels; "nothing" is said by fewer than 50 pixels
#                       P    G    both   counted I / U   IoU
ANY = [
    (100, 100, 80),  # one object:       80 / 120       2/3
    (300, 200, 200),  # several:        200 / 300       2/3
    (49, 100, 49),  # says nothing:       0 / 100         0
    (0, 0, 0),  # no target, right:       0 / 0           1
    (49, 0, 0),  # no target, right:      0 / 0           1
    (50, 0, 0),  # no target, wrong:      0 / 50          0
]


def any_scores(table, nothing_below=50):
    intersections = [both for _, _, both in table]
    unions = [found + truth - both for found, truth, both in table]
    truths = [truth for _, truth, _ in table]
    return summarize_any(intersections, unions, truths, nothing_below)


def test_giou_ciou_nacc_and_tacc_by_hand():
    """gIoU = (2/3 + 2/3 + 0 + 1 + 1 + 0) / 6 = 10/18; cIoU = (80 + 200) / (120 + 300 + 100 + 50);
    N-acc: 2 of 3 say nothing; T-acc: 2 of 3 say something.
    """
    expected = {"gIoU": 100 * 10 / 18, "cIoU": 100 * 280 / 570, "N-acc": 200 / 3, "T-acc": 200 / 3}
    assert any_scores(ANY) == pytest.approx(expected)


def test_the_example_in_the_docs():
    """docs/metrics.md: gIoU 41.7, cIoU 80 / 270, N-acc and T-acc 50."""
    scores = any_scores([ANY[0], ANY[2], ANY[4], ANY[5]])
    expected = {"gIoU": 125 / 3, "cIoU": 8000 / 270, "N-acc": 50, "T-acc": 50}
    assert scores == pytest.approx(expected)


def test_the_pixels_that_say_something_are_an_option():
    """At 1 pixel only the empty mask says nothing: 49 of 49 count, the second no target is wrong.

    gIoU = (2/3 + 2/3 + 0.49 + 1 + 0 + 0) / 6; cIoU = 329 / (120 + 300 + 100 + 49 + 50).
    """
    scores = any_scores(ANY, nothing_below=1)
    assert scores["gIoU"] == pytest.approx(100 * (4 / 3 + 1.49) / 6)
    assert scores["cIoU"] == pytest.approx(100 * 329 / 619)
    assert scores["N-acc"] == pytest.approx(100 / 3)
    assert scores["T-acc"] == 100


def test_giou_and_ciou_are_miou_and_oiou_where_every_sentence_finds_its_object():
    """The same formulas by other names: they part where nothing is said or to be found."""
    table = ANY[:2]
    scores = any_scores(table)
    plain = summarize([80, 200], [120, 300])
    assert scores["gIoU"] == pytest.approx(plain["mIoU"])
    assert scores["cIoU"] == pytest.approx(plain["oIoU"])
    assert (scores["N-acc"], scores["T-acc"]) == (None, 100)


def test_only_sentences_without_target_have_no_tacc():
    scores = any_scores(ANY[3:5])
    assert scores == {"gIoU": 100, "cIoU": 100, "N-acc": 100, "T-acc": None}


def test_formulas_equal_a_loop_over_pixels():
    """Slow and obvious, over twenty random pairs of masks."""
    rng = np.random.default_rng(0)
    pairs = [(rng.random((5, 7)) < 0.6, rng.random((5, 7)) < 0.5) for _ in range(20)]
    table = []
    for prediction, truth in pairs:
        both = 0
        either = 0
        for y in range(5):
            for x in range(7):
                both += bool(prediction[y, x] and truth[y, x])
                either += bool(prediction[y, x] or truth[y, x])
        table.append((both, either))
    assert [intersection_union(torch.tensor(p), torch.tensor(g)) for p, g in pairs] == table
    intersections, unions = zip(*table, strict=True)
    result = summarize(intersections, unions)
    assert result["mIoU"] == pytest.approx(100 * sum(i / u for i, u in table) / 20)
    assert result["oIoU"] == pytest.approx(100 * sum(intersections) / sum(unions))
    assert result["Pr@0.5"] == pytest.approx(100 * sum(i / u > 0.5 for i, u in table) / 20)


# -------------------------------------------------------------------------------------- evaluation
@pytest.fixture
def bright_folder(tmp_path):
    """Two images, the left half of both bright; the second mask asks for all of the image."""
    sentences = ["bright", "dark", "the bright thing over there now"]
    own = write_folder(tmp_path, [record(0, sentences=sentences), record(1)])
    for number, right in enumerate((20, 40)):
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        image[:, :20] = 255
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, :right] = 255
        Image.fromarray(image).save(own / "images" / f"{number}.png")
        Image.fromarray(mask).save(own / "masks" / f"{number}.png")
    return own


def test_every_sentence_is_measured_at_the_images_own_size(bright_folder, bright_model):
    """30x40 pixels, bright in 20 columns of 40; the stub is nearly exact at the edge.

    bright: IoU about 1. dark: about 0. The seven words are cut to the stub's six. Second image:
    about 600 / 1200.
    """
    dataset = open_dataset(str(bright_folder), "train")
    result, rows = evaluate(bright_model, dataset, progress=False)
    assert [(row["ref_id"], row["sent_id"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [row["IoU"] for row in rows] == pytest.approx([100, 0, 100, 50], abs=11)
    assert rows[0]["I"] == 600
    assert rows[3]["U"] == HEIGHT * WIDTH  # all of the image, no pixel of a border
    counts = (result["sentences"], result["refs"], result["images"], result["cut"])
    assert counts == (4, 2, 2, 1)
    intersection = sum(row["I"] for row in rows)
    union = sum(row["U"] for row in rows)
    assert result["mIoU"] == pytest.approx(np.mean([row["IoU"] for row in rows]))
    assert result["oIoU"] == pytest.approx(100 * intersection / union)
    assert (result["threshold"], result["split"]) == (0.35, "train")


def test_the_batch_size_changes_nothing(bright_folder, bright_model):
    dataset = open_dataset(str(bright_folder), "train")
    whole = evaluate(bright_model, dataset, batch_size=32, progress=False)
    for batch_size in (1, 2, 3):
        assert evaluate(bright_model, dataset, batch_size=batch_size, progress=False) == whole


def test_sentences_of_several_objects_share_a_batch():
    items = [{"tokens": "ab"}, {"tokens": "cde"}]
    batches = sentence_batches(items, 2)
    names = [[item["tokens"][k] for item, k in batch] for batch in batches]
    assert names == [["a", "b"], ["c", "d"], ["e"]]


def test_limit_counts_objects_and_the_mode_comes_back(bright_folder, bright_model):
    dataset = open_dataset(str(bright_folder), "train")
    result, rows = evaluate(bright_model.train(), dataset, limit=1, progress=False)
    assert bright_model.training
    assert result["refs"] == 1
    assert len(rows) == 3
    evaluate(bright_model.eval(), dataset, limit=1, progress=False)
    assert not bright_model.training


def test_a_failing_model_gets_its_mode_back(bright_folder, bright_model):
    bright_model.train().size = 16
    bright_model.forward = None
    with pytest.raises(TypeError):
        evaluate(bright_model, open_dataset(str(bright_folder), "train"), progress=False)
    assert bright_model.training


def test_what_cannot_be_read_ends_it_or_is_counted(bright_folder, bright_model, capsys):
    dataset = open_dataset(str(bright_folder), "train")
    (bright_folder / "images" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.png"):
        evaluate(bright_model, dataset, progress=False)
    result, rows = evaluate(bright_model, dataset, progress=False, keep_going=True)
    assert (result["refs"], result["skipped"], len(rows)) == (1, 1, 3)
    assert "skipped: " in capsys.readouterr().err


def test_data_with_sentences_that_fit_nothing_has_four_more_scores(tmp_path, bright_model):
    """gRefCOCO has them by itself, at 50 pixels; other data where `nothing_below` is given."""
    write_refer(tmp_path, REFCOCO_FILES["grefcoco"], grefer_tables())
    dataset = open_dataset("grefcoco", "train", tmp_path)
    result, rows = evaluate(bright_model, dataset, progress=False)
    assert [row["G"] for row in rows] == [275, 275, 0, 0]
    assert result["nothing_below"] == 50
    # images 0 and 1 are dark: 40 or less of 255; nothing bright is found in them
    assert (result["N-acc"], result["T-acc"], result["gIoU"]) == (100, 0, 50)
    assert "N-acc" in format_result(result)
    other = RefDataset("mine", "train", dataset.samples)
    plain, _ = evaluate(bright_model, other, progress=False)
    assert "gIoU" not in plain
    assert "N-acc" not in format_result(plain)
    asked, _ = evaluate(bright_model, other, progress=False, nothing_below=1)
    assert asked["gIoU"] == 50


def test_scenes_keep_the_kind_of_their_sentences(bright_model):
    dataset = open_dataset("scenes", "val", limit=2, side=bright_model.size)
    _, rows = evaluate(bright_model, dataset, progress=False)
    kinds = [kind for i in range(2) for kind in dataset[i].kinds]
    assert [row["kind"] for row in rows] == kinds


def test_the_threshold_is_a_probability(bright_folder, bright_model):
    """A constant logit 0 is probability 0.5 everywhere: over 0.49, not over 0.51."""
    dataset = open_dataset(str(bright_folder), "train")
    bright_model.forward = lambda images, tokens: torch.zeros(len(images), 1, 8, 8)
    _, under = evaluate(bright_model, dataset, threshold=0.49, progress=False)
    _, over = evaluate(bright_model, dataset, threshold=0.51, progress=False)
    assert under[0]["U"] == HEIGHT * WIDTH
    assert over[0]["I"] == 0


def test_a_probability_of_exactly_the_threshold_is_not_over_it(bright_folder, bright_model):
    """Every probability 0, whatever interpolates it: nothing is found with the threshold 0."""
    bright_model.forward = lambda images, tokens: torch.full((len(images), 1, 32, 32), -200.0)
    dataset = open_dataset(str(bright_folder), "train")
    _, rows = evaluate(bright_model, dataset, progress=False, threshold=0)
    assert [row["I"] for row in rows] == [0] * 4


def test_probabilities_fill_the_square(bright_model):
    square, _ = letterbox(np.full((32, 32, 3), 255, np.uint8), 32)
    tokens = torch.zeros(1, 6, dtype=torch.long)
    maps = predict_probabilities(bright_model.eval(), normalize(square[None]), tokens)
    assert maps.shape == (1, 32, 32)
    torch.testing.assert_close(maps, torch.ones(1, 32, 32))


def test_align_corners_is_the_models_own_choice(bright_model):
    """A ramp of eight cells: with aligned corners cell 0 lies on pixel 0 exactly."""
    images = torch.zeros(1, 3, 32, 32)
    tokens = torch.zeros(1, 6, dtype=torch.long)
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8) - 4
    bright_model.forward = lambda images, tokens: ramp
    plain = predict_probabilities(bright_model, images, tokens)
    bright_model.align_corners = True
    aligned = predict_probabilities(bright_model, images, tokens)
    expected = torch.sigmoid(torch.tensor(-4.0)).item()
    assert aligned[0, 0, 0] == pytest.approx(expected, abs=1e-6)
    assert (plain - aligned).abs().max() > 0.01


def test_the_ceiling_of_the_logit_grid_is_what_cells_of_four_can_say(bright_folder):
    """The second mask fills its image, the first ends between cells 4 and 5 of 8."""
    ceiling = grid_ceiling(open_dataset(str(bright_folder), "train"), 32)
    assert ceiling["mIoU"] > 99
    line = np.eye(HEIGHT, WIDTH, dtype=np.uint8) * 255
    Image.fromarray(line).save(bright_folder / "masks" / "0.png")
    # a line one pixel wide is lost
    assert grid_ceiling(open_dataset(str(bright_folder), "train"), 32)["mIoU"] < 75


def test_every_split_of_the_real_sample_is_measured(refer_sample, bright_model):
    for split, sentences in {"train": 23, "val": 19, "testA": 30, "testB": 23}.items():
        dataset = open_dataset("refcoco", split, refer_sample)
        result, rows = evaluate(bright_model, dataset, progress=False)
        assert result["sentences"] == len(rows) == sentences
        assert 0 <= result["oIoU"] <= 100


def test_trained_with_sentences_that_fit_nothing_a_model_says_nothing_more_often():
    """The shipped pair of notebook 07, on 40 scenes whose sentences fit nothing, one or several."""
    dataset = open_dataset("scenes-any", "val", limit=40, side=128)
    found = {}
    for name in ("etris-tiny", "etris-any"):
        model = load_checkpoint(ROOT / "weights" / f"{name}.pt")
        found[name], _ = evaluate(model, dataset, progress=False)
    assert found["etris-any"]["N-acc"] > 40 > 20 > found["etris-tiny"]["N-acc"]
    assert found["etris-any"]["gIoU"] > found["etris-tiny"]["gIoU"] + 5
    assert found["etris-any"]["T-acc"] > 70


# --------------------------------------------------------------------- --by: the paper's appendix B
def scene_row(kind, objects, occlusion, both, either, digit=None, found=None):
    return {
        "kind": kind,
        "objects": objects,
        "occlusion": occlusion,
        "I": both,
        "U": either,
        "digit": digit,
        "found": found,
    }


ROWS = [
    scene_row("digit", 3, "none", 1, 1, 7, "7"),
    scene_row("digit", 12, "up to 10 %", 0, 4, 7, "1"),
    scene_row("place", 3, "none", 1, 2),
    scene_row("digit", 5, "more", 0, 1, 2, "nothing"),
]


def test_scores_by_group_are_those_of_its_sentences():
    """Three objects: IoU 1 and 1/2, so mIoU 75 and oIoU 2/3. Groups are in order of their value."""
    groups = group_scores(ROWS, "objects")
    assert list(groups) == ["3", "5", "12"]
    assert [scores["sentences"] for scores in groups.values()] == [2, 1, 1]
    assert groups["3"]["mIoU"] == 75
    assert groups["3"]["oIoU"] == pytest.approx(200 / 3)
    assert list(group_scores(ROWS, "occlusion")) == ["none", "up to 10 %", "more"]
    kinds = group_scores(ROWS, "kind")
    assert {name: scores["mIoU"] for name, scores in kinds.items()} == {
        "digit": pytest.approx(100 / 3),
        "place": 50,
    }


def test_the_confusion_of_digits_counts_what_was_found():
    assert group_scores(ROWS, "digits") == {"2": {"nothing": 1}, "7": {"7": 1, "1": 1}}


def test_the_thing_found_is_where_most_of_the_mask_lies():
    """A 3 at the left, a ring at the right, on 160 pixels; masks on 80: a pixel is two wide."""
    three = Thing("number", "red", "medium", 40, 80, 20, 3)
    ring = Thing("ring", "blue", "medium", 120, 80, 20)
    things = [three, ring]
    mask = torch.zeros(80, 80, dtype=torch.bool)
    assert found_thing(things, mask) == "nothing"
    mask[38:42, 18:22] = True
    assert found_thing(things, mask) == "3"
    mask[35:45, 55:65] = True
    assert found_thing(things, mask) == "no digit"
    mask[:] = False
    mask[:3, :3] = True  # in nobody's radius
    assert found_thing(things, mask) == "nothing"


def test_a_model_that_finds_the_truth_confuses_no_digits():
    """The drawn masks themselves as predictions: whatever digit is asked for is found."""
    dataset = open_dataset("scenes", "test-numbers", limit=40, side=64)
    items = EvalDataset(dataset, 64, 17)
    items = [items[i] for i in range(40)]
    rows = []
    for item in items:
        for k in range(len(item["tokens"])):
            area = int(item["mask"].sum())
            rows.append(room.score(item, k, item["mask"], area, area))
    confusion = group_scores(rows, "digits")
    assert confusion
    for asked, found in confusion.items():
        assert found == {asked: found.get(asked)}
    counted = sum(sum(found.values()) for found in confusion.values())
    assert counted == sum(row["kind"] == "digit" for row in rows)
    assert {row["objects"] for row in rows} == {len(item["sample"].things) for item in items}
    bins = {"none"}
    for item in items:
        fits = [bound for bound in room.OCCLUSION_BINS if item["sample"].occlusion <= bound]
        bins.add(room.OCCLUSION_BINS[min(fits)])
    assert {row["occlusion"] for row in rows} == bins


def test_by_writes_table_and_figure_beside_the_json(bright_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(room, "load_checkpoint", lambda *_: bright_model.eval())
    out = tmp_path / "n.json"
    argv = ["x.pt", "--split", "test-numbers", "--limit", "30", "--device", "cpu"]
    for by in ("kind", "objects", "occlusion", "digits"):
        argv += ["--by", by]
    room.main([*argv, "--json", str(out), "--csv", str(tmp_path / "n.csv")])
    result = json.loads(out.read_text())
    printed = capsys.readouterr().out
    for by in ("kind", "objects", "occlusion"):
        counted = sum(scores["sentences"] for scores in result["by"][by].values())
        assert counted == result["sentences"]
        assert f"by {by}" in printed
        assert (tmp_path / f"n-by-{by}.png").stat().st_size > 3000
    with open(tmp_path / "n.csv", encoding="utf-8") as file:
        digits = [row["digit"] for row in csv.DictReader(file) if row["kind"] == "digit"]
    counted = sum(sum(found.values()) for found in result["by"]["digits"].values())
    assert counted == len(digits)
    assert "" not in digits
    assert (tmp_path / "n-by-digits.png").exists()


def test_by_needs_scenes_and_says_so(bright_folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        room.main(["x.pt", "--dataset", str(bright_folder), "--by", "kind"])
    assert stopped.value.code == 2
    assert "choose --dataset scenes" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- command
def run(monkeypatch, model, *argv):
    monkeypatch.setattr(room, "load_checkpoint", lambda *_: model)
    room.main(["x.pt", "--device", "cpu", *map(str, argv)])


def test_the_command_writes_what_it_prints(
    bright_folder, bright_model, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "out"
    files = ["--json", out / "r.json", "--csv", out / "r.csv", "--save-masks", out / "masks"]
    run(monkeypatch, bright_model, "--dataset", bright_folder, "--split", "train", *files)
    printed = capsys.readouterr().out
    result = json.loads((out / "r.json").read_text())
    assert "2 refs, 4 sentences, 2 images" in printed
    for text in ("every sentence", "> 0.35", "1 sentences are longer", "Pr@0.9"):
        assert text in printed
    assert f"{result['oIoU']:.2f}" in printed
    assert result["checkpoint"] == "x.pt"
    rows = list(csv.DictReader((out / "r.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["sentence"] for row in rows][:2] == ["bright", "dark"]
    assert len(rows) == 4
    saved = {path.name: np.asarray(Image.open(path)) for path in (out / "masks").iterdir()}
    assert sorted(saved) == ["0_0.png", "0_1.png", "0_2.png", "1_0.png"]
    assert saved["0_0.png"].shape == (HEIGHT, WIDTH)
    assert set(np.unique(saved["0_0.png"])) == {0, 255}
    truth = np.asarray(Image.open(bright_folder / "masks" / "0.png"))
    union = (saved["0_0.png"] > 0) | (truth > 0)
    assert union.sum() == int(rows[0]["U"])


def test_masks_are_written_all_or_none(bright_folder, bright_model, monkeypatch, tmp_path):
    (bright_folder / "images" / "1.png").write_bytes(b"")
    masks = tmp_path / "found"
    argv = ["--dataset", bright_folder, "--split", "train", "--save-masks", masks]
    with pytest.raises(SystemExit):
        run(monkeypatch, bright_model, *argv)
    assert not masks.exists()
    run(monkeypatch, bright_model, *argv, "--keep-going")
    assert len(list(masks.iterdir())) == 3


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--split", "testA"], "split testA has no refs"),
        (["--split", "train", "--threshold", "2"], "--threshold 2"),
        (["--split", "train", "--batch-size", "0"], "--batch-size: 0"),
        (["--split", "train", "--limit", "0"], "--limit: 0"),
        (["--split", "train", "--json", "{folder}/refs.jsonl/x"], "cannot be written"),
        (["--split", "train", "--json", "{folder}/images"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    bright_folder, bright_model, monkeypatch, capsys, argv, says
):
    argv = [word.format(folder=bright_folder) for word in argv]
    before = sorted(bright_folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, bright_model, "--dataset", bright_folder, *argv)
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert says in error[-1]
    assert sorted(bright_folder.rglob("*")) == before


def test_an_unwritable_file_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_file(tmp_path, b"x")
    assert list(tmp_path.parent.glob(f"{tmp_path.name}.part*")) == []


def test_the_table_prints_thousands_with_commas():
    counts = {"refs": 3811, "sentences": 10834, "images": 1500, "cut": 0}
    what = {"dataset": "refcoco", "split": "val", "policy": "every sentence", "dtype": "float32"}
    how = {"threshold": 0.35, "size": 416}
    text = format_result({**summarize([1], [2]), **counts, **what, **how})
    assert "3,811 refs, 10,834 sentences, 1,500 images" in text
    assert "  50.00" in text
