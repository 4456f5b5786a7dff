"""4. The loop: train what is tuned, validate each epoch, keep the best by val mIoU, test it once at the end.

    python train.py                                              tiny CLIP, drawn scenes, a laptop
    python train.py --backbone RN101 --dataset refcoco --data DIR       the paper's run (section 4.2) on one GPU
    torchrun --nproc_per_node N train.py …                              the same run on N GPUs (parallel.py)

OUT holds args.json, log.jsonl (first line: provenance), last.pt, best.pt, curves.png, predictions_<epoch>.png and
result.json. A checkpoint holds tuned tensors and what `--resume` needs to go on exactly; never the frozen ones.
"""

import contextlib
import io
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import parallel
from clip_model import HERE
from command import UserError, command
from data import TrainSet, blame, epoch_batches, train_loader
from etris import Gate, set_fast, text_to_pixel_loss
from evaluate import evaluate, grid_ceiling, write_file
from official import VERSION, pick_device, pick_dtype, read_checkpoint, restore_tuned
from predict import draw_curves, draw_predictions
from settings import DROPS, arguments, open_evaluation, open_sources
from tuning import build

TRIAL = 20  # steps before --compile, and as many after it, that are compared


# ---------------------------------------------------------------------------------------------------- the loop
def train_epoch(run, source, bar):
    """One pass, from where the run stands. Returns the mean loss and the mean IoU at the logits' size, in percent."""
    args = run.args
    run.model.train()
    train_set = TrainSet(source, args.size, args.words, args.seed)
    for batch in train_loader(train_set, args.batch_size, run.epoch, run.done, args.workers, run.world.share):
        with run.whole():
            start = time.perf_counter()
            loss, iou = step(run, batch)
            run.timed(time.perf_counter() - start)
            run.done, run.steps = run.done + 1, run.steps + 1
            run.totals = [run.totals[0] + loss, run.totals[1] + iou]
        rate, skipped = bar.format_dict["rate"] or 0.0, {"skipped": run.skipped} if run.skipped else {}
        bar.set_postfix(loss=f"{loss:.3f}", IoU=f"{iou:.1f}", imgs=f"{rate * args.batch_size:.0f}/s", **skipped)
        bar.update()
        if run.steps >= run.total:
            break
    return [total / max(1, run.done) for total in run.totals]


def step(run, batch):
    """Forward and backward in `--accumulate` micro-batches, one update of what is tuned → loss and IoU (percent).

    batch: this rank's share of it. Loss, IoU and gradient are means over the whole batch: each rank's count by its
    items, for shares may differ by one. Where one rank is told to stop, all stop after this step.
    """
    world, keys, total, iou = run.world, ("image", "tokens", "mask"), 0.0, 0.0
    before = [x.clone() for x in run.statistics]
    [count] = world.total(len(batch["image"]))
    pieces = min(run.args.accumulate, max(1, int(count) // world.size))  # as many on every rank
    parts = list(zip(*(batch[key].tensor_split(pieces) for key in keys), strict=True))
    for i, part in enumerate(parts):
        images, tokens, masks = (x.to(run.device, non_blocking=True) for x in part)
        with world.hold(run.objective, last=i == len(parts) - 1):
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not torch.float32):
                loss, logits = run.objective(images, tokens, masks)
            share = len(images) / count
            run.scaler.scale(loss * share * world.size).backward()  # the ranks' gradients are averaged: hence the size
        total, iou = total + loss.item() * share, iou + share * grid_iou(logits.detach(), masks)
    total, iou, stop = world.total(total, iou, run.stop)
    run.stop = run.stop or stop > 0
    update(run, batch, before, total)
    return total, iou


def update(run, batch, before, loss):
    """Adam and the rates take their step, if all numbers are finite: else the run ends, saved as it was before.

    Infinite gradients under an fp16 scaler mean that its scale was too high: nothing moves but the scale, down to 1.
    """
    for whole, values in run.partly.items():
        values.grad = whole.grad.chunk(3)[2]
    gradients = [x.grad for group in run.adam.param_groups for x in group["params"] if x.grad is not None]
    largest = 0.0 if run.scaler.is_enabled() else torch.nn.utils.get_total_norm(gradients, math.inf).item()
    scale, finite = run.scaler.get_scale(), math.isfinite(loss) and math.isfinite(largest)
    if finite:
        run.scaler.step(run.adam), run.scaler.update()
    run.forget()
    if finite and run.scaler.get_scale() >= scale:
        return run.rate.step()
    for x, good in zip(run.statistics, before, strict=True):
        x.copy_(good)
    run.skipped += 1
    if not finite or scale < 1:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the largest gradient is {largest or math.inf}"
        give_up(run, what, run.world.gather(batch["ref_id"].tolist()))


def give_up(run, what, refs):
    """Save the run as it stands, and end it."""
    if not run.world.first:
        raise KeyboardInterrupt
    run.save("last.pt")
    where = f"step {run.steps} (rate {run.rate.get_last_lr()}, refs {refs})"
    raise UserError(f"{what} at {where}: lower --lr, or --amp off; {run.out / 'last.pt'} is the state before it")


def bought(seconds) -> str:
    """What compiling after TRIAL of these 2·TRIAL steps took, what it bought, and when that is paid back."""
    before, after = np.median(seconds[1:TRIAL]), np.median(seconds[TRIAL + 1 :])
    took, gain = sum(seconds[TRIAL:]) - TRIAL * after, before - after
    pays = f"paid back after {took / gain:,.0f} steps" if gain > 0 else "it does not pay here: leave --compile out"
    return f"compiled in {took:.1f} s: a step takes {after:.3g} s, before {before:.3g} ({before / after:.2f}×); {pays}"


class Objective(nn.Module):
    """Model and loss in one, so that what averages gradients over processes sees everything the loss hangs on."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, tokens, masks):
        logits = self.model(images.contiguous(memory_format=torch.channels_last), tokens)
        loss = text_to_pixel_loss(logits, masks, nearest=self.model.align_corners)
        return loss + self.model.extra_loss(), logits


def grid_iou(logits, masks) -> float:
    """Mean IoU in percent at the logits' own size: quick, for the bar; evaluate.py measures at the pictures' size."""
    truth, found = F.interpolate(masks, logits.shape[2:], mode="area") > 0.5, logits.sigmoid() > 0.35
    both, either = (truth & found).sum((1, 2, 3)), (truth | found).sum((1, 2, 3))
    return 100 * (both / either.clamp(min=1)).mean().item()


def schedule(kind, total):
    """Factor on the rates by step: "step" and "two-step" fall to a tenth at DROPS, "cosine" warms up and falls."""
    if kind in DROPS:
        return lambda step: 0.1 ** sum(step >= round(share * total) for share in DROPS[kind])
    warm = min(50, total // 10)
    return lambda step: min(1, (step + 1) / (warm + 1)) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / total)) / 2)


# ------------------------------------------------------------------------------------------- a run and its folder
class Run:
    """A model with all that moves while it trains, so that it can be saved at any step and go on exactly."""

    def __init__(self, args, model, device, dtype, total):
        self.args, self.model, self.device, self.dtype, self.total = args, model, device, dtype, total
        self.out, self.epoch, self.done, self.steps, self.best, self.minutes = Path(args.out), 0, 0, 0, -1.0, 0.0
        self.totals, self.busy, self.stop, self.skipped = [0.0, 0.0], False, False, 0
        self.statistics = [x for _, x in model.tuned() if not x.requires_grad]  # BatchNorm's: a forward pass moves them
        self.world, self.inner, self.times = parallel.World(), Objective(model), []
        self.objective = self.inner  # until `join` wraps it
        gates = [module for module in model.modules() if isinstance(module, Gate)]
        joint = [x for gate in gates for x in (gate.in_proj_weight, gate.in_proj_bias)]
        self.partly = {x: nn.Parameter(x.detach().chunk(3)[2]) for x in joint}  # queries' and keys' rows never learn
        parts = {1.0: [], "bridger": []}  # a parameter's `pace` slows it down: CLIP's own, where they learn
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = "bridger" if name.startswith("bridger.") else getattr(parameter, "pace", 1.0)
                parts.setdefault(part, []).append(self.partly.get(parameter, parameter))
        rates = {part: args.bridge_lr if part == "bridger" else part * args.lr for part in parts}
        groups = [{"params": parts[part], "lr": rates[part]} for part in parts]
        groups, fused = [group for group in groups if group["params"]], device.type != "mps"
        self.adam = torch.optim.Adam(groups, betas=(0.9, args.beta2), fused=fused)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.adam, schedule(args.schedule, total))
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.start = time.time()

    def join(self, world):
        """Train as one rank of `world`. Dropout's dice are each rank's own; a resumed run throws the others' anew."""
        self.world = world
        if world.size > 1 and self.device.type == "cuda":
            parallel.sync_batch_norm(self.model)
        self.objective = world.wrap(self.inner)
        if not world.first:
            torch.manual_seed(self.args.seed + 10**6 * world.rank + self.steps)

    def timed(self, seconds):
        """A step took so long. --compile begins after TRIAL of them, and says after as many more what it bought."""
        if not self.args.compile or len(self.times) == 2 * TRIAL:
            return
        self.times.append(seconds)
        if len(self.times) == TRIAL:
            self.inner.compile()  # in place, not the model's own call: names, evaluation and drawing stay as they are
        if len(self.times) == 2 * TRIAL and self.world.first:
            tqdm.write(bought(self.times))

    def forget(self):
        """The gradients of the last step."""
        self.adam.zero_grad(), self.model.zero_grad()

    def interrupt(self, *_):
        """Ctrl-C or SIGTERM: stop after the step that is running, or the end of an epoch; at once elsewhere."""
        if not self.busy:
            raise KeyboardInterrupt
        self.stop = True

    @contextlib.contextmanager
    def whole(self):
        """A signal waits for the end of what runs inside, so that what is saved is never half of it."""
        self.busy = True
        yield
        self.busy = False
        if self.stop:
            raise KeyboardInterrupt

    def state(self) -> dict:
        """What a checkpoint holds: plain containers and tensors only, so that it loads with weights_only=True."""
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        numbers = {"torch": torch.get_rng_state(), "numpy": [kind, keys.tolist(), position, has_gauss, gauss]}
        numbers |= {"python": list(random.getstate()[1]), "cuda": torch.cuda.get_rng_state_all()}
        moving = {"epoch": self.epoch, "done": self.done, "steps": self.steps, "best": self.best, "totals": self.totals}
        moving |= {"minutes": self.minutes + (time.time() - self.start) / 60, "random": numbers}
        moving |= {"adam": self.adam.state_dict(), "rate": self.rate.state_dict(), "scaler": self.scaler.state_dict()}
        tuned = {name: x.detach().cpu() for name, x in self.model.tuned()}
        return {"version": VERSION, "system": self.model.system, "config": self.model.config, "tuned": tuned,
                "identity": self.model.frozen.identity, "args": vars(self.args), "training": moving}  # fmt: skip

    def save(self, name, resumable=True):
        """Written beside and renamed, so a file of that name is whole. best.pt leaves out what resuming needs."""
        state, file = self.state(), io.BytesIO()
        torch.save(state if resumable else state | {"training": None}, file)
        write_file(self.out / name, file.getbuffer())

    def restore(self, path):
        """Go on where `path` stood. UserError where it belongs to another model, data set or size of batch."""
        file = read_checkpoint(path)
        if not file.get("training"):
            raise UserError(f"{path}: holds a model, not a run to go on with: --resume takes a run's last.pt")
        for key in ("backbone", "dataset", "system", "tuning", "size", "words", "seed", "batch_size"):
            theirs, ours, option = file["args"].get(key), getattr(self.args, key), key.replace("_", "-")
            if theirs != ours:
                raise UserError(f"{path}: was trained with --{option} {theirs}, not {ours}: give that")
        restore_tuned(self.model, file, path)
        moving = file["training"]
        self.epoch, self.done, self.steps, self.best = (moving[key] for key in ("epoch", "done", "steps", "best"))
        self.adam.load_state_dict(moving["adam"]), self.rate.load_state_dict(moving["rate"])
        if moving["scaler"]:  # empty unless the run was in fp16 until now
            self.scaler.load_state_dict(moving["scaler"])
        if any(x["exp_avg"].shape != parameter.shape for parameter, x in self.adam.state.items()):
            raise UserError(f"{path}: its optimiser is an older train.py's: move {path.parent} away and start anew")
        kind, keys, *rest = moving["random"]["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        random.setstate((3, tuple(moving["random"]["python"]), None))
        torch.set_rng_state(moving["random"]["torch"])
        torch.cuda.set_rng_state_all(moving["random"]["cuda"][: torch.cuda.device_count()])
        self.minutes, self.totals = moving["minutes"], moving["totals"]

    def log(self, **line):
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def provenance(args, model) -> dict:
    """Where numbers come from: command, commit, versions, hardware, seed, the frozen backbone's name and hash."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": git.stdout.strip(),
            "torch": torch.__version__, "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {gpu}",
            "seed": args.seed, "frozen": model.frozen.identity}  # fmt: skip


def report(model, source, device, dtype, reasons):
    """Print what trains and what does not, by part, and why this device and number format."""
    parts = {}
    for name, parameter in model.named_parameters():
        tuned, frozen = parts.setdefault(name.split(".")[0], [0, 0])
        parts[name.split(".")[0]] = [tuned + parameter.numel() * parameter.requires_grad,
                                     frozen + parameter.numel() * (not parameter.requires_grad)]  # fmt: skip
    print(f"device {device}: {reasons[0]}; numbers {str(dtype)[6:]}: {reasons[1]}")
    print(f"data: {source.name} {source.split} {source.counts()}")
    for name, (tuned, frozen) in [*parts.items(), ("all", np.sum(list(parts.values()), axis=0))]:
        print(f"  {name:<14}{tuned:>14,} tuned{frozen:>14,} frozen")


# ---------------------------------------------------------------------------------------------------- the command
def prepare_folder(args):
    """OUT, with args.json; a run that is there already is moved aside unless it is resumed."""
    out = Path(args.out)
    if (out / "log.jsonl").exists() and not args.resume:
        aside = next(p for i in range(1, 10**6) if not (p := out.with_name(f"{out.name}-{i}")).exists())
        out.rename(aside)
        print(f"{out} held a run: moved to {aside} (--resume goes on with one)")
    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")


def resume(run):
    """Restore `--resume`'s checkpoint, or start fresh, saying so, where OUT holds none."""
    path = run.out / "last.pt" if run.args.resume is True else Path(run.args.resume)
    if path.exists() or run.args.resume is not True:
        with blame(path, "it is damaged: give another --resume"):
            run.restore(path)
            print(f"going on from {path} at step {run.steps:,} of {run.total:,}")
    else:
        print(f"{path} is not there: starting fresh")


def validate(run, source):
    """evaluate.py's numbers, every rank measuring its share with rank 0's parameters and BatchNorm statistics."""
    run.world.copy_first(tensor for _, tensor in run.model.tuned())
    dtype = None if run.dtype is torch.float32 else run.dtype
    return evaluate(run.model, source, run.device, batch_size=2 * run.args.batch_size, dtype=dtype,
                    workers=run.args.workers, progress=run.world.first, world=run.world)[0]  # fmt: skip


def fit(run, train_source, val_source):
    """Epochs until the steps are done; every one validated, logged, drawn and saved, the best by val mIoU apart."""
    silent = not run.world.first
    bar = tqdm(total=run.total, initial=run.steps, unit="step", desc="train", dynamic_ncols=True, disable=silent,
               file=sys.stdout)  # fmt: skip
    while run.steps < run.total or run.done:
        start = time.time()
        loss, iou = train_epoch(run, train_source, bar)
        val = validate(run, val_source)
        with run.whole():
            run.epoch, run.done, run.totals = run.epoch + 1, 0, [0.0, 0.0]
            if silent:
                continue
            run.log(epoch=run.epoch, step=run.steps, loss=loss, train_IoU=iou, val=val, rate=run.rate.get_last_lr(),
                    seconds=round(time.time() - start, 1))  # fmt: skip
            tqdm.write(f"epoch {run.epoch}: loss {loss:.3f}, val oIoU {val['oIoU']:.1f} mIoU {val['mIoU']:.1f}")
            if val["mIoU"] > run.best:
                run.best = val["mIoU"]
                run.save("best.pt", resumable=False)
            draw_curves(run.out)
            draw_predictions(run.model, val_source, run.out / f"predictions_{run.epoch:02d}.png")
            run.save("last.pt")  # last, so that a run killed before does all of this again
    bar.close()


def finish(run, val_source):
    """best.pt, read by the first rank and copied to all, on the test split → result.json, with the run's minutes."""
    source = val_source if run.args.overfit else open_evaluation(run.args, "test", val_source)
    if not run.world.first:
        return validate(run, source)
    restore_tuned(run.model, read_checkpoint(run.out / "best.pt"), run.out / "best.pt")
    minutes = run.minutes + (time.time() - run.start) / 60
    result = validate(run, source) | {"minutes": round(minutes, 2), "steps": run.steps}
    (run.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    numbers = "  ".join(f"{key} {result[key]:.2f}" for key in ("oIoU", "mIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9"))
    print(f"{source.name} {source.split}, {result['sentences']:,} sentences: {numbers}  ({minutes:.1f} minutes)")
    print(f"try it:  python predict.py {run.out / 'best.pt'} --image PICTURE --text SENTENCE")
    return result


def seed_all(seed):
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)


def make_model(args, device, **more):
    """The model of these arguments on the fast path; `more` overrides what `build` gets."""
    names = ("size", "words", "weights", "seed", "system", "tuning", "width", "dropout")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None} | more
    model = set_fast(build(args.backbone, **options)).to(device, memory_format=torch.channels_last)
    model.recompute = args.recompute
    return model


@contextlib.contextmanager
def interruptible(run, advice="the same command goes on"):
    """Ctrl-C and SIGTERM end the step that is running, save last.pt, and exit with status 130."""
    before = [signal.signal(kind, run.interrupt) for kind in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    except KeyboardInterrupt:
        run.busy = True  # whoever is impatient does not break what is saved
        run.save("last.pt")
        print(f"\nstopped at step {run.steps:,}; {advice}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        for kind, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(kind, handler)


def prepare(args, world):
    """The same in every process, and where a user's mistakes show → run, train and val sources."""
    seed_all(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS cannot be
    if args.deterministic != torch.are_deterministic_algorithms_enabled():  # the call takes a second
        torch.use_deterministic_algorithms(args.deterministic)
    device, why = pick_device(args.device)
    dtype, why_dtype = pick_dtype(device, args.amp)
    args.workers = (0 if device.type == "cpu" else 4) if args.workers is None else args.workers
    train_source, val_source = open_sources(args)
    model = make_model(args, device)
    report(model, train_source, device, dtype, (why, why_dtype))
    batches = epoch_batches(len(train_source), args.batch_size, args.seed, 0)  # all of one length
    if world.size > len(batches[0]):
        raise UserError(f"{world.size} processes: a batch has {len(batches[0])} objects: start no more than that")
    alone = min(args.processes, len(batches[0])) if device.type == "cpu" else 1
    args.processes = world.size if world.size > 1 else alone
    return Run(args, model, device, dtype, args.steps or args.epochs * len(batches)), train_source, val_source


def follow(world, args):
    """What a rank other than the first does: the same steps, and no file, no line, no picture."""
    run, train_source, val_source = prepare(args, world)
    if args.resume:
        resume(run)
    run.join(world)
    fit(run, train_source, val_source)
    finish(run, val_source)


@command
def main(argv=None):
    args = arguments(argv, __doc__)
    world = parallel.torchrun(lambda: pick_device(args.device)[0])
    if not world.first:
        with parallel.following():
            return follow(world, args)
    run, train_source, val_source = prepare(args, world)
    if args.resume:
        resume(run)
    prepare_folder(args)
    if not (run.out / "log.jsonl").exists():
        run.log(**provenance(args, run.model), processes=args.processes)
    if args.overfit:
        print(f"the logit grid's ceiling: mIoU {grid_ceiling(val_source, args.size)['mIoU']:.1f}")
    with parallel.companions(world, args.processes, follow, args) as world:
        run.join(world)
        with interruptible(run, f"go on with --resume --out {run.out}"):
            fit(run, train_source, val_source)
        finish(run, val_source)


if __name__ == "__main__":
    main()
