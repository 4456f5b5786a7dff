"""Plots and `check` for the notebooks. Whatever computes a result stands one folder up.

    import sys
    sys.path.insert(0, "..")
    import lesson

    lesson.maps([before, after], ["without", "with"], label="cosine")      maps on one color scale
    lesson.check("02 attention shape", ...)            "not yet", or your answer beside the expected

H W height and width of an image or a map
"""

import io
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, display
from PIL import Image as PIL

from answers import EXERCISES

# Okabe and Ito's colors, which color-blind readers tell apart
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
plt.rcParams["figure.dpi"] = 80
plt.rcParams["font.size"] = 9
plt.rcParams["image.interpolation"] = "nearest"
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLORS)


# --------------------------------------------------------------------------------------- exercises
def check(name, answer) -> bool:
    """Print "not yet" for `...`, else your answer beside the expected one; True if they agree.

    Never raises: a learner's half-finished function can fail in any way.
    """
    try:
        exercise = EXERCISES[name]
        yours = run(answer, exercise)
        expected = run(exercise.right, exercise)
        if is_unfinished(yours):
            print(f"{name}: not yet")
            return False
        return report(name, yours, expected, exercise)
    except Exception as error:
        known = ""
        if name not in EXERCISES:
            known = f" (the exercises are {', '.join(EXERCISES)})"
        print(f"{name}: not right: {type(error).__name__}: {error}{known}")
        return False


def run(answer, exercise):
    """A value as it is; of a function, its results for each of the exercise's arguments."""
    if exercise.on and not callable(answer) and not is_unfinished(answer):
        raise TypeError(f"write a function, this is {short(answer)}")
    if callable(answer):
        return [answer(*arguments) for arguments in exercise.on]
    return answer


def is_unfinished(answer) -> bool:
    """Whether a `...` is left in it."""
    if isinstance(answer, list | tuple):
        return any(is_unfinished(part) for part in answer)
    return answer is ...


def report(name, yours, expected, exercise) -> bool:
    """Print both answers; of a typical wrong answer also why it is wrong. True if they agree."""
    wrong = difference(yours, expected)
    if wrong is None:
        verdict = "right"
    else:
        verdict = f"not right: {typical_reason(yours, exercise) or wrong}"
    print(f"{name}: {verdict}")
    print(f"  yours     {short(yours)}")
    print(f"  expected  {short(expected)}")
    return wrong is None


def typical_reason(yours, exercise) -> str | None:
    """Why this typical wrong answer is wrong; None for any other answer."""
    for value, reason in exercise.wrong:
        if difference(yours, run(value, exercise)) is None:
            return reason
    return None


def difference(yours, expected) -> str | None:
    """None where they agree, else the difference in words.

    Whole numbers agree to 0.0001, others to a thousandth.
    """
    if isinstance(expected, str):
        same = str(yours).strip().lower() == expected.lower()
        return None if same else "another word was expected"
    if isinstance(expected, set):
        same = isinstance(yours, set | list | tuple | range) and set(yours) == expected
        return None if same else "other elements"
    if isinstance(expected, list):  # a function's results
        for number, (mine, right) in enumerate(zip(yours, expected, strict=True), start=1):
            reason = difference(mine, right)
            if reason:
                return f"try number {number}: {reason}"
        return None
    try:
        return numeric_difference(as_array(yours), as_array(expected))
    except (TypeError, ValueError, RuntimeError):
        return f"{type(yours).__name__} cannot be compared with numbers"


def as_array(x) -> np.ndarray:
    return torch.as_tensor(x, dtype=torch.float64).detach().cpu().numpy()


def numeric_difference(yours, expected) -> str | None:
    """Two arrays of numbers: None, or how they differ."""
    if yours.shape != expected.shape:
        return f"of shape {yours.shape}, expected is {expected.shape}"
    if yours.size == 0:
        return None
    largest = float(np.abs(yours - expected).max())
    is_whole = np.array_equal(expected, expected.round())
    tolerance = 1e-4 if is_whole else 1e-3 * float(np.abs(expected).max())
    if largest <= tolerance:
        return None
    reason = f"differs by up to {largest:.4g}"
    if yours.ndim == 0:
        reason += ", too large" if yours > expected else ", too small"
    return reason


def short(x) -> str:
    """At most 200 characters of a value."""
    if isinstance(x, torch.Tensor | np.ndarray) and x.ndim == 0:
        x = x.tolist()
    with np.printoptions(precision=4, legacy="1.21"):  # without numpy's type around each number
        return textwrap.shorten(repr(x), 200, placeholder=" …")


# ----------------------------------------------------------------------------------------- figures
def show(figure):
    """Put a figure below the cell, in 256 colors: noise in drawn scenes makes full PNGs large."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    small = PIL.open(buffer).convert("RGB")
    small = small.quantize(256, PIL.Quantize.MAXCOVERAGE, dither=PIL.Dither.NONE)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    display(Image(buffer.getvalue()))


def grid(count, columns=None, side=2.2):
    """A figure and `count` axes without ticks, `columns` in a row (all of them unless given)."""
    columns = columns or count
    rows = -(-count // columns)
    size = (side * columns, (side + 0.35) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    axes = list(axes.flat)
    for axis in axes:
        axis.axis("off")
    return figure, axes[:count]


def title(axis, text, width=26):
    axis.set_title(textwrap.fill(str(text), width), fontsize=9, parse_math=False)


def outline(axis, mask):
    """A mask's edge, visible on any color."""
    mask = np.asarray(mask, float)
    if mask.any():
        axis.contour(mask, [0.5], colors=["black"], linewidths=[3])
        axis.contour(mask, [0.5], colors=["white"], linewidths=[1.2])


def images(images, titles, masks=None, columns=None, side=2.2):
    """Images (H, W, 3) side by side, each with its mask (H, W) outlined where one is given."""
    figure, axes = grid(len(images), columns, side)
    masks = masks or [None] * len(images)
    for axis, image, text, mask in zip(axes, images, titles, masks, strict=True):
        axis.imshow(image)
        title(axis, text, int(12 * side))
        if mask is not None:
            outline(axis, mask)
    show(figure)


def maps(
    maps,
    titles,
    label="",
    scale=None,
    signed=False,
    columns=None,
    side=2.2,
    image=None,
    masks=None,
):
    """Maps (H, W) side by side on one color scale with one color bar.

    scale: (low, high), else the smallest and largest of all. signed: around zero, two colors.
    image: shown before them. masks: edges drawn on them.
    """
    maps = [as_array(one) for one in maps]
    low, high = scale or (min(one.min() for one in maps), max(one.max() for one in maps))
    if signed:
        high = max(-low, high)
        low = -high
    before = 0 if image is None else 1
    figure, axes = grid(before + len(maps), columns, side)
    if image is not None:
        axes[0].imshow(image)
    color_map = "PuOr_r" if signed else "viridis"
    masks = masks or [None] * len(maps)
    for axis, one, text, mask in zip(axes[before:], maps, titles, masks, strict=True):
        drawn = axis.imshow(one, vmin=low, vmax=high, cmap=color_map)
        title(axis, text, int(12 * side))
        if mask is not None:
            outline(axis, mask)
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.8, pad=0.01)
    show(figure)


def pca_colors(features):
    """Feature maps (C, H, W) of one C → images (H, W, 3): their three main directions as colors.

    The same color means the same direction in every image of one call, and nothing between calls.
    """
    flat = [feature.flatten(1).mT for feature in features]  # (H·W, C) each
    together = torch.cat(flat)
    mean = together.mean(0)
    _, _, directions = torch.linalg.svd(together - mean, full_matrices=False)
    shown = [(x - mean) @ directions[:3].mT for x in flat]  # (H·W, 3) each
    low = torch.cat(shown).quantile(0.01, dim=0)
    high = torch.cat(shown).quantile(0.99, dim=0)
    colors = []
    for x, feature in zip(shown, features, strict=True):
        x = ((x - low) / (high - low)).clamp(0, 1)
        colors.append(x.unflatten(0, feature.shape[1:]).numpy())
    return colors


def spotlight(image, mask):
    """The image (H, W, 3), 0..1, in full color inside the mask (H, W) and pale gray elsewhere."""
    image = np.asarray(image) / 255
    pale = 0.25 + 0.25 * image
    return np.where(np.asarray(mask)[..., None], image, pale)
