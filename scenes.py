"""3a. Drawn scenes: pictures made from a seed, and sentences that pick out exactly one object.

Nothing is stored: flavour, split and index give the same scene everywhere. A scene is a list of things with a shape, a
colour, a size class, a centre and a radius, in pixels of a 160 × 160 picture; x grows to the right, y downwards. What
a sentence means in terms of that list (tests/scene_reader.py reads by this alone):

  X = [size] [colour] noun     the things that match every word: small, big or large name the outer two of three size
                               classes; thing and one match all, number any digit, "number 7" and "7" that digit
  the X, the only X            X
  PLACE X, X on/at/in PLACE    score: how far the centre lies beyond the picture's middle line that way (for a corner
                               the smaller of two); center X, X in the middle: 32 less the distance from the centre
  Nth X from the END           rank of the centre among X, counted from left, right, top or bottom; score: the smaller
                               gap to the two neighbours, among the others, that a thing of that rank lies between
  ENDmost X                    the same, first from that end
  X closest/nearest to the L   the same, first by distance of the centres to L
  biggest/largest/smallest X   the same, first by radius; each pixel of radius counts 12.8 / 3
  X left of/right of/above/over/below/under the L      score: how far the centres are apart that way, less across
  X that is not COLOUR, X with the same colour/shape/size as the L     what it says; digits are shapes of their own
  X … that is … and …          all of them; score: the smallest

A landmark L is an X that fits one thing only, and is not among the X compared with it. MARGIN is 12.8, 8 % of the side:
a thing fits clearly with a score above it, and might fit above −MARGIN. A sentence is said only where the target fits
clearly and nothing else might. "that can be seen in this picture" and the like mean nothing. `scenes` is short, without
the same-as and the not; `scenes+` has no word of place; `scenes-g` has 8 to 16 words. test-numbers (digits to be told
apart) and test-crowd (many things, close together) are the paper's failure cases.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, hypot, inf, pi, sin

import numpy as np

from command import UserError

FLAVOURS = ("scenes", "scenes+", "scenes-g")
SPLITS = {"train": 7500, "val": 500, "test": 2000, "test-numbers": 500, "test-crowd": 500}  # refs in each
WORLD, MARGIN = 160, 12.8
COLOURS = {
    "red": (215, 35, 40), "green": (35, 165, 65), "blue": (35, 80, 225), "yellow": (245, 225, 40),
    "orange": (255, 140, 20), "purple": (145, 50, 190), "white": (248, 248, 248), "black": (18, 18, 18),
}  # fmt: skip
RADII = {"large": (34, 39), "medium": (23, 27), "small": (16, 18)}  # pixels
SIZE_WORDS = {"large": ("big", "large"), "medium": (), "small": ("small",)}
ENDS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom",
          "center": "in the middle", **{corner: f"in the {corner} corner" for corner in CORNERS}}  # fmt: skip
RELATIONS = {"left": ("left of", "to the left of"), "right": ("right of", "to the right of"), "top": ("above", "over"),
             "bottom": ("below", "under"), "near": ("closest to", "nearest to")}  # fmt: skip
SEEN = "that can be seen in this picture"
FORMS = {  # flavour → (kind, its share of the attempts, ways to say it); the slots are filled in by methods of _Speaker
    "scenes": (
        ("attribute", 5, ("{x}", "{x}", "the {x}", "{size} {x}")),
        ("place", 3, ("{at[0]} {x}", "{x} {at[1]}", "the {x} {at[1]}", "{most} {x}", "the {most} {x}")),
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


@dataclass(frozen=True)
class Thing:
    """One object: centre and radius in pixels of a 160-pixel picture; `digit` is None unless `shape` is "number"."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    r: float
    digit: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a scene shows and says, before it is painted: things in drawing order, the target's index, sentences."""

    things: tuple[Thing, ...]
    target: int
    sentences: tuple[str, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scene(Plan):
    """A painted plan, shaped as a data item: picture uint8 (S, S, 3), mask bool (S, S) of the target's visible part."""

    picture: np.ndarray
    mask: np.ndarray
    occlusion: float  # the share of the target that later things hide
    ref_id: int
    image_id: int
    sent_ids: tuple[int, ...]


class Scenes:
    """A split of one flavour as a sequence of `Scene`s, `limit` of them at most; UserError for an unknown name."""

    def __init__(self, flavour, split, limit=None, side=WORLD):
        _seed(flavour, split, 0)
        self.name, self.split, self.side, self.count = flavour, split, side, min(SPLITS[split], limit or SPLITS[split])
        self.kept = {}  # small ones stay in memory once they are drawn: all of train at 128 pixels, 0.5 GB

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = self.kept.get(index) or draw_scene(self.name, self.split, index, self.side)
        if self.side <= WORLD:
            self.kept[index] = scene
        return scene


def draw_scene(flavour, split, index, side=WORLD):
    """The `Scene` of that index, painted `side` pixels wide."""
    plan = plan_scene(flavour, split, index)
    painted = paint(plan.things, plan.target, np.random.default_rng((*_seed(flavour, split, index), 1)), side)
    return Scene(**vars(plan), **painted, ref_id=index, image_id=index, sent_ids=tuple(range(len(plan.sentences))))


def plan_scene(flavour, split, index):
    """The `Plan` of that index: all but the painting, for those who need only the words."""
    rng = np.random.default_rng(_seed(flavour, split, index))
    while True:  # a scene of which nothing unique can be said is drawn anew
        things = draw_things(rng, split)
        target = int(rng.random() * len(things))
        said = _Speaker(rng, things, target).say(flavour) if _worth_asking(things, things[target], split) else None
        if said:
            return Plan(things, target, tuple(said), tuple(said.values()))


def _worth_asking(things, target, split):
    alike = any(t is not target and (t.shape == target.shape or t.colour == target.colour) for t in things)
    enough = len(things) > (8 if split == "test-crowd" else 2)
    return alike and enough and (split != "test-numbers" or target.shape == "number")


def _seed(flavour, split, index):
    if flavour not in FLAVOURS:
        raise UserError(f"unknown kind of scenes '{flavour}': choose one of {', '.join(FLAVOURS)}")
    if split not in SPLITS:
        raise UserError(f"{flavour} has no split '{split}': choose one of {', '.join(SPLITS)}")
    return FLAVOURS.index(flavour), list(SPLITS).index(split), index


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


def draw_things(rng, split):
    """Three to eight things (crowd: ten to fifteen) of a few shapes and colours, so that most share some."""
    crowd, numbers = split == "test-crowd", split == "test-numbers"
    shapes = [_pick(rng, SHAPES) for _ in range(1 if numbers else _pick(rng, (2, 3)))]
    shapes += ["number"] * (4 if numbers else rng.random() < 0.4)
    colours = [_pick(rng, tuple(COLOURS)) for _ in range(_pick(rng, (2, 3, 4)))]
    sizes = [_pick(rng, tuple(RADII)[crowd and rng.random() < 0.8 :]) for _ in range(rng.integers(3, 9) + 7 * crowd)]
    things = []
    for size, x, y, r in _settle(rng, sorted(sizes), 0.5 if crowd else 0.25):
        touched = [t.colour for t in things if hypot(t.x - x, t.y - y) < t.r + r]
        colour = _pick(rng, [colour for colour in colours if colour not in touched] or tuple(COLOURS))
        shape = _pick(rng, shapes)
        things.append(Thing(shape, colour, size, x, y, r, int(rng.random() * 10) if shape == "number" else None))
    return tuple(things[i] for i in rng.permutation(len(things)))


def _settle(rng, sizes, tucked):
    """(size, x, y, r) of each that finds room, the large first; a share `tucked` of them overlaps one other by 0.2 to
    0.6 of the smaller radius. None overlaps two, so that most of everything stays visible."""
    settled, alone = [], []
    for size in sizes:
        r = round(4 * rng.uniform(*RADII[size])) / 4  # quarters of a pixel: no machine rounds them differently
        partner = _pick(rng, alone) if alone and rng.random() < tucked else None
        for a, b in rng.random((40, 2)).tolist():
            x, y = r + a * (WORLD - 2 * r), r + b * (WORLD - 2 * r)
            if partner:
                reach = r + partner[3] - (0.2 + 0.4 * b) * min(r, partner[3])
                x, y = partner[1] + reach * cos(2 * pi * a), partner[2] + reach * sin(2 * pi * a)
            x, y = round(4 * x) / 4, round(4 * y) / 4
            free = all(hypot(x - p[1], y - p[2]) > r + p[3] + 2 for p in settled if p is not partner)
            if free and r <= min(x, y) and max(x, y) <= WORLD - r:
                settled.append((size, x, y, r))
                alone = [p for p in alone if p is not partner] + settled[-1:] * (partner is None)
                break
    return settled


class _Speaker:
    """Finds sentences for one target. The methods that fill a slot give its text and {index in X: score}; where they
    have nothing to say, the target is missing from the scores or scores badly."""

    def __init__(self, rng, things, target):
        self.rng, self.things, self.target = rng, things, target
        self.names = [self.names_of(i) for i in range(len(things))]

    def pick(self, options):
        return _pick(self.rng, options)

    def say(self, flavour):
        """{sentence: kind}, one to four, of different kinds where there are enough; {} if none was found."""
        said, wanted = {}, self.pick((1, 2, 3, 3, 4))
        bag = [(kind, ways) for kind, share, ways in FORMS[flavour] for _ in range(share)]
        for attempt in range(40):
            kind, ways = self.pick(bag)
            text = self.sentence(self.pick(ways)) if attempt > 25 or kind not in said.values() else None
            if text and (flavour != "scenes-g" or 8 <= len(text.split()) <= 16):
                said[text] = "digit" if kind == "attribute" and set(text) & set("0123456789") else kind
            if len(said) == wanted:
                break
        return said

    def names_of(self, i):
        """Every X that fits thing i: (words, bits), bit j set where it fits thing j."""
        t, every = self.things[i], (1 << len(self.things)) - 1
        like = {k: sum(1 << j for j, o in enumerate(self.things) if getattr(o, k) == getattr(t, k)) for k in vars(t)}
        sizes = [("", every)] + [(word + " ", like["size"]) for word in SIZE_WORDS[t.size]]
        colours = [("", every), (t.colour + " ", like["colour"])]
        nouns = [("thing", every), ("one", every)] + [(t.shape, like["shape"])] * 3
        if t.digit is not None:
            nouns += [(f"number {t.digit}", like["digit"]), (str(t.digit), like["digit"])] * 2
        return [(s + c + n, a & b & d) for s, a in sizes for c, b in colours for n, d in nouns]

    def sentence(self, way):
        """That way to say it, filled in; None where it would not be clear, or say more than is needed."""
        slots = [slot for slot in ("at", "most", "nth", "size", "rel", "also", "same", "other") if "{" + slot in way]
        wordy = slots and self.rng.random() < 0.5  # people often say more than they must
        fits = [name for name in self.names[self.target] if wordy or (name[1] == 1 << self.target) != bool(slots)]
        if not fits:
            return None
        x, bits = min(self.pick(fits), self.pick(fits), key=lambda name: len(name[0].split()))
        words, scores = {"x": x}, {i: inf for i in range(len(self.things)) if bits >> i & 1}
        for slot in slots:
            words[slot], found = getattr(self, slot)(list(scores))
            scores = {i: min(score, found.get(i, -inf)) for i, score in scores.items()}
        clear = scores.pop(self.target) > MARGIN and all(score < -MARGIN for score in scores.values())
        return way.format(**words) if clear else None

    def at(self, members):
        def score(thing, place):
            x, y = thing.x - WORLD / 2, thing.y - WORLD / 2
            if place == "center":
                return 32 - hypot(x, y)
            return min(ENDS[word][0] * x + ENDS[word][1] * y for word in place.split())

        clear = [place for place in PLACES if score(self.things[self.target], place) > MARGIN]
        place = self.pick(clear or ("center",))
        return (place, PLACES[place]), {i: score(self.things[i], place) for i in members}

    def nth(self, members, words=("", "second", "third", "fourth")):
        end = self.pick(tuple(ENDS))
        keys = {i: -ENDS[end][0] * self.things[i].x - ENDS[end][1] * self.things[i].y for i in members}
        rank = sum(key < keys[self.target] for key in keys.values())
        said = rank < len(words) and words[rank] and rank < len(keys) - 1
        return (said and words[rank], end), _rank(keys, rank) if said else {}

    def most(self, members):
        (_, end), scores = self.nth(members, words=("first",))
        return end + "most", scores

    def size(self, members):
        word, sign = self.pick((("biggest", -1), ("largest", -1), ("smallest", 1)))
        return word, _rank({i: sign * self.things[i].r * MARGIN / 3 for i in members}, 0)

    def landmark(self, hide=frozenset()):
        """(index, X) of another thing that X fits alone, without the words `hide`; the target where there is none."""
        i = self.pick([i for i in range(len(self.things)) if i != self.target])
        fits = [words for words, bits in self.names[i] if bits == 1 << i and not hide & set(words.split())]
        return (i, min(self.pick(fits), self.pick(fits), key=lambda x: len(x.split()))) if fits else (self.target, "")

    def rel(self, members):
        mark, name = self.landmark()
        x0, y0 = self.things[mark].x, self.things[mark].y
        x, y = self.things[self.target].x - x0, self.things[self.target].y - y0
        way = ("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom")
        offsets = {i: (self.things[i].x - x0, self.things[i].y - y0) for i in members if i != mark}
        if self.rng.random() < 0.2:
            way, scores = "near", _rank({i: hypot(*offset) for i, offset in offsets.items()}, 0)
        else:
            dx, dy = ENDS[way]
            scores = {i: dx * x + dy * y - abs(dy * x) - abs(dx * y) for i, (x, y) in offsets.items()}
        return f"{self.pick(RELATIONS[way])} the {name}", scores

    also = rel

    def same(self, members):
        what = self.pick(("colour", "colour", "shape", "size"))
        mark, name = self.landmark(HIDE[what])
        looks = [(t.shape, t.digit) if what == "shape" else getattr(t, what) for t in self.things]
        agree = {i: inf if looks[i] == looks[mark] else -inf for i in members if i != mark}
        return f"{what} as the {name}", agree if len(agree) > 1 else {}  # with nobody else in X it would say nothing

    def other(self, members):
        own = self.things[self.target].colour
        colour = self.pick([self.things[i].colour for i in members if self.things[i].colour != own] or [own])
        return colour, {i: -inf if self.things[i].colour == colour else inf for i in members}


def _rank(keys, rank):
    """{i: how clearly i has that rank, 0 for the smallest key}: the smaller of the gaps to its two neighbours."""
    scores = {}
    for i, key in keys.items() if len(keys) > 1 else ():  # nobody says "the biggest" of one
        others = [-inf, *sorted(k for j, k in keys.items() if j != i), inf]
        scores[i] = min(key - others[rank], others[rank + 1] - key)
    return scores


def paint(things, target, rng, side=WORLD):
    """Things in drawing order → picture, mask (a pixel belongs to it if half of it shows the target) and occlusion."""
    picture, shown, area = _background(rng, side), np.zeros((side, side), np.float32), 1
    for i, thing in enumerate(things):
        (rows, columns), cover = _cover(thing, side)
        colour = np.float32(COLOURS[thing.colour]) + np.float32(rng.uniform(-12, 12, 3))
        picture[:, rows, columns] += cover * (colour[:, None, None] - picture[:, rows, columns])
        shown[rows, columns] = cover if i == target else shown[rows, columns] * (1 - cover)
        area = (cover >= 0.5).sum() if i == target else area
    down, right = rng.integers(64, size=2)
    picture += np.float32(rng.uniform(3, 10)) * _noise(side)[:, down : down + side, right : right + side]
    picture = np.clip(picture, 0, 255, out=picture).astype(np.uint8).transpose(1, 2, 0)
    mask = shown >= 0.5
    return {"picture": np.ascontiguousarray(picture), "mask": mask, "occlusion": float(1 - mask.sum() / area)}


def _background(rng, side):
    """A muted gradient, thin lines and dots: float32 (3, side, side)."""
    tones = np.float32(rng.uniform(85, 175) + rng.uniform(-22, 22, (3, 3, 1, 1)))
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    picture = tones[0] + (tones[1] - tones[0]) * ramp + (tones[2] - tones[0]) * ramp[:, None] / 2
    for (y, x), (dy, dx) in zip(rng.integers(side, size=(5, 2)), rng.uniform(-1, 1, (5, 2)), strict=True):
        path = np.arange(rng.integers(side))
        ys, xs = (y + dy * path).astype(int) % side, (x + dx * path).astype(int) % side
        picture[:, ys, xs] += np.float32(rng.uniform(-60, 60, (3, 1)))
    ys, xs = rng.integers(side - 1, size=(2, rng.integers(10, 60), 1, 1))
    picture[:, ys + [[0], [1]], xs + [0, 1]] += np.float32(rng.uniform(-60, 60, (3, 1, 1, 1)))
    return picture


@lru_cache
def _noise(side):
    return np.random.default_rng(0).standard_normal((3, side + 64, side + 64), dtype=np.float32)


def _cover(thing, side):
    """(rows, columns) that a thing can touch, and how much of each pixel there it covers, 0 … 1."""
    r, box, cells = thing.r * side / WORLD, [], []
    for centre in (thing.y * side / WORLD, thing.x * side / WORLD):
        low, high = max(0, int(centre - REACH * r)), min(side, int(centre + REACH * r) + 1)
        offsets = (np.arange(low, high) + 0.5 - centre) / (REACH * r)  # pixel centres, −1 … 1
        cells.append(np.clip((offsets * CELLS + CELLS).astype(int), 0, 2 * CELLS - 1))
        box.append(slice(low, high))
    distance = _glyph(thing.shape if thing.digit is None else str(thing.digit))[cells[0][:, None], cells[1]]
    return box, np.clip(0.5 - distance * np.float32(r), 0, 1)


@lru_cache
def _glyph(name):
    """Signed distance to a shape's edge, in radii, on a square of ±REACH radii: float32 (2 CELLS, 2 CELLS)."""
    points, stroke = OUTLINES[name]
    x = (np.arange(2 * CELLS) + 0.5 - CELLS) * REACH / CELLS
    y, inside, distance = x[:, None], False, inf
    for (ax, ay), (bx, by) in zip(points, points[1:], strict=False):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(x - ax - along * ex, y - ay - along * ey))
        inside ^= ((ay > y) != (by > y)) & ((x - ax) * ey * np.sign(ey) < (y - ay) * ex * np.sign(ey))  # even-odd rule
    signed = distance - stroke if stroke else np.where(inside, -distance, distance)
    return np.round(signed, 5).astype(np.float32)  # rounded, so that no machine's arithmetic tips a pixel


def _around(*radii):
    """Corners at these radii, evenly around from the top, closed."""
    turns = [2 * pi * k / len(radii) for k in range(len(radii))]
    corners = [(r * sin(turn), -r * cos(turn)) for r, turn in zip(radii, turns, strict=True)]
    return corners + corners[:1]


REACH, CELLS = 1.3, 128  # a glyph's table spans ±1.3 radii in 256 cells
OUTLINES = {  # name → (corners in radii, half the width of a stroke or 0 for a filled polygon)
    "circle": (_around(*(1,) * 48), 0), "ring": (_around(*(0.76,) * 48), 0.24),
    "square": (_around(*(0.85, 1.2) * 4), 0), "diamond": (_around(*(1.1, 0.75) * 2), 0),
    "triangle": (_around(1.05, 1.25, 1.25), 0), "cross": (_around(*(0, 0.95) * 4), 0.27),
    "star": (_around(*(1.12, 0.47) * 5), 0),
    "heart": (_around(0.5, 0.92, 1.14, 1.12, 1, 0.86, 0.81, 0.86, 1.06, 0.86, 0.81, 0.86, 1, 1.12, 1.14, 0.92), 0),
}  # fmt: skip
SHAPES = (*OUTLINES, "number")
STROKES = (  # the digits 0 to 9, each one stroke through points of a grid 4 wide and 8 high
    "10 30 42 46 38 18 06 02 10", "11 20 28 08 48", "02 10 30 42 43 08 48", "00 40 23 33 45 46 38 18 06",
    "38 30 05 45", "40 00 03 33 45 46 38 08", "30 05 06 18 38 46 45 34 14 05", "00 40 18",
    "13 02 10 30 42 33 13 05 07 18 38 47 45 33", "18 43 42 30 10 02 03 14 34 43",
)  # fmt: skip
for _digit, _stroke in enumerate(STROKES):
    OUTLINES[str(_digit)] = ([(int(x) * 0.28 - 0.56, int(y) * 0.2 - 0.8) for x, y in _stroke.split()], 0.19)
HIDE = {"colour": set(COLOURS), "shape": {*SHAPES, *"0123456789"}, "size": {"small", "big", "large"}}
