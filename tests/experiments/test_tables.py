"""experiments/tables.py: the paper's numbers, the arithmetic, the stored tables' markdown."""

import json

import pytest

from experiments.tables import (
    TABLES,
    arms_table,
    counts,
    differences,
    draw_traffic,
    drops,
    interval,
    paired,
    report,
    share_interval,
    spread,
    talk_table,
)
from utils.common import ROOT

STORED = sorted(path.stem for path in (ROOT / "results").glob("*.md"))


@pytest.mark.parametrize("name", STORED)
def test_a_stored_table_prints_as_it_is_stored(name):
    """The .md beside every .json is what `report` makes of it; every table has one."""
    assert set(TABLES) <= set(STORED)
    file = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert report(file) == (ROOT / "results" / f"{name}.md").read_text()
    if file["table"] == "question":
        assert differences(file["runs"]) == file["difference"]


def test_the_paired_interval_by_hand():
    """Differences 1 2 3 4 5: mean 3, standard deviation 1.5811, standard error 0.7071.

    t(4) = 2.776: 3 ± 1.963.
    """
    found = interval([1, 2, 3, 4, 5])
    assert found["mean"] == 3 and found["sd"] == pytest.approx(1.5811, abs=1e-4)
    assert found["low"] == pytest.approx(1.037, abs=1e-3)
    assert found["high"] == pytest.approx(4.963, abs=1e-3)
    alone = {"mean": 2.5, "sd": None, "low": None, "high": None, "seeds": 1}
    assert interval([2.5]) == alone


def one_run(row, seed, **kinds):
    """kinds: (sentences, mIoU)."""
    table = {kind: {"sentences": n, "mIoU": score} for kind, (n, score) in kinds.items()}
    return {"row": row, "seed": seed, "oIoU": 50.0 + seed, "mIoU": 40.0 + seed, "kinds": table}


def test_gains_are_paired_by_seed_and_pooled_by_sentences():
    """Relation: 10 sentences gain 6, order: 30 gain 2, together (60 + 60) / 40 = 3.

    Attribute gains 1: 2 more.
    """
    runs = []
    for seed in (0, 1):
        attribute = (9, 60 + seed)
        row = one_run("fix backbone", seed, relation=(10, 20), order=(30, 10), attribute=attribute)
        runs.append(row)
    for seed in (0, 1):
        attribute = (9, 61 + seed)
        row = one_run("ETRIS", seed, relation=(10, 26), order=(30, 12), attribute=attribute)
        runs.append(row)
    found = differences(runs)
    means = {name: x["mean"] for name, x in found.items()}
    assert means == pytest.approx(
        {
            "oIoU": 0,
            "mIoU": 0,
            "relation": 6,
            "order": 2,
            "attribute": 1,
            "relation, order": 3,
            "relation, order less attribute": 2,
        }
    )
    assert found["attribute"]["sd"] == 0  # the seeds' own ups and downs cancel


def test_a_spread_is_the_standard_deviation_over_seeds():
    assert spread([1.0, 3.0]) == "2.00 ± 1.41" and spread([2.0]) == "2.00"


def test_counts_prints_every_table_with_the_paper_beside():
    """At RN101's real size; where ours differ from the paper's the last column says why."""
    lines = [line.split(" | ") for line in counts().splitlines()[2:]]
    table = {(line[0].strip("| "), line[1]): (line[2], line[3]) for line in lines}
    assert table["5", "linear"] == ("5.77M", "5,766,641")
    assert table["5", "MLP"] == ("1.68M", "1,682,633")
    assert table["5", "conv & interpolate"] == ("1.45M", "1,450,560")
    assert table["4", "n->n, 1"][1] == "1,215,168"
    widths = [table["7", f"d = {d}"][1] for d in (8, 16, 32, 64, 128)]
    assert widths == ["223,272", "450,384", "923,040", "1,942,080", "4,275,072"]
    assert table["8", "Conv Adapter + ETRIS"] == ("3.14M", "3,138,032")
    assert table["2", "CoOp"][1] == "4,096"
    assert table["3", "RN101 decoder"] == ("23.98M", "24,244,225")
    assert table["3", "ViT-B-16 Bridger"][1] == "598,592"
    for line in lines:
        unit = {"M": 1e6, "K": 1e3}[line[2][-1]]
        here = int(line[3].replace(",", ""))
        equal = abs(here - float(line[2][:-1]) * unit) <= 0.0051 * unit
        assert equal or line[4].strip(" |"), line


def test_the_share_that_needs_talk_by_hand():
    """Gains of 10 and 12, of which mute keeps 9 and 9: 1 and 3 need talk, 2 of 11 points."""
    runs = []
    for row, scores in (("fix backbone", (40, 40)), ("ETRIS", (50, 52)), ("mute", (49, 49))):
        for seed, score in enumerate(scores):
            run = one_run(row, seed, relation=(10, score))
            runs.append({**run, "mIoU": float(score)})
    found = paired(runs, "ETRIS", "mute")
    assert found["mean"] == 2 and found["sd"] == pytest.approx(2**0.5)
    table = arms_table(runs)
    assert "| ETRIS less fix backbone | +11.00 (" in table
    assert "| ETRIS less mute, % of the gain | – |" in table  # of two seeds: no bound
    assert paired(runs, "mute", "fix backbone", ("relation",))["mean"] == 9


def test_the_share_has_fiellers_interval():
    """At its ends a paired t of part − r · whole just excludes 0; None: no bound."""
    parts = [1.0, -2.0, 3.0, 1.5, 2.0]
    wholes = [10.0, 12.0, 9.0, 11.0, 14.0]
    share = share_interval(parts, wholes)
    assert share["mean"] == pytest.approx(100 * sum(parts) / sum(wholes))
    for end in ("low", "high"):
        rest = [a - share[end] / 100 * b for a, b in zip(parts, wholes, strict=True)]
        assert interval(rest)[end] == pytest.approx(0, abs=1e-9)
    assert share_interval(parts, [10.0, -12.0, 9.0, 11.0, 14.0]) is None
    assert share_interval([1.0], [4.0]) == {"mean": 25.0, "low": None, "high": None}
    assert share_interval([1.0], [0.0]) is None


def test_talk_table_prints_traffic_over_seeds():
    traffic = [
        {"row": "none", "drop": 5.0},
        {"row": "other sentence", "drop": 1.0},
        {"row": "other image", "drop": 0.0},
    ]
    run = {"row": "without GA", "mIoU": 50.0, "traffic": traffic}
    more = [{**row, "drop": row["drop"] + 2} for row in traffic]
    other = {"row": "without GA", "mIoU": 52.0, "traffic": more}
    line = "| without GA | 51.00 ± 1.41 | +6.00 ("
    assert line in talk_table([run, other])
    assert talk_table([run]).count("| +5.00 | +1.00 | +0.00 | 1 |") == 1


def test_what_a_condition_lost_is_drawn_for_every_seed(tmp_path):
    """Each run's own row of the probe; a picture with a line for each condition."""
    runs = []
    for row, lost in (("a", 1.0), ("a", 3.0), ("b", 20.0)):
        traffic = [{"row": "other image", "drop": 0.5}, {"row": "other sentence", "drop": lost}]
        runs.append({"row": row, "traffic": traffic})
    assert drops(runs[:2], "other sentence") == [1.0, 3.0]
    assert drops(runs, "other image") == [0.5] * 3
    draw_traffic("traffic", runs, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 5000
