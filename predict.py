"""6. One picture, some sentences → masks and an overlay, with evaluation's own steps before and after the model.

    python predict.py runs/x/best.pt --image photo.jpg --text "the man in red" --out overlay.png --mask mask.png

    from predict import load, segment
    mask = segment(load("runs/x/best.pt"), "photo.jpg", "the man in red")      # bool (H, W)

H W the picture's own height and width, once upright · S the side of the model's square · K sentences
"""

import io
import json
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from clip_model import is_blank, tokenize
from command import Parser, UserError, command, integer
from data import count_cut, letterbox, read_picture, to_rgb, unletterbox
from etris import set_fast
from evaluate import THRESHOLD, check_writable, predict_probabilities, tell, write_file, write_picture
from official import load_checkpoint, pick_device

# Okabe and Ito's colours, told apart by colour-blind eyes too
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442"]


def load(checkpoint, weights=None, device=None, words=None):
    """A checkpoint file, this project's or a published one -> a fast model for `segment`, on the best device there is.

    weights: the frozen CLIP's file, where it is not in the cache; words: tokens a sentence is cut at (the checkpoint's;
    a published one: 17). UserError says what is missing and the ways out.
    """
    return set_fast(load_checkpoint(checkpoint, weights, pick_device(device)[0], words))


def segment(model, image, text, threshold=THRESHOLD):
    """Where the picture shows what the sentence names: bool (H, W); a list of sentences gives a list of masks.

    image: a path, a PIL image, or uint8 (H, W), (H, W, 3) or (H, W, 4). EXIF turns it, and the mask with it.
    """
    if isinstance(text, str):
        return segment(model, image, [text], threshold)[0]
    return list(probabilities(model, image, text) > threshold)


@torch.inference_mode()
def probabilities(model, image, sentences) -> np.ndarray:
    """float32 (K, H, W): how sure the model is of every pixel, for each of K sentences; 0..1."""
    if isinstance(sentences, str) or not len(sentences) or any(map(is_blank, sentences)):
        raise UserError(f"{sentences!r}: give a list of sentences, none of them empty")
    square, box = letterbox(as_picture(image), model.size)
    device = next((parameter.device for parameter in model.parameters()), "cpu")
    was_training = model.training
    model.eval()
    try:
        tokens, image = tokenize(list(sentences), model.words).to(device), square[None].to(device)
        maps = [predict_probabilities(model, image, t, t.new_zeros(len(t))) for t in tokens.split(32)]
    finally:
        model.train(was_training)
    return unletterbox(torch.cat(maps), box).clamp(0, 1).cpu().numpy()


def as_picture(image) -> np.ndarray:
    """A path, PIL image or uint8 array -> uint8 (H, W, 3), upright."""
    if isinstance(image, str | Path):
        return read_picture(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in [(), (3,), (4,)] or image.ndim < 2 or not image.size:
            raise UserError(f"an array of {image.dtype} {image.shape}: give uint8 (H, W), (H, W, 3) or (H, W, 4)")
        image = Image.fromarray(image)
    return to_rgb(ImageOps.exif_transpose(image))


def label(sentence, width) -> str:
    """A sentence as figures show it: in lines of `width`, at most 300 letters, none that cannot be drawn."""
    letters = "".join(letter if letter.isprintable() else " " for letter in sentence)
    return textwrap.fill(letters if len(letters) <= 300 else letters[:299] + "…", width)


def png(figure, **options) -> bytes:
    """The figure as a PNG's bytes; what matplotlib's font lacks, emoji and far scripts, is a box, without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer := io.BytesIO(), format="png", **options)
    return buffer.getvalue()


def overlay(picture, masks, sentences) -> bytes:
    """The picture with every mask in a colour of its own and a legend below, as the bytes of a PNG."""
    from matplotlib.colors import to_rgb as rgb  # here, for it is slow to import and `segment` does without
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown, handles = picture.astype(float) / 255, []
    for number, (mask, sentence) in enumerate(zip(masks, sentences, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        shown[mask] = 0.45 * shown[mask] + 0.55 * np.array(rgb(colour))
        handles.append(Patch(color=colour, label=label(sentence, 60) + ("" if mask.any() else " (nothing found)")))
    height, width = (side / max(picture.shape[:2]) * 8 for side in picture.shape[:2])
    axis = (figure := Figure((max(width, 1), max(height, 1)), dpi=120)).add_axes((0, 0, 1, 1))
    axis.imshow(shown)
    axis.axis("off")
    legend = axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return png(figure, bbox_inches="tight")


def contact_sheet(items, out):
    """Pictures with their object outlined and their sentences below, four in a row, as one PNG."""
    from matplotlib.figure import Figure  # here, for only this needs it and it is slow to import

    figure = Figure((13, 3.4 * -(-len(items) // 4)), dpi=100)
    for place, item in enumerate(items, 1):
        axis = figure.add_subplot(-(-len(items) // 4), 4, place)
        axis.imshow(item.picture)
        axis.contour(item.mask, [0.5], colors=["black"], linewidths=[3])  # twice, to be seen on any colour
        axis.contour(item.mask, [0.5], colors=["white"], linewidths=[1])
        lines = "\n".join(label(sentence[:44], 44) for sentence in item.sentences[:4])
        axis.text(0.5, -0.03, lines, fontsize=8, ha="center", va="top", transform=axis.transAxes, parse_math=False)
        axis.axis("off")
    write_file(out, png(figure, bbox_inches="tight"))


def draw_predictions(model, source, path, count=6, threshold=THRESHOLD):
    """The first objects of a source, first sentence each: what is meant above, what the model finds below."""
    from matplotlib.figure import Figure

    items = [source[i] for i in range(min(count, len(source)))]
    figure = Figure((2.6 * len(items), 5.6), layout="constrained")
    for above, below, item in zip(*figure.subplots(2, len(items), squeeze=False), items, strict=True):
        found = probabilities(model, item.picture, item.sentences[:1])[0] > threshold
        for axis, mask, title in ((above, item.mask, item.sentences[0]), (below, found, "predicted")):
            axis.imshow(item.picture)
            axis.imshow(np.ma.masked_equal(mask, False), cmap="spring", alpha=0.6, interpolation="nearest")
            axis.set_title(label(title, 32), fontsize=8, parse_math=False)
            axis.axis("off")
    write_file(path, png(figure, dpi=90))


def draw_curves(out):
    """OUT/curves.png: the loss and val's metrics after each epoch, read back from OUT/log.jsonl."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    lines = list({line["step"]: line for line in lines if "loss" in line}.values())  # a killed epoch's is there twice
    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["loss"] for line in lines], "o-", color=COLOURS[5])
    left.set(xlabel="step", ylabel="text-to-pixel loss, mean of the epoch", ylim=(0, None))
    for key, colour, marker in zip(("oIoU", "mIoU", "Pr@0.5"), COLOURS[4:1:-1], "os^", strict=True):
        right.plot(steps, [line["val"][key] for line in lines], marker + "-", label=key, color=colour)
    right.set(xlabel="step", ylabel="val, percent", ylim=(0, 100))
    right.legend()
    write_file(Path(out, "curves.png"), png(figure, dpi=120))


def numbered(path, count) -> list[Path]:
    """mask.png for one sentence; mask_1.png, mask_2.png … for several."""
    path = Path(path)
    return [path] if count == 1 else [path.with_stem(f"{path.stem}_{k}") for k in range(1, count + 1)]


def pictures_in(folder) -> dict[str, Path]:
    """Every picture of a folder, under the name its results get: without ending, but where two would be the same."""
    endings = set(Image.registered_extensions())
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in endings)
    if not paths:
        raise UserError(f"{folder} holds no picture")
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else path.name: path for path in paths}


def predict_file(model, path, sentences, threshold, out, mask=None, probability=None):
    """One picture's files; what was found goes to the screen. All is computed before anything is written."""
    picture = read_picture(path)
    maps = probabilities(model, picture, sentences)
    found = list(maps > threshold)
    drawn = overlay(picture, found, sentences)
    write_file(out, drawn)
    for k, sentence in enumerate(sentences):
        if mask:
            write_picture(numbered(mask, len(sentences))[k], found[k])
        if probability:
            write_picture(numbered(probability, len(sentences))[k], (255 * maps[k]).round().astype(np.uint8))
        share = f"{100 * found[k].mean():.1f} % of the picture"
        nothing = f"nothing found (highest probability {maps[k].max():.2f}, threshold {threshold}), the mask is empty"
        print(f"{path}: {sentence!r}: {share if found[k].any() else nothing}")


def plan(args) -> list[tuple]:
    """(picture, overlay, mask, probability map) for each picture: --image names one or, with folders to write, many."""
    many = Path(args.image).is_dir()
    wanted, taken = [args.out or ("overlays" if many else "overlay.png"), args.mask, args.probability], {args.image}
    for name in filter(None, wanted):
        if not many and Path(name).suffix.lower() != ".png":
            raise UserError(f"{name}: results are written as PNG, name it so")
        if Path(name).resolve() in {Path(other).resolve() for other in taken}:
            raise UserError(f"{name}: would be written over: give --image, --out, --mask and --probability other names")
        check_writable(name, folder=many)
        taken.add(name)
    if not many:
        return [(args.image, *wanted)]
    pictures = pictures_in(args.image).items()
    return [(path, *(folder and Path(folder, f"{name}.png") for folder in wanted)) for name, path in pictures]


def bad_picture(path):
    """What is wrong with it, or None."""
    try:
        read_picture(path)
    except UserError as error:
        return error


@command
def main(argv=None):
    parser = Parser(description="Segment what sentences name in a picture, or in a folder of them.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of this project, or one that ETRIS' authors published")
    add("--image", required=True, metavar="FILE", help="a picture, or a folder; then --out, --mask … are folders too")
    add("--text", required=True, action="append", metavar="SENTENCE", help="again for more")
    add("--out", metavar="FILE", help="the overlay (overlay.png)")
    add("--mask", metavar="FILE", help="the mask, 0 and 255; mask_1.png, mask_2.png … for several sentences")
    add("--probability", metavar="FILE", help="the probabilities, 0 to 255")
    add("--threshold", type=float, default=THRESHOLD, help=f"of the probability ({THRESHOLD})")
    add("--keep-going", action="store_true", help="skip pictures of a folder that cannot be read: said and counted")
    add("--weights", metavar="FILE", help="of the frozen CLIP, where it is not in the cache")
    add("--words", type=integer(3, 77), metavar="N", help="tokens a sentence has at most (the checkpoint's)")
    add("--device", choices=["cpu", "cuda", "mps"])
    args = parser.parse_args(argv)
    if any(map(is_blank, args.text)) or not 0 <= args.threshold <= 1:
        raise UserError(f"--text {args.text} --threshold {args.threshold}: no sentence may be empty; 0 to 1")
    todo = plan(args)
    bad = {path: error for path, *_ in todo if (error := bad_picture(path))}  # said before anything is written
    if bad and not (args.keep_going and len(bad) < len(todo)):
        raise next(iter(bad.values()))
    model = load(args.checkpoint, args.weights, args.device, args.words)
    if cut := count_cut(args.text, model.words):
        print(f"{cut} of the sentences are longer than {model.words} tokens, the end is cut")
    for path, *files in todo:
        if path in bad:
            tell(bad[path])
        else:
            predict_file(model, path, args.text, args.threshold, *files)
    if bad:
        print(f"{len(todo) - len(bad)} of {len(todo)} pictures, {len(bad)} skipped")


if __name__ == "__main__":
    main()
