"""6. One image and some sentences → masks and an overlay, with evaluation's own steps.

    python predict.py runs/x/best.pt --image photo.jpg --text "the man in red" --out overlay.png
    python predict.py export runs/x/best.pt --out model.pt2  # to run elsewhere: docs/deploy.md

    from predict import load, segment
    mask = segment(load("runs/x/best.pt"), "photo.jpg", "the man in red")  # bool (H, W)

B images · H W the image's own height and width, once upright · S side of the square ·
K sentences · L tokens
"""

import functools
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoint import load_checkpoint
from data import Letterbox, letterbox, normalize, unletterbox
from evaluate import THRESHOLD, evaluation_mode, predict_probabilities
from fast import set_fast
from methods.export import check_export, export_bytes
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
from utils.images import is_image_name, read_image, read_image_bytes, read_pil
from utils.plots import draw_pairs, overlay, write_png
from utils.pool import worker_pool
from utils.tokenizer import count_truncated, is_blank, tokenize

BATCH_SIZE = 32  # sentences at a time
STDIN = "-"  # as --image
IMAGES_PER_WORKER = 16  # of a folder; for fewer, starting a process takes longer than it saves


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
    square, box = letterbox(as_image(image), model.size)
    tokens = tokenize(sentences, model.max_tokens)  # (K, L)
    maps = predict_squares(model, square[None], tokens)[0]
    return at_image_size(maps, box)


@torch.inference_mode()
def predict_squares(model, squares, tokens) -> torch.Tensor:
    """squares uint8 (B, 3, S, S), tokens (K, L) → probabilities (B, K, S, S).

    On the model's device. Each sentence is asked of each image, BATCH_SIZE pairs at a time.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    B = len(squares)
    K = len(tokens)
    images = normalize(squares.to(device))  # (B, 3, S, S)
    tokens = tokens.to(device)
    image_index = torch.arange(B).repeat_interleave(K)  # 0 0 0 1 1 1 …
    token_index = torch.arange(K).repeat(B)  # 0 1 2 0 1 2 …

    maps = []
    with evaluation_mode(model):
        for i, k in zip(image_index.split(BATCH_SIZE), token_index.split(BATCH_SIZE), strict=True):
            maps.append(predict_probabilities(model, images[i], tokens[k]))
    return torch.cat(maps).unflatten(0, (B, K))


def at_image_size(maps, box) -> np.ndarray:
    """Probabilities of the square (K, S, S) → of the image, float32 (K, H, W), 0..1."""
    return unletterbox(maps, box).clamp_(0, 1).cpu().numpy()


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
    # upper and lower case are one name on some disks
    stems = Counter(path.stem.casefold() for path in paths)
    names = {path.name.casefold() for path in paths}
    found = {}
    for path in paths:
        stem = path.stem.casefold()
        is_free = stems[stem] == 1 and stem not in names
        found[path.stem if is_free else path.name] = path
    return found


def shorten(names, count=5) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def output_paths(args) -> list[tuple]:
    """(image, overlay, mask, probability map) for each image; a path is None if not wanted.

    UserError, before any work, where a result cannot be written, or would replace the image or
    another result.
    """
    is_folder = args.image != STDIN and Path(args.image).is_dir()
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


@functools.cache
def stdin_bytes() -> bytes:
    """All of standard input, read once. UserError where nobody writes to it."""
    if sys.stdin.isatty():
        raise UserError("--image -: standard input is a terminal: pipe an image into this command")
    return sys.stdin.buffer.read()


def read_input(path) -> np.ndarray:
    """What --image names, a file or standard input → uint8 (H, W, 3)."""
    if path == STDIN:
        return read_image_bytes(stdin_bytes(), "standard input")
    return read_image(path)


def reading_error(path) -> UserError | None:
    """The error that reading an image raises, or None."""
    try:
        read_input(path)
    except UserError as error:
        return error


def predict_file(model, path, sentences, threshold, files):
    """Write one image's files and print what was found. Nothing is written before all is known."""
    image = read_input(path)
    maps = probabilities(model, image, sentences)
    print(write_results(path, image, maps, sentences, threshold, files))


def write_results(path, image, maps, sentences, threshold, files) -> str:
    """Write the files that are wanted of one image; return a line per sentence, what was found.

    maps: float32 (K, H, W); files: overlay, mask, probability map, each a path or None.
    """
    out, mask, probability = files
    masks = list(maps > threshold)
    drawn = overlay(image, masks, sentences)

    write_file(out, drawn)
    if mask:
        for file, values in zip(mask_paths(mask, len(sentences)), masks, strict=True):
            write_png(file, values)
    if probability:
        for file, values in zip(mask_paths(probability, len(sentences)), maps, strict=True):
            write_png(file, (255 * values).round().astype(np.uint8))
    lines = []
    for sentence, found, values in zip(sentences, masks, maps, strict=True):
        if found.any():
            text = f"{100 * found.mean():.1f} % of the image"
        else:
            highest = f"highest probability {values.max():.2f}, threshold {threshold}"
            text = f"nothing found ({highest}), the mask is empty"
        lines.append(f"{path}: {sentence!r}: {text}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- a folder
def read_square(path, size) -> np.ndarray:
    """In a worker: an image file as the model sees it, uint8 (3, S, S)."""
    square, _ = letterbox(read_image(path), size)
    return square.numpy()


def finish_file(path, maps, sentences, threshold, files) -> str:
    """In a worker: `write_results` of one image, from probabilities of the square (K, S, S)."""
    image = read_image(path)
    box = Letterbox(maps.shape[-1], image.shape[:2])
    maps = at_image_size(torch.from_numpy(maps), box)
    return write_results(path, image, maps, sentences, threshold, files)


def predict_folder(model, jobs, sentences, threshold, pool):
    """`predict_file` for many images: the model takes them in batches.

    Meanwhile the pool reads the next batch, and draws and writes the results of the last one.
    """
    tokens = tokenize(sentences, model.max_tokens)  # (K, L)
    count = max(1, BATCH_SIZE // len(sentences))
    batches = [jobs[i : i + count] for i in range(0, len(jobs), count)]

    def start_reading(batch):
        return [pool.submit(read_square, path, model.size) for path, *_ in batch]

    reading = start_reading(batches[0])
    writing = []
    for number, batch in enumerate(batches, start=1):
        squares = np.stack([future.result() for future in reading])  # (B, 3, S, S)
        if number < len(batches):
            reading = start_reading(batches[number])
        maps = predict_squares(model, torch.from_numpy(squares), tokens)
        maps = maps.cpu().numpy()  # (B, K, S, S)
        finished = writing
        writing = []
        for (path, *files), values in zip(batch, maps, strict=True):
            future = pool.submit(finish_file, path, values, sentences, threshold, files)
            writing.append(future)
        print_results(finished)
    print_results(writing)


def print_results(futures):
    for future in futures:
        print(future.result())


# ----------------------------------------------------------------------------------------- export
def export(args):
    """Write the checkpoint's model as a file that runs without this code."""
    check_export(args.out)
    model = load_checkpoint(args.checkpoint, args.weights, "cpu", args.words)
    content = export_bytes(model, args.out)
    write_file(args.out, content)
    size = model.size
    print(
        f"{args.out}: {len(content) / 1e6:.1f} MB, images float32 (pairs, 3, {size}, {size}) and "
        f"tokens int64 (pairs, {model.max_tokens}) → logits"
    )


# ------------------------------------------------------------------------------------- command line
class PredictParser(Parser):
    """The options of a prediction; those of an export where the first word is `export`."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        if list(args[:1]) == ["export"]:
            return export_parser().parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)


def add_model_options(parser):
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of train.py, or published")
    parser.add_argument(
        "--weights", metavar="FILE", help="of the frozen CLIP, where it is not in the cache"
    )
    parser.add_argument(
        "--words", type=integer(3, 77), metavar="N", help="tokens per sentence (the checkpoint's)"
    )


def export_parser():
    parser = Parser(
        prog="predict.py export", description="Write a model as a file that runs without this code."
    )
    add_model_options(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="model.pt2 (torch.export) or model.onnx"
    )
    parser.set_defaults(run=export)
    return parser


def predict_parser():
    parser = PredictParser(
        description="Segment what sentences refer to, in an image or a folder of them.",
        epilog="predict.py export --help: write the model as a file that runs without this code.",
    )
    # Model
    add_model_options(parser)
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"of the probability ({THRESHOLD})"
    )
    # Input
    parser.add_argument(
        "--image",
        required=True,
        metavar="FILE",
        help="an image; - for standard input; or a folder of images: then --out, --mask and "
        "--probability are folders too",
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
    parser.add_argument(
        "--out", metavar="FILE", help="the overlay (overlay.png; of a folder, overlays)"
    )
    parser.add_argument(
        "--mask", metavar="FILE", help="the mask, 0 and 255; mask_1.png … for several sentences"
    )
    parser.add_argument("--probability", metavar="FILE", help="the probabilities, 0 to 255")
    # Run
    parser.add_argument(
        "--workers",
        type=integer(0, 60),
        metavar="N",
        help="processes that read and draw the images of a folder (at most one per core)",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda", "mps"], help="where to run (the best available)"
    )
    parser.set_defaults(run=predict)
    return parser


def check_arguments(args):
    """UserError where a value makes no sense."""
    if any(is_blank(sentence) for sentence in args.text):
        raise UserError(f"--text {args.text}: no sentence may be empty")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: choose a probability, 0 to 1")


def predict(args):
    """Write the results of every image that --image names."""
    check_arguments(args)
    jobs = output_paths(args)
    workers = args.workers
    if workers is None:
        workers = min(os.cpu_count() or 1, len(jobs) // IMAGES_PER_WORKER)
    if len(jobs) == 1:
        workers = 0
    with worker_pool(workers) as pool:
        predict_jobs(args, jobs, pool)


def predict_jobs(args, jobs, pool):
    """Read every image once before anything is written, then predict those that can be read."""
    paths = [path for path, *_ in jobs]
    found = pool.map(reading_error, paths)
    errors = {path: error for path, error in zip(paths, found, strict=True) if error}
    if errors and (not args.keep_going or len(errors) == len(jobs)):
        raise next(iter(errors.values()))

    model = load(args.checkpoint, args.weights, args.device, args.words)
    truncated = count_truncated(args.text, model.max_tokens)
    if truncated:
        print(f"{truncated} of the sentences are longer than {model.max_tokens} tokens: cut")
    for error in errors.values():
        warn(error)
    good = [job for job in jobs if job[0] not in errors]
    if len(jobs) == 1:
        path, *files = good[0]
        predict_file(model, path, args.text, args.threshold, files)
    else:
        predict_folder(model, good, args.text, args.threshold, pool)
    if errors:
        print(f"{len(good)} of {len(jobs)} images, {len(errors)} skipped")


@command
def main(argv=None):
    args = predict_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
