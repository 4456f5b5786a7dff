"""Drawn scenes: images made from a seed, and sentences that refer to exactly one object.

Only those of `scenes-any` may refer to several objects, or to none.

Nothing is stored: flavour, split and index give the same scene everywhere. A scene is a list of
things with a shape, a colour, a size class, a center and a radius, in pixels of a 160 × 160 image;
x grows to the right, y downwards. What a sentence means in terms of that list
(tests/toy/scene_reader.py reads by this alone):

  X = [size] [colour] noun   the things that match every word: small, big or large name the outer
                             two of three size classes; thing and one match all, number matches any
                             digit, "number 7" and "7" match that digit
  the X, the only X          X
  PLACE X, X on/at/in PLACE  score: how far the center lies beyond the image's middle line that way
                             (for a corner the smaller of two); center X, X in the middle: 32 minus
                             the distance from the center
  Nth X from the END         rank of the center among X, counted from left, right, top or bottom;
                             score: the smaller gap to the two neighbors, among the others, that a
                             thing of that rank lies between
  ENDmost X                  the same, first from that end
  X closest/nearest to the L the same, first by distance of the centers to L
  biggest/largest/smallest X the same, first by radius; each pixel of radius counts 12.8 / 3
  X left of/right of/above/over/below/under the L
                             score: how far the centers are apart that way, minus how far across
  X that is not COLOUR, X with the same colour/shape/size as the L
                             what it says; each digit is a shape of its own
  X … that is … and …        all of them; score: the smallest
  all Xs, all the Xs, every X, the N Xs
                             X; N says how many fit, two to six

A landmark L is an X that fits one thing only, and is not among the X compared with it. MARGIN is
12.8, 8 % of the side: a thing fits clearly with a score above it, and might fit above −MARGIN. A
sentence is used only where its targets fit clearly and nothing else might. "that can be seen in
this picture" and the like mean nothing. `scenes` is short, without the same-as and the not;
`scenes+` has no word of place; `scenes-g` has 8 to 16 words; `scenes-where` has
order and relation alone; `scenes-crowd` has nine things or more, of one or two shapes and mostly
two colours, in every split (the last two are conditions of `experiments.reproduce talk`);
`scenes-any`, gRefCOCO in miniature, has sentences of `scenes`, and others that fit several things
or none. test-numbers (digits to be told apart) and test-crowd (nine things or more, close together)
are the paper's failures.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, hypot, inf, pi, sin

import numpy as np

from utils.common import UserError

FLAVOURS = ("scenes", "scenes+", "scenes-g", "scenes-where", "scenes-crowd", "scenes-any")
SPLITS = {"train": 7500, "val": 500, "test": 2000, "test-numbers": 500, "test-crowd": 500}  # refs
WORLD = 160  # side of the image in which things are planned
MARGIN = 12.8
KEPT_SIDE = 192  # pixels: larger scenes are drawn again each time

# ----------------------------------------------------------------------------- words and their data
COLORS = {
    "red": (215, 35, 40),
    "green": (35, 165, 65),
    "blue": (35, 80, 225),
    "yellow": (245, 225, 40),
    "orange": (255, 140, 20),
    "purple": (145, 50, 190),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
RADII = {"large": (34, 39), "medium": (23, 27), "small": (16, 18)}  # pixels: from, to
SIZE_WORDS = {"large": ("big", "large"), "medium": (), "small": ("small",)}
SUPERLATIVES = (("biggest", -1), ("largest", -1), ("smallest", 1))  # sign: which radius comes first
RANK_WORDS = ("", "second", "third", "fourth")  # nobody says "first": that is "leftmost"
ENDS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}  # direction (x, y)
CORNERS = ("top left", "top right", "bottom left", "bottom right")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the middle",
    "top left": "in the top left corner",
    "top right": "in the top right corner",
    "bottom left": "in the bottom left corner",
    "bottom right": "in the bottom right corner",
}
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "top": ("above", "over"),
    "bottom": ("below", "under"),
    "near": ("closest to", "nearest to"),
}
SEEN = "that can be seen in this picture"

# flavour → (kind, its share of the attempts, templates). Methods of _Speaker fill in the slots.
FORMS = {
    "scenes": (
        ("attribute", 5, ("{x}", "{x}", "the {x}", "{size} {x}")),
        (
            "place",
            3,
            ("{at[0]} {x}", "{x} {at[1]}", "the {x} {at[1]}", "{most} {x}", "the {most} {x}"),
        ),
        ("order", 2, ("{nth[0]} {x} from the {nth[1]}", "the {nth[0]} {x} from the {nth[1]}")),
        ("relation", 3, ("{x} {rel}", "the {x} {rel}")),
    ),
    "scenes-where": (
        ("order", 2, ("{nth[0]} {x} from the {nth[1]}", "the {nth[0]} {x} from the {nth[1]}")),
        ("relation", 3, ("{x} {rel}", "the {x} {rel}")),
    ),
    "scenes+": (
        ("attribute", 4, ("{x}", "the {x}", "the only {x}", "{size} {x}", "the {size} {x}")),
        ("attribute", 1, ("{x} that is not {other}", "the {x} that is not {other}")),
        ("relation", 3, ("{x} with the same {same}", "the {x} with the same {same}")),
    ),
    "scenes-g": (
        ("attribute", 2, (f"the only {{x}} {SEEN}", f"the {{size}} {{x}} {SEEN}")),
        ("place", 2, ("the {x} {at[1]} of this picture", f"the {{most}} {{x}} {SEEN}")),
        ("order", 2, ("the {nth[0]} {x} counting from the {nth[1]} of this picture",)),
        ("relation", 2, ("the {x} that is located {rel}", "the {x} that can be seen {rel}")),
        ("relation", 3, ("the {x} {at[1]} that is {rel}", "the {x} that is {rel} and {also}")),
    ),
}
FORMS["scenes-crowd"] = FORMS["scenes"]
# of scenes-any: what may fit several things, or none; {xs} is the plural of {x}
SEVERAL_FORMS = (
    "all {xs}",
    "all the {xs}",
    "every {x}",
    "the {number} {xs}",
    "all {xs} {at[1]}",
    "every {x} {at[1]}",
    "the {number} {xs} {at[1]}",
    "all {xs} {rel}",
    "the {number} {xs} {rel}",
    "all {xs} that are not {other}",
)
NONE_FORMS = (
    "{x}",
    "the {x}",
    "the {x}",
    "all {xs}",
    "every {x}",
    "{at[0]} {x}",
    "the {x} {at[1]}",
    "all {xs} {at[1]}",
    "{x} {rel}",
    "the {x} {rel}",
    "all {xs} {rel}",
)
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
SLOTS = ("at", "most", "nth", "size", "rel", "also", "same", "other")


# ------------------------------------------------------------------------------- what a scene holds
@dataclass(frozen=True)
class Thing:
    """One object: center and radius in pixels of a 160-pixel image.

    `digit` is None unless `shape` is "number". `colour` is spelled as in the sentences.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    r: float
    digit: int | None = None


@dataclass(frozen=True)
class Plan:
    """A scene before it is painted: things in drawing order, the targets' indices, sentences.

    All flavours have one target, but for `scenes-any`: there may be several, or none.
    """

    things: tuple[Thing, ...]
    targets: tuple[int, ...]
    sentences: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def target(self) -> int:
        """The only target, or the first of several."""
        return self.targets[0]


@dataclass(frozen=True, eq=False)
class Scene(Plan):
    """A painted plan, with the fields of a data.Sample.

    image uint8 (S, S, 3); mask bool (S, S) of the targets' visible parts.
    """

    image: np.ndarray
    mask: np.ndarray
    occlusion: float  # the share of the targets that later things hide
    ref_id: int
    image_id: int
    sent_ids: tuple[int, ...]


class Scenes:
    """A split of one flavour as a sequence of at most `limit` Scenes; UserError for unknown names.

    Small scenes stay in memory once they are drawn: all of train at 128 pixels 0.5 GB, at 192 1.1.
    """

    def __init__(self, flavour, split, limit=None, side=WORLD):
        _seed(flavour, split, 0)
        self.name = flavour
        self.split = split
        self.side = side
        self.count = min(SPLITS[split], limit or SPLITS[split])
        self.drawn = {}

    def __len__(self):
        return self.count

    def plan(self, index) -> Plan:
        """What is drawn and said, without the painting."""
        return plan_scene(self.name, self.split, index)

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        if index in self.drawn:
            return self.drawn[index]
        scene = draw_scene(self.name, self.split, index, self.side)
        if self.side <= KEPT_SIDE:
            self.drawn[index] = scene
        return scene


# ------------------------------------------------------------------------- from an index to a scene
def draw_scene(flavour, split, index, side=WORLD) -> Scene:
    """The Scene of that index, painted `side` pixels wide."""
    plan = plan_scene(flavour, split, index)
    rng = np.random.default_rng((*_seed(flavour, split, index), 1))
    painted = paint(plan.things, plan.targets, rng, side)
    return Scene(
        **vars(plan),
        **painted,
        ref_id=index,
        image_id=index,
        sent_ids=tuple(range(len(plan.sentences))),
    )


def plan_scene(flavour, split, index) -> Plan:
    """The Plan of that index: all but the painting, for those who need only the sentences."""
    rng = np.random.default_rng(_seed(flavour, split, index))
    # a scene of which nothing unique can be said is drawn again
    while True:
        things = draw_things(rng, split, alike=flavour == "scenes-crowd")
        target = int(rng.random() * len(things))
        if not _is_suitable(things, target, flavour, split):
            continue
        speaker = _Speaker(rng, things, target)
        if flavour == "scenes-any":
            targets, kinds = speaker.say_any()
        else:
            targets = (target,)
            kinds = speaker.say(flavour)
        if kinds:
            return Plan(things, targets, tuple(kinds), tuple(kinds.values()))


def sentences_about(things, target, flavour, seed) -> dict[str, str]:
    """{sentence: kind} about any of the things, for those who need more than the scene's own."""
    return _Speaker(np.random.default_rng(seed), things, target).say(flavour)


def _is_suitable(things, index, flavour, split) -> bool:
    """Enough things, another one of the target's shape or colour, a digit in test-numbers."""
    if split == "test-numbers" and things[index].shape != "number":
        return False
    is_crowd = flavour == "scenes-crowd" or split == "test-crowd"
    if len(things) <= (8 if is_crowd else 2):
        return False
    target = things[index]
    others = [thing for i, thing in enumerate(things) if i != index]
    return any(thing.shape == target.shape or thing.colour == target.colour for thing in others)


def _seed(flavour, split, index) -> tuple[int, int, int]:
    if flavour not in FLAVOURS:
        known = ", ".join(FLAVOURS)
        raise UserError(f"unknown kind of scenes '{flavour}': choose one of {known}")
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise UserError(f"{flavour} has no split '{split}': choose one of {known}")
    return FLAVOURS.index(flavour), list(SPLITS).index(split), index


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


# ----------------------------------------------------------------------------- things and positions
def draw_things(rng, split, alike=False) -> tuple[Thing, ...]:
    """Up to eight things (crowd: up to fifteen) that share a few shapes and colours.

    Those that find no room are left out, four in ten of a crowd. alike: one or two shapes,
    mostly two colours.
    """
    crowd = alike or split == "test-crowd"
    shapes = _draw_shapes(rng, numbers=split == "test-numbers")
    color_count = _pick(rng, (2, 3, 4))
    if alike:
        shapes = shapes[:2]
        color_count = 2
    colors = [_pick(rng, tuple(COLORS)) for _ in range(color_count)]
    sizes = _draw_sizes(rng, crowd)

    things = []
    for size, x, y, r in _settle(rng, sorted(sizes), overlapping=0.5 if crowd else 0.25):
        # things that touch differ in colour
        touching = [thing for thing in things if hypot(thing.x - x, thing.y - y) < thing.r + r]
        touched = {thing.colour for thing in touching}
        free = [color for color in colors if color not in touched]
        color = _pick(rng, free or tuple(COLORS))
        shape = _pick(rng, shapes)
        digit = int(rng.random() * 10) if shape == "number" else None
        things.append(Thing(shape, color, size, x, y, r, digit))
    return tuple(things[i] for i in rng.permutation(len(things)))


def _draw_shapes(rng, numbers) -> list[str]:
    count = 1 if numbers else _pick(rng, (2, 3))
    shapes = [_pick(rng, SHAPES) for _ in range(count)]
    if numbers:
        shapes += ["number"] * 4
    elif rng.random() < 0.4:
        shapes.append("number")
    return shapes


def _draw_sizes(rng, crowd) -> list[str]:
    count = rng.integers(3, 9) + 7 * crowd
    sizes = []
    for _ in range(count):
        without_large = crowd and rng.random() < 0.8
        sizes.append(_pick(rng, tuple(RADII)[without_large:]))
    return sizes


def _settle(rng, sizes, overlapping) -> list[tuple]:
    """(size, x, y, r) of each thing that finds room, the large ones first.

    A share `overlapping` of them overlaps one other by 0.2 to 0.6 of the smaller radius. None
    overlaps two, so most of every thing stays visible.
    """
    settled = []
    alone = []  # those that overlap nothing yet
    for size in sizes:
        r = _quarters(rng.uniform(*RADII[size]))
        partner = _pick(rng, alone) if alone and rng.random() < overlapping else None
        for a, b in rng.random((40, 2)).tolist():  # at most 40 attempts
            if partner:
                x, y = _beside(partner, r, a, b)
            else:
                x = r + a * (WORLD - 2 * r)
                y = r + b * (WORLD - 2 * r)
            x = _quarters(x)
            y = _quarters(y)
            if _has_room(x, y, r, [other for other in settled if other is not partner]):
                thing = (size, x, y, r)
                settled.append(thing)
                if partner:
                    alone.remove(partner)
                else:
                    alone.append(thing)
                break
    return settled


def _quarters(value) -> float:
    """Rounded to quarters of a pixel: no machine rounds them differently."""
    return round(4 * value) / 4


def _beside(partner, r, a, b) -> tuple[float, float]:
    """A center that makes a thing of radius r overlap its partner, in the direction `a` (0 … 1)."""
    _, x, y, partner_r = partner
    reach = r + partner_r - (0.2 + 0.4 * b) * min(r, partner_r)
    return x + reach * cos(2 * pi * a), y + reach * sin(2 * pi * a)


def _has_room(x, y, r, others) -> bool:
    """Whether a thing lies inside the image and apart from all others."""
    inside = r <= min(x, y) and max(x, y) <= WORLD - r
    return inside and all(hypot(x - ox, y - oy) > r + other_r + 2 for _, ox, oy, other_r in others)


# ---------------------------------------------------------------------------------------- sentences
class _Speaker:
    """Finds sentences for one target.

    A method that fills a slot of a template takes the indices of X and returns the slot's text and
    {index in X: score}. Where it has nothing to say, the target is missing from the scores or
    scores badly.
    """

    def __init__(self, rng, things, target):
        self.rng = rng
        self.things = things
        self.target = target
        self.names = [self.names_of(i) for i in range(len(things))]

    def pick(self, options):
        return _pick(self.rng, options)

    def say(self, flavour) -> dict[str, str]:
        """{sentence: kind}, one to four, of different kinds where there are enough; {} if none."""
        kinds = {}
        wanted = self.pick((1, 2, 3, 3, 4))
        forms = []
        for kind, share, templates in FORMS[flavour]:
            forms += [(kind, templates)] * share

        for attempt in range(40):
            kind, templates = self.pick(forms)
            if kind in kinds.values() and attempt <= 25:
                continue
            text = self.sentence(self.pick(templates))
            if text and _has_length(text, flavour):
                names_digit = kind == "attribute" and any(letter.isdigit() for letter in text)
                kinds[text] = "digit" if names_digit else kind
            if len(kinds) == wanted:
                break
        return kinds

    def say_any(self) -> tuple[tuple[int, ...], dict[str, str]]:
        """What scenes-any says: (targets, {sentence: kind}), of one thing, of several or of none.

        The kind of a sentence about one thing is that of `scenes`; of others "several" or "none".
        """
        kind = self.pick(("one", "one", "several", "several", "none"))
        if kind == "one":
            return (self.target,), self.say("scenes")
        make = self.several if kind == "several" else self.none
        targets = None
        kinds = {}
        wanted = self.pick((1, 2, 3, 3, 4))
        for _ in range(40):
            found, text = make()
            if text and targets in (None, found):  # all sentences of a scene have the same targets
                targets = found
                kinds[text] = kind
            if len(kinds) == wanted:
                break
        return targets, kinds

    def names_of(self, i) -> list[tuple[str, frozenset]]:
        """Every X that fits thing i, with the indices of all things that it fits."""
        thing = self.things[i]
        everything = frozenset(range(len(self.things)))
        same_size = self.that_share("size", i)
        same_color = self.that_share("colour", i)
        same_shape = self.that_share("shape", i)

        sizes = [("", everything)]
        for word in SIZE_WORDS[thing.size]:
            sizes.append((f"{word} ", same_size))
        colors = [("", everything), (f"{thing.colour} ", same_color)]
        # repeated nouns are picked more often
        nouns = [("thing", everything), ("one", everything)] + [(thing.shape, same_shape)] * 3
        if thing.digit is not None:
            same_digit = self.that_share("digit", i)
            nouns += [(f"number {thing.digit}", same_digit), (str(thing.digit), same_digit)] * 2

        names = []
        for size, sized in sizes:
            for color, colored in colors:
                for noun, named in nouns:
                    names.append((size + color + noun, sized & colored & named))
        return names

    def that_share(self, attribute, i) -> frozenset:
        """The indices of the things with the same attribute as thing i."""
        value = getattr(self.things[i], attribute)
        return frozenset(
            j for j, thing in enumerate(self.things) if getattr(thing, attribute) == value
        )

    def shorter(self, names):
        """The shorter of two that are picked."""
        first = self.pick(names)
        second = self.pick(names)
        return min(first, second, key=lambda name: len(name[0].split()))

    def sentence(self, template) -> str | None:
        """The template, filled in; None if it would be ambiguous, or say more than is needed."""
        slots = [slot for slot in SLOTS if "{" + slot in template]
        names = self.names[self.target]
        # people often say more than they must
        wordy = slots and self.rng.random() < 0.5
        if not wordy:
            # with slots X alone must be ambiguous, without slots it must not
            names = [name for name in names if (len(name[1]) > 1) == bool(slots)]
        if not names:
            return None

        x, members = self.shorter(names)
        texts, scores = self.fill(slots, members)
        target_is_clear = scores.pop(self.target) > MARGIN
        others_are_out = all(score < -MARGIN for score in scores.values())
        if target_is_clear and others_are_out:
            return template.format(x=x, **texts)
        return None

    def fill(self, slots, members) -> tuple[dict, dict[int, float]]:
        """The text of each slot, and the scores of the members: of each the smallest."""
        texts = {}
        scores = dict.fromkeys(sorted(members), inf)
        for slot in slots:
            texts[slot], found = getattr(self, slot)(list(scores))
            scores = {i: min(score, found.get(i, -inf)) for i, score in scores.items()}
        return texts, scores

    def several(self) -> tuple[tuple[int, ...], str | None]:
        """(targets, a sentence that fits them all and nothing else); None if it is not clear.

        The speaker's target is one of them. Half of the sentences say no more than they must.
        """
        template = self.pick(SEVERAL_FORMS)
        slots = [slot for slot in SLOTS if "{" + slot in template]
        names = [name for name in self.names[self.target] if _has_plural(name[0])]
        x, members = self.shorter(names)
        texts, scores = self.fill(slots, members)

        targets = tuple(i for i, score in scores.items() if score > MARGIN)
        is_clear = all(abs(score) > MARGIN for score in scores.values())
        says_too_much = slots and len(targets) == len(members) and self.rng.random() < 0.5
        if not is_clear or says_too_much or self.target not in targets:
            return targets, None
        if len(targets) not in NUMBER_WORDS:
            return targets, None
        number = NUMBER_WORDS[len(targets)]
        return targets, template.format(x=x, xs=_plural(x), number=number, **texts)

    def none(self) -> tuple[tuple[int, ...], str | None]:
        """((), a sentence that fits nothing, though all its words fit something); None if it may.

        Without slots it mixes the looks of two things. With slots it says of others what is true of
        the speaker's target: where it lies.
        """
        template = self.pick(NONE_FORMS)
        slots = [slot for slot in SLOTS if "{" + slot in template]
        names = self.absent_names()
        if slots:
            named = [name for names_of_one in self.names for name in names_of_one]
            names = [name for name in named if self.target not in name[1]]
        if "{xs}" in template:
            names = [name for name in names if _has_plural(name[0])]
        if not names:
            return (), None
        x, members = self.shorter(names)
        texts, scores = self.fill(slots, members)
        relation = texts.get("rel", "")
        if relation.startswith(RELATIONS["near"]) or relation.endswith(" the "):
            return (), None  # something is always closest; there is no landmark
        if slots and max(scores.values()) == -inf:
            return (), None  # X is the landmark alone
        if any(score >= -MARGIN for score in scores.values()):
            return (), None
        return (), template.format(x=x, xs=_plural(x), **texts)

    def absent_names(self) -> list[tuple[str, frozenset]]:
        """X of a colour or a size, and a shape or a digit, that are there but in no one thing."""
        names = []
        for first in self.things:
            for second in self.things:
                nouns = {"shape": second.shape}
                if second.digit is not None:
                    nouns["digit"] = f"number {second.digit}"
                for attribute, noun in nouns.items():
                    value = getattr(second, attribute)
                    alike = [thing for thing in self.things if getattr(thing, attribute) == value]
                    if all(thing.colour != first.colour for thing in alike):
                        names.append((f"{first.colour} {noun}", frozenset()))
                    if all(thing.size != first.size for thing in alike):
                        words = SIZE_WORDS[first.size]
                        names += [(f"{word} {noun}", frozenset()) for word in words]
        return names

    def at(self, members):
        """PLACE X, X on/at/in PLACE: both ways to say the place."""
        target = self.things[self.target]
        clear = [place for place in PLACES if _place_score(target, place) > MARGIN]
        place = self.pick(clear or ("center",))
        scores = {i: _place_score(self.things[i], place) for i in members}
        return (place, PLACES[place]), scores

    def nth(self, members, rank_words=RANK_WORDS):
        """Nth X from the END: the rank's word and the end."""
        end = self.pick(tuple(ENDS))
        dx, dy = ENDS[end]
        keys = {i: -dx * self.things[i].x - dy * self.things[i].y for i in members}
        rank = sum(key < keys[self.target] for key in keys.values())
        has_word = rank < len(rank_words) and rank_words[rank]
        if not has_word or rank >= len(keys) - 1:
            return (None, end), {}
        return (rank_words[rank], end), _rank_scores(keys, rank)

    def most(self, members):
        """ENDmost X."""
        (_, end), scores = self.nth(members, rank_words=("first",))
        return f"{end}most", scores

    def size(self, members):
        """biggest/largest/smallest X."""
        word, sign = self.pick(SUPERLATIVES)
        keys = {i: sign * self.things[i].r * MARGIN / 3 for i in members}
        return word, _rank_scores(keys, 0)

    def landmark(self, forbidden=frozenset()) -> tuple[int, str]:
        """(index, X) of another thing that X alone fits, without `forbidden` words.

        The target itself where there is no such X.
        """
        i = self.pick([i for i in range(len(self.things)) if i != self.target])
        fits = []
        for name in self.names[i]:
            text, members = name
            if members == {i} and not forbidden & set(text.split()):
                fits.append(name)
        if not fits:
            return self.target, ""
        return i, self.shorter(fits)[0]

    def rel(self, members):
        """X left of/right of/above/below the L, X closest to the L."""
        mark, name = self.landmark()
        x0 = self.things[mark].x
        y0 = self.things[mark].y
        offsets = {i: (self.things[i].x - x0, self.things[i].y - y0) for i in members if i != mark}
        target = self.things[self.target]
        direction = _direction(target.x - x0, target.y - y0)
        if self.rng.random() < 0.2:
            direction = "near"
            distances = {i: hypot(x, y) for i, (x, y) in offsets.items()}
            scores = _rank_scores(distances, 0)
        else:
            scores = {i: _along(direction, x, y) for i, (x, y) in offsets.items()}
        return f"{self.pick(RELATIONS[direction])} the {name}", scores

    def also(self, members):
        """A second relation."""
        return self.rel(members)

    def same(self, members):
        """X with the same colour/shape/size as the L."""
        attribute = self.pick(("colour", "colour", "shape", "size"))
        mark, name = self.landmark(FORBIDDEN_WORDS[attribute])
        text = f"{attribute} as the {name}"
        agree = self.that_share(attribute, mark)
        if attribute == "shape":
            agree &= self.that_share("digit", mark)
        scores = {i: inf if i in agree else -inf for i in members if i != mark}
        if len(scores) < 2:  # with nobody else in X it would say nothing
            return text, {}
        return text, scores

    def other(self, members):
        """X that is not COLOUR."""
        own = self.things[self.target].colour
        colors = [self.things[i].colour for i in members]
        others = [color for color in colors if color != own]
        color = self.pick(others or [own])
        return color, {i: -inf if self.things[i].colour == color else inf for i in members}


def _has_plural(x) -> bool:
    """Not of digits, nor of the bare "one"."""
    return x != "one" and not x[-1].isdigit()


def _plural(x) -> str:
    return x + ("es" if x.endswith("s") else "s")


def _has_length(text, flavour) -> bool:
    return flavour != "scenes-g" or 8 <= len(text.split()) <= 16


def _place_score(thing, place) -> float:
    x = thing.x - WORLD / 2
    y = thing.y - WORLD / 2
    if place == "center":
        return 32 - hypot(x, y)
    ends = [ENDS[word] for word in place.split()]
    return min(dx * x + dy * y for dx, dy in ends)


def _direction(x, y) -> str:
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def _along(direction, x, y) -> float:
    """How far (x, y) goes in that direction, minus how far across."""
    dx, dy = ENDS[direction]
    return dx * x + dy * y - abs(dy * x) - abs(dx * y)


def _rank_scores(keys, rank) -> dict[int, float]:
    """{i: how clearly i has that rank, from 0}: the smaller gap to the keys before and after."""
    if len(keys) < 2:  # nobody says "the biggest" of one
        return {}
    scores = {}
    for i, key in keys.items():
        others = sorted(other for j, other in keys.items() if j != i)
        others = [-inf, *others, inf]
        scores[i] = min(key - others[rank], others[rank + 1] - key)
    return scores


# ----------------------------------------------------------------------------------------- painting
def paint(things, targets, rng, side=WORLD) -> dict:
    """Paint things in their order → {image, mask, occlusion}.

    targets: the index of one thing, or a tuple of any number of them. image: uint8 (side, side, 3);
    mask: bool (side, side), a pixel belongs to it if half of it shows the targets; occlusion: the
    hidden share of the targets.
    """
    if not isinstance(targets, tuple):
        targets = (targets,)
    image = _background(rng, side)  # (3, side, side)
    shown = np.zeros((side, side), np.float32)  # how much of each pixel shows the targets
    whole = np.zeros((side, side), np.float32)  # the same without the things that hide them
    for i, thing in enumerate(things):
        rows, columns, cover = _cover(thing, side)
        color = np.float32(COLORS[thing.colour]) + np.float32(rng.uniform(-12, 12, 3))
        patch = image[:, rows, columns]
        patch += cover * (color[:, None, None] - patch)
        shown[rows, columns] *= 1 - cover
        if i in targets:
            shown[rows, columns] += cover
            whole[rows, columns] *= 1 - cover
            whole[rows, columns] += cover
    # grain
    down, right = rng.integers(64, size=2)
    strength = np.float32(rng.uniform(3, 10))
    image += strength * _noise(side)[:, down : down + side, right : right + side]

    image = np.clip(image, 0, 255, out=image).astype(np.uint8).transpose(1, 2, 0)
    mask = shown >= 0.5
    area = (whole >= 0.5).sum()
    return {
        "image": np.ascontiguousarray(image),
        "mask": mask,
        "occlusion": float(1 - mask.sum() / area) if area else 0.0,
    }


def _background(rng, side) -> np.ndarray:
    """A muted gradient, thin lines and dots: float32 (3, side, side)."""
    tones = np.float32(rng.uniform(85, 175) + rng.uniform(-22, 22, (3, 3, 1, 1)))
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    image = tones[0] + (tones[1] - tones[0]) * ramp + (tones[2] - tones[0]) * ramp[:, None] / 2
    # lines
    starts = rng.integers(side, size=(5, 2))
    directions = rng.uniform(-1, 1, (5, 2))
    for (y, x), (dy, dx) in zip(starts, directions, strict=True):
        steps = np.arange(rng.integers(side))
        rows = (y + dy * steps).astype(int) % side
        columns = (x + dx * steps).astype(int) % side
        image[:, rows, columns] += np.float32(rng.uniform(-60, 60, (3, 1)))
    # dots of 2 × 2 pixels
    count = rng.integers(10, 60)
    rows, columns = rng.integers(side - 1, size=(2, count, 1, 1))
    rows = rows + [[0], [1]]
    columns = columns + [0, 1]
    image[:, rows, columns] += np.float32(rng.uniform(-60, 60, (3, 1, 1, 1)))
    return image


@lru_cache
def _noise(side) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, side + 64, side + 64), dtype=np.float32)


def _cover(thing, side) -> tuple[slice, slice, np.ndarray]:
    """Rows and columns that a thing can touch, and how much of each pixel it covers, 0 … 1."""
    r = thing.r * side / WORLD
    rows, glyph_rows = _glyph_cells(thing.y * side / WORLD, r, side)
    columns, glyph_columns = _glyph_cells(thing.x * side / WORLD, r, side)
    name = thing.shape if thing.digit is None else str(thing.digit)
    distance = _glyph(name)[glyph_rows[:, None], glyph_columns]
    return rows, columns, np.clip(0.5 - distance * np.float32(r), 0, 1)


def _glyph_cells(center, r, side) -> tuple[slice, np.ndarray]:
    """Along one axis: the pixels that a thing can touch, and the cell of the glyph for each."""
    reach = REACH * r
    low = max(0, int(center - reach))
    high = min(side, int(center + reach) + 1)
    offsets = (np.arange(low, high) + 0.5 - center) / reach  # pixel centers, −1 … 1
    cells = (offsets * CELLS + CELLS).astype(int)
    return slice(low, high), np.clip(cells, 0, 2 * CELLS - 1)


@lru_cache
def _glyph(name) -> np.ndarray:
    """Signed distance to a shape's edge, in radii, on ±REACH radii: float32 (2 CELLS, 2 CELLS)."""
    points, stroke = OUTLINES[name]
    x = (np.arange(2 * CELLS) + 0.5 - CELLS) * REACH / CELLS
    y = x[:, None]
    inside = False
    distance = inf
    for (ax, ay), (bx, by) in zip(points, points[1:], strict=False):
        ex = bx - ax
        ey = by - ay
        # distance to the nearest point of the edge
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(x - ax - along * ex, y - ay - along * ey))
        # even-odd rule: each edge to the right of a point changes its side
        crosses = (ay > y) != (by > y)
        to_the_right = (x - ax) * ey * np.sign(ey) < (y - ay) * ex * np.sign(ey)
        inside ^= crosses & to_the_right
    signed = distance - stroke if stroke else np.where(inside, -distance, distance)
    return np.round(signed, 5).astype(np.float32)  # no machine's arithmetic tips a pixel


# ------------------------------------------------------------------------------------------- shapes
REACH = 1.3  # a glyph's table spans ±1.3 radii
CELLS = 128  # in 2 · 128 cells


def _around(*radii) -> list[tuple[float, float]]:
    """Corners at these radii, evenly around from the top, closed."""
    corners = []
    for k, r in enumerate(radii):
        turn = 2 * pi * k / len(radii)
        corners.append((r * sin(turn), -r * cos(turn)))
    return corners + corners[:1]


def _digit_points(stroke) -> list[tuple[float, float]]:
    """Points of a stroke in radii, from the digits' grid."""
    return [(int(x) * 0.28 - 0.56, int(y) * 0.2 - 0.8) for x, y in stroke.split()]


HEART = (0.5, 0.92, 1.14, 1.12, 1, 0.86, 0.81, 0.86, 1.06, 0.86, 0.81, 0.86, 1, 1.12, 1.14, 0.92)
# name → (corners in radii, half the width of a stroke or 0 for a filled polygon)
OUTLINES = {
    "circle": (_around(*[1] * 48), 0),
    "ring": (_around(*[0.76] * 48), 0.24),
    "square": (_around(*[0.85, 1.2] * 4), 0),
    "diamond": (_around(*[1.1, 0.75] * 2), 0),
    "triangle": (_around(1.05, 1.25, 1.25), 0),
    "cross": (_around(*[0, 0.95] * 4), 0.27),
    "star": (_around(*[1.12, 0.47] * 5), 0),
    "heart": (_around(*HEART), 0),
}
SHAPES = (*OUTLINES, "number")
# the digits 0 to 9, each one stroke through points xy of a grid 4 wide and 8 high
STROKES = (
    "10 30 42 46 38 18 06 02 10",
    "11 20 28 08 48",
    "02 10 30 42 43 08 48",
    "00 40 23 33 45 46 38 18 06",
    "38 30 05 45",
    "40 00 03 33 45 46 38 08",
    "30 05 06 18 38 46 45 34 14 05",
    "00 40 18",
    "13 02 10 30 42 33 13 05 07 18 38 47 45 33",
    "18 43 42 30 10 02 03 14 34 43",
)
for _digit, _stroke in enumerate(STROKES):
    OUTLINES[str(_digit)] = (_digit_points(_stroke), 0.19)
# words that a landmark with the same colour, shape or size may not be named by
FORBIDDEN_WORDS = {
    "colour": set(COLORS),
    "shape": {*SHAPES, *"0123456789"},
    "size": {"small", "big", "large"},
}
