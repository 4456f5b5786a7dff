"""The tiny CLIP from nothing (toy/pretrain.py): captions, twins, the contrastive loss, the file."""

import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip_model import CLIP, CLIP_CONFIGS, load_clip
from toy import pretrain
from toy.scenes import COLORS, SIZE_WORDS, WORLD, Thing, draw_things
from utils.clip_weights import read_weights
from utils.tokenizer import tokenize


def make_rng(*seed):
    return np.random.default_rng(seed)


# ---- captions
def true_of(words, things):
    """Things that fit a phrase of a caption: colour, shape or digit, size, and place, if named."""
    tokens = set(words.split())
    fits = []
    for t in things:
        name = {"number", str(t.digit)} if t.shape == "number" else {t.shape}
        wrong = {w for size, ws in SIZE_WORDS.items() if size != t.size for w in ws}
        elsewhere = {
            "left": t.x > 0.4 * WORLD,
            "right": t.x < 0.6 * WORLD,
            "top": t.y > 0.4 * WORLD,
            "bottom": t.y < 0.6 * WORLD,
        }
        wrong |= {word for word, is_elsewhere in elsewhere.items() if is_elsewhere}
        if {t.colour, *name} <= tokens and not tokens & wrong:
            fits.append(t)
    return fits


def test_every_phrase_of_a_caption_is_true_of_a_thing():
    """1,000 captions of one to four things: lists of up to three, each part true of a thing."""
    joints = r" and | (?:to the )?(?:left|right) of the | (?:above|over|below|under) the "
    for i in range(1000):
        things = draw_things(make_rng(i), "train")[: 1 + i % 4]
        said = pretrain.caption(things, make_rng(i, 1))
        parts = re.split(joints, said)
        assert 1 <= len(parts) <= 3 and all(true_of(part, things) for part in parts), (said, things)


@pytest.mark.parametrize(
    "words, axis, sign",
    [
        ("left of", 0, -1),
        ("right of", 0, 1),
        ("above", 1, -1),
        ("over", 1, -1),
        ("below", 1, 1),
        ("under", 1, 1),
    ],
)
def test_a_relation_in_a_caption_is_the_larger_of_the_two_distances(words, axis, sign):
    """red is at (x, y) of blue: the word says on which side, along the axis of the larger one."""
    seen = 0
    for i in range(400):
        x, y = make_rng(i).uniform(30, 130, 2)
        red = Thing("ring", "red", "medium", x, y, 20)
        blue = Thing("star", "blue", "medium", 80, 80, 20)
        said = pretrain.caption([red, blue], make_rng(i, 1))
        if f" {words} the " in said:
            red_first = said.index("red") < said.index("blue")
            apart = np.array([x - 80, y - 80]) * (1 if red_first else -1)
            assert np.argmax(abs(apart)) == axis and np.sign(apart[axis]) == sign, said
            seen += 1
    assert seen > 5


def test_twins_show_the_same_places_with_the_looks_moved_on():
    """Of three things each looks as the next did; of one as the last of the scene; places stay."""
    looks = [("ring", "red"), ("star", "blue"), ("heart", "green")]
    things = tuple(
        Thing(shape, color, "small", 40.0 * i, 9.0, 16, None)
        for i, (shape, color) in enumerate(looks, 1)
    )
    traded = [(t.shape, t.colour, t.x) for t in pretrain.trade_places(things, 3)]
    assert traded == [("star", "blue", 40), ("heart", "green", 80), ("ring", "red", 120)]
    assert [(t.colour, t.x) for t in pretrain.trade_places(things, 1)] == [("green", 40)]
    assert len(pretrain.trade_places(things[:1], 1)) == 1


def test_of_four_images_the_second_is_the_firsts_twin(monkeypatch):
    """The same rng for both; a batch depends on its seed alone, and another seed gives another."""
    asked = []
    real = pretrain.draw

    def draw(rng, progress, side, twin):
        asked.append((rng.random(), twin))
        return real(rng, progress, side, twin)

    monkeypatch.setattr(pretrain, "draw", draw)
    images, tokens = pretrain.batch(8, 32, (3, 1))
    assert [twin for _, twin in asked] == [False, True, False, False] * 2
    first = [number for number, _ in asked]
    assert first[0] == first[1] and first[4] == first[5] and len(set(first)) == 6
    again, _ = pretrain.batch(8, 32, (3, 1))
    other, _ = pretrain.batch(8, 32, (3, 2))
    assert images.shape == (8, 3, 32, 32) and tokens.shape == (8, pretrain.MAX_TOKENS)
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_a_run_begins_with_one_or_two_things_and_never_shows_a_scene_of_test(monkeypatch):
    """At the start at most two things and no whole scene; whole scenes, later, are of train."""
    shown = []
    plans = []
    real_paint = pretrain.paint
    real_plan = pretrain.plan_scene

    def paint(things, *rest):
        shown.append(len(things))
        return real_paint(things, *rest)

    def plan_scene(*which):
        plans.append(which)
        return real_plan(*which)

    monkeypatch.setattr(pretrain, "paint", paint)
    monkeypatch.setattr(pretrain, "plan_scene", plan_scene)
    pretrain.batch(60, 16, (1, 1), progress=0.0)
    assert max(shown) == 2 and not plans
    pretrain.batch(60, 16, (1, 2), progress=1.0)
    assert max(shown) > 4 and plans and {split for _, split, _ in plans} == {"train"}


# ---- the loss and what is read off it
def test_captions_are_those_that_the_shipped_weights_were_trained_with():
    """A hash of 60 token rows, made by the code that trained them."""
    digest = hashlib.sha256()
    for seed in range(3):
        _, tokens = pretrain.batch(20, 32, (seed, 7))
        digest.update(tokens.numpy().tobytes())
    assert digest.hexdigest()[:16] == "a6b7a8e8e46c3604"


def test_the_contrastive_loss_by_hand():
    """Two pairs at right angles, scale ln 3: each finds its own with 3/4, so −ln 3/4.

    Lengths do not count.
    """
    a = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    right = pretrain.contrastive_loss(a, a, math.log(3))
    wrong = pretrain.contrastive_loss(a, a.flip(0), math.log(3))
    assert right.item() == pytest.approx(-math.log(3 / 4))
    assert wrong.item() == pytest.approx(-math.log(1 / 4))


class Oracle(torch.nn.Module):
    """Knows every caption: features are one-hot by how many images or sentences came before."""

    def __init__(self, wrong=0):
        super().__init__()
        self.config = CLIP_CONFIGS["tiny"]
        self.wrong = wrong
        self.seen = [0, 0]

    def count(self, what, n):
        self.seen[what] += n
        return torch.arange(self.seen[what] - n, self.seen[what])

    def encode_image(self, images):
        return F.one_hot(self.count(0, len(images)), 100).float()

    def encode_text(self, tokens):
        numbers = self.count(1, len(tokens))
        swapped = (numbers + 1) % max(1, self.wrong)
        return F.one_hot(torch.where(numbers < self.wrong, swapped, numbers), 100).float()


def test_retrieval_counts_what_is_found_first():
    """All right; then ten of fifty with each other's captions: four fifths at once, all in five."""
    assert set(pretrain.retrieval(Oracle(), 50).values()) == {100.0}
    assert pretrain.retrieval(Oracle(wrong=10), 50) == {
        "caption@1": 80,
        "caption@5": 100,
        "picture@1": 80,
        "picture@5": 100,
    }


def test_scaling_the_text_projection_changes_lengths_and_no_direction():
    torch.manual_seed(0)
    clip = CLIP(CLIP_CONFIGS["tiny"]).eval()
    torch.nn.init.normal_(clip.token_embedding.weight, std=0.02)
    tokens = tokenize(["red ring", "big blue star on the left"], pretrain.MAX_TOKENS)
    with torch.no_grad():
        before = clip.encode_text(tokens)
        pretrain.scale_text_projection(clip)
        after = clip.encode_text(tokens)
        assert torch.allclose(F.normalize(before, dim=-1), F.normalize(after, dim=-1), atol=1e-5)
        many = clip.encode_text(pretrain.batch(128, 16, (0, 0))[1])
    assert many.std().item() == pytest.approx(0.4, rel=0.01)


# ---- the file
def test_a_tiny_clip_is_made_by_three_steps_and_fits(tmp_path):
    """Half precision, under 6 MB, only token rows that occurred, a record; twice the same file."""
    paths = [tmp_path / name for name in ("a.pt", "b.pt")]
    for path in paths:
        pretrain.main(["tiny", "--steps", "3", "--batch-size", "8", "--out", str(path)])
    record = json.loads(paths[0].with_suffix(".json").read_text())
    command = "python -m toy.pretrain tiny --steps 3 --batch-size 8 --lr 0.0015 --seed 0"
    assert record["command"] == command
    assert paths[0].stat().st_size == record["bytes"] < 6_000_000
    assert set(record["retrieval_of_500"]) == {"caption@1", "caption@5", "picture@1", "picture@5"}

    file = torch.load(paths[0], weights_only=True)
    rows = file["token_rows"]
    assert len(file["token_embedding.weight"]) == len(rows) == record["token_rows"] < 100
    assert all(x.dtype == torch.float16 for x in file.values() if x.is_floating_point())
    a, b = (read_weights(path) for path in paths)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    features = load_clip("tiny", paths[0]).encode_text(tokenize(["red ring"], 24))
    assert features.shape == (1, CLIP_CONFIGS["tiny"].embed_dim)
    words = set(tokenize(list(COLORS), 24).flatten().tolist()) - {0}
    assert words & set(rows.tolist())


def test_small_goes_on_from_tiny_at_a_larger_size(tmp_path, monkeypatch):
    """Its first batch shows crowds, not one thing or two; at a rate of nearly 0 it stays tiny.pt,
    but for the grid of positions, the scale of the text projection and the count of batches.
    """
    shown = []
    real = pretrain.draw

    def draw(rng, progress, side, twin):
        shown.append((progress, side))
        return real(rng, progress, side, twin)

    monkeypatch.setattr(pretrain, "draw", draw)
    monkeypatch.setattr(pretrain, "retrieval", lambda clip: {})
    path = tmp_path / "small.pt"
    options = ["--steps", "1", "--batch-size", "4", "--lr", "1e-9", "--out", str(path)]
    pretrain.main(["small", *options])
    assert shown[:4] == [(1.0, 192)] * 4

    small = load_clip("small", path).state_dict()
    tiny = load_clip("tiny").state_dict()
    positions = "visual.attnpool.positional_embedding"
    assert small[positions].shape == (37, 512) and tiny[positions].shape == (17, 512)
    assert torch.allclose(small[positions][0], tiny[positions][0], atol=1e-4)  # the class row
    rows = torch.load(path, weights_only=True)["token_rows"]
    for name in ("visual.layer4.0.conv3.weight", "visual.conv1.weight", "logit_scale"):
        assert torch.allclose(small[name], tiny[name], atol=2e-3), name
    words = "token_embedding.weight"
    assert torch.allclose(small[words][rows], tiny[words][rows], atol=2e-3)
