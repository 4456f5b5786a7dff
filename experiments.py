"""10. The paper's tables (tables.py): trains their rows in miniature or at full size, and prints paper | here.

    python experiments.py table6 --seeds 3                                  tiny CLIP, drawn scenes, a laptop
    python experiments.py table6 --backbone RN101 --dataset refcoco --data data        the same at full size, one GPU
    python experiments.py question                      does the Bridger help? paired over seeds, with an interval
    python experiments.py counts                        the paper's parameter counts, in seconds, nothing is trained

Rows of a table share steps, batches, their order, the decoder's first weights and the test scenes (at full size each of
the `systems` has its own preset); each row's rate is the one of three that does best on val with the first seed. The
model after the last step is tested; none is picked. A run stands in RESULTS/runs.json under all that decides it but the
code, whose commit it names, so it serves every table; an interrupted table goes on.
What the paper prints as oIoU is its code's mIoU (README, ledger). Options that are not listed go to train.py.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import operator
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import train
from clip_model import HERE
from command import Parser, UserError, command, integer
from data import REFER, open_dataset
from evaluate import evaluate, group_scores, write_file
from official import pick_device, pick_dtype
from scenes import FLAVOURS
from settings import ENOUGH
from tables import TABLES, Row, by_row, count_tuned, counts, differences, draw, report
from tuning import build, parse

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two processes off one folder
    fcntl = None

VERSION = 1  # of the results files
FEW, STEPS = 600, {"question": 2000}  # of a run in miniature, 150 s at most; at full size the preset's epochs
BATCH = 16  # in miniature: 600 steps of 16 gave 33.6 mIoU in the time in which 300 of 32 gave 29.8 (ETRIS, two seeds)
RATES = (6.67e-4, 2e-3, 6e-3)  # in miniature; at full size the preset's own, for the tables are on val itself
REMEMBER = 2 * 2**30  # bytes of features that are kept


# ------------------------------------------------------------------------------------------- what rows share
@functools.cache
def open_split(dataset, split, data, limit, side):
    return open_dataset(dataset, split, data, limit, side)


def sources(args):
    """Train, val and test; of drawn scenes each is drawn once. RefCOCO's tables are on val (section 5.1)."""
    enough = ENOUGH if args.dataset in FLAVOURS else {}
    splits = ("train", "val", "val" if args.dataset in REFER else "test")
    limits = [args.limit or enough.get(split) for split in splits]
    pairs = zip(splits, limits, strict=True)
    return [open_split(args.dataset, split, args.data, limit, args.size) for split, limit in pairs]


def data_hash(args) -> str:
    """Tells apart data that changed under the same name: split sizes, and the first and last object of each."""
    digest = hashlib.sha256()
    for source in sources(args):
        for item in (source[0], source[len(source) - 1]):
            digest.update(f"{len(source)} {item.sentences}".encode() + item.picture.tobytes() + item.mask.tobytes())
    return digest.hexdigest()[:16]


class Below:
    """What lies below the first bridge, a frozen stem and first visual stage, computed once for each picture."""

    def __init__(self):
        self.kept, self.bytes = {}, 0

    @contextlib.contextmanager
    def shared_by(self, model):
        """Within it the model looks its stem and first stage up here; only if nothing there learns, on a CPU."""
        visual = getattr(model.frozen, "visual", None)
        plain = model.system == "etris" and visual.conv1.weight.device.type == "cpu"
        if not plain or any(parameter.requires_grad for parameter in visual.stages[0].parameters()):
            yield
            return
        blocks, stem, sha = list(visual.stages[0]), visual.stem, model.frozen.identity["sha256"]
        visual.stem = lambda images: self.look_up(images, stem, blocks, sha)
        for block in blocks:
            block.forward = lambda x: x
        try:
            yield
        finally:
            for module, name in ((visual, "stem"), *((block, "forward") for block in blocks)):
                delattr(module, name)

    @torch.no_grad()
    def look_up(self, images, stem, blocks, sha):
        """images (B, 3, S, S) → the first stage's output, computed for those not seen before."""
        keys = [(sha, hash(image.numpy().tobytes())) for image in images]
        fresh = [i for i, key in enumerate(keys) if key not in self.kept]
        x = stem(images[fresh or [0]])  # one at least: a ViT's stem notes its grid
        for block in blocks if fresh else ():
            x = type(block).forward(block, x)
        found = {keys[i]: one.clone() for i, one in zip(fresh, x, strict=False)}
        out = torch.stack([self.kept[key] if key in self.kept else found[key] for key in keys])
        if self.bytes < REMEMBER:
            self.kept.update(found)
            self.bytes += sum(4 * one.numel() for one in found.values())
        return out if out.ndim == 3 else out.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- one run
def run_arguments(row, args, more, rate=None, seed=0):
    """train.py's own arguments for a run of this row."""
    backbone = row.backbone[not args.small] if row.backbone else args.backbone
    given = ["--backbone", backbone, "--dataset", args.dataset, "--system", row.system, "--tuning", row.tuning]
    given += ["--batch-size", str(BATCH)] if args.small else []
    own = train.arguments([*given, "--seed", str(seed), *more, *(["--lr", str(rate)] if rate else [])])
    per_epoch = len(train.epoch_batches(len(sources(own)[0]), own.batch_size, seed, 0))
    own.steps = args.steps or own.epochs * per_epoch
    return own


@functools.cache
def frozen_hash(system, backbone, weights, size, seed):
    return build(backbone, system=system, weights=weights, size=size, seed=seed).frozen.identity["sha256"]


def configuration(own, row) -> dict:
    """All that decides a run's outcome. Two rows with the same one are the same run."""
    names = ("backbone", "dataset", "system", "size", "words", "batch_size", "accumulate", "schedule", "dropout",
             "width", "lr", "bridge_lr", "beta2", "weights", "limit", "seed", "steps", "amp")  # fmt: skip
    sha = frozen_hash(own.system, own.backbone, own.weights, own.size, own.seed if own.weights == "random" else 0)
    fixed = {"tuning": "+".join(parse(own.tuning)), "frozen": sha, "data": data_hash(own)}
    return json.loads(json.dumps({name: getattr(own, name) for name in names} | fixed | row.build))


def run_once(own, row, bar, below) -> dict:
    """Train and test one configuration → what results files keep of it. Ctrl-C saves it at the end of the step."""
    device, dtype = pick_device(own.device)[0], pick_dtype(pick_device(own.device)[0], own.amp)[0]
    own.workers = (0 if device.type == "cpu" else 4) if own.workers is None else own.workers
    training, val, test = sources(own)
    train.seed_all(own.seed)
    model = train.make_model(own, device, **row.build)
    train.seed_all(own.seed)  # the same dice for dropout, whatever was built
    run = train.Run(own, model, device, dtype, own.steps)
    run.out.mkdir(parents=True, exist_ok=True)
    if (run.out / "last.pt").exists():
        run.restore(run.out / "last.pt")
        bar.update(run.steps)
    with below.shared_by(model), train.interruptible(run):
        while run.steps < run.total:
            train.train_epoch(run, training, bar)
            run.epoch, run.done, run.totals = run.epoch + 1, 0, [0.0, 0.0]
        seconds = 60 * run.minutes + time.time() - run.start
        cast = None if dtype is torch.float32 else dtype
        more = {"batch_size": 2 * own.batch_size, "dtype": cast, "workers": own.workers, "progress": False}
        (found, _), (result, rows) = (evaluate(model, source, device, **more) for source in (val, test))
    kinds = group_scores(rows, "kind") if "kind" in rows[0] else {}
    tuned = {"tuned": count_tuned(model), "tuned_encoders": count_tuned(model, encoders=True)}
    counts = {"steps": own.steps, "rate": own.lr, "seconds": round(seconds, 1), "threads": torch.get_num_threads()}
    return train.provenance(own, model) | counts | tuned | result | {"val": found, "kinds": kinds}


# ---------------------------------------------------------------------------------------------------- results
def read_results(path) -> dict:
    """A results file, or an empty one where there is none; UserError for another version, which is left alone."""
    if not path.exists():
        return {"version": VERSION, "runs": {}}
    try:
        file = json.loads(path.read_text())
        version = file["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no results file ({type(error).__name__}): move it away") from None
    if version != VERSION:
        advice = "move it away or give another --results"
        raise UserError(f"{path}: version {version}, this code writes {VERSION}: {advice}")
    return file


@contextlib.contextmanager
def only_one(folder):
    """UserError where another process works on the same results; the system lets go of the lock when one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process writes there: wait, or give another --results") from None
        yield


class Results:
    """Every run by its configuration, in RESULTS/runs.json, whole after each; .unfinished/ holds a stopped one."""

    def __init__(self, folder):
        self.path, self.below = folder / "runs.json", Below()
        self.file = read_results(self.path)

    def get(self, row, args, more, bar, rate, seed) -> dict:
        """The run of that row, rate and seed: looked up, or done now."""
        own = run_arguments(row, args, more, rate, seed)
        config = configuration(own, row)
        key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        if key in self.file["runs"]:
            bar.update(own.steps)
            return self.file["runs"][key]
        own.out = str(self.path.with_name(".unfinished") / key)
        bar.set_description(f"{row.name}, rate {rate:g}, seed {seed}")
        self.file["runs"][key] = run_once(own, row, bar, self.below) | {"config": config}
        write_file(self.path, json.dumps(self.file, indent=1).encode())
        shutil.rmtree(own.out)
        return self.file["runs"][key]


def run_table(name, args, more) -> list[dict]:
    """Every row at its best rate and every seed → the runs, each with its row's name; written as they come."""
    rows, results, done = chosen_rows(name, args.rows), Results(args.results), []
    plans = [(row, rates(row, args, more)) for row in rows]
    total = sum(run_arguments(row, args, more).steps * (len(values) + args.seeds - 1) for row, values in plans)
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for row, values in plans:
            tried = [results.get(row, args, more, bar, rate, 0) for rate in values]
            best = max(tried, key=lambda run: run["val"]["mIoU"])
            runs = [best, *(results.get(row, args, more, bar, best["rate"], seed) for seed in range(1, args.seeds))]
            done += [{"row": row.name, **run} for run in runs]
            write_table(name, args, done)
    return done


def rates(row, args, more) -> list[float]:
    """The three to choose from; only one at full size, or where the command gives it."""
    given = any(option.split("=")[0] == "--lr" for option in more)
    return [*RATES] if args.small and not given else [run_arguments(row, args, more).lr]


def chosen_rows(name, wanted) -> list[Row]:
    known = {row.name: row for row in TABLES[name][1]}
    if unknown := [row for row in wanted or () if row not in known]:
        raise UserError(f"{name} has no row {unknown[0]!r}: choose of {'; '.join(known)}")
    return [row for row in known.values() if not wanted or row.name in wanted]


def table_path(name, args) -> Path:
    """RESULTS/table6.json; of another backbone or data set RESULTS/table6-RN101-refcoco.json."""
    default = (args.backbone, args.dataset) == ("tiny", "scenes")
    return args.results / (name + ("" if default else f"-{args.backbone}-{Path(args.dataset).name}") + ".json")


def write_table(name, args, done, costs=None):
    """The table's .json, .md and .png: the runs so far, and rows of an earlier call that are comparable with them."""
    path, order, groups = table_path(name, args), [row.name for row in TABLES[name][1]], by_row(done)
    own_presets = name == "systems" and not args.small
    same = operator.itemgetter("data", "dataset", *(() if own_presets else ("steps", "size", "batch_size")))
    before = read_results(path)
    for run in before["runs"]:
        if run["row"] in order and run["row"] not in groups and same(run["config"]) == same(done[0]["config"]):
            done = [*done, run]
    done = sorted(done, key=lambda run: order.index(run["row"]))
    extra = {"difference": differences(done)} if name == "question" and len(by_row(done)) == 2 else {}
    costs = {row: x for row, x in (before.get("costs", {}) | (costs or {})).items() if row in by_row(done)}
    extra |= {"costs": costs} if costs else {}
    file = {"version": VERSION, "table": name, "runs": done} | extra
    write_file(path, json.dumps(file, indent=1).encode())
    write_file(path.with_suffix(".md"), report(file).encode())
    draw(TABLES[name][0], done, path.with_suffix(".png"))


# ---------------------------------------------------------------------------------------------- what systems cost
def costs(rows, args, more) -> dict[str, dict]:
    """Row → what a step, its memory and a sentence to be found cost: fast paths, by turns, nothing shared."""
    from benchmark import FAST, Bench, ladder, middle, sentence_seconds, take_turns  # the one look upwards

    device = pick_device(run_arguments(rows[0], args, more).device)[0]
    benches = {}
    for row in rows:
        own = run_arguments(row, args, more)
        benches[row.name] = Bench(own, device, **row.build).fill(own.batch_size)
    tricks = replace(ladder(device)[FAST], accumulate=own.accumulate, recompute=own.recompute,
                     dtype=pick_dtype(device, own.amp)[0])  # fmt: skip

    def find(bench):
        return {"": sentence_seconds(bench, tricks, sources(bench.args)[2], 2 * bench.args.batch_size, objects=50)}

    steps = take_turns({row: lambda bench=bench: bench.step(tricks) for row, bench in benches.items()}, 90)
    finds = take_turns({row: lambda bench=bench: find(bench) for row, bench in benches.items()}, 60)
    return {row: {"step": middle(steps[row]["train_step"]), "sentence": middle(finds[row][""]),
                  "memory_mb": bench.memory(tricks)} for row, bench in benches.items()}  # fmt: skip


@command
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", metavar="TABLE", help=", ".join([*TABLES, "counts"]))
    add("--seeds", type=integer(), help="(3; question: 5)")
    add("--steps", type=integer(), help=f"of a run in miniature ({FEW}; question: {STEPS['question']})")
    add("--rows", nargs="+", metavar="ROW", help="only these")
    add("--backbone", default="tiny")
    add("--dataset", default="scenes")
    add("--results", type=Path, default=HERE / "results", metavar="DIR")
    args, more = parser.parse_known_args(argv)
    if args.table == "counts":
        return print(counts())
    if args.table not in TABLES:
        raise UserError(f"unknown table {args.table!r}: choose one of {', '.join([*TABLES, 'counts'])}")
    if fixed := [option for option in more if option.split("=")[0] in ("--seed", "--system", "--tuning")]:
        raise UserError(f"{fixed[0]}: the table's rows and seeds decide that: choose by --rows and --seeds")
    args.seeds = args.seeds or (5 if args.table == "question" else 3)
    args.small = args.backbone.startswith("tiny")
    args.steps = args.steps or (STEPS.get(args.table, FEW) if args.small else None)
    run_arguments(chosen_rows(args.table, args.rows)[0], args, more)  # what is wrong with the command shows here
    with only_one(args.results):
        read_results(table_path(args.table, args))  # before anything is trained
        done = run_table(args.table, args, more)
        if args.table == "systems":
            write_table(args.table, args, done, costs(chosen_rows(args.table, args.rows), args, more))
        print(report(read_results(table_path(args.table, args))))


if __name__ == "__main__":
    main()
