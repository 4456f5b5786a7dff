"""Checkpoints: build a model from plain values, save and load what was trained, resume exactly.

A checkpoint holds the trainable tensors, the values that rebuild the model (`config`) and the
SHA-256 of the frozen backbone (`identity`), never the frozen tensors. `last.pt` also holds what a
run needs to go on as if it had never stopped.
"""

import io
import json
import random
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from torch import nn

from clip_model import load_clip
from config import PRESETS
from etris import build_etris
from methods.barleria import build_barleria
from methods.detris import ALIGNED_BLOCKS, build_detris, load_backbones
from methods.peft import apply_tuning, parse_tuning
from methods.published import NUMPY_TYPES, from_official, is_official
from utils.clip_weights import LOAD_ERRORS
from utils.common import READ_ERRORS, UserError, as_user_error, provenance, write_file

VERSION = 2  # of the file's layout
BUILDERS = {"etris": build_etris, "barleria": build_barleria, "detris": build_detris}
# what build_model raises over values that it cannot use
CONFIG_ERRORS = (*READ_ERRORS, RuntimeError, AttributeError, ZeroDivisionError)


# ------------------------------------------------------------------------------------------- build
def build_model(
    backbone="tiny",
    *,
    system="etris",
    tuning="bridger",
    size=128,
    max_tokens=17,
    weights=None,
    seed=0,
    **options,
) -> nn.Module:
    """A model in training mode, from plain values that a checkpoint carries as `config`.

    tuning: names of methods.peft.METHODS joined by +; without "bridger" ETRIS has no bridges.
    weights: of the frozen backbone: a file, "random", or None for the shipped or official ones.
    seed: of random weights. options: those of the system's own build function.
    UserError for an unknown name, or for weights that do not fit.
    """
    if system not in BUILDERS:
        raise UserError(f"unknown --system {system!r}: choose one of {', '.join(BUILDERS)}")
    presets = PRESETS[system]
    if backbone not in presets:
        choices = ", ".join(presets)
        raise UserError(f"--system {system} with --backbone {backbone}: choose one of {choices}")
    names = parse_tuning(tuning)
    if "bridger" not in names:
        if system != "etris":
            raise UserError(
                f"--tuning {tuning}: {system} always trains its own modules: write bridger+{tuning}"
            )
        options["stages"] = ()
    options = {"width": presets[backbone].width, **options}

    if system == "detris":
        backbones = load_backbones(backbone, weights, seed)
        options = {**ALIGNED_BLOCKS[backbone], **options}
    else:
        backbones = [load_clip(backbone, weights, seed)]
    check_max_tokens(max_tokens, backbones[0].config.context_length)
    model = BUILDERS[system](*backbones, size, max_tokens, **options)
    apply_tuning(model, names)

    model.config = {
        "backbone": backbone,
        "system": system,
        "tuning": "+".join(names),
        "size": size,
        "max_tokens": max_tokens,
        "seed": seed,
        **options,
        **model.options,  # the defaults of today, which a later version may change
    }
    if weights == "random":
        model.config["weights"] = "random"
    return model


def check_max_tokens(max_tokens, limit):
    """UserError where CLIP's text encoder has fewer positions (`limit`) than that."""
    if not 3 <= max_tokens <= limit:
        raise UserError(f"--words {max_tokens}: choose 3 to {limit}, the frozen CLIP's limit")


# -------------------------------------------------------------------------------------------- load
def read_checkpoint(path) -> dict:
    """A checkpoint file's dict: ours, or one that the authors published. Runs no code from it.

    UserError for a file that is no checkpoint, is damaged, or has another version.
    """
    if not Path(path).is_file():
        raise UserError(
            f"{path}: no such checkpoint: `python train.py --out DIR` writes one, DIR/best.pt"
        )
    remedy = "give another checkpoint file"
    with as_user_error(path, remedy, LOAD_ERRORS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the authors' files hold a few numbers of numpy's beside the tensors
        with torch.serialization.safe_globals(NUMPY_TYPES):
            file = torch.load(path, map_location="cpu", weights_only=True)
    if is_official(file):
        return file
    if not isinstance(file, dict) or not {"version", "config", "tuned"} <= set(file):
        raise UserError(f"{path}: holds no checkpoint, ours or the authors': give another file")
    if file["version"] != VERSION:
        raise UserError(
            f"{path}: checkpoint version {file['version']}, this code reads {VERSION}: train again"
        )
    with as_user_error(path, remedy):
        check_layout(file)
    return file


def check_layout(file):
    """KeyError or ValueError where the file does not hold what save_checkpoint writes."""
    for name in ("config", "tuned", "identity", "args"):
        if not isinstance(file[name], dict):
            raise ValueError(f"its {name} is a {type(file[name]).__name__}")
    for name, tensor in file["tuned"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"its tuned {name} is no tensor")
    for name in ("name", "sha256"):
        if not isinstance(file["identity"][name], str):
            raise ValueError(f"its backbone's {name} is no text")


def load_checkpoint(path, weights=None, device="cpu", max_tokens=None) -> nn.Module:
    """A checkpoint file, ours or published → the model in evaluation mode on `device`, plain path.

    weights: the frozen backbone's file, where it is neither shipped nor in the cache. It must be
    the one that the checkpoint was trained on (SHA-256). max_tokens: where a sentence is cut; an
    ETRIS that was published for RefCOCOg was trained with 22, not 17.
    """
    file = read_checkpoint(path)
    try:
        if is_official(file):
            model = from_official(file)
        else:
            model = build_from_file(file, path, weights)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error
    if max_tokens:
        check_max_tokens(max_tokens, model.backbone.config.context_length)
        model.max_tokens = max_tokens
    return model.eval().to(device)


def build_from_file(file, path, weights) -> nn.Module:
    """The model that a checkpoint of ours describes, with its trained tensors."""
    config = file["config"]
    if weights:
        config = {**config, "weights": str(weights)}
    with as_user_error(path, "it is damaged: give another file", CONFIG_ERRORS):
        model = build_model(**config)
    restore_trainable(model, file, path)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    identity = model.backbone.identity
    print(
        f"{Path(path).name}: {count:,} trained parameters; frozen backbone: {identity['name']}, "
        f"{identity['weights']}"
    )
    return model


def restore_trainable(model, file, path):
    """Copy a checkpoint's tensors into the model. UserError where they do not belong to it."""
    theirs = file["identity"]
    ours = model.backbone.identity
    if theirs["sha256"] != ours["sha256"]:
        raise UserError(
            f"{path}: was trained on a frozen {theirs['name']} {theirs['sha256'][:12]}…, this one "
            f"is {ours['name']} {ours['sha256'][:12]}…: give its --weights FILE"
        )
    stored = file["tuned"]
    expected = model.trainable_state_dict()
    mismatched = set(stored) ^ set(expected)
    for name in set(stored) & set(expected):
        if stored[name].shape != expected[name].shape or not stored[name].isfinite().all():
            mismatched.add(name)
    if mismatched:
        raise UserError(
            f"{path}: {len(mismatched)} tensors do not fit this model or are not finite, "
            f"{min(mismatched)} first: give another file"
        )
    model.load_state_dict(stored, strict=False)


# -------------------------------------------------------------------------------------------- save
@dataclass
class TrainState:
    """Where a run stands."""

    epoch: int = 0  # finished epochs
    batch_in_epoch: int = 0
    global_step: int = 0
    best_miou: float = -1.0  # on val
    running_loss: float = 0.0  # summed over the epoch's batches
    minutes: float = 0.0  # before the process that runs now
    started: float = field(default_factory=time.time)

    def total_minutes(self) -> float:
        return self.minutes + (time.time() - self.started) / 60

    def count_step(self, loss: float):
        self.batch_in_epoch += 1
        self.global_step += 1
        self.running_loss += loss

    def next_epoch(self):
        self.epoch += 1
        self.batch_in_epoch = 0
        self.running_loss = 0.0


def save_checkpoint(path, model, args, training=None):
    """Write a checkpoint whole or not at all. Without `training` it holds a model to share."""
    tensors = {name: x.detach().cpu() for name, x in model.trainable_state_dict().items()}
    broken = [name for name, x in tensors.items() if not x.isfinite().all()]
    if broken:
        raise UserError(
            f"{path} is not written: {broken[0]} is not finite any more: lower --lr, or --amp off"
        )
    file = {
        "version": VERSION,
        "system": model.system,
        "config": model.config,
        "tuned": tensors,
        "identity": model.backbone.identity,
        "args": vars(args),
        "training": training,
    }
    buffer = io.BytesIO()
    torch.save(file, buffer)
    write_file(path, buffer.getbuffer())


def save_training(model, optimizer, scheduler, scaler, state, args):
    """Write --out's last.pt: the model and all that a run needs to go on exactly."""
    training = {
        "state": {**asdict(state), "minutes": state.total_minutes()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "random": random_states(),
    }
    save_checkpoint(Path(args.out, "last.pt"), model, args, training)


def random_states() -> dict:
    """The states of all random generators, as plain numbers and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "python": list(random.getstate()[1]),
        "cuda": torch.cuda.get_rng_state_all(),
    }
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states):
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    random.setstate((3, tuple(states["python"]), None))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


# ------------------------------------------------------------------------------------------ resume
def resume_training(path, model, optimizer, scheduler, scaler, args) -> TrainState:
    """Go on where `path` stood: everything as if the run had never stopped.

    Learning rates, schedule and betas are those of today's command line. UserError where the
    checkpoint belongs to another model, data set or batch size.
    """
    file = read_checkpoint(path)
    if not file.get("training"):
        raise UserError(
            f"{path}: holds a model, not a run to continue: --resume takes a run's last.pt"
        )
    check_same_run(path, file["args"], args)
    restore_trainable(model, file, path)

    training = file["training"]
    fresh = []
    for group in optimizer.param_groups:
        fresh.append({name: value for name, value in group.items() if name != "params"})
    with as_user_error(path, "it is damaged: give another --resume", LOAD_ERRORS):
        # the stored states carry the old command line's settings: set those of today's
        for group, settings in zip(training["optimizer"]["param_groups"], fresh, strict=True):
            group.update(settings)
        optimizer.load_state_dict(training["optimizer"])
        scheduler.load_state_dict(training["scheduler"])
        if training["scaler"]:  # empty unless the run was in fp16 until now
            scaler.load_state_dict(training["scaler"])
        set_random_states(training["random"])
        if not all(isinstance(x, int | float) for x in training["state"].values()):
            raise ValueError("its state is not made of numbers")
        state = TrainState(**{**training["state"], "started": time.time()})
    factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return state


def start_or_resume(args, model, optimizer, scheduler, scaler) -> TrainState:
    """A fresh state, or that of the checkpoint that --resume names (OUT/last.pt)."""
    state = TrainState()
    path = Path(args.out, "last.pt") if args.resume is True else Path(args.resume or "")
    if args.resume is True and not path.exists():
        print(f"{path} does not exist: starting fresh")
    elif args.resume:
        state = resume_training(path, model, optimizer, scheduler, scaler, args)
        if not Path(args.out, "best.pt").exists():  # another run's best is not in this folder
            state.best_miou = -1.0
        print(f"continuing from {path} at step {state.global_step:,}")
    return state


def check_same_run(path, theirs: dict, args):
    """UserError where a setting that cannot change within a run has changed."""
    names = ["backbone", "dataset", "system", "tuning", "size", "words", "seed", "batch_size"]
    names += ["limit", "overfit"]
    for name in names:
        before = theirs.get(name)
        now = getattr(args, name)
        same = same_dataset(before, now) if name == "dataset" else before == now
        if not same:
            option = name.replace("_", "-")
            raise UserError(
                f"{path}: was trained with --{option} {before}, not {now}: give the same --{option}"
            )


def same_dataset(before, now) -> bool:
    """Whether two values of --dataset name the same data: ./mine is mine, on another machine too.

    Two different folders of this machine are not the same, whatever their names.
    """
    if Path(before).is_dir() and Path(now).is_dir():
        return Path(before).samefile(now)
    return folder_names(before) == folder_names(now)


def folder_names(dataset) -> list[str]:
    """--dataset's names, or the last parts of its folders, in Windows' spelling or ours."""
    parts = [dataset] if Path(dataset).is_dir() else dataset.split(",")
    return [PureWindowsPath(Path(part.strip()).resolve()).name for part in parts]


# -------------------------------------------------------------------------------------- run folder
def open_run_folder(args, model, processes=1):
    """--out with args.json and the log's first line. A run that lies there is moved aside."""
    out = Path(args.out)
    if (out / "log.jsonl").exists() and not args.resume:
        number = 1
        while out.with_name(f"{out.name}-{number}").exists():
            number += 1
        aside = out.with_name(f"{out.name}-{number}")
        out.rename(aside)
        print(f"{out} held a run: moved to {aside} (--resume continues a run)")
    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n", encoding="utf-8")
    if not (out / "log.jsonl").exists():
        origin = provenance(args.seed, model.backbone.identity)
        append_log(out, **origin, processes=processes)


def append_log(out, **line):
    with open(Path(out, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
