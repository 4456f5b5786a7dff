"""On a GPU: do the claims that tests make without one hold there? A table for docs.

    python -m experiments.gpu_check                    RN101 at 416 pixels, random weights
    python -m experiments.gpu_check --device cpu       the tiny CLIP: tries the command itself

Each row is a claim of docs/speed.md or a target, what was found, and PASS or DIFFERS. A check that
fails is a row, too: the others still run. Images to load are JPEGs of 640 pixels, with noise in
them, so that they cost what photographs do.
"""

import contextlib
import io
import json
import math
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import train
from checkpoint import load_checkpoint, read_checkpoint
from data import RefDataset, TrainDataset, open_dataset, train_loader
from evaluate import evaluate
from experiments.benchmark import Bench, interleave, make_ladder
from fast import compile_if_possible, recompute_decoder, set_fast
from utils.common import (
    ROOT,
    Parser,
    UserError,
    command,
    default_workers,
    git_commit,
    integer,
    pick_device,
    pick_dtype,
)
from utils.images import uint8_mask

CHECKPOINT = ROOT / "weights" / "etris-tiny.pt"
PHOTO_SIDE = 640  # pixels of the JPEGs
OBJECTS = 128
CPU_OBJECTS = 8
GIB = 2**30
ERRORS = (RuntimeError, OSError, UserError, SystemExit)  # RuntimeError: with CUDA's and no memory


class Row(NamedTuple):
    """One line of the table. passed: None where nothing is wanted."""

    what: str
    found: str
    wanted: str = ""
    passed: bool | None = None

    def __str__(self):
        verdict = {None: "", True: "PASS", False: "DIFFERS"}[self.passed]
        return f"| {self.what} | {self.found} | {self.wanted} | {verdict} |"


class CheckBench(Bench):
    """A Bench with photographs to read."""

    def __init__(self, run_args, device, batch_size, seconds, folder):
        super().__init__(run_args, device, batch_size)
        self.seconds = seconds  # of each timing
        self.objects = OBJECTS if device.type == "cuda" else CPU_OBJECTS
        write_photos(folder, self.objects)
        self.photos = open_dataset(str(folder), "train")
        self.dtype, self.dtype_reason = pick_dtype(device, "auto")


def write_photos(folder, count):
    """A folder as users write it (docs/own_data.md), of drawn scenes with noise."""
    rng = np.random.default_rng(0)
    lines = []
    for i, scene in enumerate(open_dataset("scenes", "train", limit=count, side=PHOTO_SIDE)):
        noise = rng.integers(0, 40, scene.image.shape)
        image = np.clip(scene.image + noise, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.jpg")
        Image.fromarray(uint8_mask(scene.mask)).save(folder / f"{i}.png")
        record = {"image": f"{i}.jpg", "mask": f"{i}.png", "sentences": scene.sentences}
        lines.append(json.dumps(record) + "\n")
    (folder / "refs.jsonl").write_text("".join(lines), encoding="utf-8")


def rate_row(bench, what, value, wanted, unit) -> Row:
    """A number of things per second; only a GPU has to reach what is wanted."""
    passed = value >= wanted if bench.device.type == "cuda" else None
    return Row(what, f"{value:.0f} {unit}/s", f"≥ {wanted:.0f}", passed)


# ------------------------------------------------------------------------------------------ checks
def formats(bench) -> list[Row]:
    """The scores of the shipped checkpoint in the number format of --amp auto and in float32.

    On a CPU, where that is float32, in bf16.
    """
    half = torch.float16 if bench.dtype is torch.float16 else torch.bfloat16
    model = set_fast(load_checkpoint(CHECKPOINT, device=bench.device))
    dataset = open_dataset("scenes", "val", limit=bench.objects, side=model.size)
    scores = {}
    for name in (torch.float32, half):
        options = {"batch_size": 64, "dtype": name, "progress": False}
        scores[name] = evaluate(model, dataset, bench.device, **options)[0]["mIoU"]
    difference = abs(scores[torch.float32] - scores[half])
    found = f"{scores[half]:.2f} and {scores[torch.float32]:.2f}"
    what = f"mIoU in {'bf16' if half is torch.bfloat16 else 'fp16'} and in float32"
    return [
        Row("--amp auto", f"{str(bench.dtype)[6:]}: {bench.dtype_reason}"),
        Row(what, found, "0.5 apart at most", difference <= 0.5),
    ]


def deterministic(bench) -> list[Row]:
    """Two runs of five steps with --deterministic: the largest difference of a trained number."""
    args = bench.args
    options = ["--system", args.system, "--backbone", args.backbone, "--weights", args.weights]
    options += ["--device", bench.device.type, "--batch-size", "2", "--limit", "4"]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            out = Path(folder, name)
            train.main([*options, "--deterministic", "--steps", "5", "--out", str(out)])
            runs.append(read_checkpoint(out / "last.pt")["tuned"])
    torch.use_deterministic_algorithms(False)
    first, second = runs
    difference = max((first[name] - second[name]).abs().max().item() for name in first)
    return [Row("two --deterministic runs", f"{difference:.1e} apart", "0", difference == 0)]


def count_syncs(function) -> int:
    """How often `function` makes the processor wait for the GPU, as torch itself reports it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def syncs(bench) -> list[Row]:
    """How often a training step, whatever --accumulate, and a batch of evaluation wait."""
    if bench.device.type != "cuda":
        return []
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    rows = []
    for accumulate in (1, 4):
        more = (bench.batch, bench.optimizer, scaler, bench.dtype, accumulate)
        step = partial(train.train_step, bench.model, *more)
        step()  # warms up
        count = count_syncs(step)
        rows.append(Row(f"waits a step, --accumulate {accumulate}", str(count), "1", count == 1))
    measure = partial(evaluate, bench.model, bench.photos, bench.device, dtype=bench.dtype)
    sentences = measure(progress=False)[0]["sentences"]  # warms up
    batches = math.ceil(sentences / 32)
    count = count_syncs(partial(measure, progress=False))
    rows.append(Row("waits in evaluation", str(count), f"{batches} batches", count == batches))
    return rows


def speed(bench) -> list[Row]:
    """Images per second of a training step: plain, fast and compiled; sentences in evaluation."""
    ladder = make_ladder(bench.model, bench.device, compiled=True)
    names = ["plain", "fast"]
    steps = {name: partial(bench.step, ladder[name]) for name in names}
    rates = {}
    for name, row in interleave(steps, bench.seconds).items():
        rates[name] = bench.batch_size / row["seconds"]
    rows = [Row("a step, plain", f"{rates['plain']:.0f} images/s")]
    rows.append(rate_row(bench, "a step, fast", rates["fast"], 2 * rates["plain"], "images"))
    bench.apply(ladder["fast"])
    if bench.device.type == "cuda":
        rows.append(compiled_speed(bench, ladder["fast + compile"]))
    return rows


def compiled_speed(bench, options) -> Row:
    """The same with --compile."""
    if compile_if_possible(bench.model, bench.device) is bench.model:
        return Row("a step, --compile", "no working compiler")
    [row] = interleave({"compile": partial(bench.step, options)}, bench.seconds).values()
    return Row("a step, --compile", f"{bench.batch_size / row['seconds']:.0f} images/s")


def evaluation(bench) -> list[Row]:
    """Sentences per second with evaluate.py's defaults, loading processes and their start too."""
    dataset = RefDataset("photos", "train", bench.photos.samples * 10)
    options = {"dtype": bench.dtype, "progress": False, "workers": default_workers(bench.device)}
    evaluate(bench.model, dataset, bench.device, limit=2, **options)  # warms up
    start = bench.now()
    result, _ = evaluate(bench.model, dataset, bench.device, **options)
    rate = result["sentences"] / (bench.now() - start)
    return [rate_row(bench, "evaluation", rate, 600, "sentences")]


def loading(bench) -> list[Row]:
    """Images per second that the default workers deliver, and the size of a batch of them."""
    dataset = RefDataset("photos", "train", bench.photos.samples * 20)
    samples = TrainDataset(dataset, bench.args.size, bench.args.words)
    workers = default_workers(bench.device)
    loader = iter(train_loader(samples, bench.batch_size, 0, 0, workers, bench.device))
    for _ in range(2 * workers + 1):  # what the workers have loaded ahead
        batch = next(loader)
    start = time.perf_counter()
    images = sum(len(batch["image"]) for batch in loader)
    rate = images / (time.perf_counter() - start)
    megabytes = sum(x.nbytes for x in batch.values() if isinstance(x, torch.Tensor)) / 1e6
    size = Row("a batch in shared memory", f"{megabytes:.1f} MB", "≤ 30 MB", megabytes <= 30)
    return [rate_row(bench, f"loading, {workers} workers", rate, 400, "images"), size]


def memory(bench) -> list[Row]:
    """Peaks of a step: allocated by torch, weights and Adam included; and reserved by it."""
    ladder = make_ladder(bench.model, bench.device)
    peaks = {name: bench.memory(ladder[name]) / 1024 for name in ("plain", "fast")}
    found = f"{peaks['fast']:.2f} GiB"
    rows = [
        Row("allocated, plain", f"{peaks['plain']:.2f} GiB"),
        Row("allocated, fast", found, "≤ 7 GiB", peaks["fast"] <= 7),
    ]
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        bench.memory(ladder["fast"])
        rows.append(Row("reserved, fast", f"{torch.cuda.max_memory_reserved() / GIB:.2f} GiB"))
    recompute_decoder(bench.model)
    share = bench.memory(ladder["fast"]) / 1024 / peaks["plain"]
    passed = share <= 0.5 if bench.device.type == "cuda" else None  # of plain in half precision
    rows.append(Row("allocated, --recompute", f"{share:.2f} of plain", "≤ 0.5", passed))
    return rows


def fp16(bench, steps=20) -> list[Row]:
    """Steps that the real scaler skips, from its usual first scale on."""
    scaler = torch.amp.GradScaler(bench.device.type)
    skipped = 0
    for _ in range(steps):
        before = scaler.get_scale()
        loss = train.train_step(bench.model, bench.batch, bench.optimizer, scaler, torch.float16)
        skipped += scaler.get_scale() < before
    passed = math.isfinite(loss) and skipped < steps
    return [Row("--amp fp16", f"{skipped} of {steps} steps skipped", "not all", passed)]


def run_check(check, bench) -> list[Row]:
    """The rows of a check; what it raises is a row."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return check(bench)
    except ERRORS as error:
        reason = " ".join(str(error).split())[:100]
        return [Row(check.__name__, f"{type(error).__name__}: {reason}", "", False)]


CHECKS = (formats, syncs, speed, evaluation, loading, fp16, memory, deterministic)


# ------------------------------------------------------------------------------------ command line
def arguments(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command (cuda)")
    parser.add_argument("--backbone", help="of ETRIS (RN101; tiny on a CPU)")
    parser.add_argument("--weights", default="random", help="of the frozen backbone (random)")
    parser.add_argument("--batch-size", type=integer(), help="objects per step (preset)")
    parser.add_argument("--seconds", type=integer(0), default=30, help="of each timing (30)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU on this machine: --device cpu tries the command itself")
    if args.backbone is None:
        args.backbone = "RN101" if args.device == "cuda" else "tiny"
    return args


@command
def main(argv=None):
    args = arguments(argv)
    device, _ = pick_device(args.device)
    run_args = train.arguments(["--backbone", args.backbone, "--weights", args.weights])
    batch_size = args.batch_size or run_args.batch_size
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    title = f"{args.backbone}, {run_args.size} pixels, {batch_size} objects a step"
    print(f"{name}, torch {torch.__version__}, commit {git_commit()}: {title}\n")
    print("| check | found | wanted | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bench = CheckBench(run_args, device, batch_size, args.seconds, Path(folder))
        for check in CHECKS:
            for row in run_check(check, bench):
                print(row, flush=True)


if __name__ == "__main__":
    main()
