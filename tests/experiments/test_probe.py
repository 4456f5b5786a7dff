"""The probe measures what really crosses: bridges of known traffic, made by hand."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from checkpoint import build_model, save_checkpoint
from clip_model import CLIP, build_clip, load_clip
from data import Sample
from etris import build_etris
from experiments import probe
from experiments.probe import linear_probe, measure, set_strength, tapped
from methods.published import to_official
from tests.test_etris import RESNET, VIT
from toy.scenes import draw_scene
from train import arguments
from utils.clip_weights import init_by_name
from utils.common import UserError
from utils.tokenizer import tokenize

SIDES = ("left", "right")
WORDS = {side: tokenize([side], 4)[0, 1].item() for side in SIDES}  # after the start mark


class Squares:
    """A split: two bright squares in each image, two refs, "left" and "right"."""

    name = "squares"
    split = "test"

    def __init__(self, images=6):
        self.samples = []
        for image_id in range(images):
            rng = np.random.default_rng(image_id)
            image = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            top = int(rng.integers(0, 3)) * 16
            boxes = {"left": (top, 0), "right": (32 - top, 40)}
            for row, column in boxes.values():
                image[row : row + 16, column : column + 16] += 150
            for side, (row, column) in boxes.items():
                mask = np.zeros((64, 64), bool)
                mask[row : row + 16, column : column + 16] = True
                ref_id = len(self.samples)
                self.samples.append(Sample(image, mask, (side,), (0,), ref_id, image_id, "test"))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


class HandMadeBridge(nn.Module):
    """Δv marks the named half of the image: what crosses is exactly one word. Or nothing does."""

    def __init__(self, passes):
        super().__init__()
        self.passes = passes

    def forward(self, v, t, previous=None, key_padding_mask=None):
        """v (B, 2, H, W): brightness and a free channel; t (B, 4, 1): token ids."""
        delta = torch.zeros_like(v)
        if self.passes:
            named = t[:, 1, 0] == WORDS["left"]
            half = v.shape[3] // 2
            delta[named, 1, :, :half] = 1
            delta[~named, 1, :, half:] = 1
        return delta, torch.zeros_like(t), (v, t)


class HandMadeModel(nn.Module):
    """Bright places of the marked half are the object; without a mark, all bright places."""

    system = "etris"
    size = 64
    max_tokens = 4
    align_corners = False

    def __init__(self, passes):
        super().__init__()
        self.bridger = nn.ModuleDict({"0": HandMadeBridge(passes)})
        self.recorded = None

    def encode(self, images, tokens):
        brightness = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
        bright = (brightness > 0).float()
        v = torch.cat([bright, torch.zeros_like(bright)], dim=1)  # (B, 2, 16, 16)
        delta_v, _, _ = self.bridger["0"](v, tokens[:, :, None].float())
        return v + delta_v

    def forward(self, images, tokens):
        v = self.encode(images, tokens)
        marked = v[:, 1:].flatten(1).any(1).float()[:, None, None, None]
        found = v[:, :1] * (v[:, 1:] + 1 - marked)
        if self.recorded is not None:
            product = torch.cat([v, v[:, :1] * v[:, 1:]], dim=1)
            self.recorded |= {f"visual{i}.after": product for i in range(3)}
            self.recorded["features"] = product
        return 20 * found - 10


def rows_of(passes):
    rows = measure(HandMadeModel(passes), Squares(), progress=False)
    return {row["row"]: row for row in rows}


def test_traffic_of_a_bridge_that_passes_nothing_is_exactly_zero():
    rows = rows_of(passes=False)
    assert set(rows) >= {"none", "image only", "text only", "both", *probe.PARTNERS}
    for row in rows.values():
        assert row["drop"] == row["low"] == row["high"] == 0.0
    assert 40 < rows["both"]["mIoU"] < 51  # both squares: half is right, but for their edges


def test_traffic_of_a_bridge_that_carries_the_word_is_all_there_is():
    """Text → image with another sentence about the same image; image → text there is none."""
    rows = rows_of(passes=True)
    assert rows["both"]["mIoU"] > 80
    assert rows["other sentence"]["mIoU"] == 0.0
    assert rows["other sentence"]["drop"] == pytest.approx(rows["both"]["mIoU"])
    assert rows["sentence of another image"]["drop"] == 0.0  # six rows further: the same word
    assert rows["other image"]["drop"] == 0.0
    assert rows["text only"]["drop"] == rows["none"]["drop"] > 35
    assert rows["image only"]["drop"] == 0.0
    assert rows["stage 0"]["drop"] == 0.0
    assert 20 < rows["none"]["low"] < rows["none"]["drop"] < rows["none"]["high"]


def test_the_linear_probe_finds_what_was_carried():
    rows, examples = linear_probe(HandMadeModel(True), Squares(30), Squares(), progress=False)
    rows = {row["row"]: row for row in rows}
    assert list(rows) == ["probe stage 0", "probe stage 1", "probe stage 2", "probe decoder"]
    for row in rows.values():
        assert row["AUC"] > 99
        assert row["AUC_without"] < 98  # two squares look alike
        assert row["gain"] == pytest.approx(row["AUC"] - row["AUC_without"])
        assert row["low"] > 0
    sample, heats = examples[0]
    assert sample.sentences == ("left",)
    heat = heats["stage 0", 1]
    assert heat[:, :8].max() > heat[:, 8:].max()


def test_a_mute_bridger_has_no_traffic():
    """Through the real model: an arm in which nothing crosses, strength 0 is plain CLIP."""
    model = build_model("tiny", tuning="bridger+mute", weights="random", size=64, width=32)
    for bridge in model.bridger.values():
        for parameter in bridge.parameters():
            nn.init.normal_(parameter, std=0.3)
    rows = measure(model, Squares(), limit=4, names=probe.PARTNERS, progress=False)
    by_name = {row["row"]: row for row in rows}
    assert set(by_name) == {"both", *probe.PARTNERS}
    for name in probe.PARTNERS:
        assert by_name[name]["drop"] == by_name[name]["low"] == by_name[name]["high"] == 0.0


def test_strength_zero_is_plain_clip_bit_for_bit_and_one_the_model():
    torch.manual_seed(0)
    model = build_model("tiny", weights="random", size=64, width=32, seed=3).eval()
    clip = load_clip("tiny", "random", 3)
    images = torch.randn(2, 3, 64, 64)
    tokens = tokenize(["a red circle", "left"], model.max_tokens)
    with torch.no_grad():
        trained = model.activations(images, tokens)
        with tapped(model) as taps:
            set_strength(taps, 0, 0)
            plain = model.activations(images, tokens)
            set_strength(taps, 1, 1)
            again = model.activations(images, tokens)
        v = clip.visual.stem(images)
        t = clip.stem(tokens)
        for i in range(3):
            v = clip.visual.stages[i](v)
            t = clip.stages[i](t)
            assert torch.equal(plain[f"visual{i}.after"], clip.visual.to_map(v))
            assert torch.equal(plain[f"text{i}.after"], t)
    assert torch.equal(again["logits"], trained["logits"])
    assert not torch.equal(plain["logits"], trained["logits"])
    assert all(type(bridge).__name__ == "Bridge" for bridge in model.bridger.values())


def test_own_partner_changes_nothing():
    """Given its own text and image as partners, every bridge returns what it returned."""
    model = build_model("tiny", weights="random", size=64, width=32).eval()
    images = torch.randn(3, 3, 64, 64)
    tokens = tokenize(["a red circle", "left", "the one at the top"], model.max_tokens)
    with torch.no_grad(), tapped(model) as taps:
        expected = model(images, tokens)
        given = {stage: tap.given.rows([0, 1, 2]) for stage, tap in taps.items()}
        for stage, tap in taps.items():
            tap.sentence = given[stage]
            tap.other_image = given[stage]
        assert torch.equal(model(images, tokens), expected)
        for stage, tap in taps.items():
            tap.sentence = given[stage].rows([1, 2, 0])
        assert not torch.equal(model(images, tokens), expected)


def test_intervals_are_paired_and_resample_whole_objects():
    low, high = probe.interval([1.0] * 10, range(10))
    assert low == high == 1.0
    values = [0.0, 2.0] * 50
    low, high = probe.interval(values, range(100))
    assert 0.7 < low < 0.9 and 1.1 < high < 1.3  # 1 ± 1.96 · 0.1
    low, high = probe.interval(values, [i // 2 for i in range(100)])  # each object's mean is 1
    assert low == high == 1.0


def test_auc_counts_pairs():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0])
    labels = torch.tensor([True, False, True, False])
    assert probe.auc(scores, labels) == (1 + 1 + 1 + 0.5) / 4
    assert probe.auc(scores, torch.zeros(4, dtype=bool)) is None


def test_command_writes_rows_and_pictures(tmp_path, capsys):
    model = build_model("tiny", size=64, width=32)
    path = tmp_path / "model.pt"
    save_checkpoint(path, model, arguments(["--size", "64", "--width", "32"]))
    files = [tmp_path / name for name in ("rows.json", "rows.png", "maps.png")]
    options = ["--json", "--figure", "--heat-maps"]
    pairs = zip(options, map(str, files), strict=True)
    probe.main([str(path), "--limit", "4", *(word for pair in pairs for word in pair)])
    rows = json.loads(files[0].read_text())
    names = [row["row"] for row in rows]
    assert names[:4] == ["none", "image only", "text only", "both"]
    assert set(names) >= {"stage 0", "stage 2", "strength 1.5", "other image", "probe decoder"}
    assert {row["checkpoint"] for row in rows} == {str(path)}
    for row in rows:
        count = "images" if row["row"].startswith("probe") else "sentences"
        assert sum(kind[count] for kind in row["kinds"].values()) == row[count]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])
    assert "| other sentence |" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [RESNET, VIT])
def test_command_asks_a_published_file_on_refcoco(kind, refer_tree, monkeypatch, capsys):
    """As the authors' best_model.pth. One object per image: another sentence has no partner."""
    monkeypatch.setattr(probe, "STRENGTHS", (0.5,))  # for time
    clip = build_clip(init_by_name(CLIP(kind).state_dict()))
    state = to_official(build_etris(clip, 416, 17, released=True))
    path = refer_tree / "best_model.pth"
    torch.save({"state_dict": state, "epoch": 1}, path)
    files = [refer_tree / "rows.json", refer_tree / "rows.png"]
    probe.main(
        [str(path), "--dataset", "refcoco", "--split", "train", "--data", str(refer_tree)]
        + ["--device", "cpu", "--limit", "2", "--json", str(files[0]), "--figure", str(files[1])]
    )
    rows = {row["row"]: row for row in json.loads(files[0].read_text())}
    for row in rows.values():
        assert set(row) >= {"row", "checkpoint", "oIoU", "mIoU", "drop", "low", "high", "AUC"}
    assert rows["other sentence"]["sentences"] == 0
    assert rows["other sentence"]["drop"] is None
    assert rows["other image"]["drop"] is not None
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "| both | 4 |" in capsys.readouterr().out


def test_another_sentence_is_looked_for_in_the_whole_split():
    squares = Squares(2)
    assert probe.other_sentences(squares, 1) == {0: "right"}
    alone = Squares(1)
    del alone.samples[1]
    assert probe.other_sentences(alone, 1) == {0: None}


def test_a_model_without_a_bridger_is_one_line():
    model = build_model("tiny", tuning="frozen", weights="random", size=64)
    with pytest.raises(UserError, match="without a Bridger"):
        measure(model, Squares(), progress=False)


def test_a_scene_of_several_or_no_targets_has_another_sentence():
    """It is about a thing that is no target; where all things are, there is none to speak of."""
    for i in range(20):
        scene = draw_scene("scenes-any", "val", i)
        sentence = probe.sentence_about_another(scene)
        if len(scene.targets) == len(scene.things):
            assert sentence is None
        elif sentence:
            assert sentence not in scene.sentences
