"""Plots and `check` for the notebooks; whatever computes a result stands in the flat files one folder up.

import sys
sys.path.insert(0, "..")
import lesson                                  from a notebook's own folder, nothing else to set

lesson.maps([before, after], ["without", "with"], label="cosine")      several maps, one colour scale
lesson.check("02 attention shape", ...)                                "not yet", or yours beside the expected
"""

import io
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from answers import EXERCISES
from IPython.display import Image, display
from PIL import Image as PIL

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's, for every eye
plt.rcParams |= {"figure.dpi": 80, "font.size": 9, "image.interpolation": "nearest"}
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)


# ---------------------------------------------------------------------------------------------------- exercises
def check(name, answer) -> bool:
    """Print "not yet" for `...`, otherwise yours beside the expected; True if they agree. Never raises."""
    try:
        exercise = EXERCISES[name]
        yours, expected = run(answer, exercise), run(exercise.right, exercise)
        if unfinished(yours):
            print(f"{name}: not yet")
            return False
        return report(name, yours, expected, exercise)
    except Exception as error:  # a learner's half-finished function can fail in any way
        known = "" if name in EXERCISES else f" (the exercises are {', '.join(EXERCISES)})"
        print(f"{name}: not right: {type(error).__name__}: {error}{known}")
        return False


def run(answer, exercise):
    """A value as it is; of a function, what it gives for each of the exercise's arguments, as a list."""
    if exercise.on and not callable(answer) and not unfinished(answer):
        raise TypeError(f"write a function, this is {short(answer)}")
    return [answer(*arguments) for arguments in exercise.on] if callable(answer) else answer


def unfinished(answer) -> bool:
    """Whether a `...` is left in it."""
    return answer is ... or (isinstance(answer, (list, tuple)) and any(unfinished(part) for part in answer))


def report(name, yours, expected, exercise) -> bool:
    """Print what was found; of a wrong answer that is known, why it is given so often."""
    wrong = difference(yours, expected)
    hints = [why for value, why in exercise.wrong if difference(yours, run(value, exercise)) is None]
    what = "right" if wrong is None else f"not right: {hints[0] if hints else wrong}"
    print(f"{name}: {what}\n  yours     {short(yours)}\n  expected  {short(expected)}")
    return wrong is None


def difference(yours, expected) -> str | None:
    """None where they agree (whole numbers to 0.0001, others to a thousandth), else the difference in words."""
    if isinstance(expected, str):
        return None if str(yours).strip().lower() == expected.lower() else "another word was expected"
    if isinstance(expected, set):
        return None if isinstance(yours, (set, list, tuple, range)) and set(yours) == expected else "other elements"
    if isinstance(expected, list):  # a function's results
        found = [difference(*pair) for pair in zip(yours, expected, strict=True)]
        return next((f"try number {i}: {one}" for i, one in enumerate(found, 1) if one), None)
    try:
        return apart(*(torch.as_tensor(x, dtype=torch.float64).detach().numpy() for x in (yours, expected)))
    except (TypeError, ValueError, RuntimeError):
        return f"{type(yours).__name__} cannot be compared with numbers"


def apart(a, b) -> str | None:
    """Two arrays of numbers: None, or how they differ."""
    if a.shape != b.shape:
        return f"of shape {a.shape}, expected is {b.shape}"
    worst = float(np.abs(a - b).max()) if a.size else 0.0
    if worst <= (1e-4 if np.array_equal(b, b.round()) else 1e-3 * float(np.abs(b).max())):  # whole numbers are counted
        return None
    return f"differs by up to {worst:.4g}" + ("" if a.ndim else f", too {'large' if a > b else 'small'}")


def short(x) -> str:
    """At most 200 characters of a value."""
    x = x.tolist() if isinstance(x, (torch.Tensor, np.ndarray)) and x.ndim == 0 else x
    with np.printoptions(precision=4, legacy="1.21"):  # without numpy's type around each number
        return textwrap.shorten(repr(x), 200, placeholder=" …")


# ---------------------------------------------------------------------------------------------------- pictures
def show(figure):
    """Put a figure below the cell, in 256 colours: drawn scenes are full of noise, which makes full PNGs large."""
    figure.savefig(file := io.BytesIO(), format="png", bbox_inches="tight")
    plt.close(figure)
    PIL.open(file).convert("RGB").quantize(256, PIL.Quantize.MAXCOVERAGE, dither=PIL.Dither.NONE).save(
        file := io.BytesIO(), "PNG", optimize=True
    )
    display(Image(file.getvalue()))


def grid(count, columns=None, side=2.2, **more):
    """`count` axes without ticks, `columns` in a row (all of them, where it is not said), and their figure."""
    columns = columns or count
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, (side + 0.35) * rows), squeeze=False,
                                layout="constrained", **more)  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    return figure, list(axes.flat)[:count]


def title(axis, text, width=26):
    axis.set_title(textwrap.fill(str(text), width), fontsize=9, parse_math=False)


def outline(axis, mask):
    """A mask's edge, to be seen on any colour."""
    if np.any(mask):
        axis.contour(np.asarray(mask, float), [0.5], colors=["black"], linewidths=[3])
        axis.contour(np.asarray(mask, float), [0.5], colors=["white"], linewidths=[1.2])


def pictures(pictures, titles, masks=None, columns=None, side=2.2):
    """Pictures (H, W, 3) side by side, each with its mask (H, W) outlined where one is given."""
    figure, axes = grid(len(pictures), columns, side)
    for axis, picture, text, mask in zip(axes, pictures, titles, masks or [None] * len(axes), strict=True):
        axis.imshow(picture)
        title(axis, text, int(12 * side))
        if mask is not None:
            outline(axis, mask)
    show(figure)


def maps(maps, titles, label="", scale=None, signed=False, columns=None, side=2.2, picture=None, masks=None):
    """Maps (H, W) side by side on one colour scale with one colour bar, after the picture they are of, if given.

    scale: (low, high), else the smallest and largest of all; signed: around zero, two colours; masks: edges drawn on.
    """
    maps = [np.asarray(torch.as_tensor(m).detach().cpu(), dtype=float) for m in maps]
    low, high = scale or (min(m.min() for m in maps), max(m.max() for m in maps))
    low, high = (-max(-low, high), max(-low, high)) if signed else (low, high)
    first = [] if picture is None else [picture]
    figure, axes = grid(len(maps) + len(first), columns, side)
    for axis, one in zip(axes, first, strict=False):
        axis.imshow(one)
    for i, (axis, one, text) in enumerate(zip(axes[len(first) :], maps, titles, strict=True)):
        drawn = axis.imshow(one, vmin=low, vmax=high, cmap="PuOr_r" if signed else "viridis")
        title(axis, text, int(12 * side))
        if masks is not None:
            outline(axis, masks[i])
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.8, pad=0.01)
    show(figure)


def pca_colours(features):
    """Feature maps (C, H, W) of one C → pictures (H, W, 3): their three main directions, the same for all, as colours.

    The same colour means the same direction in every picture of one call, and nothing between calls.
    """
    flat = [feature.flatten(1).mT for feature in features]  # (H·W, C)
    every = torch.cat(flat)
    _, _, directions = torch.linalg.svd(every - every.mean(0), full_matrices=False)
    shown = [(x - every.mean(0)) @ directions[:3].mT for x in flat]
    low, high = torch.cat(shown).quantile(0.01, dim=0), torch.cat(shown).quantile(0.99, dim=0)
    return [((x - low) / (high - low)).clamp(0, 1).unflatten(0, f.shape[1:]).numpy()
            for x, f in zip(shown, features, strict=True)]  # fmt: skip


def spotlight(picture, mask):
    """The picture (H, W, 3), 0 … 1, in full colour under the mask (H, W) and pale grey elsewhere, black things too."""
    picture = np.asarray(picture) / 255
    return np.where(np.asarray(mask)[..., None], picture, 0.25 + 0.25 * picture)
