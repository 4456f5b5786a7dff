"""Figures as PNG files: overlays, contact sheets, training curves, scores by group.

matplotlib is imported where it draws: it is slow to import, and most commands draw no such figure.
"""

import io
import json
import textwrap
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from utils.common import write_file

# Okabe and Ito's colors, which color-blind readers tell apart
COLORS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442"]
FIGURE_SIDE = 960  # pixels of an image in a figure, at most
DIGIT_COLUMNS = [*map(str, range(10)), "no digit", "nothing"]


def label(text, width) -> str:
    """A sentence for a figure: wrapped at `width`, at most 300 characters, all printable."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(text) > 300:
        text = text[:299] + "…"
    return textwrap.fill(text, width)


def png(figure, **options) -> bytes:
    """The figure as the bytes of a PNG. What matplotlib's font lacks, such as emoji, is a box."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()


def write_png(path, array):
    """Write uint8 (H, W) or (H, W, 3) as a PNG; bool (H, W) becomes 0 and 255."""
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    write_file(path, buffer.getvalue())


def shrink(values) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) → the same, or its averages where a side is over FIGURE_SIDE."""
    height, width = values.shape[:2]
    scale = FIGURE_SIDE / max(height, width)
    if scale >= 1:
        return values
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))


def shrink_mask(mask) -> np.ndarray:
    """bool (H, W) → float32 0..1 at `shrink`'s size: the share of each pixel that is inside."""
    return shrink(255 * mask.astype(np.uint8)).astype(np.float32) / 255


def overlay(image, masks, sentences) -> bytes:
    """The image with each mask in its own color and a legend below, as the bytes of a PNG.

    image: uint8 (H, W, 3); masks: one bool (H, W) per sentence. The longer side gets FIGURE_SIDE
    pixels. Drawn by Pillow, for `predict.py` would wait a second for matplotlib.
    """
    blended = shrink(image).astype(np.float32)
    entries = []  # of the legend
    for number, (mask, sentence) in enumerate(zip(masks, sentences, strict=True)):
        color = ImageColor.getrgb(COLORS[number % len(COLORS)])
        share = 0.55 * shrink_mask(mask)[..., None]
        blended = (1 - share) * blended + share * np.array(color, np.float32)
        text = label(sentence, 60)
        if not mask.any():
            text += " (nothing found)"
        entries.append((color, text))
    picture = Image.fromarray(blended.round().astype(np.uint8))
    picture = ImageOps.contain(picture, (FIGURE_SIDE, FIGURE_SIDE))

    sheet = add_legend(picture, entries)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=1)  # a fifth more bytes, a third of the time
    return buffer.getvalue()


def add_legend(picture, entries) -> Image.Image:
    """A white sheet with the picture at the top and below it each (color, text) of `entries`."""
    # matplotlib's font, without importing it: DejaVu Sans has accents, Greek and Cyrillic
    folder = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
    font = ImageFont.truetype(folder / "DejaVuSans.ttf", 15)
    measure = ImageDraw.Draw(picture)
    boxes = [measure.multiline_textbbox((54, 8), text, font) for _, text in entries]
    heights = [round(box[3]) for box in boxes]
    width = max(picture.width, *(round(box[2]) + 8 for box in boxes))
    sheet = Image.new("RGB", (width, picture.height + sum(heights) + 8), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    y = picture.height
    for (color, text), height in zip(entries, heights, strict=True):
        draw.rectangle((8, y + 8, 44, y + 22), fill=color)
        draw.multiline_text((54, y + 8), text, "black", font)
        y += height
    return sheet


def outline(axis, mask):
    """The edge of a true mask, white on black, to be seen on any color."""
    mask = shrink_mask(mask)
    # an outline needs two pixels each way, and something on either side of it
    if min(mask.shape) > 1 and mask.min() < 0.5 < mask.max():
        axis.contour(mask, [0.5], colors=["black"], linewidths=[3])
        axis.contour(mask, [0.5], colors=["white"], linewidths=[1.2])


def contact_sheet(samples, out):
    """Write a PNG: four images in a row, their objects outlined, their sentences below.

    samples: a sequence, of which one is asked for at a time, for photographs are large.
    """
    from matplotlib.figure import Figure

    rows = -(-len(samples) // 4)
    figure = Figure((13, 3.4 * rows), dpi=100)
    for number, sample in enumerate(samples, start=1):
        axis = figure.add_subplot(rows, 4, number)
        axis.imshow(shrink(sample.image))
        outline(axis, sample.mask)
        axis.text(
            0.5,
            -0.03,
            "\n".join(label(sentence[:44], 44) for sentence in sample.sentences[:4]),
            fontsize=8,
            ha="center",
            va="top",
            transform=axis.transAxes,
            parse_math=False,
        )
        axis.axis("off")
    write_file(out, png(figure, bbox_inches="tight"))


def draw_curves(out):
    """Write OUT/curves.png from OUT/log.jsonl: the loss and the val metrics after each epoch."""
    from matplotlib.figure import Figure

    text = Path(out, "log.jsonl").read_text(encoding="utf-8")
    epochs = {}  # by step: a resumed run may have logged an epoch twice
    for line in text.splitlines():
        epoch = json.loads(line)
        if "loss" in epoch:
            epochs[epoch["step"]] = epoch
    steps = list(epochs)
    epochs = list(epochs.values())

    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [epoch["loss"] for epoch in epochs], "o-", color=COLORS[5])
    left.set(xlabel="step", ylabel="text-to-pixel loss, mean of the epoch", ylim=(0, None))
    for key, color, marker in (("oIoU", 4, "o"), ("mIoU", 3, "s"), ("Pr@0.5", 2, "^")):
        values = [epoch["val"][key] for epoch in epochs]
        right.plot(steps, values, f"{marker}-", label=key, color=COLORS[color])
    right.set(xlabel="step", ylabel="val, percent", ylim=(0, 100))
    right.legend()
    write_file(Path(out, "curves.png"), png(figure, dpi=120))


def draw_pairs(samples, predictions, path):
    """Write a PNG: each sample's first sentence and outlined object above, what is found below.

    predictions: one bool (H, W) per sample.
    """
    from matplotlib.figure import Figure

    figure = Figure((2.6 * len(samples), 5.6), layout="constrained")
    axes = figure.subplots(2, len(samples), squeeze=False)
    for column, (sample, prediction) in enumerate(zip(samples, predictions, strict=True)):
        draw_image(axes[0, column], sample.image, sample.sentences[0])
        outline(axes[0, column], sample.mask)
        draw_image(axes[1, column], sample.image, "predicted")
        tint = np.ma.masked_equal(shrink_mask(prediction) > 0.5, False)
        axes[1, column].imshow(tint, cmap="spring", alpha=0.6, interpolation="nearest")
    write_file(path, png(figure, dpi=90))


def draw_image(axis, image, title):
    """Draw an image on a matplotlib axis, with a title above."""
    axis.imshow(shrink(image))
    axis.set_title(label(title, 32), fontsize=8, parse_math=False)
    axis.axis("off")


def draw_groups(by, groups, path):
    """Write a figure of evaluate.group_scores: mIoU per group, or how digits are confused."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4.5), layout="constrained")
    axis = figure.subplots()
    if by == "digits":
        draw_confusion(axis, groups)
    else:
        values = [scores["mIoU"] for scores in groups.values()]
        bars = axis.bar(list(groups), values, color=COLORS[5])
        counts = [f"{scores['sentences']:,}" for scores in groups.values()]
        axis.bar_label(bars, counts, fontsize=8)
        axis.set(xlabel=by, ylabel="mIoU, percent", ylim=(0, 105))
        axis.set(title="above the bars: sentences")
    write_file(path, png(figure, dpi=110))


def draw_confusion(axis, groups):
    """A row per digit asked for, a column per digit found, with the number of sentences."""
    counts = [[found.get(name, 0) for name in DIGIT_COLUMNS] for found in groups.values()]
    counts = np.array(counts)
    shares = counts / counts.sum(1, keepdims=True)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (y, x), count in np.ndenumerate(counts):
        if count:
            axis.text(x, y, count, ha="center", va="center", fontsize=8, color="orange")
    axis.set_xticks(range(len(DIGIT_COLUMNS)), DIGIT_COLUMNS, rotation=45)
    axis.set_yticks(range(len(groups)), list(groups))
    axis.set(xlabel="found", ylabel="asked for", title="sentences that name a digit")
