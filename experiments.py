"""10. The paper's tables as data: trains their rows in miniature or at full size, and prints paper | here.

    python experiments.py table6 --seeds 3                                  tiny CLIP, drawn scenes, a laptop
    python experiments.py table6 --backbone RN101 --dataset refcoco --data data        the same at full size, one GPU
    python experiments.py question                      does the Bridger help? paired over seeds, with an interval
    python experiments.py counts                        the paper's parameter counts, in seconds, nothing is trained

Rows of a table share steps, batches, their order, the decoder's first weights and the test scenes; each row's rate is
the one of three that does best on val with the first seed. The model after the last step is tested; none is picked.
A run stands in RESULTS/runs.json under all that decides it, so it serves every table; an interrupted table goes on.
What the paper prints as oIoU is its code's mIoU (README, ledger). Options that are not listed go to train.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import shutil
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import train
from clip_model import CLIP, HERE, SIZES
from command import Parser, UserError, command, integer
from data import REFER
from etris import assemble
from evaluate import evaluate, group_scores, write_file
from official import pick_device, pick_dtype
from scenes import FLAVOURS
from tuning import apply, build, parse

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two processes off one folder
    fcntl = None

VERSION = 1  # of the results files
FEW, STEPS = 600, {"question": 2000}  # of a run in miniature, 150 s at most; at full size the preset's epochs
BATCH = 16  # in miniature: 600 steps of 16 gave 33.6 mIoU in the time in which 300 of 32 gave 29.8 (ETRIS, two seeds)
RATES = (6.67e-4, 2e-3, 6e-3)  # in miniature; at full size the preset's own, for the tables are on val itself
SHOWN = ("oIoU", "mIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")
REMEMBER = 2 * 2**30  # bytes of features that are kept


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: its name, `tuning` of build, what the paper prints (score, Pr@.5 .7 .9; parameters), why the
    count here may differ; `options` go to build, `backbone` names the miniature and the full-size one if not the
    command's."""

    name: str
    tuning: str
    printed: tuple = ()
    parameters: str = ""
    why: str = ""
    options: dict = dataclasses.field(default_factory=dict)
    system: str = "etris"
    backbone: tuple = ()

    @property
    def build(self) -> dict:
        """What is given to build. ETRIS leaves CLIP's positions frozen here: rows differ in what they name alone."""
        return ({"train_positions": False} if self.system == "etris" else {}) | self.options


def bridged(name, **changes) -> Row:
    """ETRIS under another name, with another thing or two."""
    return dataclasses.replace(ETRIS, name=name, **changes)


FULL = Row("full tuning", "full", (70.47, 82.62, 71.35, 17.69), "120.74M",
           "printed: with the pool's extra branch (1,049,600) and logit_scale; the score is CRIS's")  # fmt: skip
FROZEN = Row("fix backbone", "frozen", (67.73, 79.53, 66.10, 12.41), "0.00M")
ADAPTER = Row("Adapter", "adapter", (69.46, 81.05, 69.69, 16.16), "2.39M",
              "text says both encoders; printed is the picture encoder's share alone, 2,391,904")  # fmt: skip
CONV = Row("Conv Adapter", "conv-adapter", (69.33, 80.79, 69.80, 15.95), "1.20M")
ETRIS = Row("ETRIS", "bridger", (71.06, 83.43, 72.68, 17.40), "1.94M")
ZOOM_A, ZOOM_C = (70.94, 82.89, 72.18, 17.89), (70.62, 82.36, 71.05, 17.70)
VIT = ("tiny-vit", "ViT-B-16")
TABLES = {
    "table2": ("Parameter-efficient tuning", (
        FULL, FROZEN, ADAPTER, CONV,
        Row("Compacter", "compacter", (69.11,), "0.19M", "neither n nor rank is printed; here n = 4, rank 1"),
        Row("CoOp", "coop", (67.87,), "4.10K"),
        Row("LoRA", "lora", (68.84,), "0.03M",
            "here rank 4, queries and values of both encoders; printed is the attention pool's share, 32,768"),
        ETRIS)),
    "table4": ("Number and scope of Bridgers", (
        bridged("2->n, 1", printed=(70.96,), parameters="0.43M", options={"stages": (0,)}),
        bridged("n/2->n, 1", printed=(70.18,), parameters="0.29M", why="printed is cut, not rounded",
              options={"stages": (1,)}),
        bridged("n->n, 1", printed=(69.65,), parameters="1.22M", options={"stages": (2,)}),
        bridged("2->n, 2", printed=(70.75,), parameters="0.72M", why="printed is cut, not rounded",
              options={"stages": (0, 1)}),
        bridged("n/2->n, 2", printed=(70.53,), parameters="1.51M", options={"stages": (1, 2)}),
        bridged("2->n, 3"))),
    "table5": ("Zoom layers", (
        Row("linear", "bridger+zoom-linear", ZOOM_A, "5.77M"),
        Row("conv & interpolate", "bridger+zoom-interpolate", (70.08, 81.17, 68.07, 15.95), "1.45M"),
        Row("MLP", "bridger+zoom-mlp", ZOOM_C, "1.68M"),
        bridged("conv & deconv"))),
    "table6": ("Without a part", (
        Row("without HA", "bridger+no-ha", (58.70, 69.53, 45.52, 4.33)),
        Row("without Bridger", "frozen", (67.73, 79.62, 68.47, 15.41)),
        Row("without GA", "bridger+no-ga", (62.21, 71.51, 53.41, 11.16)),
        bridged("ETRIS"))),
    "table7": ("Width of the Bridger", tuple(
        bridged(f"d = {width}", printed=printed, parameters=parameters, options={"width": width})
        for width, parameters, printed in (
            (8, "0.22M", (70.55, 82.56, 70.52, 16.60)), (16, "0.45M", (70.78, 82.98, 70.96, 17.01)),
            (32, "0.92M", (70.92, 83.31, 71.19, 17.42)), (64, "1.94M", ETRIS.printed),
            (128, "4.28M", (70.39, 82.51, 71.12, 16.99))))),
    "table8": ("With other methods", (
        FULL, FROZEN, ADAPTER, CONV, ETRIS,
        Row("Adapter + ETRIS", "adapter+bridger", (71.67, 84.25, 73.50, 18.43), "4.33M", "as Adapter"),
        Row("Conv Adapter + ETRIS", "conv-adapter+bridger", (72.11, 84.46, 73.92, 18.74), "3.14M"))),
    "systems": ("Three systems", (
        Row("fix backbone, ViT", "frozen", backbone=VIT),
        Row("ETRIS, ViT", "bridger", (70.51,), backbone=VIT),
        Row("BarLeRIa without global", "bridger", (71.4,), options={"global_prior": False}, system="barleria",
            backbone=VIT),
        Row("BarLeRIa", "bridger", (72.2,), system="barleria", backbone=VIT),
        Row("DETRIS", "bridger", (76.0,), system="detris", backbone=("tiny-dino", "dinov2-base")),
        Row("CoOp, ViT", "coop", (67.87,), backbone=VIT))),  # the best of tuning.py in table 2 in miniature
    "question": ("Does the Bridger help?", (FROZEN, ETRIS)),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- what rows share
@functools.cache
def open_split(dataset, split, data, limit, side):
    return train.open_dataset(dataset, split, data, limit, side)


def sources(args):
    """Train, val and test; of drawn scenes each is drawn once. RefCOCO's tables are on val (section 5.1)."""
    enough = train.ENOUGH if args.dataset in FLAVOURS else {}
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
def settings(row, args, more, rate=None, seed=0):
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


def count_tuned(model, encoders=False) -> int:
    """Parameters that learn; encoders=True: without the decoder, as the paper's tables count them."""
    head = ("hierarchical.", "global_.", "projector.")
    learns = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(count for name, count in learns if not (encoders and name.startswith(head)))


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
        own = settings(row, args, more, rate, seed)
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
    total = sum(settings(row, args, more).steps * (len(values) + args.seeds - 1) for row, values in plans)
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
    return [*RATES] if args.small and "--lr" not in more else [settings(row, args, more).lr]


def chosen_rows(name, wanted) -> list[Row]:
    known = {row.name: row for row in TABLES[name][1]}
    if unknown := [row for row in wanted or () if row not in known]:
        raise UserError(f"{name} has no row {unknown[0]!r}: choose of {'; '.join(known)}")
    return [row for row in known.values() if not wanted or row.name in wanted]


# ---------------------------------------------------------------------------------------------------- reports
def spread(values) -> str:
    """mean ± standard deviation over seeds; the value alone where there is one."""
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def by_row(done) -> dict[str, list[dict]]:
    """Row's name → its runs by seed."""
    groups = {}
    for run in done:
        groups.setdefault(run["row"], []).append(run)
    return groups


def markdown(name, done) -> str:
    """The table as README shows it: paper | here."""
    title, rows = TABLES[name]
    printed, groups = {row.name: row for row in rows}, by_row(done)
    reference = next((row.name for row in rows if row.printed == ETRIS.printed and row.name in groups), None)
    lines = [f"| {title} | paper | {' | '.join(SHOWN)} | mIoU less {reference or '–'} | tuned | in the encoders | rate "
             "| seconds |", "|---" * (len(SHOWN) + 7) + "|"]  # fmt: skip
    for row, runs in groups.items():
        score, *precisions = printed[row].printed or ("–",)
        paper = f"{score} ({' / '.join(f'{x:.2f}' for x in precisions)})" if precisions else score
        scores = " | ".join(spread([run[metric] for run in runs]) for metric in SHOWN)
        pairs = [a["mIoU"] - b["mIoU"] for a, b in zip(runs, groups.get(reference, ()), strict=False)]
        against = spread(pairs) if pairs and row != reference else "–"
        tail = f"{runs[0]['tuned']:,} | {runs[0]['tuned_encoders']:,} | {runs[0]['rate']:g}"
        seconds = statistics.mean(run["seconds"] for run in runs)
        lines.append(f"| {row} | {paper} | {scores} | {against} | {tail} | {seconds:.0f} |")
    first = done[0]
    note = (f"{first['config']['backbone']}, {first['dataset']} {first['split']}, {first['sentences']:,} sentences, "
            f"{first['steps']:,} steps, {max(map(len, groups.values()))} seeds (± their standard deviation), "
            f"threads: {first['threads']}, {first['hardware']}. Paper: RN101, RefCOCO val, printed as oIoU, computed "
            "as mIoU (Pr@0.5 / 0.7 / 0.9). A difference within its own ± is none that these runs show.")  # fmt: skip
    return "\n".join([*lines, "", note, ""])


def table_path(name, args) -> Path:
    """RESULTS/table6.json; of another backbone or data set RESULTS/table6-RN101-refcoco.json."""
    default = (args.backbone, args.dataset) == ("tiny", "scenes")
    return args.results / (name + ("" if default else f"-{args.backbone}-{Path(args.dataset).name}") + ".json")


def write_table(name, args, done):
    """The table's .json, .md and .png: the runs so far, and rows of an earlier call that are comparable with them."""
    path, order, groups = table_path(name, args), [row.name for row in TABLES[name][1]], by_row(done)
    same = operator.itemgetter("steps", "data", "dataset", "size", "batch_size")
    for run in read_results(path)["runs"]:
        if run["row"] in order and run["row"] not in groups and same(run["config"]) == same(done[0]["config"]):
            done = [*done, run]
    done = sorted(done, key=lambda run: order.index(run["row"]))
    extra = {"difference": differences(done)} if name == "question" and len(by_row(done)) == 2 else {}
    file = {"version": VERSION, "table": name, "runs": done} | extra
    write_file(path, json.dumps(file, indent=1).encode())
    text = markdown(name, done) + ("\n" + question_table(file["difference"]) if extra else "")
    write_file(path.with_suffix(".md"), text.encode())
    draw(TABLES[name][0], done, path.with_suffix(".png"))


def draw(title, done, path):
    """mIoU against tuned parameters of the encoders: mean and standard deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    axis = figure.subplots()
    for row, runs in by_row(done).items():
        x, values = runs[0]["tuned_encoders"], [run["mIoU"] for run in runs]
        error = statistics.stdev(values) if len(values) > 1 else 0
        axis.errorbar(x, statistics.mean(values), yerr=error, fmt="o", capsize=3)
        axis.annotate(row, (x, statistics.mean(values)), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.set_xscale("symlog", linthresh=1000)
    axis.set_xlim(-200, 4 * max(1000, *(run["tuned_encoders"] for run in done)))
    axis.set(xlabel="tuned parameters in the encoders", ylabel="mIoU on test, percent", title=title)
    figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------- does the Bridger help?
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093)  # Student's t, 97.5 %, by degrees of freedom  # fmt: skip


def interval(differences) -> dict:
    """Paired t: mean, standard deviation over n seeds, and the 95 % interval of the mean (None for one seed)."""
    n, mean = len(differences), statistics.mean(differences)
    if n < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None, "seeds": n}
    sd = statistics.stdev(differences)
    half = (T95[n - 2] if n - 2 < len(T95) else 1.96 + 2.5 / (n - 1)) * sd / n**0.5
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "seeds": n}


def pooled(run, kinds) -> float:
    """mIoU over all sentences of these kinds."""
    found = [run["kinds"][kind] for kind in kinds if kind in run["kinds"]]
    return sum(k["sentences"] * k["mIoU"] for k in found) / max(1, sum(k["sentences"] for k in found))


def differences(done) -> dict[str, dict]:
    """With the Bridger less without it, seed by seed: in all, by kind, and how much more relations and order gain."""
    without, bridged = (by_row(done)[row.name] for row in TABLES["question"][1])
    pairs = list(zip(bridged, without, strict=False))
    gains = {metric: [a[metric] - b[metric] for a, b in pairs] for metric in ("oIoU", "mIoU")}
    for kind in [*bridged[0]["kinds"], *(["relation, order"] if bridged[0]["kinds"] else [])]:
        gains[kind] = [pooled(a, kind.split(", ")) - pooled(b, kind.split(", ")) for a, b in pairs]
    if {"relation, order", "attribute"} <= set(gains):
        both = zip(gains["relation, order"], gains["attribute"], strict=True)
        gains["relation, order less attribute"] = [a - b for a, b in both]
    return {what: interval(values) for what, values in gains.items()}


def question_table(found) -> str:
    lines = ["| gain of the Bridger, points | mean | 95 % interval over seeds | seeds |", "|---|---|---|---|"]
    for what, x in found.items():
        between = "–" if x["low"] is None else f"{x['low']:+.2f} to {x['high']:+.2f}"
        lines.append(f"| {what} | {x['mean']:+.2f} | {between} | {x['seeds']} |")
    return "\n".join(
        [*lines, "", "The interval is training's chance on these test scenes, not that of the scenes.", ""]
    )


# ---------------------------------------------------------------------------------------------------- counts
def on_paper(tuning="bridger", backbone="RN101", **options):
    """The model at real size without its numbers: what a parameter count needs."""
    with torch.device("meta"):
        options |= {} if "bridger" in parse(tuning) else {"stages": ()}
        return apply(assemble(CLIP(SIZES[backbone]).requires_grad_(False), 416, 17, **options), parse(tuning))


def counts() -> str:
    """Tables 2 to 5, 7 and 8: paper | here | why, in numbers the encoders tune; table 3 with decoder and total."""
    lines = ["| table | row | paper | here | why |", "|---|---|---|---|---|"]
    for name in ("table2", "table4", "table5", "table7", "table8"):
        for row in TABLES[name][1]:
            here = count_tuned(on_paper(row.tuning, **row.build), encoders=True)
            lines.append(f"| {name[5:]} | {row.name} | {row.parameters} | {here:,} | {row.why} |")
    for backbone, (paper, whole, why) in TABLE3.items():
        model = on_paper(backbone=backbone, train_positions=False)
        encoders, every = count_tuned(model, encoders=True), count_tuned(model)
        lines.append(f"| 3 | {backbone} Bridger | {paper} | {encoders:,} | {why} |")
        lines.append(f"| 3 | {backbone} decoder | 23.98M | {every - encoders:,} | {SENTENCE} |")
        lines.append(f"| 3 | {backbone} total | {whole} | {every:,} | the two together |")
    return "\n".join(lines)


SENTENCE = "printed is RN101's without HA's sentence projection, 23,981,569"
TABLE3 = {
    "RN50": ("1.68M", "25.66M", "not determinable: RN50 and RN101 have the same shapes where bridges stand"),
    "RN101": ("1.94M", "25.92M", ""),
    "ViT-B-16": ("1.39M", "25.37M", "width 128 would give 1,387,648; configured is 64"),
}


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
    args.seeds = args.seeds or (5 if args.table == "question" else 3)
    args.small = args.backbone.startswith("tiny")
    args.steps = args.steps or (STEPS.get(args.table, FEW) if args.small else None)
    settings(chosen_rows(args.table, args.rows)[0], args, more)  # what is wrong with the command shows here
    with only_one(args.results):
        read_results(table_path(args.table, args))  # before anything is trained
        done = run_table(args.table, args, more)
    print(markdown(args.table, done))
    if args.table == "question" and len(by_row(done)) == 2:
        print(question_table(differences(done)))


if __name__ == "__main__":
    main()
