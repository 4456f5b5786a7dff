"""The paper's claims, and what the runs in results/ say of each.

    python -m experiments.claims             print the table
    python -m experiments.claims --write     renew it where README.md and docs/results.md mark it

The rule. A claim is one difference or several, counted so that the paper's side is positive (ETRIS
less the frozen backbone). A difference has a mean and a 95 % interval: paired t over seeds. Rows
that two versions of torch trained differ in that, too: their difference decides nothing, unless it
is larger than what a version changes (VERSION_MARGIN points).

    held           every interval lies above 0
    contradicted   some interval lies below 0
    not shown      neither; also where nothing was run, or with fewer than three seeds

Another seed gives another model. So what is measured on one model (tests/slow/shipped.py and
experiments/probe.py), with an interval over scenes, is printed and decides nothing. The exception
are claims that a model fails somewhere: the paper, too, shows cases of one model. Rows that
`experiments.reproduce` adds to results/ appear by themselves.
"""

import json
from dataclasses import dataclass, replace

from experiments.tables import TABLES, by_row, interval, paired
from utils.common import ROOT, Parser, command, write_file

FEWEST_SEEDS = 3
VERSION_MARGIN = 2.0  # five repeated runs of ETRIS: −3.5 to +1.4, in the mean 0.1 less
PAGES = ("README.md", "docs/results.md")
BEGIN = "<!-- claims: python -m experiments.claims --write -->"
BEGIN_SHORT = "<!-- claims, short: python -m experiments.claims --write -->"
END = "<!-- end of claims -->"


# ------------------------------------------------------------------------------------- differences
@dataclass(frozen=True)
class Difference:
    """A mean and its 95 % interval, None where not run; paper: the same of the printed scores.

    seeds: pairs of runs, each of so many steps; 0: one model, an interval over scenes.
    """

    name: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    steps: int = 0
    paper: float | None = None
    mixed: bool = False  # trained by two versions of torch

    def __str__(self):
        return f"{self.name} {'not run yet' if self.mean is None else self.numbers()}"

    def is_clear(self) -> bool:
        """Whether a difference of versions could not have made it."""
        return not self.mixed or min(abs(self.low), abs(self.high)) > VERSION_MARGIN

    def numbers(self) -> str:
        """+1.2 (+0.8 … +1.6)"""
        if self.low is None:
            return signed(self.mean)
        versions = ", two versions" if self.mixed else ""
        return f"{signed(self.mean)} ({signed(self.low)} … {signed(self.high)}{versions})"


def signed(x, digits=1) -> str:
    x = round(x, digits) + 0.0  # no −0.0
    return f"{x:+.{digits}f}".replace("-", "−")


def read_result(name) -> dict | list:
    """results/NAME.json; empty where it was not made."""
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def less(tables, row, *others) -> list[Difference]:
    """mIoU of a row less each of the others, from the first of the tables that holds both."""
    return [less_one(tables.split(), row, other) for other in others]


def less_one(tables, row, other) -> Difference:
    name = f"{row} − {other}".replace("->", "→")
    for table in tables:
        runs = read_result(table).get("runs", [])
        if {row, other} <= set(by_row(runs)):
            printed = {row.name: row.printed for row in TABLES[table][1]}
            both = printed[row] and printed[other]
            paper = printed[row][0] - printed[other][0] if both else None
            found = over_seeds(name, paired(runs, row, other), runs[0]["steps"], paper)
            pair = by_row(runs)
            versions = {run.get("torch") for run in pair[row] + pair[other]}
            return replace(found, mixed=len(versions) > 1)
    return Difference(name)


def over_seeds(name, x, steps, paper=None) -> Difference:
    """x: what experiments.tables.interval returns."""
    return Difference(name, x["mean"], x["low"], x["high"], x["seeds"], steps, paper)


def gain_by_kind() -> list[Difference]:
    """What sentences of relation and order gain from the Bridger, less what attributes gain."""
    file = read_result("question")
    x = file.get("difference", {}).get("relation, order less attribute")
    return [over_seeds("relation, order − attribute", x, file["runs"][0]["steps"])] if x else []


LOST = {
    "other sentence": "lost by Δv with another sentence",
    "other image": "lost by Δt with another image",
}


def traffic_over_seeds() -> list[Difference]:
    """What the question's ETRIS loses when a stream is computed with another partner."""
    runs = [run for run in read_result("question").get("runs", []) if run["row"] == "ETRIS"]
    found = []
    for name, words in LOST.items():
        rows = [row for run in runs for row in run.get("traffic", []) if row["row"] == name]
        if rows:
            drops = interval([row["drop"] for row in rows])
            found.append(over_seeds(words, drops, runs[0]["steps"]))
    return found


def traffic_of_shipped() -> list[Difference]:
    """What the shipped model loses so, with an interval over scenes."""
    rows = [row for row in read_result("probe") if row["row"] in LOST]
    return [Difference(LOST[row["row"]], row["drop"], row["low"], row["high"]) for row in rows]


def of_shipped(group) -> list[Difference]:
    """What tests/slow/shipped.py measured on the shipped models."""
    return [Difference(**x) for x in read_result("shipped").get(group, [])]


# ------------------------------------------------------------------------------------------ claims
@dataclass(frozen=True)
class Claim:
    """source: in the paper; files: in results/; notebook: "06, 6.5" or none."""

    text: str
    source: str
    differences: list
    files: str
    notebook: str = ""
    one_model: list = ()
    one_decides: bool = False

    def verdict(self) -> str:
        """held, contradicted or not shown, by the rule above."""
        judged = [x for x in self.differences if x.seeds >= FEWEST_SEEDS and x.is_clear()]
        is_complete = len(judged) == len(self.differences)
        if self.one_decides:
            judged += self.one_model
        if any(x.high < 0 for x in judged):
            return "contradicted"
        if judged and is_complete and all(x.low > 0 for x in judged):
            return "held"
        return "not shown"

    def paper(self) -> str:
        """The printed difference, or the smallest and the largest, and where it stands."""
        printed = sorted(x.paper for x in self.differences if x.paper is not None)
        if not printed:
            return self.source
        ends = dict.fromkeys([signed(printed[0], 2), signed(printed[-1], 2)])
        return f"{' … '.join(ends)} ({self.source})"

    def here(self, short) -> str:
        """The differences that were found; short: the least favorable one."""
        parts = []
        for found in (self.differences, self.one_model):
            done = [x for x in found if x.mean is not None]
            if short and (parts or not done):
                continue
            if short:
                worst = min(done, key=unfavorable)
                text = str(worst) if len(found) > 1 else worst.numbers()
            else:
                text = "; ".join(map(str, found))
            parts.append(text + basis(done, short))
        return ". ".join(part for part in parts if part) or "not run yet"


def unfavorable(x):
    """Sorts what contradicts the paper first, then by the mean."""
    return x.high is None or x.high >= 0, x.mean


def basis(differences, short) -> str:
    """: 3 seeds, 600 steps; or: one model. short: without the steps."""
    seeds = sorted({x.seeds for x in differences})
    steps = sorted({x.steps for x in differences})
    if not any(seeds):
        return ": one model" if seeds else ""
    words = [" or ".join(f"{x:,}" for x in numbers) for numbers in (seeds, steps)]
    return f": {words[0]} seeds" if short else f": {words[0]} seeds, {words[1]} steps"


def claims() -> list[Claim]:
    """All of them, with what results/ holds today."""
    helps = less("question", "ETRIS", "fix backbone")
    talks = less("question", "ETRIS", "mute") + traffic_over_seeds()
    order = less("table6", "without GA", "without HA")
    order += less("table6", "without Bridger", "without GA")
    order += less("table6", "ETRIS", "without Bridger")
    three = less("table4", "2->n, 3", "2->n, 1", "n/2->n, 1", "n->n, 1", "2->n, 2", "n/2->n, 2")
    zooms = less("table5", "conv & deconv", "conv & interpolate")
    width = less("table7", "d = 64", "d = 8", "d = 16", "d = 32", "d = 128")
    full = less("table2", "ETRIS", "full tuning")
    methods = ("Adapter", "Conv Adapter", "Compacter", "CoOp", "LoRA")
    others = less("question table2", "ETRIS", *methods)
    added = less("table8", "Adapter + ETRIS", "ETRIS")
    added += less("table8", "Conv Adapter + ETRIS", "ETRIS")
    relations = "relations and order gain more than attributes"
    exchange = "encoders exchange information, which helps"
    lost = traffic_of_shipped()
    edges = of_shipped("edges")
    digits = of_shipped("digits")
    crowds = of_shipped("crowds")
    return [
        Claim("the Bridger helps", "table 2", helps, "question", "06, 6.5"),
        Claim(relations, "§ 5.2", gain_by_kind(), "question", "06, 6.5"),
        Claim(exchange, "§ 3.2", talks, "question probe", "04, 4.4", lost),
        Claim("boundaries are sharper", "figure 3", [], "shipped", "04, 4.5", edges),
        Claim("HA matters most, then GA, then the Bridger", "table 6", order, "table6"),
        Claim("three bridges are best", "table 4", three, "table4"),
        Claim("deconvolution beats interpolation", "table 5", zooms, "table5"),
        Claim("width 64 is best", "table 7", width, "table7", "05, 5.2"),
        Claim("ETRIS beats full tuning", "table 2", full, "table2", "05, 5.6"),
        Claim("ETRIS beats other efficient methods", "table 2", others, "table2", "05, 5.6"),
        Claim("adapters add to ETRIS", "table 8", added, "table8"),
        Claim("it fails among digits", "figures 4, 5", [], "shipped", "07, 7.2", digits, True),
        Claim("it fails in crowds", "figure 6", [], "shipped", "07, 7.3", crowds, True),
    ]


# ------------------------------------------------------------------------------------------- table
def table_of(found, short=False) -> str:
    """Markdown. short: the least favorable difference only, and not where it stands."""
    if short:
        rows = [("the paper", "here (95 % interval)", "verdict"), ("---",) * 3]
        rows += [(claim.text, claim.here(short), claim.verdict()) for claim in found]
    else:
        rows = [("the paper", "there", "here (95 % interval)", "verdict", "where"), ("---",) * 5]
        for claim in found:
            row = (claim.text, claim.paper(), claim.here(short), claim.verdict(), place(claim))
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def place(claim) -> str:
    """[notebook 06](…) 6.5, `results/question.json`"""
    files = ", ".join(f"`results/{name}.json`" for name in claim.files.split())
    if not claim.notebook:
        return files
    number, section = claim.notebook.split(", ")
    [path] = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return f"[notebook {number}](../notebooks/{path.name}) {section}, {files}"


def with_tables(text, found) -> str:
    """A page with its tables of claims renewed; the same page where it has no markers."""
    for begin, short in ((BEGIN, False), (BEGIN_SHORT, True)):
        if begin in text:
            before, _, rest = text.partition(begin)
            after = rest[rest.index(END) :]
            text = f"{before}{begin}\n{table_of(found, short)}\n{after}"
    return text


@command
def main(argv=None):
    parser = Parser(description="The paper's claims, and what results/ says of each")
    parser.add_argument("--write", action="store_true", help=f"renew it in {', '.join(PAGES)}")
    args = parser.parse_args(argv)
    found = claims()
    print(table_of(found))
    for name in PAGES if args.write else ():
        path = ROOT / name
        write_file(path, with_tables(path.read_text(encoding="utf-8"), found).encode())


if __name__ == "__main__":
    main()
