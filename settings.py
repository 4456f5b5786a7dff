"""4a. What a run is asked: presets by backbone and data set, the command line that overrides them, and its data.

PRESETS is the paper's section 4.2 for the official backbones, and minutes on two cores for the tiny ones. Another
system's file has a PRESETS of its own.
"""

import argparse
import importlib
from pathlib import Path

import numpy as np

from clip_model import SIZES
from command import SEED, Parser, UserError, integer
from data import FLAVOURS, NoSplit, Source, open_dataset
from tuning import METHODS, SYSTEMS

PAPER = {"size": 416, "epochs": 50, "batch_size": 32, "lr": 1e-4, "bridge_lr": 1e-4, "schedule": "step", "width": 64,
         "dropout": 0.1, "beta2": 0.999}  # fmt: skip
TINY = {"size": 128, "epochs": 9, "batch_size": 32, "lr": 1.2e-3, "bridge_lr": 1.2e-3, "schedule": "cosine",
        "width": 32, "dropout": 0.0, "beta2": 0.98, "processes": 2}  # fmt: skip
PRESETS = dict.fromkeys(SIZES, PAPER) | {"ViT-B-16": PAPER | {"bridge_lr": 1e-3}, "tiny": TINY,
                                         "tiny-vit": TINY | {"size": 96, "processes": 1}}  # fmt: skip
PRESETS |= dict.fromkeys(["ViT-L-14", "ViT-L-14-336px"], PAPER | {"size": 420})  # patches of 14
DROPS = {"step": (35 / 50,), "two-step": (35 / 65, 55 / 65)}  # shares of a run: ETRIS (section 4.2), DETRIS' base
WORDS = {"refcocog-umd": 22, "refcocog-google": 22, "scenes-g": 22}  # 17 elsewhere (section 4.2)
ENOUGH = {"val": 200, "test": 500}  # of drawn scenes, which have no end
TEST = {"refcoco": "testA", "refcoco+": "testA", "refcocog-google": "val"}  # "test" elsewhere


def arguments(argv, about=None):
    """The command line, completed by the preset of its system and backbone. about: what --help says first."""
    text = "\n".join(f"  {name:<15}{PRESETS[name]}" for name in PRESETS)
    parser = Parser(description=about, epilog=f"presets:\n{text}\nwords: 17, {WORDS}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--backbone", metavar="NAME", help="(the system's tiny one) " + ", ".join(SIZES))
    add("--system", default="etris", metavar="NAME", help=", ".join(SYSTEMS))
    add("--tuning", default="bridger", metavar="HOW", help="joined by +: " + ", ".join(METHODS))
    add("--dataset", default="scenes", metavar="NAME", help="scenes[+|-g], refcoco[+], refcocog-umd|google, a FOLDER")
    add("--data", metavar="DIR", help="the folder prepare.py filled (data)")
    add("--weights", metavar="FILE", help="frozen CLIP: a file, or random")
    add("--out", default="runs/latest", metavar="DIR")
    add("--resume", nargs="?", const=True, metavar="CHECKPOINT", help="go on; without a value from OUT/last.pt")
    for name in ("epochs", "steps", "batch-size", "size", "words", "width", "limit", "overfit"):
        add(f"--{name}", type=integer(1, 4096) if name in ("size", "width") else integer(), metavar="N")
    add("--accumulate", type=integer(), default=1, metavar="N", help="micro-batches per step, against lack of memory")
    add("--recompute", action="store_true", help="forget frozen activations, compute them twice: less memory")
    add("--compile", action="store_true", help="torch.compile after 20 steps: minutes, then it says what that bought")
    add("--lr", type=float, help="of the decoder; the Bridger's keeps its ratio to it")
    add("--schedule", choices=[*DROPS, "cosine"])
    add("--dropout", type=float)
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto")
    add("--workers", type=integer(0, 64), metavar="N", help="loading processes (0 on a CPU, else 4)")
    add("--processes", type=integer(1, 64), metavar="N", help="that share a batch on a CPU (1; see presets)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--seed", type=SEED, default=0)
    add("--deterministic", action="store_true", help="the same run twice on one machine, slower on a GPU")
    return complete(parser.parse_args(argv))


def complete(args):
    """Fill in the preset of system and backbone where the command line says nothing."""
    if args.system not in SYSTEMS:
        raise UserError(f"unknown --system {args.system!r}: choose one of {', '.join(SYSTEMS)}")
    presets = getattr(importlib.import_module(args.system), "PRESETS", PRESETS)
    args.backbone = args.backbone or next(name for name in presets if name.startswith("tiny"))
    if args.backbone not in presets:
        raise UserError(f"unknown backbone {args.backbone!r}: choose one of {', '.join(presets)}")
    preset = presets[args.backbone]
    if args.lr is not None and not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr}: choose a rate between 0 and 1, such as {preset['lr']}")
    if args.steps and args.epochs:
        raise UserError(f"--steps {args.steps} and --epochs {args.epochs}: give one of them, the other follows")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise UserError(f"--dropout {args.dropout}: choose a share from 0 to below 1")
    args.bridge_lr = (args.lr or preset["lr"]) * (preset["bridge_lr"] / preset["lr"])
    for key, value in preset.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    args.processes = args.processes or 1
    args.words = args.words or max(WORDS.get(part.strip(), 17) for part in args.dataset.split(","))
    context = SIZES[args.backbone].context if args.backbone in SIZES else 77
    if not 3 <= args.words <= context:
        raise UserError(f"--words {args.words}: choose 3 to {context}, the frozen CLIP's limit")
    return args


def largest(source, count) -> tuple[Source, Source]:
    """The `count` objects with the largest share of their picture, of the first 200, repeated to a useful epoch."""
    items = sorted((source[i] for i in range(min(200, len(source)))), key=lambda item: -np.mean(item.mask))[:count]
    print(f"--overfit {count}: the largest of {min(200, len(source))} objects, trained and validated on the same")
    return Source(source.name, source.split, (*items,) * 40), Source(source.name, source.split, (*items,))


def open_evaluation(args, split, instead):
    """A split of the data set (of the first one, where --dataset mixes several); without one `instead`, and said."""
    name = args.dataset if Path(args.dataset).is_dir() else args.dataset.split(",")[0]
    limit = args.limit or (ENOUGH.get(split) if name in FLAVOURS else None)
    try:
        return open_dataset(name, TEST.get(name, split) if split == "test" else split, args.data, limit, args.size)
    except NoSplit as error:
        print(f"{'testing' if split == 'test' else 'validating'} on the {instead.split} split: {error}")
        return instead


def open_sources(args):
    """Train and val sources; without a val split (a folder of one's own may have none) val is train, and said so."""
    train = open_dataset(args.dataset, "train", args.data, args.limit, args.size)
    if args.overfit:
        return largest(train, args.overfit)
    return train, open_evaluation(args, "val", train)
