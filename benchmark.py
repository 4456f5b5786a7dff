"""14. How fast, how large, and what each trick buys: the plain path against the fast one, on the device there is.

    python benchmark.py --quick --json results/benchmark.json         ten minutes on two cores
    python benchmark.py --backbone RN101 --device cuda                one backbone, whole

Plain is what the original computes: its modules, batch and number format (fp16 on a GPU, fp32 elsewhere), cuDNN on.
Fast is what train.py does unasked, the ladder's last rung (but its Adam knows the gates' dead rows). Weights are random
unless --weights is given: the time does not hang on them. All variants of a step take turns in one process; the first
round warms up and is not counted; numbers are medians with quartiles. Adam's rate is 0: every step is the same. The
device is awaited before a clock is read.
"""

import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99"), os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # chatter

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train  # noqa: E402
from clip_model import HERE, Norm, tokenize  # noqa: E402
from command import Parser, command, integer, keep_memory  # noqa: E402
from data import TrainSet, open_dataset, train_loader  # noqa: E402
from etris import Enlarge, Gate, Projector, text_to_pixel_loss  # noqa: E402
from evaluate import evaluate, write_file  # noqa: E402
from official import pick_device, pick_dtype  # noqa: E402

QUICK = [("etris", "RN101"), ("etris", "tiny"), ("barleria", "tiny-vit"), ("detris", "tiny-dino")]
WHOLE = [*QUICK, ("etris", "tiny-vit"), ("etris", "RN50"), ("etris", "ViT-B-16"), ("barleria", "ViT-B-16"),
         ("detris", "dinov2-base")]  # fmt: skip
PART = [  # a module's name → the part of the model its own time is counted for
    (r"clip\.visual\.(layer\d|attnpool)", r"picture: \1"), (r"clip\.visual", "picture: stem, blocks"),
    (r"clip", "text"), (r"(\w+)", r"\1"), (r"", "between the parts"),
]  # fmt: skip
FAST, MICRO = "freed memory kept: fast", "fast + micro-batches (accumulate 4)"  # the last rung, and one beyond


# ---------------------------------------------------------------------------------------------------- the tricks
@dataclass(frozen=True)
class Tricks:
    """How a step is taken. keep: see `keep_memory`. fast: which kinds of module are on their fast path."""

    keep: bool = False
    fast: tuple[str, ...] = ()
    channels_last: bool = False
    fused: bool = False
    dtype: torch.dtype = torch.float32
    recompute: bool = False
    accumulate: int = 1
    compile: bool = False
    pixels: bool = False  # a graph down to the pixels, as if something learned there
    cudnn: bool = True


def kind(module) -> str:
    """Which trick a module's `fast` belongs to."""
    kinds = {Gate: "gate", Projector: "projector", Enlarge: "enlarge", Norm: "norm"}
    return kinds.get(type(module), "attention")


def ladder(device, compiled=False) -> dict[str, Tricks]:
    """name → tricks: from plain to fast, each rung with all before it; then what can be had beyond, each alone."""
    cuda = device.type == "cuda"
    rung = Tricks(dtype=torch.float16 if cuda else torch.float32)
    rungs = {"plain": rung}
    for name, one in (("attention without its map", "attention"), ("one-key attention as a gate", "gate"),
                      ("kernels without a grouped convolution", "projector"),
                      ("channels mixed before enlarging", "enlarge"),
                      ("frozen BatchNorm in its convolution", "norm")):  # fmt: skip
        rungs[name] = rung = replace(rung, fast=(*rung.fast, one))
    rungs["channels last"] = rung = replace(rung, channels_last=True)
    if cuda:
        rungs["bf16 for fp16"] = rung = replace(rung, dtype=pick_dtype(device, "auto")[0])
    rungs["fused Adam"] = rung = replace(rung, fused=True)
    rungs[FAST] = rung = replace(rung, keep=True)
    more = {} if cuda else {"fast + bf16": replace(rung, dtype=torch.bfloat16)}
    more |= {MICRO: replace(rung, accumulate=4),
             "fast + recompute": replace(rung, recompute=True),
             "fast, graph down to the pixels": replace(rung, pixels=True)}  # fmt: skip
    more |= {"plain, cuDNN off": replace(rungs["plain"], cudnn=False)} if cuda else {}
    more |= {"fast + compile": replace(rung, compile=True)} if compiled else {}
    return rungs | more


# ---------------------------------------------------------------------------------------------------- the bench
def now(device) -> float:
    """Seconds, once the device has done all it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


class Bench:
    """A model, an optimiser of each kind and a random batch; `step(tricks)` takes one training step."""

    def __init__(self, args, device, **more):
        """args: train.py's; more: given to `build`."""
        self.args, self.model, self.device = args, train.make_model(args, device, **more), device
        learn = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.adams = {fused: torch.optim.Adam(learn, lr=0.0, fused=fused) for fused in (False, True)}
        self.scalers = {used: torch.amp.GradScaler(device.type, enabled=used) for used in (False, True)}
        self.compiled = torch.compile(self.loss)

    def fill(self, batch, size=None):
        """A random batch of `batch` pictures of `size` pixels each way (the preset's)."""
        size, dice = size or self.args.size, torch.Generator().manual_seed(0)
        images, masks = torch.randn(batch, 3, size, size, generator=dice), torch.rand(batch, 1, size, size)
        tokens = tokenize(["the man in red on the left of the bench"] * batch, self.args.words)
        self.batch = [x.to(self.device) for x in (images, tokens, (masks > 0.8).float())]
        return self

    def dress(self, tricks):
        """Put the tricks on; what takes time here is no part of a step."""
        for module in self.model.modules():
            if hasattr(module, "fast"):
                module.fast = kind(module) in tricks.fast
        keep_memory(tricks.keep)
        form = torch.channels_last if tricks.channels_last else torch.contiguous_format
        self.model.to(memory_format=form)
        self.model.recompute, torch.backends.cudnn.enabled = tricks.recompute, tricks.cudnn
        images = self.batch[0].contiguous(memory_format=form).requires_grad_(tricks.pixels)
        return list(zip(*(x.chunk(tricks.accumulate) for x in (images, *self.batch[1:])), strict=True))

    def loss(self, images, tokens, masks):
        nearest = self.model.align_corners
        return text_to_pixel_loss(self.model(images, tokens), masks, nearest) + self.model.extra_loss()

    def step(self, tricks) -> dict[str, float]:
        """One training step → seconds of the forward pass, the backward pass, the optimiser."""
        adam, scaler = self.adams[tricks.fused], self.scalers[tricks.dtype is torch.float16]
        spent, parts = dict.fromkeys(("forward", "backward", "optimiser"), 0.0), self.dress(tricks)
        loss = self.compiled if tricks.compile else self.loss
        before = now(self.device)
        for part in parts:
            with torch.autocast(self.device.type, tricks.dtype, enabled=tricks.dtype is not torch.float32):
                value = loss(*part)
            spent["forward"] -= before - (before := now(self.device))
            scaler.scale(value / len(parts)).backward()
            spent["backward"] -= before - (before := now(self.device))
        scaler.step(adam)
        scaler.update()
        adam.zero_grad()
        spent["optimiser"] = now(self.device) - before
        return spent | {"train_step": sum(spent.values())}

    def memory(self, tricks) -> float:
        """MB at the peak of one step: what stands (weights, Adam's two moments) and what comes and goes."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()  # other models, too
            self.step(tricks)
            return self.stands(tricks) + (torch.cuda.max_memory_allocated() - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            self.step(tricks)
        events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return self.stands(tricks) + max(np.cumsum(sizes)) / 2**20

    def stands(self, tricks) -> float:
        """MB of the model and of one of the two Adams' moments."""
        moments = (x for state in self.adams[tricks.fused].state.values() for x in state.values())
        return sum(x.nbytes for x in (*self.model.state_dict().values(), *moments)) / 2**20


def take_turns(functions, seconds) -> dict[str, dict]:
    """name → function that returns {part: seconds}; all take turns for about `seconds` → name → part → list."""
    started = time.perf_counter()
    for function in functions.values():  # warms up
        function()
    rounds = int(np.clip(seconds / (time.perf_counter() - started) - 1, 3, 30))
    runs = [{name: function() for name, function in functions.items()} for _ in range(rounds)]
    return {name: {part: [run[name][part] for run in runs] for part in runs[0][name]} for name in functions}


def middle(values) -> dict:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"seconds": float(median), "quartiles": [float(low), float(high)], "rounds": len(values)}


# ---------------------------------------------------------------------------------------------------- what is measured
def step_rows(bench, rungs, seconds):
    """train_step and its parts, plain beside fast; then the ladder, each rung against plain and the one before.

    What keeps memory takes turns after the rest: blocks once kept would spare the others their price.
    """
    times, steps = {}, {name: lambda tricks=tricks: bench.step(tricks) for name, tricks in rungs.items()}
    for keep in (False, True):
        times |= take_turns({name: step for name, step in steps.items() if rungs[name].keep is keep}, seconds / 2)
    memory = {name: bench.memory(tricks) for name, tricks in rungs.items()}
    count = len(bench.batch[0])
    for part in ("train_step", "forward", "backward", "optimiser"):
        slow, fast = middle(times["plain"][part]), middle(times[FAST][part])
        row = {"row": part, "batch": count, **fast, "plain_seconds": slow["seconds"],
               "plain_quartiles": slow["quartiles"], "speedup": slow["seconds"] / fast["seconds"]}  # fmt: skip
        more = {"images_per_second": count / fast["seconds"], "plain_images_per_second": count / slow["seconds"],
                "memory_mb": memory[FAST], "plain_memory_mb": memory["plain"]}  # fmt: skip
        yield row | more if part == "train_step" else row
    before = plain = middle(times["plain"]["train_step"])["seconds"]
    for name in rungs:
        row = {"row": f"ladder: {name}", "batch": count, **middle(times[name]["train_step"])}
        yield row | {"speedup": plain / row["seconds"], "bought": before / row["seconds"], "memory_mb": memory[name]}
        before = before if name.startswith(("fast", "plain,")) else row["seconds"]


def part_rows(bench, tricks):
    """Own time of every module in one forward pass, by part: the clock is read whenever one begins or ends."""
    spent, stack, hooks = {}, [], []

    def read_clock():
        spent[stack[-1][0]] = spent.get(stack[-1][0], 0.0) + now(bench.device) - stack[-1][1]

    def begin(label):
        if stack:
            read_clock()
        stack.append([label, now(bench.device)])

    def leave():
        read_clock()
        stack.pop()
        if stack:
            stack[-1][1] = now(bench.device)

    for name, module in bench.model.named_modules():
        pattern, label = next(pair for pair in PART if re.match(pair[0], name))
        label = re.match(pattern, name).expand(label)
        hooks.append(module.register_forward_pre_hook(lambda *_, label=label: begin(label)))
        hooks.append(module.register_forward_hook(lambda *_: leave()))
    bench.step(tricks)
    spent.clear()  # that one warmed up
    bench.step(tricks)
    for hook in hooks:
        hook.remove()
    for label, seconds in spent.items():
        yield {"row": f"part: {label}", "seconds": seconds, "share": 100 * seconds / sum(spent.values())}


def rate_rows(bench, rungs, steps):
    """The device's best rate at large matrices, and the share of it that a step reaches by the work it must do."""
    needed = replace(rungs["plain"], fast=("gate", "projector", "enlarge"), dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        bench.step(needed)
    for name in ("plain", FAST):
        side, dtype = 8192 if bench.device.type == "cuda" else 1536, rungs[name].dtype
        a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        times = take_turns({"": lambda a=a, b=b: {"": -now(bench.device) + (a @ b, now(bench.device))[1]}}, 2)[""][""]
        rate, work = 2 * side**3 / min(times), counter.get_total_flops()
        yield {"row": f"matrix rate: {name}", "gflops_per_second": rate / 1e9, "step_gflops": work / 1e9,
               "share": 100 * work / steps[name] / rate, "dtype": str(dtype)[6:]}  # fmt: skip


def growth_rows(bench, tricks, batches, sizes):
    """Seconds and memory of a fast step as the batch grows, and as the picture does."""
    for what, values in (("batch", [(b, None) for b in batches]), ("size", [(batches[0], s) for s in sizes])):
        for batch, size in values:
            bench.fill(batch, size)
            times = take_turns({"": lambda: bench.step(tricks)}, 3)[""]["train_step"]
            yield {"row": f"growth: {what}", "batch": batch, "size": size or bench.args.size, **middle(times),
                   "memory_mb": bench.memory(tricks)}  # fmt: skip


def memory_rows(bench, rungs, measured, wanted):
    """Peak memory by batch size, and a step's time, measured at a few; larger ones are the straight line through the
    last two measured. In micro-batches the largest one wanted, measured, unless the few are fewer than those hold."""
    for name in ("plain", FAST, "fast + bf16", "fast + recompute", MICRO):
        if name not in rungs or (name == MICRO and max(measured) < 8):
            continue
        found = {}
        for batch in wanted[-1:] if name == MICRO else measured:
            found[batch] = bench.fill(batch).memory(rungs[name])
            yield {"row": f"memory: {name}", "batch": batch, "seconds": bench.step(rungs[name])["train_step"],
                   "memory_mb": found[batch], "how": "measured"}  # fmt: skip
        for batch in (batch for batch in wanted if batch not in found and name != MICRO):
            (a, low), (b, high) = list(found.items())[-2:]
            line = low + (high - low) / (b - a) * (batch - a)
            yield {"row": f"memory: {name}", "batch": batch, "memory_mb": line, "how": "computed"}


def sentence_seconds(bench, tricks, source, batch, objects=None) -> float:
    """Seconds that a sentence takes, from picture to mask, `batch` of them at a time."""
    bench.dress(tricks)
    dtype = None if tricks.dtype is torch.float32 else tricks.dtype
    for limit in (1, objects):  # the first one warms up
        before = now(bench.device)
        result, _ = evaluate(bench.model, source, bench.device, limit=limit, batch_size=batch, dtype=dtype,
                             progress=False)  # fmt: skip
    return (now(bench.device) - before) / result["sentences"]


def evaluation_rows(bench, rungs, objects, batch, seconds):
    """Seconds a sentence takes: plain, one at a time, as the original; fast, in batches as large as train.py's."""
    source, sizes = open_dataset("scenes", "val", limit=objects, side=bench.args.size), {"plain": 1, FAST: batch}
    sizes |= {name: batch for name in ("fast + bf16",) if name in rungs}
    count = sum(len(source[i].sentences) for i in range(objects))
    times = take_turns({name: lambda name=name, size=size: {"": sentence_seconds(bench, rungs[name], source, size)}
                        for name, size in sizes.items()}, seconds)  # fmt: skip
    plain = middle(times.pop("plain")[""])
    for name, found in times.items():
        row = {"row": "evaluation" if name == FAST else f"evaluation: {name}", "batch": batch, **middle(found[""])}
        row |= {"plain_seconds": plain["seconds"], "plain_quartiles": plain["quartiles"], "sentences": count}
        yield row | {"speedup": plain["seconds"] / row["seconds"], "sentences_per_second": 1 / row["seconds"],
                     "plain_sentences_per_second": 1 / plain["seconds"]}  # fmt: skip


def data_rows(bench, tricks, batch, steps, workers):
    """The share of a training loop's time in which the step waits for its batch; the workers' start and the drawing of
    scenes, once in a run, left out."""
    source = open_dataset("scenes", "train", limit=batch * (steps + 1), side=bench.args.size)
    for i in range(len(source)):
        source[i]
    loader = iter(train_loader(TrainSet(source, bench.args.size, bench.args.words), batch, 0, workers=workers))
    next(loader)
    waited, started = 0.0, (before := now(bench.device))
    for loaded in loader:
        waited += now(bench.device) - before
        bench.batch = [loaded[key].to(bench.device, non_blocking=True) for key in ("image", "tokens", "mask")]
        bench.step(tricks)
        before = now(bench.device)
    yield {"row": "data", "batch": batch, "workers": workers, "seconds": waited / steps,
           "share": 100 * waited / (before - started)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the command
def case_rows(system, backbone, device, args):
    """All rows of one model."""
    own = train.arguments(["--system", system, "--backbone", backbone, "--weights", args.weights or "random"])
    bench, cuda = Bench(own, device), device.type == "cuda"
    small, rungs = "tiny" in backbone, ladder(device, args.compile)
    batch = args.batch_size or (bench.args.batch_size if cuda or small else 2)
    steps, seconds = {}, (20 if small else 60) if args.quick else 120
    for row in step_rows(bench.fill(batch), rungs, seconds):
        steps |= {FAST: row["seconds"], "plain": row["plain_seconds"]} if row["row"] == "train_step" else {}
        yield row
    yield from part_rows(bench, rungs[FAST])
    yield from rate_rows(bench, rungs, steps)
    workers = 4 if cuda else 0
    yield from data_rows(bench, rungs[FAST], batch, 20 if cuda else 8 if small else 2, workers)
    objects = 400 if cuda else 60 if small else 2
    yield from evaluation_rows(bench, rungs, objects, 2 * bench.args.batch_size, seconds / 2)
    if small or cuda or not args.quick:
        sides = [bench.args.size * n // 4 // 32 * 32 for n in (2, 3, 4)]
        batches = [n for n in (1, 2, 4, 8, 16, 32) if cuda or small or n <= 2]
        yield from growth_rows(bench, rungs[FAST], batches, sides)
    if not small:
        measured = (1, 8, 16, 32) if cuda else (1, 2) if args.quick else (1, 8)
        yield from memory_rows(bench, rungs, measured, (8, 16, 32))


def machine(device) -> dict:
    """Where the numbers come from."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return {"row": "machine", "device": device.type, "hardware": f"{name}, {platform.machine()}",
            "torch": torch.__version__, "commit": git.stdout.strip(),
            "load_before": getattr(os, "getloadavg", lambda: [None])()[0],  # Windows has none
            "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])}  # fmt: skip


def line(row) -> str:
    """One row as it is printed."""
    spread = "{:.4g}–{:.4g}".format(*row["quartiles"]) if "quartiles" in row else ""
    shown = [f"{row['row']:<48}{row.get('batch', ''):>4}{row.get('size', ''):>5}"]
    shown.append(f"{row['seconds']:>10.4g} s {spread:<16}" if "seconds" in row else " " * 29)
    for key, form in (("plain_seconds", "plain {:.4g} s"), ("speedup", "{:.2f}×"), ("bought", "(this: {:.2f}×)"),
                      ("memory_mb", "{:,.0f} MB"), ("plain_memory_mb", "plain {:,.0f} MB"), ("share", "{:.1f} %"),
                      ("gflops_per_second", "of {:,.0f} GFLOP/s"), ("how", "{}")):  # fmt: skip
        if key in row:
            shown.append(form.format(row[key]))
    return "  ".join(shown)


def draw(rows, path):
    """The ladder of every model, and how a step grows with its batch."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(f"{row['system']} {row['backbone']}" for row in rows if "backbone" in row))
    figure = Figure((11, 1 + 2.8 * len(names)), layout="constrained")
    for name, (left, right) in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
        own = [row for row in rows if f"{row.get('system')} {row.get('backbone')}" == name]
        rungs = [row for row in own if row["row"].startswith("ladder: ")][::-1]
        bars = left.barh([row["row"][8:] for row in rungs], [row["seconds"] for row in rungs], color="#0072B2")
        left.bar_label(bars, [f"{row['speedup']:.2f}×" for row in rungs], fontsize=7, padding=2)
        left.tick_params(axis="y", labelsize=7)
        left.set(title=name, xlabel="seconds a step", xlim=(0, 1.15 * max(row["seconds"] for row in rungs)))
        for part, marker in (("growth: batch", "o-"), ("memory: plain", "s--"), (f"memory: {FAST}", "s-")):
            some = [row for row in own if row["row"] == part]
            if some:
                right.plot([r["batch"] for r in some], [r["memory_mb"] / 1024 for r in some], marker, label=part)
        right.set(xlabel="batch", ylabel="GB at the peak of a step")
        right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


@command
def main(argv=None):
    parser = Parser(description="Measure training steps, evaluation, data and memory: plain against fast.")
    add = parser.add_argument
    add("--backbone", metavar="NAME", help="this one only (RN101 and the tiny ones first, then all)")
    add("--system", default="etris", metavar="NAME", help="with --backbone: etris, barleria, detris")
    add("--weights", metavar="FILE", help="of the frozen backbone (random)")
    add("--batch-size", type=integer(), metavar="N", help="(the preset's; 2 for large backbones on a CPU)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--quick", action="store_true", help="the tiny ones and RN101: ten minutes on two cores")
    add("--compile", action="store_true", help="torch.compile as one more rung: minutes more")
    add("--json", metavar="FILE", help="write every row, and a figure beside it")
    args = parser.parse_args(argv)
    device, reason = pick_device(args.device)
    rows = [machine(device)]
    print(f"device {device}: {reason}; {rows[0]['hardware']}, torch {torch.__version__}")
    cases = [(args.system, args.backbone)] if args.backbone else QUICK if args.quick else WHOLE
    for system, backbone in cases:
        print(f"\n{system} {backbone}" + " " * 30 + "batch size   a step, quartiles")
        for row in case_rows(system, backbone, device, args):
            rows.append({**row, "system": system, "backbone": backbone, "device": device.type})
            print(line(row), flush=True)
        gc.collect()
        if args.json:
            write_file(args.json, json.dumps(rows, indent=1).encode())
            draw(rows, Path(args.json).with_suffix(".png"))


if __name__ == "__main__":
    main()
