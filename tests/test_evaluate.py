"""5. What `evaluate.py` promises: the formulas by hand, every sentence at its picture's size, whatever the batch."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import HEIGHT, WIDTH, record, write_folder
from PIL import Image

import evaluate as room
from clip_model import UserError
from data import letterbox, open_dataset
from evaluate import (
    EvalSet,
    evaluate,
    found_thing,
    grid_ceiling,
    group_scores,
    intersection_union,
    predict_probabilities,
    sentence_batches,
    summarise,
    table,
)
from scenes import Thing


def masks(*rows):
    return torch.tensor([[pixel == "#" for pixel in row] for row in rows])


def test_two_masks_whose_oiou_and_miou_differ():
    """By hand, two 4x4 pairs. First: P 8 pixels, G 8, both 4, either 12: 4/12. Second: both the same pixel: 1/1.

    oIoU = (4 + 1) / (12 + 1) = 38.46 %; mIoU = (1/3 + 1) / 2 = 66.67 %; over 0.5 is one of the two: 50 %.
    """
    first = intersection_union(masks("####", "####", "....", "...."), masks("....", "####", "####", "...."))
    second = intersection_union(masks("#...", "....", "....", "...."), masks("#...", "....", "....", "...."))
    assert (first, second) == ((4, 12), (1, 1))
    result = summarise(*zip(first, second, strict=True))
    assert result["oIoU"] == pytest.approx(100 * 5 / 13) and result["mIoU"] == pytest.approx(100 * 2 / 3)
    assert [result[f"Pr@0.{x}"] for x in range(5, 10)] == [50] * 5


def test_precision_counts_what_is_strictly_over():
    """IoU of exactly 0.5 is not over 0.5; 0.75 is over 0.5, 0.6 and 0.7."""
    result = summarise([1, 3], [2, 4])
    assert [result[f"Pr@0.{x}"] for x in range(5, 10)] == [50, 50, 50, 0, 0]


def test_nothing_to_find_and_nothing_found_counts_as_right():
    """Empty and empty: 1. Something found where nothing was: 0. ΣU = 0 gives an oIoU of 1 as well."""
    assert summarise([0, 0], [0, 5])["mIoU"] == 50 and summarise([0, 0], [0, 5])["oIoU"] == 0
    assert summarise([0], [0]) == dict.fromkeys(["oIoU", "mIoU", *(f"Pr@0.{x}" for x in range(5, 10))], 100)


def test_formulas_equal_a_loop_over_pixels():
    """Slow and obvious, over twenty random pairs of masks."""
    rng = np.random.default_rng(0)
    pairs = [(rng.random((5, 7)) < 0.6, rng.random((5, 7)) < 0.5) for _ in range(20)]
    table_ = []
    for prediction, truth in pairs:
        both = sum(bool(prediction[y, x] and truth[y, x]) for y in range(5) for x in range(7))
        either = sum(bool(prediction[y, x] or truth[y, x]) for y in range(5) for x in range(7))
        table_.append((both, either))
    assert [intersection_union(torch.tensor(p), torch.tensor(g)) for p, g in pairs] == table_
    result = summarise(*zip(*table_, strict=True))
    assert result["mIoU"] == pytest.approx(100 * sum(i / u for i, u in table_) / 20)
    assert result["oIoU"] == pytest.approx(100 * sum(i for i, _ in table_) / sum(u for _, u in table_))
    assert result["Pr@0.5"] == pytest.approx(100 * sum(i / u > 0.5 for i, u in table_) / 20)


@pytest.fixture
def bright_folder(tmp_path):
    """Two pictures with a bright rectangle; of the second, the mask asks for one twice as wide as what is bright."""
    own = write_folder(
        tmp_path, [record(0, sentences=["bright", "dark", "the bright thing over there now"]), record(1)]
    )
    for number, right in enumerate((20, 40)):
        picture, mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
        picture[:, :20], mask[:, :right] = 255, 255
        Image.fromarray(picture).save(own / "images" / f"{number}.png")
        Image.fromarray(mask).save(own / "masks" / f"{number}.png")
    return own


def test_every_sentence_is_measured_at_the_pictures_own_size(bright_folder, bright_model):
    """30x40 pixels, bright in 20 columns of 40; the stub cannot be exact at the edge, but nearly.

    bright: IoU about 1. dark: about 0. The seven words are cut to the stub's six. Second picture: about 600 / 1200.
    """
    source = open_dataset(str(bright_folder), "train")
    result, rows = evaluate(bright_model, source, progress=False)
    assert [(row["ref_id"], row["sent_id"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [row["IoU"] for row in rows] == pytest.approx([100, 0, 100, 50], abs=11)
    assert rows[0]["I"] == 600 and rows[3]["U"] == HEIGHT * WIDTH  # all of the picture, no pixel of a border
    assert (result["sentences"], result["refs"], result["images"], result["cut"]) == (4, 2, 2, 1)
    assert result["mIoU"] == pytest.approx(np.mean([row["IoU"] for row in rows]))
    assert result["oIoU"] == pytest.approx(100 * sum(r["I"] for r in rows) / sum(r["U"] for r in rows))
    assert (result["threshold"], result["split"]) == (0.35, "train")


def test_the_batch_size_changes_nothing(bright_folder, bright_model):
    source = open_dataset(str(bright_folder), "train")
    whole = evaluate(bright_model, source, batch_size=32, progress=False)
    for batch_size in (1, 2, 3):
        assert evaluate(bright_model, source, batch_size=batch_size, progress=False) == whole


def test_sentences_of_several_objects_share_a_batch():
    items = [{"sentences": "ab"}, {"sentences": "cde"}]
    names = [[item["sentences"][k] for item, k in batch] for batch in sentence_batches(items, 2)]
    assert names == [["a", "b"], ["c", "d"], ["e"]]


def test_limit_counts_objects_and_the_mode_comes_back(bright_folder, bright_model):
    source = open_dataset(str(bright_folder), "train")
    result, rows = evaluate(bright_model.train(), source, limit=1, progress=False)
    assert bright_model.training and result["refs"] == 1 and len(rows) == 3
    evaluate(bright_model.eval(), source, limit=1, progress=False)
    assert not bright_model.training


def test_a_failing_model_gets_its_mode_back(bright_folder, bright_model):
    bright_model.train().size = 16
    bright_model.forward = None
    with pytest.raises(TypeError):
        evaluate(bright_model, open_dataset(str(bright_folder), "train"), progress=False)
    assert bright_model.training


def test_scenes_keep_the_kind_of_their_sentences(bright_model):
    source = open_dataset("scenes", "val", limit=2, side=bright_model.size)
    _, rows = evaluate(bright_model, source, progress=False)
    assert [row["kind"] for row in rows] == [kind for i in range(2) for kind in source[i].kinds]


# ---- --by: the paper's appendix B
def scene_row(kind, objects, occlusion, both, either, digit=None, found=None):
    return {"kind": kind, "objects": objects, "occlusion": occlusion, "I": both, "U": either, "digit": digit,
            "found": found}  # fmt: skip


ROWS = [scene_row("digit", 3, "none", 1, 1, 7, "7"), scene_row("digit", 12, "up to 10 %", 0, 4, 7, "1"),
        scene_row("place", 3, "none", 1, 2), scene_row("digit", 5, "more", 0, 1, 2, "nothing")]  # fmt: skip


def test_scores_by_group_are_those_of_its_sentences():
    """Three objects: IoU 1 and 1/2, so mIoU 75 and oIoU 2/3; groups come in order of number or of hidden share."""
    groups = group_scores(ROWS, "objects")
    assert list(groups) == ["3", "5", "12"] and [x["sentences"] for x in groups.values()] == [2, 1, 1]
    assert groups["3"]["mIoU"] == 75 and groups["3"]["oIoU"] == pytest.approx(200 / 3)
    assert list(group_scores(ROWS, "occlusion")) == ["none", "up to 10 %", "more"]
    assert {name: x["mIoU"] for name, x in group_scores(ROWS, "kind").items()} == {
        "digit": pytest.approx(100 / 3),
        "place": 50,
    }


def test_the_confusion_of_digits_counts_what_was_found():
    assert group_scores(ROWS, "digits") == {"2": {"nothing": 1}, "7": {"7": 1, "1": 1}}


def test_the_thing_found_is_where_most_of_the_mask_lies():
    """A 3 at the left, a ring at the right, on 160 pixels; masks on 80: a pixel stands for two."""
    things = [Thing("number", "red", "medium", 40, 80, 20, 3), Thing("ring", "blue", "medium", 120, 80, 20)]
    mask = torch.zeros(80, 80, dtype=torch.bool)
    assert found_thing(things, mask) == "nothing"
    mask[38:42, 18:22] = True
    assert found_thing(things, mask) == "3"
    mask[35:45, 55:65] = True
    assert found_thing(things, mask) == "no digit"
    mask[:] = False
    mask[:3, :3] = True  # in nobody's radius
    assert found_thing(things, mask) == "nothing"


def test_a_model_that_finds_the_truth_confuses_no_digits(bright_model):
    """The drawn masks themselves as predictions: whatever digit is asked for is found, every time."""
    source = open_dataset("scenes", "test-numbers", limit=40, side=64)
    items, rows = [EvalSet(source, 64, 17)[i] for i in range(40)], []
    for item in items:
        rows += [room.score(item, k, item["mask"]) for k in range(len(item["sentences"]))]
    confusion = group_scores(rows, "digits")
    assert confusion and all(found == {asked: found.get(asked)} for asked, found in confusion.items())
    assert sum(sum(x.values()) for x in confusion.values()) == sum(row["kind"] == "digit" for row in rows)
    assert {row["objects"] for row in rows} == {len(item["things"]) for item in items}
    hidden = {item["occlusion"] for item in items}
    assert {row["occlusion"] for row in rows} == {"none"} | {
        next(label for share, label in room.HIDDEN.items() if one <= share) for one in hidden
    }


def test_by_writes_table_and_figure_beside_the_json(bright_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(room, "load_checkpoint", lambda *_: bright_model.eval())
    more = [word for by in ("kind", "objects", "occlusion", "digits") for word in ("--by", by)]
    command = [
        "x.pt",
        "--split",
        "test-numbers",
        "--limit",
        "30",
        "--json",
        str(tmp_path / "n.json"),
        "--device",
        "cpu",
    ]
    room.main([*command, *more, "--csv", str(tmp_path / "n.csv")])
    result, printed = json.loads((tmp_path / "n.json").read_text()), capsys.readouterr().out
    for by in ("kind", "objects", "occlusion"):
        assert sum(x["sentences"] for x in result["by"][by].values()) == result["sentences"]
        assert f"by {by}" in printed and (tmp_path / f"n-by-{by}.png").stat().st_size > 3000
    with open(tmp_path / "n.csv") as file:
        digits = [row["digit"] for row in csv.DictReader(file) if row["kind"] == "digit"]
    assert sum(sum(x.values()) for x in result["by"]["digits"].values()) == len(digits) and "" not in digits
    assert (tmp_path / "n-by-digits.png").exists()


def test_by_needs_scenes_and_says_so(bright_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        room.main(["x.pt", "--dataset", str(bright_folder), "--by", "kind"])
    assert stop.value.code == 2 and "choose --dataset scenes" in capsys.readouterr().err


def test_the_threshold_is_a_probability(bright_folder, bright_model):
    """A constant logit 0 is probability 0.5 everywhere: over 0.49, not over 0.51."""
    source = open_dataset(str(bright_folder), "train")
    bright_model.forward = lambda images, tokens: torch.zeros(len(images), 1, 8, 8)
    _, under = evaluate(bright_model, source, threshold=0.49, progress=False)
    _, over = evaluate(bright_model, source, threshold=0.51, progress=False)
    assert under[0]["U"] == HEIGHT * WIDTH and over[0]["I"] == 0


def test_probabilities_fill_the_square(bright_model):
    image, _ = letterbox(np.full((32, 32, 3), 255, np.uint8), 32)
    maps = predict_probabilities(bright_model.eval(), image[None], torch.zeros(1, 6, dtype=torch.long))
    assert maps.shape == (1, 32, 32)
    torch.testing.assert_close(maps, torch.ones(1, 32, 32))


def test_align_corners_is_the_models_own_choice(bright_model):
    """A ramp of eight cells: with aligned corners cell 0 lies on pixel 0 exactly, and the rest moves."""
    image, tokens = torch.zeros(1, 3, 32, 32), torch.zeros(1, 6, dtype=torch.long)
    bright_model.forward = lambda images, tokens: torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8) - 4
    plain = predict_probabilities(bright_model, image, tokens)
    bright_model.align_corners = True
    aligned = predict_probabilities(bright_model, image, tokens)
    assert aligned[0, 0, 0] == pytest.approx(torch.sigmoid(torch.tensor(-4.0)).item(), abs=1e-6)
    assert (plain - aligned).abs().max() > 0.01


def test_the_ceiling_of_the_logit_grid_is_what_cells_of_four_can_say(bright_folder):
    """The second mask fills its picture, the first ends between cells 4 and 5 of 8: nothing is lost but a rounding."""
    ceiling = grid_ceiling(open_dataset(str(bright_folder), "train"), 32)
    assert ceiling["mIoU"] > 99
    Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8) * 255).save(bright_folder / "masks" / "0.png")
    assert grid_ceiling(open_dataset(str(bright_folder), "train"), 32)["mIoU"] < 75  # a line one pixel wide is lost


def run(monkeypatch, model, *argv):
    monkeypatch.setattr(room, "load_checkpoint", lambda path, weights=None, device="cpu", words=None: model)
    room.main(["x.pt", "--device", "cpu", *map(str, argv)])


def test_the_command_writes_what_it_prints(bright_folder, bright_model, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    files = ["--json", out / "r.json", "--csv", out / "r.csv", "--save-masks", out / "masks"]
    run(monkeypatch, bright_model, "--dataset", bright_folder, "--split", "train", *files)
    printed, result = capsys.readouterr().out, json.loads((out / "r.json").read_text())
    for expected in ("2 refs, 4 sentences, 2 images", "every sentence", "> 0.35", "1 sentences are longer", "Pr@0.9"):
        assert expected in printed
    assert f"{result['oIoU']:.2f}" in printed and result["checkpoint"] == "x.pt"
    rows = list(csv.DictReader((out / "r.csv").read_text().splitlines()))
    assert [row["sentence"] for row in rows][:2] == ["bright", "dark"] and len(rows) == 4
    saved = {path.name: np.asarray(Image.open(path)) for path in (out / "masks").iterdir()}
    assert sorted(saved) == ["0_0.png", "0_1.png", "0_2.png", "1_0.png"]
    assert saved["0_0.png"].shape == (HEIGHT, WIDTH) and set(np.unique(saved["0_0.png"])) == {0, 255}
    union = (saved["0_0.png"] > 0) | (np.asarray(Image.open(bright_folder / "masks" / "0.png")) > 0)
    assert union.sum() == int(rows[0]["U"])


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
def test_what_is_wrong_is_said_in_one_line(bright_folder, bright_model, monkeypatch, capsys, argv, says):
    argv = [word.format(folder=bright_folder) for word in argv]
    before = sorted(bright_folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, bright_model, "--dataset", bright_folder, *argv)
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and says in error[-1]
    assert sorted(bright_folder.rglob("*")) == before


def test_an_unwritable_file_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        room.write_file(tmp_path, b"x")
    assert list(tmp_path.parent.glob(f".{tmp_path.name}*")) == []


def test_the_table_prints_thousands_with_commas():
    result = summarise([1], [2]) | {"refs": 3811, "sentences": 10834, "images": 1500, "cut": 0}
    result |= {"dataset": "refcoco", "split": "val", "policy": "every sentence", "threshold": 0.35, "size": 416}
    assert "3,811 refs, 10,834 sentences, 1,500 images" in table(result) and "  50.00" in table(result)


def test_every_split_of_the_real_sample_is_measured(refer_sample, bright_model):
    for split, sentences in {"train": 23, "val": 19, "testA": 30, "testB": 23}.items():
        result, rows = evaluate(bright_model, open_dataset("refcoco", split, refer_sample), progress=False)
        assert result["sentences"] == len(rows) == sentences and 0 <= result["oIoU"] <= 100


def test_a_probability_of_exactly_the_threshold_is_not_over_it(bright_folder, bright_model):
    """Every probability 0, whatever interpolates it: nothing is found with the threshold 0."""
    bright_model.forward = lambda images, tokens: torch.full((len(images), 1, 32, 32), -200.0)
    rows = evaluate(bright_model, open_dataset(str(bright_folder), "train"), progress=False, threshold=0)[1]
    assert [row["I"] for row in rows] == [0] * 4


def test_the_figure_of_digits_shows_who_was_taken_for_whom_and_nothing_else(tmp_path, monkeypatch):
    """A 3 found twice and taken for a 5 once: two numbers in the figure, all other cells empty."""
    from matplotlib.axes import Axes

    written, write = [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda axis, x, y, text, **more: written.append((x, y, text)) or
                        write(axis, x, y, text, **more))  # fmt: skip
    room.draw_groups("digits", {"3": {"3": 2, "5": 1}}, tmp_path / "x.png")
    assert [cell for cell in written if cell[2]] == [(3, 0, 2), (5, 0, 1)] and (tmp_path / "x.png").stat().st_size
