"""Draw docs/figures/found.png: what the shipped model finds in the first test scenes.

    python -m docs.draw_found

Left the image, right what was found: in color, with a magenta edge. Above the sentence, below IoU.
The scenes are the first six of the test split with their first sentences, not a choice.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluate import intersection_union, iou
from predict import load, segment
from toy.scenes import draw_scene
from utils.common import ROOT, write_file
from utils.plots import png

FIGURE = Path(__file__).parent / "figures" / "found.png"
CHECKPOINT = ROOT / "weights" / "etris-tiny.pt"
COUNT = 6
COLUMNS = 3


def spotlight(image, mask):
    """The image, pale outside the mask: uint8 (H, W, 3)."""
    gray = image.mean(axis=2, keepdims=True)
    pale = 148 + 0.16 * (image + gray)
    return np.where(mask[:, :, None], image, pale).astype(np.uint8)


def draw_pair(left, right, scene, mask, score):
    """The scene on the axis `left`, what was found on the axis `right`."""
    left.imshow(scene.image)
    right.imshow(spotlight(scene.image, mask))
    if mask.any():
        right.contour(mask, [0.5], colors=["#C2127F"], linewidths=[1.2])
    left.set_title(f"“{scene.sentences[0]}”", fontsize=10, loc="left")
    right.set_xlabel(f"IoU {score:.2f}", fontsize=10)
    for axis in (left, right):
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)


def main():
    model = load(CHECKPOINT, device="cpu")
    figure = Figure((10.5, 2 * COUNT / COLUMNS * 1.08), layout="constrained", facecolor="white")
    groups = figure.subfigures(COUNT // COLUMNS, COLUMNS, wspace=0.03)
    for number, group in enumerate(groups.flat):
        scene = draw_scene("scenes", "test", number)
        mask = segment(model, scene.image, scene.sentences[0])
        intersection, union = intersection_union(mask, scene.mask)
        left, right = group.subplots(1, 2)
        draw_pair(left, right, scene, mask, float(iou(intersection, union)))
    write_file(FIGURE, png(figure, dpi=96))


if __name__ == "__main__":
    main()
