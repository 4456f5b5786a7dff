"""The paper's tables: train their rows, in miniature or at full size, and print paper | here.

    python -m experiments.reproduce table6 --seeds 3         tiny CLIP, drawn scenes, a laptop
    python -m experiments.reproduce table6 --backbone RN101 --dataset refcoco --data data
                                                             the same at full size, one GPU
    python -m experiments.reproduce question                 does the Bridger help? paired over
                                                             seeds, with an interval
    python -m experiments.reproduce talk                     when does anything cross it?
    python -m experiments.reproduce counts                   the paper's parameter counts, in
                                                             seconds; nothing is trained

Rows of a table share steps, batches, their order, the decoder's first weights and the test scenes
(at full size each of the `systems` has its own preset; conditions of `talk` differ in what they
name). In miniature each row uses the one of three learning rates that does best on val with the
first seed, at full size its preset's; `talk` has one rate. The model after the last step is tested;
no best epoch is chosen.

RESULTS/runs.json holds every run under the settings that decide it (not under the code, whose
commit it names), so a run serves every table. An interrupted table goes on where it stood. What the
paper prints as oIoU is its code's mIoU (docs/differences.md). Other options go to train.py.
"""

import argparse
import functools
import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import train
from checkpoint import TrainState, build_model, resume_training, save_training
from config import OWN_BACKBONES, SCENE_LIMITS
from data import REFCOCO_FILES, TrainDataset, epoch_batches, open_dataset, to_device, train_loader
from evaluate import evaluate, group_scores
from experiments.cache import FrozenFeatureCache
from experiments.probe import PARTNERS, measure
from experiments.tables import (
    TABLES,
    Row,
    by_row,
    count_tuned,
    counts,
    differences,
    draw,
    draw_seeds,
    draw_traffic,
    report,
)
from methods.peft import parse_tuning
from toy.scenes import FLAVOURS
from utils.common import (
    ROOT,
    Parser,
    StopFlag,
    UserError,
    as_user_error,
    check_writable,
    command,
    integer,
    pick_device,
    pick_dtype,
    provenance,
    seed_all,
    write_file,
)

VERSION = 1  # of the results files
# of a run in miniature (one to four minutes); at full size the preset's epochs decide
STEPS = 600
QUESTION_STEPS = 2000
# in miniature: half the default run's, for more steps in the same minutes
BATCH_SIZE = 16
# in miniature; at full size the preset's only, for the tables are on val itself
RATES = (6.67e-4, 2e-3, 6e-3)
# the settings that decide a run's outcome, beside the row's own
CONFIGURATION = (
    "backbone",
    "dataset",
    "system",
    "size",
    "words",
    "batch_size",
    "accumulate",
    "schedule",
    "dropout",
    "width",
    "lr",
    "bridge_lr",
    "beta2",
    "weights",
    "limit",
    "seed",
    "steps",
    "amp",
)


# --------------------------------------------------------------------------------------------- data
@functools.cache
def open_split(name, split, data, limit, side):
    """A split, opened once for all rows: drawn scenes stay in memory."""
    return open_dataset(name, split, data, limit, side)


def open_splits(run_args) -> list:
    """Train, val and test. RefCOCO's tables are on val (section 5.1)."""
    test = "val" if run_args.dataset in REFCOCO_FILES else "test"
    splits = []
    for split in ("train", "val", test):
        limit = run_args.limit
        if limit is None and run_args.dataset in FLAVOURS:
            limit = SCENE_LIMITS.get(split)
        splits.append(open_split(run_args.dataset, split, run_args.data, limit, run_args.size))
    return splits


def data_hash(run_args) -> str:
    """Tells changed data of one name apart: split sizes, the first and last object of each."""
    digest = hashlib.sha256()
    for split in open_splits(run_args):
        for sample in (split[0], split[len(split) - 1]):
            digest.update(f"{len(split)} {sample.sentences}".encode())
            digest.update(sample.image.tobytes())
            digest.update(sample.mask.tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------ one run
def make_run_args(row, args, extra_args, rate=None, seed=0) -> argparse.Namespace:
    """train.py's arguments for a run of this row."""
    backbone = args.backbone
    if row.backbones:
        miniature, full_size = row.backbones
        backbone = miniature if args.miniature else full_size
    options = ["--backbone", backbone, "--dataset", args.dataset]
    options += ["--system", row.system, "--tuning", row.tuning, "--seed", str(seed)]
    if args.miniature:
        options += ["--batch-size", str(BATCH_SIZE)]
    options += row.arguments
    options += extra_args
    if row.width is not None:
        options += ["--width", str(row.width)]
    if rate is not None:
        options += ["--lr", str(rate)]
    run_args = train.arguments(options)
    run_args.bridge_lr *= row.bridge_rate
    batches = epoch_batches(len(open_splits(run_args)[0]), run_args.batch_size, seed, epoch=0)
    run_args.steps = row.longer * (args.steps or run_args.epochs * len(batches))
    return run_args


@functools.cache
def backbone_hash(system, backbone, weights, size, seed) -> str:
    model = build_model(backbone, system=system, weights=weights, size=size, seed=seed)
    return model.backbone.identity["sha256"]


def configuration(run_args, row) -> dict:
    """All that decides a run's outcome. Two rows with the same configuration are the same run."""
    config = {name: getattr(run_args, name) for name in CONFIGURATION}
    config["tuning"] = "+".join(parse_tuning(run_args.tuning))
    config["frozen"] = backbone_hash(
        run_args.system,
        run_args.backbone,
        run_args.weights,
        run_args.size,
        run_args.seed if run_args.weights == "random" else 0,
    )
    config["data"] = data_hash(run_args)
    config.update(row.build)
    if row.traffic:
        config["traffic"] = True
    return json.loads(json.dumps(config))  # as a file gives it back: tuples are lists


def run_once(run_args, row, bar, cache, stop) -> dict:
    """Train and test one configuration → what results files keep of it."""
    device, _ = pick_device(run_args.device)
    dtype, _ = pick_dtype(device, run_args.amp)
    if run_args.workers is None:
        run_args.workers = 4 if device.type == "cuda" else 0
    train_set, val_set, test_set = open_splits(run_args)
    seed_all(run_args.seed)
    model = train.make_model(run_args, device, **row.build)
    seed_all(run_args.seed)  # the same dropout, whatever was built
    with cache.attached_to(model):
        state = train_model(run_args, model, train_set, device, dtype, bar, stop)
        seconds = 60 * state.total_minutes()
        val, _ = evaluate_run(run_args, model, val_set, device, dtype)
        result, rows = evaluate_run(run_args, model, test_set, device, dtype)
        if row.traffic:
            names = ("none", "image only", "text only", *PARTNERS)
            result["traffic"] = measure(model, test_set, device, names=names, progress=False)
    return {
        **provenance(run_args.seed, model.backbone.identity),
        "steps": run_args.steps,
        "rate": run_args.lr,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "tuned": count_tuned(model),
        "tuned_encoders": count_tuned(model, encoders=True),
        **result,
        "val": val,
        "kinds": group_scores(rows, "kind") if "kind" in rows[0] else {},
    }


def train_model(run_args, model, train_set, device, dtype, bar, stop) -> TrainState:
    """train.py's loop without validation. Ctrl-C saves the run after the step that is running."""
    optimizer = train.make_optimizer(model, run_args, device)
    scheduler = train.make_scheduler(optimizer, run_args.schedule, run_args.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    state = TrainState()
    last = Path(run_args.out, "last.pt")
    if last.exists():
        state = resume_training(last, model, optimizer, scheduler, scaler, run_args)
        bar.update(state.global_step)

    samples = TrainDataset(train_set, run_args.size, run_args.words, run_args.seed)
    step_model = torch.compile(model) if run_args.compile else model
    while state.global_step < run_args.steps:
        model.train()
        loader = train_loader(
            samples,
            run_args.batch_size,
            state.epoch,
            start=state.batch_in_epoch,
            workers=run_args.workers,
            device=device,
        )
        for batch in loader:
            batch = to_device(batch, device)
            loss = train.train_step(
                step_model, batch, optimizer, scaler, dtype, run_args.accumulate
            )
            train.check_numbers(loss, scaler, state, batch)
            scheduler.step()
            state.count_step(loss)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if stop.requested or state.global_step == run_args.steps:
                break
        else:
            state.next_epoch()
        if stop.requested:
            break
    save_training(model, optimizer, scheduler, scaler, state, run_args)
    if stop.requested:
        raise Stopped(f"at step {state.global_step:,}")
    return state


class Stopped(Exception):
    """Ctrl-C or SIGTERM: what was done is saved."""


def evaluate_run(run_args, model, dataset, device, dtype) -> tuple[dict, list]:
    return evaluate(
        model,
        dataset,
        device,
        batch_size=2 * run_args.batch_size,
        dtype=dtype,
        workers=run_args.workers,
        progress=False,
    )


# ------------------------------------------------------------------------------------------ results
def read_results(path) -> dict:
    """A results file, or an empty one; UserError for another version, which is left alone."""
    if not path.exists():
        return {"version": VERSION, "runs": {}}
    with as_user_error(path, "it is no results file: move it away"):
        file = json.loads(path.read_text(encoding="utf-8"))
        version = file["version"]
    if version != VERSION:
        remedy = "move it away or give another --results"
        raise UserError(f"{path}: version {version}, this code writes {VERSION}: {remedy}")
    return file


def write_results(path, file):
    write_file(path, json.dumps(file, indent=1).encode())


class Results:
    """Every run by its configuration, in RESULTS/runs.json; .unfinished/ holds a stopped one."""

    def __init__(self, folder, stop):
        self.path = folder / "runs.json"
        self.file = read_results(self.path)
        self.cache = FrozenFeatureCache()
        self.stop = stop

    def get(self, row, run_args, bar) -> dict:
        """The run of that row with these arguments: looked up, or done now."""
        runs = self.file["runs"]
        config = configuration(run_args, row)
        key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        if key in runs:
            bar.update(run_args.steps)
            return runs[key]
        folder = self.path.with_name(".unfinished") / key
        run_args.out = str(folder)
        bar.set_description(f"{row.name}, rate {run_args.lr:g}, seed {run_args.seed}")
        run = run_once(run_args, row, bar, self.cache, self.stop)
        runs[key] = {**run, "config": config}
        write_results(self.path, self.file)
        shutil.rmtree(folder)
        if self.stop.requested:
            raise Stopped("after a finished run")
        return runs[key]


# ------------------------------------------------------------------------------------------- tables
def run_table(name, args, extra_args, stop):
    """Every row at its best rate and with every seed; the table is written after each row."""
    rows = choose_rows(name, args.rows)
    results = Results(args.results, stop)
    rates = {row.name: rates_of(row, args, extra_args) for row in rows}
    total_steps = 0
    for row in rows:
        run_count = len(rates[row.name]) + args.seeds - 1
        total_steps += run_count * make_run_args(row, args, extra_args).steps

    runs = []
    with tqdm(total=total_steps, unit="step", dynamic_ncols=True) as bar:
        for row in rows:
            # the rate that does best on val with the first seed
            tried = []
            for rate in rates[row.name]:
                run_args = make_run_args(row, args, extra_args, rate, seed=0)
                tried.append(results.get(row, run_args, bar))
            best = max(tried, key=lambda run: run["val"]["mIoU"])
            # the other seeds at that rate
            runs.append({"row": row.name, **best})
            for seed in range(1, args.seeds):
                run_args = make_run_args(row, args, extra_args, best["rate"], seed)
                runs.append({"row": row.name, **results.get(row, run_args, bar)})
            write_table(name, args, runs)


def rates_of(row, args, extra_args) -> list[float]:
    """The three to choose from; only one at full size, or where the command line gives it."""
    if row.rate and args.miniature:
        return [row.rate]
    is_given = any(option.split("=")[0] == "--lr" for option in extra_args)
    if args.miniature and not is_given:
        return list(RATES)
    return [make_run_args(row, args, extra_args).lr]


def choose_rows(name, wanted) -> list[Row]:
    """The rows of a table with these names, in its order; all where none is given."""
    _, rows = TABLES[name]
    if not wanted:
        return list(rows)
    known = [row.name for row in rows]
    for row in wanted:
        if row not in known:
            raise UserError(f"{name} has no row {row!r}: choose of {'; '.join(known)}")
    return [row for row in rows if row.name in wanted]


def table_path(name, args) -> Path:
    """RESULTS/table6.json; RESULTS/table6-RN101-refcoco.json for another backbone or dataset."""
    if (args.backbone, args.dataset) != ("tiny", "scenes"):
        name = f"{name}-{args.backbone}-{Path(args.dataset).name}"
    return args.results / f"{name}.json"


def write_table(name, args, runs):
    """The table's .json, .md and .png: these runs, and comparable rows of an earlier call."""
    path = table_path(name, args)
    title, rows = TABLES[name]
    order = [row.name for row in rows]
    before = read_results(path)
    runs = list(runs)
    new_rows = by_row(runs)
    has_own_presets = name == "systems" and not args.miniature
    for run in before["runs"]:
        is_kept = run["row"] in order and run["row"] not in new_rows
        if is_kept and comparable(run, runs[0], has_own_presets):
            runs.append(run)
    runs.sort(key=lambda run: order.index(run["row"]))

    file = {"version": VERSION, "table": name, "runs": runs}
    if name == "question" and {"fix backbone", "ETRIS"} <= set(by_row(runs)):
        file["difference"] = differences(runs)
    if "costs" in before:  # of systems.json, measured by an earlier version
        file["costs"] = before["costs"]
    write_results(path, file)
    write_file(path.with_suffix(".md"), report(file).encode())
    plots = {"question": draw_seeds, "talk": draw_traffic}
    plot = plots.get(name, draw)
    plot(title, runs, path.with_suffix(".png"))


def comparable(run, other, has_own_presets) -> bool:
    """Whether two runs may stand in one table: the same data, and the same work."""
    if run["config"].get("traffic"):  # conditions differ in all of it
        return True
    names = ["data", "dataset"]
    if not has_own_presets:
        names += ["steps", "size", "batch_size"]
    return all(run["config"][name] == other["config"][name] for name in names)


# ------------------------------------------------------------------------------------- command line
def arguments(argv=None) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, completed, and those for train.py."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*TABLES, "counts"])
    parser.add_argument("table", metavar="TABLE", help=names)
    parser.add_argument("--seeds", type=integer(), help="runs of each row (3; question: 5)")
    parser.add_argument(
        "--steps", type=integer(), help=f"in miniature ({STEPS}; question, talk: {QUESTION_STEPS})"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--backbone", default="tiny", help="tiny, small: in miniature (tiny)")
    parser.add_argument("--dataset", default="scenes", help="as train.py's (scenes)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "results", metavar="DIR", help="where (results)"
    )
    args, extra_args = parser.parse_known_args(argv)
    if args.table != "counts" and args.table not in TABLES:
        raise UserError(f"unknown table {args.table!r}: choose one of {names}")
    for option in extra_args:
        if option.split("=")[0] in ("--seed", "--system", "--tuning"):
            remedy = "choose by --rows and --seeds"
            raise UserError(f"{option}: the table's rows and seeds decide that: {remedy}")
    is_question = args.table in ("question", "talk")
    args.seeds = args.seeds or (5 if args.table == "question" else 3)
    args.miniature = args.backbone in OWN_BACKBONES
    if args.miniature:
        args.steps = args.steps or (QUESTION_STEPS if is_question else STEPS)
    return args, extra_args


@command
def main(argv=None):
    args, extra_args = arguments(argv)
    if args.table == "counts":
        print(counts())
        return
    # mistakes show before anything is trained
    make_run_args(choose_rows(args.table, args.rows)[0], args, extra_args)
    path = table_path(args.table, args)
    check_writable(path)
    read_results(path)

    stop = StopFlag()
    try:
        run_table(args.table, args, extra_args, stop)
    except Stopped as stopped:
        print(f"\nstopped {stopped}; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        stop.restore_handlers()
    print(report(read_results(path)))


if __name__ == "__main__":
    main()
