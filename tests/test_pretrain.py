"""7. The tiny CLIP from nothing (pretrain.py): what its captions say is so, twins, the contrastive loss, the file."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pretrain
from clip_model import CLIP, SIZES, load_clip, tokenize
from official import read_weights
from scenes import COLOURS, SIZE_WORDS, WORLD, Thing, draw_things


def dice(*seed):
    return np.random.default_rng(seed)


# ---- captions
def true_of(words, things):
    """Things that fit a caption's phrase: colour, shape or digit, size word, and the place it names, if any."""
    tokens, fits = set(words.split()), []
    for t in things:
        name = {"number", str(t.digit)} if t.shape == "number" else {t.shape}
        sizes = {w for size, ws in SIZE_WORDS.items() if size != t.size for w in ws}
        away = {"left": t.x > 0.4 * WORLD, "right": t.x < 0.6 * WORLD, "top": t.y > 0.4 * WORLD,
                "bottom": t.y < 0.6 * WORLD}  # fmt: skip
        if {t.colour, *name} <= tokens and not tokens & sizes and not any(away[w] for w in tokens & set(away)):
            fits.append(t)
    return fits


def test_every_phrase_of_a_caption_is_true_of_a_thing():
    """1,000 captions of one to four things: lists of up to three, each part true of one of them at least."""
    for i in range(1000):
        things = draw_things(dice(i), "train")[: 1 + i % 4]
        said = pretrain.caption(things, dice(i, 1))
        parts = re.split(r" and | (?:to the )?(?:left|right) of the | (?:above|over|below|under) the ", said)
        assert 1 <= len(parts) <= 3 and all(true_of(part, things) for part in parts), (said, things)


@pytest.mark.parametrize(
    "words, axis, sign",
    [("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("over", 1, -1), ("below", 1, 1), ("under", 1, 1)],
)
def test_a_relation_in_a_caption_is_the_larger_of_the_two_distances(words, axis, sign):
    """red is at (x, y) of blue: the word says on which side, along the axis on which they are farther apart."""
    seen = 0
    for i in range(400):
        x, y = dice(i).uniform(30, 130, 2)
        red, blue = Thing("ring", "red", "medium", x, y, 20), Thing("star", "blue", "medium", 80, 80, 20)
        said = pretrain.caption([red, blue], dice(i, 1))
        if f" {words} the " in said:
            apart = np.array([x - 80, y - 80]) * (1 if said.index("red") < said.index("blue") else -1)
            assert np.argmax(abs(apart)) == axis and np.sign(apart[axis]) == sign, said
            seen += 1
    assert seen > 5


def test_twins_show_the_same_places_with_the_looks_moved_on():
    """Of three things each looks as the next did; of one as the last of the scene; places, sizes and order stay."""
    things = tuple(Thing(s, c, "small", 40.0 * i, 9.0, 16, None) for i, (s, c) in
                   enumerate([("ring", "red"), ("star", "blue"), ("heart", "green")], 1))  # fmt: skip
    looks = [(t.shape, t.colour, t.x) for t in pretrain.trade_places(things, 3)]
    assert looks == [("star", "blue", 40), ("heart", "green", 80), ("ring", "red", 120)]
    assert [(t.colour, t.x) for t in pretrain.trade_places(things, 1)] == [("green", 40)]
    assert len(pretrain.trade_places(things[:1], 1)) == 1


def test_of_four_pictures_the_second_is_the_firsts_twin(monkeypatch):
    """The same dice for both; a batch hangs on its seed alone, and another seed gives another."""
    asked = []
    real = pretrain.draw
    monkeypatch.setattr(pretrain, "draw", lambda rng, ripe, side, twin: asked.append((rng.random(), twin))
                        or real(rng, ripe, side, twin))  # fmt: skip
    images, tokens = pretrain.batch(8, 32, (3, 1))
    assert [twin for _, twin in asked] == [False, True, False, False] * 2
    first = [number for number, _ in asked]
    assert first[0] == first[1] and first[4] == first[5] and len(set(first)) == 6
    again, other = pretrain.batch(8, 32, (3, 1))[0], pretrain.batch(8, 32, (3, 2))[0]
    assert images.shape == (8, 3, 32, 32) and tokens.shape == (8, pretrain.CONTEXT)
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_a_run_begins_with_one_or_two_things_and_never_shows_a_scene_of_test(monkeypatch):
    """At the start at most two things and no whole scene; whole scenes, later, are of the train split."""
    shown, plans = [], []
    real, plan = pretrain.paint, pretrain.plan_scene
    monkeypatch.setattr(pretrain, "paint", lambda things, *rest: shown.append(len(things)) or real(things, *rest))
    monkeypatch.setattr(pretrain, "plan_scene", lambda *which: plans.append(which) or plan(*which))
    pretrain.batch(60, 16, (1, 1), ripe=0.0)
    assert max(shown) == 2 and not plans
    pretrain.batch(60, 16, (1, 2), ripe=1.0)
    assert max(shown) > 4 and plans and {split for _, split, _ in plans} == {"train"}


# ---- the loss and what is read off it
def test_the_contrastive_loss_by_hand():
    """Two pairs at right angles, scale ln 3: each finds its own with 3/4, so −ln 3/4; lengths do not count."""
    a = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    assert pretrain.contrastive_loss(a, a, math.log(3)).item() == pytest.approx(-math.log(3 / 4))
    assert pretrain.contrastive_loss(a, a.flip(0), math.log(3)).item() == pytest.approx(-math.log(1 / 4))


class Oracle(torch.nn.Module):
    """Knows every caption: picture and sentence features are one-hot by how many pictures or sentences came before."""

    def __init__(self, wrong=0):
        super().__init__()
        self.size, self.wrong, self.seen = SIZES["tiny"], wrong, [0, 0]

    def count(self, what, n):
        self.seen[what] += n
        return torch.arange(self.seen[what] - n, self.seen[what])

    def encode_image(self, images):
        return F.one_hot(self.count(0, len(images)), 100).float()

    def encode_text(self, tokens):
        places = self.count(1, len(tokens))
        return F.one_hot(torch.where(places < self.wrong, (places + 1) % max(1, self.wrong), places), 100).float()


def test_retrieval_counts_what_is_found_first():
    """All right, and then ten of fifty that have each other's captions: four fifths at once, all among five."""
    assert set(pretrain.retrieval(Oracle(), 50).values()) == {100.0}
    assert pretrain.retrieval(Oracle(wrong=10), 50) == {"caption@1": 80, "caption@5": 100, "picture@1": 80,
                                                        "picture@5": 100}  # fmt: skip


def test_calm_changes_lengths_and_no_direction():
    torch.manual_seed(0)
    clip = CLIP(SIZES["tiny"]).eval()
    torch.nn.init.normal_(clip.token_embedding.weight, std=0.02)
    tokens = tokenize(["red ring", "big blue star on the left"], pretrain.CONTEXT)
    with torch.no_grad():
        before = clip.encode_text(tokens)
        pretrain.calm(clip)
        after = clip.encode_text(tokens)
        assert torch.allclose(F.normalize(before, dim=-1), F.normalize(after, dim=-1), atol=1e-5)
        many = clip.encode_text(pretrain.batch(128, 16, (0, 0))[1])
    assert many.std().item() == pytest.approx(0.4, rel=0.01)


# ---- the file
def test_a_tiny_clip_is_made_by_three_steps_and_fits(tmp_path):
    """Half precision, under 6 MB, only the token rows that occurred, the record beside it; twice the same file."""
    paths = [tmp_path / name for name in ("a.pt", "b.pt")]
    for path in paths:
        pretrain.main(["tiny", "--steps", "3", "--batch-size", "8", "--out", str(path)])
    record = json.loads(paths[0].with_suffix(".json").read_text())
    assert paths[0].stat().st_size == record["bytes"] < 6_000_000
    assert record["command"] == "python pretrain.py tiny --steps 3 --batch-size 8 --lr 0.0015 --seed 0"
    assert set(record["retrieval_of_500"]) == {"caption@1", "caption@5", "picture@1", "picture@5"}
    file = torch.load(paths[0], weights_only=True)
    assert len(file["token_embedding.weight"]) == len(file["token_rows"]) == record["token_rows"] < 100
    assert all(x.dtype == torch.float16 for name, x in file.items() if x.is_floating_point())
    a, b = (read_weights(path) for path in paths)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert load_clip("tiny", paths[0]).encode_text(tokenize(["red ring"], 24)).shape == (1, SIZES["tiny"].embed)
    words = set(tokenize(list(COLOURS), 24).flatten().tolist()) - {0}
    assert words & set(file["token_rows"].tolist())
