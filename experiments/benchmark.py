"""Seconds and memory: the plain path against the fast one, on the device there is.

    python -m experiments.benchmark --quick --json rows.json         minutes on two cores
    python -m experiments.benchmark --backbone RN101 --device cuda   one backbone

Plain: the original's modules and number format (fp16 on a GPU). Fast: train.py's. Variants take
turns; numbers are medians. Adam's rate is 0: all steps are alike.
"""

import gc
import json
import os
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import train
from data import RefDataset, TrainDataset, open_dataset, to_device, train_loader
from evaluate import evaluate
from fast import FAST, FOLDED, set_fast
from utils.common import Parser, command, integer, pick_device, pick_dtype, provenance, write_file
from utils.tokenizer import tokenize

FORMAT = "{row:<24}{seconds:12.4g} s{speedup:9.2f} ×{memory_mb:9.0f} MB"
os.environ.update(KINETO_LOG_LEVEL="99", TORCH_CPP_LOG_LEVEL="ERROR")  # the profiler's chatter
MODELS = [("etris", "RN101"), ("etris", "tiny"), ("barleria", "tiny-vit"), ("detris", "tiny-dino")]


class StepOptions(NamedTuple):
    """How a step is taken; classes: of fast.py, whose tricks are on."""

    dtype: torch.dtype
    classes: tuple = ()
    channels_last: bool = False
    compile: bool = False


def make_ladder(model, device, compiled=False) -> dict[str, StepOptions]:
    """Name → options. Each adds a trick to those before, up to "fast", which train.py is."""
    options = StepOptions(torch.float16 if device.type == "cuda" else torch.float32)
    ladder = {"plain": options}
    present = {type(module) for module in model.modules()}
    for trick in (*FAST, *FOLDED):
        if trick in present:
            options = options._replace(classes=(*options.classes, trick))
            ladder[f"+ {trick.__name__}"] = options
    fast = options._replace(channels_last=True, dtype=pick_dtype(device, "auto")[0])
    ladder["fast"] = fast
    if device.type != "cuda":  # there "fast" is bf16, unless the GPU only emulates it
        ladder["fast + bf16"] = fast._replace(dtype=torch.bfloat16)
    if compiled:
        ladder["fast + compile"] = fast._replace(compile=True)
    return ladder


class Bench:
    """A model, its optimizer and a random batch. options: of build_model."""

    def __init__(self, args, device, batch_size, **options):
        self.args = args
        self.device = device
        self.batch_size = batch_size
        self.model = train.make_model(args, device, **options)
        self.compiled = torch.compile(self.model)
        self.options = None
        parameters = self.model.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=0.0, fused=device.type != "mps")
        images = torch.randint(256, (batch_size, 3, args.size, args.size), dtype=torch.uint8)
        tokens = tokenize(["the man in red on the left"] * batch_size, args.words)
        self.batch = to_device({"image": images, "tokens": tokens, "mask": images[:, :1]}, device)

    def now(self) -> float:
        """Seconds, once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def apply(self, options):
        """Put model and batch into the state of `options`; not part of a step's time."""
        if options == self.options:
            return
        self.options = options
        set_fast(set_fast(self.model, False), True, options.classes)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)
        self.batch["image"] = self.batch["image"].contiguous(memory_format=layout)

    def step(self, options) -> float:
        """Seconds of one training step."""
        self.apply(options)
        model = self.compiled if options.compile else self.model
        is_fp16 = options.dtype is torch.float16
        scaler = torch.amp.GradScaler(self.device.type, init_scale=1.0, enabled=is_fp16)
        start = self.now()
        train.train_step(model, self.batch, self.optimizer, scaler, options.dtype)
        return self.now() - start

    def memory(self, options) -> float:
        """MB allocated at the peak of a step: weights, Adam's moments, and what comes and goes."""
        gc.collect()
        static = sum(x.nbytes for x in self.model.state_dict().values())
        static += 2 * sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(options)
            return (static + torch.cuda.max_memory_allocated() - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step(options)
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return (static + max(np.cumsum([event.nbytes() for event in events]))) / 2**20


def interleave(functions, seconds) -> dict[str, dict]:
    """Call all functions by turns for about `seconds` → name → median of what they returned."""
    start = time.perf_counter()
    for function in functions.values():  # warms up
        function()
    rounds = int(np.clip(seconds / (time.perf_counter() - start + 1e-9) - 1, 3, 30))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(function())
    medians = {}
    for name, values in times.items():
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        medians[name] = {"seconds": median, "quartiles": [low, high], "rounds": rounds}
    return medians


def step_rows(bench, ladder, seconds) -> list[dict]:
    """A training step, plain beside fast; then the ladder, each variant against plain."""
    steps = {name: partial(bench.step, options) for name, options in ladder.items()}
    compiled = {name: steps.pop(name) for name in ladder if ladder[name].compile}
    found = {}
    for functions in (steps, compiled):  # apart: after another variant it would compile again
        for name, row in interleave(functions, seconds).items():
            row["memory_mb"] = bench.memory(ladder[name])
            row["speedup"] = found.get("plain", row)["seconds"] / row["seconds"]
            found[name] = row
    plain = {f"plain_{key}": found["plain"][key] for key in ("seconds", "quartiles", "memory_mb")}
    rows = [{"row": f"ladder: {name}", **row} for name, row in found.items()]
    return [{"row": "train_step", **found["fast"], **plain}, *rows]


def data_row(bench, step_seconds, count=4) -> dict:
    """Loading a batch in the training process, and its share of the time of a step with it."""
    dataset = open_dataset("scenes", "train", limit=count * bench.batch_size, side=bench.args.size)
    samples = TrainDataset(list(dataset), bench.args.size, bench.args.words)  # scenes drawn
    start = bench.now()
    for batch in train_loader(samples, bench.batch_size, epoch=0):
        to_device(batch, bench.device)
    seconds = (bench.now() - start) / count
    return {"row": "data", "seconds": seconds, "share": 100 * seconds / (seconds + step_seconds)}


def evaluation_row(bench, ladder, objects) -> dict:
    """Seconds a sentence takes: plain, one at a time, as the original; fast, in batches."""
    scenes = open_dataset("scenes", "val", limit=objects, side=bench.args.size)
    dataset = RefDataset("scenes", "val", tuple(scenes))  # drawn before the clock starts
    batch_size = 2 * bench.args.batch_size
    seconds = {}
    for name, size in (("plain", 1), ("fast", batch_size)):
        bench.apply(ladder[name])
        options = {"batch_size": size, "dtype": ladder[name].dtype, "progress": False}
        for limit in (1, objects):  # the first one warms up
            start = bench.now()
            result, _ = evaluate(bench.model, dataset, bench.device, limit=limit, **options)
            seconds[name] = (bench.now() - start) / result["sentences"]
    row = {"seconds": seconds["fast"], "plain_seconds": seconds["plain"]}
    row["speedup"] = seconds["plain"] / seconds["fast"]
    return {"row": "evaluation", "batch": batch_size, **row}


def model_rows(args, system, backbone, device) -> list[dict]:
    """All rows of one model."""
    options = ["--system", system, "--backbone", backbone, "--weights", args.weights]
    run_args = train.arguments(options)
    is_slow = device.type == "cpu" and "tiny" not in backbone
    batch_size = args.batch_size or (2 if is_slow else run_args.batch_size)
    bench = Bench(run_args, device, batch_size)
    ladder = make_ladder(bench.model, device, args.compile)
    rows = step_rows(bench, ladder, seconds=20 if args.quick else 120)
    rows.append(data_row(bench, rows[0]["seconds"]))
    rows.append(evaluation_row(bench, ladder, objects=2 if is_slow else 60))
    facts = {"system": system, "backbone": backbone, "device": device.type, "batch": batch_size}
    return [facts | row for row in rows]


@command
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", help="measure this one (RN101 and the tiny ones)")
    parser.add_argument("--system", default="etris", help="with --backbone (etris)")
    parser.add_argument("--weights", default="random", help="of the backbone (random)")
    parser.add_argument("--batch-size", type=integer(), help="objects (preset; RN101 on a CPU 2)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (the best available)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--compile", action="store_true", help="one variant more, torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write every row")
    args = parser.parse_args(argv)
    device, reason = pick_device(args.device)
    rows = [{"row": "machine", "device": device.type, **provenance(0, {})}]
    print(f"device {device}: {reason}; {rows[0]['hardware']}, torch {torch.__version__}")
    for system, backbone in [(args.system, args.backbone)] if args.backbone else MODELS:
        print(f"\n{system} {backbone}")
        for row in model_rows(args, system, backbone, device):
            rows.append(row)
            print(FORMAT.format(**{"speedup": 0, "memory_mb": 0, **row}))
        if args.json:
            write_file(args.json, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
