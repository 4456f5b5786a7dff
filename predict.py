"""6. One image and some sentences → masks and an overlay, with evaluation's own steps.

    python predict.py runs/x/best.pt --image photo.jpg --text "the man in red" --out overlay.png

    from predict import load, segment
    mask = segment(load("runs/x/best.pt"), "photo.jpg", "the man in red")  # bool (H, W)

H W the image's own height and width, once upright · S side of the square · K sentences
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoint import load_checkpoint
from data import letterbox, normalize, unletterbox
from evaluate import THRESHOLD, predict_probabilities
from fast import set_fast
from utils.common import (
    Parser,
    UserError,
    check_writable,
    command,
    integer,
    pick_device,
    warn,
    write_file,
)
from utils.images import is_image_name, read_image, read_pil
from utils.plots import draw_pairs, overlay, write_png
from utils.tokenizer import count_truncated, is_blank, tokenize


# ------------------------------------------------------------------------------------ from Python
def load(checkpoint, weights=None, device=None, max_tokens=None):
    """A checkpoint, this project's or a published one → a model for `segment`, on the best device.

    weights: the frozen CLIP's file, where it is not in the cache; max_tokens: where a sentence is
    cut (the checkpoint's own; 17 for a published one). UserError says what is missing.
    """
    device, _ = pick_device(device)
    return set_fast(load_checkpoint(checkpoint, weights, device, max_tokens))


def segment(model, image, text, threshold=THRESHOLD):
    """Segment `image` by a referring expression → bool (H, W); a list of them → a list of masks.

    image: a path, a PIL image, or uint8 (H, W), (H, W, 3) or (H, W, 4). EXIF turns it and the mask.
    """
    if isinstance(text, str):
        return segment(model, image, [text], threshold)[0]
    return list(probabilities(model, image, text) > threshold)


@torch.inference_mode()
def probabilities(model, image, sentences) -> np.ndarray:
    """The probability of every pixel, for each of K sentences: float32 (K, H, W), 0..1."""
    empty = isinstance(sentences, str) or len(sentences) == 0
    if empty or any(is_blank(sentence) for sentence in sentences):
        raise UserError(f"{sentences!r}: give a list of sentences, none of them empty")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    square, box = letterbox(as_image(image), model.size)
    images = normalize(square[None].to(device))  # (1, 3, S, S)
    tokens = tokenize(sentences, model.max_tokens).to(device)  # (K, L)

    was_training = model.training
    model.eval()
    try:
        maps = []
        for some in tokens.split(32):
            repeated = images.expand(len(some), -1, -1, -1)
            maps.append(predict_probabilities(model, repeated, some))
    finally:
        model.train(was_training)
    maps = unletterbox(torch.cat(maps), box)  # (K, H, W)
    return maps.clamp_(0, 1).cpu().numpy()


def as_image(image) -> np.ndarray:
    """A path, PIL image or uint8 array → uint8 (H, W, 3), upright."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, np.ndarray):
        has_shape = image.ndim >= 2 and image.shape[2:] in [(), (3,), (4,)] and image.size > 0
        if image.dtype != np.uint8 or not has_shape:
            wanted = "give uint8 (H, W), (H, W, 3) or (H, W, 4)"
            raise UserError(f"an array of {image.dtype} {image.shape}: {wanted}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"{type(image).__name__}: give a path, a PIL image or a uint8 array")
    return read_pil(image)


def draw_predictions(model, dataset, path, count=6, threshold=THRESHOLD):
    """Write a figure of the first objects: what their first sentence means, what is predicted."""
    samples = [dataset[i] for i in range(min(count, len(dataset)))]
    masks = [segment(model, sample.image, sample.sentences[0], threshold) for sample in samples]
    draw_pairs(samples, masks, path)


# ---------------------------------------------------------------------------------------- files
def mask_paths(path, count) -> list[Path]:
    """mask.png for one sentence; mask_1.png, mask_2.png … for several."""
    path = Path(path)
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}_{k}") for k in range(1, count + 1)]


def images_in(folder) -> dict[str, Path]:
    """{name of its results: path} for every image of a folder; what is left out is said.

    The name is the file's without its ending, unless two files would get the same.
    """
    entries = sorted(Path(folder).iterdir())
    files = [path for path in entries if not path.is_dir()]
    paths = [path for path in files if is_image_name(path)]
    others = [path.name for path in files if not is_image_name(path)]
    folders = [path.name for path in entries if path.is_dir()]
    if others:
        count = f"{len(others)} of {len(files)} files are no images that can be read here"
        others = f"{count}: {shorten(others)}"
    if not paths:
        save = f". {others}: save photographs as JPEG or PNG" if others else ""
        raise UserError(f"{folder} holds no image{save}")
    if others:
        print(f"{folder}: {others}")
    if folders:
        print(f"{folder}: folders inside are not looked into: {shorten(folders)}")
    stems = [path.stem for path in paths]
    return {path.stem if stems.count(path.stem) == 1 else path.name: path for path in paths}


def shorten(names, count=5) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def output_paths(args) -> list[tuple]:
    """(image, overlay, mask, probability map) for each image; a path is None if not wanted.

    UserError, before any work, where a result cannot be written or would replace another file.
    """
    is_folder = Path(args.image).is_dir()
    overlay_path = args.out or ("overlays" if is_folder else "overlay.png")
    wanted = [overlay_path, args.mask, args.probability]
    taken = [Path(args.image).resolve()]
    for path in wanted:
        if not path:
            continue
        if not is_folder and Path(path).suffix.lower() != ".png":
            raise UserError(f"{path}: results are PNG files, name it so")
        if Path(path).resolve() in taken:
            names = "--image, --out, --mask and --probability"
            raise UserError(f"{path}: would be written over: give {names} other names")
        check_writable(path, folder=is_folder)
        taken.append(Path(path).resolve())
    if not is_folder:
        return [(args.image, *wanted)]
    rows = []
    for name, image in images_in(args.image).items():
        files = [Path(folder, f"{name}.png") if folder else None for folder in wanted]
        rows.append((image, *files))
    return rows


def reading_error(path) -> UserError | None:
    """The error that reading an image raises, or None."""
    try:
        read_image(path)
    except UserError as error:
        return error


def predict_file(model, path, sentences, threshold, out, mask=None, probability=None):
    """Write one image's files and print what was found. Nothing is written before all is known."""
    image = read_image(path)
    maps = probabilities(model, image, sentences)
    masks = list(maps > threshold)
    drawn = overlay(image, masks, sentences)

    write_file(out, drawn)
    if mask:
        for file, values in zip(mask_paths(mask, len(sentences)), masks, strict=True):
            write_png(file, values)
    if probability:
        for file, values in zip(mask_paths(probability, len(sentences)), maps, strict=True):
            write_png(file, (255 * values).round().astype(np.uint8))
    for sentence, found, values in zip(sentences, masks, maps, strict=True):
        if found.any():
            text = f"{100 * found.mean():.1f} % of the image"
        else:
            highest = f"highest probability {values.max():.2f}, threshold {threshold}"
            text = f"nothing found ({highest}), the mask is empty"
        print(f"{path}: {sentence!r}: {text}")


# ------------------------------------------------------------------------------------- command line
def arguments(argv=None):
    parser = Parser(description="Segment what sentences refer to, in an image or a folder of them.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of train.py, or published")
    # Input
    parser.add_argument(
        "--image",
        required=True,
        metavar="FILE",
        help="an image, or a folder of them; then --out, --mask and --probability are folders too",
    )
    parser.add_argument(
        "--text",
        required=True,
        action="append",
        metavar="SENTENCE",
        help="a referring expression; repeat it for more",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="skip images of a folder that cannot be read"
    )
    # Output
    parser.add_argument("--out", metavar="FILE", help="the overlay (overlay.png)")
    parser.add_argument(
        "--mask", metavar="FILE", help="the mask, 0 and 255; mask_1.png … for several sentences"
    )
    parser.add_argument("--probability", metavar="FILE", help="the probabilities, 0 to 255")
    # Model
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"of the probability ({THRESHOLD})"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="of the frozen CLIP, where it is not in the cache"
    )
    parser.add_argument(
        "--words", type=integer(3, 77), metavar="N", help="tokens per sentence (the checkpoint's)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda", "mps"], help="where to run (the best available)"
    )
    args = parser.parse_args(argv)

    if any(is_blank(sentence) for sentence in args.text):
        raise UserError(f"--text {args.text}: no sentence may be empty")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: choose a probability, 0 to 1")
    return args


@command
def main(argv=None):
    args = arguments(argv)
    jobs = output_paths(args)
    errors = {}  # by image; known before anything is written
    for path, *_ in jobs:
        error = reading_error(path)
        if error:
            errors[path] = error
    if errors and (not args.keep_going or len(errors) == len(jobs)):
        raise next(iter(errors.values()))

    model = load(args.checkpoint, args.weights, args.device, args.words)
    truncated = count_truncated(args.text, model.max_tokens)
    if truncated:
        print(f"{truncated} of the sentences are longer than {model.max_tokens} tokens: cut")
    for path, *files in jobs:
        if path in errors:
            warn(errors[path])
        else:
            predict_file(model, path, args.text, args.threshold, *files)
    if errors:
        print(f"{len(jobs) - len(errors)} of {len(jobs)} images, {len(errors)} skipped")


if __name__ == "__main__":
    main()
