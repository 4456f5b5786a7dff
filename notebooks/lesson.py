"""Plots, `check` and something to play with. Whatever computes a result stands one folder up.

    import sys
    sys.path.insert(0, "..")
    import lesson

    lesson.maps([before, after], ["without", "with"], label="cosine")      maps on one color scale
    lesson.check("02 attention shape", ...)            "not yet", "right", or why it is wrong
    lesson.solution("02 attention shape")              the expected value
    lesson.play(model, probes, choices)                a sentence box and two sliders

C channels · H W height and width of an image or a map
"""

import io
import textwrap

import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, display
from PIL import Image as PIL

from answers import EXERCISES
from data import letterbox
from evaluate import THRESHOLD
from experiments.probe import Ridge, all_features, place_labels, set_strength, tapped
from predict import as_image, at_image_size, predict_squares
from utils.common import UserError
from utils.tokenizer import is_blank, tokenize

# Okabe and Ito's colors, which color-blind readers tell apart
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
FOUND = "#C2127F"  # the edge of what a model marks; the truth's edge is white on black
plt.rcParams["figure.dpi"] = 120
plt.rcParams["font.size"] = 9
plt.rcParams["image.interpolation"] = "nearest"
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLORS)

wrong_answers = {}  # exercise's name: how many wrong answers so far


# --------------------------------------------------------------------------------------- exercises
def check(name, answer) -> bool:
    """Print "not yet" for `...`, "right", or why the answer is wrong; True if it is right.

    From the second wrong answer on a hint follows. The expected value is never printed: `solution`
    gives it. Never raises: a learner's half-finished function can fail in any way.
    """
    try:
        exercise = EXERCISES[name]
        yours = run(answer, exercise)
        if is_unfinished(yours):
            print(f"{name}: not yet")
            return False
        wrong = difference(yours, run(exercise.right, exercise))
        if wrong is None:
            print(f"{name}: right")
            return True
        shown = short(yours)
        print(f"{name}: not right: {typical_reason(yours, exercise) or wrong}")
        print(f"  yours  {shown}")
    except Exception as error:
        known = ""
        if name not in EXERCISES:
            known = f" (the exercises are {', '.join(EXERCISES)})"
        print(f"{name}: not right: {type(error).__name__}: {error}{known}")
    give_hint(name)
    return False


def give_hint(name):
    """Count a wrong answer; from the second one on print the exercise's hint."""
    if name not in EXERCISES:
        return
    wrong_answers[name] = wrong_answers.get(name, 0) + 1
    if wrong_answers[name] >= 2:
        print(f"  hint   {EXERCISES[name].hint}")
        print(f'  lesson.solution("{name}") shows the expected value')


def solution(name):
    """The expected value; of a function to be written, its results for the arguments tried."""
    if name not in EXERCISES:
        print(f"{name}: the exercises are {', '.join(EXERCISES)}")
        return None
    exercise = EXERCISES[name]
    return run(exercise.right, exercise)


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


def typical_reason(yours, exercise) -> str | None:
    """Why this typical wrong answer is wrong; None for any other answer."""
    for value, reason in exercise.wrong:
        if difference(yours, run(value, exercise)) is None:
            return reason
    return None


def difference(yours, expected) -> str | None:
    """None where they agree, else the difference in words.

    Whole numbers agree to 0.0001, others to a thousandth; words without their article.
    """
    if isinstance(expected, str):
        return None if bare(yours) == bare(expected) else "another of the answers was expected"
    if isinstance(expected, set) and isinstance(yours, str | int | float):
        return "give a set: {…}"
    if isinstance(expected, set):
        same = isinstance(yours, set | list | tuple | range) and set(yours) == expected
        return None if same else "other elements"
    if isinstance(expected, list):  # a function's results
        for number, (mine, right) in enumerate(zip(yours, expected, strict=True), start=1):
            reason = difference(mine, right)
            if reason:
                return f"try number {number}: {reason}"
        return None
    if isinstance(expected, tuple) and isinstance(expected[0], torch.Tensor):
        return difference_of_results(yours, expected)
    try:
        return numeric_difference(as_array(yours), as_array(expected))
    except (TypeError, ValueError, RuntimeError):
        return f"{type(yours).__name__} cannot be compared with numbers"


def bare(words) -> str:
    """The Decoder → decoder."""
    return str(words).strip().lower().removeprefix("the ").removeprefix("a ")


def difference_of_results(yours, expected) -> str | None:
    """The same for a function that returns several tensors, or tuples of them."""
    if not isinstance(yours, list | tuple) or len(yours) != len(expected):
        return f"{len(expected)} results are expected"
    for number, (mine, right) in enumerate(zip(yours, expected, strict=True), start=1):
        reason = difference(mine, right)
        if reason:
            return f"result {number}: {reason}"
    return None


def as_array(x) -> np.ndarray:
    return torch.as_tensor(x, dtype=torch.float64).detach().cpu().numpy()


def numeric_difference(yours, expected) -> str | None:
    """Two arrays of numbers: None, or how they differ."""
    if yours.shape != expected.shape:
        return f"of shape {yours.shape}, another shape is expected"
    if yours.size == 0:
        return None
    largest = float(np.abs(yours - expected).max())
    is_whole = np.array_equal(expected, expected.round())
    # a trifle over a thousandth: 33.3 is a third of 100 to one decimal
    tolerance = 1e-4 if is_whole else 1.001e-3 * float(np.abs(expected).max())
    if largest <= tolerance:
        return None
    if yours.ndim == 0:
        return "too large" if yours > expected else "too small"
    return "the shape is right, the numbers are not"


def short(x) -> str:
    """At most 200 characters of a value."""
    if isinstance(x, torch.Tensor | np.ndarray) and x.ndim == 0:
        x = x.tolist()
    with np.printoptions(precision=4, legacy="1.21"):  # without numpy's type around each number
        return textwrap.shorten(repr(x), 200, placeholder=" …")


# ----------------------------------------------------------------------------------------- figures
def show(figure, palette=PIL.Quantize.MAXCOVERAGE):
    """Put a figure below the cell, in 192 colors: noise in drawn scenes makes full PNGs large.

    palette: how they are chosen; MEDIANCUT keeps the color of most pixels exactly; it is refined,
    so that narrow color bars keep theirs.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    small = PIL.open(buffer).convert("RGB")
    refine = 3 if palette == PIL.Quantize.MEDIANCUT else 0
    small = small.quantize(192, palette, kmeans=refine, dither=PIL.Dither.NONE)
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
    lines = [textwrap.fill(line, width) for line in str(text).split("\n")]
    axis.set_title("\n".join(lines), fontsize=9, parse_math=False)


def outline(axis, mask, found=False):
    """A mask's edge: of the truth white on black, visible on any color; of what is found FOUND."""
    mask = np.asarray(mask, float)
    if not mask.any():
        return
    if found:
        axis.contour(mask, [0.5], colors=[FOUND], linewidths=[1.2])
    else:
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


def image_rows(rows, labels, titles, masks=None, side=1.7):
    """Rows of images (H, W, 3), or of maps (H, W) on a scale of their own, each row with its label.

    titles: above the first row. masks: one for each row, outlined on every image of that row.
    """
    size = (side * len(titles) + 0.3, side * len(rows) + 0.3)
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=size, squeeze=False, layout="constrained"
    )
    masks = masks or [None] * len(rows)
    for row, name, line, mask in zip(axes, labels, rows, masks, strict=True):
        for axis, one in zip(row, line, strict=True):
            axis.imshow(one)
            axis.set(xticks=[], yticks=[])
            if mask is not None:
                outline(axis, mask)
        row[0].set_ylabel(name)
    for axis, text in zip(axes[0], titles, strict=True):
        title(axis, text, int(12 * side))
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
    mask=None,
):
    """Maps (H, W) side by side on one color scale with one color bar.

    scale: (low, high), else the smallest and largest of all. signed: around zero, two colors.
    image: shown before them. masks: edges drawn on them. mask: the object's edge on the image.
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
        if mask is not None:
            outline(axes[0], mask)
    color_map = "PuOr_r" if signed else "viridis"
    masks = masks or [None] * len(maps)
    for axis, one, text, mask in zip(axes[before:], maps, titles, masks, strict=True):
        drawn = axis.imshow(one, vmin=low, vmax=high, cmap=color_map)
        title(axis, text, int(12 * side))
        if mask is not None:
            outline(axis, mask)
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.8, pad=0.01)
    show(figure)


def map_rows(rows, titles, masks, label="probability", scale=(0, 1), caption="", side=1.6):
    """Rows of maps (H, W) on one color scale, each row with its label, each column with its mask.

    rows: {label of the row: one map for each column}. masks: outlined in their columns.
    """
    size = (side * len(titles) + 1, side * len(rows) + 0.8)
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=size, squeeze=False, layout="constrained"
    )
    for row, (name, line) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, one, mask in zip(row, line, masks, strict=True):
            drawn = axis.imshow(as_array(one), vmin=scale[0], vmax=scale[1])
            axis.set(xticks=[], yticks=[])
            outline(axis, mask)
    for axis, text in zip(axes[0], titles, strict=True):
        title(axis, text, int(14 * side))
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.8, pad=0.01)
    figure.supxlabel(caption, fontsize=8)
    show(figure)


def overlays(image, rows, labels, titles, label, limit, mask=None):
    """Rows of maps (h, w) laid over the image in gray, each row with its label, on one scale.

    A value of 1 or less leaves the image as it is; above 1 it is colored, in equal steps of the
    logarithm, up to `limit`. mask: the object's edge.
    """
    gray = 255 - (255 - np.asarray(image).mean(-1)) / 1.6
    height, width = gray.shape
    place = (-0.5, width - 0.5, height - 0.5, -0.5)
    colors = matplotlib.colors.LinearSegmentedColormap.from_list("", ["#D55E0000", "#D55E00"])
    scale = matplotlib.colors.LogNorm(1, limit, clip=True)
    size = (1.6 * len(titles) + 1.2, 1.6 * len(rows) + 0.3)
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=size, squeeze=False, layout="constrained"
    )
    for row, name, line in zip(axes, labels, rows, strict=True):
        for axis, one in zip(row, line, strict=True):
            axis.imshow(gray, cmap="gray", vmin=0, vmax=255)
            one = np.maximum(as_array(one), 1)
            drawn = axis.imshow(one, norm=scale, cmap=colors, extent=place)
            axis.set(xticks=[], yticks=[])
            if mask is not None:
                outline(axis, mask)
        row[0].set_ylabel(name)
    for axis, text in zip(axes[0], titles, strict=True):
        title(axis, text, 18)
    bar = figure.colorbar(drawn, ax=axes, label=label, shrink=0.8, pad=0.01, ticks=[1, limit])
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels(["1 or less", f"{limit} or more"])
    show(figure)


def tiles(titles, sides):
    """Maps before and after a zoom, as tiles: what belongs together has one shade and one number.

    sides: for each zoom the positions each way, before and after it.
    """
    figure = plt.figure(figsize=(9.4, 1.95), layout="constrained")
    parts = figure.subfigures(1, len(sides), wspace=0.08)
    for part, name, pair in zip(parts, titles, sides, strict=True):
        part.suptitle(name, fontsize=9)
        axes = part.subplots(1, 2)
        for axis, side in zip(axes, pair, strict=True):
            draw_tiles(axis, side, min(pair))
        axes[1].annotate("→", (-0.16, 0.42), xycoords="axes fraction", fontsize=14)
    show(figure)


def draw_tiles(axis, side, tiles_each_way):
    """A grid of side × side positions in tiles that are numbered from 1."""
    factor = side // tiles_each_way
    numbers = 1 + np.arange(tiles_each_way**2).reshape(tiles_each_way, tiles_each_way)
    numbers = numbers.repeat(factor, 0).repeat(factor, 1)
    axis.imshow(numbers, cmap="Blues", vmin=-1, vmax=2 * tiles_each_way**2)
    for y in range(side):
        for x in range(side):
            axis.text(x, y, numbers[y, x], ha="center", va="center")
    edges = np.arange(side + 1) - 0.5
    axis.set(xticks=edges, yticks=edges, xticklabels=[], yticklabels=[])
    axis.set_xlabel(f"{side} × {side}")
    axis.tick_params(length=0)
    axis.grid(color="white")


def stages(image, outlines, rows, titles):
    """Rows of maps over one image: without the Bridger, sentence A, sentence B, and A less B.

    rows: {label: (without, a, b)}, maps (h, w) on one scale a row; A less B has the same span.
    outlines: the objects (H, W) that A and B name. titles: of the three maps.
    """
    size = (8.8, 1.72 * len(rows) + 0.4)
    figure, grid_of_axes = plt.subplots(len(rows), 5, figsize=size, layout="constrained")
    height, width = image.shape[:2]
    extent = (0, width, height, 0)  # coarse maps lie over the image
    grid_of_axes[0, 0].imshow(image)
    outline(grid_of_axes[0, 0], outlines[0])
    outline(grid_of_axes[0, 0], outlines[1])
    for axis, text in zip(grid_of_axes[0], ("A and B", *titles, "A less B"), strict=True):
        title(axis, text, 22)
    for axes, (label, maps) in zip(grid_of_axes, rows.items(), strict=True):
        low = min(one.min() for one in maps)
        high = max(one.max() for one in maps)
        for axis, one in zip(axes[1:4], maps, strict=True):
            drawn = axis.imshow(one, vmin=low, vmax=high, extent=extent)
        _, a, b = maps
        span = high - low
        difference = axes[4].imshow(a - b, vmin=-span, vmax=span, extent=extent, cmap="PuOr_r")
        figure.colorbar(drawn, ax=axes[3], shrink=0.85)
        figure.colorbar(difference, ax=axes[4], shrink=0.85)
        axes[1].set_ylabel(label)
        axes[0].axis("off")
        for axis in axes[1:]:
            axis.set(xticks=[], yticks=[])
        for axis, mask in zip(axes[2:4], outlines, strict=True):
            outline(axis, mask)
        outline(axes[4], outlines[0])
        outline(axes[4], outlines[1])
    show(figure, PIL.Quantize.MEDIANCUT)


def intervals(rows, label, reference=0.0, colors=None, hollow=(), height=0.32):
    """A forest plot: {name: (mean, low, high)}, one line a row, and a line at the reference.

    colors: {name: color}. hollow: the names whose point is drawn empty.
    """
    figure, axis = plt.subplots(figsize=(6.4, height * len(rows) + 0.7), layout="constrained")
    axis.axvline(reference, color="0.6", linewidth=1)
    for y, (name, (mean, low, high)) in enumerate(rows.items()):
        color = COLORS[0] if colors is None else colors[name]
        axis.plot([low, high], [y, y], color=color)
        axis.plot(mean, y, "o", color=color, markerfacecolor="white" if name in hollow else color)
    axis.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=label)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    show(figure)


def pca_colors(features, count=None):
    """Feature maps (C, H, W) of one C → images (H, W, 3): their three main directions as colors.

    The same color means the same direction in every image of one call, and nothing between calls.
    count: the first so many maps fix directions and range (all of them unless given).
    """
    flat = [feature.flatten(1).mT for feature in features]  # (H·W, C) each
    together = torch.cat(flat[:count])
    mean = together.mean(0)
    _, _, directions = torch.linalg.svd(together - mean, full_matrices=False)
    shown = [(x - mean) @ directions[:3].mT for x in flat]  # (H·W, 3) each
    low = torch.cat(shown[:count]).quantile(0.01, dim=0)
    high = torch.cat(shown[:count]).quantile(0.99, dim=0)
    colors = []
    for x, feature in zip(shown, features, strict=True):
        x = ((x - low) / (high - low)).clamp(0, 1)
        colors.append(x.unflatten(0, feature.shape[1:]).numpy())
    return colors


def spotlight(image, mask):
    """The image (H, W, 3), 0..1: in color where mask (H, W), with a FOUND edge; else light gray."""
    image = np.asarray(image) / 255
    mask = np.asarray(mask, bool)
    gray = image.mean(-1, keepdims=True)
    pale = 0.58 + 0.16 * (gray + image)  # with a trace of color, else some things vanish
    shown = np.where(mask[..., None], image, pale)
    shown[around(mask)] = matplotlib.colors.to_rgb(FOUND)
    return shown


def around(mask):
    """The pixels outside a mask (H, W) that touch it: its edge, a line wide."""
    padded = np.pad(mask, 1)
    beside = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return beside & ~mask


def compare(images, titles, masks_by_row, targets=None, caption="", side=1.8):
    """One row of images for each model, in full color where it marks them; the targets outlined.

    masks_by_row: {label of the row: a mask (H, W) for each image}. targets: masks (H, W) or None.
    """
    count = len(masks_by_row)
    size = (side * len(images) + 0.3, side * count + 0.6)
    figure, axes = plt.subplots(
        count, len(images), figsize=size, squeeze=False, layout="constrained"
    )
    targets = targets or [None] * len(images)
    for row, (label, masks) in zip(axes, masks_by_row.items(), strict=True):
        row[0].set_ylabel(label)
        for axis, image, mask, target in zip(row, images, masks, targets, strict=True):
            axis.imshow(spotlight(image, mask))
            axis.set(xticks=[], yticks=[])
            if target is not None:
                outline(axis, target)
    for axis, text in zip(axes[0], titles, strict=True):
        title(axis, text, int(12 * side))
    figure.supxlabel(caption, fontsize=8)
    show(figure)


# -------------------------------------------------------------------------- something to play with
STAGES = ("stage 0", "stage 1", "stage 2", "decoder")
NO_WIDGETS = "A sentence box, two sliders and a picture: run this cell in JupyterLab to get them."


def fit_probes(model, dataset) -> dict[str, Ridge]:
    """For each of STAGES a linear map from one place's feature to "is the named object here?".

    Fitted on the dataset's first sentences, with the Bridger and without, both in one fit.
    """
    probes = {name: Ridge() for name in STAGES}
    with torch.inference_mode(), tapped(model) as taps:
        items = all_features(model, taps, dataset, len(dataset), torch.device("cpu"), False)
        for item, found in items:
            for (name, _), features in found.items():
                probes[name].add(features.flatten(1).T, place_labels(item, features))
    for probe in probes.values():
        probe.fit()
    return probes


def probe_map(probe, features) -> np.ndarray:
    """features (C, H, W) → the probe's answer at every place (H, W), near 1 where it says yes."""
    offset = (probe.target_total - probe.total @ probe.weight) / probe.count
    scores = probe.score(features.flatten(1).T) + offset
    return scores.view(features.shape[1:]).numpy()


@torch.inference_mode()
def look(model, image, sentence, strength) -> dict:
    """What the model makes of image (H, W, 3) and sentence at a strength of the Bridger.

    strength scales Δv and Δt of every bridge: at 0 nothing is added, 1 is the model as trained.
    stage 0 … decoder: features (C, h, w); mask: the probability of every pixel (H, W); and all
    that the model records, by its names (visual0.after, words, sentence …).
    """
    square, box = letterbox(image, model.size)
    tokens = tokenize([sentence], model.max_tokens)
    with tapped(model) as taps:
        set_strength(taps, strength, strength)
        model.recorded = {}
        try:
            maps = predict_squares(model, square[None], tokens)[0]
            seen = model.recorded
        finally:
            model.recorded = None
    for i in range(3):
        seen[f"stage {i}"] = seen[f"visual{i}.after"][0]
    seen["decoder"] = seen["features"][0]
    seen["mask"] = at_image_size(maps, box)[0]
    return seen


def with_and_without(probes, image, without, seen, stage, strength):
    """A figure: features and probe map of a stage, and the mask; above without, below with."""
    colors = pca_colors([without[stage], seen[stage]], count=1)  # the upper row keeps its colors
    figure = plt.Figure(figsize=(7.2, 5.2), dpi=120)
    # fixed places: a layout that is computed takes most of the time of a picture
    places = {"left": 0.04, "right": 0.99, "bottom": 0.12, "top": 0.94, "wspace": 0.04}
    rows = figure.subplots(2, 3, gridspec_kw={**places, "hspace": 0.04})
    names = ("without the Bridger", f"with, strength {strength:.2f}")
    for axes, name, one, color in zip(rows, names, (without, seen), colors, strict=True):
        axes[0].imshow(color)
        axes[0].set_ylabel(name)
        drawn = axes[1].imshow(probe_map(probes[stage], one[stage]), vmin=0, vmax=0.8)
        axes[2].imshow(spotlight(image, one["mask"] > THRESHOLD))
        for axis in axes:
            axis.set(xticks=[], yticks=[])
    rows[0, 0].set_title(f"{stage}: features")
    rows[0, 1].set_title(f"{stage}: probe, is it here?")
    rows[0, 2].set_title("mask")
    bar = figure.add_axes((0.38, 0.085, 0.28, 0.02))
    figure.colorbar(drawn, bar, orientation="horizontal", label="0 no … 1 yes")
    return figure


def every_stage(probes, image, mask, without, seen):
    """A figure: features and probe map of every stage, without the Bridger and with it.

    mask: the object (H, W), outlined on the probes' maps. Features have one code of colors a stage.
    """
    figure, axes = plt.subplots(4, len(STAGES), figsize=(7.2, 6.4), layout="constrained")
    height, width = image.shape[:2]
    extent = (0, width, height, 0)  # coarse maps lie over the image
    for column, stage in zip(axes.T, STAGES, strict=True):
        pair = (without[stage], seen[stage])
        title(column[0], f"{stage}: {pair[0].shape[-1]} × {pair[0].shape[-1]}")
        for axis, color in zip(column[:2], pca_colors(pair, count=1), strict=True):
            axis.imshow(color, extent=extent)
        for axis, one in zip(column[2:], pair, strict=True):
            found = probe_map(probes[stage], one)
            drawn = axis.imshow(found, vmin=0, vmax=0.8, extent=extent)
            outline(axis, mask)
    names = ("features, without", "features, with", "probe, without", "probe, with")
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes[2:], label="0 no … 1 yes", shrink=0.8, pad=0.01)
    show(figure)


class Player:
    """A sentence box, a choice of images, two sliders, and the picture that they ask for.

    choices: {name: (image (H, W, 3), a first sentence)}.
    """

    def __init__(self, model, probes, choices):
        import ipywidgets as widgets  # only this cell of the course needs it

        self.model = model
        self.probes = probes
        self.choices = dict(choices)
        first = next(iter(choices))
        wide = {"style": {"description_width": "150px"}, "layout": {"width": "600px"}}
        self.scene = widgets.Dropdown(options=list(choices), description="image", **wide)
        self.file = widgets.FileUpload(
            accept="image/*", description="a file of your own", layout={"width": "180px"}
        )
        self.sentence = widgets.Text(choices[first][1], description="sentence", **wide)
        self.strength = widgets.FloatSlider(
            1.0, min=0, max=1, step=0.05, description="strength of the Bridger", **wide
        )
        self.stage = widgets.SelectionSlider(options=STAGES, description="stage", **wide)
        self.message = widgets.Label()
        self.picture = widgets.Image(format="png", layout={"width": "760px"})
        self.box = widgets.VBox(
            [
                widgets.HBox([self.scene, self.file]),
                self.sentence,
                self.strength,
                self.stage,
                self.message,
                self.picture,
            ]
        )
        self.scene.observe(self.choose, "value")
        self.file.observe(self.upload, "value")
        for control in (self.sentence, self.strength, self.stage):
            control.observe(self.draw, "value")
        self.draw()

    def choose(self, change):
        """Another image: its own sentence, and a new picture."""
        self.sentence.value = self.choices[self.scene.value][1]
        self.draw()

    def upload(self, change):
        """A file of one's own becomes one more choice, at most 480 pixels wide and high."""
        for file in self.file.value:
            try:
                image = PIL.fromarray(as_image(PIL.open(io.BytesIO(file.content))))
            except (OSError, UserError) as error:
                self.message.value = f"{file.name} cannot be read: {error}"
                return
            image.thumbnail((480, 480))
            self.choices[file.name] = (np.array(image), self.sentence.value)
            self.scene.options = list(self.choices)
            self.scene.value = file.name

    def draw(self, change=None):
        """The picture for what the controls say."""
        sentence = self.sentence.value
        if is_blank(sentence):
            self.message.value = "Type a sentence."
            return
        image = self.choices[self.scene.value][0]
        strength = self.strength.value
        stage = self.stage.value
        without = look(self.model, image, sentence, 0)
        seen = look(self.model, image, sentence, strength)
        figure = with_and_without(self.probes, image, without, seen, stage, strength)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=100, pil_kwargs={"compress_level": 1})  # quick
        self.picture.value = buffer.getvalue()
        marked = [f"{np.mean(one['mask'] > THRESHOLD):.1%}" for one in (without, seen)]
        self.message.value = f"marked: {marked[0]} without the Bridger, {marked[1]} with it"


def play(model, probes, choices) -> Player:
    """Show a Player; where there are no widgets (a printed page), one line in its place."""
    player = Player(model, probes, choices)
    bundle = player.box._repr_mimebundle_()
    bundle["text/plain"] = NO_WIDGETS
    display(bundle, raw=True)
    return player
