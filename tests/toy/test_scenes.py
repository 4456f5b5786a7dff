"""Drawn scenes: every sentence refers to one thing, masks are exact, and nothing is solved without
looking.
"""

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from math import hypot

import numpy as np
import pytest

from tests.toy.scene_reader import read
from toy import scenes
from toy.scenes import FLAVOURS, MARGIN, SPLITS, Scenes, Thing, draw_scene, paint, plan_scene
from utils.common import UserError
from utils.tokenizer import Tokenizer

EVERYWHERE = list(product(FLAVOURS, SPLITS))
PLACE_WORDS = {"left", "right", "top", "bottom", "middle", "center", "corner"}
PLACE_WORDS |= {"leftmost", "rightmost", "topmost", "bottommost", "second", "third", "fourth"}
PLACE_WORDS |= {"from", "above", "below", "over", "under", "closest", "nearest"}


@pytest.fixture(scope="module")
def plans():
    """10,020 plans, all flavours and splits alike: (flavour, split, plan)."""
    return [(f, s, plan_scene(f, s, i)) for f, s in EVERYWHERE for i in range(334)]


@pytest.fixture(scope="module")
def single(plans):
    """Those of flavours whose sentences fit exactly one thing."""
    return [(f, s, plan) for f, s, plan in plans if f != "scenes-any"]


@pytest.fixture(scope="module")
def drawn():
    return [draw_scene("scenes", "test", i) for i in range(300)]


def facts(things):
    return [vars(thing) for thing in things]


def painted(things, target):
    return paint(things, target, np.random.default_rng(0))


def fitting(sentence, things):
    """What the reader thinks the sentence might mean; an ambiguous landmark fits nothing."""
    try:
        return read(sentence, facts(things), -MARGIN)
    except ValueError as error:
        assert "landmark" in str(error), error
        return set()


# The reader itself, by hand: three circles in a row, a star above the middle one, a 7 in the top
# right corner.
ROW = [
    Thing("circle", "red", "small", 20, 100, 14),
    Thing("circle", "blue", "large", 70, 100, 29),
    Thing("circle", "red", "medium", 130, 100, 20),
    Thing("star", "green", "small", 70, 40, 14),
    Thing("number", "green", "small", 140, 20, 14, digit=7),
]


@pytest.mark.parametrize(
    ("sentence", "means"),
    [
        ("circle", {0, 1, 2}),
        ("the only blue circle", {1}),
        ("small red one", {0}),
        ("number 7", {4}),
        ("the 7", {4}),
        ("number 3", set()),
        ("biggest circle", {1}),
        ("leftmost circle", {0}),
        ("the second circle from the left", {1}),
        ("third circle from the left", {2}),
        ("fourth circle from the left", set()),
        ("second red circle from the right", {0}),
        ("bottommost thing", {0, 1, 2}),  # all three at the same height
        ("left circle", {0, 1}),  # 70 is only 10 left of the middle: it might be meant
        ("thing in the top right corner", {4, 3}),  # 70 is only 10 left of the middle
        ("circle below the star", {0, 1, 2}),  # 2 is 60 below and 60 aside: might be
        ("thing above the blue circle", {3, 4}),  # 4 is 80 above and 70 aside: might be
        ("red circle to the left of the blue one", {0}),
        ("circle nearest to the 7", {2}),
        ("red circle that is not red", set()),
        ("circle that is not red", {1}),
        ("circle with the same size as the star", {0}),
        ("thing with the same colour as the star", {4}),
        ("the red circle that is right of the blue circle and under the 7", {2}),
        ("all circles", {0, 1, 2}),
        ("the two red circles", {0, 2}),
        ("every small thing", {0, 3, 4}),
        ("all green ones that are not green", set()),
        ("all things that are not red", {1, 3, 4}),
        ("all the circles right of the blue one", {2}),
        ("the two things in the top right corner", {3, 4}),
        ("all numbers", {4}),
        ("the red star", set()),
        ("all crosses at the bottom", set()),
    ],
)
def test_the_reader_understands(sentence, means):
    """Each meaning worked out by hand from the docstring of toy/scenes.py."""
    assert read(sentence, facts(ROW), -MARGIN) == means


def test_the_reader_refuses_what_has_no_meaning():
    """Unknown words, landmarks that fit two things, two of three: errors, not guesses."""
    wrong = (
        "flurb",
        "circle beside the star",
        "star above the circle",
        "the two circles",
        "circles",
    )
    for sentence in wrong:
        with pytest.raises(ValueError):
            read(sentence, facts(ROW), -MARGIN)


def test_every_sentence_fits_its_targets_clearly_and_nothing_else_even_barely(plans):
    """10,020 scenes: the reader, knowing only words and things, returns exactly the targets with
    either threshold: one thing, and in scenes-any several or none as well.
    """
    for flavour, split, plan in plans:
        for sentence, threshold in product(plan.sentences, (-MARGIN, MARGIN)):
            found = read(sentence, facts(plan.things), threshold)
            assert found == set(plan.targets), (
                f"{flavour} {split}: '{sentence}' → {found} with threshold {threshold}"
            )


def test_scenes_any_names_one_thing_several_or_none(plans):
    """Of 1,670 scenes some 40, 40 and 20 %; all other flavours name one. Sentences that fit several
    or none have that kind; the others are of `scenes`.
    """
    mine = [plan for f, _, plan in plans if f == "scenes-any"]
    counts = Counter(min(2, len(plan.targets)) for plan in mine)
    shares = [counts[number] / len(mine) for number in (0, 1, 2)]
    assert shares[0] >= 0.15 and shares[1] >= 0.3 and shares[2] >= 0.3, shares
    for plan in mine:
        kind = {0: "none", 1: None}.get(len(plan.targets), "several")
        assert kind is None or set(plan.kinds) == {kind}
        assert list(plan.targets) == sorted(set(plan.targets))
    assert all(len(plan.targets) == 1 for f, _, plan in plans if f != "scenes-any")
    beginnings = Counter(sentence.split()[0] for plan in mine for sentence in plan.sentences)
    assert min(beginnings[word] for word in ("all", "every", "the")) >= 50


def test_what_fits_nothing_is_made_of_words_that_fit_something(plans):
    """Each word of shape or colour is that of a thing in the scene: nobody is right by missing a
    word. So the answer hangs on how they go together, or on the place.
    """
    for flavour, _, plan in plans:
        if flavour != "scenes-any" or plan.targets:
            continue
        there = {word for t in plan.things for word in (t.shape, t.colour, str(t.digit))}
        for sentence in plan.sentences:
            words = sentence.replace("crosses", "cross").split()
            named = {word.removesuffix("s") if word != "cross" else word for word in words}
            looks = named & {*scenes.SHAPES, *scenes.COLORS, *map(str, range(10))}
            assert looks <= there, sentence


def test_several_targets_are_one_mask_and_none_an_empty_one():
    """Painted one by one, the visible parts of the targets add up to the mask, up to edges that two
    of them share; `occlusion` is within 0 and 1.
    """
    for i in range(60):
        scene = draw_scene("scenes-any", "val", i)
        parts = [painted(scene.things, target)["mask"] for target in scene.targets]
        union = np.any(parts, axis=0) if parts else np.zeros_like(scene.mask)
        assert np.all(scene.mask[union]) and (scene.mask ^ union).sum() <= 40
        assert 0 <= scene.occlusion <= 0.4
        assert scene.targets or not scene.mask.any()


def test_a_second_thing_like_the_target_makes_any_sentence_ambiguous(single):
    """100 scenes with the target drawn again 2 pixels beside itself: two things fit, or the rank
    is not clear.
    """
    for _, _, plan in single[::50][:100]:
        t = plan.things[plan.target]
        twice = (*plan.things, replace(t, x=t.x + 2, y=t.y + 2))
        assert all(len(fitting(sentence, twice)) != 1 for sentence in plan.sentences), (
            plan.sentences
        )


def test_a_sentence_without_its_distinguishing_words_is_ambiguous(single):
    """100 scenes where the target shares its look with another: the bare "colour shape" fits at
    least two things.
    """

    def look(t):
        return f"the {t.colour} {t.shape if t.digit is None else t.digit}"

    shared = [
        plan
        for _, _, plan in single
        if sum(look(t) == look(plan.things[plan.target]) for t in plan.things) > 1
    ]
    assert len(shared) >= 100
    for plan in shared[:100]:
        assert len(fitting(look(plan.things[plan.target]), plan.things)) > 1


def test_the_same_seed_gives_the_same_scene():
    """Twice from scratch, pixel for pixel; and at another size the things and words stay."""
    for flavour, split in EVERYWHERE:
        a, b, large = (draw_scene(flavour, split, 7, side) for side in (160, 160, 224))
        assert (
            np.array_equal(a.image, b.image)
            and np.array_equal(a.mask, b.mask)
            and a.sentences == b.sentences
        )
        assert large.things == a.things and large.sentences == a.sentences
        assert large.image.shape == (224, 224, 3) and abs(large.mask.mean() - a.mask.mean()) < 0.01


def test_a_scene_of_today_is_a_scene_of_tomorrow():
    """One scene written down, so that a change of the generator is noticed (weights and results
    hang on it).
    """
    plan = plan_scene("scenes", "test", 0)
    assert plan.sentences == ("bottom left red cross", "the small cross in the bottom left corner")
    assert [(t.shape, t.colour) for t in plan.things][plan.target] == ("cross", "red")


@pytest.mark.parametrize(
    ("flavour", "expected"),
    [
        ("scenes", "6ba45e9a8152"),
        ("scenes+", "5c51c69dab4a"),
        ("scenes-g", "ef840e9d79d6"),
        ("scenes-where", "4313377fb74d"),
        ("scenes-crowd", "da39897d7c77"),
        ("scenes-any", "2e120cebc66e"),
    ],
)
def test_a_new_flavour_leaves_the_others_as_they_were(flavour, expected):
    """Targets, sentences and things of five scenes of each split; the first five flavours as they
    were before scenes-any.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for i in range(5):
            plan = plan_scene(flavour, split, i)
            digest.update(f"{plan.targets} {plan.sentences} {plan.kinds}".encode())
            for t in plan.things:
                where = f"{float(t.x)} {float(t.y)} {float(t.r)}"
                digest.update(f"{t.shape} {t.colour} {where}".encode())
    assert digest.hexdigest()[:12] == expected


def test_no_scene_is_in_two_splits(plans):
    """Also not in two flavours, and not twice in one split."""
    assert len({plan.things for _, _, plan in plans}) == len(plans)


def test_the_mask_is_where_the_target_shows():
    """Painted again with the target in another colour, exactly the mask's pixels change by at
    least half of that.
    """
    for flavour, i in product([f for f in FLAVOURS if f != "scenes-any"], range(30)):
        scene = draw_scene(flavour, "test-crowd", i)
        t = scene.things[scene.target]
        changed = "black" if t.colour == "yellow" else "yellow"
        again = tuple(replace(x, colour=changed) if x is t else x for x in scene.things)
        a, b = (
            painted(things, scene.target)["image"].astype(float) for things in (scene.things, again)
        )
        change = np.subtract(scenes.COLORS[t.colour], scenes.COLORS[changed])
        share = (a - b) @ change / (change @ change)
        unsure = np.abs(share - 0.5) < 0.03  # an image holds whole numbers, and none above 255
        assert np.array_equal((share > 0.5)[~unsure], scene.mask[~unsure]) and unsure.mean() < 0.005


def test_the_target_is_mostly_visible_and_never_tiny(drawn):
    """At least 60 % of it shows; some targets are partly hidden; also in the crowd."""
    crowd = [draw_scene("scenes", "test-crowd", i) for i in range(100)]
    hidden = [scene.occlusion for scene in drawn + crowd]
    assert max(hidden) <= 0.4 and sum(share > 0.05 for share in hidden) >= 15
    assert min(scene.mask.sum() for scene in drawn + crowd) >= 100


def test_scenes_are_as_hard_as_promised(plans):
    """Three to eight things (more in the crowd), a distractor in shape or colour, a digit as
    target in test-numbers;
    all inside the image, and at most one of the others overlaps the target."""
    for flavour, split, plan in plans:
        targets = [plan.things[i] for i in plan.targets]
        is_crowd = flavour == "scenes-crowd" or split == "test-crowd"
        assert 9 <= len(plan.things) <= 15 if is_crowd else 3 <= len(plan.things) <= 8
        if flavour == "scenes-crowd":
            assert len({t.shape for t in plan.things}) <= 2
        assert split != "test-numbers" or not targets or any(t.digit is not None for t in targets)
        assert all(t.r <= min(t.x, t.y) and max(t.x, t.y) <= 160 - t.r for t in plan.things)
        if len(targets) == 1:
            target = targets[0]
            others = [t for t in plan.things if t is not target]
            assert any(t.shape == target.shape or t.colour == target.colour for t in others)
            assert sum(hypot(t.x - target.x, t.y - target.y) < t.r + target.r for t in others) <= 1


def test_targets_are_small_but_not_microscopic(drawn):
    """On average 3 to 8 % of the image."""
    assert 0.03 <= np.mean([scene.mask.mean() for scene in drawn]) <= 0.08


def test_one_to_four_different_sentences_of_mixed_kinds(plans):
    """Half of what `scenes` says and more needs place, order or relation; every flavour mixes
    kinds.
    """
    for flavour in FLAVOURS:
        mine = [
            plan for f, split, plan in plans if f == flavour and split in ("train", "val", "test")
        ]
        kinds = Counter(kind for plan in mine for kind in plan.kinds)
        share = {kind: count / kinds.total() for kind, count in kinds.items()}
        wanted = {"attribute", "relation", "digit", "place", "order"}
        if flavour == "scenes+":
            wanted -= {"place", "order"}
        if flavour == "scenes-where":
            wanted = {"order", "relation"}
        if flavour == "scenes-any":
            wanted |= {"several", "none"}
        least = 0.015 if flavour == "scenes-any" else 0.03
        assert set(share) == wanted and min(share.values()) > least, share
        assert (
            flavour in ("scenes+", "scenes-where", "scenes-any")
            or share["place"] + share["order"] + share["relation"] >= 0.5
        )
    for _, _, plan in plans:
        assert 1 <= len(plan.sentences) <= 4 and len(plan.sentences) == len(plan.kinds)
        assert len(set(plan.sentences)) == len(plan.sentences)


def test_scenes_plus_has_no_place_words(plans):
    """And `scenes` has them all, so that the list in this test is not a wrong one."""
    said = {
        f: {w for g, _, plan in plans if g == f for s in plan.sentences for w in s.split()}
        for f in FLAVOURS
    }
    assert not said["scenes+"] & PLACE_WORDS
    assert said["scenes"] >= PLACE_WORDS
    assert 60 <= len(set.union(*said.values())) <= 100


def test_nobody_is_the_first_of_one(plans):
    """No "largest small star" where there is one small star: what a superlative is said of fits
    two things or more.
    """
    superlatives = (
        "biggest",
        "largest",
        "smallest",
        "leftmost",
        "rightmost",
        "topmost",
        "bottommost",
    )
    for _, _, plan in plans:
        for words in (sentence.removeprefix("the ").split(" ", 1) for sentence in plan.sentences):
            assert words[0] not in superlatives or len(fitting(words[1], plan.things)) > 1, words


def test_sentences_are_as_long_as_their_benchmark_allows(plans):
    """17 tokens with start and end for `scenes` and `scenes+`, 22 for `scenes-g`, which says 8 to
    16 words.
    """
    tokenizer = Tokenizer()
    for flavour, _, plan in plans:
        for sentence in plan.sentences:
            assert len(tokenizer.encode(sentence)) + 2 <= (22 if flavour == "scenes-g" else 17), (
                sentence
            )
            assert flavour != "scenes-g" or 8 <= len(sentence.split()) <= 16, sentence


def oiou(answers, drawn):
    both = sum(np.sum(answer & scene.mask) for answer, scene in zip(answers, drawn, strict=True))
    return (
        100
        * both
        / sum(np.sum(answer | scene.mask) for answer, scene in zip(answers, drawn, strict=True))
    )


def test_answers_that_do_not_look_or_listen_stay_below_30(drawn):
    """The best constant mask; everything drawn; the largest thing; a thing at random: oIoU of
    each.
    """

    def things(scene, chosen):
        return np.any([painted(scene.things, i)["mask"] for i in chosen], axis=0)

    mean = np.mean([scene.mask for scene in drawn], axis=0)
    constants = [
        oiou([mean > cut] * len(drawn), drawn)
        for cut in np.quantile(mean, (0, 0.25, 0.5, 0.75, 0.9))
    ]
    everything = oiou([things(s, range(len(s.things))) for s in drawn], drawn)
    largest = oiou(
        [things(s, [max(range(len(s.things)), key=lambda i: s.things[i].r)]) for s in drawn], drawn
    )
    first = oiou([things(s, [0]) for s in drawn], drawn)
    print(
        f"constant {max(constants):.1f}, everything {everything:.1f}, "
        f"largest {largest:.1f}, random {first:.1f}"
    )
    assert max(*constants, everything, largest, first) <= 30 and min(everything, largest) > 5


def test_digits_and_shapes_differ_from_one_another():
    """Any two glyphs of the same size differ in at least 12 % of the pixels that either covers."""
    names = [(shape, None) for shape in scenes.SHAPES[:-1]] + [
        ("number", digit) for digit in range(10)
    ]
    masks = {n: painted((Thing(n[0], "red", "small", 40, 40, 13, n[1]),), 0)["mask"] for n in names}
    for a, b in product(names, names):
        different = np.sum(masks[a] ^ masks[b]) / np.sum(masks[a] | masks[b])
        assert a == b or different >= 0.12, f"{a} and {b} differ in {different:.0%}"


def test_a_split_is_a_sequence_of_samples():
    """Sizes, limit, iteration that ends, and the fields of a data sample."""
    some = Scenes("scenes-g", "val", limit=3)
    with pytest.raises(IndexError):
        some[3]
    assert (len(some), len(list(some)), some.name, some.split) == (3, 3, "scenes-g", "val")
    assert (
        len(Scenes("scenes", "train")) == SPLITS["train"]
        and len(Scenes("scenes", "val", limit=9999)) == 500
    )
    sample = some[2]
    assert (sample.ref_id, sample.image_id) == (2, 2) and sample.sent_ids == tuple(
        range(len(sample.sentences))
    )
    assert (
        sample.image.dtype == np.uint8
        and sample.image.shape == (160, 160, 3)
        and sample.image.flags["C_CONTIGUOUS"]
    )
    assert sample.mask.dtype == bool and sample.mask.shape == (160, 160)


def test_unknown_names_say_what_there_is():
    """One line that names the wrong word and the right ones."""
    with pytest.raises(UserError, match=r"'scene'.*scenes\+"):
        Scenes("scene", "train")
    with pytest.raises(UserError, match="'testA'.*test-crowd"):
        Scenes("scenes", "testA")


def test_sizes_are_clearly_apart():
    """The largest of one size class and the smallest of the next differ by the three pixels that
    superlatives need.
    """
    small, medium, large = (scenes.RADII[size] for size in ("small", "medium", "large"))
    assert all(b[0] - a[1] > 3 for a, b in pairwise((small, medium, large)))
