"""What the papers print, as data, and how we print our runs beside it.

Rows of ETRIS' tables, parameter counts, three systems. experiments/reproduce.py trains the rows and
hands its runs to `report` and `draw`; `python -m experiments.reproduce counts` prints `counts()`,
which trains nothing. What the ETRIS paper prints as oIoU is its code's mIoU (docs/differences.md).
"""

import dataclasses
import statistics

import torch

from clip_model import CLIP, CLIP_CONFIGS
from etris import build_etris
from methods.peft import apply_tuning, parse_tuning

METRICS = ("oIoU", "mIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")  # the columns of every table


# --------------------------------------------------------------------------------------------- rows
@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: what the paper prints, and how the model is built here.

    printed: the paper's score, then Pr@0.5, 0.7 and 0.9 where there are any. parameters: as the
    paper prints them. why: why the count here may differ. tuning, system, width and options go to
    build_model. backbones: in miniature and at full size, where they are not the command's.
    rate: the only one in miniature. bridge_rate: the Bridger's, as a multiple. longer: times the
    steps. arguments: more of train.py's. traffic: whether experiments/probe.py measures the model.
    """

    name: str
    tuning: str
    printed: tuple = ()
    parameters: str = ""
    why: str = ""
    width: int | None = None  # of the Bridger; the preset's unless given
    options: dict = dataclasses.field(default_factory=dict)
    system: str = "etris"
    backbones: tuple = ()
    rate: float | None = None
    bridge_rate: float = 1.0
    longer: int = 1
    arguments: tuple = ()
    traffic: bool = False

    @property
    def build(self) -> dict:
        """Options of build_model. CLIP's positions stay frozen: rows differ in their names only."""
        if self.system != "etris":
            return self.options
        return {"train_positions": False, **self.options}


FULL_TUNING = Row(
    name="full tuning",
    tuning="full",
    printed=(70.47, 82.62, 71.35, 17.69),
    parameters="120.74M",
    why="printed: with the pool's extra branch (1,049,600) and logit_scale; the score is CRIS's",
)
FIX_BACKBONE = Row(
    name="fix backbone",
    tuning="frozen",
    printed=(67.73, 79.53, 66.10, 12.41),
    parameters="0.00M",
)
ADAPTER = Row(
    name="Adapter",
    tuning="adapter",
    printed=(69.46, 81.05, 69.69, 16.16),
    parameters="2.39M",
    why="text says both encoders; printed is the image encoder's share alone, 2,391,904",
)
CONV_ADAPTER = Row(
    name="Conv Adapter",
    tuning="conv-adapter",
    printed=(69.33, 80.79, 69.80, 15.95),
    parameters="1.20M",
)
COMPACTER = Row(
    name="Compacter",
    tuning="compacter",
    printed=(69.11,),
    parameters="0.19M",
    why="neither n nor rank is printed; here n = 4, rank 1",
)
COOP = Row(name="CoOp", tuning="coop", printed=(67.87,), parameters="4.10K")
LORA = Row(
    name="LoRA",
    tuning="lora",
    printed=(68.84,),
    parameters="0.03M",
    why="here rank 4, queries and values of both encoders; printed is the attention pool's share, "
    "32,768",
)
ETRIS = Row(
    name="ETRIS",
    tuning="bridger",
    printed=(71.06, 83.43, 72.68, 17.40),
    parameters="1.94M",
)


def etris(name, **changes) -> Row:
    """ETRIS under another name, with another thing or two."""
    return dataclasses.replace(ETRIS, name=name, **changes)


TABLE2 = (FULL_TUNING, FIX_BACKBONE, ADAPTER, CONV_ADAPTER, COMPACTER, COOP, LORA, ETRIS)
TABLE4 = (
    etris("2->n, 1", printed=(70.96,), parameters="0.43M", options={"stages": (0,)}),
    etris(
        "n/2->n, 1",
        printed=(70.18,),
        parameters="0.29M",
        why="printed is cut, not rounded",
        options={"stages": (1,)},
    ),
    etris("n->n, 1", printed=(69.65,), parameters="1.22M", options={"stages": (2,)}),
    etris(
        "2->n, 2",
        printed=(70.75,),
        parameters="0.72M",
        why="printed is cut, not rounded",
        options={"stages": (0, 1)},
    ),
    etris("n/2->n, 2", printed=(70.53,), parameters="1.51M", options={"stages": (1, 2)}),
    etris("2->n, 3"),
)
TABLE5 = (
    etris(
        "linear",
        tuning="bridger+zoom-linear",
        printed=(70.94, 82.89, 72.18, 17.89),
        parameters="5.77M",
    ),
    etris(
        "conv & interpolate",
        tuning="bridger+zoom-interpolate",
        printed=(70.08, 81.17, 68.07, 15.95),
        parameters="1.45M",
    ),
    etris(
        "MLP",
        tuning="bridger+zoom-mlp",
        printed=(70.62, 82.36, 71.05, 17.70),
        parameters="1.68M",
    ),
    etris("conv & deconv"),
)
TABLE6 = (
    Row(name="without HA", tuning="bridger+no-ha", printed=(58.70, 69.53, 45.52, 4.33)),
    Row(name="without Bridger", tuning="frozen", printed=(67.73, 79.62, 68.47, 15.41)),
    Row(name="without GA", tuning="bridger+no-ga", printed=(62.21, 71.51, 53.41, 11.16)),
    ETRIS,
)
TABLE7 = (
    etris(
        "d = 8",
        printed=(70.55, 82.56, 70.52, 16.60),
        parameters="0.22M",
        width=8,
    ),
    etris(
        "d = 16",
        printed=(70.78, 82.98, 70.96, 17.01),
        parameters="0.45M",
        width=16,
    ),
    etris(
        "d = 32",
        printed=(70.92, 83.31, 71.19, 17.42),
        parameters="0.92M",
        width=32,
    ),
    etris("d = 64", width=64),
    etris(
        "d = 128",
        printed=(70.39, 82.51, 71.12, 16.99),
        parameters="4.28M",
        width=128,
    ),
)
TABLE8 = (
    FULL_TUNING,
    FIX_BACKBONE,
    ADAPTER,
    CONV_ADAPTER,
    ETRIS,
    Row(
        name="Adapter + ETRIS",
        tuning="adapter+bridger",
        printed=(71.67, 84.25, 73.50, 18.43),
        parameters="4.33M",
        why="as Adapter",
    ),
    Row(
        name="Conv Adapter + ETRIS",
        tuning="conv-adapter+bridger",
        printed=(72.11, 84.46, 73.92, 18.74),
        parameters="3.14M",
    ),
)
VIT = ("tiny-vit", "ViT-B-16")
SYSTEMS = (
    Row(name="fix backbone, ViT", tuning="frozen", backbones=VIT),
    Row(name="ETRIS, ViT", tuning="bridger", printed=(70.51,), backbones=VIT),
    Row(
        name="BarLeRIa without global",
        tuning="bridger",
        printed=(71.4,),
        options={"global_prior": False},
        system="barleria",
        backbones=VIT,
    ),
    Row(
        name="BarLeRIa",
        tuning="bridger",
        printed=(72.2,),
        system="barleria",
        backbones=VIT,
    ),
    Row(
        name="DETRIS",
        tuning="bridger",
        printed=(76.0,),
        system="detris",
        backbones=("tiny-dino", "dinov2-base"),
    ),
    # the best of methods/peft.py in table 2 in miniature
    Row(name="CoOp, ViT", tuning="coop", backbones=VIT),
)
QUESTION = (
    FIX_BACKBONE,
    etris("ETRIS", traffic=True),  # the same runs as in TALK
    # not in the paper: parts of the way closed (methods/arms.py)
    Row(name="mute", tuning="bridger+mute"),
    Row(name="text only", tuning="bridger+text-only"),
    Row(name="image only", tuning="bridger+image-only"),
    Row(name="text to image", tuning="bridger+text-to-image"),
    Row(name="image to text", tuning="bridger+image-to-text"),
    COOP,
)


def condition(name, tuning="bridger", **changes) -> Row:
    """A condition of docs/talk.md: the Bridger in it, at one rate, and its traffic."""
    return Row(name=name, tuning=tuning, rate=2e-3, traffic=True, **changes)


TALK = (
    condition("as in the question"),
    condition("without GA", tuning="bridger+no-ga"),
    condition("decoder without words", tuning="bridger+no-words"),
    condition("HA without gates", tuning="bridger+no-gates"),
    condition("decoder without language", tuning="bridger+no-language"),
    condition("Bridger's rate × 3", bridge_rate=3.0),
    condition("Bridger's rate × 10", bridge_rate=10.0),
    condition("joins start at 0.3", tuning="bridger+joins-3"),
    condition("joins start at 1", tuning="bridger+joins-10"),
    condition("dropout 0.1", arguments=("--dropout", "0.1")),
    condition("three times the steps", longer=3),
    condition("ViT kind", backbones=VIT),
    condition("relations and order only", arguments=("--dataset", "scenes-where")),
    condition("more, similar objects", arguments=("--dataset", "scenes-crowd")),
    condition("192 pixels", backbones=("small", "RN101"), arguments=("--size", "192")),
)
TABLES = {
    "table2": ("Parameter-efficient tuning", TABLE2),
    "table4": ("Number and scope of Bridgers", TABLE4),
    "table5": ("Zoom layers", TABLE5),
    "table6": ("Without a part", TABLE6),
    "table7": ("Width of the Bridger", TABLE7),
    "table8": ("With other methods", TABLE8),
    "systems": ("Three systems", SYSTEMS),
    "question": ("Does the Bridger help, and does it need to let anything cross?", QUESTION),
    "talk": ("When does talk pay?", TALK),
}


# ------------------------------------------------------------------------------------------- counts
# backbone → the paper's count of the Bridger, of all that learns, and why ours may differ
TABLE3 = {
    "RN50": (
        "1.68M",
        "25.66M",
        "not determinable: RN50 and RN101 have the same shapes where bridges stand",
    ),
    "RN101": ("1.94M", "25.92M", ""),
    "ViT-B-16": ("1.39M", "25.37M", "width 128 would give 1,387,648; configured is 64"),
}
WHY_DECODER = "printed is RN101's without HA's sentence projection, 23,981,569"
DECODER = ("hierarchical_alignment.", "global_alignment.", "projector.")


def count_tuned(model, encoders=False) -> int:
    """Trainable parameters. encoders=True: without the decoder, as the paper's tables count."""
    count = 0
    for name, parameter in model.named_parameters():
        is_decoder = name.startswith(DECODER)
        if parameter.requires_grad and not (encoders and is_decoder):
            count += parameter.numel()
    return count


def on_paper(tuning="bridger", backbone="RN101", **options):
    """The model at its real size, without any numbers in it: all that counting needs."""
    names = parse_tuning(tuning)
    if "bridger" not in names:
        options["stages"] = ()
    with torch.device("meta"):
        clip = CLIP(CLIP_CONFIGS[backbone]).requires_grad_(False)
        model = build_etris(clip, 416, 17, **options)
        apply_tuning(model, names)
    return model


def counts() -> str:
    """Tables 2 to 5, 7 and 8: paper | here | why. Table 3 also counts the decoder."""
    lines = ["| table | row | paper | here | why |", "|---|---|---|---|---|"]
    for name in ("table2", "table4", "table5", "table7", "table8"):
        for row in TABLES[name][1]:
            model = on_paper(row.tuning, width=row.width or 64, **row.build)
            here = count_tuned(model, encoders=True)
            number = name.removeprefix("table")
            lines.append(f"| {number} | {row.name} | {row.parameters} | {here:,} | {row.why} |")
    for backbone, (bridger, total, why) in TABLE3.items():
        model = on_paper(backbone=backbone, train_positions=False)
        encoders = count_tuned(model, encoders=True)
        everything = count_tuned(model)
        decoder = everything - encoders
        lines.append(f"| 3 | {backbone} Bridger | {bridger} | {encoders:,} | {why} |")
        lines.append(f"| 3 | {backbone} decoder | 23.98M | {decoder:,} | {WHY_DECODER} |")
        lines.append(f"| 3 | {backbone} total | {total} | {everything:,} | the two together |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- what was published
# system, metric, RefCOCO, RefCOCO+, RefCOCOg, mean of the nine splits
# ETRIS: its table 1; BarLeRIa: averages and val only; DETRIS: its authors' table
PUBLISHED = (
    (
        "ETRIS, RN101",
        "mIoU, printed as oIoU",
        "71.06 / 74.11 / 66.66",
        "62.23 / 68.51 / 52.79",
        "60.28 / 60.42 / 57.86",
        "63.77",
    ),
    (
        "ETRIS, ViT-B/16",
        "the same",
        "70.51 / 73.51 / 66.63",
        "60.10 / 66.89 / 50.17",
        "59.82 / 59.91 / 57.88",
        "62.82",
    ),
    ("BarLeRIa without global", "mIoU, from the reviews", "71.4", "64.0", "–", "65.4"),
    ("BarLeRIa", "the same", "72.2", "65.0", "–", "66.5"),
    (
        "DETRIS, base",
        "mIoU",
        "76.0 / 78.2 / 73.5",
        "68.9 / 74.0 / 61.5",
        "67.9 / 68.1 / 65.9",
        "70.4",
    ),
    (
        "DETRIS, base",
        "oIoU",
        "74.3 / 77.6 / 71.4",
        "65.6 / 72.0 / 56.5",
        "65.2 / 66.4 / 63.2",
        "68.0",
    ),
    (
        "DETRIS, large",
        "mIoU",
        "77.3 / 79.0 / 75.2",
        "70.8 / 75.3 / 64.7",
        "69.3 / 70.2 / 67.9",
        "72.2",
    ),
    (
        "DETRIS, large",
        "oIoU",
        "76.1 / 78.3 / 73.2",
        "67.9 / 73.3 / 60.2",
        "66.8 / 68.0 / 65.0",
        "69.9",
    ),
    (
        "DETRIS, large, trained on three sets",
        "mIoU",
        "81.0 / 81.9 / 79.0",
        "75.2 / 78.6 / 70.2",
        "74.6 / 75.3 / –",
        "77.2",
    ),
    (
        "DETRIS, large, trained on three sets",
        "oIoU",
        "80.7 / 82.2 / 77.9",
        "73.1 / 77.5 / 66.0",
        "73.2 / 74.7 / –",
        "75.7",
    ),
)


def published() -> str:
    """The table of what the authors of three systems print."""
    columns = ("published", "metric it really is", "RefCOCO", "RefCOCO+", "RefCOCOg", "mean")
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * 6, *PUBLISHED)]
    note = "val / testA / testB; RefCOCOg val (umd) / test (umd) / val (google)."
    return "\n".join([*lines, "", note, ""])


# ------------------------------------------------------------------------------------------ reports
SOURCES = {
    "systems": "Papers: mIoU on RefCOCO val at full size; more of them below.",
}
SOURCE = "Paper: RN101, RefCOCO val, printed as oIoU, computed as mIoU (Pr@0.5 / 0.7 / 0.9)."


def report(file) -> str:
    """A results file as markdown: its table, and what else the question or the systems show."""
    parts = [markdown(file["table"], file["runs"])]
    if "difference" in file:
        parts.append(question_table(file["difference"]))
        parts.append(arms_table(file["runs"]))
    with_traffic = [run for run in file["runs"] if "traffic" in run]
    if with_traffic:
        parts.append(talk_table(with_traffic))
    if file["table"] == "systems":
        parts.append(published())
    return "\n".join(parts)


def markdown(name, runs) -> str:
    """A table's runs as markdown: paper | here."""
    title, rows = TABLES[name]
    rows = {row.name: row for row in rows}
    groups = by_row(runs)
    reference = reference_row(rows.values(), groups)
    columns = [title, "paper", *METRICS, f"mIoU less {reference or '–'}"]
    columns += ["tuned", "in the encoders", "rate", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row, group in groups.items():
        cells = [row, paper_score(rows[row])]
        cells += [spread([run[metric] for run in group]) for metric in METRICS]
        cells.append("–" if row == reference else gain(group, groups.get(reference, [])))
        cells.append(f"{group[0]['tuned']:,}")
        cells.append(f"{group[0]['tuned_encoders']:,}")
        cells.append(f"{group[0]['rate']:g}")
        cells.append(f"{statistics.mean(run['seconds'] for run in group):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", note(name, runs), ""])


def by_row(runs) -> dict[str, list[dict]]:
    """Row's name → its runs by seed."""
    groups = {}
    for run in runs:
        groups.setdefault(run["row"], []).append(run)
    return groups


def reference_row(rows, groups) -> str | None:
    """The row of the whole ETRIS, with which the others are compared, if it was run."""
    for row in rows:
        is_whole = row.printed == ETRIS.printed or row.name.startswith("ETRIS")
        if is_whole and row.name in groups:
            return row.name
    return None


def paper_score(row) -> str:
    """70.47 (82.62 / 71.35 / 17.69)"""
    if not row.printed:
        return "–"
    score, *precisions = row.printed
    if not precisions:
        return f"{score}"
    return f"{score} ({' / '.join(f'{precision:.2f}' for precision in precisions)})"


def spread(values) -> str:
    """mean ± standard deviation over seeds; the value alone where there is one."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def gain(runs, reference_runs) -> str:
    """mIoU minus the reference's, seed by seed."""
    pairs = zip(runs, reference_runs, strict=False)
    differences = [run["mIoU"] - reference["mIoU"] for run, reference in pairs]
    return spread(differences) if differences else "–"


def note(name, runs) -> str:
    """The line below a table: where its numbers come from."""
    first = runs[0]
    backbones = dict.fromkeys(run["config"]["backbone"] for run in runs)
    splits = dict.fromkeys(f"{run['dataset']} {run['split']}" for run in runs)
    sentences = sorted({run["sentences"] for run in runs})
    steps = sorted({run["steps"] for run in runs})
    commits = sorted({run["commit"] for run in runs})
    seeds = max(len(group) for group in by_row(runs).values())
    facts = [
        *backbones,
        *splits,
        f"{either(sentences)} sentences",
        f"{either(steps)} steps",
        f"{seeds} seeds (± their standard deviation)",
        f"threads: {first['threads']}",
        first["hardware"],
        f"at {', '.join(commits)}",
    ]
    source = SOURCES.get(name, SOURCE)
    return (
        f"{', '.join(facts)}. {source} A difference within its own ± is none that these runs show."
    )


def either(counts) -> str:
    """2,000 or 6,000"""
    return " or ".join(f"{count:,}" for count in counts)


def draw(title, runs, path):
    """Plot mIoU against the encoders' trainable parameters: mean and deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    axis = figure.subplots()
    for row, group in by_row(runs).items():
        count = group[0]["tuned_encoders"]
        values = [run["mIoU"] for run in group]
        mean = statistics.mean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else 0
        axis.errorbar(count, mean, yerr=deviation, fmt="o", capsize=3)
        axis.annotate(row, (count, mean), xytext=(5, 4), textcoords="offset points", fontsize=8)
    scale_counts(axis, [run["tuned_encoders"] for run in runs])
    axis.set(xlabel="tuned parameters in the encoders", ylabel="mIoU on test, percent", title=title)
    figure.savefig(path, dpi=110)


def draw_seeds(title, runs, path):
    """A line for each row: mIoU of every seed, and their mean. For rows that train as much."""
    rows = {}
    for row, group in by_row(runs).items():
        label = f"{row}, {group[0]['tuned_encoders']:,} tuned"
        rows[label] = {"mIoU on test, percent": [run["mIoU"] for run in group]}
    draw_dots(title, rows, path)


def draw_traffic(title, runs, path):
    """A line for each condition: what every seed loses with another sentence and another image."""
    rows = {}
    for row, group in by_row(runs).items():
        rows[row] = {
            f"mIoU lost with another {other}": drops(group, f"other {other}")
            for other in ("sentence", "image")
        }
    draw_dots(title, rows, path)


def drops(group, name) -> list[float]:
    """What each run of a group lost in that row of the probe, points of mIoU."""
    return [row["drop"] for run in group for row in run["traffic"] if row["row"] == name]


def draw_dots(title, rows, path):
    """rows: label → what → a number for each seed. A dot for each, a bar for their mean."""
    from matplotlib.figure import Figure

    figure = Figure((7, 1.4 + 0.35 * len(rows)), layout="constrained")
    axis = figure.subplots()
    colors = {}  # of what is drawn
    for y, values_of in enumerate(rows.values()):
        for what, values in values_of.items():
            color = colors.setdefault(what, f"C{len(colors)}")
            label = what if y == 0 else None
            axis.plot(values, [y] * len(values), "o", color=color, alpha=0.5, label=label)
            mean = statistics.mean(values)
            axis.plot(mean, y, "|", color=color, markersize=16, markeredgewidth=2)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("a dot for each seed, a bar for their mean")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def scale_counts(axis, counts):
    """A logarithmic x axis, with a place for 0 where a row trains nothing in the encoders."""
    largest = max(counts)
    if min(counts):
        axis.set_xscale("log")
        axis.set_xlim(min(counts) / 2, 4 * largest)
    else:
        axis.set_xscale("symlog", linthresh=1000)
        axis.set_xlim(-200, 4 * max(1000, largest))
        axis.set_xticks([0, *(10**n for n in range(3, 9) if 10**n < 4 * largest)])


# --------------------------------------------------------------------------- does the Bridger help?
# Student's t, 97.5 %, by degrees of freedom from 1
T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)


def t_of(n) -> float:
    """Student's t, 97.5 %, of n values' mean."""
    return T975[n - 2] if n - 2 < len(T975) else 1.96 + 2.5 / (n - 1)


def interval(differences) -> dict:
    """Paired t: mean, standard deviation over n seeds, 95 % interval of the mean (None for one)."""
    n = len(differences)
    mean = statistics.mean(differences)
    if n < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None, "seeds": n}
    deviation = statistics.stdev(differences)
    half = t_of(n) * deviation / n**0.5
    return {"mean": mean, "sd": deviation, "low": mean - half, "high": mean + half, "seeds": n}


def pooled(run, kinds) -> float:
    """mIoU over all sentences of these kinds."""
    scores = [run["kinds"][kind] for kind in kinds if kind in run["kinds"]]
    total = sum(score["sentences"] * score["mIoU"] for score in scores)
    return total / max(1, sum(score["sentences"] for score in scores))


def differences(runs) -> dict[str, dict]:
    """With the Bridger minus without it, seed by seed: intervals by metric and kind of sentence.

    The last asks whether relations and order gain more than attributes.
    """
    groups = by_row(runs)
    pairs = list(zip(groups["ETRIS"], groups["fix backbone"], strict=False))
    gains = {}
    for metric in ("oIoU", "mIoU"):
        gains[metric] = [with_bridger[metric] - without[metric] for with_bridger, without in pairs]
    kinds = list(groups["ETRIS"][0]["kinds"])
    if kinds:
        kinds.append("relation, order")
    for kind in kinds:
        names = kind.split(", ")
        gains[kind] = [
            pooled(with_bridger, names) - pooled(without, names) for with_bridger, without in pairs
        ]
    if "relation, order" in gains and "attribute" in gains:
        both = zip(gains["relation, order"], gains["attribute"], strict=True)
        gains["relation, order less attribute"] = [a - b for a, b in both]
    return {name: interval(values) for name, values in gains.items()}


def question_table(intervals) -> str:
    lines = ["| gain of the Bridger, points | mean | 95 % interval over seeds | seeds |"]
    lines.append("|---|---|---|---|")
    for name, x in intervals.items():
        between = "–" if x["low"] is None else f"{x['low']:+.2f} to {x['high']:+.2f}"
        lines.append(f"| {name} | {x['mean']:+.2f} | {between} | {x['seeds']} |")
    note = "The interval is training's chance on these test scenes, not that of the scenes."
    return "\n".join([*lines, "", note, ""])


# ----------------------------------------------------------------------------- what needs the talk?
ARM_PAIRS = (  # a row, and the row that it is compared with
    ("ETRIS", "fix backbone"),
    ("mute", "fix backbone"),
    ("text only", "fix backbone"),
    ("image only", "fix backbone"),
    ("text to image", "fix backbone"),
    ("image to text", "fix backbone"),
    ("CoOp", "fix backbone"),
    ("ETRIS", "mute"),
    ("ETRIS", "text only"),
    ("text to image", "mute"),
    ("image to text", "mute"),
)


def paired(runs, row, other, kinds=()) -> dict:
    """mIoU of a row less that of another: their mean over seeds, and its interval."""
    return interval(paired_differences(runs, row, other, kinds))


def paired_differences(runs, row, other, kinds=()) -> list[float]:
    """mIoU of a row less that of another, seed by seed; over all sentences, or those of `kinds`."""
    groups = by_row(runs)
    differences = []
    for run, reference in zip(groups[row], groups[other], strict=False):
        if kinds:
            differences.append(pooled(run, kinds) - pooled(reference, kinds))
        else:
            differences.append(run["mIoU"] - reference["mIoU"])
    return differences


def arms_table(runs) -> str:
    """A line for each of ARM_PAIRS: row less row in mIoU, over all sentences, then by kind.

    The last line is the share of ETRIS' gain that is lost where nothing may cross.
    """
    groups = by_row(runs)
    kinds = list(groups["ETRIS"][0]["kinds"])
    columns = ["mIoU, points", "all", *kinds, "seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row, other in ARM_PAIRS:
        if row not in groups or other not in groups:
            continue
        found = [paired(runs, row, other, kind) for kind in ((), *((kind,) for kind in kinds))]
        cells = [f"{row} less {other}", *map(interval_cell, found), str(found[0]["seeds"])]
        lines.append(f"| {' | '.join(cells)} |")
    if "mute" in groups:
        cells = [share_cell(runs, kind) for kind in ((), *((kind,) for kind in kinds))]
        lines.append(f"| ETRIS less mute, % of the gain | {' | '.join(cells)} | |")
    note = (
        "Mean and 95 % interval (paired t; of the share Fieller's, – where the gain's own interval "
        "contains 0) over seeds, on the same test scenes."
    )
    return "\n".join([*lines, "", note, ""])


def share_cell(runs, kinds) -> str:
    """ETRIS less mute as a share of ETRIS less the frozen backbone, in percent."""
    gains = paired_differences(runs, "ETRIS", "fix backbone", kinds)
    talk = paired_differences(runs, "ETRIS", "mute", kinds)
    share = share_interval(talk, gains)
    return "–" if share is None else interval_cell(share, digits=0)


def share_interval(parts, wholes) -> dict | None:
    """mean(parts) / mean(wholes) in percent over paired seeds, and Fieller's 95 % interval.

    It holds every share r for which a paired t of part − r · whole does not exclude 0: so the
    error of both means counts. None where wholes' own interval contains 0: shares have no bound
    then.
    """
    part = statistics.mean(parts)
    whole = statistics.mean(wholes)
    n = len(parts)
    if n < 2:
        return {"mean": 100 * part / whole, "low": None, "high": None} if whole else None
    # (part − r · whole)² ≤ t² · variance of their mean: a r² − 2 b r + c ≤ 0
    factor = t_of(n) ** 2 / n
    a = whole**2 - factor * statistics.variance(wholes)
    b = whole * part - factor * statistics.covariance(wholes, parts)
    c = part**2 - factor * statistics.variance(parts)
    if a <= 0:
        return None
    root = (b**2 - a * c) ** 0.5
    shares = {"mean": part / whole, "low": (b - root) / a, "high": (b + root) / a}
    return {name: 100 * share for name, share in shares.items()}


def interval_cell(x, digits=2) -> str:
    """+1.20 (+0.80 … +1.60)"""
    mean = f"{x['mean']:+.{digits}f}"
    if x["low"] is None:
        return mean
    return f"{mean} ({x['low']:+.{digits}f} … {x['high']:+.{digits}f})"


def talk_table(runs) -> str:
    """Per condition: what the trained model loses without the bridges, and with other partners."""
    columns = ["condition", "mIoU", "lost with none", "text → image", "image → text", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row, group in by_row(runs).items():
        cells = [row, spread([run["mIoU"] for run in group])]
        for name in ("none", "other sentence", "other image"):
            cells.append(interval_cell(interval(drops(group, name))))
        lines.append(f"| {' | '.join([*cells, str(len(group))])} |")
    note = (
        "Traffic: mIoU lost when Δv is computed with another sentence about the same image, and Δt "
        "with another image; mean and 95 % interval (t) over seeds."
    )
    return "\n".join([*lines, "", note, ""])
