"""10a. What the papers print, as data: the rows of ETRIS' tables, parameter counts, three systems; and how we print it.

experiments.py trains these rows and hands its runs to `report` and `draw`; `python experiments.py counts` prints
`counts()`, which trains nothing. What the ETRIS paper prints as oIoU is its code's mIoU (README, ledger).
"""

import dataclasses
import statistics

import torch

from clip_model import CLIP, SIZES
from etris import assemble
from tuning import apply, parse


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
SHOWN = ("oIoU", "mIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")
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
        Row("CoOp, ViT", "coop", backbone=VIT))),  # the best of tuning.py in table 2 in miniature
    "question": ("Does the Bridger help?", (FROZEN, ETRIS)),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- counts
def count_tuned(model, encoders=False) -> int:
    """Parameters that learn; encoders=True: without the decoder, as the paper's tables count them."""
    head = ("hierarchical.", "global_.", "projector.")
    learns = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(count for name, count in learns if not (encoders and name.startswith(head)))


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


# ------------------------------------------------------------------------------------------- what was published
PUBLISHED = (  # system, metric, splits of RefCOCO, of RefCOCO+, of RefCOCOg, mean of the nine
    ("ETRIS, RN101", "mIoU, printed as oIoU", "71.06 / 74.11 / 66.66", "62.23 / 68.51 / 52.79", "60.28 / 60.42 / 57.86",
     "63.77"),
    ("ETRIS, ViT-B/16", "the same", "70.51 / 73.51 / 66.63", "60.10 / 66.89 / 50.17", "59.82 / 59.91 / 57.88", "62.82"),
    ("BarLeRIa without global", "mIoU, from the reviews", "71.4", "64.0", "–", "65.4"),
    ("BarLeRIa", "the same", "72.2", "65.0", "–", "66.5"),
    ("DETRIS, base", "mIoU", "76.0 / 78.2 / 73.5", "68.9 / 74.0 / 61.5", "67.9 / 68.1 / 65.9", "70.4"),
    ("DETRIS, base", "oIoU", "74.3 / 77.6 / 71.4", "65.6 / 72.0 / 56.5", "65.2 / 66.4 / 63.2", "68.0"),
    ("DETRIS, large", "mIoU", "77.3 / 79.0 / 75.2", "70.8 / 75.3 / 64.7", "69.3 / 70.2 / 67.9", "72.2"),
    ("DETRIS, large", "oIoU", "76.1 / 78.3 / 73.2", "67.9 / 73.3 / 60.2", "66.8 / 68.0 / 65.0", "69.9"),
    ("DETRIS, large, trained on three sets", "mIoU", "81.0 / 81.9 / 79.0", "75.2 / 78.6 / 70.2", "74.6 / 75.3 / –",
     "77.2"),
    ("DETRIS, large, trained on three sets", "oIoU", "80.7 / 82.2 / 77.9", "73.1 / 77.5 / 66.0", "73.2 / 74.7 / –",
     "75.7"),
)  # ETRIS: table 1; BarLeRIa: averages and val alone; DETRIS: its authors' table # fmt: skip
REVIEWS = {  # BarLeRIa's, batch 32, two V100: seconds an epoch of RefCOCO+, GB, seconds for its val's 10,758 sentences
    "ETRIS, ViT": (1230, 32.2, 626), "BarLeRIa without global": (1032, 35.5, 644), "BarLeRIa": (1087, 41.3, 727),
}  # fmt: skip


def published() -> str:
    """The table of what three systems' authors print."""
    columns = "published", "metric it really is", "RefCOCO", "RefCOCO+", "RefCOCOg", "mean"
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * 6, *PUBLISHED)]
    return "\n".join([*lines, "", "val / testA / testB; RefCOCOg val (umd) / test (umd) / val (google).", ""])


# ---------------------------------------------------------------------------------------------------- reports
SOURCE = {"": "Paper: RN101, RefCOCO val, printed as oIoU, computed as mIoU (Pr@0.5 / 0.7 / 0.9).",
          "systems": "Papers: mIoU on RefCOCO val at full size; more of them below."}  # fmt: skip


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
    whole = (row.name for row in rows if row.printed == ETRIS.printed or row.name.startswith("ETRIS"))
    reference = next((row for row in whole if row in groups), None)
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
    backbones = ", ".join(dict.fromkeys(run["config"]["backbone"] for run in done))
    commits, source = ", ".join(sorted({run["commit"] for run in done})), SOURCE.get(name, SOURCE[""])
    note = (f"{backbones}, {first['dataset']} {first['split']}, {first['sentences']:,} sentences, "
            f"{first['steps']:,} steps, {max(map(len, groups.values()))} seeds (± their standard deviation), "
            f"threads: {first['threads']}, {first['hardware']}, at {commits}. "
            f"{source} A difference within its own ± is none that these runs show.")  # fmt: skip
    return "\n".join([*lines, "", note, ""])


def report(file) -> str:
    """A results file's table, and what else the question or the systems have to show."""
    parts = [markdown(file["table"], file["runs"])]
    parts += [question_table(file["difference"])] if "difference" in file else []
    parts += [cost_table(file["costs"]), published()] if "costs" in file else []
    return "\n".join(parts)


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
    counts = [run["tuned_encoders"] for run in done]
    if min(counts):
        axis.set_xscale("log")
        axis.set_xlim(min(counts) / 2, 4 * max(counts))
    else:
        axis.set_xscale("symlog", linthresh=1000)
        axis.set_xlim(-200, 4 * max(1000, *counts))
        axis.set_xticks([0, *(10**n for n in range(3, 9) if 10**n < 4 * max(counts))])
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
    without, etris = (by_row(done)[row.name] for row in TABLES["question"][1])
    pairs = list(zip(etris, without, strict=False))
    gains = {metric: [a[metric] - b[metric] for a, b in pairs] for metric in ("oIoU", "mIoU")}
    for kind in [*etris[0]["kinds"], *(["relation, order"] if etris[0]["kinds"] else [])]:
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


def cost_table(found) -> str:
    """Costs, each beside ETRIS' own, and the ratios that BarLeRIa's reviews print for the same systems."""
    names = "system", "a step, ms", "its peak, MB", "a sentence, ms", "all three ÷ ETRIS'", "the reviews'"
    here, lines = {}, [f"| {' | '.join(names)} |", "|---" * 6 + "|"]
    for row, x in found.items():
        here[row] = 1000 * x["step"]["seconds"], x["memory_mb"], 1000 * x["sentence"]["seconds"]
    for row, (step, peak, sentence) in here.items():
        ratios = " | ".join(against(costs, row) for costs in (here, REVIEWS))
        lines.append(f"| {row} | {step:.0f} | {peak:.0f} | {sentence:.1f} | {ratios} |")
    return "\n".join([*lines, "", COSTS, ""])


def against(costs, row, base="ETRIS, ViT") -> str:
    """The row's costs divided by ETRIS' own."""
    if row not in costs or base not in costs:
        return "–"
    return " / ".join(f"{cost / own:.2f}" for cost, own in zip(costs[row], costs[base], strict=True))


COSTS = ("Fast paths, medians of rounds in which all rows take their turn; nothing is shared between rows. Sentences "
         "in batches, from picture to mask. The reviews: an epoch, memory and inference.")  # fmt: skip
