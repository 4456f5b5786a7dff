"""4. Training: arguments, the loop, one optimizer step.

    python train.py                                             tiny CLIP, drawn scenes, a laptop
    python train.py --backbone RN101 --dataset refcoco --data DIR          the paper's run, one GPU
    torchrun --nproc_per_node N train.py …                                the same run on N GPUs

Every epoch is validated; the best by val mIoU is tested (files of --out: docs/commands.md).
"""

import argparse
import io
import json
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import config
import data
from clip_model import CLIP_CONFIGS
from etris import text_to_pixel_loss
from evaluate import evaluate, grid_ceiling
from fast import compile_if_possible, recompute_decoder, set_fast
from methods.peft import METHODS
from predict import draw_predictions
from toy.scenes import FLAVOURS
from utils import common, distributed
from utils.common import AMP_CHOICES, DEVICE_CHOICES, SEED, Parser, UserError, integer
from utils.plots import draw_curves

METRICS = ("oIoU", "mIoU", "gIoU", "cIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")
DATASETS = "scenes[+|-g|-any], [g]refcoco, refcoco+, refcocog-umd|google, FOLDER; a comma mixes"


# -------------------------------------------------------------------------------------- arguments
def arguments(argv=None) -> argparse.Namespace:
    """The command line, completed by the preset of its system and backbone (config.py)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    model = parser.add_argument_group("Model")
    model.add_argument("--system", default="etris", help="etris, barleria or detris (etris)")
    model.add_argument("--backbone", help="one of config.py (the tiny one of the system)")
    model.add_argument("--tuning", default="bridger", help=f"joined by +: {', '.join(METHODS)}")
    model.add_argument("--weights", metavar="FILE", help="of the backbone: a file, or random")
    model.add_argument("--width", type=integer(1, 4096), help="of the Bridger (preset)")
    model.add_argument("--size", type=integer(1, 4096), help="side of the model's square (preset)")
    model.add_argument("--words", type=integer(), help="tokens per sentence (17 or 22: config.py)")
    model.add_argument("--dropout", type=float, help="probability (preset)")

    inputs = parser.add_argument_group("Data")
    inputs.add_argument("--dataset", default="scenes", help=f"{DATASETS} (scenes)")
    inputs.add_argument("--data", metavar="DIR", help="the folder that prepare.py filled (data)")
    inputs.add_argument("--limit", type=integer(), help="the first N objects of every split only")
    inputs.add_argument("--overfit", type=integer(), help="train and validate on N large objects")
    inputs.add_argument("--workers", type=integer(0, 64), help="loading processes (0; 8 on a GPU)")

    optim = parser.add_argument_group("Optimization")
    optim.add_argument("--epochs", type=integer(), help="passes over the data (preset)")
    optim.add_argument("--steps", type=integer(), help="optimizer steps, instead of --epochs")
    optim.add_argument("--batch-size", type=integer(), help="objects per step (preset)")
    optim.add_argument("--accumulate", type=integer(), default=1, help="micro-batches a step (1)")
    optim.add_argument("--lr", type=float, help="of the decoder; the Bridger's keeps its ratio")
    optim.add_argument("--schedule", choices=["step", "two-step", "cosine"], help="decay (preset)")

    run = parser.add_argument_group("Run")
    run.add_argument("--out", default="runs/latest", metavar="DIR", help="of the run (runs/latest)")
    run.add_argument("--resume", nargs="?", const=True, metavar="FILE", help="go on (OUT/last.pt)")
    run.add_argument("--device", default="auto", choices=DEVICE_CHOICES, help="where to run (auto)")
    run.add_argument("--amp", default="auto", choices=AMP_CHOICES, help="number format (auto)")
    run.add_argument("--compile", action="store_true", help="torch.compile the training step")
    run.add_argument("--recompute", action="store_true", help="the decoder twice, for memory")
    run.add_argument("--seed", type=SEED, default=0, help="of all that is random (0)")
    run.add_argument("--deterministic", action="store_true", help="the same run twice, bit for bit")
    return complete(parser.parse_args(argv))


def complete(args) -> argparse.Namespace:
    """Fill in the preset where the command line is silent. UserError for impossible values."""
    if args.system not in config.PRESETS:
        raise UserError(f"unknown --system {args.system!r}: choose etris, barleria or detris")
    presets = config.PRESETS[args.system]
    if args.backbone is None:
        args.backbone = config.DEFAULT_BACKBONES[args.system]
    if args.backbone not in presets:
        raise UserError(f"unknown backbone {args.backbone!r}: choose one of {', '.join(presets)}")
    preset = presets[args.backbone]
    if args.lr is not None and not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr}: choose a rate between 0 and 1, such as {preset.lr}")
    if args.steps and args.epochs:
        raise UserError(f"--steps {args.steps} and --epochs {args.epochs}: give only one of them")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise UserError(f"--dropout {args.dropout}: choose a probability from 0 to below 1")

    for name in ("size", "epochs", "batch_size", "lr", "schedule", "width", "dropout"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    args.bridge_lr = args.lr * (preset.bridge_lr / preset.lr)
    args.beta2 = preset.beta2
    if args.words is None:
        max_tokens = config.MAX_TOKENS[args.system]
        args.words = max(max_tokens.get(name.strip(), 17) for name in args.dataset.split(","))
    limit = CLIP_CONFIGS[args.backbone].context_length if args.backbone in CLIP_CONFIGS else 77
    checkpoint.check_max_tokens(args.words, limit)
    return args


# ------------------------------------------------------------------------------------------- data
def open_train_and_val(args) -> tuple[data.RefDataset, data.RefDataset]:
    train_set = data.open_dataset(args.dataset, "train", args.data, args.limit, args.size)
    if args.overfit:
        return largest_objects(train_set, args.overfit)
    return train_set, open_split(args, "val", instead=train_set)


def open_split(args, split, instead) -> data.RefDataset:
    """The val or test split, of a mix's first data set. `instead`, with a message, if none."""
    name = args.dataset
    if not Path(name).is_dir():
        name = name.split(",")[0].strip()
    limit = args.limit
    if limit is None and name in FLAVOURS:
        limit = config.SCENE_LIMITS[split]
    wanted = config.TEST_SPLITS.get(name, "test") if split == "test" else split
    try:
        return data.open_dataset(name, wanted, args.data, limit, args.size)
    except data.SplitNotFound as error:
        doing = "testing" if split == "test" else "validating"
        print(f"{doing} on the {instead.split} split: {error}")
        return instead


def largest_objects(dataset, count) -> tuple[data.RefDataset, data.RefDataset]:
    """The `count` objects that cover most of their image, of the first 200, 40 times each."""
    shares = np.array([dataset[i].mask.mean() for i in range(min(200, len(dataset)))])
    largest = np.argsort(-shares, kind="stable")[:count]
    samples = tuple(dataset[i] for i in largest.tolist())
    print(f"--overfit {count}: the largest of {len(shares)} objects train and validate")
    train_set = data.RefDataset(dataset.name, dataset.split, samples * 40)
    return train_set, data.RefDataset(dataset.name, dataset.split, samples)


# ----------------------------------------------------------------------------------- optimization
def parameter_groups(model, args) -> list[dict]:
    """Trainable parameters with their learning rates: the Bridger, a slowed CLIP, all others."""
    others = []
    bridger = []
    slowed = []  # methods.peft.full: CLIP learns at a tenth of the rate
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("bridger."):
            bridger.append(parameter)
        elif hasattr(parameter, "lr_scale"):
            slowed.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": others, "lr": args.lr}, {"params": bridger, "lr": args.bridge_lr}]
    if slowed:
        groups.append({"params": slowed, "lr": args.lr * slowed[0].lr_scale})
    return [group for group in groups if group["params"]]


def make_optimizer(model, args, device) -> torch.optim.Adam:
    """Section 4.2: Adam without weight decay."""
    fused = device.type != "mps"
    return torch.optim.Adam(parameter_groups(model, args), betas=(0.9, args.beta2), fused=fused)


def make_scheduler(optimizer, schedule, total_steps) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate's factor by step: "cosine", or a tenth at each of config.SCHEDULE_DROPS."""

    def factor(step):
        if schedule == "cosine":
            return cosine_with_warmup(step, total_steps)
        return step_decay(step, total_steps, config.SCHEDULE_DROPS[schedule])

    # fp16 may skip the first step, which torch takes for a wrong order of calls
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def step_decay(step, total_steps, drops) -> float:
    passed = [share for share in drops if step >= round(share * total_steps)]
    return 0.1 ** len(passed)


def cosine_with_warmup(step, total_steps, min_factor=0.01) -> float:
    """Linear warm-up over 50 steps (a tenth of a short run), then a cosine down to `min_factor`."""
    warmup_steps = min(50, total_steps // 10)
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    cosine = (1 + math.cos(math.pi * step / total_steps)) / 2
    return warmup * (min_factor + (1 - min_factor) * cosine)


def micro_batches(batch, count):
    """Split a batch into `count` parts: images, tokens and masks of each."""
    images = batch["image"].tensor_split(count)
    tokens = batch["tokens"].tensor_split(count)
    masks = batch["mask"].tensor_split(count)
    return list(zip(images, tokens, masks, strict=True))


def train_step(model, batch, optimizer, scaler, dtype, accumulate=1) -> float:
    """One optimizer step on `batch`, in `accumulate` micro-batches. Returns the mean loss.

    batch: image (B, 3, S, S) normalized, tokens (B, L), mask (B, 1, S, S) in 0..1, on one device.
    """
    module = getattr(model, "module", model)  # DistributedDataParallel wraps it
    batch_size = len(batch["image"])
    parts = micro_batches(batch, min(accumulate, batch_size))
    total_loss = 0.0
    for i, (images, tokens, masks) in enumerate(parts):
        last = i == len(parts) - 1
        with distributed.no_sync(model, last):
            # forward
            with torch.autocast(images.device.type, dtype, enabled=dtype is not torch.float32):
                logits = model(images, tokens)  # (b, 1, S/4, S/4)
                loss = text_to_pixel_loss(logits, masks, nearest=module.align_corners)
                loss = loss + module.auxiliary_loss()
            # backward: micro-batches add up to the gradient of the batch's mean loss
            weight = len(images) / batch_size
            scaler.scale(loss * weight).backward()
        total_loss = total_loss + loss.detach() * weight
    # update
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return float(total_loss)


def check_numbers(loss, scaler, state, batch):
    """UserError where the loss is not finite, or fp16 gradients overflow at every scale."""
    if math.isfinite(loss) and scaler.get_scale() >= 1:  # the scale is 1 where fp16 is not used
        return
    refs = batch["ref_id"].tolist()
    problem = f"the loss is {loss}" if not math.isfinite(loss) else "fp16 gradients overflow"
    remedy = "lower --lr or use --amp off, and go on from the last checkpoint with --resume"
    raise NonFiniteLoss(f"{problem} at step {state.global_step}, refs {refs}: {remedy}")


class NonFiniteLoss(UserError):
    """The numbers of the run are broken: nothing of it is saved any more."""


# -------------------------------------------------------------------------------------------- run
def setup(args) -> tuple[torch.device, torch.dtype]:
    """Seeds, processes, device and number format, printed with the reasons."""
    common.seed_all(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not exact
    if args.deterministic != torch.are_deterministic_algorithms_enabled():  # the call is slow
        torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic
    device, device_reason = common.pick_device(args.device)
    distributed.start(device)
    dtype, dtype_reason = common.pick_dtype(device, args.amp)
    if distributed.rank() > 0:
        sys.stdout = io.StringIO()  # only the first process speaks
    if args.workers is None:
        args.workers = common.default_workers(device)
    print(f"device {device}: {device_reason}; numbers {str(dtype)[6:]}: {dtype_reason}")
    return device, dtype


def make_model(args, device, **options):
    """The model of these arguments, on the fast path (fast.py)."""
    model = checkpoint.build_model(
        args.backbone,
        system=args.system,
        tuning=args.tuning,
        size=args.size,
        max_tokens=args.words,
        weights=args.weights,
        seed=args.seed,
        width=args.width,
        dropout=args.dropout,
        **options,
    )
    return set_fast(model).to(device, memory_format=torch.channels_last)


def count_steps(args, train_set) -> int:
    """Optimizer steps of the whole run. UserError where processes cannot share a batch equally."""
    batches = data.epoch_batches(len(train_set), args.batch_size, args.seed, epoch=0)
    processes = distributed.world_size()
    if len(batches[0]) % processes:
        raise UserError(f"a batch of {len(batches[0])} is not divisible by {processes} processes")
    return args.steps or args.epochs * len(batches)


def validate(args, model, dataset, device, dtype) -> dict:
    """evaluate.py's metrics; every process measures its share of the objects."""
    distributed.broadcast(model.buffers())  # BatchNorm statistics
    options = {"batch_size": 2 * args.batch_size, "dtype": dtype, "workers": args.workers}
    return evaluate(model, dataset, device, progress=distributed.rank() == 0, **options)[0]


def finish_epoch(args, model, metrics, scheduler, state, val_set):
    """Log the epoch, keep the best model by val mIoU, draw curves and predictions."""
    out = Path(args.out)
    epoch = state.epoch + 1
    checkpoint.append_log(
        out,
        epoch=epoch,
        step=state.global_step,
        loss=state.running_loss / max(1, state.batch_in_epoch),
        val=metrics,
        rate=scheduler.get_last_lr(),
        minutes=round(state.total_minutes(), 2),
    )
    tqdm.write(f"epoch {epoch}: val oIoU {metrics['oIoU']:.1f} mIoU {metrics['mIoU']:.1f}")
    if metrics["mIoU"] > state.best_miou:
        state.best_miou = metrics["mIoU"]
        checkpoint.save_checkpoint(out / "best.pt", model, args)
    draw_curves(out)
    draw_predictions(model, val_set, out / f"predictions_{epoch:02d}.png")


def test_best(args, model, val_set, device, dtype, state) -> dict:
    """Test best.pt and write result.json."""
    out = Path(args.out)
    if distributed.rank() == 0:
        best = checkpoint.read_checkpoint(out / "best.pt")
        checkpoint.restore_trainable(model, best, out / "best.pt")
    distributed.broadcast(model.trainable_state_dict().values())
    test_set = val_set if args.overfit else open_split(args, "test", instead=val_set)
    result = validate(args, model, test_set, device, dtype)
    result["minutes"] = round(state.total_minutes(), 2)
    result["steps"] = state.global_step
    numbers = "  ".join(f"{name} {result[name]:.2f}" for name in METRICS if name in result)
    print(f"{test_set.name} {test_set.split}, {result['sentences']:,} sentences: {numbers}")
    if distributed.rank() == 0:
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"try it:  python predict.py {out / 'best.pt'} --image IMAGE --text SENTENCE")
    return result


@common.command
def main(argv=None):
    args = arguments(argv)
    device, dtype = setup(args)
    train_set, val_set = open_train_and_val(args)
    print(f"data: {train_set.name} {train_set.split} {train_set.counts()}")
    model = make_model(args, device)
    common.print_parameters(model)
    if args.overfit:
        print(f"the logit grid's ceiling: mIoU {grid_ceiling(val_set, args.size)['mIoU']:.1f}")
    # the optimizer and the state of the run, new or where --resume goes on
    total_steps = count_steps(args, train_set)
    optimizer = make_optimizer(model, args, device)
    scheduler = make_scheduler(optimizer, args.schedule, total_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    state = checkpoint.start_or_resume(args, model, optimizer, scheduler, scaler)
    if distributed.rank() > 0:  # each process has its own dropout
        common.seed_all(args.seed + 10**6 * distributed.rank() + state.global_step)
    if distributed.rank() == 0:
        checkpoint.open_run_folder(args, model, distributed.world_size())
    # `model` is validated and saved; `train_model` shares its weights
    wrapped = distributed.wrap(recompute_decoder(model) if args.recompute else model)
    train_model = compile_if_possible(wrapped, device) if args.compile else wrapped
    samples = data.TrainDataset(train_set, args.size, args.words, args.seed)
    bar = tqdm(total=total_steps, initial=state.global_step, miniters=10, file=sys.stdout)

    def save():
        if distributed.rank() == 0:
            checkpoint.save_training(model, optimizer, scheduler, scaler, state, args)

    stop = common.StopFlag()
    stopping = False
    try:
        while state.global_step < total_steps or state.batch_in_epoch > 0:  # or still to validate
            # train for one epoch, from where the run stands
            model.train()
            start = state.batch_in_epoch
            for batch in data.train_loader(
                samples, args.batch_size, state.epoch, start, args.workers, device
            ):
                if stopping or state.global_step >= total_steps:
                    break
                batch = data.to_device(batch, device)
                loss = train_step(train_model, batch, optimizer, scaler, dtype, args.accumulate)
                loss, stopping = distributed.all_reduce_mean(loss, stop.requested)  # of any rank
                check_numbers(loss, scaler, state, batch)
                scheduler.step()
                state.count_step(loss)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
            if stopping:
                stop.ignore_signals()  # until the file is written
            save()
            # validate
            if not stopping:
                metrics = validate(args, model, val_set, device, dtype)
                if distributed.rank() == 0:
                    finish_epoch(args, model, metrics, scheduler, state, val_set)
                state.next_epoch()
                save()
            if stopping or stop.requested:
                bar.close()
                print(f"stopped: go on with --resume --out {args.out}")
                raise SystemExit(130)
        bar.close()
        return test_best(args, model, val_set, device, dtype, state)
    except NonFiniteLoss:
        raise
    except Exception:
        save()  # a damaged image, a full disk or a killed loading process costs no step
        raise
    finally:
        stop.restore_handlers()
        del wrapped, train_model  # or DistributedDataParallel outlives its group
        distributed.stop()


if __name__ == "__main__":
    main()
