"""Reads a sentence about a drawn scene by the meanings in the docstring of toy/scenes.py. Imports
nothing from it.
"""

import re
from math import hypot, inf

COLORS = {"red", "green", "blue", "yellow", "orange", "purple", "white", "black"}
SHAPES = {"circle", "ring", "square", "diamond", "triangle", "cross", "star", "heart"}
SIZES = {"small": "small", "big": "large", "large": "large"}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
RANKS = {"second": 2, "third": 3, "fourth": 4}
SIDES = {
    "left": lambda t: 80 - t["x"],
    "right": lambda t: t["x"] - 80,
    "top": lambda t: 80 - t["y"],
    "bottom": lambda t: t["y"] - 80,
}
PLACES = "(top left|top right|bottom left|bottom right|left|right|top|bottom|center)"
# words between X and its landmark → (how far thing t is from landmark m that way, how far across)
RELATIONS = (
    (r"(?:to the )?left of", lambda t, m: (m["x"] - t["x"], m["y"] - t["y"])),
    (r"(?:to the )?right of", lambda t, m: (t["x"] - m["x"], m["y"] - t["y"])),
    (r"above|over", lambda t, m: (m["y"] - t["y"], m["x"] - t["x"])),
    (r"below|under", lambda t, m: (t["y"] - m["y"], m["x"] - t["x"])),
)


def read(sentence, things, threshold):
    """The indices of all things whose score exceeds the threshold.

    things: dicts with shape, colour, size, x, y, r, digit.
    ValueError where a word has no meaning here, a landmark fits none or several things, or a number
    says how many things fit and others do.
    """
    sentence, number = singular(sentence)
    text = re.sub(r" (that can be seen in|of) this picture$", "", sentence)
    text = re.sub(r"^the (only )?", "", text).replace("counting from", "from")
    text = re.sub(r" that (is located|can be seen|is(?! not)) ", " that ", text)
    x, *clauses = re.split(r" that | and ", text)
    x, first = split_phrase(x)
    members = named(x, things)
    scores = dict.fromkeys(members, inf)
    for clause in first + clauses:
        found = judge(clause, members, things)
        scores = {i: min(score, found.get(i, -inf)) for i, score in scores.items()}
    found = {i for i, score in scores.items() if score > threshold}
    if number not in (None, len(found)):
        raise ValueError(f"{len(found)} things fit, not {number}")
    return found


def singular(sentence):
    """(the sentence said of one thing, how many things it says that there are or None)."""
    start = re.match(r"(?:all the|all|every|the (two|three|four|five|six)) ", sentence)
    if not start:
        return sentence, None
    text = sentence[start.end() :].replace("crosses", "cross").replace(" that are ", " that is ")
    text = re.sub(rf"\b({'|'.join(SHAPES)}|thing|one|number)s\b", r"\1", text)
    return text, NUMBERS.get(start[1])


def split_phrase(text):
    """The bare X, and the clauses before and after it: "top left star" → ("star", ["top left"])."""
    clauses = []
    after = re.search(
        r" (from the|on the|at the|in the|with the|closest|nearest|(to the )?(left|right) of"
        r"|above|over|below|under) .*",
        text,
    )
    if after:
        clauses.append(after[0].strip())
        text = text[: after.start()]
    before = re.match(rf"{PLACES} |(\w+most|biggest|largest|smallest|second|third|fourth) ", text)
    if before:
        word = before[0].strip()
        text = text[before.end() :]
        clauses = [f"{word} {clauses[0]}", *clauses[1:]] if word in RANKS else [word, *clauses]
    return text, clauses


def named(x, things):
    """The indices of the things that match every word of "[size] [colour] noun"."""
    fits = set(range(len(things)))
    for word in x.replace("number ", "").split():
        fits &= {i for i, thing in enumerate(things) if matches(word, thing)}
    return fits & {
        i for i, thing in enumerate(things) if "number" not in x or thing["digit"] is not None
    }


def matches(word, thing):
    if word in ("thing", "one"):
        return True
    if word == "number":
        return thing["digit"] is not None
    if word in SIZES:
        return thing["size"] == SIZES[word]
    if word.isdigit():
        return thing["digit"] == int(word)
    if word not in COLORS | SHAPES:
        raise ValueError(f"'{word}' means nothing here")
    return word in (thing["colour"], thing["shape"])


def landmark(text, things):
    fits = named(text.removeprefix("the "), things)
    if len(fits) != 1:
        raise ValueError(f"the landmark '{text}' fits {len(fits)} things")
    return fits.pop()


def judge(clause, members, things):
    """{index: score} of the members for one clause; a landmark among them is left out."""
    if match := re.fullmatch(rf"(?:(?:on|at|in) the )?(?:{PLACES}|(middle))(?: corner)?", clause):
        return {i: placed(match[1], things[i]) for i in members}
    if match := re.fullmatch(
        r"(?:(second|third|fourth) from the )?(left|right|top|bottom)(?:most)?", clause
    ):
        return ranked({i: -SIDES[match[2]](things[i]) for i in members}, RANKS.get(match[1], 1))
    if clause in ("biggest", "largest", "smallest"):
        sign = 1 if clause == "smallest" else -1
        return ranked({i: sign * things[i]["r"] * 12.8 / 3 for i in members}, 1)
    if match := re.fullmatch(r"(?:is )?not (\w+)", clause):
        return {i: -inf if things[i]["colour"] == match[1] else inf for i in members}
    if match := re.fullmatch(r"with the same (colour|shape|size) as (.*)", clause):
        keys = ("shape", "digit") if match[1] == "shape" else (match[1],)
        mark = landmark(match[2], things)
        scores = {}
        for i in members - {mark}:
            agrees = all(things[i][key] == things[mark][key] for key in keys)
            scores[i] = inf if agrees else -inf
        return scores
    if match := re.fullmatch(r"(?:closest|nearest) to (.*)", clause):
        mark = landmark(match[1], things)
        x = things[mark]["x"]
        y = things[mark]["y"]
        distances = {}
        for i in members - {mark}:
            distances[i] = hypot(things[i]["x"] - x, things[i]["y"] - y)
        return ranked(distances, 1)
    for words, offsets in RELATIONS:
        if match := re.fullmatch(rf"(?:{words}) (the .*)", clause):
            mark = landmark(match[1], things)
            apart = {i: offsets(things[i], things[mark]) for i in members - {mark}}
            return {i: along - abs(across) for i, (along, across) in apart.items()}
    raise ValueError(f"'{clause}' means nothing here")


def placed(place, thing):
    if place in (None, "center"):  # None: "in the middle"
        return 32 - hypot(thing["x"] - 80, thing["y"] - 80)
    return min(SIDES[word](thing) for word in place.split())


def ranked(keys, rank):
    """{index: the smaller gap to the two others between which a thing of that rank lies}."""
    scores = {}
    for i, key in keys.items():
        others = sorted(other for j, other in keys.items() if j != i)
        below = (
            key - others[rank - 2] if 2 <= rank <= len(others) + 1 else inf if rank == 1 else -inf
        )
        above = others[rank - 1] - key if rank <= len(others) else inf
        scores[i] = min(below, above)
    return scores
