"""Seconds and memory: the plain path against the fast one, on the device there is.

    python -m experiments.benchmark --quick --json results/benchmark.json     minutes on two cores
    python -m experiments.benchmark --backbone RN101 --device cuda            one backbone

Plain is what the original computes: its modules, batch and number format (fp16 on a GPU, fp32
elsewhere). Fast is what train.py does. Weights are random unless --weights is given: the time does
not depend on them. Variants take turns; the first round warms up and is not counted; numbers are
medians with quartiles. The learning rate is 0, so that every step is the same.
"""

import gc
import json
import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.amp import GradScaler
from torch.optim import Adam
from torch.profiler import ProfilerActivity, profile

import train
from clip_model import Attention, AttentionPool
from data import TrainDataset, open_dataset, to_device, train_loader
from etris import Gate, Projector
from evaluate import evaluate
from fast import FOLDED, set_fast
from methods.dinov2 import FusedAttention
from utils.common import Parser, command, integer, pick_device, pick_dtype, provenance, write_file
from utils.tokenizer import tokenize

QUICK = [("etris", "RN101"), ("etris", "tiny"), ("barleria", "tiny-vit"), ("detris", "tiny-dino")]
WHOLE = [*QUICK, ("etris", "tiny-vit"), ("etris", "RN50"), ("etris", "ViT-B-16")]
WHOLE += [("barleria", "ViT-B-16"), ("detris", "dinov2-base")]
TRICKS = {  # of fast.py: the classes that each one replaces methods of
    "attention without stored weights": (Attention, AttentionPool, FusedAttention),
    "gates without queries and keys": (Gate,),
    "channels mixed before upsampling": (Projector,),
    "frozen BatchNorm folded": FOLDED,
}


@dataclass(frozen=True)
class StepOptions:
    """How a step is taken. tuned: channels-last memory and the fused Adam."""

    dtype: torch.dtype
    classes: tuple = ()  # of fast.py, whose tricks are on
    tuned: bool = False
    compile: bool = False


def make_ladder(device, compiled=False) -> dict[str, StepOptions]:
    """Name → options. Each rung adds a trick to those before, up to "fast", which train.py is."""
    plain_dtype = torch.float16 if device.type == "cuda" else torch.float32
    rung = StepOptions(plain_dtype)
    ladder = {"plain": rung}
    for name, classes in TRICKS.items():
        rung = replace(rung, classes=rung.classes + classes)
        ladder[name] = rung
    dtype, _ = pick_dtype(device, "auto")
    fast = replace(rung, tuned=True, dtype=dtype)
    ladder["fast"] = fast
    ladder["fast + bf16"] = replace(fast, dtype=torch.bfloat16)
    if compiled:
        ladder["fast + compile"] = replace(fast, compile=True)
    return ladder


class Bench:
    """A model, an optimizer of each kind and a random batch."""

    def __init__(self, args, device, batch_size):
        self.args = args
        self.device = device
        self.model = train.make_model(args, device)
        self.compiled = torch.compile(self.model)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = {fused: Adam(learning, 0.0, fused=fused) for fused in (False, True)}
        self.scalers = {on: GradScaler(device.type, enabled=on) for on in (False, True)}
        self.options = None
        images = torch.randint(256, (batch_size, 3, args.size, args.size), dtype=torch.uint8)
        tokens = tokenize(["the man in red on the left"] * batch_size, args.words)
        batch = {"image": images, "tokens": tokens, "mask": images[:, :1]}
        self.batch = to_device(batch, device)

    def apply(self, options):
        """Put model and batch into the state of `options`; not part of a step's time."""
        if options != self.options:
            set_fast(set_fast(self.model, False), True, options.classes)
            self.options = options
        layout = torch.channels_last if options.tuned else torch.contiguous_format
        self.model.to(memory_format=layout)
        self.batch["image"] = self.batch["image"].contiguous(memory_format=layout)

    def now(self) -> float:
        """Seconds, once the device has finished its work."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def step(self, options) -> float:
        """One training step → its seconds."""
        self.apply(options)
        model = self.compiled if options.compile else self.model
        optimizer = self.optimizers[options.tuned]
        scaler = self.scalers[options.dtype is torch.float16]
        start = self.now()
        train.train_step(model, self.batch, optimizer, scaler, options.dtype)
        return self.now() - start

    def memory(self, options) -> float:
        """MB at the peak of a step: weights, Adam's two moments, and what comes and goes."""
        gc.collect()
        moments = [x for s in self.optimizers[options.tuned].state.values() for x in s.values()]
        static = sum(x.nbytes for x in [*self.model.state_dict().values(), *moments])
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
    rounds = int(np.clip(seconds / (time.perf_counter() - start) - 1, 3, 30))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(function())
    return {name: median(values) for name, values in times.items()}


def median(values) -> dict:
    low, middle, high = np.percentile(values, [25, 50, 75])
    quartiles = [float(low), float(high)]
    return {"seconds": float(middle), "quartiles": quartiles, "rounds": len(values)}


def compare(fast, plain) -> dict:
    """The fast median beside the plain one."""
    more = {"plain_seconds": plain["seconds"], "plain_quartiles": plain["quartiles"]}
    return {**fast, **more, "speedup": plain["seconds"] / fast["seconds"]}


def step_rows(bench, ladder, seconds):
    """A training step, plain beside fast; then the ladder, each rung against plain."""
    steps = {name: lambda o=options: bench.step(o) for name, options in ladder.items()}
    compiled = {name: steps.pop(name) for name in list(steps) if ladder[name].compile}
    times = interleave(steps, seconds)
    if compiled:  # on its own: after another variant it would be compiled again
        times |= interleave(compiled, seconds / 4)
    memory = {name: bench.memory(options) for name, options in ladder.items()}
    batch = len(bench.batch["image"])
    step = compare(times["fast"], times["plain"])
    step |= {"memory_mb": memory["fast"], "plain_memory_mb": memory["plain"]}
    yield {
        "row": "train_step",
        "batch": batch,
        **step,
        "images_per_second": batch / step["seconds"],
    }
    for name, found in times.items():
        speedup = times["plain"]["seconds"] / found["seconds"]
        more = {"speedup": speedup, "memory_mb": memory[name]}
        yield {"row": f"ladder: {name}", "batch": batch, **found, **more}


def evaluation_row(bench, ladder, objects, batch, seconds) -> dict:
    """Seconds a sentence takes: plain, one at a time, as the original; fast, in batches."""
    dataset = open_dataset("scenes", "val", limit=objects, side=bench.args.size)
    sentences = sum(len(scene.sentences) for scene in dataset)

    def measure(name, batch_size):
        bench.apply(ladder[name])
        options = {"batch_size": batch_size, "dtype": ladder[name].dtype, "progress": False}
        start = bench.now()
        evaluate(bench.model, dataset, bench.device, **options)
        return (bench.now() - start) / sentences

    runs = {"plain": lambda: measure("plain", 1), "fast": lambda: measure("fast", batch)}
    times = interleave(runs, seconds)
    row = compare(times["fast"], times["plain"])
    more = {"sentences": sentences, "sentences_per_second": 1 / row["seconds"]}
    return {"row": "evaluation", "batch": batch, **row, **more}


def data_row(bench, options, batch, steps, workers) -> dict:
    """The share of a training loop's time in which a step waits for its batch."""
    dataset = open_dataset("scenes", "train", limit=batch * (steps + 1), side=bench.args.size)
    scenes = list(dataset)  # drawing them, once in a run, is not measured
    samples = TrainDataset(scenes, bench.args.size, bench.args.words)
    loader = iter(train_loader(samples, batch, 0, workers=workers, device=bench.device))
    next(loader)  # nor is the start of the workers
    waited = 0.0
    start = before = bench.now()
    for loaded in loader:
        waited += bench.now() - before
        bench.batch = to_device(loaded, bench.device)
        bench.step(options)
        before = bench.now()
    share = 100 * waited / (before - start)
    row = {"row": "data", "batch": batch, "workers": workers}
    return {**row, "seconds": waited / steps, "share": share}


def model_rows(args, system, backbone, device):
    """All rows of one model."""
    weights = args.weights or "random"
    options = ["--system", system, "--backbone", backbone, "--weights", weights]
    run_args = train.arguments(options)
    on_gpu = device.type == "cuda"
    is_small = "tiny" in backbone
    batch = args.batch_size or (run_args.batch_size if on_gpu or is_small else 2)
    seconds = (20 if is_small else 60) if args.quick else 120
    bench = Bench(run_args, device, batch)
    ladder = make_ladder(device, args.compile)
    yield from step_rows(bench, ladder, seconds)
    yield data_row(bench, ladder["fast"], batch, 20 if on_gpu else 4, workers=4 if on_gpu else 0)
    objects = 400 if on_gpu else 60 if is_small else 2
    yield evaluation_row(bench, ladder, objects, 2 * run_args.batch_size, seconds / 2)


def format_row(row) -> str:
    cells = [f"{row['row']:<42}{row['batch']:>4}{row['seconds']:>10.4g} s"]
    units = {"plain_seconds": "s plain", "speedup": "×", "memory_mb": "MB", "share": "% waited"}
    for key, unit in units.items():
        if key in row:
            cells.append(f"{row[key]:>9.4g} {unit}")
    return " ".join(cells)


@command
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", help="measure this one (the tiny ones, RN101, and others)")
    parser.add_argument("--system", default="etris", help="with --backbone (etris)")
    parser.add_argument("--weights", metavar="FILE", help="of the frozen backbone (random)")
    parser.add_argument("--batch-size", type=integer(), help="(preset; large on a CPU: 2)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (the best available)")
    parser.add_argument("--quick", action="store_true", help="the tiny ones and RN101, shorter")
    parser.add_argument("--compile", action="store_true", help="torch.compile as one more rung")
    parser.add_argument("--json", metavar="FILE", help="write every row")
    args = parser.parse_args(argv)
    device, reason = pick_device(args.device)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows = [{"row": "machine", "device": device.type, **provenance(0, {}), "load_before": load}]
    print(f"device {device}: {reason}; {rows[0]['hardware']}, torch {torch.__version__}")
    models = [(args.system, args.backbone)] if args.backbone else QUICK if args.quick else WHOLE
    for system, backbone in models:
        print(f"\n{system} {backbone}")
        for row in model_rows(args, system, backbone, device):
            rows.append({**row, "system": system, "backbone": backbone, "device": device.type})
            print(format_row(row), flush=True)
        if args.json:
            write_file(args.json, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
